"""Local training of many clients at once: one pass of the shared base, each client's own adapter.

    results = train_cohort(mllm, theta, [Job("client-00", samples), ...], ...)

The same as `train_client` for each, but for the rounding of sums: batches, dropout, optimiser,
clipping, control variates and the end of the round are each client's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fedmllm.algorithms.base import LocalObjective, Params, Update
from fedmllm.client import Job, LocalPlan, LocalTraining, dropout_seed, whole_loss
from fedmllm.models.cohort import Cohort
from fedmllm.models.mllm import Mllm
from fedmllm.models.passes import Encoded


@dataclass(frozen=True)
class _Member:
    """One client's adapter on the shared base."""

    trainable: Mapping[str, torch.nn.Parameter]
    layer_of: Mapping[str, int]
    num_layers: int


def train_cohort(
    mllm: Mllm,
    params: Params,
    jobs: Sequence[Job],
    *,
    round_: int,
    seed: int,
    lr: float,
    plan: LocalPlan,
    objective: LocalObjective,
    broadcast: Mapping[str, Params] | None = None,
) -> list[tuple[Update, Params | None]]:
    """Train every client from `params`; arguments and results as of `train_client`, by job.

    A pass holds `plan.micro_batch` samples of each client; one that has done its steps drops out.
    Raises `UserError` if a client has no samples or its loss diverges, ValueError if the model
    cannot train many clients at once (`models.cohort.obstacle`).
    """
    members = [_member(mllm, params) for _ in jobs]
    seeds = [dropout_seed(seed, job.client, round_) for job in jobs]
    cohort = Cohort(mllm, [member.trainable for member in members], seeds)
    locals_ = [
        LocalTraining(
            member,
            params,
            job,
            round_=round_,
            seed=seed,
            lr=lr,
            plan=plan,
            objective=objective,
            broadcast=broadcast,
        )
        for member, job in zip(members, jobs, strict=True)
    ]
    with cohort.training():
        for step in itertools.zip_longest(*(local.batches() for local in locals_)):
            batches = {k: batch for k, batch in enumerate(step) if batch is not None}
            for k, loss in _backward(cohort, locals_, batches, plan.micro_batch).items():
                locals_[k].step(batches[k], loss)
    return [local.result() for local in locals_]


def _member(mllm: Mllm, params: Params) -> _Member:
    trainable = {
        name: torch.nn.Parameter(params[name].to(value.device, value.dtype, copy=True))
        for name, value in mllm.trainable.items()
    }
    return _Member(trainable, mllm.layer_of, mllm.num_layers)


def _backward(
    cohort: Cohort,
    locals_: Sequence[LocalTraining],
    batches: Mapping[int, list[Encoded]],
    micro_batch: int,
) -> dict[int, float]:
    """Accumulate the gradients of each client's mean loss with its terms; returns the means of
    the samples' own losses. Masked views pass after the whole samples, as for one client."""
    totals = dict.fromkeys(batches, 0.0)
    for start in range(0, max(map(len, batches.values())), micro_batch):
        parts = {k: batch[start : start + micro_batch] for k, batch in batches.items()}
        parts = {k: part for k, part in parts.items() if part}
        found = {
            k: whole_loss(locals_[k].terms, parts[k], reading, len(batches[k]))
            for k, reading in cohort.read(parts).items()
        }
        torch.stack([loss for loss, _ in found.values()]).sum().backward()
        own_losses = torch.stack([own for _, own in found.values()]).tolist()
        for k, own in zip(found, own_losses, strict=True):
            totals[k] += own
        _backward_views(cohort, locals_, parts, {k: len(batch) for k, batch in batches.items()})
    return totals


def _backward_views(
    cohort: Cohort,
    locals_: Sequence[LocalTraining],
    parts: Mapping[int, list[Encoded]],
    sizes: Mapping[int, int],
) -> None:
    drawn = {k: locals_[k].terms.views(part) for k, part in parts.items()}
    views = {k: items for k, items in drawn.items() if items}
    if not views:
        return
    losses = [
        locals_[k].terms.view_loss(views[k], reading) / sizes[k]
        for k, reading in cohort.read(views).items()
    ]
    torch.stack(losses).sum().backward()
