"""The ServerApp: our loop, with Flower's grid as the way to the sites."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.serverapp import Grid, ServerApp

from fedmllm.config import config_hash, load_config
from fedmllm.sites import settings, wire
from fedmllm.sites.central import Reply
from fedmllm.sites.serving import serve
from fedmllm.sites.wire import Message

app = ServerApp()
_POLL = 0.3
_ASK_NODES = 3.0  # seconds between two looks for new nodes
_WHO_TTL = 120.0


@app.main()
def main(grid: Grid, context: Context) -> None:
    """The whole run. Its result lies in the server's kit, as over NVFlare."""
    kit = Path(str(context.run_config["kit"])).resolve()
    file = settings.load_server(kit)
    name = str(context.run_config["experiment"])
    sha256 = config_hash(load_config(kit / file.experiments / f"{name}.yaml"))
    link = FlowerLink(grid, file.sites, sha256, lifetime=file.patience)
    serve(kit, sha256, link, job=str(context.run_id))


class FlowerLink:
    """`central.Link` on a grid. lifetime: seconds after which Flower drops a message, by its task;
    it says so then, and the site is asked again where it is needed.

    A node is asked which site it is; the first that says so in a run is that site until it leaves.
    """

    def __init__(
        self, grid: Grid, sites: Sequence[str], sha256: str, *, lifetime: Callable[[str], float]
    ) -> None:
        self.grid, self.sites, self.sha256, self.lifetime = grid, set(sites), sha256, lifetime
        self.nodes: dict[str, int] = {}  # site -> node
        self.asked: dict[str, tuple[int, float]] = {}  # message -> node that is asked who it is
        self.looked = 0.0
        self.later: list[tuple[str, str, str, Message]] = []  # for sites that are not there yet
        self.open: dict[str, tuple[str, str]] = {}  # message -> ticket, site

    def send(self, site: str, task: str, message: Message) -> str:
        ticket = uuid.uuid4().hex
        self.later.append((ticket, site, task, message))
        self._send_waiting()
        return ticket

    def cancel(self, ticket: str) -> None:
        self.later = [item for item in self.later if item[0] != ticket]
        self.open = {key: item for key, item in self.open.items() if item[0] != ticket}

    def gone(self) -> set[str]:
        """Nobody is for ever: a node that was killed registers again."""
        return set()

    def receive(self, seconds: float) -> Reply | None:
        until = time.monotonic() + seconds
        while True:
            self._look_for_nodes()
            self._send_waiting()
            waiting = [*self.open, *self.asked]
            for found in self.grid.pull_messages(waiting) if waiting else ():
                reply = self._taken(found)
                if reply is not None:
                    return reply
            if time.monotonic() >= until:
                return None
            time.sleep(_POLL)

    def _look_for_nodes(self) -> None:
        now = time.monotonic()
        if now - self.looked < _ASK_NODES:
            return
        self.looked = now
        there = set(self.grid.get_node_ids())
        self.nodes = {site: node for site, node in self.nodes.items() if node in there}
        self.asked = {key: item for key, item in self.asked.items() if now - item[1] < _WHO_TTL}
        known = {*self.nodes.values(), *(node for node, _ in self.asked.values())}
        for node in sorted(there - known):
            content = RecordDict({"task": ConfigRecord({"do": "who", "sha256": self.sha256})})
            for key in self._push(content, node, ttl=_WHO_TTL):
                self.asked[key] = (node, now)

    def _send_waiting(self) -> None:
        for item in [item for item in self.later if item[1] in self.nodes]:
            ticket, site, task, message = item
            blob = wire.to_bytes(message)
            content = RecordDict(
                {
                    "task": ConfigRecord({"do": task, "sha256": self.sha256}),
                    "blob": ArrayRecord(
                        {"message": Array("uint8", (len(blob),), "safetensors", blob)}
                    ),
                }
            )
            for key in self._push(content, self.nodes[site], ttl=self.lifetime(task)):
                self.open[key] = (ticket, site)
                self.later.remove(item)

    def _push(self, content: Any, node: int, *, ttl: float) -> list[str]:
        """The id of a message that Flower has taken; none where it has not."""
        message = FlowerMessage(content, dst_node_id=node, message_type="train", ttl=ttl)
        return [key for key in self.grid.push_messages([message]) if key]

    def _taken(self, found: Any) -> Reply | None:
        """What an arrived message is: who a node is, or a site's reply."""
        key = found.metadata.reply_to_message_id
        facts = {} if found.has_error() else found.content.config_records.get("reply")
        if key in self.asked:
            node, _ = self.asked.pop(key)
            site = str((facts or {}).get("site"))
            if site in self.sites:
                self.nodes.setdefault(site, node)
            return None
        if key not in self.open:
            return None
        ticket, site = self.open.pop(key)
        if found.has_error():
            return Reply(ticket, site, error=f"Flower: {found.error.reason or found.error.code}")
        if facts is None:
            return Reply(ticket, site, error="the site sent no reply")
        if "error" in facts:
            final = bool(facts.get("final"))
            return Reply(ticket, site, error=str(facts["error"]), final=final)
        try:
            arrays = found.content.array_records.get("blob")
            blob = arrays["message"].data if arrays else b""
            return Reply(ticket, site, wire.from_bytes(blob))
        except wire.BAD as error:
            return Reply(ticket, site, error=str(error))
