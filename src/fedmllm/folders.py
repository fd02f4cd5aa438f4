"""Where FedMLLM keeps what it can make again: below the user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(part: str) -> Path:
    """``$XDG_CACHE_HOME/fedmllm/PART``, by default below ``~/.cache``.

    A relative XDG_CACHE_HOME counts as none, as the XDG Base Directory Specification says.
    """
    base = os.environ.get("XDG_CACHE_HOME") or ""
    root = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    return root / "fedmllm" / part
