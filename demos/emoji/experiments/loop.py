"""Shared by the training scripts of the emoji world: a training loop that survives interruptions, and small helpers."""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from muon import MuonAndAdamW
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

WORK = Path(__file__).parent / "work"  # checkpoints and encoded samples; not committed
CHECKPOINT_SECONDS = 300


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def small_attention() -> AbstractContextManager:
    """Use the plain kernel on a CPU: at this world's token counts it trains a fifth faster than the fused one."""
    return sdpa_kernel(SDPBackend.MATH) if device().type == "cpu" else nullcontext()


def multiplies_bf16() -> bool:
    """Whether bfloat16 is faster here. A CPU that can only store it is three times slower with it than with float32."""
    able = torch.cpu.get_capabilities()
    return device().type != "cpu" or bool(able.get("amx_bf16") or able.get("avx512_bf16"))


def mixed_precision() -> AbstractContextManager:
    """bfloat16 autocast, if that is faster here."""
    return torch.autocast(device().type, torch.bfloat16) if multiplies_bf16() else nullcontext()


def to_tensor(images: Sequence[Image.Image]) -> torch.Tensor:
    """RGB pictures of the same size as [B, 3, H, W] in -1..1."""
    return torch.from_numpy(np.stack([np.asarray(i) for i in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


def save_whole(state: object, path: Path) -> None:
    """Write a temporary file, then rename it, so that there is never half a file, even after an interruption."""
    beside = path.with_suffix(".tmp")
    torch.save(state, beside)
    os.replace(beside, path)


class Ema:
    """Exponential moving average of parameters. Early steps average over the few there are."""

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


def constant_then_decay(step: int, *, steps: int, warmup: int, decay: int) -> float:
    """Share of the peak rate: a linear warm-up, the peak, and a linear descent to zero over the last `decay` steps.

    A run that stopped before the descent can be continued at the peak, with more `steps`.
    """
    return min(1.0, (step + 1) / warmup, max(0.0, (steps - step) / decay))


def cosine(step: int, *, steps: int, warmup: int) -> float:
    """Share of the peak rate: a linear warm-up, then half a cosine down to one hundredth."""
    return min(1.0, (step + 1) / warmup) * (0.505 + 0.495 * math.cos(math.pi * step / steps))


def fit(
    name: str,
    module: nn.Module,
    loss_at: Callable[[int], torch.Tensor],
    *,
    steps: int,
    lr: float,
    share: Callable[[int], float],
    decay: float = 0.995,
    generator: torch.Generator | None = None,
    optimizer: torch.optim.Optimizer | MuonAndAdamW | None = None,
) -> dict[str, torch.Tensor]:
    """Train `module` on `loss_at(step)` at `lr * share(step)`, with AdamW or `optimizer`. Returns the averaged weights.

    Every five minutes and at the end, this writes work/NAME.pt, with the optimiser and the random state of `generator`. The
    next run continues from it. Every half minute, a line goes to standard output and to work/NAME.log.
    """
    WORK.mkdir(exist_ok=True)
    path = WORK / f"{name}.pt"
    optimizer = optimizer or torch.optim.AdamW(module.parameters(), lr, weight_decay=0.01, fused=True)
    ema, start, seconds = Ema(module, decay), 0, 0.0
    if path.exists():
        saved = torch.load(path, weights_only=True, map_location=device())
        module.load_state_dict(saved["module"])
        optimizer.load_state_dict(saved["optimizer"])
        ema.state, ema.steps, start, seconds = saved["ema"], saved["step"], saved["step"], saved["seconds"]
        if generator is not None:
            generator.set_state(saved["generator"].cpu())
    begun = written = spoken = time.time()
    recent: list[torch.Tensor] = []
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * share(step)
        loss = loss_at(step)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(module)
        recent.append(loss.detach())
        now, last = time.time(), step + 1 == steps
        if now - spoken > 30 or last:
            average, each = torch.stack(recent).mean().item(), (now - spoken) / len(recent)
            _say(name, f"{step + 1}/{steps} loss {average:.4f} {each:.3f} s/step rate {lr * share(step):.1e}")
            recent, spoken = [], now
        if now - written > CHECKPOINT_SECONDS or last:
            state = {"module": module.state_dict(), "ema": ema.state, "step": step + 1, "seconds": seconds + now - begun}
            random = {} if generator is None else {"generator": generator.get_state()}
            save_whole(state | random | {"optimizer": optimizer.state_dict()}, path)
            written = now
    return ema.state


def _say(name: str, line: str) -> None:
    line = f"{time.strftime('%H:%M:%S')} {name} {line}"
    print(line, flush=True)
    with (WORK / f"{name}.log").open("a") as log:
        log.write(line + "\n")


def averaged(name: str) -> dict[str, torch.Tensor]:
    """The averaged weights in the last checkpoint of a run."""
    return torch.load(WORK / f"{name}.pt", weights_only=True, map_location="cpu")["ema"]


def updates(name: str) -> int:
    """The number of updates in the last checkpoint of a run."""
    return torch.load(WORK / f"{name}.pt", weights_only=True, map_location="cpu")["step"]


def note(name: str, **facts: object) -> None:
    """Print facts about a run, such as its results or its time, and keep them in work/took.json."""
    path = WORK / "took.json"
    took = json.loads(path.read_text()) if path.exists() else {}
    took[name] = facts
    WORK.mkdir(exist_ok=True)
    path.write_text(json.dumps(took, indent=1) + "\n")
    print(name, facts, flush=True)
