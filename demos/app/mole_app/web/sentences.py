"""Text on the page: escape what others wrote, show errors of bad input as one sentence, and name ways to combine LoRAs."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

USER_ERRORS = (ValueError, FileNotFoundError)  # raised for bad input; anything else is a bug and is logged
WAYS = {  # way to combine the LoRAs -> what the page says of it
    "base": "without LoRAs", "sum": "all added up (sum)", "bound": "each in its place (bound)",
    "tiles": "each drawn by itself for some steps (tiles)", "gates": "with your own gates",
}  # fmt: skip


def way_in_words(way: str) -> str:
    """What the page says of a way to combine the LoRAs."""
    return f"{name} alone" if (name := way.removeprefix("alone ")) != way else WAYS.get(way, way)


def markdown(text: str) -> str:
    """Escape text from a file or prompt, so that Markdown shows it unchanged."""
    return re.sub(r"([\\`*_{}\[\]()#+.!|<>~$:/&-])", r"\\\1", " ".join(text.split()))


def problem(error: Exception | None) -> str:
    """An error for a status line, as Markdown. Errors that are not the visitor's fault are logged elsewhere, not shown."""
    words = str(error) if isinstance(error, USER_ERRORS) else "something went wrong; the terminal of the app says what"
    return f"**{markdown(without_folders(words))}**"


def without_folders(text: str) -> str:
    """A message that names files without their folders, which visitors are not told. Paths are found by their beginning: "/"
    or a drive."""
    return re.sub(r"(?<![^\s'\"(=])(?:[A-Za-z]:)?[\\/]+(?:[^\s\\/'\"]+[\\/]+)+", "", text)


def errors_to(status: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator for event functions of the page. `status` must be one of their outputs.

    If the function raises an error of bad input, `status` shows it and the other outputs stay as they are. Otherwise
    `status` is cleared, unless the function sets it.
    """

    def wrap(fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                given = fn(*args, **kwargs)
            except USER_ERRORS as error:
                return {status: problem(error)}
            return {status: "", **given} if isinstance(given, dict) else given

        return call

    return wrap
