"""Modular diffusers: SDXL's blocks with the inputs of `attach`."""

import hosts
import numpy as np
import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance
from tiers import thorough
from tiny import tiny_lora

import mole_diffusers as mole

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
CALL = {"num_inference_steps": 2, "output_type": "np", "height": 32, "width": 32}
BINDINGS = [*thorough(None, "auto"), {"fox": ("fox", "left"), "ink": ("ink", "right")}]


@pytest.fixture
def pipe():
    return hosts.sdxl()


@pytest.fixture
def modular(pipe):
    made = mole.MoLEStableDiffusionXLBlocks().init_pipeline()
    made.update_components(
        **{name: pipe.components[name] for name in PARTS}, guider=ClassifierFreeGuidance(guidance_scale=5)
    )
    return made


@pytest.fixture
def experts(pipe, tmp_path):
    return {name: tiny_lora(pipe, tmp_path / f"{name}.safetensors", seed=i) for i, name in enumerate(("fox", "ink"))}


def drawn(modular, **options):
    picture = modular(prompt="a fox in ink", output="images", generator=torch.Generator().manual_seed(0), **CALL, **options)
    return np.asarray(picture)


def reference(pipe, *attached, **options):
    if attached:
        mole.attach(pipe, *attached, **options)
    generator = torch.Generator().manual_seed(0)
    picture = pipe("a fox in ink", guidance_scale=5.0, generator=generator, **CALL).images
    mole.detach(pipe)
    return picture


@pytest.mark.parametrize("binding", BINDINGS)
def test_the_blocks_draw_what_the_pipeline_draws(pipe, modular, experts, binding):
    wanted = reference(pipe, experts, "sum", binding=binding)
    np.testing.assert_allclose(drawn(modular, experts=experts, binding=binding), wanted, atol=1e-5)


def test_each_call_says_what_is_attached(pipe, modular, experts):
    base, fox = reference(pipe), reference(pipe, {"fox": (experts["fox"], 0.5)})
    np.testing.assert_allclose(drawn(modular), base, atol=1e-5)
    np.testing.assert_allclose(drawn(modular, experts={"fox": (experts["fox"], 0.5)}), fox, atol=1e-5)
    np.testing.assert_allclose(drawn(modular), fox, atol=1e-5)
    np.testing.assert_allclose(drawn(modular, experts={}), base, atol=1e-5)
    assert mole.attached(modular) is None


def test_a_loop_of_ones_own_is_a_call_in_drawing(pipe, experts, recwarn):
    """`pipe.__call__` as diffusers wrote it, without what attach puts around it: a call says whose words are missing."""
    binding = {"fox": ("fox", "left"), "ink": "a hat"}
    mixture = mole.attach(pipe, experts, binding=binding)
    call = type(pipe).__call__.__wrapped__

    def loop():
        generator = torch.Generator().manual_seed(0)
        return call(pipe, "a fox in ink", guidance_scale=5.0, generator=generator, **CALL).images

    loop()
    assert not [w for w in recwarn if "acts everywhere" in str(w.message)]
    with mixture.drawing(), pytest.warns(UserWarning, match="expert 'ink' acts everywhere"):
        picture = loop()
    np.testing.assert_allclose(picture, reference(pipe, experts, binding=binding), atol=1e-6)
