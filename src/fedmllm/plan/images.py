"""How many slices, patches and tokens the largest image becomes, as its family's processor cuts it.

Read from config.json and from the image processor's settings beside it (preprocessor_config.json,
or processor_config.json as transformers 5 writes it). What they leave out has the defaults of
transformers. Planned is the most that the settings admit, whatever images the data have; rounding
to whole patches may make a slice a few percent larger.

To add a family whose images are cut or of any size, add one entry to `CUTS`;
tests/test_plan_images.py holds it to what its processor does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedmllm.errors import UserError
from fedmllm.models.lfm2_images import Lfm2Images

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Cut:
    """The largest image. slices: views of it, the whole included. patches: of a slice, in the
    tower. tokens: of a slice, in the language model. note: what was assumed."""

    slices: int
    patches: int
    tokens: int
    note: str = ""


def read_settings(folder: str | Path) -> dict[str, Any]:
    """Settings of a folder's image processor, without those that are null; none without a file.

    Raises `UserError` for a file that is no JSON object.
    """
    found = _object(Path(folder) / PROCESSOR).get("image_processor")
    settings = found if isinstance(found, dict) else _object(Path(folder) / PREPROCESSOR)
    return {key: value for key, value in settings.items() if value is not None}


def _object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} holds no JSON object")
    return found


def largest_image(config: Any, settings: Settings, *, limit: int) -> Cut:
    """How the largest image is cut. settings: of `read_settings`. limit: tokens of a sample, which
    bounds images of any size.

    Raises `UserError` if a size is missing or is none.
    """
    kind = config.model_type
    try:
        cut = CUTS.get(kind, _whole)(config, settings, limit)
    except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"how images of a {kind!r} are cut cannot be read from its config.json and "
            f"{PREPROCESSOR}: {error!r}"
        ) from error
    if min(cut.slices, cut.patches, cut.tokens) < 1:
        raise UserError(f"by config.json and {PREPROCESSOR} a {kind!r} makes nothing of images")
    if kind not in CUTS or settings or cut.note:
        return cut
    return replace(
        cut,
        note=f"no {PREPROCESSOR} beside config.json: an image of a {kind} is taken to be cut as "
        f"transformers does by default, into {cut.slices} of {cut.patches:,} patches and "
        f"{cut.tokens:,} tokens at most: add that file, or give --slices",
    )


def is_cut(config: Any) -> bool:
    """Whether images of different sizes may become different numbers of tokens."""
    return config.model_type in CUTS


# -- families --------------------------------------------------------------------------------


def _whole(config: Any, settings: Settings, limit: int) -> Cut:
    """LLaVA, PaliGemma, Gemma 3 (which merges to a fixed number): one view of the tower's size."""
    patches = _square(config.vision_config.image_size, config.vision_config.patch_size)
    return Cut(1, patches, getattr(config, "mm_tokens_per_image", None) or patches)


def _minicpm(config: Any, settings: Settings, limit: int) -> Cut:
    """A source view and `max_slice_nums` cells, of about `scale_resolution`² pixels each."""
    bound = config.slice_config["max_slice_nums"]  # of older files; the processor has its own
    scale = settings.get("scale_resolution", 448)
    patches = _square(scale, config.vision_config.patch_size)
    return Cut(_minicpm_slices(settings, bound), patches, config.query_num)


def _minicpm_4_6(config: Any, settings: Settings, limit: int) -> Cut:
    """The same cells; 16 patches become a token, or 4."""
    scale = settings.get("scale_resolution", config.image_size)
    patches = _square(scale, config.vision_config.patch_size)
    merged = 4 if settings.get("downsample_mode", config.downsample_mode) == "4x" else 16
    return Cut(_minicpm_slices(settings, 9), patches, patches // merged)


def _minicpm_slices(settings: Settings, bound: int) -> int:
    cells = settings.get("max_slice_nums", bound) if settings.get("slice_mode", True) else 1
    return _with_whole(cells)


def _idefics3(config: Any, settings: Settings, limit: int) -> Cut:
    """The longer edge is scaled to `size` and cut into squares of `max_image_size`."""
    side = settings.get("max_image_size", {}).get("longest_edge", config.vision_config.image_size)
    edge = min(settings.get("size", {}).get("longest_edge", 4 * side), 4096)
    cells = math.ceil(edge / side) ** 2 if settings.get("do_image_splitting", True) else 1
    patches = _square(side, config.vision_config.patch_size)
    return Cut(_with_whole(cells), patches, patches // config.scale_factor**2)


def _anyres(config: Any, settings: Settings, limit: int) -> Cut:
    """LLaVA-NeXT, LLaVA-OneVision: the whole and a grid of tiles, one token more for each row of
    patches; more tiles than `anyres_max_` names are reduced to as many tokens."""
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    points = settings.get("image_grid_pinpoints", config.image_grid_pinpoints)
    grids = [(h // vision.image_size, w // vision.image_size) for h, w in points]
    named = str(getattr(config, "vision_aspect_ratio", "")).removeprefix("anyres_max_")
    most = int(named) if named.isdigit() else math.inf

    def tokens(rows: int, columns: int) -> int:
        ratio = math.sqrt(rows * columns / most)
        ratio = ratio if ratio > 1.1 else 1
        high, wide = int(rows * side / ratio), int(columns * side / ratio)
        return high * wide + high + side**2

    slices = 1 + max(rows * columns for rows, columns in grids)
    return Cut(slices, side**2, math.ceil(max(tokens(*grid) for grid in grids) / slices))


def _qwen(config: Any, settings: Settings, limit: int) -> Cut:
    """One view of any size up to `max_pixels` (or the longest edge of `size`, pixels too); not
    larger than a sample may be long, since its tokens are never cut."""
    vision = config.vision_config
    merged = vision.spatial_merge_size**2
    most = settings.get("size", {}).get("longest_edge", 28 * 28 * 1280)
    tokens = settings.get("max_pixels", most) // (merged * vision.patch_size**2)
    if tokens <= limit:
        return Cut(1, tokens * merged, tokens)
    note = (
        f"an image of a {config.model_type} may have {tokens:,} tokens (max_pixels of "
        f"{PREPROCESSOR}), a sample {limit:,}: counted are images that fill a sample; larger ones "
        "will not fit into theirs"
    )
    return Cut(1, limit * merged, limit, note)


def _internvl(config: Any, settings: Settings, limit: int) -> Cut:
    """Up to `max_patches` tiles and the whole. Its processor cuts whatever its settings say."""
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    patches = _square(max(side), max(patch)) if isinstance(side, list | tuple) else 0
    cells = _with_whole(settings.get("max_patches", 12))
    return Cut(cells, patches or _square(side, patch), config.image_seq_length)


def _lfm2(config: Any, settings: Settings, limit: int) -> Cut:
    """Up to `max_tiles` tiles and a thumbnail, padded to as many patches each."""
    own = {
        "encoder_patch_size": config.vision_config.patch_size,
        "downsample_factor": config.downsample_factor,
    }
    found = Lfm2Images.of({**own, **settings}).settings
    if not found.do_image_splitting or found.max_tiles < 2:
        return Cut(1, found.max_patches, found.max_image_tokens)
    slices = found.max_tiles + found.use_thumbnail
    tokens = found.max_tiles * (found.tile_size // found.side) ** 2
    tokens += found.use_thumbnail * found.max_image_tokens
    return Cut(slices, found.max_patches, math.ceil(tokens / slices))


CUTS: dict[str, Callable[[Any, Settings, int], Cut]] = {
    "idefics3": _idefics3,
    "smolvlm": _idefics3,
    "llava_next": _anyres,
    "llava_onevision": _anyres,
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "qwen3_5": _qwen,
    "internvl": _internvl,
    "lfm2_vl": _lfm2,
    "minicpmv": _minicpm,
    "minicpmv4_6": _minicpm_4_6,
}


def _square(side: int, patch: int) -> int:
    return (side // patch) ** 2


def _with_whole(cells: int) -> int:
    """An image that is cut is given as a whole, too."""
    return cells + 1 if cells > 1 else 1
