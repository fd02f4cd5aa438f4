"""Tables of the grid `mini` from its committed results: means over tasks by scenario, and how long
it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from strategy_tables import (
    NONE,
    SCENARIOS,
    Study,
    markdown,
    minus,
    over_tasks,
    score,
    shown,
    sure_ones,
)

from fedmllm.report import facts
from fedmllm.report.arms import METHODS
from fedmllm.report.loading import Result
from fedmllm.report.statistics import ENOUGH

NAMES = METHODS | facts.ALGORITHMS
METRICS = {"memes": "auc", "crisis": "macro_f1", "medical": "accuracy"}
Place = tuple[str, str, str]  # method, strategy, scenario
WITH = {"prompt": " + prompt", "paper": " + prompt + regularisation"}


def scenario_table(study: Study) -> str:
    """A method's metric under both modalities in each scenario: of a seed, the mean over tasks of
    the mean over the scenario's settings. With strategies, bold where the difference to the same
    method without is sure."""
    tasks = list(dict.fromkeys(key[0] for key in study.found))
    methods = list(dict.fromkeys(key[2] for key in study.found))
    found = {
        (method, strategy, scenario): over_tasks(
            [_of_task(study, task, scenario, method, strategy) for task in tasks]
        )
        for method in methods
        for strategy in study.strategies
        for scenario in SCENARIOS
        if any(key[2:] == (method, strategy) for key in study.found)
    }
    if not found:
        return NONE
    gained = {
        (method, strategy, scenario): [*minus(values, found[method, "plain", scenario]).values()]
        for (method, strategy, scenario), values in found.items()
        if strategy != "plain" and method != "zero-shot"
    }
    sure = sure_ones(gained)
    rows = [
        [
            NAMES[method] + WITH.get(strategy, ""),
            *(_cell(found, (method, strategy, c), sure) for c in SCENARIOS),
        ]
        for method, strategy in dict.fromkeys(key[:2] for key in found)
    ]
    return f"{markdown(('method',), SCENARIOS, rows)}\n\n{_note(tasks, found, len(gained))}"


def _note(tasks: Sequence[str], found: Mapping[Place, Mapping[int, float]], compared: int) -> str:
    seeds = min(len(values) for values in found.values())
    metrics = ", ".join(f"{facts.METRICS[METRICS[task]]} of {task}" for task in tasks)
    words = (
        f"Means over tasks ({metrics}) and over the settings of a scenario; seeds: {seeds}"
        f"{', ± half of the 95 % interval' * (seeds >= ENOUGH)}. "
    )
    if seeds < ENOUGH:
        return words + f"Fewer than {ENOUGH} seeds: no difference is called sure."
    return words + (
        "Bold, with strategies: surely other than the same method without (paired t-test, Holm "
        f"over the {compared} differences)."
    )


def _of_task(
    study: Study, task: str, scenario: str, method: str, strategy: str
) -> dict[int, float]:
    return study.values(task, study.of(scenario), method, strategy, score())


def _cell(found: Mapping[Place, Mapping[int, float]], at: Place, sure: set[Place]) -> str:
    """What trains nothing has no seed, and so no interval."""
    numbers = [*found[at].values()]
    return shown(numbers[:1] if at[0] == "zero-shot" else numbers, sign=False, sure=at in sure)


def time_table(study: Study, part: Study) -> str:
    """How long each seed took, from its first run's start to its last one's end, and what the runs
    of a part of the grid took together."""
    rows = []
    seeds = sorted({seed for runs in study.found.values() for seed in runs})
    for seed, runs in ((seed, _runs(study, seed)) for seed in seeds):
        if not runs:
            continue
        starts = [datetime.fromisoformat(run["started"]).timestamp() for run in runs]
        seconds = [run["time"]["total_seconds"] for run in runs]
        wall = max(s + t for s, t in zip(starts, seconds, strict=True)) - min(starts)
        cpu = f"{runs[0]['hardware']['cpu']}, {runs[0]['hardware']['cores']} cores"
        rows.append([f"{seed}", f"{len(runs)}", _minutes(wall), _minutes(sum(seconds)), cpu])
    if not rows:
        return NONE
    heads = ["runs", "minutes on the wall", "minutes of all runs", "machine"]
    few = [run for seed in (0, 1) for run in _runs(part, seed)]
    together = _minutes(sum(run["time"]["total_seconds"] for run in few))
    return (
        f"{markdown(('seed',), heads, rows)}\n\nThe {len(few)} runs of `mini-quick` took "
        f"{together} minutes of these: half of that on two cores."
    )


def _runs(study: Study, seed: int) -> list[Result]:
    """Each run of a seed once; what trains nothing has the first."""
    there = (runs[seed] for runs in study.found.values() if seed in runs)
    return list({id(run): run for run in there if run["seed"] == seed}.values())


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}"
