"""Mixed features: means by hand, who gives and who takes, and a run of parties of one modality."""

from __future__ import annotations

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
    assert 0 < given["up"] <= one * 2 * 8 * MOST
    assert given["down"] == 2 * given["up"]
    for way in ("up", "down"):
        assert made["bytes"][way] == plain["bytes"][way] + given[way]
    assert "mixtures" not in found["recombine"][0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"strategy": {"recombine": 1.0, "mixtures": 1}}, "give 2 or more"),
        (
            {
                "strategy": {"recombine": 1.0, "mixtures": 2},
                "trained": {"name": "paper", "connector": "full"},
            },
            "features change each round",
        ),
        (
            {
                "strategy": {"recombine": 1.0, "mixtures": 2},
                "data": {"name": "medical", "train": 32, "test": 8, "flashcards": 8},
            },
            "open questions",
        ),
    ],
)
def test_what_cannot_be_mixed_is_told(change, words, tmp_path) -> None:
    with pytest.raises(UserError, match=words):
        run(config(**change), out=tmp_path / "x")


def test_mixtures_without_recombination_are_refused() -> None:
    with pytest.raises(UserError, match="mixtures"):
        config(strategy={"mixtures": 2})
