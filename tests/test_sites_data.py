"""Sites whose data is a table, or a saved data set, of their own: no network."""

from __future__ import annotations

import copy
import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from sites import SITES, SMALL, NearLink, hash_of, make_kits

from fedmllm.config import load_config, make_config
from fedmllm.data import load_dataset
from fedmllm.errors import UserError
from fedmllm.experiment import make_manifest, run
from fedmllm.sites import agreed, settings
from fedmllm.sites.serving import serve
from fedmllm.sites.site import Site

WORDS = ("so good", "go away", "come in", "not here", "well done", "be off")


@pytest.fixture
def shared_model(monkeypatch, mllm):
    """Every site and the server use one loaded base; each sets the adapter it needs."""
    monkeypatch.setattr("fedmllm.sites.site.load_model", lambda config: mllm)
    monkeypatch.setattr("fedmllm.sites.serving.load_model", lambda config: mllm)
    return mllm


def rows(party: str) -> list[dict[str, Any]]:
    """Five, six, … samples of a party, every other with a picture."""
    count = 5 + SITES.index(party) if party in SITES else 6
    return [
        {
            "id": f"n{i}",
            "image": f"pictures/{i % 2}.png" if i % 2 else "",
            "text": f"{WORDS[i % 6]} {party[-1]}",
            "answer": ("kind", "unkind")[i % 2],
        }
        for i in range(count)
    ]


def write_table(file: Path, *parts: str, party: bool = False) -> Path:
    """The rows of some parties, with a column that names them or without."""
    named = [{"party": part, **row} if party else row for part in parts for row in rows(part)]
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as opened:
        out = csv.DictWriter(opened, list(named[0]))
        out.writeheader()
        out.writerows(named)
    (file.parent / "pictures").mkdir(exist_ok=True)
    for i, colour in enumerate(("red", "blue")):
        Image.new("RGB", (8, 8), colour).save(file.parent / "pictures" / f"{i}.png")
    return file


def experiment(name: str, root: Path | str, **data: Any) -> dict[str, Any]:
    task = {"task": "choice", "classes": ["kind", "unkind"], "metric": "auc"}
    raw = {**copy.deepcopy(SMALL), "name": "x"}
    return {**raw, "data": {"name": name, "root": str(root), **task, **data}}


def change_settings(kit: Path, **facts: Any) -> None:
    file = kit / settings.FILE
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **facts}))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_sites_with_tables_of_their_own(tmp_path, shared_model) -> None:
    """Each holds one table without a column of parties; the server the test's. As in one process,
    where one table holds them all."""
    write_table(tmp_path / "all" / "data.csv", *SITES, party=True)
    write_table(tmp_path / "all" / "test.csv", "test")
    raw = experiment("table", tmp_path / "all")
    kits = make_kits(tmp_path, raw, server={"data": {"file": "../all/test.csv"}})
    for site in SITES:
        write_table(kits[site] / "data" / f"{site}.csv", site)
        change_settings(kits[site], data={"file": f"data/{site}.csv"})
    link = NearLink(kits, tmp_path)
    found = serve(kits["server"], hash_of(kits["server"]), link)
    here = run(make_config(raw), out=tmp_path / "here", mllm=shared_model)
    assert same(weights(kits["server"] / "runs" / "x"), weights(tmp_path / "here"))
    assert found["metrics"] == here["metrics"]
    assert found["network"]["samples"] == dict(zip(SITES, (5, 6, 7), strict=True))
    hellos = [message.facts for _, task, message in link.came if task == "hello"]
    assert [facts["manifest_sha256"] for facts in hellos] == [None] * 3  # nothing to compare


def loaded(kit: Path) -> dict[str, list[str]]:
    """The ids of a site's parties, as its settings have them read."""
    file = settings.load_site(kit)
    config = agreed.site_config(kit, file, next((kit / "experiments").iterdir()))
    parties = load_dataset(**config.data).parties
    return {name: [sample.id for sample in parties[name]] for name in parties}


def save(folder: Path, name: str, party: str) -> None:
    """A split, as `save_to_disk` writes it."""
    table = pa.Table.from_pylist([{**row, "image": None} for row in rows(party)])
    (folder / name).mkdir(parents=True)
    with pa.ipc.new_stream(str(folder / name / "data.arrow"), table.schema) as out:
        out.write_table(table)
    facts = {"_data_files": [{"filename": "data.arrow"}]}
    (folder / name / "state.json").write_text(json.dumps(facts))
    (folder / name / "dataset_info.json").write_text('{"features": {}}')


@pytest.mark.parametrize("splits", [("train",), ("train", "validation", "test")])
def test_a_saved_data_set_of_ones_own(tmp_path, splits: tuple[str, ...]) -> None:
    """Its training split is the party's, under whatever name; its test split is not trained on."""
    kits = make_kits(tmp_path, experiment("hf-datasets", "r"))
    folder = kits[SITES[1]] / "data" / "mine"
    for name in splits:
        save(folder, name, SITES[1] if name == "train" else "test")
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    change_settings(kits[SITES[1]], data={"file": "data/mine"})
    assert loaded(kits[SITES[1]]) == {SITES[1]: [f"{SITES[1]}/n{i}" for i in range(6)]}


def test_a_folder_of_tables_of_ones_own(tmp_path) -> None:
    """All its files are the party's; a test file among them is not trained on."""
    kits = make_kits(tmp_path, experiment("table", "r"))
    data = kits[SITES[0]] / "data"
    write_table(data / "2024.csv", SITES[0])
    write_table(data / "test.csv", "test")
    (data / "2025.jsonl").write_text(json.dumps({**rows(SITES[0])[0], "id": "late"}))
    change_settings(kits[SITES[0]], data={"file": "data"})
    ids = [f"{SITES[0]}/{name}" for name in ("n0", "n1", "n2", "n3", "n4", "late")]
    assert loaded(kits[SITES[0]]) == {SITES[0]: ids}
    write_table(data / "2026.csv", SITES[1], party=True)
    with pytest.raises(
        UserError, match=r"party is 'client-01', and all of this is to be 'client-0"
    ):
        loaded(kits[SITES[0]])


def test_a_shared_table_is_compared_and_one_partys_part_is_not(tmp_path, shared_model) -> None:
    """`root` with a column of parties: all of them, or this site's rows alone."""
    raw = experiment("table", "r")
    kits = make_kits(tmp_path, raw)
    write_table(tmp_path / "shared" / "data.csv", *SITES, party=True)
    write_table(tmp_path / "shared" / "test.csv", "test")
    config = load_config(
        kits["server"] / "experiments" / "x.yaml", [f"data.root={tmp_path / 'shared'}"]
    )
    whole = make_manifest(config, load_dataset(**config.data)).sha256
    write_table(kits[SITES[1]] / "data" / "data.csv", SITES[1], party=True)
    write_table(kits[SITES[1]] / "data" / "test.csv", "test")
    for site, root, expected in ((SITES[0], "../shared", whole), (SITES[1], "data", None)):
        change_settings(kits[site], data={"root": root})
        made = Site(kits[site], hash_of(kits[site]))
        assert (made.manifest_sha256, made.samples) == (expected, 5 + SITES.index(site))
    change_settings(kits[SITES[2]], data={"root": "../client-01/data"})
    with pytest.raises(UserError, match="is another party's"):
        Site(kits[SITES[2]], hash_of(kits[SITES[2]]))


def test_files_that_cannot_be(tmp_path) -> None:
    for change, data, words in [
        ({"scenario": {"name": "missing"}}, {"file": "x.csv"}, "choose scenario aligned"),
        ({"data": SMALL["data"]}, {"file": "x.csv"}, "conversations or table or hf-datasets"),
        ({}, {"file": "x.csv", "manifest": "m.json"}, "a file of one's own has none"),
        ({}, {"file": "x.csv"}, "does not exist"),
    ]:
        kits = make_kits(tmp_path / words[:9], {**experiment("table", "r"), **change})
        change_settings(kits[SITES[0]], data=data)
        with pytest.raises(UserError, match=words):
            loaded(kits[SITES[0]])
    kits = make_kits(tmp_path, experiment("hf-datasets", "r"))
    change_settings(kits["server"], data={"file": "x"})
    with pytest.raises(UserError, match=r"a test file of conversations or table.*none: true"):
        agreed.server_config(
            kits["server"],
            settings.load_server(kits["server"]),
            kits["server"] / "experiments" / "x.yaml",
        )
