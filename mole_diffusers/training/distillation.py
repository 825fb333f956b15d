"""Objectives without pictures: gates learn to predict what single experts, their masked blend and the base predict.

A teacher's sampling already computes every target. So its trajectories are stored with their targets, and the gates
train on them without running the teacher again. Values are recovery errors: 0 is the teacher; 1 means an error as large
as the difference between base and teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention

from mole_diffusers.binding import words
from mole_diffusers.binding.picture_layout import layer_size
from mole_diffusers.binding.regions import AUTO, EVERYWHERE
from mole_diffusers.functional import onto
from mole_diffusers.mixture import Mixture
from mole_diffusers.patching.gating.cross_attention import cross_attentions
from mole_diffusers.patching.gating.settings import PlainSum
from mole_diffusers.patching.undo import undoing
from mole_diffusers.training.config import DistillationTerm, SeparateTerm
from mole_diffusers.training.context import LossFn, TrainingContext, require, triggers
from mole_diffusers.training.data import RandomBatch, token_ids
from mole_diffusers.training.denoising import predict, sample_latents
from mole_diffusers.training.latents import latent_shape
from mole_diffusers.training.losses import composed_target, recovery_error, separation_loss, territory
from mole_diffusers.training.networks import network, unet_of

# (x [B, C, H, W], timesteps [B], prompts) -> the prediction to match, and the one that counts as error 1
Teacher = Callable[[torch.Tensor, torch.Tensor, list[str]], tuple[torch.Tensor, torch.Tensor]]


# ---- objectives


def single(context: TrainingContext, term: DistillationTerm) -> LossFn:
    """L1: with the prompt of one concept, predict what its LoRA alone predicts."""
    stored = []
    for i, (name, prompts) in enumerate(require(context.data.singles, "single", "prompts for each expert").items()):
        teacher = sum_teacher(context.pipe, context.mixture, [name], unit=[])
        stored += sample_trajectories(context, teacher, prompts, term, seed=context.config.seed + i, name=name)
    return _match(context, stored)


def composed(context: TrainingContext, term: DistillationTerm) -> LossFn:
    """L2 and L3: with a composed prompt, predict the blend of the experts, subjects masked and styles everywhere."""
    prompts = list(require(context.data.composed, "composed", "composed prompts"))
    teacher = composed_teacher(context.pipe, context.mixture, context.data.styles)
    sizes = dict.fromkeys(prompts, (context.config.width, context.config.height))
    how: dict[str, Any] = {"sizes": sizes, "seed": context.config.seed + 99, "name": "the blend"}
    return _match(context, sample_trajectories(context, teacher, prompts, term, **how))


def base(context: TrainingContext, term: DistillationTerm) -> LossFn:
    """L4: with prompts that name no expert, predict what the base predicts. 1 is the change that the plain sum of
    experts makes.
    """
    prompts = require(context.data.plain, "base", "plain prompts")
    teacher = sum_teacher(context.pipe, context.mixture, [], unit=list(context.mixture.experts))
    rows = sample_trajectories(context, teacher, prompts, term, seed=context.config.seed + 199, name="the base")
    return _match(context, rows)


def separate(context: TrainingContext, term: SeparateTerm) -> LossFn:
    """L5: keep the cross-attention of different concepts' trigger words apart, in pictures of the current gates.

    Attention is read after a random number of steps.
    """
    pipe, prompts = context.pipe, list(require(context.data.composed, "separate", "composed prompts"))
    subjects = [name for name in context.mixture.experts if name not in context.data.styles]
    if len(subjects) < 2:
        raise ValueError(f"the separate term needs two experts that are no styles, got {subjects}")
    unet = unet_of(pipe, "the separate term")
    if (layers := len(cross_attentions(unet))) < 2:
        raise ValueError(f"the separate term compares 2 layers with cross-attention or more, and the UNet has {layers}")

    timesteps = network(pipe).noise(*context.composed_shape[1:], term.steps).timesteps

    def loss(batch: RandomBatch) -> torch.Tensor:
        texts = [prompts[i] for i in batch.choice(len(prompts))]
        noise = onto(batch.normal(*context.composed_shape), pipe.device)
        stop = int(torch.randint(0, term.steps, (), generator=batch.generator))
        with torch.no_grad():
            x = sample_latents(pipe, noise, texts, steps=term.steps, guidance=term.guidance, stop=stop)
        found = [trigger_tokens(pipe, context.mixture, name, texts) for name in subjects]
        with attention_maps(unet, x.shape[2:], torch.stack(found)) as maps:  # tokens [K, B, T]
            predict(pipe, x, onto(timesteps[stop].expand(len(x)), x.device), texts)
        return separation_loss(torch.stack(maps, 1))

    return loss


def _match(context: TrainingContext, stored: Sequence[TrajectoryStep]) -> LossFn:
    """The recovery error on random rows of stored trajectories. If these have several sizes, each update draws one."""
    by_shape: dict[torch.Size, list[TrajectoryStep]] = {}
    for row in stored:
        by_shape.setdefault(row.x.shape, []).append(row)
    sizes = list(by_shape.values())
    shares = torch.tensor([float(len(rows)) for rows in sizes])

    def loss(batch: RandomBatch) -> torch.Tensor:
        rows = sizes[int(torch.multinomial(shares, 1, generator=batch.generator)) if len(sizes) > 1 else 0]
        *tensors, prompts = zip(*(rows[i] for i in batch.choice(len(rows))), strict=True)
        x, timesteps, targets, norms = (onto(torch.stack(each), context.pipe.device) for each in tensors)
        inputs = with_and_without(x, timesteps, prompts)
        with bound_to_words(context.mixture):
            found = predict(context.pipe, *inputs)
        return recovery_error(found, *(each.transpose(0, 1).flatten(0, 1) for each in (targets, norms)))

    return loss


# ---- trajectories


class TrajectoryStep(NamedTuple):
    """A step of a sampled trajectory, on the CPU: at `x`, `timestep` and `prompt` the gates should predict `targets`."""

    x: torch.Tensor  # [C, H, W]
    timestep: torch.Tensor  # []
    targets: torch.Tensor  # [2, C, H, W], without the prompt and with it
    norms: torch.Tensor  # [2], the expected squared change from base to teacher, by trajectory set and timestep
    prompt: str


@torch.no_grad()
def sample_trajectories(
    context: TrainingContext,
    teacher: Teacher,
    prompts: Sequence[str],
    term: DistillationTerm,
    *,
    seed: int,
    name: str,
    sizes: Mapping[str, tuple[int | None, int | None]] | None = None,
) -> list[TrajectoryStep]:
    """Sample `term.seeds` trajectories of each size with a teacher, and keep every row.

    The trajectories cycle through `prompts`, and each prompt gets at least one. The prediction without the prompt is
    kept, too: guidance would amplify its error if it were not trained on.

    Args:
        seed: of the noise.
        name: of the teacher, next to the progress bar.
        sizes: width and height of prompts' pictures in pixels; by default those of the training data.
    """
    device = context.pipe.device
    sizes = context.data.sizes if sizes is None else sizes
    by_shape: dict[tuple[int, int, int], list[str]] = {}
    for prompt in prompts:
        by_shape.setdefault(latent_shape(context.pipe, *sizes.get(prompt, (None, None))), []).append(prompt)
    rows: list[TrajectoryStep] = []
    for shape, own in by_shape.items():
        seeds = max(term.seeds, len(own))
        texts = [own[i % len(own)] for i in range(seeds)]
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(seeds, *shape, generator=generator).to(device)
        noise = network(context.pipe).noise(*shape[1:], term.steps)
        for i in context.bar(range(len(noise.timesteps)), f"pictures of {name}"):
            timesteps = noise.timesteps[i].expand(seeds)
            prediction, base = teacher(*with_and_without(x, onto(timesteps, device), texts))
            targets = prediction.unflatten(0, (2, seeds)).transpose(0, 1)  # [S, 2, C, H, W]
            norms = (prediction - base).square().unflatten(0, (2, seeds)).flatten(1).mean(1).expand(seeds, 2)
            rows += map(TrajectoryStep, x.cpu(), timesteps, targets.cpu(), norms.cpu(), texts)
            empty, full = prediction.chunk(2)
            x = noise.step(empty + term.guidance * (full - empty), i, x)
    return rows


def with_and_without(
    x: torch.Tensor, timesteps: torch.Tensor, prompts: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """The inputs of `predict` under guidance: each row without its prompt, then each with it, [2B, ...].

    Binding treats them as it does in drawing: an expert that the prompt names also acts on the row without it.
    """
    return torch.cat([x, x]), torch.cat([timesteps, timesteps]), [*([""] * len(prompts)), *prompts]


# ---- teachers


@contextmanager
def bound_to_words(mixture: Mixture) -> Iterator[None]:
    """Binding without the places that are found while drawing, for teachers and gates alike."""
    own = mixture.binding or {}
    found = {name: replace(b, region=EVERYWHERE) if b.words and b.region == AUTO else b for name, b in own.items()}
    with mixture.bound(found or None):
        yield


@contextmanager
def alone(mixture: Mixture, strengths: Mapping[str, float]) -> Iterator[None]:
    """Only these experts act, at these strengths, whatever the gates say. Without any it is the base."""
    ones = PlainSum(len(mixture.experts))
    with bound_to_words(mixture), mixture.only(*strengths), mixture.strengths(strengths), mixture.parts.planned(ones):
        yield


def sum_teacher(pipe: Any, mixture: Mixture, experts: Sequence[str], *, unit: Sequence[str]) -> Teacher:
    """Predicts with exactly these experts at their strengths; error 1 is what those in `unit` predict."""

    def with_experts(names: Sequence[str], *inputs: Any) -> torch.Tensor:
        with alone(mixture, {name: mixture.strength(name) for name in names}):
            return predict(pipe, *inputs)

    return lambda *inputs: (with_experts(experts, *inputs), with_experts(unit, *inputs))


def composed_teacher(pipe: Any, mixture: Mixture, styles: Sequence[str]) -> Teacher:
    """Predicts e_0 + sum_k s_k M_k (e_k - e_0) for rows of `with_and_without`; error 1 is the base, e_0.

    Experts in `styles` act everywhere. If there are two or more others, they share the picture according to their
    cross-attention to their trigger words. A row without its prompt, which has no such words, is shared like the row
    with it. A single other one gets the whole picture.
    """
    names = list(mixture.experts)
    subjects = [i for i, name in enumerate(names) if name not in styles]
    divided = subjects if len(subjects) > 1 else []  # those that share the picture
    unet = unet_of(pipe, "the composed term of several subjects") if divided else None

    def predict_both(x: torch.Tensor, timesteps: torch.Tensor, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        with alone(mixture, {}):
            base = predict(pipe, x, timesteps, prompts)
        masks = torch.ones(len(names), len(x), 1, *x.shape[2:], device=x.device)
        predictions, maps = [], []
        for i, name in enumerate(names):
            reading: AbstractContextManager[list[torch.Tensor]] = nullcontext([])
            if i in divided:
                reading = attention_maps(unet, x.shape[2:], trigger_tokens(pipe, mixture, name, prompts)[None])
            with alone(mixture, {name: 1.0}), reading as layers:
                predictions.append(predict(pipe, x, timesteps, prompts))
            maps += [torch.stack(layers).mean(0)[0]] if layers else []
        if divided:
            prompted = torch.stack(maps).chunk(2, 1)[1]
            masks[divided] = territory(prompted.float()).repeat(1, 2, 1, 1, 1)
        strengths = onto(torch.tensor([mixture.strength(name) for name in names]), x.device)
        return composed_target(base, torch.stack(predictions), masks, strengths), base

    return predict_both


# ---- cross-attention


def trigger_tokens(pipe: Any, mixture: Mixture, name: str, prompts: Sequence[str]) -> torch.Tensor:
    """[B, T] 1 where a prompt has a trigger word of the expert; all 1 for an empty prompt.

    Raises ValueError for a prompt that is not empty and has none.
    """
    phrases, found = triggers(mixture, name), []
    for prompt, ids in zip(prompts, token_ids(pipe.tokenizer, prompts).tolist(), strict=True):
        own = words.read(ids, pipe.tokenizer, [phrases]).own[0] if prompt else (True,) * len(ids)
        if not any(own):
            raise ValueError(f"the prompt {prompt!r} lacks every trigger of expert {name!r}: {phrases}")
        found.append(own)
    return onto(torch.tensor(found, dtype=torch.float32), pipe.device)


@contextmanager
def attention_maps(unet: Any, size: Sequence[int], tokens: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Collect cross-attention to the tokens that `tokens` [K, B, T] marks: maps [K, B, H, W] per layer, mean over heads.

    Queries and keys are read from the outputs of their projections, so this works with any attention processor.
    """
    maps: list[torch.Tensor] = []
    queries: list[torch.Tensor] = []  # of the attention that is running, [B, T, C]

    def collect(attention: Attention, _: Any, __: Any, key: torch.Tensor) -> None:
        q, k = (x.float().unflatten(-1, (attention.heads, -1)).transpose(1, 2) for x in (queries.pop(), key))
        shares = torch.softmax(q @ k.transpose(-1, -2) * attention.scale, -1).mean(1)  # [B, T, S], over heads
        flat = torch.einsum("bts,kbs->kbt", shares, tokens)
        latent_size = layer_size(flat.shape[2], (size[0], size[1]))
        maps.append(F.interpolate(flat.unflatten(2, latent_size), size=tuple(size), mode="bilinear"))

    with undoing() as undo:
        for attention in cross_attentions(unet).values():
            undo.after_forward(attention.to_q, lambda _, __, query: queries.append(query))
            undo.after_forward(attention.to_k, partial(collect, attention))
        yield maps
