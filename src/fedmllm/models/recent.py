"""Values by key within a budget: what was used longest ago leaves first."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """A mapping that holds at most `budget`, by `size` of each value, in one unit.

    What was neither put nor got for longest leaves first; what came last stays, whatever its size.
    A value under a key is never replaced. Sizes must not change.
    """

    def __init__(self, budget: int, size: Callable[[V], int]) -> None:
        self.budget, self.size = budget, size
        self.held = 0
        self._entries: dict[K, V] = {}  # the last is the one used last

    def get(self, key: K) -> V | None:
        """The value, which is then the one used last; None if it is not there."""
        if key not in self._entries:
            return None
        self._entries[key] = self._entries.pop(key)
        return self._entries[key]

    def put(self, key: K, value: V) -> list[V]:
        """Keep a value, unless there is one under its key; returns those that had to leave."""
        left: list[V] = []
        if key in self._entries:
            return left
        self._entries[key] = value
        self.held += self.size(value)
        while self.held > self.budget and len(self._entries) > 1:
            left.append(self._entries.pop(next(iter(self._entries))))
            self.held -= self.size(left[-1])
        return left

    def clear(self) -> None:
        """Forget all."""
        self._entries.clear()
        self.held = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries
