"""Expert: one concept LoRA in memory, a low-rank change of weight per layer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

Embeddings = Mapping[str, Mapping[str, torch.Tensor]]  # a word -> text encoder -> its trained vectors [n, C]
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")


@dataclass(frozen=True)
class LoraWeights:
    """One layer of one LoRA: delta W = scale * up @ down. With magnitudes it is DoRA, see `dora`."""

    down: torch.Tensor  # [r, Cin] or [r, Cin, k, k]; [r, Cin k k] if the file does not tell k
    up: torch.Tensor  # [Cout, r] or [Cout, r, 1, 1]
    scale: float  # alpha / r of this layer
    error: float = 0.0  # |delta W of the file - this| / |delta W|: not 0 if LoHa or LoKr was cut to a lower rank
    magnitude: torch.Tensor | None = None  # [Cout], of DoRA: the norms of the rows of the changed weight

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def of_rows(self, rows: torch.Tensor | slice) -> LoraWeights:
        """These rows of the change of weight.

        If a trainer kept the parts of a fused weight apart, the ranks of the others are columns of zeros. They are dropped.
        """
        up = self.up[rows]
        used = up.float().transpose(0, 1).flatten(1).any(1)  # [r]
        used[0] |= not used.any()
        magnitude = None if self.magnitude is None else self.magnitude[rows]
        return LoraWeights(self.down[used].clone(), up[:, used].clone(), self.scale, self.error, magnitude)

    def largest(self) -> float:
        """An upper bound on every number in scale * down, in up, and in the change of weight."""
        down, up = (float(half.float().abs().max()) for half in (self.down, self.up))
        return max(abs(self.scale) * down * max(1.0, up * self.rank), up)

    def delta(self) -> torch.Tensor:
        """The full change of the layer's weight, fp32: [Cout, Cin] or [Cout, Cin, k, k]. Raises ValueError for DoRA."""
        if self.magnitude is not None:
            raise ValueError("DoRA's change of weight depends on the base's own weights")
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return self.scale * product.reshape(self.up.shape[0], *self.down.shape[1:])


@dataclass(frozen=True)
class FileNotes:
    """What reading a file found out about its layers."""

    algorithms: dict[str, int] = field(default_factory=dict)  # "LoRA", "LoCon", "LoHa", "LoKr", "DoRA" -> layers
    left_out: dict[str, str] = field(default_factory=dict)  # key or layer of the file -> why it is not used
    file_names: dict[str, str] = field(default_factory=dict, repr=False)  # "component.layer" -> its name in the file


@dataclass(frozen=True)
class Expert:
    """One concept LoRA: every layer of its file, and what the file says about itself.

    `layers` maps a component ("unet", "text_encoder", ...) to {layer key: LoraWeights}. A layer key is the module's name
    in the model with underscores for dots, the one form that all files share. Layers of a transformer may still have the
    names of the file, if only a pipeline can tell what they are called there (see `host_names`).
    """

    name: str
    layers: dict[str, dict[str, LoraWeights]] = field(repr=False)  # megabytes of numbers
    format: str  # "diffusers", "peft", "kohya", "onetrainer", "omi", "comfy" or "xlabs"
    base: str  # the model family by shapes, else by metadata: "SD 1.x", "SDXL", "Flux", ..., "unknown"
    triggers: tuple[str, ...]  # those that are stated; see `own_words` for all words that call it
    source: str  # the file
    sha256: str  # of the tensor bytes after the header, so that edited metadata does not change it
    metadata: dict[str, str] = field(default_factory=dict, repr=False)
    # a word that was trained with it -> text encoder -> its vectors [n, C]
    embeddings: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict, repr=False)
    notes: FileNotes = field(default_factory=FileNotes)

    @property
    def needs_base(self) -> bool:
        """Whether a layer is DoRA, whose change depends on the base's own weights."""
        return any(w.magnitude is not None for layers in self.layers.values() for w in layers.values())

    @property
    def ranks(self) -> tuple[int, int]:
        """Smallest and largest rank over all layers."""
        ranks = [w.rank for layers in self.layers.values() for w in layers.values()]
        return min(ranks), max(ranks)


def joined_embeddings(experts: Iterable[Expert]) -> dict[str, dict[str, torch.Tensor]]:
    """The trained embeddings of several experts. Warns of a word that an earlier one has: its own are left out."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for expert in experts:
        for word, vectors in expert.embeddings.items():
            if found.setdefault(word, vectors) is not vectors:
                warnings.warn(
                    f"the trained embedding of {word!r} of {expert.name!r} is left out: another has it", stacklevel=3
                )
    return found
