"""Find, read and check result files.

A report is only as good as the files under it, so nothing is trusted: a file that is cut off,
unfinished, of another program or that contradicts itself is named and left out. What is optional
may be absent; what is present must be right.

The checks are generators of sentences, so that one pass names every fault of a file.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from fedmllm.errors import UserError
from fedmllm.report.judged import read_judged
from fedmllm.report.shared import SHARED_FILE, Entry, applied, read_shared

Result = dict[str, Any]

SCHEMA = 1
# The order of a reader's questions: nothing learnt, alone, together, everything in one place.
TOPOLOGIES = ("zero-shot", "local", "federated", "centralised")
WAYS = ("up", "down")  # of bytes: to the server, and from it
HOLDINGS = ("image_text", "image", "text", "neither")
COMBINATIONS = ("image+text", "image", "text", "neither")  # as a manifest calls them
# config keys that cannot change a run's numbers, by section; "" is the top
NO_NUMBERS: dict[str, tuple[str, ...]] = {
    "": ("name", "title", "threads"),
    "model": (
        "gradient_checkpointing",
        "remote_code",
        "feature_cache",
        "feature_cache_gb",
        "feature_memory_gb",
        "drop_tower",
    ),
}
# Packages that numbers pass through. Their first two numbers count: a patch release mends bugs.
PACKAGES = ("torch", "transformers", "peft", "numpy", "scikit-learn")
# config keys that say where something lies; what lies there has a digest
PLACES = {"model.path": "base_sha256", "data.root": "data_sha256"}
# keys that came later, with what runs did before them: so a hash means the same before and after
_STRATEGY: dict[str, Any] = {
    "mu": 0.0,
    "w": 0.1,
    "weight": "fixed",
    "edge_layers": None,
    "epsilon": None,
    "aggregation": 0.0,
    "sampling": 0.0,
    "prototypes": 0.0,
    "prototype_loss": "cosine",
    "temperature": 0.1,
    "momentum": 0.5,
    "distillation": 0.0,
    "distillation_target": "logits",
    "views": 0.0,
    "incomplete": 1.0,
    "recombine": 0.0,
    "resample": 0.0,
    "mixtures": 0,
    "evidence": 0.0,
    "fusion": 0.0,
}
LATER: dict[str, dict[str, Any]] = {
    "": {
        "strategy": _STRATEGY,
        "aggregation": {"name": "mean"},
        "trained": {
            "name": "paper",
            "connector": "frozen",
            "embeddings": "frozen",
            "vision": "frozen",
        },
    },
    "model": {"quantization": "none"},
    "strategy": _STRATEGY,
    "evaluation": {"held_out": 0.0, "drift": False},
    "training": {"long_text": "refuse", "clients_at_once": 1},
    "data": {"classes": 8},  # of crisis
}
_LOADED = ("_path", "_judged", "_stands_for")  # what `load_results` adds
_BOUNDED = ("auc", "macro_f1", "accuracy")
_TASK = ("name", "metric")
_CONFIG_SECTIONS = ("data", "model", "partition", "scenario", "algorithm", "training", "evaluation")
_OTHERS = (
    "hardware",
    "manifest",
    "heterogeneity",
    "mixtures",
    "evidence",
    "fusion",
    "modality_alignment",
)
_SECTIONS = ("metrics", "spread", "per_client", "bytes", "parameters", "time", "versions")


def load_results(paths: Iterable[str | Path]) -> tuple[list[Result], list[str]]:
    """Read result files; return the good ones in reading order and a line for each fault.

    paths: result files, run folders, or folders with run folders anywhere below.
    Each result gains the key ``_path``; ``_judged``: its judged.json or None; and ``_stands_for``:
    configs of a grid whose numbers are the run's too (`report.shared`).
    Raises `UserError` if nothing readable remains.
    """
    results: list[Result] = []
    problems: list[str] = []
    shared: dict[Path, dict[str, Entry]] = {}
    there = False
    for path in _find(paths, problems):
        there = there or path.is_file()
        data, faults = _read(path)
        problems += [f"{path}: {fault}" for fault in faults]
        if data is not None:
            marks, fault = read_judged(path, result_digest(data))
            problems += [fault] if fault else []
            others = _stands_for(path, data, shared, problems)
            results.append({**data, "_path": str(path), "_judged": marks, "_stands_for": others})
    if not results:
        seen = "\n  ".join(problems) or "no path was given"
        what = "run an experiment first" if not there else "run what is wrong again"
        raise UserError(f"no readable result.json: {what}\n  {seen}")
    return sorted(results, key=_rank), problems


def _stands_for(
    path: Path, data: Result, shared: dict[Path, dict[str, Entry]], problems: list[str]
) -> list[dict[str, Any]]:
    """The configs that a run stands for, by the file beside the run folders, which is read once."""
    folder = path.parent.parent
    if folder not in shared:
        shared[folder], fault = read_shared(folder)
        problems += [fault] if fault else []
    entry = shared[folder].get(path.parent.name) if path.name == "result.json" else None
    if entry is None:
        return []
    if entry["config_sha256"] != config_digest(data["config"]):
        problems.append(
            f"{folder / SHARED_FILE}: what it says of {path.parent.name} is of a run with another "
            "config: left out; run the benchmark again"
        )
        return []
    configs = [applied(data["config"], changes) for changes in entry["stands_for"]]
    return [
        config
        for config in configs
        if isinstance(config.get("seed"), int) and not list(_config_faults(config))
    ]


def _rank(result: Result) -> int:
    return TOPOLOGIES.index(result["config"].get("topology", "federated"))


def _find(paths: Iterable[str | Path], problems: list[str]) -> Iterator[Path]:
    """Every result file under the paths, once, in a stable order."""
    seen = set()
    for path in map(Path, paths):
        found = sorted(path.rglob("result.json"), key=_natural) if path.is_dir() else [path]
        if not found:
            problems.append(f"{path}: no result.json in this folder or below it")
        for file in found:
            if file.resolve() not in seen:
                seen.add(file.resolve())
                yield file


def _natural(path: Path) -> list[tuple[int, str]]:
    """Orders run-9 before run-10."""
    return [(int(part) if part.isdigit() else -1, part) for part in re.split(r"(\d+)", str(path))]


def _read(path: Path) -> tuple[Result | None, list[str]]:
    """The result and no fault, or None and the faults."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        return None, [f"cannot be read ({error.strerror})"]
    except (ValueError, RecursionError) as error:
        return None, [f"is not valid JSON ({error}); it may be cut off: repeat the run"]
    faults = list(_faults(data))
    return (None, faults) if faults else (data, [])


def _faults(data: Any) -> Iterator[str]:
    """What is wrong with a result, a sentence each."""
    if not isinstance(data, dict) or "schema" not in data:
        yield "is not a FedMLLM result (no key 'schema')"
        return
    if data["schema"] != SCHEMA:
        yield f"has schema {data['schema']!r}; this version reads schema {SCHEMA}"
        return
    if data.get("status") != "complete":
        yield f"has status {data.get('status')!r}, not 'complete': finish the run with --resume"
    shapes = list(_shape_faults(data))
    yield from shapes
    if not shapes:
        yield from _metric_faults(data)
        yield from _history_faults(data.get("history") or [], data["task"]["metric"])
        yield from _manifest_faults(data.get("manifest") or {})
        yield from _heterogeneity_faults(data.get("heterogeneity"))
        if data.get("config_sha256") not in (None, config_digest(data["config"])):
            yield "was changed after it was written: its config does not match its config_sha256"
        yield from _digest_faults(data)


def _digest_faults(data: Result) -> Iterator[str]:
    """Without its digest nothing says that a result is as it was written."""
    stated = data.get("result_sha256")
    if stated is None:
        yield "states no digest (result_sha256), so it may have been changed: run it again"
    elif stated != result_digest(data):
        yield "was changed after it was written: it does not match its result_sha256"


def result_digest(data: Mapping[str, Any]) -> str:
    """SHA-256 of all that a result says but itself. A guard against slips of the hand and cut
    files, not against a forger, who can compute it as well."""
    facts = {k: _as_written(v) for k, v in data.items() if k not in ("result_sha256", *_LOADED)}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _as_written(value: Any) -> Any:
    """A value as JSON holds it: texts for keys, lists for tuples, null for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): _as_written(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_written(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of what decides a run's numbers: everything but `NO_NUMBERS`, and `LATER` unless
    it was changed.

    It stands here because config checking knows the algorithms and so needs torch; a report
    must not.
    """
    facts = _deciding("", config)
    for section, value in facts.items():
        if isinstance(value, dict):
            facts[section] = _deciding(section, value)
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _deciding(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    later = LATER.get(section, {})
    return {
        key: value
        for key, value in values.items()
        if key not in NO_NUMBERS.get(section, ())
        and not (key in later and _is_default(value, later[key]))
    }


def _is_default(value: Any, default: Any) -> bool:
    """A section from before some of its keys came does not name them, and means their defaults."""
    if isinstance(value, Mapping) and isinstance(default, Mapping):
        return all(key in default and default[key] == each for key, each in value.items())
    return bool(value == default)


def _shape_faults(data: Result) -> Iterator[str]:
    """The right kinds of value in the right places; later checks rely on them."""
    if not isinstance(data.get("name"), str) or not data["name"].strip():
        yield "has no name"
    if not isinstance(data.get("seed") or 0, int):
        yield f"seed is {data['seed']!r}, not a whole number"
    yield from _config_faults(data.get("config"))
    yield from _task_faults(data.get("task"))
    if not isinstance(data.get("metrics"), dict):
        yield "has no metrics"
    for key in (*_SECTIONS, *_OTHERS):
        if data.get(key) is not None and not isinstance(data[key], dict):
            yield f"{key} is {_kind(data[key])}, not an object"
    if not isinstance(data.get("history") or [], list):
        yield f"history is {_kind(data['history'])}, not a list"
    yield from _quantity_faults(data)


def _task_faults(task: Any) -> Iterator[str]:
    if not isinstance(task, dict) or not all(isinstance(task.get(k), str) for k in _TASK):
        yield "has no task with a name and a metric"
        return
    classes = task.get("classes") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        yield f"task.classes is {classes!r}, not a list of texts"


def _config_faults(config: Any) -> Iterator[str]:
    if not isinstance(config, dict):
        yield "has no config"
        return
    topology = config.get("topology", "federated")
    if topology not in TOPOLOGIES:
        yield f"has topology {topology!r}: known are {', '.join(TOPOLOGIES)}"
    for section in _CONFIG_SECTIONS:
        if not isinstance(config.get(section) or {}, dict):
            yield f"config.{section} is {_kind(config[section])}, not an object"
    alpha = _object(config.get("partition")).get("alpha")
    if alpha is not None and not _is_number(alpha):
        yield f"config.partition.alpha is {alpha!r}, not a number"
    share = _object(config.get("evaluation")).get("held_out")
    if share is not None and not _is_amount(share):
        yield f"config.evaluation.held_out is {share!r}, not a number from zero up"


def _quantity_faults(data: Result) -> Iterator[str]:
    """Bytes, seconds, weights and memory are numbers from zero up, or null."""
    wanted = {
        "bytes": ("up", "down"),
        "parameters": ("total", "trainable"),
        "time": ("train_seconds", "evaluate_seconds", "total_seconds"),
    }
    peaks = ("peak_memory_bytes", "peak_accelerator_bytes")
    amounts = {key: data.get(key) for key in peaks}
    for section, keys in wanted.items():
        values = _object(data.get(section))
        amounts |= {f"{section}.{key}": values.get(key) for key in keys}
    for key in ("per_client_round", "once"):
        amounts |= _leaves(_object(data.get("bytes")).get(key), f"bytes.{key}")
    for name, value in amounts.items():
        if value is not None and not _is_amount(value):
            yield f"{name} is {value!r}, not a number from zero up"


def _leaves(values: Any, where: str) -> dict[str, Any]:
    """Bytes by part: up and down, or, as results were before, of one way alone."""
    values = _object(values)
    found = {f"{where}.{key}": value for key, value in values.items() if key not in WAYS}
    for way in (way for way in WAYS if way in values):
        each = values[way]
        parts = each if isinstance(each, dict) else {"parts": f"{each!r}"}
        found |= {f"{where}.{way}.{part}": value for part, value in parts.items()}
    return found


def _metric_faults(data: Result) -> Iterator[str]:
    """The headline metric under every condition: in its range, with a standard error from 0 up."""
    metric = data["task"]["metric"]
    yield from _scores_faults(data["metrics"], metric, "metrics")
    for client, scores in (data.get("per_client") or {}).items():
        yield from _scores_faults(scores, metric, f"per_client.{client}")
    for condition, spread in (data.get("spread") or {}).items():
        values = spread.get(metric, {}) if isinstance(spread, dict) else None
        if not isinstance(values, dict):
            yield f"spread.{condition} is not an object of objects"
            continue
        for key, value in values.items():
            yield from _score_faults(value, metric, f"spread.{condition}.{metric}.{key}")


def _scores_faults(scores: Any, metric: str, where: str) -> Iterator[str]:
    if not isinstance(scores, dict):
        yield f"{where} is {_kind(scores)}, not an object"
        return
    for condition, values in scores.items():
        if not isinstance(values, dict):
            yield f"{where}.{condition} is {_kind(values)}, not an object"
            continue
        yield from _score_faults(values.get(metric), metric, f"{where}.{condition}.{metric}")
        error = values.get(f"{metric}_se")
        if error is not None and not _is_amount(error):
            yield f"{where}.{condition}.{metric}_se is {error!r}, not a number from zero up"


def _score_faults(value: Any, metric: str, where: str) -> Iterator[str]:
    """Null means not measured (an AUC over one class); a NaN is a fault, never a gap."""
    if value is None:
        return
    if not _is_number(value):
        yield f"{where} is {value!r}, not a number"
    elif metric in _BOUNDED and not 0 <= value <= 1:
        yield f"{where} is {value!r}, outside 0 to 1"


def _history_faults(history: list[Any], metric: str) -> Iterator[str]:
    """Rounds count up. A loss may be null or NaN: the curve then has a gap."""
    last = -1
    for i, entry in enumerate(history):
        number = entry.get("round") if isinstance(entry, dict) else None
        if not _is_count(number) or number <= last:
            yield f"history[{i}] has round {number!r} after round {last}"
            return
        last = number
        loss = entry.get("loss")
        if isinstance(loss, bool) or not isinstance(loss, int | float | None):
            yield f"history[{i}].loss is {loss!r}, not a number"
        yield from _scores_faults(entry.get("metrics") or {}, metric, f"history[{i}].metrics")


def _manifest_faults(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Every party's parts add up to its samples."""
    for key in ("clients", "notes"):
        if not isinstance(manifest.get(key) or [], list):
            yield f"manifest.{key} is {_kind(manifest[key])}, not a list"
            return
    for i, client in enumerate(manifest.get("clients") or []):
        yield from (f"manifest.clients[{i}] {fault}" for fault in _client_faults(client))


def _client_faults(client: Any) -> Iterator[str]:
    if not isinstance(client, dict) or not isinstance(client.get("id"), str):
        yield "has no id"
        return
    labels = client.get("labels") or {}
    if not isinstance(labels, dict):
        yield f"has labels {labels!r}, not an object"
        return
    parts = [client.get(key, 0) for key in HOLDINGS]
    if not all(map(_is_count, [client.get("samples"), *parts, *labels.values()])):
        yield "has a count that is not a whole number from zero up"
        return
    if sum(parts) != client["samples"]:
        yield f"holds {client['samples']} samples, but its modalities add up to {sum(parts)}"
    if labels and sum(labels.values()) != client["samples"]:
        yield f"holds {client['samples']} samples, but its labels add up to {sum(labels.values())}"
    kept = client.get("kept")
    if kept is not None and not _adds_up(kept, labels):
        yield "has samples by class and modality that do not add up to its labels"


def _adds_up(kept: Any, labels: Mapping[str, int]) -> bool:
    """Whether {label: {combination: count}} has the labels' counts."""
    if not isinstance(kept, dict) or list(kept) != list(labels):
        return False
    for label, by in kept.items():
        if not isinstance(by, dict) or not set(by) <= set(COMBINATIONS):
            return False
        if not all(map(_is_count, by.values())) or sum(by.values()) != labels[label]:
            return False
    return True


def _heterogeneity_faults(found: Any) -> Iterator[str]:
    """What the server saw of each party: counts from zero up, and numbers or null."""
    rows = _object(found).get("clients") or []
    if not isinstance(rows, list):
        yield f"heterogeneity.clients is {_kind(rows)}, not a list"
        return
    for i, row in enumerate(rows):
        where = f"heterogeneity.clients[{i}]"
        if not isinstance(row, dict) or not isinstance(row.get("id"), str):
            yield f"{where} has no id"
            continue
        if not all(_is_count(row.get(key)) for key in HOLDINGS):
            yield f"{where} has a count that is not a whole number from zero up"
        for key in ("index", "divergence", "weight", "scale", "chance"):
            if row.get(key) is not None and not _is_amount(row[key]):
                yield f"{where}.{key} is {row[key]!r}, not a number from zero up"


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_amount(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _kind(value: Any) -> str:
    return {list: "a list", str: "a text", bool: "a truth value"}.get(type(value), repr(value))
