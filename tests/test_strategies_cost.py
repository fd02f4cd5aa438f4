"""benchmarks/strategies.py: what it compares, on numbers worked by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import strategies


def test_medians_of_ratios_within_a_repetition() -> None:
    """A machine twice as slow in the second repetition changes no ratio; the third is odd."""
    tries = [
        {
            "plain": strategies.Took(2.0 * slow, 1.0 * slow, 4.0 * slow),
            "evidence": strategies.Took(5.0 * slow, 1.5 * slow * odd, 8.0 * slow),
        }
        for slow, odd in ((1.0, 1.0), (2.0, 1.0), (1.0, 9.0))
    ]
    found = strategies.row("evidence", tries)
    assert found["round"] == pytest.approx(1.5)
    assert found["tests"] == pytest.approx(2.0)
    assert found["start"] == pytest.approx(3.0)
    assert found["plain_round"] == pytest.approx(1.0)
    assert found["rounds"] == pytest.approx([1.5, 1.5, 13.5])


def test_every_strategy_of_the_grid_runs_in_its_own_cell() -> None:
    found = strategies.configs(3)
    assert {"plain", "prompt", "alignment", "paper-alignment", "evidence"} <= found.keys()
    assert len({config.name for config in found.values()}) == len(found)
    assert {config.training.rounds for config in found.values()} == {3}
    assert all(found[name].strategy.evidence > 0 for name in ("evidence",))
