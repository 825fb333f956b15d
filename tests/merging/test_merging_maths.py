"""Merges on toys in float64: each by a property that only the right algorithm has."""

import math

import pytest
import torch

from mole_diffusers.merging.factors import Pair, concatenated
from mole_diffusers.merging.lego import assembled, kmeans, lego
from mole_diffusers.merging.linear import directions, mean, null_space, total
from mole_diffusers.merging.regression import best_scalars, iteris, least_squares, regmean, relative_loss, scalars, ssr
from mole_diffusers.merging.sparse import dare, knots, ties

CIN, COUT, RANK, N = 40, 30, 4, 3
close = pytest.approx


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


# ---- linear


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


# ---- sparse


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


# ---- LoRA-LEGO


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


# ---- regression


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
