"""Row `nvflare_run`: 25 rounds of the embedded memes, against the same job in NVFlare's simulator.

The job of row `flower_run`: ten clients, two a round, FedAvg, missing modalities; both sides train
a client by our own function. Ours is one process with one thread. NVFlare's simulator has a process
of one thread for each client, and both clients of a round train at the same time; models and
samples are loaded before its first round. Cohorts are drawn by each side's own rule. Measured from
outside with start-up and end, and from the second round's beginning to the last one's end.
"""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path

from common import Took, compare, tell, write
from flower_run import outside


def main(quick: bool) -> None:
    """Both sides."""
    rounds = 3 if quick else 25
    here = Path(__file__).parent
    tries = []
    for _ in range(1 if quick else 2):
        found = {
            "ours": outside(sys.executable, str(here), "flower_run", "--here", "part", str(rounds)),
            "NVFlare": outside(sys.executable, str(here / "nvflare_run_app.py"), str(rounds)),
        }
        if any(one["rounds"] != rounds for one in found.values()):
            raise SystemExit(f"error: {rounds} rounds were asked for: {found}")
        tries.append(found)
    cases = []
    for name, key, count in (
        (f"{rounds} rounds, start-up included", "whole", rounds),
        (f"rounds 2 to {rounds}", "later", rounds - 1),
    ):
        took = [{w: Took(f[key], math.nan) for w, f in each.items()} for each in tries]
        cases.append(
            compare(
                name,
                took,
                count=count,
                unit="rounds",
                goals={"NVFlare": 3.0},
                mean_loss={w: statistics.fmean(f["losses"]) for w, f in tries[0].items()},
                nvflare=tries[0]["NVFlare"]["nvflare"],
            )
        )
        tell(cases[-1])
    write("nvflare_run", cases, what=__doc__ or "", quick=quick)
