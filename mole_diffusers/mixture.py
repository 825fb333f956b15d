"""attach / detach: put experts and gates on a pipeline and take them off again, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn

from mole_diffusers import carrier, checkpoint, mixing
from mole_diffusers.experts import Stack, match, stack_all
from mole_diffusers.gates import FAMILIES, GateBank, GateConfig, build_gate
from mole_diffusers.lora_files import PARTS, Expert, read_expert
from mole_diffusers.places import NETWORK, TIME_WIDTH, Place, blocks, owner, place, probed
from mole_diffusers.processor import MoLEAttnProcessor, Slot, State
from mole_diffusers.trace import Trace

HANDLE = "_mole_mixture"  # attribute of the denoiser that holds the attached mixture
BANK = "mole_gates"  # submodule of a host that holds its gates, so that they move and offload with it
Source = str | Path | Expert
Gates = str | Path | GateConfig


def attach(pipe: Any, experts: Mapping[str, Source | tuple[Source, float]], gates: Gates = "sum") -> Mixture:
    """Put concept LoRAs on a pipeline, weighed by gates. Attaching again replaces; `detach` gives the original back.

    Args:
        pipe: any pipeline with a `unet`.
        experts: name -> file, or (file, strength). Strength is the user's own factor: any sign and size, 1 by default,
            0 means absent.
        gates: a family ("sum", "mean", "static", "mole"), a GateConfig, a folder that `save_pretrained` wrote, or a hub id.

    Returns:
        The mixture, the handle for strengths, masks, traces, training and saving.

    Raises:
        ValueError, FileNotFoundError: a bad file, layer, family or gate folder; the pipeline stays as it was.
    """
    hosts = _hosts(pipe)
    read, strengths = {}, {}
    for name, source in experts.items():
        source, strengths[name] = source if isinstance(source, tuple) else (source, 1.0)
        read[name] = source if isinstance(source, Expert) else read_expert(source, name)
    if not read:
        raise ValueError("attach needs at least one expert")
    saved = None
    if isinstance(gates, GateConfig):
        config = gates
    elif str(gates) in FAMILIES:
        config = GateConfig(family=str(gates))
    else:
        saved = checkpoint.load(gates)
        config, order = saved.config, saved.order(read)
        read = {name: read[name] for name in order}
    mixture = Mixture(hosts, read, config, [strengths[name] for name in read])
    if saved is not None:
        saved.fill(mixture.banks)
    before = attached(pipe)
    if before is not None:
        before._uninstall()
    try:
        mixture._install()
    except BaseException:
        if before is not None:
            before._install()
        raise
    return mixture


def detach(pipe: Any) -> None:
    """Give back the original pipeline, bit for bit. Does nothing where nothing is attached."""
    if (mixture := attached(pipe)) is not None:
        mixture._uninstall()


def attached(pipe: Any) -> Mixture | None:
    """The mixture on a pipeline, if any."""
    return getattr(_denoiser(pipe), HANDLE, None)


def _denoiser(pipe: Any) -> nn.Module:
    for name in ("unet", "transformer"):
        if (model := getattr(pipe, name, None)) is not None:
            return model
    raise ValueError(f"{type(pipe).__name__} has neither a unet nor a transformer to attach experts to")


def _hosts(pipe: Any) -> dict[str, nn.Module]:
    _denoiser(pipe)
    return {part: model for part in PARTS if (model := getattr(pipe, part, None)) is not None}


class Mixture:
    """Experts and gates attached to a pipeline; made by `attach`.

    Attributes:
        experts: name -> Expert, in the order of the gates' columns.
        config: which gates these are.
        unmatched: name -> layer keys of the file that the pipeline does not have.
        banks: part -> GateBank.
    """

    def __init__(
        self, hosts: Mapping[str, nn.Module], experts: Mapping[str, Expert], config: GateConfig, strengths: list[float]
    ):
        matches = [match(expert, hosts) for expert in experts.values()]
        self.experts, self.config = dict(experts), config
        self.unmatched = {name: m.unmatched for name, m in zip(experts, matches, strict=True)}
        self._hosts = dict(hosts)
        self._stacks = stack_all(matches, hosts)
        self._state = State([True] * len(experts), strengths)
        self._undo = ExitStack()
        self._places = {part: self._plan(part) for part in self._stacks}  # part -> {layer: Place}
        self.banks = {part: self._build(part) for part in self._stacks}

    # ---- what a user does with it

    def strength(self, name: str, value: float | None = None) -> float:
        """The user's factor of one expert; with `value`, set it (any sign and size; 0 means absent)."""
        index = self._index(name)
        if value is not None:
            self._state.strength[index] = float(value)
        return self._state.strength[index]

    @contextmanager
    def only(self, *names: str) -> Iterator[None]:
        """MoLE's second inference mode: mask the other experts, renormalise the gates, restore on exit."""
        kept = {self._index(name) for name in names}
        before = self._state.active
        self._state.active = [i in kept for i in range(len(before))]
        try:
            yield
        finally:
            self._state.active = before

    @contextmanager
    def fixed(self, weights: Mapping[str, float]) -> Iterator[None]:
        """Stand in for every gate: these weights everywhere, 0 for experts not named; strengths do not count."""
        values = [0.0] * len(self.experts)
        for name, weight in weights.items():
            values[self._index(name)] = float(weight)
        before, self._state.fixed = self._state.fixed, values
        try:
            yield
        finally:
            self._state.fixed = before

    @contextmanager
    def listen(self, listener: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
        """Call `listener(place, weights)` with each gate's live weights [N] or [B, N] as they are made."""
        self._state.listeners.append(listener)
        try:
            yield
        finally:
            self._state.listeners.remove(listener)

    @contextmanager
    def trace(self) -> Iterator[Trace]:
        """Record every gate's weights while the block runs: by place, step, batch row and expert."""
        trace = Trace(list(self.experts), self._state)
        self._state.step = -1
        with self.listen(trace.record):
            yield trace

    def parameters(self) -> list[nn.Parameter]:
        """The gates' parameters, all that training changes."""
        return [p for bank in self.banks.values() for p in bank.parameters()]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `gates.safetensors` and `config.json`; `attach(..., gates=folder)` reads them."""
        checkpoint.save(folder, self.banks, self.config, self.experts)

    # ---- building

    def _index(self, name: str) -> int:
        if name not in self.experts:
            raise ValueError(f"unknown expert {name!r}; attached: {list(self.experts)}")
        return list(self.experts).index(name)

    def _plan(self, part: str) -> dict[str, Place]:
        model, granularity = self._hosts[part], self.config.granularity
        names, known = list(blocks(model)), dict[str, Place]()
        plan = {}
        for layer in self._stacks[part]:
            name = owner(layer, granularity, names)
            known.setdefault(name, place(name, granularity, model))
            plan[layer] = known[name]
        return plan

    def _build(self, part: str) -> GateBank:
        return GateBank({spot.name: self._gate(part, spot) for spot in self._places[part].values()})

    def _gate(self, part: str, spot: Place) -> nn.Module:
        width = spot.width
        if self.config.family == "mole" and self.config.inputs == "experts" and spot.name != NETWORK:
            outputs = [self._stacks[part][name].up.shape[0] for name in probed(spot, self._stacks[part])]
            width = len(self.experts) * sum(outputs)
        if self.config.features == "flattened" and spot.name != NETWORK:
            if not spot.tokens:
                raise ValueError("flattened features need a fixed number of tokens: use granularity 'block' or 'layer'")
            width *= spot.tokens
        config = self.config
        if spot.name == NETWORK:  # it reads text and time, one token's worth
            config = GateConfig.from_dict(config.to_dict() | {"features": "pooled"})
        return build_gate(config, len(self.experts), width)

    # ---- the only code that changes a host

    def _install(self) -> None:
        denoiser = next(self._hosts[p] for p in ("unet", "transformer") if p in self._hosts)
        with ExitStack() as undo:
            # First of all hooks: the network's own gate already needs the time of this call.
            undo.callback(denoiser.register_forward_pre_hook(self._on_denoiser, with_kwargs=True).remove)
            for part, stacks in self._stacks.items():
                self._install_part(part, stacks, undo)
            undo.callback(denoiser.__dict__.pop, HANDLE, None)
            object.__setattr__(denoiser, HANDLE, self)
            self._undo = undo.pop_all()

    def _uninstall(self) -> None:
        self._undo.close()

    def _install_part(self, part: str, stacks: dict[str, Stack], undo: ExitStack) -> None:
        model, bank = self._hosts[part], self.banks[part]
        parameter = next(model.parameters())
        undo.callback(lambda: model._modules.pop(BANK, None))
        model.add_module(BANK, bank.to(parameter.device))
        slots: dict[str, Slot] = {}
        for layer, spot in self._places[part].items():
            shared = spot.name == NETWORK or spot.entry is not None
            name = f"{part}.{spot.name}" if spot.name else part
            timed = part in ("unet", "transformer")
            slot = slots.setdefault(spot.name, Slot(name, bank[spot.name], self._state, shared=shared, timed=timed))
            if (present := stacks[layer].present) not in slot.presents:
                slot.presents.append(present)
        carrier.inject(model, stacks, {layer: slots[s.name] for layer, s in self._places[part].items()}, undo)
        for spot in {s.name: s for s in self._places[part].values()}.values():
            self._hook(part, spot, slots[spot.name], undo)

    def _hook(self, part: str, spot: Place, slot: Slot, undo: ExitStack) -> None:
        """Have the slot refreshed whenever sampling enters its place."""
        model = self._hosts[part]
        slot.probe = self._probe(part, spot)
        slot.presents.sort(key=sum, reverse=True)
        if spot.name == NETWORK:
            self._hook_network(model, slot, undo)
        elif spot.entry is not None:
            whole = model.get_submodule(spot.name)
            undo.callback(whole.register_forward_pre_hook(lambda *_: slot.clear()).remove)
            entry = model.get_submodule(spot.entry)
            if isinstance(entry, Attention):
                _replace_processor(entry, slot, undo)
            else:
                undo.callback(entry.register_forward_pre_hook(_refresher(slot), with_kwargs=True).remove)

    def _hook_network(self, model: Any, slot: Slot, undo: ExitStack) -> None:
        if hasattr(model.config, "cross_attention_dim"):

            def read(_: nn.Module, args: tuple, kwargs: dict) -> None:
                text = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[2]
                time = get_timestep_embedding(_timestep(args, kwargs, text), TIME_WIDTH)  # [B, TIME_WIDTH]
                slot.refresh(torch.cat([text.float().mean(1), time], -1)[:, None])  # [B, 1, C + TIME_WIDTH]

            hook = model.register_forward_pre_hook(read, with_kwargs=True)
        else:
            first = model.get_submodule(next(iter(blocks(model))))
            hook = first.register_forward_pre_hook(_refresher(slot), with_kwargs=True)
        undo.callback(hook.remove)

    def _probe(self, part: str, spot: Place) -> Callable[[torch.Tensor], torch.Tensor] | None:
        if self.config.family != "mole" or self.config.inputs != "experts" or spot.name == NETWORK:
            return None
        model, stacks = self._hosts[part], self._stacks[part]
        names = probed(spot, stacks)
        pool = self.config.features == "pooled"

        def outputs(hidden: torch.Tensor) -> torch.Tensor:
            hidden = hidden.mean(1, keepdim=True) if pool else hidden  # the mean commutes with linear layers
            parts = [mixing.expert_outputs(hidden, *carrier.stacked(model, n), stacks[n].ranks) for n in names]
            return torch.cat(parts, -1)  # [B, T, N * sum Cout]

        return outputs

    def _on_denoiser(self, _: nn.Module, args: tuple, kwargs: dict) -> None:
        sample = args[0] if args else kwargs["sample"]
        self._state.time = _timestep(args, kwargs, sample).float() / 1000
        self._state.step += 1


def _timestep(args: tuple, kwargs: dict, like: torch.Tensor) -> torch.Tensor:
    """The denoiser's timestep as [B]."""
    timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
    return torch.as_tensor(timestep, device=like.device).reshape(-1).expand(like.shape[0])


def _refresher(slot: Slot) -> Callable[[nn.Module, tuple, dict], None]:
    def refresh(_: nn.Module, args: tuple, kwargs: dict) -> None:
        slot.refresh(args[0] if args else kwargs["hidden_states"])

    return refresh


def _replace_processor(attention: Attention, slot: Slot, undo: ExitStack) -> None:
    found = attention.processor

    def put_back() -> None:
        # What another tool has put in place of ours stays; a blank copy that it made of ours goes.
        if isinstance(attention.processor, MoLEAttnProcessor):
            attention.set_processor(found if attention.processor.slot is slot else attention.processor.host)

    undo.callback(put_back)
    attention.set_processor(MoLEAttnProcessor(found, slot))
