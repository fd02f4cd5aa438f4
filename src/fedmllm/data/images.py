"""Images that are read when needed, always as RGB.

`ImageFile` is a file, `ArchiveImage` a member of a zip archive, `EncodedImage` a file's bytes from
elsewhere, `MemoryImage` a drawing. All are `ImageSource`s. Whatever is wrong with a file becomes a
`UserError` that names it, so that one broken picture among thousands is found.
"""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fedmllm.data.archives import member_bytes
from fedmllm.errors import UserError

MAX_PIXELS = 50_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats that are opened. Not EPS, for one: Pillow hands it to an external interpreter."""
_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
# what Pillow's decoders let through on broken or hostile files
_BROKEN: tuple[type[Exception], ...] = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)


@dataclass(frozen=True)
class ImageFile:
    """An image file. path: relative to `root`, so that a sample names no machine."""

    path: str | Path
    root: Path = Path()

    @property
    def file(self) -> Path:
        """Where the file lies."""
        return self.root / self.path

    @cached_property
    def key(self) -> str:
        """``sha256:`` and the digest of the file's bytes, read once."""
        return _digest(self.encoded())

    def encoded(self) -> bytes:
        """The file's bytes as they are."""
        try:
            return self.file.read_bytes()
        except OSError as error:
            raise UserError(_message(self.file, error)) from error

    def open(self) -> Image.Image:
        """The image in mode RGB, upright (EXIF), transparency on white.

        Raises `UserError` naming the file if it is missing, not an image of `FORMATS`,
        truncated, or above `MAX_PIXELS`.
        """
        return _decoded(self.file, self.file)


@dataclass(frozen=True)
class ArchiveImage:
    """An image inside a zip archive, read in place. member: its path inside the archive."""

    member: str
    archive: Path

    @property
    def file(self) -> Path:
        """Its place for a person: the archive and the path inside it."""
        return self.archive / self.member

    @cached_property
    def key(self) -> str:
        """``sha256:`` and the digest of the member's bytes, read once."""
        return _digest(self.encoded())

    def encoded(self) -> bytes:
        """The member's bytes as they are."""
        return member_bytes(self.archive, self.member)

    def open(self) -> Image.Image:
        """As `ImageFile.open`."""
        return _decoded(io.BytesIO(self.encoded()), self.file)


@dataclass(frozen=True)
class EncodedImage:
    """An image file's bytes from anywhere, read when needed. file: its place for a person.

    stream: opens the bytes without reading them all, so that `problem` costs a header.
    """

    file: Path
    stream: Callable[[], IO[bytes]]

    def encoded(self) -> bytes:
        """The bytes as they are."""
        with self.stream() as stream:
            return stream.read()

    @cached_property
    def key(self) -> str:
        """``sha256:`` and the digest of the bytes, as of the same image in a file."""
        return _digest(self.encoded())

    def problem(self) -> str | None:
        """Why it is refused by its header, or None."""
        try:
            with self.stream() as stream:
                _header(stream).close()
        except _BROKEN as error:
            return _message(self.file, error)
        return None

    def open(self) -> Image.Image:
        """As `ImageFile.open`."""
        return _decoded(io.BytesIO(self.encoded()), self.file)


@dataclass(frozen=True)
class MemoryImage:
    """An image drawn on demand. key: names what `make` draws; equal keys, equal pictures."""

    key: str
    make: Callable[[], Image.Image]

    def open(self) -> Image.Image:
        """The drawing in mode RGB."""
        return to_rgb(self.make())


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB: transparency lies on white, 16-bit grey is scaled to 8 bit.

    Grey values above 8 bits (modes I;16, I, F) are read as 0..65535 and clipped to that; images
    in these modes whose values all lie within 0..255 are taken as they are.
    """
    if image.mode.startswith(("I", "F")):
        image = _eight_bit(image)
    if "transparency" in image.info or image.mode in _ALPHA:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def image_problem(path: str, root: Path, *, verify: bool = True) -> str | None:
    """Why an image path found in a data file is refused, or None if it is fine.

    The path must be relative to `root` or lie inside it, also after symbolic links are followed,
    and exist. verify: also read the header (format and size); pixels are decoded on `open`.
    """
    if not path or ".." in Path(path).parts:
        return f"image path {path!r} must not {'contain ..' if path else 'be empty'}"
    try:
        base, file = root.resolve(), (root / path).resolve()
        if not file.is_relative_to(base):
            return f"image {path!r} lies outside the data folder: put it inside"
        if not file.is_file():
            return f"image {path!r} does not exist in the data folder"
        if verify:
            _header(file).close()
    except _BROKEN as error:
        return _message(Path(path), error)
    return None


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _decoded(source: Path | io.BytesIO, name: Path) -> Image.Image:
    try:
        with _header(source) as image:
            image.load()
            return to_rgb(_upright(image))
    except _BROKEN as error:
        raise UserError(_message(name, error)) from error


def _header(file: Path | IO[bytes]) -> Image.Image:
    """Open without decoding; refuse what is too large to decode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is lower
        image = Image.open(file, formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise Image.DecompressionBombError
    return image


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except _BROKEN:  # a damaged EXIF block says nothing about the pixels
        return image


def _eight_bit(image: Image.Image) -> Image.Image:
    grey = np.nan_to_num(np.asarray(image, dtype=np.float64))
    if grey.size and grey.max() > 255:
        grey = grey / 257
    return Image.fromarray(np.rint(np.clip(grey, 0, 255)).astype(np.uint8))


def _message(file: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"image {file} does not exist"
    if isinstance(error, UnidentifiedImageError):
        return f"image {file} is not an image: use one of {', '.join(FORMATS)}"
    if isinstance(error, Image.DecompressionBombError):
        limit = MAX_PIXELS // 1_000_000
        return f"image {file} has more than {limit} million pixels: make it smaller"
    return f"image {file} cannot be read, it may be truncated or damaged ({error})"
