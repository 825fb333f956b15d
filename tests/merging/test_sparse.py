"""TIES, DARE and KnOTS, each by a property that only the right algorithm has."""

import pytest
import torch
from pairs import CIN, COUT, deltas, gauge, layer, one, pair, random, same

from mole_diffusers.merging import Pair
from mole_diffusers.merging.sparse import dare, knots, ties

close = pytest.approx


def test_ties_by_hand():
    """Threshold 0.5 keeps the two largest of four entries; signs by the sum; means over those that agree."""
    eye = torch.eye(2, dtype=torch.float64)
    first = torch.tensor([[5.0, 0.1], [-3.0, 0.2]], dtype=torch.float64)
    second = torch.tensor([[1.0, 0.3], [4.0, 0.4]], dtype=torch.float64)  # keeps 4 and 1
    pairs = [Pair(first, eye), Pair(second, eye)]
    assert one(ties, pairs, share=0.5).tolist() == [[3.0, 0.0], [4.0, 0.0]]
    assert one(ties, pairs, share=0.5, scale=2.0).tolist() == [[6.0, 0.0], [8.0, 0.0]]


def test_ties_trims_over_the_whole_model():
    """A layer whose entries are all small loses all of them, which trimming layer by layer would not do."""
    big, small = layer(), [Pair(p.down * 1e-3, p.up) for p in layer()]
    merged = ties({"big": big, "small": small}, share=0.2)
    assert merged["small"].delta().abs().max() == 0
    assert merged["big"].delta().abs().max() > 0


@pytest.mark.parametrize("share", [1e-9, 0.03, 0.5, 1.0])
def test_ties_keeps_the_share_of_an_experts_entries_that_are_largest(share):
    """Against sorting all of them, where one expert lacks a layer, and where entries are equal."""
    layers = {"a": [pair(0), pair(1), None], "b": [pair(2), None, pair(3)], "c": [pair(4), pair(4), pair(4)]}
    found = []
    for key, merged in ties(layers, share=share).items():
        kept = []
        for k, own in enumerate(zip(*layers.values(), strict=True)):
            sizes = torch.cat([p.delta().abs().flatten() for p in own if p is not None]).sort(descending=True).values
            if layers[key][k] is not None:
                delta = layers[key][k].delta()
                kept.append(torch.where(delta.abs() >= sizes[max(1, round(share * len(sizes))) - 1], delta, 0))
        agree = [d * (d * sum(kept) > 0) for d in kept]
        counts = sum((d != 0).double() for d in agree)
        assert same(merged.delta(), sum(agree) / counts.clamp_min(1), 1e-12)
        found.append(counts.sum())
    assert sum(found) > 0


@pytest.mark.parametrize("method", [ties, dare])
def test_full_matrices_are_given_up_layer_by_layer(method):
    layers, seen = {"a": layer(), "b": layer(1.0, 2.0, 3.0)}, {}

    def keep(key, merged):
        seen[key] = merged.delta()
        return Pair(merged.down[:1], merged.up[:, :1])

    assert [p.rank for p in method(layers, keep=keep).values()] == [1, 1]
    for key, merged in method(layers).items():
        assert torch.equal(seen[key], merged.delta())


@pytest.mark.parametrize("method", [ties, knots])
def test_identical_experts_merge_to_one(method):
    pairs = [pair(0), gauge(pair(0)), pair(0)]
    assert same(one(method, pairs, share=1.0), pair(0).delta())


def test_ties_of_disjoint_supports_is_their_sum():
    left, right = random(COUT, CIN, seed=1), random(COUT, CIN, seed=2)
    left[:, CIN // 2 :] = 0
    right[:, : CIN // 2] = 0
    eye = torch.eye(COUT, dtype=torch.float64)
    assert same(one(ties, [Pair(left, eye), Pair(right, eye)], share=1.0), left + right)


def test_dare_is_right_on_average_and_repeats_by_seed():
    pairs = layer()
    runs = torch.stack([one(dare, pairs, drop=0.5, seed=s) for s in range(400)])
    spread = runs.std(0) / 20
    assert ((runs.mean(0) - deltas(pairs).sum(0)).abs() < 5 * spread + 1e-12).all()
    assert torch.equal(runs[3], one(dare, pairs, drop=0.5, seed=3))
    kept = one(dare, [pairs[0]], drop=0.9)
    assert (kept != 0).double().mean() == close(0.1, abs=0.03)
    assert same(one(dare, pairs, drop=0.0), deltas(pairs).sum(0))
    assert same(one(dare, pairs, drop=0.0, elect=True), one(ties, pairs, share=1.0))
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        one(dare, pairs, drop=1.0)


def test_knots_of_a_layer_that_nobody_changes_is_no_change():
    pairs = [Pair(random(rank, CIN), torch.zeros(COUT, rank, dtype=torch.float64)) for rank in (2, 3)]
    merged = knots({"l": pairs})["l"]
    assert merged.rank == 1
    assert not merged.delta().any()


def test_knots_aligns_by_the_singular_vectors_of_all_and_ignores_the_gauge():
    pairs = layer(1.0, 0.5, 2.0)
    merged = knots({"l": pairs}, share=1.0)["l"]
    basis = merged.up
    for p in pairs:
        assert same(basis @ (basis.T @ p.delta()), p.delta())
    u, values, _ = torch.linalg.svd(torch.cat(list(deltas(pairs)), 1), full_matrices=False)
    u = u[:, values > 1e-5]
    assert basis.shape == u.shape
    assert same((basis.T @ u).abs(), torch.eye(len(u.T), dtype=torch.float64).flip(0), 1e-6)  # eigh sorts upwards
    assert merged.rank <= sum(p.rank for p in pairs)
    moved = [gauge(p, seed) for seed, p in enumerate(pairs)]
    assert same(one(knots, moved, share=0.3), one(knots, pairs, share=0.3), 1e-7)
    assert not torch.allclose(one(ties, pairs, share=0.3), one(knots, pairs, share=0.3))


def test_shares_are_checked():
    with pytest.raises(ValueError, match="must be above 0 and at most 1"):
        one(ties, layer(), share=0.0)
