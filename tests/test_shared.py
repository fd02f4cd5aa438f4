"""What the runs of one process share: a sample is encoded once, and not all are kept for ever."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from fedmllm.config import make_config
from fedmllm.experiment import Shared, run
from fedmllm.models.mllm import Mllm
from fedmllm.models.recent import Recent

SMALL = {
    "data": {"name": "memes", "train": 40, "test": 10},
    "partition": {"clients": 3},
    "scenario": "missing",
    "training": {"rounds": 2},
    "evaluation": {"every": 1, "limit": 4, "held_out": 0.25, "conditions": ["both", "neither"]},
}
RUNS = {
    "fedavg": {},
    "local": {"topology": "local"},
    "fused": {"strategy": {"fusion": 0.5}},
    "views": {"strategy": {"views": 1.0}},
}


@pytest.fixture
def asked(mllm: Mllm, monkeypatch) -> Counter:
    """How often each sample, as it was masked, was encoded."""
    plain, counts = mllm.encode, Counter()

    def encode(prompted, **options):
        sample = prompted.sample
        counts[sample.id, sample.image is None, sample.text is None] += 1
        return plain(prompted, **options)

    monkeypatch.setattr(mllm, "encode", encode)
    return counts


def numbers(result) -> str:
    """Metrics as text, since some are NaN: an AUC of a party's few samples."""
    curve = [(line["loss"], line["metrics"]) for line in result["history"]]
    return json.dumps([curve, result["metrics"], result["held_out"]])


def go(name: str, shared: Shared, folder: Path):
    return run(make_config({"name": name, **SMALL, **RUNS[name]}), out=folder / name, shared=shared)


def test_a_sample_is_encoded_once_for_training_tests_and_held_out_shares(
    tmp_path, mllm: Mllm, asked: Counter
) -> None:
    """All runs of a process read a sample as tokens once, and get what each alone would get."""
    shared = Shared(mllm)
    found = {name: go(name, shared, tmp_path / "shared") for name in RUNS}
    assert len(asked) > 50  # both kinds of samples, some of them masked
    assert set(asked.values()) == {1}
    for name in RUNS:
        alone = go(name, Shared(mllm), tmp_path / "alone")
        assert numbers(alone) == numbers(found[name])


def test_what_is_kept_of_samples_is_bounded_and_changes_no_number(
    tmp_path, mllm: Mllm, asked: Counter, monkeypatch
) -> None:
    plain = go("fedavg", Shared(mllm), tmp_path / "plain")
    asked.clear()
    monkeypatch.setattr("fedmllm.experiment.ENCODED_TOKENS", 500)  # a few samples
    monkeypatch.setattr("fedmllm.experiment.TEST_SETS", 1)
    tight = Shared(mllm)
    first = go("fedavg", tight, tmp_path / "first")
    assert 0 < tight.encoded.held <= 500
    again = run(
        make_config({"name": "other", **SMALL, "prompt": "agnostic"}),
        out=tmp_path / "other",
        shared=tight,
    )
    assert len(tight.tests) == 1
    assert numbers(plain) == numbers(first) != numbers(again)
    once = sum(asked.values())
    go("fedavg", tight, tmp_path / "second")
    assert sum(asked.values()) > once  # those that had left


def test_what_was_used_longest_ago_leaves_first() -> None:
    """Within 10: a 4, b 3, c 3. a is asked for, so 4 of d take the places of b and c."""
    kept: Recent[str, str] = Recent(10, len)
    for value in ("aaaa", "bbb", "ccc"):
        assert kept.put(value[0], value) == []
    assert kept.held == 10
    assert kept.get("a") == "aaaa"
    assert kept.put("d", "dddd") == ["bbb", "ccc"]
    assert (len(kept), kept.held) == (2, 8)
    assert kept.get("b") is None
    assert "c" not in kept
    assert kept.put("a", "other") == []  # never replaced, and not counted twice
    assert (kept.get("a"), kept.held) == ("aaaa", 8)
    assert kept.put("e", "e" * 50) == ["dddd", "aaaa"]  # too large, and the last: it stays
    assert (kept.get("e"), kept.held) == ("e" * 50, 50)
    kept.clear()
    assert (len(kept), kept.held, kept.get("e")) == (0, 0, None)
