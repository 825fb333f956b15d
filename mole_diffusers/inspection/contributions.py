"""Where in the picture each expert acts: the size of what it adds to the denoiser's layers, by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from mole_diffusers.binding.picture_layout import layer_size
from mole_diffusers.binding.regions import GridSize
from mole_diffusers.functional import as_tokens
from mole_diffusers.mixture import Mixture
from mole_diffusers.patching.host.denoiser_inputs import (
    DenoiserInputs,
    GuidanceLayout,
    denoiser,
    guidance_layout_of,
    repeats,
)
from mole_diffusers.patching.install import peft_injection
from mole_diffusers.patching.undo import undoing

NOT_IMAGE = ("time_emb_proj", "linear_1", "linear_2")  # layers without a token per place


@dataclass
class Contributions:
    """Sums over layers and steps, by resolution.

    Attributes:
        experts: names, in the order of the first axis of a map.
        sums: (h, w) -> [N, h, w], |up_n (g_n z_n)| of every layer at that resolution, over the rows with the prompt.
    """

    experts: list[str]
    sums: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def add(self, size: tuple[int, int], norms: torch.Tensor) -> None:
        """norms [N, h * w]"""
        shaped = norms.unflatten(-1, size).float().cpu()
        self.sums[size] = self.sums.get(size, torch.zeros(())) + shaped

    def finest(self) -> tuple[tuple[int, int], torch.Tensor]:
        """The finest resolution at which an expert acts, and the maps there, scaled so that the largest value is 1.

        Raises ValueError if no expert has acted on the picture.
        """
        if not self.sums:
            raise ValueError("no expert has acted on the picture: all are absent, or have layers in the text encoder alone")
        size = max(self.sums, key=lambda hw: hw[0] * hw[1])
        return size, self.sums[size] / self.sums[size].max().clamp_min(1e-12)


@contextmanager
def contributions(pipe: Any, mixture: Mixture, size: tuple[int, int]) -> Iterator[Contributions]:
    """Measure while the block runs. Calls for only a part of the picture, such as tiles, do not count.

    Args:
        size: (height, width) of the picture, for a denoiser that does not say the shape of its tokens.
    """
    model = denoiser(pipe)
    found, inputs = Contributions(list(mixture.experts)), DenoiserInputs(model)
    here: GridSize | None = None  # of the picture's tokens, in this call
    tokens = whole = 0  # their number, and that of the largest call
    words = 0  # the number of the text's tokens in this call
    guidance_layout: GuidanceLayout = (True,)  # of this call's rows

    def count(_: Any, args: tuple, kwargs: dict) -> None:
        nonlocal here, tokens, whole, guidance_layout, words
        here = inputs.latent_size(args, kwargs)
        tokens = 0 if here is None else here[0] * here[1]
        whole = max(whole, tokens)
        latents = inputs.latents(args, kwargs)
        text = inputs.text(args, kwargs)
        words, known = text.shape[1], guidance_layout_of(pipe, text, latents)
        # If unknown: the same pictures twice mean guidance, with the prompts' rows last.
        guidance_layout = known or ((False, True) if repeats(latents, 2) else (True,))

    def measuring(up: Any, down: Any, *, has_text: bool) -> Callable[[Any, tuple], None]:
        def measure(_: Any, args: tuple) -> None:
            if tokens < whole or args[0].dim() == 2:  # a part of the picture, or a layer without places
                return
            z = as_tokens(args[0].detach())  # [B, T, R]
            if inputs.record.blocks.is_joint and tokens:  # among those of text, padding and given pictures
                z = z[:, inputs.record.blocks.apart(tokens, words if has_text else 0)[0]]
            if (shape := layer_size(z.shape[1], here or size)) is None:
                return
            # PAG gives some layers only the first groups, and others the perturbed ones, which are not the picture.
            if prompted := [
                rows for rows, asks in zip(z.chunk(len(guidance_layout)), guidance_layout, strict=False) if asks
            ]:
                found.add(shape, norms(torch.cat(prompted), up.weight, down.expert_index, len(found.experts)))

        return measure

    with undoing() as undo:
        undo.before_forward(model, count, with_kwargs=True)
        for name, (up, down) in peft_injection.ups(model).items():
            token_type = inputs.record.blocks.token_type_of(name)
            if token_type in ("image", "joint") and not name.endswith(NOT_IMAGE):
                undo.before_forward(up, measuring(up, down, has_text=token_type == "joint"))
        yield found


def norms(z: torch.Tensor, up: torch.Tensor, expert_index: torch.Tensor, experts: int) -> torch.Tensor:
    """z [B, T, R], up [Cout, R] (or [Cout, R, 1, 1]), expert_index [R] -> [N, T]: |up_n z_n|, the mean over rows.

    Uses the r x r matrix up_n' up_n, so that nothing of width Cout is allocated.
    """
    z, up = z.float(), up.float().flatten(1)
    rows = []
    for n in range(experts):
        mine = expert_index == n
        gram = up[:, mine].T @ up[:, mine]  # [r, r]
        rows.append(((z[..., mine] @ gram) * z[..., mine]).sum(-1).clamp_min(0).sqrt().mean(0))  # [T]
    return torch.stack(rows)
