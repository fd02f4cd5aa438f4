"""Mean, spread and worst over the parties of a run, of two tests that are never mixed.

*The test set*: of a local run, each party's own adapter on the common test set. *Own samples*: of a
run that held some out (`evaluation.held_out`), the final adapter on each party's own, as it holds
them; by the accuracy where some party's few samples have no value of the task's metric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedmllm.report import facts
from fedmllm.report.loading import Result
from fedmllm.report.statistics import interval, mean_and_half

TESTS = {"common": "the test set", "own": "its own held-out samples"}
_SPREAD = ("mean", "std", "min", "max")


@dataclass(frozen=True)
class Parties:
    """Over parties, each number a mean over seeds. worst: the least, or the greatest where less is
    better; half: of its 95 % interval, None of few seeds. files: the results."""

    metric: str
    mean: float
    std: float
    worst: float
    half: float | None
    seeds: int
    files: tuple[str, ...]


def own_key(results: Sequence[Result]) -> str:
    """The metric of the parties' own samples that every run has for every party: the task's, or
    else the accuracy. What is compared must be of one kind, so it is chosen for all at once."""
    key = facts.metric_key(results[0])
    found = [facts.lookup(run, "held_out", "per_client") for run in results]
    parties = [scores for run in found if isinstance(run, Mapping) for scores in run.values()]
    there = all(isinstance(s, Mapping) and s.get(key) is not None for s in parties)
    return key if there else "accuracy"


def spread(result: Result, test: str, condition: str, key: str) -> dict[str, float]:
    """Mean, std, min and max of one run under a test of `TESTS`; empty where it has none. key: of
    the own samples."""
    if test == "common":
        found = facts.spread(result, condition)
    else:
        found = facts.lookup(result, "held_out", "spread", key)
    values = [facts.lookup(found or {}, name) for name in _SPREAD]
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    return dict(zip(_SPREAD, numbers, strict=True)) if len(numbers) == len(_SPREAD) else {}


def worst(result: Result, test: str, condition: str, key: str) -> float | None:
    """The worst party of one run."""
    up = (test == "own" and key == "accuracy") or facts.higher_is_better(result)
    return spread(result, test, condition, key).get("min" if up else "max")


def over_seeds(runs: Sequence[Result], test: str, condition: str, key: str) -> Parties | None:
    """The runs of one arm in one setting together; None if no run has this test."""
    known = [run for run in runs if spread(run, test, condition, key)]
    if not known:
        return None
    spreads = [spread(run, test, condition, key) for run in known]
    mean, std = (mean_and_half([found[k] for found in spreads])[0] for k in ("mean", "std"))
    least = [value for r in known if (value := worst(r, test, condition, key)) is not None]
    metric = facts.metric_key(known[0]) if test == "common" else key
    files = tuple(str(run.get("_path", "")) for run in known)
    return Parties(metric, mean, std, *interval(least), len(known), files)


def occurring(results: Sequence[Result], condition: str, key: str) -> list[str]:
    """The tests that some run has."""
    return [test for test in TESTS if any(spread(r, test, condition, key) for r in results)]


def head(test: str, key: str, results: Sequence[Result]) -> str:
    """What a column of worst parties is called: ``worst party, own samples (accuracy)``."""
    words = "worst party, test set" if test == "common" else "worst party, own samples"
    other = test == "own" and key != facts.metric_key(results[0])
    return f"{words} ({facts.METRICS.get(key, key)})" if other else words
