"""What the training scripts of the emoji world share: a resumable loop with progress, and fp16 saving."""

import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from diffusers.utils import BaseOutput
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

WORK = Path(__file__).parents[1] / "work"  # checkpoints and encoded samples; not committed


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def small_attention() -> AbstractContextManager:
    """The plain attention kernel on a CPU, which trains a fifth faster than the fused one at this world's token counts."""
    return sdpa_kernel(SDPBackend.MATH) if device().type == "cpu" else nullcontext()


def in_bf16(unet: nn.Module) -> None:
    """Run the UNet in bf16, with inputs and outputs in fp32: a third faster, and the sampler stays exact."""

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return tuple(map(_half, args)), {name: _half(value) for name, value in kwargs.items()}

    def leave(module: nn.Module, args: tuple, out: tuple | BaseOutput) -> tuple | BaseOutput:
        return (out[0].float(),) if isinstance(out, tuple) else type(out)(out[0].float())

    unet.to(torch.bfloat16)
    unet.register_forward_pre_hook(enter, with_kwargs=True)
    unet.register_forward_hook(leave)


def _half(value: object) -> object:
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.bfloat16() if floating else value  # timesteps are whole numbers


class Ema:
    """Exponential moving average of a module's state, with a shorter memory in the first steps."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay, self.steps = decay, 0
        self.state = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                self.state[name].lerp_(value.detach(), 1 - decay)
            else:
                self.state[name].copy_(value)


def fit(
    name: str,
    module: nn.Module,
    loss_at: Callable[[int], torch.Tensor],
    *,
    steps: int,
    lr: float,
    decay: float = 0.995,
    every: int = 250,
) -> dict[str, torch.Tensor]:
    """Train `module` on `loss_at(step)` with AdamW and a cosine rate; returns the averaged weights.

    A checkpoint is written to work/NAME.pt every `every` steps and picked up again by the next run.
    """
    WORK.mkdir(exist_ok=True)
    path = WORK / f"{name}.pt"
    optimizer = torch.optim.AdamW(module.parameters(), lr, weight_decay=0.01, fused=True)
    ema, start, seconds = Ema(module, decay), 0, 0.0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        module.load_state_dict(saved["module"])
        optimizer.load_state_dict(saved["optimizer"])
        ema.state, ema.steps, start, seconds = saved["ema"], saved["step"], saved["step"], saved["seconds"]
    begun, average = time.time(), None
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=10)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, step / (0.03 * steps)) * (0.505 + 0.495 * math.cos(math.pi * step / steps))
        loss = loss_at(step)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(module)
        if step % 20 == 0:
            value = loss.item()
            average = value if average is None else 0.9 * average + 0.1 * value
            bar.set_postfix(loss=f"{average:.4f}", refresh=False)
        if (step + 1) % every == 0 or step + 1 == steps:
            spent = seconds + time.time() - begun
            state = {"module": module.state_dict(), "ema": ema.state, "step": step + 1, "seconds": spent}
            torch.save(state | {"optimizer": optimizer.state_dict()}, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").rename(path)
    if start < steps:
        note(name, steps=steps, minutes=round((seconds + time.time() - begun) / 60, 1), loss=average, device=str(device()))
    return ema.state


def note(name: str, **facts: object) -> None:
    """Print what a run took, and keep it in work/took.json."""
    path = WORK / "took.json"
    took = json.loads(path.read_text()) if path.exists() else {}
    took[name] = facts
    path.write_text(json.dumps(took, indent=1) + "\n")
    print(name, facts, flush=True)
