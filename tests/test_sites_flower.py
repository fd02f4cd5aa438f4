"""What a site may answer over Flower; without Flower, whose classes are stand-ins."""

from __future__ import annotations

import importlib
import sys
import types
from types import SimpleNamespace
from typing import Any

import pytest

from fedmllm.sites import wire
from fedmllm.sites.wire import Message

GOOD = wire.to_bytes(Message(facts={"memory": False}))


@pytest.fixture
def server(monkeypatch) -> Any:
    """The module of the ServerApp."""
    names = ("Array", "ArrayRecord", "ConfigRecord", "Context", "Message", "RecordDict")
    app = SimpleNamespace(main=lambda: lambda function: function)
    for module, classes in {
        "flwr": {},
        "flwr.app": dict.fromkeys(names, SimpleNamespace),
        "flwr.serverapp": {"Grid": SimpleNamespace, "ServerApp": lambda: app},
    }.items():
        made = types.ModuleType(module)
        vars(made).update(classes)
        monkeypatch.setitem(sys.modules, module, made)
    monkeypatch.delitem(sys.modules, "fedmllm.sites.flower.server", raising=False)
    found = importlib.import_module("fedmllm.sites.flower.server")
    monkeypatch.delitem(sys.modules, "fedmllm.sites.flower.server")
    return found


def arrived(key: str, reply: dict[str, Any] | None, blob: dict[str, Any] | None = None) -> Any:
    """A message of Flower's, as far as the link to the sites uses it."""
    return SimpleNamespace(
        metadata=SimpleNamespace(reply_to_message_id=key),
        has_error=lambda: False,
        content=SimpleNamespace(
            config_records={} if reply is None else {"reply": reply},
            array_records={} if blob is None else {"blob": blob},
        ),
    )


def test_an_answer_in_a_wrong_form_is_a_failed_site(server) -> None:
    data = SimpleNamespace(data=GOOD)
    listed: Any = ["memory"]
    no_facts = SimpleNamespace(data=wire.to_bytes(Message(facts=listed)))
    for found, words, final in [
        (arrived("m", {}, {"message": data}), "", False),
        (arrived("m", None, {"message": data}), "sent no reply", False),
        (arrived("m", {"error": "it broke"}), "it broke", False),
        (arrived("m", {"error": "refused", "final": True}), "refused", True),
        (arrived("m", {}), "0 bytes are not a message", False),
        (arrived("m", {}, {"other": data}), "message", False),
        (arrived("m", {}, {"message": None}), "no attribute 'data'", False),
        (arrived("m", {}, {"message": no_facts}), "no JSON object", False),
    ]:
        link = server.FlowerLink(None, ["a"], "0" * 64, lifetime=lambda task: 9.0)
        link.open = {"m": ("ticket", "a")}
        reply = link._taken(found)
        assert (reply.ticket, reply.site, reply.final) == ("ticket", "a", final)
        assert words in reply.error
        assert (reply.message is None) == bool(words)
        assert link.open == {}


def test_a_node_that_does_not_say_which_site_it_is_is_none(server) -> None:
    link = server.FlowerLink(None, ["a"], "0" * 64, lifetime=lambda task: 9.0)
    for facts in (None, {}, {"site": 3}, {"site": "b"}):
        link.asked = {"who": (5, 0.0)}
        assert link._taken(arrived("who", facts)) is None
        assert (link.nodes, link.asked) == ({}, {})
    link.asked = {"who": (5, 0.0)}
    link._taken(arrived("who", {"site": "a"}))
    assert link.nodes == {"a": 5}
