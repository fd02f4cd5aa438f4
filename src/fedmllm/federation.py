"""The loop: round after round, clients turn the global adapter into updates and the server
algorithm folds them into the next one.

The loop does not know where clients train. A `Runner` takes the cohort and the state and yields
updates as they arrive; in process that is one after another, on several machines it is a network.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedmllm.algorithms.base import Algorithm, Params, ServerState, StreamingMean, Update
from fedmllm.alignment import PROTOTYPES
from fedmllm.client import Job, LocalPlan, train_client
from fedmllm.cohort import train_cohort
from fedmllm.drift import Drift
from fedmllm.models.cohort import obstacle
from fedmllm.models.components import COMPONENTS
from fedmllm.models.mllm import Encoded, Mllm
from fedmllm.rng import stream


@dataclass(frozen=True)
class RoundRecord:
    """What is kept of a round. bytes_up, bytes_down: all clients together, payload only.

    cohort: the clients whose updates are in it. missing: those that were asked in vain. loss: the
    mean over the clients that tell theirs; NaN if none does. measured: the mean over clients of
    what they state beside the loss, and the drift if asked for.
    """

    round: int
    cohort: tuple[str, ...]
    loss: float
    lr: float
    bytes_up: int
    bytes_down: int
    seconds: float
    missing: tuple[str, ...] = ()
    measured: Mapping[str, float] = field(default_factory=dict)


class Runner(Protocol):
    """Where clients train. memory: what clients keep between rounds, part of a checkpoint."""

    memory: dict[str, Params]

    def ready(self, clients: Sequence[str]) -> Sequence[str]:
        """Those of `clients` that can be asked now; waits until there are enough of them."""
        ...

    def train(
        self,
        round_: int,
        cohort: Sequence[str],
        algorithm: Algorithm,
        state: ServerState,
        *,
        lr: float,
    ) -> Iterator[tuple[int, Update | None]]:
        """Yield (position in the cohort, update) in any order, each once; None for a client that
        did not deliver."""
        ...


def cohort_of(
    clients: Sequence[str],
    size: int,
    *,
    seed: int,
    round_: int,
    chances: Mapping[str, float] | None = None,
) -> list[str]:
    """The clients of a round: `size` of them without replacement, a function of (seed, round).

    chances: of each client, up to a common factor; by default all alike.
    """
    names = sorted(clients)
    if size >= len(names):
        return names
    total = sum(chances[name] for name in names) if chances else 0.0
    odds = [chances[name] / total for name in names] if chances else None
    chosen = stream(seed, "cohort", round_).choice(len(names), size, replace=False, p=odds)
    return [names[i] for i in sorted(chosen)]


def run_round(
    runner: Runner,
    algorithm: Algorithm,
    state: ServerState,
    cohort: Sequence[str],
    *,
    lr: float,
    scales: Mapping[str, float] | None = None,
    drift: bool = False,
) -> tuple[ServerState, RoundRecord]:
    """One round. Returns the next state and the round's record.

    scales: factors on the weights of the clients' updates. drift: measure how far they differ.
    """
    began = time.perf_counter()
    mean = StreamingMean(algorithm.weighting)
    losses, up = [], 0
    delivered: list[str] = []
    apart, stated = Drift(), dict[str, list[float]]()
    arrivals = runner.train(state.round + 1, cohort, algorithm, state, lr=lr)
    for client, update in zip(cohort, in_order(arrivals, len(cohort)), strict=True):
        if update is None:
            continue
        mean.fold(update, (scales or {}).get(client, 1.0))
        delivered.append(client)
        losses += [update.metrics["loss"]] if "loss" in update.metrics else []
        for name in update.metrics.keys() - {"loss"}:
            stated.setdefault(name, []).append(update.metrics[name])
        if drift:
            apart.fold(update)
        up += payload(update.delta, *update.extra.values())
        del update  # its memory is for the step, or for the next one
    sent = payload(state.params, *(state.slots[slot] for slot in algorithm.broadcast))
    record = RoundRecord(
        round=state.round + 1,
        cohort=tuple(delivered),
        loss=sum(loss / len(losses) for loss in losses) if losses else math.nan,
        lr=lr,
        bytes_up=up,
        bytes_down=sent * len(cohort),
        seconds=time.perf_counter() - began,
        missing=tuple(client for client in cohort if client not in delivered),
        measured={
            **{name: sum(stated[name]) / len(stated[name]) for name in sorted(stated)},
            **{f"drift_{name}": value for name, value in apart.facts().items()},
        },
    )
    return algorithm.step(state, mean), record


def in_order(arrivals: Iterable[tuple[int, Update | None]], count: int) -> Iterator[Update | None]:
    """Updates in cohort order, each as soon as its predecessors are there.

    Sums of floats depend on their order; this makes a round's result independent of who was
    quicker. Only updates that overtook another are held. None stands for a client that did not
    deliver. Raises ValueError unless all `count` are told of.
    """
    held: dict[int, Update | None] = {}
    position = 0
    for index, update in arrivals:
        held[index] = update
        while position in held:
            yield held.pop(position)
            position += 1
    if position != count:
        raise ValueError(f"{count} updates expected, none came at position {position}")


def payload(*parts: Params) -> int:
    """Bytes of tensors."""
    return sum(value.nbytes for part in parts for value in part.values())


def message_parts(
    algorithm: Algorithm, adapter: Params, component_of: Mapping[str, str]
) -> dict[str, dict[str, int]]:
    """Bytes that one client sends (``up``) and receives (``down``) in a round, by part: the adapter
    by trained component, zeros included, and what the algorithm and the strategy add to it
    (SCAFFOLD: a control each way; prototypes: a mean and a mark of each class down, a sum and a
    count up).

    adapter: tensors of the exchanged shapes, which may lie on the meta device. component_of: the
    trained component of each of them.
    """
    state = algorithm.init(adapter)
    trained = dict.fromkeys(COMPONENTS, 0)
    for name, value in adapter.items():
        trained[component_of[name]] += value.nbytes
    received = {slot: payload(state.slots[slot]) for slot in algorithm.broadcast}
    sent = {"control": payload(adapter)} if algorithm.local.control else {}
    if PROTOTYPES in state.slots:  # sums and counts are of the size of means and marks
        sent[PROTOTYPES] = payload(state.slots[PROTOTYPES])
    return {"up": trained | sent, "down": trained | received}


@dataclass
class InProcessRunner:
    """Clients on one shared base, in groups of `clients_at_once`.

    samples: the encoded samples of a client, by name (called when the client's group trains).
    memory: what clients keep between rounds (SCAFFOLD's c_k), part of a checkpoint.
    clients_at_once: how many share a pass (`train_cohort`); a group of one takes the plain path
    (`train_client`), and so do all on a model that has an `obstacle`.
    weights: of each client in the adaptive regularisation; 1 for one that is not named.
    """

    mllm: Mllm
    samples: Callable[[str], Sequence[Encoded]]
    plan: LocalPlan
    seed: int
    memory: dict[str, Params] = field(default_factory=dict)
    clients_at_once: int = 1
    weights: Mapping[str, float] = field(default_factory=dict)

    def ready(self, clients: Sequence[str]) -> Sequence[str]:
        return clients

    def train(
        self,
        round_: int,
        cohort: Sequence[str],
        algorithm: Algorithm,
        state: ServerState,
        *,
        lr: float,
    ) -> Iterator[tuple[int, Update]]:
        size = 1 if self.clients_at_once == 1 or obstacle(self.mllm) else self.clients_at_once
        for start in range(0, len(cohort), size):
            group = cohort[start : start + size]
            results = self._train_group(group, round_, algorithm, state, lr=lr)
            for position, (update, memory) in enumerate(results, start=start):
                if memory is not None:
                    self.memory[update.client] = memory
                yield position, update

    def _train_group(
        self,
        group: Sequence[str],
        round_: int,
        algorithm: Algorithm,
        state: ServerState,
        *,
        lr: float,
    ) -> list[tuple[Update, Params | None]]:
        common: dict[str, Any] = {
            "round_": round_,
            "seed": self.seed,
            "lr": lr,
            "plan": self.plan,
            "objective": algorithm.local,
            "broadcast": {slot: state.slots[slot] for slot in algorithm.broadcast},
        }
        jobs = [
            Job(name, self.samples(name), self.memory.get(name), self.weights.get(name, 1.0))
            for name in group
        ]
        if len(jobs) > 1:
            return train_cohort(self.mllm, state.params, jobs, **common)
        job = jobs[0]
        alone = train_client(
            self.mllm,
            state.params,
            job.samples,
            client=job.client,
            memory=job.memory,
            weight=job.weight,
            **common,
        )
        return [alone]
