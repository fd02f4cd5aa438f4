"""FedAvg: the server adds the clients' mean update.

"Communication-Efficient Learning of Deep Networks from Decentralized Data", H. B. McMahan,
E. Moore, D. Ramage, S. Hampson, B. Agüera y Arcas, AISTATS 2017, Algorithm 1.
"""

from __future__ import annotations

from fedmllm.algorithms.base import Aggregate, Algorithm, LocalObjective, ServerState
from fedmllm.algorithms.options import check_form, check_positive, check_weighting
from fedmllm.algorithms.state import advance, first_state


def fedavg(*, eta: float = 1.0, weighting: str = "samples", form: str = "paper") -> Algorithm:
    """theta += eta * d with d = sum_k n_k d_k / sum_k n_k over the cohort.

    With eta = 1 this is the paper's theta = sum_k n_k theta_k / n. eta: server learning rate > 0
    (1 in the paper). weighting: ``samples``, or ``uniform`` for the plain mean over clients.
    The reference has no form of its own: its code differs by a fault only.
    """
    check_form("fedavg", form, ("paper",))
    return averaging("fedavg", eta=eta, weighting=weighting, local=LocalObjective())


def averaging(name: str, *, eta: float, weighting: str, local: LocalObjective) -> Algorithm:
    """The server of FedAvg under another name and local objective."""
    check_positive(eta=eta)
    check_weighting(weighting)

    def step(state: ServerState, mean: Aggregate) -> ServerState:
        return advance(state, mean.delta(), eta)

    return Algorithm(name, weighting, first_state, step, local)
