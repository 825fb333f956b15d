"""The console: a sign that work is going on, and no output of other libraries."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from rich.console import Console


def busy(what: str) -> AbstractContextManager[Any]:
    """Show on the terminal that something of unknown length is going on."""
    return Console(stderr=True).status(what)


def note(text: str) -> None:
    """Tell the user something on stderr."""
    print(f"note: {text}", file=sys.stderr)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings, notices and loading bars of other libraries off the console. Warnings of mole take one line."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(?!mole_diffusers)")
        as_before, warnings.formatwarning = warnings.formatwarning, lambda message, *_, **__: f"warning: {message}\n"
        disabled = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            with busy("starting"):
                from diffusers.utils.logging import disable_progress_bar as hide_pipeline_bars
                from huggingface_hub.utils import enable_progress_bars as show_downloads
                from transformers.utils.logging import disable_progress_bar as hide_weight_bars
            hide_pipeline_bars()
            hide_weight_bars()
            show_downloads()  # transformers hides them along with its own
            yield
        finally:
            warnings.formatwarning = as_before
            logging.disable(disabled)
