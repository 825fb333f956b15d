"""What the tabs share: controls, states, and how errors are told."""

from __future__ import annotations

import functools
import html
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from mole_diffusers.app.actions import Actions, Made
from mole_diffusers.app.jobs import Stops
from mole_diffusers.studio.recipe import Recipe
from mole_diffusers.studio.render import StoppedError

QUEUE: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "pipeline"}  # one pipeline, one job at a time
PRIVATE: dict[str, Any] = {"api_visibility": "private"}  # the API has endpoints of its own
BUTTONS: Any = ["fullscreen", "download"]  # on pictures; Gradio's own "share" would send them to the network
KNOWN_ERRORS = (ValueError, FileNotFoundError)  # what bad input raises; anything else is a fault of ours and is logged
NUMBERS = ("seed", "steps", "guidance", "width", "height")


@dataclass
class Page:
    """What the tabs share.

    Attributes:
        controls: field of a Recipe -> its component.
        cards, shown: the mixer's cards, and the ones that are drawn.
        locks: gates set by hand, as a Recipe holds them.
        made: the last picture's recipe as plain data.
    """

    actions: Actions
    stops: Stops
    defaults: Recipe
    controls: dict[str, Any] = field(default_factory=dict)
    cards: Any = None
    shown: Any = None
    locks: Any = None
    made: Any = None

    @property
    def inputs(self) -> list[Any]:
        """The components that `recipe` takes the values of."""
        return [*self.controls.values(), self.locks]

    def recipe(self, *values: Any) -> Recipe:
        """The recipe that the controls say. Raises ValueError for values out of range."""
        *given, locks = values
        named = dict(zip(self.controls, given, strict=True))
        for name in NUMBERS:
            if named[name] is None:
                raise ValueError(f"{name} must be a number")
            named[name] = float(named[name]) if name == "guidance" else int(named[name])
        named["sampler"] = "" if named["sampler"] == "default" else named["sampler"]
        return Recipe(**named, locks=locks)

    def values(self, recipe: Recipe) -> list[Any]:
        """Values of the controls and the locks for a recipe."""
        shown = {name: getattr(recipe, name) for name in self.controls}
        return [*(shown | {"sampler": recipe.sampler or "default"}).values(), dict(recipe.locks)]


def session(request: gr.Request | None) -> str:
    """The visitor's session, "" for calls without one."""
    return str(getattr(request, "session_hash", "") or "")


def said(error: Exception, *, page: bool) -> gr.Error:
    """What a visitor is told. A page shows it as HTML, so what a file or a prompt says there is escaped."""
    text = html.escape(str(error), quote=False) if page else str(error)
    return gr.Error(text, duration=12, print_exception=False)


def say(fn: Callable[..., Any], *, page: bool = True) -> Callable[..., Any]:
    """Errors of bad input as one sentence on the page, or to a client of the API."""

    @functools.wraps(fn)
    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            return fn(*args, **kwargs)
        except KNOWN_ERRORS as error:
            raise said(error, page=page) from error

    return called


def say_while(fn: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """`say` for a generator."""

    @functools.wraps(fn)
    def called(*args: Any, **kwargs: Any) -> Iterator[Any]:
        try:
            yield from fn(*args, **kwargs)
        except StoppedError:
            return
        except KNOWN_ERRORS as error:
            raise said(error, page=True) from error

    return called


def fresh(cards: list[dict[str, Any]]) -> dict[str, Any]:
    """Cards to draw anew, also where they are what was drawn last."""
    return {"cards": cards, "at": time.monotonic_ns()}


def shown(made: list[Made]) -> list[tuple[str, str]]:
    """What a gallery shows of pictures: the files as they are, so that recipes stay inside."""
    return [(str(one.path), one.label) for one in made]


def gallery(label: str, *, columns: int, elem_id: str, pixel: bool = True) -> Any:
    """Pictures side by side, as they are: PNGs keep the recipes inside.

    Args:
        pixel: show pixels as squares, not smoothed.
    """
    return gr.Gallery(
        label=label,
        format="png",
        columns=columns,
        height="auto",
        object_fit="contain",
        buttons=BUTTONS,
        interactive=False,
        elem_classes="pixel" if pixel else None,
        elem_id=elem_id,
    )


def picture(label: str, *, elem_id: str) -> Any:
    """One figure."""
    return gr.Image(label=label, format="png", interactive=False, buttons=BUTTONS, elem_classes="figure", elem_id=elem_id)


def stoppable(page: Page, button: Any, status: Any, works: Sequence[Any]) -> None:
    """Have a button end what `works`, events of the session, do: what runs at its next step, what waits at once."""
    waiting = gr.State(0)

    def stop(request: gr.Request, asked: int) -> tuple[str, int]:
        if page.stops.stop(session(request)):
            return "stopping", asked
        return "nothing of yours is running; what waited in the queue was taken out", asked + 1

    # Gradio tells a page of a changed State only through its queue, where this waits for nothing.
    button.click(stop, waiting, [status, waiting], concurrency_limit=None, **PRIVATE)
    waiting.change(None, None, None, cancels=list(works), **PRIVATE)
