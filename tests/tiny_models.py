"""Tiny random models of each family in `FAMILIES`, as folders like those of the hub.

Real configuration, model, tokeniser and image processor classes; widths of 32, two to four layers,
a vocabulary of bytes. The processor is written as its settings, since some of its classes cannot
be built on a machine without torchvision.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from minicpmv_checkpoint import published_folder
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForImageTextToText, GemmaTokenizer, LlamaTokenizer, Qwen2Tokenizer

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "attention_dropout": 0.5,  # must never be felt: the tower is frozen
}
QWEN_VISION = {"depth": 2, "num_heads": 4, "patch_size": 8, "temporal_patch_size": 2}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


def chatml(image: str, *, opening: str = "") -> str:
    """A ChatML template with the family's way of writing an image."""
    return (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}{{ '\\n' }}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        + image
        + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}" + opening + "{% endif %}"
    )


# roles as plain words, a space after an answer, nothing that ends it; BOS from the tokeniser
VICUNA = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{{ '\\n' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% else %}ASSISTANT: "
    "{{ message['content'][0]['text'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else 'user' }}{{ '\\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<start_of_image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end_of_turn>{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model{{ '\\n' }}{% endif %}"
)
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


@dataclass(frozen=True)
class Tiny:
    """A family's recipe.

    adapted: the modules that LoRA must find. tokens: of the two pictures of the tests (48 x 32
    and 32 x 64), counted by hand. config takes the image token's id. build: writes the whole
    folder, in place of all that follows it here. model_type: the entry, if not of the same name.
    """

    adapted: dict[str, int]
    tokens: tuple[int, int]
    model_type: str = ""
    build: Callable[[Path], Path] | None = None
    tokenizer: type = Qwen2Tokenizer
    specials: dict[str, str] = field(default_factory=dict)
    image_token: str = ""
    config: Callable[[int], dict[str, Any]] = lambda image: {}
    image_processor: tuple[str, dict[str, Any]] = ("", {})
    template: str | None = None
    processor: dict[str, Any] = field(default_factory=dict)
    plain_specials: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")


def attention(prefix: str, count: int = 2, last: str = "o_proj") -> dict[str, int]:
    names = ("q_proj", "k_proj", "v_proj", last)
    return {f"{prefix}.layers.*.self_attn.{name}": count for name in names}


LANGUAGE = attention("model.language_model")
# Qwen3.5's text model: a layer of linear attention, a layer of softmax attention
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}
HYBRID = {
    **attention("model.language_model", count=1),
    "model.language_model.layers.*.linear_attn.in_proj_qkv": 1,
    "model.language_model.layers.*.linear_attn.out_proj": 1,
}
SLICES = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
    **{f"cell_{r}_{c}": f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)},
}
SQUARE = {"size": {"height": 32, "width": 32}}


def idefics3(name: str, image_processor: str, split: bool) -> Tiny:
    """Split: an edge of 64 pixels, in cells of 32, and the whole; 4 tokens each."""
    size = {"longest_edge": 64 if split else 32}
    return Tiny(
        tokenizer=Qwen2Tokenizer,
        specials=SLICES,
        image_token="<image>",
        config=lambda image: {
            "model_type": name,
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": VISION,
            "scale_factor": 2,
            "image_token_id": image,
        },
        image_processor=(
            image_processor,
            {
                "size": size,
                "max_image_size": {"longest_edge": 32},
                "do_image_splitting": split,
            },
        ),
        adapted=attention("model.text_model"),
        tokens=(20, 12) if split else (4, 4),
        template=chatml("<image>"),
        processor={"processor_class": "Idefics3Processor", "image_seq_len": 4},
    )


def qwen(
    name: str,
    vision: dict[str, Any],
    *,
    text: dict[str, Any] | None = None,
    adapted: dict[str, int] | None = None,
) -> Tiny:
    """One token for 16 x 16 pixels, as many as the picture has."""
    return Tiny(
        tokenizer=Qwen2Tokenizer,
        specials={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_start": "<|vision_start|>",
            "vision_end": "<|vision_end|>",
        },
        image_token="<|image_pad|>",
        config=lambda image: {
            "model_type": name,
            "text_config": {**TEXT, "rope_parameters": MROPE, **(text or {})},
            "vision_config": {**QWEN_VISION, **vision},
            "image_token_id": image,
            "video_token_id": image + 1,
            "vision_start_token_id": image + 2,
            "vision_end_token_id": image + 3,
        },
        image_processor=(
            "Qwen2VLImageProcessorPil",
            {
                "patch_size": 8,
                "merge_size": 2,
                "temporal_patch_size": 2,
                "size": {"shortest_edge": 256, "longest_edge": 4096},
            },
        ),
        adapted=adapted or LANGUAGE,
        tokens=(6, 8),
        template=chatml(QWEN_IMAGE),
    )


TINY: dict[str, Tiny] = {
    "idefics3": idefics3("idefics3", "Idefics3ImageProcessorPil", split=False),
    "smolvlm": idefics3("smolvlm", "SmolVLMImageProcessorPil", split=True),
    "llava": Tiny(
        tokenizer=LlamaTokenizer,
        specials={"image_token": "<image>"},
        image_token="<image>",
        config=lambda image: {
            "model_type": "llava",
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {"model_type": "clip_vision_model", **VISION},
            "image_token_index": image,
        },
        image_processor=(
            "CLIPImageProcessorPil",
            {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
        ),
        adapted=LANGUAGE,
        tokens=(16, 16),
        template=VICUNA,
        processor={
            "patch_size": 8,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
    ),
    "llava_next": Tiny(
        tokenizer=LlamaTokenizer,
        specials={"image_token": "<image>"},
        image_token="<image>",
        config=lambda image: {
            "model_type": "llava_next",
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {"model_type": "clip_vision_model", **VISION},
            "image_token_index": image,
            "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]],
        },
        image_processor=(
            "LlavaNextImageProcessorPil",
            {
                "size": {"shortest_edge": 32},
                "crop_size": {"height": 32, "width": 32},
                "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]],
            },
        ),
        adapted=LANGUAGE,
        tokens=(44, 56),  # as LLaVA-OneVision
        template=VICUNA,
        processor={
            "patch_size": 8,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
    ),
    "llava_onevision": Tiny(
        tokenizer=Qwen2Tokenizer,
        specials={"image_token": "<image>", "video_token": "<video>"},
        image_token="<image>",
        config=lambda image: {
            "model_type": "llava_onevision",
            "text_config": {"model_type": "qwen2", **TEXT},
            "vision_config": {
                "model_type": "siglip_vision_model",
                "vision_use_head": False,
                **VISION,
            },
            "image_token_index": image,
            "video_token_index": image + 1,
            "image_grid_pinpoints": [[32, 32], [32, 64], [64, 32], [64, 64]],
        },
        image_processor=(
            "LlavaOnevisionImageProcessorPil",
            {**SQUARE, "image_grid_pinpoints": [[32, 32], [32, 64], [64, 32], [64, 64]]},
        ),
        adapted=LANGUAGE,
        tokens=(44, 56),  # whole 16, cut 4 x 6 + 4 newlines; 16, 8 x 4 + 8
        template=chatml("<image>"),
        processor={
            "num_image_tokens": 16,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
        },
    ),
    "qwen2_vl": qwen("qwen2_vl", {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}),
    "qwen2_5_vl": qwen(
        "qwen2_5_vl",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": 32,
            "window_size": 32,
            "fullatt_block_indexes": [1],
        },
    ),
    "qwen3_vl": qwen(
        "qwen3_vl",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": 32,
            "deepstack_visual_indexes": [0, 1],
            "num_position_embeddings": 16,
        },
    ),
    "qwen3_5": qwen(
        "qwen3_5",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
        },
        text={**LINEAR, "head_dim": 16, "rope_parameters": {**MROPE, "partial_rotary_factor": 0.5}},
        adapted=HYBRID,
    ),
    "internvl": Tiny(
        tokenizer=Qwen2Tokenizer,
        specials={
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
        },
        image_token="<IMG_CONTEXT>",
        config=lambda image: {
            "model_type": "internvl",
            "text_config": {"model_type": "qwen2", **TEXT},
            "vision_config": {**VISION, "image_size": [32, 32], "patch_size": [8, 8]},
            "image_token_id": image,
            "image_seq_length": 4,
        },
        image_processor=(
            "GotOcr2ImageProcessorPil",
            {**SQUARE, "crop_to_patches": True, "min_patches": 1, "max_patches": 4},
        ),
        adapted=LANGUAGE,
        tokens=(12, 12),  # two halves and the whole, 4 each
        template=chatml("<IMG_CONTEXT>{{ '\\n' }}"),
        processor={"image_seq_length": 4},
    ),
    "gemma3": Tiny(
        tokenizer=GemmaTokenizer,
        specials={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
        image_token="<image_soft_token>",
        config=lambda image: {
            "model_type": "gemma3",
            "text_config": {
                **TEXT,
                "sliding_window": 16,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "vision_config": {
                "model_type": "siglip_vision_model",
                "vision_use_head": False,
                **VISION,
            },
            "mm_tokens_per_image": 4,
            "image_token_index": image,
            "boi_token_index": image + 1,
            "eoi_token_index": image + 2,
        },
        image_processor=("Gemma3ImageProcessorPil", SQUARE),
        adapted=LANGUAGE,
        tokens=(4, 4),
        template=GEMMA,
        processor={"image_seq_length": 4},
        plain_specials=("<start_of_turn>", "<end_of_turn>"),
    ),
    "paligemma": Tiny(
        tokenizer=GemmaTokenizer,
        specials={"image_token": "<image>"},
        image_token="<image>",
        config=lambda image: {
            "model_type": "paligemma",
            "text_config": {"model_type": "gemma", **TEXT},
            "vision_config": {
                "model_type": "siglip_vision_model",
                "vision_use_head": False,
                "projection_dim": 32,
                **VISION,
            },
            "projection_dim": 32,
            "image_token_index": image,
        },
        image_processor=("SiglipImageProcessorPil", {**SQUARE, "image_seq_length": 16}),
        adapted=LANGUAGE,
        tokens=(16, 16),
        template=None,
        plain_specials=(),
    ),
    "lfm2_vl": Tiny(
        tokenizer=Qwen2Tokenizer,
        specials={
            "image_token": "<image>",
            "image_start_token": "<|image_start|>",
            "image_end_token": "<|image_end|>",
            "image_thumbnail": "<|img_thumbnail|>",
            **{f"cell_{r}_{c}": f"<|img_row_{r}_col_{c}|>" for r in (1, 2) for c in (1, 2)},
        },
        image_token="<image>",
        config=lambda image: {
            "model_type": "lfm2_vl",
            "text_config": {
                **TEXT,
                "num_hidden_layers": 3,
                "layer_types": ["full_attention", "conv", "full_attention"],
            },
            "vision_config": {**VISION, "num_patches": 16, "vision_use_head": False},
            "projector_hidden_size": 32,
            "image_token_id": image,
        },
        image_processor=(
            "Lfm2VlImageProcessor",
            {
                "encoder_patch_size": 8,
                "tile_size": 32,
                "min_image_tokens": 2,
                "max_image_tokens": 6,
                "max_pixels_tolerance": 1.0,
                "max_tiles": 4,
            },
        ),
        adapted=attention("model.language_model", last="out_proj"),
        processor={"processor_class": "Lfm2VlProcessor"},
        tokens=(6, 11),
        template=chatml("<image>"),
    ),
    "minicpmv4_6": Tiny(
        tokenizer=Qwen2Tokenizer,
        specials={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "image_start_token": "<image>",
            "image_end_token": "</image>",
            "slice_start_token": "<slice>",
            "slice_end_token": "</slice>",
            "image_id_start_token": "<image_id>",
            "image_id_end_token": "</image_id>",
        },
        image_token="<|image_pad|>",
        config=lambda image: {
            "model_type": "minicpmv4_6",
            "text_config": {
                **TEXT,
                **LINEAR,
            },
            "vision_config": {**VISION, "image_size": 64},
            "insert_layer_id": 0,
            "image_token_id": image,
            "video_token_id": image + 1,
        },
        image_processor=(
            "MiniCPMV4_6ImageProcessorPil",
            {"patch_size": 8, "scale_resolution": 32, "max_slice_nums": 4},
        ),
        adapted=HYBRID,
        tokens=(3, 3),  # the whole and two slices, 1 each
        # a generation prompt with an empty thought, which a finished turn does not show
        template=chatml("<|image_pad|>", opening="<think>{{ '\\n\\n' }}</think>{{ '\\n\\n' }}"),
    ),
}


def minicpmv(version: str) -> Tiny:
    """The published layout of MiniCPM-V, which has a recipe of its own; one slice, 4 tokens."""
    return Tiny(
        model_type="minicpmv",
        adapted=attention("llm.model"),
        tokens=(4, 4),
        build=lambda folder: published_folder(folder, version),
    )


TINY["minicpmv 2.5"] = minicpmv("2.5")
TINY["minicpmv 2.6"] = minicpmv("2.6")


def make_tokenizer(tiny: Tiny) -> Any:
    """Bytes for letters; the family's special tokens from 3 on, the image's first of the named."""
    if tiny.tokenizer is Qwen2Tokenizer:
        start = {"<pad>": 0, "<bos>": 1, "<eos>": 2}
        letters = sorted(ByteLevel.alphabet())
        names: dict[str, Any] = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<pad>"}
    elif tiny.tokenizer is LlamaTokenizer:
        start = {"<unk>": 0, "<s>": 1, "</s>": 2}
        letters = ["▁", *(f"<0x{i:02X}>" for i in range(256)), *map(chr, range(33, 127))]
        names = {"add_bos_token": True}  # and no padding token, as in Llama
    else:
        start = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3, "<mask>": 4}
        letters = [
            "▁",
            "\n",
            "\n\n",
            *(f"<0x{i:02X}>" for i in range(256)),
            *map(chr, range(33, 127)),
        ]
        names = {"add_bos_token": True}
    merges = [("\n", "\n")] if "\n\n" in letters else []
    vocab = {**start, **{letter: i for i, letter in enumerate(letters, start=len(start))}}
    tokenizer = tiny.tokenizer(vocab=vocab, merges=merges, **names)
    tokenizer.add_tokens(list(tiny.specials.values()), special_tokens=True)
    tokenizer.add_tokens(list(tiny.plain_specials), special_tokens=True)
    return tokenizer


def make_model(name: str, folder: Path) -> Path:
    """Write a random model of the family with its processor's settings."""
    tiny = TINY[name]
    if tiny.build is not None:
        return tiny.build(folder)
    tokenizer = make_tokenizer(tiny)
    image = tokenizer.convert_tokens_to_ids(tiny.image_token)
    settings = tiny.config(image)
    settings["text_config"]["vocab_size"] = len(tokenizer)
    config = transformers.AutoConfig.for_model(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config)
        for parameter in model.parameters():  # far from zero, so that a wrong input shows
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps({**written, "extra_special_tokens": tiny.specials}))
    kind, options = tiny.image_processor
    images = {"image_processor_type": kind, **options}
    if tiny.processor:  # as checkpoints of transformers 5 are, in one file
        whole = {**tiny.processor, "image_processor": images}
        (folder / "processor_config.json").write_text(json.dumps(whole))
    else:  # as older ones are
        (folder / "preprocessor_config.json").write_text(json.dumps(images))
    if tiny.template is not None:
        (folder / "chat_template.jinja").write_text(tiny.template)
    return folder
