"""The clean picture that each step of a sampler predicts, for previews: what is left without the predicted noise."""

from __future__ import annotations

import functools
from typing import Any

import torch


class Predictions:
    """While the block runs, `clean` is what the scheduler's last step took for the clean latents, [B, C, H, W], or None
    before the first step and for schedulers whose levels of noise are not known."""

    def __init__(self, scheduler: Any):
        self.scheduler = scheduler
        self.clean: torch.Tensor | None = None

    def __enter__(self) -> Predictions:
        step = self.scheduler.step

        @functools.wraps(step)
        def seen(output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.clean = predicted_clean(self.scheduler, output, timestep, sample)
            return step(output, timestep, sample, *args, **kwargs)

        self.scheduler.step = seen
        return self

    def __exit__(self, *_: object) -> None:
        del self.scheduler.step  # the instance's own, over that of its class


def predicted_clean(scheduler: Any, output: torch.Tensor, timestep: Any, sample: torch.Tensor) -> torch.Tensor | None:
    """The clean latents that a model's output predicts for noisy ones, all [B, C, H, W], before the scheduler steps.

    With signal share a and noise share s, the sample is z = a x + s n. A model predicts n, the velocity v = a n - s x
    (Salimans & Ho, 2022), x itself, or for flow matching v = n - x, where a = 1 - s.
    """
    kind = getattr(scheduler.config, "prediction_type", "flow_prediction")
    if (sigmas := getattr(scheduler, "sigmas", None)) is not None:
        index = scheduler.step_index
        sigma = float(sigmas[scheduler.index_for_timestep(timestep) if index is None else index])
        if kind == "flow_prediction":
            return sample - sigma * output
        signal = (1 + sigma**2) ** -0.5
    elif (signals := getattr(scheduler, "alphas_cumprod", None)) is not None:
        signal = float(signals[int(timestep)]) ** 0.5  # 0 at the first step of some schedules (Lin et al., 2024)
    else:
        return None
    noise, z = (1 - signal**2) ** 0.5, scheduler.scale_model_input(sample, timestep)
    if kind == "epsilon":
        return (z - noise * output) / signal if signal else None
    if kind == "v_prediction":
        return signal * z - noise * output
    return output if kind == "sample" else None
