"""`shared.json`: which runs of a benchmark also stand in other places of its grid.

A grid file may say that a place takes another place's run, since the numbers must be the same
(`share`). A result does not know that: so the benchmark writes it down beside the runs, as the
configs that a run stands for, by what differs from its own. Like all that a report reads, it is
looked at before it is believed: an entry of another run than the one that lies there is left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

SHARED_FILE = "shared.json"
SCHEMA = 1

Entry = Mapping[str, Any]
"""config_sha256: of the run's own config. stands_for: what differs from it, a mapping of config
keys to values for each config that the run stands for."""


def difference(own: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What turns one config into the other: dotted keys of sections that have the same keys,
    whole values else. Both have the same sections."""
    found: dict[str, Any] = {}
    for key, value in other.items():
        was = own.get(key)
        if was == value:
            continue
        if isinstance(value, Mapping) and isinstance(was, Mapping) and set(value) == set(was):
            found |= {f"{key}.{k}": v for k, v in value.items() if was[k] != v}
        else:
            found[key] = value
    return found


def applied(own: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config with a `difference` put over it."""
    made = dict(own)
    for key, value in changes.items():
        section, _, name = key.partition(".")
        was = made.get(section)
        made[section] = (
            {**(was if isinstance(was, Mapping) else {}), name: value} if name else value
        )
    return made


def read_shared(folder: Path) -> tuple[dict[str, Entry], str]:
    """The entries beside the run folders by run's name, and what is wrong with the file."""
    file = folder / SHARED_FILE
    try:
        state = file.stat()
    except OSError:
        return {}, ""
    return _read(file, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=4)  # runs of a folder are often read one by one
def _read(file: Path, _time: int, _size: int) -> tuple[dict[str, Entry], str]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"{file}: is not valid JSON ({error}): run the benchmark again"
    runs = data.get("runs") if isinstance(data, dict) and data.get("schema") == SCHEMA else None
    if not isinstance(runs, dict) or not all(map(_is_entry, runs.values())):
        return {}, f"{file}: is not a shared.json that this version reads"
    return runs, ""


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("config_sha256"), str):
        return False
    changes = entry.get("stands_for")
    return isinstance(changes, list) and all(isinstance(change, dict) for change in changes)


def write_shared(folder: Path, entries: Mapping[str, Entry], names: Sequence[str]) -> None:
    """Replace what is written of the runs `names` by `entries`; what is there of others stays. No
    file is made where there is nothing to say."""
    old, _ = read_shared(folder)
    runs = {name: entry for name, entry in old.items() if name not in set(names)} | dict(entries)
    if runs == old:
        return
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f"{SHARED_FILE}.draft"
    text = json.dumps({"schema": SCHEMA, "runs": dict(sorted(runs.items()))}, indent=1)
    draft.write_text(text + "\n", encoding="utf-8")
    os.replace(draft, folder / SHARED_FILE)
