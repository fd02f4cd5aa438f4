"""Folders: where FedMLLM keeps what it can make again, and one process at a time in a run's."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from fedmllm.errors import UserError


def cache_folder(part: str) -> Path:
    """``$XDG_CACHE_HOME/fedmllm/PART``, by default below ``~/.cache``.

    A relative XDG_CACHE_HOME counts as none, as the XDG Base Directory Specification says.
    """
    base = os.environ.get("XDG_CACHE_HOME") or ""
    root = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    return root / "fedmllm" / part


class Hold:
    """A folder for this process alone. The lock is the operating system's (`flock`) on the folder
    itself: it falls with its process, however that ends, and leaves no file. File systems without
    such locks for folders (some of a network) give none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.handle: int | None = None

    def take(self) -> None:
        """Hold it from now on, and make it if need be. Raises `UserError` if another has it."""
        if self.handle is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise UserError(
                f"another process is at work in {self.folder}: wait for it, end it, or choose "
                "another folder with --out"
            ) from None
        except OSError:  # no such locks here
            return

    def release(self) -> None:
        """Let others have it."""
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None


@contextlib.contextmanager
def held(folder: Path) -> Iterator[Hold]:
    """A hold on a folder: at once if it is there, else when it is taken."""
    hold = Hold(folder)
    try:
        if folder.is_dir():
            hold.take()
        yield hold
    finally:
        hold.release()
