"""The simulator as a runner: the numbers of one process, and what it refuses."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("nvflare", reason='needs pip install "fedmllm[nvflare]"')

from sites import SMALL

from fedmllm.config import make_config
from fedmllm.errors import UserError
from fedmllm.experiment import run
from fedmllm.sites.flare.simulate import LOG, simulate


def small(**change: Any) -> Any:
    raw = copy.deepcopy(SMALL)
    raw["partition"]["clients"] = 2
    raw["training"]["clients_per_round"] = 2
    for section, values in change.items():
        raw[section] = {**raw.get(section, {}), **values} if isinstance(values, dict) else values
    return make_config({"name": "tiny", **raw})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.slow
def test_the_simulator_gives_the_weights_of_one_process(tmp_path, mllm) -> None:
    """SCAFFOLD, whose clients keep something; and a finished run is not begun anew."""
    config = small(algorithm={"name": "scaffold"})
    result = run(config, out=tmp_path / "here", mllm=mllm)
    said: list[str] = []
    folder = simulate(config, tmp_path / "runs", say=said.append)
    assert folder == tmp_path / "runs" / "tiny"
    one, other = weights(tmp_path / "here"), weights(folder)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    simulated = json.loads((folder / "result.json").read_text())
    assert simulated["metrics"] == result["metrics"]
    assert [line["loss"] for line in simulated["history"]] == [
        line["loss"] for line in result["history"]
    ]
    assert "round 2 of 2" in said
    kept = sorted(p.parent.parent.name for p in (folder / "state" / "sites").glob("*/*/memory-*2*"))
    assert kept == ["client-00", "client-01"]
    assert not list((folder / "state" / "sites").glob("*/scratch-*"))


def test_bad_input_is_refused_before_anything_starts(tmp_path) -> None:
    with pytest.raises(UserError, match="at-once is 3: 1 to 2"):
        simulate(small(), tmp_path, at_once=3)
    with pytest.raises(UserError, match="topology local has nobody to federate with"):
        simulate(small(topology="local"), tmp_path)
    with pytest.raises(UserError, match=r"strategy\.fusion works in one process only"):
        simulate(small(strategy={"fusion": 1.0}), tmp_path)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "thesis.tex").touch()
    with pytest.raises(UserError, match="is not a run folder"):
        simulate(small(), tmp_path)
    assert [p.name for p in tmp_path.rglob("*")] == ["tiny", "thesis.tex"]


@pytest.mark.slow
def test_a_party_that_fails_ends_the_run_and_says_why(tmp_path, mllm) -> None:
    """A learning rate at which the loss diverges: in process that is an error, too."""
    config = small(training={"lr": 1e30, "optimizer": "sgd", "max_grad_norm": 0})
    with pytest.raises(UserError, match=r"lower training\.lr"):
        run(config, out=tmp_path / "here", mllm=mllm)
    with pytest.raises(UserError, match=r"tiny: client-0\d: cannot train") as caught:
        simulate(config, tmp_path / "runs")
    assert str(tmp_path / "runs" / "tiny" / LOG) in str(caught.value)
