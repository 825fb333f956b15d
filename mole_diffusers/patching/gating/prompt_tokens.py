"""Which tokens of a text's states are words of the prompt: recorded when a text encoder runs, then found by the states.

A denoiser gets states [B, S, C] and nothing that says which text they are of. Between its encoder and the denoiser, a
pipeline is free to repeat rows, put texts in front of each other for guidance, join two encoders side by side and several
runs one after the other, cut off a template or the padding, and scale words; users do all of this themselves, too, and
pass `prompt_embeds` of an earlier day. So what encoders returned last is kept, and looked for in what the denoiser gets:

    the same memory     one run as it is
    `_same_values`      the same values
    `_cut_out`          the values of a part of a run
    `_most_alike`       the same directions, since prompt weighting scales words

The log says on the level "debug" which of them found a text. Training knows its prompts, tells them (`explicit_prompts`),
and has them looked for once.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from mole_diffusers.functional import onto
from mole_diffusers.gates.unchanged import LastTensor
from mole_diffusers.patching.hooks import ForwardHook
from mole_diffusers.patching.undo import Undo

logger = logging.getLogger(__name__)
T = TypeVar("T")

LEAST_RUNS, MOST_BYTES = 8, 32 << 20  # keep this many of the encoders' last runs, and more up to this size
MOST_SEEN = 1 << 14  # remember as many readings of prompts, about 100 MB of them
ALIKE, LEAD = 0.9, 0.02  # least mean cosine of weighted states with their text, and least lead over the next text


def word_mask(ids: torch.Tensor, end: int | None = None) -> torch.Tensor:
    """Token ids [B, T] -> bool [B, T]: the tokens before the padding (the last token, repeated), without `end` tokens."""
    padding = (ids == ids[:, -1:]).flip(1).int().cumprod(1).flip(1).bool()
    return ~padding if end is None else ~padding & (ids != end)


@dataclass(frozen=True)
class EncoderRun:
    """Input and output of one run of a text encoder."""

    encoder: str  # its name in the pipeline
    ids: torch.Tensor  # [B, T]
    words: torch.Tensor  # [B, T] bool, the tokens before the padding
    attended: torch.Tensor | None  # [B, T] bool, the tokens that it attended to; None if that is not known
    states: tuple[torch.Tensor, ...]  # the outputs that a denoiser may get, [B, T, C] each


RowOfRun = tuple[EncoderRun, int]
# The parts of one row of a text, token after token. A part has a row of a run for each encoder whose channels lie side by
# side there. The rest of the text is zeros.
TextRow = list[list[RowOfRun]]


class PromptTokens:
    """The last texts that were encoded.

    Attributes:
        tokenizers: name of a text encoder -> its tokenizer. If it is None, its words are not known.
        current: [B, T] bool, the words of the text that a text encoder is reading or read last; None before the first.
        prompts: those that models read now, a row each, if they are `explicit_prompts`.
    """

    def __init__(self, tokenizers: Mapping[str, Any]) -> None:
        self.tokenizers = dict(tokenizers)
        self.current: torch.Tensor | None = None
        self._known: deque[EncoderRun] = deque()
        self._text = LastTensor()
        self._rows: list[TextRow] | None = None  # of this text
        self.prompts: Sequence[str] = ()
        self._seen: dict[Hashable, Any] | None = None  # what was read of each explicit prompt; None outside of `remembering`

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """A block, such as a run of training, in which what was read of the prompts that are `explicit_prompts` is
        remembered.
        """
        before = self._seen
        self._seen = {} if before is None else before
        try:
            yield
        finally:
            self._seen = before

    @contextmanager
    def explicit_prompts(self, prompts: Sequence[str]) -> Iterator[None]:
        """A block in which every model reads these prompts, a row each, always encoded in the same way."""
        before, self.prompts = self.prompts, prompts
        try:
            yield
        finally:
            self.prompts = before

    def begin(self, words: torch.Tensor) -> None:
        """A text encoder begins to read a text with these words, [B, T]."""
        self.current = words

    def keep(self, encoded: EncoderRun) -> None:
        """Keep a run of a text encoder, instead of the oldest ones."""
        self._known.append(encoded)
        while len(self._known) > LEAST_RUNS and sum(s.nbytes for e in self._known for s in e.states) > MOST_BYTES:
            self._known.popleft()

    def of(
        self, text: torch.Tensor, tokens: Callable[[EncoderRun], torch.Tensor] = attrgetter("words")
    ) -> torch.Tensor | None:
        """The words in states [B, T, C] as a denoiser gets them: [B, T] bool, or None if a row is not known.

        If encoders' channels lie side by side, a token is a word if one of them read a word there.

        Args:
            tokens: which tokens of a run are looked for, [B, T] bool, if not its words.
        """
        rows = self.rows(text)
        if rows is None:
            return None
        masks = torch.zeros(text.shape[:2], dtype=torch.bool, device=text.device)
        for mask, row in zip(masks, rows, strict=True):
            for part in row:
                for run, i in part:
                    words = onto(tokens(run)[i], text.device)
                    mask[: len(words)] |= words
                mask = mask[part[0][0].ids.shape[1] :]
        return masks

    def rows(self, text: torch.Tensor) -> list[TextRow] | None:
        """The runs that each row of states [B, T, C] comes from, or None if a row is not known."""
        if not self._text.is_again(text):
            self._rows = self._once(("denoiser", text.shape[1]), len(text), lambda: self._found(text), _kept_row)
        return self._rows

    def ids(self, encoder: str, ids: torch.Tensor) -> list[tuple[int, ...]]:
        """The token ids [B, T] that a text encoder is about to read, row by row."""
        return self._once((encoder, ids.shape[1]), len(ids), lambda: list(map(tuple, ids.tolist())), tuple) or []

    def _once(self, what: Hashable, rows: int, read: Callable[[], list[T] | None], kept: Callable[[T], T]) -> list[T] | None:
        """`read()`, which waits for the device, and returns something for each row of a text.

        For explicit prompts it is remembered, as `kept` makes it, and not read again.
        """
        if self._seen is None or len(self.prompts) != rows:
            return read()
        keys = [(what, prompt) for prompt in self.prompts]
        if any(key not in self._seen for key in keys):
            if (found := read()) is None:
                return None
            self._seen |= zip(keys, map(kept, found), strict=True)
        seen = [self._seen[key] for key in keys]
        while len(self._seen) > MOST_SEEN:
            del self._seen[next(iter(self._seen))]
        return seen

    def texts(self, states: torch.Tensor) -> list[str]:
        """The texts that the rows of states [B, T, C] are of, as far as they are known and of one part."""
        first = [row[0][0] for row in self.rows(states) or () if len(row) == 1]
        known = [(tokenizer, run.ids[i]) for run, i in first if (tokenizer := self.tokenizers[run.encoder]) is not None]
        return [tokenizer.decode(ids, skip_special_tokens=True) for tokenizer, ids in known]

    def _found(self, text: torch.Tensor) -> list[TextRow] | None:
        for encoded in reversed(self._known):
            if any(_same_memory(states, text) for states in encoded.states):
                return [[[(encoded, i)]] for i in range(len(text))]
        rows = [row for each in text.detach() if (row := self._row(each)) is not None]
        return rows if len(rows) == len(text) else None

    def _row(self, row: torch.Tensor) -> TextRow | None:
        parts: TextRow = []
        at = 0
        while at < len(row) and row[at:].any():  # zeros are SDXL's empty negative prompt, and SD 3's text without a T5
            if not (part := self._part(row[at:])):
                return None
            parts.append(part)
            at += part[0][0].ids.shape[1]
        return parts

    def _part(self, rest: torch.Tensor) -> list[RowOfRun]:
        """The runs at the start of rest [T, C]: the first one, and those of the same tokens in the channels next to it."""
        part: list[RowOfRun] = []
        while rest.any() and (run := self._find(rest)) is not None:
            part.append(run)
            rest = rest[: run[0].ids.shape[1], run[0].states[0].shape[2] :]
        return part

    def _find(self, rest: torch.Tensor) -> RowOfRun | None:
        """The run at the start of rest [T, C]."""
        for find in (_same_values, _cut_out, _most_alike):
            if (run := find(self._known, rest)) is not None:
                logger.debug("a text of %s was recognised by %s", run[0].encoder, find.__name__)
                return run
        return None


class TextHook(ForwardHook):
    """Records the token ids that a text encoder reads, and the states that it returns.

    Args:
        layers: the hidden states that the denoiser may get.
        on_text: called first, with the encoder's name and ids [B, T].
    """

    def __init__(
        self,
        name: str,
        tokens: PromptTokens,
        layers: Sequence[int],
        on_text: Callable[[str, torch.Tensor], None],
    ):
        self.name, self.tokens, self.layers, self.on_text = name, tokens, layers, on_text
        # ids, words and the tokens that are attended to
        self._reading: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None

    def register(self, module: nn.Module, undo: Undo) -> None:
        super().register(module, undo)
        undo.after_forward(module, self.after)

    def before(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        # Prefer the tokenizer: CLIP's published configurations say 2, which is another token.
        tokenizer = self.tokens.tokenizers[self.name]
        end = getattr(module.config if tokenizer is None else tokenizer, "eos_token_id", None)
        of = "target_" if "target_input_ids" in kwargs else ""  # of Anima's conditioner
        ids = args[0] if args else kwargs[f"{of}input_ids"]
        attended = args[1] if len(args) > 1 else kwargs.get(f"{of}attention_mask")
        attended = None if attended is None else attended.bool()
        words = word_mask(ids, end) if attended is None else word_mask(ids, end) & attended
        self.tokens.begin(words)
        self._reading = ids, words, attended
        self.on_text(self.name, ids)

    def after(self, module: Any, args: tuple, output: Any) -> None:
        """Called after the forward."""
        given = getattr(output, "hidden_states", None) or ()
        hidden = [given[layer] for layer in self.layers if -len(given) <= layer < len(given)]
        norm = getattr(getattr(module, "text_model", module), "final_layer_norm", None)
        skipped = [norm(states) for states in hidden] if norm is not None else []  # as `clip_skip` passes them on
        last = output if isinstance(output, torch.Tensor) else output[0]
        last = (last,) if getattr(output, "logits", None) is None else ()  # no denoiser reads logits
        states = [*last, *hidden, *skipped]
        texts = tuple(s.detach() for s in states if s.dim() == 3)
        if self._reading is not None and texts:
            self.tokens.keep(EncoderRun(self.name, *self._reading, texts))


def _kept_row(row: TextRow) -> TextRow:
    """The same without states, and with ids on the CPU."""

    def kept(run: EncoderRun, i: int) -> RowOfRun:
        ids, words = run.ids[i : i + 1].to("cpu", copy=True), run.words[i : i + 1].clone()
        return replace(run, ids=ids, words=words, attended=None, states=()), 0

    return [[kept(*each) for each in part] for part in row]


def _candidates(known: Sequence[EncoderRun], rest: torch.Tensor) -> list[tuple[EncoderRun, torch.Tensor]]:
    """The states, newest first, that rest [T, C] may begin with: they have no more tokens and no more channels."""
    tokens, width = rest.shape
    return [(e, s) for e in reversed(known) for s in e.states if s.shape[1] <= tokens and s.shape[2] <= width]


def _same_values(known: Sequence[EncoderRun], rest: torch.Tensor) -> RowOfRun | None:
    for encoded, states in _candidates(known, rest):
        tokens, width = states.shape[1:]
        same = (states.to(rest.device, rest.dtype) == rest[:tokens, :width]).flatten(1).all(1)  # [b]
        if same.any():
            return encoded, int(same.int().argmax())
    return None


def _cut_out(known: Sequence[EncoderRun], rest: torch.Tensor) -> RowOfRun | None:
    """The text of which rest [T, C] is a part, with its padding or without: pipelines leave out the beginning of a template,
    its end, and padding.
    """
    for encoded in reversed(known):
        for i, attended in enumerate(() if encoded.attended is None else encoded.attended):
            for states in encoded.states:
                if states.shape[2] > rest.shape[1]:
                    continue
                for kept in (attended.nonzero().flatten(), torch.arange(len(attended), device=attended.device)):
                    own = states[i][kept.to(states.device)].to(rest.device, rest.dtype)  # [t, C]
                    if (start := _place(own, rest)) is None:
                        continue
                    part = slice(start, start + min(len(own) - start, len(rest)))
                    ids, words = (each[i : i + 1, kept[part].to(each.device)] for each in (encoded.ids, encoded.words))
                    return EncoderRun(encoded.encoder, ids, words, None, (own[None, part],)), 0
    return None


def _place(own: torch.Tensor, rest: torch.Tensor) -> int | None:
    """Where in own [t, C] rest [T, C or more] begins, which goes on to its end or to that of `own`, and is zeros then."""
    for start in (own == rest[0, : own.shape[1]]).all(1).nonzero().flatten().tolist():
        count = min(len(own) - start, len(rest))
        if torch.equal(own[start:][:count], rest[:count, : own.shape[1]]) and not rest[count:].any():
            return start
    return None


def _most_alike(known: Sequence[EncoderRun], rest: torch.Tensor) -> RowOfRun | None:
    """The text whose words point the same way, since prompt weighting scales them. None if two texts are about equally
    close.
    """
    best: dict[tuple, tuple[float, EncoderRun, int]] = {}  # the ids -> how alike, and where
    for encoded, states in _candidates(known, rest):
        tokens, width = states.shape[1:]
        cosine = F.cosine_similarity(states.to(rest.device).float(), rest[:tokens, :width].float(), dim=-1)  # [b, T]
        words = encoded.words.to(cosine)  # [b, T]
        value, index = ((cosine * words).sum(1) / words.sum(1).clamp_min(1)).max(0)
        key = (encoded.encoder, *encoded.ids[int(index)].tolist())
        if key not in best or value > best[key][0]:
            best[key] = float(value), encoded, int(index)
    ranked = sorted(best.values(), key=lambda found: found[0], reverse=True)
    if not ranked or ranked[0][0] < ALIKE or (len(ranked) > 1 and ranked[0][0] - ranked[1][0] < LEAD):
        return None
    return ranked[0][1:]


def _same_memory(states: torch.Tensor, text: torch.Tensor) -> bool:
    """Whether the two share their memory, which is known without waiting for a device, and even on meta."""

    def at(tensor: torch.Tensor) -> tuple:
        storage = tensor.untyped_storage()._cdata
        return storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype

    return at(states) == at(text)
