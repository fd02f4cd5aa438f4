"""Figures of a grid: the radar over settings, learning curves with bands over seeds, the drop
from aligned data, and the metric against communication.

A method keeps its colour and marker in all of them; its line is dashed where it is run with a
strategy. Each drawing shows one strategy and what it is measured against (`shown`), so that no two
of its lines look alike. See `figures` for the colours and why, and for the sizes.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from fedmllm.report import facts
from fedmllm.report.arms import Arm, Board
from fedmllm.report.figures import (
    BLUE,
    GREEN,
    INK,
    LINE,
    MUTED,
    PAPER,
    RUN_MARKERS,
    SMALLEST,
    VERMILLION,
    Style,
    line_of,
    open_mark,
    run_style,
    whole_numbers,
)
from fedmllm.report.loading import Result
from fedmllm.report.statistics import interval, mean_and_half
from fedmllm.scenarios import SETTINGS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCENARIO_STYLES = {
    "missing": (BLUE, "o"),
    "cross": (VERMILLION, "s"),
    "hybrid": (GREEN, "^"),
}
FEW = 2  # arms of a strategy beside which there is room for the same methods without it
# in small panels: with a wide white edge a small marker has no shape
_SMALL = {"markeredgewidth": 0.35}
Band = tuple[float, float, float]
"""(mean, low, high)"""
Points = list[tuple[float, Band]]
"""(x, band)"""


def band(values: Sequence[float]) -> Band:
    """The mean over seeds and its 95 % interval; of fewer than five seeds, their range, since an
    interval from two or three would cover the whole figure."""
    mean, half = interval(values)
    if half is None:
        return mean, min(values), max(values)
    return mean, mean - half, mean + half


def method_legend(board: Board, condition: str) -> dict[str, Style]:
    """Name -> style of the methods of a figure with a panel for each strategy."""
    styles: dict[str, Style] = {}
    for chosen in strategies(board):
        for arm in drawn(board, condition, chosen):
            plain = arm_styles(board)[arm.label]
            dash = ":" if arm.topology == "zero-shot" else "-"
            styles.setdefault(method(arm), Style(plain.colour, plain.marker, dash))
    if strategies(board) != [""]:
        styles["with the panel's strategy"] = Style(MUTED, "", "--")
    return styles


def shown(board: Board, chosen: str) -> list[Arm]:
    """The arms of a strategy and what they are measured against: baselines that were not run with
    the strategy stand without it; so do the strategy's methods, if they are `FEW`."""
    own = [arm for arm in board.arms if strategy(arm) == chosen]
    there = {arm.topology for arm in own} - {"federated"}
    federated = [method(arm) for arm in own if arm.topology == "federated"]
    plain = federated if chosen and len(federated) <= FEW else []
    return [
        arm
        for arm in board.arms
        if arm in own or (not strategy(arm) and _stands(arm, there, plain))
    ]


def _stands(arm: Arm, there: set[str], plain: Sequence[str]) -> bool:
    """Whether an arm without a strategy stands beside those with it."""
    return method(arm) in plain if arm.topology == "federated" else arm.topology not in there


def strategies(board: Board) -> list[str]:
    """The strategies of a board's federated arms, or of all if nothing is federated; none (empty)
    first if there is such an arm."""
    federated = [arm for arm in board.arms if arm.topology == "federated"]
    return list(dict.fromkeys(map(strategy, federated or board.arms)))


def method(arm: Arm) -> str:
    """An arm's name without its strategy."""
    return arm.label.partition(" + ")[0]


def strategy(arm: Arm) -> str:
    """An arm's strategy, empty for none."""
    return arm.label.partition(" + ")[2]


def arm_styles(board: Board) -> dict[str, Style]:
    """How each arm looks, by label: colour and marker of its method, dashed with a strategy. Arms
    of different strategies may look alike; no figure draws two strategies on the same axes."""
    known: dict[str, list[str]] = {}
    for arm in board.arms:
        names = known.setdefault(arm.topology, [])
        names += [] if method(arm) in names else [method(arm)]
    return {
        arm.label: _style(arm.topology, known[arm.topology].index(method(arm)), strategy(arm))
        for arm in board.arms
    }


def _style(topology: str, i: int, strategy: str) -> Style:
    style = run_style(topology, i)
    if topology == "zero-shot":  # the first has no marker
        marker = RUN_MARKERS[(i - 1) % len(RUN_MARKERS)] if i else ""
        return Style(style.colour, marker, "-." if strategy else ":")
    return Style(style.colour, style.marker, "--" if strategy else "-")


def legend(board: Board, arms: Sequence[Arm], chosen: str) -> dict[str, Style]:
    """Name -> style of some arms in a figure of one strategy, which its title names: an arm without
    it is called plain."""
    styles = arm_styles(board)
    return {
        method(arm) + (", plain" if chosen and not strategy(arm) else ""): styles[arm.label]
        for arm in arms
    }


# -- radar -------------------------------------------------------------------------------------


def drawn(board: Board, condition: str, chosen: str) -> list[Arm]:
    """The arms of `shown` that have any number to be drawn."""
    return [arm for arm in shown(board, chosen) if _by_setting(arm, board, condition)]


def draw_radar(ax: Axes, board: Board, condition: str, chosen: str) -> None:
    """A polygon for each arm of a strategy over all settings; farther out is better. Where an arm
    was not run in a setting its polygon is broken, and the figure says so."""
    means = {a.label: _by_setting(a, board, condition) for a in drawn(board, condition, chosen)}
    every = [_by_setting(arm, board, condition) for arm in board.arms]  # one scale for all radars
    values = [value for row in every for value in row.values()]
    angles = [
        math.pi / 2 - 2 * math.pi * i / len(board.settings) for i in range(len(board.settings))
    ]
    rings = _rings(min(values, default=0), max(values, default=1))
    low, high = rings[0], rings[-1]
    _web(ax, board.settings, angles, rings)
    styles = arm_styles(board)
    for label, row in means.items():
        radius = [(row.get(s, math.nan) - low) / (high - low) for s in board.settings]
        xs = [r * math.cos(a) for r, a in zip(radius, angles, strict=True)]
        ys = [r * math.sin(a) for r, a in zip(radius, angles, strict=True)]
        ax.plot([*xs, xs[0]], [*ys, ys[0]], **line_of(styles[label]) | _SMALL)
    ax.set_title(_radar_title(board, condition, chosen))
    if any(len(row) < len(board.settings) for row in means.values()):
        words = "A line breaks where its arm was not run."
        ax.set_ylim(bottom=-1.55)
        ax.text(0, -1.45, words, ha="center", va="center", fontsize=SMALLEST, color=MUTED)


def _radar_title(board: Board, condition: str, chosen: str) -> str:
    first = f"{board.metric} by setting, {facts.condition_name(condition)}"
    return "\n".join([first, *(textwrap.wrap(f"with {chosen}", 36) if chosen else [])])


def _by_setting(arm: Arm, board: Board, condition: str) -> dict[str, float]:
    scores = {s: list(arm.scores(s, condition).values()) for s in board.settings}
    return {s: mean_and_half(values)[0] for s, values in scores.items() if values}


def _rings(low: float, high: float) -> list[float]:
    """Round values from below the least to above the greatest, three to six of them."""
    span = max(high - low, 0.02)
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5) if span / s <= 4)
    first = math.floor(low / step - 1e-9)
    if low - first * step < 0.3 * step:  # else the least would lie on the middle's own number
        first -= 1
    first = max(first, 0)
    last = math.ceil(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, max(last, first + 2) + 1)]


def _web(
    ax: Axes, settings: Sequence[str], angles: Sequence[float], rings: Sequence[float]
) -> None:
    ax.set_aspect("equal")
    ax.axis("off")
    ax.set_xlim(-1.6, 1.6)
    ax.set_ylim(-1.3, 1.3)
    for ring in rings[1:]:
        r = (ring - rings[0]) / (rings[-1] - rings[0])
        xs, ys = [r * math.cos(a) for a in angles], [r * math.sin(a) for a in angles]
        ax.plot([*xs, xs[0]], [*ys, ys[0]], color=LINE, linewidth=0.7, zorder=0)
    for setting, a in zip(settings, angles, strict=True):
        x, y = math.cos(a), math.sin(a)
        ax.plot([0, x], [0, y], color=LINE, linewidth=0.7, zorder=0)
        side = "center" if abs(x) < 0.1 else "left" if x > 0 else "right"
        look: dict[str, Any] = {"fontsize": SMALLEST, "color": MUTED, "linespacing": 1.0}
        ax.text(1.07 * x, 1.15 * y, _spoke(setting), ha=side, va="center", **look)
    middle = (angles[0] + angles[1]) / 2  # between two spokes, where no polygon has a corner
    named = rings if len(rings) <= 4 else rings[::-1][::2]  # with every ring the numbers touch
    for ring in named:
        r = (ring - rings[0]) / (rings[-1] - rings[0]) * math.cos((angles[0] - angles[1]) / 2)
        x, y = r * math.cos(middle), r * math.sin(middle)
        box = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.6, "alpha": 0.8}
        look = {"fontsize": SMALLEST, "color": INK, "ha": "center", "va": "center", "bbox": box}
        ax.text(x, y, f"{ring:g}", **look)


def _spoke(setting: str) -> str:
    """A setting's name on two lines or more, so that it takes little width."""
    if setting in SETTINGS:
        return setting.replace("-", "\n")
    return textwrap.fill(setting, 12)


# -- curves ------------------------------------------------------------------------------------


def draw_bands(ax: Axes, board: Board, setting: str, condition: str, chosen: str) -> None:
    """The metric over rounds: mean over seeds, and their `band`."""
    styles = arm_styles(board)
    for arm in shown(board, chosen):
        runs = list(arm.runs.get(setting, {}).values())
        if not runs:
            continue
        curves = [facts.followed(run, condition) for run in runs]
        points = _mean_curve([points for points, _ in curves])
        _line_or_level(ax, points, arm.scores(setting, condition), styles[arm.label])
        _last_test(ax, _mean_curve([last for _, last in curves]), styles[arm.label])
    _finish(ax, setting, "round", board.metric)
    ax.set_ylim(*_limits(board, condition))
    whole_numbers(ax)


def followed(board: Board, condition: str) -> bool:
    """Whether any run was measured over its rounds."""
    return any(len(facts.curve(run, condition)) > 1 for run in board.results)


def _limits(board: Board, condition: str) -> tuple[float, float]:
    """One scale for the curves of all settings."""
    found = [value for run in board.results for _, value in facts.curve(run, condition)]
    found += [v for run in board.results if (v := facts.score(run, condition)) is not None]
    low, high = min(found, default=0.0), max(found, default=1.0)
    margin = 0.06 * (high - low or 1.0)
    return low - margin, high + margin


def _mean_curve(curves: Sequence[Sequence[tuple[float, float]]]) -> Points:
    """The band at each x that all curves have."""
    if not curves or not all(curves):
        return []
    common = set.intersection(*({x for x, _ in curve} for curve in curves))
    return [(x, band([dict(curve)[x] for curve in curves])) for x in sorted(common)]


def _line_or_level(ax: Axes, points: Points, final: Mapping[int, float], style: Style) -> None:
    if len(points) > 1:
        xs = [x for x, _ in points]
        means, low, high = zip(*(found for _, found in points), strict=True)
        ax.fill_between(xs, low, high, color=style.colour, alpha=0.13, linewidth=0)
        ax.plot(xs, means, **line_of(style) | _SMALL)
    elif points:
        (x, (mean, _, _)) = points[0]
        ax.plot([x], [mean], **line_of(style) | {"markersize": 6})
    elif final:
        level = mean_and_half(list(final.values()))[0]
        look: dict[str, Any] = line_of(style) | {"linewidth": 1.2, **_SMALL, "zorder": 1}
        across: dict[str, Any] = {"transform": ax.get_yaxis_transform(), "markevery": [1]}
        ax.plot([0, 0.97, 1], [level] * 3, **look, **across)


def _last_test(ax: Axes, points: Points, style: Style) -> None:
    """The test at the end, on all samples, with its band."""
    for x, (mean, low, high) in points:
        look: dict[str, Any] = {"ecolor": style.colour, "elinewidth": 1.0, **open_mark(style)}
        ax.errorbar([x], [mean], yerr=[[mean - low], [high - mean]], **look)


# -- drop --------------------------------------------------------------------------------------


def drops(board: Board, condition: str) -> dict[str, dict[str, Band]]:
    """Arm -> scenario -> change of the metric from aligned data, mean over its settings, with
    the band over seeds.

    Aligned is the setting with the label skew of the others (alpha 0.5), else the mean of the
    aligned ones. Seeds are paired.
    """
    aligned = [s for s in board.settings if s.startswith("aligned")]
    aligned = [s for s in aligned if s == "aligned-a0.5"] or aligned
    found: dict[str, dict[str, Band]] = {}
    for arm in board.arms:
        if arm.topology == "zero-shot" or not aligned:
            continue
        whole = over(arm, aligned, condition)
        for name, members in groupby(board.settings, key=lambda s: s.split("-")[0]):
            here = over(arm, list(members), condition)
            common = [seed for seed in here if seed in whole]
            if name in SCENARIO_STYLES and common:
                values = [here[seed] - whole[seed] for seed in common]
                found.setdefault(arm.label, {})[name] = band(values)
    return found


def over(arm: Arm, settings: Sequence[str], condition: str) -> dict[int, float]:
    """Mean over settings by seed, for the seeds that all of them have."""
    scores = [arm.scores(setting, condition) for setting in settings]
    seeds = set.intersection(*(set(found) for found in scores)) if scores else set()
    return {seed: mean_and_half([s[seed] for s in scores])[0] for seed in sorted(seeds)}


def draw_drop(ax: Axes, board: Board, condition: str) -> None:
    """A row an arm, a marker a scenario; left of zero is worse than with aligned data."""
    found = drops(board, condition)
    handles: dict[str, Any] = {}
    for y, row in enumerate(found.values()):
        for i, (name, (mean, low, high)) in enumerate(row.items()):
            colour, marker = SCENARIO_STYLES[name]
            at = y + 0.2 * (i - (len(row) - 1) / 2)
            look: dict[str, Any] = {"color": colour, "markersize": 5, "elinewidth": 1.1}
            span = [[mean - low], [high - mean]]
            handles[name] = ax.errorbar(mean, at, xerr=span, fmt=marker, **look)
    ax.axvline(0, color=INK, linewidth=0.9, zorder=0)
    ax.set_yticks(range(len(found)), [textwrap.fill(label, 40) for label in found])
    ax.invert_yaxis()
    _finish(ax, "Change from aligned data", f"difference in {board.metric}", "", grid="x")
    if handles:
        names = [name for name in SCENARIO_STYLES if name in handles]
        where: dict[str, Any] = {"loc": "outside lower center", "ncols": 3, "fontsize": SMALLEST}
        ax.figure.legend([handles[n] for n in names], [f" {n}" for n in names], **where)


# -- communication -----------------------------------------------------------------------------


def draw_cost(ax: Axes, board: Board, condition: str, chosen: str) -> None:
    """The metric against the bytes that all parties have sent and received so far, for the arms of
    a strategy, mean over seeds and over the settings that all of them have; the test at the end is
    a mark of its own where it is on other samples; what sends nothing is a level line."""
    styles = arm_styles(board)
    arms = drawn(board, condition, chosen)
    settings = common_settings(board, arms)
    for arm in arms:
        runs = [run for setting in settings for run in arm.own(setting).values()]
        curves = [_over_bytes(run, condition) for run in runs]
        way, end = (_mean_by_round([curve[i] for curve in curves]) for i in (0, 1))
        scores = [facts.score(run, condition) for run in runs]
        final = {i: score for i, score in enumerate(scores) if score is not None}
        sent = arm.topology == "federated"
        _line_or_level(ax, way if sent else [], {} if sent else final, styles[arm.label])
        _last_test(ax, end if sent else [], styles[arm.label])
    words = [*textwrap.wrap(chosen or "plain", 26), _how_many(settings, board)]
    _finish(ax, "\n".join(words).rstrip(), "MB up and down", board.metric)


def common_settings(board: Board, arms: Sequence[Arm]) -> list[str]:
    """The settings that all of some arms were run in themselves."""
    return [s for s in board.settings if arms and all(arm.own(s) for arm in arms)]


def _how_many(settings: Sequence[str], board: Board) -> str:
    """Said only where it is not all of them."""
    few = len(settings) < len(board.settings)
    return f"{len(settings)} of {len(board.settings)} settings" if few else ""


def _mean_by_round(found: Sequence[Mapping[int, tuple[float, float]]]) -> Points:
    """Mean bytes and mean metric at each round that all runs were measured at. No interval: its
    spread would be that of settings and seeds mixed."""
    common = set.intersection(*(set(run) for run in found)) if found else set()
    points = []
    for number in sorted(common):
        pairs = [run[number] for run in found]
        x, y = (mean_and_half([pair[i] for pair in pairs])[0] for i in (0, 1))
        points.append((x, (y, y, y)))
    return points


Costs = dict[int, tuple[float, float]]
"""round -> (megabytes so far, metric)"""


def _over_bytes(run: Result, condition: str) -> tuple[Costs, Costs]:
    """Where it was measured, in two as `facts.followed`; the end, of a run that was measured only
    there. What crossed before the first round counts from the start."""
    total, at = sum(sum(parts.values()) for parts in facts.once(run).values()), {}
    for line in facts.history(run):
        total += (line.get("bytes_up") or 0) + (line.get("bytes_down") or 0)
        at[line["round"]] = total / 1e6
    (way, end), final = facts.followed(run, condition), facts.score(run, condition)
    if not way and at and final is not None:
        way = [(max(at), final)]
    return {n: (at[n], value) for n, value in way}, {n: (at[n], value) for n, value in end}


def _finish(ax: Axes, title: str, xlabel: str, ylabel: str, *, grid: str = "y") -> None:
    ax.set_title(title)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.grid(visible=True, axis="y" if grid == "y" else "x")
    ax.tick_params(length=0)
