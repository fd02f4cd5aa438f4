"""Checkpoints in the published layout through the Auto classes, PEFT and `Mllm`; bad ones named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from minicpmv_checkpoint import (
    PUBLISHED_SIZES,
    PUBLISHED_TOWER,
    published_folder,
    tiny_config,
)
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from fedmllm.data.images import MemoryImage
from fedmllm.data.sample import Sample, Task
from fedmllm.errors import UserError
from fedmllm.models.loading import load_base
from fedmllm.models.lora import lora_targets
from fedmllm.models.minicpmv import (
    MiniCPMVConfig,
    MiniCPMVForConditionalGeneration,
    MiniCPMVProcessor,
)
from fedmllm.models.mllm import Mllm
from fedmllm.prompts import render

DATA = Path(__file__).parent / "data" / "minicpmv"
VERSIONS = ["2.6", "2.5"]
PICTURE = Image.new("RGB", (500, 300), (200, 30, 30))


@pytest.fixture(scope="module", params=VERSIONS)
def folder(request, tmp_path_factory) -> Path:
    return published_folder(tmp_path_factory.mktemp("minicpmv") / request.param, request.param)


def mixed_batch(processor: MiniCPMVProcessor) -> dict:
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [*image, {"type": "text", "text": "what is it?"}]}],
            add_generation_prompt=True,
        )
        for image in ([{"type": "image"}], [])
    ]
    return processor(
        text=texts, images=[[PICTURE], []], return_tensors="pt", padding=True, padding_side="right"
    )


@torch.no_grad()
def test_auto_classes_read_the_published_layout(folder, tmp_path) -> None:
    """Without the remote code that `auto_map` points to; then saved, and read again."""
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    assert type(config) is MiniCPMVConfig
    assert type(model) is MiniCPMVForConditionalGeneration
    assert type(processor) is MiniCPMVProcessor
    assert AutoTokenizer.from_pretrained(folder)("<image>", add_special_tokens=False)[
        "input_ids"
    ] == [257]
    inputs = mixed_batch(processor)
    expected = model(**inputs).logits
    assert torch.isfinite(expected).all()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    inputs_again = mixed_batch(AutoProcessor.from_pretrained(tmp_path))
    assert all(torch.equal(inputs[key], inputs_again[key]) for key in inputs)
    assert torch.equal(again(**inputs_again).logits, expected)
    flat = json.loads((tmp_path / "config.json").read_text())
    assert "text_config" not in flat
    assert flat["hidden_size"] == 128


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_loading_leaves_nothing_uninitialised(folder, attention) -> None:
    """`from_pretrained` builds the model without memory; it must end as one built at once."""
    loaded = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    ).eval()
    config = json.loads((folder / "config.json").read_text())
    built = MiniCPMVForConditionalGeneration(
        MiniCPMVConfig(**config, attn_implementation=attention)
    ).eval()
    built.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    for model in (loaded, built):
        assert model.llm.config._attn_implementation == attention
        assert model.vpm.config._attn_implementation == attention
    buffers = dict(built.named_buffers())
    assert {name for name, _ in loaded.named_buffers()} == buffers.keys()
    assert all(torch.equal(value, buffers[name]) for name, value in loaded.named_buffers())
    inputs = mixed_batch(AutoProcessor.from_pretrained(folder))
    assert torch.equal(loaded(**inputs).logits, built(**inputs).logits)


def test_keys_are_the_published_ones() -> None:
    for version, name in (("2.6", "v26"), ("2.5", "v25")):
        published = load_file(DATA / f"{name}_weights.safetensors")
        with torch.device("meta"):
            model = MiniCPMVForConditionalGeneration(
                MiniCPMVConfig(**tiny_config(version, queries=4))
            )
        assert model.state_dict().keys() == published.keys()


@pytest.mark.parametrize(("version", "billions"), [("2.6", 8.10), ("2.5", 8.54)])
def test_the_published_sizes_make_a_model_of_eight_billion(version, billions) -> None:
    """On the meta device: shapes only."""
    config = tiny_config(version, queries=4) | PUBLISHED_SIZES[version]
    with torch.device("meta"):
        model = MiniCPMVForConditionalGeneration(
            MiniCPMVConfig(**config | {"vision_config": PUBLISHED_TOWER})
        )
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e9 == pytest.approx(billions, abs=0.005)
    assert model.resampler.kv_proj.weight.shape == (model.config.hidden_size, 1152)
    assert model.resampler.attn.heads == {"2.6": 28, "2.5": 32}[version]


def test_the_published_configs_are_read(folder) -> None:
    config = AutoConfig.from_pretrained(folder)
    text = config.get_text_config()
    expected = {
        "2.6": ("qwen2", 1e6, 1e-6, 264),
        "2.5": ("llama", 5e5, 1e-5, 265),
    }[config.spec.name]
    rope = text.rope_parameters["rope_theta"]
    assert (text.model_type, rope, text.rms_norm_eps, text.eos_token_id) == expected
    assert config.vision_config.hidden_act == "gelu_pytorch_tanh"
    assert config.vision_config.layer_norm_eps == 1e-6
    assert config.slice_config["max_slice_nums"] == 9
    assert config.dtype == torch.bfloat16
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert model.generation_config.eos_token_id == expected[-1]


def test_defaults_are_the_published_sizes() -> None:
    for version, facts in (("2.6", (64, 128244, True)), (2.5, (96, 128002, False))):
        config = MiniCPMVConfig(version=version)
        spec = config.spec
        assert (config.query_num, config.image_token_id, spec.grid_positions) == facts
    assert MiniCPMVConfig(hidden_size=3584).hidden_size == 3584
    with pytest.raises(UserError, match=r"unknown MiniCPM-V version '4\.0': choose"):
        MiniCPMVConfig(version=4.0)


def test_a_tower_without_its_last_layer() -> None:
    config = {**tiny_config("2.6", queries=4), "drop_vision_last_layer": True}
    model = MiniCPMVForConditionalGeneration(MiniCPMVConfig(**config))
    assert len(model.vpm.encoder.layers) == 1


def test_a_prequantised_config_is_read_and_kept(folder, tmp_path) -> None:
    """Only its config: reading 4-bit weights needs bitsandbytes, which is not tested here."""
    quantisation = {
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_skip_modules": ["out_proj", "kv_proj", "lm_head"],
        "load_in_4bit": True,
        "quant_method": "bitsandbytes",
    }
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    published = json.loads((folder / "config.json").read_text())
    changed = {**published, "quantization_config": quantisation}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.quantization_config == quantisation
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["quantization_config"] == quantisation


# -- adapters ------------------------------------------------------------------------------------


@torch.no_grad()
def test_peft_adapts_the_language_models_attention_only(folder, tmp_path) -> None:
    base, processor = load_base(folder, dtype=torch.float32, device="cpu")
    target = lora_targets(base)
    assert target == r"llm\.model\.layers\.\d+\.self_attn\.(k_proj|o_proj|q_proj|v_proj)"
    inputs = mixed_batch(processor)
    before = base(**inputs).logits
    model = get_peft_model(base, LoraConfig(r=2, target_modules=target, task_type="CAUSAL_LM"))
    adapted = {n.split(".lora_")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert len(adapted) == 2 * 4
    pattern = r"base_model\.model\.llm\.model\.layers\.[01]\.self_attn\.[qkvo]_proj"
    assert all(re.fullmatch(pattern, name) for name in adapted)
    torch.testing.assert_close(model(**inputs).logits, before)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.1)
    changed = model(**inputs).logits
    assert not torch.allclose(changed, before)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    base = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(plain.eval()(**inputs).logits, changed)


def test_lora_learns_under_gradient_checkpointing(folder) -> None:
    """Frozen embeddings, inputs made to require gradients, images in the batch: as users train."""
    base, processor = load_base(folder, dtype=torch.float32, device="cpu")
    inputs = mixed_batch(processor)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=lora_targets(base)))
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            base.gradient_checkpointing_enable({"use_reentrant": False})
            base.enable_input_require_grads()
        model.train().zero_grad()
        model(**inputs, labels=labels).loss.backward()
        kept = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        gradients.append(kept)
    plain, saved = gradients
    assert any(value.any() for value in plain.values())
    for name, value in plain.items():
        torch.testing.assert_close(saved[name], value, atol=1e-7, rtol=1e-5)


TASK = Task("vqa", "choice", "accuracy", ("red", "blue"), "What colour is it?{modality}")


def samples() -> list[Sample]:
    picture = MemoryImage("red", lambda: PICTURE)
    return [
        Sample(id="both", answer="red", text="a red thing", image=picture, label=0),
        Sample(id="image", answer="red", image=picture, label=0),
        Sample(id="text", answer="blue", text="a blue thing!", label=1),
    ]


def test_mllm_takes_the_checkpoint_as_it_is(folder) -> None:
    """Cached features in mixed batches give what the processor's own path gives, one by one."""
    mllm = Mllm.load("minicpmv", folder, rank=2)
    params = mllm.init_adapter(0)
    generator = torch.Generator().manual_seed(1)
    for name, value in params.items():
        if "lora_B" in name:
            value.normal_(std=0.1, generator=generator)
    mllm.set_adapter(params)
    prompted = [render(sample, TASK) for sample in samples()]
    items = [mllm.encode(p) for p in prompted]
    scores = mllm.score_options(items)
    processor = mllm.processor
    for prompt, score in zip(prompted, scores, strict=True):
        user = prompt.turns[0][0]
        content = [{"type": "text", "text": user.removeprefix("<image>\n")}]
        images = []
        if prompt.sample.image is not None:
            content.insert(0, {"type": "image"})
            images = [PICTURE]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = processor(text=text + "(", images=images, return_tensors="pt")
        with torch.no_grad():
            logits = mllm.model(**inputs).logits[0, -1]
        letters = [processor.tokenizer.convert_tokens_to_ids(letter) for letter in "AB"]
        torch.testing.assert_close(score, logits[letters].softmax(-1), atol=1e-5, rtol=1e-4)
    together = mllm.loss_sum(items)
    apart = torch.stack([mllm.loss_sum([item]) for item in items]).sum()
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-5)
    together.backward()
    assert all(p.grad is not None and p.grad.any() for p in mllm.trainable.values())
    batched = mllm.generate(items, max_new_tokens=4)
    assert batched == [mllm.generate([item], max_new_tokens=4)[0] for item in items]


# -- bad checkpoints -----------------------------------------------------------------------------


def broken(folder: Path, target: Path, change) -> Path:
    """A copy of a checkpoint with other weights."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("resampler.query"), r"lacks 1 tensors, e\.g\. resampler\.query"),
        (lambda w: w.update(extra=torch.zeros(2)), r"has 1 unknown tensors, e\.g\. extra"),
        (
            lambda w: w.update({"resampler.query": torch.zeros(3, 128)}),
            r"resampler\.query is \(3, 128\), the model needs \(4, 128\)",
        ),
        (
            lambda w: w.update({"llm.lm.weight": w.pop("llm.lm_head.weight")}),
            r"lacks 1 tensors, e\.g\. llm\.lm_head\.weight; has 1 unknown .* llm\.lm\.weight",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named(folder, tmp_path, change, message) -> None:
    bad = broken(folder, tmp_path, change)
    with pytest.raises(UserError, match=message):
        load_base(bad, dtype=torch.float32, device="cpu")
    load_base(folder, dtype=torch.float32, device="cpu")
