"""Many runs as a grid: arms (what was done) × settings (who held what) × seeds.

Read from the results alone. An *arm* is all of a config but its data, model, setting and seed, by
one state of the code and its packages; it is named after its method and strategy. A *board* holds
the runs that may be compared: one task, one model, one size of data, by their digests and not by
where they lay.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmllm.report import facts
from fedmllm.report.loading import LATER, NO_NUMBERS, PACKAGES, PLACES, Result
from fedmllm.scenarios import SETTINGS

METHODS = {"zero-shot": "Zero-shot", "local": "Local", "centralised": "Centralised"}
STRATEGIES = {"plain": "", "agnostic": "prompt"}
# the keys of a config's strategy that switch a part of it on
PARTS = {
    "mu": "regularisation",
    "aggregation": "profiles",
    "sampling": "profiles",
    "prototypes": "prototypes",
    "distillation": "distillation",
    "views": "views",
    "incomplete": "whole samples",
    "recombine": "recombination",
    "resample": "resampling",
    "mixtures": "mixtures",
    "evidence": "evidence",
    "fusion": "fusion",
}
# Keys that say where a run stands and not what was done, and evaluation, which changes nothing but
# for what is held out of training (`_held_out`).
_PLACE = (*NO_NUMBERS[""], "seed", "scenario", "data", "model", "evaluation")


@dataclass(frozen=True)
class Arm:
    """One way to train. runs: setting -> seed -> result. A run that does not depend on the
    setting (`stands_for`) is under each of them, and so is a copy of another arm's run that a grid
    says has the numbers of this place (`is_shared`)."""

    label: str
    topology: str
    runs: Mapping[str, Mapping[int, Result]]

    def own(self, setting: str) -> dict[int, Result]:
        """Its runs in a setting, without those of other arms: what was spent and measured here."""
        return {s: run for s, run in self.runs.get(setting, {}).items() if not is_shared(run)}

    def scores(self, setting: str, condition: str, judge: str = "") -> dict[int, float]:
        """The headline metric by seed, or the accuracy that a judge (`facts.judge_of`) gives."""
        runs = self.runs.get(setting, {})
        if judge:
            found = {
                seed: facts.judged(run, condition).get("accuracy")
                for seed, run in runs.items()
                if facts.judge_of(run) == judge
            }
        else:
            found = {seed: facts.score(run, condition) for seed, run in runs.items()}
        return {seed: value for seed, value in found.items() if value is not None}


@dataclass(frozen=True)
class Board:
    """Runs that may be compared. settings: in the protocol's order, then others by name."""

    label: str
    metric: str
    settings: tuple[str, ...]
    arms: tuple[Arm, ...]
    results: tuple[Result, ...]


def boards(results: Sequence[Result]) -> tuple[list[Board], list[str]]:
    """The boards in order of appearance, and a line for each run that was left out: the same arm,
    setting and seed again, which would else count twice."""
    by_key: dict[str, list[Result]] = {}
    for result in results:
        by_key.setdefault(_board_key(result), []).append(result)
    for result in (stand_in for one in results for stand_in in _stand_ins(one)):
        if there := by_key.get(_board_key(result)):
            there.append(result)
    groups = [part for group in by_key.values() for part in _apart(group, _materials)]
    groups = [group for group in groups if not all(map(is_shared, group))]
    problems: list[str] = []
    names = _distinct(
        [_task_name(group[0]) for group in groups],
        [_board_facts(group[0]) | _materials(group[0]) for group in groups],
    )
    made = [_board(name, group, problems) for name, group in zip(names, groups, strict=True)]
    return made, problems


def is_grid(results: Sequence[Result]) -> bool:
    """Whether the runs are a grid, to be read as means and not one by one: some arm was run with
    several seeds, or in more than three settings."""
    for board in boards(results)[0]:
        for arm in board.arms:
            settings = [seeds for seeds in arm.runs.values() if seeds]
            trained = arm.topology == "federated"
            if trained and (len(settings) > 3 or any(len(seeds) > 1 for seeds in settings)):
                return True
    return False


def method_of(result: Result) -> str:
    """``Local``, ``FedAvg``, …"""
    kind = facts.topology(result)
    return METHODS.get(kind) or facts.method(result)


def strategy_of(result: Result) -> str:
    """``prompt + prototypes`` for the modality-agnostic prompt and class prototypes; empty for
    none."""
    style = str(facts.lookup(result, "config", "prompt") or "plain")
    names = [STRATEGIES.get(style, style)]
    given = facts.lookup(result, "config", "strategy") or {}
    off = LATER["strategy"]
    names += [name for key, name in PARTS.items() if given.get(key, off[key]) != off[key]]
    return " + ".join(dict.fromkeys(name for name in names if name))


def setting_of(result: Result) -> str:
    """The protocol's name of the setting, or the scenario in words where it is none of them."""
    scenario = dict(facts.lookup(result, "config", "scenario") or {"name": "aligned"})
    alpha = facts.lookup(result, "config", "partition", "alpha")
    name = scenario.pop("name", "aligned")
    for setting, found in SETTINGS.items():
        if (name, scenario, alpha) == (found.scenario, dict(found.options), found.alpha):
            return setting
    words = facts.named({"name": name, **scenario})
    return words if alpha is None else f"{words}, alpha {alpha:g}"


def is_shared(run: Result) -> bool:
    """Whether it stands for an arm that it was not run for."""
    return bool(run.get("_shared"))


def stands_for(result: Result, setting: str) -> bool:
    """Whether a run's result is that of another setting too.

    An untrained model is the same in all of them. Aligned settings differ in who holds the
    samples, which is nothing where they are split evenly, or pooled with nothing held out: each
    party draws what it holds out.
    """
    own = setting_of(result)
    if own == setting or facts.topology(result) == "zero-shot":
        return True
    even = facts.lookup(result, "config", "partition", "name") == "even"
    aligned = own.startswith("aligned") and setting.startswith("aligned")
    pooled = facts.topology(result) == "centralised" and not _held_out(result)
    return aligned and (even or pooled)


# -- grouping ----------------------------------------------------------------------------------


def _stand_ins(result: Result) -> list[Result]:
    """A run under the configs that it stands for."""
    return [
        {**result, "config": config, "seed": config.get("seed"), "_shared": True}
        for config in result.get("_stands_for") or []
    ]


def _board_facts(result: Result) -> dict[str, str]:
    """What runs of one board have in common, besides the task and what `_materials` says."""
    config = result["config"]
    keep = {key: dict(config.get(key) or {}) for key in ("data", "model")}
    keep["partition"] = {"clients": facts.lookup(result, "config", "partition", "clients")}
    for place in (*PLACES, *(f"model.{key}" for key in NO_NUMBERS["model"])):
        section, _, key = place.partition(".")
        keep[section].pop(key, None)
    return _without_nothing(facts.flatten(keep))


def _materials(result: Result) -> dict[str, str]:
    """What the base model and the data were: by their digests, else by where they lay."""
    found = {}
    for place, digest in PLACES.items():
        section, _, key = place.partition(".")
        stated, lay = result.get(digest), facts.lookup(result, "config", section, key)
        found[digest.removesuffix("_sha256")] = str(stated)[:8] if stated else lay
    return {key: str(value) for key, value in found.items() if value}


def _code(result: Result) -> dict[str, str]:
    """What made a run's numbers beside its config: revisions of the code's parts, packages by their
    first two numbers, and the number format where it was left to the device."""
    revisions = (result.get("revisions") or {}).items()
    found = {f"revision of {part}": str(number) for part, number in revisions}
    versions = result.get("versions") or {}
    found |= {p: ".".join(str(versions[p]).split(".")[:2]) for p in PACKAGES if versions.get(p)}
    dtype = facts.lookup(result, "hardware", "dtype")
    return found | ({"dtype": str(dtype)} if dtype else {})


def _apart(
    group: Sequence[Result], known: Callable[[Result], Mapping[str, str]]
) -> list[list[Result]]:
    """Runs that state different values of something are not averaged together. One that does not
    state it (an older one) goes with the others where these agree, else it stands apart."""
    stated = [known(result) for result in group]
    keys = dict.fromkeys(key for facts_ in stated for key in facts_)
    differ = [key for key in keys if len({f[key] for f in stated if key in f}) > 1]
    parts: dict[tuple[str, ...], list[Result]] = {}
    for result, facts_ in zip(group, stated, strict=True):
        parts.setdefault(tuple(facts_.get(key, "") for key in differ), []).append(result)
    return list(parts.values())


def _without_nothing(flat: Mapping[str, str]) -> dict[str, str]:
    """Keys that say something: one that came later and is off reads as one that is absent."""
    nothing = ("null", "none", "false", '""', "")
    sections = {key: value for key, value in LATER.items() if key}
    later = facts.flatten({**LATER[""], **sections}).items()
    return {k: v for k, v in flat.items() if v not in nothing and (k, v) not in later}


def _board_key(result: Result) -> str:
    task = [result["task"]["name"], facts.metric_key(result)]
    return json.dumps([task, _board_facts(result)], sort_keys=True)


def _task_name(result: Result) -> str:
    model = str(facts.lookup(result, "config", "model", "name") or "")
    task = str(result["task"]["name"])
    return task if model in ("", "embedded") else f"{task}, {model}"


def _distinct(names: Sequence[str], details: Sequence[Mapping[str, str]]) -> list[str]:
    """Namesakes are told apart by the details in which they differ."""
    found = []
    for name, detail in zip(names, details, strict=True):
        same = [d for n, d in zip(names, details, strict=True) if n == name]
        keys = dict.fromkeys(key for other in same for key in other)
        differ = [k for k in keys if len({other.get(k) for other in same}) > 1]
        words = ", ".join(f"{key.rpartition('.')[2]} {detail.get(key, 'none')}" for key in differ)
        found.append(f"{name} ({words})" if words else name)
    return found


def _board(name: str, group: Sequence[Result], problems: list[str]) -> Board:
    order = list(SETTINGS)
    trained = {setting_of(r) for r in group if facts.topology(r) != "zero-shot"}
    own = trained or {setting_of(result) for result in group}
    settings = sorted(own, key=lambda s: (order.index(s) if s in order else len(order), s))
    by_key: dict[str, list[Result]] = {}
    for result in sorted(group, key=_arm_rank):
        by_key.setdefault(_arm_key(result), []).append(result)
    arms = [part for runs in by_key.values() for part in _apart(runs, _code)]
    # an arm that is another's in all places was not run, and says nothing
    arms = [runs for runs in arms if not all(map(is_shared, runs))]
    labels = _distinct(
        [_arm_name(runs[0]) for runs in arms], [_arm_facts(runs[0]) for runs in arms]
    )
    # which parts of the code a run passed through follows from its config: only where that is
    # the same, their revisions tell arms apart
    labels = _distinct(labels, [_code(runs[0]) for runs in arms])
    made = [
        Arm(label, facts.topology(runs[0]), _by_setting(runs, settings, problems))
        for label, runs in zip(labels, arms, strict=True)
    ]
    ran = tuple(result for result in group if not is_shared(result))
    return Board(name, facts.metric_name(ran[0]), tuple(settings), tuple(made), ran)


def _arm_rank(result: Result) -> tuple[int, int, bool, str]:
    """References before and after the federated, methods as they are listed, plain first."""
    algorithms = list(facts.ALGORITHMS)
    name = facts.lookup(result, "config", "algorithm", "name")
    place = algorithms.index(name) if name in algorithms else len(algorithms)
    strategy = strategy_of(result)
    return facts.topology_rank(result), place, bool(strategy), strategy


def _arm_name(result: Result) -> str:
    strategy = strategy_of(result)
    return f"{method_of(result)} + {strategy}" if strategy else method_of(result)


def _arm_facts(result: Result) -> dict[str, str]:
    config = {k: v for k, v in result["config"].items() if k not in _PLACE}
    partition = {k: v for k, v in (config.get("partition") or {}).items() if k != "alpha"}
    held_out = {"held_out": _held_out(result)} if _held_out(result) else {}
    return _without_nothing(facts.flatten({**config, "partition": partition, **held_out}))


def _held_out(result: Result) -> float:
    """The share of each party's samples that was not trained on; of what trains nothing, none."""
    share = facts.lookup(result, "config", "evaluation", "held_out") or 0.0
    return 0.0 if facts.topology(result) == "zero-shot" else float(share)


def _arm_key(result: Result) -> str:
    text = json.dumps(_arm_facts(result), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _by_setting(
    runs: Sequence[Result], settings: Sequence[str], problems: list[str]
) -> dict[str, dict[int, Result]]:
    found: dict[str, dict[int, Result]] = {setting: {} for setting in settings}
    # a run of the very setting goes before one that stands for it, and one of its own before
    # another arm's
    for shared, exact in itertools.product((False, True), (True, False)):
        for result in (run for run in runs if is_shared(run) == shared):
            seed = int(result.get("seed") or 0)
            own = setting_of(result)
            for setting in settings:
                if (own == setting) != exact or not stands_for(result, setting):
                    continue
                there = found[setting].setdefault(seed, result)
                if exact and not shared and there is not result:
                    problems.append(f"{_path(result)}: repeats {_path(there)}: left out")
    return found


def _path(result: Mapping[str, Any]) -> str:
    return str(result.get("_path") or result["name"])
