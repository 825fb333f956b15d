"""See which LoRA works where and when: the gates' weights while a picture is drawn.

python demos/03_watch_the_gates.py
"""

import torch

import mole_diffusers as mole
from mole_world import emoji_world

world = emoji_world()
concepts = {name: world.loras[name] for name in ("honeybee", "thermal")}
mixture = mole.attach(world.pipe, concepts, gates=world.gates["honeybee+thermal"])
with mixture.trace() as trace:
    world.pipe(
        "thermal drawing of a honeybee",
        num_inference_steps=10,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
    )

print(f"{'place':70}", *(f"{name:>14}" for name in trace.experts), " first step -> last")
for place in trace.locations:
    weights = trace.weights(place)
    print(f"{place:70}", *(f"{a:6.2f} ->{b:5.2f}" for a, b in zip(weights[0].tolist(), weights[-1].tolist(), strict=True)))
