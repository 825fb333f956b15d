"""A served app on the tiny pipeline and a client of it: what the tests of the API share."""

import asyncio
import inspect
from contextlib import aclosing, closing, contextmanager

from tiny import tiny_pipeline

from mole_app.studio.catalog import Catalog
from mole_app.studio.recipe import Recipe
from mole_app.studio.render import Studio
from mole_app.web.actions import Actions

PROMPT = "a fox in ink <lora:fox:0.8> <lora:ink:1>"
RECIPE = {"prompt": PROMPT, "seed": 3, "gates": "sum"}


def built(loras, home, **recipe):
    """The app's blocks."""
    from mole_app.web.build import build

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
        values = convert_component_dict_to_list(event.outputs, given) if is_by_component else given
        return tuple(values) if is_by_component and len(event.outputs) > 1 else values

    def each(events):
        with closing(events):
            yield from map(listed, events)

    def call(*args):
        given = event.fn(*args)
        return each(given) if inspect.isgenerator(given) else listed(given)

    return call


REQUEST = type("Request", (), {"session_hash": "page"})()
WAIT = 600  # seconds; machines that are busy are slow


class QueueVisit:
    """A visitor of a page's queue: presses its buttons, and sees what it shows.

    Args:
        edits: label of a field -> its value, where it is not the page's own.
    """

    def __init__(self, blocks, visitor="me", request=REQUEST, **edits):
        self.visitor, self.request, self.edits = visitor, request, edits
        events = [event for event in blocks.fns.values() if event.fn is not None]
        self._events = {name: next(e for e in events if e.fn.__name__ == name) for name in ("queued", "pressed", "watch")}
        self.shown = {}

    def press(self, name="queued", label=None):
        """Press Queue, or the button with its label. Returns what the status line says then, "" if nothing is wrong."""
        from gradio.blocks import skip

        event, skipped = self._events[name], 1 if name == "queued" else 2
        fields = event.inputs[skipped:]
        values = [self.edits.get(getattr(field, "label", None), field.value) for field in fields]
        given = [self.request, *([label] if name == "pressed" else []), self.visitor, *values]
        said = plain(event)(*given)
        return "" if said == skip() else said

    def see(self, until):
        """Watch the page until this is true of {elem_id or position: value}, and return that."""

        async def watching():
            event = self._events["watch"]
            ids = {each: getattr(each, "elem_id", None) or i for i, each in enumerate(event.outputs)}
            async with aclosing(event.fn(self.request, self.visitor)) as changes:
                async for changed in changes:
                    self.shown |= {ids[one]: value for one, value in changed.items()}
                    if until(self.shown):
                        return self.shown
            raise AssertionError("the page was closed")

        return asyncio.run(asyncio.wait_for(watching(), WAIT))

    def done(self):
        """Watch until the newest job is done."""
        return self.see(lambda shown: str(shown.get("compose-status", "")).startswith("done"))


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

    from mole_app.web.build import launch

    try:
        _, url, _ = launch(blocks, prevent_thread_lock=True, quiet=True, **options)
        yield Client(url.replace("0.0.0.0", "127.0.0.1"), verbose=False, download_files=str(folder), ssl_verify=False)
    finally:
        blocks.close()
