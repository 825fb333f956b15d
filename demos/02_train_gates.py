"""Train gates for two LoRAs from prompts alone, save them, load them again.

python demos/02_train_gates.py FOLDER [STEPS]
"""

import sys

import mole_diffusers as mole
from mole_diffusers.training.config import GateTraining
from mole_diffusers.training.loop import train_gates
from mole_diffusers.training.study import Lesson

folder, steps = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 120
world = mole.emoji_world()
concepts = {name: world.loras[name] for name in ("tomato", "thermal")}
mixture = mole.attach(world.pipe, concepts, mole.GateConfig("mole", granularity="layer", total="linear"))

lesson = Lesson(
    singles={"tomato": ["noto drawing of a tomato", "sepia drawing of a tomato"], "thermal": ["thermal drawing of a bear"]},
    composed=["thermal drawing of a tomato"],
    styles=["thermal"],
)
log = train_gates(world.pipe, mixture, lesson, config=GateTraining(steps=steps), folder=folder)
print(f"loss {log[0]['loss']:.3f} -> {log[-1]['loss']:.3f}")

mole.attach(world.pipe, concepts, gates=folder)
