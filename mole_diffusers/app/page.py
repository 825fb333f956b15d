"""What the tabs share: controls, states, error messages, and components."""

from __future__ import annotations

import functools
import html
import inspect
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from mole_diffusers.app.actions import Actions, Picture
from mole_diffusers.app.jobs import RunningJobs
from mole_diffusers.studio.recipe import Recipe

QUEUE: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "pipeline"}  # one pipeline, one job at a time
PRIVATE: dict[str, Any] = {"api_visibility": "private"}  # the API has endpoints of its own
BUTTONS: Any = ["fullscreen", "download"]  # on pictures; Gradio's own "share" would send them to the network
USER_ERRORS = (ValueError, FileNotFoundError)  # raised for bad input; anything else is a bug and gets logged
NUMBERS = ("seed", "steps", "guidance", "width", "height")


@dataclass
class Page:
    """What the tabs share.

    Attributes:
        jobs: which visitor's job is running.
        defaults: the recipe of a fresh page.
        controls: field of a Recipe -> its component.
        cards: state: the mixer's cards.
        shown: state: the cards as last drawn; a change redraws the mixer, see `redraw`.
        locks: state: gates set by hand, as in a Recipe.
    """

    actions: Actions
    jobs: RunningJobs
    defaults: Recipe
    controls: dict[str, Any] = field(default_factory=dict)
    cards: Any = None
    shown: Any = None
    locks: Any = None

    @property
    def inputs(self) -> list[Any]:
        """The components whose values `recipe` takes."""
        return [*self.controls.values(), self.locks]

    def recipe(self, *values: Any) -> Recipe:
        """The recipe in the controls. Raises ValueError for values out of range."""
        *given, locks = values
        named = dict(zip(self.controls, given, strict=True))
        for name in NUMBERS:
            if named[name] is None:
                raise ValueError(f"{name} must be a number")
            named[name] = float(named[name]) if name == "guidance" else int(named[name])
        named["sampler"] = "" if named["sampler"] == "default" else named["sampler"]
        return Recipe(**named, locks=locks)

    def values(self, recipe: Recipe) -> list[Any]:
        """The values of `inputs` for a recipe."""
        shown = {name: getattr(recipe, name) for name in self.controls}
        return [*(shown | {"sampler": recipe.sampler or "default"}).values(), dict(recipe.locks)]


def session(request: gr.Request | None) -> str:
    """The visitor's session, "" for calls without one."""
    return str(getattr(request, "session_hash", "") or "")


# ---- errors


def user_error(error: Exception, *, page: bool) -> gr.Error:
    """The error a visitor sees. A page shows it as HTML, so text from a file or prompt is escaped there."""
    text = html.escape(str(error), quote=False) if page else str(error)
    return gr.Error(text, duration=12, print_exception=False)


@contextmanager
def _user_errors(*, page: bool) -> Iterator[None]:
    try:
        yield
    except USER_ERRORS as error:
        raise user_error(error, page=page) from error


def with_errors(fn: Callable[..., Any], *, page: bool = True) -> Callable[..., Any]:
    """Show errors of bad input as one sentence, on the page or to a client of the API; for functions and generators."""

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _user_errors(page=page):
            return fn(*args, **kwargs)

    @functools.wraps(fn)
    def stream(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with _user_errors(page=page):
            yield from fn(*args, **kwargs)

    return stream if inspect.isgeneratorfunction(fn) else call


# ---- values and components


def markdown(text: str) -> str:
    """Text from a file or prompt, escaped for Markdown so that it shows as it is."""
    return re.sub(r"([\\`*_{}\[\]()#+.!|<>~$:/&-])", r"\\\1", " ".join(text.split()))


def redraw(cards: list[dict[str, Any]]) -> dict[str, Any]:
    """A value for `Page.shown` that redraws the cards, even if they are the same as before."""
    return {"cards": cards, "at": time.monotonic_ns()}


def gallery_items(pictures: list[Picture]) -> list[tuple[str, str]]:
    """Pictures for a gallery: the files unchanged, so that the recipes stay inside."""
    return [(str(picture.path), picture.label) for picture in pictures]


def gallery(label: str, *, columns: int, elem_id: str, pixel: bool = True) -> Any:
    """A gallery of PNG files.

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


def figure(label: str, *, elem_id: str) -> Any:
    """One figure."""
    return gr.Image(label=label, format="png", interactive=False, buttons=BUTTONS, elem_classes="figure", elem_id=elem_id)


def connect_stop(page: Page, button: Any, status: Any, events: Sequence[Any]) -> None:
    """Let a button stop the session's jobs started by `events`: a running one at its next step, a queued one at once."""
    waiting = gr.State(0)

    def stop(request: gr.Request, asked: int) -> tuple[str, int]:
        if page.jobs.stop(session(request)):
            return "stopping", asked
        return "nothing of yours is running; queued jobs were cancelled", asked + 1

    # Gradio tells a page about a changed State only through its queue; without a limit this never waits there.
    button.click(stop, waiting, [status, waiting], concurrency_limit=None, **PRIVATE)
    waiting.change(None, None, None, cancels=list(events), **PRIVATE)
