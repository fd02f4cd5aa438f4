"""Results of a grid as `fedmllm.experiment` writes them, drawn by a formula: nothing in them was
measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedmllm.report.loading import config_digest, result_digest
from fedmllm.rng import stream
from fedmllm.scenarios import SETTINGS

METHODS = ("zero-shot", "local", "centralised", "fedavg", "fedavgm", "fedadam", "fedyogi")
BASE = {"zero-shot": 0.5, "local": 0.62, "centralised": 0.86, "fedavg": 0.72, "fedavgm": 0.7}
BASE |= {"fedadam": 0.76, "fedyogi": 0.79}
LOSS = {"aligned": 0.0, "missing": 0.05, "cross": 0.09, "hybrid": 0.07}
CONDITIONS = {"both": 0.0, "image_withheld": -0.1, "text_withheld": -0.13, "neither": -0.2}


def auc(method: str, setting: str, prompt: str, seed: int) -> float:
    """The formula."""
    if method == "zero-shot":
        return 0.52
    luck = float(stream(seed, "synthetic", method, setting, prompt).normal(0, 0.008))
    fall = LOSS[setting.split("-")[0]] * (0.5 if prompt == "agnostic" else 1.0)
    return BASE[method] - fall + 0.01 * (seed % 3) + luck


def result(
    method: str,
    setting: str,
    seed: int,
    *,
    prompt: str = "plain",
    task: str = "memes",
    value: float | None = None,
) -> dict[str, Any]:
    """One result; `value` in place of the formula's."""
    found = SETTINGS[setting]
    topology = method if method in ("zero-shot", "local", "centralised") else "federated"
    score = auc(method, setting, prompt, seed) if value is None else value
    config = {
        "name": f"{task}-{setting}-{method}-{prompt}-s{seed}",
        "title": "",
        "seed": seed,
        "topology": topology,
        "prompt": prompt,
        "threads": 1,
        "model": {"name": "embedded", "path": None, "dtype": "float32", "device": "cpu"},
        "lora": {"rank": 8, "alpha": 8, "dropout": 0.05},
        "data": {"name": task, "train": 400, "test": 300},
        "partition": {"name": "dirichlet", "clients": 4, "alpha": found.alpha},
        "scenario": {"name": found.scenario, **found.options},
        "algorithm": {"name": method if topology == "federated" else "fedavg"},
        "training": {"rounds": 6, "clients_per_round": 2, "lr": 0.001},
        "evaluation": {"every": 2, "conditions": list(CONDITIONS)},
    }
    made: dict[str, Any] = {
        "schema": 1,
        "name": config["name"],
        "title": config["name"],
        "status": "complete",
        "config": config,
        "config_sha256": config_digest(config),
        "seed": seed,
        "task": {"name": task, "kind": "choice", "metric": "auc", "classes": ["no", "yes"]},
        "metrics": {
            c: {"n": 300, "auc": max(score + change, 0.5), "auc_se": 0.02}
            for c, change in CONDITIONS.items()
        },
        "history": [] if topology == "zero-shot" else _history(score, topology == "federated"),
        "bytes": _bytes() if topology == "federated" else {},
        "time": {"train_seconds": 20.0, "evaluate_seconds": 5.0, "total_seconds": 26.0},
        "samples": {"trained": 480, "tested": 1500, "trained_per_second": 24.0},
        "peak_memory_bytes": 700_000_000,
        "versions": {"python": "3.11.7", "torch": "2.9.0"},
        "hardware": {"cpu": "synthetic", "cores": 2, "threads": 1, "gpu": None},
        "commit": None,
        "started": "2026-01-01T00:00:00+00:00",
        "manifest": {"sha256": f"{setting}{seed}", "clients": _clients(setting), "notes": []},
    }
    if topology == "local":
        spread = {"mean": score, "std": 0.04, "min": score - 0.06, "max": score + 0.05}
        made["spread"] = {"both": {"auc": spread}}
    made["result_sha256"] = result_digest(made)
    return made


def of_config(config: dict[str, Any]) -> dict[str, Any]:
    """A result of a grid file's own config; nothing was run."""
    seed, topology = config["seed"], config["topology"]
    algorithm = config["algorithm"]["name"] if topology == "federated" else topology
    made = result("fedavg", "aligned-a0.5", seed, task=config["data"]["name"])
    luck = float(stream(seed, "synthetic", config["name"]).normal(0, 0.05))
    score = BASE.get(algorithm, 0.7) + luck
    made |= {"name": config["name"], "config": config, "config_sha256": config_digest(config)}
    made["metrics"] = {"both": {"n": 300, "auc": score, "auc_se": 0.02}}
    made["history"] = [] if topology == "zero-shot" else _history(score, topology == "federated")
    made["result_sha256"] = result_digest(made)
    return made


def real(
    task: str, method: str, setting: str, seed: int, *, metrics: dict[str, float]
) -> dict[str, Any]:
    """A result of a real dataset with these metrics under `both`; nothing was measured."""
    made = result(method, setting, seed, task=task)
    kinds = {"hateful-memes": ("choice", "auc"), "crisismmd": ("choice", "macro_f1")}
    kind, metric = kinds.get(task, ("open", "accuracy"))
    made["task"] = {"name": task, "kind": kind, "metric": metric, "classes": []}
    made["metrics"] = {"both": {"n": 100, **metrics}}
    made["history"], made["spread"] = [], {}
    made["result_sha256"] = result_digest(made)
    return made


def _bytes() -> dict[str, Any]:
    return {"up": 2_400_000, "down": 2_400_000, "per_client_round": {"lora": 200_000}}


def _history(score: float, sends: bool) -> list[dict[str, Any]]:
    lines = []
    for number in range(1, 7):
        reached = 0.5 + (score - 0.5) * (1 - 0.6**number) / (1 - 0.6**6)
        size = 300 if number == 6 else 100  # on the way `evaluation.limit`, at the end all
        measured = {"both": {"n": size, "auc": reached}} if number % 2 == 0 else None
        sent = 400_000 if sends else 0
        line = {"round": number, "loss": 1 / number, "lr": 0.001, "seconds": 3.3}
        line |= {"bytes_up": sent, "bytes_down": sent, "clients": ["client-00", "client-01"]}
        lines.append({**line, "metrics": measured})
    return lines


def _clients(setting: str) -> list[dict[str, Any]]:
    clients = []
    for i in range(4):
        whole = 100 if setting.startswith("aligned") else 40
        rest = 100 - whole
        held = {"image_text": whole, "image": rest // 2, "text": rest - rest // 2, "neither": 0}
        labels = {"no": 20 + 20 * i, "yes": 80 - 20 * i}
        clients.append({"id": f"client-{i:02d}", "samples": 100, **held, "labels": labels})
    return clients


def write(folder: Path, found: list[dict[str, Any]]) -> Path:
    """Write results as run folders below `folder`."""
    for one in found:
        place = folder / one["name"]
        place.mkdir(parents=True, exist_ok=True)
        (place / "result.json").write_text(json.dumps(one))
    return folder


def grid(
    *,
    seeds: int = 5,
    settings: tuple[str, ...] = tuple(SETTINGS),
    prompts: tuple[str, ...] = ("plain", "agnostic"),
    keep: Callable[[str], bool] = lambda method: True,
) -> list[dict[str, Any]]:
    """A whole grid; zero-shot once, as the benchmark runs it."""
    found = [result("zero-shot", settings[0], 0)]
    for setting in settings:
        for method in METHODS[1:]:
            for prompt in prompts:
                found += [result(method, setting, s, prompt=prompt) for s in range(seeds)]
    return [one for one in found if keep(one["config"]["algorithm"]["name"])]


if __name__ == "__main__":
    import sys

    write(Path(sys.argv[1]), grid())
