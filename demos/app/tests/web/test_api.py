"""Every endpoint of the app through gradio_client, with good and bad input."""

import asyncio
import inspect
import re

import numpy as np
import pytest
import torch
from app_client import PROMPT, RECIPE, built
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file

from mole_app.studio import infotext
from mole_app.web.actions import FOLDED

gradio_client = pytest.importorskip("gradio_client")
pytest.importorskip("gradio")


@pytest.fixture(scope="module")
def blocks(loras, tmp_path_factory):
    return built(loras, tmp_path_factory.mktemp("built"))


def test_every_button_gets_what_its_function_takes(blocks):
    from gradio.helpers import special_args

    events = [event for event in blocks.fns.values() if event.fn and event.api_visibility == "private"]
    assert len(events) > 20
    for event in events:
        values, *_ = special_args(event.fn, [0] * len(event.inputs), "request")
        inspect.signature(event.fn).bind(*values)


def test_a_field_has_the_name_that_the_api_and_the_commands_have():
    from mole_app.web.fields import CONTROLS, TRAINING

    for fields in (CONTROLS, TRAINING):
        for name, make in fields.items():
            label = re.sub(r"\W", "", make.keywords["label"]).lower()
            assert label.startswith(name.replace("_", "")), f"{name}: {label}"


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def drawn(client, recipe):
    """The pixels of `redraw`."""
    return pixels(client.predict(recipe, api_name="/redraw"))


def test_every_endpoint_is_named_and_described(client):
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    names = {"loras", "find", "upload", "compose", "redraw", "compare", "look", "grid", "read", "code", "export", "train"}
    names |= {"gallery", "favourite", "bases", "base"}
    assert set(endpoints) == {f"/{name}" for name in names | {"gates", "download_gates", "upload_gates"}}
    assert all(endpoint["description"] for endpoint in endpoints.values())


def test_a_picture_goes_out_and_comes_back_the_same(client):
    (first, second), (recipe, _), notes = client.predict(PROMPT, seed=3, count=2, api_name="/compose")
    assert notes == []
    assert (recipe["seed"], recipe["gates"], set(recipe["experts"])) == (3, "sum", {"fox", "ink"})
    read = client.predict(gradio_client.handle_file(first), api_name="/read")
    assert [infotext.read(first).to_dict(), []] == [recipe, []] == read
    assert np.array_equal(drawn(client, recipe), pixels(first))
    assert not np.array_equal(pixels(second), pixels(first))


def test_what_a_picture_of_another_program_lacks_is_noted(client, tmp_path):
    about = PngInfo()
    about.add_text(infotext.PARAMETERS, "a cat\nSteps: 2, Seed: 1, Size: 41x32, Model: dream, Eta: 2")
    Image.new("RGB", (8, 8)).save(tmp_path / "theirs.png", pnginfo=about)
    recipe, notes = client.predict(gradio_client.handle_file(tmp_path / "theirs.png"), api_name="/read")
    assert (recipe["prompt"], recipe["width"]) == ("a cat", 40)
    assert notes == [
        "41 x 32 is rounded to 40 x 32 pixels",
        "it was drawn with the model 'dream', and here is 'tiny'",
        "not carried over from the picture's text: Eta 2",
    ]


def test_size_and_sampler_are_taken_and_seeds_are_random(client):
    files, (first, second), notes = client.predict(
        PROMPT, seed=-1, count=2, width=49, height=32, sampler="euler A", api_name="/compose"
    )
    assert notes == ["49 x 32 is rounded to 48 x 32 pixels"]
    assert (first["width"], first["height"], first["sampler"], first["seed"] + 1) == (48, 32, "Euler a", second["seed"])
    assert pixels(files[0]).shape == (32, 48, 3)


def test_binding_is_taken_and_its_values_are_said(client):
    pictures = {}
    for binding in ("bound", "none"):
        (file,), (recipe,), _ = client.predict("a <lora:fox:1:region=left>", binding=binding, api_name="/compose")
        assert recipe["binding"] == binding
        pictures[binding] = pixels(file)
    assert not np.array_equal(pictures["bound"], pictures["none"])
    with pytest.raises(gradio_client.exceptions.AppError, match="unknown .* binding 'x'; .*known bindings: .*'tiles'"):
        client.predict(PROMPT, binding="x", api_name="/compose")


def test_pictures_are_kept_found_and_marked(client):
    client.predict("only here <lora:hat:1>", api_name="/compose")
    (file,), (kept,) = client.predict("only HERE", lora="hat", api_name="/gallery")
    assert infotext.read(file).to_dict() == kept["recipe"]
    assert client.predict(kept["name"], api_name="/favourite")
    (_, (starred,)) = client.predict(favourites=True, api_name="/gallery")
    assert starred == {**kept, "favourite": True}


def test_loras_are_reported_and_found(client):
    fox = next(one for one in client.predict(api_name="/loras") if one["name"] == "fox")
    assert (fox["matched"], fox["layers"], fox["problem"]) == (40, 40, "")
    found = client.predict("an Ink fox! <lora:hat:1>", api_name="/find")
    assert {one["name"]: one["why"] for one in found} == {
        "ink": "the prompt says its trigger 'ink'",
        "fox": "the prompt says its trigger 'fox'",
    }
    assert client.predict("", api_name="/find") == []


def test_comparison(client):
    recipe = {**RECIPE, "prompt": "a fox in ink <lora:fox:0.8:region=left> <lora:ink:1>"}
    labels, files, notes = client.predict(recipe, api_name="/compare")
    assert notes == []
    assert labels == ["base", "alone fox", "alone ink", "sum", "bound"]  # no gates are trained for these
    base, _, _, summed, bound = map(pixels, files)
    assert np.array_equal(summed, drawn(client, {**recipe, "binding": "none"}))
    assert np.array_equal(bound, drawn(client, recipe))
    assert len({picture.tobytes() for picture in (base, summed, bound)}) == 3


@pytest.mark.thorough
def test_merges_are_compared_too(client):
    labels, files, _ = client.predict(RECIPE, ["mean", "svd"], api_name="/compare")
    assert labels[-3:] == ["bound", "merge mean", "merge svd"]
    assert not np.array_equal(*map(pixels, files[-2:]))
    one = {"prompt": "a fox in ink <lora:fox:0.8>", "seed": 3, "gates": "sum"}
    alone, merged = (drawn(client, {**one, "arm": arm}) for arm in ("sum", "merge mean"))
    assert np.abs(merged.astype(int) - alone).max() <= 1  # the mean of one is that one, by another route
    code = client.predict({**RECIPE, "arm": "merge svd"}, api_name="/code")
    assert "arm='merge svd'" in code
    compile(code, "code", "exec")


def test_what_the_gates_did(client):
    locked = {"unet.mid_block.attentions.0.transformer_blocks.0": {"fox": 0.25, "ink": 0.5}}
    found, files, notes = client.predict({**RECIPE, "locks": locked}, api_name="/look")
    assert notes == ["the weights of 1 block are set by hand, see the tab Compare"]
    assert found["experts"] == ["fox", "ink"]
    assert found["weights"]["M00"] == pytest.approx([0.2, 0.5])  # what was set by hand, times the tag's strength
    assert all(row == pytest.approx([0.8, 1.0]) for block, row in found["weights"].items() if block != "M00")
    assert found["pictures"][:2] == ["heat", "shares"]
    assert found["pictures"][2:] == ["fox: 8 x 8 tokens", "ink: 8 x 8 tokens", "strongest LoRA: 8 x 8 tokens"]
    assert all(pixels(file).size for file in files)


def test_grid(client):
    file = client.predict(RECIPE, "weight fox=0,2", "seed=1,2", api_name="/grid")
    assert (infotext.read(file).prompt, infotext.contents(file).sheet["x"]) == (PROMPT, "weight fox=0,2")
    sheet = pixels(file)
    cells = [sheet[row : row + 120, column : column + 120] for row in (36, 170) for column in (90, 224)]
    assert len({cell.tobytes() for cell in cells}) == 4


def test_code_is_that_of_the_recipe(client):
    code = client.predict({**RECIPE, "prompt": PROMPT + " <lora:hat:0.5:lbw=OUTALL>"}, api_name="/code")
    assert "<lora:hat:0.5:lbw=OUTALL>" in code
    compile(code, "code", "exec")


def coded(blocks):
    """The endpoint of that name, as a function."""
    code = next(event.fn for event in blocks.fns.values() if event.fn and event.fn.__name__ == "code")
    return lambda recipe: asyncio.run(code(recipe))


def test_a_recipe_without_a_seed_has_0_whatever_the_page_begins_with(loras, tmp_path):
    blocks = built(loras, tmp_path, seed=-1)
    code = coded(blocks)
    assert "seed=" not in code({"prompt": "a hat"})  # it is 0
    assert "seed=" in code({"prompt": "a hat", "seed": -1})


def test_export_is_the_sum_as_one_file(client, loras):
    path, error, notes = client.predict(RECIPE, api_name="/export")
    assert (error, notes) == (0, [])
    assert len(load_file(path)) == len(load_file(loras["ink"]))  # ink has every layer that fox has
    bound = {**RECIPE, "prompt": "a fox in ink <lora:fox:0.8:word=fox> <lora:ink:1>"}
    cut, error, notes = client.predict(bound, 1, api_name="/export")
    assert 0 < error < 1
    assert notes == [FOLDED]
    compared, *_ = client.predict(RECIPE | {"arm": "merge svd"}, api_name="/export")  # a picture's recipe, of a comparison
    assert all(torch.equal(tensor, load_file(path)[key]) for key, tensor in load_file(compared).items())


@pytest.mark.thorough
def test_training_gives_gates_that_can_be_chosen(client):
    singles, composed = {"fox": ["a fox"], "ink": ["ink"]}, ["a fox in ink"]
    rows, (verdict,) = client.predict(RECIPE, "mine", singles, composed, 2, api_name="/train")
    assert [row["step"] for row in rows] == [0, 1]
    assert verdict.startswith("on 4 seeds that the training did not see, the error to the teachers' pictures is ")
    labels, *_ = client.predict(RECIPE | {"gates": "auto"}, api_name="/compare")
    assert labels[-3:] == ["sum", "bound", "gates"]
    _, (recipe,), _ = client.predict(PROMPT, gates="mine", api_name="/compose")
    assert len(recipe["gates_sha256"]) == 64
