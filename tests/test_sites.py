"""One federation over several machines, the network left out: numbers, handshake, quorum."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sites import SMALL, NearLink, hash_of, make_kits

from fedmllm.config import load_config
from fedmllm.experiment import run
from fedmllm.sites.serving import serve


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("algorithm", ["fedavg", "fedadam", "scaffold"])
def test_sites_give_the_weights_of_one_process(tmp_path, mllm, algorithm: str) -> None:
    raw = {"name": "x", **copy.deepcopy(SMALL), "algorithm": algorithm}
    raw["evaluation"]["held_out"] = 0.25
    kits = make_kits(tmp_path, raw)
    link = NearLink(kits, tmp_path)
    found = serve(kits["server"], hash_of(kits["server"]), link)
    here = run(
        load_config(kits["server"] / "experiments" / "x.yaml"), out=tmp_path / "here", mllm=mllm
    )
    there = kits["server"] / "runs" / "x"
    assert same(weights(there), weights(tmp_path / "here"))
    assert found["metrics"] == here["metrics"]
    assert json.dumps(found["held_out"]) == json.dumps(here["held_out"])  # NaN is NaN
    assert found["config_sha256"] == here["config_sha256"]
    for ours, theirs in zip(found["history"], here["history"], strict=True):
        for key in ("round", "loss", "lr", "clients", "bytes_up", "bytes_down"):
            assert ours[key] == theirs[key], key
    assert json.loads((there / "status.json").read_text())["doing"] == "done"
