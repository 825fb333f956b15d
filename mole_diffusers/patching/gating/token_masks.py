"""Binding while sampling: which expert acts on which token of the texts and of the picture at this moment.

In the order of a call of the pipeline:

    begin          forget the pictures of the previous call
    on_text        a text encoder reads a text: which expert each token belongs to
    on_denoiser    step 1, and any new text: the same for the denoiser, and who is silent; given regions apply
    add_maps       step 1: attention hooks report how much attention each word gets where
    on_denoiser    step 2: the layout is planned from these maps, and stays from then on
    end            warn of what got no place

Tiles, img2img and inpainting plan the layout without maps, by `plan`, before the first step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from mole_diffusers import functional
from mole_diffusers.binding.config import Bound, with_region
from mole_diffusers.binding.picture_layout import Layout, PictureLayout, Side
from mole_diffusers.binding.regions import EVERYWHERE
from mole_diffusers.binding.words import Reading, ThingKey, joined, overlaid, read
from mole_diffusers.functional import onto
from mole_diffusers.gates.seen import version
from mole_diffusers.patching.gating.bound_text import BoundText, Made, Silent
from mole_diffusers.patching.gating.picture_warning import PictureWarning
from mole_diffusers.patching.host.denoiser_inputs import Groups, groups_of, repeats

if TYPE_CHECKING:
    from mole_diffusers.patching.gating.runtime import Runtime

Watcher = Callable[[list[dict[str, torch.Tensor]]], None]  # called with name -> map [h, w], for each picture
MOST_TEXTS = 5  # texts that are kept: pictures of one call may be drawn with several, in turn


class TokenMasks:
    """Masks per expert and token, from the user's binding, the texts' words and the layout of the picture.

    Args:
        bound: each expert's binding, in the order of the gates' columns.
        tokenizers: text encoder -> its tokenizer. If it is None, the words are not known.
        runtime: is told when masks change, or which experts are present. With any `map_watchers`, every step is read.
    """

    def __init__(self, bound: Mapping[str, Bound], tokenizers: Mapping[str, Any], runtime: Runtime):
        self.bound, self.tokenizers, self._runtime = dict(bound), dict(tokenizers), runtime
        self.has_words = any(b.words for b in bound.values())  # if not, no text need be read
        self.silent: Silent = (False,) * len(bound)  # experts whose words are not in the current text
        self.row_silent: torch.Tensor | None = None  # [B, N], if rows differ
        self._encoding: torch.Tensor | None = None  # [B, T, N] bool, for the last text of an encoder
        self._encoded: Made = {}
        self._texts: list[BoundText] = []  # of the current pictures
        self._planned: Mapping[ThingKey, torch.Tensor] = {}  # places of their things, if planned without maps
        self.text: BoundText | None = None  # the denoiser's current text
        self._level = 0.0  # of noise at the last step, outside of calls
        self.warned: list[str] = []  # warnings since the call of the pipeline began

    # ---- what layers ask

    @property
    def binds(self) -> bool:
        """Whether any expert is kept off any token, of the text encoder or of the denoiser."""
        return self._encoding is not None or (self.text is not None and self.text.binds)

    def over_ranks(
        self, stream: str | None, low: torch.Tensor, segment: torch.Tensor, ranks: tuple[int, ...]
    ) -> torch.Tensor | None:
        """A factor for A x of a layer besides the gate, in its shape; None if every expert acts on every token.

        Args:
            stream: which tokens the layer reads, see `placement.stream_of`.
            low: [B, R], [B, T, R] or [B, R, H, W].
            segment: [R], the expert of each rank; `ranks` [N] says how many each has.
        """
        if stream is None or low.dim() == 2:
            return None
        if stream == "encoding":
            made, mask = self._encoded, lambda: self._encoding
        elif self.text is None or (stream == "image" and self.text.image is None):
            return None
        else:
            made, mask = self.text.made, partial(self.text.mask, stream, low)
        key = stream, ranks, low.shape[0], low.shape[2:] if low.dim() == 4 else low.shape[1], low.dtype, low.device
        if key not in made:
            factor = None
            if (found := mask()) is not None and (low.dim() == 4 or found.shape[1] == low.shape[1]):
                factor = functional.over_ranks(functional.rows_for_layer(found, len(low)).to(low.device), segment, low)
            made[key] = factor
        return made[key]

    @property
    def wants_maps(self) -> bool:
        """Whether attention must be read at this step."""
        if self.text is None or torch.is_grad_enabled():
            return False
        return self.text.picture.wants_maps or (bool(self._runtime.map_watchers) and self.text.picture.has_things)

    def add_maps(self, shares: torch.Tensor) -> None:
        """Add what a layer attends to in each picture: shares [P, T, S] of its text's tokens, mean over heads."""
        if self.text is None or (side := self.text.side_of(shares.shape[1])) is None:
            return
        picture = self.text.picture
        if picture.wants_maps:
            picture.add_maps(shares, side)
        for watcher in self._runtime.map_watchers:
            watcher(picture.named_maps(shares, side))

    @property
    def layouts(self) -> list[Layout]:
        """The layouts of the pictures being drawn, or drawn last, in their order."""
        texts = self._prompts or self._texts
        return texts[-1].picture.layouts() if texts else []

    # ---- texts

    def on_text(self, encoder: str, ids: torch.Tensor, device: torch.device) -> None:
        """A text encoder on `device` is about to read `ids` [B, T]. Outside of a call, this begins another picture."""
        if self._runtime.calling is None:
            self._texts = []
        if not self.has_words:
            return
        acts, mentioned = None, [(True,) * len(self.bound)]  # if words are not known, every expert acts on every token
        if self.tokenizers[encoder] is not None:
            readings = self._readings([[[(encoder, row)]] for row in ids.tolist()])
            acts, mentioned = onto(self._acting_tokens(readings), device), [reading.mentioned for reading in readings]
        self._encoding, self._encoded = acts, {}
        self.silent, self.row_silent = self._silent(mentioned, device)
        self._runtime.changed()

    def _readings(self, rows: Sequence[Sequence[Sequence[tuple[str, list[int]]]]], tokens: int = 0) -> list[Reading]:
        """Read texts by their tokens.

        A row consists of parts, token after token. A part consists of (encoder, its ids), whose channels lie side by
        side. The rest of `tokens` has no words.
        """
        known: dict[tuple, Reading] = {}
        phrases = [bound.words for bound in self.bound.values()]
        of_row = partial(read, phrases=phrases, whole=with_region(list(self.bound.values())))
        readings = []
        for row in rows:
            key = tuple(tuple((encoder, *ids) for encoder, ids in part) for part in row)
            if key not in known:
                texts = [overlaid([of_row(ids, self.tokenizers[encoder]) for encoder, ids in part]) for part in row]
                left = max(0, tokens - sum(len(text.own[0]) for text in texts))
                known[key] = joined([*texts, Reading(((False,) * left,) * len(phrases))] if left else texts)
            readings.append(known[key])
        return readings

    def _acting_tokens(self, readings: Sequence[Reading]) -> torch.Tensor:
        """[B, T, N] bool: an expert acts on a text that has its words, but not on the words of others in it.

        An expert that acts everywhere acts on those, too.
        """
        bounds, rows = list(self.bound.values()), []
        everywhere = torch.tensor([not b.words and b.region == EVERYWHERE for b in bounds])
        for reading in readings:
            own = torch.tensor(reading.own).T  # [T, N]
            acts = torch.tensor([there or not b.needs_words for b, there in zip(bounds, reading.mentioned, strict=True)])
            nobodys = ~own.any(1, keepdim=True)  # [T, 1]
            rows.append(acts & (own | nobodys | everywhere))
        return torch.stack(rows)

    def _silent(self, mentioned: Sequence[Sequence[bool]], device: torch.device) -> tuple[Silent, torch.Tensor | None]:
        """Experts that require words which the text does not have count as at strength 0.

        Args:
            mentioned: [B][N], whether each row has the expert's words.

        Returns:
            [N], the experts that are silent in all rows; and [B, N] on `device` if rows differ.
        """
        bounds = list(self.bound.values())
        rows = [tuple(b.needs_words and not there for b, there in zip(bounds, row, strict=True)) for row in mentioned]
        if len(set(rows)) == 1:
            return rows[0], None
        return tuple(map(all, zip(*rows, strict=True))), onto(torch.tensor(rows), device)

    # ---- the picture

    def begin(self) -> None:
        """A call of the pipeline begins: its texts are read again, and its layout is planned again."""
        self._texts, self.text, self.warned, self._planned = [], None, [], {}
        self.silent, self.row_silent = (False,) * len(self.bound), None
        self._runtime.changed()

    def plan(self, regions: Mapping[ThingKey, torch.Tensor]) -> bool:
        """Set where the things of this call's pictures are, [H, W] in 0..1 by `words.keys`. Maps are then not read.

        Returns False, and sets nothing, if the text that the denoiser reads names other things.
        """
        if not all(state.picture.names_only(regions) for state in self._texts):
            return False
        self._planned = regions
        for state in self._texts:
            if state.picture.put(regions):
                state.place()
        self._runtime.changed()
        return True

    def end(self, *, warns: bool) -> None:
        """The call has ended. With `warns`, warn of what got no place."""
        self._level = 0.0
        for text in self._texts:
            text.forget()
        if warns and (unplaced := [name for text in self._texts for name in text.picture.unplaced]):
            named = " and ".join(map(repr, dict.fromkeys(unplaced)))
            self._warn(f"{named} got no places of their own: there was a single step, or no attention to read; give regions")

    def on_denoiser(self, text: torch.Tensor, latents: torch.Tensor, side: Callable[[], Side | None]) -> None:
        """The denoiser is about to run.

        Args:
            text: its states, [B, S, C].
            latents: the denoiser's input.
            side: of the latents; None if it is not known, and nothing has a place. It may wait for the device, so it is
                called only if needed.
        """
        runtime = self._runtime
        self._begin_if_noisier()
        state = next((known for known in self._texts if known.is_of(text, latents)), None)
        if state is None:
            groups = None if runtime.calling is None else groups_of(runtime.calling, text, latents)
            state = self._new(text, latents, side(), groups)
            self._texts = [*self._texts, state][-MOST_TEXTS:]
            # Training prompts name single experts.
            wanted = [False] * len(self.bound) if runtime.calling is None else runtime.acting
            for (name, bound), silent, wants in zip(self.bound.items(), state.silent, wanted, strict=True):
                if silent and wants:
                    self._warn(f"expert {name!r} is silent: the prompt has none of its words, {', '.join(bound.words)}")
            for warning in [*state.picture.crowded(wanted), *state.picture.tags(wanted)]:
                self._warn(warning)
        places = state.image
        if state.picture.can_plan:
            for warning in state.picture.plan():
                self._warn(warning)
            state.place()
        state.follow_prompt()
        others_are_silent = self.silent != state.silent or self.row_silent is not state.row_silent
        if self.text is not state or state.image is not places or others_are_silent:
            self.text, self.silent, self.row_silent = state, state.silent, state.row_silent
            self._runtime.changed()

    def _begin_if_noisier(self) -> None:
        """Outside of a call, a rise of the noise level is all that says that another picture begins."""
        runtime = self._runtime
        if runtime.calling is None and self.has_words and not torch.is_grad_enabled():
            before, self._level = self._level, float(runtime.time.max())
            if self._level > before:
                self._texts = []

    def _new(self, text: torch.Tensor, latents: torch.Tensor, side: Side | None, groups: Groups | None) -> BoundText:
        """What follows from a new text. Within a call, it keeps the layout of the last prompt if the things are the same.

        If it is not known whether the text is a prompt, a text without any expert's words counts as the unconditional
        one of guidance that calls the denoiser separately. It then has the experts and places of the last prompt.
        """
        readings = self._read(text)
        frames = max(1, len(text) // len(latents))  # a video repeats its text for each frame
        picture = PictureLayout(self.bound, readings, groups=groups or _groups(readings, latents), frames=frames, side=side)
        acts = onto(self._acting_tokens(readings), text.device) if readings else None
        words = text.detach(), version(text), latents.shape, picture, acts
        prompt = next(reversed(self._prompts), None)
        is_prompt = groups is not None or _names_an_expert(readings)
        if not is_prompt and prompt is not None and len(prompt.text) == len(text):
            return BoundText(*words, prompt.silent, prompt.row_silent, prompt)
        mentioned = [readings[row].mentioned for row in picture.prompt_of] or [(True,) * len(self.bound)]
        state = BoundText(*words, *self._silent(mentioned, text.device))
        if self._planned:
            picture.put(self._planned)
        elif prompt is not None and self._runtime.calling is not None:
            picture.keep(prompt.picture)
        state.place()
        return state

    def _read(self, text: torch.Tensor) -> list[Reading]:
        """Read each row of the denoiser's text. [] if no expert has words, or the text's words are not known."""
        if not self.has_words:
            return []
        found = self._runtime.tokens.rows(text)
        encoders = {run.encoder for row in found or () for part in row for run, _ in part}
        if found is None or any(self.tokenizers[encoder] is None for encoder in encoders):
            self._warn(
                "the text's words are not known, so every expert acts everywhere: its states come from elsewhere, or were "
                "made before LoRAs or gates were last attached, or too many texts ago"
            )
            return []
        rows = [[[(run.encoder, run.ids[i].tolist()) for run, i in part] for part in row] for row in found]
        return self._readings(rows, tokens=text.shape[1])

    @property
    def _prompts(self) -> list[BoundText]:
        """The texts of the current pictures that name an expert."""
        return [text for text in self._texts if _names_an_expert(text.picture.readings)]

    def _warn(self, message: str) -> None:
        """Warn once in a call of the pipeline."""
        if message not in self.warned:
            self.warned.append(message)
            warnings.warn(message, PictureWarning, stacklevel=2)


def _names_an_expert(readings: Sequence[Reading]) -> bool:
    return any(any(reading.mentioned) for reading in readings)


def _groups(readings: Sequence[Reading], latents: torch.Tensor) -> Groups:
    """The groups of a text's rows, of a pipeline that is not known.

    Guidance repeats each picture, first without its prompt. In training, where nothing waits for the device, only a batch
    whose other rows all name an expert counts as guided.
    """
    half = len(readings) // 2
    named = [any(reading.mentioned) for reading in readings]
    if not half or len(readings) != 2 * half or any(named[:half]):
        return (True,)
    guided = all(named[half:]) if torch.is_grad_enabled() else repeats(latents, 2)
    return (False, True) if guided else (True,)
