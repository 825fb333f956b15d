"""Binding while sampling: which expert acts on which token of the texts and of the picture, right now."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from mole_diffusers import functional
from mole_diffusers.binding import layout
from mole_diffusers.binding.config import Bound
from mole_diffusers.binding.regions import AUTO, EVERYWHERE, region_mask
from mole_diffusers.binding.words import Reading, Thing, joined, read
from mole_diffusers.functional import onto
from mole_diffusers.patching.prompt_tokens import PromptTokens

CLOSING = 8.0  # what attention to a thing's words loses outside its region, in logits
UNDECIDED = 0.02  # share of attention by which the best layout should be better than the next
MOST_THINGS = 8  # so many get places of their own

Side = tuple[int, int]  # height and width of the latents, or of what a layer has of them


@dataclass(frozen=True)
class Layout:
    """Who has which place in one picture.

    Attributes:
        regions: name of an expert, or a noun that no expert owns -> [H, W] in 0..1, in latent pixels. Experts that act in
            the whole picture are not there.
        maps: the same names -> [h, w], the attention to their words that the layout was planned from.
    """

    regions: dict[str, torch.Tensor]
    maps: dict[str, torch.Tensor]


@dataclass
class Picture:
    """The picture that is being drawn: a row per row of the denoiser's batch.

    Attributes:
        readings: of each row's text; none where it is not known.
        guided: so many rows come first that are unconditional.
        prompt_of: the row whose prompt says what is in each row's picture: unconditional rows borrow it, and the frames of a
            film have that of the first.
        side: of the latents; None where it is not known, and nothing has a place.
        maps: {row: [K, h, w]}, how much each thing's words are attended.
        regions: {row: (things, their regions [K, H, W])}, once they are planned.
    """

    readings: list[Reading] | None
    guided: int
    prompt_of: list[int]
    side: Side | None
    maps: dict[int, torch.Tensor] = field(default_factory=dict)
    regions: dict[int, tuple[list[Thing], torch.Tensor]] = field(default_factory=dict)


class TokenMasks:
    """Masks per expert and token, from what the user bound, the texts' words and the layout of the picture.

    Args:
        bound: each expert's binding, in the order of the gates' columns.
        tokenizers: of each text encoder, by its name.
        changed: called when masks or which experts are there have changed.
    """

    def __init__(
        self, bound: Mapping[str, Bound], tokenizers: Mapping[str, Any], tokens: PromptTokens, changed: Callable[[], None]
    ):
        self.bound, self.tokenizers, self.tokens, self._changed = dict(bound), dict(tokenizers), tokens, changed
        self.closing = CLOSING
        self.picture: Picture | None = None
        self.silent: tuple[bool, ...] = (False,) * len(bound)  # experts whose words no text has
        self.row_silent: torch.Tensor | None = None  # [B, N], where rows differ
        self._encoding: torch.Tensor | None = None  # [B, T, N] bool, while a text encoder runs
        self._text: torch.Tensor | None = None  # [B, S, N] bool
        self._image: torch.Tensor | None = None  # [B, N, H, W]
        self._biases: dict[int, torch.Tensor] = {}  # tokens of the picture -> [B, T, S]
        self._dtype = torch.float32  # of the text
        self._made: dict[tuple, torch.Tensor | None] = {}
        self._last_text: torch.Tensor | None = None
        self._warned: set[str] = set()

    # ---- what layers ask

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
        if self.picture is None or self.picture.side is None:
            return None
        return next((side for side in _sides(self.picture.side) if side[0] * side[1] == tokens), None)

    # ---- texts

    def on_text(self, encoder: str, ids: torch.Tensor, device: torch.device) -> None:
        """A text encoder on `device` is about to read `ids` [B, T]."""
        if not self._has_words:
            return
        readings = self._readings([[(encoder, row)] for row in ids.tolist()])
        own = self._own_tokens(readings)
        self._encoding = None if own is None else onto(own, device)
        self._made = {key: mask for key, mask in self._made.items() if key[0] != "encoding"}
        self._set_silent(readings, list(range(len(readings))))

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

    def _own_tokens(self, readings: Sequence[Reading]) -> torch.Tensor | None:
        """[B, T, N] bool: an expert acts on a text that has its words, but not on the words of others there.

        One that is to act everywhere acts on those, too. None: every expert acts on every token.
        """
        if not self._has_words:
            return None
        bounds, rows = list(self.bound.values()), []
        everywhere = torch.tensor([not b.words and b.region == EVERYWHERE for b in bounds])
        for reading in readings:
            own = torch.tensor(reading.own).T  # [T, N]
            acts = torch.tensor(
                [said or not b.words or not b.required for b, said in zip(bounds, reading.said, strict=True)]
            )
            nobodys = ~own.any(1, keepdim=True)  # [T, 1]
            rows.append(acts & (own | nobodys | everywhere))
        return torch.stack(rows)

    @property
    def _has_words(self) -> bool:
        return any(bound.words for bound in self.bound.values())

    @staticmethod
    def _needs_words(bound: Bound) -> bool:
        """Whether an expert is silent where a text has none of its words."""
        return bound.required and bool(bound.words)

    def _set_silent(self, readings: Sequence[Reading], prompt_of: Sequence[int]) -> None:
        """Experts whose words a text must have, and has not, are as at strength 0."""
        bounds = list(self.bound.values())
        rows = [
            tuple(self._needs_words(b) and not said for b, said in zip(bounds, readings[i].said, strict=True))
            for i in prompt_of
        ]
        same = len(set(rows)) == 1
        silent = rows[0] if same else (False,) * len(self.bound)
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
        self, text: torch.Tensor, side: Callable[[], Side | None], *, guided: int | None, frames: int = 1
    ) -> None:
        """The denoiser is about to run.

        Args:
            text: its states, [B, S, C].
            side: of the latents; None where it is not known, and nothing has a place.
            guided: rows of unconditional texts that come first; None where that is not known: a first half without any
                expert's words is taken for such.
            frames: rows of the text for each row of the latents.
        """
        if not self._is_last(text):
            self._last_text, self._dtype = text.detach(), text.dtype
            self._begin_text(text, side(), guided, frames)
        elif self.picture is not None and self.picture.maps and not self.picture.regions:
            self._plan(text.device)

    def _is_last(self, text: torch.Tensor) -> bool:
        """Whether this is the text of the step before; hooks that cast or move it make a copy at every step."""
        last = self._last_text
        if last is None or last.shape != text.shape or last.device != text.device or torch.is_grad_enabled():
            return False
        return last.data_ptr() == text.data_ptr() or torch.equal(last, text)

    def _begin_text(self, text: torch.Tensor, side: Side | None, guided: int | None, frames: int) -> None:
        found, readings = self.tokens.rows(text) if self._has_words else None, None
        if found is None and self._has_words:
            self._warn("the text's words are not known, since its states come from elsewhere: every expert acts everywhere")
        if found is not None:
            rows = [[(run.encoder, run.ids[i].tolist()) for run, i in row] for row in found]
            readings = self._readings(rows, tokens=text.shape[1])
        before = self.picture
        self._text = None if readings is None else self._own_tokens(readings)
        self._text = None if self._text is None else onto(self._text, text.device)
        guided = _guided(readings or []) if guided is None else guided
        prompt_of = [
            max(row, row % guided + guided if guided else 0) // frames * frames for row in range(len(readings or []))
        ]
        self.picture = Picture(readings, guided, prompt_of, side)
        if readings is None:
            self.silent, self.row_silent = (False,) * len(self.bound), None
        else:
            self._set_silent(readings, prompt_of)
            for name, bound, silent in zip(self.bound, self.bound.values(), self.silent, strict=True):
                if silent:
                    self._warn(f"expert {name!r} is silent: the prompt has none of its words, {', '.join(bound.words)}")
        if before is not None and before.regions and self._same_things(before):
            self.picture.regions = before.regions  # the prompt changes while drawing; the layout stays
        self._set_image(text.device)

    def _same_things(self, before: Picture) -> bool:
        def things(picture: Picture) -> list[list[str]]:
            readings = picture.readings or []
            return [[thing.name for thing in readings[i].things] for i in picture.prompt_of]

        return self.picture is not None and things(before) == things(self.picture) and before.side == self.picture.side

    def located(self, row: int) -> list[Thing]:
        """What of a row's text gets a place of its own: at least two things, or a user's own region."""
        if self.picture is None or self.picture.readings is None:
            return []
        names = list(self.bound)
        things = [
            thing
            for thing in self.picture.readings[row].things
            if thing.expert is None or self.bound[names[thing.expert]].region != EVERYWHERE
        ]
        auto = [t for t in things if t.expert is not None and self.bound[names[t.expert]].region == AUTO]
        return things[:MOST_THINGS] if auto and len(things) > 1 else []

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
        """For each row of the denoiser's batch, the row whose prompt says what its picture shows."""
        return [] if self.picture is None else self.picture.prompt_of

    @property
    def text_tokens(self) -> int:
        """S, of the text that the denoiser reads; 0 where it is not known."""
        picture = self.picture
        return 0 if picture is None or not picture.readings else len(picture.readings[0].own[0])

    @property
    def layouts(self) -> list[Layout]:
        """The regions of the pictures that are being drawn, or were drawn last, in their order."""
        picture = self.picture
        if picture is None:
            return []
        found = []
        for row in sorted(set(picture.prompt_of)):
            things, regions = picture.regions.get(row, ([], torch.zeros(0)))
            maps = picture.maps.get(row, torch.zeros(0)).cpu()
            names = list(self.bound)
            labels = [thing.name if thing.expert is None else names[thing.expert] for thing in things]
            layout_of = dict(zip(labels, regions, strict=True))
            for name, bound in self.bound.items():
                if picture.side is not None and bound.region not in (AUTO, EVERYWHERE):
                    layout_of.setdefault(name, region_mask(bound.region, *picture.side))
            found.append(Layout(layout_of, dict(zip(labels, maps, strict=False))))
        return found

    @property
    def reads_maps(self) -> bool:
        """Whether cross-attention is to be read at this step."""
        picture = self.picture
        if picture is None or picture.readings is None or torch.is_grad_enabled() or picture.regions:
            return False
        return any(self.located(row) for row in set(picture.prompt_of))

    def add_maps(self, probabilities: torch.Tensor, rows: Sequence[int]) -> None:
        """Add what one cross-attention layer attends to: probabilities [B, T, S], mean over heads, of these rows."""
        side = self.side_of(probabilities.shape[1])
        if self.picture is None or side is None:
            return
        for p, row in zip(probabilities, rows, strict=True):
            things = self.located(row)
            if not things:
                continue
            own = onto(torch.tensor([t.tokens for t in things], dtype=torch.float32), p.device)  # [K, S]
            maps = (own / own.sum(1, keepdim=True)) @ p.float().T  # [K, T]
            low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)
            maps = ((maps - low) / (high - low).clamp_min(1e-12)).reshape(-1, *side)
            self.picture.maps[row] = self.picture.maps.get(row, torch.zeros_like(maps)) + maps

    def _plan(self, device: torch.device) -> None:
        """Decide the layout of every picture from the maps."""
        picture = self.picture
        if picture is None or picture.side is None:
            return
        names, side = list(self.bound), picture.side
        for row, maps in picture.maps.items():
            things, maps = self.located(row), maps.cpu()
            given = {
                i: region_mask(self.bound[names[t.expert]].region, *side)
                for i, t in enumerate(things)
                if t.expert is not None and self.bound[names[t.expert]].region != AUTO
            }
            for i, mask in given.items():
                maps[i] = F.adaptive_avg_pool2d(mask[None], (maps.shape[1], maps.shape[2]))[0]
            regions, margin = layout.planned(maps, *side, self._relations(row, things))
            if margin < UNDECIDED:
                self._warn(f"the places of {' and '.join(repr(t.name) for t in things)} are undecided; give a region")
            if given:
                regions = regions * (1 - torch.stack(list(given.values())).amax(0))
            for i, mask in given.items():
                regions[i] = mask
            picture.regions[row] = things, regions
        self._set_image(device)

    def _relations(self, row: int, things: Sequence[Thing]) -> list[tuple[int, int, str]]:
        """The place words of a row's prompt, between those of its things that get a place."""
        if self.picture is None or self.picture.readings is None:
            return []
        reading = self.picture.readings[row]
        index = {reading.things.index(thing): i for i, thing in enumerate(things)}
        return [(index[a], index[b], axis) for a, b, axis in reading.relations if a in index and b in index]

    def _set_image(self, device: torch.device) -> None:
        """Masks of the picture from the regions that are known."""
        image, picture = self._regions_by_row(), self.picture
        self._image, self._biases = None if image is None else onto(image, device), {}
        if image is not None and picture is not None and picture.readings is not None and self.closing:
            for side in _sides(picture.side):
                self._biases[side[0] * side[1]] = onto(self._bias_at(side).to(self._dtype), device)
        self._made = {key: mask for key, mask in self._made.items() if key[0] == "encoding"}
        self._changed()

    def _regions_by_row(self) -> torch.Tensor | None:
        """[B, N, H, W] in 0..1, or None where every expert acts everywhere."""
        picture, bounds = self.picture, list(self.bound.values())
        own = [b.region for b in bounds]
        if picture is None or picture.side is None:
            return None
        if not picture.regions and all(region in (AUTO, EVERYWHERE) for region in own):
            return None
        rows = []
        for row in picture.prompt_of or [0]:
            mask = torch.ones(len(bounds), *picture.side)
            for k, region in enumerate(own):
                if region not in (AUTO, EVERYWHERE):
                    mask[k] = region_mask(region, *picture.side)
            things, regions = picture.regions.get(row, ([], mask[:0]))
            for thing, region in zip(things, regions, strict=True):
                if thing.expert is not None:
                    mask[thing.expert] = region
            rows.append(mask)
        return torch.stack(rows)

    def bias(self, tokens: int, rows: int) -> torch.Tensor | None:
        """[B, T, S], added to cross-attention's logits: words of a thing are closed outside its region. None: nothing is.

        Unconditional rows are left alone.

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

    def _bias_at(self, side: Side) -> torch.Tensor:
        """[B, T, S] for the layers whose picture has this height and width, on the CPU."""
        picture, names = self.picture, list(self.bound)
        assert picture is not None
        assert picture.readings is not None
        assert picture.side is not None
        bias = torch.zeros(len(picture.readings), side[0] * side[1], self.text_tokens)
        for row, prompt in enumerate(picture.prompt_of):
            if row < picture.guided:
                continue
            things, regions = picture.regions.get(prompt, ([], torch.zeros(0, *picture.side)))
            for thing in picture.readings[row].things:
                if thing.expert is None or thing in things:
                    continue
                region = self.bound[names[thing.expert]].region
                if region not in (AUTO, EVERYWHERE):
                    things, regions = [*things, thing], torch.cat([regions, region_mask(region, *picture.side)[None]])
            if not len(things):
                continue
            inside = F.adaptive_avg_pool2d(regions[None], side)[0].flatten(1)  # [K, T]
            own = torch.tensor([t.tokens for t in things], dtype=torch.float32)  # [K, S]
            bias[row] = -self.closing * (1 - inside).T @ own
        return bias.clamp_min(-self.closing)

    def _warn(self, message: str) -> None:
        """Once for each message."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=2)


def _sides(side: Side | None) -> Iterator[Side]:
    """Height and width of the latents, and of what each halving leaves of them."""
    while side is not None:
        yield side
        side = (-(-side[0] // 2), -(-side[1] // 2)) if max(side) > 1 else None


def _guided(readings: Sequence[Reading]) -> int:
    """How many unconditional rows come first, to judge by the texts alone."""
    half = len(readings) // 2
    first, second = readings[:half], readings[half:]
    return half if len(readings) == 2 * half and not any(map(_says, first)) and all(map(_says, second)) else 0


def _says(reading: Reading) -> bool:
    return any(reading.said)
