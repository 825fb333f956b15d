"""The arithmetic of one layer with experts: y = W x + B (g * (A x)), all experts in one pair of matrices."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mole_diffusers import functional
from mole_diffusers.gates.unchanged import version
from mole_diffusers.lora.stacking import Stack
from mole_diffusers.patching.gating.gate_location import GateLocation, WeighedLayer
from mole_diffusers.patching.gating.kept_text import OfText

ADAPTER = "mole_experts"
ALONE = [ADAPTER]


class GatedExperts:
    """The experts of one layer: a variant of LoRA, in peft's terms.

    Args:
        location: of the gate that weighs them.
        layer: peft's layer, whose `base_layer` is W and whose adapter holds A [R, Cin] in `lora_A` and B [Cout, R] in
            `lora_B`.
        name: of the layer, component first.
        token_type: which tokens it reads, see `placement.token_type_of`.
    """

    def __init__(self, location: GateLocation, stack: Stack, layer: Any, name: str, token_type: str | None):
        base, down, up = matrices = layer.base_layer, layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        self.location, self.layer = location, WeighedLayer(name, stack.present, "", token_type, down, up)
        # A module's attribute lookup is slow, so the dicts with weights and hooks are read directly.
        self._base, self._down, self._up = base._parameters, down._parameters, up._parameters
        self._hooks = tuple(hooks for m in matrices for hooks in (m._forward_pre_hooks, m._forward_hooks))
        self._own = base.__dict__, down.__dict__, up.__dict__
        self._reads_text = token_type == "text"

    def hold(self, ranks: Sequence[int]) -> None:
        """The matrices have so many ranks of each expert from now on, [N]."""
        held = " ".join(f"{expert}:{rank}" for expert, rank in enumerate(ranks) if rank)
        self.layer = replace(self.layer, held=sys.intern(held))

    def linear(self, layer: Any, x: torch.Tensor) -> torch.Tensor | None:
        """The whole layer, x [B, T, Cin] -> [B, T, Cout]; None if it must run through peft's own modules.

        That is so if W is not all that the experts are added to, or if one of the three matrices has hooks: offloading and
        quantisation use hooks to bring weights to where they are used. (All in one function, since each call is paid for in
        every layer.)
        """
        if layer._disable_adapters or layer.merged_adapters or layer._active_adapter != ALONE or x.dim() != 3:
            return None
        base, down, up = self._own
        if any(self._hooks) or "forward" in base or "forward" in down or "forward" in up:
            return None
        if self._reads_text and (made := self.location.shared.kept_text.of(x)) is not None:
            return self._of_text(layer, x, made)
        rows = x.flatten(0, 1)  # [B T, Cin]; products of rows take fewer operations
        low = F.linear(rows, self._down["weight"])  # A x, [B T, R]
        factor, scaling = self.location.factor(self.layer, x, low), layer.scaling[ADAPTER]
        if not (isinstance(scaling, float) and scaling == 1):
            factor = factor * scaling
        y = F.linear(rows, self._base["weight"], self._base["bias"])  # W x, [B T, Cout]
        return functional.add_low_rank(y, low, factor, self._up["weight"]).view(x.shape[0], x.shape[1], -1)

    def _of_text(self, layer: Any, x: torch.Tensor, made: dict[Any, OfText]) -> torch.Tensor:
        """The same for a text x [B, S, Cin] that is read in each step. It overwrites nothing that is kept in `made`."""
        base, down, up = self._base["weight"], self._down["weight"], self._up["weight"]
        weights, known = (version(base), version(down), version(up)), made.get(self)
        if known is None or known.weights != weights:
            known = made[self] = OfText(weights, F.linear(x.flatten(0, 1), down))
        factor = self._factor(layer, x, known.low)
        if (output := known.output(factor)) is None:
            plain = F.linear(x.flatten(0, 1), base, self._base["bias"]) if known.plain is None else known.plain
            rows = functional.add_low_rank(plain, known.low, factor, up, keeps=True)
            known.keep(output := rows.view(x.shape[0], x.shape[1], -1), factor, plain)
        return output

    def _factor(self, layer: Any, x: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        factor, scaling = self.location.factor(self.layer, x, low), layer.scaling[ADAPTER]
        return factor if isinstance(scaling, float) and scaling == 1 else factor * scaling

    def forward(self, layer: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any) -> torch.Tensor:
        """What the experts add to `result` = W x, through peft's own modules.

        It is for convolutions, quantised and offloaded layers, and layers with other adapters. x [B, Cin], [B, T, Cin]
        or [B, Cin, H, W]; result has the same form with Cout. In a linear layer, tokens may be of several dimensions.
        """
        if x.dim() > 3 and isinstance(self.layer.down, nn.Linear):
            return self.forward(layer, active_adapter, x.flatten(1, -2), result.flatten(1, -2)).view_as(result)
        low = self.layer.down(x)
        return result + self.layer.up(low * self._factor(layer, x, low))

    def supports_lora_conversion(self) -> bool:
        return False

    def merge_safe(self, *_: object) -> None:
        raise ValueError("gated experts cannot be merged into the weights as they are")

    merge_unsafe = unmerge = merge_safe
