"""Put a pipeline on a machine: its device, its precision, and options that save memory or time."""

from __future__ import annotations

import math
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mole_diffusers import denoiser

DTYPES = ("float32", "float16", "bfloat16")
OFFLOADS = ("none", "model", "sequential")
ROOM = 2 << 30  # bytes that a picture takes besides the weights, with a tiled VAE
UNTILED = 6 << 30  # the same without tiling


@dataclass(frozen=True)
class Memory:
    """How a pipeline is put on a machine. `completed` and `fitted` choose what is None.

    Attributes:
        device: cpu, cuda, cuda:1, mps, ... Default: a GPU if there is one.
        dtype: float32, float16 or bfloat16. Default: float32 on a CPU; on a GPU bfloat16 for Flux and SD 3, else float16.
        offload: what waits in main memory until it is used: none, model (whole models) or sequential (single layers,
            which is slow). Default: the first that fits into the GPU's free memory.
        slicing: compute attention head by head: less memory, more time.
        tiling: decode large pictures in tiles. Default: if the GPU's memory is short.
        compiled: compile the model: the first picture takes minutes, later ones are faster.
    """

    device: str | None = None
    dtype: str | None = None
    offload: str | None = None
    slicing: bool = False
    tiling: bool | None = None
    compiled: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (("dtype", self.dtype, DTYPES), ("offload", self.offload, OFFLOADS)):
            if value not in (None, *known):
                raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")

    def completed(self, kind: str) -> Memory:
        """The same with device and precision filled in, for a pipeline class of this name.

        Raises ValueError for offloading without a GPU.
        """
        found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        device = self.device or found
        if device == "cpu" and self.offload not in (None, "none"):
            raise ValueError(
                f"offload {self.offload!r} keeps what is not used off the GPU, and there is none: device is cpu"
            )
        wide = kind.startswith(("Flux", "StableDiffusion3"))  # float16 cannot hold their activations
        dtype = "float32" if device == "cpu" else "bfloat16" if wide else "float16"
        return replace(self, device=device, dtype=self.dtype or dtype)

    def check_device(self) -> None:
        """Raises ValueError if this machine does not have the device."""
        try:
            torch.empty(0, device=self.device or "cpu")
        except (RuntimeError, AssertionError) as error:  # torch raises both
            first = str(error).strip().splitlines()[0]
            raise ValueError(f"this machine has no device {self.device!r}: {first}") from error

    def fitted(self, sizes: Sequence[int], free: float) -> Memory:
        """The same with the offloading and tiling that models of these sizes need.

        Args:
            sizes: bytes of each model's weights.
            free: free bytes on the GPU; infinity if that is not known, as on a CPU.
        """
        left = free - sum(sizes)
        offload = self.offload or ("none" if left >= ROOM else "model" if max(sizes) + ROOM <= free else "sequential")
        tiling = offload != "none" or left < UNTILED
        return replace(self, offload=offload, tiling=tiling if self.tiling is None else self.tiling)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The precision as a torch dtype."""
        return getattr(torch, self.dtype or "float32")

    def __str__(self) -> str:
        saved = "" if self.offload in (None, "none") else f"{self.offload} offload"
        flags = {"attention slicing": self.slicing, "VAE tiling": self.tiling, "compiled": self.compiled}
        return ", ".join(filter(None, [self.device, self.dtype, saved, *(name for name, on in flags.items() if on)]))


def place(pipe: Any, memory: Memory) -> Memory:
    """Put a loaded pipeline on its device. `memory` must be completed. Returns the settings that were used in the end."""
    models = [model for model in pipe.components.values() if isinstance(model, torch.nn.Module)]
    sizes = [sum(p.nbytes for p in (*model.parameters(), *model.buffers())) for model in models]
    device = memory.device or "cpu"
    free = torch.cuda.mem_get_info(torch.device(device))[0] if device.startswith("cuda") else math.inf
    memory = memory.fitted(sizes, free)
    if memory.offload == "model":
        pipe.enable_model_cpu_offload(device=memory.device)
    elif memory.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=memory.device)
    else:
        pipe.to(memory.device)
    if memory.slicing:
        pipe.enable_attention_slicing()
    if memory.tiling:
        pipe.vae.enable_tiling()
    if memory.compiled:
        model: Any = denoiser(pipe)
        if model._repeated_blocks:  # compiled as one graph, it would keep no LoRA to its words or place
            model.compile_repeated_blocks()
        else:
            model.compile()
    return memory


def release(pipe: Any) -> None:
    """Free a pipeline's weights. It cannot draw any more, but shapes, configs and tokenizers can still be read."""
    pipe.remove_all_hooks()  # they move the weights when offloading
    for model in pipe.components.values():
        if isinstance(model, torch.nn.Module):
            model.to("meta")
    torch.cuda.empty_cache()


def clear_frames(error: BaseException | None) -> None:
    """Free what the frames of an error and of its causes hold, such as the weights of a half-opened model."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    torch.cuda.empty_cache()
