"""What a federated algorithm is: two pure functions around a streamed mean.

    state = algorithm.init(params)
    mean  = StreamingMean(algorithm.weighting); mean.fold(update) for each update as it arrives
    state = algorithm.step(state, mean)

In place of the mean there may be another `Aggregation`, such as the median.

State goes in and state comes out, so checkpoints, resuming and tests come free (the shape is
that of google/fedjax). FedProx, FedAvgM and the FedOpt family are FedAvg with another local
objective or another server optimiser, not loops of their own.

Notation, as in the papers: theta is the global adapter, d_k = theta_k - theta the update of
client k, n_k its number of samples, S the cohort of a round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from fedmllm.errors import UserError, unknown

Params = dict[str, torch.Tensor]
"""PEFT adapter keys -> float32 CPU tensors, in sorted order of names."""


@dataclass(frozen=True)
class Update:
    """What one client sends back after local training.

    delta: d_k = theta_k - theta. extra: further averaged tensors by slot name, e.g. SCAFFOLD's
    ``{"control": c_k_new - c_k_old}``. num_samples: n_k > 0. metrics: e.g. ``{"loss": 0.7}``.
    """

    client: str
    num_samples: int
    delta: Params
    extra: Mapping[str, Params] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ServerState:
    """The server between two rounds: all that a resumed run needs of it.

    round: number of rounds done. slots: the server optimiser's moments and SCAFFOLD's control.
    """

    round: int
    params: Params
    slots: Mapping[str, Params] = field(default_factory=dict)


WEIGHTINGS = ("samples", "uniform")


class Aggregate(Protocol):
    """The updates of a round on their way to one: what a server optimiser asks.

    count: updates folded so far. chosen: the clients of which the result is made, where a rule
    picks some; empty before and where all take part.
    """

    count: int
    chosen: tuple[str, ...]

    def fold(self, update: Update, scale: float = 1.0) -> None:
        """Add one update, with a factor on its weight. Raises `UserError` if it cannot be taken."""
        ...

    def delta(self) -> Params:
        """What stands for all d_k, float32, sorted by name; only once. The caller owns it."""
        ...

    def extra(self, slot: str) -> Params:
        """The uniform mean of an extra; only once."""
        ...


class StreamingMean:
    """Mean of updates, folded one by one: memory does not grow with the number of clients.

    weighting ``samples`` weights d_k by n_k (each sample counts the same, the FedAvg objective);
    ``uniform`` weights every client alike (Reddi et al. 2021, Algorithm 2). Extras are always
    averaged uniformly (SCAFFOLD, Algorithm 1, line 17). The caller folds in cohort order, which
    makes it bit-stable. How sums are kept, and their error: `WeightedSum`.
    """

    def __init__(self, weighting: str) -> None:
        if weighting not in WEIGHTINGS:
            raise UserError(unknown("weighting", weighting, WEIGHTINGS))
        self.weighting = weighting
        self.count = 0
        self.chosen: tuple[str, ...] = ()
        self._delta = WeightedSum()
        self._extra: dict[str, WeightedSum] = {}

    def fold(self, update: Update, scale: float = 1.0) -> None:
        """Add one update. scale: a positive factor on its weight; the extras have none.

        Raises `UserError` naming the client if the update claims no samples, is not finite or has
        other tensors than the updates before it; the sums are then as they were.
        """
        check_update(update)
        self._check_same_layout(update)
        weight = update.num_samples if self.weighting == "samples" else 1
        self._delta.add(update.delta, weight if scale == 1 else weight * scale)
        for slot, values in update.extra.items():
            self._extra.setdefault(slot, WeightedSum()).add(values, 1)
        self.count += 1

    def delta(self) -> Params:
        """The weighted mean of d_k, float32; only once, since it frees the sums.

        Raises ValueError before the first fold and the second time.
        """
        return self._delta.take()

    def extra(self, slot: str) -> Params:
        """The uniform mean of an extra over the clients folded so far; only once as well."""
        if self.count and slot not in self._extra:
            raise UserError(
                f"the updates carry no {slot!r}: clients and server must run the same algorithm"
            )
        return self._extra.get(slot, WeightedSum()).take()

    def _check_same_layout(self, update: Update) -> None:
        if not self.count:
            return
        who = f"update of {update.client}"
        check_layout(self._delta.near, update.delta, who)
        if update.extra.keys() != self._extra.keys():
            raise UserError(
                f"{who} carries extras {sorted(update.extra)}, but those before it carry "
                f"{sorted(self._extra)}: all clients must run the same algorithm"
            )
        for slot, values in update.extra.items():
            check_layout(self._extra[slot].near, values, f"{slot} in the {who}")


GROUP = 16
"""Updates that are added up in float32 before their sum goes into a float64 one."""


class WeightedSum:
    """sum_k w_k x_k in the memory of three adapters (of one, below `GROUP` terms).

    A float64 sum of every term takes twice as long: it moves more bytes and converts each number.
    So up to `GROUP` terms are added up in float32, and such sums in float64. The rounding error is
    that of one group: at most 2 GROUP 2^-24 = 2e-6 of the weighted mean of |x_k|, however many
    clients. Weights are relative to the first, so that the mean of one client is its own update.
    """

    def __init__(self) -> None:
        self.near: Params = {}  # of this group
        self._far: Params = {}  # of the groups before it
        self._terms = 0
        self._unit = self._total = 0.0

    def add(self, values: Params, weight: float) -> None:
        """Add a term; its tensors stay the caller's."""
        if self._terms:
            for name, value in values.items():
                self.near[name].add_(value, alpha=weight / self._unit)
        else:
            self._unit = weight
            self.near = in_one_piece(values, torch.float32)
            for name, value in values.items():
                self.near[name].copy_(value)
        self._terms += 1
        self._total += weight
        if self._terms % GROUP == 0:
            self._flush()

    def _flush(self) -> None:
        self._far = self._far or in_one_piece(self.near, torch.float64)
        for name, value in self.near.items():
            self._far[name].add_(value)
            value.zero_()

    def take(self) -> Params:
        """sum_k w_k x_k / sum_k w_k, float32; the sums are freed by it, so only once.

        Raises ValueError without terms.
        """
        if not self._terms:
            raise ValueError("there is no mean of no updates, and a mean is taken only once")
        share, mean, far = self._unit / self._total, self.near, self._far
        for name, value in mean.items():
            value.copy_(far[name].add_(value).mul_(share) if far else value.mul_(share))
        self.near, self._far, self._terms = {}, {}, 0
        return mean


ServerOptimizer = Callable[[ServerState, Aggregate], ServerState]


@dataclass(frozen=True)
class Aggregation:
    """How the updates of a round become one. The default is the mean; others are in `aggregation`.

    needed: the fewest updates that it is defined for. begin: (weighting, folder) -> an aggregate of
    no updates yet; the folder is for what does not stay in memory, None for the system's own.
    knobs: the options that `needed` follows from.
    """

    name: str = "mean"
    needed: int = 1
    begin: Callable[[str, Path | None], Aggregate] = lambda weighting, folder: StreamingMean(
        weighting
    )
    knobs: tuple[str, ...] = ()


def check_enough(aggregation: Aggregation, count: int, what: str) -> None:
    """Raise `UserError` if rounds of `count` updates are too small. what: says so, in words."""
    if count < aggregation.needed:
        lower = "".join(f", lower aggregation.{name}" for name in aggregation.knobs)
        raise UserError(
            f"aggregation {aggregation.name} needs at least {aggregation.needed} updates a round, "
            f"and {what}: raise it{lower} or use aggregation mean"
        )


@dataclass(frozen=True)
class Proximal:
    """mu/2 * weight * ||theta - theta_global||^2 over the adapters of the decoder layers
    s <= l <= L-1-s, with s = `edge_layers`. A client multiplies it by a weight of its own."""

    mu: float = 0.0
    weight: float = 1.0
    edge_layers: int = 0


@dataclass(frozen=True)
class Alignment:
    """What a client adds to a sample's loss so that its reading depends less on which modalities
    are there; `fedmllm.alignment` has the terms. All off by default.

    prototypes: weight of the distance to the prototype of the sample's class. prototype_loss,
        temperature: which distance, and the temperature of the contrastive one.
    distillation: weight of the distance from a masked view to the whole sample.
        distillation_target: of answers' tokens (``logits``) or of representations (``hidden``).
    views: weight of the loss of the masked view's own answer.
    incomplete: factor on the loss of a sample that lacks a modality.
    """

    prototypes: float = 0.0
    prototype_loss: str = "cosine"
    temperature: float = 0.1
    distillation: float = 0.0
    distillation_target: str = "logits"
    views: float = 0.0
    incomplete: float = 1.0


@dataclass(frozen=True)
class Composition:
    """What stands in an epoch for a sample that lacks a modality; `fedmllm.recombination`.

    recombine: probability to complete it with that of another sample of its party and answer.
    resample: probability that a whole sample of its party takes its place.
    """

    recombine: float = 0.0
    resample: float = 0.0


@dataclass(frozen=True)
class LocalObjective:
    """What an algorithm or strategy adds to a client's own loss.

    mu: FedProx's coefficient: the term is mu/2 * ||theta - theta_global||^2.
    control: correct gradients with SCAFFOLD's control variates.
    adaptive: a second proximal term, that of the strategy: FedProx may have both.
    alignment: what the strategies add to the loss of a sample.
    composition: what the strategies make of samples that lack a modality.
    """

    mu: float = 0.0
    control: bool = False
    adaptive: Proximal = Proximal()
    alignment: Alignment = Alignment()
    composition: Composition = Composition()


@dataclass(frozen=True)
class Algorithm:
    """A federated algorithm.

    name: registry name. init: the first state, with the slots that the step needs.
    step: the server optimiser. local: what clients add. broadcast: slots sent to the clients.
    aggregation: what the step gets of the updates.
    """

    name: str
    weighting: str
    init: Callable[[Params], ServerState]
    step: ServerOptimizer
    local: LocalObjective = LocalObjective()
    broadcast: tuple[str, ...] = ()
    aggregation: Aggregation = Aggregation()


def zeros_like(params: Params) -> Params:
    """Zeros of the same names and shapes."""
    return {name: torch.zeros_like(value) for name, value in params.items()}


def in_one_piece(like: Params, dtype: torch.dtype) -> Params:
    """Zeros of these names (sorted), shapes and device in one piece of memory.

    It goes back to the system as one; hundreds of small pieces leave holes, of which the next
    round's tensors do not make use.
    """
    device = next(iter(like.values())).device if like else None  # a plan's is the meta device
    total = sum(value.numel() for value in like.values())
    return cut(torch.zeros(total, dtype=dtype, device=device), like)


def cut(flat: torch.Tensor, like: Params) -> Params:
    """One row of numbers as tensors of these names (sorted) and shapes, in the same memory."""
    names = sorted(like)
    pieces = flat.split([like[name].numel() for name in names])
    return {n: piece.view(like[n].shape) for n, piece in zip(names, pieces, strict=True)}


def check_layout(expected: Params, given: Params, what: str) -> None:
    """Raise `UserError` unless `given` has the names and shapes of `expected`, in any order."""
    missing = sorted(expected.keys() - given.keys())
    excess = sorted(given.keys() - expected.keys())
    if missing or excess:
        raise UserError(
            f"{what} has other tensors than expected (missing: {_few(missing)}; "
            f"not expected: {_few(excess)}): all parties must train the same adapter"
        )
    for name, value in expected.items():
        if value.shape != given[name].shape:
            raise UserError(
                f"{what} has shape {tuple(given[name].shape)} at {name}, but "
                f"{tuple(value.shape)} is expected: all parties must use the same LoRA rank"
            )


def _few(names: list[str], limit: int = 3) -> str:
    listed = ", ".join(names[:limit]) or "none"
    return listed + (f" and {len(names) - limit} more" if len(names) > limit else "")


def check_update(update: Update) -> None:
    """Raise `UserError` if an update claims no samples or is not finite."""
    if update.num_samples <= 0:
        raise UserError(
            f"update of {update.client} claims {update.num_samples} samples: at least 1 is needed"
        )
    _check_finite(update.delta, update.client)
    for slot, values in update.extra.items():
        _check_finite(values, update.client, f"{slot} ")


def _check_finite(values: Params, client: str, prefix: str = "") -> None:
    for name, value in values.items():
        value = value.to(torch.float32)  # as it will be added up: a larger number is infinite there
        # a finite sum has finite terms; only where it is not (it may overflow) each is looked at
        if not math.isfinite(value.sum().item()) and not torch.isfinite(value).all():
            raise UserError(
                f"update of {client} is not finite at {prefix}{name}: its training diverged; "
                "lower training.lr or look at that client's data"
            )
