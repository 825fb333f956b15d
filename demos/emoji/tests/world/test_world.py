"""The embedded world: complete, judged, and the plugin's promises on a trained model."""

import numpy as np
import pytest
import torch

import mole_diffusers as mole
import mole_world
from mole_diffusers.lora import read_expert
from mole_world import emoji_world


@pytest.fixture(scope="module")
def world():
    return emoji_world()


def pixels(image):
    return torch.from_numpy(np.asarray(image, np.float32) / 255)


def test_everything_is_there_and_small(world):
    assert set(mole_world.words.HELD_OUT_SUBJECTS) | set(mole_world.words.HELD_OUT_STYLES) <= set(world.loras)
    assert {"sunflower+doughnut", "honeybee+thermal", "fox+relief"} == set(world.gates)
    assert sum(p.stat().st_size for p in world.folder.rglob("*") if p.is_file()) <= 64e6


def test_loras_mix_formats_ranks_and_layers(world):
    experts = {name: read_expert(path) for name, path in world.loras.items()}
    assert [e.format for e in experts.values()].count("kohya") == 2
    assert {e.ranks[0] for e in experts.values()} == {4, 8, 16}
    assert {"text_encoder", "unet"} == {part for e in experts.values() for part in e.layers}
    assert {any("resnets" in k for k in e.layers["unet"]) for e in experts.values()} == {True, False}
    assert all(e.triggers == (name,) for name, e in experts.items())
    scales = {w.scale for e in experts.values() if e.format == "kohya" for w in e.layers["unet"].values()}
    assert scales == {0.5}


@pytest.mark.thorough
def test_sum_equals_set_adapters_on_the_trained_base():
    """In double precision: in single, four guided steps make 3e-4 of what rounding differs by."""
    from diffusers import StableDiffusionPipeline

    world = emoji_world()
    pipe = StableDiffusionPipeline(**world.pipe.components, requires_safety_checker=False).to(dtype=torch.float64)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "pt"}

    def draw():
        return pipe("blueprint drawing of a fox", generator=torch.Generator().manual_seed(3), **options).images

    base = draw()
    concepts = {name: world.loras[name] for name in ("fox", "octopus", "blueprint")}
    mole.attach(pipe, concepts, "sum", binding=None)
    ours = draw()
    mole.detach(pipe)
    assert torch.equal(draw(), base)
    for name, path in concepts.items():
        pipe.load_lora_weights(path, adapter_name=name)
    pipe.set_adapters(list(concepts), [1.0] * 3)
    theirs = draw()
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
    assert (ours - base).abs().max() > 0.1


def test_filters_are_exact_functions_of_the_drawing(world):
    noto = np.asarray(world.drawings.drawing("fox", "noto"), np.float32)
    negative = np.asarray(world.drawings.drawing("fox", "negative"), np.float32)
    assert np.array_equal(noto[..., :3] + negative[..., :3], np.full((64, 64, 3), 255))
    with pytest.raises(KeyError, match="no drawing of 'yeti'"):
        world.drawings.drawing("yeti", "noto")
