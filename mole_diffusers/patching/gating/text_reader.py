"""Reads texts by their tokens: whose words are in them, which expert acts on which token, and who is silent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch

from mole_diffusers.binding.config import Bound
from mole_diffusers.binding.who_acts import acting_tokens, who_counts
from mole_diffusers.binding.words import Reading, joined, overlaid, read
from mole_diffusers.functional import onto
from mole_diffusers.patching.gating.prompt_tokens import PromptTokens

Part = Sequence[tuple[str, list[int]]]  # (text encoder, its ids) of what lies side by side in the channels of a text


class Silence(NamedTuple):
    """The experts whose words are not in a text. They count as at strength 0.

    Attributes:
        experts: [N], those that are silent in all rows.
        rows: [B, N] bool, if rows differ.
    """

    experts: tuple[bool, ...]
    rows: torch.Tensor | None = None


class TextReader:
    """Reads texts for one binding.

    Args:
        bound: each expert's binding, in the order of the gates' columns.
        tokens: knows the tokens of texts that were encoded.
    """

    def __init__(self, bound: Mapping[str, Bound], tokens: PromptTokens):
        self.bound, self.tokens = dict(bound), tokens
        self.has_words = any(b.words for b in bound.values())  # if not, no text need be read
        self.nobody = Silence((False,) * len(bound))

    def encoder_text(self, encoder: str, ids: torch.Tensor, acting: Sequence[bool]) -> list[Reading] | None:
        """What a text encoder is about to read, ids [B, T], row by row; None if its tokenizer is not known.

        `acting` [N] are the experts that are on.
        """
        if self.tokens.tokenizers[encoder] is None:
            return None
        return self._readings([[[(encoder, row)]] for row in ids.tolist()], acting)

    def denoiser_text(self, text: torch.Tensor, acting: Sequence[bool]) -> list[Reading] | None:
        """The texts of the denoiser's states [B, S, C], row by row; None if their words are not known."""
        found = self.tokens.rows(text)
        encoders = {run.encoder for row in found or () for part in row for run, _ in part}
        if found is None or any(self.tokens.tokenizers[encoder] is None for encoder in encoders):
            return None
        rows = [[[(run.encoder, run.ids[i].tolist()) for run, i in part] for part in row] for row in found]
        return self._readings(rows, acting, tokens=text.shape[1])

    def _readings(self, rows: Sequence[Sequence[Part]], acting: Sequence[bool], tokens: int = 0) -> list[Reading]:
        """Read texts by their tokens.

        A row consists of parts, token after token. The rest of `tokens` has no words.
        """
        known: dict[tuple, Reading] = {}
        bounds = list(self.bound.values())
        phrases = [bound.words for bound in bounds]
        of_row = partial(read, phrases=phrases, who=who_counts(bounds, acting))
        readings = []
        for row in rows:
            key = tuple(tuple((encoder, *ids) for encoder, ids in part) for part in row)
            if key not in known:
                texts = [overlaid([of_row(ids, self.tokens.tokenizers[encoder]) for encoder, ids in part]) for part in row]
                left = max(0, tokens - sum(len(text.own[0]) for text in texts))
                known[key] = joined([*texts, Reading(((False,) * left,) * len(phrases))] if left else texts)
            readings.append(known[key])
        return readings

    def acting_tokens(
        self, readings: Sequence[Reading], acting: Sequence[bool], device: torch.device
    ) -> torch.Tensor | None:
        """[B, T, N] bool, the tokens that each expert acts on; None if every expert acts on every token."""
        acts = acting_tokens(list(self.bound.values()), acting, readings)
        return None if acts is None else onto(acts, device)

    def silence(self, mentioned: Sequence[Sequence[bool]], device: torch.device) -> Silence:
        """Who requires words that the text does not have.

        Args:
            mentioned: [B][N], whether each row has the expert's words.
        """
        bounds = list(self.bound.values())
        rows = [tuple(b.needs_words and not there for b, there in zip(bounds, row, strict=True)) for row in mentioned]
        if len(set(rows)) == 1:
            return Silence(rows[0])
        return Silence(tuple(map(all, zip(*rows, strict=True))), onto(torch.tensor(rows), device))
