"""One HTML file for a grid of runs: tables over seeds, figures, and every run with its file.

It holds its style, its figures and a little script for sorting and filtering; it fetches nothing
and opens from a disk. `grid.html` says what is gathered here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmllm.errors import UserError
from fedmllm.report import facts, figures, glance, grid_figures, parties, split
from fedmllm.report.arms import Arm, Board, boards, is_grid, setting_of
from fedmllm.report.grid_tables import GridTable, Mean, grid_tables, note
from fedmllm.report.loading import Result
from fedmllm.report.page import (
    METRIC_HELP,
    PAPER,
    choices,
    provenance,
    result_files,
    shown_files,
    template,
    write_page,
)
from fedmllm.report.statistics import mean_and_half
from fedmllm.scenarios import SCENARIOS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONDITIONS = tuple(facts.CONDITIONS)
# columns of the table of runs: words -> key of `facts.spent`, its unit, digits
COSTS = {
    "unparsable": ("unparsable", 1.0, 0),
    "MB up": ("bytes_up", 1e6, 2),
    "MB down": ("bytes_down", 1e6, 2),
    "seconds": ("total_seconds", 1.0, 1),
    "trained/s": ("trained_per_second", 1.0, 1),
    "tested/s": ("tested_per_second", 1.0, 1),
    "peak MB": ("peak_memory_bytes", 1e6, 0),
    "peak GPU MB": ("peak_accelerator_bytes", 1e6, 0),
}


def write_grid_report(
    results: Sequence[Result],
    out_path: str | Path,
    *,
    title: str = "FedMLLM benchmark",
    problems: Sequence[str] = (),
) -> Path:
    """Write the page of a grid and return its path. `results`, `problems`: from `load_results`.

    Raises `UserError` if there is no result or the page cannot be written.
    """
    if not results:
        raise UserError("there is no result to report: run an experiment first")
    out = Path(out_path)
    found, repeated = boards(results)
    tables, _ = grid_tables(results, CONDITIONS)
    measured = facts.conditions(results)
    rows = [row for board in found for row in _rows(board, measured, out.parent)]
    contents = {
        "title": title,
        "paper": PAPER,
        "dash": facts.DASH,
        "runs": len(results),
        "glances": [_glance(board, tables) for board in found],
        "boards": [_board(board, tables, f"b{i}", out.parent) for i, board in enumerate(found)],
        "guide": _guide(results),
        "rows": rows,
        "heads": {c: facts.condition_name(c) for c in measured},
        "worst": list(dict.fromkeys(head for row in rows for head in row["worst"])),
        "costs": {
            name: digits
            for name, (_, _, digits) in COSTS.items()
            if any(row["costs"][name] is not None for row in rows)
        },
        "choices": choices(
            [{name: row[name] for name in ("task", "setting", "arm", "seed")} for row in rows]
        ),
        "problems": [*problems, *repeated],
        "provenance": provenance(results, out.parent),
    }
    return write_page(out, template("grid.html").render(contents))


def _glance(board: Board, tables: Sequence[GridTable]) -> dict[str, Any]:
    """What a newcomer reads first about a board."""
    condition = facts.headline(board.results)
    table = next(
        t
        for t in tables
        if (t.board, t.condition, t.judge, t.about) == (board.label, condition, "", "")
    )
    return {
        "label": board.label,
        "metric": f"{board.metric}, {facts.condition_name(condition)}",
        "what": glance.what(board, table.seeds),
        "cards": glance.cards(board, condition),
        "finding": glance.finding(board, table),
        "by_setting": glance.by_setting(board, table),
        "sure": glance.sure(table),
    }


def _guide(results: Sequence[Result]) -> dict[str, Any]:
    """What a newcomer must know to read the tables: metrics and scenarios that occur."""
    scenarios = dict.fromkeys(str(facts.lookup(r, "config", "scenario", "name")) for r in results)
    metrics = dict.fromkeys(map(facts.metric_key, results))
    return {
        "metrics": [METRIC_HELP[key] for key in metrics if key in METRIC_HELP],
        "scenarios": {n: SCENARIOS[n].summary for n in SCENARIOS if n in scenarios},
    }


def write_figures(results: Sequence[Result], folder: Path, *, png: bool = False) -> list[Path]:
    """Write every figure as a file on white: SVG, with `png` also PNG; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in _every_figure(results):
        stem = re.sub(r"[^\w.]+", "-", name)
        written.append(folder / f"{stem}.svg")
        written[-1].write_text(figures.svg(figure), encoding="utf-8")
        if png:
            written.append(figures.save_png(figure, folder / f"{stem}.png"))
    return written


@dataclass(frozen=True)
class Drawing:
    """A figure of a grid. kind: ``radar``, ``curves``, ``drop`` or ``communication``; strategy: the
    one it shows, empty for none or all; about: in words; legend: the lines that it names."""

    name: str
    kind: str
    strategy: str
    figure: Figure
    about: str
    legend: Mapping[str, figures.Style] = field(default_factory=dict)


def _every_figure(results: Sequence[Result]) -> Iterator[tuple[str, Figure]]:
    """Each figure with a name and, where it needs one, a legend."""
    if not is_grid(results):
        for group in facts.by_task(results):
            for name, figure in figures.every(group):
                yield f"{group[0]['task']['name']}-{name}", figure
        return
    for board in boards(results)[0]:
        for drawing in board_figures(board):
            if drawing.legend:
                _add_legend(drawing.figure, drawing.legend)
            yield f"{board.label}-{drawing.name}", drawing.figure
        for setting, figure, _ in _holdings_figures(board):
            yield f"{board.label}-held-{setting}", figure
        for setting, figure, *_ in _profile_figures(board):
            yield f"{board.label}-profiles-{setting}", figure


def _add_legend(figure: Figure, styles: Mapping[str, figures.Style]) -> None:
    """Name the lines of a figure that stands alone, in room made for it."""
    import matplotlib

    width, height = figure.get_size_inches()
    rows = -(-len(styles) // figures.columns_that_fit([f" {name}" for name in styles], width))
    figure.set_size_inches(width, height + 0.15 + 0.17 * rows)
    with matplotlib.rc_context(figures.RC):
        figures.name_lines(figure, styles)


def board_figures(board: Board) -> Iterator[Drawing]:
    """Everything that a board's runs allow."""
    condition = facts.headline(board.results)
    chosen = grid_figures.strategies(board)
    if len(board.settings) > 2:
        yield from (_radar(board, condition, strategy) for strategy in chosen)
    if grid_figures.followed(board, condition):
        for strategy in chosen:
            yield from _curves(board, condition, strategy)
    found = grid_figures.drops(board, condition)
    if found:
        size = (figures.PAGE, 1.3 + 0.34 * len(found))
        figure = figures.draw_panels([(grid_figures.draw_drop, (board, condition))], size=size)
        yield Drawing("drop", "drop", "", figure, "Change of the metric from aligned data")
    if any(facts.topology(r) == "federated" and facts.history(r) for r in board.results):
        yield _communication(board, condition)


def _radar(board: Board, condition: str, strategy: str) -> Drawing:
    figure = figures.draw_panels(
        [(grid_figures.draw_radar, (board, condition, strategy))], size=(figures.COLUMN, 3.1)
    )
    arms = grid_figures.drawn(board, condition, strategy)
    legend = grid_figures.legend(board, arms, strategy)
    about = f"{board.metric} by setting{f', {strategy}' if strategy else ''}"
    return Drawing(_name("radar", strategy), "radar", strategy, figure, about, legend)


def _curves(board: Board, condition: str, strategy: str) -> Iterator[Drawing]:
    """A figure a scenario, a panel a setting; none where the strategy was not run."""
    for scenario, found in groupby(board.settings, key=lambda s: s.split("-")[0]):
        members = list(found)
        arms = [
            arm
            for arm in grid_figures.drawn(board, condition, strategy)
            if any(arm.runs.get(setting) for setting in members)
        ]
        if not any(grid_figures.strategy(arm) == strategy for arm in arms):
            continue
        legend = grid_figures.legend(board, arms, strategy)
        panels: list[figures.Panel] = [
            (grid_figures.draw_bands, (board, setting, condition, strategy)) for setting in members
        ]
        width = figures.COLUMN if len(panels) == 1 else figures.PAGE
        columns = min(len(panels), 3)
        size = (width, 0.5 + 1.8 * -(-len(panels) // columns))
        figure = figures.draw_facets(panels, size=size, columns=columns)
        name, about = _name(f"curves-{scenario}", strategy), f"{board.metric} over rounds"
        words = f"{about}, {scenario}{f', {strategy}' if strategy else ''}"
        yield Drawing(name, "curves", strategy, figure, words, legend)


def _communication(board: Board, condition: str) -> Drawing:
    """A panel a strategy."""
    chosen = grid_figures.strategies(board)
    panels: list[figures.Panel] = [
        (grid_figures.draw_cost, (board, condition, strategy)) for strategy in chosen
    ]
    columns = min(len(panels), 3)
    size = (
        figures.COLUMN if columns == 1 else figures.PAGE,
        0.4 + (2.1 if columns < 3 else 2.3) * -(-len(panels) // columns),
    )
    figure = figures.draw_facets(panels, size=size, columns=columns)
    legend = grid_figures.method_legend(board, condition)
    about = f"{board.metric} against communication, by strategy"
    return Drawing("communication", "communication", "", figure, about, legend)


def _name(kind: str, strategy: str) -> str:
    return f"{kind}-{strategy}" if strategy else kind


def _board(board: Board, tables: Sequence[GridTable], key: str, folder: Path) -> dict[str, Any]:
    styles = grid_figures.arm_styles(board)
    swatches = {label: figures.swatch(style) for label, style in styles.items()}
    drawn = [_card(drawing, key) for drawing in board_figures(board)]
    kinds = {kind: [c for c in drawn if c["kind"] == kind] for kind in ("radar", "curves")}
    return {
        "label": board.label,
        "settings": board.settings,
        "tables": [_table(t, swatches, folder) for t in tables if t.board == board.label],
        **kinds,
        "others": [card for card in drawn if card["kind"] not in kinds],
        "parties": _parties(board, folder),
        "followed": facts.followed_words(board.results, facts.headline(board.results)),
        "payload": _payload(board, folder),
        "holdings": _holdings(board, key),
        "profiles": _profiles(board, key),
        "drift": _drift(board, folder),
    }


def _card(drawing: Drawing, key: str) -> dict[str, Any]:
    return {
        "label": drawing.about if drawing.kind == "communication" else "",
        "kind": drawing.kind,
        "strategy": drawing.strategy,
        "svg": figures.inline(drawing.figure, f"{key}-{drawing.name}", drawing.about),
        "legend": {name: figures.swatch(style) for name, style in drawing.legend.items()},
        **_pixels(drawing.figure),
    }


def _table(table: GridTable, swatches: Mapping[str, str], folder: Path) -> dict[str, Any]:
    return {
        "title": _title(table),
        "note": note(table),
        "settings": table.settings,
        "published": table.published,
        "rows": [
            (
                label,
                swatches.get(label, ""),
                [_cell(row.get(setting), folder) for setting in table.settings],
            )
            for label, row in table.cells.items()
        ],
    }


def _cell(cell: Mean | None, folder: Path) -> dict[str, Any] | None:
    if cell is None:
        return None
    keys = ("mean", "half", "best", "significant", "shared")
    return {key: getattr(cell, key) for key in keys} | {"files": shown_files(cell.files, folder)}


def _parties(board: Board, folder: Path) -> list[dict[str, Any]]:
    """Of each arm and setting: mean over parties, spread, worst party, by what they were tested
    on (`report.parties`), averaged over seeds."""
    condition, key = facts.headline(board.results), parties.own_key(board.results)
    rows = []
    for arm in board.arms:
        for setting in board.settings:
            runs = list(arm.own(setting).values())
            for test, where in parties.TESTS.items():
                found = parties.over_seeds(runs, test, condition, key)
                if found:
                    words = (where, facts.METRICS.get(found.metric, found.metric))
                    numbers = [*map(facts.format_score, (found.mean, found.std, found.worst))]
                    place = {"arm": arm.label, "setting": setting, "words": words}
                    rows.append(
                        {**place, "numbers": numbers, "files": shown_files(found.files, folder)}
                    )
    return rows


def _title(table: GridTable) -> str:
    """A table's name on the page, where the task is the heading."""
    if table.about:
        return f"{table.about}: published figures and ours"
    return f"{table.metric}, {table.title.removeprefix(f'{table.board}, ')}"


def _payload(board: Board, folder: Path) -> dict[str, Any]:
    """What one party sends and receives in one round, in MB, of each federated arm: by part, and
    all of it as it was counted, and what crossed once, of all parties; the least and the most where
    its runs differ. A part that no arm exchanges has no column."""
    found: dict[str, list[tuple[str, dict[str, float | None]]]] = {}
    for arm in board.arms:
        runs = {id(run): run for setting in arm.runs for run in arm.own(setting).values()}
        known = [run for run in runs.values() if facts.message_parts(run)]
        if arm.topology == "federated" and known:
            found[arm.label] = [(str(run.get("_path", "")), _messages(run)) for run in known]
    parts = [part for runs in found.values() for _, part in runs]
    names = dict.fromkeys(name for part in parts for name in part)
    heads = [name for name in names if any(part.get(name) for part in parts)]
    return {
        "heads": heads,
        "rows": {
            label: {
                "numbers": [_span([part.get(head) for _, part in runs]) for head in heads],
                "files": shown_files([file for file, _ in runs], folder),
            }
            for label, runs in found.items()
        },
    }


def _messages(run: Result) -> dict[str, float | None]:
    """Bytes of one party and round, by column."""
    found: dict[str, float | None] = {}
    for way, parts in facts.message_parts(run).items():
        found |= {f"{name}, {way}": count for name, count in parts.items()}
        found[f"all, {way}"] = facts.per_party(run, f"bytes_{way}")
    found["once, all parties"] = sum(sum(parts.values()) for parts in facts.once(run).values())
    return found


def _span(values: Iterable[float | None]) -> str:
    """Megabytes, as one number where all print alike."""
    known = sorted(value for value in values if value is not None)
    words = [facts.format_megabytes(value) for value in known[:1] + known[-1:]] or [facts.DASH]
    return " to ".join(dict.fromkeys(words))


def _pixels(figure: Figure) -> dict[str, int]:
    """How wide a figure must be to be read, and its card so that it has a bit more than its own
    size."""
    own = 96 * figure.get_size_inches()[0]
    return {"least": round(0.85 * own), "width": round(1.15 * own) + 42}


def _holdings(board: Board, key: str) -> list[dict[str, Any]]:
    """Who holds what in each setting, for the first seed: a picture a setting."""
    return [
        {
            "label": f"{setting}, seed {run.get('seed')}",
            "legend": {},
            "svg": figures.inline(drawn, f"{key}-held-{setting}", f"Who holds what: {setting}"),
            **_pixels(drawn),
        }
        for setting, drawn, run in _holdings_figures(board)
    ]


def _holdings_figures(board: Board) -> Iterator[tuple[str, Figure, Result]]:
    """Parties by classes and modalities at once; by each apart where a result says no more."""
    for setting in board.settings:
        run = next(filter(None, (_a_run(arm, setting) for arm in board.arms)), None)
        if run is not None:
            summaries = split.summaries_of(run)
            drawn = split.split_figure(summaries) if summaries else figures.holdings(run)
            yield setting, drawn, run


def _profiles(board: Board, key: str) -> list[dict[str, Any]]:
    """What the server made of the parties' profiles, of one run a setting: a picture a setting."""
    return [
        {
            "label": f"{setting}, {label}, seed {run.get('seed')}",
            "legend": {},
            "svg": figures.inline(drawn, f"{key}-profiles-{setting}", f"Profiles: {setting}"),
            **_pixels(drawn),
        }
        for setting, drawn, label, run in _profile_figures(board)
    ]


def _profile_figures(board: Board) -> Iterator[tuple[str, Figure, str, Result]]:
    """Of the first arm and seed whose parties sent profiles: setting, figure, arm, run."""
    for setting in board.settings:
        found = (
            (arm.label, runs[seed], rows)
            for arm in board.arms
            for runs in [arm.own(setting)]
            for seed in sorted(runs)
            if (rows := facts.lookup(runs[seed], "heterogeneity", "clients"))
        )
        for label, run, rows in islice(found, 1):
            size = (figures.HALF[0], figures.holdings_height(run))
            drawn = figures.draw_panels([(figures.draw_profiles, (rows,))], size=size)
            yield setting, drawn, label, run


def _drift(board: Board, folder: Path) -> dict[str, Any]:
    """What `evaluation.drift` measured of each arm and setting, a mean over seeds; what no run
    states has no column."""
    found = {
        (arm.label, setting): [run for run in arm.own(setting).values() if facts.drift(run)]
        for arm in board.arms
        for setting in board.settings
    }
    heads = list(dict.fromkeys(n for runs in found.values() for r in runs for n in facts.drift(r)))
    rows = []
    for (label, setting), runs in found.items():
        if runs:
            stated = [facts.drift(run) for run in runs]
            values = [[each[head] for each in stated if head in each] for head in heads]
            numbers = [facts.format_score(mean_and_half(v)[0] if v else None) for v in values]
            files = shown_files([str(run.get("_path", "")) for run in runs], folder)
            rows.append({"arm": label, "setting": setting, "numbers": numbers, "files": files})
    return {"heads": heads, "rows": rows}


def _a_run(arm: Arm, setting: str) -> Result | None:
    """A federated run of this very setting."""
    if arm.topology != "federated":
        return None
    runs = arm.own(setting)
    return next((runs[seed] for seed in sorted(runs) if facts.clients(runs[seed])), None)


def _rows(board: Board, measured: Sequence[str], folder: Path) -> Iterator[dict[str, Any]]:
    """A line a run, with its file; measured: the test conditions of the runs of all boards."""
    arms = {
        id(run): arm.label
        for arm in board.arms
        for runs in arm.runs.values()
        for run in runs.values()
    }
    order = {arm.label: i for i, arm in enumerate(board.arms)}
    runs = [run for run in board.results if id(run) in arms]  # the others are repeated
    settings = {setting: i for i, setting in enumerate(board.settings)}
    runs.sort(key=lambda r: (settings.get(setting_of(r), -1), order[arms[id(r)]], r.get("seed")))
    condition, key = facts.headline(board.results), parties.own_key(board.results)
    tests = parties.occurring(board.results, condition, key)
    for run in runs:
        everywhere = facts.topology(run) == "zero-shot"
        spent = facts.spent(run)
        yield {
            "name": run["name"],
            "task": board.label,
            "setting": "every setting" if everywhere else setting_of(run),
            "arm": arms[id(run)],
            "seed": str(run.get("seed")),
            "scores": {c: facts.score(run, c) for c in measured},
            "worst": {
                parties.head(test, key, board.results): parties.worst(run, test, condition, key)
                for test in tests
            },
            "costs": {
                name: None if (value := spent[key]) is None else value / unit
                for name, (key, unit, _) in COSTS.items()
            },
            "files": result_files(run, folder),
        }
