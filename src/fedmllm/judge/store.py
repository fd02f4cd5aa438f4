"""Replies of the judge by the question that was asked, kept in `verdicts.jsonl` of run folders.

A line is added with one write as soon as its reply is there, so that a kill loses none that is
whole. A reply and not a verdict is kept: how it is read can change without asking again.
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import asdict
from pathlib import Path

from fedmllm.errors import UserError
from fedmllm.judge.endpoint import Reply

VERDICTS_FILE = "verdicts.jsonl"


class Verdicts:
    """All replies that are known, of several folders. Safe to use from several threads."""

    def __init__(self) -> None:
        self.known: dict[str, Reply] = {}
        self._kept: dict[Path, set[str]] = {}
        self._lock = threading.Lock()

    def read(self, folder: Path) -> None:
        """Take in a folder's replies. A line that was cut off by a kill counts as none."""
        kept = self._kept.setdefault(folder, set())
        file = folder / VERDICTS_FILE
        if not file.exists():
            return
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from None
        for line in content.split(b"\n"):
            try:
                facts = json.loads(line)
                key = facts.pop("key")
                reply = Reply(**facts)
            except (ValueError, TypeError, KeyError, AttributeError):
                continue
            if isinstance(key, str) and isinstance(reply.text, str):
                self.known[key] = reply
                kept.add(key)

    def keep(self, folder: Path, key: str, reply: Reply) -> None:
        """Keep a reply in a folder, once; one whose tokens were spent is known to this object
        alone, so that it is asked again the next time."""
        with self._lock:
            self.known[key] = reply
            kept = self._kept.setdefault(folder, set())
            if key in kept or reply.spent:
                return
            kept.add(key)
            facts = asdict(reply)
            del facts["spent"]
            line = json.dumps({"key": key, **facts}) + "\n"
            _append(folder / VERDICTS_FILE, line.encode())


def _append(file: Path, line: bytes) -> None:
    """One write at the end; after a line that was cut off, on a line of its own."""
    with file.open("ab+", buffering=0) as out:
        if out.seek(0, os.SEEK_END):
            out.seek(-1, os.SEEK_END)
            line = line if out.read(1) == b"\n" else b"\n" + line
        out.write(line)
