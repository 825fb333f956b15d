"""The gates of a recipe: found by name or by the files they weigh, and refused where they changed or do not fit."""

import dataclasses
import shutil
import warnings

import pytest
import torch
from recipes import PROMPT, same
from safetensors.torch import save_file
from tiny import tiny_pipeline

from mole_app.studio.catalog import Catalog, folder_gates
from mole_app.studio.recipe import Recipe
from mole_app.studio.render import Studio
from mole_diffusers import attach


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
