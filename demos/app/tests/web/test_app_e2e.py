"""A whole session in a real browser, on a desk and on a phone, and what holds for the page as a whole."""

import base64
import json
import multiprocessing
import re
import shutil
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny import tiny_pipeline

from mole_app.studio import infotext
from mole_app.studio.catalog import Catalog
from mole_app.studio.model_folders import files_of
from mole_app.studio.picture_passes import pixels_hash

pytest.importorskip("gradio")
pytest.importorskip("selenium")
from page_visits import (
    RECIPE,
    WAIT,
    browser,
    cards,
    composed,
    drawn,
    dropped,
    kept,
    painted,
    pixels,
    place,
    served,
    value,
    visiting,
)  # fmt: skip
from selenium.webdriver import ActionChains, Keys

pytestmark = pytest.mark.skipif(bool(browser.missing()), reason=browser.missing())
A1111 = "a hat\nNegative prompt: grey\nSteps: 3, Sampler: Euler, CFG scale: 4, Seed: 9, Size: 64x32, Model: dream, Eta: 2"


@pytest.fixture
def folder(loras, tmp_path):
    """A folder of LoRAs, some in folders of their own, with pictures and notes beside them."""
    animal, other = ("fox", "animals", "orange"), ("hen", "animals", "teal")
    for source, (name, inside, colour) in zip(loras.values(), (animal, other, ("ink", "styles", "black")), strict=True):
        path = tmp_path / "loras" / inside / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, path)
        Image.new("RGB", (64, 64), colour).save(path.with_suffix(".png"))
        about = {"activation text": name} | ({"preferred weight": 0.6} if name == "ink" else {})
        path.with_suffix(".json").write_text(json.dumps(about))
    return tmp_path / "loras"


@pytest.mark.thorough
@pytest.mark.parametrize("width", [1440, 390])
def test_a_whole_session(folder, tmp_path, width):
    from mole_app.studio.render import Studio

    pipe, goes_on = tiny_pipeline(), threading.Event()
    goes_on.set()
    pipe.unet.register_forward_pre_hook(lambda *_: None if goes_on.wait() else None)
    studio = Studio(pipe, Catalog(files_of(folder, "lora"), {}), "tiny")
    with visiting(studio, replace(RECIPE, prompt="", width=64), tmp_path, width=width) as page:
        _picks_from_the_browser(page)
        first = _previews_in_the_frame_of_the_picture(page, tmp_path)
        if width == 1440:
            _has_all_in_view(page)
        _paints(page)
        _queues_three_and_cancels_the_second(page, tmp_path, goes_on)
        _draws_over_one_of_the_gallery(page, tmp_path, count=4)
        _drops_a_picture_of_another_program(page, tmp_path)
        dropped(page, first)
        assert np.array_equal(pixels(composed(page, tmp_path)), pixels(first))
        wide, window = page.driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert wide <= window
        assert not page.errors()


def _picks_from_the_browser(page):
    page.click("#browse")
    names = lambda: [label.text for label in page.all("#loras .caption-label")]  # noqa: E731
    page.until(lambda: names() == ["fox", "hen", "ink · 0.6"], WAIT)
    page.type("#lora-search :is(input, textarea)", "FO")
    page.until(lambda: names() == ["fox"], WAIT)
    page.type("#lora-search :is(input, textarea)", " ")
    page.choose("#lora-folder", "styles")
    page.until(lambda: names() == ["ink · 0.6"], WAIT)
    page.choose("#lora-folder", "all folders")
    page.until(lambda: len(names()) == 3, WAIT)
    for i, name in enumerate(("fox", "hen", "ink")):
        page.all("#loras .thumbnail-item")[i].send_keys(Keys.ENTER)  # by keyboard
        page.until(lambda name=name: page.text("#lora-status") == f"added {name}", WAIT)
        page.until(lambda i=i: [("✓" in each) for each in names()].count(True) == i + 1, WAIT)
    page.click("#lora-done")
    cards(page, "fox", "hen", "ink")
    assert value(page, "#prompt") == "<lora:fox:1> <lora:hen:1> <lora:ink:0.6>"  # the strength it likes
    page.type("#prompt textarea", f"a fox and a hen in ink {value(page, '#prompt')}")
    line = "return getComputedStyle(document.querySelector('.c0 .rest > button'), '::before').content"
    page.until(lambda: page.driver.execute_script(line).startswith('"Acts in its own place, on “fox”'), WAIT)


def _previews_in_the_frame_of_the_picture(page, folder):
    page.type("#steps input[type=number]", "150")
    page.click("#compose")
    page.until(lambda: page.text("#compose") == "Cancel" and drawn(page) > 2 and page.all("#picture img"), WAIT)
    during = place(page, "#picture img")
    button = place(page, "#compose")
    page.until(lambda: page.text("#compose-status").startswith("done"), WAIT)
    page.until(lambda: kept(folder)[-1].name in page.one("#picture img").get_attribute("src"), WAIT)
    assert page.text("#compose") == "Compose"
    assert place(page, "#picture img") == during
    assert place(page, "#compose") == button
    assert abs(during[2] / during[3] - 2) < 0.02  # in its own shape
    page.type("#steps input[type=number]", "2")
    return kept(folder)[-1]


def _has_all_in_view(page):
    """The picture, the button and the cards, before anything is scrolled."""
    page.driver.execute_script("document.querySelector('#controls').scrollTo(0, 0)")
    for css in ("#picture img", "#compose", ".c0", ".c1", ".c2", "#strip img"):
        left, top, wide, high = place(page, css)
        assert (left >= 0, top >= 0, left + wide <= 1440, top + high <= 900) == (True,) * 4, css


def _paints(page):
    page.click(".c0 .place input[value='painted']")
    page.until(lambda: page.all("#paint canvas"), WAIT)
    page.click("#paint-empty")
    painted(page)
    page.click("#paint-use")
    page.until(lambda: "<lora:fox:1:region=painted>" in value(page, "#prompt"), WAIT)
    page.until(lambda: page.all("#picture img"), WAIT)


def _queues_three_and_cancels_the_second(page, folder, goes_on):
    before = len(kept(folder))
    goes_on.clear()  # the first is still drawn when the third is queued
    for seed in ("1", "2", "3"):
        page.type("#seed input", seed)
        ActionChains(page.driver).move_to_element(page.one("#prompt textarea")).click().perform()
        ActionChains(page.driver).key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(Keys.CONTROL).perform()
        page.until(lambda seed=seed: len(page.all(".job")) == (0 if seed == "1" else int(seed)), WAIT)
    page.click(".job .cancel")
    page.until(lambda: len(page.all(".job")) == 2, WAIT)
    page.open(page.url)
    page.until(lambda: len(page.all(".job")) == 2, WAIT)
    goes_on.set()
    page.until(lambda: len(kept(folder)) == before + 2 and page.text("#compose") == "Compose", WAIT)
    assert [infotext.read(path).seed for path in kept(folder)[before:]] == [1, 3]
    assert [bool(infotext.read(path).masks) for path in kept(folder)[before:]] == [True, True]
    page.until(lambda: len(page.all("#strip img")) == before + 2, WAIT)


def _draws_over_one_of_the_gallery(page, folder, count):
    page.tab("Gallery")
    page.until(lambda: len(page.all("#gallery .thumbnail-item")) == count - 1, WAIT)
    page.click("#gallery .thumbnail-item")
    page.until(lambda: page.text("#gallery-status").startswith("chosen"), WAIT)
    page.click("#gallery-over")
    page.until(lambda: page.all("#over-picture img"), WAIT)
    source = kept(folder)[-1]
    assert infotext.read(composed(page, folder)).image == pixels_hash(Image.open(source))


DROP = """const [name, bytes] = arguments, data = new DataTransfer();
data.items.add(new File([Uint8Array.from(atob(bytes), (each) => each.charCodeAt(0))], name, {type: "image/png"}));
document.querySelector("#picture").dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true}))"""


def _drops_a_picture_of_another_program(page, folder):
    about = PngInfo()
    about.add_text(infotext.PARAMETERS, A1111)
    Image.new("RGB", (64, 32)).save(folder / "theirs.png", pnginfo=about)
    page.driver.execute_script(DROP, "theirs.png", base64.b64encode((folder / "theirs.png").read_bytes()).decode())
    page.until(lambda: "drawn with the model 'dream'" in page.text("#from-picture-status"), WAIT)
    page.until(lambda: (value(page, "#prompt"), value(page, "#seed")) == ("a hat", "9"), WAIT)
    page.until(lambda: not page.all(".card"), WAIT)
    assert infotext.read(composed(page, folder)).negative == "grey"


@pytest.mark.thorough
def test_everything_is_done_by_keyboard(folder, tmp_path):
    from mole_app.studio.render import Studio

    studio = Studio(tiny_pipeline(), Catalog(files_of(folder, "lora"), {}), "tiny")
    with visiting(studio, replace(RECIPE, prompt="", width=64), tmp_path) as page:
        _reaches(page, "#browse", Keys.ENTER)
        page.until(lambda: len(page.all("#loras .thumbnail-item")) == 3, WAIT)
        for n, name in enumerate(("fox", "hen"), 1):
            _reaches(page, f"#loras .gallery-item:nth-child({n}) .thumbnail-item", Keys.ENTER)
            page.until(lambda name=name: page.text("#lora-status") == f"added {name}", WAIT)
        _reaches(page, "#lora-done", Keys.ENTER)
        cards(page, "fox", "hen")
        _reaches(page, "#prompt textarea", Keys.HOME, "a fox and a hen ")
        ActionChains(page.driver).key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(Keys.CONTROL).perform()
        page.until(lambda: len(kept(tmp_path)) == 1 and page.text("#compose-status").startswith("done"), WAIT)
        assert infotext.read(kept(tmp_path)[0]).prompt == "a fox and a hen <lora:fox:1> <lora:hen:1>"
        _reaches(page, ".c0 .place input", Keys.ARROW_RIGHT)
        page.until(lambda: "<lora:fox:1:region=everywhere>" in value(page, "#prompt"), WAIT)
        _reaches(page, ".c1 .rest > button", Keys.ENTER)
        _reaches(page, ".c1 .region input")  # in place of painting
        whole = ActionChains(page.driver).key_down(Keys.CONTROL).send_keys("a").key_up(Keys.CONTROL)
        whole.send_keys("left", Keys.ENTER).perform()
        page.until(lambda: "<lora:hen:1:region=left>" in value(page, "#prompt"), WAIT)
        _reaches(page, "#compose", Keys.ENTER)
        page.until(lambda: len(kept(tmp_path)) == 2, WAIT)
        page.until(lambda: len(page.all("#strip .thumbnail-item")) == 2 and page.text("#compose") == "Compose", WAIT)
        _reaches(page, "#strip .gallery-item:nth-child(2) .thumbnail-item", Keys.ENTER)
        page.until(lambda: kept(tmp_path)[0].name in page.one("#picture img").get_attribute("src"), WAIT)
        _reaches(page, "#use-settings", Keys.ENTER)
        page.until(lambda: value(page, "#prompt") == "a fox and a hen <lora:fox:1> <lora:hen:1>", WAIT)
        assert not page.errors()


@pytest.mark.thorough
def test_the_queue_and_the_gallery_are_used_by_keyboard(tiny, tmp_path):
    cards(tiny, "fox")
    _reaches(tiny, "#steps input[type=number]", *"100", Keys.TAB)
    _reaches(tiny, "#compose", Keys.ENTER)
    tiny.until(lambda: tiny.text("#compose") == "Cancel", WAIT)
    for n in (2, 3):
        _reaches(tiny, "#queue-more", Keys.ENTER)
        tiny.until(lambda n=n: len(tiny.all(".job")) == n, WAIT)
    _reaches(tiny, ".job .cancel", Keys.ENTER)
    tiny.until(lambda: len(kept(tmp_path)) == 2 and tiny.text("#compose") == "Compose", WAIT)
    _reaches(tiny, "#steps input[type=number]", "2", Keys.TAB)
    _reaches(tiny, "#from-picture")  # for a picture of another program, in place of dropping it
    _reaches(tiny, "#tab-gallery-button", Keys.ENTER)
    tiny.until(lambda: len(tiny.all("#gallery .thumbnail-item")) == 2, WAIT)
    _reaches(tiny, "#gallery .thumbnail-item", Keys.ENTER)
    tiny.until(lambda: tiny.text("#gallery-status").startswith("chosen"), WAIT)
    _reaches(tiny, "#gallery-over", Keys.ENTER)
    tiny.until(lambda: tiny.all("#over-picture img"), WAIT)
    _reaches(tiny, "#compose", Keys.ENTER)
    tiny.until(lambda: len(kept(tmp_path)) == 3, WAIT)
    assert infotext.read(kept(tmp_path)[-1]).image == pixels_hash(Image.open(kept(tmp_path)[-2]))
    assert not tiny.errors()


def _reaches(page, css, *keys):
    """Go to an element with the Tab key, and press keys there."""
    is_there = "return document.activeElement.matches(arguments[0])"
    for _ in range(200):
        if page.driver.execute_script(is_there, css):
            break
        ActionChains(page.driver).send_keys(Keys.TAB).perform()
    assert page.driver.execute_script(is_there, css), css
    if keys:
        ActionChains(page.driver).send_keys(*keys).perform()


def _app(loras, folder, asked):
    """Serve an app. Send its address, then the seconds that this process has worked, and its modules, at each question."""
    from mole_app.studio.render import Studio

    with served(Studio(tiny_pipeline(), Catalog(loras, {}), "tiny"), RECIPE, folder) as url:
        asked.send(url)
        while asked.recv():
            asked.send((time.process_time(), set(sys.modules)))


@pytest.mark.thorough
def test_the_first_visitor_of_a_fresh_app_waits_for_nothing_that_could_be_done_before(loras, tmp_path):
    """In seconds of work of the app and of the page, since those of a clock depend on what else the machine does."""
    here, there = (context := multiprocessing.get_context("spawn")).Pipe()
    app = context.Process(target=_app, args=(loras, tmp_path, there), daemon=True)
    app.start()

    def state():
        here.send(True)
        return here.recv()

    try:
        url = here.recv()
        with browser.browser(tmp_path, width=1440) as page:
            page.driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
            worked, modules = state()
            page.open(url)
            cards(page, "fox")
            worked_by_now, modules_by_now = state()
            assert modules_by_now - modules == set()  # as Gradio's first event imports pyplot
            assert worked_by_now - worked + work_of(page) < 2.5
    finally:
        app.kill()


def work_of(page):
    """The seconds that the page's thread has worked, of an opened page."""
    metrics = page.driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    return {each["name"]: each["value"] for each in metrics}["TaskDuration"]


@pytest.mark.thorough
def test_the_page_is_light_and_can_be_used_by_everyone(tiny):
    """By axe-core, in light and dark; nothing comes from elsewhere."""
    tiny.driver.execute_cdp_cmd("Network.enable", {})  # else the next line does nothing
    tiny.driver.execute_cdp_cmd("Network.setCacheDisabled", {"cacheDisabled": True})
    tiny.driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    tiny.open(tiny.url)
    cards(tiny, "fox")
    assert work_of(tiny) < 2
    entries = "[...performance.getEntriesByType('navigation'), ...performance.getEntriesByType('resource')]"
    loaded = tiny.driver.execute_script(f"return {entries}.map(each => [each.name, each.transferSize])")
    assert [name for name, _ in loaded if not name.startswith((tiny.url, "data:", "blob:"))] == []
    assert 200_000 < sum(size for _, size in loaded) < 1_000_000  # bytes, none of them from the browser's cache
    for dark in (False, True):
        for tab in ("Compose", "Compare", "Gallery", "Recipe", "Train"):
            tiny.tab(tab)
            assert not tiny.unnamed(), tab
            assert serious(tiny) == [], (tab, dark)
        tiny.tab("Compose")
        for opens, seen, closes in (("#browse", "#loras img", "#lora-done"), ("#paint-regions", "#sheet", "#paint-back")):
            tiny.click(opens)
            tiny.one(seen)
            assert not tiny.unnamed(), opens
            assert serious(tiny) == [], (opens, dark)
            tiny.click(closes)
        tiny.click("#theme")
        assert tiny.driver.execute_script("return document.body.classList.contains('dark')") is not dark
    tiny.click("#theme")
    tiny.open(tiny.url)
    tiny.until(lambda: tiny.driver.execute_script("return document.body.classList.contains('dark')"), WAIT)  # remembered


def serious(page):
    """The serious faults that axe-core finds."""
    axe = pytest.importorskip("axe_core_python.selenium").Axe()
    found = axe.run(page.driver)["violations"]
    return [
        f"{each['id']}: {node['html'][:160]}" for each in found if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]  # fmt: skip


# Of those who study how LoRAs are combined. They stand under Advanced, in Compare and in Train.
RESEARCH = re.compile(
    r"\b(gat(e|es|ing)|arms?|keep|attention|attend\w*|masks?|tokens?|ranks?|adapters?|mole|bind(s|ing)?|bound|experts?"
    r"|composers?|latents?|denoiser|unet|encoders?|logits?|mixture|retrieval)\b",
    re.IGNORECASE,
)
READ = """const shown = [...document.querySelectorAll("body *")].filter((each) => each.checkVisibility());
const words = (each) => [each.placeholder, each.title, each.ariaLabel, each.matches("input, textarea") ? each.value : "",
  ...["::before", "::after"].map((part) => getComputedStyle(each, part).content)];
return [document.body.innerText, ...shown.flatMap(words)].join("\\n")"""


@pytest.mark.thorough
@pytest.mark.parametrize("width", [1440, 390])
def test_the_first_screen_has_no_words_of_research(studio, tmp_path, width):
    """Before and after a picture, in all that is shown while what is folded stays so."""
    recipe = replace(RECIPE, prompt="a fox and a hat in ink <lora:fox:1> <lora:hat:1> <lora:ink:1>", width=64)
    with visiting(studio, recipe, tmp_path, width=width) as page:
        cards(page, "fox", "hat", "ink")
        read = [page.driver.execute_script(READ)]
        composed(page, tmp_path)
        page.one("#strip img")
        read.append(page.driver.execute_script(READ))
        for said in read:
            assert "What is in the picture?" in said
            assert [found[0] for found in RESEARCH.finditer(said)] == []


@pytest.mark.thorough
def test_the_phone_shows_everything_and_nothing_is_cut(studio, tmp_path):
    with visiting(studio, replace(RECIPE, prompt="a fox <lora:fox:1> <lora:ink:1>"), tmp_path, width=390) as page:
        cards(page, "fox", "ink")
        for tab in ("Compare", "Gallery", "Recipe", "Train", "Compose"):
            page.tab(tab)
            assert not page.unnamed()
            wide, window = page.driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
            assert wide <= window, tab
        assert page.driver.execute_script(CUT) == []
        order = [place(page, css)[1] for css in ("#prompt", "#compose", "#picture", "#tools", ".card")]
        assert order == sorted(order)


CUT = """
const right = (element) => element.getBoundingClientRect().right;
const seen = (css) => [...document.querySelectorAll(css)].filter((element) => element.offsetParent);
return [
  ...seen('#studio .card').filter((card) => right(card) > right(card.closest('#controls')) + 1),
  ...seen('#studio button, #studio label').filter((element) => right(element) > innerWidth),
].map((element) => element.className + ': ' + (element.innerText || element.value));
"""  # what is cut
