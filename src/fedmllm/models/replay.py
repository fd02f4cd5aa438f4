"""A frozen vision tower's output, recorded once and played back while what follows it trains.

A trained connector needs the tower's output in every step, not the tower. The output is recorded at
the modules that are frozen: the tower, or, where the connector lies inside it (`Family.connector`),
those of its modules that are not the connector. Playing back is the model's own code with these
modules' `forward` replaced, so that no family needs code for it.

Of all that the modules gave (a tower may list the output of each layer) only the tensors are kept
on which the features depend, as autograd tells; the others, and the pixels, are kept as `Blank`,
which is played back as NaN. A recording counts only if played back it gives the features to the
last bit: whatever else the model's code does with pixels or outputs shows there.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from fedmllm.models.components import connector_modules, tower_of
from fedmllm.models.families import Family

# (index of the module among the frozen ones, what it gave), in the order of the calls
Calls = tuple[tuple[int, Any], ...]


@dataclass(frozen=True)
class Blank:
    """A tensor of one number: NaN where nothing depends on it, 1 in the mask of a full image."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    value: float | int = math.nan


class NotRecordedError(Exception):
    """The tower gave something that cannot be played back."""


def frozen_parts(base: Any, entry: Family) -> list[tuple[str, nn.Module]]:
    """Names and modules that a recording stands for; none if the model has no tower."""
    found = tower_of(base)
    if found is None or not entry.connector:
        return [found] if found else []
    name, tower = found
    trained = connector_modules(base, entry)
    parts = []
    for child_name, child in tower.named_children():
        inner = (
            [(f"{child_name}.{i}", item) for i, item in enumerate(child)]
            if isinstance(child, nn.ModuleList)
            else [(child_name, child)]
        )
        parts += [(f"{name}.{path}", module) for path, module in inner]
    return [(path, module) for path, module in parts if path not in trained]


@contextlib.contextmanager
def recording(parts: Sequence[nn.Module]) -> Iterator[list[tuple[int, Any]]]:
    """Collects what the parts give while the block runs, as copies: later code may change them."""
    calls: list[tuple[int, Any]] = []

    def hook(index: int) -> Callable[[Any, Any, Any], None]:
        def keep(module: Any, args: Any, output: Any) -> None:
            try:
                calls.append((index, mapped(lambda tensor: tensor.detach().clone(), output)))
            except NotRecordedError as error:  # told when it is played back
                calls.append((index, error))

        return keep

    handles = [part.register_forward_hook(hook(i)) for i, part in enumerate(parts)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def playing(parts: Sequence[nn.Module], calls: Calls, device: torch.device) -> Iterator[None]:
    """In the block the parts give what was recorded, whatever they are given.

    Raises `NotRecordedError` if they are called in another order.
    """
    left = list(calls)

    def forward(index: int) -> Callable[..., Any]:
        def play(*args: Any, **options: Any) -> Any:
            if not left or left[0][0] != index:
                raise NotRecordedError("the tower's modules are called in another order")
            return mapped(lambda value: _played(value, device), left.pop(0)[1])

        return play

    before = [part.__dict__.get("forward") for part in parts]  # hooks of other libraries
    for i, part in enumerate(parts):
        part.forward = forward(i)
    try:
        yield
    finally:
        for part, own in zip(parts, before, strict=True):
            if own is None:
                del part.forward
            else:
                part.forward = own
    if left:
        raise NotRecordedError("not all of the tower's modules are called again")


def _played(value: Any, device: torch.device) -> Any:
    """A tensor of the recording for the model's code, which may change it in place."""
    if isinstance(value, Blank):
        return filled(value, device)
    moved = value.to(device)
    return moved.clone() if moved is value or moved.data_ptr() == value.data_ptr() else moved


def filled(blank: Blank, device: torch.device) -> torch.Tensor:
    """The tensor that a blank stands for, one number in memory."""
    one = torch.full((1,) * len(blank.shape), blank.value, dtype=blank.dtype, device=device)
    return one.expand(blank.shape)


def pruned(
    parts: Sequence[nn.Module],
    calls: Sequence[tuple[int, Any]],
    features: Callable[[], Sequence[torch.Tensor]],
    device: torch.device,
) -> Calls:
    """The recording with `Blank` for floats on which no feature depends, on the CPU.

    features: runs the model's code from pixels to features, while the parts play back.
    """
    leaves: list[torch.Tensor] = []

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        leaves.append(tensor.requires_grad_())
        return tensor

    tracked = tuple((index, mapped(leaf, output)) for index, output in calls)
    with torch.enable_grad(), playing(parts, tracked, device):
        total = sum(part.float().sum() for part in features())
    if not isinstance(total, torch.Tensor) or not total.requires_grad:
        raise NotRecordedError("the features do not depend on the tower")
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    unused = {id(v) for v, grad in zip(leaves, gradients, strict=True) if grad is None}

    def kept(tensor: torch.Tensor) -> Any:
        if id(tensor) in unused:
            return Blank(tuple(tensor.shape), tensor.dtype)
        return tensor.detach().cpu()

    return tuple((index, mapped(kept, output)) for index, output in tracked)


# -- trees of tensors ----------------------------------------------------------------------------


def mapped(change: Callable[[Any], Any], tree: Any) -> Any:
    """A tree of containers with each tensor (and each `Blank`) changed, all else as it is.

    Raises `NotRecordedError` for anything but containers, tensors, numbers, words and None.
    """
    if isinstance(tree, torch.Tensor | Blank):
        return change(tree)
    if isinstance(tree, ModelOutput):
        return type(tree)(**{key: mapped(change, value) for key, value in tree.items()})
    if type(tree) in (tuple, list):
        return type(tree)(mapped(change, value) for value in tree)
    if type(tree) is dict:
        return {key: mapped(change, value) for key, value in tree.items()}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise NotRecordedError(f"a {type(tree).__name__} among the tower's outputs")


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """The tensors of a tree, in order."""
    found: list[torch.Tensor] = []

    def collect(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            found.append(value)
        return value

    mapped(collect, tree)
    return found


def blank_floats(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The tower's inputs with `Blank` for floats (pixels) and for masks of one number; sizes and
    other masks stay."""

    def change(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.numel() < 2:
            return value
        if value.is_floating_point():
            return Blank(tuple(value.shape), value.dtype)
        one = value.reshape(-1)[0]
        return (
            Blank(tuple(value.shape), value.dtype, int(one))
            if bool((value == one).all())
            else value
        )

    return {name: mapped(change, value) for name, value in inputs.items()}
