"""A user's own data in a Hugging Face `datasets` folder, as `save_to_disk` writes it.

    root/dataset_dict.json              {"splits": ["train", "test"]}; or one dataset without it
    root/train/state.json               the names of the Arrow files
    root/train/dataset_info.json        the features
    root/train/data-00000-of-00001.arrow

The Arrow files are read by pyarrow alone: the package `datasets` is not needed, and no code of
the folder's maker runs. The files are mapped into memory, so an image is read when it is opened.
An image column holds bytes, as `save_to_disk` embeds them, or a path inside root. A `ClassLabel`
column is read by its names, which are also the classes of a choice task unless others are given.

Splits stand for the files of `fedmllm.data.rows`, which see for columns and parties; the split
called ``test`` is the test. Without a column `id` a row's id is its number from 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fedmllm.data import images
from fedmllm.data.dataset import Dataset, DatasetSpec
from fedmllm.data.own import QUESTION, ItemError, folder_of, kind_words, task_of, unicode_text
from fedmllm.data.rows import (
    COLUMN_OPTIONS,
    DEVELOPMENT,
    Reader,
    Row,
    Table,
    columns_of,
    dataset_of,
)
from fedmllm.data.sample import ImageSource
from fedmllm.errors import UserError, needs_package, unknown

NONE = "none"
_SAVED = "save it by dataset.save_to_disk(FOLDER)"


def load(
    *,
    root: str | Path = "",
    test: str = "test",
    parties: str = "auto",
    task: str = "open",
    classes: Sequence[str] = (),
    question: str = QUESTION,
    metric: str = "",
    verify: bool = True,
    **columns: object,
) -> Dataset:
    """Load a saved folder.

    root: the folder. test: the split of test samples; ``none``: there need be none, and one that is
    called ``test`` is left out. parties, columns: see `fedmllm.data.rows`.
    task, classes, question, metric: as for conversations. verify: read every image's header now.
    Raises one `UserError` that lists all problems, with split and row.
    """
    folder = folder_of(root, dataset="hf-datasets", what="a dataset saved by save_to_disk")
    named = columns_of(columns)
    left_out = (*DEVELOPMENT, *(["test"] if test == NONE else []))
    found = [_Split(part, folder) for part in _parts(folder, left_out)]
    if task == "choice" and not classes:
        classes = next(
            (s.classes(named["answer"]) for s in found if s.classes(named["answer"])), ()
        )
    asked = task_of("hf-datasets", task, classes=tuple(classes), question=question, metric=metric)
    tables = [split.table(named["image"], split.name == test) for split in found]
    image = partial(_image, folder, verify)
    reader = Reader(asked, named, image, parties, tested=test != NONE)
    return dataset_of(tables, reader)


def _image(folder: Path, verify: bool, given: Any, row: Row) -> ImageSource:
    if isinstance(given, images.EncodedImage):
        if verify and (problem := given.problem()):
            raise ItemError(problem)
        return given
    if not isinstance(given, str):
        raise ItemError(f"image must be an image or a path, not {kind_words(given)}")
    problem = images.image_problem(unicode_text(given, "image"), folder, verify=verify)
    if problem:
        raise ItemError(problem)
    return images.ImageFile(given, folder)


def _parts(root: Path, left_out: Sequence[str]) -> list[Path]:
    """The folders of the splits that are read, in order of their names."""
    index = root / "dataset_dict.json"
    if not index.exists():
        return [root]
    names = _json(index).get("splits")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{index} has no list of splits: {_SAVED}")
    wrong = [name for name in names if Path(name).name != name]
    if wrong:
        raise UserError(f"{index}: a split cannot be called {wrong[0]!r}")
    kept = [root / name for name in sorted(names) if name not in left_out]
    if not kept:
        raise UserError(unknown("split", ", ".join(names) or "(none)", ("train", "test")))
    return kept


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{file.parent} is no saved dataset, {file.name} is not there: {_SAVED}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold an object, not {kind_words(content)}")
    return content


class _Split:
    """One saved dataset: its Arrow table, mapped and not read, and its features."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.name, self.folder = folder.name if folder != root else "train", folder
        features = _json(folder / "dataset_info.json").get("features")
        self.features = features if isinstance(features, dict) else {}
        self.arrow = _arrow(folder)

    def classes(self, column: str) -> tuple[str, ...]:
        """The names of a ClassLabel column, or nothing."""
        feature = self.features.get(column)
        names = feature.get("names") if isinstance(feature, dict) else None
        return tuple(map(str, names)) if isinstance(names, list) else ()

    def table(self, image: str, test: bool) -> Table:
        header = self.arrow.column_names
        return Table(self.name, str(self.folder), header, list(self._rows(image)), test)

    def _rows(self, image: str) -> Iterator[Row]:
        columns = {
            name: list(self._images(name)) if name == image else self._cells(name)
            for name in self.arrow.column_names
            if name == image or not _is_binary(self.arrow.schema.field(name).type)
        }
        for i in range(self.arrow.num_rows):
            cells = {name: values[i] for name, values in columns.items()}
            yield Row(f"{self.folder}, row {i}", str(i), cells)

    def _cells(self, name: str) -> list[Any]:
        values = self.arrow.column(name).to_pylist()
        names = self.classes(name)
        if not names:
            return values
        return [names[v] if isinstance(v, int) and 0 <= v < len(names) else v for v in values]

    def _images(self, name: str) -> Iterator[Any]:
        """An `EncodedImage` where there are bytes, else the path or None; reads no bytes."""
        import pyarrow as pa

        column = self.arrow.column(name)
        kind = column.type
        if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
            if _is_binary(kind):
                there = column.is_valid().to_pylist()
                yield from (self._image(column, i) if t else None for i, t in enumerate(there))
            else:
                yield from column.to_pylist()
            return
        fields = column.flatten()  # no copy
        data = fields[kind.get_field_index("bytes")]
        there = data.is_valid().to_pylist()
        paths = [None] * len(there)
        if kind.get_field_index("path") >= 0:
            paths = fields[kind.get_field_index("path")].to_pylist()
        for i, (held, path) in enumerate(zip(there, paths, strict=True)):
            yield self._image(data, i) if held else path

    def _image(self, column: Any, i: int) -> images.EncodedImage:
        import pyarrow as pa

        def stream() -> Any:
            return pa.BufferReader(column[i].as_buffer())  # a view of the mapped file, no copy

        return images.EncodedImage(Path(f"{self.folder}, row {i}"), stream)


def _is_binary(kind: Any) -> bool:
    import pyarrow as pa

    struct = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    return struct or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _arrow(folder: Path) -> Any:
    """The Arrow table of a split, its files mapped into memory."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise UserError(
            needs_package("dataset 'hf-datasets'", "the package pyarrow", "datasets")
        ) from error
    listed = _json(folder / "state.json").get("_data_files")
    files = listed if isinstance(listed, list) else []
    names = [file.get("filename") if isinstance(file, Mapping) else None for file in files]
    if not names or not all(isinstance(n, str) and Path(n).name == n for n in names):
        raise UserError(f"{folder / 'state.json'} names no data files: {_SAVED}")
    parts = []
    for name in names:
        try:
            with pa.memory_map(str(folder / str(name))) as mapped:
                part = pa.ipc.open_stream(mapped).read_all()
            part.validate(full=True)  # offsets beyond the file would end the process, not raise
            parts.append(part)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UserError(f"{folder / str(name)} cannot be read as Arrow: {error}") from error
    try:
        return pa.concat_tables(parts)
    except pa.ArrowException as error:
        raise UserError(f"{folder}: its data files do not fit together: {error}") from error


SPEC = DatasetSpec(
    summary="your own data: a Hugging Face datasets folder (save_to_disk)",
    load=load,
    options={
        "root": "",
        "test": "test",
        "parties": "auto",
        "task": "open",
        "classes": (),
        "question": QUESTION,
        "metric": "",
        "verify": True,
        **COLUMN_OPTIONS,
    },
    source="your own files",
    licence="yours",
    ready=True,
)
