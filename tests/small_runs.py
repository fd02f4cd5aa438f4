"""Small runs through every part that makes numbers; what they give is kept in
data/revisions.json, written by `python tests/small_runs.py`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from fedmllm.config import Config, make_config
from fedmllm.experiment import Shared, load_model, run
from fedmllm.revisions import revisions_of

FILE = Path(__file__).parent / "data" / "revisions.json"
SMALL: dict[str, Any] = {
    "data": {"name": "memes", "train": 16, "test": 12},
    "partition": {"clients": 2},
    "training": {"rounds": 2, "lr": 0.003},
    "evaluation": {"every": 0, "conditions": ["both"]},
}
FIVE: dict[str, Any] = {  # as many as Krum needs, unlike each other and with steps that show it
    "data": {"name": "memes", "train": 20, "test": 12},
    "partition": {"clients": 5, "alpha": 0.5},
    "training": {"clients_per_round": 5, "lr": 0.01},
}
RUNS: dict[str, dict[str, Any]] = {
    "zero-shot": {"topology": "zero-shot"},
    "local": {"topology": "local", "training": {"rounds": 1}},
    "centralised": {"topology": "centralised"},
    "fedavg": {},
    "fedprox": {"algorithm": {"name": "fedprox", "mu": 5.0}, "scenario": "cross"},
    "fedavgm": {"algorithm": "fedavgm", "scenario": "missing"},
    "fedadagrad": {"algorithm": {"name": "fedadagrad", "eta": 0.01}, "scenario": "hybrid"},
    "fedadam": {"algorithm": {"name": "fedadam", "eta": 0.01}},
    "fedyogi": {"algorithm": {"name": "fedyogi", "eta": 0.01}},
    "scaffold": {"algorithm": "scaffold"},
    "agnostic": {"prompt": "agnostic", "scenario": "missing"},
    "regularisation": {
        "strategy": {"mu": 50.0, "weight": "profile", "aggregation": 2.0},
        "scenario": "cross",
    },
    "alignment": {
        "strategy": {"prototypes": 1.0, "distillation": 1.0, "views": 0.5, "incomplete": 0.5},
        "scenario": {"name": "missing", "beta": 0.3},
    },
    "crisis": {"data": {"name": "crisis", "train": 16, "test": 8}},
    "median": {"aggregation": "median", "algorithm": {"name": "fedadam", "eta": 0.01}, **FIVE},
    "trimmed-mean": {"aggregation": {"name": "trimmed-mean", "trim": 1}, **FIVE},
    "krum": {"aggregation": {"name": "krum", "byzantine": 1}, **FIVE},
    "multi-krum": {"aggregation": {"name": "multi-krum", "keep": 2}, "scenario": "cross", **FIVE},
    "medical": {"data": {"name": "medical", "train": 12, "test": 6, "flashcards": 8}},
}


def small_config(name: str) -> Config:
    """One of `RUNS`."""
    raw = {"name": name, **SMALL, **RUNS[name]}
    raw["training"] = {**SMALL["training"], **RUNS[name].get("training", {})}
    return make_config(raw)


def facts_of(config: Config, shared: Shared, folder: Path) -> dict[str, Any]:
    """The losses and the metric of a run, and the revisions that it states."""
    result = run(config, out=folder, shared=shared)
    return {
        "revisions": revisions_of(config.model_dump(mode="json")),
        "losses": [line["loss"] for line in result["history"]],
        "metric": result["metrics"]["both"][result["task"]["metric"]],
    }


def main() -> None:
    """Write the file anew."""
    shared = Shared(load_model(small_config("fedavg")))
    with tempfile.TemporaryDirectory() as folder:
        found = {name: facts_of(small_config(name), shared, Path(folder) / name) for name in RUNS}
    FILE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
