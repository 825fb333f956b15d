"""The app in a real browser: what a visitor does, from a prompt to the same pixels again."""

import re
import sys
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlretrieve

import numpy as np
import pytest
from PIL import Image

from mole_diffusers.studio import infotext
from mole_diffusers.studio.catalog import Catalog
from mole_diffusers.studio.recipe import Recipe
from mole_diffusers.testing import tiny_pipeline

pytest.importorskip("gradio")
sys.path.insert(0, str(Path(__file__).parents[2] / "demos" / "app"))
import browser

pytestmark = pytest.mark.skipif(bool(browser.missing()), reason=browser.missing())
WAIT = 240  # seconds; machines that are busy are slow


@contextmanager
def visiting(studio, recipe, folder):
    """A page of a fresh app in a fresh browser."""
    from mole_diffusers.app.actions import Actions
    from mole_diffusers.app.build import build, launch

    blocks = build(Actions(studio, home=folder / "gates"), recipe)
    _, url, _ = launch(blocks, prevent_thread_lock=True, quiet=True)
    try:
        with browser.browser(folder) as page:
            page.open(url)
            yield page
    finally:
        blocks.close()


@pytest.fixture
def tiny(loras, tmp_path):
    from mole_diffusers.studio.render import Studio

    studio = Studio(tiny_pipeline(), Catalog(dict(loras), {}), "tiny")
    with visiting(studio, Recipe("a fox <lora:fox:1>", steps=2, width=32, height=32, gates="sum"), tmp_path) as page:
        yield page


def composed(page, folder, name):
    """Press Compose; the picture's file as the page shows it, which is another than before."""

    def shown():
        return [image.get_attribute("src") for image in page.all("#pictures img")]

    before = shown()[:1]
    page.click("#compose")
    page.until(lambda: page.text("#status") == "done" and shown()[:1] not in ([], before), WAIT)
    urlretrieve(shown()[0], folder / name)
    return folder / name


def drawn(page):
    """How many steps of the pictures on the way are done."""
    said = re.match(r"(\d+) of \d+ steps", page.text("#status"))
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
    tiny.type("#prompt textarea", "ink <lora:ink:0@0,1@0.4:stop=2>")
    tiny.until(lambda: value(tiny, ".c1 .any") == "0@0,1@0.4", WAIT)
    tiny.type(".c1 .any input, .c1 .any textarea", "-7")
    tiny.until(lambda: value(tiny, "#prompt") == "ink <lora:ink:-7:stop=2>", WAIT)
    assert not tiny.driver.find_elements("css selector", ".card :is(input, textarea, button):disabled")
    assert infotext.read(composed(tiny, tmp_path, "negative.png")).tags[0].unet(0, 1) == -7


@pytest.mark.thorough
def test_what_waits_in_the_queue_is_cancelled_at_once(tiny):
    tiny.type("#steps input[type=number]", "150")
    tiny.type("#count input[type=number]", "16")
    tiny.click("#compose")
    tiny.until(lambda: "left" in tiny.text("#status"), WAIT)
    running = tiny.driver.current_window_handle
    tiny.driver.switch_to.new_window("tab")
    tiny.open(tiny.url)
    tiny.click("#compose")
    waits = lambda: "queue" in tiny.text("#now") + tiny.text("#pictures")  # noqa: E731
    tiny.until(waits, WAIT)
    tiny.click("#cancel")
    tiny.until(lambda: "cancelled" in tiny.text("#status") and not waits(), WAIT)
    tiny.driver.switch_to.window(running)
    assert "left" in tiny.text("#status")  # the other visitor's work goes on
    tiny.click("#cancel")
    tiny.until(lambda: tiny.text("#status").startswith("stopped after"), WAIT)


@pytest.mark.thorough
def test_the_page_can_be_used_by_everyone_and_on_a_phone(tiny):
    tiny.driver.set_window_size(500, 900)  # as narrow as Chromium's window gets
    for tab in ("See", "Train", "Keep", "Compose"):
        tiny.tab(tab)
        assert not tiny.unnamed()
        wide, window = tiny.driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert wide <= window, tab
    addresses = tiny.driver.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert addresses
    assert [address for address in addresses if not address.startswith((tiny.url, "data:", "blob:"))] == []


@pytest.mark.thorough
def test_a_visit_to_the_embedded_world(tmp_path):
    from mole_diffusers.emoji.world import concept_files, emoji_world, gate_folders
    from mole_diffusers.studio.render import Studio

    pipe = emoji_world().pipe
    pipe.set_progress_bar_config(disable=True)
    recipe = Recipe("ink drawing of a fox <lora:fox:1> <lora:ink:1>", steps=4, gates="auto", base="emoji")
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
    page.until(lambda: page.text("#see-status") == "done", WAIT)
    arms = ["base", "alone fox", "alone ink", "sum", "gates"]  # drawn a moment after the status
    page.until(lambda: [label.text for label in page.all("#arms .caption-label")] == arms, WAIT)
    assert len(page.all("#slider img")) == 2
    before = {image.get_attribute("src") for image in page.all("#slider img")}
    page.choose("#left", "base")
    page.until(lambda: {image.get_attribute("src") for image in page.all("#slider img")} != before, WAIT)


def _watches(page):
    page.click("#look")
    page.until(lambda: "mean weight: fox" in page.text("#see-status"), WAIT)
    assert page.all("#heat img")
    assert page.all("#shares img")
    page.type("#weights textarea, #weights input", "fox=0.5, ink=1")
    page.click("#lock")
    page.until(lambda: "fox=0.5, ink=1" in value(page, "#held"), WAIT)
    before = page.one("#heat img").get_attribute("src")
    page.click("#look")
    page.until(lambda: page.one("#heat img").get_attribute("src") != before, WAIT)  # drawn anew, with what was set
    page.click("#free")


def _cancels(page):
    page.tab("Compose")
    page.type("#count input[type=number]", "16")
    page.click("#compose")
    page.until(lambda: drawn(page) > 4, WAIT)  # the first of 16 pictures is done
    page.click("#cancel")
    page.until(lambda: page.text("#status").startswith("stopped after"), WAIT)
    made = int(page.text("#status").split()[2])
    assert 1 <= made < 16
    page.until(lambda: len(page.all("#pictures .caption-label")) == made, WAIT)  # what is done stays
    page.type("#count input[type=number]", "1")


def _trains(page, folder):
    page.tab("Train")
    page.click("#suggest")
    page.until(lambda: value(page, "#singles"), WAIT)
    page.type("#gates-name input, #gates-name textarea", "mine")
    page.type("#updates input[type=number]", "2")
    page.click("#train")
    page.until(lambda: "done" in page.text("#train-status"), WAIT)
    assert page.all("#loss img")
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
    page.until(lambda: "flow gates again for fox, ink" in page.text("#gates-told"), WAIT)
    page.until(lambda: value(page, "#which-gates") == "again", WAIT)


def _saves(page, folder):
    page.tab("Keep")
    page.click("#save")
    link = page.until(lambda: page.all("#files a[href*='recipe-']"), WAIT)[0]
    urlretrieve(link.get_attribute("href"), folder / "r.json")
    assert infotext.read_any(folder / "r.json").gates == "again"
