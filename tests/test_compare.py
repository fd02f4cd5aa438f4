"""What differs between two runs, and whether a run made again gives the same numbers."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
from synthetic_grid import result, write

from fedmllm import experiment
from fedmllm.cli import main
from fedmllm.config import make_config
from fedmllm.errors import UserError
from fedmllm.models.mllm import Mllm
from fedmllm.report.compare import agreement_lines, compare_lines, load_one, numbers
from fedmllm.report.loading import result_digest

SMALL = {
    "data": {"name": "memes", "train": 16, "test": 12},
    "partition": {"clients": 2},
    "training": {"rounds": 1},
    "evaluation": {"every": 0, "conditions": ["both"]},
}


def with_path(found: dict, path: str = "p") -> dict:
    return {**found, "_path": path}


def test_config_environment_and_metrics_are_told_apart() -> None:
    a = with_path(result("fedavg", "aligned-a0.5", 0, value=0.70), "one")
    b = with_path(result("fedyogi", "missing-b0.5", 1, value=0.80), "two")
    b["versions"] = {"python": "3.11.7", "torch": "2.10.0"}
    lines = list(compare_lines(a, b))
    assert lines[:2] == ["A  one", "B  two"]
    parts = "\n".join(lines).split("\n\n")
    assert parts[1].splitlines() == [
        "config",
        "  seed: 0 -> 1",
        "  scenario.name: aligned -> missing",
        "  algorithm.name: fedavg -> fedyogi",
        "  scenario.beta: – -> 0.5",
    ]
    assert parts[2].splitlines()[:2] == ["environment", "  versions.torch: 2.9.0 -> 2.10.0"]
    assert "  AUC, image + text: 0.700 ± 0.020  0.800 ± 0.020  +0.100" in parts[3]


def test_the_same_run_differs_in_nothing() -> None:
    one = with_path(result("fedavg", "aligned-a0.5", 0))
    lines = list(compare_lines(one, one))
    assert "config: the same" in lines
    assert "environment: the same" in lines
    assert lines[-3].endswith("+0.000")
    assert lines[-1] == f"numbers: all {len(numbers(one))} are the same"


def with_everything() -> dict:
    """A result that states something in every place where numbers stand."""
    made = with_path(result("local", "aligned-a0.5", 0))
    made["metrics"]["both"] |= {"accuracy": 0.75, "macro_f1": 0.5, "accuracy_slake/zh": 0.25}
    made["per_client"] = {"client-00": {"both": {"auc": 0.5}}}
    own = {"client-00": {"accuracy": 0.5, "auc": None}}
    made["held_out"] = {"per_client": own, "spread": {"accuracy": {"mean": 0.5}}}
    made["modality_alignment"] = {"neither": {"cosine": 0.25}}
    made["history"][0]["measured"] = {"drift_cosine": 0.5}
    return made


PLACES = (
    ("metrics both accuracy", ("metrics", "both", "accuracy")),
    ("metrics neither auc", ("metrics", "neither", "auc")),
    ("metrics both macro_f1", ("metrics", "both", "macro_f1")),
    ("metrics both accuracy_slake/zh", ("metrics", "both", "accuracy_slake/zh")),
    ("per_client client-00 both auc", ("per_client", "client-00", "both", "auc")),
    (
        "held_out per_client client-00 accuracy",
        ("held_out", "per_client", "client-00", "accuracy"),
    ),
    ("held_out spread accuracy mean", ("held_out", "spread", "accuracy", "mean")),
    ("modality_alignment neither cosine", ("modality_alignment", "neither", "cosine")),
    ("round 1 measured drift_cosine", ("history", 0, "measured", "drift_cosine")),
    ("round 2 metrics both auc", ("history", 1, "metrics", "both", "auc")),
    ("round 3 loss", ("history", 2, "loss")),
)


@pytest.mark.parametrize(("name", "keys"), PLACES, ids=[name for name, _ in PLACES])
def test_every_number_is_compared(name: str, keys: tuple) -> None:
    old, new = with_everything(), with_everything()
    part = new
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] += 0.125
    agree, lines = agreement_lines(old, new, 0.1)
    assert not agree
    count = len(numbers(old))
    assert f"the largest difference is 0.125, in {name} (1 of {count} differ)" in lines[0]
    told = list(compare_lines(old, new))
    at = told.index(f"numbers that differ, 1 of {count} (A, B, B - A)")
    before = part[keys[-1]] - 0.125
    assert told[at + 1 :] == [f"  {name}: {before:.9g}  {part[keys[-1]]:.9g}  +0.125"]
    del part[keys[-1]]  # no longer stated
    agree, lines = agreement_lines(old, new, 10.0)
    assert not agree
    assert f"inf, in {name}" in lines[0]
    assert list(compare_lines(old, new))[-1] == f"  {name}: {before:.9g}  –  –"
    assert agreement_lines(new, old, 0.0)[0]  # what an old result does not state is not asked for


def test_what_has_no_value_in_either_agrees() -> None:
    old, new = with_everything(), with_everything()
    del new["held_out"]["per_client"]["client-00"]["auc"]
    assert agreement_lines(old, new, 0.0)[0]


def test_other_tasks_are_not_subtracted() -> None:
    a, b = (with_path(result("fedavg", "aligned-a0.5", 0, task=t)) for t in ("memes", "crisis"))
    assert list(compare_lines(a, b))[-1] == "  the tasks differ: their metrics cannot be compared"


def test_agreement_to_the_last_digit_within_and_beyond() -> None:
    old = result("fedavg", "aligned-a0.5", 0)
    agree, lines = agreement_lines(old, copy.deepcopy(old), 0.0)
    assert agree
    assert lines[0].startswith("the same: all ")
    new = copy.deepcopy(old)
    new["history"][3]["loss"] += 1e-4
    new["versions"]["torch"] = "2.10.0"
    agree, lines = agreement_lines(old, new, 1e-3)
    assert agree
    assert "in round 4 loss" in lines[0]
    assert lines[1:] == ["the environment differs:", "  versions.torch: 2.9.0 -> 2.10.0"]
    agree, lines = agreement_lines(old, new, 1e-6)
    assert not agree
    assert lines[0].startswith(
        "they do not agree: more than 1e-06: the largest difference is 0.0001"
    )
    new["metrics"]["both"]["auc"] = None
    assert not agreement_lines(old, new, 1.0)[0]  # a number that is gone is no agreement
    new["manifest"]["sha256"] = "other"
    assert agreement_lines(old, new, 1.0)[1][0].startswith("different data")


def test_one_result_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path, [result("fedavg", "aligned-a0.5", seed) for seed in (0, 1)])
    with pytest.raises(UserError, match="holds 2 results: give one"):
        load_one(tmp_path)


@pytest.fixture
def command(monkeypatch, capsys, mllm: Mllm):
    """`fedmllm words…` in this process, on the model that is loaded."""
    monkeypatch.setattr(experiment, "load_model", lambda config: mllm)

    def call(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fedmllm", *map(str, words)])
        try:
            main()
        except SystemExit as stopped:
            return int(stopped.code or 0), capsys.readouterr().out
        return 0, capsys.readouterr().out

    return call


def test_rerun_from_the_result_alone(tmp_path: Path, command, mllm: Mllm) -> None:
    config = make_config({"name": "x", **SMALL})
    experiment.run(config, out=tmp_path / "x", mllm=mllm)
    file = tmp_path / "x" / "result.json"
    kept = tmp_path / "kept.json"
    kept.write_bytes(file.read_bytes())
    code, out = command("rerun", kept, "--out", tmp_path / "again")
    assert code == 0
    assert "the same: all " in out
    code, out = command("compare", kept, tmp_path / "again")
    assert code == 0
    assert "config: the same" in out
    code, out = command("rerun", kept, "--out", tmp_path / "again", "--resume")
    assert (code, "the same: all " in out) == (0, True)  # it was done: nothing is run
    other = json.loads(kept.read_text())
    other["metrics"]["both"]["auc"] += 0.1
    other["result_sha256"] = result_digest(other)  # as a forger would
    kept.write_text(json.dumps(other))
    code, out = command("rerun", kept, "--out", tmp_path / "again", "--overwrite")
    assert code == 1
    assert "they do not agree" in out
    assert "metrics both auc" in out
