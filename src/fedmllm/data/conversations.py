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
``<image>``; the marker may stand nowhere else.

Task ``open``: the last user turn is the question, which is never withheld. Task ``choice``: one
user turn, whose content is the sample's text, and an answer out of `classes`.

Three keys more may be there, and `fedmllm.export` writes them; all others are ignored.
`kind`: a group of questions to report apart, e.g. ``closed``. `text`, task ``open``: the beginning
of the first user turn, up to a line break, that is the sample's text and not its question, so that
a scenario may withhold it. `withheld`: the modalities that a scenario took away; an item of task
``choice`` with neither image nor text needs it, lest an empty turn pass for an oversight.

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
from fedmllm.data.own import (
    MARKER,
    QUESTION,
    ItemError,
    folder_of,
    is_unicode,
    kind_words,
    task_of,
    unicode_text,
)
from fedmllm.data.sample import Sample, Task
from fedmllm.errors import UserError, problem_list, unknown

NONE = "none"


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
    name without the ending. test: the file of test samples. Either may be ``none``, for a machine
    that holds only the other. task: ``open`` (accuracy) or ``choice`` over `classes`, asked by
    `question` (with ``{modality}``); metric for choice: ``macro_f1`` (default), or ``auc`` for two
    classes. verify: read every image's header now.

    Sample ids are ``party/id``. Raises one `UserError` that lists the problems of all files.
    """
    folder = folder_of(root, dataset="conversations", what="your JSON files")
    asked = task_of("conversations", task, classes=tuple(classes), question=question, metric=metric)
    reader = _Reader(folder, asked, verify)
    files = _party_files(reader.root, parties, reader.root / test) if parties != NONE else []
    problems: list[str] = []
    train = {file.stem: _read(file, file.stem, reader, problems) for file in files}
    tested = _read(reader.root / test, "test", reader, problems) if test != NONE else []
    if problems:
        raise UserError(problem_list(problems))
    samples = [sample for name in sorted(train) for sample in train[name]]
    return Dataset(task=reader.task, train=samples, test=tested, parties=train)


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
    odd = [stem for stem in stems if stem == "test" or not is_unicode(stem)]
    if odd:
        raise UserError(f"a party cannot be called {odd[0]!r}: rename its file")
    return sorted(found, key=lambda file: file.stem)


def _read(file: Path, party: str, reader: _Reader, problems: list[str]) -> list[Sample]:
    """The samples of one file; what is wrong is added to `problems`."""
    try:
        items = _items(file)
    except ItemError as error:
        problems.append(f"{file}: {error}")
        return []
    samples = []
    seen: dict[str, int] = {}
    for number, item in enumerate(items, 1):
        try:
            sample = _sample(item, number, party, reader)
            if sample.id in seen:
                raise ItemError(f"its id is that of item {seen[sample.id]}: ids must be unique")
            seen[sample.id] = number
            samples.append(sample)
        except ItemError as error:
            problems.append(f"{file}, item {number}: {error}")
    return samples


def _items(file: Path) -> list[Any]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ItemError("the file does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ItemError(f"the file cannot be read as UTF-8 text ({error})") from error
    if not text.strip():
        raise ItemError("the file is empty: it must hold a JSON list of items")
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ItemError(f"not JSON at {where}: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise ItemError(f"JSON that cannot be read: {error}") from error
    if not isinstance(items, list):
        raise ItemError(f"must hold a JSON list of items, not {kind_words(items)}")
    if not items:
        raise ItemError("the list is empty: it must hold at least one item")
    return items


def _sample(item: Any, number: int, party: str, reader: _Reader) -> Sample:
    if not isinstance(item, dict):
        raise ItemError(f"must be an object with conversations, not {kind_words(item)}")
    name = _id(item.get("id"), number)
    image = _image(item.get("image"), reader)
    pairs = list(_pairs(item.get("conversations"), image is not None))
    if reader.task.kind == "open":
        return _open_sample(f"{party}/{name}", pairs, image, item)
    if len(pairs) > 1:
        raise ItemError(f"has {len(pairs)} exchanges: task 'choice' takes one")
    question, answer = pairs[0]
    if answer not in reader.task.classes:
        raise ItemError(unknown("answer", answer, reader.task.classes))
    if not question and image is None and not item.get("withheld"):
        raise ItemError("has neither an image nor a text")
    label, kind = reader.task.classes.index(answer), _kind_of(item)
    return Sample(
        f"{party}/{name}", answer, text=question or None, image=image, label=label, kind=kind
    )


def _open_sample(
    name: str, pairs: list[tuple[str, str]], image: ImageFile | None, item: dict[str, Any]
) -> Sample:
    if not all(asked for asked, _ in pairs):
        raise ItemError("a user turn is empty")
    text, first = item.get("text"), pairs[0][0]
    if not isinstance(text, str) or not text or not first.startswith(f"{text}\n"):
        text = None
    else:
        pairs[0] = (first.removeprefix(f"{text}\n"), pairs[0][1])
    (question, answer), earlier = pairs[-1], tuple(pairs[:-1])
    return Sample(*(name, answer, question, text), image=image, kind=_kind_of(item), turns=earlier)


def _kind_of(item: dict[str, Any]) -> str:
    kind = item.get("kind")
    return kind if isinstance(kind, str) and is_unicode(kind) and kind != "all" else ""


def _id(given: Any, number: int) -> str:
    if given is None:
        return str(number)
    if isinstance(given, bool) or not isinstance(given, str | int) or given == "":
        raise ItemError(f"id must be a text or a whole number, not {kind_words(given)}")
    return unicode_text(str(given), "id")


def _image(given: Any, reader: _Reader) -> ImageFile | None:
    if given is None:
        return None
    if not isinstance(given, str):
        raise ItemError(f"image must be a path or null, not {kind_words(given)}")
    problem = image_problem(unicode_text(given, "image"), reader.root, verify=reader.verify)
    if problem:
        raise ItemError(problem)
    return ImageFile(given, reader.root)


def _pairs(turns: Any, has_image: bool) -> Iterator[tuple[str, str]]:
    """(user, assistant) contents, the image marker taken off the first."""
    if not isinstance(turns, list) or not turns:
        raise ItemError("conversations must be a list of turns, user and assistant in turn")
    if len(turns) % 2:
        raise ItemError("conversations must end with an assistant turn, the answer to learn")
    contents = [_content(turn, place) for place, turn in enumerate(turns)]
    if contents[0].startswith(MARKER):
        if not has_image:
            raise ItemError(f"begins with {MARKER} but has no image: name one or drop the marker")
        contents[0] = contents[0].removeprefix(MARKER).strip()
    if any(MARKER in content for content in contents):
        raise ItemError(f"{MARKER} may stand once, at the start of the first user turn")
    return zip(contents[::2], contents[1::2], strict=True)


def _content(turn: Any, place: int) -> str:
    expected = ("user", "assistant")[place % 2]
    role = turn.get("role") if isinstance(turn, dict) else None
    content = turn.get("content") if isinstance(turn, dict) else None
    if not isinstance(role, str) or not isinstance(content, str):
        raise ItemError(f"turn {place + 1} must be an object with texts 'role' and 'content'")
    if role not in ("user", "assistant"):
        raise ItemError(f"turn {place + 1}: {unknown('role', role, ('user', 'assistant'))}")
    if role != expected:
        raise ItemError(f"turn {place + 1} is the {role}'s: user and assistant must alternate")
    if role == "assistant" and not content.strip():
        raise ItemError(f"turn {place + 1}, the assistant's, is empty")
    return unicode_text(content.strip(), f"turn {place + 1}")


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
    ready=True,
)
