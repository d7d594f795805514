"""An application in this process, for its tests: TestClient asks it, without a server or a port,
and Server serves it in a thread.

A file to lay beside minibottle.py, where it is minibottle.testing:

    from minibottle import TestClient

    assert TestClient(app).get("/hello/Ada").json["hello"] == "Ada"

    with TestClient(app) as client:                      # on_start and on_stop are called
        with client.stream("GET", "/events") as answer:  # endless ones too
            assert next(answer.pieces) == b"data: 1\n\n"
        with client.websocket("/chat/tea") as ws:        # needs minibottle_websocket.py
            ws.send("hello")
            assert ws.receive(timeout=1) == "hello"

    with Server(app, port=0) as server:                  # and what only a server does
        urlopen(server.url)

All of it works in a test that is a coroutine, too; the event loop of the test waits meanwhile, the
one of the application runs on a thread of its own.
"""

from __future__ import annotations

import io
import os
import re
import sys
import threading
import time
from base64 import b64encode
from contextlib import contextmanager
from contextvars import copy_context
from functools import cached_property, partialmethod
from itertools import chain
from socket import socketpair
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple, Union
from urllib.parse import urljoin, urlsplit

from . import (
    DEFAULTS, HeaderDict, Pending, Settings, UsageError, Worker, ask_wsgi, bind, bridge,
    check_status, close_all, drive, format_address, format_field, format_query, join_port,
    json_dumps, json_loads, parse_date, parse_options, percent_decode, run_lifecycle, text_to_wsgi,
    wsgi_to_text)

MAX_REDIRECTS = 20
GRACE_SECONDS = 1.0  # for the handler of a WebSocket to end; then it is cancelled


class Refused(ConnectionError):
    """A handshake got another answer than 101: `error.answer.status_code`, `.text`."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(f"answered with {answer.status}: {answer.text:.300}")
        self.answer = answer


class Answer:
    """What a TestClient got."""

    def __init__(self, status: str, headers: List[Tuple[str, str]], pieces: Iterator[bytes],
                 ) -> None:
        self.status = status                  # "200 OK"
        self.status_code = int(status[:3])
        self.headers = HeaderDict()
        for name, value in headers:
            self.headers.append(name, wsgi_to_text(value))
        self.pieces = pieces                  # of the body, as they are made

    def __repr__(self) -> str:
        return f"<Answer {self.status}>"

    @cached_property
    def body(self) -> bytes:
        """All of it; in stream(), what has not been read yet."""
        return b"".join(self.pieces)

    @property
    def text(self) -> str:
        return self.body.decode(parse_options(self.headers.get("Content-Type", ""))[1].get(
            "charset", "utf-8"))

    @property
    def json(self) -> object:
        """Raises ValueError where the body is no JSON."""
        return json_loads(self.body)


class Input(io.RawIOBase):
    """wsgi.input out of an iterable: a piece is asked for when it is read."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self.pieces = filter(None, pieces)
        self.rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.rest or next(self.pieces, b"")
        size = min(len(data), len(buffer))
        buffer[:size], self.rest = data[:size], data[size:]
        return size


def format_form(form: dict, files: dict) -> Tuple[str, bytes]:
    """Fields and files -> (Content-Type, body), as browsers write them (RFC 7578)."""
    boundary, body = os.urandom(16).hex(), b""
    for name, value in chain(each_value(form), each_value(files)):
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{escape_name(name)}"'
        if hasattr(value, "read"):
            value = os.path.basename(getattr(value, "name", name)), value.read()
        if isinstance(value, tuple):
            filename, value, kind = (*value, "application/octet-stream")[:3]
            head += f'; filename="{escape_name(filename)}"\r\nContent-Type: {kind}'
        data = value if isinstance(value, bytes) else str(value).encode("utf-8")
        body += head.encode("utf-8") + b"\r\n\r\n" + data + b"\r\n"
    return f"multipart/form-data; boundary={boundary}", body + f"--{boundary}--\r\n".encode()


def each_value(fields: dict) -> Iterator[Tuple[str, Any]]:
    """{"a": 1, "b": [2, 3]} -> ("a", 1), ("b", 2), ("b", 3)."""
    return ((name, one) for name, value in fields.items()
            for one in (value if isinstance(value, list) else [value]))


def escape_name(name: str) -> str:
    return name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")


class TestClient:
    """Ask a WSGI application: `TestClient(app).get("/hello/Ada").json["hello"] -> "Ada"`.

    Cookies that an answer sets are sent from then on, where their path, age and Secure allow it
    (`client.cookies`: name to value). `url`: what the application is asked as, without a path.
    `raise_errors`: what would be logged and answered with 500 is raised in the test.
    """

    __test__ = False  # pytest: this is no test

    def __init__(self, app: Callable, url: str = "http://localhost",
                 raise_errors: bool = False) -> None:
        self.app = app
        self.url = url
        self.raise_errors = raise_errors
        self.cookies: Dict[str, str] = {}
        self.scopes: Dict[str, Tuple[str, float, bool]] = {}  # path, when it ends, Secure

    def __enter__(self) -> TestClient:
        run_lifecycle(self.app, "start")
        return self

    def __exit__(self, *exc_info: object) -> None:
        run_lifecycle(self.app, "stop")

    # -- requests --

    def request(self, method: str, path: str, headers: Optional[Dict[str, str]] = None, *,
                follow_redirects: bool = False, **content: Any) -> Answer:
        """One request; `content` is what stream() takes. Redirects are followed within `url`."""
        with self.stream(method, path, headers, **content) as answer:
            answer.body = b"".join(answer.pieces)
        for _ in range(MAX_REDIRECTS if follow_redirects else 0):
            target = urljoin(self.url + path, answer.headers.get("Location", ""))
            if answer.status_code not in REDIRECTS or not target.startswith(self.url + "/"):
                break
            if answer.status_code == 303 or answer.status_code < 303 and method == "POST":
                method, content = method if method == "HEAD" else "GET", {}  # RFC 9110 15.4
            path = target[len(self.url):]
            content.pop("query", None)
            answer = self.request(method, path, headers, **content)
        return answer

    get = partialmethod(request, "GET")  # (path, headers, …), as the next ones
    head = partialmethod(request, "HEAD")
    post = partialmethod(request, "POST")
    put = partialmethod(request, "PUT")
    patch = partialmethod(request, "PATCH")
    delete = partialmethod(request, "DELETE")
    options = partialmethod(request, "OPTIONS")

    @contextmanager
    def stream(self, method: str, path: str, headers: Optional[Dict[str, str]] = None, *,
               query: Optional[dict] = None, body: Union[bytes, str, Iterable[bytes]] = b"",
               json: object = None, form: Optional[dict] = None,
               files: Optional[dict] = None) -> Iterator[Answer]:
        """One request, whose `answer.pieces` are made while you read them; closed at the end.

        `path` may hold a query; `json`, `form` and `files` make the body and its type. A file is
        open, or (filename, bytes), or (filename, bytes, content type). A body of several pieces is
        sent without its length.
        """
        given = HeaderDict(headers or {})
        if json is not None:
            body = json_dumps(json)
            given.setdefault("Content-Type", "application/json")
        elif files is not None:
            given["Content-Type"], body = format_form(form or {}, files)
        elif form is not None:
            body = format_query(form)
            given.setdefault("Content-Type", "application/x-www-form-urlencoded")
        path, _, text = path.partition("?")
        if query:
            text = (text and text + "&") + format_query(query)
        with self._call(self._environ(method, path, text, given, body), path) as answer:
            yield answer

    @contextmanager
    def websocket(self, path: str, headers: Optional[Dict[str, str]] = None,
                  **options: Any) -> Iterator[Any]:
        """A WebSocket, whose methods wait: `ws.send("x")`, `ws.receive(timeout=1)`, `ws.close()`.

        At the end it is closed, and its handler has ended. `options`: subprotocols and the others
        of websocket.Options. Raises Refused where the handshake is refused.
        """
        from .websocket import BlockingWebSocket, Options, check_accepted, request_websocket
        limits, key = Options(**options), b64encode(os.urandom(16)).decode("ascii")
        given = HeaderDict(request_websocket(key, limits.subprotocols, limits.deflate,
                                             limits.takeover))
        given.update(headers or {})
        path, _, query = path.partition("?")
        environ = self._environ("GET", path, query, given, b"")
        environ.update({"minibottle.upgrade": [], "minibottle.settings": DEFAULTS})
        with self._call(environ, path) as answer:
            if answer.status_code != 101:
                raise Refused(answer)
        answer.headers["Connection"] = "Upgrade"  # as the server adds
        agreed = check_accepted(101, answer.headers, key, limits.subprotocols, limits.deflate)
        ws, crew = bridge.wait(copy_context(), connect(
            environ["minibottle.upgrade"][-1], limits, *agreed))
        try:
            yield BlockingWebSocket(ws)
        finally:
            bridge.wait(copy_context(), disconnect(ws, crew))
            for each in crew:
                if isinstance(each, threading.Thread):
                    each.join(GRACE_SECONDS)

    def _environ(self, method: str, path: str, query: str, headers: HeaderDict,
                 body: Union[bytes, str, Iterable[bytes]]) -> Dict[str, Any]:
        scheme, host = urlsplit(self.url)[:2]
        name, _, port = host.partition(":")
        environ = {
            "REQUEST_METHOD": method, "SCRIPT_NAME": "", "QUERY_STRING": query,
            "PATH_INFO": percent_decode(path).decode("latin-1"),
            "SERVER_NAME": name, "SERVER_PORT": port or ("443" if scheme == "https" else "80"),
            "SERVER_PROTOCOL": "HTTP/1.1", "REMOTE_ADDR": "127.0.0.1", "HTTP_HOST": host,
            "wsgi.version": (1, 0), "wsgi.url_scheme": scheme, "wsgi.errors": sys.stderr,
            "wsgi.multithread": False, "wsgi.multiprocess": False, "wsgi.run_once": False,
            "minibottle.raise_errors": self.raise_errors}
        data = body.encode("utf-8") if isinstance(body, str) else body
        if isinstance(data, bytes):
            environ["wsgi.input"] = io.BytesIO(data)
            if data:
                environ["CONTENT_LENGTH"] = str(len(data))
        else:
            environ["wsgi.input"] = io.BufferedReader(Input(data))
            environ["wsgi.input_terminated"] = True
        cookies = "; ".join(f"{name}={value}" for name, value in self.cookies.items()
                            if self._is_sent(name, scheme, path))
        if cookies:
            headers.setdefault("Cookie", cookies)
        for name, value in headers.allitems():
            key = name.upper().replace("-", "_")
            environ[key if key == "CONTENT_TYPE" else "HTTP_" + key] = text_to_wsgi(str(value))
        return environ

    @contextmanager
    def _call(self, environ: Dict[str, Any], path: str) -> Iterator[Answer]:
        out: Any = drive(ask_wsgi(self.app, environ))
        (status, headers, _), body = out.wait() if type(out) is Pending else out
        try:
            if not (environ.get("minibottle.upgrade") and status[:3] == "101"):
                check_status(status)
            for pair in headers:
                format_field(tuple(pair))
            answer = Answer(status, headers, iter([body] if type(body) is bytes else body))
            for line in answer.headers.getall("Set-Cookie"):
                self._keep(line, path)
            yield answer
        finally:
            close_all(body)

    # -- cookies --

    def _keep(self, line: str, path: str) -> None:
        """Take one off a Set-Cookie (RFC 6265 5.2, 5.3)."""
        pair, *rest = line.split(";")
        name, _, value = pair.partition("=")
        options = {key.strip().lower(): text.strip()
                   for key, _, text in (part.partition("=") for part in rest)}
        scope = options.get("path", "")
        if not scope.startswith("/"):
            scope = path[:path.rfind("/")] or "/"
        age, date = options.get("max-age", ""), parse_date(options.get("expires", ""))
        ends = float("inf") if date is None else date
        if re.fullmatch("-?[0-9]+", age):
            ends = time.time() + int(age) if int(age) > 0 else 0.0
        if ends > time.time():
            self.cookies[name], self.scopes[name] = value, (scope, ends, "secure" in options)
        elif self.scopes.get(name, (scope,))[0] == scope:  # of another path it is another cookie
            self.cookies.pop(name, None)

    def _is_sent(self, name: str, scheme: str, path: str) -> bool:
        scope, ends, secure = self.scopes.get(name, ("/", float("inf"), False))
        return ((path == scope or path.startswith(scope.rstrip("/") + "/"))
                and time.time() < ends and (scheme == "https" or not secure))


REDIRECTS = (301, 302, 303, 307, 308)


# -- both ends of a WebSocket, on the thread of the application's event loop --

def at_work() -> set:
    """The tasks and threads there are."""
    return {*bridge.asyncio.all_tasks(), *threading.enumerate()}


async def connect(begin: Callable, *agreed: Any) -> Tuple[Any, set]:
    """What the server does after 101, with one end of a socket pair: (a WebSocket on the other
    end, the task or thread of the handler)."""
    from .websocket import WebSocket
    ends = [SimpleNamespace(sock=sock, buf=b"") for sock in socketpair()]
    for end in ends:
        end.sock.setblocking(False)
    before = at_work()
    begin(ends[0], disconnect_end)
    return WebSocket(ends[1], disconnect_end, *agreed), at_work() - before


def disconnect_end(end: Any) -> None:
    end.sock.close()


async def disconnect(ws: Any, crew: set) -> None:
    """Close it, and let the handler end if it is a coroutine."""
    await ws.close()
    tasks = [bridge.asyncio.wait_for(task, GRACE_SECONDS) for task in crew
             if isinstance(task, bridge.asyncio.Task)]
    await bridge.asyncio.gather(*tasks, return_exceptions=True)


# -- over real sockets --

class Server:
    """A worker in a thread of this process: for tests, and inside another program.

        with Server(app, port=0) as server:
            urlopen(server.url)
    """

    def __init__(self, app: Callable, port: int = 8080, host: str = "127.0.0.1",
                 **settings: object) -> None:
        if "bind" in settings or "workers" in settings:
            raise UsageError("a Server has a host and a port, and no workers; run() has them")
        given = Settings(workers="0", **settings)
        self.sock = bind(join_port(host, port))
        self.worker = Worker(app, [self.sock], given)
        self.worker.drain_idle_seconds = 0.0  # its clients are of this process
        self.host = host
        self.port: int = self.sock.getsockname()[1]
        self.url = format_address(self.sock, given)
        self.thread = threading.Thread(target=self.worker.monitor, daemon=True, name="minibottle")

    def start(self) -> "Server":
        run_lifecycle(self.worker.target, "start")
        self.thread.start()
        return self

    __enter__ = start

    def stop(self) -> None:
        """From any thread: end what is begun, within `grace`, and free the port."""
        if self.thread.ident is None:  # it was not started
            return self.worker.shut_down()
        self.worker.drain()
        self.thread.join(self.worker.settings.grace + 2.0)

    def __exit__(self, *exc_info: object) -> None:
        self.stop()
