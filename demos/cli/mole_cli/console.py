"""The console: a sign that work is going on, and no output of other libraries."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import typer
from rich.console import Console


def busy(what: str) -> AbstractContextManager[Any]:
    """Show on the terminal that something of unknown length is going on."""
    return Console(stderr=True).status(what)


def note(text: str) -> None:
    """Tell the user something on stderr."""
    print(f"note: {text}", file=sys.stderr)


def show(facts: Any, words: str, *, as_json: bool) -> None:
    """Print the result of a command: as data for --json, or in words."""
    print(json.dumps(facts) if as_json else words)


_is_quiet = False  # whether `quiet` keeps other libraries off the console


def hide_loading_bars() -> None:
    """Inside `quiet`, hide the loading bars of other libraries. Call it before models are loaded: importing the libraries
    takes seconds, which commands that load no model should not wait for."""
    if not _is_quiet:
        return
    with busy("starting"):
        from diffusers.utils.logging import disable_progress_bar as hide_pipeline_bars
        from huggingface_hub.utils import enable_progress_bars as show_downloads
        from transformers.utils.logging import disable_progress_bar as hide_weight_bars
    hide_pipeline_bars()
    hide_weight_bars()
    show_downloads()  # transformers hides them along with its own


@contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings and notices of other libraries off the console, and their loading bars, see `hide_loading_bars`.
    Warnings of mole take one line."""
    global _is_quiet
    with warnings.catch_warnings():
        as_before, disabled = warnings.formatwarning, logging.root.manager.disable
        warnings.filterwarnings("ignore", module=r"(?!mole_)")
        warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
        logging.disable(logging.WARNING)
        _is_quiet = True
        try:
            yield
        finally:
            _is_quiet, warnings.formatwarning = False, as_before
            logging.disable(disabled)


def quiet_unless(context: typer.Context, verbose: bool) -> None:
    """What the option --verbose does: without it, the command runs inside `quiet`."""
    if not verbose:
        context.with_resource(quiet())
