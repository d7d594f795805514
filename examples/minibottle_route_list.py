"""The routes of an application, each with the file and line of its handler.

A file to lay beside minibottle.py, where it is minibottle.route_list. The command line prints
them and ends:

    $ python minibottle.py examples.example_bottle:Service --routes
    GET   /     examples.example_bottle:Service.index  examples/example_bottle.py:20
    POST  /api  examples.example_bottle:Service.api    examples/example_bottle.py:24

A line is the method, the rule, the route's name (if it has none its function's) and where that is
defined; what is mounted follows with its prefix. ANY is any method, WS a WebSocket, and * a
mounted application of another framework.
"""

from __future__ import annotations

import os
from inspect import unwrap
from typing import Any, Iterator, Tuple

from . import App, Mount, UsageError, is_handler, name_of


def print_routes(app: Any, options: dict) -> None:
    """What the command line does with an application instead of serving it with `options`."""
    if not isinstance(app, App):
        raise UsageError(f"--routes: {name_of(app)} is no App, whose routes could be shown")
    rows = list(iter_routes(app))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())


def iter_routes(app: Any, prefix: str = "") -> Iterator[Tuple[str, str, str, str]]:
    """(method, rule, name, "file:line") in the order of their definition."""
    mounts = []
    for route in app.routes:
        mount = route.callback
        if not isinstance(mount, Mount):
            function = find_function(route)
            method = "WS" if "websocket" in route.config else route.method
            yield (method, prefix + route.rule, route.name or name_of(function), where(function))
        elif mount not in mounts:  # one has a rule for its root, and one for what is below
            mounts.append(mount)
            below = prefix + "/" + route.config["mountpoint.prefix"].strip("/")
            if isinstance(mount.app, App):
                yield from iter_routes(mount.app, below)
            else:
                yield "*", below + "/", route.name or name_of(mount.app), where(mount.app)


def find_function(route: Any) -> Any:
    """What answers, without decorators: a function, or a method of a Handler class."""
    found = route.config.get("websocket") or route.get_undecorated_callback()
    if is_handler(found):
        found = getattr(found, route.method.lower(), found)
    return unwrap(getattr(found, "func", found))  # of a partial()


def where(function: Any) -> str:
    """"app.py:12", by a path from here if it is below; "" of what is not written in Python."""
    code = getattr(function, "__code__", None) or getattr(
        type(function).__call__, "__code__", None)
    if code is None:
        return ""
    path = os.path.relpath(code.co_filename)
    return f"{code.co_filename if path.startswith('..') else path}:{code.co_firstlineno}"
