"""Train the decoder of the emoji world's autoencoder; its encoder is known, see `encoder.py`.

    python demos/emoji/experiments/train_autoencoder.py [--steps 4000]

The decoder sees every drawing: Stable Diffusion's own decoder saw far more than its UNet is asked to draw, too. Half of the
latents have some noise, like those of a UNet. The decoder is convolutional, so half of its pictures are 64 x 64 pieces of
larger ones. Latents do not depend on it, so you can train it after the base or at the same time. Training is resumable. At
the end, this prints how faithful reconstructions are.
"""

import argparse
import math

import numpy as np
import torch
from diffusers import AutoencoderKL
from encoder import CHANNELS, patches, write
from loop import WORK, averaged, cosine, device, fit, mixed_precision, note, to_tensor
from random_scenes import draw_scene, random_picture

from mole_world import words
from mole_world.drawings import Drawings, default_folder
from mole_world.scenes import SIDE

BATCH = 8


def build(drawings: Drawings) -> AutoencoderKL:
    """An autoencoder with the final encoder and an untrained decoder."""
    autoencoder = AutoencoderKL(
        block_out_channels=(32, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=CHANNELS,
        sample_size=SIDE,
        norm_num_groups=16,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )
    write(autoencoder, patches(drawings))
    return autoencoder


def pieces(drawings: Drawings, rng: np.random.Generator, count: int) -> torch.Tensor:
    """[count, 3, 64, 64]: pictures of one subject, and pieces of pictures of two."""
    out = []
    for i in range(count):
        picture = random_picture(drawings, draw_scene(words.SUBJECTS, words.STYLES, rng, count=1 + i % 2), rng)
        x, y = (int(rng.integers(0, side - SIDE + 1)) for side in picture.size)
        out.append(picture.crop((x, y, x + SIDE, y + SIDE)))
    return to_tensor(out)


def loss_of(decoder: torch.nn.Module, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Absolute and squared differences of pixels, and absolute differences of their slopes, for latents z of pictures x."""
    with mixed_precision():
        y = decoder(z)
    y = y.float()
    slopes = sum((torch.diff(y, dim=d) - torch.diff(x, dim=d)).abs().mean() for d in (2, 3))
    return (y - x).abs().mean() + 3 * (y - x).square().mean() + 0.3 * slopes


def trained() -> AutoencoderKL:
    """The frozen autoencoder: the one trained last, else the committed one."""
    if (WORK / "decoder.pt").exists():
        autoencoder = build(Drawings(default_folder()))
        autoencoder.decoder.load_state_dict(averaged("decoder"))
    else:
        autoencoder = AutoencoderKL.from_pretrained(default_folder() / "base" / "vae", dtype=torch.float32)
    return autoencoder.to(device(), memory_format=torch.channels_last).eval().requires_grad_(False)


@torch.no_grad()
def fidelity(autoencoder: AutoencoderKL, drawings: Drawings, count: int, pictures: int = 128) -> dict[str, float]:
    """Signal to noise in dB over all pixels, and edge strength relative to the drawing, for pictures of `count` subjects."""
    rng = np.random.default_rng(100 + count)
    squared, edges = [], []
    for _ in range(pictures):
        scene = draw_scene(words.SUBJECTS, words.STYLES, rng, count=count)
        x = to_tensor([random_picture(drawings, scene, rng)]).to(device())
        y = autoencoder.decode(autoencoder.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        squared.append(((y - x) / 2).square().mean())
        edges.append([sum(torch.diff(p, dim=d).abs().mean() for d in (2, 3)) for p in (y, x)])
    mine, true = torch.tensor(edges).sum(0)
    return {"dB": round(-10 * math.log10(torch.stack(squared).mean()), 2), "edges": round((mine / true).item(), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4000)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    drawings, rng = Drawings(default_folder()), np.random.default_rng(0)
    decoder, linear = build(drawings).decoder.to(device(), memory_format=torch.channels_last), patches(drawings)

    def loss_at(step: int) -> torch.Tensor:
        x = pieces(drawings, rng, BATCH)
        z = linear(x)
        if step % 2:
            z = z + torch.randn_like(z) * rng.uniform(0, 0.15)
        return loss_of(decoder, x.to(device()), z.to(device(), memory_format=torch.channels_last))

    def share(step: int) -> float:
        return cosine(step, steps=steps, warmup=60)

    fit("decoder", decoder, loss_at, steps=steps, lr=1.5e-3, share=share)
    note("fidelity", **{name: fidelity(trained(), drawings, n) for name, n in (("one", 1), ("two", 2), ("four", 4))})


if __name__ == "__main__":
    main()
