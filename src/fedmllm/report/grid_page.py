"""One HTML file for a grid of runs: tables over seeds, figures, and every run with its file.

It holds its style, its figures and a little script for sorting and filtering; it fetches nothing
and opens from a disk. `grid.html` says what is gathered here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmllm.errors import UserError
from fedmllm.report import facts, figures, grid_figures, split
from fedmllm.report.arms import Arm, Board, boards, is_grid, setting_of
from fedmllm.report.grid_tables import GridTable, grid_tables, note
from fedmllm.report.loading import Result
from fedmllm.report.page import METRIC_HELP, PAPER, link, provenance, template, write_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONDITIONS = tuple(facts.CONDITIONS)


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
    contents = {
        "title": title,
        "paper": PAPER,
        "dash": facts.DASH,
        "runs": len(results),
        "boards": [_board(board, tables, f"b{i}") for i, board in enumerate(found)],
        "rows": [row for board in found for row in _rows(board, out.parent)],
        "heads": {c: facts.condition_name(c) for c in facts.conditions(results)},
        "problems": [*problems, *repeated],
        "provenance": provenance(results, out.parent),
        "filters": ("task", "setting", "arm", "seed"),
    }
    return write_page(out, template("grid.html").render(contents))


def write_figures(results: Sequence[Result], folder: Path, *, png: bool = False) -> list[Path]:
    """Write every figure as a file on white: SVG, with `png` also PNG; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in _every_figure(results):
        stem = "".join(c if c.isalnum() or c in "-." else "-" for c in name)
        written.append(folder / f"{stem}.svg")
        written[-1].write_text(figures.svg(figure), encoding="utf-8")
        if png:
            written.append(figures.save_png(figure, folder / f"{stem}.png"))
    return written


def _every_figure(results: Sequence[Result]) -> Iterator[tuple[str, Figure]]:
    """Each figure with a name and, where it needs one, a legend."""
    if not is_grid(results):
        for group in facts.by_task(results):
            for name, figure in figures.every(group):
                yield f"{group[0]['task']['name']}-{name}", figure
        return
    for board in boards(results)[0]:
        styles = grid_figures.arm_styles(board)
        for name, figure, _, labels in board_figures(board):
            if labels:
                _add_legend(figure, {label: styles[label] for label in labels})
            yield f"{board.label}-{name}", figure
        for setting, figure, _ in _holdings_figures(board):
            yield f"{board.label}-held-{setting}", figure


def _add_legend(figure: Figure, styles: Mapping[str, figures.Style]) -> None:
    """Name the lines of a figure that stands alone, in room made for it."""
    import matplotlib

    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.25 + 0.2 * (-(-len(styles) // 3)))
    with matplotlib.rc_context(figures.RC):
        figures.name_lines(figure, styles)


def board_figures(board: Board) -> Iterator[tuple[str, Figure, str, list[str]]]:
    """(name, figure, what it shows, the arms that its legend must name) of everything that a
    board's runs allow."""
    condition = facts.headline(board.results)
    strategies = list(dict.fromkeys(map(grid_figures.strategy, board.arms)))
    if len(board.settings) > 2:
        for chosen in strategies:
            radar = (grid_figures.draw_radar, (board, condition, chosen))
            drawn = figures.draw_panels([radar], size=(5.6, 4.6))
            about = f"{board.metric} by setting"
            yield _name("radar", chosen), drawn, about, _labels(board, chosen)
    for chosen in strategies:
        for scenario, members in groupby(board.settings, key=lambda s: s.split("-")[0]):
            panels = [
                (grid_figures.draw_bands, (board, setting, condition, chosen))
                for setting in members
            ]
            drawn = figures.draw_panels(panels, size=(max(4.8, 3.2 * len(panels)), 2.6))
            about = f"{board.metric} over rounds, {scenario}"
            yield _name(f"curves-{scenario}", chosen), drawn, about, _labels(board, chosen)
    found = grid_figures.drops(board, condition)
    if found:
        size = (6.0, 1.5 + 0.34 * len(found))
        drawn = figures.draw_panels([(grid_figures.draw_drop, (board, condition))], size=size)
        yield "drop", drawn, "Change of the metric from aligned data", []
    if any(facts.topology(r) == "federated" and facts.history(r) for r in board.results):
        drawn = figures.draw_panels([(grid_figures.draw_cost, (board, condition))], size=(6.0, 3.4))
        every = [arm.label for arm in board.arms]
        yield "communication", drawn, f"{board.metric} against bytes", every


def _labels(board: Board, chosen: str) -> list[str]:
    return [arm.label for arm in grid_figures.shown(board, chosen)]


def _name(kind: str, strategy: str) -> str:
    return f"{kind}-{strategy}" if strategy else kind


def _board(board: Board, tables: Sequence[GridTable], key: str) -> dict[str, Any]:
    styles = grid_figures.arm_styles(board)
    swatches = {label: figures.swatch(style) for label, style in styles.items()}
    drawn = [
        (name, figures.inline(figure, f"{key}-{name}", about), _pixels(figure))
        for name, figure, about, _ in board_figures(board)
    ]
    first = board.results[0]
    return {
        "label": board.label,
        "metric": board.metric,
        "metric_help": METRIC_HELP.get(facts.metric_key(first), ""),
        "settings": board.settings,
        "swatches": swatches,
        "tables": [_table(table, swatches) for table in tables if table.board == board.label],
        "radars": [svg for name, svg, _ in drawn if name.startswith("radar")],
        "curves": [(svg, width) for name, svg, width in drawn if name.startswith("curves")],
        "others": [svg for name, svg, _ in drawn if not name.startswith(("radar", "curves"))],
        "parties": _parties(board),
        "followed": facts.followed_words(board.results, facts.headline(board.results)),
        "payload": _payload(board),
        "holdings": _holdings(board, key),
    }


def _table(table: GridTable, swatches: Mapping[str, str]) -> dict[str, Any]:
    return {
        "title": _title(table),
        "note": note(table),
        "settings": table.settings,
        "published": table.published,
        "rows": [
            (label, swatches.get(label, ""), [row.get(setting) for setting in table.settings])
            for label, row in table.cells.items()
        ],
    }


def _parties(board: Board) -> list[tuple[str, ...]]:
    """Of each arm and setting: mean over parties, spread, worst party, averaged over seeds.

    For local arms each party's own adapter on the common test set; for all arms that held samples
    out, the final adapter on each party's own (the accuracy, where some party's few samples have
    no value of the metric).
    """
    condition = facts.headline(board.results)
    rows = []
    for arm in board.arms:
        for setting in board.settings:
            runs = list(arm.runs.get(setting, {}).values())
            common = [facts.spread(run, condition) for run in runs]
            own = [facts.held_out_spread(run) for run in runs]
            for samples, spreads in (("the test set", common), ("its own", own)):
                found = [spread for spread in spreads if spread]
                if found:
                    means = [_mean(s.get(k) for s in found) for k in ("mean", "std", "min")]
                    rows.append((arm.label, setting, samples, *map(facts.format_score, means)))
    return rows


def _title(table: GridTable) -> str:
    """A table's name on the page, where the task is the heading."""
    if table.about:
        return f"{table.about}: published figures and ours"
    return f"{table.metric}, {table.title.removeprefix(f'{table.board}, ')}"


def _payload(board: Board) -> dict[str, Any]:
    """What one party sends and receives in one round, in MB, of each federated arm: by part, and
    all of it as it was counted. A part that no arm exchanges has no column."""
    rows: dict[str, dict[str, float | None]] = {}
    for arm in board.arms:
        runs = [run for found in arm.runs.values() for run in found.values()]
        known = [run for run in runs if facts.message_parts(run)]
        if arm.topology == "federated" and known:
            rows[arm.label] = _messages(known[0])
    names = dict.fromkeys(name for row in rows.values() for name in row)
    heads = [name for name in names if any(row.get(name) for row in rows.values())]
    return {
        "heads": heads,
        "rows": {
            label: [facts.format_megabytes(part.get(name)) for name in heads]
            for label, part in rows.items()
        },
    }


def _messages(run: Result) -> dict[str, float | None]:
    """Bytes of one party and round, by column."""
    found: dict[str, float | None] = {}
    for way, parts in facts.message_parts(run).items():
        found |= {f"{name}, {way}": count for name, count in parts.items()}
        found[f"all, {way}"] = facts.per_party(run, f"bytes_{way}")
    return found


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _pixels(figure: Figure) -> int:
    """How wide a card must be for the figure to have its own size."""
    return round(96 * figure.get_size_inches()[0]) + 42


def _holdings(board: Board, key: str) -> list[tuple[str, str, int]]:
    """Who holds what in each setting, for the first seed: a picture a setting."""
    return [
        (
            f"{setting}, seed {run.get('seed')}",
            figures.inline(drawn, f"{key}-held-{setting}", f"Who holds what: {setting}"),
            _pixels(drawn),
        )
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


def _a_run(arm: Arm, setting: str) -> Result | None:
    """A federated run of this very setting."""
    if arm.topology != "federated":
        return None
    runs = arm.runs.get(setting, {})
    return next((runs[seed] for seed in sorted(runs) if facts.clients(runs[seed])), None)


def _rows(board: Board, folder: Path) -> Iterator[dict[str, Any]]:
    """A line a run, with its file."""
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
    for run in runs:
        everywhere = facts.topology(run) == "zero-shot"
        amount = facts.lookup(run, "bytes") or {}
        both = (amount.get("up") or 0) + (amount.get("down") or 0)
        yield {
            "name": run["name"],
            "task": board.label,
            "setting": "every setting" if everywhere else setting_of(run),
            "arm": arms[id(run)],
            "seed": str(run.get("seed")),
            "scores": {c: facts.score(run, c) for c in facts.conditions(board.results)},
            "worst": facts.spread(run, facts.headline(board.results)).get("min"),
            "unparsable": facts.unparsable(run),
            "megabytes": both / 1e6,
            "seconds": facts.lookup(run, "time", "total_seconds"),
            "speed": facts.lookup(run, "samples", "trained_per_second"),
            "memory": (run.get("peak_memory_bytes") or 0) / 1e6 or None,
            "link": link(run, folder),
        }
