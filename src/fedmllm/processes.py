"""Other processes of this machine: started with one thread and a pipe, ended with this one."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable
from io import BytesIO
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from fedmllm.imports import collector_at_rest

if TYPE_CHECKING:
    import torch

PATIENCE = 10.0  # seconds that a process has to end by itself


class Child:
    """A process with a pipe to it. target: called in it with its end of the pipe and `arguments`.
    device: the only accelerator that it sees, by CUDA's number; None for all."""

    def __init__(
        self, target: Callable[..., None], *arguments: Any, device: str | None = None
    ) -> None:
        self.target, self.arguments, self.device = target, arguments, device
        self.start()

    def start(self) -> None:
        """Begin, or begin again after the process has died."""
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"  # read as the child's libraries are loaded
        try:
            work = pickle.dumps((self.target, self.arguments))
            self.process = context.Process(
                target=_begin, args=(work, theirs, self.device), daemon=True
            )
            self.process.start()
        finally:
            if before is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = before
        theirs.close()  # so that the pipe ends when the child does

    def epitaph(self) -> str:
        """How it died, in words; one that has closed its pipe and lives is ended."""
        self.process.join(timeout=PATIENCE)
        self._kill()
        code = self.process.exitcode or 0
        if code == -signal.SIGKILL:
            return "its process was killed (SIGKILL): out of memory, or by hand"
        if code < 0:
            return f"its process died of {signal.Signals(-code).name}"
        return f"its process ended with exit code {code}"

    def end(self, *, at_work: bool) -> None:
        """End the process: at once if it is at work, else it ends with its pipe."""
        self.pipe.close()
        if at_work:
            self.process.terminate()
        self.process.join(timeout=PATIENCE)
        self._kill()

    def _kill(self) -> None:
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _begin(
    work: bytes,
    pipe: Connection,
    device: str | None,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its children
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    with collector_at_rest(our_process=True):
        target, arguments = pickle.loads(work)  # which imports what they need
    target(pipe, *arguments)


def _end_with_parent() -> None:
    """A child whose parent was killed has nobody to work for."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        torch = sys.modules.get("torch")  # where it is not loaded there are no tensors
        if torch is None or not isinstance(value, torch.Tensor):
            return NotImplemented
        flat = value.detach().cpu().contiguous().reshape(-1)  # a view would bring its whole memory
        return _tensor, (flat.view(torch.uint8).numpy(), value.dtype, tuple(value.shape))


def _tensor(numbers: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    return torch.from_numpy(numbers).view(dtype).reshape(shape)


def packed(value: Any) -> bytes:
    """A value for another process of ours. Its tensors travel by value, not as shared memory: of
    that a container may have little, and it ends with who made it."""
    buffer = BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


def unpacked(data: bytes) -> Any:
    """What `packed` made; only from a process that this one has started."""
    return pickle.loads(data)
