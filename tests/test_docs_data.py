"""docs/data.md is true: its files load, its commands parse, its table of columns is the code's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image
from test_cli import call

from fedmllm.config import load_config
from fedmllm.data import load_dataset
from fedmllm.data.rows import ROLES
from fedmllm.manifest import load

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "data.md").read_text()
FILES = dict(re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", PAGE, re.DOTALL))
COMMANDS = re.findall(r"^fedmllm (.+)$", PAGE, re.MULTILINE)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty place with my-data/pictures."""
    (tmp_path / "my-data" / "pictures").mkdir(parents=True)
    for name in ("1", "2"):
        Image.new("RGB", (2, 2), "red").save(tmp_path / "my-data" / "pictures" / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_files_load(folder) -> None:
    (folder / "my-data" / "data.csv").write_text(FILES["data.csv"])
    dataset = load_dataset("table", root="my-data")
    assert {name: len(party) for name, party in dataset.parties.items()} == {
        "archive": 2,
        "clinic": 2,
    }
    assert dataset.train[2].question == "Which organ, if any?"
    (folder / "my-data" / "data.csv").unlink()
    (folder / "my-data" / "data.jsonl").write_text(FILES["data.jsonl"])
    (folder / "choice.yaml").write_text(FILES["choice.yaml"])
    config = load_config(folder / "choice.yaml")
    found = load_dataset(**config.data)
    assert (list(found.parties), len(found.test)) == (["north", "south"], 1)
    assert found.task.classes == ("kind", "unkind")
    assert found.task.metric == "auc"


def test_the_commands_work(folder, monkeypatch, capsys) -> None:
    (folder / "my-data" / "data.csv").write_text(FILES["data.csv"])
    assert len(COMMANDS) == 5
    for command in COMMANDS:
        words = shlex.split(command)
        if words[0] == "run":
            config = load_config(ROOT / words[1], words[2:])
            assert load_dataset(**config.data).parties
            continue
        more = [] if "train=400" in words or "table" in words else ["train=40", "test=8"]
        code, out, err = call(monkeypatch, capsys, *words, *more)
        assert code == 0, err + out
        if "--verify" not in words:
            file = words[words.index("--out") + 1] if "--out" in words else "manifest.json"
            assert f"sha256    {load(file).sha256}" in out
    tree = PAGE.split("DIR/\n")[1].split("```")[0]
    named = {w.strip(",/").split("/")[0] for w in re.findall(r"^  (\S+)", tree, re.MULTILINE)}
    assert named == {path.name for path in Path("out").iterdir()}


def test_the_columns_are_those_of_the_code() -> None:
    part = PAGE.split("| column | holds |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)`", part, re.MULTILINE)) == set(ROLES)


def test_links_and_experiments_exist() -> None:
    for name in re.findall(r"experiments/[\w-]+\.yaml", PAGE):
        assert (ROOT / name).exists()
