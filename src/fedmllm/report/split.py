"""Who holds what before anything is trained: parties × classes × modalities, drawn and tabled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

from fedmllm.errors import UserError
from fedmllm.manifest import COMBINATIONS, ClientSummary
from fedmllm.report import facts, figures
from fedmllm.report.loading import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

PICTURES = (".svg", ".png")
MOST_CLASSES = 16  # columns of a picture; the rarer ones share the last
MOST_ROWS = 40  # parties of a table
_STYLES = dict(zip(COMBINATIONS, figures.HOLDING_STYLES.values(), strict=True))
_WIDE = 2.2  # of the column of all classes, in columns of a class
_Column = tuple[str, list[dict[str, int]]]
"""(name, for each party the number of samples by combination)"""
_Box = list[tuple[float, float]]


def split_figure(summaries: Sequence[ClientSummary]) -> Figure:
    """A row a party, a column a class: bars of samples, coloured by the modalities kept.

    The first column holds all classes; the others share a scale of their own.
    """
    columns = _columns(summaries)
    longest = max(len(name) for name, _ in columns)
    # with very many parties the bars grow thin, not the picture long
    height = 1.1 + min(0.27 * len(summaries), 13.5) + 0.045 * longest
    width = min(1.6 + 0.95 * (_WIDE + len(columns) - 1), figures.PAGE)
    return figures.draw_panels(
        [(_draw, (summaries, columns))], size=(max(figures.HALF[0], width), height)
    )


def summaries_of(result: Result) -> list[ClientSummary]:
    """Who holds what in a result; empty if it does not say it by class and modality."""
    clients = facts.clients(result)
    if not all(client.get("kept") for client in clients):
        return []
    none = dict.fromkeys(COMBINATIONS, 0)
    return [
        ClientSummary(
            id=client["id"],
            samples=client["samples"],
            counts={label: {**none, **by} for label, by in client["kept"].items()},
            profile={},
        )
        for client in clients
    ]


def save_picture(summaries: Sequence[ClientSummary], path: str | Path) -> Path:
    """Write `split_figure` as SVG or PNG, as the ending says. Raises `UserError` for others."""
    file = check_picture(Path(path))
    if file.suffix.lower() == ".png":
        return figures.save_png(split_figure(summaries), file)
    file.write_text(figures.svg(split_figure(summaries)), encoding="utf-8")
    return file


def check_picture(file: Path) -> Path:
    """The file, if its ending says SVG or PNG and it is no folder; raises `UserError`."""
    if file.suffix.lower() not in PICTURES or file.is_dir():
        raise UserError(f"picture {file} must be a file that ends in {' or '.join(PICTURES)}")
    return file


def split_tables(summaries: Sequence[ClientSummary], *, width: int) -> list[Table]:
    """Parties by modalities and by classes, and classes by modalities, for a terminal.

    width: of the terminal in letters; parties get two tables where one would not fit.
    """
    classes = list(summaries[0].counts)
    if len(classes) < 2:
        return [_party_table(summaries, modalities=True, classes=[])]
    joint = _party_table(summaries, modalities=True, classes=classes)
    if _width(joint) <= width:
        return [joint, _class_table(summaries)]
    apart = [(True, []), (False, classes)]
    tables = [_party_table(summaries, modalities=m, classes=c) for m, c in apart]
    return [*tables, _class_table(summaries)]


def _party_table(
    summaries: Sequence[ClientSummary], *, modalities: bool, classes: Sequence[str]
) -> Table:
    table = _table("party", modalities, [_letter(i) for i in range(len(classes))])
    for summary in summaries[:MOST_ROWS]:
        totals = [sum(by[c] for by in summary.counts.values()) for c in COMBINATIONS]
        held = [summary.samples, *totals] if modalities else []
        held += [sum(summary.counts[name].values()) for name in classes]
        table.add_row(summary.id, *map(str, held))
    if len(summaries) > MOST_ROWS:
        table.add_row(f"… and {len(summaries) - MOST_ROWS} more")
    return table


def _class_table(summaries: Sequence[ClientSummary]) -> Table:
    table = _table("class", True, [])
    for i, name in enumerate(summaries[0].counts):
        totals = [sum(s.counts[name][c] for s in summaries) for c in COMBINATIONS]
        table.add_row(f"{_letter(i)}  {name}", *map(str, [sum(totals), *totals]))
    return table


def _width(table: Table) -> int:
    from rich.console import Console

    return Console(width=10_000).measure(table).maximum


def _table(title: str, modalities: bool, letters: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(box=None, header_style="bold", padding=(0, 1))
    table.add_column(title, no_wrap=True, max_width=38)
    heads = ["samples", "image\n+ text", "image\nonly", "text\nonly", "neither"]
    for name in [*(heads if modalities else []), *letters]:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _letter(i: int) -> str:
    return ascii_uppercase[i] if i < 26 else str(i + 1)


def _columns(summaries: Sequence[ClientSummary]) -> list[_Column]:
    """All classes together, then each; past `MOST_CLASSES` the rest share one."""
    names = list(summaries[0].counts)
    groups = [("all classes" if len(names) > 1 else "samples", names)]
    if len(names) > 1:
        sizes = {name: sum(sum(s.counts[name].values()) for s in summaries) for name in names}
        common = sorted(names, key=lambda name: -sizes[name])[: MOST_CLASSES - 1]
        shown = [n for n in names if len(names) <= MOST_CLASSES or n in common]
        groups += [(name, [name]) for name in shown]
        rest = [name for name in names if name not in shown]
        groups += [(f"{len(rest)} more", rest)] if rest else []
    return [
        (title, [{c: sum(s.counts[n][c] for n in group) for c in COMBINATIONS} for s in summaries])
        for title, group in groups
    ]


def _draw(ax: Axes, summaries: Sequence[ClientSummary], columns: Sequence[_Column]) -> None:
    starts = [0.0, *(_WIDE + i for i in range(len(columns) - 1))]
    most = [max(sum(by.values()) for by in cells) for _, cells in columns]
    scales = [most[0], *([max(most[1:])] * (len(columns) - 1) if columns[1:] else [])]
    bars: dict[str, list[_Box]] = {combination: [] for combination in COMBINATIONS}
    for i, (_, cells) in enumerate(columns):
        reach = (0.8 * _WIDE if i == 0 else 0.68) / max(scales[i], 1)
        for row, by in enumerate(cells):
            end = _add_bars(bars, by, row, starts[i], reach)
            if len(cells) <= MOST_ROWS:
                _write_count(ax, sum(by.values()), end, row)
        ax.axvline(starts[i], color=figures.LINE, linewidth=0.8, zorder=0)
    figures._name_rows(ax, [summary.id for summary in summaries])
    figures._thin_names(ax, len(summaries))
    ax.set_xlim(0, starts[-1] + (_WIDE if len(columns) == 1 else 1.0))
    ax.xaxis.tick_top()
    long = any(len(name) > 11 for name, _ in columns)
    ax.set_xticks(starts, [name.replace("_", " ")[:40] for name, _ in columns], ha="left")
    ax.tick_params(length=0, labelcolor=figures.INK)
    if long:
        for label in ax.get_xticklabels():
            label.set(rotation=24, rotation_mode="anchor")
    for spine in ax.spines.values():
        spine.set_visible(False)
    figures._legend_above(ax, _draw_bars(ax, bars))


def _add_bars(
    bars: dict[str, list[_Box]], by: dict[str, int], row: int, start: float, reach: float
) -> float:
    """Boxes side by side from `start`, `reach` wide per sample; returns where they end."""
    for combination in COMBINATIONS:
        end = start + by[combination] * reach
        if by[combination]:
            low, high = row - 0.37, row + 0.37
            bars[combination].append([(start, low), (end, low), (end, high), (start, high)])
        start = end
    return start


def _draw_bars(ax: Axes, bars: dict[str, list[_Box]]) -> list[Any]:
    """One artist a combination, however many parties there are; returns the legend's handles."""
    from matplotlib.collections import PolyCollection
    from matplotlib.patches import Patch

    handles = []
    for combination, (name, colour) in _STYLES.items():
        if bars[combination]:
            ax.add_collection(PolyCollection(bars[combination], facecolors=colour, linewidths=0))
            handles.append(Patch(color=colour, label=name))
    return handles


def _write_count(ax: Axes, count: int, end: float, row: int) -> None:
    ink = figures.MUTED if count else figures.LINE
    look: dict[str, Any] = {"va": "center_baseline", "fontsize": figures.SMALLEST, "color": ink}
    ax.text(end + 0.04, row, str(count), **look)
