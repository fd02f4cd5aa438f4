"""The README is true: its tree, its commands, its Python example, its numbers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import check_command, commands

from fedmllm.config import load_config
from fedmllm.report import load_results

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_tree_names_what_is_there() -> None:
    tree = README.split("<!-- tree -->")[1].split("```")[1]
    named = {line.split()[0].rstrip("/") for line in tree.splitlines() if line.startswith("  ")}
    package = ROOT / "src" / "fedmllm"
    there = {
        p.name
        for p in package.iterdir()
        if p.name not in ("__init__.py", "__pycache__", "py.typed")
    }
    assert named == there
    top = {line.split()[0].rstrip("/") for line in tree.splitlines() if line[:1].isalpha()}
    assert all((ROOT / name).is_dir() for name in top)


def test_every_line_of_the_tree_has_a_purpose() -> None:
    tree = README.split("<!-- tree -->")[1].split("```")[1].strip().splitlines()
    assert all(len(line.split()) >= 3 for line in tree[1:])


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", README)) <= targets


def test_commands_parse_and_their_configs_are_good() -> None:
    found = commands(README)
    assert len(found) >= 16
    assert ["deploy", "init", "FILE", "--sites", "3", "partition.clients=3"] in found
    for words in found:
        check_command(words)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("`fedmllm fly`", "no command fly"),
        ("```\nfedmllm deploy land x\n```", "no command deploy land"),
        ("`fedmllm deploy init FILE\n--site 3`", "No such option"),
        ("`fedmllm deploy init --sites 3`", "Missing parameter: experiment"),
        ("`fedmllm deploy stop a b`", "unexpected extra argument"),
        ("```\nfedmllm run experiments/memes-fedavg.yaml  # no\n```", ""),
        ("`fedmllm run experiments/memes-fedavg.yaml algorithm=fedavgn`", "algorithm"),
    ],
)
def test_a_command_that_is_not_there_is_found(text: str, problem: str) -> None:
    (words,) = commands(text)
    if not problem:
        check_command(words)
        return
    with pytest.raises(Exception, match=problem):  # typer's own, and an assertion
        check_command(words)


@pytest.mark.parametrize(
    "file", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda f: f.stem
)
def test_every_experiment_is_a_good_config(file) -> None:
    config = load_config(file)
    assert config.name == file.stem
    assert config.title
    assert yaml.safe_load(file.read_text())


def test_the_python_example_runs(tmp_path, monkeypatch, capsys) -> None:
    code = README.split("<!-- test: example -->")[1].split("```python")[1].split("```")[0]
    assert len(code.strip().splitlines()) <= 12
    small = code.replace(
        '"training.rounds=5"', '"training.rounds=1", "data.train=80", "data.test=20"'
    )
    assert small != code
    monkeypatch.chdir(tmp_path)
    exec(compile(small, "README.md", "exec"), {})
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split()[0] for line in lines] == [
        "both",
        "image_withheld",
        "text_withheld",
        "neither",
    ]
    assert (tmp_path / "runs" / "python" / "result.json").exists()


def test_numbers_are_generated_from_the_committed_results() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "update_docs.py", "--check"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_nobody_is_sent_to_an_index_for_fedmllm() -> None:
    """No index has it: pip would fail, or fetch a stranger's package."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    pages += (ROOT / "src/fedmllm/sites/flare/pages").glob("*.md")
    for page in pages:
        text = " ".join(page.read_text().split())
        assert not re.search(r"pip (install|download) [^`]*(?<![\w./-])fedmllm(?![\w-])", text), (
            page
        )


def test_no_message_sends_to_an_index_either() -> None:
    for file in (ROOT / "src" / "fedmllm").rglob("*.py"):
        for line in file.read_text().splitlines():
            assert not re.search(r"pip (install|download) .*(?<![\w./-])fedmllm(?![\w-])", line), (
                file,
                line,
            )


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://arxiv.org/") or (ROOT / target).exists(), target


def test_every_committed_result_is_as_it_was_written() -> None:
    _, problems = load_results([ROOT / "results"])
    assert problems == []
