"""What training calls each denoiser with: its texts, its latents, and its way from a picture to noise and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from mole_diffusers.functional import onto
from mole_diffusers.patching.host.denoiser_inputs import DENOISERS, denoiser
from mole_diffusers.training.data import token_ids


class Diffusion:
    """Noise levels of a UNet: the pipeline's schedule with deterministic DDIM (Song et al., 2021), whatever its sampler.

    Args:
        steps: of a sampler; None for all levels that the model is trained on.

    Attributes:
        timesteps: [S] on the CPU, so that reading one does not wait for the device.
    """

    def __init__(self, pipe: Any, steps: int | None = None):
        self._scheduler = training_scheduler(pipe)
        self.timesteps = torch.arange(self._scheduler.config.num_train_timesteps)
        if steps is not None:
            self._scheduler.set_timesteps(steps)
            self.timesteps = self._scheduler.timesteps

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Latents [B, C, H, W] with noise at these levels [B]."""
        return self._scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the model should predict there: the noise or, if its config says so, the velocity (Salimans & Ho, 2022)."""
        kind = self._scheduler.config.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "v_prediction":
            return self._scheduler.get_velocity(latents, noise, timesteps)
        raise ValueError(f"prediction type {kind!r} cannot be trained; known: ['epsilon', 'v_prediction']")

    def step(self, prediction: torch.Tensor, i: int, x: torch.Tensor) -> torch.Tensor:
        """The latents after step `i` of a sampler without chance, from x [B, C, H, W]."""
        return self._scheduler.step(prediction, self.timesteps[i], x).prev_sample


class RectifiedFlow:
    """As `Diffusion`, for straight paths from pictures to noise (rectified flow, Liu et al., 2022), at its levels.

    The scheduler's shift moves them towards noise, for large pictures more; random levels are shifted alike.

    Args:
        tokens: of a picture in the transformer.
        steps: of a sampler; None for as many levels as the model was trained on.
    """

    def __init__(self, pipe: Any, tokens: int, steps: int | None = None):
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
        config = scheduler.config
        lengths, shifts = (config.base_image_seq_len, config.max_image_seq_len), (config.base_shift, config.max_shift)
        count = config.num_train_timesteps if steps is None else steps
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / count, count), mu=calculate_shift(tokens, *lengths, *shifts))
        self._count, self._levels, self.timesteps = config.num_train_timesteps, scheduler.sigmas, scheduler.timesteps

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return latents.lerp(noise, (timesteps / self._count).reshape(-1, 1, 1, 1))

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return noise - latents

    def step(self, prediction: torch.Tensor, i: int, x: torch.Tensor) -> torch.Tensor:
        return x + (self._levels[i + 1] - self._levels[i]) * prediction


def training_scheduler(pipe: Any) -> DDIMScheduler:
    """The pipeline's noise schedule as DDIM, whatever its sampler. The pipeline's own scheduler keeps its state.

    Latents are clipped to -1..1, which DDIM does by default, only if the pipeline's config says so.
    """
    config = pipe.scheduler.config
    return DDIMScheduler.from_config(config, clip_sample=config.get("clip_sample", False))


class Network(ABC):
    """A denoiser as training calls it.

    Attributes:
        patch: a token is of patch x patch latents.
    """

    patch = 1

    def __init__(self, pipe: Any):
        self.pipe = pipe
        # As the pipeline has it, compiled or not.
        self.model: Any = next(model for name in DENOISERS if (model := getattr(pipe, name, None)) is not None)

    @abstractmethod
    def own_size(self) -> tuple[int | None, int | None]:
        """Height and width of the model's own latents; None if it names none."""

    @abstractmethod
    def noise(self, height: int, width: int, steps: int | None = None) -> Diffusion | RectifiedFlow:
        """The noise levels of latents of this size: all that the model is trained on, or those of a sampler."""

    def guided(self, guidance: float, pictures: int) -> dict[str, Any]:
        """The arguments of the pipeline's call for pictures that are drawn with this guidance."""
        return {"guidance_scale": guidance}

    @abstractmethod
    def embed(self, prompts: Sequence[str]) -> Any:
        """Encode prompts as the pipeline does, with the gradient of its text encoders."""

    @abstractmethod
    def call(self, x: torch.Tensor, timesteps: torch.Tensor, text: Any) -> torch.Tensor:
        """The prediction for noisy latents x [B, C, H, W] with one text of `embed` each, fp32."""


# ---- UNets


@dataclass(frozen=True)
class EncodedText:
    """What a UNet reads of B prompts.

    Attributes:
        states: of the text encoder, [B, T, C]; in SDXL of both encoders, side by side.
        pooled: of SDXL's second encoder, [B, D]; None for other models.
    """

    states: torch.Tensor
    pooled: torch.Tensor | None = None


class UNet(Network):
    """Of Stable Diffusion 1.5, 2.1 and XL."""

    def own_size(self) -> tuple[int | None, int | None]:
        size = self.model.config.sample_size
        return (size[0], size[1]) if isinstance(size, tuple | list) else (size, size)

    def noise(self, height: int, width: int, steps: int | None = None) -> Diffusion:
        return Diffusion(self.pipe, steps)

    def embed(self, prompts: Sequence[str]) -> EncodedText:
        pipe = self.pipe
        if getattr(pipe, "text_encoder_2", None) is None:
            return EncodedText(_encode(pipe.tokenizer, pipe.text_encoder, prompts)[0])
        first = _encode(pipe.tokenizer, pipe.text_encoder, prompts, output_hidden_states=True)
        second = _encode(pipe.tokenizer_2, pipe.text_encoder_2, prompts, output_hidden_states=True)
        states, pooled = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second[0]
        if pipe.config.force_zeros_for_empty_prompt:
            said = onto(torch.tensor([[prompt != ""] for prompt in prompts]), pipe.device)  # [B, 1]
            states, pooled = states.where(said[..., None], 0), pooled.where(said, 0)
        return EncodedText(states, pooled)

    def call(self, x: torch.Tensor, timesteps: torch.Tensor, text: EncodedText) -> torch.Tensor:
        added = None
        if text.pooled is not None:
            height, width = (side * self.pipe.vae_scale_factor for side in x.shape[2:])
            size = onto(torch.tensor([height, width, 0, 0, height, width]), x.device)  # original size, crop, target size
            added = {"text_embeds": text.pooled, "time_ids": size.to(text.pooled.dtype).expand(len(x), -1)}
        return self.model(x.to(text.states.dtype), timesteps, text.states, added_cond_kwargs=added).sample.float()


def _encode(tokenizer: Any, encoder: Any, prompts: Sequence[str], **options: Any) -> Any:
    return encoder(onto(token_ids(tokenizer, prompts), encoder.device), **options)


# ---- transformers


class Transformer(Network):
    """One of `RectifiedFlow` that reads tokens of 2 x 2 latents."""

    patch = 2

    def noise(self, height: int, width: int, steps: int | None = None) -> RectifiedFlow:
        return RectifiedFlow(self.pipe, height * width // 4, steps)


class PackedTransformer(Transformer):
    """One that gets its latents as tokens, and predicts noise - picture."""

    def own_size(self) -> tuple[int | None, int | None]:
        return (self.pipe.default_sample_size,) * 2

    @abstractmethod
    def places(self, states: torch.Tensor, height: int, width: int) -> dict[str, Any]:
        """The arguments of the model that say where `height` x `width` tokens are, beside text of these states [B, T, C]."""

    def call(self, x: torch.Tensor, timesteps: torch.Tensor, text: dict[str, torch.Tensor]) -> torch.Tensor:
        states, (height, width) = text["encoder_hidden_states"], (side // 2 for side in x.shape[2:])
        # A model that learned to be told how much to guide itself is told: not at all.
        guidance = torch.ones(len(x), device=x.device) if self.model.config.guidance_embeds else None
        tokens = F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2).to(states.dtype)  # [B, T, 4 C]
        how = self.places(states, height, width) | text
        found = self.model(tokens, timestep=timesteps.to(states.dtype) / 1000, guidance=guidance, **how).sample.float()
        return F.pixel_shuffle(found.transpose(1, 2).unflatten(2, (height, width)), 2)


@lru_cache(maxsize=1)
def _rows_and_columns(height: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The picture's number, 0, row and column of each token, [H W, 3]. The same tensor again: its values are known."""
    axes = (torch.arange(length, device=device).float() for length in (1, height, width))
    return torch.cartesian_prod(*axes).to(dtype)


class Flux(PackedTransformer):
    """Of Flux.1."""

    def embed(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        states, pooled, ids = self.pipe.encode_prompt(list(prompts), None)
        return {"encoder_hidden_states": states, "pooled_projections": pooled, "txt_ids": ids}

    def places(self, states: torch.Tensor, height: int, width: int) -> dict[str, Any]:
        return {"img_ids": _rows_and_columns(height, width, states.dtype, states.device)}


class QwenImage(PackedTransformer):
    """Of Qwen-Image."""

    def guided(self, guidance: float, pictures: int) -> dict[str, Any]:
        return {"true_cfg_scale": guidance, "negative_prompt": [" "] * pictures}

    def embed(self, prompts: Sequence[str]) -> dict[str, torch.Tensor | None]:
        states, mask = self.pipe.encode_prompt(list(prompts))
        return {"encoder_hidden_states": states, "encoder_hidden_states_mask": mask}

    def places(self, states: torch.Tensor, height: int, width: int) -> dict[str, Any]:
        return {"img_shapes": [[(1, height, width)]] * len(states)}


class ZImage(Transformer):
    """Of Z-Image, which counts time from noise to picture and predicts picture - noise."""

    def own_size(self) -> tuple[int, int]:
        return (1024 // self.pipe.vae_scale_factor,) * 2

    def embed(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        return self.pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False)[0]

    def call(self, x: torch.Tensor, timesteps: torch.Tensor, text: list[torch.Tensor]) -> torch.Tensor:
        pictures = list(x.to(self.model.dtype)[:, :, None].unbind())  # [C, 1, H, W] each
        found = self.model(pictures, (1000 - timesteps) / 1000, text, return_dict=False)[0]
        return -torch.stack(found)[:, :, 0].float()


NETWORKS: Mapping[str, Callable[[Any], Network]] = {
    "UNet2DConditionModel": UNet,
    "FluxTransformer2DModel": Flux,
    "QwenImageTransformer2DModel": QwenImage,
    "ZImageTransformer2DModel": ZImage,
}


def network(pipe: Any) -> Network:
    """The denoiser of a pipeline as training calls it; ValueError for a pipeline that cannot be trained on."""
    model = denoiser(pipe)
    found = next((NETWORKS[kind.__name__] for kind in type(model).__mro__ if kind.__name__ in NETWORKS), None)
    if found is None or getattr(pipe, "text_encoder", None) is None:
        raise ValueError(
            f"{type(pipe).__name__} cannot be trained on: it needs a text_encoder, and a denoiser of {', '.join(NETWORKS)}"
        )
    return found(pipe)


def unet_of(pipe: Any, what: str) -> Any:
    """The UNet of a pipeline. Raises ValueError if it has another denoiser, which `what` cannot use."""
    found = network(pipe)
    if not isinstance(found, UNet):
        raise ValueError(f"{what} needs a UNet, and {type(pipe).__name__} has none")
    return found.model
