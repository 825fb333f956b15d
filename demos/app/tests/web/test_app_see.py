"""What the See page shows of models with a transformer, as of those with a UNet."""

import dataclasses
from types import SimpleNamespace

import hosts
import numpy as np
import pytest
from PIL import Image
from tiers import thorough
from tiny import tiny_lora

from mole_app.studio import infotext
from mole_app.studio.catalog import Catalog
from mole_app.studio.recipe import Recipe
from mole_app.studio.render import Studio
from mole_app.web.actions import Actions
from mole_app.web.jobs import ignore
from mole_app.web.preview import PreviewDecoder

pytest.importorskip("matplotlib")
PARTS = {"sd15": "unet", "flux": "transformer", "sd3": "transformer"}


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture(params=["sd15", "flux", *thorough("sd3")])
def actions(request, tmp_path):
    pipe, _ = hosts.HOSTS[request.param]()
    files = {n: tiny_lora(pipe, tmp_path / f"{n}.safetensors", seed=i) for i, n in enumerate(("fox", "ink"))}
    return Actions(Studio(pipe, Catalog(files, {}), request.param), gallery=tmp_path / "pictures")


RECIPE = Recipe("a <lora:fox:0.5> b <lora:ink:1>", steps=2, width=32, height=32, gates="sum", binding="none")


def test_every_model_shows_where_which_lora_acted(actions):
    seen = []
    report = actions.look(RECIPE)(seen.append)
    part = PARTS[actions.studio.base.name]
    assert str(report) == "mean weight: fox 0.50, ink 1.00"
    assert all(location.startswith(f"{part}.") for location in report.labels.values())
    assert len(report.labels) > 1
    assert all(row == [0.5, 1.0] for row in report.weights.values())
    assert all(row == [1.0, 1.0] for row in report.gates.values())
    assert [label.partition(":")[0] for label in report.places] == ["fox", "ink", "strongest LoRA"]
    assert np.array_equal(pixels(report.picture), pixels(actions.compose(RECIPE, 1)(ignore).pictures[0].path))


@pytest.mark.parametrize("actions", ["flux", *thorough("sd15", "sd3")], indirect=True)
def test_a_block_that_is_set_by_hand_is_followed(actions):
    label, location = next(iter(actions.look(RECIPE)(ignore).labels.items()))
    held = dataclasses.replace(RECIPE, locks={location: {"fox": 2.0, "ink": 0.0}})
    report = actions.look(held)(ignore)
    assert report.weights[label] == [1.0, 0.0]  # times the strengths
    assert report.gates[label] == [2.0, 0.0]
    assert sum(row == [0.5, 1.0] for row in report.weights.values()) == len(report.weights) - 1


@pytest.mark.parametrize("actions", ["sd15", *thorough("flux", "sd3")], indirect=True)
def test_weights_by_hand_are_said_and_those_of_other_gates_left_out(actions):
    location, other = next(iter(actions.look(RECIPE)(ignore).labels.values())), "unet.gone"
    row, (plain,) = {"fox": 2.0, "ink": 0.0}, actions.compose(RECIPE, 1)(ignore).pictures
    for locks, kept, said in (
        ({location: row}, {location: row}, ["the weights of 1 block are set by hand, see the tab Compare"]),
        (
            {other: row, f"{other}.too": row},
            {},
            ["weights set by hand for 2 blocks that these gates do not have are left out"],
        ),
    ):
        done = actions.compose(dataclasses.replace(RECIPE, locks=locks), 2)(ignore)
        assert (done.warnings, done.pictures[0].recipe.locks, infotext.read(done.pictures[0].path).locks) == (
            said,
            kept,
            kept,
        )
        assert np.array_equal(pixels(done.pictures[0].path), pixels(plain.path)) == (not kept)
    summed = dataclasses.replace(RECIPE, locks={location: row}, arm="sum")  # which asks no gate
    assert actions.compose(summed, 1)(ignore).warnings == []


def test_loras_that_did_not_act_on_the_picture_are_said(tmp_path):
    pipe, _ = hosts.HOSTS["sd15"]()
    files = {"fox": tiny_lora(pipe, tmp_path / "fox.safetensors", ends=("q_proj",))}  # the text encoder's alone
    actions = Actions(Studio(pipe, Catalog(files, {}), "sd15"), gallery=tmp_path / "pictures")
    with pytest.raises(ValueError, match="no expert has acted on the picture"):
        actions.look(dataclasses.replace(RECIPE, prompt="a <lora:fox:1>"))(ignore)


def test_the_preview_of_the_last_step_is_the_picture(actions):
    studio, latents = actions.studio, []
    studio.base.pipe.vae.register_to_config(shift_factor=0.0 if hasattr(studio.base.pipe, "unet") else 0.5)
    image = studio.draw(studio.complete(RECIPE), on_step=lambda _, now: latents.append(now))
    preview = PreviewDecoder()(studio.base.pipe, latents[-1])
    assert np.abs(np.asarray(preview, int) - np.asarray(image, int)).max() <= 1


def test_latents_of_a_large_decoder_get_the_colours_of_its_picture(monkeypatch):
    """A linear map, fitted to the autoencoder: here one whose latents are mixed colours."""
    import torch

    from mole_app.web import preview

    mix = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))

    class Vae(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = torch.nn.Linear(2, 2)
            self.config = SimpleNamespace(scaling_factor=0.5, shift_factor=0.1)

        def encode(self, picture):
            cells = torch.nn.functional.avg_pool2d(picture, 8)
            latents = torch.einsum("bchw,lc->blhw", cells, mix) + 1
            return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: latents))

    processor = SimpleNamespace(postprocess=lambda pictures, output_type: [pictures])
    pipe, decoder = SimpleNamespace(vae=Vae(), image_processor=processor), PreviewDecoder()
    monkeypatch.setattr(preview, "SMALL", 0)
    wanted = torch.rand(1, 3, 4, 6) * 2 - 1
    latents = (torch.einsum("bchw,lc->blhw", wanted, mix) + 1 - 0.1) * 0.5
    assert torch.allclose(decoder(pipe, latents), wanted, atol=1e-4)
    assert decoder(pipe, latents[0]) is None  # of a video, or packed
