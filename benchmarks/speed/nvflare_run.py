"""Row `nvflare_run`: 25 rounds of the embedded memes, against the same job in NVFlare's simulator.

The job of row `flower_run`: ten clients, two a round, FedAvg, missing modalities; both sides train
a client by our own function. Ours is one process with one thread, or two. NVFlare's simulator has a
process of one thread for each client, and both clients of a round train at the same time; models
and samples are loaded before its first round. Cohorts are drawn by each side's own rule. Measured
from outside with start-up and end, and from the second round's beginning to the last one's end.
"""

from __future__ import annotations

import sys
from pathlib import Path

from flower_run import engine_row


def main(quick: bool) -> None:
    """Both sides."""
    rounds = 3 if quick else 25
    app = str(Path(__file__).with_name("nvflare_run_app.py"))
    sides = {"NVFlare": [sys.executable, app, str(rounds)]}
    engine_row("nvflare_run", sides, "nvflare", what=__doc__ or "", rounds=rounds, quick=quick)
