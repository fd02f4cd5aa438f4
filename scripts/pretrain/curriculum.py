"""What the language stage asks, phase by phase.

The order was found by trial (docs/embedded-model.md): one short question a row and few kinds at a
time until each is learnt, then more forms, more things, whole prompts. Rows that pack several
questions, all kinds at once, left letters and yes/no at chance.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pretrain.questions import ASK


@dataclass(frozen=True)
class Phase:
    """What a stretch of training asks.

    until: the step at which the phase ends. kinds: relative frequency of each kind.
    choice: share of multiple choice, of which `short` without the instruction lines.
    single: share of one-thing scenes; textual: share of rows without an image.
    most: options at most.
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
    last: float = 0.0
    turns: int = 99
    length: int = 136
    rows: int = 40
    parts: int = 1
    strict: bool = True
    beside: Phase | None = None
    by_letter: dict[str, float] = field(default_factory=dict)


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
