"""How a pipeline is put on a machine: device, precision, and what saves memory or time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

DTYPES = ("float32", "float16", "bfloat16")
OFFLOADS = ("none", "model", "sequential")
ROOM = 2 << 30  # bytes beside the weights that a picture takes, with its VAE on tiles
UNTILED = 6 << 30  # and with its VAE on the whole


@dataclass(frozen=True)
class Memory:
    """How a pipeline is put on a machine; what is None is chosen for it by `completed`.

    Attributes:
        device: "cpu", "cuda", "cuda:1", "mps", ...; by default a GPU where there is one.
        dtype: one of DTYPES; by default float32 on a CPU, on a GPU float16, or bfloat16 for Flux and SD 3.
        offload: one of OFFLOADS: what is in main memory while it is not used. "model": whole models; "sequential": single
            layers, slowly. By default the first that fits the GPU's free memory.
        slicing: attention is computed one head after the other, which takes less memory and more time.
        tiling: the VAE works on tiles of large pictures; by default on where the GPU's memory is short.
        compiled: the denoiser is compiled at the first picture, which takes minutes, and is faster from then on.
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

    def completed(self, kind: str, *, gpu: str | None = None) -> Memory:
        """With the device and the precision for a pipeline class of this name.

        Args:
            gpu: the device of this machine's GPU; None: what torch finds.

        Raises ValueError for offloading without a GPU.
        """
        device = self.device or gpu or _gpu() or "cpu"
        if device == "cpu" and self.offload not in (None, "none"):
            raise ValueError(
                f"offload {self.offload!r} keeps what is not used off the GPU, and there is none: device is cpu"
            )
        wide = kind.startswith(("Flux", "StableDiffusion3"))  # whose activations float16 cannot hold
        dtype = "float32" if device == "cpu" else "bfloat16" if wide else "float16"
        return replace(self, device=device, dtype=self.dtype or dtype)

    def check_device(self) -> None:
        """Raises ValueError where this machine does not have the device."""
        try:
            torch.empty(0, device=self.device or "cpu")
        except (RuntimeError, AssertionError) as error:  # both are torch's
            first = str(error).strip().splitlines()[0]
            raise ValueError(f"this machine has no device {self.device!r}: {first}") from error

    def fitted(self, sizes: dict[str, int], free: int | None) -> Memory:
        """With the offloading and tiling that weights of these sizes need.

        Args:
            sizes: model -> bytes.
            free: bytes on the GPU; None where that is not known, as on a CPU.
        """
        left = None if free is None else free - sum(sizes.values())
        if left is None or left >= ROOM:
            offload = "none"
        else:
            offload = "model" if max(sizes.values()) + ROOM <= (free or 0) else "sequential"
        offload = self.offload or offload
        tiling = offload != "none" or (left is not None and left < UNTILED)
        return replace(self, offload=offload, tiling=tiling if self.tiling is None else self.tiling)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The precision, as torch has it."""
        return getattr(torch, self.dtype or "float32")

    def __str__(self) -> str:
        saved = {"none": "", "model": "model offload", "sequential": "sequential offload"}[self.offload or "none"]
        flags = {"attention slicing": self.slicing, "VAE tiling": self.tiling, "compiled": self.compiled}
        return ", ".join(filter(None, [self.device, self.dtype, saved, *(name for name, on in flags.items() if on)]))


def place(pipe: Any, memory: Memory) -> Memory:
    """Put a loaded pipeline on its device as `memory`, completed, says; what was chosen in the end."""
    models = {name: model for name, model in pipe.components.items() if isinstance(model, torch.nn.Module)}
    sizes = {name: sum(p.nbytes for p in (*model.parameters(), *model.buffers())) for name, model in models.items()}
    device = memory.device or "cpu"
    free = torch.cuda.mem_get_info(torch.device(device))[0] if device.startswith("cuda") else None
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
        models["unet" if "unet" in models else "transformer"].compile()
    return memory


def release(pipe: Any) -> None:
    """Let go of a pipeline's weights. It draws no more; shapes, configs and tokenizers can still be read."""
    pipe.remove_all_hooks()  # of offloading
    for model in pipe.components.values():
        if isinstance(model, torch.nn.Module):
            model.to("meta")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _gpu() -> str | None:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else None
