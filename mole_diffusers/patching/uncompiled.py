"""Run blocks that were compiled one by one without compilation, if hooks must do something that compiled code leaves out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from mole_diffusers.patching.runtime import Runtime
from mole_diffusers.patching.token_masks import TokenMasks
from mole_diffusers.patching.undo import Undo


def run_uncompiled(
    model: nn.Module, blocks: Sequence[nn.Module], runtime: Runtime, needed: Callable[[TokenMasks], bool], undo: Undo
) -> None:
    """Run `blocks` uncompiled in the calls of `model` that begin while `needed(masks)` is true."""
    compiled: list[tuple[nn.Module, Any]] = []  # the blocks of the running call, and their compiled calls

    def before(*_: object) -> None:
        masks = runtime.masks
        if torch.compiler.is_compiling() or masks is None or not needed(masks):
            return
        compiled[:] = [(each, call) for each in blocks if (call := getattr(each, "_compiled_call_impl", None)) is not None]
        for block, _ in compiled:
            block._compiled_call_impl = None

    def after(*_: object) -> None:
        for block, call in compiled:
            block._compiled_call_impl = call
        compiled.clear()

    undo.before_forward(model, before)
    undo.after_forward(model, after, always_call=True)
