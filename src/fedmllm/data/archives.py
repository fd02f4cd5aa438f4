"""Archives as downloaded: zip members are read in place, tar archives unpacked once into a cache.

Nothing is ever written beside the archive. A tar.gz has no random access, so it is unpacked, whole
and once, below `cache_folder()`: under a name made of its size, its time and its first and last
bytes, and by one rename at the end, so that a reader never sees half of it. Hostile archives are
refused: paths that lead outside, links, devices, encryption, and sizes out of all proportion.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO

from fedmllm import folders
from fedmllm.errors import UserError

MAX_MEMBER = 512 * 2**20
"""Bytes of one image or table; larger ones are refused before they are read."""
MAX_TOTAL = 64 * 2**30
"""Bytes that one archive may unpack to."""
MAX_FILES = 1_000_000
MAX_RATIO = 200
"""Unpacked bytes per packed byte, where it is more than `SMALL` bytes; JSON reaches about 20."""
SMALL = 64 * 2**20
_BROKEN: tuple[type[Exception], ...] = (
    *(OSError, EOFError, ValueError, RuntimeError, NotImplementedError),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, tarfile.TarError),
)


def kind_of(path: Path) -> str | None:
    """``zip``, ``tar`` (compressed or not) or None, told by the content, not by the name."""
    try:
        with open(path, "rb") as file:
            starts_as_zip = file.read(2) == b"PK"  # is_zipfile takes a tar that ends with a zip
        if starts_as_zip:
            return "zip" if zipfile.is_zipfile(path) else None
        return "tar" if tarfile.is_tarfile(path) else None
    except _BROKEN:  # e.g. a damaged gzip header
        return None


def zip_names(archive: Path) -> list[str]:
    """The files of a zip archive. Raises `UserError` if it is damaged or encrypted."""
    with _named(archive):
        members = _zip(archive).infolist()
    if any(member.flag_bits & 1 for member in members):
        raise UserError(f"{archive} is encrypted: unpack it with its password and give the folder")
    return [member.filename for member in members if not member.is_dir()]


def member_bytes(archive: Path, member: str) -> bytes:
    """The bytes of one file of a zip archive, at most `MAX_MEMBER`."""
    with _named(archive, member):
        opened = _zip(archive)
        _check_size(archive, opened.getinfo(member), MAX_MEMBER)
        return opened.read(member)


def member_as_file(archive: Path, member: str) -> Path:
    """An archive inside a zip archive, copied once into the cache."""
    target = cache_folder() / f"{_fingerprint(archive)}-{_digest(member.encode())}"
    if not target.exists():
        with _named(archive, member), _draft(target) as draft:
            opened = _zip(archive)
            _check_size(archive, opened.getinfo(member), MAX_TOTAL)
            with opened.open(member) as source, open(draft / Path(member).name, "wb") as copy:
                shutil.copyfileobj(source, copy)
    return target / Path(member).name


def unpacked(archive: Path) -> Path:
    """The folder in the cache that holds the files of a tar archive."""
    target = cache_folder() / _fingerprint(archive)
    if not target.exists():
        with _named(archive), _draft(target) as draft, tarfile.open(archive, "r|*") as stream:
            _unpack(stream, draft, archive)
    return target


def cache_folder() -> Path:
    """Where archives are unpacked: ``$XDG_CACHE_HOME/fedmllm/archives``."""
    return folders.cache_folder("archives")


def _unpack(stream: tarfile.TarFile, folder: Path, archive: Path) -> None:
    total, limit = 0, max(SMALL, MAX_RATIO * archive.stat().st_size)
    for count, member in enumerate(stream):
        if member.isdir():
            continue
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise UserError(f"{archive} holds the path {member.name!r}, which leads outside it")
        if not member.isreg():
            raise UserError(f"{archive}: {member.name!r} is a link or a device, not a file")
        total += member.size
        if count >= MAX_FILES or total > min(limit, MAX_TOTAL):
            raise UserError(f"{archive} unpacks to more than is plausible: unpack it yourself")
        target = folder.joinpath(*path.parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        source = stream.extractfile(member)
        assert source is not None  # it is a regular file
        with source, open(target, "wb") as copy:
            shutil.copyfileobj(source, copy)


@contextmanager
def _draft(target: Path) -> Iterator[Path]:
    """A new folder that becomes `target` by one rename, or vanishes."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=".draft-"))
    except OSError as error:
        raise UserError(
            f"the cache folder {target.parent} cannot be written ({error.strerror}): set "
            "XDG_CACHE_HOME to a folder that can, or unpack the archive yourself"
        ) from error
    try:
        yield draft
        try:
            draft.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was quicker: its copy is as good
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def _named(archive: Path, member: str = "") -> Iterator[None]:
    """What is wrong with an archive becomes a `UserError` that names it."""
    name = archive / member if member else archive
    try:
        yield
    except KeyError:
        raise UserError(f"{name} does not exist in the archive") from None
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or name} does not exist") from error
    except _BROKEN as error:
        raise UserError(f"{name} cannot be read, the archive may be damaged ({error})") from error


def _check_size(archive: Path, info: zipfile.ZipInfo, most: int) -> None:
    large = info.file_size > SMALL and info.file_size > MAX_RATIO * info.compress_size
    if info.file_size > most or large:
        raise UserError(
            f"{archive / info.filename} unpacks to {info.file_size:,} bytes, which is not plausible"
        )
    if stat.S_ISLNK(info.external_attr >> 16):
        raise UserError(f"{archive / info.filename} is a link, not a file")


def _zip(archive: Path) -> zipfile.ZipFile:
    facts = archive.stat()
    return _open_zip(archive, facts.st_size, facts.st_mtime_ns, os.getpid())


@lru_cache(maxsize=8)
def _open_zip(archive: Path, size: int, time: int, process: int) -> zipfile.ZipFile:
    """One handle per process: a forked one would share the file's position with its parent."""
    return zipfile.ZipFile(archive)


def _fingerprint(archive: Path) -> str:
    """Names the content of an archive without reading it all."""
    with _named(archive):
        facts = archive.stat()
        with open(archive, "rb") as file:
            ends = _end(file, 0) + _end(file, max(0, facts.st_size - 2**16))
    return _digest(f"{facts.st_size} {facts.st_mtime_ns} ".encode() + ends)


def _end(file: IO[bytes], start: int) -> bytes:
    file.seek(start)
    return file.read(2**16)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:24]
