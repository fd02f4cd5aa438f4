"""The server's side of a round: whom to ask, how long to wait, whom to do without.

`NetworkRunner` is a `Runner` of `federation.py`; the loop, the algorithms and the checkpoints are
those of an in-process run. How messages travel is a `Link`'s business.

A site is away when it missed a round's deadline, when its process is gone, or when it was refused.
An away site is not in the cohort and nobody waits for it; it is greeted all the time, and is back
when it answers. An error in training costs a site that round and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import torch

from fedmllm.algorithms.base import Algorithm, Params, ServerState, Update
from fedmllm.errors import UserError
from fedmllm.sites import handshake, wire
from fedmllm.sites.wire import Message

T = TypeVar("T")
_POLL = 0.5
_PAUSES = (5.0, 15.0, 60.0)  # before a site that failed is asked again, where it is needed
_TELL = 10.0  # that a refused site has for fetching the reason before the job ends


@dataclass(frozen=True)
class Reply:
    """What came of a request. message is None if `error` says why there is none; final: asking
    again is of no use."""

    ticket: str
    site: str
    message: Message | None = None
    error: str = ""
    final: bool = False


class StoppedError(Exception):
    """The job was aborted from outside."""


class Link(Protocol):
    """The way to the sites."""

    def send(self, site: str, task: str, message: Message) -> str:
        """Ask a site, now or when it is there; returns a ticket."""
        ...

    def cancel(self, ticket: str) -> None:
        """Wait no longer for a request; a reply that comes all the same is dropped."""
        ...

    def receive(self, seconds: float) -> Reply | None:
        """The next reply, or None after so long. Raises `StoppedError`."""
        ...

    def gone(self) -> set[str]:
        """Sites whose process of this job has ended."""
        ...


@dataclass
class NetworkRunner:
    """Clients at sites behind a `Link`.

    server: what the server states of itself (`handshake.differences`). run: an id of the run, under
    which sites keep what they keep. deadline, hello_deadline: seconds. tell: called with the
    status as it changes. memory: not what sites keep, which stays there, but from which round it
    is that this run's state builds on. accept: called with what a site states, where nothing else
    is wrong with it; returns what is. weights: what a site is told of its own in each round. brief:
    what a site is given before it trains (`exchange.py`), unless it has that; None for nothing.
    """

    link: Link
    sites: Sequence[str]
    server: Mapping[str, Any]
    run: str
    min_sites: int
    deadline: float
    hello_deadline: float
    tell: Callable[[Mapping[str, Any]], None] = lambda status: None
    clock: Callable[[], float] = time.monotonic
    pauses: Sequence[float] = _PAUSES
    memory: dict[str, Params] = field(default_factory=dict)
    facts: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    away: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    accept: Callable[[str, Mapping[str, Any]], list[str]] = lambda site, facts: []
    weights: Mapping[str, float] = field(default_factory=dict)
    brief: Callable[[str], Message] | None = None
    missed: Mapping[str, str] = field(default_factory=dict)  # who gave nothing to the exchange
    weighted: bool = False  # by samples: then no site may hide how many it has
    _briefings: dict[str, str] = field(default_factory=dict)  # ticket -> site
    _greetings: dict[str, str] = field(default_factory=dict)  # ticket -> site
    _not_before: dict[str, float] = field(default_factory=dict)  # greet a site again
    _untold: dict[str, tuple[str, float]] = field(default_factory=dict)  # ticket -> site, till

    # -- who is there --------------------------------------------------------------------------

    def greet_all(self) -> None:
        """The handshake with every site, before any training. Returns when all that are there
        have answered, or after `hello_deadline`; never before enough have.

        Raises `UserError` if too many are refused.
        """
        for site in self.sites:
            self.away[site] = "has not answered yet"
        until = self.clock() + self.hello_deadline
        while len(self.present()) < self.min_sites or self._awaited():
            if self.clock() > until and len(self.present()) >= self.min_sites:
                break
            self._check_quorum()
            self._status("waiting for sites", deadline=until)
            self._listen()
        self._check_quorum()

    def present(self) -> list[str]:
        """The sites that can be asked."""
        return [site for site in self.sites if site not in self.away and site not in self.refused]

    def ready(self, clients: Sequence[str]) -> Sequence[str]:
        """The present sites, as soon as there are `min_sites` of them."""
        self._listen(wait=False)
        while len(self.present()) < self.min_sites:
            self._check_quorum()
            self._status("waiting for sites")
            self._listen()
        return [client for client in clients if client in self.present()]

    def _awaited(self) -> list[str]:
        """Away sites that may still answer."""
        return [s for s in self.away if s not in self.refused and s not in self.link.gone()]

    def _check_quorum(self) -> None:
        if len(self.sites) - len(self.refused) >= self.min_sites:
            return
        while self._being_told():
            self._status("telling sites why they are refused")
            self._listen()
        lines = "\n".join(f"  {site}: {why}" for site, why in sorted(self.refused.items()))
        raise UserError(
            f"{len(self.refused)} of {len(self.sites)} sites were refused, and a round needs "
            f"{self.min_sites}:\n{lines}"
        )

    def _being_told(self) -> bool:
        """Whether a refused site may still fetch the reason; it cannot after the job's end."""
        now, gone = self.clock(), self.link.gone()
        return any(site not in gone and now < until for site, until in self._untold.values())

    def _listen(self, *, wait: bool = True) -> Reply | None:
        """Greet who is away; take one message. A reply to a round's request is returned."""
        for site in sorted(self.link.gone() - self.away.keys()):
            self._leave(site, "its process has ended")
        for ticket in [t for t, site in self._briefings.items() if site in self.link.gone()]:
            self.link.cancel(ticket)
            self._leave(self._briefings.pop(ticket), "its process has ended")
        for ticket in [t for t, site in self._greetings.items() if site in self.link.gone()]:
            self.link.cancel(ticket)
            self._leave(self._greetings.pop(ticket), "its process has ended")
        greeted = {*self._greetings.values(), *self._briefings.values()}
        for site in self._awaited():
            if site not in greeted and self.clock() >= self._not_before.get(site, 0.0):
                self._greetings[self.link.send(site, "hello", Message(facts=self.server))] = site
        reply = self.link.receive(_POLL if wait else 0.0)
        if reply is not None and reply.ticket in self._untold:
            del self._untold[reply.ticket]
            return None
        if reply is not None and reply.ticket in self._briefings:
            del self._briefings[reply.ticket]
            self._briefed(reply)
            return None
        if reply is None or reply.ticket not in self._greetings:
            return reply
        del self._greetings[reply.ticket]
        self._greeted(reply)
        return None

    def _greeted(self, reply: Reply) -> None:
        """Judge a site's answer to the handshake."""
        if reply.message is None and not reply.final:
            self._leave(reply.site, reply.error)
            self._not_before[reply.site] = self.clock() + self.pauses[0]
            return
        if reply.message is None:
            self._refuse(reply.site, reply.error)
            return
        facts = reply.message.facts
        problems = handshake.differences(self.server, facts) or handshake.malformed(facts)
        problems = problems or list(facts.get("problems", ()))
        problems = problems or self._unlike_others(reply.site, facts)
        problems = problems or self.accept(reply.site, facts)
        if problems:
            self._refuse(reply.site, "; ".join(map(str, problems)))
            return
        self.facts[reply.site] = facts
        self._give(reply.site)

    def _give(self, site: str) -> None:
        """Let a site that was accepted in, once it has what it needs to train."""
        if self.brief is None or self.facts[site].get("exchanged") is True:
            self.away.pop(site, None)
            return
        self._leave(site, "is being given what came of the exchange")
        self._briefings[self.link.send(site, "exchanged", self.brief(site))] = site

    def _briefed(self, reply: Reply) -> None:
        if reply.message is None:
            self._leave(reply.site, reply.error)
            self._not_before[reply.site] = self.clock() + self.pauses[-1]
        else:
            self.away.pop(reply.site, None)

    def hand_out(self) -> None:
        """Give `brief` to who is there. Returns when all have it, or after `deadline`; never before
        enough have."""
        for site in self.present():
            self._give(site)
        until = self.clock() + self.deadline
        while len(self.present()) < self.min_sites or self._briefings:
            if self.clock() > until and len(self.present()) >= self.min_sites:
                break
            self._check_quorum()
            doing = (
                "giving sites what came of the exchange" if self._briefings else "waiting for sites"
            )
            self._status(doing, deadline=until)
            self._listen()

    def _unlike_others(self, site: str, facts: Mapping[str, Any]) -> list[str]:
        """What only the sites know: the task and, where the server has no data, the split."""
        if self.weighted and not facts["reveal"]["samples"]:
            return ["samples: it hides how many it has, and this run is weighted by samples"]
        for other, theirs in self.facts.items():
            if other == site:
                continue
            if theirs["task"] != facts.get("task"):
                return [f"task: {facts.get('task')!r} is not that of {other}, {theirs['task']!r}"]
            ours = facts.get("manifest_sha256")
            if None not in (ours, theirs["manifest_sha256"]) and ours != theirs["manifest_sha256"]:
                return [f"manifest: it is not that of {other}: the split differs"]
        return []

    def _refuse(self, site: str, why: str) -> None:
        self.refused[site] = why
        ticket = self.link.send(site, "refused", Message(facts={"why": why}))
        self._untold[ticket] = (site, self.clock() + _TELL)
        self._status("refused a site")

    def _leave(self, site: str, why: str) -> None:
        self.away[site] = why

    # -- rounds --------------------------------------------------------------------------------

    def train(
        self,
        round_: int,
        cohort: Sequence[str],
        algorithm: Algorithm,
        state: ServerState,
        *,
        lr: float,
    ) -> Iterator[tuple[int, Update | None]]:
        """Updates as they arrive. After the deadline, or when nobody else can answer, a round
        closes with `min_sites` of them (all of a smaller cohort); until then it waits."""
        current = _Round(self, round_, cohort, algorithm, state, lr)
        yield from current.updates()

    def evaluate(self, params: Params) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
        """Scores of an adapter on what sites hold out, by site; and of those that hold out and
        reveal scores, but gave none within the deadline, why."""
        asked = [site for site in self.sites if self.facts.get(site, {}).get("held_out")]
        message = wire.pack_state(ServerState(0, params), (), {})

        def take(site: str, reply: Message) -> dict[str, float]:
            scores = wire.numbers(reply.facts.get("metrics"))
            if not scores and self.facts[site]["reveal"]["metrics"]:
                raise UserError("sent no scores")
            return scores

        found, failed = self.gather(
            "evaluate", dict.fromkeys(asked, message), take, doing="sites test on held-out data"
        )
        return {site: scores for site, scores in found.items() if scores}, failed

    def gather(
        self,
        task: str,
        messages: Mapping[str, Message],
        take: Callable[[str, Message], T],
        *,
        doing: str,
        needed: int = 0,
    ) -> tuple[dict[str, T], dict[str, str]]:
        """Answers to one request to each of some sites, as `take` reads them, and why others gave
        none; both by site. take: raises `UserError` for a bad answer.

        It ends when nobody is waited for, or after the deadline, but never with fewer than
        `needed`: until then it waits, and asks those that failed once more.
        """
        found: dict[str, T] = {}
        failed = {site: self.away[site] for site in messages if site in self.away}
        waiting: dict[str, str] = {}  # ticket -> site
        again: dict[str, float] = {}
        tries: dict[str, int] = {}

        def ask(site: str) -> None:
            failed.pop(site, None)
            waiting[self.link.send(site, task, messages[site])] = site

        for site in sorted(messages.keys() - failed.keys()):
            ask(site)
        until = self.clock() + self.deadline
        while len(found) < needed or (waiting and self.clock() < until):
            told: dict[str, Any] = {"waiting": sorted(waiting.values())}
            if needed:
                self._check_quorum()
                told["failed"] = dict(sorted(failed.items()))
            idle = len(found) < needed and not (waiting and self.clock() < until)
            self._status("waiting for enough sites" if idle else doing, deadline=until, **told)
            reply = self._listen()
            for ticket in [t for t, site in waiting.items() if site in self.away]:
                self.link.cancel(ticket)
                site = waiting.pop(ticket)
                failed[site] = self.away[site]
            if reply is not None and reply.ticket in waiting:
                site = waiting.pop(reply.ticket)
                try:
                    if reply.message is None:
                        raise UserError(reply.error)
                    found[site] = take(site, reply.message)
                except wire.BAD as error:
                    failed[site] = str(error)
                    pause = self.pauses[min(tries.get(site, 0), len(self.pauses) - 1)]
                    tries[site], again[site] = tries.get(site, 0) + 1, self.clock() + pause
            for site in list(failed) if len(found) + len(waiting) < needed else ():
                if site in self.present() and self.clock() >= again.get(site, 0.0):
                    ask(site)
        for ticket, site in waiting.items():
            self.link.cancel(ticket)
            failed[site] = f"did not answer within {self.deadline:g} s"
            self._leave(site, failed[site])
        return dict(sorted(found.items())), dict(sorted(failed.items()))

    def _status(self, doing: str, **facts: Any) -> None:
        if "deadline" in facts:
            facts["seconds_left"] = round(facts.pop("deadline") - self.clock())
        self.tell(
            {
                "doing": doing,
                "present": self.present(),
                "away": dict(sorted(self.away.items())),
                "refused": dict(sorted(self.refused.items())),
                "gone": sorted(self.link.gone()),
                "min_sites": self.min_sites,
                **({"not_in_exchange": dict(self.missed)} if self.missed else {}),
                **facts,
            }
        )


class _Round:
    """One round in progress."""

    def __init__(
        self,
        runner: NetworkRunner,
        round_: int,
        cohort: Sequence[str],
        algorithm: Algorithm,
        state: ServerState,
        lr: float,
    ) -> None:
        self.runner, self.number, self.cohort = runner, round_, list(cohort)
        self.state, self.broadcast = state, algorithm.broadcast
        self.facts = {"run": runner.run, "lr": lr, "clients": len(runner.sites)}
        self.position = {site: i for i, site in enumerate(self.cohort)}
        self.tickets: dict[str, str] = {}  # ticket -> site
        self.failed: dict[str, str] = {}
        self.again: dict[str, float] = {}  # when a site that failed may be asked again
        self.tries: dict[str, int] = {}
        self.delivered: set[str] = set()
        self.needed = min(runner.min_sites, len(self.cohort))
        self.until = runner.clock() + runner.deadline

    def updates(self) -> Iterator[tuple[int, Update | None]]:
        for site in self.cohort:
            self._ask(site)
        try:
            while not self._closed():
                self.runner._status(
                    self._doing(),
                    round=self.number,
                    delivered=sorted(self.delivered),
                    waiting=sorted(self.tickets.values()),
                    failed=dict(sorted(self.failed.items())),
                    deadline=self.until,
                )
                update = self._take(self.runner._listen())
                if update is not None:
                    yield self.position[update.client], update
                del update  # else it stays in memory until the next one is there
                self._ask_again()
        finally:
            for ticket, site in self.tickets.items():
                self.runner.link.cancel(ticket)
                self.runner._leave(site, f"did not answer within round {self.number}'s deadline")
        for site in self.cohort:
            if site not in self.delivered:
                yield self.position[site], None

    def _ask(self, site: str) -> None:
        since = self.runner.memory.get(site, {}).get("round")
        facts = {**self.facts, "since": 0 if since is None else int(since)}
        if site in self.runner.weights:
            facts["weight"] = self.runner.weights[site]
        message = wire.pack_state(self.state, self.broadcast, facts)
        self.tickets[self.runner.link.send(site, "train", message)] = site
        self.failed.pop(site, None)

    def _closed(self) -> bool:
        """Whether nobody is waited for: all have answered, or time is up and enough have."""
        if len(self.delivered) < self.needed:
            return False
        return not self.tickets or self.runner.clock() > self.until

    def _doing(self) -> str:
        late = self.runner.clock() > self.until
        return "waiting for enough sites" if late or not self.tickets else "training"

    def _take(self, reply: Reply | None) -> Update | None:
        """The update of a reply that belongs to this round and is good."""
        for ticket, site in list(self.tickets.items()):
            if site in self.runner.away:
                self.runner.link.cancel(ticket)
                del self.tickets[ticket]
                self.failed[site] = self.runner.away[site]
        if reply is None or reply.ticket not in self.tickets:
            return None
        del self.tickets[reply.ticket]
        if reply.message is None:
            self._fail(reply.site, reply.error)
            return None
        try:
            facts = reply.message.facts
            update = wire.unpack_update(Message(reply.message.tensors, facts["update"]))
            slots = {slot: self.state.slots[slot] for slot in self.broadcast}
            wire.check_update(update, site=reply.site, params=self.state.params, slots=slots)
            update = replace(update, metrics={k: float(v) for k, v in update.metrics.items()})
        except wire.BAD as error:
            self._fail(reply.site, f"sent what is no update: {error}")
            return None
        if facts.get("memory"):
            self.runner.memory[reply.site] = {"round": torch.tensor(self.number)}
        self.delivered.add(reply.site)
        return update

    def _fail(self, site: str, why: str) -> None:
        self.failed[site] = why
        tries = self.tries.get(site, 0)
        pause = self.runner.pauses[min(tries, len(self.runner.pauses) - 1)]
        self.tries[site], self.again[site] = tries + 1, self.runner.clock() + pause

    def _ask_again(self) -> None:
        """Where too few can answer, ask those that failed, or were away, once more."""
        if len(self.delivered) + len(self.tickets) >= self.needed:
            return
        for site in list(self.failed):
            back = site not in self.runner.away and site not in self.runner.refused
            if back and self.runner.clock() >= self.again.get(site, 0.0):
                self._ask(site)
