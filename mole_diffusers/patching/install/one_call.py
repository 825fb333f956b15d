"""One call of a pipeline with a mixture on it: what begins and ends with it, and how the subjects of its prompt are
drawn.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from mole_diffusers.binding.picture_warning import PictureWarning
from mole_diffusers.binding.sentence import TAG
from mole_diffusers.binding.words import SubjectKey
from mole_diffusers.patching.gating.settings import Change
from mole_diffusers.patching.gating.shared_state import SharedState
from mole_diffusers.patching.gating.token_masks import TokenMasks
from mole_diffusers.patching.host.denoiser_inputs import denoiser, is_one_graph
from mole_diffusers.patching.subjects import place_sources  # noqa: F401, registers them
from mole_diffusers.patching.subjects.per_subject import lost_tiles, subjects_for_tiles, why_one_picture, why_unbound
from mole_diffusers.patching.subjects.prompt_subjects import PLACE_SOURCES, PictureCall, Tiling
from mole_diffusers.patching.subjects.tiles import Tiles


@dataclass(frozen=True)
class OneCall:
    """A call of a pipeline.

    Attributes:
        names: the experts, in the order of the gates' columns.
        pipe: the pipeline that is called.
        given: the arguments of the call; None in a denoising loop of the user's own.
    """

    shared: SharedState
    names: Sequence[str]
    pipe: Any
    given: Mapping[str, Any] | None

    @contextmanager
    def running(self, *, is_off: bool, masks_of_files: Callable[[], TokenMasks | None]) -> Iterator[None]:
        """The block that the call runs in, while other threads wait.

        Args:
            is_off: whether the pipeline has switched all experts off. Nothing that belongs to them acts without them.
            masks_of_files: the masks of the words of the experts' files, for tiles of a mixture that is not bound.
        """
        shared, binding, is_done = self.shared, self.shared.settings.binding.now, False
        changes: list[Change[Any]] = [shared.step.pipe.to(self.pipe)]
        if is_off:
            changes += [shared.settings.binding.to(None), shared.settings.tiling.to(Tiling(0))]
        if binding is not None:
            binding.begin()
        if self.given is not None and (tag := _tag_in(self.given)):
            self._warn(f"{tag} in the prompt is read as words: strengths are given to attach or to the mixture")
        if lost := self._regions_under_weights_by_hand():
            self._warn(f"the region of {lost[0]!r} does not act: inside `fixed`, weights hold in the whole picture")
        try:
            with shared.changed_while(*changes):
                self._check_one_graph()
                with self._apart_or_placed(masks_of_files):
                    yield
            is_done = True
        finally:
            shared.entered.leave()
            shared.kept_text.end()
            for hears in shared.listeners.layouts.now:
                hears([] if binding is None else binding.layouts)
            if binding is not None:
                binding.end(warns=is_done and shared.effective.binding is binding)

    def _regions_under_weights_by_hand(self) -> list[str]:
        """The experts with weights by hand whose region is given, and does nothing."""
        binding, fixed = self.shared.settings.binding.now, self.shared.settings.fixed.now
        if binding is None or fixed is None:
            return []
        return [n for (n, own), weight in zip(binding.bound.items(), fixed, strict=True) if weight and own.given is not None]

    def _warn(self, message: str) -> None:
        binding = self.shared.settings.binding.now
        warnings.warn(message, PictureWarning, stacklevel=2) if binding is None else binding.warn(message)

    def _check_one_graph(self) -> None:
        """Raise ValueError for a region, and warn of words, if the denoiser is compiled as one graph, which keeps nothing
        apart.
        """
        masks, acting = self.shared.effective.binding, self.shared.settings.acting
        if masks is None or not is_one_graph(self.pipe):
            return
        why = why_unbound(denoiser(self.pipe))
        bound = {name: own for (name, own), acts in zip(masks.bound.items(), acting, strict=True) if acts}
        if given := [name for name, own in bound.items() if own.given is not None]:
            raise ValueError(f"the region of {given[0]!r} cannot act: {why}")
        if len(bound) > 1 and any(own.words for own in bound.values()):
            masks.warn(why)

    def _apart_or_placed(self, masks_of_files: Callable[[], TokenMasks | None]) -> AbstractContextManager[None]:
        """A block in which the subjects of the prompt are drawn in tiles where there is room, or are first found in a given
        picture; or neither. Whether there is room is known once the denoiser gets its latents.
        """
        settings = self.shared.settings
        masks, tiling = settings.binding.now, settings.tiling.now
        if masks is None and tiling.always and tiling.until:
            masks = masks_of_files()
        if self.given is None:
            return nullcontext()
        if masks is None or settings.fixed.now is not None or settings.rows.now is not None:
            self._warn_of_one_picture("weights by hand hold everywhere, and sets of experts belong to several prompts")
            return nullcontext()
        acting = {name for name, acts in zip(self.names, settings.acting, strict=True) if acts}
        read, set_places = PictureCall(self.pipe, tiling, self.given, masks.bound, acting), partial(self._set_places, masks)
        if (subjects := subjects_for_tiles(read)) is not None:
            return Tiles(read, subjects, adapter_subset=self._adapter_subset, set_places=set_places).drawn()
        self._warn_of_one_picture(why_one_picture(read))
        if why := lost_tiles(read, self._encoded_prompts()):
            masks.warn(why)
        unheard = partial(self._adapter_subset, is_heard=False)
        found = (source(read, adapter_subset=unheard, set_places=set_places) for source in PLACE_SOURCES)
        return next((placing for placing in found if placing is not None), nullcontext())

    def _warn_of_one_picture(self, why: str) -> None:
        """For a picture that should be drawn in tiles, and is not."""
        if self.shared.settings.tiling.now.always and self.shared.settings.tiling.now.until:
            self._warn(f"this picture is drawn as one, and not in tiles: {why}")

    def _encoded_prompts(self) -> list[str]:
        """The texts of the states that the call gives, if their words are known."""
        states = (self.given or {}).get("prompt_embeds")
        return self.shared.tokens.texts(states) if isinstance(states, torch.Tensor) else []

    def _adapter_subset(self, names: Sequence[str], *, is_heard: bool = True) -> AbstractContextManager[None]:
        """Only these experts, on every word, for calls of the denoiser that are parts of a step, or that draw nothing."""
        changes: list[Change[Any]] = [self.shared.step.adapter_subset.to(tuple(name in names for name in self.names))]
        if not is_heard:
            changes.append(self.shared.listeners.decisions.to(()))
        return self.shared.changed_while(*changes)

    def _set_places(self, masks: TokenMasks, places: Mapping[SubjectKey, torch.Tensor]) -> bool:
        if done := masks.set_places(places):
            self.shared.effective.decide_again()
        return done


def _tag_in(given: Mapping[str, Any]) -> str:
    """A tag of other tools, such as <lora:fox:0.8>, in the prompts of a call; "" if there is none."""
    prompts = [given.get(name) for name in ("prompt", "prompt_2", "prompt_3")]
    texts = [text for each in prompts for text in (each if isinstance(each, list | tuple) else [each])]
    return next((tag[0] for text in texts if isinstance(text, str) and (tag := TAG.search(text))), "")
