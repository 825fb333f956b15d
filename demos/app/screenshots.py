"""Take screenshots of every view of the app on the embedded world, for the documents.

python demos/app/screenshots.py [FOLDER]      default: docs
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from browser import Browser, browser
from PIL import Image

from mole_diffusers.app.actions import Actions
from mole_diffusers.app.build import build, launch
from mole_diffusers.cli.app import world_thumbnails
from mole_diffusers.emoji.world import concept_files, emoji_world, gate_folders
from mole_diffusers.studio.catalog import Catalog
from mole_diffusers.studio.recipe import Recipe
from mole_diffusers.studio.render import Studio

PROMPT = "noto drawing of a sunflower and a doughnut <lora:sunflower:1> <lora:doughnut:1>"
WAIT = 600  # seconds


def main(folder: Path) -> None:
    """Start the app, visit its tabs, and write app_*.png."""
    folder.mkdir(parents=True, exist_ok=True)
    pipe = emoji_world().pipe
    pipe.set_progress_bar_config(disable=True)
    with tempfile.TemporaryDirectory() as work:
        catalog = Catalog(concept_files(), gate_folders(), examples=gate_folders())
        studio, kept = Studio(pipe, catalog, "emoji"), Path(work, "pictures")
        actions = Actions(studio, home=Path(work, "gates"), gallery=kept, thumbnail=world_thumbnails())
        blocks = build(actions, Recipe(PROMPT, seed=2, gates="auto", base="emoji"))
        _, url, _ = launch(blocks, gallery=kept, prevent_thread_lock=True, quiet=True)
        try:
            with browser(work, width=1440, height=900) as page:
                page.open(url)
                for view in (compose, loras, regions, train, compare, gallery):
                    view(page)
                    shoot(page, folder / f"app_{view.__name__}.png")
            with browser(work, width=390, height=844) as page:
                page.open(url)
                compose(page)
                shoot(page, folder / "app_phone.png")
        finally:
            blocks.close()


def compose(page: Browser) -> None:
    """Draw four pictures."""
    page.until(lambda: len(page.all(".card")) == 2, WAIT)
    page.type("#count input[type=number]", "4")
    before = len(page.all("#strip img"))
    page.click("#compose")
    page.until(lambda: page.text("#compose-status").startswith("done") and len(page.all("#strip img")) == before + 4, WAIT)
    page.until(lambda: page.all("#found img"), WAIT)


def loras(page: Browser) -> None:
    """Open the browser of LoRAs."""
    page.click("#browse")
    page.until(lambda: len(page.all("#loras img")) > 5, WAIT)


def regions(page: Browser) -> None:
    """Open the region that was found for the sunflower on the picture, and widen it a little."""
    from selenium.webdriver import ActionChains

    page.click("#lora-done")
    page.click("#paint-regions")
    sheet = page.one("#paint canvas")
    brush = ActionChains(page.driver, duration=50).move_to_element_with_offset(sheet, 20, -60).click_and_hold()
    brush.move_by_offset(0, 60).move_by_offset(0, 60).release().perform()


def train(page: Browser) -> None:
    """Train gates for bound LoRAs, which have more to learn than tiles."""
    page.click("#paint-back")
    page.click("#advanced > button")
    page.choose("#binding", "bound")
    page.tab("Train")
    page.click("#suggest")
    page.until(lambda: page.driver.find_element("css selector", "#train-singles textarea").get_property("value"), WAIT)
    page.click("#train")
    page.until(lambda: page.text("#train-status").startswith("done"), WAIT)
    page.until(lambda: "after, seed 1001" in page.text("#validation"), WAIT)


def compare(page: Browser) -> None:
    """Draw the comparison."""
    page.tab("Compose")
    page.choose("#binding", "automatic")
    page.tab("Compare")
    page.click("#compare")
    page.until(lambda: page.text("#compare-status").startswith("done") and page.all("#slider img"), WAIT)


def gallery(page: Browser) -> None:
    """Show four pictures, one of them a favourite, and the comparison."""
    page.tab("Gallery")
    page.until(lambda: len(page.all("#gallery .thumbnail-item")) == 5, WAIT)
    page.click("#gallery .thumbnail-item")
    page.until(lambda: page.text("#gallery-status").startswith("chosen"), WAIT)
    page.click("#star")
    page.until(lambda: page.text("#gallery-status").startswith("marked"), WAIT)
    page.click("#gallery .icon-button-wrapper button:last-child")  # closes the large view


def shoot(page: Browser, path: Path) -> None:
    """Save what is seen without scrolling, in 128 colours, to keep the file small."""
    page.until(lambda: not page.all(".progress-text"), WAIT)
    page.driver.execute_script("document.activeElement.blur(); document.querySelector('#controls').scrollTo(0, 0)")
    page.driver.execute_script("window.scrollTo({top: 0, behavior: 'instant'})")
    page.driver.save_screenshot(str(path))
    with Image.open(path) as image:
        image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path, path.stat().st_size // 1000, "kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2] / "docs")
