"""A text that the denoiser reads: which experts act on which tokens of text and picture, and which words are masked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F

from mole_diffusers import functional
from mole_diffusers.binding.picture_layout import PictureLayout, layer_size, layer_sizes
from mole_diffusers.binding.regions import GridSize
from mole_diffusers.functional import onto
from mole_diffusers.gates.unchanged import version
from mole_diffusers.patching.host.denoisers import Blocks

MASK_BIAS = 8.0  # attention to a subject's words loses this many logits outside its region
MOST_KEPT = 32 << 20  # bytes of a bias for each head
LayerCache = dict[tuple, torch.Tensor | None]  # masks and biases, by a layer's request


class Inactive(NamedTuple):
    """The experts whose words are not in a text. They count as at strength 0."""

    experts: tuple[bool, ...]  # [N], those that are inactive in all rows
    rows: torch.Tensor | None = None  # [B, N] bool, if rows differ


@dataclass(frozen=True, eq=False)
class TextInput:
    """What the denoiser was called with: a text, for pictures of one size."""

    text: torch.Tensor  # its states, [B, S, C], which count as the same as long as nothing changes them
    version: int
    shape: torch.Size  # of the latents
    acting: tuple[bool, ...]  # [N], the experts that were on

    def may_be(self, text: torch.Tensor, latents: torch.Tensor, acting: tuple[bool, ...]) -> bool:
        """Whether this may be the input of such a call. In training every text is new."""
        alike = self.text.shape == text.shape and self.text.device == text.device and self.shape[1:] == latents.shape[1:]
        return alike and self.acting == acting and not torch.is_grad_enabled()

    def is_same(self, text: torch.Tensor) -> bool:
        """Whether this has the memory of a text, and nothing has changed it since."""
        return self.text.data_ptr() == text.data_ptr() and self.version == version(text)

    def is_copied(self, text: torch.Tensor) -> bool:
        """Whether a text is a copy of this, as offloading makes one at every step. Finding out waits for the device."""
        return self.text.data_ptr() != text.data_ptr() and torch.equal(self.text, text)


@dataclass(eq=False)
class BoundText:
    """A text that the denoiser reads, and everything that follows from it."""

    blocks: Blocks
    input: TextInput
    picture: PictureLayout
    acting_tokens: torch.Tensor | None  # [B, S, N] bool, the tokens that each expert acts on; None if all act on every token
    inactive: Inactive
    # The text whose experts and places this one takes over: a negative prompt that the denoiser reads in a separate call
    # names no expert, and takes over those of the prompt.
    prompt: BoundText | None = None
    region_masks: torch.Tensor | None = None  # [B, N, H, W] in 0..1, where each expert acts; None if all act everywhere
    biases: dict[int, torch.Tensor] = field(default_factory=dict)  # tokens of the picture -> [B, T, S], added to logits
    cache: LayerCache = field(default_factory=dict)  # what layers have asked for, until places change

    def make_masks(self) -> None:
        """Make the masks of places, and what masks words, from the places that the picture's layout knows now."""
        masks, device = self.picture.expert_masks(), self.input.text.device
        self.region_masks, self.biases, self.cache = None if masks is None else onto(masks, device), {}, {}
        if masks is not None and self.picture.readings:
            for latent_size in layer_sizes(self.picture.latent_size):
                bias = -MASK_BIAS * self.picture.masked_words(latent_size)
                self.biases[latent_size[0] * latent_size[1]] = onto(bias.to(self.input.text.dtype), device)

    def follow_prompt(self) -> None:
        """Take over the places that were decided for the prompt since then, if there were any."""
        if self.prompt is not None and self.region_masks is not self.prompt.region_masks:
            self.region_masks, self.cache = self.prompt.region_masks, {}

    def forget(self) -> None:
        """Drop what was made for each layer. It is made again from masks and biases, if the same text comes once more."""
        self.cache = {}

    # ---- what layers ask

    @property
    def binds(self) -> bool:
        """Whether any expert is kept off any token."""
        return self.acting_tokens is not None or self.region_masks is not None

    @property
    def rows(self) -> int:
        """B, if its words are known; else 0."""
        return len(self.picture.prompt_of)

    @property
    def tokens(self) -> int:
        """S."""
        return self.input.text.shape[1]

    def rows_among(self, tokens: int) -> int | None:
        """B, for a layer that gets the tokens of all rows one after the other; None for one that gets no tokens."""
        rows = len(self.input.text)
        return rows if self.blocks.is_joint and tokens > rows and tokens % rows == 0 else None

    def mask(self, token_type: str, low: torch.Tensor) -> torch.Tensor | None:
        """[B, T, N] for a layer whose tokens are those of `low`; None if its tokens are others."""
        tokens = low.shape[1]
        if token_type == "joint":
            return self._joint(tokens)
        if token_type == "text":
            added = (0, 0, 0, max(0, tokens - self.tokens))
            return None if self.acting_tokens is None else F.pad(self.acting_tokens, added, value=True)
        latent_size = (low.shape[2], low.shape[3]) if low.dim() == 4 else self.layer_size(tokens)
        return None if latent_size is None else self._place_tokens(latent_size)

    def _place_tokens(self, latent_size: GridSize) -> torch.Tensor | None:
        if self.region_masks is None:
            return None
        tokens = F.adaptive_avg_pool2d(self.region_masks, latent_size).flatten(2).transpose(1, 2)  # [B, T, N]
        if latent_size != self.picture.latent_size:
            return tokens
        return F.pad(tokens, (0, 0, 0, self._tokens_of_pictures(latent_size) - tokens.shape[1]), value=1.0)

    def _tokens_of_pictures(self, latent_size: GridSize) -> int:
        """The number of tokens of the picture of this side, with its padding, and of given pictures behind it."""
        own = latent_size[0] * latent_size[1]
        given = self.input.shape[1] - own if len(self.input.shape) == 3 else 0
        return self.blocks.tokens_of(latent_size) + given

    def _joint(self, tokens: int) -> torch.Tensor | None:
        """Text and picture, in the order of attention."""
        if not self.binds or tokens <= self.tokens:
            return None
        latent_size = self.layer_size(tokens - self.tokens)
        acts, image = self.acting_tokens, None if latent_size is None else self._place_tokens(latent_size)
        rows, experts = len(self.input.text) if acts is None else len(acts), len(self.input.acting)
        if acts is None:
            acts = self.input.text.new_ones(rows, self.tokens, experts, dtype=torch.bool)
        if image is None:
            image = self.input.text.new_ones(rows, tokens - self.tokens, experts, dtype=torch.float32)
        both = [acts.float(), functional.rows_for_layer(image, rows).to(acts.device)]
        return torch.cat(both if self.blocks.attention == "text first" else both[::-1], 1)

    def layer_size(self, tokens: int) -> GridSize | None:
        """Height and width of a layer with this many tokens of the picture; None if its tokens are others."""
        latent_size = self.picture.latent_size
        if latent_size is not None and self._tokens_of_pictures(latent_size) == tokens:
            return latent_size
        return layer_size(tokens, latent_size)

    def bias(self, tokens: int, rows: int) -> torch.Tensor | None:
        """[B, T, S], added to cross-attention's logits: words of a subject are masked outside its region. None: no word is
        closed. In a layer, a video's frames are separate rows.
        """
        bias = self.biases.get(tokens)
        if bias is None or (rows > len(bias) and rows % len(bias)):
            return None
        return functional.rows_for_layer(bias, rows)

    def bias_of_heads(self, tokens: int, rows: int, heads: int, dtype: torch.dtype) -> torch.Tensor | None:
        """The same for each head, [B heads, T, S], which diffusers would otherwise repeat at each step. If that would be
        large, it is not repeated here.
        """
        key = "bias of heads", tokens, rows, heads, dtype
        if key not in self.cache:
            bias = self.bias(tokens, rows)
            if bias is not None and heads * bias.numel() * dtype.itemsize <= MOST_KEPT:
                bias = bias.to(dtype).repeat_interleave(heads, 0)
            self.cache[key] = bias
        return self.cache[key]

    def apart(self, tokens: int) -> tuple[slice, slice] | None:
        """The picture's tokens and the text's in attention over so many; None if that is not over both."""
        if (latent_size := self.picture.latent_size) is None:
            return None
        if tokens != self._tokens_of_pictures(latent_size) + self.tokens:
            return None
        return self.blocks.apart(latent_size[0] * latent_size[1], self.tokens, self.blocks.tokens_of(latent_size))

    def joint_bias(self, tokens: int, rows: int) -> torch.Tensor | None:
        """The same for attention over text and picture together, [B, 1, tokens, tokens]; None for any other attention."""
        if (apart := self.apart(tokens)) is None:
            return None
        picture, text = apart
        bias = self.bias(picture.stop - picture.start, rows)
        if bias is None:
            return None
        key = "joint bias", tokens, rows
        if key not in self.cache:
            whole = bias.new_zeros(rows, 1, tokens, tokens)
            whole[:, 0, picture, text] = bias
            self.cache[key] = whole
        return self.cache[key]
