"""Which modality tells the class by itself: hits by hand, chance, sums over parties, and runs."""

from __future__ import annotations

import numpy as np
import pytest

from fedmllm.config import make_config
from fedmllm.data.sample import Sample
from fedmllm.errors import UserError
from fedmllm.evidence import MOST, Hits, evidence_of, hits, hits_of, score
from fedmllm.experiment import Shared, run
from fedmllm.models.mllm import Mllm
from fedmllm.recombination import completions


class Picture:
    """An image by its key."""

    def __init__(self, key: str) -> None:
        self.key = key

    def open(self):
        raise AssertionError("nothing is opened here")


def count(states, labels) -> int:
    states = np.asarray(states, float)
    return hits(states @ states.T, np.asarray(labels))


def plainly(states: np.ndarray, labels: np.ndarray) -> int:
    """The same in words: leave one out, take the nearest mean."""
    found = 0
    for i in range(len(labels)):
        others = np.arange(len(labels)) != i
        classes = sorted(set(labels[others]))
        means = [states[others & (labels == c)].mean(0) for c in classes]
        nearest = np.argmin([np.linalg.norm(states[i] - mean) for mean in means])
        found += classes[nearest] == labels[i]
    return found


def test_hits_by_hand() -> None:
    """0 and 1 against 10 and 11: all hit. A 4 of the second class is nearer to the first, whose
    mean is 0.5, than to the others of its own, whose mean is 10.5, and is missed."""
    assert count([[0], [1], [10], [11]], [0, 0, 1, 1]) == 4
    assert count([[0], [1], [10], [11], [4]], [0, 0, 1, 1, 1]) == 4
    assert count([[0], [10], [1], [11]], [0, 0, 1, 1]) == 0


def test_the_only_one_of_its_class_is_missed() -> None:
    assert count([[0], [1], [50]], [0, 0, 1]) == 2


@pytest.mark.parametrize("seed", range(5))
def test_hits_are_those_of_a_plain_loop(seed: int) -> None:
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 3, 30)
    states = draw.normal(size=(30, 4)) + labels[:, None] * 0.7
    assert count(states, labels) == plainly(states, labels)


def test_what_tells_stands_above_chance_and_what_does_not_does_not() -> None:
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, 60)
    noise = draw.normal(size=(60, 8))
    apart = noise + 3 * labels[:, None]
    assert score([hits_of(apart, labels, draw)]) > 3.5
    assert abs(score([hits_of(noise, labels, draw)])) < 2.5


def test_an_exclusive_or_tells_nothing() -> None:
    """Either part of it alone stands beside either label as often."""
    first = np.repeat([0, 0, 1, 1], 15)
    labels = first ^ np.tile([0, 1], 30)
    states = np.stack([first, 1 - first], 1) * 4 + np.random.default_rng(1).normal(size=(60, 2))
    assert score([hits_of(states, labels, np.random.default_rng(2))]) < 1


def test_scale_and_constant_directions_do_not_count() -> None:
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, 30)
    states = np.stack([labels + 0.1 * draw.normal(size=30), draw.normal(size=30)], 1)
    one = hits_of(states, labels, np.random.default_rng(5))
    constant = np.full((30, 1), 7.0)
    other = np.concatenate([states * [1.0, 1000.0], constant], 1)
    assert hits_of(other, labels, np.random.default_rng(5)) == one
    nothing = hits_of(np.zeros((30, 3)), labels, draw)
    assert nothing == Hits(30, int((labels == 0).sum()), float((labels == 0).sum()), 0.0)


def test_parties_add_up() -> None:
    """(2 + 3) above chance over the root of (1 + 3)."""
    tests = [Hits(9, 6, 4.0, 1.0), Hits(9, 7, 4.0, 3.0), Hits()]
    assert score(tests) == 2.5
    assert score([Hits()]) == 0.0
    assert score([]) == 0.0


def sample(name: str, label: int, *, image: bool = True, text: bool = True) -> Sample:
    return Sample(
        name,
        str(label),
        text=f"text {name}" if text else None,
        image=Picture(name) if image else None,
        label=label,
    )


def test_a_party_reads_one_modality_at_a_time() -> None:
    held = [sample(f"b{k}", k % 2) for k in range(6)]
    held += [sample(f"i{k}", k % 2, text=False) for k in range(4)]
    seen = []

    def represent(views):
        seen.append([(view.id, view.image is not None, view.text is not None) for view in views])
        return np.array([[float(view.label)] for view in views])

    found = evidence_of(held, represent, client="c", seed=0)
    assert [view[1:] for view in seen[0]] == [(True, False)] * 10
    assert seen[1] == [(f"b{k}", False, True) for k in range(6)]
    assert (found["image"].samples, found["image"].hits) == (10, 10)
    assert (found["text"].samples, found["text"].hits) == (6, 6)
    assert found == evidence_of(held, represent, client="c", seed=0)


def test_one_class_or_none_says_nothing_and_many_samples_are_cut() -> None:
    def represent(views):
        return np.random.default_rng(0).normal(size=(len(views), 3))

    alone = evidence_of([sample("a", 1), sample("b", 1)], represent, client="c", seed=0)
    assert alone == {"image": Hits(), "text": Hits()}
    assert evidence_of([], represent, client="c", seed=0) == alone
    many = [sample(str(k), k % 2) for k in range(MOST + 9)]
    assert evidence_of(many, represent, client="c", seed=0)["text"].samples == MOST


def test_only_what_tells_is_filled_in() -> None:
    whole, other = sample("w", 1), sample("x", 1)
    image, text = sample("i", 1, text=False), sample("t", 1, image=False)
    neither = sample("n", 1, image=False, text=False)
    held = [whole, other, image, text, neither]
    found = {
        fill: completions(held, client="c", seed=0, fill=fill)
        for fill in (("image", "text"), ("text",), ("image",), ())
    }
    assert found["image", "text"] == completions(held, client="c", seed=0)
    assert found["image", "text"].keys() == {"i", "t", "n"}
    assert found["text",] == {"i": found["image", "text"]["i"]}
    assert found["image",] == {"t": found["image", "text"]["t"]}
    assert found[()] == {}


def config(**change):
    return make_config(
        {
            "name": "x",
            "data": {"name": "crisis", "train": 160, "test": 8, "classes": 4},
            "partition": {"clients": 4, "alpha": 100.0},
            "scenario": {"name": "missing", "beta": 0.3},
            "training": {"rounds": 1, "clients_per_round": 2, "lr": 0.01},
            "evaluation": {"every": 0, "conditions": ["both"]},
            **change,
        }
    )


@pytest.fixture(scope="module")
def shared(mllm: Mllm) -> Shared:
    return Shared(mllm)


def weights(folder) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_where_nothing_tells_nothing_is_filled_in_and_where_all_does_all_is(
    shared: Shared, tmp_path
) -> None:
    """Below any threshold it is plain training to the bit, but for a few bytes; with one that
    everything passes it is recombination."""
    arms = {
        "plain": {},
        "never": {"recombine": 1.0, "evidence": 100.0},
        "recombine": {"recombine": 1.0},
        "always": {"recombine": 1.0, "evidence": 1e-9},
    }
    found = {
        name: run(config(strategy=strategy), out=tmp_path / name, shared=shared)
        for name, strategy in arms.items()
    }
    assert found["never"]["evidence"]["filled"] == []
    assert found["always"]["evidence"]["filled"] == ["image", "text"]
    assert weights(tmp_path / "plain") == weights(tmp_path / "never")
    assert weights(tmp_path / "recombine") == weights(tmp_path / "always")
    assert weights(tmp_path / "plain") != weights(tmp_path / "recombine")
    made = found["never"]
    assert made["bytes"]["once"] == {"up": {"evidence": 4 * 24}, "down": {"evidence": 4 * 8}}
    assert made["bytes"]["up"] == found["plain"]["bytes"]["up"] + 96
    assert [client["id"] for client in made["evidence"]["clients"]] == sorted(
        client["id"] for client in made["manifest"]["clients"]
    )


def test_images_that_do_not_tell_are_not_asked_for(shared: Shared, tmp_path) -> None:
    cross = {"scenario": {"name": "cross", "images": "2:2"}}
    strategy = {"recombine": 1.0, "mixtures": 2}
    plain = run(config(**cross), out=tmp_path / "p", shared=shared)
    made = run(
        config(**cross, strategy={**strategy, "evidence": 100.0}), out=tmp_path / "m", shared=shared
    )
    assert made["mixtures"]["takers"] == 0
    assert weights(tmp_path / "m") == weights(tmp_path / "p")
    assert made["metrics"] == plain["metrics"]


def test_it_does_not_depend_on_what_was_trained_before(shared: Shared, tmp_path) -> None:
    """The base judges, not the adapter that the last run left."""
    made = config(strategy={"recombine": 1.0, "evidence": 1.0})
    one = run(made, out=tmp_path / "a", shared=shared)["evidence"]
    other = run(made, out=tmp_path / "b", shared=shared)["evidence"]
    assert one == other
    alone = replace_training(made, 0.02)
    assert run(alone, out=tmp_path / "c", shared=shared)["evidence"]["scores"] == one["scores"]


def replace_training(made, lr: float):
    return make_config({**made.model_dump(mode="json"), "training": {"lr": lr, "rounds": 1}})


def test_local_training_asks_each_party_alone(shared: Shared, tmp_path) -> None:
    """No bytes cross."""
    made = run(
        config(topology="local", strategy={"recombine": 1.0, "evidence": 1.0}),
        out=tmp_path / "l",
        shared=shared,
    )
    assert made["bytes"]["up"] == 0
    assert "evidence" not in made


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"strategy": {"evidence": 2.0}}, "does nothing without strategy.recombine"),
        ({"strategy": {"recombine": 1.0, "evidence": -1.0}}, "strategy.evidence"),
    ],
)
def test_what_cannot_be_is_told_with_the_config(change, words) -> None:
    with pytest.raises(UserError, match=words):
        config(**change)


def test_open_questions_have_no_classes_to_tell(shared: Shared, tmp_path) -> None:
    data = {"name": "medical", "train": 32, "test": 8, "flashcards": 8}
    strategy = {"recombine": 1.0, "evidence": 2.0}
    with pytest.raises(UserError, match="evidence: the task has open questions"):
        run(config(strategy=strategy, data=data), out=tmp_path / "x", shared=shared)
