"""Bytes that cross between server and clients, by the same function that a run counts them with.

A client receives theta and the slots that the algorithm broadcasts, and sends its update and what
the algorithm and the strategy add to it (SCAFFOLD: a control each way; prototypes: a mean and a
mark of each class down, a sum and a count up). Everything is exchanged as float32. Only
tensors count, as in a run's result: no headers, no retries. Where nothing federates (local,
centralised, zero-shot) nothing crosses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedmllm.algorithms.base import Algorithm, Params
from fedmllm.alignment import PROTOTYPES
from fedmllm.federation import payload


@dataclass(frozen=True)
class Traffic:
    """Bytes. components: of the adapter and the prototypes, once. cohort: clients of a round. up is
    client to server. once_up, once_down: of all clients before the first round (profiles)."""

    components: Mapping[str, int]
    client_up: int
    client_down: int
    cohort: int
    rounds: int
    once_up: int = 0
    once_down: int = 0

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
        return self.round_up * self.rounds + self.once_up

    @property
    def down(self) -> int:
        """All rounds together."""
        return self.round_down * self.rounds + self.once_down


def count_traffic(
    algorithm: Algorithm,
    adapter: Params,
    components: Mapping[str, int],
    *,
    topology: str,
    clients: int,
    cohort: int,
    rounds: int,
    once: tuple[int, int] = (0, 0),
) -> Traffic:
    """Bytes of a run. adapter: tensors of the exchanged shapes, which may lie on the meta device.

    components: their bytes by trained component. clients: of the federation. cohort: how many are
    asked for a round; fewer take part if there are fewer. once: bytes up and down of all clients
    before the first round.
    """
    if topology != "federated":
        rounds = 0 if topology == "zero-shot" else rounds
        return Traffic(components, 0, 0, cohort=0, rounds=rounds)
    state = algorithm.init(adapter)
    down = payload(state.params, *(state.slots[slot] for slot in algorithm.broadcast))
    up = payload(adapter) * (2 if algorithm.local.control else 1)
    if PROTOTYPES in state.slots:  # sums and counts are of the size of means and marks
        size = payload(state.slots[PROTOTYPES])
        up, components = up + size, {**components, PROTOTYPES: size}
    cohort = min(cohort, clients)
    return Traffic(components, up, down, cohort, rounds, once_up=once[0], once_down=once[1])
