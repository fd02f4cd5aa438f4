"""Many clients in one pass: each is as it would be alone, by `train_client`, the plain path.

Sums differ in their rounding only. AdamW's first step is g / (|g| + eps): where a gradient is next
to zero, rounding decides its size. So AdamW is compared in float64, where only rounding shrinks,
and SGD in float32.
"""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from tiny_models import TINY, make_model

from fedmllm.algorithms import make_algorithm
from fedmllm.algorithms.base import LocalObjective, Proximal
from fedmllm.client import Job, LocalPlan, train_client
from fedmllm.cohort import train_cohort
from fedmllm.config import config_hash, make_config
from fedmllm.data.images import MemoryImage
from fedmllm.data.sample import Sample, Task
from fedmllm.errors import MemoryRanOutError, UserError
from fedmllm.experiment import run
from fedmllm.federation import InProcessRunner
from fedmllm.models import cohort as shared
from fedmllm.models import model_path
from fedmllm.models.cohort import Cohort, obstacle
from fedmllm.models.components import Policy
from fedmllm.models.device import out_of_memory
from fedmllm.models.mllm import Mllm
from fedmllm.plan import make_plan
from fedmllm.progress import ManyProgress, RunProgress
from fedmllm.prompts import render

WIDE = MemoryImage("p", lambda: Image.radial_gradient("L").resize((48, 32)).convert("RGB"))
TALL = MemoryImage("q", lambda: Image.linear_gradient("L").resize((32, 64)).convert("RGB"))
OPEN = Task("vqa", "open", "accuracy")
WORDS = ["what", "is", "it", "then?", "can", "nobody", "here", "tell"]
SGD = LocalPlan(batch_size=3, micro_batch=2, optimizer="sgd")
ADAMW = LocalPlan(epochs=2, batch_size=3, micro_batch=2)
OBJECTIVES = {
    "fedavg": LocalObjective(),
    "fedprox": LocalObjective(mu=0.5),
    "band": LocalObjective(adaptive=Proximal(mu=0.5, weight=0.3, edge_layers=1)),
    "scaffold": LocalObjective(control=True),
}


def jobs_of(mllm: Mllm, *, counts=(2, 5, 4)) -> list[Job]:
    """A client of texts, one of images, one of both: unequal in number and length."""
    pictures = [(None,), (WIDE, TALL), (TALL, None)]
    return [
        Job(f"client-{k:02d}", [encoded(mllm, k, i, pictures[k % 3]) for i in range(count)])
        for k, count in enumerate(counts)
    ]


def encoded(mllm: Mllm, k: int, i: int, pictures):
    question = " ".join(WORDS[: 2 + (3 * i + k) % 6])
    answer = ("red", "a tree", "seven")[i % 3]
    image = pictures[i % len(pictures)]
    return mllm.encode(render(Sample(f"s{k}-{i}", answer, question, None, image), OPEN))


def start_of(mllm: Mllm) -> dict[str, torch.Tensor]:
    """An adapter that is felt: B is not zero."""
    draw = torch.Generator().manual_seed(1)
    fresh = mllm.init_adapter(0)
    return {
        n: value + 0.02 * torch.randn(value.shape, generator=draw) for n, value in fresh.items()
    }


def both(mllm: Mllm, jobs, *, plan=SGD, objective=OBJECTIVES["fedavg"], lr=0.05, **change):
    """Results of the plain path and of the shared pass."""
    common: dict[str, Any] = {
        "round_": 2, "seed": 3, "lr": lr, "plan": plan, "objective": objective, **change,
    }  # fmt: skip
    params = start_of(mllm)
    alone = [
        train_client(
            mllm,
            params,
            job.samples,
            client=job.client,
            memory=job.memory,
            weight=job.weight,
            **common,
        )
        for job in jobs
    ]
    return alone, train_cohort(mllm, params, jobs, **common)


def apart(one, other) -> float:
    """||one - other|| / ||one||, over all tensors."""
    assert one.keys() == other.keys()
    norm = torch.cat([value.flatten() for value in one.values()]).norm()
    assert norm > 0
    return float(torch.cat([(one[n] - other[n]).flatten() for n in one]).norm() / norm)


def check_same(alone, together, tolerance: float) -> None:
    for (one, one_memory), (other, other_memory) in zip(alone, together, strict=True):
        assert (one.client, one.num_samples) == (other.client, other.num_samples)
        assert other.metrics["loss"] == pytest.approx(one.metrics["loss"], rel=1e-5)
        assert apart(one.delta, other.delta) <= tolerance
        assert one.extra.keys() == other.extra.keys()
        for slot in one.extra:
            assert apart(one.extra[slot], other.extra[slot]) <= tolerance
        assert (one_memory is None) == (other_memory is None)
        if one_memory is not None:
            assert apart(one_memory, other_memory) <= tolerance


def load(name: str, folder: Path, **options) -> Mllm:
    return Mllm.load(name, make_model(name, folder), rank=2, dropout=0.3, **options)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Mllm:
    return load("idefics3", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def precise(tmp_path_factory) -> Mllm:
    """In float64, four layers deep, so that a band of layers leaves some out."""
    mllm = Mllm.load("embedded", model_path("embedded"), rank=4, dropout=0.3)
    mllm.model.double()
    return mllm


@pytest.mark.parametrize("name", sorted(TINY))
def test_every_family_trains_together_as_alone(name, tmp_path) -> None:
    mllm = load(name, tmp_path / "m")
    assert obstacle(mllm) is None
    check_same(*both(mllm, jobs_of(mllm)), 1e-5)


@pytest.mark.parametrize("name", sorted(TINY))
def test_four_bit_weights_serve_all_clients(name, tmp_path) -> None:
    mllm = load(name, tmp_path / "m", quantization="nf4")
    check_same(*both(mllm, jobs_of(mllm)), 1e-5)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_algorithms_under_adamw_in_float64(name, precise: Mllm) -> None:
    """Several epochs, clipping, weight decay, dropout, controls of each client's own."""
    jobs = jobs_of(precise, counts=(1, 7, 4))
    draw = torch.Generator().manual_seed(2)
    noise = lambda: {  # noqa: E731
        n: 0.05 * torch.randn(v.shape, generator=draw) for n, v in precise.trainable.items()
    }
    broadcast = {"control": noise()}
    jobs = [Job(job.client, job.samples, noise()) for job in jobs]
    objective = OBJECTIVES[name]
    alone, together = both(
        precise, jobs, plan=ADAMW, objective=objective, lr=1e-2, broadcast=broadcast
    )
    check_same(alone, together, 1e-6)
    plain, _ = both(precise, jobs[1:2], plan=ADAMW, lr=1e-2)
    if name != "fedavg":  # the objective was felt
        assert apart(plain[0][0].delta, together[1][0].delta) > 1e-3


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_algorithms_under_sgd_in_float32(name, mllm: Mllm) -> None:
    """What clients add to their loss, in the precision of a run, within 1e-5 of the update."""
    jobs = jobs_of(mllm, counts=(1, 5, 2))
    draw = torch.Generator().manual_seed(2)
    noise = lambda: {  # noqa: E731
        n: 0.05 * torch.randn(v.shape, generator=draw) for n, v in mllm.trainable.items()
    }
    broadcast = {"control": noise()}
    jobs = [
        Job(job.client, job.samples, noise(), weight)
        for job, weight in zip(jobs, (1, 2, 3), strict=True)
    ]
    alone, together = both(mllm, jobs, objective=OBJECTIVES[name], lr=0.5, broadcast=broadcast)
    check_same(alone, together, 1e-5)
    if name != "fedavg":  # the objective was felt
        plain, _ = both(mllm, jobs[1:2], lr=0.5)
        assert apart(plain[0][0].delta, together[1][0].delta) > 1e-3


def test_adamw_in_float32_differs_by_rounding(mllm: Mllm, memes) -> None:
    samples = [mllm.encode(render(s, memes.task)) for s in memes.train[:20]]
    jobs = [Job("client-00", samples[:4]), Job("client-01", samples[4:])]
    alone, together = both(mllm, jobs, plan=LocalPlan(batch_size=8, micro_batch=4), lr=1e-3)
    check_same(alone, together, 1e-4)


def test_masks_are_those_of_a_client_alone(tiny: Mllm) -> None:
    """Two clients of other widths, two layers; a layer that runs again draws the same."""
    cohort = Cohort(tiny, [tiny.trainable, tiny.trainable], [5, 6])
    layers = [torch.nn.Identity(), torch.nn.Identity()]
    rows = torch.rand(5, 9, 33, generator=torch.Generator().manual_seed(0)) + 1
    with torch.random.fork_rng():
        expected = []
        for seed, part in ((5, rows[:2]), (6, rows[2:, :7])):
            torch.manual_seed(seed)
            part = part.clone()
            expected.append([torch.nn.functional.dropout(part, 0.3) for _ in range(4)])
        cohort.shares = [shared._Share(0, 0, 2, 9), shared._Share(1, 2, 5, 7)]
        found = [cohort.dropped(layer, rows, 0.3) for layer in layers]
        again = [cohort.dropped(layer, rows, 0.3) for layer in reversed(layers)]
        cohort._drawn = {}  # the next pass
        found += [cohort.dropped(layer, rows, 0.3) for layer in layers]
    for i, values in enumerate(found):
        assert torch.equal(values[:2], expected[0][i])
        assert torch.equal(values[2:, :7], expected[1][i])
        assert not values[2:, 7:].any()
    assert torch.equal(again[1], found[0])
    assert torch.equal(again[0], found[1])
    assert not torch.equal(found[0], found[1])


def test_two_runs_have_the_same_bits_and_leave_nothing_behind(tiny: Mllm) -> None:
    jobs, params = jobs_of(tiny), start_of(tiny)
    common: dict[str, Any] = {
        "round_": 1, "seed": 0, "lr": 0.01, "plan": ADAMW, "objective": LocalObjective(),
    }  # fmt: skip
    torch.manual_seed(7)
    before = train_client(tiny, params, jobs[1].samples, client="c", **common)[0]
    modules = dict(tiny.model.named_modules())
    first = train_cohort(tiny, params, jobs, **common)
    tiny.set_adapter(tiny.init_adapter(9))
    second = train_cohort(tiny, params, jobs, **common)
    for (one, _), (other, _) in zip(first, second, strict=True):
        assert all(torch.equal(one.delta[n], other.delta[n]) for n in params)
        assert one.metrics == other.metrics
    assert dict(tiny.model.named_modules()) == modules
    assert not tiny.model.training
    assert all(value.grad is None for value in tiny.trainable.values())
    after = train_client(tiny, params, jobs[1].samples, client="c", **common)[0]
    assert all(torch.equal(before.delta[n], after.delta[n]) for n in params)
    found = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(found, torch.rand(3))


def test_gradient_checkpointing_draws_the_same_masks(tmp_path) -> None:
    plain = load("qwen2_vl", tmp_path / "m")
    frugal = Mllm.load(
        "x", tmp_path / "m", rank=2, dropout=0.3, gradient_checkpointing=True
    )  # fmt: skip
    _, expected = both(plain, jobs_of(plain))
    _, found = both(frugal, jobs_of(frugal))
    check_same(expected, found, 1e-6)


def test_divergence_names_the_client_and_its_samples(tiny: Mllm) -> None:
    """client-01's control throws it far away in its first step; the others are well."""
    jobs = jobs_of(tiny)
    far = {name: torch.full_like(value, 1e30) for name, value in tiny.init_adapter(0).items()}
    jobs[1] = Job(jobs[1].client, jobs[1].samples, far)
    with pytest.raises(UserError, match=r"loss of client-01 in round 1 is .* samples s1-"):
        train_cohort(
            tiny, start_of(tiny), jobs, round_=1, seed=0, lr=0.1, plan=SGD,
            objective=LocalObjective(control=True),
        )  # fmt: skip
    assert not tiny.model.training


def test_a_client_without_samples_is_refused(tiny: Mllm) -> None:
    jobs = [*jobs_of(tiny)[:1], Job("client-09", [])]
    with pytest.raises(UserError, match="client-09 has no samples"):
        train_cohort(
            tiny, start_of(tiny), jobs, round_=1, seed=0, lr=0.1, plan=SGD,
            objective=LocalObjective(),
        )  # fmt: skip


def test_the_head_runs_only_at_tokens_of_answers(tiny: Mllm) -> None:
    items = [item for job in jobs_of(tiny) for item in job.samples]
    assert len({len(item.prompt) for item in items}) > 3
    seen = []
    hook = tiny.base.get_output_embeddings().register_forward_hook(
        lambda _, given, out: seen.append(out.shape[:-1])
    )
    try:
        whole = tiny.loss_sum(items)
    finally:
        hook.remove()
    assert seen == [(1, sum(len(item.answer) for item in items))]
    alone = torch.stack([tiny.loss_sum([item]) for item in items])
    torch.testing.assert_close(tiny.losses(items), alone)
    torch.testing.assert_close(whole, alone.sum())


# -- the runner ------------------------------------------------------------------------------


def updates_of(mllm: Mllm, at_once: int, *, algorithm: str = "scaffold"):
    """A round of five clients."""
    jobs = {job.client: job.samples for job in jobs_of(mllm, counts=(2, 5, 4, 3, 1))}
    made = make_algorithm(algorithm, num_clients=5)
    runner = InProcessRunner(mllm, jobs.__getitem__, SGD, 0, clients_at_once=at_once)
    found = list(runner.train(1, sorted(jobs), made, made.init(start_of(mllm)), lr=0.05))
    assert [position for position, _ in found] == list(range(5))
    assert [update.client for _, update in found] == sorted(jobs)
    return [update for _, update in found], runner.memory


def test_groups_of_a_cohort(tiny: Mllm, monkeypatch) -> None:
    """Two at once of five: 2, 2 and one, which takes the plain path to the last bit."""
    plain, plain_memory = updates_of(tiny, 1)
    groups = []

    def counted(mllm, params, jobs, **common):
        groups.append(len(jobs))
        return train_cohort(mllm, params, jobs, **common)

    monkeypatch.setattr("fedmllm.federation.train_cohort", counted)
    pairs, memory = updates_of(tiny, 2)
    assert groups == [2, 2]
    for one, other in zip(plain, pairs, strict=True):
        assert apart(one.delta, other.delta) <= 1e-5
        assert apart(plain_memory[one.client], memory[one.client]) <= 1e-5
    assert all(torch.equal(plain[4].delta[n], pairs[4].delta[n]) for n in plain[4].delta)
    updates_of(tiny, 9)
    assert groups == [2, 2, 5]


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        (Policy(connector="full"), "trains connector"),
        (Policy(embeddings="full"), "trains embeddings"),
        (Policy(vision="lora"), "trains vision_lora"),
    ],
)
def test_other_policies_take_the_plain_path(policy, why, tmp_path) -> None:
    mllm = load("idefics3", tmp_path / "m", policy=policy)
    assert why in (obstacle(mllm) or "")
    with pytest.raises(ValueError, match=why):
        Cohort(mllm, [mllm.trainable], [0])
    plain, _ = updates_of(mllm, 1, algorithm="fedavg")
    same, _ = updates_of(mllm, 3, algorithm="fedavg")
    for one, other in zip(plain, same, strict=True):
        assert all(torch.equal(one.delta[n], other.delta[n]) for n in one.delta)


def test_dropout_of_the_language_model_is_an_obstacle(tmp_path) -> None:
    mllm = load("qwen2_vl", tmp_path / "m")
    mllm.base.config.get_text_config().attention_dropout = 0.1
    assert "dropout of its own" in (obstacle(mllm) or "")
    mllm.base.config.get_text_config().attention_dropout = 0.0
    assert obstacle(mllm) is None
    mllm.base.model.language_model.layers[0].mlp.extra = torch.nn.Dropout(0.1)
    assert "dropout of its own" in (obstacle(mllm) or "")


# -- memory that runs out ---------------------------------------------------------------------

COUNTS = (6, 5, 6, 4, 1)


class Scarce:
    """Memory for `most` rows in a pass. The first `spared` passes of more go well; the others fail
    at their end, after they have drawn dropout."""

    def __init__(self, monkeypatch, most: int, spared: int = 0) -> None:
        self.most, self.spared, self.refused = most, spared, 0
        plain = Mllm.read

        def read(mllm: Mllm, batch):
            found = plain(mllm, batch)
            if len(batch) > self.most:
                self.spared -= 1
                if self.spared < 0:
                    self.refused += 1
                    raise torch.OutOfMemoryError(
                        "CUDA out of memory. Tried to allocate 2 GiB\nmore"
                    )
            return found

        monkeypatch.setattr(Mllm, "read", read)


def scarce_round(mllm: Mllm, at_once: int, rounds: int = 1):
    """Updates of the last of some rounds of SCAFFOLD, all from the same state; the runner."""
    jobs = {job.client: job.samples for job in jobs_of(mllm, counts=COUNTS)}
    made = make_algorithm("scaffold", num_clients=5)
    told: list[tuple[int, int]] = []
    runner = InProcessRunner(
        mllm, jobs.__getitem__, SGD, 0, clients_at_once=at_once, halved=lambda *s: told.append(s)
    )
    for round_ in range(1, rounds + 1):
        found = list(runner.train(round_, sorted(jobs), made, made.init(start_of(mllm)), lr=0.05))
        assert [position for position, _ in found] == list(range(5))
    return [update for _, update in found], runner, told


def same_bits(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_a_group_that_does_not_fit_is_halved_and_nothing_of_it_is_kept(
    tiny: Mllm, monkeypatch
) -> None:
    """It fails in its second step, when every client's adapter has moved and dropout was drawn:
    the round is to the last bit that of pairs, and so is the next, which begins with pairs."""
    modules = dict(tiny.model.named_modules())
    for rounds in (1, 2):
        with monkeypatch.context() as patched:
            expected, pairs, _ = scarce_round(tiny, 2, rounds)
            torch.manual_seed(7)
            scarce = Scarce(patched, most=4, spared=1)
            found, runner, told = scarce_round(tiny, 4, rounds)
        assert (scarce.refused, told) == (1, [(4, 2)])
        assert (runner.groups, runner.clients_at_once) == ([2, 2, 1], 2) == (pairs.groups, 2)
        for one, other in zip(expected, found, strict=True):
            assert same_bits(one.delta, other.delta)
            assert one.metrics == other.metrics
            assert same_bits(pairs.memory[one.client], runner.memory[one.client])
    assert dict(tiny.model.named_modules()) == modules
    assert not tiny.model.training
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3))


def test_groups_are_halved_down_to_one_which_takes_the_plain_path(tiny: Mllm, monkeypatch) -> None:
    plain, alone, _ = scarce_round(tiny, 1)
    scarce = Scarce(monkeypatch, most=2)
    found, runner, told = scarce_round(tiny, 5)
    assert (scarce.refused, told) == (2, [(5, 2), (2, 1)])
    assert (runner.groups, runner.clients_at_once) == ([1] * 5, 1) == (alone.groups, 1)
    assert all(same_bits(a.delta, b.delta) for a, b in zip(plain, found, strict=True))


@pytest.mark.parametrize("at_once", [1, 3])
def test_one_client_for_which_memory_does_not_suffice_is_named(
    at_once, tiny: Mllm, monkeypatch
) -> None:
    Scarce(monkeypatch, most=0, spared=1)  # the first pass has left gradients
    words = r"memory ran out while client-00 trained alone in round 1 \(CUDA out of memory\. Tried"
    with pytest.raises(
        MemoryRanOutError, match=words + r" to allocate 2 GiB\): lower training"
    ) as e:
        scarce_round(tiny, at_once)
    assert isinstance(e.value, UserError)
    assert e.value.__context__ is None  # else the tensors of the pass would live as long as it
    assert all(value.grad is None for value in tiny.trainable.values())


def test_a_lack_of_memory_without_words_is_named_too(tiny: Mllm, monkeypatch) -> None:
    def read(mllm: Mllm, batch):
        raise MemoryError

    monkeypatch.setattr(Mllm, "read", read)
    with pytest.raises(
        MemoryRanOutError, match=r"client-00 trained alone in round 1 \(MemoryError\)"
    ):
        scarce_round(tiny, 2)


def test_other_errors_are_not_taken_for_a_lack_of_memory(tiny: Mllm, monkeypatch) -> None:
    asked = []

    def read(mllm: Mllm, batch):
        asked.append(len(batch))
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Mllm, "read", read)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        scarce_round(tiny, 4)
    assert len(asked) == 1


def test_what_torch_says_when_memory_runs_out_is_known() -> None:
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**50, dtype=torch.uint8)  # more than a process can address
    assert out_of_memory(real.value)
    for error in (
        torch.OutOfMemoryError("x"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ):
        assert out_of_memory(error)
    assert not out_of_memory(ValueError("not enough memory"))
    assert not out_of_memory(RuntimeError("expected scalar type Half"))


# -- a run -----------------------------------------------------------------------------------


RUN = {
    "name": "x",
    "data": {"name": "memes", "train": 40, "test": 10},
    "partition": {"clients": 4},
    "algorithm": "scaffold",
    "training": {"rounds": 2, "clients_per_round": 3, "clients_at_once": 3},
    "evaluation": {"every": 0, "conditions": ["both"]},
}


def losses(result) -> list[float]:
    return [line["loss"] for line in result["history"]]


def test_a_run_that_stops_goes_on_to_the_same_bits(tmp_path, mllm: Mllm) -> None:
    whole = run(make_config(RUN), out=tmp_path / "whole", mllm=mllm)

    class StopError(Exception):
        pass

    def stop(event) -> None:
        if event["event"] == "round":
            raise StopError

    with pytest.raises(StopError):
        run(make_config(RUN), out=tmp_path / "cut", listener=stop, mllm=mllm)
    resumed = run(make_config(RUN), out=tmp_path / "cut", resume=True, mllm=mllm)
    assert losses(whole) == losses(resumed)
    assert whole["metrics"] == resumed["metrics"]
    plain = run(make_config(RUN, ["training.clients_at_once=1"]), out=tmp_path / "plain", mllm=mllm)
    assert losses(whole) == pytest.approx(losses(plain), rel=1e-4)
    assert losses(whole) != losses(plain)  # it was another path
    assert [line["groups"] for line in whole["history"]] == [{"sizes": [3], "at_once": 3}] * 2
    assert "clients_at_once" not in whole  # as many as were asked for
    assert not any("groups" in line for line in plain["history"])


FOUR = {
    "rounds": 2,
    "clients_per_round": 4,
    "clients_at_once": 4,
    "batch_size": 4,
    "micro_batch": 2,
}


def test_a_run_tells_the_groups_that_fitted_and_goes_on_with_them(
    tmp_path, mllm: Mllm, monkeypatch
) -> None:
    data = {"name": "memes", "train": 16, "test": 4}
    even = {"name": "even", "clients": 4}
    config = make_config({**RUN, "data": data, "partition": even, "training": FOUR})
    scarce, shown = Scarce(monkeypatch, most=4), StringIO()
    progress = RunProgress(Console(file=shown, width=200))

    class StopError(Exception):
        pass

    def stop(event) -> None:
        if event["event"] == "round":
            raise StopError

    whole = run(config, out=tmp_path / "whole", mllm=mllm, listener=progress.listen)
    assert scarce.refused == 1
    assert whole["clients_at_once"] == {"asked": 4, "fitted": 2}
    groups = [line["groups"] for line in whole["history"]]
    assert groups == [{"sizes": [2, 2], "at_once": 2}] * 2
    assert "x: memory ran out with 4 clients in a pass, going on with 2" in shown.getvalue()
    with pytest.raises(StopError):
        run(config, out=tmp_path / "cut", listener=stop, mllm=mllm)
    scarce.most = 100  # there is memory again, and the run goes on as it was
    resumed = run(config, out=tmp_path / "cut", resume=True, mllm=mllm)
    assert [line["groups"] for line in resumed["history"]] == groups
    assert losses(whole) == losses(resumed)
    assert whole["metrics"] == resumed["metrics"]


def test_many_runs_tell_of_memory_in_a_line() -> None:
    shown = StringIO()
    with ManyProgress({"a": 1.0}, Console(file=shown, width=200)) as progress:
        progress.listen({"event": "start", "name": "a", "steps": 2})
        progress.listen({"event": "memory", "name": "a", "tried": 4, "next": 2})
    assert shown.getvalue() == "a: memory ran out with 4 clients in a pass, going on with 2\n"


def test_it_is_part_of_the_hash_and_its_default_is_not() -> None:
    """Bits differ, so a run is resumed only as it began; hashes of older runs stay."""
    base = make_config({**RUN, "training": {"rounds": 2}})
    assert config_hash(base) == config_hash(make_config(base.model_dump(mode="json")))
    alone, three = (
        config_hash(make_config(RUN, [f"training.clients_at_once={n}"])) for n in (1, 3)
    )
    assert alone != three
    dumped = make_config(RUN, ["training.clients_at_once=1"]).model_dump(mode="json")
    del dumped["training"]["clients_at_once"]  # as a run before it wrote its config
    assert config_hash(make_config(dumped)) == alone


def test_a_plan_counts_the_rows_of_all_clients() -> None:
    def activations(*changes: str) -> int:
        plan = make_plan(make_config(RUN, list(changes)), tokens=50)
        return plan.memory.phases["training"]["activations"]

    one = activations("training.clients_at_once=1")
    three = activations()
    assert 2.7 < three / one < 3.3
    assert activations("training.clients_at_once=9") == three  # of a cohort of three
    assert activations("trained=reference") == activations(
        "trained=reference", "training.clients_at_once=1"
    )
