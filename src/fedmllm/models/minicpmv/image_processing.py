"""Images as MiniCPM-V sees them: a source view and, for a large image, a grid of cells.

PIL and numpy only. Facts from the published image processor; the arithmetic of sizes (Python's
rounding, int() towards zero) is part of the format, since a pixel more is another position id.

Sizes are (width, height) in pixels; `tgt_sizes` are (rows, columns) in patches; grids are
(columns, rows). Shapes: S slices, n patches of a slice, N patches of the longest, P patch side.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs

from fedmllm.models.minicpmv.configuration import VERSIONS, version_of

Size = tuple[int, int]


class MiniCPMVImagesKwargs(ImagesKwargs, total=False):
    """What a call may change: the bound on cells, and whether to cut at all."""

    max_slice_nums: int
    slice_mode: bool


def slice_grid(size: Size, max_slices: int, *, scale: int = 448) -> Size | None:
    """(columns, rows) of the grid, or None if one view suffices.

    Of the grids with about as many cells as the image has areas of scale², the one whose shape
    is nearest to the image's on a log scale; the first on a tie, fewer cells and columns first.
    """
    width, height = size
    wanted = min(math.ceil(width * height / scale**2), max_slices)
    if wanted <= 1:
        return None
    counts = [n for n in (wanted - 1, wanted, wanted + 1) if 1 < n <= max_slices]
    grids = [(c, n // c) for n in counts for c in range(1, n + 1) if n % c == 0]
    shape = math.log(width / height)
    return min(grids, key=lambda grid: abs(shape - math.log(grid[0] / grid[1])))


def fitted_size(
    size: tuple[float, float], *, upscale: bool, scale: int = 448, patch: int = 14
) -> Size:
    """About scale² pixels of the same shape, in whole patches; a small image only if `upscale`."""
    width, height = size
    if width * height > scale**2 or upscale:
        ratio = width / height
        height = int(scale / math.sqrt(ratio))
        width = int(height * ratio)
    return _multiple(width, patch), _multiple(height, patch)


def cell_size(size: Size, grid: Size, *, scale: int = 448, patch: int = 14) -> Size:
    """Size of a grid's cell: the image's share, fitted."""
    width, height = (_multiple(side, n) / n for side, n in zip(size, grid, strict=True))
    return fitted_size((width, height), upscale=True, scale=scale, patch=patch)


def _multiple(length: float, divisor: int) -> int:
    """The nearest multiple (half to even), at least one."""
    return max(round(length / divisor) * divisor, divisor)


def patchify(pixels: np.ndarray, patch: int = 14) -> np.ndarray:
    """[3, H, W] -> [3, P, P * n]: the patches side by side, row by row."""
    channels, height, width = pixels.shape
    blocks = pixels.reshape(channels, height // patch, patch, width // patch, patch)
    return blocks.transpose(0, 2, 1, 3, 4).reshape(channels, patch, -1)


class MiniCPMVImageProcessor(BaseImageProcessor):
    """Cuts, resizes, normalises and unfolds images; writes their placeholder text.

    Reads the published preprocessor_config.json as it is. `max_slice_nums` bounds the cells,
    `slice_mode=False` never cuts, `image_feature_size` is the number of placeholders of a slice,
    `use_image_id` writes the image's number before it (2.6 only).
    """

    model_input_names = ["pixel_values", "tgt_sizes"]  # noqa: RUF012 (as in transformers)
    valid_kwargs = MiniCPMVImagesKwargs

    def __init__(
        self,
        *,
        version: float | str | None = None,
        image_feature_size: int | None = None,
        max_slice_nums: int = 9,
        scale_resolution: int = 448,
        patch_size: int = 14,
        slice_mode: bool = True,
        use_image_id: bool | None = None,
        norm_mean: list[float] | None = None,
        norm_std: list[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if version is None:  # an old file: the two differ in the number of placeholders
            known = {v.query_num: v.name for v in VERSIONS.values()}
            version = known.get(image_feature_size or 64, "2.6")
        spec = version_of(version)
        self.version = version
        self.image_feature_size = image_feature_size or spec.query_num
        self.max_slice_nums = max_slice_nums
        self.scale_resolution = scale_resolution
        self.patch_size = patch_size
        self.slice_mode = slice_mode
        self.use_image_id = spec.image_id if use_image_id is None else use_image_id
        self.norm_mean = norm_mean or [0.5, 0.5, 0.5]
        self.norm_std = norm_std or [0.5, 0.5, 0.5]

    def grid(
        self, size: Size, *, max_slice_nums: int | None = None, slice_mode: bool | None = None
    ) -> Size | None:
        """(columns, rows) that an image of this size is cut into, or None."""
        if not (self.slice_mode if slice_mode is None else slice_mode):
            return None
        limit = self.max_slice_nums if max_slice_nums is None else max_slice_nums
        return slice_grid(size, limit, scale=self.scale_resolution)

    def views(self, image: Image.Image, grid: Size | None) -> list[Image.Image]:
        """The source view, then the cells row by row."""
        options = {"scale": self.scale_resolution, "patch": self.patch_size}
        source = fitted_size(image.size, upscale=grid is None, **options)
        views = [image.resize(source, Image.Resampling.BICUBIC)]
        if grid is not None:
            columns, rows = grid
            width, height = cell_size(image.size, grid, **options)
            whole = image.resize((columns * width, rows * height), Image.Resampling.BICUBIC)
            views += [
                whole.crop((c * width, r * height, (c + 1) * width, (r + 1) * height))
                for r in range(rows)
                for c in range(columns)
            ]
        return views

    def pixels(self, view: Image.Image) -> np.ndarray:
        """[3, P, P * n] float32, normalised."""
        mean = np.asarray(self.norm_mean, dtype=np.float32)
        std = np.asarray(self.norm_std, dtype=np.float32)
        values = (np.asarray(view, dtype=np.float32) / 255 - mean) / std
        return patchify(values.transpose(2, 0, 1), self.patch_size)

    def preprocess(
        self,
        images: Any,
        *,
        max_slice_nums: int | None = None,
        slice_mode: bool | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """`pixel_values` [S, 3, P, P * N] zero-padded and `tgt_sizes` [S, 2], image by image."""
        views = []
        for image in flat_images(images):
            size = self.grid(image.size, max_slice_nums=max_slice_nums, slice_mode=slice_mode)
            views += self.views(image, size)
        patch = self.patch_size
        data = {
            "pixel_values": _stack([self.pixels(view) for view in views]),
            "tgt_sizes": np.array([(v.height // patch, v.width // patch) for v in views]),
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def placeholder(self, grid: Size | None, index: int = 0) -> str:
        """Text that stands for an image: `image_feature_size` times `<unk>` for each slice."""
        words = "<unk>" * self.image_feature_size
        text = f"<image>{words}</image>"
        columns, rows = grid or (0, 0)
        if version_of(self.version).image_id:
            if self.use_image_id:
                text = f"<image_id>{index}</image_id>{text}"
            return text + "\n".join([f"<slice>{words}</slice>" * columns] * rows)
        cells = "\n".join([f"<image>{words}</image>" * columns] * rows)
        return text + (f"<slice>{cells}</slice>" if grid else "")


def flat_images(images: Any) -> list[Image.Image]:
    """All images of an image or of (nested) lists of images, in RGB."""
    if isinstance(images, (list, tuple)):
        return [image for part in images for image in flat_images(part)]
    if isinstance(images, np.ndarray) and images.dtype == np.uint8:
        images = Image.fromarray(images)
    if not isinstance(images, Image.Image):
        raise ValueError(f"an image must be a PIL image or uint8 [H, W, 3], not {type(images)}")
    return [images.convert("RGB")]


def _stack(slices: list[np.ndarray]) -> np.ndarray:
    """[S, 3, P, P * N], zero where a slice is shorter than the longest."""
    longest = max(pixels.shape[-1] for pixels in slices)
    stacked = np.zeros((len(slices), *slices[0].shape[:-1], longest), dtype=np.float32)
    for row, pixels in zip(stacked, slices, strict=True):
        row[..., : pixels.shape[-1]] = pixels
    return stacked
