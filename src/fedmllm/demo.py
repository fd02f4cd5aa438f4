"""`fedmllm demo`: six runs that show what modality heterogeneity costs and what helps."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from fedmllm.config import Config, make_config
from fedmllm.errors import UserError
from fedmllm.parallel import run_many
from fedmllm.progress import headline

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
    with DemoProgress(configs, console) as progress:
        run_many(configs, out, processes=processes, listener=progress.listen)
    found, problems = load_results([out / name for name in RUNS])
    page = write_report(found, out / "report.html", title=TITLE, problems=problems)
    console.print(summary_table(found, width=console.width))
    console.print(
        f"{time.perf_counter() - began:.0f} s.  Open the report: {page.resolve()}", soft_wrap=True
    )
    return page


RUN_MARK = ".fedmllm-demo"


class DemoProgress:
    """A live table: a line a run with round, loss, metric, and the time left for all."""

    def __init__(self, configs: list[Config], console: Console) -> None:
        self.console = console
        self.live = Live(console=console, refresh_per_second=4, transient=True)
        self.work = {config.name: _work(config) for config in configs}
        self.done = dict.fromkeys(self.work, 0.0)
        self.lines: dict[str, dict[str, str]] = {name: {"state": "waiting"} for name in self.work}
        self.began = time.perf_counter()

    def __enter__(self) -> DemoProgress:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def listen(self, event: Mapping[str, Any]) -> None:
        """Show one event of a run."""
        line = self.lines[event["name"]]
        if event["event"] == "start":
            line["state"] = "running"
        elif event["event"] == "round":
            self._round(event, line)
        elif event["event"] == "test":
            line["state"] = "testing"
        elif event["event"] == "done":
            self.done[event["name"]] = self.work[event["name"]]
            line["state"] = "done"
            self._metric(event, line)
        if self.console.is_terminal:
            self.live.update(self.table())
        elif event["event"] in ("start", "done") or event.get("metrics"):
            facts = " ".join(f"{key} {value}" for key, value in line.items() if key != "state")
            left = self.left()
            text = f"{event['name']}: {line['state']} {facts} ({left} left)"
            self.console.print(text, soft_wrap=True)

    def _round(self, event: Mapping[str, Any], line: dict[str, str]) -> None:
        who = f" {event['federation']}" if event["federation"] else ""
        line["round"] = f"{event['round']}/{event['rounds']}{who}"
        line["loss"] = f"{event['loss']:.3f}"
        share = len(event["clients"]) / 10 if event["clients"] != ["pooled"] else 1.0
        self.done[event["name"]] += share
        line["state"] = "running"
        self._metric(event, line)

    def _metric(self, event: Mapping[str, Any], line: dict[str, str]) -> None:
        found = headline(event)
        if found:
            line["metric"] = f"{found[0]} {found[1]:.3f}"

    def left(self) -> str:
        """Time left for all runs, from the work done so far."""
        done, work = sum(self.done.values()), sum(self.work.values())
        if done < 1:
            return "?"
        seconds = (time.perf_counter() - self.began) * (work - done) / done
        return f"{seconds // 60:.0f}:{seconds % 60:02.0f}"

    def table(self) -> Table:
        """The present state of all runs."""
        table = Table(title=f"time left {self.left()}", title_justify="left")
        for column in ("run", "state", "round", "loss", "metric"):
            table.add_column(column, min_width=8)
        for name, line in self.lines.items():
            keys = ("state", "round", "loss", "metric")
            table.add_row(name, *(line.get(key, "") for key in keys))
        return table


def _work(config: Config) -> float:
    """Passes over the whole training set, plus one for testing."""
    shares = {
        "zero-shot": 0.0,
        "local": 1.0,
        "centralised": 1.0,
        "federated": config.training.clients_per_round / config.partition.clients,
    }
    return config.training.rounds * shares[config.topology] + 1.0
