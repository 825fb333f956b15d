"""Landscapes: one horizon across the picture, many pictures of one name, and one light for all that stands in it."""

import numpy as np
import pytest

from mole_world import words
from mole_world.drawings import Drawings, default_folder
from mole_world.landscapes import LANDSCAPES, LIGHTS, landscape, lit
from mole_world.scenes import Scene

SIZES = [(64, 64), (128, 64), (64, 128), (96, 96)]


def drawn(kind, light="day", size=(128, 64), seed=0):
    return landscape(kind, light, size, np.random.default_rng(seed))


def test_every_place_and_light_that_captions_name_can_be_drawn():
    assert set(LANDSCAPES) == {words.OPEN, *words.PLACES}
    assert set(LIGHTS) == set(words.LIGHTS)


@pytest.mark.parametrize("kind", LANDSCAPES)
@pytest.mark.parametrize("size", SIZES)
def test_a_landscape_is_a_family_of_pictures_and_one_seed_is_one_of_them(kind, size):
    first, again, other = (drawn(kind, size=size, seed=s) for s in (0, 0, 1))
    assert first.shape == (size[1], size[0], 3)
    assert 0 <= first.min() <= first.max() <= 255
    assert np.array_equal(first, again)
    assert np.abs(first - other).mean() > 2


@pytest.mark.parametrize("kind", LANDSCAPES)
def test_sky_and_ground_are_the_same_on_the_left_and_on_the_right(kind):
    for seed in range(20):
        picture = drawn(kind, seed=seed)
        for rows in (picture[:8], picture[-4:]):
            left, right = rows[:, :64].mean((0, 1)), rows[:, 64:].mean((0, 1))
            assert np.abs(left - right).max() < 25


def test_one_light_is_on_the_subject_and_on_what_stands_behind_it():
    drawings = Drawings(default_folder())
    day, night = (
        np.asarray(drawings.picture(Scene(("red apple",), "noto", "snow", light=light)), np.float32)
        for light in ("day", "night")
    )
    inside = slice(32, 44), slice(24, 40)  # of the apple
    assert np.allclose(night[inside], lit(day[inside], "night"), atol=1.1)
    assert night.mean() < day.mean() - 30


def test_what_is_left_open_comes_from_the_seed():
    drawings, scene = Drawings(default_folder()), Scene(("fox",), "noto", "open")
    first, again, other = (np.asarray(drawings.picture(scene, seed=s)) for s in (0, 0, 3))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
