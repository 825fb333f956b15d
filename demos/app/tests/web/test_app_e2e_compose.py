"""The Compose tab in a real browser: prompts, cards, regions, pictures to draw over."""

import shutil
from dataclasses import replace
from threading import Event
from urllib.request import urlretrieve

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_lora, tiny_pipeline

from mole_app.studio import infotext
from mole_app.studio.catalog import Catalog
from mole_app.studio.picture_passes import pixels_hash
from mole_diffusers.binding.as_text import read_mask

pytest.importorskip("gradio")
pytest.importorskip("selenium")
from page_visits import (
    RECIPE,
    WAIT,
    browser,
    cards,
    composed,
    dropped,
    kept,
    opened,
    painted,
    pixels,
    place,
    sent,
    value,
    visiting,
)  # fmt: skip
from selenium.webdriver import ActionChains, Keys

pytestmark = pytest.mark.skipif(bool(browser.missing()), reason=browser.missing())
MOST_PAINT = """const sheet = document.querySelector("#sheet"), pen = sheet.getContext("2d");
const paint = pen.getImageData(0, 0, sheet.width, sheet.height).data.filter((_, i) => i % 4 == 3);
return paint.reduce((a, b) => Math.max(a, b))"""


@pytest.mark.thorough
def test_an_earlier_prompt_is_clicked_and_comes_back_with_its_cards(tiny, tmp_path):
    composed(tiny, tmp_path)
    tiny.type("#prompt textarea", "a hat <lora:hat:0.5>")
    cards(tiny, "hat")
    opened(tiny, "#history")
    (earlier,) = tiny.until(lambda: tiny.all("#earlier label"), WAIT)
    assert earlier.text == RECIPE.prompt
    earlier.click()
    tiny.until(lambda: value(tiny, "#prompt") == RECIPE.prompt, WAIT)
    cards(tiny, "fox")
    tiny.click("#undo")
    cards(tiny, "hat")
    assert value(tiny, "#prompt") == "a hat <lora:hat:0.5>"
    assert not tiny.errors()


@pytest.mark.thorough
def test_a_picture_comes_back_from_itself(tiny, tmp_path):
    first = composed(tiny, tmp_path)
    assert infotext.read(first).prompt == "a fox <lora:fox:1>"
    tiny.type("#prompt textarea", "ink <lora:ink:0.5>")
    cards(tiny, "ink")  # the card is in step with the tag
    tiny.type("#seed input", "7")
    other = composed(tiny, tmp_path)
    assert infotext.read(other).seed == 7
    assert not np.array_equal(pixels(other), pixels(first))
    dropped(tiny, first)
    assert np.array_equal(pixels(composed(tiny, tmp_path)), pixels(first))
    assert not tiny.errors()


@pytest.mark.thorough
def test_cards_and_tags_are_in_step(tiny, tmp_path):
    cards(tiny, "fox")
    tiny.type("#prompt textarea", "ink <lora:ink:0@0,1@0.4:stop=2>")
    tiny.until(lambda: value(tiny, ".c0 .any") == "0@0,1@0.4", WAIT)  # of ink, the only one
    tiny.type(".c0 .any input, .c0 .any textarea", "-7")
    tiny.until(lambda: value(tiny, "#prompt") == "ink <lora:ink:-7:stop=2>", WAIT)
    assert not tiny.driver.find_elements("css selector", ".card :is(input, textarea, button):disabled")
    assert infotext.read(composed(tiny, tmp_path)).tags[0].unet(0, 1) == -7


@pytest.mark.thorough
def test_a_trigger_word_is_ticked_and_the_rest_of_the_prompt_stays(loras, tmp_path):
    from mole_app.studio.render import Studio

    shutil.copy(loras["fox"], tmp_path / "sks.safetensors")
    (tmp_path / "sks.json").write_text('{"activation text": "fox, sks, fur"}')
    studio = Studio(tiny_pipeline(), Catalog({"sks": tmp_path / "sks.safetensors"}, {}), "tiny")
    with visiting(studio, replace(RECIPE, prompt="a hat,\nink <lora:sks:1>"), tmp_path) as page:
        page.until(lambda: page.all(".card .chips input"), WAIT)
        assert not [box for box in page.all(".card .chips input") if box.is_selected()]
        page.type("#prompt textarea", "a fox, ink <lora:sks:1>")
        page.until(lambda: page.one(".card .chips input[name='fox']").is_selected(), WAIT)
        for label, wanted in (("fur", "a fox, ink, fur"), ("sks", "a fox, ink, fur, sks"), ("fur", "a fox, ink, sks")):
            page.one(f".card .chips input[name='{label}']").click()
            page.until(lambda wanted=wanted: value(page, "#prompt") == f"{wanted} <lora:sks:1>", WAIT)
        page.type(".c0 .any input, .c0 .any textarea", "2")
        page.until(lambda: value(page, "#prompt") == "a fox, ink, sks <lora:sks:2>", WAIT)


@pytest.mark.thorough
def test_what_is_typed_while_a_page_opens_stays(tiny, monkeypatch):
    """The other fields come back, and the cards are those of what was typed."""
    from mole_app.web import page

    cards(tiny, "fox")
    tiny.type("#prompt textarea", "ink <lora:ink:0.5>")
    tiny.type("#seed input", "5")
    cards(tiny, "ink")
    restored, typed = page.restored, Event()
    monkeypatch.setattr(page, "restored", lambda *kept: typed.wait(WAIT) and restored(*kept))
    tiny.open(tiny.url)
    tiny.type("#prompt textarea", "hat <lora:hat:1>")
    typed.set()
    for _ in range(2):
        tiny.until(lambda: value(tiny, "#seed") == "5", WAIT)
        assert value(tiny, "#prompt") == "hat <lora:hat:1>"
        cards(tiny, "hat")
        tiny.open(tiny.url)
    assert not tiny.errors()


@pytest.mark.thorough
def test_a_region_is_painted_and_comes_back(any_width, tmp_path):
    page = any_width
    cards(page, "fox")
    plain = composed(page, tmp_path)
    page.click("#paint-regions")
    page.until(lambda: value(page, "#paint-of") == "fox" and page.all("#paint canvas"), WAIT)
    page.until(lambda: place(page, "#sheet") == place(page, "#picture"), WAIT)
    painted(page)
    most = lambda: page.driver.execute_script(MOST_PAINT)  # noqa: E731
    assert most() == 255
    ActionChains(page.driver).key_down(Keys.CONTROL).send_keys("z").key_up(Keys.CONTROL).perform()
    page.until(lambda: most() == 0, WAIT)
    page.click("#paint-use")
    page.until(lambda: "nothing is painted" in page.text("#picture-status"), WAIT)
    painted(page)
    page.click("#erase input")
    painted(page)
    assert most() < 100  # at the edges of the strokes
    page.click("#erase input")
    page.click("#paint-empty")
    page.until(lambda: most() == 0, WAIT)
    painted(page)
    page.click("#paint-use")
    page.until(lambda: "acts in what you painted" in page.text("#picture-status"), WAIT)
    page.until(lambda: value(page, "#prompt") == "a fox <lora:fox:1:region=painted>", WAIT)
    page.until(lambda: page.one(".card .place input[value='painted']").is_selected(), WAIT)
    bound = composed(page, tmp_path)
    mask = np.asarray(read_mask(infotext.read(bound).masks["fox"]), np.float32) / 255
    width = mask.shape[1]
    assert mask[:, : width // 2].mean() > 0.2
    assert mask[:, -width // 4 :].max() == 0
    assert not np.array_equal(pixels(bound), pixels(plain))
    page.until(lambda: page.all("#found img"), WAIT)  # the region, over the picture
    page.open(page.url)
    page.until(lambda: "region=painted" in value(page, "#prompt"), WAIT)
    assert np.array_equal(pixels(composed(page, tmp_path)), pixels(bound))
    page.click(".card .place input[value='auto']")
    page.until(lambda: value(page, "#prompt") == "a fox <lora:fox:1>", WAIT)
    page.click(".card .place input[value='painted']")  # which opens the picture for painting
    page.until(lambda: page.all("#paint canvas"), WAIT)
    page.click("#paint-back")
    page.until(lambda: page.all("#tools") and not page.all("#paint canvas"), WAIT)
    assert not page.errors()


@pytest.mark.thorough
def test_a_region_of_a_wide_picture_has_its_shape(studio, tmp_path):
    with visiting(studio, replace(RECIPE, width=64), tmp_path) as page:
        cards(page, "fox")
        assert pixels(composed(page, tmp_path)).shape[:2] == (32, 64)
        page.click("#paint-regions")
        page.until(lambda: value(page, "#paint-of") == "fox" and page.all("#paint canvas"), WAIT)
        page.click("#paint-empty")
        painted(page)
        page.click("#paint-use")
        page.until(lambda: "acts in what you painted" in page.text("#picture-status"), WAIT)
        bound = composed(page, tmp_path)
        mask = np.asarray(read_mask(infotext.read(bound).masks["fox"]), np.float32) / 255
        assert mask.shape == (64, 128)
        rows = mask.max(1) > 0
        assert rows.sum() > 0.5 * len(rows)
        assert mask[:, 96:].max() == 0
        assert not page.errors()


@pytest.mark.thorough
def test_a_second_prompt_is_typed_and_survives_a_reload(tmp_path):
    import hosts

    from mole_app.studio.render import Studio

    pipe, _ = hosts.HOSTS["sdxl"]()
    studio = Studio(pipe, Catalog({"fox": tiny_lora(pipe, tmp_path / "fox.safetensors")}, {}), "tiny")
    with visiting(studio, RECIPE, tmp_path) as page:
        opened(page, "#second")
        page.until(lambda: page.all("#prompt_2 textarea"), WAIT)
        page.type("#prompt_2 textarea", "a hat")
        first = composed(page, tmp_path)
        assert infotext.read(first).prompt_2 == "a hat"
        page.open(page.url)
        page.until(lambda: page.all("#second"), WAIT)
        cards(page, "fox")
        again = composed(page, tmp_path)  # though its panel is closed
        assert np.array_equal(pixels(again), pixels(first))
        assert infotext.read(again).prompt_2 == "a hat"
        assert not page.errors()


@pytest.mark.thorough
def test_a_picture_is_drawn_over_and_compared(any_width, tmp_path):
    """Sent from a file, all of it, then the part that is painted; comparing draws over it too."""
    page, photo = any_width, tmp_path / "photo.png"
    Image.effect_noise((256, 256), 90).convert("RGB").save(photo)
    plain = composed(page, tmp_path)
    opened(page, "#over")
    sent(page, "#over-picture input[type=file]", photo)  # made when the panel opens, and never seen
    page.until(lambda: page.all("#over-picture img"), WAIT)
    page.type("#strength input[type=number]", "0.5")
    shown = "return getComputedStyle(document.querySelector('#picture img')).imageRendering"
    assert page.driver.execute_script(shown) == "auto"  # enlarged smoothly
    whole = composed(page, tmp_path)
    page.until(lambda: page.driver.execute_script(shown) == "auto", WAIT)
    recipe = infotext.read(whole)
    assert (recipe.image, recipe.mask, recipe.strength) == (pixels_hash(Image.open(photo)), "", 0.5)
    assert not np.array_equal(pixels(whole), pixels(plain))
    painted(page, "#over-sheet")
    part = composed(page, tmp_path)
    assert infotext.read(part).image == recipe.image
    assert infotext.read(part).mask
    same = np.abs(pixels(part).astype(int) - pixels(photo)).max(-1) <= 1  # where nothing is painted
    assert 0.2 < same.mean() < 0.9
    assert same[:, -32:].all()
    page.tab("Compare")
    page.click("#compare")
    page.until(lambda: page.text("#compare-status").startswith("done"), WAIT)
    page.until(lambda: len(page.all("#arms .thumbnail-item img")) == 4, WAIT)
    for i, image in enumerate(page.all("#arms .thumbnail-item img")):
        urlretrieve(image.get_attribute("src"), tmp_path / f"arm{i}.png")
        assert infotext.read(tmp_path / f"arm{i}.png").mask == infotext.read(part).mask
    wide, window = page.driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert wide <= window
    assert not page.errors()


@pytest.mark.thorough
def test_a_picture_is_sent_on_to_be_drawn_over_and_keys_compose(any_width, tmp_path):
    page = any_width
    page.type("#seed input", "-1")
    first = composed(page, tmp_path)
    page.click("#use-seed")
    page.until(lambda: value(page, "#seed") == str(infotext.read(first).seed), WAIT)
    assert np.array_equal(pixels(composed(page, tmp_path)), pixels(first))
    page.click("#draw-over-this")
    page.until(lambda: page.all("#over-picture img"), WAIT)
    page.one("#prompt textarea").click()
    ActionChains(page.driver).send_keys(" ink").key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(Keys.CONTROL).perform()
    page.until(lambda: page.text("#compose-status") == "done; drawn over your picture", WAIT)
    over, *_ = newest = kept(tmp_path)[::-1]
    assert len(newest) == 3
    assert (infotext.read(over).prompt, infotext.read(over).image) == (
        "a fox ink <lora:fox:1>",
        pixels_hash(Image.open(first)),
    )
    page.tab("Gallery")
    page.until(lambda: len(page.all("#gallery .thumbnail-item")) == 3, WAIT)
    page.click("#gallery .thumbnail-item")
    page.until(lambda: page.text("#gallery-status").startswith("chosen"), WAIT)
    page.click("#gallery-over")
    page.until(lambda: page.all("#over-picture img"), WAIT)
    assert infotext.read(composed(page, tmp_path)).image == pixels_hash(Image.open(over))
    dropped(page, first)  # which was drawn over no picture
    assert np.array_equal(pixels(composed(page, tmp_path)), pixels(first))
    page.open(page.url)
    page.until(lambda: page.text("#compose-status") == "done", WAIT)
    assert page.text("#over-status") == ""
    page.click("#draw-over-this")
    page.until(lambda: page.driver.find_element("css selector", "#has-over input").is_selected(), WAIT)
    page.open(page.url)
    page.until(lambda: page.text("#over-status") == "the picture to draw over is gone: put it there again", WAIT)
    assert not page.errors()


@pytest.mark.thorough
@pytest.mark.parametrize("typed", ["once they are drawn", "while they are drawn", "and left before they are drawn"])
def test_what_is_typed_into_a_card_stays_while_the_cards_are_drawn_anew(tiny, typed, monkeypatch):
    """The cards are drawn anew because the prompt, which was edited, is left for a field of a card."""
    from mole_app.web import mixer

    cards(tiny, "fox")
    draw, goes_on = mixer._card, Event()
    monkeypatch.setattr(mixer, "_card", lambda *given: goes_on.wait(WAIT) and draw(*given))
    box, field = tiny.one("#prompt textarea"), tiny.one(".c0 .any textarea")
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys("a fox <lora:fox:1.05>")
    field.send_keys(Keys.CONTROL, "a")
    if typed == "once they are drawn":
        goes_on.set()
        tiny.until(lambda: field.get_property("value") == "1.05", WAIT)
    field.send_keys("2")
    if typed == "and left before they are drawn":
        field.send_keys(Keys.TAB)
        goes_on.set()
    else:
        goes_on.set()
        tiny.until(lambda: value(tiny, ".c0 .slide") == "1.05", WAIT)  # it is drawn
        assert value(tiny, ".c0 .any") == "2"
        field.send_keys(Keys.TAB)
    tiny.until(lambda: value(tiny, "#prompt") == "a fox <lora:fox:2>", WAIT)
    tiny.until(lambda: value(tiny, ".c0 .slide") == "2", WAIT)
    tiny.one("#steps input[type=range]").send_keys(Keys.CONTROL, "z")
    tiny.until(lambda: (value(tiny, "#prompt"), value(tiny, ".c0 .any")) == ("a fox <lora:fox:1.05>", "1.05"), WAIT)
    assert not tiny.errors()


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("clicked", "wanted"),
    [
        (".place input[value='everywhere']", "a fox <lora:sks:1.05:region=everywhere>"),
        (".chips input[name='fur']", "a fox, fur <lora:sks:1.05>"),
    ],
)
def test_what_is_clicked_on_a_card_before_the_page_shows_it_drawn_anew_is_not_lost(
    loras, tmp_path, monkeypatch, clicked, wanted
):
    """The server is done with drawing the cards, and their page has not heard of it yet."""
    from gradio.renderable import Renderable

    from mole_app.studio.render import Studio

    shutil.copy(loras["fox"], tmp_path / "sks.safetensors")
    (tmp_path / "sks.json").write_text('{"activation text": "fox, fur, tail"}')
    studio = Studio(tiny_pipeline(), Catalog({"sks": tmp_path / "sks.safetensors"}, {}), "tiny")
    apply, slow, drawn, goes_on = Renderable.apply, Event(), Event(), Event()

    def slowly(cards, *given):
        apply(cards, *given)
        if slow.is_set():
            drawn.set()
            goes_on.wait(WAIT)

    monkeypatch.setattr(Renderable, "apply", slowly)

    with visiting(studio, replace(RECIPE, prompt="a hat <lora:sks:1>"), tmp_path) as page:
        cards(page, "sks")
        slow.set()
        page.type("#prompt textarea", "a fox <lora:sks:1.05>")
        assert drawn.wait(WAIT)
        page.driver.execute_script("document.querySelector(arguments[0]).click()", f".card {clicked}")
        goes_on.set()
        page.until(lambda: (value(page, "#prompt"), value(page, ".c0 .any")) == (wanted, "1.05"), WAIT)
        page.until(lambda: page.one(f".card {clicked}").is_selected(), WAIT)
        assert not page.errors()


@pytest.mark.thorough
def test_keys_change_strengths_and_weights(tiny):
    def pressed(key, first, last):
        """The prompt after Ctrl and a key, with these characters selected."""
        box = tiny.one("#prompt textarea")
        select = "const [box, ...ends] = arguments; box.focus(); box.setSelectionRange(...ends)"
        tiny.driver.execute_script(select, box, first, last)
        ActionChains(tiny.driver).key_down(Keys.CONTROL).send_keys(key).key_up(Keys.CONTROL).perform()
        return value(tiny, "#prompt")

    tiny.type("#prompt textarea", "a red fox <lora:fox:1> <lora:ink>")
    assert pressed(Keys.UP, 12, 12) == "a red fox <lora:fox:1.05> <lora:ink>"
    assert pressed(Keys.UP, 30, 30) == "a red fox <lora:fox:1.05> <lora:ink>"
    assert pressed(Keys.UP, 2, 10) == "a (red fox:1.1) <lora:fox:1.05> <lora:ink>"  # the space after it was selected, too
    assert pressed(Keys.UP, 5, 5) == "a (red fox:1.2) <lora:fox:1.05> <lora:ink>"
    assert pressed(Keys.DOWN, 1, 1) == "(a:0.9) (red fox:1.2) <lora:fox:1.05> <lora:ink>"
    assert pressed("z", 1, 1) == "a (red fox:1.2) <lora:fox:1.05> <lora:ink>"
    assert pressed("z", 1, 1) == "a (red fox:1.1) <lora:fox:1.05> <lora:ink>"
    cards(tiny, "fox", "ink")
    tiny.type(".c0 .any input, .c0 .any textarea", "2")
    tiny.until(lambda: "<lora:fox:2>" in value(tiny, "#prompt"), WAIT)
    pressed("z", 1, 1)  # of a card, too
    tiny.until(lambda: value(tiny, "#prompt") == "a (red fox:1.1) <lora:fox:1.05> <lora:ink>", WAIT)
    assert not tiny.errors()
