"""Run blocks that were compiled one by one without compilation, if hooks must do something that compiled code leaves out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import nn

from mole_diffusers.patching.gating.runtime import Runtime
from mole_diffusers.patching.gating.token_masks import TokenMasks
from mole_diffusers.patching.undo import Undo


def run_uncompiled(
    model: nn.Module, blocks: Sequence[nn.Module], runtime: Runtime, needed: Callable[[TokenMasks], bool], undo: Undo
) -> None:
    """Run `blocks` uncompiled in the calls of `model` that begin while `needed(masks)` is true."""

    def uncompile(stack: ExitStack) -> None:
        masks = runtime.masks
        if torch.compiler.is_compiling() or masks is None or not needed(masks):
            return
        for block in blocks:
            if (call := getattr(block, "_compiled_call_impl", None)) is not None:
                stack.callback(setattr, block, "_compiled_call_impl", call)
                block._compiled_call_impl = None

    runtime.around_forward(model, uncompile, undo)
