"""What every gate type keeps, on a tiny real Stable Diffusion whose experts differ in rank and layers."""

from functools import partial

import pytest
import torch
from gate_types import INPUT_FREE, LEARNED, gate_types, size
from tiny import tiny_pipeline

import mole_diffusers as mole
from mole_diffusers.gates import GATE_TYPES, transforms
from mole_diffusers.training.denoising import predict

PLAIN = {name: mole.GateConfig(name) for name in LEARNED}
SUM = [name for name in LEARNED if GATE_TYPES[name].untrained == "the plain sum"]  # before training
SHARE = {  # one expert weighs 1 whatever was learned, and two identical ones together
    "flow": mole.GateConfig("flow", start="mean"),
    "outputs": PLAIN["outputs"],
    **{name: mole.GateConfig(name, total="1") for name in LEARNED if "total" in PLAIN[name].to_dict()},
}


each = pytest.mark.parametrize("gate_type", PLAIN)
summing = pytest.mark.parametrize("gate_type", SUM)
some = pytest.mark.parametrize("gate_type", gate_types("flow", "rank"))
rows = pytest.mark.parametrize("gate_type", gate_types("rank", among=[name for name in PLAIN if name not in INPUT_FREE]))
sharing = pytest.mark.parametrize("gate_type", gate_types("flow", among=SHARE))


@summing
def test_starts_at_the_plain_sum_and_then_matters(pipe, loras, draw, awake, gate_type):
    draw = partial(draw, num_inference_steps=1)
    mole.attach(pipe, loras, "sum")
    plain = draw(pipe)
    mixture = mole.attach(pipe, loras, PLAIN[gate_type])
    torch.testing.assert_close(draw(pipe), plain, atol=1e-5, rtol=0)
    awake(mixture, size=size(gate_type))
    assert not torch.allclose(draw(pipe), plain, atol=1e-3)


@sharing
def test_one_expert_equals_that_lora_and_detach_is_bit_exact(pipe, loras, draw, awake, gate_type):
    base = draw(pipe)
    awake(mole.attach(pipe, {"hat": loras["hat"]}, PLAIN[gate_type]), size=size(gate_type))
    ours = draw(pipe)
    mole.detach(pipe)
    assert torch.equal(draw(pipe), base)
    pipe.load_lora_weights(loras["hat"])
    torch.testing.assert_close(ours, draw(pipe), atol=1e-5, rtol=0)


@sharing
def test_two_identical_experts_equal_one(pipe, loras, draw, awake, gate_type):
    mole.attach(pipe, {"a": loras["ink"]})
    one = draw(pipe)
    awake(mole.attach(pipe, {"a": loras["ink"], "b": loras["ink"]}, SHARE[gate_type]), size=size(gate_type))
    torch.testing.assert_close(draw(pipe), one, atol=1e-5, rtol=0)


@some
def test_masks_strengths_sets_per_row_and_weights_by_hand(pipe, loras, draw, awake, gate_type):
    draw = partial(draw, num_inference_steps=1)
    mixture = awake(mole.attach(pipe, loras, PLAIN[gate_type]), size=size(gate_type))
    gated = draw(pipe)
    with mixture.only("fox", "ink"):
        masked = draw(pipe)
    assert not torch.allclose(masked, gated, atol=1e-3)
    with mixture.rows([{"fox": 1.0, "ink": 1.0}]):
        torch.testing.assert_close(draw(pipe), masked, atol=1e-5, rtol=0)
    with mixture.only("hat"):
        alone = draw(pipe)
    mixture.strength("hat", 0)
    assert torch.equal(draw(pipe), masked)
    with mixture.fixed({"fox": 0.5, "ink": 2.0}):
        by_hand = draw(pipe)
    mole.attach(pipe, {"fox": (loras["fox"], 0.5), "ink": (loras["ink"], 2.0)}, "sum")
    torch.testing.assert_close(by_hand, draw(pipe), atol=1e-5, rtol=0)
    if gate_type in SHARE:
        mole.attach(pipe, {"hat": loras["hat"]})
        torch.testing.assert_close(alone, draw(pipe), atol=1e-5, rtol=0)


@rows
def test_guidance_rows_batches_and_resolutions(pipe, loras, draw, awake, gate_type):
    mixture = awake(mole.attach(pipe, loras, PLAIN[gate_type]), size=size(gate_type))

    def images(prompts, seeds):
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        return torch.from_numpy(pipe(prompts, generator=generators, num_inference_steps=2, output_type="np").images)

    both = images(["a fox", "ink"], [1, 2])
    torch.testing.assert_close(both[1:], images(["ink"], [2]), atol=1e-4, rtol=0)
    with mixture.trace() as trace:
        assert draw(pipe, height=48, width=32).shape == (1, 48, 32, 3)
    rows = next(w for place, _, w in trace.records if place.startswith("unet.mid") and w.count_nonzero(-1).max() > 1)
    assert rows.shape[0] == 2
    assert not torch.allclose(rows[0], rows[1], atol=1e-5)
    assert trace.entropy() >= 0
    assert set(trace.mean()) == set(loras)


@some
def test_save_load_same_image(pipe, loras, draw, awake, tmp_path, gate_type):
    awake(mole.attach(pipe, loras, PLAIN[gate_type]), size=size(gate_type)).save_pretrained(tmp_path)
    image, fresh = draw(pipe), tiny_pipeline()
    loaded = mole.attach(fresh, dict(reversed(loras.items())), tmp_path)
    assert loaded.config == PLAIN[gate_type]
    torch.testing.assert_close(draw(fresh), image, atol=1e-5, rtol=0)


@each
def test_only_gates_get_gradients_and_each_does(pipe, loras, awake, gate_type):
    mixture = awake(mole.attach(pipe, {n: loras[n] for n in ("fox", "hat")}, PLAIN[gate_type]), size=size(gate_type))
    gates = {id(p) for p in mixture.parameters()}
    for model in (pipe.unet, pipe.text_encoder):
        model.requires_grad_(False)
    for parameter in mixture.parameters():
        parameter.requires_grad_(True)
    predict(pipe, torch.randn(2, 4, 16, 16), torch.tensor([10, 900]), ["a fox", ""]).square().mean().backward()
    in_blocks = {n: p for bank in mixture.banks.values() for n, p in bank.named_parameters() if "attn" in n}
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in in_blocks.values())
    others = [p for model in (pipe.unet, pipe.text_encoder) for p in model.parameters() if id(p) not in gates]
    assert all(p.grad is None for p in others)


@rows
def test_in_a_half_precision_host_gates_weigh_in_fp32(pipe, loras, awake, gate_type):
    mixture = awake(mole.attach(pipe, loras, PLAIN[gate_type]), size=size(gate_type))
    pipe.to(dtype=torch.bfloat16)
    seen = []
    for gate in (gate for bank in mixture.banks.values() for gate in bank):
        gate.register_forward_hook(lambda _, __, weights: seen.append(weights.dtype))
    picture = pipe("a fox", num_inference_steps=1, output_type="np").images
    assert torch.from_numpy(picture).isfinite().all()
    assert set(seen) == {torch.float32}
    assert {p.dtype for p in mixture.parameters()} == {torch.float32}


@pytest.mark.parametrize("gate_type", gate_types("rank", among=[name for name in SUM if name not in INPUT_FREE]))
def test_uniform_control_is_the_plain_sum_and_the_others_differ(pipe, loras, draw, awake, gate_type):
    mole.attach(pipe, loras, "sum")
    plain = draw(pipe)
    mixture = awake(mole.attach(pipe, loras, PLAIN[gate_type]), size=size(gate_type))
    with mixture.adjusted(transforms.uniform):
        torch.testing.assert_close(draw(pipe), plain, atol=1e-5, rtol=0)
    for control in (transforms.hardened, transforms.frozen_random(0)):
        with mixture.adjusted(control):
            assert not torch.allclose(draw(pipe), plain, atol=1e-3)


@pytest.mark.parametrize("gate_type", gate_types("mole", "rank", among=SUM))
def test_a_family_that_is_not_trained_says_that_it_is_the_plain_sum(pipe, loras, draw, tmp_path, recwarn, gate_type):
    experts = {name: loras[name] for name in ("fox", "ink")}
    mole.attach(pipe, experts, binding=None)
    summed = draw(pipe)
    assert not [each for each in recwarn if "gates weigh" in str(each.message)]
    with pytest.warns(UserWarning, match=f"{gate_type!r} gates weigh as the plain sum until they are trained or loaded"):
        mixture = mole.attach(pipe, experts, gate_type, binding=None)
    assert torch.allclose(draw(pipe), summed, atol=1e-5)
    mixture.save_pretrained(tmp_path)
    recwarn.clear()
    mole.attach(pipe, experts, tmp_path)
    assert not [each for each in recwarn if "gates weigh" in str(each.message)]
