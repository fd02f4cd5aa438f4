"""Late fusion of modalities when the model is asked (ours; multiple choice only).

A federation whose parties hold one modality each never shows its model a whole sample. It learns
p(y | image) and p(y | text), and if image and text say nothing of each other given the answer,

    p(y | image, text)  is in proportion to  p(y | image) p(y | text) / p(y).

So a question that has both modalities is read three times, whole, without its text and without
its image, and

    log s(y) = (1 - f) log p(y | both) + f (log p(y | image) + log p(y | text) - log p(y))

where f = strength x the share of the federation's training samples with one modality among those
with any, and p(y) are the shares of its labels, both from the parties' profiles. Where all samples
are whole f is 0 and nothing changes. No training, no bytes but those of the profiles.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fedmllm.heterogeneity import COMBINATIONS, Profile

TINY = 1e-12  # a probability below it counts as it


@dataclass(frozen=True)
class Fusion:
    """share: f, in [0, 1]. prior: p(y) by class, above 0, of sum 1."""

    share: float
    prior: tuple[float, ...]

    def __call__(self, both: np.ndarray, image: np.ndarray, text: np.ndarray) -> np.ndarray:
        """Probabilities of the options [n, C] from those given both modalities, the image alone
        and the text alone, each [n, C]."""
        if not self.share:
            return both
        apart = _log(image) + _log(text) - np.log(np.asarray(self.prior))
        fused = (1 - self.share) * _log(both) + self.share * apart
        odds = np.exp(fused - fused.max(1, keepdims=True))
        return odds / odds.sum(1, keepdims=True)


def fusion_of(profiles: Iterable[Profile], *, strength: float) -> Fusion:
    """The federation's fusion from its parties' profiles, all samples alike.

    p(y) adds one to each count, so that a class which nobody has, or noise has taken, can still be
    the answer.
    """
    given = list(profiles)
    counts = np.sum([profile.modalities for profile in given], axis=0)
    labels = np.sum([profile.labels for profile in given], axis=0) + 1.0
    held = dict(zip(COMBINATIONS, counts.tolist(), strict=True))
    single = held["image"] + held["text"]
    some = held["image_text"] + single
    share = strength * single / some if some else 0.0
    return Fusion(float(share), tuple((labels / labels.sum()).tolist()))


def _log(p: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(np.asarray(p, dtype=np.float64), TINY))
