"""What both servers of row `server` are given: an adapter of 20 MB, and a delta of each client.

The shapes are those of LoRA of rank 8 on q, k, v and o of 28 layers of width 3,584 with key-value
heads of 512 in all: MiniCPM-V-2.6. Needs numpy only.
"""

from __future__ import annotations

import numpy as np

LAYERS, WIDTH, NARROW, RANK = 28, 3584, 512, 8
Arrays = dict[str, np.ndarray]


def shapes() -> dict[str, tuple[int, int]]:
    """Name -> shape, sorted by name."""
    made = {}
    for layer in range(LAYERS):
        for name, out in (("q", WIDTH), ("k", NARROW), ("v", NARROW), ("o", WIDTH)):
            made[f"layers.{layer:02}.{name}.lora_A"] = (RANK, WIDTH)
            made[f"layers.{layer:02}.{name}.lora_B"] = (out, RANK)
    return dict(sorted(made.items()))


def start() -> Arrays:
    """The global adapter, and what deltas are made of."""
    generator = np.random.default_rng(0)
    return {n: generator.standard_normal(s, dtype=np.float32) for n, s in shapes().items()}


def delta(params: Arrays, client: int) -> Arrays:
    """Client k's delta, in fresh memory: cheap to make, and another for each client."""
    share = np.float32(0.01 * ((client * 7919 % 1000) / 1000 - 0.45))
    return {name: value * share for name, value in params.items()}


def samples(client: int) -> int:
    """n_k."""
    return 5 + client * 37 % 50
