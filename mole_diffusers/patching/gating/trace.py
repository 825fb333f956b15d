"""A record of the gates' decisions inside a block: weights by gate location, step, batch row and expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from mole_diffusers import functional
from mole_diffusers.binding.picture_layout import Layout
from mole_diffusers.patching.gating.decision import Decision, Present
from mole_diffusers.patching.gating.shared_state import Step


@dataclass(eq=False)
class Trace:
    """Recorded by `mixture.trace()`.

    Attributes:
        experts: names, in the order of the last axis.
        step: where sampling is.
        before: its number when the block began; a trace counts its own.
        records: (gate location, step, applied weights [N] or [B, N] on the CPU). Step -1 is before the first denoiser call,
            when text encoders run. If some layers of a gate location have fewer of the experts, they are recorded
            separately, as "SITE (fox, ink)". Layers outside of blocks share one record, without a plan's strengths by block.
        layouts: where each expert acted, for each picture of the last call. Available when the block has ended.
        maps: with `maps=True`, number of the denoiser call, from 0 -> for each picture, name of an expert or noun -> [h,
            w] on the CPU. It is the attention to its words, 0..1 in each layer that is read, summed over these layers.
            The layout is decided from those of the first call. Calls with a text that names nothing have none.
    """

    experts: list[str]
    step: Step = field(repr=False)
    before: int = field(repr=False)
    records: list[tuple[str, int, torch.Tensor]] = field(default_factory=list, repr=False)
    layouts: list[Layout] = field(default_factory=list, repr=False)
    maps: dict[int, list[dict[str, torch.Tensor]]] = field(default_factory=dict, repr=False)
    _largest: dict[str, Present] = field(default_factory=dict, repr=False)

    def record(self, decision: Decision) -> None:
        location = decision.name
        largest = self._largest.setdefault(location, decision.present)
        if decision.present != largest:
            names = [name for name, there in zip(self.experts, decision.present, strict=True) if there]
            location = f"{location} ({', '.join(names)})"
        self.records.append((location, self.step.number - self.before, decision.weights.detach().float().cpu()))

    def record_layouts(self, layouts: list[Layout]) -> None:
        self.layouts = layouts

    def record_maps(self, pictures: list[dict[str, torch.Tensor]]) -> None:
        kept = self.maps.setdefault(self.step.number - self.before, [{} for _ in pictures])
        for maps, layer in zip(kept, pictures, strict=True):
            maps |= {name: maps.get(name, 0) + map_ for name, map_ in layer.items()}

    @property
    def locations(self) -> list[str]:
        """Every gate that was evaluated, in the order of first evaluation."""
        return list(dict.fromkeys(location for location, _, _ in self.records))

    def weights(self, location: str) -> torch.Tensor:
        """The weights at one gate location by step, mean over batch rows: [steps, N]. In a text encoder, by call instead of
        step.

        In a step that is drawn in tiles, each expert's weight is the mean over the tiles in which it is not 0.
        """
        if location not in (found := self.all_weights()):
            raise ValueError(f"no gate was evaluated at {location!r}; known: {self.locations}")
        return found[location]

    def all_weights(self) -> dict[str, torch.Tensor]:
        """`weights` of every gate location, read in one pass: SDXL has 700."""
        # gate location -> (step, number before the first step)
        steps = dict[str, dict[tuple[int, int], list[torch.Tensor]]]()
        for i, (location, step, weights) in enumerate(self.records):
            mean = weights.reshape(-1, weights.shape[-1]).mean(0)  # [N]
            steps.setdefault(location, {}).setdefault((step, i if step < 0 else 0), []).append(mean)
        return {location: torch.stack([_mean_of_shown(each) for each in of.values()]) for location, of in steps.items()}

    def mean(self) -> dict[str, float]:
        """Each expert's weight, averaged over steps, rows and the gate locations in which it is not 0."""
        self._refuse_empty()
        average = _mean_of_shown([weights.mean(0) for weights in self.all_weights().values()])
        return dict(zip(self.experts, average.tolist(), strict=True))

    def entropy(self) -> float:
        """Mean entropy of the gates in nats; ln N if all experts share equally."""
        self._refuse_empty()
        return torch.cat([functional.entropy(w).reshape(-1) for _, _, w in self.records]).mean().item()

    def _refuse_empty(self) -> None:
        if not self.records:
            raise ValueError("this trace has no records: no gate was evaluated; call the pipeline inside the block")


def _mean_of_shown(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean of weights [N] each, for each expert over those that are not 0."""
    table = torch.stack(list(weights))
    return table.sum(0) / (table != 0).sum(0).clamp_min(1)
