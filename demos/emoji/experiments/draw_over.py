"""Do things keep their places when LoRAs draw over a picture? Places are found in the picture, and from attention.

    python demos/emoji/experiments/draw_over.py [--split validation] [--per-kind 6] [--seeds 2]

The pictures are true drawings of two subjects. They are drawn over at three strengths, with either subject named first. A
layout is right if each subject has the place where it stands. Only layouts are measured, so a few steps are enough.
"""

import argparse
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import product
from unittest.mock import patch

import torch
from compose import SEEDS, SPLITS
from diffusers import StableDiffusionImg2ImgPipeline
from loop import device
from sampling import GUIDANCE, Share

from mole_diffusers import attach, detach
from mole_diffusers.training import cells
from mole_world import Scene
from mole_world.evaluation.emoji_protocol import scene_of
from mole_world.world import EmojiWorld, emoji_world

STRENGTHS = (0.4, 0.6, 0.8)
WAYS: dict[str, AbstractContextManager] = {
    "found in the picture": nullcontext(),
    "from attention": patch("mole_diffusers.patching.install.one_call.PLACE_SOURCES", []),
}


def kept(world: EmojiWorld, pipe: StableDiffusionImg2ImgPipeline, scene: Scene, seeds: range) -> Iterator[bool]:
    """For each drawing over a scene's picture: whether the layout has each subject where it stands."""
    picture = world.drawings.picture(scene)
    boxes = dict(zip(scene.subjects, cells(len(scene.subjects), *scene.size), strict=True))
    mixture = attach(pipe, {name: world.loras[name] for name in scene.subjects})
    for order, strength, seed in product((scene.subjects, scene.subjects[::-1]), STRENGTHS, seeds):
        prompt, generator = replace(scene, subjects=order).caption, torch.Generator().manual_seed(seed)
        call = {"strength": strength, "num_inference_steps": 5, "guidance_scale": GUIDANCE, "output_type": "latent"}
        pipe(prompt, image=picture, generator=generator, **call)
        yield all(_share(mixture.layouts[0].regions[name], box) > 0.5 for name, box in boxes.items())
    detach(pipe)


def _share(region: torch.Tensor, box: tuple[float, float, float, float]) -> float:
    """How much of a box a region [H, W] covers. The box is left, top, right, bottom, in shares of the picture."""
    height, width = region.shape
    left, top, right, bottom = box
    return region[round(top * height) : round(bottom * height), round(left * width) : round(right * width)].mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=SPLITS, default="validation")
    parser.add_argument("--per-kind", type=int, default=6, help="pairs of subjects")
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    world = emoji_world(device=device().type)
    pipe = StableDiffusionImg2ImgPipeline(**world.pipe.components, requires_safety_checker=False)
    seeds = range(SEEDS[args.split], SEEDS[args.split] + args.seeds)
    pairs = SPLITS[args.split]["two subjects"][: args.per_kind]
    for way, context in WAYS.items():
        with context:
            scenes = [scene_of("two subjects", pair, i) for i, pair in enumerate(pairs)]
            right = [each for scene in scenes for each in kept(world, pipe, scene, seeds)]
        print(f"{way}: {Share(sum(right), len(right))}", flush=True)


if __name__ == "__main__":
    main()
