"""The page of an error in debug mode: the request, and each frame with its source and variables.

A file to lay beside minibottle.py (with minibottle_proxies.py), where it is minibottle.debugging. A
browser sees the page when a handler fails under

    python minibottle.py app:main --debug

A program that accepts JSON gets the traceback as text. Variables whose names look like secrets are
hidden. There is nothing to type into, and nothing is loaded from elsewhere. It is for who sits at
this machine: where the server listens for others, too, the page is the plain one.
"""

from __future__ import annotations

import linecache
import os
import re
import reprlib
import traceback
from itertools import islice
from typing import Any, Dict, Iterator, List, Optional, Tuple

from . import App, html_escape, note_once, printable, request, response
from .proxies import is_local, is_loopback

LINES_AROUND = 5
MAX_FRAMES = 30       # of an exception: the first and the last
MAX_LOCALS = 50       # of a frame
MAX_EXCEPTIONS = 10   # one that was raised while another was handled, and so on

MAX_CHARS = 10000     # of a repr() are looked at, to show some hundreds

SECRET = re.compile("passw|passphrase|pwd|secret|token|key|cookie|authoriz|credential|session|csrf",
                    re.IGNORECASE)
HIDDEN = "***"
# A value that follows such a name within a repr(), and the password of a URL.
SECRET_VALUE = re.compile(
    rf"""((?:{SECRET.pattern})[\w-]{{0,40}}["']?\s*[:=]\s*b?)"""
    r"""('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[^\s,)}\]]+)""", re.IGNORECASE)
URL_PASSWORD = re.compile(r"(://[^\s/:@]*:)[^\s/@]+(?=@)")

CORE = App.wsgi.__code__.co_filename
LIBRARY = os.path.dirname(os.__file__)


def debug_page(error: Any) -> Optional[bytes]:
    """The body for an HTTPError of an exception, and its headers; None: the plain page will do."""
    accept = request.environ.get("HTTP_ACCEPT", "").lower()
    if "text/html" not in accept:
        if "json" not in accept:
            return None
        response.content_type = "text/plain; charset=UTF-8"
        return f"{error.status_line}\n\n{error.traceback}".encode("utf-8", "backslashreplace")
    if not is_loopback(request.environ.get("SERVER_NAME", "")):
        note_once("debug", "the debug page is not shown: %s is not loopback",
                  request.environ.get("SERVER_NAME", ""))
        return None
    if error.exception is None or not is_local(request.environ):
        return None
    response.set_header("Cache-Control", "no-store")
    response.set_header("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
    return "".join(iter_page(error)).encode("utf-8", "backslashreplace")


def iter_page(error: Any) -> Iterator[str]:
    """The pieces of the page, escaped."""
    first = error.exception
    title = html_escape(f"{type(first).__name__}: {show_message(first)}")
    yield PAGE_HEAD.format(title=title, what=html_escape(f"{request.method} {request.url}"))
    for cause, exception in chain_of(first):
        if cause:
            yield f"<h2>{cause}<br>{html_escape(type(exception).__name__)}: "
            yield f"{html_escape(show_message(exception))}</h2>\n"
        yield from iter_frames(exception)
    yield "<h2>Request</h2>\n"
    yield from iter_table(facts_of_request())
    yield f"<h2>Headers</h2>\n{''.join(iter_table(dict(request.headers)))}"
    yield "</body></html>\n"


def show_message(exception: BaseException) -> str:
    try:
        return hide_secrets(str(exception))
    except Exception as error:
        return f"(its str() raises {type(error).__name__})"


def chain_of(exception: BaseException) -> Iterator[Tuple[str, BaseException]]:
    """(how it belongs to the one before it, exception), the last one raised first."""
    cause = ""
    for _ in range(MAX_EXCEPTIONS):
        yield cause, exception
        if exception.__cause__ is not None:
            cause, following = "It was raised from", exception.__cause__
        elif exception.__context__ is not None and not exception.__suppress_context__:
            cause, following = "It was raised while this was handled:", exception.__context__
        else:
            return
        exception = following


# -- frames --

def iter_frames(exception: BaseException) -> Iterator[str]:
    """Those of the exception, from the first that is not the framework's to where it was raised."""
    frames = list(traceback.walk_tb(exception.__traceback__))
    start = next((i for i, (frame, _) in enumerate(frames)
                  if frame.f_code.co_filename != CORE), 0)
    frames = frames[start:]
    half = MAX_FRAMES // 2
    left_out = len(frames) - MAX_FRAMES
    for i, (frame, line) in enumerate(frames):
        if left_out <= 0 or i < half or i >= len(frames) - half:
            yield from iter_frame(frame, line, i == len(frames) - 1)
        elif i == half:
            yield f"<p>… {left_out} frames …</p>\n"


def iter_frame(frame: Any, line: int, is_last: bool) -> Iterator[str]:
    """One frame, open if it is the application's own, or the last."""
    name = frame.f_code.co_filename
    shown = " open" if is_last or name != CORE and not name.startswith(LIBRARY) else ""
    yield (f"<details{shown}><summary>{html_escape(name)}:{line} "
           f"<b>{html_escape(frame.f_code.co_name)}</b></summary>\n<pre>")
    for number, text in source_around(frame, line):
        mark = "mark" if number == line else "span"
        yield f"<{mark}>{number:5} {html_escape(text)}</{mark}>\n"
    yield "</pre>\n"
    yield from iter_table({name: show(name, value) for name, value in locals_of(frame)})
    yield "</details>\n"


def source_around(frame: Any, line: int) -> List[Tuple[int, str]]:
    """[(number, text), ...]; none of code that came from no file."""
    lines = linecache.getlines(frame.f_code.co_filename, frame.f_globals)
    start = max(0, line - 1 - LINES_AROUND)
    return [(number, text.rstrip("\r\n")[:1000]) for number, text
            in enumerate(lines[start:line + LINES_AROUND], start + 1)]


def locals_of(frame: Any) -> List[Tuple[str, object]]:
    """Without what Python puts there, and without the functions and modules of a module."""
    found = list(frame.f_locals.items())
    if frame.f_locals is frame.f_globals:
        found = [(name, value) for name, value in found
                 if not callable(value) and type(value) is not type(os)]
    return [(name, value) for name, value in found if name[:2] != "__"][:MAX_LOCALS]


# -- values --

class Shortener(reprlib.Repr):
    """repr() of anything: short, without secrets, and never an exception."""

    def __init__(self) -> None:
        super().__init__()
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 20
        self.maxstring = self.maxother = 500
        self.maxlevel = 4

    def repr_dict(self, x: dict, level: int) -> str:
        """The values of such keys are hidden, whatever their type."""
        if level <= 0:
            return "{...}"
        pieces = [f"{self.repr1(key, level - 1)}: "
                  + (HIDDEN if is_secret(key) else self.repr1(value, level - 1))
                  for key, value in islice(x.items(), self.maxdict)]
        return "{" + ", ".join(pieces + ["..."] * (len(x) > self.maxdict)) + "}"

    def repr_bytes(self, x: Any, level: int) -> str:
        return repr(x[:self.maxother]) + "..." * (len(x) > self.maxother)

    repr_bytearray = repr_bytes

    def repr_instance(self, x: object, level: int) -> str:
        try:
            text = hide_secrets(repr(x))
        except Exception as error:
            return f"<{type(x).__name__}, whose repr() raises {type(error).__name__}>"
        return text[:self.maxother] + "..." * (len(text) > self.maxother)


shorten = Shortener().repr


def is_secret(name: object) -> bool:
    return isinstance(name, (str, bytes)) and SECRET.search(
        name if isinstance(name, str) else name.decode("latin-1")) is not None


def hide_secrets(text: str) -> str:
    """"User(password='x')" -> "User(password=***)", "db://me:x@a" -> "db://me:***@a"."""
    text = SECRET_VALUE.sub(rf"\1{HIDDEN}", text[:MAX_CHARS])
    return URL_PASSWORD.sub(rf"\1{HIDDEN}", text)


def show(name: str, value: object) -> str:
    return HIDDEN if is_secret(name) else hide_secrets(shorten(value))


# -- the request --

def facts_of_request() -> Dict[str, str]:
    environ = request.environ
    route = environ.get("minibottle.route") and request.route
    facts = {"Method": request.method, "URL": hide_secrets(request.url),
             "Client": request.remote_addr or "", "Route": repr(route) if route else "none",
             "Arguments": show("", dict(request.url_args or {}))}
    return {name: printable(value) for name, value in facts.items()}


def iter_table(rows: Dict[str, Any]) -> Iterator[str]:
    """Two columns: a name and its text."""
    yield "<table>\n"
    for name, text in rows.items():
        text = HIDDEN if is_secret(name) else str(text)
        yield f"<tr><th>{html_escape(str(name))}</th><td>{html_escape(text)}</td></tr>\n"
    yield "</table>\n"


PAGE_HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width">
<style>
:root {{ color-scheme: light dark; --line: #8886; --mark: #fc06; }}
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 1rem auto; padding: 0 1rem;
  max-width: 70rem; }}
h1 {{ font-size: 1.4rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.1rem; margin: 1.5rem 0 .4rem; overflow-wrap: anywhere; }}
details {{ border: 1px solid var(--line); border-radius: 4px; margin: .4rem 0;
  padding: .3rem .6rem; }}
summary {{ cursor: pointer; overflow-wrap: anywhere; }}
pre, td, th {{ font: 13px/1.5 ui-monospace, monospace; }}
pre {{ overflow-x: auto; margin: .4rem 0; }}
mark {{ background: var(--mark); color: inherit; display: inline-block; min-width: 100%; }}
table {{ border-collapse: collapse; width: 100%; table-layout: fixed; }}
th, td {{ text-align: left; vertical-align: top; padding: .1rem .4rem;
  border-top: 1px solid var(--line); overflow-wrap: anywhere; }}
th {{ width: 25%; font-weight: 600; }}
</style></head>
<body><h1>{title}</h1>
<p>{what}</p>
"""
