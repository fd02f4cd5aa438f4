"""What each strategy costs in time, side by side.

    python benchmarks/strategies.py               # writes results/strategies-cost.json
    python benchmarks/strategies.py --repeats 5 --out x.json

The crisis cells of experiments/grids/strategies.yaml at hybrid 0.7, where every strategy has
something to do, under FedAvg, with fewer rounds, one seed. The strategies take turns within a
repetition, and each is compared with plain training of the same repetition. CPU time of one thread:
of a round (the mean of those after the first, since some strategies take longer in some rounds
only), of what comes to the end of the first round beyond what plain training does there, and of the
tests. Medians over the repetitions.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from fedmllm import results
from fedmllm.bench.grid import load_grid
from fedmllm.config import Config
from fedmllm.experiment import Shared, load_model, run

ROOT = Path(__file__).resolve().parents[1]
GRID = ROOT / "experiments" / "grids" / "strategies.yaml"
CELLS = ("dataset=crisis", "setting=hybrid-p0.7", "method=fedavg", "seed=0")
OUT = ROOT / "results" / "strategies-cost.json"
PLAIN = "plain"


@dataclass(frozen=True)
class Took:
    """CPU seconds: before the first round and in it; of a later round; of the tests."""

    start: float
    round: float
    tests: float


def configs(rounds: int) -> dict[str, Config]:
    """By strategy, of the cells that have one each."""
    found = {}
    for cell in load_grid(GRID, only=CELLS).cells:
        training = cell.config.training.model_copy(update={"rounds": rounds})
        for place in cell.places:
            found.setdefault(
                place["strategy"], cell.config.model_copy(update={"training": training})
            )
    return found


def measure(config: Config, shared: Shared) -> Took:
    """One run."""
    marks = [time.process_time()]

    def listen(event: Mapping[str, Any]) -> None:
        if event["event"] == "round":
            marks.append(time.process_time())

    with tempfile.TemporaryDirectory() as folder:
        run(config, out=Path(folder) / "run", listener=listen, shared=shared)
    end = time.process_time()
    each = [after - before for before, after in pairwise(marks[1:])]
    return Took(marks[1] - marks[0], statistics.fmean(each), end - marks[-1])


def row(strategy: str, tries: list[Mapping[str, Took]]) -> dict[str, Any]:
    """A strategy against plain training, over the repetitions."""
    pairs = [(each[strategy], each[PLAIN]) for each in tries]
    return {
        "strategy": strategy,
        "round": statistics.median(one.round / plain.round for one, plain in pairs),
        "tests": statistics.median(one.tests / plain.tests for one, plain in pairs),
        "start": statistics.median(one.start - plain.start for one, plain in pairs),
        "plain_round": statistics.median(plain.round for _, plain in pairs),
        "rounds": [one.round / plain.round for one, plain in pairs],
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=13)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    ways = configs(given.rounds)
    shared = Shared(load_model(ways[PLAIN]))
    measure(ways[PLAIN], shared)  # keeps the pictures' features for all
    tries: list[Mapping[str, Took]] = []
    for _ in range(given.repeats):
        tries.append({strategy: measure(config, shared) for strategy, config in ways.items()})
        last = ", ".join(f"{s} {took.round:.2f}" for s, took in tries[-1].items())
        print(f"CPU seconds a round: {last}", flush=True)
    facts = {
        "schema": 1,
        "cells": CELLS,
        "rounds": given.rounds,
        "repeats": given.repeats,
        "rows": [row(strategy, tries) for strategy in ways if strategy != PLAIN],
        "versions": results.versions(),
        "hardware": results.hardware(1, "cpu"),
        "commit": results.commit(),
    }
    results.write_json(given.out, facts)


if __name__ == "__main__":
    main()
