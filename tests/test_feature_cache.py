"""What a frozen tower gives is computed once: in a step, in a run, in a grid, across processes.

Oracle of every cached number: the same model without a cache, from pixels. Files: real kills, real
writers beside each other, real damage.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_cli import call
from test_families import TALL, WIDE
from tiny_models import TINY, make_model
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

import fedmllm
from fedmllm.config import config_hash, make_config
from fedmllm.data.images import ImageFile, MemoryImage
from fedmllm.data.sample import Sample, Task
from fedmllm.errors import UserError
from fedmllm.experiment import load_model, run, spare_tower
from fedmllm.models import feature_files as files
from fedmllm.models import feature_store, features
from fedmllm.models.components import Policy
from fedmllm.models.feature_store import FeatureStore, identity, read_entry
from fedmllm.models.features import FeatureCache, ImageFeatures, look
from fedmllm.models.mllm import Mllm
from fedmllm.models.replay import Blank, NotRecordedError, blank_floats
from fedmllm.prompts import render

FROZEN = Policy()
CONNECTOR = Policy(connector="full", embeddings="full")
OPEN = Task("vqa", "open", "accuracy")
SOURCE = Path(fedmllm.__file__).parent.parent


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """The cache of these tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fedmllm" / "features"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[ImageFile]:
    root = tmp_path_factory.mktemp("pictures")
    WIDE.open().save(root / "wide.png")
    TALL.open().save(root / "tall.png")
    return [ImageFile("wide.png", root), ImageFile("tall.png", root)]


@pytest.fixture(scope="module", params=sorted(TINY))
def folder(request, tmp_path_factory) -> tuple[str, Path]:
    return request.param, make_model(request.param, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def idefics(tmp_path_factory) -> Path:
    return make_model("idefics3", tmp_path_factory.mktemp("idefics3"))


def load(path: Path, policy: Policy, cache: str = "disk", **options: Any) -> Mllm:
    mllm = Mllm.load("tiny", path, rank=2, policy=policy, feature_cache=cache, **options)
    params = mllm.init_adapter(0)
    for i, (name, value) in enumerate(params.items()):  # a connector that has moved
        value += torch.randn(value.shape, generator=torch.Generator().manual_seed(i)) * 0.1
        params[name] = value
    mllm.set_adapter(params)
    return mllm


def samples(pictures: list[ImageFile]) -> list[Sample]:
    wide, tall = pictures
    return [
        Sample(id="wide", question="what is it?", answer="red", image=wide),
        Sample(id="text", question="no picture here", answer="a tree"),
        Sample(id="tall", question="and this?", answer="7", image=tall),
    ]


def step(mllm: Mllm, pictures: list[ImageFile]) -> dict[str, torch.Tensor]:
    """Loss and gradients of a mixed batch in training, with dropout."""
    items = [mllm.encode(render(sample, OPEN)) for sample in samples(pictures)]
    mllm.model.zero_grad(set_to_none=True)
    with mllm.training(3):
        loss = mllm.loss_sum(items)
        loss.backward()
    found = {n: p.grad.clone() for n, p in mllm.trainable.items() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Passes:
    """Counts how often the first weights of the tower are used."""

    def __init__(self, mllm: Mllm) -> None:
        self.count = 0
        leaf = next(m for part in mllm._parts for m in part.modules() if m._parameters)
        leaf.register_forward_hook(self._add)

    def _add(self, *_: Any) -> None:
        self.count += 1


# -- the numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [FROZEN, CONNECTOR], ids=["frozen", "connector"])
def test_cached_is_uncached_to_the_last_bit(folder, pictures, policy, monkeypatch) -> None:
    """In memory, from disk in another model object, and with the tower gone; pixels are the oracle.

    Each picture passes the tower once in all of it.
    """
    plain = load(folder[1], policy, "memory")
    seen = {
        source.key: features.see(
            plain.base, plain.processor, plain.family, source.open(), keeps="pixels"
        )
        for source in pictures
    }
    monkeypatch.setattr(plain, "image_features", lambda source: seen[source.key])
    monkeypatch.setattr(Policy, "sees", property(lambda _: True))  # pixels in every step
    expected = step(plain, pictures)
    monkeypatch.undo()

    monkeypatch.setenv("XDG_CACHE_HOME", str(pictures[0].root / f"{folder[0]} {policy}"))
    first = load(folder[1], policy)
    passes = Passes(first)
    assert same(step(first, pictures), expected)
    assert same(step(first, pictures), expected)
    assert passes.count == 2
    for source in pictures:
        assert bool(first.image_features(source).recorded) == (policy is CONNECTOR)

    second = load(folder[1], policy)
    assert second.drop_tower(samples(pictures)) > 0
    monkeypatch.setattr(second, "_see", None)
    assert same(step(second, pictures), expected)
    assert same(step(second, pictures), expected)


@pytest.mark.parametrize("name", ["idefics3", "qwen3_vl", "minicpmv4_6"])
def test_gradient_checkpointing_plays_back_alike(name, pictures, tmp_path) -> None:
    path = make_model(name, tmp_path / "model")
    expected = step(load(path, CONNECTOR, "memory"), pictures)
    frugal = load(path, CONNECTOR, "memory", gradient_checkpointing=True)
    found = step(frugal, pictures)
    assert frugal.image_features(pictures[0]).recorded
    for key_, value in expected.items():
        torch.testing.assert_close(found[key_], value, msg=key_)


def test_the_store_is_off_where_the_tower_trains(idefics, pictures, home) -> None:
    trained = load(idefics, Policy(vision="lora"))
    passes = Passes(trained)
    step(trained, pictures)
    step(trained, pictures)
    assert passes.count == 2 + 2 * 2  # to encode, and in each step
    assert trained.features.store is None
    assert trained.drop_tower() == 0
    assert not home.exists()


def test_an_unknown_place_is_refused(idefics) -> None:
    with pytest.raises(UserError, match=r"unknown feature cache 'dsk'.*memory"):
        load(idefics, FROZEN, "dsk")


def test_drawings_stay_in_memory(idefics, home) -> None:
    mllm = load(idefics, FROZEN)
    found = mllm.image_features(WIDE)
    assert mllm.image_features(WIDE) is found
    mllm.image_features(MemoryImage("sha256:red", WIDE.make))
    assert not list(home.rglob("*.safetensors"))


def test_what_cannot_be_played_back_is_computed_from_pixels(idefics, pictures, monkeypatch) -> None:
    oracle = load(idefics, CONNECTOR, "memory")
    expected = step(oracle, pictures)

    def fails(*_: Any) -> Any:
        raise NotRecordedError("no")

    monkeypatch.setattr(features, "pruned", fails)
    mllm = load(idefics, CONNECTOR)
    assert same(step(mllm, pictures), expected)
    assert mllm.image_features(pictures[0]).recorded == ()
    again = load(idefics, CONNECTOR)
    monkeypatch.setattr(again, "_see", None)
    assert same(step(again, pictures), expected)  # pixels are kept on disk as well


def test_pixels_stay_where_the_surroundings_of_the_tower_read_them(idefics, pictures, monkeypatch):
    mllm = load(idefics, CONNECTOR, "memory")
    inner = type(mllm.base.base_model)
    plain = inner.get_image_features

    def brighter(self, pixel_values, pixel_attention_mask=None, **more):
        found = plain(self, pixel_values, pixel_attention_mask, **more)
        scale = pixel_values.mean()
        found.pooler_output = [part * scale for part in found.pooler_output]
        return found

    monkeypatch.setattr(inner, "get_image_features", brighter)
    expected = features.see(
        mllm.base, mllm.processor, mllm.family, pictures[0].open(), keeps="features"
    )
    found = mllm.image_features(pictures[0])
    assert found.recorded
    assert isinstance(found.pixels["pixel_values"], torch.Tensor)
    assert torch.equal(look(mllm.base, found, mllm._parts).features, expected.features)


def test_playing_back_leaves_the_recording_and_the_tower_as_they_are(idefics, pictures) -> None:
    mllm = load(idefics, CONNECTOR, "memory")
    found = mllm.image_features(pictures[0])
    before = [tensor.clone() for tensor in features.tensors_of(found.recorded)]
    (tower,) = mllm._parts

    def change(*given: Any) -> None:
        given[2].last_hidden_state.zero_()

    handle = tower.register_forward_hook(change)
    look(mllm.base, found, mllm._parts)
    handle.remove()
    after = features.tensors_of(found.recorded)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert "forward" not in tower.__dict__
    with pytest.raises(NotRecordedError, match="not all"):
        look(
            mllm.base,
            ImageFeatures("", found.features, recorded=found.recorded * 2, pixels=found.pixels),
            mllm._parts,
        )
    assert "forward" not in tower.__dict__


def test_masks_of_one_number_take_no_room() -> None:
    full, cut = torch.ones(2, 8, dtype=torch.int64), torch.tensor([[1, 1, 0]])
    found = blank_floats({"pixels": torch.rand(2, 3), "full": full, "cut": cut, "size": [3, 4]})
    assert found["full"] == Blank((2, 8), torch.int64, 1)
    assert isinstance(found["pixels"], Blank)
    assert found["cut"] is cut
    assert found["size"] == [3, 4]


# -- whole runs -----------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path) -> Path:
    """Two parties with four pictures each, and a test of two more."""
    root = tmp_path / "own"
    (root / "parties").mkdir(parents=True)
    for i in range(10):
        Image.new("RGB", (48, 32), (20 * i, 255 - 20 * i, 90)).save(root / f"{i}.png")

    def item(i: int) -> dict[str, Any]:
        words = ("user", "<image>\nwhich?"), ("assistant", str(i))
        turns = [{"role": role, "content": text} for role, text in words]
        return {"id": i, "image": f"{i}.png", "conversations": turns}

    for name, numbers in (("a", range(4)), ("b", range(4, 8))):
        (root / "parties" / f"{name}.json").write_text(json.dumps([item(i) for i in numbers]))
    (root / "test.json").write_text(json.dumps([item(8), item(9)]))
    return root


def small(own: Path, model: Path, **change: Any):
    return make_config(
        {
            "name": "small",
            "data": {"name": "conversations", "root": str(own)},
            "model": {"name": "tiny", "path": str(model), "feature_cache": "disk", **change},
            "trained": "reference",
            "training": {"rounds": 3, "clients_per_round": 2, "local_epochs": 2},
            "evaluation": {"every": 1, "conditions": ["both"]},
        }
    )


SECOND = """
import json, sys
from pathlib import Path
from fedmllm.config import make_config
from fedmllm.experiment import load_model, run
config = make_config(json.loads(sys.argv[1]))
mllm = load_model(config)
mllm._see = None
run(config, out=sys.argv[2], mllm=mllm)
"""


def test_a_run_passes_each_image_once_and_the_next_none(own, idefics, tmp_path, home) -> None:
    """Ten images: ten passes in a run of three rounds and its tests, none in another process."""

    def weights(name: str) -> dict[str, torch.Tensor]:
        return load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")

    config = small(own, idefics)
    mllm = load_model(config)
    passes = Passes(mllm)
    first = run(config, out=tmp_path / "first", mllm=mllm)
    assert passes.count == 10
    assert len(list(home.rglob("*.safetensors"))) == 10
    words = [sys.executable, "-c", SECOND, config.model_dump_json(), str(tmp_path / "second")]
    subprocess.run(words, check=True, timeout=300, env={**os.environ, "PYTHONPATH": str(SOURCE)})
    second = json.loads((tmp_path / "second" / "result.json").read_text())
    assert second["metrics"] == first["metrics"]
    assert [r["loss"] for r in second["history"]] == [r["loss"] for r in first["history"]]
    assert same(weights("first"), weights("second"))

    memory = small(own, idefics, feature_cache="memory", drop_tower=True)
    third = run(memory, out=tmp_path / "third")
    assert third["metrics"] == first["metrics"]
    assert same(weights("first"), weights("third"))
    assert config_hash(memory) == config_hash(config)  # no number depends on where features lie


# -- what an entry depends on ---------------------------------------------------------------------


def names(mllm: Mllm, keeps: str = "features") -> dict[str, str]:
    return identity(mllm.base, mllm.processor, mllm.family, keeps)


def changed(a: dict[str, str], b: dict[str, str]) -> set[str]:
    assert a.keys() == b.keys()
    return {key for key in a if a[key] != b[key]}


def nudged(path: Path, target: Path, part: str) -> Path:
    """A copy of a model with the last bit of one weight changed, in the first tensor of a part."""
    target.mkdir()
    for file in path.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    weights = load_file(path / "model.safetensors")
    name = min(name for name in weights if part in name)
    flat = weights[name].view(-1)
    flat[0] = torch.nextafter(flat[0], torch.tensor(9.0))
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    return target


def test_weights_that_an_image_passes_name_its_entry(idefics, tmp_path) -> None:
    plain = load(idefics, FROZEN)
    tower = load(nudged(idefics, tmp_path / "t", "vision_model"), FROZEN)
    connector = load(nudged(idefics, tmp_path / "c", "connector"), FROZEN)
    language = load(nudged(idefics, tmp_path / "l", "text_model.layers"), FROZEN)
    assert changed(names(plain), names(tower)) == {"weights"}
    assert changed(names(plain), names(connector)) == {"weights"}
    assert changed(names(plain), names(language)) == set()  # images do not pass it
    assert changed(names(plain, "tower"), names(tower, "tower")) == {"weights"}
    assert changed(names(plain, "tower"), names(connector, "tower")) == set()
    assert changed(names(plain), names(plain, "tower")) == {"keeps", "weights"}


def test_an_inner_connector_is_no_part_of_the_towers_weights(tmp_path) -> None:
    path = make_model("qwen2_vl", tmp_path / "q")
    plain = load(path, CONNECTOR)
    merger = load(nudged(path, tmp_path / "m", "merger"), CONNECTOR)
    block = load(nudged(path, tmp_path / "b", "visual.blocks"), CONNECTOR)
    assert changed(names(plain, "tower"), names(merger, "tower")) == set()
    assert changed(names(plain, "tower"), names(block, "tower")) == {"weights"}
    assert changed(names(plain), names(merger)) == {"weights"}


def test_settings_and_precision_name_an_entry(idefics, pictures, tmp_path, monkeypatch) -> None:
    plain = load(idefics, FROZEN)
    before = names(plain)
    half = load(idefics, FROZEN, dtype=torch.bfloat16)
    assert changed(before, names(half)) >= {"dtype", "weights"}
    other = load(idefics, FROZEN)
    other.processor.image_processor.image_mean = [0.4, 0.5, 0.5]
    assert changed(before, names(other)) == {"processor"}
    other = load(idefics, FROZEN)
    other.processor.image_seq_len = 5
    assert changed(before, names(other)) == {"processor"}
    other = load(idefics, FROZEN)
    other.base.config.vision_config._attn_implementation = "eager"
    assert changed(before, names(other)) == {"config"}
    with monkeypatch.context() as patch:
        patch.setattr(feature_store, "version", lambda name: "0.0")
        assert changed(before, names(plain)) == set(feature_store._PACKAGES)
    plain.image_features(pictures[0])
    assert load(idefics, FROZEN).features.store.get(pictures[0].key) is not None
    assert half.features.store.get(pictures[0].key) is None
    assert other.features.store.get(pictures[0].key) is None


def test_what_is_trained_elsewhere_shares_entries(idefics) -> None:
    plain = load(idefics, FROZEN)
    wide = Mllm.load("another name", idefics, rank=4, policy=Policy(embeddings="full"))
    before = names(wide)
    wide.set_adapter({name: value + 1 for name, value in wide.get_adapter().items()})
    assert changed(before, names(wide)) == set()
    assert changed(names(plain), names(wide)) == set()
    moved = load(idefics, CONNECTOR)
    before = names(moved, "tower")
    moved.set_adapter(moved.init_adapter(1))
    assert changed(before, names(moved, "tower")) == set()


# -- files ----------------------------------------------------------------------------------------


def key(i: int) -> str:
    return f"sha256:{i:064x}"


def entry(i: int, rows: int = 4) -> ImageFeatures:
    generator = torch.Generator().manual_seed(i)
    output = BaseModelOutputWithPooling(
        last_hidden_state=torch.randn(1, rows, 8, generator=generator).bfloat16(),
        hidden_states=(Blank((1, 2), torch.float32), Blank((3,), torch.int64, 1)),
    )
    return ImageFeatures(
        words=f"ä<image>{i}",
        features=torch.randn(rows, 8, generator=generator),
        deepstack=(torch.zeros(rows, 0), torch.ones(2, 2).T),
        inputs={"grid": torch.tensor([[1, i, 6]])},
        listed=False,
        pixels={"sizes": [(3, 4)], "scale": 0.5, "mask": torch.tensor([True, False])},
        recorded=((0, output), (1, [None, "x"])),
    )


def store(folder: Path, model: str = "m", **options: Any) -> FeatureStore:
    return FeatureStore(folder, lambda: {"model": model}, name="tiny", **options)


def alike(a: ImageFeatures, b: ImageFeatures) -> bool:
    flat = [
        feature_store._to_json(vars(x) | {"kind": None, "pixels": dict(x.pixels)}, {})
        for x in (a, b)
    ]
    tensors = [
        features.tensors_of(
            [x.features, list(x.deepstack), dict(x.inputs), dict(x.pixels), x.recorded]
        )
        for x in (a, b)
    ]
    return (
        str(flat[0]) == str(flat[1])
        and a.kind is b.kind
        and all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(*tensors, strict=True))
    )


@pytest.mark.parametrize("rows", [4, 4000])
def test_an_entry_comes_back_as_it_was_and_is_mapped(home, rows) -> None:
    """Small ones are copied: a process may not hold a mapping for each of very many images."""
    store(home).put(key(1), entry(1, rows))
    kept = store(home)
    found = kept.get(key(1))
    assert found is not None
    assert alike(found, entry(1, rows))
    assert not alike(found, entry(2, rows))
    assert (kept.path(key(1)).name in Path("/proc/self/maps").read_text()) == (rows == 4000)
    assert alike(kept.get(key(1)), entry(1, rows))  # not checked again
    assert store(home, "other").get(key(1)) is None
    assert kept.get(key(2)) is None


def test_a_damaged_entry_is_removed_and_made_again(home) -> None:
    """Every byte in turn, every length: nothing wrong is read, whatever is wrong."""
    kept = store(home)
    kept.put(key(1), entry(1))
    path = kept.path(key(1))
    whole = path.read_bytes()

    def is_refused(content: bytes) -> bool:
        path.write_bytes(content)
        refused = store(home).get(key(1)) is None and not path.exists()
        path.parent.mkdir(exist_ok=True)
        return refused

    for i in range(0, len(whole), 7):
        assert is_refused(whole[:i] + bytes([whole[i] ^ 16]) + whole[i + 1 :]), i
    for length in range(0, len(whole), 97):
        assert is_refused(whole[:length])
    assert is_refused(whole + b"\0")
    path.write_bytes(whole)
    assert store(home).get(key(1)) is not None
    for place in (store(home).path(key(2)), store(home, "other").path(key(1))):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(whole)  # an entry of another image, or of another model
    assert store(home).get(key(2)) is None
    assert store(home, "other").get(key(1)) is None
    store(home).put(key(2), entry(2))
    assert alike(store(home).get(key(2)), entry(2))


def test_a_file_cannot_name_a_class_of_its_own() -> None:
    for name in ("os:system", "transformers.trainer:Trainer", "builtins:eval"):
        with pytest.raises(ValueError, match="is no output of a model"):
            feature_store._class_named(name)


def test_memory_keeps_its_budget_and_what_was_used_last(home) -> None:
    size = entry(1).nbytes
    cache = FeatureCache(budget_bytes=3 * size)
    for i in range(3):
        cache.put(key(i), entry(i))
    cache.get(key(0))
    cache.put(key(3), entry(3))
    assert [i for i in range(4) if cache.get(key(i)) is not None] == [0, 2, 3]
    assert cache.memory.held == 3 * size
    tight = FeatureCache(budget_bytes=1, store=store(home))
    for i in range(3):
        tight.put(key(i), entry(i))
    assert len(tight.memory) == 1
    for i in range(3):  # beyond memory, on disk
        assert alike(tight.get(key(i)), entry(i))
        assert len(tight.memory) == 1


def test_disk_keeps_its_limit_and_what_was_used_last(home) -> None:
    kept = store(home)
    for i in range(10):
        kept.put(key(i), entry(i))
        os.utime(kept.path(key(i)), (1000 + i, 1000 + i))
    size = kept.path(key(0)).stat().st_size
    assert kept.get(key(2)) is not None  # used now
    elsewhere = store(home, "other")
    elsewhere.put(key(0), entry(0))
    os.utime(elsewhere.path(key(0)), (1, 1))  # of all models, the oldest
    bounded = store(home, limit_bytes=8 * size)
    bounded.put(key(10), entry(10))
    left = [i for i in range(11) if kept.path(key(i)).exists()]
    assert left == [2, 5, 6, 7, 8, 9, 10]  # nine tenths of eight
    assert not elsewhere.path(key(0)).exists()
    store(home, limit_bytes=size - 1).put(key(11), entry(11))
    assert not kept.path(key(11)).exists()  # larger than the limit by itself
    assert len([i for i in range(12) if kept.path(key(i)).exists()]) == 7


def test_many_writes_are_bounded_too(home) -> None:
    size = len(feature_store.entry_bytes(entry(0), store(home).model, key(0)))
    bounded = store(home, limit_bytes=5 * size)
    for i in range(40):
        bounded.put(key(i), entry(i))
        assert sum(file.stat().st_size for file in home.glob("*/*/*")) <= 5 * size
    assert bounded.get(key(39)) is not None


def test_abandoned_drafts_leave_and_young_ones_stay(home) -> None:
    kept = store(home)
    kept.put(key(1), entry(1))
    young, old = (kept.path(key(1)).parent / f".draft-{name}" for name in "ab")
    young.write_bytes(b"x")
    old.write_bytes(b"x")
    long_ago = time.time() - files.ABANDONED - 1
    os.utime(old, (long_ago, long_ago))
    files.trim(home, 10**9)
    assert (young.exists(), old.exists(), kept.path(key(1)).exists()) == (True, False, True)


@pytest.mark.parametrize("failing", ["mkstemp", "fsync"])
def test_a_folder_that_cannot_be_written_is_told_once(home, monkeypatch, caplog, failing) -> None:
    store(home).put(key(1), entry(1))

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile if failing == "mkstemp" else os, failing, refuse)
    cache = FeatureCache(store=store(home))
    with caplog.at_level(logging.WARNING):
        for i in range(2, 6):
            cache.put(key(i), entry(i))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "Read-only file system" in caplog.text
    assert "model.feature_cache=memory" in caplog.text
    assert all(alike(cache.get(key(i)), entry(i)) for i in (1, 2, 5))  # disk, memory
    assert not list(home.rglob(".draft-*"))
    assert len(list(home.rglob("*.safetensors"))) == 1


def test_a_file_in_the_place_of_the_cache_is_told(home, caplog) -> None:
    home.parent.mkdir(parents=True)
    home.write_text("")
    cache = FeatureCache(store=store(home))
    cache.put(key(1), entry(1))
    assert cache.get(key(1)) is not None
    assert cache.get(key(2)) is None
    assert len(caplog.records) == 1
    assert files.cached_models(home) == []


KILLED = """
import os, sys
from pathlib import Path
from fedmllm.models import feature_files
if sys.argv[2] == "sync":
    def stop(handle):
        os.ftruncate(handle, 1000)
        print("writing", flush=True)
        os.read(0, 1)
    feature_files.os.fsync = stop
else:
    print("writing", flush=True)
while True:
    feature_files.write_whole(Path(sys.argv[1]), bytes(2**24))
"""
WRITER = """
import sys
from pathlib import Path
from fedmllm.models import feature_files
contents = [Path(file).read_bytes() for file in sys.argv[2:]]
for i in range(60):
    feature_files.write_whole(Path(sys.argv[1]), contents[i % len(contents)])
"""


def started(*words: object, **options: Any) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-c", *map(str, words)]
    return subprocess.Popen(command, env=environment, **options)


@pytest.mark.parametrize("when", ["sync", 0.02, 0.05, 0.09])
def test_a_kill_while_writing_leaves_nothing_to_read(home, when) -> None:
    """The writer is killed with half a file, or at any time between many writes."""
    kept = store(home)
    path = kept.path(key(1))
    words = (KILLED, path, when)
    with started(*words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"writing\n"
        if when != "sync":
            time.sleep(float(when))
        child.send_signal(signal.SIGKILL)
        child.wait(30)
    if when == "sync":
        assert not path.exists()
        assert [file.stat().st_size for file in path.parent.glob(".draft-*")] == [1000]
    else:
        assert not path.exists() or path.stat().st_size == 2**24  # whole
    assert kept.get(key(1)) is None  # zeros are no entry
    kept.put(key(1), entry(1))
    assert alike(store(home).get(key(1)), entry(1))


def test_writers_of_one_entry_never_show_half_of_it(home, tmp_path) -> None:
    """Two processes write an image's entry again and again; each reader gets one that is whole."""
    kept = store(home)
    contents = []
    for i in (1, 2):
        contents.append(tmp_path / str(i))
        data = feature_store.entry_bytes(entry(i, rows=20_000 * i), kept.model, key(1))
        contents[-1].write_bytes(data)
    path = kept.path(key(1))
    kept.put(key(1), entry(1, rows=20_000))
    writers = [started(WRITER, path, *order) for order in (contents, contents[::-1])]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        with path.open("rb") as file:
            found = read_entry(file, kept.model, key(1))  # with its digest
        seen.add(found.words)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen == {"ä<image>1", "ä<image>2"}


def test_a_cache_that_is_cleared_meanwhile_is_filled_again(home) -> None:
    kept = store(home)
    kept.put(key(1), entry(1, rows=4000))
    mapped = kept.get(key(1))
    assert files.clear(home)[0] == 1
    assert alike(mapped, entry(1, rows=4000))  # what is mapped stays
    assert kept.get(key(1)) is None
    kept.put(key(2), entry(2))
    assert alike(kept.get(key(2)), entry(2))
    assert files.cached_models(home)[0].facts["name"] == "tiny"


# -- the tower leaves memory, and the command -----------------------------------------------------


def test_a_tower_that_left_is_read_where_it_lies(idefics, pictures, monkeypatch) -> None:
    mllm = load(idefics, FROZEN, "memory")
    expected = mllm.image_features(pictures[1])
    count = mllm.parameter_counts()
    weights = [p for part in mllm._parts for p in part.parameters()]
    freed = mllm.drop_tower(samples(pictures)[:1])
    assert freed == sum(p.nbytes for p in weights)
    assert "tower.safetensors (deleted)" in Path("/proc/self/maps").read_text()
    now = [p for part in mllm._parts for p in part.parameters()]
    assert not {p.data_ptr() for p in weights} & {p.data_ptr() for p in now}
    assert all(torch.equal(a, b) for a, b in zip(weights, now, strict=True))
    assert mllm.parameter_counts() == count
    mllm.features = FeatureCache()
    assert torch.equal(mllm.image_features(pictures[1]).features, expected.features)
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with pytest.raises(UserError, match=r"cannot leave memory.*TMPDIR"):
        mllm.drop_tower()


@pytest.mark.parametrize(
    ("setting", "device", "budget", "cache", "leaves"),
    [
        ("auto", "cuda", 10**9, "memory", True),
        ("auto", "cuda", 1, "memory", False),  # one of two images is no longer kept
        ("auto", "cuda", 1, "disk", True),
        ("auto", "cpu", 10**9, "memory", False),
        (True, "cpu", 1, "memory", True),
        (False, "cuda", 10**9, "memory", False),
    ],
)
def test_the_tower_leaves_by_itself_where_that_is_of_use(
    setting, device, budget, cache, leaves, idefics, pictures, monkeypatch
) -> None:
    """The device is a name here: where the tower lies is asked of nothing else."""
    mllm = load(idefics, FROZEN, cache, feature_memory_gb=budget / 1e9)
    assert mllm.features.budget_bytes == budget
    left: list[int] = []
    monkeypatch.setattr("fedmllm.models.mllm.to_file", lambda parts: left.append(1) or 1)
    monkeypatch.setattr("fedmllm.models.mllm.to_device", lambda parts, device: None)
    monkeypatch.setattr(mllm, "device", torch.device(device))
    config = make_config({"name": "x", "model": {"drop_tower": setting}})
    assert config_hash(config) == config_hash(make_config({"name": "x"}))
    spare_tower(config, mllm, samples(pictures))
    assert bool(left) == leaves


def test_how_much_is_kept_in_memory_is_no_number_of_a_run() -> None:
    plain = make_config({"name": "x"})
    assert round(plain.model.feature_memory_gb * 1e9) == FeatureCache().budget_bytes == 2**29
    more = make_config({"name": "x"}, ["model.feature_memory_gb=8"])
    assert config_hash(more) == config_hash(plain)
    for change in ("feature_memory_gb=0", "drop_tower=maybe"):
        with pytest.raises(UserError, match=f"1 problem\n  - model.{change.partition('=')[0]}: "):
            make_config({"name": "x"}, [f"model.{change}"])


def test_shared_weights_stay_shared() -> None:
    from fedmllm.models.tower import to_file

    one = nn.Linear(4, 4).requires_grad_(False)
    two = nn.Linear(4, 4).requires_grad_(False)
    two.weight = one.weight
    trained = nn.Linear(4, 4)
    kept = trained.weight
    assert to_file([one, two, trained]) == (16 + 4 + 4) * 4
    assert two.weight is one.weight
    assert trained.weight is kept


def test_the_command_shows_and_clears(home, monkeypatch, capsys) -> None:
    assert call(monkeypatch, capsys, "cache")[1].splitlines()[1:] == [
        "  empty; model.feature_cache=disk fills it"
    ]
    for i in range(3):
        store(home).put(key(i), entry(i))
    store(home, "other").put(key(1), entry(1))
    code, out, _ = call(monkeypatch, capsys, "cache")
    assert (code, out.count("tiny ·"), out.count(": 3 images")) == (0, 2, 1)
    found = json.loads(call(monkeypatch, capsys, "cache", "--json")[1])
    assert sorted(model["entries"] for model in found["models"]) == [1, 3]
    sizes = [file.stat().st_size for file in home.rglob("*.safetensors")]
    assert sum(model["bytes"] for model in found["models"]) == sum(sizes)
    (home / "keep.txt").write_text("not ours")
    code, out, _ = call(monkeypatch, capsys, "cache", "--clear")
    assert (code, out.startswith("removed 4 images")) == (0, True)
    assert [file.name for file in home.iterdir()] == ["keep.txt"]


def test_the_command_imports_no_torch() -> None:
    code = (
        "import sys; from fedmllm.cli_cache import show; show(as_json=False);"
        "assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules)"
    )
    with started(code, stdout=subprocess.DEVNULL) as child:
        assert child.wait(60) == 0
