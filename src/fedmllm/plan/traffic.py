"""Bytes that cross between server and clients, by the same function that a run counts them with.

A client receives theta and the slots that the algorithm broadcasts, and sends its update and what
the algorithm adds to it (SCAFFOLD: a control each way). Adapters are exchanged as float32. Only
tensors count, as in a run's result: no headers, no retries. Where nothing federates (local,
centralised, zero-shot) nothing crosses.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedmllm.algorithms.base import Algorithm, Params
from fedmllm.federation import payload


@dataclass(frozen=True)
class Traffic:
    """Bytes. lora: the adapter alone. cohort: clients of a round. up is client to server."""

    lora: int
    client_up: int
    client_down: int
    cohort: int
    rounds: int

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
        return self.round_up * self.rounds

    @property
    def down(self) -> int:
        """All rounds together."""
        return self.round_down * self.rounds


def count_traffic(
    algorithm: Algorithm, adapter: Params, *, topology: str, clients: int, cohort: int, rounds: int
) -> Traffic:
    """Bytes of a run. adapter: tensors of the exchanged shapes, which may lie on the meta device.

    clients: of the federation. cohort: how many are asked for a round; fewer take part if there
    are fewer.
    """
    lora = payload(adapter)
    if topology != "federated":
        return Traffic(lora, 0, 0, cohort=0, rounds=0 if topology == "zero-shot" else rounds)
    state = algorithm.init(adapter)
    down = payload(state.params, *(state.slots[slot] for slot in algorithm.broadcast))
    control = payload(adapter) if algorithm.local.control else 0
    return Traffic(lora, lora + control, down, cohort=min(cohort, clients), rounds=rounds)
