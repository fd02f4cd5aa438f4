"""One federation over several machines, the network left out: numbers, handshake, quorum."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from sites import SITES, SMALL, NearLink, hash_of, make_kits

from fedmllm import manifest
from fedmllm.algorithms import make_algorithm
from fedmllm.algorithms.base import ServerState, Update
from fedmllm.config import config_hash, load_config, make_config
from fedmllm.data import load_dataset
from fedmllm.errors import MemoryRanOutError, UserError
from fedmllm.experiment import load_shapes, make_manifest, run
from fedmllm.export import export
from fedmllm.federation import cohort_of, run_round
from fedmllm.report import load_results
from fedmllm.sites import agreed, handshake, settings, wire
from fedmllm.sites.central import NetworkRunner, Reply
from fedmllm.sites.profiles import Profiles
from fedmllm.sites.release import check_release
from fedmllm.sites.serving import serve
from fedmllm.sites.settings import Reveal
from fedmllm.sites.site import Site
from fedmllm.sites.trainer import Trainer, TrainerError, answered
from fedmllm.sites.wire import Message


@pytest.fixture
def shared_model(monkeypatch, mllm):
    """Every site and the server use one loaded base; each sets the adapter it needs."""
    monkeypatch.setattr("fedmllm.sites.site.load_model", lambda config: mllm)
    monkeypatch.setattr("fedmllm.sites.serving.load_model", lambda config: mllm)
    return mllm


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def experiment(**change: Any) -> dict[str, Any]:
    raw = {"name": "x", **copy.deepcopy(SMALL)}
    for section, values in change.items():
        raw[section] = {**raw.get(section, {}), **values} if isinstance(values, dict) else values
    return raw


def change_settings(kit: Path, **facts: Any) -> None:
    file = kit / settings.FILE
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **facts}))


# -- the same numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "algorithm",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in ("fedavg", "fedadam")), "scaffold"],
)
def test_sites_give_the_weights_of_one_process(tmp_path, shared_model, algorithm: str) -> None:
    raw = experiment(algorithm=algorithm, evaluation={"held_out": 0.25}, training={"rounds": 2})
    kits = make_kits(tmp_path, raw)
    found = serve(kits["server"], hash_of(kits["server"]), NearLink(kits, tmp_path))
    here = run(
        load_config(kits["server"] / "experiments" / "x.yaml"),
        out=tmp_path / "here",
        mllm=shared_model,
    )
    there = kits["server"] / "runs" / "x"
    assert same(weights(there), weights(tmp_path / "here"))
    assert found["metrics"] == here["metrics"]
    assert json.dumps(found["held_out"]) == json.dumps(here["held_out"])  # NaN is NaN
    assert found["config_sha256"] == here["config_sha256"]
    for ours, theirs in zip(found["history"], here["history"], strict=True):
        for key in ("round", "loss", "lr", "clients", "bytes_up", "bytes_down"):
            assert ours[key] == theirs[key], key
    status = json.loads((there / "status.json").read_text())
    assert (status["doing"], status["rounds_done"]) == ("done", 2)
    assert load_results([there])[1] == []
    memories = {path.name for path in kits["client-01"].glob("state/*/memory-*")}
    kept = {"memory-000001.safetensors", "memory-000002.safetensors"}
    assert memories == (kept if algorithm == "scaffold" else set())


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, shared_model) -> None:
    """Stopped in round 3, when one site has trained it already and keeps a memory of it."""
    raw = experiment(algorithm="scaffold", training={"rounds": 3})
    kits = make_kits(tmp_path, raw)

    class StopError(Exception):
        pass

    def stop(site: str, task: str, message: Message) -> Message:
        if task == "train" and message.facts["round"] == 2 and site == SITES[1]:
            raise StopError
        return message

    with pytest.raises(StopError):
        serve(kits["server"], hash_of(kits["server"]), NearLink(kits, tmp_path, stop))
    assert list(kits[SITES[2]].glob("state/*/memory-000003.safetensors"))
    told: list[dict[str, Any]] = []

    def look(site: str, task: str, message: Message) -> Message:
        told.append(json.loads((kits["server"] / "runs" / "x" / "status.json").read_text()))
        return message

    found = serve(kits["server"], hash_of(kits["server"]), NearLink(kits, tmp_path, look))
    assert (told[0]["doing"], told[0]["rounds_done"]) == ("waiting for sites", 2)
    assert found["time"]["resumed"]
    config = load_config(kits["server"] / "experiments" / "x.yaml")
    run(config, out=tmp_path / "here", mllm=shared_model)
    assert same(weights(kits["server"] / "runs" / "x"), weights(tmp_path / "here"))
    # a site that lost what it kept is told so, and not trained from zeros
    site = Site(kits[SITES[0]], hash_of(kits["server"]))
    state = ServerState(4, shared_model.get_adapter(), {"control": shared_model.get_adapter()})
    facts = {"run": "other", "lr": 0.1, "clients": 3, "since": 4}
    with pytest.raises(UserError, match=r"has lost what it kept from round 4"):
        site.train(wire.pack_state(state, ("control",), facts))


def test_what_a_site_keeps_of_late_rounds_pushes_nothing_out_that_is_needed(
    tmp_path, shared_model
) -> None:
    """The server's state builds on round 1 while four later ones come too late; then on the last
    of them, and the first may go."""
    kits = make_kits(tmp_path, experiment(algorithm="scaffold"))
    site = Site(kits[SITES[0]], hash_of(kits["server"]))
    params = shared_model.get_adapter()

    def train(round_: int, since: int) -> list[str]:
        state = ServerState(round_ - 1, params, {"control": params})
        facts = {"run": "r", "lr": 0.0, "clients": 3, "since": since}
        site.train(wire.pack_state(state, ("control",), facts))
        found = kits[SITES[0]].glob("state/r/memory-*.safetensors")
        return sorted(file.stem[-1] for file in found)

    train(1, 0)
    for late in (2, 3, 4, 5):
        kept = train(late, 1)
    assert kept == ["1", "3", "4", "5"]
    assert train(6, 5) == ["4", "5", "6"]


def test_sites_with_files_of_their_own(tmp_path, shared_model, monkeypatch) -> None:
    """Each holds one conversation file; the server holds the test file. As in one process."""
    whole = make_config(experiment())
    data = load_dataset(**whole.data)
    export(make_manifest(whole, data), data, tmp_path / "all")
    task = {"task": "choice", "classes": list(data.task.classes), "question": data.task.question}
    own = {"name": "conversations", "root": str(tmp_path / "all"), "metric": "auc", **task}
    raw = {**experiment(), "data": own}
    kits = make_kits(tmp_path, raw, server={"data": {"file": "../all/test.json"}})
    for name in SITES:
        folder = kits[name] / "data"
        folder.mkdir()
        shutil.copy(tmp_path / "all" / "parties" / f"{name}.json", folder)
        shutil.copytree(tmp_path / "all" / "images", folder / "images")
        change_settings(kits[name], data={"file": f"data/{name}.json"})
    found = serve(kits["server"], hash_of(kits["server"]), NearLink(kits, tmp_path))
    here = run(make_config(raw), out=tmp_path / "here", mllm=shared_model)
    assert same(weights(kits["server"] / "runs" / "x"), weights(tmp_path / "here"))
    assert found["metrics"] == here["metrics"]
    # without a test file the server does without, and without weights: the task is the sites'
    change_settings(kits["server"], data={"none": True})
    shutil.rmtree(kits["server"] / "runs")
    monkeypatch.setattr("fedmllm.sites.serving.load_model", lambda config: pytest.fail("loaded"))
    found = serve(kits["server"], hash_of(kits["server"]), NearLink(kits, tmp_path))
    assert same(weights(kits["server"] / "runs" / "x"), weights(tmp_path / "here"))
    assert (found["metrics"], found["task"]) == ({}, here["task"])
    assert found["parameters"] == here["parameters"]
    full = experiment(trained={"name": "paper", "connector": "full"})
    assert load_shapes(make_config(full)) is None  # its copy starts from the base's weights


def test_a_site_may_hide_its_counts_and_metrics(tmp_path, shared_model) -> None:
    """Then all weigh the same, whatever they hold: the run of fedavg with uniform weights."""
    raw = experiment(partition={"name": "dirichlet"}, evaluation={"held_out": 0.25})
    kits = make_kits(tmp_path, raw)
    hidden = {"samples": False, "metrics": False}
    change_settings(kits[SITES[1]], reveal=hidden)
    link = NearLink(kits, tmp_path)
    found = serve(kits["server"], hash_of(kits["server"]), link)
    uniform = experiment(
        partition={"name": "dirichlet"}, algorithm={"name": "fedavg", "weighting": "uniform"}
    )
    uniform["evaluation"] = raw["evaluation"]
    here = run(make_config(uniform), out=tmp_path / "here", mllm=shared_model)
    assert same(weights(kits["server"] / "runs" / "x"), weights(tmp_path / "here"))
    assert found["network"]["weighted"] == "uniform"
    assert found["network"]["samples"][SITES[1]] is None
    assert set(found["held_out"]["per_client"]) == {SITES[0], SITES[2]}
    shown = [line["loss"] for line in here["history"]]
    assert [line["loss"] for line in found["history"]] != shown  # the mean over those that tell
    for site, _, message in link.came:
        if site == SITES[1]:
            check_release(message, Reveal(**hidden))
            told = json.dumps(message.facts)
            assert '"samples": null' in told or "samples" not in told.replace("num_samples", "")


# -- the handshake -------------------------------------------------------------------------------


def refusal(kits: Mapping[str, Path], tmp_path: Path) -> str:
    """Serve until the refusal; nobody has trained."""
    link = NearLink(kits, tmp_path)
    with pytest.raises(UserError, match="were refused") as found:
        serve(kits["server"], hash_of(kits["server"]), link)
    assert not any(task == "train" for _, task, _ in link.sent)
    status = json.loads((kits["server"] / "runs" / "x" / "status.json").read_text())
    assert status["doing"] == "stopped"
    assert str(found.value) == status["error"]
    told = [message.facts["why"] for _, task, message in link.sent if task == "refused"]
    assert len(told) == 1
    assert told[0] in str(found.value)  # both sides read the same words
    return told[0]


def test_refused_before_any_training(tmp_path, shared_model, monkeypatch) -> None:
    def kits_of(name: str) -> dict[str, Path]:
        return make_kits(tmp_path / name, experiment())

    kits = kits_of("experiment")
    file = kits[SITES[1]] / "experiments" / "x.yaml"
    file.write_text(yaml.safe_dump(experiment(seed=1)))
    assert "has not agreed to experiment" in refusal(kits, tmp_path)

    kits = kits_of("party")
    change_settings(kits[SITES[1]], name="client-07")
    assert "another party's" in refusal(kits, tmp_path)

    kits = kits_of("manifest")
    other = make_config(experiment(seed=3))
    theirs = make_manifest(other, load_dataset(**other.data))
    manifest.save(theirs, kits[SITES[1]] / "manifest.json")
    change_settings(kits[SITES[1]], data={"manifest": "manifest.json"})
    assert "is not of the data there" in refusal(kits, tmp_path)
    ours = make_config(experiment())
    manifest.save(make_manifest(ours, load_dataset(**ours.data)), kits[SITES[1]] / "manifest.json")
    shutil.rmtree(kits["server"] / "runs")
    serve(kits["server"], hash_of(kits["server"]), NearLink(kits, tmp_path))

    for fact, words in {
        "protocol": "protocol: the server speaks 1",
        "base_sha256": "base model: the server has",
        "tokenizer_sha256": "tokenizer: the server has",
        "layout": "adapter: 1 tensors are with one of the two only, e.g. more",
        "samples": "samples: the site has 0",
        "manifest_sha256": "manifest: the server has",
    }.items():
        kits = kits_of(fact)
        hello = Site.hello

        def lie(self: Site, server: Any, fact: str = fact, hello: Any = hello) -> Message:
            facts = dict(hello(self, server).facts)
            if self.name == SITES[1]:
                facts[fact] = {
                    "protocol": 2,
                    "samples": 0,
                    "layout": {**facts["layout"], "more": [1]},
                }.get(fact, "0" * 64)
            return Message(facts=facts)

        with monkeypatch.context() as patch:
            patch.setattr(Site, "hello", lie)
            assert words in refusal(kits, tmp_path)


def test_the_site_finds_the_same_differences_itself(tmp_path, shared_model) -> None:
    kits = make_kits(tmp_path, experiment())
    site = Site(kits[SITES[0]], hash_of(kits["server"]))
    facts = dict(site.hello({}).facts)
    assert facts["problems"][0].startswith("protocol")
    server = {key: facts[key] for key in facts if key not in ("samples", "problems")}
    assert site.hello(server).facts["problems"] == []
    shapes = dict(facts["layout"])
    name = next(iter(shapes))
    other = {**server, "layout": {**shapes, name: [4, 4]}, "base_sha256": "f" * 64}
    problems = site.hello(other).facts["problems"]
    assert len(problems) == 2
    assert problems[0].startswith("base model: the server has ffffffffffff, the site ")
    assert f"{name} is [4, 4] at the server, {shapes[name]} at the site" in problems[1]
    assert handshake.differences(other, facts) == problems


def test_an_empty_file_and_a_wrong_one_tell_the_server_nothing_of_them(tmp_path) -> None:
    """The child's own words stay at the site; the server reads that there is a reason."""
    own = {"name": "conversations", "root": "nowhere", "task": "open"}
    kits = make_kits(tmp_path, {**experiment(), "data": own})
    kit = kits[SITES[0]]
    (kit / "data").mkdir()
    (kit / "data" / f"{SITES[0]}.json").write_text("[]")
    change_settings(kit, data={"file": f"data/{SITES[0]}.json"})
    site, reply = answered("take part", lambda: Site(kit, hash_of(kit)))
    assert site is None
    assert reply["final"]
    assert "the list is empty" in reply["error"]
    assert reply["told"] == "cannot take part: the reason stands in the site's log"
    _, reply = answered("train", lambda: {}["Mrs Miller"])
    assert "Mrs Miller" in reply["error"]
    assert reply["told"] == "KeyError, so it cannot train: the reason stands in the site's log"
    assert not reply["final"]

    def train() -> None:
        raise MemoryRanOutError("memory ran out")  # there may be more another time

    _, reply = answered("train", train)
    assert reply["error"] == "memory ran out"
    assert not reply["final"]


# -- rounds --------------------------------------------------------------------------------------

THETA = {"w": torch.tensor([1.0, 2.0])}


class FakeLink:
    """Sites that do arithmetic: site k answers k + round, or what `script` says.

    script: (site, task, how often asked) -> Message, an error's text, or None for no answer yet.
    Time passes by `tick` with every empty receive.
    """

    def __init__(self, script=None, tick: float = 1.0) -> None:
        self.script = script or (lambda site, task, times: ...)
        self.now, self.tick = 0.0, tick
        self.queue: list[tuple[str, str, str, Message, int]] = []
        self.times: dict[tuple[str, str], int] = {}
        self.lost: set[str] = set()
        self.cancelled: list[str] = []
        self.count = 0

    def clock(self) -> float:
        return self.now

    def send(self, site: str, task: str, message: Message) -> str:
        self.count += 1
        times = self.times[site, task] = self.times.get((site, task), 0) + 1
        self.queue.append((str(self.count), site, task, message, times))
        return str(self.count)

    def cancel(self, ticket: str) -> None:
        self.cancelled += [item[1] for item in self.queue if item[0] == ticket]
        self.queue = [item for item in self.queue if item[0] != ticket]

    def gone(self) -> set[str]:
        return set(self.lost)

    def receive(self, seconds: float) -> Reply | None:
        for item in self.queue:
            ticket, site, task, message, times = item
            answer = self.script(site, task, times)
            if answer is None or site in self.lost:
                continue
            self.queue.remove(item)
            if isinstance(answer, str):
                return Reply(ticket, site, error=answer)
            return Reply(ticket, site, self.usual(site, task, message) if answer is ... else answer)
        self.now += self.tick if seconds else 0.0
        return None

    def usual(self, site: str, task: str, message: Message) -> Message:
        if task == "hello":
            return Message(facts=FACTS)
        if task == "refused":
            return Message()
        number = int(site[-2:])
        delta = {"w": torch.full((2,), number + 1.0)}
        update = wire.pack_update(Update(site, number + 1, delta, metrics={"loss": float(number)}))
        return Message(update.tensors, {"update": update.facts, "memory": False})


FACTS = {
    **handshake.common("0"),
    "config_sha256": "c",
    "base_sha256": "b",
    "tokenizer_sha256": "t",
    "layout": {"w": [2]},
    "manifest_sha256": None,
    "samples": 1,
    "held_out": False,
    "task": {"name": "t", "kind": "open", "metric": "accuracy", "classes": [], "question": ""},
    "reveal": {"samples": True, "metrics": True},
}


def network(link: FakeLink, **change: Any) -> tuple[NetworkRunner, list[Mapping[str, Any]]]:
    told: list[Mapping[str, Any]] = []
    options = {"min_sites": 2, "deadline": 100.0, "hello_deadline": 50.0, **change}
    runner = NetworkRunner(link, SITES, FACTS, "run", tell=told.append, clock=link.clock, **options)
    return runner, told


def one_round(runner: NetworkRunner, cohort=SITES):
    algorithm = make_algorithm("fedavg", num_clients=3)
    return run_round(runner, algorithm, algorithm.init(THETA), cohort, lr=0.5)


def test_a_round_by_hand() -> None:
    """Sites 0, 1, 2 send 1, 2, 3 with weights 1, 2, 3: (1 + 4 + 9) / 6 = 2.3333."""
    runner, told = network(FakeLink())
    runner.greet_all()
    assert list(runner.ready(SITES)) == list(SITES)
    state, record = one_round(runner)
    assert state.params["w"].tolist() == pytest.approx([1 + 14 / 6, 2 + 14 / 6])
    assert (record.cohort, record.missing, record.loss) == (SITES, (), 1.0)
    assert {line["doing"] for line in told} == {"waiting for sites", "training"}


def test_a_slow_site_is_dropped_and_taken_back() -> None:
    """Round 1 closes at its deadline without it; round 2 does not wait; then it answers."""
    slow = {"train": True, "hello": True}

    def script(site: str, task: str, times: int):
        if site == SITES[2] and slow.get(task) and (task == "train" or times > 1):
            return None
        return ...

    link = FakeLink(script)
    runner, _ = network(link)
    runner.greet_all()
    state, record = one_round(runner)
    assert record.cohort == SITES[:2]
    assert record.missing == (SITES[2],)
    assert 100 < link.now < 105
    assert state.params["w"].tolist() == pytest.approx([1 + 5 / 3, 2 + 5 / 3])
    assert record.loss == 0.5
    assert SITES[2] in link.cancelled
    assert list(runner.ready(SITES)) == list(SITES[:2])
    before = link.now
    one_round(runner, SITES[:2])
    assert link.now == before  # nobody waited
    slow.clear()
    for _ in range(3):
        runner.ready(SITES)
    assert list(runner.ready(SITES)) == list(SITES)


def test_a_crash_of_training_costs_that_round_only() -> None:
    link = FakeLink(lambda site, task, times: "died" if (site, times) == (SITES[0], 1) else ...)
    link.script = lambda site, task, times: (
        "died" if (site, task, times) == (SITES[0], "train", 1) else ...
    )
    runner, told = network(link)
    runner.greet_all()
    _, record = one_round(runner)
    assert (record.cohort, record.missing) == (SITES[1:], (SITES[0],))
    assert link.now < 5
    assert any(line.get("failed") == {SITES[0]: "died"} for line in told)
    assert list(runner.ready(SITES)) == list(SITES)
    assert one_round(runner)[1].missing == ()


def test_a_round_without_enough_sites_waits_and_goes_on() -> None:
    """Two of three fail: past the deadline it waits, asks them again, and closes with two."""
    link = FakeLink(
        lambda site, task, times: (
            "out of memory" if task == "train" and site != SITES[0] and times < 4 else ...
        )
    )
    runner, told = network(link, deadline=20.0)
    runner.greet_all()
    _, record = one_round(runner)
    assert len(record.cohort) >= 2
    assert link.now > 75  # 5, 15 and 60 seconds of pause
    waiting = [line for line in told if line["doing"] == "waiting for enough sites"]
    assert waiting
    assert set(waiting[-1]["failed"]) <= set(SITES[1:])
    assert waiting[0]["delivered"] == [SITES[0]]


def test_a_lost_site_is_not_waited_for_and_two_lost_ones_are() -> None:
    link = FakeLink()
    runner, told = network(link)
    runner.greet_all()
    link.lost = {SITES[1]}
    _, record = one_round(runner)
    assert record.missing == (SITES[1],)
    assert link.now < 5
    assert list(runner.ready(SITES)) == [SITES[0], SITES[2]]
    link.lost = {SITES[1], SITES[2]}

    def come_back(status: Mapping[str, Any]) -> None:
        told.append(status)
        if link.now > 500:
            link.lost = set()

    runner.tell = come_back
    assert list(runner.ready(SITES)) != []
    assert link.now > 500
    assert told[-1]["doing"] == "waiting for sites"


_SOME = {"client": SITES[1], "num_samples": 1, "delta": {"w": [1.0, 1.0]}}


def test_a_site_that_dies_while_it_is_greeted_is_greeted_when_it_is_back() -> None:
    """Its greeting is lost with its process, and no reply says so."""
    slow = True

    def script(site: str, task: str, times: int) -> Any:
        late = site == SITES[2] and slow and (task == "train" or times > 1)
        return None if late else ...

    link = FakeLink(script)
    runner, _ = network(link)
    runner.greet_all()
    one_round(runner)
    runner.ready(SITES)  # it is greeted
    link.lost = {SITES[2]}
    link.queue = [item for item in link.queue if item[1] != SITES[2]]
    runner.ready(SITES)
    assert runner.away == {SITES[2]: "its process has ended"}
    link.lost, slow = set(), False
    for _ in range(3):
        runner.ready(SITES)
    assert list(runner.ready(SITES)) == list(SITES)


def test_a_bad_update_is_a_failed_site_and_not_the_end() -> None:
    def packed(**change: Any) -> Message:
        update = replace(Update(SITES[1], 1, {"w": torch.ones(2)}), **change)
        found = wire.pack_update(update)
        return Message(found.tensors, {"update": found.facts})

    bad = {
        "is an update of|sent an update of": packed(client=SITES[0]),
        "claims -1 samples": packed(num_samples=-1),
        "claims 1000000": packed(num_samples=10**400),
        "not finite at w": packed(delta={"w": torch.tensor([1.0, float("nan")])}),
        "has shape": packed(delta={"w": torch.ones(3)}),
        "other tensors": packed(delta={"v": torch.ones(2)}),
        "no update": Message(facts={"hello": 1}),
        "not an update": Message(facts={"update": {"client": SITES[1], "surprise": 1}}),
        "not a tensor's name": Message({"w": torch.ones(2)}, {"update": {}}),
        "finite at w": packed(delta={"w": torch.tensor([1.0, 1e300], dtype=torch.float64)}),
        "has torch.int64 at w, not floats": packed(delta={"w": torch.tensor([1, 2])}),
        "carries extras ['control']": packed(extra={"control": {"w": torch.ones(2)}}),
        "metric loss is 'low'": packed(metrics={"loss": "low"}),
        "metric loss is 1000000": packed(metrics={"loss": 10**400}),
        "metric loss is inf": packed(metrics={"loss": math.inf}),
        "metric loss is nan": packed(metrics={"loss": math.nan}),
        "dictionary update sequence": Message(facts={"update": "x"}),
        "is not iterable": Message(facts={"update": 5}),
        "not a mapping|no attribute": Message(facts={"update": {**_SOME, "metrics": 5}}),
        "not support item assignment": Message(
            {"extra|control|w": torch.ones(2)}, {"update": {**_SOME, "extra": "x"}}
        ),
    }
    for words, message in bad.items():
        link = FakeLink(
            lambda site, task, times, m=message: m if (site, task) == (SITES[1], "train") else ...
        )
        runner, told = network(link)
        runner.greet_all()
        _, record = one_round(runner)
        assert record.missing == (SITES[1],), words
        found = [line["failed"][SITES[1]] for line in told if line.get("failed")]
        assert any(any(w in why for w in words.split("|")) for why in found), (words, found)


def test_numbers_that_only_their_sum_is_too_large_do_not_end_a_run() -> None:
    """Whole numbers that a float holds each; a mean over sites is one of floats."""
    large = {SITES[0]: 10**308, SITES[1]: 10**308, SITES[2]: 0.5}

    def script(site: str, task: str, times: int) -> Any:
        if task != "train":
            return ...
        told = {"loss": 1.0, "term": large[site]}
        found = wire.pack_update(Update(site, 1, {"w": torch.ones(2)}, metrics=told))
        return Message(found.tensors, {"update": found.facts})

    runner, _ = network(FakeLink(script))
    runner.greet_all()
    assert one_round(runner)[1].cohort == SITES


def test_extras_that_an_algorithm_asks_for_are_checked() -> None:
    """SCAFFOLD's controls: there, and of the adapter's shapes; else that site has failed."""
    algorithm = make_algorithm("scaffold", num_clients=3)
    shapes = {"w": torch.ones(2)}
    for extra, words in (
        ({"control": {"w": torch.ones(3)}}, "has shape (3,) at w, but (2,)"),
        ({"control": {"v": torch.ones(2)}}, "missing: w; not expected: v"),
        ({}, "carries extras [], and this run's are ['control']"),
        ({"control": shapes}, ""),
    ):

        def script(site: str, task: str, times: int, extra=extra) -> Any:
            if task != "train":
                return ...
            own = {"control": shapes} if site != SITES[1] else extra
            found = wire.pack_update(Update(site, 1, {"w": torch.ones(2)}, own))
            return Message(found.tensors, {"update": found.facts})

        runner, told = network(FakeLink(script))
        runner.greet_all()
        _, record = run_round(runner, algorithm, algorithm.init(THETA), SITES, lr=0.5)
        assert record.missing == ((SITES[1],) if words else ())
        failed = {why for line in told for why in line.get("failed", {}).values()}
        assert any(words in why for why in failed) == bool(words), failed


def test_sites_that_disagree_among_themselves() -> None:
    """The server has no data: the second split and the second task are refused."""
    other = {**FACTS["task"], "name": "u"}
    for fact, value in {"task": other, "manifest_sha256": "m2"}.items():
        first = {**FACTS, "manifest_sha256": "m1"}
        link = FakeLink(
            lambda site, task, times, f=fact, v=value, g=first: (
                Message(facts={**g, f: v} if site == SITES[2] else g) if task == "hello" else ...
            )
        )
        runner, _ = network(link)
        runner.greet_all()
        assert list(runner.refused) == [SITES[2]]
        assert list(runner.ready(SITES)) == list(SITES[:2])
        with pytest.raises(UserError, match="1 of 3 sites were refused, and a round needs 3"):
            network(link, min_sites=3)[0].greet_all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"problems": 5}, "problems: 5 is no list"),
        ({"layout": {"w": 7}}, "adapter: w is [2] at the server, 7 at the site"),
        ({"layout": {"w": [2.0]}}, "adapter: w is [2] at the server, [2.0] at the site"),
        ({"reveal": [1]}, "reveal: [1] does not say yes or no"),
        ({"reveal": {"samples": True}}, "reveal: {'samples': True} does not say yes or no"),
        ({"held_out": "all"}, "held_out: the site does not say"),
        ({"manifest_sha256": ...}, "manifest: the site states no hash"),
        ({"samples": ...}, "samples: the site does not say"),
        ({"samples": True}, "samples: the site has True"),
        ({"task": ...}, "task: the site states none"),
        ({"task": {"name": "t"}}, "task: ['name'] are not the texts"),
        ({"task": {**FACTS["task"], "classes": 3}}, "task: classes are 3"),
        ({"task": {**FACTS["task"], "kind": 3}}, "are not the texts"),
    ],
)
@pytest.mark.parametrize("bad", SITES[:2])
def test_a_hello_in_a_wrong_form_is_a_refused_site_and_not_the_end(bad, change, words) -> None:
    """Whether it is the first that answers, or is compared with another."""
    odd = {key: value for key, value in {**FACTS, **change}.items() if value is not ...}
    link = FakeLink(
        lambda site, task, times: Message(facts=odd) if (site, task) == (bad, "hello") else ...
    )
    runner, _ = network(link, weighted=True)
    runner.greet_all()
    assert list(runner.refused) == [bad]
    assert words in runner.refused[bad]
    assert one_round(runner, runner.ready(SITES))[1].missing == ()


@pytest.mark.parametrize(("fetches", "waited"), [(4.0, 4.0), (math.inf, 12.0), (None, 1.0)])
def test_a_refused_site_has_time_to_hear_why_before_the_job_ends(fetches, waited) -> None:
    """It fetches the reason after four seconds; never, then the job ends after ten; or its process
    has ended. Another site that is wrong too, and answers after two, is judged and has ten, too."""

    def script(site: str, task: str, times: int):
        if task == "hello" and site != SITES[0]:
            if site == SITES[2] and link.now < 2:
                return None
            return Message(facts={**FACTS, "base_sha256": site})
        if task == "refused" and site == SITES[1] and fetches is None:
            link.lost = {site}
        return None if task == "refused" and link.now < (fetches or 0) else ...

    link = FakeLink(script)
    runner, told = network(link, min_sites=3)
    with pytest.raises(UserError, match="were refused, and a round needs 3") as found:
        runner.greet_all()
    assert link.now == waited
    assert "telling sites why they are refused" in {line["doing"] for line in told}
    assert (f"{SITES[2]}: base model" in str(found.value)) == (fetches is not None)


def test_a_site_that_gives_no_scores_in_the_end_is_named() -> None:
    """One answers, one is late, one fails, and one that was away is not asked at all."""
    holds = {**FACTS, "held_out": True}
    scores = Message(facts={"metrics": {"accuracy": 0.5}})

    def answer(site: str, what: Any):
        def script(name: str, task: str, times: int):
            if task == "hello":
                return Message(facts=holds)
            return (what if name == site else scores) if task == "evaluate" else ...

        return script

    for what, why in [
        (None, "did not answer within 100 s"),
        ("out of memory", "out of memory"),
        (Message(facts={"metrics": {}}), "sent no scores"),
        (Message(facts={"metrics": {"accuracy": "high"}}), "sent no scores"),
        (Message(facts={"metrics": {"accuracy": 10**400}}), "sent no scores"),
        (Message(facts={"metrics": {"accuracy": math.inf}}), "sent no scores"),
    ]:
        runner, _ = network(FakeLink(answer(SITES[1], what)))
        runner.greet_all()
        others = {SITES[0]: {"accuracy": 0.5}, SITES[2]: {"accuracy": 0.5}}
        assert runner.evaluate(THETA) == (others, {SITES[1]: why})
    link = FakeLink(answer("", None))
    runner, _ = network(link)
    runner.greet_all()
    link.lost = {SITES[1]}
    runner.ready(SITES)
    found, missing = runner.evaluate(THETA)
    assert (list(found), missing) == ([SITES[0], SITES[2]], {SITES[1]: "its process has ended"})
    assert ("client-01", "evaluate") not in link.times
    link = FakeLink(answer(SITES[1], Message(facts={"metrics": {}})))
    runner, _ = network(link)
    runner.greet_all()
    hidden = {**holds, "reveal": {"samples": True, "metrics": False}}
    runner.facts[SITES[1]] = hidden  # it hides them: that is no failure
    assert runner.evaluate(THETA)[1] == {}


# -- messages, settings, the child ---------------------------------------------------------------


def test_updates_travel_to_the_bit(tmp_path) -> None:
    delta = {"a.b": torch.randn(3, 2).bfloat16(), "c": torch.randn(4)}
    extra = {"control": {"c": torch.ones(2)}, "none": {}}
    update = Update("k", 5, delta, extra, {"loss": 0.1 + 0.2})
    wire.write(wire.pack_update(update), tmp_path / "m")
    found = wire.unpack_update(wire.read(tmp_path / "m"))
    assert (found.client, found.num_samples, found.metrics) == ("k", 5, {"loss": 0.1 + 0.2})
    assert same(found.delta, delta)
    assert found.delta["a.b"].dtype == torch.bfloat16
    assert same(found.extra["control"], extra["control"])
    assert found.extra["none"] == {}
    state = ServerState(3, {"w": torch.ones(2)}, {"m": {"w": torch.zeros(2)}, "v": {}})
    sent = wire.unpack_state(wire.pack_state(state, ("m",), {"lr": 1}))
    assert (sent.round, list(sent.slots)) == (3, ["m"])
    (tmp_path / "m").write_bytes(b"not a message")
    with pytest.raises(UserError, match="is not a message"):
        wire.read(tmp_path / "m")


def test_numbers_of_a_site() -> None:
    """A score may have no value (NaN); what no float holds is no number."""
    told = {"a": 0.5, "b": 1, "c": True, "d": "1", "e": 10**400, "f": -math.inf, "g": math.nan}
    found = wire.numbers(told)
    assert list(found) == ["a", "b", "g"]
    assert (found["a"], found["b"], math.isnan(found["g"])) == (0.5, 1.0, True)
    assert wire.numbers([1.0]) == {}
    for facts in ("[1]", "[" * 10**5):
        header = json.dumps({"__metadata__": {"facts": facts}}).encode()
        with pytest.raises(UserError, match="are not a message"):
            wire.from_bytes(len(header).to_bytes(8, "little") + header)


def test_what_may_not_leave() -> None:
    update = wire.pack_update(Update("k", 5, {"w": torch.ones(2)}, metrics={"loss": 0.5}))
    good = Message(update.tensors, {"update": update.facts, "memory": False})
    check_release(good, Reveal())
    profile = {"modalities": [1, 2, 3, 4], "labels": [5, 5]}
    check_release(Message(facts={"profile": profile}), Reveal(metrics=False))
    for message, reveal, words in [
        (good, Reveal(samples=False), "number of samples"),
        (good, Reveal(metrics=False), "metrics, which"),
        (Message(good.tensors, {**good.facts, "rows": 3}), Reveal(), "not those of an answer"),
        (Message({"pixels||w": torch.ones(2)}, good.facts), Reveal(), "not a tensor of an update"),
        (Message(good.tensors, {}), Reveal(), "belong to no update"),
        (Message(facts={"metrics": {"auc": "high"}}), Reveal(), "something else than numbers"),
        (Message(facts={"profile": profile}), Reveal(samples=False), "a profile, which counts"),
        (Message(facts={"profile": {**profile, "ages": [7]}}), Reveal(), "else than counts"),
        (Message(facts={"profile": {**profile, "labels": ["Mrs"]}}), Reveal(), "else than counts"),
        (Message(facts={"profile": {**profile, "labels": 3}}), Reveal(), "else than counts"),
        (Message(facts={"profile": "words"}), Reveal(), "else than counts"),
        (
            Message(good.tensors, {"update": {**update.facts, "extra": {"a": {"b": "words"}}}}),
            Reveal(),
            "extras of an update that are not tensors",
        ),
        (
            Message(good.tensors, {"update": {**update.facts, "note": "Mrs Miller"}}),
            Reveal(),
            "note hold something else than numbers",
        ),
    ]:
        with pytest.raises(UserError, match=words):
            check_release(message, reveal)


STRATEGY = {"mu": 0.5, "weight": "scenario", "prototypes": 0.5, "distillation": 0.5}


def test_strategies_give_the_weights_of_one_process(tmp_path, shared_model) -> None:
    """What they add to updates and broadcasts travels like the rest."""
    hybrid = {"name": "hybrid", "p": 0.7}
    raw = experiment(algorithm="fedadam", strategy=STRATEGY, scenario=hybrid, prompt="agnostic")
    kits = make_kits(tmp_path, raw)
    found = serve(kits["server"], hash_of(kits["server"]), NearLink(kits, tmp_path))
    file = kits["server"] / "experiments" / "x.yaml"
    here = run(load_config(file), out=tmp_path / "here", mllm=shared_model)
    there = kits["server"] / "runs" / "x"
    assert same(weights(there), weights(tmp_path / "here"))
    for ours, theirs in zip(found["history"], here["history"], strict=True):
        for key in ("loss", "bytes_up", "bytes_down", "measured"):
            assert ours[key] == theirs[key], key


WEIGHTED = {"mu": 100.0, "w": 1.0, "weight": "profile"}
OF_PROFILES = {
    "weight": WEIGHTED,
    "aggregation": {"aggregation": 5.0},
    "sampling": {"sampling": -5.0},
    "noise": {**WEIGHTED, "aggregation": -5.0, "epsilon": 0.5},
}


def of_profiles(option: str) -> dict[str, Any]:
    """An experiment whose parties differ in what they hold."""
    return experiment(
        strategy=OF_PROFILES[option],
        scenario={"name": "hybrid", "p": 0.5},
        training={"rounds": 2, "clients_per_round": 2},
    )


@pytest.mark.parametrize("option", OF_PROFILES)
def test_profiles_give_the_weights_of_one_process(tmp_path, shared_model, option: str) -> None:
    raw = of_profiles(option)
    kits = make_kits(tmp_path, raw, server={"min_sites": 2})
    for name in SITES:
        change_settings(kits[name], noise="seed")
    link = NearLink(kits, tmp_path)
    found = serve(kits["server"], hash_of(kits["server"]), link)
    here = run(make_config(raw), out=tmp_path / "here", mllm=shared_model)
    assert same(weights(kits["server"] / "runs" / "x"), weights(tmp_path / "here"))
    assert found["heterogeneity"] == here["heterogeneity"]
    assert found["bytes"] == here["bytes"]
    assert [line["clients"] for line in found["history"]] == [
        line["clients"] for line in here["history"]
    ]
    told = {s: m.facts.get("weight") for s, task, m in link.sent if task == "train"}
    shown = {party["id"]: party for party in here["heterogeneity"]["clients"]}
    assert told == {s: shown[s]["weight"] if "mu" in OF_PROFILES[option] else None for s in told}
    if option == "sampling":  # chosen by chance alone, other two train
        unweighted = cohort_of(SITES, 2, seed=0, round_=1)
        assert found["history"][0]["clients"] != unweighted
    key = {"aggregation": "scale", "sampling": "chance"}.get(option, "divergence")
    assert len({party[key] for party in shown.values()}) == 3  # so that it matters whose is whose


def test_profiles_hold_for_the_run(tmp_path, shared_model) -> None:
    """The server goes on with those that it has, and a site whose data changed is refused."""
    raw = of_profiles("aggregation")
    kits = make_kits(tmp_path, raw, server={"min_sites": 2})

    def stop(site: str, task: str, message: Message) -> Message:
        if task == "train" and message.facts["round"] == 1:
            raise KeyboardInterrupt
        return message

    sha256 = hash_of(kits["server"])
    with pytest.raises(KeyboardInterrupt):
        serve(kits["server"], sha256, NearLink(kits, tmp_path, stop))
    file = kits["server"] / "runs" / "x" / "network.json"
    kept = json.loads(file.read_text())
    assert set(kept["profiles"]) == set(SITES)
    here = run(make_config(raw), out=tmp_path / "here", mllm=shared_model)
    missing = (set(SITES) - set(here["history"][1]["clients"])).pop()
    answers = NearLink(kits, tmp_path, lambda s, t, m: None if s == missing else m)
    answers.lost = {missing}  # it is away from now on, and counts all the same
    found = serve(kits["server"], sha256, answers)
    assert found["history"][1]["clients"] == here["history"][1]["clients"]
    assert same(weights(kits["server"] / "runs" / "x"), weights(tmp_path / "here"))
    profiles = Profiles(make_config(raw), file)
    hello = Site(kits[SITES[0]], sha256).hello({}).facts
    assert profiles.take(SITES[0], hello) == []
    other = {**hello, "profile": kept["profiles"][SITES[1]]}
    assert "the site's data changed" in profiles.take(SITES[0], other)[0]
    assert json.loads(file.read_text()) == kept


def test_a_site_that_comes_later_joins_the_profiles(tmp_path) -> None:
    """Two by hand: images only and texts only, each as far from the mean as the other; then one
    of whole samples."""
    file = tmp_path / "network.json"
    file.write_text('{"run": "r"}')
    profiles = Profiles(make_config(of_profiles("weight")), file)
    task = {"classes": ["no", "yes"]}

    def hello(*modalities: int) -> dict[str, Any]:
        return {"task": task, "profile": {"modalities": list(modalities), "labels": [2, 6]}}

    for site, facts in zip(SITES[::-1], (hello(0, 0, 4, 0), hello(0, 8, 0, 0)), strict=False):
        assert profiles.take(site, facts) == []
    assert list(profiles.parties().weights.items()) == [(SITES[1], 1.0), (SITES[2], 1.0)]
    assert profiles.take(SITES[0], hello(5, 0, 0, 0)) == []
    found = Profiles(profiles.config, file).parties()  # as after a kill
    assert list(found.found) == list(SITES)
    # it lacks nothing; its (1, 0, 0) and the mean (1/3, 1/3, 1/3) have the middle (2/3, 1/6, 1/6)
    divergence = (math.log2(3 / 2) + math.log2(1 / 2) / 3 + 2 / 3) / 2
    assert found.weights[SITES[0]] == pytest.approx(divergence)
    assert found.once == (3 * 4 * (4 + 2), 3 * 4)
    assert json.loads(file.read_text())["run"] == "r"


def test_what_is_no_profile_is_refused(tmp_path) -> None:
    file = tmp_path / "network.json"
    file.write_text('{"run": "r"}')
    good = {"modalities": [1, 2, 3, 4], "labels": [1, 2]}
    task = {**FACTS["task"], "classes": ["no", "yes"]}
    for facts, words in [
        ({"task": task}, "profile: none"),
        ({"task": task, "profile": [1, 2]}, "not one"),
        ({"task": task, "profile": {**good, "ages": [1]}}, "not one"),
        ({"task": task, "profile": {**good, "labels": [1]}}, "labels are not 2 counts"),
        ({"task": task, "profile": {**good, "modalities": 3}}, "modalities are not 4 counts"),
        ({"task": task, "profile": {**good, "labels": [1, -1]}}, "not whole numbers from 0"),
        ({"task": task, "profile": {**good, "labels": [1, 2.0]}}, "not whole numbers from 0"),
        ({"task": task, "profile": {**good, "labels": [1, True]}}, "not whole numbers from 0"),
        ({"task": task, "profile": {**good, "labels": [1, 10**400]}}, "not whole numbers from 0"),
        ({"task": None, "profile": good}, "the site states none"),
    ]:
        link = FakeLink(
            lambda site, task, times, f=facts: (
                Message(facts={**FACTS, **f}) if site == SITES[2] and task == "hello" else ...
            )
        )
        runner, _ = network(link)
        runner.accept = lambda site, facts: (
            Profiles(make_config(of_profiles("weight")), file).take(site, facts)
            if site == SITES[2]
            else []
        )
        runner._unlike_others = lambda site, facts: []
        runner.greet_all()
        assert words in runner.refused.get(SITES[2], "")
    assert "profiles" not in json.loads(file.read_text())


def test_noise_on_a_profile_is_drawn_once_in_secret(tmp_path, shared_model, monkeypatch) -> None:
    raw = of_profiles("noise")
    kits = make_kits(tmp_path, raw)
    sha256 = hash_of(kits["server"])
    exact = {
        **OF_PROFILES["noise"],
        "epsilon": None,
    }
    counted = (
        Site(
            make_kits(tmp_path / "exact", {**raw, "strategy": exact})[SITES[0]],
            hash_of(tmp_path / "exact" / "server"),
        )
        .hello({})
        .facts["profile"]
    )
    monkeypatch.setattr("fedmllm.rng.secret_uniform", iter([0.999, 0.0] * 6).__next__)
    first = Site(kits[SITES[0]], sha256).hello({}).facts["profile"]
    # floor(ln(1000) / 0.25) = 27 more of each
    assert first == {name: [n + 27 for n in counts] for name, counts in counted.items()}
    again = Site(kits[SITES[0]], sha256).hello({}).facts["profile"]  # no number is left to draw
    assert again == first
    (kept,) = (kits[SITES[0]] / "state").glob("profile-*.json")
    assert json.loads(kept.read_text()) == first
    kept.write_text("{")
    with pytest.raises(UserError, match="draws the noise on this site's profile a second time"):
        Site(kits[SITES[0]], sha256)


def test_a_weight_that_cannot_be_is_refused(tmp_path, shared_model) -> None:
    kits = make_kits(tmp_path, of_profiles("weight"))
    site = Site(kits[SITES[0]], hash_of(kits["server"]))
    state = ServerState(0, shared_model.get_adapter())
    facts = {"run": "r", "lr": 0.1, "clients": 3, "since": 0}
    for wrong in ({}, *({"weight": each} for each in (1.5, -0.1, float("nan"), "1", True, None))):
        with pytest.raises(UserError, match=r"it is a number from 0 to 1\.0"):
            site.train(wire.pack_state(state, (), {**facts, **wrong}))


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        ({"prototypes": 0.5}, "prototypes count them by class"),
        ({"sampling": 1.0}, "a profile counts them by modality and by label"),
    ],
)
def test_what_would_tell_what_a_site_hides(tmp_path, shared_model, strategy, words) -> None:
    kits = make_kits(tmp_path, experiment(strategy=strategy))
    change_settings(kits[SITES[0]], reveal={"samples": False})
    with pytest.raises(UserError, match=f"client-00 does not reveal how many samples it.*{words}"):
        serve(kits["server"], hash_of(kits["server"]), NearLink(kits, tmp_path))


def test_sites_of_unequal_hardware(tmp_path) -> None:
    """One computes in bfloat16, one takes smaller batches, so more steps; each has a model of its
    own. What they send is float32, and the third's that of equal sites to the bit."""
    raw = experiment(training={"rounds": 1})

    def updates(name: str, **changes: dict[str, Any]) -> tuple[dict[str, Any], NearLink]:
        kits = make_kits(tmp_path / name, raw)
        for site, given in changes.items():
            change_settings(kits[site.replace("_", "-")], settings=given)
        link = NearLink(kits, tmp_path)
        serve(kits["server"], hash_of(kits["server"]), link)
        return {s: m.tensors for s, task, m in link.came if task == "train"}, link

    alike, _ = updates("alike")
    half, batch = {"model.dtype": "bfloat16"}, {"training.batch_size": 2, "training.micro_batch": 1}
    unequal, link = updates("unequal", client_00=half, client_01=batch)
    models = [link.sites[site].session.mllm for site in SITES]
    assert len({id(model) for model in models}) == 3
    assert [next(model.model.parameters()).dtype for model in models] == [
        torch.bfloat16,
        torch.float32,
        torch.float32,
    ]
    assert same(unequal[SITES[2]], alike[SITES[2]])
    assert {value.dtype for sent in unequal.values() for value in sent.values()} == {torch.float32}

    def one(sent: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([sent[name].flatten() for name in sorted(sent)])

    rounded, exact = one(unequal[SITES[0]]), one(alike[SITES[0]])
    assert not torch.equal(rounded, exact)
    assert torch.cosine_similarity(rounded, exact, dim=0) > 0.95
    assert one(unequal[SITES[1]]).norm() > 1.3 * one(alike[SITES[1]]).norm()  # twice the steps
    found = json.loads((link.kits["server"] / "runs" / "x" / "result.json").read_text())
    assert found["history"][0]["clients"] == list(SITES)


def test_settings_of_a_machine(tmp_path) -> None:
    kits = make_kits(tmp_path, experiment())
    kit, file = kits[SITES[0]], kits[SITES[0]] / "experiments" / "x.yaml"
    change_settings(kit, settings={"training.batch_size": 2, "training.micro_batch": 2})
    found = agreed.site_config(kit, settings.load_site(kit), file)
    assert found.training.batch_size == 2
    assert config_hash(load_config(file)) == hash_of(kit)
    for change, words in [
        ({"settings": {"training.lr": 1.0}}, "unknown setting of a machine 'training.lr'"),
        ({"data": {"root": "data"}}, "is drawn and has no root"),
        ({"data": {"file": "x.json"}}, "the experiment's data is memes"),
        ({"data": {"file": "x.json", "root": "y"}}, "file or root, not both"),
        ({"name": "a/b"}, "cannot be called"),
        ({"colour": "red"}, "colour: Extra inputs"),
    ]:
        other = make_kits(tmp_path / words[:8], experiment())[SITES[0]]
        change_settings(other, **change)
        with pytest.raises(UserError, match=words):
            agreed.site_config(other, settings.load_site(other), file)
    kit = make_kits(tmp_path / "local", experiment(topology="local"))[SITES[0]]
    with pytest.raises(UserError, match="has nobody to federate with"):
        agreed.site_config(kit, settings.load_site(kit), kit / "experiments" / "x.yaml")
    kit = make_kits(tmp_path / "fusion", experiment(strategy={"fusion": 1.0}))[SITES[0]]
    with pytest.raises(UserError, match=r"strategy\.fusion works in one process only"):
        agreed.site_config(kit, settings.load_site(kit), kit / "experiments" / "x.yaml")
    change_settings(kits["server"], sites=["b", "a", "c", "a", "b"])
    with pytest.raises(UserError, match="sites: a, b more than once"):
        settings.load_server(kits["server"])
    change_settings(kits["server"], sites=list(SITES), min_sites=4)
    with pytest.raises(UserError, match="min_sites is 4, and there are 3 sites"):
        settings.load_server(kits["server"])


def test_a_trainer_that_is_killed_is_an_error_and_the_next_one_serves(tmp_path) -> None:
    kit = make_kits(tmp_path, experiment())[SITES[0]]
    scratch = tmp_path / "scratch"
    with Trainer(kit, hash_of(kit), scratch=scratch, log=tmp_path / "log") as trainer:
        trainer.start()
        assert trainer.process is not None
        first = trainer.process.pid
        os.kill(first, signal.SIGKILL)
        trainer.process.wait()
        with pytest.raises(TrainerError, match=r"was killed \(SIGKILL\)") as found:
            trainer._wait(lambda: False)
        assert "/" not in found.value.told  # no path of the site
        facts = trainer.ask("hello", Message(facts=dict(FACTS))).facts
        assert facts["samples"] == 8
        assert len(facts["problems"]) >= 3
        assert trainer.process.pid != first
        assert list(scratch.iterdir()) == []
        trainer.start()
        with pytest.raises(TrainerError, match="called off"):
            trainer.ask("hello", Message(facts=dict(FACTS)), aborted=lambda: True)
    assert not scratch.exists()
