"""Drift of a round's updates, against the pairs themselves."""

from __future__ import annotations

import itertools

import pytest
import torch

from fedmllm.algorithms.base import Update
from fedmllm.drift import Drift


def update(client: str, values, prototypes=None) -> Update:
    delta = {"a": torch.tensor(values[:1]), "b": torch.tensor(values[1:])}
    return Update(client, 1, delta, {"prototypes": prototypes} if prototypes else {})


def test_by_hand() -> None:
    """(3, 0) and (0, 4): cosine 0; mean (1.5, 2), of length 2.5, and each 2.5 from it."""
    drift = Drift()
    for name, values in (("x", [3.0, 0.0]), ("y", [0.0, 4.0])):
        drift.fold(update(name, values))
    assert drift.facts() == pytest.approx({"cosine": 0.0, "dispersion": 1.0}, abs=1e-12)


def test_against_the_pairs() -> None:
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 7, generator=draw) + 0.5
    drift = Drift()
    for k, row in enumerate(rows):
        drift.fold(update(str(k), row.tolist()))
    pairs = itertools.combinations(rows.double(), 2)
    cosines = [torch.cosine_similarity(a, b, dim=0).item() for a, b in pairs]
    mean = rows.double().mean(0)
    spread = (rows - mean).square().sum(1).mean().sqrt() / mean.norm()
    found = drift.facts()
    assert found["cosine"] == pytest.approx(sum(cosines) / len(cosines))
    assert found["dispersion"] == pytest.approx(float(spread), rel=1e-6)


def test_an_update_that_is_nothing_has_no_direction() -> None:
    """u, u and 0: one pair has a cosine, and it is 1."""
    drift = Drift()
    for k, row in enumerate([[1.0, 2.0], [0.0, 0.0], [2.0, 4.0]]):
        drift.fold(update(str(k), row))
    assert drift.facts()["cosine"] == pytest.approx(1.0)
    alone = Drift()
    for k, row in enumerate([[1.0, 2.0], [0.0, 0.0]]):
        alone.fold(update(str(k), row))
    assert set(alone.facts()) == {"dispersion"}


def test_prototypes_are_compared_where_two_clients_have_the_class() -> None:
    """Class 0: (1, 0), (0, 2), (3, 0): cosines 0, 1, 0. Class 1: one client only. Class 2: 60
    degrees apart."""
    sums = [
        [[1.0, 0.0], [5.0, 5.0], [0.0, 0.0]],
        [[0.0, 2.0], [0.0, 0.0], [1.0, 0.0]],
        [[3.0, 0.0], [0.0, 0.0], [0.5, 3**0.5 / 2]],
    ]
    counts = [[1.0, 2, 0], [1, 0, 1], [2, 0, 4]]
    drift = Drift()
    for k, (total, count) in enumerate(zip(sums, counts, strict=True)):
        own = {"sum": torch.tensor(total), "count": torch.tensor(count)}
        drift.fold(update(str(k), [1.0, 1.0], own))
    assert drift.facts()["prototype_cosine"] == pytest.approx((0 + 1 + 0 + 0.5) / 4)


def test_what_is_not_defined_is_left_out() -> None:
    drift = Drift()
    assert drift.facts() == {}
    drift.fold(update("x", [1.0, 2.0]))
    assert drift.facts() == {}
    drift.fold(update("y", [-1.0, -2.0]))  # the mean is nothing
    assert drift.facts() == pytest.approx({"cosine": -1.0})
