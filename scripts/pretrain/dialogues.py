"""Questions become conversations, conversations become rows of tokens.

A row shows one scene (or none) and asks about it again and again until the row is full: the
prompt's tokens are read once and pay for several answers. The loss counts answers, not tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from random import Random

import numpy as np
from pretrain.questions import ASK, TEXT_KINDS, Asked
from pretrain.words import CONTENT
from transformers import Idefics3Processor

from fedmllm.data.sample import Sample, Task
from fedmllm.data.scenes import Scene, sample_scene, sample_single
from fedmllm.prompts import IMAGE, LETTERS, STYLES, choice_options, choice_question
from fedmllm.rng import stream, stream_seed

ROW = 136  # tokens a row
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
    index: int = -1
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


# ---------------------------------------------------------------- the curriculum
@dataclass(frozen=True)
class Phase:
    """What a stretch of training asks.

    until: the step at which the phase ends. kinds: relative frequency of each kind.
    choice: share of multiple choice, of which `short` without the instruction lines.
    single: share of one-thing scenes; textual: share of rows without an image.
    most: options at most. lists: share of rows that list options once and then ask for them.
    last: share of the short choices that put the question after the options.
    turns: turns a row at most. length: tokens a row. rows: rows a part, `parts` parts a step.
    beside: what the second part asks, when it is not the same.
    strict: ask questions that have several right answers by letter only.
    by_letter: share of multiple choice of single kinds, in place of `choice`.
    """

    until: int
    kinds: dict[str, float]
    choice: float
    short: float
    single: float
    textual: float
    most: int = 8
    lists: float = 0.0
    last: float = 0.0
    turns: int = 99
    length: int = ROW
    rows: int = 40
    parts: int = 1
    strict: bool = True
    beside: Phase | None = None
    by_letter: dict[str, float] = field(default_factory=dict)


_EVEN = dict.fromkeys(ASK, 1.0) | {"simple_exist": 0.0, "recall": 0.0}


def _all(weight: float) -> dict[str, float]:
    """Every kind equally often, save one that only some phases ask."""
    return dict.fromkeys(ASK, weight) | {"recall": 0.0}


_RECALL = Phase(  # bindings in texts
    0,
    {"recall": 5, "naming": 4, "reading": 1, "lookup": 1},
    choice=0.1,
    short=1.0,
    single=0.0,
    textual=1.0,
    most=4,
    turns=1,
    length=40,
    rows=120,
)
_SEVERAL = Phase(  # letters for what is shown among several things, and bindings in texts
    0,
    {"recall": 2, "naming": 2, "colour_of": 1.5, "kind_of": 1.5, "place": 1.5, "at_place": 1}
    | {"count": 1.5},
    choice=0.5,
    short=1.0,
    single=0.2,
    textual=0.3,
    most=6,
    turns=1,
    length=64,
    rows=80,
)
PHASES = (
    Phase(  # one short question a row: letters to words, words to what is shown
        600,
        _all(0.6)
        | {
            "simple_exist": 0,
            "lookup": 4,
            "naming": 2,
            "reading": 1.5,
            "exist": 3,
            "negated": 1,
            "match": 1,
        },
        choice=0.35,
        short=1.0,
        single=0.65,
        textual=0.3,
        most=4,
        last=0.5,
        turns=1,
        strict=False,
        length=48,
        rows=100,
    ),
    Phase(  # the same, mostly yes or no
        1000,
        _all(0.5)
        | {
            "simple_exist": 0,
            "lookup": 2.5,
            "naming": 1,
            "reading": 1.5,
            "exist": 6,
            "negated": 2,
            "match": 1.5,
        },
        choice=0.4,
        short=1.0,
        single=0.7,
        textual=0.2,
        most=4,
        last=0.4,
        turns=1,
        strict=False,
        length=48,
        rows=100,
    ),
    Phase(  # yes or no in its plainest form, until it is learnt
        1100,
        _all(0.15)
        | {"simple_exist": 16, "exist": 2, "negated": 1, "lookup": 1, "place": 1, "colour_of": 1},
        choice=0.15,
        short=1.0,
        single=0.8,
        textual=0.05,
        most=3,
        turns=1,
        strict=False,
        length=36,
        rows=140,
    ),
    Phase(  # all questions, short
        1900,
        _all(0.6) | {"exist": 5, "negated": 4, "match": 4, "lookup": 2, "reading": 2, "naming": 1},
        choice=0.4,
        short=1.0,
        single=0.55,
        textual=0.15,
        most=4,
        last=0.3,
        turns=1,
        strict=False,
        length=60,
        rows=84,
    ),
    Phase(  # letters for what is shown; not; names; text and image
        2300,
        _all(0.15)
        | {"shape": 2, "colour": 2, "exist": 2, "negated": 2.5, "match": 2.5, "naming": 2}
        | {"reading": 2, "lookup": 0.7, "colour_of": 0.7, "kind_of": 0.7, "place": 0.5},
        choice=0.5,
        by_letter={
            "exist": 0.2,
            "negated": 0.1,
            "match": 0.1,
            "naming": 0.2,
            "reading": 0.2,
            "shape": 0.9,
            "colour": 0.9,
        },
        short=1.0,
        single=0.65,
        textual=0.2,
        most=4,
        last=0.3,
        turns=1,
        strict=False,
        length=60,
        rows=84,
        parts=2,
    ),
    Phase(  # among several things
        2900,
        _all(0.3)
        | {"colour_of": 1.5, "kind_of": 1.5, "place": 1.5, "at_place": 1.5, "count": 1.5}
        | {"exist": 1.5, "negated": 2, "match": 2.5, "naming": 2, "reading": 2, "caption": 0.8},
        choice=0.4,
        by_letter={"match": 0.15, "naming": 0.15, "reading": 0.3, "negated": 0.25},
        short=1.0,
        single=0.4,
        textual=0.15,
        most=5,
        last=0.2,
        turns=1,
        length=64,
        rows=80,
        parts=2,
    ),
    Phase(  # whole prompts
        3100,
        _all(1.0)
        | {"exist": 1.5, "negated": 2, "match": 3, "naming": 2.5, "reading": 3}
        | {"caption": 0.1, "copy": 0.4, "simple_exist": 0.2},
        choice=0.65,
        short=0.1,
        single=0.4,
        textual=0.18,
        turns=2,
        length=120,
        rows=42,
        parts=2,
    ),
    Phase(  # whole prompts, and bindings in texts beside them
        3500,
        _all(1.0)
        | {"exist": 1.5, "negated": 2, "match": 3, "naming": 2.5, "reading": 3}
        | {"caption": 0.1, "copy": 0.4, "simple_exist": 0.2},
        choice=0.65,
        short=0.1,
        single=0.4,
        textual=0.18,
        turns=2,
        length=120,
        rows=42,
        parts=2,
        beside=_RECALL,
    ),
    Phase(  # whole prompts, mostly about several things
        4100,
        _all(0.6)
        | {"colour_of": 2.5, "kind_of": 2.5, "place": 2.5, "at_place": 2, "count": 2.5}
        | {"naming": 1.5, "reading": 2, "match": 1.5, "negated": 1, "exist": 1}
        | {"caption": 0.1, "simple_exist": 0.1},
        choice=0.7,
        short=0.1,
        single=0.3,
        textual=0.15,
        turns=2,
        length=120,
        rows=42,
        parts=2,
        beside=_SEVERAL,
    ),
    Phase(  # whole prompts, mostly letters for what must be found among several things
        9999,
        _all(0.4)
        | {"colour_of": 3, "kind_of": 3, "place": 3, "at_place": 2, "count": 1.5}
        | {"naming": 3, "reading": 3, "match": 1, "caption": 0.1, "simple_exist": 0.1},
        choice=0.8,
        short=0.1,
        single=0.25,
        textual=0.15,
        turns=2,
        length=120,
        rows=42,
        parts=2,
    ),
)


def phase_at(step: int, part: int = 0) -> Phase:
    """The phase in force for a part of a step of the language stage."""
    phase = next(p for p in PHASES if step < p.until or p is PHASES[-1])
    return phase.beside if part and phase.beside else phase


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


def list_turns(rng: Random, image: bool) -> Iterator[Turn]:
    """Options listed once, then asked for: by word, by letter, again and again."""
    names = rng.sample(CONTENT, rng.randint(3, 8))
    options = choice_options(tuple(names))
    lead = [IMAGE, *options] if image else [*options]
    while True:
        at = rng.randrange(len(names))
        if rng.random() < 0.25:
            question = rng.choice(("what is option {c}?", "what does option {c} say?"))
            turn = Turn("list", question.format(c=LETTERS[at]), names[at])
        else:
            question = rng.choice(("which option is {w}?", "which option says {w}?", "select {w}."))
            turn = Turn("list", question.format(w=names[at]), options[at], options)
        yield replace(turn, user="\n".join([*lead, turn.user]))
        lead = []


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

    def append(self, row: Row, turn: Turn, length: int = ROW) -> bool:
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
        """A row full of turns about one scene, or about texts when there is none."""
        row, misses, listed = Row(scene=scene), 0, None
        if phase.lists and rng.random() < phase.lists:
            listed = list_turns(rng, image=scene is not None)
        while misses < 2 and len(row.deciding) < phase.turns:
            if listed is not None:
                turn = next(listed)
            else:
                turn = make_turn(rng, phase, scene, image=scene is not None and not row.ids)
            misses += not self.append(row, turn, phase.length)
            if not row.ids:
                misses = 0
        return row

    def batch(self, seed: int, step: int, phase: Phase, part: int = 0) -> list[Row]:
        """The rows of one training step, a pure function of (seed, step)."""
        out = []
        for i in range(phase.rows):
            name = (step, i, part) if part else (step, i)
            rng = Random(stream_seed(seed, "dialogue", *name))
            scene = None
            if rng.random() >= phase.textual:
                scene = draw_scene(seed, phase.single, "dialogue-scene", *name)
            out.append(self.row(rng, phase, scene))
        return out

    def arrays(self, rows: list[Row], length: int = ROW) -> tuple[np.ndarray, np.ndarray]:
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
