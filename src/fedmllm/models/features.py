"""Vision features: what the frozen tower makes of an image, computed once and kept.

The language model is given `mm_encoder_outputs` in place of pixels, with the same result to the
last bit. What is kept of an image (`Policy.keeps`):

    features   what the connector gives, where tower and connector are frozen
    tower      what the tower gives, where the connector is trained: it alone runs in every step
    pixels     where the tower is trained: nothing of it can be kept

Shapes: N image tokens of one image (any number: an image may be cut into slices), D hidden width.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from PIL import Image
from transformers.modeling_outputs import BaseModelOutputWithPooling

from fedmllm.models.families import Family
from fedmllm.models.recent import Recent
from fedmllm.models.replay import (
    Blank,
    Calls,
    NotRecordedError,
    blank_floats,
    filled,
    playing,
    pruned,
    recording,
    tensors_of,
)

Parts = Sequence[torch.nn.Module]
MEMORY_BYTES = 512 * 2**20  # of features in main memory, unless a config says otherwise


@dataclass(frozen=True)
class ImageFeatures:
    """What the language model needs of one image.

    words: the text that its processor puts in place of the image token, N of them and whatever
    stands around them. features: N x D. deepstack: N x D each, for the first layers of the
    decoder (Qwen3-VL; else none). inputs: further inputs of the model by name, one row an image.
    kind, listed: the class of the tower's output, and whether it lists the images' features one
    by one or holds them in one tensor; the language model wants them back in the same form.
    pixels: what the tower takes, where features are not final; `features` then has N rows of
    width 0. recorded: what the frozen tower gave (`replay.py`); of the pixels then only what its
    surroundings need, shapes at least.
    """

    words: str
    features: torch.Tensor
    deepstack: tuple[torch.Tensor, ...] = ()
    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    kind: type = BaseModelOutputWithPooling
    listed: bool = True
    pixels: Mapping[str, Any] = field(default_factory=dict)
    recorded: Calls = ()

    @property
    def nbytes(self) -> int:
        plain = (self.features, *self.deepstack, *self.pixels.values())
        held = [part for part in plain if isinstance(part, torch.Tensor)]
        return sum(part.nbytes for part in [*held, *tensors_of(self.recorded)])


@dataclass(frozen=True)
class GivenFeatures:
    """An image source of which only the features are there, such as a mixture of images."""

    key: str
    features: ImageFeatures

    def open(self) -> Image.Image:
        """Raises ValueError: there is no picture."""
        raise ValueError(f"{self.key} has features and no picture")


class Store(Protocol):
    """Where features outlive the process; keys as of `FeatureCache`."""

    def get(self, key: str) -> ImageFeatures | None: ...
    def holds(self, key: str) -> bool: ...
    def put(self, key: str, value: ImageFeatures) -> None: ...


class FeatureCache:
    """What is kept of images, by image key: in memory within a budget, and in a store if given.

    When the budget is full, the entries that were not used for longest leave memory first; the
    entry that came last always stays. Without a store what left is computed anew.
    """

    def __init__(self, budget_bytes: int = MEMORY_BYTES, store: Store | None = None) -> None:
        self.budget_bytes = budget_bytes
        self.store = store
        self.memory: Recent[str, ImageFeatures] = Recent(budget_bytes, lambda held: held.nbytes)

    def get(self, key: str) -> ImageFeatures | None:
        found = self.memory.get(key)
        if found is None and self.store is not None:
            found = self.store.get(key)
            if found is not None:
                self.memory.put(key, found)
        return found

    def holds(self, key: str) -> bool:
        """Whether it can be had without the tower."""
        return key in self.memory or (self.store is not None and self.store.holds(key))

    def put(self, key: str, value: ImageFeatures) -> None:
        if key in self.memory:
            return
        self.memory.put(key, value)
        if self.store is not None:
            self.store.put(key, value)


@torch.no_grad()
def see(
    base: Any,
    processor: Any,
    family: Family,
    picture: Image.Image,
    *,
    keeps: str = "features",
    parts: Parts = (),
) -> ImageFeatures:
    """Pass one picture through processor, vision tower and connector.

    keeps: ``features``, ``tower`` or ``pixels``, see the module. parts: of the frozen tower, for
    ``tower``; where its output cannot be played back, the pixels are kept.
    """
    words, inputs = family.read(processor, picture)
    kept = {name: torch.as_tensor(inputs[name]) for name in family.image_inputs}
    wanted = inspect.signature(_tower(base)).parameters
    pixels = {name: value for name, value in inputs.items() if name in wanted}
    image = ImageFeatures(words, torch.empty(0), inputs=kept, pixels=pixels)
    with _evaluating(base):
        if keeps == "tower":
            return _with_tower_output(base, image, parts)
        found = look(base, image)
    if keeps == "pixels":
        return _without_features(found, pixels)
    deepstack = tuple(part.cpu() for part in found.deepstack)
    return replace(found, features=found.features.cpu(), deepstack=deepstack, pixels={})


def _with_tower_output(base: Any, image: ImageFeatures, parts: Parts) -> ImageFeatures:
    """An image with the tower's output in place of its pixels, if the features come out alike."""
    with recording(parts) as calls:
        found = look(base, image)
    bare = _without_features(found, image.pixels)

    def features() -> tuple[torch.Tensor, ...]:
        seen = look(base, image)
        return (seen.features, *seen.deepstack)

    with contextlib.suppress(NotRecordedError, RuntimeError, ValueError):
        recorded = pruned(parts, calls, features, device_of(base))
        for pixels in (blank_floats(image.pixels), image.pixels):
            played = replace(bare, pixels=pixels, recorded=recorded)
            with contextlib.suppress(NotRecordedError, RuntimeError, ValueError):
                if _same(look(base, played, parts), found):
                    return played
    return bare


def _without_features(found: ImageFeatures, pixels: Mapping[str, Any]) -> ImageFeatures:
    none = torch.empty((len(found.features), 0), dtype=found.features.dtype)
    return replace(found, features=none, deepstack=(), pixels=pixels)


def _same(a: ImageFeatures, b: ImageFeatures) -> bool:
    """Whether the features are the same bits."""
    return len(a.deepstack) == len(b.deepstack) and all(
        torch.equal(x, y)
        for x, y in zip((a.features, *a.deepstack), (b.features, *b.deepstack), strict=True)
    )


def look(base: Any, image: ImageFeatures, parts: Parts = ()) -> ImageFeatures:
    """The features of an image whose pixels, or whose tower's output, are kept: on the model's
    device, with gradients. parts: of the frozen tower, which play a recording back."""
    device = device_of(base)
    pixels = {name: _on(device, value) for name, value in image.pixels.items()}
    with playing(parts if image.recorded else (), image.recorded, device):
        output = _tower(base)(**pixels)
    return replace(
        image,
        features=_rows(output.pooler_output),
        deepstack=tuple(map(_rows, getattr(output, "deepstack_features", None) or ())),
        kind=type(output),
        listed=isinstance(output.pooler_output, (list, tuple)),
    )


def dtype_of(base: Any) -> str:
    """In which the base computes, such as ``float32``."""
    return str(base.get_input_embeddings().weight.dtype).removeprefix("torch.")


def device_of(base: Any) -> torch.device:
    """Where the language model lies; the tower may have left."""
    return base.get_input_embeddings().weight.device


def _on(device: torch.device, value: Any) -> Any:
    if isinstance(value, Blank):
        return filled(value, device)
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return [_on(device, each) for each in value] if isinstance(value, list) else value


def _tower(base: Any) -> Any:
    """The function from pixels to features; the inner model's names what the tower takes."""
    inner = base.base_model
    return (inner if hasattr(inner, "get_image_features") else base).get_image_features


def feature_inputs(images: Sequence[ImageFeatures], device: torch.device) -> dict[str, Any]:
    """Model inputs of a batch's images, in the order of their samples; none for no images.

    A new dict each time: forward writes into it.
    """
    if not images:
        return {}
    parts = [image.features.to(device) for image in images]
    fields: dict[str, Any] = {"pooler_output": parts if images[0].listed else torch.cat(parts)}
    if images[0].deepstack:
        levels = zip(*(image.deepstack for image in images), strict=True)
        fields["deepstack_features"] = [[part.to(device) for part in level] for level in levels]
    inputs: dict[str, Any] = {"mm_encoder_outputs": {"image": images[0].kind(**fields)}}
    for name in images[0].inputs:
        inputs[name] = torch.cat([image.inputs[name] for image in images]).to(device)
    return inputs


def _rows(features: Any) -> torch.Tensor:
    """All rows of one image [N, D], whether listed by slice, by image, or stacked."""
    whole = torch.cat(list(features)) if isinstance(features, (list, tuple)) else features
    return whole.reshape(-1, whole.shape[-1])


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """No dropout in the tower when an image is first seen, or seen again, amid training."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
