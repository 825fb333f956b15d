"""Composers that act while sampling, each against what its formula says of single-LoRA pictures."""

import types

import pytest
import torch
from diffusers import HeunDiscreteScheduler
from tiers import thorough
from tiny import tiny_lora

import mole_diffusers as mole
from mole_app.studio.clip_skip import clip_skip
from mole_diffusers.merging.factors import Pair
from mole_diffusers.merging.layers import layers_of
from rivals import sampling_composers

LATENT = {"output_type": "latent", "guidance_scale": 3.0}


def latent(pipe, steps=1, **options):
    generator = torch.Generator().manual_seed(0)
    return pipe("a fox", generator=generator, num_inference_steps=steps, **LATENT | options).images


def alone(pipe, path, steps=1):
    mole.attach(pipe, {"one": path})
    return latent(pipe, steps)


def test_switch_begins_with_the_first_expert_and_its_own_text(pipe, loras):
    fox = alone(pipe, loras["fox"])
    mixture = mole.attach(pipe, {"fox": loras["fox"], "ink": loras["ink"]})
    with sampling_composers.switched(pipe, mixture):
        torch.testing.assert_close(latent(pipe), fox, rtol=0, atol=1e-5)
        with mixture.trace() as trace:
            latent(pipe, steps=12)
    at = [w.tolist() for place, _, w in trace.records if place == "unet.mid_block.attentions.0.transformer_blocks.0"]
    assert at == [[1, 0]] * 5 + [[0, 1]] * 5 + [[1, 0]] * 2


@pytest.mark.parametrize("period", [1, *thorough(5)])
def test_switch_of_one_expert_is_that_lora(pipe, loras, period):
    fox = alone(pipe, loras["fox"], steps=3)
    with sampling_composers.switched(pipe, mole.attach(pipe, {"fox": loras["fox"]}), period=period):
        assert torch.equal(latent(pipe, steps=3), fox)


def test_layers_of_the_text_encoder_are_skipped_around_a_composer(pipe, loras):
    mixture = mole.attach(pipe, {"fox": loras["fox"]})
    wanted = latent(pipe, clip_skip=1, guidance_scale=1.0)
    with clip_skip(pipe, 1 + 1), sampling_composers.switched(pipe, mixture):
        assert torch.equal(latent(pipe, guidance_scale=1.0), wanted)
    assert not torch.equal(latent(pipe, guidance_scale=1.0), wanted)
    mixture = mole.attach(pipe, {"fox": loras["fox"], "ink": loras["ink"]})
    with sampling_composers.switched(pipe, mixture), pytest.raises(ValueError, match="takes no clip_skip: draw inside"):
        latent(pipe, clip_skip=1)


def test_composite_is_the_mean_of_the_predictions(pipe, loras):
    """One step of DDIM is linear in the prediction, so its latent is the mean of the single LoRAs' latents."""
    singles = [alone(pipe, loras[name]) for name in ("fox", "ink")]
    mixture = mole.attach(pipe, {"fox": loras["fox"], "ink": loras["ink"]})
    with sampling_composers.composed_scores(pipe, mixture):
        torch.testing.assert_close(latent(pipe), torch.stack(singles).mean(0), rtol=0, atol=1e-5)
    assert (singles[0] - singles[1]).abs().max() > 1e-3


@pytest.mark.thorough
def test_composite_of_one_and_of_twins_is_that_one(pipe, loras):
    fox = alone(pipe, loras["fox"], steps=2)
    with sampling_composers.composed_scores(pipe, mole.attach(pipe, {"fox": loras["fox"]})):
        assert torch.equal(latent(pipe, steps=2), fox)
    with sampling_composers.composed_scores(pipe, mole.attach(pipe, {"a": loras["fox"], "b": loras["fox"]})):
        torch.testing.assert_close(latent(pipe, steps=2), fox, rtol=0, atol=1e-5)


def test_the_models_calls_are_given_back_after_an_error(pipe, loras):
    mixture = mole.attach(pipe, {"fox": loras["fox"]})
    before = latent(pipe)
    with pytest.raises(RuntimeError, match="stop"), sampling_composers.composed_scores(pipe, mixture):
        raise RuntimeError("stop")
    assert "forward" not in pipe.unet.__dict__
    assert "forward" not in pipe.text_encoder.__dict__
    assert torch.equal(latent(pipe), before)
    with (
        pytest.raises(ValueError, match="needs a unet and one text encoder"),
        sampling_composers.switched(types.SimpleNamespace(unet=pipe.unet, text_encoder_2=pipe.text_encoder), mixture),
    ):
        pass


def pair(scale, seed):
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(2, 6, generator=generator), torch.randn(5, 2, generator=generator)
    return Pair(down.double(), up.double(), scale)


def test_k_lora_chooses_by_the_largest_entries_whatever_the_styles_scale():
    layers = {"a": [pair(1.0, 0), pair(1.0, 1)], "b": [pair(3.0, 2), pair(1.0, 3)], "c": [pair(1.0, 4), None]}
    until = sampling_composers.last_content(layers)
    assert set(until) == {"a", "b"}
    louder = {key: [c, s and s._replace(scale=7.0)] for key, (c, s) in layers.items()}
    assert sampling_composers.last_content(louder) == pytest.approx(until)
    content, style = layers["a"][0].delta(), layers["a"][1].delta()
    gamma = (content.abs().sum() + layers["b"][0].delta().abs().sum()) / (
        style.abs().sum() + layers["b"][1].delta().abs().sum()
    )
    ratio = content.abs().flatten().sort().values[-4:].sum() / (gamma * style.abs().flatten().sort().values[-4:].sum())
    assert until["a"] == pytest.approx(((ratio - 0.5) / 1.5).item())
    assert until["b"] > until["a"]


def test_k_lora_turns_each_layer_once_at_the_same_share_of_any_run(pipe, loras):
    experts = {"fox": (loras["fox"], 0.8), "ink": loras["ink"]}
    mixture = mole.attach(pipe, experts, mole.GateConfig("static", granularity="matrix"))
    turned = {}
    for steps in (4, 8, "heun"):
        if steps == "heun":  # it calls the model twice at most timesteps
            pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
        with sampling_composers.k_lora(pipe, mixture, content="fox", style="ink"), mixture.trace() as trace:
            latent(pipe, steps=8 if steps == "heun" else steps)
        weights = {place: trace.weights(place) for place in trace.locations if "attn" in place and place.startswith("unet")}
        assert all(w.count_nonzero(1).eq(1).all() for w in weights.values())
        chose = {place: (w[:, 0] != 0).tolist() for place, w in weights.items()}
        assert all(sorted(row, reverse=True) == row for row in chose.values())  # content, then style
        turned[steps] = {place: sum(row) / len(row) for place, row in chose.items()}
    assert len(set(turned[8].values())) > 1
    for place, share in turned[8].items():
        assert abs(turned[4][place] - share) <= 1 / 4
        assert abs(turned["heun"][place] - share) <= 1 / 8
    forward = trace.weights("unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2")
    assert forward[0, 1] == 1  # no attention, and only ink has it
    mixture = mole.attach(pipe, experts)
    with (
        pytest.raises(ValueError, match="K-LoRA takes two experts and a gate per matrix"),
        sampling_composers.k_lora(pipe, mixture, content="fox", style="ink"),
    ):
        pass


def after_each_step(pipe, steps):
    """The latents [B, 4, H, W] after every step of a picture."""
    found, generator = [], torch.Generator().manual_seed(0)

    def watch(pipe, step, time, kept):
        found.append(kept["latents"].clone())
        return kept

    pipe("a fox", generator=generator, num_inference_steps=steps, callback_on_step_end=watch, **LATENT)
    return found


def test_k_lora_is_the_content_lora_up_to_its_least_share(pipe, tmp_path):
    ends = ("to_q", "to_k", "to_v", "to_out.0")  # the layers that K-LoRA chooses for, and no others
    files = {n: tiny_lora(pipe, tmp_path / f"{n}.safetensors", seed=i, ends=ends) for i, n in enumerate(("fox", "ink"))}
    mole.attach(pipe, {"fox": files["fox"]})
    wanted = after_each_step(pipe, 12)
    mixture = mole.attach(pipe, files, mole.GateConfig("static", granularity="matrix"))
    with sampling_composers.k_lora(pipe, mixture, content="fox", style="ink"):
        found = after_each_step(pipe, 12)
    layers = layers_of({name: (expert, 1.0) for name, expert in mixture.experts.items()})
    least = min(sampling_composers.last_content({k: v for k, v in layers.items() if k.startswith("unet.")}).values())
    content = [step for step in range(12) if step / 12 <= least]
    assert 1 < len(content) < 12
    for step in content:
        torch.testing.assert_close(found[step], wanted[step], rtol=0, atol=1e-5)
    assert (found[len(content)] - wanted[len(content)]).abs().max() > 1e-4  # the first layer has turned
