"""`judged.json`: a language model's marks on a run's open answers, beside its result.

It belongs to one result and says which (`result_sha256`); one that belongs to another, or was
changed, is named and left out.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

JUDGED_FILE = "judged.json"
SCHEMA = 1


def judged_digest(data: Mapping[str, Any]) -> str:
    """SHA-256 of all that it says."""
    facts = {key: value for key, value in data.items() if key != "judged_sha256"}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def write_judged(folder: Path, data: dict[str, Any]) -> Path:
    """Write the marks beside the result, whole or not at all."""
    made = json.loads(json.dumps({"schema": SCHEMA, **data}, allow_nan=False))
    made["judged_sha256"] = judged_digest(made)
    draft = folder / f"{JUDGED_FILE}.draft"
    text = json.dumps(made, indent=1, ensure_ascii=False) + "\n"
    # half a surrogate pair becomes its JSON escape, which reads as the same
    draft.write_bytes(text.encode("utf-8", "backslashreplace"))
    os.replace(draft, folder / JUDGED_FILE)
    return folder / JUDGED_FILE


def read_judged(result_file: Path, result_sha256: str) -> tuple[dict[str, Any] | None, str]:
    """The marks beside a result file, or None and what is wrong with them (empty: none there)."""
    file = result_file.parent / JUDGED_FILE
    if result_file.name != "result.json" or not file.exists():
        return None, ""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return None, f"{file}: is not valid JSON ({error}): judge again"
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        return None, f"{file}: is not a judged.json that this version reads"
    if data.get("judged_sha256") != judged_digest(data):
        return None, f"{file}: was changed after it was written: judge again"
    if data.get("result_sha256") != result_sha256:
        return None, f"{file}: belongs to another result: judge again"
    return data, ""
