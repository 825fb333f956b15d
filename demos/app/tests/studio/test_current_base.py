"""Another base model in the place of the one that a studio has."""

import dataclasses
import gc
import weakref

import hosts
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiers import thorough
from tiny import tiny_pipeline

from mole_app.studio import current_base
from mole_app.studio.base_models import Base
from mole_app.studio.catalog import Catalog
from mole_app.studio.memory import Memory, release
from mole_app.studio.model_folders import bases_of
from mole_app.studio.recipe import Recipe
from mole_app.studio.render import Studio
from mole_diffusers import attached

RECIPE = Recipe("a fox <lora:fox:1>", seed=7, steps=2, width=32, height=32)
PIPES = {"one": lambda: tiny_pipeline(0), "two": lambda: tiny_pipeline(1), "flux": hosts.flux}


def opening(name):
    """Open one of PIPES."""
    if name not in PIPES:
        raise ValueError(f"{name} is no base")
    return Base(PIPES[name](), name, Memory("cpu"))


def fresh(name, loras):
    return Studio(PIPES[name](), Catalog(dict(loras), {}), name)


def drawn(studio, recipe=RECIPE, **pictures):
    return np.asarray(studio.draw(studio.complete(recipe), **pictures))


def test_pictures_are_those_of_the_base_that_is_open(loras):
    studio = fresh("one", loras)
    first, before = drawn(studio), studio.base.pipe
    studio.base.change("two", opening)
    assert (studio.base.name, attached(before)) == ("two", None)
    assert all(parameter.is_meta for parameter in before.unet.parameters())  # its memory is free
    assert np.array_equal(drawn(studio), drawn(fresh("two", loras)))
    studio.base.change("one", opening)
    assert np.array_equal(drawn(studio), first)


def test_weights_are_let_go_before_others_come(loras):
    studio, seen = fresh("one", loras), []

    def looking(name):
        seen.append({parameter.device.type for parameter in studio.base.pipe.unet.parameters()})
        return opening(name)

    drawn(studio)
    studio.base.change("two", looking)
    assert seen == [{"meta"}]


@pytest.mark.parametrize("offload", ["model", *thorough("sequential")])
def test_an_offloaded_base_is_let_go_too(loras, offload):
    studio = fresh("one", loras)
    hosts.OFFLOADS[offload](studio.base.pipe)
    first, before = drawn(studio), studio.base.pipe
    studio.base.change("two", opening)
    assert all(p.is_meta for model in hosts.networks(before) for p in model.parameters())
    studio.base.change("one", opening)
    assert np.array_equal(drawn(studio), first)


def test_a_base_that_cannot_be_opened_leaves_the_one_that_was_there(loras):
    studio = fresh("one", loras)
    first = drawn(studio)
    with pytest.raises(ValueError, match="three is no base"):
        studio.base.change("three", opening)
    assert studio.base.name == "one"
    assert np.array_equal(drawn(studio), first)


def test_what_was_half_opened_is_let_go_before_the_old_one_comes_back(loras):
    studio, half = fresh("one", loras), []

    def failing(name):
        if name == "two":
            pipe = tiny_pipeline(1)
            half.append(weakref.ref(pipe.unet))
            raise ValueError("no room")
        gc.collect()
        half.append(half[0]())
        return opening(name)

    with pytest.raises(ValueError, match="no room"):
        studio.base.change("two", failing)
    assert half[1] is None


def test_while_it_is_changed_others_are_told_to_wait(loras):
    studio, said = fresh("one", loras), []

    def slowly(name):
        with pytest.raises(ValueError, match="is being changed: wait a little") as error:
            studio.complete(RECIPE)
        said.append(error)
        return no_network() if name == "two" else opening(name)

    with pytest.raises(OSError, match="no network"):
        studio.base.change("two", slowly)
    assert (studio.base.name, len(said)) == ("one", 2)


def test_where_the_old_one_cannot_be_opened_again_one_can_still_be_chosen(loras):
    studio = fresh("one", loras)
    first, recipe = drawn(studio), studio.complete(RECIPE)
    with pytest.raises(ValueError, match="three is no base; and one cannot be opened again: no network"):
        studio.base.change("three", lambda name: opening(name) if name == "three" else no_network())
    assert studio.base.name == ""
    for ask in (lambda: studio.complete(RECIPE), lambda: studio.draw(recipe)):
        with pytest.raises(ValueError, match="no base model is open"):
            ask()
    with pytest.raises(ValueError, match="three is no base$"):
        studio.base.change("three", opening)
    studio.base.change("one", opening)
    assert np.array_equal(drawn(studio), first)


def no_network():
    raise OSError("no network")


def no_memory():
    raise RuntimeError("no memory")


def test_a_base_that_cannot_be_let_go_is_opened_anew(loras, monkeypatch):
    studio = fresh("one", loras)
    first = drawn(studio)
    monkeypatch.setattr(current_base, "release", lambda pipe: (release(pipe), no_memory()))
    with pytest.raises(RuntimeError, match="no memory"):
        studio.base.change("two", opening)
    monkeypatch.undo()
    assert studio.base.name == "one"
    assert np.array_equal(drawn(studio), first)


def test_what_was_meant_for_another_base_is_refused(loras, tmp_path):
    """By the recipe, and by the LoRA."""
    file = tmp_path / "worn.safetensors"
    pair = {"unet.conv_in.lora_A.weight": torch.ones(1, 4, 3, 3), "unet.conv_in.lora_B.weight": torch.ones(8, 1, 1, 1)}
    save_file(pair, file, {"ss_base_model_version": "sd_v1"})
    studio = fresh("one", {**loras, "worn": file})
    recipe = studio.complete(RECIPE)
    assert studio.misfit("worn") == ""
    studio.base.change("flux", opening)
    with pytest.raises(ValueError, match="meant for the base model 'one', and now 'flux' is here: start it again"):
        studio.draw(recipe)
    assert studio.misfit("worn") == "it is made for SD 1.x and this pipeline is Flux"
    with pytest.raises(ValueError, match="the LoRA 'worn' cannot be used here"):
        studio.complete(Recipe("a fox <lora:worn:1>"))
    assert studio.base.samplers == ["Euler"]
    assert drawn(studio, dataclasses.replace(RECIPE, prompt="a fox", steps=1)).shape == (32, 32, 3)


def test_bases_are_named_and_a_models_folder_is_all_of_its_models(tmp_path, monkeypatch):
    folder, saved = tmp_path / "models", tmp_path / "saved"
    for path in (
        folder / "checkpoints/dream.safetensors",
        folder / "checkpoints/toon.safetensors",
        tmp_path / "dream.safetensors",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    saved.mkdir()
    (saved / "model_index.json").touch()
    dream, toon = (str(folder / f"checkpoints/{name}.safetensors") for name in ("dream", "toon"))
    assert bases_of([str(folder)]) == {"dream": dream, "toon": toon}
    assert bases_of([str(folder / "Toon"), str(folder), str(saved), "emoji", "owner/name"]) == {
        "toon": toon,
        "dream": dream,
        "saved": str(saved),
        "emoji": "emoji",
        "name": "owner/name",
    }
    other = str(tmp_path / "dream.safetensors")
    assert bases_of([str(folder), other]) == {dream: dream, "toon": toon, other: other}
    loud = tmp_path / "TOON.safetensors"
    loud.touch()
    assert bases_of([toon, str(loud)]) == {toon: toon, str(loud): str(loud)}  # a name is found in any case
    with pytest.raises(ValueError, match="is no file or folder here"):
        bases_of(["gone.safetensors"])
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"it has no .safetensors checkpoint"):
        bases_of([str(tmp_path / "none")])
    world = tmp_path / "emoji"  # the word means the embedded world, as where it is opened
    world.mkdir()
    (world / "dream.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    assert bases_of(["emoji"]) == {"emoji": "emoji"}
