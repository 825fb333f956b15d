"""Teachers for data-free gate training: trajectories of single and blended experts, with what each predicted.

The teacher's own sampling already computes every target, so a trajectory is remembered with its targets and the
student trains on it without asking a teacher again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention

from mole_diffusers.functional import onto
from mole_diffusers.mixture import Mixture
from mole_diffusers.training.data import token_ids
from mole_diffusers.training.denoising import latent_shape, predict, training_scheduler
from mole_diffusers.training.losses import composed_target, territory
from mole_diffusers.training.study import triggers


@dataclass
class Memory:
    """Rows to learn from: the student at `x`, `timesteps`, `prompts` should predict `targets`.

    `norms` [S] holds the expected squared change from base to teacher, by source and timestep.
    """

    x: torch.Tensor  # [S, C, H, W]
    timesteps: torch.Tensor  # [S]
    targets: torch.Tensor  # [S, C, H, W]
    norms: torch.Tensor  # [S]
    prompts: list[str]

    @staticmethod
    def join(parts: Sequence[Memory]) -> Memory:
        """All rows, in order."""
        names = ("x", "timesteps", "targets", "norms")
        tensors = {name: torch.cat([getattr(p, name) for p in parts]) for name in names}
        return Memory(**tensors, prompts=[t for p in parts for t in p.prompts])


Teach = Callable[[torch.Tensor, torch.Tensor, list[str]], tuple[torch.Tensor, torch.Tensor]]


def single_teacher(pipe: Any, mixture: Mixture, expert: str) -> Teach:
    """(x, timesteps, prompts) -> (prediction with `expert` alone at its strength, prediction of the base)."""

    def teach(x: torch.Tensor, timesteps: torch.Tensor, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        with mixture.fixed({}):
            base = predict(pipe, x, timesteps, prompts)
        with mixture.fixed({expert: mixture.strength(expert)}):
            return predict(pipe, x, timesteps, prompts), base

    return teach


def base_teacher(pipe: Any, mixture: Mixture) -> Teach:
    """(x, timesteps, prompts) -> (prediction of the base, prediction with every expert at its strength)."""

    def teach(x: torch.Tensor, timesteps: torch.Tensor, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        with mixture.fixed({name: mixture.strength(name) for name in mixture.experts}):
            everything = predict(pipe, x, timesteps, prompts)
        with mixture.fixed({}):
            return predict(pipe, x, timesteps, prompts), everything

    return teach


def composed_teacher(pipe: Any, mixture: Mixture, styles: Sequence[str]) -> Teach:
    """(x, timesteps, prompts) -> (e_0 + sum_k s_k M_k (e_k - e_0), e_0).

    Experts in `styles` act everywhere. Two or more others share the picture by their own cross-attention to their
    trigger words; a single other one has all of it.
    """
    names = list(mixture.experts)
    subjects = [n for n in names if n not in styles]

    def teach(x: torch.Tensor, timesteps: torch.Tensor, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        with mixture.fixed({}):
            base = predict(pipe, x, timesteps, prompts)
        masks = {n: torch.ones(len(x), 1, *x.shape[2:], device=x.device) for n in names}
        predictions, maps = [], []
        for name in names:
            masked = name in subjects and len(subjects) > 1
            positions = trigger_tokens(pipe, mixture, name, prompts)[None] if masked else None
            with mixture.fixed({name: 1.0}), attention_maps(pipe.unet, x.shape[2:], positions) as seen:
                predictions.append(predict(pipe, x, timesteps, prompts))
            if positions is not None:
                maps.append(torch.stack(seen).mean(0)[0])
        if maps:
            masks |= dict(zip(subjects, territory(torch.stack(maps)), strict=True))
        strengths = onto(torch.tensor([mixture.strength(n) for n in names]), x.device)
        stacked = torch.stack([masks[n] for n in names])
        return composed_target(base, torch.stack(predictions), stacked, strengths), base

    return teach


def trigger_tokens(pipe: Any, mixture: Mixture, name: str, prompts: Sequence[str]) -> torch.Tensor:
    """[B, T] 1 where a prompt holds one of the expert's triggers, or else its name; an empty prompt counts everywhere.

    Raises ValueError for a prompt with words but without any trigger.
    """
    words = triggers(mixture, name)
    ids = token_ids(pipe, prompts)
    found = torch.zeros_like(ids, dtype=torch.float32)
    for row, (prompt, tokens) in enumerate(zip(prompts, ids.tolist(), strict=True)):
        for wanted in (pipe.tokenizer(t, add_special_tokens=False).input_ids for t in words):
            for start in range(len(tokens) - len(wanted) + 1):
                if tokens[start : start + len(wanted)] == wanted:
                    found[row, start : start + len(wanted)] = 1
        if not prompt:
            found[row] = 1
        elif not found[row].any():
            raise ValueError(f"the prompt {prompt!r} lacks every trigger of expert {name!r}: {words}")
    return onto(found, pipe.device)


@contextmanager
def attention_maps(unet: Any, size: Sequence[int], positions: torch.Tensor | None) -> Iterator[list[torch.Tensor]]:
    """Collect cross-attention to the tokens that positions [K, B, T] mark: maps [K, B, H, W] per layer, mean over heads.

    Queries and keys are read where their projections leave them, so any processor may do the attention.
    """
    seen: list[torch.Tensor] = []
    handles: list[Any] = []
    queries: dict[Any, torch.Tensor] = {}
    if positions is not None:
        crosses = [m for n, m in unet.named_modules() if n.endswith("attn2") and isinstance(m, Attention)]
        for attention in crosses:

            def keep(_: Any, __: Any, q: torch.Tensor, attention: Any = attention) -> None:
                queries[attention] = q

            def collect(_: Any, __: Any, k: torch.Tensor, attention: Any = attention) -> None:
                seen.append(_attention_map(attention, queries.pop(attention), k, positions=positions, size=size))

            handles += [attention.to_q.register_forward_hook(keep), attention.to_k.register_forward_hook(collect)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _attention_map(
    attention: Attention, query: torch.Tensor, key: torch.Tensor, *, positions: torch.Tensor, size: Sequence[int]
) -> torch.Tensor:
    """query [B, T, C], key [B, S, C], positions [K, B, S] -> [K, B, H, W]."""
    q, k = (x.float().unflatten(-1, (attention.heads, -1)).transpose(1, 2) for x in (query, key))  # [B, heads, ., c]
    shares = torch.softmax(q @ k.transpose(-1, -2) * attention.scale, -1).mean(1)  # [B, T, S]
    flat = torch.einsum("bts,kbs->kbt", shares, positions)
    height = round((flat.shape[2] * size[0] / size[1]) ** 0.5)
    return F.interpolate(flat.unflatten(2, (height, -1)), size=tuple(size), mode="bilinear")


@torch.no_grad()
def remember(
    pipe: Any, teach: Teach, prompts: Sequence[str], *, seeds: int, steps: int, guidance: float, seed: int
) -> Memory:
    """Sample `seeds` trajectories under the teacher, cycling through `prompts` (each gets one), and keep every row.

    Both rows of guidance are kept: an unmatched unconditional row would be amplified by it.
    """
    scheduler, device = training_scheduler(pipe), pipe.device
    seeds = max(seeds, len(prompts))
    scheduler.set_timesteps(steps, device=device)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(seeds, *latent_shape(pipe), generator=generator).to(device) * scheduler.init_noise_sigma
    texts = [prompts[i % len(prompts)] for i in range(seeds)]
    both = ["" for _ in texts] + texts
    rows = []
    for t in scheduler.timesteps:
        scaled = torch.cat([scheduler.scale_model_input(x, t)] * 2)
        timesteps = t.expand(2 * seeds)
        prediction, base = teach(scaled, timesteps, both)
        norm = (prediction - base).square().flatten(1).mean(1)  # [2B], unconditional rows first
        norm = norm.unflatten(0, (2, seeds)).mean(1).repeat_interleave(seeds)
        rows.append(Memory(scaled.cpu(), timesteps.cpu(), prediction.cpu(), norm.cpu(), both))
        empty, full = prediction.chunk(2)
        x = scheduler.step(empty + guidance * (full - empty), t, x, generator=generator).prev_sample
    return Memory.join(rows)
