"""An owner's files, wherever they lie: in a folder, in an archive, one level further down.

`open_files(root)` takes the unpacked folder, a folder that holds the downloads, or one archive.
`Files.table` finds a table and `Files.folder` an image folder by name, the nearest to the top
first, so that mirrors which put them into another folder are read too. Archives inside are looked
into only if what is asked for does not lie unpacked. The user's folder is never written to.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

from fedmllm.data import archives
from fedmllm.data.images import ArchiveImage, ImageFile
from fedmllm.data.sample import ImageSource
from fedmllm.errors import UserError

DEPTH = 3
"""Levels of folders below the top that are searched."""
WIDTH = 10_000
"""Folders of one level; a wider one (somebody's home, given by mistake) is not searched."""


class AbsentError(UserError):
    """A file that is needed is not there."""


class Listing(NamedTuple):
    """Names in one folder of a tree, sorted."""

    files: frozenset[str]
    folders: tuple[str, ...]


@dataclass(frozen=True)
class Tree:
    """A folder or a zip archive. root: where it lies; shown: how it is called to a person (a tar
    archive lies unpacked in the cache). listing: of a folder inside, ``""`` is the top."""

    root: Path
    shown: Path
    is_zip: bool
    listing: Callable[[str], Listing]

    def read(self, path: str) -> bytes:
        """The bytes of a file inside. Raises `UserError`."""
        if self.is_zip:
            return archives.member_bytes(self.root, path)
        try:
            return (self.root / path).read_bytes()
        except OSError as error:
            raise UserError(f"{self.root / path} cannot be read: {error}") from error

    def image(self, path: str) -> ImageSource:
        """An image inside, unread."""
        return ArchiveImage(path, self.root) if self.is_zip else ImageFile(path, self.root)

    def has(self, path: str) -> bool:
        """Whether a file is there, without touching it."""
        folder, _, name = path.rpartition("/")
        return name in self.listing(folder).files


class Found(NamedTuple):
    """A file or folder: the tree that it lies in, and its path there."""

    tree: Tree
    path: str

    @property
    def name(self) -> str:
        """The path for a person."""
        return str(self.tree.shown / self.path)


@dataclass
class Files:
    """What lies at a root. archives: names of archives inside it that may hold more."""

    root: Path
    dataset: str
    archives: tuple[str, ...] = ()
    _trees: list[Tree] = field(default_factory=list)
    _inside: list[Found] | None = None

    def table(self, *names: str) -> Found:
        """The file of one of these names. Raises `AbsentError` if there is none."""
        found = self._find(names, folders=False)
        if found is None:
            raise AbsentError(f"no {' or '.join(names)} in {self.root}: {self._hint()}")
        return found

    def folder(self, *names: str) -> Found:
        """The folder of one of these names; an archive of that name may hold its files flat."""
        found = self._find(names, folders=True)
        if found is None:
            raise AbsentError(f"no folder {' or '.join(names)} in {self.root}: {self._hint()}")
        return found

    def trees(self) -> Iterator[Tree]:
        """The root, then the archives inside it, each opened when it is reached."""
        at = 0
        while at < len(self._trees) or self._open_next():
            yield self._trees[at]
            at += 1

    def _find(self, names: tuple[str, ...], *, folders: bool) -> Found | None:
        for tree in self.trees():
            for name in names:
                path = nearest(tree, name, folders=folders)
                if path is not None:
                    return Found(tree, path)
            if folders and at_top(tree, names):
                return Found(tree, "")
        return None

    def _open_next(self) -> bool:
        """Open one more archive that lies in an open tree; False if there is none."""
        if self._inside is None:
            self._inside = list(_archives_in(self._trees[0], self.archives))
        if not self._inside:
            return False
        tree, path = self._inside.pop(0)
        inner = tree.root / path
        if tree.is_zip:
            inner = archives.member_as_file(tree.root, path)
        opened = _tree(inner, tree.shown / path)
        self._trees.append(opened)
        self._inside += _archives_in(opened, self.archives) if not opened.is_zip else []
        return True

    def _hint(self) -> str:
        top = self._trees[0].listing("")
        there = sorted([f"{name}/" for name in top.folders] + sorted(top.files))
        holds = ", ".join(there[:6]) + (", …" if len(there) > 6 else "") if there else "nothing"
        mirror = "; parquet mirrors are not read" if _holds_parquet(self._trees[0]) else ""
        return f"it holds {holds}{mirror}. `fedmllm data info {self.dataset}` says what to get"


def open_files(
    root: str | Path, dataset: str, *, archives: tuple[str, ...] = (), option: str = "data.root"
) -> Files:
    """The files at `root`: a folder or an archive. option: the setting to name in errors."""
    if not root:
        raise UserError(
            f"dataset {dataset!r} needs {option}: the folder or the archive that you downloaded; "
            f"`fedmllm data info {dataset}` says where to get it"
        )
    path = Path(root)
    if not path.exists():
        raise UserError(f"{path} does not exist: check {option}")
    if path.suffix in (".json", ".jsonl", ".tsv"):  # the table itself: its folder is meant
        path = path.parent
    return Files(path, dataset, archives, [_tree(path, path)])


def nearest(tree: Tree, name: str, *, folders: bool = False) -> str | None:
    """The path of the file or folder of this name nearest the top, at most `DEPTH` levels down.

    Raises `UserError` if two lie equally near: which is meant cannot be told.
    """
    for level in _levels(tree):
        hits = []
        for folder in level:
            listing = tree.listing(folder)
            if name in (listing.folders if folders else listing.files):
                hits.append(_join(folder, name))
        if len(hits) > 1:
            raise UserError(
                f"{tree.shown} holds {name} twice, in {hits[0]} and {hits[1]}: "
                "give the folder that you mean"
            )
        if hits:
            return hits[0]
    return None


def _levels(tree: Tree) -> Iterator[list[str]]:
    """The folders of a tree, level by level."""
    level = [""]
    for _ in range(DEPTH + 1):
        if len(level) > WIDTH:
            return
        yield level
        level = [_join(folder, name) for folder in level for name in tree.listing(folder).folders]


def at_top(tree: Tree, names: tuple[str, ...]) -> bool:
    """Whether the tree is itself one of these folders: given as root, or zipped without it."""
    return tree.shown.name in names or (tree.is_zip and tree.shown.stem in names)


def _archives_in(tree: Tree, names: tuple[str, ...]) -> Iterator[Found]:
    """Archives of these names, in the order of the names."""
    for name in names:
        path = nearest(tree, name)
        if path is not None:
            yield Found(tree, path)


def _tree(path: Path, shown: Path) -> Tree:
    if path.is_dir():
        return Tree(path, shown, False, _folder_listing(path))
    kind = archives.kind_of(path)
    if kind == "zip":
        return Tree(path, shown, True, _zip_listing(path))
    if kind == "tar":
        folder = archives.unpacked(path)
        return Tree(folder, shown, False, _folder_listing(folder))
    raise UserError(f"{shown} is neither a folder nor a zip or tar archive, or it is damaged")


def _folder_listing(root: Path) -> Callable[[str], Listing]:
    @cache
    def listing(folder: str) -> Listing:
        files: list[str] = []
        folders: list[str] = []
        try:
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    kind = _kind(entry)
                    if kind is not None:
                        (folders if kind == "folder" else files).append(entry.name)
        except (OSError, ValueError):
            return Listing(frozenset(), ())
        return _listing(files, folders)

    return listing


def _kind(entry: os.DirEntry[str]) -> str | None:
    """``folder``, ``file``, or None for a link that leads nowhere, a pipe, a device."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else None
    except OSError:  # e.g. a link to itself
        return None


def _zip_listing(archive: Path) -> Callable[[str], Listing]:
    files: dict[str, set[str]] = {"": set()}
    folders: dict[str, set[str]] = {"": set()}
    for path in archives.zip_names(archive):
        parts = path.split("/")
        if "" in parts or ".." in parts:  # no folder could hold it under this name
            continue
        for depth in range(len(parts) - 1):
            parent = "/".join(parts[:depth])
            folders.setdefault(parent, set()).add(parts[depth])
        files.setdefault("/".join(parts[:-1]), set()).add(parts[-1])
    return lambda folder: _listing(files.get(folder, ()), folders.get(folder, ()))


def _listing(files: Iterable[str], folders: Iterable[str]) -> Listing:
    """Sorted, without what systems leave behind (``._x``, ``__MACOSX``, hidden folders)."""
    kept = tuple(n for n in sorted(folders) if not n.startswith(".") and n != "__MACOSX")
    return Listing(frozenset(n for n in files if not n.startswith("._")), kept)


def _holds_parquet(tree: Tree) -> bool:
    folders = [folder for level in _levels(tree) for folder in level]
    return any(n.endswith(".parquet") for folder in folders for n in tree.listing(folder).files)


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
