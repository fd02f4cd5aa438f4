"""The tables of the benchmark, on numbers worked by hand."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import benchmark_tables
from strategy_tables import NONE, Study

SETTINGS = ("aligned-a0.5", "missing-b0.3", "missing-b0.5", "cross-i5t5", "hybrid-p0.7")


def result(task: str, value: float):
    metric = {"memes": "auc", "medical": "accuracy"}[task]
    return {"task": {"metric": metric}, "metrics": {"both": {metric: value}}}


def study(seeds: int, *, gain: float = 0.1) -> Study:
    """Zero-shot is at .5; FedAvg at .9 on memes and .7 on medical in all settings but the harder of
    missing, where it is .2 lower; each seed adds .01. With strategies it has `gain` on memes."""
    found = {}
    for task, level in (("memes", 0.9), ("medical", 0.7)):
        for setting in SETTINGS:
            found[task, setting, "zero-shot", "plain"] = dict.fromkeys(
                range(seeds), result(task, 0.5)
            )
            plain = level - 0.2 * (setting == "missing-b0.5")
            better = plain + gain * (task == "memes")
            for strategy, value in (("plain", plain), ("paper", better)):
                found[task, setting, "fedavg", strategy] = {
                    seed: result(
                        task,
                        value + 0.01 * seed + (0.001 if strategy == "paper" else 0) * (seed % 2),
                    )
                    for seed in range(seeds)
                }
    return Study(SETTINGS, ("plain", "paper"), found)


def rows(text: str) -> dict[str, list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {line[0]: line[1:] for line in cells}


def test_means_over_tasks_and_settings() -> None:
    text = benchmark_tables.scenario_table(study(5))
    found = rows(text)
    assert found["method"] == ["aligned", "missing", "cross", "hybrid"]
    # the same run for every seed: no interval
    assert found["Zero-shot"] == ["0.500"] * 4
    # (.9 + .7) / 2 and half of the harder setting's .2 less; seeds 0, .01 .. .04 on top, whose
    # interval is t(4, .975) sd / sqrt 5 = 2.7764 * .015811 / 2.2361
    assert found["FedAvg"] == ["0.820 ± 0.020", "0.720 ± 0.020", "0.820 ± 0.020", "0.820 ± 0.020"]
    # .1 on one of two tasks, and the odd seeds' .001; as sure as differences of .05 can be
    assert found["FedAvg + prompt + regularisation"][0].startswith("**0.870 ±")
    assert "over the 4 differences" in text
    assert "seeds: 5, ± half" in text


def test_without_a_gain_and_with_few_seeds_nothing_is_bold() -> None:
    assert "**" not in benchmark_tables.scenario_table(study(5, gain=0.0))
    few = benchmark_tables.scenario_table(study(3))
    assert "**" not in few
    assert "seeds: 3. Fewer" in few
    assert "±" not in few
    assert "no difference is called sure" in few
    assert benchmark_tables.scenario_table(Study(SETTINGS, ("plain",), {})) == NONE


def timed(seed: int, minute: int, seconds: float) -> dict:
    started = f"2026-01-01T00:{minute:02}:00+00:00"
    hardware = {"cpu": "C", "cores": 2}
    time = {"total_seconds": seconds}
    return {"seed": seed, "started": started, "time": time, "hardware": hardware}


def test_how_long_a_seed_took() -> None:
    """Seed 0: from minute 1 to 30 s past minute 4, of 60, 120 and 90 s of runs. The untrained
    model stands for both seeds and counts once."""
    zero = timed(0, 1, 60.0)
    found = {
        ("memes", "aligned-a0.5", "zero-shot", "plain"): {0: zero, 1: zero},
        ("memes", "missing-b0.5", "zero-shot", "plain"): {0: zero, 1: zero},
        ("memes", "aligned-a0.5", "fedavg", "plain"): {0: timed(0, 1, 120.0), 1: timed(1, 9, 30.0)},
        ("memes", "missing-b0.5", "fedavg", "plain"): {0: timed(0, 3, 90.0)},
    }
    whole = Study(SETTINGS, ("plain",), found)
    part = Study(SETTINGS, ("plain",), {key: found[key] for key in list(found)[:3]})
    text = benchmark_tables.time_table(whole, part)
    assert rows(text)["0"] == ["3", "3.5", "4.5", "C, 2 cores"]
    assert rows(text)["1"] == ["1", "0.5", "0.5", "C, 2 cores"]
    assert "The 3 runs of `mini-quick` took 3.5 minutes" in text
    assert benchmark_tables.time_table(Study(SETTINGS, ("plain",), {}), part) == NONE
