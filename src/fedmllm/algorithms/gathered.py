"""All updates of a round, for rules that need them side by side; they lie on disk.

Legend: N updates, P numbers in each, M chosen ones, C coordinates that are looked at together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from fedmllm.algorithms.base import (
    Aggregation,
    Params,
    Update,
    check_enough,
    check_layout,
    check_update,
    cut,
)
from fedmllm.algorithms.scratch import Scratch
from fedmllm.errors import UserError

Rule = Callable[["Gathered", torch.Tensor], Sequence[int]]

BLOCK = 8 * 2**20  # bytes of the numbers of all updates that are in memory together


class Gathered:
    """An `Aggregate` by a rule that sees every update, in memory that does not grow with N.

    Each update is written down as it arrives. `blocks` reads them back: the same coordinates of all
    updates, as many as fit into `BLOCK` bytes, so that a long tensor is read in parts and short
    ones together. Every client counts alike: its number of samples is a claim of its own.

    rule: (updates, row) -> the positions of those that were chosen, none if all took part; it fills
    the row of P numbers. aggregation: whose rule it is.
    """

    def __init__(self, rule: Rule, folder: Path | None, aggregation: Aggregation) -> None:
        self.rule, self.aggregation = rule, aggregation
        self.count = self.size = 0
        self.chosen: tuple[str, ...] = ()
        self._clients: list[str] = []
        self._layout: Params = {}  # names and shapes
        self._scratch = Scratch(folder)

    def fold(self, update: Update, scale: float = 1.0) -> None:
        """Write one update down. Raises `UserError` as `StreamingMean.fold` does, and for an extra
        or a factor, which a rule of equals has no place for."""
        check_update(update)
        if scale != 1 or update.extra:
            what = "a weight of its own" if scale != 1 else f"extras ({', '.join(update.extra)})"
            raise UserError(
                f"update of {update.client} has {what}, and aggregation {self.aggregation.name} "
                "takes updates alone and all alike: use aggregation mean for it"
            )
        if self.count:
            check_layout(self._layout, update.delta, f"update of {update.client}")
        else:
            shapes = {name: value.shape for name, value in sorted(update.delta.items())}
            self._layout = {n: torch.empty(shape, device="meta") for n, shape in shapes.items()}
            self.size = sum(value.numel() for value in update.delta.values())
        self._scratch.write(update.delta[name].to(torch.float32) for name in self._layout)
        self._clients.append(update.client)
        self.count += 1

    def delta(self) -> Params:
        """What the rule makes of the updates; only once, since the file is emptied by it.

        Raises `UserError` if there are too few updates for the rule, ValueError the second time.
        """
        check_enough(self.aggregation, self.count, f"this one has {self.count}")
        if not self._clients:
            raise ValueError("the updates are aggregated only once")
        row_P = torch.empty(self.size)
        self.chosen = tuple(self._clients[i] for i in self.rule(self, row_P))
        self._scratch.clear()
        self._clients = []
        return cut(row_P, self._layout)

    def extra(self, slot: str) -> Params:
        """There are none: raises `UserError`."""
        raise UserError(
            f"aggregation {self.aggregation.name} has no {slot!r}: use aggregation mean for it"
        )

    def blocks(self, rows: Sequence[int] | None = None) -> Iterator[tuple[slice, torch.Tensor]]:
        """(which coordinates, their numbers [N, C]) until all are read; of some updates only where
        `rows` says which. The next numbers come into the same memory."""
        rows = range(self.count) if rows is None else rows
        width = max(1, BLOCK // (4 * len(rows)))
        room = torch.empty(len(rows), min(width, self.size))
        for start in range(0, self.size, width):
            here = slice(start, min(start + width, self.size))
            x_NC = room[:, : here.stop - here.start]
            for x_C, row in zip(x_NC, rows, strict=True):
                self._scratch.read(x_C, 4 * (row * self.size + start))
            yield here, x_NC
