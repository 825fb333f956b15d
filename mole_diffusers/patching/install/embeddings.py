"""Trained embeddings of LoRA files in a pipeline's text encoders: new tokens, and rows of the embedding for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from mole_diffusers.lora import Expert
from mole_diffusers.lora.keys import EMBEDDING
from mole_diffusers.patching.undo import Undo

__all__ = ["add_words"]

Words = dict[str, torch.Tensor]  # a word that was trained -> its vectors [n, C]


def left_out(experts: Mapping[str, Expert]) -> list[str]:
    """A sentence for each embedding that is for no text encoder known here."""
    return [
        f"expert {name!r}: {key!r} of its file is not used: {why}"
        for name, expert in experts.items()
        for key, why in expert.notes.left_out.items()
        if EMBEDDING.fullmatch(key)
    ]


def embedded(experts: Mapping[str, Expert]) -> dict[str, dict[str, Words]]:
    """Text encoder -> expert -> its words."""
    found: dict[str, dict[str, Words]] = {}
    for name, expert in experts.items():
        for word, parts in expert.embeddings.items():
            for part, vectors in parts.items():
                found.setdefault(part, {}).setdefault(name, {})[word] = vectors
    return found


def add_words(pipe: Any, part: str, words: Mapping[str, Words], undo: Undo | ExitStack) -> Iterator[str]:
    """Give one text encoder the words of experts, until `undo` closes. Yields a sentence for each that it cannot take."""
    encoder: Any = getattr(pipe, part, None)
    tokenizer: Any = getattr(pipe, part.replace("text_encoder", "tokenizer"), None)
    taken: Words = {}
    for name, own in words.items():
        for word, vectors in own.items():
            why = _obstacle(pipe, encoder, tokenizer, word, vectors)
            tokens = [word, *(f"{word}_{i}" for i in range(1, len(vectors)))]  # the names that diffusers looks for
            if not why and any(token in taken or token in tokenizer.get_vocab() for token in tokens):
                why = "the tokenizer or another LoRA has that word already"
            if why:
                yield f"expert {name!r}: its trained embedding of {word!r} is not used in the {part}: {why}"
            else:
                taken |= dict(zip(tokens, vectors, strict=True))
    if taken:
        _put(encoder.get_input_embeddings(), tokenizer, taken, undo)


def _obstacle(pipe: Any, encoder: Any, tokenizer: Any, word: str, vectors: torch.Tensor) -> str:
    if encoder is None or tokenizer is None:
        return "the pipeline has none"
    if "CLIP" not in type(encoder).__name__:
        return f"it is a {type(encoder).__name__}"
    table = encoder.get_input_embeddings()
    if not isinstance(getattr(tokenizer, "_tokenizer", None), Tokenizer) or len(tokenizer) != len(table.weight):
        return "its tokenizer takes no new words"
    if vectors.shape[1] != table.weight.shape[1]:
        return f"its vectors have {vectors.shape[1]} numbers, and the encoder's {table.weight.shape[1]}"
    if len(vectors) > 1 and not hasattr(pipe, "maybe_convert_prompt"):
        return f"{type(pipe).__name__} reads a word as a single vector, and it has {len(vectors)}"
    return ""


def _put(table: nn.Embedding, tokenizer: Any, taken: Words, undo: Undo | ExitStack) -> None:
    plain, rows, trains = tokenizer._tokenizer, len(table.weight), table.weight.requires_grad

    def take_out() -> None:  # it may run twice
        later = [token for token in _added(tokenizer) if token not in taken and token not in before]
        kept = [*range(rows), *range(rows + len(taken), len(table.weight))]  # what others have added since stays
        if len(table.weight) == rows + len(taken) + len(later):
            _replace(table, table.weight.detach()[kept], trains)
        tokenizer._tokenizer = plain
        tokenizer.add_tokens(later)

    before = _added(tokenizer)
    undo.callback(take_out)
    tokenizer._tokenizer = Tokenizer.from_str(plain.to_str())
    tokenizer.add_tokens(list(taken))
    _replace(table, torch.cat([table.weight.detach(), torch.stack([*taken.values()]).to(table.weight)]), trains)


def _added(tokenizer: Any) -> list[str]:
    """The words that a tokenizer was given, in the order of their tokens."""
    return sorted(tokenizer.get_added_vocab(), key=tokenizer.get_added_vocab().__getitem__)


def _replace(table: nn.Embedding, rows: torch.Tensor, trains: bool) -> None:
    table.weight, table.num_embeddings = nn.Parameter(rows, requires_grad=trains), len(rows)
