"""Words and places on each transformer: in its own text encoder's template, and in its own order of text and picture."""

import hosts
import pytest
import torch
from tiers import thorough

import mole_diffusers as mole
from mole_diffusers.patching.gating import bound_text, prompt_tokens
from mole_diffusers.patching.host.denoisers import RECORDS
from mole_diffusers.testing import ATTENTION, FEED_FORWARD, tiny_lora

PROMPT = "a fox and an owl"
CHAT = "<|im_start|>user\na fox and an owl<|im_end|>\n<|im_start|>assistant\n"
TEXTS = {  # that the denoiser reads
    "z_image": CHAT,
    "qwen": CHAT.removeprefix("<|im_start|>user\n"),
    "flux2": CHAT,
    "chroma": PROMPT,
    "wan": PROMPT,
}
LAST = {
    "z_image": "layers.1.feed_forward.w2",
    "qwen": "transformer_blocks.1.img_mlp.net.2",
    "flux2": "single_transformer_blocks.1.attn.to_out",
    "chroma": "single_transformer_blocks.1.proj_out",
}
LAYERS = (*ATTENTION[:4], "w1", "w2", "w3", "attn.to_qkv_mlp_proj", "single_transformer_blocks.0.attn.to_out", "proj_mlp")
LAYERS += ("ffn.net.2", "img_mlp.net.2", "txt_mlp.net.2")


@pytest.fixture
def drawn(request, tmp_path):
    """A pipeline, what its call needs, and two LoRAs for its denoiser."""
    pipe, options = hosts.HOSTS[request.param]()
    options |= {"max_sequence_length": 64}
    encoder, pipe.text_encoder = pipe.text_encoder, None  # files for these pipelines have no layers of it
    files = {n: tiny_lora(pipe, tmp_path / f"{n}.safetensors", seed=i, ends=LAYERS) for i, n in enumerate(("fox", "owl"))}
    pipe.text_encoder = encoder
    return pipe, options, files


@pytest.mark.parametrize("drawn", list(TEXTS), indirect=True)
def test_an_unbound_sum_is_set_adapters_and_each_words_tokens_are_known(request, drawn, monkeypatch):
    monkeypatch.setattr(prompt_tokens, "ALIKE", 2.0)  # texts are found by being the same, not alike
    pipe, options, files = drawn
    base, before = hosts.draw(pipe, options, PROMPT), hosts.snapshot(pipe)
    mixture = mole.attach(pipe, files, "sum", binding=None)
    unbound = hosts.draw(pipe, options, PROMPT)
    mixture.bind({"fox": "fox", "owl": "owl"})
    bound = hosts.draw(pipe, options, PROMPT)
    prompt = next(text for text in mixture._settings.binding.now._texts if any(text.picture.readings[0].mentioned))
    tokens = pipe.tokenizer.tokenize(TEXTS[request.node.callspec.params["drawn"]])
    for k, word in enumerate(("fox", "owl")):
        start = next(i for i in range(len(tokens)) if tokens[i : i + len(word)] == list(word))
        own = torch.zeros(prompt.tokens, dtype=torch.bool)
        own[start : start + len(word)] = True  # these tokenizers have a token for each letter
        assert torch.equal(prompt.word_mask[0, :, 1 - k], ~own)
    mole.detach(pipe)
    hosts.assert_same(before, hosts.snapshot(pipe))
    assert torch.equal(hosts.draw(pipe, options, PROMPT), base)
    for name, file in files.items():
        pipe.load_lora_weights(file, adapter_name=name)
    pipe.set_adapters(list(files))
    torch.testing.assert_close(hosts.draw(pipe, options, PROMPT), unbound, atol=1e-5, rtol=0)
    assert not torch.allclose(unbound, base, atol=1e-2)
    assert not torch.allclose(unbound, bound, atol=1e-4)


@pytest.mark.parametrize("name", thorough(*LAST))
@pytest.mark.parametrize("words", ["fox", None])
def test_a_given_region_acts_inside_it_alone(name, words, tmp_path, monkeypatch):
    """Of a LoRA for the last layer, which mixes no tokens: inside, it is as without a region; outside, the base is drawn."""
    monkeypatch.setattr(bound_text, "CLOSING", 0.0)  # closing the words would change the base, too
    pipe, options = hosts.HOSTS[name]()
    options = options | {"output_type": "latent"}
    file = tiny_lora(pipe, tmp_path / "fox", ends=(LAST[name],))

    def drawn():
        latents = hosts.draw(pipe, options, PROMPT, steps=1)[0]  # [C, H, W], or tokens [H W, C]
        return latents if latents.dim() == 3 else latents.T.unflatten(1, (8, 8))

    base = drawn()
    mixture = mole.attach(pipe, {"fox": file}, "sum", binding=None)
    whole = drawn()
    assert not torch.isclose(base, whole, atol=1e-4).all(0).any()
    for region in ("left", "right"):
        mixture.bind({"fox": (words, region)})
        left, right = (whole, base) if region == "left" else (base, whole)
        wanted = torch.cat([left.chunk(2, -1)[0], right.chunk(2, -1)[1]], -1)
        torch.testing.assert_close(drawn(), wanted, atol=1e-6, rtol=0)


@pytest.mark.usefixtures("decided")
@pytest.mark.parametrize("drawn", thorough(*LAST), indirect=True)
def test_things_of_a_list_get_places_from_attention(drawn):
    pipe, options, files = drawn
    mixture = mole.attach(pipe, files, "sum", binding={"fox": "fox", "owl": "owl"})
    with mixture.trace() as trace:
        hosts.draw(pipe, options, PROMPT)
    (layout,) = trace.layouts
    assert set(layout.regions) == set(layout.maps) == {"fox", "owl"}
    assert not torch.allclose(layout.regions["fox"], layout.regions["owl"])


ACTING = ["sd15", "sdxl", "animatediff", "sd3", "flux", *LAST]  # one of each record that is drawn here


@pytest.mark.parametrize("name", ["wan", *thorough(*ACTING)])
def test_a_region_acts_or_is_refused(name, tmp_path):
    pipe, options = hosts.HOSTS[name]()
    mixture = mole.attach(pipe, {"fox": tiny_lora(pipe, tmp_path / "fox", ends=LAYERS + FEED_FORWARD)}, "sum", binding=None)
    unbound, bound = hosts.draw(pipe, options), {"fox": (None, "left")}
    if name in ACTING:
        mixture.bind(bound)
        assert not torch.allclose(hosts.draw(pipe, options), unbound, atol=1e-4)
    else:
        for attempt in (mixture.bind, lambda bound: mole.attach(pipe, mixture.experts, binding=bound)):
            with pytest.raises(ValueError, match="a WanTransformer3DModel has no regions, and one was given for 'fox'"):
                attempt(bound)
        assert torch.equal(hosts.draw(pipe, options), unbound)


def test_every_record_is_drawn_here_or_is_another_of_flux():
    drawn = {type(hosts.denoiser(hosts.HOSTS[name]()[0])).__name__ for name in (*ACTING, "wan")}
    assert set(RECORDS) - drawn == {"LongCatImageTransformer2DModel", "OvisImageTransformer2DModel"}


@pytest.mark.thorough
@pytest.mark.parametrize("drawn", ["z_image"], indirect=True)
def test_a_prompt_beside_a_longer_one_is_drawn_as_alone(drawn):
    """The model pads the shorter text, and hides that padding from attention: places are read without it."""
    pipe, options, files = drawn
    options |= {"max_sequence_length": 128}
    mixture = mole.attach(pipe, files, "sum", binding={"fox": "fox", "owl": "owl"})
    prompts = [PROMPT, "a fox, standing in the deep forest and an owl on the moon with a red hat"]
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with mixture.trace(maps=True) as beside:
        both = hosts.draw(pipe, options | {"latents": latents, "negative_prompt": ["", ""]}, list(prompts))
    for i, prompt in enumerate(prompts):
        with mixture.trace(maps=True) as trace:
            alone = hosts.draw(pipe, options | {"latents": latents[i : i + 1]}, prompt)
        torch.testing.assert_close(both[i : i + 1], alone, atol=1e-5, rtol=0)
        torch.testing.assert_close(beside.maps[0][i], trace.maps[0][0], atol=1e-5, rtol=0)
