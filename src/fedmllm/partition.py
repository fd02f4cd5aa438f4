"""Who gets which sample: label skew by Dirichlet draws, or an even random split.

Both order the samples by id before they draw, so the result depends on the seed, the ids and the
classes, never on the order in which a file or a folder lists them.

Hsu, Qi, Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification", arXiv 1909.06335, draw class proportions per client. Here, as in the benchmark
protocol, client proportions are drawn per class, which leaves no sample out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fedmllm.errors import UserError
from fedmllm.rng import stream, uniform

PARTITIONS = ("dirichlet", "even")


def dirichlet(
    ids: Sequence[str], labels: Sequence[int], *, clients: int, alpha: float, seed: int
) -> list[list[int]]:
    """Split samples with label skew: p_c ~ Dirichlet(alpha) over clients for every class c.

    Client k gets within one sample of p_ck * n_c samples of class c. A client left with nothing
    then takes one sample from the client that holds most (ties: the first).

    ids, labels: of equal length n; ids unique. alpha > 0; smaller is more skewed.
    Returns the sorted positions of each client's samples: a partition of 0..n-1, no part empty.
    Raises `UserError` for clients < 1, clients > n, alpha <= 0 or a sample without a label.
    """
    _check_clients(clients, len(ids))
    check_alpha(alpha)
    if any(label is None for label in labels):
        raise UserError("a sample has no label: label skew needs one; use partition 'even'")
    order = _by_id(ids)
    owner = np.empty(len(ids), dtype=np.int64)  # in id order
    for label, members in _members_by_class(np.asarray(labels)[order]):
        shuffled = stream(seed, "partition-order", label).permutation(members)
        p_K = proportions(label, clients=clients, alpha=alpha, seed=seed)
        cuts = np.rint(np.cumsum(p_K)[:-1] * len(members)).astype(np.int64)
        for client, part in enumerate(np.split(shuffled, cuts)):
            owner[part] = client
    _fill_empty(owner, clients, seed)
    return _positions(order, owner, clients)


def proportions(label: int, *, clients: int, alpha: float, seed: int) -> np.ndarray:
    """The share of class `label` that each client is due: one Dirichlet draw, sums to 1."""
    draw = stream(seed, "partition-proportions", label).dirichlet(np.full(clients, alpha))
    if not np.isclose(draw.sum(), 1):  # alpha so small or large that it under- or overflows
        raise UserError(f"alpha {alpha!r} cannot be drawn in floating point: choose e.g. 0.5")
    return draw


def even(ids: Sequence[str], *, clients: int, seed: int, pool: str = "train") -> list[list[int]]:
    """Split samples at random into parts whose sizes differ by at most one.

    pool: what is split; two pools of one dataset get draws of their own.
    Returns and raises as `dirichlet`.
    """
    _check_clients(clients, len(ids))
    order = _by_id(ids)
    shuffled = stream(seed, "partition-even", pool).permutation(len(ids))
    owner = np.empty(len(ids), dtype=np.int64)  # in id order
    for client, part in enumerate(np.array_split(shuffled, clients)):
        owner[part] = client
    return _positions(order, owner, clients)


def check_alpha(alpha: float) -> None:
    """Raise `UserError` unless alpha is a positive finite number."""
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < np.inf:
        raise UserError(f"alpha is {alpha!r}: give a number above 0, e.g. 0.5 (smaller: more skew)")


def _check_clients(clients: int, samples: int) -> None:
    if clients < 1:
        raise UserError(f"clients is {clients}: give 1 or more")
    if clients > samples:
        raise UserError(
            f"{clients} clients cannot share {samples} samples: every client needs at least one; "
            "lower the number of clients or use more data"
        )


def _by_id(ids: Sequence[str]) -> np.ndarray:
    return np.asarray(sorted(range(len(ids)), key=ids.__getitem__), dtype=np.int64)


def _members_by_class(labels: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(class, positions) in ascending order of both."""
    classes, counts = np.unique(labels, return_counts=True)
    parts = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
    return [(int(label), part) for label, part in zip(classes, parts, strict=True)]


def _fill_empty(owner: np.ndarray, clients: int, seed: int) -> None:
    """Give every client without a sample one of the largest client's, in place."""
    counts = np.bincount(owner, minlength=clients)
    for client in np.flatnonzero(counts == 0):
        donor = counts.argmax()
        held = np.flatnonzero(owner == donor)
        owner[held[stream(seed, "partition-repair", client).integers(len(held))]] = client
        counts[donor] -= 1
        counts[client] += 1


def _positions(order: np.ndarray, owner: np.ndarray, clients: int) -> list[list[int]]:
    """From owners in id order to each client's sorted positions in the caller's order."""
    given = np.empty_like(owner)
    given[order] = owner
    parts = np.split(
        np.argsort(given, kind="stable"), np.cumsum(np.bincount(given, minlength=clients))[:-1]
    )
    return [part.tolist() for part in parts]


def held_out_count(size: int, share: float) -> int:
    """How many of a client's samples `held_out` takes."""
    return min(math.ceil(share * size), size - 1) if size else 0


def held_out(ids: Sequence[str], *, share: float, seed: int) -> set[str]:
    """The samples of one client that it tests on and does not train on: `share` of them, rounded
    up, so that one that holds two or more has one; at least one is left to train on.

    A function of (seed, sample id): with a greater share, those of a smaller one are among them.
    """
    count = held_out_count(len(ids), share)
    ranked = sorted(ids, key=lambda name: (uniform(seed, "held-out", name), name))
    return set(ranked[:count])
