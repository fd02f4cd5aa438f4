"""Bytes that cross between server and clients, by the same function that a run states them with.

A client receives theta and the slots that the algorithm broadcasts, and sends its update and what
the algorithm and the strategy add to it (`federation.message_parts`). Everything is exchanged as
float32. Only tensors count, as in a run's result: no headers, no retries. Where nothing federates
(local, centralised, zero-shot) nothing crosses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedmllm.algorithms.base import Algorithm, Params
from fedmllm.federation import message_parts
from fedmllm.models.components import COMPONENTS


@dataclass(frozen=True)
class Traffic:
    """Bytes. parts: of one client in one round, ``up`` (to the server) and ``down``, by part.
    cohort: clients of a round. once: of all clients before the first round, up and down, by what
    they are for."""

    parts: Mapping[str, Mapping[str, int]]
    cohort: int
    rounds: int
    once: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def client_up(self) -> int:
        """One client in one round."""
        return sum(self.parts["up"].values())

    @property
    def client_down(self) -> int:
        """One client in one round."""
        return sum(self.parts["down"].values())

    @property
    def round_up(self) -> int:
        """All clients of a round together."""
        return self.client_up * self.cohort

    @property
    def round_down(self) -> int:
        """All clients of a round together."""
        return self.client_down * self.cohort

    @property
    def up(self) -> int:
        """All rounds together."""
        return self.round_up * self.rounds + sum(up for up, _ in self.once.values())

    @property
    def down(self) -> int:
        """All rounds together."""
        return self.round_down * self.rounds + sum(down for _, down in self.once.values())


def count_traffic(
    algorithm: Algorithm,
    adapter: Params,
    component_of: Mapping[str, str],
    *,
    topology: str,
    clients: int,
    cohort: int,
    rounds: int,
    once: Mapping[str, tuple[int, int]],
) -> Traffic:
    """Bytes of a run. adapter: tensors of the exchanged shapes, which may lie on the meta device.

    component_of: the trained component of each. clients: of the federation. cohort: how many are
    asked for a round; fewer take part if there are fewer. once: as of `Traffic`.
    """
    if topology != "federated":
        nothing = {way: dict.fromkeys(COMPONENTS, 0) for way in ("up", "down")}
        return Traffic(nothing, cohort=0, rounds=0 if topology == "zero-shot" else rounds)
    parts = message_parts(algorithm, adapter, component_of)
    return Traffic(parts, min(cohort, clients), rounds, once)
