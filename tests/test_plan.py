"""Plans: counts against hand formulas, bytes against real runs, memory terms against autograd."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from real_configs import CONFIGS
from test_tracing import layer_by_hand

from fedmllm.algorithms import ALGORITHMS
from fedmllm.cli import main
from fedmllm.config import make_config
from fedmllm.data.images import ImageFile
from fedmllm.errors import UserError
from fedmllm.experiment import run
from fedmllm.plan import make_plan, parse_size
from fedmllm.plan import memory as memory_terms
from fedmllm.plan.memory import (
    Load,
    Shapes,
    feature_cache,
    seen_in_training,
    shapes_of,
    tower,
)
from fedmllm.plan.structure import build_skeleton, weight_bytes
from fedmllm.plan.timing import read_besides, trained_samples
from fedmllm.plan.timing import tested_samples as count_tested

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import memory as memory_benchmark  # noqa: E402

NOTHING = dict.fromkeys(("lora", "connector", "embeddings", "vision_lora"), 0)
SMALL = {
    "name": "small",
    "data": {"name": "memes", "train": 40, "test": 16},
    "partition": {"clients": 4},
    "training": {"rounds": 2, "clients_per_round": 3},
    "evaluation": {"every": 0, "conditions": ["both"]},
}


# -- real models, counted by hand ------------------------------------------------------------


@dataclass(frozen=True)
class Decoder:
    """Sizes of a Llama or Qwen2 decoder."""

    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    bias: bool = False  # on q, k, v
    tied: bool = False

    @property
    def kv_width(self) -> int:
        return self.width // self.heads * self.kv_heads

    @property
    def matrices(self) -> list[int]:
        """Weights of each linear matrix of a layer."""
        q, k, mlp = self.width**2, self.width * self.kv_width, self.width * self.inner
        return [q, k, k, q, mlp, mlp, mlp]

    @property
    def parameters(self) -> int:
        layer = sum(self.matrices) + 2 * self.width
        layer += (self.width + 2 * self.kv_width) * self.bias
        return self.layers * layer + self.width

    def adapter(self, rank: int) -> dict[str, int]:
        wide, narrow = 2 * self.width, self.width + self.kv_width
        sizes = {"q_proj": wide, "k_proj": narrow, "v_proj": narrow, "o_proj": wide}
        return {name: self.layers * rank * size for name, size in sizes.items()}


def encoder(width: int, inner: int, layers: int) -> int:
    """Layers of a SigLIP or CLIP encoder: four projections, an MLP, two norms, all with biases."""
    attention, mlp = 4 * (width**2 + width), 2 * width * inner + inner + width
    return layers * (attention + mlp + 4 * width)


def minicpm(queries: int, width: int) -> dict[str, int]:
    tower = 3 * 14 * 14 * 1152 + 1152 + 70 * 70 * 1152 + encoder(1152, 4304, 27) + 2 * 1152
    attention = 3 * width**2 + 3 * width + width**2 + width
    return {
        "vision tower": tower,
        "connector": queries * width + 1152 * width + attention + 6 * width + width**2,
    }


QWEN2VL_MERGER = 2 * 1280 + (5120**2 + 5120) + 5120 * 1536 + 1536  # inside the tower's module


def qwen2vl_tower() -> int:
    layer = 4 * 1280 + (1280 * 3840 + 3840) + (1280**2 + 1280) + 2 * 1280 * 5120 + 5120 + 1280
    return 3 * 2 * 14 * 14 * 1280 + 32 * layer


@dataclass(frozen=True)
class Real:
    """A published model: its config.json, its decoder, its other parts, its published size."""

    config: dict[str, Any]
    decoder: Decoder
    parts: dict[str, int]
    published: int | None = None


REAL = {
    "MiniCPM-V-2.6": Real(
        CONFIGS["MiniCPM-V-2.6"],
        Decoder(3584, 18944, 28, 28, 4, 151666, bias=True),
        minicpm(64, 3584),
    ),
    "MiniCPM-Llama3-V-2.5": Real(
        CONFIGS["MiniCPM-Llama3-V-2.5"], Decoder(4096, 14336, 32, 32, 8, 128256), minicpm(96, 4096)
    ),
    "SmolVLM-256M": Real(
        CONFIGS["SmolVLM-256M"],
        Decoder(576, 1536, 30, 9, 3, 49280),
        {
            "vision tower": 3 * 256 * 768 + 768 + 32**2 * 768 + encoder(768, 3072, 12) + 2 * 768,
            "connector": 16 * 768 * 576,
        },
        published=256_484_928,
    ),
    "Qwen2-VL-2B": Real(
        CONFIGS["Qwen2-VL-2B"],
        Decoder(1536, 8960, 28, 12, 2, 151936, bias=True, tied=True),
        {"vision tower": qwen2vl_tower(), "connector": QWEN2VL_MERGER},
        published=2_208_985_600,
    ),
    "LLaVA-1.5-7B": Real(
        CONFIGS["LLaVA-1.5-7B"],
        Decoder(4096, 11008, 32, 32, 32, 32064),
        {
            "vision tower": 1024 + 3 * 196 * 1024 + 577 * 1024 + encoder(1024, 4096, 24) + 4096,
            "connector": 1024 * 4096 + 4096 + 4096**2 + 4096,
        },
        published=7_063_427_072,
    ),
}


TRACED: dict[Any, Any] = {}


@pytest.fixture(autouse=True)
def _remembered(monkeypatch) -> None:
    """The same model and batch are traced once in all tests of this file."""

    def once(trace: Any) -> Any:
        def remembering(skeleton: Any, batch: Any, **options: Any) -> Any:
            facts = (skeleton.config.to_json_string(), str(skeleton.policy), str(skeleton.model))
            key = (trace.__name__, *facts, batch, *options.items())
            if key not in TRACED:
                TRACED[key] = trace(skeleton, batch, **options)
            return TRACED[key]

        return remembering

    for name in ("trace_step", "trace_test"):
        monkeypatch.setattr(memory_terms, name, once(getattr(memory_terms, name)))


@pytest.fixture
def folder(tmp_path):
    """Makes a folder that holds nothing but a config.json."""

    def make(config: dict[str, Any]):
        made = tmp_path / "model"
        made.mkdir(exist_ok=True)
        (made / "config.json").write_text(json.dumps(config))
        return made

    return make


def planned(folder, *overrides: str, **options: Any):
    raw = {**SMALL, "model": {"name": "real", "path": str(folder)}}
    return make_plan(make_config(raw, overrides), **options)


@pytest.mark.parametrize("policy", ["paper", "reference"])
@pytest.mark.parametrize("name", REAL)
def test_real_models_are_counted_to_the_parameter(name, policy, folder) -> None:
    real = REAL[name]
    decoder = real.decoder
    options = (f"trained.name={policy}", "training.rounds=25", "training.clients_per_round=2")
    found = planned(folder(real.config), *options)
    words = decoder.vocab * decoder.width
    expected = {
        **real.parts,
        "embeddings": words,
        "language model": decoder.parameters,
        "output head": 0 if decoder.tied else words,
    }
    facts = found.to_json()
    assert facts["parameters"]["base_components"] == expected
    assert facts["parameters"]["base"] == sum(expected.values())
    assert real.published in (None, sum(expected.values()))
    adapter = decoder.adapter(8)
    modules = facts["parameters"]["trainable_modules"]
    lora = {name.rsplit(".", 1)[1]: n for name, n in modules.items() if ".self_attn." in name}
    assert lora == adapter
    trained = {**NOTHING, "lora": sum(adapter.values())}
    if policy == "reference":  # the embeddings once, whether or not the head shares them
        trained |= {"connector": real.parts["connector"], "embeddings": words}
    total = sum(trained.values())
    each = {component: 4 * count for component, count in trained.items()}
    assert sum(modules.values()) == total
    assert facts["parameters"]["trainable"] == total
    assert facts["parameters"]["trainable_components"] == trained
    assert facts["bytes"] == {
        "up": 200 * total,
        "down": 200 * total,
        "per_round": {"up": 8 * total, "down": 8 * total},
        "per_client_round": {"up": each, "down": each},
        "clients_per_round": 2,
        "rounds": 25,
    }


def test_the_papers_setting(folder) -> None:
    """28 layers x 4 projections x rank 8: 20 MB a client each way; 32 layers: 27 MB."""
    for name, millions in (("MiniCPM-V-2.6", 5.046272), ("MiniCPM-Llama3-V-2.5", 6.815744)):
        found = planned(folder(REAL[name].config), "lora.rank=8")
        assert found.skeleton.trainable == round(millions * 1e6)
        assert len(found.skeleton.adapter) == REAL[name].decoder.layers * 4 * 2
        assert found.load.slices == 10  # nine cells and the source view


def test_the_authors_policy_sends_the_vocabulary(folder) -> None:
    """2.2 GB of embeddings, 0.3 GB of resampler and 20 MB of LoRA, a client each way."""
    found = planned(folder(REAL["MiniCPM-V-2.6"].config), "trained.name=reference")
    assert found.traffic.parts["up"]["embeddings"] == 151_666 * 3584 * 4 == 2_174_283_776
    assert found.traffic.client_up == found.traffic.client_down
    resampler = minicpm(64, 3584)["connector"]
    assert found.traffic.client_up == 2_174_283_776 + 4 * (resampler + 5_046_272)
    assert found.memory.resident["adapter"] == found.traffic.client_up


# -- bytes are those of a run ----------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold"])
def test_bytes_and_parameters_are_those_of_a_run(algorithm, tmp_path, mllm) -> None:
    config = make_config({**SMALL, "algorithm": algorithm})
    facts = make_plan(config).to_json()
    result = run(config, out=tmp_path / "run", mllm=mllm)
    assert {way: facts["bytes"][way] for way in ("up", "down")} == {
        way: result["bytes"][way] for way in ("up", "down")
    }
    assert result["bytes"]["per_client_round"] == facts["bytes"]["per_client_round"]
    assert facts["bytes"]["per_round"]["up"] == result["history"][0]["bytes_up"]
    assert facts["parameters"]["total"] == result["parameters"]["total"]
    assert facts["parameters"]["trainable"] == result["parameters"]["trainable"]
    assert result["bytes"]["up"] == (2 if algorithm == "scaffold" else 1) * 2 * 3 * 196_608


def test_names_and_shapes_are_those_of_the_loaded_adapter(mllm) -> None:
    found = make_plan(make_config(SMALL)).skeleton.adapter
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in mllm.get_adapter().items()
    }


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_only_scaffold_sends_more_than_the_adapter(algorithm) -> None:
    each = make_plan(make_config({**SMALL, "algorithm": algorithm})).traffic
    twice = 2 if algorithm == "scaffold" else 1
    lora = each.parts["up"]["lora"]
    assert (each.client_up, each.client_down) == (twice * lora, twice * lora)


@pytest.mark.parametrize(
    ("strategy", "parts"),
    [
        ({"recombine": 1, "mixtures": 2}, ["mixtures"]),
        ({"recombine": 1, "evidence": 1.645}, ["evidence"]),
        ({"recombine": 1, "mixtures": 2, "evidence": 0.01}, ["evidence", "mixtures"]),
        ({"fusion": 1.0}, ["profiles"]),
    ],
)
def test_bytes_before_the_first_round_are_those_of_a_run(strategy, parts, tmp_path, mllm) -> None:
    raw = {
        **SMALL,
        "data": {"name": "crisis", "train": 120, "test": 8},
        "partition": {"clients": 6},
        "scenario": {"name": "cross", "images": 3},
        "training": {"rounds": 1, "clients_per_round": 2},
        "strategy": strategy,
    }
    config = make_config(raw)
    plan = make_plan(config, tokens=60)
    facts = run(config, out=tmp_path / "run", mllm=mllm)["bytes"]
    said = plan.to_json()["bytes"]
    assert said["once"] == facts["once"]
    assert sorted(said["once"]["up"]) == parts
    assert (said["up"], said["down"]) == (facts["up"], facts["down"])
    assert any("most that may cross" in note for note in plan.notes) == ("mixtures" in parts)


@pytest.mark.parametrize("topology", ["local", "centralised", "zero-shot"])
def test_nothing_crosses_where_nothing_federates(topology) -> None:
    facts = make_plan(make_config({**SMALL, "topology": topology})).to_json()["bytes"]
    assert (facts["up"], facts["down"], facts["per_round"]) == (0, 0, {"up": 0, "down": 0})
    assert facts["per_client_round"] == {"up": NOTHING, "down": NOTHING}
    assert facts["rounds"] == (0 if topology == "zero-shot" else 2)


def test_ready_parties_are_counted_from_their_files(tmp_path, monkeypatch) -> None:
    (tmp_path / "parties").mkdir()
    turns = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "me"}]
    for name in ("a", "b"):
        item = {"conversations": turns, "image": "never-read.png"}
        (tmp_path / "parties" / f"{name}.json").write_text(json.dumps([item]))
    (tmp_path / "never-read.png").write_text("no picture, and large")
    (tmp_path / "test.json").write_text(json.dumps([{"conversations": turns}]))
    data = {"name": "conversations", "root": str(tmp_path)}
    raw = {**SMALL, "data": data, "training": {"rounds": 1, "clients_per_round": 7}}
    monkeypatch.setattr(ImageFile, "key", property(lambda self: pytest.fail("an image was read")))
    found = make_plan(make_config(raw))
    assert found.traffic.cohort == 2
    assert found.load.generates
    assert found.load.images == 1
    (tmp_path / "test.json").unlink()
    found = make_plan(make_config(raw))
    assert found.traffic.cohort == 4  # of the config's partition
    assert any("the data cannot be read" in note for note in found.notes)


# -- memory ----------------------------------------------------------------------------------


def skeleton_of(folder, dtype: str = "bfloat16"):
    return build_skeleton(folder, rank=8, alpha=8, dropout=0.05, dtype=dtype)


def nf4(matrices: list[int], *, nested: bool) -> tuple[int, int]:
    blocks = [-(-n // 64) for n in matrices]
    scales = sum(b + 4 * -(-b // 256) if nested else 4 * b for b in blocks)
    return sum(-(-n // 2) for n in matrices), scales


def test_four_bit_weights(folder) -> None:
    real = REAL["MiniCPM-V-2.6"]
    skeleton = skeleton_of(folder(real.config))
    matrices = real.decoder.matrices * real.decoder.layers
    half, scales = nf4(matrices, nested=True)
    found = weight_bytes(skeleton, four_bit=True)
    buffers = sum(b.nbytes for b in skeleton.base.buffers())
    plain = 2 * (skeleton.total - sum(matrices)) + buffers
    assert found == {"plain": plain, "nf4": half, "scales": scales}
    assert buffers < 10_000
    assert weight_bytes(skeleton) == {
        "plain": 2 * skeleton.total + buffers,
        "nf4": 0,
        "scales": 0,
    }


def test_a_checkpoint_in_four_bit_says_so_itself(folder) -> None:
    real = REAL["SmolVLM-256M"]
    own = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "llm_int8_skip_modules": ["lm_head", "model.vision_model", "model.connector"],
    }
    skeleton = skeleton_of(folder(real.config | {"quantization_config": own}))
    half, scales = nf4(real.decoder.matrices * real.decoder.layers, nested=False)
    found = weight_bytes(skeleton)
    assert (found["nf4"], found["scales"]) == (half, scales)
    other = {"quant_method": "gptq", "bits": 4}
    found = planned(folder(real.config | {"quantization_config": other}))
    assert any("'gptq'" in note for note in found.notes)
    own["llm_int8_skip_modules"] = None  # all but the head
    own["bnb_4bit_use_double_quant"] = True
    tower = [768 * 768] * 4 + [768 * 3072] * 2
    every = real.decoder.matrices * real.decoder.layers + tower * 12 + [16 * 768 * 576]
    found = weight_bytes(skeleton_of(folder(real.config | {"quantization_config": own})))
    assert (found["nf4"], found["scales"]) == nf4(every, nested=True)


SHAPES = Shapes(D=96, F=320, E=8, G=16, N=4, M=2, p=1200, image_tokens=4)


def test_memory_grows_with_what_it_depends_on() -> None:
    config = make_config(SMALL)
    base = make_plan(config, tokens=100)
    more = make_plan(config, tokens=200)
    one = make_plan(make_config(SMALL, ["training.micro_batch=1"]), tokens=100)
    kept = [p.memory.phases["training"]["activations"] for p in (base, more, one)]
    assert 1.9 < kept[1] / kept[0] < 2.1
    assert 7 < kept[0] / kept[2] < 9  # alone a sample has no padding and needs no mask
    frugal = make_plan(make_config(SMALL, ["model.gradient_checkpointing=true"]), tokens=100)
    assert frugal.memory.peak < base.memory.peak
    pictures = 28  # each of the memes' stands with two texts
    assert base.memory.resident["image features"] == pictures * 16 * 128 * 4
    sgd = make_plan(make_config(SMALL, ["training.optimizer=sgd"]), tokens=100)
    assert sgd.memory.phases["training"]["optimiser"] == 0
    assert base.memory.phases["training"]["optimiser"] == 8 * 49_152
    assert base.load.tokens == 100
    assert make_plan(config).load.tokens == 1024  # the positions that the model has


def test_features_stay_within_the_caches_budget() -> None:
    load = Load(tokens=1, slices=1, batch=1, test_batch=1, dropout=0.0)
    assert feature_cache(SHAPES, load) == 512 * 2**20
    assert feature_cache(SHAPES, replace(load, images=10**9)) == 512 * 2**20
    assert feature_cache(SHAPES, replace(load, images=10**9, feature_memory=10**6)) == 10**6
    given = make_plan(make_config(SMALL, ["model.feature_memory_gb=0.000001"]), tokens=100)
    picture = 16 * 128 * 4  # one is kept, though it is larger
    assert given.memory.resident["image features"] == picture
    few = replace(load, images=3, slices=2)
    assert feature_cache(SHAPES, few) == 3 * 2 * 4 * 96 * 4
    patches = 3 * 2 * SHAPES.N
    tower = replace(few, connector=True)  # its output
    assert feature_cache(SHAPES, tower) == patches * SHAPES.E * 4
    assert feature_cache(SHAPES, replace(tower, itemsize=2)) == patches * SHAPES.E * 2
    assert feature_cache(SHAPES, replace(tower, vision=True)) == patches * 1200


def test_a_trained_connector_pays_for_itself_and_a_trained_tower_for_all() -> None:
    load = Load(tokens=1, slices=2, batch=3, test_batch=1, dropout=0.0, connector=True)
    patches, connector = 3 * 2 * 4, 4 * (8 + 5 * 96)
    assert seen_in_training(SHAPES, load) == (patches * (connector + 4 * 8), 0)
    tower = replace(load, vision=True)
    layer = 4 * (6 * 8 + 16) + 4 * 4 * 8
    assert seen_in_training(SHAPES, tower) == (patches * (connector + 2 * layer + 1200), 0)
    dropped = replace(tower, dropout=0.1, cuda=True)
    more = patches * 2 * 4 * 8  # a byte a number of four inputs, two layers
    assert seen_in_training(SHAPES, dropped)[0] == seen_in_training(SHAPES, tower)[0] + more
    frugal = seen_in_training(SHAPES, replace(tower, checkpointing=True))
    assert frugal == (patches * (connector + 2 * 4 * 8 + 1200), patches * layer)


def test_the_plan_is_within_a_fifth_of_the_committed_measurements(tmp_path) -> None:
    """Peaks as planned by this code against the measured ones; the arithmetic alone, too, where
    lengths are known and a case takes more than 200 MB beside the libraries."""
    facts = json.loads((ROOT / "results" / "memory.json").read_text())
    assert {case["model"] for case in facts["cases"]} == {"embedded", "tiny", "100M"}
    assert len(facts["cases"]) >= 12
    folders = {name: folder_of(name, tmp_path) for name in memory_benchmark.MODELS}
    for row in facts["cases"]:
        names = ("model", "phase", "batch", "tokens", "dtype", "dropout", "quantization")
        case = memory_benchmark.Case(**{name: row[name] for name in names})
        runtime = row["planned"]["runtime"]
        parameters, terms = memory_benchmark.plan_of(case, folders[case.model], runtime)
        assert parameters == row["parameters"]
        peak = memory_benchmark.total(terms)
        assert abs(peak / row["measured_bytes"] - 1) < 0.2, row["name"]
        planned = memory_benchmark.total(row["planned"]) - row["planned"].get("allocator", 0)
        floor = runtime + row["planned_live_bytes"] - planned  # libraries, second measurement
        beside = row["measured_live_bytes"] - floor
        live = peak - terms.get("allocator", 0) - runtime
        if case.phase != "run" and beside > 200e6:
            assert abs(live / beside - 1) < 0.2, row["name"]


def folder_of(name: str, folder: Path) -> Path:
    """The benchmark's model without weights."""
    made = folder / name
    memory_benchmark.model_config(name).save_pretrained(made)
    return made


def test_terms_of_a_real_model_by_hand(folder) -> None:
    """MiniCPM-V-2.6 in 4 bit and bfloat16: 151,666 words, images of 10 x 1,024 patches."""
    options = ("model.device=cuda", "model.dtype=bfloat16", "model.quantization=nf4")
    sizes = ("training.micro_batch=1", "evaluation.batch_size=8", "training.max_length=1200")
    found = planned(folder(REAL["MiniCPM-V-2.6"].config), *options, *sizes)
    training, tests = (found.memory.phases[name] for name in ("training", "testing"))
    assert training["unpacked 4-bit matrix"] == 2 * 3584 * 18_944
    kept = 1200 * 28 * layer_by_hand(3584, 18_944, 28, 28 * 128, itemsize=2, mask=1)
    # alone a sample needs no mask, and the keys and values of 4 heads are not repeated to 28
    kept -= 1200 * 28 * 2 * 2 * 24 * 128
    assert 0.98 < training["activations"] / kept < 1
    inner = 8 * 1200 * 2 * 3 * 18_944  # of the MLP, in which a test has most
    assert inner < tests["activations"] < 1.3 * inner
    patch = 2 * (1152 + 5 * 3584) + 3 * 4 * 3 * 14 * 14  # the connector is the widest
    assert found.memory.phases["image encoding"] == {"tower": 10_240 * patch}
    assert feature_cache(shapes_of(found.skeleton, tokens=1200), found.load) == 28 * (
        10 * 64 * 3584 * 2
    )


def test_the_tower_by_hand() -> None:
    """Two slices of four patches; each of the three parts is once the widest."""
    load = Load(tokens=1, slices=2, batch=3, test_batch=1, dropout=0.0)
    assert tower(SHAPES, load) == 8 * (4 * (8 + 5 * 96) + 3600)
    narrow = replace(SHAPES, D=1)
    assert tower(narrow, load) == 8 * (4 * (5 * 8 + 2 * 16) + 3600)
    assert tower(replace(narrow, rotates=True), load) == 8 * (4 * 5 * 8 + 4 * 6 * 8 + 3600)
    assert tower(SHAPES, replace(load, itemsize=2)) == 8 * (2 * (8 + 5 * 96) + 3600)


def test_on_a_gpu_main_memory_holds_the_rest(folder) -> None:
    real = folder(REAL["MiniCPM-V-2.6"].config)
    options = ("model.device=cuda", "model.dtype=bfloat16", "training.micro_batch=1")
    found = planned(real, *options, "model.quantization=nf4", memory=parse_size("24GB"))
    assert set(found.memory.resident) == {"weights", "adapter"}
    assert found.memory.host is not None
    assert found.memory.host > found.memory.resident["weights"]
    assert found.memory.resident["weights"] < 7e9
    full = planned(real, *options, memory=parse_size("16GB"))
    assert full.fits is False
    assert "will not fit" in full.warnings[0]
    assert "4 bit" in full.warnings[0]


def test_what_does_not_fit_is_said_with_what_to_change() -> None:
    config = make_config(SMALL)
    peak = make_plan(config).memory.peak
    roomy = make_plan(config, memory=100 * peak)
    assert roomy.fits
    assert not roomy.warnings
    tight = make_plan(config, memory=peak * 11 // 10)
    assert tight.fits
    assert "may not fit" in tight.warnings[0]
    small = make_plan(config, memory=peak * 9 // 10)
    assert small.fits is False
    assert "will not fit" in small.warnings[0]
    assert "training.micro_batch" in small.warnings[0]
    tested = make_config(SMALL, ["evaluation.batch_size=600"])
    assert "evaluation.batch_size" in make_plan(tested, memory=peak).warnings[0]
    long = make_plan(config, tokens=40, slices=3, memory=100 * peak)
    assert "48 tokens" in long.warnings[0]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("24GB", 24 * 10**9),
        ("24GiB", 24 * 2**30),
        ("512 MiB", 2**29),
        ("1.5 mb", 1_500_000),
        ("80g", 80 * 10**9),
        ("12345", 12345),
    ],
)
def test_sizes_are_read(text, count) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GB", "24XB", "-1GB", "0GB", "1e9", "24GB extra"])
def test_other_words_are_no_sizes(text) -> None:
    with pytest.raises(UserError, match="write it like 24GB"):
        parse_size(text)


# -- time ------------------------------------------------------------------------------------


def test_time_comes_from_a_measured_run_or_not_at_all(tmp_path, mllm, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = make_config(SMALL)
    assert make_plan(config).time is None
    result = run(config, out=tmp_path / "runs" / "small", mllm=mllm)
    found = make_plan(config).time
    assert found is not None
    assert found.train_seconds == pytest.approx(result["time"]["train_seconds"])
    assert found.test_seconds == pytest.approx(result["time"]["evaluate_seconds"])
    held = {client["id"]: client["samples"] for client in result["manifest"]["clients"]}
    trained = sum(held[name] for line in result["history"] for name in line["clients"])
    rate = result["time"]["train_seconds"] / trained
    assert found.seconds_per_trained_sample == pytest.approx(rate)
    longer = make_plan(make_config(SMALL, ["topology=centralised", "training.local_epochs=3"])).time
    assert longer is not None
    assert longer.train_seconds == pytest.approx(rate * 40 * 2 * 3)
    for other in ("lora.rank=4", "threads=2", "data.name=crisis", "model.dtype=bfloat16"):
        assert make_plan(make_config(SMALL, [other])).time is None, other
    with pytest.raises(UserError, match=r"no readable result\.json"):
        make_plan(config, measured=tmp_path / "nowhere")


def test_tested_samples() -> None:
    raw = {**SMALL, "training": {"rounds": 6}}
    raw["evaluation"] = {"every": 2, "limit": 10, "conditions": ["both", "neither"]}
    assert count_tested(make_config(raw), 16, clients=4) == 2 * 10 + 2 * 16  # after 2 and 4
    assert count_tested(make_config(raw, ["topology=local"]), 16, clients=4) == 4 * 2 * 16
    assert count_tested(make_config(raw, ["topology=zero-shot"]), 16, clients=4) == 2 * 16


def test_samples_that_are_read_besides_the_tests() -> None:
    """A quarter, rounded up, of 8 and of 10 held out; four readings of 10 for drift; each sample
    through either modality for evidence, at most 128 of a party."""
    raw = {**SMALL, "training": {"rounds": 6}}
    raw["evaluation"] = {"held_out": 0.25, "drift": True, "limit": 10}
    sizes = {"a": 8, "b": 10}
    assert read_besides(make_config(raw), sizes, 16) == 2 + 3 + 4 * 10
    asked = make_config(raw, ["strategy={recombine: 1.0, evidence: 1.0}"])
    assert read_besides(asked, {**sizes, "c": 500}, 16) == 2 + 3 + 125 + 40 + 2 * (8 + 10 + 128)
    raw["evaluation"] = {"held_out": 0.25}
    assert read_besides(make_config(raw, ["topology=local"]), sizes, 16) == 2 + 3
    raw["topology"] = "centralised"
    assert trained_samples(make_config(raw), sizes) == 6 * (6 + 7)


def test_late_fusion_reads_a_whole_question_three_times() -> None:
    raw = {**SMALL, "training": {"rounds": 6}, "strategy": {"fusion": 1.0}}
    raw["evaluation"] = {"every": 2, "limit": 10, "conditions": ["both", "neither"]}
    assert count_tested(make_config(raw), 16, clients=4) == 2 * 30 + 3 * 16 + 16
    raw["evaluation"]["conditions"] = ["neither"]
    assert count_tested(make_config(raw), 16, clients=4) == 2 * 30 + 16


# -- the command -----------------------------------------------------------------------------


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """`fedmllm plan FILE words…` in this process: (exit code, stdout, stderr)."""
    file = tmp_path / "small.yaml"
    file.write_text(json.dumps(SMALL))

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedmllm", "plan", str(file), *map(str, words)])
        monkeypatch.setenv("COLUMNS", "100")
        code = 0
        try:
            main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def test_the_command_prints_a_table_or_json(cli) -> None:
    code, text, error = cli("--memory", "64GB")
    assert (code, error) == (0, "")
    for word in ("2,279,168", "49,152", "196,608", "1,179,648", "estimate", "q_proj"):
        assert word in text, word
    code, text, _ = cli("--json", "--memory", "64GB", "algorithm=scaffold")
    assert code == 0
    facts = json.loads(text)
    assert facts["bytes"]["up"] == 2 * 1_179_648
    assert facts["memory"]["available"] == {"bytes": 64 * 10**9, "kind": "given"}
    assert facts["memory"]["fits"] is True
    code, text, _ = cli("--memory", "100MB")
    assert code == 0
    assert "will not fit" in text


LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 2}
SMOL = REAL["SmolVLM-256M"].config
BAD = {
    "no JSON": ("{", "config.json"),
    "a list": ("[1]", "config.json"),
    "no model type": ("{}", "config.json"),
    "an unknown type": ('{"model_type": "nothing-such"}', "nothing-such"),
    "a model without images": (json.dumps(LLAMA), "config.json"),
    "a size that is a word": (
        json.dumps(SMOL | {"text_config": {"model_type": "llama", "hidden_size": "wide"}}),
        "config.json",
    ),
    "no heads": (
        json.dumps(SMOL | {"text_config": {"model_type": "llama", "num_attention_heads": 0}}),
        "config.json",
    ),
    "a tower of negative width": (
        json.dumps(
            SMOL | {"vision_config": {"model_type": "idefics3_vision", "hidden_size": -768}}
        ),
        "config.json",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_model_files_end_with_code_two(case, cli, folder) -> None:
    text, expected = BAD[case]
    made = folder({})
    (made / "config.json").write_text(text)
    code, out, error = cli("model.name=mine", f"model.path={made}")
    assert (code, out) == (2, "")
    assert error.startswith("error: ")
    assert expected in error
    assert "Traceback" not in error


def test_other_mistakes(cli, tmp_path) -> None:
    code, _, error = cli("model.name=hub", "model.path=openbmb/MiniCPM-V-2_6")
    assert code == 2
    assert "put the model's config.json" in error
    (tmp_path / "empty").mkdir()
    code, _, error = cli("model.name=mine", f"model.path={tmp_path / 'empty'}")
    assert code == 2
    assert "has no config.json" in error
    code, _, error = cli("--memory", "plenty")
    assert code == 2
    assert "24GB" in error
    code, _, error = cli("model.device=abacus")
    assert code == 2
    assert "abacus" in error
    code, _, error = cli("--measured", tmp_path / "empty")
    assert code == 2
    assert "result.json" in error
    assert cli("--tokens", "0")[0] == 2
    assert cli("training.rounds=-1")[0] == 2
