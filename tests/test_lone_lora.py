"""One LoRA alone is the plain LoRA: what diffusers' `set_adapters` draws, whatever the prompt."""

import hosts
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiers import thorough
from tiny import tiny_lora

import mole_diffusers as mole
from mole_diffusers.binding import Bound

PARTI = hosts.real_prompts()
SOME = PARTI[:: len(PARTI) // 20]


def drawn(pipe, options, prompt):
    options = {"guidance_scale": 3.0} | options | {"height": 32, "width": 64}
    return hosts.draw(pipe, options, prompt, steps=2)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("prompts", [SOME, *thorough(PARTI)], ids=["some", *(["all"] if thorough(PARTI) else [])])
def test_a_lora_alone_is_drawn_as_diffusers_draws_it(name, prompts, tmp_path):
    """Bound to about the first noun of each prompt, on a canvas with room for tiles."""
    pipe, options = hosts.HOSTS[name]()
    if hasattr(pipe, "unet"):
        pipe.unet.register_to_config(sample_size=8)
    file = tiny_lora(pipe, tmp_path / "it.safetensors", seed=1)
    base = drawn(pipe, options, prompts[0])
    pipe.load_lora_weights(file, adapter_name="it")
    pipe.set_adapters(["it"], [1.0])
    plain = [drawn(pipe, options, prompt) for prompt in prompts]
    pipe.unload_lora_weights()
    assert (plain[0] - base).abs().max() > 1e-3
    mixture = mole.attach(pipe, {"it": file})
    for prompt, wanted in zip(prompts, plain, strict=True):
        mixture.bind({"it": hosts.first_noun(prompt)})
        torch.testing.assert_close(drawn(pipe, options, prompt), wanted, atol=1e-5, rtol=0)
        assert mixture.explain(prompt, 64, 32).experts["it"].place == "everywhere"


def test_one_of_several_that_acts_alone_is_the_plain_lora(tmp_path):
    """The others are switched off, at strength 0, or came with a folder and are not named."""
    pipe, options = hosts.HOSTS["sd15"]()
    prompt, files = "fox and owl", {}
    for seed, name in enumerate(("fox", "owl", "hen")):
        files[name] = tiny_lora(pipe, tmp_path / f"{name}.safetensors", seed=seed)
    pipe.load_lora_weights(files["fox"], adapter_name="fox")
    wanted, wanted_alone = (drawn(pipe, options, text) for text in (prompt, "a fox"))
    pipe.unload_lora_weights()
    mixture = mole.attach(pipe, files, binding={name: name for name in files})
    with mixture.only("fox"):
        torch.testing.assert_close(drawn(pipe, options, prompt), wanted, atol=1e-5, rtol=0)
    with mixture.strengths({"owl": 0, "hen": 0}):
        torch.testing.assert_close(drawn(pipe, options, prompt), wanted, atol=1e-5, rtol=0)
        assert mixture.explain(prompt).experts["owl"].place == "inactive"
    assert (drawn(pipe, options, prompt) - wanted).abs().max() > 1e-3
    mixture.bind({"fox": ("fox", "left"), "owl": "owl"})
    with mixture.only("fox"):  # with a region it is kept there
        assert (drawn(pipe, options, prompt) - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["sd15", *thorough("sdxl", "sd3", "flux")])
def test_two_loras_without_places_are_closed_on_each_others_words_and_nowhere_else(name, tmp_path):
    pipe, options = hosts.HOSTS[name]()
    files = {n: tiny_lora(pipe, tmp_path / f"{n}.safetensors", seed=i) for i, n in enumerate(("fox", "owl"))}
    mixture = mole.attach(pipe, files, binding={"fox": "fox", "owl": "owl"})
    for prompt in ("fox on owl", "owl hugs fox", "fox,owl"):
        with mixture.trace(maps=True) as trace:
            drawn(pipe, options, prompt)
        text = mixture.parts.settings.binding.now.text
        assert text.acting_tokens is not None
        assert text.region_masks is None
        assert not text.biases
        assert not mixture.layouts[0].regions
        assert trace.maps or name != "sd15"
        said = mixture.explain(prompt, 64, 32)  # two that touch have room there
        assert {role.place for role in said.experts.values()} == {"own tile" if said.tiles else "everywhere"}


def test_of_a_folder_only_those_act_that_the_prompt_names(tmp_path):
    """Strangers change nothing, however many there are."""
    pipe, options = hosts.HOSTS["sd15"]()
    for seed, name in enumerate(("fox", "owl", "hen", "elk")):
        path = tiny_lora(pipe, tmp_path / f"{name}.safetensors", seed=seed)
        tensors = load_file(path)
        save_file(tensors, path, {"modelspec.trigger_phrase": name})
    with pytest.raises(FileNotFoundError, match="no folder with LoRA files"):
        mole.attach(pipe, tmp_path / "none")
    mixture = mole.attach(pipe, tmp_path)
    with pytest.warns(UserWarning, match="expert 'elk' is inactive"):
        found = drawn(pipe, options, "fox and owl")
    places = {name: role.place for name, role in mixture.explain("fox on owl").experts.items()}
    assert places == {"fox": "own tile", "owl": "own tile", "hen": "inactive", "elk": "inactive"}
    two = {name: tmp_path / f"{name}.safetensors" for name in ("fox", "owl")}
    mixture = mole.attach(pipe, two, binding={name: Bound((name,), required=True) for name in two})
    torch.testing.assert_close(drawn(pipe, options, "fox and owl"), found, atol=1e-5, rtol=0)
    mole.attach(pipe, two)  # chosen, they act on the negative prompt, too, as LoRAs do in diffusers
    torch.testing.assert_close(drawn(pipe, options, "fox and owl"), found, atol=1e-5, rtol=0)
    mixture = mole.attach(pipe, tmp_path, binding={"hen": "hen"})  # chosen, so it acts
    assert mixture.explain("fox").experts["hen"].place == "everywhere"


@pytest.mark.parametrize("name", ["sd15", *thorough("sdxl", "sd3")])
def test_a_prompt_that_is_encoded_first_is_drawn_as_in_a_call(name, tmp_path):
    """Who acts on the prompt acts on the negative prompt, too, whether this names LoRAs that wait for their words or not."""
    pipe, options = hosts.HOSTS[name]()
    files = {each: tiny_lora(pipe, tmp_path / each, seed=i) for i, each in enumerate(("fox", "owl"))}
    mole.attach(pipe, files, binding={each: Bound((each,), required=True) for each in files})
    others = {"prompt_2": None, "prompt_3": None} if name == "sd3" else {}
    kinds = [f"{kind}prompt_embeds" for kind in ("", "negative_", "pooled_", "negative_pooled_")]
    for prompt, negative in (("fox", ""), ("a hen", "fog"), ("owl", "fog"), ("a hen", ""), ("hen", "fox")):
        wanted = drawn(pipe, options | {"negative_prompt": negative}, prompt)
        texts = {"prompt": prompt, "negative_prompt": negative, **others}
        states = pipe.encode_prompt(**texts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
        encoded = dict(zip(kinds, states, strict=False))
        torch.testing.assert_close(drawn(pipe, options | encoded, None), wanted, atol=1e-5, rtol=0)


def test_what_cannot_be_explained_is_refused(pipe, loras):
    mixture = mole.attach(pipe, {"fox": loras["fox"]})
    with pytest.raises(ValueError, match="one prompt is explained at a time"):
        mixture.explain(["fox", "hen"])
    for size in ((64, None), (0, 64), (64, -1)):
        with pytest.raises(ValueError, match="a picture has a width and a height of 1 or more"):
            mixture.explain("fox", *size)
