"""Training speed: the clients of a round one after the other, and in one pass.

    python benchmarks/cohort.py                        # embedded model; writes results/cohort.json
    python benchmarks/cohort.py --repeats 9 --out x.json

Ten parties of the embedded memes, cross-modal 5:5, with at most 32 samples each; a round of 2 and
of 10 of them, with 8 samples and with 1 sample of a client in a pass, and one thread.
The ways of computing take turns within a repetition, and each is compared with the plain one of
the same repetition, so that a machine that is busy at times slows both. Medians of the ratios; time
is CPU time of the one thread, which other programs disturb less than the clock on the wall.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from padding import counting

from fedmllm import results
from fedmllm.algorithms import make_algorithm
from fedmllm.algorithms.base import Update
from fedmllm.client import LocalPlan
from fedmllm.config import Config, make_config
from fedmllm.data import load_dataset
from fedmllm.experiment import federations, load_model, make_manifest
from fedmllm.federation import InProcessRunner, cohort_of
from fedmllm.models.mllm import Mllm
from fedmllm.models.passes import Encoded
from fedmllm.prompts import render

OUT = Path(__file__).resolve().parents[1] / "results" / "cohort.json"
COHORTS = {2: (1, 2), 10: (1, 2, 5, 10)}  # sampled: at once
MICRO_BATCHES = (8, 1)
LIMIT = 32  # samples of a party


def encode(config: Config, mllm: Mllm) -> dict[str, list[Encoded]]:
    """Every party's samples."""
    dataset = load_dataset(**config.data)
    held = federations(config, dataset, make_manifest(config, dataset))[0].samples
    return {
        client: [mllm.encode(render(s, dataset.task, config.prompt)) for s in samples[:LIMIT]]
        for client, samples in held.items()
    }


@dataclass(frozen=True)
class Round:
    """What a round took: CPU seconds, its updates, and the share of its tokens that is padding."""

    seconds: float
    updates: list[Update]
    padding: float


def train(
    mllm: Mllm, samples: dict[str, list[Encoded]], cohort: list[str], *, at_once: int, micro: int
) -> Round:
    """One round of FedAvg."""
    algorithm = make_algorithm("fedavg", num_clients=len(samples))
    state = algorithm.init(mllm.init_adapter(0))
    plan = LocalPlan(micro_batch=micro)
    runner = InProcessRunner(mllm, samples.__getitem__, plan, 0, clients_at_once=at_once)
    with counting(mllm) as count:
        began = time.process_time()
        updates = [update for _, update in runner.train(1, cohort, algorithm, state, lr=1e-3)]
        return Round(time.process_time() - began, updates, count.padding)


def difference(one: Update, other: Update) -> float:
    """||d - d'|| / ||d|| of two updates of a client."""
    apart = sum(float((one.delta[n] - other.delta[n]).square().sum()) for n in one.delta)
    return (apart / sum(float(value.square().sum()) for value in one.delta.values())) ** 0.5


def measure(repeats: int) -> list[dict[str, Any]]:
    """A row for each size of cohort, micro-batch and way of computing."""
    config = make_config(
        {
            "name": "cohort",
            "data": "memes",
            "setting": "cross-i5t5",
            "partition": {"clients": 10},
        }
    )
    torch.set_num_threads(1)
    mllm = load_model(config)
    samples = encode(config, mllm)
    rows = []
    for size, ways in COHORTS.items():
        cohort = cohort_of(list(samples), size, seed=0, round_=1)
        for micro in MICRO_BATCHES:
            tries = [
                {way: train(mllm, samples, cohort, at_once=way, micro=micro) for way in ways}
                for _ in range(repeats)
            ]
            for way in ways:
                count = sum(len(samples[client]) for client in cohort)
                rows.append({"sampled": size, "micro_batch": micro, **row(tries, way, count)})
                print({k: v for k, v in rows[-1].items() if k != "ratios"}, flush=True)
    return rows


def row(tries: list[dict[int, Round]], way: int, count: int) -> dict[str, Any]:
    """What one way of computing gave, over the repetitions."""
    ratios = [done[1].seconds / done[way].seconds for done in tries]
    pairs = zip(tries[0][1].updates, tries[0][way].updates, strict=True)
    return {
        "at_once": way,
        "samples": count,
        "samples_per_cpu_second": count / statistics.median(d[way].seconds for d in tries),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "padding": tries[0][way].padding,
        "largest_difference": max(difference(one, other) for one, other in pairs),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    rows = measure(given.repeats)
    facts = {
        "schema": 1,
        "rows": rows,
        "versions": results.versions(),
        "hardware": results.hardware(1, "cpu"),
        "commit": results.commit(),
    }
    results.write_json(given.out, facts)


if __name__ == "__main__":
    main()
