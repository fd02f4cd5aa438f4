"""Import layers (docs/architecture.md): a module imports only from its layer or from those above.

Also: torch stays out of the data and split layers and of the report, NVFlare and Flower are
imported by their own folders only, and nothing heavy is imported to print `--help`.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fedmllm

ROOT = Path(fedmllm.__file__).parent
LAYERS = [
    {"errors", "rng", "folders", "imports"},
    {"data", "prompts", "metrics"},
    {"partition", "scenarios", "manifest", "export", "heterogeneity", "fusion"},
    {"models"},
    {
        "algorithms",
        "alignment",
        "client",
        "cohort",
        "drift",
        "evaluation",
        "evidence",
        "mixtures",
        "recombination",
        "strategies",
    },
    {"federation", "checkpoint", "processes", "results"},
    {
        "bench",
        "config",
        "experiment",
        "judge",
        "parties",
        "report",
        "__main__",
        "cli",
        "cli_data",
        "cli_cache",
        "cli_judge",
        "cli_deploy",
        "demo",
        "helpers",
        "listing",
        "parallel",
        "plan",
        "predict",
        "progress",
        "rerun",
        "revisions",
        "sites",
    },
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def imports(file: Path) -> set[str]:
    """Absolute module names that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def files():
    return [f for f in sorted(ROOT.rglob("*.py")) if f != ROOT / "__init__.py"]


def part(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def test_every_module_has_a_layer() -> None:
    assert {part(file) for file in files()} == set(RANK)


@pytest.mark.parametrize("file", files(), ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_to_the_ground(file) -> None:
    for name in imports(file):
        words = name.split(".")
        if words[0] == "fedmllm" and len(words) > 1 and words[1] in RANK:
            assert RANK[words[1]] <= RANK[part(file)], f"{file.name} imports {name}"
        for engine, folder in {"nvflare": "flare", "flwr": "flower"}.items():
            inside = file.is_relative_to(ROOT / "sites" / folder)
            assert words[0] != engine or inside, f"{file.name} imports {name}"
        if words[:2] == ["fedmllm", "sites"] and words[2:3] in (["flare"], ["flower"]):
            inside = {"flare", "flower"} & set(file.relative_to(ROOT).parts)
            assert inside or file.name == "cli_deploy.py", f"{file.name} imports {name}"
        if words[0] in ("torch", "transformers", "peft"):
            assert RANK[part(file)] >= 3, f"{file.name} imports {name}"
            assert part(file) != "report"


def test_help_imports_nothing_heavy() -> None:
    code = "import fedmllm.cli, sys; print(*sorted(m for m in sys.modules if '.' not in m))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = set(done.stdout.split())
    assert "typer" in loaded
    assert not loaded & {"torch", "transformers", "peft", "numpy", "pydantic", "matplotlib", "PIL"}
