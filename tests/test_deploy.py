"""The same experiment over a real network: server and sites as processes, mutual TLS, loopback."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
        assert (update["client"], update["num_samples"], update["extra"]) == ("client-01", 12, {})
        assert set(update["metrics"]) == {"loss"}
