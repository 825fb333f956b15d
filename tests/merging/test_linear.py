"""Sums, means and null spaces, each by a property that only the right algorithm has."""

import math

import pytest
import torch
from pairs import CIN, RANK, deltas, gauge, layer, one, pair, random, same

from mole_diffusers.merging.linear import directions, mean, null_space, total

close = pytest.approx


def test_sum_and_mean():
    pairs = layer(1.0, 0.5, -2.0)
    assert same(one(total, pairs), deltas(pairs).sum(0))
    assert same(one(mean, pairs), deltas(pairs).mean(0))
    assert same(one(mean, [pairs[0], None]), pairs[0].delta() / 2)  # N counts who is absent here too


def test_null_space_on_protected_and_on_orthogonal_inputs():
    content, style = pair(0), pair(1, scale=0.7)
    x = random(CIN, seed=5)
    inside = style.down.T @ random(RANK, seed=6)
    q = directions([style])
    outside = x - q @ (q.T @ x)
    merged = one(null_space, [content, style], mu=0.5)
    assert same(merged @ inside, style.delta() @ inside + content.delta() @ inside / 1.5)
    assert same(merged @ outside, content.delta() @ outside)
    hard = one(null_space, [content, style], mu=math.inf)
    assert same(hard @ inside, style.delta() @ inside)
    assert same(one(null_space, [content, style], mu=0.0), deltas([content, style]).sum(0))


def test_null_space_of_several_and_of_repeated_protected_ones():
    content, style = pair(0), pair(1)
    qr = torch.linalg.qr(style.down.T).Q
    q = directions([style, gauge(style)])  # the same directions twice
    assert q.shape == (CIN, RANK)
    assert same(q @ q.T, qr @ qr.T, 1e-6)
    first = one(null_space, [style, content], protect=[0])
    assert same(first, one(null_space, [content, style], protect=[1]))
    assert not torch.allclose(first, one(null_space, [style, content], protect=[1]))
    with pytest.raises(ValueError, match="mu of NP-LoRA must be 0 or more"):
        one(null_space, [content, style], mu=-1)
