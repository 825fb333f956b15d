"""What a mixture has put on the models of its pipeline: on, off, off for a while, and on a copy."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch import nn

from mole_diffusers.lora import Expert
from mole_diffusers.patching.gating import cross_attention, joint_attention
from mole_diffusers.patching.gating.prompt_tokens import TextHook
from mole_diffusers.patching.gating.shared_state import SharedState, StepHook
from mole_diffusers.patching.hooks import ForwardHook
from mole_diffusers.patching.host.denoiser_inputs import (
    DENOISERS,
    denoiser,
    denoisers,
    hosts,
    is_compiled_whole,
    models_of,
    readers_of,
)
from mole_diffusers.patching.host.offloading import loaded, moves_parts
from mole_diffusers.patching.install.component import Component
from mole_diffusers.patching.install.embeddings import Words, add_words, embedded, left_out
from mole_diffusers.patching.install.host_calls import guard
from mole_diffusers.patching.install.peft_injection import off_after, refuse_switched_off, switch, switched_off, switches
from mole_diffusers.patching.install.pipeline_calls import calls_are_locked, lock_calls, unlock_calls
from mole_diffusers.patching.undo import Undo, undoing

HANDLE = "_mole_installation"  # attribute of each changed model that holds the installation on it
_locks: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()  # denoiser -> its lock
_lifted: WeakKeyDictionary[Any, Installation] = WeakKeyDictionary()  # denoiser -> what `lifted` took off it


class Installable(Protocol):
    """A mixture, as far as its installation knows it."""

    def drawing(self, call: Mapping[str, Any] | None = None) -> AbstractContextManager[None]:
        """The block that a call of the pipeline runs in."""
        ...

    def _copied_to(self, pipe: Any) -> Installation:
        """What puts the same mixture on a copy of the pipeline; it is not on it yet."""
        ...


class Installation:
    """The experts and gates of a mixture on the models of its pipeline. Building it changes nothing.

    Attributes:
        mixture: whose experts these are.
        components: the models with experts.
        models: name -> those that it changes.
        lock: of the pipeline's denoiser.
        without_embedding: a sentence for each trained embedding of the files that the pipeline's text encoders cannot take.
    """

    def __init__(
        self,
        mixture: Installable,
        pipe: Any,
        experts: Mapping[str, Expert],
        components: Sequence[Component],
        shared: SharedState,
    ):
        self.mixture, self.pipe, self.experts, self.components, self.shared = mixture, pipe, experts, components, shared
        unet, changed = denoiser(pipe), {component.name for component in components} | self.embeddings.keys()
        self.models = {name: model for name, model in hosts(pipe).items() if name in changed or model is unet}
        self.lock, self.without_embedding = lock_of(unet), list[str]()
        self._locking, self._undo = Undo(), Undo()  # restore the pipeline's calls, and the rest

    @property
    def embeddings(self) -> dict[str, dict[str, Words]]:
        """Text encoder -> expert -> its words with trained embeddings."""
        return embedded(self.experts)

    @property
    def denoiser(self) -> nn.Module:
        """The pipeline's denoiser when this was built."""
        return next(model for name, model in self.models.items() if name in DENOISERS)

    # ---- whether it is on

    @property
    def is_on(self) -> bool:
        """Whether it is on the pipeline now."""
        return installed(self.pipe) is self

    @property
    def is_lifted(self) -> bool:
        """Whether a `lifted` block runs, which puts it back."""
        return _lifted.get(self.denoiser) is self

    def is_off(self, scale: float) -> bool:
        """Whether the pipeline has switched all experts off: by `disable_lora`, or by the scale of a call."""
        return scale == 0 or all(component.is_off for component in self.components)

    def check_on(self) -> None:
        """Raise ValueError if it is not on the pipeline."""
        if not self.is_on:
            raise ValueError("this mixture is not attached any more: attach again, or use what is, mole.attached(pipe)")

    def check_in_use(self) -> None:
        """Raise ValueError for a mixture that is not attached: a change would have no effect. `lifted` puts it back."""
        if not self.is_lifted:
            self.check_on()

    def refuse_replaced(self, pipe: Any) -> None:
        """Raise ValueError if another model is in the place of one that has experts: only a part of them would act."""
        if vars(self.denoiser).get(HANDLE) is not self:  # it was taken off
            return
        for name, model in self.models.items():
            now = getattr(pipe, name, None)
            if now is not None and now is not model and all(component is not model for component in now.modules()):
                raise ValueError(
                    f"the pipeline's {name} was replaced by another while a mixture was on it, so that its experts would "
                    f"act in part; call attach again, or detach"
                )

    # ---- on and off

    def replace(self, before: Installation | None) -> None:
        """Take the place of `before`. If that fails, put `before` back.

        Raises ValueError if `before` is switched off.
        """
        with self.lock:
            for component in () if before is None else before.components:
                refuse_switched_off(component.model)
            try:
                if before is not None:
                    before.take_off()
                self._lock_calls()
                self._install()
            except BaseException:
                self.take_off()
                if before is not None:
                    before._lock_calls()
                    before._install()
                raise

    def take_off(self) -> None:
        """Restore the original pipeline; if an earlier attempt was interrupted, finish it."""
        self._uninstall()
        self._locking.close()

    def begin_call(self) -> None:
        """A call of the pipeline begins: layers may let go of the ranks of the one before. Where they cannot get others
        while it runs, they get all.
        """
        for component in self.components:
            component.ranks.begin_call()
        lacking = [component for component in self.components if not component.ranks.is_whole]
        fixed = [c for c in lacking if is_compiled_whole(self.pipe, c.name) or moves_parts(c.model)]
        if fixed:
            with loaded(self.pipe):
                for component in fixed:
                    component.ranks.hold_all()

    def _lock_calls(self) -> None:
        lock_calls(self.pipe, self.mixture.drawing, self.encoding, self._locking)

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """The block that the pipeline's `encode_prompt` runs in: its texts are not read amid those of another thread."""
        with self.lock, self.shared.encoding():
            yield

    def _install(self) -> None:
        undo = self._undo
        undo.close()  # what an interruption may have left
        try:
            with loaded(self.pipe):
                for name, model in self.models.items():
                    if vars(model).get(HANDLE, self) is not self:
                        raise ValueError(f"another pipeline's mixture is on its {name}; detach that one first")
                for model in self.models.values():
                    undo.callback(model.__dict__.pop, HANDLE, None)
                    object.__setattr__(model, HANDLE, self)
                for component in self.components:
                    component.install(undo)
                for module, hook in self._hooks():
                    hook.register(module, undo)
                self.without_embedding = left_out(self.experts) + [
                    why
                    for component, words in self.embeddings.items()
                    for why in add_words(self.pipe, component, words, undo)
                ]
                models, off = self.models.values(), partial(remove, self.pipe)
                guard(self.pipe, models, lift=self.lifted, remove=off, copy=self.copied, undo=undo)
        except BaseException:
            self._uninstall()
            raise

    def _hooks(self) -> Iterator[tuple[nn.Module, ForwardHook]]:
        """Each hook with its module, in the order in which they run on a module that has several."""
        shared = self.shared
        # Where sampling is and what texts say: all others need it, also the gate of the denoiser as a whole.
        yield self.denoiser, StepHook(shared, self.is_off)
        for name, model in readers_of(self.pipe).items():
            yield model, TextHook(name, shared.tokens, shared.inputs.record.pipelines.text_layers, shared.on_text)
        # Layers need the ranks of those who act.
        for component in self.components:
            yield component.model, component.ranks
        # Attention that is read or masked must not be compiled in this call.
        attention = joint_attention if shared.inputs.record.blocks.is_joint else cross_attention
        yield from attention.hooks(self.denoiser, shared)
        # What gates read: first what enters the denoiser, then what enters each block and each place in it.
        for component in self.components:
            yield from component.hooks()

    def _uninstall(self) -> None:
        with loaded(self.pipe):
            self._undo.close()

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Take it off while the block runs, see `Mixture.lifted`."""
        models = [component.model for component in self.components]
        with self.lock:
            if self.is_lifted:
                yield
                return
            self.check_on()
            off = [model for model in models if switched_off(model)]  # by `disable_lora`, and they stay off
            before: dict[nn.Module, bool] | None = None  # whether each is switched off where the block begins
            after: Sequence[nn.Module] | None = None  # those to switch off again
            is_begun = False

            def put_back() -> None:
                nonlocal after
                if not self.is_lifted:  # `remove` was called, or this is done
                    return
                if installed(self.pipe) not in (None, self):
                    self._locking = Undo()  # calls now belong to the other mixture
                elif is_begun:
                    if after is None:  # else this is a second attempt, and the first has switched models
                        after = off if before is None else off_after(models, off, before)
                    self._put_back(after)
                elif off:
                    switch(off, on=False)
                del _lifted[self.denoiser]

            try:
                with undoing() as undo:
                    undo.callback(put_back)
                    _lifted[self.denoiser] = self
                    switch(off, on=True)
                    is_begun = True
                    self._uninstall()
                    switch(off, on=False)
                    before = switches(models)
                    yield
            finally:
                if self.is_lifted:  # it could not be put back
                    del _lifted[self.denoiser]

    def _put_back(self, off: Sequence[nn.Module]) -> None:
        """Install again, with the adapters of the models in `off` switched off."""
        try:
            if not calls_are_locked(self.pipe):  # another mixture came and went
                self._locking = Undo()
                self._lock_calls()
            switch(off, on=True)
            self._install()
            switch(off, on=False)
        except BaseException:
            self.take_off()
            raise

    def copied(self, memo: dict[int, Any]) -> Any:
        """A copy of the pipeline with its own mixture, for `copy.deepcopy`."""
        off = [component.name for component in self.components if switched_off(component.model)]
        with self.lifted():
            twin = deepcopy(self.pipe, memo)
            installation = self.mixture._copied_to(twin)
        models = [getattr(twin, name) for name in off]
        switch(models, on=True)
        installation.replace(None)
        switch(models, on=False)
        return twin


def installed(pipe: Any) -> Installation | None:
    """What is on a pipeline, or None."""
    found = {name: on for name, model in models_of(pipe).items() if (on := vars(model).get(HANDLE)) is not None}
    by_denoiser = next((found[name] for name in DENOISERS if name in found), None)
    # If the denoiser was replaced by another one, the text encoders still have it.
    return by_denoiser or next((on for on in found.values() if on.pipe is pipe), None)


def remove(pipe: Any) -> None:
    """Restore the original pipeline, bit for bit. Does nothing if nothing is on it."""
    with held(pipe) as on:
        if on is not None:
            on.take_off()
        else:
            for model in denoisers(pipe):
                if (lifted := _lifted.pop(model, None)) is not None:  # so that `lifted` does not put it back
                    lifted._locking.close()
            unlock_calls(pipe)  # in case an earlier removal was interrupted before this


@contextmanager
def held(pipe: Any) -> Iterator[Installation | None]:
    """What is on a pipeline, while all other threads wait. What replaces it takes over its lock."""
    with lock_of_pipeline(pipe):
        yield installed(pipe)


def lock_of_pipeline(pipe: Any) -> threading.RLock:
    """The lock of a pipeline's denoiser, or of what its text encoders still hold."""
    found = installed(pipe)
    return lock_of(denoiser(pipe)) if found is None else found.lock


def lock_of(denoiser: Any) -> threading.RLock:
    """The lock of a denoiser, always the same one."""
    return _locks.setdefault(denoiser, threading.RLock())
