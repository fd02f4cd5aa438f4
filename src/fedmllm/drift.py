"""How far the updates of a round point apart, streamed: nothing is held but three sums.

For the updates d_1 … d_K of a round with mean d:

    cosine      mean of cos(d_j, d_k) over pairs j != k of updates that are not 0
    dispersion  sqrt(mean ||d_k - d||^2) / ||d||

Clients that pull one way have a cosine near 1 and a dispersion near 0. Of their class prototypes
(`fedmllm.alignment`) the mean cosine over pairs of clients and the classes that both hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from fedmllm.algorithms.base import Params, Update
from fedmllm.alignment import PROTOTYPES


class Drift:
    """Fold the updates of a round, then ask for its `facts`."""

    def __init__(self) -> None:
        self.count, self.units, self.squares = 0, 0, 0.0
        self._sum: Params = {}
        self._units: Params = {}
        self._prototypes: torch.Tensor | None = None
        self._held: torch.Tensor | None = None

    def fold(self, update: Update) -> None:
        """Add one update."""
        norm = _norm(update.delta)
        self.count += 1
        self.squares += norm**2
        for name, value in update.delta.items():
            _add(self._sum, name, value.double())
            if norm:
                _add(self._units, name, value.double() / norm)
        self.units += norm > 0
        if PROTOTYPES in update.extra:
            self._fold_prototypes(update.extra[PROTOTYPES])

    def facts(self) -> dict[str, float]:
        """What is defined of: cosine, dispersion, prototype_cosine. Empty for one client."""
        if self.count < 2:
            return {}
        length = _norm(self._sum) / self.count
        spread = max(0.0, self.squares / self.count - length**2)
        found = {}
        if self.units > 1:
            pairs = self.units**2 - self.units
            found["cosine"] = (_norm(self._units) ** 2 - self.units) / pairs
        if length:
            found["dispersion"] = math.sqrt(spread) / length
        if self._prototypes is not None and self._held is not None:
            pairs_C = self._held * (self._held - 1)
            if pairs_C.sum():
                excess_C = self._prototypes.square().sum(1) - self._held
                found["prototype_cosine"] = float(excess_C.sum() / pairs_C.sum())
        return found

    def _fold_prototypes(self, own: Params) -> None:
        held_C = (own["count"] > 0).double()
        units_CD = torch.nn.functional.normalize(own["sum"].double(), dim=1) * held_C[:, None]
        before, held = self._prototypes, self._held
        self._prototypes = units_CD if before is None else before + units_CD
        self._held = held_C if held is None else held + held_C


def _add(total: Params, name: str, value: torch.Tensor) -> None:
    total[name] = total[name] + value if name in total else value


def _norm(params: Mapping[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in params.values()))
