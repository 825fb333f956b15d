"""Which experts act at this moment: what the user set, in this step, with this text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from mole_diffusers.functional import onto
from mole_diffusers.patching.gating.decision import Present
from mole_diffusers.patching.gating.settings import Settings
from mole_diffusers.patching.gating.step import Step
from mole_diffusers.patching.gating.token_masks import TokenMasks


class ActiveExperts(NamedTuple):
    """The experts that a gate weighs, and their strengths.

    Attributes:
        mask: [N] or [B, N] bool: experts that are present, active and not at strength 0.
        strengths: [N] or [B, N].
        all_active: whether the mask is true for all, known without asking the device.
        unit_strengths: whether all strengths are 1.
    """

    mask: torch.Tensor
    strengths: torch.Tensor
    all_active: bool
    unit_strengths: bool


class EffectiveSettings:
    """What follows from settings, step and masks for all gates and layers alike. Whoever changes one of these says so.

    Gates read who is active and how strong as tensors. As numbers, they would become part of compiled code, and every change
    of a slider would compile again.

    Attributes:
        masks: the binding if it applies: weights by hand, and a part of a step, hold on every token.
        closes: whether words are closed outside their regions: while no expert acts, the model draws as itself.
        changes: counts changes. What gates decided before the last one no longer holds.
    """

    def __init__(self, settings: Settings, step: Step):
        self.settings, self.step = settings, step
        self.masks: TokenMasks | None = None
        self.closes, self.changes = True, 0
        self._active: dict[tuple[Present, torch.device], ActiveExperts] = {}

    def changed(self) -> None:
        """Settings, or the masks of a text, have changed."""
        self.changes += 1
        self.update()

    def update(self) -> None:
        """Follow what has changed. What gates decided for the same part of a step still holds."""
        settings = self.settings
        by_hand = settings.fixed.now is not None or self.step.part.now is not None
        self.masks = None if by_hand else settings.binding.now
        self.closes = any(settings.acting) and not self.step.is_off
        for present, device in self._active:
            self._active[present, device] = self.of_strengths(present, settings.strengths.now, device)

    def experts(self, present: Present, device: torch.device) -> ActiveExperts:
        """Which of the experts in `present` are active, with the user's strengths. Kept until something changes."""
        found = self._active.get((present, device))
        if found is None:
            found = self._active[present, device] = self.of_strengths(present, self.settings.strengths.now, device)
        return found

    def of_strengths(self, present: Present, strengths: Sequence[float], device: torch.device) -> ActiveExperts:
        """The same with any strengths [N]."""
        on = self.settings.active.now if self.step.part.now is None else self.step.part.now
        silent = (False,) * len(present) if self.masks is None else self.masks.silence.experts
        there = [p and a and s != 0 and not mute for p, a, s, mute in zip(present, on, strengths, silent, strict=True)]
        with torch.inference_mode(False):  # they are kept, and are also used with gradients
            mask, factor = onto(torch.tensor(there), device), onto(torch.tensor(strengths), device)
        return ActiveExperts(mask, factor, all(there), all(s == 1 for s in strengths))

    @property
    def rows_of_prompts(self) -> int:
        """How many rows of the batch may have experts of their own; 1 if all rows have the same."""
        if self.masks is not None and self.masks.silence.rows is not None:
            return len(self.masks.silence.rows)
        rows = self.settings.rows.now
        return 1 if rows is None else len(rows.factors) * rows.images
