"""A grid file: a base config, axes of changes to it, and the cells that they make.

    base: {training: {rounds: 10}}
    axes:
      dataset: {memes: {data: memes}, crisis: {data: crisis}}     # names with their changes
      setting: [aligned-a0.5, missing-b0.5]                       # or a config key with its values
      seed: [0, 1, 2]
    exclude: [{dataset: crisis, setting: missing-b0.5}]
    share: [{when: {method: centralised, setting: aligned-a5.0}, as: {setting: aligned-a0.5}}]

A part of another grid, with the same cells, names its file beside it and the values it keeps:

    of: mini.yaml
    only: {dataset: memes, seed: [0, 1]}

A *place* is one value on every axis. Places whose configs must give the same numbers (zero-shot
under every setting and seed) are one *cell*, which is run once.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedmllm.bench.deciding import deciding_digest
from fedmllm.config import SHORTHAND, Config, check_config, read_yaml
from fedmllm.errors import UserError, unknown
from fedmllm.scenarios import SETTINGS

Place = Mapping[str, str]
KEYS = ("name", "title", "out", "base", "axes", "exclude", "share", "variables", "of", "only")
PART_KEYS = ("name", "title", "out", "of", "only")
# sections with a name and options of that name's own: another name drops the options
NAMED = ("data", "scenario", "algorithm", "aggregation")
_VARIABLE = re.compile(r"\$\{([^}]*)\}")


@dataclass(frozen=True)
class Cell:
    """One run of the grid. places: where in the grid its result stands, at least one. stands_for:
    the configs of the places that `share` gives its result, where they are others than its own."""

    name: str
    config: Config
    places: tuple[Place, ...]
    stands_for: tuple[Config, ...] = ()


@dataclass(frozen=True)
class Grid:
    """All cells of a grid file, in the order of its axes (the first axis varies slowest).

    axes: the names of the values of each axis that are kept. open_variables: variables that the
    file uses and nobody gave, with what the file says about them.
    """

    name: str
    title: str
    out: Path
    axes: Mapping[str, tuple[str, ...]]
    cells: tuple[Cell, ...]
    open_variables: Mapping[str, str] = field(default_factory=dict)


def load_grid(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    only: Sequence[str] = (),
    variables: Sequence[str] = (),
) -> Grid:
    """Read a grid file and expand it.

    overrides: ``key=value``, applied to every cell. only: ``axis=value,value``, keeps the cells
    that have a place there. variables: ``name=value`` for the file's ``${name}``.
    Raises `UserError` with every problem of every cell at once.
    """
    file = Path(path)
    raw, part, problems = _whole(file, read_yaml(file, "grid"))
    raw, unset, more = _with_variables(raw, variables)
    axes, even_more = _axes(raw.get("axes"))
    problems += more + even_more
    rules, more = _rules(raw, axes)
    chosen, even_more = _only(only, axes)
    problems += more + even_more
    kept_of_whole, more = _where("only", part, axes) if part else ({}, [])
    problems += more
    if problems:
        raise _error(file, problems)
    cells = _cells(file, raw, axes, rules, overrides)
    wanted = (kept_of_whole, chosen)
    left = [(c, tuple(p for p in c.places if all(_matches(p, w) for w in wanted))) for c in cells]
    kept = [replace(cell, places=places) for cell, places in left if places]
    if not kept:
        raise UserError(f"{file}: no cell is left: --only and exclude leave nothing to run")
    name = str(raw.get("name", file.stem))
    return Grid(
        name=name,
        title=str(raw.get("title", name)),
        out=Path(raw.get("out") or Path("runs") / name),
        axes={
            axis: tuple(v for v in values if all(v in w.get(axis, (v,)) for w in wanted))
            for axis, values in axes.items()
        },
        cells=tuple(kept),
        open_variables=unset,
    )


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """A config with a change put over it, key by key.

    A dotted key reaches into a section. Where a change names another dataset, scenario, algorithm
    or aggregation, the base's options of the former one are dropped.
    """
    merged = dict(base)
    for key, value in change.items():
        head, _, rest = key.partition(".")
        if rest:
            value = {rest: value}
        if head in SHORTHAND and isinstance(value, str):
            value = {"name": value}
        old = merged.get(head)
        if head in SHORTHAND and isinstance(old, str):
            old = {"name": old}
        if not isinstance(value, Mapping):
            merged[head] = value
        elif not isinstance(old, Mapping) or _renames(head, old, value):
            merged[head] = merge({}, value)
        else:
            merged[head] = merge(old, value)
    return merged


def _renames(section: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return section in NAMED and "name" in new and new["name"] != old.get("name")


# -- reading -----------------------------------------------------------------------------------

Axes = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""axis -> value's name -> change to the config"""


@dataclass(frozen=True)
class _Rules:
    exclude: Sequence[Mapping[str, tuple[str, ...]]]
    share: Sequence[tuple[Mapping[str, tuple[str, ...]], Place]]


def _whole(file: Path, raw: dict[str, Any]) -> tuple[dict[str, Any], Mapping[str, Any], list[str]]:
    """The grid that a file describes, what it keeps of it, and the problems."""
    problems = _key_problems(raw)
    if "of" not in raw:
        problems += ["only: goes with of, the grid that this is a part of"] * ("only" in raw)
        return raw, {}, problems
    problems += [
        f"{key}: a part of another grid has {', '.join(PART_KEYS)} alone"
        for key in raw
        if key in KEYS and key not in PART_KEYS
    ]
    whole_file = file.parent / str(raw["of"])
    whole = read_yaml(whole_file, "grid")
    problems += [f"{whole_file}: {line}" for line in _key_problems(whole)]
    if "of" in whole:
        problems.append(f"of: {whole_file} is a part of another grid itself; name that one")
    own = {"name": file.stem} | {key: raw[key] for key in ("name", "title", "out") if key in raw}
    inherited = {key: whole[key] for key in whole if key not in ("name", "title", "out")}
    return inherited | own, raw.get("only") or {}, problems


def _key_problems(raw: Mapping[str, Any]) -> list[str]:
    problems = [unknown("key of a grid file", key, KEYS) for key in raw if key not in KEYS]
    if not isinstance(raw.get("base") or {}, dict):
        problems.append("base: must be a mapping of config keys to values")
    return problems + [
        f"{key}: must be a text, not {raw[key]!r}"
        for key in ("name", "title", "out")
        if not isinstance(raw.get(key, ""), str)
    ]


def _with_variables(
    raw: dict[str, Any], given: Sequence[str]
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """The file with its ``${name}`` filled in, the variables left open, and the problems."""
    declared = raw.get("variables") or {}
    if not isinstance(declared, dict):
        return raw, {}, ["variables: must map each name to what it stands for"]
    values, problems = {}, []
    for item in given:
        name, sign, value = item.partition("=")
        if not sign:
            problems.append(f"--set {item!r} must read name=value")
        elif name not in declared:
            problems.append(f"--set: {unknown('variable of this grid', name, declared)}")
        else:
            values[name] = value
    unset: dict[str, str] = {}

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if name not in declared:
            problems.append(f"${{{name}}}: {unknown('variable', name, declared)}")
        elif name not in values:
            unset[name] = str(declared[name])
        return values.get(name, match[0])

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: walk(item) for key, item in value.items()}
        if isinstance(value, list):
            return [walk(item) for item in value]
        return _VARIABLE.sub(fill, value) if isinstance(value, str) else value

    filled = {key: walk(value) for key, value in raw.items() if key != "variables"}
    return filled, unset, problems


def _axes(raw: Any) -> tuple[dict[str, dict[str, dict[str, Any]]], list[str]]:
    """Every axis as value's name -> change. A list's values are those of the config key."""
    if not isinstance(raw, dict) or not raw:
        return {}, ["axes: give at least one axis, e.g. axes: {seed: [0, 1, 2]}"]
    axes: dict[str, dict[str, dict[str, Any]]] = {}
    problems = []
    for axis, values in raw.items():
        if not isinstance(axis, str):
            problems.append(f"axes: a key must be text, not {axis!r}: write it in quotes")
            continue
        if axis == "setting" and values == "all":
            values = list(SETTINGS)
        if isinstance(values, list):
            values = {_word(value): {axis: value} for value in values}
        if not isinstance(values, dict) or not values:
            problems.append(
                f"axes.{axis}: give a list of values of the config key {axis}, or a mapping of "
                "names to config changes"
            )
            continue
        for name, change in values.items():
            if not isinstance(change, dict | None):
                problems.append(f"axes.{axis}.{name}: must map config keys to values")
            elif (bad := _not_text(change or {})) is not None:
                problems.append(f"axes.{axis}.{name}: a config key must be text, not {bad!r}")
        axes[axis] = {_word(name): change or {} for name, change in values.items()}
    return axes, problems


def _not_text(change: Mapping[Any, Any]) -> Any:
    """A key of a config change, at any depth, that is no text; None if all are."""
    for key, value in change.items():
        if not isinstance(key, str):
            return key
        if isinstance(value, Mapping) and (bad := _not_text(value)) is not None:
            return bad
    return None


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _rules(raw: Mapping[str, Any], axes: Axes) -> tuple[_Rules, list[str]]:
    exclude, share = [], []
    problems: list[str] = []
    for i, rule in enumerate(_listed(raw, "exclude", problems)):
        where, more = _where(f"exclude[{i}]", rule, axes)
        exclude.append(where)
        problems += more
    for i, rule in enumerate(_listed(raw, "share", problems)):
        if not isinstance(rule, dict) or set(rule) != {"when", "as"}:
            problems.append(f"share[{i}]: give when: {{axis: value}} and as: {{axis: value}}")
            continue
        when, more = _where(f"share[{i}].when", rule["when"], axes)
        target, even_more = _where(f"share[{i}].as", rule["as"], axes)
        problems += more + even_more
        for axis, values in target.items():
            if len(values) != 1:
                problems.append(f"share[{i}].as.{axis}: give one value, not a list")
        share.append((when, {axis: values[0] for axis, values in target.items() if values}))
    return _Rules(exclude, share), problems


def _listed(raw: Mapping[str, Any], key: str, problems: list[str]) -> list[Any]:
    found = raw.get(key) or []
    if isinstance(found, list):
        return found
    problems.append(f"{key}: must be a list of rules")
    return []


def _where(where: str, rule: Any, axes: Axes) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """A rule's axis -> values, and what is wrong with it."""
    if not isinstance(rule, dict) or not rule:
        return {}, [f"{where}: give at least one axis with its value or list of values"]
    found: dict[str, tuple[str, ...]] = {}
    problems = []
    for axis, values in rule.items():
        if axis not in axes:
            problems.append(f"{where}: {unknown('axis', axis, axes)}")
            continue
        names = [_word(v) for v in (values if isinstance(values, list) else [values])]
        kind = f"value of axis {axis}"
        problems += [
            f"{where}: {unknown(kind, n, axes[axis])}" for n in names if n not in axes[axis]
        ]
        found[axis] = tuple(names)
    return found, problems


def _only(items: Sequence[str], axes: Axes) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    found: dict[str, tuple[str, ...]] = {}
    problems = []
    for item in items:
        axis, sign, values = item.partition("=")
        if not sign:
            problems.append(f"--only {item!r} must read axis=value or axis=value,value")
            continue
        where, more = _where("--only", {axis: values.split(",")}, axes)
        found |= {name: (*found.get(name, ()), *names) for name, names in where.items()}
        problems += more
    return found, problems


def _matches(place: Place, where: Mapping[str, Sequence[str]]) -> bool:
    return all(place[axis] in values for axis, values in where.items())


def _error(file: Path, problems: Sequence[str]) -> UserError:
    lines = list(dict.fromkeys(problems))
    listed = "\n".join(f"  - {line}" for line in lines)
    return UserError(f"{file}: {len(lines)} problem{'s' * (len(lines) > 1)}\n{listed}")


# -- expanding ---------------------------------------------------------------------------------


def _places(axes: Axes, rules: _Rules) -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    """Each place that is not excluded, with the place whose run it takes."""
    for names in itertools.product(*axes.values()):
        place = dict(zip(axes, names, strict=True))
        if any(_matches(place, rule) for rule in rules.exclude):
            continue
        source = dict(place)
        for when, target in rules.share:
            if _matches(place, when):
                source |= target
        yield place, source


def _cells(
    file: Path, raw: Mapping[str, Any], axes: Axes, rules: _Rules, overrides: Sequence[str]
) -> list[Cell]:
    """One cell for each set of numbers; all problems of all configs at once."""
    base = raw.get("base") or {}
    configs: dict[str, tuple[Config, list[Place], list[Place]]] = {}
    others: dict[str, dict[str, Config]] = {}  # what a run stands for, by digests
    faults: dict[str, list[Place]] = {}
    checked: dict[tuple[str, ...], tuple[Config | None, list[str]]] = {}

    def check(place: Place) -> tuple[Config | None, list[str]]:
        key = tuple(place.values())
        if key not in checked:
            changes = [axes[axis][value] for axis, value in place.items()]
            checked[key] = _check(base, changes, overrides)
        return checked[key]

    total = 0
    for place, source in _places(axes, rules):
        total += 1
        config, problems = check(source)
        for line in problems:
            faults.setdefault(line, []).append(place)
        if config is None:
            continue
        digest = deciding_digest(config)
        _, places, sources = configs.setdefault(digest, (config, [], []))
        places.append(place)
        sources.append(source)
        # a place may share a run because its own config makes no sense there
        own = check(place)[0] if place != source else None
        if own is not None and (other := deciding_digest(own)) != digest:
            others.setdefault(digest, {})[other] = own
    if faults:
        raise _error(file, [f"{line}{_whose(at, total)}" for line, at in faults.items()])
    return _named(file, configs, axes, others)


def _check(
    base: Mapping[str, Any], changes: Sequence[Mapping[str, Any]], overrides: Sequence[str]
) -> tuple[Config | None, list[str]]:
    raw: dict[str, Any] = {"name": "cell", **base}
    for change in changes:
        raw = merge(raw, change)
    return check_config(raw, overrides)


def _whose(places: Sequence[Place], total: int) -> str:
    """Which cells a problem concerns: nothing if all, else how many and the first."""
    if len(places) == total:
        return ""
    first = " ".join(f"{axis}={value}" for axis, value in places[0].items())
    return f" (in {len(places)} of {total} places, the first: {first})"


def _named(
    file: Path,
    configs: Mapping[str, tuple[Config, list[Place], list[Place]]],
    axes: Axes,
    others: Mapping[str, Mapping[str, Config]],
) -> list[Cell]:
    """Cells named after the values that are the same wherever their result stands."""
    cells: dict[str, Cell] = {}
    for digest, (config, places, sources) in configs.items():
        shared = [axis for axis in axes if len({source[axis] for source in sources}) == 1]
        name = "-".join(_part(axis, sources[0][axis]) for axis in shared) or "cell"
        name = re.sub(r"[^A-Za-z0-9._-]", "_", name)
        if name in cells:
            both = [" ".join(p.values()) for p in (cells[name].places[0], places[0])]
            raise UserError(
                f"{file}: {both[0]!r} and {both[1]!r} would both be named {name!r}: "
                "rename a value of an axis"
            )
        stands_for = tuple(others.get(digest, {}).values())
        own = config.model_copy(update={"name": name})
        cells[name] = Cell(name, own, tuple(places), stands_for)
    return list(cells.values())


def _part(axis: str, value: str) -> str:
    """A value in a cell's name: a bare number says what it is a number of."""
    if axis == "seed":
        return f"s{value}"
    bare = not re.match(r"[A-Za-z]", value) or value in ("true", "false")
    return f"{axis.rpartition('.')[2]}{value}" if bare else value
