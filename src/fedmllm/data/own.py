"""What the loaders of a user's own data share: the task, the folder, and the checks of names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedmllm.data.sample import Task
from fedmllm.errors import UserError, unknown

QUESTION = "Which option is right{modality}?"
MARKER = "<image>"  # prompts.IMAGE; not imported, since prompts imports this package
METRICS = {"open": ("accuracy",), "choice": ("macro_f1", "auc")}
LONGEST_NAME = 100  # letters of a party: it names files and folders
_NO_FILE = set('/\\:*?"<>|')


class ItemError(Exception):
    """What is wrong with one item or row."""


def folder_of(root: str | Path, *, dataset: str, what: str) -> Path:
    """`root` as a folder that exists. what: says in the error what should lie in it."""
    if not root:
        raise UserError(f"dataset {dataset!r} needs data.root: the folder of {what}")
    if not Path(root).is_dir():
        raise UserError(f"data folder {root} does not exist or is not a folder: check data.root")
    return Path(root)


def task_of(name: str, kind: str, *, classes: tuple[str, ...], question: str, metric: str) -> Task:
    """The task that a user's options describe.

    kind: ``open`` or ``choice``. metric: of `METRICS`, or empty for the kind's first. Raises
    `UserError` for an unknown kind or metric, classes that are not 2 to 26 different names (a
    letter each), ``auc`` for more than two, or braces in the question.
    """
    if kind not in METRICS:
        raise UserError(unknown("task", kind, METRICS))
    chosen = metric or METRICS[kind][0]
    if chosen not in METRICS[kind]:
        raise UserError(unknown(f"metric of task {kind!r}", chosen, METRICS[kind]))
    if kind == "open":
        if classes:
            raise UserError("classes are given, but task is 'open': set task to 'choice'")
        return Task(name=name, kind=kind, metric=chosen)
    _check_classes(classes, chosen)
    rest = question.replace("{modality}", "")
    if "{" in rest or "}" in rest:
        raise UserError(f"question {question!r} may hold no braces but {{modality}}")
    return Task(name, kind, chosen, classes, question)


def _check_classes(classes: tuple[str, ...], metric: str) -> None:
    texts = all(isinstance(name, str) and name.strip() for name in classes)
    if not texts or not 2 <= len(classes) <= 26 or len(set(classes)) < len(classes):
        raise UserError(f"classes is {list(classes)}: task 'choice' needs 2 to 26 different names")
    if metric == "auc" and len(classes) != 2:
        raise UserError(f"metric 'auc' is for two classes, not {len(classes)}: use macro_f1")


def party_problem(name: str) -> str | None:
    """Why a party cannot bear this name, or None: it names files, and 'test' is the test set."""
    if name == "test" or not is_unicode(name):
        return f"a party cannot be called {name!r}"
    odd = set(name) & _NO_FILE or not name.isprintable() or name.strip(" .") != name
    if not name or odd or len(name) > LONGEST_NAME:
        return (
            f"a party cannot be called {name!r}: its name becomes a file's, so at most "
            f"{LONGEST_NAME} letters, none of {' '.join(sorted(_NO_FILE))}, no blank or dot at an "
            "end"
        )
    return None


def unicode_text(text: str, what: str) -> str:
    """The text, if UTF-8 can write it; raises `ItemError`."""
    if not is_unicode(text):
        raise ItemError(f"{what} holds a broken character (a lone surrogate)")
    return text


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can write it. JSON and file names may hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def kind_words(value: Any) -> str:
    """What kind of JSON value this is, in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    return "an empty text" if value == "" else names.get(type(value), type(value).__name__)


def decode(data: bytes, refuse: Callable[[str], Exception]) -> str:
    """UTF-8 text, with or without a byte order mark. refuse: makes the error of a message."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise refuse(
            f"line {line}: byte 0x{data[error.start]:02X} is not UTF-8: save the file as UTF-8"
        ) from error
