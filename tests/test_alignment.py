"""Alignment on the clients: terms by hand, identities, the same on both paths."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test_cohort import apart, both, check_same

from fedmllm.algorithms.base import Alignment, LocalObjective, Proximal
from fedmllm.alignment import Terms, check_alignment, class_of
from fedmllm.client import Job, LocalPlan, train_client
from fedmllm.errors import UserError
from fedmllm.experiment import masked_views
from fedmllm.models import model_path
from fedmllm.models.mllm import Mllm
from fedmllm.models.passes import Encoded, Reading
from fedmllm.prompts import render
from fedmllm.rng import uniform

A, B = (5, 1, 9), (5, 2, 9)
ADAMW = LocalPlan(epochs=2, batch_size=3, micro_batch=2)
PLAIN = LocalObjective(control=True, adaptive=Proximal(mu=0.4, edge_layers=1))
COMMON = {"plan": ADAMW, "lr": 1e-2}


def item(name: str, label: int, **change) -> Encoded:
    """Options (5, 1, 9) and (5, 2, 9) part at token 1."""
    return Encoded(name, (1, 2), (A, B)[label], None, (A, B), **change)


def reading(losses, hidden, logits=None) -> Reading:
    """hidden: of each sample at its token 1; the other tokens have other states."""
    rows = [torch.tensor([[9.0, 9.0], h, [7.0, -7.0]]) for h in hidden]
    made = [torch.zeros(3, 2)] * len(rows) if logits is None else [torch.tensor(x) for x in logits]
    return Reading(torch.tensor(losses), tuple(made), tuple(rows))


def terms(given: Alignment, *, prototypes=None, last_epoch: int = 0) -> Terms:
    broadcast = {"prototypes": prototypes} if prototypes else {}
    return Terms(given, broadcast, "c", 1, 0, last_epoch)


def prototypes(mean, seen):
    return {"mean": torch.tensor(mean), "seen": torch.tensor(seen)}


def test_the_deciding_token_is_where_options_part() -> None:
    assert item("a", 1).deciding == 1
    assert replace(item("a", 1), options=()).deciding == 0
    assert class_of(item("a", 1)) == 1


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        # h = (3, 4) to P = (0, 2): cos 0.8; squares 9 and 4
        ("cosine", 0.2),
        ("squared", 6.5),
        # cos 0.8 to its own, 0.6 to the other, temperature 0.5
        ("contrastive", math.log(1 + math.exp((0.6 - 0.8) / 0.5))),
    ],
)
def test_distance_to_the_prototype_by_hand(form, expected) -> None:
    given = Alignment(prototypes=2.0, prototype_loss=form, temperature=0.5)
    found = terms(given, prototypes=prototypes([[0.0, 2.0], [1.0, 0.0]], [1.0, 1.0]))
    total = found.loss([item("a", 0)], reading([0.25], [[3.0, 4.0]]))
    assert float(total) == pytest.approx(0.25 + 2 * expected)
    assert found.finish()[1]["prototype_loss"] == pytest.approx(expected)


def test_a_class_without_a_prototype_pulls_nobody() -> None:
    """Nor does it stand among the others of the contrastive form: one known class alone gives 0."""
    for form in ("cosine", "contrastive"):
        given = Alignment(prototypes=1.0, prototype_loss=form)
        found = terms(given, prototypes=prototypes([[0.0, 2.0], [0.0, 0.0]], [1.0, 0.0]))
        batch = [item("a", 0), item("b", 1)]
        total = found.loss(batch, reading([0.0, 0.0], [[0.0, 1.0], [3.0, 4.0]]))
        assert float(total) == pytest.approx(0.0, abs=1e-6)
        extra, _ = found.finish()
        assert extra["prototypes"]["count"].tolist() == [1, 1]
        assert extra["prototypes"]["sum"].tolist() == [[0.0, 1.0], [3.0, 4.0]]


def test_sums_are_of_the_last_epoch_alone() -> None:
    found = terms(Alignment(prototypes=1.0), prototypes=prototypes([[0.0, 0.0]] * 2, [0.0, 0.0]),
                  last_epoch=1)  # fmt: skip
    for epoch, h in ((0, [1.0, 1.0]), (1, [2.0, 5.0])):
        found.epoch = epoch
        found.loss([item("a", 1), item("b", 1)], reading([0.0, 0.0], [h, [0.0, 1.0]]))
    extra, _ = found.finish()
    assert extra["prototypes"]["count"].tolist() == [0, 2]
    assert extra["prototypes"]["sum"].tolist() == [[0, 0], [2.0, 6.0]]


def test_the_loss_of_incomplete_samples_is_weighted() -> None:
    batch = [item("a", 0), item("b", 1, complete=False)]
    found = reading([1.0, 3.0], [[0.0, 1.0]] * 2)
    assert float(terms(Alignment(incomplete=0.5)).loss(batch, found)) == 1 + 0.5 * 3
    assert float(terms(Alignment()).loss(batch, found)) == 4


def test_distillation_by_hand() -> None:
    """KL between (1/2, 1/2) and (1/4, 3/4) at one token of three: (ln 2 - ln 3 / 2) / 3. The whole
    sample's side is a constant, the view's is not."""
    view = item("a", 0)
    batch = [item("a", 0, views=(view,)), item("b", 1)]
    whole = reading([1.0, 1.0], [[1.0, 0.0]] * 2)
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3)], [2.0, 2.0]], requires_grad=True)
    seen = Reading(torch.tensor([0.7]), (logits,), reading([0.7], [[1.0, 1.0]]).hidden)
    expected = (math.log(2) - math.log(3) / 2) / 3
    for given, value in (
        (Alignment(distillation=2.0), 2 * expected),
        (Alignment(views=3.0), 3 * 0.7),
        (Alignment(distillation=1.0, views=1.0), expected + 0.7),
        (Alignment(distillation=1.0, distillation_target="hidden"), 1 - 2**-0.5),
    ):
        found = terms(given)
        found.loss(batch, whole)
        assert found.views(batch) == [view]
        total = found.view_loss([view], seen)
        assert float(total) == pytest.approx(value, rel=1e-5)
        assert found.finish()[1]["view_cosine"] == pytest.approx(2**-0.5)
    found = terms(Alignment(distillation=1.0))
    found.loss(
        batch, replace(whole, logits=tuple(x.clone().requires_grad_() for x in whole.logits))
    )
    found.view_loss([view], seen).backward()
    # gradient of KL: (q - p) / 3 = (1/4 - 1/2, 3/4 - 1/2) / 3
    assert logits.grad[1].tolist() == pytest.approx([-1 / 12, 1 / 12])


def test_a_view_is_drawn_by_client_round_epoch_and_sample() -> None:
    views = (item("x", 0), item("y", 0))
    batch = [replace(item(str(i), 0), views=views) for i in range(40)]
    drawn = {}
    for client, round_, epoch in (("c", 1, 0), ("c", 1, 1), ("c", 2, 0), ("d", 1, 0)):
        found = Terms(Alignment(views=1.0), {}, client, round_, 0, 1, epoch)
        names = [view.id for view in found.views(batch)]
        assert 8 < names.count("x") < 32
        expected = [uniform(0, "view", client, round_, epoch, i) for i in range(40)]
        assert names == ["x" if u < 0.5 else "y" for u in expected]
        drawn[client, round_, epoch] = names
    assert len({tuple(names) for names in drawn.values()}) == 4
    assert Terms(Alignment(), {}, "c", 1, 0, 1).views(batch) == []


def test_masked_views_of_samples(memes) -> None:
    whole = memes.train[0]
    views = masked_views(whole)
    assert [(v.image is None, v.text is None) for v in views] == [(True, False), (False, True)]
    assert masked_views(views[0]) == masked_views(views[1]) == []
    asked = replace(whole, text=None, question="What is it?")
    assert [(v.image is None, v.question) for v in masked_views(asked)] == [(True, "What is it?")]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prototype_loss": "euclid"}, "unknown prototype loss 'euclid'"),
        ({"distillation_target": "logit"}, "did you mean 'logits'"),
        ({"views": -1.0}, "views is -1.0: give a number from 0 up"),
        ({"temperature": 0.0}, "temperature is 0.0: give a number above 0"),
    ],
)
def test_bad_values_are_refused(change, words) -> None:
    check_alignment(Alignment())
    with pytest.raises(UserError, match=words):
        check_alignment(Alignment(**change))


# -- with a model --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def precise() -> Mllm:
    mllm = Mllm.load("embedded", model_path("embedded"), rank=4, dropout=0.3)
    mllm.model.double()
    return mllm


def jobs_of(mllm: Mllm, memes, *, counts=(1, 1, 4)) -> list[Job]:
    """Clients of whole samples, of texts and of a mixture; whole ones have two views."""
    jobs = []
    for k, count in enumerate(counts):
        held = []
        for i, sample in enumerate(memes.train[10 * k : 10 * k + count]):
            own = sample.masked(
                keep_image=k != 1 and (k, i) not in ((2, 1), (2, 2)), keep_text=True
            )
            views = [mllm.encode(render(view, memes.task)) for view in masked_views(own)]
            encoded = mllm.encode(render(own, memes.task))
            held.append(replace(encoded, complete=bool(views), views=tuple(views)))
        jobs.append(Job(f"client-{k:02d}", held, weight=0.5 * k))
    return jobs


def test_hidden_states_are_those_that_make_the_logits(mllm: Mllm, memes) -> None:
    batch = [mllm.encode(render(s, memes.task)) for s in memes.train[:3]]
    mllm.set_adapter(mllm.init_adapter(0))
    with torch.no_grad():
        found = mllm.read(batch)
        head = mllm.base.get_output_embeddings()
        for logits, hidden, sample in zip(found.logits, found.hidden, batch, strict=True):
            assert hidden.shape == (len(sample.answer), mllm.width)
            torch.testing.assert_close(head(hidden), logits)
        states = mllm.represent(batch)
        for hidden, sample, state in zip(found.hidden, batch, states, strict=True):
            torch.testing.assert_close(hidden[sample.deciding], state, atol=1e-5, rtol=1e-4)


ALIGNMENTS = {
    "prototypes": Alignment(prototypes=0.7, prototype_loss="contrastive"),
    "distillation": Alignment(distillation=0.8, distillation_target="hidden"),
    "views": Alignment(views=0.5, incomplete=0.3),
    "all": Alignment(prototypes=0.7, distillation=0.8, views=0.5, incomplete=0.3),
}


@pytest.fixture(scope="module")
def without(precise: Mllm, memes):
    """What the last client's update is without alignment."""
    return both(precise, jobs_of(precise, memes)[2:], **COMMON, objective=PLAIN)[0][0][0].delta


@pytest.mark.parametrize("name", sorted(ALIGNMENTS))
def test_both_paths_are_equal(name, precise: Mllm, memes, without) -> None:
    """With a band and SCAFFOLD's control at the same time; the objective is felt."""
    draw = torch.Generator().manual_seed(4)
    sent = {"mean": torch.randn(2, precise.width, generator=draw), "seen": torch.ones(2)}
    objective = replace(PLAIN, alignment=ALIGNMENTS[name])
    alone, together = both(
        precise,
        jobs_of(precise, memes),
        **COMMON,
        objective=objective,
        broadcast={"prototypes": sent},
    )
    check_same(alone, together, 1e-6)
    for (one, _), (other, _) in zip(alone, together, strict=True):
        assert one.metrics == pytest.approx(other.metrics, rel=1e-5)
    assert apart(without, together[2][0].delta) > 1e-3
    assert ("prototypes" in alone[0][0].extra) == bool(objective.alignment.prototypes)


def train(mllm: Mllm, job: Job, objective: LocalObjective, broadcast=None, **change):
    defaults = {"round_": 1, "seed": 0, "lr": 1e-3, "plan": ADAMW, "weight": job.weight}
    return train_client(
        mllm, mllm.init_adapter(0), job.samples, client=job.client, objective=objective,
        broadcast=broadcast, **{**defaults, **change},
    )[0]  # fmt: skip


def same(a, b) -> bool:
    return all(torch.equal(a.delta[name], b.delta[name]) for name in a.delta)


def test_all_off_is_plain_training_bit_for_bit(mllm: Mllm, memes) -> None:
    """Though the samples carry views and the client a weight."""
    job = jobs_of(mllm, memes)[0]
    bare = replace(job, samples=[replace(s, views=(), complete=True) for s in job.samples])
    plain = train(mllm, bare, LocalObjective())
    off = LocalObjective(adaptive=Proximal(mu=0.0, edge_layers=1), alignment=Alignment())
    found = train(mllm, job, off)
    assert same(plain, found)
    assert plain.metrics == found.metrics
    assert not found.extra


def test_fedprox_is_the_special_case_bit_for_bit(mllm: Mllm, memes) -> None:
    job = replace(jobs_of(mllm, memes)[2], weight=1.0)
    fedprox = train(mllm, job, LocalObjective(mu=0.5))
    assert same(fedprox, train(mllm, job, LocalObjective(adaptive=Proximal(mu=0.5))))
    band = LocalObjective(adaptive=Proximal(mu=0.5, edge_layers=1))
    assert not same(fedprox, train(mllm, job, band))
    both_terms = train(mllm, job, LocalObjective(mu=0.25, adaptive=Proximal(mu=0.25)))
    assert apart(fedprox.delta, both_terms.delta) < 1e-5  # two halves
    half = train(mllm, replace(job, weight=0.5), LocalObjective(adaptive=Proximal(mu=1.0)))
    assert same(fedprox, half)


def test_a_weight_of_nothing_is_plain_training(mllm: Mllm, memes) -> None:
    job = replace(jobs_of(mllm, memes)[2], weight=0.0)
    held = train(mllm, job, LocalObjective(adaptive=Proximal(mu=5.0)))
    assert same(held, train(mllm, job, LocalObjective()))


def test_prototypes_that_the_server_did_not_send(mllm: Mllm, memes) -> None:
    job = jobs_of(mllm, memes)[0]
    with pytest.raises(ValueError, match="the server sent none"):
        train(mllm, job, LocalObjective(alignment=Alignment(prototypes=1.0)))


def test_micro_batches_do_not_change_the_terms(precise: Mllm, memes) -> None:
    rates = [(m, m.p) for m in precise.model.modules() if isinstance(m, torch.nn.Dropout)]
    for module, _ in rates:
        module.p = 0.0
    sent = {"mean": torch.ones(2, precise.width), "seen": torch.ones(2)}
    objective = LocalObjective(alignment=ALIGNMENTS["all"])
    job = jobs_of(precise, memes, counts=(0, 0, 3))[2]
    try:
        found = [
            train(precise, job, objective, {"prototypes": sent},
                  plan=LocalPlan(batch_size=4, micro_batch=m, optimizer="sgd"), lr=0.1)
            for m in (4, 1)
        ]  # fmt: skip
    finally:
        for module, rate in rates:
            module.p = rate
    assert apart(found[0].delta, found[1].delta) < 1e-5
    assert found[0].metrics == pytest.approx(found[1].metrics, rel=1e-4)
