"""Strategies that share a run in the grid do the same there, by who holds what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fedmllm.bench.grid import load_grid
from fedmllm.config import Config, make_config
from fedmllm.data import load_dataset
from fedmllm.experiment import make_manifest, own_samples
from fedmllm.fusion import fusion_of
from fedmllm.heterogeneity import is_complete, profile_of, standings
from fedmllm.recombination import completions
from fedmllm.strategies import party_weights

GRIDS = Path(__file__).resolve().parent.parent / "experiments" / "grids"


def does(config: Config, samples: dict[str, list[Any]], classes: int) -> dict[str, Any]:
    """What of a strategy has an effect on these parties. Open questions (no classes) name no
    modality, and have nothing to take prototypes or mixtures of, or to fuse."""
    given = config.strategy
    taken = [client for client, held in samples.items() if all(s.image is None for s in held)]
    completed, replaced = {}, {}
    for client, held in samples.items():
        found = completions(held, client=client, seed=config.seed) if given.recombine else {}
        left = [s for s in held if not is_complete(s) and s.id not in found]
        whole = any(map(is_complete, held))
        completed[client] = sorted(found)
        replaced[client] = len(left) if given.resample and whole else 0
    profiles = [profile_of(held, classes) for held in samples.values()]
    scenario = config.scenario["name"]
    weights = party_weights(
        given.weight, given.w, scenario, standings(dict(zip(samples, profiles, strict=True)))
    )
    return {
        "completed": completed,
        "replaced": replaced,
        "takers": taken if given.mixtures and classes else [],
        "evidence": given.evidence if classes and (any(completed.values()) or taken) else 0.0,
        "fusion": fusion_of(profiles, strength=given.fusion).share if classes else None,
        "prompt": config.prompt if classes else None,
        "pull": {client: given.mu * weight for client, weight in weights.items()},
        "prototypes": given.prototypes if classes else 0,
        "distillation": given.distillation,
    }


@pytest.mark.parametrize("seed", [0, 4])
@pytest.mark.parametrize("dataset", ["crisis", "medical", "memes"])
@pytest.mark.parametrize("grid", ["strategies", "strategies-large"])
def test_shared_cells_are_identities(grid, dataset, seed) -> None:
    file = GRIDS / f"{grid}.yaml"
    strategies = yaml.safe_load(file.read_text())["axes"]["strategy"]
    compared = 0
    for cell in load_grid(file, only=[f"dataset={dataset}", f"seed={seed}", "method=fedavg"]).cells:
        names = list(dict.fromkeys(place["strategy"] for place in cell.places))
        if len(names) == 1:
            continue
        data = load_dataset(**cell.config.data)
        samples, _ = own_samples(cell.config, data, make_manifest(cell.config, data))
        plain = {**cell.config.model_dump(mode="json"), "strategy": {}, "prompt": "plain"}
        effects = [
            does(make_config({**plain, **strategies[name]}), samples, len(data.task.classes))
            for name in names
        ]
        assert all(effect == effects[0] for effect in effects), (cell.name, names)
        compared += len(names) - 1
    assert compared >= 4
