"""One model of a pipeline under a mixture: its experts, its gates and the hooks that evaluate them.

The LoRAs themselves are put on by peft, see peft_injection.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn

from mole_diffusers import functional
from mole_diffusers.gates import GateBank, GateConfig, Layer, LayerOfPromptGate, PromptGate, build_gate
from mole_diffusers.gates.rank import singular
from mole_diffusers.lora.stacking import Stack
from mole_diffusers.patching.gating.gate_site import BlockSite, GateSite, LayerSite, ModelSite
from mole_diffusers.patching.gating.runtime import Present, Runtime
from mole_diffusers.patching.host.denoiser_inputs import DENOISERS
from mole_diffusers.patching.host.placement import (
    NETWORK,
    TEXT_LAYERS,
    TIME_WIDTH,
    Place,
    blocks,
    describe_place,
    place_name,
    probed,
)
from mole_diffusers.patching.install import peft_injection
from mole_diffusers.patching.install.processor import MoLEAttnProcessor
from mole_diffusers.patching.undo import Undo

BANK = "mole_gates"  # submodule of a model with its gates, so that they move and offload with it


class Component:
    """A denoiser or text encoder with the experts' stacks for it, and a gate at each place.

    Building checks everything and changes nothing; `install` changes the model.
    """

    def __init__(self, name: str, model: Any, stacks: Mapping[str, Stack], *, config: GateConfig, runtime: Runtime):
        self.name, self.model, self.stacks, self.config, self.runtime = name, model, dict(stacks), config, runtime
        self.denoises = name in DENOISERS
        if config.family == "rank" and config.refactor:
            self.stacks = {layer: singular(stack) for layer, stack in stacks.items()}
        entries, per = blocks(model), config.one_gate_per
        self.owners = {layer: place_name(layer, per, entries) for layer in stacks}  # layer -> name of its place
        describe = partial(describe_place, denoises=self.denoises, reads_prompt=config.reads_prompt)
        self.places = {name: describe(name, per, model, entries) for name in dict.fromkeys(self.owners.values())}
        self.layers_of_block: dict[str, list[str]] = {}  # block -> its layers, if one gate weighs each of them
        if config.reads_prompt and per == "matrix":
            for layer in stacks:
                self.layers_of_block.setdefault(place_name(layer, "block", entries), []).append(layer)
        self.bank = GateBank(self._gates())
        self.sites = {name: self._site(at) for name, at in self.places.items()}

    def install(self, undo: Undo) -> None:
        """Put experts, gates and hooks on the model. The undo step of each change is recorded in `undo` before the
        change.
        """
        undo.callback(self.model._modules.pop, BANK, None)
        self.model.add_module(BANK, self.bank.to(next(self.model.parameters()).device))
        peft_injection.inject(self.model, self.stacks, {layer: self.site_of(layer) for layer in self.stacks}, undo)
        if self.denoises and (sites := self._model_sites):
            self._hook_inputs(sites, undo)
        for name, at in self.places.items():
            self._hook(at, self.sites[name], undo)

    @property
    def is_off(self) -> bool:
        """Whether `disable_lora` has switched its experts off, which it does for all layers at once."""
        return self.model.get_submodule(next(iter(self.stacks))).disable_adapters

    @property
    def step_invariant(self) -> bool:
        """Whether no gate depends on anything that changes while sampling."""
        return all(site.gate.step_invariant for site in self.sites.values())

    @property
    def input_free(self) -> bool:
        """Whether no gate depends on anything."""
        return all(site.gate.input_free for site in self.sites.values())

    def evaluate_deferred(self) -> None:
        """Evaluate the gates that wait until a layer asks."""
        for site in self._model_sites:
            site.evaluate_deferred()

    @property
    def _model_sites(self) -> list[ModelSite]:
        return [site for site in self.sites.values() if isinstance(site, ModelSite)]

    def evaluate_input_free(self) -> None:
        """Evaluate gates that read nothing, outside of any sampling, for the listeners.

        Raises ValueError if a gate depends on its input.
        """
        device = next(self.model.parameters()).device
        for name, at in self.places.items():
            site = self.sites[name]
            if self.runtime.fixed is None and not site.gate.input_free:
                reads = "prompt" if site.gate.step_invariant else "picture"
                raise ValueError(f"the gate of {site.name} depends on the {reads}; give a prompt to average over")
            rows = self.runtime.rows_of_prompts
            layer = None
            if site.gate.ranked:  # it sits at one layer, and only asks for the experts of the ranks
                stack = self.stacks[name]
                layer = Layer(torch.zeros(1, len(stack.segment), device=device), stack.up, stack.segment.to(device))
            self._site(at).evaluate(torch.zeros(rows, 1, at.width, device=device), layer)

    def site_of(self, layer: str) -> GateSite:
        """The site of the gate whose weights a layer takes."""
        return self.sites[self.owners[layer]]

    def layers_by_gate(self) -> list[tuple[Any, list[str]]]:
        """Each gate with the layers that it weighs; none for "prompt", whose gates weigh several places at once."""
        if self.config.reads_prompt:
            return []
        return [(self.bank[name], [layer for layer in self.stacks if self.owners[layer] == name]) for name in self.places]

    # ---- building

    @property
    def _reads_experts(self) -> bool:
        return self.config.family == "mole" and self.config.inputs == "experts"

    def _gates(self) -> dict[str, nn.Module]:
        """The gates by place, or by block if one gate weighs each layer of a block."""
        if not self.config.reads_prompt:
            return {name: self._gate(at) for name, at in self.places.items()}
        if not self.layers_of_block:
            everyone = tuple(True for _ in self.runtime.active)
            return {name: self._prompt_gate(at, [everyone]) for name, at in self.places.items()}
        return {
            block: self._prompt_gate(self.places[layers[0]], [self.stacks[layer].present for layer in layers])
            for block, layers in self.layers_of_block.items()
        }

    def _prompt_gate(self, at: Place, presents: Sequence[Present]) -> nn.Module:
        config = self.config
        return PromptGate(at.width, presents, axis=config.axis, top=config.top, total=config.total)

    def _gate(self, at: Place) -> nn.Module:
        experts = len(self.runtime.active)
        if at.name == NETWORK:  # it reads text and time, as a single token
            return build_gate(replace(self.config, features="pooled"), experts, at.width)
        width = at.width
        if self._reads_experts:
            width = experts * sum(self.stacks[name].out for name in probed(at, self.stacks))
        if self.config.features == "flattened":
            if not at.tokens:
                raise ValueError("flattened features need a fixed number of tokens: use granularity 'block' or 'layer'")
            width *= at.tokens
        return build_gate(self.config, experts, width, stack=self.stacks.get(at.name))

    def _site(self, at: Place) -> GateSite:
        """The site of a place. What the gate reads there decides when it is evaluated, and so the kind of site."""
        gate, scope = self._gate_of(at)
        presents = {self.stacks[layer].present for layer, name in self.owners.items() if name == at.name}
        common: dict[str, Any] = {
            "presents": sorted(presents, key=lambda present: (sum(present), present), reverse=True),
            "timed": self.denoises,
            "scope": scope,
            "probe": self._probe(at),
        }
        about = f"{self.name}.{at.name}" if at.name else self.name, gate, self.runtime
        if NETWORK in (at.name, at.entry):
            return ModelSite(*about, spans_blocks=at.name == NETWORK, **common)
        if at.entry is None and at.block is None:
            return LayerSite(*about, **common)
        reads_text = self.denoises and self.config.one_gate_per == "stream" and at.name.endswith(TEXT_LAYERS)
        return BlockSite(*about, reads_text=reads_text, **common)

    def _gate_of(self, at: Place) -> tuple[Any, Present | None]:
        """The gate at a place, and the experts it shares among if it weighs each layer of a block."""
        block = next((block for block, layers in self.layers_of_block.items() if at.name in layers), None)
        if block is None:
            return self.bank[at.name], None
        layers = self.layers_of_block[block]
        scope = tuple(map(any, zip(*(self.stacks[layer].present for layer in layers), strict=True)))
        return LayerOfPromptGate(self.bank[block], layers.index(at.name)), scope

    def _probe(self, at: Place) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """The paper's gate input: hidden state [B, T, C] -> each expert's outputs [B, T, N * sum Cout]."""
        if not self._reads_experts or at.name == NETWORK:
            return None
        names, pool = probed(at, self.stacks), self.config.features == "pooled"

        def outputs(hidden: torch.Tensor) -> torch.Tensor:
            hidden = hidden.mean(1, keepdim=True) if pool else hidden  # the mean commutes with linear layers
            parts = []
            for name in names:
                down, up = peft_injection.stacked(self.model, name)
                parts.append(functional.expert_outputs(hidden, down.float(), up.float(), self.stacks[name].ranks))
            return torch.cat(parts, -1)

        return outputs

    # ---- hooks

    def _hook(self, at: Place, site: GateSite, undo: Undo) -> None:
        """Let a site know when sampling enters its place, and what enters."""
        if isinstance(site, BlockSite) and at.block is not None:
            undo.before_forward(self.model.get_submodule(at.block), lambda *_: site.begin_block())
        if at.entry is None or at.entry == NETWORK:
            return

        def evaluate(_: nn.Module, args: tuple, kwargs: dict) -> None:
            tokens = None if site.timed else self.runtime.tokens.current
            site.evaluate(args[0] if args else kwargs["hidden_states"], tokens=tokens)

        entry = self.model.get_submodule(at.entry)
        if isinstance(entry, Attention):
            _replace_processor(entry, site, undo)
        else:
            undo.before_forward(entry, evaluate, with_kwargs=True)

    def _hook_inputs(self, sites: Sequence[ModelSite], undo: Undo) -> None:
        """Give sites what enters the denoiser: the text if they read the prompt, otherwise its mean and the noise level."""
        inputs, reads_prompt = self.runtime.inputs, self.config.reads_prompt

        def defer(_: nn.Module, args: tuple, kwargs: dict) -> None:
            hidden, tokens = inputs.text(args, kwargs), None  # [B, T, C]
            if reads_prompt:
                tokens = self.runtime.tokens.of(hidden)
            else:
                time = inputs.time(args, kwargs)  # [B]
                text = functional.resample_rows(hidden, len(time)).float()  # a video repeats it for each frame
                time = get_timestep_embedding(1000 * time, TIME_WIDTH)  # [B, TIME_WIDTH]
                hidden = torch.cat([text.mean(1), time], -1)[:, None]  # [B, 1, C + TIME_WIDTH]
            for site in sites:
                site.defer(hidden, tokens=tokens)

        undo.before_forward(self.model, defer, with_kwargs=True)


def _replace_processor(attention: Attention, site: GateSite, undo: Undo) -> None:
    found = attention.processor

    def put_back() -> None:
        # A processor that another tool put in place of ours stays; a blank copy that it made of ours is removed.
        if isinstance(attention.processor, MoLEAttnProcessor):
            attention.set_processor(found if attention.processor.site is site else attention.processor.host)

    undo.callback(put_back)
    attention.set_processor(MoLEAttnProcessor(found, site))
