"""Which modality tells the class by itself: a test in which all parties take part (ours).

Completing samples (`fedmllm.recombination`) assumes that a modality says something of the class
whatever the other is. Before the first round each party looks at its samples with an image, and
with a text, through that modality alone, and sends the sums of their representations by class.
Given everybody's sums it counts *hits*: samples that lie nearest to the mean that the other
parties have of their class. If the modality says nothing of the class, labels and nearest means
are independent, and the mean and variance of the hits follow from how often a party has each
label and finds each mean. The server adds up; a modality *tells* if the hits are enough standard
errors above chance. What does not tell is not filled in.

Shapes: n samples, C classes, D width of a representation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedmllm.data.sample import Sample
from fedmllm.rng import stream

MODALITIES = ("image", "text")
MOST = 128  # samples of a modality that a party tests
_FLAT = 1e-6  # spread, against the widest, below which a direction counts as constant

Represent = Callable[[Sequence[Sample]], np.ndarray]
"""Samples to their representations [n, D]."""


@dataclass(frozen=True)
class Seen:
    """A party's samples through one modality: representations [n, D] and labels [n]."""

    states: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Sums:
    """What a party sends of `Seen`, or the sum over parties: by class the number of samples [C]
    and the sum of their representations [C, D]; the sum of squares [D]."""

    counts: np.ndarray
    sums: np.ndarray
    squares: np.ndarray

    @property
    def numbers(self) -> int:
        """How many numbers it is on the wire."""
        return int(self.counts.size + self.sums.size + self.squares.size)


@dataclass(frozen=True)
class Hits:
    """A party's test of one modality. hits: of its samples; expected, variance: of that number
    if the modality said nothing of the class."""

    samples: int = 0
    hits: int = 0
    expected: float = 0.0
    variance: float = 0.0


def seen_alone(
    samples: Sequence[Sample], modality: str, represent: Represent, *, client: str, seed: int
) -> Seen | None:
    """Up to `MOST` of a party's samples that have the modality, without what else they have; None
    if it has no such sample."""
    held = [sample for sample in samples if getattr(sample, modality) is not None]
    if not held:
        return None
    draw = stream(seed, "evidence", client, modality)
    chosen = [held[i] for i in sorted(draw.permutation(len(held))[:MOST])]
    alone = [
        sample.masked(keep_image=modality == "image", keep_text=modality == "text")
        for sample in chosen
    ]
    labels = np.array([int(sample.label or 0) for sample in chosen])
    return Seen(represent(alone), labels)


def sums_of(seen: Seen, classes: int) -> Sums:
    """What a party sends."""
    states, member_nC = seen.states.astype(np.float64), np.eye(classes)[seen.labels]
    return Sums(member_nC.sum(0), member_nC.T @ states, (states**2).sum(0))


def total(sums: Iterable[Sums]) -> Sums:
    """Of all parties, at least one."""
    each = list(sums)
    return Sums(
        np.sum([one.counts for one in each], axis=0),
        np.sum([one.sums for one in each], axis=0),
        np.sum([one.squares for one in each], axis=0),
    )


def hits_of(seen: Seen, own: Sums, everybody: Sums) -> Hits:
    """A party's test against the other parties' means, with each direction scaled to spread 1
    over all parties. A class that no other party has is never the nearest; of equally near ones
    the first is."""
    counts = everybody.counts - own.counts
    known = np.flatnonzero(counts > 0.5)
    if not len(known) or len(seen.labels) < 2:
        return Hits(len(seen.labels))
    size = everybody.counts.sum()
    middle = everybody.sums.sum(0) / size
    spread = np.sqrt(np.maximum(everybody.squares / size - middle**2, 0.0))
    scale = np.where(spread > _FLAT * spread.max(), spread, np.inf)
    means_CD = (everybody.sums - own.sums)[known] / counts[known, None]
    states_nD, means_CD = (seen.states - middle) / scale, (means_CD - middle) / scale
    distance_nC = (means_CD**2).sum(1) - 2 * states_nD @ means_CD.T  # but for each sample's own
    nearest = known[distance_nC.argmin(1)]
    classes = range(len(counts))
    found = np.array([(nearest == c).sum() for c in classes], dtype=float)
    held = np.array([(seen.labels == c).sum() for c in classes], dtype=float)
    expected, variance = matches(found, held)
    return Hits(len(seen.labels), int((nearest == seen.labels).sum()), expected, variance)


def matches(found: np.ndarray, held: np.ndarray) -> tuple[float, float]:
    """Mean and variance of the number of places where two lists of n entries agree, one of them in
    random order. found, held: how often each entry stands in either, [C]; n is at least 2."""
    n, both = held.sum(), found * held
    mean = both.sum() / n
    variance = (both.sum() - (both * (found + held)).sum() / n + mean**2) / (n - 1)
    return float(mean), float(max(0.0, variance))


def score(tests: Iterable[Hits]) -> float:
    """Standard errors by which all parties' hits exceed chance; 0 where nothing was tested.

    Errors are added as if no party's test had to do with another's. But they test each other, and
    share what lies in the representations, so that the score is wider than a normal one: where a
    modality says nothing it passes 1.645 in five to twelve of a hundred federations (simulated in
    tests/test_evidence.py).
    """
    tests = list(tests)
    variance = sum(test.variance for test in tests)
    excess = sum(test.hits - test.expected for test in tests)
    return float(excess / variance**0.5) if variance else 0.0


def scores(tests: Mapping[str, Mapping[str, Hits]]) -> dict[str, float]:
    """`score` by modality. tests: by client and modality."""
    return {name: score(tests[client][name] for client in sorted(tests)) for name in MODALITIES}
