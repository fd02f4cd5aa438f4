"""The same experiment over a real network: server and sites as processes, mutual TLS, loopback."""

from __future__ import annotations

import copy
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

pytest.importorskip("nvflare", reason='needs pip install "fedmllm[nvflare]"')

from sites import SITES, SMALL

from fedmllm.config import make_config
from fedmllm.experiment import run
from fedmllm.sites.flare.kits import Plan, add_experiment, make_kits
from fedmllm.sites.flare.local import free_port
from fedmllm.sites.flare.supervise import Nodes, Supervisor

TESTS = Path(__file__).parent


class Here:
    """A federation on this machine: kits, nodes, and a supervisor in this process."""

    def __init__(self, folder: Path, *configs: Any, **plan: Any) -> None:
        self.root, self.configs = folder / "federation", configs
        options = {"min_sites": 3, "port": free_port(), **plan}
        make_kits(Plan(configs[0], SITES, **options), self.root)
        self.kits = {kit.name: kit for kit in (self.root / "kits").iterdir()}
        for kit in self.kits.values():
            for config in configs[1:]:
                if kit.name != "admin":
                    add_experiment(kit, config)
        self.nodes = Nodes([kit for name, kit in self.kits.items() if name != "admin"])
        self.said: list[str] = []

    def set(self, kit: str, **facts: Any) -> None:
        """Change a kit's settings."""
        file = self.kits[kit] / "local" / "fedmllm.yml"
        file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **facts}))

    def run(
        self, name: str, *, meanwhile: Callable[[dict[str, Any]], None] = lambda status: None
    ) -> Path:
        """See an experiment through; `meanwhile` is called with the status again and again."""
        server, until = self.kits["server"], time.monotonic() + 400
        boss = Supervisor(server, self.kits["admin"], name, say=self.said.append)

        def tend() -> None:
            assert time.monotonic() < until, (self.said, boss.status())
            self.nodes.tend()
            meanwhile(boss.status())

        boss.tend = tend
        boss.run()
        return server / "runs" / name


@contextmanager
def federation(folder: Path, *configs: Any, **plan: Any) -> Iterator[Here]:
    here = Here(folder, *configs, **plan)
    try:
        yield here
    finally:
        here.nodes.end()


def small(name: str, **change: Any) -> Any:
    raw = copy.deepcopy(SMALL)
    for section, values in change.items():
        raw[section] = {**raw.get(section, {}), **values} if isinstance(values, dict) else values
    return make_config({"name": name, **raw})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(a: Path, b: Path) -> bool:
    one, other = weights(a), weights(b)
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def record_what_leaves(here: Here, site: str) -> None:
    """Put a recorder behind the gate at a site's border."""
    local = here.kits[site] / "local"
    policy = json.loads((local / "privacy.json").read_text())
    policy["scopes"][0]["task_result_filters"].append(
        {"path": "recording.Recorder", "args": {}, "direction": "out"}
    )
    (local / "privacy.json").write_text(json.dumps(policy))
    allowed = json.loads((local / "resources.json").read_text())
    allowed["class_allow_list"].append("recording.Recorder")
    (local / "resources.json").write_text(json.dumps(allowed))


def processes(kit: Path, word: str) -> list[int]:
    """Processes whose command line names this kit and this word."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (folder / "cmdline").read_bytes()
            if str(kit.resolve()).encode() in words and word.encode() in words:
                found.append(int(folder.name))
    return found


def test_three_sites_over_tls_give_the_weights_of_one_process(tmp_path, mllm, monkeypatch) -> None:
    """And nothing but the adapter's differences, counts and metrics leaves a site."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    config = small("tiny")
    result = run(config, out=tmp_path / "here", mllm=mllm)
    with federation(tmp_path, config) as here:
        record_what_leaves(here, "client-01")
        folder = here.run("tiny")
        assert same(folder, tmp_path / "here")
        assert json.loads((folder / "result.json").read_text())["metrics"] == result["metrics"]
        lines = (here.kits["client-01"] / "sent.jsonl").read_text().splitlines()
        check_what_left([json.loads(line)["content"] for line in lines], weights(folder))


def check_what_left(messages: list[dict[str, Any]], adapter: dict[str, torch.Tensor]) -> None:
    """One handshake and two updates: tensors of the adapter's shapes, numbers, no words of data."""
    facts = []
    for message in messages:
        assert set(message) <= {"DXO", "__headers__"}, message.keys()
        assert not any("memes" in str(value) for value in message["__headers__"].values())
        dxo = message["DXO"]
        assert set(dxo["meta"]) == {"fedmllm"}
        facts.append(json.loads(dxo["meta"]["fedmllm"]))
        for name, what in dxo["data"].items():
            key = name.removeprefix("delta||")
            assert what == f"tensor torch.float32 {list(adapter[key].shape)}"
        assert set(dxo["data"]) in (set(), {f"delta||{name}" for name in adapter})
    assert [set(each) == {"update", "memory"} for each in facts] == [False, True, True]
    assert set(facts[0]["task"]) == {"name", "kind", "metric", "classes", "question"}
    for each in facts[1:]:
        update = each["update"]
        assert set(update) == {"client", "num_samples", "extra", "metrics"}
        assert (update["client"], update["num_samples"], update["extra"]) == ("client-01", 6, {})
        assert set(update["metrics"]) == {"loss"}


@pytest.mark.slow
def test_other_algorithms_over_tls(tmp_path, mllm) -> None:
    configs = [small(name, algorithm={"name": name}) for name in ("fedadam", "scaffold")]
    with federation(tmp_path, *configs) as here:
        for config in configs:
            run(config, out=tmp_path / config.name, mllm=mllm)
            assert same(here.run(config.name), tmp_path / config.name)


KILLED = {
    "trainer": ("client-01", "fedmllm.sites.trainer"),
    "site's job": ("client-01", "worker_process"),
    "site": ("client-01", ""),
    "server's job": ("server", "runner_process"),
    "server": ("server", ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("who", KILLED)
def test_a_real_kill_in_round_2_changes_no_bit(tmp_path, mllm, who: str) -> None:
    """All three are needed for a round: it waits, goes on from what is sure, and ends the same."""
    config = small("kill", training={"rounds": 4}, algorithm={"name": "scaffold"})
    run(config, out=tmp_path / "here", mllm=mllm)
    kit, word = KILLED[who]
    killed = []

    with federation(tmp_path, config) as here:

        def kill(status: dict[str, Any]) -> None:
            if killed or status.get("rounds_done") != 1 or status.get("doing") != "training":
                return
            time.sleep(0.3)
            found = processes(here.kits[kit], word) if word else []
            if word and not found:
                return
            for process in found:
                os.kill(process, signal.SIGKILL)
            if not word:
                os.killpg(here.nodes.processes[here.kits[kit].resolve()].pid, signal.SIGKILL)
            killed.append(time.monotonic())

        folder = here.run("kill", meanwhile=kill)
        assert killed
        assert same(folder, tmp_path / "here")
        result = json.loads((folder / "result.json").read_text())
        assert [line["clients"] for line in result["history"]] == [list(SITES)] * 4
        assert not any("missing" in line for line in result["history"])


@pytest.mark.slow
def test_a_site_that_is_too_slow_is_dropped_and_taken_back(tmp_path) -> None:
    """Its trainer stands still (SIGSTOP) in round 2, and goes on two rounds later."""
    config = small("slow", training={"rounds": 30})
    stopped: list[int] = []
    woken: list[int] = []
    with federation(tmp_path, config, min_sites=2, deadline=8.0) as here:

        def meddle(status: dict[str, Any]) -> None:
            done = status.get("rounds_done", 0)
            if done >= 1 and not stopped:
                stopped.extend(processes(here.kits["client-02"], "fedmllm.sites.trainer"))
                for process in stopped:
                    os.kill(process, signal.SIGSTOP)
            if done >= 4 and stopped and not woken:
                woken.append(done)
                for process in stopped:
                    os.kill(process, signal.SIGCONT)

        try:
            folder = here.run("slow", meanwhile=meddle)
        finally:
            for process in stopped:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGCONT)
        history = json.loads((folder / "result.json").read_text())["history"]
    without = [line["round"] for line in history if "client-02" not in line["clients"]]
    asked_in_vain = [line["round"] for line in history if line.get("missing")]
    assert len(asked_in_vain) == 1
    assert without[0] == asked_in_vain[0] <= 3
    assert len(without) >= 2
    assert "client-02" in history[-1]["clients"]
