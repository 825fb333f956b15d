"""The arithmetic of one layer with experts: its own product and all of theirs, in the cheaper of two ways.

Beside the host's product, result + up (g[segment] * (down x)); or inside its weight, (W + up diag(g) down) x, with a weight
for each row of the batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mole_diffusers import functional
from mole_diffusers.gates import Layer
from mole_diffusers.lora.stacking import Stack
from mole_diffusers.patching.kept_products import Kept, Together, at_rest
from mole_diffusers.patching.placement import TEXT_LAYERS
from mole_diffusers.patching.processor import Slot

ADAPTER = "mole_experts"


class GatedLayer:
    """What peft calls a variant of LoRA: y = W x + up (g[segment] * (down x)) for all experts in one pass.

    The keys and values of the text are kept from step to step, and scaled anew where the gates moved. Layers with one
    input share one projection of it; see `kept_products`.
    """

    pays: Callable[..., bool] = staticmethod(functional.folding_pays)

    def __init__(self, slot: Slot, stack: Stack, layer: str):
        self.slot, self.present, self.ranks, self.layer = slot, stack.present, stack.ranks, layer
        self.together: tuple[Together, int] | None = None
        self.of_text = (Kept(), Kept()) if layer.endswith(TEXT_LAYERS) else None
        self._table: torch.Tensor | None = None

    def forward(self, module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any) -> torch.Tensor:
        """x [B, Cin], [B, T, Cin] or [B, Cin, H, W]; result alike with Cout."""
        layer = self._described(module, lambda: module.lora_A[ADAPTER](x))
        weights = self.slot.read(self, x, layer)
        return self._beside(module, layer, result, factor=self._factor(module, weights, x, layer=layer))

    def whole(self, module: Any, x: torch.Tensor) -> torch.Tensor | None:
        """The host's product and the experts'; None where only `forward` will do."""
        down, up, base = module.lora_A[ADAPTER], module.lora_B[ADAPTER], module.base_layer
        if x.dim() != 3 or x.dtype != down.weight.dtype or not alone(module):
            return None
        plain = bare(base) and bare(down) and bare(up) and base.weight.dtype == x.dtype
        still = plain and at_rest()
        layer = self._described(module, lambda: self._low(down, x, still))
        weights = self.slot.read(self, x, layer)
        few = self._few(weights, x) if plain else None
        if few is not None:
            return self._of_few(module, x, few)
        factor = self._factor(module, weights, x, layer=layer)  # [R], [B, 1, R] or [B, T, R]
        if still and self.of_text is not None:
            return _of_text(module, x, factor, kept=self.of_text)
        if plain and self.pays(x, base.weight, factor):
            return functional.folded_linear(x, (base.weight, base.bias), (down.weight, up.weight * factor))
        return self._beside(module, layer, base(x), factor=factor)

    def _low(self, down: nn.Linear, x: torch.Tensor, still: bool) -> torch.Tensor:
        low = self.together[0].low(x, self.together[1]) if still and self.together is not None else None
        return down(x) if low is None else low

    def _described(self, module: Any, project: Callable[[], torch.Tensor]) -> Layer:
        return Layer(project, module.lora_B[ADAPTER].weight, module.lora_A[ADAPTER].segment)

    def _few(self, weights: torch.Tensor, x: torch.Tensor) -> functional.Few | None:
        """The ranks that weigh something, where they are three quarters of all at most; the layers of a block share them."""
        count, widest = self.slot.most, max(self.ranks)
        if count is None or weights.dim() > 2 or torch.is_grad_enabled() or 4 * count * widest > 3 * sum(self.ranks):
            return None
        key = (self.ranks, x.dtype, count)
        known = self.slot.factors.get(key)
        if known is None or known[0] is not weights:
            if self._table is None or self._table.device != x.device:
                starts = itertools.accumulate(self.ranks, initial=0)
                rows = [[s + j if j < r else -1 for j in range(widest)] for s, r in zip(starts, self.ranks, strict=False)]
                self._table = torch.tensor(rows, device=x.device)  # [N, r]
            few = functional.few_ranks(weights.expand(len(x), -1).to(x.dtype), self._table, count)
            known = self.slot.factors[key] = (weights, few)
        return known[1]

    def _of_few(self, module: Any, x: torch.Tensor, few: functional.Few) -> torch.Tensor:
        """`whole` with the experts' matrices of each row picked out: its own down [B, K, Cin] and up [B, K, Cout]."""
        down, up, base = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight, module.base_layer
        factor = few.factor * module.scaling[ADAPTER]
        up = up.T[few.ranks]
        if self.of_text is not None and at_rest():
            made = _products(module, x, self.of_text[0])
            if made is not None:
                low = made[1].gather(-1, few.ranks[:, None].expand(-1, x.shape[1], -1))  # [B, T, K]
                return torch.baddbmm(made[0], low * factor, up)
        down = down[few.ranks]
        if self.pays(x, base.weight, factor):
            return functional.folded_linear(x, (base.weight, base.bias), (down, (up * factor.mT).mT))
        return torch.baddbmm(base(x), torch.bmm(x, down.mT) * factor, up)

    def _factor(self, module: Any, weights: torch.Tensor, x: torch.Tensor, *, layer: Layer) -> torch.Tensor:
        """What multiplies the rank axis; the layers of a block that are alike share one."""
        segment, scaling = None if self.slot.gate.ranked else layer.segment, module.scaling[ADAPTER]
        if x.dim() != 3:
            factor = functional.over_ranks(weights, segment, layer.low)
        elif weights.requires_grad:  # a checkpointed block that is computed again must save what it saved at first
            factor = functional.over_ranks(weights, segment, x)
        else:
            key = (self.ranks, x.dtype)
            known = self.slot.factors.get(key)
            if known is None or known[0] is not weights:
                known = self.slot.factors[key] = (weights, functional.over_ranks(weights, segment, x))
            factor = known[1]
        return factor if isinstance(scaling, float) and scaling == 1 else factor * scaling

    def _beside(self, module: Any, layer: Layer, result: torch.Tensor, *, factor: torch.Tensor) -> torch.Tensor:
        up = module.lora_B[ADAPTER]
        z = functional.scaled(layer.low, factor)  # [B, R], [B, T, R] or [B, R, H, W]
        if z.dim() < 4 and z.dtype == up.weight.dtype == result.dtype and bare(up):
            return functional.added_low_rank(result, z, up.weight)
        return result + up(z)

    def supports_lora_conversion(self) -> bool:
        return False

    def merge_safe(self, *_: object) -> None:
        raise ValueError("gated experts cannot be merged into the weights as they are")

    merge_unsafe = unmerge = merge_safe


def _products(module: Any, x: torch.Tensor, kept: Kept) -> tuple[torch.Tensor, ...] | None:
    """The host's product W x + b [B, T, Cout] and A x [B, T, R], where they are kept."""
    base, down = module.base_layer, module.lora_A[ADAPTER].weight
    return kept.of((x, base.weight, base.bias, down), lambda: (base(x), F.linear(x, down)))


def _of_text(module: Any, x: torch.Tensor, factor: torch.Tensor, *, kept: tuple[Kept, Kept]) -> torch.Tensor:
    """All of it is as in the step before where the gates stand still, and W x and A x of a text where they do not."""
    base, down, up = module.base_layer, module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
    given = x, base.weight, base.bias, down

    def added(made: tuple[torch.Tensor, ...] | None) -> torch.Tensor:
        product, low = made or (base(x), F.linear(x, down))
        return functional.plus_low_rank(product, low * factor, up)

    y = kept[1].of((*given, factor, up), lambda: (added(kept[0].made(given)),))
    return y[0] if y is not None else added(_products(module, x, kept[0]))


def alone(module: Any) -> bool:
    """Whether a layer's experts are what is to be added to its base, and nothing else is."""
    return not (module.disable_adapters or module.merged) and list(module.active_adapters) == [ADAPTER]


def bare(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer that nobody hooked, so that its weight may be used in its stead.

    Offloading brings weights to their device in hooks; quantisation has classes of its own.
    """
    hooked = module._forward_pre_hooks or module._forward_hooks or "forward" in module.__dict__
    return type(module) is nn.Linear and not hooked
