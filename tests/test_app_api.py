"""Every endpoint of the app through gradio_client, with good and bad input."""

import inspect
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from mole_diffusers import infotext
from mole_diffusers.app.actions import Actions
from mole_diffusers.drawing import Studio
from mole_diffusers.recipe import Recipe
from mole_diffusers.shelf import Shelf
from mole_diffusers.testing import tiny_lora, tiny_pipeline

gradio_client = pytest.importorskip("gradio_client")
pytest.importorskip("gradio")
PROMPT = "a fox in ink <lora:fox:0.8> <lora:ink:1>"
RECIPE = {"prompt": PROMPT, "seed": 3, "gates": "sum"}


@pytest.fixture(scope="module")
def client(loras, tmp_path_factory):
    from mole_diffusers.app.build import build, launch

    studio = Studio(tiny_pipeline(), Shelf(loras, {}), "tiny")
    actions = Actions(studio, home=tmp_path_factory.mktemp("gates"))
    blocks = build(actions, Recipe(PROMPT, steps=2, width=32, height=32, gates="auto", base="tiny"))
    _, url, _ = launch(blocks, prevent_thread_lock=True, quiet=True)
    yield gradio_client.Client(url, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))
    blocks.close()


@pytest.fixture(scope="module")
def blocks(loras):
    from mole_diffusers.app.build import build

    actions = Actions(Studio(tiny_pipeline(), Shelf(loras, {}), "tiny"))
    return build(actions, Recipe(PROMPT, steps=2, width=32, height=32, gates="auto", base="tiny"))


def test_every_button_gets_what_its_function_takes(blocks):
    from gradio.helpers import special_args

    events = [event for event in blocks.fns.values() if not event.api_name or event.api_visibility == "private"]
    assert len(events) > 20
    for event in events:
        values, *_ = special_args(event.fn, [0] * len(event.inputs), "request")
        inspect.signature(event.fn).bind(*values)


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_every_endpoint_is_named_and_described(client):
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    names = {"loras", "find", "upload", "compose", "redraw", "compare", "look", "grid", "read", "code", "export", "train"}
    assert set(endpoints) == {f"/{name}" for name in names}
    assert all(endpoint["description"] for endpoint in endpoints.values())


def test_a_picture_goes_out_and_comes_back_the_same(client):
    (first, second), (recipe, _) = client.predict(PROMPT, seed=3, count=2, api_name="/compose")
    assert (recipe["seed"], recipe["gates"], set(recipe["experts"])) == (3, "sum", {"fox", "ink"})
    assert infotext.read(first).to_dict() == recipe == client.predict(gradio_client.handle_file(first), api_name="/read")
    assert np.array_equal(pixels(client.predict(recipe, api_name="/redraw")), pixels(first))
    assert not np.array_equal(pixels(second), pixels(first))


def test_loras_are_reported_and_found(client):
    fox = next(one for one in client.predict(api_name="/loras") if one["name"] == "fox")
    assert (fox["matched"], fox["layers"], fox["problem"]) == (40, 40, "")
    assert client.predict("an Ink fox!", api_name="/find") == ["fox", "ink"]
    assert client.predict("a foxglove", api_name="/find") == []


def test_comparison(client):
    labels, files = client.predict(RECIPE, api_name="/compare")
    assert labels == ["base", "alone fox", "alone ink", "sum", "gates"]
    base, _, _, summed, gated = map(pixels, files)
    assert np.array_equal(summed, gated)  # these gates are the sum
    assert not np.array_equal(base, gated)


def test_merges_are_compared_too(client):
    labels, files = client.predict(RECIPE, ["mean", "svd"], api_name="/compare")
    assert labels[-2:] == ["merge mean", "merge svd"]
    assert not np.array_equal(*map(pixels, files[-2:]))
    one = {"prompt": "a fox in ink <lora:fox:0.8>", "seed": 3, "gates": "sum"}
    alone, merged = (pixels(client.predict({**one, "arm": arm}, api_name="/redraw")) for arm in ("sum", "merge mean"))
    assert np.abs(merged.astype(int) - alone).max() <= 1  # the mean of one is that one, by another route
    code = client.predict({**RECIPE, "arm": "merge svd"}, api_name="/code")
    assert "mole.merge({'fox': ('fox.safetensors', 0.8), 'ink': ('ink.safetensors', 1.0)}, 'svd')" in code
    compile(code, "code", "exec")


def test_what_the_gates_did(client):
    locked = {"unet.mid_block.attentions.0.transformer_blocks.0": {"fox": 0.25, "ink": 0.5}}
    found, files = client.predict({**RECIPE, "locks": locked}, api_name="/look")
    assert found["experts"] == ["fox", "ink"]
    assert found["weights"]["M00"] == pytest.approx([0.2, 0.5])  # what was set by hand, times the tag's strength
    assert all(row == pytest.approx([0.8, 1.0]) for block, row in found["weights"].items() if block != "M00")
    assert found["pictures"][:2] == ["heat", "shares"]
    assert found["pictures"][2:] == ["fox: 8 x 8 tokens", "ink: 8 x 8 tokens", "who acts most: 8 x 8 tokens"]
    assert all(pixels(file).size for file in files)


def test_grid(client):
    sheet = pixels(client.predict(RECIPE, "weight fox=0,2", "seed=1,2", api_name="/grid"))
    cells = [sheet[row : row + 120, column : column + 120] for row in (36, 170) for column in (90, 224)]
    assert len({cell.tobytes() for cell in cells}) == 4


def test_code_is_that_of_the_recipe(client):
    code = client.predict({**RECIPE, "prompt": PROMPT + " <lora:hat:0.5:lbw=OUTALL>"}, api_name="/code")
    assert "<lora:hat:0.5:lbw=OUTALL>" in code
    compile(code, "code", "exec")


def test_export_is_the_sum_as_one_file(client, loras):
    path, error = client.predict(RECIPE, api_name="/export")
    assert error == 0
    assert len(load_file(path)) == len(load_file(loras["ink"]))  # ink has every layer that fox has
    cut, error = client.predict(RECIPE, 1, api_name="/export")
    assert 0 < error < 1


def test_training_gives_gates_that_can_be_chosen(client):
    singles, composed = {"fox": ["a fox"], "ink": ["ink"]}, ["a fox in ink"]
    rows = client.predict(RECIPE, "mine", singles, composed, 2, api_name="/train")
    assert [row["step"] for row in rows] == [0, 1]
    _, (recipe,) = client.predict(PROMPT, gates="mine", api_name="/compose")
    assert len(recipe["gates_sha256"]) == 64


def test_training_that_was_stopped_goes_on(loras, tmp_path):
    from mole_diffusers.app.teaching import Wanted, teach

    def run(home, stop=lambda state: False, prompt=PROMPT):
        asked, last = [], None
        studio = Studio(tiny_pipeline(), Shelf(dict(loras), {}), "tiny")
        recipe, wanted = (
            Recipe(prompt, steps=2, width=32, height=32),
            Wanted("g", {"fox": ["a fox"], "ink": ["ink"]}, ["fox in ink"], steps=30),
        )
        for last in teach(studio, recipe, wanted, home=home, stopped=lambda: bool(asked)):
            if stop(last):
                asked.append(True)
        assert len(studio.pipe.unet._forward_pre_hooks) == 1  # the mixture's own
        return last

    early = run(tmp_path / "a", stop=lambda state: state.calls >= 1)
    assert (early.finished, early.rows) == (False, [])  # heard while the teachers draw
    cut = run(tmp_path / "a", stop=lambda state: len(state.rows) > 5)
    assert not cut.finished
    assert len(cut.rows) < 30
    on, whole = run(tmp_path / "a"), run(tmp_path / "b")
    assert on.finished
    assert on.rows == whole.rows
    with pytest.raises(ValueError, match="other settings") as error:
        run(tmp_path / "a", prompt="a fox in ink <lora:fox:0.1> <lora:ink:1>")
    assert str(tmp_path) not in str(error.value)


def test_nothing_from_a_file_becomes_html():
    from mole_diffusers.app.compose_tab import _plain
    from mole_diffusers.app.page import said

    evil = '<img src="http://x/y.png" onerror=alert(1)>'
    assert "<" not in said(ValueError(evil), page=True).message
    assert said(ValueError(evil), page=False).message == evil
    assert _plain("![a](b) <i>") == "\\!\\[a\\]\\(b\\) \\<i\\>"


def test_uploads(client, pipe, tmp_path):
    file = tiny_lora(pipe, tmp_path / "owl & co.safetensors", rank=3)
    report = client.predict(gradio_client.handle_file(file), api_name="/upload")
    assert (report["name"].startswith("owl"), report["ranks"]) == (True, "3")
    with pytest.raises(gradio_client.exceptions.AppError, match="already a LoRA"):
        client.predict(gradio_client.handle_file(file), api_name="/upload")


def evil(tmp_path):
    """What must not be read, and what is said of it."""
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html><script>alert(1)</script>")
    (tmp_path / "half.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    return tmp_path / "page.safetensors", tmp_path / "half.safetensors"


def test_bad_input_gets_one_sentence_and_the_app_goes_on(client, tmp_path):
    page, half = map(gradio_client.handle_file, evil(tmp_path))
    Image.new("RGB", (8, 8)).save(tmp_path / "none.png")
    outside = {"path": __file__, "url": None, "orig_name": "x"}
    calls = [
        (("/compose", "x <lora:owl:1>"), "there is no LoRA 'owl'; known: fox"),
        (("/compose", "x <lora:fox:very>"), "'very' is not a number"),
        (("/compose", "x <lora:fox:1:lbw=1,2>"), "lbw=1,2 is not a preset"),
        (("/compose", "x", "", -5), "seed must be a whole number"),
        (("/compose", "x", "", 0, "many"), "steps must be a whole number"),
        (("/compose", "x", "", 0, 2, 99.0), "guidance must be a number"),
        (("/compose", "x", "", 0, 2, 3.0, "../../etc"), "there are no gates '../../etc'"),
        (("/compose", "x", "", 0, 2, 3.0, "sum", 1000), "the number of pictures must be in 1..16"),
        (("/compose", "y" * 6000), "at most 5000 characters"),
        (("/redraw", {"prompt": "x", "width": 31}), "divisible by"),
        (("/redraw", {"prompt": "x", "width": 4000}), "at most 2048"),
        (("/redraw", {"seed": 1}), "prompt must be text"),
        (("/redraw", {"prompt": "x", "colour": 1}), "unknown fields ['colour']"),
        (("/redraw", ["x"]), "a recipe is an object"),
        (("/look", {"prompt": "x"}), "there is nothing to see"),
        (("/compare", {"prompt": "x", "arm": "worst"}), "unknown arm 'worst'"),
        (("/compare", RECIPE, ["best"]), "unknown merge 'best'; known: mean, svd"),
        (("/compare", {"prompt": "<lora:fox:1:stop=1>"}, ["svd"]), "one LoRA has one strength"),
        (("/grid", RECIPE, "weight fox", "seed=1"), "is not KIND=VALUE"),
        (("/grid", RECIPE, "seed=" + ",".join("1" * 500), "seed=1"), "is too large"),
        (("/code", {"prompt": "x", "sampler": "Best"}), "unknown sampler 'Best'"),
        (("/export", {"prompt": "x"}), "nothing to export"),
        (("/export", {"prompt": "<lora:fox:1:stop=1>"}), "one LoRA has one strength"),
        (("/train", RECIPE, "../up", {}, [], 2), "a name has letters"),
        (("/train", RECIPE, "sum", {}, [], 2), "is the name of a family"),
        (("/train", {"prompt": "<lora:fox:1>"}, "one", {}, [], 2), "gates weigh two LoRAs or more"),
        (("/train", RECIPE, "one", {}, [], 10**6), "the number of updates must be in"),
        (("/read", gradio_client.handle_file(tmp_path / "none.png")), "none.png holds no recipe"),
        (("/read", outside), "send the file itself"),
        (("/read", "/etc/passwd"), "send the file itself"),
        (("/upload", page), "page.safetensors"),
        (("/upload", half), "half.safetensors"),
    ]
    for (name, *arguments), message in calls:
        with pytest.raises(gradio_client.exceptions.AppError) as error:
            client.predict(*arguments, api_name=name)
        assert message in str(error.value), (name, arguments)
        assert str(tmp_path) not in str(error.value)
    assert len(client.predict(PROMPT, api_name="/compose")[0]) == 1


def test_a_recipe_file_is_read(client, tmp_path):
    (tmp_path / "r.json").write_text(json.dumps({**Recipe(PROMPT, steps=2, width=32, height=32).to_dict()}))
    assert client.predict(gradio_client.handle_file(tmp_path / "r.json"), api_name="/read")["prompt"] == PROMPT
    shutil.copy(tmp_path / "r.json", tmp_path / "big.json")
    (tmp_path / "big.json").write_text("[" * 10**6)
    with pytest.raises(gradio_client.exceptions.AppError, match=r"big\.json"):
        client.predict(gradio_client.handle_file(tmp_path / "big.json"), api_name="/read")
