"""Sampling and the diffusion loss against the pipeline's own."""

from itertools import product

import hosts
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from tiers import thorough
from tiny import tiny_lora

import mole_diffusers as mole
from mole_diffusers.patching.gating.prompt_tokens import PromptTokens
from mole_diffusers.training import RandomBatch, Samples, default_side, denoising_loss
from mole_diffusers.training.denoising import predict, sample_latents
from mole_diffusers.training.latents import decode, encode_pixels, latent_shape
from mole_diffusers.training.networks import training_scheduler


def test_sampling_equals_the_pipelines_own(pipe, loras, draw):
    """Two routes: the differentiable sampler, and StableDiffusionPipeline with the same noise."""
    mole.attach(pipe, {"fox": loras["fox"]}, "mole")
    noise = torch.randn(2, 4, 16, 16)
    for guidance in (1.0, 3.0):
        host = pipe(
            ["a fox", "fox"], latents=noise, num_inference_steps=3, guidance_scale=guidance, output_type="latent"
        ).images
        for checkpointing in (False, True):
            with torch.no_grad():
                ours = sample_latents(pipe, noise, ["a fox", "fox"], steps=3, guidance=guidance, checkpointing=checkpointing)
            torch.testing.assert_close(ours, host, atol=1e-5, rtol=1e-5)


def test_a_schedule_that_says_nothing_of_clipping_clips_nothing(pipe):
    """Euler's config has no such option, DDIM's default is to clip, and latents are larger than 1."""
    noise = torch.randn(1, 4, 16, 16)
    found = []
    for scheduler in (pipe.scheduler, hosts.noise(EulerDiscreteScheduler, timestep_spacing="leading")):
        pipe.scheduler = scheduler
        with torch.no_grad():
            found.append(sample_latents(pipe, noise, ["a fox"], steps=3, guidance=3.0))
    assert found[0].abs().max() > 1.5
    assert torch.equal(*found)
    pipe.scheduler = hosts.noise(clip_sample=True)
    with torch.no_grad():
        assert sample_latents(pipe, noise, ["a fox"], steps=3, guidance=3.0).abs().max() <= 1


@pytest.mark.parametrize("zeros", [True, *thorough(False)])
def test_sampling_on_sdxl_equals_the_pipelines_own(tmp_path, zeros):
    """Both text encoders, the pooled state, the picture's size, and the empty prompt as that pipeline reads it."""
    pipe = hosts.sdxl(force_zeros_for_empty_prompt=zeros)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    mole.attach(pipe, {"fox": tiny_lora(pipe, tmp_path / "fox.safetensors")}, "mole")
    noise = torch.randn(2, 4, 8, 24, generator=torch.Generator().manual_seed(0))
    for guidance in (1.0, 3.0):
        options = {"num_inference_steps": 3, "guidance_scale": guidance, "width": 48, "height": 16}
        host = pipe(["a fox", "fox"], latents=noise, output_type="latent", **options).images
        with torch.no_grad():
            ours = sample_latents(pipe, noise, ["a fox", "fox"], steps=3, guidance=guidance)
        torch.testing.assert_close(ours, host, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("half", [True, False])
def test_an_autoencoder_that_overflows_in_half_precision_works_in_fp32(half):
    """Two routes: the autoencoder in fp16, or under autocast, and the same one in fp32."""
    pipe = hosts.sdxl()
    pipe.vae.register_to_config(force_upcast=True)
    latents, dtype = torch.randn(1, 4, 16, 16), torch.float16 if half else torch.float32
    pipe.vae.to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        pictures = decode(pipe, latents)
        encoded = encode_pixels(pipe, pictures)
    assert pipe.vae.dtype == dtype
    pipe.vae.to(torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(pictures, pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample)
        wanted = pipe.vae.encode(pictures).latent_dist.mode() * pipe.vae.config.scaling_factor
    torch.testing.assert_close(encoded, wanted)
    with pytest.raises(ValueError, match="overflows in float16"):
        decode(pipe.to(torch.float16), latents)


def test_a_unet_without_a_size_needs_one(pipe):
    pipe.unet.register_to_config(sample_size=None)
    for unknown in (lambda: latent_shape(pipe), lambda: latent_shape(pipe, 64), lambda: default_side(pipe)):
        with pytest.raises(ValueError, match="give "):
            unknown()
    assert latent_shape(pipe, 64, 32) == (4, 16, 32)
    pipe.unet.register_to_config(sample_size=(16, 24))
    assert latent_shape(pipe) == (4, 16, 24)
    with pytest.raises(ValueError, match=r"no squares of a known side, its own size is 16 x 24"):
        default_side(pipe)


def test_the_guided_loss_fits_what_the_pipeline_draws_with(pipe, loras):
    """Two routes: the loss, and the guided prediction put together by hand from single calls."""
    mole.attach(pipe, {"fox": loras["fox"]}, "mole")
    samples = Samples(torch.randn(1, 4, 16, 16), ["a fox"])
    draw = RandomBatch(torch.Generator().manual_seed(2), 2)
    with torch.no_grad():
        found = denoising_loss(pipe, samples, RandomBatch(torch.Generator().manual_seed(2), 2), guidance=2.5)
        draw.choice(1), draw.uniform()
        noise, timesteps = draw.normal(4, 16, 16), torch.tensor(draw.choice(1000))
        noisy = training_scheduler(pipe).add_noise(samples.latents.expand(2, -1, -1, -1), noise, timesteps)
        empty, full = (predict(pipe, noisy, timesteps, [text] * 2) for text in ("", "a fox"))
    wanted = (empty + 2.5 * (full - empty) - noise).square().mean()
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("host", "gate_type"), [("flux", "mole"), *thorough(("qwen", "prompt"), ("z_image", "mole"))])
def test_prompts_that_were_read_before_are_bound_as_if_they_were_read_again(monkeypatch, tmp_path, host, gate_type):
    pipe = hosts.HOSTS[host]()[0]
    files = {n: tiny_lora(pipe, tmp_path / f"{n}.safetensors", seed=i) for i, n in enumerate(("fox", "ink"))}
    mixture = mole.attach(pipe, files, gate_type)
    mixture.bind({"fox": ("fox", "left"), "ink": "ink"})
    x, level = torch.randn(2, 4, 16, 16), torch.tensor([500, 500])
    pairs = list(product(("", "a fox", "an ink, a fox"), repeat=2))

    def predictions():
        with torch.no_grad():
            return torch.stack([predict(pipe, x, level, pair) for pair in pairs])

    read = predictions()
    with mixture.parts.shared.tokens.remembering():
        predictions()
        with monkeypatch.context() as patch:
            patch.setattr(PromptTokens, "_found", lambda *_: pytest.fail("it was read again"))
            assert torch.equal(read, predictions())
    mixture.bind(None)
    assert not torch.equal(read, predictions())


def test_only_so_many_prompts_are_remembered(monkeypatch, pipe, loras):
    monkeypatch.setattr("mole_diffusers.patching.gating.prompt_tokens.MOST_SEEN", 4)
    tokens = mole.attach(pipe, {"fox": loras["fox"]}, binding={"fox": "fox"}).parts.shared.tokens
    with tokens.remembering(), torch.no_grad():
        for prompt in ("a fox", "a cat", "ink"):
            predict(pipe, torch.randn(1, 4, 16, 16), torch.tensor([500]), [prompt])
        assert [prompt for _, prompt in tokens._seen] == ["a cat", "a cat", "ink", "ink"]
    assert tokens._seen is None
