"""Compose two LoRAs of the embedded world, each bound to its own words and place, and see what each does alone.

python demos/01_compose.py [OUT.png]
"""

import sys

import mole_diffusers as mole
from mole_diffusers.inspection import compare, image_grid
from mole_world import emoji_world

world = emoji_world()
mixture = mole.attach(world.pipe, {name: world.loras[name] for name in ("sunflower", "doughnut")})
pictures = compare(
    world.pipe,
    mixture,
    "noto drawing of a sunflower and a doughnut",
    seeds=[1, 2],
    num_inference_steps=20,
    guidance_scale=3.0,
    width=128,
    height=64,
)
mole.detach(world.pipe)

out = sys.argv[1] if len(sys.argv) > 1 else "grid.png"
image_grid(list(zip(*pictures.values(), strict=True)), list(pictures), ["seed 1", "seed 2"]).save(out)
print(out)
