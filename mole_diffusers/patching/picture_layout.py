"""Where each thing of a prompt stands in the pictures of one batch: maps are gathered, a layout is planned and kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mole_diffusers.binding import layout
from mole_diffusers.binding.config import Bound
from mole_diffusers.binding.regions import AUTO, EVERYWHERE, Region, region_mask
from mole_diffusers.binding.words import Reading, Thing
from mole_diffusers.functional import onto

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


class PictureLayout:
    """The layout of the pictures of a batch. A row is one of the denoiser's text; all tensors but maps are on the CPU.

    Args:
        bound: each expert's binding, in the order of the gates' columns.
        readings: of each row's text; empty where it is not known.
        guided: so many rows come first that are unconditional.
        frames: rows of one film, which have one layout.
        side: of the latents; None where it is not known, and nothing has a place.
    """

    def __init__(
        self, bound: Mapping[str, Bound], readings: Sequence[Reading], *, guided: int, frames: int, side: Side | None
    ):
        self.names, self.bound, self.readings, self.guided, self.side = (
            list(bound),
            list(bound.values()),
            readings,
            guided,
            side,
        )
        # The row whose prompt says what is in each row's picture: unconditional rows borrow it.
        self.prompt_of = [
            max(row, row % guided + guided if guided else 0) // frames * frames for row in range(len(readings))
        ]
        self._maps: dict[int, torch.Tensor] = {}  # row -> [K, h, w], how much each thing's words are attended
        self._regions: dict[int, torch.Tensor] = {}  # row -> [K, H, W], once planned

    # ---- planning

    @property
    def wants_maps(self) -> bool:
        """Whether there is something to place, and it is not placed yet."""
        return not self._regions and any(self._placed(row) for row in set(self.prompt_of))

    @property
    def can_plan(self) -> bool:
        """Whether maps have been read and the layout has not been planned."""
        return bool(self._maps) and not self._regions

    def add_maps(self, shares: torch.Tensor, side: Side, rows: Sequence[int]) -> None:
        """Add what a layer with this height and width attends to: shares [B, T, S] of its text's tokens, for these rows."""
        for share, row in zip(shares, rows, strict=True):
            if things := self._placed(row):
                own = onto(torch.tensor([t.tokens for t in things], dtype=torch.float32), share.device)  # [K, S]
                maps = (own / own.sum(1, keepdim=True)) @ share.float().T  # [K, T]
                low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)
                maps = ((maps - low) / (high - low).clamp_min(1e-12)).reshape(-1, *side)
                self._maps[row] = self._maps.get(row, torch.zeros_like(maps)) + maps

    def plan(self) -> list[str]:
        """Decide the layout of every picture; returns what is to be warned of."""
        warned = []
        for row, maps in self._maps.items():
            if self.side is not None:
                things, maps = self._placed(row), maps.cpu()
                given = {i: region_mask(region, *self.side) for i, t in enumerate(things) if (region := self._given(t))}
                for i, mask in given.items():
                    maps[i] = F.adaptive_avg_pool2d(mask[None], (maps.shape[1], maps.shape[2]))[0]
                regions, margin = layout.planned(maps, *self.side, self._relations(row, things))
                if given:
                    regions = regions * (1 - torch.stack(list(given.values())).amax(0))
                for i, mask in given.items():
                    regions[i] = mask
                self._regions[row] = regions
                if margin < UNDECIDED:
                    named = " and ".join(repr(thing.name) for thing in things)
                    warned.append(f"the places of {named} are undecided; give a region")
        return warned

    def keep(self, before: PictureLayout) -> None:
        """Keep the layout of a text before this one, if it names the same things: the prompt changes while drawing."""
        if self.side == before.side and self._said() == before._said():
            self._regions, self._maps = before._regions, before._maps

    def _said(self) -> list[list[str]]:
        return [[thing.name for thing in self.readings[row].things] for row in self.prompt_of]

    def _placed(self, row: int) -> list[Thing]:
        """The things of a row's text that share the picture: two or more, one of which has no region yet."""
        things = [t for t in self.readings[row].things if t.expert is None or self.bound[t.expert].region != EVERYWHERE]
        found = any(t.expert is not None and self.bound[t.expert].region == AUTO for t in things)
        return things[:MOST_THINGS] if found and len(things) > 1 else []

    def _given(self, thing: Thing) -> Region | None:
        """The user's own region of a thing, if there is one."""
        region = AUTO if thing.expert is None else self.bound[thing.expert].region
        return None if isinstance(region, str) and region in (AUTO, EVERYWHERE) else region

    def _relations(self, row: int, things: Sequence[Thing]) -> list[tuple[int, int, str]]:
        """The place words of a row's prompt, between things that get a place."""
        reading = self.readings[row]
        index = {reading.things.index(thing): i for i, thing in enumerate(things)}
        return [(index[a], index[b], axis) for a, b, axis in reading.relations if a in index and b in index]

    # ---- what it gives

    def expert_masks(self) -> torch.Tensor | None:
        """[B, N, H, W] in 0..1: where each expert acts; None where all act everywhere."""
        given = {k: b.region for k, b in enumerate(self.bound) if b.region not in (AUTO, EVERYWHERE)}
        if self.side is None or not (self._regions or given):
            return None
        rows = []
        for row in self.prompt_of or [0]:
            mask = torch.ones(len(self.bound), *self.side)
            for k, region in given.items():
                mask[k] = region_mask(region, *self.side)
            for thing, place in self._located(row):
                if thing.expert is not None:
                    mask[thing.expert] = place
            rows.append(mask)
        return torch.stack(rows)

    def closed_words(self, side: Side) -> torch.Tensor:
        """[B, T, S] in 0..1: how much each word is closed to each place of a layer; unconditional rows close nothing."""
        closed = torch.zeros(len(self.readings), side[0] * side[1], len(self.readings[0].own[0]))
        for row, prompt in list(enumerate(self.prompt_of))[self.guided :]:
            if located := self._located(prompt):
                inside = F.adaptive_avg_pool2d(torch.stack([region for _, region in located])[None], side)[0].flatten(1)
                own = torch.tensor([thing.tokens for thing, _ in located], dtype=torch.float32)  # [K, S]
                closed[row] = ((1 - inside).T @ own).clamp_max(1)
        return closed

    def _located(self, row: int) -> list[tuple[Thing, torch.Tensor]]:
        """The things of a row that have a region, planned or the user's own."""
        found = list(zip(self._placed(row), self._regions[row], strict=True)) if row in self._regions else []
        there = [thing for thing, _ in found]
        for thing in self.readings[row].things if self.readings else ():
            if thing not in there and self.side is not None and (region := self._given(thing)) is not None:
                found.append((thing, region_mask(region, *self.side)))
        return found

    def layouts(self) -> list[Layout]:
        """The layout of each picture, in their order."""
        found = []
        for row in sorted(set(self.prompt_of)):
            regions = {self._label(thing): region for thing, region in self._located(row)}
            for name, bound in zip(self.names, self.bound, strict=True):
                if self.side is not None and bound.region not in (AUTO, EVERYWHERE):
                    regions.setdefault(name, region_mask(bound.region, *self.side))
            maps = {self._label(t): m.cpu() for t, m in zip(self._placed(row), self._maps.get(row, ()), strict=False)}
            found.append(Layout(regions, maps))
        return found

    def _label(self, thing: Thing) -> str:
        return thing.name if thing.expert is None else self.names[thing.expert]


def sides(side: Side | None) -> Iterator[Side]:
    """Height and width of the latents, and of what each halving leaves of them."""
    while side is not None:
        yield side
        side = (-(-side[0] // 2), -(-side[1] // 2)) if max(side) > 1 else None
