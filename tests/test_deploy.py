"""The same experiment over a real network: server and sites as processes, mutual TLS, loopback."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

pytest.importorskip("nvflare", reason='needs pip install "fedmllm[nvflare]"')

from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.filter import ContentBlockedException
from nvflare.apis.fl_context import FLContext
from nvflare.apis.signal import Signal
from nvflare.apis.utils.decomposers import flare_decomposers
from nvflare.fuel.flare_api.api_spec import AuthorizationError
from nvflare.fuel.utils import fobs
from sites import SITES, SMALL, NearLink, write_kit
from sites import make_kits as make_plain_kits

from fedmllm import manifest
from fedmllm.algorithms.base import Update
from fedmllm.cli import main
from fedmllm.config import config_hash, load_config, make_config
from fedmllm.data import load_dataset
from fedmllm.errors import UserError
from fedmllm.experiment import make_manifest, run
from fedmllm.export import export
from fedmllm.models import model_path
from fedmllm.sites import settings, wire
from fedmllm.sites.flare import codec, kits, supervise
from fedmllm.sites.flare.executor import SiteExecutor
from fedmllm.sites.flare.filters import ReleaseFilter, clip
from fedmllm.sites.flare.kits import Plan, add_experiment, make_kits, write_job
from fedmllm.sites.flare.local import free_port, site_names, status, status_lines, stop
from fedmllm.sites.flare.node import node_command, prepare_node
from fedmllm.sites.flare.supervise import Nodes, Supervisor
from fedmllm.sites.serving import serve
from fedmllm.sites.trainer import TrainerError

TESTS = Path(__file__).parent


@pytest.fixture
def shared_model(monkeypatch, mllm):
    """Sites and server that are called in this process use one loaded base."""
    monkeypatch.setattr("fedmllm.sites.site.load_model", lambda config: mllm)
    monkeypatch.setattr("fedmllm.sites.serving.load_model", lambda config: mllm)


class Here:
    """A federation on this machine: kits, nodes, and a supervisor in this process."""

    def __init__(self, folder: Path, *configs: Any, **plan: Any) -> None:
        self.root, self.configs = folder / "federation", configs
        options = {"min_sites": 3, "port": free_port(), **plan}
        self.port = options["port"]
        make_kits(Plan(configs[0], SITES, **options), self.root)
        self.kits = {kit.name: kit for kit in (self.root / "kits").iterdir()}
        for kit in self.kits.values():
            for config in configs[1:]:
                if kit.name in (*SITES, "server"):
                    add_experiment(kit, config)
        nodes = [name for name in self.kits if name != "admin" and "@" not in name]
        self.nodes = Nodes([self.kits[name] for name in nodes])
        self.said: list[str] = []

    def add(self, config: Any) -> None:
        """One more experiment."""
        for name in ("server", *SITES):
            add_experiment(self.kits[name], config)

    def set(self, kit: str, **facts: Any) -> None:
        """Change a kit's settings."""
        file = self.kits[kit] / "local" / "fedmllm.yml"
        file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **facts}))

    def site(self, name: str) -> dict[str, Any]:
        """A site's own status."""
        found: dict[str, Any] = json.loads((self.kits[name] / "state/status.json").read_text())
        return found

    def run(
        self,
        name: str,
        *,
        meanwhile: Callable[[dict[str, Any]], None] = lambda status: None,
        put_away: bool = True,
    ) -> Path:
        """See an experiment through; `meanwhile` is called with the status again and again.
        put_away: also wait until NVFlare has put the job away."""
        server, until = self.kits["server"], time.monotonic() + 400
        boss = Supervisor(server, self.kits["admin"], name, say=self.said.append)
        if not put_away:
            boss.done = lambda: boss.status().get("doing") == "done"

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


# One federation for the tests of this group: processes, certificates and connections are made once.
in_one = pytest.mark.xdist_group("tls")


@pytest.fixture(scope="module")
def tls(tmp_path_factory) -> Iterator[Here]:
    """Three sites and a server over mutual TLS, with a recorder behind each site's gate."""
    here = Path(settings.__file__).parents[2]  # nodes run elsewhere, where a relative path is none
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(here)]))
        with federation(tmp_path_factory.mktemp("tls"), small("tiny")) as here:
            for site in SITES:
                record_what_leaves(here, site)
            yield here


def sent(here: Here, site: str) -> list[dict[str, Any]]:
    """What left a site so far: a task's name and its answer each."""
    file = here.kits[site] / "sent.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@in_one
def test_three_sites_over_tls_give_the_weights_of_one_process(tls, tmp_path, mllm) -> None:
    """And nothing but the adapter's differences, counts and metrics leaves a site, where one
    trainer serves the whole job."""
    result = run(small("tiny"), out=tmp_path / "here", mllm=mllm)
    trainers: dict[str, set[int]] = {}

    def look(status: dict[str, Any]) -> None:
        for site in SITES:
            pids = processes(tls.kits[site], "fedmllm.sites.trainer")
            trainers.setdefault(site, set()).update(pids)

    before = len(sent(tls, "client-01"))
    folder = tls.run("tiny", meanwhile=look, put_away=False)
    assert same(folder, tmp_path / "here")
    assert json.loads((folder / "result.json").read_text())["metrics"] == result["metrics"]
    left = sent(tls, "client-01")[before:]
    check_what_left([each["content"] for each in left], weights(folder))
    assert [len(pids) for pids in trainers.values()] == [1, 1, 1]


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
        assert (update["client"], update["num_samples"], update["extra"]) == ("client-01", 8, {})
        assert set(update["metrics"]) == {"loss"}


STRATEGIES = {
    "mu": 0.5,
    "weight": "profile",
    "aggregation": 2.0,
    "prototypes": 0.5,
    "distillation": 0.5,
    "recombine": 1.0,
    "resample": 1.0,
}


@in_one
@pytest.mark.parametrize(
    "change",
    [
        {"algorithm": {"name": "scaffold"}},
        {
            "algorithm": {"name": "fedadam"},
            "strategy": STRATEGIES,
            "scenario": {"name": "hybrid", "p": 0.5},
            "prompt": "agnostic",
        },
    ],
    ids=["scaffold", "strategies"],
)
def test_other_algorithms_over_tls(tls, tmp_path, mllm, change) -> None:
    """Also what the sites' own held-out samples give, and what of all that leaves a site."""
    name = change["algorithm"]["name"]
    config = small(name, evaluation={"held_out": 0.5}, **change)
    run(config, out=tmp_path / "here", mllm=mllm)
    tls.add(config)
    before = len(sent(tls, "client-01"))
    folder = tls.run(name, put_away=False)
    assert same(folder, tmp_path / "here")
    found, result = (
        json.loads((path / "result.json").read_text()) for path in (folder, tmp_path / "here")
    )
    assert found["metrics"] == result["metrics"]
    assert found["held_out"] == result["held_out"]
    assert set(found["held_out"]["per_client"]) == set(SITES)
    left = sent(tls, "client-01")[before:]
    assert [each["task"] for each in left] == ["hello", "train", "train", "evaluate"]
    fields = {key.split("|")[0] for each in left for key in each["content"]["DXO"]["data"]}
    assert fields == {"delta", "extra"}
    facts = [json.loads(each["content"]["DXO"]["meta"]["fedmllm"]) for each in left]
    assert set(facts[-1]) == {"metrics"}
    assert set(facts[-1]["metrics"]) == set(result["held_out"]["per_client"]["client-01"])
    assert ("profile" in facts[0]) == ("strategy" in change)


@in_one
def test_evidence_and_mixtures_over_tls(tls, tmp_path, mllm) -> None:
    """As in one process; and what leaves a site for it: sums, counts, and means of features."""
    config = small(
        "exchange",
        scenario={"name": "cross", "images": "2:1"},
        data={"name": "crisis", "train": 96, "classes": 4},
        partition={"name": "dirichlet", "alpha": 100.0},
        strategy={"recombine": 1.0, "mixtures": 2, "evidence": 1e-9},
        training={"rounds": 1},
    )
    result = run(config, out=tmp_path / "here", mllm=mllm)
    kept = {site: (tls.kits[site] / "local" / "fedmllm.yml").read_text() for site in SITES}
    tls.add(config)
    for site in SITES:
        tls.set(site, reveal={"features": True})
    before = {site: len(sent(tls, site)) for site in SITES}
    folder = tls.run("exchange", put_away=False)
    for site, text in kept.items():
        (tls.kits[site] / "local" / "fedmllm.yml").write_text(text)
    assert same(folder, tmp_path / "here")
    found = json.loads((folder / "result.json").read_text())
    assert all(found[name] == result[name] for name in ("evidence", "mixtures", "bytes", "metrics"))
    assert result["mixtures"]["made"]
    for client in result["evidence"]["clients"]:
        site = client["id"]
        left = sent(tls, site)[before[site] :]
        gives = ["mixtures"] if client["image"]["samples"] else []
        tasks = [each["task"] for each in left]
        assert tasks == ["hello", "sums", "hits", *gives, "exchanged", "train"]
        what = {
            each["task"]: {key.split("|")[0] for key in each["content"]["DXO"]["data"]}
            for each in left
        }
        shown = {"sums": {"sums"}, "mixtures": {"mixture"}, "train": {"delta"}}
        assert what == {task: shown.get(task, set()) for task in tasks}


@pytest.fixture
def wrong_sites(tls, tmp_path) -> Iterator[dict[str, str]]:
    """Each site wrong in another way; why, as the server must read it."""
    whole = small("whole")
    data = load_dataset(**whole.data)
    export(make_manifest(whole, data), data, tmp_path / "all")
    files = {site: tls.kits[site] / "local" / "fedmllm.yml" for site in ("server", *SITES)}
    kept = {file: file.read_text() for file in files.values()}
    altered = tmp_path / "altered"
    shutil.copytree(model_path("embedded"), altered)
    tensors = load_file(altered / "model.safetensors")
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] += 1
    save_file(tensors, altered / "model.safetensors", metadata={"format": "pt"})
    tls.set("server", data={"none": True}, min_sites=1)
    tls.set(SITES[0], data={"root": str(tmp_path / "all")}, settings={"model.path": str(altered)})
    (tls.kits[SITES[1]] / "data" / f"{SITES[1]}.json").write_text("[]")
    tls.set(SITES[1], data={"file": f"data/{SITES[1]}.json"})
    other = small("other", seed=3)
    wrong = make_manifest(other, load_dataset(**other.data))
    manifest.save(wrong, tls.kits[SITES[2]] / "data" / "wrong.json")
    tls.set(SITES[2], data={"root": str(tmp_path / "all"), "manifest": "data/wrong.json"})
    yield {
        SITES[0]: "base model: the server has ",
        SITES[1]: "cannot take part: the reason stands in the site's log",
        SITES[2]: f"the manifest of {SITES[2]} ({wrong.sha256[:12]}) is not of the data there",
    }
    for file, text in kept.items():
        file.write_text(text)


@in_one
def test_wrong_sites_are_told_why_over_tls_before_any_training(tls, tmp_path, wrong_sites) -> None:
    """Altered weights, an empty file, a manifest of other data: the server's status file and the
    site's own say why in the same words, also after the job, and nobody has trained."""
    task = load_dataset(**small("whole").data).task
    own = {"name": "conversations", "root": str(tmp_path / "all"), "metric": "auc"}
    own |= {"task": "choice", "classes": list(task.classes), "question": task.question}
    base = {"name": "base", "path": str(model_path("embedded"))}
    raw = {**copy.deepcopy(SMALL), "data": own, "model": base}
    tls.add(make_config({"name": "wrong", **raw}))
    before = {site: len(sent(tls, site)) for site in SITES}
    with pytest.raises(UserError, match="3 of 3 sites were refused, and a round needs 1"):
        tls.run("wrong")
    folder = tls.kits["server"] / "runs" / "wrong"
    told = json.loads((folder / "status.json").read_text())
    assert told["doing"] == "stopped"
    until(lambda: all(tls.site(site)["doing"] == "no job" for site in SITES), every=0.2)
    for site, words in wrong_sites.items():
        here = tls.site(site)
        assert words in here["error"]
        assert f"  {site}: {here['error']}" in told["error"].splitlines()
        assert {each["task"] for each in sent(tls, site)[before[site] :]} <= {"hello", "refused"}
    assert "the list is empty" in tls.site(SITES[1])["detail"]
    assert "the list is empty" not in json.dumps(told)
    assert not list(folder.glob("metrics*"))
    assert "rounds_done" not in told


KILLED = {
    "trainer": ("client-01", "fedmllm.sites.trainer"),
    "site's job": ("client-01", "worker_process"),
    "site": ("client-01", ""),
    "server's job": ("server", "runner_process"),
    "server": ("server", ""),
}


def send(pids: list[int], what: signal.Signals) -> None:
    """A signal to processes, those that have ended left out."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, what)


def held_in_training(kit: Path) -> list[int]:
    """A site's trainer, made to stand still within a round: it has the request and has written no
    answer. Empty where it has nothing to do."""
    scratch = kit / "state"
    if not list(scratch.glob("scratch-*/*-in.safetensors")):
        return []
    pids = processes(kit, "fedmllm.sites.trainer")
    send(pids, signal.SIGSTOP)
    at_work = list(scratch.glob("scratch-*/*-in.safetensors"))
    if at_work and not list(scratch.glob("scratch-*/*-out.safetensors")):
        return pids
    send(pids, signal.SIGCONT)
    return []


def hold(kit: Path, status: dict[str, Any], held: list[int]) -> bool:
    """Hold a site's trainer in training, in round 2, once."""
    if held or status.get("rounds_done", 0) != 1:
        return False
    until(lambda: held.extend(held_in_training(kit)) or held)
    assert json.loads((kit / "state" / "status.json").read_text())["doing"] == "train"
    return True


@pytest.mark.slow
@pytest.mark.parametrize("who", KILLED)
def test_a_real_kill_in_training_changes_no_bit(tmp_path, mllm, who: str) -> None:
    """All three are needed for a round: it waits, goes on from what is sure, and ends the same.
    The kill comes while a site trains in round 2. Its job goes on where only a trainer died."""
    config = small("kill", training={"rounds": 4}, algorithm={"name": "scaffold"})
    run(config, out=tmp_path / "here", mllm=mllm)
    kit, word = KILLED[who]
    held: list[int] = []

    with federation(tmp_path, config) as here:

        def kill(status: dict[str, Any]) -> None:
            if not hold(here.kits["client-01"], status, held):
                return
            if word:
                found = processes(here.kits[kit], word)
                assert found
                send(found, signal.SIGKILL)
            else:
                os.killpg(here.nodes.processes[here.kits[kit].resolve()].pid, signal.SIGKILL)
            send(held, signal.SIGCONT)

        try:
            folder = here.run("kill", meanwhile=kill)
        finally:
            send(held, signal.SIGCONT)
        assert held
        check_undisturbed(folder, tmp_path / "here")
        submitted = [line for line in here.said if line.startswith("submitted")]
        assert len(submitted) == (1 if who == "trainer" else 2)


def without_one_update(folder: Path, config: Any, site: str, round_: int) -> Path:
    """The run folder of the same sites in this process, where one round's training fails once."""
    made = make_plain_kits(folder, config.model_dump(mode="json"), server={"min_sites": 2})

    def fail(name: str, task: str, message: wire.Message) -> wire.Message | Exception:
        wrong = (name, task, message.facts.get("round")) == (site, "train", round_ - 1)
        return RuntimeError("died") if wrong else message

    serve(made["server"], config_hash(config), NearLink(made, folder, fail))
    return made["server"] / "runs" / config.name


@pytest.mark.slow
def test_a_trainer_killed_where_two_are_enough_costs_its_round_only(tmp_path, shared_model) -> None:
    """The round names it, the next has it again, and the bits are those of a run without that
    update."""
    config = small("kill", training={"rounds": 4}, algorithm={"name": "scaffold"})
    near = without_one_update(tmp_path / "near", config, SITES[1], 2)
    held: list[int] = []
    with federation(tmp_path, config, min_sites=2) as here:

        def kill(status: dict[str, Any]) -> None:
            if hold(here.kits[SITES[1]], status, held):
                send(held, signal.SIGKILL)

        folder = here.run("kill", meanwhile=kill)
        assert len([line for line in here.said if line.startswith("submitted")]) == 1
    assert same(folder, near)
    found, expected = (json.loads((p / "result.json").read_text()) for p in (folder, near))
    assert found["metrics"] == expected["metrics"]
    assert [line.get("missing") for line in found["history"]] == [None, [SITES[1]], None, None]
    for ours, theirs in zip(found["history"], expected["history"], strict=True):
        assert {key: ours[key] for key in EQUAL} == {key: theirs[key] for key in EQUAL}


@pytest.mark.slow
def test_a_site_killed_where_two_are_enough_comes_back_at_a_later_round(tmp_path) -> None:
    """Its round closes without it and names it, nobody waits for it, and it is taken in again."""
    config = small("kill", training={"rounds": 20})
    held: list[int] = []
    with federation(tmp_path, config, min_sites=2) as here:

        def kill(status: dict[str, Any]) -> None:
            if hold(here.kits[SITES[1]], status, held):
                kill_all(here.kits[SITES[1]])

        folder = here.run("kill", meanwhile=kill)
        submitted = [line for line in here.said if line.startswith("submitted")]
        assert len(submitted) == 2
        assert SITES[1] in submitted[1]
    history = json.loads((folder / "result.json").read_text())["history"]
    assert [line["round"] for line in history] == list(range(1, 21))
    assert [line["round"] for line in history if line.get("missing")] == [2]
    assert history[1]["missing"] == [SITES[1]]
    there = [SITES[1] in line["clients"] for line in history]
    back = there.index(True, 1)
    assert there == [True, *[False] * (back - 1), *[True] * (20 - back)]
    assert all(line["clients"] in (list(SITES), [SITES[0], SITES[2]]) for line in history)


@pytest.mark.slow
def test_a_site_killed_between_rounds_changes_no_bit(tmp_path, mllm) -> None:
    """It has delivered, the server has written its checkpoint, and the site has not asked for the
    next round's work."""
    config = small("kill", training={"rounds": 8}, algorithm={"name": "scaffold"})
    run(config, out=tmp_path / "here", mllm=mllm)
    killed: list[int] = []
    with federation(tmp_path, config) as here:
        kit = here.kits[SITES[1]]
        rounds = here.kits["server"] / "runs" / "kill" / "state"

        def last() -> list[Path]:
            return sorted(rounds.glob("round-*"))

        def kill(status: dict[str, Any]) -> None:
            if killed or status.get("doing") != "training" or not status.get("rounds_done"):
                return
            before = last()
            assert before
            until(lambda: last() != before, every=0.002)
            pids = processes(kit, "")
            send(pids, signal.SIGSTOP)
            idle = here.site(SITES[1])["doing"] == "waiting"
            if idle and not list(kit.glob("state/scratch-*/*")):
                kill_all(kit)
                killed.append(len(last()))
            send(pids, signal.SIGCONT)

        folder = here.run("kill", meanwhile=kill)
        assert killed
        check_undisturbed(folder, tmp_path / "here")


@pytest.mark.slow
def test_two_thirds_of_the_sites_gone_and_back(tmp_path, mllm) -> None:
    """The run waits and says for whom and how many it needs; with them it goes on to its end."""
    config = small("kill", training={"rounds": 4}, algorithm={"name": "scaffold"})
    run(config, out=tmp_path / "here", mllm=mllm)
    held: list[int] = []
    waited: list[float] = []
    with federation(tmp_path, config, min_sites=2) as here:
        everybody = list(here.nodes.kits)
        lost = [here.kits[site] for site in SITES[1:]]

        def kill(status: dict[str, Any]) -> None:
            if hold(here.kits[SITES[1]], status, held):
                here.nodes.kits = [kit for kit in everybody if kit.name not in SITES[1:]]
                for kit in lost:
                    kill_all(kit)
            waits = str(status.get("doing")).startswith("waiting")
            if not held or not waits or here.nodes.kits is everybody:
                return
            if set(status.get("present", ())) - {SITES[0]}:
                return  # one of the two is not missed yet
            waited.append(time.monotonic())
            assert (status["min_sites"], status["rounds_done"]) == (2, 1)
            assert set(status["away"]) == set(SITES[1:])
            facts = {"running": True, "processes": {}, "runs": {"kill": status}, "sites": {}}
            said = list(status_lines(facts))
            assert "  a round needs 2 sites" in said
            assert any(line.startswith(f"  away: {SITES[2]}: ") for line in said)
            if waited[-1] - waited[0] > 10:  # ten seconds on, nothing has moved
                here.nodes.kits = everybody

        folder = here.run("kill", meanwhile=kill)
        assert waited[-1] - waited[0] > 10
        check_undisturbed(folder, tmp_path / "here")


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


class Relay:
    """A TCP relay in a site's way to the server, which can hold on to what goes up."""

    def __init__(self, target: int) -> None:
        self.target, self.left, self.held = target, math.inf, threading.Event()
        self.open: list[socket.socket] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Close what is open, with what is held, and hold no more."""
        for each in self.open:
            each.close()
        self.left = math.inf

    def _accept(self) -> None:
        with suppress(OSError):  # until the listener is closed
            while True:
                near, _ = self.listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self.target))
                except ConnectionRefusedError:
                    near.close()
                    continue
                self.open += [near, far]
                for ends in ((near, far, True), (far, near, False)):
                    threading.Thread(target=self._pump, args=ends, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        with suppress(OSError):
            while data := source.recv(4096):
                self.left -= len(data) if up else 0
                while up and self.left < 0:
                    self.held.set()
                    time.sleep(0.05)
                sink.sendall(data)
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


def kill_all(kit: Path) -> None:
    """Every process of a kit: node, job and trainer."""
    for process in processes(kit, ""):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def until(met: Callable[[], Any], seconds: float = 60.0, every: float = 0.01) -> None:
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end
        time.sleep(every)


EQUAL = ("round", "clients", "loss", "lr", "bytes_up", "bytes_down", "metrics")


def check_undisturbed(folder: Path, here: Path) -> None:
    """The bits of the undisturbed run, and its rounds with all sites in each."""
    assert same(folder, here)
    found, expected = (json.loads((p / "result.json").read_text()) for p in (folder, here))
    assert found["metrics"] == expected["metrics"]
    for ours, theirs in zip(found["history"], expected["history"], strict=True):
        assert {key: ours[key] for key in EQUAL} == {key: theirs[key] for key in EQUAL}
        assert ours["clients"] == list(SITES)
        assert "missing" not in ours


@pytest.mark.slow
def test_a_site_killed_during_its_upload_changes_no_bit(tmp_path, mllm, monkeypatch) -> None:
    """Half of its update is through, and the rest held on the way, when it is killed."""
    config = small("kill", training={"rounds": 5}, algorithm={"name": "scaffold"})
    size = run(config, out=tmp_path / "here", mllm=mllm)["history"][1]["bytes_up"] // 3
    port = free_port()
    relay = Relay(port)

    def project(plan: Plan, made=kits._project) -> dict[str, Any]:
        found = made(plan)
        (site,) = [each for each in found["participants"] if each["name"] == SITES[1]]
        site["connect_to"] = {"host": "localhost", "port": relay.port}
        return found

    monkeypatch.setattr(kits, "_project", project)
    with federation(tmp_path, config, port=port) as here:
        kit = here.kits[SITES[1]]

        def trains() -> bool:
            return any(kit.glob("state/scratch-*/*-in.safetensors"))

        def kill(status: dict[str, Any]) -> None:
            if relay.held.is_set() or status.get("rounds_done", 0) < 1:
                return
            until(lambda: not trains())
            until(trains)
            relay.left = size // 2
            until(relay.held.is_set)
            assert not list(kit.glob("state/scratch-*/*"))  # its trainer has done its part
            time.sleep(1)
            found = json.loads((here.kits["server"] / "runs/kill/status.json").read_text())
            assert SITES[1] in found["waiting"]
            kill_all(kit)
            relay.cut()

        folder = here.run("kill", meanwhile=kill)
        assert relay.held.is_set()
        check_undisturbed(folder, tmp_path / "here")
    relay.listener.close()


@pytest.mark.slow
def test_a_server_killed_while_it_aggregates_changes_no_bit(tmp_path, mllm) -> None:
    """Two updates are in its sum, and the third site stands still, when it is killed."""
    config = small("kill", training={"rounds": 4}, algorithm={"name": "scaffold"})
    run(config, out=tmp_path / "here", mllm=mllm)
    stopped: list[int] = []
    killed: list[dict[str, Any]] = []
    with federation(tmp_path, config) as here:

        def kill(status: dict[str, Any]) -> None:
            if not stopped and status.get("rounds_done") == 1:
                stopped.extend(processes(here.kits[SITES[2]], "fedmllm.sites.trainer"))
                for process in stopped:
                    os.kill(process, signal.SIGSTOP)
            if not stopped or killed or status.get("delivered") != list(SITES[:2]):
                return
            assert status["waiting"] == [SITES[2]]
            kill_all(here.kits["server"])
            killed.append(status)
            for process in stopped:
                os.kill(process, signal.SIGCONT)

        folder = here.run("kill", meanwhile=kill)
        assert killed
        check_undisturbed(folder, tmp_path / "here")


@pytest.mark.slow
@pytest.mark.parametrize("written", ["server.safetensors", "state.json"])
def test_a_server_killed_while_it_writes_changes_no_bit(tmp_path, mllm, written: str) -> None:
    """When the first, or the last, file of a checkpoint has appeared beside those that count."""
    config = small("kill", training={"rounds": 8}, algorithm={"name": "scaffold"})
    run(config, out=tmp_path / "here", mllm=mllm)
    hits: list[list[str]] = []
    with federation(tmp_path, config) as here:
        draft = here.kits["server"] / "runs" / "kill" / "state" / ".draft"

        def kill(status: dict[str, Any]) -> None:
            if hits or status.get("rounds_done", 0) < 1 or status.get("doing") != "training":
                return
            until((draft / written).exists, every=0.0002)
            with suppress(ProcessLookupError):
                os.kill(status["pid"], signal.SIGKILL)
            kill_all(here.kits["server"])
            if draft.exists():  # or it was too late, and the next round will do
                hits.append(sorted(path.name for path in draft.parent.glob("round-*")))

        folder = here.run("kill", meanwhile=kill)
        assert hits
        check_undisturbed(folder, tmp_path / "here")


# -- kits ------------------------------------------------------------------------------------------


def test_kits_have_safe_defaults(tmp_path) -> None:
    root = tmp_path / "federation"
    make_kits(Plan(small("tiny"), SITES, host="fed.example.org", min_sites=2), root)
    kits = {kit.name: kit for kit in (root / "kits").iterdir()}
    assert set(kits) == {"server", "admin", *SITES}
    assert root.stat().st_mode & 0o077 == 0
    assert (root / "authority").stat().st_mode & 0o077 == 0
    keys = [*root.rglob("*.key"), *(root / "authority").iterdir()]
    assert len(keys) >= 6
    for name, kit in kits.items():
        if name == "admin":
            continue
        policy = json.loads((kit / "local" / "authorization.json").read_text())["permissions"]
        for role in policy.values():
            for right in ("byoc", "shell_commands", "download_job"):
                assert role.get(right, "none") == "none"
        resources = json.loads((kit / "local" / "resources.json").read_text())
        assert resources["class_list_enforcement_mode"] == "enforce"
        assert resources["class_allow_list"] == ["fedmllm.sites.flare"]
        assert not {"site_log_streamer", "log_receiver"} & {
            c["id"] for c in resources["components"]
        }
        config = load_config(kit / "experiments" / "tiny.yaml")
        assert config_hash(config) == config_hash(small("tiny"))
        assert "fed.example.org:8002" in (kit / "README.md").read_text()
        unit = (kit / "systemd" / f"fedmllm-{name}.service").read_text()
        assert "ExecStart=@VENV@/bin/fedmllm deploy node @KIT@\n" in unit
        text = (kit / "requirements.txt").read_text()
        listed = [line for line in text.splitlines() if not line.startswith("#")]
        names = {line.split("==")[0] for line in listed}
        assert {"nvflare", "torch", "grpcio", "cryptography", "transformers"} <= names
        assert not {"fedmllm", "pytest", "ruff", "pyarrow", "bitsandbytes"} & names
        assert not any("+" in line for line in listed)
        prepare_node(kit)
        assert "/tmp/nvflare" not in (kit / "local" / "resources.json").read_text()
    policy = json.loads((kits[SITES[0]] / "local" / "privacy.json").read_text())
    gates = policy["scopes"][0]["task_result_filters"]
    assert [gate["path"] for gate in gates] == ["fedmllm.sites.flare.filters.ReleaseFilter"]
    assert policy["default_scope"] == policy["scopes"][0]["name"]
    assert settings.load_server(kits["server"]).sites == SITES
    assert settings.load_site(kits[SITES[1]]).name == SITES[1]
    moved = json.loads((kits["server"] / "local" / "resources.json").read_text())
    assert str(kits["server"].resolve()) in json.dumps(moved["snapshot_persistor"])
    job = write_job(tmp_path / "job", "0" * 64, name="x")
    files = {str(path.relative_to(job)) for path in job.rglob("*") if path.is_file()}
    app = "app/config/config_fed_"
    assert files == {"meta.json", f"{app}server.json", f"{app}client.json"}  # no code
    with pytest.raises(UserError, match="exists"):
        make_kits(Plan(small("tiny"), SITES), root)


def unit_keys(file: Path) -> dict[str, str]:
    """What a service unit sets; a key that is set twice would not do."""
    lines = [line.split("=", 1) for line in file.read_text().splitlines() if "=" in line]
    pairs = [(key, value) for key, value in lines if not key.startswith("#")]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def test_a_service_that_cannot_succeed_is_not_started_for_ever(tmp_path, monkeypatch) -> None:
    """`deploy supervise` ends with 2 on what a person must mend, and its unit stops at that code; a
    server that is away, or a crash, starts it anew."""
    root = make_kits(Plan(small("tiny"), SITES), tmp_path / "federation")
    units = {file.name: file for file in (root / "kits").glob("*/systemd/*.service")}
    assert len(units) == 5
    boss = unit_keys(units["fedmllm-supervisor.service"])
    assert (boss["Restart"], boss["RestartPreventExitStatus"]) == ("on-failure", "2")
    assert "fedmllm deploy supervise" in boss["ExecStart"]
    node = unit_keys(units["fedmllm-server.service"])
    assert (node["Restart"], "RestartPreventExitStatus" in node) == ("always", False)

    def stopped(self: Supervisor) -> None:
        raise UserError("tiny: 3 of 3 sites were refused")

    monkeypatch.setattr(Supervisor, "run", stopped)
    words = ["supervise", str(root / "kits/server"), "--admin", str(root / "kits/admin")]
    monkeypatch.setattr(sys, "argv", ["fedmllm", "deploy", *words, "--experiment", "tiny"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert str(ended.value.code) == boss["RestartPreventExitStatus"]
    if shutil.which("systemd-analyze"):
        for name, file in units.items():
            text = file.read_text().replace("@VENV@/bin/fedmllm", "/bin/true")
            made = tmp_path / name
            made.write_text(
                re.sub("@[A-Z]+@", str(tmp_path), text).replace("=fedmllm\n", "=root\n")
            )
            done = subprocess.run(
                ["systemd-analyze", "verify", "--man=no", str(made)], capture_output=True, text=True
            )
            assert str(made) not in done.stdout + done.stderr, done.stderr


def test_wrong_kits_are_refused(tmp_path) -> None:
    for change, words in [
        ({"sites": ["a b"]}, "a site cannot be called 'a b'"),
        ({"sites": ["server"]}, "a site cannot be called 'server'"),
        ({"sites": ["a", "a"]}, "different names"),
        ({"host": "no host"}, "is not a host name"),
        ({"min_sites": 4}, "min-sites is 4: 1 to 3"),
        (
            {"config": small("tiny", aggregation="median"), "min_sites": 2},
            "median needs at least 3 updates a round, and min-sites is 2: raise it",
        ),
    ]:
        plan = Plan(**{"config": small("tiny"), "sites": SITES, **change})
        with pytest.raises(UserError, match=words):
            make_kits(plan, tmp_path / "f")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"give partition.clients=4 or --sites 3"):
        site_names(small("tiny"), "4")
    assert site_names(small("tiny"), "3") == list(SITES)
    own = make_config({"name": "x", "data": {"name": "conversations", "root": "r"}})
    assert site_names(own, "clinic-a, clinic-b") == ["clinic-a", "clinic-b"]
    assert site_names(own, "2") == ["site-1", "site-2"]
    with pytest.raises(UserError, match="is no kit of a server or a site"):
        node_command(tmp_path)
    with pytest.raises(UserError, match="is not a federation"):
        status(tmp_path)
    with pytest.raises(UserError, match="is no administrator's kit"):
        supervise._connected(tmp_path)


def test_a_site_cannot_bear_another_name_than_its_certificate(tmp_path) -> None:
    here = Here(tmp_path, small("tiny"))
    assert "uid=client-00" in node_command(here.kits["client-00"])
    here.set("client-00", name="client-01")
    with pytest.raises(UserError, match="'client-01', and the certificate here is of 'client-00'"):
        node_command(here.kits["client-00"])


def test_what_the_gate_blocks_never_leaves() -> None:
    """A filter's exception becomes an answer without content (tested by NVFlare); ours raises."""
    update = wire.pack_update(Update("k", 5, {"w": torch.full((4,), 2.0)}, metrics={"loss": 0.5}))
    message = wire.Message(update.tensors, {"update": update.facts, "memory": False})
    shareable = codec.answer(message, "train")
    assert codec.to_message(shareable).facts == message.facts
    assert from_shareable(shareable).data_kind == DataKind.WEIGHT_DIFF
    taken = codec.take_message(codec.answer(message, "train"))
    assert torch.equal(taken.tensors["delta||w"], message.tensors["delta||w"])
    held = codec.answer(message, "train")
    codec.take_message(held)
    assert from_shareable(held).data == {}
    assert len(message.tensors) == 1
    clip(message.tensors, 1.0)
    assert message.tensors["delta||w"].tolist() == [0.5] * 4  # norm 4 becomes 1
    clip(message.tensors, 3.0)
    assert message.tensors["delta||w"].tolist() == [0.5] * 4
    reply = codec.failure("no", final=True)
    assert codec.from_reply(reply) == (None, "no", True)
    assert codec.from_reply(DXO(DataKind.WEIGHTS, data={}).to_shareable())[0] is None


class At(FLContext):
    """A context of a kit, as far as our components ask."""

    def __init__(self, kit: Path) -> None:
        super().__init__()
        self.kit = kit

    def get_engine(self, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(
            get_workspace=lambda: SimpleNamespace(get_root_dir=lambda: str(self.kit)),
            fire_event=lambda *_: None,
        )


@pytest.mark.parametrize("reveal", [{}, {"samples": False}])
def test_the_gate_reads_the_sites_own_settings_and_clips(tmp_path, reveal) -> None:
    """What passes is the very message; what does not is an exception, with its reason."""
    kit = write_kit(tmp_path, "k", {"name": "k", "reveal": reveal})
    update = wire.pack_update(Update("k", 5, {"w": torch.full((4,), 2.0), "v": torch.zeros(3)}))
    message = wire.Message(update.tensors, {"update": update.facts, "memory": False})
    for clip_norm, left in [(0.0, 2.0), (1.0, 0.5), (9.0, 2.0)]:
        gate, sent = ReleaseFilter(clip_norm), codec.answer(copy.deepcopy(message), "train")
        if reveal:
            with pytest.raises(ContentBlockedException, match="number of samples"):
                gate.process(sent, At(kit))
            continue
        found = codec.to_message(gate.process(sent, At(kit)))
        assert found.tensors["delta||w"].tolist() == [left] * 4
        assert found.facts == message.facts
    for clip_norm in (0.0, 1.0):  # what has no tensors: the handshake, scores
        hello = codec.answer(wire.Message(facts={"problems": []}), "hello")
        assert ReleaseFilter(clip_norm).process(hello, At(kit)) is hello
    rows = codec.answer(wire.Message(facts={"rows": ["Mrs Miller"]}), "train")
    foreign = DXO(DataKind.WEIGHTS, data={"w": torch.ones(2)}).to_shareable()
    for wrong, words in [(rows, "not those of an answer"), (foreign, "not a message of fedmllm")]:
        with pytest.raises(ContentBlockedException, match=words):
            ReleaseFilter().process(wrong, At(kit))
    failed = codec.failure("no", final=True)
    assert ReleaseFilter(1.0).process(failed, At(kit)) is failed


def test_half_precision_travels_as_it_is_in_two_bytes_a_number() -> None:
    """NVFlare's own encoding of a message: the bits come back, and so do odd shapes."""
    codec.prepare()
    flare_decomposers.register()
    draws = torch.Generator().manual_seed(0)
    delta = {
        "half": torch.randn(300, 1000, generator=draws).bfloat16(),
        "small": torch.tensor([1e-40, -0.0, float(2**127)]).bfloat16(),
        "none": torch.zeros(0, 4, dtype=torch.bfloat16),
        "whole": torch.randn(7, generator=draws),
    }
    update = wire.pack_update(Update("k", 5, delta))
    sent = codec.answer(wire.Message(update.tensors, {"update": update.facts}), "train")
    blob = fobs.dumps(sent)
    assert 2 * 300_000 < len(blob) < 2 * 300_000 + 4096
    found = codec.to_message(fobs.loads(blob))
    for name, value in delta.items():
        back = found.tensors[f"delta||{name}"]
        assert (back.dtype, back.shape) == (value.dtype, value.shape)
        assert torch.equal(back.view(torch.uint8), value.view(torch.uint8))


class StubTrainer:
    """Answers in turn, or raises."""

    def __init__(self, *answers: wire.Message | Exception) -> None:
        self.answers = list(answers)

    def ask(self, do: str, message: wire.Message, *, aborted: Callable[[], bool]) -> wire.Message:
        found = self.answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    def end(self) -> None:
        pass


def site_status(tmp_path: Path, tasks: dict[str, wire.Message | Exception], stop: bool = False):
    """A site's status after some tasks, and after the end of the job."""
    site, context, signal_ = SiteExecutor("0" * 64), At(tmp_path), Signal()
    site.trainer, site.state = StubTrainer(*tasks.values()), tmp_path
    signal_.trigger(True) if stop else None
    for task in tasks:
        facts = {"why": "the server's words"} if task == "refused" else {"round": 0}
        message = codec.to_shareable(wire.Message(facts=facts))
        site.execute(task, message, context, signal_)
    file = tmp_path / "status.json"
    before = json.loads(file.read_text())
    site.handle_event(EventType.END_RUN, context)
    after = json.loads(file.read_text())
    return tuple({k: v for k, v in each.items() if k != "at"} for each in (before, after))


def test_a_site_says_why_also_when_the_job_is_over(tmp_path) -> None:
    empty = TrainerError("x.json: the list is empty", "cannot take part: see its log", final=True)
    both = {"error": "the server's words", "detail": "x.json: the list is empty"}
    found = site_status(tmp_path, {"hello": empty, "refused": wire.Message()})
    assert found == ({"doing": "refused", **both}, {"doing": "no job", **both})
    said = status_lines({"running": True, "processes": {}, "runs": {}, "sites": {"k": found[1]}})
    assert list(said)[-1] == "k: no job (the server's words; here: x.json: the list is empty)"
    # what it found itself, where the server could not tell it before the job's end
    problems = wire.Message(facts={"problems": ["base model: a", "tokenizer: b"]})
    found = site_status(tmp_path, {"hello": problems})
    assert found[1] == {"doing": "no job", "error": "base model: a; tokenizer: b"}
    # the same words from both: once
    same_words = wire.Message(facts={"problems": ["the server's words"]})
    found = site_status(tmp_path, {"hello": same_words, "refused": wire.Message()})
    assert found[1] == {"doing": "no job", "error": "the server's words"}
    # what works again is no error any more, and a round that was called off is none
    killed = TrainerError("was killed", "was killed")
    found = site_status(tmp_path, {"train": killed, "evaluate": wire.Message()})
    assert found == ({"doing": "waiting"}, {"doing": "no job"})
    assert site_status(tmp_path, {"train": killed})[1] == {"doing": "no job", "error": "was killed"}
    assert site_status(tmp_path, {"train": killed}, True)[0] == {"doing": "called off"}


# -- the supervisor --------------------------------------------------------------------------------


class StubSession:
    """An administrator's session: who is connected, and jobs that run until they are aborted."""

    def __init__(self) -> None:
        self.there = list(SITES)
        self.jobs: dict[str, str] = {}

    def get_connected_client_list(self) -> list[Any]:
        return [SimpleNamespace(name=name) for name in self.there]

    def list_jobs(self) -> list[dict[str, str]]:
        return []

    def submit_job(self, folder: str) -> str:
        name = f"job-{len(self.jobs) + 1}"
        self.jobs[name] = "RUNNING"
        return name

    def get_job_status(self, job: str) -> str:
        return self.jobs[job]

    def abort_job(self, job: str) -> None:
        self.jobs[job] = "FINISHED:ABORTED"

    def close(self) -> None:
        pass


@pytest.fixture
def boss(tmp_path, monkeypatch) -> Supervisor:
    """A supervisor of an experiment at a server that is not there; seconds are its own."""
    raw = small("x").model_dump(mode="json")
    kit = make_plain_kits(tmp_path, raw, server={"min_sites": 2})["server"]
    found = Supervisor(kit, tmp_path / "admin", "x", say=lambda line: None)
    found._session, found.lines = StubSession(), []
    found.say = found.lines.append
    clock = itertools.count(step=5.0)
    monkeypatch.setattr(supervise.time, "monotonic", lambda: next(clock))
    found.folder.mkdir(parents=True)
    return found


def tell(boss: Supervisor, doing: str, **facts: Any) -> None:
    """What the server's process of the present job writes."""
    told = {"doing": doing, "job": boss.job, "pid": os.getpid(), "rounds_done": 0, **facts}
    (boss.folder / "status.json").write_text(json.dumps(told))


def test_a_run_that_stopped_is_not_submitted_again(boss) -> None:
    """Also where its process has ended and NVFlare has not put the job away yet."""
    boss.step()
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True
    )
    tell(boss, "stopped", error="3 of 3 sites were refused", pid=int(ended.stdout))
    with pytest.raises(UserError, match="x: 3 of 3 sites were refused"):
        boss.step()
    assert list(boss._session.jobs.values()) == ["RUNNING"]
    tell(boss, "training", pid=int(ended.stdout))
    boss.step()
    boss.step()
    assert list(boss._session.jobs.values()) == ["FINISHED:ABORTED", "RUNNING"]


def test_a_site_that_keeps_out_of_jobs_is_not_waited_for_again_and_again(boss) -> None:
    """Connected and in no job, twice: it is left out, until it has been away, or takes part."""

    def steps(present: list[str], rounds: int = 0, count: int = 4) -> int:
        gone = [site for site in SITES if site not in present]
        for i in range(count):
            tell(boss, "training", present=present, gone=gone, rounds_done=rounds + i)
            boss.step()
        return len(boss._session.jobs)

    boss.step()
    others = list(SITES[:2])
    assert steps(others, count=12) == 2  # once more for its sake, and that is all
    assert [line.split()[0] for line in boss.lines if "its policy" in line] == [SITES[2]]
    boss._session.there = others
    assert steps(others) == 2
    boss._session.there = list(SITES)
    assert steps(others) == 3  # it was away: it may be another now
    boss.step()
    assert steps(list(SITES)) == 3
    assert steps(others) == 4  # it was in the job, and is lost and connected: submitted as ever


# -- commands --------------------------------------------------------------------------------------


def fedmllm(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedmllm.cli", "deploy", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_start_status_stop_resume(tmp_path, mllm) -> None:
    """The commands of docs/deployment.md, on one machine; stopped in the middle, to the bit."""
    config = small("tiny", training={"rounds": 20})
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    run(config, out=tmp_path / "here", mllm=mllm)
    root = tmp_path / "federation"
    made = fedmllm("init", str(file), "--sites", "3", "--min-sites", "3", "--out", str(root))
    assert made.returncode == 0, made.stderr
    try:
        assert "not running" in fedmllm("status", str(root)).stdout
        assert fedmllm("start", str(root)).returncode == 0
        again = fedmllm("start", str(root))
        assert (again.returncode, "runs already" in again.stderr) == (2, True)
        wait_for(root, lambda run: run.get("rounds_done", 0) >= 1)
        assert stop(root)
        assert 1 <= status(root)["runs"]["tiny"]["rounds_done"] < 20
        assert processes(root / "kits" / "client-00", "") == []
        assert processes(root / "kits" / "server", "") == []
        assert fedmllm("stop", str(root)).stdout == "nothing runs\n"
        assert fedmllm("resume", str(root)).returncode == 0
        wait_for(root, lambda run: run.get("doing") == "done")
        assert "tiny: done (20 of 20 rounds done)" in fedmllm("status", str(root)).stdout
    finally:
        stop(root)
    assert (root / "supervisor.log").read_text().count("submitted tiny") == 2
    assert same(root / "kits" / "server" / "runs" / "tiny", tmp_path / "here")


def wait_for(root: Path, met: Callable[[dict[str, Any]], bool]) -> None:
    until = time.monotonic() + 300
    while not met(status(root)["runs"].get("tiny", {})):
        assert time.monotonic() < until, (root / "supervisor.log").read_text()
        time.sleep(0.5)


# -- refusals --------------------------------------------------------------------------------------


OUTSIDE = "nvflare.app_common.np.np_trainer.NPTrainer"  # an executor that works, and is not ours


@pytest.mark.slow
def test_strangers_are_refused(tmp_path) -> None:
    """A site of another authority, one without a certificate, one with another's; code in a job; a
    component that the site's policy lacks."""
    config = small("tiny")
    with federation(tmp_path, config, min_sites=1) as here, ExitStack() as stack:
        stranger = tmp_path / "other"
        make_kits(Plan(config, SITES, port=here.port), stranger)
        here.nodes.kits = [here.kits["server"].resolve(), here.kits["client-00"].resolve()]
        here.nodes.kits.append((stranger / "kits" / "client-01").resolve())
        bare = here.kits["client-02"]
        for file in ("client.crt", "client.key"):
            (bare / "startup" / file).unlink()
        here.nodes.kits.append(bare.resolve())
        boss = Supervisor(here.kits["server"], here.kits["admin"], "tiny", say=here.said.append)
        stack.callback(boss._close)  # its threads would keep this process from ending

        def connected() -> set[str]:
            here.nodes.tend()
            with suppress(Exception):
                return boss._connected()
            return set()

        until(lambda: "client-00" in connected(), every=1.0)
        log = here.kits["server"] / "node.log"
        refused = "authenticated as 'client-00' but claimed endpoint 'client-01'"
        assert refused not in log.read_text()
        stack.enter_context(as_another(here, "client-00", "client-01", tmp_path))
        until(lambda: refused in log.read_text(), every=1.0)
        time.sleep(10)
        assert boss._connected() == {"client-00"}
        assert "New client client-00" in log.read_text()
        assert "New client client-01" not in log.read_text()
        check_tls(here.kits["client-01"], stranger / "kits" / "client-01", here.port)
        check_jobs(here, boss, tmp_path)
        assert not (here.kits["server"] / "runs" / "tiny" / "result.json").exists()


@contextmanager
def as_another(here: Here, who: str, name: str, folder: Path) -> Iterator[None]:
    """A node with `who`'s key and certificate that says it is `name`."""
    kit = shutil.copytree(here.kits[who], folder / "impostor" / who)
    for left in ("pid.fl", "daemon_pid.fl"):
        (kit / left).unlink(missing_ok=True)
    command = [word.replace(f"uid={who}", f"uid={name}") for word in node_command(kit)]
    assert f"uid={name}" in command
    with (kit / "impostor.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=kit, stdout=log, stderr=log, start_new_session=True)
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def check_jobs(here: Here, boss: Supervisor, folder: Path) -> None:
    """Of three jobs with something of others in them the site runs only the one that its policy
    was changed for."""
    log = here.kits["client-00"] / "node.log"

    def outcome(spoil: Callable[[Path], Path], name: str, met: str) -> str:
        """What the site's log says of a job, once the job is over or `met` stands there."""
        start = log.stat().st_size
        job = spoil(write_job(folder / name, boss.sha256, name=name))
        number = boss._admin().submit_job(str(job))

        def new() -> str:
            return log.read_bytes()[start:].decode()

        def over() -> bool:
            return str(boss._admin().get_job_status(number)).startswith("FINISHED")

        until(lambda: over() or met in new(), seconds=120, every=1.0)
        assert str(boss._admin().get_job_status(number)) != "FINISHED:COMPLETED"
        found = new()
        if not over():
            boss._admin().abort_job(number)
            until(over, every=1.0)
        return found

    runs = "invoking task executor NPTrainer"
    server = here.kits["server"] / "node.log"
    start = server.stat().st_size
    outcome(with_code, "with-code", "evil")
    assert "byoc" in server.read_bytes()[start:].decode().lower()
    refused = outcome(with_other_component, "other", runs)
    assert f"Component '{OUTSIDE}'" in refused
    assert "is not in allow_list" in refused
    assert runs not in refused
    resources = here.kits["client-00"] / "local" / "resources.json"
    kept = json.loads(resources.read_text())
    allowed = {**kept, "class_allow_list": [*kept["class_allow_list"], OUTSIDE]}
    resources.write_text(json.dumps(allowed))
    assert runs in outcome(with_other_component, "allowed", runs)  # nothing else stood in its way


@pytest.mark.slow
def test_a_site_whose_policy_forbids_takes_no_part(tmp_path) -> None:
    """The server's policy lets the administrator submit jobs, one site's does not: the others'
    run goes on without it. For its sake the job is submitted once more, and not again and again."""
    config = small("tiny", training={"rounds": 4})
    with federation(tmp_path, config, min_sites=2) as here:
        file = here.kits[SITES[2]] / "local" / "authorization.json"
        policy = json.loads(file.read_text())
        policy["permissions"]["project_admin"]["submit_job"] = "none"
        file.write_text(json.dumps(policy))
        folder = here.run("tiny")
        history = json.loads((folder / "result.json").read_text())["history"]
        assert [line["clients"] for line in history] == [list(SITES[:2])] * 4
        assert not (here.kits[SITES[2]] / "state" / "status.json").exists()
        submitted = [line for line in here.said if line.startswith("submitted")]
        assert len(submitted) == 2
        assert [line.split()[0] for line in here.said if "its policy" in line] == ["client-02"]


def check_tls(kit: Path, stranger: Path, port: int) -> None:
    """The server hears a site with a certificate of its authority, and nobody else."""
    own = kit / "startup"
    assert answer_of(port, own, own) == b"HTTP/1.1"
    assert answer_of(port, own, None) == b""
    assert answer_of(port, own, stranger / "startup") == b""
    with socket.create_connection(("localhost", port)) as plain:
        plain.settimeout(10)
        plain.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert plain.recv(8) == b""


def answer_of(port: int, authority: Path, certificate: Path | None) -> bytes:
    """The first bytes of the server's answer over TLS; none where it ends the connection."""
    context = ssl.create_default_context(cafile=str(authority / "rootCA.pem"))
    if certificate is not None:
        context.load_cert_chain(certificate / "client.crt", certificate / "client.key")
    with (
        socket.create_connection(("localhost", port)) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as opened,
    ):
        opened.settimeout(10)
        try:
            opened.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            return opened.recv(8)
        except (ssl.SSLError, ConnectionError):
            return b""


def with_code(job: Path) -> Path:
    (job / "app" / "custom").mkdir()
    (job / "app" / "custom" / "evil.py").write_text("raise SystemExit\n")
    return job


def with_other_component(job: Path) -> Path:
    file = job / "app" / "config" / "config_fed_client.json"
    found = json.loads(file.read_text())
    found["executors"][0]["executor"] = {"path": OUTSIDE, "args": {}}
    file.write_text(json.dumps(found))
    return job


@pytest.mark.slow
def test_an_administrator_without_the_right_is_refused(tmp_path, mllm, monkeypatch) -> None:
    """A certificate of the right authority whose role may look and do nothing; the run goes on."""
    member = "member@fedmllm.local"
    config = small("tiny", training={"rounds": 6})
    run(config, out=tmp_path / "here", mllm=mllm)

    def project(plan: Plan, made=kits._project) -> dict[str, Any]:
        found = made(plan)
        other = {"name": member, "type": "admin", "org": "server", "role": "member"}
        found["participants"].append(other)
        return found

    monkeypatch.setattr(kits, "_project", project)
    tried: list[str] = []
    with federation(tmp_path, config) as here:

        def meddle(status: dict[str, Any]) -> None:
            if tried or status.get("rounds_done", 0) < 1:
                return
            tried.append(status["job"])
            kit = here.kits[member]
            boss = Supervisor(here.kits["server"], kit, "tiny", say=here.said.append)
            try:
                assert status["job"] in {job["job_id"] for job in boss._admin().list_jobs()}
                again = write_job(tmp_path / "again", boss.sha256, name="again")
                for forbidden in (
                    lambda: boss._admin().submit_job(str(again)),
                    lambda: boss._admin().abort_job(status["job"]),
                    lambda: boss._admin().shutdown("all"),
                ):
                    with pytest.raises(AuthorizationError, match="not authorized"):
                        forbidden()
                with pytest.raises(UserError, match=f"{member} may not do this"):
                    boss.step()
            finally:
                boss._close()

        folder = here.run("tiny", meanwhile=meddle)
        assert tried == [json.loads((folder / "status.json").read_text())["job"]]
        check_undisturbed(folder, tmp_path / "here")


@pytest.mark.slow
def test_nothing_else_is_called(tmp_path) -> None:
    """A whole federation in a network namespace that holds a loopback device and nothing else."""
    alone = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.fail("this system lets nobody make a network namespace: run it where one may")
    name = f"{__file__}::{test_three_sites_over_tls_give_the_weights_of_one_process.__name__}"
    python = [sys.executable, "-m", "pytest", name, "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*alone, *python, f"--basetemp={tmp_path / 'alone'}"],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=TESTS.parent,
    )
    assert done.returncode == 0, done.stdout + done.stderr
