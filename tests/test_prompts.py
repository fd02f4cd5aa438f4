"""Prompts against texts that a person can read: tests/data/prompts/.

A changed prompt is a changed experiment. To write the files anew after a change that is meant:
`python tests/test_prompts.py`, then read the diff.
"""

import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path

import owner_files
import pytest
from PIL import Image

from fedmllm.data import load_dataset
from fedmllm.data.images import MemoryImage
from fedmllm.data.sample import Sample, Task
from fedmllm.errors import UserError
from fedmllm.prompts import (
    AGNOSTIC,
    STYLES,
    Prompted,
    choice_options,
    modality_words,
    render,
    shortened,
)

FOLDER = Path(__file__).parent / "data" / "prompts"
PICTURE = MemoryImage("x", lambda: Image.new("RGB", (2, 2)))
CRISIS_CLASSES = (
    "affected_individuals",
    "infrastructure_and_utility_damage",
    "injured_or_dead_people",
    "missing_or_found_people",
    "rescue_volunteering_or_donation_effort",
    "vehicle_damage",
    "other_relevant_information",
    "not_humanitarian",
)
CASES = {
    "memes": (
        Task(
            "memes",
            "choice",
            "auc",
            ("not-hateful", "hateful"),
            "Is the content hateful{modality}?",
        ),
        Sample("42953", "hateful", text="look at {this} one", image=PICTURE, label=1),
    ),
    "crisis": (
        Task(
            "crisis",
            "choice",
            "macro_f1",
            CRISIS_CLASSES,
            "What is the humanitarian category{modality}?",
        ),
        Sample(
            "901",
            "vehicle_damage",
            text="Cars under water in Houston #Harvey",
            image=PICTURE,
            label=5,
        ),
    ),
    "vqa": (
        Task("medical", "open", "accuracy"),
        Sample(
            "7",
            "yes",
            question="Is there a fracture?",
            text="Chest radiograph of an adult.",
            image=PICTURE,
            turns=(("What organ is this?", "the lung"),),
        ),
    ),
}
MODALITIES = {
    "image+text": (True, True),
    "image": (True, False),
    "text": (False, True),
    "neither": (False, False),
}


OWNED = owner_files.NAMES
LOADED = (*OWNED, "memes-drawn", "crisis-drawn", "medical", "easy-vqa")


def loaded(name, folder):
    """Task and samples of a dataset as its loader gives them: the first to train on, the first
    flashcard, the first to be tested with."""
    plain = name.removesuffix("-drawn")
    options = {"root": owner_files.write(name, folder)} if name in OWNED else {}
    if name == "easy-vqa":
        options = {"max_train": 1, "max_test": 1}
    elif not options:
        options = {"train": 8, "test": 8}
    data = load_dataset(plain, **options)
    found = [pool[0] for pool in (data.train, data.flashcards, data.test) if pool]
    return data.task, found


def shown(name):
    """All prompts of one sample, as the golden files hold them."""
    return prompts_of(*CASES[name])


def shown_of(name, folder):
    """The same of the samples of a dataset."""
    task, samples = loaded(name, folder)
    return "\n".join(f"##### {sample.id}\n{prompts_of(task, sample)}" for sample in samples)


def prompts_of(task, sample):
    parts = []
    for style, (holds, (image, text)) in product(STYLES, MODALITIES.items()):
        prompted = render(sample.masked(keep_image=image, keep_text=text), task, style)
        parts.append(f"===== {style}, {holds} =====")
        for user, assistant in prompted.turns:
            parts += [f"[user]\n{user}", f"[assistant]\n{assistant}"]
        parts.append(f"[options] {len(prompted.options)}")
    return "\n".join(parts) + "\n"


@pytest.mark.parametrize("name", CASES)
def test_prompts_are_the_golden_texts(name):
    assert shown(name) == (FOLDER / f"{name}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", LOADED)
def test_prompts_of_every_dataset_are_the_golden_texts(name, tmp_path):
    """From the owners' files, or as drawn, through the loader: plain and agnostic."""
    assert shown_of(name, tmp_path) == (FOLDER / f"of-{name}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["hateful-memes", "crisismmd", "memes-drawn", "crisis-drawn"])
def test_every_choice_task_names_the_agnostic_phrase_twice(name, tmp_path):
    task, samples = loaded(name, tmp_path)
    for image, text in MODALITIES.values():
        view = samples[0].masked(keep_image=image, keep_text=text)
        prompt = render(view, task, "agnostic").turns[0][0]
        assert f"Select the best answer{AGNOSTIC}." in prompt
        assert f"{AGNOSTIC}?\nOptions:" in prompt
        assert "based on" not in prompt


@pytest.mark.parametrize("name", ["memes", "crisis"])
def test_agnostic_prompts_differ_by_the_content_alone(name):
    """The instruction and the question read the same whatever the sample holds."""
    task, sample = CASES[name]
    frames = set()
    for image, text in MODALITIES.values():
        prompted = render(sample.masked(keep_image=image, keep_text=text), task, "agnostic")
        lines = prompted.turns[0][0].splitlines()
        assert (lines[0] == "<image>") == image
        assert any(line.startswith("Text: ") for line in lines) == text
        kept = [line for line in lines if line != "<image>" and not line.startswith("Text: ")]
        assert "\n".join(kept).count(AGNOSTIC) == 2
        frames.add("\n".join(kept))
    assert len(frames) == 1


@pytest.mark.parametrize("name", ["memes", "crisis"])
def test_plain_prompts_name_what_is_there_twice(name):
    task, sample = CASES[name]
    words = {
        "image+text": " based on the text and image",
        "image": " based on the image",
        "text": " based on the text",
    }
    for holds, (image, text) in MODALITIES.items():
        prompt = render(sample.masked(keep_image=image, keep_text=text), task).turns[0][0]
        assert prompt.count(" based on the ") == (2 if holds in words else 0)
        if holds in words:
            assert f"answer{words[holds]}." in prompt
            assert f"{words[holds]}?" in prompt


def test_the_answer_is_letter_and_option():
    task, sample = CASES["crisis"]
    prompted = render(sample, task)
    assert prompted.turns[0][1] == "(F) vehicle_damage"
    assert prompted.options == choice_options(CRISIS_CLASSES)
    assert prompted.options[0] == "(A) affected_individuals"
    assert prompted.options[-1] == "(H) not_humanitarian"
    assert prompted.sample is sample


def test_a_withheld_text_does_not_leak():
    for task, sample in CASES.values():
        for style in STYLES:
            prompt = render(sample.masked(keep_image=True, keep_text=False), task, style).turns
            assert sample.text not in str(prompt)
            prompt = render(sample.masked(keep_image=False, keep_text=True), task, style).turns
            assert "<image>" not in str(prompt)


def test_an_open_question_ignores_label_and_style():
    task, sample = CASES["vqa"]
    from dataclasses import replace

    assert render(replace(sample, label=3), task).turns == render(sample, task).turns
    assert render(sample, task, "agnostic").turns == render(sample, task, "plain").turns
    assert render(sample, task).turns[-1] == ("Is there a fracture?", "yes")


@pytest.mark.parametrize("name", CASES)
def test_unknown_styles_are_refused(name):
    task, sample = CASES[name]
    with pytest.raises(UserError, match="unknown prompt style 'plane': choose agnostic or plain"):
        render(sample, task, "plane")
    with pytest.raises(UserError, match="unknown prompt style"):
        modality_words(sample, "")


def words(prompted: Prompted) -> int:
    return sum(len(part.split()) for turn in prompted.turns for part in turn)


def test_only_the_end_of_the_text_is_cut() -> None:
    """Twelve words of text, of which five must go; the rest of the prompt stays to the letter."""
    task, sample = CASES["memes"]
    long = replace(sample, text="one two three four five six seven eight nine ten eleven twelve")
    full = render(long, task)
    cut = shortened(full, lambda p: words(p) <= words(full) - 5)
    kept = "one two three four five six seven"
    assert cut.turns == render(replace(long, text=kept), task).turns
    assert cut.options == full.options
    assert shortened(full, lambda p: True).turns[0][0].startswith("<image>\nSelect")


def test_text_that_repeats_the_question_is_cut_where_it_stands() -> None:
    """The text's place is known, not searched for."""
    task = Task("memes", "choice", "auc", ("a", "b"), "Is it{modality}?")
    for text in ("Select", "Question: Is it?", "Text: x", "a"):
        prompted = render(Sample("1", "a", text=text, image=PICTURE, label=0), task)
        begin, end = prompted.text_at
        assert prompted.turns[0][0][begin:end] == text
        assert prompted.turns[0][0][begin - 6 : begin] == "Text: "


def test_the_oldest_turns_go_and_the_image_stays() -> None:
    sample = Sample(
        "9",
        "four",
        question="fourth?",
        text="a very long text",
        image=PICTURE,
        turns=(("first?", "one"), ("second?", "two"), ("third?", "three")),
    )
    full = render(sample, Task("t", "open", "accuracy"))
    cut = shortened(full, lambda p: len(p.turns) <= 2)
    assert cut.turns == (("<image>\nthird?", "three"), ("fourth?", "four"))
    never = shortened(full, lambda p: False)
    assert never.turns == (("<image>\nfourth?", "four"),)


if __name__ == "__main__":
    for case in CASES:
        (FOLDER / f"{case}.txt").write_text(shown(case), encoding="utf-8")
    for case in LOADED:
        with tempfile.TemporaryDirectory() as place:
            text = shown_of(case, Path(place))
        (FOLDER / f"of-{case}.txt").write_text(text, encoding="utf-8")
