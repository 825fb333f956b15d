"""A case of two tiny LoRAs, and what methods draw of it."""

from dataclasses import replace

import mole_diffusers as mole
from mole_diffusers.inspection import sample
from mole_diffusers.lora import read_expert
from mole_world.evaluation.runner import Case, Setup

OPTIONS = {"num_inference_steps": 2, "guidance_scale": 2.0}
CASE = Case(("fox", "ink"), "subject x style", "a fox in ink")


def setup_of(pipe, loras):
    prompts = {"fox": ["a fox"], "ink": ["in ink"], "hat": ["a hat"]}
    experts = {n: replace(read_expert(path, n), triggers=(n,)) for n, path in loras.items()}
    return Setup(pipe, experts, OPTIONS, prompts=prompts, styles=frozenset({"ink"}))


def drawn(setup, method, case=CASE, seeds=(3,)):
    with method.draws(setup, case):
        return [image.tobytes() for image in sample(setup.pipe, case.prompt, seeds, **OPTIONS)]


def by_hand(setup, experts, inside=None, gates="sum"):
    mixture = mole.attach(setup.pipe, experts, gates, binding=None)
    try:
        with inside(mixture) if inside else mixture.only(*mixture.experts):
            return [image.tobytes() for image in sample(setup.pipe, CASE.prompt, [3], **OPTIONS)]
    finally:
        mole.detach(setup.pipe)


def settings_of(setup, method):
    return dict(method.settings(setup, CASE))
