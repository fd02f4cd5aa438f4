"""Prompts: a sample becomes the user's turn and the answer to learn.

Classification is a multiple-choice question whose wording names the modalities present
(FedMLLM, arXiv 2411.14717, section on prompts). The modality-agnostic prompt strategy replaces
those words, in the instruction and in the question, by one phrase, so that every sample reads
the same whatever it holds. Open questions are the bare question and its answer.

The image is the first line, `IMAGE`; a model's processor replaces it by its own image tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedmllm.data.sample import Sample, Task
from fedmllm.errors import UserError, unknown

IMAGE = "<image>"
STYLES = ("plain", "agnostic")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
AGNOSTIC = ", without considering the modality"
# (has text, has image) -> the words that name what is there
_PRESENT = {
    (True, True): " based on the text and image",
    (True, False): " based on the text",
    (False, True): " based on the image",
    (False, False): "",
}


@dataclass(frozen=True)
class Prompted:
    """A sample in words.

    turns: (user, assistant) pairs, oldest first; the last assistant text is the answer to learn.
    options: candidate answers of a choice task, in order, e.g. ``("(A) no", "(B) yes")``.
    text_at: where the sample's text begins and ends in the first user turn, if it has one.
    """

    sample: Sample
    turns: tuple[tuple[str, str], ...]
    options: tuple[str, ...] = ()
    text_at: tuple[int, int] | None = None


def modality_words(sample: Sample, style: str) -> str:
    """The words for `{modality}`: what the sample holds, or the agnostic phrase."""
    if style not in STYLES:
        raise UserError(unknown("prompt style", style, STYLES))
    if style == "agnostic":
        return AGNOSTIC
    return _PRESENT[sample.text is not None, sample.image is not None]


def choice_options(classes: tuple[str, ...]) -> tuple[str, ...]:
    """``("not-hateful", "hateful")`` becomes ``("(A) not-hateful", "(B) hateful")``."""
    return tuple(f"({LETTERS[i]}) {name}" for i, name in enumerate(classes))


def choice_question(sample: Sample, task: Task, style: str) -> str:
    """The user's turn of a multiple-choice question."""
    words = modality_words(sample, style)
    lines = [IMAGE] if sample.image is not None else []
    lines.append(f"Select the best answer{words}.")
    if sample.text is not None:
        lines.append(f"Text: {sample.text}")
    lines.append(f"Question: {task.question.format(modality=words)}")
    lines += ["Options:", *choice_options(task.classes)]
    lines.append("Answer with the letter of the option.")
    return "\n".join(lines)


def open_question(sample: Sample, question: str, *, first: bool = True) -> str:
    """The user's turn of an open question: image, text when there is one, and the question."""
    lines = [IMAGE] if first and sample.image is not None else []
    if first and sample.text is not None:
        lines.append(sample.text)
    return "\n".join([*lines, question])


def render(sample: Sample, task: Task, style: str = "plain") -> Prompted:
    """Turn a sample into the conversation that a model reads.

    Raises `UserError` for an unknown style. The style has no effect on open questions, which
    do not name modalities.
    """
    if task.kind == "choice":
        options = choice_options(task.classes)
        assert sample.label is not None, f"sample {sample.id} of a choice task has no label"
        turn = (choice_question(sample, task, style), options[sample.label])
        return Prompted(sample, (turn,), options, _text_at(sample, turn[0], "\nText: "))
    if style not in STYLES:
        raise UserError(unknown("prompt style", style, STYLES))
    asked = [*sample.turns, (sample.question, sample.answer)]
    turns = tuple(
        (open_question(sample, question, first=i == 0), answer)
        for i, (question, answer) in enumerate(asked)
    )
    return Prompted(sample, turns, text_at=_text_at(sample, turns[0][0]))


def _text_at(sample: Sample, question: str, mark: str = "") -> tuple[int, int] | None:
    """Where the sample's text stands in its first user turn, after the mark or the image."""
    if sample.text is None:
        return None
    image = len(IMAGE) + 1 if sample.image is not None else 0
    begin = question.index(mark) + len(mark) if mark else image
    return begin, begin + len(sample.text)


def shortened(prompted: Prompted, fits: Callable[[Prompted], bool]) -> Prompted:
    """The conversation with less text, so that it fits if it can be made to.

    First the end of the sample's text goes, as little as is needed, at a space where there is one
    near; then the oldest turns, the image staying. What remains may still not fit. Question,
    options and image are never cut.
    """
    if prompted.text_at is not None:
        prompted = _with_less_text(prompted, fits)
    while len(prompted.turns) > 1 and not fits(prompted):
        (first, _), (user, answer), *rest = prompted.turns
        image = f"{IMAGE}\n" if first.startswith(IMAGE) else ""
        prompted = Prompted(prompted.sample, ((image + user, answer), *rest), prompted.options)
    return prompted


def _with_less_text(prompted: Prompted, fits: Callable[[Prompted], bool]) -> Prompted:
    """The longest beginning of the text that fits, found by halving."""
    assert prompted.text_at is not None
    begin, end = prompted.text_at
    (user, answer), *rest = prompted.turns

    def cut(length: int) -> Prompted:
        text = user[begin : begin + length].rstrip()
        turn = (user[:begin] + text + user[end:], answer)
        return Prompted(
            prompted.sample, (turn, *rest), prompted.options, (begin, begin + len(text))
        )

    short, long = 0, end - begin
    while long - short > 1:
        middle = (short + long) // 2
        short, long = (middle, long) if fits(cut(middle)) else (short, middle)
    space = user.rfind(" ", begin, begin + short + 1) - begin
    return cut(space if space > 0.8 * short else short)
