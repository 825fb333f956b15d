"""The app in a real browser: what a visitor does, from a prompt to the same pixels again."""

import re
import shutil
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event
from urllib.request import urlretrieve

import numpy as np
import pytest
from PIL import Image
from single_file import save_single_file

from mole_diffusers.binding.as_text import read_mask
from mole_diffusers.studio import infotext
from mole_diffusers.studio.base_models import open_base
from mole_diffusers.studio.catalog import Catalog
from mole_diffusers.studio.memory import Memory
from mole_diffusers.studio.names import shared_name
from mole_diffusers.studio.picture_passes import pixels_hash
from mole_diffusers.studio.recipe import Recipe
from mole_diffusers.testing import tiny_lora, tiny_pipeline

pytest.importorskip("gradio")
sys.path.insert(0, str(Path(__file__).parents[2] / "demos" / "app"))
import browser

pytestmark = pytest.mark.skipif(bool(browser.missing()), reason=browser.missing())
WAIT = 120  # seconds; machines that are busy are slow


@contextmanager
def served(studio, recipe, folder, **options):
    """The address of a fresh app, whose pictures are in `folder / "pictures"`; `options` are those of Actions."""
    from mole_diffusers.app.actions import Actions
    from mole_diffusers.app.build import build, launch

    blocks = build(Actions(studio, home=folder / "gates", gallery=folder / "pictures", **options), recipe)
    _, url, _ = launch(blocks, gallery=folder / "pictures", prevent_thread_lock=True, quiet=True)
    try:
        yield url
    finally:
        blocks.close()


@contextmanager
def visiting(studio, recipe, folder, *, width=1280):
    """A page of a fresh app in a fresh browser."""
    with served(studio, recipe, folder) as url, browser.browser(folder, width=width) as page:
        page.open(url)
        yield page


@pytest.fixture
def studio(loras):
    from mole_diffusers.studio.render import Studio

    return Studio(tiny_pipeline(), Catalog(dict(loras), {}), "tiny")


RECIPE = Recipe("a fox <lora:fox:1>", steps=2, width=32, height=32, gates="sum")


@pytest.fixture
def tiny(studio, tmp_path):
    with visiting(studio, RECIPE, tmp_path) as page:
        yield page


@pytest.fixture(params=[1280, 390])
def any_width(request, studio, tmp_path):
    """A page on a desk and on a phone."""
    with visiting(studio, RECIPE, tmp_path, width=request.param) as page:
        yield page


def composed(page, folder, name):
    """Press Compose; the picture's file as the page shows it, which is another than before."""

    def shown():
        return [image.get_attribute("src") for image in page.all("#pictures img")]

    before = shown()[:1]
    page.click("#compose")
    page.until(lambda: page.text("#compose-status").startswith("done") and shown()[:1] not in ([], before), WAIT)
    urlretrieve(shown()[0], folder / name)
    return folder / name


def drawn(page, css="#compose-status"):
    """How many steps of the pictures on the way are done."""
    said = re.match(r"(\d+) of \d+ steps", page.text(css))
    return int(said[1]) if said else 0


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def value(page, css):
    """What stands in a field, also where it cannot be seen."""
    return page.driver.find_element("css selector", f"{css} :is(input, textarea)").get_property("value")


def dropped(page, path):
    page.tab("Keep")
    page.driver.find_element("css selector", "#dropped input[type=file]").send_keys(str(path))
    page.until(lambda: page.text("#dropped-status").startswith("loaded:"), WAIT)
    page.tab("Compose")


@pytest.mark.thorough
def test_a_picture_comes_back_from_itself(tiny, tmp_path):
    first = composed(tiny, tmp_path, "first.png")
    assert infotext.read(first).prompt == "a fox <lora:fox:1>"
    tiny.type("#prompt textarea", "ink <lora:ink:0.5>")
    tiny.until(lambda: "Strength of ink" in tiny.text("body"), WAIT)  # the card is in step with the tag
    tiny.type("#seed input", "7")
    other = composed(tiny, tmp_path, "other.png")
    assert infotext.read(other).seed == 7
    assert not np.array_equal(pixels(other), pixels(first))
    dropped(tiny, first)
    assert np.array_equal(pixels(composed(tiny, tmp_path, "again.png")), pixels(first))
    assert not tiny.errors()


@pytest.mark.thorough
def test_cards_and_tags_are_in_step(tiny, tmp_path):
    tiny.until(lambda: tiny.all(".c0"), WAIT)  # the fox of a fresh page, beside which ink gets the next colour
    tiny.type("#prompt textarea", "ink <lora:ink:0@0,1@0.4:stop=2>")
    tiny.until(lambda: value(tiny, ".c1 .any") == "0@0,1@0.4", WAIT)
    tiny.type(".c1 .any input, .c1 .any textarea", "-7")
    tiny.until(lambda: value(tiny, "#prompt") == "ink <lora:ink:-7:stop=2>", WAIT)
    assert not tiny.driver.find_elements("css selector", ".card :is(input, textarea, button):disabled")
    assert infotext.read(composed(tiny, tmp_path, "negative.png")).tags[0].unet(0, 1) == -7


@pytest.mark.thorough
def test_a_trigger_word_is_ticked_and_the_rest_of_the_prompt_stays(loras, tmp_path):
    from mole_diffusers.studio.render import Studio

    shutil.copy(loras["fox"], tmp_path / "sks.safetensors")
    (tmp_path / "sks.json").write_text('{"activation text": "fox, sks, fur"}')
    studio = Studio(tiny_pipeline(), Catalog({"sks": tmp_path / "sks.safetensors"}, {}), "tiny")
    with visiting(studio, replace(RECIPE, prompt="a hat,\nink <lora:sks:1>"), tmp_path) as page:
        page.until(lambda: page.all(".card fieldset input"), WAIT)
        assert not [box for box in page.all(".card fieldset input") if box.is_selected()]
        page.type("#prompt textarea", "a fox, ink <lora:sks:1>")
        for label, wanted in (("fur", "a fox, ink, fur"), ("sks", "a fox, ink, fur, sks"), ("fur", "a fox, ink, sks")):
            page.one(f".card fieldset input[name='{label}']").click()
            page.until(lambda wanted=wanted: value(page, "#prompt") == f"{wanted} <lora:sks:1>", WAIT)
        page.type(".c0 .any input, .c0 .any textarea", "2")
        page.until(lambda: value(page, "#prompt") == "a fox, ink, sks <lora:sks:2>", WAIT)


def long_job(page):
    """Start many pictures, and wait until the first is on the way."""
    page.type("#steps input[type=number]", "150")
    page.type("#count input[type=number]", "16")
    page.click("#compose")
    page.until(lambda: "left" in page.text("#compose-status"), WAIT)


def cancelled(page):
    page.click("#compose-cancel")
    page.until(lambda: page.text("#compose-status").startswith("stopped after"), WAIT)


@pytest.mark.thorough
def test_a_job_and_the_fields_survive_a_reload(any_width):
    page = any_width
    page.type("#prompt textarea", "ink <lora:ink:0.5>")
    page.type("#negative textarea", "grey")
    page.type("#seed input", "5")
    long_job(page)
    before = drawn(page)
    page.open(page.url)
    page.until(lambda: drawn(page) > before, WAIT)
    assert (value(page, "#prompt"), value(page, "#seed")) == ("ink <lora:ink:0.5>", "5")
    assert value(page, "#negative") == "grey"
    page.until(lambda: "Strength of ink" in page.text("body"), WAIT)
    assert "Strength of fox" not in page.text("body")
    cancelled(page)
    page.open(page.url)
    page.until(lambda: page.text("#compose-status").startswith("stopped after"), WAIT)  # what became of it is still said


@pytest.mark.thorough
def test_every_press_is_a_job_and_one_cancel_stops_them_all(tiny):
    long_job(tiny)
    for ahead in ("1 job", "2 jobs"):
        tiny.click("#compose")
        tiny.until(lambda ahead=ahead: tiny.text("#compose-status") == f"waiting: {ahead} before this one", WAIT)
    tiny.click("#compose-cancel")
    tiny.until(lambda: tiny.text("#compose-status") == "cancelled before it began", WAIT)
    tiny.until(lambda: tiny.click("#compose-cancel") or "nothing of yours is running" in tiny.text("#compose-status"), WAIT)
    assert not tiny.errors()


@pytest.mark.thorough
def test_what_is_typed_while_a_page_opens_stays(tiny, monkeypatch):
    """The other fields come back, and the cards are those of what was typed."""
    from mole_diffusers.app.page import Page

    tiny.until(lambda: "Strength of fox" in tiny.text("body"), WAIT)
    tiny.type("#prompt textarea", "ink <lora:ink:0.5>")
    tiny.type("#seed input", "5")
    tiny.until(lambda: "Strength of ink" in tiny.text("body"), WAIT)
    kept, typed = Page._kept, Event()
    monkeypatch.setattr(Page, "_kept", lambda page, values: typed.wait(WAIT) and kept(page, values))
    tiny.open(tiny.url)
    tiny.type("#prompt textarea", "hat <lora:hat:1>")
    typed.set()
    for _ in range(2):
        tiny.until(lambda: value(tiny, "#seed") == "5", WAIT)
        assert value(tiny, "#prompt") == "hat <lora:hat:1>"
        tiny.until(lambda: "Strength of hat" in tiny.text("body"), WAIT)
        assert "Strength of ink" not in tiny.text("body")
        tiny.open(tiny.url)
    assert not tiny.errors()


@pytest.mark.thorough
@pytest.mark.parametrize("width", [1280, 390])
def test_two_visitors_wait_for_each_other_and_cancel_their_own(studio, tmp_path, width):
    with (
        served(studio, RECIPE, tmp_path) as url,
        browser.browser(tmp_path, width=width) as one,
        browser.browser(tmp_path, width=width) as two,
    ):
        one.open(url)
        long_job(one)
        two.open(url)
        two.until(lambda: two.all(".card"), WAIT)
        assert two.text("#compose-status") == ""  # which is no business of theirs
        two.click("#compose")
        two.until(lambda: two.text("#compose-status") == "waiting: 1 job before this one", WAIT)
        two.click("#compose-cancel")
        two.until(lambda: two.text("#compose-status") == "cancelled before it began", WAIT)
        two.click("#compose")
        two.until(lambda: "waiting" in two.text("#compose-status"), WAIT)
        now = drawn(one)
        one.until(lambda: drawn(one) > now, WAIT)
        cancelled(one)
        two.until(lambda: two.text("#compose-status") == "done", WAIT)
        assert len(two.all("#pictures img")) == 1
        assert not one.errors() + two.errors()


@pytest.mark.thorough
@pytest.mark.parametrize("width", [1280, 390])
def test_another_base_is_chosen_and_the_page_of_another_visitor_says_so(studio, tmp_path, width):
    """The other is a checkpoint file."""
    pipe = tiny_pipeline(1)
    pipe.save_pretrained(tmp_path / "config")
    for weights in (tmp_path / "config").rglob("*.safetensors"):
        weights.unlink()
    file = save_single_file(pipe, tmp_path / "other.safetensors")
    opening = partial(open_base, config=tmp_path / "config", memory=Memory(device="cpu"))
    bases = {"tiny": "tiny", "other": str(file)}
    with (
        served(studio, RECIPE, tmp_path, bases=bases, opening=opening) as url,
        browser.browser(tmp_path, width=width) as one,
        browser.browser(tmp_path, width=width) as two,
    ):
        one.open(url)
        two.open(url)
        two.until(lambda: two.all(".card"), WAIT)
        first = composed(one, tmp_path, "first.png")
        one.choose("#base", "other")
        one.until(lambda: one.text("#base-status") == "other is open: StableDiffusionPipeline", WAIT)
        second = composed(one, tmp_path, "second.png")
        assert infotext.read(second).base == shared_name(str(file))
        assert not np.array_equal(pixels(second), pixels(first))
        two.click("#compose")
        two.until(lambda: "this is for the base model 'tiny', and here is 'other'" in two.text("#compose-status"), WAIT)
        two.open(url)
        two.until(lambda: value(two, "#base") == "other", WAIT)
        assert np.array_equal(pixels(composed(two, tmp_path, "same.png")), pixels(second))
        one.tab("Gallery")
        one.until(lambda: len(one.all("#gallery .thumbnail-item")) == 3, WAIT)
        assert not one.errors() + two.errors()


@pytest.mark.thorough
def test_every_tab_cancels_its_work(any_width):
    page = any_width
    page.type("#prompt textarea", "a fox in ink <lora:fox:1> <lora:ink:1>")
    long_job(page)
    cancelled(page)
    page.tab("See")
    page.click("#compare")
    page.click("#look")
    page.until(lambda: drawn(page, "#compare-status") > 0, WAIT)
    assert page.text("#look-status") == "waiting: 1 job before this one"
    for start in ("#compare", "#look"):
        page.until(lambda start=start: drawn(page, f"{start}-status") > 0, WAIT)
        page.click(f"{start}-cancel")
        page.until(lambda start=start: page.text(f"{start}-status").startswith("stopped"), WAIT)
    page.tab("Keep")
    page.click("#grid")
    page.until(lambda: drawn(page, "#grid-status") > 150, WAIT)  # one of its pictures is there
    page.click("#grid-cancel")
    page.until(lambda: page.text("#grid-status").startswith("stopped after") and page.all("#sheet img"), WAIT)  # with grey
    page.tab("Train")
    page.type("#train-name :is(input, textarea)", "mine")
    page.type("#train-singles textarea", "fox=a fox\nink=ink")
    page.type("#train-composed textarea", "a fox in ink")
    page.type("#train-steps input[type=number]", "500")
    page.click("#train")
    page.until(lambda: "update " in page.text("#train-status"), WAIT)
    page.click("#train-cancel")
    page.until(lambda: page.text("#train-status").startswith("stopped: update"), WAIT)
    page.type("#train-steps input[type=number]", "1")
    page.click("#train")
    page.click("#train-over")  # it asks
    page.until(lambda: page.text("#train-status").startswith("done: on 4 seeds"), WAIT)
    assert not page.all("#again")
    assert not page.errors()


def painted(page, css="#paint canvas"):
    """Paint the left part of the picture."""
    from selenium.webdriver import ActionChains

    sheet = page.one(css)
    page.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", sheet)
    brush = ActionChains(page.driver, duration=50).move_to_element_with_offset(sheet, -60, -100).click_and_hold()
    for x in (-60, -90):
        brush = brush.move_to_element_with_offset(sheet, x, 100).move_to_element_with_offset(sheet, x - 20, -100)
    brush.release().perform()


@pytest.mark.thorough
def test_a_region_is_painted_and_comes_back(any_width, tmp_path):
    page = any_width
    plain = composed(page, tmp_path, "plain.png")
    page.click("#regions button")
    page.until(lambda: value(page, "#paint-of") == "fox" and page.all("#paint canvas"), WAIT)
    page.click("#paint-use")
    page.until(lambda: "nothing is painted" in page.text("#paint-status"), WAIT)
    painted(page)
    for closed in (True, False):
        page.click("#regions button")  # which keeps the paint
        page.until(lambda closed=closed: bool(page.all("#paint-use")) != closed, WAIT)
    page.click("#paint-use")
    page.until(lambda: "acts there" in page.text("#paint-status"), WAIT)  # what was wrong is mended
    page.until(lambda: value(page, "#prompt") == "a fox <lora:fox:1:region=painted>", WAIT)
    page.until(lambda: "painted" in value(page, ".card .region"), WAIT)
    bound = composed(page, tmp_path, "bound.png")
    mask = np.asarray(read_mask(infotext.read(bound).masks["fox"]), np.float32) / 255
    width = mask.shape[1]
    assert mask[:, : width // 2].mean() > 0.2
    assert mask[:, -width // 4 :].max() == 0
    assert not np.array_equal(pixels(bound), pixels(plain))
    page.until(lambda: page.all("#found img"), WAIT)  # the region, over the picture
    page.open(page.url)
    page.until(lambda: "region=painted" in value(page, "#prompt"), WAIT)
    assert np.array_equal(pixels(composed(page, tmp_path, "again.png")), pixels(bound))
    assert not page.errors()


@pytest.mark.thorough
def test_a_region_of_a_wide_picture_has_its_shape(studio, tmp_path):
    """The editor's canvas is a square, with nothing above and below the picture."""
    with visiting(studio, replace(RECIPE, width=64), tmp_path) as page:
        assert pixels(composed(page, tmp_path, "wide.png")).shape[:2] == (32, 64)
        page.click("#regions button")
        page.until(lambda: value(page, "#paint-of") == "fox" and page.all("#paint canvas"), WAIT)
        painted(page)
        page.click("#paint-use")
        page.until(lambda: "acts there" in page.text("#paint-status"), WAIT)
        bound = composed(page, tmp_path, "bound.png")
        mask = np.asarray(read_mask(infotext.read(bound).masks["fox"]), np.float32) / 255
        assert mask.shape == (64, 128)
        rows = mask.max(1) > 0
        assert rows.sum() > 0.6 * len(rows)  # painted over four fifths of the height, not squeezed into two
        assert mask[:, 96:].max() == 0
        assert not page.errors()


@pytest.mark.thorough
def test_a_second_prompt_is_typed_and_survives_a_reload(tmp_path):
    import hosts

    from mole_diffusers.studio.render import Studio

    pipe, _ = hosts.HOSTS["sdxl"]()
    studio = Studio(pipe, Catalog({"fox": tiny_lora(pipe, tmp_path / "fox.safetensors")}, {}), "tiny")
    with visiting(studio, RECIPE, tmp_path) as page:
        page.click("#second button")
        page.until(lambda: page.all("#prompt_2 textarea"), WAIT)
        page.type("#prompt_2 textarea", "a hat")
        first = composed(page, tmp_path, "first.png")
        assert infotext.read(first).prompt_2 == "a hat"
        page.open(page.url)
        page.until(lambda: page.all("#second"), WAIT)
        page.until(lambda: "Strength of fox" in page.text("body"), WAIT)
        again = composed(page, tmp_path, "again.png")  # though its panel is closed
        assert np.array_equal(pixels(again), pixels(first))
        assert infotext.read(again).prompt_2 == "a hat"
        assert not page.errors()


@pytest.mark.thorough
def test_a_picture_is_drawn_over_and_compared(any_width, tmp_path):
    """Sent from a file, all of it, then the part that is painted; comparing draws over it too."""
    page, photo = any_width, tmp_path / "photo.png"
    Image.effect_noise((256, 256), 90).convert("RGB").save(photo)
    plain = composed(page, tmp_path, "plain.png")
    page.click("#over button")
    chooser = "css selector", "#over-picture input[type=file]"  # made when the panel opens, and never seen
    page.until(lambda: page.driver.find_elements(*chooser), WAIT)[0].send_keys(str(photo))
    page.until(lambda: page.all("#over-picture canvas"), WAIT)
    page.type("#strength input[type=number]", "0.5")
    shown = "return getComputedStyle(document.querySelector('#pictures .thumbnail-item img')).imageRendering"
    assert page.driver.execute_script(shown) == "pixelated"  # a small one, with its pixels as squares
    whole = composed(page, tmp_path, "whole.png")
    page.until(lambda: page.driver.execute_script(shown) == "auto", WAIT)
    recipe = infotext.read(whole)
    assert (recipe.image, recipe.mask, recipe.strength) == (pixels_hash(Image.open(photo)), "", 0.5)
    assert not np.array_equal(pixels(whole), pixels(plain))
    painted(page, "#over-picture canvas")
    part = composed(page, tmp_path, "part.png")
    assert infotext.read(part).image == recipe.image
    assert infotext.read(part).mask
    same = np.abs(pixels(part).astype(int) - pixels(photo)).max(-1) <= 1  # where nothing is painted
    assert 0.2 < same.mean() < 0.9
    assert same[:, -32:].all()
    page.tab("See")
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
def test_the_gallery_keeps_finds_and_gives_back(any_width, tmp_path):
    page = any_width
    first = composed(page, tmp_path, "first.png")
    page.type("#prompt textarea", "ink <lora:ink:0.5>")
    composed(page, tmp_path, "second.png")
    page.tab("Gallery")
    labels = lambda: [label.text for label in page.all("#gallery .caption-label")]  # noqa: E731
    page.until(lambda: labels() == ["ink · seed 0", "a fox · seed 0"], WAIT)
    page.type("#find-lora :is(input, textarea)", "FOX")
    page.until(lambda: labels() == ["a fox · seed 0"], WAIT)
    page.click("#star")
    page.until(lambda: page.text("#gallery-status") == "click a picture first", WAIT)
    page.click("#gallery .thumbnail-item")
    page.until(lambda: page.text("#gallery-status").startswith("chosen"), WAIT)
    page.click("#star")
    page.until(lambda: page.text("#gallery-status").startswith("marked"), WAIT)
    page.until(lambda: "★ a fox · seed 0" in page.text("#gallery"), WAIT)
    page.click("#use")  # it is still the chosen one
    page.until(lambda: page.all("#prompt textarea") and value(page, "#prompt") == "a fox <lora:fox:1>", WAIT)
    page.until(lambda: "Strength of fox" in page.text("body"), WAIT)
    assert np.array_equal(pixels(composed(page, tmp_path, "again.png")), pixels(first))
    page.tab("Gallery")
    page.type("#find-lora :is(input, textarea)", "ink")
    page.until(lambda: labels() == ["ink · seed 0"], WAIT)
    assert not page.errors()


@pytest.mark.thorough
def test_a_click_in_the_gallery_is_not_lost_to_a_search(tiny, tmp_path, monkeypatch):
    """Leaving the field, whose search was done, searched again; in a large gallery that ended after the click."""
    import time

    from selenium.webdriver import Keys

    from mole_diffusers.app.gallery import Gallery

    composed(tiny, tmp_path, "first.png")
    tiny.tab("Gallery")
    tiny.one("#find-text :is(input, textarea)").send_keys("fox", Keys.ENTER)
    tiny.until(lambda: tiny.text("#gallery-status") == "1 picture", WAIT)
    entries = Gallery.entries
    monkeypatch.setattr(Gallery, "entries", lambda *given, **how: time.sleep(1) or entries(*given, **how))
    tiny.click("#gallery .thumbnail-item")
    time.sleep(3)
    assert tiny.text("#gallery-status").startswith("chosen: ")
    tiny.click("#star")
    tiny.until(lambda: tiny.text("#gallery-status").startswith("marked"), WAIT)


@pytest.mark.thorough
def test_wrong_files_get_a_sentence_that_goes_once_they_are_right(any_width, loras, tmp_path):
    page = any_width
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html>")
    send = lambda css, path: page.driver.find_element("css selector", css).send_keys(str(path))  # noqa: E731
    upload = "input[type=file][data-testid^='Upload a LoRA']"
    send(upload, tmp_path / "page.safetensors")
    page.until(lambda: page.text("#why").startswith("page.safetensors is an HTML page"), WAIT)
    send(upload, shutil.copy(loras["hat"], tmp_path / "other name.safetensors"))
    page.until(lambda: page.text("#why") == "added hat", WAIT)  # the file is known
    page.until(lambda: "<lora:hat:1>" in value(page, "#prompt"), WAIT)
    page.type("#prompt textarea", "a fox <lora:fix:1>")
    page.until(lambda: page.text("#problem").startswith("there is no LoRA 'fix'"), WAIT)
    page.type("#prompt textarea", "a fox <lora:fox:1>")
    page.until(lambda: page.text("#problem") == "", WAIT)
    page.tab("Keep")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    send("#dropped input[type=file]", tmp_path / "plain.png")
    page.until(lambda: page.text("#dropped-status").startswith("plain.png has no recipe"), WAIT)
    assert str(tmp_path) not in page.text("body")
    assert not page.errors()


@pytest.mark.thorough
def test_a_picture_is_sent_on_to_be_drawn_over_and_keys_compose(any_width, tmp_path):
    from selenium.webdriver import ActionChains, Keys

    page = any_width
    page.type("#seed input", "-1")
    first = composed(page, tmp_path, "first.png")
    page.click("#use-seed")
    page.until(lambda: value(page, "#seed") == str(infotext.read(first).seed), WAIT)
    assert np.array_equal(pixels(composed(page, tmp_path, "same.png")), pixels(first))
    page.click("#draw-over-this")
    page.until(lambda: page.all("#over-picture canvas"), WAIT)
    page.one("#prompt textarea").click()
    ActionChains(page.driver).send_keys(" ink").key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(Keys.CONTROL).perform()
    page.until(lambda: page.text("#compose-status") == "done; drawn over your picture", WAIT)
    over, *_ = newest = sorted((tmp_path / "pictures").glob("*.png"), key=lambda path: path.stat().st_mtime_ns)[::-1]
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
    page.until(lambda: page.all("#over-picture canvas"), WAIT)
    assert infotext.read(composed(page, tmp_path, "over.png")).image == pixels_hash(Image.open(over))
    dropped(page, first)  # which was drawn over no picture
    assert np.array_equal(pixels(composed(page, tmp_path, "again.png")), pixels(first))
    page.open(page.url)
    page.until(lambda: page.text("#compose-status") == "done", WAIT)
    assert page.text("#over-status") == ""
    page.click("#draw-over-this")
    page.until(lambda: page.driver.find_element("css selector", "#has-over input").is_selected(), WAIT)
    page.open(page.url)
    page.until(lambda: page.text("#over-status") == "the picture to draw over is gone: put it there again", WAIT)
    assert not page.errors()


@pytest.mark.thorough
def test_keys_change_strengths_and_weights(tiny):
    from selenium.webdriver import ActionChains, Keys

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
    assert not tiny.errors()


@pytest.mark.thorough
def test_what_is_set_by_hand_is_seen_wherever_it_comes_from(tiny, tmp_path):
    site = "unet.mid_block.attentions.0.transformer_blocks.0"
    replace(RECIPE, locks={site: {"fox": 0.5}}).save(tmp_path / "recipe.json")
    held = lambda: value(tiny, "#held")  # noqa: E731
    tiny.tab("See")
    tiny.until(lambda: held() == "nothing: every gate decides", WAIT)
    dropped(tiny, tmp_path / "recipe.json")
    tiny.tab("See")
    tiny.until(lambda: held() == f"{site}: fox=0.5", WAIT)
    tiny.open(tiny.url)
    tiny.tab("See")
    tiny.until(lambda: tiny.all("#held") and held() == f"{site}: fox=0.5", WAIT)
    tiny.click("#look")
    tiny.until(lambda: held() == "M00: fox=0.5", WAIT)
    tiny.type("#weights textarea, #weights input", "fox=2")
    tiny.click("#lock")
    tiny.until(lambda: "fox=2" in held(), WAIT)
    tiny.click("#free")
    tiny.until(lambda: held() == "nothing: every gate decides", WAIT)
    assert not tiny.errors()


CUT = """
const right = (element) => element.getBoundingClientRect().right;
const seen = (css) => [...document.querySelectorAll(css)].filter((element) => element.offsetParent);
const text = (element) => { const all = document.createRange(); all.selectNodeContents(element); return right(all); };
return [
  ...seen('.card').filter((card) => right(card) > right(card.closest('.phone-column')) + 1),
  ...seen('.card .block span').filter((label) => text(label) > right(label.closest('.block'))),
  ...seen('.card input').filter((input) => input.scrollWidth > input.clientWidth),
].map((element) => element.className + ': ' + (element.innerText || element.value));
"""  # what is cut in the cards


@pytest.mark.thorough
def test_the_page_can_be_used_by_everyone_and_on_a_phone(tiny):
    tiny.resize(1280, 500)
    scrolled = """document.querySelector('#binding').scrollIntoView({block: 'end'});
      return [window.scrollY, document.querySelector('#pictures').getBoundingClientRect().top]"""
    tiny.until(lambda: tiny.driver.execute_script(scrolled)[0] > 600, WAIT)
    assert tiny.driver.execute_script(scrolled)[1] >= 0  # the picture stays beside the settings
    tiny.resize(390, 844)
    for tab in ("See", "Train", "Gallery", "Keep", "Compose"):
        tiny.tab(tab)
        assert not tiny.unnamed()
        wide, window = tiny.driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert wide <= window, tab
    assert tiny.driver.execute_script(CUT) == []
    addresses = tiny.driver.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert addresses
    assert [address for address in addresses if not address.startswith((tiny.url, "data:", "blob:"))] == []


@pytest.mark.thorough
def test_a_visit_to_the_embedded_world(tmp_path):
    from mole_diffusers.emoji.world import concept_files, emoji_world, gate_folders
    from mole_diffusers.studio.render import Studio

    pipe = emoji_world().pipe
    pipe.set_progress_bar_config(disable=True)
    recipe = Recipe("duotone drawing of a fox <lora:fox:1> <lora:duotone:1>", steps=4, gates="auto", base="emoji")
    with visiting(Studio(pipe, Catalog(concept_files(), gate_folders()), "emoji"), recipe, tmp_path) as page:
        first = composed(page, tmp_path, "first.png")
        _compares(page)
        _watches(page)
        _cancels(page)
        _trains(page, tmp_path)
        trained = infotext.read(composed(page, tmp_path, "trained.png"))
        assert (trained.gates, len(trained.gates_sha256)) == ("again", 64)
        _saves(page, tmp_path)
        dropped(page, first)
        assert np.array_equal(pixels(composed(page, tmp_path, "again.png")), pixels(first))
        assert not page.errors()


def _compares(page):
    page.tab("See")
    page.click("#compare")
    page.until(lambda: page.text("#compare-status").startswith("done"), WAIT)
    assert "no gates are trained for these LoRAs" in page.text("#compare-status")
    arms = ["base", "alone fox", "alone duotone", "sum", "bound"]  # drawn a moment after the status
    page.until(lambda: [label.text for label in page.all("#arms .caption-label")] == arms, WAIT)
    assert len(page.all("#slider img")) == 2
    before = {image.get_attribute("src") for image in page.all("#slider img")}
    page.choose("#left", "base")
    page.until(lambda: {image.get_attribute("src") for image in page.all("#slider img")} != before, WAIT)


def _watches(page):
    page.click("#look")
    page.until(lambda: "mean weight: fox" in page.text("#look-status"), WAIT)
    assert page.all("#heat img")
    assert page.all("#shares img")
    page.type("#weights textarea, #weights input", "fox=0.5, duotone=1")
    page.click("#lock")
    page.until(lambda: "fox=0.5, duotone=1" in value(page, "#held"), WAIT)
    before = page.one("#heat img").get_attribute("src")
    page.click("#look")
    page.until(lambda: page.one("#heat img").get_attribute("src") != before, WAIT)  # drawn anew, with what was set
    page.click("#free")


def _cancels(page):
    page.tab("Compose")
    page.type("#count input[type=number]", "16")
    page.click("#compose")
    page.until(lambda: drawn(page) > 4, WAIT)  # the first of 16 pictures is done
    page.click("#compose-cancel")
    page.until(lambda: page.text("#compose-status").startswith("stopped after"), WAIT)
    made = int(page.text("#compose-status").split()[2])
    assert 1 <= made < 16
    page.until(lambda: len(page.all("#pictures .caption-label")) == made, WAIT)  # what is done stays
    page.type("#count input[type=number]", "1")


def _trains(page, folder):
    page.tab("Train")
    page.click("#suggest")
    page.until(lambda: value(page, "#train-singles"), WAIT)
    page.type("#train-name input, #train-name textarea", "mine")
    page.type("#train-steps input[type=number]", "2")
    page.click("#train")
    page.until(lambda: page.text("#train-status").startswith("done: on 4 seeds"), WAIT)
    assert page.all("#loss img")
    assert [label.text for label in page.all("#validation .caption-label")][-1] == "after, seed 1001"
    _gates_as_files(page, folder)
    page.tab("Compose")


def _gates_as_files(page, folder):
    page.click("#gate-files button")
    page.until(lambda: value(page, "#which-gates") == "mine", WAIT)
    page.click("#gates-out")
    links = page.until(lambda: len(found := page.all("#gates-given a")) == 2 and found, WAIT)
    paths = [folder / Path(link.get_attribute("href")).name for link in links]
    for link, path in zip(links, paths, strict=True):
        urlretrieve(link.get_attribute("href"), path)
    assert {path.name for path in paths} == {"mine.safetensors", "mine.json"}
    page.type("#new-name input, #new-name textarea", "again")
    page.driver.find_element("css selector", "input[type=file][data-testid^='Upload gates']").send_keys(
        "\n".join(map(str, paths))
    )
    told = "factors gates again for duotone, fox", "factors gates again for fox, duotone"
    page.until(lambda: page.text("#gates-told").startswith(told), WAIT)
    page.until(lambda: value(page, "#which-gates") == "again", WAIT)


def _saves(page, folder):
    page.tab("Keep")
    page.click("#save")
    link = page.until(lambda: page.all("#files a[href*='recipe-']"), WAIT)[0]
    urlretrieve(link.get_attribute("href"), folder / "r.json")
    assert infotext.read(folder / "r.json").gates == "again"
