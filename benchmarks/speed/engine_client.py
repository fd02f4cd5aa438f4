"""A client of the rows against other engines: it keeps the model and its encoded samples in memory,
as an author who minds speed would, and trains by our own function.
"""

from __future__ import annotations

from functools import cache

import flower_run as job
import torch

from fedmllm.algorithms.base import LocalObjective, Params, Update
from fedmllm.client import LocalPlan, learning_rate, train_client
from fedmllm.data import load_dataset
from fedmllm.experiment import federations, load_model, make_manifest
from fedmllm.models.mllm import Mllm
from fedmllm.models.passes import Encoded
from fedmllm.prompts import render


@cache
def model() -> Mllm:
    """The base of this process."""
    torch.set_num_threads(1)
    return load_model(job.config(1))


@cache
def samples(partition: int) -> tuple[Encoded, ...]:
    """A client's samples."""
    made = job.config(1)
    dataset = load_dataset(**made.data)
    held = federations(made, dataset, make_manifest(made, dataset))[0].samples
    own = held[sorted(held)[partition]]
    return tuple(model().encode(render(one, dataset.task, made.prompt)) for one in own)


def train_round(params: Params, partition: int, *, round_: int, rounds: int) -> Update:
    """A client's round."""
    update, _ = train_client(
        model(),
        params,
        samples(partition),
        client=str(partition),
        round_=round_,
        seed=0,
        lr=learning_rate(round_, rounds=rounds, peak=job.config(rounds).training.lr),
        plan=LocalPlan(),
        objective=LocalObjective(),
    )
    return update
