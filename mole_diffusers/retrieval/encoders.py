"""Text encoders for a library: texts -> unit vectors; and the phrases of a text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from copy import deepcopy
from types import SimpleNamespace
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from mole_diffusers.mixture import attached

WORD = re.compile(r"[\w<>'’+-]+|[^\w\s]")
BREAKS = frozenset(
    ["and", "with", "of", "in", "on", "by", "at", "a", "an", "the", "under", "over", "near", "beside", "behind", "from",
     "to", "for", "as", "into"]
)  # fmt: skip
COMMON = ("photo", "drawing", "painting", "picture", "background", "person", "animal", "object", "style")


def phrases(text: str) -> list[str]:
    """The text between punctuation and function words: "ink drawing of a fox, at night" -> ink drawing; fox; night.

    They are in lower case; "<new1>" and "sks-dog" are one word each. A phrase made only of everyday words ("drawing") does
    not ask for a LoRA and is left out.
    """
    found: list[list[str]] = [[]]
    for token in WORD.findall(text.lower()):
        if token in BREAKS or not re.search(r"\w", token):
            found.append([])
        else:
            found[-1].append(token)
    return [" ".join(phrase) for phrase in found if set(phrase) - set(COMMON)]


class Encoder(Protocol):
    """`encoder(texts)` -> [n, D] fp32 on the CPU, each row of unit length. An index stores the encoder's `id`."""

    id: str

    def __call__(self, texts: Sequence[str]) -> torch.Tensor: ...


class PipelineText:
    """A pipeline's own first text encoder, usually CLIP: the mean state of a text's tokens, minus that of everyday words.

    CLIP's own summary, the end-of-text state, separates concepts less well if the text encoder was not trained jointly
    with images. All states share a large common part, which `COMMON` estimates. Attached LoRAs are switched off while it
    reads.

    Raises ValueError for a pipeline without a first text encoder, such as SDXL's refiner.
    """

    def __init__(self, pipe: Any):
        if getattr(pipe, "text_encoder", None) is None:
            kind = type(pipe).__name__
            raise ValueError(f"{kind} has no text encoder to read texts with; give a sentence-transformers model")
        self.pipe = pipe
        config = pipe.text_encoder.config
        self.id = f"{type(pipe.text_encoder).__name__} of {config.num_hidden_layers} layers and width {config.hidden_size}"
        self._common: torch.Tensor | None = None  # [D]

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        if self._common is None:
            self._common = self._mean_states(COMMON).mean(0)
        return F.normalize(self._mean_states(texts) - self._common, dim=-1)

    @torch.no_grad()
    def _mean_states(self, texts: Sequence[str]) -> torch.Tensor:
        tokenizer, model = self.pipe.tokenizer, self.pipe.text_encoder
        rows = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        ids, mask = rows.input_ids, rows.attention_mask  # [n, T]; T5 would read the padding too
        mixture = attached(self.pipe)
        with nullcontext() if mixture is None else mixture.fixed({}):
            read = model(ids.to(model.device), attention_mask=mask.to(model.device))
        states = read.last_hidden_state.float().cpu()  # [n, T, D]
        special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        own = ~torch.isin(ids, torch.tensor([token for token in special if token is not None]))
        return (states * own[..., None]).sum(1) / own.sum(1, keepdim=True).clamp_min(1)


def text_beside(pipe: Any) -> PipelineText | None:
    """A separate text encoder that shares the pipeline's weights and gives the same vectors.

    No LoRA reaches it, so it can read while the pipeline draws. None if offloading moves the weights, or without a text
    encoder.
    """
    encoder = getattr(pipe, "text_encoder", None)
    if encoder is None or hasattr(encoder, "_hf_hook"):
        return None
    mixture = attached(pipe)
    shared = {id(tensor): tensor for tensor in (*encoder.parameters(), *encoder.buffers())}
    with nullcontext() if mixture is None else mixture.lifted():
        twin = deepcopy(encoder, shared)
    return PipelineText(SimpleNamespace(text_encoder=twin, tokenizer=deepcopy(pipe.tokenizer)))


class SentenceText:
    """A sentence-transformers model, by name or folder. Needs that package: pip install mole-diffusers[library]."""

    def __init__(self, name: str):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ValueError(
                f"encoder {name!r} needs the package sentence-transformers: pip install mole-diffusers[library]"
            ) from error
        self.id, self.model = f"sentence-transformers {name}", SentenceTransformer(name)

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        vectors = self.model.encode(list(texts), convert_to_tensor=True, show_progress_bar=False)
        return F.normalize(vectors.float().cpu(), dim=-1)
