"""Experts that weigh nothing are not computed, which changes nothing."""

import pytest
import torch

import mole_diffusers as mole
from benchmarks.hosts import inputs
from mole_diffusers import functional
from mole_diffusers.gates.transforms import Strongest
from mole_diffusers.patching.gated_linear import GatedLayer
from mole_diffusers.testing import tiny_lora

CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture
def many(pipe, loras, tmp_path):
    """Eight LoRAs of different ranks and layer sets."""
    others = {f"l{i}": tiny_lora(pipe, tmp_path / f"{i}.safetensors", rank=1 + i, seed=10 + i) for i in range(5)}
    return loras | others


@pytest.fixture
def few(monkeypatch):
    """How often a layer computed some of its experts."""
    calls, some = [], GatedLayer._of_few
    monkeypatch.setattr(GatedLayer, "_of_few", lambda *a: calls.append(0) or some(*a))
    return calls


def zeroing(count):
    """The other route: the same gates, of which the layers do not know that most are zero."""
    strongest = Strongest(count)
    return lambda place, gates, mask: strongest(place, gates, mask)


def test_the_strongest_by_hand():
    gates, mask = torch.tensor([[0.5, 2.0, 1.5], [1.0, -3.0, 0.0]]), torch.tensor([True, True, True])
    assert Strongest(2)("a", gates, mask).tolist() == [[0, pytest.approx(16 / 7), pytest.approx(12 / 7)], [1, -3, 0]]
    assert Strongest(1)("a", gates, mask).tolist() == [[0, 4, 0], [0, -4, 0]]
    assert torch.equal(Strongest(9)("a", gates, mask), gates)
    with pytest.raises(ValueError, match="got 0"):
        Strongest(0)


def test_ranks_are_picked_by_hand():
    table = torch.tensor([[0, -1], [1, 2], [3, 4]])
    ranks, factor = functional.few_ranks(torch.tensor([[5.0, 1.0, 0.0], [0.0, 2.0, -7.0]]), table, 2)
    assert ranks.tolist() == [[0, 0, 1, 2], [3, 4, 1, 2]]
    assert factor[:, 0].tolist() == [[5, 0, 1, 1], [-7, -7, 2, 2]]


@pytest.mark.parametrize("family", ["mole", "static", "prompt", "sum"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_step_with_few_experts_is_that_of_zeroed_gates(pipe, many, awake, few, monkeypatch, family, inside):
    monkeypatch.setattr(GatedLayer, "pays", staticmethod(lambda *_: inside))
    pipe.to(dtype=torch.float64)  # eight LoRAs of visible effect make much of rounding
    mixture = awake(mole.attach(pipe, many, family))
    mixture.strength("l3", -1.5)
    given = inputs(pipe, "tiny", pixels=32) | {"cross_attention_kwargs": {"scale": 0.7}}
    with torch.no_grad():
        with mixture.adjusted(zeroing(2)):
            expected = pipe.unet(**given)[0]
        assert not few
        with mixture.adjusted(Strongest(2)):
            for _ in range(3):  # what is kept of the text comes in with the third
                torch.testing.assert_close(pipe.unet(**given)[0], expected, atol=1e-9, rtol=0)
        assert few
        assert (pipe.unet(**given)[0] - expected).abs().max() > 1e-3


def test_gates_per_token_and_gradients_take_all(pipe, many, draw, awake, few):
    mixture = awake(mole.attach(pipe, many, "flow"))
    with mixture.adjusted(zeroing(2)):
        expected = draw(pipe)
    with mixture.adjusted(Strongest(2)):
        torch.testing.assert_close(draw(pipe), expected, **CLOSE)
    mixture = awake(mole.attach(pipe, many, "mole"))
    with mixture.adjusted(Strongest(2)):
        pipe.unet(**inputs(pipe, "tiny", pixels=32))[0].square().mean().backward()
    assert not few
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in mixture.parameters())
