"""Embeddings (textual inversion): words that are learned vectors, written `embedding:NAME` in a prompt as in ComfyUI."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from mole_app.studio.names import known_names, matching
from mole_diffusers.patching.install.embeddings import add_words
from mole_diffusers.safe_files import read_safetensors

MOST_VECTORS = 75  # as many as a prompt has tokens
ENCODERS = ("text_encoder", "text_encoder_2")


def spelled(text: str, known: Collection[str], words: Callable[[str], str]) -> str:
    """The text with `words` of each embedding in place of `embedding:NAME`, in any case.

    Raises ValueError for an unknown one. Names with other characters than letters, digits and "_-.+" are found if they are
    known.
    """

    def put(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if (here := matching(name, known)) is None:
            raise ValueError(f"there is no embedding {name!r}; {known_names(name, known)}")
        return words(here)

    here = "|".join(re.escape(name) for name in sorted(known, key=len, reverse=True)) or "(?!)"
    ends = r"(?![.+-]*\w)"  # what follows is no part of the name, such as a full stop
    named = rf"\bembedding:(?:({here})(?:\.safetensors)?{ends}|([\w.+-]*\w))"
    return re.sub(named, put, text, flags=re.IGNORECASE)


def named(texts: Collection[str], known: Collection[str]) -> list[str]:
    """The embeddings that texts name. Raises what `spelled` raises."""
    found = dict[str, str]()
    for text in texts:
        spelled(text, known, lambda name: found.setdefault(name, name))
    return list(found)


@contextmanager
def taught(pipe: Any, files: Mapping[str, Path]) -> Iterator[dict[str, str]]:
    """Teach a pipeline's text encoders the words of embeddings, for the length of a `with` block; {name: its words}.

    They are no words that people write, so that other prompts are read as before.

    Raises ValueError for a file that is no embedding, or one for another kind of model.
    """
    words, parts = dict[str, str](), dict[str, dict[str, dict[str, torch.Tensor]]]()
    widths = {part: model.config.hidden_size for part, model in _encoders(pipe).items()}
    for name, file in files.items():
        read = read_safetensors(file)
        vectors = _vectors(read.tensors, name)
        if missing := next((width for width in widths.values() if width not in vectors), None) or not widths:
            own = ", ".join(map(str, vectors))
            reads = f"reads vectors of {missing}, not {own}" if widths else "reads no embeddings"
            raise ValueError(f"the embedding {name!r} is for another kind of model: {type(pipe).__name__} {reads}")
        tokens = [f"embedding{read.sha256[:12]}x{i}x" for i in range(len(next(iter(vectors.values()))))]
        words[name] = " ".join(tokens)
        for part, width in widths.items():
            parts.setdefault(part, {})[name] = dict(zip(tokens, vectors[width].split(1), strict=True))
    with ExitStack() as undo:
        for part, taken in parts.items():
            for problem in add_words(pipe, part, taken, undo):
                raise ValueError(problem)
        yield words


def _encoders(pipe: Any) -> dict[str, Any]:
    """The text encoders that read embeddings: CLIP's."""
    models = {name: getattr(pipe, name, None) for name in ENCODERS}
    return {name: model for name, model in models.items() if "CLIP" in type(model).__name__}


def _vectors(tensors: Mapping[str, torch.Tensor], name: str) -> dict[int, torch.Tensor]:
    """{width: [n, width]}: A1111's "emb_params", SDXL's "clip_l" and "clip_g", or diffusers' single vector."""
    found = {}
    for tensor in tensors.values():
        rows = tensor.unsqueeze(0) if tensor.dim() == 1 else tensor
        if rows.dim() != 2 or not 1 <= len(rows) <= MOST_VECTORS or not torch.isfinite(rows.float()).all():
            raise ValueError(f"{name!r} is no embedding: it should have 1 to {MOST_VECTORS} vectors of finite numbers")
        found[rows.shape[1]] = rows.float()
    if not found or len(found) != len(tensors) or len({len(rows) for rows in found.values()}) > 1:
        raise ValueError(f"{name!r} is no embedding: it should have one tensor for each text encoder, with as many vectors")
    return found
