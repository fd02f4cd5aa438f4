"""Server algorithms by name. To add one: write its file and add one line to `ALGORITHMS`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedmllm.algorithms.base import Algorithm
from fedmllm.algorithms.fedavg import fedavg
from fedmllm.algorithms.fedavgm import fedavgm
from fedmllm.algorithms.fedopt import fedadagrad, fedadam, fedyogi
from fedmllm.algorithms.fedprox import fedprox
from fedmllm.algorithms.options import check_count
from fedmllm.algorithms.scaffold import scaffold
from fedmllm.errors import chosen


@dataclass(frozen=True)
class AlgorithmSpec:
    """One line on an algorithm, its builder, and the builder's options with their defaults.

    needs_num_clients: the builder also takes the size of the federation.
    """

    summary: str
    build: Callable[..., Algorithm]
    options: Mapping[str, object]
    needs_num_clients: bool = False


def _spec(summary: str, build: Callable[..., Algorithm]) -> AlgorithmSpec:
    """Read the options off the builder's keywords, so that defaults stand in one place only."""
    options = {name: p.default for name, p in inspect.signature(build).parameters.items()}
    needs_num_clients = "num_clients" in options
    options.pop("num_clients", None)
    return AlgorithmSpec(summary, build, options, needs_num_clients)


ALGORITHMS: dict[str, AlgorithmSpec] = {
    "fedavg": _spec("mean of the updates, weighted by samples", fedavg),
    "fedprox": _spec("FedAvg with a proximal term on the clients", fedprox),
    "fedavgm": _spec("FedAvg with server momentum", fedavgm),
    "fedadagrad": _spec("adaptive server: sum of squared updates", fedadagrad),
    "fedyogi": _spec("adaptive server: Yogi's second moment", fedyogi),
    "fedadam": _spec("adaptive server: Adam's second moment", fedadam),
    "scaffold": _spec("control variates against client drift", scaffold),
}


def make_algorithm(name: str, *, num_clients: int, **options: object) -> Algorithm:
    """Build the algorithm `name` for a federation of `num_clients` clients.

    Raises `UserError` for an unknown name or option or for a value out of range.
    """
    spec = chosen("algorithm", name, ALGORITHMS, options, of=name)
    check_count(num_clients=num_clients)
    extra = {"num_clients": num_clients} if spec.needs_num_clients else {}
    return spec.build(**extra, **options)
