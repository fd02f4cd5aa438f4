"""Damaged tables: each loads, or is refused with a file and a line; nothing else ever comes out.

Bytes are flipped, cut, inserted and doubled; fields are removed, retyped and swapped. 10,000 in
all are run by `make test-slow`, a share of them by default.
"""

from __future__ import annotations

import json
import re

import numpy as np
import owner_files as owners
import pytest

from fedmllm.data import DATASETS, load_dataset
from fedmllm.errors import UserError

TABLES = {
    "hateful-memes": ("train.jsonl", "test_seen.jsonl"),
    "crisismmd": (
        "crisismmd_datasplit_all/task_humanitarian_text_img_train.tsv",
        "crisismmd_datasplit_all/task_humanitarian_text_img_test.tsv",
    ),
    "vqa-rad": (owners.RAD_TABLE,),
    "slake": ("test.json", "train.json"),
    "medalpaca-flashcards": (owners.CARDS,),
}
VALUES = (None, True, 0, -1, 1.5, "", " ", "x", [], ["a"], {}, {"a": 1}, "\ud800", float("nan"))
VALUES += (10**40, "../../etc/passwd", "/etc/passwd", "a\0b", "ünï", 1e400, "train", "\u2028")
TOKENS = (b"\n", b"\r", b"\t", b'"', b"\\", b"[", b"]", b"{", b"}", b",", b"\x00", b"\xff", b"\xef")
TOKENS += (b"\xed\xa0\x80", b"NaN", b"\\ud800", b"../", b"\xe2\x80\xa8", b"9" * 400)
PLACE = re.compile(r", line \d+")


def damaged_bytes(rng: np.random.Generator, content: bytes) -> bytes:
    """One to three of: a flip, a cut, a token put in, a piece doubled, the end lost."""
    for _ in range(rng.integers(1, 4)):
        at, end = sorted(rng.integers(0, len(content) + 1, 2).tolist())
        end = min(end, at + int(rng.integers(1, 60)))
        token = TOKENS[rng.integers(len(TOKENS))]
        content = (
            content[:at] + bytes([rng.integers(256)]) + content[at + 1 :],
            content[:at] + content[end:],
            content[:at] + token + content[at:],
            content[:end] + content[at:end] + content[end:],
            content[: max(1, at)],
        )[rng.integers(5)]
    return content


def damaged_fields(rng: np.random.Generator, name: str, table: str, content: bytes) -> bytes:
    """One to three fields removed, retyped, or given another row's value."""
    text = content.decode()
    if table.endswith(".tsv"):
        rows = [line.split("\t") for line in text.splitlines()]
        for _ in range(rng.integers(1, 4)):
            row = rows[rng.integers(len(rows))]
            value = str(VALUES[rng.integers(len(VALUES))])
            at = int(rng.integers(len(row)))
            row[at : at + 1] = ([], [value], [value, value])[rng.integers(3)]
            if not row:
                row.append("")
        return "\n".join("\t".join(row) for row in rows).encode(errors="replace")
    is_lines = table.endswith(".jsonl")
    rows = [json.loads(line) for line in text.splitlines()] if is_lines else json.loads(text)
    for _ in range(rng.integers(1, 4)):
        at, other = rng.integers(len(rows), size=2).tolist()
        if not isinstance(rows[at], dict) or not isinstance(rows[other], dict) or not rows[at]:
            continue
        field = sorted(rows[at])[rng.integers(len(rows[at]))]
        how = rng.integers(4)
        if how == 0:
            del rows[at][field]
        elif how == 1:
            rows[at][field] = VALUES[rng.integers(len(VALUES))]
        elif how == 2:
            rows[at][field] = rows[other].get(field)
        else:
            rows[at] = VALUES[rng.integers(len(VALUES))]
    dumped = [json.dumps(row) for row in rows]
    return ("\n".join(dumped) if is_lines else f"[{','.join(dumped)}]").encode()


def run(name: str, folder, seeds: range) -> tuple[int, int]:
    """Load a dataset with its tables damaged; how many loaded, and how many were refused."""
    root = owners.write(name, folder)
    originals = {table: (root / table).read_bytes() for table in TABLES[name]}
    loaded = 0
    for seed in seeds:
        rng = np.random.Generator(np.random.PCG64(seed))
        table = TABLES[name][seed % len(TABLES[name])]
        content = originals[table]
        damaged = (
            damaged_bytes(rng, content)
            if rng.integers(2)
            else damaged_fields(rng, name, table, content)
        )
        (root / table).write_bytes(damaged)
        try:
            found = load_dataset(name, root=root)
        except UserError as error:
            lines = str(error).splitlines()
            assert re.match(r"\d+ problems? in the data:$", lines[0]), (seed, lines)
            for line in lines[1:21]:
                assert any(file in line for file in TABLES[name]), (seed, line)
                assert PLACE.search(line), (seed, line)
            assert len(lines) <= 22
        else:
            loaded += 1
            samples = [*found.train, *found.test]
            assert all(sample.answer for sample in samples)
            assert len({sample.id for sample in samples}) == len(samples)
            json.dumps([sample.id + sample.question + (sample.text or "") for sample in samples])
            for sample in samples:
                (sample.id + sample.question + sample.answer + (sample.text or "")).encode()
                assert sample.image is None or sample.image.file.is_relative_to(root)
        (root / table).write_bytes(content)
    return loaded, len(seeds) - loaded


@pytest.mark.parametrize("name", TABLES)
def test_damaged_tables(tmp_path, name):
    loaded, refused = run(name, tmp_path, range(150))
    assert loaded > 0
    assert refused > 20


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_ten_thousand_damaged_tables(tmp_path, name):
    loaded, refused = run(name, tmp_path, range(150, 2150))
    assert loaded > 0
    assert refused > 500


def test_every_dataset_with_files_is_damaged():
    with_files = {name for name, spec in DATASETS.items() if spec.files is not None}
    assert with_files == {*TABLES, "medical-vqa"}  # which reads the tables of the others
