"""Take the screenshots of the app for the documents, on the embedded world.

python demos/app/screenshots.py [FOLDER]      default: docs
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image

from browser import Browser, browser
from mole_app.studio.catalog import Catalog
from mole_app.studio.recipe import Recipe
from mole_app.studio.render import Studio
from mole_app.web.actions import Actions
from mole_app.web.build import build, launch
from mole_cli.app import world_thumbnails
from mole_world.world import concept_files, emoji_world, gate_folders

PROMPT = "noto drawing of a sunflower and a doughnut <lora:sunflower:1> <lora:doughnut:1>"
WAIT = 600  # seconds


def main(folder: Path) -> None:
    """Start the app, and write app_*.png."""
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
                for view in (compose, regions):
                    view(page)
                    shoot(page, folder / f"app_{view.__name__}.png")
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


def regions(page: Browser) -> None:
    """Open the region that was found for the sunflower on the picture, and widen it a little."""
    from selenium.webdriver import ActionChains

    page.click("#paint-regions")
    sheet = page.one("#paint canvas")
    brush = ActionChains(page.driver, duration=50).move_to_element_with_offset(sheet, 20, -60).click_and_hold()
    brush.move_by_offset(0, 60).move_by_offset(0, 60).release().perform()


def shoot(page: Browser, path: Path) -> None:
    """Save what is seen without scrolling, in 256 colours, to keep the file small."""
    page.driver.execute_script("document.activeElement.blur(); document.querySelector('#controls').scrollTo(0, 0)")
    page.driver.execute_script("window.scrollTo({top: 0, behavior: 'instant'})")
    page.until(lambda: page.driver.execute_script("return [...document.images].every((image) => image.complete)"), WAIT)
    page.driver.save_screenshot(str(path))
    with Image.open(path) as image:
        image.convert("RGB").quantize(256).save(path, optimize=True)
    print(path, path.stat().st_size // 1000, "kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2] / "docs")
