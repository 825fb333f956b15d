"""A visit to the embedded world in a real browser, with training; and wrong files."""

import shutil
from pathlib import Path
from urllib.request import urlretrieve

import numpy as np
import pytest
from PIL import Image

from mole_app.studio import infotext
from mole_app.studio.catalog import Catalog
from mole_app.studio.recipe import Recipe

pytest.importorskip("gradio")
pytest.importorskip("selenium")
from page_visits import (
    FROM_PICTURE,
    WAIT,
    browser,
    cards,
    composed,
    drawn,
    dropped,
    kept,
    opened,
    pixels,
    place,
    sent,
    value,
    visiting,
)  # fmt: skip
from selenium.webdriver import Keys

pytestmark = pytest.mark.skipif(bool(browser.missing()), reason=browser.missing())


@pytest.mark.thorough
def test_wrong_files_get_a_sentence_that_goes_once_they_are_right(any_width, loras, tmp_path):
    page = any_width
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html>")
    upload = "input[type=file][data-testid^='Upload']"
    sent(page, upload, tmp_path / "page.safetensors")
    page.until(lambda: page.text("#why").startswith("page.safetensors is an HTML page"), WAIT)
    sent(page, upload, shutil.copy(loras["hat"], tmp_path / "other name.safetensors"))
    page.until(lambda: page.text("#why") == "added hat", WAIT)  # the file is known
    page.until(lambda: "<lora:hat:1>" in value(page, "#prompt"), WAIT)
    page.type("#prompt textarea", "a fox <lora:fix:1>")
    page.until(lambda: page.text("#problem").startswith("there is no LoRA 'fix'"), WAIT)
    page.type("#prompt textarea", "a fox <lora:fox:1>")
    page.until(lambda: page.text("#problem") == "", WAIT)
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    sent(page, FROM_PICTURE, tmp_path / "plain.png")
    page.until(lambda: page.text("#from-picture-status").startswith("plain.png has no recipe"), WAIT)
    assert str(tmp_path) not in page.text("body")
    assert not page.errors()


def world():
    """A studio on the embedded world."""
    from mole_app.studio.render import Studio
    from mole_world.world import concept_files, emoji_world, gate_folders

    pipe = emoji_world().pipe
    pipe.set_progress_bar_config(disable=True)
    return Studio(pipe, Catalog(concept_files(), gate_folders()), "emoji")


SAID = """return [...document.querySelectorAll('.rest > button')]
.map((card) => getComputedStyle(card, '::before').content)"""


@pytest.mark.thorough
@pytest.mark.parametrize("width", [1440, 390])
def test_a_newcomer_composes_two_characters_in_a_style(tmp_path, width):
    """With what can be read on the page alone."""

    def click(words, css="#studio button"):
        page.until(lambda: [each for each in page.all(css) if each.text.strip() == words], WAIT)[0].click()

    with visiting(world(), Recipe("", steps=4, gates="auto", base="emoji"), tmp_path, width=width) as page:
        for button in ("Compose", "Browse LoRAs"):  # of which the empty picture speaks
            (found,) = [each for each in page.all("#studio button") if each.text == button]
            assert 0 < found.rect["y"] < 900 - found.rect["height"], button
        click("Browse LoRAs")
        names = ("koala", "octopus", "aurora")
        for name in names:
            click(name, "#loras .thumbnail-item")
            page.until(lambda name=name: page.text("#lora-status") == f"added {name}", WAIT)
        click("Done")
        wordless = [f'"Acts everywhere: the prompt has none of its words: {name}"' for name in names]
        page.until(lambda: page.driver.execute_script(SAID) == wordless, WAIT)
        page.one("textarea[placeholder^='What is in the picture']").send_keys(Keys.CONTROL, Keys.HOME)
        page.one("#prompt textarea").send_keys("a koala and an octopus in aurora colours ")
        click("Compose")
        page.until(lambda: page.text("#compose-status").startswith("done") and kept(tmp_path), WAIT)
        acts = lambda: [line.split()[1:5] for line in page.driver.execute_script(SAID)]  # noqa: E731
        own, style = ["in", "its", "own", "place,"], ["everywhere,", "called", "by", "“aurora”:"]
        page.until(lambda: acts() == [own, own, style], WAIT)
        page.until(lambda: kept(tmp_path)[0].name in page.one("#picture img").get_attribute("src"), WAIT)
        page.one("#found img")  # where each acted
        tags = "<lora:koala:1> <lora:octopus:1> <lora:aurora:1>"
        assert infotext.read(kept(tmp_path)[0]).prompt == f"a koala and an octopus in aurora colours {tags}"
        page.type("#prompt textarea", f"a koala, an octopus and a tiger in aurora colours {tags} <lora:tiger:1>")
        cards(page, *names, "tiger")
        for css in ("#picture img", "#compose") if width == 1440 else ():  # also with four cards, and nothing scrolled
            left, top, wide, high = place(page, css)
            assert (left >= 0, top >= 0, left + wide <= 1440, top + high <= 900) == (True,) * 4, css
        assert not page.errors()


@pytest.mark.thorough
@pytest.mark.parametrize("width", [1440, 390])
def test_a_newcomer_ticks_the_words_of_two_characters(tmp_path, width):
    """And writes nothing."""
    with visiting(world(), Recipe("", steps=4, gates="auto", base="emoji"), tmp_path, width=width) as page:
        page.click("#browse")
        for name in ("crocodile", "honeybee"):
            find = lambda name=name: [each for each in page.all("#loras .thumbnail-item") if each.text == name]  # noqa: E731
            page.until(find, WAIT)[0].click()
            page.until(lambda name=name: page.text("#lora-status") == f"added {name}", WAIT)
        page.click("#lora-done")
        cards(page, "crocodile", "honeybee")
        page.until(lambda: _is_in_view(page, ".c0 .head"), WAIT)
        (name,) = [each for each in page.all(".c0 .head label") if each.text == "crocodile"]
        assert name.rect["height"] < 30  # one line
        page.until(lambda: page.text("#side-by-side"), WAIT)
        _keeps_cards_where_they_are(page, width)
        for n, name in enumerate(("crocodile", "honeybee")):
            page.click(f".c{n} .chips input")
            page.until(lambda name=name: name in value(page, "#prompt").partition("<")[0], WAIT)
        page.until(lambda: page.text("#side-by-side") == "Write “a crocodile and a honeybee”", WAIT)
        page.click("#side-by-side")
        tags = "<lora:crocodile:1> <lora:honeybee:1>"
        page.until(lambda: value(page, "#prompt") == f"a crocodile and a honeybee {tags}", WAIT)
        page.until(lambda: not page.all("#side-by-side"), WAIT)
        page.until(lambda: page.text("#size-said") == "128 × 64 pixels", WAIT)
        page.click("#browse")
        page.one("#loras img")
        page.driver.execute_script("scrollTo(0, 0)")
        page.click("#compose")
        page.until(lambda: page.text("#compose-status").startswith("done") and kept(tmp_path), WAIT)
        page.until(lambda: not page.all("#browser") and _is_in_view(page, "#picture img"), WAIT)
        assert page.driver.execute_script(SAID)[0].startswith('"Acts in its own place, on “crocodile”')
        page.one("#found img")
        assert not page.errors()


def _keeps_cards_where_they_are(page, width):
    """Under the pointer, when the offer above them comes."""
    page.one(".c1 .place input[value='everywhere']").click()
    page.until(lambda: not page.all("#side-by-side"), WAIT)
    before = place(page, ".c1 .place")
    page.one(".c1 .place input[value='auto']").click()
    page.until(lambda: page.text("#side-by-side"), WAIT)
    assert width == 390 or place(page, ".c1 .place") == before


def _is_in_view(page, css):
    """Whether a click in the middle of an element would reach it."""
    return page.driver.execute_script(
        """const element = document.querySelector(arguments[0]), box = element.getBoundingClientRect();
        const there = document.elementFromPoint(box.left + box.width / 2, box.top + box.height / 2);
        return box.top >= 0 && box.bottom <= innerHeight && element.contains(there)""",
        css,
    )


@pytest.mark.thorough
def test_a_visit_to_the_embedded_world(tmp_path):
    recipe = Recipe("duotone drawing of a fox <lora:fox:1> <lora:duotone:1>", steps=4, gates="auto", base="emoji")
    with visiting(world(), recipe, tmp_path) as page:
        first = composed(page, tmp_path)
        _compares(page)
        _watches(page)
        _cancels(page)
        _trains(page, tmp_path)
        trained = infotext.read(composed(page, tmp_path))
        assert (trained.gates, len(trained.gates_sha256)) == ("again", 64)
        _saves(page, tmp_path)
        page.tab("Compose")
        dropped(page, first)
        assert np.array_equal(pixels(composed(page, tmp_path)), pixels(first))
        assert not page.errors()


def _compares(page):
    page.tab("Compare")
    page.click("#compare")
    page.until(lambda: page.text("#compare-status").startswith("done"), WAIT)
    assert page.text("#compare-status") == "done"
    arms = ["without LoRAs", "fox alone", "duotone alone", "all added up (sum)", "each in its place (bound)"]
    page.until(lambda: [label.text for label in page.all("#arms .caption-label")] == arms, WAIT)
    page.until(lambda: len(page.all("#slider img")) == 2, WAIT)
    before = {image.get_attribute("src") for image in page.all("#slider img")}
    page.choose("#left", "without LoRAs")
    page.until(lambda: {image.get_attribute("src") for image in page.all("#slider img")} != before, WAIT)


def _watches(page):
    opened(page, "#gate-report")
    page.click("#look")
    page.until(lambda: "mean weight: fox" in page.text("#look-status"), WAIT)
    page.one("#heat img")
    page.one("#shares img")
    page.type("#weights textarea, #weights input", "fox=0.5, duotone=1")
    page.click("#lock")
    page.until(lambda: "fox=0.5, duotone=1" in value(page, "#held"), WAIT)
    before = page.one("#heat img").get_attribute("src")
    page.click("#look")
    page.until(lambda: page.one("#heat img").get_attribute("src") != before, WAIT)  # drawn anew, with what was set
    page.click("#free")


def _cancels(page):
    page.tab("Compose")
    before = len(page.all("#strip img"))
    page.type("#count input[type=number]", "16")
    page.click("#compose")
    page.until(lambda: drawn(page) > 4, WAIT)  # the first of 16 pictures is done
    page.click("#compose")
    page.until(lambda: page.text("#compose-status").startswith("stopped after"), WAIT)
    made = int(page.text("#compose-status").split()[2])
    assert 1 <= made < 16
    page.until(lambda: len(page.all("#strip img")) == before + made, WAIT)  # what is done stays
    page.type("#count input[type=number]", "1")


def _trains(page, folder):
    page.tab("Train")
    page.click("#suggest")
    page.until(lambda: value(page, "#train-singles"), WAIT)
    page.type("#train-name input, #train-name textarea", "mine")
    page.type("#train-steps input[type=number]", "2")
    page.click("#train")
    page.until(lambda: page.text("#train-status").startswith("done: on 4 seeds"), WAIT)
    page.one("#loss img")
    last = lambda: [label.text for label in page.all("#validation .caption-label")][-1:]  # noqa: E731
    page.until(lambda: last() == ["after, seed 1001"], WAIT)
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
    page.tab("Recipe")
    page.click("#save")
    link = page.until(lambda: page.all("#files a[href*='recipe-']"), WAIT)[0]
    urlretrieve(link.get_attribute("href"), folder / "r.json")
    assert infotext.read(folder / "r.json").gates == "again"
