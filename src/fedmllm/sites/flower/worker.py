"""The resident worker of a site: keeps the trainer, and so the base model, between messages.

    python -m fedmllm.sites.flower.worker KIT

It listens on a Unix socket that only this user can reach, whose place and key it writes into the
site's state folder. What leaves it passes the same gate as at a site of NVFlare.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import sys
import tempfile
import threading
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

from fedmllm.errors import UserError
from fedmllm.sites import settings, wire
from fedmllm.sites.flower.courier import worker_file
from fedmllm.sites.release import check_release
from fedmllm.sites.trainer import Trainer, TrainerError


class Worker:
    """Answers one message at a time. A trainer that dies is an answer; the next starts another."""

    def __init__(self, kit: Path) -> None:
        self.kit, self.file = kit.resolve(), settings.load_site(kit)
        self.trainer: Trainer | None = None

    def answer(self, task: dict[str, Any], blob: bytes) -> tuple[dict[str, Any], bytes]:
        """Facts for the server, and a message as bytes where there is one."""
        do = str(task.get("do"))
        if do == "who":
            return {"site": self.file.name}, b""
        try:
            message = wire.from_bytes(blob)
            if do == "refused":
                print(f"the server refused this site: {message.facts.get('why')}", file=sys.stderr)
                return {}, b""
            reply = self._trainer(str(task["sha256"])).ask(do, message)
            check_release(reply, self.file.reveal)
            return {}, wire.to_bytes(reply)
        except TrainerError as error:
            print(f"{do}: {error}", file=sys.stderr, flush=True)
            return {"error": error.told, "final": error.final}, b""
        except (UserError, KeyError) as error:
            print(f"{do}: {error}", file=sys.stderr, flush=True)
            return {"error": f"the site cannot answer {do}: see its log", "final": False}, b""

    def end(self) -> None:
        """End the trainer."""
        if self.trainer is not None:
            self.trainer.end()
            self.trainer = None

    def _trainer(self, sha256: str) -> Trainer:
        if self.trainer is None or self.trainer.sha256 != sha256:
            self.end()
            state = self.kit / self.file.state
            self.trainer = Trainer(
                self.kit, sha256, scratch=state / "scratch-flower", log=state / "trainer.log"
            )
        return self.trainer


def serve(kit: Path) -> None:
    """Answer until the process is ended."""
    worker, file = Worker(kit), worker_file(kit)
    with tempfile.TemporaryDirectory(prefix="fedmllm-") as folder:  # a socket's path is short
        key = secrets.token_bytes(32)
        with Listener(os.path.join(folder, "socket"), "AF_UNIX", authkey=key) as listener:
            _publish(file, {"address": listener.address, "key": key.hex()})
            print(f"{worker.file.name} waits for work", flush=True)
            try:
                while True:
                    with contextlib.suppress(OSError, EOFError, AuthenticationError):
                        _one(worker, listener.accept())
            finally:
                worker.end()
                file.unlink(missing_ok=True)


def _one(worker: Worker, pipe: Connection) -> None:
    with pipe:
        task, blob = json.loads(pipe.recv_bytes()), pipe.recv_bytes()
        reply, answer = worker.answer(task, blob)
        pipe.send_bytes(json.dumps(reply).encode())
        pipe.send_bytes(answer)


def _publish(file: Path, facts: dict[str, Any]) -> None:
    """Readable by this user only, and never half."""
    draft = file.with_name(f"{file.name}.draft")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as opened:
        json.dump(facts, opened)
    draft.replace(file)


def main(kit: Path) -> None:
    """From the command line."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    serve(kit)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except UserError as wrong:
        sys.exit(f"error: {wrong}")
