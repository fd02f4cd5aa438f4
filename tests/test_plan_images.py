"""Plans of every family against its loaded model, and how the largest image is cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from real_configs import CONFIGS
from tiny_models import TINY, make_model
from transformers import AutoConfig

from fedmllm.config import make_config
from fedmllm.data.images import MemoryImage
from fedmllm.errors import UserError
from fedmllm.models import minicpmv
from fedmllm.models.families import FAMILIES
from fedmllm.models.mllm import Mllm
from fedmllm.plan import make_plan
from fedmllm.plan.images import PREPROCESSOR, largest_image, read_settings
from fedmllm.plan.memory import Load, feature_cache, shapes_of
from fedmllm.plan.structure import build_skeleton, weight_bytes

SMALL = {"name": "small", "data": {"name": "memes", "train": 40, "test": 16}}
SIZES = ((256, 256), (288, 192))  # one of them is the largest of each tiny family
HALF = ("idefics3", "llava", "qwen2_vl", "qwen3_vl")  # in bfloat16


def picture(size: tuple[int, int]) -> MemoryImage:
    draw = Image.linear_gradient("L").resize(size).convert("RGB")
    return MemoryImage(f"picture {size}", lambda: draw)


@pytest.fixture(params=sorted(TINY))
def tiny(request, tmp_path) -> tuple[str, Path]:
    folder = make_model(request.param, tmp_path)
    if request.param.startswith("minicpmv "):  # slices of 16 patches in place of 1,024
        change(folder, scale_resolution=56)
    return request.param, folder


def change(folder: Path, **settings: Any) -> None:
    file = folder / PREPROCESSOR
    old = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**old, **settings}))


def test_every_family_has_a_recipe() -> None:
    assert {tiny.model_type or name for name, tiny in TINY.items()} == set(FAMILIES)


def test_a_plan_is_that_of_the_loaded_model(tiny) -> None:
    """Parameters, bytes, and of the largest image tokens, pixels and features, in two dtypes."""
    options: dict[str, Any] = {"rank": 2, "alpha": 2, "dropout": 0.0}
    name, folder = tiny
    dtype = "bfloat16" if name in HALF else "float32"
    skeleton = build_skeleton(folder, dtype=dtype, **options)
    mllm = Mllm.load("tiny", folder, dtype=getattr(torch, dtype), **options)
    held = [p for name, p in mllm.model.named_parameters() if ".lora_" not in name]
    assert skeleton.total == sum(p.numel() for p in held)
    buffers = sum(buffer.nbytes for buffer in mllm.base.buffers())
    assert weight_bytes(skeleton)["plain"] == sum(p.nbytes for p in held) + buffers
    adapter = mllm.get_adapter()
    assert {name: p.shape for name, p in skeleton.adapter.items()} == {
        name: p.shape for name, p in adapter.items()
    }
    assert 4 * skeleton.trainable == sum(p.nbytes for p in adapter.values())
    check_images(mllm, skeleton)


def check_images(mllm: Mllm, skeleton: Any) -> None:
    cut = largest_image(skeleton.config, skeleton.images, limit=2048)
    assert not cut.note
    shapes = shapes_of(skeleton, tokens=2048)
    seen = [mllm.image_features(picture(size)) for size in SIZES]
    most = max(len(image.features) for image in seen)
    assert most <= cut.slices * cut.tokens < most + cut.slices  # rounded up by slice
    largest = max(image.nbytes for image in seen)
    load = Load(
        tokens=2048,
        slices=cut.slices,
        batch=1,
        test_batch=1,
        dropout=0.0,
        itemsize=next(mllm.base.parameters()).itemsize,
        images=1,
    )
    assert feature_cache(shapes, load) * most == largest * cut.slices * cut.tokens
    read = [mllm.family.read(mllm.processor, picture(size).open())[1] for size in SIZES]
    pixels = max(torch.as_tensor(one["pixel_values"]).nbytes for one in read)
    assert cut.slices * shapes.N * shapes.p == pixels


# -- published settings, by hand -------------------------------------------------------------


LARGE = {"vision_config": {"image_size": 448, "patch_size": 14}}
CLIP = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}
SIGLIP = {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14}
CONFIG: dict[str, dict[str, Any]] = {
    **CONFIGS,
    "LLaVA-NeXT": {"model_type": "llava_next", "vision_config": CLIP},
    "LLaVA-OneVision": {"model_type": "llava_onevision", "vision_config": SIGLIP},
    "InternVL": {
        "model_type": "internvl",
        "vision_config": {"image_size": [448, 448], "patch_size": [14, 14]},
    },
    "Gemma 3": {"model_type": "gemma3", "vision_config": {**SIGLIP, "image_size": 896}},
    "LFM2-VL": {"model_type": "lfm2_vl", "vision_config": {"patch_size": 16}},
    "MiniCPM-V-4.6": {"model_type": "minicpmv4_6", **LARGE},
}
MINICPM = {"max_slice_nums": 9, "scale_resolution": 448, "slice_mode": True}
SMOL = {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}
TILES = {"tile_size": 512, "max_tiles": 10, "use_thumbnail": True}
# (slices, patches, tokens) of the largest image
BY_HAND: list[tuple[str, dict[str, Any], tuple[int, int, int]]] = [
    ("MiniCPM-V-2.6", MINICPM, (10, 1024, 64)),
    ("MiniCPM-V-2.6", {**MINICPM, "max_slice_nums": 4}, (5, 1024, 64)),
    ("MiniCPM-V-2.6", {**MINICPM, "max_slice_nums": 1}, (1, 1024, 64)),
    ("MiniCPM-V-2.6", {**MINICPM, "slice_mode": False}, (1, 1024, 64)),
    ("MiniCPM-Llama3-V-2.5", MINICPM, (10, 1024, 96)),
    ("MiniCPM-V-4.6", MINICPM, (10, 1024, 64)),
    ("MiniCPM-V-4.6", {**MINICPM, "downsample_mode": "4x"}, (10, 1024, 256)),
    ("SmolVLM-256M", SMOL, (17, 1024, 64)),
    ("SmolVLM-256M", {**SMOL, "do_image_splitting": False}, (1, 1024, 64)),
    ("Qwen2-VL-2B", {"max_pixels": 1344 * 896}, (1, 6144, 1536)),
    ("Qwen2-VL-2B", {"size": {"longest_edge": 1344 * 896}}, (1, 6144, 1536)),
    ("Qwen2-VL-2B", {"max_pixels": 12_845_056}, (1, 8192, 2048)),  # bounded by the sample
    ("LLaVA-1.5-7B", {}, (1, 576, 576)),
    ("LLaVA-NeXT", {}, (5, 576, 586)),  # 5 x 576 and 48 rows
    ("LLaVA-OneVision", {}, (37, 729, 221)),  # 10 tiles as they are: 11 x 729 and 135 rows
    ("InternVL", {"max_patches": 12}, (13, 1024, 256)),
    ("InternVL", {"max_patches": 1}, (1, 1024, 256)),
    ("Gemma 3", {}, (1, 4096, 256)),
    ("LFM2-VL", TILES, (11, 1024, 256)),
    ("LFM2-VL", {**TILES, "use_thumbnail": False}, (10, 1024, 256)),
    ("LFM2-VL", {"do_image_splitting": False}, (1, 1024, 256)),
]


def config_of(name: str) -> Any:
    minicpmv.register()
    return AutoConfig.for_model(**CONFIG[name])


@pytest.mark.parametrize(("name", "settings", "expected"), BY_HAND)
def test_the_largest_image_is_cut_as_the_settings_say(name, settings, expected) -> None:
    cut = largest_image(config_of(name), settings, limit=2048)
    assert (cut.slices, cut.patches, cut.tokens) == expected


def test_what_is_assumed_of_images_is_said() -> None:
    smol = largest_image(config_of("SmolVLM-256M"), {}, limit=2048)
    assert smol.slices == 17
    assert "no preprocessor_config.json" in smol.note
    assert "idefics3" in smol.note
    assert not largest_image(config_of("SmolVLM-256M"), SMOL, limit=2048).note
    assert not largest_image(config_of("LLaVA-1.5-7B"), {}, limit=2048).note
    qwen = largest_image(config_of("Qwen2-VL-2B"), {"max_pixels": 12_845_056}, limit=1200)
    assert "16,384 tokens" in qwen.note
    assert "1,200" in qwen.note
    assert largest_image(config_of("Qwen2-VL-2B"), {}, limit=2048).tokens == 1280


def test_a_plan_reads_the_settings_beside_the_config(tmp_path) -> None:
    def plan(**options: Any):
        model = {"name": "real", "path": str(tmp_path)}
        return make_plan(make_config({**SMALL, "model": model}), **options)

    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["MiniCPM-V-2.6"]))
    found = plan()
    assert found.load.slices == 10
    assert any("no preprocessor_config.json" in note for note in found.notes)
    assert not any("no preprocessor_config.json" in note for note in plan(slices=3).notes)
    change(tmp_path, **MINICPM, max_slices=None)
    change(tmp_path, max_slice_nums=4)
    found = plan()
    assert found.load.slices == 5
    assert not any("preprocessor" in note for note in found.notes)
    nested = {"image_processor": {"max_slice_nums": 2}}  # goes first, as in transformers
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert plan().load.slices == 3


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"max_slice_nums": "four"}', '{"scale_resolution": 4}']
)
def test_bad_settings_are_said_in_words(text, tmp_path) -> None:
    (tmp_path / PREPROCESSOR).write_text(text)
    config = config_of("MiniCPM-V-2.6")
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        largest_image(config, read_settings(tmp_path), limit=2048)
