"""The parts around the large picture: its frame, sizes, the browser of LoRAs."""

import os
from dataclasses import replace
from itertools import product

import pytest
from PIL import Image
from tiny import tiny_pipeline

from mole_app.studio.catalog import Catalog
from mole_app.studio.recipe import Recipe
from mole_app.studio.render import Studio
from mole_app.web.actions import Actions

pytest.importorskip("gradio")
from mole_app.web import lora_browser, sizes, stage


@pytest.fixture(scope="module")
def actions(loras, tmp_path_factory):
    return Actions(Studio(tiny_pipeline(), Catalog(dict(loras), {}), "tiny"), gallery=tmp_path_factory.mktemp("pictures"))


def test_the_frame_has_the_shape_of_the_picture():
    assert "--wide: 640; --high: 320;" in stage.framed((640, 320))
    with pytest.raises(ValueError, match="invalid literal"):
        stage.framed(("1; } body { display: none", 1))


def test_small_copies_are_made_once(actions):
    path = actions.gallery.add(Image.new("RGB", (512, 256), "red"), Recipe("a cat"))
    small = actions.small(path)
    assert Image.open(small).size == (256, 128)
    before = small.stat().st_mtime_ns
    assert actions.small(path).stat().st_mtime_ns == before


def test_sizes_have_the_pixels_of_the_base_in_every_shape(actions):
    page = type("Page", (), {"actions": actions})()
    side = actions.size_of(Recipe(""))[0]
    assert sizes.size_of(page, "", 0.0, 1.0) == (0, 0)  # the model's own
    assert sizes.size_of(page, "", 1.0, 1.0) == (side, side)
    assert sizes.size_of(page, "", 1.0, 2.0) == (2 * side, 2 * side)
    for ratio in sizes.SHAPES.values():
        wide, high = sizes.size_of(page, "", ratio, 1.0)
        assert not ratio or abs(wide / high - ratio) < 0.35 * ratio
        assert not ratio or abs(wide * high / side**2 - 1) < 0.35


def test_a_chosen_shape_stays_chosen_if_another_one_has_the_same_size(actions):
    page = type("Page", (), {"actions": actions})()
    found = set()
    for shape, scale in product(list(sizes.SHAPES)[1:], sizes.SCALES):
        width, height = sizes.size_of(page, "", sizes.SHAPES[shape], sizes.SCALES[scale])
        recipe = Recipe("", width=width, height=height)
        assert sizes.choices_for(page, recipe, (shape, scale)) == (shape, scale)
        found.add(sizes.choices_for(page, recipe, (None, None)))
    assert len(found) < (len(sizes.SHAPES) - 1) * len(sizes.SCALES)  # some have the same size
    assert sizes.choices_for(page, Recipe("", width=16, height=512), ("1:1", "1 ×")) == (sizes.OTHER, None)


def test_a_size_at_which_each_subject_has_room_is_offered_and_not_taken(actions):
    """As diffusers draws: it is larger than the base was trained at."""
    two = Recipe("a fox and an owl <lora:fox:1:word=fox> <lora:hat:1:word=owl>", gates="sum")
    studio = actions.studio
    side = studio.complete(Recipe("a fox")).width
    small = studio.complete(two)
    assert (small.width, small.height) == (side, side)
    assert studio.size_with_room(small) == (2 * side, side)
    page = type("Page", (), {"actions": actions})()
    taken = replace(two, width=2 * side, height=side)
    assert sizes.choices_for(page, replace(taken, width=4 * side, height=2 * side), (None, None)) == ("2:1", None)
    assert sizes.choices_for(page, taken, (sizes.FIT, "1 ×"))[0] == "2:1"  # what is marked once it is taken
    assert studio.part_of_step(small, 1) == ""
    drawn = studio.complete(replace(two, width=2 * side, height=side))
    assert studio.draws_in_tiles(drawn)
    assert studio.part_of_step(drawn, 1) == ""
    assert studio.part_of_step(drawn, drawn.steps // 2 + 1) == "each subject by itself"
    assert studio.part_of_step(drawn, drawn.steps) == ""
    larger = studio.complete(replace(drawn, hires=2.0))
    assert studio.part_of_step(larger, larger.steps + 1) == "the larger picture"


def test_loras_are_found_by_words_and_folder_and_sorted(tmp_path):
    loras = {}
    for i, name in enumerate(("people/Ann Lee", "people/bob", "styles/ink")):
        path = tmp_path / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
        os.utime(path, (i, i))
        loras[path.stem] = path
    assert lora_browser.matching_loras(loras, "lee ANN", lora_browser.ALL) == ["Ann Lee"]
    assert lora_browser.matching_loras(loras, "", "people") == ["Ann Lee", "bob"]
    assert lora_browser.folders_of(loras) == ["people", "styles"]
    assert lora_browser.folders_of({"ink": loras["ink"]}) == []
    fits = {"Ann Lee": False, "bob": True, "ink": True}
    ordered = {order: lora_browser.sorted_loras(list(loras), loras, order, fits) for order in lora_browser.ORDERS.values()}
    assert ordered == {
        "fit": ["bob", "ink", "Ann Lee"], "name": ["Ann Lee", "bob", "ink"], "newest": ["ink", "bob", "Ann Lee"]
    }  # fmt: skip
