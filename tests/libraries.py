"""LoRA libraries in memory, and an encoder that can be checked by hand."""

import zlib

import torch
import torch.nn.functional as F

from mole_diffusers.retrieval import LibraryEntry, LoraLibrary, store
from mole_diffusers.retrieval.library import embedding

SAMPLES = {
    "fox": ["a red fox in snow", "fox on grass", "a fox"],
    "ink": ["ink drawing of a cat", "black ink drawing"],
    "owl": ["an owl at night", "white owl"],
}


class WordEncoder:
    """An encoder that can be checked by hand: one axis per word."""

    id = "words"

    def __call__(self, texts):
        rows = torch.zeros(len(texts), 4096)
        for row, text in zip(rows, texts, strict=True):
            for word in text.split():
                row[zlib.crc32(word.encode()) % 4096] += 1
        return F.normalize(rows, dim=-1)


def library(samples, triggers=None, bases=None):
    """A library in memory."""
    encoder = WordEncoder()
    entries = tuple(
        LibraryEntry(
            n, f"{n}.safetensors", (bases or {}).get(n, "SD 1.x"), tuple((triggers or {}).get(n, ())), tuple(s), "", ()
        )
        for n, s in samples.items()
    )
    rows = torch.stack([embedding(s, encoder) for s in samples.values()])
    return LoraLibrary("loras", store.Index(encoder.id, encoder(store.PROBE), entries, rows, {}), encoder)


def names(found):
    return [each.name for each in found]
