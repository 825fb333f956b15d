"""One model of a pipeline under a mixture: its experts, its gates and the hooks that evaluate them.

The LoRAs themselves are put on by peft, see peft_injection.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from mole_diffusers import functional
from mole_diffusers.gates import Gate, GateBank, GatePlace, GateType, Layer
from mole_diffusers.lora.stacking import Stack
from mole_diffusers.patching.gating.decision import Present
from mole_diffusers.patching.gating.gate_location import (
    BlockLocation,
    GateLocation,
    LayerLocation,
    ModelLocation,
    OutputLocation,
)
from mole_diffusers.patching.gating.shared_state import SharedState
from mole_diffusers.patching.hooks import ForwardHook, Uncompiled
from mole_diffusers.patching.host.denoiser_inputs import DENOISERS
from mole_diffusers.patching.host.denoisers import record
from mole_diffusers.patching.host.placement import (
    ENCODER_ENTRIES,
    OUTSIDE_BLOCKS,
    LocationDescription,
    blocks,
    describe_location,
    first_reads_its_input,
    location_name,
    probed,
    token_type_of,
)
from mole_diffusers.patching.install import peft_injection
from mole_diffusers.patching.install.gate_inputs import AroundBlock, GateInput, ModelInput, MoLEAttnProcessor, OutputMixing
from mole_diffusers.patching.install.loaded_adapters import LoadedAdapters
from mole_diffusers.patching.undo import Undo

BANK = "mole_gates"  # submodule of a model with its gates, so that they move and offload with it


@dataclass(frozen=True)
class PlacedLocation:
    """A gate location, what its gate reads, and the layers that take its weights."""

    location: GateLocation
    about: LocationDescription
    layers: Sequence[str]
    by_processor: bool  # whether our attention processor passes on what the gate reads; else a hook does, if anything


class Component:
    """A denoiser or text encoder with the experts' stacks for it, and their gates.

    Building checks everything and changes nothing; `install` changes the model.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        stacks: Mapping[str, Stack],
        *,
        gate_type: GateType,
        shared: SharedState,
        lock: threading.RLock,
    ):
        self.name, self.model, self.gate_type, self.shared = name, model, gate_type, shared
        if gate_type.mixes_outputs and self._is_joint:
            raise ValueError(
                f"gates that weigh outputs of blocks need blocks with one output, and those of a {type(model).__name__} "
                "have one for the text and one for the picture"
            )
        self.stacks = {layer: gate_type.prepared(stack) for layer, stack in stacks.items()}
        entries = blocks(model, record(model).blocks.entries if self.denoises else ENCODER_ENTRIES)
        per = gate_type.one_gate_per
        if per == "token type" and self._is_joint:  # text and picture come together inside of blocks
            per = "matrix"
        self._layers_of_gate = _by_location(stacks, per, entries)
        if gate_type.weighs_layers_apart:  # then a gate has a gate location at each of its layers
            per = "matrix"
        layers_of_location = _by_location(stacks, per, entries)
        reading = {"denoises": self.denoises, "reads_prompt": gate_type.reads_prompt}
        locations = {name: describe_location(name, per, model, entries, **reading) for name in layers_of_location}
        of_layer = {layer: locations[name] for name, layers in layers_of_location.items() for layer in layers}
        gates = {name: self._gate(name, layers, of_layer[layers[0]]) for name, layers in self._layers_of_gate.items()}
        self.bank = GateBank(gates)
        self.placed = [
            PlacedLocation(
                self._location(locations[name], layers), locations[name], layers, self._by_processor(locations[name], layers)
            )
            for name, layers in layers_of_location.items()
        ]
        self.ranks = LoadedAdapters(model, self.stacks, shared, lock, denoises=self.denoises, whole=gate_type.reads_ranks)
        self.location_of = {layer: each.location for each in self.placed for layer in each.layers}

    def install(self, undo: Undo) -> None:
        """Put experts, gates and attention processors on the model, each recorded in `undo` first; its hooks are `hooks`.

        A gate at a block reads what enters its attention. Where diffusers lets the processor of an attention be replaced,
        ours does that inside the attention, so that a processor that replaces ours is seen (`BlockLocation`). Everything
        else gets a hook, see `_by_processor`.
        """
        undo.callback(self.model._modules.pop, BANK, None)
        self.model.add_module(BANK, self.bank.to(next(self.model.parameters()).device))
        layers = {layer: (self.location_of[layer], token_type_of(self.name, self.model, layer)) for layer in self.stacks}
        peft_injection.inject(self.model, self.stacks, self.ranks.install(), layers, undo)
        for each in self.placed:
            module = self._module(each.about)
            if each.by_processor and isinstance(module, Attention):
                _replace_processor(module, each.location, undo)

    def hooks(self) -> Iterator[tuple[nn.Module, ForwardHook]]:
        """The hooks that let gate locations know when sampling gets to them, and what their gates read."""
        if self.denoises and (locations := self.model_locations):
            yield self.model, ModelInput(locations, self.shared, reads_prompt=self.gate_type.reads_prompt)
        if mixing := {each.about.name: each.location for each in self.placed if isinstance(each.location, OutputLocation)}:
            blocks = {name: self.model.get_submodule(name) for name in mixing}
            yield self.model, Uncompiled(self.shared.entered, list(blocks.values()), lambda: True)
            for name, mixed in mixing.items():
                yield blocks[name], OutputMixing(mixed)
        for each in self.placed:
            location, module = each.location, self._module(each.about)
            if isinstance(location, OutputLocation):
                continue
            if isinstance(location, BlockLocation):
                yield self.model.get_submodule(str(each.about.block)), AroundBlock(location)
            if module is not None and not each.by_processor:
                yield module, GateInput(location, None if location.timed else self.shared.tokens)

    @property
    def _is_joint(self) -> bool:
        """Whether it attends to text and picture together. Such processors say which backend they use, so they stay."""
        return self.denoises and record(self.model).blocks.is_joint

    def _by_processor(self, location: LocationDescription, layers: Sequence[str]) -> bool:
        """Whether our attention processor gives the gate of a gate location and these layers its input.

        Not where there is no processor, or one that must stay (`_is_joint`). And not where the layers cannot stand in for a
        processor that replaces ours, since the first of them reads the text, or other channels than the gate.
        """
        if self._is_joint or self.gate_type.mixes_outputs or not isinstance(self._module(location), Attention):
            return False
        return first_reads_its_input(location, layers, self.model)

    def _module(self, location: LocationDescription) -> nn.Module | None:
        """The module whose input the gate of a gate location reads when it runs."""
        return None if location.module is None else self.model.get_submodule(location.module)

    @property
    def locations(self) -> list[GateLocation]:
        return [each.location for each in self.placed]

    @property
    def denoises(self) -> bool:
        return self.name in DENOISERS

    @property
    def is_off(self) -> bool:
        """Whether `disable_lora` has switched its experts off, which it does for all layers at once."""
        return self.ranks.is_off

    @property
    def step_invariant(self) -> bool:
        """Whether no gate depends on anything that changes while sampling."""
        return all(location.gate.step_invariant for location in self.locations)

    @property
    def input_free(self) -> bool:
        """Whether no gate depends on anything."""
        return all(location.gate.input_free for location in self.locations)

    def evaluate_deferred(self) -> None:
        """Evaluate the gates that wait until a layer asks."""
        for location in self.model_locations:
            location.evaluate_deferred()

    @property
    def model_locations(self) -> list[ModelLocation]:
        return [location for location in self.locations if isinstance(location, ModelLocation)]

    def evaluate_input_free(self) -> None:
        """Evaluate gates that read nothing, outside of any sampling, for the listeners.

        Raises ValueError if a gate depends on its input.
        """
        device = next(self.model.parameters()).device
        rows = self.shared.effective.rows_of_prompts
        for each in self.placed:
            location, about, layer = each.location, each.about, None
            if self.shared.settings.fixed.now is None and not location.gate.input_free:
                reads = "prompt" if location.gate.step_invariant else "picture"
                raise ValueError(f"the gate of {location.name} depends on the {reads}; give a prompt to average over")
            if location.gate.ranked:  # it sits at one layer, and only asks for the experts of the ranks
                stack = self.stacks[about.name]
                layer = Layer(
                    torch.zeros(1, len(stack.expert_index), device=device), stack.up, stack.expert_index.to(device)
                )
            self._location(about, each.layers).evaluate(torch.zeros(rows, 1, about.width, device=device), layer)

    def layers_by_gate(self) -> list[tuple[Any, list[str]]]:
        """Each gate with the layers that it weighs."""
        return [(self.bank[name], layers) for name, layers in self._layers_of_gate.items()]

    # ---- building

    def _gate(self, name: str, layers: Sequence[str], location: LocationDescription) -> Gate:
        """The gate of a name for these layers, the first of which has this location."""
        experts = len(self.shared.settings.active.now)
        width, layer_adapters, is_outside = location.width, [(True,) * experts], location.name == OUTSIDE_BLOCKS
        if self.gate_type.reads_experts and not is_outside:
            width = experts * sum(self.stacks[layer].out for layer in probed(location, self.stacks))
        if self.gate_type.mixes_outputs and not is_outside:
            width = experts * width
        if self.gate_type.weighs_layers_apart:
            layer_adapters = [self.stacks[layer].present for layer in layers]
        tokens = round(location.tokens * self.gate_type.picture_area) if self.denoises else location.tokens
        return self.gate_type.gate(
            GatePlace(experts, width, tokens, name == OUTSIDE_BLOCKS, layer_adapters, self.stacks.get(name))
        )

    def _location(self, about: LocationDescription, layers: Sequence[str]) -> GateLocation:
        """The gate location of a gate. What the gate reads there decides when it is evaluated, and so the kind of site."""
        layer_adapters = {self.stacks[layer].present for layer in layers}
        gate, index, scope = self._gate_at(about.name)
        common: dict[str, Any] = {
            "name": f"{self.name}.{about.name}" if about.name else self.name,
            "gate": gate,
            "shared": self.shared,
            "layer_adapters": sorted(layer_adapters, key=lambda present: (sum(present), present), reverse=True),
            "timed": self.denoises,
            "index": index,
            "scope": scope,
            "probe": self._probe(about),
        }
        if about.reads == "model":
            return ModelLocation(**common, spans_blocks=about.name == OUTSIDE_BLOCKS)
        if self.gate_type.mixes_outputs:
            return OutputLocation(**common | {"layer_adapters": [tuple(map(any, zip(*layer_adapters, strict=True)))]})
        if about.reads == "layer":
            return LayerLocation(**common)
        return BlockLocation(**common, reads_text=about.reads == "text")

    def _gate_at(self, location: str) -> tuple[Gate, int | None, Present | None]:
        """The gate of a gate location; if it weighs each of its layers, the layer's index and the experts it shares
        among.
        """
        if not self.gate_type.weighs_layers_apart:
            return self.bank[location], None, None
        name, layers = next((name, layers) for name, layers in self._layers_of_gate.items() if location in layers)
        scope = tuple(map(any, zip(*(self.stacks[layer].present for layer in layers), strict=True)))
        return self.bank[name], layers.index(location), scope

    def _probe(self, location: LocationDescription) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """The paper's gate input: hidden state [B, T, C] -> each expert's outputs [B, T, N * sum Cout]."""
        if not self.gate_type.reads_experts or location.name == OUTSIDE_BLOCKS:
            return None
        names, pool = probed(location, self.stacks), not self.gate_type.reads_tokens

        def outputs(hidden: torch.Tensor) -> torch.Tensor:
            hidden = hidden.mean(1, keepdim=True) if pool else hidden  # the mean commutes with linear layers
            parts = []
            for name in names:
                down, up = peft_injection.stacked(self.model, name)
                parts.append(functional.expert_outputs(hidden, down.float(), up.float(), self.stacks[name].ranks))
            return torch.cat(parts, -1)

        return outputs


def _by_location(layers: Iterable[str], per: str, entries: Iterable[str]) -> dict[str, list[str]]:
    """The name of each gate location -> its layers, see `location_name`."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        found.setdefault(location_name(layer, per, entries), []).append(layer)
    return found


def _replace_processor(attention: Attention, location: GateLocation, undo: Undo) -> None:
    found = attention.processor

    def put_back() -> None:
        # A processor that another tool put in place of ours stays; a blank copy that it made of ours is removed.
        if isinstance(attention.processor, MoLEAttnProcessor):
            attention.set_processor(found if attention.processor.location is location else attention.processor.host)

    undo.callback(put_back)
    attention.set_processor(MoLEAttnProcessor(found, location))
