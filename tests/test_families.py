"""Every family of `FAMILIES` held to the same properties, on tiny random models (tiny_models.py).

Oracles are plain transformers with pixels and plain PEFT; both are given one sample at a time.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from test_plan import BAD
from tiny_models import TINY, make_model
from transformers import AutoModelForImageTextToText, PaliGemmaProcessor
from transformers.models.auto import image_processing_auto

from fedmllm.data.images import ImageFile, MemoryImage
from fedmllm.data.sample import Sample, Task
from fedmllm.errors import UserError
from fedmllm.models import families, loading, model_path
from fedmllm.models.families import FAMILIES, Family, by_tokens
from fedmllm.models.features import FeatureCache, ImageFeatures
from fedmllm.models.lfm2_images import Lfm2Images, Settings
from fedmllm.models.mllm import Mllm
from fedmllm.models.passes import Encoded
from fedmllm.prompts import IMAGE, Prompted, render

WIDE = MemoryImage("wide", lambda: Image.radial_gradient("L").resize((48, 32)).convert("RGB"))
TALL = MemoryImage("tall", lambda: Image.effect_mandelbrot((32, 64), (-3, -2.5, 2, 2.5), 50))
OPEN = Task("vqa", "open", "accuracy")
CHOICE = Task("pick", "choice", "accuracy", ("red", "blue"), "Which?{modality}")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A tiny model of each family on disk, written when it is first asked for."""

    class Made(dict):
        def __missing__(self, name: str) -> Path:
            self[name] = make_model(name, tmp_path_factory.mktemp(name))
            return self[name]

    return Made()


@pytest.fixture(scope="module", params=sorted(TINY))
def tiny(request, folders) -> Mllm:
    """A family's model with an adapter that is not the identity."""
    mllm = Mllm.load(request.param, folders[request.param], rank=2)
    mllm.set_adapter(adapter(mllm))
    return mllm


def adapter(mllm: Mllm) -> dict[str, torch.Tensor]:
    params = mllm.init_adapter(1)
    for i, (name, value) in enumerate(params.items()):
        if "lora_B" in name:
            generator = torch.Generator().manual_seed(i)
            params[name] = torch.randn(value.shape, generator=generator) * 0.5
    return params


def samples() -> list[Sample]:
    """Both pictures, no picture, and a longer question, so that a batch is padded."""
    return [
        Sample(id="wide", question="what is it?", answer="red", image=WIDE),
        Sample(id="text", question="no picture here, what now?", answer="a tree"),
        Sample(id="tall", question="and this?", answer="7", image=TALL),
    ]


def encoded(mllm: Mllm) -> list[Encoded]:
    return [mllm.encode(render(sample, OPEN)) for sample in samples()]


def choices(mllm: Mllm) -> list[Encoded]:
    questions = [
        Sample(id="wide", answer="red", text="some words", image=WIDE, label=0),
        Sample(id="text", answer="blue", text="other words, more of them", label=1),
        Sample(id="tall", answer="red", image=TALL, label=0),
    ]
    return [mllm.encode(render(sample, CHOICE)) for sample in questions]


def plain_inputs(mllm: Mllm, sample: Sample) -> dict[str, Any]:
    """What the processor alone makes of a sample: pixels, and its own token types."""
    processor = mllm.processor
    words = {"type": "text", "text": sample.question}
    content = [{"type": "image"}, words] if sample.image is not None else [words]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    if isinstance(processor, PaliGemmaProcessor):  # writes BOS and the newline by itself
        text = f"<image>{sample.question}"
    bos = processor.tokenizer.bos_token
    more = {} if bos is None else {"add_special_tokens": not text.startswith(bos)}
    if sample.image is None:
        found = dict(processor.tokenizer(text, return_tensors="pt", **more))
        found.pop("token_type_ids", None)
        return found
    found = dict(processor(text=[text], images=[sample.image.open()], return_tensors="pt", **more))
    found.pop("labels", None)
    return found


def has_plain_path(mllm: Mllm, sample: Sample) -> bool:
    """PaliGemma's processor refuses text without an image."""
    return sample.image is not None or not isinstance(mllm.processor, PaliGemmaProcessor)


def test_every_family_is_tested() -> None:
    assert {tiny.model_type or name for name, tiny in TINY.items()} == set(FAMILIES)


def test_lora_adapts_the_language_models_attention_only(tiny: Mllm) -> None:
    assert tiny.lora_modules() == TINY[tiny.name].adapted
    decoder = {id(p) for p in tiny.base.get_decoder().parameters()}
    assert all(id(p) in decoder for p in tiny.trainable.values())
    places = ("vision", "visual", "vpm")
    tower = [n for n, _ in tiny.base.named_modules() if any(place in n for place in places)]
    assert tower
    assert not any("lora" in name for name in tower)
    assert set(tiny.layer_of) == set(tiny.trainable)
    assert all(f".layers.{tiny.layer_of[n]}." in n for n in tiny.trainable)


def test_prompts_are_what_the_processor_makes(tiny: Mllm) -> None:
    """Token for token, whatever number of tokens an image becomes."""
    counted = []
    for sample, item in zip(samples(), encoded(tiny), strict=True):
        if has_plain_path(tiny, sample):
            assert list(item.prompt) == plain_inputs(tiny, sample)["input_ids"][0].tolist()
        if sample.image is not None:
            counted.append(item.prompt.count(tiny.base.config.image_token_id))
            assert counted[-1] == len(tiny.image_features(sample.image).features)
    assert tuple(counted) == TINY[tiny.name].tokens


def test_an_answer_ends_and_is_read_back(tiny: Mllm) -> None:
    ids = tiny.answer_ids("yes, two")
    words = tiny.tokenizer.decode(ids)
    end = tiny.tokenizer.convert_ids_to_tokens(ids[-1])
    assert words.strip() == f"yes, two{end}"
    assert end in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<eos>", "</s>")
    assert tiny.answer_ids("") == ids[-1:]


def test_a_sample_is_checked_as_it_is_encoded_but_not_seen(
    tiny: Mllm, tmp_path, monkeypatch
) -> None:
    """To the token; the tower is not run."""
    TALL.open().save(tmp_path / "tall.png")
    picture = ImageFile("tall.png", tmp_path)
    cards = [
        render(Sample(id="tall", question="and this?", answer="7", image=picture), OPEN),
        render(Sample(id="text", question="no picture here, what now?", answer="a tree"), OPEN),
    ]
    longest = [tiny.encode(card).longest for card in cards]
    monkeypatch.setattr(tiny, "image_features", lambda source: source.features)
    for card, length in zip(cards, longest, strict=True):
        assert card.sample.image is not None or tiny._at_most(card) > length
        tiny.check(card, max_length=length)
        with pytest.raises(UserError, match=f"is {length} tokens long"):
            tiny.check(card, max_length=length - 1)
        tiny.check(card, max_length=length - 1, long_text="shorten")
    (tmp_path / "tall.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"tall\.png"):
        tiny.check(cards[0])
    with pytest.raises(UserError, match="its text holds"):
        tiny.check(render(Sample(id="s", question=tiny.specials[0], answer="x"), OPEN))


@torch.no_grad()
def test_cached_features_give_the_logits_of_pixels(tiny: Mllm) -> None:
    """To the last bit, in all families."""
    for sample, item in zip(samples(), encoded(tiny), strict=True):
        if not has_plain_path(tiny, sample):
            continue
        plain = tiny.model(**plain_inputs(tiny, sample)).logits
        cached = tiny.model(**tiny._inputs([item], [item.prompt])).logits
        assert torch.equal(cached, plain)


@pytest.mark.parametrize("name", ["minicpmv 2.6", "minicpmv 2.5"])
@torch.no_grad()
def test_slices_are_read_as_by_the_processor_and_as_their_pixels(load, name) -> None:
    """900 x 700: the whole, and 2 x 2 cells."""
    picture = MemoryImage("cut", lambda: WIDE.open().resize((900, 700)))
    sample = Sample(id="cut", question="what is it?", answer="red", image=picture)
    mllm = load(name)
    item, given = mllm.encode(render(sample, OPEN)), plain_inputs(mllm, sample)
    assert list(item.prompt) == given["input_ids"][0].tolist()
    image = mllm.base.config.image_token_id
    assert item.prompt.count(image) == 5 * mllm.base.config.query_num
    cached = mllm.model(**mllm._inputs([item], [item.prompt])).logits
    assert torch.equal(cached, mllm.model(**given).logits)


def test_an_image_is_seen_once_and_alike_in_training(tiny: Mllm, monkeypatch) -> None:
    items = encoded(tiny)
    before = tiny.image_features(WIDE)
    assert tiny.image_features(WIDE) is before
    monkeypatch.setattr(tiny, "features", FeatureCache())
    with tiny.training(0):
        again = tiny.image_features(WIDE)
        assert tiny.model.training
    assert torch.equal(again.features, before.features)
    assert again.words == before.words
    losses = [float(tiny.loss_sum([item]).detach()) for item in items]
    swapped = Encoded("x", items[0].prompt, items[0].answer, MemoryImage("black", black))
    assert abs(float(tiny.loss_sum([swapped]).detach()) - losses[0]) > 1e-4  # it is looked at


def black() -> Image.Image:
    return Image.new("RGB", (48, 32), (1, 1, 1))


def test_mixed_batch_is_its_samples_one_by_one(tiny: Mllm) -> None:
    items = encoded(tiny)
    together = tiny.loss_sum(items)
    alone = torch.stack([tiny.loss_sum([item]) for item in items]).sum()
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-5)
    picks = choices(tiny)
    scores = tiny.score_options(picks)
    single = torch.cat([tiny.score_options([item]) for item in picks])
    torch.testing.assert_close(scores, single, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(scores.sum(1), torch.ones(3))


@torch.no_grad()
def test_options_are_scored_by_the_letters_logits(tiny: Mllm) -> None:
    """Oracle: a forward pass over the prompt and the words before the letter, nothing picked."""
    for item, got in zip(choices(tiny), tiny.score_options(choices(tiny)), strict=True):
        first, second = item.options
        at = next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
        inputs = tiny._inputs([item], [item.prompt + first[:at]])
        logits = tiny.model(**inputs).logits[0, -1, [first[at], second[at]]]
        torch.testing.assert_close(got, logits.softmax(-1), atol=1e-5, rtol=1e-4)


def test_the_head_runs_over_the_positions_that_count(tiny: Mllm) -> None:
    shapes = []
    head = tiny.base.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, hidden, out: shapes.append(out.shape[:2]))
    tiny.score_options(choices(tiny))
    hook.remove()
    assert shapes == [(1, 3)]  # one place of each prompt


def test_the_last_feed_forward_block_runs_where_it_counts(tiny: Mllm, monkeypatch) -> None:
    """Every family has one, and what is left out of it is felt nowhere."""
    block, items = tiny._last_block, encoded(tiny)
    assert block is not None
    tokens = []
    hook = block.register_forward_hook(lambda module, hidden, out: tokens.append(hidden[0].shape))
    fast = gradients(tiny), tiny.score_options(choices(tiny))
    hook.remove()
    monkeypatch.setattr(tiny, "_last_block", None)
    plain = gradients(tiny), tiny.score_options(choices(tiny))
    assert tokens[0][1] == sum(len(item.answer) for item in items)
    torch.testing.assert_close(fast[1], plain[1], atol=1e-6, rtol=1e-5)
    for name, gradient in plain[0].items():
        torch.testing.assert_close(fast[0][name], gradient, atol=1e-5, rtol=1e-4)


def test_options_on_one_prompts_cache_are_scored_like_whole_rows(tiny: Mllm) -> None:
    """Options of one, two and three words, none of which a single token tells apart."""
    for item in encoded(tiny):
        words = ("red", "red star", "red star shape", "red")
        options = tuple(tiny.answer_ids(word) for word in words)
        bare = replace(item, options=options)
        plain = tiny._score_alone(bare)
        assert plain.std() > 1e-3
        (found,) = tiny._score_after_prompts([bare])
        torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(tiny.score_options([bare])[0], plain.softmax(-1))


def test_questions_of_one_length_are_scored_together(tiny: Mllm, monkeypatch) -> None:
    """Of three lengths, each twice with two words changed places, and one with fewer options; no
    more rows in a pass than there are questions."""
    words = [tiny.answer_ids(word) for word in ("red", "red star", "red star shape", "red")]
    items = [replace(item, options=tuple(words)) for item in encoded(tiny)]
    fewer = replace(items[0], options=tuple(words[:3]))
    asked = 2 * [items[0], *map(swapped, items), *items[1:], fewer]
    passes, together = [], tiny._score_after_prompts

    def counted(batch: list[Encoded]) -> list[torch.Tensor]:
        passes.append(len(batch))
        return together(batch)

    monkeypatch.setattr(tiny, "_score_after_prompts", counted)
    found = tiny._score_full(asked)
    kinds = Counter((len(item.prompt), len(item.options)) for item in asked)
    assert sum(passes) == len(asked) == 14
    assert len(passes) == sum(-(-n // (14 // options)) for (_, options), n in kinds.items())
    assert max(passes) == 3  # of four options each
    for item, scores in zip(asked, found, strict=True):
        torch.testing.assert_close(scores, tiny._score_alone(item), atol=1e-4, rtol=1e-5)
    assert float((found[0] - found[1]).detach().abs().max()) > 1e-4  # the prompts differ


def swapped(item: Encoded) -> Encoded:
    """Its last two tokens that differ, in each other's place."""
    prompt = list(item.prompt)
    last = len(prompt) - 1
    other = max(i for i in range(last) if prompt[i] != prompt[last])
    prompt[last], prompt[other] = prompt[other], prompt[last]
    return replace(item, prompt=tuple(prompt))


def test_generation_is_that_of_plain_transformers(tiny: Mllm) -> None:
    """A padded, mixed batch with cached features; then text alone, with nothing left over."""
    items = encoded(tiny)
    got = tiny.generate(items, max_new_tokens=4)
    end = tiny.answer_ids("")[-1]
    for sample, answer in zip(samples(), got, strict=True):
        if not has_plain_path(tiny, sample):
            continue
        inputs = plain_inputs(tiny, sample)
        made = tiny.model.generate(
            **inputs, max_new_tokens=4, do_sample=False, eos_token_id=end, pad_token_id=0
        )[0, inputs["input_ids"].shape[1] :]
        assert answer == tiny.tokenizer.decode(made, skip_special_tokens=True).strip()
    assert tiny.generate([items[1]], max_new_tokens=4) == [got[1]]


def test_answers_are_greedy_whatever_a_checkpoint_prefers(folders, tmp_path) -> None:
    """Qwen2.5-VL's generation_config.json has a repetition penalty."""
    wanted = {"repetition_penalty": 1.9, "num_beams": 3, "do_sample": True, "temperature": 1e-6,
              "no_repeat_ngram_size": 1, "suppress_tokens": list(range(60))}  # fmt: skip
    shutil.copytree(folders["qwen2_5_vl"], tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(wanted))
    plain, own = (Mllm.load("x", f, rank=2) for f in (folders["qwen2_5_vl"], tmp_path / "model"))
    assert own.base.generation_config.num_beams == 3
    items = encoded(plain)
    given = plain.generate(items, max_new_tokens=6)
    assert own.generate(items, max_new_tokens=6) == given
    assert own.base.generation_config.num_beams == 3  # it is saved with a merged model


@pytest.mark.parametrize(
    ("name", "words", "expected"),
    [
        ("minicpmv 2.5", "Yes! Two!!<|eot_id|>!", "Yes! Two!!!"),
        ("minicpmv 2.6", "Yes! Two<|im_end|><|endoftext|>", "Yes! Two"),
        ("idefics3", "Yes! <image>Two<|im_end|>", "Yes! Two"),
    ],
)
def test_an_answer_keeps_its_exclamation_marks(load, name, words, expected) -> None:
    """2.5 pads with one, which makes it a special token."""
    mllm = load(name)
    ids = mllm.tokenizer(words, add_special_tokens=False)["input_ids"]
    assert mllm.decode(ids) == expected


def gradients(mllm: Mllm) -> dict[str, torch.Tensor]:
    items = encoded(mllm)
    with mllm.training(3):
        mllm.loss_sum(items).backward()
    found = {name: p.grad.clone() for name, p in mllm.trainable.items()}
    mllm.model.zero_grad(set_to_none=True)
    return found


def test_gradient_checkpointing_changes_no_gradient(tiny: Mllm, folders, monkeypatch) -> None:
    monkeypatch.setattr(tiny, "_last_block", None)  # whole in both: a layer is run again later
    frugal = Mllm.load(tiny.name, folders[tiny.name], rank=2, gradient_checkpointing=True)
    frugal.set_adapter(adapter(frugal))
    assert not frugal.model.training  # dropout belongs to training
    assert not frugal.base.get_input_embeddings()._forward_hooks  # nor a gradient to the inputs
    passes = []
    inside = next(m for n, m in frugal.model.named_modules() if n.endswith(".lora_A.default"))
    inside.register_forward_pre_hook(lambda *_: passes.append(1))
    expected, got = gradients(tiny), gradients(frugal)
    assert len(passes) == 2  # once forward, once more on the way back
    assert any(float(g.abs().max()) > 1e-4 for g in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_adapter_is_saved_loaded_by_plain_peft_and_merged(tiny: Mllm, folders, tmp_path) -> None:
    tiny.save_adapter(tmp_path / "adapter")
    base = AutoModelForImageTextToText.from_pretrained(folders[tiny.name], dtype=torch.float32)
    item = encoded(tiny)[0]
    expected = tiny.model(**tiny._inputs([item], [item.prompt])).logits
    bare = base(**tiny._inputs([item], [item.prompt])).logits
    assert not torch.allclose(bare, expected, atol=1e-3)
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(plain(**tiny._inputs([item], [item.prompt])).logits, expected)
    plain.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    found = merged(**tiny._inputs([item], [item.prompt])).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_an_adapter_needs_no_weights(tiny: Mllm, folders, tmp_path) -> None:
    """Drawn, held, counted, described and saved alike around a base that has shapes only."""
    bare = Mllm.shapes(tiny.name, folders[tiny.name], rank=2)
    assert {value.device.type for value in bare.base.parameters() if not value.requires_grad} == {
        "meta"
    }
    drawn, expected = bare.init_adapter(3), tiny.init_adapter(3)
    assert list(drawn) == list(expected)
    assert all(torch.equal(drawn[name], expected[name]) for name in expected)
    for fact in ("component_of", "layer_of", "num_layers", "width", "specials"):
        assert getattr(bare, fact) == getattr(tiny, fact)
    for count in ("parameter_counts", "lora_modules", "copied_modules"):
        assert getattr(bare, count)() == getattr(tiny, count)()
    bare.set_adapter(tiny.get_adapter())
    for mllm, name in ((bare, "bare"), (tiny, "whole")):
        mllm.save_adapter(tmp_path / name)
    written = {p.name: p.read_bytes() for p in (tmp_path / "bare").iterdir()}
    assert written == {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    assert len(written) == 2


def test_bfloat16_is_near_float32(tiny: Mllm, folders) -> None:
    half = Mllm.load(tiny.name, folders[tiny.name], rank=2, dtype=torch.bfloat16)
    half.set_adapter(adapter(half))
    found, expected = (float(m.loss_sum(encoded(m)).detach()) for m in (half, tiny))
    assert found == pytest.approx(expected, rel=0.1)
    assert half.image_features(WIDE).features.dtype == torch.bfloat16


def test_special_words_in_text_are_refused(tiny: Mllm) -> None:
    for word in {tiny.processor.image_token, tiny.tokenizer.decode(tiny.answer_ids("")).strip()}:
        sample = Sample(id="s", question=f"is it {word}?", answer="x")
        with pytest.raises(UserError, match="sample s: its text holds"):
            tiny.encode(render(sample, OPEN))


def test_a_processor_that_names_no_replacement_is_read_by_its_tokens(tiny: Mllm) -> None:
    """For code from elsewhere; the same words wherever an image becomes special tokens."""
    words, inputs = by_tokens(tiny.processor, WIDE.open())
    exact = tiny.name != "paligemma"  # which puts a BOS after the image
    assert (words == tiny.image_features(WIDE).words) == exact
    assert "pixel_values" in inputs


# -- what single families need -------------------------------------------------------------------


@pytest.fixture
def load(folders):
    return lambda name: Mllm.load(name, folders[name], rank=2)


@torch.no_grad()
def test_paligemma_reads_a_prompt_both_ways_and_an_answer_from_left_to_right(load) -> None:
    """Oracle: the loss of plain transformers for the processor's own prefix and suffix."""
    mllm = load("paligemma")
    mllm.set_adapter(adapter(mllm))
    inputs = mllm.processor(
        text="<image>what is it?", images=WIDE.open(), suffix="red", return_tensors="pt"
    )
    item = encoded(mllm)[0]
    assert (*item.prompt, *item.answer) == tuple(inputs["input_ids"][0].tolist())
    torch.testing.assert_close(mllm.loss_sum([item]), mllm.model(**inputs).loss)


def test_paligemma_begins_a_conversation_once(load) -> None:
    mllm = load("paligemma")
    earlier = (f"{IMAGE}\nwhat?", "red")
    item = mllm.encode(Prompted(samples()[0], (earlier, ("and?", "blue"))))
    image = "<image>" * 16
    assert mllm.tokenizer.decode(item.prompt) == f"{image}<bos>what?\nred<eos>and?\n"


def test_an_answer_that_melts_into_the_prompt_is_refused(load) -> None:
    """Gemma has a token of two newlines: the prompt's last and the answer's first."""
    with pytest.raises(UserError, match="makes one token of the end of the prompt"):
        load("paligemma").answer_ids("\nyes")


def test_qwen3_vl_keeps_the_features_of_the_first_layers(load) -> None:
    features = load("qwen3_vl").image_features(WIDE)
    assert [part.shape for part in features.deepstack] == [features.features.shape] * 2
    assert features.nbytes == 3 * features.features.nbytes
    assert features.inputs["image_grid_thw"].tolist() == [[1, 4, 6]]  # patches of 8 pixels


def test_processors_of_video_models_stay_as_they_are(load) -> None:
    """The part left out is left out of a class of its own."""
    processor = load("qwen2_vl").processor
    assert isinstance(processor, transformers.Qwen2VLProcessor)
    assert "Qwen2VLProcessor" in repr(processor)
    assert "check_argument_for_proper_class" not in vars(transformers.Qwen2VLProcessor)
    assert type(processor).__mro__[1] is transformers.Qwen2VLProcessor
    with pytest.raises(TypeError):
        processor.check_argument_for_proper_class("tokenizer", "no tokeniser")


@pytest.mark.parametrize("name", ["gemma3", "idefics3", "smolvlm", "qwen2_vl", "llava_next"])
def test_pictures_are_prepared_by_pillow_where_torchvision_is(
    name, folders, tmp_path, monkeypatch
) -> None:
    """The class named as on the hub, without a library's name."""
    shutil.copytree(folders[name], tmp_path / "model")
    for file in (tmp_path / "model").glob("*processor_config.json"):
        file.write_text(file.read_text().replace("ImageProcessorPil", "ImageProcessor"))
    asked = []

    def resolve(backend, *_):
        asked.append(backend)
        return "pil"  # torchvision is not installed for the tests

    monkeypatch.setattr(image_processing_auto, "_resolve_backend", resolve)
    for module in (image_processing_auto, loading):
        monkeypatch.setattr(module, "is_torchvision_available", lambda: True)
    _, processor = loading._described(tmp_path / "model", False)
    assert asked[-1] == "pil"
    assert type(processor.image_processor).__name__.endswith("Pil")


def test_lfm2_vl_prefers_its_own_image_processor(folders, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(families, "is_torchvision_available", lambda: True)
    monkeypatch.setattr(
        families.AutoProcessor, "from_pretrained", lambda path, **_: asked.append(path)
    )
    families.FAMILIES["lfm2_vl"].processor(folders["lfm2_vl"], False)
    assert asked == [folders["lfm2_vl"]]


@pytest.mark.parametrize(
    ("size", "whole", "grid"),
    [
        ((512, 512), (512, 512), (1, 1)),  # 256 tokens of 32 x 32: as it is
        ((100, 100), (256, 256), (1, 1)),  # 9 tokens: up to 64
        ((720, 480), (608, 416), (1, 1)),  # above 256, not twice: down to 19 x 13 = 247
        ((1024, 1024), (512, 512), (2, 2)),  # 1024: cut; 3 x 3 is as square, and too large
        ((2000, 500), (1024, 256), (4, 1)),
    ],
)
def test_lfm2_geometry_by_hand(size, whole, grid) -> None:
    settings = Settings()
    assert settings.whole_size(*size) == whole
    assert settings.grid(*size) == grid


def test_lfm2_patches_are_the_pictures_pixels() -> None:
    """A picture of 2 x 4 patches of 8 pixels, each of one grey: rows first, padded by zeros."""
    greys = [0, 30, 60, 90, 120, 150, 180, 210]
    image = Image.new("L", (32, 16))
    for i, grey in enumerate(greys):
        image.paste(grey, (i % 4 * 8, i // 4 * 8, i % 4 * 8 + 8, i // 4 * 8 + 8))
    processor = Lfm2Images.of(
        {"encoder_patch_size": 8, "tile_size": 32, "min_image_tokens": 2, "max_image_tokens": 4}
    )
    found = processor([[image]])
    assert found["spatial_shapes"].tolist() == [[2, 4]]
    assert found["pixel_attention_mask"].sum() == 8
    expected = torch.tensor([grey / 255 * 2 - 1 for grey in greys])
    torch.testing.assert_close(found["pixel_values"][0, :8].mean(1), expected, atol=1e-6, rtol=0)
    assert not found["pixel_values"][0, 8:].any()
    assert (found["image_rows"], found["image_cols"]) == ([1], [1])
    assert found["image_sizes"] == [[16, 32]]


def test_lfm2_cuts_row_by_row_and_ends_with_the_whole() -> None:
    """Four quarters of one grey each; 64 x 64 pixels are 16 tokens, 4 times too many."""
    image = Image.new("L", (64, 64))
    for i, grey in enumerate((40, 80, 120, 160)):
        image.paste(grey, (i % 2 * 32, i // 2 * 32, i % 2 * 32 + 32, i // 2 * 32 + 32))
    settings = {"encoder_patch_size": 8, "tile_size": 32, "min_image_tokens": 1}
    found = Lfm2Images.of({**settings, "max_image_tokens": 4, "max_pixels_tolerance": 1.0})(image)
    assert (found["image_rows"], found["image_cols"]) == ([2], [2])
    assert found["image_sizes"] == [[32, 32]]
    assert found["spatial_shapes"].tolist() == [[4, 4]] * 5
    first = (found["pixel_values"][:, 0].mean(1) + 1) / 2 * 255  # each one's first patch
    assert first.round().int().tolist() == [40, 80, 120, 160, 40]
    without = Lfm2Images.of({**settings, "max_image_tokens": 4, "use_thumbnail": False})
    assert len(without(image.resize((128, 128)))["pixel_values"]) == 9


def test_a_cache_counts_all_that_an_image_keeps() -> None:
    cache = FeatureCache(budget_bytes=100)
    for name in "ab":
        cache.put(name, ImageFeatures("", torch.zeros(5), deepstack=(torch.zeros(5),) * 2))
    assert cache.get("a") is None
    assert cache.get("b") is not None


# -- what is refused -----------------------------------------------------------------------------


def write_config(folder: Path, **settings: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("qwen2", "has no vision tower: choose an image-text model of type .*paligemma"),
        ("instructblipvideo", "takes video and text, no images"),
        ("mllama", "does not put an image's features among the tokens"),
        ("florence2", "does not put an image's features among the tokens"),
        ("fuyu", "unknown model type 'fuyu': choose .*add a model"),
        ("nonsense", "cannot load model"),
    ],
)
def test_what_cannot_be_had_is_refused_before_weights_are_read(
    tmp_path, model_type, reason
) -> None:
    folder = write_config(tmp_path, model_type=model_type)
    with pytest.raises(UserError, match=reason):
        Mllm.load("x", folder)


REMOTE = """
from dataclasses import replace
from pathlib import Path
from transformers import Idefics3Config, Idefics3ForConditionalGeneration
Path({mark!r}).touch()
class OwnConfig(Idefics3Config):
    model_type = "own"
class OwnModel(Idefics3ForConditionalGeneration):
    config_class = OwnConfig
"""


@pytest.fixture
def remote(tmp_path, monkeypatch) -> Path:
    """A model that brings its code, which leaves a mark when it is run."""
    folder = make_model("idefics3", tmp_path / "own_model")
    (folder / "own.py").write_text(REMOTE.format(mark=str(tmp_path / "mark")))
    settings = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForImageTextToText": "own.OwnModel"}
    write_config(folder, **{**settings, "model_type": "own", "auto_map": names})
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "m"))
    return folder


@pytest.mark.parametrize("asked", [None, "another/model"])
def test_code_beside_a_model_is_not_run(remote, asked) -> None:
    with pytest.raises(UserError, match=r"runs code of its own.*remote_code="):
        Mllm.load("own", remote, remote_code=asked)
    assert not (remote.parent / "mark").exists()


def test_naming_its_code_does_not_stand_in_for_an_entry(tmp_path) -> None:
    """A type that transformers knows is built by transformers, whatever lies beside it."""
    names = {"AutoConfig": "own.OwnConfig"}
    folder = write_config(tmp_path, model_type="fuyu", auto_map=names)
    with pytest.raises(UserError, match="unknown model type 'fuyu'"):
        Mllm.load("x", folder)


PROCESSOR_CODE = """
from pathlib import Path
from transformers import {base}
Path({mark!r}).touch()
class Own{base}({base}):
    pass
"""


@pytest.mark.parametrize("name", ["idefics3", "smolvlm", "qwen2_vl", "lfm2_vl"])
def test_code_beside_a_processor_is_not_run(name, folders, tmp_path, monkeypatch) -> None:
    """Nor is the user asked for it, who may be a script that answers yes."""
    folder = tmp_path / "model"
    shutil.copytree(folders[name], folder)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "m"))
    base = "Idefics3ImageProcessorPil" if name != "lfm2_vl" else "Qwen2Tokenizer"
    (folder / "own.py").write_text(PROCESSOR_CODE.format(base=base, mark=str(tmp_path / "mark")))
    if name == "lfm2_vl":  # its pictures are read by what is built here
        file, own = folder / "tokenizer_config.json", {"tokenizer_class": f"Own{base}"}
        own["auto_map"] = {"AutoTokenizer": [f"own.Own{base}"] * 2}
    else:
        file, own = folder / "preprocessor_config.json", {"image_processor_type": f"Own{base}"}
        own["auto_map"] = {"AutoImageProcessor": f"own.Own{base}"}
        (folder / "processor_config.json").unlink(missing_ok=True)
    settings = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(settings | own))
    with pytest.raises(UserError, match=r"^the processor of .* runs code of its own.*remote_code="):
        Mllm.load(name, folder)
    assert not (tmp_path / "mark").exists()


def test_code_beside_a_model_is_run_if_the_model_is_named(remote, caplog) -> None:
    mllm = Mllm.load("own", remote, rank=2, remote_code=str(remote))
    warned = [record.getMessage() for record in caplog.records if record.name == "fedmllm"]
    assert len(warned) == 1
    assert str(remote) in warned[0]
    assert "code that lies beside" in warned[0]
    assert (remote.parent / "mark").exists()
    assert type(mllm.base).__name__ == "OwnModel"
    items = encoded(mllm)
    assert len(mllm.generate(items, max_new_tokens=2)) == 3


@pytest.mark.parametrize("case", BAD)
def test_bad_model_files_are_told_in_words(case, tmp_path) -> None:
    """As a plan tells of them (test_plan.py), where weights are about to be read."""
    for file in Path(model_path("embedded")).iterdir():
        if file.is_file() and file.name != "config.json":
            shutil.copy(file, tmp_path / file.name)
    (tmp_path / "config.json").write_text(BAD[case][0])
    with pytest.raises(UserError, match=r"cannot load model|has no vision tower|unknown model"):
        Mllm.load("mine", tmp_path)
    with pytest.raises(UserError, match=r"cannot build model|has no vision tower|unknown model"):
        Mllm.shapes("mine", tmp_path)


@pytest.mark.parametrize("name", ["minicpmv 2.6", "idefics3"])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_processors_file_that_is_cut_short_is_told_in_words(
    name, file, folders, tmp_path
) -> None:
    shutil.copytree(folders[name], tmp_path / "model")
    bad = tmp_path / "model" / file
    bad.write_text(bad.read_text()[:-40])
    with pytest.raises(UserError, match=r"the processor of model .* cannot be read"):
        Mllm.load("mine", tmp_path / "model")


def test_an_entry_that_leaves_out_what_a_model_needs_is_refused(folders, monkeypatch) -> None:
    monkeypatch.setitem(FAMILIES, "qwen2_vl", Family())
    with pytest.raises(UserError, match="needs image_grid_thw, mm_token_type_ids"):
        Mllm.load("qwen2_vl", folders["qwen2_vl"])


def test_a_special_token_that_is_an_ordinary_word_may_stand_in_text(folders, monkeypatch) -> None:
    monkeypatch.setitem(FAMILIES, "idefics3", Family(ordinary=("<global-img>",)))
    mllm = Mllm.load("idefics3", folders["idefics3"])
    mllm.encode(render(Sample(id="s", question="a <global-img> b", answer="x"), OPEN))
    with pytest.raises(UserError, match="its text holds '<row_1_col_1>'"):
        mllm.encode(render(Sample(id="s", question="<row_1_col_1>", answer="x"), OPEN))


def test_weights_that_lack_a_tensor_are_refused(tmp_path) -> None:
    folder = make_model("qwen3_vl", tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = "model.language_model.layers.1.self_attn.q_proj.weight"
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"do not fit .*: lacks 1 tensors, e.g. {name}"):
        Mllm.load("qwen3_vl", folder)


def test_weights_with_more_or_other_shapes_are_refused(folders, tmp_path) -> None:
    shutil.copytree(folders["llava"], tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.multi_modal_projector.linear_1.bias"
    for changed, words in (
        ({**weights, "extra": torch.zeros(2)}, "has 1 unknown tensors, e.g. extra"),
        ({**weights, name: torch.zeros(5)}, r"linear_1\.bias is \(5,\), the model needs \(32,\)"),
    ):
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=words):
            Mllm.load("llava", tmp_path)


def test_a_tokenizer_of_another_model_is_refused(folders, tmp_path) -> None:
    """Qwen2-VL's in a folder of LLaVA: other words, and another id for the image."""
    shutil.copytree(folders["llava"], tmp_path, dirs_exist_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folders["idefics3"] / file, tmp_path / file)
    with pytest.raises(UserError, match=r"tokenizer in .* does not fit the model: .* image token"):
        Mllm.load("llava", tmp_path)


def test_a_tokenizer_with_more_words_than_the_model_is_refused(folders, monkeypatch) -> None:
    base = AutoModelForImageTextToText.from_pretrained(folders["llava"])
    processor = loading.load_base(folders["llava"], dtype=torch.float32, device="cpu")[1]
    base.resize_token_embeddings(processor.tokenizer.vocab_size - 1)
    with pytest.raises(UserError, match=r"it has \d+ words, the model \d+"):
        loading._check_tokenizer("x", base, processor)


def test_a_word_beyond_the_models_rows_is_named(load) -> None:
    """An added token may lie beyond them as long as no text makes it."""
    mllm = load("idefics3")
    mllm.tokenizer.add_tokens(["zzyzx"])
    sample = Sample(id="s", question="is it zzyzx?", answer="x")
    with pytest.raises(UserError, match=r"makes token \d+ \('zzyzx'\), and the model has"):
        mllm.encode(render(sample, OPEN))


# families whose image processors refuse pictures of 900 x 1 and 1 x 900
STRIP = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "lfm2_vl"}


def test_a_strip_and_a_huge_picture_are_taken_or_named(tiny: Mllm, monkeypatch) -> None:
    """Larger than the slices allow: made to fit, never an image of half its tokens."""
    monkeypatch.setattr(tiny, "features", FeatureCache())
    for name, size in (("flat", (900, 1)), ("high", (1, 900)), ("huge", (1500, 1100))):
        picture = MemoryImage(name, lambda size=size: Image.new("RGB", size, (9, 90, 200)))
        sample = Sample(id=name, question="?", answer="x", image=picture)
        if name != "huge" and tiny.name in STRIP:
            with pytest.raises(UserError, match=f"sample {name}: the image processor of"):
                tiny.encode(render(sample, OPEN))
            continue
        item = tiny.encode(render(sample, OPEN), max_length=100_000)
        image = tiny.image_features(picture)
        assert item.prompt.count(tiny.base.config.image_token_id) == len(image.features) > 0
        assert torch.isfinite(tiny.loss_sum([item]))


def test_a_model_without_chat_template_is_refused(folders, tmp_path) -> None:
    folder = make_model("idefics3", tmp_path)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        Mllm.load("idefics3", folder)


def test_a_template_beside_the_tokenizer_is_taken(tmp_path) -> None:
    """As older checkpoints have it."""
    folder = make_model("idefics3", tmp_path)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    assert Mllm.load("idefics3", folder).processor.chat_template == template


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('only strings') }}",
        "{% for m in messages %}{{ m['content'] + 'x' }}{% endfor %}",
        "{% for m in messages %}",
    ],
)
def test_a_template_that_cannot_write_a_conversation_is_named(template, tmp_path) -> None:
    folder = make_model("idefics3", tmp_path)
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match="chat template of idefics3 cannot write"):
        encoded(Mllm.load("idefics3", folder))


def test_a_template_that_hides_the_image_is_refused(load, monkeypatch) -> None:
    mllm = load("idefics3")
    template = mllm.processor.chat_template
    for image, count in (("", 0), ("<image><image>", 2)):
        monkeypatch.setattr(mllm.processor, "chat_template", template.replace("<image>", image))
        with pytest.raises(
            UserError, match=rf"places {count} image tokens \(<image>\) for 1 image"
        ):
            encoded(mllm)


def test_a_processor_of_another_model_is_refused(folders, tmp_path) -> None:
    folder = make_model("idefics3", tmp_path)
    settings = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({**settings, "image_seq_len": 5}))
    mllm = Mllm.load("idefics3", folder)
    with pytest.raises(UserError, match="makes 5 tokens of an image, its vision tower 4 features"):
        encoded(mllm)


def test_a_processor_without_a_part_is_refused() -> None:
    for part in ("image_processor", "tokenizer", "image_token"):
        processor = transformers.BatchFeature(  # anything with attributes
            {"image_processor": 1, "tokenizer": 1, "image_token": "<i>", "chat_template": "x"}
        )
        processor.data[part] = None
        with pytest.raises(UserError, match=part.split("_")[0]):
            loading._check_processor("x", processor)


def test_a_model_without_decoder_layers_has_no_targets(load) -> None:
    base = load("idefics3").base
    base.model.text_model = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="no language model with decoder layers"):
        loading_targets(base)


def loading_targets(base: Any) -> str:
    from fedmllm.models.lora import lora_targets

    return lora_targets(base)
