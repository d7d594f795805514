"""An HTTP/1.1 client on asyncio: one file to lay beside minibottle.py, whose codec it uses.

    from minibottle import App, fetch

    app = App()

    @app.get("/books/<title>")
    async def books(title):
        answer = await fetch("https://example.org/search", "POST", json={"title": title}, timeout=5)
        return {"found": answer.json, "said": answer.status_code}

Run that with `python minibottle.py app`. A script without asyncio calls fetch_sync(url, ...). For
limits of one's own, and for bodies piece by piece (`from minibottle import Client`):

    async with Client(max_per_host=10, max_body=1 << 30, timeout=None) as client:
        async with client.stream("GET", url) as answer:
            async for piece in answer: ...

Whatever status comes is an answer; a ClientError says that there is none, and how far it came.

PARTS   Errors and limits, Requests, Answers, Connections, Client, One call, fetch
"""

from __future__ import annotations

import asyncio
import re
import select
import socket
import zlib
from binascii import b2a_base64
from collections.abc import Mapping
from contextvars import copy_context
from functools import lru_cache, partial
from urllib.parse import unquote, urljoin, urlsplit
from weakref import WeakValueDictionary

from . import (
    BODY_LENGTH, FIELD_LINE, HOP_BY_HOP, KINDS, LAST_CHUNK, TOKEN, BadRequest, HeaderDict,
    MultiDict, __version__, bridge, explain_field_line, format_field, format_query, frame_chunk,
    iter_chunked, iter_counted, join_field, json_dumps, json_loads, known_answer, parse_framing,
    parse_options, percent_encode, text_to_wsgi, wsgi_to_text)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, AsyncIterator, Dict, Iterator, List, Optional, Set, Tuple
    Origin = Tuple[str, str, int]  # ("http", "a.b", 80)


# --- Errors and limits --------------------------------------------------------

class ClientError(Exception):
    """No answer. `phase`, how far it came: queue, resolve, connect, TLS, send, head or body.

    What the caller got wrong is a ValueError or a TypeError, before a byte is sent.
    """

    phase = ""


class ClientTimeout(ClientError):
    """The deadline has passed: `timeout` counts from the call to the last byte of the body."""


class Stale(ConnectionError):
    """The server closed an idle connection while the next request was on its way."""


MAX_HEAD = 65536            # bytes of an answer's head, as many as http.client takes in one line
MAX_INTERIM = 10            # 1xx answers before the answer
MAX_BUFFER = 262144         # bytes that wait for who reads a body, then the socket is not read
BLOCK = 65536               # bytes of a piece that is inflated, read from a file, or not yet sent
HAPPY_EYEBALLS = 0.25       # seconds until the next address is tried too (RFC 8305)


# --- Requests -----------------------------------------------------------------

PORTS = {"http": 80, "https": 443}
AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~-]+)(?::([0-9]{0,5}))?")
SAFE = "!#$%&'()*+,/:;=?@[]~"               # stays as it is in a URL; the rest is encoded
REDIRECTS = (301, 302, 303, 307, 308)
IDEMPOTENT = ("GET", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE")   # RFC 9110 9.2.2
SECRET = ("Authorization", "Cookie", "Proxy-Authorization", "Host")  # for one origin only
DEFAULT_HEADERS = (("User-Agent", "minibottle/" + __version__), ("Accept", "*/*"),
                   ("Accept-Encoding", "gzip, deflate"))


def hide(url: str) -> str:
    """A URL for a message: without user and password."""
    return re.sub(r"//[^/?#]*@", "//", url)


def format_basic(user: str, password: str) -> str:
    """("A", "b") -> "Basic QTpi" (RFC 7617)."""
    return "Basic " + b2a_base64(f"{user}:{password}".encode(), newline=False).decode("ascii")


@lru_cache(maxsize=1000)
def parse_url(url: str) -> Tuple[Origin, str, str, str]:
    """"http://A:b@C.d/e?f#g" -> (("http", "c.d", 80), "c.d", "/e?f", "Basic QTpi"). ValueError.

    What is not ASCII is encoded; white space is refused, as urlsplit() drops some in silence.
    """
    try:
        parts = urlsplit(url)
    except ValueError:          # its message may show the password
        parts = urlsplit("")
    user, _, authority = parts.netloc.rpartition("@")
    if not authority.isascii():
        authority = authority.encode("idna").decode("ascii")
    match = AUTHORITY.fullmatch(authority)
    port = int(match[2] or PORTS.get(parts.scheme, 0)) if match else 0
    if not match or parts.scheme not in PORTS or not 0 < port < 65536 or (
            "\\" in user or re.search(r"[\x00-\x20\x7f]", url)):
        raise ValueError(f"not an http:// or https:// URL: {hide(url)!a}")
    name = match[1].lower()
    if user:
        name_of_user, _, password = user.partition(":")
        user = format_basic(unquote(name_of_user), unquote(password))
    return ((parts.scheme, name.strip("[]"), port),
            name if port == PORTS[parts.scheme] else f"{name}:{port}",
            percent_encode((parts.path or "/") + (parts.query and "?" + parts.query), SAFE), user)


def read_body(body: Any) -> Any:
    """What is given as a body -> bytes, or an asynchronous iterator of them. Raises TypeError."""
    if body is None or isinstance(body, str):
        return (body or "").encode("utf-8")
    if isinstance(body, (bytes, bytearray, memoryview)):
        return bytes(body)
    if isinstance(body, Mapping):
        raise TypeError("a dict is no body: give it as json or as form")
    if hasattr(body, "__aiter__"):
        return body
    if hasattr(body, "read"):
        return iter_async(iter(partial(body.read, BLOCK), b""))
    if isinstance(body, (list, tuple)):  # before a byte is sent
        body = [check_piece(piece) for piece in body]
    return iter_async(iter(body))


async def iter_async(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def check_piece(piece: Any) -> bytes:
    if not isinstance(piece, (bytes, bytearray, memoryview)):
        raise TypeError(f"a piece of a body is bytes, not {type(piece).__name__}")
    return bytes(piece)


class Message:
    """A request; a redirect changes it."""

    def __init__(self, method: str, url: str, headers: Any, body: Any, json: Any, form: Any,
                 auth: Optional[Tuple[str, str]]) -> None:
        if not TOKEN.fullmatch(method) or method == "CONNECT":
            raise ValueError(f"bad method {method!a}")
        if sum((json is not None, form is not None, body not in (None, b"", ""))) > 1:
            raise TypeError("one of body, json and form, not more")
        self.method = method
        self.headers = HeaderDict()
        self.go_to(url)
        self.add_headers(headers or ())
        if auth or self.auth:
            self.headers["Authorization"] = format_basic(*auth) if auth else self.auth
        if json is not None:
            body = json_dumps(json)
            self.headers.setdefault("Content-Type", "application/json")
        elif form is not None:
            body = format_query(form)
            self.headers.setdefault("Content-Type", "application/x-www-form-urlencoded")
        self.body = read_body(body)

    def go_to(self, url: str) -> None:
        self.origin, self.authority, self.target, self.auth = parse_url(url)
        self.url = hide(url).partition("#")[0]

    def add_headers(self, headers: Any) -> None:
        """A dict, or pairs; those that frame a message, or belong to the connection, are ours."""
        pairs = headers.allitems() if isinstance(headers, MultiDict) else (
            headers.items() if isinstance(headers, Mapping) else headers)
        for name, value in pairs:
            self.headers.append(name, value)
        for name in self.headers:
            if KINDS.get(name.lower()) in (BODY_LENGTH, HOP_BY_HOP) and name not in SECRET:
                raise ValueError(f"the client itself makes the header {name}")
        for name, value in DEFAULT_HEADERS:
            self.headers.setdefault(name, value)

    def redirect(self, status: int, location: str) -> None:
        """RFC 9110 15.4. The user and password of a Location are for nobody."""
        old = self.origin
        try:
            self.go_to(urljoin(self.url, percent_encode(location, SAFE)))
        except ValueError as error:
            raise BadRequest(f"a redirect: {error}") from None
        if status == 303 and self.method != "HEAD" or status < 303 and self.method == "POST":
            self.method, self.body = "GET", b""
            self.headers.filter([name for name in self.headers if name.startswith("Content-")])
        elif not isinstance(self.body, bytes):
            raise BadRequest(f"redirected by {status}, but the body is used up")
        if self.origin != old:
            self.headers.filter(SECRET)

    def format_head(self, proxy_auth: Optional[str] = None) -> bytes:
        """The bytes up to the empty line; with `proxy_auth`, if only "", for a proxy."""
        fields = [(name, text_to_wsgi(value)) for name, value in self.headers.allitems()]
        if "Host" not in self.headers.dict:
            fields.insert(0, ("Host", self.authority))
        if proxy_auth:
            fields.append(("Proxy-Authorization", proxy_auth))
        if not isinstance(self.body, bytes):
            fields.append(("Transfer-Encoding", "chunked"))
        elif self.body or self.method in ("POST", "PUT", "PATCH"):  # RFC 9110 8.6
            fields.append(("Content-Length", str(len(self.body))))
        where = "" if proxy_auth is None else "http://" + self.authority  # RFC 9112 3.2.2
        lines = [(known_answer(field) or format_field(field))[0] for field in fields]
        return b"".join((f"{self.method} {where}{self.target} HTTP/1.1\r\n".encode("ascii"),
                         *lines, b"\r\n"))


# --- Answers ------------------------------------------------------------------

STATUS_LINE = re.compile(r"HTTP/(1\.[01]) ([1-9][0-9]{2})(?: ([\t\x20-\x7e\x80-\xff]*))?")


class Answer:
    """`status_code`, `headers`, `url` and, once it is read, `body`, `text` and `json`."""

    def __init__(self, head: bytes) -> None:
        line, *lines = head.decode("latin-1").split("\r\n")
        match = STATUS_LINE.fullmatch(line)
        if not match:
            raise BadRequest(f"bad status line {line[:80]!a}")
        self.version = match[1]
        self.status = f"{match[2]} {match[3] or ''}"
        self.status_code = int(match[2])
        self.headers = HeaderDict()
        self.url = ""
        self.body = b""
        self.pieces: Iterator[bytes] = iter(())     # of the body, NEED_DATA between
        self.call: Any = None
        for line in lines:
            match = FIELD_LINE.fullmatch(line)
            if not match:
                raise BadRequest(f"{explain_field_line(line)} in header line {line[:60]!a}")
            if "_" not in match[1]:  # as in a request: X_A would pass for X-A
                self.headers.append(match[1], wsgi_to_text(match[2].strip(" \t"), "replace"))

    @property
    def text(self) -> str:
        kind = self.headers.get("Content-Type", "")
        return self.body.decode(parse_options(kind)[1].get("charset", "utf-8"))

    @property
    def json(self) -> Any:
        """Raises ValueError where the body is no JSON."""
        return json_loads(self.body)

    def __repr__(self) -> str:
        return f"<Answer {self.status}, {len(self.body)} bytes>"

    def is_kept_alive(self) -> bool:
        """May the connection serve another request? RFC 9112 9.3."""
        options = ",".join(self.headers.getall("Connection")).lower().replace(" ", "").split(",")
        return "close" not in options and (self.version == "1.1" or "keep-alive" in options)

    def parse_length(self, method: str) -> Optional[int]:
        """The length of the body: -1 if chunked, None up to the end. RFC 9112 6.3."""
        if method == "HEAD" or self.status_code in (204, 304):
            return 0
        found = {"SERVER_PROTOCOL": "HTTP/" + self.version}
        for name, key in (("Transfer-Encoding", "HTTP_TRANSFER_ENCODING"),
                          ("Content-Length", "CONTENT_LENGTH")):
            for value in self.headers.getall(name):
                found[key] = join_field(key, found[key], value) if key in found else value
        return parse_framing(found) if len(found) > 1 else None

    def begin(self, conn: Connection, method: str, max_body: int) -> None:
        """The head is read, the body comes next."""
        length = self.parse_length(method)
        if length is not None and length > max_body:
            raise BadRequest(f"body of {length} bytes, over {max_body} (max_body)", 413)
        self.pieces = (iter_rest(conn, max_body) if length is None else
                       iter_chunked(conn.buf, max_body) if length < 0 else
                       iter_counted(conn.buf, length))
        coding = self.headers.get("Content-Encoding", "").lower()
        if coding in ("gzip", "x-gzip", "deflate") and length != 0:
            self.pieces = iter_inflated(self.pieces, max_body)
            self.headers.filter(("Content-Encoding", "Content-Length"))  # of what nobody will see

    async def read(self) -> bytes:
        """The whole body, also from now on in `body`."""
        self.body += await self.call.within(self.call.take_all(self.pieces))
        return self.body

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> bytes:
        piece = await self.call.within(self.call.take_piece(self.pieces))
        if not piece:
            raise StopAsyncIteration
        return piece


def iter_rest(conn: Connection, max_body: int) -> Iterator[bytes]:
    """Decode a body that ends where the connection ends."""
    left = max_body
    while conn.buf or not conn.ended or conn.error:
        piece = bytes(conn.buf)  # NEED_DATA, if there is none
        conn.buf.clear()
        left -= len(piece)
        if left < 0:
            raise BadRequest(f"body over {max_body} bytes (max_body)", 413)
        yield piece


def iter_inflated(pieces: Iterator[bytes], max_body: int) -> Iterator[bytes]:
    """Decode gzip, zlib (HTTP's deflate) and bare deflate (which some servers take for it)."""
    inflater: Any = None
    left = max_body
    for piece in iter_small(pieces):
        if not piece:
            yield piece  # NEED_DATA
        elif not inflater:
            bits = 31 if piece[:1] == b"\x1f" else 15 if piece[0] & 0x8f == 8 else -15
            inflater = zlib.decompressobj(bits)
        data = b""
        while piece or len(data) == BLOCK:
            if inflater.eof:
                piece = piece.lstrip(b"\0")  # some pad it
                if not piece:
                    break
                if bits != 31:
                    raise BadRequest("bytes after the end of the compressed body")
                inflater = zlib.decompressobj(bits)  # RFC 1952 2.2: of the next member
            data = inflater.decompress(piece, BLOCK)
            piece = inflater.unused_data or inflater.unconsumed_tail
            left -= len(data)
            if left < 0:
                raise BadRequest(f"inflated body over {max_body} bytes (max_body)", 413)
            if data:
                yield data
    if inflater and not inflater.eof:
        raise BadRequest("the compressed body breaks off")


def iter_small(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Cut them: each of many tiny members copies the rest of its piece."""
    for piece in pieces:
        for i in range(0, len(piece) or 1, 16384):
            yield piece[i:i + 16384]


# --- Connections --------------------------------------------------------------

class Connection(asyncio.Protocol):
    """A socket: what comes gathers in `buf`, and who waits for a change() hears of it."""

    def __init__(self, client: Client, host: Host) -> None:
        client.conns.add(self)
        self.client = client
        self.host = host
        self.transport: Any = None
        self.buf = bytearray()
        self.waiter: Any = None         # a future
        self.ended = False              # nothing more will come
        self.error: Any = None          # why, if not by the server's will
        self.timer: Any = None          # closes it when it has been idle for long; None: never used

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        if self not in self.client.conns:
            transport.abort()  # it was closed while it was being opened

    def data_received(self, data: bytes) -> None:
        self.buf += data
        if len(self.buf) > MAX_BUFFER:
            self.transport.pause_reading()
        self.resume_writing()

    def eof_received(self) -> None:
        self.ended = True
        self.resume_writing()

    def connection_lost(self, error: Optional[Exception]) -> None:
        self.client.conns.discard(self)
        self.ended, self.error = True, error
        self.resume_writing()

    def resume_writing(self) -> None:
        if self.waiter and not self.waiter.done():
            self.waiter.set_result(None)

    async def change(self) -> None:
        """Wait for the next thing that happens."""
        self.transport.resume_reading()
        self.waiter = self.client.loop.create_future()
        await self.waiter

    def is_fresh(self) -> bool:
        """Nothing came while it was idle: no end, and no bytes that nobody asked for."""
        return not (self.ended or self.buf or self.transport.is_closing() or
                    is_readable(self.transport.get_extra_info("socket").fileno()))

    def keep(self) -> None:
        """It is idle from now on."""
        self.host.idle.append(self)
        self.timer = self.client.loop.call_later(self.client.keep_alive, self.drop)

    def drop(self) -> None:
        self.host.idle.remove(self)
        self.close()

    def close(self) -> None:
        self.client.conns.discard(self)
        if self.transport:
            self.transport.abort()


def is_readable(fd: int) -> bool:
    """Has something come that the loop has not looked at yet?"""
    if not hasattr(select, "poll"):  # Windows
        return bool(select.select([fd], [], [], 0)[0])
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


# --- Client -------------------------------------------------------------------

class Host:
    """What a client has to do with one origin."""

    def __init__(self, most: int, proxy: Optional[str]) -> None:
        self.slots = asyncio.Semaphore(most)
        self.idle: List[Connection] = []        # the one used last is at the end
        self.proxy: Any = None                  # (name, port) to connect to instead
        self.proxy_auth = ""
        if proxy:
            (scheme, *self.proxy), _, _, self.proxy_auth = parse_url(
                proxy if "://" in proxy else "http://" + proxy)
            if scheme != "http":
                raise ValueError(f"a proxy is reached by http://, not by {hide(proxy)!a}")

    def take_idle(self) -> Optional[Connection]:
        while self.idle:
            conn = self.idle.pop()
            conn.timer.cancel()
            if conn.is_fresh():
                return conn
            conn.close()
        return None


@lru_cache(maxsize=None)
def default_context() -> Any:
    """TLS with the certificates that the system trusts; reading them takes 20 ms."""
    import ssl
    return ssl.create_default_context()


class Client:
    """A pool of connections, for one asyncio loop. `async with` closes it.

    `max_per_host` and `max_total` connections, of which idle ones stay for `keep_alive` seconds;
    `ssl` is an SSLContext; `proxies` {"http": "http://user:password@host:port", "https": ...} are
    by default those of the environment (http_proxy, https_proxy, no_proxy), {} is none. `options`
    are defaults for the calls: see Call.
    """

    def __init__(self, *, max_per_host: int = 100, max_total: int = 200, keep_alive: float = 15,
                 ssl: Any = None, proxies: Optional[Dict[str, str]] = None, **options: Any) -> None:
        self.max_per_host = max_per_host
        self.max_total = max_total
        self.keep_alive = keep_alive
        self.ssl = ssl
        self.proxies = proxies
        self.options = options
        self.slots: Any = None                  # max_total of them
        self.hosts: Any = WeakValueDictionary()  # Origin -> Host, which its connections keep alive
        self.conns: Set[Connection] = set()     # all that are open
        self.is_closed = False
        self.loop: Any = None

    async def fetch(self, url: str, method: str = "GET", **options: Any) -> Answer:
        """The answer with its whole body. Raises ClientError."""
        call = self.stream(method, url, **options)
        return await call.within(call.fetch())

    def stream(self, method: str, url: str, **options: Any) -> Call:
        """`async with client.stream("GET", url) as answer: async for piece in answer: ...`"""
        return Call(self, method, url, **{**self.options, **options})

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every connection, also those in use. Again is fine."""
        self.is_closed = True
        for conn in list(self.conns):
            conn.close()
        await asyncio.sleep(0)  # a transport closes its socket in the next round of the loop

    def find_host(self, origin: Origin) -> Host:
        loop = asyncio.get_running_loop()
        if not self.loop:
            self.loop, self.slots = loop, asyncio.Semaphore(self.max_total)
        elif loop is not self.loop:
            raise RuntimeError("a Client belongs to the asyncio loop that used it first")
        host = self.hosts.get(origin)
        if not host:
            host = self.hosts[origin] = Host(self.max_per_host, self.find_proxy(*origin))
        return host

    def find_proxy(self, scheme: str, name: str, port: int) -> Optional[str]:
        if self.proxies is not None:
            return self.proxies.get(scheme)
        from urllib.request import getproxies, proxy_bypass
        found = getproxies().get(scheme)
        return None if found and proxy_bypass(f"{name}:{port}") else found

    def make_room(self) -> None:
        """Another connection is about to be opened: if it is too many, an idle one goes."""
        if self.is_closed:
            raise ConnectionError("the Client is closed")
        while len(self.conns) >= self.max_total:  # so many calls there are not, this one included
            idle = next(host.idle for host in self.hosts.values() if host.idle)
            idle[0].timer.cancel()
            idle[0].drop()


# --- One call -----------------------------------------------------------------

class Call:
    """A request and its redirects up to the answer; one deadline for all of it.

    `query` is added to that of the URL, a dict as `form` is; `headers` is a dict or a list of
    pairs; `body` bytes, str, a file or an iterator (asynchronous
    or not) of bytes, which goes out chunked; `json` and `form` make a body and its type; `auth` is
    (user, password). `timeout` is in seconds, None for none; `max_body` counts the bytes of the
    answer's body, inflated; so many `redirects` are followed.
    """

    def __init__(self, client: Client, method: str, url: str, *, query: Any = None,
                 headers: Any = None, body: Any = b"", json: Any = None, form: Any = None,
                 auth: Optional[Tuple[str, str]] = None, timeout: Optional[float] = 20,
                 max_body: int = 100 << 20, redirects: int = 5) -> None:
        self.client = client
        if query:
            url, mark, fragment = url.partition("#")
            url += ("&" if "?" in url else "?") + format_query(query) + mark + fragment
        self.message = Message(method, url, headers, body, json, form, auth)
        self.message.format_head()      # ValueError now, not on the way
        self.timeout = timeout
        self.deadline = 0.0             # by the loop's clock
        self.max_body = max_body
        self.redirects = redirects
        self.phase = "queue"
        self.host: Any = None
        self.held: List[Any] = []       # semaphores
        self.conn: Any = None
        self.is_reusable = False        # the connection, after the answer

    async def __aenter__(self) -> Answer:
        return await self.within(self.run())

    async def __aexit__(self, *exc_info: object) -> None:
        self.end()

    async def within(self, steps: Any) -> Any:
        """Their result, if it comes before the deadline; whatever they raise ends the call."""
        if self.timeout is not None:
            now = asyncio.get_running_loop().time()
            self.deadline = self.deadline or now + self.timeout
            steps = asyncio.wait_for(steps, max(0, self.deadline - now))
        try:
            return await steps
        except (OSError, BadRequest, zlib.error, asyncio.TimeoutError) as error:
            raise self.explain(error) from error
        except BaseException:
            self.end()
            raise

    def explain(self, error: Exception) -> ClientError:
        """What went wrong, and where; it is the end of the call."""
        is_late = isinstance(error, asyncio.TimeoutError) and not error.args  # ETIMEDOUT has some
        if is_late and self.phase == "head" and self.conn.transport.get_write_buffer_size():
            self.phase = "send"
        cause = f"over {self.timeout:g} s (timeout)" if is_late else error
        made = (ClientTimeout if is_late else ClientError)(
            f"{self.message.method} {self.message.url}: {cause} (phase: {self.phase})")
        made.phase = self.phase
        self.end()
        return made

    async def fetch(self) -> Answer:
        answer = await self.run()
        answer.body = await self.take_all(answer.pieces)
        return answer

    async def run(self) -> Answer:
        """The answer, after redirects."""
        answer = await self.ask()
        for _ in range(self.redirects):
            location = answer.headers.get("Location")
            if answer.status_code not in REDIRECTS or not location:
                return answer
            # A body that is here is dropped; for the rest of one the connection is.
            self.end(self.is_reusable and all(answer.pieces))
            self.message.redirect(answer.status_code, location)
            answer = await self.ask()
        if self.redirects and answer.status_code in REDIRECTS:
            raise BadRequest(f"over {self.redirects} redirects (redirects)")
        return answer

    async def ask(self) -> Answer:
        """One request, one answer."""
        message, client = self.message, self.client
        self.phase = "queue"
        self.host = client.find_host(message.origin)
        for slots in self.host.slots, client.slots:
            await slots.acquire()
            self.held.append(slots)
        self.conn = self.host.take_idle()
        if self.conn:
            try:
                return await self.exchange()
            except Stale:
                if message.method not in IDEMPOTENT or not isinstance(message.body, bytes):
                    raise
                self.conn.close()
        client.make_room()
        self.conn = Connection(client, self.host)
        await self.open(*message.origin)
        return await self.exchange()

    async def open(self, scheme: str, name: str, port: int) -> None:
        await self.connect(*(self.host.proxy or (name, port)))
        if scheme == "https":
            if self.host.proxy:
                await self.open_tunnel(f"[{name}]:{port}" if ":" in name else f"{name}:{port}")
            self.phase = "TLS"
            self.conn.transport = await self.client.loop.start_tls(
                self.conn.transport, self.conn, self.client.ssl or default_context(),
                server_hostname=name)

    async def connect(self, name: str, port: int) -> None:
        """Where there are several addresses, asyncio resolves once more, and tries them at once."""
        loop, self.phase = self.client.loop, "resolve"
        found = await loop.getaddrinfo(name, port, type=socket.SOCK_STREAM)
        self.phase, options = "connect", {}
        if len(found) == 1:
            name = found[0][4][0]
        elif isinstance(loop, asyncio.BaseEventLoop):  # others may not know it
            options["happy_eyeballs_delay"] = HAPPY_EYEBALLS
        await loop.create_connection(lambda: self.conn, name, port, **options)

    async def open_tunnel(self, where: str) -> None:
        """RFC 9110 9.3.6."""
        fields = [("Host", where), ("Proxy-Authorization", self.host.proxy_auth)]
        lines = [format_field(field)[0] for field in fields if field[1]]
        self.conn.transport.write(
            b"CONNECT %b HTTP/1.1\r\n%b\r\n" % (where.encode("ascii"), b"".join(lines)))
        answer = await self.take_answer()
        if not 200 <= answer.status_code < 300 or self.conn.buf:
            raise ConnectionRefusedError(f"the proxy answers {answer.status}")

    async def exchange(self) -> Answer:
        conn, message = self.conn, self.message
        through_proxy = self.host.proxy and message.origin[0] == "http"
        self.phase = "send"
        is_sent = await self.send(
            message.format_head(self.host.proxy_auth if through_proxy else None), message.body)
        self.phase = "head"
        answer = await self.take_answer()
        answer.begin(conn, message.method, self.max_body)
        answer.url, answer.call = message.url, self
        self.phase, self.is_reusable = "body", is_sent and answer.is_kept_alive()
        return answer

    async def send(self, head: bytes, body: Any) -> bool:
        """False if the answer came in the middle of the body."""
        conn, write = self.conn, self.conn.transport.write
        if isinstance(body, bytes):
            write(head + body)  # the answer may come before the last byte has left
            return True
        write(head)
        async for piece in body:
            while not (conn.buf or conn.ended) and conn.transport.get_write_buffer_size() > BLOCK:
                await conn.change()
            if conn.buf or conn.ended:
                return False
            write(frame_chunk(check_piece(piece)))
        write(LAST_CHUNK)
        return True

    async def take_answer(self) -> Answer:
        """The head of an answer; 1xx ones are skipped (RFC 9110 15.2)."""
        for _ in range(MAX_INTERIM + 1):
            answer = Answer(await self.take_head())
            if answer.status_code >= 200:
                return answer
        raise BadRequest(f"over {MAX_INTERIM} interim answers")

    async def take_head(self) -> bytes:
        conn, buf, seen = self.conn, self.conn.buf, 0
        while True:
            end = buf.find(b"\r\n\r\n", max(0, seen - 3), MAX_HEAD)
            if end >= 0:
                head = bytes(buf[:end])
                del buf[:end + 4]
                return head
            if not b"HTTP/1.".startswith(buf[:7]) or buf.find(b"\n\n", max(0, seen - 1)) >= 0:
                raise BadRequest(f"this is no HTTP answer: {bytes(buf[:40])!a}")
            if len(buf) >= MAX_HEAD:
                raise BadRequest(f"head over {MAX_HEAD} bytes", 431)
            if conn.ended and conn.timer and not buf:
                raise Stale("the server closed the connection")
            seen = len(buf)
            await self.wait_more()

    async def wait_more(self) -> None:
        """Wait for bytes, or for the end where that may come."""
        if not self.conn or self.conn.ended:
            raise ConnectionError(self.conn and self.conn.error or
                                  "the connection was closed before the end of the answer")
        await self.conn.change()

    async def take_piece(self, pieces: Iterator[bytes]) -> bytes:
        """The next piece of the body, b"" after the last."""
        for piece in pieces:
            if piece:
                return piece
            await self.wait_more()
        self.end(self.is_reusable)
        return b""

    async def take_all(self, pieces: Iterator[bytes]) -> bytes:
        found = [await self.take_piece(pieces)]
        while found[-1]:
            if len(found[-1]) == BLOCK:
                await asyncio.sleep(0)  # let others run: much may be inflated out of a little
            found.append(await self.take_piece(pieces))
        return b"".join(found)

    def end(self, is_reusable: bool = False) -> None:
        """Give back all that it holds. Again is fine."""
        conn, self.conn = self.conn, None
        if conn and is_reusable and not (
                conn.buf or conn.ended or conn.transport.get_write_buffer_size()):
            conn.keep()
        elif conn:
            conn.close()
        while self.held:
            self.held.pop().release()


# --- fetch --------------------------------------------------------------------

shared: Dict[Any, Any] = {}     # an asyncio loop -> (its Client, what closes it)


async def share_client(loop: Any) -> Any:
    """asyncio.run() ends the asynchronous generators of its loop: this one closes the Client."""
    async with Client() as client:
        try:
            yield client
        finally:
            del shared[loop]


async def fetch(url: str, method: str = "GET", **options: Any) -> Answer:
    """`(await fetch("https://example.org/", timeout=5)).text`; for the options see Call.

    The connections are those of the loop: they are kept for the next call.
    """
    loop = asyncio.get_running_loop()
    if loop not in shared:
        closer = share_client(loop)
        shared[loop] = await closer.__anext__(), closer
    return await shared[loop][0].fetch(url, method, **options)


def fetch_sync(url: str, method: str = "GET", **options: Any) -> Answer:
    """fetch() for code without asyncio, in an application or a script: it waits."""
    return bridge.wait(copy_context(), fetch(url, method, **options))
