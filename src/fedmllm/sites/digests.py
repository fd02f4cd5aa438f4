"""Fingerprints of what all parties must share: base model, tokenizer, adapter layout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmllm.algorithms.base import Params

_CHUNK = 2**24


def base_digest(path: str) -> str:
    """SHA-256 over the weight files of a folder, in order of their names; for a hub name the name.

    Reads everything: about a second a gigabyte.
    """
    files = sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else []
    if not files:
        return f"name:{path}"
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while chunk := opened.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def tokenizer_digest(processor: Any) -> str:
    """SHA-256 of all that decides how text becomes tokens: vocabulary, merges, chat template."""
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())
    templates = [getattr(p, "chat_template", None) for p in (processor, tokenizer)]
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    return _sha256([json.dumps(json.loads(words), sort_keys=True), templates, special])


def layout(params: Params) -> dict[str, list[int]]:
    """Names and shapes of the adapter's tensors."""
    return {name: list(params[name].shape) for name in sorted(params)}


def layout_digest(shapes: Mapping[str, list[int]]) -> str:
    """SHA-256 of a layout."""
    return _sha256(dict(shapes))


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
