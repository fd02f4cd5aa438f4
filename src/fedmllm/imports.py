"""Importing large libraries."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def collector_at_rest(*, our_process: bool = False) -> Iterator[None]:
    """No garbage collection meanwhile. PyTorch, Transformers and PEFT make a million objects that
    stay; looking through them again and again takes a fifth of their import's time.

    our_process: it is ours alone, so that what its first import has made is never looked at again.
    """
    enabled, first = gc.isenabled(), "torch" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if our_process and first and "torch" in sys.modules:
            gc.freeze()
        if enabled:
            gc.enable()
