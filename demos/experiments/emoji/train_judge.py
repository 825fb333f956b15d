"""Train the evaluator, which tells subjects, style and background. It is never used to train anything else.

    python demos/experiments/emoji/train_judge.py [--steps 8000]

It sees true drawings of all subjects and styles of the world, one to four in a picture. They are blurred, noised and
shifted in colour. A fifth of them goes through the base's autoencoder, since all generated pictures share its softness.
Training is resumable. A run without a checkpoint continues from the judge in `assets/judge`, if there is one. Words that it
does not know start from scratch.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import train_autoencoder
from diffusers import AutoencoderKL
from encoder import Patches, patches
from loop import averaged, cosine, device, fit, mixed_precision, note, to_tensor
from muon import MuonAndAdamW
from random_scenes import draw_scene, random_picture
from safetensors.torch import save_file

from mole_diffusers.emoji import words
from mole_diffusers.emoji.drawings import Drawings, default_folder
from mole_diffusers.emoji.judge import Judge
from mole_diffusers.emoji.scenes import Scene

BATCH = {1: 40, 2: 20, 3: 10, 4: 10}  # subjects in the picture -> pictures per update
TURNS = (1, 2, 1, 2, 3, 4)  # subjects per picture in successive updates


@dataclass(frozen=True)
class Batch:
    """B pictures of one size, and what they show: subjects [B, S] are 0 or 1, style and background [B] are indices."""

    pictures: torch.Tensor
    subjects: torch.Tensor
    style: torch.Tensor
    background: torch.Tensor


def begin(judge: Judge, saved: Judge) -> None:
    """Copy what a saved judge knows: its trunk, and in its heads the words that both have."""
    weights = dict(saved.state_dict())
    for head, now, before in (
        ("subject", judge.subjects, saved.subjects),
        ("style", judge.styles, saved.styles),
        ("background", judge.backgrounds, saved.backgrounds),
    ):
        known = [word for word in now if word in before]
        for part in ("weight", "bias"):
            rows = judge.state_dict()[f"{head}.{part}"].clone()
            rows[[now.index(w) for w in known]] = weights[f"{head}.{part}"][[before.index(w) for w in known]]
            weights[f"{head}.{part}"] = rows
    judge.load_state_dict(weights)


def labelled(drawings: Drawings, judge: Judge, scenes: list[Scene], rng: np.random.Generator) -> Batch:
    """Pictures of scenes on the same canvas, labelled with the judge's indices."""
    return Batch(
        to_tensor([random_picture(drawings, s, rng) for s in scenes]).to(device()),
        torch.tensor([[float(s in scene.subjects) for s in judge.subjects] for scene in scenes], device=device()),
        torch.tensor([judge.styles.index(s.style) for s in scenes], device=device()),
        torch.tensor([judge.backgrounds.index(s.background) for s in scenes], device=device()),
    )


def scenes_of(count: int, number: int, rng: np.random.Generator) -> list[Scene]:
    """`number` random scenes of `count` subjects on one canvas. Every eighth subject stands there twice."""
    upright = bool(rng.integers(2))
    scenes: list[Scene] = []
    while len(scenes) < number:
        scene = draw_scene(words.SUBJECTS, words.STYLES, rng, count=count)
        if count > 1 and rng.random() < 1 / 8:
            scene = Scene((scene.subjects[0], *scene.subjects[:-1]), scene.style, scene.background, upright=upright)
        if count != 2 or (scene.size[1] > scene.size[0]) == upright:
            scenes.append(scene)
    return scenes


def degrade(x: torch.Tensor, rng: np.random.Generator, coding: tuple[Patches, AutoencoderKL] | None) -> torch.Tensor:
    """Make pictures look like those of a soft model: autoencoder, blur, noise, brightness. [B, 3, H, W] -> the same."""
    if coding is not None:
        linear, autoencoder = coding
        with torch.no_grad(), mixed_precision():
            latents = linear(x)
            latents = latents + torch.randn_like(latents) * rng.uniform(0, 0.35) * latents.std()
            x = autoencoder.decode(latents).sample.float()
    if rng.random() < 0.5:
        sigma = rng.uniform(0.3, 1.1)
        kernel = torch.exp(-(torch.arange(-2, 3, device=x.device).float() ** 2) / (2 * sigma**2))
        kernel = (kernel / kernel.sum()).expand(3, 1, 1, 5)
        x = F.conv2d(F.pad(x, (2, 2, 2, 2), "replicate"), kernel, groups=3)
        x = F.conv2d(x, kernel.transpose(2, 3), groups=3)
    x = x + torch.randn_like(x) * rng.uniform(0, 0.12)
    return (x * rng.uniform(0.88, 1.08) + rng.uniform(-0.06, 0.06)).clamp(-1, 1)


def loss_of(judge: Judge, batch: Batch, x: torch.Tensor) -> torch.Tensor:
    """The loss of each subject on its own, plus style and background."""
    with mixed_precision():
        logits = judge(x)
    there = torch.tensor(8.0, device=x.device)  # weight of a subject that is there, relative to one that is not
    subjects = F.binary_cross_entropy_with_logits(logits.subjects.float(), batch.subjects, pos_weight=there)
    style = F.cross_entropy(logits.style.float(), batch.style)
    return 20 * subjects + style + 0.5 * F.cross_entropy(logits.background.float(), batch.background)


@torch.no_grad()
def read_right(drawings: Drawings, judge: Judge, count: int, *, pictures: int = 512) -> torch.Tensor:
    """[3, `pictures` or a few more] bool: whether the judge gets subjects, style and background right.

    The pictures are clean drawings of `count` subjects, in arrangements that it was not trained on.
    """
    rng = np.random.default_rng([99, count])
    hits: list[torch.Tensor] = []
    while sum(found.shape[1] for found in hits) < pictures:
        scenes = [s for s in scenes_of(count, 32, rng) if len(set(s.subjects)) == count]
        batch = labelled(drawings, judge, scenes, rng)
        found = judge(batch.pictures)
        subjects = batch.subjects.gather(1, found.subjects.topk(count).indices).all(1)
        style, background = found.style.argmax(-1) == batch.style, found.background.argmax(-1) == batch.background
        hits.append(torch.stack([subjects, style, background]))
    return torch.cat(hits, 1)


def accuracy(drawings: Drawings, judge: Judge, count: int) -> dict[str, float]:
    """The shares that are right, see `read_right`."""
    right = read_right(drawings, judge, count).float().mean(1)
    return {name: round(v, 4) for name, v in zip(("subjects", "style", "background"), right.tolist(), strict=True)}


def save(judge: Judge, folder: Path) -> None:
    """Write the files that `Judge.load` reads: fp16 weights and the word lists."""
    folder.mkdir(parents=True, exist_ok=True)
    halves = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in judge.state_dict().items()}
    save_file(halves, folder / "judge.safetensors")
    names = {"subjects": judge.subjects, "styles": judge.styles, "backgrounds": judge.backgrounds}
    (folder / "judge.json").write_text(json.dumps(names, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8000)
    steps = parser.parse_args().steps
    torch.manual_seed(3)
    rng = np.random.default_rng(3)
    drawings = Drawings(default_folder())
    coding = patches(drawings), train_autoencoder.trained()
    judge = Judge(words.SUBJECTS, words.STYLES, list(words.BACKGROUNDS))
    if (drawings.folder / "judge").exists():
        begin(judge, Judge.load(drawings.folder / "judge"))
    judge.train().to(device())

    def loss_at(step: int) -> torch.Tensor:
        count = TURNS[step % len(TURNS)]
        batch = labelled(drawings, judge, scenes_of(count, BATCH[count], rng), rng)
        return loss_of(judge, batch, degrade(batch.pictures, rng, coding if rng.random() < 1 / 5 else None))

    def share(step: int) -> float:
        return cosine(step, steps=steps, warmup=100)

    muon = MuonAndAdamW(judge, 2e-3, ("trunk.0.", "subject.", "weight.weight", "style.", "background."))
    fit("judge", judge, loss_at, steps=steps, lr=2e-3, share=share, decay=0.99, optimizer=muon)
    judge.load_state_dict(averaged("judge"))
    save(judge.eval().cpu(), drawings.folder / "judge")
    saved = Judge.load(drawings.folder / "judge").to(device())
    note("judge_accuracy", **{str(count): accuracy(drawings, saved, count) for count in (1, 2, 3, 4)})


if __name__ == "__main__":
    main()
