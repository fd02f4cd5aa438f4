"""What may leave a site: the rule of the gate at its border, and of the test that inspects it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fedmllm.errors import UserError
from fedmllm.sites.settings import Reveal
from fedmllm.sites.wire import SEP, Message

# facts of a site in the handshake: digests, shapes, names of options, counts; never a sample
HELLO = {
    "protocol",
    "version",
    "config_sha256",
    "base_sha256",
    "tokenizer_sha256",
    "layout",
    "manifest_sha256",
    "samples",
    "profile",
    "held_out",
    "task",
    "reveal",
    "problems",
}
_UPDATE = {"update", "memory"}
_KNOWN = {"client", "num_samples", "metrics", "extra"}


def check_release(message: Message, reveal: Reveal) -> None:
    """Raise `UserError` if a message holds more than an answer of a site may."""
    facts = dict(message.facts)
    if set(facts) - HELLO and set(facts) - _UPDATE and set(facts) != {"metrics"}:
        raise UserError(f"facts {sorted(facts)} are not those of an answer")
    for name, value in message.tensors.items():
        field = name.split(SEP, 1)[0]
        if not isinstance(value, torch.Tensor) or field not in ("delta", "extra"):
            raise UserError(f"{name!r} is not a tensor of an update")
    update = facts.get("update", {})
    if message.tensors and "update" not in facts:
        raise UserError("tensors that belong to no update")
    if not reveal.samples and (facts.get("samples") or update.get("num_samples", 1) != 1):
        raise UserError("the number of samples, which this site does not reveal")
    if "profile" in facts:
        if not reveal.samples:
            raise UserError("a profile, which counts samples, and this site does not reveal those")
        _check_counts(facts["profile"])
    metrics = facts.get("metrics") or update.get("metrics") or {}
    if metrics and not reveal.metrics:
        raise UserError("metrics, which this site does not reveal")
    _check_numbers(metrics, "metrics")
    if any(update.get("extra", {}).values()):
        raise UserError("extras of an update that are not tensors")
    for name, value in update.items():  # what an algorithm adds to an update
        if name not in _KNOWN:
            _check_numbers(value if isinstance(value, Mapping) else {name: value}, name)
            if not reveal.metrics:
                raise UserError(f"{name}, which counts as a metric, and this site reveals none")


def _check_counts(profile: Any) -> None:
    if not isinstance(profile, Mapping) or set(profile) != {"modalities", "labels"}:
        raise UserError("a profile that holds something else than counts")
    for counts in profile.values():
        if not isinstance(counts, list) or any(type(count) is not int for count in counts):
            raise UserError("a profile that holds something else than counts")


def _check_numbers(found: Any, what: str) -> None:
    if not isinstance(found, Mapping) or any(
        not isinstance(value, int | float) for value in found.values()
    ):
        raise UserError(f"{what} hold something else than numbers")
