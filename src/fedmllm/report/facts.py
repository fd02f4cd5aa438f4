"""What one result says: plain readers over a checked result, and numbers in words.

Tables, figures and page ask here, so that a number reads the same everywhere. A reader returns
None for what the file does not hold; `DASH` is how that is printed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmllm.report.judged import JUDGED_FILE
from fedmllm.report.loading import TOPOLOGIES, WAYS, Result

DASH = "–"
CONDITIONS = {
    "both": "image + text",
    "image_withheld": "image withheld",
    "text_withheld": "text withheld",
    "neither": "neither",
}
METRICS = {"auc": "AUC", "macro_f1": "macro-F1", "accuracy": "accuracy"}
ALGORITHMS = {
    "fedavg": "FedAvg",
    "fedprox": "FedProx",
    "fedavgm": "FedAvgM",
    "fedadam": "FedAdam",
    "fedyogi": "FedYogi",
    "fedadagrad": "FedAdagrad",
    "scaffold": "SCAFFOLD",
}
DRIFT = {  # what a round measures -> in words
    "drift_cosine": "cosine of updates",
    "drift_dispersion": "dispersion of updates",
    "drift_prototype_cosine": "cosine of prototypes",
}
AGGREGATIONS = {  # in place of the mean of the updates
    "median": "median",
    "trimmed-mean": "trimmed mean",
    "krum": "Krum choice",
    "multi-krum": "Multi-Krum mean",
}


# --- one run ---------------------------------------------------------------------------------


def topology(result: Result) -> str:
    """``federated``, ``centralised``, ``local`` or ``zero-shot``."""
    return str(result["config"].get("topology", "federated"))


def topology_rank(result: Result) -> int:
    """Its place in a reader's order."""
    return TOPOLOGIES.index(topology(result))


def metric_key(result: Result) -> str:
    """The key of the headline metric, e.g. ``auc``."""
    return str(result["task"]["metric"])


def metric_name(result: Result) -> str:
    """The headline metric in words, e.g. ``AUC``."""
    return METRICS.get(metric_key(result), metric_key(result))


def higher_is_better(result: Result) -> bool:
    """Which way is up is data; the project's own metrics all grow with quality."""
    return result["task"].get("higher_is_better") is not False


def score(result: Result, condition: str) -> float | None:
    """The headline metric on the test set under a condition; for local runs the mean."""
    value = result["metrics"].get(condition, {}).get(metric_key(result))
    return spread(result, condition).get("mean") if value is None else float(value)


def score_se(result: Result, condition: str) -> float | None:
    """Its standard error."""
    value = result["metrics"].get(condition, {}).get(f"{metric_key(result)}_se")
    return None if value is None else float(value)


def group_scores(result: Result, condition: str) -> dict[str, float]:
    """Group of questions -> accuracy, of open tasks: ``slake/zh`` from ``accuracy_slake/zh``."""
    prefix, found = "accuracy_", {}
    for key, value in result["metrics"].get(condition, {}).items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key.startswith(prefix) and key != f"{prefix}se" and number:
            found[key.removeprefix(prefix)] = float(value)
    return found if metric_key(result) == "accuracy" else {}


def unparsable(result: Result) -> float | None:
    """Answers to open questions that could not be read, of all test conditions."""
    found = [scores.get("unparsable") for scores in result["metrics"].values()]
    known = [n for n in found if isinstance(n, int | float) and not isinstance(n, bool)]
    return sum(known) if known else None


def spent(result: Result) -> dict[str, float | None]:
    """What a run took: bytes of all parties, wall time, samples a second, peak memory of its
    process and, on a GPU, of tensors there; and answers that could not be read."""
    return {
        "bytes_up": lookup(result, "bytes", "up"),
        "bytes_down": lookup(result, "bytes", "down"),
        "total_seconds": lookup(result, "time", "total_seconds"),
        "trained_per_second": lookup(result, "samples", "trained_per_second"),
        "tested_per_second": lookup(result, "samples", "tested_per_second"),
        "peak_memory_bytes": result.get("peak_memory_bytes"),
        "peak_accelerator_bytes": result.get("peak_accelerator_bytes"),
        "unparsable": unparsable(result),
    }


def spread(result: Result, condition: str) -> dict[str, float]:
    """Mean, standard deviation, least and greatest over the parties of a local run."""
    values = (result.get("spread") or {}).get(condition) or {}
    return values.get(metric_key(result)) or {}


def judge_of(result: Result) -> str:
    """The language model that marked the answers, with the start of a digest of how it was asked
    and what its server calls it; if that is more than one model, all of them. Empty for none. Marks
    of one judge may be compared."""
    marks = result.get("_judged")
    if not marks:
        return ""
    served = sorted(name for name in marks.get("served") or {} if name)  # a filter names no model
    text = json.dumps([marks.get("scheme"), served], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:6]
    several = f"; served by {', '.join(served)}" if len(served) > 1 else ""
    return f"{marks.get('judge')} ({digest}{several})"


def judged_file(result: Result) -> str:
    """The file that a judge's marks are in; empty for none."""
    there = result.get("_judged") and result.get("_path")
    return str(Path(result["_path"]).with_name(JUDGED_FILE)) if there else ""


def judged(result: Result, condition: str) -> dict[str, Any]:
    """The judge's marks under a condition: accuracy, its standard error, n, unparsable, …"""
    return lookup(result, "_judged", "conditions", condition) or {}


def judged_conditions(results: Iterable[Result]) -> list[str]:
    """The test conditions whose answers some judge has marked, the known ones first."""
    found = {key for result in results for key in lookup(result, "_judged", "conditions") or {}}
    return [key for key in CONDITIONS if key in found]


def party_scores(result: Result, condition: str) -> dict[str, float]:
    """The headline metric of each party that trained alone."""
    key = metric_key(result)
    scores = {
        client: values.get(condition, {}).get(key)
        for client, values in (result.get("per_client") or {}).items()
    }
    return {client: float(value) for client, value in scores.items() if value is not None}


def history(result: Result) -> list[dict[str, Any]]:
    """One entry a round; empty for a run that trained nothing."""
    return result.get("history") or []


def curve(result: Result, condition: str) -> list[tuple[int, float]]:
    """(round, headline metric) wherever it was measured."""
    key = metric_key(result)
    points = [
        (entry["round"], ((entry.get("metrics") or {}).get(condition) or {}).get(key))
        for entry in history(result)
    ]
    return [(number, float(value)) for number, value in points if value is not None]


def test_sizes(result: Result, condition: str) -> dict[int, int]:
    """Round -> how many samples it was tested on, where the file says."""
    found = {}
    for entry in history(result):
        count = ((entry.get("metrics") or {}).get(condition) or {}).get("n")
        if isinstance(count, int) and not isinstance(count, bool):
            found[entry["round"]] = count
    return found


def followed(
    result: Result, condition: str
) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """A `curve` in two: what may be joined by a line, and its last point if that was tested on
    another number of samples than the first (`evaluation.limit` holds on the way only)."""
    points, sizes = curve(result, condition), test_sizes(result, condition)
    ends = [sizes.get(number) for number, _ in (*points[:1], *points[-1:])]
    if len(points) < 2 or None in ends or ends[0] == ends[1]:
        return points, []
    return points[:-1], points[-1:]


def followed_words(results: Iterable[Result], condition: str) -> str:
    """On how many samples curves were measured; empty if that is one number to a run."""
    way: set[int] = set()
    end: set[int] = set()
    for result in results:
        (points, last), sizes = followed(result, condition), test_sizes(result, condition)
        if last:
            way |= {sizes[number] for number, _ in points if number in sizes}
            end |= {sizes[number] for number, _ in last}
    if not end:
        return ""
    return (
        f"On the way a run is tested on the first {_range(way)} test samples; the open mark is its "
        f"test at the end, on all {_range(end)}."
    )


def _range(counts: Iterable[int]) -> str:
    return " to ".join(dict.fromkeys(f"{count:,}" for count in (min(counts), max(counts))))


def per_party(result: Result, key: str) -> float | None:
    """``bytes_up`` or ``bytes_down`` of one party in one round, from the first round in which some
    party delivered: all that were asked received, who delivered sent."""
    first = next((line for line in history(result) if line.get("clients")), {})
    count = len(first.get("clients") or [])
    count += len(first.get("missing") or []) if key == "bytes_down" else 0
    amount = first.get(key)
    return amount / count if count and isinstance(amount, int | float) else None


def once(result: Result) -> dict[str, dict[str, float]]:
    """Bytes of all parties before the first round, up and down, by part. Results of before name
    them only where they say what was exchanged."""
    older = {"profiles": ("heterogeneity", "bytes"), "mixtures": ("mixtures", "bytes")}
    found = {}
    for way in WAYS:
        parts = lookup(result, "bytes", "once", way)
        if parts is None:
            parts = {name: lookup(result, *place, way) for name, place in older.items()}
        found[way] = {name: n for name, n in parts.items() if isinstance(n, int | float)}
    return found


def message_parts(result: Result) -> dict[str, dict[str, float]]:
    """Bytes that one party sends (``up``) and receives (``down``) in a round, by part; empty if the
    file does not say. Results of before state the parts of one way, which were those of both but
    for SCAFFOLD's control."""
    stated = lookup(result, "bytes", "per_client_round") or {}
    if not any(way in stated for way in WAYS):
        stated = dict.fromkeys(WAYS, stated) if stated else {}
    return {
        way: {name: count for name, count in (stated[way] or {}).items() if count is not None}
        for way in WAYS
        if way in stated
    }


def drift(result: Result) -> dict[str, float]:
    """What `evaluation.drift` measured, by name: of updates and class prototypes the mean over the
    rounds, and how near masked test samples are to whole ones in the final adapter. Empty where it
    was off."""
    lines = [lookup(line, "measured") for line in history(result)]
    found: dict[str, float] = {}
    for name, words in DRIFT.items():
        values = [value for line in lines if _is_finite(value := lookup(line or {}, name))]
        found |= {words: math.fsum(values) / len(values)} if values else {}
    for condition, measured in (lookup(result, "modality_alignment") or {}).items():
        for name in ("cosine", "distance"):
            if _is_finite(value := lookup({"": measured}, "", name)):
                found[nearness(condition, name)] = value
    return found


def nearness(condition: str, measure: str) -> str:
    """The name in `drift` of how near samples masked by a condition are to whole ones. measure:
    ``cosine`` or ``distance``."""
    return f"{measure} to whole, {condition_name(condition)}"


def _is_finite(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def losses(result: Result) -> list[tuple[int, float]]:
    """(round, training loss); NaN where the file holds none."""
    values = [(entry["round"], entry.get("loss")) for entry in history(result)]
    return [(number, math.nan if loss is None else float(loss)) for number, loss in values]


def rounds(result: Result) -> int | None:
    """Rounds that were run."""
    if history(result):
        return int(history(result)[-1]["round"])
    return 0 if topology(result) == "zero-shot" else None


def clients(result: Result) -> list[dict[str, Any]]:
    """The manifest's parties: id, samples, counts by modality and by label."""
    return (result.get("manifest") or {}).get("clients") or []


def class_counts(client: Mapping[str, Any]) -> dict[str, int]:
    """A party's samples by class; empty if its samples have no classes (the label ``all``)."""
    counts = client.get("labels") or {}
    return {} if list(counts) == ["all"] else dict(counts)


def lookup(result: Result, *keys: str) -> Any:
    """A nested value, or None if any step is missing."""
    value: Any = result
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def named(part: Any) -> str:
    """A config part with its settings: ``missing (beta 0.3)``; empty if there is none."""
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        return ""
    settings = [
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in part.items()
        if key != "name" and isinstance(value, int | float | str)
    ]
    name = str(part.get("name", ""))
    return f"{name} ({', '.join(settings)})" if settings else name


def about(result: Result) -> str:
    """What a run is, in a few words, from its config."""
    parties = len(clients(result))
    scenario = named(lookup(result, "config", "scenario"))
    data = f", {scenario} data" if scenario else ""
    kind = topology(result)
    if kind == "zero-shot":
        return "The base model, untrained"
    if kind == "centralised":
        return f"All data pooled in one place{data}"
    if kind == "local":
        who = f"each of {parties} parties" if parties else "every party"
        return f"No exchange: mean over {who} alone{data}"
    return _about_federated(result, parties) + data + _about_prompt(result)


def _about_federated(result: Result, parties: int) -> str:
    words = [method(result)]
    cohort = lookup(result, "config", "training", "clients_per_round")
    if parties:
        words.append(f"{cohort} of {parties} parties a round" if cohort else f"{parties} parties")
    return ", ".join(words)


def method(result: Result) -> str:
    """``FedAvg``, or ``FedAvg of the median``: the algorithm, and what stands for the mean."""
    name = str(lookup(result, "config", "algorithm", "name") or "federated")
    rule = str(lookup(result, "config", "aggregation", "name") or "mean")
    words = ALGORITHMS.get(name, name)
    return words if rule == "mean" else f"{words} of the {AGGREGATIONS.get(rule, rule)}"


def _about_prompt(result: Result) -> str:
    agnostic = lookup(result, "config", "prompt") == "agnostic"
    return ", modality-agnostic prompt" if agnostic else ""


# --- several runs ----------------------------------------------------------------------------


def labels(results: Sequence[Result]) -> list[str]:
    """A short name for each run, unique: the seed, then a number, tell namesakes apart."""
    names = [" ".join(result["name"].split()) for result in results]
    with_seed = [
        f"{name} (seed {result.get('seed', DASH)})" if names.count(name) > 1 else name
        for name, result in zip(names, results, strict=True)
    ]
    return [
        f"{name} #{with_seed[: i + 1].count(name)}" if with_seed.count(name) > 1 else name
        for i, name in enumerate(with_seed)
    ]


def by_task(results: Sequence[Result]) -> list[list[Result]]:
    """Runs that may be compared: same task, same metric. In order of appearance."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result["task"]["name"], metric_key(result)), []).append(result)
    return list(groups.values())


def conditions(results: Iterable[Result]) -> list[str]:
    """The test conditions that occur, the known ones first."""
    found = dict.fromkeys(key for result in results for key in result["metrics"])
    return [key for key in CONDITIONS if key in found] + [k for k in found if k not in CONDITIONS]


def condition_name(condition: str) -> str:
    """``image_withheld`` in words."""
    return CONDITIONS.get(condition, condition.replace("_", " "))


def best(results: Iterable[Result], condition: str, kind: str = "federated") -> Result | None:
    """The best run of a topology under a condition; the first of equals."""
    scored = [
        (value if higher_is_better(result) else -value, result)
        for result in results
        if topology(result) == kind and (value := score(result, condition)) is not None
    ]
    return max(scored, key=lambda pair: pair[0])[1] if scored else None


def headline(results: Sequence[Result]) -> str:
    """The condition that leads: both modalities, or else the first that was measured."""
    return (conditions(results) or ["both"])[0]


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested config to dotted keys and printed values."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return flat


# --- numbers in words ------------------------------------------------------------------------


def format_score(value: float | None) -> str:
    """Three decimals: a standard error is rarely below a thousandth."""
    return DASH if value is None else f"{value:.3f}"


def format_pair(value: float | None, error: float | None, plus_minus: str = " ± ") -> str:
    """``0.871 ± 0.010``."""
    if value is None or error is None:
        return format_score(value)
    return f"{value:.3f}{plus_minus}{error:.3f}"


def format_megabytes(count: float | None) -> str:
    """Millions of bytes with about three digits, without a unit."""
    if count is None:
        return DASH
    mega = count / 1e6
    digits = 0 if mega >= 99.95 or not mega else 1 if mega >= 9.995 else 2
    return f"{mega:,.{digits}f}" if mega >= 0.005 or not mega else "<0.01"


def format_seconds(seconds: float | None) -> str:
    """``0.4 s``, ``12 s``, ``3m 05s``, ``2h 10m``."""
    if seconds is None:
        return DASH
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    return f"{minutes // 60}h {minutes % 60:02d}m"


def format_count(count: float | None) -> str:
    """``1,234`` as it stands; millions and billions to three digits."""
    if count is None:
        return DASH
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if count >= size:
            return f"{count / size:.3g} {word}"
    return f"{count:,.0f}"


def topologies(results: Iterable[Result]) -> list[str]:
    """The topologies that occur, in reading order."""
    found = {topology(result) for result in results}
    return [kind for kind in TOPOLOGIES if kind in found]
