"""Which modality tells the class by itself: hits by hand, chance, sums over parties, and runs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fedmllm.config import make_config
from fedmllm.data.sample import Sample
from fedmllm.errors import UserError
from fedmllm.evidence import (
    MOST,
    Hits,
    Seen,
    hits_of,
    matches,
    score,
    seen_alone,
    sums_of,
    total,
)
from fedmllm.experiment import Shared, run
from fedmllm.models.mllm import Mllm
from fedmllm.recombination import completions


class Picture:
    """An image by its key."""

    def __init__(self, key: str) -> None:
        self.key = key

    def open(self):
        raise AssertionError("nothing is opened here")


def seen(states, labels) -> Seen:
    return Seen(np.asarray(states, float).reshape(len(labels), -1), np.asarray(labels))


def asked(*parties: Seen, classes: int = 2) -> list[Hits]:
    """Each party's test against the others."""
    own = [sums_of(party, classes) for party in parties]
    return [hits_of(party, one, total(own)) for party, one in zip(parties, own, strict=True)]


def test_hits_by_hand() -> None:
    """The others' means are 1 and 10: of 0, 2, 4 and 11 only the 4 of the second class is missed.
    Three of four are nearest to the first class and two are of it: by chance (3 * 2 + 1 * 2) / 4
    hits."""
    one, other = seen([0, 2, 4, 11], [0, 0, 1, 1]), seen([1, 10], [0, 1])
    found = asked(one, other)[0]
    assert (found.samples, found.hits, found.expected) == (4, 3, 2.0)
    assert found.variance == pytest.approx((8 - (6 * 5 + 2 * 3) / 4 + 4) / 3)


def test_the_means_are_the_other_parties_alone() -> None:
    """A party whose classes lie the other way round hits nothing, however many samples it has."""
    others = [seen([0, 10], [0, 1]), seen([1, 9], [0, 1])]
    reverse = seen([0, 1, 0, 9, 10, 10], [1, 1, 1, 0, 0, 0])
    assert asked(*others, reverse)[2].hits == 0


def test_a_party_alone_and_classes_of_one_party_test_nothing() -> None:
    alone = asked(seen([0, 10], [0, 1]))
    assert alone == [Hits(2)]
    first, second = asked(seen([0, 1, 9], [0, 0, 1]), seen([0, 1], [0, 0]))
    assert first.hits == 2  # the 9 has no mean of its class to be near to
    assert first.variance == 0.0  # whoever finds one class only can find no other
    assert second.hits == 2
    first, second = asked(seen([0, 1, 9], [0, 0, 1]), seen([8, 9], [1, 1]))
    assert (first.hits, second.hits) == (1, 2)


def test_one_sample_has_no_chance() -> None:
    assert asked(seen([0], [0]), seen([0, 10], [0, 1]))[0] == Hits(1)


@pytest.mark.parametrize("seed", range(5))
def test_hits_are_those_of_a_plain_loop(seed: int) -> None:
    draw = np.random.default_rng(seed)
    parties = []
    for _ in range(3):
        labels = draw.integers(0, 3, 20)
        parties.append(seen(draw.normal(size=(20, 4)) + labels[:, None] * 0.7, labels))
    spread = np.concatenate([party.states for party in parties]).std(0)
    for k, (party, found) in enumerate(zip(parties, asked(*parties, classes=3), strict=True)):
        others = [p for j, p in enumerate(parties) if j != k]
        states = np.concatenate([p.states for p in others]) / spread
        labels = np.concatenate([p.labels for p in others])
        means = [states[labels == c].mean(0) for c in range(3)]
        nearest = [
            np.argmin([np.linalg.norm(x / spread - mean) for mean in means]) for x in party.states
        ]
        assert found.hits == (np.array(nearest) == party.labels).sum()


@pytest.mark.parametrize(
    ("found", "held"), [((3, 1, 0), (2, 1, 1)), ((2, 2, 0), (1, 2, 1)), ((4, 0, 0), (1, 2, 1))]
)
def test_chance_is_that_of_every_order(found, held) -> None:
    a, b = (np.repeat([0, 1, 2], counts) for counts in (found, held))
    every = [(a == np.array(order)).sum() for order in itertools.permutations(b)]
    mean, variance = matches(np.array(found, float), np.array(held, float))
    assert mean == pytest.approx(np.mean(every))
    assert variance == pytest.approx(np.var(every), abs=1e-12)


def parties_of(states, labels, count: int = 4) -> list[Seen]:
    return [seen(states[k::count], labels[k::count]) for k in range(count)]


def test_what_tells_stands_above_chance_and_what_does_not_does_not() -> None:
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, 80)
    noise = draw.normal(size=(80, 8))
    assert score(asked(*parties_of(noise + 3 * labels[:, None], labels))) > 7
    assert abs(score(asked(*parties_of(noise, labels)))) < 2.5


@pytest.mark.parametrize("count", [2, 4, 10])
@pytest.mark.parametrize("kinds", [1, 2])
def test_what_tells_nothing_is_seldom_filled_in(count: int, kinds: int) -> None:
    """400 federations whose labels mean nothing, with representations of one kind or of two far
    apart: the mean score is nought within four standard errors, and it passes 1.645 in 5 to 12 of
    100, within three."""
    draw = np.random.default_rng(3)
    found = []
    for _ in range(400):
        labels = draw.integers(0, 2, 24 * count)
        states = draw.normal(size=(24 * count, 3)) + 8 * draw.integers(0, kinds, (24 * count, 1))
        found.append(score(asked(*parties_of(states, labels, count))))
    assert abs(np.mean(found)) < 4 * np.std(found) / 400**0.5
    assert 0.05 - 3 * 0.011 < np.mean(np.array(found) >= 1.645) < 0.12 + 3 * 0.016


def test_who_holds_which_labels_is_no_evidence() -> None:
    """Two parties with pictures of their own kind, one rich in the first class, one in the second:
    within a party the picture says nothing."""
    draw = np.random.default_rng(0)
    labels = [(draw.random(60) < share).astype(int) for share in (0.1, 0.9) * 2]
    states = [draw.normal(size=(60, 3)) + 5 * (k % 2) for k in range(4)]
    found = asked(*(seen(x, y) for x, y in zip(states, labels, strict=True)))
    pooled = sum(one.hits for one in found) / 240
    assert pooled > 0.7  # which would look like much
    assert abs(score(found)) < 2.5


def test_an_exclusive_or_tells_nothing() -> None:
    """Either part of it alone stands beside either label as often."""
    first = np.repeat([0, 0, 1, 1], 15)
    labels = first ^ np.tile([0, 1], 30)
    states = np.stack([first, 1 - first], 1) * 4 + np.random.default_rng(1).normal(size=(60, 2))
    assert score(asked(*parties_of(states, labels))) < 1


def test_scale_and_constant_directions_do_not_count() -> None:
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, 40)
    states = np.stack([labels + 0.3 * draw.normal(size=40), draw.normal(size=40)], 1)
    other = np.concatenate([states * [1.0, 1000.0], np.full((40, 1), 7.0)], 1)
    assert asked(*parties_of(other, labels)) == asked(*parties_of(states, labels))
    for nothing in asked(*parties_of(np.zeros((40, 3)), labels)):
        assert (nothing.hits - nothing.expected, nothing.variance) == (0.0, 0.0)


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
    read = []

    def represent(views):
        read.append([(view.id, view.image is not None, view.text is not None) for view in views])
        return np.array([[float(view.label)] for view in views])

    where = {"client": "c", "seed": 0}
    image = seen_alone(held, "image", represent, **where)
    text = seen_alone(held, "text", represent, **where)
    assert [view[1:] for view in read[0]] == [(True, False)] * 10
    assert read[1] == [(f"b{k}", False, True) for k in range(6)]
    assert (
        image.labels.tolist()
        == image.states[:, 0].tolist()
        == [k % 2 for k in range(6)] + [k % 2 for k in range(4)]
    )
    assert len(text.labels) == 6
    assert seen_alone(held[6:], "text", represent, **where) is None


def test_many_samples_are_cut_the_same_way_each_time() -> None:
    def represent(views):
        return np.array([[float(view.id)] for view in views])

    many = [sample(str(k), k % 2) for k in range(MOST + 9)]
    one, again, other = (
        seen_alone(many, "text", represent, client=name, seed=0).states[:, 0].tolist()
        for name in ("c", "c", "d")
    )
    assert len(set(one)) == MOST
    assert one == again != other


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
    made, width = found["never"], shared.mllm.width
    sums = 4 * (4 * (width + 1) + width)  # by class their number and sum, and squares
    up, down = 2 * 4 * (sums + 12), 2 * 4 * (sums + 4)  # two modalities, four parties
    assert made["bytes"]["once"] == {"up": {"evidence": up}, "down": {"evidence": down}}
    assert made["bytes"]["up"] == found["plain"]["bytes"]["up"] + up
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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"strategy": {"evidence": 2.0}}, "does nothing without strategy.recombine"),
        ({"strategy": {"recombine": 1.0, "evidence": -1.0}}, "strategy.evidence"),
        (
            {"strategy": {"recombine": 1.0, "evidence": 1.0}, "topology": "local"},
            "has no parties that could differ",
        ),
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
