"""SCAFFOLD: control variates on server and clients correct the drift of local training.

"SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", S. P. Karimireddy, S. Kale,
M. Mohri, S. J. Reddi, S. U. Stich, A. T. Suresh, ICML 2020, Algorithm 1. Here is the server's
half, lines 16 to 17; the clients' half is `LocalObjective(control=True)`.
"""

from __future__ import annotations

import functools

from fedmllm.algorithms.base import Aggregate, Algorithm, LocalObjective, ServerState
from fedmllm.algorithms.options import check_count, check_form, check_positive
from fedmllm.algorithms.state import advance, first_state, map_together, slot_of
from fedmllm.errors import UserError


def scaffold(*, num_clients: int, eta_g: float = 1.0, form: str = "paper") -> Algorithm:
    """x += eta_g * mean_S(y_i - x); c += |S| / N * mean_S(c_i_new - c_i); plain means over S.

    num_clients: N, all clients of the federation. eta_g: global step size > 0. Slot ``control``
    is c; it starts at 0 and is sent to the clients, which send ``extra["control"]`` back.
    As long as every c_i starts at 0, c stays the mean of all N c_i.
    """
    check_form("scaffold", form, ("paper",))
    check_count(num_clients=num_clients)
    check_positive(eta_g=eta_g)

    def step(state: ServerState, mean: Aggregate) -> ServerState:
        if mean.count > num_clients:
            raise UserError(f"{mean.count} updates in a federation of {num_clients} clients")
        share = mean.count / num_clients
        change = mean.extra("control")
        (control,) = map_together(
            lambda c, change: (c + share * change,), slot_of(state, "control"), change, spare=change
        )
        return advance(state, mean.delta(), eta_g, {"control": control})

    return Algorithm(
        "scaffold",
        "uniform",
        functools.partial(first_state, slots={"control": 0.0}),
        step,
        LocalObjective(control=True),
        broadcast=("control",),
    )
