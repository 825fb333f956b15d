"""Trained gates as files: they go out, come back under another name, and say what they do not fit."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from app_client import PROMPT
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import tiny_lora, tiny_pipeline

from mole_app.studio.catalog import Catalog
from mole_diffusers.gates import GATE_CONFIG, GATE_WEIGHTS, GateConfig
from mole_diffusers.mixture import attach

gradio_client = pytest.importorskip("gradio_client")
app_files = pytest.importorskip("mole_app.web.files")


@pytest.fixture(scope="module")
def trained(loras, tmp_path_factory):
    """Gates of fox and ink that are not their start."""
    folder = tmp_path_factory.mktemp("trained")
    mixture = attach(tiny_pipeline(), {name: loras[name] for name in ("fox", "ink")}, GateConfig("mole"))
    generator = torch.Generator().manual_seed(0)
    for parameter in mixture.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator)
    mixture.save_pretrained(folder)
    return folder


def files(folder):
    """The two files as they are sent."""
    return [gradio_client.handle_file(folder / name) for name in (GATE_WEIGHTS, GATE_CONFIG)]


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def drawn(client, gates):
    (file,), (recipe,), _ = client.predict(PROMPT, gates=gates, api_name="/compose")
    return pixels(file), recipe


def test_gates_that_cannot_be_read_are_listed_with_the_reason(trained, loras, tmp_path):
    shutil.copytree(trained, tmp_path / "cut")
    (tmp_path / "cut" / GATE_WEIGHTS).write_bytes(b"cut")
    good, bad = app_files.describe_all_gates(Catalog(loras, {"good": trained, "bad": tmp_path / "cut"}))
    assert (good["name"], good["gate_type"]) == ("good", "mole")
    assert set(bad) == {"name", "unreadable"}


def test_gates_come_and_go(client, trained, tmp_path):
    report = client.predict(*files(trained), api_name="/upload_gates")
    assert report == {"name": "fox+ink", "gate_type": "mole", "experts": ["fox", "ink"], "other_files": [], "missing": []}
    assert client.predict(api_name="/gates") == [report]
    picture, recipe = drawn(client, "auto")
    assert recipe["gates"] == "fox+ink"  # they weigh exactly these
    assert not np.array_equal(picture, drawn(client, "sum")[0])
    weights, about = client.predict("fox+ink", api_name="/download_gates")
    assert (weights.endswith("fox+ink.safetensors"), about.endswith("fox+ink.json")) == (True, True)
    sent = gradio_client.handle_file(weights), gradio_client.handle_file(about)
    assert client.predict(*sent, "again", api_name="/upload_gates")["name"] == "again"
    again, recipe_again = drawn(client, "again")
    assert np.array_equal(again, picture)
    assert recipe_again["gates_sha256"] == recipe["gates_sha256"]


def changed(folder, source, **about):
    """The gates of a folder with fields of their config changed."""
    shutil.copytree(source, folder)
    found = json.loads((folder / GATE_CONFIG).read_text())
    (folder / GATE_CONFIG).write_text(json.dumps(found | about))
    save_file(load_file(folder / GATE_WEIGHTS), folder / GATE_WEIGHTS)  # which has its config no more
    return files(folder)


@pytest.mark.parametrize(
    ("loras", "name"),
    [
        (["ink", "fox"], "fox+ink"),
        (["people/fox", "ink v1.2"], "ink v1_2+people_fox"),
        (["x" * 50, "y" * 50], f"{'x' * 50}+{'y' * 9}"),
        (["../../up"], "______up"),
    ],
)
def test_gates_without_a_name_are_named_after_their_loras(loras, name):
    assert app_files.check_gates_name(app_files.default_gates_name(loras)) == name


def test_gates_that_are_not_good_are_refused_and_leave_nothing(client, trained, tmp_path):
    (tmp_path / "cut").mkdir()
    shutil.copy(trained / GATE_CONFIG, tmp_path / "cut")
    (tmp_path / "cut" / GATE_WEIGHTS).write_bytes((trained / GATE_WEIGHTS).read_bytes()[:-10])
    before = client.predict(api_name="/gates")
    weights, about = files(trained)
    for sent, name, message in (
        ([weights, about], "sum", "is the name of a gate type"),
        ([weights, about], "../up", "a name has letters"),
        ([weights, weights], "x", "one .safetensors and one .json"),
        (changed(tmp_path / "a", trained, format="other"), "x", "this release reads mole_diffusers.gates"),
        ([weights, about], "auto", "'auto' is a choice among gates; choose another"),
        (changed(tmp_path / "c", trained, experts={}, gates={"gate_type": "best"}), "x", "unknown gate type 'best'"),
        (files(tmp_path / "cut"), "x", "truncated"),
    ):
        with pytest.raises(gradio_client.exceptions.AppError) as error:
            client.predict(*sent, name, api_name="/upload_gates")
        assert message in str(error.value)
        assert str(tmp_path.parent) not in str(error.value)
    assert client.predict(api_name="/gates") == before


def test_what_the_gates_were_not_trained_with_is_said(trained, loras, tmp_path):
    from mole_app.studio.catalog import Catalog
    from mole_app.studio.recipe import Recipe
    from mole_app.studio.render import Studio

    pipe = tiny_pipeline()
    files = {"fox": tiny_lora(pipe, tmp_path / "fox.safetensors", rank=2), "ink": loras["ink"]}
    studio = Studio(pipe, Catalog(files, {"mine": trained}), "tiny")
    recipe = studio.complete(Recipe(PROMPT, steps=1, width=32, height=32, gates="mine"))
    assert studio.notes(recipe, recipe) == ["the gates 'mine' were trained with another file of 'fox'"]
    assert Studio(pipe, Catalog(loras, {"mine": trained}), "tiny").notes(recipe, recipe) == []
    summed = studio.complete(Recipe(PROMPT, steps=1, width=32, height=32, gates="sum"))
    assert studio.notes(summed, summed) == []

    from mole_app.web.actions import Actions
    from mole_app.web.jobs import ignore

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        last = Actions(studio, home=tmp_path / "home").compose(recipe, 1)(ignore)
    assert str(last) == "done; the gates 'mine' were trained with another file of 'fox'"
