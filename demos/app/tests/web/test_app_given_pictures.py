"""A control map and a reference picture on the page and in the API."""

import hosts
import numpy as np
import pytest
import torch
from app_client import PROMPT, QueueVisit, launched
from PIL import Image
from tiny import tiny_pipeline

from mole_app.studio import infotext
from mole_app.studio.catalog import Catalog
from mole_app.studio.model_folders import files_of
from mole_app.studio.recipe import Recipe
from mole_app.studio.render import Studio
from mole_app.web.actions import Actions

gr = pytest.importorskip("gradio")
KINDS = ("controlnet", "ip_adapter", "clip_vision")
MAP, SHOWN = (Image.effect_noise((32, 32), sigma).convert("RGB") for sigma in (30, 90))
ASKED = {"controlnet": "canny", "control_strength": 0.7, "ip_adapter": "ip-plus", "ip_scale": 0.4}


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture
def actions(loras, tmp_path):
    torch.manual_seed(1)
    hosts.save_given(tmp_path / "models", pipe := tiny_pipeline(), hosts.controlnet(), hosts.eye(width=128))
    files = {kind: files_of(tmp_path / "models", kind) for kind in KINDS}
    studio = Studio(pipe, Catalog(dict(loras), {}, files=files), "tiny")
    return Actions(studio, home=tmp_path / "gates", gallery=tmp_path / "pictures")


def test_the_page_and_the_api_draw_with_them(actions, tmp_path):
    from gradio_client import handle_file

    from mole_app.web.build import build
    from mole_app.web.draw_over import Given
    from mole_app.web.form import Form

    defaults = Recipe(PROMPT, seed=3, steps=2, width=32, height=32, base="tiny")
    form = Form(actions, defaults)
    assert form.now()[form.more["given"]]["visible"] is True
    assert form.choices[form.controls["controlnet"]]() == ["none", "canny"]
    blocks = build(actions, defaults)
    page = {"ControlNet": "canny", "Control strength": 0.7, "IP-Adapter": "ip-plus", "IP scale": 0.4}
    visit = QueueVisit(blocks, **page, **{"Control map": MAP, "Reference picture": SHOWN})
    visit.press()
    visit.done()
    (entry,) = actions.gallery.entries()
    assert {name: getattr(entry.recipe, name) for name in ASKED} == ASKED
    wanted = actions.studio.draw(entry.recipe, control=MAP, reference=SHOWN)
    assert np.array_equal(pixels(entry.path), np.asarray(wanted))
    assert "needs its control map" in QueueVisit(blocks, "other", ControlNet="canny").press()
    assert "choose one" in QueueVisit(blocks, "other", **{"Control map": MAP}).press()

    MAP.save(tmp_path / "map.png")
    SHOWN.save(tmp_path / "shown.png")
    sent = {"control": handle_file(tmp_path / "map.png"), "reference": handle_file(tmp_path / "shown.png")}
    with launched(blocks, tmp_path / "downloads") as client:
        size = {"steps": 2, "width": 32, "height": 32}
        (file,), (recipe,), _ = client.predict(PROMPT, seed=3, **size, **ASKED, **sent, api_name="/compose")
        assert np.array_equal(pixels(file), np.asarray(wanted))
        assert np.array_equal(pixels(client.predict(recipe, **sent, api_name="/redraw")), np.asarray(wanted))
        code = client.predict(recipe, api_name="/code")
    assert all(f'"{kind}": files_of(".", "{kind}")' in code for kind in KINDS)
    assert 'control=Image.open("control.png"), reference=Image.open("reference.png")' in code
    assert infotext.read(file).control == entry.recipe.control

    field = Given(render=False)
    read = field.preprocess(field.data_model(path=str(tmp_path / "map.png")))
    assert np.array_equal(np.asarray(read.convert("RGB")), np.asarray(MAP))
    assert field.preprocess(None) is None
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(gr.Error, match="cannot be read as a picture"):
        field.preprocess(field.data_model(path=str(tmp_path / "text.png")))
