"""A privacy filter for tests: writes down all that is about to leave a site."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from nvflare.apis.filter import Filter
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable


class Recorder(Filter):
    """Appends a line a message to sent.jsonl in the kit: every key, and what is behind it."""

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        kit = Path(fl_ctx.get_engine().get_workspace().get_root_dir())
        line = {"task": fl_ctx.get_prop("__task_name__"), "content": described(dict(shareable))}
        with (kit / "sent.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return shareable


def described(value: Any) -> Any:
    """A value with tensors replaced by their type and shape."""
    if isinstance(value, torch.Tensor):
        return f"tensor {value.dtype} {list(value.shape)}"
    if isinstance(value, dict):
        return {str(key): described(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [described(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(type(value))
