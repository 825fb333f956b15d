"""What a recipe is completed to, and the pictures that it makes."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from recipes import PROMPT, same
from tiny import tiny_lora, tiny_pipeline

from mole_app.studio import infotext
from mole_app.studio.catalog import Catalog, folder_gates
from mole_app.studio.model_folders import files_of
from mole_app.studio.recipe import FORMAT, VERSION, Recipe, with_strength
from mole_app.studio.render import Studio
from mole_app.web.mixer_cards import cards_of
from mole_cli.common import open_catalog
from mole_diffusers import attach, attached
from mole_diffusers.binding.config import Bound


def test_tags_and_cards_without_a_strength_take_that_of_the_note(studio, loras, tmp_path):
    catalog = Catalog({name: tmp_path / f"{name}.safetensors" for name in ("fox", "ink")}, {})
    for name, path in catalog.loras.items():
        shutil.copy(loras[name], path)
    (tmp_path / "fox.json").write_text('{"activation text": "fox", "preferred weight": 0.6}')
    asked = Recipe("a fox <lora:Fox> <lora:ink>", steps=1, width=32, height=32)
    found = Studio(studio.base.pipe, catalog, "tiny").complete(asked)
    assert found.prompt == "a fox <lora:fox:0.6> <lora:ink:1>"
    for typed in ("<lora:fox:1>", "<lora:fox:te=1>", "<lora:fox:unet=0.2>"):
        (tag,) = Studio(studio.base.pipe, catalog, "tiny").complete(dataclasses.replace(asked, prompt=typed)).tags
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
    assert attached(studio.base.pipe) is None
    assert same(studio.draw(recipe), image)


def test_a_recipe_without_a_size_has_that_of_its_prompt(studio, tmp_path):
    (tmp_path / "r.json").write_text(json.dumps({"format": FORMAT, "version": VERSION, "prompt": "a fox", "height": 48}))
    own = studio.base.pipe.unet.config.sample_size * studio.base.pipe.vae_scale_factor
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
    assert attached(studio.base.pipe).binding["fox"] == Bound(("fox",), "left")
    assert not same(picture, unbound)
    assert same(studio.draw(dataclasses.replace(bound, binding="none")), unbound)
    assert same(studio.draw(recipe), unbound)  # the tag's binding does not stay


def test_examples_are_taken_by_name_alone_until_ones_own_have_that_name(loras, awake, tmp_path):
    awake(attach(tiny_pipeline(), {n: loras[n] for n in ("ink", "fox")}, "mole")).save_pretrained(tmp_path / "shown")
    catalog = Catalog(loras, folder_gates(tmp_path), examples=["shown"])
    assert catalog.gates_for(["ink", "fox"]) == "sum"
    assert catalog.gates_source("shown") == tmp_path / "shown"
    catalog.add_gates("shown", tmp_path / "shown")
    assert catalog.gates_for(["ink", "fox"]) == "shown"


def test_the_worlds_gates_are_examples():
    catalog = open_catalog(["emoji"], {})
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


def test_gates_that_are_half_written_are_not_listed_and_those_put_aside_are(tmp_path):
    for name in ("fox+ink", ".hat.1234.part", ".hat.old", ".fox+ink.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    assert folder_gates(tmp_path) == {"fox+ink": tmp_path / "fox+ink", "hat": tmp_path / ".hat.old"}
