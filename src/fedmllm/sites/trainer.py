"""The resident trainer: a child process that loads the base once and serves rounds.

    with Trainer(kit, sha256) as trainer:
        reply = trainer.ask("train", message)

A crash of training, a kill or memory that runs out end the child and cost the round in progress;
the next request starts another. Requests and replies are JSON over a pipe of its own, tensors
safetensors files in a private folder: nothing is pickled, and what a library prints disturbs
nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from fedmllm.errors import MemoryRanOutError, UserError
from fedmllm.sites import wire
from fedmllm.sites.handshake import RefusedError
from fedmllm.sites.wire import Message

_POLL = 0.2
_SEE = "the reason stands in the site's log"  # it may name files and samples


class TrainerError(Exception):
    """The child could not do what it was asked. told: what the server may be told of it. final:
    it would be the same if it were asked again."""

    def __init__(self, message: str, told: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.told, self.final = told, final


class Trainer:
    """The parent's end. scratch: a folder that only this object uses; log: the child's output."""

    def __init__(self, kit: Path, config_sha256: str, *, scratch: Path, log: Path) -> None:
        self.kit, self.sha256, self.scratch, self.log = kit, config_sha256, scratch, log
        self.process: subprocess.Popen[bytes] | None = None
        self.pipe: Connection | None = None
        self.count = 0

    def __enter__(self) -> Trainer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    def ask(
        self, do: str, message: Message, *, aborted: Callable[[], bool] = lambda: False
    ) -> Message:
        """Have the child do one of `wire.TASKS`.

        The message gives up its tensors, so that they are not held twice while the child works.
        aborted: asked while waiting; when it says so the child is ended. Raises `TrainerError`.
        """
        if self.process is None or self.process.poll() is not None:
            self.start()
        assert self.pipe is not None
        self.count += 1
        file = self.scratch / f"{self.count:06d}-in.safetensors"
        answer = self.scratch / f"{self.count:06d}-out.safetensors"
        try:
            wire.write(message, file)
            message.tensors.clear()
            give_back_memory()
            self._send({"do": do, "in": str(file), "out": str(answer)})
            reply = self._wait(aborted)
            if "error" in reply:
                raise TrainerError(reply["error"], reply["told"], final=reply["final"])
            return wire.read(answer)
        finally:
            file.unlink(missing_ok=True)
            answer.unlink(missing_ok=True)

    def end(self) -> None:
        """End the child, at once."""
        if self.pipe is not None:
            self.pipe.close()
            self.pipe = None
        if self.process is not None:
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait()
            self.process = None
        shutil.rmtree(self.scratch, ignore_errors=True)

    def start(self) -> None:
        """Start the child, or start it anew; it loads its model without being asked."""
        self.end()
        self.scratch.mkdir(parents=True, mode=0o700)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        ours, theirs = Pipe()
        arguments = [str(theirs.fileno()), str(os.getpid()), str(self.kit), self.sha256]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fedmllm.sites.trainer", *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", **os.environ},
            )
        theirs.close()  # so that the pipe ends when the child does
        self.pipe = ours

    def _send(self, request: dict[str, Any]) -> None:
        assert self.pipe is not None
        with contextlib.suppress(OSError):  # it has died: reading its pipe says so
            self.pipe.send_bytes(json.dumps(request).encode())

    def _wait(self, aborted: Callable[[], bool]) -> dict[str, Any]:
        assert self.pipe is not None
        while not self.pipe.poll(_POLL):
            if aborted():
                self.end()
                raise TrainerError("the task was called off", "the task was called off")
        try:
            reply: dict[str, Any] = json.loads(self.pipe.recv_bytes())
            return reply
        except (EOFError, OSError):
            how = self._epitaph()
            raise TrainerError(f"{how}; its output is in {self.log}", how) from None

    def _epitaph(self) -> str:
        assert self.process is not None
        code = self.process.wait()
        if code == -signal.SIGKILL:
            how = "was killed (SIGKILL): out of memory, or by hand"
        elif code < 0:
            how = f"died of {signal.Signals(-code).name}"
        else:
            how = f"ended with exit code {code}"
        return f"the training process {how}"


# -- in the child ------------------------------------------------------------------------------


def main(arguments: list[str]) -> None:
    """Serve requests until the pipe closes. arguments: descriptor, parent's id, kit, hash."""
    pipe = Connection(int(arguments[0]))
    threading.Thread(target=_end_with, args=(int(arguments[1]),), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its child
    site, failed = answered("take part", lambda: _site(arguments))
    while True:
        try:
            request = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        reply = failed
        if site is not None:
            _, reply = answered(request["do"], lambda: _serve(site, request))  # noqa: B023
        give_back_memory()  # before the parent reads the answer
        pipe.send_bytes(json.dumps(reply).encode())
        if site is None:
            return  # what was wrong may be mended by the time the next child starts


def _site(arguments: list[str]) -> Any:
    from fedmllm.sites.site import Site

    return Site(Path(arguments[2]), arguments[3])


def answered(what: str, work: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """What came of some work, or None and a reply that says why."""
    try:
        return work(), {}
    except RefusedError as error:
        return None, {"error": str(error), "told": str(error), "final": True}
    except UserError as error:
        final = not isinstance(error, MemoryRanOutError)
        return None, {"error": str(error), "told": f"cannot {what}: {_SEE}", "final": final}
    except Exception as error:
        kind = f"{type(error).__name__}, so it cannot {what}"
        text = f"{kind}\n{traceback.format_exc()}"
        return None, {"error": text, "told": f"{kind}: {_SEE}", "final": False}


def _serve(site: Any, request: dict[str, Any]) -> None:
    message = wire.read(Path(request["in"]))
    wire.write(site.answer(request["do"], message), Path(request["out"]))


def give_back_memory() -> None:
    """Return freed memory to the system, which an allocator keeps for itself otherwise: a site's
    two processes hold the adapter in turns."""
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _end_with(parent: int) -> None:
    """A trainer whose parent was killed has nobody to work for."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
