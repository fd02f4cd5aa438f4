"""Flower's half of row `server`, run by Flower's own interpreter: NAME CLIENTS WARM.

The replies lie in memory as Flower holds them when they have come in (making them is not timed);
timed is `aggregate_train`.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path

import flwr
import server_load as load
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as strategies
from flwr.supercore.task_identity import TaskIdentity


def status(key: str) -> int:
    """A line of /proc/self/status, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


class Grid:
    """As many nodes as there are clients; all that `configure_train` asks for."""

    def __init__(self, clients: int) -> None:
        self.clients = clients

    def get_node_ids(self) -> list[int]:
        return list(range(1, self.clients + 1))


def record(arrays: load.Arrays) -> ArrayRecord:
    return ArrayRecord({name: Array(value) for name, value in arrays.items()})


def main(name: str, clients: int, warm: int) -> None:
    """`warm` times for nothing, then once with the clock."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    params = load.start()
    strategy = getattr(strategies, name)(min_train_nodes=clients, min_available_nodes=clients)
    before = status("VmRSS:")
    messages = strategy.configure_train(1, record(params), ConfigRecord({}), Grid(clients))
    replies = []
    for client, message in enumerate(messages):
        delta = load.delta(params, client)
        content = {
            "arrays": record({key: params[key] + delta[key] for key in params}),
            "metrics": MetricRecord({"num-examples": load.samples(client)}),
        }
        replies.append(Message(RecordDict(content), reply_to=message))
    for _ in range(warm):
        strategy.aggregate_train(1, replies)
    wall, cpu = time.perf_counter(), time.process_time()
    arrays, _ = strategy.aggregate_train(1, replies)
    facts = {
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "peak_bytes": status("VmHWM:") - before,
        "flwr": flwr.__version__,
        "probe": [float(array.numpy().ravel()[0]) for array in list(arrays.values())[:5]],
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
