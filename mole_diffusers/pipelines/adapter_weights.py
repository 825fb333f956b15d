"""Weights in the form of diffusers' `set_adapters`: one number, or numbers per model and per block."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales

from mole_diffusers.lora import COMPONENTS
from mole_diffusers.patching.gating.settings import StrengthPlan


class AdapterWeights:
    """A strength schedule that never changes: a strength per expert, model and block; see `settings.StrengthPlan`.

    Args:
        names: the experts, in the order of the gates' columns.
        weights: expert -> {"text_encoder": 0.5, "unet": {"down": 0.9, "up": {"block_1": [0.2, 0.3]}}}. An expert, model
            or block that is not given has 1.
        unet: the UNet with these blocks; None if there is none.

    Attributes:
        weights: the same in plain numbers, ready for JSON.

    Warns of weights for anything but a model, as diffusers does. Raises ValueError for values that are not numbers, for
    weights that are not given by model, and in all cases where diffusers does for blocks that the UNet does not have.
    """

    def __init__(self, names: Sequence[str], weights: Mapping[str, Mapping[str, Any]], unet: Any):
        self.weights: dict[str, dict[str, Any]] = {name: _plain(given) for name, given in weights.items()}
        self._given = [self.weights.get(name, {}) for name in names]
        for name, given in self.weights.items():
            if not isinstance(given, Mapping):
                raise ValueError(f"the weights of {name!r} are by model, got {given!r}")
            for part, value in given.items():
                _check(name, part, value)
        blocks = [given["unet"] if isinstance(given.get("unet"), Mapping) else 1.0 for given in self._given]
        self._blocks = [1.0] * len(blocks) if unet is None else _maybe_expand_lora_scales(unet, blocks)

    def part(self, part: str) -> list[float]:
        """[N] factors of a model, "unet" or "text_encoder"."""
        found = [given.get(part, 1.0) for given in self._given]
        return [1.0 if value is None or isinstance(value, Mapping) else float(value) for value in found]

    def block(self, module: str) -> list[float]:
        """[N] factors of a module, "unet.down_blocks.1.attentions.0" or inside it."""
        component, _, name = module.partition(".")
        return [_of_block(scales, name) if component == "unet" else 1.0 for scales in self._blocks]

    def gates(self, place: str) -> None:
        """Replaces no gate."""


def weights_by_block(plan: StrengthPlan | None) -> dict[str, dict[str, Any]]:
    """Expert -> its weights by model and block, if `set_adapters` was given some."""
    return plan.weights if isinstance(plan, AdapterWeights) else {}


def _check(expert: str, part: str, value: Any) -> None:
    if isinstance(value, list):
        raise ValueError(f"the weight of {expert!r} for {part!r} must be a number, got {value}")
    if part not in COMPONENTS or (part != "unet" and isinstance(value, Mapping)):
        known = f"there is a number for each of {list(COMPONENTS)}, or numbers by block for 'unet'"
        warnings.warn(f"the weight of {expert!r} for {part!r} does not count: {known}", stacklevel=2)


def _plain(weights: Any) -> Any:
    if isinstance(weights, Mapping):
        return {str(key): _plain(value) for key, value in weights.items()}
    if isinstance(weights, list | tuple):
        return [_plain(value) for value in weights]
    if weights is not None and not math.isfinite(float(weights)):
        raise ValueError(f"a weight must be a finite number, got {weights}")
    return None if weights is None else float(weights)


def _of_block(scales: Any, module: str) -> float:
    if not isinstance(scales, Mapping):
        return 1.0
    return float(next((scale for block, scale in scales.items() if f"{module}.".startswith(f"{block}.")), 1.0))
