"""Row `evaluation`: questions a second with eight options, against one `generate` call a question.

The embedded crisis task, image and text, the base as it is, one thread. Theirs: for each question
`generate`, greedy, the image through the tower, until the answer ends or at most 32 tokens, as in
the authors' manner (`whole answer`). Kinder: three new tokens only, since the letter stands second
(`letter only`), and with the image's features given as ours are.
Tokenising and drawing are done before, for both. Ours: `score_options` in batches as a run makes
them, the images through the tower counted (against `pixels`) or seen before (against `features`).
The share of questions to which both give the same letter is told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import Took, compare, tell, timed, write

from fedmllm.config import make_config
from fedmllm.data import load_dataset
from fedmllm.experiment import load_model
from fedmllm.models.features import FeatureCache, feature_inputs
from fedmllm.models.mllm import Mllm
from fedmllm.models.passes import Encoded
from fedmllm.prompts import render

WHOLE, LETTER = 32, 3  # new tokens at most
LETTERS = "ABCDEFGH"


def generate(
    mllm: Mllm, items: list[Encoded], images: Callable[[int], dict[str, Any]], *, new: int
) -> list[str]:
    """An answer for each question, a call each."""
    answers, stop = [], mllm.answer_ids("")[-1]
    with torch.no_grad():
        for index, item in enumerate(items):
            ids = torch.tensor([item.prompt])
            made = mllm.base.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                **images(index),
                max_new_tokens=new,
                eos_token_id=stop,
                do_sample=False,
                pad_token_id=0,
            )
            answers.append(mllm.tokenizer.decode(made[0, ids.shape[1] :]))
    return answers


def letter(answer: str) -> int:
    """The first of the letters, -1 without one."""
    found = [LETTERS.index(c) for c in answer if c in LETTERS]
    return found[0] if found else -1


def agreement(answers: list[str], scores: torch.Tensor) -> float:
    """The share of questions with the same letter."""
    same = [letter(a) == int(row.argmax()) for a, row in zip(answers, scores, strict=True)]
    return sum(same) / len(same)


def measure(count: int, repeats: int) -> list[dict[str, Any]]:
    """Both cases."""
    config = make_config({"name": "speed", "data": {"name": "crisis", "train": 8, "test": count}})
    mllm = load_model(config)
    mllm.set_adapter(mllm.init_adapter(0))
    mllm.model.eval()
    dataset = load_dataset(**config.data)
    samples = dataset.test[:count]
    items = [mllm.encode(render(sample, dataset.task, config.prompt)) for sample in samples]
    pixels = []
    for sample in samples:
        assert sample.image is not None
        _, inputs = mllm.family.read(mllm.processor, sample.image.open())
        names = ("pixel_values", "pixel_attention_mask")
        pixels.append({name: torch.as_tensor(inputs[name]) for name in names if name in inputs})
    seen = mllm.features

    def tower() -> None:
        mllm.features = FeatureCache()
        for sample in samples:
            mllm.image_features(sample.image)

    def given(index: int) -> dict[str, Any]:
        return feature_inputs([seen.get(samples[index].image.key)], mllm.device)

    def score() -> torch.Tensor:
        return mllm.score_options(items, batch_size=config.evaluation.batch_size)

    cold: list[dict[str, Took]] = []
    warm: list[dict[str, Took]] = []
    for _ in range(repeats):
        _, first = timed(tower)
        scores, ours = timed(score)
        whole, to_the_end = timed(lambda: generate(mllm, items, pixels.__getitem__, new=WHOLE))
        answers, by_pixels = timed(lambda: generate(mllm, items, pixels.__getitem__, new=LETTER))
        kinder, by_features = timed(lambda: generate(mllm, items, given, new=LETTER))
        both = Took(first.wall + ours.wall, first.cpu + ours.cpu)
        cold.append({"ours": both, "whole answer": to_the_end, "letter only": by_pixels})
        warm.append({"ours": ours, "letter only": by_features})
    if min(agreement(found, scores) for found in (whole, answers, kinder)) < 0.95:
        raise SystemExit("error: scoring and generation part: they do not do the same work")
    common = {"count": len(items), "unit": "questions"}
    return [
        compare(
            "images through the tower",
            cold,
            goals={"whole answer": 20.0},
            agreement=agreement(whole, scores),
            example=whole[0],
            **common,
        ),
        compare(
            "features given",
            warm,
            goals={},
            agreement=agreement(kinder, scores),
            **common,
        ),
    ]


def main(quick: bool) -> None:
    """Both cases."""
    torch.set_num_threads(1)
    cases = measure(64 if quick else 200, 1 if quick else 3)
    for case in cases:
        tell(case)
    write("evaluation", cases, what=__doc__ or "", quick=quick)
