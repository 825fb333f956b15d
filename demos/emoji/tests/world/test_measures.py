"""Measures of pictures without a judge: true pictures pass them, and what is wrong in them is found."""

from dataclasses import replace

import pytest

from mole_world.drawings import Drawings, default_folder
from mole_world.measures import touches_as_said
from mole_world.scenes import CONTACTS, Scene


@pytest.fixture(scope="module")
def drawings():
    return Drawings(default_folder())


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
