"""Refine the decoder on latents that the base has drawn, so that it forgives what the base gets slightly wrong.

    python demos/emoji/experiments/refine_decoder.py [--pictures 2560] [--steps 3000]

A base's latents are not those of true drawings: inside flat areas they have small errors, which the decoder shows as
blotches. Here the base draws over the latents of true drawings: noise is added up to a random level, and the base takes it
away again, so shapes stay where they are and details become the base's own. The decoder then learns to show the true
drawing, from these latents in two of three pictures and from true ones in the third, so that it does not forget those.
Latents themselves do not change: LoRAs and gates stay what they are. Both parts are resumable. At the end, this prints how
faithful the decoder was before and is now, on pictures that it was not trained on, and writes `assets/base/vae`.
"""

import argparse
import math

import numpy as np
import torch
import train_base
from encoder import patches
from latents import draw_shape
from loop import WORK, averaged, cosine, device, fit, mixed_precision, note, save_whole, small_attention, to_tensor
from random_scenes import random_caption, random_picture
from safetensors.torch import save_file
from sampling import GUIDANCE, STEPS
from train_autoencoder import BATCH, loss_of, pieces

from mole_world.drawings import Drawings, default_folder
from mole_world.scenes import SIDE

SHAPES = ("one", "wide", "broad", "one", "tall", "high")  # canvases, in turn
TOGETHER = 16  # pictures drawn over in one batch
FIRST, LAST = 6, 15  # of STEPS, the steps at which drawing over may begin: from .7 to .25 of the way is drawn anew
CHUNK = 69  # of `draw_shape`: one whose pictures may have contact and small subjects
RATE = 4e-4


@torch.no_grad()
def drawn_over(pipe, x: torch.Tensor, captions: list[str], begin: int, generator: torch.Generator) -> torch.Tensor:
    """Latents x [B, C, H, W] of true drawings, noised to step `begin` of STEPS and drawn from there by the base."""
    scheduler = pipe.scheduler
    scheduler.set_timesteps(STEPS)
    times = scheduler.timesteps[begin:]
    z = scheduler.add_noise(x, torch.randn(x.shape, generator=generator).to(x), times[:1].expand(len(x)))
    tokens = pipe.tokenizer([""] * len(x) + captions, padding="max_length", return_tensors="pt").input_ids
    with small_attention(), mixed_precision():
        text = pipe.text_encoder(tokens.to(x.device))[0]
        for t in times:
            without, told = pipe.unet(torch.cat([z, z]), t, text).sample.float().chunk(2)
            z = scheduler.step(without + GUIDANCE * (told - without), t, z).prev_sample
    return z


def draw(pictures: int) -> list[dict[str, torch.Tensor]]:
    """Batches of latents of one canvas that the base drew over, [B, C, H / 4, W / 4], and their true pictures as bytes,
    [B, 3, H, W]."""
    WORK.mkdir(exist_ok=True)
    path = WORK / "drawn_over.pt"
    found = torch.load(path, weights_only=True) if path.exists() else []
    pipe, drawings = train_base.trained(), Drawings(default_folder())
    linear = patches(drawings)
    for k in range(len(found), -(-pictures // TOGETHER)):
        rng, generator = np.random.default_rng([9, k]), torch.Generator().manual_seed(k)
        scenes = [draw_shape(SHAPES[k % len(SHAPES)], rng, CHUNK) for _ in range(TOGETHER)]
        x = to_tensor([random_picture(drawings, scene, rng) for scene in scenes])
        captions = [random_caption(scene, rng) for scene in scenes]
        z = drawn_over(pipe, linear(x).to(device()), captions, int(rng.integers(FIRST, LAST + 1)), generator)
        found.append({"z": z.half().cpu(), "x": ((x + 1) * 127.5).round().byte()})
        if k % 20 == 19:
            save_whole(found, path)
            print(f"drawn over: {(k + 1) * TOGETHER} of {pictures}", flush=True)
    save_whole(found, path)
    return found


def piece(batch: dict[str, torch.Tensor], rng: np.random.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures [count, 3, 64, 64] and their latents: the same random square of `count` pictures of a batch."""
    rows = torch.from_numpy(rng.choice(len(batch["z"]), count, replace=False))
    z, x = batch["z"][rows].float(), batch["x"][rows].float() / 127.5 - 1
    side = SIDE // 4
    top, left = (int(rng.integers(0, size - side + 1)) for size in z.shape[2:])
    shown = x[:, :, 4 * top : 4 * top + SIDE, 4 * left : 4 * left + SIDE]
    return shown, z[:, :, top : top + side, left : left + side]


@torch.no_grad()
def fidelity(decoder: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> float:
    """Signal to noise in dB of what it shows of these latents, against the true pictures."""
    squared = [
        ((decoder(b["z"].float().to(device())).clamp(-1, 1).cpu() - (b["x"].float() / 127.5 - 1)) / 2).square().mean()
        for b in batches
    ]
    return round(-10 * math.log10(torch.stack(squared).mean()), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=2560, help="pictures to draw over")
    parser.add_argument("--steps", type=int, default=3000)
    args = parser.parse_args()
    torch.manual_seed(0)
    drawings, rng = Drawings(default_folder()), np.random.default_rng(1)
    found = draw(args.pictures)
    tried, learned = found[: len(SHAPES)], found[len(SHAPES) :]
    autoencoder = train_base.trained().vae.requires_grad_(True)
    decoder, linear = autoencoder.decoder, patches(drawings)
    before = fidelity(decoder, tried)

    def loss_at(step: int) -> torch.Tensor:
        if step % 3 == 2:
            x = pieces(drawings, rng, BATCH)
            z = linear(x)
            z = z + torch.randn_like(z) * rng.uniform(0, 0.15)
        else:
            x, z = piece(learned[int(rng.integers(len(learned)))], rng, BATCH)
        return loss_of(decoder, x.to(device()), z.to(device(), memory_format=torch.channels_last))

    def share(step: int) -> float:
        return cosine(step, steps=args.steps, warmup=60)

    fit("refined", decoder, loss_at, steps=args.steps, lr=RATE, share=share)
    decoder.load_state_dict(averaged("refined"))
    note("refined decoder", before=before, after=fidelity(decoder, tried))
    save_file(autoencoder.half().state_dict(), train_base.BASE / "vae" / "diffusion_pytorch_model.safetensors")


if __name__ == "__main__":
    main()
