"""Configs: every problem at once, each with what is allowed; overrides; settings."""

from __future__ import annotations

import pytest

from fedmllm.config import config_hash, load_config, make_config
from fedmllm.errors import UserError
from fedmllm.report.loading import config_digest
from fedmllm.scenarios import SETTINGS


def problems(raw, *overrides) -> str:
    with pytest.raises(UserError) as caught:
        make_config({"name": "x", **raw}, overrides)
    return str(caught.value)


def test_defaults_resolve() -> None:
    config = make_config({"name": "x"})
    assert config.data["name"] == "memes"
    assert config.data["train"] > 0
    assert config.scenario == {"name": "aligned"}
    assert config.algorithm["name"] == "fedavg"


def test_all_problems_are_reported_at_once_with_the_nearest_match() -> None:
    text = problems(
        {
            "training": {"rouns": 2, "lr": "fast", "clients_per_round": 20},
            "scenario": {"name": "mising"},
            "topology": "centralized",
            "algorithm": {"name": "fedadam", "bta1": 0.5},
            "data": {"name": "memes", "train": "many"},
            "colour": "red",
        }
    )
    for expected in (
        "problems",
        "training.rouns: unknown key",
        "did you mean 'rounds'?",
        "training.lr: 'fast' must be a valid number",
        "unknown scenario 'mising': choose aligned, cross, hybrid or missing",
        "did you mean 'missing'?",
        "topology: 'centralized' must be",
        "did you mean 'centralised'?",
        "algorithm.bta1",
        "did you mean 'beta1'?",
        "data.train: 'many' is not an integer",
        "colour: unknown key",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"training": {"clients_per_round": 11}}, "11 of 10 clients cannot be sampled"),
        ({"training": {"batch_size": 2, "micro_batch": 4}}, "more than training.batch_size"),
        (
            {"topology": "local", "algorithm": "fedadam"},
            "topology local has nothing to aggregate",
        ),
        ({"model": {"name": "embeded"}}, "did you mean 'embedded'?"),
        ({"evaluation": {"limit": 1}}, "at least 2 samples"),
        ({"scenario": {"name": "cross", "images": 12}}, "images is 12, but there are 10 clients"),
        ({"training": {"rounds": -1}}, "training.rounds: -1 must be greater than or equal to 0"),
        ({"training": {"rounds": 2.5}}, "training.rounds: 2.5 must be a valid integer"),
        ({"training": {"rounds": True}}, "training.rounds: True must be a valid integer"),
        ({"setting": "missing-b0.5", "scenario": "cross"}, "not both"),
        ({"setting": "missing-b0.6"}, "unknown setting 'missing-b0.6'"),
        ({"scenario": 5}, "scenario: 5 is not a section"),
        ({"training": 5}, "training: 5 must be an object"),
        ({"name": "a/b"}, "name: 'a/b'"),
        ({"data": {"name": [1]}}, "unknown dataset '[1]'"),
        ({"setting": [1]}, "unknown setting '[1]'"),
        ({"evaluation": {"conditions": []}}, "evaluation.conditions"),
        ({"training": {"lr": "inf"}}, "training.lr"),
        ({"algorithm": {"name": "fedadam", "form": "refrence"}}, "refrence"),
        ({"algorithm": {"name": "fedavg", "eta": -1}}, "eta"),
        ({"model": {"path": "somewhere"}}, "needs a name of its own"),
    ],
)
def test_bad_values(raw, expected) -> None:
    assert expected in problems(raw)


def test_overrides() -> None:
    config = make_config(
        {"name": "x", "training": {"rounds": 3}},
        ["training.lr=1e-4", "scenario=missing", "scenario.beta=0.3", "data.train=100", "seed=7"],
    )
    assert config.training.rounds == 3
    assert config.training.lr == 1e-4
    assert config.scenario == {"name": "missing", "beta": 0.3}
    assert config.data["train"] == 100
    assert config.seed == 7
    assert "must read key=value" in problems({}, "rounds")
    assert "'rounds' is not a section" in problems(
        {"training": {"rounds": 3}}, "training.rounds.x=1"
    )


@pytest.mark.parametrize("setting", sorted(SETTINGS))
def test_each_of_the_twelve_settings_is_a_config(setting) -> None:
    config = make_config({"name": "x", "setting": setting})
    assert config.scenario["name"] == setting.split("-")[0]
    expected = float(setting.split("-a")[1]) if setting.startswith("aligned") else 0.5
    assert config.partition.alpha == expected
    assert make_config(config.model_dump(mode="json")) == config


def test_plain_values_are_what_people_mean() -> None:
    """YAML 1.1 would read 3:7 as 187, 1e-3 as a string and `no` as False."""
    config = make_config({"name": "x"}, ["scenario=cross", "scenario.images=3:7", "title=no"])
    assert config.scenario["images"] == "3:7"
    assert config.title == "no"
    assert make_config({"name": "x"}, ["training.lr=1e-3"]).training.lr == 0.001
    assert (
        make_config({"name": "x"}, ["scenario=cross", "scenario.images=0"]).scenario["images"] == 0
    )
    assert "scenario: " in problems({}, "scenario=cross", "scenario.images=x")
    assert "scenario: " in problems({}, "scenario=missing", "scenario.beta=2")


def test_hash_is_of_what_decides_the_numbers() -> None:
    base = make_config({"name": "x"})
    assert config_hash(base) == config_hash(make_config({"name": "y", "title": "t"}))
    assert config_hash(base) != config_hash(make_config({"name": "x", "seed": 1}))
    assert config_hash(base) != config_hash(make_config({"name": "x", "scenario": "cross"}))


def test_a_key_that_came_later_leaves_old_hashes_and_only_that() -> None:
    facts = make_config({"name": "x"}).model_dump(mode="json")
    old = {**facts, "model": {k: facts["model"][k] for k in ("name", "path", "dtype", "device")}}
    assert config_digest(old) == config_digest(facts)
    pathless = {**old, "model": {k: v for k, v in old["model"].items() if k != "path"}}
    assert config_digest(pathless) != config_digest(facts)
    # a section that came later and has grown since
    strategy = {**facts, "strategy": {"mu": 0.0, "w": 0.1}}
    assert config_digest(strategy) == config_digest(facts)
    held = {**facts, "strategy": {"mu": 1.0, "w": 0.1}}
    assert config_digest(held) != config_digest(facts)
    quantised = {**facts, "model": {**facts["model"], "quantization": "nf4"}}
    assert config_digest(quantised) != config_digest(facts)


def test_bad_files(tmp_path) -> None:
    (tmp_path / "good.yaml").write_text("seed: 1\n")
    assert load_config(tmp_path / "good.yaml").name == "good"
    with pytest.raises(UserError, match=r"does not exist .*did you mean .*good.yaml"):
        load_config(tmp_path / "god.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1,\nb: 2")
    with pytest.raises(UserError, match="not valid YAML at line 2"):
        load_config(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="must be a mapping"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "bin.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path / "bin.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path)
