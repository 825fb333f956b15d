"""What all gates and layers of a mixture share while sampling. Each part has one owner, and reads only those before it:

    tokens       which tokens the encoded texts are made of
    settings     what the user set, with the masks of the words and places that a binding means now
    step         where sampling is
    effective    what follows from these: which experts act, how strong, and their masks
    listeners    who is told

`StepHook`, and `TextHook` (prompt_tokens.py) for a text encoder, take a call of a model through them in this order, before
any gate is asked.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

from mole_diffusers.functional import onto
from mole_diffusers.patching.gating.decision import Listeners, Present
from mole_diffusers.patching.gating.kept_text import KeptText
from mole_diffusers.patching.gating.prompt_tokens import PromptTokens
from mole_diffusers.patching.gating.settings import Change, Setting, Settings
from mole_diffusers.patching.gating.token_masks import TokenMasks
from mole_diffusers.patching.hooks import EnteredContexts, ForwardHook
from mole_diffusers.patching.host.denoiser_inputs import DenoiserInputs, lora_scale
from mole_diffusers.patching.undo import Undo, restore_point, undoing

T = TypeVar("T")


class Step:
    """The denoiser's call that runs, or that ran last.

    Attributes:
        time: [B], its noise level in 0..1, where 1 is pure noise.
        number: counts calls, except those for a part of a step; -1 before the first.
        texts: counts texts.
        calls_of_text: counts calls with the same text.
        is_off: whether no expert acts in it: the pipeline has switched LoRAs off.
        pipe: the pipeline, while a call of it runs.
        adapter_subset: [N], in a call for a part of a step, such as a tile: the experts that act in it, on every word.
    """

    def __init__(self) -> None:
        self.time = torch.zeros(1)
        self.number, self.texts, self.calls_of_text, self.is_off = -1, 0, 0, False
        self.pipe: Setting[Any] = Setting(None)
        self.adapter_subset: Setting[tuple[bool, ...] | None] = Setting(None)
        self._text: Callable[[], torch.Tensor | None] = lambda: None

    def begin(self, text: torch.Tensor, time: torch.Tensor, *, is_off: bool) -> None:
        """The denoiser is called with a text [B, S, C], at a noise level [B]."""
        self.time, self.is_off = time, is_off
        self.number, self.calls_of_text = self.number + (self.adapter_subset.now is None), self.calls_of_text + 1
        if self._text() is not text:
            self.calls_of_text, self.texts, self._text = 0, self.texts + 1, weakref.ref(text)

    def restore_point(self) -> Callable[[Undo], None]:
        """A function that sets the noise level, and whether experts act, back to what they are now, until it is undone."""
        return restore_point(self, "time", "is_off")

    def begin_compiled(self, time: torch.Tensor, *, is_heard: bool) -> None:
        """The same in compiled code. It is counted only if it is heard: a counter compiles the model anew at every step."""
        self.time = time
        self.number += is_heard


class WeighedExperts(NamedTuple):
    """The experts that a gate weighs, and their strengths."""

    there: torch.Tensor  # [N] or [B, N] bool: those that the layer has, that are on, not at strength 0, and not silent
    strengths: torch.Tensor  # [N] or [B, N]
    all_weighed: bool  # whether `there` is true for all, known without asking the device
    unit_strengths: bool  # whether all strengths are 1


class EffectiveSettings:
    """What follows from settings, step and masks for all gates and layers alike. Whoever changes one of these says so.

    Gates read who is active and how strong as tensors. As numbers, they would become part of compiled code, and every change
    of a slider would compile again.

    Attributes:
        binding: that of the settings if it applies: weights by hand, and a part of a step, hold on every token.
        masks_words: whether words are masked outside their regions: while no expert acts, the model draws as itself.
        changes: counts changes. What gates decided before the last one no longer holds.
    """

    def __init__(self, settings: Settings, step: Step):
        self.settings, self.step = settings, step
        self.binding: TokenMasks | None = None
        self.masks_words, self.changes = True, 0
        self._weighed: dict[tuple[Present, torch.device], WeighedExperts] = {}

    def decide_again(self) -> None:
        """Follow what has changed, settings or the masks of a text. What gates decided before holds no longer."""
        self.changes += 1
        self.follow()

    def follow(self) -> None:
        """Follow what has changed. What gates decided for the same part of a step still holds."""
        settings = self.settings
        by_hand = settings.fixed.now is not None or self.step.adapter_subset.now is not None
        self.binding = None if by_hand else settings.binding.now
        self.masks_words = any(settings.acting) and not self.step.is_off
        for present, device in self._weighed:
            self._weighed[present, device] = self.of_strengths(present, settings.strengths.now, device)

    def experts(self, present: Present, device: torch.device) -> WeighedExperts:
        """Which of the experts in `present` a gate weighs, with the user's strengths. Kept until something changes."""
        found = self._weighed.get((present, device))
        if found is None:
            found = self._weighed[present, device] = self.of_strengths(present, self.settings.strengths.now, device)
        return found

    def of_strengths(self, present: Present, strengths: Sequence[float], device: torch.device) -> WeighedExperts:
        """The same with any strengths [N]."""
        on = self.settings.active.now if self.step.adapter_subset.now is None else self.step.adapter_subset.now
        inactive = (False,) * len(present) if self.binding is None else self.binding.inactive.experts
        there = [
            p and a and s != 0 and not is_inactive
            for p, a, s, is_inactive in zip(present, on, strengths, inactive, strict=True)
        ]
        with torch.inference_mode(False):  # they are kept, and are also used with gradients
            mask, factor = onto(torch.tensor(there), device), onto(torch.tensor(strengths), device)
        return WeighedExperts(mask, factor, all(there), all(s == 1 for s in strengths))

    @property
    def needed(self) -> tuple[bool, ...]:
        """[N]: the experts whose ranks layers need now. None of the others weighs anything.

        With gradients all do: blocks may be run again later, with the matrices of their first run.
        """
        settings, on = (
            self.settings,
            self.settings.active.now if self.step.adapter_subset.now is None else self.step.adapter_subset.now,
        )
        if torch.is_grad_enabled() or settings.control.now is not None:  # which may give weight to anyone
            return (True,) * len(on)
        if settings.fixed.now is not None:
            return tuple(weight != 0 for weight in settings.fixed.now)
        inactive = (False,) * len(on) if self.binding is None else self.binding.inactive.experts
        return tuple(
            a and s != 0 and not is_inactive for a, s, is_inactive in zip(on, settings.strengths.now, inactive, strict=True)
        )

    @property
    def rows_of_prompts(self) -> int:
        """How many rows of the batch may have experts of their own; 1 if all rows have the same."""
        if self.binding is not None and self.binding.inactive.rows is not None:
            return len(self.binding.inactive.rows)
        rows = self.settings.rows.now
        return 1 if rows is None else len(rows.factors) * rows.images


@dataclass(frozen=True)
class SharedState:
    """The parts, see above; what reads the denoiser's inputs; what hooks have entered around modules that run; and what
    layers made of the text.
    """

    inputs: DenoiserInputs
    tokens: PromptTokens
    settings: Settings
    step: Step
    effective: EffectiveSettings
    listeners: Listeners
    entered: EnteredContexts
    kept_text: KeptText

    @classmethod
    def of(cls, strengths: Sequence[float], inputs: DenoiserInputs, tokens: PromptTokens) -> SharedState:
        """For a new mixture of experts with these strengths, [N]: all are on."""
        settings, step = Settings(Setting([True] * len(strengths)), Setting(list(strengths))), Step()
        return cls(
            inputs, tokens, settings, step, EffectiveSettings(settings, step), Listeners(), EnteredContexts(), KeptText()
        )

    def set(self, setting: Setting[T], value: T) -> None:
        """Change a setting, in the block that it comes from, if any."""
        setting.set(value)
        self.effective.decide_again()

    @contextmanager
    def changed_while(self, *changes: Change[Any]) -> Iterator[None]:
        """Change settings, or where sampling is, while the block runs."""
        # What is drawn for a part of a step changes nothing that holds for all steps.
        is_part = any(change.setting is self.step.adapter_subset for change in changes)
        follow = self.effective.follow if is_part else self.effective.decide_again
        with undoing() as undo:  # a leftover setting would change all later pictures
            undo.callback(follow)
            for change in changes:
                undo.callback(change.setting.end, change)
                change.setting.begin(change)
            follow()
            yield

    @contextmanager
    def restored(self, points: Sequence[Callable[[Undo], None]], *changes: Change[Any]) -> Iterator[None]:
        """The same, and what was noted at some `restore_point`s holds again while the block runs."""
        with self.changed_while(*changes), undoing() as undo:
            undo.callback(self.effective.decide_again)
            for restore in points:
                restore(undo)
            self.effective.decide_again()
            yield

    @property
    def wants_maps(self) -> bool:
        """Whether attention must be read at this step."""
        masks = self.effective.binding
        return masks is not None and masks.wants_maps(is_heard=bool(self.listeners.maps.now))

    def add_maps(self, shares: torch.Tensor) -> None:
        """Add what a layer attends to in each picture: shares [P, T, S] of its text's tokens, mean over heads."""
        masks = self.effective.binding
        if masks is None or (latent_size := masks.add_maps(shares)) is None or masks.text is None:
            return
        for hears in self.listeners.maps.now:
            hears(masks.text.picture.named_maps(shares, latent_size))

    def encoding(self) -> AbstractContextManager[None]:
        """The block that a pipeline's `encode_prompt` runs in, which reads a prompt and its negative prompt."""
        masks, in_call = self.effective.binding, self.step.pipe.now is not None
        return nullcontext() if masks is None or in_call else masks.encoding()

    def on_text(self, encoder: str, ids: torch.Tensor) -> None:
        """A text encoder is about to read `ids` [B, T]."""
        masks, in_call = self.effective.binding, self.step.pipe.now is not None
        if masks is not None and masks.on_text(encoder, ids, in_call=in_call, acting=self.settings.acting):
            self.effective.decide_again()


@dataclass(eq=False)
class StepHook(ForwardHook):
    """On the denoiser: notes where sampling is, and lets the masks follow."""

    shared: SharedState
    is_off: Callable[[float], bool]  # whether no expert acts in a call, given the scale of LoRAs in it

    def before(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        shared, inputs, step, effective = self.shared, self.shared.inputs, self.shared.step, self.shared.effective
        text, time = inputs.text(args, kwargs), inputs.time(args, kwargs)
        if torch.compiler.is_compiling():
            step.begin_compiled(time, is_heard=bool(shared.listeners.decisions.now))
            return
        was_off = step.is_off
        step.begin(text, time, is_off=self.is_off(lora_scale(inputs.named(args, kwargs))))
        if step.is_off != was_off:
            effective.decide_again()
        shared.kept_text.begin(text, in_call=step.pipe.now is not None)
        if effective.binding is not None and effective.binding.on_denoiser(
            text,
            inputs.latents(args, kwargs),
            lambda: inputs.latent_size(args, kwargs),
            pipe=step.pipe.now,
            time=time,
            acting=shared.settings.acting,
        ):
            effective.decide_again()
