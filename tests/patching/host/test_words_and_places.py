"""Words and places on each transformer: in its own text encoder's template, and in its own order of text and picture."""

import hosts
import pytest
import torch
import torch.nn.functional as F
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tiers import thorough
from tiny import ATTENTION, FEED_FORWARD, tiny_lora
from torch.overrides import TorchFunctionMode

import mole_diffusers as mole
from mole_diffusers.patching.gating import bound_text, prompt_tokens
from mole_diffusers.patching.host.denoiser_inputs import tokenizers_of
from mole_diffusers.patching.host.denoisers import RECORDS

PROMPT = "a fox and an owl"
CHAT = "<|im_start|>user\na fox and an owl<|im_end|>\n<|im_start|>assistant\n"
LUMINA = "You are an assistant designed to generate superior images with the superior degree of image-text alignment "
LUMINA += "based on textual prompts or user prompts."
TEXTS = {  # that the denoiser reads
    "z_image": CHAT,
    "qwen": CHAT.removeprefix("<|im_start|>user\n"),
    "flux2": CHAT,
    "chroma": PROMPT,
    "wan": PROMPT,
    "krea2": PROMPT,
    "longcat": PROMPT,
    "ovis": PROMPT,
    "ltx": PROMPT,
    "qwen-edit": f"Picture 1: <|vision_start|>{'<|image_pad|>' * 4}<|vision_end|>{PROMPT}",
    "flux2-dev": f"<s>[SYSTEM_PROMPT]{SYSTEM_MESSAGE}[/SYSTEM_PROMPT][INST]{PROMPT}[/INST]",
    "lumina2": f"{LUMINA} <Prompt Start> {PROMPT}",
    "hidream": PROMPT,
    "anima": PROMPT,
}
LAST = {
    "z_image": "layers.1.feed_forward.w2",
    "qwen": "transformer_blocks.1.img_mlp.net.2",
    "flux2": "single_transformer_blocks.1.attn.to_out",
    "chroma": "single_transformer_blocks.1.proj_out",
    "krea2": "transformer_blocks.1.ff.down",
    "longcat": "single_transformer_blocks.1.proj_out",
    "ovis": "single_transformer_blocks.1.proj_out",
    "qwen-edit": "transformer_blocks.1.img_mlp.net.2",
    "flux2-dev": "single_transformer_blocks.1.attn.to_out",
    "lumina2": "layers.1.feed_forward.linear_2",
    "hidream": "single_stream_blocks.1.block.ff_i.shared_experts.w2",
    "anima": "transformer_blocks.1.ff.net.2",
}
LAYERS = (*ATTENTION[:4], "w1", "w2", "w3", "attn.to_qkv_mlp_proj", "single_transformer_blocks.0.attn.to_out", "proj_mlp")
LAYERS += ("ffn.net.2", "img_mlp.net.2", "txt_mlp.net.2", "ff.gate", "ff.up", "ff.down", "linear_1", "linear_2")
LAYERS += ("attn1.to_out", "to_k_t")
LONG = {"flux2-dev": 256, "lumina2": 256}  # texts with their templates, of which each byte is a token


@pytest.fixture
def drawn(request, tmp_path):
    """A pipeline, what its call needs, and two LoRAs for its denoiser."""
    pipe, options = hosts.HOSTS[request.param]()
    if "enable_prompt_rewrite" not in options:  # LongCat's has a fixed length
        options |= {"max_sequence_length": LONG.get(request.param, 64)}
    encoder, pipe.text_encoder = pipe.text_encoder, None  # files for these pipelines have no layers of it
    files = {n: tiny_lora(pipe, tmp_path / f"{n}.safetensors", seed=i, ends=LAYERS) for i, n in enumerate(("fox", "owl"))}
    pipe.text_encoder = encoder
    return pipe, options, files


def tokens_of(name, pipe):
    """The tokens of the denoiser's text. Blocks of HiDream read the states of T5, of Llama's last layer and of another."""
    words = tokenizers_of(pipe)
    words["text_encoder"] = words.get("text_conditioner", words["text_encoder"])  # Anima's text has T5's tokens
    if name != "hidream":
        return words["text_encoder"].convert_ids_to_tokens(words["text_encoder"](TEXTS[name]).input_ids)
    t5, llama = (words[f"text_encoder_{i}"] for i in (3, 4))
    padded = {"padding": "max_length", "max_length": 64}
    both = [each.convert_ids_to_tokens(each(PROMPT, **padded).input_ids) for each in (t5, llama)]
    return [*both[0], *both[1], *both[1]]


@pytest.mark.parametrize("drawn", list(TEXTS), indirect=True)
@pytest.mark.shows("Words and places")
def test_an_unbound_sum_is_set_adapters_and_each_words_tokens_are_known(request, drawn, monkeypatch):
    monkeypatch.setattr(prompt_tokens, "ALIKE", 2.0)  # texts are found by being the same, not alike
    pipe, options, files = drawn
    base, before = hosts.draw(pipe, options, PROMPT), hosts.snapshot(pipe)
    mixture = mole.attach(pipe, files, "sum", binding=None)
    unbound = hosts.draw(pipe, options, PROMPT)
    mixture.bind({"fox": "fox", "owl": "owl"})
    bound = hosts.draw(pipe, options, PROMPT)
    known = mixture.parts.settings.binding.now._texts
    prompt, row = next((t, i) for t in known for i, each in enumerate(t.picture.readings) if any(each.mentioned))
    tokens = tokens_of(request.node.callspec.params["drawn"], pipe)
    for k, word in enumerate(("fox", "owl")):
        starts = [i for i in range(len(tokens)) if tokens[i : i + len(word)] == list(word)]
        own = torch.zeros(prompt.tokens, dtype=torch.bool)
        for start in starts:
            own[start : start + len(word)] = True  # these tokenizers have a token for each letter
        assert starts
        assert torch.equal(prompt.acting_tokens[row, :, 1 - k], ~own)
    mole.detach(pipe)
    hosts.assert_same(before, hosts.snapshot(pipe))
    assert torch.equal(hosts.draw(pipe, options, PROMPT), base)
    hosts.load_adapters(pipe, files)
    torch.testing.assert_close(hosts.draw(pipe, options, PROMPT), unbound, atol=1e-5, rtol=0)
    assert not torch.allclose(unbound, base, atol=1e-2)
    assert not torch.allclose(unbound, bound, atol=1e-4)


@pytest.mark.parametrize("name", thorough(*LAST))
@pytest.mark.parametrize("words", ["fox", None])
@pytest.mark.shows("Words and places")
def test_a_given_region_acts_inside_it_alone(name, words, tmp_path, monkeypatch):
    """Of a LoRA for the last layer, which mixes no tokens: inside, it is as without a region; outside, the base is drawn."""
    monkeypatch.setattr(bound_text, "MASK_BIAS", 0.0)  # closing the words would change the base, too
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


@torch.no_grad()
def test_a_given_region_reaches_the_embedder_of_z_image(tmp_path):
    """It gets the tokens of all pictures one after the other."""
    pipe, options = hosts.HOSTS["z_image"]()
    file = tiny_lora(pipe, tmp_path / "fox", ends=("x_embedder.2-1",))

    def embedded():
        kept = []
        layer = pipe.transformer.all_x_embedder["2-1"]
        handle = layer.register_forward_hook(lambda _, args, out: kept.append(out.unflatten(0, (-1, 8, 8))))
        hosts.draw(pipe, options | {"negative_prompt": PROMPT}, PROMPT, steps=1)
        handle.remove()
        return kept[0]  # [B, rows, columns, C]

    base = embedded()
    mixture = mole.attach(pipe, {"fox": file}, "sum", binding=None)
    whole = embedded()
    assert len(base) == 2  # guidance
    mixture.bind({"fox": (None, "left")})
    wanted = torch.cat([whole.chunk(2, 2)[0], base.chunk(2, 2)[1]], 2)
    torch.testing.assert_close(embedded(), wanted, atol=1e-6, rtol=0)
    assert not torch.isclose(base, whole, atol=1e-4).all(-1).any()


@pytest.mark.usefixtures("decided")
@pytest.mark.parametrize("drawn", ["qwen", *thorough(*(name for name in LAST if name != "qwen"))], indirect=True)
@pytest.mark.shows("Words and places")
def test_subjects_of_a_list_get_places_from_attention(drawn):
    pipe, options, files = drawn
    mixture = mole.attach(pipe, files, "sum", binding={"fox": "fox", "owl": "owl"})
    with mixture.trace() as trace:
        hosts.draw(pipe, options, PROMPT)
    (layout,) = trace.layouts
    assert set(layout.regions) == set(layout.maps) == {"fox", "owl"}
    assert not torch.allclose(layout.regions["fox"], layout.regions["owl"])


ACTING = ["sd15", "sd21", "sdxl", "animatediff", "sd3", "flux", *LAST]


VIDEOS = {"wan": "WanTransformer3DModel", "ltx": "LTXVideoTransformer3DModel"}


@pytest.mark.parametrize("name", [*VIDEOS, *ACTING[:4], *thorough(*ACTING[4:])])
@pytest.mark.shows("Words and places")
def test_a_region_acts_or_is_refused(name, tmp_path):
    pipe, options = hosts.HOSTS[name]()
    mixture = mole.attach(pipe, {"fox": tiny_lora(pipe, tmp_path / "fox", ends=LAYERS + FEED_FORWARD)}, "sum", binding=None)
    unbound, bound = hosts.draw(pipe, options), {"fox": (None, "left")}
    if name in ACTING:
        mixture.bind(bound)
        assert not torch.allclose(hosts.draw(pipe, options), unbound, atol=1e-4)
    else:
        for attempt in (mixture.bind, lambda bound: mole.attach(pipe, mixture.experts, binding=bound)):
            with pytest.raises(ValueError, match=f"a {VIDEOS[name]} has no regions, and one was given for 'fox'"):
                attempt(bound)
        assert torch.equal(hosts.draw(pipe, options), unbound)


class Masks(TorchFunctionMode):
    """Keeps the masks of PyTorch's attention that are not of whole rows."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        mask = (kwargs or {}).get("attn_mask")
        if func is F.scaled_dot_product_attention and mask is not None and mask.dtype != torch.bool:
            self.kept.append(mask)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("drawn", ["anima"], indirect=True)
def test_words_are_closed_outside_of_their_regions_in_anima(drawn):
    """Its attention takes a mask for all heads."""
    pipe, options, files = drawn
    mole.attach(pipe, files, "sum", binding={"fox": ("fox", "left"), "owl": ("owl", "right")})
    with Masks() as masks:
        hosts.draw(pipe, options, PROMPT, steps=1)
    tokens, wanted = tokens_of("anima", pipe), torch.zeros(8, 8, 64)
    wanted[:, 4:, tokens.index("f") : tokens.index("f") + 3] = -bound_text.MASK_BIAS
    wanted[:, :4, tokens.index("w") - 1 : tokens.index("w") + 2] = -bound_text.MASK_BIAS
    assert masks.kept
    assert all(torch.equal(mask, wanted.flatten(0, 1)[None, None]) for mask in masks.kept)


@pytest.mark.parametrize("drawn", ["anima"], indirect=True)
def test_maps_in_anima_are_what_it_attends_to(drawn, tmp_path):
    """Of the first of its two blocks, which this LoRA does not change."""
    pipe, options, _ = drawn
    file = tiny_lora(pipe, tmp_path / "last", ends=("1.ff.net.2",))
    mixture = mole.attach(pipe, {"fox": file, "owl": file}, "sum", binding={"fox": "fox", "owl": "owl"})
    attention = pipe.transformer.transformer_blocks[0].attn2
    heard = []
    for norm in (attention.norm_q, attention.norm_k):
        norm.register_forward_hook(lambda _, args, out: heard.append(out) if out.shape[1] == attention.heads else None)
    with mixture.trace(maps=True) as trace, pytest.warns(UserWarning, match="no places of their own"):
        hosts.draw(pipe, options, PROMPT, steps=1)
    (query, *_), (key, *_) = heard[:2]  # [heads, T or S, D]
    shares, tokens = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1).mean(0), tokens_of("anima", pipe)
    for name in ("fox", "owl"):
        start = next(i for i in range(len(tokens)) if tokens[i : i + len(name)] == list(name))
        wanted = shares[:, start : start + len(name)].mean(1).reshape(8, 8)
        wanted = (wanted - wanted.min()) / (wanted.max() - wanted.min())
        torch.testing.assert_close(trace.maps[0][0][name], wanted, atol=1e-4, rtol=0)


def test_prompts_of_several_lengths_have_no_places_in_lumina_2(tmp_path):
    """Each row's picture begins where its own text ends."""
    pipe, options = hosts.HOSTS["lumina2"]()
    file = tiny_lora(pipe, tmp_path / "fox", ends=(LAST["lumina2"],))
    mole.attach(pipe, {"fox": file}, "sum", binding={"fox": (None, "left")})
    negative = {"negative_prompt": ["a", "an owl"]}
    with pytest.warns(UserWarning, match="the region of 'fox' does not act"):
        hosts.draw(pipe, options | negative, [PROMPT, "a fox"], steps=1)


def test_a_region_acts_inside_it_alone_on_a_picture_that_hidream_pads(tmp_path, monkeypatch):
    """It pads what is not square, and the text's tokens come behind the padding."""
    monkeypatch.setattr(bound_text, "MASK_BIAS", 0.0)
    pipe, options = hosts.HOSTS["hidream"]()
    options |= {"height": 16, "width": 64, "max_sequence_length": 64, "output_type": "latent"}
    file = tiny_lora(pipe, tmp_path / "fox", ends=(LAST["hidream"],))
    base = hosts.draw(pipe, options, PROMPT, steps=1)
    assert base.shape == (1, 4, 8, 32)
    mixture = mole.attach(pipe, {"fox": file}, "sum", binding=None)
    whole = hosts.draw(pipe, options, PROMPT, steps=1)
    mixture.bind({"fox": ("fox", "left")})
    wanted = torch.cat([whole.chunk(2, -1)[0], base.chunk(2, -1)[1]], -1)
    torch.testing.assert_close(hosts.draw(pipe, options, PROMPT, steps=1), wanted, atol=1e-6, rtol=0)
    assert not torch.isclose(base, whole, atol=1e-4).all(1).any()
    monkeypatch.undo()
    both = {n: tiny_lora(pipe, tmp_path / n, seed=i, ends=LAYERS) for i, n in enumerate(("fox", "owl"))}
    mixture = mole.attach(pipe, both, "sum", binding={"fox": "fox", "owl": "owl"})
    with mixture.trace() as trace:
        hosts.draw(pipe, options, PROMPT)
    (layout,) = trace.layouts
    assert layout.maps["fox"].shape == (4, 16)


def test_every_record_is_drawn_here():
    assert {type(hosts.denoiser(hosts.HOSTS[name]()[0])).__name__ for name in (*ACTING, *VIDEOS)} == set(RECORDS)


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
