"""Of the gallery's folder, which Gradio would serve whole, show only the pictures."""

from __future__ import annotations

import os
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from starlette.responses import PlainTextResponse

FILE = re.compile(r"/file[=/](.*)", re.DOTALL)  # how Gradio is asked for a file of this machine


class GalleryPicturesOnly:
    """An ASGI middleware that answers 403 to files of a gallery's folder that are none of its pictures.

    Args:
        gallery: the folder, see `gallery.Gallery`.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], gallery: Path):
        self.app, self.gallery = app, gallery.resolve()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        file = FILE.search(scope["path"]) if scope["type"] == "http" else None
        if file is None or self.shows(file[1]):
            await self.app(scope, receive, send)
        else:
            await PlainTextResponse("of the gallery's folder, only the pictures are shown", 403)(scope, receive, send)

    def shows(self, file: str) -> bool:
        """Whether a file may be shown, as far as the gallery is concerned."""
        try:
            path, temporary = Path(os.path.abspath(file)).resolve(), Path(gettempdir()).resolve()  # as Gradio reads it
        except (OSError, RuntimeError, ValueError):  # links in a circle, a name that no file can have
            return False
        if not path.is_relative_to(self.gallery):
            return True
        if temporary.is_relative_to(self.gallery) and path.is_relative_to(temporary):  # the app's own, which come and go
            return True
        return path.parent == self.gallery and path.suffix == ".png" and not path.name.startswith(".")
