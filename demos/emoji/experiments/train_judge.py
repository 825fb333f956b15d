"""Train the evaluator, which tells subjects, style, background and light, and whether a picture is one scene.

It is never used to train anything else.

    python demos/emoji/experiments/train_judge.py [--steps 8000]

It sees true drawings of all subjects and styles of the world, one to four in a picture. They are blurred, noised, shifted in
colour and resized. A fifth of them goes through the base's autoencoder, since all generated pictures share its softness.
Training is resumable. A run without a checkpoint continues from the judge in `assets/judge`, if there is one. Labels that it
does not know start from scratch.
"""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import train_autoencoder
from diffusers import AutoencoderKL
from encoder import Patches, patches
from loop import averaged, cosine, device, fit, mixed_precision, note, to_tensor
from muon import MuonAndAdamW
from PIL import Image
from random_scenes import draw_scene, random_picture
from safetensors.torch import load_file, save_file

from mole_world import words
from mole_world.drawings import Drawings, default_folder
from mole_world.judge import Judge, Labels
from mole_world.scenes import CONTACTS, SIDE, STACKED, Scene, squares

BATCH = {1: 32, 2: 18, 3: 9, 4: 9}  # subjects in the picture -> pictures per update
TURNS = (1, 2, 2, 2, 3, 2, 2, 2, 2, 4)  # subjects per picture in successive updates
CANVASES = ((96, 64), (64, 96), (96, 96))  # of other shapes: one subject, or two closer together
PASTED = 0.25  # share of pictures that are put together from two scenes


@dataclass(frozen=True)
class Batch:
    """B pictures of one size, and what they show: subjects [B, S] and one_scene [B] are 0 or 1, the others [B] indices.

    A light of -1 is that of paper, which has none.
    """

    pictures: torch.Tensor
    subjects: torch.Tensor
    style: torch.Tensor
    background: torch.Tensor
    light: torch.Tensor
    one_scene: torch.Tensor


def begin(judge: Judge, saved: dict[str, torch.Tensor], known: dict[str, list[str]]) -> None:
    """Copy what a saved judge knows: its trunk, and in its heads the words that both have."""
    weights = judge.state_dict() | saved
    for head in ("subject", "style", "background"):
        now, before = getattr(judge.labels, f"{head}s"), known[f"{head}s"]
        both = [word for word in now if word in before]
        for part in ("weight", "bias"):
            rows = judge.state_dict()[f"{head}.{part}"].clone()
            rows[[now.index(w) for w in both]] = saved[f"{head}.{part}"][[before.index(w) for w in both]].float()
            weights[f"{head}.{part}"] = rows
    judge.load_state_dict(weights)


def labelled(drawings: Drawings, judge: Judge, scenes: list[Scene], rng: np.random.Generator, pasted: float = 0.0) -> Batch:
    """Pictures of scenes on the same canvas, labelled with the judge's indices; a share `pasted` shows two scenes."""
    pictures, whole, lights = [], [], []
    for scene in scenes:
        scene = with_light(scene, rng)
        joined = rng.random() < pasted
        pictures.append(of_two_scenes(drawings, scene, rng) if joined else random_picture(drawings, scene, rng))
        whole.append(float(not joined))
        lights.append(judge.labels.lights.index(scene.light) if scene.light and not joined else -1)
    return Batch(
        to_tensor(pictures).to(device()),
        torch.tensor([[float(s in scene.subjects) for s in judge.labels.subjects] for scene in scenes], device=device()),
        torch.tensor([judge.labels.styles.index(s.style) for s in scenes], device=device()),
        torch.tensor([judge.labels.backgrounds.index(s.background) for s in scenes], device=device()),
        torch.tensor(lights, device=device()),
        torch.tensor(whole, device=device()),
    )


def with_light(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with a light of its own, if it is a landscape whose light is left open."""
    if scene.light or scene.background in words.BACKGROUNDS:
        return scene
    return replace(scene, light=str(rng.choice(list(words.LIGHTS), p=(0.6, 0.2, 0.2))))


def other_place(scene: Scene, rng: np.random.Generator) -> Scene:
    """A scene before another background or, for a quarter of landscapes, before the one it has in another light."""
    if scene.background not in words.BACKGROUNDS and rng.random() < 0.25:
        return replace(scene, light=str(rng.choice([light for light in words.LIGHTS if light != scene.light])))
    others = [b for b in (words.OPEN, *words.PLACES, *words.BACKGROUNDS) if b != scene.background]
    return replace(scene, background=str(rng.choice(others)), light=None)


def of_two_scenes(drawings: Drawings, scene: Scene, rng: np.random.Generator) -> Image.Image:
    """A picture of the scene's canvas that is put together: of the left of one scene and the right of another, or, if
    several subjects have squares of their own, of a picture of each subject. Edges are sharp or up to 12 pixels soft.
    """
    width, height = scene.size
    apart = len(scene.subjects) > 1 and scene.canvas is None
    other = with_light(other_place(scene, rng), rng)
    whole, second = (random_picture(drawings, s, rng) for s in (scene, other))
    soft = rng.uniform(1, 12)
    if not apart or (width >= height and rng.random() < 0.5):
        return Image.composite(second, whole, _mask(whole.size, (width // 2, 0, width, height), soft))
    corners = squares(scene, rng.permutation)
    for i, ((x, y), subject) in enumerate(zip(corners, scene.subjects, strict=True)):
        place = (scene, other)[i] if i < 2 else with_light(other_place(scene, rng), rng)
        alone = replace(place, subjects=(subject,), relation=None)
        tile = np.asarray(random_picture(drawings, alone, rng))
        around = np.pad(tile, ((y, height - y - SIDE), (x, width - x - SIDE), (0, 0)), mode="edge")
        mask = _mask(whole.size, (x, y, x + SIDE, y + SIDE), min(soft, 4))
        whole = Image.composite(Image.fromarray(around), whole, mask)
    return whole


def _mask(size: tuple[int, int], box: tuple[int, int, int, int], soft: float) -> Image.Image:
    """White inside a box (left, top, right, bottom), black outside of it, with edges of `soft` pixels inside the picture."""

    def inside(length: int, low: float, high: float) -> np.ndarray:
        at = np.arange(length) + 0.5
        from_low, from_high = at - (low if low > 0 else -length), (high if high < length else 2 * length) - at
        return np.clip(np.minimum(from_low, from_high) / soft + 0.5, 0, 1)

    across, down = inside(size[0], box[0], box[2]), inside(size[1], box[1], box[3])
    return Image.fromarray((255 * down[:, None] * across).astype(np.uint8))


def scenes_of(count: int, number: int, rng: np.random.Generator) -> list[Scene]:
    """`number` random scenes of `count` subjects on one canvas. Every eighth subject stands there twice."""
    upright, odd = bool(rng.integers(2)), rng.random() < (3 / 4 if count == 2 else 1 / 2)  # small subjects are the hardest
    shape = CANVASES[rng.integers(len(CANVASES))] if odd and count < 3 else None
    scenes: list[Scene] = []
    while len(scenes) < number:
        scene = draw_scene(words.SUBJECTS, words.STYLES, rng, count=count, touching=0.8 * (shape is not None))
        if shape is not None:
            scene = replace(scene, canvas=shape)
            if count == 2 and not fits(scene):
                continue
        elif count > 1 and rng.random() < 1 / 8:
            scene = replace(scene, subjects=(scene.subjects[0], *scene.subjects[:-1]))
        if shape is not None or count != 2 or (scene.size[1] > scene.size[0]) == upright:
            scenes.append(scene)
    return scenes


def fits(scene: Scene) -> bool:
    """Whether two subjects in contact have room on the scene's canvas."""
    width, height = scene.size
    return (width == height) or scene.relation is None or (height > width) == (scene.relation in STACKED)


def resized(x: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Half of the time, pictures 0.8 to 1.4 times as large: a subject is the same subject at any size. [B, 3, H, W]."""
    if rng.random() < 0.5:
        return x
    scale = rng.uniform(0.8, 1.4)
    height, width = (16 * round(side * scale / 16) for side in x.shape[2:])
    return F.interpolate(x, (height, width), mode="bicubic", antialias=True).clamp(-1, 1)


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
    whole = batch.one_scene.bool()  # what is pasted shows some of its subjects in halves, and two backgrounds
    subjects = F.binary_cross_entropy_with_logits(logits.subjects[whole].float(), batch.subjects[whole], pos_weight=there)
    style = F.cross_entropy(logits.style.float(), batch.style)
    background = F.cross_entropy(logits.background[whole].float(), batch.background[whole])
    light = F.cross_entropy(logits.light.float(), batch.light, ignore_index=-1) if (batch.light >= 0).any() else 0.0
    one_scene = F.binary_cross_entropy_with_logits(logits.one_scene.float(), batch.one_scene)
    return 20 * subjects + style + background + 0.5 * light + 2 * one_scene


@torch.no_grad()
def read_right(drawings: Drawings, judge: Judge, count: int, *, pictures: int = 512) -> dict[str, list[bool]]:
    """Whether the judge gets each thing right, in `pictures` or a few more clean drawings of `count` subjects.

    They are arranged as it was not trained on. "pasted" is for as many pictures of two scenes. Light is of landscapes only.
    Subjects in contact, which hide parts of each other, are counted as "in contact" and not as "subjects".
    """
    rng = np.random.default_rng([99, count])
    names = ("subjects", "in contact", "style", "background", "light", "one scene", "pasted")
    hits: dict[str, list[bool]] = {name: [] for name in names}
    while len(hits["style"]) < pictures:
        scenes = [s for s in scenes_of(count, 32, rng) if len(set(s.subjects)) == count]
        batch, pasted = labelled(drawings, judge, scenes, rng), labelled(drawings, judge, scenes, rng, pasted=1.0)
        found = judge(batch.pictures)
        seen = batch.subjects.gather(1, found.subjects.topk(count).indices).all(1).tolist()
        for scene, right in zip(scenes, seen, strict=True):
            hits["in contact" if scene.relation in CONTACTS else "subjects"].append(right)
        hits["style"] += (found.style.argmax(-1) == batch.style).tolist()
        hits["background"] += (found.background.argmax(-1) == batch.background).tolist()
        hits["light"] += (found.light.argmax(-1) == batch.light)[batch.light >= 0].tolist()
        hits["one scene"] += (found.one_scene > 0).tolist()
        hits["pasted"] += (judge(pasted.pictures).one_scene <= 0).tolist()
    return hits


def accuracy(drawings: Drawings, judge: Judge, count: int) -> dict[str, float]:
    """The shares that are right, see `read_right`."""
    return {name: round(sum(v) / len(v), 4) for name, v in read_right(drawings, judge, count).items() if v}


def save(judge: Judge, folder: Path) -> None:
    """Write the files that `Judge.load` reads: fp16 weights and the word lists."""
    folder.mkdir(parents=True, exist_ok=True)
    halves = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in judge.state_dict().items()}
    save_file(halves, folder / "judge.safetensors")
    (folder / "judge.json").write_text(json.dumps(judge.labels._asdict(), indent=1) + "\n")


def untrained() -> Judge:
    """A judge of all of the world's words."""
    return Judge(Labels(words.SUBJECTS, words.STYLES, (*words.BACKGROUNDS, words.OPEN, *words.PLACES), tuple(words.LIGHTS)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate; a third of it to continue")
    args = parser.parse_args()
    steps = args.steps
    torch.manual_seed(3)
    rng = np.random.default_rng(3)
    drawings = Drawings(default_folder())
    coding = patches(drawings), train_autoencoder.trained()
    judge = untrained()
    if (drawings.folder / "judge").exists():
        known = json.loads((drawings.folder / "judge" / "judge.json").read_text())
        begin(judge, load_file(drawings.folder / "judge" / "judge.safetensors"), known)
    judge.train().to(device())

    def loss_at(step: int) -> torch.Tensor:
        count = TURNS[step % len(TURNS)]
        batch = labelled(drawings, judge, scenes_of(count, BATCH[count], rng), rng, PASTED)
        degraded = degrade(batch.pictures, rng, coding if rng.random() < 1 / 5 else None)
        return loss_of(judge, batch, resized(degraded, rng))

    def share(step: int) -> float:
        return cosine(step, steps=steps, warmup=100)

    muon = MuonAndAdamW(judge, args.rate, ("trunk.0.", "subject.", "weight.weight", "style.", "background.", "light."))
    fit("judge", judge, loss_at, steps=steps, lr=args.rate, share=share, decay=0.99, optimizer=muon)
    judge.load_state_dict(averaged("judge"))
    save(judge.eval().cpu(), drawings.folder / "judge")
    saved = Judge.load(drawings.folder / "judge").to(device())
    note("judge_accuracy", **{str(count): accuracy(drawings, saved, count) for count in (1, 2, 3, 4)})


if __name__ == "__main__":
    main()
