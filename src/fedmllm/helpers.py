"""One run on several processes: others help with clients of a round, batches of test samples, and
whole federations where each party trains alone.

This process takes part itself. What is left to do lies in one place, from which whoever is idle
takes the largest piece, preferring one whose samples it has seen before: so nobody waits while
there is work, and pictures are seen seldom twice. Results do not depend on who made them: a client,
a batch and a federation each come to the same bits in any process of one kind of machine.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from fedmllm import results
from fedmllm.algorithms.base import Algorithm, Params, ServerState, Update
from fedmllm.config import Config
from fedmllm.data import load_dataset
from fedmllm.errors import UserError
from fedmllm.evaluation import Readers, TestSet
from fedmllm.experiment import (
    Federation,
    Listener,
    Outcome,
    Session,
    Shared,
    algorithm_of,
    federations,
    load_model,
    local_runner,
    make_manifest,
    run_federation,
    shortened_ids,
    spare_tower,
)
from fedmllm.federation import InProcessRunner
from fedmllm.manifest import client_samples
from fedmllm.mixtures import Mixtures
from fedmllm.models.cohort import obstacle
from fedmllm.processes import Child, packed, unpacked

TRIES = 2  # of a piece of work whose process dies


@dataclass(frozen=True)
class Piece:
    """A piece of work. do: a method of `_Helper`. about: whose samples it needs. size: how long it
    takes, in any unit."""

    do: str
    arguments: Mapping[str, Any]
    about: tuple[str, ...] = ()
    size: float = 1.0


class _DiedError(Exception):
    """A helper's process has ended, or never came to work. Says how, in words."""


class Helpers:
    """The processes that help a run, each with the base loaded.

    devices: an accelerator for each by CUDA's number; `count` of them that see what this process
    sees where none are given. tell: gets the events of the run that happen in them, from other
    threads. began: when the run did, by `time.perf_counter`. A context manager, which ends them.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        *,
        count: int,
        devices: Sequence[str] = (),
        tell: Listener,
        began: float,
    ) -> None:
        self.name, self.count, self.tell = config.name, count, tell
        given = [devices[i % len(devices)] if devices else None for i in range(count)]
        self.shortened: set[str] = set()  # ids of samples whose text they shortened
        self._orders: dict[str, bytes] = {}  # what all pieces of a kind need, packed once
        self._had: list[dict[str, bytes]] = [{} for _ in given]
        self._seen: dict[str, set[int]] = {}  # who had whose samples
        self._idle = [False] * count  # loaded, and not at work
        self._lock = threading.Lock()  # of what starts and ends processes
        self._ended = False
        self._inboxes: list[queue.SimpleQueue[_Board | None]] = []
        self.children = [Child(_help, config, folder, began, device=device) for device in given]
        for number in range(count):
            self._inboxes.append(queue.SimpleQueue())
            threading.Thread(target=self._attend, args=(number,), daemon=True).start()

    def __enter__(self) -> Helpers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            self._ended = True
        for inbox in self._inboxes:
            inbox.put(None)
        for child, idle in zip(self.children, self._idle, strict=True):
            child.end(at_work=not idle)

    def order(self, name: str, value: Any) -> None:
        """What pieces need from now on in common; reaches a helper with its next piece."""
        self._orders[name] = packed(value)

    def share(
        self, pieces: Sequence[Piece], here: Callable[[Piece], Any]
    ) -> Iterator[tuple[int, Any]]:
        """Have all pieces done, by `here` in this process and by the helpers; yields (position,
        result) as they come.

        A piece whose process dies is given once more, to a new one. Raises what a piece raises.
        """
        waiting = _Waiting(pieces, self._seen)
        came: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        for inbox in self._inboxes:
            inbox.put(_Board(pieces, waiting, came))
        try:
            for _ in pieces:
                position = waiting.take(len(self.children)) if came.empty() else None
                if position is None:
                    position, found = came.get()
                    if isinstance(found, BaseException):
                        raise found
                else:
                    found = here(pieces[position])
                yield position, found
                del found  # an update's memory is for the next one
        finally:
            waiting.clear()

    def _attend(self, number: int) -> None:
        """One helper's part of all that is shared, in a thread of this process. It takes no piece
        before it has loaded the base; where that fails, the others do without it."""
        try:
            self._ready(number)
        except _DiedError as error:
            self._tell(f"a helping process {error}", again=False)
            return
        while (board := self._inboxes[number].get()) is not None:
            while (position := board.waiting.take(number)) is not None:
                self._idle[number] = False
                try:
                    found = self._ask(number, board.pieces[position])
                except BaseException as error:
                    board.came.put((position, error))
                    return
                self._idle[number] = True
                board.came.put((position, found))
                del found

    def _ready(self, number: int) -> None:
        """Wait until a helper has loaded the run. Raises `_DiedError` if it cannot."""
        try:
            self._hear(number)
        except _DiedError as error:
            raise _DiedError(f"could not load the run: {error}") from None
        except (UserError, RuntimeError) as error:
            raise _DiedError(f"could not load the run: {str(error).splitlines()[0]}") from None
        self._idle[number] = True

    def _ask(self, number: int, piece: Piece) -> Any:
        """What comes of a piece, by a new process if the helper's dies. Raises what the piece
        raises, and `UserError` at the second death."""
        how = ""
        for left in reversed(range(TRIES)):
            try:
                if how:
                    self._restart(number)
                return self._ask_once(number, piece)
            except _DiedError as error:
                how = str(error)
            if left:
                self._tell(f"a helping process died: {how}", again=True)
        raise UserError(
            f"a helping process died twice over one piece of work: {how}. --resume goes on from "
            "the last round, with fewer --processes if memory was short"
        )

    def _restart(self, number: int) -> None:
        with self._lock:
            if self._ended:
                raise _DiedError("the run is over")
            self._had[number] = {}
            self.children[number].start()
        self._ready(number)
        self._idle[number] = False

    def _tell(self, how: str, *, again: bool) -> None:
        if not self._ended:
            self.tell({"event": "helper", "name": self.name, "how": how, "again": again})

    def _ask_once(self, number: int, piece: Piece) -> Any:
        had = self._had[number]
        for name, order in list(self._orders.items()):
            if had.get(name) is not order:
                self._say(number, packed((name, None)), order)
                had[name] = order
        self._say(number, packed((piece.do, piece.arguments)))
        return self._hear(number)

    def _say(self, number: int, *messages: bytes) -> None:
        child = self.children[number]
        try:
            for message in messages:
                child.pipe.send_bytes(message)
        except OSError:
            raise _DiedError(child.epitaph()) from None

    def _hear(self, number: int) -> Any:
        """What a helper says next but for events. Raises what it failed by."""
        child = self.children[number]
        while True:
            try:  # of this alone: who listens to events may raise the same
                message = child.pipe.recv_bytes()
            except (EOFError, OSError):
                raise _DiedError(child.epitaph()) from None
            kind, value = unpacked(message)
            if kind == "event":
                self.tell(value)
            elif kind == "failed":
                raise UserError(value[0]) if value[1] else RuntimeError(value[0])
            else:
                found, shortened = value
                self.shortened |= shortened
                return found

    def facts(self) -> list[dict[str, Any]]:
        """Of each helper that is there at the end: its peak of memory, and of its accelerator's."""
        found = []
        for number, idle in enumerate(self._idle):
            with contextlib.suppress(_DiedError):
                if idle:
                    found.append(self._ask_once(number, Piece("facts", {})))
        return found

    def runner(
        self,
        session: Session,
        federation: Federation,
        weights: Mapping[str, float],
        mixtures: Mixtures | None,
        fill: Collection[str],
    ) -> HelpedRunner:
        """Trains a federation's clients here and in the helpers; arguments as of
        `local_runner`."""
        names = {"federation": federation.name, "fill": tuple(fill)}
        self.order("brief", {**names, "weights": weights, "mixtures": mixtures})
        own = local_runner(session, federation, weights, mixtures, fill)
        return HelpedRunner(
            mllm=own.mllm,
            samples=own.samples,
            plan=own.plan,
            seed=own.seed,
            clients_at_once=own.clients_at_once,
            weights=own.weights,
            halved=own.halved,
            helpers=self,
            sizes={name: len(held) for name, held in federation.samples.items()},
        )

    def run_apart(self, session: Session, found: Sequence[Federation]) -> list[Outcome]:
        """Run federations that have nothing to do with each other, each as one piece of work."""
        alone = replace(session, helpers=None)  # they are busy with the others
        pieces = [
            Piece("federation", {"name": f.name}, (f.name,), sum(map(len, f.samples.values())))
            for f in found
        ]
        by_name = {federation.name: federation for federation in found}
        made = self.share(pieces, lambda one: run_federation(alone, by_name[one.arguments["name"]]))
        outcomes = dict(made)
        return [outcomes[number] for number in range(len(found))]

    def readers(self, params: Params) -> Readers:
        """Where the run's test samples are read by an adapter, which this process's model has."""
        self.order("adapter", params)
        return self._read

    def _read(
        self,
        test: TestSet,
        condition: str,
        batches: Sequence[Sequence[int]],
        longest: int | None,
    ) -> Iterable[tuple[int, list[Any]]]:
        pieces = []
        for number, which in enumerate(batches):  # by length: later ones take longer
            asked = {"condition": condition, "which": list(which), "longest": longest}
            pieces.append(Piece("read", asked, size=len(which) * (number + 1)))
        return self.share(pieces, lambda piece: test.read(**piece.arguments))


@dataclass(frozen=True)
class _Board:
    """Pieces that are shared out, those not taken yet, and where what comes of them goes."""

    pieces: Sequence[Piece]
    waiting: _Waiting
    came: queue.SimpleQueue[tuple[int, Any]]


class _Waiting:
    """Pieces that nobody has taken; asked from several threads. seen: who had whose samples."""

    def __init__(self, pieces: Sequence[Piece], seen: dict[str, set[int]]) -> None:
        self.left = dict(enumerate(pieces))
        self.seen = seen
        self.lock = threading.Lock()

    def take(self, who: int) -> int | None:
        """The position of what this one should do next: what it has seen, then what nobody else
        has; the largest of these, and of equals the first."""
        with self.lock:
            if not self.left:
                return None
            best = max(self.left, key=lambda i: (*self._fits(who, self.left[i]), -i))
            for name in self.left.pop(best).about:
                self.seen.setdefault(name, set()).add(who)
            return best

    def _fits(self, who: int, piece: Piece) -> tuple[int, int, float]:
        known = [self.seen.get(name, set()) for name in piece.about]
        mine = sum(who in names for names in known)
        return mine, -sum(bool(names - {who}) for names in known), piece.size

    def clear(self) -> None:
        """Nobody takes any more."""
        with self.lock:
            self.left.clear()


@dataclass
class HelpedRunner(InProcessRunner):
    """The clients of a round in this process and in helpers; each group is one piece of work.

    sizes: of each client's samples, which tell how long it takes. helpers: who know the federation.
    """

    helpers: Helpers = field(kw_only=True)
    sizes: Mapping[str, int] = field(kw_only=True)

    def train(
        self,
        round_: int,
        cohort: Sequence[str],
        algorithm: Algorithm,
        state: ServerState,
        *,
        lr: float,
    ) -> Iterator[tuple[int, Update]]:
        size = 1 if obstacle(self.mllm) else self.clients_at_once
        starts = range(0, len(cohort), size)
        common = {
            "round_": round_,
            "lr": lr,
            "params": state.params,
            "slots": {slot: state.slots[slot] for slot in algorithm.broadcast},
        }
        self.helpers.order("round", common)
        groups: dict[int, list[int]] = {}
        pieces = [self._piece(cohort[start : start + size]) for start in starts]

        def here(piece: Piece) -> dict[str, Any]:
            names = piece.arguments["clients"]
            own = super(HelpedRunner, self).train(round_, names, algorithm, state, lr=lr)
            updates = [update for _, update in own]
            return {"updates": updates, "groups": self.groups, "at_once": self.clients_at_once}

        for number, found in self.helpers.share(pieces, here):
            self.memory.update(found.get("memory", {}))
            self.clients_at_once = min(self.clients_at_once, found["at_once"])
            groups[number] = list(found["groups"])
            for offset, update in enumerate(found.pop("updates")):
                yield starts[number] + offset, update
        self.groups = [each for number in sorted(groups) for each in groups[number]]

    def _piece(self, clients: Sequence[str]) -> Piece:
        memory = {name: self.memory[name] for name in clients if name in self.memory}
        arguments = {"clients": list(clients), "memory": memory}
        size = sum(self.sizes[name] for name in clients)
        return Piece("train", arguments, tuple(clients), size)


# -- in the helper -----------------------------------------------------------------------------


def _help(pipe: Connection, config: Config, folder: Path, began: float) -> None:
    """Load the run, say so, and do what comes until the pipe closes."""

    def send(kind: str, value: Any) -> None:
        pipe.send_bytes(packed((kind, value)))

    try:
        helper = _Helper(config, folder, began, lambda event: send("event", dict(event)))
    except Exception as error:
        send("failed", _reason(error))
        return
    send("done", (None, set()))
    while True:
        try:
            name, arguments = unpacked(pipe.recv_bytes())
            if arguments is None:  # an order
                helper.orders[name] = unpacked(pipe.recv_bytes())
                continue
        except EOFError:
            return
        try:
            found = getattr(helper, name)(**arguments)
            send("done", (found, set(shortened_ids(helper.session))))
        except Exception as error:
            send("failed", _reason(error))


def _reason(error: Exception) -> tuple[str, bool]:
    """Why something failed, with all there is for what no user can mend; and whether one can."""
    if isinstance(error, UserError):
        return str(error), True
    return f"in a helping process: {error!r}\n{traceback.format_exc()}", False


class _Helper:
    """A run as a helper has it. orders: what has come of each kind last."""

    def __init__(self, config: Config, folder: Path, began: float, listener: Listener) -> None:
        torch.set_num_threads(config.threads)
        results.reset_peak_memory(config.model.device)
        dataset = load_dataset(**config.data)
        held = make_manifest(config, dataset)
        shared = Shared(load_model(config), {Shared.data_key(config): dataset})
        self.session = Session(
            config=config,
            folder=folder,
            shared=shared,
            task=dataset.task,
            test=shared.test_set(config),
            listener=listener,
            started=began,
        )
        self.federations = {each.name: each for each in federations(config, dataset, held)}
        owned = [s for own in client_samples(held, dataset).values() for s in own]
        if config.model.drop_tower:
            spare_tower(config, shared.mllm, [*owned, *dataset.test])
        self.orders: dict[str, Any] = {}
        self._briefed: Any = None

    def train(self, clients: list[str], memory: dict[str, Params]) -> dict[str, Any]:
        """Clients of the round that was ordered, as one group."""
        runner, algorithm = self._runner()
        told = self.orders["round"]
        runner.memory = memory
        state = ServerState(told["round_"] - 1, told["params"], told["slots"])
        came = runner.train(told["round_"], clients, algorithm, state, lr=told["lr"])
        updates = [update for _, update in came]
        return {
            "updates": updates,
            "memory": runner.memory,
            "groups": runner.groups,
            "at_once": runner.clients_at_once,
        }

    def _runner(self) -> tuple[InProcessRunner, Algorithm]:
        """Made anew for each brief."""
        brief = self.orders["brief"]
        if self._briefed is None or self._briefed[0] is not brief:
            federation = self.federations[brief["federation"]]
            session = self.session
            runner = local_runner(
                session, federation, brief["weights"], brief["mixtures"], brief["fill"]
            )
            algorithm = algorithm_of(
                session.config, len(federation.samples), session.mllm, session.task
            )
            self._briefed = brief, (runner, algorithm)
        made: tuple[InProcessRunner, Algorithm] = self._briefed[1]
        return made

    def read(self, condition: str, which: list[int], longest: int | None) -> list[Any]:
        """A batch of test samples, by the adapter that was ordered."""
        self.session.mllm.set_adapter(self.orders["adapter"])
        return self.session.test.read(condition, which, longest)

    def federation(self, name: str) -> Outcome:
        """All rounds of a federation, and its tests."""
        return run_federation(self.session, self.federations[name])

    def facts(self) -> dict[str, Any]:
        """What this process took."""
        found: dict[str, Any] = {"peak_memory_bytes": results.peak_memory_bytes()}
        most = results.peak_accelerator_bytes(str(self.session.mllm.device))
        return found if most is None else {**found, "peak_accelerator_bytes": most}
