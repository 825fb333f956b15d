"""Merges by least squares, each by a property that only the right algorithm has."""

import pytest
import torch
from pairs import CIN, RANK, N, deltas, gauge, inputs, layer, one, pair, random, same

from mole_diffusers.merging import Pair
from mole_diffusers.merging.factors import concatenated
from mole_diffusers.merging.lego import lego
from mole_diffusers.merging.linear import directions, mean, total
from mole_diffusers.merging.regression import best_scalars, iteris, least_squares, regmean, relative_loss, scalars, ssr
from mole_diffusers.merging.sparse import knots, ties

close = pytest.approx


def test_core_is_the_normal_equations():
    xs, pairs = inputs(), layer()
    squares = [x.T @ x for x in xs]
    solved = concatenated(pairs).up @ least_squares([p.down for p in pairs], squares, squares)
    stacked = torch.cat(xs)
    wanted = torch.cat([x @ p.delta().T for x, p in zip(xs, pairs, strict=True)])
    assert same(solved.T, torch.linalg.lstsq(stacked, wanted).solution, 1e-8)


def test_core_takes_the_smallest_change_where_inputs_are_few():
    x = random(5, CIN, seed=1)
    p = pair(0)
    solved = least_squares([p.down], [x.T @ x], [x.T @ x])
    minimal = (torch.linalg.pinv(x) @ x @ p.down.T).T
    assert same(solved, minimal, 1e-6)


def test_ssr_with_the_same_inputs_for_all_is_the_mean():
    x, pairs = inputs()[0], layer()
    assert same(one(ssr, pairs, inputs=[x] * N, ridge=0.0), deltas(pairs).mean(0))
    assert same(one(ssr, pairs, inputs=inputs(), ridge=1e9), deltas(pairs).mean(0), 1e-6)


def test_ssr_is_the_sum_where_nobody_hears_the_others_inputs():
    pairs = layer()
    quiet = [directions([p for p in pairs if p is not own]) for own in pairs]
    xs = [x - x @ q @ q.T for x, q in zip(inputs(), quiet, strict=True)]
    assert same(one(ssr, pairs, inputs=xs, ridge=0.0), deltas(pairs).sum(0), 1e-7)


def test_ssr_does_not_see_the_gauge():
    pairs, xs = layer(), inputs()
    moved = [gauge(p, seed) for seed, p in enumerate(pairs)]
    assert same(one(ssr, moved, inputs=xs, ridge=0.0), one(ssr, pairs, inputs=xs, ridge=0.0), 1e-6)


def test_losses_are_ordered_by_the_room_that_each_form_has():
    pairs, xs = layer(), inputs()

    def loss(merged):
        return relative_loss(pairs, xs, merged["l"])

    options = {"inputs": {"l": xs}}
    summed, averaged = loss(total({"l": pairs})), loss(mean({"l": pairs}))
    weighted = loss(scalars({"l": pairs}, **options))
    routed = loss(ssr({"l": pairs}, ridge=0.0, **options))
    free = loss(regmean({"l": pairs}, diagonal=1.0, **options))
    assert 0 < free < routed < min(summed, averaged)
    assert weighted < min(summed, averaged)
    # The same number from G and Q alone: tr(P R G R') - 2 tr(P R Q') + sum tr(P_kk Q_kk).
    whole = concatenated(pairs)
    router = ssr({"l": pairs}, ridge=0.0, **options)["l"].down @ torch.linalg.pinv(whole.down)
    grams = [(x @ whole.down.T).T @ (x @ whole.down.T) for x in xs]
    g = torch.stack(grams).sum(0)
    q = torch.cat([gram[k * RANK : (k + 1) * RANK] for k, gram in enumerate(grams)])
    p = whole.up.T @ whole.up
    own = sum((p * gram)[k * RANK : (k + 1) * RANK, k * RANK : (k + 1) * RANK].sum() for k, gram in enumerate(grams))
    by_grams = (p @ router @ g @ router.T).trace() - 2 * (p @ router @ q.T).trace() + own
    assert routed == close((by_grams / own).item(), rel=1e-6)


def test_regmean_of_identical_experts_and_its_limits():
    xs = inputs()
    assert same(one(regmean, [pair(0)] * N, inputs=xs, diagonal=1.0), pair(0).delta(), 1e-8)
    pairs = layer()
    few = [x[:8] for x in xs]
    kept = one(regmean, pairs, inputs=few, ridge=1e9)
    weights = torch.stack([(0.9 * s + 0.1 * s.diagonal().diag()).norm() for s in (x.T @ x for x in few)])
    assert same(kept, (deltas(pairs) * (weights / weights.sum())[:, None, None]).sum(0), 1e-6)
    full = regmean({"l": pairs}, inputs={"l": xs})["l"]
    assert full.rank == N * RANK
    assert torch.equal(full.up, concatenated(pairs).up)  # its columns span what the experts' do
    crossed = one(regmean, pairs, inputs=xs, diagonal=0.0)  # each input channel by itself
    power = torch.stack([x.square().sum(0) for x in xs])
    assert same(crossed, (deltas(pairs) * (power / power.sum(0))[:, None, :]).sum(0))


def test_iteris_begins_as_regmean_and_follows_the_merged_models_inputs():
    pairs, xs = layer(), inputs()
    norms = [p.delta().square().sum() / (x @ p.delta().T).square().sum() for p, x in zip(pairs, xs, strict=True)]
    scaled = [x * w.sqrt() for x, w in zip(xs, norms, strict=True)]
    never = lambda merged: pytest.fail("a single round runs nothing")  # noqa: E731
    first = one(iteris, pairs, inputs=xs, rerun=never, rounds=1, ridge=0.0)
    assert same(first, one(regmean, pairs, inputs=scaled, diagonal=1.0), 1e-7)
    calls = []

    def rerun(merged):
        calls.append(merged["l"].delta())
        return {"l": [x * 2 for x in xs]}

    # Inputs twice as large in the merged model: half the weight gives the same outputs.
    assert same(one(iteris, pairs, inputs=xs, rerun=rerun, rounds=3, ridge=0.0), first / 2, 1e-7)
    assert len(calls) == 2
    assert same(calls[0], first)
    mean_of = one(iteris, pairs, inputs=xs, rerun=never, rounds=1, ridge=1e9)
    shares = torch.stack([w * (x.T @ x).norm() for w, x in zip(norms, xs, strict=True)])
    assert same(mean_of, (deltas(pairs) * (shares / shares.sum())[:, None, None]).sum(0), 1e-6)


def test_iteris_with_few_inputs_holds_on_others_of_the_same_kind():
    """12 rows of 40 channels: without enough of a ridge the fit is all but exact on them, and worse than the mean beyond."""

    def few(rows, seed):
        spread = 1 / torch.arange(1, CIN + 1, dtype=torch.float64)  # [Cin]
        return [(random(rows, CIN, seed=seed + i) + random(1, CIN, seed=900 + i)) * spread for i in range(N)]

    pairs, xs, others = layer(), few(12, 50), few(400, 7000)
    found = iteris({"l": pairs}, inputs={"l": xs}, rerun=lambda merged: {"l": xs})["l"]
    exact = iteris({"l": pairs}, inputs={"l": xs}, rerun=lambda merged: {"l": xs}, ridge=1e-4)["l"]
    lost, by_mean = relative_loss(pairs, others, found), relative_loss(pairs, others, mean({"l": pairs})["l"])
    assert relative_loss(pairs, xs, exact) < 0.2
    assert lost < 0.9 * by_mean < by_mean < relative_loss(pairs, others, exact)


def test_best_scalars_equal_brute_force():
    pairs, xs = layer(1.0, 0.5, 2.0), inputs()
    folded = [p.folded() for p in pairs]
    columns = torch.stack([torch.cat([(x @ p.delta().T).flatten() for x in xs]) for p in pairs], 1)
    wanted = torch.cat([(x @ p.delta().T).flatten() for x, p in zip(xs, pairs, strict=True)])
    brute = torch.linalg.lstsq(columns, wanted[:, None]).solution[:, 0]
    assert same(best_scalars(folded, xs, 0.0), brute, 1e-8)
    assert same(best_scalars(folded, xs, 1e12), torch.ones(N, dtype=torch.float64), 1e-6)
    assert same(one(scalars, pairs, inputs=xs), (deltas(pairs) * brute[:, None, None]).sum(0), 1e-8)


@pytest.mark.parametrize("method", [lego, ssr, regmean, scalars])
def test_a_layer_of_one_expert_passes_through(method):
    alone = [None, pair(0, scale=0.3), None]
    options = {} if method is lego else {"inputs": [None, inputs()[0], None]}
    assert same(one(method, alone, **options), pair(0, scale=0.3).delta())


@pytest.mark.parametrize("method", [total, mean, ties, knots, lego])
def test_scale_counts_once(method):
    """A scale in the file and the same factor inside up are one LoRA."""
    outside = [Pair(p.down, p.up, 0.25) for p in layer()]
    inside = [Pair(p.down / 2, p.up / 2) for p in layer()]  # halves alike, as LoRA-LEGO divides a scale
    assert same(one(method, outside), one(method, inside))
