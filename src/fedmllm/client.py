"""Local training: one client, one round. State in, update out.

    update, memory = train_client(mllm, theta, samples, ...)

The client starts at the global adapter theta, makes a few passes over its own samples and
returns d_k = theta_k - theta. Nothing is kept between rounds but what is returned.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from fedmllm.algorithms.base import (
    Composition,
    LocalObjective,
    Params,
    Proximal,
    Update,
    zeros_like,
)
from fedmllm.alignment import Terms
from fedmllm.errors import UserError
from fedmllm.models.mllm import Mllm
from fedmllm.models.passes import Encoded, Reading
from fedmllm.recombination import compose
from fedmllm.rng import stream, stream_seed


@dataclass(frozen=True)
class LocalPlan:
    """How a client trains.

    epochs: passes over its samples per round. batch_size: samples per optimiser step.
    micro_batch: samples per forward pass; changes memory and speed, not the gradient.
    optimizer: ``adamw`` or ``sgd``. beta1, beta2, weight_decay: AdamW's. max_grad_norm: clip
    the gradient's global norm; 0 turns it off.
    """

    epochs: int = 1
    batch_size: int = 8
    micro_batch: int = 8
    optimizer: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0


def learning_rate(round_: int, *, rounds: int, peak: float, warmup: float = 0.01) -> float:
    """Learning rate of round 1..rounds: linear warm-up over a share of them, then cosine to 0.

    With w = floor(warmup * rounds): peak * r / w while r <= w, afterwards
    peak/2 * (1 + cos(pi * (r - 1 - w) / (rounds - w))).
    """
    w = math.floor(warmup * rounds)
    if round_ <= w:
        return peak * round_ / w
    return peak / 2 * (1 + math.cos(math.pi * (round_ - 1 - w) / (rounds - w)))


def train_client(
    mllm: Mllm,
    params: Params,
    samples: Sequence[Encoded],
    *,
    client: str,
    round_: int,
    seed: int,
    lr: float,
    plan: LocalPlan,
    objective: LocalObjective,
    broadcast: Mapping[str, Params] | None = None,
    memory: Params | None = None,
    weight: float = 1.0,
) -> tuple[Update, Params | None]:
    """Train from `params` on the client's own samples.

    broadcast: slots of the server (SCAFFOLD: ``control``; alignment: ``prototypes``). memory: what
    this client kept from its last round (SCAFFOLD: its control c_k), or None at first. weight: of
    this client in the adaptive regularisation.
    Returns the update and the client's new memory. Raises `UserError` if the loss diverges.
    """
    job = Job(client, samples, memory, weight)
    mllm.set_adapter(params)
    local = LocalTraining(
        mllm,
        params,
        job,
        round_=round_,
        seed=seed,
        lr=lr,
        plan=plan,
        objective=objective,
        broadcast=broadcast,
    )
    with mllm.training(dropout_seed(seed, client, round_)):
        for batch in local.batches():
            local.step(batch, _backward(mllm, local.terms, batch, plan.micro_batch))
    return local.result()


def dropout_seed(seed: int, client: str, round_: int) -> int:
    """What a client's dropout is drawn from in a round."""
    return stream_seed(seed, "dropout", client, round_)


@dataclass(frozen=True)
class Job:
    """Whose turn it is: a client, its samples, what it kept from its last round, and its weight
    in the adaptive regularisation."""

    client: str
    samples: Sequence[Encoded]
    memory: Params | None = None
    weight: float = 1.0


class Adapter(Protocol):
    """Tensors in training by name, and where they stand; an `Mllm` is one."""

    @property
    def trainable(self) -> Mapping[str, torch.nn.Parameter]: ...

    @property
    def layer_of(self) -> Mapping[str, int]: ...

    @property
    def num_layers(self) -> int: ...


class LocalTraining:
    """A client's round but for its gradients: batches, optimiser, control variates, losses.

    terms: what its loss is made of beside its samples' own losses. The gradients come from
    `train_client` or, for many clients at once, from `train_cohort`.
    Raises `UserError` if the client has no samples.
    """

    def __init__(
        self,
        adapter: Adapter,
        params: Params,
        job: Job,
        *,
        round_: int,
        seed: int,
        lr: float,
        plan: LocalPlan,
        objective: LocalObjective,
        broadcast: Mapping[str, Params] | None = None,
    ) -> None:
        if not job.samples:
            raise UserError(f"{job.client} has no samples to train on")
        self.adapter, self.params, self.job, self.plan = adapter, params, job, plan
        self.round, self.seed, self.lr, self.objective = round_, seed, lr, objective
        self.tensors = list(adapter.trainable.values())
        self.optimizer = _optimizer(self.tensors, lr, plan)
        self.optimizer.zero_grad(set_to_none=True)
        self.control = _ControlVariates.of(objective, broadcast, job.memory, params)
        self.losses: list[float] = []
        self.terms = Terms(
            objective.alignment, broadcast or {}, job.client, round_, seed, plan.epochs - 1
        )

    def batches(self) -> Iterator[list[Encoded]]:
        """The round's optimiser steps: a fresh order for each epoch, from (seed, client, round).

        Where a step takes several micro-batches, its samples are cut into them by length.
        """
        samples, size = self.job.samples, self.plan.batch_size
        for epoch in range(self.plan.epochs):
            self.terms.epoch = epoch
            draw = stream(self.seed, "order", self.job.client, self.round, epoch)
            order = draw.permutation(len(samples))
            made = self._composed(order, epoch)
            for start in range(0, len(order), size):
                # a party's samples are encoded as they are first asked for
                step = [
                    made[i] if made else samples[order[i]]
                    for i in range(start, min(start + size, len(order)))
                ]
                yield longest_first(step) if self.plan.micro_batch < size else step

    def _composed(self, order: Iterable[int], epoch: int) -> list[Encoded]:
        """An epoch's samples in order, composed; empty where each stays as it is."""
        if self.objective.composition == Composition():
            return []
        return compose(
            [self.job.samples[i] for i in order],
            self.objective.composition,
            client=self.job.client,
            round_=self.round,
            epoch=epoch,
            seed=self.seed,
        )

    def step(self, batch: Sequence[Encoded], loss: float) -> None:
        """One optimiser step with the gradients that `batch` has left; then they are gone.

        loss: the mean of its samples' own losses. Raises `UserError` if it is not finite.
        """
        self.losses.append(loss)
        if not math.isfinite(loss):
            raise UserError(
                f"the loss of {self.job.client} in round {self.round} is {loss}: lower "
                f"training.lr (now {self.lr:g}) or look at samples "
                f"{', '.join(item.id for item in batch[:4])}"
            )
        own = self.objective
        add_proximal_gradient(self.adapter, self.params, Proximal(own.mu))
        add_proximal_gradient(self.adapter, self.params, own.adaptive, weight=self.job.weight)
        if self.plan.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.tensors, self.plan.max_grad_norm)
        self.control.correct(self.adapter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def result(self) -> tuple[Update, Params | None]:
        """The update and the client's new memory."""
        delta = {
            name: value.detach().to("cpu", torch.float32) - self.params[name]
            for name, value in self.adapter.trainable.items()
        }
        extra, memory = self.control.finish()
        sums, found = self.terms.finish()
        metrics = {"loss": float(np.mean(self.losses)), **found}
        extra = {**extra, **sums}
        return Update(self.job.client, len(self.job.samples), delta, extra, metrics), memory


def add_proximal_gradient(
    adapter: Adapter, params: Params, term: Proximal, *, weight: float = 1.0
) -> None:
    """Add the gradient of mu/2 * w * ||theta - theta_global||^2: mu * w * (theta - theta_global).

    w: the term's weight times `weight`, the client's own. Over the adapters of decoder layers
    s <= l <= L-1-s with s = `edge_layers`; s = 0 and w = 1 is FedProx (Li et al., MLSys 2020),
    which holds what is trained outside the decoder as well. With mu = 0 nothing is touched.
    """
    strength = term.mu * term.weight * weight
    if not strength:
        return
    first, last = term.edge_layers, adapter.num_layers - 1 - term.edge_layers
    for name, value in adapter.trainable.items():
        layer = adapter.layer_of.get(name)
        held = first <= layer <= last if layer is not None else term.edge_layers == 0
        if value.grad is not None and held:
            anchor = params[name].to(value.device, value.dtype)
            value.grad.add_(value.detach() - anchor, alpha=strength)


class _ControlVariates:
    """SCAFFOLD's correction of each step, g - c_k + c, and the client's next control.

    c_k_new is the mean of the client's own (clipped) gradients over the round. Under SGD this is
    Option II of the paper, c_k - c + (theta - theta_k) / (K * lr), to rounding; unlike that
    formula it stays a mean gradient under AdamW, whose steps are not gradients.
    """

    def __init__(self, server: Params, own: Params) -> None:
        self.server, self.own = server, own
        self.total, self.steps = zeros_like(own), 0

    @staticmethod
    def of(
        objective: LocalObjective,
        broadcast: Mapping[str, Params] | None,
        memory: Params | None,
        params: Params,
    ) -> _ControlVariates:
        if not objective.control:
            return _NoControl({}, {})
        server = (broadcast or {}).get("control") or zeros_like(params)
        return _ControlVariates(server, memory if memory is not None else zeros_like(params))

    def correct(self, adapter: Adapter) -> None:
        for name, value in adapter.trainable.items():
            if value.grad is None:  # a connector, in a batch without images
                value.grad = torch.zeros_like(value)
            self.total[name].add_(value.grad.detach().to("cpu", torch.float32))
            shift = self.server[name] - self.own[name]
            value.grad.add_(shift.to(value.device, value.dtype))
        self.steps += 1

    def finish(self) -> tuple[dict[str, Params], Params | None]:
        new = {name: value / self.steps for name, value in self.total.items()}
        change = {name: new[name] - self.own[name] for name in new}
        return {"control": change}, new


class _NoControl(_ControlVariates):
    """Every algorithm but SCAFFOLD."""

    def correct(self, adapter: Adapter) -> None:
        return

    def finish(self) -> tuple[dict[str, Params], Params | None]:
        return {}, None


def _optimizer(
    tensors: list[torch.nn.Parameter], lr: float, plan: LocalPlan
) -> torch.optim.Optimizer:
    if plan.optimizer == "sgd":
        return torch.optim.SGD(tensors, lr=lr)
    return torch.optim.AdamW(
        tensors, lr=lr, betas=(plan.beta1, plan.beta2), weight_decay=plan.weight_decay
    )


def longest_first(step: Sequence[Encoded]) -> list[Encoded]:
    """A step's samples by falling length, so that a micro-batch is padded little."""
    return sorted(step, key=len, reverse=True)


def _backward(mllm: Mllm, terms: Terms, batch: list[Encoded], micro_batch: int) -> float:
    """Accumulate the gradient of the mean loss of `batch` with its `terms`; returns the mean of
    the samples' own losses.

    Masked views pass after the whole samples, whose side of the terms is a constant: so memory
    is that of one pass.
    """
    total = 0.0
    for start in range(0, len(batch), micro_batch):
        part = batch[start : start + micro_batch]
        loss, own = whole_loss(terms, part, mllm.read(part), len(batch))
        loss.backward()
        total += float(own)
        if views := terms.views(part):
            (terms.view_loss(views, mllm.read(views)) / len(batch)).backward()
    return total


def whole_loss(
    terms: Terms, part: Sequence[Encoded], found: Reading, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What whole samples add to the loss of a step of `size` samples, and the part of it that is
    their own loss, without gradient."""
    return terms.loss(part, found) / size, found.losses.detach().sum() / size
