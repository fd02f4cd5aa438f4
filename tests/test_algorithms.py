"""Server algorithms: numbers worked by hand, identities, bad input.

Two clients, five parameters: tensor "a" holds the first three, "b" (a 2 x 1 matrix) the last two.
Every test starts at theta = (10, 20, 30, 40, 50). Numbers are chosen so that all of them are
short decimals and every square root is whole.
"""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmllm.algorithms import ALGORITHMS, make_algorithm
from fedmllm.algorithms.base import (
    GROUP,
    Algorithm,
    LocalObjective,
    Params,
    ServerState,
    StreamingMean,
    Update,
)
from fedmllm.errors import UserError

START = (10.0, 20.0, 30.0, 40.0, 50.0)
ZERO = (0.0,) * 5


def params(values) -> Params:
    flat = torch.tensor(values, dtype=torch.float32)
    return {"a": flat[:3].clone(), "b": flat[3:].reshape(2, 1).clone()}


def flat(tree: Params) -> list[float]:
    return torch.cat([tree[name].flatten() for name in sorted(tree)]).tolist()


def update(client: str, num_samples: int, values, extra=None) -> Update:
    extras = {slot: params(numbers) for slot, numbers in (extra or {}).items()}
    return Update(client, num_samples, params(values), extras)


def one_round(algorithm: Algorithm, state: ServerState, updates: list[Update]) -> ServerState:
    mean = StreamingMean(algorithm.weighting)
    for item in updates:
        mean.fold(item)
    return algorithm.step(state, mean)


def play(algorithm: Algorithm, rounds: list[list[Update]]) -> list[list[float]]:
    """The five parameters after each round."""
    state = algorithm.init(params(START))
    history = []
    for updates in rounds:
        state = one_round(algorithm, state, updates)
        history.append(flat(state.params))
    return history


WEIGHTED_ROUNDS = [
    # n = 1 and 3; mean (d1 + 3 d2) / 4 = (1, 3, 2, 2, -6)
    [update("c1", 1, (4, 0, -4, 8, 0)), update("c2", 3, (0, 4, 4, 0, -8))],
    # mean = (3, 1, -3, -2, 0)
    [update("c1", 1, (0, 4, 0, -8, 0)), update("c2", 3, (4, 0, -4, 0, 0))],
    # nobody moves
    [update("c1", 1, ZERO), update("c2", 3, ZERO)],
]


def uniform_round(mean) -> list[Update]:
    """Two clients with n = 1 and 3 whose plain mean is `mean`: d + s and d - s, s = (1..5).

    Weighted by samples their mean would be d - s/2, and every expectation below would fail.
    """
    d, s = np.array(mean, dtype=float), np.arange(1.0, 6.0)
    return [update("c1", 1, d + s), update("c2", 3, d - s)]


@pytest.mark.parametrize("name", ["fedavg", "fedprox"])
def test_fedavg_by_hand(name):
    """theta + (1, 3, 2, 2, -6), then + (3, 1, -3, -2, 0), then nothing."""
    assert play(make_algorithm(name, num_clients=2), WEIGHTED_ROUNDS) == [
        [11, 23, 32, 42, 44],
        [14, 24, 29, 40, 44],
        [14, 24, 29, 40, 44],
    ]


def test_fedavg_eta_and_uniform_by_hand():
    """eta = 0.5 with plain means (2, 2, 0, 4, -4) and (2, 2, -2, -4, 0)."""
    algorithm = make_algorithm("fedavg", num_clients=2, eta=0.5, weighting="uniform")
    assert play(algorithm, WEIGHTED_ROUNDS[:2]) == [[11, 21, 30, 42, 48], [12, 22, 29, 40, 48]]


def test_fedavgm_paper_by_hand():
    """m = m/2 + d, theta += 2 m.

    m1 = (1, 3, 2, 2, -6); m2 = m1/2 + (3, 1, -3, -2, 0) = (3.5, 2.5, -2, -1, -3); m3 = m2/2.
    """
    algorithm = make_algorithm("fedavgm", num_clients=2, beta=0.5, eta=2.0)
    assert play(algorithm, WEIGHTED_ROUNDS) == [
        [12, 26, 34, 44, 38],
        [19, 31, 30, 42, 32],
        [22.5, 33.5, 28, 41, 29],
    ]


def test_fedavgm_reference_by_hand():
    """m1 = d1 = (1, 3, 2, 2, -6), then m = m/2 + d/2, theta += m.

    m2 = (0.5 + 1.5, 1.5 + 0.5, 1 - 1.5, 1 - 1, -3) = (2, 2, -0.5, 0, -3); m3 = m2/2.
    """
    algorithm = make_algorithm("fedavgm", num_clients=2, beta=0.5, form="reference")
    assert play(algorithm, WEIGHTED_ROUNDS) == [
        [11, 23, 32, 42, 44],
        [13, 25, 31.5, 42, 41],
        [14, 26, 31.25, 42, 39.5],
    ]


def test_fedavgm_reference_with_three_quarters_by_hand():
    """beta = 0.75 tells beta from 1 - beta: m2 = 0.75 m1 + 0.25 d2.

    m2 = (0.75 + 0.75, 2.25 + 0.25, 1.5 - 0.75, 1.5 - 0.5, -4.5) = (1.5, 2.5, 0.75, 1, -4.5).
    """
    algorithm = make_algorithm("fedavgm", num_clients=2, beta=0.75, form="reference")
    assert play(algorithm, WEIGHTED_ROUNDS[:2])[1] == [12.5, 25.5, 32.75, 43, 39.5]


ADAGRAD_ROUNDS = [uniform_round((4, -4, 0, 4, 0)), uniform_round((12, 0, 4, -12, 0))]


def test_fedadagrad_paper_by_hand():
    """tau = 3, so v0 = 9; beta1 = 1/2; eta = 16.

    d1 = ( 4, -4,  0,   4, 0)  v1 = ( 25, 25,  9,  25, 9)  sqrt + 3 = ( 8, 8, 6,  8, 6)
    d2 = (12,  0,  4, -12, 0)  v2 = (169, 25, 25, 169, 9)  sqrt + 3 = (16, 8, 8, 16, 6)
    m1 = (2, -2, 0, 2, 0), step 16 m1 / (..) = (4, -4, 0, 4, 0)
    m2 = (7, -1, 2, -5, 0), step = (7, -2, 4, -5, 0)
    """
    algorithm = make_algorithm("fedadagrad", num_clients=2, eta=16.0, tau=3.0, beta1=0.5)
    assert play(algorithm, ADAGRAD_ROUNDS) == [[14, 16, 30, 44, 50], [21, 14, 34, 39, 50]]


def test_fedadagrad_reference_by_hand():
    """As above without momentum: steps (8, -8, 0, 8, 0) and (12, 0, 8, -12, 0)."""
    algorithm = make_algorithm(
        "fedadagrad", num_clients=2, eta=16.0, tau=3.0, beta1=0.5, form="reference"
    )
    assert play(algorithm, ADAGRAD_ROUNDS) == [[18, 12, 30, 48, 50], [30, 12, 38, 36, 50]]


def test_fedadam_paper_by_hand():
    """tau = 1, so v0 = 1; beta1 = beta2 = 1/2; eta = 12.

    d1 = (1, -1, 7, -7,  1)  v1 = (1 + d1^2)/2  = ( 1, 1, 25, 25, 1)  sqrt + 1 = (2, 2, 6, 6, 2)
    d2 = (7,  1, 5, -5, -1)  v2 = (v1 + d2^2)/2 = (25, 1, 25, 25, 1)  sqrt + 1 = (6, 2, 6, 6, 2)
    m1 = (0.5, -0.5, 3.5, -3.5, 0.5), step 12 m1 / (..) = (3, -3, 7, -7, 3)
    m2 = (3.75, 0.25, 4.25, -4.25, -0.25), step = (7.5, 1.5, 8.5, -8.5, -1.5)
    """
    rounds = [uniform_round((1, -1, 7, -7, 1)), uniform_round((7, 1, 5, -5, -1))]
    algorithm = make_algorithm("fedadam", num_clients=2, eta=12.0, tau=1.0, beta1=0.5, beta2=0.5)
    assert play(algorithm, rounds) == [[13, 17, 37, 33, 53], [20.5, 18.5, 45.5, 24.5, 51.5]]


def test_fedadam_reference_by_hand():
    """m1 = d1 and v from m^2; tau, beta1, beta2 and eta as above.

    m1 = (1, -1, 7, -7, 1)  v1 = ( 1, 1, 25, 25, 1)  step = (6, -6, 14, -14, 6)
    d2 = (13, -1, 3, -3, 1), m2 = (m1 + d2)/2 = (7, -1, 5, -5, 1)
    v2 = (v1 + m2^2)/2 = (25, 1, 25, 25, 1)          step = (14, -6, 10, -10, 6)
    """
    rounds = [uniform_round((1, -1, 7, -7, 1)), uniform_round((13, -1, 3, -3, 1))]
    algorithm = make_algorithm(
        "fedadam", num_clients=2, eta=12.0, tau=1.0, beta1=0.5, beta2=0.5, form="reference"
    )
    assert play(algorithm, rounds) == [[16, 14, 44, 26, 56], [30, 8, 54, 16, 62]]


def test_fedadam_weighs_beta2_and_beta1_by_hand():
    """Unequal beta and 1 - beta, and v0 given: beta1 = 0.75, beta2 = 0.8, v0 = 5, tau = 2, eta = 8.

    d = (0, 5, -5, 0, 5)    v = 0.8 * 5 + 0.2 * d^2 = (4, 9, 9, 4, 9)   sqrt + 2 = (4, 5, 5, 4, 5)
    m = d/4 = (0, 1.25, -1.25, 0, 1.25), step 8 m / (..) = (0, 2, -2, 0, 2)
    """
    algorithm = make_algorithm(
        "fedadam", num_clients=2, eta=8.0, tau=2.0, beta1=0.75, beta2=0.8, v0=5.0
    )
    [got] = play(algorithm, [uniform_round((0, 5, -5, 0, 5))])
    assert got == pytest.approx([10, 22, 28, 40, 52], rel=1e-6)


def test_fedyogi_paper_by_hand():
    """tau = 13, so v0 = 169; beta1 = 1/2; beta2 = 3/4; eta = 35. d^2 below, above, equal to v.

    d1 = (10, -10, 168, 13, 0)  d1^2/4 = (25, 25, 7056, ., 0), signs (-, -, +, 0, .)
    v1 = (144, 144, 85^2, 169, 169)        sqrt + 13 = (25, 25, 98, 26, 26)
    m1 = (5, -5, 84, 6.5, 0)               step 35 m1 / (..) = (7, -7, 30, 8.75, 0)
    d2 = (18, 0, -72, 10, 168)  v2 = (15^2, 12^2, 77^2, 12^2, 85^2), + 13: (28, 25, 90, 25, 98)
    m2 = (11.5, -2.5, 6, 8.25, 84)         step = (14.375, -3.5, 7/3, 11.55, 30)
    """
    rounds = [uniform_round((10, -10, 168, 13, 0)), uniform_round((18, 0, -72, 10, 168))]
    algorithm = make_algorithm("fedyogi", num_clients=2, eta=35.0, tau=13.0, beta1=0.5, beta2=0.75)
    first, second = play(algorithm, rounds)
    assert first == pytest.approx([17, 13, 60, 48.75, 50], rel=1e-6)
    assert second == pytest.approx([31.375, 9.5, 60 + 7 / 3, 60.3, 80], rel=1e-6)


def test_fedyogi_reference_by_hand():
    """m1 = d1 and v from m^2; options as above.

    m1 = (10, -10, 168, 13, 0)  v1 as above, step = (14, -14, 60, 17.5, 0)
    d2 = (26, 10, -24, 7, 336)  m2 = (m1 + d2)/2 = (18, 0, 72, 10, 168)
    v2 = (15^2, 12^2, 77^2, 12^2, 85^2), + 13: (28, 25, 90, 25, 98)
    step = (22.5, 0, 28, 14, 60)
    """
    rounds = [uniform_round((10, -10, 168, 13, 0)), uniform_round((26, 10, -24, 7, 336))]
    algorithm = make_algorithm(
        "fedyogi", num_clients=2, eta=35.0, tau=13.0, beta1=0.5, beta2=0.75, form="reference"
    )
    first, second = play(algorithm, rounds)
    assert first == pytest.approx([24, 6, 90, 57.5, 50], rel=1e-6)
    assert second == pytest.approx([46.5, 6, 118, 71.5, 110], rel=1e-6)


def test_scaffold_by_hand():
    """N = 4, both of S = {c1, c2} with n = 1 and 3, eta_g = 1/2: plain means, c moves by 2/4.

    mean d = (2, 2, 0, 4, -4), x += (1, 1, 0, 2, -2); mean of c_new - c_old = (4, 2, 0, -2, 8),
    c += (2, 1, 0, -1, 4). Second round: c1 alone, c += 1/4 * (4, 4, 4, 4, 4).
    """
    algorithm = make_algorithm("scaffold", num_clients=4, eta_g=0.5)
    state = algorithm.init(params(START))
    assert flat(state.slots["control"]) == list(ZERO)
    first = [
        update("c1", 1, (4, 0, -4, 8, 0), {"control": (8, 0, 0, -4, 8)}),
        update("c2", 3, (0, 4, 4, 0, -8), {"control": (0, 4, 0, 0, 8)}),
    ]
    state = one_round(algorithm, state, first)
    assert flat(state.params) == [11, 21, 30, 42, 48]
    assert flat(state.slots["control"]) == [2, 1, 0, -1, 4]
    second = [update("c1", 1, (2, 0, 0, 0, 0), {"control": (4, 4, 4, 4, 4)})]
    state = one_round(algorithm, state, second)
    assert flat(state.params) == [12, 21, 30, 42, 48]
    assert flat(state.slots["control"]) == [3, 2, 1, 0, 5]


# What a state is


def fitting_rounds(name: str, count: int = 3) -> list[list[Update]]:
    """A few rounds of random updates, with controls where the algorithm wants them."""
    rng = np.random.default_rng(7)
    extra = {"control": rng.normal(size=5)} if name == "scaffold" else {}
    return [
        [update(f"c{k}", k, rng.normal(size=5), extra) for k in (1, 2, 5)] for _ in range(count)
    ]


VARIANTS = [(name, "paper") for name in ALGORITHMS] + [
    (name, "reference") for name in ("fedavgm", "fedadagrad", "fedyogi", "fedadam")
]
each_variant = pytest.mark.parametrize(("name", "form"), VARIANTS)


@each_variant
def test_step_is_pure_and_counts_rounds(name, form):
    algorithm = make_algorithm(name, num_clients=3, form=form)
    given_params = params(START)
    state = algorithm.init(given_params)
    given_params["a"].fill_(-1.0)  # the caller's tensors are its own
    assert flat(state.params) == list(START)
    for number, updates in enumerate(fitting_rounds(name)):
        before, sent = copy.deepcopy(state), copy.deepcopy(updates)
        after = one_round(algorithm, state, updates)
        again = one_round(algorithm, state, updates)
        assert (state.round, after.round) == (number, number + 1)
        assert_same_state(state, before)
        assert_same_state(after, again)
        assert all(
            torch.equal(u.delta["a"], s.delta["a"]) for u, s in zip(updates, sent, strict=True)
        )
        state = after


@each_variant
def test_saved_state_goes_on_with_the_same_bits(name, form):
    """A state is plain tensors: written as safetensors and read back, it goes on bit for bit."""
    rounds = fitting_rounds(name, 4)
    state = functools.reduce(
        functools.partial(one_round, make_algorithm(name, num_clients=3, form=form)),
        rounds,
        make_algorithm(name, num_clients=3, form=form).init(params(START)),
    )
    resumed = make_algorithm(name, num_clients=3, form=form).init(params(START))
    for updates in rounds:
        resumed = save_and_load(resumed)
        resumed = one_round(make_algorithm(name, num_clients=3, form=form), resumed, updates)
    assert_same_state(resumed, state)


def save_and_load(state: ServerState) -> ServerState:
    def through_file(tree: Params) -> Params:
        return backwards(safetensors.torch.load(safetensors.torch.save(tree)))  # in any order

    slots = {slot: through_file(tree) for slot, tree in state.slots.items()}
    return ServerState(state.round, through_file(state.params), slots)


def assert_same_state(one: ServerState, other: ServerState) -> None:
    assert one.round == other.round
    assert one.slots.keys() == other.slots.keys()
    for left, right in [(one.params, other.params)] + [
        (one.slots[slot], other.slots[slot]) for slot in one.slots
    ]:
        assert list(left) == list(right)
        assert all(torch.equal(left[name], right[name]) for name in left)
        assert all(value.dtype == torch.float32 for value in left.values())


@pytest.mark.parametrize(
    ("name", "slots"),
    [
        ("fedavg", {}),
        ("fedavgm", {"m": 0.0}),
        ("fedadagrad", {"m": 0.0, "v": 1e-6}),
        ("fedyogi", {"m": 0.0, "v": 1e-6}),
        ("fedadam", {"m": 0.0, "v": 1e-6}),
        ("scaffold", {"control": 0.0}),
    ],
)
def test_first_state(name, slots):
    """Round 0, zero moments; v at tau^2 = (1e-3)^2 unless v0 says otherwise."""
    state = make_algorithm(name, num_clients=2).init(params(START))
    assert state.round == 0
    assert {slot: flat(tree) for slot, tree in state.slots.items()} == {
        slot: pytest.approx([value] * 5) for slot, value in slots.items()
    }


def test_parameters_are_sorted_by_name_and_order_of_tensors_does_not_matter():
    for name, form in VARIANTS:
        algorithm = make_algorithm(name, num_clients=3, form=form)
        plain = algorithm.init(params(START))
        mixed = algorithm.init(backwards(params(START)))
        assert list(mixed.params) == ["a", "b"]
        for updates in fitting_rounds(name):
            plain = one_round(algorithm, plain, updates)
            other = [
                Update(u.client, u.num_samples, backwards(u.delta), u.extra) if i % 2 else u
                for i, u in enumerate(updates, start=1)
            ]
            mixed = one_round(algorithm, mixed, other)
            assert_same_state(mixed, plain)


def backwards(tree: Params) -> Params:
    return {name: tree[name] for name in reversed(tree)}


# Identities


def test_fedprox_with_mu_0_is_fedavg_to_the_last_bit():
    fedprox = make_algorithm("fedprox", num_clients=3, mu=0)
    fedavg = make_algorithm("fedavg", num_clients=3)
    assert fedprox.local == fedavg.local == LocalObjective()
    assert play(fedprox, fitting_rounds("fedavg")) == play(fedavg, fitting_rounds("fedavg"))


@pytest.mark.parametrize("form", ["paper", "reference"])
def test_fedavgm_with_beta_0_and_eta_1_is_fedavg_to_the_last_bit(form):
    fedavgm = make_algorithm("fedavgm", num_clients=3, beta=0, eta=1, form=form)
    fedavg = make_algorithm("fedavg", num_clients=3)
    assert play(fedavgm, fitting_rounds("fedavg")) == play(fedavg, fitting_rounds("fedavg"))


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "scaffold"])
def test_a_single_client_gets_its_own_parameters_back(name):
    mine = (1.5, -2.25, 3.0, 0.125, 7.0)
    extra = {"control": ZERO} if name == "scaffold" else {}
    lone = update("only", 1, np.subtract(mine, START), extra)
    assert play(make_algorithm(name, num_clients=1), [[lone]]) == [list(mine)]


def test_every_tensor_gets_the_plain_weighted_mean():
    """A known fault: an accumulator flag that is never reset makes all tensors but the first
    add up onto the old global value. With three tensors, each is (1 * 4 + 3 * 8) / 4 = 7."""

    def three(value: float) -> Params:
        return {name: torch.full((2,), value) for name in ("x", "y", "z")}

    algorithm = make_algorithm("fedavg", num_clients=2)
    state = algorithm.init(three(100.0))
    for _ in range(2):
        deltas = {"c1": 4.0, "c2": 8.0}
        now = {client: three(d) for client, d in deltas.items()}
        updates = [Update("c1", 1, now["c1"]), Update("c2", 3, now["c2"])]
        state = one_round(algorithm, state, updates)
    assert {name: value.tolist() for name, value in state.params.items()} == {
        name: [114.0, 114.0] for name in ("x", "y", "z")
    }


def test_what_clients_add():
    assert make_algorithm("fedprox", num_clients=2, mu=0.25).local == LocalObjective(mu=0.25)
    scaffold = make_algorithm("scaffold", num_clients=2)
    assert scaffold.local == LocalObjective(control=True)
    assert (scaffold.broadcast, scaffold.weighting) == (("control",), "uniform")
    for name in ("fedavg", "fedavgm", "fedadagrad", "fedyogi", "fedadam"):
        algorithm = make_algorithm(name, num_clients=2)
        assert (algorithm.local, algorithm.broadcast) == (LocalObjective(), ())
        assert algorithm.weighting == ("samples" if "avg" in name else "uniform")


# The streamed mean

numbers = st.floats(-1e4, 1e4, width=32)
clients = st.lists(
    st.tuples(st.integers(1, 10_000), st.lists(numbers, min_size=5, max_size=5)),
    min_size=1,
    max_size=30,
)


@settings(deadline=None)
@given(clients, st.sampled_from(["samples", "uniform"]))
def test_streamed_mean_is_numpy_weighted_mean_in_float64(drawn, weighting):
    mean = StreamingMean(weighting)
    for i, (n, values) in enumerate(drawn):
        mean.fold(update(f"c{i}", n, values, {"control": values}))
    values = np.array([values for _, values in drawn], dtype=np.float64)
    weights = [n if weighting == "samples" else 1 for n, _ in drawn]
    assert_mean(mean.delta(), values, weights)
    assert_mean(mean.extra("control"), values, [1] * len(values))


def assert_mean(got: Params, values: np.ndarray, weights: list[int]) -> None:
    """Within the bound that `WeightedSum` states, and float32's last digit and smallest number."""
    exact = np.average(values, axis=0, weights=weights)
    bound = 2 * GROUP * 2.0**-24 * np.average(np.abs(values), axis=0, weights=weights)
    assert (np.abs(np.array(flat(got)) - exact) <= bound + 1.2e-7 * np.abs(exact) + 1e-44).all()


def test_rounding_of_a_mean_does_not_grow_with_the_clients():
    """5,000 times 0.1: float32 alone is off in the fifth digit, groups in the seventh."""
    mean, alone = StreamingMean("samples"), np.float32(0)
    value = np.float32(0.1)
    for i in range(5000):
        mean.fold(update(f"c{i}", 3, (value,) * 5))
        alone += value
    assert abs(alone / 5000 / value - 1) > 5e-6
    np.testing.assert_allclose(flat(mean.delta()), value, rtol=5e-7)


@pytest.mark.parametrize("count", [1, GROUP - 1, GROUP, GROUP + 1, 2 * GROUP])
def test_mean_at_the_ends_of_a_group(count):
    mean = StreamingMean("samples")
    for i in range(count):
        mean.fold(update(f"c{i}", 1 + i, (i, 0, 1, -i, 2)))
    weights = [1 + i for i in range(count)]
    assert_mean(mean.delta(), np.array([(i, 0, 1, -i, 2) for i in range(count)]), weights)


def test_mean_of_one_client_is_its_update_to_the_bit():
    values = (0.1, 1 / 3, -7.7, 1e-30, 3e7)
    mean = StreamingMean("samples")
    mean.fold(update("c1", 37, values))
    assert flat(mean.delta()) == flat(params(values))


def test_folding_leaves_the_update_and_the_mean_is_taken_once():
    mean, sent = StreamingMean("samples"), [update(f"c{i}", 2, (i,) * 5) for i in (1, 2, 6)]
    for item in sent:
        mean.fold(item)
    assert flat(mean.delta()) == pytest.approx([3] * 5)
    assert [flat(item.delta)[0] for item in sent] == [1, 2, 6]
    with pytest.raises(ValueError, match="only once"):
        mean.delta()


@pytest.mark.parametrize("sign", [1, -1])
def test_update_whose_sum_overflows_is_finite(sign):
    mean = StreamingMean("samples")
    mean.fold(update("c1", 2, (sign * 3e38,) * 5))
    assert flat(mean.delta()) == flat(params((sign * 3e38,) * 5))


def test_mean_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no updates"):
        StreamingMean("samples").delta()


# Bad input


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_update_that_is_not_finite_names_the_client_and_leaves_the_sums(bad):
    mean = StreamingMean("samples")
    mean.fold(update("good", 1, START))
    with pytest.raises(UserError, match=r"clinic-7 is not finite at b"):
        mean.fold(update("clinic-7", 1, (1, 1, 1, 1, bad)))
    with pytest.raises(UserError, match=r"clinic-7 is not finite at control a"):
        mean.fold(update("clinic-7", 1, START, {"control": (bad, 1, 1, 1, 1)}))
    assert (mean.count, flat(mean.delta())) == (1, list(START))


@pytest.mark.parametrize("claimed", [0, -3])
def test_update_without_samples_is_refused(claimed):
    with pytest.raises(UserError, match=f"c1 claims {claimed} samples"):
        StreamingMean("uniform").fold(update("c1", claimed, START))


def test_clients_with_other_tensors_are_refused():
    mean = StreamingMean("samples")
    mean.fold(update("c1", 1, START))
    with pytest.raises(UserError, match=r"update of c2 .*missing: b; not expected: none"):
        mean.fold(Update("c2", 1, {"a": torch.zeros(3)}))
    with pytest.raises(UserError, match=r"update of c3 .*missing: none; not expected: c"):
        mean.fold(Update("c3", 1, {**params(START), "c": torch.zeros(1)}))
    with pytest.raises(UserError, match=r"update of c4 has shape \(1,\) at a, but \(3,\)"):
        mean.fold(Update("c4", 1, {**params(START), "a": torch.zeros(1)}))
    with pytest.raises(UserError, match=r"update of c5 carries extras \['control'\]"):
        mean.fold(update("c5", 1, START, {"control": START}))
    assert (mean.count, flat(mean.delta())) == (1, list(START))


def test_extras_with_other_tensors_are_refused():
    mean = StreamingMean("uniform")
    mean.fold(update("c1", 1, START, {"control": START}))
    with pytest.raises(UserError, match=r"control in the update of c2 has shape \(1,\) at a"):
        mean.fold(
            Update("c2", 1, params(START), {"control": {**params(START), "a": torch.zeros(1)}})
        )
    with pytest.raises(UserError, match="update of c3 carries extras"):
        mean.fold(update("c3", 1, START))


def test_updates_of_another_adapter_than_the_servers_are_refused():
    """Broadcasting would hide a tensor of shape (1,) added to one of shape (3,)."""
    algorithm = make_algorithm("fedavg", num_clients=1)
    state = algorithm.init(params(START))
    with pytest.raises(UserError, match="same LoRA rank"):
        one_round(algorithm, state, [Update("c1", 1, {**params(START), "a": torch.zeros(1)})])
    with pytest.raises(UserError, match="same adapter"):
        one_round(algorithm, state, [Update("c1", 1, {"a": torch.zeros(3)})])


def test_state_of_another_algorithm_is_refused():
    state = make_algorithm("fedavg", num_clients=2).init(params(START))
    with pytest.raises(UserError, match=r"slots \[\] but not 'm': .*another algorithm"):
        one_round(make_algorithm("fedadam", num_clients=2), state, WEIGHTED_ROUNDS[0])


def test_scaffold_refuses_updates_without_control_and_too_many_clients():
    algorithm = make_algorithm("scaffold", num_clients=1)
    state = algorithm.init(params(START))
    with pytest.raises(UserError, match="updates carry no 'control'"):
        one_round(algorithm, state, WEIGHTED_ROUNDS[0][:1])
    two = [update(client, 1, START, {"control": START}) for client in ("c1", "c2")]
    with pytest.raises(UserError, match="2 updates in a federation of 1 clients"):
        one_round(algorithm, state, two)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"unknown algorithm 'fedadan'.*did you mean 'fedadam'"):
        make_algorithm("fedadan", num_clients=2)
    with pytest.raises(UserError, match=r"unknown option of fedavgm 'betta'.*beta, eta, form"):
        make_algorithm("fedavgm", num_clients=2, betta=0.9)
    with pytest.raises(UserError, match="unknown option of fedavg 'mu'"):
        make_algorithm("fedavg", num_clients=2, mu=0.1)
    with pytest.raises(UserError, match="unknown weighting 'size': choose samples or uniform"):
        make_algorithm("fedadam", num_clients=2, weighting="size")
    with pytest.raises(UserError, match="unknown weighting 'size'"):
        StreamingMean("size")


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "scaffold"])
def test_form_that_an_algorithm_lacks_is_refused(name):
    with pytest.raises(UserError, match=f"unknown form of {name} 'reference': choose paper"):
        make_algorithm(name, num_clients=2, form="reference")


@pytest.mark.parametrize(
    ("name", "option", "value", "allowed"),
    [
        ("fedavg", "eta", 0, "a number > 0"),
        ("fedavg", "eta", float("nan"), "a number > 0"),
        ("fedavg", "eta", "0.1", "a number > 0"),
        ("fedavg", "eta", True, "a number > 0"),
        ("fedprox", "mu", -0.1, "a number >= 0"),
        ("fedprox", "eta", float("inf"), "a number > 0"),
        ("fedavgm", "beta", 1.0, "0 <= number < 1"),
        ("fedavgm", "beta", -0.1, "0 <= number < 1"),
        ("fedavgm", "eta", -1, "a number > 0"),
        ("fedadagrad", "beta1", 1, "0 <= number < 1"),
        ("fedadagrad", "tau", 0, "a number > 0"),
        ("fedyogi", "beta2", 1.5, "0 <= number < 1"),
        ("fedyogi", "v0", -1e-9, "a number >= 0"),
        ("fedadam", "beta1", None, "0 <= number < 1"),
        ("fedadam", "tau", None, "a number > 0"),
        ("scaffold", "eta_g", 0, "a number > 0"),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(name, option, value, allowed):
    with pytest.raises(UserError, match=f"option {option} is {value!r}: choose .*{allowed}"):
        make_algorithm(name, num_clients=2, **{option: value})


@pytest.mark.parametrize("count", [0, 2.0, True])
def test_number_of_clients_out_of_range_is_refused(count):
    with pytest.raises(UserError, match=r"num_clients is .*whole number >= 1"):
        make_algorithm("scaffold", num_clients=count)


def test_registry_lists_options_with_their_defaults():
    assert list(ALGORITHMS) == [
        "fedavg",
        "fedprox",
        "fedavgm",
        "fedadagrad",
        "fedyogi",
        "fedadam",
        "scaffold",
    ]
    adagrad = {
        "eta": 1e-3,
        "tau": 1e-3,
        "beta1": 0.9,
        "v0": None,
        "weighting": "uniform",
        "form": "paper",
    }
    averaging = {"eta": 1.0, "weighting": "samples", "form": "paper"}
    assert {name: dict(spec.options) for name, spec in ALGORITHMS.items()} == {
        "fedavg": averaging,
        "fedprox": {"mu": 0.01, **averaging},
        "fedavgm": {"beta": 0.9, **averaging},
        "fedadagrad": adagrad,
        "fedyogi": {**adagrad, "beta2": 0.99},
        "fedadam": {**adagrad, "beta2": 0.99},
        "scaffold": {"eta_g": 1.0, "form": "paper"},
    }
    for name, spec in ALGORITHMS.items():
        assert make_algorithm(name, num_clients=3, **spec.options).name == name
