"""Text on the page: what others wrote, escaped, and an error of bad input as one sentence."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from tempfile import gettempdir
from typing import Any

USER_ERRORS = (ValueError, FileNotFoundError)  # raised for bad input; anything else is a bug and gets logged


def markdown(text: str) -> str:
    """Text from a file or prompt, escaped for Markdown so that it shows as it is."""
    return re.sub(r"([\\`*_{}\[\]()#+.!|<>~$:/&-])", r"\\\1", " ".join(text.split()))


def problem(error: Exception | None) -> str:
    """An error in a status line, as Markdown; one that is no visitor's fault is not told, but logged elsewhere."""
    words = str(error) if isinstance(error, USER_ERRORS) else "something went wrong; the terminal of the app says what"
    return f"**{markdown(without_folders(words))}**"


def without_folders(text: str) -> str:
    """A message without the temporary folders that files of visitors are in."""
    return re.sub(rf"{re.escape(gettempdir())}/(?:[^\s/'\"]+/)*", "", text)


def told(status: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For functions of the page: an error of bad input is said in `status`, one of their outputs, and the rest stays as it
    is; else `status` is empty where they give no other."""

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
