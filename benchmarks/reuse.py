"""What `mixture.every(k)` changes in a picture: gates asked in one of k steps, on the embedded world with its trained gates.

    python benchmarks/reuse.py --json docs/speed/reuse.json

The mean absolute difference of a picture's values, in 0..1, to the picture with gates asked in every step; for comparison,
that of the plain sum of the same LoRAs, and of the next seed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import mole_diffusers as mole
from mole_diffusers import emoji

OPTIONS = {"num_inference_steps": 20, "guidance_scale": 3.0, "output_type": "np"}


def drawn(pipe: Any, prompt: str, seed: int, **size: int) -> torch.Tensor:
    return torch.from_numpy(pipe(prompt, generator=torch.Generator().manual_seed(seed), **OPTIONS, **size).images)


def differences(world: Any, pair: str, every: list[int]) -> dict[str, float]:
    """Of one composition."""
    names = pair.split("+")
    experts = {name: world.loras[name] for name in names}
    mixture = mole.attach(world.pipe, experts, gates=world.gates[pair])
    scene = emoji.composition_scene(names)
    prompt, size = scene.caption, dict(zip(("width", "height"), scene.size, strict=True))
    whole = drawn(world.pipe, prompt, 0, **size)
    found = {}
    for k in every:
        with mixture.every(k):
            found[f"every {k}"] = (drawn(world.pipe, prompt, 0, **size) - whole).abs().mean().item()
    found["another seed"] = (drawn(world.pipe, prompt, 1, **size) - whole).abs().mean().item()
    mole.attach(world.pipe, experts, "sum")
    found["sum"] = (drawn(world.pipe, prompt, 0, **size) - whole).abs().mean().item()
    mole.detach(world.pipe)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, nargs="+", default=[2, 3, 5])
    parser.add_argument("--pairs", type=int, default=3, help="how many of the world's compositions")
    parser.add_argument("--json", type=Path, help="write the means here, too")
    args = parser.parse_args()
    world = mole.emoji_world()
    pairs = list(world.gates)[: args.pairs]
    rows = [differences(world, pair, args.every) for pair in pairs]
    means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    print("\n".join(f"{name:<14}{value:.4f}" for name, value in means.items()))
    if args.json:
        about = {"what": "reuse", "compositions": pairs, "steps": OPTIONS["num_inference_steps"], "means": means}
        args.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
