"""Requests that change something, from pages of other origins, are refused (CSRF).

A file to lay beside minibottle.py, where it is minibottle.cross_origin:

    from minibottle import App, cross_origin_protection

    app = App()
    cross_origin_protection(app, trusted_origins=["https://admin.example.org"])

A browser lets any page send a form here, with its user's cookies. It says where that page is from,
too: in Sec-Fetch-Site (Fetch Metadata, all browsers since 2023), before that in Origin. So there is
nothing to keep, and nothing to put into a form. Programs that are no browser send neither, and are
let in. GET, HEAD and OPTIONS are: what they call should change nothing.
"""

from __future__ import annotations

import re
from typing import Any, Collection, Iterable, Optional, Union

from . import HTTPError, request

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


def cross_origin_protection(app: Any, trusted_origins: Union[str, Iterable[str]] = ()) -> None:
    """Have an App, and all that is mounted in it, refuse such requests with 403: before routing,
    and before the hooks that are added later. `trusted_origins`: "https://example.org", …"""
    trusted = [trusted_origins] if isinstance(trusted_origins, str) else list(trusted_origins)
    for origin in trusted:
        if not re.fullmatch("[a-z][a-z0-9+.-]*://[^/?#@A-Z]+", origin):
            raise ValueError(f"{origin!r} is no origin; one is 'https://example.org'")

    def check_origin() -> None:
        site, origin, host = map(request.headers.get, ("Sec-Fetch-Site", "Origin", "Host"))
        if not is_allowed(request.method, site, origin, host or "", trusted):
            whose = origin or f"Sec-Fetch-Site: {site}"
            raise HTTPError(403, f"A page of another origin ({whose}) may not {request.method} to "
                                 f"{host}: trusted_origins=[…] names those that may.")
    app.add_hook("before_request", check_origin)


def is_allowed(method: str, site: Optional[str], origin: Optional[str], host: str,
               trusted: Collection[str]) -> bool:
    """Of Sec-Fetch-Site, Origin and Host."""
    if method in SAFE_METHODS or origin in trusted:
        return True
    if site is not None:
        return site in ("same-origin", "none")  # "none": the user's own doing, a bookmark
    # An old browser, or none. It may not say which scheme its user has seen: a proxy has TLS.
    return origin is None or origin.partition("://")[2] == host.lower() != ""
