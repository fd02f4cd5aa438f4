"""The way from a ClientApp to the worker of its site: a Unix socket with a key. No torch here."""

from __future__ import annotations

import json
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

from fedmllm.errors import UserError
from fedmllm.sites import settings

WORKER_FILE = "worker.json"  # in the site's state folder: where the worker listens, and its key


def ask_worker(kit: Path, task: dict[str, Any], blob: bytes) -> tuple[dict[str, Any], bytes]:
    """The worker's reply: facts (``error`` if it has none) and a message of ours as bytes.

    task: ``do`` and ``sha256`` of the experiment.
    """
    file = kit / settings.load_site(kit).state / WORKER_FILE
    try:
        found = json.loads(file.read_text())
        with Client(found["address"], "AF_UNIX", authkey=bytes.fromhex(found["key"])) as pipe:
            pipe.send_bytes(json.dumps(task).encode())
            pipe.send_bytes(blob)
            reply = json.loads(pipe.recv_bytes())
            return reply, pipe.recv_bytes()
    except (OSError, EOFError, ValueError, KeyError, AuthenticationError):
        return {"error": "the site's worker does not run", "final": False}, b""


def worker_file(kit: Path) -> Path:
    """Where a worker says how it is reached. Raises `UserError` for a kit that is none."""
    file = settings.load_site(kit)
    folder = kit / file.state
    if folder.is_file():
        raise UserError(f"{folder} is a file, and state is to be a folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / WORKER_FILE
