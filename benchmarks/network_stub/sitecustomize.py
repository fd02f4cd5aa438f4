"""For `benchmarks/network.py` alone: Python reads this file at start where its folder is in
PYTHONPATH, and then a client's training is replaced by writing numbers into an update.

Everything else of a site stays as it is: its process, its model, its files, its messages. The
update holds noise, so that no compression on the way can make it small, and states how long the
writing took.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import time
from typing import Any

_BLOCK = 1_000_000


class Finder(importlib.abc.MetaPathFinder):
    """Replaces `train_client` where `fedmllm.client` is first imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "fedmllm.client":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def then_replace(module: Any) -> None:
            load(module)
            module.train_client = train_client

        spec.loader.exec_module = then_replace  # type: ignore[method-assign]
        return spec


def train_client(
    mllm: Any, params: Any, samples: Any, *, client: str, round_: int, **rest: Any
) -> tuple[Any, None]:
    """An update of the adapter's size that no training made."""
    import torch

    from fedmllm.algorithms.base import Update

    began = time.perf_counter()
    mllm.set_adapter(params)
    noise = torch.rand(_BLOCK, generator=torch.Generator().manual_seed(round_)) * 1e-4
    delta = {name: torch.empty_like(value) for name, value in params.items()}
    for value in delta.values():
        for piece in value.view(-1).split(_BLOCK):
            piece.copy_(noise[: len(piece)])
    metrics = {"loss": 0.0, "stub_seconds": time.perf_counter() - began}
    return Update(client, len(samples), delta, metrics=metrics), None


sys.meta_path.insert(0, Finder())
