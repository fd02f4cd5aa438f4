"""Embedded crisis: the twin of CrisisMMD's humanitarian task, drawn.

Eight classes. The picture shows one of four things and the text speaks of one of four matters;
each thing belongs to two classes and each matter to two, so that together they name the class
and either alone leaves two. A cue is wrong in a few samples (`noise`), in each modality on its
own, so that nothing is certain.

| | person | house | car | tree |
|---|---|---|---|---|
| help | affected_individuals | | rescue_… | |
| search | injured_… | missing_… | | |
| damage | | infrastructure_… | | other_relevant_… |
| everyday | | | vehicle_damage | not_humanitarian |

A smaller form has the first four of them, of two things and two matters (`classes: 4`):

| | person | house |
|---|---|---|
| search | injured_… | missing_… |
| damage | affected_individuals | infrastructure_… |

Sample fields: text, image 64x64 with one or two things (the second is no cue), label 0..7
(0..3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from fedmllm.data.dataset import Dataset, DatasetSpec
from fedmllm.data.images import MemoryImage
from fedmllm.data.sample import Sample, Task
from fedmllm.data.scenes import KINDS, Scene, draw, sample_scene
from fedmllm.errors import UserError
from fedmllm.rng import stream

CLASSES = (
    "affected_individuals",
    "infrastructure_and_utility_damage",
    "injured_or_dead_people",
    "missing_or_found_people",
    "rescue_volunteering_or_donation_effort",
    "vehicle_damage",
    "other_relevant_information",
    "not_humanitarian",
)
TASK = Task(
    name="crisis",
    kind="choice",
    metric="macro_f1",
    classes=CLASSES,
    question="What is the humanitarian category{modality}?",
)
THINGS = ("person", "house", "car", "tree")
OTHERS = tuple(kind for kind in KINDS if kind not in THINGS)
TEXTS = {
    "help": ("people need water and food", "please donate and help", "families need shelter"),
    "search": ("we hope all people are safe", "hospital report from the town", "pray for us"),
    "damage": ("the storm hit the bridge and road", "flood damage in the city", "fire and smoke"),
    "everyday": ("on the street today", "what a day", "look at this in the city"),
}
# number of classes -> class -> (thing in the picture, matter of the text)
CUES = {
    4: (("person", "damage"), ("house", "damage"), ("person", "search"), ("house", "search")),
    8: (
        ("person", "help"),
        ("house", "damage"),
        ("person", "search"),
        ("house", "search"),
        ("car", "help"),
        ("car", "everyday"),
        ("tree", "damage"),
        ("tree", "everyday"),
    ),
}


def load(
    *,
    train: int = 2000,
    test: int = 1200,
    noise: float = 0.05,
    draw_seed: int = 0,
    classes: int = 8,
) -> Dataset:
    """Draw the dataset. noise: share of samples, in each modality, whose cue is another's.
    classes: 8, or 4 for a smaller form that is sooner learnt."""
    if classes not in CUES:
        raise UserError(f"data.classes: {classes} is neither 4 nor 8")
    for name, count in (("train", train), ("test", test)):
        if count < classes:
            raise UserError(f"data.{name}: {count} samples are too few: at least {classes}")
    if not 0 <= noise <= 1:
        raise UserError(f"data.noise: {noise} is not a share: 0 to 1")
    return Dataset(
        task=replace(TASK, classes=CLASSES[:classes]),
        train=[_sample("train", i, noise, draw_seed, CUES[classes]) for i in range(train)],
        test=[_sample("test", i, noise, draw_seed, CUES[classes]) for i in range(test)],
    )


SPEC = DatasetSpec(
    summary="drawn tweets of disasters, eight classes: text and image each tell half (CrisisMMD)",
    load=load,
    options={"train": 2000, "test": 1200, "noise": 0.05, "draw_seed": 0, "classes": 8},
    source="drawn by this package",
    licence="Apache-2.0",
)


def _sample(
    split: str, index: int, noise: float, seed: int, cues: Sequence[tuple[str, str]]
) -> Sample:
    rng = stream(seed, "crisis", split, index)
    label = index % len(cues)
    thing, matter = cues[label]
    things = [each for each in THINGS if each in {cue[0] for cue in cues}]
    matters = [each for each in TEXTS if each in {cue[1] for cue in cues}]
    if rng.random() < noise:
        thing = things[rng.integers(len(things))]
    if rng.random() < noise:
        matter = matters[rng.integers(len(matters))]
    wordings = TEXTS[matter]
    scene = _scene(rng, thing)
    return Sample(
        id=f"crisis-{split}-{index:05d}",
        answer=CLASSES[label],
        text=wordings[rng.integers(len(wordings))],
        image=MemoryImage(f"scene:{scene!r}", partial(draw, scene)),
        label=label,
    )


def _scene(rng: np.random.Generator, thing: str) -> Scene:
    """The cue, in half of the pictures beside a thing that is none."""
    alone = sample_scene(rng, count=1, kinds=[thing])
    if rng.random() < 0.5:
        return alone
    pair = sample_scene(rng, count=2, kinds=OTHERS, ground="pale")
    cue = alone.things[0]
    other = next(t for t in pair.things if t.place != cue.place)
    return Scene((cue, other), alone.ground, alone.noise, alone.noise_seed)
