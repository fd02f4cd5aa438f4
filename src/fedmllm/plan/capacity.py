"""How much memory there is: of the GPU, or of this machine within its limits."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from fedmllm.errors import UserError
from fedmllm.results import peak_memory_bytes

_CGROUP = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


@dataclass(frozen=True)
class Capacity:
    """Bytes, and what they are: ``given``, ``free GPU memory`` or ``free main memory``."""

    bytes: int
    kind: str

    def __str__(self) -> str:
        return f"{self.bytes / 10**9:.3g} GB ({self.kind})"


def find_capacity(device: str, given: int | None = None) -> Capacity | None:
    """What a run on `device` can use: `given`, or what is free now, or None if it cannot be known.

    Raises `UserError` for a device that torch does not know.
    """
    try:
        kind = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device {device!r} is not known: use cpu, cuda or cuda:0") from error
    if given is not None:
        return Capacity(given, "given")
    if kind.type == "cuda":
        if not torch.cuda.is_available() or (kind.index or 0) >= torch.cuda.device_count():
            return None
        return Capacity(torch.cuda.mem_get_info(kind)[0], "free GPU memory")
    free = _free_main_memory() if kind.type == "cpu" else None
    return None if free is None else Capacity(free + resident_now(), "free main memory")


def resident_now() -> int:
    """Main memory that this process holds: the interpreter with the libraries of a run."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return peak_memory_bytes()


def _free_main_memory() -> int | None:
    """The least of what the system has and what a container may take."""
    found = [count for count in (_meminfo(), *map(_within, _CGROUP)) if count is not None]
    if not found and sys.platform == "darwin":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(found, default=None)


def _meminfo() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _within(files: tuple[str, str]) -> int | None:
    """What is left of a container's limit; None without one."""
    try:
        limit, used = (Path(file).read_text().strip() for file in files)
        return None if limit == "max" else max(0, int(limit) - int(used))
    except (OSError, ValueError):
        return None
