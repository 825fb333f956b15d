"""Let only the app's own pages call it, under an address or a name that belongs to it.

Any web page that is open in the browser can send requests to this machine, in two ways. It can point a name of its own to
this machine (DNS rebinding), which shows in the Host header. Or it can post a form to another site, which shows in the
Origin header.

Nor do the app's own pages get every file: of the gallery's folder, which Gradio serves whole, only the pictures.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from tempfile import gettempdir
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse

READING = ("GET", "HEAD", "OPTIONS")  # methods that change nothing
FILE = re.compile(r"/file[=/](.*)", re.DOTALL)  # how Gradio is asked for a file of this machine


class OwnPagesOnly:
    """An ASGI middleware that answers 403 to pages that are not the app's own, and to files that are none of its pictures.

    Args:
        sites: names under which a server in front of the app shows it.
        gallery: the folder of the pictures, see `gallery.Gallery`.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], sites: Collection[str] = (), gallery: Path | None = None):
        self.gallery = gallery and gallery.resolve()
        machine = socket.gethostname().lower()
        self.app, self.sites = app, {site.lower() for site in sites}
        self.names = self.sites | {"localhost", machine, f"{machine}.local"}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        problem = ""
        if scope["type"] in ("http", "websocket"):
            problem = self.problem(Headers(scope=scope), scope.get("method"))
            if not problem and (file := FILE.search(scope["path"])) and not self.shows(file[1]):
                problem = "of the gallery's folder, only the pictures are shown"
        if problem:
            await PlainTextResponse(problem, 403)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def shows(self, file: str) -> bool:
        """Whether Gradio may decide about a file. It serves all of the gallery's folder, also what lies there by chance."""
        try:
            path, temporary = Path(os.path.abspath(file)).resolve(), Path(gettempdir()).resolve()  # as Gradio reads it
        except (OSError, RuntimeError, ValueError):  # links in a circle, a name that no file can have
            return False
        if self.gallery is None or not path.is_relative_to(self.gallery):
            return True
        if temporary.is_relative_to(self.gallery) and path.is_relative_to(temporary):  # the app's own, which come and go
            return True
        return path.parent == self.gallery and path.suffix == ".png" and not path.name.startswith(".")

    def problem(self, headers: Headers, method: str | None) -> str:
        """Why a request is refused; "" if it is not."""
        host, origin = headers.get("host", ""), headers.get("origin")
        name, _ = _names(f"//{host}")
        if not (_is_address(name) or name in self.names):
            return f"this app is not shown under {name!r}; use the address of the machine, or start it with --site {name}"
        if method in READING or origin is None:
            return ""
        name, with_port = _names(origin)
        if with_port == host.lower() or name in self.sites:
            return ""
        return f"a page of {origin} may not send anything to this app"


def _names(address: str) -> tuple[str, str]:
    """The host's name in an address, without and with its port; "" if it is not an address."""
    try:
        parts = urlsplit(address)
        return parts.hostname or "", parts.netloc.lower()
    except ValueError:
        return "", ""


def _is_address(name: str) -> bool:
    """Whether this is an IP address. Nobody can point one elsewhere."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
