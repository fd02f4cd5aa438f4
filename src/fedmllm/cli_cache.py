"""`fedmllm cache`: the image features on disk, by model. Imports no torch."""

from __future__ import annotations

import json
import time

from fedmllm.errors import UserError
from fedmllm.models import feature_files as files


def show(*, as_json: bool) -> None:
    """Print entries, bytes and last use of each model."""
    folder = files.features_folder()
    models = files.cached_models(folder)
    if as_json:
        rows = [
            {
                "folder": str(model.folder),
                "entries": model.entries,
                "bytes": model.bytes,
                "used": model.used,
                "facts": model.facts,
            }
            for model in models
        ]
        print(json.dumps({"folder": str(folder), "models": rows}, indent=1))
        return
    print(f"{folder}: {sum(model.bytes for model in models) / 1e6:,.1f} MB")
    for model in models:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(model.used))
        facts = [str(model.facts.get(key, "?")) for key in ("name", "keeps", "dtype", "device")]
        print(
            f"  {' · '.join(facts)}: {model.entries:,} images, {model.bytes / 1e6:,.1f} MB, "
            f"used {used if model.entries else 'never'}  ({model.folder.name})"
        )
    if not models:
        print("  empty; model.feature_cache=disk fills it")


def clear() -> None:
    """Remove all entries and say how many."""
    folder = files.features_folder()
    try:
        entries, size = files.clear(folder)
    except OSError as error:
        raise UserError(f"the feature cache cannot be cleared: {error}") from error
    print(f"removed {entries:,} images, {size / 1e6:,.1f} MB, from {folder}")
