"""What stands in an epoch for samples that lack a modality."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from fedmllm.algorithms.base import Composition, LocalObjective
from fedmllm.client import Job, LocalPlan, LocalTraining
from fedmllm.config import make_config
from fedmllm.data.sample import Sample
from fedmllm.errors import UserError
from fedmllm.experiment import Shared, run
from fedmllm.models.mllm import Mllm
from fedmllm.models.passes import Encoded
from fedmllm.recombination import DONORS, check_composition, completions, compose

WHERE = {"client": "c", "round_": 1, "epoch": 0, "seed": 0}


class Picture:
    """An image by its key."""

    def __init__(self, key: str) -> None:
        self.key = key

    def open(self):
        raise AssertionError("nothing is opened here")


def sample(name: str, answer: str, *, image: bool, text: bool, question: str = "") -> Sample:
    picture = Picture(f"image of {name}") if image else None
    return Sample(name, answer, question, f"text of {name}" if text else None, picture)


def of(found: dict[str, list[Sample]], name: str) -> set[tuple[str, str | None]]:
    return {(made.image.key, made.text) for made in found[name]}


def test_a_sample_is_completed_by_those_of_its_answer() -> None:
    held = [
        sample("i", "yes", image=True, text=False),
        sample("t", "yes", image=False, text=True),
        sample("w", "yes", image=True, text=True),
        sample("n", "yes", image=False, text=False),
        sample("other", "no", image=True, text=True),
    ]
    found = completions(held, client="c", seed=0)
    assert found.keys() == {"i", "t", "n"}
    assert all(len(made) == DONORS for made in found.values())
    assert of(found, "i") == {("image of i", "text of t"), ("image of i", "text of w")}
    assert of(found, "t") == {("image of i", "text of t"), ("image of w", "text of t")}
    assert {image for image, _ in of(found, "n")} == {"image of i", "image of w"}
    assert {text for _, text in of(found, "n")} == {"text of t", "text of w"}
    assert {made.answer for each in found.values() for made in each} == {"yes"}
    assert {made.id for made in found["i"]} == {"i+text:t", "i+text:w"}
    assert all(made.id.startswith("n+image:") and "+text:" in made.id for made in found["n"])


def test_donors_are_drawn_by_seed_client_and_sample_alone() -> None:
    held = [sample(f"s{k}", "yes", image=k % 2 == 0, text=k % 2 == 1) for k in range(20)]
    found = completions(held, client="c", seed=0)
    assert completions(held, client="c", seed=0) == found
    assert completions(held, client="d", seed=0) != found
    assert completions(held, client="c", seed=1) != found


def test_nobody_to_complete_it() -> None:
    """No other of its answer has what it lacks; a text is not there to complete a question."""
    alone = [
        sample("i", "yes", image=True, text=False),
        sample("t", "no", image=False, text=True),
        sample("n", "yes", image=False, text=False),
    ]
    assert completions(alone, client="c", seed=0) == {}
    flashcard = sample("f", "yes", image=False, text=False, question="q")
    other = sample("o", "yes", image=True, text=False, question="p")
    assert completions([flashcard, other], client="c", seed=0) == {}
    same = replace(other, question="q")
    (made, *_) = completions([flashcard, same], client="c", seed=0)["f"]
    assert (made.image, made.text, made.question) == (same.image, None, "q")


def item(name: str, *, complete: bool, completions=()) -> Encoded:
    return Encoded(name, (1,), (2,), None, complete=complete, completions=completions)


FULL = [item(f"i{k}+d", complete=True) for k in range(3)]
HELD = [
    item("w0", complete=True),
    *(item(f"i{k}", complete=False, completions=(FULL[k],)) for k in range(3)),
    item("w1", complete=True),
    *(item(f"j{k}", complete=False) for k in range(5)),
]


def names(given: Composition, held=HELD, **change) -> list[str]:
    return [made.id for made in compose(held, given, **{**WHERE, **change})]


def test_off_it_is_the_samples_themselves() -> None:
    assert all(a is b for a, b in zip(compose(HELD, Composition(), **WHERE), HELD, strict=True))


def test_all_completed_and_all_replaced() -> None:
    assert names(Composition(recombine=1.0))[:5] == ["w0", "i0+d", "i1+d", "i2+d", "w1"]
    assert names(Composition(recombine=1.0))[5:] == [f"j{k}" for k in range(5)]
    found = names(Composition(resample=1.0))
    assert (found[0], found[4]) == ("w0", "w1")
    # eight places and two whole samples, by turns
    assert Counter(found[1:4] + found[5:]) == {"w0": 4, "w1": 4}
    found = names(Composition(recombine=1.0, resample=1.0))
    assert found[:5] == ["w0", "i0+d", "i1+d", "i2+d", "w1"]
    assert set(found[5:]) == {"w0", "w1"}


def test_a_party_without_whole_samples_keeps_its_own() -> None:
    held = HELD[5:]
    assert names(Composition(resample=1.0), held) == [each.id for each in held]


def test_shares_are_of_the_incomplete_samples() -> None:
    held = [item("w", complete=True)] + [
        item(f"i{k}", complete=False, completions=(item(f"i{k}+d", complete=True),))
        for k in range(2000)
    ]
    found = Counter(len(n) > 1 and n[-2:] for n in names(Composition(recombine=0.25), held))
    assert found["+d"] / 2000 == pytest.approx(0.25, abs=0.04)
    replaced = names(Composition(resample=0.25), held).count("w") - 1
    assert replaced / 2000 == pytest.approx(0.25, abs=0.04)


def test_an_epoch_is_drawn_by_where_it_is() -> None:
    given = Composition(recombine=0.5, resample=0.5)
    held = [replace(each, id=f"{k}{each.id}") for k in range(9) for each in HELD]
    found = names(given, held)
    assert names(given, held) == found
    for change in ({"client": "d"}, {"round_": 2}, {"epoch": 1}, {"seed": 1}):
        assert names(given, held, **change) != found


def test_the_local_step_reads_the_composed_epoch() -> None:
    """The order is that of plain training; only what stands in it differs."""

    def epochs(given: Composition) -> list[list[str]]:
        local = LocalTraining(
            NoAdapter(), {}, Job("c", HELD), round_=1, seed=0, lr=0.1,
            plan=LocalPlan(epochs=2, batch_size=4, optimizer="sgd"),
            objective=LocalObjective(composition=given),
        )  # fmt: skip
        return [[each.id for each in batch] for batch in local.batches()]

    plain, made = epochs(Composition()), epochs(Composition(recombine=1.0))
    assert [len(batch) for batch in plain] == [4, 4, 2, 4, 4, 2]
    completed = {f"i{k}": f"i{k}+d" for k in range(3)}
    assert made == [[completed.get(n, n) for n in batch] for batch in plain]


class NoAdapter:
    """One number to train."""

    def __init__(self) -> None:
        import torch

        self.trainable = {"x": torch.nn.Parameter(torch.zeros(1))}
        self.layer_of: dict[str, int] = {}
        self.num_layers = 1


@pytest.mark.parametrize("change", [{"recombine": -0.1}, {"resample": 1.5}])
def test_a_share_is_from_0_to_1(change) -> None:
    with pytest.raises(UserError, match="share from 0 to 1"):
        check_composition(Composition(**change))


def test_a_run_with_both(mllm: Mllm, tmp_path) -> None:
    """Each reaches a run, and does its own; again to the same bits."""
    shared = Shared(mllm)

    def adapter(name: str, **change) -> bytes:
        config = make_config(
            {
                "name": name,
                "data": {"name": "crisis", "train": 48, "test": 8},
                "partition": {"clients": 2, "alpha": 100.0},
                "scenario": {"name": "missing", "beta": 0.5},
                "training": {"rounds": 1, "clients_per_round": 2},
                "evaluation": {"every": 0, "conditions": ["both"]},
                **change,
            }
        )
        run(config, out=tmp_path / name, shared=shared)
        return (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()

    found = {
        name: adapter(name, strategy=strategy)
        for name, strategy in {
            "plain": {},
            "recombine": {"recombine": 1.0},
            "resample": {"resample": 1.0},
            "both": {"recombine": 1.0, "resample": 1.0},
        }.items()
    }
    assert len(set(found.values())) == 4
    assert adapter("again", strategy={"recombine": 1.0, "resample": 1.0}) == found["both"]
