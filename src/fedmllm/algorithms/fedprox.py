"""FedProx: FedAvg whose clients are held near the global model by a proximal term.

"Federated Optimization in Heterogeneous Networks", T. Li, A. K. Sahu, M. Zaheer, M. Sanjabi,
A. Talwalkar, V. Smith, MLSys 2020, Algorithm 2.
"""

from __future__ import annotations

from fedmllm.algorithms.base import Algorithm, LocalObjective
from fedmllm.algorithms.fedavg import averaging
from fedmllm.algorithms.options import check_form, check_not_negative


def fedprox(
    *, mu: float = 0.01, eta: float = 1.0, weighting: str = "samples", form: str = "paper"
) -> Algorithm:
    """Clients minimise F_k(theta) + mu/2 * ||theta - theta_global||^2; the server is FedAvg's.

    mu: proximal coefficient >= 0; 0 is FedAvg to the last bit. eta, weighting: as in `fedavg`.
    Deviation: the paper draws client k with probability n_k / n and then averages plainly; here
    cohorts are drawn uniformly, so the mean is weighted by n_k instead.
    """
    check_form("fedprox", form, ("paper",))
    check_not_negative(mu=mu)
    return averaging("fedprox", eta=eta, weighting=weighting, local=LocalObjective(mu=mu))
