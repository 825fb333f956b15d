"""Jobs, the gallery and other tabs in a real browser."""

import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from single_file import save_single_file
from tiny import tiny_pipeline

from mole_app.studio import infotext
from mole_app.studio.base_models import open_base
from mole_app.studio.memory import Memory
from mole_app.studio.names import shared_name

pytest.importorskip("gradio")
from page_visits import (
    RECIPE,
    WAIT,
    browser,
    cancelled,
    cards,
    composed,
    drawn,
    dropped,
    long_job,
    opened,
    pixels,
    served,
    value,
    visiting,
)

pytestmark = pytest.mark.skipif(bool(browser.missing()), reason=browser.missing())


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
    cards(page, "ink")
    cancelled(page)
    page.open(page.url)
    page.until(lambda: page.text("#compose-status").startswith("stopped after"), WAIT)  # what became of it is still said


@pytest.mark.thorough
def test_a_page_that_is_left_while_it_draws_says_so_in_its_console_alone(tiny):
    """The next page shows nothing of it; other errors, and the same ones later, count."""
    long_job(tiny)
    tiny.driver.execute_script("addEventListener('beforeunload', () => console.error('a fault'))")
    tiny.open(tiny.url)
    tiny.until(lambda: drawn(tiny) > 0, WAIT)
    assert not tiny.all(".toast-body")
    assert [error.split()[-2:] for error in tiny.errors()] == [['"a', 'fault"']]
    tiny.driver.execute_script("console.error('Unexpected error', 'Connection errored out. ')")
    assert len(tiny.errors()) == 2
    cancelled(tiny)


@pytest.mark.thorough
def test_the_list_of_jobs_is_reordered_and_cancelled_one_by_one(any_width):
    page = any_width
    long_job(page)
    titles = lambda: [job.text.split(" · ")[1].split("\n")[0] for job in page.all(".job")]  # noqa: E731
    for seed in ("5", "6"):
        page.type("#seed input", seed)
        page.click("#queue-more")
        page.until(lambda seed=seed: titles()[-1:] == [f"a fox, seed {seed}, 16 pictures"], WAIT)
    assert titles() == [f"a fox, seed {seed}, 16 pictures" for seed in (0, 5, 6)]
    page.click(".job .up")
    page.until(lambda: titles() == [f"a fox, seed {seed}, 16 pictures" for seed in (0, 6, 5)], WAIT)
    page.click(".job .cancel")
    page.until(lambda: titles() == [f"a fox, seed {seed}, 16 pictures" for seed in (0, 5)], WAIT)
    page.click("#compose")  # cancels the one that is drawn, and the next begins
    page.until(lambda: not page.all(".job") and drawn(page) > 0, WAIT)
    cancelled(page)
    page.until(lambda: page.text("#compose") == "Compose", WAIT)
    assert not page.errors()


@pytest.mark.thorough
@pytest.mark.parametrize("width", [1440, 390])
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
        two.click("#compose")
        two.until(lambda: two.text("#compose-status") == "cancelled before it began", WAIT)
        two.until(lambda: two.text("#compose") == "Compose", WAIT)
        two.click("#compose")
        two.until(lambda: "waiting" in two.text("#compose-status"), WAIT)
        now = drawn(one)
        one.until(lambda: drawn(one) > now, WAIT)
        cancelled(one)
        two.until(lambda: two.text("#compose-status") == "done", WAIT)
        assert not one.errors() + two.errors()


@pytest.mark.thorough
@pytest.mark.parametrize("width", [1440, 390])
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
        first = composed(one, tmp_path)
        one.choose("#base", "other")
        one.until(lambda: one.text("#base-status") == "other is open: StableDiffusionPipeline", WAIT)
        second = composed(one, tmp_path)
        assert infotext.read(second).base == shared_name(str(file))
        assert not np.array_equal(pixels(second), pixels(first))
        two.click("#compose")
        two.until(lambda: "this is for the base model 'tiny', and here is 'other'" in two.text("#compose-status"), WAIT)
        two.open(url)
        two.until(lambda: value(two, "#base") == "other", WAIT)
        assert np.array_equal(pixels(composed(two, tmp_path)), pixels(second))
        one.tab("Gallery")
        one.until(lambda: len(one.all("#gallery .thumbnail-item")) == 3, WAIT)
        assert not one.errors() + two.errors()


@pytest.mark.thorough
@pytest.mark.parametrize("width", [1440, 390])
def test_every_tab_cancels_its_work(studio, tmp_path, width):
    wait = lambda *_: time.sleep(0.02)  # noqa: E731
    waits = studio.base.pipe.unet.register_forward_pre_hook(wait)  # or a comparison is over before it is cancelled
    with visiting(studio, RECIPE, tmp_path, width=width) as page:
        page.type("#prompt textarea", "a fox in ink <lora:fox:1> <lora:ink:1>")
        long_job(page)
        cancelled(page)
        page.tab("Compare")
        opened(page, "#gate-report")
        page.click("#compare")
        page.until(lambda: drawn(page, "#compare-status") > 0, WAIT)
        page.click("#look")
        page.until(lambda: page.text("#look-status") == "waiting: 1 job before this one", WAIT)
        for start in ("#compare", "#look"):
            page.until(lambda start=start: drawn(page, f"{start}-status") > 0, WAIT)
            page.click(f"{start}-cancel")
            page.until(lambda start=start: page.text(f"{start}-status").startswith("stopped"), WAIT)
        opened(page, "#xy-grid")
        page.click("#grid")
        page.until(lambda: drawn(page, "#grid-status") > 150, WAIT)  # one of its pictures is there
        page.click("#grid-cancel")
        page.until(lambda: page.text("#grid-status").startswith("stopped after"), WAIT)
        page.until(lambda: page.all("#sheet img"), WAIT)  # with grey in place of those that were not drawn
        waits.remove()
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


@pytest.mark.thorough
def test_the_gallery_keeps_finds_and_gives_back(any_width, tmp_path):
    page = any_width
    first = composed(page, tmp_path)
    page.type("#prompt textarea", "ink <lora:ink:0.5>")
    composed(page, tmp_path)
    page.tab("Gallery")
    labels = lambda: [label.text for label in page.all("#gallery .caption-label")]  # noqa: E731
    page.until(lambda: labels() == ["ink · seed 0", "a fox · seed 0"], WAIT)
    page.type("#find-lora :is(input, textarea)", "FOX")
    page.until(lambda: labels() == ["a fox · seed 0"], WAIT)
    page.click("#star")
    page.until(lambda: page.text("#gallery-status") == "choose a picture first", WAIT)
    page.click("#gallery .thumbnail-item")
    page.until(lambda: page.text("#gallery-status").startswith("chosen"), WAIT)
    page.click("#star")
    page.until(lambda: page.text("#gallery-status").startswith("marked"), WAIT)
    page.until(lambda: "★ a fox · seed 0" in page.text("#gallery"), WAIT)
    page.click("#use")  # it is still the chosen one
    page.until(lambda: page.all("#prompt textarea") and value(page, "#prompt") == "a fox <lora:fox:1>", WAIT)
    cards(page, "fox")
    assert np.array_equal(pixels(composed(page, tmp_path)), pixels(first))
    page.tab("Gallery")
    page.type("#find-lora :is(input, textarea)", "ink")
    page.until(lambda: labels() == ["ink · seed 0"], WAIT)
    assert not page.errors()


@pytest.mark.thorough
def test_a_picture_of_the_gallery_and_the_end_of_the_browser_of_loras_fit_in_the_window(any_width, tmp_path):
    page, inside = any_width, "const box = document.querySelector(arguments[0]).getBoundingClientRect();"
    inside += "return box.height > 0 && box.bottom <= innerHeight"
    page.click("#browse")
    page.one("#lora-done")
    page.driver.execute_script("document.querySelector('#loras').style.minHeight = '3000px'")  # as with many LoRAs
    page.driver.execute_script("document.querySelector('#browser').scrollIntoView()")
    page.until(lambda: page.driver.execute_script(inside, "#lora-done"), WAIT)
    page.click("#lora-done")
    composed(page, tmp_path)
    page.tab("Gallery")
    page.click("#gallery .thumbnail-item")
    page.one("#gallery .preview img")
    page.driver.execute_script("scrollTo({top: 0, behavior: 'instant'})")
    page.until(lambda: page.driver.execute_script(inside, "#gallery .preview img"), WAIT)
    assert not page.errors()


@pytest.mark.thorough
def test_a_click_in_the_gallery_is_not_lost_to_a_search(tiny, tmp_path, monkeypatch):
    """One that is still on its way in a large gallery, and the one for what was typed meanwhile."""
    from mole_app.web.gallery import Gallery

    composed(tiny, tmp_path)
    tiny.tab("Gallery")
    tiny.until(lambda: tiny.text("#gallery-status") == "1 picture", WAIT)
    entries, asked = Gallery.entries, []

    def slowly(*given, **how):
        time.sleep(1)
        asked.append(how["text"])
        return entries(*given, **how)

    monkeypatch.setattr(Gallery, "entries", slowly)
    tiny.one("#find-text :is(input, textarea)").send_keys("fox")
    tiny.click("#gallery .thumbnail-item")
    tiny.until(lambda: asked[-1:] == ["fox"], WAIT)
    time.sleep(1)  # until its answer is shown
    assert tiny.text("#gallery-status").startswith("chosen: ")
    tiny.click("#star")
    tiny.until(lambda: tiny.text("#gallery-status").startswith("marked"), WAIT)


@pytest.mark.thorough
def test_what_is_set_by_hand_is_seen_wherever_it_comes_from(tiny, tmp_path):
    location = "unet.mid_block.attentions.0.transformer_blocks.0"
    replace(RECIPE, locks={location: {"fox": 0.5}}).save(tmp_path / "recipe.json")
    held = lambda: value(tiny, "#held")  # noqa: E731
    tiny.tab("Compare")
    opened(tiny, "#gate-report")
    tiny.until(lambda: held() == "nothing: every gate decides", WAIT)
    tiny.tab("Compose")
    dropped(tiny, tmp_path / "recipe.json")
    tiny.tab("Compare")
    tiny.until(lambda: held() == f"{location}: fox=0.5", WAIT)
    tiny.open(tiny.url)
    tiny.tab("Compare")
    opened(tiny, "#gate-report")
    tiny.until(lambda: tiny.all("#held") and held() == f"{location}: fox=0.5", WAIT)
    tiny.click("#look")
    tiny.until(lambda: held() == "M00: fox=0.5", WAIT)
    tiny.type("#weights textarea, #weights input", "fox=2")
    tiny.click("#lock")
    tiny.until(lambda: "fox=2" in held(), WAIT)
    tiny.click("#free")
    tiny.until(lambda: held() == "nothing: every gate decides", WAIT)
    assert not tiny.errors()
