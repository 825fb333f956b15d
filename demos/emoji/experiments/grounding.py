"""A loss that makes each place of a picture look at the words of the subject that stands there.

Without it the base leaves subjects out: in about half of the pictures of three, one is drawn twice and another not at all,
even if denoising starts from a noisy picture that shows all three. TokenCompose (Wang et al., CVPR 2024) trains
cross-attention with the places of the named things; this is its idea, as a cross-entropy between the subjects.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from latents import Placed
from transformers import CLIPTokenizer

from mole_world.captions import article
from mole_world.scenes import Box


class Watched:
    """Cross-attention as diffusers computes it. It appends its probabilities [B, N, T], averaged over heads, to a list."""

    def __init__(self, looks: list[torch.Tensor]):
        self.looks = looks

    def __call__(
        self, attn: Attention, x: torch.Tensor, encoder_hidden_states: torch.Tensor, attention_mask: None = None
    ) -> torch.Tensor:
        def heads(value: torch.Tensor) -> torch.Tensor:  # [B, N, C] -> [B, heads, N, C / heads]
            return value.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q, k, v = heads(attn.to_q(x)), heads(attn.to_k(encoder_hidden_states)), heads(attn.to_v(encoder_hidden_states))
        seen = (q @ k.transpose(-1, -2) * attn.scale).softmax(-1)  # [B, heads, N, T]
        self.looks.append(seen.float().mean(1))
        return attn.to_out[1](attn.to_out[0]((seen @ v).transpose(1, 2).flatten(-2)))


@contextmanager
def watched(unet: UNet2DConditionModel) -> Iterator[list[torch.Tensor]]:
    """Inside, each call of the UNet appends a [B, N, T] for each of its cross-attentions to the list."""
    looks: list[torch.Tensor] = []
    before = dict(unet.attn_processors)
    unet.set_attn_processor({name: Watched(looks) if "attn2" in name else own for name, own in before.items()})
    try:
        yield looks
    finally:
        unet.set_attn_processor(before)


def tokens_of(ids: Sequence[int], subject: str, tokenizer: CLIPTokenizer) -> list[int]:
    """Where a caption's tokens name a subject. The article keeps "a dog" out of "a hot dog"."""
    phrase = tokenizer(article(subject)).input_ids[1:-1]
    starts = [i for i in range(len(ids) - len(phrase) + 1) if list(ids[i : i + len(phrase)]) == phrase]
    return [i + j for i in starts[:1] for j in range(1, len(phrase))]


def grounding_loss(
    looks: Sequence[torch.Tensor],
    ids: torch.Tensor,
    placed: Sequence[Placed],
    tokenizer: CLIPTokenizer,
    size: tuple[int, int],
) -> torch.Tensor:
    """Mean cross-entropy: of the attention that a place in a subject's box pays to all subjects, how much is its own?

    Args:
        looks: attention probabilities [B, N, T] of each layer.
        ids: token ids [B, T].
        placed: the subjects and boxes of each picture. A place in two boxes belongs to the front one. Pictures of one
            subject do not count.
        size: height and width of the canvas in pixels.
    """
    losses = []
    for b, found in enumerate(placed):
        row = ids[b].tolist()
        tokens = [tokens_of(row, subject, tokenizer) for subject, _ in found]
        if len(found) < 2 or not all(tokens):  # a caption that is cut off may not name the last one
            continue
        for each in looks:
            owner = owners([box for _, box in found], size, each.shape[1]).to(each.device)  # [N]
            paid = torch.stack([each[b][:, of_subject].sum(-1) for of_subject in tokens], -1)[owner >= 0]  # [P, S]
            losses.append(F.nll_loss((paid / paid.sum(-1, keepdim=True)).clamp_min(1e-4).log(), owner[owner >= 0]))
    return torch.stack(losses).mean() if losses else looks[0].new_zeros(())


def owners(boxes: Sequence[Box], size: tuple[int, int], count: int) -> torch.Tensor:
    """[count]: the last box that holds each place of a canvas, which is divided into `count` squares; -1 for none."""
    side = math.isqrt(size[0] * size[1] // count)  # pixels
    owner = torch.full((size[0] // side, size[1] // side), -1)
    for s, (width, x, y) in enumerate(boxes):
        owner[math.ceil(y / side) : (y + width) // side, math.ceil(x / side) : (x + width) // side] = s
    return owner.flatten()
