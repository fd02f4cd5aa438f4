"""From a config to a plan: the parts put together, and what does not fit said in words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedmllm.algorithms import make_algorithm
from fedmllm.algorithms.gathered import BLOCK
from fedmllm.config import Config, options_of
from fedmllm.data import DATASETS, load_dataset
from fedmllm.data.images import ArchiveImage, ImageFile
from fedmllm.data.sample import ImageSource, Sample, Task
from fedmllm.errors import UserError
from fedmllm.experiment import apply_strategy, make_manifest, own_samples, torch_dtype
from fedmllm.models import model_path
from fedmllm.models.components import make_policy
from fedmllm.models.loading import resolve_dtype
from fedmllm.plan.capacity import Capacity, find_capacity, resident_now
from fedmllm.plan.images import is_cut, largest_image
from fedmllm.plan.memory import Estimate, Load, estimate, shapes_of
from fedmllm.plan.once import Once, count_once
from fedmllm.plan.structure import Skeleton, build_skeleton
from fedmllm.plan.timing import Duration, estimate_time
from fedmllm.plan.traffic import Traffic, count_traffic

if TYPE_CHECKING:
    from rich.console import RenderableType

SCHEMA = 1
TOLERANCE = 0.25  # of the estimate: see docs/memory.md for what was compared with what
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_KNOBS = {
    "training": "lower training.micro_batch or training.max_length, or set "
    "model.gradient_checkpointing=true",
    "testing": "lower evaluation.batch_size",
    "image encoding": "use smaller images or fewer slices",
}


@dataclass(frozen=True)
class Parties:
    """What the data say. sizes: samples by client. test: test samples. images: different ones.
    samples: by client, those that it trains on."""

    sizes: Mapping[str, int]
    test: int
    images: int
    task: Task
    samples: Mapping[str, Sequence[Sample]]

    @property
    def classes(self) -> int:
        """Their number."""
        return len(self.task.classes)


@dataclass(frozen=True)
class Plan:
    """What a run will take. Bytes and parameters are exact, `memory` is an estimate.

    capacity: memory there is, or None if unknown. time: None without a measurement.
    warnings: what will not work. notes: what was assumed.
    """

    config: Config
    skeleton: Skeleton
    traffic: Traffic
    load: Load
    memory: Estimate
    capacity: Capacity | None
    time: Duration | None
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def fits(self) -> bool | None:
        """Whether the estimate is within the memory there is; None if that is unknown."""
        return None if self.capacity is None else self.memory.peak <= self.capacity.bytes

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data; `bytes` and `parameters` as a run's result has them."""
        from fedmllm.plan.table import as_json

        return as_json(self)

    def to_table(self) -> RenderableType:
        """The plan for a console."""
        from fedmllm.plan.table import as_table

        return as_table(self)


def make_plan(
    config: Config,
    *,
    memory: int | None = None,
    tokens: int | None = None,
    slices: int | None = None,
    measured: str | Path | None = None,
) -> Plan:
    """Plan one experiment. Reads the model's config.json and the data's index, no weights.

    memory: bytes to fit into, by default what this machine has. tokens: of the longest sample,
    by default `training.max_length`. slices: of the largest image, by default the most that the
    model cuts. measured: results to take the time from, by default those below ``runs``.
    Raises `UserError` for anything the user can mend.
    """
    runtime = resident_now()
    path = model_path(config.model.name, config.model.path)
    lora = config.lora
    skeleton = build_skeleton(
        path,
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        dtype=resolve_dtype(config.model.dtype, config.model.device),
        policy=make_policy(config.trained["name"], **options_of(config.trained)),
    )
    parties, notes = _parties(config)
    clients = len(parties.sizes) if parties else config.partition.clients
    algorithm = make_algorithm(
        config.algorithm["name"], num_clients=clients, **options_of(config.algorithm)
    )
    text = skeleton.config.get_text_config()
    load = _load(config, skeleton, parties, tokens=tokens, slices=slices)
    once = _once(config, skeleton, load, parties)
    traffic = count_traffic(
        apply_strategy(
            config,
            algorithm,
            layers=text.num_hidden_layers,
            classes=parties.classes if parties else 1,
            width=text.hidden_size,
        ),
        skeleton.adapter,
        skeleton.component_of,
        topology=config.topology,
        clients=clients,
        cohort=config.training.clients_per_round,
        rounds=config.training.rounds,
        once=once.parts,
    )
    slots = len(algorithm.init({}).slots)
    load = replace(
        load,
        four_bit=config.model.quantization == "nf4",
        copies=_copies(slots, clients, control=algorithm.local.control),
        blocks=_blocks(config, 4 * skeleton.trainable * traffic.cohort),
    )
    estimated = estimate(skeleton, load, runtime=runtime)
    capacity = find_capacity(config.model.device, memory)
    time = estimate_time(config, parties.sizes, parties.test, measured) if parties else None
    return Plan(
        config=config,
        skeleton=skeleton,
        traffic=traffic,
        load=load,
        memory=estimated,
        capacity=capacity,
        time=time,
        warnings=tuple(_warnings(config, skeleton, load, estimated, capacity)),
        notes=(
            *notes,
            *_strategy_notes(config, parties, once),
            *_disk_notes(config, 4 * skeleton.trainable * traffic.cohort),
            *_unknown_quantisation(skeleton),
            *_image_notes(skeleton, load),
            *_notes(config, load, estimated, capacity, time),
        ),
    )


def parse_size(text: str) -> int:
    """Bytes of ``24GB`` (10^9), ``24GiB`` (2^30), ``512 MB`` or plain ``24000000000``.

    Raises `UserError` for anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = found[2].upper() if found else None
    if unit is not None and unit in ("K", "M", "G", "T"):
        unit += "B"
    if found is None or unit not in _UNITS or not float(found[1]):
        raise UserError(f"memory {text!r} is not a size: write it like 24GB, 24GiB or 800MB")
    return int(float(found[1]) * _UNITS[unit])


# -- the run's load --------------------------------------------------------------------------


def _parties(config: Config) -> tuple[Parties | None, list[str]]:
    """Who holds how much, drawn as a run draws it; None and a note if the data cannot be read."""
    options = dict(config.data)
    if "verify" in DATASETS[config.data["name"]].options:
        options["verify"] = False  # the images stay closed
    try:
        dataset = load_dataset(**options)
        held = make_manifest(config, dataset)
    except UserError as error:
        reason = str(error).splitlines()[0]
        return None, [f"the data cannot be read, so that clients are those of the config: {reason}"]
    samples = [*dataset.train, *dataset.test, *dataset.flashcards]
    return (
        Parties(
            sizes={client.id: len(client.rows) for client in held.clients},
            test=len(dataset.test),
            images=len({_picture(sample.image) for sample in samples if sample.image is not None}),
            task=dataset.task,
            samples=own_samples(config, dataset, held)[0],
        ),
        [],
    )


def _picture(source: ImageSource) -> str:
    """What tells pictures apart without reading them: a file's key is a digest of its bytes."""
    return str(source.file) if isinstance(source, ImageFile | ArchiveImage) else source.key


def _load(
    config: Config,
    skeleton: Skeleton,
    parties: Parties | None,
    *,
    tokens: int | None,
    slices: int | None,
) -> Load:
    training = config.training
    text = skeleton.config.get_text_config()
    longest = min(
        tokens or training.max_length,
        getattr(text, "max_position_embeddings", None) or training.max_length,
    )
    return Load(
        tokens=longest,
        slices=slices or largest_image(skeleton.config, skeleton.images, limit=longest).slices,
        batch=training.micro_batch * _at_once(config),
        test_batch=config.evaluation.batch_size,
        dropout=config.lora.dropout,
        adam=training.optimizer == "adamw",
        checkpointing=config.model.gradient_checkpointing,
        cuda=config.model.device.startswith("cuda"),
        itemsize=torch_dtype(config).itemsize,
        images=parties.images if parties else None,
        generates=parties.task.kind == "open" if parties else True,
        connector=config.trained["connector"] == "full",
        vision=config.trained["vision"] == "lora",
        feature_memory=round(config.model.feature_memory_gb * 1e9),
    )


def _once(config: Config, skeleton: Skeleton, load: Load, parties: Parties | None) -> Once:
    """What crosses before the first round; nothing if the data are unknown."""
    if parties is None:
        return Once()
    shapes = shapes_of(skeleton, tokens=load.tokens)
    cut = largest_image(skeleton.config, skeleton.images, limit=load.tokens)
    return count_once(
        config,
        parties.task,
        parties.samples,
        width=shapes.D,
        numbers=load.slices * shapes.image_tokens * shapes.levels * shapes.D,
        same_size=cut.slices == 1 and not is_cut(skeleton.config),
        picture=_picture,
    )


def _at_once(config: Config) -> int:
    """Clients that share a forward pass; with full copies or LoRA in the tower, one."""
    alone = config.topology != "federated" or {*options_of(config.trained).values()} != {"frozen"}
    training = config.training
    return 1 if alone else min(training.clients_at_once, training.clients_per_round)


def _copies(slots: int, clients: int, *, control: bool) -> int:
    """Float32 copies of the adapter outside the model: theta, the client's theta and update, the
    sum of updates in float64, the next theta, a checkpoint on its way to disk; each server slot
    twice; SCAFFOLD's four of a client at work and one kept for each client."""
    return 7 + 2 * slots + (4 + clients if control else 0)


def _blocks(config: Config, updates: int) -> int:
    """Bytes of what an aggregation looks at together, of all updates of a round in bytes: read, and
    once more in float64 for Krum's distances or in another order to be sorted."""
    return 0 if config.aggregation["name"] == "mean" else 3 * min(BLOCK, updates)


# -- words -----------------------------------------------------------------------------------


def _warnings(
    config: Config,
    skeleton: Skeleton,
    load: Load,
    found: Estimate,
    capacity: Capacity | None,
) -> list[str]:
    lines = []
    if capacity is not None and found.peak > capacity.bytes:
        lines.append(
            f"will not fit: about {size(found.peak)} are needed and {capacity} is there; most goes "
            f"into {_most(found)}: {_advice(found, load)}"
        )
    elif capacity is not None and found.peak * (1 + TOLERANCE) > capacity.bytes:
        lines.append(
            f"may not fit: about {size(found.peak)} are needed and {capacity} is there, and the "
            f"estimate may be {TOLERANCE:.0%} short: {_advice(found, load)}"
        )
    pictures = load.slices * shapes_of(skeleton, tokens=load.tokens).image_tokens
    if pictures >= load.tokens:
        lines.append(
            f"an image of {load.slices} slices takes {pictures:,} tokens, and a sample may have "
            f"{load.tokens:,}: raise training.max_length or use smaller images"
        )
    if load.cuda and not torch.cuda.is_available():
        lines.append(f"device {config.model.device} is not on this machine: a run here would stop")
    return lines


def _most(found: Estimate) -> str:
    weights = found.resident["weights"]
    return "weights" if weights > found.peak / 2 else f"{found.phase}"


def _advice(found: Estimate, load: Load) -> str:
    if _most(found) != "weights":
        return _KNOBS[found.phase]
    return (
        "use a smaller dtype or model"
        if load.four_bit
        else "use 4 bit (model.quantization=nf4) or a smaller dtype"
    )


def _notes(
    config: Config,
    load: Load,
    found: Estimate,
    capacity: Capacity | None,
    time: Duration | None,
) -> list[str]:
    lines = [
        f"memory is an estimate (docs/memory.md), for samples of {load.tokens:,} tokens and "
        f"images of {load.slices} slice{'s' * (load.slices > 1)}"
    ]
    if found.host is not None:
        lines.append(f"main memory beside the GPU: about {size(found.host)} while loading")
    if capacity is None:
        lines.append(f"memory of {config.model.device} is not known here: give --memory")
    if time is None:
        lines.append("time: no measured run of this model and data on this machine was found")
    return lines


def _image_notes(skeleton: Skeleton, load: Load) -> list[str]:
    """What was assumed of images, unless somebody said how they are cut."""
    cut = largest_image(skeleton.config, skeleton.images, limit=load.tokens)
    return [cut.note] if cut.note and cut.slices == load.slices else []


def _strategy_notes(config: Config, parties: Parties | None, once: Once) -> list[str]:
    strategy, lines = config.strategy, []
    if strategy.uses_views:
        lines.append(
            "masked views: a second pass for every sample with both modalities; memory is that of "
            "one pass"
        )
    if once.bound:
        lines.append(f"bytes of {' and '.join(once.bound)} are the most that may cross")
    exchanges = strategy.uses_profiles or strategy.mixtures or strategy.evidence
    if parties is None and config.topology == "federated":
        if exchanges:
            lines.append("the data are not known: bytes before the first round are not counted")
        if strategy.prototypes:
            lines.append("the classes are not known: prototypes are counted for one")
    return lines


def _disk_notes(config: Config, updates: int) -> list[str]:
    name = config.aggregation["name"]
    return (
        []
        if name == "mean"
        else [
            f"aggregation {name}: a round's updates lie in the run's "
            f"folder until its end, {size(updates)}"
        ]
    )


def _unknown_quantisation(skeleton: Skeleton) -> list[str]:
    own = skeleton.quantization
    if not own or own.get("load_in_4bit"):
        return []
    method = own.get("quant_method", "unnamed")
    return [f"quantisation {method!r} other than 4 bit is not known here: counted without it"]


def size(count: float) -> str:
    """Bytes in words; a MB is 10^6 bytes."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= 0.9995 * scale:
            return f"{count / scale:,.{0 if count >= 100 * scale else 1}f} {unit}"
    return f"{count:.0f} bytes"
