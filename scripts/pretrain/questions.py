"""Questions about scenes and texts, with answers and wrong answers, one function per kind.

A function returns None when the scene does not allow the question (where is the star, when there
are two). Every kind has several surface forms; the wordings of easy-VQA are held out, so that it
stays a test of the base. The random source is `random.Random`, seeded from
`fedmllm.rng.stream_seed`: scalar draws cost a tenth of NumPy's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from pretrain.words import (
    CONTENT,
    CRISIS,
    CRISIS_CLASSES,
    LABELS,
    MEDICAL,
    NUMBERS,
    PLURALS,
    THINGS,
    WORDS,
)

from fedmllm.data.scenes import COLOURS, KINDS, PLACES, Scene, Thing

YES_NO = ("yes", "no")
COLOUR_NAMES = tuple(COLOURS)


@dataclass(frozen=True)
class Asked:
    """A question; `others` are wrong answers to offer; `text` is the line it is about, if any."""

    kind: str
    question: str
    answer: str
    others: tuple[str, ...] = ()
    text: str | None = None
    needs_image: bool = True
    only_choice: bool = False  # without its options the question has several right answers


def _said(rng: Random, *forms: str, **slots: str) -> str:
    """One of the forms with the slots filled in; colour is spelt either way."""
    form = rng.choice(forms).format(**slots)
    return form.replace(" color", " colour") if rng.random() < 0.3 else form


def _noun(rng: Random) -> str:
    return rng.choice(("shape", "thing"))


def _article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _only(scene: Scene, **want: str) -> Thing | None:
    """The one thing with these attributes; None when there is none or more than one."""
    found = [t for t in scene.things if all(getattr(t, k) == v for k, v in want.items())]
    return found[0] if len(found) == 1 else None


# ---------------------------------------------------------------- one thing
def shape(rng: Random, scene: Scene) -> Asked | None:
    """What is shown?"""
    if len(scene.things) != 1:
        return None
    thing = scene.things[0]
    question = _said(
        rng,
        "what is shown?",
        "what is in the image?",
        "what thing is this?",
        "what {noun} is shown in the picture?",
        "what does the image show?",
        "which {noun} do you see?",
        "what do you see?",
        noun=_noun(rng),
    )
    return Asked("shape", question, thing.kind, KINDS)


def colour(rng: Random, scene: Scene) -> Asked | None:
    """What color is the shape?"""
    if len(scene.things) != 1:
        return None
    name = rng.choice((scene.things[0].kind, "shape", "thing"))
    question = _said(
        rng,
        "which color is the {name}?",
        "which color does the {name} have?",
        "what color is shown?",
        "in what color is the {name} shown?",
        name=name,
    )
    return Asked("colour", question, scene.things[0].colour, COLOUR_NAMES)


# ---------------------------------------------------------------- yes or no
def _target(rng: Random, scene: Scene) -> tuple[str, str, bool]:
    """(kind or "shape"/"thing", colour or "", whether the scene holds it), half of them held.

    Absent targets are mostly near misses: the colour of one thing with the kind of another.
    """
    by = rng.choice(("kind", "colour", "both"))
    held = rng.random() < 0.5
    for _ in range(50):
        near, other = rng.choice(scene.things), rng.choice(scene.things)
        name, hue = near.kind, near.colour
        if not held:
            name = rng.choice((name, other.kind, rng.choice(KINDS)))
            hue = rng.choice((hue, other.colour, rng.choice(COLOUR_NAMES)))
        there = any(
            (by == "colour" or t.kind == name) and (by == "kind" or t.colour == hue)
            for t in scene.things
        )
        if there == held:
            break
    noun = _noun(rng) if by == "colour" else name
    return noun, "" if by == "kind" else hue, there


def _phrase(noun: str, hue: str) -> str:
    return f"{hue} {noun}" if hue else noun


def _verdict(truth: bool) -> str:
    return "yes" if truth else "no"


def exist(rng: Random, scene: Scene) -> Asked:
    """Do you see a red circle?"""
    noun, hue, there = _target(rng, scene)
    question = _said(
        rng,
        "does the image show {x}?",
        "do you see {x}?",
        "is {x} shown in the picture?",
        "can you see {x} here?",
        "is {x} in the picture?",
        x=_article(_phrase(noun, hue)),
    )
    return Asked("exist", question, _verdict(there), YES_NO)


def simple_exist(rng: Random, scene: Scene) -> Asked:
    """Do you see a circle? One form, one attribute: the first lesson in yes and no."""
    by, pool = rng.choice((("kind", KINDS), ("colour", COLOUR_NAMES)))
    held = [getattr(thing, by) for thing in scene.things]
    name = rng.choice(held) if rng.random() < 0.5 else rng.choice(pool)
    asked = _article(name if by == "kind" else f"{name} thing")
    return Asked("simple_exist", f"do you see {asked}?", _verdict(name in held), YES_NO)


def negated(rng: Random, scene: Scene) -> Asked:
    """Is there no red circle?"""
    noun, hue, there = _target(rng, scene)
    bare = _phrase(noun, hue)
    question = _said(
        rng,
        "is there no {bare}?",
        "is there no {bare} in the picture?",
        "does the image not show {x}?",
        "is {x} not shown?",
        "do you not see {x}?",
        "is {x} not in the picture?",
        x=_article(bare),
        bare=bare,
    )
    return Asked("negated", question, _verdict(not there), YES_NO)


# ---------------------------------------------------------------- several things
def colour_of(rng: Random, scene: Scene) -> Asked | None:
    """Which color is the star, among several things?"""
    thing = rng.choice(scene.things)
    if len(scene.things) < 2 or _only(scene, kind=thing.kind) is None:
        return None
    question = _said(
        rng,
        "which color is the {x}?",
        "which color does the {x} have?",
        "in what color is the {x} shown?",
        x=thing.kind,
    )
    return Asked("colour_of", question, thing.colour, _near_first(rng, scene, "colour"))


def kind_of(rng: Random, scene: Scene) -> Asked | None:
    """What is the red thing, among several?"""
    thing = rng.choice(scene.things)
    if len(scene.things) < 2 or _only(scene, colour=thing.colour) is None:
        return None
    question = _said(
        rng,
        "what is the {x} thing?",
        "what shape is {x}?",
        "which thing is {x}?",
        "which shape is {x}?",
        x=thing.colour,
    )
    return Asked("kind_of", question, thing.kind, _near_first(rng, scene, "kind"))


def _near_first(rng: Random, scene: Scene, attribute: str) -> tuple[str, ...]:
    """Wrong answers; in half of the cases those that the scene holds come first."""
    names = {"colour": COLOUR_NAMES, "kind": KINDS}[attribute]
    if rng.random() < 0.5:
        return names
    held = tuple(dict.fromkeys(getattr(t, attribute) for t in scene.things))
    return (*held, "|", *names)


def place(rng: Random, scene: Scene) -> Asked | None:
    """Where is the star?"""
    thing = rng.choice(scene.things)
    by = rng.choice(("kind", "colour"))
    if _only(scene, **{by: getattr(thing, by)}) is None or _off_centre(thing) < 5:
        return None
    name = thing.kind if by == "kind" else f"{thing.colour} {_noun(rng)}"
    question = _said(
        rng,
        "where is the {x}?",
        "where is the {x} in the image?",
        "where do you see the {x}?",
        "in what place is the {x}?",
        x=rng.choice((name, str(thing))),
    )
    return Asked("place", question, thing.place, PLACES)


def _off_centre(thing: Thing) -> float:
    """How far the centre is from the middle lines: nearer than 5 pixels the place is unclear."""
    return min(abs(thing.x - 32), abs(thing.y - 32))


def at_place(rng: Random, scene: Scene) -> Asked | None:
    """What is at the top left?"""
    if any(_off_centre(t) < 5 for t in scene.things):
        return None
    spot = rng.choice((rng.choice(scene.things).place, rng.choice(PLACES)))
    thing = _only(scene, place=spot)
    if thing and rng.random() < 0.4:
        question = _said(
            rng,
            "what color is the thing at the {x}?",
            "what color is at the {x}?",
            "what color is the {x} shape?",
            x=spot,
        )
        return Asked("at_place", question, thing.colour, _near_first(rng, scene, "colour"))
    question = _said(
        rng,
        "what is at the {x}?",
        "what is in the {x}?",
        "what do you see at the {x}?",
        "what shape is at the {x}?",
        x=spot,
    )
    others = (*_near_first(rng, scene, "kind"), "nothing")
    return Asked("at_place", question, thing.kind if thing else "nothing", others)


def count(rng: Random, scene: Scene) -> Asked:
    """How many circles are there?"""
    by = rng.choice(("all", "kind", "colour"))
    thing = rng.choice(scene.things)
    if by == "all":
        number, name = len(scene.things), rng.choice(("things", "shapes"))
    elif by == "kind":
        kind = thing.kind if rng.random() < 0.85 else rng.choice(KINDS)
        number, name = sum(t.kind == kind for t in scene.things), PLURALS[kind]
    else:
        hue = thing.colour if rng.random() < 0.85 else rng.choice(COLOUR_NAMES)
        number = sum(t.colour == hue for t in scene.things)
        name = f"{hue} {rng.choice(('things', 'shapes'))}"
    question = _said(
        rng,
        "how many {x} are there?",
        "how many {x} are in the image?",
        "how many {x} do you see?",
        "count the {x}.",
        x=name,
    )
    return Asked("count", question, str(number), NUMBERS[:6])


def caption(rng: Random, scene: Scene) -> Asked:
    """A list of all that is there: the densest lesson in reading image tokens. Not in the gate."""
    listed = ", ".join(f"{t} {t.place}" for t in scene.things)
    return Asked("caption", _said(rng, "describe the image.", "describe the picture."), listed)


# ---------------------------------------------------------------- text and image together
def _neutral(rng: Random, most: int = 4) -> str:
    """Up to `most` words that name no thing, colour or negation."""
    words = (rng.choice(WORDS) for _ in range(rng.randint(0, most)))
    return " ".join(w for w in words if w not in _LOADED)


_LOADED = {*KINDS, *COLOURS, *PLURALS.values(), "no", "not", "none", "nothing", "never", "without"}
_LOADED |= {"isn't", "don't", "can't", "only", "nobody", "square", "colour", "color"}
_MENTIONS = (
    "{a} is here",
    "we saw the {x} today",
    "look at this {x}",
    "my {x} is nice",
    "the {x} is near the water",
    "i love the {x}",
    "the {x}",
    "{xs} are good",
    "you see {xs} in town",
    "here {xs} are welcome",
    "please help the {x}",
    "they found {a} near the road",
    "{xs} and all that",
    "everyone should see {xs}",
)
_DENIALS = (
    "there is no {x} here",
    "{a} is not here",
    "no {xs}",
    "you do not see the {x}",
    "there are no {xs} in the image",
    "we can't see {a}",
    "{xs} are not in the picture",
    "not {a}",
)
_CLAIMS = (
    "there is {a} here",
    "{a} is here",
    "{xs}",
    "you do see the {x}",
    "there are {xs} in the image",
    "we can see {a}",
    "{xs} are in the picture",
    "{a}",
)


def _mention(rng: Random, noun: str, hue: str, forms: tuple[str, ...], wrap: float = 0.4) -> str:
    """A sentence that names a thing, in part wrapped in arbitrary neutral words."""
    many = PLURALS.get(noun, f"{noun}s")
    one, many = _phrase(noun, hue), _phrase(many, hue)
    said = rng.choice(forms).format(x=one, a=_article(one), xs=many)
    if rng.random() < wrap:
        said = f"{_neutral(rng)} {said} {_neutral(rng)}".strip()
    elif rng.random() < 0.2:
        said = f"{_neutral(rng)} {rng.choice((one, many))} {_neutral(rng)}".strip()
        return (
            " ".join(said.split())
            if forms is _MENTIONS
            else rng.choice(forms).format(x=one, a=_article(one), xs=many)
        )
    return said + rng.choice(("", "", ".", "!"))


def match(rng: Random, scene: Scene) -> Asked:
    """Does the image show what the text names?"""
    noun, hue, there = _target(rng, scene)
    style = rng.choice(("plain", "plain", "not", "claim", "only"))
    if style == "claim":
        return _claim(rng, noun, hue, there)
    text = _mention(rng, noun, hue, _MENTIONS)
    if style == "plain":
        question = _said(
            rng,
            "does the image show what the text names?",
            "is the thing of the text in the image?",
            "does the image contain what the text names?",
            "is what the text names in the image?",
            "do text and image go together?",
        )
        return Asked("match", question, _verdict(there), YES_NO, text)
    if style == "not":
        question = _said(
            rng,
            "does the image not show what the text names?",
            "is the thing of the text not in the image?",
            "does the image not contain what the text names?",
            "is what the text names not in the image?",
        )
        return Asked("match", question, _verdict(not there), YES_NO, text)
    alone = there and len(scene.things) == 1
    question = _said(
        rng,
        "is the only thing in the image what the text names?",
        "does the image show only what the text names?",
    )
    return Asked("match", question, _verdict(alone), YES_NO, text)


def _claim(rng: Random, noun: str, hue: str, there: bool) -> Asked:
    """Is the text true? The text claims or denies that a thing is shown."""
    denied = rng.random() < 0.5
    text = _mention(rng, noun, hue, _DENIALS if denied else _CLAIMS, wrap=0.3)
    question = _said(
        rng, "is the text true?", "is the text right?", "does the image show that the text is true?"
    )
    return Asked("match", question, _verdict(there != denied), YES_NO, text)


def rule(rng: Random, scene: Scene) -> Asked:
    """Say `love` if there is a red circle, else `fire`: yes or no under any two names."""
    base = rng.choice((exist, match))(rng, scene)
    while base.kind == "match" and " only " in base.question:
        base = match(rng, scene)
    first, second = rng.sample(LABELS if rng.random() < 0.3 else CONTENT, 2)
    form = rng.choice(("{q} if yes say {a}, if no say {b}.", "{q} yes is {a}, no is {b}.",
                       "say {a} if yes and {b} if no: {q}"))  # fmt: skip
    answer = first if base.answer == "yes" else second
    question = form.format(q=base.question, a=first, b=second)
    return replace(base, kind="rule", question=question, answer=answer, others=(first, second))


# ---------------------------------------------------------------- texts and names
def reading(rng: Random, scene: Scene | None) -> Asked:
    """Questions that the text alone answers."""
    form = rng.choice(("thing", "colour", "has", "next", "first", "pick"))
    if form in ("thing", "colour"):
        noun, hue = rng.choice(KINDS), rng.choice(COLOUR_NAMES)
        text = _mention(rng, noun, hue, _MENTIONS)
        if form == "thing":
            question = _said(rng, "which thing does the text name?", "what does the text name?",
                             "which shape is in the text?")  # fmt: skip
            return Asked("reading", question, noun, KINDS, text, False)
        question = _said(rng, "which color does the text name?", "what color is in the text?")
        return Asked("reading", question, hue, COLOUR_NAMES, text, False)
    words = rng.sample(CONTENT, rng.randint(3, 6))
    text = " ".join(words)
    if form == "has":
        held = rng.random() < 0.5
        word = rng.choice(words if held else CONTENT)
        denied = rng.random() < 0.3
        question = rng.choice(("does the text not contain {w}?", "is {w} not in the text?")
                              if denied else
                              ("does the text contain {w}?", "is {w} in the text?",
                               "is the word {w} named in the text?")).format(w=word)  # fmt: skip
        truth = (word in words) != denied
        return Asked("reading", question, _verdict(truth), YES_NO, text, False)
    if form == "next":
        at = rng.randrange(len(words) - 1)
        question = f"which word comes after {words[at]}?"
        return Asked(
            "reading", question, words[at + 1], (*words, "|", *rng.sample(CONTENT, 8)), text, False
        )
    if form == "first":
        last = rng.random() < 0.5
        question = f"what is the {'last' if last else 'first'} word?"
        return Asked(
            "reading", question, words[-last], (*words, "|", *rng.sample(CONTENT, 8)), text, False
        )
    word = rng.choice(words)
    others = tuple(w for w in rng.sample(CONTENT, 12) if w not in words)
    return Asked("reading", "which word is in the text?", word, others, text, False, True)


def recall(rng: Random, scene: Scene | None) -> Asked:
    """The two hardest forms of `reading`: the word after another, and whether a word is there."""
    asked = reading(rng, scene)
    while not asked.question.startswith("which word comes") and asked.others != YES_NO:
        asked = reading(rng, scene)
    return asked


def after(rng: Random, scene: Scene | None) -> Asked:
    """The hardest form of `reading`: the word after another."""
    asked = reading(rng, scene)
    while not asked.question.startswith("which word comes"):
        asked = reading(rng, scene)
    return asked


def naming(rng: Random, scene: Scene | None) -> Asked | None:
    """Here ring means kidney. What is the ring? New names for shapes, in the prompt only."""
    names = rng.sample(rng.choice((MEDICAL, CRISIS, THINGS, CONTENT)), 3)
    kinds = rng.sample(KINDS, 3)
    thing = None
    if scene is not None and len(scene.things) == 1 and rng.random() < 0.7:
        thing = scene.things[0]
        kinds = [thing.kind, *(k for k in kinds if k != thing.kind)][:3]
    pairs = list(zip(kinds, names, strict=True))[: rng.randint(1, 3)]
    asked = pairs[0]
    rng.shuffle(pairs)
    verb = rng.choice(("means", "is called", "is named"))
    text = ", ".join(f"{k} {verb} {n}" for k, n in pairs)
    if thing is None:
        question = rng.choice(("what is the {k}?", "what is the name of the {k}?",
                               "what is {k} called?")).format(k=asked[0])  # fmt: skip
    else:
        question = rng.choice(("what is shown?", "what is the name of the thing?",
                               "what is in the image called?"))  # fmt: skip
    return Asked(
        "naming",
        question,
        asked[1],
        (*names, "|", *rng.sample(CONTENT, 8)),
        text,
        thing is not None,
    )


def copying(rng: Random, scene: Scene | None) -> Asked:
    """Repeat some words: every word becomes an answer, odd ones letter by letter."""
    words = rng.sample(WORDS, rng.randint(1, 5))
    if rng.random() < 0.1:
        letters = "abcdefghijklmnopqrstuvwxyz"
        words[0] = "".join(rng.choice(letters) for _ in range(rng.randint(2, 5)))
    said = " ".join(words)
    return Asked("copy", f"repeat: {said}", said, (), None, False)


def lookup(rng: Random, scene: Scene | None) -> Asked:
    """Which option is fire? Meant for multiple choice: the word stands among the options."""
    pool = rng.choice((CONTENT, CONTENT, LABELS, CRISIS_CLASSES, KINDS, COLOUR_NAMES, YES_NO))
    word = rng.choice(pool)
    question = rng.choice(("which option is {w}?", "where is the option {w}?",
                           "which option says {w}?", "select {w}.")).format(w=word)  # fmt: skip
    others = tuple(rng.sample(pool, min(8, len(pool))))
    return Asked("lookup", question, word, others, None, False, True)


Ask = Callable[[Random, Scene], Asked | None]
SCENE_KINDS: dict[str, Ask] = {
    "shape": shape,
    "colour": colour,
    "simple_exist": simple_exist,
    "exist": exist,
    "negated": negated,
    "colour_of": colour_of,
    "kind_of": kind_of,
    "place": place,
    "at_place": at_place,
    "count": count,
    "match": match,
    "rule": rule,
    "caption": caption,
}
TEXT_KINDS: dict[str, Ask] = {
    "reading": reading,
    "recall": recall,
    "after": after,
    "naming": naming,
    "copy": copying,
    "lookup": lookup,
}
ASK: dict[str, Ask] = {**SCENE_KINDS, **TEXT_KINDS}
OPEN_GATE = ("shape", "colour", "exist", "negated", "colour_of", "kind_of", "place", "at_place",
             "count", "match", "rule", "reading", "naming", "copy")  # fmt: skip
CHOICE_GATE = (*(k for k in OPEN_GATE if k != "copy"), "lookup")
