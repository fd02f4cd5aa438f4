"""Mixed features: means by hand, who gives and who takes, and a run of parties of one modality."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from fedmllm.config import make_config
from fedmllm.data.sample import Sample
from fedmllm.errors import UserError
from fedmllm.experiment import Shared, run
from fedmllm.mixtures import MOST, gathered, mixtures_of, payload
from fedmllm.models.features import GivenFeatures, ImageFeatures
from fedmllm.models.mllm import Mllm
from fedmllm.recombination import DONORS, completions


class Picture:
    """An image by its key, whose features are a number."""

    def __init__(self, key: str) -> None:
        self.key = key

    def open(self):
        raise AssertionError("nothing is opened here")


def samples(count: int, answer: str = "yes") -> list[Sample]:
    return [
        Sample(f"{answer}{k}", answer, text=None, image=Picture(f"{answer}:{k}"))
        for k in range(count)
    ]


def see(source) -> ImageFeatures:
    """Two tokens of width three, all of them the number in the key; deepstack is twice that."""
    value = torch.full((2, 3), float(source.key.split(":")[1]))
    return ImageFeatures("<i><i>", value, deepstack=(2 * value,))


def mixed(given, **change) -> dict[str, list[GivenFeatures]]:
    return mixtures_of(given, see, **{"size": 2, "client": "c", "seed": 0, **change})


def numbers(made: list[GivenFeatures]) -> list[float]:
    return [float(one.features.features[0, 0]) for one in made]


def test_a_mixture_is_the_mean_of_its_images() -> None:
    (made,) = mixed(samples(3), size=3)["yes"]
    assert made.features.features.tolist() == [[1.0] * 3] * 2
    assert made.features.deepstack[0].tolist() == [[2.0] * 3] * 2
    assert made.features.words == "<i><i>"


def test_no_image_is_in_two_mixtures_and_there_are_few() -> None:
    four = mixed(samples(8))["yes"]
    assert sum(2 * n for n in numbers(four)) == sum(range(8))
    assert len(mixed(samples(9))["yes"]) == MOST
    assert len(mixed(samples(40))["yes"]) == MOST
    assert len(mixed(samples(5))["yes"]) == 2
    assert mixed(samples(1)) == {}


def test_classes_and_layouts_are_not_mixed() -> None:
    found = mixed([*samples(4), *samples(2, "no")])
    assert {name: len(made) for name, made in found.items()} == {"yes": 2, "no": 1}

    def apart(source) -> ImageFeatures:
        seen = see(source)
        odd = int(source.key.split(":")[1]) % 2
        return replace(seen, features=seen.features[:1]) if odd else seen

    made = mixtures_of(samples(4), apart, size=2, client="c", seed=0)["yes"]
    assert {(len(m.features.features), n) for m, n in zip(made, numbers(made), strict=True)} == {
        (2, 1.0),
        (1, 2.0),
    }


def test_one_picture_in_two_samples_counts_once() -> None:
    twice = [*samples(2), *samples(2)]
    assert len(mixed(twice)["yes"]) == 1
    assert mixed([samples(1)[0], samples(1)[0]]) == {}


def test_images_of_other_grids_are_not_mixed() -> None:
    def apart(source) -> ImageFeatures:
        odd = int(source.key.split(":")[1]) % 2
        return replace(
            see(source), inputs={"grid": torch.tensor([[1, 2, 6] if odd else [1, 6, 2]])}
        )

    made = mixtures_of(samples(4), apart, size=2, client="c", seed=0)["yes"]
    assert sorted(numbers(made)) == [1.0, 2.0]


def test_a_key_names_the_images() -> None:
    one, other = mixed(samples(8)), mixed(samples(8))
    assert [m.key for m in one["yes"]] == [m.key for m in other["yes"]]
    assert len({m.key for m in one["yes"]}) == 4
    assert {m.key for m in mixed(samples(8), seed=1)["yes"]} != {m.key for m in one["yes"]}
    with pytest.raises(ValueError, match="no picture"):
        one["yes"][0].open()


def test_the_pool_and_its_bytes() -> None:
    pool = gathered({"b": mixed(samples(4)), "a": mixed([*samples(2), *samples(2, "no")])})
    assert {name: len(each) for name, each in pool.items()} == {"yes": 3, "no": 1}
    assert payload(pool) == 4 * (2 * 3 + 2 * 3) * 4


def test_texts_are_completed_with_mixtures_of_their_class() -> None:
    pool = mixed([*samples(8), *samples(2, "no")])
    told = {"t": "yes", "u": "no", "v": "maybe"}
    texts = [Sample(name, answer, text=f"text {name}") for name, answer in told.items()]
    found = completions(texts, client="d", seed=0, given=pool)
    assert found.keys() == {"t", "u"}
    assert {made.image.key for made in found["t"]} == {m.key for m in pool["yes"]}
    assert [made.image.key for made in found["u"]] == [pool["no"][0].key] * DONORS
    assert {made.text for made in found["t"]} == {"text t"}


def test_a_party_with_images_uses_its_own() -> None:
    pool = mixed(samples(8))
    held = [Sample("t", "yes", text="a"), Sample("i", "no", image=Picture("no:1"))]
    assert completions(held, client="d", seed=0, given=pool) == {}


def config(**change):
    return make_config(
        {
            "name": "x",
            "data": {"name": "crisis", "train": 96, "test": 8},
            "partition": {"clients": 4, "alpha": 100.0},
            "scenario": {"name": "cross", "images": "2:2"},
            "training": {"rounds": 1, "clients_per_round": 4, "lr": 0.01},
            "evaluation": {"every": 0, "conditions": ["both"]},
            **change,
        }
    )


@pytest.fixture(scope="module")
def shared(mllm: Mllm) -> Shared:
    return Shared(mllm)


def test_a_run_of_parties_of_one_modality(shared: Shared, tmp_path) -> None:
    """Alone recombination finds no donors there, and changes nothing; mixtures change the parties
    of texts only, and their bytes are counted once."""
    found = {}
    for name, strategy in {
        "plain": {},
        "recombine": {"recombine": 1.0},
        "mixtures": {"recombine": 1.0, "mixtures": 2},
    }.items():
        result = run(config(strategy=strategy), out=tmp_path / name, shared=shared)
        weights = (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
        found[name] = result, weights
    assert found["plain"][1] == found["recombine"][1] != found["mixtures"][1]
    plain, made = found["plain"][0], found["mixtures"][0]
    given = made["mixtures"]["bytes"]
    one = shared.mllm.image_features(shared.dataset(config()).train[0].image).nbytes
    assert given["up"] % one == 0
    assert given["up"] == one * sum(made["mixtures"]["made"].values())
    assert (made["mixtures"]["givers"], made["mixtures"]["takers"]) == (2, 2)
    assert 0 < given["up"] <= one * 2 * 8 * MOST
    assert given["down"] == 2 * given["up"]
    for way in ("up", "down"):
        assert made["bytes"][way] == plain["bytes"][way] + given[way]
        assert made["bytes"]["once"][way] == {"mixtures": given[way]}
    assert "mixtures" not in found["recombine"][0]


MIXED = {"recombine": 1.0, "mixtures": 2}


def test_nothing_is_given_where_nobody_takes(shared: Shared, tmp_path) -> None:
    change = {"scenario": {"name": "missing", "beta": 0.5}}
    plain = run(config(**change, strategy={"recombine": 1.0}), out=tmp_path / "p", shared=shared)
    made = run(config(**change, strategy=MIXED), out=tmp_path / "m", shared=shared)
    assert made["bytes"] == plain["bytes"]
    assert made["metrics"] == plain["metrics"]
    assert made["mixtures"]["takers"] == 0


def test_many_clients_at_once_read_the_same(shared: Shared, tmp_path) -> None:
    found = []
    for at_once in (1, 4):
        training = {"rounds": 1, "clients_per_round": 4, "lr": 0.01, "clients_at_once": at_once}
        strategy = {**MIXED, "resample": 1.0, "views": 0.5}
        result = run(
            config(strategy=strategy, training=training), out=tmp_path / str(at_once), shared=shared
        )
        found.append(result["history"][0]["loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_it_goes_on_to_the_same_bits(shared: Shared, tmp_path) -> None:
    """The mixtures are made again from the same draws."""
    made = config(
        strategy=MIXED,
        training={"rounds": 2, "clients_per_round": 2, "lr": 0.01, "max_length": 400},
    )
    run(made, out=tmp_path / "r", shared=shared)
    name = "adapter/adapter_model.safetensors"
    first = (tmp_path / "r" / name).read_bytes()
    shutil.rmtree(tmp_path / "r" / "state" / "round-000002")
    (tmp_path / "r" / "result.json").unlink()
    (tmp_path / "r" / name).unlink()
    run(made, out=tmp_path / "r", resume=True, shared=Shared(shared.mllm))
    assert (tmp_path / "r" / name).read_bytes() == first


def test_completions_that_are_too_long_are_left_out(shared: Shared, tmp_path) -> None:
    """The longest sample of either party fits; a text with a picture does not."""
    plain = config(strategy={})
    data = shared.dataset(plain)
    alone = [
        shared.encode(plain, data.task, sample.masked(keep_image=image, keep_text=not image))
        for sample in data.train
        for image in (True, False)
    ]
    room = max(item.longest for item in alone)
    training = {"rounds": 1, "clients_per_round": 4, "lr": 0.01, "max_length": room}
    change = {"training": training, "evaluation": {"every": 0, "conditions": ["image_withheld"]}}
    one = run(config(strategy=MIXED, **change), out=tmp_path / "m", shared=shared)
    other = run(config(strategy={}, **change), out=tmp_path / "p", shared=shared)
    assert one["history"][0]["loss"] == other["history"][0]["loss"]


def test_too_few_images_for_any_mixture(shared: Shared, tmp_path) -> None:
    with pytest.raises(UserError, match="no party has 1000 different images"):
        run(
            config(strategy={"recombine": 1.0, "mixtures": 1000}),
            out=tmp_path / "x",
            shared=shared,
        )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"strategy": {"recombine": 1.0, "mixtures": 1}}, "give 2 or more"),
        ({"strategy": {"mixtures": 2}}, "does nothing without strategy.recombine"),
        (
            {"strategy": MIXED, "trained": {"name": "paper", "connector": "full"}},
            "features change each round",
        ),
        ({"strategy": MIXED, "topology": "centralised"}, "has no parties that could differ"),
        ({"strategy": {"fusion": 1.0}, "topology": "local"}, "has no parties that could differ"),
    ],
)
def test_what_cannot_be_is_told_with_the_config(change, words) -> None:
    with pytest.raises(UserError, match=words):
        config(**change)


def test_open_questions_have_no_classes_to_mix(shared: Shared, tmp_path) -> None:
    data = {"name": "medical", "train": 32, "test": 8, "flashcards": 8}
    with pytest.raises(UserError, match="open questions"):
        run(config(strategy=MIXED, data=data), out=tmp_path / "x", shared=shared)
