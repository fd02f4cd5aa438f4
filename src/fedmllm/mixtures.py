"""Mixed features: what parties with images give, once, to those without (after FedMix).

Yoon, Shin, Hwang, Yang, "FedMix", ICLR 2021: parties exchange means of a few inputs so that each
can train on an approximation of what it does not hold. Here a mean is that of the frozen
connector's output over `size` images of one class, which does not change over the rounds. A party
of texts completes its samples with mixtures of their class (`fedmllm.recombination`) and so trains
on something whole.

This is no private channel: a mixture tells something of each of its images, the less the more there
are in it. N x D numbers of the language model's width each, N tokens an image.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from fedmllm.data.sample import ImageSource, Sample
from fedmllm.models.features import GivenFeatures, ImageFeatures
from fedmllm.rng import stream

Layout = tuple[str, tuple[int, ...], str]
MOST = 4  # mixtures of a class that a party gives

Mixtures = Mapping[str, Sequence[GivenFeatures]]
"""By class name."""


def mixtures_of(
    samples: Sequence[Sample],
    see: Callable[[ImageSource], ImageFeatures],
    *,
    size: int,
    client: str,
    seed: int,
) -> dict[str, list[GivenFeatures]]:
    """A party's mixtures: of each class up to `MOST`, each of `size` different pictures, none
    in two; one that stands in samples of several classes counts for the first.

    see: the features of an image. Only images that are cut into the same tokens are mixed; a class
    with fewer than `size` of them has no mixture.
    """
    by_class: dict[str, list[ImageSource]] = defaultdict(list)
    used: set[str] = set()  # one picture may stand in several samples
    for sample in samples:
        if sample.image is not None and sample.image.key not in used:
            used.add(sample.image.key)
            by_class[sample.answer].append(sample.image)
    made: dict[str, list[GivenFeatures]] = {}
    for name, images in by_class.items():
        drawn = [images[i] for i in stream(seed, "mixtures", client, name).permutation(len(images))]
        if found := _mixed(drawn, see, size):
            made[name] = found
    return made


def gathered(given: Mapping[str, Mapping[str, Sequence[GivenFeatures]]]) -> Mixtures:
    """What the server hands out, of all parties' mixtures (by client and class)."""
    pool: dict[str, list[GivenFeatures]] = defaultdict(list)
    for client in sorted(given):
        for name, each in given[client].items():
            pool[name] += each
    return dict(pool)


def payload(mixtures: Mixtures) -> int:
    """Bytes of the features on the wire, in float32 as adapters are."""
    return sum(
        4 * part.numel() for each in mixtures.values() for one in each for part in _parts(one)
    )


def _mixed(
    images: Sequence[ImageSource], see: Callable[[ImageSource], ImageFeatures], size: int
) -> list[GivenFeatures]:
    waiting: dict[Layout, list[tuple[str, ImageFeatures]]] = defaultdict(list)
    made: list[GivenFeatures] = []
    for image in images:
        seen = see(image)
        group = waiting[layout(seen)]
        group.append((image.key, seen))
        if len(group) == size:
            made.append(_mean(group))
            group.clear()
        if len(made) == MOST:
            break
    return made


def layout(image: ImageFeatures) -> Layout:
    """What images must share so that their rows are of the same places: words, shape, and what the
    model is told of their grid."""
    inputs = [(name, value.flatten().tolist()) for name, value in sorted(image.inputs.items())]
    return image.words, tuple(image.features.shape), repr(inputs)


def _mean(group: Sequence[tuple[str, ImageFeatures]]) -> GivenFeatures:
    """The mean of features; the key names its images, so equal keys mean equal features."""
    named = hashlib.sha256("\x1f".join(key for key, _ in group).encode()).hexdigest()
    images = [image for _, image in group]
    mixed = replace(
        images[0],
        features=_average([image.features for image in images]),
        deepstack=tuple(
            _average(level) for level in zip(*(i.deepstack for i in images), strict=True)
        ),
    )
    return GivenFeatures(f"mixture:{named[:32]}", mixed)


def _average(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([part.float() for part in parts]).mean(0).to(parts[0].dtype)


def _parts(one: GivenFeatures) -> tuple[torch.Tensor, ...]:
    return (one.features.features, *one.features.deepstack)
