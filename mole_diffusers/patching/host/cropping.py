"""A part of a picture as a picture of its own: how a denoiser's call is cut, and its predictions are put together.

All of it is on the grid of the denoiser's tokens, so that tiles are the same algorithm on every denoiser. Transformers are
not told where a part was cut. SDXL is, because it was trained so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from mole_diffusers.binding.regions import GridSize
from mole_diffusers.functional import onto

Box = tuple[int, int, int, int]  # top, bottom, left, right, in tokens
Call = dict[str, Any]  # the arguments of a denoiser's forward, by name
OF_WHOLE_SIZE = (  # what ControlNets and T2I-Adapters give a denoiser, in the size of the whole picture
    "down_block_additional_residuals", "mid_block_additional_residual", "down_intrablock_additional_residuals",
    "block_controlnet_hidden_states", "controlnet_block_samples", "controlnet_single_block_samples",
)  # fmt: skip
SIZES = 6  # numbers that SDXL's UNet is told of them; its refiner reads others


class Cropping(ABC):
    """How the calls of one class of denoisers are cut.

    Attributes:
        by_itself: whether a mixture draws in tiles without being asked. What that gains was measured on UNets alone.
        of_pipelines: what a pipeline must have, so that its prompts and its guidance are known.
        output: what the denoiser returns.
        trained: the side in tokens of the pictures that it was trained with; 0 if it is not one number.
        patch: the side of a token in latent pixels.
        multiple: the sides of a part are multiples of this number of tokens.
    """

    by_itself = False
    of_pipelines: tuple[str, ...] = ("encode_prompt", "do_classifier_free_guidance")
    output: type[Any] = Transformer2DModelOutput
    trained: int
    patch = 1
    multiple = 1

    @abstractmethod
    def __init__(self, config: Any):
        """Of a denoiser with this config."""

    def obstacle(self, call: Call, latents: torch.Tensor, latent_size: GridSize) -> str:
        """Why a call for a picture of this side cannot be cut; "" if it can."""
        if any(call.get(name) is not None for name in OF_WHOLE_SIZE):
            return "a ControlNet sees the whole picture, and tiles are parts of it: draw without one of them"
        return ""

    @abstractmethod
    def to_grid(self, tokens: torch.Tensor, latent_size: GridSize) -> torch.Tensor:
        """Latents or a prediction of a picture of this side, as [B, C, H, W] with one place for each token."""

    @abstractmethod
    def from_grid(self, grid: torch.Tensor) -> torch.Tensor:
        """The same backwards."""

    def ids(self, call: Call, box: Box, latent_size: GridSize) -> dict[str, Any]:
        """The arguments that say where tokens are, for a part."""
        return {}

    def encoded(self, made: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of what a pipeline's `encode_prompt` returns: a text's states [1, S, C], and the pooled ones [1, P], if any."""
        return made[0], made[2] if len(made) == 4 else None

    def beside_text(self, call: Call) -> Sequence[torch.Tensor]:
        """What else the model is told in all steps, [B, ...] each: pooled states, and to SDXL sizes."""
        return [pooled] if (pooled := call.get("pooled_projections")) is not None else []

    def conditions(
        self, call: Call, pooled: torch.Tensor | None, prompted: torch.Tensor, box: Box, latent_size: GridSize, pixels: int
    ) -> dict[str, Any]:
        """The arguments, beside latents and text, that a part changes in every step.

        Args:
            pooled: the pooled states of its text, [1, P].
            prompted: [B] bool, the rows that are prompts; the others keep what the call has.
            pixels: the side of a latent pixel in the picture.
        """
        whole = call["pooled_projections"]
        return {"pooled_projections": whole if pooled is None else _in_rows(prompted, pooled, whole)}


class UNetCropping(Cropping):
    """A token is a latent pixel. SDXL is told the size of the whole picture, and where the part was cut from it."""

    by_itself = True
    output = UNet2DConditionOutput

    def __init__(self, config: Any):
        self.trained = config.sample_size if isinstance(config.sample_size, int) else 0
        self.multiple = 2 ** (len(config.block_out_channels) - 1)  # it halves them without a remainder

    def obstacle(self, call: Call, latents: torch.Tensor, latent_size: GridSize) -> str:
        if latents.dim() != 4:
            return "tiles are parts of a picture, and this is a video"
        if (ids := (call.get("added_cond_kwargs") or {}).get("time_ids")) is not None and ids.shape[-1] != SIZES:
            return f"tiles tell SDXL their size in {SIZES} numbers, and this UNet reads {ids.shape[-1]}, as refiners do"
        return super().obstacle(call, latents, latent_size)

    def to_grid(self, tokens: torch.Tensor, latent_size: GridSize) -> torch.Tensor:
        return tokens

    def from_grid(self, grid: torch.Tensor) -> torch.Tensor:
        return grid.contiguous()

    def beside_text(self, call: Call) -> Sequence[torch.Tensor]:
        added = call.get("added_cond_kwargs") or {}
        return [added[name] for name in ("text_embeds", "time_ids") if name in added]

    def conditions(
        self, call: Call, pooled: torch.Tensor | None, prompted: torch.Tensor, box: Box, latent_size: GridSize, pixels: int
    ) -> dict[str, Any]:
        added = call.get("added_cond_kwargs")
        if added is None or pooled is None:
            return {}
        (height, width), (top, _, left, _), times = latent_size, box, added["time_ids"]
        whole = pixels * height, pixels * width
        sizes = onto(torch.tensor((*whole, pixels * top, pixels * left, *whole)), times.device).to(times.dtype)
        own = _in_rows(prompted, pooled, added["text_embeds"])
        return {"added_cond_kwargs": {**added, "text_embeds": own, "time_ids": sizes.expand_as(times)}}


class SD3Cropping(Cropping):
    """A token is a patch of latent pixels. A part has the positions of a picture of its size: the middle of all that the
    model knows.
    """

    def __init__(self, config: Any):
        self.patch, self.trained = config.patch_size, config.sample_size // config.patch_size

    def to_grid(self, tokens: torch.Tensor, latent_size: GridSize) -> torch.Tensor:
        return F.pixel_unshuffle(tokens, self.patch)

    def from_grid(self, grid: torch.Tensor) -> torch.Tensor:
        return F.pixel_shuffle(grid, self.patch)


class FluxCropping(Cropping):
    """Latents come as tokens [B, H * W, C], each of 2 x 2 latent pixels. The rows and columns of a part begin at those of
    the picture, as of a picture of its own: with the columns of its place, a part on the right would be drawn as the right
    part of a picture, and not as all of one.
    """

    of_pipelines = ("encode_prompt",)  # guidance is a number that the model reads, or a call for the negative prompt

    def __init__(self, config: Any):
        self.patch, self.trained = 2, 64  # 1024 pixels; its config has no size

    def obstacle(self, call: Call, latents: torch.Tensor, latent_size: GridSize) -> str:
        if latents.shape[1] != latent_size[0] * latent_size[1]:
            return "tiles are parts of the picture that is drawn, and this call has given pictures, too"
        return super().obstacle(call, latents, latent_size)

    def to_grid(self, tokens: torch.Tensor, latent_size: GridSize) -> torch.Tensor:
        return tokens.transpose(1, 2).unflatten(2, latent_size)

    def from_grid(self, grid: torch.Tensor) -> torch.Tensor:
        return grid.flatten(2).transpose(1, 2).contiguous()

    def ids(self, call: Call, box: Box, latent_size: GridSize) -> dict[str, Any]:
        top, bottom, left, right = box
        ids = call["img_ids"].unflatten(-2, latent_size)  # [H, W, 3], or the same for each picture
        return {"img_ids": ids[..., : bottom - top, : right - left, :].flatten(-3, -2)}

    def encoded(self, made: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
        return made[0], made[1]


def _in_rows(prompted: torch.Tensor, own: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """[B, P]: `own` [1, P] in the rows that are prompts, and the call's in the others."""
    return torch.where(prompted[:, None], own.to(whole), whole)
