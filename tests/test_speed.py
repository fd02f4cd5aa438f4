"""The benchmark of speed: its arithmetic against PyTorch's own counter, its ratios, its table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fedmllm.models.mllm import Mllm
from fedmllm.models.passes import Encoded

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks" / "speed"))
sys.path.insert(0, str(ROOT / "scripts"))

import arithmetic  # noqa: E402
import common  # noqa: E402
import server_load  # noqa: E402
import update_docs  # noqa: E402

TOKENS, ANSWER = 60, 5


@pytest.fixture(scope="module")
def sizes(mllm: Mllm) -> arithmetic.Sizes:
    return arithmetic.sizes_of(mllm, slices=1)


def item() -> Encoded:
    return Encoded("s", (10,) * (TOKENS - ANSWER), (20,) * ANSWER, None)


def counted(work) -> int:
    """Operations, attention's included: the counter does not know the CPU's own kernel for it."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test_forward_is_what_the_counter_sees(mllm: Mllm, sizes: arithmetic.Sizes) -> None:
    with torch.no_grad():
        seen = counted(lambda: mllm.losses([item()]))
    assert seen == pytest.approx(arithmetic.forward(sizes, TOKENS, ANSWER), rel=0.02)


def test_training_is_what_the_counter_sees(mllm: Mllm, sizes: arithmetic.Sizes) -> None:
    """The formula counts the first layer's inputs' gradient, a sixth of the backward at most."""
    seen = counted(lambda: mllm.losses([item()]).sum().backward())
    for value in mllm.trainable.values():
        value.grad = None
    formula = arithmetic.train(sizes, TOKENS, ANSWER)
    assert 0.85 * formula < seen < 1.03 * formula


def test_seeing_is_what_the_counter_sees(mllm: Mllm, sizes: arithmetic.Sizes) -> None:
    side = mllm.base.config.vision_config.image_size
    pixels = torch.ones(1, 1, 3, side, side)  # a picture of zeros counts as padding
    with torch.no_grad():
        seen = counted(lambda: mllm.base.base_model.get_image_features(pixel_values=pixels))
    assert seen == pytest.approx(arithmetic.see(sizes), rel=0.02)


def test_ratios_are_of_one_repetition() -> None:
    """Medians of 4/2, 9/3 and 5/5 are 2; the ratio of the medians would be 5/3."""
    tries = [
        {"ours": common.Took(o, 2 * o), "other": common.Took(t, o)}
        for o, t in ((2.0, 4.0), (3.0, 9.0), (5.0, 5.0))
    ]
    case = common.compare("x", tries, count=6, unit="things", goals={"other": 10.0})
    assert case["ratio"]["other"] == {"wall": 2.0, "cpu": 0.5, "goal": 10.0}
    assert case["per_second"] == {"ours": 2.0, "other": 1.2}


def test_the_servers_adapter_is_20_mb() -> None:
    total = 4 * sum(a * b for a, b in server_load.shapes().values())
    assert total == pytest.approx(20e6, rel=0.02)


def test_deltas_differ_from_client_to_client() -> None:
    params = {"a": server_load.start()["layers.00.k.lora_A"]}
    firsts = {float(server_load.delta(params, client)["a"][0, 0]) for client in range(1000)}
    assert len(firsts) == 1000


def test_a_missing_row_is_said_to_be_missing(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(update_docs, "RESULTS", tmp_path)
    assert "*Not measured yet.*" in update_docs.speed_rows()
    assert "training" in update_docs.speed_rows()


def test_the_table_says_whether_a_goal_is_reached(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(update_docs, "RESULTS", tmp_path)
    tries = [{"ours": common.Took(1.0, 1.0), "trainer": common.Took(4.0, 4.0)}]
    cases = [
        common.compare("easy", tries, count=8, unit="samples", goals={"trainer": 3.0}),
        common.compare("hard", tries, count=8, unit="samples", goals={"trainer": 10.0}),
    ]
    (tmp_path / "speed").mkdir()
    facts = {"cases": cases, "hardware": {"cpu": "C", "cores": 2}, "versions": {"torch": "9"}}
    facts |= {"load_before": 0.1, "commit": "abc"}
    (tmp_path / "speed" / "training.json").write_text(json.dumps(facts))
    lines = update_docs.speed_rows().splitlines()
    easy, hard = (next(line for line in lines if word in line) for word in ("easy", "hard"))
    assert easy.endswith("| 4.0 | 3 | yes |")
    assert hard.endswith("| 4.0 | 10 | no |")
