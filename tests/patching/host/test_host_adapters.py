"""Ordinary LoRAs beside a mixture, loaded before it or after: all of them act, and all of them go."""

import diffusers
import hosts
import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from hosts import assert_same, snapshot
from tiny import ATTENTION, tiny_lora, tiny_pipeline

import mole_diffusers as mole

CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="module")
def lcm(tmp_path_factory):
    """An acceleration LoRA, which like the published ones is for the UNet alone, and another of the same layers."""
    folder = tmp_path_factory.mktemp("lcm")
    host = tiny_pipeline()
    host.register_modules(text_encoder=None)
    return [tiny_lora(host, folder / f"lcm{seed}.safetensors", seed=seed, ends=ATTENTION) for seed in (7, 8)]


def theirs(files, weights, pipe=None):
    """The other route: diffusers' own adapters, loaded and weighed by diffusers."""
    pipe = pipe or tiny_pipeline()
    for name, file in files.items():
        pipe.load_lora_weights(file, adapter_name=name)
    pipe.set_adapters(list(files), list(weights))
    return pipe


def accelerated(pipe):
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    return pipe


# ---- ordinary LoRAs


@pytest.mark.thorough
@pytest.mark.shows("these work")
def test_an_acceleration_lora_loaded_after_attach_and_its_weight(pipe, loras, lcm, draw):
    experts = {name: loras[name] for name in ("fox", "hat")}
    mole.attach(accelerated(pipe), experts)
    before = draw(pipe, guidance_scale=1.0)
    pipe.load_lora_weights(lcm[0], adapter_name="lcm")
    for weight in (1.0, 0.4):
        pipe.set_adapters("lcm", weight)
        plain = accelerated(theirs(experts | {"lcm": lcm[0]}, [1.0, 1.0, weight]))
        torch.testing.assert_close(draw(pipe, guidance_scale=1.0), draw(plain, guidance_scale=1.0), **CLOSE)
    pipe.delete_adapters("lcm")
    torch.testing.assert_close(draw(pipe, guidance_scale=1.0), before, **CLOSE)
    mole.detach(pipe)
    assert torch.equal(draw(pipe, guidance_scale=1.0), draw(accelerated(tiny_pipeline()), guidance_scale=1.0))


@pytest.mark.shows("`set_adapters` beside the mixture")
def test_weights_per_block_beside_experts_outside_the_blocks(pipe, lcm, draw, tmp_path):
    """diffusers stumbles over names as short as time_embedding.linear_1, though another LoRA has that layer."""
    short = tiny_lora(tiny_pipeline(), tmp_path / "x.safetensors", ends=("conv_in", "time_embedding.linear_1"))
    mole.attach(pipe, {"x": short})
    pipe.load_lora_weights(lcm[0], adapter_name="lcm")
    pipe.set_adapters("lcm", {"unet": {"down": 0.5, "mid": 0.0}})
    beside = draw(pipe)
    pipe.set_adapters("lcm", 1.0)
    assert not torch.allclose(draw(pipe), beside, atol=1e-3)
    mole.detach(pipe)
    pipe.set_adapters("lcm", {"unet": {"down": 0.5, "mid": 0.0}})
    mole.attach(pipe, {"x": short})
    assert torch.equal(draw(pipe), beside)


@pytest.mark.shows("hotswap")
def test_hotswap_changes_the_ordinary_lora_and_leaves_the_mixture(pipe, loras, lcm, draw):
    mole.attach(pipe, {"fox": loras["fox"]})
    pipe.load_lora_weights(lcm[0], adapter_name="lcm")
    first, layer = draw(pipe), pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    before = dict(layer.lora_A)
    pipe.load_lora_weights(lcm[1], adapter_name="lcm", hotswap=True)
    swapped = draw(pipe)
    assert all(layer.lora_A[name] is module for name, module in before.items())  # a compiled model stays compiled
    assert not torch.allclose(swapped, first, atol=1e-3)
    plain = theirs({"fox": loras["fox"], "lcm": lcm[1]}, [1.0, 1.0])
    torch.testing.assert_close(swapped, draw(plain), **CLOSE)
    with pytest.raises(ValueError, match="no existing adapter by that name"):
        pipe.load_lora_weights(lcm[1], adapter_name="none", hotswap=True)


@pytest.mark.shows("`enable_lora_hotswap`")
def test_hotswap_is_prepared_before_attach(pipe, loras, lcm, draw):
    mole.attach(pipe, {"fox": loras["fox"]})
    picture = draw(pipe)
    for each in (pipe, pipe.unet):
        with pytest.raises(ValueError, match="enable_lora_hotswap must come before attach"):
            each.enable_lora_hotswap(target_rank=16)
    assert torch.equal(draw(pipe), picture)
    mole.detach(pipe)
    pipe.enable_lora_hotswap(target_rank=16)
    mole.attach(pipe, {"fox": loras["fox"]})
    pipe.load_lora_weights(lcm[0], adapter_name="lcm")
    pipe.load_lora_weights(lcm[1], adapter_name="lcm", hotswap=True)
    plain = theirs({"fox": loras["fox"], "lcm": lcm[1]}, [1.0, 1.0])
    torch.testing.assert_close(draw(pipe), draw(plain), **CLOSE)


@pytest.mark.thorough
@pytest.mark.shows("`fuse_lora`")
def test_fusing_under_a_mixture_is_refused(pipe, loras, lcm, draw):
    pipe.load_lora_weights(lcm[0], adapter_name="lcm")
    mole.attach(pipe, {"fox": loras["fox"]})
    picture = draw(pipe)
    for names in (None, ["lcm"], ["mole_experts"]):
        with pytest.raises(ValueError, match=r"cannot be fused under a mixture.*fuse them before attach"):
            pipe.fuse_lora(adapter_names=names)
    assert torch.equal(draw(pipe), picture)


@pytest.mark.thorough
def test_a_second_pipeline_over_the_same_models_chooses_its_loras_beside_the_mixture(pipe, loras, draw, tmp_path):
    base = draw(pipe)
    fox = tiny_lora(pipe, tmp_path / "fox.safetensors", ends=("to_q", "v_proj"))  # the ordinary one has layers before it
    mole.attach(pipe, {"fox": fox})
    alone = draw(pipe)
    second = hosts.quiet(diffusers.StableDiffusionPipeline.from_pipe(pipe))
    second.load_lora_weights(loras["ink"], adapter_name="ink")
    picture = draw(second)
    for part in (["unet"], ["text_encoder"]):
        for names in (None, ["ink"]):
            with pytest.raises(ValueError, match="cannot be fused under a mixture"):
                second.fuse_lora(part, adapter_names=names)
    assert torch.equal(draw(second), picture)
    second.set_adapters("ink", 0.4)
    plain = draw(theirs({"fox": fox, "ink": loras["ink"]}, [1.0, 0.4]))
    for each in (pipe, second):
        torch.testing.assert_close(draw(each), plain, **CLOSE)
    second.delete_adapters("ink")
    torch.testing.assert_close(draw(second), alone, **CLOSE)
    mole.detach(pipe)
    assert torch.equal(draw(second), base)


@pytest.mark.thorough
@pytest.mark.shows("`fuse_lora`")
def test_a_lora_that_is_fused_before_attach(pipe, loras, lcm, draw):
    pipe.load_lora_weights(lcm[0], adapter_name="lcm")
    pipe.fuse_lora(lora_scale=0.7)
    before = snapshot(pipe)
    with pytest.raises(ValueError, match=r"adapters are fused into UNet2DConditionModel; call pipe.unfuse_lora\(\) first"):
        mole.attach(pipe, {"fox": loras["fox"]})
    assert_same(before, snapshot(pipe))
    pipe.unload_lora_weights()
    fused = draw(pipe)
    mole.attach(pipe, {"fox": loras["fox"]})
    plain = theirs({"fox": loras["fox"], "lcm": lcm[0]}, [1.0, 0.7])
    torch.testing.assert_close(draw(pipe), draw(plain), **CLOSE)
    mole.detach(pipe)
    assert torch.equal(draw(pipe), fused)


@pytest.mark.thorough
@pytest.mark.shows("`fuse_qkv_projections`")
def test_fusing_q_k_and_v_under_a_mixture_is_refused(pipe, loras, draw):
    mole.attach(pipe, loras)
    picture = draw(pipe)
    for owner in (pipe, pipe.unet):
        with pytest.raises(ValueError, match="q, k and v of a pipeline with a mixture cannot be fused"):
            owner.fuse_qkv_projections()
    assert torch.equal(draw(pipe), picture)
    mole.detach(pipe)
    plain = draw(pipe)
    pipe.fuse_qkv_projections()
    pipe.unfuse_qkv_projections()
    mole.attach(pipe, loras)
    torch.testing.assert_close(draw(pipe), picture, **CLOSE)
    mole.detach(pipe)
    torch.testing.assert_close(draw(pipe), plain, **CLOSE)


@pytest.mark.shows("`set_attention_backend`")
def test_the_attention_backend_leaves_a_unet_as_it_is(pipe, loras, draw, awake):
    awake(mole.attach(pipe, loras, "mole"))
    picture = draw(pipe)
    with attention_backend("native"):  # setting one makes it the default of all models
        pipe.unet.set_attention_backend("_native_math")
        assert torch.equal(draw(pipe), picture)
    mole.detach(pipe)
    assert not any(hasattr(processor, "_attention_backend") for processor in pipe.unet.attn_processors.values())


@pytest.mark.shows("`set_attention_backend`")
def test_the_attention_backend_reaches_every_block_of_a_transformer(tmp_path):
    pipe, options = hosts.HOSTS["flux"]()
    mole.attach(pipe, {str(i): tiny_lora(pipe, tmp_path / str(i), seed=i) for i in range(2)}, "mole")
    picture = hosts.draw(pipe, options)
    with attention_backend("native"):  # setting one makes it the default of all models
        pipe.transformer.set_attention_backend("_native_math")
    asked = [p for p in pipe.transformer.attn_processors.values() if p._attention_backend == "_native_math"]
    assert len(asked) == len(pipe.transformer.attn_processors) == 3
    torch.testing.assert_close(hosts.draw(pipe, options), picture, **CLOSE)
