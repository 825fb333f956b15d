"""One LoRA taught on all concepts of a composition, but on no picture of them together: acting everywhere, and in tiles.

    python demos/emoji/experiments/joint_lora.py fox+octopus [CONCEPT+CONCEPT ...] [--rank 16] [--updates 400] [--pack]

Files in work/joint/ and pictures in work/pictures/ are kept, so you can continue an interrupted run. `compose.py` draws with
LoRAs of the default rank and updates.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import make_loras
import pandas as pd
from check_world import World, latest
from diffusers.utils import logging
from loop import WORK
from packing import pack
from sampling import Share

from mole_diffusers import attach, detach
from mole_diffusers.training import save_lora
from mole_world.evaluation.emoji_protocol import scene_of

JOINT = make_loras.Recipe(rank=16, lr=3e-3)  # at the rate of a single LoRA, concepts mix


def joint_file(concepts: tuple[str, ...], recipe: make_loras.Recipe = JOINT) -> Path:
    """The file of the joint LoRA for these concepts, with so many updates for each of them."""
    return WORK / "joint" / f"{'+'.join(concepts).replace(' ', '_')}_r{recipe.rank}x{recipe.steps}.safetensors"


def teach(world: World, concepts: tuple[str, ...], recipe: make_loras.Recipe) -> Path:
    """The joint LoRA's file, which is made if it is not there."""
    path = joint_file(concepts, recipe)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        samples = make_loras.concept_samples(world.pipe, world.drawings, concepts)
        tensors = make_loras.train(world.pipe, samples, replace(recipe, steps=recipe.steps * len(concepts)), recipe.rank)
        save_lora(tensors, path, alpha=recipe.rank)
    return path


def verdicts(world: World, concepts: tuple[str, ...], recipe: make_loras.Recipe, pictures: int) -> pd.DataFrame:
    """A row per picture. Tiles, which are drawn one by one, have half as many."""
    path, rows, kind = teach(world, concepts, recipe), [], "two subjects"
    for method, binding, count in (
        ("everywhere", None, pictures),
        ("in tiles", {"joint": list(concepts)}, pictures // 2),
    ):
        scenes = [scene_of(kind, concepts, i) for i in range(count)]
        attach(world.pipe, {"joint": path}, binding=binding)
        drawn = world.drawn(f"joint {method} {path.stem}", scenes, batched=binding is None)
        detach(world.pipe)
        rows += [
            {"seed": seed, "method": method, "success": not world.misses(scene, picture, concepts)}
            for seed, (scene, picture) in enumerate(zip(scenes, drawn, strict=True))
        ]
    found = pd.DataFrame(rows).assign(kind=kind, rank=recipe.rank, updates=recipe.steps)
    return found.assign(concepts=[list(concepts)] * len(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", metavar="CONCEPT+CONCEPT")
    parser.add_argument("--rank", type=int, default=JOINT.rank)
    parser.add_argument("--updates", type=int, default=JOINT.steps, help="for each concept")
    parser.add_argument("--pictures", type=int, default=48, help="of each composition; in tiles half as many")
    parser.add_argument("--pack", action="store_true", help="write the verdicts to docs/results/, too")
    args = parser.parse_args()
    logging.set_verbosity_error()
    world, recipe = latest(), replace(JOINT, rank=args.rank, steps=args.updates)
    for name in args.names:
        found = verdicts(world, tuple(name.split("+")), recipe, args.pictures)
        for method, own in found.groupby("method", sort=False):
            print(name, method, Share(int(own["success"].sum()), len(own)), flush=True)
        if args.pack:
            pack("joint", found, ["kind", "concepts", "rank", "updates", "method", "seed"])


if __name__ == "__main__":
    main()
