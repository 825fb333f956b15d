"""The diffusion side of training: the model's prediction, sampling with gradients, and the diffusion loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mole_diffusers.functional import onto
from mole_diffusers.mixture import Mixture, attached
from mole_diffusers.patching.undo import undoing
from mole_diffusers.training.data import RandomBatch, Samples
from mole_diffusers.training.networks import Network, network

DROP = 0.1  # share of captions that `denoising_loss` empties


def predict(pipe: Any, x: torch.Tensor, timesteps: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """The denoiser's prediction for noisy latents x [B, C, H, W] with one prompt each, in its own parametrisation, fp32."""
    model = network(pipe)
    return _predict(model, x, timesteps, _embedded(model, prompts))


class _Text(NamedTuple):
    """Prompts, and what the model's `embed` makes of them."""

    prompts: Sequence[str]
    states: Any


def _embedded(model: Network, prompts: Sequence[str]) -> _Text:
    with _telling(model, prompts):
        return _Text(prompts, model.embed(prompts))


def _telling(model: Network, prompts: Sequence[str]) -> AbstractContextManager[None]:
    """A block in which a mixture on the model need not look for these prompts in what it reads."""
    mixture = attached(model.pipe)
    return nullcontext() if mixture is None else mixture.parts.shared.tokens.explicit_prompts(prompts)


def _predict(model: Network, x: torch.Tensor, timesteps: torch.Tensor, text: _Text) -> torch.Tensor:
    with _telling(model, text.prompts), undoing() as undo:
        if (mixture := attached(model.pipe)) is not None:
            for module in model.model.modules():
                if getattr(module, "gradient_checkpointing", False):
                    undo.override(module, "_gradient_checkpointing_func", partial(_checkpointed, mixture))
        return model.call(x, timesteps, text.states)


def _checkpointed(mixture: Mixture, block: nn.Module, *args: Any) -> Any:
    """Run a block now, and again in the backward pass with the noise level, the experts and the places of this call."""
    return checkpoint(block, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), mixture.parts.restore_point()))


def _guided(model: Network, prompts: Sequence[str], guidance: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """`predict` with classifier-free guidance (Ho & Salimans, 2022), e_0 + guidance (e - e_0), for prompts encoded once.

    At guidance 1 there are no rows without a prompt.
    """
    text = _embedded(model, prompts if guidance == 1 else [""] * len(prompts) + list(prompts))

    def guided(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        if guidance == 1:
            return _predict(model, x, timesteps, text)
        empty, full = _predict(model, torch.cat([x, x]), torch.cat([timesteps, timesteps]), text).chunk(2)
        return empty + guidance * (full - empty)

    return guided


def sample_latents(
    pipe: Any,
    x: torch.Tensor,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance: float,
    checkpointing: bool = False,
    stop: int | None = None,
) -> torch.Tensor:
    """From noise x [B, C, H, W] to clean latents without chance (`Diffusion.step`), with the gradient of every step.

    Args:
        guidance: classifier-free guidance; 1 runs no unconditional row.
        checkpointing: compute each step's activations again in the backward pass.
        stop: run only this many steps; None runs to the end.
    """
    model, (height, width) = network(pipe), x.shape[2:]
    noise, guided = model.noise(height, width, steps), _guided(model, prompts, guidance)

    def step(x: torch.Tensor, i: int) -> torch.Tensor:
        return noise.step(guided(x, onto(noise.timesteps[i].expand(len(x)), x.device)), i, x)

    for i in range(len(noise.timesteps[:stop])):
        x = checkpoint(step, x, i, use_reentrant=False) if checkpointing else step(x, i)
    return x


def denoising_loss(pipe: Any, samples: Samples, batch: RandomBatch, *, guidance: float = 1.0) -> torch.Tensor:
    """The diffusion training loss on a random batch: MSE of the prediction, uniform steps of the noise schedule.

    Args:
        guidance: of the prediction. 1 is the plain loss, for photos and other pictures that the conditional model should
            imitate. Some captions are then empty, so that the unconditional prediction is trained, too.
    """
    model = network(pipe)
    pick = batch.choice(len(samples.latents))
    dropped = batch.uniform() < (DROP if guidance == 1 else 0.0)
    prompts = ["" if gone else samples.captions[i] for i, gone in zip(pick, dropped.tolist(), strict=True)]
    latents = samples.latents[pick]
    noise, levels = batch.normal(*latents.shape[1:]), model.noise(*latents.shape[2:])
    timesteps = levels.timesteps[batch.choice(len(levels.timesteps))]
    rows = levels.noised(latents, noise, timesteps), timesteps, levels.target(latents, noise, timesteps)
    noisy, timesteps, wanted = (onto(row, pipe.device) for row in rows)
    return F.mse_loss(_guided(model, prompts, guidance)(noisy, timesteps), wanted)
