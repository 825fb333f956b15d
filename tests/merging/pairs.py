"""Random pairs of factors in float64, and one layer that a merge makes of them."""

import torch

from mole_diffusers.merging import Pair

CIN, COUT, RANK, N = 40, 30, 4, 3


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(seed, rank=RANK, scale=1.0, cin=CIN, cout=COUT):
    return Pair(random(rank, cin, seed=seed), random(cout, rank, seed=seed + 100), scale)


def layer(*scales):
    return [pair(i, scale=s) for i, s in enumerate(scales or (1.0,) * N)]


def inputs(rows=400, seed=50):
    return [random(rows, CIN, seed=seed + i) + 2 * random(1, CIN, seed=seed + 10 + i) for i in range(N)]


def one(method, pairs, **options):
    """The delta of a model of one layer."""
    if "inputs" in options:
        options["inputs"] = {"l": options["inputs"]}
    return method({"l": pairs}, **options)["l"].delta()


def deltas(pairs):
    return torch.stack([p.delta() for p in pairs])


def gauge(p, seed=9):
    """The same LoRA with its ranks mixed and its size moved from up to down."""
    mix = random(p.rank, p.rank, seed=seed) + 3 * torch.eye(p.rank, dtype=torch.float64)
    return Pair(mix @ p.down, p.up @ torch.linalg.inv(mix), p.scale)


def same(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))
    return True
