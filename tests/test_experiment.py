"""Whole runs: determinism, a real kill, topologies, algorithms, what lies in the folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import fedmllm
from fedmllm.algorithms import ALGORITHMS
from fedmllm.config import config_hash, load_config, make_config
from fedmllm.data import load_dataset
from fedmllm.data.dataset import Dataset
from fedmllm.data.images import ImageFile
from fedmllm.data.sample import Sample, Task
from fedmllm.errors import UserError
from fedmllm.experiment import Shared, data_digest, make_manifest, own_samples, run
from fedmllm.models import model_path
from fedmllm.models.components import COMPONENTS
from fedmllm.models.loading import resolve_dtype
from fedmllm.models.mllm import Mllm
from fedmllm.plan.build import make_plan
from fedmllm.plan.table import as_json
from fedmllm.predict import load_adapter
from fedmllm.prompts import render
from fedmllm.report import facts
from fedmllm.report.loading import result_digest
from fedmllm.report.page import provenance
from fedmllm.scenarios import SETTINGS

SMALL = {
    "data": {"name": "memes", "train": 80, "test": 24},
    "partition": {"clients": 4},
    "training": {"rounds": 2, "clients_per_round": 2},
    "evaluation": {"every": 1, "conditions": ["both", "image_withheld"]},
}


def small(name: str = "x", **change):
    return make_config({"name": name, **SMALL, **change})


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def scores(result):
    """All numbers of a result that must be the same in two runs."""
    keep = ("round", "loss", "lr", "clients", "bytes_up", "bytes_down", "metrics")
    return result["metrics"], [{k: line[k] for k in keep} for line in result["history"]]


def test_the_folder_of_a_run(tmp_path, mllm: Mllm) -> None:
    events = []
    config = small(scenario={"name": "missing", "beta": 0.5})
    result = run(config, out=tmp_path / "r", listener=events.append, mllm=mllm)
    folder = tmp_path / "r"
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(result))
    assert yaml.safe_load((folder / "config.yaml").read_text())["scenario"]["beta"] == 0.5
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2]
    assert set(lines[-1]["metrics"]) == {"both", "image_withheld"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["sha256"] == result["manifest"]["sha256"]
    assert sum(c["samples"] for c in result["manifest"]["clients"]) == 80
    one = result["bytes"]["per_client_round"]["up"]["lora"]
    assert one == sum(v.nbytes for v in adapter(folder).values())
    assert result["bytes"]["up"] == result["bytes"]["down"] == one * 2 * 2
    assert result["parameters"]["trainable"] * 4 == one
    weights = Path(model_path("embedded")) / "model.safetensors"
    assert result["base_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    for key in ("versions", "hardware", "seed", "config_sha256", "time", "peak_memory_bytes"):
        assert result[key] is not None
    assert result["samples"]["trained"] == sum(
        client["samples"]
        for line in result["history"]
        for client in result["manifest"]["clients"]
        if client["id"] in line["clients"]
    )
    assert result["samples"]["tested"] == 24 + 2 * 24  # after round 1, and both conditions
    assert result["samples"]["trained_per_second"] > 0
    assert result["data_sha256"] != result["base_sha256"]
    assert result["result_sha256"] == result_digest(result)
    kinds = [event["event"] for event in events]
    assert kinds == ["start", "round", "round", "test", "test", "done"]


def test_two_runs_are_the_same_to_the_last_bit(tmp_path, mllm: Mllm) -> None:
    first = run(small(), out=tmp_path / "a", mllm=mllm)
    torch.manual_seed(5)
    second = run(small(), out=tmp_path / "b")  # another model object, a disturbed global stream
    assert scores(first) == scores(second)
    assert equal(adapter(tmp_path / "a"), adapter(tmp_path / "b"))
    other = run(small(seed=1), out=tmp_path / "c", mllm=mllm)
    assert scores(first) != scores(other)


KILLED = """
import sys, yaml
from fedmllm.config import config_hash, load_config, make_config
from fedmllm.data import load_dataset
from fedmllm.data.dataset import Dataset
from fedmllm.data.images import ImageFile
from fedmllm.data.sample import Sample, Task
from fedmllm.experiment import run
def listen(event):
    if event["event"] == "round":
        print("round", event["round"], flush=True)
run(make_config(yaml.safe_load(sys.argv[1])), out=sys.argv[2], listener=listen)
"""


@pytest.mark.parametrize("algorithm", ["scaffold", "fedadam"])
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(
    tmp_path, mllm: Mllm, algorithm: str
) -> None:
    """SIGKILL after round 2 of 4, from outside; SCAFFOLD has client memories, FedAdam moments."""
    training = {"rounds": 4, "clients_per_round": 2}
    raw = {"name": "x", **SMALL, "training": training, "algorithm": {"name": algorithm}}
    whole = run(make_config(raw), out=tmp_path / "whole", mllm=mllm)
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, yaml.safe_dump(raw), str(tmp_path / "cut")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line.strip() == "round 2":
            break
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait(timeout=30) == -signal.SIGKILL
    cut = tmp_path / "cut"
    assert not (cut / "result.json").exists()
    seen = []
    resumed = run(make_config(raw), out=cut, resume=True, listener=seen.append, mllm=mllm)
    rounds = [event["round"] for event in seen if event["event"] == "round"]
    assert rounds in ([3, 4], [4])  # round 3 may have ended before the kill came
    assert scores(whole) == scores(resumed)
    assert (whole["time"]["resumed"], resumed["time"]["resumed"]) == (False, True)
    assert equal(adapter(tmp_path / "whole"), adapter(cut))


def test_topologies(tmp_path, mllm: Mllm) -> None:
    results = {}
    for topology in ("zero-shot", "local", "centralised"):
        folder = tmp_path / topology
        results[topology] = run(small(topology, topology=topology), out=folder, mllm=mllm)
    zero, local, central = results["zero-shot"], results["local"], results["centralised"]
    assert zero["history"] == []
    assert all(v.abs().sum() == 0 for n, v in adapter(tmp_path / "zero-shot").items() if "_B" in n)
    assert sorted(local["per_client"]) == [f"client-{i:02d}" for i in range(4)]
    alone = [m["both"]["auc"] for m in local["per_client"].values()]
    assert local["metrics"]["both"]["auc"] == pytest.approx(sum(alone) / 4)
    assert local["spread"]["both"]["auc"]["min"] == min(alone)
    assert (tmp_path / "local" / "adapter" / "client-02" / "adapter_model.safetensors").exists()
    assert central["history"][0]["clients"] == ["pooled"]
    assert local["bytes"]["up"] == central["bytes"]["up"] == 0
    assert all(line["bytes_up"] == 0 for line in (*local["history"], *central["history"]))
    assert "auc_se" not in local["metrics"]["both"]


def test_a_centralised_run_is_tested_on_the_way(tmp_path, mllm: Mllm) -> None:
    """With `every: 1` after each round, on the first samples; at the end under every condition, on
    all. A local run is tested at its end only."""
    change = {"evaluation": {"every": 1, "limit": 6, "conditions": ["both", "neither"]}}
    made = {
        kind: run(small(topology=kind, **change), out=tmp_path / kind, mllm=mllm)
        for kind in ("centralised", "local")
    }
    central, local = made["centralised"], made["local"]
    assert facts.test_sizes(central, "both") == {1: 6, 2: 24}
    assert facts.test_sizes(central, "neither") == {2: 24}
    assert central["history"][1]["metrics"] == central["metrics"]
    assert [round_ for round_, _ in facts.curve(local, "both")] == [2]


def test_local_is_a_federation_of_one(tmp_path, mllm: Mllm) -> None:
    """A client alone gets what a federation with only that client would give."""
    alone = run(
        small("alone", topology="local", partition={"clients": 1}), out=tmp_path / "a", mllm=mllm
    )
    together = run(
        small(
            "one",
            partition={"clients": 1},
            training={"rounds": 2, "clients_per_round": 1},
        ),
        out=tmp_path / "b",
        mllm=mllm,
    )
    assert alone["metrics"] == together["metrics"]


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_algorithm_runs(tmp_path, mllm: Mllm, name: str) -> None:
    result = run(small(algorithm={"name": name}), out=tmp_path / "r", mllm=mllm)
    base = mllm.init_adapter(0)
    after = adapter(tmp_path / "r")
    assert any(not torch.equal(after[n], base[n]) for n in base)
    extra = 2 if name == "scaffold" else 1
    one = result["bytes"]["per_client_round"]["up"]["lora"]
    assert result["bytes"]["up"] == result["bytes"]["down"] == extra * one * 4


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({}, {"lora"}),
        ({"algorithm": "scaffold"}, {"lora", "control"}),
        ({"strategy": {"prototypes": 1.0}}, {"lora", "prototypes"}),
        ({"trained": {"name": "paper", "connector": "full"}}, {"lora", "connector"}),
        ({"setting": "cross-i5t5", "strategy": {"recombine": 1.0, "mixtures": 2}}, {"lora"}),
        ({"topology": "local"}, set()),
        ({"topology": "centralised"}, set()),
        ({"topology": "zero-shot"}, set()),
    ],
    ids=lambda value: " ".join(sorted(value)) if isinstance(value, set) else "",
)
def test_the_parts_of_a_message_add_up_to_what_was_counted(
    tmp_path, mllm: Mllm, change, parts
) -> None:
    """What a result states by part is made of shapes; a round's bytes are those of the tensors
    that went through it."""
    tiny = {
        "data": {"name": "memes", "train": 40, "test": 4},
        "evaluation": {"every": 0, "conditions": ["both"]},
    }
    base = None if "trained" in change else mllm
    result = run(small(**tiny, **change), out=tmp_path / "r", mllm=base)
    stated, once = result["bytes"]["per_client_round"], result["bytes"].get("once", {})
    for way in ("up", "down"):
        assert {name for name, count in stated[way].items() if count} == parts
        assert set(COMPONENTS) <= set(stated[way])
        for line in result["history"]:
            assert line[f"bytes_{way}"] == len(line["clients"]) * sum(stated[way].values())
        rounds = sum(line[f"bytes_{way}"] for line in result["history"])
        assert result["bytes"][way] == rounds + sum(once.get(way, {}).values())
    assert set(once.get("up", {})) == ({"mixtures"} if "mixtures" in str(change) else set())


def test_fedprox_without_mu_is_fedavg(tmp_path, mllm: Mllm) -> None:
    run(small(), out=tmp_path / "a", mllm=mllm)
    run(small(algorithm={"name": "fedprox", "mu": 0.0}), out=tmp_path / "b", mllm=mllm)
    run(small(algorithm={"name": "fedprox", "mu": 5.0}), out=tmp_path / "c", mllm=mllm)
    assert equal(adapter(tmp_path / "a"), adapter(tmp_path / "b"))
    assert not equal(adapter(tmp_path / "a"), adapter(tmp_path / "c"))


@pytest.mark.parametrize("setting", sorted(SETTINGS))
def test_all_twelve_settings_run(tmp_path, mllm: Mllm, setting: str) -> None:
    raw = {"name": "x", **SMALL, "setting": setting, "partition": {"clients": 10}}
    raw["training"] = {"rounds": 1, "clients_per_round": 2}
    raw["evaluation"] = {"every": 0, "conditions": ["both"]}
    result = run(make_config(raw), out=tmp_path / "r", mllm=mllm)
    held = result["manifest"]["clients"]
    whole = sum(c["image_text"] for c in held)
    assert (whole == 80) == setting.startswith("aligned")
    if setting.startswith("cross"):
        images = sum(c["image"] > 0 for c in held)
        assert images == int(setting.split("-i")[1][0])
        assert whole == 0


@pytest.mark.parametrize("name", ["crisis", "medical"])
def test_the_other_embedded_tasks_run(tmp_path, mllm: Mllm, name: str) -> None:
    data = {"name": name, "train": 40, "test": 24}
    if name == "medical":
        data["flashcards"] = 40
    result = run(
        small(data=data, scenario={"name": "hybrid", "p": 0.7}), out=tmp_path / "r", mllm=mllm
    )
    metric = {"crisis": "macro_f1", "medical": "accuracy"}[name]
    assert 0 <= result["metrics"]["both"][metric] <= 1
    if name == "medical":
        assert {"accuracy_open", "accuracy_closed"} <= set(result["metrics"]["both"])


def test_a_run_folder_is_never_lost(tmp_path, mllm: Mllm) -> None:
    run(small(), out=tmp_path / "r", mllm=mllm)
    before = (tmp_path / "r" / "result.json").read_bytes()
    with pytest.raises(UserError, match=r"exists: use --resume .* --overwrite"):
        run(small(), out=tmp_path / "r", mllm=mllm)
    with pytest.raises(UserError, match="another config"):
        run(small(seed=3), out=tmp_path / "r", resume=True, mllm=mllm)
    assert (tmp_path / "r" / "result.json").read_bytes() == before
    verdicts = tmp_path / "r" / "verdicts.jsonl"
    verdicts.write_text("paid for\n")
    (tmp_path / "r" / "judged.json").write_text("{}")
    run(small(seed=3), out=tmp_path / "r", overwrite=True, mllm=mllm)
    assert (tmp_path / "r" / "result.json").read_bytes() != before
    assert verdicts.read_text() == "paid for\n"
    assert not (tmp_path / "r" / "judged.json").exists()
    (tmp_path / "r" / "thesis.txt").write_text("keep")  # a run folder with something else in it
    with pytest.raises(UserError, match=r"holds 'thesis.txt'"):
        run(small(seed=4), out=tmp_path / "r", overwrite=True, mllm=mllm)
    (tmp_path / "r" / "thesis.txt").unlink()
    before = (tmp_path / "r" / "result.json").read_bytes()
    with pytest.raises(UserError, match="too few"):  # bad input is found before anything is lost
        run(
            small(data={"name": "memes", "train": 2, "test": 8}),
            out=tmp_path / "r",
            overwrite=True,
            mllm=mllm,
        )
    assert (tmp_path / "r" / "result.json").read_bytes() == before
    with pytest.raises(UserError, match="exclude each other"):
        run(small(), out=tmp_path / "r", overwrite=True, resume=True, mllm=mllm)
    with pytest.raises(UserError, match="is a file"):
        run(small(), out=tmp_path / "r" / "result.json" / "x", mllm=mllm)
    stranger = tmp_path / "photos"
    stranger.mkdir()
    (stranger / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not a run folder"):
        run(small(), out=stranger, overwrite=True, mllm=mllm)
    with pytest.raises(UserError, match="not a run folder"):
        run(small(), out=stranger, resume=True, mllm=mllm)
    assert (stranger / "mine.txt").read_text() == "keep"


def test_a_run_killed_before_its_config_can_be_run_again(tmp_path, mllm: Mllm) -> None:
    folder = tmp_path / "r"
    folder.mkdir()
    (folder / "config.yaml.draft").write_text("name")
    result = run(small(), out=folder, resume=True, mllm=mllm)
    assert result["status"] == "complete"
    config = load_config(folder / "config.yaml")  # what a run writes can be run
    assert config == small()


def test_a_run_does_not_go_on_with_other_data(tmp_path, mllm: Mllm) -> None:
    run(small(), out=tmp_path / "r", mllm=mllm)
    other = run(small(scenario="missing"), out=tmp_path / "other", mllm=mllm)
    assert other["manifest"]["sha256"]
    shutil.copy(tmp_path / "other" / "manifest.json", tmp_path / "r" / "manifest.json")
    with pytest.raises(UserError, match="the data changed since this run began"):
        run(small(), out=tmp_path / "r", resume=True, mllm=mllm)


def test_more_parties_than_samples(tmp_path, mllm: Mllm) -> None:
    config = small(data={"name": "memes", "train": 8, "test": 8}, partition={"clients": 20})
    with pytest.raises(UserError, match=r"20 clients.*8|8 .*20"):
        run(config, out=tmp_path / "r", mllm=mllm)


def test_a_second_run_is_not_slowed_by_the_first(tmp_path, mllm: Mllm) -> None:
    """Vision features of the first run serve the second: the tower is not asked again."""
    run(small(), out=tmp_path / "a", mllm=mllm)
    calls = []
    see, mllm._see = mllm._see, lambda source: calls.append(source)  # type: ignore[method-assign]
    try:
        run(small(), out=tmp_path / "b", mllm=mllm)
    finally:
        mllm._see = see  # type: ignore[method-assign]
    assert calls == []


def test_public_names() -> None:
    for name in fedmllm.__all__:
        assert getattr(fedmllm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fedmllm.nothing  # noqa: B018


def test_the_peak_is_that_of_the_run(tmp_path) -> None:
    """A process that has held 300 MB and let them go begins its next run without them."""
    import numpy as np

    from fedmllm import results

    held = np.ones(300 * 2**20, dtype=np.uint8)
    high = results.peak_memory_bytes()
    del held
    results.reset_peak_memory()
    assert results.peak_memory_bytes() < high - 200 * 2**20


PEAK = "peak GPU memory"


def test_the_peak_of_an_accelerator_is_that_of_the_run(tmp_path, mllm, monkeypatch) -> None:
    """A stand-in for CUDA: 7 bytes are in use, and the peak is that of an earlier run."""
    from fedmllm import results

    peak = {"cuda:1": 900}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda device: peak.update({str(device): 7})
    )
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[str(device)])
    assert results.peak_accelerator_bytes("cpu") is None
    results.reset_peak_memory()
    assert results.peak_accelerator_bytes("cuda:1") == 900
    results.reset_peak_memory("cuda:1")
    assert results.peak_accelerator_bytes("cuda:1") == 7
    plain = run(small(topology="zero-shot"), out=tmp_path / "cpu", mllm=mllm)
    assert "peak_accelerator_bytes" not in plain
    asked = []
    monkeypatch.setattr(results, "peak_accelerator_bytes", lambda device: asked.append(device) or 5)
    found = run(small(topology="zero-shot"), out=tmp_path / "gpu", mllm=mllm)
    assert (found["peak_accelerator_bytes"], asked) == (5, [str(mllm.device)])
    shown = [provenance([each], tmp_path)["shared"].get(PEAK) for each in (plain, found)]
    assert shown == [None, "<0.01 MB"]


def test_nothing_is_reset_before_cuda_is_used(monkeypatch) -> None:
    from fedmllm import results

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: 1 / 0)
    results.reset_peak_memory("cuda")


def too_long(config, result, mllm: Mllm) -> set[str]:
    """Of the clients that were drawn, and of the test samples under each condition."""
    dataset = load_dataset(**config.data)
    train, _ = own_samples(config, dataset, make_manifest(config, dataset))
    drawn = {client for line in result["history"] for client in line["clients"]}
    read = [sample for client in drawn for sample in train[client]]
    read += [s.masked(keep_image=k, keep_text=True) for s in dataset.test for k in (True, False)]
    return {
        sample.id
        for sample in read
        if mllm.encode(render(sample, dataset.task, config.prompt)).longest > 87
    }


def test_a_run_says_what_it_shortened(tmp_path, mllm: Mllm) -> None:
    """The embedded memes of this seed have 83 to 89 tokens."""
    config = small(training={**SMALL["training"], "max_length": 87})
    with pytest.raises(UserError, match=r"is .* tokens long"):
        run(config, out=tmp_path / "refused", mllm=mllm)
    assert not (tmp_path / "refused").exists()
    config = small(training={**SMALL["training"], "max_length": 87, "long_text": "shorten"})
    events = []
    result = run(config, out=tmp_path / "cut", mllm=mllm, listener=events.append)
    assert result["shortened"]["samples"] >= len(result["shortened"]["first"]) > 0
    assert events[-1]["shortened"] == result["shortened"]
    written = json.loads((tmp_path / "cut" / "shortened.json").read_text())
    assert written == sorted(too_long(config, result, mllm))
    assert written[:5] == result["shortened"]["first"]
    assert len(written) == result["shortened"]["samples"] > 5
    assert "shortened" not in run(small(), out=tmp_path / "plain", mllm=mllm)
    assert not (tmp_path / "plain" / "shortened.json").exists()


@pytest.mark.parametrize("pool", ["train", "test"])
@pytest.mark.parametrize("broken", ["text", "image"])
def test_a_sample_that_would_stop_a_run_stops_it_before(tmp_path, mllm: Mllm, pool, broken) -> None:
    """Of any party, drawn or not, and of the test samples: no folder, no event."""
    config = small(scenario="aligned", training={"rounds": 1, "clients_per_round": 1})
    dataset = load_dataset(**config.data)
    samples = list(getattr(dataset, pool))
    change = (
        {"text": "so " * 1300} if broken == "text" else {"image": ImageFile("no.png", tmp_path)}
    )
    samples[-1] = replace(samples[-1], **change)
    shared = Shared(mllm, {Shared.data_key(config): replace(dataset, **{pool: samples})})
    told: list[Any] = []
    words = r"no\.png" if broken == "image" else f"{samples[-1].id} is .* tokens long"
    with pytest.raises(UserError, match=words):
        run(config, out=tmp_path / "r", shared=shared, listener=told.append)
    assert told == []
    assert not (tmp_path / "r").exists()


def test_each_party_tests_on_what_it_held_out(tmp_path, mllm: Mllm) -> None:
    evaluation = {**SMALL["evaluation"], "held_out": 0.25, "every": 0}
    config = small(evaluation=evaluation, scenario="missing")
    dataset = load_dataset(**config.data)
    manifest = make_manifest(config, dataset)
    train, out = own_samples(config, dataset, manifest)
    sizes = {client.id: len(client.rows) for client in manifest.clients}
    for client, size in sizes.items():
        ids = [{sample.id for sample in part[client]} for part in (train, out)]
        assert not ids[0] & ids[1]
        assert len(ids[0] | ids[1]) == size
        assert len(ids[1]) == min(-(-size // 4), size - 1)  # a quarter, rounded up
    result = run(config, out=tmp_path / "r", mllm=mllm)
    found = result["held_out"]["per_client"]
    assert {client: scores["n"] for client, scores in found.items()} == {
        client: len(samples) for client, samples in out.items() if samples
    }
    # accuracy on them by hand, with the adapter that the run kept
    mllm.set_adapter(adapter_of(tmp_path / "r", mllm))
    client = max(out, key=lambda name: len(out[name]))
    right = 0
    for sample in out[client]:
        prompt = mllm.encode(render(sample, dataset.task, "plain"), max_length=1200)
        right += int(mllm.score_options([prompt])[0].argmax()) == sample.label
    assert found[client]["accuracy"] == pytest.approx(right / len(out[client]))
    spread = result["held_out"]["spread"]["accuracy"]
    assert spread["min"] == min(scores["accuracy"] for scores in found.values())
    steps = sum(len(train[name]) for line in result["history"] for name in line["clients"])
    assert result["samples"]["trained"] == steps
    assert config_hash(small(evaluation={**evaluation, "held_out": 0.0})) == config_hash(
        small(evaluation={k: v for k, v in evaluation.items() if k != "held_out"})
    )
    local = run(small(evaluation=evaluation, topology="local"), out=tmp_path / "local", mllm=mllm)
    assert set(local["held_out"]["per_client"]) == {name for name in out if out[name]}
    assert set(local["per_client"]) == set(out)


def adapter_of(folder: Path, mllm: Mllm):
    """The adapter of a run under the names that the model takes."""
    saved = adapter(folder)
    own = mllm.get_adapter()
    assert saved.keys() == own.keys()
    return saved


def test_the_digest_of_data_reads_no_picture(tmp_path, monkeypatch) -> None:
    def dataset(text: str = "words", path: str = "a.png") -> Dataset:
        sample = Sample(id="1", answer="x", text=text, image=ImageFile(path, tmp_path))
        return Dataset(Task("t", "open", "accuracy"), [sample], [])

    def read(image) -> bytes:
        raise AssertionError("a picture was read")

    monkeypatch.setattr(ImageFile, "encoded", read)
    (tmp_path / "a.png").write_bytes(b"123")
    first = data_digest(dataset())
    assert data_digest(dataset()) == first
    assert data_digest(dataset(text="other")) != first
    assert data_digest(dataset(path="b.png")) != first
    swapped = Dataset(dataset().task, [], dataset().train)  # trained on is not tested on
    assert data_digest(swapped) != first
    (tmp_path / "a.png").write_bytes(b"1234")
    assert data_digest(dataset()) != first


def test_auto_is_bfloat16_where_the_device_computes_in_it(monkeypatch) -> None:
    assert resolve_dtype("auto", "cpu") == "float32"
    assert resolve_dtype("float16", "cuda") == "float16"
    monkeypatch.setattr(torch.cuda, "device", lambda name: contextlib.nullcontext())
    for fits, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, f=fits: f)
        assert resolve_dtype("auto", "cuda:1") == dtype


def test_auto_on_a_machine_without_the_device_is_a_plan_for_another() -> None:
    """This one may have one; no machine has so many."""
    assert resolve_dtype("auto", "cuda:99") == "bfloat16"
    config = small(model={"dtype": "auto", "device": "cuda:99"})
    made = make_plan(config, memory=10**12)
    assert as_json(made)["model"]["dtype"] == "bfloat16"
    assert made.load.itemsize == 2


def test_a_run_says_what_auto_was(tmp_path, mllm: Mllm) -> None:
    plain = run(small(), out=tmp_path / "plain", mllm=mllm)
    made = run(small(model={"dtype": "auto"}), out=tmp_path / "auto", mllm=mllm)
    assert made["config"]["model"]["dtype"] == "auto"
    assert made["hardware"]["dtype"] == plain["hardware"]["dtype"] == "float32"
    assert equal(adapter(tmp_path / "plain"), adapter(tmp_path / "auto"))
    loaded, _ = load_adapter(tmp_path / "auto" / "adapter")
    assert loaded.base.dtype == torch.float32
