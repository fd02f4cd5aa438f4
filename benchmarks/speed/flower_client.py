"""The client of row `flower_run`, in a module of its own: Flower's actors import it by name.

An actor loads the model once and keeps a client's encoded samples (`engine_client`).
"""

from __future__ import annotations

import torch
from engine_client import model, train_round
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedmllm.algorithms.base import Params

__all__ = ["app", "model", "to_record"]
app = ClientApp()


def to_record(params: Params) -> ArrayRecord:
    """As Flower sends it."""
    return ArrayRecord({name: Array(value.numpy()) for name, value in params.items()})


@app.train()
def train(message: Message, context: Context) -> Message:
    """A client's round by our own function."""
    arrays = message.content["arrays"]
    params = {name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()}
    update = train_round(
        params,
        int(context.node_config["partition-id"]),
        round_=int(message.content["config"]["server-round"]),
        rounds=int(message.content["config"]["rounds"]),
    )
    new = {name: params[name] + update.delta[name] for name in params}
    metrics = {"num-examples": update.num_samples, "loss": update.metrics["loss"]}
    content = {"arrays": to_record(new), "metrics": MetricRecord(metrics)}
    return Message(RecordDict(content), reply_to=message)
