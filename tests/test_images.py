"""Image files of every mode become RGB; whatever is wrong names the file."""

import hashlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedmllm.data import images
from fedmllm.data.images import EncodedImage, ImageFile, MemoryImage, image_problem
from fedmllm.errors import UserError

RED = (255, 0, 0)


def opened(image, folder, name="x.png", **options):
    """Save, open through ImageFile, return the pixels as an array (H, W, 3)."""
    image.save(folder / name, **options)
    found = ImageFile(name, folder).open()
    assert found.mode == "RGB"
    return np.asarray(found)


@pytest.mark.parametrize(
    ("mode", "name"),
    [("RGB", "x.png"), ("RGBA", "x.png"), ("P", "x.png"), ("CMYK", "x.tif"), ("YCbCr", "x.tif")],
)
def test_colour_modes_keep_their_colour(tmp_path, mode, name):
    image = Image.new("RGB", (4, 4), (204, 51, 51)).convert(mode)
    np.testing.assert_allclose(opened(image, tmp_path, name)[0, 0], (204, 51, 51), atol=3)


def test_lab_becomes_rgb(tmp_path):
    assert opened(Image.new("LAB", (2, 2), (255, 128, 128)), tmp_path, "x.tif").min() > 240


@pytest.mark.parametrize(("mode", "white"), [("1", 1), ("L", 255), ("LA", (255, 255))])
def test_grey_modes(tmp_path, mode, white):
    np.testing.assert_array_equal(opened(Image.new(mode, (2, 2), white), tmp_path), 255)
    np.testing.assert_array_equal(opened(Image.new("L", (2, 2), 7), tmp_path), 7)


def test_transparency_lies_on_white(tmp_path):
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    np.testing.assert_array_equal(opened(clear, tmp_path), 255)
    half = Image.new("RGBA", (2, 2), (255, 0, 0, 128))
    np.testing.assert_allclose(opened(half, tmp_path)[0, 0], (255, 127, 127), atol=1)
    grey = Image.new("LA", (2, 2), (0, 0))
    np.testing.assert_array_equal(opened(grey, tmp_path), 255)


def test_a_palette_with_a_transparent_colour_lies_on_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, *RED])
    image.putpixel((1, 0), 1)
    pixels = opened(image, tmp_path, transparency=0)
    assert pixels.tolist() == [[[255, 255, 255], list(RED)]]
    image.putpixel((1, 0), 1)
    assert opened(image, tmp_path, "x.gif", transparency=0).tolist() == pixels.tolist()


def test_a_colour_named_transparent_lies_on_white(tmp_path):
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((0, 0), (0, 0, 9))
    assert opened(image, tmp_path, transparency=(0, 0, 9)).tolist() == [[[255] * 3, list(RED)]]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_grey_is_scaled(tmp_path, suffix):
    image = Image.fromarray(np.array([[0, 257, 32896, 60000, 65535]], dtype=np.uint16))
    assert opened(image, tmp_path, f"x.{suffix}")[0, :, 0].tolist() == [0, 1, 128, 233, 255]


def test_thirty_two_bit_grey_is_scaled_or_taken_as_it_is(tmp_path):
    wide = Image.fromarray(np.array([[-5, 257, 65535, 90000]], dtype=np.int32))
    assert opened(wide, tmp_path, "x.tif")[0, :, 0].tolist() == [0, 1, 255, 255]
    narrow = Image.fromarray(np.array([[0.0, 100.0, 255.0, np.nan]], dtype=np.float32))
    assert opened(narrow, tmp_path, "x.tif")[0, :, 0].tolist() == [0, 100, 255, 0]


def test_exif_rotation_is_applied(tmp_path):
    """Orientation 6: what is left in the file is up on the screen."""
    image = Image.new("RGB", (8, 4), "white")
    image.paste(RED, (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = opened(image, tmp_path, "x.png", exif=exif)
    assert pixels.shape == (8, 4, 3)
    assert pixels[0, 0].tolist() == list(RED)
    assert pixels[-1, 0].tolist() == [255, 255, 255]


def test_a_damaged_exif_block_does_not_lose_the_picture(tmp_path):
    broken = b"Exif\x00\x00XX*\x00\x08\x00\x00\x00"
    pixels = opened(Image.new("RGB", (8, 4), RED), tmp_path, exif=broken)
    assert pixels.shape == (4, 8, 3)


def test_the_first_frame_of_an_animation_is_taken(tmp_path):
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    pixels = opened(frames[0], tmp_path, "x.gif", save_all=True, append_images=frames[1:])
    assert pixels[0, 0].tolist() == list(RED)


def test_the_key_is_the_content(tmp_path):
    for name, colour in (("a.png", "red"), ("b.png", "red"), ("c.png", "blue")):
        Image.new("RGB", (2, 2), colour).save(tmp_path / name)
    a, b, c = (ImageFile(name, tmp_path).key for name in ("a.png", "b.png", "c.png"))
    assert a == b != c
    assert a == "sha256:" + hashlib.sha256((tmp_path / "a.png").read_bytes()).hexdigest()
    with pytest.raises(UserError, match=r"gone\.png does not exist"):
        _ = ImageFile("gone.png", tmp_path).key


def test_the_key_is_read_once(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    image = ImageFile("a.png", tmp_path)
    key = image.key
    (tmp_path / "a.png").unlink()
    assert image.key == key


def png(width, height):
    """A valid PNG header for any size, with no pixels behind it."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def noise_bytes(kind):
    generator = np.random.Generator(np.random.PCG64(0))
    buffer = io.BytesIO()
    Image.fromarray(generator.integers(0, 256, (64, 64, 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "is not an image"),
        (b"not a picture", "is not an image: use one of PNG, JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image"),
        (noise_bytes("PNG")[:4000], "cannot be read, it may be truncated"),
        (noise_bytes("JPEG")[:2000], "cannot be read, it may be truncated"),
        (png(2, 2), "cannot be read, it may be truncated"),
        (png(10_000, 5_001), "more than 50 million pixels"),
        (png(12_000, 10_000), "more than 50 million pixels"),
        (png(60_000, 60_000), "more than 50 million pixels"),
    ],
    ids=["none", "empty", "text", "eps", "png", "jpeg", "hollow", "large", "larger", "bomb"],
)
def test_what_cannot_be_read_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        ImageFile("x.png", tmp_path).open()
    assert str(tmp_path / "x.png") in str(caught.value)


def test_exactly_the_limit_is_not_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 12)
    Image.new("RGB", (4, 3)).save(tmp_path / "fits.png")
    Image.new("RGB", (13, 1)).save(tmp_path / "large.png")
    assert ImageFile("fits.png", tmp_path).open().size == (4, 3)
    with pytest.raises(UserError, match=r"large\.png has more than"):
        ImageFile("large.png", tmp_path).open()


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]), st.data())
def test_damaged_files_never_raise_anything_else(tmp_path_factory, kind, data):
    """Flip some bytes: an image or a UserError comes out."""
    content = bytearray(noise_bytes(kind))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, min(len(content) - 1, 400)))] = data.draw(
            st.integers(0, 255)
        )
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "x").write_bytes(content)
    try:
        assert ImageFile("x", folder).open().mode == "RGB"
    except UserError as error:
        found = str(error)
        assert str(folder / "x") in found


def test_a_drawing_is_made_when_opened():
    calls = []

    def draw():
        calls.append(1)
        return Image.new("RGBA", (2, 2), (0, 0, 0, 0))

    image = MemoryImage("blank", draw)
    assert image.key == "blank"
    assert not calls
    assert image.open().getpixel((0, 0)) == (255, 255, 255)


def test_paths_must_stay_in_the_folder(tmp_path):
    root = tmp_path / "data"
    (root / "sub").mkdir(parents=True)
    for place in (root / "sub" / "a.png", tmp_path / "out.png"):
        Image.new("RGB", (2, 2)).save(place)
    (root / "link.png").symlink_to(tmp_path / "out.png")
    (root / "inner.png").symlink_to(root / "sub" / "a.png")
    (root / "door").symlink_to(tmp_path)
    assert image_problem("sub/a.png", root) is None
    assert image_problem("inner.png", root) is None
    assert image_problem(str(root / "sub" / "a.png"), root) is None
    for path, message in {
        "../out.png": "must not contain ..",
        "sub/../sub/a.png": "must not contain ..",
        str(tmp_path / "out.png"): "lies outside",
        "/etc/hostname": "lies outside",
        "link.png": "lies outside",
        "door/out.png": "lies outside",
        "gone.png": "does not exist",
        "sub": "does not exist",
        "": "must not be empty",
        "a\0b.png": "cannot be read",
        "x" * 5000: "cannot be read",
    }.items():
        assert message in image_problem(path, root), path


def test_headers_are_verified_on_demand(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "bomb.png").write_bytes(png(60_000, 60_000))
    assert "is not an image" in image_problem("text.png", tmp_path)
    assert "more than 50 million" in image_problem("bomb.png", tmp_path)
    assert image_problem("text.png", tmp_path, verify=False) is None


def test_a_header_is_enough_to_see_whether_it_is_an_image():
    """The check at loading does not read the image."""
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "PNG")
    read = []

    class Counted(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            content = super().read(size)
            read.append(len(content))
            return content

    image = EncodedImage(Path("row 1"), lambda: Counted(out.getvalue()))
    assert image.problem() is None
    assert 0 < sum(read) < 1000
    assert image.open().size == (300, 300)
    assert sum(read) > 250_000
    assert "row 1 is not an image" in str(EncodedImage(Path("row 1"), io.BytesIO).problem())
