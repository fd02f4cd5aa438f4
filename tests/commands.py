"""The commands that a document names: do they exist, with these options, on these files?"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from typer.main import get_command

from fedmllm.bench import load_grid
from fedmllm.cli import app
from fedmllm.config import load_config

_BLOCK = r"^ *```\w*\n(.*?)^ *```"
ROOT = Path(__file__).resolve().parent.parent
_CONFIGS = (["run"], ["plan"], ["deploy", "init"], ["deploy", "simulate"], ["deploy", "flower"])


def commands(text: str) -> list[list[str]]:
    """The words after `fedmllm`: of lines of code blocks, and of code within sentences."""
    blocks = re.findall(_BLOCK, text, re.MULTILINE | re.DOTALL)
    prose = re.sub(_BLOCK, "", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    named = [line for line in [*lines, *spans] if line.startswith("fedmllm ")]
    return [shlex.split(line, comments=True)[1:] for line in named]


def check_command(words: list[str]) -> None:
    """Raise if there is no such command, or if it does not take these words. Commands named
    without any words need only exist."""
    found: Any = get_command(app)
    path, rest = [], list(words)
    while hasattr(found, "commands") and rest:
        assert rest[0] in found.commands, f"no command {' '.join(words)}"
        path.append(rest[0])
        found = found.commands[rest.pop(0)]
    if not rest:
        return
    parsed = found.make_context(path[-1], list(rest)).params  # raises for what it does not know
    if path == ["bench"]:
        assert load_grid(ROOT / parsed["grid"])
    file = parsed.get("experiment")
    if path in _CONFIGS and (ROOT / str(file)).parent == ROOT / "experiments":
        load_config(ROOT / str(file), parsed["overrides"] or [])
