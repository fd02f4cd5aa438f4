"""The figures, as SVG that is the same byte for byte on every call.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; within a figure every line
also has its own marker and dash, and areas of one lightness differ in their hatching, so that a
print needs no colour to be read. Text stays text, so that it can be searched and takes the page's
font.

A figure is meant to be printed at its own size, at most `PAGE` wide; no letter is then smaller
than `SMALLEST`.

A figure is drawn in fixed ink, line and paper colours. In the page those become CSS variables,
so that a reader's dark mode recolours the figure; a file for a README keeps them. matplotlib is
imported when the first figure is drawn, without pyplot and its global state.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmllm.report import facts
from fedmllm.report.loading import HOLDINGS, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, LINE, PAPER = "#1f2430", "#6b7280", "#d9dde3", "#ffffff"
VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)", PAPER: "var(--card)"}

BLUE, VERMILLION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
ORANGE, SKY, YELLOW, GREY, PALE = "#e69f00", "#56b4e9", "#f0e442", "#9aa1ab", "#d3d7dd"
RUN_COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)  # yellow lines vanish on white
RUN_MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # seven against six colours: 42 looks
LOCAL_MARKERS = ("<", "h")  # what federated runs are measured against has markers of its own
CENTRALISED_MARKERS = ("*", "p")
# colour and hatching: in grey, two of about the same lightness differ in the hatching
CLASS_STYLES = (
    (SKY, ""),
    (VERMILLION, ""),
    (YELLOW, ""),
    (BLUE, ""),
    (PURPLE, "////"),
    (GREEN, "...."),
    (ORANGE, "xxxx"),
    (PALE, "...."),
)
# The same colour means the same modalities, whether a party holds them or a test shows them.
HOLDING_STYLES = {
    "image_text": ("image + text", GREEN),
    "image": ("image only", ORANGE),
    "text": ("text only", BLUE),
    "neither": ("neither", PALE),
}
CONDITION_STYLES = {
    "both": (GREEN, "o"),
    "image_withheld": (BLUE, "s"),
    "text_withheld": (ORANGE, "^"),
    "neither": (GREY, "D"),
}

HALF = (4.8, 2.9)  # inches: half a page on a desk, a whole one on a phone
COLUMN, PAGE = 3.4, 7.0  # inches: one column of a two-column paper, and both
SMALLEST = 8.0  # points
FONT = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif"
RC: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib: the same layout everywhere
    "font.size": 9,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.labelcolor": MUTED,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.color": LINE,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "figure.facecolor": PAPER,
    "svg.fonttype": "none",
    "svg.hashsalt": "fedmllm",
    "hatch.linewidth": 0.5,
}


# --- figures that stand alone ----------------------------------------------------------------


def learning_curves(results: Sequence[Result]) -> Figure:
    """Headline metric and training loss over rounds, one line a run."""
    panels: list[Panel] = [
        (draw_metric, (results, facts.headline(results))),
        (draw_loss, (results,)),
    ]
    return draw_panels(panels, size=(PAGE, 3.5), legend=results)


def conditions(results: Sequence[Result]) -> Figure:
    """The headline metric of every run under every test condition, with standard errors."""
    return draw_panels([(draw_conditions, (results,))], size=(HALF[0], 1.2 + 0.42 * len(results)))


def holdings(result: Result) -> Figure:
    """Who holds what: a bar a party, by modality and, for choice tasks, by class."""
    panels: list[Panel] = [(draw_modalities, (result,))]
    if has_classes(result):
        panels.append((draw_classes, (result,)))
    width = PAGE if len(panels) > 1 else HALF[0]
    return draw_panels(panels, size=(width, class_height(result, width / len(panels))))


def parties(result: Result, others: Sequence[Result] = ()) -> Figure:
    """A local run: a dot a party, a diamond for the mean, a line for the best federated run."""
    height = 1.3 + 0.4 * len(facts.conditions([result]))
    return draw_panels([(draw_parties, (result, others))], size=(HALF[0], height))


def every(results: Sequence[Result]) -> Iterator[tuple[str, Figure]]:
    """(name, figure) of all that runs of one task show: conditions, curves, each local run's
    parties, and once each who holds what."""
    yield "conditions", conditions(results)
    if any(facts.history(result) for result in results):
        yield "curves", learning_curves(results)
    seen = set()
    for result, label in zip(results, facts.labels(results), strict=True):
        if result.get("per_client"):
            yield f"parties-{label}", parties(result, results)
        held = str(facts.lookup(result, "manifest", "sha256") or facts.clients(result))
        shares = facts.topology(result) in ("federated", "local") and facts.clients(result)
        if shares and held not in seen:
            seen.add(held)
            yield f"held-{label}", holdings(result)


def learning_curves_svg(results: Sequence[Result]) -> str:
    """`learning_curves` as a file's text, on white."""
    return svg(learning_curves(results))


def conditions_svg(results: Sequence[Result]) -> str:
    """`conditions` as a file's text, on white."""
    return svg(conditions(results))


def holdings_svg(result: Result) -> str:
    """`holdings` as a file's text, on white."""
    return svg(holdings(result))


def parties_svg(result: Result, others: Sequence[Result] = ()) -> str:
    """`parties` as a file's text, on white."""
    return svg(parties(result, others))


# --- from figure to text ---------------------------------------------------------------------


Panel = tuple[Callable[..., None], tuple[Any, ...]]
"""(drawing function, its arguments after the axes)"""


def draw_panels(
    panels: Sequence[Panel], *, size: tuple[float, float] = HALF, legend: Sequence[Result] = ()
) -> Figure:
    """Drawings side by side; size in inches. legend: runs to name below, if the page does not."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(RC):
        figure = Figure(figsize=size, layout="constrained")
        parts = figure.subfigures(1, len(panels), squeeze=False)[0]
        for part, (draw, arguments) in zip(parts, panels, strict=True):
            draw(part.subplots(), *arguments)
        if legend:
            _name_runs(figure, legend)
    return figure


def draw_facets(panels: Sequence[Panel], *, size: tuple[float, float], columns: int) -> Figure:
    """Drawings of one kind on common axes, in rows of `columns`; size in inches."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        places = list(grid.flat)
        for ax, (draw, arguments) in zip(places, panels, strict=False):
            draw(ax, *arguments)
        for ax in places[len(panels) :]:
            ax.remove()
        for i, ax in enumerate(places[: len(panels)]):
            last = i + columns >= len(panels)  # also above a gap in the last row
            ax.tick_params(labelbottom=last)
            ax.xaxis.label.set_visible(last)
            ax.yaxis.label.set_visible(i % columns == 0)
    return figure


def _name_runs(figure: Figure, results: Sequence[Result]) -> None:
    """The legend of a figure that stands alone."""
    name_lines(figure, dict(zip(facts.labels(results), run_styles(results), strict=True)))


def name_lines(figure: Figure, styles: Mapping[str, Style]) -> None:
    """A legend below a figure: each name with its style."""
    handles = [_handle(style) for style in styles.values()]
    names = [f" {name}" for name in styles]  # matplotlib drops one that begins with _
    columns = columns_that_fit(names, figure.get_size_inches()[0])
    look: dict[str, Any] = {"fontsize": SMALLEST, "handlelength": 3, "columnspacing": 1.5}
    figure.legend(handles, names, loc="outside lower center", ncols=columns, **look)


def columns_that_fit(names: Sequence[str], width: float, *, handle: float = 3.8) -> int:
    """How many legend columns fit into so many inches, four at most; a column fills downwards.
    handle: the length of a line and its gap, in letters."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextToPath

    font, measure = FontProperties(family="DejaVu Sans", size=SMALLEST), TextToPath()
    around = (handle + 1.5) * SMALLEST  # with the space between columns
    sizes = [measure.get_text_width_height_descent(n, font, False)[0] + around for n in names]
    for count in range(min(len(names), 4), 1, -1):
        starts = [-(-len(names) * i // count) for i in range(count + 1)]
        columns = [sizes[a:b] for a, b in itertools.pairwise(starts)]
        if sum(map(max, columns)) <= 72 * width - 2 * SMALLEST:
            return count
    return 1


def _legend_name(name: str) -> str:
    """At most 27 letters; begins with a space, since matplotlib drops a name that begins with _."""
    return f" {name}" if len(name) <= 27 else f" {name[:26]}…"


def svg(figure: Figure) -> str:
    """A figure as SVG: no date, no ids that change, nothing to fetch."""
    import matplotlib

    out = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context(RC):
        figure.savefig(out, format="svg", metadata=nothing)
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", out.getvalue(), flags=re.DOTALL)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", lambda _: FONT, text)
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def inline(figure: Figure, key: str, label: str) -> str:
    """A figure as an HTML element: ids begin with `key`, colours follow the page."""
    text = svg(figure)
    text = text[text.index("<svg") :]
    size = re.search(r'viewBox="[^"]*"', text)
    body = text[text.index(">") + 1 :]
    body = re.sub(r'(?<=\sid=")', f"{key}-", body)
    body = re.sub(r'(?<=href="#)|(?<=url\(#)', f"{key}-", body)
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, variable)
    box = size.group(0) if size else ""
    return f'<svg {box} role="img" aria-label="{escape(label)}">{body}'


def save_png(figure: Figure, path: str | Path, *, dpi: int = 160) -> Path:
    """Save a figure as a PNG file."""
    import matplotlib

    with matplotlib.rc_context(RC):
        figure.savefig(path, format="png", dpi=dpi)
    return Path(path)


# --- how a run looks -------------------------------------------------------------------------


@dataclass(frozen=True)
class Style:
    """Colour, marker (empty for none) and dash of a run; the same in every figure."""

    colour: str
    marker: str
    dash: str


DASHES = ("-", "--", "-.", ":")


def run_styles(results: Sequence[Result]) -> list[Style]:
    """Federated runs in colour; what they are measured against in ink and grey."""
    counts: dict[str, int] = {}
    styles = []
    for result in results:
        kind = facts.topology(result)
        i = counts[kind] = counts.get(kind, -1) + 1
        styles.append(run_style(kind, i))
    return styles


def run_style(kind: str, i: int) -> Style:
    """The look of the i-th run of a topology."""
    if kind == "zero-shot":
        return Style(MUTED, "", (":", "-.", "--", "-")[i % 4])
    if kind == "local":
        return Style(MUTED, LOCAL_MARKERS[i % 2], DASHES[i // 2 % 4])
    if kind == "centralised":
        return Style(INK, CENTRALISED_MARKERS[i % 2], ("--", "-", "-.", ":")[i // 2 % 4])
    dash = DASHES[i // len(RUN_COLOURS) % 4]
    return Style(RUN_COLOURS[i % len(RUN_COLOURS)], RUN_MARKERS[i % len(RUN_MARKERS)], dash)


def _handle(style: Style) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], **line_of(style))


def line_of(style: Style) -> dict[str, Any]:
    return {
        "color": style.colour,
        "linestyle": style.dash,
        "linewidth": 1.6,
        "marker": style.marker or None,
        "markersize": 7.5 if style.marker == "*" else 4.8,  # a star is thin
        "markeredgecolor": PAPER,
        "markeredgewidth": 0.6,
    }


def open_mark(style: Style) -> dict[str, Any]:
    """Of a test on other samples than those of the line before it."""
    look = {"linestyle": "none", "markersize": 6, "markerfacecolor": PAPER}
    return line_of(style) | look | {"markeredgecolor": style.colour, "markeredgewidth": 1.3}


_SHAPES = {
    "o": '<circle cx="17" cy="7" r="4"/>',
    "s": '<path d="M13 3h8v8h-8z"/>',
    "^": '<path d="M17 2.5l4.6 8.5h-9.2z"/>',
    "v": '<path d="M17 11.5l4.6-8.5h-9.2z"/>',
    "D": '<path d="M17 2l5 5-5 5-5-5z"/>',
    "P": '<path d="M15 2.5h4v2.5h2.5v4H19v2.5h-4V9h-2.5V5H15z"/>',
    "<": '<path d="M12.5 7l8.5-4.6v9.2z"/>',
    "h": '<path d="M17 2.2l4.2 2.4v4.8L17 11.8l-4.2-2.4V4.6z"/>',
    "*": '<path d="M17 1.4l1.4 3.9 4.1.1-3.3 2.5 1.2 4-3.4-2.4-3.4 2.4 1.2-4-3.3-2.5 4.1-.1z"/>',
    "p": '<path d="M17 2.2l4.8 3.5-1.8 5.6h-6l-1.8-5.6z"/>',
    "X": '<path d="M13 5l2-2 2 2 2-2 2 2-2 2 2 2-2 2-2-2-2 2-2-2 2-2z"/>',
}
_STROKES = {"-": "", "--": "6 3", "-.": "7 3 1.5 3", ":": "1.5 2.5"}


def swatch(style: Style) -> str:
    """A run's line and marker as a tiny picture for tables and legends."""
    colour = VARIABLES.get(style.colour, style.colour)
    return (
        f'<svg class="swatch" viewBox="0 0 34 14" aria-hidden="true">'
        f'<path d="M1 7h32" stroke="{colour}" stroke-width="2" '
        f'stroke-dasharray="{_STROKES[style.dash]}"/>'
        f'<g fill="{colour}">{_SHAPES.get(style.marker, "")}</g></svg>'
    )


# --- curves ----------------------------------------------------------------------------------


def draw_metric(ax: Axes, results: Sequence[Result], condition: str) -> None:
    """The headline metric over rounds; a run that trained nothing is a level line."""
    for result, style in zip(results, run_styles(results), strict=True):
        points, last = facts.followed(result, condition)
        final = facts.score(result, condition)
        if points:
            ax.plot(*zip(*points, strict=True), **line_of(style))
            for x, y in last:
                ax.plot([x], [y], **open_mark(style))
        elif final is not None and facts.history(result):
            ax.plot([facts.rounds(result) or 0], [final], **line_of(style))
        elif final is not None:
            ax.axhline(final, color=style.colour, linestyle=style.dash, linewidth=1.6)
    metric = facts.metric_name(results[0])
    marked = any(facts.followed(result, condition)[1] for result in results)
    words = "round (open marks: tests on all samples)" if marked else "round"
    _finish(ax, f"Test {metric}, {facts.condition_name(condition)}", words)
    whole_numbers(ax)


def draw_loss(ax: Axes, results: Sequence[Result]) -> None:
    """Training loss over rounds, mean over the clients of a round."""
    for result, style in zip(results, run_styles(results), strict=True):
        points = facts.losses(result)
        if points:
            ax.plot(
                *zip(*points, strict=True),
                **line_of(style) | {"markersize": 5.5 if style.marker == "*" else 3.6},
            )
    _finish(ax, "Training loss", "round")
    whole_numbers(ax)


def _finish(ax: Axes, title: str, xlabel: str, *, grid: str = "y") -> None:
    ax.set_title(title)
    ax.set_xlabel(xlabel)
    ax.grid(visible=True, axis="y" if grid == "y" else "x")
    ax.tick_params(length=0)
    ax.spines["left" if grid == "y" else "bottom"].set_visible(False)


def whole_numbers(ax: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 5, 10]))


# --- dots ------------------------------------------------------------------------------------


def draw_conditions(ax: Axes, results: Sequence[Result]) -> None:
    """A line of dots a run: a dot for each test condition, its bar one standard error each way."""
    shown = facts.conditions(results)
    step = 0.62 / max(len(shown), 1)
    for i, condition in enumerate(shown):
        colour, marker = CONDITION_STYLES.get(condition, (MUTED, "X"))
        offset = (i - (len(shown) - 1) / 2) * step
        points = [
            (value, row + offset, facts.score_se(result, condition) or 0.0)
            for row, result in enumerate(results)
            if (value := facts.score(result, condition)) is not None
        ]
        if points:
            x, y, errors = zip(*points, strict=True)
            ax.errorbar(x, y, xerr=errors, linestyle="", color=colour, elinewidth=1.3)
            look: dict[str, Any] = {"color": colour, "marker": marker, "markeredgecolor": PAPER}
            name = facts.condition_name(condition)
            ax.plot(x, y, linestyle="", markersize=6.4, zorder=3, label=name, **look)
    _name_rows(ax, facts.labels(results))
    _finish(ax, "", f"test {facts.metric_name(results[0])}", grid="x")
    _legend_above(ax)


def draw_parties(ax: Axes, result: Result, others: Sequence[Result] = ()) -> None:
    """A dot a party under each condition, the mean, and the best federated run."""
    shown = facts.conditions([result])
    for row, condition in enumerate(shown):
        colour, _ = CONDITION_STYLES.get(condition, (MUTED, "X"))
        values = list(facts.party_scores(result, condition).values())
        y = [row + (i % 5 - 2) * 0.09 for i in range(len(values))]  # spread out, not at random
        ax.plot(values, y, "o", color=colour, markersize=5, alpha=0.75, markeredgecolor=PAPER)
        _mark(ax, facts.score(result, condition), row, marker="D")
        winner = facts.best(others, condition)
        _mark(ax, facts.score(winner, condition) if winner else None, row, marker="|")
    _name_rows(ax, [facts.condition_name(c) for c in shown])
    _finish(ax, "", f"test {facts.metric_name(result)}", grid="x")
    _party_legend(ax, bool(facts.best(others, facts.headline([result]))))


def _mark(ax: Axes, x: float | None, row: int, *, marker: str) -> None:
    if x is not None:
        ax.plot([x], [row], linestyle="", **_MARKS[marker])


_MARKS: dict[str, dict[str, Any]] = {
    "o": {"marker": "o", "color": MUTED, "markersize": 5},
    "D": {"marker": "D", "color": INK, "markersize": 5.5, "markeredgecolor": PAPER},
    "|": {"marker": "|", "color": VERMILLION, "markersize": 20, "markeredgewidth": 2.4},
}


def _party_legend(ax: Axes, federated: bool) -> None:
    from matplotlib.lines import Line2D

    names = {"o": "one party", "D": "mean of parties", "|": "best federated run"}
    small = {"|": {"markersize": 10}}
    handles = [
        Line2D([], [], linestyle="", **_MARKS[key] | small.get(key, {}), label=name)
        for key, name in names.items()
        if key != "|" or federated
    ]
    _legend_above(ax, handles)


def _name_rows(ax: Axes, names: Sequence[str]) -> None:
    """Rows from the top down, each with its name."""
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(axis="y", labelcolor=INK)
    ax.set_ylim(len(names) - 0.45, -0.55)


def _legend_above(ax: Axes, handles: Sequence[Any] | None = None) -> None:
    found = ax.get_legend_handles_labels()[0] if handles is None else list(handles)
    if not found:
        return
    names = [_legend_name(str(handle.get_label())) for handle in found]
    ax.figure.legend(
        found,
        names,
        loc="outside upper left",
        ncols=_columns_above(names, ax.figure.bbox.width / ax.figure.dpi),
        borderaxespad=0.0,
        borderpad=0.1,
        columnspacing=1.5,
        handletextpad=0.4,
        handlelength=1.4,
        fontsize=SMALLEST,
    )


def _columns_above(names: Sequence[str], width: float) -> int:
    return columns_that_fit(names, width, handle=1.8)


# --- bars ------------------------------------------------------------------------------------


def has_classes(result: Result) -> bool:
    """Whether the manifest counts labels."""
    return any(facts.class_counts(client) for client in facts.clients(result))


def holdings_height(result: Result) -> float:
    """Inches for a bar a party; with very many parties the bars grow thin, not the page long."""
    count = len(facts.clients(result))
    return 1.2 + count * (0.27 if count <= 24 else max(0.06, 6.5 / count))


def class_height(result: Result, width: float = HALF[0]) -> float:
    """`holdings_height` with room for the rows of the class legend in `width` inches: the bars
    stay as tall."""
    names = [_legend_name(name) for name in _classes(result)[: len(CLASS_STYLES)]]
    rows = -(-len(names) // _columns_above(names, width)) if names else 1
    return holdings_height(result) + 0.17 * (rows - 1)


def _classes(result: Result) -> list[str]:
    """The task's classes, then any other label of the manifest."""
    found = (name for client in facts.clients(result) for name in facts.class_counts(client))
    return list(dict.fromkeys([*(result["task"].get("classes") or []), *found]))


def draw_modalities(ax: Axes, result: Result) -> None:
    """A bar a party: samples by the modalities that it holds."""
    clients = facts.clients(result)
    parts = {
        (*HOLDING_STYLES[key], ""): [client.get(key, 0) for client in clients]
        for key in HOLDINGS
        if any(client.get(key, 0) for client in clients)
    }
    _bars(ax, clients, parts)


def draw_classes(ax: Axes, result: Result) -> None:
    """A bar a party: samples by class; classes past the eighth share the last colour."""
    clients = facts.clients(result)
    found = _classes(result)
    named = found[: len(CLASS_STYLES) - (len(found) > len(CLASS_STYLES))]
    parts = {
        (name, *CLASS_STYLES[i]): [facts.class_counts(c).get(name, 0) for c in clients]
        for i, name in enumerate(named)
    }
    if len(found) > len(named):
        rest = [c["samples"] - sum(v[i] for v in parts.values()) for i, c in enumerate(clients)]
        parts[f"{len(found) - len(named)} more", *CLASS_STYLES[-1]] = rest
    _bars(ax, clients, parts)


def draw_profiles(ax: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """A bar a party: shares of its samples by modality, and what the server made of them."""
    left = [0.0] * len(rows)
    totals = [sum(row[key] for key in HOLDINGS) or 1 for row in rows]
    for key in HOLDINGS:
        name, colour = HOLDING_STYLES[key]
        shares = [row[key] / total for row, total in zip(rows, totals, strict=True)]
        if any(shares):
            look: dict[str, Any] = {"height": 0.74, "edgecolor": PAPER, "linewidth": 0.7}
            ax.barh(range(len(rows)), shares, left=left, label=name, color=colour, **look)
        left = [at + share for at, share in zip(left, shares, strict=True)]
    if len(rows) <= 24:
        for i, row in enumerate(rows):
            ax.text(1.02, i, _weights_words(row), va="center", fontsize=SMALLEST, color=INK)
    _name_rows(ax, [str(row["id"]) for row in rows])
    _thin_names(ax, len(rows))
    _finish(ax, "", "share of samples", grid="x")
    ax.set_xlim(0, 1)
    _legend_above(ax)


def _weights_words(row: Mapping[str, Any]) -> str:
    """``h 0.75  w 0.075``: only what the run used."""
    words = {"index": "h", "weight": "w", "scale": "n ×", "chance": "p ×"}
    digits = {"index": 2, "weight": 3, "scale": 2, "chance": 2}
    return "  ".join(
        f"{short} {row[key]:.{digits[key]}f}"
        for key, short in words.items()
        if row.get(key) is not None
    )


def _bars(
    ax: Axes, clients: Sequence[dict[str, Any]], parts: dict[tuple[str, str, str], list[int]]
) -> None:
    """Stacked bars from the left, each part with its count where it is wide enough."""
    left = [0] * len(clients)
    widest = max((client["samples"] for client in clients), default=1) or 1
    for (name, colour, hatch), counts in parts.items():
        look: dict[str, Any] = {
            "height": 0.74,
            "facecolor": colour,
            "edgecolor": PAPER,  # of the hatching too
            "linewidth": 0.7,
            "hatch": hatch,
        }
        ax.barh(range(len(clients)), counts, left=left, label=name, **look)
        if len(clients) <= 24:
            _write_counts(ax, counts, left, colour=colour, least=0.085 * widest)
        left = [a + b for a, b in zip(left, counts, strict=True)]
    _name_rows(ax, [client["id"] for client in clients])
    _thin_names(ax, len(clients))
    ax.set_xlim(0, 1.05 * widest)
    whole_numbers(ax)
    _finish(ax, "", "samples", grid="x")
    _legend_above(ax)


def _write_counts(
    ax: Axes, counts: Sequence[int], left: Sequence[int], *, colour: str, least: float
) -> None:
    dark = colour == BLUE
    for row, (count, start) in enumerate(zip(counts, left, strict=True)):
        if count >= least:
            place: dict[str, Any] = {"ha": "center", "va": "center_baseline"}
            place["bbox"] = {"facecolor": colour, "edgecolor": "none", "pad": 0.8}
            place["fontsize"] = SMALLEST
            # Not PAPER or INK, which follow the page: a bar keeps its colour in the dark.
            shade = "#fefefe" if dark else "#101010"
            ax.text(start + count / 2, row, str(count), color=shade, **place)


def _thin_names(ax: Axes, count: int) -> None:
    """With very many parties name every n-th only."""
    every = -(-count // 24)
    for i, label in enumerate(ax.get_yticklabels()):
        label.set_visible(i % every == 0)
