"""benchmarks/gpu.py without a GPU: its path on a small model, and what it says of precisions."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import gpu


def test_cases_from_their_folders_to_their_rows(tmp_path, monkeypatch, capsys) -> None:
    """Each in a process of its own, as on a GPU: a peak is its own, and no other test's."""
    out, names = tmp_path / "gpu.json", ["tiny", "tiny-nf4"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *names, "--device", "cpu", "--out", str(out)])
    gpu.main()
    rows = json.loads(out.read_text())["cases"]
    assert [row["name"] for row in rows] == names, capsys.readouterr().out
    for row in rows:
        assert row["largest_image_slices"] >= 1
        assert row["longest_sample_tokens"] > 60  # more than the question: a picture
        for key in ("train_samples_per_second", "test_samples_per_second", "planned_bytes"):
            assert row[key] > 0, key
        assert row["ratio"] == round(row["planned_bytes"] / row["measured_bytes"], 3)
    gpu.keep({**rows[0], "seconds": 1.0}, out)
    kept = {row["name"]: row["seconds"] for row in json.loads(out.read_text())["cases"]}
    assert kept == {"tiny": 1.0, "tiny-nf4": rows[1]["seconds"]}


def test_bfloat16_is_near_float32_and_not_the_same() -> None:
    found = gpu.compare_precisions("cpu")["logits"]
    assert len(found) == 6
    for name, facts in found.items():
        assert 0 < facts["largest_difference"] < 0.1 * facts["largest_logit"], name
        assert facts["same_argmax"] > 0.8, name
        assert math.isfinite(facts["largest_logit"])


def test_every_case_has_its_model_and_a_name_of_its_own() -> None:
    cases = [*gpu.CASES, *gpu.TRIALS]
    assert len({case.name for case in cases}) == len(cases)
    assert {case.model for case in cases} <= gpu.FOLDERS.keys()


def test_an_unknown_case_is_named(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "nothing"])
    with pytest.raises(SystemExit, match="'nothing' is no case"):
        gpu.main()
