"""One model of a pipeline under a mixture: its experts, its gates and the hooks that evaluate them.

The LoRAs themselves are put on by peft, see peft_injection.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from mole_diffusers import functional
from mole_diffusers.gates import Family, Gate, GateBank, GatePlace, Layer
from mole_diffusers.lora.stacking import Stack
from mole_diffusers.patching.gating import cross_attention, joint_attention
from mole_diffusers.patching.gating.decision import Present
from mole_diffusers.patching.gating.gate_site import BlockSite, GateSite, LayerSite, ModelSite, OutputSite
from mole_diffusers.patching.gating.prompt_tokens import TextHook
from mole_diffusers.patching.gating.sampling import Sampling, StepHook
from mole_diffusers.patching.hooks import ForwardHook, Uncompiled
from mole_diffusers.patching.host.denoiser_inputs import DENOISERS
from mole_diffusers.patching.host.denoisers import TEXT_LAYERS, record
from mole_diffusers.patching.host.placement import (
    ENCODER_ENTRIES,
    NETWORK,
    Place,
    blocks,
    describe_place,
    place_name,
    probed,
    stream_of,
)
from mole_diffusers.patching.install import peft_injection
from mole_diffusers.patching.install.gate_inputs import BlockBegins, GateInput, ModelInput, MoLEAttnProcessor, OutputMixing
from mole_diffusers.patching.undo import Undo

BANK = "mole_gates"  # submodule of a model with its gates, so that they move and offload with it


@dataclass(frozen=True)
class PlacedSite:
    """A site, where it is, and the layers that take its weights."""

    site: GateSite
    at: Place
    layers: Sequence[str]


class Component:
    """A denoiser or text encoder with the experts' stacks for it, and a gate at each place.

    Building checks everything and changes nothing; `install` changes the model.
    """

    def __init__(self, name: str, model: Any, stacks: Mapping[str, Stack], *, family: Family, sampling: Sampling):
        self.name, self.model, self.family, self.sampling = name, model, family, sampling
        if family.mixes_outputs and self._joint:
            raise ValueError(
                f"gates that weigh outputs of blocks need blocks with one output, and those of a {type(model).__name__} "
                "have one for the text and one for the picture"
            )
        self.stacks = {layer: family.prepared(stack) for layer, stack in stacks.items()}
        entries = blocks(model, record(model).blocks.entries if self.denoises else ENCODER_ENTRIES)
        per = family.one_gate_per
        if per == "stream" and self._joint:  # text and picture come together inside of blocks
            per = "matrix"
        self._gated = _by_place(stacks, per, entries)  # name of a gate -> its layers
        per = "matrix" if family.weighs_layers_apart else per  # then a gate has a site at each of its layers
        by_site = _by_place(stacks, per, entries)
        places = {
            name: describe_place(name, per, model, entries, denoises=self.denoises, reads_prompt=family.reads_prompt)
            for name in by_site
        }
        at = {layer: places[name] for name, layers in by_site.items() for layer in layers}
        self.bank = GateBank({name: self._gate(name, layers, at[layers[0]]) for name, layers in self._gated.items()})
        self.placed = [PlacedSite(self._site(at, by_site[at.name]), at, by_site[at.name]) for at in places.values()]
        self.site_of = {layer: each.site for each in self.placed for layer in each.layers}

    def install(self, undo: Undo) -> None:
        """Put experts, gates and attention processors on the model, each recorded in `undo` first; its hooks are `hooks`.

        A gate at a block reads what enters its attention. Where diffusers lets the processor of an attention be replaced,
        ours does that inside the attention, so that a processor that replaces ours is seen (`BlockSite`). Everything else
        has no processor, or one that must stay (`_joint`), and gets a hook.
        """
        undo.callback(self.model._modules.pop, BANK, None)
        self.model.add_module(BANK, self.bank.to(next(self.model.parameters()).device))
        layers = {layer: (self.site_of[layer], stream_of(self.name, self.model, layer)) for layer in self.stacks}
        peft_injection.inject(self.model, self.stacks, layers, undo)
        for each in self.placed:
            entry, mixes = self._entry(each.at), isinstance(each.site, OutputSite)
            if isinstance(entry, Attention) and not (self._joint or mixes):
                _replace_processor(entry, each.site, undo)

    def hooks(self) -> Iterator[tuple[nn.Module, ForwardHook]]:
        """The hooks that let sites know when sampling enters their places, and what enters."""
        if self.denoises and (sites := self.model_sites):
            yield self.model, ModelInput(sites, self.sampling, reads_prompt=self.family.reads_prompt)
        if mixing := {each.at.name: each.site for each in self.placed if isinstance(each.site, OutputSite)}:
            blocks = {name: self.model.get_submodule(name) for name in mixing}
            yield self.model, Uncompiled(self.sampling.entered, list(blocks.values()), lambda: True)
            for name, mixed in mixing.items():
                yield blocks[name], OutputMixing(mixed)
        for each in self.placed:
            site, at, entry = each.site, each.at, self._entry(each.at)
            if isinstance(site, OutputSite):
                continue
            if isinstance(site, BlockSite) and at.block is not None:
                yield self.model.get_submodule(at.block), BlockBegins(site)
            if entry is not None and (self._joint or not isinstance(entry, Attention)):  # there, the processor does the same
                yield entry, GateInput(site, None if site.timed else self.sampling.tokens)

    @property
    def _joint(self) -> bool:
        """Whether it attends to text and picture together. Such processors say which backend they use, so they stay."""
        return self.denoises and record(self.model).blocks.is_joint

    def _entry(self, at: Place) -> nn.Module | None:
        """The module whose input the gate of a place reads when it runs."""
        return None if at.entry in (None, NETWORK) else self.model.get_submodule(str(at.entry))

    @property
    def sites(self) -> list[GateSite]:
        return [each.site for each in self.placed]

    @property
    def denoises(self) -> bool:
        return self.name in DENOISERS

    @property
    def is_off(self) -> bool:
        """Whether `disable_lora` has switched its experts off, which it does for all layers at once."""
        return self.model.get_submodule(next(iter(self.stacks))).disable_adapters

    @property
    def step_invariant(self) -> bool:
        """Whether no gate depends on anything that changes while sampling."""
        return all(site.gate.step_invariant for site in self.sites)

    @property
    def input_free(self) -> bool:
        """Whether no gate depends on anything."""
        return all(site.gate.input_free for site in self.sites)

    def evaluate_deferred(self) -> None:
        """Evaluate the gates that wait until a layer asks."""
        for site in self.model_sites:
            site.evaluate_deferred()

    @property
    def model_sites(self) -> list[ModelSite]:
        return [site for site in self.sites if isinstance(site, ModelSite)]

    def evaluate_input_free(self) -> None:
        """Evaluate gates that read nothing, outside of any sampling, for the listeners.

        Raises ValueError if a gate depends on its input.
        """
        device = next(self.model.parameters()).device
        rows = self.sampling.effective.rows_of_prompts
        for each in self.placed:
            site, at, layer = each.site, each.at, None
            if self.sampling.settings.fixed.now is None and not site.gate.input_free:
                reads = "prompt" if site.gate.step_invariant else "picture"
                raise ValueError(f"the gate of {site.name} depends on the {reads}; give a prompt to average over")
            if site.gate.ranked:  # it sits at one layer, and only asks for the experts of the ranks
                stack = self.stacks[at.name]
                layer = Layer(torch.zeros(1, len(stack.segment), device=device), stack.up, stack.segment.to(device))
            self._site(at, each.layers).evaluate(torch.zeros(rows, 1, at.width, device=device), layer)

    def layers_by_gate(self) -> list[tuple[Any, list[str]]]:
        """Each gate with the layers that it weighs."""
        return [(self.bank[name], layers) for name, layers in self._gated.items()]

    # ---- building

    def _gate(self, name: str, layers: Sequence[str], at: Place) -> Gate:
        """The gate of a name for these layers, the first of which has its site at `at`."""
        experts = len(self.sampling.settings.active.now)
        width, presents = at.width, [(True,) * experts]
        if self.family.reads_experts and at.name != NETWORK:
            width = experts * sum(self.stacks[layer].out for layer in probed(at, self.stacks))
        if self.family.mixes_outputs and at.name != NETWORK:
            width = experts * width
        if self.family.weighs_layers_apart:
            presents = [self.stacks[layer].present for layer in layers]
        tokens = round(at.tokens * self.family.picture_area) if self.denoises else at.tokens
        place = GatePlace(experts, width, tokens, name == NETWORK, presents, self.stacks.get(name))
        return self.family.gate(place)

    def _site(self, at: Place, layers: Sequence[str]) -> GateSite:
        """The site of a place. What the gate reads there decides when it is evaluated, and so the kind of site."""
        presents = {self.stacks[layer].present for layer in layers}
        gate, scope = self._gate_at(at)
        common: dict[str, Any] = {
            "presents": sorted(presents, key=lambda present: (sum(present), present), reverse=True),
            "timed": self.denoises,
            "scope": scope,
            "probe": self._probe(at),
        }
        about = f"{self.name}.{at.name}" if at.name else self.name, gate, self.sampling
        if NETWORK in (at.name, at.entry):
            return ModelSite(*about, spans_blocks=at.name == NETWORK, **common)
        if self.family.mixes_outputs:
            return OutputSite(*about, **common | {"presents": [tuple(map(any, zip(*presents, strict=True)))]})
        if at.entry is None and at.block is None:
            return LayerSite(*about, **common)
        reads_text = self.denoises and self.family.one_gate_per == "stream" and at.name.endswith(TEXT_LAYERS)
        return BlockSite(*about, reads_text=reads_text, **common)

    def _gate_at(self, at: Place) -> tuple[Any, Present | None]:
        """The gate of a site, and the experts it shares among if it weighs each of its layers."""
        if not self.family.weighs_layers_apart:
            return self.bank[at.name], None
        name, layers = next((name, layers) for name, layers in self._gated.items() if at.name in layers)
        scope = tuple(map(any, zip(*(self.stacks[layer].present for layer in layers), strict=True)))
        return self.bank[name].for_layer(layers.index(at.name)), scope

    def _probe(self, at: Place) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """The paper's gate input: hidden state [B, T, C] -> each expert's outputs [B, T, N * sum Cout]."""
        if not self.family.reads_experts or at.name == NETWORK:
            return None
        names, pool = probed(at, self.stacks), not self.family.reads_tokens

        def outputs(hidden: torch.Tensor) -> torch.Tensor:
            hidden = hidden.mean(1, keepdim=True) if pool else hidden  # the mean commutes with linear layers
            parts = []
            for name in names:
                down, up = peft_injection.stacked(self.model, name)
                parts.append(functional.expert_outputs(hidden, down.float(), up.float(), self.stacks[name].ranks))
            return torch.cat(parts, -1)

        return outputs


def _by_place(layers: Iterable[str], per: str, entries: Iterable[str]) -> dict[str, list[str]]:
    """The name of each place that has a gate or a site -> its layers, see `place_name`."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        found.setdefault(place_name(layer, per, entries), []).append(layer)
    return found


def _replace_processor(attention: Attention, site: GateSite, undo: Undo) -> None:
    found = attention.processor

    def put_back() -> None:
        # A processor that another tool put in place of ours stays; a blank copy that it made of ours is removed.
        if isinstance(attention.processor, MoLEAttnProcessor):
            attention.set_processor(found if attention.processor.site is site else attention.processor.host)

    undo.callback(put_back)
    attention.set_processor(MoLEAttnProcessor(found, site))


def all_hooks(
    denoiser: Any,
    encoders: Mapping[str, nn.Module],
    parts: Sequence[Component],
    sampling: Sampling,
    is_off: Callable[[float], bool],
) -> Iterator[tuple[nn.Module, ForwardHook]]:
    """Each hook of a mixture with its module, in the order in which they run on a module that has several.

    `is_off` says whether no expert acts in a call of the denoiser, given the scale of LoRAs in it.
    """
    # Where sampling is and what texts say: all others need it, also the gate of the denoiser as a whole.
    yield denoiser, StepHook(sampling, is_off)
    for name, encoder in encoders.items():
        yield encoder, TextHook(name, sampling.tokens, sampling.inputs.record.text_layers, sampling.on_text)
    # Attention that is read or closed must not be compiled in this call.
    attention = joint_attention if sampling.inputs.record.blocks.is_joint else cross_attention
    yield from attention.hooks(denoiser, sampling)
    # What gates read: first what enters the denoiser, then what enters each block and each place in it.
    for part in parts:
        yield from part.hooks()
