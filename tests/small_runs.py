"""Small runs through every part that makes numbers; what they give is kept in
data/revisions.json, written by `python tests/small_runs.py`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedmllm.config import Config, make_config
from fedmllm.experiment import Shared, load_model, run
from fedmllm.fusion import Fusion
from fedmllm.revisions import revisions_of

CONDITIONS = ("both", "text_withheld")
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
    "missing": {"scenario": {"name": "missing", "beta": 0.3}},  # without a strategy, as is "cross"
    "cross": {"scenario": "cross"},
    "composition": {
        "strategy": {"recombine": 0.5, "resample": 0.5},
        "scenario": {"name": "missing", "beta": 0.3},
    },
    "mixtures": {"strategy": {"recombine": 1.0, "mixtures": 2}, "scenario": "cross"},
    "evidence": {
        "strategy": {"recombine": 1.0, "evidence": 1.0},
        "scenario": {"name": "missing", "beta": 0.3},
        "data": {"name": "crisis", "train": 48, "test": 8, "classes": 4},
    },
    "fusion": {"strategy": {"fusion": 1.0}, "scenario": {"name": "missing", "beta": 0.3}},
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
    """The losses, the metric and the `surprise` of a run, and the revisions that it states."""
    result = run(config, out=folder, shared=shared)
    return {
        "revisions": revisions_of(config.model_dump(mode="json")),
        "losses": [line["loss"] for line in result["history"]],
        "metric": result["metrics"]["both"][result["task"]["metric"]],
        "surprise": surprise(config, shared, result),
    }


def surprise(config: Config, shared: Shared, result: dict[str, Any]) -> float:
    """The mean of -log of the right option's probability, under `CONDITIONS`; of open questions the
    mean token loss of the answers. Of a local run, its last party's.

    Unlike a metric of a dozen samples, it moves with every change of what scores them.
    """
    test = shared.test_set(config)
    size = len(test.samples)
    if test.task.kind == "open":
        shared.mllm.model.eval()
        with torch.no_grad():
            return float(shared.mllm.losses(test.encoded("both", range(size))).mean())
    fusion = Fusion(**result["fusion"]) if "fusion" in result else None
    found = [test.probabilities(condition, size, fusion=fusion) for condition in CONDITIONS]
    labels = [int(sample.label or 0) for sample in test.samples]
    return float(-np.mean([np.log(scores[range(size), labels]) for scores in found]))


def main() -> None:
    """Write the file anew."""
    shared = Shared(load_model(small_config("fedavg")))
    with tempfile.TemporaryDirectory() as folder:
        found = {name: facts_of(small_config(name), shared, Path(folder) / name) for name in RUNS}
    FILE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
