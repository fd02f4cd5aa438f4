"""Run what is missing or stale of a grid."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fedmllm.bench.grid import Cell, Grid
from fedmllm.bench.lock import locked
from fedmllm.bench.state import (
    Present,
    digest,
    fingerprint,
    read_journal,
    states,
    write_journal,
)
from fedmllm.bench.timing import estimates, measured_results
from fedmllm.errors import UserError
from fedmllm.parallel import Failure, Job, default_processes, rough_work, run_jobs
from fedmllm.progress import ManyProgress
from fedmllm.report.loading import config_digest
from fedmllm.report.shared import Entry, difference, write_shared


@dataclass(frozen=True)
class Ended:
    """What became of a grid. skipped: cells that were done before. failed: reason by name."""

    skipped: tuple[str, ...]
    done: tuple[str, ...]
    failed: Mapping[str, str]
    seconds: float


def run_grid(
    grid: Grid,
    *,
    out: Path | None = None,
    processes: int | None = None,
    devices: Sequence[str] = (),
    measured: Sequence[Path] = (),
    console: Console | None = None,
) -> Ended:
    """Run every cell that is not done; each has its run folder below `out` (by default the
    grid's). A failed cell does not stop the others.

    processes: by default `processes_for` the grid. devices: accelerators by CUDA's numbers, one a
    process. measured: folders with results to judge
    times from, besides `out`. Raises `UserError` if a variable of the grid has no value, or
    another process runs a benchmark in that folder.
    """
    began = time.perf_counter()
    folder, processes = out or grid.out, processes or processes_for(grid, devices)
    if grid.open_variables:
        lines = [f"  --set {name}=…   {about}" for name, about in grid.open_variables.items()]
        raise UserError(f"{grid.name} needs values for its variables:\n" + "\n".join(lines))
    with locked(folder):
        write_shared(folder, shared_entries(grid.cells), [cell.name for cell in grid.cells])
        present = Present()
        found = states(grid.cells, folder, present)
        todo = [cell for cell in grid.cells if found[cell.name].kind != "done"]
        seconds = estimates(todo, measured_results([folder, *measured]), present)
        work = _work(todo, seconds)
        jobs = [Job(c.config, folder / c.name, found[c.name].resumable, work[c.name]) for c in todo]
        marks = {cell.name: digest(fingerprint(cell.config, present)) for cell in todo}
        done, failed = _run(jobs, marks, folder, processes, devices, console)
    names = {job.config.name for job in jobs}
    skipped = tuple(cell.name for cell in grid.cells if cell.name not in names)
    return Ended(skipped, tuple(done), failed, time.perf_counter() - began)


def shared_entries(cells: Sequence[Cell]) -> dict[str, Entry]:
    """What `shared.json` says of the cells whose runs stand in other places too."""
    entries: dict[str, Entry] = {}
    for cell in cells:
        own = cell.config.model_dump(mode="json")
        places = [difference(own, other.model_dump(mode="json")) for other in cell.stands_for]
        places = [{k: v for k, v in place.items() if k != "name"} for place in places]
        if places:
            entries[cell.name] = {"config_sha256": config_digest(own), "stands_for": places}
    return entries


def processes_for(grid: Grid, devices: Sequence[str] = ()) -> int:
    """How many cells to run at a time where nobody says (`default_processes`)."""
    accelerated = any(cell.config.model.device != "cpu" for cell in grid.cells)
    return default_processes(devices, accelerated=accelerated)


def _work(cells: Sequence[Cell], seconds: Mapping[str, float]) -> dict[str, float]:
    """Each cell's seconds; where nothing was measured, a guess in scale with those that were."""
    rough = {cell.name: rough_work(cell.config) for cell in cells}
    known = sum(rough[name] for name in seconds)
    scale = sum(seconds.values()) / known if known else 1.0
    return {name: seconds.get(name, scale * guess) for name, guess in rough.items()}


def _run(
    jobs: Sequence[Job],
    marks: Mapping[str, str],
    folder: Path,
    processes: int,
    devices: Sequence[str],
    console: Console | None,
) -> tuple[list[str], dict[str, str]]:
    """Run the jobs under one display; names of those done, and why the others failed."""
    journal = read_journal(folder)
    done: list[str] = []
    failed: dict[str, str] = {}
    if not jobs:
        return done, failed

    with ManyProgress({job.config.name: job.work for job in jobs}, console) as progress:

        def listen(event: Mapping[str, object]) -> None:
            name = str(event["name"])
            if event["event"] == "start":
                journal["begun"][name] = marks[name]
                journal["failed"].pop(name, None)  # that was another try
                write_journal(folder, journal)
            progress.listen(event)

        ended = run_jobs(jobs, processes=processes, devices=devices, listener=listen)
        for job, outcome in ended:
            name = job.config.name
            if isinstance(outcome, Failure):
                failed[name] = outcome.reason
                journal["failed"][name] = outcome.reason + (
                    f"\n{outcome.detail}" if outcome.detail else ""
                )
                progress.ended(name, failure=outcome.reason)
            else:
                done.append(name)
                for part in journal.values():
                    part.pop(name, None)
            write_journal(folder, journal)
    return done, failed
