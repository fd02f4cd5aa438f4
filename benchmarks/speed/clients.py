"""Row `clients`: seconds a round and peak memory with 10, 100 and 1,000 simulated clients.

Ten are sampled a round, each holds 20 of the embedded memes; one round of FedAvg through
`experiment.run`, without tests. Each number of clients is a process of its own, which runs each
seed twice: `cold`, with images that were never seen, and `warm`, with all kept, as later rounds
with few clients are. Compared with ten clients: all should be as fast, and take as much memory.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import child, write

CLIENTS = (10, 100, 1000)
SAMPLES = 20
GOAL = 1.1


def part(clients: int, repeats: int) -> dict[str, Any]:
    """The runs of one process."""
    from fedmllm.config import make_config
    from fedmllm.experiment import Shared, load_model, run
    from fedmllm.models.features import FeatureCache

    found: dict[str, list[float]] = {"cold": [], "warm": []}
    whole: list[float] = []
    peaks: list[int] = []
    shared: Shared | None = None
    for seed in range(repeats + 1):
        config = make_config(
            {
                "name": "clients",
                "seed": seed,
                "data": {"name": "memes", "train": SAMPLES * clients, "test": 8},
                "partition": {"name": "even", "clients": clients},
                "training": {"rounds": 1, "clients_per_round": 10},
                "evaluation": {"every": 0, "limit": 8, "conditions": ["both"]},
            }
        )
        shared = shared or Shared(load_model(config))
        shared.mllm.features = FeatureCache()
        shared.encoded.clear()
        for way in found:
            with tempfile.TemporaryDirectory() as folder:
                result = run(config, out=Path(folder) / "run", shared=shared)
            if seed:  # the first is for nothing
                found[way].append(result["history"][0]["seconds"])
                whole.append(result["time"]["total_seconds"])
                peaks.append(result["peak_memory_bytes"])
    return {"seconds": found, "run_seconds": whole, "peak_bytes": max(peaks)}


def main(quick: bool, *words: str) -> None:
    """Every number of clients, or one in this process."""
    if words:
        print(json.dumps(part(int(words[1]), int(words[2]))))
        return
    cases: list[dict[str, Any]] = []
    for clients in (10, 50) if quick else CLIENTS:
        repeats = 1 if quick else 4
        found = child("clients", "--here", "part", str(clients), str(repeats))
        medians = {way: statistics.median(times) for way, times in found["seconds"].items()}
        first = cases[0] if cases else {"median": medians, **found}
        cases.append(
            {
                "case": f"{clients:,} clients",
                "clients": clients,
                **found,
                "median": medians,
                "over_ten": {
                    **{way: medians[way] / first["median"][way] for way in medians},
                    "peak": found["peak_bytes"] / first["peak_bytes"],
                },
                "goal": GOAL,
            }
        )
        shown = {key: round(value, 2) for key, value in cases[-1]["over_ten"].items()}
        print(f"{clients} clients: {medians}, over ten clients {shown}", flush=True)
    write("clients", cases, what=__doc__ or "", quick=quick)
