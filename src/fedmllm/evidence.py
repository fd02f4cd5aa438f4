"""Which modality tells the class by itself: a test in which all parties take part (ours).

Completing samples (`fedmllm.recombination`) assumes that a modality says something of the class
whatever the other is. Before the first round each party looks at its samples with an image, and
with a text, through that modality alone: is a sample nearer to the mean of the others of its class
than to the mean of any other class, in the representation of the base? It counts such hits, and
what the count would be if labels were drawn at random (mean and variance over permutations). The
server adds up; a modality *tells* if the hits are enough standard errors above chance. What does
not tell is not filled in.

A party sends six numbers, and no label or representation. Parties are small: what none of them
could tell alone shows in the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedmllm.data.sample import Sample
from fedmllm.rng import stream

MODALITIES = ("image", "text")
MOST = 128  # samples of a modality that a party tests
PERMUTATIONS = 200
_FLAT = 1e-6  # spread, against the widest, below which a direction counts as constant

Represent = Callable[[Sequence[Sample]], np.ndarray]
"""Samples to their representations [n, D]."""


@dataclass(frozen=True)
class Hits:
    """A party's test of one modality. hits: of its tested samples; expected, variance: of that
    number if labels were permuted. All 0 where it has fewer than two classes."""

    samples: int = 0
    hits: int = 0
    expected: float = 0.0
    variance: float = 0.0


def evidence_of(
    samples: Sequence[Sample], represent: Represent, *, client: str, seed: int
) -> dict[str, Hits]:
    """A party's test of each of `MODALITIES`, on up to `MOST` of its samples that have it."""
    found = {}
    for name in MODALITIES:
        held = [sample for sample in samples if getattr(sample, name) is not None]
        draw = stream(seed, "evidence", client, name)
        chosen = [held[i] for i in sorted(draw.permutation(len(held))[:MOST])]
        labels = np.array([sample.label for sample in chosen])
        if len(set(labels)) < 2:
            found[name] = Hits()
            continue
        alone = [s.masked(keep_image=name == "image", keep_text=name == "text") for s in chosen]
        found[name] = hits_of(represent(alone), labels, draw)
    return found


def hits_of(states: np.ndarray, labels: np.ndarray, draw: np.random.Generator) -> Hits:
    """The test of representations [n, D], each direction scaled to spread 1, with labels [n] of at
    least two classes."""
    states = states.astype(np.float64) - states.mean(0, dtype=np.float64)
    spread = states.std(0)
    states = states / np.where(spread > _FLAT * spread.max(), spread, np.inf)
    products = states @ states.T
    by_chance = [hits(products, draw.permutation(labels)) for _ in range(PERMUTATIONS)]
    expected, variance = float(np.mean(by_chance)), float(np.var(by_chance))
    return Hits(len(labels), hits(products, labels), expected, variance)


def hits(products: np.ndarray, labels: np.ndarray) -> int:
    """How many samples lie nearest to the mean of their own class, from which they are left out
    themselves. products: of all pairs of representations, [n, n]; of equal distances the first
    class counts."""
    classes, own = np.unique(labels, return_inverse=True)
    member_nC = np.eye(len(classes))[own]
    square_n1 = np.diag(products)[:, None]
    to_sum_nC = products @ member_nC
    count_nC = member_nC.sum(0) - member_nC
    norm_nC = (member_nC * to_sum_nC).sum(0) - 2 * member_nC * to_sum_nC + member_nC * square_n1
    to_sum_nC = to_sum_nC - member_nC * square_n1
    some = np.maximum(count_nC, 1)
    distance_nC = square_n1 - 2 * to_sum_nC / some + norm_nC / some**2
    distance_nC[count_nC == 0] = np.inf
    return int((distance_nC.argmin(1) == own).sum())


def score(tests: Iterable[Hits]) -> float:
    """Standard errors by which all parties' hits exceed chance; 0 where nothing was tested."""
    tests = list(tests)
    variance = sum(test.variance for test in tests)
    excess = sum(test.hits - test.expected for test in tests)
    return float(excess / variance**0.5) if variance else 0.0


def scores(tests: Mapping[str, Mapping[str, Hits]]) -> dict[str, float]:
    """`score` by modality. tests: by client and modality."""
    return {name: score(tests[client][name] for client in sorted(tests)) for name in MODALITIES}
