"""What is there of a cell, and whether it still holds: done, stale, begun, failed or missing.

A cell's *fingerprint* is all that can change its numbers: the deciding keys of its config, the
revisions of the code that it passes through, the packages, the base model, the data. A result
whose fingerprint differs anywhere is stale, and the difference is its reason.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedmllm import results
from fedmllm.bench.deciding import deciding
from fedmllm.bench.grid import Cell
from fedmllm.config import HASH_KEY, Config, check_config, config_hash, read_yaml
from fedmllm.data import load_dataset
from fedmllm.data.dataset import Dataset
from fedmllm.errors import UserError
from fedmllm.experiment import CONFIG_FILE, Shared, data_digest
from fedmllm.models import model_path, weights_digest
from fedmllm.report import load_results
from fedmllm.report.facts import flatten
from fedmllm.report.loading import PACKAGES, PLACES
from fedmllm.revisions import revisions_of

JOURNAL = "bench.json"
KINDS = ("done", "stale", "begun", "failed", "missing")


@dataclass(frozen=True)
class State:
    """kind: one of `KINDS`. reasons: why it is stale, or why it failed when last tried.
    resumable: there is a part of this very run to go on from."""

    kind: str
    reasons: tuple[str, ...] = ()
    resumable: bool = False


@dataclass
class Present:
    """What lies on this machine now; each thing is looked at once."""

    datasets: dict[str, Dataset | None] = field(default_factory=dict)
    digests: dict[str, str | None] = field(default_factory=dict)

    def dataset(self, config: Config) -> Dataset | None:
        """The config's dataset, or None if it cannot be read here."""
        key = Shared.data_key(config)
        if key not in self.datasets:
            try:
                self.datasets[key] = load_dataset(**config.data)
            except UserError:
                self.datasets[key] = None
        return self.datasets[key]

    def data_sha256(self, config: Config) -> str | None:
        """Its `data_digest`."""
        key = f"data {Shared.data_key(config)}"
        if key not in self.digests:
            dataset = self.dataset(config)
            self.digests[key] = None if dataset is None else data_digest(dataset)
        return self.digests[key]

    def base_sha256(self, config: Config) -> str | None:
        """SHA-256 of the base model's weights, where it can be had."""
        path = model_path(config.model.name, config.model.path)
        key = f"base {path}"
        if key not in self.digests:
            self.digests[key] = weights_digest(path)
        return self.digests[key]


Fingerprint = dict[str, str]
_STATED = {"base_sha256": "base model", "data_sha256": "data"}
_DIGESTS = {f"config {place}": _STATED[key] for place, key in PLACES.items()}
"""the key of a place -> that of what lies there"""


def fingerprint(config: Config, present: Present) -> Fingerprint:
    """What decides the numbers of a run that would be made now."""
    made = {f"config {k}": v for k, v in flatten(deciding(config)).items()}
    made |= _code(revisions_of(config.model_dump(mode="json")), results.versions())
    made |= {"base model": present.base_sha256(config) or ""}
    return made | {"data": present.data_sha256(config) or ""}


def fingerprint_of(result: Mapping[str, Any]) -> Fingerprint:
    """What decided the numbers of a result, as far as it says.

    Raises `UserError` if its config is not one that this version can read.
    """
    config, problems = check_config(result["config"])
    if config is None:
        raise UserError("; ".join(problems))
    made = {f"config {k}": v for k, v in flatten(deciding(config)).items()}
    revisions = result.get("revisions") or dict.fromkeys(revisions_of(result["config"]), 1)
    made |= _code(revisions, result.get("versions") or {})
    made |= {"base model": result.get("base_sha256") or ""}
    return made | {"data": result.get("data_sha256") or ""}


def differences(old: Fingerprint, new: Fingerprint) -> tuple[str, ...]:
    """What makes a result stale, a line each; an empty value is not known and not compared. Where
    something lies is not compared if it is known by its digest."""
    lines = []
    for key in dict.fromkeys([*new, *old]):
        was, now = old.get(key, ""), new.get(key, "")
        digest_ = _DIGESTS.get(key, "")
        if old.get(digest_) and new.get(digest_):
            continue
        if was == now or (not (was and now) and not key.startswith("config ")):
            continue
        short = [value[:12] if key in ("base model", "data") else value for value in (was, now)]
        lines.append(f"{key}: {short[0] or 'not there'} -> {short[1] or 'not there'}")
    return tuple(lines)


def digest(made: Fingerprint) -> str:
    """A fingerprint in one word."""
    made = {key: value for key, value in made.items() if not made.get(_DIGESTS.get(key, ""))}
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()


def states(cells: Iterable[Cell], folder: Path, present: Present) -> dict[str, State]:
    """The state of every cell by name. Reads results; changes nothing."""
    journal = read_journal(folder)
    return {cell.name: _state(cell, folder / cell.name, journal, present) for cell in cells}


def _state(cell: Cell, folder: Path, journal: Mapping[str, Any], present: Present) -> State:
    if not (folder / "result.json").exists():
        goes_on = _goes_on(cell, folder, journal, present)
        failed = journal["failed"].get(cell.name)
        if failed is not None:
            return State("failed", (str(failed),), goes_on)
        return State("begun" if goes_on else "missing", (), goes_on)
    try:
        found, _ = load_results([folder / "result.json"])
        old = fingerprint_of(found[0])
    except UserError as error:
        return State("stale", (str(error).strip().splitlines()[-1].strip(),))
    reasons = differences(old, fingerprint(cell.config, present))
    return State("stale", reasons) if reasons else State("done")


def _goes_on(cell: Cell, folder: Path, journal: Mapping[str, Any], present: Present) -> bool:
    """Whether the folder holds a part of the run that would be made now."""
    begun = journal["begun"].get(cell.name)
    if begun is None or begun != digest(fingerprint(cell.config, present)):
        return False
    try:
        written = read_yaml(folder / CONFIG_FILE)
    except UserError:
        return False
    return written.get(HASH_KEY) == config_hash(cell.config)


def _code(revisions: Mapping[str, int], versions: Mapping[str, str]) -> Fingerprint:
    made = {f"revision of {part}": str(number) for part, number in revisions.items()}
    for package in PACKAGES:
        made[f"package {package}"] = ".".join(str(versions.get(package, "")).split(".")[:2])
    return made


# -- the journal -------------------------------------------------------------------------------


def read_journal(folder: Path) -> dict[str, dict[str, Any]]:
    """What the benchmark notes beside the results: the fingerprints of the runs that it began,
    and why those failed that did."""
    try:
        found = json.loads((folder / JOURNAL).read_text())
        return {key: dict(found.get(key) or {}) for key in ("begun", "failed")}
    except (OSError, ValueError, AttributeError, TypeError):
        return {"begun": {}, "failed": {}}


def write_journal(folder: Path, journal: Mapping[str, Any]) -> None:
    """Replace the journal."""
    results.write_json(folder / JOURNAL, journal)
