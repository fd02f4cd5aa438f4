"""Flower's half of row `flower_run`, run by Flower's own interpreter: ROUNDS CORES.

A ServerApp with FedAvg, and a ClientApp around our `train_client`, in Flower's simulator.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

import flower_client
import flower_run as job
import flwr
from flwr.app import ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

server_app = ServerApp()
ROUNDS, CORES = int(sys.argv[1]), int(sys.argv[2])
STARTED: list[float] = []  # of each round
LOSSES: list[float] = []
FINAL: dict[str, Any] = {}


class Timed(FedAvg):
    """FedAvg that notes when a round begins."""

    def configure_train(self, *args: Any, **kwargs: Any) -> Any:
        STARTED.append(time.perf_counter())
        return super().configure_train(*args, **kwargs)

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        arrays, metrics = super().aggregate_train(server_round, replies)
        if metrics is None:
            raise SystemExit("error: no client answered")
        LOSSES.append(float(metrics["loss"]))
        return arrays, metrics


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    """Two of ten clients a round, no evaluation."""
    strategy = Timed(fraction_train=0.2, fraction_evaluate=0.0, min_train_nodes=2)
    first = flower_client.to_record(flower_client.model().init_adapter(0))
    strategy.start(
        grid=grid,
        initial_arrays=first,
        num_rounds=ROUNDS,
        train_config=ConfigRecord({"rounds": ROUNDS}),
    )
    FINAL["later"] = time.perf_counter() - STARTED[1]


def main() -> None:
    """The simulation; its facts on the last line."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    run_simulation(
        server_app=server_app,
        client_app=flower_client.app,
        num_supernodes=job.CLIENTS,
        backend_config={
            "init_args": {"num_cpus": CORES},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    facts = {"later": FINAL["later"], "rounds": len(STARTED), "losses": LOSSES}
    print(json.dumps({**facts, "flwr": flwr.__version__}), flush=True)


if __name__ == "__main__":
    main()
