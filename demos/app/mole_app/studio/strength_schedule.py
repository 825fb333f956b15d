"""Turn the LoRA tags of a prompt into a schedule for a mixture: a strength per expert, component, block and step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mole_app.studio.block_weights import BASE, block_names, block_weights
from mole_app.studio.prompt_syntax import LoraTag


class StrengthSchedule:
    """The schedule of a set of tags, for `Parts.planned`.

    `step` is the current step; the callback of `on_step` advances it.

    Args:
        experts: names in the order of the mixture; an expert without a tag has strength 0.
        tags: the tags.
        unet: the pipeline's denoiser; block weights need a UNet.
        steps: number of sampling steps.
        locks: gate location -> {expert: weight}, used instead of the gate there. Experts that are not named get 0.

    Raises ValueError for a tag whose expert is not in the mixture, and for block weights that do not fit the UNet.
    """

    def __init__(
        self,
        experts: Sequence[str],
        tags: Sequence[LoraTag],
        *,
        unet: Any,
        steps: int,
        locks: Mapping[str, Mapping[str, float]] | None = None,
    ):
        by_name = {tag.name: tag for tag in tags}
        if unknown := [name for name in by_name if name not in experts]:
            raise ValueError(f"no expert for the tag {by_name[unknown[0]]}; there are {list(experts)}")
        self.tags = [by_name.get(name) for name in experts]
        self.steps, self.step = steps, 0
        self.locks = {place: [row.get(name, 0.0) for name in experts] for place, row in (locks or {}).items()}
        self._block_weights = [block_weights(tag.lbw, unet) if tag is not None else {} for tag in self.tags]
        names = block_names(unet) if any(self._block_weights) else {}
        self._block_names = {f"unet.{module}.": label for module, label in names.items()}
        self._cache: dict[str, list[float]] = {}  # module -> its block's weights

    def part(self, part: str) -> list[float]:
        """[N] strengths of a component, "unet" or "text_encoder", at the current step."""
        return [0.0 if tag is None else tag.strength(part, self.step, self.steps) for tag in self.tags]

    def block(self, module: str) -> list[float]:
        """[N] block weights of a module, for example "unet.down_blocks.1.attentions.0"."""
        if module not in self._cache:
            names = self._block_names.items()
            label = next((label for prefix, label in names if f"{module}.".startswith(prefix)), BASE)
            self._cache[module] = [weights.get(label, 1.0) for weights in self._block_weights]
        return self._cache[module]

    def gates(self, place: str) -> Sequence[float] | None:
        """[N] weights that replace the gate at a gate location; None if it is not locked."""
        return self.locks.get(place)

    def on_step(self, then: Callable[[Any, int, Any, dict], dict] | None = None) -> Callable[..., dict]:
        """A `callback_on_step_end` that advances `step` and then calls `then`, another such callback.

        diffusers counts evaluations of the denoiser: samplers of second order such as Heun evaluate twice per step, and PLMS
        once more than there are steps.
        """

        def advance(pipe: Any, index: int, timestep: Any, kwargs: dict) -> dict:
            self.step = min((index + 1) // pipe.scheduler.order, self.steps - 1)
            return kwargs if then is None else then(pipe, index, timestep, kwargs)

        return advance
