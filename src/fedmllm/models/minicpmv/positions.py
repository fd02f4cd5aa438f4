"""Where a patch stands: position ids of the vision tower, position features of the resampler.

Everything is computed when it is needed. A table kept as a non-persistent buffer is built on the
meta device when a checkpoint is loaded, and comes out as uninitialised memory.

Shapes: S slices, N patches of the longest slice, D hidden width.
"""

from __future__ import annotations

from functools import lru_cache

import torch


@lru_cache(maxsize=4096)
def axis_buckets(count: int, side: int = 70) -> tuple[int, ...]:
    """Row (or column) of the side x side position table for each of `count` patches on an axis.

    Equal fractions of the axis, put into `side` bins. It has to be this float32 arithmetic on the
    CPU: for some counts (25, 49, 50, ...) a fraction that is a bin's edge rounds below it, and
    the published weights were trained with that. Returns plain integers: a cached tensor that was
    first asked for in inference mode could not be trained with later.
    """
    step = (1 / torch.tensor(count, device="cpu")).item()
    fractions = torch.arange(0, 1 - 1e-6, step, dtype=torch.float32, device="cpu")
    edges = torch.arange(1 / side, 1.0, 1 / side, dtype=torch.float32, device="cpu")
    return tuple(torch.bucketize(fractions, edges, right=True).tolist())


def grid_position_ids(sizes: list[tuple[int, int]], side: int = 70) -> torch.Tensor:
    """Version 2.6: bucket(row) * side + bucket(column), [S, N]; 0 at the padding."""
    longest = max(h * w for h, w in sizes)
    ids_SN = torch.zeros(len(sizes), longest, dtype=torch.long)
    for ids_N, (h, w) in zip(ids_SN, sizes, strict=True):
        rows = torch.tensor(axis_buckets(h, side))
        columns = torch.tensor(axis_buckets(w, side))
        ids_N[: h * w] = (rows[:, None] * side + columns).flatten()
    return ids_SN


def line_position_ids(sizes: list[tuple[int, int]], side: int = 70) -> torch.Tensor:
    """Version 2.5: bucket(j) over the longest slice of the batch, the same for every slice, [S, N].

    Its published code takes a slice of N patches for a 1 x N image, with N padded to the longest
    slice of the batch, and does not mask the padding. So a slice's features depend on the slices
    it is read with. The weights were trained that way; it is reproduced, not mended.
    """
    longest = max(h * w for h, w in sizes)
    return torch.tensor(axis_buckets(longest, side)).repeat(len(sizes), 1)


def sincos_1d(count: int, width: int) -> torch.Tensor:
    """[count, width]: sines, then cosines of position * 10000^(-i / (width / 2))."""
    powers = torch.arange(width // 2, dtype=torch.float32, device="cpu") / (width / 2)
    positions = torch.arange(count, dtype=torch.float32, device="cpu")
    angles = positions[:, None] * (1.0 / 10000.0**powers)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_2d(height: int, width: int, dim: int) -> torch.Tensor:
    """[height, width, dim]: the column in the first half of `dim`, the row in the second."""
    columns = sincos_1d(width, dim // 2)[None].expand(height, -1, -1)
    rows = sincos_1d(height, dim // 2)[:, None].expand(-1, width, -1)
    return torch.cat([columns, rows], dim=-1)


def resampler_positions(sizes: list[tuple[int, int]], dim: int) -> torch.Tensor:
    """[S, N, dim] position features of the patches, 0 at the padding."""
    longest = max(h * w for h, w in sizes)
    tables = {size: sincos_2d(*size, dim).flatten(0, 1) for size in set(sizes)}  # cells are equal
    table_SND = torch.zeros(len(sizes), longest, dim, dtype=torch.float32, device="cpu")
    for rows_ND, (h, w) in zip(table_SND, sizes, strict=True):
        rows_ND[: h * w] = tables[h, w]
    return table_SND
