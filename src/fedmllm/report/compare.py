"""Two results side by side: what differs in config, environment and numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedmllm.errors import UserError
from fedmllm.report import facts
from fedmllm.report.loading import NO_NUMBERS, Result, load_results

# where numbers stand that a run of the same config gives again; times and memory do not
_SECTIONS = ("metrics", "per_client", "held_out", "modality_alignment")
_OF_A_ROUND = ("loss", "lr", "bytes_up", "bytes_down", "measured", "metrics")


def load_one(path: Path) -> Result:
    """The result of a file or run folder. Raises `UserError` if it is not exactly one."""
    found, _ = load_results([path])
    if len(found) > 1:
        raise UserError(f"{path} holds {len(found)} results: give one, e.g. {found[0]['_path']}")
    return found[0]


def compare_lines(a: Result, b: Result) -> Iterator[str]:
    """What differs, a line each under four headings; the headline metric is told in full, then
    every number that is not the same in both."""
    yield f"A  {a['_path']}"
    yield f"B  {b['_path']}"
    for title, differ in (
        ("config", _differences(facts.flatten(a["config"]), facts.flatten(b["config"]))),
        ("environment", _differences(environment(a), environment(b))),
    ):
        yield ""
        yield title + ("" if differ else ": the same")
        for key, (old, new) in differ.items():
            yield f"  {key}: {old} -> {new}"
    yield ""
    yield "metrics (A, B, B - A)"
    if facts.metric_key(a) != facts.metric_key(b) or a["task"]["name"] != b["task"]["name"]:
        yield "  the tasks differ: their metrics cannot be compared"
        return
    yield from (f"  {line}" for line in _metric_lines(a, b))
    yield ""
    yield from _number_lines(numbers(a), numbers(b))


def environment(result: Result) -> dict[str, str]:
    """Where and of what a result was made."""
    sections = {key: result.get(key) or {} for key in ("versions", "hardware", "revisions")}
    flat = facts.flatten(sections)
    flat.setdefault("hardware.dtype", str(facts.lookup(result, "config", "model", "dtype")))
    for key in ("commit", "base_sha256", "data_sha256"):
        flat[key] = str(result.get(key))[:12]
    flat["who holds what"] = str(facts.lookup(result, "manifest", "sha256"))[:12]
    return flat


def agreement_lines(old: Result, new: Result, tolerance: float) -> tuple[bool, list[str]]:
    """Whether a new run of an old one's config agrees with it in every number that the old one
    states, and how far."""
    if facts.lookup(old, "manifest", "sha256") != facts.lookup(new, "manifest", "sha256"):
        return False, ["different data: the parties do not hold the samples that they held then"]
    was, now = numbers(old), numbers(new)
    if not was.keys() & now.keys():
        return False, ["the two results have no number in common"]
    pairs = {key: (value, now.get(key)) for key, value in was.items()}
    worst = max(pairs, key=lambda key: _distance(*pairs[key]))
    largest = _distance(*pairs[worst])
    if largest == 0:
        return True, [f"the same: all {len(pairs)} numbers agree to the last digit"]
    count = sum(_distance(*pair) > 0 for pair in pairs.values())
    place = f"the largest difference is {largest:.3g}, in {worst} ({count} of {len(pairs)} differ)"
    differ = [
        f"  {key}: {a} -> {b}"
        for key, (a, b) in _differences(environment(old), environment(new)).items()
    ]
    lines = [*(["the environment differs:"] if differ else []), *differ]
    agree = largest <= tolerance
    word = "they agree within" if agree else "they do not agree: more than"
    return agree, [f"{word} {tolerance:g}: {place}", *lines]


def numbers(result: Result) -> dict[str, float | None]:
    """Every number that a run of the same config should give again, by where it stands."""
    found: dict[str, float | None] = {}
    for section in _SECTIONS:
        found |= _numbers(result.get(section) or {}, section)
    for line in facts.history(result):
        keep = {key: line[key] for key in _OF_A_ROUND if key in line}
        found |= _numbers(keep, f"round {line['round']}")
    return found


def _numbers(value: Any, where: str) -> dict[str, float | None]:
    if isinstance(value, Mapping):
        found: dict[str, float | None] = {}
        for key, item in value.items():
            found |= _numbers(item, f"{where} {key}")
        return found
    known = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    return {where: value} if known else {}


def _number_lines(a: Mapping[str, float | None], b: Mapping[str, float | None]) -> Iterator[str]:
    """Every number that differs or that only one of the two states."""
    pairs = {key: (a.get(key), b.get(key)) for key in dict.fromkeys([*a, *b])}
    differ = {key: pair for key, pair in pairs.items() if _distance(*pair) > 0}
    if not differ:
        yield f"numbers: all {len(pairs)} are the same"
        return
    yield f"numbers that differ, {len(differ)} of {len(pairs)} (A, B, B - A)"
    for key, (old, new) in differ.items():
        words = [facts.DASH if value is None else f"{value:.9g}" for value in (old, new)]
        change = facts.DASH if old is None or new is None else f"{new - old:+.3g}"
        yield f"  {key}: {words[0]}  {words[1]}  {change}"


def _distance(a: float | None, b: float | None) -> float:
    """Absolute; infinite where only one of the two is there or finite."""
    gone = [value is None or value != value for value in (a, b)]
    if any(gone) or a is None or b is None:
        return 0.0 if all(gone) else float("inf")
    return abs(a - b)


def _differences(a: Mapping[str, str], b: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    keys = [key for key in dict.fromkeys([*a, *b]) if key not in NO_NUMBERS[""]]
    none = facts.DASH
    return {k: (a.get(k, none), b.get(k, none)) for k in keys if a.get(k) != b.get(k)}


def _metric_lines(a: Result, b: Result) -> Iterator[str]:
    for condition in facts.conditions([a, b]):
        one, two = facts.score(a, condition), facts.score(b, condition)
        errors = [facts.score_se(run, condition) for run in (a, b)]
        words = [facts.format_pair(v, e) for v, e in zip((one, two), errors, strict=True)]
        change = facts.DASH if one is None or two is None else f"{two - one:+.3f}"
        name = f"{facts.metric_name(a)}, {facts.condition_name(condition)}"
        yield f"{name}: {words[0]}  {words[1]}  {change}"
