"""A helper's process without a model, for `test_helpers.py`: what it is asked is what it does."""

from __future__ import annotations

import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fedmllm.processes import packed, unpacked


def stub(pipe: Connection, config: Any, folder: Path, began: float) -> None:
    """Answer until the pipe closes. A file `dies` in the folder, of so many bytes: the process dies
    as often. `loads`: it does not load."""

    def send(kind: str, value: Any) -> None:
        pipe.send_bytes(packed((kind, value)))

    if (folder / "loads").exists():
        send("failed", ("no memory for the base\nin detail", True))
        return
    send("done", (None, set()))
    while True:
        try:
            do, arguments = unpacked(pipe.recv_bytes())
        except EOFError:
            return
        dies = folder / "dies"
        if do == "work" and dies.exists() and (left := dies.read_text()):
            dies.write_text(left[1:])
            os.kill(os.getpid(), signal.SIGKILL)
        if do == "tell":
            send("event", {"event": "told"})
        send("done", ((do, os.getpid(), arguments), {"cut"}))
