"""Partitions: complete, disjoint, never empty, as skewed as the draw, blind to order."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmllm.errors import UserError
from fedmllm.partition import dirichlet, even, held_out, proportions


def ids_of(count):
    return [f"s{i}" for i in range(count)]


def assert_partition(parts, count, clients):
    assert len(parts) == clients
    assert sorted(i for part in parts for i in part) == list(range(count))
    assert all(part and part == sorted(part) for part in parts)


@st.composite
def problems(draw):
    labels = draw(st.lists(st.integers(0, 4), min_size=1, max_size=80))
    clients = draw(st.integers(1, len(labels)))
    alpha = draw(st.floats(0.01, 100))
    return labels, clients, alpha, draw(st.integers(0, 2**31))


@given(problems())
def test_every_sample_has_one_client_and_no_client_is_empty(problem):
    labels, clients, alpha, seed = problem
    ids = ids_of(len(labels))
    options = {"clients": clients, "seed": seed}
    assert_partition(dirichlet(ids, labels, alpha=alpha, **options), len(ids), clients)
    parts = even(ids, **options)
    assert_partition(parts, len(ids), clients)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(problems(), st.randoms(use_true_random=False))
def test_the_order_of_the_list_does_not_matter(problem, random):
    labels, clients, alpha, seed = problem
    ids = ids_of(len(labels))
    order = list(range(len(ids)))
    random.shuffle(order)
    shuffled_ids, shuffled_labels = [ids[i] for i in order], [labels[i] for i in order]

    def names(split, ids, *labels, **options):
        return [{ids[i] for i in part} for part in split(ids, *labels, **options)]

    options = {"clients": clients, "seed": seed}
    assert names(dirichlet, ids, labels, alpha=alpha, **options) == names(
        dirichlet, shuffled_ids, shuffled_labels, alpha=alpha, **options
    )
    assert names(even, ids, **options) == names(even, shuffled_ids, **options)


def test_a_split_is_pinned():
    """A seed means the same split on every machine and in every version."""
    ids, labels = ids_of(12), [0, 1] * 6
    assert dirichlet(ids, labels, clients=3, alpha=0.5, seed=1) == [
        [11],
        [3, 5, 7],
        [0, 1, 2, 4, 6, 8, 9, 10],
    ]
    assert even(ids, clients=3, seed=1) == [
        [0, 1, 3, 4],
        [5, 9, 10, 11],
        [2, 6, 7, 8],
    ]


@pytest.mark.parametrize("alpha", [0.5, 1.0, 5.0])
def test_counts_are_within_one_of_the_draw(alpha):
    """400 samples of each of 3 classes; with this seed no client needs the repair."""
    labels = [0, 1, 2] * 400
    parts = dirichlet(ids_of(1200), labels, clients=5, alpha=alpha, seed=4)
    for label in range(3):
        due = 400 * proportions(label, clients=5, alpha=alpha, seed=4)
        held = [sum(labels[i] == label for i in part) for part in parts]
        np.testing.assert_allclose(held, due, atol=1.0)


def test_smaller_alpha_is_more_skewed():
    """Over 200 seeds the largest share has the Dirichlet's mean and spread of one component."""
    for alpha in (0.5, 5.0):
        draws = np.array([proportions(0, clients=10, alpha=alpha, seed=s) for s in range(200)])
        variance = 0.1 * 0.9 / (10 * alpha + 1)  # of one component of Dirichlet(alpha, …)
        np.testing.assert_allclose(draws.sum(1), 1)
        np.testing.assert_allclose(draws.mean(), 0.1)
        np.testing.assert_allclose(draws.var(axis=0).mean(), variance, rtol=0.1)


def test_a_class_is_drawn_by_its_name_and_not_by_its_place():
    """Class 7's split stays when another class joins the data."""
    ids = ids_of(100)
    alone = dirichlet(ids, [7] * 100, clients=3, alpha=1.0, seed=0)
    joined = dirichlet([*ids, *"xyz"], [7] * 100 + [1] * 3, clients=3, alpha=1.0, seed=0)
    assert [[i for i in part if i < 100] for part in joined] == alone


def test_seeds_classes_and_pools_have_draws_of_their_own():
    ids = ids_of(50)
    splits = [even(ids, clients=2, seed=0), even(ids, clients=2, seed=1)]
    splits.append(even(ids, clients=2, seed=0, pool="flashcards"))
    assert len({str(split) for split in splits}) == 3
    assert not np.allclose(
        proportions(0, clients=4, alpha=1.0, seed=0), proportions(1, clients=4, alpha=1.0, seed=0)
    )


def test_the_samples_of_a_share_are_drawn_at_random():
    """Not the first ids to the first client: a folder's names often follow its history."""
    parts = even([f"{i:04d}" for i in range(1000)], clients=2, seed=0)
    assert 450 < np.mean(parts[0]) < 550


def test_the_repair_takes_from_the_largest_client():
    """As many clients as samples of one class: everybody ends up with exactly one."""
    parts = dirichlet(ids_of(20), [0] * 20, clients=20, alpha=0.05, seed=0)
    assert [len(part) for part in parts] == [1] * 20
    due = 60 * proportions(0, clients=4, alpha=0.05, seed=9)
    assert np.rint(np.cumsum(due)).tolist() == [9, 9, 57, 60]  # 9, 0, 48 and 3 samples
    parts = dirichlet(ids_of(60), [0] * 60, clients=4, alpha=0.05, seed=9)
    assert [len(part) for part in parts] == [9, 1, 47, 3]


@settings(deadline=None, max_examples=5)
@given(st.integers(0, 100))
def test_hundred_thousand_samples_take_less_than_two_seconds(seed):
    ids, labels = ids_of(100_000), [i % 8 for i in range(100_000)]
    start = time.process_time()
    dirichlet(ids, labels, clients=100, alpha=0.5, seed=seed)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clients": 4}, "4 clients cannot share 3 samples"),
        ({"clients": 0}, "clients is 0: give 1 or more"),
        ({"clients": -1}, "clients is -1"),
        ({"alpha": 0.0}, "alpha is 0.0: give a number above 0"),
        ({"alpha": -0.5}, "alpha is -0.5"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"alpha": "0.5"}, "alpha is '0.5'"),
        ({"alpha": True}, "alpha is True"),
        ({"alpha": 1e308}, "cannot be drawn"),
        ({"labels": [0, None, 1]}, "has no label"),
    ],
)
def test_bad_input_is_refused(options, message):
    given = {"ids": ids_of(3), "labels": [0, 0, 1], "clients": 2, "alpha": 0.5, "seed": 0}
    with pytest.raises(UserError, match=message):
        dirichlet(**(given | options))


def test_even_refuses_too_many_clients():
    with pytest.raises(UserError, match="4 clients cannot share 3 samples"):
        even(ids_of(3), clients=4, seed=0)
    with pytest.raises(UserError, match="2 clients cannot share 0 samples"):
        even([], clients=2, seed=0)


def test_held_out_is_a_share_of_each_clients_samples_and_nested() -> None:
    ids = [f"s{i}" for i in range(25)]
    some, more = held_out(ids, share=0.1, seed=0), held_out(ids, share=0.3, seed=0)
    assert (len(some), len(more)) == (3, 8)  # rounded up
    assert some < more < set(ids)
    assert held_out(ids[::-1], share=0.1, seed=0) == some
    assert held_out(ids, share=0.1, seed=1) != some
    assert held_out(ids, share=0.0, seed=0) == set()
    assert held_out(["a"], share=0.5, seed=0) == set()  # it must train on something
    assert len(held_out(["a", "b"], share=0.99, seed=0)) == 1
    assert held_out([], share=0.5, seed=0) == set()
