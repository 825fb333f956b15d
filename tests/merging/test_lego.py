"""LoRA-LEGO by properties that only the right algorithm has."""

import math

import pytest
import torch
from pairs import N, deltas, layer, one, pair, random, same

from mole_diffusers.merging import Pair
from mole_diffusers.merging.lego import assembled, kmeans, lego

close = pytest.approx


def test_lego_of_copies_is_one_of_them():
    assert same(one(lego, [pair(0)] * 3), pair(0).delta())


def test_lego_with_as_many_clusters_as_ranks_is_the_sum_by_root_n():
    pairs = layer(1.0, 0.5, -2.0)
    assert same(one(lego, pairs, clusters=10**6), deltas(pairs).sum(0) / math.sqrt(N))


def test_lego_by_hand():
    """Units (1, 0) and (0, 1): mean (.5, .5), largest entry .5 against 1 in the members, so (1, 1)."""
    units = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    merged = assembled(units, torch.tensor([0, 0]), 1, rank=1.0)
    assert (merged.down.tolist(), merged.up.tolist()) == ([[1.0]], [[1.0]])
    scaled = assembled(units, torch.tensor([0, 0]), 1, rank=4.0)
    assert scaled.delta().item() == close(2.0)  # sqrt(rank / clusters)


def test_lego_centres_are_as_large_as_their_members():
    units = random(12, 9, seed=3)
    labels = kmeans(units, 3, seed=0, starts=10)
    merged = assembled(units, labels, 5, rank=3.0)
    centres = torch.cat([merged.down, merged.up.T], 1)
    for label, centre in zip(labels.unique(), centres, strict=True):
        assert centre.abs().max().item() == close(units[labels == label].abs().amax(1).mean().item())


def test_lego_ignores_the_order_of_ranks_and_experts_and_repeats_by_seed():
    pairs = layer()
    turned = [Pair(p.down.flip(0), p.up.flip(1)) for p in pairs[::-1]]
    assert torch.equal(one(lego, pairs), one(lego, turned))
    assert torch.equal(one(lego, pairs, seed=1), one(lego, pairs, seed=1))
    assert lego({"l": pairs[:1]}, clusters=2)["l"].rank == 2


def test_lego_with_canonical_units_sees_through_signs_and_sizes():
    base = pair(0)
    flipped = Pair(-3 * base.down, -base.up / 3)
    assert same(one(lego, [base, flipped], canonical=True), base.delta())
    assert not torch.allclose(one(lego, [base, flipped]), base.delta())


def test_lego_clusters_by_direction_when_normalized():
    down = torch.tensor([[1.0, 0.0], [50.0, 0.0], [0.0, 1.0], [0.0, 50.0]], dtype=torch.float64)
    pairs = [Pair(down, down.T.clone())]
    by_direction = one(lego, pairs, clusters=2, features="normalized")
    by_size = one(lego, pairs, clusters=2)
    assert by_direction[0, 1] == 0
    assert not torch.allclose(by_direction, by_size)
    with pytest.raises(ValueError, match="clusters must be 1 or more"):
        one(lego, pairs, clusters=0)


def test_kmeans_finds_separate_clouds():
    points = torch.cat([random(20, 3, seed=i) * 0.1 + 5 * i for i in range(4)])
    labels = kmeans(points, 4, seed=0, starts=10)
    assert [len(group.unique()) for group in labels.split(20)] == [1, 1, 1, 1]
    assert len(labels.unique()) == 4
