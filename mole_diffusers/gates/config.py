"""The options of a mixture's gates: a family, and the options of that family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mole_diffusers import functional
from mole_diffusers.options import TYPE_NAMES


@dataclass(frozen=True)
class Family:
    """What all gates of one family have in common.

    Attributes:
        options: the fields of `GateConfig` that apply to it.
        one_gate_per: the unit that has one gate, see `patching.host.placement.place_name`; None: as the config says.
        of_experts: whether its gates belong to the experts they were made for; otherwise they also serve any others.
    """

    options: tuple[str, ...] = ()
    one_gate_per: str | None = None
    of_experts: bool = True


FAMILIES = {
    "sum": Family(),
    "mean": Family(),
    "static": Family(("granularity", "total", "bins")),
    "mole": Family(("granularity", "total", "inputs", "features", "bias")),
    "flow": Family(("start",), one_gate_per="stream"),
    "prompt": Family(("axis", "top", "total")),
    "retrieval": Family(("rank", "scores", "total"), one_gate_per="matrix", of_experts=False),
    "rank": Family(("top", "partition", "refactor", "rate"), one_gate_per="matrix"),
    "factors": Family(one_gate_per="matrix"),
}
TOTALS = {"prompt": ("1", "N", "none"), "retrieval": ("1", "N")}  # of other families: `functional.TOTALS`
# A config from elsewhere may ask for anything.
RANGES = {"bins": (1, 1000), "top": (0, 1 << 16), "rank": (1, 128), "partition": (0, 1 << 16), "rate": (0, 1)}


@dataclass(frozen=True)
class GateConfig:
    """The gates of a mixture. An option that the family does not have must keep its default; any other value raises
    ValueError.

    Attributes:
        family: "sum" and "mean" have no parameters. "static" learns weights that are constant or change with time.
            "mole" reads the block's state as a whole, "flow" reads it token by token, and "prompt" reads the text once
            per prompt. "retrieval" compares the experts' outputs at every layer, and serves experts that it never saw.
            "rank" weighs each rank of each expert at every layer by what it reads there. "factors" learns a constant for
            each such rank.
        granularity: (static, mole) one gate per "model", "block", "layer" (attention or feed-forward) or "matrix".
        total: (static, mole) what the weights sum to, see `functional.gate_weights`; the paper has "1". (prompt) "1",
            "N", or "none": probabilities as top-k left them. (retrieval) "1" as in the paper, or "N".
        inputs: (mole) read the "hidden" state (the authors' code) or the outputs of the "experts" (the paper).
        features: (mole) tokens are "pooled" (any resolution) or "flattened" (the paper; one resolution).
        bias: (mole) add a learned number per expert, which the paper does not have. Needed to start at unequal weights.
        bins: (static) number of sets of weights over the noise levels, 1 to 1000.
        start: (flow) weights before training: the plain "sum", the "mean", or "faithful" to the paper (the last expert
            alone).
        axis: (prompt) share weight among the experts ("concept"), the layers of a block ("module"), or "both".
        top: (prompt) how many of these have weight; (rank) how many ranks of a layer do. 0 means all.
        rank: (retrieval) rank of the gate's router, 1 to 128.
        partition: (rank) this many ranks of an expert share one output of the router; 0: all ranks of the expert.
        refactor: (rank) turn each expert's ranks to its singular directions first, which changes nothing else.
        rate: (rank) how far an update moves the bias that evens out the load, 0 to 1.
        scores: (retrieval) each "token" has its own weights, or the "image" has one set.
    """

    family: str = "mole"
    granularity: Literal["model", "block", "layer", "matrix"] = "block"
    total: str = "N"
    inputs: Literal["hidden", "experts"] = "hidden"
    features: Literal["pooled", "flattened"] = "pooled"
    bias: bool = False
    bins: int = 1
    start: Literal["sum", "mean", "faithful"] = "sum"
    axis: Literal["concept", "module", "both"] = "concept"
    top: int = 0
    rank: int = 4
    scores: Literal["token", "image"] = "token"
    partition: int = 1
    refactor: bool = True
    rate: float = 1e-5

    def __post_init__(self) -> None:
        kinds = get_type_hints(GateConfig)
        self._check_names(kinds)
        self._check_numbers(kinds)
        if self.granularity == "model" and (self.inputs, self.features) != ("hidden", "pooled"):
            raise ValueError("a gate for the whole model reads text and time: inputs 'hidden' and features 'pooled' only")

    def _check_numbers(self, kinds: Mapping[str, Any]) -> None:
        for name, (low, high) in RANGES.items():
            if type(value := getattr(self, name)) not in (int, kinds[name]) or not low <= value <= high:
                raise ValueError(
                    f"the gate option {name!r} must be {TYPE_NAMES[kinds[name]]} in {low}..{high}, got {value!r}"
                )
        for name in ("refactor", "bias"):
            if type(value := getattr(self, name)) is not bool:
                raise ValueError(f"the gate option {name!r} must be true or false, got {value!r}")

    def _check_names(self, kinds: Mapping[str, Any]) -> None:
        known = {"family": tuple(FAMILIES), "total": TOTALS.get(str(self.family), functional.TOTALS)}
        known |= {name: get_args(kind) for name, kind in kinds.items() if get_origin(kind) is Literal}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"unknown gate {name} {getattr(self, name)!r}; known: {list(values)}")
        own = ("family", *FAMILIES[self.family].options)
        if foreign := [f.name for f in fields(self) if f.name not in own and getattr(self, f.name) != f.default]:
            raise ValueError(f"{self.family!r} gates have no option {foreign[0]!r}; their options: {list(own[1:])}")

    @property
    def reads_prompt(self) -> bool:
        """Whether the gates read the prompt's text states instead of the state of their block."""
        return self.family == "prompt"

    @property
    def one_gate_per(self) -> str:
        """The unit that has one gate, see `patching.host.placement.place_name`."""
        if self.reads_prompt:
            return "block" if self.axis == "concept" else "matrix"
        return FAMILIES[self.family].one_gate_per or self.granularity

    @property
    def of_experts(self) -> bool:
        """Whether gates belong to the experts they were made for. "retrieval" gates also serve any others."""
        return FAMILIES[self.family].of_experts

    @classmethod
    def from_dict(cls, values: dict) -> GateConfig:
        """Raises ValueError for an option that is unknown, or of the wrong kind or size."""
        if unknown := set(values) - {f.name for f in fields(cls)}:
            raise ValueError(f"unknown gate options {sorted(unknown)}; known: {[f.name for f in fields(cls)]}")
        return cls(**values)

    def to_dict(self) -> dict:
        """The family and the options that it has."""
        return {name: value for name, value in asdict(self).items() if name in ("family", *FAMILIES[self.family].options)}
