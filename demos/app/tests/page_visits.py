"""A served app in a real browser: what the browser tests of the page share."""

import re
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from mole_app.studio import infotext
from mole_app.studio.recipe import Recipe

sys.path.insert(0, str(Path(__file__).parents[1]))
import browser

WAIT = 240  # seconds; machines that are busy are slow
RECIPE = Recipe("a fox <lora:fox:1>", steps=2, width=32, height=32, gates="sum")
PLACE = """const box = document.querySelector(arguments[0]).getBoundingClientRect();
return [box.left + scrollX, box.top + scrollY, box.width, box.height].map(Math.round)"""
FROM_PICTURE = "input[type=file][data-testid^='Settings from a picture']"


@contextmanager
def served(studio, recipe, folder, **options):
    """The address of a fresh app, whose pictures are in `folder / "pictures"`; `options` are those of Actions."""
    from mole_app.web.actions import Actions
    from mole_app.web.build import build, launch

    blocks = build(Actions(studio, home=folder / "gates", gallery=folder / "pictures", **options), recipe)
    _, url, _ = launch(blocks, gallery=folder / "pictures", prevent_thread_lock=True, quiet=True)
    try:
        yield url
    finally:
        blocks.close()


@contextmanager
def visiting(studio, recipe, folder, *, width=1440, height=900):
    """A page of a fresh app in a fresh browser."""
    with served(studio, recipe, folder) as url, browser.browser(folder, width=width, height=height) as page:
        page.open(url)
        yield page


def kept(folder):
    """The pictures of the gallery, oldest first. A name that is taken for a picture is empty for a moment."""
    pictures = (path for path in (folder / "pictures").glob("[!.]*.png") if path.stat().st_size)
    return sorted(pictures, key=lambda path: path.stat().st_mtime_ns)


def composed(page, folder, start="#compose"):
    """Press Compose; the new picture's file in the gallery, once the page shows it."""
    before = len(kept(folder))
    page.until(lambda: page.text("#compose") == "Compose", WAIT)
    page.click(start)

    def shown():
        found = kept(folder)
        sources = [image.get_attribute("src") for image in page.all("#picture img")]
        return len(found) > before and sources and found[-1].name in sources[0]

    page.until(lambda: shown() and page.text("#compose-status").startswith("done"), WAIT)
    return kept(folder)[-1]


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


def place(page, css):
    """Where an element is on the page: left, top, width and height in pixels."""
    return page.driver.execute_script(PLACE, css)


def cards(page, *names):
    """Wait until exactly these LoRAs have cards."""

    def shown():
        labels = [label.text for label in page.all(".card .head label")]  # of the box with the name, and of the strength
        return [label for label in labels if not label.startswith("Strength of ")] == list(names)

    page.until(shown, WAIT)


def opened(page, css):
    """Open a panel unless it is open."""
    if page.one(f"{css} > button").get_attribute("class").find("open") < 0:
        page.click(f"{css} > button")


def sent(page, css, path):
    """Put a file into a field, which may be hidden."""
    page.until(lambda: page.driver.find_elements("css selector", css), WAIT)[0].send_keys(str(path))


def dropped(page, path):
    """Fill the page from a picture or recipe."""
    sent(page, FROM_PICTURE, path)
    page.until(lambda: page.text("#from-picture-status").startswith("loaded:"), WAIT)  # which may be of one before
    recipe = infotext.read(path)
    page.until(lambda: (value(page, "#prompt"), value(page, "#seed")) == (recipe.prompt, str(recipe.seed)), WAIT)


def long_job(page):
    """Start many pictures, and wait until the first is on the way."""
    page.type("#steps input[type=number]", "150")
    page.type("#count input[type=number]", "16")
    page.click("#compose")
    page.until(lambda: "left" in page.text("#compose-status"), WAIT)


def cancelled(page):
    page.until(lambda: page.text("#compose") == "Cancel", WAIT)
    page.click("#compose")
    page.until(lambda: page.text("#compose-status").startswith("stopped after"), WAIT)


def painted(page, css="#paint canvas"):
    """Paint the left part of the picture."""
    from selenium.webdriver import ActionChains

    sheet = page.one(css)
    page.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", sheet)
    side = min(sheet.size["width"], sheet.size["height"])
    brush = ActionChains(page.driver, duration=50).move_to_element_with_offset(sheet, -0.1 * side, 0).click_and_hold()
    for x in (-0.1 * side, -0.2 * side, -0.3 * side):
        brush = brush.move_to_element_with_offset(sheet, x, 0.35 * side).move_to_element_with_offset(sheet, x, -0.35 * side)
    brush.release().perform()
