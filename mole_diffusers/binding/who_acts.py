"""Which expert acts on which token of a text: one alone on every token, several not on the words of one another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from mole_diffusers.binding.config import Bound
from mole_diffusers.binding.regions import AUTO, EVERYWHERE
from mole_diffusers.binding.sentence import Sentence, Who, parse
from mole_diffusers.binding.words import Reading


def read_prompt(prompt: str, bound: Sequence[Bound], acting: Sequence[bool]) -> Sentence:
    """What a prompt says, given each expert's words and region, and who is on, [N] each."""
    return parse(prompt, [b.words for b in bound], who_counts(bound, acting))


def who_counts(bound: Sequence[Bound], acting: Sequence[bool]) -> Who:
    """What texts are read for, given each expert's words and region, and who is on, [N] each."""
    return Who(
        frozenset(k for k, on in enumerate(acting) if on),
        frozenset(k for k, b in enumerate(bound) if b.given is not None),
        frozenset(k for k, b in enumerate(bound) if b.region == EVERYWHERE),
    )


def present(bound: Sequence[Bound], acting: Sequence[bool], mentioned: Sequence[bool]) -> tuple[bool, ...]:
    """[N]: the experts that act on a text: those that are on, but not those that it should name and does not."""
    return tuple(on and (said or not b.needs_words) for b, on, said in zip(bound, acting, mentioned, strict=True))


def acting_tokens(bound: Sequence[Bound], acting: Sequence[bool], readings: Sequence[Reading]) -> torch.Tensor | None:
    """[B, T, N] bool: the tokens of each text that each expert acts on; None if every expert acts on every token.

    One expert alone acts on every token. Several act on their own words and on those of nobody. One without words that
    the user wants everywhere acts on the words of others, too.
    """
    everywhere = torch.tensor([not b.words and b.region == EVERYWHERE for b in bound])
    rows = []
    for reading in readings:
        there = present(bound, acting, reading.mentioned)
        own = torch.tensor(reading.own).T & torch.tensor(acting)  # [T, N]
        nobodys = ~own.any(1, keepdim=True)  # [T, 1]
        rows.append(own | nobodys | everywhere if sum(there) > 1 else torch.ones_like(own))
    acts = torch.stack(rows)
    return None if acts.all() else acts


def notices(
    names: Sequence[str], bound: Sequence[Bound], acting: Sequence[bool], mentioned: Sequence[bool]
) -> Iterator[str]:
    """What a user should know about who acts on a text that has these experts' words."""
    there = present(bound, acting, mentioned)
    for name, own, on, acts, said in zip(names, bound, acting, there, mentioned, strict=True):
        words = ", ".join(own.words)
        if on and not acts:
            yield f"expert {name!r} is silent: the prompt has none of its words, {words}"
        elif on and own.words and not said and own.region == AUTO:
            yield f"expert {name!r} acts everywhere: the prompt has none of its words, {words}"
        elif on and not own.words and own.region == AUTO and sum(there) > 1:
            yield f"expert {name!r} acts everywhere: it has no words of its own"
