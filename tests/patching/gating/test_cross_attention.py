"""Maps that are read from a UNet's cross-attention, and words that are closed in it."""

import warnings

import hosts
import pytest
import torch
from bound_pictures import FOX, HALVES, OWL, PROMPT, WORDS, by_hand, now, stop
from diffusers import StableDiffusion3PAGPipeline
from diffusers.models.attention import BasicTransformerBlock
from tiers import thorough
from tiny import tiny_lora

import mole_diffusers as mole
from mole_diffusers.binding import PictureWarning
from mole_diffusers.patching.gating import bound_text

pytestmark = pytest.mark.usefixtures("decided")


def test_a_map_is_the_mean_attention_to_its_words(pipe, attach):
    mixture = attach({"fox": "fox", "ink": "owl"}, names=("fox", "ink"))
    pipe(PROMPT, num_inference_steps=1, output_type="latent", guidance_scale=1)
    masks = mixture.parts.settings.binding.now
    probabilities = torch.rand(1, 64, 16, generator=torch.Generator().manual_seed(0))
    text, latents = mixture.parts.shared.tokens._known[-1].states[0], torch.zeros(1, 4, 8, 8)
    masks.begin()
    now = {"pipe": None, "time": torch.ones(1), "acting": [True, True]}
    masks.on_denoiser(text, latents, lambda: (8, 8), **now)
    masks.add_maps(probabilities)
    by_hand = torch.stack([probabilities[0, :, list(words)].mean(1) for words in (FOX, OWL)]).reshape(2, 8, 8)
    low, high = by_hand.amin((1, 2), keepdim=True), by_hand.amax((1, 2), keepdim=True)
    (layout,) = mixture.layouts
    for found, wanted in zip(layout.maps.values(), (by_hand - low) / (high - low), strict=True):
        torch.testing.assert_close(found, wanted)


def test_maps_are_the_hosts_own_attention(pipe, attach):
    """Probabilities of the base's cross-attention, from its own processor's scores by hand."""
    mixture = attach({"fox": "fox", "ink": "owl"}, names=("fox", "ink"))
    read, inputs = [], []

    def keep(_, args, kwargs):
        inputs.append((args[0], kwargs["encoder_hidden_states"]))

    mixture.parts.settings.binding.now.add_maps = lambda probabilities: read.append(probabilities)
    attention = pipe.unet.get_submodule("down_blocks.1.attentions.0.transformer_blocks.0.attn2")
    hook = attention.register_forward_pre_hook(keep, with_kwargs=True)
    pipe(PROMPT, num_inference_steps=1, output_type="latent", guidance_scale=1)
    hook.remove()
    x, text = inputs[0]
    q, k = attention.to_q.get_base_layer()(x), attention.to_k.get_base_layer()(text)
    q, k = (v.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for v in (q, k))
    by_hand = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean(1)
    torch.testing.assert_close(read[0], by_hand, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("binding", [{"fox": "fox", "ink": "owl"}, *thorough(HALVES, {"fox": "fox", "ink": "everywhere"})])
def test_a_trace_keeps_the_maps_of_every_step(pipe, attach, draw, binding):
    """With places that are found or given, and for a subject that needs none."""
    names = ("fox", "ink", "hat") if "hat" in binding else ("fox", "ink")
    mixture = attach(binding, names=names)
    plain = draw(pipe, PROMPT, num_inference_steps=3)
    inputs = []
    layers = [module for name, module in pipe.unet.named_modules() if name.endswith("attn2")]
    hooks = [m.register_forward_hook(lambda m, x, k, _: inputs.append((m, x[0], k)), with_kwargs=True) for m in layers]
    with mixture.trace(maps=True) as trace, mixture.trace() as other:
        traced = draw(pipe, PROMPT, num_inference_steps=3)
    for hook in hooks:
        hook.remove()
    assert torch.equal(traced, plain)
    assert not other.maps
    steps = []
    for attention, x, kwargs in inputs:
        q, k = (attention.to_q.base_layer(x[1]), attention.to_k.base_layer(kwargs["encoder_hidden_states"][1]))
        steps.append([v.unflatten(-1, (attention.heads, -1)).transpose(0, 1) for v in (q, k)])
    steps = [steps[i : i + len(layers)] for i in range(0, len(steps), len(layers))]
    words = {"fox": FOX, "ink": OWL} if binding["ink"] != "everywhere" else {"fox": FOX}
    assert list(trace.maps) == [0, 1, 2]
    for (maps,), wanted in zip(trace.maps.values(), by_hand(steps, words.values(), (8, 8)), strict=True):
        found = torch.stack([maps[name] for name in words])
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    if binding["ink"] == "owl":
        for name, map_ in mixture.layouts[0].maps.items():
            assert torch.equal(map_, trace.maps[0][0][name])
    assert not mixture.parts.shared.listeners.maps.now
    with mixture.trace(maps=True) as trace, mixture.bound(None):
        draw(pipe, PROMPT)
    assert trace.maps == {}


@pytest.mark.thorough
def test_a_trace_inside_a_trace_counts_its_own_calls(pipe, attach, draw):
    """Other sizes and numbers of pictures inside change nothing of what the outer one has."""
    mixture = attach({"fox": "fox", "ink": "owl"}, names=("fox", "ink"))
    with mixture.trace(maps=True) as outer:
        draw(pipe, PROMPT, num_inference_steps=2)
        before = {call: dict(maps) for call, (maps,) in outer.maps.items()}
        with mixture.trace(maps=True) as inner:
            draw(pipe, PROMPT, num_inference_steps=2, height=32, num_images_per_prompt=2)
    assert list(inner.maps) == [0, 1]
    assert list(outer.maps) == [0, 1, 2, 3]
    for call, maps in before.items():
        assert all(torch.equal(outer.maps[call][0][name], map_) for name, map_ in maps.items())
    for call, pictures in inner.maps.items():
        for maps, again in zip(pictures, outer.maps[call + 2], strict=True):
            assert all(torch.equal(again[name], map_) for name, map_ in maps.items())
    assert {step for _, step, _ in inner.records} == {-1, 0, 1}
    assert {step for _, step, _ in outer.records} == {-1, 0, 1, 2, 3}


def test_maps_of_several_pictures_are_those_of_each_alone(pipe, attach):
    mixture = attach({"fox": "fox", "ink": "owl"}, names=("fox", "ink"))
    prompts = [PROMPT, "an owl+a fox", "a hen"]
    noise = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    def maps(chosen):
        with warnings.catch_warnings(), mixture.trace(maps=True) as trace:
            warnings.simplefilter("ignore")
            pipe([prompts[i] for i in chosen], latents=noise[chosen], num_inference_steps=3, output_type="latent")
        return trace.maps

    together = maps([0, 1, 2])
    for i in range(2):
        for step, (alone,) in maps([i]).items():
            torch.testing.assert_close(together[step][i], alone, atol=1e-4, rtol=1e-4)
    assert all(pictures[2] == {} for pictures in together.values())
    assert maps([2]) == {}


@pytest.mark.parametrize("slicing", [False, *thorough(True)])
@pytest.mark.shows("binding with attention slicing or another attention backend")
def test_closed_words_reach_every_attention_processor(attach, pipe, draw, slicing):
    attach(HALVES)
    expected = draw(pipe, PROMPT)
    if slicing:
        pipe.enable_attention_slicing(1)
    else:
        from diffusers.models.attention_processor import AttnProcessor

        for module in pipe.unet.modules():
            if hasattr(module, "set_processor"):
                module.set_processor(AttnProcessor())
    torch.testing.assert_close(draw(pipe, PROMPT), expected, atol=2e-5, rtol=0)


@pytest.mark.thorough
def test_what_is_closed_is_kept_for_each_head_while_it_is_small_and_a_picture_is_drawn(attach, pipe, draw, monkeypatch):
    mixture, kept = attach(HALVES), []

    def rows(*_):
        kept.append({made.shape[0] for key, made in now(mixture).cache.items() if key[0] == "bias of heads"})

    pipe.unet.register_forward_hook(rows)
    drawn = draw(pipe, PROMPT)
    assert all(kept)
    assert not any(2 in each for each in kept)  # of two rows, for several heads
    assert not now(mixture).cache
    kept.clear()
    monkeypatch.setattr(bound_text, "MOST_KEPT", 0)
    assert torch.equal(draw(pipe, PROMPT), drawn)
    assert all(each == {2} for each in kept)


def test_ctrl_c_leaves_blocks_compiled(attach, pipe, draw):
    """While maps are read, blocks that were compiled one by one run uncompiled."""
    blocks = [module for module in pipe.unet.modules() if isinstance(module, BasicTransformerBlock)]
    for block in blocks:
        block._compiled_call_impl = block._call_impl
    compiled = [block._compiled_call_impl for block in blocks]
    attach(WORDS)
    hook = blocks[-1].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        draw(pipe, PROMPT)
    hook.remove()
    assert [block._compiled_call_impl for block in blocks] == compiled


@pytest.mark.parametrize("guidance", [3.0, *thorough(1.0)])
def test_words_are_closed_in_layers_that_perturbed_attention_splits(guidance, tmp_path, monkeypatch):
    """Rows as they were, then perturbed ones, which have the last prompts."""
    parts = {name: part for name, part in hosts.sd3().components.items() if "image" not in name and "feature" not in name}
    pipe = hosts.quiet(StableDiffusion3PAGPipeline(**parts, pag_applied_layers="blocks.1"))
    files = {n: tiny_lora(pipe, tmp_path / f"{n}.safetensors", seed=i) for i, n in enumerate(("fox", "ink"))}
    mole.attach(pipe, files, binding={"fox": ("fox", "left"), "ink": ("owl", "right")})
    given, ask = [], bound_text.BoundText.bias

    def bias(self, tokens, rows):
        given.append(ask(self, tokens, rows))
        return given[-1]

    monkeypatch.setattr(bound_text.BoundText, "bias", bias)
    hosts.draw(pipe, hosts.SIZE | {"guidance_scale": guidance, "pag_scale": 3.0}, PROMPT, steps=1)
    whole, before, perturbed = given
    assert whole.amin((1, 2)).tolist() == [0.0] * (guidance > 1) + [-bound_text.MASK_BIAS] * 2
    assert torch.equal(torch.cat([before, perturbed]), whole)


@pytest.mark.thorough
@pytest.mark.shows("binding with `torch.compile`")
def test_blocks_compiled_one_by_one_are_bound(attach, pipe, draw):
    torch.compiler.reset()
    attach(HALVES)
    expected = draw(pipe, PROMPT)
    pipe.unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(draw(pipe, PROMPT), expected, atol=2e-5, rtol=0)
    mixture = attach(WORDS)  # maps are read in blocks that are compiled
    compiled = draw(pipe, PROMPT, num_inference_steps=3)
    assert set(mixture.layouts[0].regions) == {"fox", "ink"}
    for block in pipe.unet.modules():
        block._compiled_call_impl = None
    torch.testing.assert_close(draw(pipe, PROMPT, num_inference_steps=3), compiled, atol=2e-5, rtol=0)


@pytest.mark.thorough
@pytest.mark.shows("binding with `torch.compile`")
def test_a_unet_compiled_whole_is_bound_in_the_text_alone(attach, pipe, draw):
    """What was drawn before it was compiled leaves no masks behind. It says so, and regions that were given are refused."""
    torch.compiler.reset()
    mixture = attach(HALVES)
    draw(pipe, PROMPT)
    pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match="region of 'fox' cannot act: the UNet2DConditionModel is compiled as one graph"):
        draw(pipe, PROMPT)
    mixture.bind(dict.fromkeys(HALVES, (None, "auto")) | WORDS)
    with pytest.warns(PictureWarning, match="no words or places of their own: .* compile_repeated_blocks"):
        whole = draw(pipe, PROMPT)
    assert len(mixture.binding_warnings) == 1
    explained = mixture.explain(PROMPT)
    assert {role.place for role in explained.experts.values()} == {"everywhere"}
    assert "compiled as one graph" in explained.experts["fox"].why
    with warnings.catch_warnings(action="error"):  # where binding changes nothing, nothing is said
        with mixture.only("fox"):
            draw(pipe, PROMPT)
        with mixture.bound(None):
            draw(pipe, PROMPT)
    masks = mixture.parts.settings.binding.now
    masks.on_denoiser = lambda *_, **__: None
    pipe.unet = pipe.unet._orig_mod
    torch.testing.assert_close(draw(pipe, PROMPT), whole, atol=2e-5, rtol=0)
