"""Binding while sampling: which expert acts on which token of the texts and of the picture at this moment.

In the order of a call of the pipeline:

    begin          forget the pictures of the previous call
    on_text        a text encoder reads a text: which expert each token belongs to
    on_denoiser    step 1, and any new text: the same for the denoiser, and who is inactive; given regions apply
    add_maps       step 1: attention hooks report how much attention each word gets where
    on_denoiser    step 2: the layout is decided from these maps, and stays from then on
    end            warn of what got no place

So there are four ways to a place, and `BoundText.make_masks` turns it into masks; which of several subjects has which is
kept in `binding/picture_layout.py`:

    given          a region from the user, which holds from the first step
    `decide`       attention to the words, after the first step
    `set_places`   tiles, img2img and inpainting know the places before the first step, and no maps are read
    `keep`         a new prompt in the same call that names the same things has their places

A negative prompt that the denoiser reads in a call of its own has no places, and uses its prompt's (`follow_prompt`).

Nothing here knows gates or settings: whoever calls says what is needed, and passes on what has changed. A layer is known by
the tokens that it reads.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from operator import or_
from typing import Any

import torch

from mole_diffusers.binding.config import Bound
from mole_diffusers.binding.picture_layout import Layout, PictureLayout
from mole_diffusers.binding.picture_warning import PictureWarning
from mole_diffusers.binding.regions import EVERYWHERE, GridSize
from mole_diffusers.binding.who_acts import notices, present, who_counts
from mole_diffusers.binding.words import Reading, SubjectKey, joined, overlaid, read
from mole_diffusers.functional import onto
from mole_diffusers.gates.unchanged import version
from mole_diffusers.patching.gating.bound_text import BoundText, Inactive, LayerCache, TextInput
from mole_diffusers.patching.gating.prompt_tokens import PromptTokens
from mole_diffusers.patching.host.denoiser_inputs import GuidanceLayout, guidance_layout_of, repeats
from mole_diffusers.patching.host.denoisers import Blocks
from mole_diffusers.patching.undo import Undo, restore_point

MOST_TEXTS = 5  # texts that are kept: pictures of one call may be drawn with several, in turn
UNKNOWN = (
    "the text's words are not known, so every expert acts everywhere: its states come from elsewhere, or were made before "
    "LoRAs or gates were last attached, or too many texts ago"
)

Mentioned = tuple[bool, ...]  # [N], whether a text has the words of each expert
IdsSideBySide = tuple[tuple[str, tuple[int, ...]], ...]  # (text encoder, its ids), one beside the other in the channels


@dataclass
class EncoderText:
    """The text that a text encoder reads, or read last: [B, T, N] bool, and what layers have asked for.

    Attributes:
        first: text encoder -> whom the rows of its first text in this call name; None outside of one.
    """

    acting_tokens: torch.Tensor | None = None
    first: dict[str, list[Mentioned]] | None = None
    cache: LayerCache = field(default_factory=dict)

    def rows_among(self, tokens: int) -> int | None:
        """A text encoder's layers get the tokens of each row apart."""
        return None

    def mask(self, token_type: str, low: torch.Tensor) -> torch.Tensor | None:
        """[B, T, N] for a layer; None if every expert acts on every token."""
        return self.acting_tokens


class TextReader:
    """Reads texts for one binding. `acting` [N] are the experts that are on."""

    def __init__(self, bound: Mapping[str, Bound], tokens: PromptTokens):
        self.bound, self.tokens = dict(bound), tokens
        self.has_words = any(b.words for b in bound.values())  # if not, no text need be read
        self.nobody = Inactive((False,) * len(bound))

    def encoder_text(self, encoder: str, ids: torch.Tensor, acting: Sequence[bool]) -> list[Reading] | None:
        """What a text encoder is about to read, ids [B, T], row by row; None if its tokenizer is not known."""
        if self.tokens.tokenizers[encoder] is None:
            return None
        return self._readings([(((encoder, row),),) for row in self.tokens.ids(encoder, ids)], acting)

    def denoiser_text(self, text: torch.Tensor, acting: Sequence[bool]) -> list[Reading] | None:
        """The texts of the denoiser's states [B, S, C], row by row; None if their words are not known."""
        found = self.tokens.rows(text)
        encoders = {run.encoder for row in found or () for part in row for run, _ in part}
        if found is None or any(self.tokens.tokenizers[encoder] is None for encoder in encoders):
            return None
        rows = [tuple(tuple((run.encoder, tuple(run.ids[i].tolist())) for run, i in part) for part in row) for row in found]
        return self._readings(rows, acting, tokens=text.shape[1])

    def _readings(self, rows: Sequence[tuple[IdsSideBySide, ...]], acting: Sequence[bool], tokens: int = 0) -> list[Reading]:
        """Read rows, which consist of parts, token after token. The rest of `tokens` has no words."""
        known: dict[tuple[IdsSideBySide, ...], Reading] = {}
        bounds = list(self.bound.values())
        of_row = partial(read, phrases=[bound.words for bound in bounds], who=who_counts(bounds, acting))
        for row in dict.fromkeys(rows):
            texts = [overlaid([of_row(ids, self.tokens.tokenizers[encoder]) for encoder, ids in part]) for part in row]
            left = max(0, tokens - sum(len(text.own[0]) for text in texts))
            known[row] = joined([*texts, Reading(((False,) * left,) * len(bounds))] if left else texts)
        return [known[row] for row in rows]

    def acting_tokens(
        self,
        readings: Sequence[Reading],
        mentioned: Sequence[Mentioned],
        acting: Sequence[bool],
        device: torch.device,
    ) -> torch.Tensor | None:
        """[B, T, N] bool, the tokens that each expert acts on; None if every expert acts on every token. `mentioned` [B][N]:
        whom each row's picture names.

        One expert alone acts on every token. Several act on their own words and on those of nobody. One without words that
        the user wants everywhere acts on the words of others, too.
        """
        bounds = list(self.bound.values())
        everywhere = torch.tensor([not b.words and b.region == EVERYWHERE for b in bounds])
        rows = []
        for reading, named in zip(readings, mentioned, strict=True):
            there = present(bounds, acting, named)
            own = torch.tensor(reading.own).T & torch.tensor(acting)  # [T, N]
            nobodys = ~own.any(1, keepdim=True)  # [T, 1]
            rows.append(own | nobodys | everywhere if sum(there) > 1 else torch.ones_like(own))
        acts = torch.stack(rows)
        return None if acts.all() else onto(acts, device)

    def inactive(self, mentioned: Sequence[Mentioned], device: torch.device) -> Inactive:
        """Who requires words that the text does not have. `mentioned` [B][N]: whether each row has the expert's words."""
        bounds = list(self.bound.values())
        rows = [tuple(b.needs_words and not there for b, there in zip(bounds, row, strict=True)) for row in mentioned]
        if len(set(rows)) == 1:
            return Inactive(rows[0])
        return Inactive(tuple(map(all, zip(*rows, strict=True))), onto(torch.tensor(rows), device))


class TokenMasks:
    """Masks per expert and token, from the user's binding, the texts' words and the layout of the picture.

    Attributes:
        inactive: the experts whose words are not in the current text.
        text: the denoiser's current text.
        binds: whether any expert is kept off any token, of the text encoder or of the denoiser.
        warned: the warnings since the call of the pipeline began.
    """

    def __init__(self, bound: Mapping[str, Bound], tokens: PromptTokens, blocks: Blocks):
        self.blocks, self.reader = blocks, TextReader(bound, tokens)
        self.inactive, self.binds = self.reader.nobody, False
        self.text: BoundText | None = None
        self.warned: list[str] = []
        self._encoder_text = EncoderText()
        self._texts: list[BoundText] = []  # of the current pictures
        self._places: Mapping[SubjectKey, torch.Tensor] = {}  # of their subjects, if somebody set them
        self._level = 0.0  # of noise at the last step, outside of calls

    @property
    def bound(self) -> dict[str, Bound]:
        """Each expert's binding, in the order of the gates' columns."""
        return self.reader.bound

    # ---- what layers ask

    def text_of(self, token_type: str) -> EncoderText | BoundText | None:
        """The text with the masks of a layer that reads these tokens, see `placement.token_type_of`; None if it has none."""
        if token_type == "encoding":
            return self._encoder_text
        if self.text is None or (token_type == "image" and self.text.region_masks is None):
            return None
        return self.text

    # ---- what attention hooks report

    def wants_maps(self, *, is_heard: bool) -> bool:
        """Whether attention must be read at this step. `is_heard`: maps are wanted of all steps."""
        if self.text is None or torch.is_grad_enabled():
            return False
        return self.text.picture.wants_maps or (is_heard and self.text.picture.has_words)

    def add_maps(self, shares: torch.Tensor) -> GridSize | None:
        """Add what a layer attends to in each picture: shares [P, T, S] of its text's tokens, mean over heads.

        Returns the layer's height and width; None if its tokens are not those of the picture.
        """
        latent_size = None if self.text is None else self.text.layer_size(shares.shape[1])
        if self.text is not None and latent_size is not None and self.text.picture.wants_maps:
            self.text.picture.add_maps(shares, latent_size)
        return latent_size

    @property
    def layouts(self) -> list[Layout]:
        """The layouts of the pictures being drawn, or drawn last, in their order."""
        texts = self._prompts or self._texts
        return texts[-1].picture.layouts() if texts else []

    # ---- texts and pictures

    def begin(self) -> None:
        """A call of the pipeline begins: its texts are read again, and its layout is decided again."""
        self._texts, self.text, self.warned, self._places = [], None, [], {}
        self._encoder_text = EncoderText(first={})  # a call with states of texts has none
        self._hold(None, self.reader.nobody)

    def on_text(self, encoder: str, ids: torch.Tensor, *, in_call: bool, acting: Sequence[bool]) -> bool:
        """A text encoder is about to read `ids` [B, T]. Outside of a call, this begins another picture.

        Returns whether anything may have changed for layers.
        """
        if not in_call:
            self._texts = []
        if not self.reader.has_words:
            return False
        readings = self.reader.encoder_text(encoder, ids, acting)
        mentioned = [(True,) * len(self.bound)] if readings is None else [reading.mentioned for reading in readings]
        mentioned = self._or_in_first_text(encoder, mentioned)
        acts = None if readings is None else self.reader.acting_tokens(readings, mentioned, acting, ids.device)
        self._encoder_text = EncoderText(acts, self._encoder_text.first)
        self._hold(self.text, self.reader.inactive(mentioned, ids.device))
        return True

    def _or_in_first_text(self, encoder: str, mentioned: list[Mentioned]) -> list[Mentioned]:
        """Whom rows of a text or of the first text of the call name. That is the prompt: who acts on it acts on the negative
        prompt, too, as LoRAs do that do not wait for their words.
        """
        if self._encoder_text.first is None:
            return mentioned
        prompts = self._encoder_text.first.setdefault(encoder, mentioned)
        if len(prompts) != len(mentioned):
            return mentioned
        return [tuple(map(or_, now, first)) for now, first in zip(mentioned, prompts, strict=True)]

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """A block outside of a call in which a prompt and then its negative prompt are read, as in a call."""
        if self._encoder_text.first is not None:  # some pipelines encode the negative prompt by the same function
            yield
            return
        self._encoder_text = EncoderText(first={})
        try:
            yield
        finally:
            self._encoder_text.first = None

    def on_denoiser(
        self,
        text: torch.Tensor,
        latents: torch.Tensor,
        latent_size: Callable[[], GridSize | None],
        *,
        pipe: Any,
        time: torch.Tensor,
        acting: Sequence[bool],
    ) -> bool:
        """The denoiser is about to run.

        Args:
            text: its states, [B, S, C].
            latents: the denoiser's input.
            latent_size: of the latents; None if it is not known, and nothing has a place. It may wait for the device, so it
                is called only if needed.
            pipe: the pipeline, while a call of it runs.
            time: [B], the noise level.
            acting: [N], the experts that are on.

        Returns whether anything has changed for layers.
        """
        if pipe is None:
            self._begin_if_noisier(time)
        acting = tuple(acting)
        alike = [known for known in self._texts if known.input.may_be(text, latents, acting)]
        state = next((known for known in alike if known.input.is_same(text)), None)
        state = state or next((known for known in alike if known.input.is_copied(text)), None)
        if state is None:
            state = self._new(text, latents, latent_size(), pipe, acting)
            self._texts = [*self._texts, state][-MOST_TEXTS:]
            self.warn(*state.picture.lost_regions(acting))
            if pipe is not None:  # training prompts name single experts
                self.warn(*self._notices(state), *state.picture.crowded(acting))
        places = state.region_masks
        if state.picture.can_decide:
            self.warn(*state.picture.decide())
            state.make_masks()
        state.follow_prompt()
        others_are_silent = self.inactive.experts != state.inactive.experts or self.inactive.rows is not state.inactive.rows
        changes = self.text is not state or state.region_masks is not places or others_are_silent
        if changes:
            self._hold(state, state.inactive)
        return changes

    def _notices(self, text: BoundText) -> Iterator[str]:
        """What a user may not expect of the pictures of a text."""
        picture = text.picture
        if picture.readings and text.prompt is None:
            rows = [picture.readings[row].mentioned for row in picture.picture_rows]
            mentioned = tuple(map(any, zip(*rows, strict=True)))
            yield from notices(list(self.bound), list(self.bound.values()), text.input.acting, mentioned)

    def set_places(self, regions: Mapping[SubjectKey, torch.Tensor]) -> bool:
        """Set where the subjects of this call's pictures are, [H, W] in 0..1 by `words.keys`. Maps are then not read.

        Returns False, and sets nothing, if the text that the denoiser reads names other subjects.
        """
        if not all(state.picture.names_only(regions) for state in self._texts):
            return False
        self._places = regions
        for state in self._texts:
            if state.picture.set_places(regions):
                state.make_masks()
        self._hold(self.text, self.inactive)
        return True

    def end(self, *, warns: bool) -> None:
        """The call has ended. With `warns`, warn of what got no place."""
        self._level, self._encoder_text.first = 0.0, None
        for text in self._texts:
            text.forget()
        if warns and (unplaced := [name for text in self._texts for name in text.picture.unplaced]):
            named = " and ".join(map(repr, dict.fromkeys(unplaced)))
            self.warn(f"{named} got no places of their own: there was a single step, or no attention to read; give regions")

    def restore_point(self) -> Callable[[Undo], None]:
        """A function that holds the text of now for the layers again, until it is undone."""
        return restore_point(self, "text", "inactive", "binds")

    def _hold(self, text: BoundText | None, inactive: Inactive) -> None:
        """Hold a text for the layers that run now."""
        self.text, self.inactive = text, inactive
        self.binds = self._encoder_text.acting_tokens is not None or (text is not None and text.binds)

    def _begin_if_noisier(self, time: torch.Tensor) -> None:
        """Outside of a call, a rise of the noise level is all that says that another picture begins; prompts that are told
        are encoded for each.
        """
        if self.reader.has_words and not torch.is_grad_enabled():
            before, self._level = self._level, 0.0 if self.reader.tokens.prompts else float(time.max())
            if self._level > before:
                self._texts = []

    def _new(
        self, text: torch.Tensor, latents: torch.Tensor, latent_size: GridSize | None, pipe: Any, acting: tuple[bool, ...]
    ) -> BoundText:
        """What follows from a new text. Within a call, it keeps the layout of the last prompt if the subjects are the same.

        If it is not known whether it is a prompt, a text without any expert's words counts as the unconditional one of
        guidance that calls the denoiser separately. It then has the experts and places of the last prompt.
        """
        known = None if pipe is None else guidance_layout_of(pipe, text, latents)
        readings = self._read(text, acting)
        guidance_layout = known or _guidance_layout(readings, latents, self.reader.tokens.prompts)
        frames = max(1, len(text) // len(latents))  # a video repeats its text for each frame
        picture = PictureLayout(
            self.bound, readings, guidance_layout=guidance_layout, frames=frames, latent_size=latent_size
        )
        mentioned = [readings[row].mentioned for row in picture.prompt_of]
        acts = self.reader.acting_tokens(readings, mentioned, acting, text.device) if readings else None
        words = TextInput(text.detach(), version(text), latents.shape, acting), picture, acts
        prompt = next(reversed(self._prompts), None)
        is_prompt = known is not None or _names_an_expert(readings)
        if not is_prompt and prompt is not None and len(prompt.input.text) == len(text):
            return BoundText(self.blocks, *words, prompt.inactive, prompt)
        inactive = self.reader.inactive(mentioned or [(True,) * len(self.bound)], text.device)
        state = BoundText(self.blocks, *words, inactive)
        if self._places:
            picture.set_places(self._places)
        elif prompt is not None and pipe is not None:
            picture.keep(prompt.picture)
        state.make_masks()
        return state

    def _read(self, text: torch.Tensor, acting: Sequence[bool]) -> list[Reading]:
        """Read each row of the denoiser's text. [] if no expert has words, or the text's words are not known."""
        if not self.reader.has_words:
            return []
        readings = self.reader.denoiser_text(text, acting)
        if readings is None and sum(acting) > 1:
            self.warn(UNKNOWN)
        return readings or []

    @property
    def _prompts(self) -> list[BoundText]:
        """The texts of the current pictures that name an expert."""
        return [text for text in self._texts if _names_an_expert(text.picture.readings)]

    def warn(self, *messages: str) -> None:
        """Warn once in a call of the pipeline."""
        for message in messages:
            if message not in self.warned:
                self.warned.append(message)
                warnings.warn(message, PictureWarning, stacklevel=2)


def _names_an_expert(readings: Sequence[Reading]) -> bool:
    return any(any(reading.mentioned) for reading in readings)


def _guidance_layout(readings: Sequence[Reading], latents: torch.Tensor, prompts: Sequence[str]) -> GuidanceLayout:
    """The guidance layout of a text's rows, of a pipeline that is not known. `prompts` are those rows if they are told.

    Guidance repeats each picture, first without its prompt. In training, where nothing waits for the device, only a batch
    whose other rows all name an expert counts as guided, or without gradients one that begins without prompts.
    """
    half = len(readings) // 2
    named = [any(reading.mentioned) for reading in readings]
    if not half or len(readings) != 2 * half or any(named[:half]):
        return (True,)
    if torch.is_grad_enabled():
        return (False, True) if all(named[half:]) else (True,)
    guided = not any(prompts[:half]) if prompts else repeats(latents, 2)
    return (False, True) if guided else (True,)
