"""Exports: a party gets what it keeps, reads back the same samples, and trains alike."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image

from fedmllm.config import load_config, make_config
from fedmllm.data import load_dataset
from fedmllm.data.dataset import Dataset
from fedmllm.data.images import ArchiveImage, ImageFile, MemoryImage
from fedmllm.data.sample import Sample, Task
from fedmllm.errors import UserError
from fedmllm.experiment import run
from fedmllm.export import export
from fedmllm.manifest import build_manifest, client_samples, load
from fedmllm.prompts import render
from fedmllm.scenarios import SETTINGS

OPEN = Task("toy", "open", "accuracy")


def split(dataset, setting="missing-b0.5", **changes):
    scenario, options, alpha = SETTINGS[setting]
    given = {"clients": 4, "alpha": alpha, "scenario": scenario, "scenario_options": options}
    return build_manifest("toy", dataset, **(given | {"seed": 0} | changes))


def read(folder: Path) -> Dataset:
    """The export, by the config that lies in it."""
    config = load_config(folder / "experiment.yaml", [f"data.root={folder}"])
    return load_dataset(**config.data)


def shown(sample: Sample) -> tuple:
    """All of a sample that a model or a metric sees, and its pixels."""
    pixels = None if sample.image is None else sample.image.open().tobytes()
    texts = (sample.question, sample.text, sample.answer, sample.turns)
    return (*texts, sample.label, sample.kind, pixels)


@pytest.mark.parametrize("setting", ["aligned-a0.5", "missing-b0.5", "cross-i3t7", "hybrid-p0.6"])
@pytest.mark.parametrize("name", ["memes", "crisis", "medical"])
def test_an_export_reads_back_as_the_same_samples(tmp_path, name, setting):
    dataset = load_dataset(name, train=40, test=8)
    held = split(dataset, setting)
    found = read(export(held, dataset, tmp_path / "out"))
    expected = client_samples(held, dataset)
    assert list(found.parties) == list(expected)
    for party, samples in expected.items():
        assert [s.id for s in found.parties[party]] == [f"{party}/{s.id}" for s in samples]
        assert [shown(s) for s in found.parties[party]] == [shown(s) for s in samples]
    assert [shown(s) for s in found.test] == [shown(s) for s in dataset.test]
    assert replace(found.task, name=name) == dataset.task
    again = split(found, "aligned-a0.5")
    assert [[row[1:] for row in client.rows] for client in again.clients] == [
        [row[1:] for row in client.rows] for client in held.clients
    ]


def test_a_federated_run_on_the_export_is_the_run_on_the_manifest(tmp_path, mllm):
    """The same texts, pixels, order: the same losses and scores to the last bit."""
    common = {
        "seed": 3,
        "training": {"rounds": 2},
        "evaluation": {"every": 0, "conditions": ["both", "text_withheld"]},
        "partition": {"clients": 3},
    }
    data = {"name": "memes", "train": 24, "test": 8}
    one = make_config(
        {"name": "one", "data": data, "scenario": "missing", **common}, ["scenario.beta=0.5"]
    )
    first = run(one, out=tmp_path / "one", mllm=mllm)
    held = load(tmp_path / "one" / "manifest.json")
    assert first["manifest"]["sha256"] == held.sha256
    assert any(row[1:] == (False, False) for client in held.clients for row in client.rows)
    folder = export(held, load_dataset(**data), tmp_path / "out")
    raw = yaml.safe_load((folder / "experiment.yaml").read_text()) | {"name": "two", **common}
    second = run(make_config(raw, [f"data.root={folder}"]), out=tmp_path / "two", mllm=mllm)
    assert second["metrics"] == first["metrics"]
    assert [r["loss"] for r in second["history"]] == [r["loss"] for r in first["history"]]


def test_a_party_gets_what_it_keeps_and_nothing_else(tmp_path):
    dataset = load_dataset("memes", train=60, test=8)
    held = split(dataset, "cross-i5t5")
    folder = export(held, dataset, tmp_path / "out")
    for client in held.clients:
        items = json.loads((folder / "parties" / f"{client.id}.json").read_text())
        images = folder / "images" / client.id
        named = {item["image"] for item in items if item["image"]}
        there = (
            {f"images/{client.id}/{f.name}" for f in images.iterdir()} if images.exists() else set()
        )
        assert named == there
        contents = [item["conversations"][0]["content"] for item in items]
        if client.rows[0][1]:
            assert contents == ["<image>"] * len(items)
            assert {tuple(item["withheld"]) for item in items} == {("text",)}
        else:
            assert not there
            assert {tuple(item["withheld"]) for item in items} == {("image",)}
    train = {sample.id for sample in dataset.train}
    parties = [json.loads(f.read_text()) for f in (folder / "parties").iterdir()]
    ids = [item["id"] for items in parties for item in items]
    assert sorted(ids) == sorted(train)
    tests = {item["id"] for item in json.loads((folder / "test.json").read_text())}
    assert not tests & train


def open_dataset(root: Path) -> Dataset:
    """Open samples with all that a conversation can hold, one image file shared by two."""
    Image.new("RGB", (3, 2), "red").save(root / "Ä 1.PNG")
    red = ImageFile("Ä 1.PNG", root)
    earlier = (("q1?", "a1"), ("q2?", "a2"))
    rows = [
        Sample("a", "yes", "q?", "a text\nof two lines", red, kind="closed"),
        Sample("b", "no", "q?", None, red),
        Sample("c", "«ü» 否", "q?", "only text"),
        Sample("d", "x", "q3?", "before", red, turns=earlier),
        Sample("e", "x", "q?\nmore", " padded \n"),
        Sample("f", "x", "q?", image=MemoryImage("m", lambda: Image.new("RGB", (2, 2), "blue"))),
    ]
    return Dataset(OPEN, rows, [replace(row, id=f"t{row.id}") for row in rows])


def test_open_samples_with_texts_turns_and_files(tmp_path):
    dataset = open_dataset(tmp_path)
    held = split(dataset, "aligned-a0.5", clients=1)
    folder = export(held, dataset, tmp_path / "out")
    found = read(folder)
    padded = replace(dataset.train[4], text="padded")
    expected = [*dataset.train[:4], padded, dataset.train[5]]
    assert [shown(s) for s in found.train] == [shown(s) for s in expected]
    for sample, before in zip(found.train, expected, strict=True):
        assert render(sample, OPEN).turns == render(before, OPEN).turns
    assert found.train[0].image.key == dataset.train[0].image.key  # the bytes, not a copy's
    assert len(list((folder / "images" / "client-00").iterdir())) == 2
    masked = found.train[0].masked(keep_image=True, keep_text=False)
    assert render(masked, OPEN).turns[0][0] == "<image>\nq?"


def test_an_export_of_an_export_is_the_same_files(tmp_path):
    dataset = load_dataset("memes", train=20, test=4)
    first = export(split(dataset), dataset, tmp_path / "one")
    again = read(first)
    second = export(split(again, "aligned-a0.5"), again, tmp_path / "two")
    assert [shown(s) for s in read(second).train] == [shown(s) for s in again.train]
    for file in (first / "parties").iterdir():
        items, others = (
            json.loads((f / "parties" / file.name).read_text()) for f in (first, second)
        )
        assert [{k: v for k, v in i.items() if k != "withheld"} for i in items] == [
            {k: v for k, v in i.items() if k != "withheld"} for i in others
        ]


def test_the_same_bytes_on_every_call(tmp_path):
    dataset = load_dataset("memes", train=20, test=4)
    one, two = (export(split(dataset), dataset, tmp_path / n) for n in ("one", "two"))
    files = sorted(f.relative_to(one) for f in one.rglob("*") if f.is_file())
    assert files == sorted(f.relative_to(two) for f in two.rglob("*") if f.is_file())
    assert all((one / f).read_bytes() == (two / f).read_bytes() for f in files)


def test_nothing_is_overwritten_unless_told(tmp_path):
    dataset = load_dataset("memes", train=20, test=4)
    held, other = split(dataset), split(dataset, seed=1)
    folder = tmp_path / "a" / "out"
    export(held, dataset, folder)
    with pytest.raises(UserError, match="holds an export: use --overwrite"):
        export(other, dataset, folder)
    assert load(folder / "manifest.json") == held
    export(other, dataset, folder, overwrite=True)
    assert load(folder / "manifest.json") == other
    assert sorted(p.name for p in folder.parent.iterdir()) == ["out"]
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"not an export, it holds 'thesis.tex'"):
        export(held, dataset, folder, overwrite=True)
    assert (folder / "thesis.tex").read_text() == "mine"
    with pytest.raises(UserError, match="is a file"):
        export(held, dataset, folder / "thesis.tex" / "x")
    (tmp_path / "images").mkdir()
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "images").mkdir()  # a name of ours, but no manifest: not an export
    with pytest.raises(UserError, match="not an export"):
        export(held, dataset, tmp_path / "own", overwrite=True)


def test_a_failed_export_leaves_nothing(tmp_path):
    dataset = open_dataset(tmp_path)
    held = split(dataset, "aligned-a0.5", clients=1)
    (tmp_path / "Ä 1.PNG").unlink()
    with pytest.raises(UserError, match=r"image .*Ä 1\.PNG does not exist"):
        export(held, dataset, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_image_in_an_archive_is_copied_byte_for_byte(tmp_path):
    Image.new("RGB", (9, 7), (1, 200, 3)).save(tmp_path / "a.jpg")
    raw = (tmp_path / "a.jpg").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("img/a.jpg", raw)
    picture = ArchiveImage("img/a.jpg", tmp_path / "a.zip")
    dataset = Dataset(OPEN, [Sample("a", "x", "q?", image=picture)], [Sample("b", "x", "q?")])
    export(split(dataset, "aligned-a0.5", clients=1), dataset, tmp_path / "out")
    (copy,) = (tmp_path / "out" / "images" / "client-00").iterdir()
    assert (copy.suffix, copy.read_bytes()) == (".jpg", raw)


def test_what_the_format_cannot_hold_is_listed(tmp_path):
    rows = [
        Sample("a", "x", "what is <image>?"),
        Sample("b", "x", "q?", "see <image>"),
        Sample("c", "", "q?"),
        Sample("d", "x", "q?"),
    ]
    dataset = Dataset(OPEN, rows, [])
    with pytest.raises(UserError) as caught:
        export(split(dataset, "aligned-a0.5", clients=1), dataset, tmp_path / "out")
    message = str(caught.value)
    assert message.startswith("4 problems in the data:")
    assert "client-00, sample a: a text holds <image>" in message
    assert "client-00, sample b: a text holds <image>" in message
    assert "client-00, sample c: the answer is empty" in message
    assert "the dataset has no test samples" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("names", [["a/b"], ["test"], [".."], ["Nord", "nord"], ["x" * 101]])
def test_party_names_that_cannot_be_files_are_refused(tmp_path, names):
    parties = {name: [Sample(f"{name}/1", "x", "q?")] for name in names}
    train = [s for party in parties.values() for s in party]
    dataset = Dataset(OPEN, train, train, parties=parties)
    with pytest.raises(UserError, match=r"cannot be called|differ in case"):
        export(split(dataset, "aligned-a0.5"), dataset, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
