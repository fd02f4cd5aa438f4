"""Scores of predictions: AUC, macro-F1, VQA accuracy, and how uncertain each is.

All are shares between 0 and 1 (multiply by 100 for tables), higher is better. A prediction that
could not be parsed is the class -1, which is always wrong.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from fedmllm.errors import UserError
from fedmllm.rng import stream


def auc(labels: Sequence[int], scores: Sequence[float]) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties half.

    labels: 0 or 1. scores: finite, e.g. the probability of class 1.
    Returns nan if one of the classes is absent. Raises `UserError` for scores not finite.
    """
    from sklearn.metrics import roc_auc_score  # only where it is needed: it takes a second to load

    y_N, s_N = _binary(labels, scores)
    if y_N.all() or not y_N.any():
        return math.nan
    return float(roc_auc_score(y_N, s_N))


def auc_standard_error(labels: Sequence[int], scores: Sequence[float]) -> float:
    """Standard error of `auc`, ties included.

    DeLong, DeLong, Clarke-Pearson, Biometrics 44 (1988): with V10_i the share of negatives below
    positive i and V01_j the share of positives above negative j, var = S10/m + S01/n, S the
    sample variances. Returns nan with fewer than two samples of a class.
    """
    from scipy.stats import rankdata

    y_N, s_N = _binary(labels, scores)
    pos_M, neg_N = s_N[y_N], s_N[~y_N]
    m, n = len(pos_M), len(neg_N)
    if min(m, n) < 2:
        return math.nan
    rank = rankdata(np.concatenate([pos_M, neg_N]))
    v10_M = (rank[:m] - rankdata(pos_M)) / n
    v01_N = 1 - (rank[m:] - rankdata(neg_N)) / m
    return float(np.sqrt(v10_M.var(ddof=1) / m + v01_N.var(ddof=1) / n))


def hard_letter_auc(
    labels: Sequence[int], predictions: Sequence[int], *, without_letter: float = 0.5
) -> float:
    """AUC of hard answers, for comparison with published figures: the balanced accuracy.

    labels: 0 or 1. predictions: 0, 1, or -1 for an answer without a letter, which counts as
    `without_letter`: undecided, between the two, or 2.0 as the reference counts it, a class above
    both. Where options are scored, as in every run here, each answer has a letter, and this is the
    reference's figure too.
    """
    score = {0: 0.0, 1: 1.0, -1: without_letter}
    return auc(labels, [score[int(prediction)] for prediction in predictions])


def macro_f1(labels: Sequence[int], predictions: Sequence[int], num_classes: int) -> float:
    """Mean of the F1 of each of the task's classes, all weighted alike.

    F1_c = 2 TP / (2 TP + FP + FN). All `num_classes` count: a class absent from both labels and
    predictions has F1 0, so that a score does not depend on which classes a test set has.
    """
    from sklearn.metrics import f1_score

    if not len(labels):
        return math.nan
    classes = list(range(num_classes))
    return float(f1_score(labels, predictions, labels=classes, average="macro", zero_division=0))


def macro_f1_standard_error(
    labels: Sequence[int], predictions: Sequence[int], num_classes: int, *, resamples: int = 200
) -> float:
    """Bootstrap standard error of `macro_f1` (Efron 1979): samples drawn anew with replacement.

    The draws are a function of the number of samples only, so the same predictions give the same
    error everywhere.
    """
    truth, guess = np.asarray(labels), np.asarray(predictions)
    if not len(truth):
        return math.nan
    picks = stream(0, "bootstrap", len(truth)).integers(len(truth), size=(resamples, len(truth)))
    values = [_fast_macro_f1(truth[pick], guess[pick], num_classes) for pick in picks]
    return float(np.std(values, ddof=1))


def _fast_macro_f1(truth: np.ndarray, guess: np.ndarray, num_classes: int) -> float:
    """`macro_f1` from counts, for the bootstrap's many calls."""
    known = guess >= 0
    hits = np.bincount(truth[truth == guess], minlength=num_classes)
    sizes = np.bincount(truth, minlength=num_classes)
    guessed = np.bincount(guess[known], minlength=num_classes)
    return float(np.mean(2 * hits / np.maximum(sizes + guessed, 1)))


def accuracy(predictions: Sequence[str], answers: Sequence[str]) -> float:
    """Share of predictions equal to the answer after `vqa_normalise`; nan for none."""
    matches = _matches(predictions, answers)
    return float(np.mean(matches)) if matches else math.nan


def accuracy_standard_error(value: float, count: int) -> float:
    """Binomial standard error sqrt(p (1 - p) / n) of an accuracy over n > 0 samples."""
    return math.sqrt(value * (1 - value) / count)


def vqa_accuracy(
    predictions: Sequence[str], answers: Sequence[str], kinds: Sequence[str] | None = None
) -> dict[str, float]:
    """`accuracy` over ``all`` questions and over each group that a kind names (`groups_of`)."""
    matches = _matches(predictions, answers)
    groups: dict[str, list[bool]] = {}
    for kind, match in zip(kinds or (), matches if kinds else (), strict=True):
        for group in groups_of(kind):
            groups.setdefault(group, []).append(match)
    groups["all"] = matches
    return {name: float(np.mean(m)) if m else math.nan for name, m in groups.items()}


def unparsable(predictions: Sequence[str], answers: Sequence[str]) -> int:
    """How many answers to open questions cannot be read as an answer at all.

    Those with nothing left after `vqa_normalise`, and those to a yes-no question (its true answer
    is one of the two) that are neither yes nor no. They count as wrong in `accuracy`.
    """
    given = [vqa_normalise(prediction) for prediction in predictions]
    closed = [vqa_normalise(answer) in ("yes", "no") for answer in answers]
    pairs = zip(given, closed, strict=True)
    return sum(not words or (yes_no and words not in ("yes", "no")) for words, yes_no in pairs)


def groups_of(kind: str) -> list[str]:
    """The groups in which a question of this kind counts: each path down to it, its last word.

    >>> groups_of("slake/en/open")
    ['slake', 'slake/en', 'slake/en/open', 'open']
    """
    words = kind.split("/") if kind else []
    paths = ["/".join(words[: end + 1]) for end in range(len(words))]
    return list(dict.fromkeys(paths + words[-1:]))


def mean_and_ci(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Mean and half width of its confidence interval, by Student's t with n - 1 degrees.

    The half width is nan for a single value. Raises ValueError for none.
    """
    from scipy.stats import t

    if not len(values):
        raise ValueError("the mean of no values is not defined")
    mean, n = float(np.mean(values)), len(values)
    if n == 1:
        return mean, math.nan
    quantile = t.ppf((1 + level) / 2, n - 1)
    return mean, float(quantile * np.std(values, ddof=1) / math.sqrt(n))


# --- VQA normalisation -------------------------------------------------------------------

_UP_TO_TEN = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(_UP_TO_TEN)}}
_ARTICLES = {"a", "an", "the"}
_NEGATED = "ai are ca could did does do had has have is might must need ought sha should was"
_NEGATED += " were wo would"
# Not here: ill, well, were, hell, shell, shed, wed, id, its, which are words of their own.
_CLIPPED = "i'm i've let's that's there's here's what's who's where's when's how's why's he's she's"
_CLIPPED += " it'll that'll there'll what'll who'll they'll you'll they're you're what're who're"
_CLIPPED += " they've you've we've could've should've would've might've must've who've what've"
_CLIPPED += " they'd you'd it'd there'd who'd how'd where'd o'clock y'all ma'am 'twas"
_CONTRACTIONS = {
    whole.replace("'", ""): whole
    for whole in [f"{verb}n't" for verb in _NEGATED.split()] + _CLIPPED.split()
}
_PUNCTUATION = re.escape(';/[]"{}()=+\\_-<>@`,?!:*#|。、「」《》“”')


def vqa_normalise(answer: str) -> str:
    """An answer in the form in which VQA answers are compared.

    Lower case; punctuation gone (a space where it joins two words; kept are apostrophes and
    decimal points; ``1,000`` is ``1000``); number words up to ten as digits, ``none`` as 0;
    contractions with their apostrophe (``dont`` is ``don't``); no articles. As described by
    Antol et al., "VQA", ICCV 2015, and the evaluation page of Goyal et al., CVPR 2017.

    Beyond the description: full-width and other compatibility characters are unified (NFKC),
    quotes, ``: * # |`` and the commonest Chinese marks removed; an answer of articles only, such
    as the letter A, stays.
    """
    text = unicodedata.normalize("NFKC", answer).lower().replace("’", "'").replace("‘", "'")
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(rf"[{_PUNCTUATION}]", " ", text)
    text = re.sub(r"\.(?!\d)", "", text)
    words = [word.strip("'") for word in text.split()]
    words = [_NUMBERS.get(word, _CONTRACTIONS.get(word, word)) for word in words if word]
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def _matches(predictions: Sequence[str], answers: Sequence[str]) -> list[bool]:
    pairs = zip(predictions, answers, strict=True)
    return [vqa_normalise(prediction) == vqa_normalise(answer) for prediction, answer in pairs]


def _binary(labels: Sequence[int], scores: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Labels as booleans, scores as float64, both (N,), checked."""
    y_N, s_N = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if y_N.shape != s_N.shape or y_N.ndim != 1:
        raise ValueError(f"labels {y_N.shape} and scores {s_N.shape} must be two equal lists")
    if not np.isin(y_N, (0, 1)).all():
        raise ValueError("AUC is for two classes: labels must be 0 or 1")
    if not np.isfinite(s_N).all():
        raise UserError("a score is not finite, so there is no AUC: the model diverged")
    return y_N.astype(bool), s_N
