"""What people switch on, on hosts other than Stable Diffusion 1.5: text towers, transformers, videos."""

import hosts
import pytest
import torch
from tiers import thorough

import mole_diffusers as mole

CLOSE = {"atol": 1e-5, "rtol": 0}
GIVEN = {  # host -> what its call takes in the place of a prompt, in the order in which `encode_prompt` returns it
    "sd21": ("prompt_embeds", "negative_prompt_embeds"),
    "animatediff": ("prompt_embeds", "negative_prompt_embeds"),
    "flux": ("prompt_embeds", "pooled_prompt_embeds"),
    "sdxl": ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
    "sd3": ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
}
ASKED = {  # what `encode_prompt` asks for beside the prompt
    "sd21": {"num_images_per_prompt": 1, "do_classifier_free_guidance": True},
    "animatediff": {"num_images_per_prompt": 1, "do_classifier_free_guidance": True},
    "flux": {"prompt_2": None, "max_sequence_length": 8},
    "sdxl": {},
    "sd3": {"prompt_2": None, "prompt_3": None},
}


SWITCHES = hosts.OFFLOADS | {
    "channels_last": lambda pipe: [m.to(memory_format=torch.channels_last) for m in hosts.networks(pipe)],
    "vae slicing": lambda pipe: pipe.vae.enable_slicing(),
}

FAST = ("leaf",)


@pytest.mark.parametrize("switch", [*FAST, *thorough(*(name for name in SWITCHES if name not in FAST))])
@pytest.mark.shows("these work")
def test_a_switch_changes_no_picture(other, switch, tmp_path):
    pipe, options = other.pipe, other.options
    base = hosts.draw(pipe, options)
    mixture = other.attach()
    mixture.bind({"fox": ("fox", "left")})
    picture = hosts.draw(pipe, options)
    SWITCHES[switch](pipe)
    torch.testing.assert_close(hosts.draw(pipe, options), picture, **CLOSE)
    mixture.save_pretrained(tmp_path / "gates")  # wherever their weights are now
    mole.detach(pipe)
    torch.testing.assert_close(hosts.draw(pipe, options), base, **CLOSE)
    mole.attach(pipe, mixture.experts, tmp_path / "gates", binding=mixture.binding)
    torch.testing.assert_close(hosts.draw(pipe, options), picture, **CLOSE)


@pytest.mark.shows("fp8 layerwise casting")
def test_fp8_storage_before_and_after_attach_is_the_same(other):
    pipe, options = other.pipe, other.options
    other.attach()
    full = hosts.draw(pipe, options)
    hosts.denoiser(pipe).enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    after = hosts.draw(pipe, options)
    mole.detach(pipe)
    other.attach()
    torch.testing.assert_close(hosts.draw(pipe, options), after, **CLOSE)
    assert not torch.allclose(after, full, atol=1e-5)


@pytest.mark.shows("these work")
def test_prompt_embeddings_given_directly(other):
    pipe, options = other.pipe, other.options
    other.attach()
    with torch.no_grad():
        states = pipe.encode_prompt(prompt="a fox in ink", device="cpu", **ASKED[other.name])
    given = dict(zip(GIVEN[other.name], states, strict=False))
    torch.testing.assert_close(hosts.draw(pipe, options | given, prompt=None), hosts.draw(pipe, options), **CLOSE)


@pytest.mark.shows("these work")
def test_several_prompts_and_pictures_are_drawn_as_each_alone(other):
    pipe, options = other.pipe, other.options
    other.attach()
    each = 1 if other.name == "animatediff" else 2  # which draws one video per prompt, whatever it is asked

    def draw(prompt, *seeds, **more):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return hosts.draw(pipe, options | more | {"generator": generators}, prompt=prompt)

    rows = [(prompt, seed) for prompt in ("a fox", "ink") for seed in range(each)]
    more = {} if each == 1 else {"num_images_per_prompt": each}
    together = draw(["a fox", "ink"], *(seed for _, seed in rows), **more)
    alone = [draw(prompt, seed) for prompt, seed in rows]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0)


@pytest.mark.shows("`save_pretrained` of a plain pipeline")
def test_saving_under_a_mixture_saves_the_original(other, tmp_path):
    pipe, options = other.pipe, other.options
    base = hosts.draw(pipe, options)
    other.attach()
    picture = hosts.draw(pipe, options)
    pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(hosts.draw(pipe, options), picture)
    without = {name: None for name, part in pipe.components.items() if part is None}
    again = hosts.quiet(type(pipe).from_pretrained(tmp_path / "saved", **without))
    torch.testing.assert_close(hosts.draw(again, options), base, **CLOSE)
    assert mole.attached(again) is None
