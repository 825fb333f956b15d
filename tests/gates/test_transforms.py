"""Controls of trained gates: each keeps the totals and takes away one thing that the gate learned."""

import pytest
import torch

import mole_diffusers as mole
from mole_diffusers.gates import transforms

GATES = torch.tensor([[0.5, 0.0, 2.5], [1.0, 0.0, -4.0]])  # the second expert is absent
MASK = torch.tensor([True, False, True])


def test_uniform_and_hardened_by_hand():
    assert transforms.uniform("a", GATES, MASK).tolist() == [[1.5, 0, 1.5], [-1.5, 0, -1.5]]
    assert transforms.hardened("a", GATES, MASK).tolist() == [[0, 0, 3], [-3, 0, 0]]
    by_row = torch.stack([MASK, ~MASK])  # [B, N]: each row has experts of its own
    assert transforms.uniform("a", torch.ones(2, 4, 3), by_row)[:, 3].tolist() == [[1.5, 0, 1.5], [0, 3, 0]]
    assert transforms.hardened("a", torch.ones(2, 4, 3), by_row)[:, 3].tolist() == [[3, 0, 0], [0, 3, 0]]
    nobody = torch.zeros(3, dtype=torch.bool)
    for control in (transforms.uniform, transforms.hardened, transforms.frozen_random(0)):
        assert control("a", torch.zeros(2, 3), nobody).eq(0).all()


def test_frozen_random_is_fixed_by_seed_and_place_and_is_not_uniform():
    control = transforms.frozen_random(0)
    first = control("a", GATES, MASK)
    torch.testing.assert_close(first.sum(-1), GATES.sum(-1))
    assert first[:, 1].eq(0).all()
    assert torch.equal(first, control("a", GATES, MASK))
    assert not torch.allclose(first, transforms.uniform("a", GATES, MASK), atol=0.1)
    assert not torch.allclose(first, control("b", GATES, MASK), atol=0.01)
    assert not torch.allclose(first, transforms.frozen_random(1)("a", GATES, MASK), atol=0.01)


def test_uniform_gates_are_the_plain_sum_and_strengths_still_count(pipe, loras, draw, awake):
    with_strengths = {n: (path, s) for (n, path), s in zip(loras.items(), (0.5, -0.8, 1.7), strict=True)}
    mole.attach(pipe, with_strengths, "sum")
    plain = draw(pipe)
    mixture = awake(mole.attach(pipe, with_strengths, "mole"))
    gated = draw(pipe)
    with mixture.adjusted(transforms.uniform):
        torch.testing.assert_close(draw(pipe), plain, atol=1e-5, rtol=0)
    assert torch.equal(draw(pipe), gated)


def test_hardened_gates_leave_one_expert_per_place_and_row(pipe, loras, draw, awake):
    mixture = awake(mole.attach(pipe, loras, mole.GateConfig("mole", total="1")))
    with mixture.adjusted(transforms.hardened), mixture.trace() as trace:
        draw(pipe)
    assert trace.entropy() == pytest.approx(0, abs=1e-6)


def test_the_strongest_by_hand():
    gates, mask = torch.tensor([[0.5, 2.0, 1.5], [1.0, -3.0, 0.0]]), torch.tensor([True, True, True])
    weights = transforms.Strongest(2)("a", gates, mask).tolist()
    assert weights == [[0, pytest.approx(16 / 7), pytest.approx(12 / 7)], [1, -3, 0]]
    assert transforms.Strongest(1)("a", gates, mask).tolist() == [[0, 4, 0], [0, -4, 0]]
    assert torch.equal(transforms.Strongest(9)("a", gates, mask), gates)
    with pytest.raises(ValueError, match="got 0"):
        transforms.Strongest(0)
