"""The short table of the grid `mini` from its committed results: means over tasks, by scenario."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
