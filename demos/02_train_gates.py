"""Train gates for two LoRAs from prompts alone, save them, and load them again.

python demos/02_train_gates.py FOLDER [STEPS]
"""

import sys

import mole_diffusers as mole
from mole_diffusers.training import GateTraining, TrainingData, mean_losses, train_gates
from mole_world import emoji_world

folder, steps = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 60
world = emoji_world()
concepts = {name: world.loras[name] for name in ("octopus", "koala")}
mixture = mole.attach(world.pipe, concepts, "factors")

prompt = "noto drawing of an octopus and a koala"
lesson = TrainingData(composed=[prompt], parts={prompt: ["noto drawing of an octopus", "noto drawing of a koala"]})
config = GateTraining(terms={"collage": {"seeds": 6}}, steps=steps, batch=6, width=128, height=64)
log = train_gates(world.pipe, mixture, lesson, config=config, folder=folder)
first, last = mean_losses(log)
print(f"loss {first['loss']:.3f} -> {last['loss']:.3f}")

mole.attach(world.pipe, concepts, gates=folder)
