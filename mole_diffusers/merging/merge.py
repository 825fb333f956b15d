"""`merge(experts, method)`: any training-free merge as one ordinary LoRA."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, get_type_hints

from mole_diffusers import functional
from mole_diffusers.lora import Expert
from mole_diffusers.lora.strengths import Source, read_weighed
from mole_diffusers.merging.factors import Layers, Merged, Pair
from mole_diffusers.merging.layers import WeightedExperts, as_expert, layers_of, weights_by_key
from mole_diffusers.merging.lego import lego
from mole_diffusers.merging.linear import mean, null_space, total
from mole_diffusers.merging.regression import Inputs, iteris, regmean, relative_loss, scalars, ssr
from mole_diffusers.merging.sparse import dare, knots, ties
from mole_diffusers.options import check_options
from mole_diffusers.safe_files import check_memory

if TYPE_CHECKING:  # which imports diffusers: a merge of files alone needs torch only
    from mole_diffusers.merging.activations import Activations

METHODS: dict[str, Callable[..., Merged]] = {
    "sum": total, "mean": mean, "svd": total, "ties": ties, "dare": dare, "knots": knots, "lego": lego,
    "np": null_space, "ssr": ssr, "regmean": regmean, "iteris": iteris, "scalars": scalars,
}  # fmt: skip
ENERGY = 0.99  # share of a full-rank merge's energy to keep if no rank is given
GIVEN = ("inputs", "rerun", "protect", "keep")  # arguments of methods that `merge` fills in; they are not options


def merge(
    experts: Mapping[str, Source | tuple[Source, float]],
    method: str = "svd",
    *,
    rank: int | None = None,
    protect: Sequence[str] = (),
    activations: Activations | None = None,
    **options: Any,
) -> Expert:
    """Merge concept LoRAs into one ordinary LoRA by a training-free method; `save_expert` writes it to a file.

    Args:
        experts: name -> file or Expert, or (file, strength).
        method: "sum", "mean", "svd" (the sum, at the rank of the largest expert), "ties", "dare" (both on delta W),
            "knots" (KnOTS-TIES), "lego" (LoRA-LEGO), "np" (NP-LoRA). The following use the experts' own activations:
            "ssr" (SSR-Merge), "regmean", "iteris" and "scalars" (the best weight per expert and layer).
        rank: highest rank of the result's layers. By default, ranks add up and nothing is lost, except for "svd", for
            "lego", which keeps as many clusters as the largest rank, and for "ties" and "dare", whose results have full
            rank: these keep 99 % of each layer's energy.
        protect: experts that NP-LoRA leaves unchanged, such as a style; by default the last.
        activations: runs the experts for the last four methods.
        **options: of the method, see its function in mole_diffusers.merging.

    Returns:
        An Expert. Its metadata says how it was made, and which share of |delta W|^2 the rank cost ("mole.lost_energy").

    Raises:
        ValueError: an unknown method, option or expert; a method without the activations that it needs; experts for
            different models; a "ties" or "dare" that free memory cannot hold.
    """
    if method not in METHODS:
        raise ValueError(f"unknown merge method {method!r}; known: {list(METHODS)}")
    if rank is not None and rank < 1:
        raise ValueError(f"the rank of a merge must be 1 or more, got {rank}")
    run, asked, chosen = METHODS[method], _arguments(METHODS[method]), resolved(method, options)
    read = read_weighed(experts)
    if not read:
        raise ValueError("a merge needs at least one expert")
    layers = layers_of(read)
    if unknown := sorted(set(protect) - set(read)):
        raise ValueError(f"unknown experts {unknown} to protect; given: {list(read)}")
    given: dict[str, Any] = {}  # the arguments of `GIVEN` that the method takes
    if "protect" in asked and protect:
        given["protect"] = [list(read).index(n) for n in protect]
    if "inputs" in asked:
        if activations is None:
            raise ValueError("this method needs the experts' own activations: give activations=Activations(pipe, prompts)")
        activations.check_prompts(read)
        runs = partial(_inputs, read, layers, activations)
        given = {"inputs": runs(), "rerun": runs} if "rerun" in asked else {"inputs": runs()}
    cut = Truncation(layers, method, rank)
    if "keep" in asked:
        check_fits([expert for expert, _ in read.values()], method, rank)
        merged = run(layers, keep=cut, **chosen)
    else:
        merged = {key: cut(key, pair) for key, pair in run(layers, **given, **chosen).items()}
    about = {"mole.method": method, "mole.experts": ", ".join(read), "mole.options": json.dumps(options)}
    about["mole.lost_energy"] = f"{cut.lost_share():.4f}"
    if "inputs" in given:
        shared = [key for key, layer in layers.items() if sum(p is not None for p in layer) > 1]
        losses = [relative_loss(layers[key], given["inputs"][key], merged[key]) for key in shared]
        about["mole.loss"] = f"{sum(losses) / max(1, len(losses)):.4f}"
    return as_expert(merged, read, name="merged", metadata=about)


def by_activations(method: str) -> bool:
    """Whether a method needs the experts' activations, and so a pipeline to run them on."""
    return "inputs" in _arguments(METHODS[method])


def check_fits(experts: Sequence[Expert], method: str, rank: int | None = None) -> None:
    """Raises RefusedFileError if free memory cannot hold a merge by a method whose results have full rank."""
    if "keep" not in _arguments(METHODS[method]):
        return
    shapes = [{k: (len(w.up), w.down[0].numel()) for k, w in weights_by_key(expert).items()} for expert in experts]
    layers = {key: shape for own in shapes for key, shape in own.items()}
    # The result is there in float64, and then in float32, too. TIES sorts all entries of one expert.
    size = sum(12 * min(rank or out, out, into) * (out + into) for out, into in layers.values())
    if method == "ties":
        size = max(size, *(sum(8 * out * into for out, into in own.values()) for own in shapes))
    check_memory(size, f"a merge by {method!r} {'without a rank' if rank is None else f'of rank {rank}'} takes")


def _arguments(method: Callable[..., Merged]) -> dict[str, Any]:
    """The keyword arguments of a method -> their defaults."""
    return {p.name: p.default for p in inspect.signature(method).parameters.values() if p.kind is p.KEYWORD_ONLY}


def resolved(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a method: the given ones, and the defaults of the others.

    Raises ValueError for an unknown option, or a value that the method does not take.
    """
    asked = _arguments(METHODS[method])
    defaults = {name: value for name, value in asked.items() if name not in GIVEN}
    hints = get_type_hints(METHODS[method])
    check_options(options, {name: hints[name] for name in defaults}, f"merge method {method!r}")
    for name, value in options.items():
        if isinstance(value, float) and not math.isfinite(value) and (name, value) != ("mu", math.inf):
            raise ValueError(f"{name} of merge method {method!r} must be a finite number, got {value}")
    chosen = defaults | dict(options)
    nothing = {"inputs": {}, "rerun": dict}  # without layers, a method only checks its options
    METHODS[method]({}, **{name: empty for name, empty in nothing.items() if name in asked}, **chosen)
    return chosen


def _inputs(experts: WeightedExperts, layers: Layers, activations: Activations, merged: Merged | None = None) -> Inputs:
    """Each layer's inputs on each expert's own prompts, while the expert runs alone, or `merged` instead of it."""
    if merged is None:
        found = [activations.own(n, expert, strength) for n, (expert, strength) in experts.items()]
    else:
        running = as_expert(merged, experts, name="merged", metadata={})
        found = [activations.run(n, expert, running) for n, (expert, _) in experts.items()]
    for key, layer in layers.items():
        for n, pair, own in zip(experts, layer, found, strict=True):
            if pair is not None and key not in own:
                raise ValueError(f"layer {key!r} of expert {n!r} is not in the pipeline that the experts ran on")
    return {key: [own.get(key) for own in found] for key in layers}


class Truncation:
    """Brings a merge to its rank, layer by layer, and counts the energy that this loses."""

    def __init__(self, layers: Layers, method: str, rank: int | None) -> None:
        self.layers, self.method, self.rank = layers, method, rank
        self.lost = self.whole = 0.0

    def __call__(self, key: str, pair: Pair) -> Pair:
        ranks = [p.rank for p in self.layers[key] if p is not None]
        self.whole += pair.energy()
        wanted = max(ranks) if self.rank is None and self.method == "svd" else self.rank
        if pair.rank <= (wanted or sum(ranks)):
            return pair
        down, up, values = functional.low_rank(pair.down, pair.folded().up)
        energy = values.square().cumsum(0)
        most = wanted or int((energy < ENERGY * energy[-1]).sum()) + 1
        self.lost += values[most:].square().sum().item()
        return Pair(down[:most].clone(), up[:, :most].clone())  # a view would keep all of them in memory

    def lost_share(self) -> float:
        return self.lost / self.whole if self.whole else 0.0
