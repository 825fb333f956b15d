"""Binding on real hosts: which expert acts on which token, against the same sums written out here."""

import copy
import warnings
from contextlib import nullcontext

import hosts
import pytest
import torch
from diffusers import StableDiffusion3PAGPipeline, StableDiffusionPipeline
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_dispatch import attention_backend
from gate_families import LEARNED, families
from PIL import Image
from tiers import thorough
from torch import nn
from torch.overrides import TorchFunctionMode

import mole_diffusers as mole
from mole_diffusers.binding.config import Bound
from mole_diffusers.binding.regions import region_mask
from mole_diffusers.patching.gating import bound_text
from mole_diffusers.patching.gating.settings import PlainSum
from mole_diffusers.patching.install.folding import Averages, evaluate_gates
from mole_diffusers.testing import tiny_lora

PROMPT = "a fox+an owl"  # the tiny tokenizer has a token per letter; "fox" is tokens 2..4, "owl" 8..10
FOX, OWL = range(2, 5), range(8, 11)
WORDS = {"fox": "fox", "ink": "owl", "hat": "everywhere"}
IN_A_FOLDER = {"fox": Bound(("fox",), required=True), "ink": Bound(("owl",), required=True)}
HALVES = {"fox": ("fox", "left"), "ink": ("owl", "right"), "hat": "everywhere"}


pytestmark = pytest.mark.usefixtures("decided")


@pytest.fixture
def attach(pipe, loras):
    def attach(binding, gates="sum", names=("fox", "ink", "hat")):
        return mole.attach(pipe, {name: loras[name] for name in names}, gates, binding=binding)

    return attach


def own_words(tokens=16):
    """[T, 3] by hand: the words of fox and owl are closed to the other, and the third expert acts on every word."""
    mask = torch.ones(tokens, 3)
    mask[list(OWL), 0] = 0
    mask[list(FOX), 1] = 0
    return mask


def now(mixture):
    """What binding knows of the text that was drawn last."""
    return mixture._settings.binding.now.text


# ---- nothing is bound


def test_every_word_and_the_whole_picture_are_no_binding(attach, pipe, draw):
    mixture = attach(None)
    unbound = draw(pipe, PROMPT)
    for bound in ("everywhere", (None, (0.0, 0.0, 1.0, 1.0)), (None, Image.new("L", (8, 8), 255))):
        mixture.bind(dict.fromkeys(("fox", "ink", "hat"), bound))
        assert torch.equal(draw(pipe, PROMPT), unbound)


def test_files_without_trigger_words_are_not_bound(attach, pipe, draw):
    attach(None)
    unbound = draw(pipe, PROMPT)
    assert torch.equal(draw(attach("auto")._pipe, PROMPT), unbound)


def test_weights_by_hand_hold_on_every_token(attach, pipe, draw):
    """`fixed` is how one expert alone and the plain sum are drawn beside a mixture."""
    weights = {"fox": 1.0, "ink": 0.5, "hat": 0.0}
    mixture = attach(HALVES)
    with mixture.bound(None), mixture.fixed(weights):
        unbound = draw(pipe, PROMPT)
    with mixture.fixed(weights):
        assert torch.equal(draw(pipe, PROMPT), unbound)
    assert not torch.equal(draw(pipe, PROMPT), unbound)


SHARED = "'fox' and 'ink' share the words 'fox' and a place"
SAME = "'fox' and 'fox' were given the same region"


@pytest.mark.parametrize(
    ("binding", "warned"),
    [
        *thorough(({"fox": "fox", "ink": "fox", "hat": "owl"}, SHARED)),
        ({"fox": ("fox", "left"), "ink": ("fox", "left"), "hat": "owl"}, SAME),
        ({"fox": ("fox", "left"), "ink": ("fox", "right"), "hat": "owl"}, ""),
        ({"fox": ("fox", "left"), "ink": ("owl", "left"), "hat": "fox"}, "'fox' and 'owl' were given the same region"),
        *thorough((HALVES, "")),
    ],
)
def test_several_experts_in_one_place_are_told_of(attach, pipe, draw, binding, warned):
    mixture = attach(binding)
    if warned != SHARED:
        mixture.strength("hat", 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):  # the warning comes once in each call, and is kept
            draw(pipe, PROMPT)
    told = mixture.binding_warnings
    assert [text.partition(":")[0] for text in told] == ([warned] if warned else [])
    assert [str(w.message) for w in caught].count(told[0] if told else "") == 2 * len(told)
    with mixture.only("fox"):
        draw(pipe, PROMPT)
    assert not mixture.binding_warnings


@pytest.mark.parametrize(
    ("given", "warned"),
    [
        ({"fox": ("fox", Image.new("L", (8, 8), 0)), "ink": "owl"}, "expert 'fox' acts nowhere: its region is empty"),
        ({"fox": ("fox", (0, 0, 1, 1)), "ink": "owl"}, "the given regions leave 'owl' no place"),
        ({"fox": ("cat", "left"), "ink": "owl"}, ""),
    ],
)
def test_a_region_that_leaves_somebody_no_place_is_told_of_at_every_call(attach, pipe, draw, given, warned):
    mixture = attach(given, names=("fox", "ink"))
    for _ in range(2):
        with pytest.warns(UserWarning, match=warned) if warned else nullcontext():
            draw(pipe, PROMPT)
    assert len(mixture.binding_warnings) == bool(warned)
    assert now(mixture).image[:, 1].min() == (warned != "expert")  # the owl acts in the whole picture


# ---- words


def test_without_an_expert_the_base_is_drawn_and_its_attention_read(attach, pipe, draw):
    base = draw(pipe, PROMPT, num_inference_steps=4)
    mixture = attach(WORDS)
    bound = draw(pipe, PROMPT, num_inference_steps=4)
    for off in (mixture.only(), mixture.strengths(dict.fromkeys(mixture.experts, 0))):
        with off, mixture.trace(maps=True) as trace:
            assert torch.equal(draw(pipe, PROMPT, num_inference_steps=4), base)
        assert [*trace.maps] == [0, 1, 2, 3]
    assert torch.equal(draw(pipe, PROMPT, num_inference_steps=4), bound)
    with mixture.only("hat"):  # one alone is the plain LoRA
        beside = draw(pipe, PROMPT)
    torch.testing.assert_close(beside, draw(attach(None, names=["hat"])._pipe, PROMPT), atol=1e-5, rtol=0)


@pytest.mark.parametrize("gates", families("mole", among=["sum", *LEARNED]))
def test_an_absent_word_is_strength_0_in_a_folder(attach, pipe, draw, awake, gates):
    mixture = awake(attach({"fox": "fox", "ink": Bound(("cat",), required=True), "hat": "everywhere"}, gates))
    with pytest.warns(UserWarning, match="expert 'ink' is silent: the prompt has none of its words, cat"):
        absent = draw(pipe, PROMPT)
    mixture.bind({"ink": "everywhere"})
    mixture.strength("ink", 0)
    assert torch.equal(draw(pipe, PROMPT), absent)


def test_prompts_of_a_batch_silence_experts_row_by_row(attach, pipe, draw):
    """The same pictures as one by one, whichever words each prompt has."""
    attach({name: Bound((word,), required=True) for name, word in {"fox": "fox", "ink": "owl", "hat": "cat"}.items()})
    generators = [torch.Generator().manual_seed(0) for _ in range(3)]
    prompts = ["a fox", "a cat owl", "a house"]
    options = {"num_inference_steps": 2, "output_type": "np"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        together = torch.from_numpy(pipe(prompts, generator=generators, **options).images)
        alone = torch.cat([draw(pipe, prompt) for prompt in prompts])
        mole.detach(pipe)
        base = draw(pipe, "a house")
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=0)
    torch.testing.assert_close(together[2:], base, atol=2e-5, rtol=0)  # the base, though others of the batch have experts


@pytest.mark.parametrize("guidance", [3.0, *thorough(1.0)])
@pytest.mark.parametrize("prompts", [("a fox", "a house"), ("a house", "a fox")])
def test_a_second_pipeline_draws_each_picture_of_a_batch_as_alone(attach, pipe, prompts, guidance):
    """Nobody says whether it guides, whichever of the prompts has words."""
    attach({"fox": "fox", "ink": "owl"}, names=("fox", "ink"))
    second = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    second.set_progress_bar_config(disable=True)

    def drawn(of, prompts):
        generators = [torch.Generator().manual_seed(len(prompt)) for prompt in prompts]
        options = {"num_inference_steps": 2, "guidance_scale": guidance, "output_type": "np"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.from_numpy(of(list(prompts), generator=generators, **options).images)

    alone = torch.cat([drawn(pipe, [prompt]) for prompt in prompts])
    torch.testing.assert_close(drawn(second, prompts), alone, atol=2e-5, rtol=0)


def test_a_word_of_two_experts_is_shared(attach, pipe):
    mixture = attach({"fox": "fox", "ink": "fox", "hat": "owl"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe(PROMPT, num_inference_steps=1, output_type="latent")
    text = now(mixture).word_mask[-1]
    assert torch.equal(text[:, 0], text[:, 1])
    assert not text[list(FOX), 2].any()
    assert text[list(FOX), 0].all()


def test_each_text_is_encoded_with_its_own_masks(attach, pipe):
    """Two texts in one call, whose words stand in other places; the same states as each alone."""
    attach(WORDS)
    texts, found = [PROMPT, "an owl+a fox"], []
    with torch.no_grad():
        for text in (*texts, *texts):
            ids = pipe.tokenizer(text, padding="max_length", return_tensors="pt").input_ids
            found.append(pipe.text_encoder(ids)[0])
    alone = []
    for text in texts:
        attach(WORDS)
        with torch.no_grad():
            alone.append(pipe.text_encoder(pipe.tokenizer(text, padding="max_length", return_tensors="pt").input_ids)[0])
    for one, other in zip(found, alone * 2, strict=True):
        assert torch.equal(one, other)


def test_negative_prompts_are_read_by_their_own_words(attach, pipe):
    mixture = attach(WORDS)
    pipe(PROMPT, negative_prompt="an owl", num_inference_steps=1, output_type="latent")
    negative, positive = now(mixture).word_mask.float()
    torch.testing.assert_close(positive, own_words())
    assert not negative[list(range(3, 6)), 0].any()  # the owl's word there
    assert negative[:, 0].sum() == len(negative) - 3
    assert negative[:, 1].all()


# ---- places


def test_outside_its_half_an_expert_changes_no_layer(attach, pipe):
    """Layer by layer, before attention mixes places: the outputs of expert layers on the same input."""
    mixture = attach({"fox": (None, "left")}, names=("fox",))
    seen = {}
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    layer = pipe.unet.get_submodule(name)
    hook = layer.register_forward_hook(lambda m, args, out: seen.update(x=args[0].detach().clone(), y=out.detach().clone()))
    pipe(PROMPT, num_inference_steps=1, output_type="latent")
    hook.remove()
    plain = layer.get_base_layer()(seen["x"])
    inside = region_mask("left", 8, 8).flatten().bool()
    torch.testing.assert_close(seen["y"][:, ~inside], plain[:, ~inside], atol=1e-6, rtol=0)
    assert (seen["y"][:, inside] - plain[:, inside]).abs().amax() > 1e-3
    assert mixture.binding["fox"].region == "left"


def test_swapping_two_experts_words_swaps_their_maps_and_regions(attach, pipe):
    """Hardly any strength, so that the pictures are the same."""
    layouts = []
    for words in ({"fox": "fox", "ink": "owl"}, {"fox": "owl", "ink": "fox"}):
        mixture = attach(words, names=("fox", "ink"))
        for name in words:
            mixture.strength(name, 1e-30)
        generator = torch.Generator().manual_seed(0)
        pipe(PROMPT, num_inference_steps=2, output_type="latent", generator=generator, guidance_scale=1)
        layouts += mixture.layouts
    first, second = layouts
    for found in ("maps", "regions"):
        one, other = getattr(first, found), getattr(second, found)
        assert torch.equal(one["fox"], other["ink"])
        assert torch.equal(one["ink"], other["fox"])
        assert not torch.equal(one["fox"], one["ink"])


@pytest.mark.thorough
def test_permuting_experts_changes_nothing(attach, pipe, draw):
    pictures = []
    for names in (("fox", "ink", "hat"), ("hat", "ink", "fox")):
        attach(HALVES, names=names)
        pictures.append(draw(pipe, PROMPT))
    torch.testing.assert_close(*pictures, atol=2e-5, rtol=0)


def test_a_map_is_the_mean_attention_to_its_words(pipe, attach):
    mixture = attach({"fox": "fox", "ink": "owl"}, names=("fox", "ink"))
    pipe(PROMPT, num_inference_steps=1, output_type="latent", guidance_scale=1)
    masks = mixture._settings.binding.now
    probabilities = torch.rand(1, 64, 16, generator=torch.Generator().manual_seed(0))
    text, latents = mixture._sampling.tokens._known[-1].states[0], torch.zeros(1, 4, 8, 8)
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

    mixture._settings.binding.now.add_maps = lambda probabilities: read.append(probabilities)
    attention = pipe.unet.get_submodule("down_blocks.1.attentions.0.transformer_blocks.0.attn2")
    hook = attention.register_forward_pre_hook(keep, with_kwargs=True)
    pipe(PROMPT, num_inference_steps=1, output_type="latent", guidance_scale=1)
    hook.remove()
    x, text = inputs[0]
    q, k = attention.to_q.get_base_layer()(x), attention.to_k.get_base_layer()(text)
    q, k = (v.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for v in (q, k))
    by_hand = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean(1)
    torch.testing.assert_close(read[0], by_hand, atol=1e-6, rtol=1e-5)


def by_hand(steps, tokens, side):
    """Each thing's map at each step: steps has lists of (q, k) [heads, T or S, D], one for each layer that is read."""
    found = []
    for layers in steps:
        total = torch.zeros(len(tokens), *side)
        for q, k in layers:
            shares = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean(0)  # [T, S]
            for i, words in enumerate(tokens):
                map_ = shares[:, list(words)].mean(1).reshape(side)
                total[i] += (map_ - map_.min()) / (map_.max() - map_.min())
        found.append(total)
    return found


@pytest.mark.parametrize("binding", [{"fox": "fox", "ink": "owl"}, *thorough(HALVES, {"fox": "fox", "ink": "everywhere"})])
def test_a_trace_keeps_the_maps_of_every_step(pipe, attach, draw, binding):
    """With places that are found or given, and for a thing that needs none."""
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
    assert not mixture._sampling.listeners.maps.now
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


def test_a_region_of_one_and_attention_for_the_others(attach, pipe):
    mixture = attach({"fox": ("fox", "right"), "ink": "owl"}, names=("fox", "ink"))
    pipe(PROMPT, num_inference_steps=2, output_type="latent", guidance_scale=1)
    fox, owl = now(mixture).image[0]
    assert torch.equal(fox, region_mask("right", 16, 16))
    assert (owl * fox).sum() == 0
    assert owl.sum() > 0


def test_a_lora_of_two_things_has_the_places_of_both(attach, pipe):
    """Each word is closed in the place of the other, as where two LoRAs have these words."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for binding in ({"fox": "fox", "ink": "owl"}, {"fox": ["fox", "owl"]}):
        mixture = attach(binding, names=tuple(binding))
        for name in binding:
            mixture.strength(name, 1e-30)
        pipe("a fox and an owl", num_inference_steps=2, output_type="latent", generator=generator.manual_seed(0))
        found.append((now(mixture), mixture.layouts[0]))
    (two, places), (one, place) = found
    assert torch.equal(one.image[:, 0], torch.maximum(two.image[:, 0], two.image[:, 1]))
    assert torch.equal(place.regions["fox"], torch.maximum(places.regions["fox"], places.regions["ink"]))
    assert any(bias.any() for bias in one.biases.values())
    for side, bias in one.biases.items():
        assert torch.equal(bias, two.biases[side])


def test_one_thing_alone_has_the_whole_picture(attach, pipe):
    mixture = attach({"fox": "fox"}, names=("fox",))
    pipe("a fox", num_inference_steps=2, output_type="latent")
    assert not now(mixture).binds


# ---- the same sums written out


class Reference:
    """The base with every expert's change added layer by layer, token by token, and closed words in cross-attention."""

    def __init__(self, pipe, files, text_masks, regions, closing):
        self.pipe, self.text_masks, self.regions, self.closing = pipe, text_masks, regions, closing
        self.experts = [mole.read_expert(path, name) for name, path in files.items()]
        self.encoding = iter(())
        for part in ("unet", "text_encoder"):
            model = getattr(pipe, part)
            for name, module in model.named_modules():
                key = name.replace(".", "_")
                deltas = [
                    (k, e.layers[part][key].delta()) for k, e in enumerate(self.experts) if key in e.layers.get(part, {})
                ]
                if deltas:
                    module.register_forward_hook(self.add(part, name, deltas))
        pipe.text_encoder.register_forward_pre_hook(lambda *_: setattr(self, "text", next(self.encoding)))
        for name, module in pipe.unet.named_modules():
            if name.endswith("attn2"):
                module.set_processor(self.cross)

    def add(self, part, name, deltas):
        def hook(module, args, out):
            x = args[0]
            for k, delta in deltas:
                if isinstance(module, nn.Conv2d):
                    change = nn.functional.conv2d(x, delta.reshape(module.weight.shape), None, module.stride, module.padding)
                    mask = torch.stack([region_mask(self.regions[k], *change.shape[2:])])[:, None]
                elif x.dim() == 2:
                    change, mask = nn.functional.linear(x, delta), torch.ones(())
                else:
                    change = nn.functional.linear(x, delta)
                    if part == "text_encoder":
                        mask = self.text_masks[self.text][None, :, k, None]
                    elif name.endswith(("attn2.to_k", "attn2.to_v")):
                        mask = torch.stack([m[:, k, None] for m in self.text_masks])
                    else:
                        side = int(x.shape[1] ** 0.5)
                        mask = region_mask(self.regions[k], side, side).reshape(1, -1, 1)
                out = out + change * mask
            return out

        return hook

    def cross(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        q, k, v = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        side = int(hidden_states.shape[1] ** 0.5)
        for row in range(1, len(logits)):  # the first row is unconditional
            for words, region in ((FOX, "left"), (OWL, "right")):
                outside = 1 - region_mask(region, side, side).flatten()
                logits[row, :, :, list(words)] -= self.closing * outside[:, None]
        return attn.to_out[1](attn.to_out[0]((logits.softmax(-1) @ v).transpose(1, 2).flatten(2)))

    def __call__(self, draw):
        self.encoding = iter((1, 0))  # the prompt is encoded first, then the empty one
        return draw(self.pipe, PROMPT)


@pytest.mark.parametrize("closing", [*thorough(0.0), 8.0])
def test_a_bound_picture_is_the_sums_written_out(attach, pipe, loras, draw, closing, monkeypatch):
    host = copy.deepcopy(pipe)
    monkeypatch.setattr(bound_text, "CLOSING", closing)
    attach(HALVES)
    bound = draw(pipe, PROMPT)
    reference = Reference(host, loras, [torch.ones(16, 3), own_words()], ["left", "right", (0.0, 0.0, 1.0, 1.0)], closing)
    torch.testing.assert_close(bound, reference(draw), atol=2e-5, rtol=0)


# ---- how it is used


def test_several_pictures_of_a_prompt_each_have_their_own_layout(attach, pipe):
    mixture = attach({"fox": "fox", "ink": "owl"}, names=("fox", "ink"))
    pipe(PROMPT, num_inference_steps=2, num_images_per_prompt=3, output_type="latent")
    assert len(mixture.layouts) == 3  # of conditional rows; the others borrow from them
    assert torch.equal(now(mixture).image[0], now(mixture).image[3])


def test_each_call_plans_its_own_layout(attach, pipe):
    """Though the text's states are the same object; other noise, other maps."""
    mixture = attach({"fox": "fox", "ink": "owl"}, names=("fox", "ink"))
    embeds, _ = pipe.encode_prompt(PROMPT, "cpu", 1, False)
    maps = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        pipe(prompt_embeds=embeds, num_inference_steps=3, output_type="latent", guidance_scale=1, generator=generator)
        maps.append(mixture.layouts[0].maps["fox"])
    assert not torch.equal(*maps)


def test_a_text_that_is_copied_at_every_step_is_one_text(attach, pipe, draw):
    """As by hooks that cast a model's inputs."""
    attach({"fox": "fox", "ink": "owl"}, names=("fox", "ink"))
    expected = draw(pipe, PROMPT, num_inference_steps=4)

    def copy_inputs(_, args, kwargs):
        return tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args), {
            k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()
        }

    hook = pipe.unet.register_forward_pre_hook(copy_inputs, with_kwargs=True, prepend=True)
    assert torch.equal(draw(pipe, PROMPT, num_inference_steps=4), expected)
    hook.remove()


def test_states_of_elsewhere_are_not_bound_and_say_so(attach, pipe):
    attach(HALVES)
    before = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0]
    for states in (torch.randn(1, 16, 16), before):
        mixture = attach(HALVES)
        with pytest.warns(UserWarning, match="words are not known, .* before LoRAs or gates were last attached"):
            pipe(prompt_embeds=states, num_inference_steps=1, output_type="latent", guidance_scale=1)
        assert now(mixture).word_mask is None


def test_weighted_words_are_found_by_their_direction(attach, pipe):
    mixture = attach(WORDS)
    embeds, _ = pipe.encode_prompt(PROMPT, "cpu", 1, False)
    pipe(prompt_embeds=1.3 * embeds, num_inference_steps=1, output_type="latent", guidance_scale=1)
    torch.testing.assert_close(now(mixture).word_mask[0].float(), own_words())


def test_a_long_prompt_is_read_in_parts(attach, pipe):
    mixture = attach(WORDS)
    parts = [pipe.encode_prompt(text, "cpu", 1, False)[0] for text in ("a house", PROMPT)]
    pipe(prompt_embeds=torch.cat(parts, 1), num_inference_steps=1, output_type="latent", guidance_scale=1)
    text = now(mixture).word_mask[0].float()
    torch.testing.assert_close(text[16:], own_words())
    assert text[:16].all()


@pytest.mark.thorough
def test_clip_skip_finds_the_words(attach, pipe):
    mixture = attach(WORDS)
    pipe(PROMPT, clip_skip=1, num_inference_steps=1, output_type="latent", guidance_scale=1)
    torch.testing.assert_close(now(mixture).word_mask[0].float(), own_words())


def test_bound_is_for_a_block_and_bind_stays(attach, pipe, draw):
    mixture = attach(None)
    unbound = draw(pipe, PROMPT)
    with mixture.bound(HALVES):
        inside = draw(pipe, PROMPT)
        assert mixture.binding["fox"].region == "left"
    assert mixture.binding is None
    assert torch.equal(draw(pipe, PROMPT), unbound)
    mixture.bind(HALVES)
    assert torch.equal(draw(pipe, PROMPT), inside)
    mixture.bind(None)
    assert torch.equal(draw(pipe, PROMPT), unbound)
    with pytest.raises(ValueError, match="region of 'fox'"):
        mixture.bind({"fox": ("fox", "nowhere")})
    assert mixture.binding is None


def test_gates_learn_under_binding(attach, pipe, awake):
    """Gradients reach the gates through the masks, and nothing else."""
    mixture = awake(attach(WORDS, "mole"))
    ids = pipe.tokenizer(PROMPT, padding="max_length", return_tensors="pt").input_ids
    text = pipe.text_encoder(ids)[0]
    pipe.unet(torch.randn(1, 4, 16, 16), torch.tensor([10]), text).sample.square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in mixture.parameters())
    assert all(p.grad is None for n, p in pipe.unet.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("slicing", [False, *thorough(True)])
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


def test_detach_is_exact_after_bound_pictures(attach, pipe, draw):
    before = draw(pipe, PROMPT)
    attach(HALVES)
    draw(pipe, PROMPT)
    mole.detach(pipe)
    assert torch.equal(draw(pipe, PROMPT), before)


def test_a_second_pipeline_draws_each_picture_anew(attach, pipe):
    """Its calls are not watched: what was known of the picture before does not stay."""
    mixture = attach({"fox": "fox", "ink": "owl"}, names=("fox", "ink"))
    second = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    second.set_progress_bar_config(disable=True)

    def picture(of, **size):
        generator = torch.Generator().manual_seed(0)
        return torch.from_numpy(of(PROMPT, num_inference_steps=3, output_type="np", generator=generator, **size).images)

    wide, tall = {"width": 64, "height": 32}, {"width": 32, "height": 64}
    with mixture.tiled(0):
        expected = {str(size): picture(pipe, **size) for size in (wide, tall)}
    for size in (wide, wide, tall, wide):
        torch.testing.assert_close(picture(second, **size), expected[str(size)], atol=1e-5, rtol=0)


def test_steps_by_hand_after_a_call_are_another_picture(attach, pipe):
    """Of the same states: other noise, other maps."""
    mixture = attach({"fox": "fox", "ink": "owl"}, names=("fox", "ink"))
    states, _ = pipe.encode_prompt(PROMPT, "cpu", 1, False)

    @torch.no_grad()
    def by_hand():
        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
        for time in (900, 600, 300):
            x = x - 0.1 * pipe.unet(x, torch.tensor(time), states).sample
        return mixture.layouts[0].maps["fox"]

    pipe(prompt_embeds=states, num_inference_steps=2, output_type="latent", guidance_scale=1)
    of_the_call = mixture.layouts[0].maps["fox"]
    found = by_hand()
    assert not torch.equal(found, of_the_call)
    assert torch.equal(found, by_hand())


def test_a_prompt_that_loses_its_words_midway_silences_their_experts(attach, pipe):
    """Guidance's rows stand beside it, so it is no negative prompt of a call of its own."""
    mixture = attach(IN_A_FOLDER, names=("fox", "ink"))
    prompt, empty = pipe.encode_prompt("a tree", "cpu", 1, True, "")

    def change(pipe, step, timestep, kwargs):
        return {"prompt_embeds": torch.cat([empty, prompt])} if step == 0 else {}

    with pytest.warns(UserWarning, match="'fox' is silent"):
        pipe(PROMPT, num_inference_steps=3, output_type="latent", callback_on_step_end=change,
             callback_on_step_end_tensor_inputs=["prompt_embeds"])  # fmt: skip
    assert now(mixture).silence.experts == (True, True)


@pytest.mark.thorough
def test_an_encoder_without_a_tokenizer_has_no_words_of_another(tmp_path):
    pipe, _ = hosts.HOSTS["sdxl"]()
    files = {n: tiny_lora(pipe, tmp_path / f"{n}.safetensors", seed=i) for i, n in enumerate(("fox", "ink"))}
    ids = torch.tensor([pipe.tokenizer(PROMPT, padding="max_length").input_ids])
    pipe.tokenizer_2 = None
    mole.attach(pipe, files, binding=None)
    unbound = pipe.text_encoder_2(ids)[0]
    mole.attach(pipe, files, binding={"fox": "fox", "ink": "cat"})
    pipe.text_encoder(ids)
    assert torch.equal(pipe.text_encoder_2(ids)[0], unbound)


def test_a_word_of_two_experts_is_open_where_either_stands(attach, pipe):
    mixture = attach({"fox": "fox", "ink": "fox", "hat": "owl"})
    pipe(PROMPT, num_inference_steps=2, output_type="latent", guidance_scale=1)
    layout = mixture.layouts[0].regions
    assert torch.equal(layout["fox"], layout["ink"])
    closed = now(mixture).picture.closed_words((16, 16))[0]
    assert torch.equal(closed[:, FOX[0]].reshape(16, 16), 1 - layout["fox"])


@pytest.mark.parametrize("given", ["left", *thorough("top", ((0.3, 0.3, 0.7, 0.7),))])
def test_beside_a_given_region_everyone_has_a_place(attach, pipe, given):
    mixture = attach({"fox": ("fox", given), "ink": "owl", "hat": "a"})
    pipe("fox+owl+a", num_inference_steps=2, output_type="latent", guidance_scale=1)
    regions = mixture.layouts[0].regions
    assert min(regions[name].mean() for name in ("fox", "ink", "hat")) > 0.1
    assert sum(regions.values()).max() <= 1


def test_what_has_no_place_is_named(attach, pipe):
    attach({"fox": "fox", "ink": "owl"}, names=("fox", "ink"))
    with pytest.warns(UserWarning, match="'fox' and 'owl' got no places of their own"):
        pipe(PROMPT, num_inference_steps=1, output_type="latent")


@pytest.mark.thorough
def test_a_layout_stays_when_guidance_ends_midway(attach, pipe):
    mixture, seen = attach({"fox": "fox", "ink": "owl"}, names=("fox", "ink")), []

    def end_guidance(pipe, step, timestep, kwargs):
        seen.append(mixture.layouts[0].regions)
        if step == 1:
            pipe._guidance_scale = 0.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[-1]
        return kwargs

    inputs = ["prompt_embeds"]
    pipe(PROMPT, num_inference_steps=5, output_type="latent", callback_on_step_end=end_guidance,
         callback_on_step_end_tensor_inputs=inputs)  # fmt: skip
    assert torch.equal(seen[1]["fox"], seen[-1]["fox"])
    assert now(mixture).image.shape[0] == 1


@pytest.mark.thorough
def test_averages_of_several_prompts_count_each(attach, pipe):
    mixture = attach({"fox": "fox", "ink": "owl"}, names=("fox", "ink"))
    found = []
    for prompts in (["a fox", "an owl"], ["an owl", "a fox"]):
        averages = Averages()
        with warnings.catch_warnings(), mixture.listen(averages):
            warnings.simplefilter("ignore")
            evaluate_gates(pipe, mixture._components, prompts)
        found.append({key: weights for key, weights in averages.weights.items() if key[0].startswith("unet")})
    for (place, present), weights in found[0].items():
        torch.testing.assert_close(weights, 0.5 * torch.tensor(present))
        torch.testing.assert_close(weights, found[1][place, present])


# ---- other hosts


class OneEncoder:
    """A plan in which some experts do not act on some components."""

    def __init__(self, absent, count):
        self.absent, self.count = absent, count

    def part(self, part):
        return [0.0 if (part, k) in self.absent else 1.0 for k in range(self.count)]

    def block(self, module):
        return [1.0] * self.count

    def gates(self, place):
        return None


@pytest.mark.parametrize("name", ["sdxl", *thorough("sd3")])
def test_words_of_a_second_prompt_are_found_in_its_own_text(name, tmp_path):
    """The other route: an expert is off by hand in the encoder whose text has none of its words."""
    pipe, options = hosts.HOSTS[name]()
    files = {n: tiny_lora(pipe, tmp_path / f"{n}.safetensors", seed=i) for i, n in enumerate(("fox", "ink"))}
    options |= {"guidance_scale": 1.0, "prompt_2": "a fox"}
    mixture = mole.attach(pipe, files, binding=IN_A_FOLDER | {"ink": "everywhere"})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # that it is silent, say
        bound = hosts.draw(pipe, options, "a hen")
    mixture.bind({"ink": IN_A_FOLDER["ink"]})  # in neither text
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = hosts.draw(pipe, options, "a hen")
    mixture.bind(None)
    with mixture.planned(OneEncoder({("text_encoder", 0)}, 2)):
        torch.testing.assert_close(bound, hosts.draw(pipe, options, "a hen"), atol=1e-5, rtol=0)
    with mixture.planned(OneEncoder({("text_encoder", 0)}, 2)), mixture.strengths({"ink": 0}):
        torch.testing.assert_close(alone, hosts.draw(pipe, options, "a hen"), atol=1e-5, rtol=0)
    assert not torch.allclose(bound, hosts.draw(pipe, options, "a hen"), atol=1e-4)


@pytest.mark.parametrize("gates", ["sum", "factors"])
def test_weights_by_hand_know_which_texts_of_a_batch_have_whose_words(attach, pipe, gates):
    mixture = attach({"fox": "fox", "ink": "owl"}, gates, names=("fox", "ink"))

    def encoded(*texts):
        ids = pipe.tokenizer(list(texts), padding="max_length", max_length=16, return_tensors="pt").input_ids
        with torch.no_grad(), mixture.planned(PlainSum(2)):
            return pipe.text_encoder(ids)[0]

    both = encoded("a fox", "an owl")
    torch.testing.assert_close(both, torch.cat([encoded("a fox"), encoded("an owl")]), atol=1e-5, rtol=0)
    with mixture.bound(None):
        assert not torch.allclose(both, encoded("a fox", "an owl"), atol=1e-4)


@pytest.mark.parametrize("name", ["sdxl", *thorough("sd3")])
def test_words_of_two_prompts_share_the_tokens_of_both(name, tmp_path):
    pipe, options = hosts.HOSTS[name]()
    files = {n: tiny_lora(pipe, tmp_path / f"{n}.safetensors", seed=i) for i, n in enumerate(("fox", "ink"))}
    mixture = mole.attach(pipe, files, binding=IN_A_FOLDER)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hosts.draw(pipe, options | {"prompt_2": "a fox"}, "an owl", steps=3)
        assert not mixture.layouts[0].regions  # neither prompt lists them
        own = now(mixture).word_mask[1].clone()
        hosts.draw(pipe, options | {"prompt_2": "an owl"}, "a fox", steps=3)
        assert torch.equal(now(mixture).word_mask[1], own)  # whichever text has which
        hosts.draw(pipe, options, "an owl", steps=1)
        assert now(mixture).silence.experts == (True, False)
    fox, owl = {2, 3, 4}, {3, 4, 5}
    for k, others in ((0, owl - fox), (1, fox - owl)):
        assert (~own[:, k]).nonzero().flatten().tolist() == sorted(others)


def draw_other(other, steps=2):
    words = {"max_sequence_length": 16} if other.name == "flux" else {}  # T5 has a token per letter, too
    return hosts.draw(other.pipe, other.options | words, "fox and owl", steps=steps)


def bound_pictures(other, binding, steps=2):
    mixture = mole.attach(other.pipe, other.files, binding=binding)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return mixture, draw_other(other, steps=steps)


def test_all_words_and_places_are_no_binding_on_any_host(other):
    _, unbound = bound_pictures(other, None)
    _, everywhere = bound_pictures(other, dict.fromkeys(other.files, "everywhere"))
    _, whole = bound_pictures(other, dict.fromkeys(other.files, (None, (0.0, 0.0, 1.0, 1.0))))
    assert torch.equal(everywhere, unbound)
    torch.testing.assert_close(whole, unbound, atol=1e-5, rtol=0)


def test_an_absent_word_is_strength_0_on_any_host(other):
    mixture, absent = bound_pictures(other, {"fox": "fox", "ink": Bound(("cat",), required=True)})
    mixture.bind({"ink": "everywhere"})
    mixture.strength("ink", 0)
    torch.testing.assert_close(draw_other(other), absent, atol=1e-5, rtol=0)


def test_prompts_with_and_without_words_are_drawn_as_alone_on_any_host(other):
    other.attach().bind({"fox": "fox", "ink": "owl"})

    def draw(*prompts):
        generators = [torch.Generator().manual_seed(len(prompt)) for prompt in prompts]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return hosts.draw(other.pipe, other.options | {"generator": generators}, list(prompts))

    torch.testing.assert_close(draw("a house", "a fox"), torch.cat([draw("a house"), draw("a fox")]), atol=1e-4, rtol=0)


def test_a_layout_is_planned_on_any_host(other):
    mixture, picture = bound_pictures(other, {"fox": "fox", "ink": "owl"}, steps=3)
    (layout,) = mixture.layouts
    assert set(layout.regions) == {"fox", "ink"}
    assert torch.equal(layout.regions["fox"] + layout.regions["ink"], torch.ones_like(layout.regions["fox"]))
    assert all(map.shape[0] * map.shape[1] >= 4 and map.max() > 0 for map in layout.maps.values())
    _, unbound = bound_pictures(other, None, steps=3)
    assert (picture - unbound).abs().max() > 1e-3
    mole.detach(other.pipe)
    base = draw_other(other, steps=3)
    absent = {name: Bound((word,), required=True) for name, word in {"fox": "cat", "ink": "dog"}.items()}
    mole.attach(other.pipe, other.files, binding=absent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(draw_other(other, steps=3), base, atol=1e-5, rtol=0)
    mixture, _ = bound_pictures(other, {"fox": "fox", "ink": "owl"}, steps=1)
    with mixture.only():
        torch.testing.assert_close(draw_other(other, steps=3), base, atol=1e-5, rtol=0)


@pytest.mark.parametrize("other", ["flux", *thorough("sd3")], indirect=True)
def test_closed_words_of_joint_attention_are_those_written_out(other, monkeypatch):
    """Logits of the picture's tokens to other experts' words, lowered by hand in a plain attention."""
    binding = {"fox": ("fox", "left"), "ink": ("owl", "right")}
    mixture, closed = bound_pictures(other, binding)
    own = torch.tensor(now(mixture).picture.readings[-1].own).float()  # [N, S]
    conditional = [row for row, prompt in enumerate(now(mixture).picture.prompt_of) if row == prompt]
    height, width = now(mixture).picture.side
    words, tokens = own.shape[1], height * width
    outside = 1 - torch.stack([region_mask(side, height, width).flatten() for side in ("left", "right")])  # [N, T]
    closing = -8.0 * outside.T @ own  # [T, S]

    hosts_own = torch.nn.functional.scaled_dot_product_attention

    def attention(query, key, value, *args, **kwargs):
        if query.shape[2] != words + tokens:
            return hosts_own(query, key, value, *args, **kwargs)
        picture, text = slice(words, None), slice(0, words)
        if other.name == "sd3":
            picture, text = slice(0, tokens), slice(tokens, None)
        logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        for row in conditional:
            logits[row, :, picture, text] += closing
        return logits.softmax(-1) @ value

    monkeypatch.setattr(bound_text, "CLOSING", 0.0)
    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
        by_hand = draw_other(other)
    torch.testing.assert_close(by_hand, closed, atol=1e-4, rtol=0)
    assert (draw_other(other) - closed).abs().max() > 1e-4


def stop(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("other", ["flux"], indirect=True)
def test_ctrl_c_inside_joint_attention_leaves_nothing_behind(other):
    """After a Ctrl-C PyTorch calls no hook."""
    base = draw_other(other, steps=2)
    _, closed = bound_pictures(other, {"fox": ("fox", "left"), "ink": ("owl", "right")}, steps=2)
    hook = other.pipe.transformer.transformer_blocks[0].attn.to_out[0].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        draw_other(other, steps=2)
    hook.remove()
    assert torch.equal(draw_other(other, steps=2), closed)
    mole.detach(other.pipe)
    assert torch.equal(draw_other(other, steps=2), base)


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


class Heard(TorchFunctionMode):
    """Queries and keys of every attention."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.scaled_dot_product_attention:
            given = dict(zip(("query", "key"), args, strict=False)) | (kwargs or {})
            self.calls.append((given["query"], given["key"]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("other", ["flux"], indirect=True)
def test_a_trace_keeps_the_maps_of_joint_attention(other):
    """Of the middle half of the three blocks: the first and the second; the text comes first."""
    mixture = mole.attach(other.pipe, other.files, binding={"fox": "fox", "ink": "owl"})
    with Heard() as heard, mixture.trace(maps=True) as trace, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draw_other(other, steps=3)
    picture = now(mixture).picture
    side, things = picture.side, picture.readings[0].things
    text = len(things[0].tokens)
    joint = [(q[0], k[0]) for q, k in heard.calls if q.shape[2] == text + side[0] * side[1]]
    assert len(joint) == 9
    steps = [[(q[:, text:], k[:, :text]) for q, k in joint[i : i + 2]] for i in (0, 3, 6)]
    tokens = [[t for t, own in enumerate(thing.tokens) if own] for thing in things]
    for (maps,), wanted in zip(trace.maps.values(), by_hand(steps, tokens, side), strict=True):
        assert list(maps) == ["fox", "ink"]
        torch.testing.assert_close(torch.stack(list(maps.values())), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("other", ["flux"], indirect=True)
def test_guidance_by_a_second_text_has_one_layout(other):
    """Flux's true guidance calls the transformer twice a step."""
    mixture = mole.attach(other.pipe, other.files, binding={"fox": "fox", "ink": "owl"})
    options = {"max_sequence_length": 16, "negative_prompt": "a cat", "true_cfg_scale": 2.0, "num_inference_steps": 3}
    other.pipe("fox and owl", output_type="latent", **hosts.SIZE, **options)
    assert set(mixture.layouts[0].regions) == {"fox", "ink"}
    spoken, negative = mixture._settings.binding.now._texts
    assert spoken.image is not None
    assert negative.image is spoken.image
    assert negative.silence.experts == spoken.silence.experts == (False, False)


@pytest.mark.thorough
def test_pictures_of_one_call_have_their_own_layouts_where_guidance_calls_for_each_text(tmp_path):
    pipe, options = hosts.HOSTS["chroma"]()
    files = {n: tiny_lora(pipe, tmp_path / f"{n}.safetensors", seed=i) for i, n in enumerate(("fox", "ink"))}
    mixture = mole.attach(pipe, files, binding={"fox": "fox", "ink": "owl"})
    noise, found = [torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(i)) for i in range(2)], []
    for latents in (torch.cat(noise), *noise):
        options = options | {"max_sequence_length": 16, "latents": latents, "num_inference_steps": 3}
        pipe([PROMPT] * len(latents), output_type="latent", **options)
        found.append([layout.maps["fox"] for layout in mixture.layouts])
    torch.testing.assert_close(found[0], [*found[1], *found[2]], atol=1e-5, rtol=0)


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
    assert whole.amin((1, 2)).tolist() == [0.0] * (guidance > 1) + [-bound_text.CLOSING] * 2
    assert torch.equal(torch.cat([before, perturbed]), whole)


@pytest.mark.parametrize("other", ["flux"], indirect=True)
def test_closed_words_do_not_depend_on_the_attention_backend(other):
    binding = {"fox": ("fox", "left"), "ink": ("owl", "right")}
    _, native = bound_pictures(other, binding)
    mole.detach(other.pipe)
    with attention_backend("native"):  # setting one makes it the default of all models
        other.pipe.transformer.set_attention_backend("_native_flash")  # which refuses masks
        _, other_backend = bound_pictures(other, binding)
    torch.testing.assert_close(other_backend, native, atol=1e-5, rtol=0)
    assert all(p._attention_backend == "_native_flash" for p in other.pipe.transformer.attn_processors.values())


@pytest.mark.parametrize(
    "name", ["sd15-ip-adapter", *thorough("sd15-inpaint", "sd15-img2img", "sd15-controlnet", "sd15-pag", "sdxl-img2img")]
)
def test_binding_is_drawn_under_what_hosts_add(name, tmp_path):
    """The layout is planned, and closing everything everywhere gives the unbound picture."""
    pipe, options = hosts.HOSTS[name]()
    files = {n: tiny_lora(pipe, tmp_path / f"{n}.safetensors", seed=i) for i, n in enumerate(("fox", "ink"))}
    mixture = mole.attach(pipe, files, binding={"fox": "fox", "ink": "owl"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bound = hosts.draw(pipe, options, PROMPT, steps=3)
        assert set(mixture.layouts[0].regions) == {"fox", "ink"}
        with mixture.bound(dict.fromkeys(files, "everywhere")):
            everywhere = hosts.draw(pipe, options, PROMPT, steps=3)
        with mixture.bound(None):
            unbound = hosts.draw(pipe, options, PROMPT, steps=3)
    assert torch.equal(everywhere, unbound)
    assert not torch.equal(bound, unbound)


@pytest.mark.parametrize(("edits", "plain"), [("sd15-pix2pix", "sd15"), *thorough(("sdxl-pix2pix", "sdxl"))])
@pytest.mark.parametrize(("count", "guidance"), [(3, 3.0), *thorough((1, 3.0), (3, 1.0))])
def test_an_edit_that_cannot_see_its_picture_is_an_ordinary_drawing(edits, plain, count, guidance, tmp_path):
    """Pix2Pix has the prompts' rows first, and two groups of other texts; where the picture counts for nothing in the UNet
    its guidance is the ordinary one."""
    (pipe, options), (other, _) = hosts.HOSTS[edits](), hosts.HOSTS[plain]()
    prompts = ["an owl+a fox", "a hen a fox", PROMPT][-count:]
    with torch.no_grad():
        pipe.unet.conv_in.weight[:, 4:] = 0
        states = pipe.unet.state_dict() | {"conv_in.weight": pipe.unet.conv_in.weight[:, :4]}
    other.unet.load_state_dict(states)
    other.text_encoder.load_state_dict(pipe.text_encoder.state_dict())
    other.vae.load_state_dict(pipe.vae.state_dict())
    if hasattr(pipe, "text_encoder_2"):
        other.text_encoder_2.load_state_dict(pipe.text_encoder_2.state_dict())
    files = {n: tiny_lora(pipe, tmp_path / f"{n}.safetensors", seed=i) for i, n in enumerate(("fox", "ink"))}
    noise = torch.randn(len(prompts), 4, 16, 16, generator=torch.Generator().manual_seed(0))
    pictures, regions = [], []
    for one, given in ((pipe, options | {"image": torch.cat([hosts.PICTURE] * len(prompts))}), (other, hosts.SIZE)):
        mixture = mole.attach(one, files, binding={"fox": "fox", "ink": "owl"})
        given = given | {"latents": noise.clone(), "guidance_scale": guidance}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pictures.append(hosts.draw(one, given, prompts, steps=3))
            regions.append([layout.regions for layout in mixture.layouts])
            with mixture.bound(None):
                unbound = hosts.draw(one, given, prompts, steps=3)
        assert not torch.allclose(pictures[-1], unbound, atol=1e-3)
    torch.testing.assert_close(*pictures, atol=1e-5, rtol=0)
    torch.testing.assert_close(*regions)
    assert len(regions[0]) == len(prompts)
    assert set(regions[0][-1]) == {"fox", "ink"}


@pytest.mark.thorough
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
def test_a_unet_compiled_whole_is_bound_in_the_text_alone(attach, pipe, draw):
    """What was drawn before it was compiled leaves no masks behind."""
    torch.compiler.reset()
    mixture = attach(HALVES)
    draw(pipe, PROMPT)
    pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend="eager")
    whole = draw(pipe, PROMPT)
    masks = mixture._settings.binding.now
    masks.on_denoiser = lambda *_, **__: None
    pipe.unet = pipe.unet._orig_mod
    torch.testing.assert_close(draw(pipe, PROMPT), whole, atol=2e-5, rtol=0)


@pytest.mark.thorough
@pytest.mark.parametrize("other", ["flux"], indirect=True)
def test_compiled_blocks_of_a_transformer_are_bound(other):
    torch.compiler.reset()
    mixture, expected = bound_pictures(other, {"fox": "fox", "ink": "owl"}, steps=3)
    other.pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(draw_other(other, steps=3), expected, atol=1e-5, rtol=0)
    assert set(mixture.layouts[0].regions) == {"fox", "ink"}
