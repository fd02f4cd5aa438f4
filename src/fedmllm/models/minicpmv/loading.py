"""Reading a checkpoint whole: a tensor that is missing would be random, and nobody would notice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmllm.errors import UserError
from fedmllm.models.minicpmv.modeling import MiniCPMVForConditionalGeneration


def load_checkpoint(path: str | Path, **kwargs: Any) -> MiniCPMVForConditionalGeneration:
    """`from_pretrained` that raises `UserError` unless the checkpoint fits the model exactly."""
    loaded: Any = MiniCPMVForConditionalGeneration.from_pretrained(
        path, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
    )
    model, info = loaded
    check_loading(info, path)
    return model


def check_loading(info: Mapping[str, Any], path: str | Path) -> None:
    """Judge transformers' `output_loading_info`.

    Raises `UserError` naming a tensor that is missing, unknown or of another shape.
    """
    missing = sorted(info["missing_keys"])
    foreign = sorted(info["unexpected_keys"])
    shapes = sorted(info["mismatched_keys"])
    facts = [f"lacks {len(missing)} tensors, e.g. {missing[0]}"] if missing else []
    facts += [f"has {len(foreign)} unknown tensors, e.g. {foreign[0]}"] if foreign else []
    facts += [
        f"{name} is {tuple(given)}, the model needs {tuple(needed)}"
        for name, given, needed in shapes[:1]
    ]
    if facts:
        raise UserError(
            f"checkpoint {str(path)!r} does not fit its config.json: "
            + "; ".join(facts)
            + ". Fetch it again, or use the config.json it was saved with"
        )
