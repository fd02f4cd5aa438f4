"""The model wrapper against plain transformers and plain PEFT."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from fedmllm.data.images import MemoryImage
from fedmllm.data.sample import Sample, Task
from fedmllm.errors import UserError
from fedmllm.models import model_path
from fedmllm.models.features import FeatureCache, ImageFeatures
from fedmllm.models.loading import load_base
from fedmllm.models.lora import lora_targets
from fedmllm.models.mllm import Mllm
from fedmllm.prompts import render

CONDITIONS = [(True, True), (False, True), (True, False), (False, False)]


def mixed(mllm: Mllm, memes, count: int = 8):
    """Encoded samples that hold both, text, image and neither, in turn."""
    return [
        mllm.encode(render(s.masked(keep_image=i, keep_text=t), memes.task))
        for s, (i, t) in zip(memes.train[:count], CONDITIONS * count, strict=False)
    ]


@pytest.fixture
def trained(mllm: Mllm) -> Mllm:
    """An adapter that is not the identity."""
    params = mllm.init_adapter(1)
    for i, (name, value) in enumerate(params.items()):
        if "lora_B" in name:
            generator = torch.Generator().manual_seed(i)
            params[name] = torch.randn(value.shape, generator=generator) * 0.05
    mllm.set_adapter(params)
    return mllm


def test_adapter_has_pefts_own_keys(mllm: Mllm) -> None:
    theirs = get_peft_model_state_dict(mllm.model, save_embedding_layers=False)
    assert sorted(theirs) == list(mllm.trainable)
    assert set(mllm.get_adapter()) == set(theirs)


def test_only_the_language_models_attention_is_adapted(mllm: Mllm) -> None:
    names = list(mllm.trainable)
    assert len(names) == mllm.num_layers * 4 * 2
    assert all("text_model" in n and "self_attn" in n and "vision" not in n for n in names)
    assert sorted(set(mllm.layer_of.values())) == list(range(mllm.num_layers))
    assert all(f".layers.{mllm.layer_of[n]}." in n for n in names)


def test_fresh_adapter_is_the_base_and_depends_only_on_the_seed(mllm: Mllm, memes) -> None:
    items = mixed(mllm, memes, 4)
    mllm.set_adapter(mllm.init_adapter(0))
    fresh = mllm.score_options(items)
    with mllm.model.disable_adapter():
        base = mllm.score_options(items)
    assert torch.equal(fresh, base)
    torch.manual_seed(123)  # a disturbed global stream changes nothing
    again, other = mllm.init_adapter(0), mllm.init_adapter(1)
    first = mllm.get_adapter()
    assert all(torch.equal(again[n], first[n]) for n in first)
    assert any(not torch.equal(other[n], first[n]) for n in first)


def test_mixed_batch_scores_and_learns_like_single_samples(trained: Mllm, memes) -> None:
    items = mixed(trained, memes)
    together = trained.score_options(items)
    alone = torch.cat([trained.score_options([item]) for item in items])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together.sum(1), torch.ones(len(items)))
    loss = trained.loss_sum(items)
    single = torch.stack([trained.loss_sum([item]) for item in items]).sum()
    torch.testing.assert_close(loss, single, atol=1e-4, rtol=1e-5)


def test_a_question_asked_twice_is_read_once(trained: Mllm, memes, monkeypatch) -> None:
    """The same words with another picture, or with other options, are another question."""
    encoded = [trained.encode(render(s, memes.task)) for s in memes.train[:8]]
    first = encoded[0]
    others = (e for e in encoded if e.image.key != first.image.key and e.prompt != first.prompt)
    second = next(others)
    repainted = replace(first, id="r", image=second.image)
    turned = replace(first, id="t", options=first.options[::-1])
    again = [replace(item, id=f"{item.id}-again") for item in (first, second)]
    asked = [first, repainted, second, turned, *again, first]
    rows: list[int] = []
    inputs = Mllm._inputs

    def counted(self, batch, *args, **kwargs):
        rows.append(len(batch))
        return inputs(self, batch, *args, **kwargs)

    monkeypatch.setattr(Mllm, "_inputs", counted)
    scores = trained.score_options(asked)
    assert sum(rows) == 4
    alone = torch.cat([trained.score_options([item]) for item in asked])
    torch.testing.assert_close(scores, alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scores[3], scores[0].flip(0), atol=1e-5, rtol=1e-4)
    assert not torch.equal(scores[0], scores[1])
    rows.clear()
    answers = trained.generate(asked, max_new_tokens=3)
    assert sum(rows) == 4
    assert answers == [trained.generate([item], max_new_tokens=3)[0] for item in asked]


def test_scores_are_what_plain_transformers_gives(trained: Mllm, memes) -> None:
    """Oracle: the processor's own path with pixels, one sample, logits after ' ('."""
    processor = trained.processor
    for sample in (memes.test[0], memes.test[1].masked(keep_image=False, keep_text=True)):
        prompted = render(sample, memes.task)
        user = prompted.turns[0][0]
        content = [{"type": "text", "text": user.removeprefix("<image>\n")}]
        if sample.image is not None:
            content.insert(0, {"type": "image"})
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        images = [sample.image.open()] if sample.image is not None else None
        inputs = processor(text=text + " (", images=images, return_tensors="pt")
        with torch.no_grad():
            logits = trained.model(**inputs).logits[0, -1]
        letters = [processor.tokenizer.convert_tokens_to_ids(letter) for letter in "AB"]
        expected = logits[letters].softmax(-1)
        got = trained.score_options([trained.encode(prompted)])[0]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_options_that_share_no_letter_are_scored_in_full(trained: Mllm) -> None:
    """Options equal up to their end cannot be told apart at one token."""
    task = Task("t", "choice", "accuracy", ("red", "red star", "red"), "Which?{modality}")
    sample = Sample(id="s", answer="red", text="a red star", label=0)
    prompted = render(sample, task)
    encoded = trained.encode(prompted)
    lettered = trained.score_options([encoded])[0]
    bare = type(encoded)(
        encoded.id,
        encoded.prompt,
        encoded.answer,
        None,
        tuple(trained.answer_ids(name) for name in task.classes),
    )
    full = trained.score_options([bare])[0]
    assert full[0] == pytest.approx(float(full[2]), abs=1e-6)  # the same words, the same score
    assert full[0] != pytest.approx(float(full[1]), abs=1e-6)
    loss = trained.loss_sum([type(encoded)("s", encoded.prompt, bare.options[1], None)])
    expected = -float(loss) * len(bare.options[1])
    assert float(full[1].log() - full[0].log()) == pytest.approx(
        expected
        + float(trained.loss_sum([type(encoded)("s", encoded.prompt, bare.options[0], None)]))
        * len(bare.options[0]),
        abs=1e-3,
    )
    assert lettered.sum() == pytest.approx(1.0)


def test_generation_equals_plain_transformers(trained: Mllm) -> None:
    picture = MemoryImage("plain-red", lambda: Image.new("RGB", (64, 64), (200, 30, 30)))
    questions = [
        Sample(id="a", question="what color is the shape?", answer="red", image=picture),
        Sample(id="b", question="is there a star?", answer="no"),
        Sample(id="c", question="how many things are in the image?", answer="0", image=picture),
    ]
    task = Task("vqa", "open", "accuracy")
    got = trained.generate([trained.encode(render(s, task)) for s in questions], max_new_tokens=5)
    processor = trained.processor
    for sample, answer in zip(questions, got, strict=True):
        content = [{"type": "text", "text": sample.question}]
        if sample.image is not None:
            content.insert(0, {"type": "image"})
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        images = [sample.image.open()] if sample.image is not None else None
        inputs = processor(text=text, images=images, return_tensors="pt")
        made = trained.model.generate(
            **inputs,
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=processor.tokenizer.convert_tokens_to_ids("<end_of_utterance>"),
        )[0, inputs["input_ids"].shape[1] :]
        assert answer == processor.tokenizer.decode(made, skip_special_tokens=True).strip()


def test_plain_peft_loads_a_saved_adapter(trained: Mllm, memes, tmp_path) -> None:
    trained.save_adapter(tmp_path)
    path = model_path("embedded")
    base = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, tmp_path).eval()
    processor = AutoProcessor.from_pretrained(path)
    picture = memes.test[0].image.open()
    inputs = processor(text="User: <image>\nhello", images=[picture], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs).logits, trained.model(**inputs).logits)
        with plain.disable_adapter():
            assert not torch.allclose(plain(**inputs).logits, trained.model(**inputs).logits)


def test_an_evicted_image_is_seen_again(mllm: Mllm, memes) -> None:
    items = mixed(mllm, memes)
    before = mllm.score_options(items)
    kept, mllm.features = mllm.features, FeatureCache(budget_bytes=1)
    try:
        torch.testing.assert_close(mllm.score_options(items), before, atol=1e-6, rtol=1e-5)
        assert len(mllm.features.memory) == 1
    finally:
        mllm.features = kept


def test_cache_drops_the_oldest_first() -> None:
    cache = FeatureCache(budget_bytes=100)
    for name in "abc":
        cache.put(name, ImageFeatures((1,), torch.zeros(10)))  # 40 bytes each
    assert [name for name in "abc" if cache.get(name)] == ["b", "c"]


def test_bad_input_is_named(mllm: Mllm) -> None:
    task = Task("vqa", "open", "accuracy")
    with pytest.raises(UserError, match=r"sample long is \d+ tokens long"):
        mllm.encode(
            render(Sample(id="long", question="word " * 500, answer="x"), task), max_length=200
        )
    picture = MemoryImage("blank", lambda: Image.new("RGB", (64, 64), "white"))
    with pytest.raises(UserError, match=r"sample twice: its text holds '<image>'"):
        mllm.encode(
            render(Sample(id="twice", question="<image> x?", answer="x", image=picture), task)
        )
    with pytest.raises(UserError, match=r"sample tweet: its text holds '<image>'"):
        mllm.encode(render(Sample(id="tweet", question="see <image>", answer="x"), task))
    with pytest.raises(UserError, match=r"sample end: its text holds '<end_of_utterance>'"):
        mllm.encode(render(Sample(id="end", question="x<end_of_utterance>", answer="x"), task))


def test_an_adapter_of_another_model_is_refused(mllm: Mllm) -> None:
    params = mllm.init_adapter(0)
    name = next(iter(params))
    with pytest.raises(UserError, match=r"does not fit.*lacks 1 tensors"):
        mllm.set_adapter({k: v for k, v in params.items() if k != name})
    with pytest.raises(UserError, match=r"unknown tensors, e.g. foreign"):
        mllm.set_adapter({**params, "foreign": torch.zeros(1)})
    with pytest.raises(UserError, match=r"is \(3, 3\), the model needs"):
        mllm.set_adapter({**params, name: torch.zeros(3, 3)})


def test_a_folder_without_a_model_is_a_user_error(tmp_path) -> None:
    with pytest.raises(UserError, match="cannot load model"):
        load_base(tmp_path, dtype=torch.float32, device="cpu")
    with pytest.raises(UserError, match="device 'cuda:99' cannot be used"):
        load_base(model_path("embedded"), dtype=torch.float32, device="cuda:99")


def test_targets_that_match_nothing_are_refused() -> None:
    base, _ = load_base(model_path("embedded"), dtype=torch.float32, device="cpu")
    for layer in base.get_decoder().layers:
        del layer.self_attn.q_proj, layer.self_attn.k_proj
        del layer.self_attn.v_proj, layer.self_attn.o_proj
    with pytest.raises(UserError, match="no LoRA targets"):
        lora_targets(base)


LONG = " ".join(f"word{i}" for i in range(400))


def test_long_text_is_refused_or_shortened_never_within_the_image(mllm: Mllm, memes) -> None:
    sample = replace(memes.train[0], text=LONG)
    prompted = render(sample, memes.task)
    with pytest.raises(UserError, match=rf"sample {sample.id} is .* of them its image's.*shorten"):
        mllm.encode(prompted, max_length=200)
    cut = mllm.encode(prompted, max_length=200, long_text="shorten")
    assert cut.shortened
    assert 180 < cut.longest <= 200
    image = mllm.base.config.image_token_id
    whole = mllm.encode(prompted, max_length=10_000)
    assert not whole.shortened
    assert cut.prompt.count(image) == whole.prompt.count(image) > 0
    assert cut.prompt[-30:] == whole.prompt[-30:]  # question and options
    assert cut.options == whole.options
    with pytest.raises(UserError, match=r"raise training.max_length or use smaller images"):
        mllm.encode(prompted, max_length=40, long_text="shorten")


def test_a_long_free_answer_is_cut_without_learning_to_end_there(mllm: Mllm) -> None:
    sample = Sample("s", LONG, question="what?")
    prompted = render(sample, Task("t", "open", "accuracy"))
    cut = mllm.encode(prompted, max_length=100, long_text="shorten")
    assert len(cut) == 100
    assert cut.answer == mllm.answer_ids(LONG)[: len(cut.answer)]
    assert mllm.answer_ids("")[-1] not in cut.answer


def test_what_fits_is_the_same_under_both_policies(mllm: Mllm, memes) -> None:
    prompted = render(memes.train[0], memes.task)
    assert mllm.encode(prompted) == mllm.encode(prompted, long_text="shorten")
