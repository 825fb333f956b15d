"""Recipes in pictures, as other tools write and read them."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter
from PIL.PngImagePlugin import PngImageFile, PngInfo
from recipes import same

from mole_app.studio import infotext
from mole_app.studio.recipe import Recipe
from mole_diffusers.binding.as_text import mask_text


def test_parameters_are_what_other_tools_read(recipe):
    text = infotext.parameters(dataclasses.replace(recipe, base="a, b", sampler="Euler a"))
    fox, ink = (digest[:12] for digest in recipe.experts.values())
    assert text == (
        "a fox in ink <lora:fox:0.8> <lora:ink:1:stop=1>\nNegative prompt: blur\n"
        'Steps: 2, Sampler: Euler a, CFG scale: 3, Seed: 7, Size: 32x32, Model: "a, b", RNG: CPU, '
        f'Lora hashes: "fox: {fox}, ink: {ink}", Version: mole_diffusers'
    )
    back = infotext.read_parameters(text).recipe
    assert (back.prompt, back.negative, back.seed, back.sampler) == (recipe.prompt, "blur", 7, "Euler a")
    assert back.experts == {"fox": fox, "ink": ink}


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("/home/jane/models/dream v1.5.safetensors", "dream v1.5"),
        ("models/dream.safetensors", "dream"),
        ("/home/jane/dream.v2", "dream.v2"),
        ("here/saved", "saved"),
        ("owner/name.v1", "owner/name.v1"),
        ("emoji", "emoji"),
        ("", "unknown"),
    ],
)
def test_other_tools_read_the_name_of_the_base_and_not_where_it_lies(recipe, base, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "saved").mkdir(parents=True)
    recipe = dataclasses.replace(recipe, base=base)
    assert f", Model: {name}, " in infotext.parameters(recipe)
    again = Recipe.from_dict(recipe.to_dict())  # our own text has a hash for the folder
    assert (again.base == base) == (base in ("owner/name.v1", "emoji", ""))
    assert not [folder for folder in ("jane", "models", "here") if folder in again.base]
    assert again.to_dict() == recipe.to_dict()
    assert f", Model: {name}, " in infotext.parameters(again)


@pytest.mark.parametrize(
    "changes",
    [
        {"hires": 1.5, "hires_strength": 0.123456789},
        {"hires": 2, "hires_strength": 0.0, "image": "0" * 64},
        {"image": "0" * 64, "strength": 0.35},
        {"strength": 0.35},
    ],
)
def test_strengths_and_the_larger_size_come_back_from_the_text(recipe, changes):
    recipe = dataclasses.replace(recipe, **changes)
    text, back = infotext.parameters(recipe), infotext.read_parameters(infotext.parameters(recipe)).recipe
    assert (back.hires, back.hires_strength) == (recipe.hires, recipe.hires_strength)
    assert ("Denoising strength" in text) == (recipe.hires > 1 or recipe.image != "")
    if recipe.image and recipe.hires == 1:
        assert back.strength == recipe.strength


def test_a_picture_of_another_tool(studio, recipe, tmp_path):
    about = PngInfo()
    about.add_text("parameters", infotext.parameters(recipe))
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png", pnginfo=about)
    assert same(studio.draw(studio.complete(infotext.read(tmp_path / "a.png"))), studio.draw(recipe))


def test_pixels_are_unpacked_only_where_the_recipe_may_stand_after_them(recipe, tmp_path, monkeypatch):
    infotext.save(Image.new("RGB", (8, 8)), tmp_path / "a.png", recipe)
    whole = (tmp_path / "a.png").read_bytes()
    at, end = whole.index(b"IDAT") - 4, whole.index(b"IEND") - 4
    chunks = whole[whole.index(b"tEXt") - 4 : at]
    (tmp_path / "after.png").write_bytes(whole.replace(chunks, b"")[: end - len(chunks)] + chunks + whole[end:])
    unpacked, load = [], PngImageFile.load
    monkeypatch.setattr(PngImageFile, "load", lambda image: unpacked.append(image.filename) or load(image))
    assert infotext.read(tmp_path / "a.png") == recipe
    assert not unpacked
    assert infotext.read(tmp_path / "after.png") == recipe
    assert unpacked


def test_bad_pictures_are_refused_with_one_sentence(tmp_path, recipe):
    def png(name, **texts):
        about = PngInfo()
        for key, value in texts.items():
            about.add_text(key, value)
        Image.new("RGB", (8, 8)).save(tmp_path / name, pnginfo=about)
        return tmp_path / name

    (tmp_path / "text.png").write_text("<html>")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    for path, message in [
        (tmp_path / "text.png", "text.png is not a PNG that can be read"),
        (tmp_path / "a.jpg", "a.jpg is not a PNG"),
        (png("none.png"), "none.png has no recipe: no text of mole, A1111 or Forge"),
        (png("comfy.png", prompt="{}", workflow="{}"), "comfy.png has no recipe: no text of mole, A1111 or Forge"),
        (png("swarm.png", parameters='{"sui_image_params": {}}'), "swarm.png has no generation settings"),
        (png("broken.png", mole_diffusers="{"), "broken.png is not JSON"),
        (png("other.png", mole_diffusers=json.dumps({"format": "x"})), "other.png is not a mole_diffusers.studio.recipe"),
        (png("words.png", parameters="a fox"), "words.png has no generation settings"),
        (png("odd.png", parameters="a fox\nSteps: 900, Sampler: x, Seed: 1"), "odd.png: steps must be in 1..150"),
    ]:
        with pytest.raises(ValueError, match=message):
            infotext.read(path)


def test_a_large_mask_with_soft_strokes_and_long_prompts_can_be_read_again(tmp_path):
    mask, random = Image.new("L", (1024, 1024)), np.random.default_rng(0)
    for _ in range(40):
        grey, width = random.integers(100, 256), random.integers(5, 60)
        ImageDraw.Draw(mask).line([tuple(p) for p in random.integers(0, 1024, (6, 2)).tolist()], int(grey), int(width))
    mask = mask.filter(ImageFilter.GaussianBlur(8))
    texts = dict.fromkeys(("negative", "prompt_2", "negative_2"), "🦊" * 5000)  # of 12 characters each in JSON
    recipe = Recipe("a fox <lora:fox:region=painted>", masks={"fox": mask_text(mask)}, **texts)
    assert len(recipe.masks["fox"]) > 200_000
    recipe.save(tmp_path / "recipe.json")
    infotext.save(Image.new("RGB", (8, 8)), tmp_path / "picture.png", recipe)
    for name in ("recipe.json", "picture.png"):
        read = infotext.read(tmp_path / name)
        assert read == recipe
        assert np.array_equal(np.asarray(read.tag_bindings()["fox"][1]), np.asarray(mask))
