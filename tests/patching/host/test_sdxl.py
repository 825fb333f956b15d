"""The plugin on a pipeline of SDXL's own size, with random weights."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from hosts import quiet, vae
from tiny import ATTENTION, FEED_FORWARD, tiny_lora, tiny_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import mole_diffusers as mole
from mole_diffusers.lora import read_expert

pytestmark = pytest.mark.thorough


def sdxl():
    """SDXL's UNet (2.57 billion parameters) and text encoders from their published configurations, in bfloat16.

    The autoencoder is a small one: experts have no layers there.
    """
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        large = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        big = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
        first = CLIPTextModel(CLIPTextConfig(**large, projection_dim=768))
        second = CLIPTextModelWithProjection(CLIPTextConfig(**big, projection_dim=1280, hidden_act="gelu"))
        small = vae()
    finally:
        torch.set_default_dtype(before)
    words = tiny_tokenizer()
    words.model_max_length = 77
    parts = {"unet": unet.eval(), "text_encoder": first.eval(), "text_encoder_2": second.eval(), "vae": small}
    parts |= {"tokenizer": words, "tokenizer_2": words, "scheduler": EulerDiscreteScheduler(beta_schedule="scaled_linear")}
    return quiet(StableDiffusionXLPipeline(**parts, add_watermarker=False))


def train_one_step(pipe, mixture):
    """At 128 pixels, whose gradients fit beside the weights."""
    pipe.unet.requires_grad_(False)
    for gate in mixture.parameters():
        gate.requires_grad_(True)
    added = {"text_embeds": torch.ones(1, 1280).bfloat16(), "time_ids": torch.tensor([[128.0, 128, 0, 0, 128, 128]])}
    states = torch.ones(1, 77, 2048).bfloat16()
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    pipe.unet.enable_gradient_checkpointing()
    pipe.unet.train()
    pipe.unet(noise, 500, states, added_cond_kwargs=added).sample.float().square().mean().backward()
    pipe.unet.eval()
    pipe.unet.disable_gradient_checkpointing()
    moved = [gate for gate in mixture.parameters() if gate.grad is not None and gate.grad.abs().sum() > 0]
    with torch.no_grad():
        for gate in moved:
            gate -= gate.grad / gate.grad.norm()
    assert len(moved) >= 70  # every block of the UNet


@pytest.mark.shows("Pipelines")
def test_two_experts_on_sdxl_at_512_pixels(tmp_path):
    pipe = sdxl()
    assert sum(p.numel() for p in pipe.unet.parameters()) == 2_567_463_684

    def draw():
        side = 64 * pipe.vae_scale_factor  # the latents of 512 pixels under SDXL's own autoencoder
        options = {"height": side, "width": side, "original_size": (512, 512), "target_size": (512, 512)}
        options |= {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
        return pipe("a fox in ink", generator=torch.Generator().manual_seed(0), **options).images

    base = draw()
    assert base.shape == (1, 4, 64, 64)
    ends = {"fox": ATTENTION, "ink": ATTENTION + FEED_FORWARD}
    files = {
        n: tiny_lora(pipe, tmp_path / n, rank=4 + 4 * i, seed=i, ends=e, size=0.3) for i, (n, e) in enumerate(ends.items())
    }
    assert read_expert(files["fox"]).base == "SDXL"
    mixture = mole.attach(pipe, files, "mole")
    train_one_step(pipe, mixture)
    with mixture.trace() as trace:
        gated = draw()
    assert gated.isfinite().all()
    assert (gated - base).norm() > 0.02 * base.norm()  # random weights draw faintly, so what counts is the share
    assert len([p for p in trace.locations if "(" not in p]) == 70 + 12 + 32  # UNet blocks and text layers
    mixture.save_pretrained(tmp_path / "gates")
    again = mole.attach(pipe, files, tmp_path / "gates")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), mixture.parameters(), strict=True))
    mole.detach(pipe)
    assert torch.equal(draw(), base)
