"""How gates are trained, as plain data that a YAML or JSON file can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from mole_diffusers.training.objectives import BALANCE, OBJECTIVES, Weighted, parse
from mole_diffusers.training.starts import STARTS

PRECISIONS = ("no", "bf16", "fp16")
SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup", "polynomial", "cosine_with_restarts")
PASSING = ("every", "keep", "tracker", "validation")  # what a run may change when it goes on


@dataclass(frozen=True)
class Validation:
    """Pictures on the way, of fixed noise.

    Attributes:
        every: updates between looks; 0 never looks.
        prompts: what is drawn; empty means the lesson's composed prompts.
        seeds: pictures per prompt.
        steps, guidance: of the sampler.
    """

    every: int = 0
    prompts: tuple[str, ...] = ()
    seeds: int = 4
    steps: int = 20
    guidance: float = 7.5


@dataclass(frozen=True)
class GateTraining:
    """How gates are trained.

    Attributes:
        terms: objective -> weight, or {"weight": ..., "batch": ..., option: ...}; see `objectives.OBJECTIVES` for names and
            options. "balance" is MoLE's balance loss, its weight the paper's alpha (0.5 there), and MiLoRA's load-balance
            loss for "prompt" gates (0.01 there).
        initial: the gates' weights before the first update: "uniform", as the gates begin by themselves; "scalars", the best
            weights per gate on the experts' own activations; "ssr", those nearest to SSR-Merge. See `starts.begin`.
        steps: updates.
        batch: rows per term and update, over all processes and accumulated parts together.
        accumulation: parts that a batch is computed in, for less memory.
        drop: chance of each expert to sit out an update, never all of them (RAMoLE: 0.5).
        lr: AdamW's peak rate; None takes what suits each gate, see `rates.rates`.
        schedule, warmup: a diffusers schedule of the rate by name, and its first updates of growing rate.
        weight_decay, max_norm: AdamW's decay, and the gradient's greatest length (0 does not clip it).
        ema: decay of a running mean of the gates, which is what is saved in the end; 0 keeps none.
        precision: "no", "bf16" or "fp16" (with loss scaling) of the forward pass; gates stay fp32.
        checkpointing: compute activations again in the backward pass, for less memory and more time.
        seed: of every random choice.
        every, keep: updates between checkpoints, and how many are kept.
        tracker: a tracker that Accelerate knows ("tensorboard", "wandb"), or None.
    """

    terms: Mapping[str, float | Mapping[str, Any]] = field(default_factory=lambda: {"single": 1.0, "composed": 1.0})
    initial: str = "uniform"
    steps: int = 150
    batch: int = 8
    accumulation: int = 1
    drop: float = 0.0
    lr: float | None = None
    schedule: str = "cosine"
    warmup: int = 0
    weight_decay: float = 0.0
    max_norm: float = 1.0
    ema: float = 0.0
    precision: str = "no"
    checkpointing: bool = False
    seed: int = 0
    every: int = 50
    keep: int = 2
    tracker: str | None = None
    validation: Validation = Validation()

    def __post_init__(self) -> None:
        if not any(weighted.weight for name, weighted in self.parsed().items() if name != BALANCE):
            raise ValueError(f"at least one term of {list(OBJECTIVES)} needs a weight, got {dict(self.terms)}")
        counts = ("steps", "batch", "accumulation", "every", "keep")
        if small := [name for name in counts if getattr(self, name) < 1]:
            raise ValueError(f"{small[0]} must be 1 or more, got {getattr(self, small[0])}")
        for name, known in (("precision", PRECISIONS), ("schedule", SCHEDULES), ("initial", tuple(STARTS))):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {list(known)}")
        for name in ("ema", "drop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be 0 or more and less than 1, got {getattr(self, name)}")

    def parsed(self) -> dict[str, Weighted]:
        """The terms with a weight."""
        found = {name: parse(name, given) for name, given in self.terms.items()}
        return {name: weighted for name, weighted in found.items() if weighted.weight}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, which `from_dict` reads."""
        return asdict(self) | {"validation": asdict(self.validation) | {"prompts": list(self.validation.prompts)}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GateTraining:
        """Raises ValueError naming what is unknown."""
        values, looks = dict(values), dict(values.get("validation", {}))
        for given, kind in ((values, cls), (looks, Validation)):
            known = [f.name for f in fields(kind)]
            if unknown := set(given) - set(known):
                raise ValueError(f"unknown training options {sorted(unknown)}; known: {known}")
        if values.get("precision") is False:  # what YAML makes of a bare no
            values["precision"] = "no"
        looks["prompts"] = tuple(looks.get("prompts", ()))
        return cls(**values | {"validation": Validation(**looks)})
