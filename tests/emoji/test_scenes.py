"""Scenes of the emoji world: captions, canvases, places and which words are kept from whom."""

import pytest

from mole_diffusers.emoji import canvas, words
from mole_diffusers.emoji.drawings import Drawings, default_folder
from mole_diffusers.emoji.scenes import Scene, places, scene_in


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
