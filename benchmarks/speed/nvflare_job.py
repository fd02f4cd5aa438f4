"""Server and client of row `nvflare_run`, in a module of its own: NVFlare's processes import it.

Written for Collab, NVFlare's newest interface and its quickest: a client is called, not polled.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import engine_client
import flower_run as job
from nvflare.collab import collab

SAMPLED = 2


class Client:
    """One process a client. Model and samples are loaded before the first round."""

    @collab.init
    def warm(self) -> None:
        engine_client.model()
        engine_client.samples(partition())

    @collab.publish
    def train(self, params: Any, round_: int, rounds: int) -> dict[str, Any]:
        """A client's round by our own function."""
        update = engine_client.train_round(params, partition(), round_=round_, rounds=rounds)
        facts = {"samples": update.num_samples, "loss": update.metrics["loss"]}
        return {"delta": update.delta, **facts}


def partition() -> int:
    """Which part of the data is this client's."""
    return int(collab.site_name.split("-")[1]) - 1


class Server:
    """FedAvg over two of ten clients a round, folded in as they come, no evaluation."""

    def __init__(self, rounds: int, out: str) -> None:
        self.rounds, self.out = rounds, out

    @collab.main
    def serve(self) -> None:
        draws = random.Random(0)
        params = engine_client.model().init_adapter(0)
        started, losses = [], []
        for round_ in range(1, self.rounds + 1):
            started.append(time.perf_counter())
            cohort = sorted(draws.sample(range(1, job.CLIENTS + 1), SAMPLED))
            clients = collab.get_clients([f"site-{i}" for i in cohort])
            weight, sums, lost = 0, None, []
            calls = clients(blocking=False, timeout=600.0)
            for _, reply in calls.train(params, round_, self.rounds):
                n, delta = reply["samples"], reply["delta"]
                weight += n
                lost.append(reply["loss"])
                if sums is None:
                    sums = {name: value.mul_(n) for name, value in delta.items()}
                else:
                    for name, value in delta.items():
                        sums[name].add_(value, alpha=n)
            if sums is None or len(lost) != SAMPLED:
                raise RuntimeError(f"round {round_}: {len(lost)} clients answered")
            params = {name: value + sums[name] / weight for name, value in params.items()}
            losses.append(sum(lost) / SAMPLED)
        later = time.perf_counter() - started[1]
        facts = {"later": later, "rounds": len(losses), "losses": losses}
        Path(self.out).write_text(json.dumps(facts))
