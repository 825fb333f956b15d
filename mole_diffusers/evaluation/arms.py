"""Arms: every composer under test in one form, and the arms by name.

They are single LoRAs, weighted sums, merges, composers that act while sampling, trained gates and their controls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mole_diffusers.binding.config import Bound, to_json
from mole_diffusers.binding.regions import AUTO
from mole_diffusers.evaluation.freefuse import CORE, FIRST_PASS, freefuse
from mole_diffusers.evaluation.isolation import UNTIL as ISOLATED
from mole_diffusers.evaluation.isolation import isolated_prompts
from mole_diffusers.evaluation.kl_choice import kl_choice
from mole_diffusers.evaluation.loratorio import CENTRE, PATCH, TEMPERATURE, loratorio
from mole_diffusers.evaluation.prompt_aware import PERIOD, TAIL, w_composed, w_switched
from mole_diffusers.evaluation.regional_composers import THRESHOLD, RegionalPrompt, masked_blend, regional_prompts
from mole_diffusers.evaluation.rows import digest_files, digest_texts
from mole_diffusers.evaluation.runner import Arm, Case, Setup
from mole_diffusers.evaluation.sampling_composers import ALPHA, BETA, composed_scores, encodes_by_expert, k_lora, switched
from mole_diffusers.gates import GateConfig, checkpoint
from mole_diffusers.gates.transforms import frozen_random, hardened, uniform
from mole_diffusers.inspection.compare import sample
from mole_diffusers.lora.safe_files import RefusedFileError
from mole_diffusers.merging.merge import METHODS, by_activations, check_fits, merge, resolved
from mole_diffusers.mixture import Gates, Mixture, attach, detach
from mole_diffusers.patching.host.denoiser_inputs import DENOISERS
from mole_diffusers.patching.subjects.things import SINCE, UNTIL

Weights = Callable[[Setup, Case], Mapping[str, float]]  # a weight per concept, multiplied with the user's own strength
Context = Callable[[Setup, Case, Mixture], AbstractContextManager[Any]]  # the context in which an attached mixture draws
Binding = Callable[[Setup, Case], Mapping[str, Any]]  # words and regions, as `Mixture.bind` takes them
RegionalPrompts = Callable[[Setup, Case], Mapping[str, RegionalPrompt]]  # each subject's own prompt and region
Order = Callable[[Setup, Case], Sequence[str]]  # a case's experts, in the order that a composer uses
ByKind = Mapping[str, Mapping[str, float]]  # kind of case -> {"subject": strength, "style": strength}


def ones(setup: Setup, case: Case) -> dict[str, float]:
    """Every expert at the user's own strength."""
    return dict.fromkeys(case.experts, 1.0)


def from_files(setup: Setup, case: Case) -> dict[str, Any]:
    """Bind to the trigger words of the files, and find the places."""
    return {}


def by_role(subject: float, style: float) -> Weights:
    """One strength for subjects and one for styles."""
    return lambda setup, case: {name: style if name in setup.styles else subject for name in case.experts}


@contextmanager
def attached_to(
    setup: Setup, experts: Mapping[str, Any], gates: Gates, binding: Mapping[str, Any] | None = None
) -> Iterator[Mixture]:
    """The mixture, attached inside the context; bound only if `binding` says how."""
    try:
        yield attach(setup.pipe, experts, gates, binding=binding)
    finally:
        detach(setup.pipe)


def base() -> Arm:
    """No LoRA at all."""

    def draws(setup: Setup, case: Case) -> AbstractContextManager[None]:
        detach(setup.pipe)
        return nullcontext()

    return Arm("base", draws, lambda setup, case: {})


def as_they_are(setup: Setup, case: Case, mixture: Mixture) -> AbstractContextManager[Any]:
    """Leave the gates unchanged while a picture is drawn."""
    return nullcontext()


def weighted(
    name: str,
    weights: Weights = ones,
    /,
    *,
    gates: Gates | Callable[[Case], Path] = "sum",
    binding: Binding | None = None,
    context: Context = as_they_are,
    covers: Callable[[Case], bool] = lambda case: True,
    reads_words: bool = False,
    **settings: Any,
) -> Arm:
    """The LoRAs of a case attached with these weights: by default a weighted sum, like `set_adapters` with these strengths.

    Args:
        weights: the weights; their order is also that of the experts.
        gates: weigh the experts on top, or a function that returns the folder of a case's trained gates. Without that
            folder the case cannot be drawn.
        binding: words and regions beyond the trigger words of the files; None binds nothing.
        context: the context in which the case is drawn.
        covers: which cases it can draw.
        reads_words: whether its context reads the trigger words of the files, as every binding does.
        settings: what rows state besides experts, binding and trained gates. If it depends on the case, give functions.
    """

    @contextmanager
    def draws(setup: Setup, case: Case) -> Iterator[Mixture]:
        experts = setup.weighted_experts(weights(setup, case))
        said, weighing = binding(setup, case) if binding else None, gates(case) if callable(gates) else gates
        with attached_to(setup, experts, weighing, said) as mixture, mixture.tiled(0), context(setup, case, mixture):
            yield mixture

    def described(setup: Setup, case: Case) -> Mapping[str, Any]:
        found = setup.expert_settings(weights(setup, case), words=reads_words or binding is not None)
        found |= {key: value(setup, case) if callable(value) else value for key, value in settings.items()}
        if binding:
            said = binding(setup, case).items()
            found["binding"] = {name: to_json(value) if isinstance(value, Bound) else value for name, value in said}
        if callable(gates):
            found["gates"] = digest_files(gates(case) / checkpoint.CONFIG, gates(case) / checkpoint.WEIGHTS)
        return found

    def can_draw(case: Case) -> bool:
        return covers(case) and (not callable(gates) or (gates(case) / checkpoint.CONFIG).exists())

    return Arm(name, draws, described, can_draw)


def alone(concept: str) -> Arm:
    """Only one concept's LoRA, on the whole prompt: the upper bound for that concept."""
    return weighted(f"alone {concept}", lambda setup, case: {concept: 1.0}, covers=lambda case: concept in case.concepts)


def summed() -> Arm:
    """Every LoRA at the user's own strength."""
    return weighted("sum")


def mean() -> Arm:
    """Every LoRA at 1 / N: normalised linear arithmetic, the baseline of MoLE."""
    return weighted("mean", lambda setup, case: dict.fromkeys(case.experts, 1 / len(case.experts)))


def bound(name: str = "bound", binding: Binding = from_files) -> Arm:
    """Every LoRA at the user's own strength, on its own words and in its own place; see `Mixture.bind`."""
    return weighted(name, binding=binding)


def words_only() -> Arm:
    """Every LoRA on its own words, and in the whole picture."""
    return bound("words only", lambda setup, case: dict.fromkeys(case.experts, (None, "everywhere")))


def in_tiles(name: str = "tiles", since: float = SINCE) -> Arm:
    """Bound, with each subject drawn in its own tile from a share of the steps on; see `Mixture.tiled`."""

    def context(setup: Setup, case: Case, mixture: Mixture) -> AbstractContextManager[Any]:
        return mixture.tiled(since=since, prompt=case.prompt)

    return weighted(name, binding=from_files, context=context, since=since, until=UNTIL)


def searched(weights: ByKind) -> Arm:
    """The best strengths that a search found for this kind of case, see `strength_search.best_weights`."""
    return weighted(
        "grid search",
        lambda setup, case: by_role(**weights[case.kind])(setup, case),
        covers=lambda case: case.kind in weights,
        weights=weights,
    )


def merged(method: str, name: str = "", weights: Weights = ones) -> Arm:
    """A training-free merge; NP-LoRA protects the case's styles, or its last concept if there is no style."""

    def styles(setup: Setup, case: Case) -> list[str]:
        return [concept for concept in case.experts if concept in setup.styles]

    def draws(setup: Setup, case: Case) -> AbstractContextManager[Any]:
        experts, protect = setup.weighted_experts(weights(setup, case)), styles(setup, case)
        one = merge(experts, method, protect=protect, activations=setup.activations)
        return attached_to(setup, {"merged": one}, "sum")

    def settings(setup: Setup, case: Case) -> Mapping[str, Any]:
        found = setup.expert_settings(weights(setup, case)) | {"method": method, "rank": None} | resolved(method, {})
        if method == "np":
            found["protect"] = styles(setup, case)
        if by_activations(method):
            runs, prompts = setup.activations, [p for name in case.experts for p in setup.prompts.get(name, ())]
            found["own_prompts"] = digest_texts(*prompts)
            found |= {"own_steps": runs.steps, "own_rows": runs.rows, "own_seed": runs.seed}
        return found

    return Arm(name or method, draws, settings)


def subjects_first(setup: Setup, names: Sequence[str]) -> list[str]:
    """Subjects, then styles, each in the order given."""
    return sorted(names, key=lambda name: name in setup.styles)


def in_order(order: Order) -> Weights:
    """Every expert at the user's own strength, in this order."""
    return lambda setup, case: dict.fromkeys(order(setup, case), 1.0)


def switch(period: int = 5) -> Arm:
    """LoRA Switch: subjects, then styles, then idle experts take turns."""
    order = in_order(lambda setup, case: [*subjects_first(setup, case.concepts), *case.idle])

    def context(setup: Setup, case: Case, mixture: Mixture) -> AbstractContextManager[Any]:
        return switched(setup.pipe, mixture, period=period)

    return weighted("switch", order, context=context, period=period)


def composite() -> Arm:
    """LoRA Composite. It takes one UNet call per step and expert."""
    return weighted("composite", context=lambda setup, case, mixture: composed_scores(setup.pipe, mixture))


def w_switch(name: str = "w-switch", *, period: int = PERIOD, tail: int = TAIL) -> Arm:
    """W-Switch: as LoRA Switch, with longer turns for LoRAs whose words matter more; the first has the last steps."""
    order = in_order(lambda setup, case: [*subjects_first(setup, case.concepts), *case.idle])

    def context(setup: Setup, case: Case, mixture: Mixture) -> AbstractContextManager[Any]:
        return w_switched(setup.pipe, mixture, case.prompt, period=period, tail=tail)

    return weighted(name, order, context=context, reads_words=True, period=period, tail=tail)


def w_composite() -> Arm:
    """W-Composite. It takes one UNet call per step and expert."""

    def context(setup: Setup, case: Case, mixture: Mixture) -> AbstractContextManager[Any]:
        return w_composed(setup.pipe, mixture, case.prompt)

    return weighted("w-composite", context=context, reads_words=True)


def patchwise(name: str = "loratorio", *, patch: int = PATCH, temperature: float = TEMPERATURE) -> Arm:
    """LoRAtorio. It takes one UNet call per step and expert, plus one."""

    def context(setup: Setup, case: Case, mixture: Mixture) -> AbstractContextManager[Any]:
        return loratorio(setup.pipe, mixture, patch=patch, temperature=temperature)

    return weighted(name, context=context, patch=patch, temperature=temperature, centre=CENTRE)


MATRIX = GateConfig("static", granularity="matrix")


def klora() -> Arm:
    """K-LoRA, for cases of two experts. The style LoRA is the one that is a style, or the second if both or neither are."""

    def context(setup: Setup, case: Case, mixture: Mixture) -> AbstractContextManager[Any]:
        content, style = mixture.experts
        return k_lora(setup.pipe, mixture, content=content, style=style)

    order, covers = in_order(lambda setup, case: subjects_first(setup, case.experts)), lambda case: len(case.experts) == 2
    return weighted("k-lora", order, gates=MATRIX, context=context, covers=covers, alpha=ALPHA, beta=BETA)


def kl_chosen() -> Arm:
    """The choice by KL divergence, for cases of two experts: in the paper a subject and a style."""
    covers = lambda case: len(case.experts) == 2  # noqa: E731
    return weighted(
        "kl choice", gates=MATRIX, context=lambda setup, case, mixture: kl_choice(setup.pipe, mixture), covers=covers
    )


def subjects_of(setup: Setup, case: Case) -> list[str]:
    """The concepts of a case that are not styles."""
    return [name for name in case.concepts if name not in setup.styles]


def regional(parts: RegionalPrompts) -> Arm:
    """Regional prompts: a prompt and a LoRA for each region. `parts` gives the regions."""
    return in_parts("regional prompts", regional_prompts, parts, gates=MATRIX)


def isolated_regional(parts: RegionalPrompts, until: float = ISOLATED) -> Arm:
    """Regional prompts whose subjects do not see one another in self-attention up to this share of the steps."""
    composer = partial(isolated_prompts, until=until)
    return in_parts("isolation until half", composer, parts, gates=MATRIX, until=until)


def in_the_whole_prompt(setup: Setup, case: Case) -> dict[str, RegionalPrompt]:
    """Each subject's prompt is that of the case, and its region is found."""
    return dict.fromkeys(subjects_of(setup, case), (case.prompt, AUTO))


def blended(name: str = "masked blend", parts: RegionalPrompts = in_the_whole_prompt) -> Arm:
    """One prediction for each LoRA, blended by regions. It takes one UNet call per step and subject, plus one."""
    return in_parts(name, masked_blend, parts, reads_words=True, threshold=THRESHOLD)


def in_parts(name: str, composer: Callable[..., AbstractContextManager[Any]], parts: RegionalPrompts, **options: Any) -> Arm:
    """A composer by parts of the picture, which rows state. A case with only styles has no parts, and gets the sum."""

    def context(setup: Setup, case: Case, mixture: Mixture) -> AbstractContextManager[Any]:
        found = parts(setup, case)
        return composer(setup.pipe, mixture, case.prompt, found) if found else nullcontext()

    return weighted(name, context=context, parts=parts, **options)


def freefused() -> Arm:
    """FreeFuse. A third of the steps run twice."""

    def context(setup: Setup, case: Case, mixture: Mixture) -> AbstractContextManager[Any]:
        return freefuse(setup.pipe, mixture, subjects_of(setup, case))

    return weighted("freefuse", context=context, reads_words=True, subjects=subjects_of, first_pass=FIRST_PASS, core=CORE)


def gates_of(folder: Path) -> Callable[[Case], Path]:
    """The folder of a case's gates inside `folder`: "fox+french_fries"."""
    return lambda case: folder / "+".join(case.experts).replace(" ", "_")


@contextmanager
def averaged(setup: Setup, case: Case, mixture: Mixture) -> Iterator[None]:
    """Replace the denoiser's gates by their means over the steps of one picture of the case, separately per guidance row."""
    seen: dict[str, tuple[torch.Tensor, int]] = {}  # place and experts -> the sum of the gates, and the number of steps

    def record(place: str, gates: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        total, steps = seen.get(f"{place} {mask.tolist()}", (torch.zeros_like(gates), 0))
        seen[f"{place} {mask.tolist()}"] = total + gates, steps + 1
        return gates

    def replay(place: str, gates: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if gates.dim() < 2 or place.partition(".")[0] not in DENOISERS:
            return gates  # these gates do not depend on the row, or on the step
        total, steps = seen[f"{place} {mask.tolist()}"]
        return (total / steps).repeat_interleave(len(gates) // len(total), 0)

    with mixture.adjusted(record):
        sample(setup.pipe, case.prompt, [0], **{**setup.call_of(case), "output_type": "latent"})
    with mixture.adjusted(replay):
        yield


# ---- arms by name


class Request(NamedTuple):
    """What arms are made for.

    Attributes:
        gates: a folder with one folder of trained gates per case, see `gates_of`.
        searches: the result of a search, see `searched`.
        at, weights: for arms whose strengths can be moved: the end of the name, and the weights.
    """

    setup: Setup
    gates: Path | None
    searches: ByKind | None
    at: str = ""
    weights: Weights = ones


Need = Callable[[Request], str]  # what an arm lacks, as the end of a sentence that begins with its name; "" if nothing


def a_unet(request: Request) -> str:
    """A pipeline with a UNet."""
    pipe = request.setup.pipe
    return "" if getattr(pipe, "unet", None) is not None else f"needs a unet, unlike {type(pipe).__name__}"


def prompts_by_expert(request: Request) -> str:
    """A pipeline that can read a prompt with single experts."""
    pipe = request.setup.pipe
    return "" if encodes_by_expert(pipe) else f"needs a unet and one text encoder, unlike {type(pipe).__name__}"


def own_prompts(request: Request) -> str:
    """Prompts of each expert's own, to run it on."""
    lacking = sorted(name for name in request.setup.experts if not request.setup.prompts.get(name))
    return f"runs every expert on prompts of its own, and there are none for {lacking}" if lacking else ""


def a_search(request: Request) -> str:
    """The weights of a search."""
    return "" if request.searches is not None else "needs the weights of a search"


def trained_gates(request: Request) -> str:
    """A folder of trained gates."""
    return "" if request.gates is not None else "needs a folder of trained gates"


@dataclass(frozen=True)
class Choice:
    """An arm that can be chosen by its name.

    Attributes:
        made: the arm, or several, if nothing is lacking.
        needs: what it needs.
        movable: whether its strengths can be moved from subjects to styles.
    """

    made: Callable[[Request], Sequence[Arm]]
    needs: Sequence[Need] = ()
    movable: bool = False


class Plain(NamedTuple):
    """An arm that is the same in every setup, and what it needs."""

    make: Callable[[], Arm]
    needs: Sequence[Need] = ()

    def choice(self) -> Choice:
        """To be chosen by its name."""
        return Choice(lambda request: [self.make()], self.needs)


def _merge(method: str) -> Choice:
    needs = [own_prompts] if by_activations(method) else []
    return Choice(lambda request: [merged(method, method + request.at, request.weights)], needs, movable=True)


def _gated(name: str, *, movable: bool = False, **how: Any) -> Choice:
    """Trained gates; `how` as in `weighted`."""

    def made(request: Request) -> list[Arm]:
        return (
            []
            if request.gates is None
            else [weighted(name + request.at, request.weights, gates=gates_of(request.gates), **how)]
        )

    return Choice(made, [trained_gates], movable=movable)


MERGES = tuple(method for method in METHODS if method not in ("sum", "mean"))
CONTROLS: dict[str, Context] = {
    "gates": as_they_are,
    "gates uniform": lambda setup, case, mixture: mixture.adjusted(uniform),
    "gates random": lambda setup, case, mixture: mixture.adjusted(frozen_random(0)),
    "gates hardened": lambda setup, case, mixture: mixture.adjusted(hardened),
    "gates averaged": averaged,
}
BOUND_GATES = "bound gates"
PLAIN = {
    "base": Plain(base),
    "sum": Plain(summed),
    "mean": Plain(mean),
    "bound": Plain(bound),
    "words only": Plain(words_only),
    "tiles": Plain(in_tiles, [a_unet]),
    "switch": Plain(switch, [prompts_by_expert]),
    "composite": Plain(composite, [prompts_by_expert]),
    "k-lora": Plain(klora, [a_unet]),
    "w-switch": Plain(w_switch, [prompts_by_expert]),
    "w-composite": Plain(w_composite, [prompts_by_expert]),
    "loratorio": Plain(patchwise, [prompts_by_expert]),
    "kl choice": Plain(kl_chosen, [a_unet]),
    "masked blend": Plain(blended, [prompts_by_expert]),
    "freefuse": Plain(freefused, [prompts_by_expert]),
}
ARMS: dict[str, Choice] = {
    **{name: plain.choice() for name, plain in PLAIN.items()},
    "sum": Choice(lambda request: [weighted("sum" + request.at, request.weights)], movable=True),
    "alone": Choice(lambda request: [alone(concept) for concept in request.setup.experts]),
    "grid search": Choice(lambda request: [] if request.searches is None else [searched(request.searches)], [a_search]),
    **{method: _merge(method) for method in MERGES},
    **{name: _gated(name, context=context, movable=name == "gates") for name, context in CONTROLS.items()},
    BOUND_GATES: _gated(BOUND_GATES, binding=from_files),
}


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError for names that are not in `ARMS`."""
    if unknown := [name for name in names if name not in ARMS]:
        raise ValueError(f"unknown arms {unknown}; known: {list(ARMS)}")


def chosen_arms(
    names: Sequence[str],
    setup: Setup,
    gates: Path | None = None,
    *,
    weights: ByKind | None = None,
    shares: Sequence[float] = (),
) -> list[Arm]:
    """The arms of these names from `ARMS`; "alone" is one arm per expert.

    Args:
        gates: a folder with one folder of trained gates per case, see `gates_of`.
        weights: the result of a search, see `searched`.
        shares: draw each arm once per share s, with strength moved from subjects, at 2 - 2s, to styles, at 2s. Their
            names are like "sum @ 0.3", which `plots.frontier` reads.

    Raises ValueError for an unknown name, an arm that cannot be drawn (see `obstacles`) or whose strengths cannot be
    moved, or a share outside 0..1.
    """
    check_names(names)
    movable = [name for name, choice in ARMS.items() if choice.movable]
    if shares and (fixed := [name for name in names if name not in movable]):
        raise ValueError(f"the strengths of {fixed} cannot be moved; those of {movable} can")
    if wrong := [share for share in shares if not 0 <= share <= 1]:
        raise ValueError(f"a share must be from 0 to 1, got {wrong[0]}")
    if found := obstacles(names, setup, gates, weights=weights):
        raise ValueError("; ".join(found.values()))
    moved = [(f" @ {share:g}", by_role(2 - 2 * share, 2 * share)) for share in shares] or [("", ones)]
    return [arm for name, each in product(names, moved) for arm in ARMS[name].made(Request(setup, gates, weights, *each))]


def obstacles(
    names: Sequence[str], setup: Setup, gates: Path | None = None, *, weights: ByKind | None = None
) -> dict[str, str]:
    """Named arms that cannot be drawn with this setup -> the reason, known before anything is drawn."""
    request = Request(setup, gates, weights)
    found = {name: f"{name!r} {why}" for name in names for need in ARMS[name].needs if (why := need(request))}
    for name in (name for name in names if name in MERGES):
        try:
            check_fits(list(setup.experts.values()), name)
        except RefusedFileError as error:
            found[name] = str(error)
    return found
