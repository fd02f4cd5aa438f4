"""Row `grid`: 36 runs with two processes, against the same commands before the work on speed.

Memes, crisis and medical; FedAvg, FedProx, FedAdam and SCAFFOLD; half of the modalities missing,
cross-modal 5:5, hybrid 0.7. Ours: `fedmllm bench` on a grid file, two processes. Before: the
package as it was at the commit below, one `fedmllm run` for each run, two at a time, as one had to
do. Every process has one thread, and both sides start with nothing. The losses of both are
compared: those of each round must agree to `AGREE`, or the row stops.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from common import ROOT, Took, compare, tell, timed, write

BEFORE = "8c4601cf46631b54508fdddf100b25119120823b"  # the last before features, cohorts and so on
TASKS: dict[str, dict[str, Any]] = {
    "memes": {"data": {"name": "memes", "train": 240, "test": 40}},
    "crisis": {"data": {"name": "crisis", "train": 240, "test": 40}},
    "medical": {
        "data": {"name": "medical", "train": 120, "test": 40, "flashcards": 120},
        "partition": {"name": "even"},
    },
}
ALGORITHMS = ("fedavg", "fedprox", "fedadam", "scaffold")
SETTINGS: dict[str, dict[str, Any]] = {
    "missing": {"scenario": {"name": "missing", "beta": 0.5}},
    "cross": {"scenario": {"name": "cross", "images": "5:5"}},
    "hybrid": {"scenario": {"name": "hybrid", "p": 0.7}},
}
BASE: dict[str, Any] = {
    "training": {"rounds": 5, "clients_per_round": 2},
    "evaluation": {"every": 0, "conditions": ["both", "image_withheld"]},
}
MAIN = "import sys; from fedmllm.cli import main; main()"
AGREE = 1e-2  # relative, of a round's loss: float32 sums in another order grow over the rounds


def command(source: Path, *words: str) -> None:
    """A `fedmllm` command of one source tree."""
    known = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-c", MAIN, *words]
    done = subprocess.run(line, capture_output=True, text=True, env=known)
    if done.returncode:
        raise SystemExit(f"error: fedmllm {' '.join(words)} failed\n{done.stderr[-4000:]}")


def old_source(folder: Path) -> Path:
    """The package as it was."""
    packed = subprocess.run(
        ["git", "archive", BEFORE, "src"], cwd=ROOT, capture_output=True, check=True
    )
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder / "src"


def names(quick: bool) -> list[tuple[str, str, str]]:
    """Task, algorithm and setting of each run."""
    every = list(itertools.product(TASKS, ALGORITHMS, SETTINGS))
    return every[:2] if quick else every


def before(folder: Path, cells: list[tuple[str, str, str]]) -> None:
    """A command for each run, two at a time."""
    source = old_source(folder)

    def one(cell: tuple[str, str, str]) -> None:
        task, algorithm, setting = cell
        config = {**BASE, **TASKS[task], **SETTINGS[setting], "algorithm": algorithm}
        file = folder / f"{'-'.join(cell)}.yaml"
        file.write_text(yaml.safe_dump(config))
        command(source, "run", str(file), "--out", str(folder / "runs" / "-".join(cell)))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, cells))


def now(folder: Path, cells: list[tuple[str, str, str]]) -> None:
    """One grid file, two processes."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks, algorithms, settings = (dict.fromkeys(c[i] for c in cells) for i in range(3))
    file = folder / "grid.yaml"
    axes = {
        "dataset": {task: TASKS[task] for task in tasks},
        "method": {name: {"algorithm": name} for name in algorithms},
        "setting": {name: SETTINGS[name] for name in settings},
    }
    file.write_text(yaml.safe_dump({"title": "speed", "base": BASE, "axes": axes}))
    words = ("bench", str(file), "--out", str(folder / "runs"), "--processes", "2")
    command(ROOT / "src", *words)


def with_children(work: Callable[[], None]) -> Took:
    """How long it took; CPU time is that of the processes it started."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    began = used()
    _, took = timed(work)
    return Took(took.wall, used() - began)


def losses(folder: Path) -> dict[str, list[float]]:
    """Each run's losses, by a name that both sides have."""
    found = {}
    for file in sorted(folder.glob("runs/*/result.json")):
        result = json.loads(file.read_text())
        config = result["config"]
        parts = (config["data"]["name"], config["algorithm"]["name"], config["scenario"]["name"])
        found["-".join(parts)] = [line["loss"] for line in result["history"]]
    return found


def main(quick: bool) -> None:
    """Both sides, once: there are 36 runs in each."""
    cells = names(quick)
    with tempfile.TemporaryDirectory() as place:
        here, there = Path(place) / "now", Path(place) / "before"
        os.environ["XDG_CACHE_HOME"] = str(Path(place) / "cache")
        ours = with_children(lambda: now(here, cells))
        print(f"now: {ours.wall:.0f} s", flush=True)
        theirs = with_children(lambda: before(there, cells))
        one, other = losses(here), losses(there)
    if one.keys() != other.keys() or len(one) != len(cells):
        raise SystemExit(f"error: the runs differ: {sorted(one)}, {sorted(other)}")
    apart = max(abs(a / b - 1) for name in one for a, b in zip(one[name], other[name], strict=True))
    if apart > AGREE:
        raise SystemExit(f"error: losses of a round part by {apart:.2g} of their value")
    case = compare(
        f"{len(cells)} runs, 2 processes",
        [{"ours": ours, "before": theirs}],
        count=len(cells),
        unit="runs",
        goals={"before": 3.0},
        before=BEFORE,
        largest_difference_of_losses=apart,
    )
    tell(case)
    write("grid", [case], what=__doc__ or "", quick=quick)
