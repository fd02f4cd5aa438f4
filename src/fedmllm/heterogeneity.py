"""How far each party is from the others in what it holds, from a few numbers that it sends once.

A party k sends its *profile*: how many of its samples have image and text, image only, text only
or neither, and how many have each label; 4 (4 + C) bytes for C classes. The server makes of it

    a_k  share of its samples that lack a modality
    d_k  Jensen-Shannon divergence (base 2, in [0, 1]) of its shares from the mean of all parties'
    h_k = 1 - (1 - a_k) (1 - d_k)

h_k is 0 for a party with nothing missing among parties like it, and 1 for one without a whole
sample. It grows from aligned (0) over missing to single-modality parties (1), which is the order
in which the paper sets its weight by hand; d_k alone would call a federation without
heterogeneity one in which every party misses half.

With `epsilon` the party adds noise to its counts before it sends them: epsilon-differential
privacy for the addition or removal of one of its samples, by the geometric mechanism (Ghosh,
Roughgarden, Sundararajan, STOC 2009). One sample changes one count of either histogram by 1, so the
L1 sensitivity is 2 and P(noise = z) ~ exp(-epsilon |z| / 2). It protects the profile and nothing
else that a party sends. In a simulation the noise is a function of the run's seed, so that it can
be repeated: who knows the seed can subtract it. A party on a machine of its own (`sites/`) draws it
from its operating system's source of secrets.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import rel_entr

from fedmllm import rng
from fedmllm.data.sample import Sample
from fedmllm.errors import UserError

COMBINATIONS = ("image_text", "image", "text", "neither")
_INDEX = {(True, True): 0, (True, False): 1, (False, True): 2, (False, False): 3}
SENSITIVITY = 2  # L1: one sample is in one modality count and in one label count
COUNT_BYTES, WEIGHT_BYTES = 4, 4


@dataclass(frozen=True)
class Profile:
    """What a party says of itself. modalities: counts in the order of `COMBINATIONS`; labels:
    counts by class, empty where samples have none."""

    modalities: tuple[int, ...]
    labels: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        return COUNT_BYTES * (len(self.modalities) + len(self.labels))


@dataclass(frozen=True)
class Standing:
    """What the server makes of a profile: a_k, d_k, the same of the labels, and h_k."""

    profile: Profile
    incomplete: float
    divergence: float
    label_divergence: float
    index: float


def combination(sample: Sample) -> tuple[bool, bool]:
    """(has an image, has text). The question of an open sample is text that no scenario takes."""
    return sample.image is not None, sample.text is not None or bool(sample.question)


def is_complete(sample: Sample) -> bool:
    """Whether it has both modalities."""
    return combination(sample) == (True, True)


def profile_of(samples: Sequence[Sample], classes: int) -> Profile:
    """A party's profile. classes: C; 0 where samples have no labels."""
    modalities, labels = [0] * len(COMBINATIONS), [0] * classes
    for sample in samples:
        modalities[_INDEX[combination(sample)]] += 1
        if classes and sample.label is not None:
            labels[sample.label] += 1
    return Profile(tuple(modalities), tuple(labels))


def noised(profile: Profile, epsilon: float | None, *, client: str, seed: int | None) -> Profile:
    """The profile with geometric noise on every count, no count below 0; None adds nothing.

    seed: of the run, which with the client's name fixes the noise; None draws it in secret.
    Raises `UserError` unless epsilon is above 0.
    """
    if epsilon is None:
        return profile
    if not epsilon > 0:
        raise UserError(f"epsilon is {epsilon}: give a number above 0, or null for no noise")
    exact = (*profile.modalities, *profile.labels)
    rate = epsilon / SENSITIVITY
    noise = _secret(rate, len(exact)) if seed is None else _seeded(rate, len(exact), client, seed)
    counts = [max(0, count + z) for count, z in zip(exact, noise, strict=True)]
    cut = len(profile.modalities)
    return replace(profile, modalities=tuple(counts[:cut]), labels=tuple(counts[cut:]))


def _seeded(rate: float, size: int, client: str, seed: int) -> list[int]:
    """Two-sided geometric noise, P(z) ~ exp(-rate |z|): the difference of two geometric draws."""
    draw = rng.stream(seed, "profile-noise", client)
    p = -np.expm1(-rate)
    return [int(z) for z in draw.geometric(p, size) - draw.geometric(p, size)]


def _secret(rate: float, size: int) -> list[int]:
    """The same law, by inversion: floor(-ln(1 - U) / rate) is geometric."""

    def geometric() -> int:
        return math.floor(-math.log1p(-rng.secret_uniform()) / rate)

    return [geometric() - geometric() for _ in range(size)]


def standings(profiles: Mapping[str, Profile]) -> dict[str, Standing]:
    """Each party's standing among all of them. Parties count alike, however many samples they
    have. A party whose counts are all 0 (after noise) is taken for the mean of the others."""
    modalities = _shares([profile.modalities for profile in profiles.values()])
    labels = _shares([profile.labels for profile in profiles.values()])
    found = {}
    for k, (client, profile) in enumerate(profiles.items()):
        incomplete = float(1 - modalities[k][0])
        divergence = jensen_shannon(modalities[k], modalities.mean(0))
        found[client] = Standing(
            profile,
            incomplete,
            divergence,
            jensen_shannon(labels[k], labels.mean(0)),
            1 - (1 - incomplete) * (1 - divergence),
        )
    return found


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> float:
    """JSD(p, q) to base 2: 0 for equal distributions, 1 for disjoint ones; 0 over no outcomes."""
    middle = (p + q) / 2
    nats = float(rel_entr(p, middle).sum() + rel_entr(q, middle).sum()) / 2
    return min(1.0, max(0.0, nats / float(np.log(2))))


def factors(found: Mapping[str, Standing], strength: float) -> dict[str, float]:
    """exp(-strength * d_k) by client, divided by their mean: below 1 for a party that diverges
    more than others if `strength` is above 0, above 1 if it is below 0; all 1 if it is 0."""
    raw = {client: float(np.exp(-strength * each.divergence)) for client, each in found.items()}
    mean = sum(raw.values()) / len(raw)
    return {client: value / mean for client, value in raw.items()}


def traffic(profiles: Iterable[Profile], *, weighted: bool) -> tuple[int, int]:
    """Bytes up and down, once, of all parties together: profiles, and a weight to each."""
    sizes = [profile.nbytes for profile in profiles]
    return sum(sizes), WEIGHT_BYTES * len(sizes) if weighted else 0


def _shares(counts: Sequence[Sequence[int]]) -> np.ndarray:
    table = np.asarray(counts, dtype=float)
    totals = table.sum(1, keepdims=True)
    known = totals[:, 0] > 0
    shares = np.divide(table, totals, out=np.zeros_like(table), where=totals > 0)
    if known.any():
        shares[~known] = shares[known].mean(0)
    return shares
