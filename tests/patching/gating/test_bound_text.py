"""Places of bound experts: their layouts, and where each acts; against the same sums written out here."""

import copy
import warnings

import pytest
import torch
from bound_pictures import FOX, HALVES, OWL, PROMPT, now, own_words
from diffusers import StableDiffusionPipeline
from tiers import thorough
from torch import nn

import mole_diffusers as mole
from mole_diffusers.binding import region_mask
from mole_diffusers.patching.gating import bound_text

pytestmark = pytest.mark.usefixtures("decided")


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


def test_a_region_of_one_and_attention_for_the_others(attach, pipe):
    mixture = attach({"fox": ("fox", "right"), "ink": "owl"}, names=("fox", "ink"))
    pipe(PROMPT, num_inference_steps=2, output_type="latent", guidance_scale=1)
    fox, owl = now(mixture).region_masks[0]
    assert torch.equal(fox, region_mask("right", 16, 16))
    assert (owl * fox).sum() == 0
    assert owl.sum() > 0


def test_a_lora_of_two_subjects_has_the_places_of_both(attach, pipe):
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
    assert torch.equal(one.region_masks[:, 0], torch.maximum(two.region_masks[:, 0], two.region_masks[:, 1]))
    assert torch.equal(place.regions["fox"], torch.maximum(places.regions["fox"], places.regions["ink"]))
    assert any(bias.any() for bias in one.biases.values())
    for side, bias in one.biases.items():
        assert torch.equal(bias, two.biases[side])


def test_one_subject_alone_has_the_whole_picture(attach, pipe):
    mixture = attach({"fox": "fox"}, names=("fox",))
    pipe("a fox", num_inference_steps=2, output_type="latent")
    assert not now(mixture).binds


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
@pytest.mark.shows("binding: these work")
def test_a_bound_picture_is_the_sums_written_out(attach, pipe, loras, draw, closing, monkeypatch):
    host = copy.deepcopy(pipe)
    monkeypatch.setattr(bound_text, "MASK_BIAS", closing)
    attach(HALVES)
    bound = draw(pipe, PROMPT)
    reference = Reference(host, loras, [torch.ones(16, 3), own_words()], ["left", "right", (0.0, 0.0, 1.0, 1.0)], closing)
    torch.testing.assert_close(bound, reference(draw), atol=2e-5, rtol=0)


def test_several_pictures_of_a_prompt_each_have_their_own_layout(attach, pipe):
    mixture = attach({"fox": "fox", "ink": "owl"}, names=("fox", "ink"))
    pipe(PROMPT, num_inference_steps=2, num_images_per_prompt=3, output_type="latent")
    assert len(mixture.layouts) == 3  # of conditional rows; the others borrow from them
    assert torch.equal(now(mixture).region_masks[0], now(mixture).region_masks[3])


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


def test_a_word_of_two_experts_is_open_where_either_stands(attach, pipe):
    mixture = attach({"fox": "fox", "ink": "fox", "hat": "owl"})
    pipe(PROMPT, num_inference_steps=2, output_type="latent", guidance_scale=1)
    layout = mixture.layouts[0].regions
    assert torch.equal(layout["fox"], layout["ink"])
    closed = now(mixture).picture.masked_words((16, 16))[0]
    assert torch.equal(closed[:, FOX[0]].reshape(16, 16), 1 - layout["fox"])


@pytest.mark.parametrize("given", ["left", *thorough("top", ((0.3, 0.3, 0.7, 0.7),))])
def test_beside_a_given_region_everyone_has_a_place(attach, pipe, given):
    mixture = attach({"fox": ("fox", given), "ink": "owl", "hat": "a"})
    pipe("fox+owl+a", num_inference_steps=2, output_type="latent", guidance_scale=1)
    regions = mixture.layouts[0].regions
    assert min(regions[name].mean() for name in ("fox", "ink", "hat")) > 0.1
    assert sum(regions.values()).max() <= 1


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
    assert now(mixture).region_masks.shape[0] == 1
