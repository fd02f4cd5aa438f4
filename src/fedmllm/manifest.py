"""The manifest: for each client, which samples it holds and which modalities of each.

A manifest is the product of partition and scenario, written down. It has a hash, so that two
runs can be shown to have trained on the same holdings, and it needs no dataset to be read.

What a row keeps is what is left of the sample: a modality that the sample never had is not kept.
The question of an open sample is never withheld: without an image (a medical flashcard, an image
question that lost its image) it counts as text.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmllm import partition as partitions
from fedmllm import scenarios
from fedmllm.data.dataset import Dataset
from fedmllm.data.sample import Sample
from fedmllm.errors import UserError, unknown
from fedmllm.scenarios import Assignment, Keep

FORMAT = 1
COMBINATIONS = ("image+text", "image", "text", "neither")
_COMBINATION = dict(
    zip([(True, True), (True, False), (False, True), (False, False)], COMBINATIONS, strict=True)
)
NO_LABELS = "samples have no labels: split evenly at random instead of by Dirichlet"
Row = tuple[str, bool, bool]
"""(sample id, keeps the image, keeps the text)"""
_Shares = dict[str, list[Sample]]


@dataclass(frozen=True)
class ClientHolding:
    """What one client holds. rows are sorted by sample id; labels run parallel to them."""

    id: str
    rows: tuple[Row, ...]
    labels: tuple[int | None, ...]


@dataclass(frozen=True)
class Manifest:
    """Who holds what.

    scenario, partition: ``{"name": ..., **options}`` as applied. classes: the names of the
    labels, empty where samples have none. notes: what a reader should know, e.g. unused samples.
    """

    dataset: str
    seed: int
    scenario: Mapping[str, Any]
    partition: Mapping[str, Any]
    classes: tuple[str, ...]
    clients: tuple[ClientHolding, ...]
    notes: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Hex digest of the canonical JSON of everything above."""
        return _digest(_content(self))


@dataclass(frozen=True)
class ClientSummary:
    """One client in a report.

    counts: class name -> combination -> number of samples, every combination present; the class
    of samples without a label is called ``all``. profile: combination -> share of the samples.
    """

    id: str
    samples: int
    counts: dict[str, dict[str, int]]
    profile: dict[str, float]


def build_manifest(
    dataset_name: str,
    dataset: Dataset,
    *,
    clients: int,
    partition: str = "dirichlet",
    alpha: float = 0.5,
    scenario: str = "aligned",
    scenario_options: Mapping[str, object] | None = None,
    seed: int,
) -> Manifest:
    """Split a dataset among clients and apply a modality scenario.

    A pure function of its arguments; the order of samples in the dataset does not matter.
    Clients are called client-00, client-01, … A dataset with ready parties keeps them: then
    `clients`, `partition` and `alpha` are unused, and the clients bear the parties' names.
    A dataset with flashcards is split evenly: image-holding clients share `train`, text-holding
    clients share the flashcards. A dataset without labels is split evenly.
    Raises `UserError` for wrong options, repeated sample ids, or too few samples.
    """
    if partition not in partitions.PARTITIONS:
        raise UserError(unknown("partition", partition, partitions.PARTITIONS))
    _check_unique(dataset)
    if not dataset.parties and clients < 1:
        raise UserError(f"clients is {clients}: give 1 or more")
    names = sorted(dataset.parties) or [f"client-{k:02d}" for k in range(clients)]
    assignment = scenarios.assign(
        scenario,
        names,
        options=scenario_options,
        seed=seed,
        per_client=bool(dataset.flashcards),
    )
    shares, used, notes = _shares(dataset, names, assignment, partition, alpha, seed)
    checked = scenarios.check_options(scenario, scenario_options or {})
    return Manifest(
        dataset=dataset_name,
        seed=seed,
        scenario={"name": scenario, **checked},
        partition=used,
        classes=_class_names(dataset),
        clients=tuple(_holding(name, shares[name], assignment) for name in names),
        notes=(*assignment.notes, *notes, *_absent_modality(dataset, assignment)),
    )


def client_samples(manifest: Manifest, dataset: Dataset) -> dict[str, list[Sample]]:
    """Each client's samples as it sees them, in the manifest's order.

    Raises `UserError` if the dataset lacks a sample that the manifest names.
    """
    by_id = {sample.id: sample for sample in (*dataset.train, *dataset.flashcards)}
    missing = [row[0] for client in manifest.clients for row in client.rows if row[0] not in by_id]
    if missing:
        raise UserError(
            f"dataset {manifest.dataset!r} lacks samples that the manifest names ({len(missing)}, "
            f"the first {missing[0]!r}): the data changed since; build the manifest anew"
        )
    return {
        client.id: [
            by_id[sample].masked(keep_image=image, keep_text=text)
            for sample, image, text in client.rows
        ]
        for client in manifest.clients
    }


def request(manifest: Manifest) -> dict[str, Any]:
    """The arguments of `build_manifest` that made it, besides the name and the dataset.

    `build_manifest(name, dataset, **request(manifest))` is the manifest again, if the dataset is
    the same: so two sites can show that they split alike.
    """
    used = manifest.partition
    asked = "dirichlet" if NO_LABELS in manifest.notes else used["name"]
    return {
        "clients": used["clients"],
        "partition": "dirichlet" if asked == "parties" else asked,
        "alpha": used.get("alpha", 0.5),
        "scenario": manifest.scenario["name"],
        "scenario_options": {k: v for k, v in manifest.scenario.items() if k != "name"},
        "seed": manifest.seed,
    }


def differences(one: Manifest, other: Manifest) -> list[str]:
    """What differs, a sentence each; empty exactly if the hashes are equal."""
    found = [
        f"{name}: {getattr(one, name)!r} and {getattr(other, name)!r}"
        for name in ("dataset", "seed", "scenario", "partition", "classes", "notes")
        if getattr(one, name) != getattr(other, name)
    ]
    ours, theirs = ({c.id: c for c in m.clients} for m in (one, other))
    rows = [{row[0] for client in m.clients for row in client.rows} for m in (one, other)]
    for names, which in ((rows[0] - rows[1], "first"), (rows[1] - rows[0], "second")):
        if names:
            found.append(f"{len(names)} of all samples are in the {which} only: {min(names)!r}, …")
    for name in sorted(ours.keys() ^ theirs.keys()):
        found.append(f"client {name} is in the {'first' if name in ours else 'second'} only")
    for name in sorted(ours.keys() & theirs.keys()):
        found += [f"client {name}: {line}" for line in _row_differences(ours[name], theirs[name])]
    if not found and one.sha256 != other.sha256:
        found.append("the order of clients or of their rows")
    return found


def _row_differences(one: ClientHolding, other: ClientHolding) -> list[str]:
    first, second = (
        {row[0]: (row[1:], label) for row, label in zip(c.rows, c.labels, strict=True)}
        for c in (one, other)
    )
    both = first.keys() & second.keys()
    kinds = {
        "held in the first only": first.keys() - second.keys(),
        "held in the second only": second.keys() - first.keys(),
        "that keep other modalities": {n for n in both if first[n][0] != second[n][0]},
        "with another label": {n for n in both if first[n][1] != second[n][1]},
    }
    return [
        f"{len(names)} sample{'s' * (len(names) > 1)} {what}, e.g. {min(names)!r}"
        for what, names in kinds.items()
        if names
    ]


def holdings(manifest: Manifest) -> tuple[ClientSummary, ...]:
    """For each client the numbers of samples by class and modality combination."""
    return tuple(_summary(client, manifest.classes) for client in manifest.clients)


def to_json(manifest: Manifest) -> str:
    """The manifest as JSON text with its hash; one line a client."""
    content = _content(manifest)
    clients = content.pop("clients")
    head = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
    lines = ",\n".join(f"  {json.dumps(client)}" for client in clients)
    body = [*head, f' "clients": [\n{lines}\n ]', f' "sha256": "{manifest.sha256}"']
    return "{\n" + ",\n".join(body) + "\n}\n"


def from_json(text: str, source: str = "manifest") -> Manifest:
    """Read `to_json`'s text. Raises `UserError` naming `source` if it is not that, or changed."""
    try:
        content = json.loads(text)
        written, found = content.pop("format"), content.pop("sha256")
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{source} is not a manifest: no JSON object with a sha256") from error
    if written != FORMAT:
        raise UserError(f"{source} has manifest format {written!r}; this version reads {FORMAT}")
    if found != _digest({"format": FORMAT, **content}):
        raise UserError(
            f"{source} was changed after it was written: its content does not match its sha256; "
            "restore the file or build the manifest anew"
        )
    try:
        return _from_content(content)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{source} is not a manifest: {error}") from error


def save(manifest: Manifest, path: Path | str) -> None:
    """Write the manifest; a reader never sees half of it."""
    target = Path(path)
    draft = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    draft.write_text(to_json(manifest), encoding="utf-8")
    draft.replace(target)


def load(path: Path | str) -> Manifest:
    """Read a manifest and verify its hash. Raises `UserError` naming the file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"manifest {path} cannot be read: {error}") from error
    return from_json(text, source=f"manifest {path}")


def _check_unique(dataset: Dataset) -> None:
    pools = [dataset.train, dataset.flashcards]
    if dataset.parties:
        pools = [dataset.parties[name] for name in sorted(dataset.parties)]
        empty = [name for name in sorted(dataset.parties) if not dataset.parties[name]]
        if empty:
            raise UserError(f"party {empty[0]!r} has no samples: leave it out or give it some")
    counts = Counter(sample.id for pool in pools for sample in pool)
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        raise UserError(
            f"{len(repeated)} sample ids occur more than once, among them {min(repeated)!r}: "
            "ids must be unique within a dataset"
        )


def _shares(
    dataset: Dataset,
    names: Sequence[str],
    assignment: Assignment,
    partition: str,
    alpha: float,
    seed: int,
) -> tuple[_Shares, dict[str, Any], tuple[str, ...]]:
    """Each client's samples, the partition as applied, and notes."""
    if dataset.parties:
        shares = {name: list(dataset.parties[name]) for name in names}
        return shares, {"name": "parties", "clients": len(names)}, ()
    if dataset.flashcards:
        shares, notes = _share_pools(dataset, assignment, seed)
        return shares, {"name": "even", "clients": len(names)}, notes
    return _share_train(dataset.train, names, partition, alpha, seed)


def _share_train(
    train: Sequence[Sample], names: Sequence[str], partition: str, alpha: float, seed: int
) -> tuple[_Shares, dict[str, Any], tuple[str, ...]]:
    ids = [sample.id for sample in train]
    labels = [sample.label for sample in train if sample.label is not None]
    notes: tuple[str, ...] = ()
    used: dict[str, Any] = {"name": partition, "clients": len(names)}
    if partition == "dirichlet" and len(labels) < len(train):
        partitions.check_alpha(alpha)
        used["name"] = "even"
        notes = (NO_LABELS,)
    if used["name"] == "dirichlet":
        used["alpha"] = float(alpha)
        parts = partitions.dirichlet(ids, labels, clients=len(names), alpha=alpha, seed=seed)
    else:
        parts = partitions.even(ids, clients=len(names), seed=seed)
    pairs = zip(names, parts, strict=True)
    return {name: [train[i] for i in part] for name, part in pairs}, used, notes


def _share_pools(
    dataset: Dataset, assignment: Assignment, seed: int
) -> tuple[_Shares, tuple[str, ...]]:
    """Image-holding clients share `train`, text-holding clients the flashcards."""
    shares: _Shares = {name: [] for name in assignment.clients}
    notes = []
    pools = (("train", dataset.train, 0, "images"), ("flashcards", dataset.flashcards, 1, "text"))
    for pool, samples, modality, word in pools:
        holders = [name for name, held in assignment.clients.items() if held[modality]]
        if not holders:
            notes.append(f"no client holds {word}: the {len(samples)} samples of {pool} are unused")
            continue
        parts = partitions.even(
            [sample.id for sample in samples], clients=len(holders), seed=seed, pool=pool
        )
        for name, part in zip(holders, parts, strict=True):
            shares[name] += [samples[i] for i in part]
    return shares, tuple(notes)


def _absent_modality(dataset: Dataset, assignment: Assignment) -> list[str]:
    """A note if no client as such holds a modality of the training images and texts."""
    if dataset.flashcards or scenarios.NEITHER in assignment.clients.values():
        return []
    held = list(assignment.clients.values())
    words = [word for i, word in enumerate(("images", "text")) if not any(keep[i] for keep in held)]
    return [f"no client holds {word}" for word in words]


def _holding(name: str, samples: Sequence[Sample], assignment: Assignment) -> ClientHolding:
    ordered = sorted(samples, key=lambda sample: sample.id)
    return ClientHolding(
        id=name,
        rows=tuple(_row(sample, assignment.keep(name, sample.id)) for sample in ordered),
        labels=tuple(sample.label for sample in ordered),
    )


def _row(sample: Sample, keep: Keep) -> Row:
    image, text = keep[0] and sample.image is not None, keep[1] and sample.text is not None
    if sample.question and not image:
        return sample.id, False, True  # its question, which stays, is text
    return sample.id, image, text


def _class_names(dataset: Dataset) -> tuple[str, ...]:
    """The task's classes, or for labelled open samples the answer of each label."""
    if dataset.task.classes:
        return dataset.task.classes
    answers = {s.label: s.answer for s in dataset.train if s.label is not None}
    return tuple(answers.get(label, str(label)) for label in range(max(answers, default=-1) + 1))


def _summary(client: ClientHolding, classes: tuple[str, ...]) -> ClientSummary:
    tally = Counter(
        ("all" if label is None else classes[label], _COMBINATION[image, text])
        for (_, image, text), label in zip(client.rows, client.labels, strict=True)
    )
    names = [*classes, "all"] if any(name == "all" for name, _ in tally) else list(classes)
    total = len(client.rows)
    return ClientSummary(
        id=client.id,
        samples=total,
        counts={name: {c: tally[name, c] for c in COMBINATIONS} for name in names},
        profile={c: sum(tally[name, c] for name in names) / total for c in COMBINATIONS},
    )


def _content(manifest: Manifest) -> dict[str, Any]:
    """Everything but the hash, in JSON's types."""
    return {
        "format": FORMAT,
        "dataset": manifest.dataset,
        "seed": manifest.seed,
        "scenario": dict(manifest.scenario),
        "partition": dict(manifest.partition),
        "classes": list(manifest.classes),
        "notes": list(manifest.notes),
        "clients": [
            {"id": c.id, "rows": [list(row) for row in c.rows], "labels": list(c.labels)}
            for c in manifest.clients
        ],
    }


def _from_content(content: dict[str, Any]) -> Manifest:
    return Manifest(
        dataset=content["dataset"],
        seed=content["seed"],
        scenario=content["scenario"],
        partition=content["partition"],
        classes=tuple(content["classes"]),
        notes=tuple(content["notes"]),
        clients=tuple(
            ClientHolding(
                id=client["id"],
                rows=tuple((sample, image, text) for sample, image, text in client["rows"]),
                labels=tuple(client["labels"]),
            )
            for client in content["clients"]
        ),
    )


def _digest(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
