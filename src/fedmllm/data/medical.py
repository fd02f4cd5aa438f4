"""Embedded medical: the twin of VQA-RAD plus the MedAlpaca flashcards, drawn.

Two sources, as in the paper: questions on grey scans for the parties that hold images, and
text-only flashcards for those that hold text. Every organ is drawn as a shape and has a name
that the base model does not connect with it; the flashcards teach the same names in words.

Sample fields of a scan question: image 64x64, question, answer, kind `open` or `closed`.
Of a flashcard: question, answer, kind `flashcard`; no image. The test split has scan questions.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from fedmllm.data.dataset import Dataset, DatasetSpec
from fedmllm.data.images import MemoryImage
from fedmllm.data.sample import Sample, Task
from fedmllm.data.scenes import Scene, Thing, draw, sample_scene
from fedmllm.errors import UserError
from fedmllm.rng import stream

TASK = Task(name="medical", kind="open", metric="accuracy")
ORGANS = {  # shape -> organ
    "circle": "brain",
    "ring": "heart",
    "rectangle": "lung",
    "triangle": "liver",
    "star": "spleen",
    "cross": "bone",
    "diamond": "kidney",
    "moon": "stomach",
}
SHADES = ("white", "gray")


def load(
    *, train: int = 1600, test: int = 1200, flashcards: int = 1200, draw_seed: int = 0
) -> Dataset:
    """Draw the dataset."""
    for name, count in (("train", train), ("test", test), ("flashcards", flashcards)):
        if count < 1:
            raise UserError(f"data.{name}: {count} samples are too few: at least 1")
    return Dataset(
        task=TASK,
        train=[_question("train", i, draw_seed) for i in range(train)],
        test=[_question("test", i, draw_seed) for i in range(test)],
        flashcards=[_flashcard(i, draw_seed) for i in range(flashcards)],
    )


SPEC = DatasetSpec(
    summary="drawn grey scans with open and closed questions, and text-only flashcards (VQA-RAD)",
    load=load,
    options={"train": 1600, "test": 1200, "flashcards": 1200, "draw_seed": 0},
    source="drawn by this package",
    licence="Apache-2.0",
)


def _question(split: str, index: int, seed: int) -> Sample:
    rng = stream(seed, "medical", split, index)
    scene = _scan(rng)
    thing = scene.things[rng.integers(len(scene.things))]
    question, answer, kind = _ask(rng, scene, thing)
    return Sample(
        id=f"medical-{split}-{index:05d}",
        question=question,
        answer=answer,
        image=MemoryImage(f"scene:{scene!r}", partial(draw, scene)),
        kind=kind,
    )


def _scan(rng: np.random.Generator) -> Scene:
    """One to three different organs on a dark ground."""
    while True:
        scene = sample_scene(
            rng, count=int(rng.integers(1, 4)), kinds=list(ORGANS), colours=SHADES, ground="dark"
        )
        if len({thing.kind for thing in scene.things}) == len(scene.things):
            return scene


def _ask(rng: np.random.Generator, scene: Scene, thing: Thing) -> tuple[str, str, str]:
    """One of four questions: which organ (open), where (open), is it there, is it white."""
    organ = ORGANS[thing.kind]
    which = rng.integers(4)
    if which == 0:
        return f"what organ is at the {thing.place}?", organ, "open"
    if which == 1:
        return f"where is the {organ}?", thing.place, "open"
    if which == 2:
        absent = sorted(set(ORGANS.values()) - {ORGANS[t.kind] for t in scene.things})
        there = bool(rng.integers(2))
        asked = organ if there else absent[rng.integers(len(absent))]
        return f"is there a {asked} in the scan?", "yes" if there else "no", "closed"
    asked = SHADES[rng.integers(2)]
    return f"is the {organ} {asked}?", "yes" if asked == thing.colour else "no", "closed"


def _flashcard(index: int, seed: int) -> Sample:
    rng = stream(seed, "medical", "flashcards", index)
    shapes = sorted(ORGANS)
    shape = shapes[rng.integers(len(shapes))]
    other = shapes[rng.integers(len(shapes))]
    cards = (
        (f"what organ looks like a {shape} on a scan?", ORGANS[shape]),
        (f"what does the {ORGANS[shape]} look like on a scan?", shape),
        (
            f"does the {ORGANS[other]} look like a {shape} on a scan?",
            "yes" if other == shape else "no",
        ),
    )
    question, answer = cards[rng.integers(len(cards))]
    return Sample(
        id=f"medical-flashcard-{index:05d}", question=question, answer=answer, kind="flashcard"
    )
