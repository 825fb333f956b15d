"""Binding while sampling: which expert acts on which token of the texts and of the picture, right now."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from mole_diffusers import functional
from mole_diffusers.binding.config import Bound
from mole_diffusers.binding.regions import EVERYWHERE
from mole_diffusers.binding.words import Reading, joined, read
from mole_diffusers.functional import onto
from mole_diffusers.patching.picture_layout import Layout, PictureLayout, Side, sides
from mole_diffusers.patching.prompt_tokens import PromptTokens

CLOSING = 8.0  # what attention to a thing's words loses outside its region, in logits


class TokenMasks:
    """Masks per expert and token, from what the user bound, the texts' words and the layout of the picture.

    Args:
        bound: each expert's binding, in the order of the gates' columns.
        tokenizers: of each text encoder, by its name.
        changed: called when masks, or which experts are there, have changed.
    """

    def __init__(
        self, bound: Mapping[str, Bound], tokenizers: Mapping[str, Any], tokens: PromptTokens, changed: Callable[[], None]
    ):
        self.bound, self.tokenizers, self.tokens, self._changed = dict(bound), dict(tokenizers), tokens, changed
        self.closing = CLOSING
        self.picture: PictureLayout | None = None
        self.silent: tuple[bool, ...] = (False,) * len(bound)  # experts whose words no text has
        self.row_silent: torch.Tensor | None = None  # [B, N], where rows differ
        self.has_words = any(b.words for b in bound.values())  # else no text need be read
        self._encoding: torch.Tensor | None = None  # [B, T, N] bool, while a text encoder runs
        self._text: torch.Tensor | None = None  # [B, S, N] bool
        self._image: torch.Tensor | None = None  # [B, N, H, W]
        self._biases: dict[int, torch.Tensor] = {}  # tokens of the picture -> [B, T, S]
        self._made: dict[tuple, torch.Tensor | None] = {}
        self._last_text: torch.Tensor | None = None
        self._warned: set[str] = set()

    # ---- what layers ask

    @property
    def binds(self) -> bool:
        """Whether any expert is kept from any token."""
        return self._encoding is not None or self._text is not None or self._image is not None

    @property
    def has_regions(self) -> bool:
        """Whether any expert is kept to a part of the picture."""
        return self._image is not None

    @property
    def prompt_rows(self) -> list[int]:
        """For each row of the denoiser's text, the row whose prompt says what its picture shows."""
        return [] if self.picture is None else self.picture.prompt_of

    @property
    def text_tokens(self) -> int:
        """S, of the text that the denoiser reads; 0 where its words are not known."""
        return 0 if self._text is None else self._text.shape[1]

    def over_ranks(
        self, stream: str | None, low: torch.Tensor, segment: torch.Tensor, ranks: tuple[int, ...]
    ) -> torch.Tensor | None:
        """What multiplies A x of a layer beside the gate, in its shape; None where every expert acts on every token.

        Args:
            stream: which tokens the layer reads, see `placement.stream_of`.
            low: [B, R], [B, T, R] or [B, R, H, W].
            segment: [R], the expert of each rank; `ranks` [N] says how many each has.
        """
        if stream is None or low.dim() == 2 or (stream == "image" and self._image is None):
            return None
        key = stream, ranks, low.shape[0], low.shape[2:] if low.dim() == 4 else low.shape[1], low.dtype, low.device
        if key not in self._made:
            mask = self._mask(stream, low)
            self._made[key] = None if mask is None else functional.over_ranks(mask.to(low.device), segment, low)
        return self._made[key]

    def _mask(self, stream: str, low: torch.Tensor) -> torch.Tensor | None:
        """[B, T, N] for a layer whose tokens are those of `low`."""
        if stream == "text" and low.dim() == 3 and low.shape[1] != self.text_tokens:
            stream = "image"  # SD 3.5 calls a second attention of the picture what others call cross-attention
        if stream == "image":
            side = (low.shape[2], low.shape[3]) if low.dim() == 4 else self.side_of(low.shape[1])
            mask = None if side is None else self._image_tokens(side)
        elif stream == "joint":
            mask = self._joint(low.shape[1])
        else:
            mask = self._encoding if stream == "encoding" else self._text
            if mask is not None and mask.shape[1] != low.shape[1]:
                return None
        return None if mask is None else functional.rows_for_layer(mask, low.shape[0])

    def _image_tokens(self, side: Side) -> torch.Tensor | None:
        if self._image is None:
            return None
        return F.adaptive_avg_pool2d(self._image, side).flatten(2).transpose(1, 2)  # [B, T, N]

    def _joint(self, tokens: int) -> torch.Tensor | None:
        """Text, then picture."""
        if self._text is None or (side := self.side_of(tokens - self._text.shape[1])) is None:
            return None
        image = self._image_tokens(side)
        if image is None:
            image = torch.ones(len(self._text), tokens - self._text.shape[1], len(self.bound), device=self._text.device)
        return torch.cat([self._text.float(), image.to(self._text.device)], 1)

    def side_of(self, tokens: int) -> Side | None:
        """Height and width of a layer that has so many tokens of the picture; None where it has others."""
        whole = None if self.picture is None else self.picture.side
        return next((side for side in sides(whole) if side[0] * side[1] == tokens), None)

    def bias(self, tokens: int, rows: int) -> torch.Tensor | None:
        """[B, T, S], added to cross-attention's logits: words of a thing are closed outside its region. None: nothing is.

        Args:
            tokens: T.
            rows: B, of the layer; a film's frames are rows of their own there.
        """
        bias = self._biases.get(tokens)
        return None if bias is None or rows % bias.shape[0] else functional.resample_rows(bias, rows)

    def joint_bias(self, tokens: int, rows: int, picture: slice, text: slice) -> torch.Tensor | None:
        """The same for attention over text and picture together: [B, 1, tokens, tokens]."""
        bias = self.bias(tokens - self.text_tokens, rows)
        if bias is None:
            return None
        key = "joint bias", tokens, picture.start
        if key not in self._made:
            whole = bias.new_zeros(rows, 1, tokens, tokens)
            whole[:, 0, picture, text] = bias
            self._made[key] = whole
        return self._made[key]

    @property
    def reads_maps(self) -> bool:
        """Whether attention is to be read at this step."""
        return self.picture is not None and not torch.is_grad_enabled() and self.picture.wants_maps

    def add_maps(self, shares: torch.Tensor, rows: Sequence[int]) -> None:
        """Add what a layer attends to: shares [B, T, S] of its text's tokens, mean over heads, for these rows."""
        side = self.side_of(shares.shape[1])
        if self.picture is not None and side is not None:
            self.picture.add_maps(shares, side, rows)

    @property
    def layouts(self) -> list[Layout]:
        """The layouts of the pictures that are being drawn, or were drawn last, in their order."""
        return [] if self.picture is None else self.picture.layouts()

    # ---- texts

    def on_text(self, encoder: str, ids: torch.Tensor, device: torch.device) -> None:
        """A text encoder on `device` is about to read `ids` [B, T]."""
        if self.has_words:
            readings = self._readings([[(encoder, row)] for row in ids.tolist()])
            self._encoding = onto(self._own_tokens(readings), device)
            self._made = {key: mask for key, mask in self._made.items() if key[0] != "encoding"}
            self._set_silent([reading.said for reading in readings])

    def _readings(self, rows: Sequence[Sequence[tuple[str, list[int]]]], tokens: int = 0) -> list[Reading]:
        """A row is (encoder, its ids), ..., token after token; what is left of `tokens` has no words."""
        known: dict[tuple, Reading] = {}
        phrases = [bound.words for bound in self.bound.values()]
        readings = []
        for row in rows:
            key = tuple((encoder, *ids) for encoder, ids in row)
            if key not in known:
                texts = [read(ids, self.tokenizers[encoder], phrases) for encoder, ids in row]
                left = max(0, tokens - sum(len(ids) for _, ids in row))
                known[key] = joined([*texts, Reading(((False,) * left,) * len(phrases))] if left else texts)
            readings.append(known[key])
        return readings

    def _own_tokens(self, readings: Sequence[Reading]) -> torch.Tensor:
        """[B, T, N] bool: an expert acts on a text that has its words, but not on the words of others there.

        One that is to act everywhere acts on those, too.
        """
        bounds, rows = list(self.bound.values()), []
        everywhere = torch.tensor([not b.words and b.region == EVERYWHERE for b in bounds])
        for reading in readings:
            own = torch.tensor(reading.own).T  # [T, N]
            acts = torch.tensor([said or not _needs_words(b) for b, said in zip(bounds, reading.said, strict=True)])
            nobodys = ~own.any(1, keepdim=True)  # [T, 1]
            rows.append(acts & (own | nobodys | everywhere))
        return torch.stack(rows)

    def _set_silent(self, said: Sequence[Sequence[bool]]) -> None:
        """Experts whose words a text must have, and has not, are as at strength 0; `said` [B][N]: whose words it has."""
        bounds = list(self.bound.values())
        rows = [tuple(_needs_words(b) and not there for b, there in zip(bounds, row, strict=True)) for row in said]
        same = len(set(rows)) == 1
        silent = rows[0] if same else (False,) * len(bounds)
        row_silent = None if same else torch.tensor(rows)
        if silent != self.silent or row_silent is not None or self.row_silent is not None:
            self.silent, self.row_silent = silent, row_silent
            self._changed()

    # ---- the picture

    def begin(self) -> None:
        """A call of the pipeline begins: its text is read, and its layout is planned, anew."""
        self.picture, self._text, self._image, self._last_text = None, None, None, None
        self._made, self._biases = {}, {}
        self.silent, self.row_silent = (False,) * len(self.bound), None
        self._changed()

    def on_denoiser(
        self,
        text: torch.Tensor,
        side: Callable[[], Side | None],
        *,
        guided: int | None,
        frames: int = 1,
        active: Sequence[bool] = (),
    ) -> None:
        """The denoiser is about to run.

        Args:
            text: its states, [B, S, C].
            side: of the latents; None where it is not known, and nothing has a place.
            guided: rows of unconditional texts that come first; None where that is not known: a first half without any
                expert's words is taken for such.
            frames: rows of the text for each row of the latents.
            active: [N], the experts that the user wants to hear of if they are silent.
        """
        if not self._is_last(text):
            self._last_text = text.detach()
            self._begin_text(text, side(), guided, frames)
            for (name, bound), silent, wanted in zip(self.bound.items(), self.silent, active, strict=False):
                if silent and wanted:
                    self._warn(f"expert {name!r} is silent: the prompt has none of its words, {', '.join(bound.words)}")
        elif self.picture is not None and self.picture.can_plan:
            for warning in self.picture.plan():
                self._warn(warning)
            self._set_regions(text)

    def _is_last(self, text: torch.Tensor) -> bool:
        """Whether this is the text of the step before; hooks that cast or move it make a copy at every step."""
        last = self._last_text
        if last is None or last.shape != text.shape or last.device != text.device or torch.is_grad_enabled():
            return False
        return last.data_ptr() == text.data_ptr() or torch.equal(last, text)

    def _begin_text(self, text: torch.Tensor, side: Side | None, guided: int | None, frames: int) -> None:
        readings: list[Reading] = []
        found = self.tokens.rows(text) if self.has_words else None
        if found is not None:
            rows = [[(run.encoder, run.ids[i].tolist()) for run, i in row] for row in found]
            readings = self._readings(rows, tokens=text.shape[1])
        elif self.has_words:
            self._warn("the text's words are not known, since its states come from elsewhere: every expert acts everywhere")
        before, guided = self.picture, _guided(readings) if guided is None else guided
        self.picture = PictureLayout(self.bound, readings, guided=guided, frames=frames, side=side)
        if before is not None:
            self.picture.keep(before)
        self._text = onto(self._own_tokens(readings), text.device) if readings else None
        self._set_silent([readings[row].said for row in self.picture.prompt_of] or [[True] * len(self.bound)])
        self._set_regions(text)

    def _set_regions(self, text: torch.Tensor) -> None:
        """Masks of the picture, and what cross-attention's logits lose, by the regions that are known."""
        picture = self.picture
        image = None if picture is None else picture.expert_masks()
        self._image, self._biases = None if image is None else onto(image, text.device), {}
        if picture is not None and image is not None and picture.readings and self.closing:
            for side in sides(picture.side):
                bias = -self.closing * picture.closed_words(side)
                self._biases[side[0] * side[1]] = onto(bias.to(text.dtype), text.device)
        self._made = {key: mask for key, mask in self._made.items() if key[0] == "encoding"}
        self._changed()

    def _warn(self, message: str) -> None:
        """Once for each message."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=2)


def _needs_words(bound: Bound) -> bool:
    """Whether an expert is silent where a text has none of its words."""
    return bound.required and bool(bound.words)


def _guided(readings: Sequence[Reading]) -> int:
    """How many unconditional rows come first, to judge by the texts alone."""
    half = len(readings) // 2
    first, second = readings[:half], readings[half:]
    said = [any(reading.said) for reading in (*first, *second)]
    return half if len(readings) == 2 * half and not any(said[:half]) and all(said[half:]) else 0
