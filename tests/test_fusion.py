"""Late fusion: by hand, against Bayes' rule, and through a run."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fedmllm.config import make_config
from fedmllm.errors import UserError
from fedmllm.experiment import Shared, run
from fedmllm.fusion import Fusion, fusion_of
from fedmllm.heterogeneity import Profile
from fedmllm.models.mllm import Mllm
from fedmllm.predict import predict


def test_share_and_prior_by_hand() -> None:
    """Whole 4 + 0, image 2 + 1, text 0 + 3, neither 9 + 0: six of ten have one modality."""
    given = [Profile((4, 2, 0, 9), (3, 0)), Profile((0, 1, 3, 0), (4, 1))]
    found = fusion_of(given, strength=0.5)
    assert found.share == pytest.approx(0.5 * 6 / 10)
    assert found.prior == pytest.approx((8 / 10, 2 / 10))


@pytest.mark.parametrize(
    ("counts", "share"), [((5, 0, 0, 2), 0.0), ((0, 5, 5, 0), 1.0), ((0, 0, 0, 7), 0.0)]
)
def test_ends(counts, share) -> None:
    assert fusion_of([Profile(counts, (1, 1))], strength=1.0).share == share


def test_it_is_bayes_rule_where_modalities_are_independent() -> None:
    """p(y), p(image | y), p(text | y) drawn; posteriors by full enumeration."""
    rng = np.random.default_rng(0)
    prior = rng.dirichlet(np.ones(3))
    image, text = rng.dirichlet(np.ones(4), 3), rng.dirichlet(np.ones(5), 3)  # rows: p(. | y)
    joint = prior[:, None, None] * image[:, :, None] * text[:, None, :]
    for i in range(4):
        for t in range(5):
            truth = joint[:, i, t] / joint[:, i, t].sum()
            by_image = joint[:, i].sum(1) / joint[:, i].sum()
            by_text = joint[:, :, t].sum(1) / joint[:, :, t].sum()
            wrong = np.array([[0.2, 0.3, 0.5]])
            found = Fusion(1.0, tuple(prior))(wrong, by_image[None], by_text[None])
            assert found[0] == pytest.approx(truth)


def test_between_the_ends_logarithms_are_mixed() -> None:
    both, image, text = (np.array([p]) for p in ([0.5, 0.5], [0.8, 0.2], [0.6, 0.4]))
    found = Fusion(0.25, (0.5, 0.5))(both, image, text)
    odds = ((0.8 * 0.6) / (0.2 * 0.4)) ** 0.25
    assert found[0, 0] / found[0, 1] == pytest.approx(odds)
    assert Fusion(0.0, (0.5, 0.5))(both, image, text) is both


def test_a_probability_of_nothing_is_no_end_of_the_world() -> None:
    zero = np.array([[1.0, 0.0]])
    found = Fusion(1.0, (0.5, 0.5))(zero, zero, 1 - zero)
    assert np.isfinite(found).all()


def settings(**change):
    return {
        "name": "x",
        "data": {"name": "crisis", "train": 64, "test": 24},
        "partition": {"clients": 4, "alpha": 100.0},
        "scenario": {"name": "cross", "images": "2:2"},
        "training": {"rounds": 1, "clients_per_round": 2, "lr": 0.01},
        "evaluation": {"every": 0, "held_out": 0.25},
        **change,
    }


@pytest.fixture(scope="module")
def shared(mllm: Mllm) -> Shared:
    return Shared(mllm)


def test_a_run_and_its_adapter(shared: Shared, tmp_path) -> None:
    """Only the test of whole samples changes; nothing else of the run does. `predict` gives the
    probabilities that the test gave."""
    plain = run(make_config(settings()), out=tmp_path / "plain", shared=shared)
    config = make_config(settings(strategy={"fusion": 1.0}))
    fused = run(config, out=tmp_path / "fused", shared=shared)
    assert fused["fusion"]["share"] == 1.0
    assert "fusion" not in plain
    for condition in ("image_withheld", "text_withheld", "neither"):
        assert fused["metrics"][condition] == plain["metrics"][condition]
    assert fused["metrics"]["both"] != plain["metrics"]["both"]
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "fused" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    # parties of one modality have no whole samples to test: nothing changes for them
    assert fused["held_out"] == plain["held_out"]
    assert fused["bytes"]["up"] - plain["bytes"]["up"] == 4 * 4 * (4 + 8)
    beside = json.loads((tmp_path / "fused" / "adapter" / "fedmllm.json").read_text())
    assert beside["fusion"] == json.loads(json.dumps(fused["fusion"]))
    test = shared.test_set(config)
    made = fused["fusion"]
    expected = test.probabilities("both", 1, fusion=Fusion(made["share"], tuple(made["prior"])))
    shown = test.samples[0]
    picture = tmp_path / "picture.png"
    shown.image.open().save(picture)
    _, ranked = predict(tmp_path / "fused" / "adapter", image=picture, text=shown.text)
    found = dict(ranked)
    for name, p in zip(test.task.classes, expected[0], strict=True):
        assert found[name] == pytest.approx(p, rel=1e-3, abs=1e-6)
    _, one = predict(tmp_path / "fused" / "adapter", text=shown.text)
    _, same = predict(tmp_path / "plain" / "adapter", text=shown.text)
    assert one == same


def test_aligned_runs_stay_what_they_are(shared: Shared, tmp_path) -> None:
    change = {"scenario": {"name": "aligned"}}
    plain = run(make_config(settings(**change)), out=tmp_path / "plain", shared=shared)
    config = make_config(settings(**change, strategy={"fusion": 1.0}))
    fused = run(config, out=tmp_path / "fused", shared=shared)
    assert fused["metrics"] == plain["metrics"]
    assert fused["held_out"] == plain["held_out"]
    assert fused["fusion"]["share"] == 0.0


def test_on_the_way_it_is_used_too(shared: Shared, tmp_path) -> None:
    change = {
        "training": {"rounds": 2, "clients_per_round": 2, "lr": 0.01},
        "evaluation": {"every": 1, "conditions": ["both"]},
        "data": {"name": "memes", "train": 64, "test": 24},  # an AUC moves with any score
    }
    plain = run(make_config(settings(**change)), out=tmp_path / "plain", shared=shared)
    config = make_config(settings(**change, strategy={"fusion": 1.0}))
    fused = run(config, out=tmp_path / "fused", shared=shared)
    assert fused["history"][0]["metrics"] != plain["history"][0]["metrics"]


def test_open_questions_are_refused(shared: Shared, tmp_path) -> None:
    change = {"data": {"name": "medical", "train": 32, "test": 8, "flashcards": 8}}
    config = make_config(settings(**change, strategy={"fusion": 1.0}, partition={"clients": 4}))
    with pytest.raises(UserError, match=r"strategy\.fusion: the task has open questions"):
        run(config, out=tmp_path / "x", shared=shared)
