"""Rows of an owner's table with the place they came from, and what is wrong with them.

`json_rows`, `jsonl_rows` and `tsv_rows` yield `Row`s; `read_samples` turns them into samples and
collects every problem in a `Report`, so that a file is mended in one go and not line by line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedmllm.data.files import Found
from fedmllm.data.own import is_unicode, kind_words
from fedmllm.data.sample import ImageSource, Sample
from fedmllm.errors import UserError, problem_list, unknown

MISSING_IMAGES = ("error", "drop")


class RowError(Exception):
    """What is wrong with one row."""


class MissingImageError(RowError):
    """The row's image is not there."""


class LeftOutError(Exception):
    """Why a row of the owners' own files is left out, which is no mistake of the user's."""


@dataclass(frozen=True)
class Row:
    """One row. item: its place in a JSON list, of which several may stand in one line."""

    fields: Mapping[str, Any]
    file: str
    line: int
    item: int | None = None


@dataclass(frozen=True)
class Problem:
    """What is wrong, and where: file, line from 1, place in a JSON list from 1, if known."""

    what: str
    file: str = ""
    line: int | None = None
    item: int | None = None

    def __str__(self) -> str:
        line = f", line {self.line}" if self.line else ""
        item = f", item {self.item}" if self.item else ""
        return f"{self.file}{line}{item}: {self.what}" if self.file else self.what


@dataclass
class Report:
    """Problems and remarks found while reading. missing_images: ``error`` or ``drop`` such rows.

    notes: what the owners' files are known for (repeated or empty rows), which no one need mend.
    places: where each image was named first, for those who look at images later.
    samples: where each sample id stood last.
    rows: rows read in all, left-out ones too.
    """

    missing_images: str = "error"
    problems: list[Problem] = field(default_factory=list)
    notes: list[Problem] = field(default_factory=list)
    places: dict[ImageSource, Row] = field(default_factory=dict)
    samples: dict[str, Row] = field(default_factory=dict)
    rows: int = 0

    def __post_init__(self) -> None:
        if self.missing_images not in MISSING_IMAGES:
            raise UserError(unknown("missing_images", self.missing_images, MISSING_IMAGES))

    def problem(self, row: Row, what: str) -> None:
        """Note what must be mended."""
        self.problems.append(Problem(what, row.file, row.line, row.item))

    def note(self, row: Row, what: str) -> None:
        """Note what is worth knowing."""
        self.notes.append(Problem(what, row.file, row.line, row.item))

    def stop(self) -> None:
        """Raise one `UserError` with all problems, if there are any."""
        if self.problems:
            raise UserError(problem_list(self.problems))


def read_samples(
    rows: Iterator[Row], make: Callable[[Row], Sample | None], report: Report
) -> list[Sample]:
    """The samples that `make` returns; None skips a row.

    A repeated row is left out; two different rows of one id are a problem.
    """
    found: dict[str, Sample] = {}
    lines: dict[str, Row] = {}
    for row in rows:
        report.rows += 1
        try:
            sample = make(row)
        except LeftOutError as error:
            report.note(row, f"{error}: left out")
        except MissingImageError as error:
            (report.note if report.missing_images == "drop" else report.problem)(row, str(error))
        except RowError as error:
            report.problem(row, str(error))
        else:
            if sample is None:
                continue
            first = found.setdefault(sample.id, sample)
            if first is not sample:
                _repeated(row, lines[sample.id], report, same=first == sample)
                continue
            lines[sample.id] = report.samples[sample.id] = row
            if sample.image is not None:
                report.places.setdefault(sample.image, row)
    return list(found.values())


def check_leak(train: list[Sample], test: list[Sample], report: Report) -> None:
    """No test sample may be a training sample."""
    shared = sorted({sample.id for sample in train} & {sample.id for sample in test})
    if shared:
        more = f"; so are {len(shared) - 1} more" if len(shared) > 1 else ""
        row = report.samples[shared[0]]
        report.problem(row, f"test sample {shared[0]} is a training sample too{more}")


# -- fields of a row ---------------------------------------------------------------------------


def text_of(row: Row, name: str, *, numbers: bool = False) -> str:
    """A text field, stripped, inner white space to single spaces; it may be empty.

    numbers: a JSON number is read as its digits (``4`` is ``"4"``).
    """
    value = _value(row, name)
    if numbers and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise RowError(f"{name} is {value}, which is no number")
        value = str(value)
    if not isinstance(value, str):
        raise RowError(f"{name} must be a text, not {kind_words(value)}")
    if not is_unicode(value):
        raise RowError(f"{name} holds a broken character (a lone surrogate)")
    return " ".join(value.split())


def question_of(row: Row, question: str, answer: str) -> tuple[str, str]:
    """The question and its answer; the answer may be a number. An empty one leaves the row out."""
    found = text_of(row, question), text_of(row, answer, numbers=True)
    for name, text in zip((question, answer), found, strict=True):
        if not text:
            raise LeftOutError(f"{name} is empty")
    return found


def id_of(row: Row, name: str) -> str:
    """An id: a text or a whole number, not empty."""
    if isinstance(_value(row, name), float):
        raise RowError(f"{name} must be a text or a whole number")
    found = text_of(row, name, numbers=True)
    if not found:
        raise RowError(f"{name} is empty")
    return found


def choice_of(row: Row, name: str, allowed: tuple[str, ...]) -> str:
    """A text field out of `allowed`, whatever its letter case and stray spaces."""
    found = text_of(row, name).lower()
    if found not in allowed:
        raise RowError(unknown(name, found, allowed))
    return found


def image_of(row: Row, name: str, folder: Found) -> ImageSource:
    """The image that a row names, below `folder`; the folder's own name may lead the path."""
    given = text_of(row, name)
    parts = given.split("/")
    if not given or ".." in parts or given.startswith("/") or "\0" in given:
        raise RowError(f"{name} {given!r} is not a path inside the data")
    own = folder.path.rpartition("/")[2] or folder.tree.shown.stem
    inner = "/".join(parts[1:] if len(parts) > 1 and parts[0] == own else parts)
    path = f"{folder.path}/{inner}" if folder.path else inner
    if not folder.tree.has(path):
        raise MissingImageError(f"image {folder.tree.shown / path} does not exist")
    return folder.tree.image(path)


def _value(row: Row, name: str) -> Any:
    if name not in row.fields:
        raise RowError(f"field {name!r} is missing")
    return row.fields[name]


def _repeated(row: Row, first: Row, report: Report, *, same: bool) -> None:
    where = f"item {first.item}" if first.item else f"line {first.line}"
    if same:
        report.note(row, f"repeats {where}: left out")
    else:
        report.problem(row, f"has the id of {where} and another content: ids must be unique")


# -- tables --------------------------------------------------------------------------------------


def json_rows(table: Found, report: Report) -> Iterator[Row]:
    """The objects of a JSON list. A file that is not JSON ends at the error, which is reported."""
    text = _utf8(table, report)
    decoder, at, line, item = json.JSONDecoder(), 0, 1, 0
    problem = None if text is None else _begins(text, "[", "a JSON list")
    if text is None or problem:
        return _stop(table, report, 1, problem)
    at = text.index("[") + 1
    line += text.count("\n", 0, at)
    while True:
        start = _skip(text, at)
        line, at = line + text.count("\n", at, start), start
        if item == 0 and text[at : at + 1] == "]":
            return _stop(table, report, line, "the list is empty")
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            return _stop(table, report, *_json_problem(error, text, at, line))
        item += 1
        row = Row(value, table.name, line, item)
        if isinstance(value, dict):
            yield row
        else:
            report.problem(row, f"must be an object, not {kind_words(value)}")
        after = _skip(text, end)
        line, at = line + text.count("\n", at, after), after + 1
        sign = text[after : after + 1]
        if sign == "]":
            rest = text[after + 1 :].strip()
            return _stop(table, report, line, "text stands after the list" if rest else None)
        if sign != ",":
            return _stop(table, report, line, "not JSON: a comma or ] must follow an item")


def jsonl_rows(table: Found, report: Report) -> Iterator[Row]:
    """The objects of a JSON Lines file; empty lines are skipped."""
    text = _utf8(table, report)
    empty = True
    for line, content in enumerate((text or "").split("\n"), 1):
        if not content.strip():
            continue
        empty = False
        try:
            value = json.loads(content)
        except (ValueError, RecursionError) as error:
            what = getattr(error, "msg", None) or str(error)
            report.problem(Row({}, table.name, line), f"not JSON: {what}")
            continue
        row = Row(value, table.name, line)
        if isinstance(value, dict):
            yield row
        else:
            report.problem(row, f"must be an object, not {kind_words(value)}")
    if empty and text is not None:
        report.problem(Row({}, table.name, 1), "the file is empty")


def tsv_rows(table: Found, report: Report, columns: tuple[str, ...]) -> Iterator[Row]:
    """The rows of a tab-separated file with a header that names `columns` and perhaps others.

    Quotes are ordinary characters, and only line feeds end a line: a tweet may hold one quote, or
    a Unicode line separator. A line that is not UTF-8 is read as Windows-1252 and noted.
    """
    lines = table.tree.read(table.path).removeprefix(b"\xef\xbb\xbf").split(b"\n")
    header = lines[0].removesuffix(b"\r").decode(errors="replace").split("\t")
    absent = [name for name in columns if name not in header]
    if absent:
        what = f"the header lacks {', '.join(absent)}: it must be the owners' tab-separated table"
        return _stop(table, report, 1, what)
    count = 0
    for number, raw in enumerate(lines[1:], 2):
        raw = raw.removesuffix(b"\r")
        if not raw.strip():
            continue
        count += 1
        row = Row({}, table.name, number)
        cells = _cells(raw, row, report)
        if len(cells) != len(header):
            report.problem(row, f"has {len(cells)} columns, the header has {len(header)}")
            continue
        yield Row(dict(zip(header, cells, strict=True)), table.name, number)
    if not count:
        _stop(table, report, 1, "the table has no rows")


def _cells(raw: bytes, row: Row, report: Report) -> list[str]:
    try:
        return raw.decode().split("\t")
    except UnicodeDecodeError:
        report.note(row, "is not UTF-8: read as Windows-1252")
        return raw.decode("cp1252", errors="replace").split("\t")


def _utf8(table: Found, report: Report) -> str | None:
    raw = table.tree.read(table.path)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        report.problem(Row({}, table.name, line), f"is not UTF-8 text ({error.reason})")
        return None


def _begins(text: str, sign: str, what: str) -> str | None:
    start = text.lstrip()
    if not start:
        return f"the file is empty: it must hold {what}"
    return None if start.startswith(sign) else f"must hold {what}"


def _skip(text: str, at: int) -> int:
    """The place of the next character that is no white space of JSON's."""
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _json_problem(error: Exception, text: str, at: int, line: int) -> tuple[int, str]:
    if isinstance(error, json.JSONDecodeError):
        return line + text.count("\n", at, error.pos), f"not JSON: {error.msg}"
    return line, f"JSON that cannot be read: {error}"


def _stop(table: Found, report: Report, line: int, what: str | None) -> None:
    if what:
        report.problem(Row({}, table.name, line), what)
