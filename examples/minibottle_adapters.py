"""Other servers for run(server=...) and `--server`: a name, "module:Class", a class, an instance.

A file to lay beside minibottle.py, where it is minibottle.adapters.
"""

from __future__ import annotations

import socket
from typing import Any, Callable

from . import load, print_line, server_names


class ServerAdapter:
    """Another server for run(server=...): a subclass has run(handler), handler: the application."""

    quiet = False

    def __init__(self, host: str = "127.0.0.1", port: Any = 8080, **options: Any) -> None:
        self.host = host
        self.port = int(port)
        self.options = options

    def run(self, handler: Callable) -> None:
        raise NotImplementedError


class WSGIRefServer(ServerAdapter):
    """The standard library's, one request at a time: for tests."""

    def run(self, handler: Callable) -> None:
        from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
        server = self.options.get("server_class", WSGIServer)
        family = socket.AF_INET6 if ":" in self.host else server.address_family
        silence = {"log_request": lambda *args: None} if self.quiet else {}
        self.srv: Any = make_server(
            self.host, self.port, handler, type("S", (server,), {"address_family": family}),
            type("H", (self.options.get("handler_class", WSGIRequestHandler),), silence))
        self.port = self.srv.server_port
        with self.srv:
            self.srv.serve_forever()


server_names.setdefault("wsgiref", WSGIRefServer)


def make_adapter(server: Any, host: str, port: Any, options: dict) -> ServerAdapter:
    """What run(server=...) is given -> the instance."""
    if isinstance(server, str):
        server = server_names.get(server, server)
    if isinstance(server, str):
        server = load(server)
    if isinstance(server, type):
        server = server(host, port, **options)
    if not isinstance(server, ServerAdapter):
        raise ValueError(f"{server!r} is no ServerAdapter")
    return server


def serve(app: Callable, server: Any, host: str, port: Any, quiet: bool, options: dict) -> None:
    """Serve until Ctrl-C, or until the other server has enough."""
    adapter = make_adapter(server, host, port, options)
    adapter.quiet = adapter.quiet or quiet
    if not adapter.quiet:
        print_line(f"{type(adapter).__name__} on {adapter.host}:{adapter.port}")
    try:
        adapter.run(app)
    except KeyboardInterrupt:
        pass
