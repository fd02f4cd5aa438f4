"""What the rows have in common: timing, ratios of one repetition, the files that they write."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results" / "speed"
QUICK = ROOT / "runs" / "speed-quick"  # never committed
T = TypeVar("T")


@dataclass(frozen=True)
class Took:
    """Seconds: of the clock on the wall, and of this process's CPU time."""

    wall: float
    cpu: float


def timed(work: Callable[[], T]) -> tuple[T, Took]:
    """What `work` gives, and how long it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return found, Took(time.perf_counter() - wall, time.process_time() - cpu)


def compare(
    name: str,
    tries: Sequence[Mapping[str, Took]],
    *,
    count: float,
    unit: str,
    goals: Mapping[str, float],
    **more: Any,
) -> dict[str, Any]:
    """A case: `ours` against every other way of each repetition.

    Ratios are of one repetition (their seconds / ours), medians over the repetitions. count: how
    many of `unit` were done. goals: the ratio that is asked for, by way.
    """
    others = [way for way in tries[0] if way != "ours"]
    return {
        "case": name,
        "unit": unit,
        "count": count,
        "seconds": {
            way: {
                "wall": [one[way].wall for one in tries],
                "cpu": [one[way].cpu for one in tries],
            }
            for way in tries[0]
        },
        "per_second": {
            way: count / statistics.median(one[way].wall for one in tries) for way in tries[0]
        },
        "ratio": {
            way: {
                "wall": statistics.median(one[way].wall / one["ours"].wall for one in tries),
                "cpu": statistics.median(one[way].cpu / one["ours"].cpu for one in tries),
                "goal": goals.get(way),
            }
            for way in others
        },
        **more,
    }


def tell(case: Mapping[str, Any]) -> None:
    """A case in one line."""
    ratios = ", ".join(
        f"{way} {found['wall']:.2f} (CPU {found['cpu']:.2f})"
        for way, found in case["ratio"].items()
    )
    rate = f"{case['per_second']['ours']:,.1f} {case['unit']}/s"
    print(f"{case['case']}: ours {rate}; times slower: {ratios}", flush=True)


def write(row: str, cases: Sequence[Mapping[str, Any]], *, what: str, quick: bool) -> Path:
    """The row's file: results/speed/ROW.json, or runs/speed-quick/ROW.json of a quick look."""
    from fedmllm import results

    path = (QUICK if quick else RESULTS) / f"{row}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "schema": 1,
        "row": row,
        "what": what,
        "quick": quick,
        "cases": list(cases),
        "versions": results.versions(),
        "hardware": results.hardware(1, "cpu"),
        "load_before": START_LOAD,
        "commit": results.commit(),
    }
    results.write_json(path, facts)
    print(f"result  {path.relative_to(ROOT)}", flush=True)
    return path


START_LOAD = os.getloadavg()[0]  # of the minute before: a quiet machine says little above 0


def child(*words: str, python: str | None = None, **environment: str) -> dict[str, Any]:
    """This package in a process of its own; the last line that it prints, as JSON."""
    command = [python or sys.executable, str(Path(__file__).parent), *words]
    source = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    known = {**os.environ, "PYTHONPATH": source.rstrip(os.pathsep), **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=known)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(words)} failed\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def high_water() -> int:
    """Peak resident memory of this process, bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("error: /proc/self/status has no VmHWM: this row needs Linux")
