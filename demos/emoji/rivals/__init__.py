"""Composers that are here to be compared with. They act while sampling and need no training.

    mole evaluate --methods-from demos/emoji/rivals --method sum --method tiles --method freefuse
    mole compose "a fox and a hat" --methods-from demos/emoji/rivals --method switch

Each file has one kind of composer, as a context on an attached mixture; here they have names. Regional prompts and
isolation are told where each subject is, so they have no name in `METHODS`: see `emoji/compose.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from mole_diffusers import Mixture
from mole_diffusers.binding import AUTO
from mole_diffusers.gates import GateConfig
from mole_world.evaluation.methods import KnownMethod, Weights, a_unet, subjects_of, weighted
from mole_world.evaluation.runner import Case, Method, Setup
from rivals.freefuse import CORE, FIRST_PASS, freefuse
from rivals.isolation import UNTIL, isolated, isolated_prompts
from rivals.kl_choice import kl_choice
from rivals.loratorio import CENTRE, PATCH, TEMPERATURE, loratorio
from rivals.prompt_aware import PERIOD, TAIL, w_composed, w_switched
from rivals.regional_composers import THRESHOLD, RegionalPrompt, masked_blend, regional_prompts
from rivals.sampling_composers import (
    ALPHA,
    BETA,
    check_encodes_by_expert,
    composed_scores,
    k_lora,
    switched,
)
from rivals.unet_calls import StepCounter, before_forward

__all__ = ["METHODS", "RegionalPrompt", "StepCounter", "before_forward", "isolated"]
RegionalPrompts = Callable[[Setup, Case], Mapping[str, RegionalPrompt]]  # each subject's own prompt and region
Order = Callable[[Setup, Case], Sequence[str]]  # a case's experts, in the order that a composer uses
MATRIX = GateConfig("static", granularity="matrix")  # so that LoRAs can change within a block


def subjects_first(setup: Setup, names: Sequence[str]) -> list[str]:
    """Subjects, then styles, each in the order given."""
    return sorted(names, key=lambda name: name in setup.styles)


def in_order(order: Order) -> Weights:
    """Every expert at the user's own strength, in this order."""
    return lambda setup, case: dict.fromkeys(order(setup, case), 1.0)


IN_TURN = in_order(lambda setup, case: [*subjects_first(setup, case.concepts), *case.idle])


def of_two(case: Case) -> bool:
    """Whether a case has two experts."""
    return len(case.experts) == 2


def prompts_by_expert(setup: Setup) -> None:
    """A pipeline that can read a prompt with single experts."""
    check_encodes_by_expert(setup.pipe)


def switch(period: int = 5) -> Method:
    """LoRA Switch: subjects, then styles, then idle experts take turns."""

    def context(setup: Setup, case: Case, mixture: Mixture) -> AbstractContextManager[Any]:
        return switched(setup.pipe, mixture, period=period)

    return weighted("switch", IN_TURN, context=context, needs=prompts_by_expert, period=period)


def composite() -> Method:
    """LoRA Composite. It takes one UNet call per step and expert."""

    def context(setup: Setup, case: Case, mixture: Mixture) -> AbstractContextManager[Any]:
        return composed_scores(setup.pipe, mixture)

    return weighted("composite", context=context, needs=prompts_by_expert)


def w_switch(name: str = "w-switch", *, period: int = PERIOD, tail: int = TAIL) -> Method:
    """W-Switch: as LoRA Switch, with longer turns for LoRAs whose words matter more; the first has the last steps."""

    def context(setup: Setup, case: Case, mixture: Mixture) -> AbstractContextManager[Any]:
        return w_switched(setup.pipe, mixture, case.prompt, period=period, tail=tail)

    how = {"needs": prompts_by_expert, "reads_words": True}
    return weighted(name, IN_TURN, context=context, period=period, tail=tail, **how)


def w_composite() -> Method:
    """W-Composite. It takes one UNet call per step and expert."""

    def context(setup: Setup, case: Case, mixture: Mixture) -> AbstractContextManager[Any]:
        return w_composed(setup.pipe, mixture, case.prompt)

    return weighted("w-composite", context=context, needs=prompts_by_expert, reads_words=True)


def patchwise(name: str = "loratorio", *, patch: int = PATCH, temperature: float = TEMPERATURE) -> Method:
    """LoRAtorio. It takes one UNet call per step and expert, plus one."""

    def context(setup: Setup, case: Case, mixture: Mixture) -> AbstractContextManager[Any]:
        return loratorio(setup.pipe, mixture, patch=patch, temperature=temperature)

    how = {"patch": patch, "temperature": temperature, "centre": CENTRE}
    return weighted(name, context=context, needs=prompts_by_expert, **how)


def klora() -> Method:
    """K-LoRA, for cases of two experts. The style LoRA is the one that is a style, or the second if both or neither are."""

    def context(setup: Setup, case: Case, mixture: Mixture) -> AbstractContextManager[Any]:
        content, style = mixture.experts
        return k_lora(setup.pipe, mixture, content=content, style=style)

    order = in_order(lambda setup, case: subjects_first(setup, case.experts))
    how = {"gates": MATRIX, "covers": of_two, "needs": a_unet}
    return weighted("k-lora", order, context=context, alpha=lambda setup, case: ALPHA, beta=BETA, **how)


def kl_chosen() -> Method:
    """The choice by KL divergence, for cases of two experts: in the paper a subject and a style."""

    def context(setup: Setup, case: Case, mixture: Mixture) -> AbstractContextManager[Any]:
        return kl_choice(setup.pipe, mixture)

    return weighted("kl choice", gates=MATRIX, context=context, covers=of_two, needs=a_unet)


def regional(parts: RegionalPrompts) -> Method:
    """Regional prompts: a prompt and a LoRA for each region. `parts` gives the regions."""
    return in_parts("regional prompts", regional_prompts, parts, gates=MATRIX)


def isolated_regional(parts: RegionalPrompts, until: float = UNTIL) -> Method:
    """Regional prompts whose subjects do not see one another in self-attention up to this share of the steps."""
    composer = partial(isolated_prompts, until=until)
    return in_parts("isolation until half", composer, parts, gates=MATRIX, until=until)


def in_the_whole_prompt(setup: Setup, case: Case) -> dict[str, RegionalPrompt]:
    """Each subject's prompt is that of the case, and its region is found."""
    return dict.fromkeys(subjects_of(setup, case), (case.prompt, AUTO))


def blended(
    name: str = "masked blend", parts: RegionalPrompts = in_the_whole_prompt, *, since: float = 0.0, until: float = 1.0
) -> Method:
    """One prediction for each LoRA, blended by regions. A step that is blended takes a UNet call per subject, plus one."""
    composer = partial(masked_blend, since=since, until=until)
    how = {"threshold": THRESHOLD, "since": since, "until": until}
    return in_parts(name, composer, parts, needs=prompts_by_expert, reads_words=True, **how)


def in_parts(
    name: str, composer: Callable[..., AbstractContextManager[Any]], parts: RegionalPrompts, **options: Any
) -> Method:
    """A composer by parts of the picture, which rows state. A case with only styles has no parts, and gets the sum."""

    def context(setup: Setup, case: Case, mixture: Mixture) -> AbstractContextManager[Any]:
        found = parts(setup, case)
        return composer(setup.pipe, mixture, case.prompt, found) if found else nullcontext()

    return weighted(name, context=context, parts=parts, **options)


def freefused() -> Method:
    """FreeFuse. A third of the steps run twice."""

    def context(setup: Setup, case: Case, mixture: Mixture) -> AbstractContextManager[Any]:
        return freefuse(setup.pipe, mixture, subjects_of(setup, case))

    how = {"subjects": subjects_of, "first_pass": FIRST_PASS, "core": CORE}
    return weighted("freefuse", context=context, needs=prompts_by_expert, reads_words=True, **how)


METHODS: dict[str, KnownMethod] = {
    "switch": switch(),
    "composite": composite(),
    "k-lora": klora(),
    "w-switch": w_switch(),
    "w-composite": w_composite(),
    "loratorio": patchwise(),
    "kl choice": kl_chosen(),
    "masked blend": blended(),
    "freefuse": freefused(),
}
