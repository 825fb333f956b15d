"""Between the CPU and a device."""

from __future__ import annotations

import torch


def onto(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on `device`, by a copy that waits for nothing.

    A plain `.to` to a CUDA card waits until the card has done all it was given; pinned memory is copied beside that.
    """
    if device.type == "mps" or torch.compiler.is_compiling():  # there such copies may come late; a graph pins no memory
        return tensor.to(device)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
