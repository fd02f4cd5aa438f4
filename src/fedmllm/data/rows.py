"""Rows with named columns become a dataset: what `table` and `hf-datasets` share.

| column | what it holds |
|---|---|
| `id` | a text or a number, unique within its party (without parties: within the data) |
| `image` | a path inside the data folder, or nothing |
| `text` | the sample's text, or nothing |
| `question` | task ``open``: the question, which is never withheld |
| `answer` | the answer to learn; task ``choice``: a class, or its number from 0 |
| `options` | task ``open``: this row's own options; the answer is one of them, or its letter |
| `party` | who holds the row |
| `split` | ``train``, ``test``, or a development set's name, whose rows are left out |

Each name can be changed by the option ``NAME_column``; an empty one means that there is none.
Only `answer` must be there, `question` for open tasks, and one of `image` and `text` for choice.

Parties (option `parties`): ``column`` names them, each of the ``files`` is one, or ``none``: the
samples are one pool, to be split by a partition; ``one:NAME``: all of them are the party NAME's.
``auto`` takes the first of the first three that applies; one file without the column is a pool.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import Any

from fedmllm.data.dataset import Dataset
from fedmllm.data.own import MARKER, ItemError, kind_words, party_problem, unicode_text
from fedmllm.data.sample import ImageSource, Sample, Task
from fedmllm.errors import UserError, problem_list, unknown

ROLES = ("id", "image", "text", "question", "answer", "options", "party", "split")
COLUMN_OPTIONS: dict[str, object] = {f"{role}_column": role for role in ROLES}
PARTIES = ("auto", "column", "files", "none")
ONE = "one:"
DEVELOPMENT = ("dev", "val", "valid", "validate", "validation")


@dataclass(frozen=True)
class Row:
    """One row. where: file and line. name: its id unless a column has one; blind to order."""

    where: str
    name: str
    cells: Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """One file or split. name: also the party's, where each is a party."""

    name: str
    where: str
    header: Sequence[str]
    rows: Sequence[Row]
    test: bool = False


@dataclass(frozen=True)
class Reader:
    """How rows are read. image: (cell, row) -> the image; raises `ItemError`. trained, tested:
    whether there must be training and test rows."""

    task: Task
    columns: Mapping[str, str]
    image: Callable[[Any, Row], ImageSource]
    parties: str = "auto"
    trained: bool = True
    tested: bool = True


def columns_of(options: Mapping[str, Any]) -> dict[str, str]:
    """role -> column from the ``…_column`` options; unknown options raise `UserError`."""
    for option in options:
        if option not in COLUMN_OPTIONS:
            raise UserError(unknown("option", option, COLUMN_OPTIONS))
    given = {**COLUMN_OPTIONS, **options}
    return {role: str(given[f"{role}_column"]) for role in ROLES}


@dataclass
class _Pools:
    """Samples by party and of the test; the problems so far; where each id was seen."""

    train: dict[str, list[Sample]] = field(default_factory=dict)
    test: list[Sample] = field(default_factory=list)
    seen: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def dataset_of(tables: Sequence[Table], reader: Reader, problems: Sequence[str] = ()) -> Dataset:
    """The dataset that these tables hold. problems: what was wrong already in reading them.

    Raises `UserError` for a wrong way of naming parties, and one that lists all problems.
    """
    if reader.parties not in PARTIES and not reader.parties.startswith(ONE):
        raise UserError(unknown("way of parties", reader.parties, (*PARTIES, f"{ONE}NAME")))
    pools = _Pools(problems=list(problems))
    ways = _way_of_parties(tables, reader)
    for table in tables:
        found = _columns(table, reader, ways, pools.problems)
        if found is not None:
            for row in table.rows:
                _add(row, table, found, ways, reader, pools)
    _check_whole(pools, reader)
    if pools.problems:
        raise UserError(problem_list(pools.problems))
    parties = {name: pools.train[name] for name in sorted(pools.train)} if ways != "none" else {}
    train = [sample for name in sorted(pools.train) for sample in pools.train[name]]
    return Dataset(task=reader.task, train=train, test=pools.test, parties=parties)


def _way_of_parties(tables: Sequence[Table], reader: Reader) -> str:
    if reader.parties != "auto":
        return reader.parties
    trained = [table for table in tables if not table.test]
    if any(reader.columns["party"] in table.header for table in trained):
        return "column"
    return "files" if len(trained) > 1 else "none"


def _columns(table: Table, reader: Reader, ways: str, problems: list[str]) -> dict[str, str] | None:
    """role -> column of this table; what is wrong with the header is added to `problems`."""
    named = {role: name for role, name in reader.columns.items() if name}
    found = {role: name for role, name in named.items() if name in table.header}
    wrong = list(_header_problems(table, reader, found))
    if ways == "column" and not table.test and "party" not in found:
        wrong.append(f"no column {reader.columns['party']!r} that says whose a row is")
    if ways != "column" and not ways.startswith(ONE):
        found.pop("party", None)
    problems += [f"{table.where}: {line}" for line in wrong]
    return None if wrong else found


def _header_problems(table: Table, reader: Reader, found: Mapping[str, str]) -> list[str]:
    wrong = []
    unneeded = ("id", "party", "split") if table.test else ()
    for role, name in reader.columns.items():
        near = [h for h in table.header if name and h.strip().casefold() == name.casefold()]
        if role not in found and near:
            wrong.append(f"column {near[0]!r}: rename it {name!r} or set data.{role}_column")
        elif role not in found and name not in ("", role) and role not in unneeded:
            wrong.append(f"no column {name!r} (data.{role}_column): it has {_listed(table)}")
    choice = reader.task.kind == "choice"
    needed = ["answer"] if choice else ["answer", "question"]
    for role in needed:
        if role not in found and not wrong:
            wrong.append(f"no column {role!r}: it has {_listed(table)}; set data.{role}_column")
    if choice and not wrong and not {"image", "text"} & set(found):
        wrong.append(f"neither a column 'image' nor 'text': it has {_listed(table)}")
    for role in ("question", "options"):
        if choice and role in found:
            wrong.append(
                f"column {found[role]!r}: task 'choice' asks every sample the same (data.question, "
                f"data.classes); use task 'open', or set data.{role}_column to ''"
            )
    return wrong


def _listed(table: Table) -> str:
    return ", ".join(map(repr, table.header[:12])) + (", …" if len(table.header) > 12 else "")


def _add(
    row: Row, table: Table, columns: Mapping[str, str], ways: str, reader: Reader, pools: _Pools
) -> None:
    """Read one row into its pool; what is wrong is added to the problems."""
    try:
        split = _split(row, table, columns)
        if split == "dev":
            return
        party = _party(row, table, columns, ways) if split == "train" else "test"
        prefix = "" if party == "" else f"{party}/"
        sample = _sample(row, columns, reader, prefix)
        _check_id(sample.id, row, pools, split)
    except ItemError as error:
        pools.problems.append(f"{row.where}: {error}")
        return
    (pools.test if split == "test" else pools.train.setdefault(party, [])).append(sample)


def _check_id(name: str, row: Row, pools: _Pools, split: str) -> None:
    if name in pools.seen:
        raise ItemError(f"its id is that of {pools.seen[name]}: ids must be unique")
    pools.seen[name] = row.where


def _split(row: Row, table: Table, columns: Mapping[str, str]) -> str:
    """``train``, ``test`` or ``dev``."""
    if "split" not in columns:
        return "test" if table.test else "train"
    given = (_text(row, columns, "split") or "").casefold()
    if given in DEVELOPMENT:
        return "dev"
    if given not in ("train", "test"):
        raise ItemError(
            "its split is empty" if not given else unknown("split", given, ("train", "test", "dev"))
        )
    return given


def _party(row: Row, table: Table, columns: Mapping[str, str], ways: str) -> str:
    if ways == "none":
        return ""
    name = _text(row, columns, "party") or ""
    if ways.startswith(ONE):
        only = ways.removeprefix(ONE)
        if name not in ("", only):
            raise ItemError(f"its party is {name!r}, and all of this is to be {only!r}'s")
        name = only
    elif ways == "files":
        name = table.name
    if not name:
        raise ItemError("its party is empty")
    problem = party_problem(name)
    if problem:
        raise ItemError(problem)
    return name


def _sample(row: Row, columns: Mapping[str, str], reader: Reader, prefix: str) -> Sample:
    name = prefix + (_text(row, columns, "id") or row.name)
    text = _text(row, columns, "text")
    given = _cell(row, columns, "image")
    image = None if given is None else reader.image(given, row)
    if reader.task.kind == "choice":
        label = _label(row, columns, reader.task.classes)
        if text is None and image is None:
            raise ItemError("has neither an image nor a text")
        return Sample(name, reader.task.classes[label], text=text, image=image, label=label)
    question, answer = _asked(row, columns)
    return Sample(name, answer, question, text, image)


def _asked(row: Row, columns: Mapping[str, str]) -> tuple[str, str]:
    """Question and answer of an open row, with its own options if it has any."""
    question, answer = _text(row, columns, "question"), _text(row, columns, "answer")
    if question is None:
        raise ItemError("its question is empty")
    if answer is None:
        raise ItemError("its answer is empty")
    options = _options(row, columns)
    if not options:
        return question, answer
    lettered = [f"({letter}) {o}" for letter, o in zip(ascii_uppercase, options, strict=False)]
    lines = [question, "Options:", *lettered, "Answer with the letter of the option."]
    return "\n".join(lines), lettered[_option(answer, options)]


def _option(answer: str, options: Sequence[str]) -> int:
    """Its place: an option word for word, else a letter."""
    if answer in options:
        return options.index(answer)
    letters = ascii_uppercase[: len(options)]
    bare = answer.strip("() ").upper()
    if len(bare) == 1 and bare in letters:
        return letters.index(bare)
    raise ItemError(f"its answer {answer!r} is none of its options: {', '.join(options)}")


def _options(row: Row, columns: Mapping[str, str]) -> list[str]:
    """The row's options: a list, or a text that is a JSON list or is cut at ``|``."""
    given = _cell(row, columns, "options")
    if given is None:
        return []
    if isinstance(given, str):
        given = _listed_text(given)
    if not isinstance(given, list) or not all(isinstance(o, str | int | float) for o in given):
        raise ItemError(f"options must be a list of texts, not {kind_words(given)}")
    options = [unicode_text(str(o).strip(), "options") for o in given]
    if not 2 <= len(options) <= 26 or len(set(options)) < len(options) or not all(options):
        raise ItemError(f"options are {options}: give 2 to 26 different ones")
    return options


def _listed_text(given: str) -> Any:
    if given.lstrip().startswith("["):
        try:
            return json.loads(given)
        except (ValueError, RecursionError):
            raise ItemError(f"options {given!r} begin as a JSON list but are none") from None
    return given.split("|")


def _label(row: Row, columns: Mapping[str, str], classes: Sequence[str]) -> int:
    """The class index: by name, or by number where no class has that name."""
    answer = _text(row, columns, "answer")
    if answer is None:
        raise ItemError("its answer is empty")
    if answer in classes:
        return classes.index(answer)
    if answer.isascii() and answer.isdigit() and int(answer[:6]) < len(classes):
        return int(answer[:6])
    raise ItemError(unknown("answer", answer, classes))


def _cell(row: Row, columns: Mapping[str, str], role: str) -> Any:
    """What stands there; None for nothing, which pandas writes as NaN."""
    value = row.cells.get(columns[role]) if role in columns else None
    return None if value == "" or value != value else value


def _text(row: Row, columns: Mapping[str, str], role: str) -> str | None:
    """A cell as text without white space around it; None if there is nothing."""
    value = _cell(row, columns, role)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ItemError(f"{role} must be a text or a number, not {kind_words(value)}")
    text = unicode_text(str(value).strip(), role)
    if MARKER in text:
        raise ItemError(f"{role} holds {MARKER}, which stands for the image in a prompt")
    return text or None


def _check_whole(pools: _Pools, reader: Reader) -> None:
    """What no single row shows: there is something to learn and to test."""
    if pools.problems:
        return
    if not pools.train and reader.trained:
        pools.problems.append("no training rows")
    if not pools.test and reader.tested:
        pools.problems.append("no test rows: give a test file, or a split column with 'test'")
    folded: dict[str, str] = {}
    for name in pools.train:
        other = folded.setdefault(name.casefold(), name)
        if other != name:
            pools.problems.append(f"parties {other!r} and {name!r} differ in case only")
