"""What the benchmark prints: the plan of a grid, and what became of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedmllm.bench.grid import Grid
from fedmllm.bench.run import Ended
from fedmllm.bench.state import KINDS, Present, states
from fedmllm.bench.timing import estimates, measured_results
from fedmllm.report.facts import format_seconds


def plan_lines(
    grid: Grid, *, out: Path | None, measured: Sequence[Path], processes: int
) -> Iterator[str]:
    """A line a cell with its state and time, then the sums. Runs nothing, reads no weights."""
    folder = out or grid.out
    present = Present()
    found = states(grid.cells, folder, present)
    seconds = estimates(grid.cells, measured_results([folder, *measured]), present)
    width = max(len(cell.name) for cell in grid.cells)
    yield f"{grid.title}: {_axes(grid)}"
    for cell in grid.cells:
        state = found[cell.name]
        time = format_seconds(seconds[cell.name]) if cell.name in seconds else "unknown"
        why = "".join(f"\n    {reason.splitlines()[0]}" for reason in state.reasons)
        stands = f"  for {len(cell.places)} places" if len(cell.places) > 1 else ""
        yield f"{cell.name:{width}}  {state.kind:8}{time:>9}{stands}{why}"
    counts = Counter(state.kind for state in found.values())
    yield ", ".join(f"{counts[kind]} {kind}" for kind in KINDS if counts[kind])
    todo = [cell for cell in grid.cells if found[cell.name].kind != "done"]
    known = [seconds[cell.name] for cell in todo if cell.name in seconds]
    if todo:
        yield _total(len(todo), known, processes)
    for name, about in grid.open_variables.items():
        yield f"to be given: --set {name}=…   {about}"


def _axes(grid: Grid) -> str:
    sizes = " × ".join(f"{len(values)} {axis}" for axis, values in grid.axes.items())
    places = sum(len(cell.places) for cell in grid.cells)
    return f"{sizes}; {places} places, {len(grid.cells)} cells"


def _total(count: int, known: Sequence[float], processes: int) -> str:
    if not known:
        return f"to run: {count} cells; their time is unknown, nothing like them was measured here"
    at_least = max(max(known), sum(known) / processes)  # a run is not shared by processes
    rest = f", and {count - len(known)} cells of unknown time" if len(known) < count else ""
    return (
        f"to run: {count} cells, about {format_seconds(at_least)} "
        f"on {processes} process{'es' * (processes > 1)}{rest}"
    )


def ended_lines(ended: Ended, folder: Path) -> Iterator[str]:
    """Counts, the failures with their reasons, and what to do next."""
    yield (
        f"{len(ended.done)} done, {len(ended.skipped)} were done before, "
        f"{len(ended.failed)} failed, {format_seconds(ended.seconds)}"
    )
    for name, reason in ended.failed.items():
        yield f"FAILED {name}: {reason.splitlines()[0]}"
    if ended.failed:
        yield f"Start it again to try these again; {folder / 'bench.json'} says more."
    yield f"fedmllm report {folder}    makes its tables and figures"
