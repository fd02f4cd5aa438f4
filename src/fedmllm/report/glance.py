"""A board in a few sentences: what was run, what it found, how sure that is.

Means over settings are of arms that were run in all of them with some seed in common: an arm that
lacks the hard settings must not look better for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmllm.report import facts
from fedmllm.report.arms import Arm, Board
from fedmllm.report.grid_figures import method, over, strategy
from fedmllm.report.grid_tables import STAR, GridTable
from fedmllm.report.statistics import ENOUGH, interval

KINDS = {
    "zero-shot": ("Untrained", "the untrained model"),
    "local": ("Each party alone", "each party alone"),
    "federated": ("Best federated", ""),
    "centralised": ("All data pooled", "pooling all data"),
}
FEW = 4  # settings or arms that a sentence can name


@dataclass(frozen=True)
class Overall:
    """An arm over all settings. half: of the 95 % interval over seeds, None of few."""

    arm: Arm
    mean: float
    half: float | None
    seeds: int


def overall(board: Board, condition: str, kind: str) -> list[Overall]:
    """The arms of a topology that were run in all settings, the best first. Federated arms by the
    seeds that all of them have, and none if there is no such seed; the others by these seeds too,
    if they have any of them."""
    every = [(arm, over(arm, board.settings, condition)) for arm in board.arms]
    federated = [set(scores) for arm, scores in every if arm.topology == "federated" and scores]
    common = set.intersection(*federated) if federated else set()
    found = []
    for arm, scores in every:
        kept = {seed: score for seed, score in scores.items() if seed in common}
        if kind != "federated":
            kept = kept or scores
        if arm.topology == kind and kept:
            found.append(Overall(arm, *interval(list(kept.values())), len(kept)))
    return sorted(found, key=lambda o: o.mean, reverse=facts.higher_is_better(board.results[0]))


def what(board: Board, seeds: tuple[int, int]) -> str:
    """What was run, in one sentence."""
    low, high = seeds
    methods = list(dict.fromkeys(map(method, board.arms)))
    words = [_list(methods) if len(methods) <= 5 else f"{len(methods)} methods"]
    words += _strategies(sorted({strategy(arm) for arm in board.arms}))
    words += [f"in {_count(len(board.settings), 'setting')}"]
    words += [f"with {low} to {high} seeds" if low < high else f"with {_count(high, 'seed')}"]
    federated = [run for run in board.results if facts.topology(run) == "federated"]
    sizes = {len(facts.clients(run)) for run in federated} - {0}
    cohorts = {facts.lookup(r, "config", "training", "clients_per_round") for r in federated}
    text = " ".join(words)
    if len(sizes) == 1 and len(cohorts) == 1 and None not in cohorts:
        text += f"; {sizes.pop()} parties, {cohorts.pop()} of them in a round"
    return f"{_count(len(board.results), 'run')}: {text}."


def cards(board: Board, condition: str) -> list[dict[str, Any]]:
    """Mean over settings of the best arm of each topology; none where a federated arm lacks a
    setting, since the best could be one that is not compared."""
    if not _whole(board, condition):
        return []
    found = []
    for kind, (words, _) in KINDS.items():
        for best in overall(board, condition, kind)[:1]:
            half = "" if best.half is None else facts.format_score(best.half)
            value = facts.format_score(best.mean)
            card = {"kind": kind, "words": words, "value": value, "half": half}
            found.append({**card, "arm": best.arm.label, "seeds": best.seeds})
    return found


def finding(board: Board, table: GridTable) -> str:
    """How the best federated arm compares with the others and with the references."""
    if not any(arm.topology == "federated" for arm in board.arms):
        return ""
    leaders = _leaders(table)
    if not _whole(board, table.condition):
        arms = [arm for arm in board.arms if arm.topology == "federated"]
        everywhere = all(over(arm, board.settings, table.condition) for arm in arms)
        words = "Not every federated arm was run in every setting."
        words = "The federated arms have no seed in common." if everywhere else words
        return words + _most(leaders)
    ranked = overall(board, table.condition, "federated")
    best, parts = ranked[0], []
    for kind, (_, words) in KINDS.items():
        for other in overall(board, table.condition, kind)[:1] if words else []:
            parts.append(f"{_difference(best.mean - other.mean)} {words}")
    reaches = f"{table.metric} {facts.format_score(best.mean)}"
    if len(ranked) == 1:
        text = f"{best.arm.label} reaches {reaches} over all settings"
        return f"{text}: {_list(parts)}." if parts else f"{text}."
    text = f"{best.arm.label} has the best mean over settings of {len(ranked)} federated arms, "
    text += f"{reaches}" + (f": {_list(parts)}. " if parts else ". ")
    led = sum(best.arm.label in labels for labels in leaders.values())
    return f"{text}It leads in {led} of {_count(len(table.settings), 'setting')}."


def _whole(board: Board, condition: str) -> bool:
    """Whether there are federated arms and all of them have all settings."""
    federated = [arm for arm in board.arms if arm.topology == "federated"]
    return bool(federated) and len(overall(board, condition, "federated")) == len(federated)


def _leaders(table: GridTable) -> dict[str, list[str]]:
    """Setting -> the arms that are marked as its best."""
    return {
        setting: [
            label for label, row in table.cells.items() if setting in row and row[setting].best
        ]
        for setting in table.settings
    }


def by_setting(board: Board, table: GridTable) -> dict[str, str]:
    """The best federated arm of each setting, where the means over settings cannot be compared and
    the settings are few."""
    if _whole(board, table.condition) or len(table.settings) > FEW:
        return {}
    found = {s: labels[0] for s, labels in _leaders(table).items() if labels}
    cells = {setting: table.cells[label][setting] for setting, label in found.items()}
    return {
        setting: f"{label}, {table.metric} {facts.format_score(cells[setting].mean)}"
        + (STAR if cells[setting].significant else "")
        for setting, label in found.items()
    }


def _most(leaders: Mapping[str, Sequence[str]]) -> str:
    """Which arms lead most often, of many settings."""
    if len(leaders) <= FEW:
        return " The best of each setting:"
    counts = Counter(label for labels in leaders.values() for label in labels)
    words = [f"{label} in {number}" for label, number in counts.most_common(FEW)]
    return f" Most often in the lead, of {len(leaders)} settings: {_list(words)}."


def sure(table: GridTable) -> str:
    """What may be claimed of differences between federated arms."""
    _, high = table.seeds
    columns = [
        [row[setting] for row in table.cells.values() if setting in row]
        for setting in table.settings
    ]
    tested = [cells for cells in columns if any(cell.p is not None for cell in cells)]
    if not tested and high < ENOUGH:
        words = "one seed" if high == 1 else f"{high} seeds"
        return (
            f"No difference is tested: {words} cannot tell luck from merit, {ENOUGH} can begin to."
        )
    if not tested:
        return "No difference between federated arms is tested: no two have enough seeds in common."
    certain = sum(any(cell.significant for cell in cells) for cells in tested)
    where = _count(len(tested), "setting")
    text = f"In {certain} of {where} the best federated arm is better than the next beyond chance"
    return f"{text} (starred); {'elsewhere' if certain else 'everywhere'} their order may be luck."


def _strategies(names: Sequence[str]) -> list[str]:
    """What was run beside the plain methods."""
    named = [name for name in names if name]
    if not named:
        return []
    words = f"the strategy {named[0]}" if len(named) == 1 else f"{len(named)} strategies"
    return [f"with and without {words}" if "" in names else f"with {words}"]


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _difference(value: float) -> str:
    return f"{abs(value):.3f} {'above' if value >= 0 else 'below'}"


def _list(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
