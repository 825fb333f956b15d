"""What holds for every family and every gate, new ones included."""

from dataclasses import fields, replace
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from gate_families import GATES, PLACE

from mole_diffusers import functional
from mole_diffusers.gates import FAMILIES, Context, Layer

CONTEXT = Context(torch.tensor([True, True]), torch.tensor([0.5]))


def options():
    for family, kind in FAMILIES.items():
        hints = get_type_hints(kind, include_extras=True)
        yield from (pytest.param(family, f.name, hints[f.name], id=f"{family}-{f.name}") for f in fields(kind))


@pytest.mark.parametrize(("family", "option", "kind"), options())
def test_options_are_in_the_docstring_and_are_checked(family, option, kind):
    assert f"\n        {option}: " in FAMILIES[family].__doc__
    wrong = ["nonsense"]
    if get_origin(kind) is Annotated:
        number, low, high = get_args(kind)
        wrong += [low - 1, high + 1, float("nan")]
        assert [replace(FAMILIES[family](), **{option: number(bound)}) for bound in (low, high)]
    elif get_origin(kind) is Literal:
        assert [replace(FAMILIES[family](), **{option: value}) for value in get_args(kind)]
    else:
        assert kind is bool
        wrong += [0]
    for value in wrong:
        with pytest.raises(ValueError, match=option):
            FAMILIES[family](**{option: value})


@pytest.mark.parametrize("family", ["static", "mole"])
def test_totals_are_those_of_gate_weights(family):
    assert get_args(get_type_hints(FAMILIES[family])["total"]) == functional.TOTALS


@pytest.fixture
def layer():
    """What the layer of `PLACE` reads, [1, 1, C], all ones, and its experts."""
    hidden, stack = torch.ones(1, 1, PLACE.width), PLACE.one_layer
    return hidden, Layer(hidden @ stack.down.T, stack.up, stack.segment)


@pytest.mark.parametrize("family", GATES)
def test_weights_are_fp32_and_zero_for_who_is_absent(layer, family):
    gate, (hidden, experts) = GATES[family], layer
    weights = gate(hidden.half(), replace(CONTEXT, layer=experts))
    assert weights.dtype == torch.float32
    assert weights.shape[-1] == (len(experts.segment) if gate.ranked else PLACE.experts)
    assert weights.ne(0).all()
    alone = gate(hidden, Context(torch.tensor([True, False]), CONTEXT.time, experts))
    assert alone[..., 0].ne(0).all()
    assert alone[..., -1].eq(0).all()


@pytest.mark.parametrize("family", GATES)
def test_an_update_moves_weights_no_further_than_the_gate_says(layer, family):
    """If each entry of a parameter moves by 1 over its sensitivity, in the worst direction."""
    gate, (hidden, experts) = GATES[family], layer
    parameters = dict(gate.named_parameters())
    assert FAMILIES[family].learns == bool(parameters)
    assert set(gate.sensitivity()) <= set(parameters)
    if parameters:
        first = gate(hidden, replace(CONTEXT, layer=experts))[..., 0].sum()
        moved = torch.autograd.grad(first, list(parameters.values()), allow_unused=True, materialize_grads=True)
        for name, gradient in zip(parameters, moved, strict=True):
            assert gradient.abs().sum() <= 1.01 * gate.sensitivity().get(name, 1), name
