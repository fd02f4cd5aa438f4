"""Figures of a grid: the radar over settings, learning curves with bands over seeds, the drop
from aligned data, and the metric against communication.

A method keeps its colour and marker in all of them, a strategy its dash; see `figures` for the
colours and why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from fedmllm.report import facts
from fedmllm.report.arms import Arm, Board
from fedmllm.report.figures import (
    BLUE,
    DASHES,
    GREEN,
    INK,
    LINE,
    MUTED,
    PAPER,
    VERMILLION,
    Style,
    line_of,
    open_mark,
    run_style,
    whole_numbers,
)
from fedmllm.report.statistics import ENOUGH, mean_and_half

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCENARIO_STYLES = {
    "missing": (BLUE, "o"),
    "cross": (VERMILLION, "s"),
    "hybrid": (GREEN, "^"),
}
# in small panels: with a wide white edge a small marker has no shape
_SMALL = {"markersize": 4.8, "markeredgewidth": 0.35}
Band = tuple[float, float, float]
"""(mean, low, high)"""
Points = list[tuple[float, Band]]
"""(x, band)"""


def band(values: Sequence[float]) -> Band:
    """The mean over seeds and its 95 % interval; of fewer than five seeds, their range, since an
    interval from two or three would cover the whole figure."""
    mean, half = mean_and_half(values)
    if half is None or len(values) < ENOUGH:
        return mean, min(values), max(values)
    return mean, mean - half, mean + half


def shown(board: Board, chosen: str) -> list[Arm]:
    """The arms of a strategy, and what they are measured against: baselines that were not run
    with the strategy stand without it."""
    own = [arm for arm in board.arms if strategy(arm) == chosen]
    there = {arm.topology for arm in own}
    return [
        arm
        for arm in board.arms
        if arm in own or (arm.topology not in ("federated", *there) and not strategy(arm))
    ]


def method(arm: Arm) -> str:
    """An arm's name without its strategy."""
    return arm.label.partition(" + ")[0]


def strategy(arm: Arm) -> str:
    """An arm's strategy, empty for none."""
    return arm.label.partition(" + ")[2]


def arm_styles(board: Board) -> dict[str, Style]:
    """How each arm looks, by label."""
    strategies = list(dict.fromkeys(["", *map(strategy, board.arms)]))
    counts: dict[str, list[str]] = {}
    styles = {}
    for arm in board.arms:
        known = counts.setdefault(arm.topology, [])
        if method(arm) not in known:
            known.append(method(arm))
        style = run_style(arm.topology, known.index(method(arm)))
        dashes = (":", "-.") if arm.topology == "zero-shot" else DASHES  # it has no marker
        dash = dashes[strategies.index(strategy(arm)) % len(dashes)]
        styles[arm.label] = Style(style.colour, style.marker, dash)
    return styles


# -- radar -------------------------------------------------------------------------------------


def draw_radar(ax: Axes, board: Board, condition: str, chosen: str) -> None:
    """One polygon for each arm of a strategy over all settings; farther out is better."""
    arms = shown(board, chosen)
    means = {a.label: _by_setting(a, board, condition) for a in arms}
    means = {label: row for label, row in means.items() if len(row) == len(board.settings)}
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
        radius = [(row[s] - low) / (high - low) for s in board.settings]
        xs = [r * math.cos(a) for r, a in zip(radius, angles, strict=True)]
        ys = [r * math.sin(a) for r, a in zip(radius, angles, strict=True)]
        ax.plot([*xs, xs[0]], [*ys, ys[0]], **line_of(styles[label]) | _SMALL)
    name = f", {chosen} strategy" if chosen else ""
    ax.set_title(f"{board.metric} by setting, {facts.condition_name(condition)}{name}")


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
    ax.set_xlim(-1.55, 1.55)
    ax.set_ylim(-1.3, 1.3)
    for ring in rings[1:]:
        r = (ring - rings[0]) / (rings[-1] - rings[0])
        xs, ys = [r * math.cos(a) for a in angles], [r * math.sin(a) for a in angles]
        ax.plot([*xs, xs[0]], [*ys, ys[0]], color=LINE, linewidth=0.7, zorder=0)
    for setting, a in zip(settings, angles, strict=True):
        x, y = math.cos(a), math.sin(a)
        ax.plot([0, x], [0, y], color=LINE, linewidth=0.7, zorder=0)
        side = "center" if abs(x) < 0.1 else "left" if x > 0 else "right"
        ax.text(1.08 * x, 1.1 * y, setting, ha=side, va="center", fontsize=7.5, color=MUTED)
    middle = (angles[0] + angles[1]) / 2  # between two spokes, where no polygon has a corner
    for ring in rings:
        r = (ring - rings[0]) / (rings[-1] - rings[0]) * math.cos((angles[0] - angles[1]) / 2)
        x, y = r * math.cos(middle), r * math.sin(middle)
        box = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.6, "alpha": 0.8}
        ax.text(x, y, f"{ring:g}", fontsize=6.5, color=INK, ha="center", va="center", bbox=box)


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
    _finish(ax, f"{setting}, {chosen}" if chosen else setting, "round", "")
    ax.set_ylim(*_limits(board, condition))
    whole_numbers(ax)


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
        ax.plot([0, 0.985, 1], [level] * 3, **look, **across)


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
        whole = _over(arm, aligned, condition)
        for name, members in groupby(board.settings, key=lambda s: s.split("-")[0]):
            here = _over(arm, list(members), condition)
            common = [seed for seed in here if seed in whole]
            if name in SCENARIO_STYLES and common:
                values = [here[seed] - whole[seed] for seed in common]
                found.setdefault(arm.label, {})[name] = band(values)
    return found


def _over(arm: Arm, settings: Sequence[str], condition: str) -> dict[int, float]:
    """Mean over settings by seed, for the seeds that all of them have."""
    scores = [arm.scores(setting, condition) for setting in settings]
    seeds = set.intersection(*(set(found) for found in scores)) if scores else set()
    return {seed: mean_and_half([s[seed] for s in scores])[0] for seed in sorted(seeds)}


def draw_drop(ax: Axes, board: Board, condition: str) -> None:
    """A row an arm, a marker a scenario; left of zero is worse than with aligned data."""
    found = drops(board, condition)
    for y, row in enumerate(found.values()):
        for i, (name, (mean, low, high)) in enumerate(row.items()):
            colour, marker = SCENARIO_STYLES[name]
            at = y + 0.2 * (i - (len(row) - 1) / 2)
            ax.errorbar(
                mean,
                at,
                xerr=[[mean - low], [high - mean]],
                fmt=marker,
                color=colour,
                markersize=5,
                elinewidth=1.1,
                label=f" {name}" if y == 0 else None,
            )
    ax.axvline(0, color=INK, linewidth=0.9, zorder=0)
    ax.set_yticks(range(len(found)), list(found))
    ax.invert_yaxis()
    _finish(ax, "Change from aligned data", f"difference in {board.metric}", "", grid="x")
    if found:
        handles, names = ax.get_legend_handles_labels()
        ax.figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=8)


# -- communication -----------------------------------------------------------------------------


def draw_cost(ax: Axes, board: Board, condition: str) -> None:
    """The metric against the bytes that all parties have sent and received so far, mean over
    settings and seeds; what sends nothing is a level line."""
    styles = arm_styles(board)
    for arm in board.arms:
        runs = [run for found in arm.runs.values() for run in found.values()]
        if not runs:
            continue
        points = _mean_by_round([_over_bytes(run, condition) for run in runs])
        scores = [facts.score(run, condition) for run in runs]
        final = {i: score for i, score in enumerate(scores) if score is not None}
        sent = arm.topology == "federated"
        _line_or_level(ax, points if sent else [], {} if sent else final, styles[arm.label])
    _finish(ax, f"{board.metric} against communication", "MB up and down, all parties", "")


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


def _over_bytes(run: Mapping[str, Any], condition: str) -> dict[int, tuple[float, float]]:
    """Round -> (megabytes so far, metric) wherever it was measured."""
    total, at = 0.0, {}
    for line in facts.history(dict(run)):
        total += (line.get("bytes_up") or 0) + (line.get("bytes_down") or 0)
        at[line["round"]] = total / 1e6
    return {number: (at[number], value) for number, value in facts.curve(dict(run), condition)}


def _finish(ax: Axes, title: str, xlabel: str, ylabel: str, *, grid: str = "y") -> None:
    ax.set_title(title)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.grid(visible=True, axis="y" if grid == "y" else "x")
    ax.tick_params(length=0)
