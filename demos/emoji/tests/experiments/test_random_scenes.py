"""Random scenes of the emoji world: what is drawn, where it stands, and which words are kept from the base."""

from itertools import product

import numpy as np
import pytest

from mole_world import Drawings, composition_scene, default_folder, emoji_world, words
from mole_world.scenes import RELATIONS, SIDE, Scene, scene_in


@pytest.fixture(scope="module")
def scenes(script):
    return script("random_scenes")


def boxes_of(scenes, scene, rng):
    return [(x, y, x + size, y + size) for size, x, y in scenes.scattered(scene, rng)]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_scene_is_read_back_from_its_caption(scenes, count):
    rng = np.random.default_rng(count)
    for _ in range(50):
        scene = scenes.draw_scene(words.SUBJECTS, words.STYLES, rng, count=count, placed=0.5)
        found = scene_in(scene.caption)
        assert found.caption == scene.caption
        assert scene.relation is None or found.size == scene.size


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_subjects_are_large_inside_the_canvas_and_apart(scenes, count):
    rng = np.random.default_rng(count)
    for _ in range(300):
        scene = scenes.draw_scene(words.BASE_SUBJECTS, words.BASE_STYLES, rng, count=count)
        boxes = boxes_of(scenes, scene, rng)
        width, height = scene.size
        for i, (left, top, right, bottom) in enumerate(boxes):
            assert 40 <= right - left <= 60
            assert left >= 0
            assert top >= 0
            assert right <= width
            assert bottom <= height
            for left2, top2, right2, bottom2 in boxes[:i]:
                assert right <= left2 or right2 <= left or bottom <= top2 or bottom2 <= top


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("others", [("owl",), ("owl", "bat")])
def test_a_named_place_is_kept(scenes, relation, others):
    rng = np.random.default_rng(0)
    scene = Scene(("fox", *others), "noto", relation=relation)
    for _ in range(50):
        first, *rest = boxes_of(scenes, scene, rng)
        for other in rest:
            apart = {
                "left of": first[2] <= other[0],
                "right of": first[0] >= other[2],
                "above": first[3] <= other[1],
                "below": first[1] >= other[3],
            }
            assert apart[relation]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_order_of_naming_does_not_decide_the_side(scenes, count):
    rng = np.random.default_rng(1)
    middles = [scenes.scattered(Scene(("fox", "owl", "bat", "pig")[:count], "noto"), rng) for _ in range(400)]
    left = np.mean([x[0][1] < x[-1][1] for x in middles])
    assert 0.3 < left < 0.7


def test_a_seventh_of_the_cells_is_kept_from_the_base_the_same_ones_always(scenes):
    cells = list(product(words.BASE_SUBJECTS, words.BASE_STYLES))
    unseen = [cell for cell in cells if scenes.is_unseen(*cell)]
    assert 0.12 < len(unseen) / len(cells) < 0.18
    assert ("pig", "noto") not in unseen
    assert len(unseen) == 233  # another number: other cells than the committed base was kept from


def test_an_allowed_cell_is_all_that_is_drawn(scenes):
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 4):
        for _ in range(100):
            scene = scenes.draw_scene(
                words.BASE_SUBJECTS, words.BASE_STYLES, rng, count=count, allowed=lambda s, y: not scenes.is_unseen(s, y)
            )
            assert not any(scenes.is_unseen(s, scene.style) for s in scene.subjects)


def test_a_picture_is_the_same_for_the_same_generator(scenes):
    drawings, scene = Drawings(default_folder()), composition_scene(("fox", "tiger", "ink"))
    first, second = (scenes.random_picture(drawings, scene, np.random.default_rng(3)) for _ in range(2))
    assert first.tobytes() == second.tobytes()
    assert first.size == (2 * SIDE, SIDE)


@pytest.mark.thorough
@pytest.mark.parametrize("count", [1, 2, 3])
def test_judge_is_right_on_real_drawings(scenes, count):
    world, rng = emoji_world(), np.random.default_rng(5)
    judge, shown = world.judge(), [scenes.draw_scene(words.SUBJECTS, words.STYLES, rng, count=count) for _ in range(60)]
    pairs = [(judge.verdict([scenes.random_picture(world.drawings, s, rng)]), s) for s in shown]
    assert np.mean([bool(judge.sees(v, s.subjects).all()) for v, s in pairs]) >= 0.97
    assert np.mean([bool(judge.is_style(v, s.style)) for v, s in pairs]) >= 0.97
    assert np.mean([bool(judge.is_background(v, s.background)) for v, s in pairs]) >= 0.97
