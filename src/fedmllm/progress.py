"""Live progress of a run: round, loss, metric, time left. One line a round where no terminal is."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def headline(event: Mapping[str, Any]) -> tuple[str, float] | None:
    """The headline metric of an event that carries metrics, with both modalities."""
    name = event.get("metric", "")
    value = ((event.get("metrics") or {}).get("both") or {}).get(name)
    return None if value is None else (name, value)


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
        elif event["event"] == "done" and event.get("shortened"):
            cut = event["shortened"]
            self.console.print(
                f"{cut['samples']} samples were too long and shortened, e.g. {cut['first'][0]}"
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
