"""The arithmetic of one layer with experts: y = W x + B (g * (A x)), all experts in one pair of matrices."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from mole_diffusers import functional
from mole_diffusers.gates import Layer
from mole_diffusers.lora.stacking import Stack
from mole_diffusers.patching.gating.gate_site import GateSite

ADAPTER = "mole_experts"
ALONE = [ADAPTER]


class GatedExperts:
    """The experts of one layer: a variant of LoRA, in peft's terms.

    Args:
        layer: peft's layer, whose `base_layer` is W and whose adapter holds A [R, Cin] in `lora_A` and B [Cout, R] in
            `lora_B`.
        name: of the layer, component first.
        stream: which tokens it reads, see `placement.stream_of`.
    """

    def __init__(self, site: GateSite, stack: Stack, layer: Any, name: str, stream: str | None):
        self.stream = stream
        self.site, self.present, self.ranks, self.name = site, stack.present, stack.ranks, name
        self.base, self.down, self.up = layer.base_layer, layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        # A module's attribute lookup is slow, so the dicts with weights and hooks are read directly.
        matrices = self.base, self.down, self.up
        self._base, self._down, self._up = (matrix._parameters for matrix in matrices)
        self._buffers = self.down._buffers
        self._hooks = tuple(hooks for m in matrices for hooks in (m._forward_pre_hooks, m._forward_hooks))
        self._own = tuple(matrix.__dict__ for matrix in matrices)

    def are_alone(self, layer: Any, x: torch.Tensor) -> bool:
        """Whether only these experts are added to W, and the three matrices have no hooks. Then `linear` may read them.

        Offloading and quantisation use hooks to bring weights to where they are used.
        """
        if layer._disable_adapters or layer.merged_adapters or layer._active_adapter != ALONE or x.dim() != 3:
            return False
        base, down, up = self._own
        return not (any(self._hooks) or "forward" in base or "forward" in down or "forward" in up)

    def linear(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        """The whole layer, x [B, T, Cin] -> [B, T, Cout]."""
        rows = x.flatten(0, 1)  # [B T, Cin]; products of rows take fewer operations
        low = F.linear(rows, self._down["weight"])  # A x, [B T, R]
        factor = self._factor(layer, x, low)
        y, up = F.linear(rows, self._base["weight"], self._base["bias"]), self._up["weight"]  # y is W x, [B T, Cout]
        return functional.add_low_rank(y, low, factor, up).view(x.shape[0], x.shape[1], -1)

    def forward(self, layer: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any) -> torch.Tensor:
        """What the experts add to `result` = W x, through peft's own modules.

        It is for convolutions, quantised and offloaded layers, and layers with other adapters. x [B, Cin], [B, T, Cin]
        or [B, Cin, H, W]; result has the same form with Cout.
        """
        low = self.down(x)
        return result + self.up(low * self._factor(layer, x, low))

    def described(self, low: torch.Tensor) -> Layer:
        """What a gate at this layer gets to know about it."""
        return Layer(low, self._up["weight"], self.segment)

    @property
    def segment(self) -> torch.Tensor:
        """[R] -> index of the expert that each rank belongs to."""
        return self._buffers["segment"]

    def _factor(self, layer: Any, x: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        factor, scaling = self.site.factor(self, x, low), layer.scaling[ADAPTER]
        return factor if isinstance(scaling, float) and scaling == 1 else factor * scaling

    def supports_lora_conversion(self) -> bool:
        return False

    def merge_safe(self, *_: object) -> None:
        raise ValueError("gated experts cannot be merged into the weights as they are")

    merge_unsafe = unmerge = merge_safe
