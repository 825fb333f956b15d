"""A served app on the tiny pipeline and a client of it: what the tests of the API share."""

import inspect
from contextlib import closing, contextmanager

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


def plain(event):
    """The function of an event of the page; what it gives is in the order of the event's outputs, as the page gets it."""
    from gradio.blocks import Block, convert_component_dict_to_list, skip

    def listed(given):
        if given == skip() and len(event.outputs) > 1:
            return tuple(skip() for _ in event.outputs)
        is_by_component = isinstance(given, dict) and all(isinstance(key, Block) for key in given)
        return tuple(convert_component_dict_to_list(event.outputs, given)) if is_by_component else given

    def each(events):
        with closing(events):
            yield from map(listed, events)

    def call(*args):
        given = event.fn(*args)
        return each(given) if inspect.isgenerator(given) else listed(given)

    return call


def value_of(given):
    """The value that an event gives a field, with or without new choices."""
    return given["value"] if isinstance(given, dict) and "choices" in given else given


def kept_fields(blocks):
    """The components whose values a browser keeps."""
    (event,) = [event for event in blocks.fns.values() if event.fn is not None and event.fn.__name__ == "keep"]
    return event.inputs[1:]


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
        yield Client(url.replace("0.0.0.0", "127.0.0.1"), verbose=False, download_files=str(folder), ssl_verify=False)
    finally:
        blocks.close()
