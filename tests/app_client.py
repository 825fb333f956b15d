"""A served app on the tiny pipeline and a client of it: what the tests of the API share."""

from contextlib import contextmanager

from mole_diffusers.app.actions import Actions
from mole_diffusers.studio.catalog import Catalog
from mole_diffusers.studio.recipe import Recipe
from mole_diffusers.studio.render import Studio
from mole_diffusers.testing import tiny_pipeline

PROMPT = "a fox in ink <lora:fox:0.8> <lora:ink:1>"
RECIPE = {"prompt": PROMPT, "seed": 3, "gates": "sum"}


def built(loras, home, **recipe):
    """The app's blocks."""
    from mole_diffusers.app.build import build

    actions = Actions(Studio(tiny_pipeline(), Catalog(dict(loras), {}), "tiny"), home=home)
    return build(
        actions, Recipe(PROMPT, **{"steps": 2, "width": 32, "height": 32, "gates": "auto", "base": "tiny"} | recipe)
    )


@contextmanager
def served(loras, folder, **options):
    """A client of a fresh app. `folder` is for its gates and what the client downloads."""
    with launched(built(loras, folder / "gates"), folder, **options) as client:
        yield client


@contextmanager
def launched(blocks, folder, **options):
    """A client of an app; what it downloads goes to `folder`."""
    from gradio_client import Client

    from mole_diffusers.app.build import launch

    try:
        _, url, _ = launch(blocks, prevent_thread_lock=True, quiet=True, **options)
        yield Client(url.replace("0.0.0.0", "127.0.0.1"), verbose=False, download_files=str(folder))
    finally:
        blocks.close()
