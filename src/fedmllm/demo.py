"""`fedmllm demo`: six runs that show what modality heterogeneity costs and what helps."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console

from fedmllm.config import Config, make_config
from fedmllm.errors import UserError
from fedmllm.parallel import rough_work, run_many
from fedmllm.progress import ManyProgress

RUN_MARK = ".fedmllm-demo"
TITLE = "FedMLLM demo: ten parties, one model, missing modalities"
BASE: dict[str, Any] = {
    "data": {"name": "memes", "train": 800, "test": 800, "wordings": 3},
    "partition": {"clients": 10, "alpha": 0.5},
    "training": {"rounds": 15, "clients_per_round": 2},
    "evaluation": {"every": 3, "limit": 300},
}
RUNS: dict[str, dict[str, Any]] = {
    "zero-shot": {"title": "Zero-shot: the base, untouched", "topology": "zero-shot"},
    "local": {
        "title": "Local: each party alone",
        "topology": "local",
        "evaluation": {"every": 0, "conditions": ["both"]},
    },
    "centralised": {
        "title": "Centralised: all data in one place",
        "topology": "centralised",
        "training": {"rounds": 8},
        "evaluation": {"every": 2, "limit": 300},
    },
    "fedavg-aligned": {"title": "FedAvg, aligned: every sample whole"},
    "fedavg-missing": {
        "title": "FedAvg, half of the modalities missing",
        "scenario": {"name": "missing", "beta": 0.5},
    },
    "fedavg-missing-agnostic": {
        "title": "The same with the prompt strategy",
        "scenario": {"name": "missing", "beta": 0.5},
        "prompt": "agnostic",
    },
}


def demo_configs(seed: int = 0) -> list[Config]:
    """The six configs. The two longest come right after zero-shot, so that both processes end
    together."""
    configs = []
    for name, change in RUNS.items():
        raw = {"name": name, "seed": seed, **BASE, **change}
        raw["training"] = {**BASE["training"], **change.get("training", {})}
        configs.append(make_config(raw, source=f"demo {name}"))
    return configs


def run_demo(out: Path, *, processes: int = 2) -> Path:
    """Run the six, print the table, write the report; returns the report's path."""
    from fedmllm.report import load_results, summary_table, write_report

    if out.is_file():
        raise UserError(f"{out} is a file: choose a folder with --out")
    if out.exists() and any(out.iterdir()) and not (out / RUN_MARK).exists():
        raise UserError(f"{out} exists and is not a demo folder: choose another with --out")
    out.mkdir(parents=True, exist_ok=True)
    (out / RUN_MARK).touch()
    console = Console()
    console.print(f"[bold]{TITLE}[/bold]\n{len(RUNS)} runs on {processes} processes, no network")
    began = time.perf_counter()
    configs = demo_configs()
    work = {config.name: rough_work(config) for config in configs}
    with ManyProgress(work, console) as progress:
        run_many(configs, out, processes=processes, listener=progress.listen)
    found, problems = load_results([out / name for name in RUNS])
    page = write_report(found, out / "report.html", title=TITLE, problems=problems)
    console.print(summary_table(found, width=console.width))
    console.print(
        f"{time.perf_counter() - began:.0f} s.  Open the report: {page.resolve()}", soft_wrap=True
    )
    return page
