"""The clean picture that a step predicts: exact where the model's output is."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from mole_app.studio.predictions import Predictions, predicted_clean
from mole_app.studio.samplers import SAMPLERS, sampler, samplers_of

CLEAN, NOISE = (torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))


def noisy(scheduler, timestep, index):
    """The sample that a scheduler works on at a step, and what a model should say of it."""
    if type(scheduler).__name__.startswith("FlowMatch"):
        sigma = float(scheduler.sigmas[index])
        return (1 - sigma) * CLEAN + sigma * NOISE, NOISE - CLEAN
    sample = scheduler.add_noise(CLEAN, NOISE, timestep[None])
    if scheduler.config.prediction_type == "epsilon":
        return sample, NOISE
    sigma = scheduler.sigmas[index] if hasattr(scheduler, "sigmas") else None
    signal = scheduler.alphas_cumprod[int(timestep)] if sigma is None else 1 / (1 + sigma**2)
    return sample, signal.sqrt() * NOISE - (1 - signal).sqrt() * CLEAN


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_what_a_perfect_model_predicts_is_the_picture(kind):
    own = DDIMScheduler(beta_schedule="scaled_linear", prediction_type=kind, clip_sample=False)
    for name in samplers_of(own):
        scheduler = sampler(name, own)
        scheduler.set_timesteps(10)
        timestep = scheduler.timesteps[0]
        sample, output = noisy(scheduler, timestep, 0)
        scheduler.scale_model_input(sample, timestep)  # as pipelines do before they call the model
        with Predictions(scheduler) as predicted:
            scheduler.step(output, timestep, sample)
        assert torch.allclose(predicted.clean, CLEAN, atol=2e-2), name  # the noise is 14 times as large as the picture
        assert "step" not in vars(scheduler)
    assert set(samplers_of(own)) <= set(SAMPLERS)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_first_step_from_noise_alone_predicts_what_can_be_known(kind):
    """As the embedded world is drawn."""
    levels = {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False, **levels)
    scheduler.set_timesteps(10)
    sample, output = noisy(scheduler, scheduler.timesteps[0], 0)
    assert torch.equal(sample, NOISE)
    clean = predicted_clean(scheduler, output, scheduler.timesteps[0], sample)
    assert clean is None if kind == "epsilon" else torch.equal(clean, CLEAN)


def test_flow_matching_predicts_the_picture_too():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    sample, output = noisy(scheduler, scheduler.timesteps[3], 3)
    assert torch.allclose(predicted_clean(scheduler, output, scheduler.timesteps[3], sample), CLEAN, atol=1e-4)


def test_a_scheduler_whose_levels_are_unknown_predicts_nothing():
    unknown = type("Scheduler", (), {"config": type("Config", (), {"prediction_type": "epsilon"})()})()
    assert predicted_clean(unknown, NOISE, torch.tensor(5), CLEAN) is None
