"""What the tabs share: controls, states, and how errors are told."""

from __future__ import annotations

import functools
import html
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from mole_diffusers.app.actions import Actions, Made
from mole_diffusers.app.jobs import Stops
from mole_diffusers.drawing import StoppedError
from mole_diffusers.recipe import Recipe

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


def gallery(made: list[Made]) -> list[tuple[str, str]]:
    """What a gr.Gallery shows of pictures: the files as they are, so that recipes stay inside."""
    return [(str(one.path), one.label) for one in made]
