"""Subjects keep their places in a picture that is drawn over."""

import diffusers
import pytest
import torch
from hosts import HOSTS, draw, ip_adapter, sdxl
from PIL import ImageOps
from tiers import thorough
from tiny import tiny_lora

import mole_diffusers as mole
from mole_diffusers.patching.subjects.place_sources import img2img
from mole_world import emoji_world
from mole_world.scenes import Scene

CALL = {"strength": 0.5, "num_inference_steps": 4, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def world():
    return emoji_world()


@pytest.fixture(scope="module")
def over(world):
    return diffusers.StableDiffusionImg2ImgPipeline(**world.pipe.components, requires_safety_checker=False)


@pytest.fixture(scope="module")
def picture(world):
    """A koala left of a tiger."""
    return world.drawings.picture(Scene(("koala", "tiger"), "noto", "green"))


def drawn(pipe, prompt, image, **options):
    options = CALL | {"generator": torch.Generator().manual_seed(0), "output_type": "latent"} | options
    return pipe(prompt, image=image, **options).images


@pytest.mark.parametrize("mirrored", [False, *thorough(True)])
def test_places_are_those_of_the_picture_whoever_is_named_first(world, over, picture, mirrored):
    mixture = mole.attach(over, {name: world.loras[name] for name in ("tiger", "koala")})
    prompts = [
        f"noto drawing of {subjects} on a green background" for subjects in ("a koala and a tiger", "a tiger and a koala")
    ]
    koala = torch.zeros(16, 32)
    koala[:, :16] = 1
    image, koala = (ImageOps.mirror(picture), 1 - koala) if mirrored else (picture, koala)
    for prompt in prompts:
        drawn(over, prompt, image, num_inference_steps=2)
        assert torch.equal(mixture.layouts[0].regions["koala"], koala)
        assert torch.equal(mixture.layouts[0].regions["tiger"], 1 - koala)


def test_what_is_found_is_drawn_as_what_is_given(world, over, picture):
    """By gates that know the noise level: finding places leaves nothing of its own calls behind."""
    config = mole.GateConfig("static", granularity="model", bins=10, total="linear")
    mixture = mole.attach(over, {name: world.loras[name] for name in ("koala", "tiger")}, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter += torch.rand(parameter.shape, generator=generator) - 0.5
    prompt = "noto drawing of a tiger and a koala on a green background"
    hooks = list(over.unet._forward_pre_hooks)
    with mixture.trace() as found_trace:
        found = drawn(over, prompt, picture)
    assert list(over.unet._forward_pre_hooks) == hooks
    assert "add_noise" not in vars(over.scheduler)
    with mixture.bound({"koala": (None, "left"), "tiger": (None, "right")}), mixture.trace() as given_trace:
        given = drawn(over, prompt, picture)
    torch.testing.assert_close(found, given, rtol=0, atol=1e-5)
    steps = [[(place, step) for place, step, _ in trace.records if step >= 0] for trace in (found_trace, given_trace)]
    assert steps[0] == steps[1] != []
    with mixture.bound({"koala": (None, "right"), "tiger": (None, "left")}):
        assert (drawn(over, prompt, picture) - given).abs().max() > 1e-2


def test_a_place_fits_the_subject_whose_model_errs_least_there(pipe, loras, monkeypatch):
    """The errors, by hand, of a model that predicts the noise."""
    over = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    mixture = mole.attach(over, {name: loras[name] for name in ("fox", "hat")}, binding={"fox": "fox", "hat": "hen"})
    image = torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(3))
    seen = []
    monkeypatch.setattr(
        img2img, "regions_of_subjects", lambda reading, free, maps, *_: (seen.append(maps), (torch.ones_like(maps), 0.0))[1]
    )
    with torch.no_grad():
        latents = over.vae.encode(2 * image - 1).latent_dist.mode() * over.vae.config.scaling_factor
    monkeypatch.setattr(type(over.vae), "encode", lambda *_, **__: Fixed(latents / over.vae.config.scaling_factor))
    drawn(over, "a fox+a hen", image)
    alpha = over.scheduler.alphas_cumprod[500]
    noise = torch.randn(2, *latents.shape[1:], generator=torch.Generator().manual_seed(0))
    errors = []
    for name, word in (("fox", "fox"), ("hat", "hen")):
        with torch.no_grad(), mixture.bound(None), mixture.only(name):
            text = over.encode_prompt(f"a {word}", "cpu", 1, False)[0].expand(2, -1, -1)
            found = over.unet(alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, 500, text).sample
        errors.append((found - noise).square().mean((0, 1)))
    by_hand = torch.stack(errors)
    torch.testing.assert_close(seen[0], by_hand.amax(0) - by_hand, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", [0, *thorough(1, 2)])
def test_places_do_not_depend_on_how_many_pictures_are_drawn(seed, tmp_path):
    pipe, options = HOSTS["sd15-img2img"]()
    ends = ("to_q", "to_k", "to_v", "to_out.0")
    files = {n: tiny_lora(pipe, tmp_path / n, seed=10 * seed + i, ends=ends) for i, n in enumerate(("fox", "owl"))}
    mole.attach(pipe, files, binding={"fox": "fox", "owl": "owl"})
    one = draw(pipe, options, "fox & owl", steps=3)
    for count in (2, 3):
        same = [torch.Generator().manual_seed(0) for _ in range(count)]
        several = draw(pipe, options | {"num_images_per_prompt": count, "generator": same}, "fox & owl", steps=3)
        torch.testing.assert_close(several, one.expand_as(several), atol=1e-5, rtol=0)


class Fixed:
    """What an autoencoder gives, without chance."""

    def __init__(self, latents):
        self.latents = latents


SEEDS = [torch.Generator().manual_seed(seed) for seed in range(2)]


@pytest.mark.parametrize(
    ("kind", "options", "finds"),
    [
        ("Img2Img", {}, True),
        ("Img2Img", {"prompt": "a fox"}, False),  # one thing
        ("Img2Img", {"image": torch.rand(2, 3, 32, 64), "prompt": ["a fox+a hen"] * 2}, False),  # two pictures
        ("Img2Img", {"prompt": ["a fox+a hen"] * 2, "generator": SEEDS}, True),
        *thorough(("Inpaint", {"mask_image": torch.ones(1, 1, 32, 64)}, True)),
        ("Inpaint", {"mask_image": torch.ones(1, 1, 32, 64), "strength": 1.0}, False),  # nothing of the picture is kept
    ],
)
def test_the_unet_is_called_for_each_subject_of_one_picture(pipe, loras, kind, options, finds):
    over = getattr(diffusers, f"StableDiffusion{kind}Pipeline")(**pipe.components, requires_safety_checker=False)
    mole.attach(over, {name: loras[name] for name in ("fox", "hat")}, binding={"fox": "fox", "hat": "hen"})
    calls = []
    hook = over.unet.conv_in.register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
    size = {"height": 32, "width": 64} if kind == "Inpaint" else {}
    options = {"prompt": "a fox+a hen", "image": torch.rand(1, 3, 32, 64)} | size | options
    drawn(over, **options)
    hook.remove()
    steps = max(1, int(4 * options.get("strength", 0.5)))
    assert len(calls) == steps + 2 * finds


def test_what_else_the_unet_is_given_stays(pipe, loras):
    over = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    ip_adapter(over)
    mole.attach(over, {name: loras[name] for name in ("fox", "hat")}, binding={"fox": "fox", "hat": "hen"})
    shown, calls = torch.rand(1, 3, 32, 32), []
    over.unet.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    drawn(over, "a fox+a hen", torch.rand(1, 3, 32, 64), ip_adapter_image=shown)
    embeds = [call["added_cond_kwargs"]["image_embeds"][0] for call in calls]
    assert len(embeds) == 4
    assert all(torch.equal(each, embeds[-1]) for each in embeds)


@pytest.mark.thorough
def test_sdxl_reads_the_whole_prompt_of_each_subject_too(tmp_path):
    pipe, (fox, ink) = sdxl(), (tmp_path / f"{name}.safetensors" for name in ("fox", "ink"))
    for seed, path in enumerate((fox, ink)):
        tiny_lora(pipe, path, seed=seed)
    over = diffusers.StableDiffusionXLImg2ImgPipeline(**pipe.components)
    mole.attach(over, {"fox": fox, "hat": ink}, binding={"fox": "fox", "hat": "hen"})
    calls = []
    over.unet.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs["added_cond_kwargs"]), with_kwargs=True)
    drawn(over, "a fox+a hen", torch.rand(1, 3, 32, 64))
    fox_alone, hat_alone, step, _ = (added["text_embeds"] for added in calls)
    assert len(fox_alone) == len(step) == 2
    assert torch.equal(fox_alone[0], fox_alone[1])
    assert not torch.allclose(fox_alone, hat_alone)
