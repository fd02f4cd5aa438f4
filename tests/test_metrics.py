"""Metrics against numbers worked by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmllm.data.sample import Sample
from fedmllm.errors import UserError
from fedmllm.evaluation import open_metrics
from fedmllm.metrics import (
    _fast_macro_f1,
    accuracy,
    accuracy_standard_error,
    auc,
    auc_standard_error,
    groups_of,
    hard_letter_auc,
    macro_f1,
    macro_f1_standard_error,
    mean_and_ci,
    unparsable,
    vqa_accuracy,
    vqa_normalise,
)


def pairwise_auc(labels, scores):
    """The definition: wins among (positive, negative) pairs, ties half."""
    pairs = [(p, n) for p, y in zip(scores, labels, strict=True) if y for n, z in
             zip(scores, labels, strict=True) if not z]  # fmt: skip
    return sum((p > n) + 0.5 * (p == n) for p, n in pairs) / len(pairs)


def test_auc_by_hand():
    """Positives .8 .4, negatives .4 .1: pairs (.8,.4) 1, (.8,.1) 1, (.4,.4) ½, (.4,.1) 1."""
    assert auc([1, 1, 0, 0], [0.8, 0.4, 0.4, 0.1]) == 3.5 / 4
    assert auc([0, 1], [0.9, 0.1]) == 0.0
    assert auc([0, 1], [-5.0, 3.0]) == 1.0


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5)), min_size=2, max_size=30))
def test_auc_is_the_share_of_pairs_won(rows):
    labels, scores = [y for y, _ in rows], [s for _, s in rows]
    if len(set(labels)) < 2:
        assert math.isnan(auc(labels, scores))
    else:
        assert auc(labels, scores) == pytest.approx(pairwise_auc(labels, scores))


def test_auc_standard_error_by_hand():
    """Positives 3, 1; negatives 2, 0. V10 = (1, ½), V01 = (½, 1): both variances are 1/8."""
    assert auc_standard_error([1, 1, 0, 0], [3, 1, 2, 0]) == pytest.approx(math.sqrt(1 / 8))
    assert auc_standard_error([1, 1, 0, 0], [1, 1, 0, 0]) == 0.0
    # positives 4, 1; negatives 3, 2, 0: V10 = (1, 1/3), var 2/9; V01 = (½, ½, 1), var 1/12
    error = auc_standard_error([1, 1, 0, 0, 0], [4, 1, 3, 2, 0])
    assert error == pytest.approx(math.sqrt(2 / 9 / 2 + 1 / 12 / 3))
    assert math.isnan(auc_standard_error([1, 0, 0], [1, 0, 0]))


def test_auc_standard_error_is_the_spread_over_samples():
    """200 draws of 40 positives N(1, 1) and 60 negatives N(0, 1)."""
    generator = np.random.Generator(np.random.PCG64(0))
    labels = np.r_[np.ones(40, int), np.zeros(60, int)]
    scores = generator.normal(labels, 1, size=(200, 100))
    spread = np.std([auc(labels, row) for row in scores])
    mean = np.mean([auc_standard_error(labels, row) for row in scores])
    assert mean == pytest.approx(spread, rel=0.1)


def test_hard_letter_auc_is_balanced_accuracy():
    """3 of 4 positives and 1 of 2 negatives right: (.75 + .5) / 2."""
    labels = [1, 1, 1, 1, 0, 0]
    assert hard_letter_auc(labels, [1, 1, 1, 0, 0, 1]) == pytest.approx(0.625)


def test_hard_letter_auc_counts_unreadable_answers_as_undecided():
    """Not above both, as in the reference: (1 + 1 + ½ + 1) / 4 for positives B, -, negatives A, -
    would be (A<B, -<B, A<-, -=-) = 3.5 / 4; for a positive A it is worth nothing more."""
    assert hard_letter_auc([1, 1, 0, 0], [1, -1, 0, -1]) == 3.5 / 4
    assert hard_letter_auc([1, 0], [-1, -1]) == 0.5
    assert hard_letter_auc([1, 0], [-1, 1]) == 0.0


def test_hard_letter_auc_as_the_reference_counts():
    """Scores 1, 2 against 0, 2: the positive 1 beats 0 and not 2, the positive 2 beats 0 and ties
    with 2: (1 + 0 + 1 + 0.5) / 4."""
    found = hard_letter_auc([1, 1, 0, 0], [1, -1, 0, -1], without_letter=2.0)
    assert found == pytest.approx(0.625)
    assert hard_letter_auc([1, 0], [-1, 1], without_letter=2.0) == 1.0


def test_macro_f1_by_hand():
    """Class 0: TP 1, FP 1, FN 1: ½. Class 1: TP 2, FP 0, FN 1: 4/5. Class 2: FP 1: 0."""
    labels, predictions = [0, 0, 1, 1, 1], [0, 2, 1, 1, 0]
    assert macro_f1(labels, predictions, 3) == pytest.approx((0.5 + 0.8 + 0) / 3)


def test_macro_f1_counts_all_classes_of_the_task():
    """A class absent from labels and predictions has F1 0."""
    assert macro_f1([0, 1], [0, 1], 2) == 1.0
    assert macro_f1([0, 1], [0, 1], 8) == pytest.approx(2 / 8)


def test_macro_f1_counts_unreadable_answers_as_misses():
    """Class 0: TP 1, FN 1: 2/3. Class 1: 1. The -1 itself is no class."""
    assert macro_f1([0, 0, 1], [0, -1, 1], 2) == pytest.approx((2 / 3 + 1) / 2)
    assert math.isnan(macro_f1([], [], 2))


@pytest.mark.parametrize("scores", [[0.1, math.nan], [0.1, math.inf]])
def test_scores_that_are_not_finite_are_refused(scores):
    with pytest.raises(UserError, match="not finite"):
        auc([0, 1], scores)


def test_auc_refuses_what_is_not_binary():
    with pytest.raises(ValueError, match="0 or 1"):
        auc([0, 2], [0.1, 0.2])
    with pytest.raises(ValueError, match="equal lists"):
        auc([0, 1, 1], [0.1, 0.2])


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("Yes", "yes"),
        ("  yes\n", "yes"),
        ("Yes.", "yes"),
        ("yes!", "yes"),
        ("**Yes**", "yes"),
        ("'yes'", "yes"),
        ("“yes”", "yes"),
        ("The left lung", "left lung"),
        ("an  x-ray", "x ray"),
        ("left - sided", "left sided"),
        ("left/right", "left right"),
        ("two", "2"),
        ("Ten", "10"),
        ("none", "0"),
        ("1.5 cm", "1.5 cm"),
        (".5", ".5"),
        ("U.S.", "us"),
        ("1,000", "1000"),
        ("1,000,000", "1000000"),
        ("1,2", "1 2"),
        ("dont know", "don't know"),
        ("don't know", "don't know"),
        ("don’t know", "don't know"),
        ("it's", "it's"),
        ("ill", "ill"),
        ("were", "were"),
        ("A", "a"),
        ("the a", "the a"),
        ("", ""),
        ("?", ""),
        ("是。", "是"),
        ("ＣＴ", "ct"),
        ("twofold", "twofold"),
        ("theatre", "theatre"),
    ],
)
def test_vqa_normalisation(answer, normal):
    assert vqa_normalise(answer) == normal


@given(st.text(max_size=40))
def test_vqa_normalisation_is_idempotent(answer):
    once = vqa_normalise(answer)
    assert vqa_normalise(once) == once


def test_a_path_of_groups_is_reported_part_by_part():
    """Two test sets in one list: s/en right, s/zh wrong, v half right."""
    kinds = ["s/en/open", "s/zh/open", "v/open", "v/closed"]
    found = vqa_accuracy(["a1", "no", "c1", "no"], ["a1", "b1", "c1", "d1"], kinds)
    assert found == {
        "all": 0.5,
        **{"s": 0.5, "s/en": 1.0, "s/en/open": 1.0, "s/zh": 0.0, "s/zh/open": 0.0},
        **{"v": 0.5, "v/open": 1.0, "v/closed": 0.0},
        **{"open": 2 / 3, "closed": 0.0},
    }
    assert groups_of("") == []
    assert groups_of("open") == ["open"]
    assert groups_of("v/open") == ["v", "v/open", "open"]


def test_vqa_accuracy_by_group():
    found = vqa_accuracy(
        ["Yes.", "no", "the liver", "two"],
        ["yes", "yes", "Liver", "3"],
        ["closed", "closed", "open", "open"],
    )
    assert found == {"all": 0.5, "closed": 0.5, "open": 0.5}
    assert vqa_accuracy(["a", "b"], ["a", "c"]) == {"all": 0.5}
    assert vqa_accuracy(["x", "y"], ["x", "z"], ["", "open"]) == {"all": 0.5, "open": 0.0}
    found = vqa_accuracy(["x", "y"], ["x", "z"], ["all/x", "mine/all"])
    assert found == {"all": 0.5, "all/x": 1.0, "x": 1.0, "mine": 0.0, "mine/all": 0.0}
    assert accuracy(["Yes.", "no"], ["yes", "yes"]) == 0.5
    assert math.isnan(accuracy([], []))
    with pytest.raises(ValueError, match="zip"):
        vqa_accuracy(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="zip"):
        vqa_accuracy(["a", "b"], ["a", "b"], ["open"])


def test_mean_and_ci_by_hand():
    """1, 2, 3: mean 2, s = 1, t(.975, 2) = 4.3027 (table), half width 4.3027 / sqrt 3."""
    mean, half = mean_and_ci([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    _, narrower = mean_and_ci([1.0, 2.0, 3.0], level=0.9)
    assert narrower == pytest.approx(2.9200 / math.sqrt(3), rel=1e-4)
    mean, half = mean_and_ci([5.0])
    assert mean == 5.0
    assert math.isnan(half)
    with pytest.raises(ValueError, match="no values"):
        mean_and_ci([])


def test_accuracy_standard_error():
    assert accuracy_standard_error(0.8, 400) == pytest.approx(0.02)


def test_macro_f1_standard_error_is_that_of_many_test_sets() -> None:
    """Against the spread over 300 independent test sets of a classifier right in 70 %."""
    rng = np.random.default_rng(0)

    def draw(n: int) -> tuple[list[int], list[int]]:
        truth = rng.integers(4, size=n)
        guess = np.where(rng.random(n) < 0.7, truth, rng.integers(4, size=n))
        return truth.tolist(), guess.tolist()

    spread = np.std([macro_f1(*draw(400), 4) for _ in range(300)])
    estimates = [macro_f1_standard_error(*draw(400), 4) for _ in range(5)]
    assert np.mean(estimates) == pytest.approx(spread, rel=0.15)
    truth, guess = draw(50)
    assert _fast_macro_f1(np.array(truth), np.array(guess), 4) == pytest.approx(
        macro_f1(truth, guess, 4)
    )
    guess[0] = -1
    assert _fast_macro_f1(np.array(truth), np.array(guess), 5) == pytest.approx(
        macro_f1(truth, guess, 5)
    )


def test_unparsable_answers_by_hand() -> None:
    """Empty; punctuation and nothing else; a yes-no question answered by something else."""
    replies = ["", "?!", "Yes.", "no", "maybe", "red", "yes no", "maybe"]
    truth = ["red", "red", "yes", "Yes", "no", "blue", "no", "maybe"]
    assert unparsable(replies, truth) == 4  # the first two, "maybe" and "yes no"
    assert unparsable([], []) == 0


def test_a_kind_called_se_is_no_standard_error() -> None:
    samples = [Sample("a", "yes", "q", None, kind="se"), Sample("b", "no", "q", None, kind="x")]
    found = open_metrics(["yes", "yes"], samples)
    assert found["accuracy"] == 0.5
    assert found["accuracy_se"] == pytest.approx(math.sqrt(0.5 * 0.5 / 2))
    assert found["accuracy_x"] == 0.0
