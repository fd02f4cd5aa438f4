"""A user's own data in CSV, TSV or JSON-lines files with named columns.

    root/clinic-a.csv     id,image,question,answer
    root/clinic-b.csv     ...
    root/test.csv
    root/images/...       images, anywhere inside root

One party per file, or one file with a column `party`, or one pool that a partition splits; test
rows in a file of their own or marked in a column `split`. Columns and rules: `fedmllm.data.rows`.
CSV and TSV follow RFC 4180: a cell with a separator, a quote or a line break stands in double
quotes, a quote within it is doubled. UTF-8, with or without a byte order mark; any line endings.

Without a column `id` a row's id is a digest of its content, so that a file may be sorted anew
without changing who holds what.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmllm.data.dataset import Dataset, DatasetSpec
from fedmllm.data.images import ImageFile, image_problem
from fedmllm.data.own import (
    QUESTION,
    ItemError,
    decode,
    folder_of,
    kind_words,
    task_of,
    unicode_text,
)
from fedmllm.data.rows import (
    COLUMN_OPTIONS,
    DEVELOPMENT,
    Reader,
    Row,
    Table,
    columns_of,
    dataset_of,
)
from fedmllm.data.sample import ImageSource
from fedmllm.errors import UserError

SEPARATORS = {".csv": ",", ".tsv": "\t"}
TYPES = (*SEPARATORS, ".jsonl")
NONE = "none"


def load(
    *,
    root: str | Path = "",
    files: str = "*",
    test: str = "test.*",
    parties: str = "auto",
    task: str = "open",
    classes: Sequence[str] = (),
    question: str = QUESTION,
    metric: str = "",
    separator: str = "",
    verify: bool = True,
    **columns: object,
) -> Dataset:
    """Load tables.

    root: data folder, or its one file. files: a pattern, relative to root, of which CSV, TSV and
    JSON-lines files are read; those called dev or validation are not. test: the pattern of test
    files. Either may be ``none``, for a machine that holds only the other. parties, columns: see
    `fedmllm.data.rows`. task, classes, question, metric, verify: as
    for conversations. separator: of the cells, instead of what the file's ending says.

    Raises one `UserError` that lists the problems of all files, with their lines.
    """
    place = Path(root) if root else Path()
    if root and place.is_file():
        root, files = place.parent, glob.escape(place.name)
    folder = folder_of(root, dataset="table", what="your CSV, TSV or JSONL files")
    asked = task_of("table", task, classes=tuple(classes), question=question, metric=metric)

    def image(given: Any, row: Row) -> ImageSource:
        if not isinstance(given, str):
            raise ItemError(f"image must be a path, not {kind_words(given)}")
        problem = image_problem(unicode_text(given, "image"), folder, verify=verify)
        if problem:
            raise ItemError(problem)
        return ImageFile(given, folder)

    reader = Reader(
        asked, columns_of(columns), image, parties, trained=files != NONE, tested=test != NONE
    )
    problems: list[str] = []
    tables = []
    for file, tested in _files(folder, files, test):
        try:
            tables.append(_table(file, tested, separator, problems))
        except ItemError as error:
            problems.append(f"{file}, {error}")
    return dataset_of(tables, reader, problems)


def _files(root: Path, files: str, test: str) -> list[tuple[Path, bool]]:
    """(file, is it a test file), in order of their names."""
    tests = set() if test == NONE else set(_matches(root, test, "test"))
    left_out = (*DEVELOPMENT, *(["test"] if test == NONE else []))
    found = [] if files == NONE else _matches(root, files, "files")
    train = [file for file in found if file not in tests and file.stem not in left_out]
    if not train and files != NONE:
        raise UserError(
            f"no training file: nothing in {root} matches {files!r} and ends in {', '.join(TYPES)}"
        )
    stems = Counter(file.stem for file in train)
    twice = [stem for stem, count in stems.items() if count > 1]
    if twice:
        raise UserError(f"two files are called {twice[0]!r}: give them different names")
    return [(file, False) for file in train] + [(file, True) for file in sorted(tests)]


def _matches(root: Path, pattern: str, option: str) -> list[Path]:
    try:
        found = [f for f in root.glob(pattern) if f.is_file() and f.suffix.lower() in TYPES]
    except (NotImplementedError, ValueError) as error:
        raise UserError(f"{option} {pattern!r} is not a pattern within root: {error}") from error
    return sorted(found, key=lambda file: (file.stem, file.suffix))


def _table(file: Path, test: bool, separator: str, problems: list[str]) -> Table:
    """One file as a table; rows that cannot be read are added to `problems`."""
    try:
        text = decode(file.read_bytes(), ItemError)
    except OSError as error:
        raise ItemError(f"which cannot be read ({error})") from error
    lines = file.suffix.lower() == ".jsonl"
    separator = separator or SEPARATORS.get(file.suffix.lower(), "")
    found = list(_json_rows(text) if lines else _csv_rows(text, separator))
    header: list[str] = []
    rows = []
    for line, cells in found:
        if isinstance(cells, str):
            problems.append(f"{file}, line {line}: {cells}")
        else:
            header += [name for name in cells if name not in header]
            rows.append((line, cells))
    if not rows and not any(isinstance(cells, str) for _, cells in found):
        raise ItemError("line 1: the file has no rows")
    return Table(file.stem, str(file), header, list(_named(rows, file)), test)


def _named(rows: Sequence[tuple[int, Mapping[str, Any]]], file: Path) -> Iterator[Row]:
    """Rows with digests for ids; the second of two equal rows is numbered."""
    seen: Counter[str] = Counter()
    for line, cells in rows:
        canonical = json.dumps(cells, sort_keys=True)
        name = hashlib.sha256(canonical.encode()).hexdigest()[:16]
        seen[name] += 1
        number = f"-{seen[name]}" if seen[name] > 1 else ""
        yield Row(f"{file}, line {line}", name + number, cells)


def _json_rows(text: str) -> Iterator[tuple[int, Any]]:
    """(line, cells), or (line, what is wrong with it)."""
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            cells = json.loads(content)
        except json.JSONDecodeError as error:
            yield line, f"not JSON at column {error.colno}: {error.msg}"
        except (ValueError, RecursionError) as error:
            yield line, f"JSON that cannot be read: {error}"
        else:
            good = isinstance(cells, dict)
            yield line, cells if good else f"must be an object, not {kind_words(cells)}"


def _csv_rows(text: str, separator: str) -> Iterator[tuple[int, Any]]:
    """(line on which the record begins, cells), or (line, what is wrong with it)."""
    if len(separator) != 1 or separator in '"\r\n':
        raise UserError(f"separator is {separator!r}: give one character, e.g. ';'")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    header: list[str] = []
    line = 1
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, f"the record that begins here is not CSV: {error}"
            return
        if not any(cells):
            continue
        if not header:
            header = cells
            _check_header(header, separator, line)
        elif len(cells) != len(header):
            yield line, f"has {len(cells)} cells, but the header has {len(header)}"
        else:
            yield line, dict(zip(header, cells, strict=True))


def _check_header(header: Sequence[str], separator: str, line: int) -> None:
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice:
        raise ItemError(f"line {line}: two columns are called {twice[0]!r}")
    others = [s for s in ";\t,|" if s != separator and s in header[0]]
    if len(header) == 1 and others:
        raise ItemError(
            f"line {line}: one column, {header[0]!r}: is it separated by {others[0]!r}? "
            "Set data.separator"
        )


SPEC = DatasetSpec(
    summary="your own data: CSV, TSV or JSONL with named columns",
    load=load,
    options={
        "root": "",
        "files": "*",
        "test": "test.*",
        "parties": "auto",
        "task": "open",
        "classes": (),
        "question": QUESTION,
        "metric": "",
        "separator": "",
        "verify": True,
        **COLUMN_OPTIONS,
    },
    source="your own files",
    licence="yours",
    ready=True,
)
