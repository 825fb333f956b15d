"""The protocol of the embedded world, on drawings whose verdict is known: what was asked for, or other in one way."""

from dataclasses import replace

import pytest

from mole_diffusers import emoji, emoji_world
from mole_diffusers.evaluation import emoji_protocol


@pytest.fixture(scope="module")
def world():
    return emoji_world()


@pytest.fixture(scope="module")
def judged(world):
    """judged(case, *scenes) -> a row per scene, drawn by the artists, where the case was asked for."""
    metrics = emoji_protocol.JudgeMetrics(world, {case.prompt: scene for case, scene in COLOURED})
    return lambda case, *scenes: metrics(case, [world.drawings.picture(scene) for scene in scenes])


# One and two subjects: at three, 20 pixels each, the judge does not recognise the artists' own drawings either.
COLOURED = [pair for pair in emoji_protocol.cases(emoji.VALIDATION) if pair[1].background != "white"]
SEVERAL = [pair for pair in COLOURED if len(pair[1].subjects) == 2]


def share(rows, value):
    return sum(bool(value(row)) for row in rows) / len(rows)


def test_the_true_drawing_is_all_that_was_asked_for(judged):
    rows = [judged(case, scene)[0] for case, scene in COLOURED]
    for (case, scene), row in zip(COLOURED, rows, strict=True):
        assert row["likeness"] == pytest.approx(dict.fromkeys(scene.subjects, 1.0), abs=1e-5)
        assert list(row["seen"]) == list(case.concepts)
        assert (row["own_place"] is None) == (len(scene.subjects) == 1)
        assert row["success"], case.name
        assert row["style"], case.name
        assert row["background"], case.name
        assert row["own_place"] in (None, 1.0), case.name


def test_subjects_in_each_others_place_are_seen_and_out_of_place(judged):
    for case, scene in SEVERAL:
        true, wrong = judged(case, scene, replace(scene, subjects=scene.subjects[::-1]))
        assert (true["own_place"], wrong["own_place"]) == (1.0, 0.0), case.name
        assert wrong["seen"] == true["seen"]
        assert wrong["background"] == true["background"]
        assert max(wrong["likeness"].values()) < 0.75, case.name


def test_one_subject_twice_is_half_in_place_and_no_success(judged):
    for case, scene in SEVERAL:
        (row,) = judged(case, replace(scene, subjects=scene.subjects[:1] * 2))
        assert (row["own_place"], row["subjects"], row["success"]) == (0.5, 0.5, False), case.name


def test_a_stranger_in_one_place_takes_that_subjects_likeness_alone(judged):
    for case, scene in SEVERAL:
        for place, subject in enumerate(scene.subjects):
            others = [s if s != subject else "lemon" for s in scene.subjects]
            (row,) = judged(case, replace(scene, subjects=tuple(others)))
            kept = row["likeness"].pop(scene.subjects[1 - place])
            assert kept > 0.85 > 2 * row["likeness"][subject], (case.name, subject)


def test_another_background_is_no_loss_but_of_the_background(judged):
    for case, scene in COLOURED:
        others = [colour for colour in emoji.BACKGROUNDS if colour != scene.background]
        true, *found = judged(case, scene, *(replace(scene, background=colour) for colour in others))
        assert true["background"]
        assert not any(row["background"] for row in found), case.name
        assert share(found, lambda row, true=true: row["seen"] == true["seen"]) >= 0.75, case.name


def test_another_style_or_subject_is_another_picture(judged):
    """Likeness is 1 for the artist's drawing, and falls with the style and with the subject."""
    for case, scene in COLOURED:
        style = next(s for s in ("noto", "sepia") if s != scene.style)
        stranger = ("lemon", "panda", "carrot")[: len(scene.subjects)]
        restyled, replaced = judged(case, replace(scene, style=style), replace(scene, subjects=stranger))
        assert not restyled["style"], case.name
        assert replaced["subjects"] == 0, case.name
        for subject in scene.subjects:
            assert max(restyled["likeness"][subject], replaced["likeness"][subject]) < 0.75, case.name
