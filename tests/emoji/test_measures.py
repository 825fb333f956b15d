"""Measures of pictures without a judge: true pictures pass them, and what is wrong in them is found."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mole_diffusers.emoji.drawings import Drawings, default_folder
from mole_diffusers.emoji.measures import halves, touches_as_said
from mole_diffusers.emoji.scenes import CONTACTS, Scene

BACKGROUNDS = ("open", "beach", "forest", "city", "white")


@pytest.fixture(scope="module")
def drawings():
    return Drawings(default_folder())


def left_and_right(first, second):
    return Image.fromarray(np.concatenate([np.asarray(first)[:, :64], np.asarray(second)[:, 64:]], 1))


def test_a_true_picture_is_one_scene_and_halves_of_two_are_not(drawings):
    whole, pasted = [], []
    for seed in range(30):
        scene = Scene(("bear", "owl"), "noto", BACKGROUNDS[seed % 5])
        other = replace(scene, background=BACKGROUNDS[(seed + 1) % 5])
        first, second = drawings.picture(scene, seed=seed), drawings.picture(other, seed=seed + 100)
        whole.append(halves(first).of_one_scene)
        pasted.append(halves(left_and_right(first, second)).of_one_scene)
    assert all(whole)
    assert np.mean(pasted) <= 0.05


def test_halves_say_what_differs(drawings):
    night, day = (drawings.picture(Scene(("bear", "owl"), "noto", "snow", light=light)) for light in ("night", "day"))
    found = halves(left_and_right(night, day))
    assert found.sky > 60
    assert found.ground > 30
    assert found.step > 0.95
    assert halves(night).sky < 2


@pytest.mark.parametrize(("relation", "light"), [*((relation, "day") for relation in CONTACTS), ("riding", "night")])
def test_the_order_of_two_in_contact_is_read_from_the_picture(drawings, relation, light):
    scene = Scene(("penguin", "castle"), "twemoji", "open", relation, light=light)
    size = scene.size
    true = drawings.picture(scene, drawings.touching(scene, 56, 0.33))
    assert touches_as_said(true, drawings, scene)
    turned = next(r for r, front in CONTACTS.items() if front != CONTACTS[relation])
    boxes = drawings.touching(scene, 56, 0.33)
    wrong = drawings.picture(replace(scene, relation=turned, canvas=size), boxes)  # the same places, the other in front
    assert not touches_as_said(wrong, drawings, scene)


def test_a_rider_is_above_what_it_rides(drawings):
    scene = Scene(("penguin", "castle"), "noto", "white", "riding")
    exchanged = replace(scene, subjects=("castle", "penguin"))
    assert not touches_as_said(drawings.picture(exchanged), drawings, scene)
