"""Teachers, their stored trajectories, and the cross-attention that masks them."""

import pytest
import torch
from tiers import thorough

import mole_diffusers as mole
from mole_diffusers.binding import Bound
from mole_diffusers.training import RandomBatch, TrainingContext, TrainingData
from mole_diffusers.training.config import DistillationTerm
from mole_diffusers.training.denoising import predict
from mole_diffusers.training.distillation import (
    alone,
    attention_maps,
    base,
    composed_teacher,
    sample_trajectories,
    single,
    sum_teacher,
    trigger_tokens,
    with_and_without,
)
from mole_diffusers.training.losses import composed_target, recovery_error, territory


def test_attention_maps_equal_the_hosts_own_attention(pipe):
    """Two routes: read from the projections, and computed by diffusers' own get_attention_scores."""
    x, t, prompts = torch.randn(2, 4, 16, 16), torch.tensor([5, 800]), ["a fox", "an ink"]
    positions = torch.zeros(1, 2, 16)
    positions[..., 3] = 1
    attention = next(
        m for n, m in pipe.unet.named_modules() if n.endswith("mid_block.attentions.0.transformer_blocks.0.attn2")
    )
    scores = []

    def keep(_, args, kwargs):
        q, k = attention.to_q(args[0]), attention.to_k(kwargs["encoder_hidden_states"])
        q, k = attention.head_to_batch_dim(q), attention.head_to_batch_dim(k)
        scores.append(attention.get_attention_scores(q, k).unflatten(0, (2, -1)).mean(1)[..., 3])

    with attention_maps(pipe.unet, (8, 8), positions) as seen:
        handle = attention.register_forward_pre_hook(keep, with_kwargs=True)
        predict(pipe, x, t, prompts)
        handle.remove()
    assert len(seen) == 4 + 1  # the mid block's projections ran once more for the check
    ours = [m for m in seen if torch.allclose(m[0].flatten(1), scores[0], atol=1e-5)]
    assert len(ours) == 2
    assert not any(m._forward_hooks for m in pipe.unet.modules())


def test_attention_maps_of_odd_sides_keep_rows_and_columns(pipe):
    """Half of 20 x 9 latents is 10 x 5, and not of their shape."""
    with attention_maps(pipe.unet, (20, 9), torch.ones(1, 2, 16)) as seen:
        predict(pipe, torch.randn(2, 4, 20, 9), torch.tensor([5, 800]), ["a fox", "an ink"])
    assert [each.shape for each in seen] == [(1, 2, 20, 9)] * 4


def test_trigger_tokens_are_found_or_missed_by_name(pipe, loras):
    mixture = mole.attach(pipe, {"fox": loras["fox"]})
    found = trigger_tokens(pipe, mixture, "fox", ["a fox", ""])
    assert found[0].nonzero().flatten().tolist() == [2, 3, 4]  # start, a, f o x
    assert found[1].all()
    written_otherwise = trigger_tokens(pipe, mixture, "fox", ["two Foxes", "a fox box"])
    assert [row.nonzero().flatten().tolist() for row in written_otherwise] == [[4, 5, 6, 7, 8], [2, 3, 4]]
    with pytest.raises(ValueError, match=r"lacks every trigger of expert 'fox': \['fox'\]"):
        trigger_tokens(pipe, mixture, "fox", ["a cat"])


def test_teachers_are_the_single_loras_and_their_sum(pipe, loras):
    mixture = mole.attach(pipe, {n: loras[n] for n in ("fox", "ink")}, "mole")
    x, t, prompts = torch.randn(2, 4, 16, 16), torch.tensor([5, 800]), ["", "a fox in ink"]
    with torch.no_grad():
        fox, base = sum_teacher(pipe, mixture, ["fox"], unit=[])(x, t, prompts)
        ink, _ = sum_teacher(pipe, mixture, ["ink"], unit=[])(x, t, prompts)
        both, _ = composed_teacher(pipe, mixture, ["ink"])(x, t, prompts)
        torch.testing.assert_close(both, fox + ink - base, atol=1e-5, rtol=0)
        masked, _ = composed_teacher(pipe, mixture, [])(x, t, prompts)
        assert not torch.allclose(masked, both, atol=1e-3)
        mole.detach(pipe)
        torch.testing.assert_close(predict(pipe, x, t, prompts), base)
        mole.attach(pipe, {"fox": loras["fox"]})
        torch.testing.assert_close(predict(pipe, x, t, prompts), fox, atol=1e-6, rtol=0)


def test_without_its_prompt_a_row_is_shared_as_with_it(pipe, loras):
    """Two routes: the teacher, and the blend put together from what each expert attends to with the prompt."""
    mixture = mole.attach(pipe, {n: loras[n] for n in ("fox", "ink")}, "mole")
    inputs = with_and_without(torch.randn(1, 4, 16, 16), torch.tensor([800]), ["a fox in ink"])
    predictions, maps = [], []
    with torch.no_grad():
        found, base = composed_teacher(pipe, mixture, [])(*inputs)
        for name in ("fox", "ink"):
            with alone(mixture, {name: 1.0}):
                predictions.append(predict(pipe, *inputs))
                words = trigger_tokens(pipe, mixture, name, ["a fox in ink"])[None]
                with attention_maps(pipe.unet, (16, 16), words) as layers:
                    predict(pipe, *(each[1:] for each in inputs))
            maps.append(torch.stack(layers).mean(0)[0])
    mine = torch.cat([territory(torch.stack(maps))] * 2, 1)
    expected = composed_target(base, torch.stack(predictions), mine, torch.ones(2))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def joined(rows):
    """What a model is given for rows, and what it should predict there."""
    x, timesteps, targets, norms = (torch.stack(each) for each in list(zip(*rows, strict=True))[:4])
    inputs = with_and_without(x, timesteps, [row.prompt for row in rows])
    return inputs, *(each.transpose(0, 1).flatten(0, 1) for each in (targets, norms))


def test_stored_targets_are_what_the_teacher_predicts(pipe, loras):
    mixture = mole.attach(pipe, {"fox": loras["fox"]}, "mole")
    teach = sum_teacher(pipe, mixture, ["fox"], unit=[])
    context, term = TrainingContext(pipe, mixture, TrainingData()), DistillationTerm(seeds=2, steps=3)
    stored = sample_trajectories(context, teach, ["a fox"], term, seed=0, name="fox")
    assert len(stored) == 3 * 2
    inputs, targets, norms = joined(stored[2:4])  # of the second step
    with torch.no_grad():
        live, base = teach(*inputs)
    torch.testing.assert_close(live, targets, atol=1e-5, rtol=1e-4)
    changes = (live - base).square().unflatten(0, (2, 2)).flatten(1).mean(1)
    torch.testing.assert_close(norms, changes.repeat_interleave(2), atol=0, rtol=1e-4)


def test_one_expert_is_perfect_and_none_is_one(pipe, loras):
    """L1 of an ungated single expert is 0, and 1 where the expert weighs nothing."""
    mixture = mole.attach(pipe, {"fox": loras["fox"]}, "mole")
    term = DistillationTerm(seeds=2, steps=2, guidance=2.0)
    context, teach = TrainingContext(pipe, mixture, TrainingData()), sum_teacher(pipe, mixture, ["fox"], unit=[])
    stored = sample_trajectories(context, teach, ["a fox"], term, seed=0, name="fox")
    inputs, targets, norms = joined(stored)
    with torch.no_grad():
        assert recovery_error(predict(pipe, *inputs), targets, norms).item() == pytest.approx(0, abs=1e-6)
        with mixture.fixed({}):
            assert recovery_error(predict(pipe, *inputs), targets, norms).item() == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize(
    "binding",
    [
        *thorough({n: Bound((n,), required=True) for n in ("fox", "ink")}),
        {n: Bound((n,), side, required=True) for n, side in (("fox", "left"), ("ink", "right"))},
    ],
)
def test_bound_experts_can_reach_their_teachers(pipe, loras, binding):
    """At weights of 1 an expert on its own words errs by nothing, with a prompt and without; unbound teachers would leave
    half of all error in the rows without."""
    mixture = mole.attach(pipe, {n: loras[n] for n in ("fox", "ink")}, binding=binding)
    data = TrainingData({"fox": ["a fox"], "ink": ["an ink"]}, plain=["a cat"])
    context, term = TrainingContext(pipe, mixture, data), DistillationTerm(seeds=1, steps=2)
    before = mixture.binding
    for objective in (single, base):
        loss = objective(context, term)
        with torch.no_grad():
            assert loss(RandomBatch(torch.Generator().manual_seed(0), 4)).item() < 1e-4
    assert mixture.binding == before


def test_a_bound_expert_that_is_missing_errs_by_one(pipe, loras):
    mixture = mole.attach(pipe, {"fox": loras["fox"]}, binding={"fox": "fox"})
    loss = single(TrainingContext(pipe, mixture, TrainingData({"fox": ["a fox"]})), DistillationTerm(seeds=1, steps=1))
    with torch.no_grad(), mixture.only():
        assert loss(RandomBatch(torch.Generator().manual_seed(0), 4)).item() == pytest.approx(1, rel=1e-4)


@pytest.mark.thorough
def test_prompts_are_drawn_at_sizes_of_their_own_and_met_as_often_as_they_have_rows(pipe, loras):
    """L1 of an expert alone is 0 and of none it is 1, whatever the size of the pictures."""
    mixture = mole.attach(pipe, {"fox": loras["fox"]})
    data = TrainingData({"fox": ["a fox", "a fox and a cat"]}, sizes={"a fox and a cat": (64, 32)})
    loss = single(TrainingContext(pipe, mixture, data), DistillationTerm(seeds=2, steps=2))
    shapes = []
    pipe.unet.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[2:])))
    with torch.no_grad():
        found = [loss(RandomBatch(torch.Generator().manual_seed(i), 4)).item() for i in range(40)]
        with mixture.fixed({}):
            none = [loss(RandomBatch(torch.Generator().manual_seed(i), 64)).item() for i in range(6)]
    assert max(found) < 1e-6
    assert set(shapes) == {(16, 16), (16, 32)}  # height and width in latents
    assert 10 < shapes[:40].count((16, 32)) < 30
    assert sum(none) / 6 == pytest.approx(1, rel=0.2)
