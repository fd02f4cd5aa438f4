"""The model that ships with the package: it loads offline, sees, reads and knows its letters."""

import hashlib
import json
import string
import sys
from pathlib import Path
from random import Random

import easy_vqa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.modeling_outputs import BaseModelOutputWithPooling

from fedmllm.data.scenes import COLOURS, KINDS, draw, sample_scene
from fedmllm.models import model_path
from fedmllm.prompts import IMAGE
from fedmllm.rng import stream

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from pretrain.common import Codebook, build_model  # noqa: E402
from pretrain.curriculum import PHASES  # noqa: E402
from pretrain.dialogues import Turn, Writer, draw_scene  # noqa: E402
from pretrain.gate import (  # noqa: E402
    NEEDED_CHOICE,
    NEEDED_OPEN,
    Item,
    Reader,
    choice_marks,
    gate_items,
    open_marks,
)
from pretrain.questions import ASK  # noqa: E402
from pretrain.tokenizer import build_processor, whole_tokens  # noqa: E402
from pretrain.vision import pixels_of, see  # noqa: E402
from pretrain.words import CRISIS_CLASSES, MEME_CLASSES, WORDS  # noqa: E402

FOLDER = ROOT / "src" / "fedmllm" / "models" / "embedded"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reader(one_thread):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        return Reader(FOLDER)


@pytest.fixture(scope="module")
def tokenizer(reader):
    return reader.processor.tokenizer


def picture(i: int) -> Image.Image:
    return draw(sample_scene(stream(3, "embedded-test", i)))


# ---------------------------------------------------------------- files and tokenizer
def test_the_folder_is_small_and_the_weights_are_half_precision():
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) < 12_000_000
    from safetensors import safe_open

    with safe_open(FOLDER / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(k).get_dtype() for k in weights.keys()} == {"F16"}  # noqa: SIM118


def test_the_shipped_processor_is_the_one_that_the_script_writes(tokenizer):
    assert tokenizer.get_vocab() == build_processor().tokenizer.get_vocab()


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_comes_back_exactly(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_every_word_is_one_token_after_a_space_and_at_a_lines_start(tokenizer):
    for text in whole_tokens():
        assert len(tokenizer.encode(text)) == 1, text
    needed = {*KINDS, *COLOURS, *CRISIS_CLASSES, *MEME_CLASSES, "yes", "no", "kidney", "flood"}
    assert needed <= set(WORDS)


def test_option_letters_are_single_distinct_tokens_also_in_an_answer(tokenizer):
    asked = [tokenizer.encode(f"({c}) yes") for c in string.ascii_uppercase]
    said = [tokenizer.encode(f"Assistant: ({c}) yes") for c in string.ascii_uppercase]
    assert {len(ids) for ids in asked} == {4}
    assert len({ids[1] for ids in asked}) == 26
    assert [ids[1] for ids in asked] == [ids[-3] for ids in said]


def test_lines_are_encoded_as_the_whole_text_is(tokenizer):
    """The training rows are put together line by line and turn by turn."""
    writer = Writer(build_processor())
    turns = [Turn("x", f"{IMAGE}\nWhat is it?\n(A) a b\n(B) no!", "(B) no!"), Turn("x", "ok", "é.")]
    ids = [i for n, t in enumerate(turns) for part in writer.turn(t, first=n == 0) for i in part]
    assert ids == tokenizer.encode(tokenizer.decode(ids))
    row = writer.batch(1, 0, PHASES[-1])[0]
    assert row.ids == tokenizer.encode(tokenizer.decode(row.ids))


def test_no_wording_of_easy_vqa_is_asked_in_pre_training():
    """easy-VQA stays a test of the base: no question of its files is a training question."""
    known = {*easy_vqa.get_train_questions()[0], *easy_vqa.get_test_questions()[0]}
    assert "is there a circle?" in known
    asked = set()
    for kind, ask in ASK.items():
        for i in range(300):
            found = ask(Random(f"{kind}{i}"), draw_scene(1, 0.5, kind, i))
            asked |= {found.question.replace("colour", "color")} if found else set()
    assert len(asked) > 1000
    assert not asked & known


# ---------------------------------------------------------------- template and images
def test_chat_template_writes_both_roles_and_leaves_out_a_missing_image(reader):
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi?"}]}
    said = {"role": "assistant", "content": [{"type": "text", "text": "(A) yes"}]}
    template = reader.processor.apply_chat_template
    start = "User:\n<image>\nhi?<end_of_utterance>\nAssistant:"
    assert template([user], add_generation_prompt=True) == start
    assert template([user, said]) == f"{start} (A) yes<end_of_utterance>\n"
    bare = {"role": "user", "content": [{"type": "text", "text": "hi?"}]}
    assert "<image>" not in template([bare])


@pytest.mark.parametrize("size", [(64, 64), (1, 1), (4000, 3000), (300, 20), (20, 300)])
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_any_picture_becomes_sixteen_tokens(reader, size, mode):
    out = reader.processor(
        images=[[Image.new(mode, size, 7)]], text=["<image>\nhi"], return_tensors="pt"
    )
    assert (out["input_ids"] == reader.processor.image_token_id).sum() == 16
    assert out["pixel_values"].shape == (1, 1, 3, 64, 64)


def test_training_sees_the_pixels_that_the_processor_makes(reader):
    scene = sample_scene(stream(4, "pixels"))
    made = reader.processor.image_processor([[draw(scene)]], return_tensors="pt")["pixel_values"]
    assert torch.allclose(made[0], pixels_of([scene]), atol=1e-6)
    features = reader.model.get_image_features(made).pooler_output[0]
    assert torch.allclose(see(reader.model.model, made[0])[0], features, atol=1e-5)


# ---------------------------------------------------------------- forward
def mixed_items() -> list[Item]:
    return [
        Item(Turn("", f"{IMAGE}\nwhat color is the shape?", "red"), picture(0)),
        Item(Turn("", "repeat: fire", "fire"), None),
        Item(Turn("", f"{IMAGE}\nis there a circle in the image?", "no"), picture(1)),
    ]


@torch.no_grad()
def last_logits(reader: Reader, items: list[Item], side: str) -> torch.Tensor:
    inputs = reader.inputs(items, "", side)
    logits = reader.model(**inputs).logits
    if side == "left":
        return logits[:, -1]
    return logits[torch.arange(len(items)), inputs["attention_mask"].sum(1) - 1]


def test_a_mixed_padded_batch_equals_its_samples_one_by_one(reader):
    items = mixed_items()
    alone = torch.cat([last_logits(reader, [item], "right") for item in items])
    assert torch.allclose(last_logits(reader, items, "right"), alone, atol=1e-4)
    assert torch.allclose(last_logits(reader, items, "left"), alone, atol=1e-3)


@torch.no_grad()
def test_cached_image_features_give_the_logits_of_the_pixels(reader):
    inputs = reader.inputs(mixed_items(), "", "right")
    pixels = {k: inputs.pop(k) for k in ("pixel_values", "pixel_attention_mask") if k in inputs}
    features = torch.cat(reader.model.get_image_features(**pixels).pooler_output)
    cached = {"image": BaseModelOutputWithPooling(pooler_output=features)}
    from_cache = reader.model(**inputs, mm_encoder_outputs=cached).logits
    assert torch.equal(from_cache, reader.model(**inputs, **pixels).logits)
    changed = {"image": BaseModelOutputWithPooling(pooler_output=features.flip(0))}
    assert not torch.equal(reader.model(**inputs, mm_encoder_outputs=changed).logits, from_cache)


def test_generation_from_a_left_padded_mixed_batch_equals_single_generation(reader):
    items = mixed_items()
    assert reader.answers(items) == [reader.answers([item])[0] for item in items]
    assert reader.answers(items)[1] == "fire"


def test_codebook_and_untrained_weights_depend_on_the_seed_alone():
    ids = {"pad": 0, "bos": 1, "eos": 2, "image": 3}
    first, again, other = (build_model(64, ids, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)
    assert torch.equal(Codebook(1).kinds, Codebook(1).kinds)


# ---------------------------------------------------------------- what it knows
def test_the_committed_gate_is_of_the_shipped_weights(reader):
    """The file's hash is the weights', and 100 questions a kind agree with it to four s.e."""
    facts = json.loads((ROOT / "results" / "embedded-gate.json").read_text())
    weights = Path(model_path("embedded"), "model.safetensors").read_bytes()
    assert facts["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    for kind in ("exist", "count", "rule"):
        told = facts["gate"]["open"][kind]["accuracy"]
        found = sum(open_marks(reader, gate_items(kind, False, 100))) / 100
        assert abs(found - told) <= 4 * (max(told * (1 - told), 0.01) / 100) ** 0.5, kind


def test_yes_no_and_letters_do_not_fall(reader):
    """A floor for 200 questions each; whether the whole gate is passed, its result file says."""
    yes_no = open_marks(reader, gate_items("exist", False, 200))
    letters = [
        mark
        for kind in ("exist", "colour", "lookup", "place")
        for mark in choice_marks(reader, gate_items(kind, True, 50))
    ]
    assert sum(yes_no) / 200 >= NEEDED_OPEN - 0.06
    assert sum(letters) / 200 >= NEEDED_CHOICE - 0.08
