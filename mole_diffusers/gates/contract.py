"""What every gate type is: a `GateType` with the options and the locations of its gates, and the `Gate` that it makes.

`gate_types/` has one file for each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import torch
from torch import nn

from mole_diffusers.functional import Routed
from mole_diffusers.lora.stacking import Stack
from mole_diffusers.options import TYPE_NAMES

GATE_TYPES: dict[str, type[GateType]] = {}  # name -> gate type, each entered by its own class


@dataclass
class Layer:
    """The experts of the layer that a gate sits at."""

    low: torch.Tensor  # A x: [B, R], [B, T, R] or [B, R, H, W]
    up: torch.Tensor  # [Cout, R] or [Cout, R, 1, 1]
    expert_index: torch.Tensor  # [R] -> index of the expert that each rank belongs to


@dataclass(slots=True)
class Context:
    """What a gate gets besides the state it reads."""

    mask: torch.Tensor  # [N] bool, the experts that are present and active; [B, N] if each row has its own set
    time: torch.Tensor  # [B] in 0..1, the noise level (1 is pure noise)
    layer: Layer | None = None  # the layer's experts, if the gate sits at one layer
    tokens: torch.Tensor | None = None  # [B, T] bool, the tokens of a text that count; None if all do
    all_weighed: bool = False  # whether `mask` is true for all experts, known without asking the device

    @property
    def mask_or_none(self) -> torch.Tensor | None:
        """`mask`, or None if it is true for all experts, which saves operations."""
        return None if self.all_weighed else self.mask


class Gate(nn.Module):
    """`gate(hidden, context)` -> weights [N], [B, N] or [B, T, N], fp32, zero outside `context.mask`.

    A gate never waits for the device (no `.item()`, no `if tensor`). The user's strengths are applied after it.

    hidden [B, T, C], of any dtype, is what the gate's gate location reads, see `GateType.one_gate_per`:

    - per "block": the input of the block's first attention, after the norm;
    - per "layer": the input of that attention or feed-forward;
    - per "matrix": the input of the linear or convolution layer;
    - per "token type": the input of the block, or its text; outside of blocks that of each layer;
    - for layers outside of blocks otherwise, and per "model": [B, 1, C + 32], the mean text and the noise level; in a
      text encoder the input of the first block.

    If the gate type `mixes_outputs`, it is what each expert adds to the output of its block, side by side, [B, T, N C],
    except outside of blocks. If it `reads_prompt`, it is the denoiser's text; in a text encoder the input of the block, or
    outside of blocks of the first. If it `reads_experts`, it is the experts' outputs for that input, [B, T, D], except
    outside of blocks and per "model".

    Attributes:
        step_invariant: the weights depend on nothing that changes while sampling, so they can be folded.
        input_free: the weights depend on parameters and `context.mask` alone.
        ranked: the weights are per rank of the layer instead of per expert: [R], [B, R] or [B, T, R].
        starts_anywhere: whether `begin` can be called.
    """

    step_invariant: bool = False
    input_free: bool = False
    ranked: bool = False
    starts_anywhere: bool = False

    # ---- training

    def begin(self, weights: torch.Tensor, mask: torch.Tensor) -> None:
        """Start training at `weights` [N] for the experts in `mask` [N], as near as the gate type allows."""
        raise NotImplementedError(f"{type(self).__name__} can only start at its own weights")

    def sensitivity(self) -> dict[str, float]:
        """Parameter -> how far a change of 1 in each of its entries moves the gate's logits; 1 for those not named."""
        return {}

    @contextmanager
    def noting_routes(self) -> Iterator[list[Routed]]:
        """The list to which calls with gradients add what they route while the block runs, for `functional.load_balance`.

        A gate that adds nothing is balanced by its weights, see `functional.balance_loss`.
        """
        yield []

    def rebalance(self, over: Callable[[torch.Tensor], torch.Tensor] = lambda own: own) -> None:
        """Called after each update. `over` turns counts into their sum over all processes."""


@dataclass(frozen=True)
class GatePlace:
    """Where a gate sits, and what it weighs there."""

    experts: int  # N
    width: int  # channels C of what it reads, D if that is the experts' outputs
    tokens: int  # T at the model's default resolution, times `picture_area` in a denoiser; 0 if it is not fixed
    is_network: bool  # whether it weighs the layers outside of blocks, or all layers of the model
    # [M][N], who has each layer if it `weighs_layers_apart`; else one row, all true
    layer_adapters: Sequence[Sequence[bool]]
    stack: Stack | None  # the experts of its layer, if it sits at one

    @property
    def one_layer(self) -> Stack:
        """The experts of its layer, for a gate type with `one_gate_per` "matrix"."""
        assert self.stack is not None
        return self.stack


@dataclass(frozen=True)
class GateType(ABC):
    """One way to weigh experts. The fields of a subclass are its options, and its docstring is their help.

    Options are checked when one is made: a `Literal` has its values, an `Annotated[int, least, most]` its range.

    `class Own(GateType, name="own")` registers it. A few members say where its gates sit and what they read.

    Attributes:
        reads_prompt: whether gates read the prompt's text states instead of the state of their block.
        mixes_outputs: whether a block runs once without experts and once with each, and gates weigh what each adds to its
            output. Otherwise they weigh what each adds to every layer, and the block runs once.
        of_experts: whether gates belong to the experts that they were made for; otherwise they also serve any others.
        learns: whether there is anything to train.
        recommended: whether it is what is trained if no gate type is named.
        untrained: how experts are weighed before training.
    """

    name: ClassVar[str]
    reads_prompt: ClassVar[bool] = False
    mixes_outputs: ClassVar[bool] = False
    of_experts: ClassVar[bool] = True
    learns: ClassVar[bool] = True
    recommended: ClassVar[bool] = False
    untrained: ClassVar[str] = "the plain sum"

    @property
    def one_gate_per(self) -> str:
        """The unit that has one gate.

        "model", "block", "layer" (attention or feed-forward), "matrix" (linear or convolution layer), or "token type": in a
        block one for the layers that read the picture and one for those that read the text, and outside of blocks one for
        each layer.
        """
        return "block"

    @property
    def weighs_layers_apart(self) -> bool:
        """Whether a gate has weights for each of its layers, [B, M, N]."""
        return False

    @property
    def reads_experts(self) -> bool:
        """Whether gates read the experts' outputs for the state of their gate location instead of that state."""
        return False

    @property
    def reads_ranks(self) -> bool:
        """Whether gates read or weigh the ranks of all experts one by one, also of those that do not act."""
        return self.reads_experts

    @property
    def reads_tokens(self) -> bool:
        """Whether gates tell tokens apart. If not, experts' outputs are those for the mean token."""
        return True

    @property
    def picture_area(self) -> float:
        """The area of the pictures that gates with a fixed number of tokens are for, in areas of the model's own size."""
        return 1.0

    def __init_subclass__(cls, name: str):
        cls.name = name
        GATE_TYPES[name] = cls

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self), include_extras=True).items():
            if name in {f.name for f in fields(self)}:
                _check(name, getattr(self, name), kind)

    @abstractmethod
    def gate(self, at: GatePlace) -> Gate:
        """A new gate."""

    def prepared(self, stack: Stack) -> Stack:
        """The experts of a layer as the gates need them. What each of them adds must stay the same."""
        return stack


def _check(name: str, value: Any, kind: Any) -> None:
    if get_origin(kind) is Literal and value not in get_args(kind):
        raise ValueError(f"unknown gate {name} {value!r}; known: {list(get_args(kind))}")
    if kind is bool and type(value) is not bool:
        raise ValueError(f"the gate option {name!r} must be true or false, got {value!r}")
    if get_origin(kind) is Annotated:
        number, low, high = get_args(kind)
        if type(value) not in (int, number) or not low <= value <= high:
            raise ValueError(f"the gate option {name!r} must be {TYPE_NAMES[number]} in {low}..{high}, got {value!r}")
