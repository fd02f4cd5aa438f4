"""FedAvgM: FedAvg with momentum on the server.

"Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification",
T.-M. H. Hsu, H. Qi, M. Brown, arXiv 1909.06335 (2019).
"""

from __future__ import annotations

import functools

import torch

from fedmllm.algorithms.base import Aggregate, Algorithm, ServerState
from fedmllm.algorithms.options import (
    FORMS,
    check_decay,
    check_form,
    check_positive,
    check_weighting,
)
from fedmllm.algorithms.state import first_state, map_together, slot_of


def fedavgm(
    *, beta: float = 0.9, eta: float = 1.0, weighting: str = "samples", form: str = "paper"
) -> Algorithm:
    """theta += eta * m with the momentum m of the mean update d; slot ``m`` starts at 0.

    form ``paper``: m = beta * m + d. ``reference``: m = beta * m + (1 - beta) * d, but m = d in
    the first round; its steps are smaller by about 1 - beta, so one eta does not fit both.
    beta: decay, 0 <= beta < 1; with beta = 0 and eta = 1 both forms are FedAvg. eta: server
    learning rate > 0. weighting: ``samples`` or ``uniform``.
    """
    check_form("fedavgm", form, FORMS)
    check_decay(beta=beta)
    check_positive(eta=eta)
    check_weighting(weighting)

    def step(state: ServerState, mean: Aggregate) -> ServerState:
        gain = 1.0 if form == "paper" or state.round == 0 else 1 - beta

        def move(theta: torch.Tensor, m: torch.Tensor, d: torch.Tensor) -> tuple[torch.Tensor, ...]:
            m = beta * m + gain * d
            return theta + eta * m, m

        d = mean.delta()
        theta, m = map_together(move, state.params, slot_of(state, "m"), d, spare=d)
        return ServerState(state.round + 1, theta, {"m": m})

    return Algorithm("fedavgm", weighting, functools.partial(first_state, slots={"m": 0.0}), step)
