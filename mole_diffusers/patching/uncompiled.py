"""Run blocks that were compiled one by one without compilation, if hooks must do something that compiled code leaves out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from mole_diffusers.patching.runtime import Runtime
from mole_diffusers.patching.token_masks import TokenMasks
from mole_diffusers.patching.undo import Undo


class Uncompiled:
    """Calls of a model in which `blocks` run uncompiled while `needed(masks)` is true."""

    def __init__(self, runtime: Runtime, blocks: Sequence[nn.Module], needed: Callable[[TokenMasks], bool]):
        self.runtime, self.blocks, self.needed = runtime, blocks, needed
        self._calls: list[tuple[nn.Module, Any]] = []

    def install(self, model: nn.Module, undo: Undo) -> None:
        """Hook the calls of `model`. The undo step of each hook is recorded in `undo` before it."""
        undo.before_forward(model, self._before)
        undo.after_forward(model, self._after, always_call=True)

    def _before(self, *_: object) -> None:
        masks = self.runtime.masks
        if torch.compiler.is_compiling() or masks is None or not self.needed(masks):
            return
        found = [(block, call) for block in self.blocks if (call := getattr(block, "_compiled_call_impl", None)) is not None]
        self._calls = found
        for block, _ in found:
            block._compiled_call_impl = None

    def _after(self, *_: object) -> None:
        for block, call in self._calls:
            block._compiled_call_impl = call
        self._calls = []
