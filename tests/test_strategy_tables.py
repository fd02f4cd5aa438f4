"""The tables of docs/strategies.md, on numbers worked by hand."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import strategy_tables as tables

ALIGNED, MISSING, MISSING_MORE = "aligned-a0.5", "missing-b0.3", "missing-b0.5"
CROSS, HYBRID = "cross-i5t5", "hybrid-p0.7"


def result(score: float, *, seconds: float = 10.0, up: int = 100, cosine: float | None = None):
    drift = {"drift_cosine": cosine, "drift_dispersion": 1.5}
    measured = {} if cosine is None else {"measured": drift}
    return {
        "task": {"metric": "macro_f1", "kind": "choice"},
        "metrics": {"both": {"macro_f1": score}, "image_withheld": {"macro_f1": score / 2}},
        "time": {"train_seconds": seconds, "evaluate_seconds": seconds / 5},
        "bytes": {"up": up, "down": 50},
        "history": [{**measured, "seconds": second} for second in (99.0, seconds, seconds)],
    }


def runs(*scores: float, **change):
    return {seed: result(score, **change) for seed, score in enumerate(scores)}


@pytest.fixture
def study():
    """Plain falls from .8 to .5 with half missing; `resample` is at .7 there, `prompt` nowhere
    else than plain; cross has no gap that can be told from noise. The milder missing setting has
    the same with half the loss and half the gain."""
    aligned = runs(0.8, 0.8, 0.82, 0.78, 0.8)
    found = {
        ("crisis", ALIGNED, "fedavg", "plain"): aligned,
        ("crisis", ALIGNED, "fedavg", "resample"): aligned,
        ("crisis", MISSING, "fedavg", "plain"): runs(0.65, 0.66, 0.65, 0.64, 0.65, cosine=0.75),
        ("crisis", MISSING, "fedavg", "prompt"): runs(0.65, 0.66, 0.65),
        ("crisis", MISSING, "fedavg", "resample"): runs(
            0.75, 0.76, 0.75, 0.745, 0.745, seconds=15.0, up=200
        ),
        ("crisis", MISSING_MORE, "fedavg", "plain"): runs(0.5, 0.52, 0.48, 0.5, 0.5, cosine=0.25),
        ("crisis", MISSING_MORE, "fedavg", "prompt"): runs(0.5, 0.52, 0.48),
        ("crisis", MISSING_MORE, "fedavg", "resample"): runs(
            0.7, 0.72, 0.68, 0.71, 0.69, seconds=15.0, up=200
        ),
        ("crisis", CROSS, "fedavg", "plain"): runs(0.9, 0.7, 0.9, 0.7, 0.8),
        ("crisis", CROSS, "fedavg", "resample"): runs(0.9, 0.7, 0.9, 0.7, 0.8),
    }
    settings = (ALIGNED, MISSING, MISSING_MORE, CROSS, HYBRID)
    return tables.Study(settings, ("plain", "prompt", "resample", "compose", "mixtures"), found)


def row(table: str, *start: str) -> list[str]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    (line,) = [line for line in lines if tuple(line[: len(start)]) == start]
    return line[len(start) :]


def test_gains_are_paired_and_of_a_scenario(study) -> None:
    """By seed the mean of both missing settings: .15, .15, .15, .1575, .1425; t of four degrees
    2.776, deviation .0053."""
    table = tables.gain_table(study)
    half = 2.776445 * 0.00530330 / 5**0.5
    equal = "+0.000 ± 0.000"
    gained = ["= plain", f"**+0.150 ± {half:.3f}**", equal, "–"]
    assert row(table, "crisis", "fedavg", "resample") == gained
    # three seeds: never called certain, and no interval
    assert row(table, "crisis", "fedavg", "prompt") == ["–", "+0.000 (3 seeds)", "–", "–"]
    halved = tables.gain_table(study, "image_withheld")
    assert row(halved, "crisis", "fedavg", "resample")[1].startswith("**+0.075")
    withheld = row(tables.gain_table(study, "text_withheld"), "crisis", "fedavg", "resample")
    assert withheld == ["= plain", "–", "–", "–"]


def test_a_scenario_wants_all_its_settings(study) -> None:
    """One setting alone would be another quantity; a seed that one of them lacks is left out."""
    lacking = dict(study.found)
    lacking["crisis", MISSING, "fedavg", "resample"] = runs(0.75, 0.76, 0.75, 0.745)
    cells = row(
        tables.gain_table(tables.Study(study.settings, study.strategies, lacking)),
        "crisis",
        "fedavg",
        "resample",
    )
    assert cells[1].endswith("(4 seeds)")
    del lacking["crisis", MISSING, "fedavg", "resample"]
    cells = row(
        tables.gain_table(tables.Study(study.settings, study.strategies, lacking)),
        "crisis",
        "fedavg",
        "resample",
    )
    assert cells[1] == "–"


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
    # training that is surely better than aligned has no gap to recover
    assert tables.fieller(gain, [-0.4] * 5) is None


def test_fieller_of_a_gain_that_goes_with_the_gap() -> None:
    """The interval holds the ratios r at which gain - r gap is not told from zero: at its ends the
    paired t statistic of gain - r gap is the quantile itself."""
    gain, gap = [0.1, 0.22, 0.3, 0.2, 0.25], [0.3, 0.45, 0.5, 0.35, 0.4]
    ratio, low, high = tables.fieller(gain, gap)
    assert ratio == pytest.approx(1.07 / 2.0)
    for end in (low, high):
        left = [a - end * b for a, b in zip(gain, gap, strict=True)]
        t = statistics.fmean(left) / (statistics.stdev(left) / 5**0.5)
        assert abs(t) == pytest.approx(2.776445, rel=1e-5)
    assert low < ratio < high


def test_the_gap_and_what_is_recovered(study) -> None:
    both = row(tables.plain_table(study), "crisis", "fedavg", MISSING_MORE)
    assert both[0] == "5"
    assert both[1].startswith("0.500 ± ")
    assert both[-1].startswith("**-0.300")
    table = tables.recovery_table(study)
    recovered = row(table, "crisis", "fedavg", "resample")
    assert recovered[0].startswith("67% (")  # .2 of .3 in the harsher setting
    assert recovered[1].startswith("67% (")  # .15 of .225 in both
    assert recovered[2:] == ["no gap", "–"]
    # three seeds are too few
    assert row(table, "crisis", "fedavg", "prompt")[0] == "–"


def test_over_tasks(study) -> None:
    """A second task with a gap of .1, where composition recovers all and stands for mixtures:
    (.15 + .1) of (.225 + .1). What it lost there in aligned training counts, and is named."""
    found = dict(study.found)
    found["medical", ALIGNED, "fedavg", "plain"] = runs(0.7, 0.7, 0.72, 0.68, 0.7)
    found["medical", ALIGNED, "fedavg", "compose"] = runs(0.68, 0.68, 0.7, 0.66, 0.68)
    for setting in (MISSING, MISSING_MORE):
        found["medical", setting, "fedavg", "plain"] = runs(0.6, 0.61, 0.6, 0.59, 0.6)
        found["medical", setting, "fedavg", "compose"] = runs(0.7, 0.71, 0.7, 0.69, 0.7)
        found["crisis", setting, "fedavg", "mixtures"] = {
            seed: {**each} for seed, each in found["crisis", setting, "fedavg", "resample"].items()
        }
    found["crisis", ALIGNED, "fedavg", "mixtures"] = found["crisis", ALIGNED, "fedavg", "plain"]
    for setting in (ALIGNED, MISSING, MISSING_MORE):
        found["medical", setting, "fedavg", "mixtures"] = found[
            "medical", setting, "fedavg", "compose"
        ]
    table = tables.best_table(tables.Study(study.settings, study.strategies, found))
    aligned, least, harsher, missing, *_ = row(table, "fedavg", "mixtures")
    assert aligned.startswith("-0.010 ± 0.000")
    assert least == "-0.020 ± 0.000 (medical)"
    assert harsher.startswith(f"{0.3 / 0.4:.0%} (")
    assert missing.startswith(f"{0.25 / 0.325:.0%} (")
    # what has runs of aligned training alone recovers nothing that could be told
    for task in ("crisis", "medical"):
        found[task, ALIGNED, "fedavg", "compose"] = {
            seed: {**each} for seed, each in found[task, ALIGNED, "fedavg", "plain"].items()
        }
        for setting in (MISSING, MISSING_MORE):
            found.pop((task, setting, "fedavg", "compose"), None)
    table = tables.best_table(tables.Study(study.settings, study.strategies, found))
    assert "mixtures" in table
    assert "compose" not in table
    # resampling was not run on medical: no claim over all tasks
    assert "resample" not in table
    alone = tables.without(tables.Study(study.settings, study.strategies, found), "medical")
    assert {key[0] for key in alone.found} == {"crisis"}
    assert tables.best_table(alone) == tables.NONE  # one task is not all
    few = tables.short(tables.Study(study.settings, study.strategies, found))
    assert row(tables.best_table(few), "fedavg", "mixtures")[0].startswith("-0.010")
    found["crisis", MISSING, "fedadam", "plain"] = runs(0.5)
    assert len(tables.short(tables.Study(study.settings, (), found)).found) == len(found) - 1


def test_costs_leave_out_what_is_the_plain_run_itself(study) -> None:
    """Missing took 15 s a round and 200 bytes, cross 10 and 100."""
    found = tables.cost_table(study)
    ratio = [(1.5 + 1.5 + 1.0) / 3, (2 + 2 + 1) / 3]
    first, tests, up, _ = row(found, "crisis", "fedavg", "resample")
    assert [first, up] == [f"{each:.2f}" for each in ratio]
    assert tests == first
    assert row(found, "crisis", "fedavg", "prompt") == ["1.00"] * 4


def test_drift(study) -> None:
    table = tables.drift_table(study)
    cells = row(table, "crisis", "fedavg", "missing", "plain")
    assert cells == ["5", "0.500 ± 0.000", "1.500 ± 0.000", "–", "–", "–"]
    assert not any("resample" in line and "aligned" in line for line in table.splitlines())


def test_nothing_run() -> None:
    nothing = tables.Study((ALIGNED,), ("plain",), {})
    made = (
        tables.plain_table,
        tables.scenario_table,
        tables.gap_table,
        tables.gain_table,
        tables.recovery_table,
        tables.best_table,
        tables.cost_table,
        tables.drift_table,
        tables.evidence_table,
    )
    assert {table(nothing) for table in made} == {tables.NONE}
    assert tables.gain_svg(nothing) is None


def test_plain_training_by_scenario(study) -> None:
    """Missing is the mean of both its settings, .65 and .5; aligned is that of the label skew which
    the others have, and not of a milder one."""
    milder = {("crisis", "aligned-a5.0", "fedavg", "plain"): runs(*[0.9] * 5)}
    settings = ("aligned-a5.0", *study.settings)
    more = tables.Study(settings, study.strategies, {**study.found, **milder})
    cells = row(tables.scenario_table(more), "crisis", "fedavg")
    assert [cell.split(" ± ")[0] for cell in cells] == ["0.800", "0.500", "0.575", "0.800", "–"]


def test_whose_gap_it_is(study) -> None:
    """Beside crisis, which loses .3 in the harsher setting and .225 in both, a task that loses .1
    in each: a quarter of the one sum, and .1 of .325. A task without cross leaves no part there."""
    found = dict(study.found)
    found["medical", ALIGNED, "fedavg", "plain"] = runs(0.7, 0.7, 0.72, 0.68, 0.7)
    for setting in (MISSING, MISSING_MORE):
        found["medical", setting, "fedavg", "plain"] = runs(0.6, 0.6, 0.62, 0.58, 0.6)
    both = tables.Study(study.settings, study.strategies, found)
    table = tables.gap_table(both)
    assert row(table, "fedavg", "medical") == [
        "+0.100 ± 0.000, 25%",
        f"+0.100 ± 0.000, {0.1 / 0.325:.0%}",
        "–",
        "–",
    ]
    assert row(table, "fedavg", "crisis")[0].endswith(", 75%")
    assert row(table, "fedavg", "crisis")[2] == "–"
    assert tables.gap_table(study) == tables.NONE  # of one task there are no parts


def test_the_figure(study) -> None:
    """A panel for each condition of the test in which something is gained; the main strategies."""
    found = {(*key[:3], "mixtures" if key[3] == "resample" else key[3]): runs
             for key, runs in study.found.items()}  # fmt: skip
    main = tables.Study(study.settings, study.strategies, found)
    drawn = tables.gain_svg(main)
    assert drawn is not None
    assert drawn == tables.gain_svg(main)
    assert "mixtures" in drawn
    assert "crisis: both" in drawn
    assert "crisis: image withheld" in drawn
    assert "text withheld" not in drawn  # not tested
    assert tables.gain_svg(study) is None  # prompt gains nothing, resample is none of the main ones


def test_both_worlds_are_paired_by_seed() -> None:
    """AUC .9 and .2 of one seed make .55; of what both have. Zero-shot stands in the control."""

    def auc(*scores):
        return {
            seed: {"task": {"metric": "auc"}, "metrics": {"both": {"auc": value}}}
            for seed, value in enumerate(scores)
        }

    place = (CROSS, "fedavg", "plain")
    study = tables.Study((CROSS,), ("plain",), {("memes", *place): auc(0.9, 0.7, 0.8)})
    control = {
        ("memes-swapped", *place): auc(0.2, 0.4),
        ("memes", CROSS, "zero-shot", "plain"): auc(0.25),
        ("memes-swapped", CROSS, "zero-shot", "plain"): auc(0.75),
    }
    table = tables.swapped_table(study, tables.Study((CROSS,), ("plain",), control))
    assert row(table, "fedavg", "plain", CROSS) == ["2", "0.800", "0.300", "0.550"]
    assert row(table, "zero-shot", "plain", CROSS) == ["1", "0.250", "0.750", "0.500"]
    assert tables.swapped_table(study, study) == tables.NONE


def test_later_seeds_alone(study) -> None:
    place = ("crisis", MISSING, "fedavg", "resample")
    assert sorted(tables.later(study, 3).found[place]) == [3, 4]
    prompt = ("crisis", MISSING, "fedavg", "prompt")  # of three seeds
    assert prompt in study.found
    assert prompt not in tables.later(study, 3).found
    assert tables.later(study, 5).found == {}


def test_what_the_parties_found_of_each_modality(study) -> None:
    """Runs that stand in for the arm, such as aligned ones, tested nothing."""
    found = dict(study.found)
    asked = runs(0.7, 0.7, 0.7)
    for seed, (image, filled) in enumerate([(1.25, ["text"]), (-2.0, ["text"]), (3.0, [])]):
        asked[seed]["evidence"] = {"scores": {"image": image, "text": 4.0}, "filled": filled}
    found["crisis", MISSING, "fedavg", "evidence"] = asked
    found["crisis", ALIGNED, "fedavg", "evidence"] = found["crisis", ALIGNED, "fedavg", "plain"]
    table = tables.evidence_table(tables.Study(study.settings, study.strategies, found))
    expected = ["-2.0 to 3.0", "0 of 3", "4.0 to 4.0", "2 of 3"]
    assert row(table, "crisis", "fedavg", MISSING) == expected
    assert ALIGNED not in table
