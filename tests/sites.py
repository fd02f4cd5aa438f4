"""Kits of a small federation without a network, and a link that calls sites in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from fedmllm.config import config_hash, load_config
from fedmllm.errors import UserError
from fedmllm.sites import wire
from fedmllm.sites.central import Reply
from fedmllm.sites.site import Site
from fedmllm.sites.wire import Message

SITES = ("client-00", "client-01", "client-02")
SMALL: dict[str, Any] = {
    "data": {"name": "memes", "train": 24, "test": 8},
    "partition": {"name": "even", "clients": 3},
    "training": {"rounds": 2, "clients_per_round": 3, "batch_size": 4, "micro_batch": 4},
    "evaluation": {"every": 0, "conditions": ["both"]},
}


def write_kit(
    folder: Path, name: str, settings: Mapping[str, Any], *experiments: Mapping[str, Any]
) -> Path:
    """A kit without certificates: the settings file and the experiments."""
    kit = folder / name
    (kit / "local").mkdir(parents=True)
    (kit / "experiments").mkdir()
    (kit / "local" / "fedmllm.yml").write_text(yaml.safe_dump(dict(settings)))
    for raw in experiments:
        (kit / "experiments" / f"{raw['name']}.yaml").write_text(yaml.safe_dump(dict(raw)))
    return kit


def make_kits(
    folder: Path, raw: Mapping[str, Any], *, server: Mapping[str, Any] | None = None
) -> dict[str, Path]:
    """Kits of the server and three sites for one experiment."""
    facts = {"sites": list(SITES), "min_sites": 3, **(server or {})}
    kits = {"server": write_kit(folder, "server", facts, raw)}
    for name in SITES:
        kits[name] = write_kit(folder, name, {"name": name}, raw)
    return kits


def hash_of(kit: Path) -> str:
    """The hash of a kit's first experiment."""
    return config_hash(load_config(sorted((kit / "experiments").glob("*.yaml"))[0]))


class NearLink:
    """Sites in this process, in files and back as on the wire; `change` may spoil a reply.

    order: sites answer in this order, whatever they were asked in.
    """

    def __init__(
        self,
        kits: Mapping[str, Path],
        scratch: Path,
        change: Callable[[str, str, Message], Message | Exception | None] | None = None,
        order: tuple[str, ...] = SITES[::-1],
    ) -> None:
        self.kits, self.scratch = kits, scratch
        self.change = change or (lambda site, task, message: message)
        self.order, self.sites = order, {}
        self.queue: list[tuple[str, str, str, Message]] = []
        self.sent: list[tuple[str, str, Message]] = []
        self.came: list[tuple[str, str, Message]] = []
        self.lost: set[str] = set()
        self.tickets = 0

    def send(self, site: str, task: str, message: Message) -> str:
        self.tickets += 1
        self.sent.append((site, task, self._travel(message)))
        self.queue.append((f"t{self.tickets}", site, task, self._travel(message)))
        return f"t{self.tickets}"

    def cancel(self, ticket: str) -> None:
        self.queue = [item for item in self.queue if item[0] != ticket]

    def gone(self) -> set[str]:
        return set(self.lost)

    def receive(self, seconds: float) -> Reply | None:
        for item in sorted(self.queue, key=lambda item: self.order.index(item[1])):
            ticket, site, task, message = item
            changed = self.change(site, task, message)
            if changed is None:
                continue  # it does not answer, now
            self.queue.remove(item)
            if isinstance(changed, Exception):
                return Reply(ticket, site, error=str(changed), final=isinstance(changed, UserError))
            try:
                reply = self._travel(self._work(site, task, message))
            except UserError as error:
                return Reply(ticket, site, error=str(error), final=True)
            self.came.append((site, task, reply))
            return Reply(ticket, site, reply)
        return None

    def _work(self, site: str, task: str, message: Message) -> Message:
        if task == "refused":
            return Message()
        if site not in self.sites:
            self.sites[site] = Site(self.kits[site], hash_of(self.kits["server"]))
        return self.sites[site].answer(task, message)

    def _travel(self, message: Message) -> Message:
        file = self.scratch / "message.safetensors"
        wire.write(message, file)
        found = wire.read(file)
        assert json.loads(json.dumps(found.facts)) == found.facts
        return Message({name: value.clone() for name, value in found.tensors.items()}, found.facts)
