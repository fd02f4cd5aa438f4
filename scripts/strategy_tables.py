"""Tables and figure of docs/strategies.md and docs/strategies-results.md from the results of
grids, over seeds, paired.

A gain is what a strategy has over the plain algorithm of the same task, setting, method and seed.
Of a scenario (aligned, missing, cross, hybrid) it is the mean over the scenario's settings in the
grid, so that a seed is one observation.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fedmllm.bench.grid import load_grid
from fedmllm.config import config_hash
from fedmllm.evidence import MODALITIES
from fedmllm.report import facts, load_results
from fedmllm.report.figures import RC, svg
from fedmllm.report.loading import config_digest
from fedmllm.report.statistics import ENOUGH, LEVEL, holm, interval, mean_and_half, paired_p

ROOT = Path(__file__).resolve().parent.parent
NONE = "*Not run yet.*"
ALIGNED = "aligned-a0.5"  # of the same label skew as the other scenarios' settings
SCENARIOS = ("aligned", "missing", "cross", "hybrid")
CONDITIONS = ("both", "image_withheld", "text_withheld")
HARDEST = "missing-b0.5"
# in the figure: the three that the paper and its summaries name, all of them, and ours
MAIN = (
    "prompt",
    "regularisation",
    "alignment",
    "paper-alignment",
    "compose",
    "mixtures",
    "evidence",
)

Key = tuple[str, str, str, str]  # dataset, setting, method, strategy
BySeed = dict[int, dict[str, Any]]
Part = Callable[[Mapping[str, Any]], float | None]  # a number of a result


@dataclass(frozen=True)
class Study:
    """A grid's results: names in the order of the grid, and results by place and seed."""

    settings: tuple[str, ...]
    strategies: tuple[str, ...]
    found: Mapping[Key, BySeed]

    def of(self, scenario: str) -> tuple[str, ...]:
        """The settings of a scenario; of the name of a setting, that one."""
        if scenario in self.settings:
            return (scenario,)
        return tuple(name for name in self.settings if name.startswith(f"{scenario}-"))

    def losing(self) -> tuple[str, ...]:
        """Where modalities are missing: the harshest of missing by itself, and each scenario."""
        apart = len(self.of("missing")) > 1 and HARDEST in self.settings
        return (*((HARDEST,) if apart else ()), *SCENARIOS[1:])

    def arms(self) -> list[tuple[str, str]]:
        """(dataset, method) that have results."""
        return list(dict.fromkeys((key[0], key[2]) for key in self.found))

    def source(self, key: Key) -> str:
        """The first strategy whose results stand in this place: where a strategy does what an
        earlier one does, the grid runs one and lets it stand for both."""
        runs = self.found.get(key, {})
        for name in self.strategies:
            others = self.found.get((*key[:3], name), {})
            if runs and any(result is others.get(seed) for seed, result in runs.items()):
                return name
        return key[3]

    def shared(self, dataset: str, scenario: str, method: str, strategy: str) -> str | None:
        """The strategy that this one is in all settings of a scenario that were run, if any."""
        keys = [(dataset, s, method, strategy) for s in self.of(scenario)]
        sources = {self.source(key) for key in keys if key in self.found}
        return next(iter(sources)) if len(sources) == 1 and sources != {strategy} else None

    def ran(self, dataset: str, method: str) -> list[str]:
        """Plain, and the strategies with results that are no other's."""
        have = {
            key[3]
            for key in self.found
            if (key[0], key[2]) == (dataset, method) and self.source(key) == key[3]
        }
        return [name for name in self.strategies if name in have]

    def values(
        self, dataset: str, settings: Sequence[str], method: str, strategy: str, part: Part
    ) -> dict[int, float]:
        """By seed, the mean of `part` over the settings; of seeds that all of them have."""
        runs = [self.found.get((dataset, s, method, strategy), {}) for s in settings]
        if not runs:
            return {}
        seeds = set(runs[0]).intersection(*runs[1:])
        rows = {seed: [part(each[seed]) for each in runs] for seed in sorted(seeds)}
        return {
            seed: statistics.fmean(v for v in row if v is not None)
            for seed, row in rows.items()
            if None not in row
        }


@cache
def load(name: str, folder: str = "") -> Study:
    """The committed results of experiments/grids/NAME.yaml, in results/NAME or `folder` there."""
    grid = load_grid(ROOT / "experiments" / "grids" / f"{name}.yaml")
    found: dict[Key, BySeed] = defaultdict(dict)
    for cell in grid.cells:
        file = ROOT / "results" / (folder or name) / cell.name / "result.json"
        if not file.exists():
            continue
        (result,), _ = load_results([file])
        if config_digest(result["config"]) != config_hash(cell.config):
            raise SystemExit(f"{file}: not the cell's config; run it again")
        for place in cell.places:
            key = (place["dataset"], place["setting"], place["method"], place["strategy"])
            found[key][int(place["seed"])] = result
    return Study(grid.axes["setting"], grid.axes["strategy"], found)


def later(study: Study, first: int) -> Study:
    """The part of a study whose seeds are `first` and above."""
    found = {
        key: {seed: result for seed, result in runs.items() if seed >= first}
        for key, runs in study.found.items()
    }
    return Study(
        study.settings, study.strategies, {key: runs for key, runs in found.items() if runs}
    )


def without(study: Study, dataset: str) -> Study:
    """A study of the other tasks."""
    found = {key: runs for key, runs in study.found.items() if key[0] != dataset}
    return Study(study.settings, study.strategies, found)


def short(study: Study) -> Study:
    """The part of a study that the README shows."""
    names = ("plain", "paper", "paper-alignment", "compose", "mixtures", "evidence")
    found = {key: runs for key, runs in study.found.items() if key[2] == "fedavg"}
    return Study(study.settings, names, found)


# -- numbers -------------------------------------------------------------------------------------


def score(condition: str = "both") -> Part:
    """The task's metric; None where it was not tested."""
    return lambda result: result["metrics"].get(condition, {}).get(result["task"]["metric"])


def minus(a: Mapping[int, float], b: Mapping[int, float]) -> dict[int, float]:
    """Differences of the seeds that both have."""
    return {seed: a[seed] - b[seed] for seed in sorted(a.keys() & b)}


def gains(
    study: Study,
    dataset: str,
    settings: Sequence[str],
    method: str,
    strategy: str,
    condition: str = "both",
) -> dict[int, float]:
    """Of a strategy over plain, by seed."""
    place = (dataset, settings, method)
    part = score(condition)
    return minus(study.values(*place, strategy, part), study.values(*place, "plain", part))


def gaps(study: Study, dataset: str, settings: Sequence[str], method: str) -> dict[int, float]:
    """Plain aligned training minus plain in the settings, by seed."""
    top = study.values(dataset, (ALIGNED,), method, "plain", score())
    return minus(top, study.values(dataset, settings, method, "plain", score()))


def over_tasks(found: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Means over tasks, of the seeds that all of them have."""
    if not found:
        return {}
    seeds = set(found[0]).intersection(*found[1:])
    return {seed: statistics.fmean(each[seed] for each in found) for seed in sorted(seeds)}


def tested(study: Study, dataset: str) -> tuple[str, ...]:
    """The conditions that mean something: an open question has no text to withhold."""
    kinds = {
        result["task"].get("kind")
        for key, runs in study.found.items()
        for result in runs.values()
        if key[0] == dataset
    }
    return CONDITIONS[:2] if "open" in kinds else CONDITIONS


def shown(
    values: Sequence[float], *, sign: bool = True, sure: bool = False, counted: bool = False
) -> str:
    """Mean and, of five seeds or more, half width; bold where it is sure not to be zero; the number
    of seeds if it is not five and `counted`."""
    if not values:
        return "–"
    mean, half = interval(values)
    text = f"{mean:+.3f}" if sign else f"{mean:.3f}"
    if half is not None:
        text += f" ± {half:.3f}"
        text = f"**{text}**" if sure else text
    return f"{text} ({len(values)} seeds)" if counted and len(values) != ENOUGH else text


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


def fieller(over: Sequence[float], under: Sequence[float]) -> tuple[float, float, float] | None:
    """The ratio of two paired means with its 95 % interval, or None where the lower mean is not
    surely above zero. Fieller, J. R. Statist. Soc. B 16 (1954)."""
    from scipy import stats

    n = len(over)
    a, b = statistics.fmean(over), statistics.fmean(under)
    t2 = float(stats.t.ppf(0.975, n - 1)) ** 2 / n
    v_aa, v_bb = statistics.variance(over), statistics.variance(under)
    v_ab = statistics.covariance(over, under)
    c2, c1, c0 = b * b - t2 * v_bb, a * b - t2 * v_ab, a * a - t2 * v_aa
    if b <= 0 or c2 <= 0:
        return None
    root = math.sqrt(max(0.0, c1 * c1 - c2 * c0))
    return a / b, (c1 - root) / c2, (c1 + root) / c2


# -- tables --------------------------------------------------------------------------------------


def markdown(words: Sequence[str], numbers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return NONE
    lines = [[*words, *numbers], *rows]
    texts = ["| " + " | ".join(line) + " |" for line in lines]
    texts.insert(1, "|---" * len(words) + "|---:" * len(numbers) + "|")
    return "\n".join(texts)


def plain_table(study: Study) -> str:
    """What heterogeneity costs: plain training in each setting, and what it lost to aligned."""
    places = [
        (dataset, setting, method)
        for dataset, method in study.arms()
        for setting in study.settings
        if study.found.get((dataset, setting, method, "plain"))
    ]
    lost = {
        (d, s, m): [-gap for gap in gaps(study, d, (s,), m).values()]
        for d, s, m in places
        if not s.startswith("aligned-")
    }
    sure = sure_ones(lost)
    rows = []
    for d, s, m in places:
        cells = [
            shown([*study.values(d, (s,), m, "plain", score(c)).values()], sign=False)
            for c in tested(study, d)
        ]
        cells += ["–"] * (len(CONDITIONS) - len(cells))
        seeds = str(len(study.found[d, s, m, "plain"]))
        last = shown(lost.get((d, s, m), []), sure=(d, s, m) in sure)
        rows.append([d, m, s, seeds, *cells, last])
    heads = ("seeds", "both", "image withheld", "text withheld", "lost")
    return markdown(("task", "method", "setting"), heads, rows)


def scenario_table(study: Study) -> str:
    """Plain training by scenario: the task's metric with both modalities in the test."""
    scenarios = ("aligned", *study.losing())
    lines = []
    for dataset, method in study.arms():
        cells = []
        for scenario in scenarios:
            found = study.values(dataset, _compared(study, scenario), method, "plain", score())
            cells.append(shown([*found.values()], sign=False, counted=True))
        if set(cells) != {"–"}:
            lines.append([dataset, method, *cells])
    return markdown(("task", "method"), scenarios, lines)


def _compared(study: Study, scenario: str) -> tuple[str, ...]:
    """The settings of a scenario; of aligned that of the others' label skew."""
    return (ALIGNED,) if scenario == "aligned" else study.of(scenario)


def gap_table(study: Study) -> str:
    """How the gap to aligned training, summed over tasks, is made up: each task's gap and its part
    of the sum. A gap that is negative makes the others' parts larger than the whole."""
    lines = []
    for method in dict.fromkeys(method for _, method in study.arms()):
        tasks = [task for task, other in study.arms() if other == method]
        if len(tasks) < 2:
            continue
        lost = {
            (t, c): [*gaps(study, t, study.of(c), method).values()]
            for t in tasks
            for c in study.losing()
        }
        for t in tasks:
            cells = []
            for c in study.losing():
                whole = [statistics.fmean(lost[other, c]) for other in tasks if lost[other, c]]
                if not lost[t, c] or len(whole) < len(tasks):
                    cells.append("–")
                    continue
                part = statistics.fmean(lost[t, c]) / sum(whole)
                cells.append(f"{shown(lost[t, c], counted=True)}, {part:.0%}")
            lines.append([method, t, *cells])
    return markdown(("method", "task"), study.losing(), lines)


def gain_table(study: Study, condition: str = "both") -> str:
    """The gain of each strategy in each scenario, with the number of seeds if it is not five."""
    rows = [
        (dataset, method, strategy)
        for dataset, method in study.arms()
        if condition in tested(study, dataset)
        for strategy in study.ran(dataset, method)[1:]
    ]
    gained = {
        (d, c, m, s): [*gains(study, d, study.of(c), m, s, condition).values()]
        for d, m, s in rows
        for c in SCENARIOS
        if not study.shared(d, c, m, s)
    }
    sure = sure_ones(gained)
    lines = []
    for d, m, s in rows:
        cells = []
        for c in SCENARIOS:
            key, same = (d, c, m, s), study.shared(d, c, m, s)
            cell = shown(gained.get(key, []), sure=key in sure, counted=True)
            cells.append(f"= {same}" if same else cell)
        lines.append([d, m, s, *cells])
    return markdown(("task", "method", "strategy"), SCENARIOS, lines)


def recovery_table(study: Study) -> str:
    """How much of the gap to aligned training a strategy recovers: the mean gain over the mean
    gap."""
    lines = []
    for dataset, method in study.arms():
        for strategy in study.ran(dataset, method)[1:]:
            cells = [_recovered(study, dataset, c, method, strategy) for c in study.losing()]
            lines.append([dataset, method, strategy, *cells])
    return markdown(("task", "method", "strategy"), study.losing(), lines)


def best_table(study: Study) -> str:
    """Over all tasks: the gain in aligned training, of the mean and of the task that gains least,
    and the share of the gap that is recovered elsewhere. On a task that a strategy cannot serve it
    counts with what the grid lets stand for it there; without results of all tasks it does not
    count."""
    lines = []
    tasks = list(dict.fromkeys(dataset for dataset, _ in study.arms()))
    for method in dict.fromkeys(method for _, method in study.arms()):
        for strategy in study.strategies[1:]:
            if len(tasks) < 2 or not any(strategy in study.ran(task, method) for task in tasks):
                continue
            alone = {t: gains(study, t, study.of("aligned"), method, strategy) for t in tasks}
            if not over_tasks([*alone.values()]):
                continue
            cells = [shown([*over_tasks([*alone.values()]).values()], counted=True)]
            least = min(alone, key=lambda t: statistics.fmean(alone[t].values()))
            cells += [f"{shown([*alone[least].values()])} ({least})"]
            shares = [_recovered_over(study, tasks, c, method, strategy) for c in study.losing()]
            if set(shares) != {"–"}:  # else it stands in aligned training alone, by another's runs
                lines.append([method, strategy, *cells, *shares])
    return markdown(("method", "strategy"), ("aligned", "least", *study.losing()), lines)


def _recovered_over(
    study: Study, tasks: Sequence[str], scenario: str, method: str, strategy: str
) -> str:
    gain = over_tasks([gains(study, t, study.of(scenario), method, strategy) for t in tasks])
    gap = over_tasks([gaps(study, t, study.of(scenario), method) for t in tasks])
    return _ratio(gain, gap)


def _recovered(study: Study, dataset: str, scenario: str, method: str, strategy: str) -> str:
    """Mean gain over mean gap, of the seeds that all have, where the gap is no noise."""
    same = study.shared(dataset, scenario, method, strategy)
    if same:
        return f"= {same}"
    settings = study.of(scenario)
    gain = gains(study, dataset, settings, method, strategy)
    return _ratio(gain, gaps(study, dataset, settings, method))


def _ratio(gain: Mapping[int, float], gap: Mapping[int, float]) -> str:
    seeds = sorted(gain.keys() & gap)
    if len(seeds) < ENOUGH:
        return "–"
    found = fieller([gain[s] for s in seeds], [gap[s] for s in seeds])
    if found is None:
        return "no gap"  # none that these seeds can tell from zero
    mean, low, high = found
    text = f"{mean:.0%} ({low:.0%} to {high:.0%})"
    return text if len(seeds) == ENOUGH else f"{text}, {len(seeds)} seeds"


def cost_table(study: Study) -> str:
    """Seconds a round (the median of the last third), seconds of a run's tests, and bytes a run, as
    ratios to plain of the same setting and seed; means."""
    parts: tuple[Callable[[Mapping[str, Any]], float], ...] = (
        # the first rounds read the pictures, and a process keeps them for its next run
        lambda r: statistics.median(
            line["seconds"] for line in r["history"][-max(1, len(r["history"]) // 3) :]
        ),
        lambda r: r["time"]["evaluate_seconds"],
        lambda r: r["bytes"]["up"],
        lambda r: r["bytes"]["down"],
    )
    lines = []
    for dataset, method in study.arms():
        for strategy in study.ran(dataset, method)[1:]:
            cells = []
            for part in parts:
                ratios = [
                    part(result) / part(plain[seed])
                    for setting in study.settings
                    if study.source((dataset, setting, method, strategy)) == strategy
                    for plain in [study.found.get((dataset, setting, method, "plain"), {})]
                    for seed, result in study.found.get(
                        (dataset, setting, method, strategy), {}
                    ).items()
                    if seed in plain
                ]
                cells.append(f"{sum(ratios) / len(ratios):.2f}" if ratios else "–")
            lines.append([dataset, method, strategy, *cells])
    heads = ("time a round", "time of tests", "bytes up", "bytes down")
    return markdown(("task", "method", "strategy"), heads, lines)


def drift_table(study: Study) -> str:
    """How far clients drift apart and how alike the modalities are: cosine between updates of
    clients, their dispersion, the cosine between their class prototypes (means over rounds), and
    that of masked to whole representations; means over settings."""
    heads = ("updates", "dispersion", "prototypes", "no image", "no text")
    lines = []
    for dataset, method in study.arms():
        parts = [*map(_drift, facts.DRIFT.values())]
        parts += [_drift(facts.nearness(c, "cosine")) for c in tested(study, dataset)[1:]]
        for scenario in SCENARIOS:
            for strategy in study.ran(dataset, method):
                place = (dataset, study.of(scenario), method, strategy)
                if study.shared(dataset, scenario, method, strategy):
                    continue
                found = [[*study.values(*place, part).values()] for part in parts]
                cells = [shown(values, sign=False) for values in found]
                cells += ["–"] * (len(heads) - len(cells))
                if set(cells) != {"–"}:
                    seeds = str(max(map(len, found)))
                    lines.append([dataset, method, scenario, strategy, seeds, *cells])
    return markdown(("task", "method", "scenario", "strategy"), ("seeds", *heads), lines)


def swapped_table(study: Study, control: Study) -> str:
    """AUC on memes (of `study`, but for zero-shot), on memes with exchanged labels (`control`), and
    the mean of both by seed, in the settings of the control."""
    methods = dict.fromkeys(key[2] for key in control.found if key[0] == "memes-swapped")
    lines = []
    for method in methods:
        for strategy in control.strategies:
            for setting in control.settings:
                place = ((setting,), method, strategy, score())
                swapped = control.values("memes-swapped", *place)
                plain = control.values("memes", *place) or study.values("memes", *place)
                both = over_tasks([plain, swapped])
                if both and not control.shared("memes-swapped", setting, method, strategy):
                    cells = [
                        shown([each[seed] for seed in both], sign=False)
                        for each in (plain, swapped, both)
                    ]
                    lines.append([method, strategy, setting, str(len(both)), *cells])
    heads = ("seeds", "memes", "labels exchanged", "mean of both")
    return markdown(("method", "strategy", "setting"), heads, lines)


def evidence_table(study: Study) -> str:
    """What the parties found of each modality (`evidence` of results): standard errors above
    chance, the lowest to the highest of the seeds, and in how many it was filled in."""
    lines = []
    for dataset, method in study.arms():
        for setting in study.settings:
            runs = study.found.get((dataset, setting, method, "evidence"), {})
            found = [run["evidence"] for run in runs.values() if "evidence" in run]
            if not found:
                continue
            cells = []
            for name in MODALITIES:
                scores = sorted(each["scores"][name] for each in found)
                filled = sum(name in each["filled"] for each in found)
                cells += [f"{scores[0]:.1f} to {scores[-1]:.1f}", f"{filled} of {len(found)}"]
            lines.append([dataset, method, setting, *cells])
    heads = ("image", "filled in", "text", "filled in")
    return markdown(("task", "method", "setting"), heads, lines)


def _drift(name: str) -> Part:
    return lambda result: facts.drift(result).get(name)


# -- the figure ----------------------------------------------------------------------------------


def gain_svg(study: Study) -> str | None:
    """Gains of the main strategies with their intervals (FedAvg), a colour and shape a strategy, a
    panel a task and what of a sample the test has; without panels where all gains are zero."""
    import matplotlib

    panels = []
    for dataset in dict.fromkeys(task for task, method in study.arms() if method == "fedavg"):
        for condition in tested(study, dataset):
            points = _points(study, dataset, condition)
            if any(abs(point[1]) >= 0.0005 for each in points.values() for point in each):
                panels.append((dataset, condition, points))
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(RC):
        size = (3.4 * columns + 1.2, 3.0 * rows + 0.6)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for ax, (dataset, condition, points) in zip(axes, panels, strict=False):
            _draw_gains(ax, study, points)
            ax.set_title(f"{dataset}: {condition.replace('_', ' ')}")
        for ax in axes[len(panels) :]:
            ax.set_axis_off()
        for ax in axes[::columns]:
            ax.set_ylabel("gain over plain FedAvg")
        handles = {h.get_label(): h for ax in axes for h in ax.get_legend_handles_labels()[0]}
        order = [handles[name] for name in study.strategies if name in handles]
        figure.legend(handles=order, loc="outside lower center", ncols=4)
        return svg(figure)


def _points(
    study: Study, dataset: str, condition: str
) -> dict[str, list[tuple[int, float, float | None]]]:
    """By main strategy: scenario's index, mean gain, half of its interval; of what is a strategy's
    own there."""
    found = {}
    for strategy in [name for name in study.ran(dataset, "fedavg") if name in MAIN]:
        points = []
        for x, scenario in enumerate(SCENARIOS):
            if study.shared(dataset, scenario, "fedavg", strategy):
                continue
            settings = study.of(scenario)
            values = [*gains(study, dataset, settings, "fedavg", strategy, condition).values()]
            if values:
                points.append((x, *mean_and_half(values)))
        if points:
            found[strategy] = points
    return found


def _draw_gains(ax: Any, study: Study, found: Mapping[str, Any]) -> None:
    shown_ones = [name for name in study.strategies if name in MAIN]
    for i, (strategy, points) in enumerate(found.items()):
        xs, means, halves = zip(*points, strict=True)
        places = [x + 0.7 * ((i + 0.5) / len(found) - 0.5) for x in xs]
        k = shown_ones.index(strategy)
        style = {"fmt": "osD^vP*Xd<>x"[k % 12], "color": f"C{k % 10}", "label": strategy}
        spread = [half or 0.0 for half in halves]
        ax.errorbar(places, means, spread, markersize=4, linewidth=1, capsize=2, **style)
    ax.axhline(0, color="0.4", linewidth=0.8)
    ax.set_xlim(-0.5, len(SCENARIOS) - 0.5)
    ax.set_xticks(range(len(SCENARIOS)), SCENARIOS)
