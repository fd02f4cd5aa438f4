"""What crosses the wire: tensors by name and a few facts, never an object.

    message = pack_update(update)        # at a site
    update  = unpack_update(message)     # at the server

A tensor's key is ``field|slot|name``: the update's field, the slot within it (empty if the field
is one set of tensors), the tensor's own name. Fields that an algorithm adds later travel without
a change here, and so does any slot of `Algorithm.broadcast`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file, save, save_file

from fedmllm.algorithms.base import Params, ServerState, Update, check_layout
from fedmllm.alignment import ANSWERS, PROTOTYPES
from fedmllm.errors import UserError

PROTOCOL = 1
# what reading a message of a site may raise, whatever the site put into it
BAD = (UserError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
TASKS = ("hello", "sums", "hits", "mixtures", "exchanged", "train", "evaluate", "refused")
SEP = "|"
_FACTS = "facts"
_MOST = 2**53  # samples: a larger whole number is no weight that a float holds


@dataclass(frozen=True)
class Message:
    """tensors: by ``field|slot|name``. facts: what JSON can hold."""

    tensors: Params = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


def pack_groups(groups: Mapping[tuple[str, str], Params]) -> Params:
    """Flat tensors from sets of tensors by (field, slot)."""
    return {
        SEP.join((*group, name)): value.contiguous()
        for group, params in groups.items()
        for name, value in params.items()
    }


def unpack_groups(tensors: Params) -> dict[tuple[str, str], Params]:
    """Sets of tensors by (field, slot), sorted by name. Raises `UserError` for other keys."""
    groups: dict[tuple[str, str], Params] = {}
    for key in sorted(tensors):
        words = key.split(SEP, 2)
        if len(words) != 3 or not isinstance(tensors[key], torch.Tensor):
            raise UserError(f"{key!r} is not a tensor's name in a message: field{SEP}slot{SEP}name")
        groups.setdefault((words[0], words[1]), {})[words[2]] = tensors[key]
    return {group: dict(sorted(params.items())) for group, params in groups.items()}


def pack_state(state: ServerState, slots: Iterable[str], facts: Mapping[str, Any]) -> Message:
    """What a site needs of the server's state: the adapter and the slots that are broadcast."""
    groups = {("params", ""): state.params, **{("slots", s): state.slots[s] for s in slots}}
    return Message(pack_groups(groups), {"round": state.round, **facts})


def unpack_state(message: Message) -> ServerState:
    """The server's state as far as it was sent."""
    groups = unpack_groups(message.tensors)
    slots = {slot: params for (kind, slot), params in groups.items() if kind == "slots"}
    return ServerState(int(message.facts["round"]), groups.get(("params", ""), {}), slots)


def pack_update(update: Update) -> Message:
    """A client's update: each field as tensors, tensors by slot, or facts."""
    groups: dict[tuple[str, str], Params] = {}
    facts: dict[str, Any] = {}
    for item in fields(update):
        value = getattr(update, item.name)
        if _is_params(value):
            groups[item.name, ""] = value
        elif isinstance(value, Mapping) and any(map(_is_params, value.values())):
            groups |= {(item.name, s): params for s, params in value.items() if _is_params(params)}
            facts[item.name] = {s: {} for s, params in value.items() if not params}
        else:
            facts[item.name] = dict(value) if isinstance(value, Mapping) else value
    return Message(pack_groups(groups), facts)


def unpack_update(message: Message) -> Update:
    """An update from a message. Raises `UserError` if the message is none."""
    known = {item.name: item for item in fields(Update)}
    values: dict[str, Any] = dict(message.facts)
    for (name, slot), params in unpack_groups(message.tensors).items():
        if slot:
            values.setdefault(name, {})[slot] = params
        else:
            values[name] = params
    odd = sorted(values.keys() - known.keys())
    lacking = [n for n, item in known.items() if _needed(item) and n not in values]
    if odd or lacking:
        raise UserError(
            f"not an update (not expected: {', '.join(odd) or 'none'}; missing: "
            f"{', '.join(lacking) or 'none'}): site and server must run the same version"
        )
    return Update(**values)


def check_update(
    update: Update, *, site: str, params: Params, slots: Mapping[str, Params] | None = None
) -> None:
    """Raise `UserError` unless this is an update of the adapter `params`, by `site`, with finite
    numbers and an extra for each of the `slots` that were sent: one bad site must not end a run."""
    if update.client != site:
        raise UserError(f"{site} sent an update of {update.client!r}")
    if type(update.num_samples) is not int or not 0 < update.num_samples < _MOST:
        raise UserError(f"{site} claims {update.num_samples!r} samples: a whole number above 0")
    check_layout(params, update.delta, f"update of {site}")
    _check_extras(update, site, slots or {})
    for tensors in (update.delta, *update.extra.values()):
        for name, value in tensors.items():
            if not value.is_floating_point():
                raise UserError(f"update of {site} has {value.dtype} at {name}, not floats")
            if not torch.isfinite(value.to(torch.float32)).all():
                raise UserError(f"update of {site} is not finite at {name}")
    for name, number in update.metrics.items():
        if not _is_finite(number):
            raise UserError(f"update of {site}: metric {name} is {number!r}, not a finite number")


def _check_extras(update: Update, site: str, slots: Mapping[str, Params]) -> None:
    """Extras answer the slots, tensor by tensor: of the same name (`ANSWERS`) and shape."""
    if update.extra.keys() != slots.keys():
        raise UserError(
            f"update of {site} carries extras {sorted(update.extra)}, and this run's are "
            f"{sorted(slots)}: site and server must run the same experiment"
        )
    for slot, sent in slots.items():
        names = ANSWERS if slot == PROTOTYPES else {}
        wanted = {names.get(name, name): value for name, value in sent.items()}
        check_layout(wanted, update.extra[slot], f"{slot} in the update of {site}")


def numbers(found: Any) -> dict[str, float]:
    """The numbers by name of what should be nothing else: finite, or NaN where a score has no
    value."""
    items = found.items() if isinstance(found, Mapping) else ()
    return {str(k): v for k, v in items if _is_finite(v) or _is_nan(v)}


def _is_finite(number: Any) -> bool:
    """Whether it is a number that a float holds."""
    try:
        return type(number) in (int, float) and math.isfinite(float(number))
    except OverflowError:
        return False


def _is_nan(number: Any) -> bool:
    return isinstance(number, float) and math.isnan(number)


def write(message: Message, file: Path) -> None:
    """Write a message as one safetensors file; the facts are its metadata."""
    save_file(dict(message.tensors), file, metadata={_FACTS: json.dumps(message.facts)})


def read(file: Path) -> Message:
    """Read what `write` wrote. Raises `UserError` if it cannot be read."""
    try:
        with safe_open(file, "pt") as opened:
            facts = json.loads((opened.metadata() or {})[_FACTS])
        return Message(load_file(file), facts)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{file} is not a message: {error}") from error


def to_bytes(message: Message) -> bytes:
    """A message as what `write` writes."""
    blob: bytes = save(dict(message.tensors), metadata={_FACTS: json.dumps(message.facts)})
    return blob


def from_bytes(blob: bytes) -> Message:
    """Read what `to_bytes` gave. Raises `UserError` if it cannot be read."""
    try:
        size = int.from_bytes(blob[:8], "little")
        facts = json.loads(json.loads(blob[8 : 8 + size])["__metadata__"][_FACTS])
        if not isinstance(facts, dict):
            raise TypeError("its facts are no JSON object")
        return Message(load(blob), facts)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{len(blob)} bytes are not a message: {error}") from error


def _is_params(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(item, torch.Tensor) for item in value.values())
    )


def _needed(item: Any) -> bool:
    return item.default is MISSING and item.default_factory is MISSING and item.name != "delta"
