"""What holds for every family and every gate, new ones included."""

from dataclasses import fields, replace
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from gate_types import GATES, PLACE

from mole_diffusers import functional
from mole_diffusers.gates import GATE_TYPES, Context, Layer

CONTEXT = Context(torch.tensor([True, True]), torch.tensor([0.5]))


def options():
    for gate_type, kind in GATE_TYPES.items():
        hints = get_type_hints(kind, include_extras=True)
        yield from (pytest.param(gate_type, f.name, hints[f.name], id=f"{gate_type}-{f.name}") for f in fields(kind))


@pytest.mark.parametrize(("gate_type", "option", "kind"), options())
def test_options_are_in_the_docstring_and_are_checked(gate_type, option, kind):
    assert f"\n        {option}: " in GATE_TYPES[gate_type].__doc__
    wrong = ["nonsense"]
    if get_origin(kind) is Annotated:
        number, low, high = get_args(kind)
        wrong += [low - 1, high + 1, float("nan")]
        assert [replace(GATE_TYPES[gate_type](), **{option: number(bound)}) for bound in (low, high)]
    elif get_origin(kind) is Literal:
        assert [replace(GATE_TYPES[gate_type](), **{option: value}) for value in get_args(kind)]
    else:
        assert kind is bool
        wrong += [0]
    for value in wrong:
        with pytest.raises(ValueError, match=option):
            GATE_TYPES[gate_type](**{option: value})


@pytest.mark.parametrize("gate_type", ["static", "mole"])
def test_totals_are_those_of_gate_weights(gate_type):
    assert get_args(get_type_hints(GATE_TYPES[gate_type])["total"]) == functional.TOTALS


@pytest.fixture
def layer():
    """What the layer of `PLACE` reads, [1, 1, C], all ones, and its experts."""
    hidden, stack = torch.ones(1, 1, PLACE.width), PLACE.one_layer
    return hidden, Layer(hidden @ stack.down.T, stack.up, stack.expert_index)


@pytest.mark.parametrize("gate_type", GATES)
def test_weights_are_fp32_and_zero_for_who_is_absent(layer, gate_type):
    gate, (hidden, experts) = GATES[gate_type], layer
    weights = gate(hidden.half(), replace(CONTEXT, layer=experts))
    assert weights.dtype == torch.float32
    assert weights.shape[-1] == (len(experts.expert_index) if gate.ranked else PLACE.experts)
    assert weights.ne(0).all()
    alone = gate(hidden, Context(torch.tensor([True, False]), CONTEXT.time, experts))
    assert alone[..., 0].ne(0).all()
    assert alone[..., -1].eq(0).all()


@pytest.mark.parametrize("gate_type", GATES)
def test_an_update_moves_weights_no_further_than_the_gate_says(layer, gate_type):
    """If each entry of a parameter moves by 1 over its sensitivity, in the worst direction."""
    gate, (hidden, experts) = GATES[gate_type], layer
    parameters = dict(gate.named_parameters())
    assert GATE_TYPES[gate_type].learns == bool(parameters)
    assert set(gate.sensitivity()) <= set(parameters)
    if parameters:
        first = gate(hidden, replace(CONTEXT, layer=experts))[..., 0].sum()
        moved = torch.autograd.grad(first, list(parameters.values()), allow_unused=True, materialize_grads=True)
        for name, gradient in zip(parameters, moved, strict=True):
            assert gradient.abs().sum() <= 1.01 * gate.sensitivity().get(name, 1), name
