"""Train the evaluator: which subjects, which style, which background. It never trains anything else.

    python demos/experiments/emoji/training/train_judge.py [--steps 1600]

Sees real drawings of every subject and style of the world, singles and pairs, blurred, noised, shifted in colour, and
half of them through the base's autoencoder, whose softness all generated pictures share. Resumable.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from loop import device, fit, note
from train_base import to_tensor, trained_vae

from mole_diffusers import emoji
from mole_diffusers.emoji.judge import Judge

BATCH = 48


def degrade(x: torch.Tensor, vae: AutoencoderKL | None, rng: np.random.Generator) -> torch.Tensor:
    """Unseen renderings: autoencoder, blur, noise, brightness."""
    if vae is not None:
        with torch.autocast(x.device.type, torch.bfloat16):
            latents = vae.encode(x).latent_dist.mode()
            latents = latents + torch.randn_like(latents) * rng.uniform(0, 0.35) * latents.std()
            x = vae.decode(latents).sample.float()
    if rng.random() < 0.6:
        sigma = rng.uniform(0.3, 1.3)
        kernel = torch.exp(-(torch.arange(-2, 3, device=x.device).float() ** 2) / (2 * sigma**2))
        kernel = (kernel / kernel.sum()).expand(3, 1, 1, 5)
        x = F.conv2d(F.pad(x, (2, 2, 2, 2), "replicate"), kernel, groups=3)
        x = F.conv2d(x, kernel.transpose(2, 3), groups=3)
    x = x + torch.randn_like(x) * rng.uniform(0, 0.15)
    return (x * rng.uniform(0.85, 1.1) + rng.uniform(-0.08, 0.08)).clamp(-1, 1)


def batch(drawings: emoji.Drawings, judge: Judge, rng: np.random.Generator, size: int = BATCH):
    """Pictures [B, 3, 64, 64], subjects [B, S] of 0 and 1, style [B], background [B]."""
    scenes = [emoji.draw_scene(judge.subjects, judge.styles, rng, pairs=0.4) for _ in range(size)]
    x = to_tensor([drawings.picture(s, rng) for s in scenes])
    labels = torch.tensor([[float(s in scene.subjects) for s in judge.subjects] for scene in scenes])
    style = torch.tensor([judge.styles.index(s.style) for s in scenes])
    background = torch.tensor([judge.backgrounds.index(s.background) for s in scenes])
    return tuple(t.to(device()) for t in (x, labels, style, background))


@torch.no_grad()
def accuracy(drawings: emoji.Drawings, judge: Judge, vae: AutoencoderKL | None, seed: int) -> dict[str, float]:
    """Share of pictures with all subjects, style and background right, in renderings not seen in training."""
    rng, hits = np.random.default_rng(seed), []
    for _ in range(20):
        x, labels, style, background = batch(drawings, judge, rng, 64)
        s, y, k = judge(degrade(x, vae, rng))
        counts = labels.sum(1).long()
        ranks = s.argsort(-1, descending=True).argsort(-1)
        all_there = ((ranks < counts[:, None]) | (labels == 0)).all(1)
        hits.append(torch.stack([all_there, y.argmax(-1) == style, k.argmax(-1) == background]).float().mean(1))
    return dict(zip(("subjects", "style", "background"), torch.stack(hits).mean(0).tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1600)
    args = parser.parse_args()
    torch.manual_seed(3)
    rng = np.random.default_rng(3)
    drawings = emoji.Drawings(emoji.default_folder())
    vae = trained_vae()
    judge = Judge(emoji.SUBJECTS, emoji.STYLES, list(emoji.BACKGROUNDS)).to(device())

    def loss_at(step: int) -> torch.Tensor:
        x, labels, style, background = batch(drawings, judge, rng)
        x = degrade(x, vae if step % 2 else None, rng)
        with torch.autocast(device().type, torch.bfloat16):
            s, y, k = judge(x)
        subjects = F.binary_cross_entropy_with_logits(s.float(), labels, pos_weight=torch.tensor(8.0, device=s.device))
        return 8 * subjects + F.cross_entropy(y.float(), style) + F.cross_entropy(k.float(), background)

    judge.load_state_dict(fit("judge", judge, loss_at, steps=args.steps, lr=2e-3, decay=0.99))
    judge.eval().cpu().save(drawings.folder / "judge")
    clean, soft = (accuracy(drawings, Judge.load(drawings.folder / "judge").to(device()), v, 99) for v in (None, vae))
    note("judge_accuracy", drawings=clean, through_autoencoder=soft)


if __name__ == "__main__":
    main()
