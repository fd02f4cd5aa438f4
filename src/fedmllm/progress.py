"""Live progress of a run, and of many: round, loss, metric, time left. Where no terminal is, one
line a round or one line a run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


def headline(event: Mapping[str, Any]) -> tuple[str, float] | None:
    """The headline metric of an event that carries metrics, with both modalities."""
    name = event.get("metric", "")
    value = ((event.get("metrics") or {}).get("both") or {}).get(name)
    return None if value is None else (name, value)


def memory_line(event: Mapping[str, Any]) -> str:
    """What is told when memory did not suffice for a group of clients."""
    return (
        f"{event['name']}: memory ran out with {event['tried']} clients in a pass, "
        f"going on with {event['next']}"
    )


def helper_line(event: Mapping[str, Any]) -> str:
    """What is told when a helping process did not start, or died."""
    rest = "its work is done again" if event["again"] else "the run goes on without it"
    return f"{event['name']}: {event['how']}; {rest}"


class RunProgress:
    """A context manager whose `listen` takes the events of `fedmllm.experiment.run`."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self.live = self.console.is_terminal
        self.bars = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.live,
        )
        self.tasks: dict[str, Any] = {}
        self.facts: dict[str, str] = {}

    def __enter__(self) -> RunProgress:
        self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bars.stop()

    def listen(self, event: Mapping[str, Any]) -> None:
        """Show one event."""
        if event["event"] == "start":
            counts = event["parameters"]
            self.console.print(
                f"{event['name']}: {counts['trainable']:,} of {counts['total']:,} parameters train"
            )
            for module, count in event["lora_modules"].items():
                self.console.print(f"  LoRA on {count} × {module}", soft_wrap=True)
            for module, count in event["copied_modules"].items():
                self.console.print(f"  full copy of {module}: {count:,}", soft_wrap=True)
        elif event["event"] == "round":
            self._round(event)
        elif event["event"] == "memory":
            self.console.print(memory_line(event), soft_wrap=True)
        elif event["event"] == "helper":
            self.console.print(helper_line(event), soft_wrap=True)
        elif event["event"] == "done" and event.get("shortened"):
            cut = event["shortened"]
            self.console.print(
                f"{cut['samples']} samples were too long and shortened, e.g. {cut['first'][0]}; "
                "all ids: shortened.json in the run folder",
                soft_wrap=True,
            )

    def _round(self, event: Mapping[str, Any]) -> None:
        name = f"{event['name']} {event['federation']}".strip()
        measured = headline(event)
        if measured:
            self.facts[name] = f"{measured[0]} {measured[1]:.3f}"
        facts = f"loss {event['loss']:.3f} {self.facts.get(name, '')}"
        if name not in self.tasks:
            self.tasks[name] = self.bars.add_task(name, total=event["rounds"], facts="")
        self.bars.update(self.tasks[name], completed=event["round"], facts=facts)
        if not self.live:
            self.console.print(f"{name} round {event['round']}/{event['rounds']} {facts}")


class ManyProgress:
    """A context manager that shows many runs: those at work in a live table, or, where no
    terminal is, one line for each that ends.

    work: each run's name and how long it takes, in any unit; the time left is judged by it.
    """

    TESTING = 0.1  # of a run's work, as a guess
    ALL = 12  # so many runs are all shown; of more, those at work

    def __init__(self, work: Mapping[str, float], console: Console | None = None) -> None:
        self.console = console or Console()
        self.work = dict(work)
        self.lines: dict[str, dict[str, str]] = {name: {"state": "waiting"} for name in work}
        self.part = dict.fromkeys(work, 0.0)  # of each run's work, done
        self.steps: dict[str, int] = {}
        self.done = self.failed = 0
        self.began = time.perf_counter()
        self.live = Live(console=self.console, refresh_per_second=4, transient=True)

    def __enter__(self) -> ManyProgress:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def listen(self, event: Mapping[str, Any]) -> None:
        """Show one event of a run."""
        name, line = event["name"], self.lines[event["name"]]
        if event["event"] != "done":
            line["state"] = "testing" if event["event"] == "test" else "running"
        if event["event"] == "start":
            self.steps[name] = max(event.get("steps", 0), 1)
        elif event["event"] == "round":
            who = f" {event['federation']}" if event["federation"] else ""
            line["round"] = f"{event['round']}/{event['rounds']}{who}"
            line["loss"] = f"{event['loss']:.3f}"
            self.part[name] += (1 - self.TESTING) / self.steps.get(name, event["rounds"])
        elif event["event"] == "memory":
            self.console.print(memory_line(event), soft_wrap=True, markup=False, highlight=False)
        found = headline(event)
        if found:
            line["metric"] = f"{found[0]} {found[1]:.3f}"
        if event["event"] == "done":
            self.ended(name, seconds=event["elapsed"])
        self._show()

    def ended(self, name: str, *, failure: str = "", seconds: float = 0.0) -> None:
        """Count a run that has ended, also with a failure; print its line where no terminal is.

        A run that tells that it is done need not be counted again.
        """
        if self.lines[name]["state"] in ("failed", "ended"):
            return
        self.part[name] = 1.0
        self.done += not failure
        self.failed += bool(failure)
        line = self.lines[name]
        line["state"] = "failed" if failure else "ended"
        about = failure.splitlines()[0] if failure else f"{line.get('metric', '')}, {seconds:.0f} s"
        if failure or not self.console.is_terminal:
            total = len(self.work)
            word = "FAILED" if failure else "done"
            text = f"[{self.done + self.failed}/{total}] {word} {name}: {about}"
            if not self.console.is_terminal:
                text += f" ({self.failed} failed, {self.left()} left)"
            self.console.print(text, soft_wrap=True, markup=False, highlight=False)
        self._show()

    def left(self) -> str:
        """Time left for all runs, from the work done so far."""
        done = sum(self.work[name] * part for name, part in self.part.items())
        whole = sum(self.work.values())
        if done <= 0:
            return "?"
        seconds = max((time.perf_counter() - self.began) * (whole - done) / done, 0)
        hours, minutes = divmod(int(seconds // 60), 60)
        rest = f"{minutes:02d}:{int(seconds % 60):02d}"
        return f"{hours}:{rest}" if hours else rest.removeprefix("0")

    def table(self) -> Table:
        """The present state: all runs if they are few, else those at work."""
        busy = [
            name for name, line in self.lines.items() if line["state"] in ("running", "testing")
        ]
        shown = list(self.lines) if len(self.lines) <= self.ALL else busy
        counts = f"{self.done} of {len(self.work)} done, {len(busy)} running, {self.failed} failed"
        table = Table(title=f"{counts}, time left {self.left()}", title_justify="left")
        for column in ("run", "state", "round", "loss", "metric"):
            table.add_column(column, min_width=8)
        for name in shown:
            keys = ("state", "round", "loss", "metric")
            table.add_row(name, *(self.lines[name].get(key, "") for key in keys))
        return table

    def _show(self) -> None:
        if self.console.is_terminal:
            self.live.update(self.table())
