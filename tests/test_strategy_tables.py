"""The tables of docs/strategies.md, on numbers worked by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import strategy_tables as tables

ALIGNED, MISSING, CROSS, HYBRID = tables.SETTINGS


def result(score: float, *, seconds: float = 10.0, up: int = 100, cosine: float | None = None):
    measured = {} if cosine is None else {"measured": {"drift_cosine": cosine}}
    return {
        "task": {"metric": "macro_f1", "kind": "choice"},
        "metrics": {"both": {"macro_f1": score}, "image_withheld": {"macro_f1": score / 2}},
        "time": {"train_seconds": seconds},
        "bytes": {"up": up, "down": 50},
        "history": [{**measured, "seconds": second} for second in (99.0, seconds, seconds)],
    }


def runs(*scores: float, **change):
    return {seed: result(score, **change) for seed, score in enumerate(scores)}


@pytest.fixture
def found(monkeypatch):
    """Plain falls from .8 to .5 with half missing; `resample` is at .7 there, `prompt` nowhere
    else than plain; cross has no gap that can be told from noise."""
    aligned = runs(0.8, 0.8, 0.82, 0.78, 0.8)
    made = {
        ("crisis", ALIGNED, "fedavg", "plain"): aligned,
        ("crisis", ALIGNED, "fedavg", "resample"): aligned,
        ("crisis", MISSING, "fedavg", "plain"): runs(0.5, 0.52, 0.48, 0.5, 0.5, cosine=0.25),
        ("crisis", MISSING, "fedavg", "prompt"): runs(0.5, 0.52, 0.48),
        ("crisis", MISSING, "fedavg", "resample"): runs(
            0.7, 0.72, 0.68, 0.71, 0.69, seconds=15.0, up=200
        ),
        ("crisis", CROSS, "fedavg", "plain"): runs(0.9, 0.7, 0.9, 0.7, 0.8),
        ("crisis", CROSS, "fedavg", "resample"): runs(0.9, 0.7, 0.9, 0.7, 0.8),
    }
    monkeypatch.setattr(tables, "strategy_runs", lambda: made)
    return made


def row(table: str, *start: str) -> list[str]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    (line,) = [line for line in lines if tuple(line[: len(start)]) == start]
    return line[len(start) :]


def test_gains_are_paired(found) -> None:
    """Gains .2, .2, .2, .21, .19: t of four degrees 2.776, deviation .00707."""
    table = tables.gain_table()
    half = 2.776445 * 0.00707107 / 5**0.5
    equal = "+0.000 ± 0.000"
    gained = ["= plain", f"**+0.200 ± {half:.3f}**", equal, "–"]
    assert row(table, "crisis", "fedavg", "resample") == gained
    # three seeds: never called certain
    assert row(table, "crisis", "fedavg", "prompt") == ["–", f"{equal} (3 seeds)", "–", "–"]
    halved = tables.gain_table("image_withheld")
    assert row(halved, "crisis", "fedavg", "resample")[1].startswith("**+0.100")
    withheld = row(tables.gain_table("text_withheld"), "crisis", "fedavg", "resample")
    assert withheld == ["= plain", "–", "–", "–"]


def test_bold_is_adjusted_for_the_number_of_cells() -> None:
    """p = .04 alone is certain, beside nine others it is not; Holm by hand: .04 x 10."""
    close = [0.1, 0.02, 0.12, 0.01, 0.13]  # t = 2.95, p = .042
    assert tables.sure_ones({"a": close}) == {"a"}
    noise = {k: [0.1, -0.1, 0.05, -0.06, 0.0] for k in range(9)}
    assert tables.sure_ones({"a": close, **noise}) == set()
    assert tables.sure_ones({"a": close[:4]}) == set()


def test_fieller_by_hand() -> None:
    """A gap without noise: the interval of the gain, divided by it. A gap of noise: none."""
    gain, gap = [0.1, 0.2, 0.3, 0.2, 0.2], [0.4] * 5
    half = 2.776445 * 0.07071068 / 5**0.5
    ratio, low, high = tables.fieller(gain, gap)
    assert (ratio, low, high) == pytest.approx((0.5, 0.5 - half / 0.4, 0.5 + half / 0.4))
    assert tables.fieller(gain, [0.5, -0.4, 0.3, -0.2, 0.1]) is None


def test_the_gap_and_what_is_recovered(found) -> None:
    both = row(tables.plain_table(), "crisis", "fedavg", MISSING)
    assert both[0] == "5"
    assert both[1].startswith("0.500 ± ")
    assert both[-1].startswith("**-0.300")
    table = tables.recovery_table()
    recovered = row(table, "crisis", "fedavg", "resample")
    assert recovered[0].startswith("67% (")
    assert recovered[1:] == ["no gap", "–"]
    # three seeds are too few
    assert row(table, "crisis", "fedavg", "prompt")[0] == "–"


def test_costs_leave_out_what_is_the_plain_run_itself(found) -> None:
    """Missing took 15 s a round and 200 bytes, cross 10 and 100."""
    assert row(tables.cost_table(), "crisis", "fedavg", "resample")[:2] == ["1.25", "1.50"]
    assert row(tables.cost_table(), "crisis", "fedavg", "prompt") == ["1.00", "1.00", "1.00"]


def test_drift(found) -> None:
    assert row(tables.drift_table(), "crisis", "fedavg", MISSING, "plain")[0] == "0.250 ± 0.000"
    assert row(tables.drift_table(), "crisis", "fedavg", CROSS, "plain")[0] == "–"


def test_nothing_run(monkeypatch) -> None:
    monkeypatch.setattr(tables, "strategy_runs", dict)
    for table in (tables.plain_table, tables.gain_table, tables.recovery_table, tables.cost_table):
        assert table() == tables.NONE
    assert tables.gain_svg() is None


def test_the_figure(found) -> None:
    drawn = tables.gain_svg()
    assert drawn is not None
    assert drawn == tables.gain_svg()
    assert "resample" in drawn
