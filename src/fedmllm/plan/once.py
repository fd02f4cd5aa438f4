"""Bytes that cross once, before the first round, from what the parties of a run hold.

Profiles and evidence are counted as a run counts them. Of mixtures an upper bound is counted where
images become different numbers of tokens, where two files may hold the same picture, or where
evidence may turn them off.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from fedmllm import evidence
from fedmllm.config import Config
from fedmllm.data.images import MemoryImage
from fedmllm.data.sample import ImageSource, Sample, Task
from fedmllm.mixtures import MOST
from fedmllm.parties import evidence_traffic, givers_takers, parties_of

Parts = Mapping[str, tuple[int, int]]
"""Bytes up and down of all parties together, by what they are for."""


@dataclass(frozen=True)
class Once:
    """parts: those that cross. bound: of them, the names of those that may be fewer."""

    parts: Parts = field(default_factory=dict)
    bound: tuple[str, ...] = ()


def count_once(
    config: Config,
    task: Task,
    samples: Mapping[str, Sequence[Sample]],
    *,
    width: int,
    numbers: int,
    same_size: bool,
    picture: Callable[[ImageSource], Hashable],
) -> Once:
    """samples: by client, those that it trains on. width: of the language model. numbers: that an
    image's features are at most. same_size: whether each image has so many. picture: tells pictures
    apart."""
    if config.topology != "federated":
        return Once()
    found = {"profiles": parties_of(config, task, samples).once}
    if config.strategy.evidence:
        found["evidence"] = _evidence(samples, len(task.classes), width)
    if config.strategy.mixtures:
        found["mixtures"] = _mixtures(config.strategy.mixtures, samples, numbers, picture)
    images = [s.image for held in samples.values() for s in held if s.image is not None]
    drawn = all(isinstance(image, MemoryImage) for image in images)
    sure = same_size and drawn and not config.strategy.evidence
    parts = {name: amount for name, amount in found.items() if any(amount)}
    return Once(parts, ("mixtures",) if "mixtures" in parts and not sure else ())


def _evidence(samples: Mapping[str, Sequence[Sample]], classes: int, width: int) -> tuple[int, int]:
    one = classes + classes * width + width
    seen = {
        client: [
            one
            for name in evidence.MODALITIES
            if any(getattr(sample, name) is not None for sample in held)
        ]
        for client, held in samples.items()
    }
    tested = {client: len(found) for client, found in seen.items()}
    return evidence_traffic(seen, tested)


def _mixtures(
    size: int,
    samples: Mapping[str, Sequence[Sample]],
    numbers: int,
    picture: Callable[[ImageSource], Hashable],
) -> tuple[int, int]:
    images = {c: any(s.image is not None for s in held) for c, held in samples.items() if held}
    givers, takers = givers_takers(images, evidence.MODALITIES)
    made = 0
    for client in givers if takers else ():
        class_of: dict[Hashable, str] = {}  # of each picture, the first that it stands in
        for sample in samples[client]:
            if sample.image is not None:
                class_of.setdefault(picture(sample.image), sample.answer)
        made += sum(min(MOST, count // size) for count in Counter(class_of.values()).values())
    payload = 4 * numbers * made
    return payload, payload * len(takers)
