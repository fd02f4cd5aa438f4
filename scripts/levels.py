"""The levels that the embedded tasks must reach, over seeds: `python scripts/levels.py`.

Runs what is missing or stale in results/levels, by the benchmark's rule (docs/benchmark.md), and
copies each result.json there. The arms: zero-shot, local, FedAvg aligned, FedAvg with half of the
modalities missing, centralised; and centralised on one modality alone, which says how much that
modality tells by itself (one seed: pooled data are the same for all). On easy-VQA: zero-shot,
local and FedAvg with five of ten parties without the pictures.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keep_results import keep

from fedmllm.bench import Cell
from fedmllm.bench.state import Present, states
from fedmllm.config import Config, make_config
from fedmllm.parallel import run_many

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "levels"
TASKS: dict[str, dict[str, Any]] = {  # rounds of a federated or local run, of a centralised one
    "memes": {"rounds": 25, "central": 8, "data": {"train": 1000, "test": 1600}},
    "crisis": {"rounds": 20, "central": 8, "alpha": 5.0, "data": {"train": 1000, "test": 1200}},
    "medical": {
        "rounds": 20,
        "central": 8,
        "data": {"train": 1000, "test": 1200, "flashcards": 600},
    },
    "easy-vqa": {"rounds": 10, "data": {"max_train": 1000, "max_test": 1200}},
}
ARMS: dict[str, dict[str, Any]] = {
    "zero-shot": {"topology": "zero-shot"},
    "fedavg-aligned": {},
    "fedavg-missing": {"scenario": {"name": "missing", "beta": 0.5}},
    "centralised": {"topology": "centralised"},
    "text-alone": {
        "topology": "centralised",
        "scenario": {"name": "cross", "images": 0},
        "evaluation": {"every": 0, "conditions": ["image_withheld"]},
    },
    "image-alone": {
        "topology": "centralised",
        "scenario": {"name": "cross", "images": 10},
        "evaluation": {"every": 0, "conditions": ["text_withheld"]},
    },
    "local": {"topology": "local"},
}
CROSS = {"scenario": {"name": "cross", "images": "5:5"}}
ARMS_OF: dict[str, dict[str, dict[str, Any]]] = {
    "memes": ARMS,
    "crisis": ARMS,
    # medical questions have no text to leave alone
    "medical": {name: ARMS[name] for name in ARMS if not name.endswith("-alone")},
    "easy-vqa": {
        "zero-shot": ARMS["zero-shot"],
        "local": {**ARMS["local"], **CROSS},
        "fedavg-cross": CROSS,
    },
}


def level_config(task: str, arm: str, seed: int) -> Config:
    """One cell."""
    facts, change = TASKS[task], ARMS_OF[task][arm]
    central = change.get("topology") == "centralised"
    raw: dict[str, Any] = {
        "name": f"{task}-{arm}-s{seed}",
        "seed": seed,
        "data": {"name": task, **facts["data"]},
        "partition": {"alpha": facts.get("alpha", 0.5)},
        "training": {"rounds": facts["central"] if central else facts["rounds"]},
        "evaluation": {"every": 0, "conditions": ["both"]},
        **change,
    }
    return make_config(raw)


def left(configs: Sequence[Config]) -> list[Config]:
    """Those whose committed result is missing or stale."""
    cells = [Cell(config.name, config, ()) for config in configs]
    found = states(cells, RESULTS, Present())
    return [config for config in configs if found[config.name].kind != "done"]


def listen(event: Mapping[str, Any], work: Path) -> None:
    """Keep a finished run's result at once, so that an interrupted grid loses nothing."""
    if event["event"] != "done":
        return
    keep(work / event["name"], RESULTS)
    for condition, metrics in event["metrics"].items():
        shown = {k: round(v, 4) for k, v in metrics.items() if v is not None}
        print(event["name"], condition, f"{event['elapsed']:.0f}s", shown, flush=True)


def main() -> None:
    """Run the cells that are missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    arms = sorted({arm for task in ARMS_OF.values() for arm in task})
    parser.add_argument("--arms", nargs="+", default=arms, choices=arms)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "levels")
    given = parser.parse_args()
    cells = [
        level_config(task, arm, seed)
        for seed in given.seeds
        for task in given.tasks
        for arm in ARMS_OF[task]
        if arm in given.arms and (seed == 0 or not arm.endswith("-alone"))
    ]
    todo = left(cells)
    print(f"{len(todo)} of {len(cells)} cells to run", flush=True)
    if todo:
        run_many(
            todo,
            given.work,
            processes=given.processes,
            listener=lambda event: listen(event, given.work),
        )


if __name__ == "__main__":
    main()
