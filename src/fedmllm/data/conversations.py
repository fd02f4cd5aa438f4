"""A user's own data: one JSON file of conversations per party.

    root/parties/hospital-a.json    the training samples of party "hospital-a"
    root/parties/hospital-b.json    ...
    root/test.json                  the test samples
    root/images/...                 images, anywhere inside root

Each file is a list of items in the common conversation format:

    [{"id": 17, "image": "images/17.png",
      "conversations": [{"role": "user", "content": "<image>\\nIs there a fracture?"},
                        {"role": "assistant", "content": "no"}]}]

`id` is a text or a number, unique within its file; without it the item's place in the file is
its id. `image` is a path inside root, or null, or left out. Users and assistants alternate; the
last assistant turn is the answer to learn. With an image the first turn may begin with
``<image>``; the marker may stand nowhere else. Other keys are ignored.

Task ``open``: the last user turn is the question, which is never withheld. Task ``choice``: one
user turn, whose content is the sample's text, and an answer out of `classes`.

All problems of all files are reported at once.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmllm.data.dataset import Dataset, DatasetSpec
from fedmllm.data.images import ImageFile, image_problem
from fedmllm.data.sample import Sample, Task
from fedmllm.errors import UserError, unknown

MARKER = "<image>"  # prompts.IMAGE; not imported, since prompts imports this package
MOST_LINES = 20
QUESTION = "Which option is right{modality}?"
_METRICS = {"open": ("accuracy",), "choice": ("macro_f1", "auc")}


class _ItemError(Exception):
    """What is wrong with one item."""


@dataclass(frozen=True)
class _Reader:
    """What the reading of an item needs to know."""

    root: Path
    task: Task
    verify: bool


def load(
    *,
    root: str | Path = "",
    parties: str = "parties/*.json",
    test: str = "test.json",
    task: str = "open",
    classes: Sequence[str] = (),
    question: str = QUESTION,
    metric: str = "",
    verify: bool = True,
) -> Dataset:
    """Load conversations of ready-made parties.

    root: data folder. parties: a pattern of files, relative to root; a party bears its file's
    name without the ending. test: the file of test samples. task: ``open`` (accuracy) or
    ``choice`` over `classes`, asked by `question` (with ``{modality}``); metric for choice:
    ``macro_f1`` (default), or ``auc`` for two classes. verify: read every image's header now.

    Sample ids are ``party/id``. Raises one `UserError` that lists the problems of all files.
    """
    reader = _Reader(_folder(root), _task(task, tuple(classes), question, metric), verify)
    files = _party_files(reader.root, parties, reader.root / test)
    problems: list[str] = []
    train = {file.stem: _read(file, file.stem, reader, problems) for file in files}
    tested = _read(reader.root / test, "test", reader, problems)
    if problems:
        raise UserError(_report(problems))
    samples = [sample for name in sorted(train) for sample in train[name]]
    return Dataset(task=reader.task, train=samples, test=tested, parties=train)


def _folder(root: str | Path) -> Path:
    if not root:
        raise UserError("dataset 'conversations' needs data.root: the folder of your JSON files")
    if not Path(root).is_dir():
        raise UserError(f"data folder {root} does not exist or is not a folder: check data.root")
    return Path(root)


def _task(kind: str, classes: tuple[str, ...], question: str, metric: str) -> Task:
    if kind not in _METRICS:
        raise UserError(unknown("task", kind, _METRICS))
    chosen = metric or _METRICS[kind][0]
    if chosen not in _METRICS[kind]:
        raise UserError(unknown(f"metric of task {kind!r}", chosen, _METRICS[kind]))
    if kind == "open":
        if classes:
            raise UserError("classes are given, but task is 'open': set task to 'choice'")
        return Task(name="conversations", kind=kind, metric=chosen)
    _check_classes(classes, chosen)
    rest = question.replace("{modality}", "")
    if "{" in rest or "}" in rest:
        raise UserError(f"question {question!r} may hold no braces but {{modality}}")
    return Task("conversations", kind, chosen, classes, question)


def _check_classes(classes: tuple[str, ...], metric: str) -> None:
    texts = all(isinstance(name, str) and name.strip() for name in classes)
    if not texts or not 2 <= len(classes) <= 26 or len(set(classes)) < len(classes):
        raise UserError(f"classes is {list(classes)}: task 'choice' needs 2 to 26 different names")
    if metric == "auc" and len(classes) != 2:
        raise UserError(f"metric 'auc' is for two classes, not {len(classes)}: use macro_f1")


def _party_files(root: Path, parties: str, test: Path) -> list[Path]:
    """The parties' files in order of their names."""
    try:
        found = [file for file in root.glob(parties) if file.is_file() and file != test]
    except (NotImplementedError, ValueError) as error:
        raise UserError(f"parties {parties!r} is not a pattern within root: {error}") from error
    if not found:
        raise UserError(
            f"no party files: nothing in {root} matches {parties!r}; put one JSON file per party "
            "there, e.g. parties/hospital-a.json, or set data.parties"
        )
    stems = Counter(file.stem for file in found)
    twice = [stem for stem, count in stems.items() if count > 1]
    if twice:
        raise UserError(f"two party files are called {twice[0]!r}: parties need different names")
    odd = [stem for stem in stems if stem == "test" or not _is_unicode(stem)]
    if odd:
        raise UserError(f"a party cannot be called {odd[0]!r}: rename its file")
    return sorted(found, key=lambda file: file.stem)


def _read(file: Path, party: str, reader: _Reader, problems: list[str]) -> list[Sample]:
    """The samples of one file; what is wrong is added to `problems`."""
    try:
        items = _items(file)
    except _ItemError as error:
        problems.append(f"{file}: {error}")
        return []
    samples = []
    seen: dict[str, int] = {}
    for number, item in enumerate(items, 1):
        try:
            sample = _sample(item, number, party, reader)
            if sample.id in seen:
                raise _ItemError(f"its id is that of item {seen[sample.id]}: ids must be unique")
            seen[sample.id] = number
            samples.append(sample)
        except _ItemError as error:
            problems.append(f"{file}, item {number}: {error}")
    return samples


def _items(file: Path) -> list[Any]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise _ItemError("the file does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise _ItemError(f"the file cannot be read as UTF-8 text ({error})") from error
    if not text.strip():
        raise _ItemError("the file is empty: it must hold a JSON list of items")
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise _ItemError(f"not JSON at {where}: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise _ItemError(f"JSON that cannot be read: {error}") from error
    if not isinstance(items, list):
        raise _ItemError(f"must hold a JSON list of items, not {_kind(items)}")
    if not items:
        raise _ItemError("the list is empty: it must hold at least one item")
    return items


def _sample(item: Any, number: int, party: str, reader: _Reader) -> Sample:
    if not isinstance(item, dict):
        raise _ItemError(f"must be an object with conversations, not {_kind(item)}")
    name = _id(item.get("id"), number)
    image = _image(item.get("image"), reader)
    pairs = list(_pairs(item.get("conversations"), image is not None))
    (question, answer), earlier = pairs[-1], pairs[:-1]
    if reader.task.kind == "open":
        if not all(asked for asked, _ in pairs):
            raise _ItemError("a user turn is empty")
        return Sample(f"{party}/{name}", answer, question, image=image, turns=tuple(earlier))
    if earlier:
        raise _ItemError(f"has {len(pairs)} exchanges: task 'choice' takes one")
    if answer not in reader.task.classes:
        raise _ItemError(unknown("answer", answer, reader.task.classes))
    if not question and image is None:
        raise _ItemError("has neither an image nor a text")
    label = reader.task.classes.index(answer)
    return Sample(f"{party}/{name}", answer, text=question or None, image=image, label=label)


def _id(given: Any, number: int) -> str:
    if given is None:
        return str(number)
    if isinstance(given, bool) or not isinstance(given, str | int) or given == "":
        raise _ItemError(f"id must be a text or a whole number, not {_kind(given)}")
    return _unicode(str(given), "id")


def _image(given: Any, reader: _Reader) -> ImageFile | None:
    if given is None:
        return None
    if not isinstance(given, str):
        raise _ItemError(f"image must be a path or null, not {_kind(given)}")
    problem = image_problem(_unicode(given, "image"), reader.root, verify=reader.verify)
    if problem:
        raise _ItemError(problem)
    return ImageFile(given, reader.root)


def _pairs(turns: Any, has_image: bool) -> Iterator[tuple[str, str]]:
    """(user, assistant) contents, the image marker taken off the first."""
    if not isinstance(turns, list) or not turns:
        raise _ItemError("conversations must be a list of turns, user and assistant in turn")
    if len(turns) % 2:
        raise _ItemError("conversations must end with an assistant turn, the answer to learn")
    contents = [_content(turn, place) for place, turn in enumerate(turns)]
    if contents[0].startswith(MARKER):
        if not has_image:
            raise _ItemError(f"begins with {MARKER} but has no image: name one or drop the marker")
        contents[0] = contents[0].removeprefix(MARKER).strip()
    if any(MARKER in content for content in contents):
        raise _ItemError(f"{MARKER} may stand once, at the start of the first user turn")
    return zip(contents[::2], contents[1::2], strict=True)


def _content(turn: Any, place: int) -> str:
    expected = ("user", "assistant")[place % 2]
    role = turn.get("role") if isinstance(turn, dict) else None
    content = turn.get("content") if isinstance(turn, dict) else None
    if not isinstance(role, str) or not isinstance(content, str):
        raise _ItemError(f"turn {place + 1} must be an object with texts 'role' and 'content'")
    if role not in ("user", "assistant"):
        raise _ItemError(f"turn {place + 1}: {unknown('role', role, ('user', 'assistant'))}")
    if role != expected:
        raise _ItemError(f"turn {place + 1} is the {role}'s: user and assistant must alternate")
    if role == "assistant" and not content.strip():
        raise _ItemError(f"turn {place + 1}, the assistant's, is empty")
    return _unicode(content.strip(), f"turn {place + 1}")


def _unicode(text: str, what: str) -> str:
    if not _is_unicode(text):
        raise _ItemError(f"{what} holds a broken character (a lone surrogate)")
    return text


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can write it. JSON and file names may hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    return "an empty text" if value == "" else names[type(value)]


def _report(problems: list[str]) -> str:
    shown = "\n".join(f"  {problem}" for problem in problems[:MOST_LINES])
    rest = len(problems) - MOST_LINES
    more = f"\n  … and {rest} more" if rest > 0 else ""
    return f"{len(problems)} problem{'s' * (len(problems) > 1)} in the data:\n{shown}{more}"


SPEC = DatasetSpec(
    summary="your own data: one JSON file of conversations per party",
    load=load,
    options={
        "root": "",
        "parties": "parties/*.json",
        "test": "test.json",
        "task": "open",
        "classes": (),
        "question": QUESTION,
        "metric": "",
        "verify": True,
    },
    source="your own files",
    licence="yours",
)
