"""4-bit weights: every family, what is quantised and what is not, what still trains."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from PIL import Image
from tiny_models import TINY, make_model
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from fedmllm.data.images import MemoryImage
from fedmllm.data.sample import Sample, Task
from fedmllm.errors import UserError
from fedmllm.models import model_path
from fedmllm.models.loading import load_base
from fedmllm.models.lora import decoder_of
from fedmllm.models.mllm import Mllm
from fedmllm.models.quantize import kept_modules, pack, settle
from fedmllm.plan.structure import build_skeleton, weight_bytes
from fedmllm.prompts import render

PICTURE = MemoryImage("p", lambda: Image.radial_gradient("L").resize((48, 32)).convert("RGB"))
OPEN = Task("vqa", "open", "accuracy")
SAMPLES = [
    Sample(id="image", question="what is it?", answer="red", image=PICTURE),
    Sample(id="text", question="no picture here, what now?", answer="a tree"),
]


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module", params=sorted(TINY))
def folder(request, tmp_path_factory) -> tuple[str, Path]:
    """A family and its tiny model's folder."""
    return request.param, make_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=sorted(DTYPES))
def pair(request, folder) -> tuple[Mllm, Mllm]:
    """A family's tiny model whole and in 4 bit, with the same arithmetic."""
    name, path = folder
    whole, packed = (
        Mllm.load(name, path, rank=2, dtype=DTYPES[request.param], quantization=how)
        for how in ("none", "nf4")
    )
    return whole, packed


def test_linear_layers_of_the_decoder_and_no_others_are_packed(pair):
    whole, packed = pair
    inside = set(decoder_of(packed.base).layers.modules())
    linear = [module for module in packed.base.modules() if isinstance(module, nn.Linear)]
    frozen = [module for module in linear if not module.weight.requires_grad]
    assert {module in inside for module in frozen} == {True, False}
    for module in frozen:
        assert isinstance(module, Linear4bit) == (module in inside), module
    assert packed.parameter_counts() == whole.parameter_counts()
    assert packed.lora_modules() == whole.lora_modules()


def test_what_is_not_packed_is_that_of_the_whole_model(pair):
    """To the last bit; rotary frequencies stay in float32 beside bfloat16 weights."""
    whole, packed = pair
    plain, found = dict(whole.base.named_buffers()), dict(packed.base.named_buffers())
    assert plain.keys() == found.keys()
    assert any("inv_freq" in name and b.dtype == torch.float32 for name, b in plain.items())
    for name, buffer in plain.items():
        assert found[name].dtype == buffer.dtype, name
        assert torch.equal(found[name], buffer), name
    parameters = dict(packed.base.named_parameters())
    for name, parameter in whole.base.named_parameters():
        if ".lora_" not in name and not isinstance(parameters[name], Params4bit):
            assert parameters[name].dtype == parameter.dtype, name
            assert torch.equal(parameters[name], parameter), name


def test_it_reads_nearly_as_the_whole_model_and_sees_the_same(pair):
    whole, packed = pair
    assert torch.equal(whole.image_features(PICTURE).features,
                       packed.image_features(PICTURE).features)  # fmt: skip
    items = [whole.encode(render(sample, OPEN)) for sample in SAMPLES]
    assert items == [packed.encode(render(sample, OPEN)) for sample in SAMPLES]
    with torch.no_grad():
        given, found = (float(mllm.loss_sum(items)) for mllm in pair)
    assert found != given  # a model that was not packed would give the same
    assert found == pytest.approx(given, rel=0.25)
    assert len(packed.generate(items, max_new_tokens=3)) == len(items)


def test_every_adapter_tensor_gets_a_gradient(pair):
    _, packed = pair
    params = packed.init_adapter(0)
    packed.set_adapter({name: value + 0.01 for name, value in params.items()})
    items = [packed.encode(render(sample, OPEN)) for sample in SAMPLES]
    with packed.training(0):
        packed.loss_sum(items).backward()
    assert packed.trainable
    for name, value in packed.trainable.items():
        assert value.grad is not None, name
        assert value.grad.abs().sum() > 0, name
    assert all(p.grad is None for p in packed.base.parameters() if not p.requires_grad)


def test_a_checkpoint_quantised_already_is_read_as_it_is(tmp_path):
    """As the published 4-bit MiniCPM-V-2.6 is: its tower is packed too, but for some layers."""
    folder = make_model("minicpmv 2.6", tmp_path / "whole")
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["out_proj", "kv_proj", "lm_head"],
    )
    packed = AutoModelForImageTextToText.from_pretrained(
        folder, quantization_config=how, device_map={"": "cpu"}
    )
    shutil.copytree(folder, tmp_path / "packed", ignore=shutil.ignore_patterns("*.safetensors"))
    packed.save_pretrained(tmp_path / "packed")
    whole, mllm = (Mllm.load("x", tmp_path / name, rank=2) for name in ("whole", "packed"))
    layer = mllm.base.vpm.encoder.layers[0]
    assert isinstance(layer.self_attn.q_proj, Linear4bit)
    assert not isinstance(layer.self_attn.out_proj, Linear4bit)
    assert mllm.parameter_counts() == whole.parameter_counts()
    items = [mllm.encode(render(sample, OPEN)) for sample in SAMPLES]
    with mllm.training(0):
        loss = mllm.loss_sum(items)
        loss.backward()
    assert float(loss) == pytest.approx(float(whole.loss_sum(items)), rel=0.25)
    assert all(value.grad is not None for value in mllm.trainable.values())


OTHERS = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_8bit": True},
}


@pytest.mark.parametrize("asked", ["none", "nf4"])
@pytest.mark.parametrize("how", OTHERS)
def test_a_checkpoint_quantised_otherwise_is_refused(tmp_path, how, asked):
    """Before a weight is read: there is none."""
    folder = Path(model_path("embedded"))
    settings = json.loads((folder / "config.json").read_text())
    for place in (settings, settings["text_config"]):
        place["quantization_config"] = OTHERS[how]
        (tmp_path / "config.json").write_text(json.dumps(settings))
        with pytest.raises(UserError, match=f"is quantised by {how}, not to 4 bit by bitsandb"):
            Mllm.load("x", tmp_path, quantization=asked)
        del place["quantization_config"]


def test_codes_that_are_stored_as_floats_stay_codes(tmp_path):
    """bitsandbytes can keep its bytes under a floating dtype (`bnb_4bit_quant_storage`)."""
    folder = make_model("qwen2_vl", tmp_path / "whole")
    made = []
    for storage in (torch.uint8, torch.bfloat16):
        how = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_quant_storage=storage,
            llm_int8_skip_modules=["lm_head", "model.visual"],
        )
        packed = AutoModelForImageTextToText.from_pretrained(
            folder, quantization_config=how, device_map={"": "cpu"}, dtype=torch.float32
        )
        settle(packed, torch.float32)
        with torch.no_grad():
            made.append(packed(input_ids=torch.arange(3, 30)[None]).logits)
    assert torch.equal(*made)


def test_a_plan_counts_the_bytes_of_packed_weights():
    path = model_path("embedded")
    base = Mllm.load("embedded", path, quantization="nf4").base
    skeleton = build_skeleton(path, rank=8, alpha=8, dropout=0.05, dtype="float32")
    planned = weight_bytes(skeleton, four_bit=True)
    adapter = [p for name, p in base.named_parameters() if ".lora_" in name]
    held = sum(t.nbytes for t in (*base.parameters(), *base.buffers()))
    assert held - sum(t.nbytes for t in adapter) == planned["plain"] + planned["nf4"]
    states = [m.weight.quant_state for m in base.modules() if isinstance(m, Linear4bit)]
    scales = sum(s.absmax.nbytes + s.state2.absmax.nbytes for s in states)
    assert scales == planned["scales"]


def test_what_is_kept_is_named_by_its_largest_modules():
    mllm = Mllm.load("embedded", model_path("embedded"))
    kept = ["lm_head", "model.connector", "model.vision_model"]
    assert kept_modules(mllm.base) == kept


def test_without_the_package_the_message_says_what_to_install(monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name)
    )
    with pytest.raises(UserError, match=r"install -c constraints.txt -e '.\[4bit\]'"):
        Mllm.load("embedded", Path(model_path("embedded")), quantization="nf4")
    settings = json.loads((Path(model_path("embedded")) / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(
        UserError, match=r"in 4 bit, needs .* install -c constraints.txt -e '.\[4bit\]'"
    ):
        Mllm.load("x", tmp_path)


def test_packing_in_memory_is_reading_in_4_bit(tmp_path) -> None:
    """The same layers, and the same codes in them."""
    folder = make_model("qwen2_vl", tmp_path)
    whole, _ = load_base(folder, dtype=torch.float32, device="cpu")
    read, _ = load_base(folder, dtype=torch.float32, device="cpu", quantization="nf4")
    pack(whole, torch.float32)
    settle(whole, torch.float32)
    packed = {n: m for n, m in whole.named_modules() if isinstance(m, Linear4bit)}
    expected = {n: m for n, m in read.named_modules() if isinstance(m, Linear4bit)}
    assert packed.keys() == expected.keys()
    for name, module in packed.items():
        assert torch.equal(module.weight.data, expected[name].weight.data)
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.equal(whole(input_ids=ids).logits, read(input_ids=ids).logits)
