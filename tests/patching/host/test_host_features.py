"""What people switch on in a pipeline, with a mixture on it: the same picture by another route, or one clear sentence."""

import copy

import diffusers
import hosts
import pytest
import torch
from tiers import thorough
from tiny import tiny_lora, tiny_pipeline

import mole_diffusers as mole

CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture
def mixed(pipe, loras, awake):
    """A pipeline with a mixture whose gates depend on what they read."""
    awake(mole.attach(pipe, loras, "mole"))
    return pipe


def draws(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def pictures(pipe, prompt, seeds, **options):
    options = {"num_inference_steps": 2, "output_type": "np"} | options
    return torch.from_numpy(pipe(prompt, generator=draws(*seeds), **options).images)


# ---- what a call can say


def text_states(pipe, prompts, skip=None):
    """What the pipeline's text encoder makes of prompts, asked by hand."""
    ids = pipe.tokenizer(prompts, padding="max_length", max_length=16, return_tensors="pt").input_ids
    states = pipe.text_encoder(ids, output_hidden_states=True)
    return states[0] if skip is None else pipe.text_encoder.final_layer_norm(states.hidden_states[-(skip + 1)])


@pytest.mark.parametrize("skip", [*thorough(None), 1])
@pytest.mark.shows("these work")
def test_prompt_embeddings_and_clip_skip(mixed, draw, skip):
    with torch.no_grad():  # diffusers skips layers for the prompt alone
        states, empty = text_states(mixed, ["a fox in ink"], skip), text_states(mixed, [""])
    given = {"prompt_embeds": states, "negative_prompt_embeds": empty}
    picture = draw(mixed, clip_skip=skip)
    torch.testing.assert_close(draw(mixed, prompt=None, **given), picture, **CLOSE)
    assert torch.allclose(draw(mixed), picture, atol=1e-3) is (skip is None)


@pytest.mark.thorough
@pytest.mark.shows("these work")
def test_clip_skip_of_sdxl(awake, tmp_path):
    pipe, _ = hosts.HOSTS["sdxl"]()
    awake(mole.attach(pipe, {str(i): tiny_lora(pipe, tmp_path / str(i), seed=i) for i in range(2)}, "mole"))
    given = pipe.encode_prompt("a fox in ink", device="cpu", clip_skip=1)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    by_hand = hosts.draw(pipe, dict(zip(names, given, strict=True)), prompt=None)
    torch.testing.assert_close(by_hand, hosts.draw(pipe, {"clip_skip": 1}), **CLOSE)
    assert not torch.allclose(by_hand, hosts.draw(pipe, {}), atol=1e-3)


@pytest.mark.shows("these work")
def test_freeu_draws_what_it_draws_of_diffusers_own_adapters(pipe, loras, draw):
    for name, file in loras.items():
        pipe.load_lora_weights(file, adapter_name=name)
    pipe.set_adapters(list(loras))
    pipe.enable_freeu(s1=0.6, s2=0.4, b1=1.3, b2=1.4)
    wanted = draw(pipe)
    pipe.unload_lora_weights()
    mole.attach(pipe, loras, binding=None)
    torch.testing.assert_close(draw(pipe), wanted, **CLOSE)
    pipe.disable_freeu()
    assert not torch.allclose(draw(pipe), wanted, atol=1e-3)


@pytest.mark.shows("these work")
def test_several_prompts_and_several_pictures_of_each(mixed):
    together = pictures(mixed, ["a fox", "ink"], (1, 2, 3, 4), num_images_per_prompt=2)
    alone = [pictures(mixed, prompt, [seed]) for prompt, seed in (("a fox", 1), ("a fox", 2), ("ink", 3), ("ink", 4))]
    torch.testing.assert_close(together, torch.cat(alone), **CLOSE)


@pytest.mark.parametrize(("height", "width"), [(48, 32), *thorough((16, 64), (64, 64))])
@pytest.mark.shows("these work")
def test_any_resolution(mixed, draw, loras, height, width):
    """The other route: gates held at what they would be if they were still, summed by diffusers itself."""
    weights = {"fox": 0.3, "ink": 0.5, "hat": 0.2}
    assert draw(mixed, height=height, width=width).shape == (1, height, width, 3)
    with mole.attached(mixed).fixed(weights):
        ours = draw(mixed, height=height, width=width)
    plain = tiny_pipeline()
    for name, path in loras.items():
        plain.load_lora_weights(path, adapter_name=name)
    plain.set_adapters(list(weights), list(weights.values()))
    torch.testing.assert_close(ours, draw(plain, height=height, width=width), **CLOSE)


# ---- how the models compute


@pytest.mark.shows("these work")
def test_channels_last(mixed, draw):
    picture = draw(mixed)
    for model in (mixed.unet, mixed.vae):
        model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(draw(mixed), picture, **CLOSE)


@pytest.mark.shows("these work")
def test_attention_slicing_on_and_off(mixed, draw):
    picture = draw(mixed)
    mixed.enable_attention_slicing(1)
    torch.testing.assert_close(draw(mixed), picture, **CLOSE)
    mixed.disable_attention_slicing()
    mixed.unet.set_default_attn_processor()
    torch.testing.assert_close(draw(mixed), picture, **CLOSE)
    kinds = {type(p).__name__ for p in mixed.unet.attn_processors.values()}
    mole.detach(mixed)
    assert {type(p).__name__ for p in mixed.unet.attn_processors.values()} <= kinds | {"AttnProcessor2_0"}


@pytest.mark.shows("these work")
def test_vae_tiling(mixed, draw):
    """The other route: latents drawn without tiles, decoded tile by tile by hand."""
    size = {"height": 64, "width": 64}
    latents = mixed("a fox in ink", generator=draws(0)[0], num_inference_steps=2, output_type="latent", **size).images
    whole = draw(mixed, **size)
    mixed.vae.enable_tiling()
    mixed.vae.enable_slicing()
    mixed.vae.tile_latent_min_size, mixed.vae.tile_sample_min_size = 16, 32
    with torch.no_grad():
        tiles = mixed.vae.tiled_decode(latents / mixed.vae.config.scaling_factor).sample
    picture = draw(mixed, **size)
    torch.testing.assert_close(
        picture, mixed.image_processor.postprocess(tiles, output_type="pt").permute(0, 2, 3, 1), **CLOSE
    )
    assert not torch.allclose(picture, whole, atol=1e-3)


# ---- what is saved, shared or made of the models


@pytest.mark.shows(
    "`save_pretrained` of a plain pipeline",
)
def test_saving_a_pipeline_with_a_mixture_saves_the_original(mixed, loras, draw, tmp_path):
    picture = draw(mixed)
    mixed.save_pretrained(tmp_path / "pipe")
    mixed.unet.save_pretrained(tmp_path / "unet")
    assert torch.equal(draw(mixed), picture)
    again = hosts.quiet(diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "pipe"))
    torch.testing.assert_close(draw(again), draw(tiny_pipeline()), **CLOSE)
    alone = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert all(torch.equal(v, again.unet.state_dict()[k]) for k, v in alone.state_dict().items())


@pytest.mark.thorough
def test_a_copy_made_under_a_mixture_saves_as_the_original(mixed, tmp_path):
    copy.deepcopy(mixed.unet).save_pretrained(tmp_path)
    saved, original = (
        diffusers.UNet2DConditionModel.from_pretrained(tmp_path).state_dict(),
        tiny_pipeline().unet.state_dict(),
    )
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in saved)


@pytest.mark.shows("`ControlNetModel.from_unet`")
def test_a_controlnet_is_made_of_the_original(mixed):
    with pytest.raises(ValueError, match=r"carries the experts of a mixture.*inside `with mixture.lifted\(\):`"):
        diffusers.ControlNetModel.from_unet(mixed.unet)
    with mole.attached(mixed).lifted():
        made = diffusers.ControlNetModel.from_unet(mixed.unet)
    wanted = diffusers.ControlNetModel.from_unet(tiny_pipeline().unet).state_dict()
    down = [k for k in wanted if k.startswith("down_blocks")]
    assert down
    assert all(torch.equal(made.state_dict()[k], wanted[k]) for k in down)
    assert mixed.unet.state_dict().keys() >= {"mole_gates.gates.network.log_tau"}


@pytest.mark.shows("`from_pipe`")
def test_from_pipe_of_diffusers_shares_the_mixture_and_casts_what_is_shared(loras, draw, awake):
    pipe = tiny_pipeline().to(torch.bfloat16)
    mixture = awake(mole.attach(pipe, loras, "mole"))
    picture = draw(pipe)
    other = diffusers.StableDiffusionPipeline.from_pipe(pipe, dtype=torch.bfloat16)
    assert torch.equal(draw(hosts.quiet(other)), picture)
    assert mole.attached(other) is mixture
    cast = diffusers.StableDiffusionPipeline.from_pipe(pipe)  # to float32, as diffusers does unless it is told
    assert pipe.unet.dtype == torch.float32
    twin = tiny_pipeline().to(torch.bfloat16)
    awake(mole.attach(twin, loras, "mole"))
    assert torch.equal(draw(hosts.quiet(cast)), draw(twin.to(torch.float32)))
    mole.detach(pipe)
    assert torch.equal(draw(pipe), draw(tiny_pipeline().to(torch.bfloat16).to(torch.float32)))
