"""The models that a config can name. Any other folder goes in by `model.path`."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

from fedmllm.errors import UserError, unknown

# PEFT imports it where it is installed, and it then tells of kernels that it can do without
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@dataclass(frozen=True)
class ModelSpec:
    """A registry entry: one line for `fedmllm ls` and where the weights lie."""

    summary: str
    path: str


MODELS: dict[str, ModelSpec] = {
    "embedded": ModelSpec(
        summary="tiny Idefics3 inside the package, pre-trained on drawn scenes; CPU, offline",
        path=str(Path(__file__).parent / "embedded"),
    ),
}


def model_path(name: str, path: str | None = None) -> str:
    """Folder (or hub name) of a model. Raises `UserError` for an unknown name without a path."""
    if path is not None:
        return path
    if name not in MODELS:
        raise UserError(unknown("model", name, MODELS) + ", or give model.path")
    return MODELS[name].path


def weights_digest(path: str, *, limit: int = 2**30) -> str | None:
    """SHA-256 over the weight files of a folder, so that a result says which base it is of.

    None for a hub name, and for more than `limit` bytes, where hashing would take longer than a
    person waits.
    """
    files = sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else []
    if not files or sum(file.stat().st_size for file in files) > limit:
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
