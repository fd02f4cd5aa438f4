"""Procedural 64x64 scenes: a few coloured things on a plain ground.

A scene is data (what stands where), `draw` turns it into pixels. Both are deterministic: samplers
take an explicit generator (`fedmllm.rng.stream`), and the pixel noise derives from the scene's own
`noise_seed`. The embedded model is pre-trained on these scenes and the embedded tasks draw from
them, so the pictures must stay the same to the last bit: a test pins their hash.

Coordinates are pixels of the finished picture, x to the right and y down, origin at the top left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from fedmllm.rng import stream

SIZE = 64  # pixels a side
_OVERSAMPLE = 4  # drawn larger, then box-averaged: smooth edges

RGB = tuple[int, int, int]
# The first eight are the palette of easy-VQA, value for value.
COLOURS: dict[str, RGB] = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
    "white": (255, 255, 255),
    "orange": (255, 150, 0),
    "purple": (128, 0, 128),
    "pink": (255, 110, 190),
}
PLACES = ("top left", "top right", "bottom left", "bottom right")
GROUNDS = ("pale", "dark", "mid")
MIN_CONTRAST = 80.0  # Euclidean RGB distance between a thing and the ground
# (low, high) of a ground's brightness, and how far one channel may stray from it
_GROUND_RANGE = {"pale": (232, 250, 10), "dark": (12, 60, 6), "mid": (80, 190, 45)}


@dataclass(frozen=True)
class Thing:
    """One object. `size` is half its extent in pixels; `aspect` > 1 is wider than tall."""

    kind: str
    colour: str
    x: float
    y: float
    size: float
    aspect: float = 1.0
    angle: float = 0.0  # degrees, clockwise
    shade: RGB = (0, 0, 0)  # added to the colour's RGB value

    @property
    def place(self) -> str:
        """The quadrant of the thing's centre, one of `PLACES`."""
        return PLACES[2 * (self.y >= SIZE / 2) + (self.x >= SIZE / 2)]

    @property
    def rgb(self) -> RGB:
        """The colour as it is drawn."""
        red, green, blue = (
            min(255, max(0, c + s)) for c, s in zip(COLOURS[self.colour], self.shade, strict=True)
        )
        return red, green, blue

    def __str__(self) -> str:
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True)
class Scene:
    """Things on a ground. `noise` is the standard deviation of the pixel noise in grey levels."""

    things: tuple[Thing, ...]
    ground: RGB
    noise: float = 0.0
    noise_seed: int = 0


# ---------------------------------------------------------------- outlines, in [-1, 1] squared
Outline = list[tuple[float, float]]


def _arc(radius: float, start: float, stop: float, x: float = 0.0, y: float = 0.0) -> Outline:
    """Points of a circle's arc from `start` to `stop` degrees."""
    turns = np.radians(np.linspace(start, stop, 25))
    return [(x + radius * math.cos(t), y + radius * math.sin(t)) for t in turns]


def _box(left: float, top: float, right: float, bottom: float) -> Outline:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _star() -> Outline:
    spikes = [(1.0 if i % 2 == 0 else 0.42, math.radians(36 * i - 90)) for i in range(10)]
    return [(r * math.cos(t), r * math.sin(t)) for r, t in spikes]


def _cross() -> Outline:
    corner = [(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3)]
    return [*corner, *((-x, -y) for x, y in corner)]


_HOUSE = [(0, -1), (1, -0.1), (0.75, -0.1), (0.75, 1), (-0.75, 1), (-0.75, -0.1), (-1, -0.1)]
_CABIN = [(-0.55, 0), (-0.35, -0.55), (0.3, -0.55), (0.6, 0)]
_LIMBS = [(-0.55, -0.35), (0.55, -0.35), (0.3, 0.3), (0.5, 1), (0.15, 1), (0, 0.45)]

# kind -> outlines in drawing order; True fills with the colour, False cuts back to the ground
SHAPES: dict[str, list[tuple[Outline, bool]]] = {
    "circle": [(_arc(1, 0, 360), True)],
    "rectangle": [(_box(-0.9, -0.9, 0.9, 0.9), True)],
    "triangle": [([(0, -0.9), (1, 0.85), (-1, 0.85)], True)],
    "star": [(_star(), True)],
    "cross": [(_cross(), True)],
    "ring": [(_arc(1, 0, 360), True), (_arc(0.55, 0, 360), False)],
    "diamond": [([(0, -1), (0.7, 0), (0, 1), (-0.7, 0)], True)],
    "moon": [(_arc(1, 60, 300), True), (_arc(0.8, 0, 360, x=0.45), False)],
    "house": [(_HOUSE, True), (_box(-0.25, 0.3, 0.25, 1.02), False)],
    "car": [
        (_box(-1, -0.05, 1, 0.45), True),
        (_CABIN, True),
        (_arc(0.28, 0, 360, -0.5, 0.45), True),
        (_arc(0.28, 0, 360, 0.5, 0.45), True),
    ],
    "person": [
        (_arc(0.3, 0, 360, 0, -0.7), True),
        ([*_LIMBS, *((-x, y) for x, y in reversed(_LIMBS[2:5]))], True),
    ],
    "tree": [
        ([(0, -1), (0.6, -0.2), (-0.6, -0.2)], True),
        ([(0, -0.55), (0.8, 0.45), (-0.8, 0.45)], True),
        (_box(-0.18, 0.4, 0.18, 1), True),
    ],
}
KINDS = tuple(SHAPES)


def _corners(outline: Outline, thing: Thing) -> list[tuple[float, float]]:
    """The outline scaled, turned and moved to the thing's place, in oversampled pixels."""
    wide, tall = min(1.0, thing.aspect), min(1.0, 1 / thing.aspect)
    turn = math.radians(thing.angle)
    cos, sin = math.cos(turn) * thing.size, math.sin(turn) * thing.size
    points = ((x * wide, y * tall) for x, y in outline)
    return [
        (_OVERSAMPLE * (thing.x + x * cos - y * sin), _OVERSAMPLE * (thing.y + x * sin + y * cos))
        for x, y in points
    ]


def draw(scene: Scene) -> Image.Image:
    """The scene as a 64x64 picture in mode RGB. The same scene gives the same pixels."""
    canvas = Image.new("RGB", (SIZE * _OVERSAMPLE, SIZE * _OVERSAMPLE), scene.ground)
    pen = ImageDraw.Draw(canvas)
    for thing in scene.things:
        for outline, filled in SHAPES[thing.kind]:
            pen.polygon(_corners(outline, thing), fill=thing.rgb if filled else scene.ground)
    small = canvas.reduce(_OVERSAMPLE)
    if scene.noise == 0:
        return small
    rng = stream(scene.noise_seed, "scene-noise")
    grain = rng.integers(-256, 257, (SIZE, SIZE, 3)) * (
        scene.noise / 148
    )  # sd of the integers: 148
    return Image.fromarray(np.clip(np.rint(np.asarray(small) + grain), 0, 255).astype(np.uint8))


# ---------------------------------------------------------------- samplers
def contrast(colour: str, ground: RGB) -> float:
    """Euclidean distance in RGB between a named colour and a ground."""
    return math.dist(COLOURS[colour], ground)


@cache
def visible(ground: RGB, colours: tuple[str, ...] = tuple(COLOURS)) -> tuple[str, ...]:
    """Those of `colours` that stand out from the ground."""
    return tuple(c for c in colours if contrast(c, ground) >= MIN_CONTRAST)


def sample_ground(rng: np.random.Generator, name: str | None = None) -> RGB:
    """A ground colour. `name` is one of `GROUNDS`; drawn (half of them pale) when None."""
    name = name or GROUNDS[rng.choice(3, p=[0.5, 0.25, 0.25])]
    low, high, stray = _GROUND_RANGE[name]
    red, green, blue = rng.integers(low, high + 1) + rng.integers(-stray, stray + 1, 3)
    return min(255, max(0, int(red))), min(255, max(0, int(green))), min(255, max(0, int(blue)))


def sample_thing(
    rng: np.random.Generator, kind: str, colour: str, place: str | None = None, size: float = 0.0
) -> Thing:
    """A thing in a quadrant with jitter, or, without `place`, anywhere in the picture.

    `size` 0 draws it: 7 to 13 pixels in a quadrant, 5 to 16 anywhere.
    """
    size = size or float(rng.uniform(*((7, 13) if place else (5, 16))))
    if place:
        column, row = PLACES.index(place) % 2, PLACES.index(place) // 2
        reach = max(0.0, SIZE / 4 - size)
        x, y = (SIZE * (0.25 + 0.5 * i) + rng.uniform(-reach, reach) for i in (column, row))
    else:
        x, y = rng.uniform(size - 1, SIZE - size + 1, 2)
    aspect = 1.0
    if kind == "rectangle":
        aspect = float(np.exp(rng.uniform(-1, 1)))
    red, green, blue = (int(s) for s in rng.integers(-12, 13, 3))
    angle = float(rng.uniform(-12, 12)) if rng.random() < 0.5 else 0.0
    return Thing(kind, colour, float(x), float(y), size, aspect, angle, (red, green, blue))


def sample_scene(
    rng: np.random.Generator,
    *,
    count: int | None = None,
    kinds: Sequence[str] = KINDS,
    colours: Sequence[str] = tuple(COLOURS),
    ground: str | None = None,
) -> Scene:
    """A scene of 1 to 4 things, each in a quadrant of its own.

    Kinds and colours repeat more often than chance would have it (in three of ten scenes each
    comes from a pool of two), so that counting is worth asking. A colour too close to the ground
    is not drawn; when none of `colours` stands out, another ground is tried.
    """
    count = count or int(rng.integers(1, 5))
    shown = sample_ground(rng, ground)
    while not visible(shown, tuple(colours)):
        shown = sample_ground(rng, ground)
    pools = []
    for pool in (tuple(kinds), visible(shown, tuple(colours))):
        narrow = len(pool) > 2 and rng.random() < 0.3
        pools.append([str(p) for p in rng.choice(pool, 2, replace=False)] if narrow else pool)
    things = tuple(
        sample_thing(rng, _pick(rng, pools[0]), _pick(rng, pools[1]), PLACES[place])
        for place in sorted(rng.choice(4, count, replace=False))
    )
    return Scene(things, shown, _noise(rng), int(rng.integers(2**31)))


def sample_single(
    rng: np.random.Generator,
    *,
    kinds: Sequence[str] = KINDS,
    colours: Sequence[str] = tuple(COLOURS),
    ground: str | None = None,
) -> Scene:
    """One thing of any size anywhere in the picture, as in easy-VQA."""
    shown = sample_ground(rng, ground)
    while not visible(shown, tuple(colours)):
        shown = sample_ground(rng, ground)
    thing = sample_thing(rng, _pick(rng, kinds), _pick(rng, visible(shown, tuple(colours))))
    return Scene((thing,), shown, _noise(rng), int(rng.integers(2**31)))


def _pick(rng: np.random.Generator, items: Sequence[str]) -> str:
    return items[int(rng.integers(len(items)))]


def _noise(rng: np.random.Generator) -> float:
    """No noise in a third of the scenes, otherwise up to 12 grey levels."""
    return max(0.0, float(rng.uniform(-6, 12)))
