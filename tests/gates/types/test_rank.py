"""SMoRA's own properties."""

import pytest
import torch
from tiers import thorough

import mole_diffusers as mole
from mole_diffusers.gates import Context, Layer
from mole_diffusers.gates.types.rank import RankGate, grouped, shared_out, singular
from mole_diffusers.lora import LoraWeights
from mole_diffusers.lora.stacking import Stack

RANKS, CIN, COUT = (2, 3, 0, 1), 6, 5
SEGMENT = torch.repeat_interleave(torch.arange(4), torch.tensor(RANKS))
MASK, NOW = torch.tensor([True, True, False, True]), torch.zeros(1)


def layer(seed=0):
    """Two rows of four tokens, and the layer's experts side by side."""
    generator = torch.Generator().manual_seed(seed)
    x, down, up = (torch.randn(s, generator=generator) for s in ((2, 4, CIN), (sum(RANKS), CIN), (COUT, sum(RANKS))))
    return x, down, up, Context(MASK, NOW, Layer(x @ down.T, up, SEGMENT))


def gate(ranks=RANKS, *, learned=True, **options):
    made = RankGate(CIN, ranks, **{"top": 3, "partition": 1, "rate": 0.1} | options)
    if learned:
        torch.nn.init.normal_(made.weight, generator=torch.Generator().manual_seed(1))
    return made


def applied(gates, x, down, up):
    return (gates * (x @ down.T)) @ up.T


def test_unlearned_with_all_ranks_it_is_the_sum():
    x, down, up, context = layer()
    gates = gate(learned=False, top=0)(x, context)
    torch.testing.assert_close(applied(gates, x, down, up), x @ down.T @ up.T)


def test_exactly_k_ranks_weigh_and_they_sum_to_k():
    x, _, _, context = layer()
    gates = gate()(x, context)
    assert gates.count_nonzero(-1).eq(3).all()
    torch.testing.assert_close(gates.sum(-1), torch.full((2, 4), 3.0))
    few = gate(top=5)(x, Context(torch.tensor([[True, False, False, False], [False] * 4]), NOW, context.layer))
    torch.testing.assert_close(few.sum(-1), torch.tensor([[2.0] * 4, [0.0] * 4]))


def test_where_the_router_prefers_one_experts_ranks_alike_that_expert_is_alone():
    x, down, up, context = layer()
    x[..., 0] = 1
    router = gate(learned=False)
    with torch.no_grad():
        router.weight[2:5, 0] = 4.0
    mine = [2, 3, 4]
    torch.testing.assert_close(applied(router(x, context), x, down, up), x @ down[mine].T @ up[:, mine].T)


def test_by_hand_and_the_bias_enters_the_value():
    router = RankGate(1, (2, 1), top=2, partition=1, rate=0.0)
    with torch.no_grad():
        router.balance.copy_(torch.tensor([0.1, -0.2, 0.3]))  # z = .6, .3, .8
    known = Layer(torch.zeros(1, 1, 3), torch.zeros(1, 3), torch.tensor([0, 0, 1]))
    gates = router(torch.zeros(1, 1, 1), Context(torch.tensor([True, True]), NOW, known))
    torch.testing.assert_close(gates, torch.tensor([[[1.2 / 1.4, 0.0, 1.6 / 1.4]]]))


def test_a_masked_dense_product_is_the_gathered_one():
    x, down, up, context = layer()
    gates = gate()(x, context)
    dense, token = applied(gates, x, down, up), (1, 2)
    index = gates[token].topk(3).indices
    gathered = up[:, index] @ (gates[token][index] * (down[index] @ x[token]))
    torch.testing.assert_close(dense[token], gathered)


def test_permuting_ranks_changes_nothing():
    x, down, up, context = layer()
    router, order = gate(), torch.tensor([1, 0, 4, 2, 3, 5])  # within each expert
    turned = gate()
    with torch.no_grad():
        turned.weight.copy_(router.weight[order])
    torch.testing.assert_close(
        applied(turned(x, context), x, down[order], up[:, order]), applied(router(x, context), x, down, up)
    )


def test_partition_over_whole_experts_is_a_top_k_mixture_of_loras():
    generator = torch.Generator().manual_seed(3)
    x, rank, count, k = torch.randn(2, 4, CIN, generator=generator), 2, 3, 2
    down, up = torch.randn(count, rank, CIN, generator=generator), torch.randn(count, COUT, rank, generator=generator)
    router = gate((rank,) * count, top=k * rank, partition=rank)
    expert_index = torch.arange(count).repeat_interleave(rank)
    known = Layer(x @ down.flatten(0, 1).T, up, expert_index)
    ours = router(x, Context(torch.ones(count, dtype=torch.bool), NOW, known))
    assert torch.equal(
        ours, gate((rank,) * count, top=k * rank, partition=0)(x, Context(MASK[:1].expand(count), NOW, known))
    )
    scores = torch.sigmoid(x @ router.weight.T)
    for b in range(2):
        for t in range(4):
            best = sorted(range(count), key=lambda i: -scores[b, t, i].item())[:k]
            mean = sum(scores[b, t, i] for i in best) / k
            expected = sum(scores[b, t, i] / mean * up[i] @ (down[i] @ x[b, t]) for i in best)
            mixed = (ours[b, t] * known.low[b, t]) @ up.transpose(1, 2).reshape(-1, COUT)
            torch.testing.assert_close(mixed, expected)


def test_groups_never_cross_experts():
    assert grouped((3, 2, 0, 4), 2).tolist() == [0, 0, 1, 2, 2, 3, 3, 4, 4]
    assert grouped((3, 2, 0, 4), 0).tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]


def test_the_bias_falls_where_ranks_are_overused_and_has_no_gradient():
    x, _, _, context = layer()
    x = x.abs()
    router = gate(learned=False, top=2)
    with torch.no_grad():
        router.weight[:2] = 1.0  # the first expert's two ranks win every token
    router(x, context).square().sum().backward()
    router.rebalance()
    torch.testing.assert_close(router.balance, 0.1 * (torch.tensor([-1.0, -1, 1, 1, 1, 1]) - 1 / 3))
    assert router.balance.grad is None
    before = router.balance.clone()
    with torch.no_grad():
        router(x, context)
    router.rebalance()  # nothing was counted
    assert torch.equal(router.balance, before)
    masked = Context(torch.tensor([True, False, False, True]), NOW, context.layer)
    router(x, masked)  # the second expert could not have been chosen
    router.rebalance()
    torch.testing.assert_close(router.balance - before, 0.1 * (torch.tensor([-2.0, -2, 0, 0, 0, 4]) / 3))


@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_gates_stay_between_0_and_k_however_fast_the_bias_moves(rate):
    torch.manual_seed(0)
    x, router = torch.randn(100, 2, 8, CIN), gate(top=5, rate=rate)
    known = Layer(torch.zeros(2, 8, 6), torch.zeros(COUT, 6), SEGMENT)
    for batch in x:
        gates = router(batch, Context(torch.tensor([True] * 4), NOW, known))
        assert gates.min() >= 0
        torch.testing.assert_close(gates.sum(-1), torch.full((2, 8), 5.0))
        router.rebalance()
    assert router.balance.mean().item() == pytest.approx(0, abs=1e-5)
    alone = Context(torch.tensor([True, False, False, False]), NOW, known)
    router.balance[:2] = -2.0  # of the one that is left
    torch.testing.assert_close(router(x[0], alone)[..., :2], torch.ones(2, 8, 2))


@pytest.mark.parametrize("shape", [(), (3, 3)])
def test_singular_ranks_are_the_same_lora_in_order(shape):
    generator = torch.Generator().manual_seed(0)
    down, up = (
        torch.randn(6, CIN, *shape, generator=generator),
        torch.randn(COUT, 6, *(1 for _ in shape), generator=generator),
    )
    halves = zip(down.split(RANKS), up.split(RANKS, 1), strict=True)
    stack = Stack(tuple(LoraWeights(d, u, 1.0) if len(d) else None for d, u in halves), tuple(down.shape[1:]), len(up))
    turned = singular(stack)
    for i, rank in enumerate(RANKS):
        mine = torch.tensor(i) == SEGMENT
        before = up.flatten(1)[:, mine] @ down.flatten(1)[mine]
        after = turned.up.flatten(1)[:, mine] @ turned.down.flatten(1)[mine]
        torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
        sizes = turned.down[mine].flatten(1).norm(dim=1) * turned.up[:, mine].flatten(1).norm(dim=0)
        assert torch.equal(sizes, sizes.sort(descending=True).values)
        inner = turned.up.flatten(1)[:, mine].T @ turned.up.flatten(1)[:, mine]
        torch.testing.assert_close(inner, torch.diag(inner.diagonal()), atol=1e-4, rtol=0)
        assert len(sizes) == rank


def test_one_of_two_identical_experts_at_half_strength_each(pipe, loras, draw):
    mole.attach(pipe, {"a": loras["ink"]})
    one = draw(pipe)
    mole.attach(pipe, {"a": (loras["ink"], 0.5), "b": (loras["ink"], 0.5)}, "rank")
    torch.testing.assert_close(draw(pipe), one, atol=1e-5, rtol=0)
    mole.attach(pipe, {"a": loras["ink"]}, mole.GateConfig("rank", top=1))
    assert not torch.allclose(draw(pipe), one, atol=1e-3)


@pytest.mark.parametrize("refactor", [True, *thorough(False)])
def test_gates_that_stand_still_fold_rank_by_rank(pipe, loras, draw, refactor):
    mixture = mole.attach(pipe, {n: loras[n] for n in ("fox", "hat")}, mole.GateConfig("rank", top=5, refactor=refactor))
    generator = torch.Generator().manual_seed(0)
    for bank in mixture.banks.values():
        for router in bank.gates.values():
            router.balance.copy_(torch.rand(router.balance.shape, generator=generator))
    live = draw(pipe)
    with mixture.trace() as trace:
        draw(pipe)
    assert trace.weights(trace.locations[0]).shape[-1] == 2
    with mixture.collapsed("a", num_inference_steps=1):
        torch.testing.assert_close(draw(pipe), live, atol=1e-4, rtol=0)


def test_training_moves_router_and_bias(pipe, loras):
    from mole_diffusers.training import GateTraining, TrainingData, train_gates

    mixture = mole.attach(pipe, {n: loras[n] for n in ("fox", "ink")}, mole.GateConfig("rank", top=2, rate=0.01))
    config = GateTraining({"base": {"weight": 1.0, "seeds": 1, "steps": 1}}, steps=2, batch=2)
    train_gates(pipe, mixture, TrainingData(plain=["a b"]), config=config)
    router = mixture.banks["unet"]["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
    assert router.weight.detach().any()
    assert router.balance.abs().max().item() == pytest.approx(0.02, abs=0.011)


def test_scores_that_no_rank_may_take_weigh_nothing():
    assert shared_out(torch.rand(2, 3), torch.zeros(3, dtype=torch.bool), 2).eq(0).all()
