"""The client of row `flower_run`, in a module of its own: Flower's actors import it by name.

An actor loads the model once and keeps a client's encoded samples, as an author who minds speed
would.
"""

from __future__ import annotations

from functools import cache

import flower_run as job
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedmllm.algorithms.base import LocalObjective, Params
from fedmllm.client import LocalPlan, learning_rate, train_client
from fedmllm.data import load_dataset
from fedmllm.experiment import federations, load_model, make_manifest
from fedmllm.models.mllm import Encoded, Mllm
from fedmllm.prompts import render

app = ClientApp()


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


def to_record(params: Params) -> ArrayRecord:
    """As Flower sends it."""
    return ArrayRecord({name: Array(value.numpy()) for name, value in params.items()})


@app.train()
def train(message: Message, context: Context) -> Message:
    """A client's round by our own function."""
    arrays = message.content["arrays"]
    params = {name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()}
    round_ = int(message.content["config"]["server-round"])
    partition = int(context.node_config["partition-id"])
    rounds = int(message.content["config"]["rounds"])
    lr = learning_rate(round_, rounds=rounds, peak=job.config(rounds).training.lr)
    update, _ = train_client(
        model(),
        params,
        samples(partition),
        client=str(partition),
        round_=round_,
        seed=0,
        lr=lr,
        plan=LocalPlan(),
        objective=LocalObjective(),
    )
    new = {name: params[name] + update.delta[name] for name in params}
    metrics = {"num-examples": update.num_samples, "loss": update.metrics["loss"]}
    content = {"arrays": to_record(new), "metrics": MetricRecord(metrics)}
    return Message(RecordDict(content), reply_to=message)
