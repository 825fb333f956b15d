"""The script of a recipe draws the picture of the recipe, bit for bit."""

import dataclasses
import shutil

import numpy as np
import pytest
from PIL import Image
from single_file import save_single_file
from tiers import thorough
from tiny import tiny_pipeline

from mole_app.studio.as_code import as_code
from mole_app.studio.base_models import open_base
from mole_app.studio.catalog import Catalog, folder_gates
from mole_app.studio.memory import Memory
from mole_app.studio.model_folders import files_of
from mole_app.studio.picture_passes import with_pictures
from mole_app.studio.recipe import Recipe
from mole_app.studio.render import Studio
from mole_diffusers.binding.as_text import mask_text
from mole_diffusers.mixture import attach

RECIPE = Recipe("a fox <lora:fox:0.5:lbw=OUTALL> <lora:ink:1>", "blur", seed=5, steps=2, width=32, height=32)
LOCKED = {"locks": {"unet.mid_block.attentions.0.transformer_blocks.0": {"fox": 0.2, "ink": 0.4}}}
MASK = mask_text(Image.linear_gradient("L").resize((32, 32)))
SAME_NAME = "a fox <lora:people/fox:0.5> <lora:ink:1>"


@pytest.fixture(scope="module")
def folder(loras, awake, tmp_path_factory):
    """What the scripts find: a base in two forms, LoRA files in folders, two of one name, and trained gates."""
    folder = tmp_path_factory.mktemp("code")
    pipe = tiny_pipeline()
    pipe.save_pretrained(folder / "base")
    save_single_file(pipe, folder / "Dream.safetensors")
    shutil.copytree(folder / "base", folder / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    for name, file in {"people/fox": "fox", "hats/fox": "hat", "ink": "ink"}.items():
        (folder / "loras" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "loras" / f"{name}.safetensors").symlink_to(loras[file])
    names = {"people/fox": loras["fox"], "ink": loras["ink"]}
    awake(attach(pipe, names, "mole")).save_pretrained(folder / "mine")
    return folder


def drawn_by(script):
    exec(compile(script, "script", "exec"), {})
    with Image.open("picture.png") as image:
        return np.asarray(image)


@pytest.mark.parametrize(("base", "config"), [("base", None), *thorough(("Dream.safetensors", "config"))])
@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": SAME_NAME, "gates": "mine", "sampler": "Euler", **LOCKED},
        {"image": "image.png", "mask": "mask.png", "strength": 1.0, "prompt": "a (fox:1.3) <lora:ink:1:region=0,0,0.5,1>"},
        *thorough(
            {"prompt": "a fox"},
            {"prompt": SAME_NAME, "arm": "merge svd"},
            {"prompt": f"{SAME_NAME[:-1]}:word=fox:region=painted>", "masks": {"ink": MASK}, "hires": 1.5, "clip_skip": 2},
            {"prompt": "a fox, a (hat:1.2) <lora:hats/fox:1:word=hat> <lora:ink:1:word=fox>", "binding": "tiles"},
        ),
    ],
)
def test_a_script_draws_the_recipes_picture(changes, base, config, folder, monkeypatch):
    monkeypatch.chdir(folder)
    Image.effect_noise((40, 32), 90).convert("RGB").save("image.png")
    Image.linear_gradient("L").resize((40, 32)).save("mask.png")
    pictures = {name: Image.open(changes[name]) for name in ("image", "mask") if name in changes}
    found = open_base(base, config=config)
    studio = Studio(found.pipe, Catalog(files_of("loras", "lora"), folder_gates(".")), found.name, found.config)
    recipe = dataclasses.replace(RECIPE, **{name: value for name, value in changes.items() if name not in pictures})
    recipe = studio.complete(with_pictures(recipe, pictures.get("image"), pictures.get("mask")))
    wanted = np.asarray(studio.draw(recipe, **pictures))
    assert np.array_equal(drawn_by(as_code(recipe, studio.base.config)), wanted)


def test_a_checkpoint_is_opened_with_the_config_that_was_given(folder, monkeypatch):
    monkeypatch.chdir(folder)
    found = open_base("Dream.safetensors", config="config")
    studio = Studio(found.pipe, Catalog(files_of("loras", "lora"), {}), found.name, found.config)
    recipe = studio.complete(dataclasses.replace(RECIPE, prompt=SAME_NAME))
    assert np.array_equal(drawn_by(as_code(recipe, studio.base.config)), np.asarray(studio.draw(recipe)))


def test_a_script_draws_in_the_precision_of_the_app(folder, monkeypatch):
    """Which is that of a GPU where there is one; here that of one is chosen for the CPU."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(Memory, "completed", lambda self, kind: dataclasses.replace(self, device="cpu", dtype="bfloat16"))
    studio = Studio(open_base("base").pipe, Catalog({}, {}), "base")
    recipe = studio.complete(Recipe("a hat", seed=5, steps=2, width=32, height=32))
    assert np.array_equal(drawn_by(as_code(recipe)), np.asarray(studio.draw(recipe)))


@pytest.fixture(scope="module")
def world():
    from mole_world.world import concept_files, emoji_world, gate_folders

    pipe = emoji_world().pipe
    pipe.set_progress_bar_config(disable=True)
    return Studio(pipe, Catalog(concept_files(), gate_folders()), "emoji")


def test_scripts_of_the_embedded_world_need_no_files(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompt = "a sunflower and a doughnut <lora:sunflower:1> <lora:doughnut:0.8>"
    recipe = world.complete(Recipe(prompt, seed=3, steps=2, gates="auto", base="emoji"))
    assert recipe.gates == "sunflower+doughnut"
    assert np.array_equal(drawn_by(as_code(recipe)), np.asarray(world.draw(recipe)))


def test_a_file_or_gates_with_the_name_of_embedded_ones_are_not_taken_for_them(world, loras, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = world.complete(Recipe("a fox <lora:fox:1> <lora:relief:1>", gates="auto", base="emoji"))
    assert "Catalog(concept_files(), gate_folders())" in as_code(recipe)
    own = dataclasses.replace(recipe, gates_sha256="0" * 64, experts=recipe.experts | {"fox": "0" * 64})
    assert 'Catalog(concept_files() | files_of(".", "lora"), folder_gates("."))' in as_code(own)
