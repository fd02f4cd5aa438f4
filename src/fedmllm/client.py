"""Local training: one client, one round. State in, update out.

    update, memory = train_client(mllm, theta, samples, ...)

The client starts at the global adapter theta, makes a few passes over its own samples and
returns d_k = theta_k - theta. Nothing is kept between rounds but what is returned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedmllm.algorithms.base import LocalObjective, Params, Update, zeros_like
from fedmllm.errors import UserError
from fedmllm.models.mllm import Encoded, Mllm
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
) -> tuple[Update, Params | None]:
    """Train from `params` on the client's own samples.

    broadcast: slots of the server (SCAFFOLD: ``control``). memory: what this client kept from
    its last round (SCAFFOLD: its control c_k), or None at first.
    Returns the update and the client's new memory. Raises `UserError` if the loss diverges.
    """
    if not samples:
        raise UserError(f"{client} has no samples to train on")
    mllm.set_adapter(params)
    tensors = list(mllm.trainable.values())
    optimizer = _optimizer(tensors, lr, plan)
    control = _ControlVariates.of(objective, broadcast, memory, params)
    losses = []
    with mllm.training(stream_seed(seed, "dropout", client, round_)):
        for batch in _batches(samples, plan, seed=seed, client=client, round_=round_):
            optimizer.zero_grad(set_to_none=True)
            losses.append(_backward(mllm, batch, plan.micro_batch))
            if not math.isfinite(losses[-1]):
                raise UserError(
                    f"the loss of {client} in round {round_} is {losses[-1]}: lower training.lr "
                    f"(now {lr:g}) or look at samples {', '.join(item.id for item in batch[:4])}"
                )
            add_proximal_gradient(mllm, params, objective)
            if plan.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(tensors, plan.max_grad_norm)
            control.correct(mllm)
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    after = mllm.get_adapter()
    delta = {name: after[name] - params[name] for name in params}
    extra, memory = control.finish()
    metrics = {"loss": float(np.mean(losses))}
    return Update(client, len(samples), delta, extra, metrics), memory


def add_proximal_gradient(mllm: Mllm, params: Params, objective: LocalObjective) -> None:
    """Add the gradient of mu/2 * w * ||theta - theta_global||^2: mu * w * (theta - theta_global).

    Over the adapters of decoder layers s <= l <= L-1-s with s = `edge_layers`; s = 0 and w = 1
    is FedProx (Li et al., MLSys 2020), which holds what is trained outside the decoder as well.
    With mu = 0 nothing is touched.
    """
    strength = objective.mu * objective.weight
    if not strength:
        return
    first, last = objective.edge_layers, mllm.num_layers - 1 - objective.edge_layers
    for name, value in mllm.trainable.items():
        layer = mllm.layer_of.get(name)
        held = first <= layer <= last if layer is not None else objective.edge_layers == 0
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

    def correct(self, mllm: Mllm) -> None:
        for name, value in mllm.trainable.items():
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

    def correct(self, mllm: Mllm) -> None:
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


def _batches(
    samples: Sequence[Encoded], plan: LocalPlan, *, seed: int, client: str, round_: int
) -> Iterator[list[Encoded]]:
    """The round's optimiser steps: a fresh order for each epoch, from (seed, client, round)."""
    for epoch in range(plan.epochs):
        order = stream(seed, "order", client, round_, epoch).permutation(len(samples))
        for start in range(0, len(order), plan.batch_size):
            yield [samples[i] for i in order[start : start + plan.batch_size]]


def _backward(mllm: Mllm, batch: list[Encoded], micro_batch: int) -> float:
    """Accumulate the gradient of the mean loss of `batch`; returns that loss."""
    total = 0.0
    for start in range(0, len(batch), micro_batch):
        loss = mllm.loss_sum(batch[start : start + micro_batch]) / len(batch)
        loss.backward()
        total += float(loss.detach())
    return total
