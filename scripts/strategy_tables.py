"""Tables and figure of docs/strategies.md from results/strategies, over seeds, paired.

A gain is what a strategy has over the plain algorithm of the same task, setting, method and seed.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fedmllm.bench.grid import Grid, load_grid
from fedmllm.config import config_hash
from fedmllm.report.figures import RC, svg
from fedmllm.report.loading import config_digest
from fedmllm.report.statistics import ENOUGH, LEVEL, holm, mean_and_half, paired_p

ROOT = Path(__file__).resolve().parent.parent
GRID = ROOT / "experiments" / "grids" / "strategies.yaml"
FOLDER = ROOT / "results" / "strategies"
NONE = "*Not run yet.*"
ALIGNED = "aligned-a0.5"
SETTINGS = (ALIGNED, "missing-b0.5", "cross-i5t5", "hybrid-p0.7")
CONDITIONS = ("both", "image_withheld", "text_withheld")

Key = tuple[str, str, str, str]  # dataset, setting, method, strategy
BySeed = dict[int, dict[str, Any]]


@cache
def _grid() -> Grid:
    return load_grid(GRID)


def _order() -> tuple[str, ...]:
    return _grid().axes["strategy"]


@cache
def strategy_runs() -> dict[Key, BySeed]:
    """Committed results by place in the grid and seed; a shared cell stands in all its places."""
    found: dict[Key, BySeed] = defaultdict(dict)
    for cell in _grid().cells:
        file = FOLDER / cell.name / "result.json"
        if not file.exists():
            continue
        result = json.loads(file.read_text(encoding="utf-8"))
        if config_digest(result["config"]) != config_hash(cell.config):
            raise SystemExit(f"{file}: not the cell's config; run it again")
        for place in cell.places:
            key = (place["dataset"], place["setting"], place["method"], place["strategy"])
            found[key][int(place["seed"])] = result
    return found


def score(result: Mapping[str, Any], condition: str = "both") -> float | None:
    """The task's metric; None where it was not tested."""
    return result["metrics"].get(condition, {}).get(result["task"]["metric"])


def gains(found: Mapping[Key, BySeed], key: Key, condition: str = "both") -> list[float]:
    """Of a strategy over plain, by seed; only of seeds that both have."""
    plain = found.get((*key[:3], "plain"), {})
    pairs = [
        (score(found[key][seed], condition), score(plain[seed], condition))
        for seed in sorted(found.get(key, {}).keys() & plain)
    ]
    return [a - b for a, b in pairs if a is not None and b is not None]


def shown(values: Sequence[float], *, sign: bool = True, sure: bool = False) -> str:
    """Mean and half width; bold where it is sure not to be zero."""
    if not values:
        return "–"
    mean, half = mean_and_half(values)
    text = f"{mean:+.3f}" if sign else f"{mean:.3f}"
    if half is None:
        return text
    text += f" ± {half:.3f}"
    return f"**{text}**" if sure else text


def sure_ones(rows: Mapping[Any, Sequence[float]]) -> set[Any]:
    """Which of a table's means differ from zero: paired t-test of five seeds or more, p adjusted
    for their number (Holm)."""
    p = {
        key: found
        for key, values in rows.items()
        if (found := paired_p(dict(enumerate(values)), dict.fromkeys(range(len(values)), 0.0)))
        is not None
    }
    adjusted = holm(list(p.values()))
    return {key for key, each in zip(p, adjusted, strict=True) if each < LEVEL}


def present(found: Mapping[Key, BySeed]) -> list[tuple[str, str]]:
    """(dataset, method) that have results, in the order of the grid."""
    return list(dict.fromkeys((key[0], key[2]) for key in found))


def strategies(found: Mapping[Key, BySeed], dataset: str, method: str) -> list[str]:
    """Plain, and strategies with results of their own there, in the order of the grid."""
    keys = [key for key in found if key[0] == dataset and key[2] == method]
    have = {key[3] for key in keys if key[3] == "plain" or own(found, key)}
    return [name for name in _order() if name in have]


def own(found: Mapping[Key, BySeed], key: Key) -> dict[int, dict[str, Any]]:
    """A strategy's results that are no other's: where a strategy does what an earlier one of the
    grid does, the grid runs one and lets it stand for both."""
    runs = found.get(key, {})
    return runs if source(found, key) == key[3] else {}


def source(found: Mapping[Key, BySeed], key: Key) -> str:
    """The first strategy of the grid whose results stand in this place."""
    runs = found.get(key, {})
    for name in _order():
        others = found.get((*key[:3], name), {})
        if runs and any(result is others.get(seed) for seed, result in runs.items()):
            return name
    return key[3]


def plain_table() -> str:
    """What heterogeneity costs: the plain algorithm in each setting, and its gap to aligned."""
    found = strategy_runs()
    lines = ["| task | method | setting | seeds | both | image withheld | text withheld | lost |"]
    lines.append("|---|---|---|---:|---:|---:|---:|---:|")
    places = [(d, s, m) for d, m in present(found) for s in SETTINGS]
    lost = {
        place: [-gap for gap in _to_aligned(found, *place)]
        for place in places
        if place[1] != ALIGNED
    }
    sure = sure_ones(lost)
    for dataset, setting, method in places:
        runs = found.get((dataset, setting, method, "plain"), {})
        if not runs:
            continue
        cells = [
            shown([s for r in runs.values() if (s := score(r, c)) is not None], sign=False)
            for c in tested(runs)
        ]
        place = (dataset, setting, method)
        cells += ["–"] * (len(CONDITIONS) - len(cells))
        cells.append(shown(lost.get(place, []), sure=place in sure))
        row = [dataset, method, setting, str(len(runs)), *cells]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) if len(lines) > 2 else NONE


def tested(runs: Mapping[int, Mapping[str, Any]]) -> tuple[str, ...]:
    """The conditions that mean something: an open question has no text to withhold."""
    kinds = {result["task"].get("kind") for result in runs.values()}
    return CONDITIONS[:2] if "open" in kinds else CONDITIONS


def gain_table(condition: str = "both") -> str:
    """The gain of each strategy in each setting, with the number of seeds behind it if not five."""
    found = strategy_runs()
    lines = ["| task | method | strategy | " + " | ".join(SETTINGS) + " |"]
    lines.append("|---|---|---" + "|---:" * len(SETTINGS) + "|")
    keys = [
        (dataset, setting, method, strategy)
        for dataset, method in present(found)
        for strategy in strategies(found, dataset, method)[1:]
        for setting in SETTINGS
        if condition in tested(found.get((dataset, setting, method, "plain"), {}))
    ]
    gained = {key: gains(found, key, condition) for key in keys if own(found, key)}
    sure = sure_ones(gained)
    for dataset, _, method, strategy in dict.fromkeys((k[0], "", k[2], k[3]) for k in keys):
        row = []
        for setting in SETTINGS:
            key = (dataset, setting, method, strategy)
            first = source(found, key)
            text = shown(gained.get(key, []), sure=key in sure)
            count = len(gained.get(key, []))
            text += f" ({count} seeds)" if 0 < count != ENOUGH else ""
            row.append(f"= {first}" if first != strategy else text)
        lines.append("| " + " | ".join([dataset, method, strategy, *row]) + " |")
    return "\n".join(lines) if len(lines) > 2 else NONE


def recovery_table() -> str:
    """How much of the gap to aligned training a strategy recovers, by setting."""
    found = strategy_runs()
    lines = ["| task | method | strategy | " + " | ".join(SETTINGS[1:]) + " |"]
    lines.append("|---|---|---" + "|---:" * len(SETTINGS[1:]) + "|")
    for dataset, method in present(found):
        for strategy in strategies(found, dataset, method)[1:]:
            cells = [_recovered(found, (dataset, s, method, strategy)) for s in SETTINGS[1:]]
            lines.append("| " + " | ".join([dataset, method, strategy, *cells]) + " |")
    return "\n".join(lines) if len(lines) > 2 else NONE


def _to_aligned(
    found: Mapping[Key, BySeed], dataset: str, setting: str, method: str
) -> list[float]:
    """Plain aligned minus plain in the setting, by seed."""
    top = found.get((dataset, ALIGNED, method, "plain"), {})
    low = found.get((dataset, setting, method, "plain"), {})
    pairs = [(score(top[s]), score(low[s])) for s in sorted(top.keys() & low)]
    return [a - b for a, b in pairs if a is not None and b is not None]


def _recovered(found: Mapping[Key, BySeed], key: Key) -> str:
    """Mean gain over mean gap, of the seeds that all three have, with the 95 % interval of the
    ratio by Fieller's method, where the gap is no noise."""
    top = found.get((key[0], ALIGNED, key[2], "plain"), {})
    low = found.get((*key[:3], "plain"), {})
    runs = found.get(key, {})
    seeds = sorted(top.keys() & low.keys() & runs.keys())
    if source(found, key) != key[3]:
        return f"= {source(found, key)}"
    if len(seeds) < ENOUGH:
        return "–"
    scores = [(score(top[s]), score(low[s]), score(runs[s])) for s in seeds]
    gap = [a - b for a, b, _ in scores]  # type: ignore[operator]
    gain = [c - b for _, b, c in scores]  # type: ignore[operator]
    found_interval = fieller(gain, gap)
    if found_interval is None:
        return "no gap"  # none that these seeds can tell from zero
    mean, low_end, high_end = found_interval
    return f"{mean:.0%} ({low_end:.0%} to {high_end:.0%})"


def fieller(over: Sequence[float], under: Sequence[float]) -> tuple[float, float, float] | None:
    """The ratio of two paired means with its 95 % interval, or None where the lower mean's own
    interval holds zero. Fieller, J. R. Statist. Soc. B 16 (1954)."""
    from scipy import stats

    n = len(over)
    a, b = statistics.fmean(over), statistics.fmean(under)
    t2 = float(stats.t.ppf(0.975, n - 1)) ** 2 / n
    v_aa, v_bb = statistics.variance(over), statistics.variance(under)
    v_ab = statistics.covariance(over, under)
    c2, c1, c0 = b * b - t2 * v_bb, a * b - t2 * v_ab, a * a - t2 * v_aa
    if c2 <= 0:
        return None
    root = math.sqrt(max(0.0, c1 * c1 - c2 * c0))
    return a / b, (c1 - root) / c2, (c1 + root) / c2


def cost_table() -> str:
    """Seconds a round (the median of the last third) and bytes a run, as ratios to plain of the
    same seed; means."""
    found = strategy_runs()
    lines = ["| task | method | strategy | time a round | bytes up | bytes down |"]
    lines.append("|---|---|---|---:|---:|---:|")
    parts: dict[str, Callable[[Mapping[str, Any]], float]] = {
        # the first rounds read the pictures, and a process keeps them for its next run
        "time": lambda r: statistics.median(
            line["seconds"] for line in r["history"][-max(1, len(r["history"]) // 3) :]
        ),
        "up": lambda r: r["bytes"]["up"],
        "down": lambda r: r["bytes"]["down"],
    }
    for dataset, method in present(found):
        for strategy in strategies(found, dataset, method)[1:]:
            cells = []
            for part in parts.values():
                ratios = [
                    part(result) / part(found[dataset, setting, method, "plain"][seed])
                    for setting in SETTINGS
                    for seed, result in own(found, (dataset, setting, method, strategy)).items()
                    if seed in found.get((dataset, setting, method, "plain"), {})
                ]
                cells.append(f"{sum(ratios) / len(ratios):.2f}" if ratios else "–")
            lines.append("| " + " | ".join([dataset, method, strategy, *cells]) + " |")
    return "\n".join(lines) if len(lines) > 2 else NONE


def drift_table() -> str:
    """Mean cosine between clients' updates, and of masked to whole representations."""
    found = strategy_runs()
    lines = ["| task | method | setting | strategy | updates | no image | no text |"]
    lines.append("|---|---|---|---|---:|---:|---:|")
    for dataset, method in present(found):
        for setting in SETTINGS:
            for strategy in strategies(found, dataset, method):
                key = (dataset, setting, method, strategy)
                runs = found.get(key, {}) if strategy == "plain" else own(found, key)
                if not runs:
                    continue
                parts = [_update_cosine, *map(_masked, tested(runs)[1:])]
                cells = [
                    shown([v for r in runs.values() if (v := part(r)) is not None], sign=False)
                    for part in parts
                ]
                cells += ["–"] * (3 - len(cells))
                lines.append("| " + " | ".join([dataset, method, setting, strategy, *cells]) + " |")
    return "\n".join(lines) if len(lines) > 2 else NONE


def _update_cosine(result: Mapping[str, Any]) -> float | None:
    rows = [line.get("measured", {}).get("drift_cosine") for line in result["history"]]
    known = [value for value in rows if value is not None]
    return sum(known) / len(known) if known else None


def _masked(condition: str) -> Callable[[Mapping[str, Any]], float | None]:
    def part(result: Mapping[str, Any]) -> float | None:
        return result.get("modality_alignment", {}).get(condition, {}).get("cosine")

    return part


def gain_svg() -> str | None:
    """Gains with their intervals, a panel a task (FedAvg), a colour and shape a strategy."""
    import matplotlib

    found = strategy_runs()
    tasks = [dataset for dataset, method in present(found) if method == "fedavg"]
    if not tasks:
        return None
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(3.4 * len(tasks) + 1.2, 3.6), layout="constrained")
        axes = figure.subplots(1, len(tasks), squeeze=False, sharey=False)[0]
        for ax, dataset in zip(axes, tasks, strict=True):
            _draw_gains(ax, found, dataset)
        axes[0].set_ylabel("gain over plain FedAvg")
        handles = {h.get_label(): h for ax in axes for h in ax.get_legend_handles_labels()[0]}
        figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=4)
        return svg(figure)


def _draw_gains(ax: Any, found: Mapping[Key, BySeed], dataset: str) -> None:
    names = strategies(found, dataset, "fedavg")[1:]
    every = _order()
    for i, strategy in enumerate(names):
        points = []
        for x, setting in enumerate(SETTINGS):
            key = (dataset, setting, "fedavg", strategy)
            values = gains(found, key) if own(found, key) else []
            if values:
                points.append((x + 0.7 * ((i + 0.5) / len(names) - 0.5), *mean_and_half(values)))
        if points:
            xs, means, halves = zip(*points, strict=True)
            k = every.index(strategy)
            style = {"fmt": "osD^vP*Xd<>h"[k % 12], "color": f"C{k % 10}", "label": strategy}
            spread = [half or 0.0 for half in halves]
            ax.errorbar(xs, means, spread, markersize=4, linewidth=1, capsize=2, **style)
    ax.axhline(0, color="0.4", linewidth=0.8)
    ax.set_xlim(-0.5, len(SETTINGS) - 0.5)
    ax.set_xticks(range(len(SETTINGS)), [s.replace("-", "\n") for s in SETTINGS])
    ax.set_title(dataset)
