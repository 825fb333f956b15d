"""What is composed in the emoji world, and how a picture of it is judged."""

from itertools import combinations, product

import pytest
import torch
from PIL import Image

from mole_diffusers.training.losses import cells
from mole_world import TEST, VALIDATION, words
from mole_world.compositions import LARGER, compositions
from mole_world.drawings import Drawings, default_folder
from mole_world.evaluation.emoji_protocol import JudgeMetrics, cases
from mole_world.judge import Judge


def test_validation_decides_nothing_that_the_test_asks():
    for kind, group in TEST.items():
        own = {c for concepts in group for c in concepts}
        assert own <= {*words.TEST_SUBJECTS, *words.TEST_STYLES}
        others = {c for concepts in VALIDATION[kind] for c in concepts}
        assert others <= {*words.VALIDATION_SUBJECTS, *words.VALIDATION_STYLES}
        assert len({tuple(sorted(concepts)) for concepts in group}) == len(group) >= 8


def test_splits_share_no_concept():
    concepts = [{c for group in split.values() for case in group for c in case} for split in (VALIDATION, TEST)]
    assert not concepts[0] & concepts[1]
    assert concepts[0] | concepts[1] == set(words.HELD_OUT_SUBJECTS + words.HELD_OUT_STYLES)
    assert sum(map(len, TEST.values())) == 168
    assert list(TEST) == list(VALIDATION)
    for split in (VALIDATION, TEST):
        for group in split.values():
            assert len({frozenset(case) for case in group}) == len(group)


@pytest.mark.parametrize(("subjects", "styles"), [("ab", ""), ("abc", "x"), ("abcde", "xy"), ("abcdef", "x")])
def test_any_concepts_are_composed_each_pair_once(subjects, styles):
    found = compositions(subjects, styles, dict.fromkeys(TEST | LARGER, 99))
    pairs = set(combinations(subjects, 2))
    assert sorted(tuple(sorted(pair)) for pair in found["two subjects"]) == sorted(pairs)
    assert len(found["two subjects + style"]) == len(pairs) * bool(styles)
    assert set(found["subject x style"]) == set(product(subjects, styles))
    for kind, size in (("three subjects", 3), ("four subjects", 4)):
        assert len(found[kind]) == len(subjects) * (len(subjects) > size)
        assert all(len(set(concepts)) == size for concepts in found[kind])
        styled = found[f"{kind} + style"]
        assert [concepts[:-1] for concepts in styled] == [*found[kind]] * bool(styles)
        assert {concepts[-1] for concepts in styled} <= set(styles)


def test_a_case_has_the_canvas_of_its_scene():
    found = cases(
        {"two subjects": [("fox", "koala"), ("octopus", "tomato")], "three subjects": [("fox", "koala", "tomato")]}
    )
    assert [case.size for case, _ in found] == [(128, 64), (64, 128), (128, 128)]
    assert [case.prompt for case, _ in found] == [scene.caption for _, scene in found]
    places = [cells(len(scene.subjects), *scene.size) for _, scene in found]
    assert places[:2] == [[(0, 0, 0.5, 1), (0.5, 0, 1, 1)], [(0, 0, 1, 0.5), (0, 0.5, 1, 1)]]
    assert places[2] == [(0, 0, 0.5, 0.5), (0.5, 0, 1, 0.5), (0, 0.5, 0.5, 1)]


@pytest.fixture(scope="module")
def judge():
    return Judge.load(default_folder() / "judge")


def test_a_true_drawing_is_right_and_one_with_a_wrong_subject_is_not(judge):
    drawings = Drawings(default_folder())
    (case, scene), (_, other) = cases({"two subjects": [("fox", "octopus"), ("fox", "tomato")]})
    metrics = JudgeMetrics(judge, drawings, [(case, scene)])
    wrong = drawings.picture(other).rotate(90, expand=True)  # on the same canvas
    right_row, wrong_row = metrics(case, [drawings.picture(scene), wrong])
    assert (right_row["success"], right_row["apart"], right_row["background"]) == (True, True, True)
    assert right_row["seen"] == {"fox": True, "octopus": True}
    assert not wrong_row["success"]


def test_a_subject_that_nobody_asked_for_is_another_one(judge):
    (case, scene), *_ = cases({"two subjects": [("fox", "octopus")]})
    picture = Drawings(default_folder()).picture(scene)
    assert not JudgeMetrics(judge, Drawings(default_folder()), [(case, scene)])(case, [picture])[0]["another"]
    assert judge.sees_another(judge.verdict([picture]), ["fox"]).all()


def test_subjects_in_one_place_do_not_stand_apart(judge, monkeypatch):
    (case, scene), *_ = cases({"two subjects": [("fox", "koala")]})
    metrics = JudgeMetrics(judge, Drawings(default_folder()), [(case, scene)])
    maps = torch.zeros(2, len(judge.labels.subjects), 4, 8)
    fox, koala = (judge.labels.subjects.index(s) for s in ("fox", "koala"))
    maps[:, fox, 1, 2] = maps[0, koala, 1, 3] = maps[1, koala, 2, 4] = 9
    monkeypatch.setattr(judge, "subject_map", lambda images: maps)
    blank = Image.new("RGB", (128, 64))
    assert [row["apart"] for row in metrics(case, [blank, blank])] == [False, True]
