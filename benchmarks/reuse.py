"""How much `mixture.every(k)` changes a picture, on the embedded world with its trained gates.

    python benchmarks/reuse.py --json docs/speed/reuse.json

With `every(k)`, the gates run in one of k steps. The measure is the mean absolute difference of a picture's values, in 0..1,
to the picture whose gates run in every step. For comparison, the plain sum of the same LoRAs and the next seed are measured,
too.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import mole_diffusers as mole
import mole_world
from mole_world import emoji_world

OPTIONS = {"num_inference_steps": 20, "guidance_scale": 3.0, "output_type": "np"}
EVERY = (2, 3, 5)


def drawn(pipe: Any, prompt: str, seed: int, **size: int) -> torch.Tensor:
    return torch.from_numpy(pipe(prompt, generator=torch.Generator().manual_seed(seed), **OPTIONS, **size).images)


def differences(world: Any, pair: str) -> dict[str, float]:
    """The differences for one composition."""
    names = pair.split("+")
    experts = {name: world.loras[name] for name in names}
    mixture = mole.attach(world.pipe, experts, gates=world.gates[pair])
    scene = mole_world.composition_scene(names)
    draw = partial(drawn, world.pipe, scene.caption, width=scene.size[0], height=scene.size[1])
    found = {}
    with mixture.tiled(0):  # each tile has a text of its own, so gates are asked in every step
        whole = draw(0)
        for k in EVERY:
            with mixture.every(k):
                found[f"every {k}"] = draw(0)
        found["another seed"] = draw(1)
    with mole.attach(world.pipe, experts, "sum").tiled(0):
        found["sum"] = draw(0)
    mole.detach(world.pipe)
    return {name: (picture - whole).abs().mean().item() for name, picture in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the means here, too")
    args = parser.parse_args()
    world = emoji_world()
    pairs = list(world.gates)[:3]
    means = pd.DataFrame([differences(world, pair) for pair in pairs]).mean()
    print(means.to_string(float_format="{:.4f}".format))
    if args.json:
        about = {"what": "reuse", "compositions": pairs, "steps": OPTIONS["num_inference_steps"], "means": dict(means)}
        args.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
