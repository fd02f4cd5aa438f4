"""What the language stage asks, phase by phase.

The order was found by trial (docs/embedded-model.md): one short question a row and few kinds at a
time until each is learnt, then more forms, more things, whole prompts. Rows that pack several
questions, all kinds at once, left letters and yes/no at chance.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from pretrain.questions import ASK


@dataclass(frozen=True)
class Phase:
    """What a stretch of training asks.

    until: the step at which the phase ends. kinds: relative frequency of each kind.
    choice: share of multiple choice, of which `short` without the instruction lines.
    by_letter: the same share for single kinds, in place of `choice`.
    single: share of one-thing scenes; textual: share of rows without an image.
    most: options at most.
    last: share of the short choices that put the question after the options.
    turns: turns a row at most. length: tokens a row. rows: rows in each part of a step.
    beside: what the second part of a step asks, when it is not the same.
    strict: ask questions that have several right answers by letter only.
    """

    until: int
    kinds: dict[str, float]
    choice: float
    single: float
    textual: float
    short: float = 1.0
    most: int = 4
    last: float = 0.0
    turns: int = 1
    length: int = 64
    rows: int = 80
    strict: bool = True
    beside: Phase | None = None
    by_letter: dict[str, float] = field(default_factory=dict)


def _all(weight: float) -> dict[str, float]:
    """Every kind equally often, save three that only some phases ask."""
    return dict.fromkeys(ASK, weight) | {"recall": 0.0, "after": 0.0, "simple_exist": 0.0}


_RECALL = Phase(  # bindings in texts
    0,
    {"recall": 8, "naming": 4, "rule": 1.5, "lookup": 0.5},
    choice=0.1,
    single=0.5,
    textual=0.8,
    length=56,
    rows=90,
)
_AFTER = replace(_RECALL, kinds={"after": 8, "naming": 4, "rule": 2, "lookup": 0.5})
_SEVERAL = Phase(  # letters for what is shown among several things, and bindings in texts
    0,
    {"after": 3, "naming": 2, "rule": 1, "colour_of": 1.5, "kind_of": 1.5, "place": 1.5}
    | {"at_place": 1, "count": 2},
    choice=0.5,
    by_letter={"rule": 0.1, "after": 0.1},
    single=0.2,
    textual=0.3,
    most=6,
)
_WEAKEST = Phase(  # what was learnt last, short; a little of all else
    0,
    _all(0.4)
    | {"count": 4, "rule": 3, "after": 3, "naming": 1.5, "colour_of": 1, "kind_of": 1}
    | {"place": 1.5, "match": 1, "caption": 0.1},
    choice=0.35,
    by_letter={"rule": 0.1, "after": 0.1, "count": 0.2},
    single=0.25,
    textual=0.2,
    most=6,
)
_WHOLE = Phase(  # whole prompts
    0,
    _all(1.0)
    | {"exist": 1.5, "negated": 2, "match": 3, "naming": 2.5, "reading": 3}
    | {"caption": 0.1, "copy": 0.4, "simple_exist": 0.2},
    choice=0.65,
    short=0.1,
    single=0.4,
    textual=0.18,
    most=8,
    turns=2,
    length=120,
    rows=42,
)
PHASES = (
    Phase(  # yes or no and look-up by letter in their plainest forms; texts; one thing
        500,
        {"simple_exist": 7, "lookup": 4, "recall": 2, "at_place": 1.5, "shape": 0.7}
        | {"colour": 0.7, "copy": 0.7, "reading": 0.7, "naming": 0.7},
        choice=0.2,
        by_letter={"simple_exist": 0.05, "recall": 0.1},
        single=0.7,
        textual=0.2,
        last=0.5,
        strict=False,
        length=48,
        rows=64,
    ),
    Phase(  # all questions, short
        1300,
        _all(0.6)
        | {"simple_exist": 2, "exist": 4, "negated": 3, "match": 3, "lookup": 2, "reading": 1.5}
        | {"recall": 1.5, "naming": 1.5},
        choice=0.4,
        by_letter={"recall": 0.1},
        single=0.55,
        textual=0.2,
        last=0.3,
        strict=False,
        length=60,
        rows=52,
    ),
    Phase(  # letters for what is shown; not; names; text and image
        1700,
        _all(0.15)
        | {"shape": 2, "colour": 2, "exist": 2, "negated": 2.5, "match": 2.5, "naming": 2}
        | {"recall": 1.5, "reading": 1, "lookup": 0.7, "colour_of": 0.7, "kind_of": 0.7}
        | {"place": 0.5},
        choice=0.5,
        by_letter={
            "exist": 0.2,
            "negated": 0.1,
            "match": 0.1,
            "naming": 0.2,
            "recall": 0.1,
            "reading": 0.2,
            "shape": 0.9,
            "colour": 0.9,
        },
        single=0.65,
        textual=0.2,
        last=0.3,
        strict=False,
        length=60,
        rows=84,
    ),
    Phase(  # among several things, and bindings in texts beside them
        2400,
        _all(0.3)
        | {"colour_of": 1.5, "kind_of": 1.5, "place": 1.5, "at_place": 1.5, "count": 1.5}
        | {"exist": 1.5, "negated": 2, "match": 2.5, "naming": 2, "recall": 1.5, "caption": 0.8},
        choice=0.4,
        by_letter={"match": 0.15, "naming": 0.15, "recall": 0.1, "reading": 0.3, "negated": 0.25},
        single=0.4,
        textual=0.15,
        most=5,
        last=0.2,
        beside=_RECALL,
    ),
    replace(_WHOLE, until=2500, beside=_RECALL),
    replace(_WHOLE, until=2900, beside=_AFTER),
    Phase(  # whole prompts, mostly about several things
        3500,
        _all(0.6)
        | {"colour_of": 2.5, "kind_of": 2.5, "place": 2.5, "at_place": 2, "count": 2.5}
        | {"naming": 1.5, "reading": 2, "match": 1.5, "negated": 1, "exist": 1}
        | {"caption": 0.1},
        choice=0.7,
        short=0.1,
        single=0.3,
        textual=0.15,
        most=8,
        turns=2,
        length=120,
        rows=42,
        beside=_SEVERAL,
    ),
    Phase(  # whole prompts, mostly letters for what must be found; what is weakest beside them
        10**9,
        _all(0.5)
        | {"colour_of": 3, "kind_of": 3, "place": 3, "at_place": 2, "count": 1.5}
        | {"naming": 2.5, "reading": 2.5, "match": 1.2, "caption": 0.1},
        choice=0.8,
        short=0.1,
        single=0.25,
        textual=0.15,
        most=8,
        turns=2,
        length=120,
        rows=42,
        beside=_WEAKEST,
    ),
)
PARTS = 2  # a step is the mean of so many batches; as many processes may share it


def phase_at(step: int, part: int = 0) -> Phase:
    """The phase in force for a part of a step of the language stage."""
    phase = next(p for p in PHASES if step < p.until)
    return phase.beside if part and phase.beside else phase
