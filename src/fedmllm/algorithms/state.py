"""Arithmetic on server states, shared by all algorithms. Nothing here changes its arguments but
what is given to be used up."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch

from fedmllm.algorithms.base import Params, ServerState, check_layout, in_one_piece
from fedmllm.errors import UserError


def first_state(params: Params, slots: Mapping[str, float] | None = None) -> ServerState:
    """Round 0 at `params` (copied, sorted by name) with each slot filled with one number.

    `slots` maps a slot's name to the value of all its entries, e.g. ``{"m": 0, "v": tau**2}``.
    """
    copied = map_params(lambda value: value.detach(), params)
    filled = {
        slot: map_params(functools.partial(torch.full_like, fill_value=number), copied)
        for slot, number in (slots or {}).items()
    }
    return ServerState(0, copied, filled)


def map_params(function: Callable[..., torch.Tensor], first: Params, *others: Params) -> Params:
    """Apply `function` tensor by tensor, matched by name; the result is sorted by name.

    Sorted, because safetensors gives tensors back in any order. Raises `UserError` if names or
    shapes differ, e.g. when a checkpoint of another adapter rank is resumed: without the check,
    broadcasting would hide it.
    """
    return map_together(lambda *tensors: (function(*tensors),), first, *others)[0] if first else {}


def map_together(
    function: Callable[..., tuple[torch.Tensor, ...]],
    first: Params,
    *others: Params,
    spare: Params | None = None,
) -> list[Params]:
    """Like `map_params` for a function that gives several tensors: as many `Params`, in new memory.

    Tensor by tensor, what lies between stays in the processor's cache and takes no memory.
    spare: float32 tensors that nobody needs afterwards, sorted by name; the first result takes
    their place.
    """
    for other in others:
        check_layout(first, other, "an update or a slot of the server's state")
    made: list[Params] = []
    for name in sorted(first):
        tensors = function(first[name], *(o[name] for o in others))
        if not made:
            made = [in_one_piece(first, tensor.dtype) for tensor in tensors[bool(spare) :]]
            made = [spare, *made] if spare else made
        for tree, tensor in zip(made, tensors, strict=True):
            tree[name].copy_(tensor)
    return made


def slot_of(state: ServerState, slot: str) -> Params:
    """A slot of the state; `UserError` if it is absent (a checkpoint of another algorithm)."""
    if slot not in state.slots:
        raise UserError(
            f"the server's state has slots {sorted(state.slots)} but not {slot!r}: it was written "
            "by another algorithm; resume with that one or start a new run"
        )
    return state.slots[slot]


def advance(
    state: ServerState, direction: Params, eta: float, slots: Mapping[str, Params] | None = None
) -> ServerState:
    """The next round's state: theta + eta * direction, with new slots.

    It takes the place of `direction`, float32 and sorted by name, which nobody needs afterwards.
    """

    def move(theta: torch.Tensor, d: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (theta + eta * d,)

    made = map_together(move, state.params, direction, spare=direction)
    params = made[0] if made else {}
    return ServerState(state.round + 1, params, dict(slots or {}))
