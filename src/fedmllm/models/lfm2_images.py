"""LFM2-VL's pictures without torchvision: Pillow in place of its own image processor.

Same geometry as `Lfm2VlImageProcessor` of transformers, whose settings it reads from the
checkpoint. Pillow resizes where that one lets torchvision resize, so pixels, and features with
them, may differ by rounding between machines with and without torchvision.

Shapes: S pictures (cells of the grid, then the thumbnail; or one), N patches at most of one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_base import ImageProcessingMixin


@dataclass(frozen=True)
class Settings:
    """The checkpoint's settings that bear on geometry; defaults as in transformers.

    A token covers `downsample_factor` x `downsample_factor` patches of `encoder_patch_size`
    pixels. A picture of more than `max_image_tokens` * `max_pixels_tolerance` tokens is cut into
    `min_tiles` to `max_tiles` cells of `tile_size` pixels.
    """

    downsample_factor: int = 2
    do_image_splitting: bool = True
    min_tiles: int = 2
    max_tiles: int = 10
    use_thumbnail: bool = True
    min_image_tokens: int = 64
    max_image_tokens: int = 256
    encoder_patch_size: int = 16
    tile_size: int = 512
    max_pixels_tolerance: float = 2.0
    image_mean: Sequence[float] = (0.5, 0.5, 0.5)
    image_std: Sequence[float] = (0.5, 0.5, 0.5)

    @property
    def side(self) -> int:
        """Pixels along a token's side."""
        return self.encoder_patch_size * self.downsample_factor

    @property
    def max_patches(self) -> int:
        """Patches of the largest picture that the tower is given; smaller ones are padded."""
        tile = (self.tile_size // self.encoder_patch_size) ** 2 if self.do_image_splitting else 0
        return max(self.max_image_tokens * self.downsample_factor**2, tile)

    def whole_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) in full tokens: near the given size, area within the token limits."""
        side, area = self.side, width * height
        new = [max(side, round(edge / side) * side) for edge in (width, height)]
        least, most = (n * side**2 for n in (self.min_image_tokens, self.max_image_tokens))
        if new[0] * new[1] > most:
            scale = math.sqrt(area / most)
            new = [max(side, math.floor(edge / scale / side) * side) for edge in (width, height)]
        elif new[0] * new[1] < least:
            scale = math.sqrt(least / area)
            new = [math.ceil(edge * scale / side) * side for edge in (width, height)]
        return new[0], new[1]

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(columns, rows) of the cells: (1, 1) if the picture is small enough to stay whole."""
        rounded = [
            max(self.encoder_patch_size, round(edge / self.side) * self.side)
            for edge in (width, height)
        ]
        limit = self.max_image_tokens * self.side**2 * self.max_pixels_tolerance
        if not self.do_image_splitting or rounded[0] * rounded[1] <= limit:
            return 1, 1
        shapes = sorted(
            (columns * rows, columns, rows)
            for columns in range(1, self.max_tiles + 1)
            for rows in range(1, self.max_tiles + 1)
            if self.min_tiles <= columns * rows <= self.max_tiles
        )
        best, nearest = (1, 1), math.inf
        for cells, columns, rows in shapes:
            distance = abs(width / height - columns / rows)
            large = width * height > 0.5 * self.tile_size**2 * cells
            if distance < nearest or (distance == nearest and large):
                best, nearest = (columns, rows), distance
        return best


class Lfm2Images(ImageProcessingMixin):
    """Pictures to patches, as `Lfm2VlProcessor` asks for them."""

    model_input_names = ("pixel_values", "pixel_attention_mask", "spatial_shapes")

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.use_thumbnail = settings.use_thumbnail
        self.tile_size = settings.tile_size
        self.downsample_factor = settings.downsample_factor
        self.encoder_patch_size = settings.encoder_patch_size

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Lfm2Images:
        """From a checkpoint's settings, of which those that it does not use are left out."""
        names = {field.name for field in fields(Settings)}
        return cls(Settings(**{k: v for k, v in settings.items() if k in names and v is not None}))

    def __call__(self, images: Any, **options: Any) -> BatchFeature:
        """pixel_values [S, N, 3 p p], pixel_attention_mask [S, N], spatial_shapes [S, 2] (rows,
        columns of patches), and for each picture the rows, columns and size that it is given."""
        found: dict[str, list[Any]] = {
            name: [] for name in (*self.model_input_names, "image_rows", "image_cols")
        }
        sizes = []
        for image in _flat(images):
            width, height = self.settings.whole_size(*image.size)
            columns, rows = self.settings.grid(*image.size)
            for piece in self._pieces(image.convert("RGB"), columns, rows, (width, height)):
                for name, value in zip(self.model_input_names, self._patches(piece), strict=True):
                    found[name].append(value)
            found["image_rows"].append(rows)
            found["image_cols"].append(columns)
            sizes.append([height, width])
        tensors = {name: torch.stack(found.pop(name)) for name in self.model_input_names}
        return BatchFeature({**tensors, **found, "image_sizes": sizes})

    def _pieces(
        self, image: Image.Image, columns: int, rows: int, whole: tuple[int, int]
    ) -> list[Image.Image]:
        """The cells row by row and the thumbnail; or the picture itself."""
        small = image.resize(whole, Image.Resampling.BILINEAR)
        if columns * rows == 1:
            return [small]
        tile = self.settings.tile_size
        large = image.resize((columns * tile, rows * tile), Image.Resampling.BILINEAR)
        cells = [
            large.crop((c * tile, r * tile, (c + 1) * tile, (r + 1) * tile))
            for r in range(rows)
            for c in range(columns)
        ]
        return [*cells, small] if self.settings.use_thumbnail else cells

    def _patches(self, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Patches row by row, padded to N with zeros; their mask; (rows, columns)."""
        p, most = self.settings.encoder_patch_size, self.settings.max_patches
        pixels_HWC = np.asarray(image, dtype=np.float32) / 255
        pixels_HWC = (pixels_HWC - self.settings.image_mean) / self.settings.image_std
        rows, columns = pixels_HWC.shape[0] // p, pixels_HWC.shape[1] // p
        if rows * columns > most:
            raise ValueError(
                f"its sides are too unequal: {rows} x {columns} patches, at most {most} fit"
            )
        split = pixels_HWC.reshape(rows, p, columns, p, 3).transpose(0, 2, 1, 3, 4)
        flat = torch.from_numpy(split.reshape(rows * columns, p * p * 3).astype(np.float32))
        padded = torch.zeros(most, p * p * 3)
        padded[: len(flat)] = flat
        mask = (torch.arange(most) < len(flat)).int()
        return padded, mask, torch.tensor([rows, columns])


def _flat(images: Any) -> list[Image.Image]:
    if isinstance(images, Image.Image):
        return [images]
    return [image for group in images for image in _flat(group)]
