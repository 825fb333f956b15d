"""How gates and LoRAs are trained: plain data, checked when it is made, that a YAML or JSON file can hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_type_hints

from mole_diffusers.options import check_kinds, check_names, check_options

Precision = Literal["no", "bf16", "fp16"]
Schedule = Literal["cosine", "linear", "constant", "constant_with_warmup", "polynomial", "cosine_with_restarts"]
Initial = Literal["uniform", "scalars", "ssr"]  # weights of gates, see `initialization`
LORA_LAYERS = {  # kind -> module names, as a regular expression
    "attention": r".*(attn[12]\.to_(q|k|v|out\.0)|self_attn\.(q|k|v|out)_proj)",
    "feed-forward": r".*(ff\.net\.(0\.proj|2)|mlp\.fc[12])",
    "convolution": r".*(resnets\.\d+\.conv[12]|proj_in|proj_out)",
}
LEAST_BEAM_RANK = 8  # with fewer ranks, one is too large a share to give up
LEAST = {  # of numbers, by their names in all settings
    **dict.fromkeys(("weight", "warmup", "weight_decay", "max_norm", "lr", "text_lr", "prior"), 0),
    **dict.fromkeys(("rank", "batch", "seeds", "steps", "pictures", "accumulation", "every", "keep"), 1),
}


def _check(config: Any, what: str, **least: int) -> None:
    """Raise ValueError for a value of another kind, or a number below `least` or else `LEAST`; None is not set."""
    check_kinds(vars(config), get_type_hints(type(config)), what)
    for name, low in (LEAST | least).items():
        value = vars(config).get(name)
        if value is not None and value < low:
            raise ValueError(f"{name} of {what} must be {low} or more, got {value!r}")


def _settings(values: Mapping[str, Any], config: type) -> dict[str, Any]:
    """The settings of a file; YAML makes false of a bare no. Raises ValueError for other names; `config` checks kinds."""
    check_names(values, get_type_hints(config), "the training")
    return dict(values) | ({"precision": "no"} if values.get("precision") is False else {})


# ---- the terms of the loss


@dataclass(frozen=True, kw_only=True)
class Term:
    """One term of the loss of gate training; its objective is the function of that name in `objectives.OBJECTIVES`.

    Attributes:
        weight: factor of the term in the loss, 0 or more; 0 leaves it out.
        batch: rows per update; None takes `GateTraining.batch`.
    """

    weight: float = 1.0
    batch: int | None = None


@dataclass(frozen=True, kw_only=True)
class DistillationTerm(Term):
    """Terms "single", "composed" and "base": match a teacher's predictions on its own trajectories.

    Attributes:
        seeds: trajectories for each expert, and for each size that its pictures have; at least one per prompt.
        steps, guidance: of the sampler.
    """

    seeds: int = 8
    steps: int = 20
    guidance: float = 3.0


@dataclass(frozen=True, kw_only=True)
class SeparateTerm(Term):
    """Term "separate": keep the subjects' cross-attention apart.

    Attributes:
        steps, guidance: of the pictures, whose attention is read after a random number of steps.
    """

    steps: int = 10
    guidance: float = 3.0


@dataclass(frozen=True, kw_only=True)
class CollageTerm(Term):
    """Term "collage": the diffusion loss on collages of the subjects, each drawn alone.

    Attributes:
        pictures: collages per composed prompt.
        seeds, steps, guidance: pictures per subject, and how they are sampled. The loss is that of a prediction guided
            alike. Above 1 it misleads: a guided prediction is no denoiser of the pictures that guidance draws, and its least
            error has less of each LoRA than a picture needs.
    """

    pictures: int = 32
    seeds: int = 12
    steps: int = 12
    guidance: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ClipTerm(Term):
    """Term "clip": MoLE's own objective, with a CLIP that looks at each step of a trajectory.

    Attributes:
        lengths: least and most steps of a trajectory, drawn uniformly.
        steps: denoising steps per update, whose losses are summed.
    """

    lengths: Sequence[int] = (20, 50)
    steps: int = 2

    def __post_init__(self) -> None:
        if len(self.lengths) != 2 or not 1 <= self.lengths[0] <= self.lengths[1]:
            raise ValueError(f"lengths of the clip term must be the least and the most steps, got {list(self.lengths)}")


@dataclass(frozen=True, kw_only=True)
class RolloutTerm(Term):
    """Term "rollout": a CLIP's reward on finished pictures.

    Attributes:
        steps: of the rollout; time and memory grow in proportion.
        guidance: classifier-free guidance; 1 is without.
        checkpointing: keep the activations of one step at a time, for about a third more time.
    """

    steps: int = 8
    guidance: float = 3.0
    checkpointing: bool = False


BALANCE = "balance"  # the one term without an objective of its own: it reads the gates while the others run
TERMS: dict[str, type[Term]] = {
    "single": DistillationTerm,
    "composed": DistillationTerm,
    "base": DistillationTerm,
    "separate": SeparateTerm,
    "denoise": Term,
    "clip": ClipTerm,
    "collage": CollageTerm,
    "rollout": RolloutTerm,
    BALANCE: Term,
}


def parse_term(name: str, given: float | Mapping[str, Any]) -> Term:
    """A weight, or {"weight", "batch", option: value} -> the term.

    Raises ValueError for an unknown name or option, or a value outside its range.
    """
    if name not in TERMS:
        raise ValueError(f"unknown term {name!r}; known: {list(TERMS)}")
    options: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {"weight": given}
    check_options(options, get_type_hints(TERMS[name]), f"the {name} term")
    term = TERMS[name](**options)
    _check(term, f"the {name} term")
    return term


# ---- gates


@dataclass(frozen=True)
class Validation:
    """Pictures drawn during training, from the same noise each time.

    Attributes:
        every: updates between validations; 0 is never.
        prompts: what is drawn; empty means the composed prompts of the training data.
        seeds: pictures per prompt.
        steps, guidance: of the sampler.
    """

    every: int = 0
    prompts: Sequence[str] = ()
    seeds: int = 4
    steps: int = 20
    guidance: float = 7.5

    def __post_init__(self) -> None:
        _check(self, "the validation", every=0)
        object.__setattr__(self, "prompts", tuple(self.prompts))  # a file has a list


@dataclass(frozen=True)
class GateTraining:
    """How gates are trained.

    Attributes:
        terms: name -> weight, or {"weight": ..., "batch": ..., option: ...}; `TERMS` has the names and their options.
            "balance" is MoLE's balance loss, its weight the paper's alpha (0.5 there), and MiLoRA's load-balance loss for
            "prompt" gates (0.01 there).
        initial: the gates' weights before the first update: "uniform", equal weights; "scalars", the best weights per gate
            on the experts' own activations; "ssr", those nearest to SSR-Merge. See `initialization.initialize`.
        steps: updates.
        batch: rows per term and update, over all processes and accumulated parts together.
        accumulation: parts that a batch is computed in, for less memory.
        drop: chance of each expert to sit out an update, never all of them (RAMoLE: 0.5).
        lr: AdamW's peak rate. Default: what suits each gate, see `gate_trainer.parameter_groups`.
        schedule: a diffusers schedule of the rate by name.
        warmup: first updates, in which the rate grows.
        weight_decay: AdamW's decay.
        max_norm: the length that gradients are clipped to (0 does not clip).
        ema: decay of an exponential moving average of the gates, which is then drawn with and saved; 0 is none.
        precision: "no", "bf16" or "fp16" (with loss scaling) of the forward pass; gates stay fp32.
        checkpointing: compute activations again in the backward pass, for less memory and more time.
        seed: of every random choice.
        every: updates between checkpoints.
        keep: how many checkpoints are kept.
        tracker: one that Accelerate knows, "tensorboard" or "wandb". Default: none.
        validation: pictures drawn on the way.
        width, height: pixels of the pictures of composed prompts. Default: the model's own size, which single prompts have.
    """

    terms: Mapping[str, float | Mapping[str, Any]] = field(default_factory=lambda: {"single": 1.0, "composed": 1.0})
    initial: Initial = "uniform"
    steps: int = 150
    batch: int = 8
    accumulation: int = 1
    drop: float = 0.0
    lr: float | None = None
    schedule: Schedule = "cosine"
    warmup: int = 0
    weight_decay: float = 0.0
    max_norm: float = 1.0
    ema: float = 0.0
    precision: Precision = "no"
    checkpointing: bool = False
    seed: int = 0
    every: int = 50
    keep: int = 2
    tracker: str | None = None
    validation: Validation = Validation()
    width: int | None = None
    height: int | None = None

    def __post_init__(self) -> None:
        _check(self, "the training")
        if not set(self.parsed) - {BALANCE}:
            objectives = [name for name in TERMS if name != BALANCE]
            raise ValueError(f"at least one term of {objectives} needs a weight, got {dict(self.terms)}")
        for name in ("ema", "drop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be 0 or more and less than 1, got {getattr(self, name)}")

    @cached_property
    def parsed(self) -> dict[str, Term]:
        """The terms whose weight is above 0."""
        found = {name: parse_term(name, given) for name, given in self.terms.items()}
        return {name: term for name, term in found.items() if term.weight}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GateTraining:
        """From what `dataclasses.asdict` makes. Raises ValueError for unknown options, and values of another kind."""
        looks = values.get("validation", {})
        check_kinds({"validation": looks}, {"validation": Mapping[str, Any]}, "the training")
        check_names(looks, get_type_hints(Validation), "the validation")
        return cls(**_settings(values, cls) | {"validation": Validation(**looks)})


# ---- LoRAs


@dataclass(frozen=True)
class LoraTraining:
    """How a concept LoRA is trained.

    Attributes:
        rank: rank of every layer, 1 or more.
        alpha: the scale is alpha / rank. Default: the rank, in a file and on the command line.
        layers: which get a LoRA: attention, feed-forward, convolution.
        steps: updates.
        batch: pictures per update, over all processes and accumulated parts together; as many class pictures beside them.
        lr: AdamW's peak rate; cosine down to a tenth.
        text_lr: the same for the text encoder; 0 leaves it out.
        seed: of every random choice.
        precision: "no", "bf16" or "fp16" (with loss scaling) of the forward pass; the LoRA stays fp32.
        prior: weight of the loss on class pictures (DreamBooth's prior preservation), where there are any.
        beam: let ranks compete (BeamLoRA); needs a rank of 8 or more.
        accumulation: parts that a batch is computed in, for less memory.
        checkpointing: compute activations again in the backward pass, for less memory and more time.
        every: updates between checkpoints.
        keep: how many checkpoints are kept.
    """

    rank: int = 8
    alpha: float = 8.0
    layers: Sequence[str] = ("attention",)
    steps: int = 300
    batch: int = 16
    lr: float = 1e-3
    text_lr: float = 5e-4
    seed: int = 0
    precision: Precision = "no"
    prior: float = 1.0
    beam: bool = False
    accumulation: int = 1
    checkpointing: bool = False
    every: int = 100
    keep: int = 2

    def __post_init__(self) -> None:
        _check(self, "the training")
        object.__setattr__(self, "layers", tuple(self.layers))  # a file has a list
        if not self.layers or (unknown := set(self.layers) - set(LORA_LAYERS)):
            raise ValueError(f"unknown layers {sorted(unknown) if self.layers else []}; known: {list(LORA_LAYERS)}")
        if self.beam and self.rank < LEAST_BEAM_RANK:
            raise ValueError(f"ranks that compete need a rank of {LEAST_BEAM_RANK} or more, got {self.rank}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoraTraining:
        """The alpha is the rank unless it is given. Raises ValueError for unknown options, and values of another kind."""
        return cls(**{"alpha": values.get("rank", cls.alpha)} | _settings(values, cls))

    @property
    def rates(self) -> dict[str, float]:
        """Component of the pipeline -> its learning rate, of those that are trained."""
        return {part: lr for part, lr in (("unet", self.lr), ("text_encoder", self.text_lr)) if lr}

    @property
    def temperature(self) -> float:
        """BeamLoRA's temperature for this learning rate."""
        return 0.05 if self.lr >= 1e-4 else 0.03
