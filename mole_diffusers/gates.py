"""Gates: what turns the state of a block (or nothing) into one weight per expert. Several families, one contract."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Protocol

import torch
from torch import nn

from mole_diffusers import mixing

FAMILIES = ("sum", "mean", "static", "mole")
GRANULARITIES = ("model", "block", "layer", "matrix")
FEATURES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"pooled": mixing.pooled, "flattened": mixing.flattened}
INPUTS = ("hidden", "experts")


@dataclass(frozen=True)
class GateConfig:
    """Which gates a mixture has.

    Attributes:
        family: "sum" and "mean" have no parameters; "static" learns weights that are constant or change with time;
            "mole" reads the block's state.
        granularity: one gate per "model", "block", "layer" (attention or feed-forward) or "matrix".
        total: what the weights sum to, see `mixing.gate_weights`. The paper's is "1".
        inputs: the mole gate reads the "hidden" state (the authors' code) or the "experts" outputs (the paper).
        features: tokens are "pooled" (any resolution) or "flattened" (the paper; one resolution).
        bins: the static gate has this many sets of weights over the noise levels, 1 or more.
    """

    family: str = "mole"
    granularity: str = "block"
    total: str = "N"
    inputs: str = "hidden"
    features: str = "pooled"
    bins: int = 1

    def __post_init__(self) -> None:
        known = {
            "family": FAMILIES,
            "granularity": GRANULARITIES,
            "total": mixing.TOTALS,
            "inputs": INPUTS,
            "features": tuple(FEATURES),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"unknown gate {name} {getattr(self, name)!r}; known: {list(values)}")
        if self.granularity == "model" and (self.inputs, self.features) != ("hidden", "pooled"):
            raise ValueError("a gate for the whole model reads text and time: inputs 'hidden' and features 'pooled' only")
        if self.bins < 1:
            raise ValueError(f"a static gate needs 1 or more time bins, got {self.bins}")

    @classmethod
    def from_dict(cls, values: dict) -> GateConfig:
        """Raises ValueError naming what is unknown."""
        if unknown := set(values) - {f.name for f in fields(cls)}:
            raise ValueError(f"unknown gate options {sorted(unknown)}; known: {[f.name for f in fields(cls)]}")
        return cls(**values)

    def to_dict(self) -> dict:
        return asdict(self)


class Gate(Protocol):
    """`gate(hidden, mask, time)` -> weights [N] or [B, N], fp32, zero outside `mask`.

    hidden [B, T, C] is what the gate's place hands it, mask [N] bool the experts present and active ([B, N] where each
    row of the batch has a set of its own), time [B] in 0..1 the noise level (1 is pure noise). `total` is what the weights
    sum to; `fusible` is true when they depend on nothing that changes while sampling.
    """

    total: str
    fusible: bool

    def __call__(self, hidden: torch.Tensor, mask: torch.Tensor, time: torch.Tensor) -> torch.Tensor: ...


class ConstantGate(nn.Module):
    """`sum` (total "N": weight 1 each) and `mean` (total "1": NLA, eq. 2 of MoLE with equal weights)."""

    fusible = True

    def __init__(self, total: str):
        super().__init__()
        self.total = total

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return mixing.gate_weights(torch.zeros(mask.shape, device=hidden.device), mask, self.total)  # as mask


class StaticGate(nn.Module):
    """Learned weights per place, one set per time bin: [bins, N] logits, starting equal."""

    def __init__(self, experts: int, total: str, bins: int):
        super().__init__()
        self.total, self.fusible = total, bins == 1
        self.logits = nn.Parameter(torch.zeros(bins, experts))

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        bins = len(self.logits)
        index = (time * bins).long().clamp(0, bins - 1)  # [B]
        return mixing.gate_weights(self.logits.float()[index], mask, self.total)  # [B, N]


class MoLEGate(nn.Module):
    """Eq. 9-11 of MoLE: softmax(e . normalised features / tau), tau learned and kept positive as exp(log_tau).

    Starts at equal weights (zero matrix). Linear without bias, as the authors' code.
    """

    fusible = False

    def __init__(self, experts: int, width: int, total: str, features: str):
        super().__init__()
        self.total, self.features, self.width = total, FEATURES[features], width
        self.matrix = nn.Parameter(torch.zeros(experts, width))  # e, [N, D]
        self.log_tau = nn.Parameter(torch.zeros(()))

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        features = mixing.l2_normalized(self.features(hidden.float()))  # [B, D]
        if features.shape[-1] != self.width:
            raise ValueError(
                f"a gate with flattened features was built for {self.width} values and got {tuple(hidden.shape[1:])} "
                f"(tokens x channels): it is tied to one resolution; use features='pooled' for any other"
            )
        logits = features @ self.matrix.float().T / self.log_tau.float().exp()  # [B, N]
        return mixing.gate_weights(logits, mask, self.total)


def build_gate(config: GateConfig, experts: int, width: int) -> nn.Module:
    """One gate of the configured family; `width` is its feature size D."""
    if config.family in ("sum", "mean"):
        return ConstantGate("N" if config.family == "sum" else "1")
    if config.family == "static":
        return StaticGate(experts, config.total, config.bins)
    return MoLEGate(experts, width, config.total, config.features)


class GateBank(nn.Module):
    """The gates of one model by place; stays fp32 whatever the host is cast to.

    A place is a module name of the host; its dots become "/" in parameter names, which may hold none. The network's
    own place has no name and is called "network" there.
    """

    def __init__(self, gates: dict[str, nn.Module]):
        super().__init__()
        self.gates = nn.ModuleDict({_key(place): gate for place, gate in gates.items()})

    def __getitem__(self, place: str) -> nn.Module:
        return self.gates[_key(place)]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> GateBank:
        # Only the device is taken from `fn`: a cast to half and back would round what was trained.
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)


def _key(place: str) -> str:
    return place.replace(".", "/") or "network"
