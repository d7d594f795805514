"""minibottle: a web framework and its server in one file, with nothing but the standard library.

Drop it into a project and run `python minibottle.py app:main`. A hello world, in app.py:

    from minibottle import App

    app = App()

    @app.get("/hello/<name>")
    def hello(request, name):
        return {"hello": name, "agent": request.headers.get("User-Agent")}

    def main():
        app.run(port=8080)

MAP (a section uses only names from sections above it; 1-5 are pure: no socket, clock or process)

  I. Values
    1. Errors and limits        what can go wrong, and every setting
    2. Text and dates           UTF-8, HTTP dates, HTML, JSON
    3. Headers and multidicts   several values a name, validated
    4. HTTP/1.1 codec           bytes to environ, answers to bytes, chunked bodies
    5. Forms and cookies        fields and files out of bytes, cookies in and out
  II. Application
    6. Async bridge             coroutines beside functions
    7. Request and Response     views of environ, and what will be sent
    8. Files and gzip           file_wrapper, compression for any WSGI application
    9. Router                   rules to targets, and URLs
    10. Templates                text with Python in it, to HTML
    11. App                     routes, hooks, errors, Handler classes
  III. The world
    12. Event loop              one loop, handed over when user code blocks
    13. Server connection       HTTP on the loop
    14. Workers                 master and worker processes
    15. Default app and command line

ONE REQUEST (-> calls)

    Loop.run_loop -> Worker.on_event -> advance -> parse_head
        -> App.minibottle_plan               which route, before the body
        -> begin_special -> collect          the body, if there is one
        -> call -> App.__call__ -> wsgi -> _handle -> your function
                                        -> _respond (hooks, what awaits) -> _cast
                                        -> _start -> Exchange.start_response
        -> send_list | respond -> pump       the answer; of what awaits: respond_async, advance
        -> finish -> Loop.give               the connection waits for the next request

GLOSSARY

    environ     the WSGI dict of a request (PEP 3333): {"PATH_INFO": "/", "HTTP_HOST": "a.b", ...}
    head        request line and headers, or status line and headers, up to the empty line
    body        what follows it; a piece is some bytes of it
    plan        what the server may know of a request before it calls: App.minibottle_plan
    conn, c     a Connection: one client's socket; x, an Exchange: one request and its answer
    hand, me    a Hand: a thread as the others see it; me.holds: it has the loop

SPDX-License-Identifier: MIT        Copyright (c) 2026 the minibottle authors
Python 3.8 and newer. The licence text follows, also in LICENSE.
"""
# Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
# associated documentation files (the "Software"), to deal in the Software without restriction,
# including without limitation the rights to use, copy, modify, merge, publish, distribute,
# sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
# furnished to do so, subject to the following conditions:
#
# The above copyright notice and this permission notice shall be included in all copies or
# substantial portions of the Software.
#
# THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
# NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
# NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
# DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT
# OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.

from __future__ import annotations

import _thread
import atexit
import errno
import io
import mmap
import os
import re
import select
import signal
import socket
import stat
import struct
import sys
import threading
import time
from array import array
from collections import deque
from collections.abc import Mapping, MutableMapping
from contextvars import Context, ContextVar, copy_context
from functools import cached_property, lru_cache, partial, update_wrapper, wraps
from importlib import import_module
from itertools import chain, repeat
from operator import attrgetter

TYPE_CHECKING = False
if TYPE_CHECKING:  # for readers and checkers: importing it takes a tenth of our time
    from typing import (Any, BinaryIO, Callable, Deque, Dict, Generator, Iterable, Iterator, List,
                        Match, NoReturn, Optional, Pattern, Set, Tuple, Union)
    from urllib.parse import SplitResult
    Field = Tuple[str, str]
    Decoder = Generator[bytes, None, None]
    FilterParts = Tuple[str, Optional[Callable], Optional[Callable]]

__version__ = "1.0"
__all__ = (
    "App Bottle Handler Request Response HTTPResponse HTTPError request response abort redirect "
    "static_file app apps default_app AppStack route get post put delete patch error hook install "
    "uninstall mount url make_default_app_wrapper load run Settings JSONPlugin template view "
    "SimpleTemplate TEMPLATE_PATH TemplateError debug BaseRequest BaseResponse LocalRequest "
    "LocalResponse FileUpload CookieError MultipartError auth_basic parse_auth cookie_encode "
    "cookie_decode cookie_is_encoded MultiDict FormsDict HeaderDict WSGIHeaderDict ConfigDict "
    "Router Route RouteError RouteSyntaxError RouteBuildError BottleException BadRequest "
    "UsageError StartError TemplatePlugin html_escape http_date parse_date parse_range_header"
).split()


class Logger:
    """logging.getLogger("minibottle"), when it is first used: importing it takes half our time."""

    def __getattr__(self, name: str) -> Any:
        import logging
        return getattr(logging.getLogger("minibottle"), name)


log = Logger()


def companion(name: str) -> Any:
    """minibottle_NAME.py, which may lie beside this file: see COMPANIONS. Raises MissingFile."""
    return import_module(f"{'minibottle' if __name__ == '__main__' else __name__}.{name}")


# === 1. Errors and limits =====================================================
# What can go wrong, with the status to answer, and every limit and deadline that an operator may
# set. A message names the cause or the limit, since it is all that the peer's owner will see.

class BottleException(Exception):
    """What is raised by the application side of this file."""


class BadRequest(Exception):
    """The peer broke the protocol or a limit: answer `status` and this message, then close."""

    minibottle_peer = True  # by which an App knows it, of whichever copy of this file it is

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class ClientGone(ConnectionError):
    """The client has left in the middle of its request, or of the answer."""
    minibottle_peer = True


class CookieError(ValueError):
    """A cookie, or an attribute of one, that no browser would keep."""


class UsageError(Exception):
    """A command line or a setting is wrong: one line for the operator, exit status 2."""


class MissingFile(UsageError, ModuleNotFoundError):
    """What is asked for needs another file of ours beside this one."""


SETTINGS = (
    # name, default (its type is the setting's), what it is: times in seconds, sizes in bytes
    ("bind", ("127.0.0.1:8080",), "host:port, [::1]:port, unix:/path or fd:3 (repeatable)"),
    ("cert", "", "PEM file with the certificate and its chain: HTTPS (needs minibottle_tls.py)"),
    ("key", "", "PEM file with the certificate's key, where that is not in the same file"),
    ("workers", "1", "worker processes: a number, auto (one a CPU) or 0 (no master process)"),
    ("max_threads", 32, "threads for code that blocks, per worker"),
    ("queue_timeout", 30.0, "a request waits this long for a thread, then 503"),
    ("max_connections", 0, "open connections per worker (0: the descriptors there are, less 64)"),
    ("header_timeout", 10.0, "in all, for the head of a request to arrive, then 408"),
    ("body_timeout", 30.0, "without a byte of a request's body (and 500 bytes/s on average): 408"),
    ("keepalive_timeout", 75.0, "an idle connection is closed (be above your load balancer's)"),
    ("write_timeout", 30.0, "without progress while an answer is sent: closed"),
    ("worker_timeout", 120.0, "in one uninterrupted call: logged, and the worker is replaced"),
    ("grace", 10.0, "what is being answered has this long to end when the server stops"),
    ("max_requests", 0, "then a worker is replaced, give or take a tenth (0: never)"),
    ("max_request_line", 8192, "then 414"),
    ("max_header_bytes", 32768, "all header lines of a request together, then 431"),
    ("max_headers", 100, "header lines in a request, then 431"),
    ("max_body", 128 << 20, "a request's body, then 413"),
    ("spool_threshold", 512 << 10, "a request's body above it goes to a temporary file"),
    ("max_form_memory", 1 << 20, "form fields of a request, then 413"),
    ("max_fields", 1000, "form fields in a request, then 413"),
    ("max_files", 100, "uploaded files in a form, then 413"),
    ("gzip", True, "compress what a client accepts compressed"),
    ("gzip_min", 1024, "a smaller body is not compressed"),
    ("gzip_level", 6, "1 (fast) to 9 (small)"),
    ("trusted_proxies", (), "address, network or unix: its X-Forwarded-* count (repeatable)"),
    ("status", "", "path of the server's figures as JSON, for clients on this machine"),
    ("quiet", False, "no line at the start"),
    ("access_log", False, "one line a request on standard output (the command line turns it on)"),
    ("log_file", "-", "all that is printed goes to the end of this file (USR1 reopens it)"),
)


class Settings:
    """The operator's choices: an attribute for each row of SETTINGS: Settings(grace=5).grace -> 5.0

    Raises UsageError for a name that is none, and for a value that does not fit.
    """

    workers: str
    max_connections: int
    max_body: int
    if TYPE_CHECKING:  # at run time it would slow each read of a setting
        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, **given: object) -> None:
        for name, default, _ in SETTINGS:
            setattr(self, name, parse_setting(name, default, given.pop(name, default)))
        if not 1 <= self.gzip_level <= 9:
            raise UsageError(f"setting gzip_level: {self.gzip_level} is not 1 to 9")
        for name in ("max_threads", "header_timeout", "body_timeout", "write_timeout",
                     "worker_timeout"):
            if not getattr(self, name):
                raise UsageError(f"setting {name}: with 0 nobody would be served")
        if self.log_file != "-":  # it is opened again, maybe from another directory
            self.log_file: str = os.path.abspath(self.log_file)
        if self.key and not self.cert:
            raise UsageError("setting key: without cert there is no TLS")
        if given:
            unknown = ", ".join(sorted(given))
            raise UsageError(f"unknown setting {unknown}; there are {', '.join(vars(self))}")


def parse_setting(name: str, default: Any, value: Any) -> object:
    """("grace", 10.0, "5") -> 5.0, by the type of its default."""
    kind = type(default)
    if kind is tuple:
        values = (value,) if isinstance(value, str) else value
        fits = isinstance(values, (list, tuple)) and all(isinstance(v, str) for v in values)
        if fits and (values or not default):
            return tuple(values)
    elif kind is bool:
        if isinstance(value, bool):
            return value
    elif re.fullmatch(SETTING_FORMS.get(name) or SETTING_FORMS[kind], str(value)):
        return kind(value)
    raise UsageError(f"setting {name}: {value!r} does not fit (its default is {default!r})")


SETTING_FORMS: Dict[Any, str] = {int: r"[0-9]{1,18}", float: r"[0-9]{1,18}(\.[0-9]*)?",
                                 str: r"[^\0]*", "workers": "auto|[0-9]{1,4}",
                                 "status": r"(/[^?#\s]*)?"}
DEFAULTS = Settings()
DEBUG = False  # read at each use


def debug(mode: bool = True) -> None:
    """For development: error pages show the traceback, templates are read anew, warnings shown."""
    global DEBUG
    DEBUG = bool(mode)
    if DEBUG:
        import warnings
        warnings.simplefilter("default")


# === 2. Text and dates ========================================================
# bytes to str and back, dates, JSON and HTML. UTF-8 everywhere; PEP 3333 carries bytes as latin-1
# text, and only the two functions here cross that border.

_HTTP_STATUS_LINES = {int(line[:3]): line for line in (  # RFC 9110 15 and IANA's registry
    "100 Continue,101 Switching Protocols,102 Processing,103 Early Hints,200 OK,201 Created,"
    "202 Accepted,203 Non-Authoritative Information,204 No Content,205 Reset Content,"
    "206 Partial Content,207 Multi-Status,208 Already Reported,226 IM Used,300 Multiple Choices,"
    "301 Moved Permanently,302 Found,303 See Other,304 Not Modified,305 Use Proxy,"
    "307 Temporary Redirect,308 Permanent Redirect,400 Bad Request,401 Unauthorized,"
    "402 Payment Required,403 Forbidden,404 Not Found,405 Method Not Allowed,406 Not Acceptable,"
    "407 Proxy Authentication Required,408 Request Timeout,409 Conflict,410 Gone,"
    "411 Length Required,412 Precondition Failed,413 Content Too Large,414 URI Too Long,"
    "415 Unsupported Media Type,416 Range Not Satisfiable,417 Expectation Failed,"
    "418 I'm a teapot,421 Misdirected Request,422 Unprocessable Content,423 Locked,"
    "424 Failed Dependency,425 Too Early,426 Upgrade Required,428 Precondition Required,"
    "429 Too Many Requests,431 Request Header Fields Too Large,451 Unavailable For Legal Reasons,"
    "500 Internal Server Error,501 Not Implemented,502 Bad Gateway,503 Service Unavailable,"
    "504 Gateway Timeout,505 HTTP Version Not Supported,506 Variant Also Negotiates,"
    "507 Insufficient Storage,508 Loop Detected,510 Not Extended,"
    "511 Network Authentication Required").split(",")}
HTTP_CODES = {code: line[4:] for code, line in _HTTP_STATUS_LINES.items()}

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def wsgi_to_text(value: str, errors: str = "strict") -> str:
    """latin-1 text that carries UTF-8 bytes -> the text: "Ã¶" -> "ö". Raises UnicodeDecodeError."""
    return value if value.isascii() else value.encode("latin-1").decode("utf-8", errors)


def text_to_wsgi(value: str) -> str:
    """Text -> latin-1 text that carries its UTF-8 bytes: "ö" -> "Ã¶"."""
    return value if value.isascii() else value.encode("utf-8").decode("latin-1")


def percent_decode(text: str) -> bytes:
    """"a%20b" -> b"a b" (RFC 3986 2.1)."""
    from urllib.parse import unquote_to_bytes
    return unquote_to_bytes(text)


def percent_encode(text: str, safe: str = "/", errors: str = "strict") -> str:
    """"a b" -> "a%20b"."""
    from urllib.parse import quote
    return quote(text, safe, errors=errors)


def format_query(fields: Mapping) -> str:
    """{"a": 1, "b": ["x y", "z"]} -> "a=1&b=x+y&b=z"."""
    from urllib.parse import urlencode
    return urlencode(fields, doseq=True)


def format_date(parts: time.struct_time) -> str:
    """A UTC struct_time -> "Sun, 06 Nov 1994 08:49:37 GMT" (RFC 9110 5.6.7), in any locale."""
    return (f"{DAYS[parts[6]]}, {parts[2]:02d} {MONTHS[parts[1] - 1]} {parts[0]:04d} "
            f"{parts[3]:02d}:{parts[4]:02d}:{parts[5]:02d} GMT")


def http_date(value: Any) -> str:
    """A datetime, date, struct_time or timestamp (seconds) -> an HTTP date; a str stays."""
    if isinstance(value, str):
        return value
    if hasattr(value, "utctimetuple"):
        return format_date(value.utctimetuple())
    if hasattr(value, "timetuple"):
        return format_date(value.timetuple())
    return format_date(time.gmtime(value) if isinstance(value, (int, float)) else value)


def parse_date(text: str) -> Optional[float]:
    """An HTTP date in any of its three forms (RFC 9110 5.6.7) -> a timestamp; else None."""
    from email.utils import mktime_tz, parsedate_tz
    try:
        return mktime_tz(parsedate_tz(text))  # type: ignore[arg-type]
    except (TypeError, ValueError, IndexError, OverflowError):
        return None


def html_escape(text: str) -> str:
    """Make text safe in HTML, also in a quoted attribute: "<a>" -> "&lt;a&gt;"."""
    if "&" in text or "<" in text or ">" in text or '"' in text or "'" in text:
        return (text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
                .replace('"', "&quot;").replace("'", "&#039;"))
    return text  # FAST: most has none of them, and "in" costs half of "replace"


def json_default(value: object) -> object:
    """What JSON has no form for: date and time as ISO 8601, UUID and Decimal as text."""
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if type(value).__name__ in ("UUID", "Decimal"):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def json_dumps(value: object) -> str:
    """A value -> JSON text. Raises TypeError or ValueError (NaN has no JSON form either)."""
    return json_encoder()(value)


@lru_cache(maxsize=8)
def json_encoder(**options: Any) -> Callable[[object], str]:
    """By json.dumps' options."""
    import json
    return json.JSONEncoder(**{"default": json_default, "allow_nan": False, **options}).encode


@lru_cache(maxsize=None)
def json_decoder() -> Callable[[str], Any]:
    import json
    return json.JSONDecoder(parse_constant=refuse_constant).decode


def json_loads(text: Union[str, bytes]) -> Any:
    """JSON text, UTF-8 if bytes, -> the value. ValueError, also for NaN and endless nesting."""
    try:
        return json_decoder()(text.decode("utf-8") if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError("JSON nested too deep") from None


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


# === 3. Headers and multidicts ================================================
# Fields of a message and of a form: several values a name, the last one counts. Whatever leaves is
# validated here, whoever set it (RFC 9110 5.5; response splitting is what it prevents).

TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")  # what no field value and no reason may hold


@lru_cache(maxsize=256)
def check_field_name(name: object) -> str:
    """A header name -> the same in Title-Case, "_" as "-". Raises ValueError."""
    if not isinstance(name, str) or not TOKEN.fullmatch(name):
        raise ValueError(f"bad header name {name!r}")
    return name.replace("_", "-").title()


def check_field_value(value: object) -> str:
    """A header value -> str. None is "", bytes are UTF-8. ValueError on control characters."""
    text = value if isinstance(value, str) else (
        "" if value is None else value.decode("utf-8") if isinstance(value, bytes) else str(value))
    if CONTROL.search(text):
        raise ValueError(f"control character in header value {text!r}")
    if not text.isascii():
        text.encode("utf-8")  # UnicodeEncodeError is a ValueError
    return text


class MultiDict(MutableMapping):
    """A dict with several values a name: `d[k]` is the last, `d[k] = v` adds one."""

    _key = staticmethod(lambda key: key)  # what a name is kept under

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.dict: Dict[str, list] = {}
        if args or kwargs:
            for key, value in dict(*args, **kwargs).items():
                self[key] = value

    def __len__(self) -> int:
        return len(self.dict)

    def __iter__(self) -> Iterator[str]:
        return iter(self.dict)

    def __contains__(self, key: object) -> bool:
        return self._key(key) in self.dict

    def __getitem__(self, key: str) -> Any:
        return self.dict[self._key(key)][-1]

    def __setitem__(self, key: str, value: object) -> None:
        self.append(key, value)

    def __delitem__(self, key: str) -> None:
        del self.dict[self._key(key)]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.dict!r}>"

    def append(self, key: str, value: object) -> None:
        self.dict.setdefault(self._key(key), []).append(value)

    def replace(self, key: str, value: object) -> None:
        self.dict[self._key(key)] = [value]

    def getall(self, key: str) -> list:
        return self.dict.get(self._key(key)) or []

    def get(self, key, default=None, index=-1, type=None):
        """One value, the last by default; `type` converts it. `default` on any failure."""
        key = self._key(key)
        try:
            value = self.dict[key][index]
            return type(value) if type else value
        except Exception:
            return default

    def allitems(self) -> Iterator[Tuple[str, Any]]:
        """Every (name, value), also the earlier ones."""
        return ((key, value) for key, values in self.dict.items() for value in values)

    getone = get
    getlist = getall
    iterkeys, itervalues, iteritems = Mapping.keys, Mapping.values, Mapping.items
    iterallitems = allitems


class FormsDict(MultiDict):
    """Form fields: `forms.name` is the value, or "" where there is none."""

    def __getattr__(self, name: str) -> object:
        if name[:2] == name[-2:] == "__":
            raise AttributeError(name)
        values = self.dict.get(name)
        return values[-1] if values else ""

    def getunicode(self, name, default=None, encoding=None):
        """Bottle's name for get: everything here is text already."""
        return self.get(name, default)

    def decode(self, encoding=None):
        """Bottle's name for a copy: everything here is text already."""
        return fields_of(self.allitems())


def fields_of(pairs: Iterable[Tuple[str, Any]]) -> FormsDict:
    fields = FormsDict()
    for key, value in pairs:
        fields.dict.setdefault(key, []).append(value)
    return fields


class HeaderDict(MultiDict):
    """Headers to send: names without case, `d[k] = v` replaces. ValueError on bad characters."""

    _key = staticmethod(check_field_name)

    def append(self, key: str, value: object) -> None:
        self.dict.setdefault(self._key(key), []).append(check_field_value(value))

    def replace(self, key: str, value: object) -> None:
        self.dict[self._key(key)] = [check_field_value(value)]

    __setitem__ = replace

    def filter(self, names: Iterable[str]) -> None:
        """Remove these."""
        for name in names:
            self.dict.pop(self._key(name), None)


def header_property(name: str, read: Callable = str, default: Any = "",
                    write: Optional[Callable] = None) -> property:
    """An attribute that stands for a header in `self.headers`."""
    def get(self: Any) -> Any:
        value = self.headers.get(name)
        return default if value is None else read(value)

    def put(self: Any, value: object) -> None:
        self.headers[name] = write(value) if write else value
    return property(get, put)


CGI_KEYS = ("CONTENT_TYPE", "CONTENT_LENGTH")


def environ_key(name: str) -> str:
    """"X-A" -> "HTTP_X_A", "Content-Type" -> "CONTENT_TYPE" (PEP 3333)."""
    key = name.replace("-", "_").upper()
    return key if key in CGI_KEYS else "HTTP_" + key


class WSGIHeaderDict(Mapping):
    """The request's headers, read from `environ`: names without case, values as text."""

    def __init__(self, environ: Dict[str, Any]) -> None:
        self.environ = environ

    def raw(self, name: str, default: Optional[str] = None) -> Optional[str]:
        """The value as the server gave it, bytes as latin-1."""
        return self.environ.get(environ_key(name), default)

    def __getitem__(self, name: str) -> str:
        return wsgi_to_text(self.environ[environ_key(name)], "replace")

    def __contains__(self, name: object) -> bool:
        return environ_key(str(name)) in self.environ

    def __iter__(self) -> Iterator[str]:
        for key in self.environ:
            if key[:5] == "HTTP_" or key in CGI_KEYS:
                yield key.replace("HTTP_", "", 1).replace("_", "-").title()

    def __len__(self) -> int:
        return sum(1 for _ in self)


# === 4. HTTP/1.1 codec ========================================================
# Bytes to a WSGI environ and an answer to bytes (RFC 9112, PEP 3333). No socket, no clock. It
# refuses what two parsers could read in two ways, since that is request smuggling (RFC 9112 11.2):
# each header line is matched as a whole, so that nothing is skipped, and every number by a regex,
# since int() also takes "+5", "0x5", "5_0" and digits of other scripts.

FIELD_LINE = re.compile(r"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):([^\x00-\x08\x0a-\x1f\x7f]*)")
REQUEST_LINE = re.compile(r"([!#$%&'*+\-.^_`|~0-9A-Za-z]{1,20}) ([!-~\x80-\xff]+) "
                          r"(HTTP/[0-9]\.[0-9])")
HOST = re.compile(r"(?:[A-Za-z0-9._~%-]+|\[[0-9A-Fa-f:.]+\])?(?::[0-9]{0,5})?")
ABSOLUTE = r"(?i:https?)://([^/?#]+)(/[^?#]*)?(?:\?([^#]*))?"
LENGTH = re.compile(r"[0-9]{1,19}")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[^\x00-\x08\x0a-\x1f\x7f]{0,230})?\r\n")
BARE_LF = rb"(?<!\r)\n"
STATUS = re.compile(r"[2-9][0-9][0-9] [\t\x20-\x7e\x80-\xff]*")

MAX_MEMO = 2000             # lines remembered: header lines repeat from request to request
MAX_BEGUN = 200             # environs remembered, of 2 KB each
MAX_MEMO_CHARS = 300        # longer ones do not
MAX_CHUNK_LINE_BYTES = 256  # a size and extensions, which are dropped
MAX_TRAILERS = 32

# RFC 9112 6.3, RFC 9110 7.2 and 8.3: twice the same of these is two requests in one.
SINGLE = frozenset(("CONTENT_LENGTH", "HTTP_TRANSFER_ENCODING", "HTTP_HOST", "CONTENT_TYPE"))
SECRET = frozenset(("HTTP_COOKIE", "HTTP_AUTHORIZATION", "HTTP_PROXY_AUTHORIZATION"))
# RFC 9110 6.5.1: framing, routing, conditions, credentials and content have no place in a trailer.
NO_TRAILER = SINGLE | SECRET | frozenset((
    "HTTP_CACHE_CONTROL", "HTTP_EXPECT", "HTTP_MAX_FORWARDS", "HTTP_PRAGMA", "HTTP_RANGE",
    "HTTP_TE", "HTTP_TRAILER", "HTTP_CONNECTION", "HTTP_CONTENT_ENCODING", "HTTP_CONTENT_RANGE",
    "HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH", "HTTP_IF_RANGE", "HTTP_IF_MODIFIED_SINCE",
    "HTTP_IF_UNMODIFIED_SINCE", "HTTP_SET_COOKIE"))

DROPPED = ""                # the environ key under which names with "_" end: they are no header
# The environ key that marks a request with a body, or that asks something of its connection: FAST,
# one question instead of six. Lines of these names are not remembered, but for keep-alive.
SPECIAL = "minibottle.special"
SPECIAL_FIELDS = frozenset(("CONTENT_LENGTH", "HTTP_TRANSFER_ENCODING", "HTTP_EXPECT",
                            "HTTP_CONNECTION", DROPPED))

field_lines: Dict[str, Field] = {}       # a header line, checked -> (environ key, value)
field_names: Dict[str, str] = {}         # a header name, checked -> its environ key
known_field = field_lines.get


class Template(dict):
    """The part of the environ that all requests to a listener share."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.begun: Dict[str, dict] = {}  # a request line -> the environ with what it says

    def begin(self, line: str) -> Dict[str, Any]:
        """The environ of a request that has this request line; to be copied."""
        made = {**self, **parse_request_line(line)}
        if made["SERVER_PROTOCOL"] != "HTTP/1.1" or made["REQUEST_URI"][0] != "/":
            made[SPECIAL] = True
        if len(line) < MAX_MEMO_CHARS:
            remember(self.begun, line, made, MAX_BEGUN)
        return made


def remember(memo: dict, key: object, value: object, most: int = MAX_MEMO) -> None:
    """Keep it. A full memo begins again, so that nobody can fill it with rubbish for good."""
    if len(memo) >= most:
        memo.clear()
    memo[key] = value


def parse_head(text: str, template: Template, max_headers: int = 100) -> Dict[str, Any]:
    """The head of a request without its last CRLF CRLF -> `template` and what the head says.

    `text` is latin-1. PATH_INFO is percent-decoded. Raises BadRequest.
    """
    lines = text.split("\r\n")
    if len(lines) > max_headers + 1:
        raise BadRequest(f"over {max_headers} headers (max_headers)", 431)
    line = lines.pop(0)
    environ = (template.begun.get(line) or template.begin(line)).copy()
    for line in lines:  # FAST: a memo of checked lines, 0.3 of the time of matching each
        name, value = known_field(line) or learn_field(line, environ)
        environ[name] = value if name not in environ else join_field(name, environ[name], value)
    if "HTTP_HOST" not in environ and environ["SERVER_PROTOCOL"] == "HTTP/1.1":
        raise BadRequest("no Host header")  # RFC 9112 3.2
    if SPECIAL in environ and environ["REQUEST_URI"][0] != "/":
        parse_other_target(environ, environ["REQUEST_URI"])
    return environ


def parse_request_line(line: str) -> Dict[str, Any]:
    """"GET /a?b HTTP/1.1" -> {"REQUEST_METHOD": "GET", "PATH_INFO": "/a", ...}. RFC 9112 3."""
    match = REQUEST_LINE.fullmatch(line)
    if not match:
        raise BadRequest(f"bad request line {line[:80]!a}")
    method, target, protocol = match.groups()
    if protocol not in ("HTTP/1.1", "HTTP/1.0"):
        raise BadRequest(f"{protocol} is not supported, HTTP/1.1 is", 505)
    if method == "CONNECT":
        raise BadRequest("CONNECT is not supported", 501)
    path, _, query = target.partition("?")
    parts = {"REQUEST_METHOD": method, "REQUEST_URI": target,
             "PATH_INFO": percent_decode(path).decode("latin-1") if "%" in path else path,
             "QUERY_STRING": query, "SERVER_PROTOCOL": protocol}
    if "#" in target or "\0" in parts["PATH_INFO"]:
        raise BadRequest(f"fragment or NUL in request target {target[:80]!a}")
    return parts


def parse_other_target(environ: Dict[str, Any], target: str) -> None:
    """A target that does not begin with "/" (RFC 9112 3.2.2 and 3.2.4), into `environ`."""
    if target == "*" and environ["REQUEST_METHOD"] == "OPTIONS":
        return
    match = re.fullmatch(ABSOLUTE, target)
    if not match:
        raise BadRequest(f"bad request target {target[:80]!a}")
    authority, path, query = match.groups()
    if not HOST.fullmatch(authority) or authority[0] == ":":
        raise BadRequest(f"bad host {authority[:80]!a}")
    environ["HTTP_HOST"] = authority  # RFC 9112 3.2.2: it beats the Host header
    environ["PATH_INFO"] = percent_decode(path or "/").decode("latin-1")
    environ["QUERY_STRING"] = query or ""


def learn_field(line: str, environ: Dict[str, Any]) -> Field:
    """A header line that is not in the memo: parsed, remembered if it may be, or marked."""
    name, value = field = parse_field_line(line)
    if name in SPECIAL_FIELDS and (name != "HTTP_CONNECTION" or value.lower() != "keep-alive"):
        environ[SPECIAL] = True
    elif len(line) < MAX_MEMO_CHARS and name not in SECRET:
        remember(field_lines, line, field)
    return field


def parse_field_line(line: str) -> Field:
    """"Content-Type:  a/b " -> ("CONTENT_TYPE", "a/b"). Raises BadRequest with the cause."""
    match = FIELD_LINE.fullmatch(line)
    if not match:
        raise BadRequest(f"{explain_field_line(line)} in header line {line[:60]!a}")
    given, value = match.groups()
    name = field_names.get(given) or learn_name(given)
    if name is DROPPED:
        return DROPPED, given
    value = value.strip(" \t")
    if name == "HTTP_HOST" and not HOST.fullmatch(value):
        raise BadRequest(f"bad host {value[:80]!a}")
    return name, value


def learn_name(name: str) -> str:
    """"X-A" -> "HTTP_X_A". X_A is DROPPED: it would be the same, past a proxy's check."""
    if "_" in name:
        return DROPPED
    key = environ_key(name)
    if len(name) < MAX_MEMO_CHARS:
        remember(field_names, name, key)
    return key


def explain_field_line(line: str) -> str:
    """Why a line is no header line."""
    name, colon, _ = line.partition(":")
    if line[:1] in (" ", "\t"):
        return "folding or leading white space"  # RFC 9112 5.2
    if CONTROL.search(line):
        return "control character"
    if not colon:
        return "no colon"
    return "white space before the colon" if name.rstrip(" \t") != name else "bad name"


def join_field(name: str, first: str, second: str) -> str:
    """The value of a header that came twice. RFC 9110 5.3, RFC 6265 5.4 for cookies."""
    if name in SINGLE:
        raise BadRequest(f"more than one {name.replace('HTTP_', '').replace('_', '-').title()}")
    return first + ("; " if name == "HTTP_COOKIE" else ", ") + second


def check_incomplete_head(data: bytes, max_request_line: int, max_header_bytes: int) -> None:
    """Raise BadRequest as soon as what has come of a head can become no good one."""
    line, end, rest = data.partition(b"\r\n")
    if re.search(BARE_LF, data):
        raise BadRequest("line ended by LF without CR")
    if len(line) > max_request_line:
        raise BadRequest(f"request line over {max_request_line} bytes (max_request_line)", 414)
    if end:
        parse_request_line(line.decode("latin-1"))
    elif data[:1] not in (b"", b"\r") and not TOKEN.match(data[:1].decode("latin-1")):
        raise BadRequest("this is no HTTP request")  # TLS on a plain port, for one
    if len(rest) > max_header_bytes:
        raise BadRequest(f"header over {max_header_bytes} bytes (max_header_bytes)", 431)


def parse_framing(environ: Dict[str, Any]) -> int:
    """The length of the request's body in bytes, -1 if it is chunked. RFC 9112 6.1 and 6.3."""
    coding = environ.get("HTTP_TRANSFER_ENCODING")
    length = environ.get("CONTENT_LENGTH")
    if coding is None:
        if length is None:
            return 0
        if not LENGTH.fullmatch(length):
            raise BadRequest(f"bad Content-Length {length[:80]!a}")
        return int(length)
    if length is not None:
        raise BadRequest("both Transfer-Encoding and Content-Length")
    if environ["SERVER_PROTOCOL"] == "HTTP/1.0":
        raise BadRequest("Transfer-Encoding in HTTP/1.0")
    codings = [part.strip(" \t").lower() for part in coding.split(",")]
    if not coding.isascii() or codings.count("chunked") != 1 or codings[-1] != "chunked":
        raise BadRequest(f"Transfer-Encoding {coding[:80]!a} does not end in chunked")
    if len(codings) > 1:
        raise BadRequest(f"Transfer-Encoding {coding[:80]!a}: only chunked is supported", 501)
    return -1


NEED_DATA = b""  # what a piece is while `buf` is empty


def iter_counted(buf: bytearray, length: int) -> Decoder:
    """Decode a body of `length` bytes from `buf`: its pieces as they come, NEED_DATA between."""
    while length:
        piece = bytes(buf[:length])
        del buf[:length]
        length -= len(piece)
        yield piece


def iter_chunked(buf: bytearray, max_body: int) -> Decoder:
    """Decode a chunked body from `buf` (RFC 9112 7.1): its pieces as they come, NEED_DATA between.

    Bytes after the body stay in `buf`. Raises BadRequest.
    """
    left = max_body
    while True:
        data = take_chunks(buf, left)  # FAST: those that are all here, 6 times as fast
        left -= len(data)
        if data:
            yield data
        line = yield from take_line(buf)
        match = CHUNK_LINE.fullmatch(line)
        if not match:
            raise BadRequest(f"bad chunk size {line[:40]!a}")
        size = int(match[1], 16)
        left -= size
        if left < 0:
            raise BadRequest(f"body over {max_body} bytes (max_body)", 413)
        if not size:
            break
        yield from iter_counted(buf, size)
        while len(buf) < 2:
            yield NEED_DATA
        if buf[:2] != b"\r\n":
            raise BadRequest("chunk without its CRLF")
        del buf[:2]
    for _ in range(MAX_TRAILERS + 1):  # RFC 9112 7.1.2: trailers may be dropped
        line = yield from take_line(buf)
        if line == b"\r\n":
            return
        name, _ = parse_field_line(line[:-2].decode("latin-1"))
        if name in NO_TRAILER:
            raise BadRequest(f"{line[:60]!a} in a trailer")
    raise BadRequest(f"over {MAX_TRAILERS} trailers", 431)


def take_chunks(buf: bytearray, most: int) -> bytes:
    """Take the chunks off the start of `buf` that are there whole and together fit in `most`."""
    data, pieces, taken = bytes(buf), [], 0
    match = CHUNK_LINE.match(data)
    while match:
        start = match.end()
        end = start + int(match[1], 16)
        most -= end - start
        if end == start or most < 0 or data[end:end + 2] != b"\r\n":
            break
        pieces.append(data[start:end])
        taken = end + 2
        match = CHUNK_LINE.match(data, taken)
    del buf[:taken]
    return b"".join(pieces)


def take_line(buf: bytearray) -> Generator[bytes, None, bytes]:
    """Take one line with its CRLF off `buf`; raise BadRequest past MAX_CHUNK_LINE_BYTES."""
    while b"\n" not in buf[:MAX_CHUNK_LINE_BYTES]:
        if len(buf) >= MAX_CHUNK_LINE_BYTES:
            raise BadRequest(f"chunk line over {MAX_CHUNK_LINE_BYTES} bytes")
        yield NEED_DATA
    end = buf.index(b"\n") + 1
    line = bytes(buf[:end])
    del buf[:end]
    if line[-2:] != b"\r\n":
        raise BadRequest("chunk line ended by LF without CR")
    return line


def frame_chunk(piece: bytes) -> bytes:
    """b"Wiki" -> b"4\\r\\nWiki\\r\\n"; b"" is no chunk, as it would end the body."""
    return b"%x\r\n%b\r\n" % (len(piece), piece) if piece else b""


LAST_CHUNK = b"0\r\n\r\n"

length_lines: Dict[int, bytes] = {}


def format_length(size: int) -> bytes:
    """12 -> b"Content-Length: 12\\r\\n"."""
    line = b"Content-Length: %d\r\n" % size
    remember(length_lines, size, line)
    return line

# What a header of an answer is to the server.
PLAIN, BODY_LENGTH, OURS, HOP_BY_HOP = range(4)
KINDS = {"content-length": BODY_LENGTH, "date": OURS, "server": OURS}
KINDS.update(dict.fromkeys(("connection", "keep-alive", "proxy-authenticate", "te", "trailer",
                            "proxy-authorization", "trailers", "transfer-encoding", "upgrade",
                            "proxy-connection"), HOP_BY_HOP))  # RFC 9110 7.6.1, PEP 3333
answer_lines: Dict[Tuple[str, str], Tuple[bytes, int]] = {}  # a header of an answer, checked
known_answer = answer_lines.get
statuses: Dict[str, bool] = {}                               # a status, checked -> has no body


def format_field(field: Tuple[str, str]) -> Tuple[bytes, int]:
    """("Allow", "GET") -> (b"Allow: GET\\r\\n", PLAIN), of PEP 3333's kind of strings.

    Raises TypeError and ValueError: it is the application that made it.
    """
    try:
        name, value = field
    except (TypeError, ValueError):
        raise TypeError(f"a header is a (name, value), not {field!a}") from None
    if type(name) is not str or type(value) is not str:
        raise TypeError(f"header name and value must be str, not {field!a}")
    if not TOKEN.fullmatch(name):
        raise ValueError(f"bad header name {name!a}")
    if CONTROL.search(value):
        raise ValueError(f"control character in header {name}: {value!a}")
    kind = KINDS.get(name.lower(), PLAIN)
    if kind == BODY_LENGTH and not LENGTH.fullmatch(value):
        raise ValueError(f"bad Content-Length {value!a}")
    made = f"{name}: {value}\r\n".encode("latin-1"), kind
    if len(value) < MAX_MEMO_CHARS and name[:10] != "Set-Cookie":
        remember(answer_lines, field, made)
    return made


def check_status(status: str) -> bool:
    """"200 OK" -> False, "304 Not Modified" -> True: has it no body? TypeError, ValueError."""
    if not isinstance(status, str):
        raise TypeError(f"a status is a str such as '200 OK', not {status!r}")
    if not STATUS.fullmatch(status):
        raise ValueError(f"bad status {status!a}")
    bodiless = status[:3] in ("204", "304")
    remember(statuses, status, bodiless)
    return bodiless


def format_error(error: BadRequest) -> Tuple[str, bytes]:
    """An answer for the server's own errors: (the status, a line of plain text that says why)."""
    line = f"{error.status} {HTTP_CODES.get(error.status, 'Error')}"
    return line, f"{line}: {error}\n".encode("utf-8", "replace")


# === 5. Forms and cookies =====================================================
# Fields and files out of text and bytes, each in one pass; cookies in and out, signed ones too.
# Text is UTF-8, whatever a part says of its charset; wrong bytes become U+FFFD.

def parse_qsl(text: str, max_fields: int = 0) -> List[Tuple[str, str]]:
    """"a=1&b=x+y&c" -> [("a", "1"), ("b", "x y"), ("c", "")]. Only & separates.

    Raises BadRequest (413) over `max_fields` (0: no limit), before anything is split.
    """
    if max_fields and text.count("&") >= max_fields:
        raise BadRequest(f"over {max_fields} form fields (max_fields)", 413)
    pairs = []
    plain = "%" not in text and "+" not in text
    for part in text.split("&"):
        if part:
            name, _, value = part.partition("=")
            pairs.append((name, value) if plain else (unquote_field(name), unquote_field(value)))
    return pairs


def unquote_field(text: str) -> str:
    """"x+%C3%B6" -> "x ö"."""
    text = text.replace("+", " ")
    return percent_decode(text).decode("utf-8", "replace") if "%" in text else text


def parse_options(header: str, escape: str = r"\\(.)",
                  char: str = r"\1") -> Tuple[str, Dict[str, str]]:
    """'text/html; Charset="a"' -> ("text/html", {"charset": "a"}), one pass."""
    options = {name.lower(): plain or re.sub(escape, char, quoted)
               for name, quoted, plain in re.findall(OPTION, header)}
    return header.partition(";")[0].strip(" \t").lower(), options


OPTION = r";[ \t]*([!#$%&'*+\-.^_`|~0-9A-Za-z]+)=(?:\"((?:[^\"\\]|\\.)*)\"|([^;\"]*))"


def parse_auth(header: str) -> Optional[Tuple[str, str]]:
    """"Basic QTpi" -> ("A", "b") (RFC 7617); None for what is anything else."""
    from binascii import a2b_base64
    scheme, _, data = header.strip().partition(" ")
    try:
        user, colon, password = a2b_base64(data).decode("utf-8").partition(":")
    except ValueError:
        return None
    return (user, password) if colon and scheme.lower() == "basic" else None


# -- multipart/form-data (RFC 7578, RFC 2046 5.1) --

MAX_PART_HEAD_BYTES = 8192
MAX_PART_HEADERS = 16
BOUNDARY = r"[ -~]{0,69}[!-~]"  # RFC 2046 5.1.1: 1 to 70 characters
PIECE_BYTES = 1 << 18
CUT_FORM = "multipart body without its last boundary"


def iter_parts(data: Union[bytes, mmap.mmap],
               boundary: str) -> Iterator[Tuple[HeaderDict, int, int]]:
    """Of each part of a form its headers, and where in `data` its body begins and ends. What is
    before the first part and after the last means nothing.
    """
    delimiter = b"\r\n--" + boundary.encode("latin-1")  # the line end before it belongs to it,
    first = data[:len(delimiter) - 2] == delimiter[2:]    # but the first may have none
    at = -2 if first else find_in(data, delimiter, 0)
    while data[at + len(delimiter):at + len(delimiter) + 2] != b"--":
        at += len(delimiter)
        end = data.find(b"\r\n\r\n", at, at + MAX_PART_HEAD_BYTES)
        if end < 0:
            raise BadRequest(f"headers of a part over {MAX_PART_HEAD_BYTES} bytes"
                             if at + MAX_PART_HEAD_BYTES <= len(data) else CUT_FORM)
        headers, start = parse_part_head(data[at:end]), end + 4
        at = find_in(data, delimiter, start)
        yield headers, start, at


def find_in(data: Union[bytes, mmap.mmap], delimiter: bytes, start: int) -> int:
    at = data.find(delimiter, start)
    if at < 0:
        raise BadRequest(CUT_FORM)
    return at


def parse_part_head(head: bytes) -> HeaderDict:
    """b'\\r\\nContent-Disposition: form-data; name="a"' -> HeaderDict. Raises BadRequest."""
    text = re.sub(r"\r\n[ \t]+", " ", head.decode("utf-8", "replace"))  # folded, as RFC 2046 may
    padding, *lines = text.split("\r\n")
    if padding.strip(" \t"):
        raise BadRequest(f"multipart boundary followed by {padding[:40]!a}")
    if len(lines) > MAX_PART_HEADERS:
        raise BadRequest(f"over {MAX_PART_HEADERS} headers in a part")
    headers = HeaderDict()
    for line in lines:
        match = FIELD_LINE.fullmatch(line)
        if not match:
            raise BadRequest(f"{explain_field_line(line)} in line {line[:60]!a} of a part")
        headers.append(match[1], match[2].strip(" \t"))
    return headers


def datetime_of(text: str) -> Any:
    """An HTTP date -> datetime, in UTC; None for what is none."""
    from datetime import datetime, timezone
    seconds = parse_date(text)
    return None if seconds is None else datetime.fromtimestamp(seconds, timezone.utc)


def parse_length(text: str) -> int:
    """"5" -> 5; -1 for what is no length."""
    return int(text) if LENGTH.fullmatch(text) else -1


class FileUpload:
    """A file of a form: `.file` is open for reading and closed when the request ends."""

    def __init__(self, file: Any, name: Optional[str], filename: Union[str, bytes, None],
                 headers: Any = None) -> None:
        self.file = file              # BytesIO, or a FilePart behind a buffer
        self.name = name              # of the form's field
        self.raw_filename = filename  # as the client sent it: never use it as a path
        self.headers = headers if isinstance(headers, HeaderDict) else HeaderDict(headers or {})

    content_type = header_property("Content-Type")
    content_length = header_property("Content-Length", parse_length, -1)

    def get_header(self, name: str, default: Optional[str] = None) -> Optional[str]:
        return self.headers.get(name, default)

    def close(self) -> None:
        self.file.close()

    def _last_segment(self) -> str:
        name = self.raw_filename or ""
        name = name.decode("utf-8", "replace") if isinstance(name, bytes) else name
        return name.replace("\\", "/").rpartition("/")[2]

    @cached_property
    def filename(self) -> str:
        """The name in ASCII letters, digits, ".", "-" and "_": "../Ä b.txt" -> "A-b.txt"."""
        from unicodedata import normalize
        name = normalize("NFKD", self._last_segment()).encode("ascii", "ignore").decode("ascii")
        name = re.sub(r"[^a-zA-Z0-9_.\s-]", "", name).strip()
        return re.sub(r"[-\s]+", "-", name).strip(".-")[:255] or "empty"

    @cached_property
    def safe_filename(self) -> str:
        """The name in any script, without what a file system minds: "../Ä b.txt" -> "Ä b.txt"."""
        name = "".join(char for char in self._last_segment()
                       if char.isprintable() and char not in '<>:"|?*').strip(". ")
        if re.fullmatch(DEVICE_NAME, name, re.IGNORECASE):
            name = "_" + name
        return name.encode("utf-8")[:255].decode("utf-8", "ignore").strip(". ") or "empty"

    def save(self, destination: Any, overwrite: bool = False, chunk_size: int = 1 << 16) -> None:
        """Write it to a path, into a directory (as `filename`) or to an open file.

        OSError where a file is there already, unless `overwrite`.
        """
        if hasattr(destination, "write"):
            return self._copy_to(destination, chunk_size)
        if os.path.isdir(destination):
            destination = os.path.join(destination, self.filename)
        with open(destination, "wb" if overwrite else "xb") as file:
            self._copy_to(file, chunk_size)

    def _copy_to(self, file: Any, chunk_size: int) -> None:
        start = self.file.tell()
        for piece in iter(partial(self.file.read, chunk_size), b""):
            file.write(piece)
        self.file.seek(start)


DEVICE_NAME = r"(con|prn|aux|nul|com[0-9]|lpt[0-9])[ .]*(\..*)?"  # files of Windows, anywhere


class FilePart(io.RawIOBase):
    """Some bytes of a mapped file, as a file: an upload is not copied out of a large body."""

    def __init__(self, data: mmap.mmap, start: int, end: int) -> None:
        self.data = data
        self.start = start
        self.end = end
        self.at = start

    def readable(self) -> bool:
        return True

    seekable = readable

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = max(self.start, offset + (self.start, self.at, self.end)[whence])
        return self.at - self.start

    def readinto(self, buffer: Any) -> int:
        piece = self.data[self.at:min(self.at + len(buffer), self.end)]
        buffer[:len(piece)] = piece
        self.at += len(piece)
        return len(piece)


def parse_disposition(header: str) -> Tuple[str, str]:
    """'form-data; name="a"; filename="b.txt"' -> ("a", "b.txt"); "" for a field of text."""
    kind, options = parse_options(header, r'\\"|%22', '"')  # browsers escape " alone
    if kind not in ("form-data", "file") or "name" not in options:
        raise BadRequest("a part without Content-Disposition: form-data and a name")
    filename = options.get("filename", "")
    if "filename*" in options:  # RFC 8187: "UTF-8''%C3%84.txt"
        encoded = options["filename*"].rpartition("'")[2]
        filename = percent_decode(encoded).decode("utf-8", "replace")
    return options["name"], filename


def read_multipart(body: BinaryIO, boundary: str, limits: Settings) -> FormsDict:
    """The fields and files of a form. Raises BadRequest, 413 for each limit."""
    fields, count, files, text_left = FormsDict(), 0, 0, limits.max_form_memory
    body.seek(0)  # what was written last is in the file then
    data = (body.getvalue() if isinstance(body, io.BytesIO) else
            mmap.mmap(body.fileno(), 0, access=mmap.ACCESS_READ))
    for headers, start, end in iter_parts(data, boundary):
        name, filename = parse_disposition(headers.get("Content-Disposition", ""))
        count += 1
        files += bool(filename)
        text_left -= 0 if filename else end - start
        if count > limits.max_fields:
            raise BadRequest(f"over {limits.max_fields} form fields (max_fields)", 413)
        if files > limits.max_files:
            raise BadRequest(f"over {limits.max_files} files in a form (max_files)", 413)
        if text_left < 0:
            raise BadRequest(
                f"form fields over {limits.max_form_memory} bytes (max_form_memory)", 413)
        if not filename:
            fields.append(name, data[start:end].decode("utf-8", "replace"))
        else:
            file = (io.BytesIO(data[start:end]) if isinstance(data, bytes) else
                    io.BufferedReader(FilePart(data, start, end)))
            fields.append(name, FileUpload(file, name, filename, headers))
    return fields


def copy_body(read: Callable[[int], bytes], left: int, threshold: int) -> BinaryIO:
    """At most so many bytes, in memory, or in a temporary file where they are over `threshold`."""
    copy: BinaryIO = io.BytesIO()
    while left > 0:
        piece = read(left if left < PIECE_BYTES else PIECE_BYTES)
        if not piece:
            break
        left -= len(piece)
        copy = spool(copy, piece, threshold)
    return copy


def read_chunked(file: BinaryIO, max_body: int) -> Iterator[bytes]:
    """What a chunked body holds, read by the line and so never past its end."""
    buf = bytearray()
    last = iter((b"\r\n",))  # the empty line at the end is often forgotten
    for piece in iter_chunked(buf, max_body):
        if piece:
            yield piece
        else:
            line = file.readline(PIECE_BYTES) or next(last, b"")
            if not line:
                raise BadRequest("the body ends within a chunk")
            buf += line


def spool(file: BinaryIO, piece: bytes, threshold: int) -> BinaryIO:
    """Write `piece` to `file`, which becomes a temporary one above `threshold` bytes; return it."""
    if type(file) is io.BytesIO and file.tell() + len(piece) > threshold:
        import tempfile
        memory, file = file, tempfile.TemporaryFile()
        file.write(memory.getvalue())
    file.write(piece)
    return file


# -- cookies (RFC 6265) --

def parse_cookies(header: str) -> List[Tuple[str, str]]:
    """"a=1; b=\\"x\\"" -> [("a", "1"), ("b", "x")] (RFC 6265 5.4). A bad pair is left out."""
    pairs = []
    for part in header.split(";"):
        name, equals, value = part.partition("=")
        name, value = name.strip(" \t"), value.strip(" \t")
        if not equals or not name:
            continue
        if len(value) > 1 and value[0] == value[-1] == '"':
            value = re.sub(COOKIE_ESCAPE, unescape_cookie, value[1:-1].encode("utf-8")).decode(
                "utf-8", "replace")
        pairs.append((name, value))
    return pairs


COOKIE_ESCAPE = rb"\\(?:([0-3][0-7][0-7])|(.))"  # as http.cookies quotes


def unescape_cookie(match: Match) -> bytes:
    return bytes((int(match[1], 8),)) if match[1] else match[2]


COOKIE_VALUE = re.compile(r"[!#-+\--:<-\[\]-~]*")  # RFC 6265 4.1.1, without quotes
COOKIE_ATTRIBUTE = r"[ -:<-~]*"
COOKIE_OPTIONS = {"domain": "Domain", "path": "Path", "max_age": "Max-Age", "expires": "expires",
                  "secure": "Secure", "httponly": "HttpOnly", "samesite": "SameSite",
                  "partitioned": "Partitioned"}
COOKIE_ALIASES = {"maxage": "max_age", "same_site": "samesite"}
MAX_COOKIE_CHARS = 3800  # browsers drop one over 4,096 with its attributes


def format_cookie(name: str, value: str, options: Dict[str, object]) -> str:
    """("a", "x", {"path": "/"}) -> "a=x; Path=/". `options` as parse_cookie_options gives them."""
    if not TOKEN.fullmatch(name):
        raise CookieError(f"bad cookie name {name!r}")
    if not isinstance(value, str):
        raise TypeError(f"the value of cookie {name} must be str, not {type(value).__name__}")
    if len(name) + len(value) > MAX_COOKIE_CHARS:
        raise CookieError(f"cookie {name} is over {MAX_COOKIE_CHARS} characters")
    if CONTROL.search(value):
        raise CookieError(f"control character in cookie {name}: {value!r}")
    parts = [f"{name}={value if COOKIE_VALUE.fullmatch(value) else quote_cookie(value)}"]
    for key, setting in options.items():
        if key in ("secure", "httponly", "partitioned"):
            parts += [COOKIE_OPTIONS[key]] if setting else []
        elif setting is not None or key == "samesite":
            parts.append(f"{COOKIE_OPTIONS[key]}={format_cookie_option(key, setting)}")
    if "SameSite=None" in parts and "Secure" not in parts:
        raise CookieError(f"cookie {name}: samesite none needs secure, or browsers drop it")
    return "; ".join(parts)


def parse_cookie_options(given: Dict[str, object]) -> Dict[str, object]:
    """{"Max-Age": 5} -> {"max_age": 5}."""
    options: Dict[str, object] = {}
    for name, value in given.items():
        key = name.lower().replace("-", "_")
        key = COOKIE_ALIASES.get(key, key)
        if key not in COOKIE_OPTIONS or key in options:
            raise CookieError(f"unknown or repeated cookie option {name!r}")
        options[key] = value
    return options


def format_cookie_option(key: str, value: Any) -> str:
    if key == "max_age":
        seconds = float(value.total_seconds() if hasattr(value, "total_seconds") else value)
        if not abs(seconds) < 1 << 40:
            raise CookieError(f"bad cookie max_age {value!r}")
        value = int(seconds)
    elif key == "expires":
        value = http_date(value)
    elif key == "samesite":
        value = str(value).capitalize()
        if value not in ("Lax", "Strict", "None"):
            raise CookieError(f"samesite is lax, strict or none, not {value!r}")
    if not re.fullmatch(COOKIE_ATTRIBUTE, str(value)):
        raise CookieError(f"bad character in cookie {key} {value!r}")
    return str(value)


def quote_cookie(value: str) -> str:
    """'a "ö"' -> '"a \\\\"\\\\303\\\\266\\\\""', as http.cookies does."""
    quoted = "".join(char if char == " " or COOKIE_VALUE.fullmatch(char) else
                     "\\" + char if char in '"\\' else
                     "".join(f"\\{byte:03o}" for byte in char.encode("utf-8")) for char in value)
    return f'"{quoted}"'


# A signed cookie is "!", an HMAC-SHA256, "?" and what was signed: [name, value, the second it was
# set], as JSON. So it counts under its own name alone; an age can be asked for when it is read.

SIGNED_COOKIE = r"!([A-Za-z0-9_-]{43}=)\?([A-Za-z0-9_=-]*)"
SIGNED_DEFAULTS = {"path": "/", "httponly": True, "samesite": "lax"}


def cookie_encode(data: object, key: Any) -> str:
    """What has a JSON form -> "!signature?data". `key` is str or bytes, or a list: the first."""
    from base64 import urlsafe_b64encode
    text = urlsafe_b64encode(json_dumps(data).encode("utf-8")).decode("ascii")
    return f"!{sign(text, keys_of(key)[0])}?{text}"


def cookie_decode(data: str, key: Any) -> Any:
    """"!signature?data" -> what was encoded with `key`, or with one of them; None if it was not."""
    from base64 import urlsafe_b64decode
    from hmac import compare_digest
    keys, match = keys_of(key), re.fullmatch(SIGNED_COOKIE, data)
    if match and any([compare_digest(sign(match[2], one), match[1]) for one in keys]):
        return json_loads(urlsafe_b64decode(match[2]))
    return None


def cookie_is_encoded(data: str) -> bool:
    return re.fullmatch(SIGNED_COOKIE, data) is not None


def keys_of(key: Any) -> List[bytes]:
    """"a" -> [b"a"], ["a", b"b"] -> [b"a", b"b"]. ValueError where one is empty."""
    keys = [one.encode("utf-8") if isinstance(one, str) else bytes(one)
            for one in (key if isinstance(key, (list, tuple)) else [key])]
    if not keys or not all(keys):
        raise ValueError("the secret of a signed cookie is empty")
    return keys


def sign(text: str, key: bytes) -> str:
    import hmac
    from base64 import urlsafe_b64encode
    return urlsafe_b64encode(hmac.new(key, text.encode("ascii"), "sha256").digest()).decode("ascii")


# === 6. Async bridge ==========================================================
# Coroutines run on one asyncio loop per process, on a thread of its own that starts with the first
# of them. A request is one coroutine. Where nothing in it awaits, its caller runs it to the end, as
# a function; at the first `await` the rest moves to asyncio.

END: Any = object()  # of an iterator


def do_nothing(*args: object) -> None:
    """What stands for a function that is not there."""


def close_all(*things: object) -> None:
    """Close what of these can be closed."""
    for thing in things:
        getattr(thing, "close", do_nothing)()


class Switch:
    """`await SWITCH`: asyncio runs the coroutine from here on. It is where drive() stops."""

    def __await__(self) -> Generator:
        yield


SWITCH = Switch()
PUMP: ContextVar[Any] = ContextVar("minibottle.pump")  # the task of a request, on our server


async def settle(out: Any) -> Any:
    """What a function returned; if that is awaitable, its result."""
    if not hasattr(out, "__await__"):
        return out
    await SWITCH
    return await out


def drive(steps: Any) -> Any:
    """Run a coroutine: its result, or what is Pending if it awaits."""
    try:
        steps.send(None)
    except StopIteration as done:
        return done.value
    return Pending(steps, copy_context())


class Pending:
    """What a coroutine is still at work on: awaitable. A WSGI server that takes it for a body, and
    iterates over it, waits."""

    __slots__ = ("steps", "context", "result")

    def __init__(self, steps: Any, context: Any) -> None:
        self.steps = steps
        self.context = context
        self.result: Any = None  # of wait()

    def __await__(self) -> Any:
        return self.steps.__await__()

    def as_task(self) -> Any:
        """To be awaited where another context is: it has its own."""
        return self.context.run(bridge.loop.create_task, self.steps)

    def wait(self) -> Any:
        self.result = bridge.wait(self.context, self.steps)
        return self.result

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.wait())

    def close(self) -> None:
        close_all(self.steps, self.result)


class Guest:
    """A coroutine in its own context, in a task with others. Awaited, it tells whether it waited,
    and so wants a task to itself the next time."""

    __slots__ = ("context", "steps", "plan")

    def __init__(self, context: Any, steps: Any, plan: Any) -> None:
        self.context = context
        self.steps = steps
        self.plan = plan

    def __await__(self) -> Any:
        step, sent, waits = self.steps.send, None, False
        while True:
            try:
                wanted = self.context.run(step, sent)
            except StopIteration:
                return waits
            if not waits:
                waits = self.plan.waits = True
                bridge.host()
            try:
                step, sent = self.steps.send, (yield wanted)
            except BaseException as error:
                step, sent = self.steps.throw, error


class Bridge:
    """The asyncio loop of this process."""

    def __init__(self) -> None:
        self.lock = _thread.allocate_lock()
        self.asyncio: Any = None  # the module
        self.loop: Any = None
        self.thread: Any = None
        self.pid = 0              # of the process that has it: a fork does not inherit the thread
        self.inbox: Deque[Tuple[Any, Any]] = deque()
        self.guests: Deque[Guest] = deque()  # FAST: what may well not wait
        self.woken = False

    def start(self) -> Any:
        """The loop; made if there is none."""
        with self.lock:
            if self.pid != os.getpid():
                import asyncio
                new = asyncio.SelectorEventLoop if os.name == "nt" else asyncio.new_event_loop
                self.asyncio, self.loop, self.woken = asyncio, new(), False  # it has add_reader()
                self.thread = threading.Thread(target=self.run, args=(self.loop,), daemon=True,
                                               name="minibottle-asyncio")
                self.thread.start()
                self.pid = os.getpid()
            return self.loop

    def run(self, loop: Any) -> None:
        """A SystemExit ends the task that raises it, and not the thread of all."""
        while True:
            try:
                return loop.run_forever()
            except (SystemExit, KeyboardInterrupt) as error:
                log.error("a task of asyncio wanted to exit", exc_info=error)

    def is_here(self) -> bool:
        """Does the loop run on this thread?"""
        return self.pid == os.getpid() and self.thread is threading.current_thread()

    def spawn(self, context: Any, steps: Any) -> None:
        """Run a coroutine, in a context, from any thread."""
        self.inbox.append((context, steps))
        self.ring()

    def ring(self) -> None:
        """Have asyncio look into the inbox."""
        loop = self.loop if self.pid == os.getpid() else self.start()
        if not self.woken:
            self.woken = True
            loop.call_soon_threadsafe(self.take)

    def take(self) -> None:
        self.woken = False  # first: who appends afterwards looks at it afterwards
        while self.inbox:
            context, steps = self.inbox.popleft()
            context.run(self.loop.create_task, steps)
        self.host()

    def host(self) -> None:
        if self.guests:
            self.loop.create_task(self.run_guests(len(self.guests)))

    async def run_guests(self, count: int) -> None:
        """In one task all that do not wait; with the first that does, the others have another."""
        try:
            while count and self.guests and not await self.guests.popleft():
                count -= 1
        finally:
            self.host()

    def wait(self, context: Any, steps: Any, seconds: Optional[float] = None) -> Any:
        """The result of a coroutine, for a thread that has nothing else to do."""
        loop = self.start()
        if self.is_here():
            steps.close()
            raise RuntimeError("asyncio's own thread cannot wait for a coroutine: await it")
        return context.run(self.asyncio.run_coroutine_threadsafe, steps, loop).result(seconds)

    async def watch(self, kind: str, sock: Any, seconds: float) -> bool:
        """Is a socket ready for its "reader" or "writer", within this time?"""
        ready = self.loop.create_future()
        getattr(self.loop, "add_" + kind)(sock, lambda: ready.done() or ready.set_result(None))
        try:
            return bool((await self.asyncio.wait([ready], timeout=seconds))[0])
        finally:
            getattr(self.loop, "remove_" + kind)(sock)

    def cancel_all(self, seconds: float) -> None:
        """Let what still runs clean up, for at most so long: the process is about to end."""
        async def cancel() -> None:
            tasks = self.asyncio.all_tasks() - {self.asyncio.current_task()}
            for task in tasks:
                task.cancel()
            if tasks:
                await self.asyncio.wait(tasks, timeout=seconds)
            done.set()

        done = threading.Event()
        if self.pid == os.getpid():
            self.spawn(copy_context(), cancel())
            done.wait(4 * seconds)  # a coroutine that blocks does not hold the process


bridge = Bridge()


async def next_async(pieces: Any) -> Any:
    try:
        return await pieces.__anext__()
    except StopAsyncIteration:
        return END


async def pull_aside(out: Any) -> Any:
    """A plain iterable for asyncio. It may block, and be bound to the thread that began it: that is
    one of its own."""
    from concurrent.futures import ThreadPoolExecutor
    crew = ThreadPoolExecutor(1, "minibottle-pieces")
    aside = partial(bridge.loop.run_in_executor, crew, copy_context().run)
    pieces = chain.from_iterable((out,))  # iter(out) is called there too
    step = aside(next, pieces, END)
    try:
        await bridge.asyncio.wait([step])
        while step.result() is not END:
            yield step.result()
            step = aside(next, pieces, END)
            await bridge.asyncio.wait([step])
    finally:
        await bridge.asyncio.wait([step])  # a thread cannot be cancelled: close() would meet it
        await aside(close_all, out)
        crew.shutdown(False)


async def pull_in_task(pieces: Any) -> Any:
    """An asynchronous iterator for who asks for its pieces in several tasks: all of it runs in one,
    as time limits and context variables want that."""
    made = bridge.asyncio.Queue()

    async def pull() -> None:
        try:
            async for piece in pieces:
                made.put_nowait(piece)
                await made.join()  # until the next is wanted
        finally:
            if hasattr(pieces, "aclose"):
                await pieces.aclose()

    task = bridge.asyncio.ensure_future(pull())
    task.add_done_callback(lambda task: made.put_nowait(END))
    try:
        while (piece := await made.get()) is not END:
            yield piece
            made.task_done()
        task.result()
    finally:
        task.cancel()
        await bridge.asyncio.wait([task])


# === 7. Request and Response ==================================================
# Lazy views: a Request of the environ, with what it has worked out kept there under "minibottle."
# keys; a Response of what will be sent. `request` and `response` are the ones of the running
# context, so that threads, generators and tasks each see their own.

CURRENT: ContextVar[Dict[str, Any]] = ContextVar("minibottle.environ")


class EmptyInput(io.BytesIO):
    """wsgi.input of a request without a body; one serves them all, as it stays open and empty."""

    def close(self) -> None:
        pass

    def write(self, data: Any) -> int:
        raise io.UnsupportedOperation("write")


EMPTY_INPUT = EmptyInput()


class kept(property):
    """A property worked out once a request, and kept in its environ."""

    def __init__(self, make: Callable) -> None:
        super().__init__(make, doc=make.__doc__)
        self.key = "minibottle.request." + make.__name__

    def __get__(self, view: Any, kind: Optional[type] = None) -> Any:
        if view is None:
            return self
        environ = view.environ
        if self.key in environ:
            return environ[self.key]
        if view is request:
            view = FoundRequest(environ)
        try:
            value = environ[self.key] = self.fget(view)  # type: ignore[misc]
        except BadRequest as error:  # 400 or 413
            raise HTTPError(error.status, str(error), error) from error
        return value


def from_environ(key: str, read: Callable[[str], Any]) -> Any:
    """An attribute that stands for a text in the environ, "" where there is none."""
    return property(lambda self: read(self.environ.get(key) or ""))


def routed(index: int, key: str) -> Any:
    """What routing found; in an environ that a test makes, what is there under Bottle's key."""
    def read(self: Any) -> Any:
        found = self.environ.get("minibottle.route")
        if found and isinstance(found[4], dict):
            return found[index]
        if key in self.environ:
            return self.environ[key]
        raise RuntimeError("This request is not connected to a route.")
    return property(read)


def method_of(target: str, name: str) -> Any:
    """A method that stands for the one of an attribute: `request.keys()`, `"Etag" in response`."""
    return lambda self, *args: getattr(getattr(self, target), name)(*args)


class Request:
    """One request: `request.path`, `.query`, `.headers`, `.json`, … read from `request.environ`.

    An attribute that you set (`request.user = …`) is kept in the environ, and so seen by all.
    """

    __slots__ = ("environ",)
    environ: Dict[str, Any]
    MEMFILE_MAX = DEFAULTS.max_form_memory  # Bottle's: another value beats the two settings

    def __init__(self, environ: Optional[dict] = None) -> None:
        object.__setattr__(self, "environ", {} if environ is None else environ)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.method} {self.url}>"

    def __getattr__(self, name: str) -> object:
        try:
            return self.environ["bottle.request.ext." + name]
        except KeyError:
            raise AttributeError(f"request has no attribute {name!r}") from None

    def __setattr__(self, name: str, value: object) -> None:
        if name == "environ":
            object.__setattr__(self, name, value)
        elif hasattr(type(self), name):
            raise AttributeError(f"request.{name} is read from the environ, and cannot be set")
        elif "bottle.request.ext." + name in self.environ:
            raise AttributeError(f"attribute {name} is set already; `del request.{name}` first")
        else:
            self.environ["bottle.request.ext." + name] = value

    def __delattr__(self, name: str) -> None:
        self.__getattr__(name)  # raises, where there is none
        del self.environ["bottle.request.ext." + name]

    __getitem__, __iter__, __len__, keys = (method_of("environ", name) for name in (
        "__getitem__", "__iter__", "__len__", "keys"))

    def get(self, key: str, default: object = None) -> object:
        """A value of the environ."""
        return self.environ.get(key, default)

    def __setitem__(self, key: str, value: object) -> None:
        """Change the environ, and forget what was worked out from what was there."""
        self.environ[key] = value
        if key in DESCRIBING or key[:5] == "HTTP_":
            for name in [name for name in self.environ if name.startswith("minibottle.request.")]:
                del self.environ[name]

    def __delitem__(self, key: str) -> None:
        self[key] = ""
        del self.environ[key]

    def copy(self) -> "Request":
        """A request of its own over a copy of the environ, not a deep one."""
        return Request(self.environ.copy())

    def path_shift(self, shift: int = 1) -> None:
        """Move segments from `path` to `script_name`; back, if negative."""
        self["SCRIPT_NAME"], self["PATH_INFO"] = companion("ext").path_shift(
            self.environ.get("SCRIPT_NAME", "/"), self.environ.get("PATH_INFO") or "/", shift)

    # -- the request line --

    method = from_environ("REQUEST_METHOD", lambda text: text.upper() or "GET")
    query_string = from_environ("QUERY_STRING", str)
    remote_addr = from_environ("REMOTE_ADDR", lambda text: text or None)  # the connection's peer

    @property
    def path(self) -> str:
        """The decoded path, always with one leading slash. Wrong UTF-8 shows as U+FFFD."""
        return "/" + wsgi_to_text(self.environ.get("PATH_INFO", ""), "replace").lstrip("/")

    @property
    def script_name(self) -> str:
        """The prefix under which the application is mounted: "/", "/app/"."""
        name = wsgi_to_text(self.environ.get("SCRIPT_NAME", ""), "replace").strip("/")
        return "/" + name + "/" if name else "/"

    fullpath = property(lambda self: self.script_name + self.path.lstrip("/"))

    @property
    def urlparts(self) -> SplitResult:
        """(scheme, host[:port], path, query, ""), the path percent-encoded."""
        from urllib.parse import SplitResult
        environ = self.environ
        scheme = environ.get("wsgi.url_scheme", "http")
        host = environ.get("HTTP_HOST")
        if not host:
            host = environ.get("SERVER_NAME", "127.0.0.1")
            port = environ.get("SERVER_PORT")
            if port and port != {"http": "80", "https": "443"}.get(scheme):
                host += ":" + port
        return SplitResult(scheme, host, percent_encode(self.fullpath), self.query_string, "")

    url = property(lambda self: self.urlparts.geturl())

    @kept
    def query(self) -> FormsDict:
        """The fields of the query string."""
        return fields_of(parse_qsl(wsgi_to_text(self.environ.get("QUERY_STRING") or "", "replace")))

    GET = query

    @property
    def remote_route(self) -> List[str]:
        """[remote_addr]: whom X-Forwarded-For names, anybody may have written."""
        return [self.remote_addr] if self.remote_addr else []

    @property
    def auth(self) -> Optional[Tuple[str, Optional[str]]]:
        """(user, password) of Basic authentication, (REMOTE_USER, None) of a server's, or None."""
        user = self.environ.get("REMOTE_USER")
        return parse_auth(self.environ.get("HTTP_AUTHORIZATION", "")) or (
            (user, None) if user else None)

    # -- headers --

    content_type = from_environ("CONTENT_TYPE", str.lower)
    content_length = from_environ("CONTENT_LENGTH", parse_length)  # -1 where it is not known
    chunked = from_environ("HTTP_TRANSFER_ENCODING", lambda text: "chunked" in text.lower())
    is_xhr = is_ajax = from_environ("HTTP_X_REQUESTED_WITH",
                                    lambda text: text.lower() == "xmlhttprequest")

    @kept
    def headers(self) -> WSGIHeaderDict:
        return WSGIHeaderDict(self.environ)

    def get_header(self, name: str, default: Optional[str] = None) -> Optional[str]:
        return self.headers.get(name, default)

    @kept
    def cookies(self) -> FormsDict:
        """Name to value; the first of a name counts, as the most specific path comes first."""
        text = wsgi_to_text(self.environ.get("HTTP_COOKIE", ""), "replace")
        return fields_of(reversed(parse_cookies(text)))

    def get_cookie(self, key: str, default: Any = None, secret: Any = None, *,
                   max_age: Optional[float] = None) -> Any:
        """The value of a cookie, `default` where there is none.

        With `secret`, or a list of them: what set_cookie signed with one of them, at most
        `max_age` seconds ago; `default` where the cookie is any other.
        """
        value = self.cookies.get(key) or ""
        if secret is None:
            return value or default
        response_of(self.environ).vary_by_cookie()
        signed = cookie_decode(value, secret)
        if not isinstance(signed, list) or len(signed) != 3 or signed[0] != key:
            return default
        return signed[1] if max_age is None or time.time() - signed[2] <= max_age else default

    # -- the body --

    @property
    def body(self) -> BinaryIO:
        """The body as a seekable file, at its start."""
        body: BinaryIO = self._body
        body.seek(0)
        return body

    @kept
    def _body(self) -> Any:
        """wsgi.input itself where it is seekable (our server), else a copy of it."""
        environ = self.environ
        source = environ.get("wsgi.input", EMPTY_INPUT)
        if source is environ.get("minibottle.body"):
            return source
        limits = self._limits()
        most, read = limits.max_body, source.read
        left = length = parse_length(environ.get("CONTENT_LENGTH") or "")
        if environ.get("wsgi.input_terminated"):
            left = length if length >= 0 else most + 1
        elif "HTTP_TRANSFER_ENCODING" in environ and self.chunked:
            pieces = read_chunked(source, most)  # PEP 3333 does not say who decodes
            read, left = lambda size: next(pieces, b""), most + 1
        copy = copy_body(read, left if length <= most else 0, limits.spool_threshold)
        if type(copy) is not io.BytesIO:
            environ.setdefault("minibottle.files", []).append(copy)
        if length > most or copy.tell() > most:
            raise BadRequest(f"body over {most} bytes (max_body)", 413)
        environ["wsgi.input"] = environ["minibottle.body"] = copy
        return copy

    def _limits(self) -> Settings:
        limits = self.environ.get("minibottle.settings", DEFAULTS)
        if self.MEMFILE_MAX != DEFAULTS.max_form_memory:
            from copy import copy
            limits = copy(limits)
            limits.max_form_memory = limits.spool_threshold = self.MEMFILE_MAX
        return limits

    def _read_body(self) -> bytes:
        """The whole body in memory."""
        limit = self._limits().max_form_memory
        data = self.body.read(limit + 1)
        if len(data) > limit:
            raise BadRequest(f"body over {limit} bytes (max_form_memory)", 413)
        return data

    @property
    def stream(self) -> BodyStream:
        """The body in pieces, for `for` and `async for`; as it arrives, on a route with stream=True
        on our server."""
        return BodyStream(self.environ.get("wsgi.input", EMPTY_INPUT))

    @kept
    def POST(self) -> FormsDict:
        """The fields and files of a form in the body, url-encoded or multipart."""
        if not self.content_type.startswith("multipart/"):
            text = self._read_body().decode("utf-8", "replace")
            return fields_of(parse_qsl(text, self._limits().max_fields))
        kind, options = parse_options(self.environ["CONTENT_TYPE"])
        boundary = options.get("boundary", "")
        if kind != "multipart/form-data" or not re.fullmatch(BOUNDARY, boundary):
            raise BadRequest("not multipart/form-data with a boundary of 1 to 70 characters")
        fields = read_multipart(self._body, boundary, self._limits())
        self.environ.setdefault("minibottle.files", []).extend(
            value for _, value in fields.allitems() if isinstance(value, FileUpload))
        return fields

    @kept
    def forms(self) -> FormsDict:
        """The fields of a form in the body: text."""
        if not self.content_type.startswith("multipart/"):
            return self.POST
        return fields_of(pair for pair in self.POST.allitems() if isinstance(pair[1], str))

    @kept
    def files(self) -> FormsDict:
        """The files of a form in the body: each a FileUpload."""
        return fields_of(pair for pair in self.POST.allitems() if isinstance(pair[1], FileUpload))

    @kept
    def params(self) -> FormsDict:
        """The fields of query and form."""
        return fields_of(chain(self.query.allitems(), self.forms.allitems()))

    @kept
    def json(self) -> Any:
        """The body of an application/json request; None for other types and an empty body.

        Raises HTTPError 400 where it is not JSON.
        """
        if self._media_type() not in ("application/json", "application/json-rpc"):
            return None
        data = self._read_body()
        return parse_json_body(data) if data else None

    def read_json(self) -> Any:
        """The body as JSON, strictly: HTTPError 415 for another type, 400 for what is not JSON."""
        if not re.fullmatch(JSON_TYPE, self._media_type()):
            raise HTTPError(415, f"Content-Type {self._media_type()!r} is not JSON.")
        return parse_json_body(self._read_body())

    def _media_type(self) -> str:
        kind: str = self.environ.get("CONTENT_TYPE") or ""
        return kind.partition(";")[0].strip().lower()

    # -- where it was routed --

    app: App = routed(0, "bottle.app")
    route: Route = routed(3, "bottle.route")
    url_args: Dict[str, Any] = routed(4, "route.url_args")


class BodyStream:
    """Iterates over a file in pieces of up to 64 KiB."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __iter__(self) -> Iterator[bytes]:
        return iter(partial(getattr(self.file, "read1", self.file.read), 1 << 16), b"")

    def __aiter__(self) -> Any:
        pull = getattr(getattr(self.file, "raw", None), "pull", pull_aside)  # of a RequestBody
        return pull(self)


def parse_json_body(data: bytes) -> Any:
    try:
        return json_loads(data)
    except ValueError as error:
        raise HTTPError(400, f"Invalid JSON: {error}", error) from None


DESCRIBING = ("QUERY_STRING", "CONTENT_TYPE", "CONTENT_LENGTH", "wsgi.input")
JSON_TYPE = r"application/(?:json|json-rpc|[a-z0-9.!#$&^_-]+\+json)"


def find_environ(view: object = None) -> Dict[str, Any]:
    """The environ of the running context; in a middleware, of what this thread answers."""
    try:
        return CURRENT.get()
    except LookupError:  # the server knows, where there is no application yet, or no more
        hand = getattr(threading.current_thread(), "minibottle_hand", None)
    if hand is None or hand.exchange is None:
        raise RuntimeError("Request context not initialized.")
    return hand.exchange.environ


class LocalRequest(Request):
    """The request of the running context; in a middleware, the one that this thread answers."""

    __slots__ = ()

    def bind(self, environ: Optional[dict] = None) -> None:
        """Make `environ` the one of this context."""
        CURRENT.set({} if environ is None else environ)

    __init__ = bind

    environ = property(find_environ, bind)


class FoundRequest(LocalRequest):
    """The same for what works out an attribute, so that the context is asked once."""

    __slots__ = ("environ",)
    __init__ = Request.__init__


class Response:
    """What will be sent: status, headers, cookies, body.

    Raises ValueError for any character that could break out of a header (RFC 9110 5.5).
    """

    default_status = 200
    default_content_type = "text/html; charset=UTF-8"
    # RFC 9110 15.3.5 and 15.4.5: headers that these answers do not have.
    bad_headers = {204: frozenset(("Content-Type", "Content-Length")),
                   304: frozenset(("Allow", "Content-Encoding", "Content-Language",
                                   "Content-Length", "Content-Range", "Content-Type",
                                   "Content-Md5", "Last-Modified"))}

    def __init__(self, body: Any = "", status: Union[int, str, None] = None,
                 headers: Any = None, **more_headers: object) -> None:
        self.body = body
        self._headers = HeaderDict()
        self._cookies: Dict[str, str] = {}
        self.status = status or self.default_status
        if hasattr(headers, "items"):
            headers = getattr(headers, "allitems", headers.items)()
        for name, value in chain(headers or (), more_headers.items()):
            self._headers.append(name, value)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.status_line}>"

    def __iter__(self) -> Iterator:
        return iter(self.body)

    def close(self) -> None:
        close_all(self.body)

    @property
    def status(self) -> str:
        """The status line; set it as 404 or "404 Brain not found"."""
        return self._status_line

    @status.setter
    def status(self, status: Union[int, str]) -> None:
        if isinstance(status, int):
            code, line = status, _HTTP_STATUS_LINES.get(status) or f"{status} Unknown"
        else:
            line = status.strip(" ")
            code = int(line[:3]) if re.fullmatch(STATUS_LINE, line) else 0
        if not 100 <= code <= 999:
            raise ValueError(f"bad status {status!r}: a number from 100 to 999, or '404 Reason'")
        self._status_code = code
        self._status_line = line

    status_code = property(attrgetter("_status_code"))
    status_line = property(attrgetter("_status_line"))

    # -- headers --

    headers = property(attrgetter("_headers"), doc="Name to value; changes count.")
    __contains__, __getitem__, __setitem__, __delitem__ = (method_of("_headers", name) for name in (
        "__contains__", "__getitem__", "__setitem__", "__delitem__"))

    def get_header(self, name: str, default: Optional[str] = None) -> Optional[str]:
        return self._headers.get(name, default)

    def set_header(self, name: str, value: object) -> None:
        """In the place of what was set under this name."""
        self._headers[name] = value

    def add_header(self, name: str, value: object) -> None:
        """Keep what was set under this name, and add another."""
        self._headers.append(name, value)

    def iter_headers(self) -> Iterator[Tuple[str, str]]:
        return iter(self.headerlist)

    @property
    def headerlist(self) -> List[Tuple[str, str]]:
        """[(name, value), …] as WSGI wants it, with the default content type and the cookies."""
        fields, bad = self._headers.dict, self.bad_headers.get(self._status_code, ())
        if "Content-Type" not in fields:
            fields = {**fields, "Content-Type": [self.default_content_type]}
        pairs = [(name, value if value.isascii() else text_to_wsgi(value))
                 for name, values in fields.items() if name not in bad for value in values]
        return pairs + [("Set-Cookie", line) for line in self._cookies.values()]

    content_type = header_property("Content-Type")
    content_length = header_property("Content-Length", int, -1)
    expires = header_property("Expires", datetime_of, None, http_date)

    @property
    def charset(self) -> str:
        """Of the content type; "UTF-8" where that names none."""
        return charset_of(self._headers.dict.get("Content-Type", [""])[-1])

    # -- cookies --

    def set_cookie(self, name: str, value: Any, secret: Any = None, **options: object) -> None:
        """Set a cookie (RFC 6265 4.1) with max_age (seconds or timedelta), expires (date), domain,
        path, secure, httponly, samesite ("lax", "strict", "none"), partitioned.

        With `secret`, or a list of them (the first counts), `value` is anything that has a JSON
        form, signed: who has the cookie can read it, but not change it. It is for all paths,
        HttpOnly and SameSite=Lax, if `options` do not say otherwise.
        Raises CookieError for characters that have no place there, TypeError for a value not str.
        """
        options = parse_cookie_options(options)
        if secret is not None:
            options = {**SIGNED_DEFAULTS, **options}
            value = cookie_encode([name, value, int(time.time())], secret)
            self.vary_by_cookie()
        self._cookies[name] = format_cookie(name, value, options)

    def delete_cookie(self, name: str, **options: Any) -> None:
        """Make the browser drop it; give the path, domain and secret that it was set with."""
        options.update(max_age=-1, expires=0)
        self.set_cookie(name, "", **options)

    def vary_by_cookie(self) -> None:
        """Tell caches that the answer is one user's."""
        if "Cookie" not in self._headers.getall("Vary"):
            self._headers.append("Vary", "Cookie")

    # -- one response onto another --

    def merge(self, other: "Response") -> None:
        """Take over the status, headers and cookies of `other`, which beat those set here before.

        An error has a body of its own, so what described the old one goes (RFC 9110 8).
        """
        if other.status_code >= 400 and isinstance(other, HTTPError):
            self._headers.filter(OF_THE_BODY)
        self.status = other.status_line
        for name, values in other._headers.dict.items():
            kept = self._headers.getall(name) if name == "Vary" else []
            self._headers.dict[name] = kept + values
        self._cookies.update(other._cookies)

    def copy(self, cls: Optional[type] = None) -> "Response":
        """Status, headers and cookies, without the body."""
        made: Response = (cls or Response)()
        made.merge(self)
        return made


@lru_cache(maxsize=256)
def charset_of(content_type: str) -> str:
    return parse_options(content_type)[1].get("charset") or "UTF-8"


OF_THE_BODY = frozenset((
    "Content-Type", "Content-Length", "Content-Encoding", "Content-Language", "Content-Location",
    "Content-Range", "Content-Disposition", "Content-Md5", "Digest", "Etag", "Last-Modified",
    "Accept-Ranges"))
STATUS_LINE = r"[1-9][0-9][0-9] [ -~]+"


class HTTPResponse(Response, BottleException):
    """A Response to return or to raise."""


class HTTPError(HTTPResponse):
    """A Response that goes through the error handlers. `abort` raises it."""

    default_status = 500

    def __init__(self, status: Union[int, str, None] = None, body: object = None,
                 exception: Optional[BaseException] = None, traceback: Optional[str] = None,
                 **more_headers: object) -> None:
        self.exception = exception
        self.traceback = traceback
        super().__init__(body, status, **more_headers)


def response_of(environ: Dict[str, Any]) -> Response:
    """The one Response of this request, made when first asked for."""
    found = environ.get("minibottle.response")
    if found is None:
        found = environ["minibottle.response"] = Response()
    return found


class LocalResponse(Response):
    """The response of the running context."""

    def __init__(self) -> None:
        pass

    _headers = property(lambda self: response_of(find_environ())._headers)  # FAST: found at once

    def __getattr__(self, name: str) -> Any:
        return getattr(response_of(find_environ()), name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(response_of(find_environ()), name, value)

    def bind(self, *args: Any, **kwargs: Any) -> None:
        """A new one: Response(*args, **kwargs)."""
        if CURRENT.get(None) is None:
            CURRENT.set({})
        request.environ["minibottle.response"] = Response(*args, **kwargs)


BaseRequest, BaseResponse, MultipartError = Request, Response, HTTPError  # Bottle's names
response = LocalResponse()
request = LocalRequest()  # code outside of requests may look at it where this file is imported


def abort(code: int = 500, text: str = "Unknown Error.") -> NoReturn:
    """End the request with an error."""
    raise HTTPError(code, text)


def auth_basic(check: Callable[[str, str], object], realm: str = "private",
               text: str = "Access denied") -> Callable[[Callable], Callable]:
    """A decorator: 401 where `check(user, password)` is false (RFC 7617)."""
    def decorator(callback: Callable) -> Callable:
        @wraps(callback)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            found: Any = request.auth
            if not found or not check(*found):
                return HTTPError(401, text, WWW_Authenticate=f'Basic realm="{realm}"')
            return callback(*args, **kwargs)
        return wrapper
    return decorator


def redirect(url: str, code: Optional[int] = None, *, request: Request = request) -> NoReturn:
    """End the request with a Location, relative if `url` is (RFC 9110 10.2.2): 303 or 302."""
    if code is None:
        code = 302 if request.get("SERVER_PROTOCOL") == "HTTP/1.0" else 303
    check_field_value(url)
    raise HTTPResponse("", code, Location=percent_encode(url, safe="%/:=&?~#+!$,;'@()*[]"))


# === 8. Files and gzip ========================================================
# Bodies that are more than a string. gzip is on the fly, for any WSGI application; what it must
# leave alone is in negotiate_gzip.

class FileWrapper:
    """wsgi.file_wrapper (PEP 3333): iterates over a file, or `length` bytes of it from where it
    stands; our server uses sendfile instead."""

    def __init__(self, file: BinaryIO, block_size: int = 1 << 16,
                 length: int = sys.maxsize) -> None:
        self.file = file
        self.block_size = block_size
        self.left = length  # bytes to come, at most

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        piece = self.file.read(min(self.block_size, self.left))
        if not piece:
            raise StopIteration
        self.left -= len(piece)
        return piece

    def close(self) -> None:
        close_all(self.file)


class Body:
    """What is sent in pieces: begun, so that the code before its first piece may set the head, and
    that piece is not empty. Every step and the close() run in one context, a copy of this one."""

    __slots__ = ("pieces", "close")

    def __init__(self, out: Iterable) -> None:
        run: Any = copy_context().run
        self.close: Callable = partial(run, close_all, out)
        try:
            steps = map(run, repeat(run(iter, out).__next__))
            first = next(filter(None, steps), b"")
        except BaseException:
            self.close()
            raise
        self.pieces: Iterator = chain((first,), steps)

    def __iter__(self) -> Iterator:
        return self.pieces


class AsyncBody:
    """A Body out of an asynchronous iterator; who is not on asyncio may iterate too, and waits."""

    def __init__(self, pieces: Any) -> None:
        self.pieces = pieces
        self.first: Any = END       # the piece that begin() has pulled
        self.encoding = ""
        self.files: Iterable = ()   # to be closed with it
        self.context = copy_context()

    def __aiter__(self) -> AsyncBody:
        return self

    async def __anext__(self) -> bytes:
        piece, self.first = self.first, END
        return encode_piece(await self.pieces.__anext__(), self.encoding) if piece is END else piece

    async def aclose(self) -> None:
        if hasattr(self.pieces, "aclose"):
            await self.pieces.aclose()
        close_all(*self.files)

    def __iter__(self) -> Iterator[bytes]:
        return iter(lambda: bridge.wait(self.context, next_async(self)), END)

    def close(self) -> None:
        (bridge.spawn if bridge.is_here() else bridge.wait)(self.context, self.aclose())


async def begin(out: Any) -> Union[Body, AsyncBody]:
    """A body of bytes, with its first piece: a Body; of what is asynchronous, or may block asyncio,
    an AsyncBody. Its charset is what the code before that piece may have set."""
    if hasattr(out, "__aiter__"):
        pieces = out.__aiter__()
    elif bridge.is_here():
        pieces = pull_aside(out)
    else:
        return encode_body(Body(out))
    await SWITCH
    own = PUMP.get(None) is bridge.asyncio.current_task()
    body = AsyncBody(pieces if own else pull_in_task(pieces))
    try:
        first: Any = b""
        while first in (b"", ""):
            first = await next_async(body.pieces)
        body.encoding = response.charset
        body.first = b"" if first is END else encode_piece(first, body.encoding)
    except BaseException:
        await body.aclose()
        raise
    return body


def encode_body(body: Body) -> Body:
    encoding = response.charset
    try:
        first = encode_piece(next(body.pieces), encoding)
    except Exception:
        body.close()
        raise
    body.pieces = chain((first,), map(encode_piece, body.pieces, repeat(encoding)))
    return body


def encode_piece(piece: object, encoding: str) -> bytes:
    """To bytes; the first may also be another answer, as if it were raised."""
    if isinstance(piece, str):
        return piece.encode(encoding)
    if isinstance(piece, bytes):
        return piece
    if isinstance(piece, HTTPResponse):
        raise piece
    raise TypeError(f"a body is made of str or bytes, not {type(piece).__name__}")


async def ask_wsgi(app: Callable, environ: Dict[str, Any]) -> Tuple[list, Any]:
    """([status, headers, exc_info or None], body) of another application's answer; the body is
    bytes, if it is whole, a FileWrapper, a Body or an AsyncBody."""
    head: list = []
    written: List[bytes] = []
    body: Any = None

    def start_response(status: str, headers: list, exc_info: Any = None) -> Callable:
        if exc_info and body is not None:  # too late for another answer
            raise exc_info[1]
        head[:] = status, list(headers), exc_info
        return written.append

    result = app(environ, start_response)
    if type(result) is Pending:
        await SWITCH
        result = await result.as_task()
    if type(result) is list and result:  # of HEAD it may be empty, and not be the whole
        body = b"".join(written + result)
    elif type(result) in (FileWrapper, AsyncBody):
        body = result
    else:
        body = Body(result)
        body.pieces = chain(written, body.pieces)
    if not head:
        close_all(body)
        raise RuntimeError("the application did not call start_response")
    return head, body


COMPRESSIBLE = (
    r"text/|application/(?:json|javascript|x-javascript|xml|wasm|manifest\+json)\b"
    r"|[a-z]+/[a-z0-9.-]+\+(?:json|xml)\b|image/(?:svg\+xml|bmp|x-icon)|font/(?:ttf|otf)")
CODING = (r"[ \t]*([!#$%&'*+\-.^_`|~0-9A-Za-z]+)[ \t]*"
          r"(?:;[ \t]*[qQ]=(0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?)[ \t]*)?")


@lru_cache(maxsize=256)
def accepts_gzip(header: str) -> bool:
    """"gzip;q=0.5, *;q=0" -> True: its q is above 0 and not below identity's (RFC 9110 12.5.3)."""
    weights: Dict[str, float] = {}
    for part in header.split(","):
        match = re.fullmatch(CODING, part)
        if match:
            weights[match[1].lower()] = float(match[2] or 1)
    weight = weights.get("gzip", weights.get("x-gzip", weights.get("*", 0.0)))
    return weight > 0 and weight >= weights.get("identity", 0.0)


def negotiate_gzip(environ: Dict[str, Any], status: str, headers: List[Tuple[str, str]],
                   length: Optional[int], minimum: int) -> Tuple[List[Tuple[str, str]], bool]:
    """The headers to send, and whether the body is to be compressed. `length` None: not known.

    Never for 204, 206, 304, what is encoded already, what says no-transform, or where
    environ["minibottle.gzip"] is False (README: BREACH). A strong ETag becomes weak, since the
    bytes differ (RFC 9110 8.8.1); Vary is on both variants (RFC 9110 12.5.5).
    """
    found: Dict[str, str] = {}
    for name, value in headers:
        name = name.lower()
        found[name] = f"{found[name]}, {value}" if name in found else value
    if length is None and LENGTH.fullmatch(found.get("content-length", "")):
        length = int(found["content-length"])
    if (status[:3] in ("204", "206", "304") or environ.get("minibottle.gzip") is False
            or length is not None and length < minimum
            or "content-encoding" in found or "content-range" in found
            or not re.match(COMPRESSIBLE, found.get("content-type", "").lower())
            or "no-transform" in found.get("cache-control", "").lower()):
        return headers, False
    vary = found.get("vary", "")
    if "*" not in vary and "accept-encoding" not in vary.lower():
        headers = [pair for pair in headers if pair[0].lower() != "vary"]
        headers.append(("Vary", f"{vary}, Accept-Encoding" if vary else "Accept-Encoding"))
    if not accepts_gzip(environ.get("HTTP_ACCEPT_ENCODING", "")[:500]):
        return headers, False
    headers = [pair for pair in headers
               if pair[0].lower() not in ("content-length", "accept-ranges", "etag")]
    tag = found.get("etag")
    if tag:
        headers.append(("ETag", tag if tag[:2] == "W/" else "W/" + tag))
    headers.append(("Content-Encoding", "gzip"))
    return headers, True


def gzip_bytes(data: bytes, level: int) -> bytes:
    """All of a body."""
    import zlib
    coder = zlib.compressobj(level, zlib.DEFLATED, 31)  # 31: with gzip's head and tail (RFC 1952)
    return coder.compress(data) + coder.flush()


def gzip_coder(level: int) -> Tuple[Callable[[bytes], bytes], Callable[[], bytes]]:
    """(what compresses a piece so that the client can read it at once, what gives the end)."""
    import zlib
    coder = zlib.compressobj(level, zlib.DEFLATED, 31)
    return lambda piece: coder.compress(piece) + coder.flush(zlib.Z_SYNC_FLUSH), coder.flush


def iter_gzip(pieces: Iterable[bytes], level: int,
              length: Optional[int] = None) -> Iterator[bytes]:
    """A body in pieces; each can be read by the client at once, so that events are not late.

    Raises ValueError at the end if they were not `length` bytes, where that was announced.
    """
    step, end = gzip_coder(level)
    total = 0
    for piece in pieces:
        total += len(piece)
        if piece:
            yield step(piece)
    if length is not None and total != length:
        raise ValueError(f"an answer of {total} bytes, and its Content-Length was {length}")
    yield end()


# -- files by their name --

WINDOWS_NAME = r"(?:^|\\)(?:con|prn|aux|nul|conin\$|conout\$|(?:com|lpt)[0-9¹²³])(?=[ .\\]|$)|:"
MAX_RANGES = 5


def safe_join(root: str, filename: str, path: Any = os.path) -> Optional[str]:
    """The absolute path of `filename` below `root`, links followed; None if it is not below or, on
    Windows, a device (NUL, com1.txt), a stream or on another drive."""
    base = path.join(path.abspath(root), "")
    found = path.abspath(path.join(base, filename.strip("/\\")))
    if "\0" in filename or not found.startswith(base) or path.sep == "\\" and re.search(
            WINDOWS_NAME, found[len(base):], re.IGNORECASE):
        return None
    return found


def open_file(path: str, answer: HTTPResponse, precompressed: bool) -> BinaryIO:
    """Open it, or the gzip sibling that is made of it. Raises OSError, also for a directory."""
    info = os.stat(path)
    if not stat.S_ISREG(info.st_mode):  # opening a pipe would block
        raise FileNotFoundError(errno.ENOENT, "no regular file", path)
    packed = path + ".gz"
    if precompressed and os.path.isfile(packed) and os.path.getmtime(packed) >= info.st_mtime:
        answer.add_header("Vary", "Accept-Encoding")
        if accepts_gzip(request.environ.get("HTTP_ACCEPT_ENCODING", "")[:500]):
            answer.set_header("Content-Encoding", "gzip")
            path = packed
    return open(path, "rb")


def format_attachment(name: str) -> str:
    """A Content-Disposition (RFC 6266) that names a download; RFC 8187 for what is not ASCII."""
    name = re.sub(r"[\x00-\x1f\x7f/\\]", "_", name)
    plain = re.sub(r'[^ -~]|["%]', "_", name)
    exact = percent_encode(name, safe="!#$&+-.^_`|~", errors="replace")
    return f'attachment; filename="{plain}"' + f"; filename*=UTF-8''{exact}" * (plain != name)


def parse_range_header(header: str, maxlen: int = 0) -> List[Tuple[int, int]]:
    """"bytes=10-15,-5" of 100 bytes -> [(10, 16), (95, 100)]: the ranges that are there (RFC 9110
    14.1.2); [] also where the header is malformed."""
    ranges = []
    for part in header.partition("=")[2].split(","):
        match = re.fullmatch("[ \t]*([0-9]{0,18})-([0-9]{0,18})[ \t]*", part)
        first, last = match.groups() if match else ("", "")
        if not first + last or first and last and int(last) < int(first):
            return []
        start = int(first) if first else max(0, maxlen - int(last))
        end = min(int(last) + 1, maxlen) if first and last else maxlen
        if start < end:
            ranges.append((start, end))
    return ranges


def wanted_range(size: int, tag: str, modified: int) -> Optional[Tuple[int, int]]:
    """What to send of a file: None: all; (start, end); (0, 0) if what is wanted is not there."""
    header = request.environ.get("HTTP_RANGE", "")
    condition = request.environ.get("HTTP_IF_RANGE")
    if request.method != "GET" or header[:6].lower() != "bytes=" or not size:
        return None
    # RFC 9110 13.1.5: a strong tag, or a date that is one (8.8.2.2): not of this very second.
    if condition and (condition != tag or tag[0] != '"') and (
            condition != http_date(modified) or modified + 1 >= time.time()):
        return None
    ranges = parse_range_header(header, size)
    ordered = sorted(ranges)
    if len(ranges) > MAX_RANGES or any(a[1] > b[0] for a, b in zip(ordered, ordered[1:])):
        return None  # RFC 9110 14.2: many, or overlapping
    return ranges[0] if ranges else (0, 0)  # RFC 9110 15.3.7: one of several will do


def check_conditions(tag: str, modified: int) -> int:
    """RFC 9110 13.2.2, in its order: 412, 304, or 200."""
    match, unless, none, since = (request.environ.get("HTTP_IF_" + name) for name in (
        "MATCH", "UNMODIFIED_SINCE", "NONE_MATCH", "MODIFIED_SINCE"))
    if request.method not in ("GET", "HEAD"):
        return 200
    if match:
        if match != "*" and (tag[:1] != '"' or tag not in re.findall(r'(?:W/)?"[^"]*"', match)):
            return 412
    elif unless and modified > (parse_date(unless) or modified):
        return 412
    if none:
        return 304 if none == "*" or tag.replace("W/", "") in re.findall('"[^"]*"', none) else 200
    return 304 if since and modified <= (parse_date(since) or -1) else 200


def static_file(filename: str, root: str, mimetype: Union[bool, str] = True,
                download: Union[bool, str] = False, charset: str = "UTF-8",
                etag: Union[None, bool, str] = None, headers: Any = None, *,
                precompressed: bool = False) -> HTTPResponse:
    """Answer with a file below `root`: static_file("a/b.css", root="./static").

    It honours conditions and a range. `download`: as an attachment, of that name if it is a str.
    `etag`: False for none. `precompressed`: send b.css.gz instead, if there is one, to who accepts
    it. Returns HTTPError 403 for what is not below root, or not readable, and 404.
    """
    path = safe_join(root, filename)
    if path is None:
        return HTTPError(403, "Access denied.")
    answer = HTTPResponse(headers=headers)
    try:
        file = open_file(path, answer, precompressed)
    except PermissionError:
        return HTTPError(403, "You do not have permission to access this file.")
    except (OSError, ValueError):  # ValueError: no name that a file can have
        return HTTPError(404, "File does not exist.")
    name = download if isinstance(download, str) else os.path.basename(path)
    kind: Any = mimetype
    if mimetype is True:
        import mimetypes
        kind, packed = mimetypes.guess_type(name)
        if packed:  # what a.tar.gz is: nobody unpacks it on the way
            kind = "application/gzip" if packed == "gzip" else f"application/x-{packed}"
        kind = kind or "application/octet-stream"
    if kind and charset and re.match(r"(?!.*charset=)(text/|application/javascript$)", kind):
        kind += f"; charset={charset}"
    if kind:
        answer.content_type = kind
    if download:
        answer.set_header("Content-Disposition", format_attachment(name))
    return send_part(answer, file, etag)


def send_part(answer: HTTPResponse, file: BinaryIO, etag: Any) -> HTTPResponse:
    """What the conditions and the range of the request make of an answer with a file."""
    info = os.fstat(file.fileno())
    size, modified, tag = info.st_size, int(info.st_mtime), ""
    if etag is not False:  # the same on every machine that has a copy of the file with its time
        tag = etag or f"{info.st_mtime_ns:x}-{size:x}"
        answer.headers["ETag"] = tag = tag if '"' in tag else f'"{tag}"'
    answer.headers.update({"Last-Modified": http_date(modified), "Accept-Ranges": "bytes",
                           "Date": http_date(time.time())})
    status, part = check_conditions(tag, modified), wanted_range(size, tag, modified)
    if status != 200 or part == (0, 0):
        file.close()
        if status == 304:
            answer.status = 304
            return answer
        return HTTPError(412) if status == 412 else HTTPError(
            416, headers={"Content-Range": f"bytes */{size}"})
    start, end = part or (0, size)
    answer.body = file
    if part:
        answer.status = 206
        answer.headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        file.seek(start)
        answer.body = FileWrapper(file, length=end - start)
    answer.content_length = end - start
    return answer


# === 9. Router ================================================================
# Rules to targets. A rule without wildcards is looked up in a dict, the others by their static
# segments: a dict for each shape, such as "two segments, the first static". So 10,000 rules that
# differ in a segment cost as much as ten: the few that can match are tried in their order.

class RouteError(BottleException):
    """Something is wrong with a route."""


class RouteSyntaxError(RouteError):
    """A rule cannot be read."""


class RouteBuildError(RouteError):
    """No URL can be made of a route."""


# <name>, <name:filter>, <name:filter:config>, each part optional; a backslash before it: text.
# Bottle's first syntax, :name and :name#pattern#, is read too, but not inside a word: /users:batch.
WILDCARD = (r"(\\*)(?:<([A-Za-z_]\w*)?(?::(\w*)(?::((?:\\.|[^\\>])*))?)?>"
            r"|(?<!\w):(?:([A-Za-z_]\w*)(?:#(.*?)#)?|#(.*?)#))")
GROUP = r"(\\.|\[(?:\\.|[^\\\]])*\])|\((?:\?P<\w+>|(?!\?))"
VERBS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
NO_SLASH = ("default", "int", "float")  # filters whose wildcards stay within a segment

FILTERS: Dict[str, Callable[[Optional[str]], FilterParts]] = {
    "default": lambda config: (r"[^/]+", None, None),
    "int": lambda config: (r"-?[0-9]+", int, lambda value: str(int(value))),
    "float": lambda config: (r"-?[0-9.]+", float, lambda value: str(float(value))),
    "path": lambda config: (r".+?", None, None),
    "re": lambda config: (re.sub(GROUP, lambda m: m[1] or "(?:", config or r"[^/]+"), None, None),
}


class Rule:
    """A rule with wildcards: its pattern, what converts its values, and its target."""

    def __init__(self, order: int, pattern: str, converters: List[Tuple[str, Callable]],
                 target: object) -> None:
        self.order = order            # of definition
        self.pattern = pattern        # of the whole path
        self.converters = converters  # [(name, text to value)]
        self.target = target

    @cached_property
    def match(self) -> Callable[[str], Optional[Match]]:
        """Made when first needed: compiling takes 100 us."""
        return re.compile(self.pattern, re.DOTALL).fullmatch

    def convert(self, match: Match) -> dict:
        """The arguments of a call, by what the filters make of the wildcards."""
        args = match.groupdict()
        try:
            for name, convert in self.converters:
                args[name] = convert(args[name])
        except ValueError:
            raise HTTPError(400, "Path has wrong format.") from None
        return args


class RouteTable:
    """The rules of one method."""

    def __init__(self) -> None:
        self.static: Dict[str, tuple] = {}  # path -> (target, NO_ARGS)
        self.rules: Dict[str, Rule] = {}    # pattern without names -> rule
        # (count of segments, whether more may follow, places of the static ones)
        # -> {the segments at these places: patterns}
        self.shapes: Dict[tuple, Dict[tuple, List[str]]] = {}

    def find_rule(self, path: str) -> Optional[tuple]:
        """(target, what makes its arguments) of the first rule with wildcards that fits."""
        segments = path.split("/")
        length = len(segments)
        fitting: List[str] = []
        for (count, spans, places), patterns in self.shapes.items():
            if count == length or spans and count < length:
                fitting += patterns.get(tuple(map(segments.__getitem__, places)), ())
        rules = [self.rules[pattern] for pattern in fitting]
        if len(rules) > 1:
            rules.sort(key=lambda rule: rule.order)
        for rule in rules:
            match = rule.match(path)
            if match:
                return rule.target, partial(rule.convert, match)
        return None

    def place(self, pattern: str, segments: List[Optional[str]], spans: bool) -> None:
        """Have it tried for paths with these segments (None: any)."""
        places = tuple(i for i, segment in enumerate(segments) if segment is not None)
        patterns = self.shapes.setdefault((len(segments), spans, places), {})
        patterns.setdefault(tuple(segments[i] for i in places), []).append(pattern)


class Router:
    """Finds the target of a request, and builds the URL of a target."""

    def __init__(self) -> None:
        self.filters = dict(FILTERS)
        self.tables: Dict[str, RouteTable] = {}       # by method
        self.orders: Dict[str, List[RouteTable]] = {}  # method -> the tables to ask, in this order
        self.builders: Dict[str, list] = {}            # name or rule -> its parts
        self.mounted: List[Tuple[str, Router]] = []    # (prefix, router) below
        self.count = 0
        self.memo: Dict[str, Dict[str, tuple]] = {}    # method -> PATH_INFO -> what an App found

    def add_filter(self, name: str, func: Callable[[Optional[str]], FilterParts]) -> None:
        """`func(config)` returns (regex, text to value or None, value to text or None)."""
        self.filters[name] = func

    def add(self, rule: str, method: str, target: object, name: Optional[str] = None) -> None:
        """Add a rule, or give an equal one of the same method another target."""
        parts = self.parse(rule)
        self.memo = {}
        self.builders[rule] = parts
        if name:
            self.builders[name] = parts
        table = self.tables.get(method)
        if table is None:
            table = self.tables[method] = RouteTable()
            self.orders = {}
        if all(type(part) is str for part in parts):
            table.static["".join(parts)] = target, NO_ARGS
            return
        pattern, flat, segments, spans = self.flatten(rule, parts)
        known = table.rules.get(flat)
        if known:  # as Bottle: at its old place
            order = known.order
        else:
            self.count += 1
            order = -len(segments) if method == "PROXY" else self.count  # the longest prefix first
            table.place(flat, segments, spans)
        converters = [(part[0], part[3]) for part in parts
                      if type(part) is not str and part[0] and part[3]]
        table.rules[flat] = Rule(order, pattern, converters, target)

    def parse(self, rule: str) -> list:
        """"/a/<n:int>" -> ["/a/", ("n", "int", pattern, to value, to text)]."""
        parts: list = []
        end = 0
        for match in re.finditer(WILDCARD, rule, re.ASCII):
            slashes, name, kind, config, old_name, *patterns = match.groups()
            text = rule[end:match.start()]
            end = match.end()
            if len(slashes) % 2:  # escaped: text as it stands
                parts.append(text + match[0][1:])
                continue
            parts.append(text + slashes)
            if match[0][len(slashes)] == ":":
                import warnings
                warnings.warn(f"rule {rule!r}: write <name> or <name:re:pattern> for {match[0]!r}",
                              DeprecationWarning, stacklevel=5)
                name, config = old_name, patterns[0] or patterns[1]
                kind = config and "re"
            kind = kind or "default"
            if kind not in self.filters:
                raise RouteSyntaxError(f"unknown filter {kind!r} in rule {rule!r}")
            filtered = self.filters[kind](config.replace("\\>", ">") if config else None)
            try:
                kind in FILTERS and kind != "re" or re.compile(filtered[0])
            except re.error as error:
                raise RouteSyntaxError(f"bad pattern in rule {rule!r}: {error}") from None
            parts.append((name, kind) + tuple(filtered))
        parts.append(rule[end:])
        return [part for part in parts if part != ""] or [""]

    def flatten(self, rule: str, parts: list) -> Tuple[str, str, List[Optional[str]], bool]:
        """(pattern, pattern without names, segments up to a wildcard that spans them, whether)."""
        pattern = flat = shape = ""
        names: Set[str] = set()
        for part in parts:
            if type(part) is str:
                pattern += re.escape(part)
                flat += re.escape(part)
                shape += part
                continue
            name, kind, regex = part[:3]
            if name and name in names:
                raise RouteSyntaxError(f"wildcard {name!r} twice in rule {rule!r}")
            names.add(name)
            pattern += f"(?P<{name}>{regex})" if name else f"(?:{regex})"
            flat += f"(?:{regex})"
            shape += "\0" if kind in NO_SLASH else "\1"
        shape, spans, _ = shape.partition("\1")
        texts = shape.split("/")[:-1] if spans else shape.split("/")
        return pattern, flat, [None if "\0" in text else text for text in texts], bool(spans)

    def find(self, method: str, path: str) -> tuple:
        """(target, arguments, or what makes them: a filter may be slow); (None, the answer), where
        there is none. As Bottle: PROXY, then the method (for HEAD then GET), then ANY; of each the
        static rules first."""
        for table in self.orders.get(method) or self.order_of(method):
            found = table.static.get(path) or table.rules and table.find_rule(path)
            if found:
                return found
        return None, self.refusal(method, path)

    def order_of(self, method: str) -> List[RouteTable]:
        """The tables to ask for a method, in any case."""
        verb = method.upper()
        order = ("PROXY", verb) + (("GET",) if verb == "HEAD" else ()) + ("ANY",)
        tables = [self.tables[name] for name in order if name in self.tables]
        if method in VERBS or method in self.tables:  # not what clients make up
            self.orders[method] = tables
        return tables

    def match(self, environ: Dict[str, Any]) -> Tuple[object, dict]:
        """(target, arguments) for a REQUEST_METHOD and a PATH_INFO that is decoded text.

        Raises HTTPError 400, 404, 405.
        """
        target, args = self.find(environ["REQUEST_METHOD"], environ["PATH_INFO"] or "/")
        if target is None:
            raise args
        return target, {} if args is NO_ARGS else args()

    def refusal(self, method: str, path: str) -> HTTPResponse:
        """404, or 405 with the methods that have a target (RFC 9110 10.2.1); also the 204 to
        OPTIONS where no target takes it (RFC 9110 9.3.7)."""
        asked = self.order_of(method)
        methods = {name for name, table in self.tables.items() if table not in asked
                   and (path in table.static or table.find_rule(path))}
        if not methods:
            return HTTPError(404, f"Not found: {path!r}")
        methods.update(["OPTIONS", "HEAD"] if "GET" in methods else ["OPTIONS"])
        allow = ", ".join(sorted(methods))
        if method.upper() == "OPTIONS":
            return HTTPResponse("", 204, Allow=allow)
        return HTTPError(405, "Method not allowed.", Allow=allow)

    def parts_of(self, name: str) -> Optional[list]:
        """Of a name or rule that is known here, else below."""
        if name in self.builders:
            return self.builders[name]
        below = ((prefix, router.parts_of(name)) for prefix, router in self.mounted)
        return next((self.parse(prefix) + parts for prefix, parts in below if parts), None)

    def build(self, name: str, /, *anonymous: object, **args: object) -> str:
        """("/a/<n:int>", n=1, q="x") -> "/a/1?q=x", percent-encoded. Raises RouteBuildError.

        Wildcards without a name take the positional arguments.
        """
        parts = self.parts_of(name)
        if parts is None:
            raise RouteBuildError(f"no route has the name or rule {name!r}")
        path = ""
        unnamed = list(anonymous)
        for part in parts:
            if type(part) is str:
                path += percent_encode(part)
                continue
            key, kind, _, _, to_text = part
            if not (key in args if key else unnamed):
                raise RouteBuildError(f"argument {key!r} is missing to build {name!r}")
            value = args.pop(key) if key else unnamed.pop(0)
            path += percent_encode(to_text(value) if to_text else str(value),
                                   safe="" if kind in NO_SLASH else "/")
        return path + ("?" + format_query(args) if args else "")


NO_ARGS: dict = {}


# === 10. Templates ============================================================
# Bottle's template language: text, {{expression}}, and Python on lines after %. A template becomes
# Python with the same line breaks, so that a traceback names the template's own line. Running it,
# with the variables as its globals, adds pieces of text to a list.

TEMPLATE_PATH = ["./", "./views/"]
TEMPLATES: Dict[tuple, BaseTemplate] = {}  # what template() has compiled
STPL_SYNTAX = "<% %> % {{ }}"              # a block of code: begin, end; a line; {{expression}}
STPL_OPENS = ("if", "for", "while", "with", "try", "def", "class", "async")
STPL_CONTINUES = ("elif", "else", "except", "finally")
STPL_STRING = "|".join(                    # in an expression, which no }} in it ends
    rf"{3*q}(?:(?!{3*q})[^\\]|\\[\s\S])*{3*q}|{q}(?!{2*q})(?:[^\\\n{q}]|\\.)*{q}" for q in "'\"")
STPL_CODE = r"""(?mx) (?P<string> (?P<quote> '''|\"""|'|") (?:\\[\s\S]|[^\\])*? (?P=quote) )
    |(?P<comment> \#.*? (?=%s[ \t]*\r?$|\r?$) ) |(?P<stop> %s[ \t]*(?:\r?\n|\Z) )
    |(?P<open> [\[({] ) |(?P<close> [\])}] ) |(?P<semicolon> ; )
    |(?P<newline> \r?\n ) |(?P<joined> \\\r?\n ) |(?P<code> \w+|[ \t]+|. )"""


class TemplateError(BottleException):
    """A template is not found, or cannot be read."""


class StplSyntaxError(TemplateError):
    """The blocks of a template do not fit. (What is wrong with its Python is a SyntaxError.)"""


class StplParser:
    """The source of a template, to be translated once."""

    def __init__(self, source: str, syntax: Optional[str] = None, name: str = "template") -> None:
        self.source = source
        self.name = name                # for messages
        begin, end, line, left, right = map(re.escape, (syntax or STPL_SYNTAX).split())
        self.starts = re.compile(rf"(?m)^[ \t]*(?:{line}|({begin}))|\Z")
        self.escaped = re.compile(rf"(?m)^([ \t]*)\\({line}|{begin})")
        self.line = re.compile(STPL_CODE % ("(?!)", "(?!)"))
        self.block = re.compile(STPL_CODE % (end, end))
        self.inline = re.compile(rf"{left}((?:{STPL_STRING}|(?!{left})[^'\"\n])*?){right}")
        self.out: List[str] = []        # Python, as many lines as have been read
        self.statement: List[str] = []  # tokens of the one at hand
        self.brackets = 0               # that it has open
        self.follows = False            # another one, on its line
        self.blocks: List[str] = []     # the words that opened them: ["for", "match", "case"]

    def translate(self) -> str:
        r"""To Python: "% if x:\n<b>{{x}}" -> "if x:\n  _printlist(('<b>',_escape(x),))"."""
        start, at_end = 0, False
        while not at_end:
            found: Any = self.starts.search(self.source, start)
            text, at_end = self.source[start:found.start()], found.end() == len(self.source)
            if text and self.statement:
                raise self.error("code that does not end before the text")
            self.write_text(text)
            start = self.read_code(found.end(), self.block if found[1] else self.line)
        return "".join(self.out)

    def write_text(self, text: str) -> None:
        """Write text as one call, in which each expression stays on its line."""
        shown = re.sub(r"\\\\\r?\n\Z", "", self.escaped.sub(r"\1\2", text))
        if text.isspace() and self.blocks[-1:] == ["match"]:  # where Python has nothing but case
            shown = ""
        code = ""
        for i, part in enumerate(self.inline.split(shown)):
            value = part.strip()
            if i % 2:
                code += f"_str({value[1:]})," if value[:1] == "!" else f"_escape({value}),"
            elif part:
                code += f"{part!r}," + "\n" * part.count("\n")
        if code:
            code = "  " * len(self.blocks) + "_printlist((" + code.rstrip("\n") + "))"
        self.out.append(code + "\n" * (text.count("\n") - code.count("\n")))

    def read_code(self, start: int, tokens: Pattern) -> int:
        """Write the Python up to the end of its line, or of the block; returns where that is."""
        kind: Optional[str] = None
        while kind != "stop" and (tokens is self.block or kind not in ("newline", "joined")):
            found = tokens.match(self.source, start)
            kind, start = (found.lastgroup, found.end()) if found else ("stop", start)
            self.brackets += (kind == "open") - (kind == "close")
            if kind == "stop" or kind == "newline" and self.brackets <= 0:
                self.end_statement()
                self.out.append("\n")
                self.follows = False
            elif kind == "semicolon" and self.brackets <= 0:
                self.end_statement()
            elif found and kind != "comment":
                self.statement.append(found[0])
        return start

    def end_statement(self) -> None:
        """Write it, indented by the blocks around it, whatever its own indentation was."""
        code, self.statement, self.brackets = "".join(self.statement).strip(), [], 0
        word = re.split(r"\W", code, maxsplit=1)[0]
        top = self.blocks[-1] if self.blocks else ""
        indent = len(self.blocks)
        if code == "end" or word in STPL_CONTINUES or word == top == "case":
            indent -= 1
            if indent < 0:
                raise self.error(f"`{word}` without a block")
        elif word in STPL_OPENS or (word == "match" and code[-1] == ":") or \
                (word == "case" and top == "match"):
            self.blocks.append(word)
        if code == "end":
            del self.blocks[-2 if top == "case" else -1:]
            code = ""  # and if it follows another, none follows it: Python refuses "a; ; b"
        if code or self.follows:
            self.out.append("; " + code if self.follows else "  " * indent + code)
            self.follows = True

    def error(self, message: str) -> StplSyntaxError:
        line = "".join(self.out).count("\n") + 1
        return StplSyntaxError(f"{self.name}, line {line}: {message}")


class BaseTemplate:
    """What all template languages share. Each brings prepare(**settings) and execute(out, env)."""

    extensions = ["tpl", "html", "thtml", "stpl"]
    settings: Dict[str, Any] = {}  # for prepare(), of all templates of this class
    defaults: Dict[str, Any] = {}  # variables of all templates
    prepare: Callable
    execute: Callable

    def __init__(self, source: Any = None, name: str = "", lookup: Iterable[str] = (),
                 encoding: str = "utf8", **settings: Any) -> None:
        """From a source (str, bytes or file), or from the file `name` in a `lookup` directory."""
        source = source.read() if hasattr(source, "read") else source
        self.source = source.decode(encoding) if isinstance(source, bytes) else source
        self.name = name
        self.lookup = [os.path.abspath(path) for path in lookup]
        self.encoding = encoding
        self.settings = {**self.settings, **settings}
        self.filename = self.search(name, self.lookup) if source is None else None
        if source is None and not self.filename:
            raise TemplateError(f"template {name!r} is not in {self.lookup}")
        self.prepare(**self.settings)

    @classmethod
    def search(cls, name: str, lookup: Iterable[str] = ()) -> Optional[str]:
        """The path of the file `name`, or `name`.tpl..., in the first directory that has it."""
        for directory in lookup:
            root = os.path.join(os.path.abspath(directory), "")
            path = os.path.abspath(os.path.join(root, name))
            for end in ("", *("." + extension for extension in cls.extensions)):
                if path.startswith(root) and os.path.isfile(path + end):  # no ../ leads out
                    return path + end
        return None

    @classmethod
    def global_config(cls, key: str, *value: Any) -> Any:
        """A setting of all templates of this class; with a value, set it."""
        if value:
            cls.settings = {**cls.settings, key: value[0]}
        return cls.settings[key]

    def read(self, path: str) -> str:
        with open(path, encoding=self.encoding, newline="") as file:
            try:
                return file.read()
            except UnicodeDecodeError as error:
                raise TemplateError(f"{path}: {error}") from error

    def render(self, /, *dicts: Mapping, **variables: Any) -> str:
        """The text, with these variables. Several threads may render one template."""
        env = self.defaults.copy()
        out: List[str] = []
        for given in (*dicts, variables):
            env.update(given)
        self.execute(out, env)
        return "".join(out)


class SimpleTemplate(BaseTemplate):
    """Bottle's own template language: SimpleTemplate("{{x}}").render(x="<") -> "&lt;"."""

    def prepare(self, escape_func: Callable = html_escape, noescape: bool = False,
                syntax: Optional[str] = None, **settings: Any) -> None:
        def text(value: Any) -> str:
            if value is None:
                return ""
            return value.decode(self.encoding) if isinstance(value, bytes) else str(value)

        def escape(value: Any) -> str:
            return escape_func(value if type(value) is str else text(value))

        self._str, self._escape = (escape, text) if noescape else (text, escape)
        self.included: Dict[str, SimpleTemplate] = {}
        name = self.filename or "<template>"
        source = self.read(self.filename) if self.filename else self.source
        self.code = StplParser(source, syntax, name).translate()
        self.co = compile(self.code, name, "exec", dont_inherit=True)

    def execute(self, out: List[str], env: Dict[str, Any]) -> Dict[str, Any]:
        """Add the pieces of text to `out`; returns the variables as they are then."""
        env.update(
            _stdout=out, _printlist=out.extend, _str=self._str, _escape=self._escape, _rebase=None,
            get=env.get, setdefault=env.setdefault, defined=env.__contains__,
            include=partial(self._include, env),
            rebase=lambda name, /, **given: env.update(_rebase=(name, given)))
        start = len(out)
        exec(self.co, env)
        if not env["_rebase"]:
            return env
        name, given = env["_rebase"]
        given["base"] = "".join(out[start:])
        del out[start:]
        return self._include(env, name, **given)

    def _include(self, env: Dict[str, Any], name: str, /, **given: Any) -> Dict[str, Any]:
        found = self.included.get(name)
        if found is None:
            found = self.included[name] = type(self)(
                None, name, self.lookup, self.encoding, syntax=self.settings.get("syntax"))
            found.included = self.included  # one that includes itself is compiled once
        return found.execute(env["_stdout"], {**env, **given})


def template(source: Any, /, *dicts: Mapping, template_adapter: Callable = SimpleTemplate,
             template_lookup: Iterable[str] = (), template_settings: Mapping = {},
             **variables: Any) -> str:
    r"""Render a template, by its name or source (what has {, %, $ or \n), with these variables."""
    if isinstance(source, BaseTemplate):
        return source.render(variables, *dicts)
    lookup = tuple(template_lookup or TEMPLATE_PATH)
    key = (template_adapter, source, lookup, repr(template_settings))
    found = None if DEBUG else TEMPLATES.get(key)
    if found is None:
        kind = "source" if set("\n{%$") & set(source) else "name"
        found = template_adapter(**{kind: source}, lookup=lookup, **template_settings)
        if len(TEMPLATES) >= 1000:  # sources that are made at run time must not pile up
            TEMPLATES.clear()
        TEMPLATES[key] = found
    return found.render(variables, *dicts)


def view(name: str, /, **defaults: Any) -> Callable:
    """Decorate a function: the dict that it returns, or None, is rendered with this template."""
    def decorator(func: Callable) -> Callable:
        @wraps(func)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            result = func(*args, **kwargs)
            if result is None or isinstance(result, Mapping):
                return template(name, result or {}, **defaults)
            return result
        return wrapper
    return decorator


# === 11. App ==================================================================
# Routes, hooks and error handlers around the functions that people write, as one WSGI callable. A
# request: minibottle_plan (server only) -> __call__ -> wsgi -> _handle (route, call) -> _respond
# (hooks, if there are any; what awaits) -> _cast (what was returned to bytes) -> _start.

def load(target: str, **names: object) -> Any:
    """"package.module" -> the module; "package.module:name" -> what it has under that name.

    Any expression may follow the colon, with `names` in it: never pass on what a client sent.
    """
    module_name, _, expression = target.partition(":")
    module = import_module(module_name)
    return eval(expression, {**vars(module), **names}) if expression else module


class ConfigDict(dict):
    """Settings by dotted names: config["db.host"]. An overlay (as each route has one of its
    application's) shows what its source has, where it has nothing itself."""

    def __init__(self, source: Optional[ConfigDict] = None) -> None:
        self._source = source
        self._meta: Dict[str, dict] = {} if source is None else source._meta  # key -> {field: …}
        self._listener: Callable = do_nothing  # given (config, key, value) before a change

    def __setitem__(self, key: str, value: object) -> None:
        if not isinstance(key, str):
            raise TypeError(f"the name of a setting is str, not {type(key).__name__}: {key!r}")
        value = self.meta_get(key, "filter", lambda value: value)(value)
        self._listener(self, key, value)
        super().__setitem__(key, value)

    def __missing__(self, key: str) -> Any:
        if self._source is None:
            raise KeyError(key)
        return self._source[key]

    def __iter__(self) -> Iterator[str]:
        own = dict.keys(self)
        return chain(own, (key for key in self._source or () if key not in own))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    # unlike dict's own these ask __missing__() and __iter__()
    get, __contains__ = Mapping.get, Mapping.__contains__  # type: ignore[assignment]
    keys, values, items = Mapping.keys, Mapping.values, Mapping.items  # type: ignore[assignment]

    def setdefault(self, key: str, value: object = None) -> Any:
        if key not in self:
            self[key] = value
        return self[key]

    def update(self, *args: Any, **values: object) -> None:
        """As dict's; a str in front is a prefix: update("db", host="a") sets "db.host"."""
        prefix = args[0].strip(".") + "." if args and isinstance(args[0], str) else ""
        for key, value in dict(*args[bool(prefix):], **values).items():
            self[prefix + key if prefix else key] = value

    def load_dict(self, source: Mapping, namespace: str = "") -> ConfigDict:
        """{"db": {"host": "a"}} sets "db.host"."""
        for key, value in source.items():
            name = f"{namespace}.{key}" if namespace else key
            if isinstance(value, dict):
                self.load_dict(value, name)
            else:
                self[name] = value
        return self

    def load_module(self, name: str, squash: bool = True) -> ConfigDict:
        """The names of a module that are in capitals; `squash`: dicts as load_dict has them."""
        found = {key: value for key, value in vars(load(name)).items() if key.isupper()}
        self.load_dict(found) if squash else self.update(found)
        return self

    def load_config(self, filename: Union[str, List[str]], **options: Any) -> ConfigDict:
        """Settings of INI files, by minibottle_ini.py."""
        return companion("ini").load_config(self, filename, **options)

    def meta_get(self, key: str, field: str, default: object = None) -> Any:
        """What is known of a setting: its "filter" converts what is set."""
        return self._meta.get(key, {}).get(field, default)

    def meta_set(self, key: str, field: str, value: object) -> None:
        self._meta.setdefault(key, {})[field] = value

    def _make_overlay(self) -> ConfigDict:  # Bottle's name for it
        return ConfigDict(self)


class JSONPlugin:
    """Has dicts and lists written by an encoder of one's own: app.install(JSONPlugin(dumps)).

    An App has one from the start that changes nothing, for what looks for it.
    """

    name = "json"
    api = 2

    def __init__(self, json_dumps: Optional[Callable] = json_dumps) -> None:
        self.json_dumps = json_dumps  # None: no JSON

    def apply(self, callback: Callable, route: Route) -> Callable:
        if self.json_dumps is not json_dumps:
            route.config.update("json", dump_func=self.json_dumps, enable=bool(self.json_dumps))
        return callback


class TemplatePlugin:
    """Renders what a route returns: route(…, template="name" or ("name", {"default": 1}))."""

    name = "template"
    api = 2

    def apply(self, callback: Callable, route: Route) -> Callable:
        wanted = route.config.get("template")
        if not wanted:
            return callback
        name, defaults = (wanted, {}) if isinstance(wanted, str) else wanted
        return view(name, **defaults)(callback)


class Plan:
    """What a server may know of a request once its head is in, before its body and the call."""

    __slots__ = ("early", "stream", "max_body", "cancel", "slow", "waits")

    def __init__(self, early: bool = False, stream: bool = False,
                 max_body: Optional[int] = None, cancel: bool = False) -> None:
        self.early = early        # the answer does not need the body: 404, 405
        self.stream = stream      # call when the head is in; the body is read as it arrives
        self.max_body = max_body  # bytes; None: the server's limit
        self.cancel = cancel      # a coroutine ends when its client has gone
        self.waits = cancel       # it has a task to itself: see Guest
        self.slow = 0             # above SLOW_MEMORY: calls have blocked lately. The server's

    def blocked(self) -> None:
        """A call has blocked. Once is chance (another process had the CPU), twice is a habit."""
        self.slow = min(self.slow + SLOW_MEMORY, 2 * SLOW_MEMORY)

    def took(self, seconds: float) -> None:
        """What a call took: did it block?"""
        if seconds > SLOW_SECONDS:
            self.blocked()
        else:
            self.slow = max(0, self.slow - 1)


SLOW_SECONDS = 0.001  # a call that lasts longer has blocked
SLOW_MEMORY = 16      # a route that blocks twice within so many calls is called on a thread
EARLY = Plan(early=True)
LATE = Plan()


class Route:
    """A rule, and the function or Handler class behind it with its plugins."""

    def __init__(self, app: App, rule: str, method: str, callback: Callable,
                 name: Optional[str] = None, plugins: Optional[list] = None,
                 skiplist: Optional[list] = None, stream: bool = False,
                 max_body: Optional[int] = None, cancel: bool = False, **config: object) -> None:
        self.app = app
        self.rule = rule
        self.method = method
        self.callback = callback        # without plugins
        self.name = name
        self.plugins = plugins or []    # besides those of the application
        self.skiplist = skiplist or []  # plugins, their names or classes, or True: all
        self.config = app.config._make_overlay().load_dict(config)
        self.plan = None if isinstance(callback, Mount) else Plan(False, stream, max_body, cancel)
        self.wants_request = (
            not is_handler(callback) and parameters_of(callback)[:1] == ["request"]
            and all(part[0] != "request" for part in app.router.parse(rule)
                    if type(part) is not str))
        self.reset()

    def __repr__(self) -> str:
        return f"<{self.method} {self.rule} -> {name_of(self.callback)}>"

    def _first_call(self, **args: object) -> object:
        self.prepare()
        return self.call(**args)

    def reset(self) -> None:
        """Apply the plugins anew at the next request."""
        self.call: Callable = self._first_call
        self.json_dumps: Optional[Callable] = None

    def prepare(self) -> None:
        """Apply the plugins now: `call` is the callback in all of them."""
        self.call = self._make_callback()
        self.json_dumps = json_dumps_of(self.config)

    def all_plugins(self) -> Iterator[Any]:
        """Those that count, innermost first. Of one name it is the one that came last."""
        seen: Set[Optional[str]] = set()
        for plugin in reversed(self.app.plugins + self.plugins):
            name = getattr(plugin, "name", None)
            if (True in self.skiplist or plugin in self.skiplist or type(plugin) in self.skiplist
                    or name and (name in seen or name in self.skiplist)):
                continue
            seen.add(name)
            yield plugin

    def _make_callback(self) -> Callable:
        callback = partial(run_handler, self.callback) if is_handler(self.callback) \
            else self.callback
        for plugin in self.all_plugins():
            plain = callback
            callback = plugin.apply(plain, self) if hasattr(plugin, "apply") else plugin(plain)
            try:
                callback is plain or update_wrapper(callback, self.callback)
            except AttributeError:
                pass  # a bound method
        return callback

    def get_undecorated_callback(self) -> Callable:
        """The callback without decorators, for Bottle's plugins; it needs minibottle_ext.py."""
        return companion("ext").undecorated(self.callback)

    def get_callback_args(self) -> List[str]:
        """The names of what the callback takes."""
        return parameters_of(self.get_undecorated_callback())


def json_dumps_of(config: ConfigDict) -> Callable:
    """What writes JSON: json.dump_func, or by json.indent and json.ascii."""
    if not config.get("json.enable"):
        return refuse_json
    return config.get("json.dump_func") or json_encoder(
        indent=config.get("json.indent"), ensure_ascii=config.get("json.ascii", True))


def refuse_json(value: object) -> NoReturn:
    raise TypeError(f"a {type(value).__name__} cannot be sent: json.enable is off")


def name_of(callback: Callable) -> str:
    return (f"{getattr(callback, '__module__', '?')}:"
            f"{getattr(callback, '__qualname__', type(callback).__name__)}")


def signature_of(callback: Callable) -> Optional[list]:
    """The inspect.Parameters that a caller fills in; None if they cannot be seen."""
    import inspect
    try:
        return list(inspect.signature(callback).parameters.values())
    except (TypeError, ValueError):
        return None


def parameters_of(callback: Callable) -> List[str]:
    """Their names: not `self` of a bound method, nor *args."""
    if isinstance(callback, type(parameters_of)) and not hasattr(callback, "__wrapped__"):
        code = callback.__code__  # FAST: importing inspect takes 6 ms
        return list(code.co_varnames[:code.co_argcount + code.co_kwonlyargcount])
    return [p.name for p in signature_of(callback) or ()
            if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


class Mount:
    """Another application, WSGI, as the function behind a route."""

    def __init__(self, parent: App, app: Callable, depth: int) -> None:
        self.parent = parent
        self.app = app
        self.depth = depth  # segments of the prefix
        self.learned = Plan()

    def shift(self, environ: Dict[str, Any]) -> Dict[str, Any]:
        """A copy of environ, with the prefix in SCRIPT_NAME."""
        segments = environ.get("PATH_INFO", "").split("/")
        prefix = environ.get("SCRIPT_NAME", "").rstrip("/") + "/".join(segments[:self.depth + 1])
        return {**environ, "SCRIPT_NAME": prefix, "minibottle.response": None,
                "PATH_INFO": "/" + "/".join(segments[self.depth + 1:]),
                "minibottle.above": {self.parent: environ, **environ.get("minibottle.above", {})}}

    def plan(self, environ: Dict[str, Any]) -> Plan:
        plan = getattr(self.app, "minibottle_plan", None)
        return plan(self.shift(environ)) if plan else self.learned

    def __call__(self, **wildcards: object) -> Any:
        return drive(self.respond())

    async def respond(self) -> HTTPResponse:
        """What the application answers. Besides the path all that it leaves in environ counts."""
        environ = request.environ
        inner = self.shift(environ)
        try:
            (status, headers, exc_info), body = await ask_wsgi(self.app, inner)
        finally:
            environ.update({key: value for key, value in inner.items() if key not in OF_THE_MOUNT})
        try:
            if exc_info:
                raise exc_info[1]
            answer = HTTPResponse(body, status)
            for name, value in headers:
                answer.add_header(name, wsgi_to_text(value, "replace"))
        except BaseException:
            close_all(body)
            raise
        return answer


OF_THE_MOUNT = ("SCRIPT_NAME", "PATH_INFO", "minibottle.route", "minibottle.response",
                "minibottle.above")


class Handler:
    """A class whose methods answer the verbs: one instance a request, which it is given.

        class Note(Handler):
            def get(self, id): return NOTES[id]
        app.route("/notes/<id:int>", Note)
    """

    verbs: Dict[str, Callable] = {}
    request: Request
    response: Response
    _written: List[bytes]  # by write()

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        methods = {verb: getattr(cls, verb.lower(), None) for verb in VERBS}
        cls.verbs = {verb: method for verb, method in methods.items() if callable(method)}

    def prepare(self) -> object:
        """Before the verb. What it returns, if not None, is the answer instead of the verb's."""

    def on_error(self, error: HTTPError) -> object:
        """The body of an error page; raise `error` to have the application's."""
        raise error

    def on_finish(self) -> None:
        """After the verb, whatever came of it; the answer is made, so it changes nothing."""

    def write(self, piece: Any) -> None:
        """Add to the body (str, bytes, or a dict as JSON) of a verb that returns None."""
        if isinstance(piece, (dict, list)):
            self.response.content_type = "application/json"
            piece = json_dumps(piece)
        self._written.append(piece.encode("utf-8") if isinstance(piece, str) else bytes(piece))

    def set_header(self, name: str, value: object) -> None:
        self.response.set_header(name, value)

    def set_status(self, status: Union[int, str]) -> None:
        self.response.status = status

    def redirect(self, url: str, code: Optional[int] = None) -> NoReturn:
        redirect(url, code, request=self.request)


def is_handler(callback: Any) -> bool:
    return isinstance(callback, type) and issubclass(callback, Handler)


def run_handler(cls: Any, /, **args: object) -> object:
    """One request through a Handler class."""
    return drive(serve_handler(cls, args))


async def serve_handler(cls: Any, args: Dict[str, Any]) -> object:
    handler = cls()
    handler.request = own = Request(CURRENT.get())
    handler.response = response_of(own.environ)
    handler._written = []
    verb = cls.verbs.get(own.method) or cls.verbs["GET"]  # HEAD, where there is only GET
    try:
        try:
            out = await settle(handler.prepare())
            if out is None:
                out = await settle(verb(handler, **args))
            if isinstance(out, HTTPError):
                raise out
            if hasattr(out, "__next__"):
                out = await begin(out)
        except Exception as error:
            page = own.app.failure(error)
            if not isinstance(page, HTTPError):
                raise
            handler.response.merge(page)
            handler._written.clear()
            out = await settle(handler.on_error(page))
        return b"".join(handler._written) if out is None else out
    finally:
        await settle(handler.on_finish())


def shortcut_of(verb: str) -> Callable:
    def shortcut(self, path=None, method=verb, **options):
        return self.route(path, method, **options)
    shortcut.__name__, shortcut.__doc__ = verb.lower(), f"route(), for {verb}."
    return shortcut


class App:
    """An application: routes, hooks, error handlers. A WSGI callable, and Bottle's `Bottle`."""

    def __init__(self, *, catchall: bool = True, autojson: bool = True,
                 json_dumps: Optional[Callable] = None, **config: object) -> None:
        self.routes: List[Route] = []
        self.router = Router()
        self.error_handler: Dict[Any, Callable] = {}  # by status or exception class
        self.plugins: List[Any] = [JSONPlugin(), TemplatePlugin()]
        self._hooks: Dict[str, List[Callable]] = {  # in the order of their calls
            name: [] for name in (
                "before_request", "after_request", "app_reset", "config", "start", "stop")}
        self._before, self._after = self._hooks["before_request"], self._hooks["after_request"]
        self.config = ConfigDict().load_dict(config)
        self.config.update(catchall=catchall)
        self.config.update("json", enable=autojson, dump_func=json_dumps)
        self.config._listener = partial(self.trigger_hook, "config")

    def __setattr__(self, name: str, value: object) -> None:
        # not by self.__dict__: having asked for that makes every attribute slower (CPython 3.11)
        if hasattr(self, name) and not hasattr(type(self), name):
            raise AttributeError(f"{name} is set already: a conflict of plugins? `del` it first")
        object.__setattr__(self, name, value)

    # False: exceptions go on to the server or middleware
    catchall = property(lambda self: self.config["catchall"],
                        lambda self, value: self.config.update(catchall=value))

    @cached_property
    def resources(self) -> Any:
        """A ResourceManager, of minibottle_resources.py."""
        return companion("resources").ResourceManager()

    def __enter__(self) -> App:
        """In `with app:` it is the default application."""
        default_app.push(self)
        return self

    def __exit__(self, *error: object) -> None:
        default_app.remove(self)

    # -- what people say --

    def route(self, path=None, method="GET", callback=None, name=None, apply=None, skip=None,
              **config):
        """Bind a function or Handler class to a rule (or several), also as a decorator.

        Without a rule those of yieldroutes(). `method` is one or a list; a Handler class brings its
        own. `apply`: plugins for this route; `skip`: plugins, names or classes of them, or True.
        `stream=True`: call it when the head is in, and let it read the body from
        request.stream as it arrives. `max_body`: bytes. `cancel=True`: cancel an async function
        when its client has gone. The rest is for plugins.
        """
        if is_handler(method):  # route("/x", Note)
            method, callback = None, method
        if callable(path):  # @route
            path, callback = None, path

        def decorator(callback: Any) -> Any:
            callback = load(callback) if isinstance(callback, str) else callback
            methods = list(callback.verbs) if is_handler(callback) else listed(method)
            if not methods:
                raise RouteError(f"{name_of(callback)} has no verb such as get")
            if not listed(path) and not hasattr(callback, "__code__"):
                raise RouteError("route() needs a rule, such as '/hello/<name>'")
            for rule in listed(path) or companion("ext").yieldroutes(callback):
                for verb in methods:
                    self.add_route(Route(self, rule, verb.upper(), callback, name, listed(apply),
                                         listed(skip), **config))
            return callback

        return decorator(callback) if callback else decorator

    def add_route(self, route: Route) -> None:
        """Add a Route, which stays that of its application, with its plugins."""
        self.routes.append(route)
        self.router.add(route.rule, route.method, route, route.name)

    def merge(self, routes: Union[App, Iterable[Route]]) -> None:
        """Add the routes of another App."""
        for route in routes.routes if isinstance(routes, App) else routes:
            self.add_route(route)

    def mount(self, prefix: str, app: Callable, **options: Any) -> None:
        """Give all below a prefix to another WSGI application; an App there has its own hooks,
        plugins and error handlers. "/x" takes "/x" and "/x/…", "/x/" the latter only."""
        segments = [segment for segment in prefix.split("/") if segment]
        if not prefix.startswith("/") or not segments:
            raise ValueError(f"bad prefix {prefix!r}; one is '/blog/', and merge() needs none")
        base = "/" + "/".join(segments)
        if isinstance(app, App):
            app.config.update("_mount", prefix=prefix, app=self)
            self.router.mounted.append((base, app.router))
        options = {"skip": True, "method": "PROXY", **options}
        self.route([base + "/<:re:.*>"] + [base] * (not prefix.endswith("/")),
                   callback=Mount(self, app, len(segments)),
                   mountpoint={"prefix": prefix, "target": app}, **options)

    def install(self, plugin: Any) -> Any:
        """Wrap a plugin around the routes, inside of those that are there: a decorator, or what
        has apply(callback, route). Its setup(app) is called now, its close() at the end."""
        if not callable(plugin) and not hasattr(plugin, "apply"):
            raise TypeError(f"a plugin is callable or has apply(), not {plugin!r:.60}")
        getattr(plugin, "setup", do_nothing)(self)
        self.plugins.append(plugin)
        self.reset()
        return plugin

    def uninstall(self, plugin: Any) -> list:
        """Remove a plugin, those of a class or name, or all (True); returns them, newest first."""
        removed = [it for it in reversed(self.plugins) if plugin is True
                   or plugin in (it, type(it), getattr(it, "name", it))]
        for gone in removed:
            self.plugins.remove(gone)
            close_all(gone)
        if removed:
            self.reset()
        return removed

    def reset(self, route: Union[Route, int, None] = None) -> None:
        """Apply the plugins anew, to all routes or to one (or its place in `routes`)."""
        for each in self.routes if route is None else [
                route if isinstance(route, Route) else self.routes[route]]:
            each.reset()
        self.trigger_hook("app_reset")

    def close(self) -> None:
        """Close the plugins."""
        close_all(*self.plugins)

    get, post, put, delete, patch = map(shortcut_of, ("GET", "POST", "PUT", "DELETE", "PATCH"))

    def error(self, code=500, callback=None):
        """Bind a function to a status, or to a class of exceptions that nothing else handles: it is
        given the HTTPError (and its `exception`), and returns the body."""
        def decorator(callback: Any) -> Any:
            callback = load(callback) if isinstance(callback, str) else callback
            self.error_handler[code if isinstance(code, type) else int(code)] = callback
            return callback
        return decorator(callback) if callback else decorator

    def add_hook(self, name: str, func: Callable) -> None:
        """`before_request` (a Response that it returns or raises ends the request), in order;
        `after_request`, in reverse, after every request, errors too; `app_reset`, when plugins
        change; `config`, given (config, key, value) before a setting changes; `start`, `stop`:
        see on_start."""
        if name not in self._hooks:
            raise KeyError(f"no hook {name!r}; there are {', '.join(self._hooks)}")
        self._hooks[name].insert(0 if name == "after_request" else len(self._hooks[name]), func)

    def on_start(self, func: Callable) -> Callable:
        """Have a function, sync or async, called in each worker before it serves."""
        return self.hook("start")(func)

    def on_stop(self, func: Callable) -> Callable:
        """Have it called in each worker when all requests have ended."""
        return self.hook("stop")(func)

    def remove_hook(self, name: str, func: Callable) -> Optional[bool]:
        """True if it was there."""
        if func in self._hooks[name]:
            self._hooks[name].remove(func)
            return True
        return None

    def trigger_hook(self, name: str, /, *args: object, **kwargs: object) -> list:
        """Call the hooks of a name: what they return."""
        return [hook(*args, **kwargs) for hook in list(self._hooks[name])]

    def hook(self, name: str) -> Callable:
        """add_hook as a decorator."""
        def decorator(func: Callable) -> Callable:
            self.add_hook(name, func)
            return func
        return decorator

    def get_url(self, name: str, /, **args: object) -> str:
        """The path of a route, here or mounted, by its name or rule; other `args`: the query."""
        environ = CURRENT.get({})
        environ = environ.get("minibottle.above", {}).get(self, environ)
        prefix = percent_encode(Request(environ).script_name.rstrip("/"))
        return prefix + self.router.build(name, **args)

    def match(self, environ: Dict[str, Any]) -> Tuple[Route, dict]:
        """(route, arguments). Raises HTTPError 400, 404, 405."""
        return self._find(environ)[3:]

    def websocket(self, path: str, **options: Any) -> Callable:
        """Decorate what is to speak WebSocket: it needs minibottle_websocket.py beside us."""
        return companion("websocket").websocket(self, path, **options)

    def run(self, **options: Any) -> None:
        """Serve this application; see minibottle.run."""
        run(self, **options)

    # -- a request --

    def __call__(self, environ: Dict[str, Any], start_response: Callable) -> Iterable[bytes]:
        return self.wsgi(environ, start_response)

    def minibottle_plan(self, environ: Dict[str, Any]) -> Plan:
        """For the server, once the head is in: route, and say how the call is to be made.

        Runs no code of the application's: filters convert later.
        """
        known = self.router.memo.get(environ["REQUEST_METHOD"])  # FAST: as _look_up() begins
        found = known and known.get(environ["PATH_INFO"]) or self._look_up(environ)
        environ["minibottle.route"] = found
        route = found[3]
        plan = EARLY if route is None else route.plan
        if plan is None:
            plan = route.callback.plan(environ)  # of a Mount
        # a hook or a middleware may yet change the path, and then somebody wants the body
        if plan is EARLY and (self._before or getattr(self.wsgi, "__self__", None) is not self):
            return LATE
        return plan

    def _look_up(self, environ: Dict[str, Any]) -> tuple:
        """(self, method, PATH_INFO, *what Router.find() found)."""
        method = environ["REQUEST_METHOD"]
        info = environ.get("PATH_INFO", "")
        known = self.router.memo.get(method)
        found = known and known.get(info)  # FAST: a memo of static routes, 3 times as fast
        if found:
            return found
        try:
            route, args = self.router.find(method, wsgi_to_text(info) or "/")
        except UnicodeError:
            route, args = None, HTTPError(400, "The path is not UTF-8.")
        found = self, method, info, route, args
        if args is NO_ARGS and method in VERBS:
            self.router.memo.setdefault(method, {})[info] = found
        return found

    def _find(self, environ: Dict[str, Any]) -> tuple:
        """(self, method, PATH_INFO, route, arguments). Raises HTTPResponse, BadRequest."""
        found = environ.get("minibottle.route")
        if (not found or found[0] is not self or found[2] != environ.get("PATH_INFO", "")
                or found[1] != environ["REQUEST_METHOD"]):  # changed since the plan, or no plan
            if "minibottle.refused" in environ:
                raise environ["minibottle.refused"]
            found = environ["minibottle.route"] = self._look_up(environ)
        if found[3] is None:
            environ.setdefault("minibottle.response", found[4])  # FAST: no need to copy it
            raise found[4]
        if type(found[4]) is not dict:
            found = environ["minibottle.route"] = found[:4] + (found[4](),)
        return found

    def _handle(self, environ: Dict[str, Any]) -> Any:
        """Route and call: what was returned, or the HTTPResponse that was raised."""
        try:
            found = self._find(environ)
            route, args = found[3], found[4]
            call = route.call
            if route.wants_request:
                return call(request=Request(environ), **args)
            return call(**args) if args else call()  # FAST: without ** half a microsecond shorter
        except Exception as error:
            return self.failure(error)

    async def _respond(self, start: Callable, environ: Dict[str, Any], out: Any) -> Any:
        """The hooks around _handle(), and what becomes of `out`: the body."""
        try:
            try:
                for hook in self._before:
                    out = await settle(hook())
                    if isinstance(out, Response):
                        break
                else:
                    out = self._handle(environ) if self._before else out
                    if hasattr(out, "__await__"):  # FAST: settle(), inline, and as wsgi() ends
                        await SWITCH
                        out = await out
                        if (type(out) is str and not self._after
                                and environ.get("minibottle.response") is None):
                            return start(out.encode("utf-8"), HTML)
            except Exception as error:
                out = self.failure(error)
            if isinstance(out, Response):
                out = self._apply(out)
            try:
                for hook in self._after:
                    await settle(hook())
            except Exception:
                close_all(out)
                raise
            out = await self._cast(out)
        except Exception as error:  # what was returned cannot be sent, or raised another answer
            out = await self._cast(self._apply(self.failure(error)))
        return start(out, HTML)

    def _start(self, environ: Dict[str, Any], start_response: Callable, counts: bool, out: Any,
               kind: Field) -> Iterable[bytes]:
        """Give the head to the server, and return the body. `kind`: its type, where there is no
        Response. `counts`: the server knows the length of what it sends."""
        answer = environ.get("minibottle.response")
        is_head = environ["REQUEST_METHOD"] == "HEAD"
        if answer is None:
            status, headers, has_body = "200 OK", [kind], True
        else:
            status, headers = answer.status_line, answer.headerlist
            has_body = answer.status_code not in BODILESS
        if "minibottle.files" in environ and "minibottle.above" not in environ:
            out = closing_too(out, environ["minibottle.files"])
        if type(out) is bytes:
            if (is_head or not counts) and has_body and (
                    answer is None or "Content-Length" not in answer._headers.dict):
                headers.append(("Content-Length", str(len(out))))
            out = [out]
        try:
            start_response(status, headers)
        except BaseException:
            close_all(out)
            raise
        if has_body and not is_head:
            return out
        close_all(out)
        return []

    def _apply(self, out: Response) -> object:
        """Status, headers and cookies of a returned or raised Response onto the request's own."""
        own = response_of(request.environ)
        if out is not own and not isinstance(out, LocalResponse):
            own.merge(out)
        return out if isinstance(out, HTTPError) else out.body

    def failure(self, error: BaseException) -> HTTPResponse:
        """The answer to an exception, which is logged if it is no fault of the client's."""
        if isinstance(error, HTTPResponse):
            return error
        if getattr(error, "minibottle_peer", False):
            return HTTPError(getattr(error, "status", 400), str(error), error)
        if not self.catchall or request.get("minibottle.raise_errors"):
            raise error
        method, path = request.get("REQUEST_METHOD", "?"), request.get("PATH_INFO", "?")
        log.error("%s %s: unhandled exception", printable(method), printable(path), exc_info=error)
        from traceback import format_exc
        return HTTPError(500, "Internal Server Error", error, format_exc())

    def default_error_handler(self, res: HTTPError) -> object:
        """The page of an error that has no handler of its own; override it for another look."""
        if isinstance(res.body, (dict, list)):
            return res.body
        if DEBUG and res.traceback:
            try:
                page = companion("debugging").debug_page(res)
            except MissingFile:
                page = None
            if page:
                return page
        title = html_escape(res.status_line)
        body = res.body.decode("utf-8", "replace") if isinstance(res.body, bytes) else res.body
        cause = f"<pre>{html_escape(res.traceback)}</pre>\n" if DEBUG and res.traceback else ""
        return ERROR_PAGE.format(title=title, text=html_escape(str(body or "")),
                                 cause=cause).encode("utf-8")

    # -- what was returned, to bytes --

    async def _cast(self, out: Any) -> Any:
        """A returned value -> the body, as bytes or as an iterable of bytes."""
        if isinstance(out, HTTPError):
            return await self._cast_error(out)
        if isinstance(out, str):
            return out.encode(response.charset)
        if isinstance(out, (bytes, bytearray, memoryview)):
            return bytes(out)
        if isinstance(out, dict) or isinstance(out, list) and not (
                out and isinstance(out[0], (str, bytes, HTTPResponse))):
            data = self._dump_json(out)
            response.content_type = "application/json"
            return data
        if not out:  # None, False, 0, ()
            return b""
        if isinstance(out, (list, tuple)):
            return b"".join([encode_piece(piece, response.charset) for piece in out])
        if isinstance(out, io.TextIOBase):
            return await begin(FileWrapper(out))  # type: ignore[arg-type]
        if isinstance(out, FileWrapper):  # a range, or of a mounted application
            return out
        if hasattr(out, "read"):
            wrap = request.environ.get("wsgi.file_wrapper") or FileWrapper
            return wrap(out)
        if hasattr(out, "__aiter__") or hasattr(out, "__iter__"):
            return await begin(out)
        raise TypeError(f"a handler cannot return {type(out).__name__}: {out!r:.60}")

    def _dump_json(self, out: Union[dict, list]) -> bytes:
        """As the settings of the route want it."""
        found = request.environ.get("minibottle.route")
        dumps = found and found[3] and found[3].json_dumps or json_dumps_of(self.config)
        text = dumps(out)
        return text.encode("utf-8") if isinstance(text, str) else text

    def _error_handler_of(self, error: HTTPError) -> Callable:
        """Of this application, else of the one that it is mounted in."""
        keys: list = [error.status_code]
        if error.status_code == 500:
            keys = [*type(error.exception).__mro__, 500]
        for app in (self, *request.environ.get("minibottle.above", ())):
            for key in keys:
                if key in app.error_handler:
                    return app.error_handler[key]
            page = app.default_error_handler
            if getattr(page, "__func__", None) is not App.default_error_handler:
                return page
        return self.default_error_handler

    async def _cast_error(self, error: HTTPError) -> Any:
        """The page for an HTTPError. A handler that fails costs its page, and no more."""
        handler = self._error_handler_of(error)
        try:
            out = await settle(handler(error))
            if out is error:
                raise RuntimeError("it returned what it was given")
            if isinstance(out, Response):
                out = self._apply(out)
            if isinstance(out, HTTPError):  # another error: its own text, or its default page
                out = self.default_error_handler(out) if out.body is None else out.body
            return await self._cast(out)
        except Exception as failure:
            log.error("the error handler for %s failed", error.status_line, exc_info=failure)
        response.status = 500
        response.content_type = "text/plain; charset=UTF-8"
        return b"500 Internal Server Error: the error handler failed\n"

    def wsgi(self, environ: Dict[str, Any], start_response: Callable) -> Iterable[bytes]:
        """The WSGI application (PEP 3333). Wrap it to add a middleware: app.wsgi = M(app.wsgi)."""
        token = CURRENT.set(environ)
        planned: Any = environ.get("minibottle.route")
        # FAST: our server counts the body by itself, where nothing is between us and it
        counts = bool(planned) and planned[0] is self
        try:
            out: Any = None if self._before else self._handle(environ)
            kind = None
            if not self._after and environ.get("minibottle.response") is None:
                try:
                    if type(out) is str:  # FAST: the most common first; _respond() agrees
                        out, kind = out.encode("utf-8"), HTML
                    elif type(out) is dict:
                        out, kind = self._dump_json(out), JSON
                except Exception as error:
                    out = self.failure(error)
            if kind:
                return self._start(environ, start_response, counts, out, kind)
            start = partial(self._start, environ, start_response, counts)
            return drive(self._respond(start, environ, out))
        finally:
            CURRENT.reset(token)


class AppStack(list):
    """The applications that the shortcuts act on: calling it gives the top one, made if needed."""

    def __call__(self) -> App:
        return self[-1] if self else self.push()

    default = property(__call__)

    def push(self, app: Optional[App] = None) -> App:
        self.append(app if isinstance(app, App) else App())
        return self[-1]

    new_app = push


app = apps = default_app = AppStack()
Bottle = App
HTML = ("Content-Type", Response.default_content_type)
JSON = ("Content-Type", "application/json")
BODILESS = (100, 101, 204, 304)
ERROR_PAGE = """<!DOCTYPE html>
<html><head><meta charset="utf-8"><title>{title}</title></head>
<body><h1>{title}</h1><p>{text}</p>
{cause}</body></html>
"""


def listed(value: object) -> list:
    """"a" -> ["a"], ("a", "b") -> ["a", "b"], None -> []."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple, set)) else [value]


def run_lifecycle(app: Any, name: str, seconds: Optional[float] = None) -> None:
    """Call the hooks of a worker's "start" or "stop"; an async one may take so long. First those of
    an App (it may be in a middleware), then those mounted or merged there; at the stop last."""
    found: List[App] = []
    todo = [app]
    for app in todo:  # which grows
        if not isinstance(app, App):
            known: dict = getattr(app, "__dict__", {})
            todo += [known[name] for name in ("app", "application", "wsgi_app") if name in known]
        elif app not in found:
            found.append(app)
            for route in app.routes:
                todo += [route.app, getattr(route.callback, "app", None)]
    for app in found[::-1 if name == "stop" else 1]:
        for hook in app._hooks[name]:
            out = hook()
            if hasattr(out, "__await__"):
                bridge.wait(copy_context(), settle(out), seconds)


def closing_too(out: Any, files: list) -> Any:
    """A body that closes `files` at its end; at once, if it is bytes."""
    if type(out) is bytes:
        close_all(*files)
        return out
    if type(out) is AsyncBody:
        out.files = files
        return out
    body = Body(out)
    body.close = partial(close_all, out, *files)
    return body


def printable(text: object) -> str:
    """For a log line: control characters and what is not ASCII escaped."""
    return str(text).encode("unicode_escape").decode("ascii").replace('"', '\\"')


# === 12. Event loop ===========================================================
# One loop, which changes threads when user code blocks. Three things have owners, and each changes
# hands by one atomic container operation, never by a flag and a check:
#   the loop       one ticket. In the hand of the thread that runs the loop, on that thread's own
#                  `table` while user code runs, or on nobody's while no thread is free; whoever
#                  pops it from there has the loop.
#   a connection   in `ready` (only the loop takes from it), in `again` (has unread requests), with
#                  a job in `waiting` (needs a thread), in one thread's hands, or closed.
#   a spare thread in `spares`, under the lock; popped is promised.
# The monitor (the worker's main thread, which runs no user code) takes the ticket of a call that
# lasts, and gives it to a spare: first the receiver, then the ticket.

IN, OUT, OFF = 1, 4, 1 << 30  # EPOLLIN, EPOLLOUT, EPOLLONESHOT: a mask of 0 would let HUP spin

MONITOR_SECONDS = 0.005     # a call that lasts longer costs the loop's thread the loop
SPARE_SECONDS = 10.0        # an unused thread ends
SWEEP_SECONDS = 0.25        # deadlines are looked at no more often
HEARTBEAT_SECONDS = 5.0
PAUSE_SECONDS = 0.5         # no descriptors: the listeners are left for so long
ACCEPT_BATCH = 16           # connections a turn; the others wait, and so do those behind them
POLL_BATCH = 32             # events a turn; in a burst, what awaits begins with the first of them
DRAIN_IDLE_SECONDS = 2.0    # a draining worker closes what stays idle for so long (RFC 9112 9.3.1)
SHUT_DOWN_SECONDS = 0.2     # threads that no user code holds end in less
LINGER_SECONDS = 2.0        # input is read and dropped for so long, so that the answer arrives

monotonic = time.monotonic


def heartbeat_of(settings: Settings) -> float:
    """Seconds between the looks at what lasts too long."""
    return min(HEARTBEAT_SECONDS, max(0.5, settings.worker_timeout / 4))


class SelectorPoll:
    """select.epoll's methods over `selectors`, for systems that have none. Not as fast."""

    def __init__(self) -> None:
        import selectors
        self.selector = selectors.DefaultSelector()
        self.close = self.selector.close

    def modify(self, fd: int, mask: int) -> None:
        self.unregister(fd)
        if mask != OFF:
            self.selector.register(fd, {IN: 1, OUT: 2}[mask])  # EVENT_READ, EVENT_WRITE

    register = modify

    def unregister(self, fd: int) -> None:
        if fd in self.selector.get_map():
            self.selector.unregister(fd)

    def poll(self, timeout: float, maxevents: int) -> List[Tuple[int, int]]:
        ready = self.selector.select(None if timeout < 0 else timeout)
        return [(key.fd, events) for key, events in ready[:maxevents]]


class Waker:
    """A pair of sockets: `wake()` from any thread ends a poll that watches `fd`."""

    def __init__(self) -> None:
        self.reader, self.writer = socket.socketpair()
        self.reader.setblocking(False)
        self.writer.setblocking(False)
        self.fd = self.reader.fileno()
        self.rung = False                  # FAST: one system call for all who wake it
        self.kept: Optional[int] = None    # whom signals woke before
        self.handlers: Dict[int, Any] = {}  # and what they called

    def wake(self) -> None:
        if not self.rung:
            self.rung = True
            try:
                self.writer.send(b"x")
            except OSError:  # full: it wakes anyway
                pass

    def drain(self) -> bytes:
        """Whoever is woken looks at what there is afterwards."""
        try:
            return self.reader.recv(4096)
        except OSError:
            return b""
        finally:
            self.rung = False

    def wait(self, timeout: float) -> None:
        self.reader.settimeout(timeout)
        self.drain()

    def on_signals(self, handlers: Dict[int, Any]) -> None:
        """Let these signals call these functions, and wake it from C, since one may come just
        before a wait. Until it is closed."""
        self.kept = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        for number, handler in handlers.items():
            self.handlers[number] = signal.signal(number, handler)

    def close(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.kept is not None:
            signal.set_wakeup_fd(self.kept)
        self.reader.close()
        self.writer.close()


class Hand:
    """A thread, as the others see it."""

    __slots__ = ("table", "wake", "holds", "since", "hung", "exchange", "thread")

    def __init__(self) -> None:
        self.table: List[float] = []  # the ticket (the time the call began) while user code runs
        self.wake = _thread.allocate_lock()
        self.wake.acquire()
        self.holds = False            # it has the loop; only the thread itself clears it
        self.since = 0.0              # when its call began; 0.0: it runs none
        self.hung = 0.0               # the same, of the call that was reported
        self.exchange: Optional["Exchange"] = None  # what it calls for
        self.thread: Any = None


IDLE, HEAD, BODY, WRITE, LINGER, AWAY = "idle", "head", "body", "write", "linger", "away"


class Connection:
    """What an idle connection costs."""

    __slots__ = ("sock", "fd", "addr", "port", "template", "buf", "want", "mask", "phase",
                 "deadline", "exchange")

    def __init__(self, sock: socket.socket, peer: Any, template: Template, deadline: float) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.addr = peer[0] if isinstance(peer, tuple) else ""  # "" of a Unix socket
        self.port = str(peer[1]) if isinstance(peer, tuple) else ""
        self.template = template
        self.buf = b""            # read, and not used yet
        self.want = IN            # what it waits for: IN or OUT
        self.mask = IN            # what the poller watches it for: want, or OFF
        self.phase = IDLE
        self.deadline = deadline  # monotonic seconds
        self.exchange: Any = None  # an Exchange that is begun, and not ended; AWAY: see leave_http


class Loop:
    """The loop, its threads and its monitor. What is done with a connection, Worker says."""

    on_event: Callable[[Connection, Hand], None]     # the poller has seen it
    advance: Callable[[Connection, Hand], None]      # it has bytes of a next request
    on_expired: Callable[[Connection, Hand], None]   # its deadline has passed
    refuse: Callable[[Connection, BaseException, Hand], None]  # our own code failed
    call: Callable[["Exchange", Hand], None]         # a request has a thread
    on_error: Callable[["Exchange", BaseException, Hand], None]  # it has none in time
    release: Callable[["Exchange", Hand], None]      # it will not be answered
    on_turn: Callable[[Hand], None]                  # after each poll
    on_taken_event: Callable[[Connection], None]     # seen while a thread or asyncio has it
    on_hung: Callable[[Hand, float], None]           # a call lasts too long

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.poller: Any = select.epoll() if hasattr(select, "epoll") else SelectorPoll()
        self.waker = Waker()           # wakes the loop
        self.bell = Waker()            # wakes the monitor
        self.watched: Dict[int, Callable[[], object]] = {self.waker.fd: self.waker.drain}
        self.poller.register(self.waker.fd, IN)
        self.lock = _thread.allocate_lock()
        self.ready: Dict[int, Connection] = {}
        self.connections: Dict[int, Connection] = {}
        self.again: Deque[Connection] = deque()
        self.waiting: Deque[Tuple[float, "Exchange"]] = deque()
        self.spares: List[Hand] = []
        self.hands: List[Hand] = []
        self.aside = Hand()            # asyncio's thread: it never has the loop
        self.nobody = Hand()           # on its table the ticket lies when no thread is free for it
        self.nobody.table.append(0.0)
        self.holder = self.nobody
        self.asleep: List[int] = []    # not empty: the monitor sleeps
        self.listeners: Dict[int, Tuple[socket.socket, Template]] = {}
        self.paused = False            # the listeners are left
        self.resume_at = 0.0           # until then
        self.draining = 0.0            # until then what is begun may end; 0.0: not draining
        self.keepalive_timeout = settings.keepalive_timeout
        self.drain_idle_seconds = DRAIN_IDLE_SECONDS  # what it is then
        self.over = False
        self.sweep_at = 0.0
        # No new deadline is sooner than that: so long the loop may sleep.
        self.soonest = min(settings.header_timeout, settings.body_timeout,
                           settings.keepalive_timeout, settings.write_timeout, LINGER_SECONDS)
        self.heartbeat = heartbeat_of(settings)
        self.beat_at = 0.0

    def on_heartbeat(self, now: float) -> None:
        """Every few seconds, on the monitor: find the calls that last too long."""
        aside = self.aside
        if not aside.since and bridge.pid == os.getpid():  # what blocks there answers too late
            aside.since, aside.thread = now, bridge.thread
            bridge.loop.call_soon_threadsafe(setattr, aside, "since", 0.0)
        for hand in [*self.hands, aside]:
            since = hand.since
            if since and now - since > self.settings.worker_timeout and since != hand.hung:
                hand.hung = since
                self.on_hung(hand, now - since)

    # -- the monitor --

    def monitor(self) -> None:
        """Run the worker until it is over. The main thread's: signals are served here."""
        sys.setswitchinterval(0.0005)  # a CPU-bound call would cost the loop 5 ms a system call
        if not self.hand_over():
            raise RuntimeError("no thread could be started")
        while not self.over:
            now = monotonic()
            if now >= self.beat_at:
                self.beat_at = now + self.heartbeat
                self.on_heartbeat(now)
            if self.draining and now > self.draining:
                break
            begun = self.holder.table[-1:]
            if not begun:  # nobody is in user code: sleep until somebody is
                self.sleep()
            elif now < begun[0] + MONITOR_SECONDS:
                time.sleep(begun[0] + MONITOR_SECONDS - now)
            elif not self.hand_over():
                time.sleep(MONITOR_SECONDS)
        self.shut_down()

    def shut_down(self) -> None:
        """Close all, and let the threads end; one that user code holds is left behind."""
        self.stop()
        with self.lock:
            while self.spares:
                self.spares.pop().wake.release()
        deadline = monotonic() + SHUT_DOWN_SECONDS
        for thread in [hand.thread for hand in self.hands]:
            thread.join(max(0.0, deadline - monotonic()))
        for sock, _ in self.listeners.values():
            sock.close()
        me = Hand()
        for c in list(self.connections.values()):
            if c.exchange is not None and self.ready.get(c.fd) is c:
                self.release(c.exchange, me)
            try:  # asyncio watches the number of what is away: it sees the end, and closes
                c.sock.shutdown(socket.SHUT_RDWR) if c.phase is AWAY else self.close(c)
            except OSError:
                pass
        self.on_turn(me)
        self.poller.close()
        self.waker.close()
        self.bell.close()

    def sleep(self) -> None:
        """Until a call rouses the monitor. It says that it sleeps, then looks again; the caller
        puts down the ticket, then looks whether it sleeps."""
        self.asleep.append(1)
        if not self.holder.table and not self.over:
            self.bell.wait(0.1 if self.draining else self.heartbeat)
        try:
            self.asleep.pop()
        except IndexError:  # roused: give the call its time
            time.sleep(MONITOR_SECONDS)

    def rouse(self) -> None:
        """The caller's, when it has put down the ticket and found the monitor asleep."""
        try:
            self.asleep.pop()
        except IndexError:  # another was first
            return
        self.bell.wake()

    def hand_over(self) -> bool:
        """The holder's call lasts. First a thread that will take the loop, then the ticket, or
        there could be a ticket and nobody to take it. False: no thread is to be had."""
        with self.lock:
            hand = self.spares.pop() if self.spares else self.start_thread()
            if hand is None:
                return False
            try:
                self.holder.table.pop()
            except IndexError:  # the call has just ended
                self.spares.append(hand)
                return True
            hand.holds = True
            self.holder = hand
        hand.wake.release()
        return True

    def leave(self, me: Hand) -> None:
        """Give the loop away at once, as what comes may wait for the network: to another thread, or
        to nobody, where the monitor and the next thread that is free look for it."""
        if me.holds:
            me.holds = False
            with self.lock:
                self.holder = self.nobody
                self.nobody.table.append(monotonic())
            if not self.hand_over() and self.asleep:
                self.rouse()

    # -- threads --

    def start_thread(self) -> Optional[Hand]:
        """With the lock: a new thread, in an empty context, promised to who releases `wake`."""
        if len(self.hands) > self.settings.max_threads:
            return None
        hand = Hand()
        hand.thread = threading.Thread(target=Context().run, args=(self.live, hand), daemon=True,
                                       name=f"minibottle-{len(self.hands) + 1}")
        hand.thread.minibottle_hand = hand  # where LocalRequest looks for it
        try:
            hand.thread.start()
        except RuntimeError:  # the system gives no more
            return None
        self.hands.append(hand)
        return hand

    def live(self, me: Hand) -> None:
        """A thread's life: the loop while it holds it, then jobs, then as a spare."""
        me.wake.acquire()
        while True:
            if me.holds:
                self.run_loop(me)
            if self.over:
                return
            while self.waiting and not self.nobody.table:
                self.take_job(me)
            with self.lock:
                if self.nobody.table:
                    self.nobody.table.pop()
                    self.holder = me
                    me.holds = True
                    continue
                if self.waiting or self.over:  # who queues looks for spares here, afterwards
                    continue
                self.spares.append(me)
            if not me.wake.acquire(timeout=SPARE_SECONDS):
                with self.lock:
                    if me in self.spares:
                        self.spares.remove(me)
                        self.hands.remove(me)
                        return
                me.wake.acquire()  # it was promised meanwhile

    def take_job(self, me: Hand) -> None:
        """Call for the request that waits longest, or refuse it if it has waited too long."""
        try:
            queued, x = self.waiting.popleft()
        except IndexError:
            return
        try:
            if monotonic() > queued + self.settings.queue_timeout:
                self.on_error(x, BadRequest(
                    f"no thread was free within {self.settings.queue_timeout} s "
                    f"(queue_timeout, max_threads {self.settings.max_threads})", 503), me)
            else:
                self.call(x, me)
        except Exception as error:
            self.guard(x.connection, error, me)

    def enqueue(self, x: "Exchange") -> None:
        """Queue a request for a thread off the loop. One thread is kept for surprises."""
        self.waiting.append((monotonic(), x))
        with self.lock:
            hand = self.spares.pop() if self.spares else None
            if hand is None and len(self.hands) < max(2, self.settings.max_threads):
                hand = self.start_thread()
        if hand is not None:
            hand.wake.release()

    def user(self, me: Hand, function: Callable, *args: object) -> Any:
        """Call what may block, with the ticket on the table; me.holds tells if it is still ours."""
        me.since = monotonic()
        if me.holds:
            me.table.append(me.since)
            if self.asleep:
                self.rouse()
        try:
            return function(*args)
        finally:
            try:
                me.table.pop()
            except IndexError:  # the monitor took it, if there was one: another thread has the loop
                me.holds = False
            me.since = 0.0

    # -- the loop --

    def run_loop(self, me: Hand) -> None:
        """Poll and serve, until another thread has the loop."""
        while me.holds and not self.over:
            try:
                self.turn(me)
            except Exception as error:  # ours, and of no connection: go on, but do not spin
                log.error("the event loop failed", exc_info=error)
                time.sleep(MONITOR_SECONDS)

    def turn(self, me: Hand) -> None:
        """One poll, and what is due. Returns early when another thread has the loop."""
        ready, again = self.ready, self.again
        if bridge.inbox or bridge.guests:  # FAST: asyncio is woken once for all of a turn
            bridge.ring()
        for fd, _ in self.poller.poll(0 if again else self.poll_timeout(), POLL_BATCH):
            c = ready.pop(fd, None)
            if c is None:
                self.on_other_event(fd)
                continue
            try:
                self.on_event(c, me)
            except Exception as error:  # ours (no descriptor, no disk): it costs only c
                self.guard(c, error, me)
            if not me.holds:
                return
        for _ in range(len(again)):  # one request of each, then back to the others
            c = again.popleft()
            try:
                self.advance(c, me)
            except Exception as error:
                self.guard(c, error, me)
            if not me.holds:
                return
        self.on_turn(me)
        now = monotonic()  # by the clock: under load poll never comes back with nothing
        if me.holds and (now >= self.sweep_at or self.waiting or self.draining or self.paused):
            self.sweep(me, now)

    def poll_timeout(self) -> float:
        if self.draining or self.paused or self.waiting:
            return 0.05
        return max(0.0, self.sweep_at - monotonic()) if self.connections else -1

    def guard(self, c: Connection, error: BaseException, me: Hand) -> None:
        """A failure of our own code: it costs this connection."""
        try:
            self.refuse(c, error, me)
        except Exception as second:
            log.error("failed to close a connection", exc_info=second)
            self.close(c)

    def on_other_event(self, fd: int) -> None:
        if fd in self.watched:
            self.watched[fd]()
        elif fd in self.listeners:
            self.accept(*self.listeners[fd])
        else:
            self.disarm(fd)

    # -- connections change places --

    def disarm(self, fd: int) -> None:
        """An event for a connection that a thread has: look no more, until it is given back."""
        with self.lock:
            c = self.connections.get(fd)
            if c is None or c.mask == OFF:  # OFF again would fire HUP again
                return
            c.mask = OFF
            self.poller.modify(fd, OFF)
            self.on_taken_event(c)
            if self.ready.get(fd) is c:  # given back just now by one who saw the old mask
                c.mask = c.want
                self.poller.modify(fd, c.want)

    def rearm(self, c: Connection) -> None:
        with self.lock:
            if self.ready.get(c.fd) is c and c.mask != c.want and not self.over:
                c.mask = c.want
                self.poller.modify(c.fd, c.want)
        if type(self.poller) is SelectorPoll:  # a poll that runs does not see the change
            self.waker.wake()

    def give(self, c: Connection) -> None:
        """Give a connection back to wait for c.want. Nothing of it is touched afterwards."""
        want = c.want
        self.ready[c.fd] = c
        if c.mask != want:
            self.rearm(c)

    def close(self, c: Connection) -> None:
        """The tables and the poller first, the descriptor last: its number is another's at once."""
        with self.lock:
            if self.connections.get(c.fd) is c:
                del self.connections[c.fd]
                try:
                    self.poller.unregister(c.fd)
                except (OSError, ValueError):  # it was away; the poller is closed
                    pass
        c.sock.close()
        c.exchange = None
        self.resume_at = 0.0
        if self.paused:
            self.waker.wake()

    # -- listeners --

    def accept(self, listener: socket.socket, template: Template) -> bool:
        """Accept a few connections; False when there are no more."""
        for _ in range(ACCEPT_BATCH):
            if self.is_full():
                self.pause(MONITOR_SECONDS)
                return False
            try:
                sock, peer = listener.accept()
            except (BlockingIOError, InterruptedError):
                return False
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    log.warning("no connection accepted for %s s: %s", PAUSE_SECONDS, error)
                    self.pause(PAUSE_SECONDS)
                    return False
                continue  # this one was gone already
            sock.setblocking(False)
            now = monotonic()
            c = Connection(sock, peer, template, now + self.settings.header_timeout)
            if not self.connections:
                self.sweep_at = now + self.soonest
            self.connections[c.fd] = c
            self.ready[c.fd] = c
            self.poller.register(c.fd, IN)
        return True

    def is_full(self) -> bool:
        """Has this worker all the connections that it may have?"""
        return len(self.connections) >= self.settings.max_connections

    def pause(self, seconds: float) -> None:
        """Leave the listeners for so long, or until a connection ends."""
        self.resume_at = monotonic() + seconds
        if not self.paused and not self.draining:
            self.paused = True
            for fd in self.listeners:
                self.poller.unregister(fd)

    # -- deadlines --

    def sweep(self, me: Hand, now: float) -> None:
        if self.paused and now >= self.resume_at:
            self.paused = False
            for fd in self.listeners:
                self.poller.register(fd, IN)
        try:  # refuse what has waited too long for a thread
            while me.holds and now > self.waiting[0][0] + self.settings.queue_timeout:
                self.take_job(me)
        except IndexError:  # there are no more
            pass
        if not me.holds:
            return
        if self.draining and self.listeners:
            self.close_listeners(now)
        if now >= self.sweep_at:
            self.expire(me, now)
        if self.draining:
            for c in list(self.connections.values()):
                if c.phase is AWAY and c.exchange is not None:
                    bridge.loop.call_soon_threadsafe(c.exchange)
                    c.exchange = None
            if not self.connections:
                self.stop()

    def close_listeners(self, now: float) -> None:
        """When their backlog is empty. What is idle ends a while later: a close at once would cross
        a request on the wire."""
        for fd, (sock, template) in list(self.listeners.items()):
            while self.accept(sock, template):
                pass
            try:
                self.poller.unregister(fd)  # explicitly: other processes keep it open
            except OSError:  # it was paused
                pass
            del self.listeners[fd]
            sock.close()
        self.keepalive_timeout = self.drain_idle_seconds
        for c in list(self.ready.values()):
            if c.phase is IDLE:
                c.deadline = min(c.deadline, now + self.keepalive_timeout)
        self.soonest = min(self.soonest, self.keepalive_timeout)
        self.sweep_at = now

    def expire(self, me: Hand, now: float) -> None:
        soonest = now + self.soonest
        for c in list(self.ready.values()):
            if c.deadline > now:
                soonest = min(soonest, c.deadline)
            elif self.ready.pop(c.fd, None) is c:
                self.on_expired(c, me)
                if not me.holds:
                    return
        self.sweep_at = max(soonest, now + SWEEP_SECONDS)

    def drain(self) -> None:
        """Stop, within `grace`: from any thread, or a signal."""
        if not self.draining:
            self.draining = monotonic() + self.settings.grace
        self.waker.wake()
        self.bell.wake()

    def stop(self) -> None:
        """Stop at once."""
        self.over = True
        self.waker.wake()
        self.bell.wake()


# === 13. Server connection ====================================================
# HTTP on the loop: a head is read and parsed, its body collected, the application called, the
# answer sent. What the socket does not take of bytes or of a file waits in the loop; an iterator
# that is not done leaves the loop together with its thread, since what it holds may be bound to it.

TURN_BYTES = 1 << 18           # of an iterator or a file, then the others have their turn
RECV_BYTES = 1 << 16
SMALL_BODY = 1 << 16           # collected even if the answer does not need it: the connection lives
MIN_BODY_RATE = 500            # bytes a second, on average, once body_timeout has passed
MAX_SEGMENTS = 256             # first path segments of a foreign application that are learned

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"  # RFC 9110 15.2.1
SWITCHING = "101 Switching Protocols"

# How a head ends, and so whether the connection goes on after the answer.
KEEP = b"\r\n"
KEEP_OLD = b"Connection: keep-alive\r\n\r\n"  # to HTTP/1.0
CLOSE = b"Connection: close\r\n\r\n"


class Exchange:
    """One request and its answer, and the start_response of PEP 3333.

    What only some requests need is set when it is needed.
    """

    __slots__ = ("worker", "connection", "environ", "plan", "ending", "body", "began", "status",
                 "bodiless", "headers", "lines", "length", "ours", "head_sent", "chunked", "left",
                 "result", "iterator", "out", "offset", "queued", "sent", "task")
    plan: Plan                # set once routed
    began: float              # when the application was called
    status: str               # set by start_response
    bodiless: bool            # an answer to HEAD, or of a status without a body
    headers: List[Tuple[str, str]]
    length: Optional[int]     # the application's Content-Length
    ours: Tuple[str, ...]     # of Server and Date, what it has set itself
    chunked: bool             # set by make_head
    left: Optional[int]       # bytes to come of a body with a Content-Length
    iterator: Any             # what is pulled
    out: Any                  # bytes the socket has not taken yet
    offset: int               # in a file: where what is sent begins
    queued: int               # bytes that the system held for the peer at the last look
    sent: int                 # bytes of body, for the log
    task: Any                 # of asyncio, to be cancelled when the client closes its side

    def begin(self, worker: "Worker", connection: Connection, environ: Dict[str, Any]) -> None:
        """What __init__ would do. FAST: called from here it takes half the time."""
        self.worker = worker
        self.connection = connection
        self.environ = environ
        self.ending = KEEP        # or KEEP_OLD, or CLOSE
        self.body: Any = None     # a RequestBody
        self.lines: Any = None    # header lines of the answer, the first for the status line
        self.head_sent = False
        self.result: Any = None   # what the application returned, to be closed

    def start_response(self, status: str, headers: List[Tuple[str, str]],
                       exc_info: Any = None) -> Callable[[bytes], None]:
        """PEP 3333; what cannot be sent raises here, in the application's face."""
        if self.lines is not None:
            if exc_info is None:
                raise RuntimeError("start_response called again without exc_info")
            if self.head_sent:
                raise exc_info[1].with_traceback(exc_info[2])
        bodiless = statuses.get(status)
        if bodiless is None:
            bodiless = (status == SWITCHING and bool(self.environ.get("minibottle.upgrade"))
                        or check_status(status))
        self.bodiless = bodiless or self.environ["REQUEST_METHOD"] == "HEAD"
        lines = [b""]
        self.length = None
        self.ours = ()
        for field in headers:  # FAST: a memo of checked headers
            line, kind = known_answer(field) or format_field(field)
            if not kind:
                lines.append(line)
            elif kind == BODY_LENGTH:
                if self.length is not None:
                    raise ValueError("more than one Content-Length")
                self.length = int(field[1])
            elif kind == OURS:
                self.ours += (field[0].lower(),)
                lines.append(line)
            elif field[0].lower() == "upgrade" and status[:3] in ("101", "426"):
                lines.append(line + b"Connection: Upgrade\r\n")  # RFC 9110 7.8, 15.5.22
            else:
                note_once(field[0].lower(), "hop-by-hop header %s of the application dropped",
                          field[0])
        self.status = status
        self.headers = headers
        self.lines = lines
        return self

    def __call__(self, data: bytes) -> None:
        """PEP 3333's write(), which start_response returns: sent before it returns."""
        if not isinstance(data, bytes):
            raise TypeError(f"write() takes bytes, not {type(data).__name__}")
        if not self.worker.transmit(self, self.worker.frame(self, data), self.worker.nobody):
            raise ClientGone("while the answer was sent")

    def describe(self) -> str:
        return f"{self.environ['REQUEST_METHOD']} {printable(self.environ['REQUEST_URI'])}"


new_exchange = Exchange.__new__


class RequestBody(io.RawIOBase):
    """The body of a request. The loop collects it in `file` before the application is called, or,
    where the route asks for that, this is the raw wsgi.input, which waits for the network."""

    def __init__(self, worker: "Worker", c: Connection, decoder: Decoder, buf: bytearray,
                 expects: bool) -> None:
        self.worker = worker
        self.connection = c
        self.decoder = decoder
        self.buf = buf           # read, and not decoded
        self.expects = expects   # 100 Continue is due before the first wait
        self.received = len(buf)
        self.started = monotonic()
        self.file: Any = io.BytesIO()
        self.piece = b""         # decoded, and not read
        self.ended = False
        self.waits = True        # False: a read takes what is here

    def close(self) -> None:
        self.file.close()
        super().close()

    def is_done(self) -> bool:
        """Is it read to its end? Does not wait."""
        try:
            self.decode()
        except BadRequest:  # nobody reads it any more
            pass
        return self.ended

    def decode(self) -> None:
        """The next piece of what is here, or the end."""
        try:
            self.piece = self.piece or next(self.decoder)
        except StopIteration:
            self.ended = True
        except BadRequest:  # nobody knows where the next request begins
            self.connection.exchange.ending = CLOSE
            raise

    def invite(self) -> None:
        """Before a wait: the client may wait as well."""
        if self.expects:
            self.expects = False
            try:
                self.connection.sock.send(CONTINUE)
            except OSError:  # gone, as will be seen
                pass

    def deadline(self) -> float:
        """When more of it is due."""
        timeout: float = self.worker.settings.body_timeout
        return min(monotonic(), self.started + self.received / MIN_BODY_RATE) + timeout

    def feed(self, data: bytes) -> None:
        if not data:
            raise ClientGone("while its body was read")
        self.buf += data
        self.received += len(data)

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> Optional[int]:
        self.decode()
        while not self.piece and not self.ended:
            if not self.receive():
                return None
            self.decode()
        taken = self.piece[:len(target)]
        target[:len(taken)] = taken
        self.piece = self.piece[len(taken):]
        return len(taken)

    def receive(self) -> bool:
        """Is there more of it?"""
        sock = self.connection.sock
        try:
            self.invite()
            if self.waits:
                sock.settimeout(max(0.001, self.deadline() - monotonic()))
            self.feed(sock.recv(RECV_BYTES))
        except BlockingIOError:
            return False
        except socket.timeout:
            raise self.worker.too_slow(BODY) from None
        except OSError:
            raise ClientGone("while its body was read") from None
        finally:
            sock.setblocking(False)
        return True

    async def pull(self, pieces: Iterable[bytes]) -> Any:
        """For asyncio: `pieces`, which read this; no thread waits for the network."""
        while True:
            self.waits = False
            try:
                piece = next(iter(pieces), b"")
            finally:
                self.waits = True
            if piece:
                yield piece
            elif self.ended:
                return
            elif not await bridge.watch("reader", self.connection.sock,
                                        self.deadline() - monotonic()):
                raise self.worker.too_slow(BODY)


class Worker(Loop):
    """Serves a WSGI application on sockets that are bound already."""

    def __init__(self, app: Any, sockets: List[socket.socket], settings: Settings) -> None:
        super().__init__(settings)
        self.target = app
        # FAST: a bound method is called without the detour over its class
        self.app = app.__call__ if hasattr(type(app).__call__, "__code__") else app
        self.plan = getattr(app, "minibottle_plan", None) or self.learned_plan
        self.segments: Dict[str, Plan] = {}  # first path segment -> what was learned
        self.date_at = 0.0
        self.prefixes: Dict[str, bytes] = {}  # status -> status line, Server and Date, for a second
        import logging
        self.access_log = logging.getLogger("minibottle.access")
        self.log_lines: Deque[str] = deque()  # of this turn
        self.logs = settings.access_log
        self.safe_head = min(settings.max_request_line, settings.max_header_bytes)
        self.max_headers = settings.max_headers
        self.gzip_min = settings.gzip_min if settings.gzip else sys.maxsize
        if not settings.max_connections:
            settings.max_connections = free_descriptors()
        try:
            if settings.max_body > settings.spool_threshold:
                spool(io.BytesIO(), b"x", 0).close()
        except OSError:
            settings.max_body = settings.spool_threshold
            log.warning("there is no place for temporary files: max_body is %s bytes",
                        settings.max_body)
        for sock in sockets:
            sock.setblocking(False)
            self.listeners[sock.fileno()] = sock, self.template(sock)
            self.poller.register(sock.fileno(), IN)
        self.sendfile: Any = getattr(os, "sendfile", None)
        for name, file in (("trusted_proxies", "proxies"), ("status", "status"), ("cert", "tls")):
            if getattr(settings, name):
                companion(file).install(self)

    def template(self, sock: socket.socket) -> Template:
        """What all environs of a listener share (PEP 3333)."""
        name = sock.getsockname()
        host, port = (name[0], str(name[1])) if isinstance(name, tuple) else ("localhost", "80")
        if isinstance(name, tuple):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # Linux: inherited
        environ = Template(dict.fromkeys((  # FAST: what each request sets: no growing
            "REQUEST_METHOD", "REQUEST_URI", "PATH_INFO", "QUERY_STRING", "SERVER_PROTOCOL",
            "REMOTE_ADDR", "REMOTE_PORT", "minibottle.route"), ""))
        environ.update({
            "SERVER_NAME": host, "SERVER_PORT": port, "SCRIPT_NAME": "",
            "SERVER_SOFTWARE": "minibottle", "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http", "wsgi.multithread": True, "wsgi.run_once": False,
            "wsgi.multiprocess": self.settings.workers not in ("0", "1"),
            "wsgi.errors": sys.stderr or open(os.devnull, "w"), "wsgi.input": EMPTY_INPUT,
            "wsgi.input_terminated": True, "wsgi.file_wrapper": FileWrapper,
            "minibottle.settings": self.settings})
        return environ

    def shut_down(self) -> None:
        super().shut_down()
        try:
            run_lifecycle(self.target, "stop", self.settings.grace)
        except Exception as error:
            log.error("an on_stop function failed", exc_info=error)

    def learned_plan(self, environ: Dict[str, Any]) -> Plan:
        """For an application without minibottle_plan: what its first path segment has taught."""
        path = environ["PATH_INFO"]
        end = path.find("/", 1)
        segment = path if end < 0 else path[:end]
        plan = self.segments.get(segment)
        if plan is None:
            plan = Plan()
            remember(self.segments, segment, plan, MAX_SEGMENTS)
        return plan

    # -- reading --

    def on_event(self, c: Connection, me: Hand) -> None:
        """The poller has seen c, which is ours now. Events mean no more than: try."""
        if c.phase is WRITE:
            x, c.want = c.exchange, IN
            if x.out:
                return self.send(x, x.out, monotonic(), me)
            return self.send_file(x, me)
        try:
            data = c.sock.recv(RECV_BYTES)
        except (BlockingIOError, InterruptedError):
            return self.give(c)
        except OSError:
            data = b""
        if not data:  # what is begun here cannot be completed
            if c.exchange is not None:
                self.release(c.exchange, me)
            return self.close(c)
        if c.phase is IDLE:
            c.buf = data
            return self.advance(c, me)
        if c.phase is HEAD:
            c.buf += data
            return self.advance(c, me)
        if c.phase is LINGER:
            return self.give(c)
        c.exchange.body.feed(data)
        self.collect(c.exchange, me)

    def advance(self, c: Connection, me: Hand) -> None:
        """c.buf has bytes of a head, and perhaps of what follows it; or asyncio has its answer."""
        x = c.exchange
        if x is not None:
            result, x.result = x.result, None
            if type(result) is list:
                return self.send_list(x, result, monotonic(), me)
            return self.respond(x, result, me)
        head, end, rest = c.buf.partition(b"\r\n\r\n")
        try:
            if not end or len(head) > self.safe_head:
                check_incomplete_head(head, self.settings.max_request_line,
                                      self.settings.max_header_bytes)
                if not end:
                    return self.await_head(c)
            environ = parse_head(head.decode("latin-1"), c.template, self.max_headers)
        except BadRequest as error:
            return self.on_bad_head(c, error, me)
        c.buf = rest
        environ["REMOTE_ADDR"] = c.addr
        environ["REMOTE_PORT"] = c.port
        x = c.exchange = new_exchange(Exchange)
        x.begin(self, c, environ)
        plan = self.plan  # FAST: two steps, which CPython 3.11 specializes; one it does not
        x.plan = plan(environ)
        if SPECIAL in environ:
            self.begin_special(x, me)
        else:
            self.call(x, me)

    def on_bad_head(self, c: Connection, error: BadRequest, me: Hand) -> None:
        """RFC 9112 2.2: empty lines before a request are ignored. A few."""
        if c.buf[:2] != b"\r\n" or c.buf[:8] == b"\r\n" * 4:
            return self.refuse(c, error, me)
        c.buf = c.buf[2:]
        self.advance(c, me)

    def await_head(self, c: Connection) -> None:
        if c.phase is IDLE:
            c.phase = HEAD
            c.deadline = monotonic() + self.settings.header_timeout
        self.give(c)

    def begin_special(self, x: Exchange, me: Hand) -> None:
        """The head is in: does the connection end, is there a body, is it wanted, and who reads
        it?"""
        c, environ, plan = x.connection, x.environ, x.plan
        del environ[SPECIAL]
        x.ending = end_of_head(environ)
        if DROPPED in environ:
            note_once("_", "header %s dropped: a name with _ could pass for one with -",
                      environ.pop(DROPPED))
        try:
            length = parse_framing(environ)
            expect = environ.get("HTTP_EXPECT", "").lower()
            if expect and expect != "100-continue":
                raise BadRequest(f"Expect {expect[:80]!r} is not supported", 417)
        except BadRequest as error:
            return self.refuse(c, error, me)
        if environ["PATH_INFO"] == "*":  # RFC 9110 9.3.7: about the server, not about a resource
            if length:
                x.ending = CLOSE
            return self.answer(x, me, "204 No Content", b"", [("Allow", ", ".join(VERBS))])
        environ.pop("HTTP_TRANSFER_ENCODING", None)
        expects = bool(expect) and environ["SERVER_PROTOCOL"] == "HTTP/1.1" and length != 0
        limit = self.settings.max_body if plan.max_body is None else plan.max_body
        if plan.early and (expects or not 0 <= length <= SMALL_BODY):
            x.ending = CLOSE
            return self.call(x, me)
        if length > limit:
            return self.refuse(c, BadRequest(f"body over {limit} bytes (max_body)", 413), me)
        if not length:
            if "HTTP_UPGRADE" in environ and environ["SERVER_PROTOCOL"] == "HTTP/1.1":
                environ["minibottle.upgrade"] = []  # a 101 puts there what leave_http calls
            return self.call(x, me)
        buf = bytearray(c.buf)
        decoder = iter_chunked(buf, limit) if length < 0 else iter_counted(buf, length)
        c.buf = b""
        x.body = RequestBody(self, c, decoder, buf, expects and not buf)
        if plan.stream:
            environ["wsgi.input"] = io.BufferedReader(x.body, RECV_BYTES)
            return self.enqueue(x) if me.holds else self.call(x, me)
        c.phase = BODY
        self.collect(x, me)

    def collect(self, x: Exchange, me: Hand) -> None:
        """Store what has come of the body; call when it is all here."""
        c, body = x.connection, x.body
        try:
            for piece in body.decoder:
                if not piece:
                    body.invite()
                    c.deadline = body.deadline()
                    return self.give(c)
                body.file = self.user(me, spool, body.file, piece,  # a disk may block
                                      self.settings.spool_threshold)
        except BadRequest as error:
            return self.refuse(c, error, me)
        x.environ["CONTENT_LENGTH"] = str(body.file.tell())
        x.environ["wsgi.input"] = x.environ["minibottle.body"] = body.file
        body.file.seek(0)
        self.call(x, me)

    # -- the call --

    def call(self, x: Exchange, me: Hand) -> None:
        """Call the application and send what it returns. The ticket lies on the table meanwhile."""
        x.began = began = monotonic()
        if me.holds:
            if x.plan.slow > SLOW_MEMORY:  # it has blocked lately: another thread calls
                return self.enqueue(x)
            me.table.append(began)
            if self.asleep:
                self.rouse()
        me.since = began
        me.exchange = x
        error = None
        try:
            app = self.app
            result = app(x.environ, x.start_response)
        except BaseException as raised:  # SystemExit too: it ends a request, not a thread of ours
            error = raised
        try:
            me.table.pop()
        except IndexError:  # the monitor took it, if there was one: another thread has the loop
            me.holds = False
        me.since = 0.0
        now = monotonic()
        if now - began > SLOW_SECONDS or x.plan.slow:
            x.plan.took(now - began)
        if error is not None:
            return self.on_error(x, error, me)
        if type(result) is list and x.lines is not None and not x.head_sent:
            return self.send_list(x, result, now, me)
        self.respond(x, result, me)

    # -- answers --

    def send_list(self, x: Exchange, result: List[bytes], now: float, me: Hand) -> None:
        """FAST: an answer that is all here goes out in one send; respond() agrees with it."""
        try:
            body = result[0] if len(result) == 1 else b"".join(result)
            if type(body) is not bytes and not isinstance(body, bytes):
                raise TypeError(f"a body is made of bytes, not {type(body).__name__}")
        except TypeError as error:
            return self.on_error(x, error, me)
        size = len(body)
        if size >= self.gzip_min or x.bodiless or x.length is not None and x.length != size:
            return self.send_whole(x, body, me)
        if self.draining or x.body is not None and not x.body.is_done():
            x.ending = CLOSE
        lines = x.lines
        prefix = self.prefixes.get(x.status) if now < self.date_at and not x.ours else None
        lines[0] = prefix or self.make_prefix(x, now)
        lines += length_lines.get(size) or format_length(size), x.ending, body
        x.head_sent = True
        x.sent = size
        self.send(x, b"".join(lines), now, me)

    def make_prefix(self, x: Exchange, now: float) -> bytes:
        """The status line, and the Server and Date that the application has not set itself."""
        if now >= self.date_at:
            self.prefixes = {}
            self.date_at = now + 1.0 - time.time() % 1.0
        made = f"HTTP/1.1 {x.status}\r\n"
        if "server" not in x.ours:
            made += "Server: minibottle\r\n"
        if "date" not in x.ours:
            made += f"Date: {format_date(time.gmtime())}\r\n"
        if not x.ours and len(self.prefixes) < 100:
            self.prefixes[x.status] = made.encode("latin-1")
        return made.encode("latin-1")

    def make_head(self, x: Exchange) -> bytes:
        """The head of an answer, with the framing that its length asks for (RFC 9112 6)."""
        extra = b""
        x.left = None if x.bodiless else x.length
        x.chunked = (x.length is None and not x.bodiless
                     and x.environ["SERVER_PROTOCOL"] == "HTTP/1.1")
        x.sent = 0
        if x.chunked:
            extra = b"Transfer-Encoding: chunked\r\n"
        elif x.length is not None and x.status[:3] != "204":
            extra = format_length(x.length)
        elif not x.bodiless:  # its end is the end of the connection
            x.ending = CLOSE
        if self.draining or x.body is not None and not x.body.is_done():
            x.ending = CLOSE
        x.head_sent = True
        return self.make_prefix(x, monotonic()) + b"".join(x.lines) + extra + x.ending

    def frame(self, x: Exchange, piece: bytes) -> bytes:
        """A piece of the body as it goes out, the head before the first."""
        head = b"" if x.head_sent else self.make_head(x)
        if x.left is not None:
            if len(piece) > x.left:
                log.error("%s: the answer is longer than its Content-Length of %s bytes",
                          x.describe(), x.length)
                piece = piece[:x.left]
            x.left -= len(piece)
        if x.bodiless:
            return head
        x.sent += len(piece)
        return head + (frame_chunk(piece) if x.chunked else piece)

    def negotiate(self, x: Exchange, length: Optional[int]) -> bool:
        """Is the body to be compressed? The header lines say so then."""
        if not self.settings.gzip:
            return False
        headers, compress = negotiate_gzip(x.environ, x.status, x.headers, length,
                                           self.settings.gzip_min)
        if headers is not x.headers:
            x.lines = None
            x.start_response(x.status, headers)
        return compress

    def send_whole(self, x: Exchange, body: bytes, me: Hand) -> None:
        """What send_list() leaves: a body to be compressed, one that does not fit its
        Content-Length, or none (RFC 9110 6.4.1)."""
        if x.status == SWITCHING:
            lines = [line for line in x.lines if line[:13].lower() != b"content-type:"]
            data = self.make_prefix(x, monotonic()) + b"".join(lines) + KEEP
            x.ending, x.head_sent, x.sent = CLOSE, True, 0  # HTTP ends here
            return self.send(x, data, monotonic(), me)
        size = len(body) or None  # an application may leave out what HEAD does not send
        length = size if x.length is None else x.length
        if length != size and not x.bodiless:
            return self.respond(x, (body,), me)
        if self.negotiate(x, length):
            if not x.bodiless:
                body = self.user(me, gzip_bytes, body, self.settings.gzip_level)
        elif not check_status(x.status):
            x.length = length
        self.send_last(x, body, me)

    def send_last(self, x: Exchange, piece: bytes, me: Hand) -> None:
        """Send the last of a body, with the head if that is still due, and the end."""
        if not x.head_sent and x.length is None and not x.bodiless:
            x.length = len(piece)
        data = self.frame(x, piece)
        if x.left:
            log.error("%s: the answer ended %s bytes short of its Content-Length of %s",
                      x.describe(), x.left, x.length)
            return self.abort(x, me)
        if x.chunked:
            data += LAST_CHUNK
        self.close_result(x, me)
        self.send(x, data, monotonic(), me)

    def send(self, x: Exchange, data: Any, now: float, me: Hand) -> None:
        """Send the last bytes of an answer, or those before a file; what the socket does not take,
        the loop sends."""
        c = x.connection
        try:
            n = c.sock.send(data)
        except (BlockingIOError, InterruptedError):
            n = 0
        except OSError:
            return self.abort(x, me)
        if n == len(data):
            return self.finish(x, now, me) if x.result is None else self.send_file(x, me)
        x.out = memoryview(data)[n:]
        self.await_write(x, now, n)

    def await_write(self, x: Exchange, now: float, sent: int) -> None:
        c = x.connection
        if sent or c.phase is not WRITE:
            c.deadline = now + self.settings.write_timeout
            x.queued = bytes_queued(c.sock)
        c.phase = WRITE
        c.want = OUT
        self.give(c)

    def finish(self, x: Exchange, now: float, me: Hand) -> None:
        """The answer is out: release what the request held, and give the connection back."""
        c = x.connection
        me.exchange = None
        if x.body is not None:
            c.buf = bytes(x.body.buf)
            x.body.close()
        if self.logs or self.access_log.handlers:
            self.log_access(x)
            if not me.holds:
                self.waker.wake()
        c.exchange = None
        if x.ending is CLOSE:
            return self.leave_http(x) if x.status == SWITCHING else self.farewell(c)
        c.phase = IDLE
        c.deadline = now + self.keepalive_timeout
        if c.buf:  # of a next request
            self.again.append(c)
            if not me.holds:
                self.waker.wake()
        else:
            self.ready[c.fd] = c  # give(), inline
            if c.mask != IN:
                self.rearm(c)

    def leave_http(self, x: Exchange) -> None:
        """101 is sent (RFC 9110 7.8): begin(c, close) is called in asyncio's thread. c.sock is its
        own, c.buf came after the head, close(c) ends it; what begin returns is called when the
        server stops, and has `grace` to end. Until it is closed it counts as a connection."""
        c, begin = x.connection, x.environ["minibottle.upgrade"][-1]
        with self.lock:
            c.phase, c.mask = AWAY, OFF
            self.poller.unregister(c.fd)

        def enter() -> None:
            try:
                c.exchange = begin(c, self.close)
            except Exception as error:
                log.error("%s: the upgrade failed", x.describe(), exc_info=error)
                self.close(c)
        bridge.start().call_soon_threadsafe(enter)

    def abort(self, x: Exchange, me: Hand) -> None:
        """The client is gone, or the answer broke off: reset, as it must not look whole."""
        c = x.connection
        try:
            c.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except OSError:
            pass
        self.close(c)
        if x.head_sent:
            self.log_access(x)
        me.exchange = None
        self.release(x, me)

    def release(self, x: Exchange, me: Hand) -> None:
        """Close what a request holds that is not answered to its end."""
        if x.body is not None:
            x.body.close()
        self.close_result(x, me)

    def farewell(self, c: Connection) -> None:
        """Close so that the answer arrives: closing with unread input resets the connection."""
        try:
            c.sock.shutdown(socket.SHUT_WR)
        except OSError:
            return self.close(c)
        c.buf = b""
        c.phase = LINGER
        c.deadline = monotonic() + LINGER_SECONDS
        self.give(c)

    # -- iterators and files --

    def respond(self, x: Exchange, result: Any, me: Hand) -> None:
        """Send what the application returned: any iterable of bytes."""
        if type(result) in (Pending, AsyncBody):
            steps = self.respond_async(x, result)
            if x.plan.waits:
                bridge.inbox.append((result.context, steps))
            else:
                bridge.guests.append(Guest(result.context, steps, x.plan))
            return None if me.holds else bridge.ring()  # the loop does it before it polls
        x.result = result
        try:
            x.iterator = self.user(me, iter, result)
            if x.lines is None:  # a generator may call start_response when it is first pulled
                x.iterator = chain((self.pull(x, me) or b"",), x.iterator)
                if x.lines is None:
                    raise RuntimeError("the application did not call start_response")
        except BaseException as error:
            return self.on_error(x, error, me)
        if x.head_sent:
            return self.pump(x, me)
        if x.bodiless:
            self.close_result(x, me)
            return self.send_whole(x, b"", me)
        announced, size = x.length, size_of_file(result)
        if self.negotiate(x, size if announced is None else announced):
            x.iterator = iter_gzip(x.iterator, self.settings.gzip_level, announced)
        elif size:
            x.length = size if announced is None else announced
            x.offset = result.file.tell()
            return self.send(x, self.make_head(x), monotonic(), me)
        self.pump(x, me)

    def pull(self, x: Exchange, me: Hand) -> Optional[bytes]:
        """The next piece; None at the end."""
        piece: Any = self.user(me, next, x.iterator, None)
        if piece is not None and not isinstance(piece, bytes):
            raise TypeError(f"a body is made of bytes, not {type(piece).__name__}")
        return piece

    def pump(self, x: Exchange, me: Hand) -> None:
        """Pull and send: on the loop while the socket takes it at once; what lasts leaves it."""
        budget = TURN_BYTES
        while True:
            began = monotonic()
            try:
                piece = self.pull(x, me)
            except BaseException as error:
                return self.on_error(x, error, me)
            if piece is None:
                return self.send_last(x, b"", me)
            if monotonic() - began > SLOW_SECONDS:
                x.plan.blocked()
            if piece and not self.transmit(x, self.frame(x, piece), me):
                return self.abort(x, me)
            budget -= len(piece)
            if budget < 0:
                x.plan.blocked()
                self.leave(me)
            # who closes its side may still listen, but not who reads events
            if not me.holds and x.head_sent and x.chunked and is_event_stream(x.headers) \
                    and is_at_end(x.connection.sock):
                return self.abort(x, me)

    def transmit(self, x: Exchange, data: bytes, me: Hand) -> bool:
        """Send all of it; where the socket takes no more, leave the loop and wait. False: the
        client is gone, or there was no progress in write_timeout."""
        sock, view = x.connection.sock, memoryview(data)
        try:
            while view:
                try:
                    view = view[sock.send(view):]
                except (BlockingIOError, InterruptedError):
                    x.plan.blocked()
                    self.leave(me)
                    x.queued = bytes_queued(sock)
                    sock.settimeout(self.settings.write_timeout)
                except socket.timeout:
                    if self.is_stuck(x):
                        raise
        except OSError:
            return False
        finally:
            if sock.gettimeout():
                sock.setblocking(False)
        return True

    def is_stuck(self, x: Exchange) -> bool:
        """Has the peer read nothing of what the system holds for it since the last look?"""
        before, x.queued = x.queued, bytes_queued(x.connection.sock)
        return x.queued >= before

    def close_result(self, x: Exchange, me: Hand) -> None:
        """Call close() of what the application returned (PEP 3333), once."""
        result, x.result, x.iterator = x.result, None, None
        if hasattr(result, "close"):
            try:
                self.user(me, result.close)
            except BaseException as error:
                log.error("%s: close() failed", x.describe(), exc_info=error)

    def send_file(self, x: Exchange, me: Hand) -> None:
        """Send of a file what the socket takes, up to a turn's worth."""
        x.out, began = b"", x.sent
        try:
            while x.left and x.sent < began + TURN_BYTES:
                n = self.user(me, self.sendfile, x.connection.fd, x.result.file.fileno(),
                              x.offset + x.sent, min(x.left, TURN_BYTES))
                if not n:
                    log.error("%s: the file ended %s bytes short", x.describe(), x.left)
                    return self.abort(x, me)
                x.left -= n
                x.sent += n
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            return self.abort(x, me)
        if x.left:
            return self.await_write(x, monotonic(), x.sent - began)
        self.close_result(x, me)
        self.finish(x, monotonic(), me)

    # -- on asyncio --

    async def respond_async(self, x: Exchange, result: Any) -> None:
        """See a request to its end whose application awaits; meanwhile no thread has it. What comes
        of it goes out on the loop, but for what streams from asyncio."""
        PUMP.set(bridge.asyncio.current_task())
        if x.plan.cancel:
            self.cancel_at_end(x)
        try:
            if type(result) is Pending:
                result = await result
            if type(result) is AsyncBody:
                return await self.pump_async(x, result)
            x.result = result
            self.again.append(x.connection)
            self.waker.wake()
        except BaseException as error:
            is_ours = self.over or getattr(x, "task", x) is None  # on_taken_event() makes it None
            if is_ours and isinstance(error, bridge.asyncio.CancelledError):
                return self.abort(x, self.aside)
            self.on_error(x, error, self.aside)

    async def pump_async(self, x: Exchange, body: AsyncBody) -> None:
        """pump(), of an asynchronous iterator: as fast as the client takes it."""
        step: Callable = bytes
        end: Callable = bytes
        if is_event_stream(x.headers):
            await bridge.asyncio.sleep(0)  # from here on this task is its own: see Guest
            self.cancel_at_end(x)
        try:
            if self.negotiate(x, x.length):
                step, end = gzip_coder(self.settings.gzip_level)
            if not x.bodiless:
                async for piece in body:
                    if piece:
                        await self.transmit_async(x, self.frame(x, step(piece)))
        finally:
            await body.aclose()
        self.send_last(x, end(), self.aside)

    async def transmit_async(self, x: Exchange, data: bytes) -> None:
        """transmit(), without a thread. Raises ClientGone."""
        sock, view = x.connection.sock, memoryview(data)
        try:
            while view:
                try:
                    view = view[sock.send(view):]
                except (BlockingIOError, InterruptedError):
                    if not await bridge.watch("writer", sock, self.settings.write_timeout):
                        raise
        except OSError:
            raise ClientGone("while the answer was sent") from None

    def cancel_at_end(self, x: Exchange) -> None:
        """Have this task cancelled when the client closes its side; it may have done so."""
        x.task = bridge.asyncio.current_task()
        if x.connection.mask == OFF:  # an event that nobody waited for
            self.on_taken_event(x.connection)

    def on_taken_event(self, c: Connection) -> None:
        """Something has come while asyncio has it: the end, for who wants to know?"""
        task: Any = getattr(c.exchange, "task", None)
        if task is not None and is_at_end(c.sock):
            c.exchange.task = None
            bridge.loop.call_soon_threadsafe(task.cancel)

    # -- errors --

    def on_error(self, x: Exchange, error: BaseException, me: Hand) -> None:
        """The application raised, or we refuse. Before the head an error page, after it a reset."""
        status, body = "500 Internal Server Error", b"500 Internal Server Error\n"
        if isinstance(error, BadRequest):
            note_refusal("%s: %s: %s %s", x.connection.addr, x.describe(), error.status,
                         printable(error))
            status, body = format_error(error)
        elif not isinstance(error, ClientGone):
            log.error("%s: unhandled exception", x.describe(), exc_info=error)
        if x.head_sent:
            return self.abort(x, me)
        self.close_result(x, me)
        self.answer(x, me, status, body)

    def answer(self, x: Exchange, me: Hand, status: str, body: bytes,
               headers: Optional[list] = None) -> None:
        """An answer of the server's own."""
        x.lines = None
        x.start_response(status, headers or [("Content-Type", "text/plain; charset=utf-8")])
        self.send_list(x, [body], monotonic(), me)

    def refuse(self, c: Connection, error: BaseException, me: Hand) -> None:
        """Answer once, close, and never look at the rest: after an error in the framing nobody
        knows where the next request begins. Our application makes its own page, with its hooks, of
        a body that is too large."""
        x = c.exchange
        if x is None:
            method = "HEAD" if c.buf[:5] == b"HEAD " else "-"
            x = c.exchange = new_exchange(Exchange)
            x.begin(self, c, {"REQUEST_METHOD": method, "REQUEST_URI": "-", "REMOTE_ADDR": c.addr,
                              "SERVER_PROTOCOL": "HTTP/1.1"})
        x.ending = CLOSE
        if getattr(error, "status", 0) == 413 and hasattr(self.target, "minibottle_plan"):
            x.environ.update({"minibottle.refused": error, "minibottle.route": None})
            return self.call(x, me)
        self.on_error(x, error, me)

    def on_expired(self, c: Connection, me: Hand) -> None:
        """A deadline has passed; c is ours."""
        if c.phase is HEAD or c.phase is BODY:
            return self.refuse(c, self.too_slow(c.phase), me)
        if c.phase is WRITE:
            if self.is_stuck(c.exchange):
                return self.abort(c.exchange, me)
            c.deadline = monotonic() + self.settings.write_timeout
            return self.give(c)
        if c.phase is IDLE:
            try:
                c.buf = c.sock.recv(RECV_BYTES)  # a request that is here already is answered
            except OSError:
                pass
        if c.buf:
            self.again.append(c)
        else:
            self.close(c)

    def too_slow(self, phase: str) -> BadRequest:
        name = "header_timeout" if phase is HEAD else "body_timeout"
        return BadRequest(
            f"the {phase} came too slowly ({name} {getattr(self.settings, name)} s)", 408)

    def on_hung(self, hand: Hand, seconds: float) -> None:
        """Say which request it is, and where its code stands."""
        import traceback
        x = hand.exchange
        frame = sys._current_frames().get(hand.thread.ident)
        stack = "".join(traceback.format_stack(frame)) if frame else ""
        log.error("worker timeout on %s: %.0f s in one call (worker_timeout)\n%s",
                  x.describe() if x else "a coroutine", seconds, stack)

    # -- the access log --

    def log_access(self, x: Exchange) -> None:
        """One line a request, in Apache's combined format, written once a turn; a logging record
        only where somebody listens."""
        environ = x.environ
        when = log_time(int(time.time()))
        line = (f'{printable(environ.get("REMOTE_ADDR") or "-")} - - [{when}] '
                f'"{environ["REQUEST_METHOD"]} {printable(environ["REQUEST_URI"])} '
                f'{environ["SERVER_PROTOCOL"]}" {x.status[:3]} {x.sent or "-"} '
                f'"{printable(environ.get("HTTP_REFERER", "-"))}" '
                f'"{printable(environ.get("HTTP_USER_AGENT", "-"))}"')
        if self.logs:
            self.log_lines.append(line)
        if self.access_log.handlers:
            self.access_log.info(line, extra={
                "status": int(x.status[:3]), "bytes": x.sent, "path": environ.get("PATH_INFO"),
                "method": environ["REQUEST_METHOD"], "client": environ.get("REMOTE_ADDR"),
                "peer": x.connection.addr,
                "ms": (monotonic() - x.began) * 1000 if hasattr(x, "began") else 0.0})

    def on_turn(self, me: Hand) -> None:
        """Write the access log. It may block, as a pipe does."""
        if self.log_lines:
            lines = [self.log_lines.popleft() for _ in range(len(self.log_lines))]
            self.user(me, write_to, sys.stdout, "\n".join(lines) + "\n")


def is_event_stream(headers: List[Tuple[str, str]]) -> bool:
    return any(name.lower() == "content-type" and value.startswith("text/event-stream")
               for name, value in headers)


def is_at_end(sock: socket.socket) -> bool:
    """Has the peer closed its side?"""
    try:
        return not sock.recv(1, socket.MSG_PEEK)
    except OSError as error:
        return not isinstance(error, BlockingIOError)


def end_of_head(environ: Dict[str, Any]) -> bytes:
    """KEEP, KEEP_OLD or CLOSE, as the client wants it (RFC 9112 9.3)."""
    options = [part.strip(" \t") for part in environ.get("HTTP_CONNECTION", "").lower().split(",")]
    if "close" in options:
        return CLOSE
    if environ["SERVER_PROTOCOL"] == "HTTP/1.1":
        return KEEP
    return KEEP_OLD if "keep-alive" in options else CLOSE


def size_of_file(result: Any) -> Optional[int]:
    """Bytes to come of a real file, which goes out by sendfile; None if it is none."""
    file: Any = result.file if type(result) is FileWrapper else None
    if not hasattr(os, "sendfile") or not isinstance(
            getattr(file, "raw", file), io.FileIO):  # gzip.open() has a fileno() too
        return None
    try:
        return max(0, min(os.fstat(file.fileno()).st_size - file.tell(), result.left))
    except (OSError, ValueError, AttributeError):
        return None


def bytes_queued(sock: socket.socket) -> int:
    """What the system holds for the peer to read; 0 where it does not say."""
    try:
        import fcntl
        import termios
        return int(struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0])
    except (ImportError, OSError, AttributeError):
        return 0


def free_descriptors() -> int:
    """How many connections this process can have: what it may open less 64, at least half of it."""
    try:
        import resource
    except ImportError:  # Windows
        return 512
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 20 if limit == resource.RLIM_INFINITY else max(limit - 64, limit // 2)


@lru_cache(maxsize=1)
def log_time(second: int) -> str:
    """"10/Oct/2000:13:55:36 -0700"."""
    when = time.localtime(second)
    return time.strftime(f"%d/{MONTHS[when.tm_mon - 1]}/%Y:%H:%M:%S %z", when)


def write_to(stream: Any, text: str = "") -> None:
    """Write and flush; the stream may be closed, full, or None (pythonw)."""
    try:
        stream.write(text)
        stream.flush()
    except (OSError, ValueError, AttributeError):
        pass


noted: Set[str] = set()


def note_once(key: str, message: str, name: str) -> None:
    """Log the first time only."""
    if key not in noted:
        noted.add(key)
        log.warning(message, printable(name))


refusals = deque(maxlen=10)  # type: Deque[float]


def note_refusal(message: str, *args: object) -> None:
    """Log at INFO, ten a second at most: who sends rubbish is not to fill the disk."""
    now = monotonic()
    if len(refusals) < 10 or now - refusals[0] > 1.0:
        refusals.append(now)
        log.info(message, *args)


# === 14. Workers ==============================================================
# A master that forks workers, replaces those that end, and runs no user code. Each worker imports
# the target, which may call run(), and tells the master over its own pair of sockets (the link)
# what settings hold then; the first one's say where to listen, and the listeners come back. The
# board is shared memory, two numbers a worker: when its heart last beat (monotonic seconds; 0.0: it
# does not serve yet; negative: it drains) and how many connections it has. The slot that a worker
# has there is another's when it has ended; the last number of all tells how many slots there are.
#
# A worker goes, whatever the cause (HUP, TTOU, a call that hangs, max_requests), when more serve
# than are wanted: its successor is there before, and one that cannot start leaves all as it is.

MAX_WORKERS = 1000
FIGURES = memoryview(mmap.mmap(-1, 1 << 20)).cast("d")  # of minibottle_status.py, for all workers
MAX_BACKOFF_SECONDS = 30             # after 1, 2, 4, 8 and 16
USAGE_STATUS, FAILED_STATUS = 2, 1   # exit status of a wrong command line, and of what cannot start


class StartError(Exception):
    """The server cannot start: one line for the operator, exit status 1."""


class Served(Worker):
    """A worker of a master: it shows its counts, and leaves the listeners when it has too many."""

    def __init__(self, app: Callable, sockets: List[socket.socket], settings: Settings,
                 board: Any, slot: int, link: socket.socket) -> None:
        super().__init__(app, sockets, settings)
        self.board = board
        self.slot = slot
        self.link = link
        if settings.max_requests:  # not all at the same time
            import random
            self.requests_left = settings.max_requests * random.uniform(0.9, 1.1)
            self.finish = self.finish_and_count  # type: ignore[method-assign]
        self.watched[link.fileno()] = self.on_master_gone
        self.poller.register(link.fileno(), IN)

    def on_master_gone(self) -> None:
        self.poller.unregister(self.link.fileno())
        log.error("worker %s: the master is gone", os.getpid())
        self.drain()

    def on_heartbeat(self, now: float) -> None:
        super().on_heartbeat(now)
        self.show(now)

    def show(self, now: float) -> None:
        self.board[2 * self.slot] = -now if self.draining else now
        self.board[2 * self.slot + 1] = len(self.connections)

    def drain(self) -> None:
        super().drain()
        self.show(monotonic())

    def close(self, c: Connection) -> None:
        super().close(c)
        self.board[2 * self.slot + 1] = len(self.connections)

    def on_hung(self, hand: Hand, seconds: float) -> None:
        """The master starts another worker; when that serves, this one is told to drain."""
        super().on_hung(hand, seconds)
        tell(self.link, {"retiring": os.getpid()})

    def finish_and_count(self, x: Exchange, now: float, me: Hand) -> None:
        super().finish(x, now, me)
        left = self.requests_left = self.requests_left - 1
        if -1 < left <= 0:
            tell(self.link, {"retiring": os.getpid()})

    def is_full(self) -> bool:
        """Or more than its share? The kernel does not balance: the worker that is awake takes
        nearly all of a burst."""
        count = self.board[2 * self.slot + 1] = len(self.connections)
        end = int(self.board[-1]) * 2
        counts = [n for n, beat in zip(self.board[1:end:2], self.board[0:end:2]) if beat > 0]
        is_crowded = len(counts) > 1 and count > sum(counts) / len(counts) * 1.125 + 2
        return is_crowded and not self.draining or super().is_full()


def serve_alone(defaults: dict, flags: dict, app: Callable, options: dict) -> None:
    """Serve in this process until a signal; in a thread that is not the main one, for good."""
    settings = Settings(**{**defaults, **options, **flags})
    settings.workers = "0"
    sockets: List[socket.socket] = []

    def on_signal(number: int, frame: object) -> None:
        if number == getattr(signal, "SIGUSR1", None):
            open_log(settings.log_file, again=True)
        elif worker.draining or number not in (signal.SIGTERM, signal.SIGINT):
            worker.stop()
        else:
            worker.drain()

    try:
        open_log(settings.log_file)
        for address in settings.bind:
            sockets.append(bind(address))
        worker = Worker(app, sockets, settings)
        if threading.current_thread() is threading.main_thread():
            names = {"SIGTERM", "SIGINT", "SIGQUIT", "SIGUSR1"} & set(dir(signal))
            worker.bell.on_signals({getattr(signal, name): on_signal for name in names})
        run_lifecycle(app, "start")
        print_started(sockets, "one process", settings)
        worker.monitor()
        bridge.cancel_all(SHUT_DOWN_SECONDS)
    finally:
        for sock in sockets:
            sock.close()


def tell(link: socket.socket, message: dict) -> None:
    """The master: one JSON line."""
    try:
        link.sendall(json_dumps(message).encode("utf-8") + b"\n")
    except OSError:  # it is gone, as will be seen
        pass


def receive_sockets(link: socket.socket) -> List[socket.socket]:
    """The master's listeners (SCM_RIGHTS). Raises EOFError when it is gone."""
    data, rights, _, _ = link.recvmsg(1, socket.CMSG_SPACE(4 * 64))
    if not data:
        raise EOFError
    fds = array("i")
    for _, _, payload in rights:
        fds.frombytes(payload)
    socket.setdefaulttimeout(0.0)  # or PyPy makes them block, for all who accept from them
    try:
        return [socket.socket(fileno=fd) for fd in fds]
    finally:
        socket.setdefaulttimeout(None)


class Process:
    """A worker, as the master sees it."""

    def __init__(self, pid: int, slot: int, link: socket.socket) -> None:
        self.pid = pid
        self.slot = slot
        self.link = link
        self.began = monotonic()
        self.settings: Any = None  # that hold in it
        self.serves = False
        self.old = False           # there is newer code
        self.retiring = False      # it asks for a successor
        self.kill_at = 0.0         # it was told to end before then


class Master:
    """Forks workers and looks after them, until a signal says stop."""

    def __init__(self, load: Callable[[], Optional[Callable]], defaults: dict, flags: dict,
                 reloads: bool) -> None:
        self.load = load          # in a worker: imports the application, which may call run()
        self.defaults = defaults  # what holds where neither run() nor a flag says otherwise
        self.flags = flags        # of the command line: they beat what run() is given
        self.reloads = reloads    # load() gets new code; else the application is here already
        self.settings = Settings(grace=0)  # and no sockets, until the first worker has booted
        self.sockets: List[socket.socket] = []
        self.board = memoryview(mmap.mmap(-1, 64 * MAX_WORKERS + 8)).cast("d")
        self.workers: Dict[int, Process] = {}
        self.wanted = 1
        self.bell = Waker()       # rung by signals only: it holds their numbers
        self.served = False       # some worker has been ready
        self.trying = True        # one worker is to show whether the code serves
        self.asked = False        # HUP came: there is newer code
        self.stopping = False
        self.status = 0
        self.failures = 0         # workers in a row that did not serve for a second
        self.fork_at = 0.0
        self.on_signal: Dict[int, Callable[[], None]] = {
            signal.SIGTERM: partial(self.stop, signal.SIGTERM), signal.SIGCHLD: do_nothing,
            signal.SIGINT: partial(self.stop, signal.SIGTERM), signal.SIGUSR1: self.reopen,
            signal.SIGQUIT: partial(self.stop, signal.SIGKILL),
            signal.SIGHUP: partial(setattr, self, "asked", True),
            signal.SIGTTIN: partial(self.want, 1), signal.SIGTTOU: partial(self.want, -1)}

    def run(self) -> int:
        """Returns the exit status, when all workers have ended."""
        self.bell.on_signals(dict.fromkeys(self.on_signal, do_nothing))
        try:
            while self.workers or not self.stopping:
                self.balance()
                self.wait()
                for number in self.bell.drain():
                    self.on_signal[number]()
                self.reap()
                self.watch()
        finally:
            self.stop(signal.SIGKILL)
            self.bell.close()
        return self.status

    # -- signals --

    def stop(self, number: int) -> None:
        """TERM, INT: what is begun may end. A second time, and QUIT: at once."""
        number = signal.SIGKILL if self.stopping else number
        self.stopping = True
        for sock in self.sockets:
            sock.close()
        for process in self.workers.values():
            self.dismiss(process, number)

    def dismiss(self, process: Process, number: int = signal.SIGTERM) -> None:
        """It has `grace` to end; when it gives no sign of life, a second to write why."""
        seconds = 1.0 + self.settings.grace * (number != signal.SIGABRT)
        process.kill_at = process.kill_at or monotonic() + seconds
        os.kill(process.pid, number)

    def want(self, more: int) -> None:
        """TTIN, TTOU: a worker more or less."""
        self.wanted = min(max(1, self.wanted + more), MAX_WORKERS)

    def reopen(self) -> None:
        """USR1: the log file was moved away."""
        for pid in self.workers:
            os.kill(pid, signal.SIGUSR1)
        open_log(self.settings.log_file, again=True)

    # -- workers come and go --

    def balance(self) -> None:
        """Start whom we want, and let go whom we want no more."""
        if self.asked and not self.trying:
            self.asked, self.trying, self.fork_at, self.failures = False, True, 0.0, 0
            for process in self.workers.values():
                process.old = True
            if not self.reloads:
                log.warning("reload: new workers, but the code is that of when run() was called")
        while self.missing() > 0 and not self.stopping and monotonic() >= self.fork_at:
            try:
                self.fork()
            except OSError as error:  # no memory, too many processes: those that are here go on
                log.error("no new worker, for a second: %s", error)
                self.fork_at = monotonic() + 1.0
        serving = [p for p in self.workers.values() if p.serves and not p.kill_at]
        serving.sort(key=lambda p: (p.old, p.retiring, p.began))
        while len(serving) > self.wanted:
            self.dismiss(serving.pop())

    def missing(self) -> int:
        """How many to start now. Of those that retire, one at a time has its successor."""
        staying = [p for p in self.workers.values() if not p.old and not p.kill_at]
        if self.trying:
            return 1 - len(staying)
        return self.wanted - len(staying) or any(p.retiring for p in staying)

    def fork(self) -> None:
        used = {process.slot for process in self.workers.values()}
        slot = next(n for n in range(4 * MAX_WORKERS) if n not in used)  # some of them drain
        self.board[-1] = max(slot, *used, 0) + 1
        ours, theirs = socket.socketpair()
        flush_output()
        signal.pthread_sigmask(signal.SIG_BLOCK, self.on_signal)  # or our handler takes the child's
        try:
            pid = os.fork()
            if not pid:
                ours.close()
                self.be_child(theirs, slot)  # does not return
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self.on_signal)
            theirs.close()
        self.workers[pid] = Process(pid, slot, ours)

    def be_child(self, link: socket.socket, slot: int) -> NoReturn:
        """In the new process: become a worker, and end here whatever happens."""
        status = FAILED_STATUS
        try:
            self.bell.close()
            signal.set_wakeup_fd(-1)
            for number in self.on_signal:
                signal.signal(number, do_nothing)  # the master's to obey
            for number in (signal.SIGTERM, signal.SIGQUIT, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGUSR1, lambda number, frame: self.reopen())
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self.on_signal)
            while self.workers:
                self.workers.popitem()[1].link.close()
            for sock in self.sockets:  # they come again over the link
                sock.close()
            if sys.__stderr__ is not None:  # SIGABRT makes a hung worker show its stacks
                import faulthandler
                faulthandler.enable(2)
            if "random" in sys.modules:  # or all workers would draw the same numbers
                sys.modules["random"].seed()
            status = boot(partial(self.serve, link, slot), self.load, self.reloads)
            if self.reloads:  # code that was imported here: what it has registered runs here
                atexit._run_exitfuncs()
        except BaseException as error:
            print_traceback("a worker failed", error)
        finally:
            flush_output()
            os._exit(status)

    def serve(self, link: socket.socket, slot: int, app: Callable, options: dict) -> None:
        """In a worker: ask the master for the listeners, and serve until it says stop."""
        settings = self.settings = Settings(**{**self.defaults, **options, **self.flags})
        open_log(settings.log_file)
        tell(link, {"settings": vars(settings)})
        worker = Served(app, receive_sockets(link), settings, self.board, slot, link)
        worker.bell.on_signals({signal.SIGTERM: lambda number, frame: worker.drain(),
                                signal.SIGQUIT: lambda number, frame: worker.stop()})
        run_lifecycle(app, "start")
        worker.on_heartbeat(monotonic())
        tell(link, {"ready": os.getpid()})
        worker.monitor()
        bridge.cancel_all(SHUT_DOWN_SECONDS)

    def wait(self) -> None:
        """For a signal or a message, or until something is due."""
        timeout = heartbeat_of(self.settings)
        if any(p.kill_at for p in self.workers.values()):
            timeout = 0.1
        elif self.missing() > 0:
            timeout = min(timeout, max(0.0, self.fork_at - monotonic()))
        poll = select.poll()
        links = {p.link.fileno(): p for p in self.workers.values() if p.link.fileno() >= 0}
        for fd in (self.bell.fd, *links):
            poll.register(fd, select.POLLIN)
        for fd, _ in poll.poll(timeout * 1000):
            if fd in links:
                self.listen_to(links[fd])

    def listen_to(self, process: Process) -> None:
        """A worker has something to say: its settings, that it serves, or that it will end."""
        try:
            with process.link.makefile("rb", buffering=0) as lines:
                message = json_loads(lines.readline())
        except (OSError, ValueError):  # it has ended
            return process.link.close()
        if "retiring" in message:
            process.retiring = True
        elif "ready" in message:
            self.on_ready(process)
        else:
            self.give_listeners(process, Settings(**message["settings"]))

    def on_ready(self, process: Process) -> None:
        """It serves. If its code was on trial, the others follow, by its settings."""
        process.serves = True
        if not self.trying or process.old:
            return
        settings = process.settings
        if settings.bind != self.settings.bind:
            log.error("reload: it listens where it did: a new bind needs a restart")
        self.settings = settings
        self.wanted = max(1, count_workers(settings.workers))  # 0: there is a master
        self.trying = False
        self.balance()
        workers = f"{self.wanted}{' new' * self.served} worker{'s' * (self.wanted > 1)}"
        print_started(self.sockets, workers, settings)
        self.served = True

    def give_listeners(self, process: Process, settings: Settings) -> None:
        """What the first worker says holds: only now it is known where to listen."""
        process.settings = settings
        try:
            if not self.sockets:
                self.settings = settings
                open_log(settings.log_file)
                for address in settings.bind:
                    self.sockets.append(bind(address))
            fds = array("i", [sock.fileno() for sock in self.sockets])
            process.link.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        except (UsageError, StartError) as error:
            self.status = report(error)
            self.stop(signal.SIGKILL)
        except OSError:  # it has ended meanwhile
            pass

    def reap(self) -> None:
        """Take leave of the workers that have ended. As PID 1, of any orphan too."""
        for pid in repeat(-1) if os.getpid() == 1 else list(self.workers):
            try:
                ended, wait_status = os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:  # somebody else waited for it
                ended, wait_status = pid, 0
            process = self.workers.pop(ended, None)
            if process is not None:
                process.link.close()
                self.on_end(process, wait_status)
                self.board[2 * process.slot] = self.board[2 * process.slot + 1] = 0.0
            elif pid == -1 and ended <= 0:
                return

    def on_end(self, process: Process, wait_status: int) -> None:
        """A worker has ended. One that could not start stops us, unless another has served."""
        if process.kill_at:
            return
        number, status = os.WTERMSIG(wait_status), os.WEXITSTATUS(wait_status)
        cause = f"was ended by signal {number}" if number else f"ended with status {status}"
        if not self.served:
            if number:
                print_line(f"the first worker {cause} before it served")
            self.status = status or FAILED_STATUS
            return self.stop(signal.SIGKILL)
        if self.trying and not process.old:
            self.trying = False
            for other in self.workers.values():
                other.old = False
            return log.error("reload: the new worker %s, so the old ones stay", cause)
        lived = monotonic() - process.began
        served = bool(self.board[2 * process.slot])
        self.failures = 0 if served and lived > 1.0 else self.failures + 1
        pause = min(2 ** min(self.failures, 10) // 2, MAX_BACKOFF_SECONDS)
        self.fork_at = monotonic() + pause
        log.error("worker %s %s after %.0f s; a new one starts %s", process.pid, cause, lived,
                  f"in {pause} s" if pause else "now")

    def watch(self) -> None:
        """End a worker whose heart does not beat (code that keeps the GIL) or does not stop."""
        now = monotonic()
        for process in self.workers.values():
            beat = abs(self.board[2 * process.slot])
            if process.kill_at:
                if now > process.kill_at:
                    os.kill(process.pid, signal.SIGKILL)
            elif beat and now - beat > self.settings.worker_timeout + HEARTBEAT_SECONDS:
                log.error("worker %s gives no sign of life for %.0f s (worker_timeout): it is "
                          "ended, and its threads are below", process.pid, now - beat)
                self.dismiss(process, signal.SIGABRT)


def boot(serve: Callable[[Callable, dict], None], load: Callable[[], Optional[Callable]],
         is_target: bool) -> int:
    """Import the application and serve it; the exit status. Errors are the operator's to read."""
    served = []

    def running(app: Callable, options: dict) -> None:
        served.append(app)
        serve(app, options)

    if is_target:  # what it imports may call run(), of this file or of a copy of it
        sys.modules["minibottle.running"] = running  # type: ignore[assignment]
    try:
        app = load()
        if not served:
            if app is None:
                raise StartError("the target returned without run(), and is no application")
            running(app, {})
        return 0
    except (UsageError, StartError) as error:
        return report(error)
    except (EOFError, KeyboardInterrupt):  # the master has ended, or it is told to
        pass
    except SystemExit as error:
        print_line(f"the application ended with SystemExit({error.code!r})")
    except BaseException as error:
        print_traceback("the application cannot start", error)
    finally:
        if is_target:
            del sys.modules["minibottle.running"]
    return FAILED_STATUS


def report(error: Exception) -> int:
    """Say why the server does not start; the exit status."""
    print_line(str(error))
    return USAGE_STATUS if isinstance(error, UsageError) else FAILED_STATUS


def print_traceback(cause: str, error: BaseException) -> None:
    """An exception of the application's, without the frames that lead to it."""
    import traceback
    tb = error.__traceback__
    while tb is not None and (tb.tb_frame.f_code.co_filename == __file__ or re.search(
            "importlib|functools", tb.tb_frame.f_code.co_filename)):  # the latter on PyPy
        tb = tb.tb_next
    lines = traceback.format_exception(type(error), error.with_traceback(tb), tb)
    print_line(f"{cause}:\n{''.join(lines).rstrip()}")


def print_line(text: str) -> None:
    """For the operator, on stderr."""
    write_to(sys.stderr, f"minibottle: {text}\n")


def print_started(sockets: List[socket.socket], workers: str, settings: Settings) -> None:
    """The start-up line, and systemd's own (sd_notify(3))."""
    if "NOTIFY_SOCKET" in os.environ:
        companion("service").notify("READY=1")
    if settings.quiet:
        return
    where = ", ".join(format_address(sock, settings) for sock in sockets)
    print_line(f"{__version__} on {where}, {workers}, Python {sys.version.split()[0]}")


def format_address(sock: socket.socket, settings: Settings) -> str:
    name, scheme = sock.getsockname(), "https" if settings.cert else "http"
    return f"{scheme}://{join_port(*name[:2])}" if isinstance(name, tuple) else f"unix:{name}"


def join_port(host: str, port: Union[int, str]) -> str:
    """("::1", 80) -> "[::1]:80"."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def flush_output() -> None:
    """Before a fork, or both processes would write what is buffered."""
    write_to(sys.stdout)
    write_to(sys.stderr)


def open_log(path: str, again: bool = False) -> None:
    """What is printed goes to the end of this file; "-": where it goes already."""
    if path != "-":
        companion("service").open_log(path, again)


def count_workers(text: str) -> int:
    """"auto" -> the CPUs this process may use."""
    if text != "auto":
        return min(int(text), MAX_WORKERS)
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


ADDRESS = r"(?:\[([0-9A-Fa-f:.%a-z]+)\]|([^:\[\]/]*))(?::([0-9]{1,5}))?"


def parse_address(address: str) -> Tuple[str, int]:
    """"[::1]:80" -> ("::1", 80); "a.b" -> ("a.b", 8080); ":80" -> ("0.0.0.0", 80), any host."""
    match = re.fullmatch(ADDRESS, address)
    if not match or not address.strip("0123456789") or int(match[3] or 0) > 65535:
        raise UsageError(f"bad address {address!r}; it is host:port, [::1]:port, unix:/path "
                         "or fd:3")
    return match[1] or match[2] or "0.0.0.0", int(match[3] or 8080)


def bind(address: str) -> socket.socket:
    """"host:port", "[::1]:port", ":port" (any host), "unix:/path" or "fd:3" (one that is inherited)
    -> a listening socket. Raises UsageError, StartError."""
    if address.startswith(("fd:", "unix:")):
        return companion("service").bind(address)
    name = parse_address(address)
    family = socket.AF_INET6 if ":" in name[0] else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:  # on Windows SO_REUSEADDR lets others take the port, and its complement does not
        option = ~socket.SO_REUSEADDR if os.name == "nt" else socket.SO_REUSEADDR
        sock.setsockopt(socket.SOL_SOCKET, option, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(name)
        sock.listen(1024)
    except OSError as error:
        sock.close()
        raise StartError(f"cannot bind to {address}: {error.strerror or error}") from None
    return sock


def start(load: Callable[[], Optional[Callable]], defaults: dict, flags: dict,
          is_target: bool) -> int:
    """Serve with a master, or alone where there can be none; the exit status."""
    why = reason_to_be_alone(str({**defaults, **flags}.get("workers", DEFAULTS.workers)))
    if why is None:
        return Master(load, defaults, flags, is_target).run()
    if why and not defaults.get("quiet"):
        print_line(why)
    return boot(partial(serve_alone, defaults, flags), load, is_target)


def reason_to_be_alone(workers: str) -> Optional[str]:
    """None: a master can fork. "" or a line for the operator: it cannot."""
    if workers == "0":
        return ""
    if not hasattr(os, "fork"):
        return f"this system has no fork: one process with threads, not {workers} workers"
    if threading.current_thread() is not threading.main_thread():
        return "not in the main thread: one process with threads, no master"
    if threading.active_count() > 1:
        return "this process has threads already: one process, no master"
    return None


# === 15. Default app and command line =========================================
# The module-level shortcuts of Bottle, run(), and `python minibottle.py module:name`.

def make_default_app_wrapper(name: str) -> Callable:
    """A function that calls the method of the default application, whichever that is then."""
    @wraps(getattr(App, name))
    def shortcut(*args: object, **options: object) -> Any:
        return getattr(default_app(), name)(*args, **options)
    return shortcut


route, get, post, put, delete, patch, error, hook, install, uninstall, mount, url = map(
    make_default_app_wrapper, ("route", "get", "post", "put", "delete", "patch", "error", "hook",
                               "install", "uninstall", "mount", "get_url"))


# -- what is found under our name --

class Finder:
    """Finds the files that may lie beside this one, for `from minibottle.client import fetch`;
    under whatever name this file goes."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        owner, _, child = name.rpartition(".")
        if child not in COMPANIONS or getattr(
                sys.modules.get(owner), "COMPANIONS", None) is not COMPANIONS:
            return None
        from importlib.util import spec_from_file_location
        here = os.path.dirname(os.path.abspath(__file__))
        for path in (f"{here}/minibottle_{child}.py", f"{here}/examples/minibottle_{child}.py"):
            if os.path.isfile(path):
                return spec_from_file_location(name, path)
        raise MissingFile(f"{name} is a file of its own: lay minibottle_{child}.py, of "
                          f"minibottle's examples/, beside {__file__}", name=name)


__path__: list = []  # for the import system it is a package
sys.meta_path.append(Finder())

COMPANIONS = {  # files that may lie beside this one, and the names that are had from here, too
    "adapters": "ServerAdapter WSGIRefServer", "client": "Client ClientError fetch fetch_sync",
    "cross_origin": "cross_origin_protection", "debugging": "", "events": "event_stream",
    "ext": "PluginError html_quote install_as_bottle load_app path_shift yieldroutes",
    "gzip_middleware": "GzipMiddleware", "jinja": "Jinja2Template jinja2_template jinja2_view",
    "ini": "", "proxies": "", "reloading": "", "resources": "ResourceManager", "route_list": "",
    "service": "", "status": "", "testing": "Server TestClient", "tls": "",
    "websocket": "WebSocket WebSocketClosed WebSocketError connect_websocket"}


def __getattr__(name: str) -> Any:
    """minibottle.fetch is minibottle_client.py's (PEP 562)."""
    for file, names in COMPANIONS.items():
        if name in names.split():
            return getattr(companion(file), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# -- running --

NORUN = False      # run() does nothing, for load_app()
set_debug = debug  # in run(), debug is an argument


server_names: Dict[str, Any] = dict.fromkeys((  # None: the server of this file
    "minibottle auto aiohttp bjoern cheroot cherrypy diesel eventlet fapws3 flup gevent gunicorn "
    "meinheld paste rocket tornado twisted uvloop waitress").split())


def run(app: Union[None, str, Callable] = None, server: Any = "minibottle",
        host: str = "127.0.0.1", port: Union[int, str] = 8080, interval: float = 1,
        reloader: bool = False, quiet: bool = False, plugins: Optional[Iterable] = None,
        debug: Optional[bool] = None, config: Optional[dict] = None, **options: Any) -> None:
    """Serve a WSGI application (the default one, if none is given) until a signal says stop.

    `options` are settings (SETTINGS), or another server's own. The command line's flags beat them.
    In a process that has threads, or outside its main thread, it serves without a master. What
    cannot start is said in a line on stderr, and raises SystemExit. Raises MissingFile.
    """
    running: Any = sys.modules.get("minibottle.running")
    if NORUN:
        return
    if reloader and running is None:
        companion("reloading").keep_reloading(interval)
    made: Any = default_app() if app is None else app
    if isinstance(app, str):
        made = companion("ext").load_app(app)
    if debug is not None:
        set_debug(debug)
    for plugin in plugins or ():
        made.install(load(plugin) if isinstance(plugin, str) else plugin)
    if config:
        made.config.update(config)
    if not isinstance(server, str) or server_names.get(server, server) is not None:
        return companion("adapters").serve(made, server, host, port, quiet, options)
    if server not in ("minibottle", "auto"):
        print_line(f"server={server!r}: minibottle serves by itself")
    unknown = sorted(set(options) - set(vars(DEFAULTS)))
    if unknown:
        print_line(f"run() ignores {', '.join(unknown)}; there are {', '.join(vars(DEFAULTS))}")
    options = {"bind": join_port(host, port), "quiet": quiet,
               **{name: value for name, value in options.items() if name not in unknown}}
    if running is not None:
        return running(made, options)
    status = start(lambda: made, options, {}, is_target=False)
    if status:
        raise SystemExit(status)


def load_target(target: str) -> Optional[Callable]:
    """"module:name" -> the WSGI application that it names, makes or runs; None: it has run.

    Raises UsageError for what is not there, saying what is.
    """
    match = re.fullmatch(TARGET, target)
    if not match:
        raise UsageError(f"bad target {target!r}; it is module:name, such as app:main")
    module_name, name = match[1], match[2] or "app"
    try:
        found: Any = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # something that the module itself wants to import
        here = sorted(name[:-3] for name in os.listdir() if name.endswith(".py"))[:20]
        raise UsageError(f"no module {module_name!r}; here is "
                         f"{', '.join(here) or 'no Python file'}") from None
    if not match[2] and not hasattr(found, name) and default_app:
        return default_app()  # which the module has filled by route(), get(), ...
    where = module_name
    for part in name.split("."):
        if not hasattr(found, part):
            there = ", ".join(key for key, value in vars(found).items()
                              if callable(value) and not key.startswith("_"))
            raise UsageError(f"no {part!r} in {where}; there is {there or 'nothing callable'}")
        found = getattr(found, part)
        where = f"{where}.{part}"
    return as_application(found, target)


TARGET = r"(\w+(?:\.\w+)*)(?::(\w+(?:\.\w+)*))?"


def as_application(found: Any, target: str) -> Optional[Callable]:
    """An App or its class, a WSGI callable, or a callable without parameters that makes one."""
    if not callable(found):
        raise UsageError(f"{target} is {type(found).__name__}, not an application or a function")
    required = 2 if isinstance(found, App) else required_parameters(found)
    if required == 0:
        found = found()
        if found is not None and not callable(found):
            raise UsageError(f"{target}() returned {type(found).__name__}, not an application")
    elif required != 2:
        raise UsageError(f"{target} takes {required} arguments; a WSGI application takes two, and "
                         "a function that makes or runs one takes none")
    return found


def required_parameters(function: Callable) -> int:
    """How many arguments a call must give; 2 (WSGI) where that cannot be seen."""
    parameters = signature_of(function)
    if parameters is None or any(p.kind == p.VAR_POSITIONAL for p in parameters):
        return 2
    return sum(1 for p in parameters if p.default is p.empty
               and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def make_parser() -> Any:
    """The command line: a flag for each row of SETTINGS, and Bottle's."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UsageError(f"{message} (--help says what there is)")

    parser = Parser(
        prog="minibottle.py", description="Serve a WSGI application.",
        epilog="TARGET is module:name: an App, its class, any WSGI callable, or a function that "
               "makes one or calls run(). Times are in seconds, sizes in bytes.")
    parser.add_argument("target", metavar="TARGET")
    parser.add_argument("--version", action="version", version=f"minibottle {__version__}")
    for name, default, meaning in SETTINGS:
        flag = "--" + name.replace("_", "-")
        if isinstance(default, bool):
            parser.add_argument(flag, dest=name, action="store_true", default=None, help=meaning)
            parser.add_argument("--no-" + flag[2:], dest=name, action="store_false", default=None,
                                help=f"the opposite; {flag} is the default")
        else:
            flags = ["-b", flag] if name == "bind" else [flag]
            shown = ", ".join(default) if isinstance(default, tuple) else str(default)
            action = "append" if isinstance(default, tuple) else "store"
            parser.add_argument(*flags, dest=name, action=action, metavar="VALUE",
                                help=f"{meaning} ({shown or 'none'})")
    parser.add_argument("-s", "--server", metavar="NAME",
                        help="another server: wsgiref, or module:Class")
    parser.add_argument("--debug", action="store_true", help="show errors in the answers")
    parser.add_argument("--reload", action="store_true", help="start anew when a file changes")
    parser.add_argument("--routes", action="store_true", help="print the routes, and end")
    return parser


def main(argv: Optional[List[str]] = None) -> int:
    """The command line; returns the exit status."""
    import logging
    if not log.handlers and not logging.getLogger().handlers:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    sys.path.insert(0, os.getcwd())
    try:
        given = vars(make_parser().parse_args(argv))
        flags = {name: given[name] for name in vars(DEFAULTS) if given[name] is not None}
        flags = {name: value for name, value in vars(Settings(**flags)).items() if name in flags}
        debug(given["debug"])
        load = partial(load_target, given["target"])
        if given["routes"]:
            return boot(companion("route_list").print_routes, load, is_target=True)
        if given["reload"]:
            companion("reloading").keep_reloading(1.0)
        if given["server"]:
            app = load()
            if app is not None:
                run(app, given["server"], *parse_address(flags.get("bind", DEFAULTS.bind)[0]))
            return 0
        return start(load, {"access_log": True}, flags, is_target=True)
    except (UsageError, StartError) as error:
        return report(error)


if __name__ == "__main__":
    sys.modules["minibottle"] = sys.modules["__main__"]  # `import minibottle` finds this one
    sys.exit(main())
