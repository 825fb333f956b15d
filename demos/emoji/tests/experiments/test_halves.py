"""Two scenes pasted side by side are told from one, by pixels alone."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mole_world import Drawings, Scene, default_folder

BACKGROUNDS = ("open", "beach", "forest", "city", "white")


@pytest.fixture(scope="module")
def drawings():
    return Drawings(default_folder())


def left_and_right(first, second):
    return Image.fromarray(np.concatenate([np.asarray(first)[:, :64], np.asarray(second)[:, 64:]], 1))


def test_a_true_picture_is_one_scene_and_halves_of_two_are_not(script, drawings):
    halves = script("halves").halves
    whole, pasted = [], []
    for seed in range(30):
        scene = Scene(("bear", "owl"), "noto", BACKGROUNDS[seed % 5])
        other = replace(scene, background=BACKGROUNDS[(seed + 1) % 5])
        first, second = drawings.picture(scene, seed=seed), drawings.picture(other, seed=seed + 100)
        whole.append(halves(first).of_one_scene)
        pasted.append(halves(left_and_right(first, second)).of_one_scene)
    assert all(whole)
    assert np.mean(pasted) <= 0.05


def test_halves_say_what_differs(script, drawings):
    halves = script("halves").halves
    night, day = (drawings.picture(Scene(("bear", "owl"), "noto", "snow", light=light)) for light in ("night", "day"))
    found = halves(left_and_right(night, day))
    assert found.sky > 60
    assert found.ground > 30
    assert found.step > 0.95
    assert halves(night).sky < 2
