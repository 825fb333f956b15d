"""What a mixture is made of, and what only the modules of this package ask it; users have `mixture.Mixture`."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, partial
from typing import Any, NamedTuple

from mole_diffusers.binding.config import Bound, bindings, files_bindings
from mole_diffusers.gates import GateBank, GateConfig
from mole_diffusers.lora import Expert
from mole_diffusers.lora.stacking import match, stack_all
from mole_diffusers.lora.strengths import finite
from mole_diffusers.patching.gating.decision import Decision
from mole_diffusers.patching.gating.prompt_tokens import PromptTokens
from mole_diffusers.patching.gating.settings import Change, Settings, StrengthPlan
from mole_diffusers.patching.gating.shared_state import SharedState
from mole_diffusers.patching.gating.token_masks import TokenMasks
from mole_diffusers.patching.host.denoiser_inputs import (
    DENOISERS,
    DenoiserInputs,
    denoiser,
    hosts,
    lora_scale,
    tokenizers_of,
)
from mole_diffusers.patching.install.component import Component
from mole_diffusers.patching.install.installation import Installable, Installation, lock_of
from mole_diffusers.patching.install.one_call import OneCall
from mole_diffusers.patching.subjects.per_subject import begin_of_tiles
from mole_diffusers.patching.subjects.prompt_subjects import PictureCall, Tiling


class PersistentSettings(NamedTuple):
    """What a mixture is set to outside of all `with` blocks."""

    experts: dict[str, tuple[Expert, float]]  # name -> (expert, strength), as `attach` takes them
    active: set[str]  # the experts that are switched on
    plan: StrengthPlan | None  # that `choose` has set, if any
    binding: dict[str, Bound] | None  # each expert's words and region; None if nothing is bound


class Parts:
    """The parts of a mixture. All of this may change with any version.

    Attributes:
        pipe: what the mixture is attached to.
        experts: name -> Expert, in the order of the gates' columns.
        file_words: name -> the words that its file gives it beside the others, see `lora.own_words`.
        unmatched: name -> layer keys of the file that the pipeline does not have.
        shared: what all gates and layers share.
        components: the models with experts.
        installation: puts all on the pipeline, and takes it off.
    """

    def __init__(
        self,
        mixture: Installable,
        pipe: Any,
        experts: Mapping[str, tuple[Expert, float]],
        config: GateConfig,
        binding: Mapping[str, Any] | str | None,
    ):
        models, files = hosts(pipe), {name: expert for name, (expert, _) in experts.items()}
        matches = [match(expert, models) for expert in files.values()]
        self.pipe, self.experts, self.file_words = pipe, files, files_bindings(files)
        self.unmatched = {name: tuple(m.unmatched) for name, m in zip(files, matches, strict=True)}
        strengths = [strength for _, strength in experts.values()]
        self.shared = SharedState.of(strengths, DenoiserInputs(denoiser(pipe)), PromptTokens(tokenizers_of(pipe)))
        self.lock = lock_of(denoiser(pipe))
        self.components = [
            Component(name, models[name], stacks, gate_type=config.options, shared=self.shared, lock=self.lock)
            for name, stacks in stack_all(matches, models).items()
        ]
        self.installation = Installation(mixture, pipe, files, self.components, self.shared)
        self.shared.set(self.settings.binding, self.masks(binding))

    @property
    def settings(self) -> Settings:
        """What the user set."""
        return self.shared.settings

    # ---- gates

    @cached_property
    def banks(self) -> dict[str, GateBank]:
        """Component -> the gates of that model. A bank that is added is trained and saved like these."""
        return {each.name: each.bank for each in self.components}

    @property
    def locations(self) -> list[str]:
        """The names of the gates' locations, such as "unet.mid_block.attentions.0.transformer_blocks.0"."""
        return [location.name for each in self.components for location in each.locations]

    def layers_by_gate(self) -> list[tuple[Any, list[str]]]:
        """Each gate with the layers that it weighs, such as "unet.down_blocks.0.attentions.0.proj_in"."""
        return [(g, [f"{p.name}.{layer}" for layer in layers]) for p in self.components for g, layers in p.layers_by_gate()]

    @contextmanager
    def listen(self, listener: Callable[[Decision], None]) -> Iterator[None]:
        """Call `listener(decision)` with each gate's live weights, whenever it computes them."""
        heard = self.shared.listeners.decisions
        with self.lock, self.with_settings(heard.to((*heard.now, listener))):
            yield

    def restore_point(self) -> AbstractContextManager[None]:
        """A block in which the experts act as they do now, in this call of the denoiser. It can be entered once, later.

        It is for gradient checkpointing, which runs single blocks of the model again: after other calls, and after the
        `with` blocks that set the binding and the active experts have ended.
        """
        settings, masks = self.settings, self.settings.binding.now
        locations = [location for each in self.components for location in each.model_locations]
        points = [self.shared.step.restore_point(), *(location.restore_point() for location in locations)]
        if masks is not None:
            points.append(masks.restore_point())
        return self.shared.restored(points, settings.binding.to(masks), settings.active.to(list(settings.active.now)))

    # ---- settings

    def index(self, name: str) -> int:
        """The column of an expert. Raises ValueError for an unknown name."""
        if name not in self.experts:
            raise ValueError(f"unknown expert {name!r}; attached: {list(self.experts)}")
        return list(self.experts).index(name)

    @property
    def active(self) -> set[str]:
        """The experts that are switched on, whatever their strength."""
        return {name for name, on in zip(self.experts, self.settings.active.now, strict=True) if on}

    @property
    def acting(self) -> set[str]:
        """The experts that are switched on, and not at strength 0."""
        return {name for name, acts in zip(self.experts, self.settings.acting, strict=True) if acts}

    def choose(self, strengths: Mapping[str, float], plan: StrengthPlan | None = None) -> None:
        """Switch on exactly these experts, at these strengths. `plan` adds factors on top, by component and block.

        Inside a block of `strengths`, `only` or `planned`, what that block sets is restored when it ends: all strengths,
        who is on, or the plan.
        """
        for name, value in strengths.items():
            self.index(name)
            finite(name, value)
        with self.lock:
            self.check_can_change()
            now = [strengths.get(name, old) for name, old in zip(self.experts, self.settings.strengths.now, strict=True)]
            self.set(now, strengths, plan)

    def set(self, strengths: list[float], active: Container[str], plan: StrengthPlan | None) -> None:
        """As `choose`, on a pipeline or not, with the strengths of all experts."""
        self.shared.set(self.settings.strengths, strengths)
        self.shared.set(self.settings.active, [name in active for name in self.experts])
        self.shared.set(self.settings.plan, plan)

    def planned(self, plan: StrengthPlan) -> AbstractContextManager[None]:
        """Set strengths by component, block and step, or gates by hand, inside the block, see
        `patching.gating.settings.StrengthPlan`.
        """
        return self.with_settings(self.settings.plan.to(plan))

    @contextmanager
    def with_settings(self, *changes: Change[Any]) -> Iterator[None]:
        """`changed_while`, for a user. Raises ValueError for a mixture that is not attached: it would change nothing."""
        with self.changed_while(*changes):
            self.check_can_change()
            yield

    def check_can_change(self) -> None:
        """Raise ValueError where a change of a setting would have no effect."""
        if self.settings.folded.now:
            raise ValueError("inside `collapsed` the experts are folded into the weights, and cannot be changed")
        self.installation.check_in_use()

    @contextmanager
    def changed_while(self, *changes: Change[Any]) -> Iterator[None]:
        """Keep other threads out and change settings while the block runs."""
        with self.lock, self.shared.changed_while(*changes):
            yield

    def weighed(self) -> dict[str, tuple[Expert, float]]:
        """name -> (expert, strength), as `attach` takes them."""
        with self.lock:
            return self._with_strengths(self.settings.strengths.now)

    def _with_strengths(self, strengths: list[float]) -> dict[str, tuple[Expert, float]]:
        return {name: (expert, s) for (name, expert), s in zip(self.experts.items(), strengths, strict=True)}

    def persistent_settings(self) -> PersistentSettings:
        """The settings outside of all `with` blocks, those of other threads included: what is copied and saved."""
        with self.lock:
            settings, binding = self.settings, self.settings.binding.outside
            return PersistentSettings(
                self._with_strengths(settings.strengths.outside),
                {name for name, on in zip(self.experts, settings.active.outside, strict=True) if on},
                settings.plan.outside,
                None if binding is None else binding.bound,
            )

    # ---- binding and calls

    @property
    def binding(self) -> dict[str, Bound] | None:
        """Each expert's words and region; None if nothing is bound."""
        masks = self.settings.binding.now
        return None if masks is None else dict(masks.bound)

    def masks(self, binding: Mapping[str, Any] | str | None) -> TokenMasks | None:
        """The masks of a binding, as `Mixture.bind` takes it."""
        if binding is None:
            return None
        bound = bindings(binding, self.file_words, self.binding or self.file_words)
        given, record = [name for name, each in bound.items() if each.given is not None], self.shared.inputs.record
        if given and record.latent_size is None:
            named = " and ".join(map(repr, given))
            raise ValueError(f"a {type(denoiser(self.pipe)).__name__} has no regions, and one was given for {named}")
        if lost := [
            name for name in given if not bound[name].words and self.experts[name].layers.keys().isdisjoint(DENOISERS)
        ]:
            raise ValueError(
                f"the region of {lost[0]!r} cannot act: its LoRA has layers of text encoders alone, so give it words, too"
            )
        return TokenMasks(bound, self.shared.tokens, record.blocks)

    def draws_in_tiles(self, call: Mapping[str, Any]) -> bool:
        """Whether it draws the pictures of a call in tiles by itself, as `Mixture.tiled` says. The call includes their
        size.
        """
        bound = self.binding
        return bound is not None and begin_of_tiles(PictureCall(self.pipe, Tiling(), call, bound, self.acting)) is not None

    def running(self, call: Mapping[str, Any] | None, pipe: Any) -> AbstractContextManager[None]:
        """A call of the pipeline that the mixture is on, while it has the lock."""
        self.installation.begin_call()
        is_off, masks = self.installation.is_off(lora_scale(call or {})), partial(self.masks, self.file_words)
        return OneCall(self.shared, list(self.experts), pipe, call).running(is_off=is_off, masks_of_files=masks)
