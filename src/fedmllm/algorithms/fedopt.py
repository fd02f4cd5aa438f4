"""FedAdagrad, FedYogi, FedAdam: one adaptive server step with three second-moment rules.

"Adaptive Federated Optimization", S. J. Reddi, Z. Charles, M. Zaheer, Z. Garrett, K. Rush,
J. Konečný, S. Kumar, H. B. McMahan, ICLR 2021, Algorithm 2.

v is made of the squared mean update d^2, not of the squared momentum. Printings of the algorithm up
to 2021 folded the momentum into d and so squared it; an author called that a typo and announced
a corrected arXiv version (google-research/federated, issue 41). The reference keeps m^2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from fedmllm.algorithms.base import Aggregate, Algorithm, ServerState
from fedmllm.algorithms.options import (
    FORMS,
    check_decay,
    check_form,
    check_not_negative,
    check_positive,
    check_weighting,
)
from fedmllm.algorithms.state import first_state, map_together, slot_of

SecondMoment = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(v, g) -> the next v; g is d in the paper's form, m in the reference's (the same for Adagrad)."""


def fedadagrad(
    *,
    eta: float = 1e-3,
    tau: float = 1e-3,
    beta1: float = 0.9,
    v0: float | None = None,
    weighting: str = "uniform",
    form: str = "paper",
) -> Algorithm:
    """v += d^2. The reference has no momentum: there beta1 is not used (as with beta1 = 0).

    Other options as in `fedadam`; there is no beta2. Algorithm 2 has beta1 for all three rules;
    Adagrad as usually run, and as Flower runs it, has beta1 = 0.
    """
    decay = 0.0 if form == "reference" else beta1
    check_decay(beta1=beta1)
    return _adaptive(
        "fedadagrad",
        lambda v, g: v + g**2,
        eta=eta,
        tau=tau,
        beta1=decay,
        v0=v0,
        weighting=weighting,
        form=form,
    )


def fedyogi(
    *,
    eta: float = 1e-3,
    tau: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.99,
    v0: float | None = None,
    weighting: str = "uniform",
    form: str = "paper",
) -> Algorithm:
    """v -= (1 - beta2) * d^2 * sign(v - d^2). Options as in `fedadam`."""
    check_decay(beta2=beta2)
    return _adaptive(
        "fedyogi",
        lambda v, g: v - (1 - beta2) * g**2 * torch.sign(v - g**2),
        eta=eta,
        tau=tau,
        beta1=beta1,
        v0=v0,
        weighting=weighting,
        form=form,
    )


def fedadam(
    *,
    eta: float = 1e-3,
    tau: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.99,
    v0: float | None = None,
    weighting: str = "uniform",
    form: str = "paper",
) -> Algorithm:
    """v = beta2 * v + (1 - beta2) * d^2, without bias correction.

    eta: server learning rate > 0. tau: adaptivity > 0. beta1, beta2: decays in [0, 1). v0: where v
    starts, None for tau^2; the paper asks for v0 >= tau^2, 0 is for comparison with Flower.
    weighting: ``uniform`` as in the paper, or ``samples``. form: ``paper``, or ``reference``:
    m = d in the first round and v from m^2.
    """
    check_decay(beta2=beta2)
    return _adaptive(
        "fedadam",
        lambda v, g: beta2 * v + (1 - beta2) * g**2,
        eta=eta,
        tau=tau,
        beta1=beta1,
        v0=v0,
        weighting=weighting,
        form=form,
    )


def _adaptive(
    name: str,
    second_moment: SecondMoment,
    *,
    eta: float,
    tau: float,
    beta1: float,
    v0: float | None,
    weighting: str,
    form: str,
) -> Algorithm:
    """m = beta1 * m + (1 - beta1) * d; v by its rule; theta += eta * m / (sqrt(v) + tau)."""
    check_form(name, form, FORMS)
    check_positive(eta=eta, tau=tau)
    check_decay(beta1=beta1)
    start = tau**2 if v0 is None else v0
    check_not_negative(v0=start)
    check_weighting(weighting)

    def step(state: ServerState, mean: Aggregate) -> ServerState:
        decay = 0.0 if form == "reference" and state.round == 0 else beta1

        def move(
            theta: torch.Tensor, m: torch.Tensor, v: torch.Tensor, d: torch.Tensor
        ) -> tuple[torch.Tensor, ...]:
            m = decay * m + (1 - decay) * d
            v = second_moment(v, m if form == "reference" else d)
            return theta + eta * (m / (v.sqrt() + tau)), m, v

        slots = slot_of(state, "m"), slot_of(state, "v")
        d = mean.delta()
        theta, m, v = map_together(move, state.params, *slots, d, spare=d)
        return ServerState(state.round + 1, theta, {"m": m, "v": v})

    init = functools.partial(first_state, slots={"m": 0.0, "v": start})
    return Algorithm(name, weighting, init, step)
