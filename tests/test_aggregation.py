"""Median, trimmed mean, Krum, Multi-Krum: by hand, against numpy, against hostile clients, and in
memory that does not grow with the number of clients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import trim_mean
from sites import NearLink, hash_of, make_kits

from fedmllm import experiment
from fedmllm.algorithms import ALGORITHMS, gathered, make_algorithm
from fedmllm.algorithms.aggregation import AGGREGATIONS, make_aggregation, with_aggregation
from fedmllm.algorithms.base import Aggregate, Params, StreamingMean, Update
from fedmllm.algorithms.scratch import Scratch
from fedmllm.config import config_hash, make_config, options_of
from fedmllm.errors import UserError
from fedmllm.federation import run_round
from fedmllm.report.loading import config_digest
from fedmllm.sites.serving import serve
from fedmllm.strategies import with_strategy

ROBUST = [name for name in AGGREGATIONS if name != "mean"]
# five updates of five numbers; the last client is hostile
FIVE = [
    (1, 10, 2, 0, 0),
    (2, 30, 2, 0, 1),
    (3, 20, 2, 0, -1),
    (4, 50, 2, 1, 0),
    (-1e6, 1e6, 1e6, -1e6, 1e6),
]


def params(values) -> Params:
    flat = torch.tensor(values, dtype=torch.float32)
    return {"a": flat[:3].clone(), "b": flat[3:].reshape(2, -1).clone()}


def flat(tree: Params) -> list[float]:
    return torch.cat([tree[name].flatten() for name in sorted(tree)]).tolist()


def aggregate(name: str, rows, samples=None, folder=None, **options) -> Aggregate:
    """An aggregate of one client a row, before its result is asked for."""
    found = make_aggregation(name, **options).begin("uniform", folder)
    for i, row in enumerate(rows):
        found.fold(Update(f"c{i}", samples[i] if samples else 1, params(row)))
    return found


def drawn(clients: int, size: int = 23, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(clients, size)).astype(np.float32)


# -- by hand, and against numpy and scipy ---------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("median", {}, (2, 30, 2, 0, 0)),
        ("trimmed-mean", {"trim": 1}, (2, 100 / 3, 2, 0, 1 / 3)),
        ("trimmed-mean", {"trim": 2}, (2, 30, 2, 0, 0)),
    ],
)
def test_coordinates_by_hand(name, options, expected) -> None:
    found = aggregate(name, FIVE, **options)
    assert flat(found.delta()) == pytest.approx(expected)
    assert found.chosen == ()


def test_krum_by_hand() -> None:
    """n = 5, f = 1: sums over the two nearest. Squared distances between the first four are
    01: 1 + 400 + 1 = 402, 02: 4 + 100 + 1 = 105, 03: 9 + 1600 + 1 = 1610,
    12: 1 + 100 + 4 = 105, 13: 4 + 400 + 1 + 1 = 406, 23: 1 + 900 + 1 + 1 = 903.
    Scores: 0: 507, 1: 507, 2: 210, 3: 1309. With f = 0, over the three nearest:
    0: 2117, 1: 913, 2: 1113, 3: 2919. So f decides between clients 2 and 1."""
    one, none = aggregate("krum", FIVE), aggregate("krum", FIVE, byzantine=0)
    assert flat(one.delta()) == pytest.approx(FIVE[2])
    assert flat(none.delta()) == pytest.approx(FIVE[1])
    assert (one.chosen, none.chosen) == (("c2",), ("c1",))
    two = aggregate("multi-krum", FIVE)  # n - f - 2 of them: 2, and the first of 0 and 1
    assert flat(two.delta()) == pytest.approx((2, 15, 2, 0, -0.5))
    assert two.chosen == ("c0", "c2")
    alone = aggregate("multi-krum", FIVE, keep=1)
    assert flat(alone.delta()) == pytest.approx(FIVE[2])


@pytest.mark.parametrize("block", [4, 100, 2**23])
@pytest.mark.parametrize("clients", [5, 8])
def test_against_numpy_and_scipy(monkeypatch, tmp_path, clients: int, block: int) -> None:
    """Whatever the size of the blocks in which the updates are read."""
    monkeypatch.setattr(gathered, "BLOCK", block)
    rows = drawn(clients)
    exact = rows.astype(np.float64)
    median = flat(aggregate("median", rows, folder=tmp_path).delta())
    assert median == pytest.approx(np.median(exact, axis=0), rel=1e-6)
    for trim in (1, 2):
        found = flat(aggregate("trimmed-mean", rows, trim=trim).delta())
        assert found == pytest.approx(trim_mean(exact, (trim + 0.5) / clients), rel=1e-6)
    scores = []
    for i in range(clients):
        apart = sorted(((exact[i] - exact[j]) ** 2).sum() for j in range(clients) if j != i)
        scores.append(sum(apart[: clients - 1 - 2]))
    best = sorted(range(clients), key=lambda i: scores[i])
    assert flat(aggregate("krum", rows).delta()) == rows[best[0]].tolist()
    many = aggregate("multi-krum", rows, keep=2)
    assert flat(many.delta()) == pytest.approx(exact[best[:2]].mean(axis=0), rel=1e-6)
    assert many.chosen == tuple(f"c{i}" for i in sorted(best[:2]))


def test_krum_sees_small_differences_of_large_updates() -> None:
    """The squares of 1,000 are 1e8 times the distances: too much for float32."""
    rows = (1000 + 0.01 * drawn(8)).astype(np.float32)
    exact = rows.astype(np.float64)
    apart = ((exact[:, None] - exact) ** 2).sum(-1)
    best = np.argmin(np.sort(apart, axis=1)[:, 1:6].sum(1))
    assert aggregate("krum", rows).delta()["a"].tolist() == rows[best, :3].tolist()


# -- identities -----------------------------------------------------------------------------------


def test_nothing_trimmed_is_the_plain_mean() -> None:
    rows = drawn(7)
    mean = StreamingMean("uniform")
    for row in rows:
        mean.fold(Update("c", 3, params(row)))
    plain = flat(mean.delta())
    found = flat(aggregate("trimmed-mean", rows, samples=range(1, 8), trim=0).delta())
    assert found == pytest.approx(plain, rel=1e-5, abs=1e-6)
    assert found == pytest.approx(rows.astype(np.float64).mean(axis=0), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", ROBUST)
def test_updates_that_agree_are_the_result(name: str) -> None:
    row = drawn(1)[0]
    assert flat(aggregate(name, [row] * 6).delta()) == row.tolist()


@pytest.mark.parametrize("name", ["median", "trimmed-mean"])
def test_the_order_of_clients_changes_no_bit(name: str) -> None:
    rows = drawn(9)
    assert flat(aggregate(name, rows).delta()) == flat(aggregate(name, rows[::-1]).delta())


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "scaffold"])
def test_every_server_optimiser_takes_the_median(name: str) -> None:
    """Its step on the median of three is its step on one update that is the median."""
    rows = drawn(3)
    plain = make_algorithm(name, num_clients=3)
    robust = with_aggregation(plain, make_aggregation("median"))
    assert (robust.weighting, robust.local, robust.name) == ("uniform", plain.local, name)
    alone = StreamingMean("uniform")
    alone.fold(Update("c", 1, params(np.median(rows, axis=0))))
    state = plain.init(params(drawn(1, seed=1)[0]))
    expected = plain.step(state, alone)
    after = robust.step(state, aggregate("median", rows))
    assert flat(after.params) == flat(expected.params)
    for slot, values in expected.slots.items():
        assert flat(after.slots[slot]) == flat(values)


def test_a_strategy_keeps_the_aggregation() -> None:
    robust = with_aggregation(make_algorithm("fedadam", num_clients=5), make_aggregation("krum"))
    assert with_strategy(robust).aggregation is robust.aggregation


# -- hostile clients ------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 3, 6])
@pytest.mark.parametrize("name", ROBUST)
def test_one_hostile_client_moves_nothing(name: str, place: int) -> None:
    """It sends a million times the noise of the others, and claims a million samples."""
    rows = 1 + 0.01 * drawn(7)
    rows[place] = 1e6 * drawn(1, seed=2)[0]
    samples = [10**6 if i == place else 3 for i in range(7)]
    found = aggregate(name, rows, samples)
    honest = np.delete(rows, place, axis=0)
    result = np.array(flat(found.delta()))
    assert (result >= honest.min(axis=0) - 1e-6).all()
    assert (result <= honest.max(axis=0) + 1e-6).all()
    assert f"c{place}" not in found.chosen
    mean = StreamingMean("samples")
    for i, row in enumerate(rows):
        mean.fold(Update("c", samples[i], params(row)))
    assert np.abs(flat(mean.delta())).max() > 1e5


def test_the_largest_numbers_do_no_harm() -> None:
    """Squares of 3e38 are infinite in float32."""
    rows = 1 + 0.01 * drawn(5)
    for name in ROBUST:
        for value in (3e38, -3e38):
            rows[4] = value
            result = np.array(flat(aggregate(name, rows).delta()))
            assert np.abs(result - 1).max() < 0.1, name


def test_an_update_that_is_not_finite_is_refused() -> None:
    found = aggregate("median", FIVE[:2])
    for bad in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="update of x is not finite at b"):
            found.fold(Update("x", 1, params((1, 2, 3, 4, bad))))
    wide = {name: value.double() for name, value in params(FIVE[0]).items()}
    wide["a"][0] = 1e300  # finite until it is float32
    with pytest.raises(UserError, match="update of x is not finite at a"):
        found.fold(Update("x", 1, wide))
    with pytest.raises(UserError, match="update of x has other tensors"):
        found.fold(Update("x", 1, {"a": torch.zeros(3)}))
    with pytest.raises(UserError, match=r"update of x has extras .control., and aggregation"):
        found.fold(Update("x", 1, params(FIVE[0]), {"control": params(FIVE[0])}))
    with pytest.raises(UserError, match="update of x has a weight of its own"):
        found.fold(Update("x", 1, params(FIVE[0])), 0.5)
    found.fold(Update("x", 1, params(FIVE[2])))  # what was refused has left nothing
    assert flat(found.delta()) == pytest.approx((2, 20, 2, 0, 0))
    with pytest.raises(ValueError, match="only once"):
        found.delta()
    with pytest.raises(UserError, match="aggregation median has no 'control'"):
        found.extra("control")


# -- memory and disk ------------------------------------------------------------------------------

MEMORY = """
import json, pathlib, sys
import torch
from fedmllm import results
from fedmllm.algorithms.aggregation import make_aggregation
from fedmllm.algorithms.base import Update

def peak(name, clients):
    before = results.peak_memory_bytes()
    found = make_aggregation(name).begin("uniform", pathlib.Path(sys.argv[1]))
    for k in range(clients):
        delta = {n: torch.full((1 << 18,), float(k)) for n in "ab"}
        found.fold(Update(str(k), 1, delta))
        del delta
    found.delta()
    return results.peak_memory_bytes() - before

torch.set_num_threads(1)
found = {}
for name in ("median", "multi-krum"):
    peak(name, 5)
    for clients in (8, 64):
        results.reset_peak_memory()
        found[f"{name} {clients}"] = peak(name, clients) / 2**20
print(json.dumps(found))
"""


def test_memory_does_not_grow_with_the_clients(tmp_path) -> None:
    """64 updates of 2 MB, 128 MB in all, take no more than 8 do, and no more than 36 MB."""
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    known = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed tensors go back at once
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=known)
    found = json.loads(done.stdout)
    for name in ("median", "multi-krum"):
        assert found[f"{name} 64"] < found[f"{name} 8"] + 6, found
        assert found[f"{name} 64"] < 36, found


def test_updates_lie_in_the_runs_folder_and_leave_nothing(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "state"
    opened = []
    make = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: opened.append(dir) or make(dir=dir))
    scratch = Scratch(folder)
    assert not folder.exists()
    parts = [torch.rand(3, 2), torch.rand(5).to(torch.bfloat16), torch.tensor(7)]
    assert scratch.write(parts[:2]) == 0
    assert scratch.write(parts[2:]) == 24 + 10
    assert opened == [folder]
    assert list(folder.iterdir()) == []  # a file without a name
    for part, start in zip(parts, (0, 24, 34), strict=True):
        into = torch.empty_like(part)
        scratch.read(into, start)
        assert torch.equal(into, part)
    with pytest.raises(OSError, match="are not there"):
        scratch.read(torch.empty(9), 34)
    scratch.clear()
    assert scratch.write(parts[:1]) == 0
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written to .*free room for the updates"):
        Scratch(tmp_path / "file" / "x").write(parts)


# -- bad input ------------------------------------------------------------------------------------


def config(*overrides: str, **raw):
    small = {"training": {"clients_per_round": 5}, "partition": {"clients": 5}}
    return make_config({"name": "x", **small, **raw}, overrides)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["aggregation=medan"], "aggregation.name: unknown aggregation 'medan': .*'median'"),
        (["aggregation=krum", "aggregation.trim=1"], "aggregation.trim: unknown option of"),
        (["aggregation=median", "aggregation.trim=1"], "median has no options"),
        (["aggregation=krum", "aggregation.byzantine=-1"], "byzantine is -1: choose a whole"),
        (["aggregation=krum", "aggregation.byzantine=1.5"], "1.5 is not an integer"),
        (["aggregation=multi-krum", "aggregation.keep=0"], "keep is 0: choose a whole number >= 1"),
        (["aggregation=multi-krum", "aggregation.keep=a"], "keep is 'a': choose a whole number"),
        (
            ["aggregation=krum", "aggregation.byzantine=2"],
            "krum needs at least 7 updates a round, and training.clients_per_round is 5: raise it, "
            "lower aggregation.byzantine or use aggregation mean",
        ),
        (["aggregation=multi-krum", "aggregation.keep=3"], "at least 6 .*lower aggregation.keep"),
        (["aggregation=trimmed-mean", "aggregation.trim=3"], "at least 7 .*aggregation.trim"),
        (["aggregation=median", "training.clients_per_round=2"], "median needs at least 3"),
        (["aggregation=median", "algorithm=scaffold"], "scaffold sends every client the mean of"),
        (["aggregation=median", "algorithm.weighting=samples"], "counts all clients alike"),
        (["aggregation=median", "strategy.prototypes=1"], "class prototypes are means"),
        (["aggregation=median", "strategy.aggregation=1"], "weighs updates by what parties"),
        (["aggregation=median", "topology=local"], "topology local has nothing to aggregate"),
    ],
)
def test_what_does_not_go_together_is_said(overrides, words: str) -> None:
    with pytest.raises(UserError, match=words):
        config(*overrides)


def test_too_few_parties_in_the_data_are_refused_before_training(tmp_path, mllm) -> None:
    """How many there are, a user's own files say."""
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]
    for name in ("test", "parties/a", "parties/b"):
        file = tmp_path / f"{name}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps([{"id": 1, "image": None, "conversations": talk}]))
    data = {"name": "conversations", "root": str(tmp_path)}
    own = config("aggregation=median", data=data, training={"clients_per_round": 3})
    words = "needs at least 3 updates a round, and a round has 2 of 2 clients: raise it"
    with pytest.raises(UserError, match=words):
        experiment.run(own, out=tmp_path / "run", mllm=mllm)
    assert not (tmp_path / "run").exists()


def test_what_goes_together() -> None:
    found = config("aggregation=median", "algorithm=fedadam", "strategy.sampling=1")
    assert found.aggregation == {"name": "median"}
    plain, robust = config(), config("aggregation=krum")
    assert (plain.algorithm["weighting"], robust.algorithm["weighting"]) == ("samples", "uniform")
    again = make_config(robust.model_dump(mode="json"))  # as a run's own file
    assert again == robust
    for name in ROBUST:  # the fewest clients that each is for
        assert config(f"aggregation={name}").aggregation["name"] == name


def test_the_mean_changes_no_hash() -> None:
    plain = config()
    facts = plain.model_dump(mode="json")
    assert facts.pop("aggregation") == {"name": "mean"}
    assert config_digest(facts) == config_hash(plain)
    hashes = {config_hash(config(f"aggregation={name}")) for name in AGGREGATIONS}
    assert len(hashes) == len(AGGREGATIONS)
    assert config_hash(config("aggregation=krum", "aggregation.byzantine=0")) not in hashes


def test_unknown_names_and_options_in_python() -> None:
    with pytest.raises(UserError, match="unknown aggregation 'mode'"):
        make_aggregation("mode")
    with pytest.raises(UserError, match="unknown option of krum 'f': choose byzantine"):
        make_aggregation("krum", f=1)
    own = with_aggregation(make_algorithm("fedavg", num_clients=5), make_aggregation("median"))
    with pytest.raises(UserError, match="aggregation median protects none"):
        with_strategy(own, alignment=experiment.Alignment(prototypes=1.0), classes=2, width=4)


class Some:
    """Clients 0 to 4 move every parameter by their number; those in `absent` do not deliver."""

    def __init__(self, absent: tuple[int, ...] = ()) -> None:
        self.absent, self.memory = absent, {}

    def ready(self, clients):
        return clients

    def train(self, round_, cohort, algorithm, state, *, lr):
        for k, client in enumerate(cohort):
            delta = {name: torch.full_like(v, float(k)) for name, v in state.params.items()}
            yield k, None if k in self.absent else Update(client, 1, delta)


def test_a_round_with_too_few_updates_is_not_applied() -> None:
    cohort = [f"client-{k}" for k in range(5)]
    own = with_aggregation(make_algorithm("fedavg", num_clients=5), make_aggregation("krum"))
    state = own.init({"w": torch.zeros(2)})
    with pytest.raises(UserError, match=r"krum needs .* 5 updates a round, and in round 1 there"):
        run_round(Some((1,)), own, state, cohort, lr=1.0)
    assert state.params["w"].tolist() == [0, 0]
    after, record = run_round(Some(), own, state, cohort, lr=1.0)
    assert record.chosen == ("client-1",)  # scores 5, 2, 2, 2, 5
    assert after.params["w"].tolist() == [1, 1]
    own = with_aggregation(make_algorithm("fedavg", num_clients=5), make_aggregation("median"))
    after, record = run_round(Some((1,)), own, state, cohort, lr=1.0)
    assert (record.chosen, record.missing) == ((), ("client-1",))
    assert after.params["w"].tolist() == [2.5, 2.5]  # of 0, 2, 3, 4


# -- whole runs -----------------------------------------------------------------------------------

TINY = {
    "data": {"name": "memes", "train": 20, "test": 8},
    "partition": {"name": "even", "clients": 5},
    "training": {"rounds": 1, "clients_per_round": 5, "batch_size": 4, "micro_batch": 4},
    "evaluation": {"every": 0, "conditions": ["both"]},
}
HOSTILE = "client-03"


def hostile_training(monkeypatch) -> None:
    """One party of five trains and then sends a million times noise."""
    honest = experiment.InProcessRunner.train

    def train(self, *args, **options):
        noise = torch.Generator().manual_seed(0)
        for position, update in honest(self, *args, **options):
            if update.client == HOSTILE:
                delta = {
                    n: 1e6 * torch.randn(v.shape, generator=noise) for n, v in update.delta.items()
                }
                update = replace(update, delta=delta, num_samples=10**6)
            yield position, update

    monkeypatch.setattr(experiment.InProcessRunner, "train", train)


def moved(folder: Path, mllm, seed: int = 0) -> float:
    """The largest change of a weight since the start."""
    from fedmllm import checkpoint

    found = checkpoint.load(folder / "state" / experiment.EVERYONE)
    start = mllm.init_adapter(seed)
    return max(float((v - start[n]).abs().max()) for n, v in found.state.params.items())


def test_a_run_with_one_hostile_party_of_five(tmp_path, monkeypatch, mllm) -> None:
    """A round of AdamW moves a weight by at most its learning rate a step; one step here."""
    hostile_training(monkeypatch)
    shared = experiment.Shared(mllm)
    found = {}
    for name in AGGREGATIONS:
        own = make_config({"name": name, "aggregation": name, **TINY})
        result = experiment.run(own, out=tmp_path / name, shared=shared)
        found[name] = moved(tmp_path / name, mllm)
        (line,) = result["history"]
        assert HOSTILE not in line.get("chosen", ())
        assert ("chosen" in line) == ("krum" in name)
        part = f"aggregation:{name}"
        assert result["revisions"].get(part) == (None if name == "mean" else 1)
    assert found.pop("mean") > 1e5
    assert all(0 < each < 2 * own.training.lr for each in found.values()), found


def test_sites_give_the_weights_of_one_process(tmp_path, monkeypatch, mllm) -> None:
    """Also if they answer in reverse order, under a server optimiser with a state; and the server
    does not begin with a quorum that the aggregation cannot do with."""
    monkeypatch.setattr("fedmllm.sites.site.load_model", lambda config: mllm)
    monkeypatch.setattr("fedmllm.sites.serving.load_model", lambda config: mllm)
    raw = {
        "name": "x",
        **TINY,
        "data": {"name": "memes", "train": 12, "test": 4},
        "partition": {"name": "even", "clients": 3},
        "training": {**TINY["training"], "clients_per_round": 3},
        "algorithm": {"name": "fedadam", "eta": 0.01},
        "aggregation": {"name": "trimmed-mean", "trim": 1},
    }
    kits = make_kits(tmp_path, raw)
    sha256 = hash_of(kits["server"])
    found = serve(kits["server"], sha256, NearLink(kits, tmp_path))
    here = experiment.run(make_config(raw), out=tmp_path / "here", mllm=mllm)
    assert found["config_sha256"] == here["config_sha256"]
    assert found["network"]["weighted"] == "uniform"
    ours = experiment.checkpoint.load(kits["server"] / "runs" / "x" / "state")
    theirs = experiment.checkpoint.load(tmp_path / "here" / "state")
    for name, value in theirs.state.params.items():
        assert torch.equal(ours.state.params[name], value)
    few = make_kits(tmp_path / "few", raw, server={"min_sites": 2})
    words = "needs at least 3 updates a round, and the server's min_sites is 2: raise it"
    with pytest.raises(UserError, match=words):
        serve(few["server"], sha256, NearLink(few, tmp_path))


def test_options_are_the_builders() -> None:
    options = {name: dict(spec.options) for name, spec in AGGREGATIONS.items()}
    assert options == {
        "mean": {},
        "median": {},
        "trimmed-mean": {"trim": 1},
        "krum": {"byzantine": 1},
        "multi-krum": {"byzantine": 1, "keep": None},
    }
    for name, spec in AGGREGATIONS.items():
        assert make_aggregation(name, **spec.options).name == name
        assert options_of({"name": name, **spec.options}) == spec.options
