"""Files of the feature cache: written whole or not at all, bounded, listed, cleared. No torch.

    features/MODEL/model.json            what the entries were made with (`feature_store.identity`)
    features/MODEL/ab/abcd….safetensors  one image; its name is the digest of the image's bytes
    features/MODEL/ab/.draft-…           an entry that is being written, or was when it was killed

An entry's time of change is that of its last use, so that the oldest-used leave first.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmllm.folders import cache_folder

SUFFIX = ".safetensors"
DRAFT = ".draft-"
FACTS = "model.json"
ABANDONED = 3600.0  # seconds after which a draft has no writer any more
ROOM = 0.9  # of the limit is left when entries had to leave, so that they do not each time


@dataclass(frozen=True)
class CachedModel:
    """The entries of one model with one setting of everything. used: seconds since the epoch."""

    folder: Path
    facts: dict[str, Any]
    entries: int
    bytes: int
    used: float


def features_folder() -> Path:
    """Where the entries of all models lie."""
    return cache_folder("features")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that others see whole or not at all, also if this process is killed.

    Of two writers of one file the last wins. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=DRAFT)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


def mark_used(path: Path) -> None:
    """An entry was used now; in a folder that cannot be written to nobody removes it either."""
    with contextlib.suppress(OSError):
        os.utime(path)


def remove(path: Path) -> None:
    """Remove a file that may be gone already or may not be ours to remove."""
    with contextlib.suppress(OSError):
        path.unlink()


def trim(folder: Path, limit_bytes: int) -> int:
    """Keep all entries together within a limit; returns the bytes that are left.

    If they are more, those that were not used for longest leave until nine tenths are left.
    Abandoned drafts leave anyway.
    """
    oldest = time.time() - ABANDONED
    found, total = [], 0
    for path, facts in _files(folder):
        if path.name.startswith(DRAFT) and facts.st_mtime < oldest:
            remove(path)
            continue
        total += facts.st_size
        if path.suffix == SUFFIX:
            found.append((facts.st_mtime_ns, str(path), facts.st_size))
    if total <= limit_bytes:
        return total
    for _, path_, size in sorted(found):
        if total <= ROOM * limit_bytes:
            break
        remove(Path(path_))
        total -= size
    return total


def cached_models(folder: Path) -> list[CachedModel]:
    """What the cache holds, the model used last first."""
    models = []
    for model in _models(folder):
        entries = [facts for path, facts in _files_below(model) if path.suffix == SUFFIX]
        models.append(
            CachedModel(
                folder=model,
                facts=_facts(model),
                entries=len(entries),
                bytes=sum(facts.st_size for facts in entries),
                used=max((facts.st_mtime for facts in entries), default=0.0),
            )
        )
    return sorted(models, key=lambda model: (-model.used, model.folder.name))


def clear(folder: Path) -> tuple[int, int]:
    """Remove all entries, also while others read and write; returns how many and their bytes.

    Only what `cached_models` lists is removed. Raises OSError if that cannot be done.
    """
    models = cached_models(folder)
    for model in models:
        # out of sight at once; what a writer adds to it meanwhile goes with it
        gone = model.folder.with_name(f"{DRAFT}{model.folder.name}-{os.getpid()}")
        model.folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
    for left in folder.glob(f"{DRAFT}*"):
        shutil.rmtree(left, ignore_errors=True)
    return sum(model.entries for model in models), sum(model.bytes for model in models)


def _models(folder: Path) -> list[Path]:
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in found if not path.name.startswith(".") and (path / FACTS).is_file()]


def _facts(model: Path) -> dict[str, Any]:
    try:
        found = json.loads((model / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for model in _models(folder):
        yield from _files_below(model)


def _files_below(model: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Entries and drafts; what vanishes meanwhile is left out."""
    for path in model.glob("*/*"):
        with contextlib.suppress(OSError):
            yield path, path.stat()
