"""benchmarks/gpu.py without a GPU: its path on a small model, and what it says of precisions."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import gpu


@pytest.mark.parametrize("name", ["tiny", "tiny-nf4"])
def test_a_case_from_its_folder_to_its_row(tmp_path, name) -> None:
    """On the CPU peaks are of the whole process, which tests share: no ratio is looked at."""
    row = gpu.measure_named(name, "cpu")
    assert row["name"] == name
    assert row["largest_image_slices"] >= 1
    assert row["longest_sample_tokens"] > 60  # more than the question: a picture
    for key in ("train_samples_per_second", "test_samples_per_second", "planned_bytes"):
        assert row[key] > 0, key
    gpu.keep(row, tmp_path / "gpu.json")
    gpu.keep({**row, "seconds": 1.0}, tmp_path / "gpu.json")
    (kept,) = json.loads((tmp_path / "gpu.json").read_text())["cases"]
    assert kept["seconds"] == 1.0


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
