"""Recipes as plain data: files, prompts and painted regions."""

import dataclasses

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_pipeline

from mole_app.studio import infotext
from mole_app.studio.catalog import Catalog
from mole_app.studio.recipe import Recipe, load, with_strength
from mole_app.studio.render import Studio
from mole_diffusers.binding.as_text import mask_text


def test_recipes_as_files(recipe, tmp_path):
    recipe.save(tmp_path / "r.json")
    assert load(tmp_path / "r.json") == recipe
    infotext.save(Image.new("RGB", (8, 8)), tmp_path / "é.png", dataclasses.replace(recipe, prompt="élan"))
    assert infotext.read(tmp_path / "é.png").prompt == "élan"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -2}, "seed must be in -1.."),
        ({"steps": 1.5}, "steps of a recipe must be a whole number, got 1.5"),
        ({"steps": True}, "steps of a recipe must be a whole number"),
        ({"guidance": float("nan")}, "guidance must be in"),
        ({"prompt": 3}, "prompt of a recipe must be a text, got 3"),
        ({"arm": "best"}, "unknown arm 'best'"),
        ({"mask": "0"}, "a mask needs a picture"),
        ({"hires": 5}, "hires must be in 1.0..4.0, got 5"),
        ({"locks": {"x": {"fox": "much"}}}, "locks of a recipe must be names, each with names, each with a number"),
        ({"experts": ["fox"]}, "experts of a recipe must be names, each with a text"),
        ({"colour": "red"}, r"unknown fields \['colour'\]; known: \['prompt'"),
        ({"version": 9}, "is not a mole_diffusers.studio.recipe of version 1"),
    ],
)
def test_bad_recipes_are_refused_with_one_sentence(recipe, changes, message):
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict({**recipe.to_dict(), **changes})


def test_with_strength():
    assert with_strength("a fox", "fox", 0.5) == "a fox <lora:fox:0.5>"
    assert with_strength("a <lora:fox:1:stop=3> b <lora:ink:1>", "fox", -2) == "a b <lora:fox:-2:stop=3> <lora:ink:1>"
    assert with_strength("a <lora:Fox:1:stop=3>", "FOX", 2) == "a <lora:Fox:2:stop=3>"


def test_a_painted_region_is_a_mask_beside_the_prompt(loras, tmp_path):
    mask = Image.linear_gradient("L").resize((64, 32))
    painted = Recipe("a fox <lora:fox:1:word=fox:region=painted>", masks={"fox": mask_text(mask)})
    infotext.save(Image.new("RGB", (8, 8)), tmp_path / "picture.png", painted)
    recipe = infotext.read(tmp_path / "picture.png")
    assert recipe == painted
    words, region = recipe.tag_bindings()["fox"]
    assert words == ["fox"]
    assert np.array_equal(np.asarray(region), np.asarray(mask))
    studio = Studio(tiny_pipeline(), Catalog({"renamed": loras["fox"]}, {}), "tiny")
    digest = studio.catalog.expert("renamed").sha256
    moved = studio.complete(dataclasses.replace(recipe, experts={"fox": digest}))
    assert moved.masks == {"renamed": painted.masks["fox"]}
    typed = dataclasses.replace(painted, prompt="a fox <lora:Renamed:1:region=painted>", masks=moved.masks)
    assert studio.complete(typed).masks == moved.masks  # the page has the names of here, however they are typed
    with pytest.raises(ValueError, match="no mask for it: paint it in the app, give .* masks, or write another region"):
        dataclasses.replace(recipe, masks={}).tag_bindings()
    for masks in ({"fox": "png:AAAA"}, {"fox": "x"}, {"ink": painted.masks["fox"]}):
        with pytest.raises(ValueError, match="mask"):
            dataclasses.replace(recipe, masks=masks).tag_bindings()
