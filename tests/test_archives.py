"""Archives: read in place or unpacked once; hostile and damaged ones are refused by name."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import resource
import stat
import tarfile
import zipfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
from PIL import Image

from fedmllm.data import archives
from fedmllm.data.files import open_files
from fedmllm.data.images import ArchiveImage, ImageFile
from fedmllm.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fedmllm" / "archives"


def encoded(image, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_zip(path, members) -> ArchiveImage:
    """A zip of name -> bytes; the image that is its first member."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return ArchiveImage(next(iter(members)), path)


def make_tar(path, *members: tarfile.TarInfo, content: bytes = b"x"):
    with tarfile.open(path, "w:gz") as archive:
        for member in members:
            if member.isreg():
                member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def regular(name: str) -> tarfile.TarInfo:
    return tarfile.TarInfo(name)


def linked(name: str, target: str, kind=tarfile.SYMTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


# -- images inside a zip -----------------------------------------------------------------------


def test_an_image_is_read_in_place(tmp_path, cache):
    content = encoded(Image.new("RGB", (5, 4), "red"))
    image = make_zip(tmp_path / "a.zip", {"img/x.png": content})
    assert np.asarray(image.open()).shape == (4, 5, 3)
    assert image.key == "sha256:" + hashlib.sha256(content).hexdigest()
    assert image.file == tmp_path / "a.zip" / "img" / "x.png"
    assert not cache.exists()
    assert pickle.loads(pickle.dumps(image)).open().size == (5, 4)


def exif_turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.new("RGB", (8, 4), "red"), "JPEG", exif=exif)


def palette():
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 255, 0, 0])
    return encoded(image, transparency=0)


@pytest.mark.parametrize(
    ("content", "size", "pixel"),
    [
        (encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG"), (4, 4), (255, 0, 0)),
        (encoded(Image.fromarray(np.full((2, 3), 32896, np.uint16))), (3, 2), (128, 128, 128)),
        (palette(), (2, 1), (255, 255, 255)),
        (exif_turned(), (4, 8), (255, 0, 0)),
    ],
    ids=["CMYK", "16 bit", "palette", "EXIF"],
)
def test_every_kind_of_image(tmp_path, content, size, pixel):
    found = make_zip(tmp_path / "a.zip", {"x": content}).open()
    assert (found.mode, found.size) == ("RGB", size)
    np.testing.assert_allclose(found.getpixel((0, 0)), pixel, atol=3)


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    whole = encoded(Image.effect_noise((64, 64), 90))
    for name, content, message in (
        ("text", b"no picture", "is not an image"),
        ("half", whole[: len(whole) // 2], "may be truncated or damaged"),
    ):
        image = make_zip(tmp_path / f"{name}.zip", {f"img/{name}.png": content})
        with pytest.raises(UserError, match=message) as caught:
            image.open()
        assert f"{name}.zip/img/{name}.png" in str(caught.value)
    for member in ("open", "key"):
        with pytest.raises(UserError, match="does not exist in the archive"):
            getattr(ArchiveImage("none", image.archive), member)()
    with pytest.raises(UserError, match=r"gone\.zip does not exist"):
        ArchiveImage("x", tmp_path / "gone.zip").open()
    monkeypatch.setattr("fedmllm.data.images.MAX_PIXELS", 100)
    large = make_zip(tmp_path / "large.zip", {"x.png": whole})
    with pytest.raises(UserError, match=r"large\.zip/x\.png has more than"):
        large.open()


def test_damaged_bytes_of_a_member_are_named(tmp_path):
    image = make_zip(tmp_path / "a.zip", {"x.png": encoded(Image.effect_noise((64, 64), 90))})
    content = bytearray(image.archive.read_bytes())
    content[200] ^= 0xFF
    image.archive.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.zip/x\.png cannot be read, the archive may be"):
        image.open()


def open_in_child(image: ArchiveImage) -> int:
    return sum(image.open().tobytes())


def test_processes_read_one_archive_at_once(tmp_path):
    """A handle shared over a fork would read at another's position."""
    members = {f"{i}.png": encoded(Image.effect_noise((80, 80), 90)) for i in range(12)}
    make_zip(tmp_path / "a.zip", members)
    images = [ArchiveImage(name, tmp_path / "a.zip") for name in members] * 4
    expected = [open_in_child(image) for image in images]  # the handle is open in the parent
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        assert list(pool.map(open_in_child, images)) == expected


def resident() -> int:
    """Bytes of this process in memory; elsewhere than on Linux its peak."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_memory_stays_flat(tmp_path):
    """100 images of 2 MB each are read, from a zip and as files, and not kept."""
    content = encoded(Image.new("RGB", (800, 800), "red"))
    make_zip(tmp_path / "a.zip", {f"{i}.png": content for i in range(50)})
    for i in range(50):
        (tmp_path / f"{i}.png").write_bytes(content)
    images = [ArchiveImage(f"{i}.png", tmp_path / "a.zip") for i in range(50)]
    images += [ImageFile(f"{i}.png", tmp_path) for i in range(50)]
    images[0].open()
    before = resident()
    for image in images:
        image.open()
        assert image.key
    assert resident() - before < 20_000_000


# -- hostile and damaged archives --------------------------------------------------------------


def test_a_zip_bomb_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "SMALL", 1000)
    image = make_zip(tmp_path / "a.zip", {"x.png": bytes(1_000_000), "y.png": b"small"})
    with pytest.raises(UserError, match=r"a\.zip/x\.png unpacks to 1,000,000 bytes"):
        image.open()
    assert archives.member_bytes(tmp_path / "a.zip", "y.png") == b"small"
    monkeypatch.setattr(archives, "SMALL", 2_000_000)
    monkeypatch.setattr(archives, "MAX_MEMBER", 10_000)
    with pytest.raises(UserError, match="not plausible"):
        image.open()


def test_odd_names_in_a_zip_are_passed_over(tmp_path):
    names = ("/train.jsonl", "../train.jsonl", "a//train.jsonl", "a/../../train.jsonl")
    make_zip(tmp_path / "a.zip", {**dict.fromkeys(names, b"no"), "b/train.jsonl": b"yes"})
    found = open_files(tmp_path / "a.zip", "hateful-memes").table("train.jsonl")
    assert found.tree.read(found.path) == b"yes"


def test_a_tar_that_ends_with_a_zip_is_a_tar(tmp_path):
    make_zip(tmp_path / "a.zip", {"x": b"1"})
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        archive.add(tmp_path / "a.zip", "a.zip")
    assert zipfile.is_zipfile(tmp_path / "b.tar")  # so zipfile says
    assert archives.kind_of(tmp_path / "b.tar") == "tar"
    assert archives.kind_of(tmp_path / "a.zip") == "zip"
    assert archives.kind_of(tmp_path / "gone") is None


def test_links_in_a_zip_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        member = zipfile.ZipInfo("x.png")
        member.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(member, "/etc/hostname")
    with pytest.raises(UserError, match="is a link, not a file"):
        ArchiveImage("x.png", tmp_path / "a.zip").open()


def test_an_encrypted_zip_says_what_to_do(tmp_path):
    make_zip(tmp_path / "a.zip", {"train.jsonl": b"x"})
    content = bytearray((tmp_path / "a.zip").read_bytes())
    content[6] |= 1  # the flag in the local header
    content[content.index(b"PK\x01\x02") + 8] |= 1  # and in the directory
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(UserError, match="is encrypted: unpack it with its password"):
        open_files(tmp_path / "a.zip", "hateful-memes")


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (regular("../out.txt"), "leads outside"),
        (regular("/tmp/fedmllm-out.txt"), "leads outside"),
        (regular("a/../../out.txt"), "leads outside"),
        (linked("img", "/etc"), "is a link or a device"),
        (linked("img", "../..", tarfile.LNKTYPE), "is a link or a device"),
        (linked("pipe", "", tarfile.FIFOTYPE), "is a link or a device"),
        (linked("disk", "", tarfile.BLKTYPE), "is a link or a device"),
    ],
)
def test_hostile_tars_are_refused(tmp_path, cache, member, message):
    path = make_tar(tmp_path / "a.tar.gz", regular("train.jsonl"), member)
    with pytest.raises(UserError, match=message) as caught:
        open_files(path, "hateful-memes")
    assert "a.tar.gz" in str(caught.value)
    assert not list(cache.rglob("*"))  # neither the file nor a draft of the rest is left
    assert not (tmp_path / "out.txt").exists()
    assert not os.path.exists("/tmp/fedmllm-out.txt")


@pytest.mark.parametrize("limit", ["MAX_TOTAL", "MAX_FILES", "MAX_RATIO"])
def test_a_tar_bomb_is_refused(tmp_path, cache, monkeypatch, limit):
    path = make_tar(
        tmp_path / "a.tar.gz", *(regular(f"{i}.txt") for i in range(20)), content=bytes(10_000)
    )
    monkeypatch.setattr(archives, "SMALL", 5000)
    monkeypatch.setattr(archives, limit, 5)
    with pytest.raises(UserError, match="more than is plausible"):
        archives.unpacked(path)
    assert not list(cache.rglob("*"))


@pytest.mark.parametrize("cut", [10, 300, 0.5, 0.9])
def test_half_a_download_is_named(tmp_path, cache, cut):
    noise = np.random.Generator(np.random.PCG64(0)).bytes(40_000)
    path = make_tar(tmp_path / "a.tar.gz", *(regular(f"{i}.bin") for i in "ab"), content=noise)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(cut * len(whole)) if cut < 1 else int(cut)])
    with pytest.raises(UserError, match=r"a\.tar\.gz (cannot be read|is neither)"):
        open_files(path, "crisismmd")
    assert not list(cache.rglob("*"))
    make_zip(tmp_path / "a.zip", {"x": noise})
    content = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"a\.zip is neither a folder nor"):
        open_files(tmp_path / "a.zip", "crisismmd")


# -- the cache ---------------------------------------------------------------------------------


def test_a_tar_is_unpacked_once_and_anew_when_it_changed(tmp_path, cache):
    path = make_tar(tmp_path / "a.tar.gz", regular("x/y.txt"), content=b"first")
    first = archives.unpacked(path)
    assert (first / "x" / "y.txt").read_bytes() == b"first"
    assert first.parent == cache
    stamp = (first / "x" / "y.txt").stat().st_mtime_ns
    assert archives.unpacked(path) == first
    assert (first / "x" / "y.txt").stat().st_mtime_ns == stamp
    make_tar(path, regular("x/y.txt"), content=b"other")
    second = archives.unpacked(path)
    assert second != first
    assert (second / "x" / "y.txt").read_bytes() == b"other"
    assert len(list(cache.iterdir())) == 2


def test_a_change_in_the_middle_is_seen(tmp_path):
    """Of the same size, with the same first and last bytes, but of another time."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        member = regular("x")
        member.size = 400_000
        archive.addfile(member, io.BytesIO(bytes(400_000)))
    first = archives.unpacked(path)
    content = bytearray(path.read_bytes())
    content[200_000] = 7
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    second = archives.unpacked(path)
    assert sum((first / "x").read_bytes()) == 0
    assert sum((second / "x").read_bytes()) == 7


def test_two_who_unpack_at_once_do_not_disturb_each_other(tmp_path, cache, monkeypatch):
    """The one that comes second finds the folder there and drops its own draft."""
    path = make_tar(tmp_path / "a.tar.gz", regular("y.txt"), content=b"first")
    real = archives._unpack

    def slow(stream, folder, archive):
        monkeypatch.setattr(archives, "_unpack", real)
        archives.unpacked(path)  # the other one, done before us
        real(stream, folder, archive)

    monkeypatch.setattr(archives, "_unpack", slow)
    assert (archives.unpacked(path) / "y.txt").read_bytes() == b"first"
    assert len(list(cache.iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = make_tar(tmp_path / "a.tar.gz", regular("y.txt"))
    with pytest.raises(UserError, match=r"cache folder .*archives cannot be .*XDG_CACHE_HOME"):
        archives.unpacked(path)


def test_the_cache_is_below_home_by_default(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert archives.cache_folder() == tmp_path / ".cache" / "fedmllm" / "archives"
