"""Which experts' ranks the layers of a model hold: of those that act. The others are in the CPU's memory meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch

from mole_diffusers.lora.stacking import Stack
from mole_diffusers.patching.gating.shared_state import SharedState
from mole_diffusers.patching.hooks import ForwardHook
from mole_diffusers.patching.host.denoiser_inputs import is_compiled_module
from mole_diffusers.patching.host.offloading import moves_parts
from mole_diffusers.patching.install import peft_injection

OFFLOADED = (
    "the layers of this offloaded {kind} lack LoRAs that act now; call the pipeline, or the model inside `with "
    "mixture.drawing():`"
)
ONE_GRAPH = "this compiled {kind} was made for other LoRAs; call the pipeline, or the model inside `with mixture.drawing():`"


class LoadedAdapters(ForwardHook):
    """On a model with experts: before it runs, its layers get the ranks of experts that act and that they do not hold.

    When a call of the pipeline begins, its first texts and settings say which ranks are held from then on. So a picture
    pays for its own experts, and a step that draws a part of it moves nothing. All ranks are held where gates weigh or read
    them one by one, while gradients are kept, and in models that are compiled, whose code is made for the shape of the
    matrices, or offloaded layer by layer, whose hooks keep the matrices. So they are from the first time on that the model
    runs without the lock, as in a second pipeline: it may run in one thread while another begins a call.

    Args:
        stacks: layer -> all its experts.
        lock: held while the mixture's pipeline draws.
        denoises: whether it is the denoiser.
        whole: all ranks are always held.

    Attributes:
        experts: [N], those whose ranks the layers hold.
    """

    def __init__(
        self,
        model: Any,
        stacks: Mapping[str, Stack],
        shared: SharedState,
        lock: threading.RLock,
        *,
        denoises: bool,
        whole: bool,
    ):
        self.model, self.stacks, self.shared, self.lock = model, stacks, shared, lock
        self._denoises, self._always_whole = denoises, whole
        self.experts = self._all = (True,) * len(shared.settings.active.now)
        self._needed: tuple[bool, ...] | None = None  # by the last forward
        self._begins = False  # whether a call of the pipeline has begun since then

    @property
    def is_off(self) -> bool:
        """Whether `disable_lora` has switched the model's experts off, which it does for all layers at once."""
        return self.model.get_submodule(next(iter(self.stacks))).disable_adapters

    @property
    def is_whole(self) -> bool:
        """Whether the layers hold the ranks of all experts."""
        return self.experts == self._all

    def install(self) -> dict[str, Stack]:
        """What the layers hold when they get their experts: without the experts that are inactive until a text names
        them.
        """
        masks = self.shared.settings.binding.now
        if self._needed is None and masks is not None and not self._always_whole:
            self.experts = tuple(not bound.needs_words for bound in masks.bound.values())
        return self._narrowed()

    def begin_call(self) -> None:
        """A call of the pipeline begins: ranks that it does not need may go."""
        self._begins = not self._always_whole

    def before(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            if not self.is_whole:
                raise ValueError(ONE_GRAPH.format(kind=type(self.model).__name__))
            return
        if self.shared.step.is_off if self._denoises else self.is_off:
            return
        is_mine = self.lock._is_owned()  # type: ignore[attr-defined]  # threading.Condition asks it, too
        if not (self._always_whole or is_mine or moves_parts(self.model)):
            with self.lock:
                self._always_whole, self._begins = True, False
                self.hold_all()
        needed, may_drop = self.shared.effective.needed, self._begins and self.shared.step.adapter_subset.now is None
        if needed != self._needed or may_drop:
            self._needed, self._begins = needed, self._begins and not may_drop
            self._follow(needed, may_drop=may_drop)

    def _follow(self, needed: tuple[bool, ...], *, may_drop: bool) -> None:
        """Hold these ranks: beside those that are held, or only these."""
        wanted = needed if may_drop else tuple(map(max, needed, self.experts))
        if wanted == self.experts:
            return
        lacks = any(need and not held for need, held in zip(needed, self.experts, strict=True))
        if moves_parts(self.model):
            if lacks:
                raise ValueError(OFFLOADED.format(kind=type(self.model).__name__))
        elif not any(map(is_compiled_module, self.model.modules())):
            self._hold(wanted)
        elif lacks:
            self.hold_all()

    def hold_all(self) -> None:
        """Give the layers all ranks. The model must not be offloaded layer by layer then."""
        if not self.is_whole:
            self._hold(self._all)

    def _hold(self, experts: tuple[bool, ...]) -> None:
        self.experts = experts
        peft_injection.fill(self.model, self._narrowed())
        self.shared.kept_text.end()

    def _narrowed(self) -> dict[str, Stack]:
        if self.is_whole:
            return dict(self.stacks)
        return {name: stack.of(self.experts) for name, stack in self.stacks.items()}
