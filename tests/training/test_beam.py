"""BeamLoRA's schedule, pruning and expansion, by hand."""

import pytest
import torch
from torch import nn

from mole_diffusers.training import LoraTraining
from mole_diffusers.training.beam import MOMENTS, Beams, Ranks, importance, kept_share, period, pruned, ranked


def test_equal_logits_are_plain_lora():
    assert torch.equal(importance(torch.zeros(8), 0.05), torch.ones(8))
    pi = importance(torch.tensor([0.05, 0.0]), 0.05)
    assert pi.tolist() == pytest.approx([2 * torch.e / (1 + torch.e), 2 / (1 + torch.e)])


def test_the_schedule():
    assert kept_share(0, 100) == pytest.approx(0.95)
    assert kept_share(50, 100) == pytest.approx(0.975)
    assert kept_share(100, 100) == kept_share(150, 100) == 1
    assert period(37_031) == 2962
    assert period(100) == 50


def test_pruning_by_hand():
    pis = [torch.tensor([1.9, 0.1]), torch.tensor([1.2, 0.8])]
    assert pruned(pis, 0.95) == [[1], [1]]  # sums 1.9, 3.1, 3.9 of 4: the one that passes 3.8 goes too
    assert pruned(pis, 1.0) == [[], []]
    weak = [torch.tensor([3.7, 0.1, 0.1, 0.1]), torch.ones(4)]
    assert pruned(weak, 0.5)[0] == [3, 2]  # of three weak ranks half a layer goes, of equals the later


def beams_of(steps, rank=8, layers=2):
    torch.manual_seed(0)
    ranks = {
        str(i): Ranks(
            nn.Parameter(torch.zeros(rank)), nn.Parameter(torch.randn(rank, 3)), nn.Parameter(torch.randn(5, rank))
        )
        for i in range(layers)
    }
    optimizer = torch.optim.AdamW([p for r in ranks.values() for p in r], 1e-2)
    return Beams(ranks, optimizer, LoraTraining(steps=steps))


def step(beams):
    """An update that gives every parameter a gradient of its own."""
    for i, p in enumerate(p for r in beams.layers.values() for p in r):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    beams.optimizer.step()


def state(beams, ranks):
    return {m: {n: beams.optimizer.state[p][m].clone() for n, p in ranks._asdict().items()} for m in MOMENTS}


def test_a_slot_becomes_its_source_as_it_was():
    beams = beams_of(200)  # period 50
    for i in range(25):
        step(beams)
        beams.after(i + 1)
    ranks = beams.layers["0"]
    old_down, old_up, old = ranks.down.detach().clone(), ranks.up.detach().clone(), state(beams, ranks)
    for _ in range(24):
        step(beams)
    with torch.no_grad():
        ranks.logits.copy_(torch.tensor([0.0, 0.3, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]))
        beams.layers["1"].logits.zero_()
    now = ranks.down.detach().clone()
    gone = pruned([importance(r.logits, 0.05) for r in beams.layers.values()], kept_share(50, 200 * 2 / 3))
    assert gone[0]
    slot, count = gone[0][0], len(gone[0])
    best = ranked(importance(ranks.logits, 0.05))[:count]
    logits = ranks.logits.detach().clone()
    sizes = [p.shape for p in ranks]
    beams.after(50)
    sources = [i for i in best if torch.equal(ranks.down[slot], old_down[i])]
    assert len(sources) == 1  # a cached source, and one of the best
    (source,) = sources
    assert not torch.equal(ranks.down[slot], now[source])  # not as it is now
    assert torch.equal(ranks.down[source], now[source])  # which stays
    assert torch.equal(ranks.up[:, slot], old_up[:, source])
    for moment in MOMENTS:
        kept = beams.optimizer.state
        assert torch.equal(kept[ranks.down][moment][slot], old[moment]["down"][source])
        assert torch.equal(kept[ranks.up][moment][:, slot], old[moment]["up"][:, source])
        assert not kept[ranks.logits][moment].any()
    assert ranks.logits[slot] == ranks.logits[source] == (logits[slot] + logits[source]) / 2
    assert [p.shape for p in ranks] == sizes  # the number of ranks never changes


def test_nothing_expands_within_the_last_period():
    beams, seen = beams_of(200), []
    beams._expand = seen.append
    for i in range(200):
        step(beams)
        beams.after(i + 1)
    assert seen == [50, 100, 150]
    beams, seen = beams_of(99), []
    beams._expand = seen.append
    for i in range(99):
        step(beams)
        beams.after(i + 1)
    assert not seen


def test_nothing_changes_once_pruning_has_ended():
    beams = beams_of(200)
    for i in range(125):
        step(beams)
        if i == 124:
            beams.after(i + 1)  # the snapshot before step 150, later than 2/3 of 200
    before = [p.detach().clone() for r in beams.layers.values() for p in r]
    beams.after(150)
    assert all(torch.equal(a, b) for a, b in zip(before, (p for r in beams.layers.values() for p in r), strict=True))
