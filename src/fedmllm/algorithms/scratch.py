"""Tensors of a round that do not stay in memory."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fedmllm.errors import UserError


class Scratch:
    """Tensors one after the other in a file without a name: it ends with the process or with this
    object, whatever ends them, so that nothing is ever left to be cleaned up or to be taken for a
    checkpoint. Reads and writes go through no mapping, so that they do not count as memory.

    folder: where, made if it is not there; None for the system's (TMPDIR), which may lie in memory.
    Nothing is made before the first write.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._file: Any = None
        self._end = 0

    def write(self, tensors: Iterable[torch.Tensor]) -> int:
        """Append tensors; returns the byte at which they begin. Raises `UserError` if there is no
        room."""
        start = end = self._end
        try:
            file = self._opened()
            file.seek(start)
            for tensor in tensors:
                end += file.write(_bytes_of(tensor.detach().cpu().contiguous()))
            file.flush()
        except OSError as error:
            raise UserError(
                f"updates of a round cannot be written to {self.folder or tempfile.gettempdir()} "
                f"({error}): {end / 1e6:,.0f} MB of them are there; free room for the "
                "updates of all clients of a round"
            ) from error
        self._end = end
        return start

    def read(self, into: torch.Tensor, start: int) -> None:
        """Fill a contiguous tensor from a byte on. Raises OSError if the file ends before."""
        place = memoryview(_bytes_of(into))
        self._file.seek(start)
        if self._file.readinto(place) != len(place):
            raise OSError(f"{len(place)} bytes at {start} are not there")

    def clear(self) -> None:
        """Forget all and give the room back."""
        if self._file is not None:
            self._file.seek(0)
            self._file.truncate()
        self._end = 0

    def _opened(self) -> Any:
        if self._file is None:
            if self.folder is not None:
                self.folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115
            weakref.finalize(self, self._file.close)
        return self._file


def _bytes_of(tensor: torch.Tensor) -> Any:
    """The memory of a contiguous tensor of any dtype."""
    return tensor.view(-1).view(torch.uint8).numpy()
