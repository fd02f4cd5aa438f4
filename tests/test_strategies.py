"""Strategies on the server and in whole runs: weights, prototypes by hand, resuming, bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import get_args

import pytest
import torch

from fedmllm import checkpoint
from fedmllm.algorithms import make_algorithm
from fedmllm.algorithms.base import Alignment, Proximal, ServerState, StreamingMean, Update
from fedmllm.alignment import DISTILLATION_TARGETS, PROTOTYPE_LOSSES
from fedmllm.bench.deciding import deciding_digest
from fedmllm.checkpoint import Checkpoint
from fedmllm.config import Config, StrategySection, check_config, config_hash, make_config
from fedmllm.errors import UserError
from fedmllm.experiment import Shared, apply_strategy, run
from fedmllm.federation import cohort_of, run_round
from fedmllm.heterogeneity import Profile, standings
from fedmllm.models.mllm import Mllm
from fedmllm.plan import make_plan
from fedmllm.plan.timing import fitting_rates
from fedmllm.report import load_results, write_report
from fedmllm.report.arms import strategy_of
from fedmllm.report.loading import LATER, result_digest
from fedmllm.revisions import revisions_of
from fedmllm.scenarios import SCENARIOS
from fedmllm.strategies import BY_SCENARIO, WEIGHTS, edge_layers, party_weights, with_strategy

PARAMS = {"w": torch.zeros(3)}
SMALL = {
    "data": {"name": "memes", "train": 32, "test": 8},
    "partition": {"clients": 3},
    "training": {"rounds": 2, "clients_per_round": 2, "lr": 0.003},
    "evaluation": {"every": 0, "conditions": ["both"]},
}
EVERYTHING = {
    "mu": 1.0,
    "weight": "profile",
    "epsilon": 2.0,
    "aggregation": 1.0,
    "sampling": -1.0,
    "prototypes": 0.1,
    "distillation": 0.5,
    "views": 0.5,
    "incomplete": 0.5,
}


def small(name: str = "x", **change) -> Config:
    return make_config({"name": name, **SMALL, **change})


# -- the regulariser's band and weights ----------------------------------------------------------


@pytest.mark.parametrize(("layers", "edge"), [(28, 4), (32, 5), (4, 1), (24, 3), (2, 0), (1, 0)])
def test_a_seventh_of_the_layers_is_free_at_either_end(layers, edge) -> None:
    assert edge_layers(layers) == edge


def test_a_band_must_hold_a_layer() -> None:
    assert [edge_layers(4, s) for s in (0, 1)] == [0, 1]
    assert edge_layers(5, 2) == 2
    with pytest.raises(UserError, match=r"strategy.edge_layers: 2 .* 4 decoder layers.* at most 1"):
        edge_layers(4, 2)


def test_weights_by_rule() -> None:
    found = standings({"a": Profile((4, 0, 0, 0)), "b": Profile((0, 0, 4, 0))})
    assert party_weights("fixed", 0.1, "cross", found) == {"a": 0.1, "b": 0.1}
    by_scenario = [party_weights("scenario", 0.2, s, found)["a"] for s in BY_SCENARIO]
    assert by_scenario == [0.0, 0.1, 0.2, 0.2]
    profile = party_weights("profile", 0.1, "aligned", found)
    assert profile == {"a": 0.1 * found["a"].index, "b": 0.1}
    assert 0 < profile["a"] < profile["b"]


def test_aggregation_scales_the_weights_of_updates() -> None:
    """Clients 1 and 4 as in test_federation, the second at half its weight: (2 * 1.1 + 2.5 * 4.1)
    / 4.5; a plain mean is scaled too, and extras are not."""
    updates = [
        Update("a", 2, {"w": torch.full((3,), 1.1)}, {"x": {"e": torch.tensor([1.0])}}),
        Update("b", 5, {"w": torch.full((3,), 4.1)}, {"x": {"e": torch.tensor([3.0])}}),
    ]
    for weighting, expected in (("samples", (2.2 + 10.25) / 4.5), ("uniform", (1.1 + 2.05) / 1.5)):
        mean = StreamingMean(weighting)
        for update, scale in zip(updates, (1.0, 0.5), strict=True):
            mean.fold(update, scale)
        assert mean.delta()["w"].tolist() == pytest.approx([expected] * 3)
        assert mean.extra("x")["e"].tolist() == [2.0]


def test_a_round_takes_the_scales() -> None:
    class Fixed:
        memory: dict = {}  # noqa: RUF012

        def train(self, round_, cohort, algorithm, state, *, lr):
            for k, name in enumerate(cohort):
                made = {"w": torch.full((3,), float(2 * k + 1))}
                yield k, Update(name, 1, made, metrics={"loss": 1.0, "view_loss": float(k)})

    algorithm = make_algorithm("fedavg", num_clients=2)
    state = algorithm.init(PARAMS)
    after, record = run_round(
        Fixed(), algorithm, state, ["a", "b"], lr=1.0, scales={"a": 3.0, "b": 1.0}, drift=True
    )
    assert after.params["w"].tolist() == [1.5] * 3  # (3 * 1 + 1 * 3) / 4
    assert record.measured["view_loss"] == 0.5
    assert set(record.measured) == {"view_loss", "drift_cosine", "drift_dispersion"}
    _, plain = run_round(Fixed(), algorithm, state, ["a", "b"], lr=1.0)
    assert set(plain.measured) == {"view_loss"}


def test_chances_of_the_cohort() -> None:
    names = ["a", "b", "c"]
    chances = {"a": 3.0, "b": 0.5, "c": 0.5}
    drawn = [cohort_of(names, 1, seed=0, round_=r, chances=chances)[0] for r in range(400)]
    assert drawn == [
        cohort_of(names[::-1], 1, seed=0, round_=r, chances=chances)[0] for r in range(400)
    ]
    assert 270 < drawn.count("a") < 330  # 300 expected
    assert min(drawn.count("b"), drawn.count("c")) > 30
    assert len(cohort_of(names, 2, seed=0, round_=1, chances=chances)) == 2


# -- prototypes on the server --------------------------------------------------------------------


def sums(total, count):
    return {"prototypes": {"sum": torch.tensor(total), "count": torch.tensor(count)}}


def step(algorithm, state, *extras) -> ServerState:
    mean = StreamingMean(algorithm.weighting)
    for k, extra in enumerate(extras):
        mean.fold(Update(f"c{k}", k + 1, {"w": torch.ones(3)}, extra))
    return algorithm.step(state, mean)


@pytest.mark.parametrize("name", ["fedavg", "fedadam"])
def test_prototypes_by_hand(name) -> None:
    """Class 0: sums (2, 0) of 2 samples and (4, 3) of 1: mean (2, 1). Class 1: one client, (6, 0)
    of 3. Class 2: nobody. The next round only class 0 is seen, (4, 5) of 1, momentum 1/4."""
    plain = make_algorithm(name, num_clients=9)
    algorithm = with_strategy(
        plain, alignment=Alignment(prototypes=0.5), classes=3, width=2, momentum=0.25
    )
    assert algorithm.broadcast == (*plain.broadcast, "prototypes")
    state = algorithm.init(PARAMS)
    assert state.slots["prototypes"]["seen"].tolist() == [0, 0, 0]
    first = step(
        algorithm,
        state,
        sums([[2.0, 0.0], [0.0, 0.0], [0.0, 0.0]], [2.0, 0, 0]),
        sums([[4.0, 3.0], [6.0, 0.0], [0.0, 0.0]], [1.0, 3, 0]),
    )
    assert first.slots["prototypes"]["mean"].tolist() == [[2, 1], [2, 0], [0, 0]]
    assert first.slots["prototypes"]["seen"].tolist() == [1, 1, 0]
    second = step(algorithm, first, sums([[4.0, 5.0], [0.0, 0.0], [0.0, 0.0]], [1.0, 0, 0]))
    assert second.slots["prototypes"]["mean"].tolist() == [[3.5, 4], [2, 0], [0, 0]]
    assert second.slots["prototypes"]["seen"].tolist() == [1, 1, 0]
    # the adapter moves as without them
    bare = step(plain, plain.init(PARAMS), {}, {})
    assert torch.equal(bare.params["w"], first.params["w"])
    assert set(bare.slots) == set(first.slots) - {"prototypes"}


def test_a_state_without_prototypes_is_refused() -> None:
    plain = make_algorithm("fedavg", num_clients=2)
    algorithm = with_strategy(plain, alignment=Alignment(prototypes=1.0), classes=2, width=2)
    extra = sums([[0.0, 0.0]] * 2, [1.0, 1.0])
    with pytest.raises(UserError, match="has no prototypes"):
        step(algorithm, plain.init(PARAMS), extra)


def test_open_questions_have_no_prototypes() -> None:
    config = small(strategy={"prototypes": 0.1})
    plain = make_algorithm("fedavg", num_clients=2)
    with pytest.raises(UserError, match=r"open questions.*strategy.distillation"):
        apply_strategy(config, plain, layers=4, classes=0, width=8)


def test_prototypes_lie_in_a_checkpoint(tmp_path) -> None:
    plain = make_algorithm("fedadam", num_clients=2)
    algorithm = with_strategy(plain, alignment=Alignment(prototypes=1.0), classes=2, width=4)
    state = step(algorithm, algorithm.init(PARAMS), sums([[1.0] * 4] * 2, [1.0, 0.0]))
    checkpoint.save(tmp_path, Checkpoint(state, {}, []))
    found = checkpoint.load(tmp_path)
    assert found is not None
    for slot in ("prototypes", "m", "v"):
        for name, value in state.slots[slot].items():
            assert torch.equal(found.state.slots[slot][name], value)


# -- the config ----------------------------------------------------------------------------------


def test_defaults_are_off_and_in_no_hash() -> None:
    assert StrategySection().model_dump(mode="json") == LATER["strategy"]
    plain = small()
    assert config_hash(plain) == config_hash(small(strategy={}))
    assert config_hash(plain) == config_hash(small(strategy={"mu": 0}))
    hashes = {config_hash(plain)}
    switches = {"epsilon": "aggregation", "momentum": "prototypes", "edge_layers": "mu"}
    switches |= {"w": "mu", "weight": "mu"}
    for key, value in {**EVERYTHING, "edge_layers": 0, "w": 0.2, "momentum": 0.1}.items():
        change = {**({switches[key]: 1.0} if key in switches else {}), key: value}
        hashes.add(config_hash(small(strategy=change)))
    assert len(hashes) == 1 + len(EVERYTHING) + 3
    assert config_hash(small(evaluation={"drift": True})) != config_hash(small(evaluation={}))


def test_the_config_offers_what_the_registries_hold() -> None:
    fields = StrategySection.model_fields
    for key, registry in (
        ("weight", WEIGHTS),
        ("prototype_loss", PROTOTYPE_LOSSES),
        ("distillation_target", DISTILLATION_TARGETS),
    ):
        assert set(get_args(fields[key].annotation)) == set(registry)
    assert set(BY_SCENARIO) == set(SCENARIOS)
    alignment = {key: fields[key].default for key in Alignment.__dataclass_fields__}
    assert Alignment(**alignment) == Alignment()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"adaptive": Proximal(mu=-1.0)}, "mu"),
        ({"alignment": Alignment(views=-1.0)}, "views is -1.0"),
    ],
)
def test_values_out_of_range_are_refused_below_the_config_too(change, words) -> None:
    with pytest.raises(UserError, match=words):
        with_strategy(make_algorithm("fedavg", num_clients=2), **change)


def test_one_line_sets_any_combination() -> None:
    line = "strategy={mu: 0.01, weight: profile, prototypes: 0.1, distillation: 0.5}"
    config = make_config({"name": "x"}, [line, "prompt=agnostic", "algorithm=scaffold"])
    assert (config.strategy.mu, config.strategy.prototypes) == (0.01, 0.1)
    assert make_config({"name": "x"}, ["strategy.views=1"]).strategy.views == 1.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"strategy": {"mu": -1}}, "strategy.mu"),
        ({"strategy": {"prototipes": 1}}, "did you mean 'prototypes'"),
        ({"strategy": {"weight": "profil"}}, "did you mean 'profile'"),
        ({"strategy": {"epsilon": 0, "aggregation": 1.0}}, "strategy.epsilon"),
        ({"strategy": {"epsilon": 1.0}}, "no party sends a profile"),
        ({"strategy": {"mu": 0.1}, "topology": "centralised"}, "strategy.mu: topology central"),
        ({"strategy": {"sampling": 1.0}, "topology": "local"}, "strategy.sampling: topology local"),
        ({"strategy": {"momentum": 1.0}}, "strategy.momentum"),
        ({"strategy": {"momentum": 0.9}}, "strategy.momentum: does nothing without strategy.proto"),
        ({"strategy": {"w": 0.2}}, "strategy.w: does nothing without strategy.mu"),
        ({"strategy": {"edge_layers": 3}}, "strategy.edge_layers: does nothing"),
        ({"strategy": {"distillation_target": "hidden"}}, "without strategy.distillation"),
        ({"strategy": {"mu": 1e308}}, "strategy.mu"),
        ({"strategy": {"epsilon": 5e-324, "aggregation": 1.0}}, "strategy.epsilon"),
        ({"strategy": {"views": 1.0}, "topology": "zero-shot"}, "zero-shot trains nothing"),
        ({"strategy": {"mu": 1.0}, "topology": "zero-shot"}, "zero-shot trains nothing"),
        ({"evaluation": {"drift": True}, "topology": "local"}, "no common adapter"),
        ({"strategy": {"temperature": 0}}, "strategy.temperature"),
    ],
)
def test_bad_strategies_are_told(change, words) -> None:
    config, problems = check_config({"name": "x", **change})
    assert config is None
    assert len(problems) == 1
    assert words in problems[0]


def test_a_band_too_wide_is_told_before_anything_is_written(tmp_path, mllm: Mllm) -> None:
    config = small(strategy={"mu": 0.1, "edge_layers": 3})
    with pytest.raises(UserError, match="leave none of 6 decoder layers"):
        run(config, out=tmp_path / "r", mllm=mllm)
    assert not (tmp_path / "r").exists()


def test_drift_is_measured_on_so_many_samples() -> None:
    """Without tests on the way the limit means nothing, but for what drift measures at the end."""
    for drift, different in ((False, 1), (True, 2)):
        cells = [small(evaluation={"every": 0, "drift": drift, "limit": limit}) for limit in (2, 6)]
        assert len({deciding_digest(config) for config in cells}) == different


def test_revisions_name_the_strategies_in_use() -> None:
    assert not any(p.startswith("strategy") for p in revisions_of(small().model_dump()))
    found = revisions_of(small(strategy=EVERYTHING).model_dump())
    assert {"strategy:regularisation", "strategy:profiles", "strategy:alignment"} <= set(found)
    only = revisions_of(small(strategy={"mu": 0.1}).model_dump())
    assert "strategy:alignment" not in only
    assert "strategy:regularisation" in only


# -- whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(mllm: Mllm) -> Shared:
    return Shared(mllm)


@pytest.fixture(scope="module")
def whole(shared: Shared, tmp_path_factory) -> tuple[dict, Path]:
    """A run with everything on, FedAdam, half of the modalities missing."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    config = small(
        "whole",
        algorithm={"name": "fedadam", "eta": 0.01},
        setting="missing-b0.5",
        prompt="agnostic",
        strategy=EVERYTHING,
        evaluation={"every": 0, "conditions": ["both", "image_withheld"], "drift": True},
    )
    return run(config, out=folder, shared=shared), folder


def test_everything_on(whole) -> None:
    result, folder = whole
    line = result["history"][-1]
    assert {"view_loss", "view_cosine", "distillation_loss", "prototype_loss"} < set(
        line["measured"]
    )
    assert {"drift_cosine", "drift_dispersion", "drift_prototype_cosine"} < set(line["measured"])
    assert set(result["modality_alignment"]) == {"image_withheld", "text_withheld", "neither"}
    rows = result["heterogeneity"]["clients"]
    assert [row["id"] for row in rows] == [c["id"] for c in result["manifest"]["clients"]]
    for row in rows:
        assert row["weight"] == pytest.approx(0.1 * row["index"])
        assert row["scale"] > 0
        assert row["chance"] > 0
    assert [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()] == (
        result["history"]
    )


def test_bytes_are_counted_by_part(whole) -> None:
    result, _ = whole
    width, classes, clients = 128, 2, 3
    prototypes = 4 * (classes * width + classes)
    for parts in result["bytes"]["per_client_round"].values():
        assert parts["prototypes"] == prototypes
    lora = result["bytes"]["per_client_round"]["up"]["lora"]
    assert all(line["bytes_up"] == 2 * (lora + prototypes) for line in result["history"])
    assert result["heterogeneity"]["bytes"] == {
        "up": clients * 4 * (4 + classes), "down": clients * 4,
    }  # fmt: skip
    assert result["bytes"]["once"] == {
        way: {"profiles": count} for way, count in result["heterogeneity"]["bytes"].items()
    }
    assert result["bytes"]["up"] == 4 * (lora + prototypes) + clients * 24
    assert result["bytes"]["down"] == 4 * (lora + prototypes) + clients * 4


def test_a_plan_counts_the_same_bytes(whole) -> None:
    result, _ = whole
    facts = make_plan(make_config(result["config"])).to_json()["bytes"]
    assert (facts["up"], facts["down"]) == (result["bytes"]["up"], result["bytes"]["down"])
    assert facts["per_client_round"] == result["bytes"]["per_client_round"]
    assert facts["once"] == result["bytes"]["once"]
    assert any("masked views" in note for note in make_plan(make_config(result["config"])).notes)
    plain = make_plan(replace_strategy(make_config(result["config"]), {})).to_json()["bytes"]
    assert "once" not in plain
    assert "prototypes" not in plain["per_client_round"]["up"]


def test_time_is_taken_from_runs_with_views_alike(whole) -> None:
    result, folder = whole
    config = make_config(result["config"])
    found = [{**result, "_path": str(folder)}]
    assert fitting_rates(found, config) is not None
    assert fitting_rates(found, replace_strategy(config, {"views": 0.1})) is not None
    assert fitting_rates(found, replace_strategy(config, {"prototypes": 0.1})) is None


def test_it_goes_on_to_the_same_bits(whole, shared: Shared, tmp_path) -> None:
    result, folder = whole
    shutil.copytree(folder, tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / "state" / "round-000002")
    (tmp_path / "r" / "result.json").unlink()
    config = make_config(result["config"])
    again = run(config, out=tmp_path / "r", resume=True, shared=shared)
    for key in ("loss", "measured", "clients", "metrics"):
        assert again["history"][-1][key] == result["history"][-1][key]
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "r" / name).read_bytes() == (folder / name).read_bytes()
    assert again["metrics"] == result["metrics"]


def test_the_report_draws_the_parties(whole, tmp_path) -> None:
    result, folder = whole
    found, problems = load_results([folder])
    assert problems == []
    assert strategy_of(found[0]) == "prompt + regularisation + profiles + prototypes + " + (
        "distillation + views + whole samples"
    )
    page = write_report(found, tmp_path / "report.html").read_text()
    assert "How the server sees the parties" in page
    row = result["heterogeneity"]["clients"][0]
    assert f"{row['weight']:.3f}" in page
    bare, _ = load_results([folder])
    del bare[0]["heterogeneity"]
    assert "How the server sees" not in write_report(bare, tmp_path / "b.html").read_text()


@pytest.mark.parametrize(
    "harm",
    [
        {"heterogeneity": []},
        {"heterogeneity": {"clients": [{"id": 3}]}},
        {"heterogeneity": {"clients": [{"id": "a", "image_text": -1}]}},
        {"heterogeneity": {"clients": [{"id": "a", "weight": "much"}]}},
    ],
)
def test_a_broken_heterogeneity_is_a_fault(whole, harm, tmp_path) -> None:
    result = whole[0] | harm
    result["result_sha256"] = result_digest(result)  # nothing else is wrong with it
    (tmp_path / "result.json").write_text(json.dumps(result))
    with pytest.raises(UserError, match="heterogeneity"):
        load_results([tmp_path / "result.json"])


def test_scaffold_in_the_cross_scenario(shared: Shared, tmp_path) -> None:
    """Everything on again, two clients in a pass and one alone; no client has a whole sample."""
    config = small(
        "cross",
        algorithm="scaffold",
        setting="cross-i5t5",
        strategy={**EVERYTHING, "epsilon": None},
    )
    result = run(config, out=tmp_path / "a", shared=shared)
    rows = result["heterogeneity"]["clients"]
    assert {row["index"] for row in rows} == {1.0}
    assert all("view_loss" not in line.get("measured", {}) for line in result["history"])
    assert result["history"][-1]["measured"]["prototype_loss"] > 0
    together = config.model_copy(
        update={"training": config.training.model_copy(update={"clients_at_once": 2})}
    )
    second = run(together, out=tmp_path / "b", shared=shared)
    for one, other in zip(result["history"], second["history"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert (one.get("measured") or {}) == pytest.approx(other.get("measured") or {}, rel=1e-2)
        assert one["clients"] == other["clients"]


@pytest.mark.parametrize("change", [{"aggregation": 3.0}, {"momentum": 0.0}])
def test_an_option_reaches_the_run(shared: Shared, tmp_path, change) -> None:
    """The same run with and without it ends in another adapter."""
    base = {"prototypes": 1.0} if "momentum" in change else {}
    results = []
    for name, strategy in (("a", base), ("b", {**base, **change})):
        config = small(
            name,
            setting="missing-b0.5",
            strategy=strategy,
            training={"rounds": 3, "clients_per_round": 3, "lr": 0.003},
        )
        results.append(run(config, out=tmp_path / name, shared=shared))
    first, second = (result["history"][2]["loss"] for result in results)
    assert first != second


def test_noise_reaches_the_profiles(shared: Shared, tmp_path) -> None:
    counts = []
    for name, epsilon in (("a", None), ("b", 0.1)):
        strategy = {"aggregation": 1.0, "epsilon": epsilon}
        config = small(name, training={"rounds": 1, "clients_per_round": 1}, strategy=strategy)
        found = run(config, out=tmp_path / name, shared=shared)["heterogeneity"]
        counts.append([row["labels"] for row in found["clients"]])
        assert found["bytes"]["down"] == 0  # no weight of a regulariser goes back
    assert counts[0] != counts[1]


def test_alone_each_party_states_its_own(shared: Shared, tmp_path) -> None:
    """A local run's measures are means over its parties."""
    config = small("local", topology="local", strategy={"views": 0.5})
    result = run(config, out=tmp_path / "r", shared=shared)
    files = sorted((tmp_path / "r").glob("metrics-*.jsonl"))
    lines = [json.loads(file.read_text().splitlines()[0]) for file in files]
    stated = [line["measured"]["view_loss"] for line in lines]
    assert len(set(stated)) == 3
    assert result["history"][0]["measured"]["view_loss"] == pytest.approx(sum(stated) / 3)


def test_views_end_where_the_shortened_answer_ends(shared: Shared) -> None:
    """An image takes room from an answer that a view without it would keep."""
    config = small(
        data={"name": "medical", "train": 8, "test": 4, "flashcards": 8},
        partition={"clients": 2, "name": "even"},
        training={"rounds": 1, "max_length": 35, "long_text": "shorten"},
        strategy={"distillation": 0.5},
    )
    data = shared.dataset(config)
    items = [shared.encode(config, data.task, sample) for sample in data.train]
    assert any(item.shortened for item in items)
    assert all(view.answer == item.answer for item in items for view in item.views)


def test_distillation_on_open_questions(shared: Shared, tmp_path) -> None:
    """A view without its image keeps its question; flashcards have no views."""
    config = small(
        "open",
        data={"name": "medical", "train": 8, "test": 4, "flashcards": 8},
        setting="aligned-a0.5",
        training={"rounds": 1, "clients_per_round": 2},
        partition={"clients": 2, "name": "even"},
        strategy={"distillation": 0.5, "views": 0.5},
    )
    result = run(config, out=tmp_path / "r", shared=shared)
    assert result["history"][0]["measured"]["distillation_loss"] > 0
    wrong = replace_strategy(config, {"prototypes": 0.1})
    with pytest.raises(UserError, match="open questions"):
        run(wrong, out=tmp_path / "s", shared=shared)
    assert not (tmp_path / "s").exists()


def replace_strategy(config: Config, strategy) -> Config:
    return make_config(config.model_dump(mode="json") | {"strategy": strategy})
