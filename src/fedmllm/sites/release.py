"""What may leave a site: the rule of the gate at its border, and of the test that inspects it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fedmllm.errors import UserError
from fedmllm.evidence import MOST as TESTED
from fedmllm.mixtures import MOST
from fedmllm.sites.settings import Reveal
from fedmllm.sites.wire import SEP, Message, unpack_groups

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
    "images",
    "exchanged",
    "held_out",
    "task",
    "reveal",
    "problems",
}
_UPDATE = {"update", "memory"}
_ALONE = ({"metrics"}, {"hits"}, {"mixtures"})
_HITS = {"samples", "hits", "expected", "variance"}
_SUMS = {"counts": 1, "sums": 2, "squares": 1}
_MIXTURE = {"class", "key", "words"}
_KNOWN = {"client", "num_samples", "metrics", "extra"}


def check_release(message: Message, reveal: Reveal) -> None:
    """Raise `UserError` if a message holds more than an answer of a site may."""
    facts = dict(message.facts)
    if set(facts) - HELLO and set(facts) - _UPDATE and set(facts) not in _ALONE:
        raise UserError(f"facts {sorted(facts)} are not those of an answer")
    given = {name.split(SEP, 1)[0] for name in message.tensors}
    if given & {"sums", "mixture"} or set(facts) & {"hits", "mixtures"}:
        _check_exchange(message, given, reveal)
        return
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
    if not all(type(facts[name]) is bool for name in ("images", "exchanged") if name in facts):
        raise UserError("images or exchanged, which say yes or no, say something else")
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


def _check_exchange(message: Message, given: set[str], reveal: Reveal) -> None:
    """What a site answers before the first round (`exchange.py`): sums, hits or mixtures, alone."""
    if not reveal.features:
        raise UserError("features of samples, which this site does not reveal")
    listed = message.facts.get("mixtures")
    if listed is not None or "mixture" in given:
        _check_mixtures(message, listed)
        return
    if not reveal.samples:
        raise UserError("sums or hits, which count samples, and this site does not reveal those")
    for name, found in message.facts.get("hits", {}).items():
        if not isinstance(found, Mapping) or set(found) != _HITS:
            raise UserError("hits that hold something else than numbers of them")
        _check_numbers(found, f"hits of {name}")
    if message.tensors and message.facts:
        raise UserError("sums with facts, which have none")
    for (field, name), tensors in unpack_groups(message.tensors).items():
        sizes = {part: value.ndim for part, value in tensors.items()}
        if field != "sums" or sizes != _SUMS or tensors["counts"].sum() > TESTED:
            raise UserError(f"{field}|{name} holds something else than sums over samples")
        counts = tensors["counts"]
        if (counts < 0).any() or (counts != counts.round()).any():
            raise UserError(f"sums of {name} with counts that are none")
        if (tensors["sums"][counts == 0] != 0).any():
            raise UserError(f"sums of {name} over no samples")


def _check_mixtures(message: Message, listed: Any) -> None:
    if not isinstance(listed, list) or set(message.facts) != {"mixtures"}:
        raise UserError("mixtures with facts that are not theirs")
    for each in listed:
        named = isinstance(each, Mapping) and set(each) == _MIXTURE
        if not named or not all(isinstance(value, str) for value in each.values()):
            raise UserError("mixtures that say more than class, key and words")
    classes = [each["class"] for each in listed]
    if any(classes.count(name) > MOST for name in set(classes)):
        raise UserError(f"more than {MOST} mixtures of a class")
    for field, name in (group := unpack_groups(message.tensors)):
        if field != "mixture" or not name.isdigit() or int(name) >= len(listed):
            raise UserError(f"{field}|{name} is not a tensor of a mixture")
        parts = {part.split(".")[0] for part in group[field, name]}
        if not parts <= {"features", "deepstack", "inputs"}:
            raise UserError(f"{field}|{name} holds more than features")


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
