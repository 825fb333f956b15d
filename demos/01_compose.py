"""Compose two concept LoRAs of the embedded world, and see one of them alone.

python demos/01_compose.py [OUT.png]
"""

import sys

import mole_diffusers as mole
from mole_diffusers.inspection.compare import compare, image_grid

world = mole.emoji_world()
concepts = {name: world.loras[name] for name in ("sunflower", "doughnut")}
mixture = mole.attach(world.pipe, concepts, gates=world.gates["sunflower+doughnut"])
pictures = compare(
    world.pipe,
    mixture,
    "noto drawing of a sunflower and a doughnut",
    seeds=[1, 2],
    num_inference_steps=20,
    guidance_scale=3.0,
)
mole.detach(world.pipe)

out = sys.argv[1] if len(sys.argv) > 1 else "grid.png"
image_grid(list(zip(*pictures.values(), strict=True)), list(pictures), ["seed 1", "seed 2"]).save(out)
print(out)
