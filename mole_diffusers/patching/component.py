"""One host model of a mixture: its gates, their places, and the hooks that ask them. Hosts are changed here and in
peft_injection.py, nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn

from mole_diffusers import functional
from mole_diffusers.functional import version
from mole_diffusers.gates import Column, GateBank, GateConfig, PromptGate, build_gate
from mole_diffusers.gates.rank import singular
from mole_diffusers.lora.stacking import Stack
from mole_diffusers.patching import peft_injection
from mole_diffusers.patching.denoiser_inputs import DENOISERS, CallReader
from mole_diffusers.patching.placement import NETWORK, TIME_WIDTH, Place, blocks, owner, place, probed, text_width
from mole_diffusers.patching.processor import MoLEAttnProcessor, Slot
from mole_diffusers.patching.runtime import Present, State

BANK = "mole_gates"  # submodule of a host that holds its gates, so that they move and offload with it


class GatedPart:
    """A UNet or text encoder with the experts' stacks for it and a gate per place.

    Building checks everything and changes nothing; `install` changes the host.
    """

    def __init__(self, name: str, model: Any, stacks: Mapping[str, Stack], *, config: GateConfig, state: State):
        self.name, self.model, self.stacks, self.config, self.state = name, model, dict(stacks), config, state
        if self.ranked and config.refactor:
            self.stacks = {layer: singular(stack) for layer, stack in stacks.items()}
        names = list(blocks(model))
        self.owners = {layer: owner(layer, config.layout, names) for layer in stacks}  # layer -> name of its place
        self.places = {spot: place(spot, config.layout, model) for spot in dict.fromkeys(self.owners.values())}
        self.columns: dict[str, list[str]] = {}  # block -> its layers, where one gate weighs them all
        if config.layout == "module":
            for layer in stacks:
                self.columns.setdefault(owner(layer, "whole", names), []).append(layer)
        self.bank = GateBank(self._gates())
        self.slots = {name: self._slot(spot) for name, spot in self.places.items()}

    def install(self, undo: ExitStack) -> None:
        """Put experts, gates and hooks on the host; the undoing of each change is recorded in `undo` before it."""
        undo.callback(self.model._modules.pop, BANK, None)
        self.model.add_module(BANK, self.bank.to(next(self.model.parameters()).device))
        slots = self.slots
        peft_injection.inject(self.model, self.stacks, {layer: slots[name] for layer, name in self.owners.items()}, undo)
        if self.config.family == "prompt" and self.name in DENOISERS:
            refresh = _text(list(slots.values()), CallReader(self.model))
            undo.callback(self.model.register_forward_pre_hook(refresh, with_kwargs=True).remove)
            return
        for name, spot in self.places.items():
            self._hook(spot, slots[name], undo)

    @property
    def fusible(self) -> bool:
        """Whether no gate depends on what changes while sampling."""
        return all(slot.gate.fusible for slot in self.slots.values())

    @property
    def blind(self) -> bool:
        """Whether no gate depends on anything."""
        return all(slot.gate.blind for slot in self.slots.values())

    def speak(self) -> None:
        """Have gates that were handed something speak now, not when a layer asks."""
        for slot in self.slots.values():
            slot.speak()

    def ask_still_gates(self) -> None:
        """Have gates that read nothing speak to the listeners, outside of any sampling.

        Raises ValueError where a gate depends on what passes it.
        """
        for name, spot in self.places.items():
            gate = self.slots[name].gate
            if self.state.fixed is None and not gate.blind:
                reads = "prompt" if gate.fusible else "picture"
                raise ValueError(
                    f"the gate of {self._full_name(name)} depends on the {reads}; give a prompt to average over"
                )
            self._slot(spot).refresh(torch.zeros(1, 1, spot.width))

    def place_of(self, layer: str) -> tuple[str, Present]:
        """The place whose weights a layer takes, and the experts that it has."""
        return self._full_name(self.owners[layer]), self.stacks[layer].present

    def layers_by_gate(self) -> list[tuple[Any, list[str]]]:
        """Each gate and the layers that take its weights; none for "prompt", whose gates weigh several places at once."""
        if self.config.family == "prompt":
            return []
        return [(self.bank[name], [layer for layer in self.stacks if self.owners[layer] == name]) for name in self.places]

    def _full_name(self, place: str) -> str:
        return f"{self.name}.{place}" if place else self.name

    @property
    def ranked(self) -> bool:
        """Whether the gates weigh ranks instead of experts."""
        return self.config.family == "rank"

    @property
    def _reads_experts(self) -> bool:
        return self.config.family == "mole" and self.config.inputs == "experts"

    def _gates(self) -> dict[str, nn.Module]:
        if self.config.family != "prompt":
            return {name: self._gate(spot) for name, spot in self.places.items()}
        rows = {block: [self.stacks[layer].present for layer in layers] for block, layers in self.columns.items()}
        everyone = tuple(True for _ in self.state.active)
        return {name: self._prompt_gate(name, rows.get(name, [everyone])) for name in rows or self.places}

    def _prompt_gate(self, name: str, presents: Sequence[Sequence[bool]]) -> nn.Module:
        width = text_width(self.model) if self.name in DENOISERS else place(name, "whole", self.model).width
        config = self.config
        return PromptGate(width, presents, axis=config.axis, top=config.top, total=config.total)

    def _gate(self, spot: Place) -> nn.Module:
        experts = len(self.state.active)
        if spot.name == NETWORK:  # it reads text and time, one token's worth
            return build_gate(GateConfig.from_dict(self.config.to_dict() | {"features": "pooled"}), experts, spot.width)
        width = spot.width
        if self._reads_experts:
            width = experts * sum(self.stacks[name].out for name in probed(spot, self.stacks))
        if self.config.features == "flattened":
            if not spot.tokens:
                raise ValueError("flattened features need a fixed number of tokens: use granularity 'block' or 'layer'")
            width *= spot.tokens
        return build_gate(self.config, experts, width, stack=self.stacks.get(spot.name))

    def _slot(self, spot: Place) -> Slot:
        shared = spot.name == NETWORK or spot.resets is not None or self.config.family == "prompt"
        whole, timed = spot.name == NETWORK, self.name in DENOISERS
        block = next((b for b, layers in self.columns.items() if spot.name in layers), None)
        gate = self.bank[spot.name] if block is None else Column(self.bank[block], self.columns[block].index(spot.name))
        slot = Slot(self._full_name(spot.name), gate, self.state, shared=shared, timed=timed, whole=whole)
        found = {self.stacks[layer].present for layer, owner_ in self.owners.items() if owner_ == spot.name}
        slot.presents = sorted(found, key=lambda present: (sum(present), present), reverse=True)
        slot.far = whole or (timed and self.config.family == "prompt")
        slot.probe = self._probe(spot)
        if block is not None:
            presents = [self.stacks[layer].present for layer in self.columns[block]]
            slot.scope = tuple(any(column) for column in zip(*presents, strict=True))
        return slot

    def _probe(self, spot: Place) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """The paper's gate input: hidden state [B, T, C] -> each expert's outputs [B, T, N * sum Cout]."""
        if not self._reads_experts or spot.name == NETWORK:
            return None
        names, pool = probed(spot, self.stacks), self.config.features == "pooled"

        def outputs(hidden: torch.Tensor) -> torch.Tensor:
            hidden = hidden.mean(1, keepdim=True) if pool else hidden  # the mean commutes with linear layers
            parts = []
            for name in names:
                down, up = peft_injection.stacked(self.model, name)
                parts.append(functional.expert_outputs(hidden, down.float(), up.float(), self.stacks[name].ranks))
            return torch.cat(parts, -1)

        return outputs

    def _hook(self, spot: Place, slot: Slot, undo: ExitStack) -> None:
        """Have the slot refreshed whenever sampling enters its place."""
        if spot.name == NETWORK or (slot.shared and spot.resets is None):
            self._hook_network(slot, undo)
            return
        if spot.resets is not None:
            whole = self.model.get_submodule(spot.resets)
            undo.callback(whole.register_forward_pre_hook(lambda *_: slot.clear()).remove)
        if spot.entry is not None:
            entry = self.model.get_submodule(spot.entry)
            if isinstance(entry, Attention):
                _replace_processor(entry, slot, undo)
            else:
                undo.callback(entry.register_forward_pre_hook(_refresher(slot), with_kwargs=True).remove)

    def _hook_network(self, slot: Slot, undo: ExitStack) -> None:
        """The denoiser's own gate reads text and time; a text encoder's reads what enters its first layer."""
        if self.name in DENOISERS:
            refresh = _text_and_time(slot, CallReader(self.model))
            hook = self.model.register_forward_pre_hook(refresh, with_kwargs=True)
        else:
            first = self.model.get_submodule(next(iter(blocks(self.model))))
            hook = first.register_forward_pre_hook(_refresher(slot), with_kwargs=True)
        undo.callback(hook.remove)


def _text_and_time(slot: Slot, call: CallReader) -> Callable[[nn.Module, tuple, dict], None]:
    def refresh(_: nn.Module, args: tuple, kwargs: dict) -> None:
        time = call.time(args, kwargs)  # [B]
        text = functional.rows(call.text(args, kwargs), len(time))  # [B, T, C]; a film has its text once a frame
        time = get_timestep_embedding(1000 * time, TIME_WIDTH)  # [B, TIME_WIDTH]
        slot.hand(torch.cat([text.float().mean(1), time], -1)[:, None])  # [B, 1, C + TIME_WIDTH]

    return refresh


def _text(slots: Sequence[Slot], call: CallReader) -> Callable[[nn.Module, tuple, dict], None]:
    """All gates of a denoiser read its text; the same text in the same form, call after call, so that they see it is."""
    last: list[Any] = [None, -1, None, None]  # the text, its version, in fp32, its words

    def refresh(_: nn.Module, args: tuple, kwargs: dict) -> None:
        text = call.text(args, kwargs)
        if last[0] is not text or last[1] != version(text) or text.is_inference():  # whose changes are not to be seen
            last[:] = text, version(text), text.to(torch.float32, copy=text.is_inference()), slots[0].state.words.of(text)
        for slot in slots:
            slot.hand(last[2], tokens=last[3])

    return refresh


def _refresher(slot: Slot) -> Callable[[nn.Module, tuple, dict], None]:
    def refresh(_: nn.Module, args: tuple, kwargs: dict) -> None:
        tokens = None if slot.timed else slot.state.words.current
        slot.refresh(args[0] if args else kwargs["hidden_states"], tokens=tokens)

    return refresh


def _replace_processor(attention: Attention, slot: Slot, undo: ExitStack) -> None:
    found = attention.processor

    def put_back() -> None:
        # What another tool has put in place of ours stays; a blank copy that it made of ours goes.
        if isinstance(attention.processor, MoLEAttnProcessor):
            attention.set_processor(found if attention.processor.slot is slot else attention.processor.host)

    undo.callback(put_back)
    attention.set_processor(MoLEAttnProcessor(found, slot))
