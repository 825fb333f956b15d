"""State that all gates of a mixture share while sampling: settings, the current step, and listeners."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import nn

from mole_diffusers import functional
from mole_diffusers.functional import onto
from mole_diffusers.gates.transforms import Control
from mole_diffusers.patching.gating.prompt_tokens import PromptTokens
from mole_diffusers.patching.gating.token_masks import TokenMasks, Watcher
from mole_diffusers.patching.host.denoiser_inputs import DenoiserInputs, lora_scale
from mole_diffusers.patching.subjects.things import Tiling
from mole_diffusers.patching.undo import Undo, undoing

if TYPE_CHECKING:
    from mole_diffusers.patching.gating.gate_site import GateSite
    from mole_diffusers.patching.gating.trace import Trace

Present = tuple[bool, ...]  # which of the N experts a layer has


class Decision(NamedTuple):
    """The weights of one gate for the layers with one set of experts.

    Attributes:
        of: the gate's site.
        present: which experts these layers have. A site's first decision is for the largest set.
        output: [N], [B, N] or [B, T, N], the gate's output. For a gate per rank, R instead of N.
        applied: the same times the user's strengths. The layers are multiplied by this, and by masks of tokens. Layers
            outside of blocks, which share one gate, are also multiplied by a plan's strengths for where each is.
        mask: [N] or [B, N] bool: experts that are present, active and not at strength 0.
        segment: [R], the expert of each rank, if the gate weighs ranks.
    """

    of: GateSite
    present: Present
    output: torch.Tensor
    applied: torch.Tensor
    mask: torch.Tensor
    segment: torch.Tensor | None

    @property
    def place(self) -> str:
        """The gate's place, component first.

        Only listeners read it: a name would make torch.compile compile every block separately.
        """
        return self.of.name

    @property
    def gates(self) -> torch.Tensor:
        """The gate's output per expert, [N], [B, N] or [B, T, N]; for a gate per rank, the mean over each expert's ranks."""
        return self._by_expert(self.output)

    @property
    def weights(self) -> torch.Tensor:
        """The same times the user's strengths."""
        return self._by_expert(self.applied)

    def _by_expert(self, values: torch.Tensor) -> torch.Tensor:
        return values if self.segment is None else functional.by_expert(values, self.segment, len(self.present))


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


class Plan(Protocol):
    """A strength schedule: the user's strengths by component, block and step, on top of `Mixture.strength`.

    Each method gives one factor per expert, [N]; 0 means absent there, and the gate shares among the others.
    """

    def part(self, part: str) -> Sequence[float]:
        """For a whole component, "unet" or "text_encoder", at this step."""
        ...

    def block(self, module: str) -> Sequence[float]:
        """For the block that contains `module` (a site or a layer, component first)."""
        ...

    def gates(self, place: str) -> Sequence[float] | None:
        """Weights that replace those of the gate at `place`; None keeps the gate's weights."""
        ...


class PlainSum:
    """A plan in which every gate gives 1, so that only the user's strengths count."""

    def __init__(self, experts: int):
        self.ones = [1.0] * experts

    def part(self, part: str) -> Sequence[float]:
        return self.ones

    def block(self, module: str) -> Sequence[float]:
        return self.ones

    def gates(self, place: str) -> Sequence[float] | None:
        return self.ones


class Running(threading.local):
    """What each thread has entered around modules that run, see `Runtime.around_forward`."""

    def __init__(self) -> None:
        self.stacks: list[ExitStack] = []


@dataclass
class Runtime:
    """Which experts are active, how strong they are, and how far sampling is. `set` and `changed_while` change settings.

    The gates read `active` and `strength` as tensors. As numbers, they would become part of compiled code, and every
    change of a slider would compile again.
    """

    inputs: DenoiserInputs
    active: list[bool]
    strength: list[float]
    time: torch.Tensor = field(default_factory=lambda: torch.zeros(1))  # [B], 1 is pure noise
    fixed: list[float] | None = None  # weights that replace every gate's, by hand or for a teacher
    rows: torch.Tensor | None = None  # [b, N], a factor per prompt and expert: sets that differ within a batch
    images: int = 1  # pictures per prompt in the denoiser's batch, if `rows` is set
    control: Control | None = None  # transforms every gate's output
    every: int = 1  # the denoiser's gates are evaluated once in this many of its calls
    step: int = -1  # counts denoiser calls, except those for a part of a step; -1 before the first
    alone: tuple[str, ...] | None = None  # in calls for a part of a step: its experts. They are set alike in every step
    calls_of_text: int = 0  # counts denoiser calls with the same text
    texts: int = 0  # counts texts
    listeners: list[Callable[[Decision], None]] = field(default_factory=list)
    map_watchers: list[Watcher] = field(default_factory=list)
    traces: list[Trace] = field(default_factory=list)
    plan: Plan | None = None
    tokens: PromptTokens = field(default_factory=PromptTokens)
    tiling: Tiling = Tiling()
    collapsed: bool = False  # whether the experts are folded into the model's weights
    calling: Any = None  # the pipeline, while a call of it runs
    binding: TokenMasks | None = None
    masks: TokenMasks | None = None  # the binding if it applies: weights by hand hold on every token
    closes: bool = True  # whether words are closed outside their regions: while no expert acts, the model draws as itself
    off: bool = False  # whether no expert acts in this call of the denoiser: the pipeline has switched LoRAs off
    changes: int = 0
    _running: Running = field(default_factory=Running)
    _active: dict[tuple[Present, torch.device], ActiveExperts] = field(default_factory=dict)
    _text: Callable[[], torch.Tensor | None] = lambda: None
    _blocks: list[dict[str, Any]] = field(default_factory=lambda: [{}])  # settings outside of blocks, then of each block

    def set_strength(self, index: int, value: float) -> None:
        """Change one strength, in the block that strengths come from, if any."""
        self.strength[index] = value
        self.changed()

    def set(self, **values: Any) -> None:
        """Change settings."""
        for name, value in values.items():
            self._holder(name)[name] = value
        vars(self).update(values)
        self.changed()

    @contextmanager
    def changed_while(self, **values: Any) -> Iterator[None]:
        """Change settings while the block runs. In generators, blocks may end in any order."""
        for name in values:
            self._blocks[0].setdefault(name, getattr(self, name))
        block = dict(values)
        with undoing() as undo:  # a leftover setting would change all later pictures
            undo.callback(self._end, block)
            self._blocks.append(block)
            self._show(block)
            yield

    def _end(self, block: dict[str, Any]) -> None:
        self._blocks = [each for each in self._blocks if each is not block]
        self._show(block)

    def _show(self, names: Collection[str]) -> None:
        """Give settings the values that hold now."""
        vars(self).update({name: self._holder(name)[name] for name in names})
        if "alone" in names:
            self._update()
        else:
            self.changed()

    def _holder(self, name: str) -> dict[str, Any]:
        """The settings of the last running block that has this one, otherwise those outside of blocks."""
        return next((block for block in reversed(self._blocks) if name in block), self._blocks[0])

    def outside(self, name: str) -> Any:
        """A setting's value outside of all running blocks."""
        return self._blocks[0].get(name, getattr(self, name))

    def of_step(self, name: str) -> Any:
        """A setting's value in this step, whatever the part of it that is being drawn alone sets."""
        last = next((block for block in reversed(self._blocks) if name in block and "alone" not in block), self._blocks[0])
        return last.get(name, getattr(self, name))

    @property
    def rows_of_prompts(self) -> int:
        """How many rows of the batch may have experts of their own; 1 if all rows have the same."""
        if self.masks is not None and self.masks.row_silent is not None:
            return len(self.masks.row_silent)
        return 1 if self.rows is None else len(self.rows) * self.images

    @property
    def acting(self) -> list[bool]:
        """[N]: the experts that are on, and not at strength 0."""
        return [on and strength != 0 for on, strength in zip(self.active, self.strength, strict=True)]

    def changed(self) -> None:
        """Update what gates read. Nothing that they decided before holds any more."""
        self.changes += 1
        self._update()

    def _update(self) -> None:
        self.masks = self.binding if self.fixed is None else None
        self.closes = any(self.acting) and not self.off
        for present, device in self._active:
            self._active[present, device] = self.compute_active(present, self.strength, device)

    def around_forward(self, module: nn.Module, enter: Callable[[ExitStack], object], undo: Undo) -> None:
        """Call `enter(stack)` before each forward of `module` until `undo` closes; what it enters in `stack` ends with it.

        PyTorch calls no hook after a Ctrl-C. What is left then ends in `leave`.
        """

        def before(*_: object) -> None:
            self._running.stacks.append(ExitStack())
            enter(self._running.stacks[-1])

        undo.callback(self.leave)
        undo.before_forward(module, before)
        undo.after_forward(module, lambda *_: self._running.stacks.pop().close(), always_call=True)

    def leave(self) -> None:
        """Leave what an interrupted call of this thread has entered."""
        while self._running.stacks:
            self._running.stacks.pop().close()

    def watch(
        self,
        denoiser: nn.Module,
        models: Mapping[str, nn.Module],
        tokenizers: Mapping[str, Any],
        is_off: Callable[[float], bool],
        undo: Undo,
    ) -> None:
        """Hear of each call of the denoiser, and of each text that a text encoder reads, until `undo` closes.

        Args:
            models: with the text encoders, by their names in the pipeline.
            tokenizers: name of a text encoder -> its tokenizer, or None.
            is_off: whether no expert acts in a call of the denoiser, given the scale of LoRAs in it.
        """
        inputs = self.inputs

        def on_denoiser(_: nn.Module, args: tuple, kwargs: dict) -> None:
            text, self.time = inputs.text(args, kwargs), inputs.time(args, kwargs)
            if torch.compiler.is_compiling():  # a counter would compile the model again at every step
                self.step += bool(self.listeners)
                return
            if self.off != (off := is_off(lora_scale(dict(zip(inputs.names, args, strict=False)) | kwargs))):
                self.off = off
                self.changed()
            self.step, self.calls_of_text = self.step + (self.alone is None), self.calls_of_text + 1
            if self._text() is not text:
                self.calls_of_text, self.texts, self._text = 0, self.texts + 1, weakref.ref(text)
            if self.masks is not None:
                self.masks.on_denoiser(text, inputs.latents(args, kwargs), lambda: inputs.side(args, kwargs))

        def on_text(encoder: str, ids: torch.Tensor, device: torch.device) -> None:
            if self.masks is not None:
                self.masks.on_text(encoder, ids, device)

        undo.before_forward(denoiser, on_denoiser, with_kwargs=True)
        for name, tokenizer in tokenizers.items():
            self.tokens.watch(name, models[name], tokenizer, undo, on_text)

    def active_experts(self, present: Present, device: torch.device) -> ActiveExperts:
        """Which of the experts in `present` are active, with the user's strengths. Kept until a setting changes."""
        found = self._active.get((present, device))
        if found is None:
            found = self._active[present, device] = self.compute_active(present, self.strength, device)
        return found

    def compute_active(self, present: Present, strengths: Sequence[float], device: torch.device) -> ActiveExperts:
        """The same with any strengths [N]."""
        silent = self.masks.silent if self.masks is not None else (False,) * len(present)
        there = [
            p and a and s != 0 and not mute for p, a, s, mute in zip(present, self.active, strengths, silent, strict=True)
        ]
        with torch.inference_mode(False):  # they are kept, and are also used with gradients
            mask, factor = onto(torch.tensor(there), device), onto(torch.tensor(strengths), device)
        return ActiveExperts(mask, factor, all(there), all(s == 1 for s in strengths))
