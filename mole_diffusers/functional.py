"""The maths of a mixture as tensor functions. B batch, T tokens, C channels, R summed rank, N experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F

Mean = Callable[[torch.Tensor], torch.Tensor]
Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # softmax [B, E], what top-k kept of it, mask [E] or [B, E]
TOTALS = ("1", "N", "sigmoid", "linear")
LEAST = 0.05  # the smallest weight that logits are made for


def gate_weights(logits: torch.Tensor, mask: torch.Tensor | None, total: str) -> torch.Tensor:
    """Gate weights over the experts that are present (eq. 11 of MoLE, Wu et al., 2024). Its masked mode is the same softmax.

    Args:
        logits: [..., N], already divided by the temperature.
        mask: [N] bool, the experts that are present and active; [B, N] if rows of the batch have different experts; None
            if all are present.
        total: "1": softmax. "N": softmax times the number of experts in `mask`, so that equal logits give the plain sum.
            "sigmoid": 2 * sigmoid, independent, in 0..2. "linear": 1 + logits, free in sign and size.

    Returns:
        [..., N], zero outside `mask`.
    """
    if total not in TOTALS:
        raise ValueError(f"unknown total {total!r}; known: {list(TOTALS)}")
    mask = over_tokens(mask, logits) if mask is not None else None
    if total in ("sigmoid", "linear"):
        weights = 2 * torch.sigmoid(logits) if total == "sigmoid" else 1 + logits
        return weights if mask is None else weights * mask
    if mask is None:
        weights = torch.softmax(logits, -1)
        return weights if total == "1" else weights * logits.shape[-1]
    # The lowest finite number, not -inf: an empty mask gives zeros instead of NaN, without a branch on device data.
    weights = torch.softmax(torch.where(mask, logits, torch.finfo(logits.dtype).min), -1)
    return weights * (mask.sum(-1, keepdim=True) if total == "N" else mask)


def logits_for(weights: torch.Tensor, total: str) -> torch.Tensor:
    """Logits whose `gate_weights` are `weights`, [..., N] -> [..., N]: exact for "linear", otherwise as near as possible.

    A softmax only reaches positive weights with a fixed sum, so "1" and "N" keep only the ratios of the weights.
    "sigmoid" reaches weights between 0 and 2. Weights are clamped to at least `LEAST` (and for "sigmoid" to at most 2 -
    `LEAST`), so that the logits can still move.
    """
    if total == "linear":
        return weights - 1
    if total == "sigmoid":
        return torch.logit(weights.clamp(LEAST, 2 - LEAST) / 2)
    logits = weights.clamp_min(LEAST).log()
    return logits - logits.mean(-1, keepdim=True)


def among_largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """[...] bool: the `count` largest of the last axis; all of them if `count` is 0, or not below their number."""
    if not 0 < count < scores.shape[-1]:
        return torch.ones_like(scores, dtype=torch.bool)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(count, -1).indices, True)


def over_tokens(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Broadcast values per batch row over tokens: [N] or [B, N], made to fit `like`."""
    return rows[:, None] if rows.dim() == 2 and like.dim() == 3 else rows


def rows_per_prompt(table: torch.Tensor, batch: int, images: int) -> torch.Tensor:
    """Spread LoraRetriever's mapping matrix (Zhao et al., 2024) over a batch in diffusers' order: [b, N] -> [batch, N].

    Pictures of one prompt are neighbours, and guidance repeats the whole batch, so unconditional rows get their prompt's
    set.
    """
    rows = table.repeat_interleave(images, 0)  # [b * images, N]
    if batch % len(rows):
        raise ValueError(f"sets for {len(table)} prompts x {images} pictures do not divide a batch of {batch} rows")
    return rows.repeat(batch // len(rows), 1)


def as_tokens(x: torch.Tensor) -> torch.Tensor:
    """[B, C], [B, T, C] or [B, C, H, W] -> [B, T, C]."""
    if x.dim() == 4:
        return x.flatten(2).transpose(1, 2)
    return x if x.dim() == 3 else x[:, None]


def pooled(hidden: torch.Tensor) -> torch.Tensor:
    """Mean over tokens in fp32: [B, T, C] -> [B, C], for any number of tokens."""
    return hidden.mean(1, dtype=torch.float32)


def flattened(hidden: torch.Tensor) -> torch.Tensor:
    """Eq. 10 of MoLE: [B, T, C] -> [B, T * C]. Tied to one number of tokens."""
    return hidden.flatten(1)


def expert_outputs(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, ranks: Sequence[int]) -> torch.Tensor:
    """Each expert's own output side by side, eq. 9 of MoLE: x [B, T, Cin] -> [B, T, N * Cout].

    `down` [R, Cin] and `up` [Cout, R] are the stacked experts; `ranks` says how R divides among the N experts.
    """
    hidden = F.linear(x, down).split(list(ranks), -1)  # N x [B, T, r]
    return torch.cat([F.linear(h, u) for h, u in zip(hidden, up.split(list(ranks), 1), strict=True)], -1)


def over_ranks(weights: torch.Tensor, expert_index: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """Expert weights [N], [B, N] or [B, T, N] -> a factor that multiplies `like`.

    Args:
        expert_index: [R], the expert of each rank; None if the weights are already per rank.
        like: [B, R], [B, T, R] or [B, R, H, W], whose tokens are the H x W places, row by row.
    """
    # [R], [B, R] or [B, T, R]
    factor = (weights if expert_index is None else weights.index_select(-1, expert_index)).to(like.dtype)
    if factor.dim() == 3:
        if like.dim() == 4:
            return factor.transpose(1, 2).reshape(*factor.shape[::2], *like.shape[2:])  # [B, R, H, W]
        return factor if like.dim() == 3 else factor[:, 0]
    if like.dim() == 4:
        return factor[..., None, None]  # [R, 1, 1] or [B, R, 1, 1]
    return factor[:, None] if factor.dim() == 2 and like.dim() == 3 else factor


def over_rows(weights: torch.Tensor, expert_index: torch.Tensor | None, low: torch.Tensor, batch: int) -> torch.Tensor:
    """The same for the rows `low` [B T, R] of a batch of B, in as few operations as there are. Returns [R] or [B T, R]."""
    tokens = len(low) // batch
    if weights.dim() == 2:
        rows, weights = _sample_of_row(batch, tokens, low.device), weights.to(low.dtype)
        return weights[rows[:, 0]] if expert_index is None else weights[rows, expert_index]
    factor = (weights if expert_index is None else weights.index_select(-1, expert_index)).to(low.dtype)  # [R] or [B, T, R]
    if factor.dim() == 1:
        return factor
    return (factor if factor.shape[1] == tokens else factor.expand(-1, tokens, -1)).flatten(0, 1)


@lru_cache(maxsize=32)
def _sample_of_row(batch: int, tokens: int, device: torch.device) -> torch.Tensor:
    """[B T, 1] -> index of the sample that each row belongs to."""
    with torch.inference_mode(False):
        return torch.arange(batch, device=device).repeat_interleave(tokens)[:, None]


def by_expert(values: torch.Tensor, expert_index: torch.Tensor, experts: int) -> torch.Tensor:
    """Mean over each expert's ranks: [..., R] -> [..., N], 0 for an expert without ranks. `expert_index` [R] as in
    `over_ranks`.
    """
    sums = values.new_zeros(*values.shape[:-1], experts).index_add(-1, expert_index, values)
    # bincount would wait for the device
    counts = expert_index.new_zeros(experts).index_add(0, expert_index, torch.ones_like(expert_index))
    return sums / counts.clamp_min(1)


def add_low_rank(
    result: torch.Tensor, low: torch.Tensor, factor: torch.Tensor, up: torch.Tensor, *, keeps: bool = False
) -> torch.Tensor:
    """result + (factor * low) up^T. Without gradients it overwrites `result` and `low`, if their dtypes match.

    Args:
        result: W x, [B T, Cout].
        low: A x, [B T, R].
        factor: [R], [B T, R], [B, 1, R] or [B, T, R].
        up: B, [Cout, R].
        keeps: `result` and `low` stay as they are.
    """
    tokens = low if factor.dim() < 3 else low.view(factor.shape[0], -1, low.shape[1])  # [B, T, R]
    if result.dtype != up.dtype:  # autocast
        return result + F.linear((tokens * factor).view_as(low), up)
    if keeps or torch.is_grad_enabled():
        scaled = tokens * factor
        return torch.addmm(result, scaled if tokens is low else scaled.view_as(low), up.T)
    tokens.mul_(factor)
    return result.addmm_(low, up.T)


def low_rank(
    down: torch.Tensor, up: torch.Tensor, rank: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The nearest pair of lower rank to up @ down (Eckart-Young), without computing the product.

    Args:
        down: [R, Cin] or [R, Cin, k, k].
        up: [Cout, R] or [Cout, R, 1, 1].
        rank: None for the product itself, by its singular values.

    Returns:
        down [r, ...] and up [Cout, r, ...] with r at most `rank`, and all singular values of the product.
    """
    left, a = torch.linalg.qr(up.flatten(1))  # [Cout, R], [R, R]
    right, b = torch.linalg.qr(down.flatten(1).T)  # [Cin k k, R], [R, R]
    u, values, v = torch.linalg.svd(a @ b.T, full_matrices=False)
    u, root, v = u[:, :rank], values[:rank].sqrt(), v[:rank]
    small_down = (right @ (root[:, None] * v).T).T  # [r, Cin k k]
    small_up = left @ (u * root)  # [Cout, r]
    return small_down.reshape(-1, *down.shape[1:]), small_up.reshape(up.shape[0], -1, *up.shape[2:]), values


def resample_rows(values: torch.Tensor, batch: int) -> torch.Tensor:
    """Spread or thin rows [have, ...] evenly to [batch, ...].

    In some layers, a video's frames or an image's pixels are rows, one sample's after the other's.
    """
    have = values.shape[0]
    return values if have == batch else values[torch.arange(batch, device=values.device) * have // batch]


def rows_for_layer(values: torch.Tensor, batch: int) -> torch.Tensor:
    """The rows [have, ...] of a denoiser call as a layer inside it sees them: [batch, ...].

    More rows are frames or pixels. Fewer rows come from perturbed-attention guidance (Ahn et al., 2024), which splits
    the batch: the unperturbed rows come first, the perturbed ones last. With classifier-free guidance, the perturbed
    rows are less than half.
    """
    have = values.shape[0]
    if batch >= have:
        return resample_rows(values, batch)
    return values[:batch] if 2 * batch >= have else values[-batch:]


def entropy(weights: torch.Tensor) -> torch.Tensor:
    """Entropy of each gate in nats, 0 .. ln N: [..., N] -> [...]. Weights are first scaled to sum 1."""
    share = weights.abs() / weights.abs().sum(-1, keepdim=True).clamp_min(1e-12)
    return -(share * share.clamp_min(1e-12).log()).sum(-1)


def relative_shares(gates: Sequence[torch.Tensor], masks: Sequence[torch.Tensor]) -> torch.Tensor:
    """What each expert gets relative to an equal share, summed over blocks, and the number of these blocks: [2, N].

    Blocks are means over their rows. A row counts only for the experts in its mask, and only if these are two or more.

    Args:
        gates: per gated block [..., N], before the user's strengths. Negative weights count as 0.
        masks: per block [N] or [B, N] bool, the experts that are present and active.
    """
    totals = torch.zeros(())
    for weights, mask in zip(gates, masks, strict=True):
        there = over_tokens(mask & (mask.sum(-1, keepdim=True) > 1), weights).expand_as(weights)
        share = weights.clamp_min(0) / weights.clamp_min(0).sum(-1, keepdim=True).clamp_min(1e-8)
        relative = share * there * there.sum(-1, keepdim=True)  # 1 for each expert if they share equally
        totals = totals + torch.stack([relative, there.float()]).reshape(2, -1, there.shape[-1]).mean(1)
    return totals


def balance_loss(shares: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Eq. 14 of MoLE with a live gradient, minus its minimum N ln N: 0 if the experts share equally on average.

    The mean over blocks is taken before the log (q of eq. 15, here times N), so single blocks may specialise. (The
    authors' code detaches it, which leaves no gradient.) The fewer blocks an expert has, the more each of them moves its
    mean, and so the less weight its log has, down from 1. Thus equal shares are the minimum whichever blocks an expert
    has.

    Args:
        shares, blocks: [N] each, of `relative_shares`.
    """
    q = shares / blocks.clamp_min(1e-8)
    return -(blocks / blocks.max().clamp_min(1e-8) * q.clamp_min(1e-8).log()).sum()


def load_balance(routed: Sequence[Routed], over: Mean = lambda own: own) -> torch.Tensor:
    """MiLoRA's L_lb = E sum_i f_i p_i over the calls of one gate: 1 if E experts share evenly, E if one takes everything.

    p_i is expert i's mean probability, and f_i its mean share of what top-k keeps. With k = 1 that is how often it is
    chosen, as in the paper, and if all are kept it is p_i. Rows may have different experts, see
    `relative_shares`.

    Args:
        over: turns the mean over these calls into the mean over all, if other processes have the rest.
    """
    probabilities, kept, masks = zip(*routed, strict=True)
    load, rows = relative_shares(kept, masks)  # [E] each
    likely, _ = relative_shares(probabilities, masks)
    load, likely, rows = over(torch.stack([load, likely, rows]))
    return 1 + (load * likely / rows.clamp_min(1e-8) - rows).sum() / rows.sum().clamp_min(1e-8)


def onto(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`; a CPU tensor is copied without waiting.

    A plain `.to` to a CUDA device waits for all work in its queue. A copy from pinned memory runs beside that work.
    """
    # mps may copy late; a graph cannot pin memory
    if tensor.device.type != "cpu" or device.type == "mps" or torch.compiler.is_compiling():
        return tensor.to(device)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
