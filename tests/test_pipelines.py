"""Code written for diffusers' LoRA calls, run on the drop-in pipeline."""

import pytest
import torch

import mole_diffusers as mole
from mole_diffusers.testing import tiny_pipeline


@pytest.fixture
def dropin():
    pipe = mole.MoLEStableDiffusionPipeline(**tiny_pipeline().components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_calls_of_diffusers_give_the_images_of_diffusers(dropin, pipe, loras, draw):
    for host in (dropin, pipe):
        host.load_lora_weights(loras["fox"], adapter_name="fox")
        host.load_lora_weights(loras["ink"], adapter_name="ink")
        host.set_adapters(["fox", "ink"], [1.0, 0.8])
    torch.testing.assert_close(draw(dropin), draw(pipe), atol=1e-5, rtol=0)
    assert dropin.get_active_adapters() == ["fox", "ink"]
    assert dropin.get_list_adapters() == {"unet": ["fox", "ink"], "text_encoder": ["fox", "ink"]}
    for host in (dropin, pipe):
        host.set_adapters("ink")
    torch.testing.assert_close(draw(dropin), draw(pipe), atol=1e-5, rtol=0)


def test_gates_load_and_unload(dropin, loras, draw, awake, tmp_path):
    base = draw(dropin)
    for name in ("fox", "ink"):
        dropin.load_lora_weights(loras[name], adapter_name=name)
    plain = draw(dropin)
    dropin.load_gates("mole")
    awake(dropin.mixture).save_pretrained(tmp_path)
    gated = draw(dropin)
    assert not torch.allclose(gated, plain, atol=1e-3)
    dropin.load_gates("sum")
    assert torch.equal(draw(dropin), plain)
    dropin.load_gates(tmp_path)
    assert torch.equal(draw(dropin), gated)
    with pytest.warns(UserWarning, match="do not know the new expert"):
        dropin.load_lora_weights(loras["hat"])
    dropin.delete_adapters(["ink", "default_0"])
    assert dropin.get_active_adapters() == ["fox"]
    dropin.delete_adapters(["fox"])
    assert torch.equal(draw(dropin), base)
    dropin.load_lora_weights(loras["fox"])
    dropin.unload_lora_weights()
    assert torch.equal(draw(dropin), base)
    assert dropin.mixture is None


def test_files_inside_a_folder_and_from_pretrained(dropin, loras, draw, tmp_path):
    dropin.load_lora_weights(loras["fox"].parent, weight_name="fox.safetensors")
    assert dropin.get_active_adapters() == ["default_0"]
    image = draw(dropin)
    dropin.save_pretrained(tmp_path)
    assert torch.equal(draw(dropin), image)
    again = mole.MoLEStableDiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.get_active_adapters() == ["default_0"]
    assert torch.equal(draw(again), image)


def test_bad_calls_change_nothing(dropin, loras, draw):
    with pytest.raises(ValueError, match="no LoRA is loaded"):
        dropin.load_gates("mole")
    dropin.load_lora_weights(loras["fox"], adapter_name="fox")
    image = draw(dropin)
    for call, message in (
        (lambda: dropin.load_lora_weights(loras["ink"], adapter_name="fox"), "'fox' is in use"),
        (
            lambda: dropin.set_adapters(["fox"], [1.0, 2.0]),
            "Length of adapter names 1 is not equal to",
        ),
        (lambda: dropin.set_adapters(["cat"]), "Adapter name.s. {'cat'} not in the list of present adapters"),
        (lambda: dropin.load_lora_weights(loras["ink"], adapter_name="cat", hotswap=True), "'cat' is not loaded, so"),
        (lambda: dropin.load_lora_weights(loras["ink"].parent), "has 3 LoRA files and none called pytorch_lora"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            call()
        assert torch.equal(draw(dropin), image)


def test_files_come_from_the_hub_where_no_file_is_here(dropin, loras, monkeypatch):
    from mole_diffusers import pipelines as files

    asked = []

    def download(repo, name, **options):
        asked.append((repo, name, options))
        return str(loras["fox"])

    monkeypatch.setattr(files, "hf_hub_download", download)
    dropin.load_lora_weights("me/fox", weight_name="f.safetensors", subfolder="s", token="t")
    assert asked == [("me/fox", "f.safetensors", {"subfolder": "s", "token": "t"})]
    assert dropin.get_active_adapters() == ["default_0"]
