"""The maths of retrieval: pure tensor functions. N LoRAs, P phrases, D width of the embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def centroid(vectors: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """LoraRetriever's E(phi), the mean embedding of a LoRA's samples, at unit length: [P, D] and weights [P] -> [D]."""
    return F.normalize((vectors * weights[:, None]).sum(0) / weights.sum(), dim=0)


def similarity(queries: torch.Tensor, loras: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine of each LoRA with its most similar phrase: [P, D] and [N, D] -> scores [N], index of that phrase [N].

    Each sum runs over one LoRA's row only. So adding LoRAs does not change the other scores by a single bit, unlike in a
    blocked matrix product.
    """
    scores = torch.stack([(loras * query).sum(-1) for query in queries])  # [P, N]
    best = scores.max(0)
    return best.values, best.indices


def top(scores: torch.Tensor, allowed: torch.Tensor, k: int, threshold: float) -> list[int]:
    """Indices of at most k allowed LoRAs that score `threshold` or more, best first; ties keep their order.

    scores [N], allowed [N] bool.
    """
    order = torch.argsort(scores, descending=True, stable=True)
    return order[allowed[order] & (scores[order] >= threshold)][:k].tolist()
