"""Record what Flower's server strategies do to fixed updates: an oracle for our algorithms.

Run once, in an environment of its own (Flower pins its dependencies tightly):

    python -m venv flwr-venv && flwr-venv/bin/pip install flwr==1.41.0
    flwr-venv/bin/python scripts/record_flower_oracle.py

writes tests/data/flower_oracle.json. Input: three clients with unequal numbers of samples, four
rounds, three tensors, everything in float64 so that the record carries no rounding of its own.
In every round each client sends current global + its fixed delta. Output: the global parameters
after each round, for each strategy. The same deltas are fed to every strategy.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import flwr
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as strategies
from flwr.supercore.task_identity import TaskIdentity

OUTPUT = Path(__file__).parents[1] / "tests/data/flower_oracle.json"
SHAPES = {"layers.0.lora_A": (2, 3), "layers.0.lora_B": (4,), "layers.1.lora_A": (2, 2)}
NUM_SAMPLES = (5, 17, 40)
ROUNDS = 4
RUNS: list[tuple[str, dict[str, float]]] = [
    ("FedAvg", {}),
    ("FedAvgM", {"server_momentum": 0.9, "server_learning_rate": 0.7}),
    ("FedAdagrad", {"eta": 0.05, "tau": 0.01}),
    ("FedYogi", {"eta": 0.05, "tau": 0.01, "beta_1": 0.9, "beta_2": 0.95}),
    ("FedAdam", {"eta": 0.05, "tau": 0.01, "beta_1": 0.9, "beta_2": 0.95}),
]

Arrays = dict[str, np.ndarray]


class FakeGrid:
    """As many connected nodes as there are clients; all that `configure_train` asks for."""

    def get_node_ids(self) -> list[int]:
        return list(range(1, len(NUM_SAMPLES) + 1))


def draw(rng: np.random.Generator, scale: float) -> Arrays:
    """Tensors of the fixed shapes with four decimals, so that the JSON is exact and short."""
    return {name: np.round(rng.normal(0, scale, shape), 4) for name, shape in SHAPES.items()}


def to_lists(arrays: Arrays) -> dict[str, Any]:
    return {name: value.tolist() for name, value in arrays.items()}


def to_record(arrays: Arrays) -> ArrayRecord:
    return ArrayRecord({name: Array(value) for name, value in arrays.items()})


def play(name: str, options: dict[str, float], start: Arrays, deltas: list[list[Arrays]]) -> Any:
    """The global parameters after each round under one strategy."""
    strategy = getattr(strategies, name)(min_train_nodes=3, min_available_nodes=3, **options)
    current, outputs = start, []
    for number, round_deltas in enumerate(deltas, start=1):
        messages = strategy.configure_train(
            number, to_record(current), ConfigRecord({}), FakeGrid()
        )
        replies = [
            reply(message, current, delta, n)
            for message, delta, n in zip(messages, round_deltas, NUM_SAMPLES, strict=True)
        ]
        arrays, _ = strategy.aggregate_train(number, replies)
        current = {key: np.asarray(array.numpy()) for key, array in arrays.items()}
        outputs.append(to_lists(current))
    return outputs


def reply(message: Message, current: Arrays, delta: Arrays, num_samples: int) -> Message:
    """A client's answer: its parameters and its number of samples."""
    arrays = to_record({key: current[key] + delta[key] for key in current})
    metrics = MetricRecord({"num-examples": num_samples})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def main() -> None:
    logging.getLogger("flwr").setLevel(logging.WARNING)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    rng = np.random.default_rng(20241121)
    start = draw(rng, 1.0)
    deltas = [[draw(rng, 0.1) for _ in NUM_SAMPLES] for _ in range(ROUNDS)]
    record = {
        "flwr": flwr.__version__,
        "num_samples": NUM_SAMPLES,
        "start": to_lists(start),
        "deltas": [[to_lists(delta) for delta in round_deltas] for round_deltas in deltas],
        "runs": [
            {"strategy": name, "options": options, "params": play(name, options, start, deltas)}
            for name, options in RUNS
        ],
    }
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps(record, indent=None, separators=(",", ":")) + "\n")
    print(f"{OUTPUT.name}: flwr {flwr.__version__}, {len(RUNS)} strategies, {ROUNDS} rounds")


if __name__ == "__main__":
    main()
