"""Published figures beside ours, for the real datasets. They are facts of others: `published.json`
says of whom."""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedmllm.report import facts
from fedmllm.report.arms import Arm, Board
from fedmllm.report.loading import Result

Value = Callable[[Result], float | None]
Row = dict[str, tuple[list[float], tuple[str, ...]]]
"""setting -> values, one a run, and the files that they come from"""
_MEDICAL = ("medical-vqa", "vqa-rad", "slake")


@functools.cache
def published() -> dict[str, Any]:
    """The figures, in percent, with their source."""
    return json.loads((Path(__file__).parent / "published.json").read_text())


def comparisons(board: Board) -> Iterator[tuple[str, dict[str, dict[str, float]], dict[str, Row]]]:
    """(what is compared, published shares by method and setting, our rows) for a board of a real
    dataset; nothing for others. Ours are of the test with both modalities."""
    task = str(board.results[0]["task"]["name"])
    if task in ("hateful-memes", "crisismmd"):
        key = {"hateful-memes": "hard_letter_auc", "crisismmd": "macro_f1"}[task]
        given = _shares(published()[task]["values"], float)
        yield published()[task]["metric"], given, _ours(board, {"": _metric(key)})
    if task in _MEDICAL:
        found = published()["medical"]
        for i, column in enumerate(found["columns"]):
            source, which = column.split()
            ours = _ours(board, _medical(task, source, which, board))
            if ours:
                yield column, _shares(found["values"], operator.itemgetter(i)), ours


def note(board: Board) -> str:
    """What is compared with what, and what differs."""
    task = str(board.results[0]["task"]["name"])
    found = published()
    facts_ = found["medical" if task in _MEDICAL else task]
    words = f"Published: {found['source']}; {found['model']}, {facts_['rounds']} rounds, "
    words += f"{facts_['metric']}."
    if task == "hateful-memes":
        words += " Ours: AUC of the option of greatest probability."
    if task in _MEDICAL:
        words += " Ours: exact match, and where a judge is named its marks. The published figures "
        words += "do not name SLAKE's language"
        words += "." if task == "medical-vqa" else ", and were trained on VQA-RAD and flashcards."
    return words + " Another model, seed or split makes the two sides differ."


def _shares(
    values: Mapping[str, Mapping[str, Any]], pick: Callable[[Any], float]
) -> dict[str, dict[str, float]]:
    return {
        method: {setting: pick(value) / 100 for setting, value in row.items()}
        for method, row in values.items()
    }


def _metric(key: str) -> Value:
    def value(result: Result) -> float | None:
        found = (result["metrics"].get("both") or {}).get(key)
        return None if found is None else float(found)

    return value


def _medical(task: str, source: str, which: str, board: Board) -> dict[str, Value]:
    """How a row is named, and what it shows: exact match and each judge's marks, by language."""
    if task not in ("medical-vqa", source):
        return {}
    prefix = [source] if task == "medical-vqa" else []
    languages = ("en", "zh") if source == "slake" and which != "overall" else ("",)
    judges = sorted({name for run in board.results if (name := facts.judge_of(run))})
    found: dict[str, Value] = {}
    for language in languages:
        words = [language] if language else []
        path = "/".join([*prefix, *words, *([which] if which != "overall" else [])])
        name = f", {language}" if language else ""
        found[name] = _metric(f"accuracy_{path}" if path else "accuracy")
        found |= {f"{name}, judged by {judge}": _marks(judge, path) for judge in judges}
    return found


def _marks(judge: str, path: str) -> Value:
    def value(result: Result) -> float | None:
        marks = facts.judged(result, "both") if facts.judge_of(result) == judge else {}
        return ((marks.get("groups") or {}).get(path, {}) if path else marks).get("accuracy")

    return value


def _ours(board: Board, values: Mapping[str, Value]) -> dict[str, Row]:
    rows = {
        arm.label + name: _row(arm, board, value, marked="judged by" in name)
        for arm in board.arms
        for name, value in values.items()
    }
    return {label: row for label, row in rows.items() if row}


def _row(arm: Arm, board: Board, value: Value, *, marked: bool) -> Row:
    """marked: the values are a judge's, so that they come from the file of its marks."""
    row: Row = {}
    for setting in board.settings:
        runs = list(arm.runs.get(setting, {}).values())
        known = [(number, run) for run in runs if (number := value(run)) is not None]
        if known:
            files = [facts.judged_file(r) if marked else str(r.get("_path", "")) for _, r in known]
            row[setting] = [number for number, _ in known], tuple(files)
    return row
