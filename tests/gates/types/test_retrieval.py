"""RAMoLE's own properties."""

import pytest
import torch
from tiny import tiny_pipeline

import mole_diffusers as mole
from mole_diffusers.gates import Context, Layer, transforms
from mole_diffusers.gates.types.retrieval import RetrievalGate, answers
from mole_diffusers.training import GateTraining, TrainingData, train_gates
from mole_diffusers.training.gate_trainer import drop_experts

RANKS, CIN, COUT, ROUTER = (2, 3, 1), 6, 5, 4
MASK, NOW = torch.tensor([True, True, True]), torch.zeros(1)
SEGMENT = torch.repeat_interleave(torch.arange(3), torch.tensor(RANKS))


def experts(seed=0):
    """Two rows of four tokens, and the layer's experts side by side."""
    generator = torch.Generator().manual_seed(seed)
    x, down, up = (torch.randn(s, generator=generator) for s in ((2, 4, CIN), (sum(RANKS), CIN), (COUT, sum(RANKS))))
    return x, Layer(x @ down.T, up, SEGMENT)


def gate(**options):
    made = RetrievalGate(CIN, COUT, **{"rank": ROUTER, "total": "1", "scores": "token"} | options)
    torch.nn.init.normal_(made.up, generator=torch.Generator().manual_seed(1))
    return made


def test_three_forms_of_the_score_agree():
    (x, layer), router = experts(), gate()
    query = x @ router.down.T
    cheap = answers(query, layer, router.up, 3)
    outputs = [layer.low[..., i == SEGMENT] @ layer.up[:, i == SEGMENT].T for i in range(3)]  # v_i, [B, T, Cout]
    direct = torch.stack([(v * (query @ router.up.T)).sum(-1) for v in outputs], -1)  # <v_i, u>
    keys = torch.stack([(query * (v @ router.up)).sum(-1) for v in outputs], -1)  # <q, k_i>, k_i = B'^T v_i
    torch.testing.assert_close(cheap, direct, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(cheap, keys, atol=1e-5, rtol=1e-4)
    weights = router(x, Context(MASK, NOW, layer))
    torch.testing.assert_close(weights, (direct / ROUTER**0.5).softmax(-1))


def test_masks_are_exact_and_by_row():
    x, layer = experts()
    mask = torch.tensor([[True, False, True], [False, True, False]])
    weights = gate()(x, Context(mask, NOW, layer))
    assert weights[0, :, 1].eq(0).all()
    assert torch.equal(weights[1], torch.tensor([0.0, 1.0, 0.0]).expand(4, 3))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4))


def test_one_set_of_weights_for_the_image():
    x, layer = experts()
    router = gate(scores="image")
    scores = answers(x @ router.down.T, layer, router.up, 3).mean(1) / ROUTER**0.5
    torch.testing.assert_close(router(x, Context(MASK, NOW, layer)), scores.softmax(-1))


def test_unlearned_it_is_uniform_and_its_random_control_is_not():
    x, layer = experts()
    fresh = RetrievalGate(CIN, COUT, rank=ROUTER, total="1", scores="token")
    even = fresh(x, Context(MASK, NOW, layer))
    torch.testing.assert_close(even, torch.full((2, 4, 3), 1 / 3))
    assert (transforms.frozen_random(0)("unet.to_q", even, MASK) - even).abs().max() > 0.1


def test_gates_serve_experts_they_never_saw(pipe, loras, draw, awake, tmp_path):
    mixture = awake(mole.attach(pipe, loras, mole.GateConfig("retrieval", rank=2)), size=0.3)
    mixture.save_pretrained(tmp_path)
    keys = list(mixture.banks["unet"].state_dict())
    renamed = {name.upper(): path for name, path in reversed(loras.items())}
    image, again = draw(pipe), mole.attach(pipe, renamed, tmp_path)
    assert list(again.experts) == list(renamed)
    assert list(again.banks["unet"].state_dict()) == keys
    torch.testing.assert_close(draw(pipe), image, atol=1e-5, rtol=0)  # permuting experts does not change the picture
    fewer = mole.attach(pipe, {"a": loras["fox"], "b": loras["fox"]}, tmp_path)  # layers of ink and hat alone are left out
    assert 0 < len(fewer.banks["unet"].state_dict()) < len(keys)
    fewer.save_pretrained(tmp_path / "fewer")
    with pytest.warns(UserWarning, match="lack 'text_encoder.gates.*fc1.* weigh alike there"):
        more = mole.attach(tiny_pipeline(), loras, tmp_path / "fewer").banks["unet"].state_dict()
    trained = fewer.banks["unet"].state_dict()
    assert all(torch.equal(more[key], trained[key]) for key in trained)
    assert all(more[key].count_nonzero() == 0 for key in set(more) - set(trained) if key.endswith(".up"))


def test_attaching_leaves_the_global_generator_alone(pipe, loras):
    before = torch.random.get_rng_state()
    mole.attach(pipe, loras, "retrieval")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_expert_dropout_never_leaves_none():
    generator, names = torch.Generator().manual_seed(0), ["a", "b", "c"]
    draws = [drop_experts(names, 0.9, generator) for _ in range(300)]
    assert {len(d) for d in draws} == {1, 2, 3}
    half = [drop_experts(names, 0.5, generator) for _ in range(600)]
    # each stays with chance 1/2, or as the one that always does: 1/2 + 1/8 * 1/3
    assert sum("b" in d for d in half) / 600 == pytest.approx(0.5 + 1 / 24, abs=0.06)
    assert drop_experts(names, 0, generator) == names


@pytest.mark.thorough
def test_experts_that_sit_out_weigh_nothing_in_that_update(pipe, loras):
    mixture = mole.attach(pipe, loras, "retrieval")
    seen = []
    with mixture.parts.listen(lambda d: seen.append(d.gates) if d.gates.requires_grad else None):
        config = GateTraining({"base": {"weight": 1.0, "seeds": 1, "steps": 1}}, steps=6, batch=2, drop=0.6)
        train_gates(pipe, mixture, TrainingData(plain=["a b"]), config=config)
    active = {tuple((g.detach() != 0).flatten(0, -2).any(0).tolist()) for g in seen if g.count_nonzero()}
    assert len(active) > 1
    with pytest.raises(ValueError, match="drop must be 0 or more and less than 1, got 1"):
        GateTraining(drop=1)
