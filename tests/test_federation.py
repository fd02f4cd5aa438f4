"""The loop, with clients that do arithmetic instead of training."""

from __future__ import annotations

import weakref

import pytest
import torch

from fedmllm.algorithms import make_algorithm
from fedmllm.algorithms.base import Update
from fedmllm.federation import HELD, cohort_of, in_order, payload, run_round

CLIENTS = [f"client-{i:02d}" for i in range(10)]


class Adders:
    """Client k moves every parameter by k; n_k = k + 1. `order` is the order of arrival."""

    def __init__(self, order=None) -> None:
        self.order, self.memory = order, {}

    def train(self, round_, cohort, algorithm, state, *, lr):
        updates = []
        for position, client in enumerate(cohort):
            k = int(client[-2:])
            delta = {name: torch.full_like(v, float(k) + 0.1) for name, v in state.params.items()}
            updates.append((position, Update(client, k + 1, delta, metrics={"loss": float(k)})))
        order = self.order or range(len(updates))
        yield from (updates[i] for i in order)


def test_a_round_by_hand() -> None:
    """Clients 1 and 4, weights 2 and 5: (2 * 1.1 + 5 * 4.1) / 7 = 3.242857."""
    algorithm = make_algorithm("fedavg", num_clients=10)
    state = algorithm.init({"w": torch.tensor([1.0, 2.0])})
    after, record = run_round(Adders(), algorithm, state, ["client-01", "client-04"], lr=0.5)
    assert after.params["w"].tolist() == pytest.approx([4.242857, 5.242857])
    assert after.round == 1
    assert (record.round, record.loss, record.lr) == (1, 2.5, 0.5)
    assert (record.bytes_up, record.bytes_down) == (16, 16)  # 2 floats x 4 bytes x 2 clients
    assert state.round == 0
    assert state.params["w"].tolist() == [1.0, 2.0]


def test_arrival_order_does_not_change_a_bit() -> None:
    algorithm = make_algorithm("fedavg", num_clients=10)
    state = algorithm.init({"w": torch.rand(100, generator=torch.Generator().manual_seed(0))})
    runs = [
        run_round(Adders(order), algorithm, state, CLIENTS[:4], lr=1.0)[0].params["w"]
        for order in (None, [3, 1, 0, 2], [2, 3, 1, 0])
    ]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


def test_updates_are_passed_on_as_soon_as_their_turn_comes() -> None:
    updates = [Update(c, 1, {}) for c in CLIENTS[:3]]
    log = []

    def arrivals():
        for index in (1, 0, 2):
            log.append(f"in {index}")
            yield index, updates[index]

    for update in in_order(arrivals(), 3):
        log.append(f"out {update.client[-1]}")
    assert log == ["in 1", "in 0", "out 0", "out 1", "in 2", "out 2"]
    for lacking in ([(1, updates[1])], [(0, updates[0])], []):
        with pytest.raises(ValueError, match="2 updates expected, none came at position"):
            list(in_order(lacking, 2))


def sent(position: int) -> Update:
    """An update of several dtypes and with an extra."""
    draw = torch.Generator().manual_seed(position)
    delta = {"b": torch.randn(3, 2, generator=draw), "a": torch.randn(5, generator=draw).bfloat16()}
    extra = {"control": {"w": torch.randn(2, generator=draw)}, "none": {}}
    return Update(CLIENTS[position], position + 1, delta, extra, {"loss": float(position)})


def test_a_cohort_in_reverse_is_not_held_in_memory(tmp_path) -> None:
    """The slowest is the first: of nine that wait for it, two are in memory. Two of ten do not
    deliver. What comes out is what was sent, to the bit, and nothing is left on disk."""
    seen, most = [], []

    def arrivals():
        for position in reversed(range(10)):
            update = None if position in (3, 7) else sent(position)
            if update is not None:
                seen.append(weakref.ref(update))
            yield position, update
            del update
            most.append(sum(each() is not None for each in seen))

    for position, update in enumerate(in_order(arrivals(), 10, tmp_path / "state")):
        if position in (3, 7):
            assert update is None
            continue
        expected = sent(position)
        assert (update.client, update.num_samples) == (expected.client, position + 1)
        assert update.metrics == expected.metrics
        pairs = [(update.delta, expected.delta)]
        pairs += [(update.extra[slot], expected.extra[slot]) for slot in expected.extra]
        assert update.extra.keys() == expected.extra.keys()
        for ours, theirs in pairs:
            assert list(ours) == list(theirs)
            for name, value in theirs.items():
                assert (ours[name].dtype, ours[name].shape) == (value.dtype, value.shape)
                assert torch.equal(ours[name], value)
        del update, expected, pairs, ours, theirs
        assert list((tmp_path / "state").iterdir()) == []
    assert len(most) == 10
    assert max(most) == HELD
    assert most[1] == 2  # they do wait in memory


def test_what_need_not_wait_is_not_written_down(monkeypatch) -> None:
    """Two overtakers in memory, and the one that they waited for."""
    monkeypatch.setattr("fedmllm.federation.Scratch.write", None)
    found = list(in_order(((k, sent(k)) for k in (1, 2, 0, 3)), 4))
    assert [update.client for update in found] == CLIENTS[:4]


def test_overtaking_changes_no_bit(tmp_path) -> None:
    """As many updates as make two groups of a sum, in three orders of arrival."""
    names = [f"client-{k:02d}" for k in range(20)]
    algorithm = make_algorithm("fedadam", num_clients=20)
    state = algorithm.init({"w": torch.rand(100, generator=torch.Generator().manual_seed(0))})
    runs = [
        run_round(Adders(order), algorithm, state, names, lr=1.0, scratch=tmp_path)
        for order in (None, range(19, -1, -1), [*range(1, 20), 0])
    ]
    for after, record in runs[1:]:
        assert torch.equal(after.params["w"], runs[0][0].params["w"])
        assert torch.equal(after.slots["v"]["w"], runs[0][0].slots["v"]["w"])
        assert record.loss == runs[0][1].loss


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "scaffold"])
def test_the_next_parameters_lie_where_the_mean_lay(name: str) -> None:
    """So a step takes no memory of its own, and what went in is not touched."""
    algorithm = make_algorithm(name, num_clients=2)
    state = algorithm.init({"w": torch.rand(100), "a": torch.rand(3, 2)})
    before = {name: value.clone() for name, value in state.params.items()}
    mean = algorithm.aggregation.begin(algorithm.weighting, None)
    for k in range(2):
        delta = {name: torch.rand(value.shape) for name, value in state.params.items()}
        extra = {"control": {n: -v for n, v in delta.items()}} if name == "scaffold" else {}
        mean.fold(Update(f"c{k}", 1, delta, extra))
    taken: list[dict[str, torch.Tensor]] = []

    class Watched:
        count, chosen = 2, ()

        def delta(self):
            taken.append(mean.delta())
            return taken[-1]

        def extra(self, slot):
            taken.append(mean.extra(slot))
            return taken[-1]

        fold = mean.fold

    after = algorithm.step(state, Watched())
    assert any(after.params is each for each in taken)
    assert all(any(slot is each for each in taken) for slot in after.slots.values())
    assert list(after.params) == ["a", "w"]
    for key, value in before.items():
        assert torch.equal(state.params[key], value)
        assert not torch.equal(after.params[key], value)


def test_cohorts_are_a_function_of_seed_and_round() -> None:
    rounds = [cohort_of(CLIENTS, 2, seed=0, round_=r) for r in range(1, 200)]
    assert rounds == [cohort_of(CLIENTS[::-1], 2, seed=0, round_=r) for r in range(1, 200)]
    assert all(len(set(c)) == 2 and c == sorted(c) for c in rounds)
    assert rounds != [cohort_of(CLIENTS, 2, seed=1, round_=r) for r in range(1, 200)]
    counts = {c: sum(c in r for r in rounds) for c in CLIENTS}
    assert min(counts.values()) > 20  # 39.8 expected each
    assert cohort_of(CLIENTS, 99, seed=0, round_=1) == CLIENTS


def test_payload_counts_bytes() -> None:
    assert payload({"a": torch.zeros(3)}, {"b": torch.zeros(2, dtype=torch.float16)}) == 16
