"""The protocol of the embedded world, on drawings whose verdict is known: what was asked for, or other in one way."""

from dataclasses import replace

import pytest
from PIL import ImageOps

import mole_world
from mole_world import emoji_world
from mole_world.evaluation import emoji_protocol

CROWDED = ("contact", "two subjects, close")  # what the judge sees less well
CASES = [
    pair
    for pair in emoji_protocol.cases(mole_world.VALIDATION)
    if len(pair[1].subjects) <= 2 and pair[0].kind not in CROWDED
]
SEVERAL = [pair for pair in CASES if len(pair[1].subjects) == 2]


@pytest.fixture(scope="module")
def judged():
    """judged(case, *scenes) -> a row per scene, drawn by the artists at `scale`, where the case was asked for."""
    world = emoji_world()
    metrics = emoji_protocol.JudgeMetrics(world.judge(), world.drawings, CASES)

    def rows(case, *scenes, scale=1.0):
        pictures = [world.drawings.picture(scene) for scene in scenes]
        return metrics(case, [ImageOps.scale(picture, scale) for picture in pictures])

    return rows


def test_the_true_drawing_is_all_that_was_asked_for(judged):
    for case, scene in CASES:
        (row,) = judged(case, scene)
        assert list(row["seen"]) == list(case.concepts)
        assert row["apart"] == (None if len(scene.subjects) == 1 else True)
        assert row["success"], case.name
        assert row["style"], case.name
        assert row["background"], case.name


def test_a_larger_picture_is_judged_as_on_its_own_canvas(judged):
    for case, scene in SEVERAL:
        assert judged(case, scene, scale=1.5) == judged(case, scene), case.name


def test_places_are_free(judged):
    for case, scene in SEVERAL:
        true, turned = judged(case, scene, replace(scene, subjects=scene.subjects[::-1]))
        assert turned == true, case.name


def test_one_subject_twice_is_half_and_no_success(judged):
    for case, scene in SEVERAL:
        (row,) = judged(case, replace(scene, subjects=scene.subjects[:1] * 2))
        assert (row["subjects"], row["success"]) == (0.5, False), case.name


def test_another_background_is_no_loss_but_of_the_background(judged):
    for case, scene in CASES:
        others = [colour for colour in mole_world.words.BACKGROUNDS if colour != scene.background]
        true, *found = judged(case, scene, *(replace(scene, background=colour) for colour in others))
        assert not any(row["background"] for row in found), case.name
        assert sum(row["seen"] == true["seen"] for row in found) >= 0.75 * len(found), case.name


def test_another_style_or_subject_is_another_picture(judged):
    for case, scene in CASES:
        style = next(s for s in ("noto", "sepia") if s != scene.style)
        stranger = ("lemon", "panda", "carrot")[: len(scene.subjects)]
        restyled, replaced = judged(case, replace(scene, style=style), replace(scene, subjects=stranger))
        assert not restyled["style"], case.name
        assert replaced["subjects"] == 0, case.name
