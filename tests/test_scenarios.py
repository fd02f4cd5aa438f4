"""Scenarios: the right rates and counts, draws by name, nested settings, helpful refusals."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmllm.errors import UserError
from fedmllm.scenarios import (
    BOTH,
    IMAGE_ONLY,
    NEITHER,
    SCENARIOS,
    SETTINGS,
    TEXT_ONLY,
    assign,
    check_options,
)

CLIENTS = [f"client-{k:02d}" for k in range(10)]
SAMPLES = [f"s{i}" for i in range(4000)]
TWELVE = [
    *("aligned-a5.0", "aligned-a1.0", "aligned-a0.5"),
    *("missing-b0.3", "missing-b0.4", "missing-b0.5"),
    *("cross-i3t7", "cross-i5t5", "cross-i7t3"),
    *("hybrid-p0.8", "hybrid-p0.7", "hybrid-p0.6"),
]


def kept(assignment, client="client-00", samples=SAMPLES):
    return np.array([assignment.keep(client, sample) for sample in samples])  # (N, [image, text])


def test_the_twelve_settings():
    assert list(SETTINGS) == TWELVE
    assert SETTINGS["aligned-a1.0"] == ("aligned", {}, 1.0)
    assert SETTINGS["missing-b0.4"] == ("missing", {"beta": 0.4}, 0.5)
    assert SETTINGS["cross-i7t3"] == ("cross", {"images": "7:3"}, 0.5)
    assert SETTINGS["hybrid-p0.6"] == ("hybrid", {"p": 0.6}, 0.5)
    for scenario, options, _ in SETTINGS.values():
        assign(scenario, CLIENTS, options=options, seed=0)


def test_aligned_keeps_everything():
    assignment = assign("aligned", CLIENTS, seed=0)
    assert set(assignment.clients.values()) == {BOTH}
    assert kept(assignment).all()


@pytest.mark.parametrize("beta", [0.3, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_missing_modalities_are_lost_at_rate_beta_and_independently(beta, seed):
    """4,000 samples; all four shares within four standard errors (at most .032) of the product."""
    keep = kept(assign("missing", CLIENTS, options={"beta": beta}, seed=seed))
    for image in (True, False):
        for text in (True, False):
            share = np.mean((keep == (image, text)).all(1))
            due = (1 - beta if image else beta) * (1 - beta if text else beta)
            assert abs(share - due) < 4 * np.sqrt(due * (1 - due) / 4000)


def test_missing_is_a_matter_of_the_sample_and_not_of_the_client_or_other_samples():
    one = assign("missing", CLIENTS, seed=0)
    other = assign("missing", CLIENTS[:3], seed=0)
    np.testing.assert_array_equal(kept(one), kept(other, "client-02"))
    assert (kept(one) != kept(assign("missing", CLIENTS, seed=1))).any()


def test_missing_settings_are_nested():
    """What is lost at beta 0.3 is lost at 0.5: the settings differ by beta and not by luck."""
    low, high = (kept(assign("missing", CLIENTS, options={"beta": b}, seed=0)) for b in (0.3, 0.5))
    assert (low >= high).all()
    assert (low > high).any()


@pytest.mark.parametrize(("beta", "share"), [(0, 1.0), (1, 0.0), (1.0, 0.0)])
def test_missing_at_the_edges(beta, share):
    assert kept(assign("missing", CLIENTS, options={"beta": beta}, seed=0)).mean() == share


@given(st.integers(1, 30), st.data())
def test_cross_has_exactly_so_many_image_clients(clients, data):
    names = [f"c{i}" for i in range(clients)]
    images = data.draw(st.integers(0, clients))
    seed = data.draw(st.integers(0, 1000))
    assignment = assign("cross", names, options={"images": images}, seed=seed)
    held = list(assignment.clients.values())
    assert held.count(IMAGE_ONLY) == images
    assert held.count(TEXT_ONLY) == clients - images
    assert list(assignment.clients) == names
    assert all(assignment.keep(name, "s") == assignment.clients[name] for name in names)
    backwards = assign("cross", names[::-1], options={"images": images}, seed=seed)
    assert backwards.clients == assignment.clients


def test_which_clients_hold_images_is_drawn_and_nested():
    def image_clients(images, seed):
        held = assign("cross", CLIENTS, options={"images": images}, seed=seed).clients
        return {name for name in held if held[name] == IMAGE_ONLY}

    three, five, seven = (image_clients(images, 0) for images in ("3:7", "5:5", "7:3"))
    assert three < five < seven
    assert len({frozenset(image_clients(3, seed)) for seed in range(20)}) > 10
    often = sum("client-00" in image_clients(3, seed) for seed in range(400))
    assert 84 < often < 156  # 120 expected, four standard errors of 9


@pytest.mark.parametrize(
    ("images", "clients", "count", "rounded"),
    [
        ("3:7", 10, 3, False),
        ("3:7", 20, 6, False),
        (" 3 : 7 ", 10, 3, False),
        ("1:1", 4, 2, False),
        ("3:7", 4, 1, True),
        ("1:9", 4, 1, True),
        ("9:1", 4, 3, True),
        ("0:5", 4, 0, False),
        ("5:0", 4, 4, False),
        ("1:1", 3, 2, True),
        ("1:1", 1, 1, True),
    ],
)
def test_ratios(images, clients, count, rounded):
    """A ratio scales to the clients; rounding leaves at least one of each kind and is noted."""
    names = [f"c{k}" for k in range(clients)]
    assignment = assign("cross", names, options={"images": images}, seed=0)
    assert list(assignment.clients.values()).count(IMAGE_ONLY) == count
    assert any("rounded" in note for note in assignment.notes) == rounded


@pytest.mark.parametrize("p", [0.6, 0.8])
def test_hybrid_clients_hold_each_modality_with_probability_p(p):
    held = [
        keep
        for seed in range(300)
        for keep in assign("hybrid", CLIENTS, options={"p": p}, seed=seed).clients.values()
    ]
    for combination in (BOTH, IMAGE_ONLY, TEXT_ONLY, NEITHER):
        due = np.prod([p if holds else 1 - p for holds in combination])
        assert abs(held.count(combination) / 3000 - due) < 4 * np.sqrt(due * (1 - due) / 3000)


def test_a_hybrid_client_with_neither_keeps_exactly_one_modality_per_sample():
    assignment = assign("hybrid", CLIENTS, options={"p": 0.0}, seed=0)
    assert set(assignment.clients.values()) == {NEITHER}
    keep = kept(assignment)
    assert (keep.sum(1) == 1).all()
    assert abs(keep[:, 0].mean() - 0.5) < 4 * 0.5 / np.sqrt(4000)


def test_a_hybrid_client_with_neither_keeps_one_modality_for_all_samples_where_pools_are_split():
    held = set()
    for seed in range(20):
        assignment = assign("hybrid", CLIENTS, options={"p": 0.0}, seed=seed, per_client=True)
        for client in CLIENTS[:2]:
            assert {assignment.keep(client, s) for s in SAMPLES[:20]} == {
                assignment.clients[client]
            }
        held |= set(assignment.clients.values())
    assert held == {IMAGE_ONLY, TEXT_ONLY}


def test_a_hybrid_client_that_holds_something_keeps_the_same_of_every_sample():
    assignment = assign("hybrid", CLIENTS, options={"p": 0.7}, seed=0)
    for client, held in assignment.clients.items():
        if held != NEITHER:
            assert {assignment.keep(client, s) for s in SAMPLES[:50]} == {held}
    everything = assign("hybrid", CLIENTS, options={"p": 1}, seed=0)
    assert set(everything.clients.values()) == {BOTH}


def test_masks_of_hundred_thousand_samples_take_less_than_two_seconds():
    assignment = assign("missing", CLIENTS, seed=0)
    names = [f"s{i}" for i in range(100_000)]
    start = time.process_time()
    kept(assignment, samples=names)
    assert time.process_time() - start < 2


def test_options_come_back_with_defaults_and_in_one_form():
    assert check_options("missing", {}) == {"beta": 0.3}
    assert check_options("hybrid", {"p": 1}) == {"p": 1.0}
    assert check_options("cross", {"images": "03: 7"}) == {"images": "3:7"}
    assert check_options("aligned", {}) == {}


@pytest.mark.parametrize(
    ("scenario", "options", "message"),
    [
        ("mising", {}, r"unknown scenario 'mising': .*did you mean 'missing'"),
        ("missing", {"betta": 0.3}, r"unknown option of scenario 'missing' 'betta'.*'beta'"),
        ("aligned", {"beta": 0.3}, r"choose \(none\)"),
        ("missing", {"beta": 30}, r"beta is 30: give a probability from 0 to 1"),
        ("missing", {"beta": -0.1}, r"beta is -0.1"),
        ("missing", {"beta": float("nan")}, r"beta is nan"),
        ("missing", {"beta": "0.3"}, r"beta is '0.3'"),
        ("missing", {"beta": True}, r"beta is True"),
        ("hybrid", {"p": 1.5}, r"p is 1.5"),
        ("hybrid", {"p": None}, r"p is None"),
        ("cross", {"images": 11}, r"images is 11, but there are 10 clients"),
        ("cross", {"images": 187}, r"in quotes, '3:7'"),
        ("cross", {"images": -1}, r"images is -1"),
        ("cross", {"images": 2.5}, r"images is 2.5"),
        ("cross", {"images": True}, r"images is True"),
        ("cross", {"images": "3"}, r"images is '3'"),
        ("cross", {"images": "3:"}, r"images is '3:'"),
        ("cross", {"images": "0:0"}, r"images is '0:0'"),
        ("cross", {"images": "3:7:1"}, r"images is '3:7:1'"),
        ("cross", {"images": "²:3"}, r"images is '²:3'"),
        ("cross", {"images": "-3:7"}, r"images is '-3:7'"),
    ],
)
def test_bad_options_are_refused(scenario, options, message):
    with pytest.raises(UserError, match=message):
        assign(scenario, CLIENTS, options=options, seed=0)


def test_every_option_has_a_default_and_a_check():
    for spec in SCENARIOS.values():
        assert spec.options.keys() == spec.check.keys()
        assert spec.summary
