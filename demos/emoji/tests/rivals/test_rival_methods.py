"""Rivals as methods: the order of experts, and the parts of a case, are those of their composers."""

from functools import partial

import pytest
from drawn_methods import CASE, by_hand, drawn, settings_of, setup_of
from tiers import thorough

import mole_diffusers as mole
import rivals
from mole_world.evaluation import methods
from mole_world.evaluation.runner import Case
from rivals.isolation import isolated_prompts
from rivals.regional_composers import masked_blend, regional_prompts
from rivals.sampling_composers import k_lora, switched


@pytest.fixture
def setup(pipe, loras):
    return setup_of(pipe, loras)


@pytest.mark.parametrize("concepts", [*thorough((("fox", "ink"),)), ("ink", "fox")])
@pytest.mark.parametrize("name", ["k-lora", *thorough("switch")])
def test_switch_and_k_lora_know_the_style_by_its_name(setup, name, concepts):
    """Content before style whatever place a case gives them; a case that does not say which is which keeps its own order."""
    case = Case(concepts, CASE.kind, CASE.prompt)
    pipe, gates = setup.pipe, rivals.MATRIX
    method, form, inside = {
        "switch": (rivals.switch(period=1), "sum", lambda m, order: switched(pipe, m, period=1)),
        "k-lora": (rivals.klora(), gates, lambda m, order: k_lora(pipe, m, content=order[0], style=order[1])),
    }[name]
    seen = []
    for styles, order in (
        (frozenset({"ink"}), ["fox", "ink"]),
        (frozenset(), concepts),
        (frozenset(concepts), concepts),
    ):
        setup.styles = styles
        wanted = by_hand(setup, {n: setup.experts[n] for n in order}, partial(inside, order=order), gates=form)
        assert drawn(setup, method, case) == wanted, styles
        seen.append((wanted, dict(method.settings(setup, case))))
    assert (seen[0] == seen[1]) == (concepts == ("fox", "ink"))  # and another order is another row
    assert seen[1] == seen[2]


def test_switch_takes_what_was_asked_for_before_what_only_stands_by(setup):
    case = Case(("ink", "fox"), CASE.kind, CASE.prompt, idle=("hat",))
    with rivals.switch().draws(setup, case):
        assert list(mole.attached(setup.pipe).experts) == ["fox", "ink", "hat"]


def test_k_lora_takes_a_bystander_for_the_content_of_a_style(setup):
    with rivals.klora().draws(setup, Case(("ink",), "single", CASE.prompt, idle=("fox",))):
        assert list(mole.attached(setup.pipe).experts) == ["fox", "ink"]


def test_parts_of_a_case_are_drawn_and_said(setup):
    """By regional prompts and by a masked blend; a case of styles alone has no parts, and gets the sum."""
    parts = {"fox": ("a fox", "left")}
    of = lambda setup, case: {name: parts[name] for name in methods.subjects_of(setup, case)}  # noqa: E731
    experts = {name: setup.experts[name] for name in CASE.concepts}
    composers = {
        rivals.regional(of): (regional_prompts, rivals.MATRIX),
        rivals.blended("given", of): (masked_blend, "sum"),
    }
    for method, (composer, gates) in composers.items():
        inside = partial(composer, setup.pipe, prompt=CASE.prompt, parts=parts)
        assert drawn(setup, method) == by_hand(setup, experts, lambda m, inside=inside: inside(mixture=m), gates)
        assert settings_of(setup, method)["parts"] == parts
    assert drawn(setup, method, Case(("ink",), "style", CASE.prompt)) == drawn(setup, methods.alone("ink"))
    assert settings_of(setup, rivals.blended())["parts"] == {"fox": (CASE.prompt, "auto")}
    both = {"fox": ("a fox", "left"), "ink": ("in ink", "right")}
    isolated = drawn(setup, rivals.isolated_regional(lambda *_: both))
    inside = partial(isolated_prompts, setup.pipe, prompt=CASE.prompt, parts=both)
    assert isolated == by_hand(setup, experts, lambda m: inside(mixture=m), rivals.MATRIX)
    assert isolated != drawn(setup, rivals.regional(lambda *_: both))
