"""Code written for diffusers' LoRA calls, run on the drop-in pipeline."""

import json

import httpx
import pytest
import torch
from tiny import tiny_pipeline

import mole_diffusers as mole


@pytest.fixture
def dropin():
    pipe = mole.MoLEStableDiffusionPipeline(**tiny_pipeline().components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.thorough  # in the fast tier test_adapter_calls.py has these calls, one by one
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


@pytest.mark.thorough
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
    from mole_diffusers.pipelines import sources as files

    asked = []

    def download(repo, name, **options):
        asked.append((repo, name, options))
        return str(loras["fox"])

    monkeypatch.setattr(files, "hf_hub_download", download)
    dropin.load_lora_weights("me/fox", weight_name="f.safetensors", subfolder="s", token="t")
    assert asked == [("me/fox", "f.safetensors", {"subfolder": "s", "token": "t"})]
    assert dropin.get_active_adapters() == ["default_0"]


def test_the_one_file_of_a_hub_repository_is_found_whatever_its_name(dropin, loras, monkeypatch):
    from huggingface_hub.errors import RemoteEntryNotFoundError

    from mole_diffusers.pipelines import sources as files

    missing = httpx.Response(404, request=httpx.Request("GET", "https://hub"))
    listed = ["README.md", "fox.safetensors", "old/fox_1.safetensors", "old/fox_2.safetensors"]

    def download(repo, name, subfolder="", **options):
        if (f"{subfolder}/{name}" if subfolder else name) not in listed:
            raise RemoteEntryNotFoundError("404", response=missing)
        return str(loras[name.removesuffix(".safetensors")])

    monkeypatch.setattr(files, "hf_hub_download", download)
    monkeypatch.setattr(files, "list_repo_files", lambda repo, **options: listed)
    dropin.load_lora_weights("me/fox", subfolder=None)  # diffusers' own default
    assert dropin.mixture.experts["default_0"].source == str(loras["fox"])
    with pytest.raises(FileNotFoundError, match="has 2 LoRA files; give a weight_name of .'fox_1.safetensors', 'fox_2"):
        dropin.load_lora_weights("me/fox", subfolder="old")
    with pytest.raises(FileNotFoundError, match="no hub repository that can be reached"):
        dropin.load_lora_weights("me/fox", weight_name="cat.safetensors")


def test_the_scales_of_a_peft_repository_come_with_its_file(dropin, loras, monkeypatch, tmp_path):
    from huggingface_hub.errors import RemoteEntryNotFoundError

    from mole_diffusers.pipelines import sources as files

    missing = httpx.Response(404, request=httpx.Request("GET", "https://hub"))
    repository = {"adapter_model.safetensors": loras["fox"].read_bytes()}

    def download(repo, name, **options):
        if name not in repository:
            raise RemoteEntryNotFoundError("404", response=missing)
        (tmp_path / name).write_bytes(repository[name])
        return str(tmp_path / name)

    monkeypatch.setattr(files, "hf_hub_download", download)
    dropin.load_lora_weights("me/fox", "plain", weight_name="adapter_model.safetensors")
    repository["adapter_config.json"] = json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 16}).encode()
    dropin.load_lora_weights("me/fox", "scaled", weight_name="adapter_model.safetensors")
    scales = [{w.scale for w in expert.layers["unet"].values()} for expert in dropin.mixture.experts.values()]
    assert scales == [{1.0}, {4.0}]


def test_gates_that_are_not_trained_stay_when_experts_come_and_go(dropin, loras):
    dropin.load_lora_weights(loras["fox"], "fox")
    dropin.load_lora_weights(loras["ink"], "ink")
    dropin.load_gates("mean")
    dropin.load_lora_weights(loras["hat"], "hat")
    assert dropin.mixture.config.gate_type == "mean"
    dropin.delete_adapters("fox")
    assert dropin.mixture.config.gate_type == "mean"
    dropin.load_gates("mole")
    dropin.delete_adapters("hat")
    assert dropin.mixture.config.gate_type == "sum"
