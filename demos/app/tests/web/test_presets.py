"""Styles and presets: kept, chosen, and shared as files."""

import pytest
from app_client import built, plain
from PIL import Image

from mole_app.studio import infotext
from mole_app.studio.recipe import Recipe
from mole_app.studio.styles import Style, read_styles, save_styles

pytest.importorskip("gradio")
from mole_app.web.presets import Presets

INK = Style("ink", "{prompt}, ink drawing", "photo")
WIDE = Recipe("a fox", "blur", seed=5, steps=9, width=64, height=32, sampler="Euler", clip_skip=2)


@pytest.fixture
def blocks(loras, tmp_path):
    home = tmp_path / "home"
    Presets(home / ".presets").add_styles([INK])
    return built(loras, home), Presets(home / ".presets")


def values(blocks, name, *given, **shown):
    """What an event gives, by elem_id; `shown` are values of fields, by elem_id."""
    (event,) = [event for event in blocks.fns.values() if event.fn is not None and event.fn.__name__ == name]
    now = [shown.get(getattr(one, "elem_id", None), one.value) for one in event.inputs[len(given) :]]
    return dict(zip([getattr(one, "elem_id", None) or i for i, one in enumerate(event.outputs)],
                    plain(event)(*given, *now), strict=True))  # fmt: skip


def test_a_style_is_put_around_the_prompt_and_can_be_undone(blocks):
    page, kept = blocks
    assert values(page, "kept_now")["style"]["choices"] == ["ink"]
    text = "a fox <lora:fox:0.5>"
    put = values(page, "put_around", "ink", "blur", text)
    assert (put["prompt"], put["negative"]) == (f"{text}, ink drawing", "blur, photo")
    (rewrites,) = [value for value in put.values() if isinstance(value, list) and text in value]
    assert rewrites == [text, f"{text}, ink drawing"]  # which Undo goes back in
    assert read_styles(put["preset-share"]["value"]) == kept.styles == {"ink": INK}


def test_the_words_and_the_settings_of_the_page_are_saved_and_come_back(blocks):
    page, kept = blocks
    said = values(page, "save_words", "mine ", prompt="{prompt} in oil", negative="photo")
    assert said["preset-status"] == "the style mine is kept"
    assert kept.styles["mine"] == Style("mine", "{prompt} in oil", "photo")
    shown = {name: getattr(WIDE, name) for name in ("negative", "steps", "width", "height", "sampler", "clip_skip")}
    saved = values(page, "save_settings", "wide", **shown)
    assert saved["preset-status"] == "the preset wide is kept"
    assert saved["preset"]["choices"] == ["wide"]
    filled = values(page, "fill_in", "wide")
    assert {name: filled[name] for name in shown} == shown
    assert "prompt" not in filled
    assert infotext.contents(filled["preset-share"]["value"]).recipe.steps == 9


def test_a_shared_file_is_added_and_overwrites_nothing(tmp_path):
    kept = Presets(tmp_path / "home")
    save_styles(tmp_path / "styles.csv", [INK])
    WIDE.save(tmp_path / "wide.json")
    infotext.save(Image.new("RGB", (64, 32)), tmp_path / "picture.png", WIDE)
    for name, added in (("styles.csv", "ink"), ("wide.json", "wide"), ("picture.png", "picture"), ("styles.csv", "ink")):
        assert kept.add(tmp_path / name) == [added]
    assert list(kept.presets) == ["picture", "wide"]
    for name, path in kept.presets.items():
        recipe = infotext.contents(path).recipe
        assert (recipe.prompt, recipe.seed, recipe.steps, recipe.negative) == ("", 0, 9, "blur"), name
    with pytest.raises(ValueError, match="there is already another style 'INK': give it another name"):
        kept.add_styles([Style("INK", "other")])
    with pytest.raises(ValueError, match="there is already a preset 'wide': give another name"):
        kept.add_preset("wide", WIDE)
    with pytest.raises(ValueError, match="give it a name"):
        kept.add_preset(" .. ", WIDE)
    (tmp_path / "odd.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"odd\.csv is no file of styles"):
        kept.add(tmp_path / "odd.csv")
    assert not (tmp_path / "odd.csv").exists()
