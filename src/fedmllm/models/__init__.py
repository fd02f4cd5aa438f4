"""The models that a config can name. Any other folder goes in by `model.path`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedmllm.errors import UserError, unknown


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
