"""Training samples per second: the clients of a round one after the other, and in one pass.

    python benchmarks/cohort.py                        # embedded model; writes results/cohort.json
    python benchmarks/cohort.py --repeats 9 --out x.json

Ten parties of the embedded memes, cross-modal 5:5; a round of 2 and of 10 of them, with 1 thread.
The ways of computing take turns within a repetition, and each is compared with the plain one of
the same repetition, so that a machine that is busy at times slows both. Medians of the ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from fedmllm import results
from fedmllm.algorithms import make_algorithm
from fedmllm.client import LocalPlan
from fedmllm.config import Config, make_config
from fedmllm.data import load_dataset
from fedmllm.experiment import federations, load_model, make_manifest
from fedmllm.federation import InProcessRunner, cohort_of
from fedmllm.models.mllm import Encoded, Mllm
from fedmllm.prompts import render

OUT = Path(__file__).resolve().parents[1] / "results" / "cohort.json"
COHORTS = {2: (1, 2), 10: (1, 2, 5, 10)}  # sampled: at once


def encode(config: Config, mllm: Mllm) -> dict[str, list[Encoded]]:
    """Every party's samples."""
    dataset = load_dataset(**config.data)
    held = federations(config, dataset, make_manifest(config, dataset))[0].samples
    return {
        client: [mllm.encode(render(s, dataset.task, config.prompt)) for s in samples]
        for client, samples in held.items()
    }


def padding(batches: list[list[Encoded]]) -> float:
    """Share of a pass's tokens that are padding, over all passes."""
    filled = sum(len(item) for batch in batches for item in batch)
    return 1 - filled / sum(len(batch) * max(map(len, batch)) for batch in batches)


def seconds(mllm: Mllm, samples: dict[str, list[Encoded]], cohort: list[str], at_once: int) -> Any:
    """One round's time and its updates."""
    algorithm = make_algorithm("fedavg", num_clients=len(samples))
    state = algorithm.init(mllm.init_adapter(0))
    runner = InProcessRunner(mllm, samples.__getitem__, LocalPlan(), 0, clients_at_once=at_once)
    began = time.perf_counter()
    updates = [update for _, update in runner.train(1, cohort, algorithm, state, lr=1e-3)]
    return time.perf_counter() - began, updates


def difference(one: Any, other: Any) -> float:
    """||d - d'|| / ||d|| of two updates of a client."""
    apart = sum(float((one.delta[n] - other.delta[n]).square().sum()) for n in one.delta)
    return (apart / sum(float(value.square().sum()) for value in one.delta.values())) ** 0.5


def measure(repeats: int) -> list[dict[str, Any]]:
    """A row for each size of cohort and way of computing."""
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
        count = sum(len(samples[client]) for client in cohort)
        taken: dict[int, list[float]] = {way: [] for way in ways}
        apart: dict[int, float] = {}
        for _ in range(repeats):
            done = {way: seconds(mllm, samples, cohort, way) for way in ways}
            for way, (spent, updates) in done.items():
                taken[way].append(spent)
                pairs = zip(done[1][1], updates, strict=True)
                apart[way] = max(difference(one, other) for one, other in pairs)
        for way in ways:
            ratios = [plain / own for plain, own in zip(taken[1], taken[way], strict=True)]
            rows.append(
                {
                    "sampled": size,
                    "at_once": way,
                    "samples": count,
                    "samples_per_second": count / statistics.median(taken[way]),
                    "ratio": statistics.median(ratios),
                    "ratios": ratios,
                    "largest_difference": apart[way],
                }
            )
            print({k: rows[-1][k] for k in rows[-1] if k != "ratios"}, flush=True)
    return rows


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
