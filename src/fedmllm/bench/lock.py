"""One benchmark at a time in a folder, so that no cell is run twice.

The lock is the operating system's (`flock`), held by an open file: it falls with its process,
however that ends, and no stale one is ever left. What the file says is for people.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from fedmllm.errors import UserError

LOCK = ".bench.lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder. Raises `UserError` that names who holds it if another process does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.read().strip() or "another process"
            raise UserError(
                f"{folder} is in use by {who}: wait for it, end it, or choose another --out"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
