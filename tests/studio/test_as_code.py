"""The script of a recipe draws the picture of the recipe."""

import dataclasses

import hosts
import numpy as np
import pytest
from diffusers import DiffusionPipeline
from PIL import Image
from tiers import thorough

from mole_diffusers.binding.as_text import mask_text
from mole_diffusers.studio.as_code import as_code
from mole_diffusers.studio.base_models import open_base
from mole_diffusers.studio.catalog import Catalog
from mole_diffusers.studio.memory import Memory
from mole_diffusers.studio.picture_passes import with_pictures
from mole_diffusers.studio.recipe import Recipe
from mole_diffusers.studio.render import Studio
from mole_diffusers.testing import tiny_lora, tiny_pipeline

RECIPE = Recipe("a fox <lora:fox:0.5:lbw=OUTALL> <lora:ink:1>", "blur", seed=5, steps=2, width=32, height=32)
LOCKED = {"locks": {"unet.mid_block.attentions.0.transformer_blocks.0": {"fox": 0.2, "ink": 0.4}}}
MASK = mask_text(Image.linear_gradient("L").resize((32, 32)))


@pytest.fixture(scope="module")
def folder(loras, tmp_path_factory):
    """A folder with what the scripts load: the base, and the LoRA files by name."""
    folder = tmp_path_factory.mktemp("code")
    tiny_pipeline().save_pretrained(folder / "base")
    for name, file in {"fox": loras["fox"], "my:fox": loras["fox"], "ink": loras["ink"]}.items():
        (folder / f"{name}.safetensors").symlink_to(file)
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        *thorough({}, {"arm": "base"}, {"weights": False}, {"hires": 1.5, "hires_strength": 0.5}, {"arm": "alone fox"}),
        *thorough({"arm": "merge svd", "prompt": "a fox <lora:fox:0.5> <lora:ink:1>"}, {"prompt": "a fox"}),
        {"sampler": "Euler", **LOCKED},
        *thorough({"prompt": "a (fox:1.3), in the far east, a hat <lora:my:fox:0.5>", "negative": "[blur]"}),
        {"prompt": "a fox <lora:fox:0.5:word=fox:region=painted> <lora:ink:1:region=0,0,0.5,1>", "masks": {"fox": MASK}},
        *thorough({"image": "image.png", "strength": 0.5}),
        {"prompt": "a fox, a (hat:1.2) <lora:fox:1:word=fox> <lora:ink:1:word=hat>", "binding": "tiles", "hires": 1.5},
        *thorough({"prompt": "a fox, a hat <lora:fox:1:word=fox> <lora:ink:1:word=hat>", "binding": "bound", "width": 64}),
        *thorough({"image": "image.png", "mask": "mask.png", "strength": 1.0, "prompt": "a fox"}),
        *thorough({"hires": 1.5, "hires_strength": 0.5, "sampler": "DPM++ SDE"}, {"clip_skip": 2, "prompt": "a fox"}),
        {"clip_skip": 2},
    ],
)
def test_a_script_draws_the_recipes_picture(changes, loras, folder, monkeypatch):
    if changes.get("sampler") == "DPM++ SDE":
        pytest.importorskip("torchsde")
    monkeypatch.chdir(folder)
    Image.effect_noise((40, 32), 90).convert("RGB").save("image.png")
    mask = np.asarray(Image.linear_gradient("L").resize((40, 32))).astype(np.uint16)
    Image.fromarray(257 * mask).save("mask.png")  # of 16 bits
    pictures = {name: Image.open(changes[name]) for name in ("image", "mask") if name in changes}
    studio = Studio(DiffusionPipeline.from_pretrained("base"), Catalog({**loras, "my:fox": loras["fox"]}, {}), "base")
    recipe = dataclasses.replace(RECIPE, **{name: value for name, value in changes.items() if name not in pictures})
    recipe = studio.complete(with_pictures(recipe, pictures.get("image"), pictures.get("mask")))
    exec(compile(as_code(recipe), "script", "exec"), {})
    with Image.open("picture.png") as image:
        assert np.abs(np.asarray(image, int) - np.asarray(studio.draw(recipe, **pictures), int)).max() <= 1


def test_a_script_draws_in_the_precision_of_the_app(folder, monkeypatch):
    """Which is that of a GPU where there is one; here that of one is chosen for the CPU."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(Memory, "completed", lambda self, kind: dataclasses.replace(self, device="cpu", dtype="bfloat16"))
    studio = Studio(open_base("base").pipe, Catalog({}, {}), "base")
    recipe = studio.complete(Recipe("a hat", seed=5, steps=2, width=32, height=32))
    exec(compile(as_code(recipe), "script", "exec"), {})
    with Image.open("picture.png") as image:
        assert np.array_equal(np.asarray(image), np.asarray(studio.draw(recipe)))


@pytest.mark.parametrize("weights", [True, *thorough(False)])
def test_a_script_has_the_second_prompts(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe, _ = hosts.HOSTS["sdxl"]()
    pipe.save_pretrained("base")
    studio = Studio(pipe, Catalog({"fox": tiny_lora(pipe, tmp_path / "fox.safetensors")}, {}), "base")
    second = {"prompt_2": "a (fox:1.2) BREAK a hat", "negative_2": "ink", "weights": weights}
    recipe = studio.complete(dataclasses.replace(RECIPE, prompt="a hen <lora:fox:1:word=fox>", **second))
    exec(compile(as_code(recipe), "script", "exec"), {})
    with Image.open("picture.png") as image:
        assert np.abs(np.asarray(image, int) - np.asarray(studio.draw(recipe), int)).max() <= 1


@pytest.fixture(scope="module")
def world():
    from mole_diffusers.emoji.world import concept_files, emoji_world, gate_folders

    pipe = emoji_world().pipe
    pipe.set_progress_bar_config(disable=True)
    return Studio(pipe, Catalog(concept_files(), gate_folders()), "emoji")


WEIGHTS = {"prompt": "a (sunflower:1.3) and a doughnut"}


@pytest.mark.parametrize(
    "changes",
    [
        {"binding": "tiles"},
        *thorough(
            {"negative": "(red:1.4)"}, WEIGHTS, WEIGHTS | {"binding": "tiles"}, {}, {"arm": "merge ties"}, {"strength": 1.0}
        ),
    ],
)
def test_scripts_of_the_embedded_world_need_no_files(changes, world, tmp_path, monkeypatch):
    """Its gates are trained, its LoRAs know their words, and its UNet has eight channels, which diffusers refuses."""
    monkeypatch.chdir(tmp_path)
    over = {}
    if "strength" in changes:
        over = {"image": Image.effect_noise((64, 64), 90).convert("RGB"), "mask": Image.new("L", (64, 64))}
        over["mask"].paste(255, (0, 0, 32, 64))
        for name, picture in over.items():
            picture.save(f"{name}.png")
    text = changes.get("prompt", "a sunflower and a doughnut")
    prompt = f"{text} <lora:sunflower:1> <lora:doughnut:0.8>"
    recipe = Recipe(**changes | {"prompt": prompt}, seed=3, steps=2, gates="auto", base="emoji")
    recipe = world.complete(with_pictures(recipe, **over))
    assert recipe.gates == "sunflower+doughnut"
    exec(compile(as_code(recipe), "script", "exec"), {})
    drawn = np.asarray(world.draw(recipe, **over), int)
    assert world.pipe.unet.config.in_channels == 20
    with Image.open("picture.png") as image:
        assert np.abs(np.asarray(image, int) - drawn).max() <= 1
    if over:
        start = np.asarray(over["image"], int)
        assert (drawn[:, 34:] == start[:, 34:]).all()
        assert np.abs(drawn[:, :30] - start[:, :30]).max() > 20


def test_a_file_or_gates_with_the_name_of_embedded_ones_are_not_taken_for_them(world):
    recipe = world.complete(Recipe("a fox <lora:fox:1> <lora:relief:1>", gates="auto", base="emoji"))
    assert "gates=gate_folders()['fox+relief']" in as_code(recipe)
    assert "'fox': concept_files()['fox']" in as_code(recipe)
    own = dataclasses.replace(recipe, gates_sha256="0" * 64, experts=recipe.experts | {"fox": "0" * 64})
    assert "gates='fox+relief'" in as_code(own)
    assert "'fox': 'fox.safetensors', 'relief': concept_files()['relief']" in as_code(own)
