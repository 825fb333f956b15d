"""What all gates and layers of a mixture share while sampling. Each part has one owner, and reads only those before it:

    tokens       which tokens the encoded texts are made of
    settings     what the user set, with the masks of the words and places that a binding means now
    step         where sampling is
    effective    what follows from these: which experts act, how strong, and their masks
    listeners    who is told

`StepHook` and `TextHook` take a call of a model through them in this order, before any gate is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from mole_diffusers.patching.gating.decision import Listeners
from mole_diffusers.patching.gating.effective import EffectiveSettings
from mole_diffusers.patching.gating.prompt_tokens import PromptTokens
from mole_diffusers.patching.gating.settings import Change, Setting, Settings
from mole_diffusers.patching.gating.step import Step
from mole_diffusers.patching.hooks import Entered, ForwardHook
from mole_diffusers.patching.host.denoiser_inputs import DenoiserInputs, lora_scale
from mole_diffusers.patching.undo import undoing

T = TypeVar("T")


@dataclass(frozen=True)
class Sampling:
    """The parts, see above.

    Attributes:
        inputs: reads what the denoiser is called with.
        entered: what hooks have entered around modules that run.
    """

    inputs: DenoiserInputs
    tokens: PromptTokens
    settings: Settings
    step: Step
    effective: EffectiveSettings
    listeners: Listeners
    entered: Entered

    @classmethod
    def of(cls, experts: int, inputs: DenoiserInputs, tokens: PromptTokens) -> Sampling:
        """For a new mixture of so many experts: all are on, at strength 1."""
        settings, step = Settings(Setting([True] * experts), Setting([1.0] * experts)), Step()
        return cls(inputs, tokens, settings, step, EffectiveSettings(settings, step), Listeners(), Entered())

    def set(self, setting: Setting[T], value: T) -> None:
        """Change a setting, in the block that it comes from, if any."""
        setting.set(value)
        self.effective.changed()

    @contextmanager
    def changed_while(self, *changes: Change[Any]) -> Iterator[None]:
        """Change settings, or where sampling is, while the block runs."""
        # What is drawn for a part of a step changes nothing that holds for all steps.
        follow = (
            self.effective.update if any(change.setting is self.step.part for change in changes) else self.effective.changed
        )
        with undoing() as undo:  # a leftover setting would change all later pictures
            undo.callback(follow)
            for change in changes:
                undo.callback(change.end)
                change.begin()
            follow()
            yield

    @property
    def wants_maps(self) -> bool:
        """Whether attention must be read at this step."""
        masks = self.effective.masks
        return masks is not None and masks.wants_maps(is_heard=bool(self.listeners.maps.now))

    def add_maps(self, shares: torch.Tensor) -> None:
        """Add what a layer attends to in each picture: shares [P, T, S] of its text's tokens, mean over heads."""
        masks = self.effective.masks
        if masks is None or (side := masks.add_maps(shares)) is None or masks.text is None:
            return
        for hears in self.listeners.maps.now:
            hears(masks.text.picture.named_maps(shares, side))

    def on_text(self, encoder: str, ids: torch.Tensor, device: torch.device) -> None:
        """A text encoder on `device` is about to read `ids` [B, T]."""
        masks, in_call = self.effective.masks, self.step.pipe.now is not None
        if masks is not None and masks.on_text(encoder, ids, device, in_call=in_call, acting=self.settings.acting):
            self.effective.changed()


class StepHook(ForwardHook):
    """On the denoiser: notes where sampling is, and lets the masks follow.

    Args:
        is_off: whether no expert acts in a call of the denoiser, given the scale of LoRAs in it.
    """

    def __init__(self, sampling: Sampling, is_off: Callable[[float], bool]):
        self.sampling, self.is_off = sampling, is_off

    def before(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        sampling, inputs, step, effective = self.sampling, self.sampling.inputs, self.sampling.step, self.sampling.effective
        text, time = inputs.text(args, kwargs), inputs.time(args, kwargs)
        if torch.compiler.is_compiling():
            step.begin_compiled(time, is_heard=bool(sampling.listeners.decisions.now))
            return
        was_off = step.is_off
        step.begin(text, time, is_off=self.is_off(lora_scale(dict(zip(inputs.names, args, strict=False)) | kwargs)))
        if step.is_off != was_off:
            effective.changed()
        if effective.masks is not None and effective.masks.on_denoiser(
            text,
            inputs.latents(args, kwargs),
            lambda: inputs.side(args, kwargs),
            pipe=step.pipe.now,
            time=time,
            acting=sampling.settings.acting,
        ):
            effective.changed()
