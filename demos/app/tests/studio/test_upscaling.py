"""Models that enlarge a picture before it is drawn over: a tiny one of ESRGAN's kind with random weights."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import tiny_pipeline

from mole_app.studio import infotext
from mole_app.studio.catalog import Catalog
from mole_app.studio.model_folders import files_of
from mole_app.studio.picture_passes import drawing_with, fitted
from mole_app.studio.recipe import Recipe
from mole_app.studio.render import Studio
from mole_app.studio.upscaling import enlarged
from mole_cli.mole import main

spandrel = pytest.importorskip("spandrel")
RECIPE = Recipe("a fox", seed=3, steps=2, width=32, height=32, hires=1.5, upscaler="4X-TINY")


@pytest.fixture
def network():
    from spandrel.architectures.ESRGAN.__arch.RRDB import RRDBNet

    torch.manual_seed(0)
    return RRDBNet(in_nc=3, out_nc=3, num_filters=8, num_blocks=1, scale=4).eval()


@pytest.fixture
def folder(network, tmp_path):
    (tmp_path / "upscale_models").mkdir()
    save_file(network.state_dict(), tmp_path / "upscale_models" / "4x-tiny.safetensors")
    return tmp_path


@pytest.fixture
def studio(folder):
    return Studio(tiny_pipeline(), Catalog({}, {}, files={"upscaler": files_of(folder, "upscaler")}), "tiny")


def test_the_larger_picture_is_drawn_over_what_the_model_makes(studio, network):
    recipe = studio.complete(RECIPE)
    assert (recipe.upscaler, len(recipe.upscaler_sha256)) == ("4x-tiny", 64)
    drawn = studio.draw(recipe)
    first = studio.draw(dataclasses.replace(recipe, hires=1.0, upscaler="", upscaler_sha256=""))
    with torch.no_grad():
        pixels = network(torch.tensor(np.asarray(first)).permute(2, 0, 1)[None] / 255)[0]
    large = Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
    assert large.size == (128, 128)
    over = drawing_with(tiny_pipeline(), over=True)
    call = {"image": fitted(large, 48, 48), "strength": 0.5, "num_inference_steps": 2, "guidance_scale": 3.0}
    wanted = over("a fox", generator=torch.Generator().manual_seed(3), **call).images[0]
    assert np.abs(np.asarray(drawn, int) - np.asarray(wanted, int)).max() <= 1
    plain = studio.draw(dataclasses.replace(recipe, upscaler="", upscaler_sha256=""))
    assert np.abs(np.asarray(drawn, int) - np.asarray(plain, int)).max() > 3


def test_a_command_draws_with_the_upscaler_of_a_folder(folder, tmp_path, capsys):
    args = ["a fox", "--steps", "2", "--hires", "1.5", "--upscaler", "4x-tiny", "--device", "cpu"]
    assert main(["draw", *args, "--upscalers", str(folder), "--out", str(tmp_path / "a.png")]) == 0
    assert infotext.read(tmp_path / "a.png").upscaler == "4x-tiny"
    assert main(["draw", *args, "--out", str(tmp_path / "b.png")]) == 1
    assert "there is no upscaler '4x-tiny'; known: none" in capsys.readouterr().err


def test_an_upscaler_that_cannot_be_used_is_refused_in_one_sentence(studio, folder, monkeypatch):
    with pytest.raises(ValueError, match="the upscaler '4x-tiny' enlarges the picture for hires: give hires above 1"):
        Recipe("a fox", upscaler="4x-tiny")
    with pytest.raises(ValueError, match="there is no upscaler 'other'; known: 4x-tiny"):
        studio.complete(dataclasses.replace(RECIPE, upscaler="other"))
    with pytest.raises(ValueError, match="the upscaler '4x-tiny' here is another file than the recipe's"):
        studio.complete(dataclasses.replace(RECIPE, upscaler_sha256="0" * 64))
    picture, cpu = Image.new("RGB", (8, 8)), torch.device("cpu")
    save_file({"x": torch.zeros(2)}, folder / "odd.safetensors")
    (folder / "page.safetensors").write_text("<html>")
    for name, message in (("odd", "odd.safetensors is no upscaler that spandrel knows"), ("page", "page.safetensors")):
        with pytest.raises(ValueError, match=message):
            enlarged(picture, folder / f"{name}.safetensors", cpu)
    monkeypatch.setitem(sys.modules, "spandrel", None)
    with pytest.raises(ValueError, match=r"upscalers need spandrel: pip install 'mole-diffusers\[upscalers\]'"):
        enlarged(picture, studio.catalog.files["upscaler"]["4x-tiny"], cpu)
