"""Settings for training gates and LoRAs: plain data that is checked on creation and that a YAML or JSON file can hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Self, get_type_hints

from mole_diffusers.options import check_kinds, check_names, check_options

Precision = Literal["no", "bf16", "fp16"]
Schedule = Literal["cosine", "linear", "constant", "constant_with_warmup", "polynomial", "cosine_with_restarts"]
Initial = Literal["uniform", "scalars", "ssr"]  # weights of gates, see `initialization`
LORA_LAYERS = {  # kind -> module names, as a regular expression
    "attention": r".*(attn[12]\.to_(q|k|v|out\.0)|self_attn\.(q|k|v|out)_proj)",
    "feed-forward": r".*(ff\.net\.(0\.proj|2)|mlp\.fc[12])",
    "convolution": r".*(resnets\.\d+\.conv[12]|proj_in|proj_out)",
}
LEAST_BEAM_RANK = 8  # with fewer ranks, a single one is too large a share to lose
LEAST = {  # the least value of numbers, by their names in all settings
    **dict.fromkeys(("weight", "warmup", "weight_decay", "max_norm", "lr", "text_lr", "prior"), 0),
    **dict.fromkeys(("rank", "batch", "seeds", "steps", "pictures", "accumulation", "every", "keep"), 1),
}


def _check(config: Any, what: str, **least: int) -> None:
    """Raise ValueError for a value of the wrong kind, or a number below `least` or else `LEAST`. None means not set."""
    check_kinds(vars(config), get_type_hints(type(config)), what)
    for name, low in (LEAST | least).items():
        value = vars(config).get(name)
        if value is not None and not value >= low:  # which NaN is not, either
            raise ValueError(f"{name} of {what} must be {low} or more, got {value!r}")


# ---- the terms of the loss


@dataclass(frozen=True, kw_only=True)
class Term:
    """One term of the loss of gate training. Its objective is the function of that name in `objectives.OBJECTIVES`.

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
        seeds: trajectories for each expert, and for each size of its pictures; at least one per prompt.
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
        seeds, steps, guidance: pictures per subject, and how they are sampled. The prediction in the loss has the same
            guidance. Values above 1 mislead: a guided prediction is not a denoiser of the pictures that guidance draws,
            and where its error is least it has less of each LoRA than a picture needs.
    """

    pictures: int = 32
    seeds: int = 12
    steps: int = 12
    guidance: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ClipTerm(Term):
    """Term "clip": MoLE's own objective, with a CLIP that looks at each step of a trajectory.

    Attributes:
        lengths: smallest and largest number of steps of a trajectory, drawn uniformly.
        steps: denoising steps per update; their losses are summed.
        wording: what the CLIP reads. "captions": prompts, and captions of the pictures. "authors": as in MoLE's released
            code, "a " before prompts, names of the LoRAs for pictures, and the change of text averaged over CLIP's
            templates for ImageNet; this needs open_clip.
    """

    lengths: Sequence[int] = (20, 50)
    steps: int = 2
    wording: Literal["captions", "authors"] = "captions"

    def __post_init__(self) -> None:
        if len(self.lengths) != 2 or not 1 <= self.lengths[0] <= self.lengths[1]:
            raise ValueError(f"lengths of the clip term must be the least and the most steps, got {list(self.lengths)}")


@dataclass(frozen=True, kw_only=True)
class RolloutTerm(Term):
    """Term "rollout": a CLIP's reward on finished pictures.

    Attributes:
        steps: of the rollout; time and memory grow in proportion.
        guidance: classifier-free guidance; 1 means none.
        checkpointing: keep the activations of only one step at a time; takes about a third more time.
    """

    steps: int = 8
    guidance: float = 3.0
    checkpointing: bool = False


BALANCE = "balance"  # the only term without an objective: it reads the gates while the others run
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


# ---- trainings


@dataclass(frozen=True, kw_only=True)
class Updates:
    """The settings of every training.

    Attributes:
        steps: number of updates.
        batch: rows per term and update, over all processes and accumulated parts together.
        accumulation: compute a batch in this many parts, for less memory.
        seed: seed of all random choices.
        precision: "no", "bf16" or "fp16" (with loss scaling) for the forward pass; what is trained stays fp32.
        checkpointing: compute activations again in the backward pass, for less memory and more time.
        every: updates between checkpoints.
        keep: how many checkpoints to keep.
    """

    steps: int = 150
    batch: int = 8
    accumulation: int = 1
    seed: int = 0
    precision: Precision = "no"
    checkpointing: bool = False
    every: int = 50
    keep: int = 2

    def __post_init__(self) -> None:
        _check(self, "the training")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The settings of a file. Raises ValueError for unknown options, and values of the wrong kind."""
        check_names(values, get_type_hints(cls), "the training")
        is_no = values.get("precision") is False  # as YAML reads a bare no
        return cls(**dict(values) | ({"precision": "no"} if is_no else {}))


@dataclass(frozen=True)
class Validation:
    """Pictures drawn during training, from the same noise each time.

    Attributes:
        every: updates between validations; 0 means never.
        prompts: what to draw; empty means the composed prompts of the training data.
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


@dataclass(frozen=True, kw_only=True)
class GateOptimization(Updates):
    """How an update changes gates.

    Attributes:
        lr: AdamW's peak learning rate. Default: for each gate, what moves its logits by at most 0.05 in an update.
        schedule: name of a diffusers schedule for the learning rate.
        warmup: number of first updates in which the rate grows.
        weight_decay: AdamW's weight decay.
        max_norm: clip gradients to this length; 0 does not clip.
        ema: decay of an exponential moving average of the gates, which then draws pictures and is saved; 0 means none.
            As in diffusers, update n decays by at most n / (n + 9), so 0.99 is reached at update 891.
    """

    lr: float | None = None
    schedule: Schedule = "cosine"
    warmup: int = 0
    weight_decay: float = 0.0
    max_norm: float = 1.0
    ema: float = 0.0


@dataclass(frozen=True)
class GateTraining(GateOptimization):
    """How gates are trained.

    Attributes:
        terms: name -> weight, or {"weight": ..., "batch": ..., option: ...}; `TERMS` has the names and their options.
            "balance" is MoLE's balance loss (its weight is the paper's alpha, 0.5 there); for "prompt" gates it is
            MiLoRA's load-balance loss (0.01 there).
        initial: the gates' weights before the first update. "uniform": equal weights. "scalars": the best weights per
            gate on the experts' own activations. "ssr": those nearest to SSR-Merge.
        drop: chance that each expert sits out an update, though never all of them (RAMoLE: 0.5).
        tracker: a tracker that Accelerate knows, "tensorboard" or "wandb". Default: none.
        validation: pictures to draw during training.
        width, height: pixels of the pictures of composed prompts. Default: the model's own size, which single prompts use.
    """

    terms: Mapping[str, float | Mapping[str, Any]] = field(default_factory=lambda: {"single": 1.0, "composed": 1.0})
    initial: Initial = "uniform"
    drop: float = 0.0
    tracker: str | None = None
    validation: Validation = Validation()
    width: int | None = None
    height: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not set(self.parsed) - {BALANCE}:
            objectives = [name for name in TERMS if name != BALANCE]
            raise ValueError(f"at least one term of {objectives} needs a weight, got {dict(self.terms)}")
        if self.warmup and self.schedule == "constant":
            raise ValueError("the schedule 'constant' has no warmup: 'constant_with_warmup' has one")
        for name in ("ema", "drop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be 0 or more and less than 1, got {getattr(self, name)}")

    @cached_property
    def parsed(self) -> dict[str, Term]:
        """The terms whose weight is above 0."""
        found = {name: parse_term(name, given) for name, given in self.terms.items()}
        return {name: term for name, term in found.items() if term.weight}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`. Raises ValueError for unknown options, and values of the wrong kind."""
        looks = values.get("validation", {})
        check_kinds({"validation": looks}, {"validation": Mapping[str, Any]}, "the training")
        check_names(looks, get_type_hints(Validation), "the validation")
        return super().from_dict({**values, "validation": Validation(**looks)})


@dataclass(frozen=True, kw_only=True)
class LoraTraining(Updates):
    """How a concept LoRA is trained.

    Attributes:
        rank: rank of every layer, 1 or more.
        alpha: the scale is alpha / rank. Default: the rank, in a file and on the command line.
        layers: which layers get a LoRA: attention, feed-forward, convolution.
        batch: pictures per update, over all processes and accumulated parts together; plus as many class pictures.
        lr: AdamW's peak learning rate, with a cosine down to a tenth.
        text_lr: the same for the text encoder; 0 does not train it.
        prior: weight of the loss on class pictures (DreamBooth's prior preservation), if there are any.
        beam: let ranks compete (BeamLoRA); needs a rank of 8 or more.
    """

    rank: int = 8
    alpha: float = 8.0
    layers: Sequence[str] = ("attention",)
    steps: int = 300
    batch: int = 16
    lr: float = 1e-3
    text_lr: float = 5e-4
    prior: float = 1.0
    beam: bool = False
    every: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", tuple(self.layers))  # a file has a list
        unknown = sorted(set(self.layers) - set(LORA_LAYERS))
        if unknown or not self.layers:
            raise ValueError(f"unknown layers {unknown}; known: {list(LORA_LAYERS)}")
        if self.beam and self.rank < LEAST_BEAM_RANK:
            raise ValueError(f"ranks that compete need a rank of {LEAST_BEAM_RANK} or more, got {self.rank}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The alpha is the rank unless it is given. Raises ValueError for unknown options, and values of the wrong kind."""
        return super().from_dict({"alpha": values.get("rank", cls.alpha), **values})

    @property
    def rates(self) -> dict[str, float]:
        """Component of the pipeline -> its learning rate, for those that are trained."""
        return {part: lr for part, lr in (("unet", self.lr), ("text_encoder", self.text_lr)) if lr}

    @property
    def temperature(self) -> float:
        """Of BeamLoRA's softmax over ranks: the paper's is 0.05 for rates of 1e-4 and more, 0.03 below."""
        return 0.05 if self.lr >= 1e-4 else 0.03
