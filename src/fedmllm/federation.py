"""The loop: round after round, clients turn the global adapter into updates and the server
algorithm folds them into the next one.

The loop does not know where clients train. A `Runner` takes the cohort and the state and yields
updates as they arrive; in process that is one after another, on several machines it is a network.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from fedmllm.algorithms.base import Algorithm, Params, ServerState, Update, check_enough
from fedmllm.algorithms.scratch import Scratch
from fedmllm.alignment import PROTOTYPES
from fedmllm.client import Job, LocalPlan, train_client
from fedmllm.cohort import train_cohort
from fedmllm.drift import Drift
from fedmllm.errors import MemoryRanOutError
from fedmllm.models.cohort import obstacle
from fedmllm.models.components import COMPONENTS
from fedmllm.models.device import out_of_memory, release_memory
from fedmllm.models.mllm import Mllm
from fedmllm.models.passes import Encoded
from fedmllm.rng import stream


@dataclass(frozen=True)
class RoundRecord:
    """What is kept of a round. bytes_up, bytes_down: all clients together, payload only.

    cohort: the clients whose updates are in it. missing: those that were asked in vain. chosen: of
    the cohort, those that the next adapter is made of, where the aggregation picks some. loss: the
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
    chosen: tuple[str, ...] = ()
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
    scratch: Path | None = None,
) -> tuple[ServerState, RoundRecord]:
    """One round. Returns the next state and the round's record.

    scales: factors on the weights of the clients' updates. drift: measure how far they differ.
    scratch: a folder for updates that do not stay in memory (`Scratch`).
    Raises `UserError` if an update cannot be taken, or if fewer came than the aggregation needs: no
    state is changed then, and the round can be done again.
    """
    began = time.perf_counter()
    mean = algorithm.aggregation.begin(algorithm.weighting, scratch)
    losses, up = [], 0
    delivered: list[str] = []
    apart, stated = Drift(), dict[str, list[float]]()
    arrivals = runner.train(state.round + 1, cohort, algorithm, state, lr=lr)
    ordered = in_order(arrivals, len(cohort), scratch)
    for client, update in zip(cohort, ordered, strict=True):
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
    came = f"in round {state.round + 1} there are {len(delivered)} of {len(cohort)} asked for"
    check_enough(algorithm.aggregation, len(delivered), came)
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
    after = algorithm.step(state, mean)
    return after, replace(record, chosen=mean.chosen)


def in_order(
    arrivals: Iterable[tuple[int, Update | None]], count: int, scratch: Path | None = None
) -> Iterator[Update | None]:
    """Updates in cohort order, each as soon as its predecessors are there.

    Sums of floats depend on their order; this makes a round's result independent of who was
    quicker. Only updates that overtook another are held (`Overtakers`). None stands for a client
    that did not deliver. Raises ValueError unless all `count` are told of.
    """
    held = Overtakers(scratch)
    position = 0
    for index, update in arrivals:
        held.put(index, update, wait=index != position)
        del update  # it would stay in memory while the next one is waited for
        while position in held:
            yield held.take(position)
            position += 1
    if position != count:
        raise ValueError(f"{count} updates expected, none came at position {position}")


HELD = 2
"""Updates that overtook others and wait in memory; more wait on disk."""


class Overtakers:
    """Updates that came before their turn, by position: `HELD` in memory, the others in a file.

    So a cohort whose first client is the slowest takes no more memory than any other.
    """

    def __init__(self, scratch: Path | None = None) -> None:
        self._held: dict[int, Update | None] = {}
        self._away: dict[int, tuple[Update, int]] = {}  # its shapes, and where its numbers begin
        self._scratch = Scratch(scratch)

    def __contains__(self, position: int) -> bool:
        return position in self._held or position in self._away

    def put(self, position: int, update: Update | None, *, wait: bool) -> None:
        """Keep an update until its turn; None takes no room, and what need not wait stays."""
        room = sum(each is not None for each in self._held.values()) < HELD
        if update is None or room or not wait:
            self._held[position] = update
            return
        start = self._scratch.write(each for part in _parts(update) for each in part.values())
        self._away[position] = _over_tensors(update, _shape_of), start

    def take(self, position: int) -> Update | None:
        """Give an update back, the same to the bit."""
        if position in self._held:
            return self._held.pop(position)
        shapes, start = self._away.pop(position)
        update = _over_tensors(shapes, torch.empty_like, device="cpu")
        for part in _parts(update):
            for value in part.values():
                self._scratch.read(value, start)
                start += value.nbytes
        if not self._away:
            self._scratch.clear()
        return update


def _shape_of(value: torch.Tensor) -> torch.Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


def _parts(update: Update) -> list[Params]:
    return [update.delta, *update.extra.values()]


def _over_tensors(update: Update, function: Callable[..., torch.Tensor], **options: Any) -> Update:
    """The update with every tensor replaced by what the function makes of it."""

    def over(params: Params) -> Params:
        return {name: function(value, **options) for name, value in params.items()}

    extra = {slot: over(params) for slot, params in update.extra.items()}
    return replace(update, delta=over(update.delta), extra=extra)


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
    (`train_client`), and so do all on a model that has an `obstacle`. A group for which memory does
    not suffice is halved and trained anew, and later ones are no larger: then it is lowered.
    weights: of each client in the adaptive regularisation; 1 for one that is not named.
    groups: the sizes of the groups of the last round. halved: called when memory ran out, with the
    size that was tried and the one that is tried next.
    """

    mllm: Mllm
    samples: Callable[[str], Sequence[Encoded]]
    plan: LocalPlan
    seed: int
    memory: dict[str, Params] = field(default_factory=dict)
    clients_at_once: int = 1
    weights: Mapping[str, float] = field(default_factory=dict)
    groups: list[int] = field(default_factory=list)
    halved: Callable[[int, int], None] = lambda tried, next_: None

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
        alone = bool(self.clients_at_once > 1 and obstacle(self.mllm))
        self.groups = []
        while (start := sum(self.groups)) < len(cohort):
            size = 1 if alone else self.clients_at_once
            group = [self._job(name) for name in cohort[start : start + size]]
            results = self._within_memory(group, round_, algorithm, state, lr=lr)
            if results is None:
                self.clients_at_once = len(group) // 2
                self.halved(len(group), self.clients_at_once)
                continue
            self.groups.append(len(group))
            for position, (update, memory) in enumerate(results, start=start):
                if memory is not None:
                    self.memory[update.client] = memory
                yield position, update

    def _job(self, name: str) -> Job:
        return Job(name, self.samples(name), self.memory.get(name), self.weights.get(name, 1.0))

    def _within_memory(
        self,
        group: Sequence[Job],
        round_: int,
        algorithm: Algorithm,
        state: ServerState,
        *,
        lr: float,
    ) -> list[tuple[Update, Params | None]] | None:
        """The group's results; None where memory ran out, with nothing left of the attempt.

        Raises `MemoryRanOutError` if it does so for one client.
        """
        try:
            return self._train_group(group, round_, algorithm, state, lr=lr)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        # only here is the error gone, and with it the tensors of the pass
        self.mllm.model.zero_grad(set_to_none=True)
        release_memory()
        if len(group) == 1:
            raise MemoryRanOutError(
                f"memory ran out while {group[0].client} trained alone in round {round_} "
                f"({reason}): lower training.micro_batch, set model.gradient_checkpointing=true, "
                "or shorten samples by training.max_length; `fedmllm plan` estimates what is needed"
            )
        return None

    def _train_group(
        self,
        jobs: Sequence[Job],
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
