"""Checkpoints: all that a run needs to go on, written so that a kill at any instant loses at
most the round in progress.

A checkpoint is a folder `round-000012` that appears under its name only when it is complete and
on disk (written beside it, synced, renamed). The last two are kept; a damaged one is passed over.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedmllm.algorithms.base import Params, ServerState
from fedmllm.errors import UserError

KEEP = 2
SERVER, CLIENTS, STATE = "server.safetensors", "clients.safetensors", "state.json"
_SEP = "|"  # between a slot's or client's name and the tensor's


@dataclass(frozen=True)
class Checkpoint:
    """The server's state, the clients' memories and the history up to its round."""

    state: ServerState
    memory: Mapping[str, Params]
    history: list[dict[str, Any]]


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint and drop those older than the last two."""
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / ".draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    state = checkpoint.state
    with writing(folder):
        save_file(_flat({"params": state.params, **state.slots}), draft / SERVER)
        save_file(_flat(checkpoint.memory), draft / CLIENTS)
    facts = {
        "round": state.round,
        "slots": sorted(state.slots),
        "clients": sorted(checkpoint.memory),
        "history": checkpoint.history,
        "sha256": {name: _sha256(draft / name) for name in (SERVER, CLIENTS)},
    }
    (draft / STATE).write_text(json.dumps(facts))
    for path in [*draft.iterdir(), draft]:
        _sync(path)
    final = folder / _name(state.round)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(draft, final)
    _sync(folder)
    for old in _rounds(folder)[:-KEEP]:
        shutil.rmtree(old)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """A tensor file that cannot be written (a full disk) is a `UserError`: safetensors says it by
    an error of its own, which is no OSError."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(
            f"{folder} cannot be written to: {error}; free it and go on with --resume, or choose "
            "another place"
        ) from error


def load(folder: Path) -> Checkpoint | None:
    """The newest undamaged checkpoint, or None."""
    for path in reversed(_rounds(folder)):
        found = _read(path)
        if found is not None:
            return found
    return None


def _read(path: Path) -> Checkpoint | None:
    try:
        facts = json.loads((path / STATE).read_text())
        if any(_sha256(path / name) != digest for name, digest in facts["sha256"].items()):
            return None
        server = _nested(load_file(path / SERVER))
        memory = _nested(load_file(path / CLIENTS))
    except (OSError, ValueError, KeyError, SafetensorError):
        return None
    params = server.pop("params")
    slots = {name: server.get(name, {}) for name in facts["slots"]}
    clients = {name: memory.get(name, {}) for name in facts["clients"]}
    return Checkpoint(ServerState(facts["round"], params, slots), clients, facts["history"])


def _flat(groups: Mapping[str, Params]) -> Params:
    return {
        f"{group}{_SEP}{name}": value.contiguous()
        for group, params in groups.items()
        for name, value in params.items()
    }


def _nested(flat: Params) -> dict[str, Params]:
    groups: dict[str, Params] = {}
    for key in sorted(flat):
        group, name = key.rsplit(_SEP, 1)
        groups.setdefault(group, {})[name] = flat[key]
    return groups


def _name(round_: int) -> str:
    return f"round-{round_:06d}"


def _rounds(folder: Path) -> list[Path]:
    return sorted(folder.glob("round-*")) if folder.is_dir() else []


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
