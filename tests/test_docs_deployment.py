"""docs/deployment.md is true: its commands, its keys, its settings, its counts of a large model."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import check_command, commands

from fedmllm.config import load_config
from fedmllm.sites import agreed, settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import plan_8b  # noqa: E402

PAGE = (ROOT / "docs" / "deployment.md").read_text()
PAGES = sorted((ROOT / "src/fedmllm/sites/flare/pages").glob("*.md"))
FILES = dict(re.findall(r"<!-- file: (\w+) -->\n```yaml\n(.*?)```", PAGE, re.DOTALL))


def test_the_commands_are_there() -> None:
    found = commands(PAGE)
    named = {tuple(words[:2]) for words in found}
    deploy = ("init", "start", "status", "stop", "resume", "simulate", "node", "supervise", "check")
    assert {("deploy", word) for word in (*deploy, "renew", "flower", "worker")} <= named
    for words in found:
        check_command(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_the_kits_pages_are_there(page: Path) -> None:
    found = commands(page.read_text())
    assert found or page.stem in ("install",)
    for words in found:
        check_command(words)


def keys(model: Any) -> set[str]:
    """The keys of a settings file; those of sections with their section's name."""
    found = set()
    for name, field in model.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        found |= {f"{name}.{key}" for key in inner} if inner else {name}
    return found


def test_the_tables_of_keys_are_whole() -> None:
    """Every key of a machine's file is in the table of its machine, and no other."""
    site, server = (
        re.search(rf"\| key at {which} \| what \|\n\|---\|---\|\n(.*?)\n\n", PAGE, re.DOTALL)[1]
        for which in ("a site", "the server")
    )

    def named(table: str) -> set[str]:
        first = [line.split("|")[1] for line in table.splitlines()]
        return {key for cell in first for key in re.findall(r"`([\w.]+)`", cell)}

    assert named(site) == keys(settings.SiteFile)
    rest = {key for key in keys(settings.ServerFile) if not key.startswith("data.")}
    assert named(server) == {*rest, "data"}


def test_the_settings_for_a_large_model_are_good(tmp_path) -> None:
    """They are read as a machine reads them: keys, kinds, what a machine may set for itself."""
    for kit in ("site", "server"):
        for folder, name in (("local", "fedmllm.yml"), ("experiments", "eight-billion.yaml")):
            (tmp_path / kit / folder).mkdir(parents=True)
            text = FILES["experiment" if folder == "experiments" else kit]
            (tmp_path / kit / folder / name).write_text(text)
    file = tmp_path / "site" / "experiments" / "eight-billion.yaml"
    site = agreed.site_config(tmp_path / "site", settings.load_site(tmp_path / "site"), file)
    assert (site.model.quantization, site.model.device) == ("nf4", "cuda")
    assert site.data["parties"] == "clinic-a.json"
    server = agreed.server_config(
        tmp_path / "server", settings.load_server(tmp_path / "server"), file
    )
    assert (server.model.quantization, server.model.device) == ("none", "cpu")
    assert settings.load_server(tmp_path / "server").data.none
    planned = yaml.safe_load(json.dumps(plan_8b.experiment(tmp_path)))
    shown = load_config(file)
    for section in ("training", "partition", "lora", "trained", "algorithm"):
        assert getattr(shown, section) == getattr(load_plain(planned, tmp_path), section), section


def load_plain(raw: dict[str, Any], folder: Path) -> Any:
    (folder / "planned.yaml").write_text(yaml.safe_dump(raw))
    return load_config(folder / "planned.yaml")


def test_the_counts_of_a_large_model_are_those_of_a_plan_today(tmp_path) -> None:
    """And those that a hand counts: LoRA of rank 8 on q, k, v, o of 32 layers of Llama-3-8B."""
    from fedmllm.config import make_config
    from fedmllm.plan import make_plan

    made = make_plan(make_config(plan_8b.experiment(plan_8b.write_model(tmp_path)), plan_8b.NF4))
    found = json.loads(plan_8b.OUT.read_text())
    assert found["exact"] == plan_8b.exact(made)
    adapter = 32 * 8 * (2 * (4096 + 4096) + 2 * (4096 + 1024)) * 4
    assert found["exact"]["adapter_bytes"] == adapter
    assert found["exact"]["round_up"] == found["exact"]["round_down"] == 8 * adapter
    assert found["exact"]["run_up"] == 40 * 8 * adapter
    assert found["server_without_tests"]["adapter_bytes"] == adapter
    planned = found["machines"]["site, CPU, 4 bit, checkpointing"]["weights_bytes"]
    assert planned == made.memory.resident["weights"]
