"""The headline table, once as rows and then for the terminal, Markdown and CSV.

One row a run: the headline metric under every test condition with its standard error, rounds,
time, megabytes (10^6 bytes) up and down. The best federated run of each column is bold.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from fedmllm.report import facts, parties
from fedmllm.report.loading import Result

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

MORE_COSTS = ["trained_per_second", "tested_per_second", "peak_memory_bytes"]  # of a CSV
MORE_COSTS += ["peak_accelerator_bytes", "unparsable"]
NOTE = "Test {metric} ± standard error. Bold: best federated run. MB: 10⁶ bytes, all clients."


@dataclass(frozen=True)
class Cell:
    """The headline metric under one condition. low, high: over the parties of a local run."""

    value: float | None
    error: float | None
    best: bool
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """One run of the table. seconds: total; up, down: bytes over the whole run."""

    label: str
    title: str
    about: str
    cells: dict[str, Cell]
    rounds: int | None
    seconds: float | None
    up: int | None
    down: int | None
    result: Result

    @property
    def task(self) -> str:
        """Task and metric, e.g. ``memes (AUC)``: rows of the same task may be compared."""
        return f"{self.result['task']['name']} ({facts.metric_name(self.result)})"

    @property
    def costs(self) -> tuple[str, str, str, str]:
        """Rounds, time, MB up, MB down, printed."""
        count = facts.DASH if self.rounds is None else str(self.rounds)
        up, down = facts.format_megabytes(self.up), facts.format_megabytes(self.down)
        return count, facts.format_seconds(self.seconds), up, down


def rows(results: Sequence[Result]) -> list[Row]:
    """A row for each run; the best are chosen among the runs of the same task."""
    names = dict(zip(map(id, results), facts.labels(results), strict=True))
    return [
        _row(result, names[id(result)], group)
        for group in facts.by_task(results)
        for result in group
    ]


def _row(result: Result, label: str, group: Sequence[Result]) -> Row:
    amount = facts.lookup(result, "bytes") or {}
    return Row(
        label=label,
        title=str(result.get("title") or label),
        about=facts.about(result),
        cells={c: _cell(result, c, group) for c in facts.conditions(group)},
        rounds=facts.rounds(result),
        seconds=facts.lookup(result, "time", "total_seconds"),
        up=amount.get("up"),
        down=amount.get("down"),
        result=result,
    )


def _cell(result: Result, condition: str, group: Sequence[Result]) -> Cell:
    value = facts.score(result, condition)
    winner = facts.best(group, condition)
    leader = facts.score(winner, condition) if winner else None
    spread = facts.spread(result, condition)
    return Cell(
        value=value,
        error=facts.score_se(result, condition),
        # Equal in print is equal: the fourth decimal must not choose a winner. Shown nothing,
        # no run can lead.
        best=value is not None
        and condition != "neither"
        and facts.topology(result) == "federated"
        and facts.format_score(value) == facts.format_score(leader),
        low=spread.get("min"),
        high=spread.get("max"),
    )


def _metric_words(results: Sequence[Result]) -> str:
    return " / ".join(dict.fromkeys(map(facts.metric_name, results)))


def summary_table(results: Sequence[Result], *, width: int = 100) -> Table:
    """The table for a terminal of `width` columns; long names wrap.

    Below 100 columns there is no room for the costs; they stand in the report.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    columns = facts.conditions(results)
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption=NOTE.format(metric=_metric_words(results)),
        caption_justify="left",
    )
    table.add_column("run", overflow="fold", min_width=12)
    costs = ["rounds", "time", "MB up", "MB down"] if width >= 100 else []
    marks = [f"judged, {facts.condition_name(c)}" for c in facts.judged_conditions(results)]
    for name in [*map(facts.condition_name, columns), *marks, *costs]:
        table.add_column(_two_lines(name), justify="right", no_wrap=True)
    several = len(facts.by_task(results)) > 1
    for task, group in groupby(rows(results), key=lambda row: row.task):
        if several:
            table.add_row(Text(task, style="italic"))
        for row in group:
            cells = [_terminal_cell(row.cells.get(c)) for c in columns]
            marked = _judged_cells(row, results)
            table.add_row(Text(row.label), *cells, *marked, *row.costs[: len(costs)])
        table.add_section()
    return table


def _two_lines(name: str) -> str:
    return "\n".join(name.rsplit(" ", 1)) if len(name) > 11 or name.startswith("MB") else name


def _terminal_cell(cell: Cell | None) -> Text:
    from rich.text import Text

    if cell is None:
        return Text(facts.DASH)
    return Text(facts.format_pair(cell.value, cell.error, "±"), style="bold" if cell.best else "")


def markdown_table(results: Sequence[Result]) -> str:
    """The table in GitHub's Markdown, with a line that explains it."""
    columns = facts.conditions(results)
    several = len(facts.by_task(results)) > 1
    heads = ["run", *(["task"] if several else []), *map(facts.condition_name, columns)]
    marks = [f"judged, {facts.condition_name(c)}" for c in facts.judged_conditions(results)]
    heads += [*marks, "rounds", "time", "MB up", "MB down"]
    lines = [_line(heads), _line(["---" if h in ("run", "task") else "---:" for h in heads])]
    for row in rows(results):
        task = [row.task] if several else []
        cells = [_markdown_cell(row.cells.get(c)) for c in columns]
        lines.append(
            _line(
                [
                    escape_markdown(row.label),
                    *map(escape_markdown, task),
                    *cells,
                    *_judged_cells(row, results),
                    *row.costs,
                ]
            )
        )
    note = NOTE.format(metric=escape_markdown(_metric_words(results))) + _judge_note(results)
    return "\n".join([*lines, "", note]) + "\n"


def _judged_cells(row: Row, results: Sequence[Result]) -> list[str]:
    found = [facts.judged(row.result, c) for c in facts.judged_conditions(results)]
    return [facts.format_pair(m.get("accuracy"), m.get("accuracy_se")) for m in found]


def _judge_note(results: Sequence[Result]) -> str:
    """Who judged, and how many verdicts could not be read."""
    names = list(dict.fromkeys(name for r in results if (name := facts.judge_of(r))))
    conditions = facts.judged_conditions(results)
    lost = sum(facts.judged(r, c).get("unparsable", 0) for r in results for c in conditions)
    if not names:
        return ""
    words = " / ".join(map(escape_markdown, names))
    return f" Judged: accuracy by {words}; verdicts that could not be read, left out: {lost:,}."


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown_cell(cell: Cell | None) -> str:
    if cell is None:
        return facts.DASH
    text = facts.format_pair(cell.value, cell.error)
    return f"**{text}**" if cell.best else text


def escape_markdown(text: str) -> str:
    """Markdown and HTML characters as themselves."""
    for given, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(given, safe)
    return "".join(f"\\{c}" if c in "\\`*_[]|" else c for c in text)


def csv_table(results: Sequence[Result]) -> str:
    """One row a run, numbers in full precision, empty where the file holds none. party_…: over the
    parties of a local run on the test set; own_…: over all parties on their own samples."""
    columns = facts.conditions(results)
    heads = ["run", "title", "task", "metric", "topology", "seed"]
    heads += [name for c in columns for name in (c, f"{c}_se")]
    heads += ["rounds", "total_seconds", "bytes_up", "bytes_down", "config_sha256"]
    heads += MORE_COSTS
    judged = facts.judged_conditions(results)
    heads += [f"judged_{c}{end}" for c in judged for end in ("", "_se", "_unparsable")]
    heads += ["judge"] if judged else []
    heads += ["party_mean", "party_std", "party_worst"]
    heads += ["own_metric", "own_mean", "own_std", "own_worst"]
    own = {id(r): parties.own_key(group) for group in facts.by_task(results) for r in group}
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(heads)
    for row in rows(results):
        spreads = _spread_cells(row.result, facts.headline(results), own[id(row.result)])
        writer.writerow([*_csv_row(row, columns, judged), *spreads])
    return out.getvalue()


def _spread_cells(result: Result, condition: str, key: str) -> list[object]:
    cells: list[object] = []
    for test in parties.TESTS:
        found = parties.spread(result, test, condition, key)
        cells += [key if found else None] if test == "own" else []
        cells += [found.get("mean"), found.get("std"), parties.worst(result, test, condition, key)]
    return cells


def _csv_row(row: Row, columns: Sequence[str], judged: Sequence[str]) -> list[object]:
    result = row.result
    head = [row.label, row.title, result["task"]["name"], facts.metric_key(result)]
    cells = [row.cells.get(c, Cell(None, None, False)) for c in columns]
    numbers = [number for cell in cells for number in (cell.value, cell.error)]
    costs = [row.rounds, row.seconds, row.up, row.down, result.get("config_sha256")]
    costs += [facts.spent(result)[key] for key in MORE_COSTS]
    marks = [facts.judged(result, condition) for condition in judged]
    costs += [found.get(k) for found in marks for k in ("accuracy", "accuracy_se", "unparsable")]
    costs += [facts.judge_of(result)] if judged else []
    return [*head, facts.topology(result), result.get("seed"), *numbers, *costs]
