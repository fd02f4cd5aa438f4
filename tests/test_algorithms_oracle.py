"""Independent oracles: Flower's strategies as recorded, and SCAFFOLD's Algorithm 1 in numpy.

tests/data/flower_oracle.json is written by scripts/record_flower_oracle.py (flwr 1.41.0): three
clients with 5, 17 and 40 samples, four rounds, three tensors, in float64. Where Flower departs
from the papers, the departure is stated in the test:

- all means are weighted by samples (the FedOpt paper: plain mean)  -> weighting="samples"
- v starts at 0 (the paper: at tau^2 or above)                      -> v0=0
- FedAdagrad has no momentum (Algorithm 2 has it)                   -> beta1=0
- FedAdam multiplies eta of round t by sqrt(1 - beta2^(t+1)) / (1 - beta1^(t+1)), one step off
  from Kingma and Ba's bias correction; the paper has none          -> eta of each round
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmllm.algorithms import make_algorithm
from fedmllm.algorithms.base import Algorithm, ServerState, StreamingMean, Update

ORACLE = json.loads((Path(__file__).parent / "data/flower_oracle.json").read_text())
RUNS = {run["strategy"]: run for run in ORACLE["runs"]}
TOLERANCE = 2e-6


def arrays(tree) -> dict[str, np.ndarray]:
    return {name: np.array(value, dtype=np.float64) for name, value in tree.items()}


def tensors(tree) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in tree.items()}


def assert_as_recorded(got, recorded) -> None:
    assert got.keys() == recorded.keys()
    for name, value in recorded.items():
        np.testing.assert_allclose(np.asarray(got[name]), value, rtol=0, atol=TOLERANCE)


def play_ours(strategy: str, algorithm_of_round) -> None:
    """Feed the recorded deltas to our algorithm; compare after every round."""
    state = algorithm_of_round(1).init(tensors(ORACLE["start"]))
    recorded = RUNS[strategy]["params"]
    for t, (deltas, expected) in enumerate(zip(ORACLE["deltas"], recorded, strict=True), start=1):
        state = one_round(algorithm_of_round(t), state, deltas)
        assert_as_recorded(state.params, expected)


def one_round(algorithm: Algorithm, state: ServerState, deltas) -> ServerState:
    mean = StreamingMean(algorithm.weighting)
    for i, (n, delta) in enumerate(zip(ORACLE["num_samples"], deltas, strict=True)):
        mean.fold(Update(f"c{i}", n, tensors(delta)))
    return algorithm.step(state, mean)


def test_record_is_of_the_version_that_the_notes_speak_of():
    assert ORACLE["flwr"] == "1.41.0"
    assert set(RUNS) == {"FedAvg", "FedAvgM", "FedAdagrad", "FedYogi", "FedAdam"}
    assert all(len(run["params"]) == len(ORACLE["deltas"]) == 4 for run in RUNS.values())


# Ours against the recording


@pytest.mark.parametrize("name", ["fedavg", "fedprox"])
def test_fedavg_equals_flower(name):
    play_ours("FedAvg", lambda t: make_algorithm(name, num_clients=3))


def test_fedavgm_equals_flower():
    options = RUNS["FedAvgM"]["options"]
    beta, eta = options["server_momentum"], options["server_learning_rate"]
    play_ours("FedAvgM", lambda t: make_algorithm("fedavgm", num_clients=3, beta=beta, eta=eta))


def test_fedadagrad_equals_flower_with_its_weights_and_start():
    options = {**RUNS["FedAdagrad"]["options"], "beta1": 0, "v0": 0, "weighting": "samples"}
    play_ours("FedAdagrad", lambda t: make_algorithm("fedadagrad", num_clients=3, **options))


def adaptive_options(strategy: str) -> dict:
    options = {key.replace("_", ""): value for key, value in RUNS[strategy]["options"].items()}
    return {**options, "v0": 0, "weighting": "samples"}


def test_fedyogi_equals_flower_with_its_weights_and_start():
    options = adaptive_options("FedYogi")
    play_ours("FedYogi", lambda t: make_algorithm("fedyogi", num_clients=3, **options))


def test_fedadam_equals_flower_with_its_weights_start_and_step_factor():
    options = adaptive_options("FedAdam")
    eta, beta1, beta2 = options["eta"], options["beta1"], options["beta2"]

    def of_round(t: int) -> Algorithm:
        factor = step_factor(t, beta1, beta2)
        return make_algorithm("fedadam", num_clients=3, **{**options, "eta": eta * factor})

    play_ours("FedAdam", of_round)


@pytest.mark.parametrize("strategy", ["FedAdagrad", "FedYogi", "FedAdam"])
def test_defaults_of_the_paper_do_differ_from_flower(strategy):
    """Without the stated changes the numbers part: the comparisons above are not vacuous."""
    names = {"FedAdagrad": "fedadagrad", "FedYogi": "fedyogi", "FedAdam": "fedadam"}
    kept = {k: v for k, v in adaptive_options(strategy).items() if k not in ("v0", "weighting")}
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        play_ours(strategy, lambda t: make_algorithm(names[strategy], num_clients=3, **kept))


# Flower's formulas, written down once more in numpy, against the recording


def step_factor(t: int, beta1: float, beta2: float) -> float:
    return float(np.sqrt(1 - beta2 ** (t + 1)) / (1 - beta1 ** (t + 1)))


def flower_direction(strategy: str, options: dict, t: int, slots: dict, D: np.ndarray):
    """What Flower adds to the parameters in round t. `slots` holds m and v and is updated."""
    if strategy == "FedAvg":
        return D
    if strategy == "FedAvgM":
        slots["m"] = D if t == 1 else options["server_momentum"] * slots["m"] + D
        return options["server_learning_rate"] * slots["m"]
    beta1, beta2 = options.get("beta_1", 0.0), options.get("beta_2", 0.0)
    m = slots["m"] = beta1 * slots.get("m", 0.0) + (1 - beta1) * D
    v = slots.get("v", np.zeros_like(D))
    slots["v"] = v = {
        "FedAdagrad": v + D**2,
        "FedYogi": v - (1 - beta2) * D**2 * np.sign(v - D**2),
        "FedAdam": beta2 * v + (1 - beta2) * D**2,
    }[strategy]
    factor = step_factor(t, beta1, beta2) if strategy == "FedAdam" else 1.0
    return factor * options["eta"] * m / (np.sqrt(v) + options["tau"])


@pytest.mark.parametrize("strategy", sorted(RUNS))
def test_numpy_formulas_of_flower_match_the_recording(strategy):
    run, current = RUNS[strategy], arrays(ORACLE["start"])
    slots = {name: {} for name in current}
    for t, (deltas, expected) in enumerate(
        zip(ORACLE["deltas"], run["params"], strict=True), start=1
    ):
        for name in current:
            values = [np.array(delta[name]) for delta in deltas]
            D = np.average(values, axis=0, weights=ORACLE["num_samples"])
            current[name] += flower_direction(strategy, run["options"], t, slots[name], D)
        assert_as_recorded(current, expected)


# SCAFFOLD: Algorithm 1 of the paper, option II, on two quadratics

HESSIANS = [np.diag([1.0, 2.0, 0.5]), np.array([[2.0, 0.5, 0], [0.5, 1.0, 0.2], [0, 0.2, 3.0]])]
MINIMA = [np.array([1.0, -2.0, 3.0]), np.array([-3.0, 1.0, 0.5])]
LOCAL_STEPS, ETA_L, ETA_G = 5, 0.05, 1.0


def gradient(i: int, y: np.ndarray) -> np.ndarray:
    """Of f_i(y) = (y - b_i)^T A_i (y - b_i) / 2."""
    return HESSIANS[i] @ (y - MINIMA[i])


def local_sgd(i: int, x: np.ndarray, c: np.ndarray, c_i: np.ndarray):
    """Lines 7 to 14: K corrected steps from x; returns y_i and, by option II, c_i+."""
    y = x.copy()
    for _ in range(LOCAL_STEPS):
        y = y - ETA_L * (gradient(i, y) - c_i + c)
    return y, c_i - c + (x - y) / (LOCAL_STEPS * ETA_L)


def algorithm_1(cohorts: list[list[int]]) -> list[np.ndarray]:
    """The whole of Algorithm 1 in numpy; x after each round."""
    x, c, c_own, history = np.zeros(3), np.zeros(3), [np.zeros(3), np.zeros(3)], []
    for cohort in cohorts:
        y_new, c_new = zip(*(local_sgd(i, x, c, c_own[i]) for i in cohort), strict=True)
        dx = sum(y - x for y in y_new) / len(cohort)
        dc = sum(new - c_own[i] for i, new in zip(cohort, c_new, strict=True)) / len(cohort)
        for i, new in zip(cohort, c_new, strict=True):
            c_own[i] = new
        x, c = x + ETA_G * dx, c + len(cohort) / len(c_own) * dc
        np.testing.assert_allclose(c, np.mean(c_own, axis=0), atol=1e-12)
        history.append(x)
    return history


def our_server(cohorts: list[list[int]], samples=(1, 9)) -> list[np.ndarray]:
    """The same clients around our server step; unequal n_k must not matter."""
    algorithm = make_algorithm("scaffold", num_clients=2, eta_g=ETA_G)
    state = algorithm.init({"x": torch.zeros(3)})
    c_own, history = [np.zeros(3), np.zeros(3)], []
    for cohort in cohorts:
        mean = StreamingMean(algorithm.weighting)
        x, c = (tree["x"].double().numpy() for tree in (state.params, state.slots["control"]))
        for i in cohort:
            y, new = local_sgd(i, x, c, c_own[i])
            extra = {"control": {"x": torch.tensor(new - c_own[i])}}
            mean.fold(Update(f"c{i}", samples[i], {"x": torch.tensor(y - x)}, extra))
            c_own[i] = new
        state = algorithm.step(state, mean)
        history.append(state.params["x"].double().numpy())
    return history


@pytest.mark.parametrize("cohorts", [[[0, 1]] * 300, [[0], [1]] * 300], ids=["all", "one in turn"])
def test_scaffold_follows_algorithm_1_to_the_common_minimum(cohorts):
    ours, oracle = our_server(cohorts), algorithm_1(cohorts)
    np.testing.assert_allclose(ours, oracle, atol=5e-6)
    pull = sum(A @ b for A, b in zip(HESSIANS, MINIMA, strict=True))
    np.testing.assert_allclose(ours[-1], np.linalg.solve(sum(HESSIANS), pull), atol=1e-5)


def test_fedavg_on_the_same_quadratics_stops_elsewhere():
    """Client drift, which SCAFFOLD removes: the problem is not one that any method solves."""
    x = np.zeros(3)
    for _ in range(300):
        x = np.mean([local_sgd(i, x, np.zeros(3), np.zeros(3))[0] for i in (0, 1)], axis=0)
    pull = sum(A @ b for A, b in zip(HESSIANS, MINIMA, strict=True))
    assert np.abs(x - np.linalg.solve(sum(HESSIANS), pull)).max() > 1e-2
