"""Questions become conversations, conversations become rows of tokens.

A row shows one scene (or none) and asks about it once or a few times, as its phase says. The loss
counts answers, not tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from random import Random

import numpy as np
from pretrain.curriculum import Phase
from pretrain.questions import ASK, TEXT_KINDS, Asked
from transformers import Idefics3Processor

from fedmllm.data.sample import Sample, Task
from fedmllm.data.scenes import Scene, sample_scene, sample_single
from fedmllm.prompts import IMAGE, STYLES, choice_options, choice_question
from fedmllm.rng import stream, stream_seed

LETTER_WEIGHT, NAME_WEIGHT, SIGN_WEIGHT = 1.0, 0.4, 0.1


@dataclass(frozen=True)
class Turn:
    """One question and its answer as they are written. `options` is empty for open questions."""

    kind: str
    user: str
    answer: str
    options: tuple[str, ...] = ()


@dataclass
class Row:
    """Token ids, the weight of each as a target, and the scene whose features the images are."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    scene: Scene | None = None
    # (position of the token that decides an answer, kind), for the running check
    deciding: list[tuple[int, str]] = field(default_factory=list)


# ---------------------------------------------------------------- a question as a turn
def option_names(rng: Random, asked: Asked, most: int) -> tuple[str, ...]:
    """The answer and up to `most` - 1 wrong answers in random order.

    Wrong answers are drawn from `asked.others`; those before a "|" go first.
    """
    groups: list[list[str]] = [[]]
    taken = {asked.answer}
    for name in asked.others:
        if name == "|":
            groups.append([])
        elif name not in taken:
            groups[-1].append(name)
            taken.add(name)
    wrong: list[str] = []
    for group in groups:
        wrong += rng.sample(group, min(len(group), most - 1 - len(wrong)))
    names = [asked.answer, *wrong]
    rng.shuffle(names)
    return tuple(names)


def choice_turn(rng: Random, asked: Asked, *, image: bool, most: int, style: str) -> Turn:
    """The question in the exact multiple-choice format of `fedmllm.prompts`."""
    names = option_names(rng, asked, most)
    question = asked.question
    if rng.random() < 0.3:
        question = question[0].upper() + question[1:]
    if question.endswith("?") and rng.random() < 0.8:
        question = question[:-1] + "{modality}?"
    shown = Sample(id="", answer="", text=asked.text, image=_SHOWN if image else None)
    user = choice_question(shown, Task("", "choice", "accuracy", names, question), style)
    options = choice_options(names)
    return Turn(asked.kind, user, options[names.index(asked.answer)], options)


class _Shown:
    """Stands for an image that exists: the prompt asks only whether there is one."""

    key = ""

    def open(self):
        """Never called: the row holds the image's features."""
        raise NotImplementedError


_SHOWN = _Shown()


def open_turn(rng: Random, asked: Asked, *, image: bool) -> Turn:
    """The bare question, after its text line when it has one."""
    lines = _lead(rng, asked, image)
    return Turn(asked.kind, "\n".join([*lines, asked.question]), asked.answer)


def _lead(rng: Random, asked: Asked, image: bool) -> list[str]:
    """The image line and the text line, as far as there are any."""
    lines = [IMAGE] if image else []
    if asked.text is not None:
        lines.append(asked.text if rng.random() < 0.5 else f"Text: {asked.text}")
    return lines


def short_choice_turn(rng: Random, asked: Asked, *, image: bool, most: int, last: float) -> Turn:
    """Question and options alone, a cheaper lesson in letters.

    With the question after the options the lesson is easier still: letters were learnt so first.
    """
    names = option_names(rng, asked, most)
    options = choice_options(names)
    lines = [asked.question, *options]
    if last and rng.random() < last:
        lines = [*options, asked.question]
    user = "\n".join([*_lead(rng, asked, image), *lines])
    return Turn(asked.kind, user, options[names.index(asked.answer)], options)


# ---------------------------------------------------------------- a turn under a phase
def ask(rng: Random, scene: Scene | None, kinds: dict[str, float]) -> Asked:
    """A question of a drawn kind that the scene allows."""
    allowed = [k for k in kinds if scene is not None or k in TEXT_KINDS]
    weights = [kinds[k] for k in allowed]
    while True:
        asked = ASK[rng.choices(allowed, weights)[0]](rng, scene)  # type: ignore[arg-type]
        if asked is not None:
            return asked


def make_turn(rng: Random, phase: Phase, scene: Scene | None, image: bool) -> Turn:
    """One turn under a phase; `image` says whether the turn carries the image line."""
    asked = ask(rng, scene, phase.kinds)
    share = phase.by_letter.get(asked.kind, phase.choice)
    forced = asked.only_choice and (phase.strict or asked.kind == "lookup")
    as_choice = asked.others and (forced or rng.random() < share)
    if not as_choice:
        return open_turn(rng, asked, image=image)
    most = rng.randint(2, phase.most)
    if rng.random() < phase.short:
        return short_choice_turn(rng, asked, image=image, most=most, last=phase.last)
    turn = choice_turn(
        rng, asked, image=image or scene is not None, most=most, style=rng.choice(STYLES)
    )
    return turn if image else replace(turn, user=turn.user.removeprefix(f"{IMAGE}\n"))


def draw_scene(seed: int, single: float, *ids: object) -> Scene:
    """One thing anywhere or in a quadrant, or several; `single` is the share of the first two."""
    rng = stream(seed, *map(str, ids[:1]), *ids[1:])
    kind = rng.random()
    if kind < single / 2:
        return sample_single(rng)
    return sample_scene(rng, count=1) if kind < single else sample_scene(rng)


# ---------------------------------------------------------------- tokens
class Writer:
    """Turns conversations into rows of tokens, in the words of the chat template."""

    def __init__(self, processor: Idefics3Processor) -> None:
        self.backend = processor.tokenizer.backend_tokenizer
        self.image = "<fake_token_around_image><global-img>" + "<image>" * 16
        self.image += "<fake_token_around_image>"
        self.pad = processor.tokenizer.pad_token_id
        self._line = lru_cache(100_000)(self._encode_line)

    def _encode_line(self, line: str) -> list[int]:
        return self.backend.encode(line.replace(IMAGE, self.image)).ids

    def encode(self, text: str) -> list[int]:
        """Ids of a text whose image line is still a single mark.

        No token reaches past a line break, so lines are encoded apart and most come from a cache.
        """
        return [token for line in text.splitlines(keepends=True) for token in self._line(line)]

    def turn(self, turn: Turn, *, first: bool) -> tuple[list[int], list[int]]:
        """Ids of the prompt up to ``Assistant:``, and of the answer with its end mark."""
        start = "User:\n" if first else "\nUser:\n"
        prompt = self.encode(f"{start}{turn.user}<end_of_utterance>\nAssistant:")
        return prompt, self.encode(f" {turn.answer}<end_of_utterance>")

    def append(self, row: Row, turn: Turn, length: int) -> bool:
        """Add a turn; False, and no change, when the row has no room for it."""
        prompt, answer = self.turn(turn, first=not row.ids)
        if len(row.ids) + len(prompt) + len(answer) > length:
            return False
        spot = len(row.ids) + len(prompt) + bool(turn.options)
        row.deciding.append((spot, ("choice_" if turn.options else "") + turn.kind))
        row.ids += prompt + answer
        row.weights += [0.0] * len(prompt) + answer_weights(len(answer), bool(turn.options))
        return True

    def row(self, rng: Random, phase: Phase, scene: Scene | None) -> Row:
        """A row of turns about one scene, or about texts when there is none."""
        row, misses = Row(scene=scene), 0
        while misses < 2 and len(row.deciding) < phase.turns:
            turn = make_turn(rng, phase, scene, image=scene is not None and not row.ids)
            misses += not self.append(row, turn, phase.length)
            if not row.ids:
                misses = 0
        return row

    def batch(self, seed: int, step: int, phase: Phase, part: int = 0) -> list[Row]:
        """The rows of a part of a training step, a pure function of (seed, step, part)."""
        out = []
        for i in range(phase.rows):
            name = (step, i, part) if part else (step, i)
            rng = Random(stream_seed(seed, "dialogue", *name))
            scene = None
            if rng.random() >= phase.textual:
                scene = draw_scene(seed, phase.single, "dialogue-scene", *name)
            out.append(self.row(rng, phase, scene))
        return out

    def arrays(self, rows: list[Row], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Right-padded ids and target weights, both (B, length)."""
        ids = np.full((len(rows), length), self.pad, dtype=np.int64)
        weights = np.zeros((len(rows), length), dtype=np.float32)
        for i, row in enumerate(rows):
            ids[i, : len(row.ids)] = row.ids
            weights[i, : len(row.ids)] = row.weights
        return ids, weights


def answer_weights(length: int, choice: bool) -> list[float]:
    """Weight of each answer token: the deciding ones weigh most, an answer about one in all."""
    if choice:  # " (", letter, ")", name…, end
        names = length - 4
        return [SIGN_WEIGHT, LETTER_WEIGHT, SIGN_WEIGHT / 2, *[NAME_WEIGHT / names] * names,
                SIGN_WEIGHT]  # fmt: skip
    words = length - 1
    return [*[words**-0.5] * words, SIGN_WEIGHT]
