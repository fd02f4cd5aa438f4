"""Embedded memes: the twin of Hateful-Memes, drawn, with benign confounders by construction.

A text says of a thing that it does not belong here, or that only it belongs here; the picture
shows a thing. The meme is hateful if the picture shows what the text excludes. Memes come in
groups of four: two texts by two pictures, each text once hateful and once benign, each picture
likewise. So, as in Hateful-Memes (Kiela et al., NeurIPS 2020), the same text turns with another
image and the same image with another text, and neither modality alone tells the label.

Sample fields: text, image 64x64, label 0 not-hateful or 1 hateful.
Train and test differ in their things, pictures and wording draws; both are balanced.

`memes-swapped` has the same memes and the two labels exchanged. Who holds texts alone, or pictures
alone, cannot tell which of the two worlds it is in, as every text and every picture has each label
as often in both: what training in either of them finds there is not in the data.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from fedmllm.data.dataset import Dataset, DatasetSpec
from fedmllm.data.images import MemoryImage
from fedmllm.data.sample import Sample, Task
from fedmllm.data.scenes import COLOURS, KINDS, Scene, draw, sample_scene
from fedmllm.errors import UserError
from fedmllm.rng import stream

TASK = Task(
    name="memes",
    kind="choice",
    metric="auc",
    classes=("not-hateful", "hateful"),
    question="Is the content hateful{modality}?",
)
# What the text says of a thing: (excluded if shown, wordings)
AGAINST = (
    "{x} does not belong here",
    "keep {x} away from here",
    "{x} should leave our town",
    "we hate {x}",
    "there is no home for {x} in our street",
    "{x} must go away now",
    "please take {x} away from us",
    "{x} is not welcome in this world",
    "ban {x} from the school",
    "tell {x} to go home",
    "it is wrong to let {x} in",
    "a town without {x} is a good town",
)
ONLY = (
    "only {x} belongs here",
    "only {x} is welcome here",
    "all but {x} must go away",
    "we love {x} and no other",
    "keep all things but {x} away",
    "ban all but {x}",
    "nothing but {x} is good",
    "this town is for {x} only",
    "let nobody in but {x}",
    "all that is not {x} should leave",
    "we want no friend but {x}",
    "tell all but {x} to go home",
)


def load(
    *,
    train: int = 1600,
    test: int = 1200,
    wordings: int = 12,
    draw_seed: int = 0,
    swapped: bool = False,
) -> Dataset:
    """Draw the dataset; sizes are rounded up to whole groups of four.

    wordings: in how many ways, 1 to 12, a text says either thing; the fewer, the sooner learnt.
    swapped: exchange the labels.
    """
    for name, count in (("train", train), ("test", test)):
        if count < 4:
            raise UserError(f"data.{name}: {count} samples are too few: at least 4")
    if not 1 <= wordings <= len(AGAINST):
        raise UserError(f"data.wordings: {wordings} is not a number from 1 to {len(AGAINST)}")
    return Dataset(
        task=TASK,
        train=_samples("train", train, wordings, draw_seed, swapped),
        test=_samples("test", test, wordings, draw_seed, swapped),
    )


SPEC = DatasetSpec(
    summary="drawn memes, hateful or not: needs text and image together (twin of Hateful-Memes)",
    load=load,
    options={"train": 1600, "test": 1200, "wordings": 12, "draw_seed": 0},
    source="drawn by this package",
    licence="Apache-2.0",
)
SWAPPED = replace(
    SPEC,
    summary="memes with the two labels exchanged: a control for what is not learnt from data",
    load=partial(load, swapped=True),
)


def _samples(split: str, count: int, wordings: int, seed: int, swapped: bool) -> list[Sample]:
    return [
        sample
        for group in range((count + 3) // 4)
        for sample in _group(split, group, wordings, seed, swapped)
    ]


def _group(split: str, group: int, wordings: int, seed: int, swapped: bool) -> list[Sample]:
    """Two texts by two pictures; a text is hateful with exactly one of the pictures."""
    rng = stream(seed, "memes", split, group)
    scenes = _two_scenes(rng)
    against = bool(rng.integers(2))
    ways = (AGAINST if against else ONLY)[:wordings]
    texts = [ways[rng.integers(len(ways))].format(x=_name(scene)) for scene in scenes]
    return [
        _sample(
            f"memes-{split}-{group:05d}-{t}{s}",
            texts[t],
            scenes[s],
            ((t == s) == against) != swapped,
        )
        for t in range(2)
        for s in range(2)
    ]


def _two_scenes(rng: np.random.Generator) -> tuple[Scene, Scene]:
    """Pictures of two things that differ in kind or colour, often in one of them only."""
    first = sample_scene(rng, count=1)
    kind, colour = first.things[0].kind, first.things[0].colour
    near = rng.integers(3)  # 0: same colour, 1: same kind, 2: neither
    kinds = [kind] if near == 1 else [k for k in KINDS if k != kind]
    colours = [colour] if near == 0 else [c for c in COLOURS if c != colour]
    return first, sample_scene(rng, count=1, kinds=kinds, colours=colours)


def _name(scene: Scene) -> str:
    thing = str(scene.things[0])
    return f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"


def _sample(name: str, text: str, scene: Scene, hateful: bool) -> Sample:
    label = int(hateful)
    return Sample(
        id=name,
        answer=TASK.classes[label],
        text=text,
        image=MemoryImage(f"scene:{scene!r}", partial(draw, scene)),
        label=label,
    )
