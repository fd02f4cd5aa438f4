"""The share of padding among the tokens of training, on the embedded tasks.

    python benchmarks/padding.py                  # writes results/padding.json
    python benchmarks/padding.py --out x.json

Ten parties, all of which train for one round in batches of 8: with 8 and with 2 samples of a client
in a pass, one client and four at once. Every pass is counted as training asks for it, and not
computed: the model is replaced by a counter. `as_drawn` is what it would be if a step's samples
were not cut into micro-batches by length.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from fedmllm import results
from fedmllm.algorithms import make_algorithm
from fedmllm.client import LocalPlan
from fedmllm.config import Config, make_config
from fedmllm.data import load_dataset
from fedmllm.experiment import federations, load_model, make_manifest
from fedmllm.federation import InProcessRunner
from fedmllm.models.mllm import Mllm
from fedmllm.models.passes import Encoded, Reading
from fedmllm.prompts import render

OUT = Path(__file__).resolve().parents[1] / "results" / "padding.json"
TASKS: dict[str, dict[str, Any]] = {
    "memes": {},
    "crisis": {},
    "medical": {"partition": {"name": "even"}},
}
SETTINGS = ("aligned-a0.5", "missing-b0.4", "cross-i5t5")
BATCH, MICRO_BATCHES, AT_ONCE = 8, (8, 2), (1, 4)
TRAIN = 400


@dataclass
class Count:
    """Tokens that passes hold, and those of them that are samples'."""

    held: int = 0
    filled: int = 0

    def add(self, batch: Sequence[Encoded]) -> None:
        """A pass over a batch, padded to its longest sample."""
        self.held += len(batch) * max(map(len, batch))
        self.filled += sum(map(len, batch))

    @property
    def padding(self) -> float:
        return 1 - self.filled / self.held


@contextlib.contextmanager
def counting(mllm: Mllm, *, compute: bool = True) -> Iterator[Count]:
    """Count what passes of training hold. compute: False gives losses of 0 in their place."""
    count, plain = Count(), mllm.read

    def read(batch: Sequence[Encoded]) -> Reading:
        count.add(batch)
        if compute:
            return plain(batch)
        return Reading(torch.zeros(len(batch), requires_grad=True), (), ())

    with mock.patch.object(mllm, "read", read):
        yield count


def config_of(task: str, setting: str, train: int) -> Config:
    """Ten parties of a task."""
    data: dict[str, Any] = {"name": task, "train": train}
    if task == "medical":
        data["flashcards"] = train
    return make_config({"name": "padding", "setting": setting, **TASKS[task], "data": data})


def encode(config: Config, mllm: Mllm) -> dict[str, list[Encoded]]:
    """Every party's samples."""
    dataset = load_dataset(**config.data)
    held = federations(config, dataset, make_manifest(config, dataset))[0].samples
    return {
        client: [mllm.encode(render(s, dataset.task, config.prompt)) for s in samples]
        for client, samples in held.items()
    }


def padding(
    mllm: Mllm, samples: Mapping[str, Sequence[Encoded]], *, micro: int, at_once: int
) -> float:
    """The share of padding in a round of all parties."""
    algorithm = make_algorithm("fedavg", num_clients=len(samples))
    state = algorithm.init(mllm.init_adapter(0))
    plan = LocalPlan(batch_size=BATCH, micro_batch=micro)
    runner = InProcessRunner(mllm, samples.__getitem__, plan, 0, clients_at_once=at_once)
    with counting(mllm, compute=False) as count:
        for _ in runner.train(1, sorted(samples), algorithm, state, lr=1e-3):
            pass
    return count.padding


def measure(mllm: Mllm, *, train: int = TRAIN) -> list[dict[str, Any]]:
    """A row for each task, setting, micro-batch and number of clients at once."""
    rows = []
    for task in TASKS:
        for setting in SETTINGS:
            samples = encode(config_of(task, setting, train), mllm)
            for micro in MICRO_BATCHES:
                for at_once in AT_ONCE:
                    found = padding(mllm, samples, micro=micro, at_once=at_once)
                    with mock.patch("fedmllm.client.longest_first", list):
                        drawn = padding(mllm, samples, micro=micro, at_once=at_once)
                    facts = {"micro_batch": micro, "at_once": at_once}
                    rows.append(
                        {"task": task, "setting": setting, **facts}
                        | {"padding": found, "as_drawn": drawn}
                    )
    return rows


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    torch.set_num_threads(1)
    commit = results.commit()  # of the code that is measured
    rows = measure(load_model(config_of("memes", SETTINGS[0], TRAIN)))
    for row in rows:
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    facts = {
        "schema": 1,
        "batch_size": BATCH,
        "train": TRAIN,
        "rows": rows,
        "versions": results.versions(),
        "commit": commit,
    }
    results.write_json(given.out, facts)


if __name__ == "__main__":
    main()
