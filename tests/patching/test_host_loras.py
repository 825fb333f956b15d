"""Ordinary LoRAs beside, under and before a mixture on hosts other than Stable Diffusion 1.5."""

import hosts
import pytest
import torch

import mole_diffusers as mole
from mole_diffusers.testing import tiny_lora

CLOSE = {"atol": 1e-4, "rtol": 0}
HELD = {"fox": 0.7, "ink": -0.4}
TRANSFORMERS = ("flux", "sd3")


@pytest.fixture
def ordinary(other, tmp_path):
    """Two LoRAs of the same layers of the denoiser, as an acceleration LoRA is for it alone."""
    return [tiny_lora(other.pipe, tmp_path / f"lcm{seed}", seed=seed, ends=("to_q", "to_v")) for seed in (7, 8)]


def held(other, mixture):
    with mixture.fixed(HELD):
        return hosts.draw(other.pipe, other.options)


def theirs(other, pipe, extra, weight):
    """The other route: diffusers' own adapters at the same weights."""
    for name, file in (other.files | {"lcm": extra}).items():
        pipe.load_lora_weights(file, adapter_name=name)
    pipe.set_adapters([*HELD, "lcm"], [*HELD.values(), weight])
    picture = hosts.draw(pipe, other.options)
    pipe.unload_lora_weights()
    return picture


def test_an_ordinary_lora_is_weighed_swapped_and_deleted_beside_the_mixture(other, ordinary):
    pipe = other.pipe
    second = hosts.quiet(type(pipe).from_pipe(pipe, torch_dtype=torch.float32))
    mixture = other.attach()
    before = held(other, mixture)
    pipe.load_lora_weights(ordinary[0], adapter_name="lcm")
    pipe.set_adapters("lcm", 0.6)
    weighed = held(other, mixture)
    pipe.load_lora_weights(ordinary[1], adapter_name="lcm", hotswap=True)
    second.set_adapters("lcm", 0.3)
    swapped = held(other, mixture)
    pipe.delete_adapters("lcm")
    torch.testing.assert_close(held(other, mixture), before, **CLOSE)
    mole.detach(pipe)
    for ours, file, weight in ((weighed, ordinary[0], 0.6), (swapped, ordinary[1], 0.3)):
        torch.testing.assert_close(ours, theirs(other, pipe, file, weight), **CLOSE)
        assert not torch.allclose(ours, before, atol=1e-3)


def test_the_lora_calls_of_a_pipeline_reach_the_mixture(other):
    pipe, options = other.pipe, other.options
    base = hosts.draw(pipe, options)
    other.attach()
    gated = hosts.draw(pipe, options)
    pipe.disable_lora()
    assert torch.equal(hosts.draw(pipe, options), base)
    pipe.enable_lora()
    with pytest.raises(ValueError, match=r"cannot be fused under a mixture.*fuse them before attach"):
        pipe.fuse_lora()
    assert torch.equal(hosts.draw(pipe, options), gated)
    said = "joint_attention_kwargs" if other.name in TRANSFORMERS else "cross_attention_kwargs"
    torch.testing.assert_close(hosts.draw(pipe, options | {said: {"scale": 0.0}}), base, **CLOSE)
    pipe.unload_lora_weights()
    assert torch.equal(hosts.draw(pipe, options), base)


def test_a_lora_that_is_fused_before_attach(other, ordinary):
    pipe = other.pipe
    pipe.load_lora_weights(ordinary[0], adapter_name="lcm")
    pipe.fuse_lora(lora_scale=0.7)
    with pytest.raises(ValueError, match=r"adapters are fused into .*; call pipe.unfuse_lora\(\) first"):
        other.attach()
    pipe.unload_lora_weights()
    fused = hosts.draw(pipe, other.options)
    mixture = other.attach()
    fresh, _ = hosts.HOSTS[other.name]()
    torch.testing.assert_close(held(other, mixture), theirs(other, fresh, ordinary[0], 0.7), **CLOSE)
    mole.detach(pipe)
    assert torch.equal(hosts.draw(pipe, other.options), fused)


def test_fusing_q_k_and_v_is_refused_on_either_side_of_attach(other):
    pipe, denoiser = other.pipe, hosts.denoiser(other.pipe)
    other.attach()
    picture = hosts.draw(pipe, other.options)
    with pytest.raises(ValueError, match="q, k and v of a pipeline with a mixture cannot be fused"):
        denoiser.fuse_qkv_projections()
    mole.detach(pipe)
    denoiser.fuse_qkv_projections()
    with pytest.raises(ValueError, match="q, k and v are fused, which LoRAs cannot reach"):
        other.attach()
    denoiser.unfuse_qkv_projections()
    other.attach()
    torch.testing.assert_close(hosts.draw(pipe, other.options), picture, **CLOSE)
