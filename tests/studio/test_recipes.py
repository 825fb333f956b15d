"""Recipes, the pictures that hold them, and the pictures that they make."""

import dataclasses
import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter
from PIL.PngImagePlugin import PngImageFile, PngInfo
from safetensors.torch import save_file
from tiny import tiny_lora, tiny_pipeline

from mole_diffusers import attach, attached
from mole_diffusers.app.mixer_cards import cards_of
from mole_diffusers.binding.as_text import mask_text
from mole_diffusers.binding.config import Bound
from mole_diffusers.cli.common import open_catalog
from mole_diffusers.cli.options import Files
from mole_diffusers.studio import infotext
from mole_diffusers.studio.catalog import Catalog, folder_gates
from mole_diffusers.studio.model_folders import files_of
from mole_diffusers.studio.recipe import FORMAT, VERSION, Recipe, load, with_strength
from mole_diffusers.studio.render import Studio

PROMPT = "a fox in ink <lora:fox:0.8> <lora:ink:1:stop=1>"


@pytest.fixture(scope="module")
def studio(loras):
    return Studio(tiny_pipeline(), Catalog(loras, {}), "tiny")


@pytest.fixture
def recipe(studio):
    return studio.complete(Recipe(PROMPT, "blur", seed=7, steps=2, width=32, height=32))


def same(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b))


def test_tags_and_cards_without_a_strength_take_that_of_the_note(studio, loras, tmp_path):
    catalog = Catalog({name: tmp_path / f"{name}.safetensors" for name in ("fox", "ink")}, {})
    for name, path in catalog.loras.items():
        shutil.copy(loras[name], path)
    (tmp_path / "fox.json").write_text('{"activation text": "fox", "preferred weight": 0.6}')
    asked = Recipe("a fox <lora:Fox> <lora:ink>", steps=1, width=32, height=32)
    found = Studio(studio.pipe, catalog, "tiny").complete(asked)
    assert found.prompt == "a fox <lora:fox:0.6> <lora:ink:1>"
    for typed in ("<lora:fox:1>", "<lora:fox:te=1>", "<lora:fox:unet=0.2>"):
        (tag,) = Studio(studio.pipe, catalog, "tiny").complete(dataclasses.replace(asked, prompt=typed)).tags
        assert tag.te(0, 1) == 1, typed
    cards = cards_of(asked.prompt, [], catalog.loras, catalog.preferred_weight)
    assert [card["tag"] for card in cards] == ["<lora:fox:0.6>", "<lora:ink:1>"]
    mixture = attach(tiny_pipeline(), {"fox": catalog.loras["fox"]})
    assert mixture.strength("fox") == 1


def test_a_picture_re_creates_itself(studio, recipe, loras, tmp_path):
    image = studio.draw(recipe)
    infotext.save(image, tmp_path / "a.png", recipe)
    again = infotext.read(tmp_path / "a.png")
    assert again == recipe
    other = Studio(tiny_pipeline(), Catalog({"renamed": loras["fox"], "ink": loras["ink"]}, {}), "tiny")
    found = other.complete(again)
    assert found.prompt == "a fox in ink <lora:renamed:0.8> <lora:ink:1:stop=1>"  # found by what is in the file
    assert same(other.draw(found), image)
    assert not same(studio.draw(dataclasses.replace(recipe, seed=8)), image)


def test_what_was_drawn_before_does_not_change_a_picture(studio, recipe):
    image = studio.draw(recipe)
    studio.draw(studio.complete(Recipe("a hat <lora:hat:2>", steps=1, width=32, height=32, sampler="Euler a")))
    studio.draw(studio.complete(Recipe("a hat", steps=1, width=32, height=32)))
    assert attached(studio.pipe) is None
    assert same(studio.draw(recipe), image)


def test_a_recipe_without_a_size_has_that_of_its_prompt(studio, tmp_path):
    (tmp_path / "r.json").write_text(json.dumps({"format": FORMAT, "version": VERSION, "prompt": "a fox", "height": 48}))
    own = studio.pipe.unet.config.sample_size * studio.pipe.vae_scale_factor
    assert own != 64
    asked = infotext.read(tmp_path / "r.json")
    recipe = studio.complete(asked)
    assert (recipe.width, recipe.height, studio.notes(asked, recipe)) == (own, 48, [])
    read = infotext.read_parameters("a fox\nSteps: 2, Sampler: Euler, Seed: 3").recipe
    assert studio.complete(read).width == own
    for bad, message in ((8, "in 16..4096, or 0"), (-1, "in 16"), (4097, "in 16"), (False, "a whole"), (0.0, "a whole")):
        with pytest.raises(ValueError, match=f"width (of a recipe )?must be {message}"):
            dataclasses.replace(recipe, width=bad)


def test_arms(studio, recipe, draw):
    drawn = {arm: studio.draw(dataclasses.replace(recipe, arm=arm)) for arm in ("gates", "sum", "base", "alone fox")}
    plain = studio.complete(dataclasses.replace(recipe, prompt="a fox in ink", experts={}))
    alone = studio.complete(dataclasses.replace(recipe, prompt="a fox in ink <lora:fox:0.8>", experts={}))
    assert same(drawn["base"], studio.draw(plain))
    assert same(drawn["gates"], drawn["sum"])  # these gates are the sum
    assert np.abs(np.asarray(drawn["alone fox"], int) - np.asarray(studio.draw(alone), int)).max() <= 1
    for prompt, there in ((PROMPT, "fox, ink"), ("a fox", "none")):
        with pytest.raises(ValueError, match=f"the prompt has no LoRA 'hat' to draw alone, but {there}$"):
            studio.complete(Recipe(prompt, arm="alone hat"))


def test_words_and_regions_of_tags_bind(studio, recipe):
    """As `bind` on the mixture; a recipe that says none is not bound."""
    unbound = studio.draw(recipe)
    tags = "a fox in ink <lora:fox:0.8:word=fox:region=left> <lora:ink:1:stop=1:region=everywhere>"
    bound = dataclasses.replace(recipe, prompt=tags)
    picture = studio.draw(bound)
    assert attached(studio.pipe).binding["fox"] == Bound(("fox",), "left")
    assert not same(picture, unbound)
    assert same(studio.draw(dataclasses.replace(bound, binding="none")), unbound)
    assert same(studio.draw(recipe), unbound)  # the tag's binding does not stay


def test_trained_gates_by_name_and_by_the_files_they_weigh(studio, loras, awake, tmp_path):
    pipe = tiny_pipeline()
    awake(attach(pipe, {n: loras[n] for n in ("ink", "fox")}, "mole")).save_pretrained(tmp_path / "mine")
    catalog = Catalog(loras, folder_gates(tmp_path))
    mine = Studio(pipe, catalog, "tiny")
    asked = Recipe(PROMPT, steps=2, width=32, height=32, gates="auto")
    found = mine.complete(asked)
    assert (found.gates, len(found.gates_sha256)) == ("mine", 64)
    assert not same(mine.draw(found), mine.draw(dataclasses.replace(found, arm="sum")))
    assert studio.complete(asked).gates == "sum"
    with pytest.raises(ValueError, match="'mine' here are not those of the recipe"):
        mine.complete(dataclasses.replace(found, gates_sha256="0" * 64))
    with pytest.raises(ValueError, match="no gates 'other'; known: sum, mean, mine"):
        mine.complete(dataclasses.replace(asked, gates="other"))


def test_gates_that_are_replaced_before_a_picture_is_drawn_are_not_taken_for_the_old_ones(loras, awake, tmp_path):
    pipe, folder = tiny_pipeline(), tmp_path / "mine"
    files = {name: loras[name] for name in ("fox", "ink")}
    awake(attach(pipe, files, "mole")).save_pretrained(folder)
    studio = Studio(pipe, Catalog(loras, folder_gates(tmp_path)), "tiny")
    old = studio.complete(Recipe(PROMPT, steps=1, width=32, height=32, gates="mine"))
    picture = studio.draw(old)
    attach(tiny_pipeline(), files, "mole").save_pretrained(folder)
    assert same(studio.draw(old), picture)  # the old ones are still attached
    studio.draw(studio.complete(dataclasses.replace(old, gates_sha256="")))
    with pytest.raises(ValueError, match="'mine' have been replaced since this was asked for: start it again"):
        studio.draw(old)


def test_gates_that_do_not_fit_stop_one_picture_that_does_not_name_them(loras, awake, tmp_path):
    awake(attach(tiny_pipeline(), {n: loras[n] for n in ("ink", "fox")}, "mole")).save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    save_file({"x": torch.zeros(1)}, tmp_path / "a" / "gates.safetensors")
    studio = Studio(tiny_pipeline(), Catalog(loras, folder_gates(tmp_path)), "tiny")
    recipe = Recipe(PROMPT, steps=1, width=32, height=32, gates="auto")
    with pytest.raises(ValueError, match="the gates in .* lack"):
        studio.draw(studio.complete(recipe))
    assert (whole := studio.complete(recipe)).gates == "b"
    by_name = studio.complete(dataclasses.replace(recipe, gates="b"))
    assert same(studio.draw(whole), studio.draw(by_name))


def test_gates_that_cannot_be_read_stop_no_picture_that_does_not_name_them(loras, awake, tmp_path):
    awake(attach(tiny_pipeline(), {n: loras[n] for n in ("ink", "fox")}, "mole")).save_pretrained(tmp_path / "mine")
    for name, text in (("broken", "{"), ("newer", '{"format": "mole_diffusers.gates", "version": 99}')):
        shutil.copytree(tmp_path / "mine", tmp_path / name)
        (tmp_path / name / "config.json").write_text(text)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{}")
    catalog = Catalog(loras, folder_gates(tmp_path))
    with pytest.warns(UserWarning, match="passed over") as said:
        assert catalog.gates_for(["ink", "fox"]) == "mine"
    assert [str(each.message).partition(":")[0] for each in said] == [
        f"the gates {name!r} are passed over" for name in ("broken", "half", "newer")
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        assert catalog.gates_for(["ink"]) == "sum"
    studio = Studio(tiny_pipeline(), catalog, "tiny")
    with pytest.raises(ValueError, match="this release reads mole_diffusers.gates version"):
        studio.draw(studio.complete(Recipe(PROMPT, steps=1, width=32, height=32, gates="newer")))


def test_examples_are_taken_by_name_alone_until_ones_own_have_that_name(loras, awake, tmp_path):
    awake(attach(tiny_pipeline(), {n: loras[n] for n in ("ink", "fox")}, "mole")).save_pretrained(tmp_path / "shown")
    catalog = Catalog(loras, folder_gates(tmp_path), examples=["shown"])
    assert catalog.gates_for(["ink", "fox"]) == "sum"
    assert catalog.gates_source("shown") == tmp_path / "shown"
    catalog.add_gates("shown", tmp_path / "shown")
    assert catalog.gates_for(["ink", "fox"]) == "shown"


def test_the_worlds_gates_are_examples():
    catalog = open_catalog(["emoji"], Files())
    assert "sunflower+doughnut" in catalog.gates
    assert catalog.gates_for(["sunflower", "doughnut"]) == "sum"


def test_a_lock_changes_the_picture(studio, recipe):
    place = "unet.mid_block.attentions.0.transformer_blocks.0"
    locked = dataclasses.replace(recipe, locks={place: {"fox": 3.0}})
    assert not same(studio.draw(locked), studio.draw(recipe))


def test_locks_of_loras_that_the_prompt_no_longer_has_are_left_out(studio, recipe):
    """They silenced every LoRA of the next prompt."""
    rows = {"a": {"FOX": 1.0, "hat": 0.5}, "b": {"fox": 1.0, "hat": 2.0}, "c": {"hat": 1.0}}
    asked = dataclasses.replace(recipe, prompt="a fox <lora:FOX:1>", experts={}, locks=rows)
    found = studio.complete(asked)
    assert found.locks == {"a": {"fox": 1.0}, "b": {"fox": 1.0}}
    assert studio.notes(asked, found) == ["weights set by hand for 'hat' are left out: the prompt has no such LoRA"]
    assert studio.notes(found, found) == []


def test_what_a_recipe_says_of_a_lora_holds_for_its_file_where_two_names_are_swapped(studio, loras):
    place = "unet.mid_block.attentions.0.transformer_blocks.0"
    asked = Recipe("a <lora:fox:1> <lora:ink:1>", steps=2, width=32, height=32, locks={place: {"fox": 3.0, "ink": 0.5}})
    recipe = studio.complete(asked)
    other = Studio(tiny_pipeline(), Catalog({"fox": loras["ink"], "ink": loras["fox"]}, {}), "tiny")
    found = other.complete(recipe)
    assert found.locks == {place: {"ink": 3.0, "fox": 0.5}}
    assert same(other.draw(found), studio.draw(recipe))
    assert other.complete(dataclasses.replace(recipe, arm="alone fox")).arm == "alone ink"


def test_a_tag_in_the_negative_prompt_is_words_and_that_is_said(studio, recipe):
    tagged = dataclasses.replace(recipe, negative="blur <lora:ink:1>")
    assert studio.complete(tagged).experts == recipe.experts
    assert studio.notes(tagged, studio.complete(tagged)) == ["the tags of LoRAs in the negative prompt are read as words"]
    assert studio.notes(recipe, recipe) == []


def test_steps_are_told_and_can_end_a_picture(studio, recipe):
    class StopError(Exception):
        pass

    seen = []

    def stop(step, latents):
        seen.append((step, tuple(latents.shape)))
        raise StopError

    with pytest.raises(StopError):
        studio.draw(recipe, on_step=stop)
    assert seen == [(1, (1, 4, 16, 16))]
    studio.draw(recipe)


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
        (png("none.png"), "none.png has no recipe: no text of mole, A1111, Forge, ComfyUI"),
        (png("comfy.png", workflow="{}"), "comfy.png has a ComfyUI workflow without a sampler"),
        (png("api.png", prompt="{}"), "api.png has a ComfyUI workflow without a sampler"),
        (png("broken.png", mole_diffusers="{"), "broken.png is not JSON"),
        (png("other.png", mole_diffusers=json.dumps({"format": "x"})), "other.png is not a mole_diffusers.studio.recipe"),
        (png("words.png", parameters="a fox"), "words.png has no generation settings"),
        (png("odd.png", parameters="a fox\nSteps: 900, Sampler: x, Seed: 1"), "odd.png: steps must be in 1..150"),
    ]:
        with pytest.raises(ValueError, match=message):
            infotext.read(path)


def test_what_is_not_here_is_said(studio, recipe, tmp_path):
    with pytest.raises(ValueError, match="no LoRA 'owl'; known: fox, ink, hat"):
        studio.complete(Recipe("an owl <lora:owl:1>"))
    with pytest.raises(ValueError, match="the LoRA 'fox' with hash 012345678901 is not here; 'fox' has [0-9a-f]{12}"):
        studio.complete(dataclasses.replace(recipe, experts={"fox": "012345678901"}))
    with pytest.raises(ValueError, match="unknown sampler 'Best'; known: DDIM"):
        studio.complete(dataclasses.replace(recipe, sampler="Best"))
    with pytest.raises(ValueError, match="no .safetensors files"):
        files_of(tmp_path, "lora")


def test_an_underscore_finds_a_lora_with_a_space(loras):
    catalog = Catalog({"red fox": loras["fox"]}, {})
    assert catalog.name("Red_Fox") == "red fox"
    assert with_strength("a <lora:red fox:1>", "red_fox", 0.5) == "a <lora:red fox:0.5>"


def test_a_catalog_takes_good_files_only(pipe, tmp_path):
    catalog = Catalog({}, {})
    (tmp_path / "bad.safetensors").write_text("<html>")
    with pytest.raises(ValueError, match="bad.safetensors"):
        catalog.add_lora("bad", tmp_path / "bad.safetensors")
    assert catalog.loras == {}
    file = tiny_lora(pipe, tmp_path / "good.safetensors")
    catalog.add_lora("good", file)
    assert catalog.loras == {"good": file}
    with pytest.raises(ValueError, match="already a LoRA 'good'"):
        catalog.add_lora("good", file)


def test_with_strength():
    assert with_strength("a fox", "fox", 0.5) == "a fox <lora:fox:0.5>"
    assert with_strength("a <lora:fox:1:stop=3> b <lora:ink:1>", "fox", -2) == "a b <lora:fox:-2:stop=3> <lora:ink:1>"
    assert with_strength("a <lora:Fox:1:stop=3>", "FOX", 2) == "a <lora:Fox:2:stop=3>"


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


def test_gates_that_are_half_written_are_not_listed_and_those_put_aside_are(tmp_path):
    for name in ("fox+ink", ".hat.1234.part", ".hat.old", ".fox+ink.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    assert folder_gates(tmp_path) == {"fox+ink": tmp_path / "fox+ink", "hat": tmp_path / ".hat.old"}
