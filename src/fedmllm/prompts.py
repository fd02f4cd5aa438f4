"""Prompts: a sample becomes the user's turn and the answer to learn.

Classification is a multiple-choice question whose wording names the modalities present
(FedMLLM, arXiv 2411.14717, section on prompts). The modality-agnostic prompt strategy replaces
those words, in the instruction and in the question, by one phrase, so that every sample reads
the same whatever it holds. Open questions are the bare question and its answer.

The image is the first line, `IMAGE`; a model's processor replaces it by its own image tokens.
"""

from __future__ import annotations

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
    """

    sample: Sample
    turns: tuple[tuple[str, str], ...]
    options: tuple[str, ...] = ()


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
        return Prompted(sample=sample, turns=(turn,), options=options)
    if style not in STYLES:
        raise UserError(unknown("prompt style", style, STYLES))
    asked = [*sample.turns, (sample.question, sample.answer)]
    turns = tuple(
        (open_question(sample, question, first=i == 0), answer)
        for i, (question, answer) in enumerate(asked)
    )
    return Prompted(sample=sample, turns=turns)
