"""How long the cells of a grid will take, from results of the same data and machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmllm.bench.grid import Cell
from fedmllm.bench.state import Present
from fedmllm.config import Config
from fedmllm.data.dataset import Dataset
from fedmllm.errors import UserError
from fedmllm.plan.timing import Rates, fitting_rates
from fedmllm.report import load_results


def measured_results(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The results below those of the folders that exist."""
    there = [path for path in paths if path.exists()]
    try:
        return load_results(there)[0] if there else []
    except UserError:
        return []


def estimates(
    cells: Sequence[Cell], found: Sequence[Mapping[str, Any]], present: Present
) -> dict[str, float]:
    """Seconds of each cell for which something fitting was measured, by name.

    Every party is taken to hold the same number of samples.
    """
    rates: dict[str, Rates | None] = {}
    seconds = {}
    for cell in cells:
        config = cell.config
        views = config.strategy.uses_views
        key = repr((config.model, config.lora.rank, config.data["name"], config.threads, views))
        if key not in rates:
            rates[key] = fitting_rates(found, config)
        rate = rates[key]
        data = present.dataset(config) if rate is not None else None
        if rate is not None and data is not None:
            duration = rate.duration(config, _even_sizes(config, data), len(data.test))
            seconds[cell.name] = duration.train_seconds + duration.test_seconds
    return seconds


def _even_sizes(config: Config, data: Dataset) -> dict[str, int]:
    if data.parties:
        return {name: len(samples) for name, samples in data.parties.items()}
    clients = config.partition.clients
    total = len(data.train) + len(data.flashcards)
    return {f"{i}": round(total / clients) for i in range(clients)}
