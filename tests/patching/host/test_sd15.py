"""The plugin on a pipeline of Stable Diffusion 1.5's own size, with random weights."""

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tiny import ATTENTION, FEED_FORWARD, tiny_lora, tiny_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel

import mole_diffusers as mole
from mole_diffusers.lora import read_expert

pytestmark = pytest.mark.thorough


def sd15(dtype):
    """SD 1.5's UNet (859.5M), text encoder and autoencoder from their published configurations."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        text = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        )
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
    finally:
        torch.set_default_dtype(before)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 77
    parts = {
        "unet": unet.eval(),
        "text_encoder": text.eval(),
        "vae": vae.eval(),
        "tokenizer": tokenizer,
        "scheduler": scheduler,
    }
    pipe = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.shows("Pipelines")
def test_three_experts_on_sd15_at_512_pixels(tmp_path):
    pipe = sd15(torch.bfloat16)
    assert sum(p.numel() for p in pipe.unet.parameters()) == 859_520_964

    def draw():
        generator = torch.Generator().manual_seed(0)
        return pipe("a fox in ink", num_inference_steps=1, generator=generator, output_type="latent").images

    base = draw()
    assert base.shape == (1, 4, 64, 64)
    layers = {"a": ATTENTION, "b": ATTENTION + FEED_FORWARD, "c": ATTENTION}
    paths = {
        n: tiny_lora(pipe, tmp_path / n, rank=4 * (i + 1), seed=i, ends=e, size=0.3)
        for i, (n, e) in enumerate(layers.items())
    }
    assert read_expert(paths["a"]).base == "SD 1.x"
    with mole.attach(pipe, paths, "mole").trace() as trace:
        gated = draw()
    assert gated.isfinite().all()
    assert not torch.equal(gated, base)
    assert len([p for p in trace.locations if "(" not in p]) == 16 + 12  # UNet blocks and text layers
    assert len(trace.locations) == 2 * (16 + 12)  # feed-forward layers have "b" alone
    mole.detach(pipe)
    assert torch.equal(draw(), base)
