"""The Flower app: a site's worker, the folders, and a federation of Flower's own processes."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from sites import SITES, SMALL, hash_of, make_kits

from fedmllm.config import load_config, make_config
from fedmllm.errors import UserError
from fedmllm.experiment import run
from fedmllm.sites import settings, wire
from fedmllm.sites.flare.kits import Plan
from fedmllm.sites.flower.app import make_app
from fedmllm.sites.flower.courier import ask_worker, worker_file
from fedmllm.sites.flower.worker import Worker

ROOT = Path(__file__).resolve().parent.parent
FLOWER = Path(os.environ.get("FLOWER_BIN", ROOT / "runs" / "flower" / "bin"))


@contextmanager
def started(*command: str | Path, log: Path, **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, ended with all of it."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=out,
            stderr=out,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            **more,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextmanager
def worker(kit: Path, python: str | Path = sys.executable) -> Iterator[None]:
    log = kit / "worker.log"
    with started(python, "-m", "fedmllm.sites.flower.worker", kit, log=log):
        until = time.monotonic() + 60
        while not worker_file(kit).exists():
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        yield


def test_a_message_is_the_same_as_bytes() -> None:
    tensors = {"delta||b": torch.arange(6.0).bfloat16().view(2, 3), "delta||a": torch.zeros(0)}
    message = wire.Message(tensors, {"round": 3, "why": "ü"})
    found = wire.from_bytes(wire.to_bytes(message))
    assert found.facts == message.facts
    assert found.tensors.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found.tensors[name].dtype == value.dtype
        assert torch.equal(found.tensors[name], value)
    for spoilt in (b"", b"12345678", wire.to_bytes(message)[:-1], b"\0" * 64):
        with pytest.raises(UserError, match="are not a message"):
            wire.from_bytes(spoilt)


def test_the_worker_answers_with_one_model_for_all_messages(tmp_path) -> None:
    """It says who it is, refuses another experiment, takes part, and lets no stranger in."""
    kits = make_kits(tmp_path, {"name": "tiny", **SMALL})
    kit, sha256 = kits[SITES[1]], hash_of(kits["server"])
    down = {"error": "the site's worker does not run", "final": False}
    assert ask_worker(kit, {"do": "who"}, b"") == (down, b"")
    with worker(kit):
        assert ask_worker(kit, {"do": "who"}, b"") == ({"site": SITES[1]}, b"")
        hello = wire.to_bytes(wire.Message(facts={"protocol": 0, "version": "0"}))
        reply, _ = ask_worker(kit, {"do": "hello", "sha256": "0" * 64}, hello)
        assert reply["final"]
        assert "has not agreed to experiment 000000000000" in reply["error"]
        for _ in range(2):
            reply, answer = ask_worker(kit, {"do": "hello", "sha256": sha256}, hello)
            assert reply == {}
            facts = wire.from_bytes(answer).facts
            assert facts["samples"] == 8
            assert facts["problems"][0].startswith("protocol: the server speaks 0")
        assert trainers(kit) == 1
        reply, answer = ask_worker(kit, {"do": "train", "sha256": sha256}, b"garbage")
        assert (reply["final"], answer) == (False, b"")
        file = worker_file(kit)
        assert file.stat().st_mode & 0o077 == 0
        right = file.read_text()
        file.write_text(json.dumps({**json.loads(right), "key": "00" * 32}))
        assert ask_worker(kit, {"do": "who"}, b"") == (down, b"")
        file.write_text(right)
        assert ask_worker(kit, {"do": "who"}, b"")[0] == {"site": SITES[1]}
    assert not worker_file(kit).exists()


def test_nothing_passes_the_worker_that_may_not_leave(tmp_path) -> None:
    """A trainer that answers with more than an update: the gate stops it, and says so."""

    class Talkative:
        sha256 = "s"

        def ask(self, do: str, message: wire.Message) -> wire.Message:
            return wire.Message({"delta||w": torch.ones(2), "samples||w": torch.ones(2)}, facts)

    update = {"client": SITES[1], "num_samples": 8, "extra": {}, "metrics": {}}
    facts = {"update": update, "memory": False}
    made = Worker(make_kits(tmp_path, {"name": "tiny", **SMALL})[SITES[1]])
    made.trainer = Talkative()  # type: ignore[assignment]
    blob = wire.to_bytes(wire.Message(facts={"round": 1}))
    reply, answer = made.answer({"do": "train", "sha256": "s"}, blob)
    assert reply == {"error": "the site cannot answer train: see its log", "final": False}
    assert answer == b""
    Talkative.ask = lambda *_: wire.Message({"delta||w": torch.ones(2)}, facts)  # type: ignore[method-assign]
    reply, answer = made.answer({"do": "train", "sha256": "s"}, blob)
    assert reply == {}
    assert wire.from_bytes(answer).facts == facts


def trainers(kit: Path) -> int:
    """How many processes train for a kit."""
    count = 0
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = file.read_bytes()
            count += b"fedmllm.sites.trainer" in words and str(kit).encode() in words
    return count


class Stub:
    """A class of Flower's, as far as the link to the sites uses it: keeps what it is given."""

    def __init__(self, *given: Any, **named: Any) -> None:
        self.given, self.named = given, named

    def main(self) -> Any:
        return lambda function: function


def test_a_message_lives_as_long_as_its_answer_is_waited_for(monkeypatch, tmp_path) -> None:
    """Each kind its own; without Flower, whose classes are stand-ins."""
    for module, names in {
        "flwr": (),
        "flwr.app": ("Array", "ArrayRecord", "ConfigRecord", "Context", "Message", "RecordDict"),
        "flwr.serverapp": ("Grid", "ServerApp"),
    }.items():
        made = types.ModuleType(module)
        for name in names:
            setattr(made, name, Stub)
        monkeypatch.setitem(sys.modules, module, made)
    monkeypatch.delitem(sys.modules, "fedmllm.sites.flower.server", raising=False)
    server = importlib.import_module("fedmllm.sites.flower.server")
    monkeypatch.delitem(sys.modules, "fedmllm.sites.flower.server")
    file = settings.ServerFile(sites=("a",), deadline=7.0, hello_deadline=90.0)
    pushed: list[tuple[str, float]] = []

    class Grid:
        def push_messages(self, messages: list[Stub]) -> list[str]:
            (message,) = messages
            task = message.given[0].given[0]["task"].given[0]["do"]
            pushed.append((task, message.named["ttl"]))
            return [f"m{len(pushed)}"]

        def get_node_ids(self) -> list[int]:
            return [5]

        def pull_messages(self, waiting: list[str]) -> list[Any]:
            return []

    link = server.FlowerLink(Grid(), file.sites, "0" * 64, lifetime=file.patience)
    assert link.receive(0.0) is None  # asks the node who it is
    link.nodes = {"a": 5}
    for task in ("hello", "train", "evaluate", "refused"):
        link.send("a", task, wire.Message(facts={"round": 1}))
    lives = [("hello", 90.0), ("train", 7.0), ("evaluate", 7.0), ("refused", 7.0)]
    assert pushed == [("who", server._WHO_TTL), *lives]


def config(**change: Any) -> Any:
    return make_config({"name": "tiny", **SMALL, **change})


def test_the_app_and_its_kits(tmp_path) -> None:
    made = make_app(Plan(config(), SITES, min_sites=2), tmp_path / "flower")
    project = tomllib.loads((made / "app" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert project["config"] == {"kit": str(made / "kits" / "server"), "experiment": "tiny"}
    for which in ("server", "client"):
        module, name = project["components"][f"{which}app"].split(":")
        file = made / "app" / (module.replace(".", "/") + ".py")
        assert f"from fedmllm.sites.flower.{which} import {name}" in file.read_text()
    assert {kit.name for kit in (made / "kits").iterdir()} == {"server", *SITES}
    assert not list(made.rglob("*.key"))
    assert load_config(made / "kits" / SITES[0] / "experiments" / "tiny.yaml") == config()
    with pytest.raises(UserError, match="exists: choose another folder"):
        make_app(Plan(config(), SITES), tmp_path / "flower")
    with pytest.raises(UserError, match="a site cannot be called 'a b'"):
        make_app(Plan(config(), ["a b"]), tmp_path / "other")


EXCHANGE = {
    "data": {"name": "crisis", "train": 96, "test": 8, "classes": 4},
    "partition": {"clients": 3, "alpha": 100.0},
    "scenario": {"name": "cross", "images": "2:1"},
    "strategy": {"recombine": 1.0, "mixtures": 2, "evidence": 1e-9},
}


@pytest.mark.slow
@pytest.mark.skipif(
    not (FLOWER / "flower-superlink").exists(),
    reason="needs Flower in an environment of its own: make runs/flower/.installed, or FLOWER_BIN",
)
@pytest.mark.parametrize(
    "change", [{"algorithm": {"name": "scaffold"}}, EXCHANGE], ids=["scaffold", "exchange"]
)
def test_a_flower_federation_gives_the_weights_of_one_process(tmp_path, mllm, change) -> None:
    """SuperLink, three SuperNodes with a worker each, `flwr run`; SCAFFOLD keeps something, and
    evidence and mixtures cross before the first round."""
    made = config(**change, training={**SMALL["training"], "rounds": 3})
    result = run(made, out=tmp_path / "here", mllm=mllm)
    root = make_app(Plan(made, SITES, min_sites=3, deadline=120.0), tmp_path / "flower")
    for site in SITES:
        file = root / "kits" / site / settings.FILE
        facts = {**yaml.safe_load(file.read_text()), "reveal": {"features": True}}
        file.write_text(yaml.safe_dump(facts))
    ports = [_free_port() for _ in range(1 + len(SITES))]
    home = tmp_path / "home"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{ports[0]}"\n'
        "insecure = true\n"
    )
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    quiet["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"
    path = os.pathsep.join([str(FLOWER), os.environ["PATH"]])
    known = {**os.environ, **quiet, "FLWR_HOME": str(home), "PATH": path}
    known["PYTHONPATH"] = str(ROOT / "src")
    folder = root / "kits" / "server" / "runs" / "tiny"
    with ExitStack() as stack:
        link = [FLOWER / "flower-superlink", "--insecure", "--host", "127.0.0.1"]
        stack.enter_context(
            started(*link, "--port", str(ports[0]), log=tmp_path / "link.log", env=known)
        )
        for site, port in zip(SITES, ports[1:], strict=True):
            kit = root / "kits" / site
            stack.enter_context(worker(kit))
            node = [FLOWER / "flower-supernode", "--insecure", "--host", "127.0.0.1"]
            node += ["--port", str(port), "--superlink", f"127.0.0.1:{ports[0]}"]
            node += ["--node-config", f'kit="{kit}"']
            stack.enter_context(started(*node, log=tmp_path / f"{site}.log", env=known))
        _run_app(root / "app", known)
        until = time.monotonic() + 300
        while not (folder / "result.json").exists():
            assert time.monotonic() < until, (tmp_path / "link.log").read_text()[-4000:]
            time.sleep(1)
    one, other = _weights(tmp_path / "here"), _weights(folder)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    found = json.loads((folder / "result.json").read_text())
    assert [line["clients"] for line in found["history"]] == [list(SITES)] * 3
    for name in ("evidence", "mixtures", "bytes"):
        assert found.get(name) == result.get(name)


def _run_app(app: Path, known: dict[str, str]) -> None:
    """`flwr run`, again until the SuperLink listens."""
    for _ in range(20):
        done = subprocess.run(
            [FLOWER / "flwr", "run", str(app)],
            env=known,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode == 0:
            return
        time.sleep(2)
    raise AssertionError(done.stdout + done.stderr)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port: int = opened.getsockname()[1]
        return port
