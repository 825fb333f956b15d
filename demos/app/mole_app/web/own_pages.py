"""Let only the app's own pages call it, under an address or a name that belongs to it.

Any web page that is open in the browser can send requests to this machine, in two ways. It can point a name of its own to
this machine (DNS rebinding), which shows in the Host header. Or it can post a form to another site, which shows in the
Origin header.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Awaitable, Callable, Collection
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse

READING = ("GET", "HEAD", "OPTIONS")  # methods that change nothing


class OwnPagesOnly:
    """An ASGI middleware that answers 403 to pages that are not the app's own.

    Args:
        sites: names under which a server in front of the app shows it.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], sites: Collection[str] = ()):
        machine = socket.gethostname().lower()
        self.app, self.sites = app, {site.lower() for site in sites}
        self.names = self.sites | {"localhost", machine, f"{machine}.local"}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] in ("http", "websocket") and (problem := self.problem(Headers(scope=scope), scope.get("method"))):
            await PlainTextResponse(problem, 403)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def problem(self, headers: Headers, method: str | None) -> str:
        """Why a request is refused; "" if it is not."""
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        name = _host_name(f"//{host}")
        if not (_is_address(name) or name in self.names):
            return f"this app is not shown under {name!r}; use the address of the machine, or start it with --site {name}"
        if method in READING or origin is None:
            return ""
        if origin.lower() in (f"http://{host}", f"https://{host}") or _host_name(origin) in self.sites:
            return ""
        return f"a page of {origin} may not send anything to this app"


def _host_name(address: str) -> str:
    """The host's name in an address, in lower case and without its port; "" if it is not an address."""
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    """Whether this is an IP address. Nobody can point one elsewhere."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
