"""Tables and figure of docs/strategies.md from results/strategies, over seeds, paired.

A gain is what a strategy has over the plain algorithm of the same task, setting, method and seed.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fedmllm.bench.grid import Grid, load_grid
from fedmllm.report.figures import RC, svg
from fedmllm.report.statistics import mean_and_half

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


@cache
def strategy_runs() -> dict[Key, BySeed]:
    """Committed results by place in the grid and seed; a shared cell stands in all its places."""
    found: dict[Key, BySeed] = defaultdict(dict)
    for cell in _grid().cells:
        file = FOLDER / cell.name / "result.json"
        if not file.exists():
            continue
        result = json.loads(file.read_text(encoding="utf-8"))
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


def shown(values: Sequence[float], *, sign: bool = True) -> str:
    """Mean and half width; bold where the interval of five seeds or more excludes zero."""
    if not values:
        return "–"
    mean, half = mean_and_half(values)
    text = f"{mean:+.3f}" if sign else f"{mean:.3f}"
    if half is None or math.isnan(half):
        return text
    if sign and not any(values):
        return "0"
    text += f" ± {half:.3f}"
    return f"**{text}**" if sign and len(values) >= 5 and abs(mean) > half else text


def seeds_of(found: Mapping[Key, BySeed], keys: Iterable[Key]) -> str:
    """How many seeds the cells of a row have."""
    counts = sorted({len(found[key]) for key in keys if key in found})
    return "–".join(map(str, dict.fromkeys((counts[0], counts[-1])))) if counts else "0"


def present(found: Mapping[Key, BySeed]) -> list[tuple[str, str]]:
    """(dataset, method) that have results, in the order of the grid."""
    return list(dict.fromkeys((key[0], key[2]) for key in found))


def strategies(found: Mapping[Key, BySeed], dataset: str, method: str) -> list[str]:
    """Strategies with results there, in the order of the grid."""
    order = _grid().axes["strategy"]
    have = {key[3] for key in found if key[0] == dataset and key[2] == method}
    return [name for name in order if name in have]


def plain_table() -> str:
    """What heterogeneity costs: the plain algorithm in each setting, and its gap to aligned."""
    found = strategy_runs()
    lines = [
        "| task | method | setting | seeds | both | image withheld | text withheld | to aligned |"
    ]
    lines.append("|---|---|---|---:|---:|---:|---:|---:|")
    for dataset, method in present(found):
        for setting in SETTINGS:
            runs = found.get((dataset, setting, method, "plain"), {})
            if not runs:
                continue
            cells = [
                shown([s for r in runs.values() if (s := score(r, c)) is not None], sign=False)
                for c in CONDITIONS
            ]
            gap = [-g for g in _to_aligned(found, dataset, setting, method)]
            cells.append("" if setting == ALIGNED else shown(gap))
            row = [dataset, method, setting, str(len(runs)), *cells]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) if len(lines) > 2 else NONE


def gain_table(condition: str = "both") -> str:
    """The gain of each strategy in each setting."""
    found = strategy_runs()
    lines = ["| task | method | strategy | seeds | " + " | ".join(SETTINGS) + " |"]
    lines.append("|---|---|---|---:" + "|---:" * len(SETTINGS) + "|")
    for dataset, method in present(found):
        for strategy in strategies(found, dataset, method)[1:]:
            keys = [(dataset, setting, method, strategy) for setting in SETTINGS]
            cells = [shown(gains(found, key, condition)) for key in keys]
            row = [dataset, method, strategy, seeds_of(found, keys), *cells]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) if len(lines) > 2 else NONE


def recovery_table() -> str:
    """How much of the gap to aligned training a strategy recovers, by setting."""
    found = strategy_runs()
    lines = ["| task | method | strategy | " + " | ".join(SETTINGS[1:]) + " |"]
    lines.append("|---|---|---" + "|---:" * len(SETTINGS[1:]) + "|")
    for dataset, method in present(found):
        for strategy in strategies(found, dataset, method)[1:]:
            cells = [_recovered(found, dataset, s, method, strategy) for s in SETTINGS[1:]]
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


def _recovered(
    found: Mapping[Key, BySeed], dataset: str, setting: str, method: str, strategy: str
) -> str:
    gap = _to_aligned(found, dataset, setting, method)
    gained = gains(found, (dataset, setting, method, strategy))
    if not gap or not gained:
        return "–"
    mean, half = mean_and_half(gap)
    if half is None or mean <= half:
        return "no gap"  # none that five seeds can tell from zero
    gain, spread = mean_and_half(gained)
    sure = spread is not None and abs(gain) > spread and len(gained) >= 5
    text = f"{gain / mean:.0%}"
    return f"**{text}**" if sure else text


def cost_table() -> str:
    """Seconds of training and bytes a run, as ratios to plain of the same seed; means."""
    found = strategy_runs()
    lines = ["| task | method | strategy | training time | bytes up | bytes down |"]
    lines.append("|---|---|---|---:|---:|---:|")
    parts: dict[str, Callable[[Mapping[str, Any]], float]] = {
        "time": lambda r: r["time"]["train_seconds"],
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
                    for seed, result in found.get((dataset, setting, method, strategy), {}).items()
                    if seed in found.get((dataset, setting, method, "plain"), {})
                    and result is not found[dataset, setting, method, "plain"][seed]
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
                runs = found.get((dataset, setting, method, strategy), {})
                if not runs:
                    continue
                cells = [
                    shown(
                        [value for r in runs.values() if (value := part(r)) is not None], sign=False
                    )
                    for part in (
                        _update_cosine,
                        _masked("image_withheld"),
                        _masked("text_withheld"),
                    )
                ]
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
    every = _grid().axes["strategy"]
    for i, strategy in enumerate(names):
        points = []
        for x, setting in enumerate(SETTINGS):
            values = gains(found, (dataset, setting, "fedavg", strategy))
            if values and any(values):
                points.append((x + 0.7 * ((i + 0.5) / len(names) - 0.5), *mean_and_half(values)))
        if points:
            xs, means, halves = zip(*points, strict=True)
            k = every.index(strategy)
            style = {"fmt": "osD^vP*Xd<>h"[k % 12], "color": f"C{k % 10}", "label": strategy}
            spread = [half or 0.0 for half in halves]
            ax.errorbar(xs, means, spread, markersize=4, linewidth=1, capsize=2, **style)
    ax.axhline(0, color="0.4", linewidth=0.8)
    ax.set_xticks(range(len(SETTINGS)), [s.replace("-", "\n") for s in SETTINGS])
    ax.set_title(dataset)
