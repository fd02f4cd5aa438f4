"""How the updates of a round become one, by name. To add one: a function and a line.

Every rule but the mean counts all clients alike, whatever `Algorithm.weighting` says, and stands
before any server optimiser. What they protect from is a few clients that send anything at all; what
they take for it is the updates of honest clients that differ from the rest.

"Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", D. Yin, Y. Chen,
K. Ramchandran, P. Bartlett, ICML 2018: median and trimmed mean of each coordinate.
"Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", P. Blanchard,
E. M. El Mhamdi, R. Guerraoui, J. Stainer, NeurIPS 2017: Krum and Multi-Krum.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedmllm.algorithms.base import Aggregation, Algorithm
from fedmllm.algorithms.gathered import Gathered, Rule
from fedmllm.errors import UserError, chosen


def mean() -> Aggregation:
    """The mean, weighted as the algorithm says; streamed, and no protection at all."""
    return Aggregation()


def median() -> Aggregation:
    """The median of each coordinate; of an even number the mean of the middle two. It needs 3
    updates, as the median of two is their mean."""
    return _gathering("median", 3, _median)


def trimmed_mean(*, trim: int = 1) -> Aggregation:
    """The mean of each coordinate without its `trim` largest and `trim` smallest values.

    trim: whole number >= 0, how many hostile clients are expected; it needs 2 trim + 1 updates.
    The paper names a share beta of the clients instead: trim = beta N.
    """
    _check_whole("trim", trim, least=0)
    rule = functools.partial(_trimmed, trim=trim)
    return _gathering("trimmed-mean", 2 * trim + 1, rule, "trim")


def krum(*, byzantine: int = 1) -> Aggregation:
    """The one update with the least sum of squared distances to its N - f - 2 nearest others.

    byzantine: f, whole number >= 0, how many hostile clients are expected; it needs 2 f + 3
    updates.
    Of updates with one score the first in the cohort is taken.
    """
    _check_whole("byzantine", byzantine, least=0)
    rule = functools.partial(_krum, byzantine=byzantine, keep=1)
    return _gathering("krum", 2 * byzantine + 3, rule, "byzantine")


def multi_krum(*, byzantine: int = 1, keep: int | None = None) -> Aggregation:
    """The plain mean of the `keep` updates that Krum likes best.

    byzantine: f, as in `krum`. keep: m, 1 (Krum) to N - f - 2, which is the default, whatever
    number N of updates a round has; it needs 2 f + 3 updates, and f + 2 more than it keeps.
    """
    _check_whole("byzantine", byzantine, least=0)
    if keep is not None:
        _check_whole("keep", keep, least=1)
    rule = functools.partial(_krum, byzantine=byzantine, keep=keep)
    needed = max(2 * byzantine + 3, byzantine + 2 + (keep or 1))
    return _gathering("multi-krum", needed, rule, "byzantine", *(["keep"] if keep else []))


@dataclass(frozen=True)
class AggregationSpec:
    """One line on an aggregation, its builder, and the builder's options with their defaults."""

    summary: str
    build: Callable[..., Aggregation]
    options: Mapping[str, object]


def _spec(summary: str, build: Callable[..., Aggregation]) -> AggregationSpec:
    options = {name: p.default for name, p in inspect.signature(build).parameters.items()}
    return AggregationSpec(summary, build, options)


AGGREGATIONS: dict[str, AggregationSpec] = {
    "mean": _spec("weighted as the algorithm says; one hostile client moves it at will", mean),
    "median": _spec("of each coordinate, all clients alike", median),
    "trimmed-mean": _spec("of each coordinate without its extreme values", trimmed_mean),
    "krum": _spec("the update that is nearest to most others", krum),
    "multi-krum": _spec("the mean of those that are nearest to most others", multi_krum),
}


def make_aggregation(name: str, **options: object) -> Aggregation:
    """Build the aggregation `name`. Raises `UserError` for an unknown name or option or for a value
    out of range."""
    return chosen("aggregation", name, AGGREGATIONS, options, of=name).build(**options)


def with_aggregation(algorithm: Algorithm, aggregation: Aggregation) -> Algorithm:
    """The algorithm's server optimiser behind another aggregation, which counts all clients alike.

    Raises `UserError` for SCAFFOLD: its c is the mean of all clients' controls, which every client
    corrects its steps by; a robust rule over their changes would no longer give that mean, and
    without one the controls of a hostile client reach everybody.
    """
    if aggregation.name == "mean":
        return algorithm
    if algorithm.local.control:
        raise UserError(
            f"{algorithm.name} sends every client the mean of all control variates, of which "
            f"aggregation {aggregation.name} protects none: choose another algorithm or "
            "aggregation mean"
        )
    return replace(algorithm, aggregation=aggregation, weighting="uniform")


# -- rules: (updates, row to fill) -> positions of those chosen, none if all took part -----------


def _gathering(name: str, needed: int, rule: Rule, *knobs: str) -> Aggregation:
    own = Aggregation(name, needed, lambda weighting, folder: Gathered(rule, folder, own), knobs)
    return own


def _median(found: Gathered, row_P: torch.Tensor) -> Sequence[int]:
    return _trimmed(found, row_P, trim=(found.count - 1) // 2)


def _trimmed(found: Gathered, row_P: torch.Tensor, *, trim: int) -> Sequence[int]:
    """Sums are taken in sorted order and float64: the order of the clients changes no bit."""
    for here, x_NC in found.blocks():
        row_P[here] = _middle(x_NC, trim)
    return ()


def _middle(x_NC: torch.Tensor, trim: int) -> torch.Tensor:
    x_CN = x_NC.T.clone(memory_format=torch.contiguous_format).numpy()
    x_CN.sort(axis=1)
    middle_CM = x_CN[:, trim : len(x_NC) - trim]
    return torch.from_numpy(middle_CM.mean(axis=1, dtype=np.float64))


def _krum(
    found: Gathered, row_P: torch.Tensor, *, byzantine: int, keep: int | None
) -> Sequence[int]:
    near = found.count - byzantine - 2
    scores_N = krum_scores(_distances(found), near)
    order_N = torch.argsort(scores_N, stable=True).tolist()
    best = sorted(order_N[: near if keep is None else keep])
    for here, x_MC in found.blocks(best):
        row_P[here] = x_MC.mean(0, dtype=torch.float64)
    return best


def krum_scores(distances_NN: torch.Tensor, near: int) -> torch.Tensor:
    """s(i), the sum of the squared distances [N, N] of update i to its `near` nearest others."""
    others_NN = distances_NN.clone().fill_diagonal_(torch.inf)
    return others_NN.sort(dim=1).values[:, :near].sum(1)


def _distances(found: Gathered) -> torch.Tensor:
    """||x_i - x_j||^2 as ||x_i||^2 + ||x_j||^2 - 2 x_i x_j, float64 [N, N].

    One product of matrices a block. Its rounding is 1e-16 of the larger of the two norms, so that
    a huge update blurs its own distances and nobody else's.
    """
    products_NN = torch.zeros(found.count, found.count, dtype=torch.float64)
    for _, x_NC in found.blocks():
        products_NN += _products(x_NC.double())
    norms_N = products_NN.diagonal()
    return (norms_N[:, None] + norms_N - products_NN - products_NN.T).clamp(min=0)


def _products(x_NC: torch.Tensor) -> torch.Tensor:
    return x_NC @ x_NC.T


def _check_whole(name: str, value: object, *, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"aggregation option {name} is {value!r}: choose a whole number >= {least}")
