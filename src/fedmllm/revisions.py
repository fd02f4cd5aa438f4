"""Revisions of the code that makes numbers, by part.

A result states the revisions of the parts that it passed through; the benchmark runs a cell
again if one of them has moved. A commit is too coarse for that (a new line in the docs would make
every result stale) and a hash of the source is too (so would a new comment). So a person says it:
whoever changes what a part computes raises its number here, and only the cells that use the part
become stale. `tests/test_revisions.py` holds the numbers of small runs through every part and
fails when they change; it is then for a person to say whether they were meant to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

# Part -> revision; a part that is not listed is at 1. Parts: core (model, client, loop,
# evaluation, metrics, partition), data:NAME, algorithm:NAME, aggregation:NAME (but for the mean,
# which is core), scenario:NAME, topology:NAME, prompt:NAME, strategy:NAME (`STRATEGY_PARTS`, where
# in use).
REVISIONS: dict[str, int] = {}


def revisions_of(config: Mapping[str, Any]) -> dict[str, int]:
    """The parts that a run of this config passes through, with their revisions."""
    topology = config.get("topology", "federated")
    parts = ["core", f"topology:{topology}", f"data:{_name(config, 'data', 'memes')}"]
    parts.append(f"prompt:{config.get('prompt', 'plain')}")
    if topology != "zero-shot":
        parts.append(f"scenario:{_name(config, 'scenario', 'aligned')}")
        parts.append(f"algorithm:{_name(config, 'algorithm', 'fedavg')}")
        if (rule := _name(config, "aggregation", "mean")) != "mean":
            parts.append(f"aggregation:{rule}")
        parts += [f"strategy:{part}" for part in strategy_parts(config.get("strategy") or {})]
    return {part: REVISIONS.get(part, 1) for part in parts}


def strategy_parts(strategy: Mapping[str, Any]) -> list[str]:
    """The parts of a config's strategy that are on."""
    return [part for part, used in STRATEGY_PARTS.items() if used(strategy)]


# Part -> whether a config's strategy passes through it.
STRATEGY_PARTS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "regularisation": lambda given: given.get("mu"),
    "profiles": lambda given: (
        given.get("aggregation")
        or given.get("sampling")
        or given.get("fusion")
        or (given.get("mu") and given.get("weight") == "profile")
    ),
    "alignment": lambda given: (
        given.get("prototypes")
        or given.get("distillation")
        or given.get("views")
        or given.get("incomplete", 1.0) != 1.0
    ),
    "composition": lambda given: given.get("recombine") or given.get("resample"),
    "mixtures": lambda given: given.get("mixtures"),
    "evidence": lambda given: given.get("evidence"),
    "fusion": lambda given: given.get("fusion"),
}


def _name(config: Mapping[str, Any], section: str, default: str) -> str:
    found = config.get(section)
    name = found.get("name", default) if isinstance(found, Mapping) else found
    return str(name or default)
