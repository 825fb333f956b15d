"""The maths, against numbers worked out by hand."""

import math

import pytest
import torch

from mole_diffusers import functional

LOGITS = torch.tensor([0.0, math.log(2), math.log(5)])
ALL = torch.tensor([True, True, True])


@pytest.mark.parametrize(
    ("total", "expected"),
    [
        ("1", [1 / 8, 2 / 8, 5 / 8]),
        ("N", [3 / 8, 6 / 8, 15 / 8]),
        ("sigmoid", [1.0, 4 / 3, 5 / 3]),
        ("linear", [1.0, 1 + math.log(2), 1 + math.log(5)]),
    ],
)
def test_totals_by_hand(total, expected):
    torch.testing.assert_close(functional.gate_weights(LOGITS, ALL, total), torch.tensor(expected))


def test_masking_is_softmax_over_the_kept_logits_and_renormalised_weights():
    mask = torch.tensor([True, False, True])
    kept = functional.gate_weights(LOGITS, mask, "1")
    torch.testing.assert_close(kept, torch.tensor([1 / 6, 0.0, 5 / 6]))
    whole = functional.gate_weights(LOGITS, ALL, "1") * mask
    torch.testing.assert_close(kept, whole / whole.sum())
    torch.testing.assert_close(functional.gate_weights(LOGITS, mask, "N"), 2 * kept)
    assert functional.gate_weights(LOGITS, ~ALL, "1").eq(0).all()
    with pytest.raises(ValueError, match="unknown total 'two'"):
        functional.gate_weights(LOGITS, ALL, "two")


def test_expert_outputs_are_each_expert_alone():
    torch.manual_seed(0)
    x, downs, ups = torch.randn(2, 5, 6), [torch.randn(r, 6) for r in (1, 3)], [torch.randn(4, r) for r in (1, 3)]
    out = functional.expert_outputs(x, torch.cat(downs), torch.cat(ups, 1), [1, 3])
    alone = [x @ down.T @ up.T for down, up in zip(downs, ups, strict=True)]
    torch.testing.assert_close(out, torch.cat(alone, -1))
    pooled = functional.expert_outputs(x.mean(1, keepdim=True), torch.cat(downs), torch.cat(ups, 1), [1, 3])
    torch.testing.assert_close(pooled[:, 0], out.mean(1))


@pytest.mark.parametrize("shape", [(2, 4), (2, 5, 4), (2, 4, 3, 2)])
def test_rank_factors_gate_each_experts_ranks(shape):
    expert_index, weights = torch.tensor([0, 1, 1, 1]), torch.tensor([[2.0, 3.0], [5.0, 7.0]])
    rows = by_row(functional.over_ranks(weights, expert_index, torch.ones(shape)), shape)
    assert rows[0, 0].tolist() == [2, 3, 3, 3]
    assert rows[1, -1].tolist() == [5, 7, 7, 7]
    same = by_row(functional.over_ranks(weights[0], expert_index, torch.ones(shape)), shape)
    assert torch.equal(same[1], same[0])
    assert torch.equal(by_row(functional.over_ranks(weights[:, expert_index], None, torch.ones(shape)), shape), rows)


@pytest.mark.parametrize("shape", [(2, 4), (2, 6, 4), (2, 4, 3, 2)])
def test_every_token_has_its_own_factor(shape):
    expert_index, tokens = torch.tensor([0, 1, 1, 1]), 1 if len(shape) == 2 else 6
    weights = torch.arange(2.0 * tokens * 2).reshape(2, tokens, 2)
    rows = by_row(functional.over_ranks(weights, expert_index, torch.ones(shape)), shape)
    assert torch.equal(rows, weights[..., expert_index])
    assert torch.equal(by_row(functional.over_ranks(weights[..., expert_index], None, torch.ones(shape)), shape), rows)


@pytest.mark.parametrize("shape", [(2,), (3, 2), (3, 1, 2), (3, 5, 2)])
def test_factors_of_rows_are_those_of_their_tokens(shape):
    torch.manual_seed(0)
    expert_index, weights, low = torch.tensor([0, 1, 1, 1]), torch.randn(shape), torch.randn(15, 4)
    for given, of in ((weights, expert_index), (weights[..., expert_index], None)):
        tokens = functional.over_ranks(given, of, low.view(3, 5, 4)).expand(3, 5, 4)
        assert torch.equal(functional.over_rows(given, of, low, 3).expand(15, 4), tokens.reshape(15, 4))


def by_row(factor, shape):
    """What ones of `shape` become, as [B, T, R]."""
    scaled = torch.ones(shape) * factor
    return scaled.flatten(2).transpose(1, 2) if len(shape) == 4 else scaled.reshape(len(scaled), -1, scaled.shape[-1])


def test_ranks_are_averaged_by_expert():
    values, expert_index = torch.tensor([[1.0, 2.0, 6.0]]), torch.tensor([0, 2, 2])
    assert functional.by_expert(values, expert_index, 4).tolist() == [[1, 0, 4, 0]]


def test_entropy_and_balance_by_hand():
    even = torch.tensor([0.5, 0.5])
    assert functional.entropy(even).item() == pytest.approx(math.log(2))
    assert functional.entropy(torch.tensor([2.0, 0.0])).item() == pytest.approx(0)
    both = torch.tensor([True, True])

    def balance(gates, masks):
        return functional.balance_loss(*functional.relative_shares(gates, masks))

    assert balance([even, 2 * even], [both, both]).item() == pytest.approx(0, abs=1e-6)
    # Two blocks that specialise in opposite experts are balanced; q is averaged before the log.
    opposite = [torch.tensor([[0.9, 0.1]]), torch.tensor([[0.1, 0.9]])]
    assert balance(opposite, [both, both]).item() == pytest.approx(0, abs=1e-6)
    # A block that has one expert alone says nothing of balance.
    alone = [even, torch.tensor([1.0, 0.0])]
    assert balance(alone, [both, torch.tensor([True, False])]).item() == pytest.approx(0, abs=1e-6)
    skewed = balance([torch.tensor([0.8, 0.2])], [both])
    assert skewed.item() == pytest.approx(-math.log(0.8) - math.log(0.2) - 2 * math.log(2), rel=1e-5)
    # Experts that do not act, in all rows or in some, count for nothing.
    three, off = torch.tensor([0.8, 0.2, 0.0]), torch.tensor([True, True, False])
    assert balance([three], [off]).item() == pytest.approx(skewed.item())
    rows = torch.stack([three, torch.tensor([1.0, 0.0, 0.0])])
    assert balance([rows], [torch.stack([off, torch.tensor([True, False, False])])]).item() == pytest.approx(skewed.item())


def test_balance_has_a_live_gradient_that_evens_out():
    logits = torch.tensor([1.0, 0.0], requires_grad=True)
    shares = functional.relative_shares([torch.softmax(logits, -1)], [torch.tensor([True, True])])
    functional.balance_loss(*shares).backward()
    assert logits.grad[0] > 0 > logits.grad[1]


def test_equal_shares_are_the_minimum_of_balance_whichever_layers_experts_have():
    masks = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 0], [0, 1, 1], [1, 0, 0]], dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)

    def balance(logits):
        gates = [functional.gate_weights(row, mask, "N") for row, mask in zip(logits, masks, strict=True)]
        return functional.balance_loss(*functional.relative_shares(gates, list(masks)))

    even = torch.zeros(5, 3, requires_grad=True)
    loss = balance(even)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert torch.autograd.grad(loss, even)[0].abs().max() < 1e-6
    for size in (0.1, 1.0, 5.0):
        assert balance(size * torch.randn(5, 3, generator=generator)) > 0


def test_rows_stand_for_as_many_neighbours_each():
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert functional.resample_rows(values, 2) is values
    assert functional.resample_rows(values, 6).tolist() == [[1, 2]] * 3 + [[3, 4]] * 3
    assert functional.resample_rows(functional.resample_rows(values, 6), 2).tolist() == values.tolist()


def test_pieces_of_a_batch_keep_their_own_rows():
    guided = torch.tensor([[0.0], [1.0], [2.0]])  # without text, with text, perturbed
    assert functional.rows_for_layer(guided, 2).tolist() == [[0], [1]]
    assert functional.rows_for_layer(guided, 1).tolist() == [[2]]
    assert functional.rows_for_layer(guided, 6).tolist() == [[0], [0], [1], [1], [2], [2]]
