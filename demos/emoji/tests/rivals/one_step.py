"""What single LoRAs predict at the first step of a picture, for formulas written out over it."""

import torch

import mole_diffusers as mole

PROMPT = "a fox ink"
STEP = {"num_inference_steps": 1, "output_type": "latent"}


def latents(pipe, prompt=PROMPT, *, seeds=(0,), guidance=3.0, **options):
    """Latents of pictures from these seeds, [B, 4, 16, 16]."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    call = STEP | {"guidance_scale": guidance} | options
    return pipe([prompt] * len(seeds), generator=generators, **call).images


def predictions(pipe, experts, **options):
    """What the UNet predicts with these LoRAs alone, and what it was given: [rows, 4, 16, 16] each."""
    found = []
    hook = pipe.unet.register_forward_hook(lambda _, args, out: found.append((out[0], args[0])))
    try:
        if experts:
            mole.attach(pipe, experts, binding=None)
        else:
            mole.detach(pipe)
        latents(pipe, **options)
    finally:
        hook.remove()
    return found[0]


def after_a_step(pipe, predicted, given, guidance):
    """The latents after a step from `given` [2 B, ...] with the guided prediction."""
    without, prompted = predicted.chunk(2)
    pipe.scheduler.set_timesteps(1)
    guided = without + guidance * (prompted - without)
    return pipe.scheduler.step(guided, pipe.scheduler.timesteps[0], given.chunk(2)[0]).prev_sample
