"""Slicing, pixels and placeholder text against what the published processors gave."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from minicpmv_checkpoint import CONTROL, preprocessor_file, tiny_config, tokenizer_files
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import (
    MiniCPMV4_6ImageProcessorPil,
)

from fedmllm.errors import UserError
from fedmllm.models.minicpmv import MiniCPMVImageProcessor, MiniCPMVProcessor
from fedmllm.models.minicpmv.image_processing import cell_size, fitted_size, patchify, slice_grid

DATA = Path(__file__).parent / "data" / "minicpmv"
SLICING = json.loads((DATA / "slicing.json").read_text())["cases"]
PIXELS = json.loads((DATA / "pixels.json").read_text())["images"]


def drawn(width: int, height: int) -> Image.Image:
    """The image that pixels.json describes."""
    x = np.arange(width)[None, :] + np.zeros((height, 1), dtype=int)
    y = np.arange(height)[:, None] + np.zeros((1, width), dtype=int)
    channels = [7 * x + 13 * y, x * x // 5 + 3 * y, ((x // 4) ^ (y // 4)) * 5]
    return Image.fromarray((np.stack(channels, axis=-1) % 256).astype(np.uint8))


@pytest.mark.parametrize("case", SLICING, ids=lambda c: f"{c['size']}-{c['max_slice_nums']}")
def test_slicing_is_the_published_one(case) -> None:
    size, most = tuple(case["size"]), case["max_slice_nums"]
    grid = slice_grid(size, most)
    assert grid == (tuple(case["grid"]) if case["grid"] else None)
    source = fitted_size(size, upscale=grid is None)
    assert source == tuple(case["source_size"])
    sizes = [source]
    if grid:
        cell = cell_size(size, grid)
        assert cell == tuple(case["slice_size"])
        assert (cell[0] * grid[0], cell[1] * grid[1]) == tuple(case["refine_size"])
        sizes += [cell] * (grid[0] * grid[1])
    assert [[h // 14, w // 14] for w, h in sizes] == case["tgt_sizes"]
    assert len(sizes) == case["num_slices"]


@pytest.mark.parametrize("version", ["2.6", "2.5"])
@pytest.mark.parametrize("case", SLICING, ids=lambda c: f"{c['size']}-{c['max_slice_nums']}")
def test_placeholder_text_is_the_published_one(case, version) -> None:
    processor = MiniCPMVImageProcessor(version=version, max_slice_nums=case["max_slice_nums"])
    text = processor.placeholder(processor.grid(tuple(case["size"])))
    name = "v" + version.replace(".", "")
    count = processor.image_feature_size
    assert text == case[f"placeholder_{name}"].replace("{U}", "<unk>" * count)
    assert text.count("<unk>") == case[f"num_unk_{name}"]


@pytest.mark.parametrize("case", PIXELS, ids=lambda c: str(c["size"]))
def test_pixels_are_the_published_ones(case) -> None:
    processor = MiniCPMVImageProcessor(version=2.6)
    inputs = processor(drawn(*case["size"]), return_tensors="pt")
    assert len(inputs["pixel_values"]) == len(case["slices"])
    for padded, (h, w), told in zip(
        inputs["pixel_values"], inputs["tgt_sizes"].tolist(), case["slices"], strict=True
    ):
        pixels = padded[..., : h * w * 14]
        assert list(pixels.shape) == told["shape"]
        assert not padded[..., h * w * 14 :].any()
        levels = ((pixels * 0.5 + 0.5) * 255).round().to(torch.uint8).contiguous()
        assert hashlib.sha1(levels.numpy().tobytes()).hexdigest() == told["sha1_u8"]
        values = pixels.flatten()[told["idx"]]
        torch.testing.assert_close(values, torch.tensor(told["values"]), atol=2e-7, rtol=0)
        assert float(pixels.double().mean()) == pytest.approx(told["mean"], abs=1e-6)
        assert float(pixels.double().std()) == pytest.approx(told["std"], abs=1e-6)


def test_a_patch_is_a_block_of_the_image() -> None:
    image = np.arange(3 * 28 * 42).reshape(3, 28, 42)
    patches = patchify(image)
    assert patches.shape == (3, 14, 14 * 6)
    np.testing.assert_array_equal(patches[..., 14 * 4 : 14 * 5], image[:, 14:, 14:28])


def test_cells_are_cut_row_by_row() -> None:
    image = Image.new("RGB", (900, 900))
    for level, corner in enumerate([(0, 0), (450, 0), (0, 450), (450, 450)]):
        image.paste((60 * level,) * 3, (*corner, corner[0] + 450, corner[1] + 450))
    processor = MiniCPMVImageProcessor()
    views = processor.views(image, processor.grid(image.size))
    assert [view.getpixel((200, 200))[0] for view in views[1:]] == [0, 60, 120, 180]


@pytest.mark.parametrize("most", [9, 4])
def test_sizes_are_those_of_the_later_versions_processor(most) -> None:
    """Oracle: transformers' processor of 4.6, with multiples of 14 (3.5 x 4) instead of 56."""
    theirs = MiniCPMV4_6ImageProcessorPil()
    options = {"scale_resolution": 448, "patch_size": 3.5, "downsample_mode": "16x"}
    random = np.random.default_rng(0)
    sizes = [(500, 500), (1100, 1100), *random.integers(1, 2500, (1500, 2)).tolist()]
    for width, height in sizes:
        grid = slice_grid((width, height), most)
        expected = theirs.get_sliced_grid((height, width), most, 448)
        assert grid == (expected and (expected[1], expected[0]))
        if grid is None:
            size = fitted_size((width, height), upscale=True)
            best = theirs.find_best_resize((height, width), **options, allow_upscale=True)
        else:
            cell = cell_size((width, height), grid)
            size = (cell[0] * grid[0], cell[1] * grid[1])
            best = theirs.get_refine_size((height, width), expected, **options, allow_upscale=True)
        assert size == (best[1], best[0])


def test_slices_can_be_bounded_or_switched_off() -> None:
    processor = MiniCPMVImageProcessor()
    image = drawn(640, 480)
    for options, count in (
        ({}, 3),
        ({"max_slice_nums": 1}, 1),
        ({"slice_mode": False}, 1),
        ({"max_slice_nums": 2}, 3),
    ):
        assert len(processor(image, **options)["tgt_sizes"]) == count
    assert len(MiniCPMVImageProcessor(max_slice_nums=1)(image)["tgt_sizes"]) == 1
    assert "<image_id>" not in MiniCPMVImageProcessor(use_image_id=False).placeholder(None)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK"])
def test_every_mode_of_image_is_read(mode) -> None:
    inputs = MiniCPMVImageProcessor()(Image.new("RGB", (20, 30)).convert(mode))
    assert inputs["pixel_values"].shape[1:3] == (3, 14)
    assert np.isfinite(inputs["pixel_values"]).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (1, 449 * 449)])
def test_odd_shapes_still_give_whole_patches(size) -> None:
    inputs = MiniCPMVImageProcessor()(Image.new("RGB", size))
    assert (inputs["tgt_sizes"] >= 1).all()
    longest = int(inputs["tgt_sizes"].prod(axis=1).max())
    assert inputs["pixel_values"].shape[-1] == 14 * longest


def test_what_is_no_image_is_named() -> None:
    with pytest.raises(ValueError, match="must be a PIL image"):
        MiniCPMVImageProcessor()([1.5])


@pytest.fixture(params=["2.6", "2.5"])
def processor(request, tmp_path) -> MiniCPMVProcessor:
    tokenizer_files(tmp_path, request.param)
    preprocessor_file(tmp_path, request.param, queries=3)
    config = tiny_config(request.param, queries=3)
    (tmp_path / "config.json").write_text(json.dumps(config))
    return MiniCPMVProcessor.from_pretrained(tmp_path)


def ask(text: str, images: int = 1) -> list[dict]:
    content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


EXPECTED = {
    "2.6": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<image>\nWhat is it? <|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
    "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n",
    "2.5": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is it?"
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nAnd now?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
}


def test_chat_format(processor) -> None:
    messages = [
        *ask("What is it? "),
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": "And now?"},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == EXPECTED[str(processor.image_processor.version)]


def test_a_given_system_turn_replaces_the_default_one(processor) -> None:
    turns = [{"role": "system", "content": "Be brief."}, *ask("hi", 0)]
    text = processor.apply_chat_template(turns)
    assert text.count("system") == 1
    assert "Be brief." in text
    assert "helpful" not in text


def test_processor_makes_a_mixed_batch(processor) -> None:
    texts = [
        processor.apply_chat_template(ask("two", 2), add_generation_prompt=True),
        processor.apply_chat_template(ask("none", 0), add_generation_prompt=True),
        processor.apply_chat_template(ask("one", 1), add_generation_prompt=True),
    ]
    small, large = drawn(40, 30), drawn(640, 480)
    nested = processor(
        text=texts,
        images=[[small, large], [], [small]],
        return_tensors="pt",
        padding=True,
        padding_side="right",
    )
    flat = processor(
        text=texts,
        images=[small, large, small],
        return_tensors="pt",
        padding=True,
        padding_side="right",
    )
    assert all(torch.equal(nested[key], flat[key]) for key in nested)
    assert set(nested) == {"input_ids", "attention_mask", "pixel_values", "tgt_sizes"}
    assert len(nested["tgt_sizes"]) == 1 + 3 + 1
    placeholders = (nested["input_ids"] == 256).sum(1)
    assert placeholders.tolist() == [3 * 4, 0, 3 * 1]
    lengths = nested["attention_mask"].sum(1)
    assert nested["attention_mask"][1, : lengths[1]].all()  # on the right
    bos = processor.tokenizer.convert_tokens_to_ids("<|begin_of_text|>")
    if processor.image_processor.version == 2.5:
        assert (nested["input_ids"] == bos).sum(1).tolist() == [1, 1, 1]
    words = processor.tokenizer.decode(nested["input_ids"][0])
    if processor.image_processor.version == 2.6:  # images are numbered within a text
        assert words.index("<image_id>0</image_id>") < words.index("<image_id>1</image_id>")
        assert "<image_id>0</image_id>" in processor.tokenizer.decode(nested["input_ids"][2])


def test_left_padding_and_tokenised_chat(processor) -> None:
    inputs = processor(
        text=["a longer text", "x"], return_tensors="pt", padding=True, padding_side="left"
    )
    assert inputs["attention_mask"][1].tolist() == [0] * 12 + [1]
    assert "pixel_values" not in inputs
    picture = drawn(40, 30)
    messages = ask("what?")
    messages[0]["content"][0] = {"type": "image", "image": picture}
    tokens = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    text = processor.apply_chat_template(ask("what?"), add_generation_prompt=True)
    direct = processor(text=text, images=picture, return_tensors="pt")
    assert all(torch.equal(tokens[key], direct[key]) for key in direct)


def test_an_image_reads_the_same_alone_and_in_its_text(processor) -> None:
    """A cache keeps an image's tokens and puts them where the text has `<image>`."""
    picture = drawn(448, 896)
    alone = processor(text=processor.image_token, images=[picture], return_tensors="pt")
    text = processor.apply_chat_template(ask("what?"), add_generation_prompt=True)
    whole = processor(text=text, images=[[picture]])["input_ids"][0]
    bare = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    at = bare.index(processor.image_token_id)
    assert [*bare[:at], *alone["input_ids"][0].tolist(), *bare[at + 1 :]] == whole
    assert bare.count(processor.image_token_id) == 1


def test_texts_and_images_that_do_not_fit_are_named(processor) -> None:
    picture = drawn(40, 30)
    for text, images in (
        (["<image>"], None),
        (["none"], [picture]),
        (["<image>", "x"], [[], [picture]]),
        (["<image> <image>"], [[picture]]),
    ):
        with pytest.raises(ValueError, match=r"the texts hold .* <image> tokens and .* images"):
            processor(text=text, images=images)
    with pytest.raises(ValueError, match="'<unk>', which stands for image features"):
        processor(text="an <unk> word")
    with pytest.raises(ValueError, match="a text is needed"):
        processor(images=[picture])


def test_padding_is_never_an_ordinary_word(processor) -> None:
    """2.5 names "!" as its padding: then every "!" would count as a special token."""
    tokenizer = processor.tokenizer
    assert tokenizer.pad_token.startswith("<|")
    assert "!" not in tokenizer.all_special_tokens
    assert set(CONTROL[str(processor.image_processor.version)]) <= set(processor.control_tokens)
    assert "!" not in processor.control_tokens
    assert tokenizer("no!", add_special_tokens=False)["input_ids"][-1] == 0


def test_processor_survives_saving(processor, tmp_path) -> None:
    folder = tmp_path / "saved"
    processor.save_pretrained(folder)
    again = MiniCPMVProcessor.from_pretrained(folder)
    assert again.chat_template == processor.chat_template
    mine, theirs = again.image_processor.to_dict(), processor.image_processor.to_dict()
    assert mine == theirs
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert again.tokenizer.pad_token == processor.tokenizer.pad_token
    assert isinstance(AutoImageProcessor.from_pretrained(folder), MiniCPMVImageProcessor)
    assert len(AutoTokenizer.from_pretrained(folder)) == len(processor.tokenizer)


def test_unknown_version_is_named() -> None:
    with pytest.raises(UserError, match=r"unknown MiniCPM-V version '4\.0': choose 2\.5 or 2\.6"):
        MiniCPMVImageProcessor(version="4.0")
    assert MiniCPMVImageProcessor(image_feature_size=96).version == "2.5"
