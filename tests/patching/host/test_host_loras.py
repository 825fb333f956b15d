"""Ordinary LoRAs beside, under and before a mixture on hosts other than Stable Diffusion 1.5."""

from functools import partial

import hosts
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from tiers import thorough
from tiny import tiny_lora, tiny_pipeline

import mole_diffusers as mole

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


@pytest.mark.shows("these work", "`set_adapters` beside the mixture", "hotswap")
def test_an_ordinary_lora_is_weighed_swapped_and_deleted_beside_the_mixture(other, ordinary):
    pipe = other.pipe
    second = hosts.quiet(type(pipe).from_pipe(pipe, dtype=torch.float32))
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


@pytest.mark.shows("`fuse_lora`", "`disable_lora`, `enable_lora`, `scale`", "`unload_lora_weights`")
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


@pytest.mark.shows("`fuse_lora`")
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


@pytest.mark.shows("`fuse_qkv_projections`")
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


# ---- nothing comes back, or goes, in silence


@pytest.fixture
def second(pipe):
    """Another pipeline over the same models."""
    other = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


@pytest.mark.parametrize("how", ["second pipeline", *thorough("unet", "delete", "pipeline")])
def test_what_takes_loras_out_takes_the_mixture_out(pipe, second, loras, draw, tmp_path, how):
    base = draw(pipe)
    mole.attach(pipe, loras)
    if how == "pipeline":
        pipe.unload_lora_weights()
    elif how == "unet":
        pipe.unet.unload_lora()
    elif how == "delete":
        pipe.delete_adapters(pipe.get_active_adapters())
    else:
        second.unload_lora_weights()
    assert mole.attached(pipe) is None
    assert torch.equal(draw(pipe), base)
    pipe.unet.set_default_attn_processor()
    pipe.save_pretrained(tmp_path)
    base = draw(pipe)  # by the plain attention that this has chosen
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in pipe.unet.modules())
    mole.attach(pipe, loras)
    mole.detach(pipe)
    assert torch.equal(draw(pipe), base)


@pytest.mark.parametrize("beside", [False, *thorough(True)])
def test_what_is_disabled_stays_so(pipe, loras, draw, tmp_path, beside):
    base, close = draw(pipe), {"atol": 1e-5, "rtol": 0}
    if beside:
        pipe.unet.load_lora_adapter(loras["hat"], adapter_name="hat", prefix="unet")
    mixture = mole.attach(pipe, {n: loras[n] for n in ("fox", "ink")})
    on = draw(pipe)
    pipe.disable_lora()
    torch.testing.assert_close(draw(pipe), base, **close)
    pipe.unet.save_pretrained(tmp_path)
    pipe.unet.set_default_attn_processor()
    with mixture.lifted():
        torch.testing.assert_close(draw(pipe), base, **close)
    torch.testing.assert_close(draw(pipe), base, **close)
    assert mole.attached(pipe) is mixture
    pipe.enable_lora()
    torch.testing.assert_close(draw(pipe), on, **close)


@pytest.mark.parametrize("mixed", [*thorough(False), True], ids=["on both models", "beside experts on more models"])
@pytest.mark.shows("`disable_lora`, `enable_lora`, `scale`")
def test_what_is_switched_in_a_lifted_block_stays(pipe, loras, draw, tmp_path, mixed):
    """The same calls inside the block and outside of it give the same pictures."""
    draw = partial(draw, num_inference_steps=1)
    base, close = draw(pipe), {"atol": 1e-5, "rtol": 0}
    if mixed:
        pipe.unet.load_lora_adapter(loras["hat"], adapter_name="hat", prefix="unet")
    else:
        pipe.load_lora_weights(loras["hat"], adapter_name="hat")
    mixture = mole.attach(pipe, {n: loras[n] for n in ("fox", "ink")})
    on = draw(pipe)
    pipe.set_adapters(["hat"], 0.3)
    weaker = draw(pipe)
    pipe.set_adapters(["hat"], 1.0)

    def drawn_after(*calls):
        with mixture.lifted():
            for call in calls:
                call()
        return draw(pipe)

    for picture, *calls in (
        (base, pipe.disable_lora),
        (base,),  # it is off, and stays off
        (base, lambda: pipe.set_adapters(["hat"], 1.0)),
        (base, lambda: pipe.unet.load_lora_adapter(loras["ink"], adapter_name="late", prefix="unet")),
        (base, lambda: pipe.delete_adapters("late")),
        (on, pipe.enable_lora),
        (on, pipe.disable_lora, pipe.enable_lora),
        (weaker, lambda: pipe.set_adapters(["hat"], 0.3)),
        (on, lambda: pipe.set_adapters(["hat"], 1.0)),
    ):
        torch.testing.assert_close(drawn_after(*calls), picture, **close)
    assert not torch.allclose(on, weaker, atol=1e-3)
    assert not torch.allclose(on, base, atol=1e-3)
    mole.detach(pipe)
    pipe.unload_lora_weights()
    torch.testing.assert_close(draw(pipe), base, **close)


@pytest.mark.parametrize("off", [False, *thorough(True)])
def test_a_lora_that_comes_in_a_lifted_block_leaves_the_mixture_off(pipe, loras, draw, tmp_path, off):
    mixture = mole.attach(pipe, {"fox": loras["fox"]})
    pipe.disable_lora()
    with mixture.lifted():
        pipe.load_lora_weights(loras["hat"], adapter_name="hat")
        if off:
            pipe.disable_lora()
    silent = draw(pipe)
    pipe.enable_lora()
    beside = draw(pipe)
    mole.detach(pipe)
    assert not torch.allclose(beside, draw(pipe), atol=1e-3)
    pipe.unload_lora_weights()
    torch.testing.assert_close(silent, draw(pipe), atol=1e-5, rtol=0)


def test_another_unet_in_its_place_does_not_hide_the_mixture(pipe, loras, draw):
    base, unet = draw(pipe), pipe.unet
    mixture = mole.attach(pipe, loras)
    pipe.unet = tiny_pipeline(seed=1).unet
    assert mole.attached(pipe) is mixture
    with pytest.raises(ValueError, match="the pipeline's unet was replaced by another.*attach again"):
        draw(pipe)
    mole.detach(pipe)
    assert not torch.equal(draw(pipe), base)
    pipe.unet = unet
    assert mole.attached(pipe) is None
    assert torch.equal(draw(pipe), base)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_model_in_the_place_of_one_with_experts_is_said_and_attached_anew(pipe, loras, draw, part):
    own = {name: getattr(pipe, name) for name in ("unet", "text_encoder")}
    mole.attach(pipe, loras, binding=None)
    mixed = draw(pipe)
    setattr(pipe, part, getattr(tiny_pipeline(seed=1), part))
    with pytest.raises(ValueError, match=f"the pipeline's {part} was replaced"):
        draw(pipe)
    setattr(pipe, part, own[part])
    assert torch.equal(draw(pipe), mixed)
    setattr(pipe, part, getattr(tiny_pipeline(seed=1), part))
    mole.attach(pipe, loras, binding=None)
    other = draw(pipe)
    mole.detach(pipe)
    for name, model in own.items():
        assert not any("lora" in key for key in model.state_dict()), name
    fresh = tiny_pipeline()
    setattr(fresh, part, getattr(tiny_pipeline(seed=1), part))
    mole.attach(fresh, loras, binding=None)
    assert torch.equal(draw(fresh), other)


def test_a_unet_alone_that_is_replaced_is_said(pipe, tmp_path, draw):
    mixture = mole.attach(pipe, {"fox": tiny_lora(pipe, tmp_path / "fox.safetensors", ends=("attn2.to_k",))})
    assert list(mixture.banks) == ["unet"]
    pipe.unet = tiny_pipeline(seed=1).unet
    with pytest.raises(ValueError, match="the pipeline's unet was replaced"):
        draw(pipe)


def test_embeddings_may_stand_in_for_a_text_encoder(pipe, loras, draw):
    mole.attach(pipe, loras, binding=None)
    picture, states = draw(pipe), pipe.encode_prompt("a fox in ink", "cpu", 1, True)
    pipe.text_encoder = None
    given = dict(zip(("prompt_embeds", "negative_prompt_embeds"), states, strict=True))
    assert torch.equal(draw(pipe, prompt=None, **given), picture)


def test_an_adapter_added_under_a_mixture_leaves_the_host_frozen(pipe, loras):
    pipe.unet.requires_grad_(False)
    mole.attach(pipe, loras)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "own")
    assert {n for n, p in pipe.unet.named_parameters() if p.requires_grad} == {
        n for n, _ in pipe.unet.named_parameters() if ".own." in n
    }


def test_a_folder_that_is_saved_to_again_holds_what_was_saved_last(pipe, loras, draw, tmp_path):
    ours = mole.MoLEStableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    ours.set_progress_bar_config(disable=True)
    for name in ("fox", "ink"):
        ours.load_lora_weights(loras[name], adapter_name=name)
    ours.save_pretrained(tmp_path)
    again = mole.MoLEStableDiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    again.delete_adapters("fox")
    again.save_pretrained(tmp_path)  # the folder that its own files lie in
    only = mole.MoLEStableDiffusionPipeline.from_pretrained(tmp_path)
    assert list(only.mixture.experts) == ["ink"]
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("mole")) == ["mole"]
    again.unload_lora_weights()
    again.save_pretrained(tmp_path)
    assert mole.MoLEStableDiffusionPipeline.from_pretrained(tmp_path).mixture is None
