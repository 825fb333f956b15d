"""LoRAs by name and by hash: in folders, beside previews, in memory, and for other bases."""

import dataclasses
import hashlib
import shutil
import sys

import hosts
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_lora, tiny_pipeline

from benchmarks.steps import Operations
from mole_app.studio.catalog import Catalog, family_of_file, file_hash, folder_gates, preview
from mole_app.studio.model_folders import files_of
from mole_app.studio.recipe import Recipe
from mole_app.studio.render import Studio
from mole_diffusers import read_expert

RECIPE = Recipe("a fox in ink <lora:fox:0.8> <lora:ink:1>", seed=7, steps=4, width=32, height=32)


@pytest.fixture(scope="module")
def studio(loras):
    return Studio(tiny_pipeline(), Catalog(loras, {}), "tiny")


def test_files_of_one_name_are_named_by_their_folder(loras, tmp_path):
    for inside in ("people/fox", "animals/Fox", "hat"):
        path = tmp_path / f"{inside}.safetensors"
        path.parent.mkdir(exist_ok=True)
        shutil.copy(loras[inside.rpartition("/")[2].lower()], path)
    found = files_of(tmp_path, "lora")
    assert found == {
        "animals/Fox": tmp_path / "animals" / "Fox.safetensors",
        "hat": tmp_path / "hat.safetensors",
        "people/fox": tmp_path / "people" / "fox.safetensors",
    }
    studio = Studio(tiny_pipeline(), Catalog(found, {}), "tiny")
    recipe = studio.complete(dataclasses.replace(RECIPE, prompt="a fox <lora:People/Fox:1> <lora:HAT:0.5>"))
    assert recipe.prompt == "a fox <lora:people/fox:1> <lora:hat:0.5>"
    assert studio.draw(recipe).size == (32, 32)
    with pytest.raises(ValueError, match="no LoRA 'fox'; known: animals/Fox, hat, people/fox"):
        studio.complete(dataclasses.replace(RECIPE, prompt="a <lora:fox:1>"))
    with pytest.raises(ValueError, match="two tags of the prompt mean the same LoRA: HAT, hat"):
        studio.complete(dataclasses.replace(RECIPE, prompt="a <lora:HAT:1> <lora:hat:1>"))


def test_a_hundred_loras_cost_what_the_two_of_the_prompt_cost(loras, monkeypatch):
    two, costs = {name: loras[name] for name in ("fox", "ink")}, []
    for others in (0, 98):
        read = []
        monkeypatch.setattr(
            "mole_app.studio.catalog.read_expert", lambda path, name, r=read: r.append(name) or read_expert(path, name)
        )
        studio = Studio(tiny_pipeline(), Catalog(two | {f"other {i}": loras["hat"] for i in range(others)}, {}), "tiny")
        recipe = studio.complete(RECIPE)
        with Operations() as operations:
            studio.draw(recipe)
        held = sum(p.nbytes for model in (studio.base.pipe.unet, studio.base.pipe.text_encoder) for p in model.parameters())
        costs.append((sorted(read), operations.count, held))
    assert costs[0] == costs[1]
    assert costs[0][0] == ["fox", "ink"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_not_utf_8_are_left_out(loras, tmp_path):
    for inside in ("good", "caf\udce9", "caf\udce9/hat"):
        path = tmp_path / f"{inside}.safetensors"
        path.parent.mkdir(exist_ok=True)
        shutil.copy(loras["fox"], path)
        (tmp_path / "gates" / inside.replace("/", "")).mkdir(parents=True)
        (tmp_path / "gates" / inside.replace("/", "") / "config.json").touch()
    assert files_of(tmp_path, "lora") == {"good": tmp_path / "good.safetensors"}
    assert Catalog({}, {}).find_loras([tmp_path]) == ["good"]
    assert folder_gates(tmp_path / "gates") == {"good": tmp_path / "gates" / "good"}


def test_the_picture_beside_a_lora_is_found(tmp_path):
    lora = tmp_path / "dream v1.5.safetensors"
    (tmp_path / "dream v1.png").touch()  # of another one
    (tmp_path / "dream v1.5.jpeg").mkdir()
    assert preview(lora) is None
    for end in (".webp", ".preview.webp", ".jpg", ".png", ".preview.png"):  # the later ones first
        (tmp_path / f"dream v1.5{end}").touch()
        assert preview(lora) == tmp_path / f"dream v1.5{end}"


def test_folders_that_are_links_have_loras_too(loras, tmp_path):
    """Also where they lead round in a circle; each file is there once."""
    (tmp_path / "drive" / "people").mkdir(parents=True)
    (tmp_path / "models" / "animals").mkdir(parents=True)
    shutil.copy(loras["fox"], tmp_path / "drive" / "people" / "fox.safetensors")
    shutil.copy(loras["hat"], tmp_path / "models" / "animals" / "hat.safetensors")
    (tmp_path / "models" / "a drive").symlink_to(tmp_path / "drive")
    (tmp_path / "models" / "a link").symlink_to(tmp_path / "models" / "animals")
    (tmp_path / "drive" / "back").symlink_to(tmp_path / "models")
    assert files_of(tmp_path / "models", "lora") == {
        "fox": tmp_path / "models" / "a drive" / "people" / "fox.safetensors",
        "hat": tmp_path / "models" / "animals" / "hat.safetensors",
    }


def test_a_lora_for_another_base_is_known_before_it_is_drawn(studio, loras, tmp_path):
    files = {}
    for host in ("sd15", "sdxl", "flux", "sd3"):
        pipe, _ = hosts.HOSTS[host]()
        files[host] = tiny_lora(pipe, tmp_path / f"{host}.safetensors")
    save_file(load_file(files["sdxl"]), tmp_path / "said.safetensors", {"modelspec.architecture": "stable-diffusion-xl-v1"})
    files["said"] = tmp_path / "said.safetensors"
    stem, kohya = "lora_unet_joint_blocks_0_context_block_attn_qkv", tmp_path / "kohya.safetensors"
    save_file({f"{stem}.lora_down.weight": torch.ones(1, 1536), f"{stem}.lora_up.weight": torch.ones(4608, 1)}, kohya)
    for path in (*files.values(), *loras.values(), kohya):
        expert = read_expert(path)
        assert family_of_file(path) == expert.base
        assert file_hash(path) == expert.sha256
    catalog = Catalog(files, {})
    assert catalog.family("FLUX") == "Flux"
    here = Studio(hosts.HOSTS["flux"]()[0], catalog, "flux")
    assert here.misfit("flux") == ""
    other = Studio(hosts.HOSTS["sd3"]()[0], catalog, "sd3")
    assert other.misfit("flux") == "it is made for Flux and this pipeline is SD 3"
    with pytest.raises(
        ValueError, match="the LoRA 'flux' cannot be used here: it is made for Flux and this pipeline is SD 3"
    ):
        other.complete(Recipe("a <lora:flux:1>"))


def test_a_lora_is_found_by_its_hash_among_files_that_cannot_be_read(studio, loras, tmp_path):
    (tmp_path / "a.safetensors").write_text("<html>")
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    catalog = Catalog({**files_of(tmp_path, "lora"), "renamed": loras["fox"]}, {})
    there = Studio(studio.base.pipe, catalog, "tiny")
    assert [bool(there.misfit(name)) for name in catalog.loras] == [True, True, False]
    with pytest.raises(ValueError, match="the LoRA 'gone' cannot be used here: no file at"):
        there.complete(Recipe("a <lora:gone:1>"))
    whole = hashlib.sha256(loras["fox"].read_bytes()).hexdigest()
    for digest in (read_expert(loras["fox"]).sha256, whole):  # A1111's, and Forge's
        assert catalog.local_name("fox", digest[:12]) == "renamed"
    assert catalog.local_name("renamed", whole[:12].upper()) == "renamed"
    with pytest.raises(ValueError, match="the LoRA 'fox' with hash 000000000000 is not here"):
        catalog.local_name("fox", "0" * 12)


def test_loras_that_were_used_longest_ago_leave_the_memory(loras, monkeypatch):
    made = Catalog(dict(loras), {})
    fox, ink = made.expert("fox"), made.expert("ink")
    assert made.expert("fox") is fox  # used again, so ink is the older one
    monkeypatch.setattr("mole_app.studio.catalog.MOST_BYTES", 0)
    monkeypatch.setattr("mole_app.studio.catalog.FEWEST", 2)
    hat = made.expert("hat")
    assert (made.expert("fox"), made.expert("hat")) == (fox, hat)
    assert list(made._experts) == ["fox", "hat"]
    assert made.expert("ink") is not ink
    monkeypatch.setattr("mole_app.studio.catalog.MOST_BYTES", sum(loras[name].stat().st_size for name in loras))
    assert made.expert("fox") is made.expert("fox")
    assert list(made._experts) == ["hat", "ink", "fox"]  # there is room for all


def test_a_file_with_the_recipes_name_is_tried_before_the_others_are_read(loras, monkeypatch):
    read = []

    def noted(path, *, whole=False):
        read.append((path, whole))
        return file_hash(path, whole=whole)

    monkeypatch.setattr("mole_app.studio.catalog.file_hash", noted)
    catalog = Catalog(dict(loras), {})
    for _ in range(2):
        assert catalog.local_name("HAT", hashlib.sha256(loras["hat"].read_bytes()).hexdigest()[:12]) == "hat"
    assert read == [(loras["hat"], False), (loras["hat"], True)]  # each once
