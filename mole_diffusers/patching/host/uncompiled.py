"""Run blocks that were compiled one by one without compilation, if hooks must do something that compiled code leaves out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from mole_diffusers.patching.hooks import AroundForward, Entered


class Uncompiled(AroundForward):
    """On a model: runs blocks uncompiled in the calls of the model that begin while `needed()` is true."""

    def __init__(self, entered: Entered, blocks: Sequence[nn.Module], needed: Callable[[], bool]):
        super().__init__(entered)
        self.blocks, self.needed = blocks, needed

    def enter(self, module: Any, stack: ExitStack) -> None:
        if torch.compiler.is_compiling() or not self.needed():
            return
        for block in self.blocks:
            if (call := getattr(block, "_compiled_call_impl", None)) is not None:
                stack.callback(setattr, block, "_compiled_call_impl", call)
                block._compiled_call_impl = None
