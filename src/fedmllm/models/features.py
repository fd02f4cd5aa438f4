"""Vision features: what the frozen tower makes of an image, computed once and kept.

The language model is then given `mm_encoder_outputs` in place of pixels, with the same result to
the last bit: the features are those after the connector, where that is frozen as well. Where
tower or connector are trained, the pixels are kept and the features computed anew.

Shapes: N image tokens of one image (any number: an image may be cut into slices), D hidden width.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from transformers.modeling_outputs import BaseModelOutputWithPooling

from fedmllm.models.families import Family


@dataclass(frozen=True)
class ImageFeatures:
    """What the language model needs of one image.

    words: the text that its processor puts in place of the image token, N of them and whatever
    stands around them. features: N x D. deepstack: N x D each, for the first layers of the
    decoder (Qwen3-VL; else none). inputs: further inputs of the model by name, one row an image.
    kind, listed: the class of the tower's output, and whether it lists the images' features one
    by one or holds them in one tensor; the language model wants them back in the same form.
    pixels: what the tower takes, where features are not final; `features` then has N rows of
    width 0.
    """

    words: str
    features: torch.Tensor
    deepstack: tuple[torch.Tensor, ...] = ()
    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    kind: type = BaseModelOutputWithPooling
    listed: bool = True
    pixels: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        held = (self.features, *self.deepstack, *self.pixels.values())
        return sum(part.nbytes for part in held if isinstance(part, torch.Tensor))


class FeatureCache:
    """Vision features by image key, kept in memory; the frozen tower sees an image once.

    Bounded by bytes; when full, the oldest entries leave first.
    """

    def __init__(self, budget_bytes: int = 512 * 2**20) -> None:
        self.budget_bytes = budget_bytes
        self._entries: dict[str, ImageFeatures] = {}
        self._bytes = 0

    def get(self, key: str) -> ImageFeatures | None:
        return self._entries.get(key)

    def put(self, key: str, value: ImageFeatures) -> None:
        if key in self._entries:
            return
        self._entries[key] = value
        self._bytes += value.nbytes
        while self._bytes > self.budget_bytes and len(self._entries) > 1:
            oldest = next(iter(self._entries))
            self._bytes -= self._entries.pop(oldest).nbytes


@torch.no_grad()
def see(
    base: Any, processor: Any, family: Family, picture: Image.Image, *, trained: bool = False
) -> ImageFeatures:
    """Pass one picture through processor, vision tower and connector.

    trained: keep the pixels in place of the features, for `look`.
    """
    words, inputs = family.read(processor, picture)
    kept = {name: torch.as_tensor(inputs[name]) for name in family.image_inputs}
    wanted = inspect.signature(_tower(base)).parameters
    pixels = {name: value for name, value in inputs.items() if name in wanted}
    with _evaluating(base):
        found = look(base, ImageFeatures(words, torch.empty(0), inputs=kept, pixels=pixels))
    if trained:
        return replace(found, features=found.features[:, :0].cpu(), deepstack=(), pixels=pixels)
    deepstack = tuple(part.cpu() for part in found.deepstack)
    return replace(found, features=found.features.cpu(), deepstack=deepstack, pixels={})


def look(base: Any, image: ImageFeatures) -> ImageFeatures:
    """The features of an image whose pixels are kept, on the model's device, with gradients."""
    device = next(base.parameters()).device
    pixels = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in image.pixels.items()
    }
    output = _tower(base)(**pixels)
    return replace(
        image,
        features=_rows(output.pooler_output),
        deepstack=tuple(map(_rows, getattr(output, "deepstack_features", None) or ())),
        kind=type(output),
        listed=isinstance(output.pooler_output, (list, tuple)),
    )


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
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
