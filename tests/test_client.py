"""Local training: schedules, the proximal term, control variates, independence of order."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fedmllm.algorithms.base import Composition, LocalObjective, Proximal
from fedmllm.client import (
    Job,
    LocalPlan,
    LocalTraining,
    add_proximal_gradient,
    learning_rate,
    train_client,
)
from fedmllm.errors import UserError
from fedmllm.experiment import Deferred
from fedmllm.models.mllm import Mllm
from fedmllm.prompts import render

PLAN = LocalPlan(batch_size=4, micro_batch=4)
PLAIN = LocalObjective()


@pytest.fixture(scope="module")
def samples(mllm: Mllm, memes):
    """Ten encoded samples, a third of them without an image."""
    return [
        mllm.encode(render(s.masked(keep_image=i % 3 != 0, keep_text=True), memes.task))
        for i, s in enumerate(memes.train[:10])
    ]


def train(mllm: Mllm, samples, **change):
    defaults = {
        "client": "client-00",
        "round_": 1,
        "seed": 0,
        "lr": 1e-3,
        "plan": PLAN,
        "objective": PLAIN,
    }
    params = change.pop("params", None) or mllm.init_adapter(0)
    return train_client(mllm, params, samples, **{**defaults, **change})


def same(a, b) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_schedule_by_hand() -> None:
    """25 rounds, 1 %: no warm-up. Round 1: the peak; round 13: cos(pi * 12/25)."""
    assert learning_rate(1, rounds=25, peak=2.0) == 2.0
    assert learning_rate(13, rounds=25, peak=2.0) == pytest.approx(1.0627905)
    assert learning_rate(25, rounds=25, peak=2.0) == pytest.approx(0.0078853)
    # 4 of 8 rounds warm up: 1/4, 2/4, 3/4, 4/4, then cosine from the peak
    values = [learning_rate(r, rounds=8, peak=1.0, warmup=0.5) for r in range(1, 9)]
    assert values == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.8535534, 0.5, 0.1464466])


def test_training_changes_the_adapter_and_lowers_the_loss(mllm: Mllm, samples) -> None:
    update, memory = train(mllm, samples, plan=LocalPlan(epochs=6, batch_size=4, micro_batch=4))
    assert update.num_samples == 10
    assert memory is None
    assert any(value.abs().max() > 0 for value in update.delta.values())
    mllm.set_adapter(mllm.init_adapter(0))
    before = float(mllm.loss_sum(samples))
    start = mllm.get_adapter()
    mllm.set_adapter({name: start[name] + update.delta[name] for name in start})
    assert float(mllm.loss_sum(samples)) < before


def test_a_client_does_not_feel_who_trained_before(mllm: Mllm, samples) -> None:
    first, _ = train(mllm, samples)
    train(mllm, samples[:4], client="client-07", round_=3, lr=0.1)
    torch.manual_seed(99)
    again, _ = train(mllm, samples)
    assert same(first.delta, again.delta)


def test_rounds_clients_and_seeds_differ(mllm: Mllm, samples) -> None:
    base, _ = train(mllm, samples)
    for change in ({"round_": 2}, {"client": "client-01"}, {"seed": 1}):
        other, _ = train(mllm, samples, **change)
        assert not same(base.delta, other.delta)


def test_global_random_stream_is_left_untouched(mllm: Mllm, samples) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train(mllm, samples)
    assert torch.equal(torch.rand(3), expected)


def test_micro_batches_do_not_change_the_step(mllm: Mllm, samples) -> None:
    """Without dropout the gradient of a step is the same however it is cut."""
    dropouts = [m for m in mllm.model.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
    rates = [m.p for m in dropouts]
    for module in dropouts:
        module.p = 0.0
    try:
        plans = [LocalPlan(batch_size=4, micro_batch=m, optimizer="sgd") for m in (4, 3, 1)]
        deltas = [train(mllm, samples, plan=plan, lr=0.1)[0].delta for plan in plans]
    finally:
        for module, rate in zip(dropouts, rates, strict=True):
            module.p = rate
    for name in deltas[0]:
        torch.testing.assert_close(deltas[1][name], deltas[0][name], atol=2e-6, rtol=1e-3)
        torch.testing.assert_close(deltas[2][name], deltas[0][name], atol=2e-6, rtol=1e-3)


def test_mu_zero_is_fedavg_bit_for_bit(mllm: Mllm, samples) -> None:
    plain, _ = train(mllm, samples)
    zero, _ = train(mllm, samples, objective=LocalObjective(mu=0.0))
    strong, _ = train(mllm, samples, objective=LocalObjective(mu=10.0))
    assert same(plain.delta, zero.delta)
    norm = lambda delta: sum(float(v.square().sum()) for v in delta.values())  # noqa: E731
    assert norm(strong.delta) < norm(plain.delta)


def test_proximal_gradient_by_hand() -> None:
    """mu 0.5, weight 0.2, theta 3, anchor 1: 0.5 * 0.2 * (3 - 1) = 0.2 on layers 1..2 of 0..3."""
    names = [f"layer{i}" for i in range(4)]
    trainable = {n: torch.nn.Parameter(torch.tensor([3.0])) for n in names}
    for value in trainable.values():
        value.grad = torch.tensor([1.0])
    fake = SimpleNamespace(
        trainable=trainable, layer_of={n: i for i, n in enumerate(names)}, num_layers=4
    )
    anchor = {n: torch.tensor([1.0]) for n in names}
    add_proximal_gradient(fake, anchor, Proximal(mu=0.5, weight=0.2, edge_layers=1))
    grads = [float(trainable[n].grad) for n in names]
    assert grads == pytest.approx([1.0, 1.2, 1.2, 1.0])


def test_control_of_scaffold_is_option_two_under_sgd(mllm: Mllm, samples) -> None:
    """c_k_new = c_k - c + (theta - theta_k) / (K * lr), Karimireddy et al. 2020, Option II."""
    plan = LocalPlan(batch_size=4, micro_batch=4, optimizer="sgd", max_grad_norm=0.0)
    params = mllm.init_adapter(0)
    generator = torch.Generator().manual_seed(0)
    draw = lambda v: torch.randn(v.shape, generator=generator) * 0.01  # noqa: E731
    server = {n: draw(v) for n, v in params.items()}
    own = {n: draw(v) for n, v in params.items()}
    lr, steps = 0.05, 3  # 10 samples in batches of 4
    update, memory = train(
        mllm,
        samples,
        params=params,
        plan=plan,
        lr=lr,
        objective=LocalObjective(control=True),
        broadcast={"control": server},
        memory=own,
    )
    assert memory is not None
    for name in params:
        expected = own[name] - server[name] - update.delta[name] / (steps * lr)
        torch.testing.assert_close(memory[name], expected, atol=1e-4, rtol=1e-3)
        change = update.extra["control"][name]
        torch.testing.assert_close(change, memory[name] - own[name])


def test_divergence_names_the_client(mllm: Mllm, samples) -> None:
    params = {n: torch.full_like(v, 1e30) for n, v in mllm.init_adapter(0).items()}
    with pytest.raises(UserError, match=r"loss of client-00 in round 1 is .*lower training.lr"):
        train(mllm, samples, params=params)


def test_a_client_without_samples_is_refused(mllm: Mllm) -> None:
    with pytest.raises(UserError, match="client-00 has no samples"):
        train(mllm, [])


def test_samples_are_encoded_as_their_step_comes(memes, mllm: Mllm) -> None:
    """The first step waits for its own samples alone; a second epoch encodes nothing again."""
    asked = []

    def encode(sample):
        asked.append(sample.id)
        return mllm.encode(render(sample, memes.task))

    samples = Deferred(memes.train[:10], encode)
    assert len(samples) == 10
    assert asked == []
    plan = LocalPlan(batch_size=4, micro_batch=4, epochs=2)
    local = LocalTraining(
        mllm, {}, Job("c", samples), round_=1, seed=0, lr=0.1, plan=plan, objective=LocalObjective()
    )
    taken = []
    for count, batch in enumerate(local.batches(), start=1):
        taken += [item.id for item in batch]
        assert asked == taken[: min(4 * count, 10)]
    assert sorted(asked) == sorted(sample.id for sample in memes.train[:10])
    assert len(taken) == 20
    assert [item.id for item in samples[2:4]] == [sample.id for sample in memes.train[2:4]]
    assert samples[-1] is samples[9]
    with pytest.raises(IndexError):
        samples[10]


def test_composed_samples_are_all_encoded_before_the_first_step(memes, mllm: Mllm) -> None:
    """What stands in for a sample may be any of them."""
    asked = []

    def encode(sample):
        asked.append(sample.id)
        return mllm.encode(render(sample, memes.task))

    objective = LocalObjective(composition=Composition(resample=0.5))
    job = Job("c", Deferred(memes.train[:6], encode))
    local = LocalTraining(
        mllm, {}, job, round_=1, seed=0, lr=0.1, plan=LocalPlan(batch_size=2), objective=objective
    )
    next(local.batches())
    assert len(asked) == 6
