"""What is trained and exchanged, component by component, on the tiny models of all families."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from test_families import WIDE, choices, encoded, has_plain_path, plain_inputs, samples
from tiny_models import TINY, make_model
from transformers import AutoModelForImageTextToText

from fedmllm.algorithms.base import LocalObjective, Proximal
from fedmllm.client import LocalPlan, add_proximal_gradient, train_client
from fedmllm.config import make_config
from fedmllm.data.images import ImageFile
from fedmllm.errors import UserError
from fedmllm.experiment import run
from fedmllm.models.components import COMPONENTS, POLICIES, Policy, make_policy
from fedmllm.models.mllm import Mllm
from fedmllm.plan import make_plan
from fedmllm.predict import load_adapter

ALL = Policy(connector="full", embeddings="full", vision="lora")
PROJECTOR = {"model.multi_modal_projector"}
MERGER = {"model.visual.merger"}
RESAMPLER = {"resampler"}
TIED = {"gemma3", "internvl", "lfm2_vl", "paligemma"}
CONNECTOR = {
    "idefics3": {"model.connector"},
    "smolvlm": {"model.connector"},
    "llava": PROJECTOR,
    "llava_next": PROJECTOR,
    "llava_onevision": PROJECTOR,
    "internvl": PROJECTOR,
    "gemma3": PROJECTOR,
    "paligemma": PROJECTOR,
    "lfm2_vl": PROJECTOR,
    "qwen2_vl": MERGER,
    "qwen2_5_vl": MERGER,
    "qwen3_5": MERGER,
    "qwen3_vl": MERGER | {f"model.visual.deepstack_merger_list.{i}" for i in (0, 1)},
    "minicpmv 2.5": RESAMPLER,
    "minicpmv 2.6": RESAMPLER,
    "minicpmv4_6": {"model.merger"},
}
# layers of the tower times projections of its attention
VISION = {**dict.fromkeys(TINY, 2 * 4), **dict.fromkeys([n for n in TINY if "qwen" in n], 2 * 2)}


@pytest.fixture(scope="module", params=sorted(TINY))
def folder(request, tmp_path_factory) -> tuple[str, Path]:
    return request.param, make_model(request.param, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def trained(folder) -> Mllm:
    """Everything that can be trained, as it starts."""
    mllm = Mllm.load(*folder, rank=2, policy=ALL)
    mllm.set_adapter(mllm.init_adapter(0))
    return mllm


def moved(mllm: Mllm) -> dict[str, torch.Tensor]:
    """An adapter whose every tensor differs from the start."""
    params = mllm.init_adapter(0)
    for i, (name, value) in enumerate(params.items()):
        generator = torch.Generator().manual_seed(i)
        params[name] = value + torch.randn(value.shape, generator=generator) * 0.1
    return params


def test_each_component_is_where_it_belongs(trained: Mllm) -> None:
    """Names written by hand; everything else of the base stays frozen."""
    name = trained.name
    words = {n for n in trained.copied_modules() if n.endswith("embed_tokens")}
    assert set(trained.copied_modules()) - words == CONNECTOR[name]
    assert len(words) == 1
    lora = {n: c for n, c in trained.lora_modules().items() if n in TINY[name].adapted}
    assert lora == TINY[name].adapted
    tower = sum(c for n, c in trained.lora_modules().items() if n not in lora)
    assert tower == VISION[name]
    found = Counter(trained.component_of.values())
    assert set(found) == set(COMPONENTS)
    assert found["embeddings"] == 1  # a shared head is the same tensor
    assert (found["lora"], found["vision_lora"]) == (2 * sum(lora.values()), 2 * tower)
    counted = sum(p.numel() for n, p in trained.trainable.items() if ".lora_" not in n)
    assert counted == sum(trained.copied_modules().values())


def test_a_fresh_adapter_is_the_base_itself(trained: Mllm, folder) -> None:
    trained.set_adapter(trained.init_adapter(0))
    plain = Mllm.load(*folder, rank=2)
    assert torch.equal(trained.score_options(choices(trained)), plain.score_options(choices(plain)))
    added = sum(p.numel() for n, p in trained.trainable.items() if ".lora_" in n)
    before = plain.parameter_counts()
    assert trained.parameter_counts()["total"] == before["total"] - before["trainable"] + added


def test_the_gradient_reaches_every_component_and_is_autograds_on_pixels(trained: Mllm) -> None:
    """Oracle: the loss of plain transformers on the pixels of one sample."""
    trained.set_adapter(moved(trained))
    sample, item = samples()[0], encoded(trained)[0]
    if trained.name == "paligemma":  # its processor makes token types for a prompt alone
        return check_gradient_reaches(trained, item)
    check_gradient_reaches(trained, item)
    ours = {n: p.grad.clone() for n, p in trained.trainable.items() if p.grad is not None}
    trained.model.zero_grad(set_to_none=True)
    inputs = plain_inputs(trained, sample)
    answer = torch.tensor([item.answer])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for types in ("token_type_ids", "mm_token_type_ids"):
        if types in inputs:
            inputs[types] = torch.cat([inputs[types], torch.zeros_like(answer)], 1)
    logits = trained.model(**inputs, use_cache=False).logits[0]
    begin = len(item.prompt) - 1
    picked = logits[begin : begin + len(item.answer)]
    torch.nn.functional.cross_entropy(picked, answer[0]).backward()
    for name, value in ours.items():
        torch.testing.assert_close(
            value, trained.trainable[name].grad, atol=1e-5, rtol=1e-3, msg=name
        )
    trained.model.zero_grad(set_to_none=True)


def check_gradient_reaches(mllm: Mllm, item) -> None:
    mllm.loss_sum([item]).backward()
    reached = Counter(
        mllm.component_of[name]
        for name, p in mllm.trainable.items()
        if p.grad is not None and float(p.grad.abs().max()) > 0
    )
    assert set(reached) == set(COMPONENTS)


@torch.no_grad()
def test_plain_peft_loads_all_components(trained: Mllm, folder, tmp_path) -> None:
    trained.set_adapter(moved(trained))
    trained.save_adapter(tmp_path)
    base = AutoModelForImageTextToText.from_pretrained(folder[1], dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, tmp_path).eval()
    for sample, item in zip(samples(), encoded(trained), strict=True):
        if has_plain_path(trained, sample):
            expected = plain(**plain_inputs(trained, sample)).logits
            found = trained.model(**trained._inputs([item], [item.prompt])).logits
            assert torch.equal(found, expected)
    kept = trained.get_adapter()
    trained.set_adapter(trained.init_adapter(1))
    trained.read_adapter(tmp_path)
    assert all(torch.equal(value, kept[name]) for name, value in trained.get_adapter().items())


def test_the_frozen_towers_dropout_is_never_felt(trained: Mllm) -> None:
    """The tiny towers have an attention dropout of one half."""
    trained.set_adapter(trained.init_adapter(0))  # B is zero: LoRA's own dropout changes nothing
    item = encoded(trained)[0]
    with trained.training(1):
        first = float(trained.loss_sum([item]).detach())
        trained.image_features(WIDE)
    with trained.training(2):
        assert float(trained.loss_sum([item]).detach()) == first


def test_half_precision_keeps_full_copies_in_float32(folder) -> None:
    half = Mllm.load(*folder, rank=2, dtype=torch.bfloat16, policy=ALL)
    half.set_adapter(half.init_adapter(0))
    assert {p.dtype for p in half.trainable.values()} == {torch.float32}
    plain = Mllm.load(*folder, rank=2, dtype=torch.bfloat16)
    found, expected = (m.score_options(choices(m)) for m in (half, plain))
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)
    check_gradient_reaches(half, encoded(half)[0])


def test_full_copies_need_weights(tmp_path) -> None:
    folder = ("idefics3", make_model("idefics3", tmp_path))
    with pytest.raises(UserError, match="start from its weights"):
        Mllm.shapes(*folder, rank=2, policy=ALL)
    seeing = Policy(vision="lora")
    bare = Mllm.shapes(*folder, rank=2, policy=seeing)
    whole = Mllm.load(*folder, rank=2, policy=seeing)
    assert bare.component_of == whole.component_of
    assert {k: v.shape for k, v in bare.trainable.items()} == {
        k: v.shape for k, v in whole.trainable.items()
    }


@pytest.mark.parametrize("name", ["idefics3", "qwen2_vl", "minicpmv 2.6"])
def test_four_bit_leaves_what_is_copied_whole(name, tmp_path) -> None:
    packed = Mllm.load(name, make_model(name, tmp_path), rank=2, quantization="nf4", policy=ALL)
    packed.set_adapter(packed.init_adapter(0))
    assert {p.dtype for p in packed.trainable.values()} == {torch.float32}
    check_gradient_reaches(packed, encoded(packed)[0])


# -- training -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Mllm:
    return Mllm.load("q", make_model("qwen2_vl", tmp_path_factory.mktemp("q")), rank=2, policy=ALL)


def train(mllm: Mllm, items, objective: LocalObjective | None = None, **more):
    return train_client(
        mllm,
        mllm.init_adapter(0),
        items,
        client="a",
        round_=1,
        seed=0,
        lr=1e-2,
        plan=LocalPlan(),
        objective=objective or LocalObjective(),
        **more,
    )


def changed(mllm: Mllm, delta) -> set[str]:
    return {mllm.component_of[n] for n, value in delta.items() if float(value.abs().max()) > 0}


def test_a_client_without_images_leaves_what_sees_them_alone(small: Mllm) -> None:
    text = [encoded(small)[1]]
    assert changed(small, train(small, text)[0].delta) == {"lora", "embeddings"}
    assert changed(small, train(small, encoded(small))[0].delta) == set(COMPONENTS)


def test_scaffolds_control_moves_what_has_no_gradient(small: Mllm) -> None:
    """The correction c - c_k is added to a gradient of zero, as Algorithm 1 has it."""
    shift = {name: torch.ones_like(value) for name, value in small.get_adapter().items()}
    update, memory = train(
        small,
        [encoded(small)[1]],
        LocalObjective(control=True),
        broadcast={"control": shift},
    )
    assert changed(small, update.delta) == set(COMPONENTS)
    merger = next(n for n, kind in small.component_of.items() if kind == "connector")
    assert not memory[merger].any()


def test_fedprox_holds_all_components_and_a_band_only_its_layers(small: Mllm) -> None:
    start = small.init_adapter(0)
    small.set_adapter(moved(small))
    here = small.get_adapter()
    for edge, expected in ((0, set(COMPONENTS)), (1, set())):
        for p in small.trainable.values():
            p.grad = torch.zeros_like(p)
        add_proximal_gradient(small, start, Proximal(mu=0.5, edge_layers=edge))
        assert changed(small, {n: p.grad for n, p in small.trainable.items()}) == expected
        if edge == 0:
            for name, p in small.trainable.items():
                torch.testing.assert_close(p.grad, 0.5 * (here[name] - start[name]))
    small.model.zero_grad(set_to_none=True)


# -- through the ordinary run ----------------------------------------------------------------------

SMALL = {
    "name": "x",
    "data": {"train": 24, "test": 8},
    "partition": {"clients": 3},
    "training": {"rounds": 2},
    "evaluation": {"conditions": ["both"]},
}


def test_a_run_states_the_bytes_of_each_component_as_the_plan_says(tmp_path) -> None:
    config = make_config({**SMALL, "trained": {"name": "reference", "vision": "lora"}})
    result = run(config, out=tmp_path / "run")
    parts = result["bytes"]["per_client_round"]["up"]
    assert set(parts) == set(COMPONENTS)
    assert result["bytes"]["per_client_round"]["down"] == parts
    assert all(parts.values())
    assert parts["lora"] == 196_608  # as without the rest
    assert result["bytes"]["up"] == 2 * 2 * sum(parts.values())
    assert result["parameters"]["trainable"] == sum(parts.values()) // 4
    facts = make_plan(config).to_json()
    assert facts["bytes"]["per_client_round"] == result["bytes"]["per_client_round"]
    assert facts["parameters"]["total"] == result["parameters"]["total"]
    mllm, _ = load_adapter(tmp_path / "run" / "adapter")
    assert mllm.policy == Policy("full", "full", "lora")


def test_the_papers_policy_is_the_default_and_exchanges_lora_alone(tmp_path, mllm) -> None:
    result = run(make_config(SMALL), out=tmp_path / "run", mllm=mllm)
    assert result["config"]["trained"] == {"name": "paper", **POLICIES["paper"].options}
    parts = {"lora": 196_608, "connector": 0, "embeddings": 0, "vision_lora": 0}
    assert result["bytes"]["per_client_round"] == {"up": parts, "down": parts}


def test_ready_policies() -> None:
    assert make_policy() == Policy()
    assert make_policy("reference") == Policy("full", "full", "frozen")
    assert make_policy("paper", vision="lora") == Policy(vision="lora")


def test_unknown_choices_are_told_with_what_is_allowed() -> None:
    for given, words in (
        ("papre", "did you mean 'paper'"),
        ({"connector": "half"}, "frozen"),
        ({"tower": "full"}, "connector"),
    ):
        with pytest.raises(UserError, match=words):
            make_config({**SMALL, "trained": given})


def test_an_image_that_the_processor_cannot_take_is_named(small: Mllm, tmp_path) -> None:
    from PIL import Image

    from fedmllm.data.sample import Sample, Task
    from fedmllm.prompts import render

    Image.new("RGB", (1, 900)).save(tmp_path / "strip.png")
    sample = Sample("s7", "x", question="?", image=ImageFile("strip.png", tmp_path))
    with pytest.raises(UserError, match="sample s7: the image processor of q cannot take"):
        small.encode(render(sample, Task("t", "open", "accuracy")))
