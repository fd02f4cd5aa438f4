"""The benchmark: a grid of experiments from one file, run where it is missing or stale.

    grid = load_grid("experiments/grids/mini-quick.yaml")
    ended = run_grid(grid, processes=2)

A grid file holds a base config and axes of changes to it (`grid.py`); what a finished cell must
agree with to count as done is in `state.py`; docs/benchmark.md says both in words.
"""

from fedmllm.bench.grid import Cell, Grid, load_grid
from fedmllm.bench.run import Ended, processes_for, run_grid

__all__ = ["Cell", "Ended", "Grid", "load_grid", "processes_for", "run_grid"]
