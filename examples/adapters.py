"""Other servers for run(server=...) and `--server`.

A file to lay beside minibottle.py, where it is minibottle.adapters.
"""

from __future__ import annotations

import socket
from typing import Any, Callable

from . import ServerAdapter


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
