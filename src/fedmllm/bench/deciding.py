"""Which keys of a config can change a run's numbers.

Two configs that differ in no such key have the same `deciding_digest`: a result of the one is a
result of the other. docs/benchmark.md states the rule; here it is.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from fedmllm.config import Config
from fedmllm.report.loading import NO_NUMBERS

# per topology, dotted keys that it never reads for a number
_UNREAD = {
    # An untrained adapter adds nothing, and nobody takes part: who holds what is not asked.
    "zero-shot": (
        *("seed", "partition", "scenario", "algorithm", "aggregation", "lora", "trained"),
        "strategy",
        *("evaluation.every", "evaluation.limit"),
    ),
    "local": ("training.clients_per_round", "evaluation.every", "evaluation.limit"),
    "centralised": ("training.clients_per_round",),
    "federated": (),
}
_HELD = ("seed", "partition", "scenario")
_READ_OF_TRAINING = {"zero-shot": ("max_length", "long_text")}  # of a section that is else unread


def deciding(config: Config) -> dict[str, Any]:
    """The keys of a config that can change a number of its result, with their values."""
    facts = config.model_dump(mode="json")
    none = [f"{section}.{key}".lstrip(".") for section, ks in NO_NUMBERS.items() for key in ks]
    own = config.evaluation.held_out  # then who holds what decides what is tested
    unread = [key for key in _UNREAD[config.topology] if not (own and key in _HELD)]
    for key in (*none, *unread):
        _drop(facts, key)
    if config.topology in _READ_OF_TRAINING:
        read = _READ_OF_TRAINING[config.topology]
        facts["training"] = {k: v for k, v in facts["training"].items() if k in read}
    limit = config.evaluation.limit
    if config.evaluation.drift:  # measures on the first so many samples
        facts["evaluation"]["limit"] = limit
    elif not config.evaluation.every:
        _drop(facts, "evaluation.limit")
    return facts


def deciding_digest(config: Config) -> str:
    """SHA-256 of `deciding`."""
    return hashlib.sha256(json.dumps(deciding(config), sort_keys=True).encode()).hexdigest()


def _drop(facts: dict[str, Any], key: str) -> None:
    head, _, rest = key.partition(".")
    if rest and isinstance(facts.get(head), dict):
        _drop(facts[head], rest)
    else:
        facts.pop(head, None)
