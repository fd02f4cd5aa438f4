"""`fedmllm data split`: the manifest of a run, shown, drawn, exported, verified elsewhere."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_cli import call
from test_manifest import CHOICE, OPEN, hospitals, medical, memes, picture
from test_manifest import build as split

from fedmllm.config import make_config
from fedmllm.data import load_dataset
from fedmllm.data.dataset import Dataset
from fedmllm.data.sample import Sample
from fedmllm.experiment import run
from fedmllm.manifest import (
    COMBINATIONS,
    build_manifest,
    client_samples,
    differences,
    holdings,
    load,
    request,
    to_json,
)
from fedmllm.partition import proportions
from fedmllm.report.split import _columns, save_picture, split_figure, split_tables
from fedmllm.scenarios import IMAGE_ONLY, SETTINGS

GOLDEN = Path(__file__).parent / "data" / "manifests"
SMALL = ["train=40", "test=8"]


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *words: call(monkeypatch, capsys, "data", "split", *words)


# --- the command -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "config"),
    [
        (
            ["--setting", "missing-b0.4", "--seed", 5, "--clients", 4],
            {"setting": "missing-b0.4", "seed": 5, "partition": {"clients": 4}},
        ),
        (
            ["--scenario", "cross", "scenario.images=1:2", "--partition", "even", "--clients", 3],
            {
                "scenario": {"name": "cross", "images": "1:2"},
                "partition": {"name": "even", "clients": 3},
            },
        ),
        (
            ["data.draw_seed=2", "--alpha", 5.0, "partition.clients=2"],
            {"data": {"draw_seed": 2}, "partition": {"alpha": 5.0, "clients": 2}},
        ),
    ],
)
def test_the_manifest_is_that_of_a_run(cli, tmp_path, mllm, words, config):
    """Byte for byte: both go through the same config."""
    data = {"name": "memes", "train": 40, "test": 8, **config.pop("data", {})}
    few = {"training": {"rounds": 0}, "evaluation": {"conditions": ["both"], "every": 0}}
    whole = make_config({"name": "x", "data": data, **config, **few, "topology": "zero-shot"})
    run(whole, out=tmp_path / "run", mllm=mllm)
    code, out, _ = cli("memes", *SMALL, *words)
    assert code == 0
    written = (tmp_path / "manifest.json").read_bytes()
    assert written == (tmp_path / "run" / "manifest.json").read_bytes()
    assert f"sha256    {load(tmp_path / 'manifest.json').sha256}" in out


def test_the_table_counts_and_the_picture_is_drawn(cli, tmp_path):
    code, out, _ = cli("memes", *SMALL, "--setting", "missing-b0.5", "--clients", 2)
    assert code == 0
    held = load("manifest.json")
    lines = [line.split() for line in out.splitlines()]
    for summary in holdings(held):
        by_class = [sum(by.values()) for by in summary.counts.values()]
        totals = [sum(by[c] for by in summary.counts.values()) for c in COMBINATIONS]
        assert [summary.id, *map(str, [summary.samples, *totals, *by_class])] in lines
    for letter, name in (("A", "not-hateful"), ("B", "hateful")):
        totals = [sum(s.counts[name][c] for s in holdings(held)) for c in COMBINATIONS]
        assert [letter, name, *map(str, [sum(totals), *totals])] in lines
    ElementTree.fromstring((tmp_path / "manifest.svg").read_text())
    code, _, _ = cli("memes", *SMALL, "--picture", "x.png", "--out", "sub/m.json")
    assert code == 0
    assert Image.open("x.png").width > 400
    assert Path("sub/m.json").exists()


def test_an_export_is_written_and_not_overwritten(cli):
    code, out, _ = cli("memes", *SMALL, "--export", "out")
    assert code == 0
    assert "export    out" in out
    assert load("out/manifest.json") == load("manifest.json")
    code, _, err = cli("memes", *SMALL, "--export", "out")
    assert code == 2
    assert "--overwrite" in err
    code, _, err = cli("memes", *SMALL, "--seed", 1)
    assert code == 2
    assert "manifest.json holds another manifest" in err
    assert load("manifest.json").seed == 0
    assert cli("memes", *SMALL)[0] == 0  # the same manifest again
    assert cli("memes", *SMALL, "--seed", 1, "--export", "out", "--overwrite")[0] == 0
    assert load("out/manifest.json").seed == load("manifest.json").seed == 1


def test_two_sites_show_that_they_split_alike(cli):
    assert cli("memes", *SMALL, "--setting", "hybrid-p0.6", "--seed", 2)[0] == 0
    code, out, _ = cli("memes", *SMALL, "--verify", "manifest.json")
    assert code == 0
    assert out.startswith("the same split\n")
    assert load("manifest.json").sha256 in out
    before = Path("manifest.json").read_bytes()
    code, out, _ = cli("memes", "train=44", "test=8", "--verify", "manifest.json")
    assert code == 1
    assert "another split" in out
    assert "4 of all samples are in the second only: 'memes-train-00010-00', …" in out
    assert sorted(p.name for p in Path().iterdir()) == ["manifest.json", "manifest.svg"]
    assert Path("manifest.json").read_bytes() == before
    code, _, err = cli("memes", *SMALL, "--verify", "manifest.json", "--seed", 3)
    assert code == 2
    assert "leave out 'seed=3'" in err


def test_a_folder_of_ones_own(cli, tmp_path):
    folder = tmp_path / "a=b"  # a folder that exists is a folder
    folder.mkdir()
    for name in ("north", "south", "test"):
        (folder / f"{name}.csv").write_text("question,answer\nq?,a\nr?,b\n")
    code, out, _ = cli("table", "a=b", "--scenario", "missing")
    assert code == 0
    assert [client.id for client in load("manifest.json").clients] == ["north", "south"]
    assert "north" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mems"], "unknown dataset 'mems'"),
        (["memes", "some-folder"], "data.root: unknown option of dataset memes 'root'"),
        (["memes", "train=40", "folder"], "'folder' is not KEY=VALUE: give one folder, first"),
        (["memes", "trian=3"], "unknown option of dataset memes 'trian'"),
        (["memes", "--scenario", "mising"], "did you mean 'missing'?"),
        (["memes", "--setting", "x"], "unknown setting 'x'"),
        (["memes", "--setting", "cross-i3t7", "--alpha", "1"], "not both"),
        (["memes", "--clients", "0"], "partition.clients"),
        (["memes", *SMALL, "--picture", "x.jpg"], "that ends in .svg or .png"),
        (["memes", *SMALL, "--out", "."], "is a folder"),
        (["memes", *SMALL, "--verify", "none.json"], "none.json cannot be read"),
        (["table", "nowhere"], "does not exist"),
    ],
)
def test_bad_words_are_refused_and_nothing_is_written(cli, words, message):
    code, _, err = cli(*words)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert list(Path().iterdir()) == []


def test_folders_are_made_for_what_is_written(cli):
    code, _, err = cli("memes", *SMALL, "--out", "new/m.json", "--picture", "other/new/m.png")
    assert (code, err) == (0, "")
    assert Path("other/new/m.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("option", "file"),
    [("--out", "file/m.json"), ("--picture", "file/m.svg"), ("--export", "full/export")],
)
def test_what_cannot_be_written_is_named(cli, monkeypatch, option, file):
    Path("file").write_text("")

    def full(*given: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if option == "--export":
        monkeypatch.setattr("fedmllm.export._write", full)
    code, _, err = cli("memes", *SMALL, option, file)
    assert code == 2
    assert f"{file} cannot be written (" in err


# --- requests and differences -----------------------------------------------------------------


def unlabelled():
    return Dataset(OPEN, [Sample(f"s{i}", "a", "q?") for i in range(20)], [])


@pytest.mark.parametrize("make", [memes, medical, hospitals, unlabelled])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("partition", ["dirichlet", "even"])
def test_a_manifest_says_how_it_was_made(make, setting, partition):
    held = split(make(), setting, partition=partition, seed=7)
    assert build_manifest("toy", make(), **request(held)) == held


def test_differences_are_named():
    one = split(memes(), "missing-b0.5")
    assert differences(one, one) == []
    (seed,) = differences(one, replace(one, seed=1))
    assert seed == "seed: 0 and 1"
    masked = split(memes(), "missing-b0.3")
    found = differences(one, masked)
    assert found[0].startswith("scenario: {'name': 'missing', 'beta': 0.5} and")
    assert all("that keep other modalities, e.g. 'm" in line for line in found[1:])
    assert differences(one, replace(one, clients=one.clients[1:]))[-1] == (
        "client client-00 is in the first only"
    )
    first = one.clients[0]
    labelled = replace(first, labels=tuple(1 - label for label in first.labels))
    (line,) = differences(one, replace(one, clients=(labelled, *one.clients[1:])))
    assert line == f"client client-00: {len(first.rows)} samples with another label, e.g. " + repr(
        min(row[0] for row in first.rows)
    )
    swapped = replace(one, clients=one.clients[::-1])
    assert differences(one, swapped) == ["the order of clients or of their rows"]


@settings(max_examples=30)
@given(st.sampled_from(sorted(SETTINGS)), st.integers(0, 3), st.integers(0, 3))
def test_no_differences_exactly_if_the_hashes_are_equal(setting, seed, other):
    one, two = (split(memes(20), setting, seed=s) for s in (seed, other))
    assert (differences(one, two) == []) == (one.sha256 == two.sha256)


# --- golden manifests -------------------------------------------------------------------------


def golden_cases():
    """What `tests/data/manifests/hashes.json` pins: three tasks, twelve settings, small alpha."""
    for name in ("memes", "crisis", "medical"):
        dataset = load_dataset(name, train=48, test=8)
        for setting in [*SETTINGS, "alpha-0.02"]:
            scenario, options, alpha = SETTINGS.get(setting, ("aligned", {}, 0.02))
            given = {"alpha": alpha, "scenario": scenario, "scenario_options": options}
            yield f"{name} {setting}", build_manifest(name, dataset, clients=5, seed=1, **given)


def test_manifests_are_the_committed_ones():
    """numpy may change what a generator draws between versions; then this fails and says so."""
    assert {case: held.sha256 for case, held in golden_cases()} == json.loads(
        (GOLDEN / "hashes.json").read_text()
    )


def test_a_whole_manifest_is_the_committed_one():
    """So that a change shows what changed and not only that something did."""
    held = dict(golden_cases())["crisis hybrid-p0.6"]
    assert differences(load(GOLDEN / "crisis-hybrid.json"), held) == []
    assert (GOLDEN / "crisis-hybrid.json").read_text() == to_json(held)


# --- properties of the whole chain ------------------------------------------------------------


@settings(max_examples=40)
@given(
    st.sampled_from([memes, medical, hospitals, unlabelled]),
    st.sampled_from(sorted(SETTINGS)),
    st.integers(0, 10_000),
)
def test_nothing_of_the_test_is_trained_on(make, setting, seed):
    dataset = make()
    tests = [replace(s, id=f"test/{s.id}", answer="test only") for s in dataset.train]
    dataset = replace(dataset, test=tests)
    held = split(dataset, setting, seed=seed, clients=2)
    given = client_samples(held, dataset)
    trained = {sample.id for samples in given.values() for sample in samples}
    assert not trained & {sample.id for sample in tests}
    assert all(s.answer != "test only" for samples in given.values() for s in samples)
    assert trained <= {s.id for s in (*dataset.train, *dataset.flashcards)}


@settings(max_examples=25)
@given(st.integers(1, 12), st.data())
def test_a_cross_split_has_exactly_so_many_parties_with_images(clients, data):
    images = data.draw(st.integers(0, clients))
    seed = data.draw(st.integers(0, 1000))
    options = {"scenario_options": {"images": images}, "clients": clients, "seed": seed}
    held = split(memes(), scenario="cross", **options)
    kept = [{row[1:] for row in client.rows} for client in held.clients]
    assert kept.count({IMAGE_ONLY}) == images
    assert all(len(one) == 1 for one in kept)


@pytest.mark.parametrize("beta", [0.3, 0.5])
def test_masks_in_a_manifest_are_independent_and_at_rate_beta(beta):
    """4,000 samples: shares within four standard errors, phi of the two masks within 4/sqrt(n)."""
    held = split(memes(4000), scenario="missing", scenario_options={"beta": beta}, seed=11)
    keep = np.array([row[1:] for client in held.clients for row in client.rows], dtype=float)
    error = 4 * np.sqrt(beta * (1 - beta) / len(keep))
    np.testing.assert_allclose(keep.mean(0), 1 - beta, atol=error)
    assert abs(np.corrcoef(keep.T)[0, 1]) < 4 / np.sqrt(len(keep))
    label = [x for client in held.clients for x in client.labels]
    assert np.abs(np.corrcoef(keep.T, label)[2, :2]).max() < 4 / np.sqrt(len(keep))


@pytest.mark.parametrize("count", [200, 2000, 20_000])
def test_proportions_converge_to_the_draw(count):
    """The largest gap to the Dirichlet draw is at most one sample, so it shrinks as 1/n."""
    rows = [Sample(f"s{i}", CHOICE.classes[i % 2], text="t", label=i % 2) for i in range(count)]
    held = split(Dataset(CHOICE, rows, []), seed=3)
    assert all(len(client.rows) > 1 for client in held.clients)  # nothing was repaired
    for label in range(2):
        due = proportions(label, clients=5, alpha=0.5, seed=3)
        shares = [client.labels.count(label) / (count / 2) for client in held.clients]
        np.testing.assert_allclose(shares, due, atol=1.0 / (count / 2))


# --- pictures ---------------------------------------------------------------------------------


def many(classes, clients):
    """The last class is the commonest."""
    task = replace(CHOICE, classes=tuple(f"class {i}" for i in range(classes)))
    rows = [
        Sample(
            f"s{i}", "x", text="t", image=picture("p"), label=min(i % (classes + 1), classes - 1)
        )
        for i in range(classes * clients)
    ]
    return holdings(split(Dataset(task, rows, []), "missing-b0.5", clients=clients))


def widths(figure):
    """(row, left) -> width of every bar that is drawn."""
    (axes,) = (ax for part in figure.subfigs for ax in part.axes)
    return {
        (round(low[1] + 0.37), round(low[0], 6)): high[0] - low[0]
        for bars in axes.collections
        for low, _, high, *_ in (path.vertices for path in bars.get_paths())
    }


def test_bars_are_in_proportion_to_the_counts():
    """Three parties, two classes; the widest bar is of 0.68, by hand."""
    counts = [(4, 0), (1, 1), (2, 8)]
    rows = []
    for party, held in enumerate(counts):
        for label, number in enumerate(held):
            rows += [
                Sample(f"{party}/{label}{i}", "x", text="t", label=label) for i in range(number)
            ]
    parties = {f"p{p}": [r for r in rows if r.id.startswith(f"{p}/")] for p in range(3)}
    summaries = holdings(split(Dataset(CHOICE, rows, [], parties=parties)))
    found = widths(split_figure(summaries))
    scale = 0.68 / 8
    assert found[(0, 2.2)] == pytest.approx(4 * scale)
    assert (0, 3.2) not in found
    assert found[(1, 2.2)] == found[(1, 3.2)] == pytest.approx(scale)
    assert found[(2, 3.2)] == pytest.approx(0.68)
    assert found[(2, 0.0)] == pytest.approx(0.8 * 2.2)
    assert found[(0, 0.0)] == pytest.approx(0.8 * 2.2 * 4 / 10)


def test_pictures_of_many_classes_and_parties(tmp_path):
    summaries = many(30, 60)
    columns = _columns(summaries)
    assert [name for name, _ in columns][-2:] == ["class 29", "15 more"]
    assert len(columns) == 17
    for i, summary in enumerate(summaries):  # nothing is lost in the last column
        assert sum(sum(cells[i].values()) for _, cells in columns[1:]) == summary.samples
    one, two = (save_picture(summaries, tmp_path / f"{n}.svg").read_bytes() for n in "ab")
    assert one == two
    tables = split_tables(summaries, width=80)
    assert tables[0].row_count == 41


def test_a_table_is_never_cut():
    """Where the terminal is narrow, classes go into a table of their own."""
    summaries = many(8, 4)
    assert len(split_tables(summaries, width=200)) == 2
    assert len(split_tables(summaries, width=60)) == 3
    assert len(split_tables(holdings(split(medical())), width=60)) == 1
