"""Row `flower_run`: 25 rounds of the embedded memes, against the same job in Flower's simulator.

Ten clients, two a round, FedAvg, missing modalities; both sides train a client by our own function,
so that the difference is the engine's. Ours is one process with one thread, or two (`processes`).
Flower's simulator has one actor of one thread, or two. Two train both clients of a round at the
same time. Cohorts are
drawn by each side's own rule. Measured from outside with start-up, and from the second round's
beginning to the end.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import ROOT, Took, compare, tell, write

from fedmllm.config import Config, make_config

CLIENTS = 10


def config(rounds: int) -> Config:
    """The job. Eight samples are tested at the end, since a run tests something."""
    return make_config(
        {
            "name": "engine",
            "data": {"name": "memes", "train": 250, "test": 8},
            "setting": "missing-b0.5",
            "partition": {"clients": CLIENTS},
            "training": {"rounds": rounds, "clients_per_round": 2},
            "evaluation": {"every": 0, "limit": 8, "conditions": ["both"]},
        }
    )


def ours(rounds: int, processes: int) -> dict[str, Any]:
    """A run in this process, and in others if there are to be more."""
    from fedmllm.experiment import run

    with tempfile.TemporaryDirectory() as folder:
        result = run(config(rounds), out=Path(folder) / "run", processes=processes)
    lines = result["history"]
    later = sum(line["seconds"] for line in lines[1:])
    return {"later": later, "rounds": len(lines), "losses": [line["loss"] for line in lines]}


def outside(*command: str) -> dict[str, Any]:
    """A process, timed from outside."""
    source = os.pathsep.join([str(ROOT / "src"), str(Path(__file__).parent)])
    known = {
        **os.environ,
        "PYTHONPATH": source,
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=known)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)} failed\n{done.stderr[-4000:]}")
    whole = time.perf_counter() - began
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return {"whole": whole, **json.loads(lines[-1])}


OURS = ("flower_run", "--here", "part")  # this row in a process of its own


def main(quick: bool, *words: str) -> None:
    """Both sides, or ours in this process."""
    if words:
        print(json.dumps(ours(int(words[1]), int(words[2]))))
        return
    if "FLOWER_PYTHON" not in os.environ:
        print("flower_run: left out, FLOWER_PYTHON is not given", flush=True)
        return
    rounds = 3 if quick else 25
    app = [os.environ["FLOWER_PYTHON"], str(Path(__file__).with_name("flower_run_app.py"))]
    sides = {
        "Flower, one actor": [*app, str(rounds), "1"],
        "Flower, two actors": [*app, str(rounds), "2"],
    }
    engine_row("flower_run", sides, "flwr", what=__doc__ or "", rounds=rounds, quick=quick)


def engine_row(
    row: str,
    sides: Mapping[str, Sequence[str]],
    engine: str,
    *,
    what: str,
    rounds: int,
    quick: bool,
) -> None:
    """Ours against the commands of an engine (`sides`), each of which says its version under the
    engine's name."""
    own = [sys.executable, str(Path(__file__).parent), *OURS, str(rounds)]
    ours_by = {"": [*own, "1"], ", ours on two processes": [*own, "2"]}
    tries = []
    for _ in range(1 if quick else 2):
        found = {name: outside(*command) for name, command in {**ours_by, **sides}.items()}
        if any(one["rounds"] != rounds for one in found.values()):
            raise SystemExit(f"error: {rounds} rounds were asked for: {found}")
        tries.append(found)
    cases = []
    for mode, (name, key, count) in itertools.product(
        ours_by,
        (
            (f"{rounds} rounds, start-up included", "whole", rounds),
            (f"rounds 2 to {rounds}", "later", rounds - 1),
        ),
    ):
        ways = {"ours": mode, **{side: side for side in sides}}
        took = [{w: Took(each[at][key], math.nan) for w, at in ways.items()} for each in tries]
        losses = {w: statistics.fmean(tries[0][at]["losses"]) for w, at in ways.items()}
        cases.append(
            compare(
                f"{name}{mode}",
                took,
                count=count,
                unit="rounds",
                goals=dict.fromkeys(sides, 3.0),
                mean_loss=losses,
                **{engine: tries[0][next(iter(sides))][engine]},
            )
        )
        tell(cases[-1])
    write(row, cases, what=what, quick=quick)
