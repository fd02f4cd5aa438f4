"""The neutral sample: what a dataset yields and what every later step reads.

A dataset turns files into `Sample`s; a prompt turns a sample into text; a model turns text and
image into tensors. So N datasets and M models are N + M pieces of code.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

from PIL import Image


class ImageSource(Protocol):
    """An image that is not read before it is needed. `key` names its content within a run."""

    @property
    def key(self) -> str: ...

    def open(self) -> Image.Image:
        """The image in mode RGB. Raises `UserError` naming the file if it cannot be read."""
        ...


@dataclass(frozen=True)
class Task:
    """What is asked of the model and how the answer is measured.

    name: registry name, e.g. ``memes``.
    kind: ``choice`` (multiple choice over `classes`) or ``open`` (free answers).
    metric: headline metric, one of `fedmllm.metrics`: ``auc``, ``macro_f1`` or
        ``accuracy``. Higher is better for all three.
    classes: options in order (A), (B), …; empty for open tasks.
    question: for choice tasks, the question with ``{modality}`` where the words that name the
        present modalities stand, e.g. ``Is the content hateful{modality}?``.
    """

    name: str
    kind: str
    metric: str
    classes: tuple[str, ...] = ()
    question: str = ""


@dataclass(frozen=True)
class Sample:
    """One example. Fields that a modality mask withholds are None.

    id: unique and stable within its dataset; all draws that concern the sample derive from it.
    image, text: the two modalities, or None. Open questions often have no text besides the
        question itself, which is never withheld.
    question: the question of an open task; empty for choice tasks (the task holds it).
    answer: the text to learn: the class name for choice tasks, the free answer otherwise.
    label: class index for choice tasks, None otherwise.
    kind: a group to report apart, e.g. ``open``, or a path of groups, e.g. ``slake/en/open``
        (`metrics.groups_of`).
    turns: earlier turns of a conversation as (question, answer) pairs, oldest first.
    """

    id: str
    answer: str
    question: str = ""
    text: str | None = None
    image: ImageSource | None = None
    label: int | None = None
    kind: str = ""
    turns: tuple[tuple[str, str], ...] = field(default=())

    def masked(self, *, keep_image: bool, keep_text: bool) -> Sample:
        """The sample as a party sees it that holds only the kept modalities."""
        return replace(
            self,
            image=self.image if keep_image else None,
            text=self.text if keep_text else None,
        )
