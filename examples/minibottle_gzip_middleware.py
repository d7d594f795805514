"""gzip for any WSGI application on any server. (minibottle's own server does it by itself.)

A file to lay beside minibottle.py, where it is minibottle.gzip_middleware:

    from minibottle import GzipMiddleware

    application = GzipMiddleware(application)
"""

from __future__ import annotations

from typing import Any, Callable, Dict, Iterable

from . import Body, Pending, ask_wsgi, close_all, drive, gzip_bytes, iter_gzip, negotiate_gzip


class GzipMiddleware:
    """gzip for any WSGI application on any server. (The built-in server does it by itself.)"""

    def __init__(self, app: Callable, minimum: int = 1024, level: int = 6) -> None:
        self.app = app
        self.minimum = minimum
        self.level = level

    def __call__(self, environ: Dict[str, Any], start_response: Callable) -> Iterable[bytes]:
        answer: Any = drive(ask_wsgi(self.app, environ))
        (status, headers, exc_info), body = (
            answer.wait() if type(answer) is Pending else answer)  # of a coroutine
        length = len(body) if type(body) is bytes else None
        try:
            headers, compress = negotiate_gzip(environ, status, headers, length, self.minimum)
            start_response(status, headers, *[exc_info] if exc_info else [])
        except BaseException:
            close_all(body)
            raise
        compress = compress and environ["REQUEST_METHOD"] != "HEAD"
        if length is not None:
            return [gzip_bytes(body, self.level) if compress else body]
        if compress:
            body = Body(body)
            body.pieces = iter_gzip(body.pieces, self.level)
        return body
