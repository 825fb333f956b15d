"""Scenes of the emoji world: captions, canvases, places and which words are kept from whom."""

import numpy as np
import pytest
from PIL import Image

from mole_world import canvas, words
from mole_world.captions import FORMS, TAGGED
from mole_world.drawings import Drawings, default_folder
from mole_world.scenes import CONTACTS, RELATIONS, Scene, places, scene_in


@pytest.fixture(scope="module")
def drawings():
    return Drawings(default_folder())


def test_captions_name_style_subjects_place_and_background():
    assert Scene(("fox",), "ink").caption == "ink drawing of a fox"
    assert Scene(("owl", "fox"), "ink", "blue").caption == "ink drawing of an owl and a fox on a blue background"
    assert Scene(("fox", "owl"), "joy", relation="left of").caption == "joy drawing of a fox left of an owl"
    assert Scene(("owl", "fox", "bat"), "joy", relation="above").caption == "joy drawing of an owl above a fox and a bat"


@pytest.mark.parametrize(
    ("prompt", "size"),
    [
        ("ink drawing of a fox", (64, 64)),
        ("a hot dog on a blue background", (64, 64)),  # and no dog
        ("noto drawing of Foxes and an Owl", (128, 64)),
        ("a fox and an owl, painted", (128, 64)),
        ("a fox above an owl", (64, 128)),
        ("a fox, a bear and an owl", (128, 128)),
        ("a fox and a bear and an owl and a crab and a bat", (128, 128)),
        ("something else", (64, 64)),
    ],
)
def test_the_canvas_of_a_prompt_has_room_for_the_subjects_that_it_names(prompt, size):
    assert canvas(prompt) == size


def test_a_scene_is_read_back_from_its_caption():
    scene = Scene(("fox", "owl"), "ink", "blue", "left of")
    assert scene_in(scene.caption) == scene
    assert scene_in("something else") is None


def test_a_canvas_has_room_for_what_it_shows():
    assert Scene(("fox",), "noto").size == (64, 64)
    assert Scene(("fox", "owl"), "noto").size == (128, 64)
    assert Scene(("fox", "owl"), "noto", upright=True).size == (64, 128)
    assert Scene(("fox", "owl"), "noto", relation="below").size == (64, 128)
    assert Scene(("fox", "owl", "bat"), "noto").size == (128, 128)
    assert Scene(("fox", "owl", "bat", "pig"), "noto").size == (128, 128)


def test_places_are_in_the_order_of_naming():
    for scene in (Scene(("fox", "owl"), "noto"), Scene(("fox", "owl", "bat", "pig"), "noto")):
        corners = [(y, x) for _, x, y in places(scene)]
        assert corners == sorted(corners)


@pytest.mark.parametrize(
    "scene",
    [((), None), (("fox",) * 5, None), (("fox",), "above"), (("fox", "owl"), "inside"), (("a", "b", "c", "d"), "above")],
)
def test_scenes_that_cannot_be_drawn_are_refused(scene):
    with pytest.raises(ValueError, match="subjects"):
        Scene(scene[0], "noto", relation=scene[1])


def test_the_words_of_the_world():
    assert len(words.BASE_SUBJECTS) >= 120
    assert len(words.BASE_STYLES) >= 12
    assert len(words.SUBJECTS) >= 200
    assert len(set(words.SUBJECTS)) == len(words.SUBJECTS)
    assert not set(words.SUBJECTS) & set(words.STYLES)
    assert not set(words.BASE_STYLES) & set(words.HELD_OUT_STYLES)
    assert not set(words.VALIDATION_SUBJECTS) & set(words.TEST_SUBJECTS)
    assert set(words.VALIDATION_SUBJECTS) | set(words.TEST_SUBJECTS) == set(words.HELD_OUT_SUBJECTS)


@pytest.mark.thorough
def test_every_subject_is_drawn_in_every_style(drawings):
    for subject in words.SUBJECTS:
        for style in words.STYLES:
            drawing = drawings.drawing(subject, style, 48)
            assert drawing.size == (48, 48)
            assert drawing.getbbox() is not None


def test_an_unknown_drawing_is_named(drawings):
    with pytest.raises(KeyError, match="gryphon"):
        drawings.drawing("gryphon", "noto")


def test_captions_name_landscapes_and_lights_but_not_what_is_left_open():
    assert Scene(("fox",), "ink").caption == "ink drawing of a fox"
    assert Scene(("fox",), "ink", "white").caption == "ink drawing of a fox on white paper"
    assert Scene(("fox",), "ink", "open").caption == "ink drawing of a fox"
    assert Scene(("fox",), "ink", "beach", light="night").caption == "ink drawing of a fox on a beach at night"
    assert Scene(("fox", "bear"), "ink", "open", "riding").caption == "ink drawing of a fox riding a bear"


@pytest.mark.parametrize("relation", [None, *RELATIONS, *CONTACTS])
@pytest.mark.parametrize("background", ["blue", "open", *words.PLACES])
def test_a_scene_is_read_back_from_all_its_wordings(relation, background):
    light = None if background == "blue" else "sunset"
    scene = Scene(("fox", "owl"), "ink", background, relation, light=light)
    for form in range(len(FORMS)):
        if relation is not None and form in TAGGED:
            with pytest.raises(ValueError, match="tags cannot say"):
                scene.worded(form)
            continue
        for way in range(3):
            assert scene_in(scene.worded(form, way)) == scene


def test_on_a_beach_is_a_place_and_on_a_bear_is_contact():
    assert scene_in("a fox and a bear on a beach").relation is None
    assert scene_in("a fox on a bear on a beach") == Scene(("fox", "bear"), "noto", "beach", "on")


def test_what_cannot_be_a_scene_is_refused_with_what_can():
    with pytest.raises(ValueError, match=r"no relation 'riding' among 3 subjects.*left of"):
        Scene(("fox", "owl", "bat"), "ink", "open", "riding")
    with pytest.raises(ValueError, match=r"no background 'moon'.*beach"):
        Scene(("fox",), "ink", "moon")
    with pytest.raises(ValueError, match=r"no light 'night' before 'blue'"):
        Scene(("fox",), "ink", "blue", light="night")


@pytest.mark.parametrize(("relation", "in_front"), CONTACTS.items())
def test_subjects_in_contact_overlap_in_the_order_that_is_said(drawings, relation, in_front):
    scene = Scene(("television", "game die"), "noto", "white", relation)
    boxes = drawings.touching(scene)
    together = drawings.picture(scene)
    (size, x, y), (size2, x2, y2) = boxes
    overlap = (max(x, x2), max(y, y2), min(x + size, x2 + size2), min(y + size, y2 + size2))
    assert overlap[0] < overlap[2]
    assert overlap[1] < overlap[3]
    assert min(x, x2, y, y2) >= 0
    assert max(x + size, x2 + size2) <= scene.size[0]
    assert max(y + size, y2 + size2) <= scene.size[1]
    front = drawings.drawing(scene.subjects[in_front], "noto", boxes[in_front][0])
    alone = Image.new("RGB", scene.size, (1, 2, 3))
    alone.paste(front, boxes[in_front][1:], front)
    solid = Image.new("L", scene.size)
    solid.paste(front.getchannel("A"), boxes[in_front][1:])
    opaque = np.asarray(solid) == 255
    assert (np.asarray(together)[opaque] == np.asarray(alone)[opaque]).all()


def test_a_canvas_of_another_shape_has_its_subject_in_the_middle():
    scene = Scene(("fox",), "noto", canvas=(96, 96))
    assert scene.size == (96, 96)
    assert places(scene) == [(54, 21, 21)]
