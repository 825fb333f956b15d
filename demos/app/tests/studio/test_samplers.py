"""Samplers by their usual names draw what their schedulers draw, and clip skip ends the text encoder earlier."""

import dataclasses
from contextlib import ExitStack, nullcontext

import diffusers
import hosts
import numpy as np
import pytest
import torch
from tiers import thorough
from tiny import tiny_pipeline

from mole_app.studio.catalog import Catalog
from mole_app.studio.recipe import Recipe
from mole_app.studio.render import Studio
from mole_app.studio.samplers import NEEDED, SAMPLERS, sampler, samplers_of
from mole_diffusers import attach, detach

RECIPE = Recipe("a fox in ink <lora:fox:0.8> <lora:ink:1>", seed=7, steps=4, width=32, height=32)


@pytest.fixture(scope="module")
def studio(loras):
    return Studio(tiny_pipeline(), Catalog(loras, {}), "tiny")


def array(image):
    return np.asarray(image, int)


def far(a, b):
    """The largest difference of two pictures, in 0..255."""
    return np.abs(array(a) - array(b)).max()


FAST = ("DPM++ 2M Karras",)


@pytest.mark.parametrize("name", [*FAST, *thorough(*(n for n in SAMPLERS if n not in FAST))])
def test_each_sampler_draws_what_its_scheduler_draws(studio, name):
    """By its name in any case; strengths by step are those of steps, also where a step has two evaluations."""
    if package := NEEDED.get(SAMPLERS[name][0]):
        pytest.importorskip(package)
    recipe = studio.complete(dataclasses.replace(RECIPE, sampler=name.lower()))
    assert recipe.sampler == name
    seen = []
    image = studio.draw(recipe, on_step=lambda step, _: seen.append(step))
    assert seen == [1, 2, 3, 4]
    assert array(image).std() > 1
    pipe, (kind, options) = tiny_pipeline(), SAMPLERS[name]
    options = options | ({"noise_sampler_seed": 7} if kind in NEEDED else {})
    pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config, **options)
    attach(pipe, {"fox": (studio.catalog.loras["fox"], 0.8), "ink": studio.catalog.loras["ink"]})
    given = {"num_inference_steps": 4, "guidance_scale": 3.0, "generator": torch.Generator().manual_seed(7)}
    assert far(pipe("a fox in ink", **given).images[0], image) <= 1
    detach(pipe)
    two, plms = SAMPLERS[name][0].startswith(("Heun", "KDPM2", "DPMSolverSDE")), name == "PLMS"
    assert evaluations(studio, recipe) == [1.0] * (7 if two else 5 if plms else 4)
    stopping = dataclasses.replace(recipe, prompt="a fox in ink <lora:fox:1:stop=2> <lora:ink:1>")
    on = 4 if two else 2
    assert evaluations(studio, stopping) == [1.0] * on + [0.0] * ((7 if two else 5 if plms else 4) - on)


@pytest.mark.parametrize("name", ["DDIM", "DDPM"])
def test_samplers_clip_latents_only_if_the_models_scheduler_does(name):
    said = {clip: sampler(name, hosts.noise(clip_sample=clip)).config.clip_sample for clip in (False, True)}
    assert said == {False: False, True: True}
    assert not sampler(name, hosts.noise(diffusers.EulerDiscreteScheduler)).config.clip_sample


def test_a_sampler_that_needs_a_package_is_listed_where_that_is(studio, monkeypatch):
    monkeypatch.setattr("mole_app.studio.samplers.find_spec", lambda name: None)
    assert not [name for name in studio.base.samplers if name.startswith("DPM++ SDE")]
    with pytest.raises(
        ValueError, match=r"'DPM\+\+ SDE Karras' needs the package torchsde: pip install 'mole-diffusers\[sampl"
    ):
        studio.complete(dataclasses.replace(RECIPE, sampler="DPM++ SDE Karras"))
    with pytest.raises(ValueError, match=r"unknown sampler 'DPM\+\+ SDE'; known: Euler$"):  # which no package would help
        sampler("DPM++ SDE", hosts.flow())
    monkeypatch.setattr("mole_app.studio.samplers.find_spec", lambda name: name)
    assert [name for name in studio.base.samplers if name.startswith("DPM++ SDE")] == ["DPM++ SDE", "DPM++ SDE Karras"]
    assert list(samplers_of(hosts.flow())) == ["Euler"]


def test_noise_of_a_samplers_own_is_that_of_the_seed(studio):
    """Alone, again, and in a batch of other seeds."""
    pytest.importorskip("torchsde")
    recipe = studio.complete(dataclasses.replace(RECIPE, sampler="DPM++ SDE", steps=2))
    first = studio.draw(recipe)
    assert far(first, studio.draw(recipe)) == 0
    assert far(first, studio.draw(dataclasses.replace(recipe, seed=8))) > 1
    pipe = tiny_pipeline()
    attach(pipe, {"fox": (studio.catalog.loras["fox"], 0.8), "ink": studio.catalog.loras["ink"]})
    pipe.scheduler = sampler("DPM++ SDE", pipe.scheduler, [3, 7])
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 7)]
    both = pipe(["a fox in ink"] * 2, num_inference_steps=2, guidance_scale=3.0, generator=generators).images
    assert far(both[1], first) <= 1


def test_clip_skip_ends_the_text_encoder_earlier(studio):
    """As diffusers' argument, which counts one less, and means the prompt alone; also where words have weights."""
    recipe = studio.complete(dataclasses.replace(RECIPE, clip_skip=2, guidance=1.0))
    image, layers = studio.draw(recipe), studio.base.pipe.text_encoder.encoder.layers
    pipe = tiny_pipeline()
    attach(pipe, {"fox": (studio.catalog.loras["fox"], 0.8), "ink": studio.catalog.loras["ink"]})
    given = {"num_inference_steps": 4, "guidance_scale": 1.0, "generator": torch.Generator().manual_seed(7)}
    assert far(pipe("a fox in ink", clip_skip=1, **given).images[0], image) <= 1
    assert far(studio.draw(dataclasses.replace(recipe, clip_skip=1)), image) > 1
    weighted = dataclasses.replace(recipe, prompt=recipe.prompt.replace("a fox", "a (fox:1.001)"))
    assert far(studio.draw(weighted), image) <= 2
    with pytest.raises(ValueError, match=r"clip skip is in 1..2 with this base, got 3"):  # before anything is drawn
        studio.complete(dataclasses.replace(recipe, clip_skip=3))
    assert studio.base.pipe.text_encoder.encoder.layers is layers
    assert len(layers) == 2


def test_a_base_without_clip_skip_is_drawn_without_it():
    studio = Studio(hosts.HOSTS["sdxl"]()[0], Catalog({}, {}), "xl")
    asked = Recipe("a fox", steps=1, clip_skip=2)
    recipe = studio.complete(asked)
    assert recipe.clip_skip == 1
    assert studio.notes(asked, recipe) == ["StableDiffusionXLPipeline is drawn without clip skip"]
    assert studio.notes(recipe, recipe) == []


def evaluations(studio, recipe):
    """The weight of the fox each time the denoiser is evaluated."""
    recipe = dataclasses.replace(recipe, prompt=recipe.prompt.replace("fox:0.8", "fox:1"))
    with ExitStack() as stack:
        traces = []
        studio.draw(recipe, inside=lambda mixture: traces.append(stack.enter_context(mixture.trace())) or nullcontext())
    place = next(p for p in traces[0].locations if p.startswith("unet.mid_block") and "(" not in p)
    return traces[0].weights(place)[:, 0].tolist()


def test_samplers_differ_and_the_own_one_comes_back(studio):
    own = studio.base.pipe.scheduler
    drawn = {n: studio.draw(studio.complete(dataclasses.replace(RECIPE, sampler=n))) for n in ("Euler", "Euler Karras")}
    assert far(*drawn.values()) > 0
    assert studio.base.pipe.scheduler is own
    pipe = tiny_pipeline()
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(own.config, use_karras_sigmas=True)
    again = Studio(pipe, studio.catalog, "tiny")
    assert far(again.draw(again.complete(dataclasses.replace(RECIPE, sampler="Euler"))), drawn["Euler"]) == 0
