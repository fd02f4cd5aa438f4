"""Scenes are data, and the same data gives the same pixels."""

import hashlib
import math

import numpy as np
import pytest

from fedmllm.data.scenes import (
    COLOURS,
    GROUNDS,
    KINDS,
    MIN_CONTRAST,
    PLACES,
    SIZE,
    Scene,
    Thing,
    contrast,
    draw,
    sample_ground,
    sample_scene,
    sample_single,
    visible,
)
from fedmllm.rng import stream

PALE = (240, 240, 240)


def pixels(scene: Scene) -> np.ndarray:
    return np.asarray(draw(scene)).astype(int)


def samples(count: int = 60) -> list[Scene]:
    return [sample_scene(stream(1, "test", i)) for i in range(count)]


def test_the_same_seed_draws_the_same_pixels_as_when_the_model_was_trained():
    digest = hashlib.sha256()
    for i in range(40):
        rng = stream(7, "golden", i)
        digest.update(draw(sample_scene(rng)).tobytes() + draw(sample_single(rng)).tobytes())
    assert digest.hexdigest()[:16] == "4ae9057773cab205"


def test_drawing_twice_and_sampling_twice_agree_and_other_seeds_differ():
    first, again, other = (sample_scene(stream(s, "x")) for s in (3, 3, 4))
    assert first == again
    assert draw(first).tobytes() == draw(again).tobytes()
    assert draw(first).tobytes() != draw(other).tobytes()


@pytest.mark.parametrize("colour", COLOURS)
def test_a_thing_is_drawn_in_its_colour_on_its_ground(colour):
    scene = Scene((Thing("circle", colour, 20.0, 40.0, 10.0),), (100, 90, 60))
    drawn = pixels(scene)
    assert drawn.shape == (SIZE, SIZE, 3)
    assert tuple(drawn[40, 20]) == COLOURS[colour]
    assert tuple(drawn[5, 60]) == (100, 90, 60)


def test_shade_shifts_the_colour_and_stays_within_bytes():
    thing = Thing("circle", "red", 32.0, 32.0, 10.0, shade=(10, 5, -5))
    assert thing.rgb == (255, 5, 0)
    assert tuple(pixels(Scene((thing,), PALE))[32, 32]) == (255, 5, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_stays_within_its_size_and_fills_part_of_it(kind):
    drawn = pixels(Scene((Thing(kind, "blue", 32.0, 32.0, 12.0),), PALE))
    rows, columns = np.nonzero((drawn != PALE).any(-1))
    assert rows.min() >= 19
    assert columns.min() >= 19
    assert rows.max() <= 45
    assert columns.max() <= 45
    assert 100 < len(rows) < 600


def test_all_kinds_look_different():
    looks = {draw(Scene((Thing(k, "blue", 32.0, 32.0, 12.0),), PALE)).tobytes() for k in KINDS}
    assert len(looks) == len(KINDS) == 12


def test_a_ring_and_a_house_show_the_ground_through_their_openings():
    ring = pixels(Scene((Thing("ring", "red", 32.0, 32.0, 12.0),), PALE))
    assert tuple(ring[32, 32]) == PALE
    house = pixels(Scene((Thing("house", "red", 32.0, 32.0, 12.0),), PALE))
    assert tuple(house[40, 32]) == PALE
    assert tuple(house[28, 32]) == (255, 0, 0)


def test_no_two_things_share_a_place_and_none_touches_another_quadrant():
    for scene in samples():
        places = [thing.place for thing in scene.things]
        assert len(set(places)) == len(places)
        for thing in scene.things:
            assert min(abs(thing.x - SIZE / 2), abs(thing.y - SIZE / 2)) >= 3
            assert thing.place in PLACES


def test_one_to_four_things_all_visible_and_sometimes_alike():
    scenes = samples(200)
    assert {len(s.things) for s in scenes} == {1, 2, 3, 4}
    for scene in scenes:
        assert all(contrast(t.colour, scene.ground) >= MIN_CONTRAST for t in scene.things)
    repeats = [len({t.kind for t in s.things}) < len(s.things) for s in scenes]
    assert 0.1 < np.mean(repeats) < 0.5


def test_samplers_keep_to_the_kinds_colours_count_and_ground_that_are_asked():
    for i in range(30):
        rng = stream(2, "asked", i)
        scene = sample_scene(
            rng, count=3, kinds=("ring", "star"), colours=("gray", "white"), ground="dark"
        )
        assert len(scene.things) == 3
        assert {t.kind for t in scene.things} <= {"ring", "star"}
        assert {t.colour for t in scene.things} <= {"gray", "white"}
        assert max(scene.ground) <= 70
        single = sample_single(rng, kinds=("moon",), colours=("teal",))
        assert [(t.kind, t.colour) for t in single.things] == [("moon", "teal")]


@pytest.mark.parametrize(
    ("name", "low", "high"), [("pale", 222, 255), ("dark", 6, 66), ("mid", 35, 235)]
)
def test_grounds_keep_their_brightness(name, low, high):
    assert name in GROUNDS
    values = [sample_ground(stream(5, "ground", i), name) for i in range(100)]
    assert low <= np.min(values)
    assert np.max(values) <= high


def test_black_is_visible_on_a_lighter_dark_ground_only():
    assert "black" in visible((60, 60, 60))
    assert "black" not in visible((20, 20, 20))


def test_noise_has_the_strength_that_the_scene_names():
    quiet, loud = Scene((), (128, 128, 128)), Scene((), (128, 128, 128), noise=8.0, noise_seed=3)
    assert pixels(quiet).std() == 0
    assert math.isclose(pixels(loud).std(), 8.0, rel_tol=0.05)
    assert (pixels(loud) != pixels(Scene((), (128, 128, 128), 8.0, 4))).any()
