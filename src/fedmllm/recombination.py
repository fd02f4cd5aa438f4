"""What a party's epoch is made of where samples lack modalities (ours).

A sample that lacks a modality may be *completed* with that of another sample of the same party and
the same answer (and question, where each sample has its own), or may give its place to a whole
sample of the party. Neither changes the number of optimiser steps, and nothing leaves the party.

Completing assumes that, given the answer, image and text say nothing of each other: then a
completed sample is drawn from the same distribution as a whole one. Where they do (hateful memes:
a text excludes a thing and the picture shows that very thing), it is noise with a label.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from fedmllm.algorithms.base import Composition
from fedmllm.data.sample import ImageSource, Sample
from fedmllm.errors import UserError
from fedmllm.evidence import MODALITIES
from fedmllm.models.passes import Encoded
from fedmllm.rng import stream, uniform

T = TypeVar("T")
DONORS = 4  # completions made of a sample, of which each epoch draws one


def check_composition(given: Composition) -> None:
    """Raises `UserError` for a share that is none."""
    for name in ("recombine", "resample"):
        if not 0 <= getattr(given, name) <= 1:
            raise UserError(f"{name} is {getattr(given, name)}: give a share from 0 to 1")


def completions(
    samples: Sequence[Sample],
    *,
    client: str,
    seed: int,
    given: Mapping[str, Sequence[ImageSource]] | None = None,
    fill: Collection[str] = MODALITIES,
) -> dict[str, list[Sample]]:
    """`DONORS` completions of each sample that lacks a modality, by its id.

    samples: of one party, as it holds them. A sample without either modality gets both, of two
    donors. One whose answer no other sample with that modality has is left out. The question of an
    open sample is its text. given: by answer, images from elsewhere (`fedmllm.mixtures`) for a
    party that has none. fill: the modalities that may be filled in; a sample that lacks another
    is left out.
    """
    images: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    texts: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for sample in samples:
        if sample.image is not None:
            images[_kin(sample)].append(sample)
        if sample.text is not None:
            texts[_kin(sample)].append(sample)
    if given and not images:
        for answer, sources in given.items():
            images["", answer] += [Sample(source.key, answer, image=source) for source in sources]
    found = {}
    for sample in samples:
        lacks_text = sample.text is None and not sample.question
        pools = [
            pool[_kin(sample)] if name in fill else []
            for name, pool, lacks in (
                ("image", images, sample.image is None),
                ("text", texts, lacks_text),
            )
            if lacks
        ]
        if pools and all(pools):
            draw = stream(seed, "donors", client, sample.id)
            drawn = zip(*(_some(pool, draw) for pool in pools), strict=True)
            found[sample.id] = [_completed(sample, donors) for donors in drawn]
    return found


def compose(
    samples: Sequence[Encoded],
    given: Composition,
    *,
    client: str,
    round_: int,
    epoch: int,
    seed: int,
) -> list[Encoded]:
    """The samples of an epoch in the order given, each as it is, completed, or replaced.

    A sample that lacks a modality is completed with probability `recombine` if it can be; if not,
    it gives its place with probability `resample` to a whole sample, if the party has any. Whole
    samples stand in by turns. epoch: in its round, 0-based.
    """
    where = (client, round_, epoch)
    spare = _by_turns([item for item in samples if item.complete], stream(seed, "spare", *where))
    made = []
    for item in samples:
        if not item.complete and (
            item.completions and uniform(seed, "recombine", *where, item.id) < given.recombine
        ):
            draw = uniform(seed, "completion", *where, item.id)
            item = item.completions[int(draw * len(item.completions))]
        elif not item.complete and uniform(seed, "resample", *where, item.id) < given.resample:
            item = next(spare, item)
        made.append(item)
    return made


def _kin(sample: Sample) -> tuple[str, str]:
    return sample.question, sample.answer


def _some(pool: Sequence[Sample], draw: np.random.Generator) -> list[Sample]:
    """`DONORS` of the pool, each once before any again."""
    turns = _by_turns(pool, draw)
    return [next(turns) for _ in range(DONORS)]


def _by_turns(items: Sequence[T], draw: np.random.Generator) -> Iterator[T]:
    """All items in a random order, again and again; nothing if there are none."""
    while items:
        for i in draw.permutation(len(items)):
            yield items[i]


def _completed(sample: Sample, donors: Sequence[Sample]) -> Sample:
    """The sample with what it lacks from its donors, in the order image, text."""
    left, name, image, text = iter(donors), sample.id, sample.image, sample.text
    if image is None:
        donor = next(left)
        name, image = f"{name}+image:{donor.id}", donor.image
    if text is None and not sample.question:
        donor = next(left)
        name, text = f"{name}+text:{donor.id}", donor.text
    return replace(sample, id=name, image=image, text=text)
