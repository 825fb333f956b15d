"""What people switch on, on hosts other than Stable Diffusion 1.5: text towers, transformers, films."""

import hosts
import pytest
import torch

import mole_diffusers as mole
from mole_diffusers.testing import ATTENTION, FEED_FORWARD, tiny_lora

CLOSE = {"atol": 1e-5, "rtol": 0}
NAMES = ["sdxl", "flux", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd21", "sd3", "animatediff"))]
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


@pytest.fixture(params=NAMES)
def host(request, awake, tmp_path):
    """(name, pipeline, options of its call, attach); gates depend on what they read."""
    pipe, options = hosts.HOSTS[request.param]()
    ends = {"fox": ATTENTION + FEED_FORWARD, "ink": ATTENTION}
    files = {n: tiny_lora(pipe, tmp_path / f"{n}.safetensors", seed=i, ends=e) for i, (n, e) in enumerate(ends.items())}
    return request.param, pipe, options, lambda: awake(mole.attach(pipe, files, "mole"))


SWITCHES = hosts.OFFLOADS | {
    "channels_last": lambda pipe: [m.to(memory_format=torch.channels_last) for m in hosts.networks(pipe)],
    "vae slicing": lambda pipe: pipe.vae.enable_slicing(),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_changes_no_picture(host, switch, tmp_path):
    _, pipe, options, attach = host
    base = hosts.draw(pipe, options)
    mixture = attach()
    picture = hosts.draw(pipe, options)
    SWITCHES[switch](pipe)
    torch.testing.assert_close(hosts.draw(pipe, options), picture, **CLOSE)
    mixture.save_pretrained(tmp_path / "gates")  # wherever their weights are now
    mole.detach(pipe)
    torch.testing.assert_close(hosts.draw(pipe, options), base, **CLOSE)
    mole.attach(pipe, mixture.experts, tmp_path / "gates")
    torch.testing.assert_close(hosts.draw(pipe, options), picture, **CLOSE)


def test_fp8_storage_before_and_after_attach_is_the_same(host):
    _, pipe, options, attach = host
    attach()
    full = hosts.draw(pipe, options)
    hosts.denoiser(pipe).enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    after = hosts.draw(pipe, options)
    mole.detach(pipe)
    attach()
    torch.testing.assert_close(hosts.draw(pipe, options), after, **CLOSE)
    assert not torch.allclose(after, full, atol=1e-5)


def test_prompt_embeddings_given_directly(host):
    name, pipe, options, attach = host
    attach()
    with torch.no_grad():
        states = pipe.encode_prompt(prompt="a fox in ink", device="cpu", **ASKED[name])
    given = dict(zip(GIVEN[name], states, strict=False))
    torch.testing.assert_close(hosts.draw(pipe, options | given, prompt=None), hosts.draw(pipe, options), **CLOSE)


def test_several_prompts_and_pictures_are_drawn_as_each_alone(host):
    name, pipe, options, attach = host
    attach()
    each = 1 if name == "animatediff" else 2  # which draws one film per prompt, whatever it is asked

    def draw(prompt, *seeds, **more):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return hosts.draw(pipe, options | more | {"generator": generators}, prompt=prompt)

    rows = [(prompt, seed) for prompt in ("a fox", "ink") for seed in range(each)]
    more = {} if each == 1 else {"num_images_per_prompt": each}
    together = draw(["a fox", "ink"], *(seed for _, seed in rows), **more)
    alone = [draw(prompt, seed) for prompt, seed in rows]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0)


def test_saving_under_a_mixture_saves_the_original(host, tmp_path):
    _, pipe, options, attach = host
    base = hosts.draw(pipe, options)
    attach()
    picture = hosts.draw(pipe, options)
    pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(hosts.draw(pipe, options), picture)
    without = {name: None for name, part in pipe.components.items() if part is None}
    again = hosts.quiet(type(pipe).from_pretrained(tmp_path / "saved", **without))
    torch.testing.assert_close(hosts.draw(again, options), base, **CLOSE)
    assert mole.attached(again) is None
