"""Tests of minibottle: its values, its application, its server, its workers, its examples.

Run: python test_minibottle.py          (or pytest test_minibottle.py)

The sections are those of minibottle.py. What needs a program or a package that is not here is
skipped with a reason. Environment:
    MINIBOTTLE_LONG=1     more rounds, larger bodies, half a minute for each test of the loop
    MINIBOTTLE_SLOW=2     stretches every time limit by this factor
    MINIBOTTLE_FILE=PATH  the minibottle.py that the tests of the loop serve with, one with a rule
                          taken out, say: they must notice
"""

# Functions that are made in a loop here are called in the same round.
# ruff: noqa: B018, B023

import ast
import asyncio
import codecs
import collections
import concurrent.futures
import contextlib
import contextvars
import datetime
import decimal
import dis
import email.utils
import functools
import gc
import gzip
import hashlib
import html
import http.client
import http.cookies
import importlib
import importlib.util
import io
import itertools
import json
import logging
import ntpath
import os
import pickle
import queue
import random
import re
import select
import shlex
import shutil
import signal
import socket
import socketserver
import ssl
import stat
import statistics
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tokenize
import traceback
import types
import unittest
import urllib.parse
import uuid
import warnings
import weakref
import wsgiref.simple_server
import zlib
from unittest import mock
from urllib.parse import urljoin
from wsgiref.util import FileWrapper
from wsgiref.validate import WSGIWarning, validator

import minibottle
import minibottle.client as fetching
import minibottle.tls as tls_module
import minibottle.websocket as ws_module
from minibottle import (
    App, BadRequest, FileUpload, FormsDict, GzipMiddleware, Handler, HeaderDict, HTTPError,
    HTTPResponse, MultiDict, Request, Response, RouteBuildError, RouteSyntaxError, Server,
    Settings, SimpleTemplate, TemplateError, TestClient, UsageError, WebSocketClosed,
    WebSocketError, WSGIHeaderDict, abort, accepts_gzip, auth_basic, connect_websocket,
    cookie_decode, cookie_encode, cookie_is_encoded, event_stream, format_field, html_escape,
    http_date, iter_chunked, iter_parts, negotiate_gzip, parse_auth, parse_cookies, parse_date,
    parse_framing, parse_head, parse_qsl, parse_range_header, path_shift, redirect, request,
    response, safe_join, static_file, view)
from minibottle.websocket import (
    NO_TAKEOVER, OP_CLOSE, OP_PING, Deflate, accept_websocket, check_accepted, format_close,
    format_frame, format_message, iter_messages, parse_deflate, request_websocket)

LONG = os.environ.get("MINIBOTTLE_LONG") == "1"
only_cpython = unittest.skipUnless(sys.implementation.name == "cpython",
                                   "looks at CPython's memory or its GIL")
SLOW = float(os.environ.get("MINIBOTTLE_SLOW", "1"))
TIMEOUT = 20 * SLOW                    # seconds; only a hang comes near it
ROOT = os.path.dirname(os.path.abspath(__file__))
FILE = os.path.abspath(minibottle.__file__)
HAS_PROC = os.path.exists("/proc/self/task")
IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
UNICODE = "Łódź ŞĞÜ 日本 😀"
TEXT = ("Content-Type", "text/plain")
with open(FILE, "rb") as _file:
    SOURCE = _file.read()


# === 0. Helpers ===============================================================

def app_of(callback, path="/", method="GET", **options):
    """An App with this one route."""
    app = App(**options)
    app.route(path, method, callback)
    return app


def ask(app, path="/", method="GET", **options):
    """One request, as wsgiref.validate wants requests and answers to be."""
    return TestClient(validator(app)).request(method, path, **options)


def answer_of(callback, **options):
    return ask(app_of(callback), **options)


def environ_of(path="/", method="GET", **more):
    return {"REQUEST_METHOD": method, **{"PATH_INFO": path, **more}}


def outcome(function, *args):
    """What it returns, or for a BadRequest (status, message). Nothing else may be raised."""
    try:
        return function(*args)
    except BadRequest as error:
        return error.status, str(error)


class Closable:
    """An iterable that counts how often it was closed."""

    def __init__(self, pieces):
        self.pieces = iter(pieces)
        self.closed = 0
        self.ended = threading.Event()

    def __iter__(self):
        return self

    def __next__(self):
        piece = next(self.pieces)
        if isinstance(piece, Exception):
            raise piece
        return piece

    def close(self):
        self.closed += 1
        self.ended.set()


class UnitTest(unittest.TestCase):

    def assertQuick(self, function, *args, ms=100):
        """The best of three runs, in CPU time: what is quadratic takes seconds here."""
        best = float("inf")
        for _ in range(3):
            start = time.process_time()
            outcome(function, *args)
            best = min(best, (time.process_time() - start) * 1000)
            if best < ms * SLOW:
                return
            if best > 5 * ms * SLOW:
                break
        self.fail(f"{best:.0f} ms, over {ms * SLOW:.0f}")

    @contextlib.contextmanager
    def assertLogged(self):
        """One error is logged in here."""
        with self.assertLogs("minibottle", "ERROR") as logs:
            yield
        self.assertEqual(len(logs.records), 1, logs.output)


CANARY = b"GET /canary HTTP/1.1\r\nHost: x\r\n\r\n"


Answer = collections.namedtuple("Answer", "status reason headers body")


class Cut(EOFError):
    """The connection ended inside an answer."""


class Wire:
    """A raw client: sends bytes as they are, and takes nothing that is not a whole answer."""

    def __init__(self, port, receive_bytes=None):
        self.sock = socket.socket()
        self.sock.settimeout(TIMEOUT)
        if receive_bytes:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.connect(("127.0.0.1", port))
        self.file = self.sock.makefile("rb")

    def send(self, *pieces):
        for piece in pieces:
            self.sock.sendall(piece)
        return self

    def line(self):
        line = self.file.readline(65537)
        if not line.endswith(b"\r\n"):
            raise Cut(line)
        return line[:-2]

    def exactly(self, length):
        data = self.file.read(length)
        if len(data) < length:
            raise Cut("%d of %d bytes" % (len(data), length))
        return data

    def head(self):
        """The status line and the header: (status, reason, headers)."""
        version, status, reason = self.line().decode("latin-1").split(" ", 2)
        assert version == "HTTP/1.1", version
        return int(status), reason, http.client.parse_headers(self.file)

    def chunk(self):
        """One chunk; b"" is the last."""
        data = self.exactly(int(self.line(), 16))
        if self.line():
            raise Cut("no CRLF after a chunk")
        return data

    def answer(self, method="GET"):
        status, reason, headers = self.head()
        lengths = headers.get_all("Content-Length", [])
        if method == "HEAD" or status < 200 or status in (204, 304):
            body = b""
        elif "Transfer-Encoding" in headers:
            assert headers.get_all("Transfer-Encoding") == ["chunked"] and not lengths, headers
            body = b"".join(iter(self.chunk, b""))
        elif lengths:
            body = self.exactly(int(*lengths))
        else:
            body = self.file.read()
        return Answer(status, reason, headers, body)

    def answers(self):
        """Every answer until the server closes."""
        found = []
        while not self.is_closed():
            found.append(self.answer())
        return found

    def is_closed(self):
        """Wait for the next byte; True when there is none, because the server has closed."""
        return not self.file.peek(1)

    def reset(self):
        """Go away with a RST."""
        self.file.close()
        reset(self.sock)

    def close(self):
        self.file.close()
        self.sock.close()


class LogQueue(logging.Handler):
    """The messages of the logger "minibottle", as they come."""

    def __init__(self):
        super().__init__()
        self.queue = queue.Queue()

    def emit(self, record):
        self.queue.put(record.getMessage())

    def next(self):
        return self.queue.get(timeout=TIMEOUT)


class WireTest(unittest.TestCase):

    def serve(self, app, **settings):
        server = Server(app, port=0, **settings)
        server.__enter__()
        self.addCleanup(server.__exit__, None, None, None)
        return server

    def connect(self, server, **options):
        wire = Wire(server.port, **options)
        self.addCleanup(wire.close)
        return wire

    def fetch(self, server, data, method="GET"):
        """The one answer to `data`, which must be whole; the connection is closed after it."""
        with contextlib.closing(Wire(server.port)) as wire:
            return wire.send(data).answer(method)

    def listen_to_log(self):
        log, logger = LogQueue(), logging.getLogger("minibottle")
        minibottle.noted.clear()             # what is logged once in a process is logged once more
        logger.addHandler(log)
        self.addCleanup(logger.removeHandler, log)
        return log

    def assert_closed(self, wire):
        self.assertTrue(wire.is_closed(), "the connection is still open")


def get(path="/", *lines, method="GET", version="HTTP/1.1"):
    lines = ("%s %s %s" % (method, path, version), "Host: x") + lines
    return "\r\n".join(lines + ("", "")).encode("latin-1")


def post(*lines, body=b"", path="/"):
    return get(path, *lines, method="POST") + body


def chunked(body, *lines, path="/"):
    return post("Transfer-Encoding: chunked", *lines, body=body, path=path)


def reply(body, *headers, status="200 OK"):
    """An application that always answers so; a callable body is called for each request."""
    def app(environ, start_response):
        start_response(status, [TEXT, *headers])
        return body() if callable(body) else body
    return app


hello = reply([b"Hello World!"])


def break_off():
    yield b"x" * 10
    raise ValueError("broke off")


class Recorder:
    """An application that reads what it is sent, keeps every environ, and answers the path."""

    def __init__(self):
        self.calls = []

    def __call__(self, environ, start_response):
        environ["body"] = environ["wsgi.input"].read()
        self.calls.append(environ)
        start_response("200 OK", [TEXT])
        return [environ["PATH_INFO"].encode("latin-1")]

    @property
    def paths(self):
        return [environ["PATH_INFO"] for environ in self.calls]


# Modules that the server is started with; they lie in FOLDER, where it is started.
MODULES = {
    "lifecycle": """
import asyncio, os, sys, time
from minibottle import App

app = App()


def say(text):
    os.write(2, ("%s in %d\\n" % (text, os.getpid())).encode())    # at once: two workers do so


async def tick():
    try:
        await asyncio.sleep(60)
    finally:
        say("task cancelled")


@app.on_start
async def begin():
    app.task = asyncio.ensure_future(tick())
    say("started")


@app.on_start
def begin_too():
    say("started too")


@app.on_stop
def end():
    say("stopped")


@app.on_stop
async def end_too():
    await asyncio.sleep(0)
    say("stopped too")


@app.get("/")
async def index():
    return str(os.getpid())


@app.get("/block")
async def block():
    say("blocked")
    time.sleep(60)


class Broken(App):
    def __init__(self):
        super().__init__()

        @self.on_start
        async def fail():
            raise ValueError("no database")
""",
    "shop": """
import ctypes, gc, os, re, sys, time
import minibottle
from minibottle import App, request, response

app = App()
number = 42
made = [0]


@app.get("/")
def index():
    return "Hello World!"


@app.get("/pid")
def pid():
    return str(os.getpid())


@app.get("/same")
def is_one_module():
    main = sys.modules["__main__"]
    return {"same": minibottle is main and App is main.App, "path": sys.path[0] == os.getcwd()}


@app.get("/sleep/<seconds:float>")
def sleep(seconds):
    print("asleep", file=sys.stderr, flush=True)
    time.sleep(seconds)
    return "awake"


@app.get("/doze/<seconds:float>")
async def doze(seconds):                    # as nobody should, who has a coroutine
    time.sleep(seconds)


@app.get("/wait/<seconds:float>")
def wait(seconds):
    time.sleep(seconds)
    return str(os.getpid())


@app.get("/endless")
def endless():
    while True:
        yield "x" * 10
        time.sleep(0.05)


@app.get("/regex")
def backtrack():
    re.match("(a+)+$", "a" * 60 + "b")


@app.get("/hold")
def hold():
    ctypes.PyDLL(None).sleep(60)         # keeps the GIL, as a regex that backtracks does


@app.get("/spin")
def spin():
    while True:
        pass


@app.get("/raise")
def fail():
    print("a line for stdout")
    raise ValueError("it failed")


@app.get("/page")
def page():
    response.set_header("Content-Type", "text/plain")
    return "page " * 2000


@app.get("/pieces")
def pieces():
    for i in range(100):
        yield "piece %d " % i * 100


@app.get("/bytes/<count:int>")
def many_bytes(count):
    made[0] = 0
    for i in range(count // 65536):
        made[0] += 65536
        yield bytes(65536)


@app.get("/made")
def how_many():
    return str(made[0])


@app.get("/file")
def file():
    response.set_header("Content-Type", "application/octet-stream")
    return open(minibottle.__file__, "rb")


@app.get("/large")
def large():
    response.set_header("Content-Type", "application/octet-stream")
    return open("large", "rb")


@app.post("/size")
def size():
    return str(len(request.body.read()))


@app.post("/upload", stream=True, max_body=1 << 40)
def upload():
    total, source = 0, request.environ["wsgi.input"]
    for data in iter(lambda: source.read(65536), b""):
        total += len(data)
    return str(total)


@app.get("/collect")
def collect():
    return str(gc.collect())


held = []


@app.get("/hoard")
def hoard():
    with open(os.devnull) as file:
        try:
            while True:
                held.append(os.dup(file.fileno()))
        except OSError:
            pass
    return str(len(held))


@app.get("/release")
def release():
    while held:
        os.close(held.pop())


@app.get("/orphan")
def orphan():
    child = os.fork()
    if not child:
        grandchild = os.fork()
        if not grandchild:
            time.sleep(0.1)
        os._exit(0)
    os.waitpid(child, 0)


class Shop(App):
    def __init__(self):
        super().__init__()
        self.get("/", callback=lambda: "Hello World!")


class Corner:
    counter = app


def wsgi(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"Hello World!"]


class Callable:
    def __call__(self, environ, start_response):
        return wsgi(environ, start_response)


called = Callable()


def make():
    return Shop()


def make_wsgi(debug=False):
    return wsgi


def main():
    app.run(port=0)


def main_of_wsgi():
    minibottle.run(wsgi, host="127.0.0.1", port=0)


def main_of_two():
    app.run(port=0, workers=2)


def main_of_none():
    app.run(port=0, workers=0)


def main_with_options():
    app.run(host="host.invalid", port=1, max_body=5)


def main_with_a_typo():
    app.run(port=0, colour="red")


def main_with_a_word():
    app.run(port=0, grace="long")
""",
    "vendored/__init__": "",
    "vendored/shop": """
from .minibottle import App

app = App()
app.get("/", callback=lambda: "Hello World!")


@app.post("/collected")
@app.post("/streamed", stream=True)
def echo(request):
    return request.body.read()


def main():
    app.run(port=0)
""",
    "script": """
import minibottle, sys, threading, time
from shop import app

if __name__ == "__main__":
    if "with-threads" in sys.argv:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    app.run(port=0, workers=int(sys.argv[1]))
""",
    "reports": """
import os, sys
from shop import app

print("imported by", os.getpid(), file=sys.stderr, flush=True)
""",
    "raises": """
def connect():
    raise ValueError("no database")


connect()
""",
    "misspelt": "def app(environ start_response):\n    pass\n",
    "lacks": "import a_module_that_is_missing\n",
    "mains": """
import sys


def returns():
    pass


def makes_a_number():
    return 42


def raises():
    raise ValueError("no database")


def exits():
    sys.exit("out of bottles")
""",
    "frail": """
import os, sys, threading, time
from shop import app

if os.path.exists(os.environ["BROKEN"]):
    with open(os.environ["BROKEN"]) as file:
        seconds = float(file.read())
    if seconds < 0:
        print("waits", file=sys.stderr, flush=True)
        while os.path.exists(os.environ["BROKEN"]):
            time.sleep(0.01)
    elif not seconds:
        os._exit(7)
    else:
        threading.Timer(seconds, os._exit, [7]).start()
""",
    "slow": """
import sys, time

print("importing", file=sys.stderr, flush=True)
time.sleep(60)
""",
}
FOLDER = POOL = None                   # set by setUpModule


def setUpModule():
    global FOLDER, POOL
    POOL = concurrent.futures.ThreadPoolExecutor(8)
    FOLDER = os.path.realpath(tempfile.mkdtemp())
    os.mkdir(os.path.join(FOLDER, "vendored"))
    for name, text in MODULES.items():
        with open(os.path.join(FOLDER, name + ".py"), "w") as file:
            file.write(text.lstrip("\n"))
    with open(os.path.join(FOLDER, "large"), "wb") as file:
        file.truncate(50000000)
    shutil.copy(FILE, os.path.join(FOLDER, "vendored", "minibottle.py"))
    logging.getLogger("minibottle").addHandler(logging.NullHandler())
    warnings.simplefilter("ignore", WSGIWarning)     # methods that wsgiref does not know
    finish("--version")                  # compiled once, for all who start it as a module


def tearDownModule():
    POOL.shutdown()
    shutil.rmtree(FOLDER)


def make_environment(patch="", **env):
    """For a server in a process of its own; `patch` is code that runs before all other."""
    paths = [ROOT]
    if patch:
        paths.insert(0, tempfile.mkdtemp(dir=FOLDER))
        with open(os.path.join(paths[0], "sitecustomize.py"), "w") as file:
            file.write(patch)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1",
           "PYTHONPYCACHEPREFIX": os.path.join(FOLDER, "cache"), **env}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    return env


ZYGOTE = """
import json, os, signal, sys, tempfile
import minibottle

results = []
for args in json.load(sys.stdin):
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if not pid:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            signal.alarm(6)                  # for one that starts, instead of ending
            sys.exit(minibottle.main(args))
        status = os.waitpid(pid, 0)[1]
        texts = [(file.seek(0), file.read().decode())[1] for file in (out, err)]
        results.append([status >> 8 or -status, *texts])
json.dump(results, sys.stdout)
"""


def finish_each(rows):
    """What finish() gives for each row of arguments, by one process that forks for each."""
    done = subprocess.run([sys.executable, "-c", ZYGOTE], cwd=FOLDER, env=make_environment(),
                          input=json.dumps(rows), stdout=subprocess.PIPE, check=True,
                          timeout=TIMEOUT + 5 * len(rows), universal_newlines=True)
    return json.loads(done.stdout)


def finish(*args, start=("-m", "minibottle")):
    """Run a server that is to end by itself: (exit status, stdout, stderr)."""
    done = subprocess.run([sys.executable, *start, *args], cwd=FOLDER, env=make_environment(),
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=TIMEOUT, universal_newlines=True)
    return done.returncode, done.stdout, done.stderr


class Command:
    """`python -m minibottle ARGS`, by default on a free port, in a process group of its own.

    Its `urls` (and `url`, the first), lines of `out` and `err`, and exit `status`. `before` is a
    command to run it by, `python` are options of the interpreter.
    """

    STARTED = re.compile(r"minibottle: \S+ on (\S.*), (one process|\d+ workers?), Python ")

    def __init__(self, *args, before=(), python=(), start=("-m", "minibottle"), bind=True,
                 cwd=None, pass_fds=(), **env):
        self.argv = [*before, sys.executable, *python, *start, *args]
        if bind and "--bind" not in args:
            self.argv += ["--bind", "127.0.0.1:0"]
        self.cwd, self.env, self.pass_fds = cwd or FOLDER, make_environment(**env), pass_fds
        self.out, self.err = [], []
        self.changed = threading.Condition()
        self.status = None

    def __enter__(self):
        self.process = subprocess.Popen(
            self.argv, cwd=self.cwd, env=self.env, start_new_session=True, universal_newlines=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            pass_fds=self.pass_fds)
        self.pid = self.process.pid
        self.readers = [threading.Thread(target=self.read, args=pair) for pair in (
            (self.process.stdout, self.out), (self.process.stderr, self.err))]
        for reader in self.readers:
            reader.start()
        return self

    def read(self, stream, lines):
        for line in stream:
            with self.changed:
                lines.append(line)
                self.changed.notify_all()
        with self.changed:
            lines.append(None)
            self.changed.notify_all()

    def started(self):
        """Wait for the line that says so."""
        match = self.wait_for(self.STARTED.pattern)
        self.urls = match[1].split(", ")
        self.url = self.urls[0]
        self.workers = match[2]
        return self

    def find(self, pattern):
        for line in self.err + self.out:
            match = line and re.search(pattern, line)
            if match:
                return match
        return None

    def wait_for(self, pattern, timeout=TIMEOUT):
        """The match of the first line, written or to be written, that has it."""
        with self.changed:
            found = self.changed.wait_for(
                lambda: self.find(pattern) or None in self.err, timeout)
            match = self.find(pattern)
        if match:
            return match
        raise AssertionError("%s without %r:\n%s" % (
            "ended" if found else "waited", pattern, self.said()))

    def said(self):
        return "".join(line for line in self.err + self.out if line)

    def wait(self, timeout=TIMEOUT):
        """Its exit status, once it and all who can write to its outputs have ended."""
        self.status = self.process.wait(timeout)
        for reader in self.readers:
            reader.join(timeout)
        return self.status

    def stop(self, signum=signal.SIGTERM):
        self.process.send_signal(signum)
        return self.wait()

    def children(self):
        """Of the master: its workers."""
        return children(self.pid)

    def worker(self):
        """The pid of the process that serves."""
        return int(fetch(self.url, "/pid")[2])

    def __exit__(self, *exc_info):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()
        for reader in self.readers:
            reader.join()
        self.process.stdout.close()
        self.process.stderr.close()


@contextlib.contextmanager
def serve(*args, **options):
    """A Command that has started; an end by itself is no fault of it."""
    with Command(*args, **options) as command:
        yield command.started()


class Client(http.client.HTTPConnection):
    """One connection to a server's URL: http://, or unix: with a path."""

    def __init__(self, url):
        self.unix_path = url[5:] if url.startswith("unix:") else None
        super().__init__("localhost" if self.unix_path else url.split("//")[1], timeout=TIMEOUT)

    def connect(self):
        if not self.unix_path:
            return super().connect()
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.unix_path)

    def ask(self, path="/", method="GET", body=None, headers=None):
        """(status, headers, body); raises what http.client raises."""
        self.request(method, path, body, headers or {})
        answer = self.getresponse()
        return answer.status, answer.headers, answer.read()


def fetch(url, *args, **options):
    """One request on a connection of its own: (status, headers, body)."""
    with contextlib.closing(Client(url)) as client:
        return client.ask(*args, **options)


def connect(url, receive_bytes=None):
    """A plain socket to the server."""
    host, _, port = url.split("//")[1].rpartition(":")
    sock = socket.socket()
    sock.settimeout(TIMEOUT)
    if receive_bytes:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    try:
        sock.connect((host, int(port)))
    except OSError:
        sock.close()
        raise
    return sock


def is_refused(url):
    try:
        connect(url).close()
    except ConnectionError:
        return True


def read_all(sock):
    """What comes until the server closes."""
    return b"".join(iter(lambda: sock.recv(65536), b""))


def reset(sock):
    """Go away with a RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def wait_until(condition, seconds=TIMEOUT):
    """For what no event tells of: look until it is so. Gives what the condition gave last."""
    end = time.monotonic() + seconds
    while True:
        result = condition()
        if result or time.monotonic() > end:
            return result
        time.sleep(0.01)


def at_once(check, rows):
    """check(*row) for all rows, some at a time; tells of all that fail."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        futures = [(row, pool.submit(check, *row)) for row in rows]
    failed = ["%r: %s" % (row, future.exception()) for row, future in futures
              if future.exception()]
    if failed:
        raise AssertionError("\n\n".join(failed))


class PooledTest(unittest.TestCase):
    """Tests that mostly wait: all that were chosen of all its subclasses run at the same time, some
    at once, when the first is due, and report in turn; nothing else runs meanwhile."""

    chosen = []              # (class, name) of the tests that were made
    futures = {}             # (class, name) -> the outcome

    def __init__(self, name="runTest"):
        super().__init__(name)
        self.key = type(self), name
        self.chosen.append(self.key)

    def run(self, result=None):
        while self.chosen:
            kind, name = self.chosen.pop(0)
            if not getattr(kind, "__unittest_skip__", False):
                self.futures[kind, name] = POOL.submit(self.run_twin, kind, name)
        concurrent.futures.wait(self.futures.values())
        if self.key in self.futures:
            setattr(self, self.key[1], self.futures.pop(self.key).result)
        return super().run(result)

    def wait_for_workers(self, server, count, path="/pid"):
        """Until so many have answered."""
        with contextlib.ExitStack() as stack:
            pids = set()
            while len(pids) < count:
                client = stack.enter_context(contextlib.closing(Client(server.url)))
                pids.add(client.ask(path)[2])

    @staticmethod
    def run_twin(kind, name):
        twin = kind.__new__(kind)
        unittest.TestCase.__init__(twin, name)
        try:
            getattr(twin, name)()
        finally:
            twin.doCleanups()


# What the kernel knows of a process.

def read_proc(*parts):
    with open(os.path.join("/proc", *map(str, parts))) as file:
        return file.read()


def children(pid):
    return [int(child) for child in read_proc(pid, "task", pid, "children").split()]


def descriptors(pid):
    return len(os.listdir("/proc/%d/fd" % pid))


def memory(pid, field="VmRSS"):
    """Bytes; VmHWM is the highest so far."""
    return int(re.search(field + r":\s*(\d+)", read_proc(pid, "status")).group(1)) * 1024


def wakes(pid):
    """How often its threads have begun to wait, so far."""
    return sum(int(re.search(r"\nvoluntary_ctxt_switches:\s*(\d+)",
                             read_proc(pid, "task", task, "status")).group(1))
               for task in os.listdir("/proc/%d/task" % pid))


def cpu_seconds(pid):
    fields = read_proc(pid, "stat").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def is_alive(pid):
    try:
        return read_proc(pid, "stat").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def needs(*modules):
    """Skip a test or a class, by name, where one of these optional modules is missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return unittest.skipIf(missing, "needs " + " and ".join(missing))


def find_browser():
    """Path of a Chromium or Chrome, or None."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next(filter(None, map(shutil.which, names)), None)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@contextlib.contextmanager
def run_program(argv, port, cwd=None, env=None):
    """Any server, from when it accepts at this port; gives its URL."""
    url = "http://127.0.0.1:%d" % port
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(argv, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=said,
                                   stderr=said)
        try:
            if not wait_until(lambda: process.poll() is not None or not is_refused(url)) \
                    or process.poll() is not None:
                said.seek(0)
                raise AssertionError(said.read().decode())
            yield url
        finally:
            process.terminate()
            process.wait(TIMEOUT)


@contextlib.contextmanager
def run_nginx(port, text):
    """The URL of an nginx with this within `http { }`, which listens at this port."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "nginx.conf")
        with open(path, "w") as file:
            file.write(f"daemon off; error_log stderr; pid {folder}/pid; worker_processes 2; "
                       f"{'user root; ' if IS_ROOT else ''}events {{}} http {{ access_log off; ")
            for what in "client_body", "proxy", "fastcgi", "uwsgi", "scgi":
                file.write(f"{what}_temp_path {folder}/{what}; ")
            file.write(text + "}")
        with run_program([NGINX, "-p", folder, "-c", path], port) as url:
            yield url


def nginx_in_front(behind, directives=""):
    """The URL of an nginx that passes on to another server's."""
    port = free_port()
    return run_nginx(port, f"{directives} server {{ listen 127.0.0.1:{port}; location / {{ "
                           f"proxy_pass {behind}; }} }}")


NGINX = shutil.which("nginx")
CURL = shutil.which("curl")
BROWSER = find_browser()


class QuietHandler(wsgiref.simple_server.WSGIRequestHandler):

    def log_message(self, *args):
        pass


class ThreadingServer(socketserver.ThreadingMixIn, wsgiref.simple_server.WSGIServer):
    daemon_threads = False


@contextlib.contextmanager
def serve_wsgiref(app):
    """Run `app`, watched by the validator, on the standard library's server; gives its URL."""
    server = wsgiref.simple_server.make_server(
        "127.0.0.1", 0, validator(app), ThreadingServer, QuietHandler)
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield "http://127.0.0.1:{}".format(server.server_port)
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def serve_builtin(app):
    """Run `app` on minibottle's own server; gives its URL."""
    with Server(app, port=0) as server:
        yield server.url


@contextlib.contextmanager
def serve_gunicorn(target):
    """Run `module:call()` under gunicorn, whose control socket stays out of the home directory."""
    with Command("--bind", "127.0.0.1:0", "--threads=2", target, start=("-m", "gunicorn"),
                 XDG_RUNTIME_DIR=FOLDER) as command:
        yield command.wait_for(r"http://127\.0\.0\.1:\d+")[0]
        command.stop()


@contextlib.contextmanager
def serve_waitress(target):
    """Run `module:call` under waitress."""
    with Command("--listen=127.0.0.1:0", "--call", target, start=("-m", "waitress"),
                 bind=False) as command:
        yield command.wait_for(r"http://127\.0\.0\.1:\d+")[0]
        command.stop()


class OverSocket:
    """A class whose tests share one server: `serve()`, a context manager, gives its `url`."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        server = cls.serve()
        cls.url = server.__enter__()
        cls.addClassCleanup(server.__exit__, None, None, None)


# === 1. Errors and limits =====================================================

class SettingsTest(UnitTest):

    def test_values_come_as_they_are_or_as_text(self):
        for name, given, expected in (
                ("grace", "5", 5.0), ("grace", 0.25, 0.25), ("max_threads", "8", 8),
                ("gzip", False, False), ("workers", 3, "3"), ("workers", "auto", "auto"),
                ("bind", "unix:/x", ("unix:/x",)), ("bind", ["a:1", "b:2"], ("a:1", "b:2"))):
            with self.subTest(name=name, given=given):
                self.assertEqual(getattr(Settings(**{name: given}), name), expected)

    def test_a_bad_value_is_named_with_its_setting(self):
        for name, value in (
                ("grace", "soon"), ("grace", -1), ("grace", float("nan")), ("grace", float("inf")),
                ("grace", None), ("grace", True), ("max_threads", "1.5"), ("max_threads", 1 << 70),
                ("gzip", "no"), ("gzip", 1), ("gzip_level", 77), ("workers", "many"),
                ("workers", "-1"), ("workers", "²"), ("workers", 1.5), ("bind", []),
                ("bind", [5]), ("bind", 5), ("bind", None)):
            with self.subTest(name=name, value=value):
                with self.assertRaises(UsageError) as caught:
                    Settings(**{name: value})
                self.assertIn(name, str(caught.exception))
                self.assertIn(repr(value), str(caught.exception))

    def test_an_unknown_setting_is_refused_and_those_that_are_there_are_listed(self):
        with self.assertRaisesRegex(UsageError, "(?s)max_bodi.*max_body"):
            Settings(max_bodi=1)
        with self.assertRaises(AttributeError):
            Settings().max_bodi


# === 2. Text and dates ========================================================

class DateTest(UnitTest):
    """RFC 9110 5.6.7."""

    def test_dates_agree_with_the_standard_library(self):
        late = 4102444800 if sys.maxsize > 1 << 32 else 0x7fffffff  # time_t of 32 bits ends in 2038
        for moment in (0, 1, 784111777, 951827696, 1e9 + 0.9, late, -86400):
            utc = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc) \
                + datetime.timedelta(seconds=int(moment))
            expected = email.utils.format_datetime(utc, usegmt=True)
            there = utc.astimezone(datetime.timezone(datetime.timedelta(hours=5, minutes=30)))
            for value in (int(moment), utc, there, utc.replace(tzinfo=None), utc.timetuple()):
                with self.subTest(value=value):
                    self.assertEqual(http_date(value), expected)

    def test_a_date_is_its_midnight_and_text_stays(self):
        self.assertEqual(http_date(datetime.date(2024, 2, 29)), "Thu, 29 Feb 2024 00:00:00 GMT")
        self.assertEqual(http_date("Thu, 29 Feb 2024"), "Thu, 29 Feb 2024")

    def test_a_date_is_read_in_each_of_its_three_forms(self):
        for text, expected in (
                ("Sun, 06 Nov 1994 08:49:37 GMT", 784111777),
                ("Sunday, 06-Nov-94 08:49:37 GMT", 784111777),
                ("Sun Nov  6 08:49:37 1994", 784111777), (http_date(1e9), 1e9),
                ("", None), ("Bad 123", None), ("yesterday", None), ("\x00", None),
                ("Sun, 99 Nov 1994 99:99:99 XXX +9999999999999", None), ("1 1 1 1 1 1", None)):
            with self.subTest(text=text):
                found = parse_date(text)
                self.assertEqual(None if expected is None else found, expected)
        for text in ("a ", "1,", "Sun, ", ":"):
            self.assertQuick(parse_date, text * (32768 // len(text)))


class TextTest(UnitTest):

    def test_escaped_html_is_safe_in_text_and_in_attributes(self):
        text = "<a href=\"x\">&'ö</a>&amp;"
        self.assertEqual(html.unescape(html_escape(text)), text)
        self.assertFalse(set(html_escape(text)) & set("<>\"'"))

    def test_a_quoted_attribute_has_its_quotes_and_one_line(self):
        self.assertEqual(minibottle.html_quote("<'\r\n\t\">"),
                         '"&lt;&#039;&#13;&#10;&#9;&quot;&gt;"')

    def test_segments_move_between_the_two_parts_of_a_path(self):
        for script, path, shift, expected in (
                ("/a", "/b/c", 1, ("/a/b", "/c")), ("/a/", "/b/c/", 1, ("/a/b", "/c/")),
                ("", "/b/c/", 2, ("/b/c", "/")), ("/a/b", "/c", -1, ("/a", "/b/c")),
                ("/a", "/", -1, ("/", "/a/")), ("/a", "/b", 0, ("/a", "/b"))):
            with self.subTest(script=script, path=path, shift=shift):
                self.assertEqual(path_shift(script, path, shift), expected)
        for shift in (-2, 2):
            self.assertRaises(AssertionError, path_shift, "/a", "/b", shift)

    def test_json_that_is_none_is_a_value_error(self):
        for text in ("NaN", "[Infinity]", "-Infinity", "[" * 100000, '{"a":' * 100000, "", "{",
                     "[1,]", "'a'", b"\xff", "[1]".encode("utf-16")):
            with self.subTest(text=text[:20]), self.assertRaises(ValueError):
                answer_of(lambda: text).json

    def test_json_goes_out_as_the_standard_library_reads_it(self):
        stamp, name = datetime.datetime(2024, 2, 29, 12), uuid.UUID(int=5)
        value = {"text": UNICODE + "\x00\u2028</script>", "n": [1, -2.5, None, True],
                 "when": stamp, "day": stamp.date(), "id": name, "cost": decimal.Decimal("1.10")}
        got = json.loads(answer_of(lambda: value).body)
        self.assertEqual(got, {**value, "when": stamp.isoformat(), "day": "2024-02-29",
                               "id": str(name), "cost": "1.10"})

    def test_what_has_no_json_form_is_a_500(self):
        loop = {}
        loop["loop"] = loop
        for value in ({"a": float("nan")}, {"a": object()}, {"a": {1, 2}}, {"a": b"x"}, loop):
            with self.subTest(value=type(value["a" if "a" in value else "loop"])):
                with self.assertLogged():
                    self.assertEqual(answer_of(lambda: value).status_code, 500)


# === 3. Headers and multidicts ================================================

COOKIE_ATTRIBUTES = (
    "path Path PATH domain Domain DOMAIN max_age maxage Max_Age MAX_AGE Max-Age expires Expires "
    "EXPIRES samesite same_site SameSite Same_Site SAMESITE same-site").split()

SINKS = {  # everything through which text gets into a head; r is a Response
    "set_header value": lambda r, bad: r.set_header("X-A", bad),
    "set_header name": lambda r, bad: r.set_header(bad, "1"),
    "add_header value": lambda r, bad: r.add_header("X-A", bad),
    "add_header name": lambda r, bad: r.add_header(bad, "1"),
    "headers[name]": lambda r, bad: r.headers.__setitem__("X-A", bad),
    "headers[bad]": lambda r, bad: r.headers.__setitem__(bad, "1"),
    "response[name]": lambda r, bad: r.__setitem__("X-A", bad),
    "headers.append": lambda r, bad: r.headers.append("X-A", bad),
    "headers.replace": lambda r, bad: r.headers.replace("X-A", bad),
    "headers.update": lambda r, bad: r.headers.update({"X-A": bad}),
    "headers.setdefault": lambda r, bad: r.headers.setdefault("X-A", bad),
    "bytes": lambda r, bad: r.set_header("X-A", bad.encode()),
    "content_type": lambda r, bad: setattr(r, "content_type", bad),
    "content_length": lambda r, bad: setattr(r, "content_length", bad),
    "expires": lambda r, bad: setattr(r, "expires", bad),
    "status": lambda r, bad: setattr(r, "status", "404 " + bad),
    "Response status": lambda r, bad: Response("", "404 " + bad),
    "Response headers": lambda r, bad: Response("", 200, {"X-A": bad}),
    "Response pairs": lambda r, bad: Response("", 200, [("X-A", bad)]),
    "Response keyword": lambda r, bad: Response("", 200, X_A=bad),
    "HTTPResponse keyword": lambda r, bad: HTTPResponse("", 200, X_A=bad),
    "HTTPResponse name": lambda r, bad: HTTPResponse("", 200, **{bad: "1"}),
    "HTTPError keyword": lambda r, bad: HTTPError(400, "", Allow=bad),
    "redirect": lambda r, bad: redirect("/" + bad),
    "cookie name": lambda r, bad: r.set_cookie(bad, "1"),
    "cookie value": lambda r, bad: r.set_cookie("a", bad),
    "delete_cookie name": lambda r, bad: r.delete_cookie(bad),
    "delete_cookie path": lambda r, bad: r.delete_cookie("a", path=bad),
}
for _key in COOKIE_ATTRIBUTES:
    SINKS["cookie " + _key] = lambda r, bad, key=_key: r.set_cookie("a", "1", **{key: bad})

BREAKS = ["\r", "\n", "\0", "\x01", "\x08", "\x0b", "\x1b", "\x1f", "\x7f", "\r\n",
          "\r\nSet-Cookie: b=2\r\n"]


class HeaderSinkTest(UnitTest):
    """RFC 9110 5.5, RFC 6265 4.1: response splitting. Each sink, each character, each place."""

    def test_no_control_character_gets_into_a_head(self):
        for sink, put in SINKS.items():
            let_in = []
            for bad in (text for c in BREAKS for text in (c + "a", "a" + c + "b", "a" + c)):
                answer = Response()
                try:
                    put(answer, bad)
                    let_in.append(bad)
                except ValueError:
                    pass
                except HTTPResponse:
                    let_in.append(bad)
                self.assertNotRegex("".join(sum(answer.headerlist, ())), r"[\x00-\x1f\x7f]")
            with self.subTest(sink=sink):
                self.assertEqual(let_in, [])

    def test_a_semicolon_cannot_begin_another_cookie_attribute(self):
        for key in COOKIE_ATTRIBUTES:
            for bad in ("a; Domain=evil.example", ";", "1;HttpOnly", "Lax; Secure"):
                with self.subTest(key=key, bad=bad), self.assertRaises(ValueError):
                    Response().set_cookie("a", "1", **{key: bad})

    def test_a_flag_of_a_cookie_carries_no_text(self):
        for key in ("secure", "Secure", "httponly", "HttpOnly", "HTTPONLY", "partitioned"):
            answer = Response()
            answer.set_cookie("a", "1", **{key: "\r\nx; Domain=y"})
            self.assertEqual(answer.headerlist[-1][1].lower(), "a=1; " + key.lower())

    def test_a_name_is_an_ascii_token(self):
        for name in ("", "a b", "a:b", "(a)", "a\t", "é", "日本", 'a"b', "a,b", "a/b",
                     "\u017fet-cookie", "\u0131d"):  # these two title() to ASCII
            with self.subTest(name=name), self.assertRaises(ValueError):
                HeaderDict().append(name, "1")

    def test_a_name_in_bytes_is_read_or_refused_but_never_mangled(self):
        try:
            self.assertEqual(list(HeaderDict({b"X-A": "1"})), ["X-A"])
        except (TypeError, ValueError):
            pass

    def test_any_text_in_a_value_is_sent_as_utf_8(self):
        answer = answer_of(lambda: HTTPResponse("", 200, X_A=UNICODE, X_B=b"\xc3\xb6", X_C=5))
        self.assertEqual([answer.headers[name] for name in ("x-a", "x-b", "x-c")],
                         [UNICODE, "ö", "5"])

    def test_text_that_has_no_utf_8_form_is_a_500(self):
        def surrogate():
            response.set_header("X-A", "\ud800")
            return "x"
        with self.assertLogged():
            self.assertEqual(answer_of(surrogate).status_code, 500)


class MultiDictTest(UnitTest):

    def test_the_last_value_counts_and_all_are_kept(self):
        for kind in (MultiDict, FormsDict):
            fields = kind(a="1")
            fields["a"] = "2"
            fields.update(b="3")
            self.assertEqual((fields["a"], fields.get("a"), fields.getone("a")), ("2", "2", "2"))
            self.assertEqual((fields.getall("a"), fields.getlist("a")), (["1", "2"], ["1", "2"]))
            self.assertEqual(list(fields.allitems()), [("a", "1"), ("a", "2"), ("b", "3")])
            self.assertEqual((dict(fields), sorted(fields.values())),
                             ({"a": "2", "b": "3"}, ["2", "3"]))
            self.assertEqual((len(fields), list(fields), "a" in fields, "c" in fields),
                             (2, ["a", "b"], True, False))
            fields.replace("a", "4")
            self.assertEqual(fields.getall("a"), ["4"])
            self.assertEqual((fields.pop("a"), fields.getall("a")), ("4", []))
            with self.assertRaises(KeyError):
                fields["a"]
            self.assertEqual(pickle.loads(pickle.dumps(fields)), fields)

    def test_get_takes_an_index_and_a_type_and_swallows_what_does_not_fit(self):
        fields = MultiDict(a="x")
        fields.append("a", "5")
        for given, expected in (((None, -1, int), 5), ((7, 0, int), 7), ((None, 0), "x"),
                                ((7, 9), 7), ((None, -1, "no type"), None)):
            with self.subTest(given=given):
                self.assertEqual(fields.get("a", *given), expected)
        self.assertEqual(fields.get("b", 7, type=int), 7)

    def test_a_form_field_is_an_attribute_and_a_missing_one_is_empty(self):
        fields = FormsDict(name=UNICODE, keys="shadowed")
        self.assertEqual((fields.name, fields.nothing, fields.getunicode("name"),
                          fields.getunicode("nothing", 5)), (UNICODE, "", UNICODE, 5))
        self.assertTrue(hasattr(fields, "nothing") and callable(fields.keys))
        self.assertFalse(hasattr(fields, "__wrapped__"))
        copy = fields.decode()
        copy.name = "plain"
        self.assertEqual((copy.name, copy["name"], fields.name), ("plain", UNICODE, UNICODE))

    def test_headers_have_no_case_and_assignment_replaces(self):
        headers = HeaderDict({"content_type": "a"}, x_a=1)
        headers["CONTENT-type"] = "b"
        headers.append("X-a", 2)
        self.assertEqual((headers["Content-Type"], headers.get("content_TYPE"), "X_A" in headers),
                         ("b", "b", True))
        self.assertEqual((headers.getall("x-a"), list(headers)),
                         (["1", "2"], ["Content-Type", "X-A"]))
        headers.filter(["content-TYPE", "not-there"])
        self.assertEqual((len(headers), headers.get("Content-Type", 5)), (1, 5))
        del headers["x-A"]
        self.assertEqual(len(headers), 0)

    def test_every_way_to_read_a_header_has_no_case(self):
        headers = HeaderDict(X_A="1")
        self.assertEqual((headers.getone("x-a"), headers.getlist("x-a")), ("1", ["1"]))

    def test_request_headers_are_a_view_of_the_environ(self):
        environ = {"HTTP_X_A": "1", "CONTENT_TYPE": "a/b", "CONTENT_LENGTH": "5",
                   "HTTP_X_U": UNICODE.encode().decode("latin-1"), "HTTP_X_BAD": "\xff",
                   "PATH_INFO": "/", "wsgi.x": "y"}
        headers = WSGIHeaderDict(environ)
        self.assertEqual((headers["x-a"], headers.get("content-TYPE"), headers["Content_Length"]),
                         ("1", "a/b", "5"))
        self.assertEqual((headers["X-U"], headers.raw("x-u"), headers["X-Bad"]),
                         (UNICODE, environ["HTTP_X_U"], "\ufffd"))
        self.assertEqual(sorted(headers), ["Content-Length", "Content-Type", "X-A", "X-Bad", "X-U"])
        self.assertEqual((len(headers), "X-C" in headers, headers.get("X-C", 5)), (5, False, 5))
        environ["HTTP_X_C"] = "3"
        self.assertEqual(headers["X-C"], "3")
        with self.assertRaises(TypeError):
            headers["X-A"] = "2"


# === 4. HTTP/1.1 codec ========================================================

def head(*lines, first="GET / HTTP/1.1"):
    return "\r\n".join((first, "Host: x") + lines)


GOOD_HEADS = [  # (head, part of its environ)
    ("GET / HTTP/1.0", {"REQUEST_METHOD": "GET", "PATH_INFO": "/", "QUERY_STRING": "",
                        "SERVER_PROTOCOL": "HTTP/1.0"}),
    (head(first="GET /a%20b/%C3%B6?c=%20&d?e HTTP/1.1"),
     {"PATH_INFO": "/a b/Ã¶", "QUERY_STRING": "c=%20&d?e",
      "REQUEST_URI": "/a%20b/%C3%B6?c=%20&d?e"}),
    (head(first="GET /%zz%4 HTTP/1.1"), {"PATH_INFO": "/%zz%4"}),
    (head(first="GET //a//b?? HTTP/1.1"), {"PATH_INFO": "//a//b", "QUERY_STRING": "?"}),
    (head(first="M-SEARCH /\xc3\xb6 HTTP/1.1"), {"REQUEST_METHOD": "M-SEARCH",
                                                 "PATH_INFO": "/Ã¶"}),
    (head(first="OPTIONS * HTTP/1.1"), {"REQUEST_METHOD": "OPTIONS", "HTTP_HOST": "x"}),
    (head(first="GET http://Y:8080/a%20b?c HTTP/1.1"),
     {"HTTP_HOST": "Y:8080", "PATH_INFO": "/a b", "QUERY_STRING": "c"}),
    (head(first="GET HTTP://y?c HTTP/1.1"),
     {"HTTP_HOST": "y", "PATH_INFO": "/", "QUERY_STRING": "c"}),
    (head("X-A: 1", "x-a:2", "X-A:\t3 \t"), {"HTTP_X_A": "1, 2, 3"}),
    (head("Cookie: a=1", "Cookie: b=2"), {"HTTP_COOKIE": "a=1; b=2"}),
    (head("Content-Type: a/b", "Content-Length: 5", "Empty:", "Colons: a:b:c", "Tab: a\tb"),
     {"CONTENT_TYPE": "a/b", "CONTENT_LENGTH": "5", "HTTP_EMPTY": "", "HTTP_COLONS": "a:b:c",
      "HTTP_TAB": "a\tb"}),
    (head("Latin: \xe9\x85\xa0"), {"HTTP_LATIN": "\xe9\x85\xa0"}),  # no white space but SP and HTAB
    (head("!#$%&'*+-.^`|~0: 1"), {"HTTP_!#$%&'*+_.^`|~0": "1"}),
    ("GET / HTTP/1.1\r\nHost: [::1]:80", {"HTTP_HOST": "[::1]:80"}),
    ("GET / HTTP/1.1\r\nHost:", {"HTTP_HOST": ""}),
]
BAD_HEADS = {  # what the message holds: heads
    "bad request line": ["", "GET /", "GET / HTTP/1.1 ", "GET  / HTTP/1.1", "G(T / HTTP/1.1",
                         "GET /\u20ac HTTP/1.1", "GET /a\tb HTTP/1.1", " GET / HTTP/1.1"],
    "fragment": [head(first="GET /a#b HTTP/1.1")],
    "HTTP/2.0": [head(first="GET / HTTP/2.0")],
    "CONNECT": [head(first="CONNECT a:1 HTTP/1.1")],
    "bad request target": [head(first="GET %s HTTP/1.1" % target)
                           for target in ("*", "a", "ftp://a/", "http:///a", "http://?a")],
    "bad host": [*(head(first="GET http://%s/ HTTP/1.1" % host) for host in ("u@a", "a:b", "[a")),
                 *("GET / HTTP/1.%d\r\nHost: %s" % (i, host) for i in (0, 1)
                   for host in ("a b", "a/b", "u@a", "a,b", "a:b", "\xe9", "[::1")),
                 head(first="GET http://:80/a HTTP/1.1")],  # RFC 9110 4.2.1
    "no Host": ["GET / HTTP/1.1", "GET / HTTP/1.1\r\nX-Host: x", "GET http://a/ HTTP/1.1",
                "OPTIONS * HTTP/1.1"],  # RFC 9112 3.2
    "more than one Host": [head("Host: x"), head("host: y")],
    "more than one Content-Length": [head("Content-Length: 1", "content-length: 1")],
    "more than one Transfer-Encoding": [head(*["Transfer-Encoding: chunked"] * 2)],
    "more than one Content-Type": [head("Content-Type: a/b", "Content-Type: a/b")],
    "no colon": [head(""), head("nothing")],
    "bad name": [head(": a"), head("A B: c"), head("\xe9: c"), head("(A): b")],
    "white space before the colon": [head("A : c"), head("A\t: c")],
    "folding": [head("A: b", " c"), head("A: b", "\tc: d"), head(" A: b")],
    "control character": [head(line) for line in ("A: b\rc", "A: b\nc: d", "A: \0", "A: b\x0b",
                                                  "A\x0b: b", "A: \x7f", "A: \x1b[31m")],
    "100 headers": [head(*["A: b"] * 100)],
}
STATUSES = {"HTTP/2.0": 505, "CONNECT": 501, "100 headers": 431}  # the others are 400
HEADS = [text for text, _ in GOOD_HEADS] + sum(BAD_HEADS.values(), [])
SHARED = {"wsgi.version": (1, 0), "SERVER_NAME": "y"}


def template():
    """A listener's part of every environ; a new one has seen no request line."""
    return getattr(minibottle, "Template", dict)(SHARED)


def forget():
    for memo in ("field_lines", "field_names", "request_lines"):
        getattr(minibottle, memo, {}).clear()


def parse(text, *limits):
    return parse_head(text, template(), *limits)


class HeadTest(UnitTest):
    """RFC 9112 3 and 5."""

    def test_a_good_head_is_an_environ(self):
        for text, expected in GOOD_HEADS:
            with self.subTest(text=text):
                environ = parse(text)
                self.assertEqual({**environ, **expected, **SHARED}, environ)

    def test_a_bad_head_is_refused_with_its_cause(self):
        for cause, heads in BAD_HEADS.items():
            for text in heads:
                with self.subTest(text=text[:60]):
                    with self.assertRaisesRegex(BadRequest, cause) as got:
                        parse(text)
                    self.assertEqual(got.exception.status, STATUSES.get(cause, 400))

    def test_remembered_lines_give_the_same_as_unknown_ones(self):
        for text in HEADS:
            forget()
            shared = template()
            plain = outcome(parse_head, text, shared)
            with self.subTest(text=text[:60]):
                self.assertEqual(outcome(parse_head, text, shared), plain)
                for other in HEADS:
                    outcome(parse_head, other, shared)
                self.assertEqual(outcome(parse_head, text, shared), plain)

    def test_an_environ_belongs_to_its_request(self):
        text, shared = head("X-A: 1", first="GET /a?b HTTP/1.1"), template()
        environ = parse_head(text, shared)
        before = dict(environ)
        environ.update(dict.fromkeys(environ, "changed"), HTTP_X_B="2")
        self.assertEqual((parse_head(text, shared), shared), (before, SHARED))

    @only_cpython
    def test_what_is_remembered_is_bounded_and_holds_no_secret(self):
        forget()
        parse(head("Cookie: s=secret", "AUTHORIZATION: Basic secret", "Long: " + "secret" * 99,
                   "Proxy-Authorization: secret"))
        self.assertNotIn("secret", repr(minibottle.field_lines))
        shared, sizes = template(), []
        for start in (0, 4000, 8000):
            for i in range(start, start + 4000):
                parse_head(head("X-%d: %d" % (i, i), first="GET /%d HTTP/1.1" % i), shared)
            sizes.append(sys.getallocatedblocks())
        self.assertLess(sizes[2] - sizes[1], 4000)
        forget()

    def test_a_name_with_an_underscore_is_no_header(self):
        for name in ("X_Forwarded_For", "X-Forwarded_For", "Content_Length", "Host_", "_"):
            environ = parse(head(name + ": evil", name + ": evil"))
            environ.pop("", None)  # where the server finds what to log
            with self.subTest(name=name):
                self.assertNotIn("evil", environ.values())
                self.assertEqual(set(environ) - {minibottle.SPECIAL}, set(parse(head())))

    def test_header_values_agree_with_http_client(self):
        rng = random.Random(4)
        for _ in range(200):
            names = ["X-%s" % "".join(rng.choices("abcXYZ019!#.~", k=4)) for _ in range(4)]
            lines = ["%s:%s" % (name, "".join(rng.choices(" \tab:,;=\"\\\xe9", k=9)))
                     for name in names]
            environ = parse(head(*lines))
            stdlib = http.client.parse_headers(
                io.BytesIO("\r\n".join(lines + ["", ""]).encode("latin-1")))
            for name in names:
                key = "HTTP_" + name.upper().replace("-", "_")
                self.assertEqual(environ[key], ", ".join(
                    value.strip(" \t") for value in stdlib.get_all(name)), lines)

    def test_no_head_whatever_gives_another_exception_or_a_control_character(self):
        rng = random.Random(5)
        heads = [row[0] for row in GOOD_HEADS]
        for _ in range(3000):
            text = list(rng.choice(heads))
            for _ in range(rng.randint(1, 4)):
                i = rng.randint(0, len(text))
                text[i:i + rng.choice((0, 0, 1, 5))] = rng.choices(
                    "\r\n\0 \t:/%?#*@[]_-aA1\x0b\x7f\x85\xa0\xff", k=rng.choice((0, 1, 2)))
            got = outcome(parse, "".join(text))
            if type(got) is dict:
                outcome(parse_framing, got)
                got.pop("PATH_INFO")  # may hold any byte, percent-encoded
                self.assertNotRegex("".join(map(str, got.values())), r"[\x00-\x08\x0a-\x1f\x7f]")

    def test_hostile_heads_take_linear_time(self):
        size = 1 << 16
        for line in ("X:" + " " * size + "\1", "X: " + " a" * (size // 2), "X" * size,
                     " " * size, ":" * size, "X: " + "\t" * size, "Host:" + "a" * size + "!",
                     "Host: [" + ":" * size, "Host: " + "%" * size, "A: b\r\n" * 9999,
                     "Transfer-Encoding:" + "," * size, "Content-Length: " + "9" * size,
                     "Transfer-Encoding: " + "chunked, " * 7000):
            with self.subTest(line=line[:20]):
                self.assertQuick(lambda: parse_framing(parse(
                    "GET / HTTP/1.0\r\n" + line, 10000)))
        for target in ("/" * size, "/" + "%" * size, "/" + "%41" * 20000, "http://" + "a" * size,
                       "http://a/" + "?" * size, "http://" + "[" * size + "/", "*" * size):
            with self.subTest(target=target[:20]):
                self.assertQuick(parse, "GET %s HTTP/1.1\r\nHost: x" % target)


class FramingTest(UnitTest):
    """RFC 9112 6.1 and 6.3."""

    def test_length_and_coding_decide_how_long_a_body_is(self):
        for lines, expected in (
                ((), 0), (("Content-Length: 0",), 0), (("Content-Length: 007",), 7),
                (("Transfer-Encoding: chunked",), -1), (("Transfer-Encoding: \tCHUNKED ",), -1),
                (("Transfer-Encoding: gzip, chunked",), 501), (("Content-Length: +1",), 400),
                (("Content-Length: 1_0",), 400), (("Content-Length: 1, 1",), 400),
                (("Content-Length:",), 400), (("Content-Length: \xb2",), 400),
                (("Content-Length: " + "9" * 20,), 400), (("Transfer-Encoding: xchunked",), 400),
                (("Transfer-Encoding: chunked, chunked",), 400),
                (("Transfer-Encoding: chunked, identity",), 400), (("Transfer-Encoding:",), 400),
                (("Transfer-Encoding: \xa0chunked",), 400),
                (("Transfer-Encoding: chunked", "Content-Length: 5"), 400)):
            with self.subTest(lines=lines):
                got = outcome(parse_framing, parse(head(*lines)))
                self.assertEqual(got[0] if type(got) is tuple else got, expected)


WIKI = b"4\r\nWiki\r\n5;ext=\"1\"\r\npedia\r\nE\r\n in\r\n\r\nchunks.\r\n0\r\n\r\n"
CHUNKED = [  # (bytes, body)
    (WIKI, b"Wikipedia in\r\n\r\nchunks."),
    (b"0\r\n\r\n", b""),
    (b"000\r\n\r\n", b""),
    (b"0000000000000001\r\na\r\n0\r\n\r\n", b"a"),
    (b"a\r\n0123456789\r\n0 \t;x\r\nX-T: y\r\nEtag: z\r\n\r\n", b"0123456789"),
    (b"2;\xe9\r\n\r\n\r\n0;\r\n\r\n", b"\r\n"),
    (b"3e8\r\n" + b"x" * 1000 + b"\r\n0\r\n\r\n", b"x" * 1000),
]
BAD_CHUNKED = [  # (bytes, status)
    *((size + b"\r\nhello\r\n0\r\n\r\n", 400) for size in (
        b"", b"0x5", b"+5", b"-5", b" 5", b"5 ", b"5_", b"5g", b"g", b"\xd9\xa5", b"5\x0b", b"5\0",
        b"5;\n", b"5;\r", b"5;\x7f", b"0" * 16 + b"5")),
    (b"5\nhello\r\n0\r\n\r\n", 400), (b"5\r\nhello\n0\r\n\r\n", 400),
    (b"5\r\nhelloo\r\n0\r\n\r\n", 400), (b"4\r\nhello\r\n0\r\n\r\n", 400),
    (b"5\r\nhello0\r\n\r\n", 400), (b"5\r\nhelloXX0\r\n\r\n", 400),
    (b"1;" + b"x" * 300, 400),
    (b"3e9\r\n", 413), (b"ffffffffffffffff\r\n", 413),
    (b"3e8\r\n" + b"x" * 1000 + b"\r\n1\r\nx\r\n0\r\n\r\n", 413), (b"1f4\r\n" + b"x" * 500 +
     b"\r\n1f5\r\n" + b"x" * 501 + b"\r\n0\r\n\r\n", 413),
    *((b"0\r\n" + line + b"\r\n\r\n", 400) for line in (
        b"Content-Length: 5", b"host: x", b"Transfer-Encoding: chunked", b"Cookie: a", b"X",
        b" X:y", b"X :y", b"X: \0", b"X: y\n", b"Authorization: x")),
    (b"0\r\n" + b"X: y\r\n" * 99, 431),
]


def decode(data, step=None, max_body=1000):
    """(body, what is left) of a chunked body that is there at once, or comes `step` bytes a time.

    None where it ends too early.
    """
    buf = bytearray(b"" if step else data)
    feed = iter([data[i:i + step] for i in range(0, len(data), step)] if step else [])
    body = b""
    for piece in iter_chunked(buf, max_body):
        if not piece:
            more = next(feed, None)
            if more is None:
                return None
            buf += more
        body += piece
    return body, bytes(buf) + b"".join(feed)


class ChunkedTest(UnitTest):
    """RFC 9112 7.1."""

    def test_a_body_decodes_the_same_whole_and_in_any_pieces(self):
        for data, body in CHUNKED:
            for step in (None, 1, 2, 3, 7, len(data)):
                with self.subTest(data=data[:40], step=step):
                    self.assertEqual(decode(data, step), (body, b""))

    def test_what_follows_a_body_is_left_alone(self):
        for data, body in CHUNKED:
            for step in (None, 1, 5, len(data) + 9):
                with self.subTest(data=data[:40], step=step):
                    self.assertEqual(decode(data + b"GET / HTT", step), (body, b"GET / HTT"))

    def test_a_bad_body_is_refused_whole_and_in_any_pieces(self):
        for data, status in BAD_CHUNKED:
            for step in (None, 1, 4, len(data)):
                with self.subTest(data=data[:40], step=step):
                    self.assertEqual(outcome(decode, data, step)[0], status)

    def test_a_size_line_has_one_limit_whole_and_in_any_pieces(self):
        for size in (200, 300, 1000, 5000):
            data = b"1\r\nx\r\n5;" + b"e" * size + b"\r\nhello\r\n0\r\n\r\n"
            with self.subTest(size=size):
                self.assertEqual(outcome(decode, data), outcome(decode, data, 1))

    def test_a_body_that_ends_early_waits_for_more(self):
        for end in range(len(WIKI)):
            self.assertIsNone(decode(WIKI[:end]))

    def test_the_standard_library_reads_the_same(self):
        for data, body in CHUNKED:
            answer = http.client.HTTPResponse(mock.Mock(makefile=lambda mode: io.BytesIO(
                b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + data)))
            answer.begin()
            self.assertEqual(answer.read(), body)

    def test_no_bytes_whatever_give_another_exception_or_another_body_in_pieces(self):
        rng = random.Random(6)
        for _ in range(1000):
            data = bytearray(rng.choice(CHUNKED[:6])[0])
            for _ in range(rng.randint(1, 3)):
                i = rng.randint(0, len(data))
                data[i:i + rng.choice((0, 1, 1, 3))] = bytes(rng.choices(
                    b"\r\n\0 \t:;0159afAF_x\xff", k=rng.choice((0, 1, 2))))
            whole = outcome(decode, bytes(data))
            self.assertEqual(outcome(decode, bytes(data), rng.choice((1, 2, 5))), whole, data)

    def test_many_small_chunks_take_linear_time(self):
        many = b"1\r\nx\r\n" * 20000 + b"0\r\n\r\n"
        self.assertQuick(decode, many, None, 1 << 20)
        self.assertQuick(decode, many, 4096, 1 << 20, ms=200)
        for data in (b"1;" + b" " * 65536, b"1" + b" " * 65536, b"0" * 65536, b"1;" * 32768):
            self.assertQuick(decode, data)


class FormatFieldTest(UnitTest):
    """PEP 3333 on headers, and RFC 9110 5.1 and 5.5."""

    def test_a_pair_of_strings_is_a_line(self):
        for pair, line in ((("Allow", "GET"), b"Allow: GET\r\n"), (("x-a", ""), b"x-a: \r\n"),
                           (("X", "\xe9\t"), b"X: \xe9\t\r\n"),
                           (("Content-Length", "5"), b"Content-Length: 5\r\n")):
            for _ in "plain", "remembered":
                self.assertEqual(format_field(pair)[0], line)

    def test_anything_else_is_an_error_of_the_application(self):
        for pair in (("A",), "A", None, ("A", "b", "c"), ("A", b"b"), ("A", None), ("A", 5),
                     (b"A", "b"), ("", "b"), ("A:", "b"), ("A b", "c"), ("é", "b"), ("A", "\0"),
                     ("A", "b\r\nC: d"), ("A", "\x7f"), ("A", "\u20ac"), ("A\n", "b"),
                     ("Content-Length", "-1"), ("content-length", "5 "), ("Content-Length", "")):
            for _ in "first", "again":
                with self.subTest(pair=pair), self.assertRaises((TypeError, ValueError)):
                    format_field(pair)


# === 5. Forms and cookies =====================================================

class QueryTest(UnitTest):

    def test_only_ampersands_separate_fields(self):
        for text, expected in (
                ("", []), ("&&", []), ("a", [("a", "")]), ("a=", [("a", "")]), ("=a", [("", "a")]),
                ("a=1&b=2;c=3", [("a", "1"), ("b", "2;c=3")]), ("a=b=c", [("a", "b=c")]),
                ("a=1&a=2", [("a", "1"), ("a", "2")]), ("a+b=c+d", [("a b", "c d")]),
                ("a=%2B%26%3D", [("a", "+&=")]), ("%C3%B6=%ff", [("ö", "\ufffd")]),
                ("a=%&b=%4", [("a", "%"), ("b", "%4")]), ("a=ö", [("a", "ö")])):
            with self.subTest(text=text):
                self.assertEqual(parse_qsl(text), expected)

    def test_any_text_is_read_as_the_standard_library_reads_it(self):
        rng = random.Random(7)
        for _ in range(2000):
            text = "".join(rng.choices("ab=&&+%%cC3B6;/?ö ", k=rng.randint(0, 20)))
            self.assertEqual(parse_qsl(text), urllib.parse.parse_qsl(
                text, keep_blank_values=True, separator="&"), text)

    def test_too_many_fields_are_refused_before_they_are_split(self):
        self.assertEqual(len(parse_qsl("a&" * 9 + "a", 10)), 10)
        self.assertEqual(outcome(parse_qsl, "a&" * 10 + "a", 10)[0], 413)
        self.assertQuick(parse_qsl, "&" * (1 << 20), 1000)
        for text in ("&", "%", "%41", "+", "=", "a=1&", "%C3"):
            with self.subTest(text=text):
                self.assertQuick(parse_qsl, text * ((1 << 16) // len(text)))


class CookieTest(UnitTest):
    """RFC 6265 4.1 and 5.4."""

    def test_pairs_are_read_and_a_bad_one_costs_only_itself(self):
        for text, expected in (
                ("", []), (";;; ", []), ("a=1;b=2", [("a", "1"), ("b", "2")]), ("a=", [("a", "")]),
                ("a = 1 ", [("a", "1")]), ("a=b=c", [("a", "b=c")]),
                ('a=1; bad@x; lt={"id":"3"}; b=2', [("a", "1"), ("lt", '{"id":"3"}'), ("b", "2")]),
                ("=__Host-x=bad; b=2", [("b", "2")]), ('a="; b=2', [("a", '"'), ("b", "2")]),
                ('a="x y"; b=""', [("a", "x y"), ("b", "")]), ("a=ö 日", [("a", "ö 日")]),
                (r'a="\"\\\054"', [("a", '"\\,')]), ('a="\\', [("a", '"\\')])):
            with self.subTest(text=text):
                self.assertEqual(parse_cookies(text), expected)

    def test_hostile_cookies_take_linear_time(self):
        for text in ('"', "\\", '\\"', ";", "=", "a=;", " ", 'a="\\1', "\\101"):
            for around in ("%s", 'a="%s"', 'a="%s'):
                with self.subTest(text=text, around=around):
                    line = around % (text * (65536 // len(text)))
                    self.assertQuick(parse_cookies, line, ms=50)

    def test_any_value_comes_back_as_it_was_set(self):
        for value in ("", "a", "a b", '"', 'a"b\\c', "a;b, c=d", "\\101", "{'a': 1}",
                      "!#$%&'()*+-./", "ö", UNICODE):
            app = App()
            app.route("/set", callback=lambda: response.set_cookie("a", value))
            app.route("/get", callback=lambda: {"a": request.cookies.get("a")})
            client = TestClient(validator(app))
            line = client.get("/set").headers["Set-Cookie"]
            with self.subTest(value=value, line=line):
                self.assertTrue(line.isascii())
                self.assertEqual(client.get("/get").json, {"a": value})
                if value.isascii():
                    self.assertEqual(http.cookies.SimpleCookie(line)["a"].value, value)

    def test_attributes_have_one_form_whatever_their_spelling(self):
        day = datetime.datetime(2024, 2, 29, 12, tzinfo=datetime.timezone.utc)
        for options, expected in (
                ({}, "a=1"), ({"path": "/x"}, "a=1; Path=/x"), ({"Max-Age": 5}, "a=1; Max-Age=5"),
                ({"maxage": datetime.timedelta(hours=1)}, "a=1; Max-Age=3600"),
                ({"expires": day}, "a=1; expires=Thu, 29 Feb 2024 12:00:00 GMT"),
                ({"expires": 0}, "a=1; expires=Thu, 01 Jan 1970 00:00:00 GMT"),
                ({"samesite": "lax"}, "a=1; SameSite=Lax"),
                ({"same_site": "NONE", "secure": True}, "a=1; SameSite=None; Secure"),
                ({"samesite": None, "secure": 1}, "a=1; SameSite=None; Secure"),
                ({"httponly": True, "secure": False, "domain": None}, "a=1; HttpOnly"),
                ({"partitioned": True, "domain": "x.y"}, "a=1; Partitioned; Domain=x.y")):
            answer = Response()
            answer.set_cookie("a", "1", **options)
            with self.subTest(options=options):
                self.assertEqual(answer.headerlist[-1][1].lower(), expected.lower())

    def test_what_a_browser_would_drop_is_refused(self):
        for name, value, options, kind in (
                ("a", "1", {"samesite": "none"}, ValueError), ("a b", "1", {}, ValueError),
                ("a", "1", {"samesite": "x"}, ValueError), ("a", "1", {"color": "x"}, ValueError),
                ("", "1", {}, ValueError), ("a", "x" * 4000, {}, ValueError),
                ("a", 5, {}, TypeError), ("a", b"1", {}, TypeError),
                ("a", "1", {"max_age": float("inf")}, ValueError),
                ("a", "1", {"path": "/", "Path": "/x"}, (ValueError, TypeError))):
            with self.subTest(name=name, options=options), self.assertRaises(kind):
                Response().set_cookie(name, value, **options)

    def test_a_cookie_is_dropped_with_the_path_it_was_set_with(self):
        answer = Response()
        answer.set_cookie("a", "1", path="/x")
        answer.delete_cookie("a", path="/x")
        cookies = [value for name, value in answer.headerlist if name == "Set-Cookie"]
        self.assertEqual(len(cookies), 1)
        self.assertRegex(cookies[0], r"^a=(\"\")?; Path=/x; Max-Age=-1; expires=Thu, 01 Jan 1970")


BOUNDARY = "X-bound"


def part(name, data, filename=None, *more):
    """One part of a form, as bytes."""
    head = 'Content-Disposition: form-data; name="%s"' % name
    if filename is not None:
        head += '; filename="%s"' % filename
    data = data if isinstance(data, bytes) else data.encode()
    return "\r\n".join(["--" + BOUNDARY, head, *more, "", ""]).encode() + data + b"\r\n"


def form(*parts, end=b"--X-bound--\r\n"):
    return b"".join(parts) + end


def multipart(body, kind="multipart/form-data; boundary=" + BOUNDARY, **more):
    """The Request of a form."""
    return Request({"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body)),
                    "CONTENT_TYPE": kind, "REQUEST_METHOD": "POST", **more})


def refusal(body, **more):
    """(status, text) of the error that reading a form raises; its fields if there is none."""
    got = multipart(body, **more)
    try:
        return list(got.POST.allitems())
    except HTTPError as error:
        return error.status_code, error.body
    finally:
        close_files(got)


def close_files(got):
    for file in got.environ.get("minibottle.files", ()):
        file.close()


class MultipartTest(UnitTest):
    """RFC 7578, RFC 2046 5.1."""

    def parts(self, body):
        """What the decoder makes of `body`: headers and content."""
        return [(dict(headers), body[start:end])
                for headers, start, end in iter_parts(body, BOUNDARY)]

    def test_a_form_reads_the_same_wherever_the_blocks_end_in_which_it_is_searched(self):
        parts = (part("a", "1"), part("b", "\r\n--X-boun\r\n--x-bound\r\n-", "b.txt",
                                      "Content-Type: a/b"), part("c", ""))
        expected = [({"Content-Disposition": 'form-data; name="a"'}, b"1"),
                    ({"Content-Disposition": 'form-data; name="b"; filename="b.txt"',
                      "Content-Type": "a/b"}, b"\r\n--X-boun\r\n--x-bound\r\n-"),
                    ({"Content-Disposition": 'form-data; name="c"'}, b"")]
        self.assertEqual(self.parts(form(*parts)), expected)
        for size in (0, 1, *range(4070, 4100), 131060, 200000):
            with self.subTest(size=size):
                body = b"p" * size + b"\r\n" + form(*parts) + b"epilogue\r\n--X-bound"
                self.assertEqual(self.parts(body), expected)
                (_, long), *others = self.parts(form(part("x", b"x" * size), *parts))
                self.assertEqual((len(long), others), (size, expected))

    def test_fields_and_files_come_apart(self):
        got = multipart(form(part("a", UNICODE), part("f", b"\xff\0", UNICODE + ".bin", "X-A: ö"),
                             part("a", "2"), part("none", "", ""), part(UNICODE, b"\xff")),
                        QUERY_STRING="a=0&q=1")
        self.assertEqual(list(got.forms.allitems()), [
            ("a", UNICODE), ("a", "2"), ("none", ""), (UNICODE, "\ufffd")])
        self.assertEqual((list(got.files), list(got.POST)), (["f"], ["a", "f", "none", UNICODE]))
        self.assertEqual((got.params.getall("a"), got.params.q), (["0", UNICODE, "2"], "1"))
        upload = got.files.f
        self.assertEqual((upload.name, upload.raw_filename, upload.file.read(), upload.content_type,
                          upload.get_header("x-a"), upload.content_length),
                         ("f", UNICODE + ".bin", b"\xff\0", "", "ö", -1))
        self.assertIs(got.files.f, got.POST["f"])

    def test_names_are_read_as_clients_write_them(self):
        for given, name, filename in (
                ('name="a"; filename="C:\\dir\\b.txt"', "a", "C:\\dir\\b.txt"),
                ('name="a\\"b"; filename="c\\"d"', 'a"b', 'c"d'), ("name=a; filename=b", "a", "b"),
                ('name="a%22b"; filename="c%22d.txt"', 'a"b', 'c"d.txt'),  # WHATWG HTML
                ('filename="b;c"; NAME="a=;"', "a=;", "b;c"),
                ("name=a; filename=\"x\"; filename*=UTF-8''%E6%97%A5.txt", "a", "日.txt"),
                ('name="a";\r\n\tfilename="b"', "a", "b")):
            head = "--X-bound \t\r\nContent-Disposition: form-data; " + given
            got = multipart(form(head.encode() + b"\r\n\r\nx\r\n"))
            with self.subTest(given=given):
                self.assertEqual([(key, upload.raw_filename) for key, upload in got.files.items()],
                                 [(name, filename)])

    def test_broken_forms_are_a_400_that_names_the_cause(self):
        good = part("a", "1")
        for body, cause in (
                (b"", "last boundary"), (good, "last boundary"), (good + b"--X-bound", "last"),
                (form(good, end=b"--X-bound-"), "last"), (b"--other--\r\n", "last boundary"),
                (form(good, end=b"--X-boundless\r\n\r\n"), "followed by"),
                (form(good[:-2]), "last boundary"), (b"--X-bound\r\n\r\nx\r\n", "last"),
                (form(b"--X-bound\r\nContent-Type: a/b\r\n\r\nx\r\n"), "Content-Disposition"),
                (form(part("a", "", None, "no colon")), "no colon"),
                (form(part("a", "", None, "X-A : b")), "white space before the colon"),
                (form(part("a", "", None, "X-A: b\rX-C: d")), "control character"),
                (form(part("a", "", None, "X-A: b\nX-C: d")), "control character"),
                (form(part("a", "", None, "X-A: b\0")), "control character"),
                (form(part("a", "", None, "X\xe9: b")), "bad name"),
                (form(part("a", "", None, *["X-A: b"] * 16)), "over 16 headers"),
                (form(part("a" * 9000, "")), "over 8192 bytes")):
            with self.subTest(body=body[:60]):
                status, text = refusal(body)
                self.assertEqual(status, 400)
                self.assertIn(cause, text)
        for kind in ("multipart/form-data", "multipart/mixed; boundary=a", "multipart/x",
                     "multipart/form-data; boundary=", "multipart/form-data; boundary=" + "a" * 71,
                     "multipart/form-data; boundary=" + "a" * 10000,
                     'multipart/form-data; boundary="' + "\\" * 10000):
            with self.subTest(kind=kind[:40]):
                self.assertEqual(refusal(form(good), kind=kind)[0], 400)

    def test_each_limit_is_a_413_that_names_it(self):
        limits = Settings(max_body=4000, max_form_memory=300, max_fields=20, max_files=3)
        for body, limit in (
                (form(*[part("a", "")] * 21), "20 form fields (max_fields)"),
                (form(*[part("f", "", "f")] * 4), "3 files in a form (max_files)"),
                (form(*[part("a", "x" * 101)] * 3), "300 bytes (max_form_memory)"),
                (form(part("f", "x" * 4000, "f")), "4000 bytes (max_body)")):
            with self.subTest(limit=limit):
                status, text = refusal(body, **{"minibottle.settings": limits})
                self.assertEqual(status, 413)
                self.assertIn(limit, text)
        self.assertEqual(len(refusal(form(*[part("a", "x" * 15)] * 20),
                                     **{"minibottle.settings": limits})), 20)

    def test_by_default_many_files_of_some_size_are_no_problem(self):
        """Bottle's #1470."""
        got = multipart(form(*[part("f%d" % i, b"x" * 61440, "f") for i in range(20)]))
        self.assertEqual({len(upload.file.read()) for upload in got.files.values()}, {61440})
        close_files(got)

    def test_the_files_of_a_large_form_are_parts_of_one_file_on_disk(self):
        body = form(*[part("f", bytes([i]) * 999, "f") for i in range(5)])
        for limit, in_memory in ((len(body), True), (len(body) - 1, False)):
            got = multipart(body, **{"minibottle.settings": Settings(spool_threshold=limit)})
            files = [upload.file for upload in got.files.getall("f")]
            with self.subTest(limit=limit):
                self.assertEqual({type(file) is io.BytesIO for file in files}, {in_memory})
                self.assertEqual([file.read(500) for file in files],
                                 [bytes([i]) * 500 for i in range(5)])
                self.assertEqual(got.body.read(), body)  # neither disturbs the other
                for i, file in enumerate(files):
                    self.assertEqual((file.tell(), file.read()), (500, bytes([i]) * 499))
                    self.assertEqual((file.seek(-9, 2), file.read(5), file.seek(2, 1), file.read()),
                                     (990, bytes([i]) * 5, 997, bytes([i]) * 2))
                    self.assertEqual((file.seek(5000), file.read(), file.seek(0)), (5000, b"", 0))
            close_files(got)
            self.assertTrue(all(file.closed for file in files))

    def test_an_upload_out_of_a_large_form_is_saved_whole(self):
        got = multipart(form(part("f", b"0123456789" * 1000, "f"), part("g", b"", "g")),
                        **{"minibottle.settings": Settings(spool_threshold=99)})
        with tempfile.TemporaryDirectory() as folder:
            for upload in got.files.values():
                upload.save(folder, chunk_size=999)
                self.assertEqual(upload.file.tell(), 0)
            self.assertEqual([os.path.getsize(os.path.join(folder, name)) for name in "fg"],
                             [10000, 0])
        close_files(got)

    def test_bottles_memfile_max_stands_for_both_limits(self):
        class Small(Request):
            MEMFILE_MAX = 100
        body = form(part("a", "x" * 101))
        got = Small(multipart(body).environ)
        with self.assertRaises(HTTPError) as caught:
            got.forms
        self.assertIn("100 bytes (max_form_memory)", caught.exception.body)
        close_files(got)

    def test_memfile_max_of_the_local_request_counts(self):
        app = app_of(lambda: request.json, method="POST")
        with mock.patch.object(minibottle.LocalRequest, "MEMFILE_MAX", 100):
            self.assertEqual([ask(app, method="POST", json="x" * n).status_code for n in (9, 101)],
                             [200, 413])

    def test_chunks_that_a_server_leaves_in_the_body_are_decoded(self):
        """PEP 3333 does not say who does it; wsgiref, for one, does not."""
        for body, expected in ((b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nA: b\r\n\r\nnext", b"abcde"),
                               (b"3\r\nabc\r\n0\r\n", b"abc"), (b"0\r\n\r\n", b""),
                               (b"3\r\nabc\r\n", 400), (b"4\r\nabc", 400), (b"x\r\nabc\r\n", 400),
                               (b"", 400), (b"1000000000\r\nabc", 413)):
            with self.subTest(body=body):
                got = Request({"wsgi.input": io.BytesIO(body), "REQUEST_METHOD": "POST",
                               "HTTP_TRANSFER_ENCODING": "chunked"})
                try:
                    self.assertEqual(got.body.read(), expected)
                except HTTPError as error:
                    self.assertEqual(error.status_code, expected)

    def test_hostile_forms_take_linear_time(self):
        parts = b"".join(part("a", "") for _ in range(20000))
        for body, status in (
                (parts, 413), (form(parts), 413), (b"\r\n" * 500000, 400),
                (b"\r\n--X-boun" * 90000, 400), (b"--X-bound\r\n" * 50000, 400),
                (b"-" * 1000000, 400),
                (form(part("f", b"\r\n--X-boun" * 90000, "f")), None),
                (form(part("f", b"\r" * 1000000, "f")), None),
                (form(part("a", "", None, 'X: "' + '\\"' * 4000)), None),
                (form(b"--X-bound\r\nContent-Disposition: form-data; " + b'a="' * 2600), 400)):
            with self.subTest(body=body[:40]):
                out = []
                self.assertQuick(lambda: out.append(refusal(body)), ms=250)
                self.assertEqual(out[0][0] if status else None, status)

    def test_uploads_are_closed_when_the_request_ends_however_it_ends(self):
        for body in (form(part("f", "x" * 2000000, "f"), part("g", "y", "g")),
                     part("f", "x" * 2000000, "f")):
            files = []

            def read(request):
                files.append(request.environ)
                return request.files.f.file.read()[:1]
            app = app_of(read, method="POST")
            answer = ask(app, method="POST", body=body,
                         headers={"Content-Type": "multipart/form-data; boundary=" + BOUNDARY})
            self.assertEqual(answer.status_code, 200 if body[-3:] == b"-\r\n" else 400)
            self.assertTrue(files[0]["minibottle.files"])
            for upload in files[0]["minibottle.files"]:
                self.assertTrue(getattr(upload, "file", upload).closed)

    @only_cpython
    def test_a_large_upload_is_never_in_memory(self):
        pieces = itertools.chain([part("f", b"", "f")[:-2]], [b"x" * 65536] * 320,
                                 [b"\r\n" + form()])
        pieces = list(pieces)

        class Source:
            def read(self, size):
                return pieces.pop(0) if pieces else b""
        got = multipart(b"", **{"wsgi.input": Source(), "wsgi.input_terminated": True})
        del got.environ["CONTENT_LENGTH"]
        import tracemalloc                      # PyPy has none
        tracemalloc.start()
        try:
            upload = got.files.f
            self.assertLess(tracemalloc.get_traced_memory()[1], 3 << 20)
        finally:
            tracemalloc.stop()
        self.assertEqual(upload.file.seek(0, 2), 320 * 65536)
        close_files(got)


class FileUploadTest(UnitTest):

    def test_of_a_large_body_it_is_read_from_the_body_and_cannot_be_written(self):
        body = form(part("a", "text"), part("f", "data", "a.txt"))
        request = multipart(body, **{"minibottle.settings": Settings(spool_threshold=10)})
        file = request.files["f"].file
        self.assertEqual((file.read(), file.seek(1), file.read(2)), (b"data", 1, b"at"))
        for refused in (file.fileno, lambda: file.write(b"x")):
            with self.assertRaises(io.UnsupportedOperation):
                refused()
        for closed in request.environ["minibottle.files"]:
            closed.close()

    def test_a_file_name_is_made_safe(self):
        for raw, ascii_name, safe in (
                ("a b.txt", "a-b.txt", "a b.txt"), ("../../etc/passwd", "passwd", "passwd"),
                ("C:\\dir\\b.txt", "b.txt", "b.txt"), ("..", "empty", "empty"),
                ("", "empty", "empty"), (None, "empty", "empty"), ("dir/", "empty", "empty"),
                (".bashrc", "bashrc", "bashrc"),
                ("Ümlaut$.txt", "Umlaut.txt", "Ümlaut$.txt"), ("あいう.txt", "txt", "あいう.txt"),
                ("a\0b\r\n.txt", "ab-.txt", "ab.txt"), ("CON.txt", "CON.txt", "_CON.txt"),
                ("nul", "nul", "_nul"), ("a\u202etxt.exe", "atxt.exe", "atxt.exe"),
                ("x" * 300, "x" * 255, "x" * 255), ("日" * 300, "empty", "日" * 85),
                ("a<b>|?*:.txt", "ab.txt", "ab.txt"), (b"\xc3\xb6.txt", "o.txt", "ö.txt")):
            upload = FileUpload(None, "f", raw)
            with self.subTest(raw=raw):
                self.assertEqual((upload.filename, upload.safe_filename), (ascii_name, safe))
                self.assertEqual(upload.raw_filename, raw)

    def test_it_is_saved_to_a_path_a_directory_or_a_file(self):
        upload = FileUpload(io.BytesIO(b"data"), "f", "../a.txt")
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "a.txt")
            upload.save(folder, chunk_size=1)
            with self.assertRaises(OSError):
                upload.save(path)
            upload.save(path, overwrite=True)
            with open(path, "rb") as file:
                self.assertEqual(file.read(), b"data")
            os.remove(path)
            os.symlink(os.path.join(folder, "elsewhere"), path)
            with self.assertRaises(OSError):
                upload.save(path)
        target = io.BytesIO()
        upload.save(target)
        self.assertEqual((target.getvalue(), upload.file.read()), (b"data", b"data"))


class SignedCookieTest(UnitTest):

    def echo(self, value, secret, name="a", **options):
        """The Set-Cookie line, and a request that brings the cookie back."""
        answer = Response()
        answer.set_cookie(name, value, secret, **options)
        line = dict(answer.headerlist)["Set-Cookie"]
        return line, Request({"HTTP_COOKIE": line.partition(";")[0]})

    def test_any_json_value_comes_back(self):
        for value in ("x", UNICODE, "", 0, None, [1, {"a": [True, 1.5]}], {"ö": "日"}):
            line, got = self.echo(value, "secret")
            with self.subTest(value=value):
                self.assertEqual(got.get_cookie("a", "default", secret="secret"), value)
                self.assertEqual(got.get_cookie("a", secret=b"secret"), value)
                self.assertNotIn('"', line)
        with self.assertRaises(TypeError):
            self.echo({1, 2}, "secret")

    def test_a_changed_cookie_counts_as_none(self):
        line, got = self.echo({"user": 1}, "secret")
        text = line[2:].partition(";")[0]
        end = len(text) - 1
        changed = [text[:i] + ("A" if text[i] != "A" else "B") + text[i + 1:] for i in range(end)]
        for bad in (*changed, "", "!", "!?", "x", text[1:], text[:-1], text + "A", "!" + text, "ö"):
            got = Request({"HTTP_COOKIE": "a=" + bad})
            self.assertEqual(got.get_cookie("a", "default", secret="secret"), "default", bad)
        for other in (Request({"HTTP_COOKIE": "b=" + text}), Request({})):
            self.assertIsNone(other.get_cookie("b", secret="secret"))  # another name
        self.assertEqual(Request({"HTTP_COOKIE": "a=" + text}).get_cookie("a"), text)

    def test_secrets_rotate(self):
        _, got = self.echo("x", ["new", "old"])
        self.assertEqual([got.get_cookie("a", 0, secret=keys) for keys in (
            "new", ["newer", "new"], ["new"], "old", ["newer"])], ["x", "x", "x", 0, 0])
        for empty in ("", b"", [], ["a", ""]):
            with self.subTest(empty=empty):
                with self.assertRaises(ValueError):
                    self.echo("x", empty)
                with self.assertRaises(ValueError):
                    got.get_cookie("a", secret=empty)

    def test_an_age_can_be_asked_for(self):
        with mock.patch("time.time", return_value=1000.9):
            _, got = self.echo("x", "secret")
        for now, expected in ((1000, "x"), (1060, "x"), (1061, None)):
            with self.subTest(now=now), mock.patch("time.time", return_value=now):
                self.assertEqual(got.get_cookie("a", secret="secret", max_age=60), expected)

    def test_it_is_sent_with_safe_attributes_that_options_change(self):
        line, got = self.echo("x", "secret")
        self.assertTrue(line.endswith("; Path=/; HttpOnly; SameSite=Lax"), line)
        line, _ = self.echo("x", "secret", Path="/x", httponly=False, same_site="strict", maxage=5)
        self.assertTrue(line.endswith("; Path=/x; SameSite=Strict; Max-Age=5"), line)

    def test_caches_are_told_that_the_answer_is_for_one_user(self):
        """RFC 9111 4.1, CVE-2023-30861."""
        def look():
            response.set_header("Vary", "Origin")
            request.get_cookie("a", secret="secret")
            raise HTTPResponse("x", Vary="Accept")
        self.assertEqual(answer_of(look).headers.getall("Vary")[:3], ["Origin", "Cookie", "Accept"])
        answer = Response()
        for name in "ab":
            answer.set_cookie(name, "x", "secret")
        self.assertEqual(answer.headers.getall("Vary"), ["Cookie"])

    def test_it_can_be_made_and_read_by_hand(self):
        text = cookie_encode({"a": 1}, "key")
        self.assertEqual(cookie_decode(text, "key"), {"a": 1})
        self.assertIsNone(cookie_decode(text, "other"))
        self.assertEqual([cookie_is_encoded(value) for value in (text, "x", text[1:])],
                         [True, False, False])


# === 7. Request and Response ==================================================

class RequestTest(UnitTest):

    def test_an_empty_environ_answers_every_question(self):
        got = Request({})
        for name, expected in (
                ("method", "GET"), ("path", "/"), ("script_name", "/"), ("fullpath", "/"),
                ("query_string", ""), ("url", "http://127.0.0.1/"), ("remote_addr", None),
                ("content_type", ""), ("content_length", -1), ("is_xhr", False), ("json", None),
                ("query", {}), ("forms", {}), ("params", {}), ("cookies", {}), ("headers", {})):
            with self.subTest(name=name):
                self.assertEqual(getattr(got, name), expected)
        self.assertEqual((got.body.read(), got.get_header("X", 5), got.get_cookie("a", 5)),
                         (b"", 5, 5))
        for name, kind in vars(Request).items():
            if isinstance(kind, property) and name not in ("app", "route", "url_args"):
                with self.subTest(name=name):
                    getattr(Request({}), name)
        for name in ("app", "route", "url_args"):
            with self.assertRaises(RuntimeError):
                getattr(got, name)

    def test_views_of_the_environ(self):
        for name, environ, expected in (
                ("method", {"REQUEST_METHOD": "get"}, "GET"),
                ("path", {"PATH_INFO": "//a/b/"}, "/a/b/"),
                ("path", {"PATH_INFO": "\xff"}, "/\ufffd"),
                ("script_name", {"SCRIPT_NAME": "/a/b"}, "/a/b/"),
                ("fullpath", {"SCRIPT_NAME": "/a", "PATH_INFO": "/b"}, "/a/b"),
                ("url", {"HTTP_HOST": "x:81", "PATH_INFO": "/a b", "QUERY_STRING": "c=%20"},
                 "http://x:81/a%20b?c=%20"),
                ("url", {"SERVER_NAME": "x", "SERVER_PORT": "443", "wsgi.url_scheme": "https"},
                 "https://x/"),
                ("url", {"SERVER_NAME": "x", "SERVER_PORT": "8080"}, "http://x:8080/"),
                ("url", {"HTTP_HOST": "x", "HTTP_X_FORWARDED_HOST": "evil",
                         "HTTP_X_FORWARDED_PROTO": "https"}, "http://x/"),
                ("remote_addr", {"REMOTE_ADDR": "1.2.3.4", "HTTP_X_FORWARDED_FOR": "5.6.7.8"},
                 "1.2.3.4"),
                ("content_length", {"CONTENT_LENGTH": "5"}, 5),
                ("content_length", {"CONTENT_LENGTH": "+5"}, -1),
                ("content_length", {"CONTENT_LENGTH": ""}, -1),
                ("content_type", {"CONTENT_TYPE": "Text/HTML"}, "text/html"),
                ("is_ajax", {"HTTP_X_REQUESTED_WITH": "XMLHttpRequest"}, True),
                ("cookies", {"HTTP_COOKIE": "a=1; bad; a=2; b=3"}, {"a": "1", "b": "3"}),
                ("query", {"QUERY_STRING": "a=1;b=2&a=3&c"}, {"a": "3", "c": ""})):
            with self.subTest(name=name, environ=environ):
                self.assertEqual(getattr(Request(environ), name), expected)

    def test_the_same_text_arrives_from_everywhere(self):
        app = App()

        @app.route("/echo/<path>", ["GET", "POST"])
        def echo(request, path):
            return {"values": [path, request.path[6:], request.query.a, request.query["a"],
                               request.params.get("a"), request.forms.getunicode("a"),
                               request.headers["X-A"], request.url_args["path"]]}

        quoted = urllib.parse.quote(UNICODE)
        for path, query in (("/echo/" + UNICODE, {"a": UNICODE}),
                            ("/echo/%s?a=%s" % (quoted, quoted), None)):
            answer = ask(app, path, "POST", query=query, form={"a": UNICODE},
                         headers={"X-A": UNICODE})
            self.assertEqual(answer.json, {"values": [UNICODE] * 8})

    def test_wrong_utf_8_is_a_400_in_a_path_and_a_sign_elsewhere(self):
        app = app_of(lambda: {"q": request.query.a, "f": request.forms.a, "c": request.cookies.a},
                     method="POST")
        self.assertEqual(ask(app, "/%ff", "POST").status_code, 400)
        answer = ask(app, "/?a=%ff", "POST", body=b"a=\xff", headers={"Cookie": "a=1"})
        self.assertEqual(answer.json, {"q": "\ufffd", "f": "\ufffd", "c": "1"})
        raw = {"QUERY_STRING": "a=\xff\xc3\xb6", "HTTP_COOKIE": "a=\xff\xc3\xb6"}
        self.assertEqual((Request(raw).query.a, Request(raw).cookies.a), ("\ufffdö", "\ufffdö"))

    def test_json_is_read_by_its_type(self):
        app = App()
        app.post("/lax", callback=lambda request: {"got": request.json})
        app.post("/strict", callback=lambda request: {"got": request.read_json()})
        good, read = b'{"a": "\xc3\xb6"}', {"got": {"a": "ö"}}
        for kind, body, lax, strict in (
                ("application/json", good, read, read),
                ("Application/JSON ; charset=x", good, read, read),
                ("application/problem+json", good, {"got": None}, read),
                ("text/plain;application/json", good, {"got": None}, 415),
                ("application/json5", good, {"got": None}, 415), ("", good, {"got": None}, 415),
                ("application/json", b"", {"got": None}, 400), ("application/json", b"{", 400, 400),
                ("application/json", b"NaN", 400, 400), ("application/json", b"\xff", 400, 400),
                ("application/json", b"[" * 100000, 400, 400),
                ("application/json", b'"' + b"a" * (1 << 20) + b'"', 413, 413)):
            for path, expected in (("/lax", lax), ("/strict", strict)):
                answer = ask(app, path, "POST", body=body, headers={"Content-Type": kind})
                with self.subTest(path=path, kind=kind, body=body[:9]):
                    self.assertEqual(answer.json if answer.status_code == 200 else
                                     answer.status_code, expected)

    def test_the_body_is_a_file_at_its_start_each_time(self):
        for size in (0, 10, 600 << 10):
            data = os.urandom(size)
            got = Request({"wsgi.input": io.BytesIO(data + b"next"), "CONTENT_LENGTH": str(size)})
            for _ in "once", "again":
                self.assertEqual(got.body.read(), data)
            got.body.close()
        self.assertEqual(Request({"wsgi.input": io.BytesIO(b"next")}).body.read(), b"")

    def test_form_fields_have_limits_that_their_refusal_names(self):
        app = app_of(lambda request: str(len(request.forms)), method="POST")
        most = "&".join("a%d" % i for i in range(1000))
        self.assertEqual(ask(app, method="POST", body=most).text, "1000")
        for body, limit in ((most + "&a", "max_fields"), ("a" * 1048577, "max_form_memory")):
            answer = ask(app, method="POST", body=body)
            self.assertEqual((answer.status_code, limit in answer.text), (413, True))

    def test_no_request_whatever_is_an_error_of_ours(self):
        app, rng = App(), random.Random(9)
        views = [name for name, kind in vars(Request).items() if isinstance(kind, property)]

        @app.route("/<path:path>", ["GET", "PUT"])
        def look(request, path):
            name = rng.choice(views)
            return [name + repr(getattr(request, name)), repr(dict(request.headers))]
        keys = ("QUERY_STRING HTTP_COOKIE HTTP_A HTTP_HOST CONTENT_LENGTH CONTENT_TYPE SCRIPT_NAME "
                "SERVER_PORT PATH_INFO").split()
        for _ in range(1000):
            more = {key: "".join(rng.choices("ab/%&=;:\"\\ 0\xc3\xb6\xff", k=rng.randint(0, 9)))
                    for key in keys}
            more["PATH_INFO"] = "/" + more["PATH_INFO"]
            more["CONTENT_TYPE"] = rng.choice((more["CONTENT_TYPE"], "application/json"))
            more["wsgi.input"] = io.BytesIO(b"{a=\xff")
            started = []
            out = app(environ_of(method=rng.choice(("GET", "PUT", "POST")), **more),
                      lambda *args: started.append(args[0][:3]))
            b"".join(out)
            self.assertIn(started, (["200"], ["400"], ["404"], ["405"]), more)

    def test_attributes_are_kept_in_the_environ_and_set_once(self):
        environ = {}
        Request(environ).user = "Ada"
        self.assertEqual(Request(environ).user, "Ada")
        with self.assertRaises(AttributeError):
            Request(environ).user = "Bob"
        del Request(environ).user
        for action in (lambda: Request(environ).user, lambda: delattr(Request(environ), "user")):
            with self.assertRaises(AttributeError):
                action()

    def test_what_a_request_is_made_of_cannot_be_set_to_no_effect(self):
        for name in ("path", "method", "json", "forms"):
            with self.subTest(name=name), self.assertRaises(AttributeError):
                setattr(Request({}), name, "x")


class ResponseTest(UnitTest):

    def test_a_status_is_a_number_or_a_line(self):
        for given, line, code in ((200, "200 OK", 200), (404, "404 Not Found", 404),
                                  ("404 Brain not found", "404 Brain not found", 404),
                                  (999, "999 Unknown", 999), (418, "418 I'm a teapot", 418)):
            answer = Response(status=given)
            self.assertEqual((answer.status, answer.status_line, answer.status_code),
                             (line, line, code))
        for bad in (99, 1000, -200, "404", "40 X", "4040 X", "abc X", "", "200 ö", "٢٠٠ X",
                    "200 ", "200  "):
            answer = Response()
            with self.subTest(bad=bad), self.assertRaises(ValueError):
                answer.status = bad

    def test_headers_are_read_set_and_added(self):
        answer = Response("", 200, {"x_a": 1}, X_B="2")
        answer.add_header("x-a", 3)
        answer["X-C"] = None
        answer.content_type = "text/plain; Charset=\"latin-1\""
        answer.content_length = 5
        self.assertEqual(answer.headerlist, list(answer.iter_headers()))
        self.assertEqual(answer.headerlist, [
            ("X-A", "1"), ("X-A", "3"), ("X-B", "2"), ("X-C", ""),
            ("Content-Type", 'text/plain; Charset="latin-1"'), ("Content-Length", "5")])
        self.assertEqual((answer.charset, answer.content_length, answer.get_header("x-b"),
                          "x-c" in answer), ("latin-1", 5, "2", True))
        del answer["x-A"]
        answer.set_header("X-b", 4)
        self.assertEqual((answer.get_header("X-A", 5), answer["x-b"]), (5, "4"))
        self.assertEqual((Response().content_type, Response().content_length, Response().charset),
                         ("", -1, "UTF-8"))

    def test_headers_of_another_answer_are_taken_over_with_all_their_values(self):
        first = Response()
        for value in "12":
            first.add_header("Link", value)
        for headers in (first.headerlist, first.headers):
            self.assertEqual(Response("", 200, headers).headers.getall("Link"), ["1", "2"])

    def test_each_status_has_only_the_headers_it_may_have(self):
        """RFC 9110 15.3.5 and 15.4.5."""
        for status, left in ((204, {"Etag"}), (304, {"Etag"}), (200, {"Etag", "Content-Type",
                                                                     "Last-Modified"})):
            answer = Response("", status, Etag='"x"', Content_Type="a/b")
            if status != 204:
                answer.set_header("Last-Modified", "x")
            self.assertEqual({name for name, _ in answer.headerlist}, left)

    def test_a_hostile_content_type_takes_linear_time(self):
        answer = Response()
        for text in ("a" * 20000, "a=" * 10000, '="' * 10000, "; " * 10000):
            answer.content_type = "text/plain; " + text
            with self.subTest(text=text[:4]):
                self.assertQuick(lambda: answer.charset)

    def test_redirects_are_relative_and_percent_encoded(self):
        for url, code, expected in (("/a b?c=d&e#f", None, "303 /a%20b?c=d&e#f"),
                                    ("//x/ö", 301, "301 //x/%C3%B6"), ("a%20b", 308, "308 a%20b"),
                                    ("http://[::1]:80/", 302, "302 http://[::1]:80/")):
            answer = answer_of(lambda: redirect(url, code))
            self.assertEqual("%d %s" % (answer.status_code, answer.headers["Location"]), expected)


    def test_where_it_was_routed_may_come_from_an_environ_that_a_test_makes(self):
        own = Request({})
        for name, key in (("app", "bottle.app"), ("route", "bottle.route"),
                          ("url_args", "route.url_args")):
            with self.assertRaisesRegex(RuntimeError, "not connected to a route"):
                getattr(own, name)
            own.environ[key] = key
            self.assertEqual(getattr(own, name), key)
        app = app_of(lambda x: {"rule": request.route.rule, "x": request.url_args}, "/<x>")
        environ = {"bottle.app": 1, "bottle.route": 2, "route.url_args": 3}  # of a Bottle around
        out = app(environ_of("/5", **environ), lambda *args: None)
        self.assertEqual(json.loads(b"".join(out)), {"rule": "/<x>", "x": {"x": "5"}})

    def test_a_form_that_cannot_be_read_is_a_MultipartError(self):
        own = Request({"CONTENT_TYPE": "multipart/form-data"})
        with self.assertRaises(minibottle.MultipartError) as caught:
            own.forms
        self.assertEqual(caught.exception.status_code, 400)


class ContextTest(UnitTest):
    """`request` and `response` are those of the code that runs, however it is interleaved."""

    def setUp(self):
        self.app = App()

        @self.app.route("/list/<id>")
        def plain(id):
            response.set_header("X-Id", id)
            return [request.query.id, " ", request.url_args["id"]]

        @self.app.route("/generator/<id>")
        def generator(id):
            response.set_header("X-Id", id)
            yield request.query.id
            yield " "
            yield request.url_args["id"] if response.get_header("X-Id") == id else "mixed up"

        @self.app.route("/nested/<id>")
        def nested(id):
            response.set_header("X-Id", id)
            inner = TestClient(self.app).get("/generator/inner?id=inner")
            own = request.query.id + " " + request.url_args["id"]
            return inner.text.replace("inner inner", own)

    def begin(self, kind, id):
        """Call the application; its answer is to be pulled later."""
        environ = environ_of("/%s/%s" % (kind, id), QUERY_STRING="id=" + id)
        head = []
        return id, head, self.app(environ, lambda *args: head.append(args))

    def check(self, id, head, pieces):
        self.assertEqual(dict(head[0][1])["X-Id"], id)
        self.assertEqual(b"".join(pieces).decode(), id + " " + id)

    def test_200_interleaved_handlers_read_back_their_own_id(self):
        rng = random.Random(8)
        begun = [self.begin(rng.choice(("list", "generator", "nested")), str(i)) + ([],)
                 for i in range(200)]
        todo = [(iter(out), pieces) for _, _, out, pieces in begun]
        while todo:
            step, pieces = pair = rng.choice(todo)
            try:
                pieces.append(next(step))
            except StopIteration:
                todo.remove(pair)
        for id, head, _, pieces in begun:
            self.check(id, head, pieces)

    def test_threads_read_back_their_own_id(self):
        begun, barrier = [], threading.Barrier(20)

        def work(number):
            barrier.wait(10)
            for i in range(10):
                id, head, out = self.begin(("list", "generator", "nested")[i % 3], str(number + i))
                begun.append((id, head, list(out)))
        threads = [threading.Thread(target=work, args=(i * 100,)) for i in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(len(begun), 200)
        for done in begun:
            self.check(*done)

    def test_an_abandoned_generator_leaves_nothing_behind(self):
        _, _, out = self.begin("generator", "1")
        next(iter(out))
        out.close()
        self.assertEqual(ask(self.app, "/list/2?id=2").text, "2 2")
        with self.assertRaises((RuntimeError, KeyError)):
            request.url_args["id"]

    @unittest.skipIf(getattr(sys.flags, "thread_inherit_context", 0),
                     "a thread inherits the context of the one that starts it")
    def test_a_thread_without_a_request_is_told_so(self):
        caught = []

        def look():
            for thing, name in ((request, "path"), (response, "status")):
                try:
                    getattr(thing, name)
                except RuntimeError as error:
                    caught.append(str(error))
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        self.assertEqual(len(caught), 2)

    def test_every_step_of_a_generator_runs_in_one_context(self):
        """PEP 567: what its first step sets, the others see (decimal.localcontext is one)."""
        variable = contextvars.ContextVar("variable")

        def steps():
            token = variable.set("kept")
            yield "a "
            yield variable.get("lost")
            variable.reset(token)
        self.assertEqual(answer_of(steps).text, "a kept")


class BottleRequestTest(UnitTest):

    def test_it_is_a_dict_that_forgets_what_it_had_worked_out(self):
        got = Request({"QUERY_STRING": "a=1", "HTTP_COOKIE": "c=1", "CONTENT_LENGTH": "3",
                       "wsgi.input": io.BytesIO(b"f=1")})
        self.assertEqual((got.query.a, got.cookies.c, got.forms.f), ("1", "1", "1"))
        got["QUERY_STRING"], got["HTTP_COOKIE"] = "a=2", "c=2"
        got["wsgi.input"] = io.BytesIO(b"f=2")
        self.assertEqual((got.query.a, got.cookies.c, got.forms.f), ("2", "2", "2"))
        del got["QUERY_STRING"]
        self.assertEqual((got.query.a, "QUERY_STRING" in got, len(got), set(got)),
                         ("", False, len(got.environ), set(got.keys())))

    def test_a_copy_is_on_its_own(self):
        got = Request({"QUERY_STRING": "a=1"})
        got.user = "Ada"
        copy = got.copy()
        copy["QUERY_STRING"] = "a=2"
        self.assertEqual((got.query.a, copy.query.a, copy.user), ("1", "2", "Ada"))

    def test_segments_move_between_script_name_and_path(self):
        got = Request({"SCRIPT_NAME": "/a", "PATH_INFO": "/b/c/"})
        got.path_shift()
        self.assertEqual((got.script_name, got.path), ("/a/b/", "/c/"))
        got.path_shift(-2)
        self.assertEqual((got.script_name, got.path), ("/", "/a/b/c/"))
        got = Request({"PATH_INFO": minibottle.text_to_wsgi("/ä/ö")})
        got.path_shift()
        self.assertEqual((got.script_name, got.path, got.fullpath), ("/ä/", "/ö", "/ä/ö"))

    def test_who_asks_is_read_from_the_header_or_told_by_the_server(self):
        for header, expected in (
                ("Basic QTpi", ("A", "b")), ("basic w7Y6YTpi", ("ö", "a:b")), ("Basic QQ==", None),
                ("Basic /w==", None), ("Bearer QTpi", None), ("Basic", None), ("Basic \xff", None),
                ("", None), ("Basic Og==", ("", ""))):
            with self.subTest(header=header):
                self.assertEqual(Request({"HTTP_AUTHORIZATION": header}).auth, expected)
                self.assertEqual(parse_auth(header), expected)
        self.assertEqual(Request({"REMOTE_USER": "Ada"}).auth, ("Ada", None))

    def test_auth_basic_asks_for_a_name_and_a_password(self):
        app = App()

        @app.route("/<name>")
        @auth_basic(lambda user, password: (user, password) == ("A", "b"), realm="here")
        def hello(request, name):
            return "hello " + name + request.path
        for headers, status in (({}, 401), ({"Authorization": "Basic QTpj"}, 401),
                                ({"Authorization": "Basic QTpi"}, 200)):
            answer = ask(app, "/x", headers=headers)
            self.assertEqual(answer.status_code, status)
        self.assertEqual(answer.text, "hello x/x")
        self.assertEqual(ask(app, "/x").headers["WWW-Authenticate"], 'Basic realm="here"')

    def test_forwarding_headers_are_not_believed(self):
        got = Request({"REMOTE_ADDR": "1.2.3.4", "HTTP_X_FORWARDED_FOR": "5.6.7.8"})
        self.assertEqual((got.remote_addr, got.remote_route), ("1.2.3.4", ["1.2.3.4"]))
        self.assertEqual(Request({}).remote_route, [])

    def test_a_mounted_path_is_text_too(self):
        got = Request({"SCRIPT_NAME": "/\xc3\xb6", "PATH_INFO": "/\xc3\xa4", "HTTP_HOST": "x"})
        self.assertEqual((got.fullpath, got.url), ("/ö/ä", "http://x/%C3%B6/%C3%A4"))

    def test_what_the_body_breaks_is_an_http_error(self):
        for name, environ, status in (
                ("json", {"CONTENT_TYPE": "application/json", "wsgi.input": io.BytesIO(b"{"),
                          "CONTENT_LENGTH": "1"}, 400),
                ("body", {"CONTENT_LENGTH": str(1 << 40)}, 413)):
            with self.subTest(name=name), self.assertRaises(HTTPError) as caught:
                getattr(Request(environ), name)
            self.assertEqual(caught.exception.status_code, status)


class BottleResponseTest(UnitTest):

    def test_a_date_of_expiry_is_set_and_read(self):
        answer, day = Response(), datetime.datetime(2024, 2, 29, tzinfo=datetime.timezone.utc)
        self.assertIsNone(answer.expires)
        for given in (day, day.timestamp(), "Thu, 29 Feb 2024 00:00:00 GMT"):
            answer.expires = given
            self.assertEqual((answer.expires, answer.headers["Expires"]),
                             (day, "Thu, 29 Feb 2024 00:00:00 GMT"))

    def test_a_copy_has_all_but_the_body(self):
        answer = HTTPResponse("body", 404, X_A="1")
        answer.set_cookie("a", "b", path="/")
        copy = answer.copy(Response)
        self.assertEqual((type(copy), copy.status, copy.body, copy.headerlist),
                         (Response, "404 Not Found", "", answer.headerlist))
        copy.headers.append("X-A", "2")
        self.assertEqual(answer.headers.getall("X-A"), ["1"])

    def test_the_response_of_a_context_can_be_made_anew(self):
        def work():
            response.bind("x", 404)
            response.content_type = "a/b"
            self.assertEqual((response.status_code, response.headers["Content-Type"]), (404, "a/b"))
        contextvars.copy_context().run(work)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()


# === 8. Files and gzip ========================================================

HTML = ("Content-Type", "text/html")


class NegotiationTest(UnitTest):
    """RFC 9110 12.5.3, 12.5.5 and 8.8.1."""

    def test_q_values_are_honoured(self):
        for header, expected in (
                ("", False), ("gzip", True), ("GZip", True), ("x-gzip", True), ("*", True),
                ("br,gzip;q=0.5", True), ("*;q=0.1", True), ("gzip ; q=1.000", True),
                ("identity;q=0.5, gzip;q=1.0, *;q=0", True), ("br;q=0, *", True),
                ("gzip;Q=0", False), ("*;q=0", False), ("*, gzip;q=0", False),
                ("x-gzip-not", False), ("identity", False),
                ("deflate, br", False), ("gzip;q=0", False), ("gzip;q=0.000", False),
                ("gzip;q=0.001, identity;q=0", True), ("gzip ; Q=1.0", True), ("*;q=0, gzip", True),
                ("gzip;q=0, *", False), ("identity, gzip;q=0.5", False), ("gzipped", False),
                ("identity;q=0.5, *", True), ("gzip;q=1.1", False), ("gzip;q=0.5x", False),
                ("br;q=1, \tgzip;q=0.8 ,*;q=0.1", True)):
            with self.subTest(header=header):
                self.assertIs(accepts_gzip(header), expected)
        for text in (" ", ",", "a", ";q=", "a;q=0.1,"):
            self.assertQuick(accepts_gzip, text * (32768 // len(text)))

    def negotiate(self, *headers, status="200 OK", length=5000, accept="gzip", **environ):
        environ["HTTP_ACCEPT_ENCODING"] = accept
        made, compress = negotiate_gzip(environ, status, list(headers), length, 1000)
        return [(name.lower(), value) for name, value in made], compress

    def test_what_is_compressed(self):
        for kind in ("text/html", "TEXT/plain; charset=x", "application/json", "text/event-stream",
                     "application/problem+json", "image/svg+xml", "application/javascript",
                     "application/atom+xml"):
            with self.subTest(kind=kind):
                self.assertTrue(self.negotiate(("content-type", kind))[1])
        self.assertTrue(self.negotiate(HTML, length=None)[1])
        self.assertTrue(self.negotiate(HTML, ("Content-Length", "1000"), length=None)[1])

    def test_what_is_left_alone(self):
        for headers, options in (
                ([], {}), ([("Content-Type", "image/png")], {}),
                ([("Content-Type", "application/octet-stream")], {}), ([HTML], {"length": 999}),
                ([HTML, ("Content-Length", "999")], {"length": None}),
                ([HTML], {"status": "204 No Content"}), ([HTML], {"status": "206 Partial Content"}),
                ([HTML], {"status": "304 Not Modified"}), ([HTML, ("content-encoding", "br")], {}),
                ([HTML, ("Content-Range", "bytes 0-5/6")], {}),
                ([HTML], {"minibottle.gzip": False}),
                ([HTML, ("Cache-Control", "public, No-Transform")], {}),
                ([HTML, ("Cache-Control", "no-transform"), ("Cache-Control", "private")], {})):
            with self.subTest(headers=headers, options=options):
                made, compress = self.negotiate(*headers, **options)
                self.assertEqual((compress, made), (False, [(n.lower(), v) for n, v in headers]))

    def test_what_depends_on_the_client_says_so(self):
        for accept in ("gzip", "br"):
            for vary, expected in (
                    ([], "Accept-Encoding"), (["Cookie"], "Cookie, Accept-Encoding"), (["*"], "*"),
                    (["cookie, accept-encoding"], "cookie, accept-encoding"),
                    (["Cookie", "Origin"], "Cookie, Origin, Accept-Encoding")):
                made, _ = self.negotiate(HTML, *(("Vary", value) for value in vary), accept=accept)
                with self.subTest(accept=accept, vary=vary):
                    self.assertEqual(", ".join(v for n, v in made if n == "vary"), expected)

    def test_other_bytes_have_another_length_and_a_weak_tag(self):
        for tag, expected in (('"x"', 'W/"x"'), ('W/"x"', 'W/"x"')):
            made, _ = self.negotiate(HTML, ("ETag", tag), ("Content-Length", "5000"))
            made = dict(made)
            self.assertEqual((made["etag"], "content-length" in made, made["content-encoding"]),
                             (expected, False, "gzip"))
        made, _ = self.negotiate(HTML, ("ETag", '"x"'), accept="")
        self.assertIn(("etag", '"x"'), made)


class SafeJoinTest(UnitTest):
    """What a client may name is below the root, on every system."""

    def test_nothing_above_the_root_has_a_name(self):
        for name in ("..", "../a", "a/../../b", "/../a", "//../a", "a/../..", "./..", "", "/", ".",
                     "a\0", "\0", "../www2/a", "../ww"):
            with self.subTest(name=name):
                self.assertIsNone(safe_join("/srv/www", name))
        for name, expected in (
                ("a/b", "a/b"), ("/etc/passwd", "etc/passwd"), ("//a", "a"), ("a/../b", "b"),
                ("\\a", "a"), ("..a", "..a"), ("%2e%2e/a", "%2e%2e/a"), ("c:a", "c:a"),
                ("nul", "nul"), ("a\\..\\..\\b", "a\\..\\..\\b")):
            for root in ("/srv/www", "/srv/www/", "/srv/./x/../www"):
                with self.subTest(name=name, root=root):
                    self.assertEqual(safe_join(root, name), "/srv/www/" + expected)
        self.assertEqual(safe_join("/", "a"), "/a")
        self.assertEqual(safe_join(".", "a"), os.path.join(os.getcwd(), "a"))

    def test_windows_has_more_names_that_lead_elsewhere(self):
        for name in ("..\\a", "a\\..\\..\\b", "../a", "d:a", "d:\\a", "c:\\windows\\a",
                     "a:b", "a.txt::$DATA", "nul", "NUL", "con.txt", "a/aux", "a\\PRN ", "com1",
                     "lpt9.log", "COM\u00b9", "conin$", "..\\www2\\a", "nul .txt", "a\0"):
            with self.subTest(name=name):
                self.assertIsNone(safe_join("C:\\www", name, ntpath))
        for name in ("a\\b", "a/b", "\\\\a\\b", "a\\c\\..\\b"):
            self.assertEqual(safe_join("C:\\www", name, ntpath), "C:\\www\\a\\b")
        for name in ("console.log", "null", "com10", "acon", "auxiliary.txt", "nul_"):
            self.assertEqual(safe_join("C:\\www", name, ntpath), "C:\\www\\" + name)


class StaticFiles:
    """A folder of files, and `ask`: a request to a site that sends them by static_file."""

    DATA = bytes(range(256)) * 4
    DATE = "Sun, 09 Sep 2001 01:46:40 GMT"

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = os.path.join(folder.name, "www")
        os.makedirs(os.path.join(self.root, "folder"))
        for name in ("data.bin", "page.html", "app.js", "notes", "a.tar.gz", "b.tar.bz2",
                     UNICODE + ".txt", "../secret.txt"):
            self.write(name, self.DATA)
        self.write("empty.txt", b"")

    def write(self, name, data, moment=1000000000):
        path = os.path.join(self.root, name)
        with open(path, "wb") as file:
            file.write(data)
        os.utime(path, (moment, moment))

    def site(self, **options):
        app = App()

        @app.route("/<name:path>", ["GET", "POST"])
        def send(name):
            return static_file(name, self.root, **options)
        return app

    def ask(self, name="data.bin", method="GET", options=None, **headers):
        headers = {key.replace("_", "-"): value for key, value in headers.items()}
        return ask(self.site(**options or {}), "/" + name, method, headers=headers)


class StaticFileTest(StaticFiles, UnitTest):
    """RFC 9110 13 and 14."""

    def test_a_file_comes_whole_with_its_validators(self):
        answer = self.ask()
        self.assertEqual((answer.status_code, answer.body), (200, self.DATA))
        self.assertEqual(
            [answer.headers[name] for name in ("Content-Length", "Last-Modified", "Accept-Ranges",
                                               "Content-Type")],
            ["1024", self.DATE, "bytes", "application/octet-stream"])
        self.assertRegex(answer.headers["ETag"], r'\A"[0-9a-f]+-400"\Z')
        head = self.ask(method="HEAD", Range="bytes=0-1")
        self.assertEqual((head.status_code, head.body, head.headers["Content-Length"]),
                         (200, b"", "1024"))
        self.assertEqual(self.ask("empty.txt", Range="bytes=0-").headers["Content-Length"], "0")

    def test_what_is_not_there_or_not_below_is_refused(self):
        for name, status in (("nothing", 404), ("folder", 404), ("folder/nothing", 404),
                             ("data.bin/x", 404), ("x" * 5000, 404), ("../secret.txt", 403),
                             ("folder/../../secret.txt", 403), ("../nothing", 403), ("%00", 403),
                             ("a%00.txt", 403), ("folder/..", 403), ("..%5csecret.txt", 404)):
            with self.subTest(name=name):
                self.assertEqual(self.ask(urllib.parse.quote(name, safe="/%")).status_code, status)
        self.assertEqual(static_file("\udc80\ud800", self.root).status_code, 404)
        self.assertEqual(static_file("a", self.root + "\0").status_code, 404)

    @unittest.skipUnless(hasattr(os, "mkfifo"), "no pipes here")
    def test_a_pipe_is_no_file_and_links_are_followed(self):
        os.mkfifo(os.path.join(self.root, "pipe"))
        os.symlink(os.path.join("..", "secret.txt"), os.path.join(self.root, "link"))
        self.assertEqual(self.ask("pipe").status_code, 404)
        self.assertEqual(self.ask("link").body, self.DATA)

    def test_a_file_that_may_not_be_read_is_forbidden(self):
        with mock.patch.object(minibottle, "open", side_effect=PermissionError, create=True):
            self.assertEqual(self.ask().status_code, 403)      # root could read any real file

    def test_types_are_guessed_and_text_has_a_charset(self):
        for name, options, expected in (
                ("page.html", {}, "text/html; charset=UTF-8"),
                ("page.html", {"charset": "latin1"}, "text/html; charset=latin1"),
                ("page.html", {"charset": ""}, "text/html"),
                ("notes", {}, "application/octet-stream"), ("a.tar.gz", {}, "application/gzip"),
                ("b.tar.bz2", {}, "application/x-bzip2"), ("notes", {"mimetype": "a/b"}, "a/b"),
                ("notes", {"mimetype": "text/x"}, "text/x; charset=UTF-8"),
                ("notes", {"mimetype": "text/x; charset=b"}, "text/x; charset=b"),
                ("notes", {"mimetype": "application/javascript"},
                 "application/javascript; charset=UTF-8"),
                ("notes", {"download": "song.mp3"}, "audio/mpeg"),
                ("notes", {"mimetype": None}, "text/html; charset=UTF-8")):
            with self.subTest(name=name, options=options):
                answer = self.ask(name, options=options)
                self.assertEqual(answer.headers["Content-Type"], expected)
                self.assertNotIn("Content-Encoding", answer.headers)

    def test_a_download_has_its_name_whatever_is_in_it(self):
        for name, expected in (
                (True, 'filename="data.bin"'), ("a b.txt", 'filename="a b.txt"'),
                ('a"b\\c', "filename=\"a_b_c\"; filename*=UTF-8''a%22b_c"),
                ("ö.txt", "filename=\"_.txt\"; filename*=UTF-8''%C3%B6.txt"),
                ("50%.txt", "filename=\"50_.txt\"; filename*=UTF-8''50%25.txt"),
                ("a\r\nSet-Cookie: b/../c", 'filename="a__Set-Cookie: b_.._c"'),
                ("\udc80", "filename=\"_\"; filename*=UTF-8''%3F")):
            with self.subTest(name=name):
                answer = self.ask(options={"download": name})
                self.assertEqual(answer.headers["Content-Disposition"], "attachment; " + expected)
        answer = self.ask(urllib.parse.quote(UNICODE + ".txt"), options={"download": True})
        message = email.message_from_string(
            "Content-Disposition: " + answer.headers["Content-Disposition"].partition(";")[0]
            + ";" + answer.headers["Content-Disposition"].rpartition(";")[2] + "\n\n")
        self.assertEqual(email.utils.collapse_rfc2231_value(
            message.get_param("filename", header="Content-Disposition")), UNICODE + ".txt")

    def test_conditions_hold_in_their_order(self):
        """RFC 9110 13.2.2."""
        tag, old, new = self.ask().headers["ETag"], "Sat, 01 Jan 2000 00:00:00 GMT", http_date(2e9)
        for headers, status in (
                ({"If_None_Match": tag}, 304), ({"If_None_Match": "W/" + tag}, 304),
                ({"If_None_Match": '"a", "b,c" ,W/%s' % tag}, 304), ({"If_None_Match": "*"}, 304),
                ({"If_None_Match": '"a"'}, 200), ({"If_None_Match": tag.strip('"')}, 200),
                ({"If_None_Match": '"a"', "If_Modified_Since": new}, 200),
                ({"If_None_Match": tag, "If_Modified_Since": old}, 304),
                ({"If_Modified_Since": self.DATE}, 304), ({"If_Modified_Since": new}, 304),
                ({"If_Modified_Since": old}, 200), ({"If_Modified_Since": "yesterday"}, 200),
                ({"If_Match": tag}, 200), ({"If_Match": "*"}, 200), ({"If_Match": '"a"'}, 412),
                ({"If_Match": "W/" + tag}, 412), ({"If_Match": '"a"', "If_None_Match": tag}, 412),
                ({"If_Match": tag, "If_Unmodified_Since": old}, 200),
                ({"If_Unmodified_Since": old}, 412), ({"If_Unmodified_Since": self.DATE}, 200),
                ({"If_Unmodified_Since": "soon"}, 200),
                ({"If_Match": tag, "Range": "bytes=0-"}, 206),
                ({"If_None_Match": tag, "Range": "bytes=0-1"}, 304),
                ({"If_Match": '"a"', "Range": "bytes=9999-"}, 412)):
            for method in ("GET", "HEAD"):
                with self.subTest(headers=headers, method=method):
                    answer = self.ask(method=method, **headers)
                    self.assertEqual(answer.status_code, 200 if method == "HEAD" and status == 206
                                     else status)
        answer = self.ask(If_None_Match=tag, options={"headers": {"Cache-Control": "max-age=9"}})
        self.assertEqual((answer.body, answer.headers["ETag"], answer.headers["Cache-Control"]),
                         (b"", tag, "max-age=9"))
        self.assertEqual(self.ask(method="POST", If_None_Match=tag).status_code, 200)

    def test_a_tag_may_be_given_or_left_out(self):
        for etag, expected in (("v1", '"v1"'), ('"v1"', '"v1"'), ('W/"v1"', 'W/"v1"')):
            answer = self.ask(options={"etag": etag}, If_None_Match='"v0", "v1"')
            self.assertEqual((answer.status_code, answer.headers["ETag"]), (304, expected))
        self.assertNotIn("ETag", self.ask(options={"etag": False}).headers)
        answer = self.ask(options={"etag": 'W/"v1"'}, If_Range='W/"v1"', Range="bytes=0-0")
        self.assertEqual(answer.status_code, 200)

    def test_a_range_is_what_was_asked_for(self):
        for header, part in (
                ("bytes=0-0", (0, 1)), ("bytes=10-25", (10, 26)), ("bytes=1000-", (1000, 1024)),
                ("bytes=-24", (1000, 1024)), ("bytes=-9999", (0, 1024)), ("bytes=0-", (0, 1024)),
                ("bytes=1000-99999999999999", (1000, 1024)), ("Bytes=1023-1023", (1023, 1024)),
                ("bytes=10-25,-80", (10, 26)), ("bytes=9999-, 5-6", (5, 7))):
            with self.subTest(header=header):
                answer = self.ask(Range=header)
                start, end = part
                self.assertEqual((answer.status_code, answer.body), (206, self.DATA[start:end]))
                self.assertEqual(answer.headers["Content-Range"], f"bytes {start}-{end - 1}/1024")
                self.assertEqual(answer.headers["Content-Length"], str(end - start))

    def test_what_no_range_fits_is_told_the_length(self):
        for header in ("bytes=1024-", "bytes=-0", "bytes=5-4", "bytes=", "bytes=a-b", "bytes=-",
                       "bytes=0-1,x", "bytes=1-2-3", "bytes=+1-2", "bytes=%s-" % ("9" * 19)):
            with self.subTest(header=header):
                answer = self.ask(Range=header)
                self.assertEqual((answer.status_code, answer.headers["Content-Range"]),
                                 (416, "bytes */1024"))
        for header in ("lines=0-1", "0-1", "bytes 0-1", "bytes=0-9,5-19", "bytes=1-,2-",
                       "bytes=" + ",".join("%d-%d" % (i, i) for i in range(0, 12, 2))):
            with self.subTest(header=header):
                self.assertEqual(self.ask(Range=header).body, self.DATA)

    def test_a_range_of_another_version_is_all_of_this_one(self):
        tag = self.ask().headers["ETag"]
        for condition, status in ((tag, 206), (self.DATE, 206), ('"a"', 200), ("W/" + tag, 200),
                                  ("Sun, 09 Sep 2001 01:46:41 GMT", 200), ("*", 200)):
            with self.subTest(condition=condition):
                answer = self.ask(Range="bytes=0-9", If_Range=condition)
                self.assertEqual(answer.status_code, status)
        self.write("data.bin", self.DATA, int(time.time()))
        now = self.ask().headers["Last-Modified"]
        self.assertEqual(self.ask(Range="bytes=0-9", If_Range=now).status_code, 200)

    def test_ranges_are_read_in_linear_time(self):
        self.assertEqual(parse_range_header("bytes=10-,-10,5-10", 100),
                         [(10, 100), (90, 100), (5, 11)])
        for text in ("1-2,", ",", "-", "9" * 18, " ", "-1,"):
            self.assertQuick(parse_range_header, "bytes=" + text * (8192 // len(text)), 1 << 40)

    def test_a_gzip_sibling_is_sent_to_who_accepts_it(self):
        packed, on = gzip.compress(self.DATA), {"precompressed": True}
        self.write("app.js.gz", packed)
        answer = self.ask("app.js", options=on, Accept_Encoding="gzip")
        self.assertEqual((answer.body, answer.headers["Content-Encoding"], answer.headers["Vary"]),
                         (packed, "gzip", "Accept-Encoding"))
        self.assertIn("javascript", answer.headers["Content-Type"])
        part = self.ask("app.js", options=on, Accept_Encoding="gzip", Range="bytes=2-5")
        self.assertEqual(part.body, packed[2:6])
        plain = self.ask("app.js", options=on)
        self.assertEqual((plain.body, plain.headers["Vary"]), (self.DATA, "Accept-Encoding"))
        self.assertNotEqual(plain.headers["ETag"], answer.headers["ETag"])
        for options in ({}, on):
            self.assertEqual(self.ask("app.js", options=options).body, self.DATA)
        self.write("app.js.gz", packed, 999999999)   # older than what it was made of
        self.assertEqual(self.ask("app.js", options=on, Accept_Encoding="gzip").body, self.DATA)
        self.assertEqual(self.ask("app.js", Accept_Encoding="gzip").body, self.DATA)


class ServedFileTest(StaticFiles, WireTest):
    """Files by the built-in server's sendfile, and by the standard library's server."""

    DATA = bytes(range(256)) * 12000         # more than a socket takes at once

    def fetch_part(self, url, *fields, method="GET"):
        with contextlib.closing(Client(url)) as client:
            client.request(method, "/data.bin", headers=dict(fields))
            answer = client.getresponse()
            return answer.status, answer.headers, answer.read()

    def test_parts_and_conditions_are_the_same_on_every_server(self):
        for start in (serve_builtin, serve_wsgiref):
            with self.subTest(start=start.__name__), start(self.site()) as url:
                status, headers, body = self.fetch_part(url)
                self.assertEqual((status, body == self.DATA), (200, True))
                fresh = self.fetch_part(url, ("If-None-Match", headers["ETag"]))
                self.assertEqual((fresh[0], fresh[2]), (304, b""))
                for first, last in ((0, 0), (5, 2000000), (3071999, 3071999)):
                    part = self.fetch_part(url, ("Range", "bytes=%d-%d" % (first, last)))
                    self.assertEqual((part[0], part[2] == self.DATA[first:last + 1]), (206, True))
                late = self.fetch_part(url, ("Range", "bytes=3072000-"))
                self.assertEqual((late[0], late[1]["Content-Range"]), (416, "bytes */3072000"))
                head = self.fetch_part(url, method="HEAD")
                self.assertEqual((head[0], head[1]["Content-Length"]), (200, "3072000"))

    def test_a_part_goes_out_by_sendfile_and_the_connection_lives_on(self):
        sent = []

        def sendfile(*args):
            sent.append(args)
            return real(*args)
        real = getattr(os, "sendfile", None) or self.skipTest("no sendfile here")
        with mock.patch.object(os, "sendfile", sendfile):
            wire = self.connect(self.serve(self.site()))
            for start in (7, 2999999):
                answer = wire.send(get("/data.bin", "Range: bytes=%d-3000000" % start)).answer()
                self.assertEqual((answer.status, answer.body), (206, self.DATA[start:3000001]))
        self.assertEqual((len(sent) > 1, sent[0][2], sent[-1][2]), (True, 7, 2999999))

    def test_a_download_that_broke_off_is_resumed(self):
        try:
            import requests
        except ImportError:
            self.skipTest("requests is not installed")
        with serve_builtin(self.site(download="ä.bin")) as url, requests.Session() as session:
            with session.get(url + "/data.bin", stream=True) as answer:
                got = answer.raw.read(100000)
            rest = session.get(url + "/data.bin", headers={
                "Range": "bytes=%d-" % len(got), "If-Range": answer.headers["ETag"]})
            self.assertEqual((rest.status_code, got + rest.content == self.DATA), (206, True))


# === 9. Router ================================================================

class RouterTest(UnitTest):

    def app_of_rules(self, *rules, method="GET", filters=()):
        """Each route answers its rule and its arguments."""
        app = App()
        for name, func in dict(filters).items():
            app.router.add_filter(name, func)
        for rule in rules:
            app.route(rule, method, functools.partial(lambda rule, **args: {
                "rule": rule, "args": args}, rule))
        return app

    def get(self, app, path, method="GET"):
        """(rule, arguments), or the status of an error."""
        answer = ask(app, path, method)
        return (answer.json["rule"], answer.json["args"]) if answer.status_code == 200 \
            else answer.status_code

    def test_every_form_of_a_rule(self):
        for rule, path, expected in (
                ("/", "/", {}), ("/", "", {}), ("/a/b", "/a/b", {}), ("/a", "/a/", 404),
                ("/a", "//a", 404), ("/ö b", "/ö b", {}), ("/a.b", "/axb", 404),
                ("/<x>", "/ö b", {"x": "ö b"}), ("/<x>", "/", 404), ("/<x>", "/a/b", 404),
                ("/<x>/", "/a/", {"x": "a"}), ("/<x>/<y>", "/a/b", {"x": "a", "y": "b"}),
                ("/<x>-<y>.txt", "/a-b-c.txt", {"x": "a-b", "y": "c"}), ("/a<x>", "/b", 404),
                ("/<n:int>", "/-05", {"n": -5}), ("/<n:int>", "/5.0", 404),
                ("/<n:int>", "/٣", 404), ("/<n:int>", "/5%0A", 404),
                ("/<n:float>", "/-.5", {"n": -0.5}), ("/<n:float>", "/1.2.3", 400),
                ("/<n:float>", "/1e5", 404), ("/<p:path>", "/a/b/", {"p": "a/b/"}),
                ("/a/<p:path>/z", "/a/b/z/z", {"p": "b/z"}), ("/a/<p:path>", "/a/", 404),
                ("/<x:re:[a-z]+>", "/ab", {"x": "ab"}), ("/<x:re:[a-z]+>", "/aB", 404),
                ("/<x:re:a*>", "/", {"x": ""}), ("/<x:re:(a|b)(?:c)>", "/bc", {"x": "bc"}),
                (r"/<x:re:[^\>]+>", "/a/b", {"x": "a/b"}), (r"/<x:re:\d{2}>", "/12", {"x": "12"}),
                ("/<x:re>", "/ab", {"x": "ab"}), ("/<:int>/<x>", "/5/a", {"x": "a"}),
                ("/<:re:[0-9]>", "/5", {}), (r"/\<x>", "/<x>", {}), (r"/\<x>", "/a", 404),
                (r"/a\<b>/<x>", "/a<b>/c", {"x": "c"}), ("/<x", "/<x", {}), ("/a:b", "/a:b", {})):
            with self.subTest(rule=rule, path=path):
                got = self.get(self.app_of_rules(rule), path)
                self.assertEqual(got[1] if type(got) is tuple else got, expected)

    def test_bad_rules_are_refused(self):
        for rule in ("/<x:nothing>", "/<x>/<x>", "/<x:re:[>", "/<x:re:(>", "/<x:re:a{2,1}>"):
            with self.subTest(rule=rule), self.assertRaises(RouteSyntaxError):
                self.app_of_rules(rule)

    def test_custom_filters_convert_both_ways_and_may_span_segments(self):
        def convert(value):
            if value == "key":
                raise KeyError(value)
            return [int(part) for part in value.split("/")]
        rule = "/<x:list:[0-9a-z/]+>/end"
        app = self.app_of_rules(rule, filters={"list": lambda config: (
            config, convert, lambda value: "/".join(map(str, value)))})
        self.assertEqual(self.get(app, "/1/2/3/end"), (rule, {"x": [1, 2, 3]}))
        self.assertEqual(self.get(app, "/bad/end"), 400)
        with self.assertLogged():
            self.assertEqual(self.get(app, "/key/end"), 500)
        self.assertEqual(app.get_url(rule, x=[4, 5]), "/4/5/end")

    def test_rules_are_tried_in_their_order_but_static_ones_first(self):
        app = self.app_of_rules("/<x:int>", "/<x>", "/5/<y>", "/<x:path>", "/a", "/<x:re:.*>")
        for path, rule in (("/5", "/<x:int>"), ("/b", "/<x>"), ("/a", "/a"), ("/5/6", "/5/<y>"),
                           ("/6/7", "/<x:path>"), ("/", "/<x:re:.*>")):
            with self.subTest(path=path):
                self.assertEqual(self.get(app, path)[0], rule)

    def test_methods_are_asked_in_bottles_order(self):
        app = App()
        for path, method in (("/t", "ANY"), ("/<x>", "GET"), ("/p", "PROXY"), ("/p", "GET"),
                             ("/h", "HEAD"), ("/h", "GET"), ("/a", "any"), ("/f", "foo")):
            app.route(path, method, lambda method=method, **args: [response.set_header(
                "X-Method", method)] and method)
        for path, method, expected in (
                ("/t", "GET", "GET"), ("/t", "POST", "ANY"), ("/t", "HEAD", "GET"),
                ("/p", "GET", "PROXY"), ("/p", "DELETE", "PROXY"), ("/h", "HEAD", "HEAD"),
                ("/a", "PUT", "any"), ("/f", "FOO", "foo"), ("/f", "GET", "GET")):
            with self.subTest(path=path, method=method):
                self.assertEqual(ask(app, path, method).headers["X-Method"], expected)

    def test_a_route_that_comes_later_counts_from_then_on(self):
        app = App()
        for path, method, expected in (("/<x>", "ANY", "wild"), ("/a", "ANY", "any"),
                                       ("/a", "GET", "get"), ("/a", "PROXY", "proxy")):
            app.route(path, method, lambda x=None, text=expected: text)
            for _ in "first", "again":
                self.assertEqual(ask(app, "/a").text, expected)

    @only_cpython
    def test_methods_that_nobody_has_heard_of_leave_nothing_behind(self):
        app = app_of(lambda: "x", method="ANY")
        sizes = []
        for start in (0, 1000, 2000):
            for i in range(start, start + 1000):
                b"".join(app(environ_of(method="M%d" % i), lambda *args: None))
            sizes.append(sys.getallocatedblocks())
        self.assertLess(sizes[2] - sizes[1], 100)

    def test_an_equal_rule_replaces_the_first_at_its_place(self):
        app = self.app_of_rules("/s", "/d/<a>", "/d/<x:re:.*>", "/s", "/d/<b>")
        self.assertEqual((self.get(app, "/d/1"), self.get(app, "/s")[0]),
                         (("/d/<b>", {"b": "1"}), "/s"))
        self.assertEqual(len(app.routes), 5)
        app.route("/s", callback=lambda: {"rule": "new", "args": {}})
        self.assertEqual(self.get(app, "/s")[0], "new")

    def test_urls_are_built_percent_encoded_and_lead_back(self):
        app = self.app_of_rules("/a b/<x>/<n:int>", "/<p:path>.html")
        for rule, args, expected in (
                ("/a b/<x>/<n:int>", {"x": "c/ö?#%", "n": "05"}, "/a%20b/c%2F%C3%B6%3F%23%25/5"),
                ("/<p:path>.html", {"p": "a/b c"}, "/a/b%20c.html"),
                ("/<p:path>.html", {"p": "a", "q": [1, 2], "r": "ö&"},
                 "/a.html?q=1&q=2&r=%C3%B6%26")):
            self.assertEqual(app.get_url(rule, **args), expected)
        for value in ("a", "ö b", "%", "?#&;=+", UNICODE, "..."):
            path = app.get_url("/a b/<x>/<n:int>", x=value, n=1)
            self.assertEqual(self.get(app, path), ("/a b/<x>/<n:int>", {"x": value, "n": 1}))
        for rule, args in (("/a b/<x>/<n:int>", {"x": 1}), ("nothing", {})):
            with self.assertRaises(RouteBuildError):
                app.get_url(rule, **args)

    def test_urls_have_names_and_the_prefix_of_their_application(self):
        app = App()
        app.route("/x/<y>", name="named", callback=lambda y: app.get_url("named", y=y))
        out = app(environ_of("/x/1", SCRIPT_NAME="/app"), lambda *args: None)
        self.assertEqual(b"".join(out), b"/app/x/1")

    def test_outside_of_a_request_there_is_no_prefix(self):
        app = self.app_of_rules("/x/<y>")
        self.assertEqual(contextvars.Context().run(app.get_url, "/x/<y>", y=1), "/x/1")

    def test_matching_is_no_more_work_with_10_000_routes_than_with_10(self):
        work = []
        for count in (10, 10000):
            app = App()
            for i in range(count):
                app.router.add("/r%d/<x>/edit" % i, "GET", i)
            found = []
            for path in ("/r%d/y/edit" % (count - 1), "/nothing/y/edit"):
                self.count_steps(app.router.find, "GET", path)  # may compile
                found.append(self.count_steps(app.router.find, "GET", path))
            work.append(found)
        for few, many in zip(*work):
            self.assertLess(many, few + 50)

    def count_steps(self, function, *args):
        """How many instructions of Python's it takes: no clock, so the same on every machine."""
        count = 0

        def on_event(frame, event, arg):
            nonlocal count
            frame.f_trace_opcodes = True
            count += event == "opcode"
            return on_event
        sys.settrace(on_event)
        try:
            function(*args)
        finally:
            sys.settrace(None)
        return count

    def test_2_000_routes_are_registered_without_compiling_them(self):
        app = App()
        with mock.patch.object(re, "compile") as compile:
            for i in range(2000):
                app.route("/r%d/<x>/<n:int>" % i, callback=lambda x, n: x)
        self.assertEqual(compile.call_count, 0)
        self.assertEqual(ask(app, "/r1999/a/5").text, "a")


class BottleRouterTest(UnitTest):
    """What Bottle's Router does besides."""

    def test_a_router_works_on_its_own(self):
        router = minibottle.Router()
        router.add("/s", "GET", "static")
        router.add("/ö/<n:int>/<:re:[a-z]>", "POST", "wild", "named")
        router.add("/f/<x:float>", "GET", "float")
        for path, method, expected in (
                ("/s", "GET", ("static", {})), ("/s", "HEAD", ("static", {})),
                ("/ö/5/a", "POST", ("wild", {"n": 5}))):
            found = router.match({"REQUEST_METHOD": method, "PATH_INFO": path})
            self.assertEqual(found, expected)
        for path, method, status in (("/t", "GET", 404), ("/s", "PUT", 405), ("/s", "OPTIONS", 204),
                                     ("/f/1.2.3", "GET", 400)):
            with self.subTest(path=path, method=method), self.assertRaises(HTTPResponse) as caught:
                router.match({"REQUEST_METHOD": method, "PATH_INFO": path})
            self.assertEqual(caught.exception.status_code, status)

    def test_wildcards_without_a_name_take_positional_arguments(self):
        router = minibottle.Router()
        router.add("/<:int>/<name>/<:path>", "GET", 1, "x")
        self.assertEqual(router.build("x", 5, "a b/c", name="n", q=1), "/5/n/a%20b/c?q=1")
        for positional in ((), (5,)):
            with self.assertRaises(RouteBuildError):
                router.build("x", *positional, name="n")
        with self.assertRaises(ValueError):
            router.build("x", "five", "a", name="n")

    def test_bottles_first_syntax_is_read_with_a_warning(self):
        for rule, path, expected in (
                ("/:a", "/x", {"a": "x"}), ("/:a/:b.txt", "/x/y.txt", {"a": "x", "b": "y"}),
                ("/:n#[0-9]+#/x", "/12/x", {"n": "12"}), ("/:n#[0-9]+#/x", "/a/x", 404),
                ("/:#[0-9]+#", "/5", {}), ("/f(:a#(x|y)#)", "/f(y)", {"a": "y"})):
            app = App()
            with self.subTest(rule=rule, path=path), self.assertWarns(DeprecationWarning):
                app.route(rule, callback=lambda **args: args)
            answer = ask(app, path)
            self.assertEqual(answer.json if answer.status_code == 200 else 404, expected)
        for rule, path in ((r"/\:a", "/:a"), ("/users:batch", "/users:batch"), ("/a:/b", "/a:/b")):
            self.assertEqual(ask(app_of(lambda: "x", rule), path).text, "x")


# === 10. Templates ============================================================

rendered = minibottle.template


class TemplateSyntaxTest(UnitTest):

    def assertRenders(self, rows, **variables):
        for source, expected in rows:
            with self.subTest(source=source):
                self.assertEqual(SimpleTemplate(source).render(variables), expected)

    def test_an_expression_is_escaped_also_for_attributes_unless_it_says_not_to(self):
        self.assertRenders([
            ("<{{x}}>", "<&lt;a&gt; &amp; &quot;b&quot; &#039;c&#039;>"),
            ("<{{!x}}>", "<<a> & \"b\" 'c'>"), ("<{{ !x }}>", "<<a> & \"b\" 'c'>"),
            ("{{data}}{{!data}}", "&lt;ö&gt;<ö>"), ("[{{none}}{{!none}}]", "[]"),
            ("{{5}} {{1.5}} {{True}} {{[1, '<']}}", "5 1.5 True [1, &#039;&lt;&#039;]"),
            ("{{'}}'}}{{\"}}\"}}{{'\\'}}'}}", "}}}}&#039;}}"), ("{{f'{x[0]}'}}", "&lt;"),
            ("{{{'a': 1}['a']}}", "1"), ("{{x\n}} { } {{ 100% }", "{{x\n}} { } {{ 100% }"),
            ("{{UNICODE}}" + UNICODE, UNICODE * 2), ("", ""), ("{{''}}", "")],
            x="<a> & \"b\" 'c'", data="<ö>".encode(), none=None, UNICODE=UNICODE)

    def test_a_string_in_an_expression_may_hold_quotes_and_marks(self):
        self.assertRenders([
            ("{{!'\"}}'}} {{!\"it's}}\"}} it's {{''}}", "\"}} it's}} it's "),
            ("it's {{!'''it's {{x}}'''}} {{!'''a''b\"'''}}", "it's it's {{x}} a''b\""),
            ('{{!"""a"}}b""c"""}}{{x if 0 else """\'"}"""}}', 'a"}}b""c&#039;&quot;}'),
            ("{{!'''a\n'b' }}\n\\''''}}{{''''''}}.", "a\n'b' }}\n'."),
            ("{{!'' + '''a'''}}'''{{'b' 'c'}}'", "a'''bc'")])

    def test_code_vanishes_and_its_indentation_means_nothing(self):
        self.assertRenders([
            ("a\n  % x = 1 # why; not\n%\n%# no: code\n{{x}}\n", "a\n1\n"),
            ("% for i in range(3):\n%   if i:\n{{i}}\n% end\n   % end\n.", "1\n2\n."),
            ("%if n > 5:\na\n%elif n:\nb\n%else :\nc\n%end\n", "b\n"),
            ("% if n: a = 1\n% else: a = 2; end\n{{a}}", "1"),
            ("% a = 0\n% for i in (1, 2): a += i; end\n{{a}}", "3"),
            ("% if n:\na\n% end; b = 5;\n{{b}}", "a\n5"),
            ("% try:\n%   1 // 0\n% except ZeroDivisionError:\nz\n% finally:\nf\n% end", "z\nf\n"),
            ("% while n:\n{{n}}\n%   n -= 1\n% end", "2\n1\n"), ("% if n:\nno end", "no end"),
            ("% def li(x):\n<li>{{x}}</li>\n% end\n% li(1); li('<')\n",
             "<li>1</li>\n<li>&lt;</li>\n"),
            ("%if 1 \\\n%and n:\ny\n%end", "y\n"), ("% if '#;:' and ';':\ny\n% end # done", "y\n"),
            ("% a = [\n%   i\n%   for i in range(4)\n%   if i % 2\n% ]\n{{a}}", "[1, 3]"),
            ('% a = """1\n  % 2\n"""\n{{a}}', "1\n  % 2\n"), ("% a = r'\\d;'\n{{a}}", "\\d;"),
            ("% m = 'x' if n else 'y'\n% ended = iffy = 1\n{{m}}{{ended}}", "x1"),
            ("a\r\n% b = 1\r\n{{b}}\r\n", "a\r\n1\r\n"), ("%# only", ""), ("% end_ = 1", "")], n=2)

    def test_a_block_of_code_spans_lines_and_ends_at_the_end_of_one(self):
        self.assertRenders([
            ("<% a = 1\n   b = 2 %>\n{{a + b}}", "3"), ("  <%\r\na = 1\r\n%>  \r\n{{a}}", "1"),
            ("<% if n:\n a = 1\n  else:\n a = 2\nend %>\n{{a}}", "2"),
            ("<% for i in range(2):\n%>\n{{i}}\n% end", "0\n1\n"),
            ("<% a = '%>' # %> not here\n # but here %>\n{{!a}}", "%>"),
            ("<%\n'''\n%>\n'''\na = {\n 'b': 1,\n}\n%>\n{{a['b']}}", "1")], n=0)

    def test_backslashes_make_text_of_code_and_take_line_breaks_away(self):
        self.assertRenders([
            ("\\% a {{1}}\n  \\<% b\nc \\% d\n\\\\% e", "% a 1\n  <% b\nc \\% d\n\\\\% e"),
            ("a\\\\\n% b = 1\n{{b}}", "a1"), ("a\\\\\r\n% b = 1\n{{b}}\\\\\n%#", "a1"),
            ("a\\\\\nb", "a\\\\\nb"), ("a\\\\\n\\\\\n%#\nb", "a\\\\\nb")])

    @unittest.skipIf(sys.version_info < (3, 10), "match is a statement since Python 3.10")
    def test_match_has_cases_and_one_end(self):
        source = ("% match x:\n\n  % case [a, b]:\n    {{a}}\n  % case 'x': y = 1\n  % case _:\n"
                  "    other\n% end\nend")
        for value, expected in (([1, 2], "    1\nend"), ("x", "end"), (5, "    other\nend")):
            self.assertEqual(SimpleTemplate(source).render(x=value), expected)
        nested = "% match x:\n% case 1:\n% if y:\na\n% else:\nb\n% end\n% case 2:\nc\n% end\n."
        self.assertEqual([SimpleTemplate(nested).render(x=x, y=y) for x, y in (
            (1, 1), (1, 0), (2, 0), (3, 0))], ["a\n.", "b\n.", "c\n.", "."])

    def test_match_and_case_are_names_too(self):
        self.assertRenders([("% match = 1\n% case = {match: 2}\n{{match}}{{case[1]}}", "12"),
                            ("% match, case = re.match, 5\n% x = match('a', 'b')\n{{x}}", "")],
                           re=re)

    def test_other_marks(self):
        source = "{% if x:\n  a = 1\n  end %}\n$ b = 2\n$ if b:\n[[a]][[!'<']] {{c}} % d\n$ end"
        self.assertEqual(SimpleTemplate(source, syntax="{% %} $ [[ ]]").render(x=1),
                         "1< {{c}} % d\n")

    def test_noescape_swaps_both_forms_and_an_escape_func_replaces_html(self):
        self.assertEqual(SimpleTemplate("{{x}}{{!x}}", noescape=True).render(x="<"), "<&lt;")
        self.assertEqual(SimpleTemplate("{{x}}{{!x}}", escape_func=str.upper).render(x="a"), "Aa")

    def test_functions_in_scope(self):
        self.assertRenders([
            ("{{get('x')}}{{get('y')}}{{get('y', 3)}}", "13"),
            ("% setdefault('x', 5)\n% setdefault('y', 6)\n{{x}}{{y}}", "16"),
            ("{{defined('x')}} {{defined('y')}}", "True False"),
            ("% y = 1\n{{defined('y')}} {{get('y')}}", "True 1")], x=1)

    def test_variables_come_from_defaults_then_dicts_then_keywords(self):
        source = SimpleTemplate("{{a}}{{b}}{{c}}{{self}}")
        with mock.patch.object(SimpleTemplate, "defaults", {"a": 1, "b": 1, "c": 1}):
            self.assertEqual(source.render({"b": 2, "self": 4}, c=3), "1234")
        self.assertEqual(SimpleTemplate("{{x}}").render(FormsDict(x="ö")), "ö")

    def test_parsing_takes_linear_time(self):
        for piece in ("{{", "{{'", "'''", "{{'''", "{{''' ''", "% x = ((\n", "\\\\\n",
                      "<% # %> #", "%if 1:\n%end\n"):
            with self.subTest(piece=piece):
                started = time.monotonic()
                with contextlib.suppress(SyntaxError, TemplateError):
                    SimpleTemplate(piece * (40000 // len(piece)) + "\n")
                self.assertLess(time.monotonic() - started, 2 * SLOW)


def template_frames(func):
    """(file name, line) of each frame within a template, when func fails."""
    try:
        func()
    except ZeroDivisionError as error:
        return [(os.path.basename(frame.filename), frame.lineno)
                for frame in traceback.extract_tb(error.__traceback__)
                if frame.filename.endswith((".tpl", "<template>"))]


class TemplateErrorTest(UnitTest):
    """The traceback of a template names its file and the line in it."""

    def test_an_error_is_on_the_line_where_it_is_in_the_template(self):
        for source, line in (
                ("a\nb {{x}}\nc {{1 // 0}} d\ne", 3), ("% 1 // 0", 1), ("\\\\\n% 1 // 0\na", 2),
                ("a\n<% b = 1\n# c\n\n1 // 0\n%>\nd", 5), ("a\r\n\r\n{{1 // 0}}\r\n", 3),
                ("{{'''a\n\n'''}}\nb {{1 // 0}}", 4),
                ('% a = """\n\n"""\n{{x}}\n% for i in (\n%   1,\n% ):\n\n{{i}}\n% 1 // 0\n', 10),
                ("% if x:\n%   y = 1\n%# z\n% end\n\\% a\n\n  {{1 // 0}}", 7),
                ("% def f():\na\n{{1 // 0}}\n% end\n\n% f()", 3)):
            for text in (source, source + "\n" * 50):
                with self.subTest(source=source):
                    frames = template_frames(lambda: SimpleTemplate(text).render(x=1))
                    self.assertEqual(frames[-1], ("<template>", line))

    def test_a_name_that_is_missing_is_a_NameError(self):
        with self.assertRaisesRegex(NameError, "nobody"):
            SimpleTemplate("{{nobody}}").render()

    def test_python_that_cannot_be_read_is_a_SyntaxError_with_its_line(self):
        for source, line in (("a\n% for x\n", 2), ("a\n\n{{x y}}", 3), ("% if 1:\n% x = (1,,)", 2),
                             ("a\n% if 1: b = 1; end; c = 2", 2), ("\n<% a = 1 %>{{a}}", 2),
                             ("a\n% x = 'b\n", 2)):
            with self.subTest(source=source):
                with self.assertRaises(SyntaxError) as caught:
                    SimpleTemplate(source)
                self.assertEqual((caught.exception.filename, caught.exception.lineno),
                                 ("<template>", line))

    def test_blocks_that_do_not_fit_are_named_with_their_line(self):
        for source, message in (
                ("a\n% end", "<template>, line 2: `end` without a block"),
                ("% if 1:\n% end\n\n% else:\n", "<template>, line 4: `else` without a block"),
                ("<% a = 1\nend %>", "<template>, line 2: `end` without a block"),
                ("a\n% b = [1,\nc\n% ]",
                 "<template>, line 2: code that does not end before the text"),
                ("% b = 1 + \\\nc", "<template>, line 1: code that does not end before the text")):
            with self.subTest(source=source):
                with self.assertRaises(minibottle.StplSyntaxError) as caught:
                    SimpleTemplate(source)
                self.assertEqual(str(caught.exception), message)

    def test_marks_that_are_not_five_are_refused(self):
        with self.assertRaisesRegex(ValueError, "5"):
            SimpleTemplate("a", syntax="<% %> %")


class TemplateFilesTest(UnitTest):

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = os.path.realpath(folder.name)
        self.views = os.path.join(self.folder, "views")
        os.makedirs(os.path.join(self.views, "sub"))
        for target in (minibottle.TEMPLATES, minibottle.BaseTemplate.settings):
            patch = mock.patch.dict(target)
            patch.start()
            self.addCleanup(patch.stop)
        patch = mock.patch.object(minibottle, "TEMPLATE_PATH", [self.views])
        patch.start()
        self.addCleanup(patch.stop)

    def write(self, name, text, encoding="utf-8"):
        with open(os.path.join(self.views, name), "wb") as file:
            file.write(text.encode(encoding))

    def test_a_file_is_found_with_or_without_its_extension_in_the_first_directory(self):
        sub = os.path.join(self.views, "sub")
        self.write("a.tpl", "tpl {{x}}")
        self.write("a.html", "html")
        self.write("b.html", "b")
        self.write("sub/a.tpl", "sub")
        for name, lookup, expected in (
                ("a", [self.views], "tpl 1"), ("a.html", [self.views], "html"),
                ("b", [sub, self.views], "b"), ("a", [sub, self.views], "sub"),
                ("sub/a", [self.views], "sub"), ("./sub/../b", [self.views], "b"),
                (os.path.join(self.views, "b.html"), [self.views], "b")):
            with self.subTest(name=name):
                self.assertEqual(rendered(name, x=1, template_lookup=lookup), expected)

    def test_no_name_leads_out_of_the_directories(self):
        with open(os.path.join(self.folder, "secret.tpl"), "w") as file:
            file.write("secret")
        os.mkdir(self.views + "2")
        with open(os.path.join(self.views + "2", "secret.tpl"), "w") as file:
            file.write("secret")
        path = os.path.join(self.folder, "secret.tpl")
        for name in ("../secret", "sub/../../secret", path, path[:-4], "../views2/secret", "..",
                     "sub", ".", "/", "secret\0", "\0", "..\\secret", "//" + path, "~/secret",
                     "a" * 5000, "file://" + path):
            with self.subTest(name=name[:80]):
                self.assertIsNone(SimpleTemplate.search(name, [self.views]))
                with self.assertRaisesRegex(TemplateError, "is not in"):
                    rendered(name)
                with self.assertRaisesRegex(TemplateError, "is not in"):
                    rendered("% include(name)", name=name)

    def test_without_directories_or_a_name_nothing_is_found(self):
        for args in ({"name": "a"}, {"name": "a", "lookup": []}, {}):
            with self.assertRaises(TemplateError):
                SimpleTemplate(**args)

    def test_an_include_sees_the_variables_and_returns_its_own(self):
        self.write("part.tpl", "({{x}}{{get('y', '-')}})\\\\\n% z = x * 2\n")
        self.write("page.tpl", "% include('part')\n% x = 5\n% names = include('part.tpl', y=6)\n"
                               " {{x}} {{names['z']}} {{defined('y')}} {{defined('z')}}")
        self.assertEqual(rendered("page", x=1), "(1-)(56) 5 10 False False")

    def test_an_include_brings_functions_that_write(self):
        self.write("lib.tpl", "% def bold(x):\n<b>{{x}}</b>\\\\\n% end\n")
        self.assertEqual(rendered("% lib = include('lib')\n% lib['bold']('<')\n."),
                         "<b>&lt;</b>.")

    def test_a_template_that_includes_itself_is_compiled_once_more(self):
        self.write("tree.tpl", "{{n}}\\\\\n% if n:\n%   include('tree', n=n - 1)\n% end\n")
        with mock.patch.object(minibottle, "StplParser", wraps=minibottle.StplParser) as parser:
            self.assertEqual(rendered("tree", n=5), "543210")
        self.assertEqual(parser.call_count, 2)

    def test_rebase_puts_what_was_written_into_another(self):
        self.write("outer.tpl", "<{{!base}}>")
        self.write("base.tpl", "% rebase('outer')\n[{{title}}|{{x}}|{{!base}}]")
        self.assertEqual(rendered("% rebase('base', title='<')\n<b>{{x}}</b>", x=1),
                         "<[&lt;|1|<b>1</b>]>")

    def test_rebase_in_an_include_takes_only_the_include(self):
        self.write("box.tpl", "[{{!base}}]")
        self.write("part.tpl", "% rebase('box')\npart")
        self.assertEqual(rendered("a\n% include('part')\n\nb"), "a\n[part]\nb")

    def test_an_error_in_an_include_names_both_lines(self):
        self.write("part.tpl", "a\n{{1 // 0}}\n")
        self.write("page.tpl", "\n\n% include('part')\n")
        self.assertEqual(template_frames(lambda: rendered("page")),
                         [("page.tpl", 3), ("part.tpl", 2)])

    def test_an_include_has_the_marks_and_the_encoding_of_its_includer(self):
        self.write("part.tpl", "[[x]]ö", "latin-1")
        page = SimpleTemplate("$ include('part')\n", lookup=[self.views], encoding="latin-1",
                              syntax="{% %} $ [[ ]]")
        self.assertEqual(page.render(x="ä".encode("latin-1")), "äö")

    def test_files_and_bytes_are_utf_8_or_what_is_said(self):
        self.write("a.tpl", UNICODE + "\r\n{{x}}\n")
        self.assertEqual(rendered("a", x=UNICODE), UNICODE + "\r\n" + UNICODE + "\n")
        self.assertEqual(SimpleTemplate(UNICODE.encode()).render(), UNICODE)
        self.assertEqual(SimpleTemplate(io.StringIO("{{x}}")).render(x=1), "1")
        self.assertEqual(SimpleTemplate(b"\xe4", encoding="latin-1").render(), "ä")
        self.write("b.tpl", "ä", "latin-1")
        with self.assertRaisesRegex(TemplateError, r"b\.tpl: 'utf-?8' codec"):
            rendered("b")

    def test_what_is_compiled_stays_until_it_is_cleared_or_debugged(self):
        self.write("a.tpl", "old")
        self.assertEqual(rendered("a"), "old")
        self.write("a.tpl", "new")
        self.assertEqual(rendered("a"), "old")
        with mock.patch.object(minibottle, "DEBUG", True):
            self.assertEqual(rendered("a"), "new")
        self.write("a.tpl", "newer")
        minibottle.TEMPLATES.clear()
        self.assertEqual(rendered("a"), "newer")

    def test_the_search_path_is_read_at_each_call(self):
        self.write("a.tpl", "views")
        self.write("sub/a.tpl", "sub")
        self.assertEqual(rendered("a"), "views")
        minibottle.TEMPLATE_PATH.insert(0, os.path.join(self.views, "sub"))
        self.assertEqual(rendered("a"), "sub")
        minibottle.TEMPLATE_PATH = [self.views]
        self.assertEqual(rendered("a"), "views")

    def test_a_source_is_compiled_for_each_of_its_settings(self):
        for settings, expected in (({}, "&lt;"), ({"noescape": True}, "<"), ({}, "&lt;")):
            self.assertEqual(rendered("{{x}}", x="<", template_settings=settings), expected)

    def test_sources_without_end_do_not_pile_up(self):
        made = {("a", i): None for i in range(1000)}
        minibottle.TEMPLATES.update(made)
        self.assertEqual(rendered("{{1}}"), "1")
        self.assertEqual(len(minibottle.TEMPLATES), 1)

    def test_one_template_renders_in_many_threads(self):
        self.write("part.tpl", "{{x}}\\\\\n% y = x\n")
        self.write("base.tpl", "<{{!base}}|{{x}}>")
        self.write("page.tpl", "% rebase('base')\n% for i in range(50):\n%   include('part')\n"
                               "% end\n{{x}}")
        page = SimpleTemplate(name="page", lookup=[self.views])
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            texts = list(pool.map(lambda i: page.render(x=i), range(200)))
        self.assertEqual(texts, [f"<{str(i) * 51}|{i}>" for i in range(200)])

    def test_global_settings_are_of_one_class(self):
        class Upper(SimpleTemplate):
            pass
        Upper.global_config("escape_func", str.upper)
        self.assertIs(Upper.global_config("escape_func"), str.upper)
        self.assertEqual(Upper("{{x}}").render(x="<a"), "<A")
        self.assertEqual(SimpleTemplate("{{x}}").render(x="<a"), "&lt;a")


class ViewTest(UnitTest):

    def test_a_dict_or_nothing_is_rendered_and_all_else_goes_through(self):
        for value, expected in (({"x": "<"}, "&lt;b"), (FormsDict(x="1"), "1b"), (None, "ab"),
                                ({}, "ab"), ({"y": "c"}, "ac"), ("text", "text")):
            with self.subTest(value=value):
                func = view("{{x}}{{y}}", x="a", y="b")(lambda: value)
                self.assertEqual(func(), expected)

    def test_a_view_in_an_application(self):
        @view("<b>{{name}}</b> {{request.method}}", request=request)
        def hello(name):
            """Greets."""
            return {"name": name}
        self.assertEqual((hello.__name__, hello.__doc__), ("hello", "Greets."))
        answer = ask(app_of(hello, "/<name>"), "/ö<")
        self.assertEqual((answer.text, answer.headers["Content-Type"]),
                         ("<b>ö&lt;</b> GET", "text/html; charset=UTF-8"))

    def test_a_view_is_given_the_request_if_its_function_asks_for_it(self):
        func = view("{{path}}")(lambda request: {"path": request.path})
        self.assertEqual(ask(app_of(func, "/a"), "/a").text, "/a")

    def test_a_template_that_is_missing_is_a_500(self):
        with self.assertLogged():
            self.assertEqual(ask(app_of(view("no-such-template")(dict))).status_code, 500)

    def test_what_a_function_returns_cannot_choose_template_or_settings(self):
        func = view("{{x}}")(lambda: {
            "x": "<", "template_lookup": "/", "template_settings": {"noescape": True}, "name": "a"})
        self.assertEqual(func(), "&lt;")

    def test_dicts_come_before_keywords(self):
        self.assertEqual(rendered("{{x}}{{y}}{{source}}", {"x": 1}, x=2, y=3, source=4), "134")

    def test_a_template_object_renders_itself(self):
        self.assertEqual(rendered(SimpleTemplate("{{x}}"), x=1), "1")

    def test_debug_is_a_switch_that_shows_warnings(self):
        with warnings.catch_warnings(), mock.patch.object(minibottle, "DEBUG", False):
            warnings.simplefilter("ignore")
            minibottle.debug()
            self.assertIs(minibottle.DEBUG, True)
            self.assertEqual(warnings.filters[0][0], "default")
            minibottle.debug(False)
            self.assertIs(minibottle.DEBUG, False)


@unittest.skipUnless(importlib.util.find_spec("jinja2"), "needs jinja2")
class Jinja2Test(UnitTest):

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        for name, text in (("base.html", "<{% block b %}{% endblock %}>"),
                           ("page.tpl", "{% extends 'base' %}{% block b %}{{x}}{% endblock %}")):
            with open(os.path.join(folder.name, name), "w") as file:
                file.write(text)
        self.lookup = [folder.name]

    def test_a_page_extends_another_from_the_same_directories(self):
        self.assertEqual(minibottle.jinja2_template("page", x=1, template_lookup=self.lookup),
                         "<1>")
        with self.assertRaises(TemplateError):
            minibottle.jinja2_template("../page", template_lookup=self.lookup)
        with self.assertRaisesRegex(Exception, "passwd"):
            minibottle.jinja2_template("{% include '/etc/passwd' %}", template_lookup=self.lookup)

    def test_settings_go_to_its_environment(self):
        settings = {"filters": {"star": lambda x: f"*{x}*"}, "tests": {"big": lambda x: x > 5},
                    "globals": {"g": 7}, "autoescape": True}
        self.assertEqual(minibottle.Jinja2Template(
            "{{x|star}}{{g is big}}{{'<'}}", **settings).render({"x": 1}), "*1*True&lt;")

    def test_the_same_source_in_both_languages(self):
        both = [make("{{x}}", x="<") for make in (minibottle.jinja2_template, rendered)]
        self.assertEqual(both, ["<", "&lt;"])

    def test_a_view(self):
        func = minibottle.jinja2_view("{{x}}{{y}}", y=2)(lambda: {"x": 1})
        self.assertEqual(func(), "12")


# === 11. App ==================================================================

JSON, TEXT_HTML = "application/json", "text/html; charset=UTF-8"
RETURNED = [  # (what makes the value, status, content type, body)
    (lambda: "ö", 200, TEXT_HTML, "ö".encode()),
    (lambda: "", 200, TEXT_HTML, b""),
    (lambda: None, 200, TEXT_HTML, b""),
    (lambda: b"\xff", 200, TEXT_HTML, b"\xff"),
    (lambda: bytearray(b"a"), 200, TEXT_HTML, b"a"),
    (lambda: memoryview(b"ab")[1:], 200, TEXT_HTML, b"b"),
    (lambda: {"a": "ö"}, 200, JSON, None),
    (lambda: {}, 200, JSON, b"{}"),
    (lambda: [], 200, JSON, b"[]"),
    (lambda: [1, {"a": None}], 200, JSON, b'[1, {"a": null}]'),
    (lambda: ["a", b"b", "ö"], 200, TEXT_HTML, "abö".encode()),
    (lambda: (b"a", "b"), 200, TEXT_HTML, b"ab"),
    (lambda: (), 200, TEXT_HTML, b""),
    (lambda: (text for text in ("", "a", b"b", "")), 200, TEXT_HTML, b"ab"),
    (lambda: iter([b"", b""]), 200, TEXT_HTML, b""),
    (lambda: Closable(["a", "ö"]), 200, TEXT_HTML, "aö".encode()),
    (lambda: map(str, range(3)), 200, TEXT_HTML, b"012"),
    (lambda: open(FILE, "rb"), 200, TEXT_HTML, SOURCE),
    (lambda: io.BytesIO(b"ab"), 200, TEXT_HTML, b"ab"),
    (lambda: HTTPResponse("a", 201), 201, TEXT_HTML, b"a"),
    (lambda: HTTPResponse({"a": 1}, 202, Content_Type=JSON), 202, JSON, b'{"a": 1}'),
    (lambda: HTTPResponse(iter(["a", "b"]), "299 Odd"), 299, TEXT_HTML, b"ab"),
    (lambda: Response("a", 203), 203, TEXT_HTML, b"a"),
    (lambda: response, 200, TEXT_HTML, b""),
    (lambda: HTTPError(422, {"a": 1}), 422, JSON, b'{"a": 1}'),
    (lambda: HTTPResponse("a", 204), 204, None, b""),
    (lambda: HTTPResponse("", 304, Etag='"x"'), 304, None, b""),
    (lambda: HTTPResponse(Closable(["a"]), 204), 204, None, b""),
]


class ReturnedValueTest(UnitTest):
    """PEP 3333, as wsgiref.validate reads it: each kind of value, returned and raised."""

    def test_every_kind_of_value_becomes_a_valid_answer(self):
        for i, (make, status, kind, body) in enumerate(RETURNED):
            with self.subTest(i=i, status=status):
                answer = answer_of(make)
                self.assertEqual((answer.status_code, answer.headers.get("Content-Type")),
                                 (status, kind))
                self.assertEqual(answer.body, answer.body if body is None else body)
                length = answer.headers.get("Content-Length")
                self.assertIn(length, (None, str(len(answer.body))))
                head = answer_of(make, method="HEAD")
                self.assertEqual((head.status, head.body), (answer.status, b""))
                self.assertEqual(list(head.headers.allitems()), list(answer.headers.allitems()))

    def test_a_response_may_be_raised_wherever_it_may_be_returned(self):
        for make, status, _, body in RETURNED:
            if status in (200, 203):  # 203 is a Response, which is no exception
                continue

            def function():
                raise make()

            def generator():
                raise make()
                yield
            for callback in function, generator:
                answer = answer_of(callback)
                self.assertEqual((answer.status_code, answer.body), (status, body))

    def test_what_cannot_be_sent_is_a_500_and_logged_once(self):
        def broken():
            raise ZeroDivisionError
            yield
        for make in (lambda: 5, lambda: True, object, lambda: ["a", 5], lambda: (5,),
                     lambda: iter([5]), lambda: "\ud800", lambda: 1 // 0, broken,
                     lambda: HTTPResponse(object()),
                     lambda: HTTPResponse({"a": object()}),
                     lambda: iter(["\ud800"])):
            with self.subTest(make=make), self.assertLogged():
                answer = answer_of(lambda: make())
                self.assertEqual(answer.status_code, 500)
                self.assertIn("500 Internal", answer.text)
                self.assertNotIn("Traceback", answer.text)

    def test_text_is_sent_in_the_charset_that_is_announced(self):
        for value in ("ö", iter(["ö"]), HTTPResponse("ö"), ["ö"]):
            def callback():
                response.content_type = "text/plain; charset=latin-1"
                return value
            self.assertEqual(answer_of(callback).body, b"\xf6")

    def test_the_code_before_the_first_piece_may_set_the_head(self):
        def generator():
            response.status = 201
            response.set_header("X-A", "1")
            yield ""
            response.set_cookie("a", "b")
            yield "a"
        answer = answer_of(generator)
        self.assertEqual((answer.status_code, answer.headers["X-A"], answer.headers["Set-Cookie"]),
                         (201, "1", "a=b"))

    def test_an_iterator_is_closed_once_however_the_answer_ends(self):
        for pieces, options, error in (
                (("a", "b"), {}, None), ((), {}, None), (("a", "b"), {"method": "HEAD"}, None),
                ((ZeroDivisionError(),), {}, None), ((5,), {}, None),
                (("a", ZeroDivisionError()), {}, ZeroDivisionError),
                ((HTTPResponse("x"),), {}, None), ((HTTPError(404),), {}, None)):
            for wrap in (lambda value: value, HTTPResponse):
                made = Closable(pieces)
                with self.assertRaises(error) if error else self.subTest(pieces=pieces):
                    answer_of(lambda: wrap(made), **options)
                self.assertEqual(made.closed, 1, pieces)

    def test_a_file_is_closed_and_so_is_what_status_or_server_refuse(self):
        def refuse(*args):
            raise ValueError("the server does not want it")
        for status, start in ((200, None), (304, None), (200, refuse)):
            made = [open(FILE, "rb"), Closable(["a"])]
            for value in made:
                app = app_of(lambda: HTTPResponse(value, status))
                try:
                    out = app(environ_of(), start or (lambda *args: None))
                    getattr(out, "close", lambda: None)()
                except ValueError:
                    pass
                with self.subTest(value=value, status=status, start=start):
                    self.assertTrue(value.closed)
                    value.close()

    def test_a_file_is_closed_when_a_hook_answers_instead(self):
        for hook in (lambda: abort(503), lambda: 1 // 0):
            file = open(FILE, "rb")
            app = app_of(lambda: file)
            app.hook("after_request")(hook)
            ask(app)
            self.assertTrue(file.closed)
            file.close()

    def test_a_large_body_leaves_no_temporary_file_open(self):
        kept = []
        app = app_of(lambda request: kept.append(request.body), method="POST")
        self.assertEqual(ask(app, method="POST", body=b"a" * (600 << 10)).status_code, 200)
        self.assertTrue(kept[0].closed)
        app = app_of(lambda request: request.body, method="POST")
        self.assertEqual(len(ask(app, method="POST", body=b"a" * (600 << 10)).body), 600 << 10)


class ErrorTest(UnitTest):

    def test_errors_say_why_and_nothing_gets_into_their_html(self):
        app = app_of(lambda request: abort(int(request.query.a), request.query.b))
        for code, line in ((404, "404 Not Found"), (599, "599 Unknown"), (418, "418 I'm a teapot")):
            answer = ask(app, "/", query={"a": code, "b": "<b>ö\"'&"})
            self.assertEqual(answer.status, line)
            self.assertIn("<b>ö\"'&", html.unescape(answer.text))
            self.assertNotIn("<b>", answer.text)
        self.assertNotIn(b"<x>", ask(app, "/<x>").body)
        page = answer_of(lambda: HTTPError("404 <i>", "x")).text
        self.assertNotIn("<i>", page)

    def test_an_error_handler_gives_the_page_and_may_change_the_answer(self):
        app = app_of(lambda: abort(404, "here"))
        for handler, status, kind, body in (
                (lambda error: error.body + error.status, 404, TEXT_HTML, b"here404 Not Found"),
                (lambda error: {"error": error.status_code}, 404, JSON, b'{"error": 404}'),
                (lambda error: iter(["a", "b"]), 404, TEXT_HTML, b"ab"),
                (lambda error: HTTPResponse("moved", 303, Location="/x"), 303, TEXT_HTML, b"moved"),
                (lambda error: HTTPError(410, "gone"), 410, TEXT_HTML, b"gone"),
                (lambda error: setattr(response, "status", 200) or "ok", 200, TEXT_HTML, b"ok")):
            app.error(404, handler)
            answer = ask(app)
            with self.subTest(body=body):
                self.assertEqual((answer.status_code, answer.headers["Content-Type"], answer.body),
                                 (status, kind, body))
        app.error(404, lambda error: HTTPError(410))
        self.assertNotIn("None", ask(app).text)

    def test_an_error_handler_that_fails_costs_its_page_and_a_log_line(self):
        def broken(error):
            raise ZeroDivisionError
            yield

        def charset(error):
            response.content_type = "text/plain; charset=klingon"
            return "x"
        for code in (404, 500):
            for handler in (
                    lambda error: 1 // 0, lambda error: object(),
                    lambda error: {"a": float("nan")}, lambda error: "\ud800", broken, charset,
                    lambda error: error):
                app = app_of(lambda: HTTPError(code))
                app.error(code, handler)
                with self.subTest(code=code, handler=handler):
                    with self.assertLogs("minibottle", "ERROR"):
                        answer = ask(app)
                    self.assertEqual(answer.status_code, 500)
                    self.assertIn("500 Internal", answer.text)

    def test_without_catchall_exceptions_go_on(self):
        app = app_of(lambda: 1 // 0, catchall=False)
        with self.assertRaises(ZeroDivisionError):
            app(environ_of(), lambda *args: None)
        self.assertEqual(ask(app, "/nothing").status_code, 404)

    def test_an_exit_is_no_error_of_the_request(self):
        for kind in (SystemExit, KeyboardInterrupt):
            def callback():
                raise kind
            with self.assertRaises(kind):
                app_of(callback)(environ_of(), lambda *args: None)

    def test_what_a_server_may_leave_out_of_an_environ_is_empty(self):
        """PEP 3333: a variable that is empty may be missing."""
        started = []
        environ = {"REQUEST_METHOD": "GET"}
        out = app_of(lambda: request.url)(environ, lambda *args: started.append(args[0]))
        self.assertEqual((started, b"".join(out)), (["200 OK"], b"http://127.0.0.1/"))

    def test_it_works_without_standard_streams(self):
        with mock.patch.multiple(sys, stdout=None, stderr=None):
            app = app_of(lambda request: 1 // int(request.query.a))
            client = TestClient(app)
            got = [client.get(path).status_code for path in ("/?a=0", "/?a=x", "/x")]
        self.assertEqual(got, [500, 500, 404])


class HookTest(UnitTest):

    def test_hooks_run_around_everything_in_their_order(self):
        app, seen = App(), []
        app.route("/ok", callback=lambda: seen.append("call"))
        app.route("/raises", callback=lambda: 1 // 0)
        for name in ("before_request", "after_request"):
            for i in (1, 2):
                app.hook(name)(lambda name=name, i=i: seen.append(name[:1] + str(i)))
        for path, method, call in (("/ok", "GET", ["call"]), ("/none", "GET", []),
                                   ("/ok", "PUT", []), ("/%ff", "GET", []), ("/raises", "GET", [])):
            seen.clear()
            ask(app, path, method)
            with self.subTest(path=path, method=method):
                self.assertEqual(seen, ["b1", "b2"] + call + ["a2", "a1"])

    def test_a_header_set_around_any_answer_is_in_it(self):
        app = App()
        app.hook("before_request")(lambda: response.set_header("X-Before", "1"))
        app.hook("before_request")(lambda: response.set_cookie("before", "1"))
        app.hook("after_request")(lambda: response.set_header("X-After", "1"))
        app.error(405)(lambda error: "own page")
        for path, callback in (
                ("/200", lambda: "x"), ("/201", lambda: HTTPResponse("x", 201)),
                ("/301", lambda: redirect("/x", 301)), ("/401", lambda: abort(401)),
                ("/403", lambda: HTTPError(403)), ("/413", lambda: request.forms),
                ("/500", lambda: 1 // 0), ("/501", lambda: [abort(501)]), ("/502", self.late)):
            app.route(path, ["GET", "PUT"], self.with_header(callback))
        app.post("/405", callback=lambda: "x")
        for status in (200, 201, 301, 401, 403, 404, 405, 413, 500, 501, 502):
            answer = ask(app, "/%d" % status, "PUT", body=b"a" * (1 << 20) + b"a")
            names = ["X-Before", "X-After"] + ["X-Call"] * (status not in (404, 405))
            with self.subTest(status=status):
                self.assertEqual(answer.status_code, status)
                self.assertEqual([answer.headers.get(name) for name in names], ["1"] * len(names))
                self.assertEqual(answer.headers.getall("Set-Cookie"), ["before=1"])

    def with_header(self, callback):
        def call():
            response.set_header("X-Call", "1")
            return callback()
        return call

    def late(self):
        raise HTTPError(502)
        yield

    def test_a_response_may_be_a_constant(self):
        constant = HTTPResponse("x", 401, X_A="1")
        constant.set_cookie("a", "1")
        app = app_of(lambda: constant)
        app.hook("after_request")(lambda: response.add_header("X-A", request.query.a))
        for a in "23":
            answer = ask(app, "/?a=" + a)
            self.assertEqual((answer.headers.getall("X-A"), answer.headers["Set-Cookie"]),
                             (["1", a], "a=1"))

    def test_an_error_keeps_what_does_not_describe_the_body_that_is_gone(self):
        app = app_of(lambda: 1 // 0)

        @app.hook("before_request")
        def before():
            for name in ("Content-Type", "Content-Language", "Content-Length", "Etag",
                         "Last-Modified", "Content-Security-Policy", "X-A"):
                response.set_header(name, "5")
        answer = ask(app)
        self.assertEqual(set(answer.headers), {"Content-Type", "Content-Length", "X-A",
                                               "Content-Security-Policy"})
        self.assertEqual((answer.headers["Content-Type"], answer.headers["Content-Length"]),
                         (TEXT_HTML, str(len(answer.body))))

    def test_a_hook_may_answer_and_may_rewrite_the_path(self):
        for hook in (lambda: HTTPResponse("hook", 202), lambda: redirect("/"), lambda: abort(401)):
            app = app_of(lambda: self.fail("called"))
            app.add_hook("before_request", hook)
            self.assertIn(ask(app).status_code, (202, 303, 401))
        app = app_of(lambda: "here", "/a")
        app.hook("before_request")(
            lambda: request.environ.update(PATH_INFO=request.path.rstrip("/")))
        self.assertEqual(ask(app, "/a/").text, "here")

    def test_a_hook_that_fails_is_a_500_and_can_be_removed(self):
        for name in ("before_request", "after_request"):
            app = app_of(lambda: "fine")
            hook = app.hook(name)(lambda: 1 // 0)
            with self.assertLogged():
                self.assertEqual(ask(app).status_code, 500)
            self.assertTrue(app.remove_hook(name, hook))
            self.assertEqual((ask(app).text, app.remove_hook(name, hook)), ("fine", None))
        with self.assertRaises(KeyError):
            app.add_hook("nothing", hook)


class HandlerTest(UnitTest):

    def test_one_instance_answers_one_request(self):
        made = []

        class Note(Handler):
            def prepare(self):
                made.append(self)
                self.order = ["prepare"]
                self.set_header("X-A", self.request.method)

            def get(self, id):
                self.order.append("get")
                return {"id": id, "query": self.request.query.a}

            def put(self, id):
                self.set_status(201)
                self.write("a")
                self.write(b"b")

            def post(self, id):
                self.redirect("/there")

            def delete(self, id):
                self.write({"a": UNICODE})

            def on_finish(self):
                self.order.append("finish")
        app = App()
        self.assertIs(app.route("/<id:int>", Note), Note)
        methods = ["GET", "HEAD", "PUT", "POST", "DELETE"]
        answers = [ask(app, "/5?a=b", method) for method in methods]
        self.assertEqual([answer.status_code for answer in answers], [200, 200, 201, 303, 200])
        self.assertEqual([answer.headers["X-A"] for answer in answers], methods)
        self.assertEqual((answers[0].json, answers[2].body, answers[4].json),
                         ({"id": 5, "query": "b"}, b"ab", {"a": UNICODE}))
        self.assertEqual(len({id(handler) for handler in made}), 5)
        self.assertEqual([handler.order[0::2] for handler in made][:2], [["prepare", "finish"]] * 2)
        self.assertEqual(made[2].order, ["prepare", "finish"])

    def test_its_methods_are_its_verbs_and_nothing_else_is(self):
        class Base(Handler):
            def get(self):
                return "get"

        class Child(Base):
            delete = {"this": "is data"}

            def patch(self):
                return "patch"

            def secret(self):
                return "secret"
        app = App()
        app.route("/", Child)
        for method in ("PREPARE", "SECRET", "WRITE", "ON_FINISH", "POST", "__INIT__", "DELETE"):
            answer = ask(app, method=method)
            self.assertEqual((answer.status_code, answer.headers.get("Allow")),
                             (405, "GET, HEAD, OPTIONS, PATCH"))
        self.assertEqual([ask(app, method=method).text for method in ("GET", "PATCH", "HEAD")],
                         ["get", "patch", ""])

    def test_prepare_may_answer_and_on_error_makes_the_page(self):
        class Page(Handler):
            finished = []

            def prepare(self):
                self.set_header("X-A", "1")
                if self.request.query.stop:
                    return "stopped"

            def get(self):
                self.write("lost")
                code = self.request.query.code
                return abort(int(code)) if code else 1 // 0

            def on_error(self, error):
                if error.status_code == 410:
                    raise error
                if error.status_code == 411:
                    raise HTTPResponse("own", 200)
                return {"error": error.status_line}

            def on_finish(self):
                self.finished.append(1)
        app = App()
        app.route("/", Page)
        for query, status, text in (("stop=1", 200, "stopped"), ("code=404", 404, "Not Found"),
                                    ("", 500, "Internal Server Error"), ("code=410", 410, "<html>"),
                                    ("code=411", 200, "own")):
            answer = ask(app, "/?" + query)
            with self.subTest(query=query):
                self.assertEqual((answer.status_code, answer.headers["X-A"]), (status, "1"))
                self.assertIn(text, answer.text)
        self.assertEqual(len(Page.finished), 5)

    def test_on_error_makes_the_page_however_the_error_came_about(self):
        class Page(Handler):
            def get(self):
                return HTTPError(404)

            def put(self):
                raise HTTPError(404)

            def post(self):
                abort(404)
                yield

            def on_error(self, error):
                self.write({"own": error.status_code})
        app = App()
        app.route("/", Page)
        for method in ("PUT", "GET", "POST"):
            answer = ask(app, method=method)
            with self.subTest(method=method):
                self.assertEqual((answer.status_code, answer.text), (404, '{"own": 404}'))

    def test_a_wildcard_called_request_goes_to_the_verb(self):
        class Page(Handler):
            def get(self, request):
                return request + self.request.path
        app = App()
        app.route("/<request>", Page)
        self.assertEqual(ask(app, "/a").text, "a/a")

    def test_a_class_without_a_verb_is_refused(self):
        with self.assertRaises(minibottle.RouteError):
            App().route("/", type("Empty", (Handler,), {}))


class Callable:
    def method(self, request, name):
        return request.path + name

    @classmethod
    def of_class(cls, request, name):
        return request.path + name

    @staticmethod
    def static(request, name):
        return request.path + name

    def __call__(self, request, name):
        return request.path + name


class InjectionTest(UnitTest):
    """A first parameter called request, after what is bound already, gets the request."""

    def test_whoever_asks_for_the_request_gets_it(self):
        def plain(request, name):
            return request.path + name

        def keyword(*, request, name):
            return request.path + name

        def third(database, cache, request, name):
            return request.path + name

        @functools.wraps(plain)
        def wrapper(*args, **kwargs):
            return plain(*args, **kwargs)
        for callback in (plain, keyword, wrapper, Callable().method, Callable.of_class,
                         Callable.static, Callable(), lambda request, name="x": request.path + name,
                         lambda request, **args: request.path + args["name"],
                         functools.partial(third, 1, 2), functools.lru_cache()(plain),
                         functools.partial(functools.partial(third, 1), 2),
                         functools.partial(wrapper)):
            with self.subTest(callback=callback):
                self.assertEqual(ask(app_of(callback, "/<name>"), "/a").text, "/aa")

    def test_nobody_else_does(self):
        for rule, callback in (
                ("/<name>", lambda name: name), ("/<name>", lambda name, request="no": name),
                ("/<name>", lambda **args: args["name"] + "".join(args)[4:]),
                ("/<request>", lambda request: request),
                ("/<request>", lambda **args: args["request"])):
            with self.subTest(rule=rule):
                self.assertEqual(ask(app_of(callback, rule), "/a").text, "a")


class MethodTest(UnitTest):
    """RFC 9110 9.3.7, 10.2.1 and 15.5.6."""

    def test_allow_lists_exactly_the_methods_there_are(self):
        app = App()
        app.route("/a", ["POST", "put"], lambda: "x")
        app.get("/g", callback=lambda: "x")
        app.route("/<x>/deep", "DELETE", lambda x: x)
        app.route("/o", ["OPTIONS", "POST"], lambda: "own")
        for path, allowed in (("/a", "OPTIONS, POST, PUT"), ("/g", "GET, HEAD, OPTIONS"),
                              ("/y/deep", "DELETE, OPTIONS")):
            for method, status in (("PATCH", 405), ("OPTIONS", 204)):
                answer = ask(app, path, method)
                self.assertEqual((answer.status_code, answer.headers["Allow"]), (status, allowed))
        self.assertEqual(ask(app, "/o", "OPTIONS").text, "own")
        self.assertEqual(ask(app, "/none", "OPTIONS").status_code, 404)
        self.assertEqual(ask(app, "/a", "HEAD").status_code, 405)

    def test_every_verb_has_its_decorator(self):
        app = App()
        for name in ("get", "post", "put", "patch", "delete"):
            getattr(app, name)(["/x", "/y"])(lambda name=name: name)
        for name in ("post", "put", "patch", "delete", "get"):
            self.assertEqual(ask(app, "/y", name.upper()).text, name)

    def test_the_shortcuts_act_on_the_default_application_of_the_moment(self):
        app = minibottle.default_app.push()
        try:
            for name in ("route", "get", "post", "put", "patch", "delete"):
                getattr(minibottle, name)("/" + name)(lambda: name)
            minibottle.error(404)(lambda error: "own page")
            minibottle.hook("after_request")(lambda: response.set_header("X-A", "1"))
            self.assertEqual((len(app.routes), ask(app, "/x").text, ask(app, "/get").headers["X-A"],
                              minibottle.url("/get", a=1)), (6, "own page", "1", "/get?a=1"))
        finally:
            minibottle.default_app.pop()


def make_site():
    """An App that uses what a server can get wrong; gunicorn and waitress import it by name."""
    app = App()

    @app.get("/")
    def index():
        return "Hello World!"

    @app.get("/hello/<name>")
    def hello(name):
        return {"hello": name, "greeting": request.query.get("greeting"), "path": request.path}

    @app.post("/echo")
    def echo():
        response.set_header("Content-Type", "application/octet-stream")
        return request.body.read()

    @app.post("/form")
    def form():
        return {"name": request.forms.get("name"), "x": request.forms.get("x")}

    @app.post("/json")
    def double():
        return {"n": request.json["n"] * 2}

    @app.get("/count")
    def count():
        response.set_header("Content-Type", "text/plain; charset=utf-8")
        for i in range(1000):
            yield "{} bottles\n".format(i)

    @app.get("/file")
    def source():
        response.set_header("Content-Type", "text/x-python")
        return open(__file__, "rb")

    @app.get("/twice")
    def twice():
        response.add_header("X-Bottle", "full")
        response.add_header("X-Bottle", "empty")

    @app.delete("/hello/<name>")
    def forget(name):
        response.status = 204

    @app.get("/secret")
    def secret():
        abort(403, "Not for you.")

    @app.get("/old")
    def old():
        redirect("/")

    @app.get("/async/loop")
    async def loop():
        await asyncio.sleep(0.01)
        return {"loop": id(asyncio.get_running_loop()), "path": request.path}

    @app.get("/async/count")
    async def count_slowly():
        for i in range(1000):
            await asyncio.sleep(0)
            yield "{} bottles\n".format(i)

    @app.get("/async/file")
    async def source_slowly():
        await asyncio.sleep(0)
        return open(__file__, "rb")

    @app.get("/async/secret")
    async def secret_slowly():
        await asyncio.sleep(0)
        abort(403, "Not for you.")

    return app


class SiteChecks(OverSocket):
    """What every server must make of make_site(): the same answers, whoever serves it."""

    def test_a_page_is_answered_and_head_has_its_fields_without_a_body(self):
        status, headers, body = fetch(self.url)
        self.assertEqual((status, body), (200, b"Hello World!"))
        self.assertEqual(headers["Content-Length"], "12")
        self.assertEqual(headers.get_content_type(), "text/html")
        status, headers, body = fetch(self.url, method="HEAD")
        self.assertEqual((status, body), (200, b""))
        self.assertIn(headers["Content-Length"], ("12", None))

    def test_path_and_query_arrive_decoded(self):
        status, headers, body = fetch(
            self.url, "/hello/J%C3%BCrgen%20B?greeting=gr%C3%BC%C3%9F+dich")
        self.assertEqual(status, 200)
        self.assertEqual(headers.get_content_type(), "application/json")
        self.assertEqual(json.loads(body.decode()), {
            "hello": "J\u00fcrgen B", "greeting": "gr\u00fc\u00df dich",
            "path": "/hello/J\u00fcrgen B"})

    def test_a_body_of_any_size_comes_back_unchanged(self):
        for size in (0, 1, 4096, 3000000):
            with self.subTest(size=size):
                data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
                status, headers, body = fetch(self.url, "/echo", "POST", data)
                self.assertEqual((status, len(body)), (200, size))
                self.assertTrue(body == data, "the echo differs")

    def test_a_form_is_decoded(self):
        status, headers, body = fetch(self.url, "/form", "POST", b"name=J%C3%BCrgen+B&x=y", {
            "Content-Type": "application/x-www-form-urlencoded"})
        self.assertEqual((status, json.loads(body.decode())), (
            200, {"name": "J\u00fcrgen B", "x": "y"}))

    def test_json_is_decoded(self):
        status, headers, body = fetch(self.url, "/json", "POST", b'{"n": 21}', {
            "Content-Type": "application/json"})
        self.assertEqual((status, json.loads(body.decode())), (200, {"n": 42}))

    def test_malformed_json_is_a_400(self):
        status, headers, body = fetch(self.url, "/json", "POST", b'{"n": 2', {
            "Content-Type": "application/json"})
        self.assertEqual(status, 400)

    def test_a_generator_is_streamed_whole_and_in_order(self):
        status, headers, body = fetch(self.url, "/count")
        expected = "".join("{} bottles\n".format(i) for i in range(1000))
        self.assertEqual((status, body.decode()), (200, expected))

    def test_a_file_object_is_sent_whole(self):
        status, headers, body = fetch(self.url, "/file")
        with open(__file__, "rb") as file:
            self.assertTrue(body == file.read(), "the file differs")
        self.assertEqual((status, headers.get_content_type()), (200, "text/x-python"))

    def test_fields_of_one_name_are_all_sent(self):
        status, headers, body = fetch(self.url, "/twice")
        self.assertEqual((status, body), (200, b""))
        self.assertEqual(headers.get_all("X-Bottle"), ["full", "empty"])

    def test_a_204_has_no_body_and_no_fields_that_describe_one(self):
        status, headers, body = fetch(self.url, "/hello/Ada", "DELETE")
        self.assertEqual((status, body, headers["Content-Type"]), (204, b"", None))
        self.assertIn(headers["Content-Length"], (None, "0"))       # ours has none: RFC 9110 8.6

    def test_errors_have_their_status_and_say_why(self):
        status, headers, body = fetch(self.url, "/secret")
        self.assertEqual(status, 403)
        self.assertIn(b"Not for you.", body)
        self.assertEqual(fetch(self.url, "/nowhere")[0], 404)
        status, headers, body = fetch(self.url, "/echo")
        self.assertEqual(status, 405)
        self.assertIn("POST", re.split(r"\s*,\s*", headers["Allow"]))

    def test_a_redirect_leads_to_its_target(self):
        status, headers, body = fetch(self.url, "/old")
        self.assertIn(status, (302, 303))
        self.assertEqual(urljoin(self.url + "/old", headers["Location"]), self.url + "/")

    def test_async_functions_share_one_loop(self):
        found = {json.loads(fetch(self.url, "/async/loop")[2])["loop"] for _ in range(20)}
        self.assertEqual(len(found), 1)

    def test_an_async_function_answers_as_a_function_does(self):
        for path in ("count", "file", "secret"):
            with self.subTest(path=path):
                plain, slow = fetch(self.url, "/" + path), fetch(self.url, "/async/" + path)
                self.assertEqual((slow[0], slow[2]), (plain[0], plain[2]))


class SiteOnBuiltinServerTest(SiteChecks, unittest.TestCase):

    @staticmethod
    def serve():
        return serve_builtin(make_site())


class SiteInValidatorOnBuiltinServerTest(SiteChecks, unittest.TestCase):
    """PEP 3333: to the server a wrapped App is a foreign callable, without a plan."""

    @staticmethod
    def serve():
        return serve_builtin(validator(make_site()))


class SiteOnWsgirefTest(SiteChecks, unittest.TestCase):

    @staticmethod
    def serve():
        return serve_wsgiref(make_site())


@needs("gunicorn")
class SiteOnGunicornTest(SiteChecks, unittest.TestCase):

    @staticmethod
    def serve():
        module = os.path.splitext(os.path.basename(__file__))[0]
        return serve_gunicorn(module + ":make_site()")


@needs("waitress")
class SiteOnWaitressTest(SiteChecks, unittest.TestCase):

    @staticmethod
    def serve():
        module = os.path.splitext(os.path.basename(__file__))[0]
        return serve_waitress(module + ":make_site")


class ConfigTest(UnitTest):

    def test_names_are_dotted_text(self):
        config = minibottle.ConfigDict().load_dict({"a": {"b": {"c": 1}, "B.d": 2}, "e": 3})
        config.update("x.y", z=4)
        config.update({"f": 5}, g=6)
        self.assertEqual(config, {"a.b.c": 1, "a.B.d": 2, "e": 3, "x.y.z": 4, "f": 5, "g": 6})
        self.assertEqual((config.setdefault("e", 9), config.setdefault("h", 9)), (3, 9))
        for load in (config.update, config.load_dict):
            with self.assertRaisesRegex(TypeError, "5"):
                load({5: 1})

    def test_a_filter_converts_what_is_set(self):
        config = minibottle.ConfigDict()
        config.meta_set("port", "filter", int)
        config.update(port="80")
        self.assertEqual((config["port"], config._make_overlay().meta_get("port", "filter")),
                         (80, int))
        with self.assertRaises(ValueError):
            config["port"] = "http"

    def test_an_overlay_follows_its_source_where_it_has_nothing_itself(self):
        source = minibottle.ConfigDict()
        overlay = source._make_overlay()._make_overlay()
        source["a"] = 1
        self.assertEqual((overlay["a"], overlay.get("a"), "a" in overlay), (1, 1, True))
        overlay["a"] = 2
        self.assertEqual((source["a"], overlay["a"]), (1, 2))
        del overlay["a"]
        self.assertEqual(overlay["a"], 1)
        with self.assertRaises(KeyError):
            del overlay["a"]
        del source["a"]
        self.assertEqual(("a" in overlay, overlay.get("a", 5)), (False, 5))
        with self.assertRaises(KeyError):
            overlay["a"]

    def test_an_overlay_lists_what_it_shows(self):
        source = minibottle.ConfigDict()
        source.update("db", host="a", port=1)
        overlay = source._make_overlay()
        overlay.update("db", port=2, name="b")
        shown = {"db.host": "a", "db.port": 2, "db.name": "b"}
        self.assertEqual((dict(overlay), {**overlay}, json.loads(json.dumps(overlay))),
                         (shown, shown, shown))
        self.assertEqual((sorted(overlay), len(overlay)), (sorted(shown), 3))
        app = App()
        app.config["db.host"] = "a"
        app.get("/", callback=print, db={"port": 1})
        self.assertEqual({key for key in app.routes[0].config if key.startswith("db.")},
                         {"db.host", "db.port"})

    def test_ini_files_and_modules(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "a.ini")
            with open(path, "w", encoding="utf-8") as file:
                file.write("[DEFAULT]\nd: 1\n[bottle]\nPort = 8080\n[A.b]\nk: ö${d}\nalone\n")
            config = minibottle.ConfigDict().load_config([path, path + ".none"])
        self.assertEqual(config, {"d": "1", "port": "8080", "a.b.k": "ö1", "a.b.d": "1",
                                  "a.b.alone": None})
        module = types.SimpleNamespace(DB={"HOST": "a"}, small=1)
        with mock.patch.dict(sys.modules, settings_of_test=module):
            self.assertEqual(minibottle.ConfigDict().load_module("settings_of_test"),
                             {"DB.HOST": "a"})
            self.assertEqual(minibottle.ConfigDict().load_module("settings_of_test", False),
                             {"DB": {"HOST": "a"}})

    def test_a_route_has_the_settings_of_its_application_and_its_own(self):
        app = App(name="x")
        app.route("/", callback=lambda: "", db={"host": "a"}, name2=1)
        app.config["later"] = 2
        config = app.routes[0].config
        self.assertEqual([config[key] for key in ("name", "db.host", "name2", "later")],
                         ["x", "a", 1, 2])
        self.assertEqual((config.get("db"), "name2" in app.config), (None, False))

    def test_a_hook_sees_a_change_and_may_refuse_it(self):
        app, seen = App(), []

        @app.hook("config")
        def hook(config, key, value):
            seen.append((config is app.config, key, value))
            if value == "bad":
                raise ValueError(value)
        app.config["a"] = 1
        with self.assertRaises(ValueError):
            app.config["a"] = "bad"
        self.assertEqual((seen, app.config["a"]), ([(True, "a", 1), (True, "a", "bad")], 1))

    def test_json_is_written_as_the_settings_say(self):
        app = App(json_dumps=lambda value: "own:%r" % value)
        app.route("/", callback=lambda: {"a": "ö"})
        app.route("/indent", callback=lambda: [["ö"]], json={"dump_func": None, "indent": 1,
                                                           "ascii": False, "enable": True})
        app.route("/off", callback=lambda: {}, json={"enable": False})
        self.assertEqual(ask(app).text, "own:{'a': 'ö'}")
        answer = ask(app, "/indent")
        self.assertEqual(answer.headers["Content-Type"], JSON)
        self.assertEqual(answer.text, '[\n [\n  "ö"\n ]\n]')
        with self.assertLogged():
            self.assertEqual(ask(app, "/off").status_code, 500)
        app = App(autojson=False)
        app.install(minibottle.JSONPlugin(lambda value: "plugin"))
        app.route("/", callback=lambda: HTTPResponse({"a": 1}, 402))
        self.assertEqual((ask(app).text, ask(app).status_code), ("plugin", 402))


class ResourceTest(UnitTest):

    def test_files_are_found_in_the_order_of_their_directories(self):
        with tempfile.TemporaryDirectory() as folder:
            resources = App().resources
            base = os.path.join(folder, "module.py")
            self.assertFalse(resources.add_path("./b/", base))
            self.assertTrue(resources.add_path("./a/", base, index=0, create=True))
            self.assertTrue(resources.add_path("./b/", base, create=True))
            self.assertEqual([os.path.basename(path[:-1]) for path in resources.path], ["a", "b"])
            for name in ("b/x.txt", "a/x.txt", "b/y.txt"):
                with open(os.path.join(folder, name), "w") as file:
                    file.write(name)
            for name, text in (("x.txt", "a/x.txt"), ("y.txt", "b/y.txt")):
                with resources.open(name) as file:
                    self.assertEqual(file.read(), text)
            self.assertIsNone(resources.lookup("z.txt"))
            with self.assertRaisesRegex(FileNotFoundError, "z.txt"):
                resources.open("z.txt")


class Mark:
    """A plugin that leaves a letter behind what a callback returns."""

    def __init__(self, letter, name=None):
        self.letter = letter
        self.seen = []
        if name:
            self.name = name

    def setup(self, app):
        self.seen.append(app)

    def close(self):
        self.seen.append("closed")

    def apply(self, callback, route):
        return lambda **args: callback(**args) + self.letter


class PluginTest(UnitTest):

    def test_the_first_is_outermost_and_those_of_a_route_are_inside(self):
        app = App()
        a, b, c, d = (Mark(letter) for letter in "abcd")
        self.assertEqual([app.install(a), app.install(b), a.seen], [a, b, [app]])
        app.route("/", apply=[c, d], callback=lambda: "")
        app.route("/deco", apply=lambda callback: lambda: callback() + "!", callback=lambda: "")
        app.route("/<x>", callback=lambda request, x: request.method + x)
        self.assertEqual([ask(app, path).text for path in ("/", "/deco", "/5")],
                         ["dcba", "!ba", "GET5ba"])
        app.install(Mark("e"))
        self.assertEqual(ask(app).text, "dceba")

    def test_of_one_name_the_last_counts_and_any_can_be_skipped(self):
        app = App()
        one, two = app.install(Mark("1", "n")), app.install(Mark("2", "n"))
        other = app.install(Mark("o"))
        for skip, expected in ((None, "o2"), ("n", "o"), ([two], "o1"), (Mark, ""), (True, ""),
                               ([other, "n"], "")):
            app.route("/", skip=skip, callback=lambda: "")
            with self.subTest(skip=skip):
                self.assertEqual(ask(app).text, expected)
        self.assertEqual(app.uninstall("n"), [two, one])
        self.assertEqual((one.seen, two.seen), ([app, "closed"],) * 2)

    def test_plugins_go_by_instance_class_name_or_all_at_once(self):
        for which, left in ((lambda a, b: a, "b"), (lambda a, b: Mark, ""), (lambda a, b: "n", "a"),
                            (lambda a, b: True, "")):
            app = app_of(lambda: "")
            resets = []
            a, b = app.install(Mark("a")), app.install(Mark("b", "n"))
            app.hook("app_reset")(lambda: resets.append(1))
            app.uninstall(which(a, b))
            self.assertEqual((ask(app).text, resets, app.uninstall("nothing")), (left, [1], []))
            app.close()
            self.assertEqual([a.seen[1:], b.seen[1:]], [["closed"]] * 2)
        with self.assertRaises(TypeError):
            app.install("no plugin")

    def test_a_plugin_sees_the_function_and_may_give_it_what_it_names(self):
        class Database:
            name, api = "db", 2

            def apply(self, callback, route):
                if "db" not in route.get_callback_args():
                    return callback
                return lambda **args: callback(db=route.config.get("db.file"), **args)
        app = App()
        app.install(Database())
        app.route("/<x>", callback=lambda x, *, db: x + db, db={"file": "f"})
        app.route("/", callback=lambda: "none")
        self.assertEqual([ask(app, path).text for path in ("/a", "/")], ["af", "none"])

    def test_the_decorated_function_is_found(self):
        def plain(a, b):
            pass

        def decorate(function):
            return functools.wraps(function)(lambda *args, **kwargs: function(*args, **kwargs))

        class Object:
            method = decorate(plain)
        for callback in (plain, decorate(plain), decorate(decorate(plain)), Object().method):
            route = minibottle.Route(App(), "/", "GET", callback)
            self.assertIs(route.get_undecorated_callback(), plain)
            self.assertEqual(route.get_callback_args(), ["a", "b"])

    def test_plugins_wrap_handler_classes_and_bound_methods(self):
        class Note(Handler):
            def get(self, id):
                return id

            def post(self, id):
                return "post"
        app = App()
        app.route("/<id>", Note, apply=Mark("!"))

        class Whole:
            def apply(self, callback, route):
                return self.answer

            def answer(self):
                return "instead"
        app.route("/", apply=Whole(), callback=lambda: "never")
        self.assertEqual((ask(app, "/5").text, ask(app, "/5", "POST").text, ask(app).text),
                         ("5!", "post!", "instead"))

    def test_a_template_is_named_at_the_route(self):
        def view(name, **defaults):
            return lambda callback: lambda: "%s %s" % (name, {**defaults, **callback()})
        app = App()
        with mock.patch.object(minibottle, "view", view, create=True):
            for path, template in (("/a", "t"), ("/b", ("t", {"y": 2})), ("/c", None)):
                app.route(path, template=template, callback=lambda: {"x": 1})
            self.assertEqual([ask(app, path).text for path in ("/a", "/b", "/c")],
                             ["t {'x': 1}", "t {'y': 2, 'x': 1}", '{"x": 1}'])

    def test_agents_wrap_the_methods_that_a_request_passes(self):
        seen = []

        def wrapper(cls, name):
            plain = getattr(cls, name)

            def call(self, *args):
                seen.append(name)
                return plain(self, *args)
            return mock.patch.object(cls, name, call)
        with contextlib.ExitStack() as stack:
            for cls, name in ((App, "__call__"), (App, "wsgi"), (App, "_handle"), (App, "_cast"),
                              (minibottle.Route, "_make_callback")):
                stack.enter_context(wrapper(cls, name))
            ask(app_of(lambda: ["x"]))
        self.assertEqual(seen, ["__call__", "wsgi", "_handle", "_make_callback", "_cast"])


class SignatureTest(UnitTest):
    """Routes without a rule, and callbacks by name."""

    def test_rules_come_from_the_signature(self):
        def a__b(x, y=5):
            return "%s %s" % (x, y)

        def own(request, z="-"):
            return request.path + z
        self.assertEqual(list(minibottle.yieldroutes(a__b)), ["/a/b/<x>", "/a/b/<x>/<y>"])
        for register in (App.route, lambda app, function: app.route()(function),
                         lambda app, function: app.route(callback=function)):
            app = App()
            self.assertIs(register(app, a__b), a__b)
            register(app, own)
            self.assertEqual([ask(app, path).text for path in ("/a/b/1", "/a/b/1/2", "/own/z")],
                             ["1 5", "1 2", "/own/zz"])
        for bad in (Handler, functools.partial(own)):
            with self.assertRaises(minibottle.RouteError):
                App().route(bad)

    def test_a_callback_may_be_named(self):
        app = App()
        app.route("/", callback="os:getcwd")
        self.assertEqual(ask(app).text, os.getcwd())
        self.assertEqual(minibottle.load("re:compile(x)", x="[a-z]").pattern, "[a-z]")
        self.assertIs(minibottle.load("os.path"), os.path)
        with self.assertRaises(ModuleNotFoundError):
            app.route("/x", callback="no_such_module:x")

    def test_merged_routes_stay_those_of_their_application(self):
        app, other = App(), App()
        other.install(Mark("!"))
        other.route("/<x>", callback=lambda request, x: str(request.app is app))
        app.merge(other)
        app.add_route(minibottle.Route(app, "/", "GET", lambda: "own"))
        self.assertEqual([ask(app, path).text for path in ("/1", "/")], ["True!", "own"])
        self.assertIs(app.routes[0].app, other)
        self.assertEqual(app.match(environ_of("/1")), (other.routes[0], {"x": "1"}))


class AttributeTest(UnitTest):

    def test_an_attribute_is_set_once_but_middlewares_stack(self):
        app = app_of(lambda: "x")
        app.db = 1
        for name in ("db", "config", "plugins", "router"):
            with self.assertRaisesRegex(AttributeError, name):
                setattr(app, name, 2)
        del app.db
        app.db = 2
        for letter in "ab":
            app.wsgi = functools.partial(
                lambda plain, letter, environ, start: [*plain(environ, start), letter.encode()],
                app.wsgi, letter)
        self.assertEqual(TestClient(app).get("/").text, "xab")
        app.catchall = False
        self.assertFalse(app.config["catchall"])

    def test_with_makes_an_application_the_default(self):
        before, app = minibottle.default_app(), App()
        with app:
            minibottle.get("/in")(lambda: "in")
            self.assertIs(minibottle.apps.default, app)
            plugin = minibottle.install(Mark("!"))
            minibottle.mount("/sub/", App())
        self.assertIs(minibottle.default_app(), before)
        self.assertEqual((ask(app, "/in").text, app.uninstall(plugin)), ("in!", [plugin]))
        self.assertEqual(minibottle.mount.__doc__, App.mount.__doc__)

    def test_an_import_string_gives_an_application(self):
        with tempfile.TemporaryDirectory() as folder, \
                mock.patch.object(sys, "path", [folder] + sys.path):
            with open(os.path.join(folder, "old_bottle_app.py"), "w") as file:
                file.write("from minibottle import *\nown = App()\n@get('/')\ndef index():\n"
                           "    return 'x'\nrun(port=1)\n")
            before = len(minibottle.default_app)
            app = minibottle.load_app("old_bottle_app")
            own = minibottle.load_app("old_bottle_app:own")
            self.assertIs(own, sys.modules.pop("old_bottle_app").own)
        self.assertEqual((ask(app).text, len(minibottle.default_app)), ("x", before))
        self.assertFalse(minibottle.NORUN)


class ErrorClassTest(UnitTest):

    def test_an_exception_has_the_handler_of_its_class_else_the_one_for_500(self):
        app = App()
        def fail(error):
            raise error
        for name, error in (("key", KeyError), ("os", OSError), ("zero", ZeroDivisionError)):
            app.route("/" + name, callback=functools.partial(fail, error))
        app.error(LookupError)(lambda error: {"lookup": type(error.exception).__name__})
        app.error(500)(lambda error: "500")
        app.error(OSError, "http:HTTPStatus.OK.phrase.index")  # fails
        app.post("/json", callback=lambda: request.json)
        with self.assertLogs("minibottle", "ERROR"):
            self.assertEqual([ask(app, path).text for path in ("/key", "/zero")],
                             ['{"lookup": "KeyError"}', "500"])
            self.assertIn("error handler failed", ask(app, "/os").text)
        app.error(ValueError)(lambda error: self.fail("a fault of the client's"))
        self.assertEqual(ask(app, "/json", "POST", body="{", headers={
            "Content-Type": JSON}).status_code, 400)

    def test_the_page_shows_the_traceback_only_in_debug(self):
        app = app_of(lambda: {}["<secret>"])
        with self.assertLogs("minibottle", "ERROR"):
            self.assertNotIn("secret", ask(app).text)
            with mock.patch.object(minibottle, "DEBUG", True):
                self.assertIn("KeyError: &#039;&lt;secret&gt;&#039;", ask(app).text)

    def test_an_error_handler_can_say_where_the_exception_comes_from(self):
        def stream():
            yield {}["late"]

        app = app_of(lambda: {}["early"])
        app.get("/late", callback=stream)
        app.error(500)(lambda error: error.traceback)
        app.error(404)(lambda error: repr(error.traceback))
        with self.assertLogs("minibottle", "ERROR"):
            for path, cause in (("/", "KeyError: 'early'"), ("/late", "KeyError: 'late'")):
                self.assertRegex(ask(app, path).text, r"(?s)\ATraceback .*%s\n\Z" % cause)
        self.assertEqual(ask(app, "/none").text, "None")


class MountTest(UnitTest):

    def where(self):
        return "%s|%s|%s" % (request.script_name, request.path, request.query.q)

    def test_an_application_answers_below_its_prefix(self):
        app, child = App(), App()
        child.route("/", callback=self.where)
        child.route("/a/<x>", callback=lambda x: self.where() + x)
        app.route("/<p:path>", callback=lambda p: "parent")
        app.mount("/x", child)
        app.mount("/y/z/", child)
        child.route("/late", callback=self.where)
        for path, expected in (
                ("/x", "/x/|/|"), ("/x/", "/x/|/|"), ("/x/a/ö?q=1", "/x/|/a/ö|1ö"),
                ("/x/late", "/x/|/late|"), ("/y/z/", "/y/z/|/|"), ("/y/z", "parent"),
                ("/xy", "parent"), ("/x/none", 404), ("/x//", 404)):
            with self.subTest(path=path):
                answer = ask(app, path)
                self.assertEqual(answer.text if answer.status_code == 200 else 404, expected)
        self.assertEqual(child.config["_mount.prefix"], "/y/z/")
        self.assertIs(child.config["_mount.app"], app)
        self.assertEqual(app.routes[1].config["mountpoint.target"], child)
        for prefix in ("x", "/", ""):
            with self.assertRaisesRegex(ValueError, r"'/blog/'.*merge\(\)"):
                app.mount(prefix, child)

    def test_what_is_mounted_or_merged_or_in_a_middleware_starts_and_stops_too(self):
        app, child, below, merged, said = App(), App(), App(), App(), []
        for each, name in ((app, "app"), (child, "child"), (below, "below"), (merged, "merged")):
            each.on_start(functools.partial(said.append, name + " starts"))
            each.on_stop(functools.partial(said.append, name + " stops"))
        for method in ("GET", "POST"):
            merged.route("/merged", method, lambda: "")
        app.merge(merged)
        app.mount("/a", child)
        app.mount("/b/", child)
        child.mount("/c", types.SimpleNamespace(app=below))
        for target in (app, types.SimpleNamespace(wsgi_app=types.SimpleNamespace(application=app))):
            with TestClient(target):
                self.assertEqual(said, [name + " starts" for name in (
                    "app", "merged", "child", "below")])
                said.clear()
            self.assertEqual(said, [name + " stops" for name in (
                "below", "child", "merged", "app")])
            said.clear()

    def test_the_longest_prefix_wins_whichever_came_first(self):
        app = App()
        for prefix in ("/a/", "/a/b/c/", "/a/b/"):
            app.mount(prefix, app_of(lambda prefix=prefix, **args: prefix, "/<p:re:.*>"))
        for path, expected in (("/a/x", "/a/"), ("/a/b/x", "/a/b/"), ("/a/b/c/x", "/a/b/c/"),
                               ("/a/bc/", "/a/")):
            self.assertEqual(ask(app, path).text, expected, path)

    def test_both_have_their_hooks_and_the_parents_run_around(self):
        app, child, seen = App(), App(), []
        for each, name in ((app, "parent"), (child, "child")):
            each.hook("before_request")(lambda name=name: [
                seen.append("before " + name), response.set_header("X-" + name, "1"),
                response.set_cookie(name, "1")])
            each.hook("after_request")(lambda name=name: seen.append(
                "after %s %s" % (name, request.path)))
        child.route("/", callback=lambda: seen.append(request.app is child) or "x")
        app.mount("/c/", child)
        for path, call in (("/c/", [True]), ("/c/none", [])):
            seen.clear()
            answer = ask(app, path)
            self.assertEqual(seen, ["before parent", "before child"] + call + [
                "after child " + path[2:], "after parent " + path])
            self.assertEqual((answer.headers["X-Parent"], answer.headers["X-Child"],
                              sorted(answer.headers.getall("Set-Cookie"))),
                             ("1", "1", ["child=1", "parent=1"]))

    def test_an_error_is_for_the_child_first_then_for_the_parent(self):
        app, middle, child = App(), App(), App()
        middle.mount("/c/", child)
        app.mount("/m/", middle)
        for each, name, codes in ((app, "app", (401, 402, 403)), (middle, "middle", (402, 403)),
                                  (child, "child", (403,))):
            for code in codes:
                each.error(code)(lambda error, name=name: name)
        child.route("/<code:int>", callback=abort)
        self.assertEqual([ask(app, "/m/c/%d" % code).text for code in (401, 402, 403)],
                         ["app", "middle", "child"])
        self.assertIn("<h1>404 Not Found", ask(app, "/m/c/none").text)
        app.default_error_handler = lambda error: {"error": error.status_code}
        self.assertEqual(ask(app, "/m/c/none").json, {"error": 404})

    def test_plugins_of_the_child_count_and_those_of_the_parent_on_demand(self):
        app, child = App(), app_of(lambda: "x")
        child.install(Mark("c"))
        app.install(lambda callback: lambda **args: [callback(**args)])
        app.mount("/c/", child)
        self.assertEqual(ask(app, "/c/").text, "xc")

    def test_any_wsgi_application_can_be_mounted(self):
        closable = Closable([b"", b"a", b"b"])

        def lazy(environ, start):
            start("299 Odd", [("X-A", "Ã¶"), ("X-A", "2"), ("Content-Type", "a/b")])
            yield environ["PATH_INFO"].encode()
            yield environ["SCRIPT_NAME"].encode()

        def writing(environ, start):
            write = start("200 OK", [])
            write(b"1")
            write(b"2")
            return closable

        def failing(environ, start):
            try:
                start("200 OK", [])
                1 // 0
            except ZeroDivisionError:
                start("500 x", [], sys.exc_info())
            return []

        def empty(environ, start):
            start("204 No Content", [])
            return []
        app = App()
        app.error(500)(lambda error: "parent: " + type(error.exception).__name__)
        for name, child in (("lazy", lazy), ("writing", writing), ("failing", failing),
                            ("empty", empty)):
            app.mount("/" + name, child)
        answer = ask(app, "/lazy/x")
        self.assertEqual((answer.status, answer.headers.getall("X-A"), answer.text),
                         ("299 Odd", ["ö", "2"], "/x/lazy"))
        self.assertEqual((ask(app, "/writing").text, closable.closed), ("12ab", 1))
        with self.assertLogged():
            self.assertEqual(ask(app, "/failing").text, "parent: ZeroDivisionError")
        self.assertEqual((ask(app, "/empty").status_code, ask(app, "/empty").body), (204, b""))
        self.assertEqual(ask(app, "/lazy", "HEAD").body, b"")

    def test_what_it_cannot_send_is_a_500_and_closed(self):
        for status, headers in (("200", []), ("200 OK", [("X-A", "a\n")])):
            closable, app = Closable(["a"]), App()
            app.mount("/c", lambda environ, start: start(status, headers) and 0 or closable)
            with self.assertLogged():
                self.assertEqual(ask(app, "/c").status_code, 500)
            self.assertEqual(closable.closed, 1)

    def test_what_is_streamed_below_a_prefix_sees_its_own_request(self):
        def stream():
            yield self.where()
            yield request.user
            yield self.where()

        app, child = App(), app_of(stream)
        child.hook("before_request")(lambda: setattr(request, "user", "u"))
        app.hook("after_request")(lambda: self.assertEqual(request.user, "u"))
        app.mount("/c", child)
        self.assertEqual(ask(app, "/c?q=5").text, "/c/|/|5u/c/|/|5")
        self.assertNotIn("Content-Length", ask(app, "/c", "HEAD").headers)

    def test_a_body_is_read_once_for_both_and_closed_at_the_end(self):
        app, child = App(), App()
        child.post("/", callback=lambda: request.forms.a + request.body.read().decode())
        app.hook("after_request")(lambda: response.set_header("X-A", request.body.read().decode()))
        app.mount("/c/", child)
        answer = ask(app, "/c/", "POST", form={"a": 1})
        self.assertEqual((answer.text, answer.headers["X-A"]), ("1a=1", "a=1"))

    def test_urls_lead_up_and_down(self):
        app, middle, child = App(), App(), App()

        def urls(x):
            return " ".join([app.get_url("top", x="ö"), app.get_url("middle", x=1, q=2),
                             app.get_url("child", x=3), request.app.get_url("all", x=4)])
        for each, name in ((app, "top"), (middle, "middle"), (child, "child")):
            each.route("/%s/<x>" % name, name=name, callback=urls)
            each.route("/all/<x>", name="all", callback=urls)
        app.mount("/m m/", middle)
        middle.mount("/c", child)
        shared = "/top/%C3%B6 /m%20m/middle/1?q=2 /m%20m/c/child/3 "
        for path, own in (("/top/1", "/all/4"), ("/m%20m/middle/1", "/m%20m/all/4"),
                          ("/m%20m/c/child/1", "/m%20m/c/all/4")):
            self.assertEqual(ask(app, path).text, shared + own)
        with self.assertRaises(RouteBuildError):
            app.get_url("nobody")

    def test_the_server_plans_by_the_route_of_the_child(self):
        app, child = App(), App()
        child.post("/stream", stream=True, max_body=5, callback=lambda: "")
        app.mount("/c", child)
        app.mount("/wsgi", lambda environ, start: [])
        plan = app.minibottle_plan(environ_of("/c/stream", "POST"))
        self.assertEqual((plan.stream, plan.max_body), (True, 5))
        self.assertTrue(app.minibottle_plan(environ_of("/c/none")).early)
        self.assertFalse(app.minibottle_plan(environ_of("/wsgi/none")).early)
        app.add_hook("before_request", lambda: None)
        self.assertFalse(app.minibottle_plan(environ_of("/c/none")).early)


class AsyncTest(UnitTest):
    """`async def` wherever a function is taken. In process: who calls waits for asyncio."""

    def test_an_async_function_may_return_what_a_function_may(self):
        for value, body in (("ö", "ö".encode()), (b"a", b"a"), ({"a": 1}, b'{"a": 1}'),
                            ([1], b"[1]"), (None, b""), (["a", "b"], b"ab"),
                            (HTTPResponse("x", 201), b"x"), (io.BytesIO(b"file"), b"file")):
            async def callback():
                await asyncio.sleep(0)
                return value
            with self.subTest(value=value):
                self.assertEqual(answer_of(callback).body, body)
                self.assertEqual(answer_of(callback, method="HEAD").body, b"")

    def test_it_is_given_what_a_function_is_given(self):
        async def callback(request, name):
            await asyncio.sleep(0)
            response.set_header("X-Path", minibottle.request.path)
            return {"name": name, "same": request.environ is minibottle.request.environ}
        answer = ask(app_of(callback, "/<name>"), "/ada")
        self.assertEqual((answer.json, answer.headers["X-Path"]),
                         ({"name": "ada", "same": True}, "/ada"))

    def test_what_it_raises_is_handled_as_from_a_function(self):
        async def stop(what):
            await asyncio.sleep(0)
            raise what
        app = App()
        app.route("/abort", callback=lambda: stop(HTTPError(403, "Not you.")))
        app.route("/answer", callback=lambda: stop(HTTPResponse("x", 202)))
        app.route("/fail", callback=lambda: stop(ValueError("x")))
        self.assertEqual([ask(app, path).status_code for path in ("/abort", "/answer")], [403, 202])
        with self.assertLogged():
            self.assertEqual(ask(app, "/fail").status_code, 500)

    def test_hooks_and_error_handlers_may_be_async(self):
        app, seen = app_of(lambda: abort(418)), []

        @app.hook("before_request")
        async def before():
            await asyncio.sleep(0)
            seen.append("before")

        @app.hook("after_request")
        async def after():
            await asyncio.sleep(0)
            response.set_header("X-After", "1")

        @app.error(418)
        async def teapot(error):
            await asyncio.sleep(0)
            return "I am " + error.status_line[4:]
        answer = ask(app)
        self.assertEqual((answer.text, answer.headers["X-After"], seen),
                         ("I am I'm a teapot", "1", ["before"]))
        app.add_hook("before_request", lambda: HTTPResponse("stop"))
        self.assertEqual(ask(app).text, "stop")

    def test_the_methods_of_a_handler_may_be_async_each_for_itself(self):
        ended = []

        class Note(minibottle.Handler):
            async def prepare(self):
                await asyncio.sleep(0)
                self.user = "ada"

            async def get(self):
                self.write(self.user)
                await asyncio.sleep(0)
                self.write("!")

            def post(self):
                abort(400, "no")

            async def on_error(self, error):
                await asyncio.sleep(0)
                return {"error": error.status_code}

            async def on_finish(self):
                await asyncio.sleep(0)
                ended.append(self.user)
        app = App()
        app.route("/", Note)
        self.assertEqual((ask(app).text, ask(app, "/", "POST").json, ended),
                         ("ada!", {"error": 400}, ["ada", "ada"]))

    def test_an_async_generator_is_streamed_and_closed(self):
        closed = queue.Queue()

        async def callback():
            try:
                yield ""
                response.status = 201
                yield "a"
                await asyncio.sleep(0)
                yield b"b"
            finally:
                closed.put(request.path)
        answer = answer_of(callback)
        self.assertEqual((answer.status_code, answer.body), (201, b"ab"))
        self.assertEqual(closed.get(timeout=TIMEOUT), "/")
        self.assertEqual(answer_of(callback, method="HEAD").body, b"")
        self.assertEqual(closed.get(timeout=TIMEOUT), "/")
        result = app_of(callback)(environ_of(), lambda *args: None)
        self.assertEqual(next(iter(result)), b"a")
        result.close()
        self.assertEqual(closed.get(timeout=TIMEOUT), "/")

    def test_a_plain_generator_of_an_async_function_runs_on_a_thread(self):
        threads = []

        async def callback():
            threads.append(threading.current_thread())

            def pieces():
                threads.append(threading.current_thread())
                yield request.path
            return pieces()
        self.assertEqual(answer_of(callback).text, "/")
        self.assertIsNot(*threads)

    def test_what_an_async_function_cannot_return_is_a_500(self):
        async def number():
            return 5

        async def numbers():
            yield "a"
            yield 5
        with self.assertLogged():
            self.assertEqual(answer_of(number).status_code, 500)
        with self.assertRaises(TypeError):
            answer_of(numbers)

    def test_all_requests_share_one_loop_inside_a_running_one_too(self):
        async def loop():
            return str(id(asyncio.get_running_loop()))
        app = app_of(loop)

        async def main():
            return ask(app).text
        found = {ask(app).text for _ in range(100)} | {asyncio.run(main())}
        self.assertEqual(len(found), 1)

    def test_an_async_function_behind_a_mount_and_a_plugin(self):
        async def callback():
            await asyncio.sleep(0)
            return request.script_name
        inner, outer = app_of(callback, "/x"), App()
        inner.install(lambda function: lambda **args: function(**args))
        outer.mount("/in", inner)
        self.assertEqual(ask(outer, "/in/x").text, "/in/")

    def test_context_variables_flow_from_a_hook_into_an_async_function(self):
        user = contextvars.ContextVar("user")

        async def callback():
            await asyncio.sleep(0)
            return user.get()
        app = app_of(callback)
        app.add_hook("before_request", lambda: user.set("ada") and None)
        self.assertEqual(ask(app).text, "ada")

    def test_the_body_is_read_in_pieces(self):
        async def count(request):
            return str(sum([len(piece) async for piece in request.stream]))
        for callback in (count, lambda request: str(sum(map(len, request.stream)))):
            app = app_of(callback, method="POST", path="/")
            self.assertEqual(TestClient(app).post("/", body=b"x" * 200000).text, "200000")

    def test_a_task_that_exits_leaves_the_others_running(self):
        async def leave(error):
            raise error

        def callback_of(error):
            async def callback():
                task = asyncio.ensure_future(leave(error))
                await asyncio.sleep(0.01)
                return repr(task.exception())
            return callback
        for error in (SystemExit(1), KeyboardInterrupt()):
            with self.assertLogged():
                self.assertEqual(answer_of(callback_of(error)).text, repr(error))

    def test_a_plain_iterator_keeps_the_thread_that_began_it(self):
        threads = []

        class Pieces:
            """What asks a database when it is iterated over."""

            def __iter__(self):
                for _ in range(3):
                    threads.append(threading.current_thread())
                    yield "a"

            def close(self):
                threads.append(threading.current_thread())

        async def callback():
            await asyncio.sleep(0)
            return Pieces()

        class Note(minibottle.Handler):
            async def get(self):
                return iter(Pieces())

        def events():
            return event_stream(Pieces())
        for target, count in ((callback, 4), (Note, 3), (events, 4)):
            app = App()
            app.route("/", "GET", target) if target is not Note else app.route("/", Note)
            self.assertEqual(ask(app).text.replace("data: ", "").count("a"), 3)
            self.assertEqual((len(threads), len(set(threads))), (count, 1))
            self.assertNotEqual(threads[0].name, "minibottle-asyncio")
            threads.clear()

    def test_an_async_generator_runs_in_one_task(self):
        user, ended = contextvars.ContextVar("user"), queue.Queue()

        async def callback():
            token, task = user.set("ada"), asyncio.current_task()
            try:
                for name in ("a", "b"):
                    yield f"{name} {user.get()} {asyncio.current_task() is task} {request.path},"
                    await asyncio.sleep(0)
            finally:
                user.reset(token)       # raises in another context
                ended.put(asyncio.current_task() is task)
        inner, outer = app_of(callback, "/x"), App()
        outer.mount("/in", inner)
        for app, path in ((inner, "/x"), (outer, "/in/x")):
            self.assertEqual(ask(app, path).text, "a ada True /x,b ada True /x,")
            self.assertTrue(ended.get(timeout=TIMEOUT))
            result = app(environ_of(path), lambda *args: None)
            self.assertEqual(next(iter(result)), b"a ada True /x,")
            result.close()
            self.assertTrue(ended.get(timeout=TIMEOUT))

    def test_a_time_limit_around_the_pieces_holds(self):
        async def callback():
            task = asyncio.current_task()
            yield "a"
            asyncio.get_running_loop().call_later(0.01, task.cancel)    # as asyncio.timeout() does
            try:
                await asyncio.sleep(TIMEOUT)
            except asyncio.CancelledError:
                yield "late"
        self.assertEqual(answer_of(callback).text, "alate")


# === 12. Event loop ===========================================================

SECONDS, GUESTS = (30, 100) if LONG else (0.4, 25)
PATIENCE = 10 * SLOW                   # seconds without a byte: the request is stuck


class Ledger:
    """What the application has seen, and every rule that it saw broken."""

    def __init__(self):
        self.lock = threading.Lock()
        self.calls = collections.Counter()      # request id -> calls
        self.opened = self.closed = 0           # iterators
        self.broken = []

    def note(self, what):
        self.broken.append(what)


ledger = Ledger()


class Planned(Exception):
    """Raised by the application on purpose."""


class Body:
    """An iterator that one thread must begin, pull and close, once, and never two at a time."""

    def __init__(self, rid, size, piece, pause=0, fails=False):
        self.data, self.piece, self.pause, self.fails = content(rid, size), piece, pause, fails
        self.position, self.closed, self.thread = 0, False, None
        self.busy = threading.Lock()
        with ledger.lock:
            ledger.opened += 1

    def __iter__(self):
        return self

    @contextlib.contextmanager
    def alone(self, what):
        if not self.busy.acquire(False):
            ledger.note(what + " while another thread was in it")
            raise Planned(what)
        try:
            if self.thread not in (None, threading.get_ident()):
                ledger.note(what + " by another thread than began it")
            if self.closed:
                ledger.note(what + " after close()")
            yield
        finally:
            self.busy.release()

    def __next__(self):
        with self.alone("next()"):
            self.thread = threading.get_ident()
            time.sleep(self.pause) if self.pause else None
            if self.fails and self.position > len(self.data) // 2:
                raise Planned("broke off")
            start, self.position = self.position, self.position + self.piece
            piece = self.data[start:self.position]
        if not piece:
            raise StopIteration
        return piece

    def close(self):
        with self.alone("close()"):
            self.closed = True
            with ledger.lock:
                ledger.closed += 1
            if random.random() < 0.1:
                time.sleep(0.007)


def content(rid, size):
    """A body that names its request in every line: nothing of another answer goes unseen."""
    line = rid.encode() + b"\n"
    return (line * (size // len(line) + 1))[:size]


def burn(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        sum(range(100))


def application(environ, start_response):
    """GET or POST /KIND/ID/MILLISECONDS-OR-PIECE/SIZE, and /stats."""
    _, kind, *rest = environ["PATH_INFO"].split("/")
    if kind == "stats":
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps(stats()).encode()]
    rid, number, size = rest[0], int(rest[1]), int(rest[2])
    with ledger.lock:
        ledger.calls[rid] += 1
    headers = [("Content-Type", "application/octet-stream"), ("X-Id", rid)]
    sized = headers + [("Content-Length", str(size))]
    if kind == "raise":
        raise Planned(rid)
    if kind == "sleep" or kind == "mixed" and random.random() < 0.1:
        time.sleep(number / 1000)
    elif kind == "cpu":
        burn(number / 1000)
    if kind == "echo":
        data = environ["wsgi.input"].read()
        answer = "%s %d %s" % (rid, len(data), hashlib.sha1(data).hexdigest())
        start_response("200 OK", headers)
        return [answer.encode()]
    if kind == "write":
        start_response("200 OK", sized)(content(rid, size)[:size // 2])
        return [content(rid, size)[size // 2:]]
    if kind in ("await", "flow"):
        start = functools.partial(start_response, "200 OK", headers)
        return minibottle.drive(answer_later(rid, size, number, start, kind == "flow"))
    if kind in BODIES:
        start_response("200 OK", sized if kind == "sized" else headers)
        return BODIES[kind](rid, size, number)
    start_response("200 OK", sized)
    return [content(rid, size)]


async def answer_later(rid, size, number, start, flows):
    """What awaits: an answer at once, or in pieces."""
    await minibottle.SWITCH
    await asyncio.sleep(0 if flows else number / 1000)
    start()
    return minibottle.AsyncBody(flow(rid, size, number)) if flows else [content(rid, size)]


async def flow(rid, size, number):
    data = content(rid, size)
    with ledger.lock:
        ledger.opened += 1
    try:
        for start in range(0, size, number):
            await asyncio.sleep(random.choice((0, 0, 0, 0.001)))
            yield data[start:start + number]
    finally:
        with ledger.lock:
            ledger.closed += 1


BODIES = {
    "stream": Body,
    "sized": Body,
    "slow": lambda rid, size, piece: Body(rid, size, piece, random.choice((0.002, 0.008, 0.02))),
    "broken": lambda rid, size, piece: Body(rid, size, piece, fails=True),
}


def stats():
    gc.collect()
    worker = ledger.server.worker
    return dict(
        doubled=sum(n > 1 for n in ledger.calls.values()), calls=len(ledger.calls),
        opened=ledger.opened, closed=ledger.closed, broken=ledger.broken[:5],
        connections=len(worker.connections), waiting=len(worker.waiting),
        count=dict(worker.poller.count))


class CountingPoller:
    """Counts what the loop asks of its poller."""

    def __init__(self, poller):
        self.poller, self.count = poller, {"polls": 0, "disarms": 0}
        self.register, self.unregister, self.close = (
            poller.register, poller.unregister, poller.close)

    def poll(self, *args):
        self.count["polls"] += 1
        return self.poller.poll(*args)

    def modify(self, fd, mask):
        self.count["disarms"] += mask == minibottle.OFF
        self.poller.modify(fd, mask)


class Unplanned(logging.Handler):
    """Notes each logged exception that the application did not raise on purpose."""

    def emit(self, record):
        if record.exc_info and not isinstance(record.exc_info[1], Planned):
            ledger.note("logged: %r in %s" % (record.exc_info[1], record.getMessage()[:100]))


def serve_application():
    """Print the port, and serve until standard input ends: `test_minibottle.py serve 8`."""
    global minibottle
    if os.environ.get("MINIBOTTLE_FILE"):
        spec = importlib.util.spec_from_file_location("minibottle", os.environ["MINIBOTTLE_FILE"])
        minibottle = sys.modules["minibottle"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(minibottle)
    threading.excepthook = lambda args: ledger.note("a thread died: %r" % (args.exc_value,))
    sys.unraisablehook = lambda args: ledger.note("unraisable: %r" % (args.exc_value,))
    logging.getLogger("minibottle").addHandler(Unplanned())
    ledger.server = minibottle.Server(application, port=0, max_threads=int(sys.argv[2]))
    minibottle.bridge.start()  # or its descriptors would come later
    ledger.server.worker.poller = CountingPoller(ledger.server.worker.poller)
    with ledger.server:
        print(ledger.server.port, flush=True)
        sys.stdin.read()


class ServerProcess:
    """This file in a process of its own, and what the kernel knows of it."""

    def __init__(self, max_threads):
        self.process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), "serve", str(max_threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.max_threads, self.most_threads = max_threads, 0
        self.port = int(self.process.stdout.readline())
        self.get("/fast/warm-up/0/0")
        time.sleep(0.2)                                      # until that connection is forgotten
        self.descriptors_at_start = self.descriptors()

    def get(self, path):
        """A body, by a connection of its own."""
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(client):
            client.request("GET", path)
            return client.getresponse().read()

    def stats(self):
        return json.loads(self.get("/stats").decode())

    def descriptors(self):
        return len(os.listdir("/proc/%d/fd" % self.process.pid))

    def count_threads(self):
        threads = len(os.listdir("/proc/%d/task" % self.process.pid))
        self.most_threads = max(self.most_threads, threads)

    def cpu_seconds(self):
        with open("/proc/%d/stat" % self.process.pid) as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self):
        """Its exit status."""
        with self.process:
            self.process.stdin.close()
            try:
                return self.process.wait(15 * SLOW)
            except subprocess.TimeoutExpired:
                self.process.kill()
                raise


class Wrong(Exception):
    """An answer, or the lack of one, that no client may see."""


class Guest:
    """One of a crowd: keeps to a random style for a connection, and verifies every answer."""

    STYLES = (("keep",) * 4 + ("pipeline",) * 3 + ("half",) * 2
              + ("drip", "pause", "reset", "broken"))

    def __init__(self, port, seed, tally):
        self.port, self.random, self.tally = port, random.Random(seed), tally
        self.name, self.serial, self.doing = "c%d" % seed, 0, ""

    async def run(self, until):
        while time.monotonic() < until:
            style = self.random.choice(self.STYLES)
            self.doing = style
            try:
                await self.connect(4096 if style == "pause" else 0)
                await getattr(self, "be_" + style)()
            except asyncio.TimeoutError:
                self.tally["STUCK " + self.doing] += 1
            except (EOFError, ConnectionError) as error:    # IncompleteReadError is an EOFError
                self.tally["LOST %s %r" % (self.doing, error)] += 1
            except Wrong as error:
                self.tally["WRONG %s %s" % (self.doing, error)] += 1
            finally:
                self.writer.transport.abort()

    async def connect(self, receive_bytes):
        sock = socket.socket()
        sock.setblocking(False)
        if receive_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        self.reader, self.writer = await asyncio.open_connection(
            sock=sock, limit=receive_bytes or 65536)

    # -- what is sent, and what must come back --

    def request(self):
        """(bytes, id, body that is due or None for a 500)."""
        self.serial += 1
        rid, choice = "%s-%d" % (self.name, self.serial), self.random.choice
        kind = choice(("fast",) * 8 + ("stream", "mixed", "echo") * 2 + (
            "sleep", "cpu", "sized", "slow", "write", "raise", "big", "await", "flow"))
        number, size = 0, choice((0, 1, 13, 100, 1000, 5000))
        if kind == "echo":
            return self.upload(rid)
        if kind == "big":
            kind, size = "fast", choice((200000, 3000000))
        elif kind in ("stream", "sized", "flow"):
            size = choice((10, 1000, 100000, 700000))
            number = choice((17, 1000, 70000)) if size < 20000 else choice((3000, 100000))
        elif kind == "slow":
            number = max(1, size // 5)
        elif kind in ("sleep", "mixed", "cpu", "await"):
            number = self.random.randrange(1, 8 if kind == "cpu" else 40)
        data = "GET /%s/%s/%d/%d HTTP/1.1\r\nHost: x\r\n\r\n" % (kind, rid, number, size)
        return data.encode(), rid, None if kind == "raise" else content(rid, size)

    def upload(self, rid):
        size = self.random.choice((0, 1, 1000, 70000, 700000))
        data = bytes(self.random.getrandbits(8) for _ in range(min(size, 1000))) * -(-size // 1000)
        due = "%s %d %s" % (rid, len(data), hashlib.sha1(data).hexdigest())
        head = "POST /echo/%s/0/0 HTTP/1.1\r\nHost: x\r\n" % rid
        if self.random.random() < 0.5:
            head += "Content-Length: %d\r\n\r\n" % len(data)
            return head.encode() + data, rid, due.encode()
        parts, start = [head.encode() + b"Transfer-Encoding: chunked\r\n\r\n"], 0
        while start < len(data):
            part = data[start:start + self.random.choice((1, 100, 9000, 100000))]
            parts.append(b"%x\r\n%b\r\n" % (len(part), part))
            start += len(part)
        return b"".join(parts) + b"0\r\n\r\n", rid, due.encode()

    async def within(self, awaitable):
        return await asyncio.wait_for(awaitable, PATIENCE)

    async def check(self, rid, due, pause=0):
        """Read an answer and verify it; False when it is the last of its connection."""
        status, headers = await self.read_head()
        body = await self.read_body(headers, pause)
        self.tally[status] += 1
        if status != (200 if due is not None else 500):
            raise Wrong("status %d %r" % (status, body[:60]))
        if due is not None and (headers.get("x-id") != rid or body != due):
            raise Wrong("MIXED: due %s %d, got %s %d %r" % (
                rid, len(due), headers.get("x-id"), len(body), body[:60]))
        return headers.get("connection") != "close"

    async def read_head(self):
        lines = (await self.within(self.reader.readuntil(b"\r\n\r\n"))).decode("latin-1")
        first, *fields = lines[:-4].split("\r\n")
        headers = {name.lower(): value for name, _, value in (s.partition(": ") for s in fields)}
        return int(first.split(" ")[1]), headers

    async def read_body(self, headers, pause):
        if "content-length" in headers:
            return await self.read_exactly(int(headers["content-length"]), pause)
        if "transfer-encoding" not in headers:
            raise Wrong("no length in %r" % headers)
        parts = []
        while parts[-1:] != [b""]:
            size = int(await self.within(self.reader.readuntil(b"\r\n")), 16)
            parts.append(await self.read_exactly(size, pause))
            if await self.within(self.reader.readexactly(2)) != b"\r\n":
                raise Wrong("no CRLF after a chunk")
        return b"".join(parts)

    async def read_exactly(self, size, pause):
        parts = []
        while size > 0:
            parts.append(await self.within(self.reader.readexactly(min(size, 50000))))
            size -= len(parts[-1])
            if pause:
                await asyncio.sleep(pause)
        return b"".join(parts)

    async def send(self, data, drip=False):
        """All at once, or in random bits."""
        start = 0
        while start < len(data):
            bit = self.random.choice((1, 7, 50, 2000) if len(data) < 20000 else (500, 20000, 65536))
            bit = bit if drip else len(data)
            self.writer.write(data[start:start + bit])
            await self.within(self.writer.drain())
            start += bit
            if drip and self.random.random() < 0.5:
                await asyncio.sleep(self.random.random() * 0.005)

    async def expect(self, requests):
        for data, rid, due in requests:
            self.doing = self.doing.split()[0] + " " + data[:40].decode("latin-1").split(" HTTP")[0]
            if not await self.check(rid, due):
                return False
        return True

    # -- the styles --

    async def be_keep(self):
        for _ in range(self.random.randrange(1, 30)):
            request = self.request()
            await self.send(request[0])
            if not await self.expect([request]):
                return
            if self.random.random() < 0.3:
                await asyncio.sleep(self.random.random() * 0.05)

    async def be_drip(self):
        request = self.request()
        await self.send(request[0], drip=True)
        await self.expect([request])

    async def be_pipeline(self, ends=False):
        requests = [self.request() for _ in range(self.random.randrange(2, 25))]
        data = b"".join(request[0] for request in requests)
        sending = asyncio.ensure_future(self.send(data, drip=self.random.random() < 0.3))
        if ends:
            sending.add_done_callback(lambda sent: sent.exception() or self.writer.write_eof())
        try:
            whole = await self.expect(requests)
            if whole and ends and await self.within(self.reader.read(1)):
                raise Wrong("bytes after the last answer")
        finally:
            sending.cancel()
            await asyncio.wait([sending])

    async def be_half(self):
        await self.be_pipeline(ends=True)

    async def be_pause(self):
        rid, size = "%s-pause-%d" % (self.name, self.serial), self.random.choice((300000, 2000000))
        self.serial += 1
        kind = self.random.choice(("stream", "sized", "fast"))
        self.doing = "pause " + kind
        await self.send(b"GET /%b/%b/50000/%d HTTP/1.1\r\nHost: x\r\n\r\n" % (
            kind.encode(), rid.encode(), size))
        if self.random.random() < 0.3:
            await asyncio.sleep(self.random.random() * 0.3)
            self.leave()
        else:
            await self.check(rid, content(rid, size), self.random.choice((0.001, 0.01)))

    async def be_reset(self):
        data = b"".join(self.request()[0] for _ in range(self.random.randrange(1, 6)))
        with contextlib.suppress(ConnectionError):
            await self.send(data[:self.random.randrange(len(data) + 1)][:300000])
            await asyncio.sleep(self.random.choice((0, 0.001, self.random.random() * 0.05)))
            self.leave()

    async def be_broken(self):
        self.serial += 1
        await self.send(b"GET /broken/%b-%d/5000/50000 HTTP/1.1\r\nHost: x\r\n\r\n" % (
            self.name.encode(), self.serial))
        with contextlib.suppress(EOFError, ConnectionError):
            _, headers = await self.read_head()
            await self.read_body(headers, 0)
            raise Wrong("an answer that broke off looks whole")

    def leave(self):
        """With a RST or with a FIN."""
        if self.random.random() < 0.6:
            sock = self.writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


class Racer:
    """Sends a second request at the very end of the first one's call; no crowd wakes the loop."""

    ALONE = ("late", "late", "together", "together", "single")
    STYLES = ALONE + ("late", "reset", "storm")

    def __init__(self, port, seed, tally, styles):
        self.port, self.random, self.tally = port, random.Random(seed), tally
        self.name, self.serial, self.sock, self.styles = "r%d" % seed, 0, None, styles
        self.waits = [0.0]                      # seconds for two requests sent at once

    def run(self, until):
        while time.monotonic() < until:
            style, kind = self.random.choice(self.styles), self.random.choice(("sleep", "mixed"))
            try:
                if self.sock is None:
                    self.connect()
                then = time.perf_counter()
                self.read(self.send(style, kind))
                if (style, kind) == ("together", "sleep"):
                    self.waits.append(time.perf_counter() - then)
            except socket.timeout:
                self.leave("STUCK %s %s" % (style, kind))
            except OSError as error:
                self.leave("LOST %s %s %r" % (style, kind, error))
            if self.random.random() < 0.3:
                time.sleep(self.random.random() * 0.012)
        self.leave()

    def send(self, style, kind):
        """The ids of the answers that are due."""
        if style == "reset":
            self.sock.sendall(self.request("sleep", 30)[1])
            time.sleep(0.005)
            return self.leave(reset=True)
        if style == "storm":
            return self.storm()
        (first, data), (second, more) = self.request(kind, 2), self.request("fast", 0)
        if style == "together":
            self.sock.sendall(data + more)
            return [first, second]
        self.sock.sendall(data)
        if style == "single":
            return [first]
        moment = time.perf_counter() + 0.0019 + self.random.random() * 0.0006
        while time.perf_counter() < moment:
            pass
        self.sock.sendall(more)
        return [first, second]

    def storm(self):
        """Descriptors are closed by threads while others are accepted under the same numbers."""
        for _ in range(6):
            self.sock.sendall(self.request("sleep", 5)[1])
            self.leave(reset=True)
            self.connect()
        end = time.perf_counter() + 0.008
        while time.perf_counter() < end:
            rid, data = self.request("fast", 0)
            self.sock.sendall(data)
            self.read([rid])
            self.leave()
            self.connect()

    def connect(self):
        self.sock = socket.create_connection(("127.0.0.1", self.port))
        self.sock.settimeout(2.5 * SLOW)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def request(self, kind, number):
        self.serial += 1
        rid = "%s-%d" % (self.name, self.serial)
        return rid, b"GET /%b/%b/%d/20 HTTP/1.1\r\nHost: x\r\n\r\n" % (
            kind.encode(), rid.encode(), number)

    def read(self, rids):
        data = b""
        for rid in rids or ():
            while b"\r\n\r\n" not in data or len(data.partition(b"\r\n\r\n")[2]) < 20:
                more = self.sock.recv(65536)
                if not more:
                    raise ConnectionError("end of file")
                data += more
            head, _, data = data.partition(b"\r\n\r\n")
            body, data = data[:20], data[20:]
            self.tally[int(head[9:12])] += 1
            if body != content(rid, 20) or b" 200 " not in head:
                self.tally["WRONG %r %r" % (head[:20], body)] += 1

    def leave(self, problem=None, reset=False):
        if problem:
            self.tally[problem] += 1
        if self.sock is not None:
            if reset:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.sock.close()
            self.sock = None


@unittest.skipUnless(os.path.isdir("/proc/self/task"), "reads /proc")
class WorkerUnderLoadTest(unittest.TestCase):
    """Every answer comes once, whole, in order and to its client, and nothing is left over."""

    def start(self, max_threads):
        self.server, self.tally = ServerProcess(max_threads), collections.Counter()
        self.addCleanup(lambda: self.server.process.poll() is None and self.server.process.kill())
        self.until = time.monotonic() + SECONDS

    def test_a_crowd_gets_every_answer_once_whole_and_in_order(self):
        async def watch():
            while time.monotonic() < self.until:
                self.server.count_threads()
                await asyncio.sleep(0.1)

        async def crowd():
            await asyncio.gather(watch(), *(
                Guest(self.server.port, seed, self.tally).run(self.until)
                for seed in range(GUESTS)))
        self.start(max_threads=8)
        asyncio.run(crowd())
        self.check(least_answers=100 * SECONDS / SLOW)

    def test_a_request_that_comes_when_a_call_ends_is_never_missed(self):
        self.start(max_threads=8)
        alone, = self.race([0], Racer.ALONE, self.until - SECONDS * 2 / 3)
        self.race([1, 2, 3, 4], Racer.STYLES, self.until)
        self.check(least_answers=50 * SECONDS / SLOW)
        self.assertLess(statistics.median(alone.waits), 0.05 * SLOW)    # their calls take 2 ms

    def test_one_thread_for_code_that_blocks_is_enough_to_answer_all(self):
        self.start(max_threads=1)
        self.race(range(6), Racer.STYLES, self.until)
        self.check(least_answers=50 * SECONDS / SLOW)

    def race(self, seeds, styles, until):
        racers = [Racer(self.server.port, seed, self.tally, styles) for seed in seeds]
        threads = [threading.Thread(target=racer.run, args=(until,)) for racer in racers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return racers

    def check(self, least_answers):
        answers = sum(n for what, n in self.tally.items() if isinstance(what, int))
        problems = {what: n for what, n in self.tally.items() if isinstance(what, str)}
        self.assertFalse(problems, "of %d answers" % answers)
        self.assertGreater(answers, least_answers)
        stats = self.settled_stats()
        self.assertEqual((stats["doubled"], stats["broken"], stats["waiting"]), (0, [], 0))
        self.assertEqual(stats["opened"], stats["closed"], "iterators opened and closed")
        self.assertEqual(self.server.descriptors(), self.server.descriptors_at_start)
        self.server.count_threads()     # one has the loop, one watches, one is main, one asyncio's
        self.assertLessEqual(self.server.most_threads, max(2, self.server.max_threads) + 4)
        count, calls = stats["count"], stats["calls"]
        self.assertLess(count["polls"], 5 * calls + 1000, count)
        self.assertLess(count["disarms"], calls + 100, count)
        before = self.server.cpu_seconds()
        time.sleep(0.5)
        self.assertLess(self.server.cpu_seconds() - before, 0.05, "CPU in half an idle second")
        self.assertLess(self.server.stats()["count"]["polls"] - count["polls"], 30)
        self.assertEqual(self.server.stop(), 0)

    def settled_stats(self):
        """Figures once the clients that left have been noticed: lingering takes up to 2 seconds."""
        end = time.monotonic() + 5 * SLOW
        while True:
            stats = self.server.stats()
            if stats["connections"] <= 1 and stats["opened"] == stats["closed"]:
                if self.server.descriptors() == self.server.descriptors_at_start:
                    return stats
            if time.monotonic() > end:
                self.assertLessEqual(stats["connections"], 1, stats)
                return stats
            time.sleep(0.1)


# === 13. Server connection ====================================================

HELLO5 = b"5\r\nhello\r\n0\r\n\r\n"
CORPUS = [  # (name, bytes on the wire, status or statuses that are right)
    ("two lengths that differ", post("Content-Length: 1", "Content-Length: 2", body=b"ab"), 400),
    ("two lengths that agree", post("Content-Length: 1", "Content-Length: 1", body=b"a"), 400),
    ("a list of lengths", post("Content-Length: 1, 1", body=b"a"), 400),
    ("length +1", post("Content-Length: +1", body=b"a"), 400),
    ("length -1", post("Content-Length: -1", body=b"a"), 400),
    ("length 0x1", post("Content-Length: 0x1", body=b"a"), 400),
    ("length 1_0", post("Content-Length: 1_0", body=b"a" * 10), 400),
    ("length 1 0", post("Content-Length: 1 0", body=b"a" * 10), 400),
    ("length in Arabic digits", post("Content-Length: \xd9\xa3", body=b"aaa"), 400),
    ("length in superscript", post("Content-Length: \xb2", body=b"aa"), 400),
    ("empty length", post("Content-Length: "), 400),
    ("length of 20 digits", post("Content-Length: " + "9" * 20), (400, 413)),
    ("length of 5,000 digits", post("Content-Length: " + "9" * 5000), (400, 413)),
    ("both framings", chunked(HELLO5, "Content-Length: 5"), 400),
    ("both framings, length first",
     post("Content-Length: 5", "Transfer-Encoding: chunked", body=HELLO5), 400),
    ("two codings", chunked(HELLO5, "Transfer-Encoding: chunked"), 400),
    ("coding xchunked", post("Transfer-Encoding: xchunked", body=HELLO5), (400, 501)),
    ("coding chunked123", post("Transfer-Encoding: chunked123", body=HELLO5), (400, 501)),
    ("coding identity", post("Transfer-Encoding: identity", body=HELLO5), (400, 501)),
    ("coding chunked, identity", post("Transfer-Encoding: chunked, identity"), (400, 501)),
    ("coding chunked, chunked", post("Transfer-Encoding: chunked, chunked"), (400, 501)),
    ("coding gzip, chunked", post("Transfer-Encoding: gzip, chunked", body=HELLO5), 501),
    ("empty coding", post("Transfer-Encoding: ", body=HELLO5), (400, 501)),
    ("coding after a VT", post("Transfer-Encoding: \x0bchunked", body=HELLO5), 400),
    ("coding after a NBSP", post("Transfer-Encoding: \xa0chunked", body=HELLO5), (400, 501)),
    ("coding with a Kelvin sign",
     post("Transfer-Encoding: chun\xe2\x84\xaaed", body=HELLO5), (400, 501)),
    ("coding on HTTP/1.0", b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n" + HELLO5, 400),
    ("space before the colon", post("Content-Length : 1", body=b"a"), 400),
    ("tab before the colon", post("Content-Length\t: 1", body=b"a"), 400),
    ("no field name", get("/", ": no-name"), 400),
    ("a space for a name", get("/", " : no-name"), 400),
    ("no colon", get("/", "nonsense"), 400),
    ("a name in brackets", get("/", "(X): y"), 400),
    ("a name in UTF-8", get("/", "\xc3\xa9: y"), 400),
    ("space before the first field", b"GET / HTTP/1.1\r\n Host: x\r\n\r\n", 400),
    ("folded line", get("/", "X: a", " b"), 400),
    ("folded by a tab", get("/", "X: a", "\tb"), 400),
    ("all line ends are LF", b"GET / HTTP/1.1\nHost: x\n\n", 400),
    ("one line end is LF", b"GET / HTTP/1.1\r\nHost: x\nX: y\r\n\r\n", 400),
    ("request line ends with LF", b"GET / HTTP/1.1\nHost: x\r\n\r\n", 400),
    ("bare CR in a value", get("/", "X: a\rb"), 400),
    ("bare CR after a value", get("/", "X: a\r"), 400),
    ("NUL in a value", get("/", "X: a\0b"), 400),
    ("ESC in a value", get("/", "X: a\x1b[31m"), 400),
    ("DEL in a value", get("/", "X: a\x7f"), 400),
    ("LF in a value", get("/", "X: a\nContent-Length: 44"), 400),
    ("no Host", b"GET / HTTP/1.1\r\n\r\n", 400),
    ("no Host, but in the target", b"GET http://x/ HTTP/1.1\r\n\r\n", 400),
    ("no Host for the whole server", b"OPTIONS * HTTP/1.1\r\n\r\n", 400),
    ("two Hosts", get("/", "Host: x"), 400),
    ("space in Host", b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
    ("slash in Host", b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
    ("user in Host", b"GET / HTTP/1.1\r\nHost: a@b\r\n\r\n", 400),
    ("list in Host", b"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n", 400),
    ("quote in Host", b"GET / HTTP/1.1\r\nHost: a\"b\r\n\r\n", 400),
    ("port that is none", b"GET / HTTP/1.1\r\nHost: a:b\r\n\r\n", 400),
    ("bad Host on HTTP/1.0", b"GET / HTTP/1.0\r\nHost: a/b\r\n\r\n", 400),
    ("asterisk for GET", get("*"), 400),
    ("authority for GET", get("example.com:80"), 400),
    ("relative target", get("foo"), 400),
    ("CONNECT", get("example.com:80", method="CONNECT"), 501),
    ("space in the target", get("/a b"), 400),
    ("two spaces", b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("a tab for a space", b"GET\t/ HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("space after the version", b"GET / HTTP/1.1 \r\nHost: x\r\n\r\n", 400),
    ("control character in the target", get("/a\x01b"), 400),
    ("DEL in the target", get("/a\x7fb"), 400),
    ("absolute target without a host", get("http:///a"), 400),
    ("absolute target with a user", get("http://a@b/"), 400),
    ("absolute target of another scheme", get("ftp://a/"), 400),
    ("fragment in the target", get("/a#b"), 400),
    ("version 1.10", get("/", version="HTTP/1.10"), 400),
    ("version 1.1x", get("/", version="HTTP/1.1x"), 400),
    ("version in lower case", get("/", version="http/1.1"), 400),
    ("version with an Arabic digit", get("/", version="HTTP/1.\xd9\xa1"), 400),
    ("version of another protocol", get("/", version="ICAP/1.0"), 400),
    ("version 2.0", get("/", version="HTTP/2.0"), 505),
    ("version 0.9", get("/", version="HTTP/0.9"), 505),
    ("preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    ("HTTP/0.9", b"GET /\r\n", 400),
    ("no version, then a field", b"GET /\r\nHost: x\r\n\r\n", 400),
    ("space in the method", get("/", method="GE T"), 400),
    ("NUL in the method", get("/", method="GET\0"), 400),
    ("no method", get("/", method=""), 400),
    ("method of 100 bytes", get("/", method="G" * 100), (400, 501)),
    ("10,000 fields", get("/", *["X: y"] * 10000), 431),
    ("10,000 different fields", get("/", *["X%d: y" % i for i in range(10000)]), 431),
    ("a field of 1 MB", get("/", "X: " + "y" * 1000000), 431),
    ("a target of 100 KB", get("/" + "y" * 100000), 414),
    ("a head without an end", b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 50000, 431),
    ("a first line without an end", b"G" * 100000, (400, 414)),
    ("TLS", b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03\x03" + bytes(range(3, 192)), 400),
    ("nothing but line ends", b"\r\n" * 50000, (400, 414, 431)),
    ("LF in an extension", chunked(b"5;a=\nb\r\nhello\r\n0\r\n\r\n"), 400),
    ("CR in an extension", chunked(b"5;a=\rb\r\nhello\r\n0\r\n\r\n"), 400),
    ("NUL in an extension", chunked(b"5;a=\0\r\nhello\r\n0\r\n\r\n"), 400),
    ("chunk longer than it says", chunked(b"5\r\nhello!!\r\n0\r\n\r\n"), 400),
    ("chunk ended by LF", chunked(b"5\r\nhello\n0\r\n\r\n"), 400),
    ("size line ended by LF", chunked(b"5\nhello\r\n0\r\n\r\n"), 400),
    ("size line of 1 MB", chunked(b"5;" + b"x" * 1000000), (400, 413, 431)),
] + [
    ("chunk size %r" % size, chunked(size + b"\r\nhello\r\n0\r\n\r\n"), (400, 413))
    for size in (b"0x5", b"+5", b"5_", b"-0", b"-5", b"", b" 5", b"5 5", b"g", b"\xd9\xa5", b"\xb2",
                 b"5\x0b", b"0" * 16 + b"5", b"f" * 17, b"f" * 1000, b"5,5", b"5.0", b"5\xa0")
] + [
    ("%s in the trailers" % name, chunked(b"0\r\n%s: 1\r\n\r\n" % name.encode()), 400)
    for name in ("Content-Length", "Host", "Transfer-Encoding", "content-length", "Content-Type",
                 "Authorization", "Cookie", "X ", " X", "X(")
] + [
    ("bare LF in the trailers", chunked(b"0\r\nX: y\n\r\n\r\n"), 400),
    ("endless trailers", chunked(b"0\r\n" + b"X: y\r\n" * 100000), (400, 431)),
]


class RefusedRequestTest(WireTest):
    """RFC 9112 2 to 7: what is not surely one request is answered once and then cut off."""

    def refuse(self, server, app, data, expected, feed):
        wire = self.connect(server)
        feed(wire, data + CANARY)
        answers = wire.answers()
        wire.close()
        self.assertEqual(len(answers), 1, answers)
        answer, = answers
        self.assertIn(answer.status, expected if isinstance(expected, tuple) else (expected,))
        self.assertEqual(answer.headers["Connection"], "close")
        self.assertEqual(answer.headers.get_content_type(), "text/plain")
        line = answer.body.decode().rstrip("\n")
        self.assertTrue(line.isprintable() and 8 < len(line) < 300, line)     # it says why
        self.assertEqual(app.paths, [])
        return answer

    def test_one_answer_names_the_cause_and_nothing_after_it_is_read(self):
        app = Recorder()
        server = self.serve(app)
        for name, data, expected in CORPUS:
            app.calls.clear()
            with self.subTest(name):
                self.refuse(server, app, data, expected, Wire.send)

    def test_the_same_when_it_comes_byte_by_byte(self):
        def drip(wire, data):
            with contextlib.suppress(ConnectionError):       # it may have been answered and closed
                wire.send(*(data[i:i + 1] for i in range(len(data))))
        app = Recorder()
        server = self.serve(app)
        for name, data, expected in CORPUS:
            app.calls.clear()
            if len(data) < 600:
                with self.subTest(name):
                    self.refuse(server, app, data, expected, drip)

    def test_each_limit_is_named_in_its_answer(self):
        server = self.serve(hello, max_body=1234)
        for data, status, number in (
                (get("/" + "x" * 8200), 414, "8,?192"),
                (get("/", "X: " + "y" * 33000), 431, "32,?768"),
                (get("/", *["X: y"] * 101), 431, "100"),
                (post("Content-Length: 1235"), 413, "1,?234"),
                (chunked(b"800\r\n" + b"x" * 2048 + b"\r\n0\r\n\r\n"), 413, "1,?234"),
                (chunked(b"1\r\nx\r\n" * 1235 + b"0\r\n\r\n"), 413, "1,?234")):
            with self.subTest(data=data[:40]):
                answer = self.fetch(server, data)
                self.assertEqual(answer.status, status)
                self.assertRegex(answer.body.decode(), r"\b%s\b" % number)

    def test_each_cause_is_named_in_its_answer(self):
        server = self.serve(hello)
        for data, cause in (
                (get("/", "X: a", " b"), "folding"), (get("/", "X: a\0b"), "control character"),
                (get("/", "nonsense"), "colon"), (get("/", "X : a"), "white space"),
                (b"GET / HTTP/1.1\r\n\r\n", "Host"), (get("/", "Host: y"), "Host"),
                (get("/", version="HTTP/2.0"), "HTTP/2.0"), (get("foo"), "target"),
                (get("/", "X: a\nb"), "CR|LF|line|control"), (get(method="CONNECT"), "CONNECT"),
                (post("Content-Length: 1x"), "Content-Length.*1x"), (chunked(b"x\r\n"), "chunk"),
                (chunked(b"", "Content-Length: 1"), "Transfer-Encoding.*Content-Length"),
                (chunked(b"0\r\nHost: x\r\n\r\n"), "Host.*trailer")):
            with self.subTest(data=data):
                self.assertRegex(self.fetch(server, data).body.decode(), cause)

    def test_the_answer_to_head_has_no_body_even_when_it_is_refused(self):
        server = self.serve(hello, max_body=10)                  # RFC 9110 9.3.2
        for lines, status in ((("Content-Length: 11",), 413), (("Content-Length: x",), 400),
                              (("Expect: x",), 417)):
            with self.subTest(lines):
                wire = self.connect(server).send(get("/", *lines, method="HEAD"))
                self.assertEqual(wire.answer("HEAD").status, status)
                self.assert_closed(wire)

    def test_what_can_never_become_a_request_is_not_waited_for(self):
        server = self.serve(hello)
        for data in (b"GET / HTTP/1.1\nHost: x\n\n", b"GET / HTTP/1.0\n\n", b"GET /\n",
                     b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03\x03", b"\0\0\0\0"):
            with self.subTest(data=data):
                wire = self.connect(server).send(data)
                self.assertEqual([answer.status for answer in wire.answers()], [400])

    def test_every_limit_can_be_set(self):
        server = self.serve(hello, max_request_line=100, max_header_bytes=400, max_headers=5)
        for data, status in (
                (get("/" + "x" * 60), 200),
                (get("/" + "x" * 100), 414),
                (get("/", "X: " + "y" * 300), 200),
                (get("/", "X: " + "y" * 400), 431),
                (get("/", *["X: y"] * 4), 200),
                (get("/", *["X: y"] * 5), 431)):
            with self.subTest(data=data[:40], length=len(data)):
                self.assertEqual(self.fetch(server, data).status, status)

class ServedRequestTest(WireTest):
    """RFC 9112 2 to 7 and 9110: forms of a request that are odd but right."""

    def environ(self, data, **settings):
        app = Recorder()
        answer = self.fetch(self.serve(app, **settings), data)
        self.assertEqual(answer.status, 200, answer)
        self.assertEqual(len(app.calls), 1)
        return app.calls[0]

    def test_the_environ_says_what_the_request_said(self):
        app = Recorder()
        server = self.serve(app)
        self.fetch(server, post("Content-Length: 2", "Content-Type: a/b", "X-Y: \t é ß \t ",
                                body=b"ab", path="/a%20b/%C5%81%2F?c=%20&d"))
        environ, = app.calls
        expected = dict(
            REQUEST_METHOD="POST", SCRIPT_NAME="", PATH_INFO="/a b/\xc5\x81/", body=b"ab",
            QUERY_STRING="c=%20&d", CONTENT_LENGTH="2", CONTENT_TYPE="a/b", HTTP_X_Y="é ß",
            HTTP_HOST="x", SERVER_PROTOCOL="HTTP/1.1", SERVER_PORT=str(server.port),
            REMOTE_ADDR="127.0.0.1")
        self.assertEqual({name: environ.get(name) for name in expected}, expected)

    def test_a_repeated_field_is_joined(self):
        environ = self.environ(get("/", "X: a", "Cookie: a=1", "x: b", "cookie: b=2", "X: c"))
        self.assertEqual(environ["HTTP_X"].replace(" ", ""), "a,b,c")
        self.assertEqual(environ["HTTP_COOKIE"], "a=1; b=2")

    def test_an_absolute_target_beats_the_host_field(self):
        environ = self.environ(get("http://target.example:81/path?q"))
        self.assertEqual((environ["HTTP_HOST"], environ["PATH_INFO"], environ["QUERY_STRING"]),
                         ("target.example:81", "/path", "q"))
        self.assertEqual(self.environ(get("http://target.example"))["PATH_INFO"], "/")

    def test_host_may_be_empty_and_may_be_an_address(self):
        for host in ("", "x:80", "[::1]:80", "127.0.0.1", "xn--e1afmkfd.example.", "a_b"):
            with self.subTest(host):
                environ = self.environ(b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % host.encode())
                self.assertEqual(environ["HTTP_HOST"], host)
        self.environ(b"GET / HTTP/1.0\r\n\r\n")

    def test_a_line_end_before_the_request_is_ignored(self):
        self.environ(b"\r\n" + get())                          # RFC 9112 2.2
        app = Recorder()
        wire = self.connect(self.serve(app)).send(b"\r", b"\n", b"\r\nGET", get()[3:])
        self.assertEqual((wire.answer().status, len(app.calls)), (200, 1))

    def test_a_field_with_an_underscore_is_dropped(self):
        self.assertNotIn("HTTP_X_Y", self.environ(get("/", "X_Y: a")))
        self.assertEqual(self.environ(get("/", "X_Y: a", "X-Y: b"))["HTTP_X_Y"], "b")
        self.assertNotIn("CONTENT_LENGTH", self.environ(get("/", "Content_Length: 5")))

    def test_dropped_fields_are_logged_once(self):
        log, server = self.listen_to_log(), self.serve(hello)
        for i in range(3):
            self.fetch(server, get("/", "X_%d: a" % i))
        self.assertIn("X_0", log.next())
        self.assertTrue(log.queue.empty())

    def test_options_of_the_whole_server_is_its_own_answer(self):
        app = Recorder()
        answer = self.fetch(self.serve(app), get("*", method="OPTIONS"))
        self.assertEqual((answer.status, app.calls), (204, []))

    def test_any_method_that_is_a_token_reaches_the_application(self):
        for method in ("PURGE", "M-SEARCH", "BASELINE-CONTROL"):
            with self.subTest(method):
                environ = self.environ(get(method=method))
                self.assertEqual(environ["REQUEST_METHOD"], method)

    def test_a_chunked_body_arrives_decoded(self):
        for body, expected in (
                (HELLO5, b"hello"),
                (b"0\r\n\r\n", b""),
                (b"5\r\nhello\r\n000\r\n\r\n", b"hello"),
                (b"00000005\r\nhello\r\n6;a=b;c=\"d;e\"\r\n world\r\n0;x\r\n\r\n", b"hello world"),
                (b"1A\r\n" + b"x" * 26 + b"\r\n1a\r\n" + b"y" * 26 + b"\r\n0\r\n\r\n",
                 b"x" * 26 + b"y" * 26),
                (b"5\r\nhello\r\n0\r\nX-Checksum: 1\r\nY:\r\n\r\n", b"hello")):
            with self.subTest(body=body):
                environ = self.environ(chunked(body, "X-Checksum: 2"))
                self.assertEqual(environ["body"], expected)
                self.assertIs(environ["wsgi.input_terminated"], True)
                self.assertNotIn("HTTP_TRANSFER_ENCODING", environ)
                self.assertEqual(environ["HTTP_X_CHECKSUM"], "2")      # a trailer is not merged
        self.assertEqual(self.environ(post("Transfer-Encoding: CHUNKED", body=HELLO5))["body"],
                         b"hello")

    def test_requests_that_come_byte_by_byte_or_all_at_once_are_answered_alike(self):
        data = (get("/1") + post("Content-Length: 5", body=b"GET /", path="/2")
                + chunked(HELLO5 + b"\r\n") + chunked(b"5;x=y\r\nhello\r\n0\r\nX: y\r\n\r\n")
                + get("/5", "Connection: close"))
        for step in (1, 2, 7, len(data)):
            app = Recorder()
            wire = self.connect(self.serve(app))
            wire.send(*(data[i:i + step] for i in range(0, len(data), step)))
            with self.subTest(step=step):
                self.assertEqual([answer.body for answer in wire.answers()],
                                 [b"/1", b"/2", b"/", b"/", b"/5"])
                self.assertEqual([environ["body"] for environ in app.calls],
                                 [b"", b"GET /", b"hello", b"hello", b""])

    def test_a_million_chunks_of_one_byte_are_quick_and_delay_nobody(self):
        count = 1000000 if LONG else 100000
        server = self.serve(Recorder())
        wire = self.connect(server)
        start = time.monotonic()
        sender = threading.Thread(target=wire.send, args=(
            chunked(b"1\r\na\r\n" * count + b"0\r\n\r\n"),))
        sender.start()
        worst = 0
        while sender.is_alive():
            then = time.monotonic()
            self.fetch(server, get())
            worst = max(worst, time.monotonic() - then)
            time.sleep(0.02)
        self.assertEqual(wire.answer().status, 200)
        self.assertLess(time.monotonic() - start, 4 * SLOW)
        self.assertLess(worst, 0.25 * SLOW)


class ExpectTest(WireTest):
    """RFC 9110 10.1.1: 100 (Continue) is a promise to read, so it is sent when reading begins."""

    EXPECT = "Expect: 100-Continue", "Content-Length: 5"

    def test_100_comes_before_the_body(self):
        app = Recorder()
        wire = self.connect(self.serve(app))
        for body in (b"hello", b"again"):
            wire.send(post(*self.EXPECT))
            self.assertEqual(wire.answer().status, 100)
            wire.send(body)
            self.assertEqual((wire.answer().status, app.calls[-1]["body"]), (200, body))
        wire.send(post("Expect: 100-continue", "Transfer-Encoding: chunked"))
        self.assertEqual(wire.answer().status, 100)
        self.assertEqual(wire.send(HELLO5).answer().status, 200)

    def test_100_is_not_sent_where_nothing_will_be_read(self):
        app = App()
        app.route("/here", "POST", lambda: "ok")
        server = self.serve(app, max_body=100)
        for data, expected in (
                (post(*self.EXPECT, path="/nowhere"), 404),
                (get("/here", *self.EXPECT, method="PUT"), 405),
                (post("Expect: 100-continue", "Content-Length: 101", path="/here"), 413),
                (post("Expect: 100-continue", "Content-Length: 0", path="/here"), 200),
                (post("Expect: 100-continue", path="/here"), 200),
                (post("Expect: 100-continue", "Content-Length: 1x", path="/here"), 400),
                (post(*self.EXPECT, path="/here"), 100)):
            with self.subTest(data=data):
                self.assertEqual(self.fetch(server, data).status, expected)

    def test_another_expectation_is_refused(self):
        server = self.serve(hello)
        for value in ("200-ok", "100-continue, x"):
            answer = self.fetch(server, post("Expect: " + value, "Content-Length: 5"))
            self.assertEqual(answer.status, 417)

    def test_http_1_0_knows_no_100(self):
        wire = self.connect(self.serve(hello)).send(
            b"POST / HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\nhello")
        self.assertEqual([answer.status for answer in wire.answers()], [200])


class ConnectionTest(WireTest):
    """RFC 9112 9: who closes when."""

    def test_keep_alive_follows_version_and_connection_field(self):
        server = self.serve(hello)
        for version, field, keeps in (
                ("1.1", None, True), ("1.1", "close", False), ("1.1", "Close", False),
                ("1.1", "keep-alive", True), ("1.1", "x, close", False), ("1.1", "closed", True),
                ("1.1", "keep-alive, close", False), ("1.0", None, False), ("1.0", "x", False),
                ("1.0", "keep-alive", True), ("1.0", "Keep-Alive", True), ("1.0", "close", False)):
            with self.subTest(version=version, field=field):
                lines = ["Connection: " + field] if field else []
                wire = self.connect(server)
                for _ in range(3 if keeps else 1):
                    answer = wire.send(get("/", *lines, version="HTTP/" + version)).answer()
                    self.assertEqual(answer.body, b"Hello World!")
                if not keeps:
                    self.assertEqual(answer.headers["Connection"], "close")
                    self.assert_closed(wire)
                elif version == "1.0":
                    self.assertEqual(answer.headers["Connection"].lower(), "keep-alive")
                wire.close()

    def test_an_answer_of_unknown_length_ends_http_1_0(self):
        wire = self.connect(self.serve(reply(lambda: iter([b"a", b"b"]))))
        wire.send(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        answer = wire.answer()
        self.assertNotIn("Transfer-Encoding", answer.headers)
        self.assertEqual(answer.body, b"ab")
        self.assert_closed(wire)

    def test_pipelined_requests_are_answered_in_their_order(self):
        def app(environ, start_response):
            if environ["PATH_INFO"].endswith("0"):
                time.sleep(0.01)
            return recorder(environ, start_response)
        recorder = Recorder()
        wire = self.connect(self.serve(app))
        paths = ["/%d" % i for i in range(100)]
        wire.send(b"".join(map(get, paths)))
        self.assertEqual([wire.answer().body.decode() for _ in paths], paths)
        self.assertEqual(recorder.paths, paths)

    def test_an_unread_body_is_never_taken_for_a_request(self):
        calls = []

        def app(environ, start_response):
            calls.append(environ["PATH_INFO"])
            return hello(environ, start_response)
        server = self.serve(app)
        for data in (post("Content-Length: %d" % len(CANARY), body=CANARY),
                     chunked(b"%x\r\n%b\r\n0\r\n\r\n" % (len(CANARY), CANARY))):
            answers = self.connect(server).send(data + get("/2", "Connection: close")).answers()
            self.assertEqual(answers[0].status, 200)
        self.assertNotIn("/canary", calls)

    def test_an_answer_after_which_the_server_closes_says_so(self):
        app = App()
        app.route("/get", "GET", lambda: "ok")
        server = self.serve(app)
        for path in ("/get", "/nowhere"):
            for data in (post("Content-Length: %d" % len(CANARY), body=CANARY, path=path),
                         chunked(b"%x\r\n%b\r\n0\r\n\r\n" % (len(CANARY), CANARY), path=path),
                         post("Content-Length: 1000000", path=path)):
                with self.subTest(data=data):
                    wire = self.connect(server).send(data)
                    if wire.answer().headers["Connection"] == "close":
                        self.assert_closed(wire)
                    else:
                        wire.send(get("/get", "Connection: close"))
                        self.assertEqual([answer.body for answer in wire.answers()], [b"ok"])

    def test_a_half_closed_client_still_gets_its_answers(self):
        def app(environ, start_response):
            time.sleep(0.02)
            return hello(environ, start_response)
        wire = self.connect(self.serve(app)).send(get() * 3)
        wire.sock.shutdown(socket.SHUT_WR)
        self.assertEqual([answer.status for answer in wire.answers()], [200] * 3)

    def test_a_thousand_requests_of_every_kind_share_one_connection(self):
        def app(environ, start_response):
            path = environ["PATH_INFO"]
            if path in ("/204", "/304"):
                start_response(path[1:] + " X", [])
                return [] if environ["QUERY_STRING"] else [b"no body may be sent"]
            write = start_response("200 OK", [TEXT] + lengths.get(path, []))
            if path == "/write":
                write(b"wri")
                return [b"te"]
            if path == "/echo":
                return [environ["wsgi.input"].read()]
            return iter([b"ge", b"", b"n"]) if path.startswith("/gen") else [b"list"]
        lengths = {"/list": [("Content-Length", "4")], "/gen4": [("Content-Length", "3")]}
        kinds = (("GET", "/list", None, b"list"), ("GET", "/unsized", None, b"list"),
                 ("GET", "/gen", None, b"gen"), ("GET", "/gen4", None, b"gen"),
                 ("GET", "/write", None, b"write"), ("GET", "/204", None, b""),
                 ("GET", "/304", None, b""), ("GET", "/204?empty", None, b""),
                 ("HEAD", "/list", None, b""), ("HEAD", "/gen", None, b""),
                 ("HEAD", "/gen4", None, b""), ("HEAD", "/write", None, b""),
                 ("POST", "/echo", b"x" * 3000, b"x" * 3000),
                 ("POST", "/echo", [b"a", b"b" * 70000], b"a" + b"b" * 70000),
                 ("POST", "/unread", CANARY * 100, b"list"),
                 ("PUT", "/gen", [CANARY] * 3, b"gen"))
        server = self.serve(app)
        client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT)
        self.addCleanup(client.close)
        client.connect()
        sock = client.sock
        for method, path, body, expected in itertools.islice(itertools.cycle(kinds), 1000):
            client.request(method, path, body, encode_chunked=isinstance(body, list), headers={
                "Transfer-Encoding": "chunked"} if isinstance(body, list) else {})
            response = client.getresponse()
            self.assertEqual((path, response.read()), (path, expected))
            self.assertIs(client.sock, sock, "closed after %s %s" % (method, path))

    def test_204_and_304_have_no_framing(self):
        def app(environ, start_response):
            start_response(environ["PATH_INFO"][1:] + " X", [("ETag", '"x"')])
            return [b"nothing of this"]
        server = self.serve(app)
        for path in ("/204", "/304"):
            for method in ("GET", "HEAD"):
                answers = self.connect(server).send(
                    get(path, "Connection: close", method=method)).answers()
                self.assertEqual(len(answers), 1)
                self.assertNotIn("Transfer-Encoding", answers[0].headers)
                if path == "/204":                              # RFC 9110 8.6
                    self.assertNotIn("Content-Length", answers[0].headers)

    def test_an_application_that_sends_less_than_it_announced_is_cut_and_logged(self):
        log = self.listen_to_log()
        for body in ([b"short"], lambda: iter([b"sh", b"ort"])):
            with self.assertRaises((Cut, ConnectionResetError)):
                self.fetch(self.serve(reply(body, ("Content-Length", "10"))), get())
            self.assertRegex(log.next(), r"\b10\b")
            self.assertTrue(log.queue.empty())

    def test_an_application_that_sends_more_than_it_announced_is_cut_to_it(self):
        pieces = [b"hel", b"lo wor", b"ld"]
        for body in (pieces, lambda: iter(pieces)):
            wire = self.connect(self.serve(reply(body, ("Content-Length", "5"))))
            wire.send(get(), get("/", "Connection: close"))
            self.assertEqual({answer.body for answer in wire.answers()}, {b"hello"})

    def test_an_answer_that_breaks_off_does_not_look_whole(self):
        log = self.listen_to_log()
        with self.assertRaises((Cut, ConnectionResetError)):
            self.fetch(self.serve(reply(break_off)), get("/path"))
        self.assertIn("/path", log.next())

    def test_an_application_that_raises_gives_500_and_the_next_request_is_served(self):
        def app(environ, start_response):
            if environ["PATH_INFO"] == "/":
                return hello(environ, start_response)
            raise {"/value": ValueError, "/exit": SystemExit, "/stop": StopIteration,
                   "/keys": KeyboardInterrupt}[environ["PATH_INFO"]]("secret")
        log, server = self.listen_to_log(), self.serve(app)
        for path in ("/value", "/exit", "/stop", "/keys"):
            with self.subTest(path):
                answer = self.fetch(server, get(path))
                self.assertEqual(answer.status, 500)
                self.assertNotIn(b"secret", answer.body)
                self.assertIn(path, log.next())
                self.assertEqual(self.fetch(server, get()).status, 200)

    def test_date_and_server_are_sent_once_and_those_of_the_application_win(self):
        now = r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT"
        mine = reply([b""], ("Date", "mine"), ("server", "mine"))
        for app, name, date in ((hello, "minibottle", now), (mine, "mine", "mine")):
            headers = self.fetch(self.serve(app), get()).headers
            self.assertEqual(headers.get_all("Server"), [name])
            self.assertEqual(len(headers.get_all("Date")), 1)
            self.assertRegex(headers["Date"], r"\A%s\Z" % date)


class DeadlineTest(WireTest):
    """A thread is never held by the network, and every wait ends."""

    def test_silent_and_trickling_clients_delay_nobody_and_end_at_the_deadline(self):
        server = self.serve(hello, header_timeout=1)
        start, over, waits = time.monotonic(), threading.Event(), []
        silent = [self.connect(server) for _ in range(200)]
        trickling = [self.connect(server) for _ in range(50)]

        def trickle():
            for byte in itertools.chain(b"GET / HTTP/1.1\r\nX: ", itertools.repeat(97)):
                for wire in trickling:
                    with contextlib.suppress(OSError):
                        wire.sock.send(bytes([byte]))
                if over.wait(0.05):
                    return
        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            while time.monotonic() < start + 0.8:
                then = time.monotonic()
                self.assertEqual(self.fetch(server, get()).status, 200)
                waits.append(time.monotonic() - then)
                time.sleep(0.02)
            self.assertLess(max(waits), 0.4 * SLOW)
            self.assertEqual({wire.file.read() for wire in silent}, {b""})
            for wire in trickling:
                self.assertEqual(wire.answer().status, 408)
            self.assertLess(time.monotonic() - start, 1 + 3 * SLOW)
            self.assertGreater(time.monotonic() - start, 0.9)
        finally:
            over.set()
            thread.join()

class EndOfWaitTest(PooledTest, WireTest):
    """Every wait for a client ends; these tests only wait."""

    def test_a_client_that_goes_on_sending_after_its_answer_is_cut_off(self):
        wire = self.connect(self.serve(hello))
        wire.send(b"nonsense\r\n\r\n")
        self.assertEqual(wire.answer().status, 400)
        start = time.monotonic()
        with self.assertRaises(ConnectionError):
            while time.monotonic() < start + 10 * SLOW:
                wire.send(bytes(1000))
                time.sleep(0.01)                             # a slow one: bytes alone do not end it

    def test_every_other_wait_ends_too(self):
        big = reply([bytes(20000000)])
        idle = self.connect(self.serve(hello, keepalive_timeout=1)).send(get())
        second = self.connect(self.serve(hello, header_timeout=1)).send(get(), b"GET / ")
        body = self.connect(self.serve(hello, body_timeout=1)).send(post("Content-Length: 9"))
        writing = self.connect(self.serve(big, write_timeout=1), receive_bytes=4096).send(get())
        start = time.monotonic()
        self.assertEqual(idle.answer().status, 200)
        self.assert_closed(idle)
        self.assertEqual(body.answer().status, 408)
        self.assert_closed(body)
        self.assertEqual([answer.status for answer in second.answers()], [200, 408])
        # what the system took at first counts as progress, so it may be twice the time
        time.sleep(max(0, start + 2 + SLOW - time.monotonic()))
        with self.assertRaises((Cut, ConnectionError)):         # what was on its way, then the end
            writing.answer()
        self.assertLess(time.monotonic() - start, 2 + 4 * SLOW)

    def test_a_body_slower_than_the_least_rate_ends(self):
        wire = self.connect(self.serve(hello, body_timeout=1)).send(post("Content-Length: 9999"))
        start = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < start + 4 * SLOW:
                wire.send(b"x")                                  # never a whole second without one
                wire.sock.settimeout(0.1)
                with contextlib.suppress(socket.timeout):
                    self.assertIn(b" 408 ", wire.sock.recv(1000))
                    return
        self.fail("still open after %.1f seconds" % (time.monotonic() - start))


class RefusedUploadTest(WireTest):
    """RFC 9112 9.6: closing with unread input would destroy the answer, so it is drained."""

    SIZE = 50000000

    def upload(self, server, path, in_chunks):
        """The status that http.client sees."""
        client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT)
        with contextlib.closing(client):
            if in_chunks:
                client.request("POST", path, [bytes(1000000)] * 50, encode_chunked=True,
                               headers={"Transfer-Encoding": "chunked"})
            else:
                client.request("POST", path, bytes(self.SIZE))
            return client.getresponse().status

    def test_http_client_reads_the_413_of_a_50_mb_upload_every_time(self):
        server = self.serve(hello, max_body=1000000)
        for i in range(20 if LONG else 4):
            with self.subTest(i=i):
                self.assertEqual(self.upload(server, "/", in_chunks=i % 2), 413)

    def test_http_client_reads_the_404_or_405_of_an_upload_that_nobody_wants(self):
        app = App()
        app.route("/get", "GET", lambda: "ok")
        server = self.serve(app)
        for path, status in [("/nowhere", 404), ("/get", 405)] * (4 if LONG else 1):
            for in_chunks in (False, True):
                with self.subTest(path, in_chunks=in_chunks):
                    self.assertEqual(self.upload(server, path, in_chunks), status)

    @unittest.skipUnless(shutil.which("curl"), "no curl here")
    def test_curl_reads_the_413_of_a_50_mb_upload_every_time(self):
        server = self.serve(hello, max_body=1000000)
        with tempfile.NamedTemporaryFile() as file:
            file.truncate(self.SIZE)
            for i in range(20 if LONG else 3):
                field = ("Expect:", "Transfer-Encoding: chunked", "X: y")[i % 3]
                done = subprocess.run(
                    ["curl", "-s", "-S", "--noproxy", "*", "-H", field, "-o", os.devnull,
                     "-w", "%{http_code}", "-X", "POST", "-T", file.name, server.url + "/"],
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=TIMEOUT)
                with self.subTest(i=i, field=field):
                    self.assertEqual((done.stdout, done.stderr, done.returncode), (b"413", b"", 0))


class HostileFormTest(WireTest):
    """What is sent to exhaust or confuse is answered at once, and costs one line of the log."""

    SIZE = 100 << 20 if LONG else 2 << 20
    TEXT = "application/x-www-form-urlencoded"
    FORM = "multipart/form-data; boundary=" + BOUNDARY
    DISPOSITION = b"--X-bound\r\nContent-Disposition: form-data; name=a"

    def rows(self):
        """(type, Cookie, body, status, what the answer says)"""
        parts = b"".join(part("a", "") for _ in range(5000))
        yield self.FORM, "", form(parts), 413, b"max_fields"
        yield self.FORM, "", form(part("f", "", "f") * 5000), 413, b"max_files"
        yield self.TEXT, "", b"a&" * 5000, 413, b"max_fields"
        yield self.TEXT, "", b"a=" + b"%" * 200000, 200, b"1 fields, 0 files"
        yield self.TEXT, "", b"a" * self.SIZE, 413, b"max_form_memory"
        yield self.FORM, "", form(part("a", b"x" * self.SIZE)), 413, b"max_form_memory"
        yield self.FORM, "", form(part("a", b"\n" * self.SIZE, "f")), 200, b"0 fields, 1 files"
        yield self.FORM, "", b"--X-boun\r\n" * 90000, 400, b"last boundary"
        yield self.FORM, "", form(part("f", b"\r\n--X-boun" * 90000, "f")), 200, b"1 files"
        for bad in (b"\r\nX: a\rb", b"\r\nX: a\nb", b"\r\nX: a\0b", b'; filename="a\0b"',
                    b'; filename="a\rb"', b'; filename="a\nb"', b"\r\nX\0: a"):
            body = form(self.DISPOSITION + bad + b"\r\n\r\nx\r\n")
            yield self.FORM, "", body, 400, b"in line"
        yield self.FORM, "", form(self.DISPOSITION + b"\r\nno colon\r\n\r\n\r\n"), 400, b"colon"
        for cookie in ('"', "\\", ";", '="', '"\\', ';="', "a=\"\\"):
            yield self.TEXT, "c=" + cookie * (30000 // len(cookie)), b"a", 200, b"1 fields"

    def test_each_ends_soon_with_its_status_and_one_line_of_the_log(self):
        def count():
            request.cookies
            return "%d fields, %d files" % (len(request.forms), len(request.files))
        access, on = logging.getLogger("minibottle.access"), logging.NullHandler()
        for undo in (functools.partial(access.removeHandler, on),
                     functools.partial(access.setLevel, access.level)):
            self.addCleanup(undo)
        access.addHandler(on)
        access.setLevel(logging.INFO)
        log, server = self.listen_to_log(), self.serve(app_of(count, method="POST"))
        start = time.process_time()
        for kind, cookie, body, status, text in self.rows():
            head = post("Content-Type: " + kind, "Content-Length: %d" % len(body),
                        *["Cookie: " + cookie] * bool(cookie), "Connection: close")
            answer = self.fetch(server, head + body)
            with self.subTest(cookie=cookie[:9], body=body[:99], length=len(body)):
                self.assertEqual(answer.status, status)
                self.assertIn(text, answer.body)
                self.assertIn('"POST / HTTP/1.1" %d' % status, log.next())
                self.assertTrue(log.queue.empty())
        self.assertLess(time.process_time() - start, (8 if LONG else 2) * SLOW)


PAGE = b"<p>Hello World!</p>\n" * 500


class GzipTest(WireTest):
    """RFC 9110 8.4 and 12.5.3, for any WSGI application."""

    def setUp(self):
        self.status, self.headers, self.body, self.flag = "200 OK", [TEXT], [PAGE], None
        self.server = self.serve(self.app)

    def app(self, environ, start_response):
        if self.flag is not None:
            environ["minibottle.gzip"] = self.flag
        start_response(self.status, self.headers)
        return self.body() if callable(self.body) else self.body

    def ask(self, accept="gzip", **options):
        lines = () if accept is None else ("Accept-Encoding: " + accept,)
        return self.fetch(self.server, get("/", *lines, **options), options.get("method", "GET"))

    def assert_gzipped(self, answer, body=PAGE):
        self.assertEqual(answer.headers.get_all("Content-Encoding"), ["gzip"])
        self.assertIn("accept-encoding", answer.headers["Vary"].lower())
        self.assertEqual(gzip.decompress(answer.body), body)

    def assert_plain(self, answer, body=PAGE):
        self.assertNotIn("Content-Encoding", answer.headers)
        self.assertEqual(answer.body, body)

    def test_it_is_used_only_for_clients_that_accept_it(self):
        for accept, gzipped in (
                ("gzip", True), ("br,gzip;q=0.5", True), ("*", True), ("gzip;q=0", False),
                ("identity", False), ("", False), (None, False), ("br, deflate", False)):
            with self.subTest(accept):
                answer = self.ask(accept)
                (self.assert_gzipped if gzipped else self.assert_plain)(answer)
                self.assertIn("accept-encoding", answer.headers["Vary"].lower())
                self.assertEqual(int(answer.headers["Content-Length"]), len(answer.body))

    def test_text_is_compressed_and_what_is_small_or_packed_is_not(self):
        for kind, gzipped in (
                ("text/html; charset=utf-8", True), ("image/svg+xml", True), ("image/png", False),
                ("application/zip", False)):
            self.headers = [("Content-Type", kind)]
            with self.subTest(kind):
                (self.assert_gzipped if gzipped else self.assert_plain)(self.ask())
        self.headers, self.body = [TEXT], [b"x" * 1023]
        self.assert_plain(self.ask(), b"x" * 1023)
        self.body = [b"x" * 512, b"x" * 512]
        self.assert_gzipped(self.ask(), b"x" * 1024)

    def test_its_least_size_can_be_set(self):
        self.server, self.body = self.serve(self.app, gzip_min=50), [b"x" * 60]
        self.assert_gzipped(self.ask(), b"x" * 60)

    def test_some_answers_are_never_touched(self):
        for status, headers, flag in (
                ("206 Partial Content", [("Content-Range", "bytes 0-9999/20000")], None),
                ("200 OK", [], False)):
            self.status, self.headers, self.flag = status, [TEXT, ("ETag", '"x"')] + headers, flag
            with self.subTest(status=status, headers=headers, flag=flag):
                answer = self.ask()
                self.assertNotEqual(answer.headers["Content-Encoding"], "gzip")
                self.assertEqual((answer.body, answer.headers["ETag"]), (PAGE, '"x"'))

    def test_answers_without_a_body_carry_no_content_encoding(self):
        for self.status in ("204 No Content", "304 Not Modified"):
            for self.body in ([], [PAGE], lambda: iter([PAGE])):
                answer = self.ask()
                self.assertNotIn("Content-Encoding", answer.headers)

    def test_head_announces_nothing_that_get_would_not_send(self):
        for self.body in ([PAGE], lambda: iter([PAGE])):
            for extra in ([], [("Content-Length", str(len(PAGE)))]):
                self.headers = [TEXT] + extra
                full, head = self.ask(), self.ask(method="HEAD")
                self.assertEqual(full.headers["Vary"], head.headers["Vary"])
                self.assertIn(head.headers["Content-Length"],
                              (None, full.headers["Content-Length"]))

    def test_a_strong_etag_becomes_weak_and_vary_is_extended(self):
        self.headers = [TEXT, ("ETag", '"x"'), ("Vary", "Cookie")]
        answer = self.ask()
        self.assertEqual(answer.headers["ETag"], 'W/"x"')
        self.assertRegex(", ".join(answer.headers.get_all("Vary")), "(?i)cookie, *accept-encoding")
        self.assertEqual(self.ask(None).headers["ETag"], '"x"')
        self.headers = [TEXT, ("ETag", 'W/"x"'), ("Vary", "accept-encoding")]
        answer = self.ask()
        self.assertEqual((answer.headers["ETag"], answer.headers.get_all("Vary")),
                         ('W/"x"', ["accept-encoding"]))

    def test_a_stream_is_compressed_whole(self):
        self.body = lambda: (PAGE[i:i + 700] for i in range(0, len(PAGE), 700))
        for extra in ([], [("Content-Length", str(len(PAGE)))]):
            self.headers = [TEXT] + extra
            self.assert_gzipped(self.ask())
            self.assert_plain(self.ask(None))

    def test_a_file_is_compressed_whole(self):
        with tempfile.NamedTemporaryFile() as file:
            file.write(PAGE)
            file.flush()
            self.body = lambda: minibottle.FileWrapper(open(file.name, "rb"))
            for extra in ([], [("Content-Length", str(len(PAGE)))]):
                self.headers = [TEXT] + extra
                self.assert_gzipped(self.ask())
                self.assert_plain(self.ask(None))

    def test_each_piece_of_a_stream_arrives_before_the_next_is_made(self):
        pieces = queue.Queue()
        self.body = lambda: iter(pieces.get, None)
        for kind in ("text/event-stream", "text/html"):
            for accept in ("gzip", "identity"):
                with self.subTest(kind=kind, accept=accept):
                    self.headers = [("Content-Type", kind)]
                    wire = self.connect(self.server).send(get("/", "Accept-Encoding: " + accept))
                    self.step_through(wire, pieces)

    def step_through(self, wire, pieces):
        """Make one event at a time, and read it off the wire before the next."""
        decode = None
        try:
            for event in [b"data: %d\n\n" % i for i in range(5)] + [b"x" * 5000, b"end"]:
                pieces.put(event)
                if decode is None:
                    headers = wire.head()[2]
                    packed = headers["Content-Encoding"] == "gzip"
                    decode = zlib.decompressobj(31).decompress if packed else bytes
                text = b""
                while len(text) < len(event):
                    text += decode(wire.chunk())
                self.assertEqual(text, event)
        finally:
            pieces.put(None)
        decode(b"".join(iter(wire.chunk, b"")))


class WsgiTest(WireTest):
    """PEP 3333, with the validator of the standard library between server and application."""

    def validated(self, app, data=None, method="GET"):
        with warnings.catch_warnings():
            warnings.simplefilter("error", WSGIWarning)
            return self.fetch(self.serve(validator(app)), data or get(), method)

    def test_every_shape_of_application_passes_the_validator(self):
        def as_generator(environ, start_response):
            start_response("200 OK", [TEXT])
            yield b""
            yield b"he"
            yield b"llo"

        def as_write(environ, start_response):
            write = start_response("200 OK", [TEXT])
            write(b"he")
            write(b"llo")
            return []

        def as_both(environ, start_response):
            start_response("200 OK", [TEXT, ("Content-Length", "5")])(b"he")
            return iter([b"llo"])

        def as_file(environ, start_response):
            start_response("200 OK", [TEXT])
            return environ["wsgi.file_wrapper"](io.BytesIO(b"hello"), 2)

        def as_second_thought(environ, start_response):
            start_response("500 Oops", [TEXT])
            try:
                raise ValueError
            except ValueError:
                start_response("200 OK", [TEXT], sys.exc_info())
            return [b"hello"]

        as_list, as_closing = reply([b"he", b"", b"llo"]), reply(lambda: Closable([b"hello"]))
        for app in (as_list, as_generator, as_write, as_both, as_file, as_second_thought,
                    as_closing):
            for method in ("GET", "HEAD"):
                with self.subTest(app=app, method=method):
                    answer = self.validated(app, get(method=method), method)
                    expected = b"hello" if method == "GET" else b""
                    self.assertEqual((answer.status, answer.body), (200, expected))

    def test_an_answer_may_be_empty(self):
        for pieces in ([], [b""], (), iter([]), [b"", b""]):
            with self.subTest(pieces=pieces):
                self.assertEqual(self.validated(reply(pieces))[::3], (200, b""))

    def test_the_input_behaves_as_a_file(self):
        found = []

        def app(environ, start_response):
            source = environ["wsgi.input"]
            found[:] = [source.read(2), source.readline(), source.readline(2), next(iter(source)),
                        source.readlines(), source.read(10), source.readline()]
            return hello(environ, start_response)
        lines = b"abcd\nefgh\nij\nkl"
        for data in (post("Content-Length: 15", body=lines),
                     chunked(b"3\r\nabc\r\nc\r\nd\nefgh\nij\nkl\r\n0\r\n\r\n")):
            self.assertEqual(self.validated(app, data).status, 200)
            self.assertEqual(found, [b"ab", b"cd\n", b"ef", b"gh\n", [b"ij\n", b"kl"], b"", b""])

    def test_a_large_input_is_whole(self):
        app, body = Recorder(), os.urandom(2000000)           # larger than what stays in memory
        for data in (post("Content-Length: 2000000", body=body),
                     chunked(b"1e8480\r\n" + body + b"\r\n0\r\n\r\n")):
            self.assertEqual(self.fetch(self.serve(app), data).status, 200)
            self.assertTrue(app.calls.pop()["body"] == body)

    def test_exc_info_after_the_head_ends_the_answer(self):
        def app(environ, start_response):
            start_response("200 OK", [TEXT])
            yield b"begun"
            try:
                raise ValueError("late")
            except ValueError:
                start_response("500 Oops", [TEXT], sys.exc_info())
            yield b"never sent"
        wire = self.connect(self.serve(app)).send(get())
        with self.assertRaises((Cut, ConnectionResetError)):
            wire.answer()

    def test_misuse_of_start_response_is_a_500(self):
        def twice(environ, start_response):
            start_response("200 OK", [TEXT])
            return hello(environ, start_response)

        def never(environ, start_response):
            return [b"x"]
        log = self.listen_to_log()
        def text(environ, start_response):
            start_response("200 OK", [TEXT])("text")

        def two_lengths(environ, start_response):
            start_response("200 OK", [TEXT, ("Content-Length", "1"), ("content-length", "2")])
        for app in (twice, never, text, two_lengths, reply(["text"]), reply(None),
                    reply(iter(["text"]))):
            with self.subTest(app=app):
                self.assertEqual(self.fetch(self.serve(app), get()).status, 500)
                self.assertTrue(log.next())

    def test_without_a_stderr_wsgi_errors_goes_nowhere(self):
        def app(environ, start_response):
            environ["wsgi.errors"].write("it broke\n")
            self.addCleanup(environ["wsgi.errors"].close)
            return hello(environ, start_response)
        with mock.patch.object(sys, "stderr", None):
            server = self.serve(app)
        self.assertEqual(self.fetch(server, get()).status, 200)

    def test_close_is_called_exactly_once(self):
        for pieces, method in (([b"x"], "GET"), ([b"x"], "HEAD"), (break_off(), "GET"),
                               ([b"x" * 100000] * 50, "GET"), ([], "GET")):
            body = Closable(pieces)
            with contextlib.suppress(Cut, ConnectionResetError):
                self.fetch(self.serve(reply(body)), get(method=method), method)
            self.assertTrue(body.ended.wait(TIMEOUT))
            self.assertEqual(body.closed, 1)

    def test_what_could_split_an_answer_is_a_500_and_a_log_line(self):
        log = self.listen_to_log()
        for status, name, value in (
                ("200 OK", "X", "a\r\nInjected: 1"), ("200 OK", "X", "a\nInjected: 1"),
                ("200 OK", "X", "a\rInjected: 1"), ("200 OK", "X", "a\0"), ("200 OK", "X", "\x1b"),
                ("200 OK", "X\r\nInjected", "1"), ("200 OK", "X: a\nInjected", "1"),
                ("200 OK", "X Y", "1"), ("200 OK", "", "1"), ("200 OK", "X:", "1"),
                ("200 OK", "X", "\u2028"), ("200 OK", "X", 1), ("200 OK", "X", b"1"),
                ("200 OK\r\nInjected: 1", "X", "1"), ("200 O\nK", "X", "1"),
                ("200 \0", "X", "1"), ("abc", "X", "1"), ("20 OK", "X", "1"),
                ("200 OK", "Content-Length", "1, 1"), ("200 OK", "Content-Length", "+1"),
                ("200 OK", "Content-Length", "x"), (200, "X", "1"), (b"200 OK", "X", "1")):
            with self.subTest(status=status, name=name, value=value):
                app = reply([b"x"], (name, value), status=status)
                answer = self.fetch(self.serve(app), get())
                self.assertEqual(answer.status, 500)
                self.assertNotIn("Injected", answer.headers)
                self.assertTrue(log.next())

    def test_hop_by_hop_fields_of_an_application_are_dropped_and_logged(self):
        log = self.listen_to_log()
        for name in ("Connection", "keep-alive", "Proxy-Authenticate", "TE", "Transfer-Encoding",
                     "Upgrade"):
            with self.subTest(name):
                answer = self.fetch(self.serve(reply([b"x"], (name, "chunked"))), get())
                self.assertEqual((answer.status, answer.body), (200, b"x"))
                self.assertNotIn(name, answer.headers)
                self.assertIn(name.lower(), log.next().lower())


class StreamTest(WireTest):
    """Large answers, slow readers, and clients that go away."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = os.path.join(folder.name, "file")
        data = os.urandom(5000000)
        self.digest = hashlib.sha256(data).hexdigest()
        with open(self.path, "wb") as file:
            file.write(data)
        self.files = []

    def send_file(self, environ, start_response):
        start_response("200 OK", [("Content-Type", "application/octet-stream")])
        self.files.append(open(self.path, "rb"))
        wrap = environ["wsgi.file_wrapper"] if environ["PATH_INFO"] == "/" else FileWrapper
        return wrap(self.files[-1], 65536)

    def wait_for(self, condition, seconds=5):
        end = time.monotonic() + seconds * SLOW
        while not condition():
            self.assertLess(time.monotonic(), end, "waited in vain")
            time.sleep(0.005)

    def test_readers_that_pause_get_their_file_and_hold_no_thread(self):
        server = self.serve(self.send_file, max_threads=1)
        paused = [self.connect(server, receive_bytes=4096).send(get()) for _ in range(8)]
        for wire in paused:
            self.assertTrue(wire.sock.recv(1, socket.MSG_PEEK))     # all have begun, none goes on
        for wire in [self.connect(server).send(get())] + paused:
            self.assertEqual(hashlib.sha256(wire.answer().body).hexdigest(), self.digest)
        self.wait_for(lambda: all(file.closed for file in self.files))

    def test_a_paused_reader_of_an_iterator_gets_all_of_it(self):
        wire = self.connect(self.serve(self.send_file), receive_bytes=4096).send(get("/iterator"))
        self.assertTrue(wire.sock.recv(1, socket.MSG_PEEK))
        time.sleep(0.3)
        self.assertEqual(hashlib.sha256(wire.answer().body).hexdigest(), self.digest)

    def test_a_file_is_sent_from_where_it_stands_and_as_far_as_announced(self):
        def app(environ, start_response):
            start_response("200 OK", [TEXT, ("Content-Length", "1000")])
            file = open(self.path, "rb")
            file.seek(4000000)
            return environ["wsgi.file_wrapper"](file)
        with open(self.path, "rb") as file:
            file.seek(4000000)
            self.assertEqual(self.fetch(self.serve(app), get()).body, file.read(1000))

    def test_a_file_may_be_empty_and_may_not_be_shorter_than_announced(self):
        def app(environ, start_response):
            long = [("Content-Length", "6000000")] if environ["PATH_INFO"] == "/long" else []
            start_response("200 OK", [TEXT] + long)
            file = open(self.path, "rb")
            file.seek(0 if long else 5000000)
            return environ["wsgi.file_wrapper"](file)
        server = self.serve(app)
        self.assertEqual(self.fetch(server, get())[::3], (200, b""))
        with self.assertRaises((Cut, ConnectionResetError)):
            self.fetch(server, get("/long"))

    def test_a_file_is_closed_when_its_client_goes_away(self):
        server = self.serve(self.send_file)
        for leave in (Wire.reset, Wire.close):
            for path in ("/", "/iterator"):
                wire = Wire(server.port, 4096).send(get(path))
                wire.exactly(1000)
                leave(wire)
        self.wait_for(lambda: len(self.files) == 4 and all(file.closed for file in self.files))

    def test_a_file_is_closed_when_the_server_ends_before_it_is_sent(self):
        server = self.serve(self.send_file, grace=0)
        self.connect(server, receive_bytes=4096).send(get()).exactly(1000)
        server.stop()
        self.assertTrue(self.files[0].closed)

    def test_an_iterator_is_closed_when_its_client_goes_away(self):
        def endless():
            while True:
                yield b"x" * 100000

        def slow():
            while True:
                yield b"x"
                time.sleep(0.05)
        for pieces in (endless, slow):
            for leave in (Wire.reset, Wire.close):
                body = Closable(pieces())
                wire = Wire(self.serve(reply(body)).port).send(get())
                wire.head()
                leave(wire)
                with self.subTest(pieces=pieces.__name__, leave=leave.__name__):
                    self.assertTrue(body.ended.wait(5 * SLOW))
                    self.assertEqual(body.closed, 1)

    def test_an_event_stream_ends_when_its_reader_closes_its_side_and_others_do_not(self):
        def count():
            for i in range(20):
                yield b"data: %d\n\n" % i
                time.sleep(0.02)

        def app(environ, start_response):
            start_response("200 OK", [("Content-Type", environ["PATH_INFO"][1:])])
            return count()
        server = self.serve(app)
        for kind in ("text/event-stream", "text/plain"):
            wire = self.connect(server).send(get("/" + kind))
            wire.sock.shutdown(socket.SHUT_WR)
            data = b""
            with contextlib.suppress(ConnectionResetError):
                data = read_all(wire.sock)
            self.assertEqual(b"data: 19" in data, kind == "text/plain")

    def test_a_stalled_reader_of_an_endless_stream_costs_no_memory(self):
        made = []

        def endless():
            while True:
                made.append(1)
                yield b"x" * 100000
        wire = self.connect(self.serve(reply(endless)), receive_bytes=4096).send(get())
        wire.head()
        time.sleep(0.3)
        self.assertLess(len(made), 100)                          # 10 MB: what the kernel buffers
        wire.reset()


class AsyncServedTest(WireTest):
    """Coroutines on our server: they hold no thread, and nothing else waits for them."""

    def read(self, server, path):
        return self.fetch(server, get(path))

    def test_a_hundred_that_sleep_end_together_while_others_sleep_and_burn(self):
        app = App()

        @app.get("/await")
        async def wait():
            await asyncio.sleep(1)
            return "awake"

        @app.get("/sleep")
        def sleep():
            time.sleep(1)
            return "slept"

        @app.get("/burn")
        def burn():
            end = time.monotonic() + 1
            while time.monotonic() < end:
                pass
        server = self.serve(app, max_threads=4)
        wires = [self.connect(server) for _ in range(102)]
        start = time.monotonic()
        for wire, path in zip(wires, ["/sleep", "/burn"] + ["/await"] * 100):
            wire.send(get(path))
        self.assertEqual([wire.answer().body for wire in wires[2:]], [b"awake"] * 100)
        self.assertLess(time.monotonic() - start, 1.5 * SLOW)
        self.assertEqual([wire.answer().status for wire in wires[:2]], [200, 200])
        self.assertLess(threading.active_count(), 20)

    def test_a_coroutine_that_breaks_its_task_costs_the_next_ones_nothing(self):
        async def fail():
            raise ValueError("ours")

        async def succeed():
            done.set()
        done, bridge = threading.Event(), minibottle.bridge
        bridge.start()
        with self.assertLogs("asyncio") as logs:
            for steps in (fail(), succeed()):
                bridge.guests.append(minibottle.Guest(
                    contextvars.copy_context(), steps, minibottle.Plan()))
            bridge.ring()
            self.assertTrue(done.wait(TIMEOUT))
            self.assertTrue(wait_until(lambda: gc.collect() and logs.records or logs.records))
        self.assertIn("ours", logs.output[0])

    def test_what_does_not_wait_shares_a_task_and_nothing_else(self):
        user, tasks = contextvars.ContextVar("user"), {}
        app = App()

        @app.get("/<name>")
        async def greet(name):
            before = user.get("nobody")
            user.set(name)
            tasks.setdefault(asyncio.current_task(), []).append(name)
            if name.startswith("fail"):
                raise SystemExit(name)
            if name.startswith("wait"):
                await asyncio.sleep(0.01)
            return f"{before} {user.get()} {request.path}"
        server = self.serve(app)
        with self.assertLogs("minibottle"):
            for names in ([f"plain{i}" for i in range(40)], [f"fail{i}" for i in range(20)],
                          [f"{kind}{i}" for i in range(20) for kind in ("plain", "wait", "fail")]):
                wires = [self.connect(server) for _ in names]
                for wire, name in zip(wires, names):
                    wire.send(get("/" + name))
                for wire, name in zip(wires, names):
                    answer = wire.answer()
                    if name.startswith("fail"):
                        self.assertEqual(answer.status, 500)
                    else:
                        self.assertEqual(answer.body.decode(), f"nobody {name} /{name}")
        for names in tasks.values():        # who has waited was the last one there
            self.assertFalse([name for name in names[:-1] if name.startswith("wait")])

    def test_requests_on_one_connection_are_answered_in_order(self):
        app = App()

        @app.get("/<seconds:float>")
        async def wait(seconds):
            await asyncio.sleep(seconds)
            return str(seconds)
        app.route("/", callback=lambda: "now")
        wire = self.connect(self.serve(app)).send(get("/0.05") + get("/") + get("/0.01"))
        self.assertEqual([wire.answer().body for _ in range(3)], [b"0.05", b"now", b"0.01"])

    def test_a_generator_waits_for_a_slow_reader(self):
        made = []

        async def pieces():
            for _ in range(600):
                made.append(1)
                yield b"x" * 50000
        server = self.serve(app_of(pieces))
        wire = self.connect(server, receive_bytes=4096).send(get())
        wire.sock.recv(1, socket.MSG_PEEK)
        counts = [0]
        while counts[-1] != len(made):
            counts.append(len(made))
            time.sleep(0.1)
        self.assertLess(len(made), 300)     # what the system buffers: a few MB at most
        self.assertEqual(len(wire.answer().body), 30000000)

    def test_a_file_of_a_coroutine_is_read_on_threads_and_closed(self):
        files, app = [], App()

        @app.get("/<kind>")
        async def send(kind):
            await asyncio.sleep(0)
            files.append(open(__file__, "rb") if kind == "file" else io.BytesIO(b"x" * 5000000))
            return files[-1]

        @app.get("/")
        async def index():
            await asyncio.sleep(0)
            return "index"
        server = self.serve(app)
        with open(__file__, "rb") as file:
            self.assertEqual(self.read(server, "/file").body, file.read())
        self.assertIn("Content-Length", self.read(server, "/file").headers)
        self.fetch(server, get("/file", method="HEAD"), "HEAD")
        packed = self.fetch(server, get("/file", "Accept-Encoding: gzip"))
        self.assertEqual(packed.status, 200)
        slow = self.connect(server, receive_bytes=4096).send(get("/memory"))
        slow.sock.recv(1, socket.MSG_PEEK)
        self.assertEqual(self.read(server, "/").body, b"index")
        self.assertEqual(len(slow.answer().body), 5000000)
        self.wait_until(lambda: all(file.closed for file in files))

    def test_when_the_client_goes_events_and_who_wants_it_are_cancelled(self):
        began, ended = queue.Queue(), queue.Queue()
        app = App()

        async def forever(name):
            try:
                began.put(name)
                await asyncio.sleep(60)
            finally:
                ended.put(name)

        @app.get("/stream")
        def stream():
            async def events():
                yield "x"
                await forever("stream")
            return event_stream(events())

        @app.get("/pieces", cancel=True)
        async def pieces():
            yield "x"
            await forever("pieces")

        @app.get("/cancel", cancel=True)
        async def cancel():
            await forever("cancel")

        def endless(name):
            try:
                yield "x"
                began.put(name)
                while True:
                    time.sleep(0.1)     # at work when the client goes
                    yield "x"
            finally:
                ended.put(name)

        @app.get("/plain", cancel=True)
        async def plain():
            return endless("plain")

        @app.get("/events")
        def plain_events():
            return event_stream(endless("events"))

        @app.get("/finish")
        async def finish():
            began.put("finish")
            await asyncio.sleep(0.1)
            ended.put("finish")
        server, log = self.serve(app), self.listen_to_log()
        for path in ("/stream", "/pieces", "/cancel", "/plain", "/events", "/finish"):
            wire = self.connect(server).send(get(path))
            self.assertEqual(began.get(timeout=TIMEOUT), path[1:])
            wire.close()
            self.assertEqual(ended.get(timeout=TIMEOUT), path[1:])
        self.assertTrue(log.queue.empty())

    def wait_until(self, condition):
        end = time.monotonic() + TIMEOUT
        while not condition():
            self.assertLess(time.monotonic(), end, "waited in vain")
            time.sleep(0.005)

    def test_a_body_is_read_by_a_coroutine_as_it_arrives(self):
        app = App()

        @app.post("/", stream=True)
        async def count(request):
            sizes = [len(piece) async for piece in request.stream]
            return str(sum(sizes))
        wire = self.connect(self.serve(app))
        wire.send(post("Content-Length: 10", "Expect: 100-continue"))
        self.assertEqual(wire.head()[0], 100)
        wire.send(b"12345").send(b"67890")
        self.assertEqual(wire.answer().body, b"10")
        self.assertEqual(wire.send(post("Content-Length: 1", body=b"x")).answer().body, b"1")

    def upload_app(self):
        app = App()

        @app.post("/async", stream=True)
        async def count(request):
            return str(sum([len(piece) async for piece in request.stream]))

        @app.post("/sync", stream=True)
        def count_too(request):
            return str(sum(map(len, request.stream)))

        @app.get("/")
        async def elsewhere():
            return await asyncio.get_running_loop().run_in_executor(None, str, 5)
        return app

    def test_slow_uploads_to_a_coroutine_hold_no_thread(self):
        server = self.serve(self.upload_app(), max_threads=4)
        self.read(server, "/")
        before = threading.active_count()
        wires = [self.connect(server).send(post("Content-Length: 6", body=b"abc", path="/async"))
                 for _ in range(50)]
        self.assertEqual(self.read(server, "/").body, b"5")
        self.assertLess(threading.active_count(), before + 20)
        for wire in wires:
            self.assertEqual(wire.send(b"def").answer().body, b"6")
        for piece in (b"3\r\nabc\r\n", b"0\r\n\r\n"):
            wire.send(chunked(piece, path="/async") if piece[:1] == b"3" else piece)
        self.assertEqual(wire.answer().body, b"3")

    def test_an_upload_that_stalls_is_408_to_a_coroutine(self):
        wire = self.connect(self.serve(self.upload_app(), body_timeout=0.1))
        wire.send(post("Content-Length: 6", body=b"abc", path="/async"))
        self.assertEqual(wire.answer().status, 408)

    def test_an_upload_that_breaks_off_is_nobodys_error(self):
        server, log = self.serve(self.upload_app()), self.listen_to_log()
        for path in ("/async", "/sync"):
            for leave in (Wire.reset, Wire.close):
                wire = Wire(server.port).send(post("Content-Length: 6", body=b"abc", path=path))
                self.read(server, "/")          # by now it is read
                leave(wire)
        self.wait_until(lambda: not server.worker.connections)
        self.assertTrue(log.queue.empty())

    def test_who_is_cancelled_by_another_is_a_500(self):
        async def forever():
            await asyncio.sleep(TIMEOUT)

        app = App()

        @app.get("/", cancel=True)
        async def callback():
            task = asyncio.ensure_future(forever())
            asyncio.get_running_loop().call_soon(task.cancel)
            await task
        server, log = self.serve(app), self.listen_to_log()
        self.assertEqual(self.read(server, "/").status, 500)
        self.assertIn("unhandled exception", log.next())

    def test_what_fails_after_the_head_resets_the_connection(self):
        async def pieces():
            yield "x"
            raise ValueError("broke off")
        server, log = self.serve(app_of(pieces)), self.listen_to_log()
        with self.assertRaises((Cut, ConnectionResetError)):
            self.fetch(server, get())
        self.assertIn("unhandled exception", log.next())


class AroundTest(WireTest):

    def test_a_middleware_sees_the_request_before_and_after_the_application(self):
        seen = []

        def middleware(environ, start_response):
            seen.append(request.path)
            out = app(environ, start_response)
            seen.append((request.path, request.route.rule, response.status_code))
            return out
        app = App()
        app.route("/<x>", callback=lambda x: HTTPResponse(x, 201))
        server = self.serve(middleware)
        for path in ("/1", "/2"):
            self.assertEqual(self.fetch(server, get(path)).body, path[1:].encode())
        self.assertEqual(seen, ["/1", ("/1", "/<x>", 201), "/2", ("/2", "/<x>", 201)])
        with self.assertRaises(RuntimeError):
            contextvars.Context().run(getattr, request, "path")


# === 14. Workers ==============================================================

class Busy(threading.Thread):
    """A client that asks again and again, on one connection while that lasts."""

    def __init__(self, url, path="/", reconnect=True, headers=None, method="GET"):
        super().__init__()
        self.url, self.path, self.reconnect, self.headers = url, path, reconnect, headers
        self.method = method
        self.done = threading.Event()        # set to end it
        self.first = threading.Event()       # it has had an answer
        self.answers = collections.Counter()  # by body
        self.lost = []                       # (when, error) of requests that were not answered
        self.refused = []                    # when a connection was

    def run(self):
        try:
            while not self.done.is_set():
                self.use_connection()
                if not self.reconnect:
                    return
        except ConnectionError:
            self.refused.append(time.monotonic())
        finally:
            self.first.set()

    def use_connection(self):
        with contextlib.closing(Client(self.url)) as client:
            client.connect()
            while not self.done.is_set():
                try:
                    status, headers, body = client.ask(self.path, self.method, None, self.headers)
                except (OSError, http.client.HTTPException) as error:
                    self.lost.append((time.monotonic(), error))
                    return
                self.answers[status, body] += 1
                self.first.set()
                if headers["Connection"] == "close":
                    return


@contextlib.contextmanager
def busy(count, *args, **options):
    """So many Busy clients, each with an answer already."""
    clients = [Busy(*args, **options) for _ in range(count)]
    try:
        for client in clients:
            client.start()
        for client in clients:
            client.first.wait(TIMEOUT)
        yield clients
    finally:
        for client in clients:
            client.done.set()
        for client in clients:
            client.join()


@unittest.skipUnless(hasattr(os, "fork") and HAS_PROC, "needs fork and /proc")
class CommandMasterTest(PooledTest):
    """Workers come, go, hang and are replaced; signals stop them."""

    def wait_for_drain(self, client):
        """Ask until the answer says that the worker is about to end."""
        self.assertTrue(wait_until(lambda: client.ask()[1]["Connection"] == "close"))

    def test_a_worker_that_is_killed_costs_its_own_requests_and_is_soon_back(self):
        with serve("shop:app", "--workers", "2") as server:
            time.sleep(1)                    # it is not one that dies at once
            with busy(8, server.url, "/pid") as clients:
                known, victim = set(server.children()), server.worker()
                os.kill(victim, signal.SIGKILL)
                killed = time.monotonic()
                self.assertTrue(wait_until(lambda: set(server.children()) - known, 2 * SLOW))
                new = min(set(server.children()) - known)
                self.assertTrue(wait_until(lambda: server.worker() == new, 2 * SLOW))
                self.assertLess(time.monotonic() - killed, 2 * SLOW)
            server.wait_for("%d .*signal 9" % victim)
            for client in clients:
                self.assertLessEqual(len(client.lost), 1)
                self.assertEqual(client.refused, [])
            self.assertEqual(server.stop(), 0)

    def test_the_only_worker_that_is_killed_costs_no_new_connection(self):
        with serve("shop:app") as server:
            time.sleep(1)
            for _ in range(2):
                os.kill(server.worker(), signal.SIGKILL)
                self.assertEqual(fetch(server.url)[0], 200)      # it waited for the next one
            self.assertEqual(server.stop(), 0)

    def test_each_worker_calls_what_is_to_be_called_at_its_start_and_stop(self):
        with serve("lifecycle:app", "--workers", "2") as server:
            self.wait_for_workers(server, 2, "/")
            pids = sorted(server.children())
            self.assertEqual(server.stop(), 0)
            said = server.said()
            for text in ("started", "started too", "stopped", "stopped too", "task cancelled"):
                self.assertEqual(sorted(map(int, re.findall(r"%s in (\d+)" % text, said))), pids)

    def test_a_coroutine_that_blocks_does_not_keep_a_server_from_its_end(self):
        for workers in "01":
            with serve("lifecycle:app", "--workers", workers, "--grace", "0.3") as server, \
                    contextlib.closing(Client(server.url)) as client:
                client.request("GET", "/block")
                server.wait_for("blocked")
                began = time.monotonic()
                self.assertEqual(server.stop(), 0)
                self.assertLess(time.monotonic() - began, 1.3 * SLOW + 1)

    def test_an_application_that_fails_at_its_start_stops_the_server(self):
        with Command("lifecycle:Broken") as server:
            self.assertEqual(server.wait(), 1)
            self.assertRegex(server.said(), "cannot start(.|\n)*no database")

    def test_the_master_does_not_import_the_application(self):
        with serve("reports:app", "--workers", "2") as server:
            self.wait_for_workers(server, 2)
            self.assertTrue(wait_until(lambda: set(server.children()) == set(
                map(int, re.findall(r"imported by (\d+)", server.said())))), server.said())

    @contextlib.contextmanager
    def serve_frail(self, lives):
        """Two workers, one of them killed; those that follow live for so many seconds."""
        broken = tempfile.mktemp(dir=FOLDER)
        with serve("frail:app", "--workers", "2", BROKEN=broken) as server:
            self.wait_for_workers(server, 2)
            with open(broken, "w") as file:
                file.write(str(lives))
            victim = server.worker()
            os.kill(victim, signal.SIGKILL)
            self.assertTrue(wait_until(lambda: victim not in server.children()))
            yield server, broken
            self.assertTrue(wait_until(lambda: len(server.children()) == 2), server.said())
            self.assertEqual((server.stop(), server.find("Traceback")), (0, None))

    def check_pauses(self, lives, pauses):
        """Workers that end so many seconds after their import are begun after such pauses."""
        def deaths():
            return [line for line in server.err if line and re.search("status 7|signal 9", line)]
        with self.serve_frail(lives) as (server, broken):
            for n, pause in enumerate(pauses):
                self.assertTrue(wait_until(lambda: len(deaths()) > n, 2 * pause + 1))
                self.assertRegex(deaths()[n], r"\b%d s\b" % pause)
                self.assertEqual(fetch(server.url)[0], 200)
            os.unlink(broken)

    def test_workers_that_die_at_once_are_tried_again_after_growing_pauses(self):
        pauses = (1, 2, 4, 8) if LONG else (1, 2)
        at_once(self.check_pauses, [(0, pauses), (0.1, pauses)])

    def test_a_worker_that_dies_while_it_talks_to_the_master_costs_only_itself(self):
        with self.serve_frail(-1) as (server, broken):
            server.wait_for("waits")
            os.kill(server.pid, signal.SIGSTOP)
            os.unlink(broken)                    # it goes on, and asks for settings
            time.sleep(0.3)
            for worker in server.children()[1:]:
                os.kill(worker, signal.SIGKILL)
            os.kill(server.pid, signal.SIGCONT)
            self.assertEqual(fetch(server.url)[0], 200)

    def test_workers_end_when_the_master_is_killed(self):
        with serve("shop:app", "--workers", "2", "--grace", "1") as server:
            workers = server.children()
            self.assertEqual(len(workers), 2)
            with contextlib.closing(Client(server.url)) as idle, busy(4, server.url, "/wait/.01"):
                idle.ask()
                server.process.kill()
                self.assertTrue(wait_until(lambda: not any(map(is_alive, workers)), 3 * SLOW))
            self.assertTrue(is_refused(server.url))

    def test_stopping_under_load_loses_no_request(self):
        with serve("shop:app", "--workers", "2", "--grace", "3") as server:
            with busy(50, server.url, "/wait/.05", reconnect=False) as clients:
                began = time.monotonic()
                self.assertEqual(server.stop(), 0, server.said())
                self.assertLess(time.monotonic() - began, 4 * SLOW)
            self.assertEqual([client.lost for client in clients if client.lost], [])
            self.assertEqual({status for client in clients for status, _ in client.answers}, {200})

    def check_stopping(self, workers):
        """While a request of two seconds ends."""
        with serve("shop:app", "--workers", workers) as server, \
                contextlib.closing(Client(server.url)) as idle, \
                contextlib.closing(Client(server.url)) as client, \
                connect(server.url) as working:
            if workers == "2":
                self.wait_for_workers(server, 2)
            idle.ask()
            client.ask()
            working.sendall(get("/sleep/2"))
            server.wait_for("asleep")
            before = cpu_seconds(server.pid)
            server.process.terminate()
            self.wait_for_drain(client)
            self.assertTrue(wait_until(lambda: is_refused(server.url), 1))
            self.assertEqual(idle.sock.recv(1), b"")
            self.assertIn(b"HTTP/1.1 200", working.recv(1000))
            working.close()
            self.assertLess(cpu_seconds(server.pid) - before, 0.6)
            self.assertEqual(server.wait(), 0)

    def test_a_stopping_server_refuses_the_new_ends_the_idle_and_waits_for_the_rest(self):
        at_once(self.check_stopping, "012")

    def test_a_signal_that_comes_while_workers_are_begun_is_not_lost(self):
        for signum in (signal.SIGTERM, signal.SIGINT) * (10 if LONG else 2):
            with serve("shop:app", "--workers", "4") as server:
                began = time.monotonic()
                os.killpg(server.pid, signum)
                self.assertEqual(server.wait(), 0)
                self.assertLess(time.monotonic() - began, 2 * SLOW)
                # a worker may get it before it serves, and end before the master has got it
                lines = [line for line in server.err[1:-1] if not re.search(
                    r"worker \d+ (was ended by signal 15|ended with status 0) after 0 s", line)]
                self.assertEqual((lines, server.err[-1]), ([], None), server.said())

    def test_ctrl_c_ends_an_idle_server_at_once(self):
        for _ in range(3):
            with serve("shop:app", "--workers", "4") as server:
                self.wait_for_workers(server, 4)
                began = time.monotonic()
                os.killpg(server.pid, signal.SIGINT)
                self.assertEqual(server.wait(), 0)
                self.assertLess(time.monotonic() - began, 3 * SLOW)

    def check_ends_at_once(self, workers, signals):
        """Although a request hangs; the last of the signals does it."""
        with serve("shop:app", "--workers", workers, "--grace", "30") as server, \
                contextlib.closing(Client(server.url)) as client, connect(server.url) as hanging:
            client.ask()
            hanging.sendall(get("/sleep/60"))
            server.wait_for("asleep")
            for signum in signals[:-1]:
                os.killpg(server.pid, signum)
                self.wait_for_drain(client)
                self.assertTrue(wait_until(lambda: is_refused(server.url)))  # the master has it too
            began = time.monotonic()
            os.killpg(server.pid, signals[-1])
            server.wait()
            self.assertLess(time.monotonic() - began, 3 * SLOW)
            self.assertIsNone(server.find("Traceback"))

    def test_a_second_signal_and_quit_end_it_at_once(self):
        at_once(self.check_ends_at_once, [
            (workers, signals) for workers in "01" for signals in (
                (signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT),
                (signal.SIGQUIT,))])

    def test_ctrl_c_ends_it_after_the_request_without_a_traceback(self):
        for workers in "012":
            with serve("shop:app", "--workers", workers) as server:
                with connect(server.url) as sock:
                    sock.sendall(get("/sleep/.2"))
                    server.wait_for("asleep")
                    os.killpg(server.pid, signal.SIGINT)
                    self.assertTrue(read_all(sock).endswith(b"awake"))
                self.assertEqual((server.wait(), len(server.err)), (0, 3), server.said())

    def test_ctrl_c_ends_it_while_it_imports_the_application(self):
        for workers in "01":
            with Command("slow:app", "--workers", workers) as server:
                server.wait_for("importing")
                began = time.monotonic()
                os.killpg(server.pid, signal.SIGINT)
                server.wait()
                self.assertLess(time.monotonic() - began, 2 * SLOW)
                self.assertLessEqual(len(server.err), 3, server.said())

    def check_stream(self, workers):
        with serve("shop:app", "--workers", workers, "--grace", "1") as server, \
                connect(server.url) as reads, connect(server.url, 4096) as stalls:
            reads.sendall(get("/endless"))
            stalls.sendall(get("/bytes/1000000000"))
            self.assertTrue(reads.recv(1) and stalls.recv(1))
            began = time.monotonic()
            self.assertEqual(server.stop(), 0, server.said())
            self.assertLess(time.monotonic() - began, 1 + 2 * SLOW)

    def test_a_stream_without_an_end_does_not_keep_it_from_ending(self):
        at_once(self.check_stream, "01")

    def check_hung(self, path, pattern):
        """A call that lasts: its stack is logged, its worker replaced."""
        with serve("shop:app", "--worker-timeout", "1", "--grace", "1") as server:
            first = server.worker()
            with connect(server.url) as hanging:
                began = time.monotonic()
                hanging.sendall(get(path))
                server.wait_for(pattern, 10 * SLOW)
                self.assertTrue(wait_until(lambda: first not in server.children()))
                self.assertNotEqual(server.worker(), first)
                self.assertRegex(server.said(), "worker_timeout")
                self.assertLess(time.monotonic() - began, 8 * SLOW)
            self.assertEqual(server.stop(), 0)

    @only_cpython
    def test_a_worker_that_gives_no_sign_of_life_is_replaced(self):
        self.check_hung("/hold", r"shop\.py\"?, line \d+ in hold")
        if LONG:
            self.check_hung("/regex", r"shop\.py\"?, line \d+ in backtrack")

    def test_a_call_that_hangs_is_logged_and_costs_no_other_request(self):
        at_once(self.check_hung, [
            ("/sleep/60", r"shop\.py\"?, line \d+,? in sleep"),
            ("/doze/60", r"shop\.py\"?, line \d+,? in doze"),
            ("/spin", r"shop\.py\"?, line \d+,? in spin")][:2 + LONG])

    def test_connections_are_spread_over_the_workers(self):
        with serve("shop:app", "--workers", "2") as server, contextlib.ExitStack() as stack:
            self.wait_for_workers(server, 2)
            clients = [stack.enter_context(contextlib.closing(Client(server.url)))
                       for _ in range(64)]
            for client in clients:
                client.connect()
            for client in clients:
                client.request("GET", "/pid")
            pids = collections.Counter(client.getresponse().read() for client in clients)
            self.assertEqual(len(pids), 2, pids)
            self.assertLess(max(pids.values()), 0.9 * 64, pids)     # at most 64 without balance


LIVE = """
import os, sys
import minibottle

TEXT = %r
app = minibottle.App()
app.get("/", callback=lambda: TEXT)
app.get("/pid", callback=lambda: str(os.getpid()))


def main():
    app.run(%s)

%s
"""


@unittest.skipUnless(hasattr(os, "fork") and HAS_PROC, "needs fork and /proc")
class CommandReplacementTest(PooledTest):
    """Workers are replaced while they serve: new code, more or fewer, when they are old."""

    @contextlib.contextmanager
    def serve_live(self, *args, target="live:app", **options):
        """A server, and edit(text, more code, options of run()) of what it serves."""
        with tempfile.TemporaryDirectory() as folder:
            moments = itertools.count(int(time.time()))

            def edit(text, code="", run=""):
                path = os.path.join(folder, "live.py")
                with open(path + "~", "w") as file:
                    file.write(LIVE % (text, run, code))
                os.utime(path + "~", (next(moments),) * 2)       # what is compiled is of then
                os.replace(path + "~", path)
            edit("first", run="port=0")
            with serve(target, "--no-access-log", *args, cwd=folder, **options) as server:
                yield server, edit

    def assertNothingLost(self, clients):
        self.assertEqual([client.lost for client in clients if client.lost], [])
        self.assertEqual([client.refused for client in clients if client.refused], [])
        self.assertEqual({status for client in clients for status, _ in client.answers}, {200})

    def hup(self, server, said):
        server.process.send_signal(signal.SIGHUP)
        server.wait_for(said)

    def test_new_code_is_served_and_no_request_is_lost_when_hup_comes(self):
        with self.serve_live("--workers", "2") as (server, edit), busy(4, server.url) as clients, \
                busy(2, server.url, headers={"Connection": "close"}) as others:
            old = set(server.children())
            edit("second")
            self.hup(server, ", 2 new workers, Python")
            self.assertTrue(wait_until(lambda: not old & set(server.children())), server.said())
            self.assertEqual(fetch(server.url)[2], b"second")
            self.assertEqual(len(server.children()), 2)
            for client in clients + others:
                client.done.set()
                client.join()
                self.assertEqual(set(client.answers), {(200, b"first"), (200, b"second")})
            self.assertNothingLost(clients + others)
            self.assertEqual(server.stop(), 0)

    def test_code_that_does_not_start_leaves_the_old_workers_and_is_shown_once(self):
        with self.serve_live("--workers", "2") as (server, edit):
            self.wait_for_workers(server, 2)
            old = server.children()
            for code, cause in (("1 // 0", "ZeroDivisionError"), ("1 +", "SyntaxError"), (
                    "@app.on_start\ndef start():\n    raise KeyError(7)", "KeyError: 7")):
                edit("broken", code)
                self.hup(server, cause)
                server.wait_for("old ones stay")
                self.assertEqual(fetch(server.url)[2], b"first")
                self.assertEqual(server.children(), old)
                self.assertEqual(server.said().count(cause), 1)
                server.err.clear()
            edit("second")
            self.hup(server, ", 2 new workers, Python")
            self.assertTrue(wait_until(lambda: fetch(server.url)[2] == b"second"))
            self.assertEqual(server.stop(), 0)

    def test_a_hup_that_comes_while_new_code_starts_is_not_forgotten(self):
        with self.serve_live() as (server, edit):
            edit("second", "print('waits', file=sys.stderr)\nimport time\ntime.sleep(.3)")
            self.hup(server, "waits")
            edit("third")
            server.process.send_signal(signal.SIGHUP)
            self.assertTrue(wait_until(lambda: fetch(server.url)[2] == b"third"))
            self.assertTrue(wait_until(lambda: len(server.children()) == 1))
            self.assertEqual(server.stop(), 0)

    def test_new_code_has_its_own_settings_but_for_its_addresses(self):
        with self.serve_live(target="live:main", bind=False) as (server, edit):
            edit("second", run="port=1, workers=3")
            self.hup(server, "reload: .* a new bind needs a restart")
            self.assertTrue(wait_until(lambda: len(server.children()) == 3))
            self.assertTrue(wait_until(lambda: fetch(server.url)[2] == b"second"))
            self.assertEqual(server.stop(), 0)

    def test_a_script_has_new_workers_and_says_that_the_code_is_the_old(self):
        with serve("1", start=("script.py",), bind=False) as server:
            old = set(server.children())
            self.hup(server, "the code is that of when run")
            self.assertTrue(wait_until(lambda: not old & set(server.children())))
            self.assertEqual(fetch(server.url)[::2], (200, b"Hello World!"))
            self.assertEqual(server.stop(), 0)

    def test_ttin_and_ttou_change_the_number_of_workers(self):
        with self.serve_live() as (server, edit), busy(4, server.url) as clients:
            for signum, count in ((signal.SIGTTIN, 2), (signal.SIGTTIN, 3), (signal.SIGTTOU, 2),
                                  (signal.SIGTTOU, 1)):
                server.process.send_signal(signum)
                self.assertTrue(wait_until(lambda: len(server.children()) == count), count)
            worker, = server.children()
            server.process.send_signal(signal.SIGTTOU)
            server.process.send_signal(signal.SIGTTIN)
            self.assertTrue(wait_until(lambda: len(server.children()) == 2))
            self.assertIn(worker, server.children())
            for client in clients:
                client.done.set()
                client.join()
            self.assertNothingLost(clients)

    def test_workers_that_have_answered_enough_are_replaced_and_no_request_is_lost(self):
        with self.serve_live("--workers", "2", "--max-requests", "100") as (server, edit), \
                busy(8, server.url, "/pid") as clients:
            self.assertTrue(wait_until(
                lambda: sum(sum(client.answers.values()) for client in clients) > 2000))
            for client in clients:
                client.done.set()
                client.join()
            self.assertNothingLost(clients)
            answered = collections.Counter()
            for client in clients:
                answered.update(client.answers)
            self.assertGreater(len(answered), 4)
            self.assertIsNone(server.find("ended|Traceback"))
            self.assertEqual(server.stop(), 0)

    def test_a_worker_that_the_system_refuses_costs_those_that_serve_nothing(self):
        patch = ("import itertools, os\nfork, count = os.fork, itertools.count()\n"
                 "def fail():\n    if next(count) == 1:\n"
                 "        raise BlockingIOError(11, 'Too many')\n"
                 "    return fork()\nos.fork = fail\n")
        with serve("shop:app", "--workers", "2", patch=patch) as server:
            server.wait_for("no new worker.*Too many")
            self.wait_for_workers(server, 2)
            self.assertEqual(server.stop(), 0)

    def test_a_log_file_is_opened_anew_at_usr1(self):
        path = os.path.join(tempfile.mkdtemp(dir=FOLDER), "log")

        def lines(name):
            with open(name) as file:
                return re.findall("minibottle: .*Python|GET /[a-z]*|cannot write.*", file.read())
        for workers in "01":
            with Command("shop:app", "--workers", workers, "--log-file", path,
                         "--bind", "unix:" + path + ".sock") as server:
                url = "unix:" + path + ".sock"
                self.assertTrue(wait_until(lambda: is_served(url) and "GET /" in lines(path)))
                os.rename(path, path + ".1")
                server.process.send_signal(signal.SIGUSR1)
                self.assertTrue(wait_until(lambda: os.path.exists(path)))

                def is_logged():
                    fetch(url, "/page")
                    return "GET /page" in lines(path)
                self.assertTrue(wait_until(is_logged))
                self.assertRegex(" ".join(lines(path + ".1")), "minibottle: .* Python")
                os.rename(os.path.dirname(path), os.path.dirname(path) + "~")
                server.process.send_signal(signal.SIGUSR1)
                self.assertTrue(wait_until(lambda: any(
                    line.startswith("cannot write the log file " + path)
                    for line in lines(os.path.dirname(path) + "~/log"))))
                os.rename(os.path.dirname(path) + "~", os.path.dirname(path))
                self.assertTrue(is_served(url))
                self.assertEqual((server.stop(), server.said()), (0, ""))
            os.unlink(path)

    def test_a_log_file_that_cannot_be_written_is_a_line(self):
        for workers in "01":
            status, _, said = finish("shop:app", "--bind=127.0.0.1:0", "--log-file=no/such/folder",
                                     "--workers", workers)
            self.assertEqual(status, 1)
            self.assertRegex(said, r"\Aminibottle: cannot write the log file .*/no/such/folder: "
                                   r"No such file or directory\n\Z")

    def test_systemd_gives_it_a_listener_and_hears_when_it_is_ready(self):
        opener = ("import os, socket, sys\nsock = socket.socket()\nsock.bind(('127.0.0.1', 0))\n"
                  "sock.listen()\nos.dup2(os.dup(sock.fileno()), 3)\n"
                  "os.execvp(sys.argv[1], sys.argv[1:])")
        path = os.path.join(FOLDER, "notified")
        for workers in "02":
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
                ear.bind(path + workers)
                ear.settimeout(TIMEOUT)
                with serve("shop:app", "--bind", "fd:3", "--workers", workers, bind=False,
                           before=(sys.executable, "-c", opener),
                           NOTIFY_SOCKET=path + workers) as server:
                    self.assertEqual(ear.recv(100), b"READY=1")
                    self.assertEqual(fetch(server.url)[2], b"Hello World!")
                    self.assertEqual(server.stop(), 0)

    def test_an_inherited_listener_must_be_one(self):
        rows = [("fd:99", 1, "cannot use fd:99: Bad file descriptor"), ("fd:0", 1, "cannot use"),
                ("fd:x", 2, "bad address")]
        done = finish_each([["shop:app", "--bind", address] for address, _, _ in rows])
        for (_, expected, text), (status, _, err) in zip(rows, done):
            self.assertEqual((status, err.count("\n")), (expected, 1), err)
            self.assertIn("minibottle: " + text, err)

    @unittest.skipUnless(LONG, "half a minute")
    def test_a_storm_of_signals_loses_no_request_but_those_of_killed_workers(self):
        with self.serve_live("--workers", "2", "--max-requests", "500") as (server, edit), \
                busy(6, server.url) as clients, \
                busy(2, server.url, headers={"Connection": "close"}) as others:
            kills, rng = [], random.Random(1)
            for n in range(10):
                edit("code %d" % n)
                server.process.send_signal(signal.SIGHUP)
                self.assertTrue(wait_until(lambda: fetch(server.url)[2] == b"code %d" % n))
                for signum in (signal.SIGTTIN, signal.SIGTTOU):
                    server.process.send_signal(signum)
                    time.sleep(0.5)
                kills.append(time.monotonic())
                os.kill(rng.choice(server.children()), signal.SIGKILL)
                time.sleep(1)
            for client in clients + others:
                client.done.set()
                client.join()
            self.assertEqual([client.refused for client in clients + others if client.refused], [])
            lost = [moment for client in clients + others for moment, _ in client.lost]
            self.assertLessEqual(len(lost), len(kills) * len(clients + others))
            self.assertEqual([moment for moment in lost if not any(
                kill <= moment < kill + 0.3 * SLOW for kill in kills)], [])
            self.assertEqual(server.stop(), 0)


class InThreadTest(unittest.TestCase):
    """Server(app) inside another program; one test at a time, since they take the time."""

    def serve(self, app, **settings):
        server = Server(app, port=0, **settings)
        server.start()
        self.addCleanup(server.stop)
        return server

    def client(self, server):
        client = Client(server.url)
        self.addCleanup(client.close)
        return client

    def make_app(self):
        """GET / answers at once, /blocked when `release` is set; `entered` counts those inside."""
        app, self.release, self.entered = App(), threading.Event(), threading.Semaphore(0)

        @app.get("/")
        def index():
            return "Hello World!"

        @app.get("/blocked")
        def blocked():
            time.sleep(0.005)
            self.entered.release()
            self.release.wait(TIMEOUT)
            return "released"
        self.addCleanup(self.release.set)        # before the server is stopped
        return app

    def block(self, server, path="/blocked"):
        """A client whose request is inside the handler."""
        client = self.client(server)
        client.request("GET", path)
        self.assertTrue(self.entered.acquire(timeout=TIMEOUT))
        return client

    def test_fifty_starts_and_stops_leave_no_descriptor_and_no_thread(self):
        app = self.make_app()

        def count():
            gc.collect()
            return len(os.listdir("/proc/self/fd")) if HAS_PROC else 0, threading.active_count()
        for i in range(50):
            if i == 1:
                before = count()
            with Server(app, port=0) as server:
                self.assertEqual(fetch(server.url)[0], 200)
        self.assertEqual(count(), before)
        server = Server(app, port=0)
        server.stop()                            # although it was not started
        self.assertEqual(count(), before)

    def test_another_thread_stops_it_after_the_request_and_the_port_is_free(self):
        server = self.serve(self.make_app())
        client = self.block(server)
        stopper = threading.Thread(target=server.stop)
        stopper.start()

        self.assertTrue(wait_until(lambda: is_refused(server.url)))
        self.assertTrue(stopper.is_alive())
        self.release.set()
        self.assertEqual(client.getresponse().read(), b"released")
        stopper.join(TIMEOUT)
        self.assertFalse(stopper.is_alive())
        with Server(self.make_app(), port=server.port) as again:
            self.assertEqual(fetch(again.url)[0], 200)

    def test_stopping_takes_no_longer_than_its_grace(self):
        server = self.serve(self.make_app(), grace=0.5)
        self.block(server)
        began = time.monotonic()
        server.stop()
        self.assertLess(time.monotonic() - began, 0.5 + SLOW)
        server.stop()                            # again is no harm

    def test_where_no_thread_can_be_started_it_does_not_start(self):
        worker = Server(self.make_app(), port=0).worker
        self.addCleanup(worker.shut_down)
        with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("no more")):
            self.assertRaises(RuntimeError, worker.monitor)

    def test_fast_requests_are_not_delayed_by_blocked_ones(self):
        server = self.serve(self.make_app())
        clients, waits = [self.block(server) for _ in range(8)], []
        fast = self.client(server)
        for _ in range(100):
            began = time.monotonic()
            self.assertEqual(fast.ask()[0], 200)
            waits.append(time.monotonic() - began)
        self.assertLess(max(waits), 0.3 * SLOW)
        self.release.set()
        self.assertEqual([client.getresponse().status for client in clients], [200] * 8)

    def test_a_request_that_finds_no_thread_in_time_gets_a_503_that_says_why(self):
        server = self.serve(self.make_app(), max_threads=1, queue_timeout=0.3)
        self.release.set()
        for _ in range(3):                       # now it is known that it blocks
            self.assertEqual(self.block(server).getresponse().status, 200)
        self.release.clear()
        inside, waiting = self.block(server), self.client(server)
        waiting.request("GET", "/blocked")
        self.assertEqual(fetch(server.url)[0], 200)
        answer = waiting.getresponse()
        self.assertEqual(answer.status, 503)
        self.assertRegex(answer.read(), b"queue_timeout.*max_threads")
        self.release.set()
        self.assertEqual(inside.getresponse().read(), b"released")
        self.assertEqual(waiting.ask("/blocked")[0], 200)

    def test_max_connections_makes_others_wait(self):
        server = self.serve(self.make_app(), max_connections=4)
        clients = [self.client(server) for _ in range(4)]
        for client in clients:
            self.assertEqual(client.ask()[0], 200)
        with connect(server.url) as fifth:
            fifth.sendall(get())
            fifth.settimeout(0.3)
            with self.assertRaises(socket.timeout):
                fifth.recv(1)
            self.assertEqual(clients[0].ask()[0], 200)
            clients[0].close()
            fifth.settimeout(TIMEOUT)
            self.assertEqual(fifth.recv(12), b"HTTP/1.1 200")

    def check_exit(self, kind, where):
        """User code that raises this there costs its request, and no other."""
        class Body:
            pulled = 0

            def __iter__(self):
                return self.pull("iter", self)

            def __next__(self):
                self.pulled += 1
                return self.pull(("first", "second", "end")[self.pulled - 1], b"x" * 10)

            def pull(self, here, result):
                if here == where or (here, where) == ("first", "lazy"):
                    raise kind("user code")
                if here == "end":
                    raise StopIteration
                return result

            def close(self):
                self.pull("close", None)

        def app(environ, start_response):
            if where != "lazy" or environ["PATH_INFO"] == "/":
                start_response("200 OK", [("Content-Type", "text/plain")])
            if environ["PATH_INFO"] == "/":
                return [b"Hello World!"]
            return Body().pull("call", Body())
        framework = App()
        framework.get("/", callback=lambda: "Hello World!")
        framework.get("/exit", callback=lambda: Body().pull("call", b"") or Body())
        beginnings = "call", "iter", "lazy", "first"
        for served in (app, framework):
            server = self.serve(served, grace=0.1)
            with connect(server.url) as sock:
                sock.settimeout(2 * SLOW)
                sock.sendall(get("/exit", "Connection: close"))
                with contextlib.suppress(ConnectionResetError):      # of one that has begun
                    answer = read_all(sock)
                    self.assertEqual(b" 500 " in answer, where in beginnings)
                    self.assertEqual(answer.endswith(b"0\r\n\r\n"), where == "close")
            self.assertEqual(fetch(server.url)[2], b"Hello World!")

    def test_what_ends_a_thread_or_a_process_ends_a_request_only(self):
        at_once(self.check_exit, [
            (kind, where) for kind in (SystemExit, KeyboardInterrupt, GeneratorExit)
            for where in ("call", "iter", "lazy", "first", "second", "close")])

    def test_a_loop_that_no_thread_was_free_for_goes_on_in_the_first_that_is(self):
        app = self.make_app()
        app.get("/stream", callback=lambda: iter([bytes(100000)] * 1000))
        server = self.serve(app, max_threads=1)
        self.block(server)
        with connect(server.url, 4096) as stalled:
            stalled.sendall(get("/stream"))
            self.assertTrue(stalled.recv(1))
            client = self.client(server)
            client.request("GET", "/")
            self.release.set()
            self.assertEqual(client.getresponse().read(), b"Hello World!")

    def test_a_body_is_read_as_it_comes_where_the_route_asks_for_it(self):
        app = self.make_app()
        pieces = []

        @app.post("/stream", stream=True)
        def stream(request):
            source = request.environ["wsgi.input"]
            for data in iter(lambda: source.read1(100), b""):
                pieces.append(data)
                self.entered.release()
            return b"".join(pieces)
        server = self.serve(app)
        with connect(server.url) as sock:
            sock.sendall(b"POST /stream HTTP/1.1\r\nHost: x\r\nContent-Length: 30\r\n\r\n")
            for i in range(3):
                self.assertEqual(fetch(server.url)[0], 200)      # the loop does not wait for it
                sock.sendall(b"ten bytes.")
                self.assertTrue(self.entered.acquire(timeout=TIMEOUT))
                self.assertEqual(len(pieces), i + 1)
            sock.sendall(get("/", "Connection: close"))
            self.assertRegex(read_all(sock), rb"(?s)(ten bytes\.){3}HTTP/1.1 200 .*World!\Z")

    def test_nothing_is_read_after_a_broken_body_even_if_the_application_hides_the_error(self):
        app = self.make_app()

        @app.post("/stream", stream=True)
        def stream(request):
            with contextlib.suppress(BadRequest):
                request.query.unread or request.environ["wsgi.input"].read()
            return "hidden"
        for path in ("/stream", "/stream?unread=1"):
            with connect(self.serve(app).url) as sock:
                sock.sendall(chunked(b"x\r\n" + get(), path=path))
                self.assertRegex(read_all(sock), rb"(?s)^HTTP/1.1 200 .*hidden\Z")

    def test_a_body_may_be_refused_before_it_has_come(self):
        app = self.make_app()

        @app.post("/secret", stream=True)
        def secret(request):
            minibottle.abort(401, "Who are you?")
        server = self.serve(app)
        for size in (100, 10 ** 7, 10 ** 8):
            client = self.client(server)
            with self.subTest(size=size):
                status, headers, body = client.ask("/secret", "POST", bytes(size))
                self.assertEqual((status, b"Who are you?" in body), (401, True))
        with connect(server.url) as sock:                        # RFC 9110 10.1.1
            sock.sendall(b"POST /secret HTTP/1.1\r\nHost: x\r\nContent-Length: 30\r\n"
                         b"Expect: 100-continue\r\n\r\n")
            self.assertRegex(read_all(sock), b"^HTTP/1.1 401 ")


@unittest.skipUnless(HAS_PROC, "needs /proc")
class CommandResourcesTest(PooledTest):
    """What a server takes of memory, descriptors, threads and time."""

    def test_every_deadline_is_a_flag_and_ends_with_its_name(self):
        with serve("shop:app", "--header-timeout", "0.5", "--body-timeout", "0.6",
                   "--keepalive-timeout", "0.7", "--write-timeout", "0.8") as server, \
                contextlib.ExitStack() as stack:
            def send(data, receive_bytes=None):
                sock = stack.enter_context(connect(server.url, receive_bytes))
                sock.sendall(data)
                return sock
            began = time.monotonic()
            file, stream = send(get("/large"), 4096), send(get("/bytes/100000000"), 4096)
            head = send(b"GET / HTTP/1.1\r\n")
            body = send(b"POST /size HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nx")
            upload = send(b"POST /upload HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nx")
            silent, idle = send(b""), send(get())
            self.assertEqual(read_all(silent), b"")
            self.assertRegex(read_all(head), b"(?s)^HTTP/1.1 408 .*header_timeout")
            for sock in (body, upload):
                self.assertRegex(read_all(sock), b"(?s)^HTTP/1.1 408 .*body_timeout")
            self.assertTrue(read_all(idle).endswith(b"Hello World!"))
            for sock, line in ((file, "GET /large"), (stream, "GET /bytes")):
                server.wait_for(line)
                with self.assertRaises(ConnectionResetError):
                    read_all(sock)
            self.assertLess(time.monotonic() - began, 1 + 2 * SLOW)
            self.assertEqual(server.stop(), 0)

    def test_a_streamed_body_has_a_least_rate_too(self):
        with serve("shop:app", "--body-timeout", "0.5") as server:
            with connect(server.url) as sock:
                sock.sendall(b"POST /upload HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\n")
                sock.settimeout(0.1)
                end = time.monotonic() + 3 * SLOW
                with contextlib.suppress(ConnectionError):
                    while time.monotonic() < end:
                        sock.sendall(b"x")
                        with contextlib.suppress(socket.timeout):
                            self.assertIn(b" 408 ", sock.recv(1000))
                            break
                    else:
                        self.fail("still open")

    def test_a_reader_that_stalls_costs_no_memory(self):
        with serve("shop:app", "--workers", "0") as server:
            fetch(server.url, "/bytes/1000000")
            before = memory(server.pid)
            with connect(server.url, 4096) as sock:
                sock.sendall(get("/bytes/1000000000"))
                sock.recv(1000)
                made = [b"", b"0"]
                while made[-1] != made[-2]:
                    time.sleep(0.1)
                    made.append(fetch(server.url, "/made")[2])
                self.assertLess(memory(server.pid) - before, 4 << 20)
                self.assertLess(int(made[-1]), 50 << 20)
                reset(sock)

    @only_cpython
    def test_an_upload_that_is_streamed_costs_no_memory(self):
        with serve("shop:app", "--workers", "0") as server:
            fetch(server.url, "/upload", "POST", bytes(1000000))
            before = memory(server.pid, "VmHWM")
            for i in range(2):
                size = (200 if LONG else 100) << 20
                piece = bytes(1 << 20)
                body = (piece for _ in range(size >> 20))
                status, headers, answer = fetch(server.url, "/upload", "POST", body, {
                    } if i else {"Content-Length": str(size)})
                self.assertEqual((status, answer), (200, b"%d" % size))
            self.assertLess(memory(server.pid, "VmHWM") - before, 8 << 20)

    # What clients do: what is sent, and whether they wait for the end or go away.
    KINDS = [
        (get("/", "Connection: close"), read_all),
        (get("/") * 9 + get("/page", "Connection: close"), read_all),
        (get("/page", "Accept-Encoding: gzip", "Connection: close"), read_all),
        (get("/pieces", "Connection: close"), read_all),
        (get("/pieces", "Accept-Encoding: gzip", "Connection: close"), read_all),
        (get("/file", "Connection: close"), read_all),
        (get("/nowhere", "Connection: close"), read_all),
        (get("/size", "Connection: close"), read_all),
        (get("/raise", "Connection: close"), read_all),
        (get("/wait/.003", "Connection: close"), read_all),
        (get("/collect", "Connection: close"), read_all),
        (b"HEAD /file HTTP/1.0\r\n\r\n", read_all),
        (b"POST /size HTTP/1.0\r\nContent-Length: 600000\r\n\r\n" + bytes(600000), read_all),
        (b"POST /size HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n"
         b"\r\n5\r\n12345\r\n0\r\n\r\n", read_all),
        (b"POST /upload HTTP/1.0\r\nContent-Length: 9\r\n\r\n123456789", read_all),
        (b"nonsense\r\n\r\n", read_all),
        (b"", reset),
        (b"GET / HT", reset),
        (get("/pieces") * 3, reset),
        (get("/large"), reset),
        (get("/bytes/10000000"), reset),
        (get("/bytes/10000000"), socket.socket.close),
        (get("/wait/.003"), reset),
        (b"POST /size HTTP/1.0\r\nContent-Length: 1000000\r\n\r\n" + bytes(600000), reset),
        (b"POST /upload HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nx", reset),
    ]

    @only_cpython
    def test_requests_of_every_kind_leave_no_descriptor_and_no_memory_behind(self):
        with serve("shop:app", "--workers", "0", "--max-threads", "4", "--no-access-log",
                   MALLOC_ARENA_MAX="1") as server:      # or the threads' arenas blur it
            def ask(count):
                for i in range(count):
                    data, leave = self.KINDS[i % len(self.KINDS)]
                    with connect(server.url) as sock, contextlib.suppress(ConnectionError):
                        sock.sendall(data)
                        leave(sock)
                self.assertTrue(wait_until(lambda: descriptors(server.pid) == before))
            before = descriptors(server.pid)
            ask(1000 if LONG else 200)
            resident = memory(server.pid)
            ask(10000 if LONG else 400)
            self.assertLess(memory(server.pid) - resident, 2 << 20)
            self.assertLessEqual(len(os.listdir("/proc/%d/task" % server.pid)), 6)
            self.assertEqual(server.stop(), 0)

    def test_an_idle_server_sleeps(self):
        with serve("shop:app") as server, contextlib.closing(Client(server.url)) as client:
            client.ask("/wait/.01")              # one connection is idle, and some threads
            time.sleep(0.5)
            pids = [server.pid] + server.children()
            before = [wakes(pid) for pid in pids]
            time.sleep(3)
            self.assertLessEqual(max(wakes(pid) - n for pid, n in zip(pids, before)), 6)

    def test_it_serves_as_many_as_it_has_descriptors_for_and_then_the_others(self):
        with serve("shop:app", before=("sh", "-c", 'ulimit -n 64; exec "$0" "$@"')) as server, \
                contextlib.ExitStack() as stack:
            worker, = server.children()
            clients = [stack.enter_context(connect(server.url)) for _ in range(200)]
            for client in clients:
                client.sendall(get())
            self.assertTrue(clients[0].recv(1))
            before = cpu_seconds(worker)
            time.sleep(1)
            self.assertLess(cpu_seconds(worker) - before, 0.4)
            for client in clients:
                client.close()
            self.assertEqual(fetch(server.url)[0], 200)
            self.assertEqual(server.stop(), 0)
            self.assertEqual(len(server.err), 2, server.said())

    def test_it_survives_an_application_that_takes_all_descriptors(self):
        with serve("shop:app", before=("sh", "-c", 'ulimit -n 64; exec "$0" "$@"')) as server, \
                contextlib.closing(Client(server.url)) as client, contextlib.ExitStack() as stack:
            worker = int(client.ask("/pid")[2])
            self.assertGreater(int(client.ask("/hoard")[2]), 30)
            clients = [stack.enter_context(connect(server.url)) for _ in range(20)]
            for other in clients:
                other.sendall(get())
            before = cpu_seconds(worker)
            time.sleep(1)
            self.assertEqual(client.ask()[0], 200)
            self.assertLess(cpu_seconds(worker) - before, 0.4)
            client.ask("/release")
            for other in clients:
                self.assertEqual(other.recv(12), b"HTTP/1.1 200")
            self.assertEqual((server.stop(), server.worker), (0, server.worker))
            self.assertLessEqual(len(server.err), 2 + 4, server.said())

    def test_nothing_is_left_to_the_garbage_collector(self):
        with serve("shop:app", "--workers", "0", "--bind", "127.0.0.1:0", "--bind",
                   "unix:" + os.path.join(FOLDER, "warned"), python=("-X", "dev")) as server:
            for data, leave in self.KINDS * (2 if LONG else 1):
                with connect(server.url) as sock, contextlib.suppress(ConnectionError):
                    sock.sendall(data)
                    leave(sock)
            fetch(server.url, "/collect")
            self.assertEqual((server.stop(), server.find("Warning")), (0, None), server.said())
        script = ("import gc, minibottle, urllib.request\n"
                  "with minibottle.Server(minibottle.App(), port=0) as server:\n"
                  "    try:\n"
                  "        urllib.request.urlopen(server.url)\n"
                  "    except OSError as error:\n"
                  "        error.close()\n"
                  "del server\n"
                  "gc.collect()\n")
        self.assertEqual(finish(start=("-X", "dev", "-c", script)), (0, "", ""))


# === 15. Default app and command line =========================================

def is_served(url):
    with contextlib.suppress(OSError):
        return fetch(url)[0] == 200


class CommandTargetTest(PooledTest):
    """What may be served, and what is said of what may not."""

    def check_target(self, target):
        with serve(target, bind=not target.endswith("main")) as server:
            self.assertEqual(fetch(server.url)[::2], (200, b"Hello World!"))
            self.assertEqual((server.workers, server.stop()), ("1 worker", 0), server.said())
            self.assertEqual(len(server.err), 2, server.said())     # one line, and the end

    def test_every_form_of_a_target_is_served(self):
        at_once(self.check_target, [(target,) for target in (
            "shop", "shop:app", "shop:Shop", "shop:Corner.counter", "shop:wsgi", "shop:called",
            "shop:make_wsgi", "shop:make", "vendored.shop:main", "shop:main_of_wsgi", "shop:main",
            "vendored.shop:app")[::1 if LONG else 2]])

    def test_a_copy_in_a_package_knows_what_the_running_copy_refuses(self):
        large = b"Content-Length: 6\r\n\r\nabcdef"
        broken = b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n"
        with serve("vendored.shop:app", "--max-body", "5") as server:
            for path, rest, status, message in (
                    (b"/collected", large, b"413 Content Too Large", b"over 5 bytes (max_body)"),
                    (b"/streamed", large, b"413 Content Too Large", b"over 5 bytes (max_body)"),
                    (b"/streamed", broken, b"400 Bad Request", b"bad chunk size")):
                with self.subTest(path=path, rest=rest), connect(server.url) as sock:
                    sock.sendall(b"POST " + path + b" HTTP/1.1\r\nHost: a\r\n" + rest)
                    answer = read_all(sock)
                    self.assertTrue(answer.startswith(b"HTTP/1.1 " + status), answer)
                    self.assertIn(message, answer)
            self.assertIsNone(server.find("Traceback"), server.said())

    def check_ends(self, rows, status, check):
        """Each row is arguments, and patterns of what is said, in one message, on stderr."""
        failed = []
        for (args, *patterns), result in zip(rows, finish_each([row[0] for row in rows])):
            try:
                self.assertEqual(result[:2], [status, ""])
                for pattern in patterns:
                    self.assertRegex(result[2], pattern)
                check(result[2])
            except AssertionError as error:
                failed.append("%r: %s\n%s" % (args, error, result[2]))
        self.assertEqual(failed, [], "\n".join(failed))

    def check_one_line(self, err):
        self.assertRegex(err, r"\A(usage: (.*\n)+)?minibottle(\.py)?: .*\n\Z")

    def check_one_message(self, err):
        """One message, with the application's frames and none of ours."""
        self.assertNotIn(FILE, err)
        self.assertNotIn("importlib", err)
        self.assertEqual(err.count("minibottle: "), 1)
        self.assertLessEqual(err.count("Traceback"), 1)

    def test_what_is_wrong_on_the_command_line_is_said_with_what_there_is(self):
        self.check_ends([
            ([], "TARGET"),
            (["nowhere:app"], "nowhere", r"\bshop\b", r"\bscript\b"),
            (["shop.nowhere:app"], "nowhere"),
            (["vendored.nowhere"], "nowhere"),
            (["shop:nothing"], "nothing", r"\bapp\b", r"\bmain\b", r"\bShop\b"),
            (["shop:Corner.nothing"], "nothing", r"\bcounter\b"),
            (["shop:number"], "shop:number", r"\bint\b"),
            (["shop.py:app"], r"shop\.py", r"\bshop\b"),
            (["./shop:app"], r"\./shop"),
            (["..shop:app"], r"\.\.shop"),
            ([":app"], "module"),
            (["mains:makes_a_number"], r"\bint\b"),
            (["shop:app", "--colour", "red"], "--colour"),
            (["shop:app", "--workers", "many"], "workers", "many"),
            (["shop:app", "--grace", "-1"], "grace", "-1"),
            (["shop:app", "--keepalive-timeout", "nan"], "keepalive[_-]timeout", "nan"),
            (["shop:app", "--gzip-level", "77", "--bind", "127.0.0.1:0"], "77"),
            (["shop:app", "--bind", "a/b"], "a/b"),
            (["shop:app", "--bind", "8080"], "8080"),
            (["shop:app", "--bind", ""], "address"),
            (["shop:app", "--server", "wsgiref", "--bind", "unix:/x"], "unix:/x"),
            (["shop:app", "--bind", "127.0.0.1:65536"], "65536"),
            (["shop:main_with_a_word"], "grace", "long")], 2, self.check_one_line)

    def test_an_application_that_cannot_start_is_one_message_and_an_end(self):
        rows = [
            ("raises:app", r"raises\.py\", line 2", r"connect\(\)", "ValueError: no database"),
            ("misspelt:app", r"misspelt\.py\", line 1", "SyntaxError"),
            ("lacks:app", r"lacks\.py\", line 1", "No module named 'a_module_that_is_missing'"),
            ("mains:raises", r"mains\.py\", line 13", "ValueError: no database"),
            ("mains:returns", r"without run\(\)"),
            ("mains:exits", "out of bottles")]
        self.check_ends([([target, "--workers", workers], *patterns)
                         for target, *patterns in rows for workers in ("012" if LONG else "01")],
                        1, self.check_one_message)

    def test_the_file_itself_says_the_same(self):
        status, out, err = finish("mains:raises", start=(FILE,))
        self.assertEqual((status, out), (1, ""))
        self.check_one_message(err)

    def test_a_port_that_is_taken_is_one_line(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen(1)
            address = "127.0.0.1:%d" % taken.getsockname()[1]
            self.check_ends([(["shop:app", "--bind", address, "--workers", n], address, "in use")
                             for n in "012"], 1, self.check_one_line)
        self.check_ends([(["shop:app", "--bind", "host.invalid:80"], "host.invalid"),
                         (["shop:app", "-b", "host.invalid"], "host.invalid")],
                        1, self.check_one_line)

    def test_help_names_every_setting_and_version_the_version(self):
        helped, version = finish_each([["--help"], ["--version"]])
        self.assertEqual(version, [0, "minibottle %s\n" % minibottle.__version__, ""])
        status, out, err = helped
        self.assertEqual((status, err), (0, ""))
        for name in vars(Settings()):
            self.assertIn("--" + name.replace("_", "-"), out)


class CommandLineTest(PooledTest):

    def test_flags_beat_the_options_of_run(self):
        with serve("shop:main_with_options", "--max-body", "10") as server:
            self.assertEqual(fetch(server.url, "/size", "POST", b"12345678")[2], b"8")
            status, headers, body = fetch(server.url, "/size", "POST", b"12345678901")
            self.assertEqual((status, b"max_body" in body), (413, True), body)

    def test_the_application_imports_the_running_minibottle(self):
        for start in ((FILE,), ("-m", "minibottle")):
            with serve("shop:app", start=start) as server:
                self.assertEqual(fetch(server.url, "/same")[2], b'{"same": true, "path": true}')

    def test_the_access_log_is_in_the_combined_format_and_escapes_what_clients_say(self):
        quoted = r'"((?:[^"\\]|\\.)*)"'
        line = re.compile(r"(\S+) - - \[\d\d/[A-Z][a-z]{2}/\d{4}:\d\d:\d\d:\d\d [+-]\d{4}\] "
                          + quoted + r" (\d{3}) (\d+|-) " + quoted + " " + quoted + "\n")
        with serve("shop:app") as server:
            with connect(server.url) as sock:
                sock.sendall(get("/%1b[31m?a\\b", 'User-Agent: "a\\" \xe9\x85', "Referer: x\ty",
                                 "Connection: close"))
                read_all(sock)
            fetch(server.url, "/page")
            server.wait_for("/page")
            self.assertEqual(server.stop(), 0)
            first, second, end = server.out
        for text in (first, second):
            self.assertRegex(text, line)
            self.assertRegex(text, r"\A[ -~]+\n\Z")
        peer, request, status, size, referer, agent = line.fullmatch(first).groups()
        self.assertEqual((peer, status), ("127.0.0.1", "404"))
        self.assertRegex(request, r"\AGET /%1b\[31m\?a\\\S*b HTTP/1\.1\Z")
        self.assertTrue(agent.startswith('\\"a\\'), agent)
        self.assertEqual(line.fullmatch(second).groups(),
                         ("127.0.0.1", "GET /page HTTP/1.1", "200", "10000", "-", "-"))

    def test_no_access_log_is_none(self):
        with serve("shop:app", "--no-access-log") as server:
            fetch(server.url)
            self.assertEqual((server.stop(), server.out), (0, [None]))

    def test_several_addresses_are_served(self):
        path = os.path.join(FOLDER, "several")
        addresses = ["127.0.0.1:0", "127.0.0.1:0", "unix:" + path]
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
            addresses.append("[::1]:0")
        for workers in ("0", "2"):
            args = [arg for address in addresses for arg in ("--bind", address)]
            with serve("shop:app", "--workers", workers, *args) as server:
                self.assertEqual(len(server.urls), len(addresses))
                for url in server.urls * 2:
                    self.assertEqual(fetch(url)[::2], (200, b"Hello World!"))
                self.assertEqual((server.stop(), os.path.exists(path)), (0, False))
            if len(addresses) == 4:
                self.assertRegex(server.urls[3], r"\Ahttp://\[::1\]:\d+\Z")

    def check_unix_socket(self, workers, signum):
        path = tempfile.mktemp(dir=FOLDER)
        args = ("shop:app", "--workers", workers, "--bind", "unix:" + path)
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(path)
        with serve(*args) as server:
            self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o600)
            status, out, err = finish(*args)
            self.assertEqual((status, err.count("\n")), (1, 1), err)
            self.assertIn(path, err)
            self.assertEqual(fetch(server.url)[::2], (200, b"Hello World!"))
            self.assertEqual(server.stop(signum), 0)
        self.assertFalse(os.path.exists(path))

    def test_a_unix_socket_is_its_owners_and_left_to_nobody(self):
        at_once(self.check_unix_socket, [
            ("0", signal.SIGTERM), ("0", signal.SIGQUIT), ("1", signal.SIGQUIT)])

    def test_what_is_no_socket_is_not_replaced_by_one(self):
        path = os.path.join(FOLDER, "a file")
        with open(path, "w") as file:
            file.write("precious")
        (status, out, err), = finish_each([["shop:app", "--bind", "unix:" + path]])
        with open(path) as file:
            self.assertEqual((file.read(), status, err.count("\n")), ("precious", 1, 1))

    def test_a_server_that_cannot_bind_all_leaves_no_socket_behind(self):
        path = os.path.join(FOLDER, "left")
        for workers in ("0", "1"):
            status, out, err = finish("shop:app", "--workers", workers, "--bind", "unix:" + path,
                                      "--bind", "host.invalid:80")
            self.assertEqual((status, os.path.exists(path)), (1, False), err)

    def check_workers(self, target, flag, expected, count):
        with serve(target, *flag) as server:
            self.assertEqual(server.workers, expected)
            self.assertEqual(fetch(server.url)[0], 200)
            if HAS_PROC:
                self.assertTrue(wait_until(lambda: len(server.children()) == count))
                self.assertEqual(server.worker() == server.pid, not count)
            self.assertEqual(server.stop(), 0, server.said())

    def test_there_are_as_many_workers_as_asked_for(self):
        with contextlib.suppress(AttributeError):
            cpus = len(os.sched_getaffinity(0))
            self.check_workers("shop:app", ["--workers", "auto"],
                               "%d worker%s" % (cpus, "s" * (cpus > 1)), cpus)
        at_once(self.check_workers, [
            ("shop:app", ["--workers", "0"], "one process", 0),
            ("shop:app", [], "1 worker", 1),
            ("shop:app", ["--workers", "2"], "2 workers", 2),
            ("shop:main_of_two", [], "2 workers", 2),
            ("shop:main_of_two", ["--workers", "1"], "1 worker", 1)])

    @unittest.skipUnless(HAS_PROC, "needs /proc")
    def test_a_main_that_wants_no_workers_is_never_left_without_one(self):
        with serve("shop:main_of_none", bind=False) as server:
            self.assertNotIn("0 workers", server.workers)
            os.kill(server.worker(), signal.SIGKILL)
            self.assertTrue(wait_until(
                lambda: server.process.poll() is not None or server.children(), 3 * SLOW))

    def check_script(self, workers, signum, whole_group):
        with serve(workers, start=("script.py",), bind=False) as server:
            self.assertEqual(fetch(server.url)[::2], (200, b"Hello World!"))
            (os.killpg if whole_group else os.kill)(server.pid, signum)
            self.assertEqual((server.wait(), len(server.err)), (0, 2), server.said())

    def test_a_script_runs_itself(self):
        at_once(self.check_script, [
            ("0", signal.SIGINT, True), ("1", signal.SIGTERM, False), ("2", signal.SIGINT, True)])

    def test_a_program_that_has_threads_serves_in_one_process_and_says_so(self):
        with serve("2", "with-threads", start=("script.py",), bind=False) as server:
            self.assertEqual((server.workers, len(server.err)), ("one process", 2))
            self.assertIn("threads", server.err[0])
            self.assertEqual(fetch(server.url)[::2], (200, b"Hello World!"))
            self.assertEqual(server.stop(), 0)


class RunTest(UnitTest):
    """run() and its arguments, as Bottle has them."""

    def run_in_thread(self, *args, **options):
        """The URL of a run() in a thread: it ends with the process."""
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        threading.Thread(target=minibottle.run, args=args, daemon=True,
                         kwargs=dict(options, port=port)).start()
        url = "http://127.0.0.1:%d" % port
        self.assertTrue(wait_until(lambda: is_served(url)))
        return url

    def test_a_thread_serves_what_it_is_given_and_old_options_do_no_harm(self):
        app = app_of(lambda: "a")
        for options, said in (({"quiet": True}, ""), ({"server": "auto", "quiet": True}, ""),
                              ({"server": "paste", "quiet": True}, "paste.*by itself"),
                              ({"fast": True, "degug": 1}, "ignores degug, fast; .*grace"),
                              ({"server": "wsgiref", "host": "localhost"}, "WSGIRefServer on"),
                              ({"host": "localhost", "grace": "1"}, "main thread")):
            with self.subTest(options=options), mock.patch.object(sys, "stderr", io.StringIO()):
                self.assertEqual(fetch(self.run_in_thread(app, **options))[2], b"a")
                lines = sys.stderr.getvalue()
            self.assertRegex(lines, said or r"\A\Z")

    def test_another_server_is_a_class_an_instance_a_target_or_a_name(self):
        made = []

        class Adapter(minibottle.ServerAdapter):
            def run(self, handler):
                made.append((handler, self.host, self.port, self.options, self.quiet))
                raise KeyboardInterrupt
        app, ready = App(), Adapter("h", "7", a=1)
        names = {"mine": Adapter, "paste": ready}
        module = types.SimpleNamespace(Adapter=Adapter, __spec__=None)
        with mock.patch.dict(minibottle.server_names, names), \
                mock.patch.dict(sys.modules, a_server=module):
            for server in (Adapter, "mine", "a_server:Adapter", ready, "paste"):
                minibottle.run(app, server, host="h", port="7", quiet=True, a=1)
        self.assertEqual(made, [(app, "h", 7, {"a": 1}, True)] * 5)
        for server in (5, "json:dumps"):
            self.assertRaises(ValueError, minibottle.run, app, server)
        with self.assertRaises(ImportError):
            minibottle.run(app, "no_such_server")

    def test_plugins_config_and_debug_are_set_before_it_serves(self):
        class Adapter(minibottle.ServerAdapter):
            quiet = True

            def run(self, handler):
                seen.append((list(handler.installed), handler.config["a"], minibottle.DEBUG))
        app, seen = App(), []
        app.installed = []
        app.install = app.installed.append
        with mock.patch.object(minibottle, "DEBUG", False):
            minibottle.run(app, Adapter, plugins=[len, "json:dumps"], config={"a": "b"}, debug=True)
        self.assertEqual(seen, [([len, json.dumps], "b", True)])

    def test_what_is_imported_for_its_application_does_not_run(self):
        module = types.ModuleType("a_shop")
        loader = types.SimpleNamespace(
            create_module=lambda spec: module,
            exec_module=lambda module: (minibottle.get("/", callback=lambda: "a"),
                                        minibottle.run(), setattr(module, "made", wsgiref)))
        finder = types.SimpleNamespace(find_spec=lambda name, path=None, target=None: None
                                       if name != "a_shop" else
                                       importlib.machinery.ModuleSpec(name, loader))
        before = list(minibottle.default_app)
        with mock.patch.object(sys, "meta_path", [finder, *sys.meta_path]), \
                mock.patch.dict(sys.modules):
            app = minibottle.load_app("a_shop")
            self.assertEqual(ask(app).body, b"a")
            self.assertIs(minibottle.load("a_shop:made.util"), wsgiref.util)
        self.assertEqual((list(minibottle.default_app), minibottle.NORUN), (before, False))
        self.assertIs(minibottle.load_app("json:dumps"), json.dumps)

    def test_a_target_without_a_name_is_app_or_else_what_the_shortcuts_fill(self):
        module = types.ModuleType("a_shop")
        with mock.patch.dict(sys.modules, a_shop=module), App() as filled:
            self.assertIs(minibottle.load_target("a_shop"), filled)
            with self.assertRaisesRegex(UsageError, "no 'app' in a_shop"):
                minibottle.load_target("a_shop:app")
            module.app = App()
            self.assertIs(minibottle.load_target("a_shop"), module.app)


class ExtTest(UnitTest):
    """`from bottle.ext import x` is bottle_x, and `import bottle` this file, where it is asked."""

    def setUp(self):
        patch = mock.patch.dict(sys.modules)
        patch.start()
        self.addCleanup(patch.stop)
        self.plugin = sys.modules["bottle_a_plugin"] = types.ModuleType("bottle_a_plugin")
        self.plugin.item = "value"

    def test_plugins_are_found_under_both_names(self):
        sys.modules.pop("bottle", None)
        minibottle.install_as_bottle()
        minibottle.install_as_bottle()
        import bottle
        self.assertIs(bottle, minibottle)
        for name in ("bottle", "minibottle"):
            names = {}
            exec(f"from {name}.ext import a_plugin\nimport {name}.ext.a_plugin as same\n"
                 f"from {name}.ext.a_plugin import item\nfrom {name} import ext", names)
            self.assertIs(names["a_plugin"], self.plugin)
            self.assertIs(names["same"], self.plugin)
            self.assertEqual(names["item"], "value")
            with self.assertRaisesRegex(ImportError, "bottle_missing"):
                importlib.import_module(name + ".ext.missing")
        self.assertEqual(self.plugin.__name__, "bottle_a_plugin")
        self.assertIsNone(importlib.util.find_spec("email.ext"))

    def test_another_bottle_is_left_alone(self):
        sys.modules["bottle"] = other = types.ModuleType("bottle")
        self.assertRaises(RuntimeError, minibottle.install_as_bottle)
        self.assertIs(sys.modules["bottle"], other)


class CommandOptionsTest(PooledTest):
    """The command line's options that Bottle has too."""

    def test_short_flags_and_another_server(self):
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            address = "127.0.0.1:%d" % sock.getsockname()[1]
        with Command("shop:app", "-s", "wsgiref", "-b", address, bind=False) as server:
            server.wait_for("WSGIRefServer on " + address)
            self.assertTrue(wait_until(lambda: is_served("http://" + address)))
            server.stop()
        with serve("shop:app", "--server", "gunicorn", "--debug") as server:
            server.wait_for("gunicorn.*by itself")
            self.assertEqual(fetch(server.url)[2], b"Hello World!")

    def test_an_unknown_option_of_run_is_named_and_costs_nothing(self):
        with serve("shop:main_with_a_typo", bind=False) as server:
            server.wait_for("ignores colour")
            self.assertEqual(fetch(server.url)[0], 200)

    def test_quiet_is_quiet(self):
        path = os.path.join(FOLDER, "quiet")
        with Command("shop:app", "--quiet", "--bind", "unix:" + path) as server:
            self.assertTrue(wait_until(lambda: is_served("unix:" + path)))
            self.assertEqual((server.stop(), server.err), (0, [None]))


@unittest.skipUnless(LONG, "needs MINIBOTTLE_LONG=1")
class ReloadTest(PooledTest):
    """run(reloader=True) and --reload."""

    def check_reload(self, start, *args):
        with socket.socket() as sock, tempfile.TemporaryDirectory() as folder:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
            sock.close()
            moments = itertools.count(int(time.time()))

            def edit(text):
                path = os.path.join(folder, "texts")
                with open(path, "w") as file:
                    file.write(text)
                os.utime(path, (next(moments),) * 2)
                os.replace(path, path + ".py")
            with open(os.path.join(folder, "edited.py"), "w") as file:
                file.write("import itertools, os, minibottle, texts\n"
                           "app = minibottle.default_app()\n"
                           "app.get('/', callback=lambda: texts.text)\n"
                           "app.get('/pid', callback=lambda: str(os.getpid()))\n"
                           "app.get('/endless', callback=lambda: itertools.repeat('x'))\n"
                           "if __name__ == '__main__':\n"
                           "    minibottle.run(port=%d, reloader=True, interval=0.1)\n" % port)
            edit("text = 'first'")
            page = os.path.join(folder, "views", "page.tpl")
            os.mkdir(os.path.dirname(page))
            open(page, "w").close()
            os.utime(page, (1, 1))
            with Command(*args, "--bind=127.0.0.1:%d" % port, start=start, bind=False,
                         cwd=folder) as server:
                url = server.started().url
                self.assertEqual((url, fetch(url)[2]), ("http://127.0.0.1:%d" % port, b"first"))
                edit("text = ")
                server.wait_for("SyntaxError")
                edit("text = 'second'")
                self.assertTrue(wait_until(lambda: is_served(url)))
                self.assertEqual(fetch(url)[2], b"second")
                first = fetch(url, "/pid")[2]
                with connect(url) as stream:
                    stream.sendall(get("/endless"))
                    stream.recv(1)
                    os.utime(page, (2, 2))

                    def is_new():
                        with contextlib.suppress(OSError, http.client.HTTPException):
                            return fetch(url, "/pid")[2] != first
                    self.assertTrue(wait_until(is_new))
                self.assertEqual(server.stop(), 0)
                self.assertFalse(is_served(url))

    def test_a_server_starts_anew_when_a_file_changes_and_no_stream_keeps_it_from_that(self):
        at_once(self.check_reload, [
            (("edited.py",),), (("-m", "minibottle"), "edited:app", "--reload")])


@unittest.skipUnless(LONG, "needs MINIBOTTLE_LONG=1")
class CommandOnPoorSystemTest(PooledTest):
    """What may be missing where the server runs: it serves, and says at most one line."""

    def check_pages(self, url):
        for _ in range(5):
            self.assertEqual(fetch(url)[::2], (200, b"Hello World!"))
            self.assertEqual(fetch(url, "/raise")[0], 500)
            self.assertEqual(len(fetch(url, "/page")[2]), 10000)

    def check_without_output(self, shell, workers):
        path = tempfile.mktemp(dir=FOLDER)
        with Command("shop:app", "--bind", "unix:" + path, "--workers", workers,
                     before=("sh", "-c", 'exec "$0" "$@" ' + shell)) as server:
            self.assertTrue(wait_until(lambda: is_served("unix:" + path)))
            self.check_pages("unix:" + path)
            self.assertEqual((server.stop(), server.out, server.err), (0, [None], [None]))

    def test_without_standard_output_and_error(self):
        at_once(self.check_without_output, [
            (">&- 2>&-", "0"), ("<&- >&- 2>&-", "1")])

    def test_with_an_output_that_nobody_reads_any_more(self):
        for workers in "01":
            reader, writer = os.pipe()
            os.close(reader)
            path = tempfile.mktemp(dir=FOLDER)
            process = subprocess.Popen(
                [sys.executable, FILE, "shop:app", "--bind", "unix:" + path, "--workers", workers],
                cwd=FOLDER, env=make_environment(), stdout=writer, stderr=writer)
            try:
                os.close(writer)
                self.assertTrue(wait_until(lambda: is_served("unix:" + path)))
                self.check_pages("unix:" + path)
                process.terminate()
                self.assertEqual(process.wait(TIMEOUT), 0)
            finally:
                process.kill()
                process.wait()

    def check_no_disk(self, *before):
        with serve("shop:app", before=before) as server:
            self.check_pages(server.url)
            self.assertEqual(fetch(server.url, "/size", "POST", bytes(500000))[2], b"500000")
            status, headers, body = fetch(server.url, "/size", "POST", bytes(600000))
            self.assertEqual(status, 413, body)
            self.assertRegex(body, b"spool_threshold|max_body")
            self.assertRegex(server.said(), "spool_threshold|max_body")
            self.assertEqual(server.stop(), 0)

    def test_without_a_place_for_files(self):
        self.check_no_disk("sh", "-c", 'ulimit -f 0; exec "$0" "$@"')

    @unittest.skipUnless(IS_ROOT and shutil.which("unshare"), "needs root and unshare")
    def test_on_a_read_only_system(self):
        script = ("mount --make-rprivate / && mount -o remount,bind,ro / && "
                  "mount -t tmpfs -o ro none /dev/shm && ! touch /tmp/x 2>/dev/null && "
                  'exec "$0" "$@"')
        if subprocess.call(["unshare", "-m", "sh", "-c", script, "true"]):
            self.skipTest("no mount here")
        self.check_no_disk("unshare", "-m", "sh", "-c", script)

    @unittest.skipUnless(IS_ROOT and shutil.which("unshare"), "needs root and unshare")
    def test_as_the_first_process_it_reaps_orphans_and_obeys(self):
        before = ("unshare", "-pf", "--mount-proc")
        if subprocess.call([*before, "true"]):
            self.skipTest("no unshare here")
        with serve("shop:app", before=before) as server:
            master, = children(server.pid)
            for _ in range(5):
                self.assertEqual(fetch(server.url, "/orphan")[0], 200)
            self.assertTrue(wait_until(lambda: len(children(master)) == 1), "not reaped")
            os.kill(master, signal.SIGTERM)
            self.assertEqual(server.wait(), 0)

    def check_eight_sleepers(self, server):
        """Eight that wait a second wait together."""
        began = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda i: fetch(server.url, "/wait/1")[0], range(8)))
        self.assertEqual(answers, [200] * 8)
        self.assertLess(time.monotonic() - began, 1 + 3 * SLOW)

    def test_eight_requests_that_sleep_a_second_sleep_together(self):
        with serve("shop:app") as server:
            self.check_eight_sleepers(server)

    def test_without_fork_it_says_so_and_serves_with_threads(self):
        with serve("shop:app", "--workers", "2", patch="import os\ndel os.fork\n") as server:
            self.assertEqual((len(server.err), server.workers), (2, "one process"), server.err)
            self.assertIn("no fork", server.err[0])
            self.check_eight_sleepers(server)
            self.assertEqual(server.stop(), 0)

    def test_without_epoll(self):
        with serve("shop:app", patch="import select\ndel select.epoll\n") as server:
            with contextlib.ExitStack() as stack:
                clients = [stack.enter_context(contextlib.closing(Client(server.url)))
                           for _ in range(50)]
                for path, size in (("/", 12), ("/page", 10000), ("/file", os.path.getsize(FILE))):
                    for client in clients:
                        client.request("GET", path)
                    for client in clients:
                        self.assertEqual(len(client.getresponse().read()), size)
            self.check_eight_sleepers(server)
            self.assertEqual(server.stop(), 0)

    def test_without_a_network_to_ask(self):
        patch = ("import socket\n"
                 "def refuse(*args, **options):\n"
                 "    raise OSError('asked the network')\n"
                 "for name in ('getaddrinfo', 'gethostbyname', 'gethostbyname_ex', 'getfqdn',\n"
                 "             'gethostbyaddr', 'getnameinfo', 'create_connection'):\n"
                 "    setattr(socket, name, refuse)\n"
                 "socket.socket.connect = socket.socket.connect_ex = refuse\n")
        with serve("shop:app", patch=patch) as server:
            self.check_pages(server.url)
            for path, method, expected in (("/nowhere", "GET", 404), ("/size", "GET", 405),
                                           ("/raise", "GET", 500), ("/", "BREW", 405)):
                status, headers, body = fetch(server.url, path, method)
                self.assertEqual(status, expected)
                self.assertNotRegex(body, b"(src|href)=|https?://(?!127)")
            with connect(server.url) as sock:
                sock.sendall(b"GET nonsense\r\n\r\n")
                self.assertIn(b" 400 ", read_all(sock))
            self.assertEqual((server.stop(), server.find("asked the network")), (0, None))


# === 16. Examples =============================================================

EXAMPLES = {        # module: expression that gives the WSGI application
    "hello": lambda module: module.app,
    "aggregate": lambda module: module.app,
    "example_bottle": lambda module: module.Service(),
    "example_flask": lambda module: module.app,
    "example_tornado": lambda module: module.make_app(),
    "chat": lambda module: module.app,
    "plot": lambda module: module.app,
    "sessions": lambda module: module.app,
    "upload": lambda module: module.app,
    "dashboard": lambda module: module.app,
}
LONGER = {"chat": 80, "dashboard": 175, "plot": 80, "sessions": 115, "upload": 80}        # lines
# Files to lay beside minibottle.py: lines.
VENDORED = {"adapters": 75, "client": 805, "cross_origin": 55, "debugging": 270, "events": 95,
            "ext": 120, "gzip_middleware": 45, "ini": 30, "jinja": 45, "proxies": 180,
            "reloading": 90, "resources": 45, "route_list": 70, "service": 110, "status": 195,
            "testing": 390, "tls": 185, "websocket": 1055}
SERVICES = ("example_bottle", "example_flask", "example_tornado")


def load_example(name):
    """The WSGI application of examples/NAME.py; skips the test where Flask is not installed."""
    if name == "example_flask" and importlib.util.find_spec("flask") is None:
        raise unittest.SkipTest("needs flask")
    return EXAMPLES[name](importlib.import_module("examples." + name))


def companion_path(name):
    return os.path.join(ROOT, "examples", f"minibottle_{name}.py")


def read_transcript(name):
    """What an example's docstring shows: (run command, curl command, answer)."""
    with open(os.path.join(ROOT, "examples", name + ".py"), encoding="utf-8") as file:
        run, curl, answer = re.search(
            r'    \$ (python .+)\n    \$ (curl .+)\n((?:.|\n)+?)"""', file.read()).groups()
    return run, curl, textwrap.dedent(answer).strip()


class ExampleFilesTest(unittest.TestCase):

    def test_every_example_is_listed_and_short(self):
        directory = os.path.join(ROOT, "examples")
        names = {name[:-3] for name in os.listdir(directory) if name.endswith(".py")}
        longest = {**LONGER, **{"minibottle_" + name: size for name, size in VENDORED.items()}}
        self.assertEqual(names, {*EXAMPLES, *longest})
        self.assertEqual(set(VENDORED), set(minibottle.COMPANIONS))
        for name in names:
            with self.subTest(example=name), open(os.path.join(directory, name + ".py")) as file:
                self.assertLessEqual(len(file.readlines()), longest.get(name, 40))

    def test_the_flask_example_does_not_know_minibottle(self):
        with open(os.path.join(ROOT, "examples", "example_flask.py")) as file:
            code = file.read().split('"""')[2]
        self.assertNotIn("minibottle", code)


class ExamplesInProcessTest(unittest.TestCase):
    """Each example is tested the way its users test, without a socket."""

    def test_hello_by_the_test_client(self):
        client = TestClient(load_example("hello"))
        answer = client.get("/")
        self.assertEqual((answer.status, answer.text), ("200 OK", "Hello World!"))
        self.assertEqual(client.head("/").body, b"")
        self.assertEqual(client.get("/api").status_code, 404)

    @needs("webtest")
    def test_the_bottle_service_by_webtest(self):
        import webtest
        client = webtest.TestApp(load_example("example_bottle"))
        self.assertEqual(client.get("/").text, "Hello World!")
        self.assertEqual(client.get("/").content_type, "text/plain")
        answer = client.post("/api", headers={"Accept-Language": "en-GB"})
        self.assertEqual(answer.json, {"language": "en-GB"})
        self.assertEqual(client.post("/api").json, {"language": None})
        self.assertIn("POST", client.get("/api", status=405).headers["Allow"])

    def test_the_flask_service_by_flasks_test_client(self):
        client = load_example("example_flask").test_client()
        self.assertEqual(client.get("/").text, "Hello World!")
        answer = client.post("/api", headers={"Accept-Language": "en-GB"})
        self.assertEqual(answer.json, {"language": "en-GB"})
        self.assertEqual(client.get("/api").status_code, 405)

    def test_the_handler_service_by_the_test_client(self):
        client = TestClient(load_example("example_tornado"))
        answer = client.get("/")
        self.assertEqual((answer.status_code, answer.text), (200, "Hello World!"))
        self.assertEqual(answer.headers["content-type"], "text/plain; charset=utf-8")
        answer = client.post("/api", headers={"Accept-Language": "en-GB"})
        self.assertEqual(answer.json, {"language": "en-GB"})
        answer = client.get("/api")
        self.assertEqual(answer.status_code, 405)
        self.assertIn("POST", answer.headers["Allow"])

    def test_the_plot_goes_on_where_its_reader_was(self):
        client = TestClient(load_example("plot"))
        self.assertIn('new EventSource("wave")', client.get("/").text)
        for headers, ids in (({}, "012"), ({"Last-Event-ID": "1"}, "2"),
                             ({"Last-Event-ID": "rubbish"}, "012")):
            answer = client.get("/wave?until=2", headers)
            self.assertEqual(answer.headers["Content-Type"], "text/event-stream")
            self.assertEqual(re.findall("id: (.+)", answer.text), list(ids))

    def test_the_three_services_by_any_test_client(self):
        for name in SERVICES:
            with self.subTest(example=name):
                client = TestClient(validator(load_example(name)))
                self.assertEqual(client.get("/").body, b"Hello World!")
                answer = client.post("/api", headers={"Accept-Language": "de, en;q=0.5"})
                self.assertEqual(answer.json, {"language": "de, en;q=0.5"})
                self.assertEqual(client.get("/api").status_code, 405)


class ServiceChecks(OverSocket):
    """What the small service answers over a socket, whichever way it is written and served."""

    def test_get_says_hello(self):
        status, headers, body = fetch(self.url)
        self.assertEqual((status, body), (200, b"Hello World!"))
        status, headers, body = fetch(self.url, method="HEAD")
        self.assertEqual((status, body), (200, b""))

    def test_post_answers_the_language_as_json(self):
        for language in ("en-GB", "de, en;q=0.5", None):
            with self.subTest(language=language):
                headers = {"Accept-Language": language} if language else {}
                status, headers, body = fetch(self.url, "/api", "POST", None, headers)
                self.assertEqual(status, 200)
                self.assertEqual(headers.get_content_type(), "application/json")
                self.assertEqual(json.loads(body.decode()), {"language": language})

    def test_get_of_the_api_is_a_405_that_allows_post(self):
        status, headers, body = fetch(self.url, "/api")
        self.assertEqual(status, 405)
        self.assertIn("POST", re.split(r"\s*,\s*", headers["Allow"]))

    def test_one_connection_serves_many_requests(self):
        connection = Client(self.url)
        with contextlib.closing(connection):
            for i in range(20):
                language = "x-{}".format(i)
                connection.request("POST", "/api", headers={"Accept-Language": language})
                answer = json.loads(connection.getresponse().read().decode())
                self.assertEqual(answer, {"language": language})

    @needs("requests")
    def test_requests_gets_the_same(self):
        import requests
        with requests.Session() as session:
            session.trust_env = False
            self.assertEqual(session.get(self.url, timeout=TIMEOUT).text, "Hello World!")
            answer = session.post(self.url + "/api", timeout=TIMEOUT,
                                  headers={"Accept-Language": "fr"})
            self.assertEqual(answer.json(), {"language": "fr"})
            self.assertEqual(session.get(self.url + "/api", timeout=TIMEOUT).status_code, 405)

    @unittest.skipUnless(CURL, "needs curl")
    def test_curl_gets_the_same(self):
        curl = [CURL, "-sS", "--noproxy", "*", "--max-time", str(TIMEOUT), "-w", " %{http_code}"]
        for args, expected in ((["/"], "Hello World! 200"),
                               (["/", "--compressed", "--http1.0"], "Hello World! 200"),
                               (["/api", "-X", "POST", "-H", "Accept-Language: fr"], '"fr"'),
                               (["/api"], " 405")):
            with self.subTest(args=args):
                output = subprocess.check_output(curl + [self.url + args[0]] + args[1:])
                self.assertIn(expected, output.decode())


class BottleServiceOnBuiltinServerTest(ServiceChecks, unittest.TestCase):

    @staticmethod
    def serve():
        return serve_builtin(load_example("example_bottle"))


class FlaskServiceOnBuiltinServerTest(ServiceChecks, unittest.TestCase):

    @staticmethod
    def serve():
        return serve_builtin(load_example("example_flask"))


class HandlerServiceOnBuiltinServerTest(ServiceChecks, unittest.TestCase):

    @staticmethod
    def serve():
        return serve_builtin(load_example("example_tornado"))


class HandlerServiceOnWsgirefTest(ServiceChecks, unittest.TestCase):

    @staticmethod
    def serve():
        return serve_wsgiref(load_example("example_tornado"))


@needs("gunicorn")
class HandlerServiceOnGunicornTest(ServiceChecks, unittest.TestCase):

    @staticmethod
    def serve():
        return serve_gunicorn("examples.example_tornado:make_app()")


@needs("waitress")
class BottleServiceOnWaitressTest(ServiceChecks, unittest.TestCase):

    @staticmethod
    def serve():
        return serve_waitress("examples.example_bottle:Service")


class HelloOverSocketTest(unittest.TestCase):

    def test_http_client_gets_hello_and_a_404_elsewhere(self):
        with Server(load_example("hello"), port=0) as server:
            self.assertEqual(server.url, "http://127.0.0.1:{}".format(server.port))
            self.assertEqual(fetch(server.url)[::2], (200, b"Hello World!"))
            self.assertEqual(fetch(server.url, "/api")[0], 404)


class DemoAppTest(unittest.TestCase):
    """The standard library's own application: one page that prints its environ."""

    def test_http_client_gets_the_environ(self):
        with Server(wsgiref.simple_server.demo_app, port=0) as server:
            status, headers, body = fetch(server.url, "/a/b?c=d")
        self.assertEqual((status, headers["Content-Encoding"]), (200, None))
        for line in ("Hello world!", "PATH_INFO = '/a/b'", "QUERY_STRING = 'c=d'"):
            self.assertIn(line, body.decode().splitlines())

    @needs("requests")
    def test_requests_gets_it_compressed(self):
        import requests
        with Server(wsgiref.simple_server.demo_app, port=0, gzip_min=100) as server:
            with requests.Session() as session:
                session.trust_env = False
                answer = session.get(server.url, timeout=TIMEOUT)
        self.assertEqual(answer.headers["Content-Encoding"], "gzip")
        self.assertTrue(answer.text.startswith("Hello world!\n"))


class Desk:
    """An application for clients of all kinds: what it was sent comes back as JSON."""

    SECRET = "s3cret"
    DATA = bytes(range(256)) * 16

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory()
        with open(os.path.join(self.folder.name, "data.bin"), "wb") as file:
            file.write(self.DATA)
        self.said = queue.Queue()
        self.app = App()
        self.app.get("/data.bin", callback=lambda: static_file("data.bin", self.folder.name))
        self.app.get("/go/<name>", callback=lambda name: redirect("../echo/" + name + "?q=" + name))
        self.app.route("/echo/<name>", ["GET", "POST"], self.echo)
        self.app.get("/cookies", callback=self.set_cookies)
        self.app.post("/say", callback=lambda: self.said.put(request.json))

    def echo(self, name):
        return {"name": name, "query": list(request.query.allitems()),
                "forms": list(request.forms.allitems()),
                "files": [[key, file.raw_filename, file.content_type,
                           hashlib.md5(file.file.read()).hexdigest()]
                          for key, file in request.files.allitems()],
                "cookies": dict(request.cookies),
                "signed": request.get_cookie("signed", secret=self.SECRET)}

    def set_cookies(self):
        response.set_cookie("plain", "a b")
        response.set_cookie("signed", {"who": UNICODE}, self.SECRET)


def md5(data):
    return hashlib.md5(data).hexdigest()


class ClientsTest(UnitTest):
    """What people ask servers with: requests over a socket, WebTest without one."""

    def setUp(self):
        self.desk = Desk()
        self.addCleanup(self.desk.folder.cleanup)

    def open_requests(self):
        """requests.Session().request, with the server's URL before each path."""
        import requests
        server, session = Server(self.desk.app, port=0), requests.Session()
        session.trust_env = False
        server.__enter__()
        self.addCleanup(server.__exit__, None, None, None)
        self.addCleanup(session.close)
        return lambda method, path, **options: session.request(
            method, server.url + path, timeout=TIMEOUT, **options)

    @needs("requests")
    def test_requests_sends_text_files_and_cookies(self):
        send = self.open_requests()
        big = b"\r\n--" * 200000
        got = send("POST", "/echo/" + UNICODE, params={"q": UNICODE, "a b": "&=%"},
                   data={"x": UNICODE, "y": ["1", "2"]}, files=[
                       ("f", (UNICODE + ".txt", b"1", "text/plain")), ("f", ("b", big))]).json()
        self.assertEqual(got, {
            "name": UNICODE, "query": [["q", UNICODE], ["a b", "&=%"]],
            "forms": [["x", UNICODE], ["y", "1"], ["y", "2"]], "cookies": {}, "signed": None,
            "files": [["f", UNICODE + ".txt", "text/plain", md5(b"1")], ["f", "b", "", md5(big)]]})
        got = send("POST", "/echo/x", data={"x": UNICODE}).json()
        self.assertEqual((got["forms"], got["files"]), ([["x", UNICODE]], []))
        send("GET", "/cookies")
        got = send("GET", "/echo/x").json()
        self.assertEqual((got["cookies"]["plain"], got["signed"]), ("a b", {"who": UNICODE}))

    @needs("requests")
    def test_requests_follows_a_relative_location(self):
        answer = self.open_requests()("GET", "/go/" + UNICODE)
        first, = answer.history
        self.assertEqual((first.status_code, first.headers["Location"][:8]), (303, "../echo/"))
        self.assertEqual((answer.json()["name"], answer.json()["query"]), (
            UNICODE, [["q", UNICODE]]))

    @needs("requests")
    def test_requests_asks_for_ranges(self):
        send, data = self.open_requests(), self.desk.DATA
        etag = send("HEAD", "/data.bin").headers["ETag"]
        for headers, status, body in (
                ({}, 200, data), ({"Range": "bytes=0-9"}, 206, data[:10]),
                ({"Range": "bytes=-9"}, 206, data[-9:]), ({"Range": "bytes=9-"}, 206, data[9:]),
                ({"Range": "bytes=9-", "If-Range": etag}, 206, data[9:]),
                ({"Range": "bytes=9-", "If-Range": '"other"'}, 200, data),
                ({"Range": "bytes=4096-"}, 416, None), ({"If-None-Match": etag}, 304, b"")):
            answer = send("GET", "/data.bin", headers=headers)
            with self.subTest(headers=headers):
                self.assertEqual(answer.status_code, status)
                if body is not None:
                    self.assertEqual(answer.content, body)
        self.assertEqual(send("GET", "/data.bin", headers={"Range": "bytes=5000-"}).headers[
            "Content-Range"], "bytes */4096")

    @needs("webtest")
    def test_webtest_sends_and_asks_the_same(self):
        with warnings.catch_warnings():      # WebOb imports cgi
            warnings.simplefilter("ignore")
            import webtest
        client, path = webtest.TestApp(self.desk.app), "/echo/" + urllib.parse.quote(UNICODE)
        got = client.post(path, params=[("x", UNICODE)], upload_files=[
            ("f", UNICODE + ".txt", b"1", "text/plain"), ("f", "b", b"2")]).json
        self.assertEqual((got["name"], got["forms"], [file[:2] for file in got["files"]]), (
            UNICODE, [["x", UNICODE]], [["f", UNICODE + ".txt"], ["f", "b"]]))
        self.assertEqual(client.post(path, [("x", UNICODE)]).json["forms"], [["x", UNICODE]])
        client.get("/cookies")
        self.assertEqual(client.get(path).json["signed"], {"who": UNICODE})
        got = client.get("/go/b").follow()
        self.assertEqual((got.json["name"], got.json["query"]), ("b", [["q", "b"]]))
        part = client.get("/data.bin", headers={"Range": "bytes=5-9"}, status=206)
        self.assertEqual((part.body, part.headers["Content-Range"]), (
            self.desk.DATA[5:10], "bytes 5-9/4096"))
        client.get("/data.bin", headers={"Range": "bytes=9999-"}, status=416)


# A form with three files, submitted by itself into a frame, then by fetch; then a range of a file.
UPLOADING = """<!doctype html><meta charset=utf-8>
<form method=post action="echo/form" enctype=multipart/form-data target=frame>
<input name="text"><input type=file name="files" multiple></form><iframe name=frame></iframe>
<script>
const form = document.forms[0], frame = document.querySelector("iframe"), NAME = %s
const chosen = new DataTransfer()
for (const [name, text] of [[NAME + ".txt", NAME], ['a"b.txt', "2"], ["c", ""]])
    chosen.items.add(new File([text], name, {type: "text/plain"}))
form.text.value = NAME
form.files.files = chosen.files
frame.onload = async () => {
    if (frame.contentWindow.location.pathname != "/echo/form")
        return
    const shown = JSON.parse(frame.contentDocument.body.textContent)
    const sent = await fetch("echo/" + NAME + "?q=" + NAME,
                             {method: "POST", body: new FormData(form)})
    const part = await fetch("data.bin", {headers: {Range: "bytes=65-69"}})
    fetch("say", {method: "POST", headers: {"Content-Type": "application/json"},
                  body: JSON.stringify([shown, await sent.json(), part.status,
                                        part.headers.get("Content-Range"), await part.text()])})
}
form.submit()
</script>"""


@unittest.skipUnless(BROWSER, "needs Chromium")
class BrowserTest(unittest.TestCase):

    FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--no-proxy-server", "--disable-dev-shm-usage")

    def dump_dom(self, app, *flags, path="/", **settings):
        """What headless Chromium makes of a page, as text."""
        with tempfile.TemporaryDirectory() as profile, Server(app, port=0, **settings) as server:
            return subprocess.run(
                [BROWSER, *self.FLAGS, *flags, "--user-data-dir=" + profile, "--dump-dom",
                 server.url + path],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                timeout=2 * TIMEOUT, check=True).stdout.decode()

    def check_shown(self, app, expected):
        self.assertIn(expected, self.dump_dom(app))

    @unittest.skipUnless(LONG, "needs MINIBOTTLE_LONG=1")
    def test_chromium_shows_hello_and_the_standard_librarys_application(self):
        at_once(self.check_shown, [
            (load_example("hello"), "<html><head></head><body>Hello World!</body></html>"),
            (wsgiref.simple_server.demo_app, "wsgi.url_scheme = 'http'")])

    @unittest.skipUnless(LONG, "needs MINIBOTTLE_LONG=1")
    def test_chromium_plots_events(self):
        app, example = App(), load_example("plot")
        app.merge(example)  # its page, which is loaded when the plot has begun
        app.get("/", callback=lambda: TestClient(example).get("/").text + "<img src=hold>")
        app.get("/hold", callback=lambda: time.sleep(0.5))
        dom = self.dump_dom(app)
        self.assertRegex(dom, r'<polyline points="0 0 1 -0\.1 2 -0\.199 3 ')

    @unittest.skipUnless(LONG, "needs MINIBOTTLE_LONG=1")
    def test_chromium_uploads_three_files_at_once_and_downloads_a_range(self):
        desk = Desk()
        self.addCleanup(desk.folder.cleanup)
        desk.app.get("/", callback=lambda: UPLOADING % json.dumps(UNICODE))
        self.dump_dom(desk.app, "--virtual-time-budget=20000")
        shown, sent, *download = desk.said.get(timeout=TIMEOUT)
        files = [["files", UNICODE + ".txt", "text/plain", md5(UNICODE.encode())],
                 ["files", 'a"b.txt', "text/plain", md5(b"2")],
                 ["files", "c", "text/plain", md5(b"")]]
        for got, name, query in ((shown, "form", []), (sent, UNICODE, [["q", UNICODE]])):
            self.assertEqual((got["name"], got["query"], got["forms"], got["files"]),
                             (name, query, [["text", UNICODE]], files))
        self.assertEqual(download, [206, "bytes 65-69/4096", "ABCDE"])

    @unittest.skipUnless(LONG, "needs MINIBOTTLE_LONG=1")
    def test_chromium_draws_the_figures(self):
        dom = self.dump_dom(load_example("dashboard"), "--virtual-time-budget=5000",
                            path="/dashboard", status="/figures")
        self.assertRegex(dom, r'<span>memory</span>.*\n?.*<polyline points="11\d,1')
        self.assertIn(f"<td>{os.getpid()}</td>", dom)

    @unittest.skipUnless(LONG, "needs MINIBOTTLE_LONG=1")
    def test_chromium_shows_where_a_handler_has_failed(self):
        with mock.patch.object(minibottle, "DEBUG", True), self.assertLogs("minibottle", "ERROR"):
            dom = self.dump_dom(app_of(lambda: {}["<b>"]))
        self.assertIn("<h1>KeyError: '&lt;b&gt;'</h1>", dom)
        self.assertRegex(dom, "<details open=.*test_minibottle.py:")

    @unittest.skipUnless(LONG, "needs MINIBOTTLE_LONG=1")
    def test_chromium_shows_the_three_services(self):
        at_once(self.check_shown, [(load_example(name), "Hello World!") for name in SERVICES])


@unittest.skipUnless(hasattr(os, "fork"), "needs fork and signals")
@unittest.skipUnless(LONG, "needs MINIBOTTLE_LONG=1")
class CommandExamplesTest(PooledTest):
    """`python minibottle.py TARGET` for every kind of target that an example offers."""

    def check_target(self, target):
        with serve(target, start=("minibottle.py",), cwd=ROOT) as server:
            self.assertEqual(fetch(server.url)[::2], (200, b"Hello World!"))
            self.assertEqual((server.stop(), len(server.err)), (0, 2), server.said())

    def test_an_application_a_class_a_factory_and_a_main_are_served(self):
        at_once(self.check_target, [("examples." + target,) for target in (
            "hello:app", "hello:main", "example_bottle:Service", "example_bottle:main",
            "example_tornado:make_app", "example_tornado:main")[::1 if LONG else 2]])

    @needs("flask")
    def test_a_flask_application_is_served(self):
        self.check_target("examples.example_flask:app")

    def check_docstring(self, name):
        run, curl, answer = read_transcript(name)
        with serve(*shlex.split(run)[1:], start=(), cwd=ROOT) as server:
            args = shlex.split(re.sub(r"http://127\.0\.0\.1:\d+", server.url, curl))
            output = subprocess.check_output([CURL, "-sS", "--noproxy", "*", *args[1:]])
        self.assertEqual(output.decode().strip(), answer)

    @unittest.skipUnless(CURL, "needs curl")
    def test_every_docstring_tells_the_truth(self):
        at_once(self.check_docstring, [(name,) for name in EXAMPLES if name != "example_flask"
                                       or importlib.util.find_spec("flask")])

    def test_a_main_needs_no_flag_and_a_script_runs_itself(self):
        source = ("from examples.example_bottle import Service\n"
                  "def main():\n"
                  "    Service().run(host='127.0.0.1', port=0)\n"
                  "if __name__ == '__main__':\n"
                  "    main()\n")
        with open(os.path.join(FOLDER, "own_service.py"), "w") as file:
            file.write(source)
        for args in ((FILE, "own_service:main"), ("own_service.py",)):
            with serve(*args, start=(), bind=False) as server:
                self.assertEqual(fetch(server.url)[::2], (200, b"Hello World!"))
                self.assertEqual(server.stop(), 0, server.said())


# === 17. Companion files ======================================================

class CompanionTest(unittest.TestCase):
    """The files that may lie beside minibottle.py are found there, under its name."""

    def lay(self, *names):
        """A folder with copies of minibottle.py and of some companions."""
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        shutil.copy(FILE, os.path.join(folder.name, "minibottle.py"))
        for name in names:
            shutil.copy(companion_path(name), folder.name)
        return folder.name

    def run_python(self, folder, *args):
        """(exit status, stdout, stderr), in a folder that knows of no other."""
        done = subprocess.run(
            [sys.executable, *args], cwd=folder, env=make_environment(PYTHONPATH=""),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=TIMEOUT)
        return done.returncode, done.stdout.decode().split(), done.stderr.decode()

    def test_a_file_beside_it_is_a_submodule_whose_names_it_has_too(self):
        folder = self.lay("client", "testing")
        self.assertEqual(self.run_python(folder, "-c", """if True:
            from minibottle import TestClient, fetch
            import minibottle.client
            from minibottle.client import Client
            print(minibottle.client.fetch is fetch, Client is minibottle.Client)
            print(TestClient.__module__, "testing" in __import__("sys").modules)
            """), (0, ["True", "True", "minibottle.testing", "False"], ""))

    def test_they_are_found_inside_a_package(self):
        folder = self.lay("client", "websocket")
        package = os.path.join(folder, "pkg")
        os.mkdir(package)
        for name in ("minibottle", "minibottle_client", "minibottle_websocket"):
            shutil.move(os.path.join(folder, name + ".py"), package)
        self.assertEqual(self.run_python(folder, "-c", """if True:
            from pkg.minibottle.client import fetch
            from pkg import minibottle
            app = minibottle.App()
            app.websocket("/")(lambda ws: None)
            print(minibottle.fetch is fetch, app.routes[0].rule, fetch.__module__)
            """), (0, ["True", "/", "pkg.minibottle.client"], ""))

    def test_the_error_names_the_file_that_is_missing(self):
        programs = {"client": "from minibottle import fetch", "events": "import minibottle.events",
                    "websocket": "__import__('minibottle').App().websocket('/')",
                    "tls": "m = __import__('minibottle'); "
                           "m.Worker(m.App(), [], m.Settings(cert='x'))"}
        status, said, _ = self.run_python(self.lay(), "-c", f"""if True:
            for file, program in {programs}.items():
                try:
                    exec(program)
                except ModuleNotFoundError as error:
                    print(str(error).partition(", of minibottle's ex")[0].replace(" ", "_"))
            """)
        self.assertEqual(status, 0)
        self.assertEqual(said, [
            f"minibottle.{file} is a file of its own: lay minibottle_{file}.py".replace(" ", "_")
            for file in programs])

    @unittest.skipUnless(LONG, "needs MINIBOTTLE_LONG=1")
    def test_a_server_says_in_a_line_which_file_it_wants(self):
        folder = self.lay()
        for args, file in (("--reload", "reloading"), ("--server=wsgiref", "adapters"),
                           ("--routes", "route_list"), ("--status=/s", "status"),
                           ("--cert=a.pem", "tls"), ("--log-file=a.log", "service"),
                           ("--bind=unix:a", "service"), ("--trusted-proxies=::1", "proxies")):
            with self.subTest(args):
                status, _, said = self.run_python(
                    folder, "minibottle.py", "wsgiref.simple_server:demo_app",
                    "--bind=127.0.0.1:0", args)
                self.assertEqual((status, said.count("\n")), (2, 1), said)
                self.assertRegex(said, f"^minibottle: .*lay minibottle_{file}.py")
        status, _, said = self.run_python(
            folder, "-c", "import minibottle; minibottle.run(reloader=True)")
        self.assertRegex(said, r"\nminibottle\.MissingFile: .*lay minibottle_reloading\.py")

    def test_what_runs_as_the_command_is_no_second_copy(self):
        folder = self.lay("testing")
        with open(os.path.join(folder, "app.py"), "w") as file:
            file.write("""if True:
            import sys
            from minibottle import App, TestClient

            def main():
                app = App()
                app.get("/", callback=lambda: "Hello")
                print(TestClient(app).get("/").text, App is sys.modules["__main__"].App)
                print(TestClient.__module__)
            """)
        self.assertEqual(self.run_python(folder, "minibottle.py", "app:main")[1],
                         ["Hello", "True", "minibottle.testing"])

    def test_other_names_are_not_there(self):
        self.assertFalse(hasattr(minibottle, "nonsense"))
        for error, name in ((AttributeError, "nonsense"), (AttributeError, "testing_")):
            with self.assertRaisesRegex(error, f"has no attribute '{name}'"):
                getattr(minibottle, name)
        with self.assertRaises(ModuleNotFoundError):
            importlib.import_module("minibottle.nonsense")
        self.assertIsNone(importlib.util.find_spec("minibottle.hello"))  # which is in examples/

    def test_each_has_the_names_that_are_promised(self):
        for file, names in minibottle.COMPANIONS.items():
            module = importlib.import_module("minibottle." + file)
            for name in names.split():
                self.assertIs(getattr(minibottle, name), getattr(module, name))

    @unittest.skipUnless(hasattr(sys, "stdlib_module_names"), "needs Python 3.10")
    def test_they_need_minibottle_and_the_standard_library_alone(self):
        names = set()
        for file in set(minibottle.COMPANIONS) - {"jinja"}:
            for node in self.nodes(file):
                if isinstance(node, ast.Import):
                    names.update(alias.name for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    names.add(node.module)
        roots = {name.partition(".")[0] for name in names}
        self.assertEqual(roots - set(sys.stdlib_module_names) - {"__future__"}, set())
        self.assertIn("asyncio", roots)

    def test_their_functions_are_short(self):
        for file in minibottle.COMPANIONS:
            for node in self.nodes(file):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    self.assertLessEqual(node.end_lineno - node.body[0].lineno, 40, node.name)

    @staticmethod
    def nodes(name):
        with open(companion_path(name), encoding="utf-8") as file:
            return list(ast.walk(ast.parse(file.read())))


class TestClientTest(UnitTest):

    def setUp(self):
        self.app = App()

        @self.app.route("/<path:path>", ["GET", "POST", "PUT", "PATCH", "DELETE"])
        def echo(request, path):
            response.set_header("X-Method", request.method)
            return {"path": path, "query": dict(request.query), "type": request.content_type,
                    "body": request.body.read().decode(), "cookies": dict(request.cookies),
                    "agent": request.get_header("User-Agent")}
        self.client = TestClient(validator(self.app))

    def test_each_method_has_its_call(self):
        for name in ("get", "post", "put", "patch", "delete", "head"):
            answer = getattr(self.client, name)("/x", {"user-agent": "me"})
            self.assertEqual((answer.headers["x-method"], answer.status_code, answer.status),
                             (name.upper(), 200, "200 OK"))
        self.assertEqual(self.client.options("/x").status_code, 204)

    def test_bodies_and_queries_are_made_of_values(self):
        for options, part in (
                ({"json": {"a": [UNICODE]}}, {"type": "application/json",
                                              "body": json.dumps({"a": [UNICODE]})}),
                ({"form": {"a": UNICODE, "b": [1, 2]}},
                 {"type": "application/x-www-form-urlencoded",
                  "body": "a=%s&b=1&b=2" % urllib.parse.quote_plus(UNICODE)}),
                ({"body": UNICODE}, {"body": UNICODE, "type": ""}),
                ({"body": b"x", "headers": {"Content-Type": "a/b"}}, {"body": "x", "type": "a/b"}),
                ({"json": 0, "headers": {"content-type": "a/b"}}, {"body": "0", "type": "a/b"}),
                ({"query": {"a": UNICODE}}, {"query": {"a": UNICODE}})):
            got = self.client.post("/" + UNICODE, **options).json
            with self.subTest(options=options):
                self.assertEqual({**got, **part, "path": UNICODE}, got)
        self.assertEqual(self.client.get("/a?b=c", query={"d": "e"}).json["query"],
                         {"b": "c", "d": "e"})

    def test_files_are_sent_as_a_browser_sends_them(self):
        @self.app.post("/up")
        def up():
            return {"forms": list(request.forms.allitems()), "files": [
                [name, file.raw_filename, file.content_type, file.file.read().decode()]
                for name, file in request.files.allitems()]}
        name = 'a"b\r\n' + UNICODE
        sent = name.replace("\r\n", "%0D%0A")
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "c.txt")
            with open(path, "w+b") as file:
                file.write(b"on disk")
                file.seek(0)
                got = self.client.post("/up", form={"x": UNICODE, "y": [1, 2]}, files={
                    "f": (name, b"1", "a/b; c=d"), name: ("two", b"2"), "open": file,
                    "many": [("m1", b""), io.BytesIO(b"\r\n--")]}).json
        octets = "application/octet-stream"
        self.assertEqual(got, {
            "forms": [["x", UNICODE], ["y", "1"], ["y", "2"]],
            "files": [["f", sent, "a/b; c=d", "1"], [sent, "two", octets, "2"],
                      ["open", "c.txt", octets, "on disk"], ["many", "m1", octets, ""],
                      ["many", "many", octets, "\r\n--"]]})

    def test_cookies_are_kept_until_they_are_dropped(self):
        @self.app.get("/set")
        def set():
            response.set_cookie("a", "1 2")
            response.set_cookie("b", "3", path="/", httponly=True)

        self.app.get("/drop", callback=lambda: response.delete_cookie("a"))
        self.client.get("/set")
        self.assertEqual(self.client.get("/x").json["cookies"], {"a": "1 2", "b": "3"})
        self.assertEqual(self.client.get("/x", {"Cookie": "c=4"}).json["cookies"], {"c": "4"})
        self.client.get("/drop")
        self.assertEqual(self.client.get("/x").json["cookies"], {"b": "3"})
        self.assertEqual(TestClient(self.app).get("/x").json["cookies"], {})

    def test_text_is_decoded_by_its_charset(self):
        answer = answer_of(lambda: HTTPResponse("ö".encode("latin-1"), 200,
                                                Content_Type="text/plain; charset=latin-1"))
        self.assertEqual((answer.text, answer.body), ("ö", b"\xf6"))

    def test_a_bad_head_of_any_application_is_caught(self):
        for status, headers in (("200 OK", [("A", "b\r\nc: d")]), ("200\r\nOK", []), ("OK", []),
                                ("200 OK", [("A", 5)])):
            def app(environ, start_response):
                start_response(status, headers)
                return [b""]
            with self.subTest(headers=headers), self.assertRaises((ValueError, TypeError)):
                TestClient(app).get("/")

    def test_it_works_inside_a_running_loop_and_500_times_a_second(self):
        async def several():
            async def one(i):
                await asyncio.sleep(0)
                return self.client.get("/%d" % i).json["path"]
            return await asyncio.gather(*(one(i) for i in range(500)))
        start = time.process_time()
        self.assertEqual(asyncio.run(several()), [str(i) for i in range(500)])
        self.assertLess(time.process_time() - start, SLOW)


class EventStreamTest(UnitTest):
    """Server-sent events, as the HTML standard says (9.2.5 Parsing an event stream)."""

    def events(self, source, **options):
        def callback():
            return event_stream(source, **options)
        answer = answer_of(callback)
        self.assertEqual(answer.headers["Content-Type"], "text/event-stream")
        return answer.text

    def test_events_have_their_fields_and_a_line_for_each_line(self):
        for event, text in (
                ("a", "data: a\n\n"), ("a\nb\r\nc\rd", "data: a\ndata: b\ndata: c\ndata: d\n\n"),
                ({"n": 1}, 'data: {"n": 1}\n\n'), ([1], "data: [1]\n\n"), ("", "data: \n\n"),
                (True, "data: true\n\n"), (7, "data: 7\n\n"), (None, "data: null\n\n"),
                ({"data": {"n": 1}, "id": 7, "event": "tick", "retry": 100},
                 'event: tick\nid: 7\nretry: 100\ndata: {"n": 1}\n\n')):
            self.assertEqual(self.events([event]), ":\n\n" + text)

    def test_a_line_break_in_a_name_or_id_is_refused(self):
        for event in ({"data": "x", "id": "1\ndata: y"}, {"data": "x", "event": "a\rb"}):
            with self.assertRaisesRegex(ValueError, "one line"):
                self.events([event])

    def test_silence_is_filled_with_comments(self):
        go = threading.Event()

        def source():
            go.wait(10)
            yield "x"

        def callback():
            return event_stream(source(), keepalive=0.01)
        body = app_of(callback)(environ_of(), lambda *args: None)
        pieces = iter(body)
        self.assertEqual([next(pieces) for _ in range(3)], [b":\n\n"] * 3)
        go.set()
        self.assertEqual(list(pieces)[-1], b"data: x\n\n")
        body.close()


    def test_a_coroutine_makes_all_its_events_in_one_task(self):
        variable, ends = contextvars.ContextVar("variable"), []

        async def source():
            token = variable.set("x")
            task = asyncio.current_task()
            try:
                for _ in range(3):
                    await asyncio.sleep(0)
                    yield asyncio.current_task() is task
            finally:
                variable.reset(token)
                ends.append(asyncio.current_task() is task)

        self.assertEqual(self.events(source()), ":\n\n" + "data: true\n\n" * 3)
        for count in range(5):  # who leaves early
            body = app_of(lambda: event_stream(source()))(environ_of(), lambda *args: None)
            list(zip(range(count), body))
            body.close()
        self.assertEqual(set(ends), {True})

    @unittest.skipUnless(hasattr(asyncio, "timeout"), "needs asyncio.timeout()")
    def test_a_time_limit_around_events_ends_them(self):
        async def source():
            try:
                async with asyncio.timeout(0.01):
                    yield "x"
                    await asyncio.sleep(TIMEOUT)
            except TimeoutError:
                yield "late"

        self.assertEqual(self.events(source()), ":\n\ndata: x\n\ndata: late\n\n")

    def test_what_it_raises_comes_after_the_events_before(self):
        async def source():
            yield "x"
            raise OSError("broken")

        body = app_of(lambda: event_stream(source()))(environ_of(), lambda *args: None)
        pieces = []
        with self.assertRaisesRegex(OSError, "broken"):
            for piece in body:
                pieces.append(piece)
        self.assertEqual(pieces, [b":\n\n", b"data: x\n\n"])


class ServedEventsTest(WireTest):

    def test_all_of_a_generator_runs_in_one_task(self):
        user, ended = contextvars.ContextVar("user"), queue.Queue()

        async def events():
            token, task = user.set("ada"), asyncio.current_task()
            try:
                for _ in range(2):
                    yield user.get()
                    await asyncio.sleep(0)
            finally:
                user.reset(token)       # raises in another context
                ended.put(asyncio.current_task() is task)
        app = app_of(lambda: event_stream(events()))
        expected = b":\n\n" + 2 * b"data: ada\n\n"
        self.assertEqual(self.fetch(self.serve(app), get()).body, expected)
        self.assertTrue(ended.get(timeout=TIMEOUT))
        self.assertEqual(ask(app).body, expected)
        self.assertTrue(ended.get(timeout=TIMEOUT))

    def test_events_arrive_at_once_compressed_too(self):
        go = threading.Semaphore(0)

        async def events():
            for n in range(3):
                yield {"data": {"n": n}}
                while not go.acquire(blocking=False):
                    await asyncio.sleep(0.01)
        server = self.serve(app_of(lambda: event_stream(events())))
        for line in ("", "Accept-Encoding: gzip"):
            wire = self.connect(server).send(get("/", *[line] if line else []))
            _, _, headers = wire.head()
            coder = zlib.decompressobj(31 if line else -15)
            decode = coder.decompress if line else bytes
            self.assertEqual(headers["Content-Encoding"], "gzip" if line else None)
            self.assertEqual(decode(wire.chunk()), b":\n\n")
            for n in range(3):
                self.assertEqual(decode(wire.chunk()), b'data: {"n": %d}\n\n' % n)
                go.release()


class GzipMiddlewareTest(UnitTest):
    PIECES = [UNICODE.encode() * 50, b"", b"<p>" * 999, os.urandom(99)]

    def respond(self, environ, start_response):
        start_response("200 OK", [HTML])
        return self.PIECES

    def late(self, environ, start_response):
        start_response("200 OK", [HTML])
        yield from self.PIECES

    def write(self, environ, start_response):
        write = start_response("200 OK", [HTML])
        for piece in self.PIECES[:3]:
            write(piece)
        return self.PIECES[3:]

    def whole(self, environ, start_response):
        body = b"".join(self.PIECES)
        start_response("200 OK", [HTML, ("Content-Length", str(len(body)))])
        return [body]

    def test_any_application_is_compressed_whole_and_stays_valid(self):
        for app in (self.respond, self.late, self.write, self.whole):
            client = TestClient(validator(GzipMiddleware(validator(app))))
            for method in ("GET", "HEAD"):
                with self.subTest(app=app.__name__, method=method):
                    if method == "HEAD" and app != self.whole:
                        continue  # these send a body, which the validator does not look at
                    plain = client.request(method, "/")
                    packed = client.request(method, "/", {"Accept-Encoding": "gzip"})
                    self.assertEqual(packed.headers["Content-Encoding"], "gzip")
                    self.assertEqual((plain.headers["Vary"], packed.headers["Vary"]),
                                     ("Accept-Encoding",) * 2)
                    if method == "GET":
                        self.assertEqual(plain.body, b"".join(self.PIECES))
                        self.assertEqual(gzip.decompress(packed.body), plain.body)
                        self.assertLess(len(packed.body), len(plain.body))
                        self.assertEqual(packed.headers.get("Content-Length",
                                                            len(packed.body)), len(packed.body))

    def test_each_piece_can_be_read_as_it_comes(self):
        out = GzipMiddleware(self.late)({"REQUEST_METHOD": "GET", "HTTP_ACCEPT_ENCODING": "gzip"},
                                        lambda *args: None)
        reader, got = zlib.decompressobj(31), []
        for piece in out:
            got.append(reader.decompress(piece))
        self.assertEqual([piece for piece in got if piece], [p for p in self.PIECES if p])

    def run_middleware(self, app, start_response=lambda *args: None):
        return GzipMiddleware(app)({"REQUEST_METHOD": "GET", "HTTP_ACCEPT_ENCODING": "gzip"},
                                   start_response)

    def test_a_whole_body_is_compressed_at_once(self):
        for pieces, expected in ((self.PIECES, True), ([b"a" * 999], False)):
            out = self.run_middleware(
                lambda environ, start_response: start_response("200 OK", [HTML]) and 0 or pieces)
            self.assertEqual(gzip.decompress(out[0]) if expected else out[0], b"".join(pieces))
            self.assertEqual(len(out), 1)

    def test_what_it_wraps_is_closed_once(self):
        for pieces, error in (((b"a" * 5000, b"b"), None), ((), None),
                              ((b"a", ZeroDivisionError()), ZeroDivisionError)):
            inner = Closable(pieces)

            def app(environ, start_response):
                start_response("200 OK", [HTML])
                return inner
            out = self.run_middleware(app)
            with self.assertRaises(error) if error else self.subTest():
                list(out)
            out.close()
            self.assertEqual(inner.closed, 1)

    def test_what_fails_before_its_head_is_closed_too(self):
        for pieces, error in (((ZeroDivisionError(),), ZeroDivisionError), ((b"a",), RuntimeError)):
            inner = Closable(pieces)
            with self.assertRaises(error):
                self.run_middleware(lambda environ, start_response: inner)
            self.assertEqual(inner.closed, 1)

    def test_what_the_server_does_not_take_is_closed_too(self):
        inner = Closable((b"a",))
        with self.assertRaises(ZeroDivisionError):
            self.run_middleware(lambda environ, start_response:
                                start_response("200 OK", [HTML]) and 0 or inner,
                                lambda *args: 1 // 0)
        self.assertEqual(inner.closed, 1)

    def test_exc_info_after_the_head_reaches_the_server(self):
        """PEP 3333: a server that has sent the head raises it, and so breaks the answer off."""
        def app(environ, start_response):
            start_response("200 OK", [HTML])
            yield b"a"
            try:
                raise ZeroDivisionError
            except ZeroDivisionError:
                start_response("500 Oops", [HTML], sys.exc_info())
            yield b"as if nothing had happened"

        def start_response(status, headers, exc_info=None):
            if exc_info:
                raise exc_info[1]
        with self.assertRaises(ZeroDivisionError):
            list(self.run_middleware(app, start_response))


def certificate():
    """The files (certificate, key) of "localhost"."""
    with certificate_lock:
        return make_certificate()


certificate_lock = threading.Lock()


@functools.lru_cache(maxsize=None)
def make_certificate():
    cert, key = (os.path.join(FOLDER, name) for name in ("localhost.crt", "localhost.key"))
    try:
        done = subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
             "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", key, "-out", cert, "-days", "2",
             "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except FileNotFoundError:
        raise unittest.SkipTest("no openssl, which makes certificates") from None
    if done.returncode:
        raise unittest.SkipTest("openssl makes no certificate: " + done.stdout.decode()[-200:])
    return cert, key


class TlsClientSocket(ssl.SSLSocket):
    """A client's, which can do what a plain socket can: look at what has come, close one side."""

    def recv(self, size=1024, flags=0):
        return socket.socket.recv(self, size, flags) if flags else super().recv(size)

    def shutdown(self, how):
        socket.socket.shutdown(self, how)


def trusting(**attributes):
    """An SSLContext of a client that trusts certificate()."""
    context = ssl.create_default_context(cafile=certificate()[0])
    context.sslsocket_class = TlsClientSocket
    for name, value in attributes.items():
        setattr(context, name, value)
    return context


class OverTls:
    """Makes a Wire speak TLS."""

    def __init__(self, port, receive_bytes=None, context=None, ragged=True):
        """`ragged`: an end without a goodbye is an end too."""
        super().__init__(port, receive_bytes)
        self.file.close()
        try:
            self.sock = (context or trusting()).wrap_socket(
                self.sock, server_hostname="localhost", suppress_ragged_eofs=ragged)
        except BaseException:
            self.sock.close()
            raise
        self.file = self.sock.makefile("rb")


class TlsWire(OverTls, Wire):
    """A raw client over TLS."""


class TlsTest(WireTest):

    def serve(self, app, **settings):
        return super().serve(app, **{**dict(zip(("cert", "key"), certificate())), **settings})

    def connect(self, server, **options):
        wire = TlsWire(server.port, **options)
        self.addCleanup(wire.close)
        return wire

    def fetch(self, server, data, method="GET"):
        return self.connect(server).send(data).answer(method)

    def listen_to_log(self):
        logger = logging.getLogger("minibottle")
        self.addCleanup(logger.setLevel, logger.level)
        logger.setLevel(logging.INFO)
        return super().listen_to_log()

    def wait_for_none(self, server):
        self.assertTrue(wait_until(lambda: not server.worker.connections))


class TlsServedTest(TlsTest):
    """HTTP over TLS, both ways and of every size."""

    SIZE = 20_000_000 if LONG else 5_000_000

    def serve_all(self, **settings):
        app = App()
        data = os.urandom(1 << 16) * (self.SIZE >> 16)
        path = os.path.join(FOLDER, "data.bin")
        with open(path, "wb") as file:
            file.write(data)
        digest = hashlib.sha256(data).hexdigest()

        @app.post("/digest")
        def post_digest(request):
            return hashlib.sha256(request.body.read()).hexdigest()

        @app.post("/upload")
        def upload(request):
            return hashlib.sha256(request.files["f"].file.read()).hexdigest()

        @app.post("/streamed", stream=True)
        def streamed(request):
            found = hashlib.sha256()
            for piece in request.stream:
                found.update(piece)
            return found.hexdigest()

        @app.get("/generator")
        def generator():
            for i in range(0, len(data), 100_000):
                yield data[i:i + 100_000]

        @app.get("/coroutine")
        async def coroutine():
            for i in range(0, len(data), 100_000):
                yield data[i:i + 100_000]
        app.get("/url", callback=lambda: request.url)
        app.get("/bytes", callback=lambda: data)
        app.get("/file", callback=lambda: static_file("data.bin", root=FOLDER))
        return self.serve(app, **settings), data, digest

    def test_requests_and_answers_of_every_kind_share_one_connection(self):
        server, data, digest = self.serve_all(gzip=False)
        self.assertEqual(server.url, f"https://127.0.0.1:{server.port}")
        wire = self.connect(server)
        answer = wire.send(get("/url")).answer()
        self.assertEqual((answer.status, answer.body), (200, b"https://x/url"))
        for path in ("/bytes", "/file", "/generator", "/coroutine"):
            with self.subTest(path):
                answer = wire.send(get(path)).answer()
                self.assertEqual(hashlib.sha256(answer.body).hexdigest(), digest)
        field = form(part("f", data, filename="f"))
        kind = "Content-Type: multipart/form-data; boundary=" + BOUNDARY
        for path, body in (("/digest", data), ("/streamed", data), ("/upload", field)):
            with self.subTest(path):
                wire.send(post(kind, f"Content-Length: {len(body)}", path=path), body)
                answer = wire.answer()
                self.assertEqual(answer.body.decode(), digest)
        self.assertEqual(wire.send(get("/url"), get("/url")).answer().body, b"https://x/url")
        self.assertEqual(wire.answer().body, b"https://x/url")
        self.assertEqual(len(server.worker.connections), 1)

    def test_a_slow_reader_gets_all_of_it_and_holds_nobody_up(self):
        server, data, digest = self.serve_all(gzip=False, max_threads=1)
        slow = [self.connect(server, receive_bytes=4096).send(get(path))
                for path in ("/bytes", "/file", "/coroutine")]
        for wire in slow:
            self.assertTrue(wire.sock.recv(1, socket.MSG_PEEK))
        self.assertEqual(self.fetch(server, get("/url")).status, 200)
        for wire in slow:
            self.assertEqual(hashlib.sha256(wire.answer().body).hexdigest(), digest)

    def test_both_directions_at_once_on_two_threads(self):
        """OpenSSL's objects are for one thread at a time."""
        data = os.urandom(1 << 20) * 4
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen(1)
            listener = tls_module.Listener(listening, tls_module.make_context(
                *certificate()))
            wire = POOL.submit(TlsWire, listening.getsockname()[1])
            sock = listener.accept()[0]
            sock.settimeout(TIMEOUT)
            first = POOL.submit(sock.recv, 65536)  # which does the handshake
        wire.result().send(b"x")
        self.assertEqual(first.result(), b"x")

        def receive():
            return b"".join(iter(lambda: sock.recv(65536), b""))

        def send():
            view = memoryview(data)
            while view:
                view = view[sock.send(view):]
        with contextlib.closing(wire.result()) as client, sock:
            received, sent = POOL.submit(receive), POOL.submit(send)
            # The client is a plain SSLSocket, and so no more than one thread may have it.
            view, got = memoryview(data), bytearray()
            client.sock.setblocking(False)
            while len(got) < len(data) or view:
                select.select([client.sock], [client.sock] if view else [], [], TIMEOUT)
                with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
                    got += client.sock.recv(65536) or self.fail("the end")
                with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
                    view = view[client.sock.send(view):] if view else view
            self.assertEqual(got, data)
            sent.result(TIMEOUT)
            client.sock.settimeout(TIMEOUT)
            client.sock.shutdown(socket.SHUT_WR)
            self.assertEqual(received.result(TIMEOUT), data)

    def test_the_end_of_an_answer_without_a_length_is_told_from_a_cut(self):
        """RFC 8446 6.1: close_notify."""
        def app(environ, start_response):
            start_response("200 OK", [TEXT])
            yield b"some"
            if environ["PATH_INFO"] == "/cut":
                raise ConnectionError
        server = self.serve(app)

        def ask(path):
            wire = self.connect(server, ragged=False)
            return wire.send(get(path, version="HTTP/1.0")).answer().body
        self.assertEqual(ask("/"), b"some")
        with self.assertRaises(OSError):
            ask("/cut")

    def test_a_refused_upload_gets_its_answer(self):
        server = self.serve(hello, max_body=1000)
        wire = self.connect(server).send(post("Content-Length: 1000000", body=bytes(100_000)))
        self.assertEqual(wire.answer().status, 413)

    def test_an_event_stream_ends_when_its_reader_says_goodbye(self):
        """The alert comes before the end of the connection, which is not seen behind it."""
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            for kind in ("function", "coroutine"):
                ended = threading.Event()

                def function():
                    try:
                        while True:
                            yield b"data: 1\n\n"
                            time.sleep(0.01)
                    finally:
                        ended.set()

                async def coroutine():
                    try:
                        while True:
                            yield b"data: 1\n\n"
                            await asyncio.sleep(0.01)
                    finally:
                        ended.set()

                def events():
                    response.content_type = "text/event-stream"
                    return function() if kind == "function" else coroutine()
                context = trusting(maximum_version=version)
                wire = TlsWire(self.serve(app_of(events)).port, context=context).send(get())
                wire.head()
                wire.sock.setblocking(False)
                with self.subTest(version=version, kind=kind), contextlib.closing(wire):
                    with contextlib.suppress(OSError):
                        wire.sock.unwrap()
                    self.assertTrue(ended.wait(5 * SLOW))

    def test_clients_that_go_in_the_middle_leave_nothing(self):
        server = self.serve_all()[0]
        with self.assertNoLogs():
            for data in (b"", b"GET /", get("/bytes"), get("/generator"), get("/coroutine"),
                         get("/file"), post("Content-Length: 99", body=b"x", path="/digest")):
                for leave in (Wire.reset, Wire.close):
                    wire = self.connect(server, receive_bytes=4096).send(data)
                    leave(wire)
            self.wait_for_none(server)

    @contextlib.contextmanager
    def assertNoLogs(self):
        with self.assertLogs("minibottle", "WARNING") as logs:
            logging.getLogger("minibottle").warning("nothing")
            yield
        self.assertEqual(len(logs.output), 1, logs.output)

    def test_a_websocket_goes_over_it(self):
        async def conversation(path):
            async with connect_websocket(f"wss://localhost:{server.port}/{path}",
                                         tls=trusting()) as ws:
                for message in ("ä" * 9000, b"", bytes(3_000_000), os.urandom(1_000_000), "hello"):
                    await ws.send(message)
                    self.assertEqual(await ws.receive(), message)
            self.assertEqual(ws.code, 1000)

        async def echo(ws):
            async for message in ws:
                await ws.send(message)

        def blocking(ws):
            for message in ws:
                ws.send(message)
        app = App()
        app.websocket("/echo")(echo)
        app.websocket("/blocking")(blocking)
        server = self.serve(app)
        for path in ("echo", "blocking"):
            asyncio.run(asyncio.wait_for(conversation(path), TIMEOUT))
        self.wait_for_none(server)


class TlsHandshakeTest(TlsTest):

    def test_http_1_1_over_tls_1_2_and_newer_is_what_it_speaks(self):
        server = self.serve(hello)
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            context = trusting(minimum_version=version, maximum_version=version)
            context.set_alpn_protocols(["h2", "http/1.1"])
            with contextlib.closing(TlsWire(server.port, context=context)) as wire:
                self.assertEqual(wire.send(get()).answer().status, 200)
                self.assertEqual((wire.sock.version(), wire.sock.selected_alpn_protocol()),
                                 (str(version.name).replace("_", "."), "http/1.1"))

    def test_what_is_older_is_refused(self):
        log = self.listen_to_log()
        context = trusting()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.set_ciphers("DEFAULT:@SECLEVEL=0")
            context.minimum_version = ssl.TLSVersion.TLSv1
            context.maximum_version = ssl.TLSVersion.TLSv1_1
        with self.assertRaises(OSError):
            TlsWire(self.serve(hello).port, context=context)
        self.assertRegex(log.next(), "^127.0.0.1: TLS failed: .*(?i:version|protocol)")

    def test_what_is_no_tls_is_closed_at_once_with_one_line(self):
        log = self.listen_to_log()
        server = self.serve(hello)
        for data in (get(), b"\0" * 600, b"\x16\x03\x01\x00\x05hello", b"SSH-2.0-x\r\n" * 10):
            with self.subTest(data), connect(server.url) as sock:
                then = time.monotonic()
                sock.sendall(data)
                with contextlib.suppress(ConnectionResetError):
                    self.assertNotIn(b"HTTP", read_all(sock))
                self.assertLess(time.monotonic() - then, 1 * SLOW)
                self.assertRegex(log.next(), r"^127.0.0.1: TLS failed: [^\n]*$")
        self.wait_for_none(server)
        self.assertTrue(log.queue.empty())
        self.assertEqual(self.fetch(server, get()).status, 200)

    def test_who_looks_whether_the_port_is_open_is_no_line(self):
        log = self.listen_to_log()
        server = self.serve(hello)
        for data in (b"", b"\x16\x03\x01\x02\x00\x01"):
            for leave in (socket.socket.close, reset):
                sock = connect(server.url)
                sock.sendall(data)
                leave(sock)
        self.wait_for_none(server)
        self.assertTrue(log.queue.empty())

    def test_a_certificate_that_cannot_be_used_is_named(self):
        cert, key = certificate()
        other = os.path.join(FOLDER, "other.key")
        subprocess.run(["openssl", "ec", "-in", key, "-out", other, "-aes128", "-passout",
                        "pass:secret"], check=True, stderr=subprocess.DEVNULL)
        for files, text in (
                ({"cert": "nowhere.pem"}, "nowhere.pem .*No such file"),
                ({"cert": cert, "key": "nowhere.key"}, "nowhere.key .*No such file"),
                ({"cert": FOLDER, "key": key}, "Is a directory"),
                ({"cert": key, "key": key}, "localhost.key"), ({"cert": cert, "key": cert}, "crt"),
                ({"cert": cert, "key": other}, "other.key")):
            with self.subTest(files), self.assertRaisesRegex(minibottle.StartError, text), \
                    minibottle.bind("127.0.0.1:0") as sock:
                tls_module.make_context(**{"key": "", **files})
                minibottle.Worker(hello, [sock], Settings(**files))

        with self.assertRaisesRegex(UsageError, "setting key.* cert"):
            Settings(key=key)

    def test_one_file_may_hold_both(self):
        both = os.path.join(FOLDER, "both.pem")
        with open(both, "w") as file:
            for path in certificate():
                with open(path) as one:
                    file.write(one.read())
        self.assertEqual(self.fetch(self.serve(hello, cert=both, key=""), get()).status, 200)

    def test_the_settings_may_name_a_context_or_what_makes_one(self):
        context = tls_module.make_context(*certificate())
        context.load_verify_locations(certificate()[0])
        context.verify_mode = ssl.CERT_REQUIRED
        own = types.SimpleNamespace(context=context, make=lambda: context)
        log, ours = self.listen_to_log(), trusting()
        ours.load_cert_chain(*certificate())
        with mock.patch.dict(sys.modules, own=own):
            for name in ("own:context", "own:make"):
                server = self.serve(hello, cert=name, key="")
                with contextlib.closing(TlsWire(server.port, context=ours)) as wire:
                    self.assertEqual(wire.send(get()).answer().status, 200)
                with self.assertRaises(OSError):
                    self.fetch(server, get())
                self.assertIn("certificate", log.next().lower())
            own.make = trusting  # a client's
            with self.assertRaisesRegex(minibottle.StartError, "own:make .* client"):
                tls_module.make_context("own:make", "")

    def test_a_unix_socket_may_speak_it(self):
        with minibottle.bind("unix:" + os.path.join(FOLDER, "tls.sock")) as sock:
            worker = minibottle.Worker(hello, [sock], Settings(
                workers="0", cert=certificate()[0], key=certificate()[1]))
            thread = threading.Thread(target=worker.monitor)
            thread.start()
            try:
                with socket.socket(socket.AF_UNIX) as plain:
                    plain.settimeout(TIMEOUT)
                    plain.connect(os.path.join(FOLDER, "tls.sock"))
                    with trusting().wrap_socket(plain, server_hostname="localhost") as client:
                        client.sendall(get("/", "Connection: close"))
                        self.assertTrue(read_all(client).startswith(b"HTTP/1.1 200 "))
            finally:
                worker.stop()
                thread.join()


@unittest.skipUnless(LONG, "needs MINIBOTTLE_LONG=1")
class TlsEndOfWaitTest(PooledTest, TlsTest):
    """Every wait for a client ends; these tests only wait."""

    def test_who_never_says_hello_delays_nobody_and_is_closed_at_the_deadline(self):
        server = self.serve(hello, header_timeout=0.3)
        then = time.monotonic()
        with contextlib.ExitStack() as stack:
            silent = [stack.enter_context(connect(server.url)) for _ in range(40)]
            for sock in silent[::2]:  # the head of a record, and then no more
                sock.sendall(b"\x16\x03\x01\x02\x00\x01")
            began = time.monotonic()
            self.assertEqual(self.fetch(server, get()).status, 200)
            self.assertLess(time.monotonic() - began, (0.3 if LONG else 1) * SLOW)
            for sock in silent:
                self.assertEqual(read_all(sock), b"")
        self.assertTrue(0.2 < time.monotonic() - then < 0.3 + SLOW)

    def test_half_a_request_after_a_handshake_has_its_deadline_too(self):
        wire = self.connect(self.serve(hello, header_timeout=0.1)).send(b"GET ")
        self.assertEqual(wire.answer().status, 408)

    def test_a_body_that_comes_too_slowly_is_a_408_where_it_is_streamed_too(self):
        app = app_of(lambda: request.body.read(), method="POST", stream=True)
        server = self.serve(app, body_timeout=0.1)
        wire = self.connect(server).send(post("Content-Length: 9", body=b"x"))
        self.assertEqual(wire.answer().status, 408)

@unittest.skipUnless(hasattr(os, "fork") and HAS_PROC, "needs fork and /proc")
@unittest.skipUnless(LONG, "needs MINIBOTTLE_LONG=1")
class CommandTlsTest(PooledTest):

    def test_it_starts_with_https_and_connections_leave_little_behind(self):
        cert, key = certificate()
        with serve("shop:app", "--cert", cert, "--key", key) as server:
            self.assertRegex(server.url, "^https://127.0.0.1:")
            port, context = int(server.url.rpartition(":")[2]), trusting()

            def visit(count):
                for _ in range(count):
                    with contextlib.closing(TlsWire(port, context=context)) as wire:
                        self.assertEqual(wire.send(get()).answer().body, b"Hello World!")
            visit(50)
            worker, = server.children()
            before = memory(worker)
            visit(2000 if LONG else 150)
            self.assertLess(memory(worker) - before, (3 if LONG else 2) << 20)
            self.assertEqual(server.stop(), 0)

    def test_what_cannot_start_is_one_line(self):
        cert, key = certificate()
        rows = [(["shop:app", "--bind", "127.0.0.1:0", "--workers", n, *args], status, text)
                for n in "01" for args, status, text in (
                    (["--cert", "nowhere.pem"], 1, "cannot use nowhere.pem for TLS: No such file"),
                    (["--cert", cert, "--key", "shop.py"], 1, r"cannot use .*shop\.py for TLS"),
                    (["--key", key], 2, "setting key: without cert"))]
        results = finish_each([row[0] for row in rows])
        for (args, status, text), (found, out, err) in zip(rows, results):
            with self.subTest(args):
                self.assertEqual((found, out, err.count("\n")), (status, "", 1), err)
                self.assertRegex(err, "^minibottle: .*" + text)


PROXIED = (  # (peer, headers, what they make of REMOTE_ADDR, REMOTE_PORT, URL, SERVER_PORT)
    # who is believed
    ("9.9.9.9", {"For": "1.1.1.1", "Proto": "https", "Host": "evil"}, "9.9.9.9 7 http://a/ 8080"),
    ("", {"For": "1.1.1.1"}, "1.1.1.1  http://a/ 8080"),
    ("10.0.0.10", {"For": "1.1.1.1"}, "10.0.0.10 7 http://a/ 8080"),
    ("127.0.0.1", {"For": "1.1.1.1"}, "1.1.1.1  http://a/ 8080"),
    ("10.1.0.1", {"For": "1.1.1.1"}, "1.1.1.1  http://a/ 8080"),
    ("::ffff:10.1.0.1", {"For": "1.1.1.1"}, "1.1.1.1  http://a/ 8080"),
    ("fe80::1%eth0", {"For": "1.1.1.1"}, "1.1.1.1  http://a/ 8080"),
    ("127.0.0.1", {}, "127.0.0.1 7 http://a/ 8080"),
    # the client is the right-most whom nobody vouches for
    ("127.0.0.1", {"For": "6.6.6.6, 1.1.1.1"}, "1.1.1.1  http://a/ 8080"),
    ("127.0.0.1", {"For": "6.6.6.6, 1.1.1.1,10.1.2.3 ,\t10.1.0.1"}, "1.1.1.1  http://a/ 8080"),
    ("127.0.0.1", {"For": "10.1.0.1, 10.1.0.2"}, "10.1.0.1  http://a/ 8080"),
    ("127.0.0.1", {"For": "6.6.6.6, rubbish, 10.1.0.2"}, "10.1.0.2  http://a/ 8080"),
    # how an address may look
    ("127.0.0.1", {"For": "1.1.1.1:80"}, "1.1.1.1 80 http://a/ 8080"),
    ("127.0.0.1", {"For": "2001:DB8::1"}, "2001:db8::1  http://a/ 8080"),
    ("127.0.0.1", {"For": "[2001:db8::1]"}, "2001:db8::1  http://a/ 8080"),
    ("127.0.0.1", {"For": "[2001:db8::1]:80"}, "2001:db8::1 80 http://a/ 8080"),
    ("127.0.0.1", {"For": "::ffff:1.1.1.1"}, "1.1.1.1  http://a/ 8080"),
    *(("127.0.0.1", {"For": hop}, "127.0.0.1 7 http://a/ 8080") for hop in (
        "", ",", "unknown", "_hidden", "localhost", "1.1.1", "1.1.1.1.1", "1.1.1.256", "1.1.1.1:",
        "1.1.1.1:x", "1.1.1.1:123456", "[1.1.1.1", "::1]", "fe80::1%<b>", "1", "\xb2.1.1.1",
        "1.1.1.1" + " " * 60 + "1", "6.6.6.6, unknown", "6.6.6.6,")),
    # the URL
    ("127.0.0.1", {"Proto": "https"}, "127.0.0.1 7 https://a/ 443"),
    ("127.0.0.1", {"Proto": "WSS"}, "127.0.0.1 7 https://a/ 443"),
    ("127.0.0.1", {"Proto": "http"}, "127.0.0.1 7 http://a/ 80"),
    ("127.0.0.1", {"Proto": "https, http"}, "127.0.0.1 7 http://a/ 80"),
    ("127.0.0.1", {"Proto": "gopher"}, "127.0.0.1 7 http://a/ 8080"),
    ("127.0.0.1", {"Host": "b.example"}, "127.0.0.1 7 http://b.example/ 80"),
    ("127.0.0.1", {"Host": "evil, b:81"}, "127.0.0.1 7 http://b:81/ 81"),
    ("127.0.0.1", {"Host": "[::1]:81"}, "127.0.0.1 7 http://[::1]:81/ 81"),
    *(("127.0.0.1", {"Host": host}, "127.0.0.1 7 http://a/ 8080") for host in (
        "", "a/b", "a@b", ":80", "a b", "a:b", "\xe4")),
    ("127.0.0.1", {"Port": "81"}, "127.0.0.1 7 http://a:81/ 81"),
    ("127.0.0.1", {"Port": "443", "Proto": "https"}, "127.0.0.1 7 https://a/ 443"),
    ("127.0.0.1", {"Port": "444", "Host": "[::1]"}, "127.0.0.1 7 http://[::1]:444/ 444"),
    ("127.0.0.1", {"Port": "81", "Host": "b:82"}, "127.0.0.1 7 http://b:82/ 82"),
    *(("127.0.0.1", {"Port": port}, "127.0.0.1 7 http://a/ 8080") for port in (
        "", "0", "65536", "+5", "8_0", "\xb2", "http", "81,")),
    ("127.0.0.1", {"For": "1.1.1.1", "Proto": "https", "Host": "b", "Port": "444"},
     "1.1.1.1  https://b:444/ 444"),
)


class ProxiesTest(WireTest):
    """X-Forwarded-* of proxies that are trusted, and of nobody else."""

    TRUSTED = ("unix", "127.0.0.1", "10.1.0.0/16", "fe80::/10", "10.0.0.8/31")

    def see(self, trusted, environ):
        """The environ that reaches the application."""
        from minibottle.proxies import forwarding
        return forwarding(trusted, lambda seen: seen)(environ)

    def test_what_they_say_is_in_the_environ(self):
        for peer, headers, expected in PROXIED:
            environ = environ_of(HTTP_HOST="a", SERVER_PORT="8080", REMOTE_ADDR=peer,
                                 REMOTE_PORT="7", **{"wsgi.url_scheme": "http"},
                                 **{"HTTP_X_FORWARDED_" + name.upper(): value
                                    for name, value in headers.items()})
            with self.subTest(peer=peer, headers=headers):
                seen = self.see(self.TRUSTED, environ)
                got = [seen["REMOTE_ADDR"], seen["REMOTE_PORT"], Request(seen).url]
                self.assertEqual(" ".join([*got, seen["SERVER_PORT"]]), expected)

    def test_a_request_without_a_host_gets_the_port_alone(self):
        environ = environ_of(REMOTE_ADDR="", SERVER_NAME="n", SERVER_PORT="1",
                             HTTP_X_FORWARDED_PORT="81", **{"wsgi.url_scheme": "http"})
        seen = self.see(["unix"], environ)
        self.assertEqual((Request(seen).url, "HTTP_HOST" in seen), ("http://n:81/", False))

    def test_other_fields_mean_nothing(self):
        environ = environ_of(REMOTE_ADDR="127.0.0.1", HTTP_FORWARDED="for=1.1.1.1;host=evil",
                             HTTP_X_REAL_IP="1.1.1.1", HTTP_X_FORWARDED_PREFIX="/evil",
                             **{"wsgi.url_scheme": "http"})
        self.assertEqual(self.see(["127.0.0.1"], dict(environ)), environ)

    def test_a_long_list_of_hops_takes_linear_time(self):
        hops = ", ".join("10.1.%d.%d" % (i >> 8, i & 255) for i in range(3000))
        began = time.process_time()
        seen = self.see(["127.0.0.1", "10.0.0.0/8"], environ_of(
            REMOTE_ADDR="127.0.0.1", HTTP_X_FORWARDED_FOR="6.6.6.6, rubbish, " + hops))
        self.assertEqual(seen["REMOTE_ADDR"], "10.1.0.0")
        self.assertLess(time.process_time() - began, 0.5 * SLOW)

    def test_the_application_its_urls_and_its_websockets_see_the_client(self):
        app = app_of(lambda: f"{request.remote_addr} {request.url}")
        app.websocket("/ws")(lambda ws: None)
        forwarded = {"X-Forwarded-For": "1.1.1.1", "X-Forwarded-Proto": "https",
                     "X-Forwarded-Host": "shop.example"}
        upgrade = {**forwarded, "Connection": "Upgrade", "Upgrade": "websocket",
                   "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}
        for trusted, client, url, statuses in (
                ((), "127.0.0.1", None, [403, 101]),
                (("127.0.0.1",), "1.1.1.1", "https://shop.example/", [101, 403])):
            server = self.serve(app, trusted_proxies=trusted)
            with self.subTest(trusted=trusted), self.assertLogs("minibottle.access") as logs:
                self.assertEqual(fetch(server.url, headers=forwarded)[2].decode(),
                                 f"{client} {url or server.url + '/'}")
                self.assertTrue(wait_until(lambda: [r for r in logs.records if r.path == "/"]))
                record = next(r for r in logs.records if r.path == "/")     # not of a WebSocket
                self.assertEqual((record.client, record.peer), (client, "127.0.0.1"))
                for origin, status in zip(("https://shop.example", server.url), statuses):
                    self.assertEqual(fetch(server.url, "/ws", headers={
                        **upgrade, "Origin": origin})[0], status)

    def test_a_body_that_is_too_large_is_refused_by_the_server_and_by_an_app(self):
        def wsgi(environ, start_response):
            saw.append(environ)
        saw, app = [], app_of(lambda: "", method="POST")
        app.error(413)(lambda error: "my page for " + request.remote_addr)
        for served, expected in ((wsgi, b"max_body"), (app, b"my page for 1.1.1.1")):
            server = self.serve(served, trusted_proxies="127.0.0.1", max_body=5)
            status, _, body = fetch(server.url, "/", "POST", b"123456",
                                    {"X-Forwarded-For": "1.1.1.1"})
            self.assertEqual((status, expected in body), (413, True), body)
        self.assertEqual(saw, [])

    def test_what_is_no_address_is_named_at_the_start(self):
        for bad in ("nonsense", "10.0.0.1/8", "10.0.0.0/33", "*", "", "localhost", "unix:/a"):
            with self.subTest(bad=bad), self.assertRaisesRegex(
                    UsageError, "trusted_proxies: .*" + re.escape(repr(bad).strip("'"))):
                self.see([bad], {})
        self.assertEqual(Settings(trusted_proxies=()).trusted_proxies, ())

    @unittest.skipUnless(LONG and NGINX, "needs nginx and MINIBOTTLE_LONG=1")
    def test_nginx_in_front_says_who_the_client_is(self):
        app = app_of(lambda: f"{request.remote_addr} {request.url}")
        server = self.serve(app, trusted_proxies="127.0.0.2")
        fields = "".join("proxy_set_header X-Forwarded-%s; " % field for field in (
            "For $proxy_add_x_forwarded_for", "Proto $scheme", "Host $http_host", 'Port ""'))
        said = {"X-Forwarded-For": "6.6.6.6", "X-Forwarded-Host": "evil",
                "X-Forwarded-Port": "666", "X-Forwarded-Proto": "https"}
        with nginx_in_front(server.url, "proxy_bind 127.0.0.2; " + fields) as url:
            self.assertEqual(fetch(url, headers=said)[2].decode(), f"127.0.0.1 {url}/")
        with nginx_in_front(server.url, fields) as url:  # from an address that is not trusted
            self.assertEqual(fetch(url, headers=said)[2].decode(), f"127.0.0.1 {server.url}/")


class Account:
    """Its repr() tells what it should not."""

    def __init__(self, password):
        self.password = password

    def __repr__(self):
        return "Account(name='Łukasz', password=%r, url='db://me:%s@host/')" % (
            self.password, self.password)


class Mute:
    def __repr__(self):
        raise ValueError


class DebugPageTest(UnitTest):
    """The page of an error in debug mode: for who sits at this machine, and no more than a page."""

    HIDE = "hunter" + "2"  # so that it is in no line of source

    def broken(self):
        """A handler."""
        account, mute, token = Account(self.HIDE), Mute(), self.HIDE
        config = {"api_key": self.HIDE, b"cookie": [self.HIDE], "plain": {"a": "<i>"}}
        many, html, data = list(range(10000)), "<script>" * 10000, bytes(10000)
        try:
            {}["<b>"]
        except KeyError:
            raise ValueError(  # noqa: B904
                "<b>bold</b>", len((account, mute, token, config, many, html, data)))

    def ask(self, app, accept="text/html,*/*;q=0.8", path="/", environ=()):
        def asked(given, start_response):
            return app({**given, **dict(environ)}, start_response)
        with mock.patch.object(minibottle, "DEBUG", True), self.assertLogs("minibottle", "ERROR"):
            return ask(asked, path, headers={"Accept": accept, "Cookie": "a=" + self.HIDE})

    def test_it_shows_the_request_the_chain_the_source_and_the_variables(self):
        app = App()
        app.get("/a/<name>", callback=lambda name: self.broken())
        answer = self.ask(app, path="/a/<i>?q=<s>")
        text = html.unescape(answer.text)
        for shown in ("ValueError: ('<b>bold</b>', 7)", "It was raised while this was handled:",
                      "KeyError: '<b>'", "GET http://", "{}[\"<b>\"]", "'name': '<i>'",
                      "{'api_key': ***, b'cookie': ***, 'plain': {'a': '<i>'}}",
                      "Account(name='Łukasz', password=***, url='db://me:***@host/')",
                      "<Mute, whose repr() raises ValueError>", "<th>token</th><td>***</td>",
                      "<th>Cookie</th><td>***</td>", "[0, 1, 2, 3, 4,"):
            self.assertIn(shown, text)
        line = self.broken.__func__.__code__.co_firstlineno + 8
        self.assertIn("<mark>%5d             raise ValueError(" % line, answer.text)
        self.assertIn("<span>%5d " % (line - 5), answer.text)
        self.assertNotIn("<span>%5d " % (line - 6), answer.text.partition("<h2>")[0])
        self.assertNotIn(self.HIDE, text)
        self.assertLess(len(answer.text), 50000)

    def test_what_a_client_or_the_code_says_is_text_there(self):
        app = App()
        app.get("/a/<name>", callback=lambda name: self.broken())
        answer = self.ask(app, path="/a/<i>?q=<s>")
        tags = re.findall(r"<(\w+)([^>]*)>", answer.text)
        self.assertEqual({name for name, _ in tags}, set(
            "html head meta title style body h1 p details summary b pre span mark table tr th td "
            "h2 br".split()))
        self.assertEqual({attributes for _, attributes in tags}, {
            "", " open", ' lang="en"', ' charset="utf-8"',
            ' name="viewport" content="width=device-width"'})
        self.assertNotIn("url(", answer.text.partition("</style>")[0])
        self.assertEqual(answer.headers["Content-Security-Policy"],
                         "default-src 'none'; style-src 'unsafe-inline'")
        self.assertEqual(answer.headers["Cache-Control"], "no-store")

    def test_a_program_gets_the_traceback_as_text(self):
        for accept, expected in (
                ("application/json", "text/plain; charset=UTF-8"),
                ("application/problem+json, */*", "text/plain; charset=UTF-8"),
                ("*/*", "text/html; charset=UTF-8"), ("", "text/html; charset=UTF-8")):
            with self.subTest(accept=accept):
                answer = self.ask(app_of(self.broken), accept)
                self.assertEqual(answer.headers["Content-Type"], expected)
                self.assertIn("raise ValueError(", answer.text)
                self.assertNotIn("<table>", answer.text)

    def test_a_recursion_without_end_is_cut_in_the_middle(self):
        def deep(n=0):
            return deep(n + 1)
        answer = self.ask(app_of(lambda: deep()))
        self.assertEqual(answer.text.count("<details"), 30)
        self.assertRegex(answer.text, r"… \d+ frames …")

    def test_it_is_for_this_machine_alone(self):
        app = app_of(self.broken)
        for environ, shown in (
                ({}, True), ({"REMOTE_ADDR": "::1", "SERVER_NAME": "::1"}, True),
                ({"HTTP_HOST": "LOCALHOST:80"}, True), ({"HTTP_HOST": "[::1]:80"}, True),
                ({"REMOTE_ADDR": "1.1.1.1"}, False), ({"REMOTE_ADDR": ""}, False),
                ({"HTTP_HOST": "rebound.example"}, False), ({"HTTP_HOST": "127.0.0.1.evil"}, False),
                ({"HTTP_X_FORWARDED_FOR": "127.0.0.1"}, False), ({"HTTP_FORWARDED": "x"}, False),
                ({"HTTP_X_FORWARDED_FOR": "127.0.0.1", "minibottle.peer": ""}, True),
                ({"SERVER_PROTOCOL": "HTTP/1.0"}, False),
                ({"SERVER_NAME": "0.0.0.0"}, False), ({"SERVER_NAME": "10.0.0.1"}, False)):
            with self.subTest(environ=environ), mock.patch.object(minibottle, "noted", set()):
                answer = self.ask(app, environ=environ)
                self.assertEqual("<table>" in answer.text, shown)
                self.assertIn("raise ValueError", answer.text)

    def test_without_debug_or_without_its_file_there_is_none(self):
        with self.assertLogged():
            answer = ask(app_of(self.broken), headers={"Accept": "text/html"})
        self.assertNotIn("ValueError", answer.text)
        missing = minibottle.MissingFile("it does not lie beside")
        with mock.patch.object(minibottle, "companion", side_effect=missing):
            answer = self.ask(app_of(self.broken))
        self.assertIn("raise ValueError", answer.text)
        self.assertNotIn("<table>", answer.text)

    def test_text_without_end_takes_linear_time(self):
        from minibottle.debugging import hide_secrets
        for text in ("key" * 10 ** 6, "key='" * 10 ** 6, "key  " * 10 ** 6, "://a:" * 10 ** 6,
                     "key=" + "\\'" * 10 ** 6):
            self.assertQuick(hide_secrets, text)


@unittest.skipUnless(LONG, "needs MINIBOTTLE_LONG=1")
class RouteListTest(PooledTest):
    """--routes"""

    PROGRAM = textwrap.dedent("""\
        import functools
        from minibottle import App, Handler, run

        def decorated(func):
            def wrapper(*args, **more):
                return func(*args, **more)
            return functools.update_wrapper(wrapper, func)

        app, blog, post = App(), App(), App()

        @app.get("/hello/<name>", name="greet")
        @decorated
        def hello(name): pass

        class Note(Handler):
            def get(self): pass
            async def put(self): pass

        app.route("/note", callback=Note)
        app.route("/any", "ANY", functools.partial(hello, "me"))
        app.get("/len", callback=len)

        @app.websocket("/chat/<room>")
        async def chat(ws, room): pass

        @blog.post("/new")
        def new(): pass

        @post.get("/<id:int>")
        def show(id): pass

        def wsgi(environ, start_response): pass

        blog.mount("/post/", post)
        app.mount("/blog", blog)
        app.mount("/old/<year>", wsgi)

        def main():
            run(app, workers=2, bind="127.0.0.1:1")

        def count(): pass
        """)
    ROUTES = [
        "GET   /hello/<name>         greet               listed.py:11",
        "GET   /note                 listed:Note.get     listed.py:16",
        "PUT   /note                 listed:Note.put     listed.py:17",
        "ANY   /any                  listed:hello        listed.py:11",
        "GET   /len                  builtins:len",
        "WS    /chat/<room>          listed:chat         listed.py:23",
        "POST  /blog/new             listed:new          listed.py:26",
        "GET   /blog/post/<id:int>   listed:show         listed.py:29",
        "*     /old/<year>/          listed:wsgi         listed.py:32"]

    def run_it(self, *args):
        with tempfile.TemporaryDirectory() as folder:
            with open(os.path.join(folder, "listed.py"), "w") as file:
                file.write(self.PROGRAM)
            done = subprocess.run(
                [sys.executable, FILE, *args], cwd=folder, env=make_environment(PYTHONPATH=""),
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=TIMEOUT,
                universal_newlines=True)
        return done.returncode, done.stdout, done.stderr

    def test_each_is_printed_with_where_its_handler_is_and_nothing_is_served(self):
        for target in ("listed:app", "listed:main"):
            status, out, err = self.run_it(target, "--routes", "--reload")
            self.assertEqual((status, err), (0, ""))
            self.assertEqual([re.sub(" +", " ", line) for line in out.splitlines()],
                             [re.sub(" +", " ", line) for line in self.ROUTES])
            self.assertEqual(len({line.find("listed.py:") for line in out.splitlines()
                                  if "listed.py:" in line}), 1, "columns")

    def test_what_has_no_routes_is_a_line_and_exit_status_2(self):
        for target, said in (("listed:wsgi", "listed:wsgi is no App"),
                             ("listed:nothing", "no 'nothing' in listed")):
            status, out, err = self.run_it(target, "--routes")
            self.assertEqual((status, out, err.count("\n")), (2, "", 1))
            self.assertIn(said, err)

    def test_an_application_without_routes_has_an_empty_list(self):
        from minibottle.route_list import iter_routes, print_routes
        self.assertEqual(list(iter_routes(App())), [])
        print_routes(App(), {})


class StatusTest(WireTest):
    """The setting `status`: the server's figures, for this machine."""

    def ask(self, url, path="/status", **options):
        status, headers, body = fetch(url, path, **options)
        self.assertEqual(headers["Content-Type"], "application/json")
        return status, json.loads(body)

    def figures(self, url):
        return self.ask(url)[1]

    def grown(self, before, after):
        """The counts of requests that have changed."""
        rows = {**before, **before["responses"]}, {**after, **after["responses"]}
        return {name: rows[1][name] - number for name, number in rows[0].items()
                if type(number) is int and rows[1][name] != number and name != "starts"}

    def test_requests_are_counted_by_their_answers(self):
        app = app_of(lambda: "hello")
        app.get("/broken", callback=lambda: 1 // 0)
        app.get("/odd", callback=lambda: HTTPResponse("", "999 Odd"))
        app.get("/away", callback=lambda: redirect("/"))
        server = self.serve(app, status="/status")
        before = self.figures(server.url)
        with self.assertLogs("minibottle", "ERROR"):
            for path in ("/", "/", "/no", "/broken", "/away", "/odd"):
                fetch(server.url, path)
        self.assertEqual(self.connect(server).send(b"nonsense\r\n\r\n").answer().status, 400)
        expected = {"requests": 8, "2xx": 3, "3xx": 1, "4xx": 2, "5xx": 2}  # with its own first
        self.assertTrue(wait_until(lambda: self.figures(server.url)["requests"]
                                   - before["requests"] >= 8))
        after = self.figures(server.url)
        extra = after["requests"] - before["requests"] - 8                  # of those who waited
        expected["requests"] += extra
        expected["2xx"] += extra
        grown = self.grown(before, after)
        self.assertGreater(grown.pop("bytes"), 10)
        grown.pop("hand_overs", None)
        self.assertEqual(grown, expected)
        self.assertEqual(after["latency"]["inf"], after["requests"])

    def test_its_latencies_are_in_buckets_each_with_what_was_quicker(self):
        app = app_of(lambda: time.sleep(0.02))
        server = self.serve(app, status="/status")
        before = self.figures(server.url)["latency"]
        fetch(server.url)
        self.assertTrue(wait_until(
            lambda: self.figures(server.url)["latency"]["inf"] >= before["inf"] + 2))
        after = self.figures(server.url)["latency"]
        self.assertEqual(list(after), [*"0.001 0.003 0.01 0.03 0.1 0.3 1.0 3.0 10.0 inf".split()])
        self.assertEqual(sorted(after.values()), list(after.values()))
        slow = {name: after["inf"] - after[name] - before["inf"] + before[name] for name in after}
        self.assertGreaterEqual(slow["0.01"], 1)
        self.assertEqual((slow["10.0"], slow["inf"]), (0, 0))

    def test_a_worker_shows_its_threads_connections_and_memory(self):
        entered, leave = threading.Event(), threading.Event()
        app = app_of(lambda: (entered.set(), leave.wait(TIMEOUT))[0])
        server = self.serve(app, status="/status")
        with contextlib.closing(Client(server.url)) as client:
            client.request("GET", "/")
            entered.wait(TIMEOUT)
            figures = self.figures(server.url)
            leave.set()
            client.getresponse().read()
        worker, = figures["workers"]
        self.assertEqual((worker["pid"], worker["draining"]), (os.getpid(), False))
        self.assertEqual((worker["connections"], worker["busy_threads"]), (2, 2))
        self.assertGreater(worker["memory"], 1 << 20)
        self.assertGreaterEqual(figures["hand_overs"], 1)

    def test_it_is_for_this_machine_and_says_so_to_others(self):
        server = self.serve(app_of(lambda: "hello"), status="/status", trusted_proxies="127.0.0.2")
        for headers, status in (
                ({}, 200), ({"Host": "localhost:1"}, 200), ({"Host": "[::1]"}, 200),
                ({"Host": "rebound.example"}, 403), ({"X-Forwarded-For": "127.0.0.1"}, 403),
                ({"Forwarded": "for=127.0.0.1"}, 403), ({"Via": "1.1 a"}, 403)):
            with self.subTest(headers=headers):
                got, said = self.ask(server.url, headers=headers)
                self.assertEqual((got, "requests" in said), (status, status == 200))
        server = self.serve(app_of(lambda: "hello"), status="/status", trusted_proxies="127.0.0.1")
        for client, status in (("127.0.0.1", 200), ("1.1.1.1", 403)):
            self.assertEqual(self.ask(server.url, headers={"X-Forwarded-For": client})[0], status)
        wire = self.connect(server).send(b"GET /status HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n")
        self.assertEqual(wire.answer().status, 403)

    def test_a_worker_that_drains_is_not_ready(self):
        entered, leave = threading.Event(), threading.Event()
        app = app_of(lambda: (entered.set(), leave.wait(TIMEOUT))[0])
        server = self.serve(app, status="/status")
        self.assertEqual(self.ask(server.url, "/status?ready"), (200, {"ready": True}))
        with contextlib.closing(Client(server.url)) as client:
            client.ask("/status?ready")
            busy = self.connect(server).send(get("/"))
            entered.wait(TIMEOUT)
            server.worker.drain_idle_seconds = TIMEOUT
            server.worker.drain()
            status, _, body = client.ask("/status?ready")
            self.assertEqual((status, json.loads(body)), (503, {"ready": False}))
            leave.set()
            busy.answer()

    def test_other_methods_and_paths(self):
        server = self.serve(app_of(lambda: "hello"), status="/status")
        self.assertEqual(self.ask(server.url, method="POST")[0], 405)
        self.assertEqual(fetch(server.url, "/status", "HEAD")[::2], (200, b""))
        self.assertEqual(fetch(server.url)[2], b"hello")
        self.assertEqual(fetch(server.url, "/status/")[0], 404)
        plain = self.serve(app_of(lambda: "hello"))
        self.assertEqual(fetch(plain.url, "/status")[0], 404)
        for bad in ("status", "/a b", "/a?b", 5, None):
            self.assertRaises(UsageError, Settings, status=bad)

    def test_the_access_log_stays_as_it_was(self):
        for logs, lines in ((False, 0), (True, 1)):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                server = self.serve(app_of(lambda: "a"), status="/status", access_log=logs)
                fetch(server.url)
                server.stop()
            self.assertEqual(out.getvalue().count("GET / HTTP"), lines)

    def test_the_dashboard_has_all_figures_for_prometheus(self):
        server = self.serve(load_example("dashboard"), status="/figures")
        self.assertIn(b'fetch("/figures"', fetch(server.url, "/dashboard")[2])
        fetch(server.url, "/no")
        self.assertTrue(wait_until(lambda: self.figures_of(server)["responses"]["4xx"]))
        status, headers, body = fetch(server.url, "/metrics")
        self.assertEqual(headers["Content-Type"], "text/plain; version=0.0.4; charset=utf-8")
        for line in body.decode().splitlines():
            self.assertRegex(line, r"\A(# TYPE minibottle_\w+ (counter|gauge|histogram)|"
                             r'minibottle_\w+(\{\w+="[\w.+]+"\})? [\d.e-]+)\Z')
        self.assertRegex(body, rb'\nminibottle_responses_total\{class="4xx"\} [1-9]')
        self.assertRegex(body, rb'\nminibottle_seconds_bucket\{le="\+Inf"\} [1-9]')
        self.assertEqual(fetch(server.url, "/metrics", headers={"Host": "evil"})[0], 403)

    def figures_of(self, server):
        return self.ask(server.url, "/figures")[1]


@unittest.skipUnless(hasattr(os, "fork") and HAS_PROC, "needs fork and /proc")
@unittest.skipUnless(LONG, "needs MINIBOTTLE_LONG=1")
class CommandCompanionsTest(PooledTest):
    """The command line with what lies beside."""

    def test_a_trusted_proxy_that_is_no_address_is_a_line_and_exit_status_2(self):
        status, _, said = finish("shop:app", "--trusted-proxies", "10.0.0.0/8",
                                 "--trusted-proxies=nonsense", "--bind", "127.0.0.1:0")
        self.assertEqual((status, said.count("\n"), "nonsense" in said), (2, 1, True), said)

    def test_a_server_for_others_says_once_why_the_debug_page_is_not_shown(self):
        with serve("shop:app", "--debug", "--bind", "0.0.0.0:0", "--no-access-log") as server:
            url = server.url.replace("0.0.0.0", "127.0.0.1")
            for _ in range(2):
                body = fetch(url, "/raise", headers={"Accept": "text/html"})[2]
                self.assertEqual((b"it failed" in body, b"<table>" in body), (True, False))
            self.assertEqual(server.stop(), 0)
            self.assertEqual(server.said().count("0.0.0.0 is not loopback"), 1, server.said())

    def test_each_worker_knows_of_all_and_what_a_killed_one_has_counted_stays(self):
        def figures(server):
            return json.loads(fetch(server.url, "/status")[2])
        with serve("shop:app", "--workers", "2", "--status", "/status") as server:
            self.assertTrue(wait_until(lambda: len(figures(server)["workers"]) == 2))
            for _ in range(20):
                fetch(server.url)
            self.assertTrue(wait_until(lambda: figures(server)["requests"] > 20))
            before = figures(server)
            pids = {worker["pid"] for worker in before["workers"]}
            self.assertEqual(pids, set(server.children()))
            time.sleep(1)                    # it is not one that dies at once
            os.kill(min(pids), signal.SIGKILL)
            self.assertTrue(wait_until(lambda: len(
                {worker["pid"] for worker in figures(server)["workers"]} - {min(pids)}) == 2))
            after = figures(server)
            self.assertEqual(sorted(worker["restarts"] for worker in after["workers"]), [0, 1])
            self.assertEqual(after["starts"], 3)
            self.assertGreater(after["requests"], before["requests"])
            self.assertEqual(server.stop(), 0)

    def test_an_application_that_runs_itself_has_it_too(self):
        with open(os.path.join(FOLDER, "figured.py"), "w") as file:
            file.write("from minibottle import App\n"
                       "App().run(port=0, status='/s', workers=2, quiet=False)\n")
        with serve("figured.py", start=(), bind=False) as server:
            self.assertTrue(wait_until(
                lambda: len(json.loads(fetch(server.url, "/s")[2])["workers"]) == 2))
            self.assertEqual(server.stop(), 0)


# The files of examples/deploy, each with the program that it is for.

DEPLOY = os.path.join(ROOT, "examples", "deploy")
HAPROXY = shutil.which("haproxy")
GIVE_FD_3 = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.execvp(sys.argv[2], sys.argv[2:])"
DEPLOYED = '''
import asyncio
from minibottle import App, event_stream, request

app = App()

@app.get("/")
def index():
    return "first"

@app.route("/who", ["GET", "POST"])
def who():
    return request.remote_addr + " " + request.url

@app.post("/size", stream=True)
def size():
    return str(sum(map(len, iter(lambda: request.environ["wsgi.input"].read(65536), b""))))

@app.get("/ticks")
def ticks():
    return event_stream(count(), keepalive=0.5)

async def count():
    yield "first"
    await asyncio.sleep(3600)

@app.websocket("/echo")
async def echo(ws, request):
    async for message in ws:
        await ws.send(message + " from " + request.remote_addr)
'''


def read_deploy(name, *changes):
    """A file of examples/deploy with (old, new) put in; each must be there."""
    with open(os.path.join(DEPLOY, name), encoding="utf-8") as file:
        text = file.read()
    for old, new in changes:
        if old not in text:
            raise AssertionError(f"no {old!r} in {name}")
        text = text.replace(old, new)
    return text


def read_unit(name):
    """{key: value} of a systemd unit."""
    return dict(re.findall(r"^(\w+)=(.*)$", read_deploy(name), re.MULTILINE))


def enter_class(cls, manager):
    """What the manager gives, for all tests of the class."""
    given = manager.__enter__()
    cls.addClassCleanup(manager.__exit__, None, None, None)
    return given


def deployed_nginx(address):
    """The URL of an nginx with our nginx.conf, in front of "unix:/path" or "host:port"."""
    port = free_port()
    return run_nginx(port, read_deploy("nginx.conf", ("listen 80;", f"listen 127.0.0.1:{port};"),
                                       ("unix:/run/app.sock", address)))


@contextlib.contextmanager
def deployed_haproxy(urls):
    """The URL of an HAProxy with our haproxy.cfg, in front of two servers."""
    port = free_port()
    one, two = (url.split("//")[1] for url in urls)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "haproxy.cfg")
        with open(path, "w") as file:
            file.write(read_deploy(
                "haproxy.cfg", ("    user haproxy\n    group haproxy\n", ""),
                ("    log /dev/log local0\n", ""), ("bind :80", f"bind 127.0.0.1:{port}"),
                ("10.0.0.11:8080", one), ("10.0.0.12:8080", two)))
        with run_program([HAPROXY, "-f", path], port) as url:
            yield url


@contextlib.contextmanager
def listen_unix():
    """A listening socket, as app.socket tells systemd to make; its folder goes with it."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.path.join(folder, "sock"))
        sock.listen(1024)
        yield sock


def deployed_service(sock, folder, target="app:app", **env):
    """The Command of app.service, which is given this socket."""
    python, path, *args = shlex.split(read_unit("app.service")["ExecStart"])
    if (python, path, args[0]) != ("/usr/bin/python3", "/srv/app/minibottle.py", "app:app"):
        raise AssertionError((python, path, args))
    fd = sock.fileno()
    return serve(target, *args[1:], start=(FILE,), bind=False, cwd=folder, pass_fds=(fd,),
                 before=(sys.executable, "-c", GIVE_FD_3, str(fd)), **env)


def write_app(folder, code=DEPLOYED):
    """app.py of this folder, put there in one step."""
    path = os.path.join(folder, "app.py")
    with open(path + "~", "w") as file:
        file.write(code)
    os.replace(path + "~", path)


class DeployFilesTest(unittest.TestCase):
    """What is said in examples/deploy agrees, with itself and with minibottle's settings."""

    def seconds(self, name, key):
        number, unit = re.search(rf"{key}[ =](\d+)([smh]?)\b", read_deploy(name)).groups()
        return int(number) * {"": 1, "s": 1, "m": 60, "h": 3600}[unit]

    def test_connections_are_kept_for_less_and_calls_waited_for_longer_than_by_minibottle(self):
        settings = Settings()
        for name, key in (("nginx.conf", "keepalive_timeout"),
                          ("haproxy.cfg", "pool-purge-delay")):
            self.assertLess(self.seconds(name, key), settings.keepalive_timeout)
        for name, key in (("nginx.conf", "proxy_read_timeout"), ("haproxy.cfg", "timeout server")):
            self.assertGreater(self.seconds(name, key), settings.worker_timeout)
        self.assertGreater(self.seconds("app.service", "TimeoutStopSec"), settings.grace)
        self.assertIn(f"client_max_body_size {settings.max_body >> 20}m;",
                      read_deploy("nginx.conf"))

    def test_nginx_connects_where_systemd_listens(self):
        path = read_unit("app.socket")["ListenStream"]
        self.assertIn(f"server unix:{path} ", read_deploy("nginx.conf"))

    def test_each_file_says_first_how_it_is_used(self):
        for name in os.listdir(DEPLOY):
            head = read_deploy(name).partition("\n\n")[0]
            self.assertTrue(all(line[:1] == "#" for line in head.splitlines()), name)


class DeployedChecks:
    """What holds behind whichever proxy: `self.url` is its URL."""

    def test_the_application_sees_the_client_and_the_url_that_it_has_asked_for(self):
        lies = {"X-Forwarded-For": "6.6.6.6", "X-Forwarded-Host": "evil",
                "X-Forwarded-Port": "666", "X-Forwarded-Proto": "https",
                "Forwarded": "for=6.6.6.6"}
        named = {"Host": "example.org", **lies}
        for headers, url in (({}, self.url), (lies, self.url), (named, "http://example.org")):
            for method in "GET", "POST":
                status, _, body = fetch(self.url, "/who?a=b", method, headers=headers)
                self.assertEqual((status, body.decode()), (200, f"127.0.0.1 {url}/who?a=b"))

    def test_connections_to_the_application_are_kept(self):
        with Server(app_of(lambda: request.environ["REMOTE_PORT"]), port=0) as server, \
                self.front(server.url) as url, contextlib.closing(Client(url)) as client:
            ports = {client.ask()[2] for _ in range(50)}
        self.assertLess(len(ports), 5)

    def test_an_event_arrives_at_once(self):
        with contextlib.closing(Client(self.url)) as client:
            client.request("GET", "/ticks", headers={"Accept-Encoding": "gzip"})
            answer = client.getresponse()
            self.assertEqual(answer.headers["Content-Type"], "text/event-stream")
            inflater, said = zlib.decompressobj(31), b""
            while b"data: first\n\n" not in said:
                data = answer.read1(1000)
                self.assertTrue(data)
                said += inflater.decompress(data)

    def test_an_upload_arrives_whole(self):
        for body in b"x" * 10485760, (b"x" * 65536 for _ in range(160)):     # the second in chunks
            self.assertEqual(fetch(self.url, "/size", "POST", body)[::2], (200, b"10485760"))

    def test_a_websocket_passes(self):
        async def talk():
            async with connect_websocket(self.url.replace("http", "ws") + "/echo") as ws:
                await ws.send("hello")
                return await asyncio.wait_for(ws.receive(), TIMEOUT)
        self.assertEqual(asyncio.run(talk()), "hello from 127.0.0.1")

    def test_new_code_is_served_and_no_request_fails_when_the_servers_are_reloaded(self):
        with self.asked() as clients:
            for n in range(3):
                text = f"code {n}".encode()
                write_app(self.folder, DEPLOYED.replace('"first"', '"code %d"' % n + " " * n))
                old = {pid for server in self.servers for pid in server.children()}
                for server in self.servers:
                    self.reload(server)
                self.assertTrue(wait_until(lambda: not old & {
                    pid for server in self.servers for pid in server.children()}))
                self.assertEqual({fetch(self.url)[2] for _ in range(9)}, {text})
        self.assertLessEqual({(200, b"code 1"), (200, b"code 2")}, {*clients[0].answers})

    @contextlib.contextmanager
    def asked(self, url=None):
        """Clients that ask and post all the while, and get a 200 each time."""
        url = url or self.url
        with busy(3, url) as clients, busy(
                2, url, headers={"Connection": "close"}) as others, busy(
                2, url, "/size", method="POST") as posts:
            yield clients
        self.assertEqual({status for client in clients + others + posts
                          for status, _ in client.answers}, {200})
        for client in clients + others + posts:
            self.assertEqual((client.lost, client.refused), ([], []))
            self.assertGreater(sum(client.answers.values()), 5)


@unittest.skipUnless(LONG and NGINX, "needs nginx and MINIBOTTLE_LONG=1")
class NginxDeployedTest(DeployedChecks, unittest.TestCase):
    """nginx.conf, app.service and app.socket."""

    @classmethod
    def setUpClass(cls):
        cls.folder = enter_class(cls, tempfile.TemporaryDirectory())
        write_app(cls.folder)
        sock = enter_class(cls, listen_unix())
        cls.servers = [enter_class(cls, deployed_service(sock, cls.folder))]
        cls.url = enter_class(cls, deployed_nginx("unix:" + sock.getsockname()))

    @staticmethod
    def front(url):
        return deployed_nginx(url.split("//")[1])

    @staticmethod
    def reload(server):
        command = read_unit("app.service")["ExecReload"].replace("$MAINPID", str(server.pid))
        subprocess.check_call(shlex.split(command))

    def test_who_asks_while_the_service_restarts_waits_and_no_request_fails(self):
        def count():
            return sum(sum(client.answers.values()) for client in clients)
        with listen_unix() as sock, deployed_nginx("unix:" + sock.getsockname()) as url, \
                contextlib.ExitStack() as stack:
            server = stack.enter_context(deployed_service(sock, self.folder))
            with self.asked(url) as clients:
                self.assertEqual(server.stop(), 0)
                before = count()
                stack.enter_context(deployed_service(sock, self.folder))
                self.assertTrue(wait_until(lambda: count() > before + 50))


@unittest.skipUnless(LONG and HAPROXY, "needs haproxy and MINIBOTTLE_LONG=1")
class HaproxyDeployedTest(DeployedChecks, unittest.TestCase):
    """haproxy.cfg, in front of two servers."""

    @classmethod
    def setUpClass(cls):
        cls.folder = enter_class(cls, tempfile.TemporaryDirectory())
        write_app(cls.folder)
        cls.servers = [enter_class(cls, serve(
            "app:app", "--workers", "2", "--trusted-proxies", "127.0.0.1", "--no-access-log",
            cwd=cls.folder)) for _ in range(2)]
        cls.url = enter_class(cls, cls.front(*(server.url for server in cls.servers)))

    @staticmethod
    def front(one, two=None):
        return deployed_haproxy([one, two or one])

    @staticmethod
    def reload(server):
        server.process.send_signal(signal.SIGHUP)

    def test_one_machine_may_stop(self):
        bind = "127.0.0.1:%d" % free_port()
        with serve("app:app", "--bind", bind, cwd=self.folder) as leaving, \
                deployed_haproxy([leaving.url, self.servers[0].url]) as url, \
                self.asked(url):
            self.assertEqual(leaving.stop(), 0)
            time.sleep(0.5)


@needs("flask")
@unittest.skipUnless(LONG and NGINX, "needs nginx and MINIBOTTLE_LONG=1")
class FlaskDeployedTest(ServiceChecks, unittest.TestCase):
    """A Flask application by app.service, behind nginx."""

    @staticmethod
    @contextlib.contextmanager
    def serve():
        with listen_unix() as sock, deployed_nginx("unix:" + sock.getsockname()) as url, \
                deployed_service(sock, ROOT, "examples.example_flask:app"):
            yield url


DJANGO_SERVED = """
from django.contrib.staticfiles.handlers import StaticFilesHandler
from shop.wsgi import application

app = StaticFilesHandler(application)
"""


@needs("django")
@unittest.skipUnless(LONG and NGINX, "needs nginx and MINIBOTTLE_LONG=1")
class DjangoDeployedTest(unittest.TestCase):
    """A new project of Django by app.service, behind nginx; its admin is looked at."""

    @classmethod
    def setUpClass(cls):
        cls.project = enter_class(cls, tempfile.TemporaryDirectory())
        cls.env = make_environment(DJANGO_SUPERUSER_PASSWORD="tea-4-two", PYTHONPATH=cls.project)
        for args in (("-m", "django", "startproject", "shop", "."), ("manage.py", "migrate", "-v0"),
                     ("manage.py", "createsuperuser", "--noinput", "--username=ada",
                      "--email=ada@example.org")):
            if args[1] == "migrate":
                with open(os.path.join(cls.project, "shop", "settings.py"), "a") as file:
                    file.write("DEBUG = False\nALLOWED_HOSTS = ['127.0.0.1']\n")
            subprocess.run([sys.executable, *args], cwd=cls.project, env=cls.env, check=True,
                           stdout=subprocess.DEVNULL, timeout=3 * TIMEOUT)
        write_app(cls.project, DJANGO_SERVED)
        sock = enter_class(cls, listen_unix())
        enter_class(cls, deployed_service(sock, cls.project))
        cls.url = enter_class(cls, deployed_nginx("unix:" + sock.getsockname()))

    def test_its_admin_sends_a_guest_to_the_login(self):
        status, headers, _ = fetch(self.url, "/admin/")
        self.assertEqual((status, headers["Location"]), (302, "/admin/login/?next=/admin/"))
        self.assertEqual(fetch(self.url, "/no")[0], 404)

    def test_ada_logs_in_and_out_again(self):
        with contextlib.closing(Client(self.url)) as client:
            cookies = {}
            page = self.ask(client, cookies, "/admin/login/?next=/admin/")[2]
            self.assertIn("Log in | Django site admin", page)
            form = {"username": "ada", "password": "wrong", "next": "/admin/"}
            status, _, page = self.ask(client, cookies, "/admin/login/", page, **form)
            self.assertEqual((status, "Please enter the correct username" in page), (200, True))
            form["password"] = "tea-4-two"
            status, headers, _ = self.ask(client, cookies, "/admin/login/", page, **form)
            self.assertEqual((status, headers["Location"]), (302, "/admin/"))
            status, _, page = self.ask(client, cookies, "/admin/")
            self.assertEqual((status, "Site administration" in page), (200, True))
            status, _, page = self.ask(client, cookies, "/admin/auth/user/")
            self.assertEqual((status, "ada@example.org" in page), (200, True))
            self.assertEqual(self.ask(client, cookies, "/admin/logout/", page)[0], 200)
            self.assertEqual(self.ask(client, cookies, "/admin/")[0], 302)

    def test_a_form_from_another_origin_is_refused(self):
        with contextlib.closing(Client(self.url)) as client:
            cookies = {}
            page = self.ask(client, cookies, "/admin/login/")[2]
            self.assertEqual(self.ask(client, cookies, "/admin/login/", page,
                                      origin="http://evil.example")[0], 403)

    def test_static_files_of_the_admin(self):
        status, headers, body = fetch(self.url, "/static/admin/css/base.css")
        self.assertEqual((status, headers.get_content_type()), (200, "text/css"))
        self.assertEqual(len(body), int(headers["Content-Length"]))
        status, _, body = fetch(self.url, "/static/admin/css/base.css", headers={
            "If-Modified-Since": headers["Last-Modified"]})
        self.assertEqual((status, body), (304, b""))

    def ask(self, client, cookies, path, page=None, origin=None, **form):
        """A GET or, after a `page`, a POST of its form, as a browser sends it."""
        headers = {"Cookie": "; ".join(f"{key}={value}" for key, value in cookies.items())}
        body = None
        if page is not None:
            form["csrfmiddlewaretoken"] = re.search(
                'name="csrfmiddlewaretoken" value="(.+?)"', page)[1]
            headers["Origin"] = origin or self.url
            headers["Content-Type"] = "application/x-www-form-urlencoded"
            body = urllib.parse.urlencode(form)
        status, answered, data = client.ask(path, "POST" if body else "GET", body, headers)
        for line in answered.get_all("Set-Cookie", ()):
            key, value = line.partition(";")[0].split("=", 1)
            cookies[key] = value
        return status, answered, data.decode()


class OtherServerChecks(ServiceChecks):
    """An application of minibottle by a line of other_servers.md."""

    @classmethod
    @contextlib.contextmanager
    def serve(cls):
        line, = re.findall(rf"^    ((?:python -m )?{cls.name} .*)", read_deploy("other_servers.md"),
                           re.MULTILINE)
        port = free_port()
        argv = shlex.split(line.replace("127.0.0.1:8080", f"127.0.0.1:{port}"))
        with tempfile.TemporaryDirectory() as folder:
            with open(os.path.join(folder, "app.py"), "w") as file:
                file.write("from examples.example_bottle import Service\n\napp = Service()\n")
            path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
            env = make_environment(XDG_RUNTIME_DIR=folder, PATH=path)
            with run_program(argv, port, folder, env) as url:
                yield url


@needs("gunicorn")
@unittest.skipUnless(LONG, "needs MINIBOTTLE_LONG=1")
class GunicornLineTest(OtherServerChecks, unittest.TestCase):
    name = "gunicorn"


@needs("pyuwsgi")
@unittest.skipUnless(LONG, "needs MINIBOTTLE_LONG=1")
class UwsgiLineTest(OtherServerChecks, unittest.TestCase):
    name = "uwsgi"


@needs("cheroot")
@unittest.skipUnless(LONG, "needs MINIBOTTLE_LONG=1")
class CherootLineTest(OtherServerChecks, unittest.TestCase):
    name = "cheroot"


# === 18. WebSocket ============================================================

KEY, ACCEPT = "dGhlIHNhbXBsZSBub25jZQ==", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # RFC 6455 1.3
MASK = b"\x37\xfa\x21\x3d"  # RFC 6455 5.7
STEPS = (None, 1, 2, 3, 7, 64)
LIMITS = {"max_message": 1 << 20, "max_fragments": 100}


def plain_frame(first, payload=b"", mask=b""):
    """A frame as RFC 6455 5.2 has it, byte for byte."""
    size = len(payload)
    masked = 0x80 if mask else 0
    head = (struct.pack("!BB", first, masked | size) if size < 126 else
            struct.pack("!BBH", first, masked | 126, size) if size < 65536 else
            struct.pack("!BBQ", first, masked | 127, size))
    if mask:
        payload = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
    return head + mask + payload


def ws_wire(frames, mask=MASK):
    return b"".join(plain_frame(first, payload, mask) for first, payload in frames)


def ws_read(data, step=None, masked=True, **options):
    """What comes of these bytes, in pieces of `step`: messages, and at last a close code if they
    are bad; then what is left of them."""
    buf, events = bytearray(), []
    feed = [data[i:i + step] for i in range(0, len(data), step)] if step else [data]
    reader = iter_messages(buf, masked, **{**LIMITS, **options})
    feed = iter(feed)
    try:
        for event in reader:
            if event:
                events.append(event)
                continue
            piece = next(feed, None)
            if piece is None:
                break
            buf += piece
        return events, bytes(buf) + b"".join(feed)
    except WebSocketError as error:
        return events + [error.code], None


def is_wrong_utf8(data):
    """Is it none already, however it goes on?"""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data)
    except UnicodeDecodeError:
        return True
    return False


def close(code, reason=b""):
    return 0x88, struct.pack("!H", code) + reason


HELLO = (0x81, b"Hello"), (1, "Hello")
EURO = "κόσμε€😀".encode()
WS_CASES = [  # (behaviour, frames as (first byte, payload), messages; a number: the close code)
    *((f"a message of {size} bytes", [(0x82, b"\xfe" * size), (0x81, b"*" * size)],
       [(2, b"\xfe" * size), (1, "*" * size)])
      for size in (0, 1, 125, 126, 127, 128, 399, 401, 999)),
    *((f"a ping or pong of {size} bytes", [(0x89, b"\xff" * size), (0x8A, b"\0" * size)],
       [(9, b"\xff" * size), (10, b"\0" * size)]) for size in (0, 4, 125)),
    ("ten pings", [(0x89, b"%d" % i) for i in range(10)], [(9, b"%d" % i) for i in range(10)]),
    ("a ping of 126 bytes", [(0x89, b"\xfe" * 126)], [1002]),
    ("a pong of 126 bytes", [(0x8A, b"\xfe" * 126)], [1002]),
    ("a close of 126 bytes", [close(1000, b"*" * 124)], [1002]),
    *((f"reserved bits {bits}", [HELLO[0], (0x80 | bits << 4 | opcode, b"a"), HELLO[0]],
       [HELLO[1], 1002]) for bits in range(1, 8) for opcode in (1, 2, 8, 9, 10)),
    *((f"the reserved opcode {opcode}", [HELLO[0], (0x80 | opcode, b"a" * (opcode & 1)), HELLO[0]],
       [HELLO[1], 1002]) for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)),
    *((f"control frame {opcode} in fragments", [(opcode, b"a"), (0x80, b"b")], [1002])
      for opcode in (8, 9, 10)),
    ("two fragments", [(1, b"frag"), (0x80, b"ment")], [(1, "fragment")]),
    ("a ping between fragments", [(2, b"a"), (0x89, b"p"), (0, b""), (0x8A, b""), (0x80, b"b")],
     [(9, b"p"), (10, b""), (2, b"ab")]),
    ("a close between fragments", [(1, b"a"), close(1000), (0x80, b"b")], [(8, (1000, ""))]),
    ("empty fragments", [(1, b""), (0, b""), (0x80, b"")], [(1, "")]),
    ("a message after one in fragments", [(1, b"a"), (0x80, b""), HELLO[0]], [(1, "a"), HELLO[1]]),
    ("a last fragment of nothing", [(0x80, b"a"), HELLO[0]], [1002]),
    ("a fragment of nothing", [(0, b"a"), HELLO[0]], [1002]),
    ("a fragment after a whole message", [HELLO[0], (0x80, b"a")], [HELLO[1], 1002]),
    ("a message in another", [(1, b"a"), HELLO[0]], [1002]),
    ("a message in fragments in another", [(1, b"a"), (2, b"b")], [1002]),
    ("a character over two fragments", [(1, EURO[:1]), (0x80, EURO[1:])], [(1, "κόσμε€😀")]),
    ("each byte a fragment", [(1, b""), *((0, bytes((byte,))) for byte in EURO), (0x80, b"")],
     [(1, "κόσμε€😀")]),
    ("a character that never ends", [(1, b"a\xce"), (0x80, b"")], [1007]),
    ("a close without a code", [(0x88, b"")], [(8, (1005, ""))]),
    ("a close of one byte", [(0x88, b"a")], [1002]),
    ("a reason", [close(1000, "κό".encode())], [(8, (1000, "κό"))]),
    ("a reason of 123 bytes", [close(1000, b"*" * 123)], [(8, (1000, "*" * 123))]),
    ("a reason that is no UTF-8", [close(1000, b"\xce\xba\xed\xa0\x80")], [1007]),
    ("frames after a close", [close(1000), HELLO[0], (0xFF, b"")], [(8, (1000, ""))]),
    *((f"close code {code}", [close(code)], [(8, (code, ""))]) for code in (
        1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1014, 3000, 3999, 4999)),
    *((f"the bad close code {code}", [close(code, b"why")], [1002]) for code in (
        0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535)),
]
GOOD_UTF8 = ("", "\0", "\x7f\x80\u07ff\u0800", "\ud7ff\ue000\ufffd\uffff", "\U00010000\U0010ffff",
             "\ufffe\U0001fffe\ufdd0", "κόσμε", "e\u0301", UNICODE)
BAD_UTF8 = (b"\x80", b"\xbf", b"\xc0\xaf", b"\xc1\xbf", b"\xc3\x28", b"\xe0\x80\xaf",
            b"\xe0\x9f\xbf", b"\xed\xa0\x80", b"\xed\xbf\xbf", b"\xf0\x80\x80\xaf",
            b"\xf0\x8f\xbf\xbf", b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80",
            b"\xf8\x88\x80\x80\x80", b"\xfe", b"\xff", b"\xe2\x28\xa1", b"\xf0\x90\x28\xbc")


class WebSocketFrameTest(UnitTest):
    """RFC 6455 5 to 8."""

    def test_both_sides_decode_frames_the_same_whole_and_in_any_pieces(self):
        for name, frames, expected in WS_CASES:
            for mask in (MASK, b""):
                data = ws_wire(frames, mask)
                for step in STEPS:
                    with self.subTest(name, mask=mask, step=step):
                        self.assertEqual(ws_read(data, step, bool(mask))[0], expected)

    def test_lengths_are_read_in_all_three_forms(self):
        for size in (65535, 65536, 65537, 200_000):
            text = "x" * size
            for mask in (MASK, b""):
                data = plain_frame(0x81, text.encode(), mask)
                for step in (None, 4096, 65536, len(data) - 1):
                    with self.subTest(size=size, mask=mask, step=step):
                        self.assertEqual(ws_read(data, step, bool(mask)), ([(1, text)], b""))

    def test_a_length_that_is_not_in_its_shortest_form_is_refused(self):
        for length in (b"\xfe\0\x05", b"\xfe\0\x7d", b"\xff" + b"\0" * 7 + b"\x05",
                       b"\xff" + b"\0" * 6 + b"\xff\xff", b"\xff\x80" + b"\0" * 7):
            for step in (None, 1):
                data = b"\x81" + length + MASK + b"abcde"
                self.assertEqual(ws_read(data, step), ([1002], None))

    def test_a_client_must_mask_and_a_server_must_not(self):
        for first in (0x81, 0x82, 0x89, 0x88):
            self.assertEqual(ws_read(plain_frame(first), masked=True), ([1002], None))
            self.assertEqual(ws_read(plain_frame(first, b"", MASK), masked=False), ([1002], None))

    def test_what_follows_a_close_is_left_alone(self):
        data = ws_wire([HELLO[0], close(1001, b"bye")])
        for step in (None, 1, 5):
            self.assertEqual(ws_read(data + b"\xff\xff more", step),
                             ([HELLO[1], (8, (1001, "bye"))], b"\xff\xff more"))

    def test_what_ends_early_waits_for_more(self):
        data = ws_wire([(1, "é".encode()), (0x89, b"ping"), (0x80, b"x" * 130)])
        for end in range(len(data)):
            self.assertEqual(len(ws_read(data[:end])[0]), int(end >= 18))

    def test_a_wrong_first_byte_is_enough(self):
        for data in (b"\x83\x80", b"\xc1\x80", b"\x80\x80", b"\x09\x80", b"\x89\xfe", b"\x81\x00"):
            self.assertEqual(ws_read(data), ([1002], None))

    def test_text_is_utf_8_in_one_frame_and_in_any_fragments(self):
        for text in GOOD_UTF8:
            data = text.encode()
            for cut in range(len(data) + 1):
                frames = [(0x81, data), (1, data[:cut]), (0x80, data[cut:])]
                with self.subTest(text=text, cut=cut):
                    self.assertEqual(ws_read(ws_wire(frames)), ([(1, text)] * 2, b""))
                    self.assertEqual(ws_read(ws_wire(frames), 1), ([(1, text)] * 2, b""))

    def test_bad_utf_8_is_found_as_soon_as_it_is_there(self):
        for bad in BAD_UTF8:
            data = EURO + bad
            soon = next(end for end in range(len(data) + 1) if is_wrong_utf8(data[:end]))
            self.assertLess(soon - len(EURO), 4)
            for rest in (data + b"zzz", data[:soon]):
                whole = plain_frame(0x81, data + b"z" * 90, MASK)
                with self.subTest(bad=bad, rest=rest):
                    self.assertEqual(ws_read(ws_wire([(1, rest)])), ([1007], None))
                    self.assertEqual(ws_read(whole[:6 + len(rest)]), ([1007], None))
                    self.assertEqual(ws_read(whole[:6 + len(rest)], 1), ([1007], None))

    def test_a_message_has_a_limit_in_one_frame_and_in_many(self):
        for frames in ([(0x82, b"x" * 1001)], [(2, b"x" * 500), (0x80, b"x" * 501)],
                       [(2, b"x" * 1000), (0, b""), (0x80, b"x")]):
            for data in (ws_wire(frames), ws_wire(frames)[:-1]):
                for step in (None, 1, 300):
                    with self.subTest(frames=len(frames), step=step):
                        self.assertEqual(ws_read(data, step, max_message=1000), ([1009], None))
        for frames in ([(0x82, b"x" * 1000)], [(2, b"x" * 500), (0x80, b"x" * 500)]):
            self.assertEqual(ws_read(ws_wire(frames), max_message=1000)[0], [(2, b"x" * 1000)])
        with self.assertRaisesRegex(WebSocketError, r"over 1000 bytes \(max_message\)"):
            next(iter_messages(bytearray(b"\x82\xff\0\0\0\x0f\0\0\0\0mask"), True, 1000, 9))

    def test_the_frames_of_a_message_have_a_limit(self):
        many = [(2, b"x")] + [(0, b"x")] * 8 + [(0x89, b"")] * 50
        self.assertEqual(ws_read(ws_wire(many + [(0x80, b"x")]), max_fragments=10)[0][50:],
                         [(2, b"x" * 10)])
        self.assertEqual(ws_read(ws_wire(many + [(0, b"")] * 2), max_fragments=10)[0][50:], [1009])

    def test_no_bytes_whatever_give_another_exception_or_other_messages_in_pieces(self):
        rng = random.Random(6455)
        for _ in range(600):
            frames = rng.choice(WS_CASES)[1] + rng.choice(WS_CASES)[1]
            data = bytearray(ws_wire(frames)[:2000])
            for _ in range(rng.randint(0, 3)):
                data[rng.randrange(min(len(data), 40))] = rng.choice((0, 1, 0x80, 0x81, 0xFE, 0xFF))
            whole = ws_read(bytes(data))
            self.assertEqual(ws_read(bytes(data), rng.choice((1, 2, 5)))[0], whole[0], data)

    def test_many_small_frames_and_pieces_take_linear_time(self):
        self.assertQuick(ws_read, plain_frame(0x81, b"a", MASK) * 10_000)
        self.assertQuick(ws_read, ws_wire([(1, b"")] + [(0, b"")] * 9_999), None, True, ms=200)
        data = format_frame(1, b"a" * (1 << 20), MASK)
        self.assertQuick(lambda: ws_read(data, 100), ms=300)

    def test_what_is_written_is_what_the_rfc_shows(self):
        for made, wire in (  # RFC 6455 5.7
                (format_message("Hello"), "810548656c6c6f"),
                (format_message("Hello", MASK), "818537fa213d7f9f4d5158"),
                (format_frame(1, b"Hel", flags=0), "010348656c"),
                (format_frame(0, b"lo"), "80026c6f"),
                (format_frame(OP_PING, b"Hello"), "890548656c6c6f"),
                (format_message(b"x" * 256)[:4], "827e0100"),
                (format_message(b"x" * 65536)[:10], "827f0000000000010000"),
                (format_close(1001, "bye"), "880503e9627965"), (format_close(1005), "8800")):
            self.assertEqual(made.hex(), wire)

    def test_what_one_side_writes_the_other_reads(self):
        for size in (0, 1, 64, 125, 126, 399, 400, 401, 402, 403, 65535, 65536):
            for data in ("ä" * (size // 2), (bytes(range(256)) * 257)[:size]):
                for mask in (MASK, b"\0\0\0\0", b""):
                    wire = format_message(data, mask)
                    payload = data.encode() if isinstance(data, str) else data
                    self.assertEqual(wire, plain_frame(wire[0], payload, mask))
                    self.assertEqual(ws_read(wire, None, bool(mask))[0], [(wire[0] & 15, data)])

    def test_a_close_that_may_not_be_sent_is_a_mistake_of_the_caller(self):
        for code in (0, 999, 1004, 1006, 1015, 2000, 5000, -1, 10000):
            with self.assertRaises(ValueError):
                format_close(code)

    def test_a_long_reason_is_cut_between_characters(self):
        events, _ = ws_read(format_close(1011, "é" * 100), masked=False)
        self.assertEqual(events, [(8, (1011, "é" * 61))])

    def test_the_fast_path_agrees_with_fragments(self):
        """A whole plain frame takes a short way; the same in two pieces does not."""
        for payload in (b"", b"a", b"\xff", EURO, b"x" * 400, EURO * 100, b"\xce"):
            for first in (0x81, 0x82):
                whole = ws_wire([(first, payload), HELLO[0]])
                expected = ws_read(whole)
                for step in (1, 5, 8):
                    self.assertEqual(ws_read(whole, step), expected)
                split = ws_wire([(first & 15, payload[:1]), (0x80, payload[1:]), HELLO[0]])
                self.assertEqual(ws_read(split), expected)

    def test_the_websockets_package_reads_the_same(self):
        try:
            from websockets.protocol import Protocol, Side
        except ImportError:
            self.skipTest("the websockets package is not installed")
        for name, frames, expected in WS_CASES:
            if name == "a close between fragments":  # RFC 6455 5.4 has it; they call it an error
                continue
            for side, mask in ((Side.SERVER, MASK), (Side.CLIENT, b"")):
                other = Protocol(side, max_size=1 << 20)
                other.receive_data(ws_wire(frames, mask))
                sent, _ = ws_read(b"".join(other.data_to_send()), None, not mask)
                refused = [data[0] for opcode, data in sent if opcode == OP_CLOSE] == [1002]
                with self.subTest(name, mask=mask):
                    self.assertEqual(refused, 1002 in expected or name == "close code 1002")


class DeflateTest(UnitTest):
    """RFC 7692."""

    def test_what_the_rfc_shows_is_read(self):
        hello = bytes.fromhex("f248cdc9c90700")
        for name, frames in (
                ("7.2.3.1 one frame", [(0xC1, hello)]),
                ("7.2.3.1 two fragments", [(0x41, hello[:3]), (0x80, hello[3:])]),
                ("7.2.3.3 no compression", [(0xC1, bytes.fromhex("000500faff48656c6c6f00"))]),
                ("7.2.3.4 BFINAL set", [(0xC1, bytes.fromhex("f348cdc9c9070000"))]),
                ("7.2.3.5 two blocks", [(0xC1, bytes.fromhex("f248050000 00ffffcac9c90700"))]),
                ("a ping between", [(0x41, hello[:2]), (0x89, b""), (0, hello[2:5]),
                                    (0x80, hello[5:])]),
                ("an empty last fragment", [(0x41, hello), (0x80, b"")])):
            for options in ({}, NO_TAKEOVER):
                for step in STEPS:
                    deflate = Deflate(options, "server", "client")
                    data = ws_wire(frames + [HELLO[0]] + frames)
                    with self.subTest(name, options=options, step=step):
                        events, rest = ws_read(data, step, deflate=deflate)
                        self.assertEqual([event for event in events if event[0] == 1],
                                         [HELLO[1]] * 3)
                        self.assertEqual(rest, b"")

    def test_a_context_is_kept_if_that_was_agreed(self):
        frames = [(0xC1, bytes.fromhex(data)) for data in ("f248cdc9c90700", "f200110000")]
        self.assertEqual(ws_read(ws_wire(frames), deflate=Deflate({}, "server", "client")),
                         ([HELLO[1]] * 2, b""))  # RFC 7692 7.2.3.2
        alone = Deflate(NO_TAKEOVER, "server", "client")
        self.assertEqual(ws_read(ws_wire(frames), deflate=alone), ([HELLO[1], 1007], None))

    def test_rsv1_is_for_the_first_frame_of_a_message(self):
        for frames in ([(0xC9, b"")], [(0xC8, b"")], [(0xC0, b"")], [(0x41, b""), (0xC0, b"")],
                       [(0x41, b""), (0x40, b"")], [(0xA1, b"")], [(0xD1, b"")], [(0xC3, b"")]):
            self.assertEqual(ws_read(ws_wire(frames), deflate=Deflate({}, "server", "client")),
                             ([1002], None))

    def test_bad_data_is_refused(self):
        for payload in (b"\xff\xff", b"\x07", b"\xf2\0\x11\0\0", b"\xf3H\xcd\xc9\xc9\x07\x00zz"):
            for step in (None, 1):
                self.assertEqual(ws_read(ws_wire([(0xC2, payload)]), step,
                                         deflate=Deflate({}, "server", "client")), ([1007], None))
        text = Deflate({}, "client", "server").compress(b"\xff" * 300)
        self.assertEqual(ws_read(ws_wire([(0x41, text)]), deflate=Deflate({}, "server", "client")),
                         ([1007], None))

    @only_cpython
    def test_a_bomb_does_not_go_off(self):
        bomb = zlib.compressobj(9, zlib.DEFLATED, -15)
        payload = bomb.compress(bytes(50 << 20)) + bomb.flush(zlib.Z_SYNC_FLUSH)
        for step in (None, 1000):
            import tracemalloc                  # PyPy has none
            tracemalloc.start()
            result = ws_read(plain_frame(0xC2, payload), step, False,
                             deflate=Deflate({}, "client", "server"))
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            self.assertEqual(result, ([1009], None))
            self.assertLess(peak, 8 << 20)

    def test_the_limit_is_on_what_comes_out(self):
        for size in (1000, 1001):
            noise = random.Random(7692).getrandbits(8 * size).to_bytes(size, "big")
            wire = format_message(noise, MASK, Deflate({}, "client", "server"))
            self.assertGreater(len(wire), size)
            self.assertEqual(
                ws_read(wire, max_message=1000, deflate=Deflate({}, "server", "client"))[0],
                [(2, noise)] if size == 1000 else [1009])

    def test_what_one_side_writes_the_other_reads_by_whatever_options(self):
        messages = ["x" * 255, "x" * 256, "äöü " * 2000, b"\xff\0" * 8000, UNICODE * 50, "", b"y"]
        for bits in ("", "8", "9", "10", "15"):
            for names in ((), *((name,) for name in NO_TAKEOVER), tuple(NO_TAKEOVER)):
                options = {**dict.fromkeys(names, ""), "client_max_window_bits": bits,
                           "server_max_window_bits": bits}
                client = Deflate(options, "client", "server")
                server = Deflate(options, "server", "client")
                up = b"".join(format_message(message, MASK, client) for message in messages * 2)
                down = b"".join(format_message(message, b"", server) for message in messages * 2)
                expected = [(1 if isinstance(message, str) else 2, message) for message in messages]
                for step in (None, 50):
                    with self.subTest(options=options, step=step):
                        self.assertEqual(ws_read(up, step, True, deflate=server)[0], expected * 2)
                        self.assertEqual(ws_read(down, step, False, deflate=client)[0],
                                         expected * 2)

    def test_short_messages_are_not_compressed_and_long_ones_are_as_small_as_zlib_makes_them(self):
        for options in ({}, NO_TAKEOVER):
            self.assertEqual(format_message("x" * 255, b"", Deflate(options, "server", "client")),
                             format_message("x" * 255))
        for size in (256, 300, 1000, 5000, 40_000, 100_000):
            lines = (b"%d green bottles, " * size)[:size]
            noise = random.Random(size).getrandbits(8 * size // 2).to_bytes(size // 2, "big") * 2
            for data in (lines, noise):
                deflater = zlib.compressobj(6, zlib.DEFLATED, -15)
                best = deflater.compress(data) + deflater.flush(zlib.Z_SYNC_FLUSH)
                made = Deflate(NO_TAKEOVER, "server", "client").compress(data)
                self.assertEqual(zlib.decompressobj(-15).decompress(made), data)
                self.assertLess(len(made), len(best) * 1.02 + 8)

    def test_a_kept_context_makes_later_messages_smaller(self):
        for options, smaller in (({}, True), (NO_TAKEOVER, False)):
            deflate = Deflate(options, "server", "client")
            noise = random.Random(1).getrandbits(8 * 500).to_bytes(500, "big")
            first, second = (len(deflate.compress(noise)) for _ in "12")
            self.assertEqual(second < first // 9, smaller)

    def test_offers_are_read_by_the_grammar(self):
        for offer, options in (
                ("", {}), ("server_max_window_bits=10", ""),
                ("; server_max_window_bits=8;client_max_window_bits", "8"),
                (' ;\tserver_max_window_bits="15" ; client_max_window_bits=9', "15")):
            made = parse_deflate("permessage-deflate" + offer if offer[:1] != "s" else offer)
            self.assertEqual(made.get("server_max_window_bits", ""), options or "")
            self.assertEqual(bool(made), offer[:1] != "s")
        for bad in ("x-webkit-deflate-frame", "permessage-deflate;", "permessage-deflate; x",
                    "permessage-deflate; server_max_window_bits", "", "permessage-deflate-x",
                    "permessage-deflate; server_max_window_bits=7",
                    "permessage-deflate; server_max_window_bits=16",
                    "permessage-deflate; server_max_window_bits=010",
                    "permessage-deflate; client_max_window_bits=",
                    'permessage-deflate; client_max_window_bits="9',
                    "permessage-deflate; server_no_context_takeover=1",
                    "permessage-deflate; client_max_window_bits; client_max_window_bits=9",
                    "permessage-deflate; server_no_context_takeover; server_no_context_takeover"):
            with self.subTest(bad):
                self.assertEqual(parse_deflate(bad), {})


def ws_environ(path="/", **more):
    environ = environ_of(path, SERVER_PROTOCOL="HTTP/1.1", HTTP_HOST="a.b",
                         HTTP_UPGRADE="websocket", HTTP_CONNECTION="Upgrade",
                         HTTP_SEC_WEBSOCKET_KEY=KEY, HTTP_SEC_WEBSOCKET_VERSION="13")
    return {name: value for name, value in {**environ, **more}.items() if value is not None}


def shake(*args):
    """What accept_websocket returns, or (status, why)."""
    try:
        return accept_websocket(*args)
    except HTTPError as error:
        return error.status_code, error.body


class WebSocketHandshakeTest(UnitTest):
    """RFC 6455 4, RFC 7692 7.1."""

    def test_a_good_handshake_is_answered_as_the_rfc_shows(self):
        for more in ({}, {"HTTP_UPGRADE": "h2c, WebSocket"}, {"HTTP_CONNECTION": "x, UPGRADE"},
                     {"HTTP_SEC_WEBSOCKET_EXTENSIONS": "foo; bar=1"}):
            self.assertEqual(accept_websocket(ws_environ(**more)), (
                [("Connection", "Upgrade"), ("Upgrade", "websocket"),
                 ("Sec-WebSocket-Accept", ACCEPT)], "", None))

    def test_any_other_request_is_refused(self):
        for status, more in (
                (400, {"REQUEST_METHOD": "POST"}), (400, {"SERVER_PROTOCOL": "HTTP/1.0"}),
                (426, {"HTTP_UPGRADE": None}), (426, {"HTTP_UPGRADE": "h2c"}),
                (426, {"HTTP_UPGRADE": "xwebsocket"}),
                (426, {"HTTP_CONNECTION": None}), (426, {"HTTP_CONNECTION": "keep-alive"}),
                (426, {"HTTP_SEC_WEBSOCKET_VERSION": None}),
                (426, {"HTTP_SEC_WEBSOCKET_VERSION": "8"}),
                (426, {"HTTP_SEC_WEBSOCKET_VERSION": "13, 13"}),
                (400, {"HTTP_SEC_WEBSOCKET_KEY": None}), (400, {"HTTP_SEC_WEBSOCKET_KEY": "x"}),
                (400, {"HTTP_SEC_WEBSOCKET_KEY": "A" * 24}),
                (400, {"HTTP_SEC_WEBSOCKET_KEY": "A" * 21 + "==="}),
                (400, {"HTTP_SEC_WEBSOCKET_KEY": KEY + ", " + KEY}),
                (400, {"HTTP_SEC_WEBSOCKET_KEY": "A" * 21 + "é=="})):
            with self.subTest(more):
                self.assertEqual(shake(ws_environ(**more))[0], status)

    def test_our_first_subprotocol_that_the_client_has_is_chosen(self):
        for offered, ours, chosen in (
                (None, (), ""), (None, ["a"], ""), ("a", (), ""), ("a", ["b"], ""),
                ("a, b", ["b", "a"], "b"), ("a,b ,\tc", ["x", "c"], "c"), ("A", ["a"], "")):
            headers, subprotocol, _ = accept_websocket(
                ws_environ(HTTP_SEC_WEBSOCKET_PROTOCOL=offered), ours)
            self.assertEqual(subprotocol, chosen)
            self.assertEqual(dict(headers).get("Sec-WebSocket-Protocol", ""), chosen)

    def test_a_page_of_another_host_may_not_connect(self):
        for origin, host, origins, good in (
                (None, "a.b", None, True), (None, "a.b", ["https://c.d"], True),
                ("http://a.b", "a.b", None, True), ("https://a.b", "A.B", None, True),
                ("http://a.b:8080", "a.b:8080", None, True), ("http://a.b", "a.b:80", None, True),
                ("https://a.b", "a.b:443", None, True), ("http://[::1]:8", "[::1]:8", None, True),
                ("https://a.b", "a.b:80", None, False), ("http://a.b", "a.b:443", None, False),
                ("http://a.b:81", "a.b", None, False), ("http://a.b.c", "a.b", None, False),
                ("http://c.d", "a.b", None, False), ("null", "a.b", None, False),
                ("null", "", None, False), ("null", ":80", None, False),
                ("http://c.d", "a.b", ["http://c.d"], True), ("http://a.b", "a.b", [], True),
                ("http://e.f", "a.b", ["http://c.d"], False), ("http://e.f", "a.b", [], False),
                ("http://c.d", "a.b", "http://c.d.e", False), ("null", "a.b", ["null"], True),
                ("http://c.d", "a.b", "http://*.d", False), ("http://c.d", "a.b", ["*.d"], False),
                ("http://c.d", "a.b", "http://c.d", True), ("http://c.d", "a.b", "*", True),
                ("http://c.d", "a.b", ["*"], True),
                ("https://a.b", "a.b:443", ["http://c.d"], True)):
            with self.subTest(origin=origin, host=host, origins=origins):
                made = shake(ws_environ(HTTP_ORIGIN=origin, HTTP_HOST=host), (),
                               origins)
                self.assertEqual(made[0] != 403, good)
                if not good:
                    self.assertIn(f"origins=[{origin!r}]", made[1])

    def test_the_first_good_offer_of_compression_is_taken(self):
        alone = "; server_no_context_takeover; client_no_context_takeover"
        for offers, plain, takeover in (
                (None, None, None), ("x-foo", None, None), ("permessage-deflate", alone, ""),
                ("x-foo, permessage-deflate", alone, ""),
                ("permessage-deflate; x=1, permessage-deflate", alone, ""),
                ("permessage-deflate; client_max_window_bits", alone, ""),
                ("permessage-deflate; client_max_window_bits=10, permessage-deflate", alone, ""),
                ("permessage-deflate; client_no_context_takeover",
                 "; client_no_context_takeover; server_no_context_takeover",
                 "; client_no_context_takeover"),
                ("permessage-deflate; server_no_context_takeover", alone,
                 "; server_no_context_takeover"),
                ("permessage-deflate; server_max_window_bits=9, permessage-deflate",
                 "; server_max_window_bits=9" + alone, "; server_max_window_bits=9"),
                ("permessage-deflate; server_max_window_bits=16, permessage-deflate; "
                 "server_max_window_bits=12", "; server_max_window_bits=12" + alone,
                 "; server_max_window_bits=12")):
            environ = ws_environ(HTTP_SEC_WEBSOCKET_EXTENSIONS=offers)
            for answer, kept in ((plain, False), (takeover, True)):
                headers, _, deflate = accept_websocket(environ, takeover=kept)
                with self.subTest(offers=offers, takeover=kept):
                    self.assertEqual(dict(headers).get("Sec-WebSocket-Extensions"),
                                     None if answer is None else "permessage-deflate" + answer)
                    self.assertEqual(deflate is None, answer is None)
            self.assertIsNone(accept_websocket(environ, deflate=False)[2])

    def test_both_sides_understand_each_other(self):
        for deflate in (True, False):
            for takeover in (True, False):
                asked = request_websocket(KEY, ["x", "y"], deflate, takeover)
                environ = ws_environ(**{"HTTP_" + name.upper().replace("-", "_"): value
                                        for name, value in asked})
                answer, subprotocol, server = accept_websocket(environ, ["y"], takeover=takeover)
                chosen, client = check_accepted(101, HeaderDict(answer), KEY, ["x", "y"], deflate)
                self.assertEqual((chosen, subprotocol), ("y", "y"))
                self.assertEqual((client is None, server is None), (not deflate, not deflate))
                wire = format_message("x" * 999, MASK, client)
                self.assertEqual(ws_read(wire * 2, deflate=server)[0], [(1, "x" * 999)] * 2)
                self.assertEqual(len(wire) < 99, deflate)

    def test_a_client_refuses_what_it_did_not_ask_for(self):
        good = {"Upgrade": "WebSocket", "Connection": "upgrade", "Sec-WebSocket-Accept": ACCEPT}
        for code, status, more in (
                (None, 101, {}), (1002, 200, {}), (1002, 101, {"Upgrade": "h2c"}),
                (1002, 101, {"Connection": "close"}), (1002, 101, {"Sec-WebSocket-Accept": KEY}),
                (None, 101, {"Sec-WebSocket-Protocol": "chat"}),
                (1010, 101, {"Sec-WebSocket-Protocol": "x"}),
                (None, 101, {"Sec-WebSocket-Extensions": "permessage-deflate"}),
                (None, 101, {"Sec-WebSocket-Extensions":
                             "permessage-deflate; client_max_window_bits=9"}),
                (1010, 101, {"Sec-WebSocket-Extensions": "foo"}),
                (1010, 101, {"Sec-WebSocket-Extensions": "permessage-deflate, foo"}),
                (1010, 101, {"Sec-WebSocket-Extensions":
                             "permessage-deflate; client_max_window_bits"})):
            with self.subTest(more):
                try:
                    check_accepted(status, HeaderDict({**good, **more}), KEY, ["chat"])
                    found = None
                except WebSocketError as error:
                    found = error.code
                self.assertEqual(found, code)
        with self.assertRaises(WebSocketError):
            check_accepted(101, HeaderDict(good, **{"Sec-WebSocket-Extensions":
                                                    "permessage-deflate"}), KEY, (), False)

    def test_the_websockets_package_agrees_on_both_sides(self):
        try:
            from websockets.client import ClientProtocol
            from websockets.extensions import permessage_deflate as theirs
            from websockets.server import ServerProtocol
            from websockets.uri import parse_uri
        except ImportError:
            self.skipTest("the websockets package is not installed")
        for takeover in (True, False):
            client = ClientProtocol(parse_uri("ws://a.b/"), subprotocols=["x"], extensions=[
                theirs.ClientPerMessageDeflateFactory(server_max_window_bits=11,
                                                      client_max_window_bits=True)])
            client.send_request(client.connect())
            head = b"".join(client.data_to_send())[:-4].decode()
            answer, _, deflate = accept_websocket(parse_head(head, minibottle.Template()), ["x"],
                                                  takeover=takeover)
            client.receive_data(b"HTTP/1.1 101 Switching Protocols\r\n" + b"".join(
                format_field(field)[0] for field in answer) + b"\r\n")
            self.assertIsNone(client.handshake_exc)
            for text in ("x" * 999, "y" * 999, "x" * 999):
                client.receive_data(format_message(text, b"", deflate))
                client.send_text(text.encode())
            self.assertEqual(ws_read(b"".join(client.data_to_send()), deflate=deflate)[0],
                             [(1, letter * 999) for letter in "xyx"])
            self.assertEqual([event.data[:1] for event in client.events_received()[1:]],
                             [b"x", b"y", b"x"])
            server = ServerProtocol(subprotocols=["x"], extensions=[
                theirs.ServerPerMessageDeflateFactory(client_max_window_bits=10)])
            server.receive_data(b"GET / HTTP/1.1\r\nHost: a.b\r\n" + b"".join(
                format_field(field)[0] for field in request_websocket(
                    KEY, ["x"], takeover=takeover)) + b"\r\n")
            made = server.accept(server.events_received()[0])
            subprotocol, deflate = check_accepted(
                made.status_code, HeaderDict(made.headers.raw_items()), KEY, ["x"])
            self.assertEqual((subprotocol, deflate.bits), ("x", 10))
            server.send_response(made)
            server.data_to_send()
            server.receive_data(format_message("z" * 2000, MASK, deflate))
            self.assertEqual(bytes(server.events_received()[0].data), b"z" * 2000)
            server.send_text(b"z" * 2000)
            self.assertEqual(ws_read(b"".join(server.data_to_send()), None, False,
                                     deflate=deflate)[0], [(1, "z" * 2000)])


class Peer(Wire):
    """A WebSocket client that sends frames as they are."""

    def shake(self, path="/", *lines):
        """Ask for a WebSocket: (status, headers)."""
        return self.send(upgrade(path, *lines)).head()[::2]

    def say(self, *frames):
        return self.send(ws_wire(frames))

    def frame(self):
        """The next frame: (first byte, payload)."""
        first, size = self.exactly(2)
        if size > 125:
            size = int.from_bytes(self.exactly(2 if size == 126 else 8), "big")
        return first, self.exactly(size)

    def goodbye(self):
        """Skip to the close frame, and answer it: (code, reason)."""
        first, payload = self.frame()
        while first != 0x88:
            first, payload = self.frame()
        self.say((0x88, payload))
        return int.from_bytes(payload[:2], "big"), payload[2:].decode()


def upgrade(path="/", *lines, method="GET", version="HTTP/1.1"):
    return get(path, "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: " + KEY,
               "Sec-WebSocket-Version: 13", *lines, method=method, version=version)


async def echo(ws):
    async for message in ws:
        await ws.send(message)


def blocking_echo(ws):
    for message in ws:
        ws.send(message)


class WebSocketTest(WireTest):

    def serve_websocket(self, handler, app=None, settings=None, **options):
        app = app or App()
        app.websocket("/", **options)(handler)
        return self.serve(app, **settings or {})

    def peer(self, server, *args):
        wire = Peer(server.port)
        self.addCleanup(wire.close)
        status, headers = wire.shake(*args)
        self.assertEqual(status, 101)
        return wire

    def loop_do(self, function):
        """What it returns, on asyncio's thread."""
        async def call():
            return function()
        return asyncio.run_coroutine_threadsafe(call(), minibottle.bridge.loop).result(TIMEOUT)

    def open_sockets(self):
        return self.loop_do(lambda: sum(map(len, ws_module.watched.values())))

    def faster(self):
        """Look at what is late more often."""
        patch = mock.patch.object(ws_module, "TICK_SECONDS", 0.01)
        patch.start()
        self.addCleanup(patch.stop)
        minibottle.bridge.start()
        self.loop_do(lambda: [handle.cancel() for handle in minibottle.bridge.loop._scheduled])
        self.loop_do(ws_module.watched.clear)


class WebSocketServerTest(WebSocketTest):

    def test_messages_come_back_whole_in_fragments_and_with_the_handshake(self):
        frames = [(0x81, EURO), (2, b"a"), (0x89, b"ping"), (0, b""), (0x80, b"b"), (0x81, b""),
                  (0x82, b"x" * 70_000)]
        expected = [(0x81, EURO), (0x8A, b"ping"), (0x82, b"ab"), (0x81, b""),
                    (0x82, b"x" * 70_000)]
        for handler in (echo, blocking_echo):
            server = self.serve_websocket(handler)
            together = Peer(server.port)
            self.addCleanup(together.close)
            together.send(upgrade() + ws_wire(frames))
            status, _, headers = together.head()
            self.assertEqual((status, headers["Upgrade"], headers.get_all("Connection"),
                              headers["Sec-WebSocket-Accept"], headers["Content-Type"]),
                             (101, "websocket", ["Upgrade"], ACCEPT, None))
            apart = self.peer(server)
            for byte in ws_wire(frames[:6]):
                apart.send(bytes((byte,)))
            apart.say(frames[6])
            for peer in (together, apart):
                got = [peer.frame() for _ in expected]
                self.assertEqual(sorted(got), sorted(expected))
                self.assertEqual([row for row in got if row[0] != 0x8A],
                                 [row for row in expected if row[0] != 0x8A])
                peer.say(close(1000))
                self.assertEqual(peer.frame(), close(1000))
                self.assert_closed(peer)

    def test_the_hello_world_of_its_docstring_runs(self):
        code = ws_module.__doc__.partition("app.py")[2].partition("\n\n")[2]
        space = {}
        exec(textwrap.dedent(code.partition("    $ ")[0]), space)
        peer = self.peer(self.serve(space["app"]), "/hello/Ada")
        self.assertEqual(peer.frame(), (0x81, b"Hello Ada!"))
        self.assertEqual(peer.say(HELLO[0]).frame(), HELLO[0])

    def test_a_ping_is_answered_while_the_handler_blocks(self):
        free = threading.Event()
        server = self.serve_websocket(lambda ws: free.wait(TIMEOUT))
        peer = self.peer(server)
        self.assertEqual(peer.say((0x89, b"there?")).frame(), (0x8A, b"there?"))
        free.set()
        self.assertEqual(peer.goodbye(), (1000, ""))
        self.assert_closed(peer)

    def test_both_sides_close_with_a_code(self):
        async def leave(ws):
            await ws.close(4000, "enough")

        async def count(ws):
            await ws.send(str(len([message async for message in ws])))

        for handler, frames, options, expected in (
                (leave, [], {}, (4000, "enough")),
                (lambda ws: ws.close(4000, "enough"), [], {}, (4000, "enough")),
                (lambda ws: None, [], {}, (1000, "")),
                (echo, [close(1001, b"bye")], {}, (1001, "bye")),
                (echo, [(0x88, b"")], {}, (0, "")),
                (echo, [close(4999)], {}, (4999, "")),
                (echo, [(0x83, b"")], {}, (1002, "a frame may not begin with 0x83 here: a reserved "
                                                 "bit or opcode, a fragment out of turn")),
                (echo, [(0x81, b"\xff")], {}, (1007, "text is not UTF-8: invalid start byte")),
                (echo, [(0x82, b"x" * 11)], {"max_message": 10},
                 (1009, "message over 10 bytes (max_message)")),
                (echo, [(2, b"")] + [(0, b"")] * 3, {"max_fragments": 3},
                 (1009, "message of over 3 frames (max_fragments)"))):
            peer = self.peer(self.serve_websocket(handler, **options))
            with self.subTest(frames=frames, options=options):
                code, reason = peer.say(*frames).goodbye()
                self.assertEqual((code, reason), expected)
                self.assert_closed(peer)

    def test_what_came_before_a_bad_frame_has_its_answer(self):
        peer = self.peer(self.serve_websocket(echo))
        peer.say(HELLO[0], HELLO[0], (0x83, b""))
        self.assertEqual([peer.frame(), peer.frame()], [HELLO[0]] * 2)
        self.assertEqual(peer.goodbye()[0], 1002)

    def test_a_handler_that_raises_is_logged_once_and_closes_with_1011(self):
        async def fail(ws):
            raise ValueError("it failed")

        def fail_too(ws):
            raise ValueError("it failed")

        for handler in (fail, fail_too):
            server = self.serve_websocket(handler)
            with self.assertLogs("minibottle", "ERROR") as logs:
                self.assertEqual(self.peer(server).goodbye(), (1011, ""))
            self.assertEqual(len(logs.records), 1)
            self.assertIn("it failed", logs.output[0])
            self.assertIn("of a WebSocket failed: '/' of 127.0.0.1", logs.output[0])

    def test_a_handler_learns_why_it_has_ended(self):
        ends = queue.Queue()

        async def note(ws):
            try:
                await ws.receive()
            except WebSocketClosed as error:
                ends.put((error.code, error.reason, str(error)))
                raise

        def note_too(ws):
            try:
                ws.receive()
            except WebSocketClosed as error:
                ends.put((error.code, error.reason, str(error)))
                raise

        for handler in (note, note_too):
            server = self.serve_websocket(handler)
            self.peer(server).say(close(4001, b"why"))
            self.assertEqual(ends.get(timeout=TIMEOUT), (4001, "why", "closed with 4001: why"))
            self.peer(server).reset()
            self.assertEqual(ends.get(timeout=TIMEOUT)[:2], (1006, "the peer has vanished"))

    def test_any_other_request_is_refused_as_http(self):
        app = App()

        @app.hook("before_request")
        def guard():
            if request.query.get("no"):
                abort(401, "who are you?")

        @app.error(403)
        def page(error):
            return "a page of our own"

        outer = App()
        outer.mount("/in", app)
        self.serve_websocket(echo, app)
        server = self.serve(outer)
        for data, status, text in (
                (upgrade("/in/?no=1"), 401, b"who are you?"),
                (upgrade("/in/", "Origin: http://evil.example"), 403, b"a page of our own"),
                (upgrade("/in/nowhere"), 404, b""), (get("/in/"), 426, b"This is a WebSocket"),
                (upgrade("/in/", method="POST"), 405, b""),
                (upgrade("/in/", method="HEAD"), 400, b""),
                (upgrade("/in/", version="HTTP/1.0"), 400, b"GET of HTTP/1.1"),
                (upgrade("/in/", "Content-Length: 2") + b"ab", 400, b"without a body"),
                (upgrade("/in/", "Transfer-Encoding: chunked") + b"1\r\na\r\n0\r\n\r\n", 400,
                 b"without a body")):
            answer = self.fetch(server, data, data.split()[0].decode())
            with self.subTest(data):
                self.assertEqual(answer.status, status)
                self.assertIn(text, answer.body)
            if status == 426:
                self.assertEqual((answer.headers["Upgrade"], answer.headers["Connection"],
                                  answer.headers["Sec-WebSocket-Version"]),
                                 ("websocket", "Upgrade", "13"))
        peer = self.peer(server, "/in/", "Origin: http://x")
        self.assertEqual(peer.say(HELLO[0]).frame(), HELLO[0])

    def test_on_another_server_it_is_a_501(self):
        app = App()
        app.websocket("/")(echo)
        with serve_wsgiref(app) as url:
            status, _, body = fetch(url, headers={"Upgrade": "websocket", "Connection": "Upgrade"})
        self.assertEqual(status, 501)
        self.assertIn(b"A WebSocket needs minibottle&#039;s own server.", body)
        self.assertEqual(TestClient(app).get("/").status_code, 501)

    def test_arguments_the_request_and_a_subprotocol(self):
        app = App()

        @app.websocket("/<name>/<n:int>", subprotocols=["b", "a"], route={"name": "it"})
        async def greet(ws, request, name, n):
            await ws.send_json([name, n, ws.subprotocol, request.query.q, request.get_header("X")])
            await ws.send_json(await ws.receive_json())

        peer = self.peer(self.serve(app), "/Ada/7?q=1", "X: y", "Sec-WebSocket-Protocol: a, b")
        self.assertEqual(peer.frame(), (0x81, b'["Ada", 7, "b", "1", "y"]'))
        self.assertEqual(peer.say((0x81, b'{"a":1}')).frame(), (0x81, b'{"a": 1}'))
        self.assertEqual(app.get_url("it", name="A", n=1), "/A/1")
        with self.assertRaisesRegex(TypeError, "no option max_size"):
            app.websocket("/x", max_size=1)

    def test_a_client_that_vanishes_leaves_nothing(self):
        server = self.serve_websocket(echo)
        blocking = self.serve_websocket(blocking_echo)
        self.peer(server).close()
        wait_until(lambda: not server.worker.connections)
        tasks = self.loop_do(lambda: len(asyncio.all_tasks()))
        count = (lambda: len(os.listdir("/proc/self/fd"))) if HAS_PROC else (lambda: 0)
        before = count()
        with self.assertLogs("minibottle") as logs, self.assertLogs("asyncio") as others:
            logging.getLogger("minibottle").warning("the only line")
            logging.getLogger("asyncio").warning("the only line")
            for leave in (Peer.close, Peer.reset):
                for data in (b"", b"\x81", ws_wire([(1, b"a")]), ws_wire([HELLO[0]] * 99)):
                    for where in (server, blocking):
                        leave(self.peer(where).send(data))
            self.assertTrue(wait_until(lambda: not server.worker.connections
                                       and not blocking.worker.connections
                                       and not ws_module.threads))
            self.assertTrue(wait_until(lambda: self.loop_do(
                lambda: len(asyncio.all_tasks())) <= tasks))
        self.assertEqual((len(logs.output), len(others.output)), (1, 1))
        self.assertEqual(count(), before)

    def test_a_server_that_stops_says_so_and_waits_for_the_answer(self):
        ends = queue.Queue()

        async def note(ws):
            async for _ in ws:
                pass
            ends.put(ws.code)

        for answers in (True, False):
            server = self.serve_websocket(note, settings={"grace": 0.1})
            peer = self.peer(server)
            server.worker.drain()
            self.assertEqual(peer.frame(), close(1001, b"the server stops"))
            if answers:
                peer.say(close(1001))
            self.assert_closed(peer)
            server.stop()
            self.assertEqual(ends.get(timeout=TIMEOUT), 1001)
        self.assertTrue(wait_until(lambda: not self.open_sockets()))

    def test_it_counts_as_a_connection_and_is_in_the_access_log(self):
        with self.assertLogs("minibottle.access") as logs:
            server = self.serve_websocket(echo, settings={"max_connections": 1})
            peer = self.peer(server)
            with contextlib.closing(Wire(server.port)) as second:
                second.send(get("/")).sock.settimeout(0.05)
                with self.assertRaises(socket.timeout):
                    second.sock.recv(1)
                peer.say(close(1000)).frame()
                peer.close()
                second.sock.settimeout(TIMEOUT)
                self.assertEqual(second.answer().status, 426)
        self.assertIn('"GET / HTTP/1.1" 101 -', logs.output[0])

    def test_a_reader_that_stalls_makes_send_wait_and_then_ends_it(self):
        stalled, sent = threading.Event(), []

        async def flood(ws):
            for i in range(100):
                try:
                    await asyncio.wait_for(ws.send(bytes(1 << 20)), 0.1)
                except asyncio.TimeoutError:
                    stalled.set()
                    return await ws.receive()
                finally:
                    sent.append(i)

        peer = self.peer(self.serve_websocket(flood))
        self.assertTrue(stalled.wait(TIMEOUT))
        self.assertLess(len(sent), 50)
        for _ in sent:
            self.assertEqual(peer.frame(), (0x82, bytes(1 << 20)))

    def test_a_reader_that_stalls_for_too_long_is_gone(self):
        self.faster()
        ends = queue.Queue()

        async def flood(ws):
            try:
                await ws.send(bytes(50 << 20))
            except WebSocketClosed as error:
                ends.put((error.code, error.reason))

        server = self.serve_websocket(flood, write_timeout=0.05)
        peer = self.peer(server)
        self.assertEqual(ends.get(timeout=TIMEOUT),
                         (1006, "the peer has read nothing for 0.05 s"))
        self.assertTrue(wait_until(lambda: not server.worker.connections))
        with self.assertRaises((Cut, ConnectionError)):
            peer.frame()

    @unittest.skipUnless(LONG, "needs MINIBOTTLE_LONG=1")
    def test_a_handler_that_is_slow_makes_its_peer_wait(self):
        free = threading.Event()

        def count(ws):
            free.wait(TIMEOUT)
            ws.send(str(sum(1 for _, message in zip(range(40), ws) if len(message) == 1 << 20)))

        peer = self.peer(self.serve_websocket(count, max_queue=3))
        data = ws_wire([(0x82, bytes(1 << 20))]) * 40
        peer.sock.settimeout(0.2)
        view = memoryview(data)
        with self.assertRaises(socket.timeout):
            while view:
                view = view[peer.sock.send(view):]
        self.assertGreater(len(view), 10 << 20)
        free.set()
        peer.sock.settimeout(TIMEOUT)
        peer.send(view)
        self.assertEqual(peer.frame(), (0x81, b"40"))

    @unittest.skipUnless(LONG, "needs MINIBOTTLE_LONG=1")
    def test_who_does_not_answer_a_ping_is_gone(self):
        self.faster()
        silent = self.peer(self.serve_websocket(echo, heartbeat=0.05, close_timeout=0.05))
        alive = self.peer(self.serve_websocket(echo, heartbeat=0.3 * SLOW))
        self.assertEqual(silent.frame(), (0x89, b""))
        self.assertEqual(silent.frame(), close(1011, b"no answer to a ping within 0.05 s"))
        self.assert_closed(silent)
        for _ in range(2):
            self.assertEqual(alive.frame(), (0x89, b""))
            alive.say((0x8A, b""))
        self.assertEqual(alive.say(HELLO[0]).frame(), HELLO[0])

    def test_a_handler_that_does_not_see_the_end_is_cancelled_after_a_while(self):
        self.faster()
        cancelled = threading.Event()

        async def sleep(ws):
            try:
                await asyncio.sleep(1000)
            except asyncio.CancelledError:
                cancelled.set()
                raise

        with mock.patch.object(ws_module, "GRACE_SECONDS", 0.05):
            self.peer(self.serve_websocket(sleep)).close()
            self.assertTrue(cancelled.wait(TIMEOUT))

    def test_a_pong_answers_the_pings_before_it_and_no_other(self):
        async def ask(ws):
            answers = [asyncio.ensure_future(ws.ping()) for _ in range(3)]
            await ws.receive()
            await ws.send(str([answer.done() for answer in answers]))
            await asyncio.gather(*answers)
            await ws.send("all")

        peer = self.peer(self.serve_websocket(ask))
        pings = [peer.frame() for _ in range(3)]
        self.assertEqual(pings, [(0x89, b"1"), (0x89, b"2"), (0x89, b"3")])
        peer.say((0x8A, b""), (0x8A, b"9"), (0x8A, b"x"), (0x8A, b"2"))
        self.assertEqual(peer.say(HELLO[0]).frame(), (0x81, b"[True, True, False]"))
        self.assertEqual(peer.say((0x8A, b"3")).frame(), (0x81, b"all"))

    def test_two_coroutines_may_send_and_one_receive(self):
        async def both(ws):
            first = asyncio.ensure_future(ws.receive())
            await asyncio.sleep(0)
            try:
                await ws.receive()
            except RuntimeError as error:
                await asyncio.gather(*(ws.send(str(error)) for _ in range(2)))
            await ws.send(await first)

        peer = self.peer(self.serve_websocket(both))
        text = b"two coroutines receive from one WebSocket"
        self.assertEqual([peer.frame(), peer.frame()], [(0x81, text)] * 2)
        self.assertEqual(peer.say(HELLO[0]).frame(), HELLO[0])

    def test_plain_functions_have_a_limit_and_a_timeout(self):
        def patient(ws):
            try:
                ws.receive(timeout=0.01)
            except asyncio.TimeoutError:
                ws.send("nothing came")
            ws.send(ws.receive(TIMEOUT))

        server = self.serve_websocket(patient)
        with mock.patch.object(ws_module, "MAX_THREADS", 1):
            peer = self.peer(server)
            self.assertEqual(peer.frame(), (0x81, b"nothing came"))
            self.assertEqual(self.fetch(server, upgrade()).status, 503)
            self.assertEqual(peer.say(HELLO[0]).frame(), HELLO[0])
            peer.goodbye()
            self.assertTrue(wait_until(lambda: not ws_module.threads))
            self.assertEqual(self.peer(server).frame(), (0x81, b"nothing came"))


    def test_who_vanishes_while_the_handler_does_not_read_is_noticed(self):
        self.faster()
        cancelled = threading.Semaphore(0)

        async def sleep(ws):
            try:
                await asyncio.sleep(1000)
            finally:
                cancelled.release()

        server = self.serve_websocket(sleep, max_queue=2, heartbeat=0.02, close_timeout=0.02)
        with mock.patch.object(ws_module, "GRACE_SECONDS", 0.02):
            for leave in (Peer.close, Peer.reset):
                leave(self.peer(server).say(HELLO[0], HELLO[0], HELLO[0]))
                self.assertTrue(cancelled.acquire(timeout=TIMEOUT))
            self.assertTrue(wait_until(lambda: not server.worker.connections))
            alive = self.peer(server).say(HELLO[0], HELLO[0])   # no pong of it is read, nor asked
            self.assertEqual([alive.frame() for _ in range(4)], [(0x89, b"")] * 4)
            alive.close()
            self.assertTrue(cancelled.acquire(timeout=TIMEOUT))
            self.assertTrue(wait_until(lambda: not ws_module.watched.get(minibottle.bridge.loop)))

    def test_the_end_of_a_task_group_is_no_failure(self):
        class Group(Exception):  # as Python's since 3.11
            def __init__(self, *exceptions):
                self.exceptions = exceptions

        async def several(ws):
            try:
                await ws.receive()
            except WebSocketClosed as error:
                more = () if ws.code == 1000 else (KeyError("a fault"),)
                raise Group(Group(error), *more) from None

        server = self.serve_websocket(several)
        with self.assertLogs("minibottle") as logs:
            for code in (1000, 4000):
                self.assertEqual(self.peer(server).say(close(code)).frame(), close(code))
            self.assertTrue(wait_until(lambda: "a fault" in "".join(logs.output)))
        self.assertEqual(len(logs.output), 1)

    def test_what_is_no_json_closes_with_1007_and_is_no_failure(self):
        seen = queue.Queue()

        async def listen(ws):
            try:
                await ws.receive_json()
            except WebSocketError as error:
                seen.put(error.code)
                raise

        def listen_too(ws):
            try:
                ws.receive_json()
            except WebSocketError as error:
                seen.put(error.code)
                raise

        with self.assertLogs("minibottle") as logs:
            logging.getLogger("minibottle").warning("the only line")
            for handler in (listen, listen_too):
                for frame in ((0x81, b"{bad"), (0x81, b"NaN"), (0x82, b"\xff"),
                              (0x81, b"[" * 99999)):
                    peer = self.peer(self.serve_websocket(handler))
                    code, reason = peer.say(frame).goodbye()
                    self.assertEqual((code, reason[:17]), (1007, "this is not JSON:"))
                    self.assertEqual(seen.get(timeout=TIMEOUT), 1007)
                    self.assert_closed(peer)
            self.assertTrue(wait_until(lambda: not ws_module.threads))
        self.assertEqual(len(logs.output), 1)

    def test_any_bytes_are_a_binary_message_and_nan_is_no_json(self):
        async def send(ws):
            for data in (bytearray(b"a"), memoryview(b"xbx")[1:2]):
                await ws.send(data)
            for value in (float("nan"), object()):
                try:
                    await ws.send_json(value)
                except (ValueError, TypeError) as error:
                    await ws.send(type(error).__name__)

        peer = self.peer(self.serve_websocket(send))
        self.assertEqual([peer.frame() for _ in range(4)], [
            (0x82, b"a"), (0x82, b"b"), (0x81, b"ValueError"), (0x81, b"TypeError")])

    def test_a_handler_may_keep_things_on_it(self):
        async def tell(ws):
            ws.name = "Ada"
            await ws.send(ws.name + str(weakref.ref(ws)() is ws))

        def tell_too(ws):
            ws.name = "Ada"
            ws.send(ws.name + str(weakref.ref(ws)() is ws))

        for handler in (tell, tell_too):
            self.assertEqual(self.peer(self.serve_websocket(handler)).frame(), (0x81, b"AdaTrue"))

    def test_a_plain_function_has_keywords_and_the_context_of_the_hooks(self):
        user = contextvars.ContextVar("user")
        app = App()
        app.add_hook("before_request", lambda: user.set("Ada"))

        def leave(ws):
            ws.send(data=user.get())
            ws.close(code=4000, reason="enough")

        async def tell(ws):
            await ws.send(user.get())

        app.websocket("/async")(tell)
        server = self.serve_websocket(leave, app)
        peer = self.peer(server)
        self.assertEqual(peer.frame(), (0x81, b"Ada"))
        self.assertEqual(peer.goodbye(), (4000, "enough"))
        self.assertEqual(self.peer(server, "/async").frame(), (0x81, b"Ada"))

    def test_an_answer_still_goes_out_when_a_bad_frame_comes_meanwhile(self):
        came, go = threading.Semaphore(0), threading.Semaphore(0)

        def answer(ws):
            text = ws.receive()
            came.release()
            go.acquire(timeout=TIMEOUT)
            ws.send(text)

        def answer_and_read_on(ws):
            answer(ws)
            ws.receive()

        for handler, code in ((answer_and_read_on, 1002), (answer, 1000)):
            peer = self.peer(self.serve_websocket(handler, close_timeout=TIMEOUT)).say(HELLO[0])
            self.assertTrue(came.acquire(timeout=TIMEOUT))
            peer.say((0x83, b""))
            self.assertTrue(wait_until(lambda: self.loop_do(
                lambda: any(ws.failure for ws in ws_module.watched[minibottle.bridge.loop]))))
            go.release()
            self.assertEqual(peer.frame(), HELLO[0])
            self.assertEqual(peer.frame()[1][:2], code.to_bytes(2, "big"))
            self.assert_closed(peer)

    def test_a_bad_frame_closes_a_handler_that_never_reads_soon_too(self):
        self.faster()
        free = threading.Event()
        self.addCleanup(free.set)
        server = self.serve_websocket(lambda ws: free.wait(TIMEOUT), close_timeout=0.05)
        self.assertEqual(self.peer(server).say((0x83, b"")).goodbye()[0], 1002)


class UpgradeTest(WireTest):
    """RFC 9110 7.8."""

    def test_any_protocol_may_take_over_and_a_101_without_one_is_an_error(self):
        def app(environ, start_response):
            def begin(c, close):
                c.sock.send(b"came: " + c.buf)
                close(c)

            if environ["PATH_INFO"] == "/late":
                environ["minibottle.upgrade"].append(lambda c, close: 1 // 0)
            elif "minibottle.upgrade" in environ and environ["PATH_INFO"] != "/never":
                environ["minibottle.upgrade"].append(begin)
            start_response("101 Switching Protocols", [("Upgrade", "talk")])
            return []

        server = self.serve(app)
        wire = self.connect(server).send(get("/", "Connection: Upgrade", "Upgrade: talk") + b"abc")
        self.assertEqual(wire.head()[0], 101)
        self.assertEqual(wire.file.read(), b"came: abc")
        with self.assertLogged():
            self.assertEqual(self.fetch(server, get("/")).status, 500)
        with self.assertLogged():
            self.assertEqual(self.fetch(server, get("/never", "Upgrade: talk", "Connection: Upgrade"
                                                    )).status, 500)
        with self.assertLogged():
            wire = self.connect(server).send(get("/late", "Connection: Upgrade", "Upgrade: talk"))
            self.assertEqual(wire.head()[0], 101)
            self.assert_closed(wire)

    assertLogged = UnitTest.assertLogged


class WebSocketClientTest(WebSocketTest):

    def talk(self, conversation):
        return asyncio.run(asyncio.wait_for(conversation, TIMEOUT))

    def test_it_talks_to_our_server(self):
        server = self.serve_websocket(echo, subprotocols=["x"])

        async def conversation(**options):
            async with connect_websocket(server.url.replace("http", "ws") + "/?a=b",
                                         subprotocols=["y", "x"], **options) as ws:
                self.assertEqual((ws.subprotocol, ws.deflate is None), ("x", bool(options)))
                for message in ("ä" * 9000, b"", bytes(3_000_000), "hello"):
                    await ws.send(message)
                    self.assertEqual(await ws.receive(), message)
                await ws.send_json({"a": 1})
                self.assertEqual(await ws.receive_json(), {"a": 1})
                self.assertLess(await ws.ping(), TIMEOUT)
            self.assertEqual(ws.code, 1000)
            with self.assertRaises(WebSocketClosed):
                await ws.send("late")
            await ws.close()

        self.talk(conversation())
        self.talk(conversation(deflate=False))
        self.assertTrue(wait_until(lambda: not server.worker.connections))
        gc.collect()
        self.assertEqual([loop for loop in ws_module.watched if loop is not minibottle.bridge.loop],
                         [])

    def test_what_cannot_be_opened_says_why(self):
        server = self.serve(App())
        with socket.socket() as unused, socket.socket() as silent:
            unused.bind(("127.0.0.1", 0))
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            for url, error, text in (
                    (f"ws://127.0.0.1:{server.port}/", WebSocketError, "answered with 404"),
                    (f"ws://127.0.0.1:{unused.getsockname()[1]}/", ConnectionRefusedError, ""),
                    (f"ws://127.0.0.1:{silent.getsockname()[1]}/", OSError, ""),
                    (f"http://127.0.0.1:{server.port}/", ValueError, "bad WebSocket URL"),
                    ("ws://127.0.0.1/a\r\nb: c", ValueError, "bad WebSocket URL")):
                with self.subTest(url), self.assertRaisesRegex(error, text):
                    self.talk(self.open(url, timeout=TIMEOUT if text or "ws" not in url
                                        else 0.1))

    async def open(self, url, **options):
        async with connect_websocket(url, **options):
            pass

    @unittest.skipUnless(LONG, "needs MINIBOTTLE_LONG=1")
    def test_a_server_that_drips_holds_no_thread_of_the_loop(self):
        async def drip(reader, writer):
            with contextlib.suppress(ConnectionError), contextlib.closing(writer):
                writer.write(b"HTTP/1.1 101 X\r\nA: ")
                while not reader.at_eof():
                    writer.write(b"a")
                    await writer.drain()
                    await asyncio.sleep(0.01)

        async def conversation():
            server = await asyncio.start_server(drip, "127.0.0.1", 0)
            url = "ws://A:secret@127.0.0.1:%d/" % server.sockets[0].getsockname()[1]
            before, tasks = threading.active_count(), len(asyncio.all_tasks())
            opening = [asyncio.ensure_future(self.open(url)) for _ in range(40)]
            late = asyncio.ensure_future(self.open(url, timeout=0.1))
            await asyncio.sleep(0)
            self.assertEqual(threading.active_count(), before + 41)
            loop = asyncio.get_running_loop()
            self.assertEqual(await loop.run_in_executor(None, lambda: "free"), "free")
            with self.assertRaises(TimeoutError) as caught:
                await late
            self.assertRegex(str(caught.exception), "^ws://127.* is not open within 0.1 s")
            for task in opening:
                task.cancel()
            await asyncio.wait(opening)
            while (threading.active_count() > before + 1  # one of the loop's own is left
                   or len(asyncio.all_tasks()) > tasks):
                await asyncio.sleep(0.01)
            server.close()
        self.talk(conversation())

    def test_the_user_of_the_url_is_sent_and_in_no_message(self):
        app, seen = App(), queue.Queue()

        @app.hook("before_request")
        def note():
            seen.put(request.get_header("Authorization"))

        app.websocket("/")(echo)
        server = self.serve(app)
        url = server.url.replace("http://", "ws://A%3A:b%20@")
        self.talk(self.open(url))
        self.assertEqual(seen.get(timeout=TIMEOUT), "Basic QTo6YiA=")
        self.talk(self.open(url, headers={"authorization": "Bearer x"}))
        self.assertEqual(seen.get(timeout=TIMEOUT), "Bearer x")
        for bad in ("ws://A:secret@/", "ws://A:secret@a b/", "ftp://A:secret@b/"):
            with self.assertRaisesRegex(ValueError, "bad WebSocket URL '(ws|ftp)://[/ab]"):
                self.talk(self.open(bad))

    def test_it_goes_through_the_proxy_of_the_environment(self):
        server, heads = self.serve_websocket(echo), queue.Queue()

        async def pipe(reader, writer):
            while True:
                data = await reader.read(65536)
                if not data:
                    return writer.close()
                writer.write(data)

        async def tunnel(reader, writer):
            heads.put(await reader.readuntil(b"\r\n\r\n"))
            status = b"200 OK" if heads.qsize() == 1 else b"403 Forbidden"
            writer.write(b"HTTP/1.1 " + status + b"\r\n\r\n")
            there = await asyncio.open_connection("127.0.0.1", server.port)
            await asyncio.gather(pipe(reader, there[1]), pipe(there[0], writer),
                                 return_exceptions=True)

        async def conversation():
            proxy = await asyncio.start_server(tunnel, "127.0.0.1", 0)
            where = "127.0.0.1:%d" % proxy.sockets[0].getsockname()[1]
            for name in ("http://A:b@" + where, where):
                os.environ["http_proxy"] = name
                try:
                    async with connect_websocket("ws://name.invalid/") as ws:
                        await ws.send("hello")
                        self.assertEqual(await ws.receive(), "hello")
                except ConnectionRefusedError as error:
                    self.assertEqual(str(error), "the proxy answers 403")
            os.environ["no_proxy"] = "127.0.0.1"
            await self.open(f"ws://127.0.0.1:{server.port}/")
            os.environ["http_proxy"] = "socks5://A:secret@a"
            with self.assertRaisesRegex(ValueError, "not by 'socks5://a'"):
                await self.open("ws://name.invalid/")
            proxy.close()

        with mock.patch.dict(os.environ):
            self.talk(conversation())
        self.assertEqual(heads.get(), b"CONNECT name.invalid:80 HTTP/1.1\r\nHost: name.invalid:80"
                                      b"\r\nProxy-Authorization: Basic QTpi\r\n\r\n")
        self.assertNotIn(b"Authorization", heads.get())
        self.assertTrue(heads.empty())

    def test_over_tls(self):
        if not shutil.which("openssl"):
            self.skipTest("needs openssl")
        files = [os.path.join(FOLDER, name) for name in ("key.pem", "cert.pem")]
        subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
                        "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj",
                        "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout",
                        files[0], "-out", files[1]], check=True, stderr=subprocess.DEVNULL)
        theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        theirs.load_cert_chain(files[1], files[0])
        inner = self.serve_websocket(echo)

        async def pipe(reader, writer):
            try:
                while True:
                    data = await reader.read(65536)
                    if not data:
                        break
                    writer.write(data)
                    await writer.drain()
            except ConnectionError:
                pass
            writer.close()

        async def proxy(reader, writer):
            there = await asyncio.open_connection("127.0.0.1", inner.port)
            await asyncio.gather(pipe(reader, there[1]), pipe(there[0], writer))

        async def conversation():
            server = await asyncio.start_server(proxy, "127.0.0.1", 0, ssl=theirs)
            port = server.sockets[0].getsockname()[1]
            with self.assertRaises(ssl.SSLError):
                await self.open(f"wss://localhost:{port}/")
            mine = ssl.create_default_context(cafile=files[1])
            async with connect_websocket(f"wss://localhost:{port}/", tls=mine) as ws:
                for message in ("hello", os.urandom(2_000_000)):
                    await ws.send(message)
                    self.assertEqual(await ws.receive(), message)
            self.assertEqual(ws.code, 1000)
            server.close()

        with self.assertNoError("asyncio"):
            self.talk(conversation())

    @contextlib.contextmanager
    def assertNoError(self, name):
        handler = LogQueue()
        logging.getLogger(name).addHandler(handler)
        self.addCleanup(logging.getLogger(name).removeHandler, handler)
        yield

    @needs("websockets")
    def test_the_websockets_package_on_the_other_side(self):
        import websockets
        server = self.serve_websocket(echo)

        async def check(ws, send, receive):
            for message in ("ä" * 9000, b"", bytes(300_000)):
                await send(message)
                self.assertEqual(await receive(), message)

        async def conversation():
            async with websockets.connect(f"ws://127.0.0.1:{server.port}/") as ws:
                await check(ws, ws.send, ws.recv)
                await (await ws.ping())
            self.assertEqual(ws.close_code, 1000)

            async def theirs(ws):
                async for message in ws:
                    await ws.send(message)
            async with websockets.serve(theirs, "127.0.0.1", 0) as other:
                port = other.sockets[0].getsockname()[1]
                async with connect_websocket(f"ws://127.0.0.1:{port}/") as ws:
                    await check(ws, ws.send, ws.receive)
                    await ws.ping()
                self.assertEqual(ws.code, 1000)

        self.talk(conversation())


class ChatTest(WebSocketTest):

    def test_what_one_says_all_hear(self):
        server = self.serve(load_example("chat"))
        peers = [self.peer(server, "/rooms/tea/chat") for _ in range(3)]
        self.assertTrue(wait_until(lambda: fetch(server.url, "/rooms")[2] == b'{"tea": 3}'))
        peers[0].say(HELLO[0])
        self.assertEqual([peer.frame() for peer in peers], [HELLO[0]] * 3)
        peers[1].close()
        peers[2].say(HELLO[0])
        self.assertEqual([peers[0].frame(), peers[2].frame()], [HELLO[0]] * 2)
        self.assertEqual(self.peer(server, "/rooms/no/chat").goodbye()[0], 4004)
        self.assertEqual(fetch(server.url, "/rooms/no")[0], 404)

    @unittest.skipUnless(LONG, "needs MINIBOTTLE_LONG=1")
    def test_who_does_not_read_holds_nobody_up_and_has_to_go(self):
        server = self.serve(load_example("chat"))
        deaf, writer = [self.peer(server, "/rooms/tea/chat") for _ in range(2)]
        self.assertTrue(wait_until(lambda: fetch(server.url, "/rooms")[2] == b'{"tea": 2}'))
        # Its system takes nothing more: in truth it does so after some megabytes.
        port = deaf.sock.getsockname()[1]
        ws = self.loop_do(lambda: next(
            ws for ws in ws_module.watched[minibottle.bridge.loop]
            if ws.state == ws_module.OPEN and ws.sock.getpeername()[1] == port))
        self.loop_do(lambda: setattr(ws, "out", bytearray(100_000)))
        for _ in range(3):
            self.assertEqual(writer.say(HELLO[0]).frame(), HELLO[0])
        self.assertTrue(wait_until(lambda: ws.code == 1008))
        self.loop_do(ws.end)
        self.assertTrue(wait_until(lambda: fetch(server.url, "/rooms")[2] == b'{"tea": 1}'))

    @unittest.skipUnless(BROWSER and LONG, "needs Chromium and MINIBOTTLE_LONG=1")
    def test_chromium_says_and_hears(self):
        app = load_example("chat")
        script = """<script>
        chat.onopen = () => { form.text.value = "<b>hello</b>"; form.requestSubmit(); };
        </script>"""
        outer = App()
        outer.merge(app)
        outer.get("/page", callback=lambda: TestClient(app).get("/").text + script)
        browser = BrowserTest()
        with mock.patch.object(BrowserTest, "FLAGS", BrowserTest.FLAGS + (
                "--virtual-time-budget=2000",)):
            page = browser.dump_dom(outer, path="/page")
            self.assertIn("<li>&lt;b&gt;hello&lt;/b&gt;</li>", page)


@unittest.skipUnless(LONG, "needs MINIBOTTLE_LONG=1")
class AgainOverTls:
    """The tests of another class, over TLS. Two of them have clients of another kind."""

    test_a_thousand_requests_of_every_kind_share_one_connection = None
    test_it_counts_as_a_connection_and_is_in_the_access_log = None

    def setUp(self):
        patch = mock.patch.dict(globals(), Wire=TlsWire, Peer=TlsPeer)
        patch.start()
        self.addCleanup(patch.stop)
        super().setUp()

    def serve(self, app, **settings):
        return super().serve(app, **dict(zip(("cert", "key"), certificate())), **settings)


class TlsPeer(OverTls, Peer):
    """A WebSocket client over TLS that sends frames as they are."""


for _kind in (RefusedRequestTest, ServedRequestTest, ExpectTest, ConnectionTest, GzipTest, WsgiTest,
              StreamTest, AsyncServedTest, WebSocketServerTest):
    _name = _kind.__name__.replace("Test", "OverTlsTest")
    globals()[_name] = type(_name, (AgainOverTls, _kind), {"__module__": __name__})
del _kind, _name               # or unittest finds the last one twice


# === 19. HTTP client ==========================================================

CLOSE = None                   # after the answer before it
DROP = b"no answer, but the end"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
IN_CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def moved(status, location):
    return f"HTTP/1.1 {status} X\r\nLocation: {location}\r\nContent-Length: 2\r\n\r\nno".encode()


def packed(body, coding="gzip"):
    head = "HTTP/1.1 200 OK\r\nContent-Encoding: %s\r\nContent-Length: %d\r\n\r\n"
    return (head % (coding, len(body))).encode() + body


class RawServer:
    """Answers each request with the next of these bytes; CLOSE, DROP: an end; then silence.

    It keeps what it was sent, and counts the connections that are open.
    """

    def __init__(self, *answers, drip=False, **options):
        self.answers = list(answers)
        self.drip = drip                # byte by byte
        self.options = options          # of asyncio's server
        self.requests = []
        self.writers = []
        self.opened = self.open = 0

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0, **self.options)
        self.port = self.server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *exc_info):
        self.server.close()
        await self.until_closed()

    async def until_closed(self):
        while self.open:
            await asyncio.sleep(0.001)

    async def serve(self, reader, writer):
        self.writers.append(writer)
        self.opened += 1
        self.open += 1
        try:
            while await self.serve_one(reader, writer):
                pass
        except (OSError, EOFError):
            pass
        finally:
            writer.close()
            self.open -= 1

    async def serve_one(self, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"Content-Length: (\d+)", head)
        body = await reader.readexactly(int(length[1])) if length else b""
        if b"chunked" in head:
            body = await reader.readuntil(b"0\r\n\r\n")
        self.requests.append((head + body).decode())
        answer = self.answers.pop(0) if self.answers else b""
        if answer is DROP:
            return False
        for byte in answer if self.drip else ():
            writer.write(bytes([byte]))
            await asyncio.sleep(0)
            if writer.is_closing():
                return False
        writer.write(b"" if self.drip else answer)
        await writer.drain()
        if self.answers[:1] == [CLOSE]:
            self.answers.pop(0)
            return False
        return True


class ClientTest(unittest.IsolatedAsyncioTestCase):

    async def asyncSetUp(self):
        asyncio.get_running_loop().set_debug(False)     # it doubles the time

    def client(self, **options):
        return fetching.Client(**{"proxies": {}, "timeout": TIMEOUT, **options})

    async def ask(self, *answers, path="/", drip=False, **options):
        """What these answers are to one fetch: an Answer or a ClientError; and the requests."""
        async with RawServer(*answers, drip=drip) as server, self.client() as asker:
            try:
                found = await asker.fetch(server.url + path, **options)
            except fetching.ClientError as error:
                found = error
        return found, server.requests


class ClientFramingTest(ClientTest):
    """RFC 9112 4, 6 and 7, RFC 9110 15.2."""

    async def test_the_body_ends_where_it_ends(self):
        for answer, method, status, body in (
                (OK, "GET", 200, b"ok"),
                (b"HTTP/1.1 200\r\nContent-Length:2\r\n\r\nok", "GET", 200, b"ok"),
                (b"HTTP/1.1 200 \r\ncontent-length:  2  \r\nX_A: 1\r\n\r\nok", "GET", 200, b"ok"),
                (IN_CHUNKS + b"3;a=b\r\nabc\r\n1\r\nd\r\n0\r\nX-T: 1\r\n\r\n", "GET", 200, b"abcd"),
                (b"HTTP/1.1 404 No\r\n\r\nto the end", "GET", 404, b"to the end"),
                (b"HTTP/1.0 200 OK\r\n\r\n", "GET", 200, b""),
                (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "POST", 200, b""),
                (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n", "HEAD", 200, b""),
                (IN_CHUNKS, "HEAD", 200, b""),
                (b"HTTP/1.1 204 No\r\nContent-Length: 99\r\n\r\n", "GET", 204, b""),
                (b"HTTP/1.1 304 No\r\nContent-Length: 99\r\n\r\n", "GET", 304, b""),
                (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nLink: a\r\n\r\n" + OK,
                 "GET", 200, b"ok")):
            for drip in (False, True):
                with self.subTest(answer=answer, method=method, drip=drip):
                    found, _ = await self.ask(answer, CLOSE, method=method, drip=drip)
                    self.assertEqual((found.status_code, found.body), (status, body))

    async def test_an_answer_that_two_could_read_in_two_ways_is_an_error(self):
        head = b"HTTP/1.1 200 OK\r\n"
        for answer, message in (
                (head + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n", "both"),
                (head + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\nok", "more than one"),
                (head + b"Content-Length: +2\r\n\r\nok", "bad Content-Length"),
                (head + b"Content-Length: 2, 2\r\n\r\nok", "bad Content-Length"),
                (head + b"Content-Length:\r\n\r\nok", "bad Content-Length"),
                (head + b"Transfer-Encoding: gzip, chunked\r\n\r\n", "only chunked"),
                (head + b"Transfer-Encoding: identity\r\n\r\n", "does not end in chunked"),
                (b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "HTTP/1.0"),
                (head + b"A: 1\r\n B: 2\r\n\r\n", "folding"),
                (head + b"A : 1\r\n\r\n", "white space before the colon"),
                (head + b"A: \0\r\n\r\n", "control character"),
                (head + b"A: 1\nB: 2\r\n\r\n", "control character"),
                (head + b"nonsense\r\n\r\n", "no colon"),
                (b"HTTP/1.1 200 OK\nA: 1\n\n", "no HTTP answer"),
                (b"HTTP/2 200 OK\r\n\r\n", "bad status line"),
                (b"SSH-2.0-OpenSSH\r\n", "no HTTP answer"),
                (b"\r\n" + OK, "bad status line"),
                (b"HTTP/1.1 20 OK\r\n\r\n", "bad status line"),
                (b"HTTP/1.1  200 OK\r\n\r\n", "bad status line"),
                (b"HTTP/1.1 200 O\0K\r\n\r\n", "bad status line"),
                (head + b"A: " + bytes(65536), "head over 65536 bytes"),
                (b"HTTP/1.1 100 C\r\n\r\n" * 11 + OK, "over 10 interim answers"),
                (IN_CHUNKS + b"+1\r\na\r\n0\r\n\r\n", "bad chunk size"),
                (IN_CHUNKS + b"1\r\nabc\r\n0\r\n\r\n", "chunk without its CRLF"),
                (IN_CHUNKS + b"0\r\nContent-Length: 2\r\n\r\n", "in a trailer")):
            with self.subTest(answer=answer[:60]):
                found, _ = await self.ask(answer, CLOSE)
                self.assertIsInstance(found, fetching.ClientError)
                self.assertIn(message, str(found))

    async def test_an_answer_that_breaks_off_is_an_error(self):
        gzipped = packed(gzip.compress(b"x" * 1000))
        for whole in (OK, IN_CHUNKS + b"3\r\nabc\r\n0\r\n\r\n", gzipped):
            for cut in range(0, len(whole), 1 if LONG else 3):
                found, _ = await self.ask(whole[:cut], CLOSE)
                self.assertIsInstance(found, fetching.ClientError, whole[:cut])
                self.assertIn(found.phase, ("head", "body"))
        found, _ = await self.ask(gzipped[:-9].replace(b"Content-Length", b"X-Length"), CLOSE)
        self.assertIn("breaks off", str(found))

    async def test_headers_are_text_without_case_and_names_with_an_underscore_are_dropped(self):
        found, _ = await self.ask("HTTP/1.1 200 OK\r\nSet-Cookie: a=1\r\nset-cookie: b=ö\r\n"
                                  "X_A: 1\r\nContent_Length: 5\r\n\r\nö".encode(), CLOSE)
        self.assertEqual(dict(found.headers.allitems()), {"Set-Cookie": "b=ö"})
        self.assertEqual(found.headers.getall("set-COOKIE"), ["a=1", "b=ö"])
        self.assertEqual((found.text, found.status), ("ö", "200 OK"))


class ClientBodyTest(ClientTest):

    async def test_gzip_and_deflate_are_inflated(self):
        text = UNICODE.encode() * 4000
        bare = zlib.compressobj(wbits=-15)
        for coding, body in (("gzip", gzip.compress(text)), ("x-gzip", gzip.compress(text)),
                             ("gzip", b"".join(map(gzip.compress, (text[:9], b"", text[9:])))),
                             ("gzip", gzip.compress(text) + bytes(600)),
                             ("gzip", gzip.compress(b"") * 3 + bytes(9) + gzip.compress(text)),
                             ("deflate", zlib.compress(text)),
                             ("deflate", bare.compress(text) + bare.flush())):
            for drip in (False, True):
                with self.subTest(coding=coding, drip=drip):
                    found, requests = await self.ask(packed(body, coding), drip=drip)
                    self.assertEqual(found.body, text)
                    self.assertEqual(list(found.headers), [])
                    self.assertIn("\r\nAccept-Encoding: gzip, deflate\r\n", requests[0])

    async def test_a_bomb_does_not_go_off(self):
        bomb = packed(gzip.compress(bytes(16 << 20), 1))
        async with RawServer(bomb) as server, self.client() as asker:
            async with asker.stream("GET", server.url, max_body=1 << 20) as answer:
                sizes = []
                with self.assertRaisesRegex(fetching.ClientError, r"1048576 bytes \(max_body\)"):
                    async for piece in answer:
                        sizes.append(len(piece))
        self.assertLessEqual(max(sizes), 65536)
        self.assertLessEqual(sum(sizes), 1 << 20)

    async def test_a_body_over_max_body_is_an_error_that_names_it(self):
        for answer in (b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n" + bytes(11),
                       IN_CHUNKS + b"b\r\n" + bytes(11) + b"\r\n0\r\n\r\n",
                       b"HTTP/1.1 200 OK\r\n\r\n" + bytes(11), packed(gzip.compress(bytes(11)))):
            for most in (10, 11):
                if answer.startswith(b"HTTP/1.1 200 OK\r\nContent-Encoding") and most == 11:
                    continue    # smaller inflated than it comes
                with self.subTest(answer=answer[:40], most=most):
                    found, _ = await self.ask(answer, CLOSE, max_body=most)
                    if most == 11:
                        self.assertEqual(found.body, bytes(11))
                    else:
                        self.assertRegex(str(found), r"\(max_body\) \(phase: (head|body)\)")

    async def test_a_compressed_body_that_is_none_is_an_error(self):
        good = gzip.compress(b"a")
        for body in (b"nonsense", good + b"more", good[:-4] + bytes(4), good + good[:-1],
                     good + good[:5], zlib.compress(b"a") + b"more"):
            with self.subTest(body=body):
                found, _ = await self.ask(packed(body))
                self.assertIsInstance(found, fetching.ClientError)
                self.assertEqual(found.phase, "body")

    async def test_many_members_take_linear_time(self):
        start = time.process_time()
        found, _ = await self.ask(packed(gzip.compress(b"") * 40000))
        self.assertEqual(found.body, b"")
        self.assertLess(time.process_time() - start, 2 * SLOW)

    async def test_a_body_that_is_none_is_a_type_error(self):
        async def texts():
            yield b"a"
            yield "b"
        for body, text in (({"a": 1}, "as json or as form"), (["a"], "bytes, not str"),
                           (("a", b"b"), "bytes, not str"), (iter(["a"]), "bytes, not str"),
                           (texts(), "bytes, not str"), (io.StringIO("a"), "bytes, not str"),
                           (io.StringIO(""), "bytes, not str"), (5, "int")):
            with self.subTest(body=body), self.assertRaisesRegex(TypeError, text):
                await self.ask(OK, method="POST", body=body)

    async def test_a_stream_is_read_no_faster_than_it_is_taken(self):
        sent = 0

        async def serve(reader, writer):
            nonlocal sent
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            with contextlib.suppress(OSError):
                while True:
                    writer.write(bytes(65536))
                    await writer.drain()
                    sent += 65536
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = "http://127.0.0.1:%d/" % server.sockets[0].getsockname()[1]
        async with self.client(max_body=1 << 40) as asker:
            async with asker.stream("GET", url) as answer:
                before = -1
                while sent != before:   # until it stands still
                    before = sent
                    await asyncio.sleep(0.05 * SLOW)
                self.assertLess(sent, 16 << 20)
                async for _ in answer:
                    if sent > before + (1 << 20):
                        break
            self.assertFalse(asker.conns and next(iter(asker.conns)).is_fresh())
        server.close()

    async def test_bodies_go_out_as_they_are_given(self):
        async def pieces():
            yield b"ab"
            yield b""
            yield b"c"
        in_chunks = "Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n"
        for options, expected in (
                (dict(body=b"abc"), "Content-Length: 3\r\n\r\nabc"),
                (dict(body="ö"), "Content-Length: 2\r\n\r\nö"),
                (dict(), "Content-Length: 0\r\n\r\n"),
                (dict(body=pieces()), in_chunks),
                (dict(body=[b"ab", b"c"]), in_chunks),
                (dict(body=io.BytesIO(b"abc")),
                 "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"),
                (dict(json={"a": "ö"}), 'Content-Type: application/json\r\n'
                                        'Content-Length: 15\r\n\r\n{"a": "\\u00f6"}'),
                (dict(form={"a": "x y"}), "Content-Type: application/x-www-form-urlencoded\r\n"
                                          "Content-Length: 5\r\n\r\na=x+y")):
            with self.subTest(options=options):
                found, requests = await self.ask(OK, method="POST", **options)
                self.assertEqual(found.body, b"ok")
                self.assertTrue(requests[0].endswith(expected), requests[0])

    async def test_an_answer_in_the_middle_of_the_body_ends_the_sending(self):
        async def endless():
            while True:
                yield bytes(65536)
        with Server(reply([b"no"], status="413 Content Too Large"), port=0, max_body=100) as server:
            async with self.client() as asker:
                found = await asker.fetch(server.url, "POST", body=endless())
                self.assertEqual((found.status_code, asker.conns), (413, set()))


class ClientRequestTest(ClientTest):

    async def test_a_request_is_what_it_was_asked_to_be(self):
        found, requests = await self.ask(
            OK, path="/ö/%20?q=ä#fragment", method="QUERY", headers=[("X-A", "ö"), ("x-a", 2)])
        port = found.url.split(":")[2].split("/")[0]
        self.assertEqual(requests, [
            f"QUERY /%C3%B6/%20?q=%C3%A4 HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nX-A: ö\r\nX-A: 2\r\n"
            f"User-Agent: minibottle/{minibottle.__version__}\r\nAccept: */*\r\n"
            "Accept-Encoding: gzip, deflate\r\n\r\n"])

    async def test_a_query_is_added_to_that_of_the_url(self):
        for path, query, target in (
                ("/a", {"a": 1}, "/a?a=1"), ("/a?b=2#c", {"a": ["x y", "ö&"]},
                                             "/a?b=2&a=x+y&a=%C3%B6%26"),
                ("", [("a", 1), ("a", 2)], "/?a=1&a=2"), ("/a", {}, "/a"), ("/a#?", {"a": 1},
                                                                          "/a?a=1")):
            _, requests = await self.ask(OK, path=path, query=query)
            self.assertEqual(requests[0].split()[1], target)

    async def test_a_client_is_closed_once_or_more(self):
        async with RawServer(OK) as server:
            asker = self.client()
            self.assertEqual((await asker.fetch(server.url)).body, b"ok")
            for _ in range(2):
                await asker.close()
            await server.until_closed()
            with self.assertRaisesRegex(fetching.ClientError, "the Client is closed"):
                await asker.fetch(server.url)

    async def test_own_headers_beat_the_defaults(self):
        _, requests = await self.ask(OK, headers={
            "host": "a.b", "user-agent": "me", "Accept": "x/y", "Accept-Encoding": "identity"})
        self.assertEqual(requests, ["GET / HTTP/1.1\r\nHost: a.b\r\nUser-Agent: me\r\n"
                                    "Accept: x/y\r\nAccept-Encoding: identity\r\n\r\n"])

    async def test_a_url_says_where(self):
        for url, origin, authority, target in (
                ("http://a.B", ("http", "a.b", 80), "a.b", "/"),
                ("https://a.b:443?q", ("https", "a.b", 443), "a.b", "/?q"),
                ("HTTP://a.b:81/x?y#z", ("http", "a.b", 81), "a.b:81", "/x?y"),
                ("http://a.b:/", ("http", "a.b", 80), "a.b", "/"),
                ("http://[::1]:81/", ("http", "::1", 81), "[::1]:81", "/"),
                ("http://bücher.example/ß", ("http", "xn--bcher-kva.example", 80),
                 "xn--bcher-kva.example", "/%C3%9F"),
                ('http://a/"<>\\^`{|}', ("http", "a", 80), "a", "/%22%3C%3E%5C%5E%60%7B%7C%7D")):
            with self.subTest(url=url):
                self.assertEqual(fetching.parse_url(url)[:3], (origin, authority, target))

    async def test_what_could_be_another_request_is_refused_before_a_byte_is_sent(self):
        async with RawServer(OK) as server, self.client() as asker:
            url = server.url
            for args, options in [
                    ((url + "/" + bad,), {}) for bad in BREAKS + [" ", "a b", "\t"]] + [
                    ((url, "GET" + bad), {}) for bad in BREAKS + [" ", "ö", ":"]] + [
                    ((url,), {"headers": {"X-A": "1" + bad}}) for bad in BREAKS] + [
                    ((url,), {"headers": {"X-A" + bad: "1"}}) for bad in BREAKS + [" ", ":"]] + [
                    ((url,), {"headers": {name: "5"}}) for name in (
                        "Content-Length", "transfer_encoding", "Connection", "Upgrade", "")] + [
                    ((url, "CONNECT"), {}), ((url, ""), {})] + [
                    ((bad,), {}) for bad in (
                        "", "/path", "127.0.0.1", "ftp://a/", "file:///etc/passwd", "http://",
                        "http:///a", "http://:80/", "http://a:99999/", "http://a:0/", "http://a:b/",
                        "http://a b/", "http://a\\@b/", "http://[::1/", "http://a\u2100b/",
                        "//a/", "http://a%0d%0a/", "http:a")]:
                if args == (url + "/",):
                    continue
                with self.subTest(args=args, options=options), self.assertRaises(ValueError):
                    await asker.fetch(*args, **options)
            for options in ({"json": 1, "form": {}}, {"json": 1, "body": b"a"}, {"tmeout": 1},
                            {"json": object()}, {"body": 5}):
                with self.subTest(options=options), self.assertRaises(TypeError):
                    await asker.fetch(url, "POST", **options)
            self.assertEqual(server.opened, 0)

    async def test_basic_auth_comes_from_the_url_or_the_argument(self):
        for user, auth, expected in (("A:%62@", None, "Basic QTpi"), ("", ("A", "b"), "Basic QTpi"),
                                     ("x:y@", ("A", "b"), "Basic QTpi"),
                                     ("ö@", None, "Basic w7Y6")):
            async with RawServer(OK, CLOSE) as server, self.client() as asker:
                with self.subTest(user=user, auth=auth):
                    found = await asker.fetch(server.url.replace("//", "//" + user), auth=auth)
                    self.assertIn(f"\r\nAuthorization: {expected}\r\n", server.requests[0])
                    self.assertEqual(found.url, server.url)
                    for url in ("http://me:secret@127.0.0.1:1/", "http://me:secret@a\u2100b/",
                                "http://me:secret@a b/", "ftp://me:secret@a/"):
                        with self.assertRaises((fetching.ClientError, ValueError)) as caught:
                            await asker.fetch(url)
                        self.assertNotIn("secret", str(caught.exception))


class ClientRedirectTest(ClientTest):
    """RFC 9110 15.4."""

    async def test_the_method_and_the_body_change_as_browsers_have_it(self):
        for status, method, expected in (
                (301, "GET", "GET"), (302, "POST", "GET"), (301, "POST", "GET"),
                (303, "PUT", "GET"), (303, "POST", "GET"), (303, "HEAD", "HEAD"),
                (302, "PUT", "PUT"),
                (307, "POST", "POST"), (308, "PUT", "PUT"), (301, "HEAD", "HEAD")):
            with self.subTest(status=status, method=method):
                body = b"" if method in ("GET", "HEAD") else b"abc"
                found, requests = await self.ask(
                    moved(status, "/new?a=ö b"), OK, method=method, body=body,
                    headers={"Content-Type": "a/b", "X-A": "1"})
                self.assertEqual(found.status_code, 200)
                self.assertTrue(found.url.endswith("/new?a=%C3%B6%20b"))
                self.assertEqual(requests[1].split("\r\n")[0],
                                 expected + " /new?a=%C3%B6%20b HTTP/1.1")
                self.assertEqual(requests[1].endswith("abc"), bool(body) and expected == method)
                self.assertEqual("Content-Type" in requests[1], expected == method)
                self.assertIn("X-A: 1", requests[1])

    async def test_credentials_stay_with_their_origin(self):
        secret = {"Authorization": "Basic QTpi", "Cookie": "a=1", "Proxy-Authorization": "x",
                  "Host": "a.b", "X-A": "kept"}
        async with RawServer() as first, RawServer() as second, self.client() as asker:
            for answer, there in ((moved(302, "/new"), first), (moved(302, second.url), second),
                                  (moved(307, second.url.replace("//", "//u:p@")), second),
                                  (moved(302, second.url.replace("http:", "")), second)):
                first.answers, second.answers = [answer, OK], [OK]
                with self.subTest(answer=answer):
                    await asker.fetch(first.url, headers=secret)
                    for name in secret:
                        line = f"\r\n{name}: {secret[name]}\r\n"
                        self.assertEqual(line in there.requests[-1],
                                         there is first or name == "X-A", name)
                    self.assertEqual("Authorization" in there.requests[-1], there is first)
                    first.answers.clear()
        for url, expected in (
                ("http://a.b/", True), ("https://a.b/", False), ("http://c.b/", False),
                ("http://a.b:81/", False), ("http://A.b:80/x", True)):
            message = fetching.Message("GET", "http://a.b/", secret, b"", None, None, None)
            message.redirect(302, url)
            with self.subTest(url=url):
                self.assertEqual("Cookie" in message.headers, expected)

    async def test_one_that_leads_nowhere_is_an_error_and_none_may_be_followed(self):
        for answers, options, message in (
                ([moved(302, "/again")] * 6, {}, "over 5 redirects (redirects)"),
                ([moved(302, "/again")] * 2, {"redirects": 1}, "over 1 redirects (redirects)"),
                ([moved(302, "ftp://a/")], {}, "not an http:// or https:// URL"),
                ([moved(302, "http://a:99999/")], {}, "a redirect:"),
                ([moved(307, "/")], {"method": "POST", "body": iter([b"a"])}, "is used up")):
            with self.subTest(message=message):
                found, requests = await self.ask(*answers, **options)
                self.assertIsInstance(found, fetching.ClientError)
                self.assertIn(message, str(found))
                self.assertEqual(len(requests), len(answers))
        for answer, options in ((moved(302, "/"), {"redirects": 0}), (moved(300, "/"), {}),
                                (moved(304, "/")[:-2], {}), (moved(302, ""), {})):
            found, requests = await self.ask(answer, CLOSE, **options)
            self.assertEqual((found.status_code // 100, len(requests)), (3, 1))

    async def test_it_uses_the_connection_again(self):
        async with RawServer(moved(302, "/b"), moved(301, "/c"), OK) as server:
            async with self.client() as asker:
                await asker.fetch(server.url)
                self.assertEqual((server.opened, len(server.requests)), (1, 3))


class ClientTimeoutTest(ClientTest):
    """One deadline from the call to the last byte; the error says how far it came."""

    async def late(self, phase, url, asker=None, **options):
        async with (asker or self.client()) as asker:
            with self.assertRaises(fetching.ClientTimeout) as caught:
                await asker.fetch(url, timeout=0.05, **options)
            self.assertEqual(asker.conns, set())
        self.assertEqual(caught.exception.phase, phase)
        self.assertIn("over 0.05 s (timeout)", str(caught.exception))

    async def test_the_error_names_the_phase(self):
        async def never(*args, **options):
            await asyncio.sleep(TIMEOUT)
        endless = iter(lambda: bytes(65536), b"")
        loop = asyncio.get_running_loop()
        for phase, answers, options in (
                ("head", (b"",), {}), ("head", (b"HTTP/1.1 200 OK\r\nA:",), {}),
                ("body", (OK[:-1],), {}), ("body", (IN_CHUNKS,), {}),
                ("body", (moved(302, "/"), OK[:-1]), {})):
            with self.subTest(phase=phase, answers=answers):
                async with RawServer(*answers) as server:
                    await self.late(phase, server.url, **options)
        with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and that is all
            url = "127.0.0.1:%d" % silent.getsockname()[1]
            for phase, options in (("send", {"method": "POST", "body": endless}),
                                   ("send", {"method": "POST", "body": bytes(16 << 20)})):
                with self.subTest(phase=phase):
                    await self.late(phase, "http://" + url, **options)
            await self.late("TLS", "https://" + url)
            with mock.patch.object(loop, "create_connection", never):
                await self.late("connect", "http://" + url)
            with mock.patch.object(loop, "getaddrinfo", never):
                await self.late("resolve", "http://name.invalid")

    async def test_time_in_the_queue_counts(self):
        for limits in ({"max_per_host": 1}, {"max_total": 1}):
            async with RawServer() as server, self.client(**limits) as asker:
                first = asyncio.ensure_future(asker.fetch(server.url))
                while not server.requests:
                    await asyncio.sleep(0.001)
                with self.assertRaises(fetching.ClientTimeout) as caught:
                    await asker.fetch(server.url, timeout=0.05)
                self.assertEqual(caught.exception.phase, "queue", limits)
                first.cancel()

    async def test_an_answer_that_comes_in_drops_does_not_move_the_deadline(self):
        async with RawServer(IN_CHUNKS + b"1\r\na\r\n" * 20000, drip=True) as server:
            await self.late("body", server.url)

    async def test_what_fails_at_once_says_where(self):
        for url, phase in (("http://127.0.0.1:1/", "connect"), ("http://name.invalid/", "resolve")):
            async with self.client() as asker:
                with self.assertRaises(fetching.ClientError) as caught:
                    await asker.fetch(url)
                self.assertEqual(caught.exception.phase, phase)
                self.assertNotIsInstance(caught.exception, fetching.ClientTimeout)


class ClientPoolTest(ClientTest):

    async def test_a_thousand_requests_open_one_socket(self):
        ports = set()

        def app(environ, start_response):
            ports.add(environ["REMOTE_PORT"])
            return hello(environ, start_response)
        with Server(app, port=0) as server:
            async with self.client() as asker:
                for _ in range(1000):
                    self.assertEqual((await asker.fetch(server.url)).body, b"Hello World!")
                self.assertEqual((len(ports), len(asker.conns)), (1, 1))

    async def test_a_connection_is_kept_if_both_sides_can_tell_where_the_answer_ends(self):
        for answer, kept in (
                (OK, 1), (OK.replace(b"1.1", b"1.0"), 0), (OK + b"HTTP/1.1 408 X\r\n\r\n", 0),
                (OK.replace(b"C", b"Connection: x, Close\r\nC"), 0),
                (OK.replace(b"1.1", b"1.0").replace(b"C", b"connection: Keep-Alive\r\nC"), 1)):
            async with RawServer(answer) as server, self.client() as asker:
                with self.subTest(answer=answer):
                    self.assertEqual((await asker.fetch(server.url)).body, b"ok")
                    await asyncio.sleep(0)
                    self.assertEqual(len(asker.conns), kept)

    async def test_a_closed_connection_is_noticed_before_it_is_used(self):
        for extra in (b"", b"HTTP/1.1 408 Request Timeout\r\n\r\n"):
            async with RawServer(OK, OK) as server, self.client() as asker:
                await asker.fetch(server.url)
                sock = server.writers[0].get_extra_info("socket")
                if extra:       # while the client's loop does not run
                    os.write(sock.fileno(), extra)
                else:
                    sock.shutdown(socket.SHUT_WR)
                with self.subTest(extra=extra):
                    self.assertEqual((await asker.fetch(server.url, "POST")).body, b"ok")
                    self.assertEqual((server.opened, len(server.requests)), (2, 2))

    async def test_only_an_idempotent_request_is_sent_again_and_only_once(self):
        for method, answers, opened, requests in (
                ("GET", [OK, DROP, OK], 2, 3), ("PUT", [OK, DROP, OK], 2, 3),
                ("POST", [OK, DROP, OK], 1, 2), ("PATCH", [OK, DROP, OK], 1, 2),
                ("GET", [OK, DROP, DROP, OK], 2, 3), ("GET", [OK, b"HTTP/1.1 ", CLOSE, OK], 1, 2)):
            async with RawServer(*answers) as server, self.client() as asker:
                with self.subTest(method=method, answers=answers):
                    await asker.fetch(server.url)
                    try:
                        found = (await asker.fetch(server.url, method)).body
                    except fetching.ClientError:
                        found = None
                    self.assertEqual(found, b"ok" if answers[2:] == [OK] and opened == 2 else None)
                    self.assertEqual((server.opened, len(server.requests)), (opened, requests))

    async def test_no_more_connections_are_open_than_allowed(self):
        running = most = 0

        async def answer():
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.002)
            running -= 1
            return "ok"
        with Server(app_of(answer), port=0) as one, Server(app_of(answer), port=0) as two:
            for limits, expected in (({"max_per_host": 3}, 6), ({"max_total": 4}, 4),
                                     ({"max_per_host": 3, "max_total": 4}, 4)):
                async with self.client(**limits) as asker:
                    most, seen = 0, []
                    calls = [asker.fetch(server.url) for server in (one, two) * 15]
                    for call in asyncio.as_completed(calls):
                        self.assertEqual((await call).body, b"ok")
                        seen.append(len(asker.conns))
                    with self.subTest(limits=limits):
                        self.assertLessEqual(most, expected)
                        self.assertLessEqual(max(seen), expected)

    async def test_an_idle_connection_is_closed_after_a_while_and_hosts_are_forgotten(self):
        async with RawServer(OK) as server, self.client(keep_alive=0.02) as asker:
            await asker.fetch(server.url)
            self.assertEqual((server.open, len(asker.hosts)), (1, 1))
            await server.until_closed()
            gc.collect()
            self.assertEqual((len(asker.conns), len(asker.hosts)), (0, 0))

    async def test_cancelling_leaves_no_socket_and_no_slot_taken(self):
        for answers in ((b"",), (b"HTTP/1.1 200 OK\r\nA:",), (OK[:-1],), (IN_CHUNKS,)):
            async with RawServer(*answers) as server, self.client(max_per_host=1) as asker:
                calls = [asyncio.ensure_future(asker.fetch(server.url)) for _ in range(3)]
                while not server.requests:
                    await asyncio.sleep(0.001)
                await asyncio.sleep(0.005)
                for call in calls:
                    call.cancel()
                with self.subTest(answers=answers):
                    for call in calls:
                        with self.assertRaises(asyncio.CancelledError):
                            await call
                    await server.until_closed()
                    self.assertEqual(asker.conns, set())
                    server.answers = [OK]
                    self.assertEqual((await asker.fetch(server.url)).body, b"ok")

    async def test_whatever_happens_the_limits_hold_and_all_is_given_back(self):
        dice, loop = random.Random(5), asyncio.get_running_loop()
        one_of = (OK, OK, DROP, OK[:-1], IN_CHUNKS + b"2\r\nok\r\n0\r\n\r\n", IN_CHUNKS,
                  moved(302, "/"), b"HTTP/1.1 204 No\r\n\r\n", b"nonsense")
        async with RawServer(*dice.choices(one_of, k=1000)) as server:
            async with self.client(max_per_host=5, max_total=4, keep_alive=0.005) as asker:
                for _ in range(10):
                    calls = [asyncio.ensure_future(asker.fetch(
                        server.url, dice.choice(("GET", "POST")),
                        timeout=dice.choice((0.001, 0.01, 0.02)))) for _ in range(30)]
                    for call in calls[::3]:
                        loop.call_later(dice.random() * 0.01, call.cancel)
                    for found in await asyncio.gather(*calls, return_exceptions=True):
                        if not isinstance(found, (fetching.ClientError, asyncio.CancelledError)):
                            self.assertIn(found.status_code, (200, 204))
                        self.assertLessEqual(len(asker.conns), 4)
                server.answers = [OK]
                calls = [asyncio.ensure_future(asker.fetch(server.url)) for _ in range(9)]
                while len(server.answers) or len(asker.conns) < 4:
                    await asyncio.sleep(0.001)      # so all four slots are there again
                for call in calls:
                    call.cancel()
                await asyncio.wait(calls)
            await server.until_closed()

    async def test_a_stream_that_is_left_early_closes_its_connection(self):
        async with RawServer(OK[:-1], OK) as server, self.client(max_per_host=1) as asker:
            async with asker.stream("GET", server.url) as answer:
                self.assertEqual(answer.status_code, 200)
            await server.until_closed()
            with self.assertRaisesRegex(fetching.ClientError, "closed before the end"):
                await answer.read()
            async with asker.stream("GET", server.url) as answer:
                self.assertEqual([piece async for piece in answer], [b"ok"])
            self.assertEqual((server.opened, len(asker.conns)), (2, 1))

    async def test_a_closed_client_opens_nothing_and_ends_what_it_began(self):
        async with RawServer() as server:
            async with self.client(max_per_host=1) as asker:
                calls = [asyncio.ensure_future(asker.fetch(server.url)) for _ in range(2)]
                await asyncio.sleep(0)
            calls.append(asker.fetch(server.url))
            for found in await asyncio.gather(*calls, return_exceptions=True):
                self.assertIsInstance(found, fetching.ClientError)
            await server.until_closed()

    def test_a_client_belongs_to_one_loop(self):
        async def once():
            with self.assertRaises(fetching.ClientError):
                await asker.fetch("http://127.0.0.1:1/")
        asker = self.client()
        asyncio.run(once())
        with self.assertRaisesRegex(RuntimeError, "the asyncio loop"):
            asyncio.run(once())


class ClientProxyTest(ClientTest):
    """RFC 9112 3.2.2, RFC 9110 9.3.6; the environment's proxies as curl takes them."""

    async def test_http_goes_to_the_proxy_with_the_whole_url(self):
        async with RawServer(OK, OK) as proxy:
            for proxies in ({"http": proxy.url.replace("//", "//A:b@")},
                            {"http": proxy.url.replace("http://", "A:b@")}):
                async with self.client(proxies=proxies) as asker:
                    await asker.fetch("http://name.invalid:81/a?b")
                    self.assertRegex(
                        proxy.requests.pop(),
                        r"GET http://name.invalid:81/a\?b HTTP/1.1\r\nHost: name.invalid:81\r\n"
                        r"(.+\r\n)*Proxy-Authorization: Basic QTpi\r\n")

    async def test_the_environment_names_it_and_what_goes_past_it(self):
        async with RawServer(OK, CLOSE) as proxy, RawServer(OK, CLOSE) as server:
            names = {"http_proxy": proxy.url, "no_proxy": "127.0.0.1,.own.example"}
            with mock.patch.dict(os.environ, names):
                async with self.client(proxies=None) as asker:
                    await asker.fetch("http://own.invalid/")
                    await asker.fetch(server.url)
        self.assertEqual((len(proxy.requests), len(server.requests)), (1, 1))

    async def test_https_goes_through_a_tunnel_or_not_at_all(self):
        for answer in (b"HTTP/1.1 403 Forbidden\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\nTLS?"):
            async with RawServer(answer, CLOSE) as proxy:
                async with self.client(proxies={"https": proxy.url}) as asker:
                    with self.assertRaises(fetching.ClientError) as caught:
                        await asker.fetch("https://[::1]/", auth=("A", "b"))
            self.assertEqual(caught.exception.phase, "connect")
            self.assertEqual(proxy.requests, ["CONNECT [::1]:443 HTTP/1.1\r\n"
                                              "Host: [::1]:443\r\n\r\n"])
        async with self.client(proxies={"http": "socks5://a"}) as asker:
            with self.assertRaisesRegex(ValueError, "not an http"):
                await asker.fetch("http://a.invalid")


@unittest.skipUnless(shutil.which("openssl"), "needs openssl")
class ClientTlsTest(ClientTest):

    @classmethod
    def setUpClass(cls):
        cls.cert, key = certificate()
        cls.own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        cls.own.load_cert_chain(cls.cert, key)
        cls.trusting = ssl.create_default_context(cafile=cls.cert)

    async def test_a_certificate_that_the_system_does_not_trust_is_refused(self):
        async with RawServer(OK, ssl=self.own) as server:
            for options, name in (({}, "localhost"), ({"ssl": self.trusting}, "127.0.0.1")):
                async with self.client(**options) as asker:
                    with self.subTest(name=name), self.assertRaises(fetching.ClientError) as caught:
                        await asker.fetch(f"https://{name}:{server.port}/")
                    self.assertEqual(caught.exception.phase, "TLS")
                    self.assertIn("certificate", str(caught.exception))
            self.assertEqual(server.requests, [])

    async def test_one_that_is_trusted_is_used_again(self):
        async with RawServer(OK, OK, packed(gzip.compress(bytes(1 << 20))), ssl=self.own) as server:
            async with self.client(ssl=self.trusting) as asker:
                url = f"https://localhost:{server.port}/"
                self.assertEqual((await asker.fetch(url)).body, b"ok")
                self.assertEqual((await asker.fetch(url, "POST", body=bytes(1 << 20))).body, b"ok")
                self.assertEqual((await asker.fetch(url)).body, bytes(1 << 20))
                self.assertEqual((server.opened, len(asker.conns)), (1, 1))

    async def test_it_goes_through_a_tunnel(self):
        async def pump(reader, writer):
            with contextlib.suppress(OSError):
                while not writer.is_closing():
                    data = await reader.read(65536)
                    if not data:
                        break
                    writer.write(data)
            writer.close()

        async def proxy(reader, writer):
            heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
            onward = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            await asyncio.gather(pump(reader, onward[1]), pump(onward[0], writer))
        heads = []
        async with RawServer(OK, OK, ssl=self.own) as server:
            listener = await asyncio.start_server(proxy, "127.0.0.1", 0)
            where = "http://A:b@127.0.0.1:%d" % listener.sockets[0].getsockname()[1]
            async with self.client(ssl=self.trusting, proxies={"https": where}) as asker:
                for _ in range(2):
                    answer = await asker.fetch("https://localhost/a", headers={"Cookie": "a=1"})
                    self.assertEqual(answer.body, b"ok")
            listener.close()
        self.assertEqual(heads, ["CONNECT localhost:443 HTTP/1.1\r\nHost: localhost:443\r\n"
                                 "Proxy-Authorization: Basic QTpi\r\n\r\n"])
        self.assertTrue(server.requests[0].startswith("GET /a HTTP/1.1\r\nHost: localhost\r\n"))
        self.assertNotIn("Proxy-", server.requests[0])


class ClientInApplicationTest(unittest.TestCase):
    """fetch() in handlers and scripts: on the loop of the worker, with its own pool."""

    def setUp(self):
        without = {name: value for name, value in os.environ.items()
                   if not name.lower().endswith("_proxy")}
        patch = mock.patch.dict(os.environ, without, clear=True)
        patch.start()
        self.addCleanup(patch.stop)

    def test_functions_and_coroutines_fetch(self):
        with Server(hello, port=0) as far:
            async def wait():
                return (await fetching.fetch(far.url)).text

            def block():
                return fetching.fetch_sync(far.url, timeout=TIMEOUT).text
            for callback in (wait, block):
                with Server(app_of(callback), port=0) as near:
                    with self.subTest(callback=callback.__name__):
                        self.assertEqual(fetch(near.url)[::2], (200, b"Hello World!"))
                self.assertEqual(answer_of(callback).text, "Hello World!")
            self.assertEqual(fetching.fetch_sync(far.url).status_code, 200)

    def test_asyncio_itself_cannot_wait(self):
        async def callback():
            fetching.fetch_sync("http://127.0.0.1:1/")
        with self.assertLogs("minibottle", "ERROR") as logs:
            self.assertEqual(answer_of(callback).status_code, 500)
        self.assertIn("await it", logs.output[0])

    def test_the_connections_of_fetch_are_closed_with_their_loop(self):
        async def twice():
            await fetching.fetch(server.url)
            await fetching.fetch(server.url)
            asker, _ = fetching.shared[asyncio.get_running_loop()]
            self.assertEqual(len(asker.conns), 1)
            return asker
        with Server(hello, port=0) as server:
            before = len(fetching.shared)
            self.assertEqual(asyncio.run(twice()).conns, set())
            self.assertEqual(len(fetching.shared), before)

    def test_the_aggregator_asks_its_services_at_once(self):
        with Server(load_example("aggregate"), port=0) as server:
            module = sys.modules["examples.aggregate"]
            with mock.patch.dict(module.SERVICES, reviews=(0.2, "good")):
                start = time.monotonic()
                self.assertEqual(json.loads(fetch(server.url)[2].decode()),
                                 {"stock": 7, "price": "1.10", "reviews": "good"})
                self.assertLess(time.monotonic() - start, 0.45 * SLOW)


class ClientServersTest(ClientTest):
    """Servers of others."""

    async def check(self, url):
        async with self.client() as asker:
            for _ in range(3):
                self.assertEqual((await asker.fetch(url)).text, "Hello World!")
            answer = await asker.fetch(url + "/api", "POST", headers={"Accept-Language": "fr"})
            self.assertEqual(answer.json, {"language": "fr"})
            answer = await asker.fetch(url + "/api", "POST", body=[b"a", b"b"])
            self.assertEqual(answer.json, {"language": None})
            self.assertEqual((await asker.fetch(url + "/none")).status_code, 404)
            self.assertEqual((await asker.fetch(url, "HEAD")).body, b"")

    async def test_ours(self):
        with serve_builtin(load_example("example_tornado")) as url:
            await self.check(url)

    async def test_wsgiref(self):
        with serve_wsgiref(reply([b"Hello World!"])) as url:
            async with self.client() as asker:
                self.assertEqual((await asker.fetch(url)).text, "Hello World!")

    @unittest.skipUnless(LONG, "needs MINIBOTTLE_LONG=1")
    @needs("gunicorn")
    async def test_gunicorn(self):
        with serve_gunicorn("examples.example_tornado:make_app()") as url:
            await self.check(url)

    @needs("tornado")
    async def test_tornado(self):
        import tornado.web

        class Index(tornado.web.RequestHandler):
            def get(self):
                self.write("Hello World!")

            def head(self):
                self.write("Hello World!")

        class Api(tornado.web.RequestHandler):
            def post(self):
                self.write({"language": self.request.headers.get("Accept-Language")})
        app = tornado.web.Application([("/", Index), ("/api", Api)], compress_response=True)
        with self.assertLogs("tornado.access", "INFO"):
            server = app.listen(0, "127.0.0.1")
            port = next(iter(server._sockets.values())).getsockname()[1]
            await self.check(f"http://127.0.0.1:{port}")
            server.stop()
            await server.close_all_connections()

    @unittest.skipUnless(LONG and NGINX, "needs nginx and MINIBOTTLE_LONG=1")
    async def test_nginx_in_front_of_ours(self):
        with serve_builtin(load_example("example_tornado")) as behind, \
                nginx_in_front(behind, "gzip on; gzip_types *; gzip_min_length 1; ") as url:
            await self.check(url)


# === 20. Test client, sessions, cross-origin requests, uploads ================

class StreamingClientTest(UnitTest):
    """Bodies piece by piece, both ways, and what is closed in the end."""

    def setUp(self):
        self.app = App()
        self.client = TestClient(self.app)
        self.log = []

    def count(self):
        try:
            for i in itertools.count():
                self.log.append(i)
                yield "%d\n" % i
        finally:
            self.log.append("closed")

    async def count_async(self):
        try:
            for i in itertools.count():
                self.log.append(i)
                yield "%d\n" % i
                await asyncio.sleep(0)
        finally:
            self.log.append("closed")

    def test_an_endless_answer_is_read_as_far_as_is_wanted_and_closed(self):
        for count in (self.count, self.count_async):
            self.log = []
            with self.subTest(count=count.__name__):
                with TestClient(app_of(count)).stream("GET", "/") as answer:
                    self.assertEqual(answer.status, "200 OK")
                    self.assertEqual([next(answer.pieces) for _ in range(3)],
                                     [b"0\n", b"1\n", b"2\n"])
                    self.assertEqual(self.log, [0, 1, 2])
                self.assertEqual(self.log, [0, 1, 2, "closed"])

    def test_it_is_closed_when_the_test_fails(self):
        with self.assertRaisesRegex(KeyError, "mine"):
            with TestClient(app_of(self.count_async)).stream("GET", "/"):
                raise KeyError("mine")
        self.assertEqual(self.log, [0, "closed"])

    def test_what_has_not_been_read_is_the_body(self):
        with TestClient(app_of(lambda: iter("abc"))).stream("GET", "/") as answer:
            self.assertEqual(next(answer.pieces), b"a")
            self.assertEqual((answer.text, answer.body, list(answer.pieces)), ("bc", b"bc", []))

    def test_an_error_in_the_middle_is_raised_where_it_is_read(self):
        async def break_off():
            yield "a"
            raise OSError("broken")
        with TestClient(app_of(break_off)).stream("GET", "/") as answer:
            self.assertEqual(next(answer.pieces), b"a")
            self.assertRaisesRegex(OSError, "broken", next, answer.pieces)

    def test_server_sent_events_are_read_one_by_one(self):
        async def count(n):
            try:
                while True:
                    yield {"id": n, "data": "x"}
                    await asyncio.sleep(0)
                    n += 1
            finally:
                self.log.append("closed")

        def events():
            return minibottle.event_stream(count(int(request.headers["Last-Event-ID"]) + 1))
        with TestClient(app_of(events)).stream("GET", "/", {"Last-Event-ID": "7"}) as answer:
            self.assertEqual(answer.headers["Content-Type"], "text/event-stream")
            self.assertEqual([next(answer.pieces) for _ in range(3)], [
                b":\n\n", b"id: 8\ndata: x\n\n", b"id: 9\ndata: x\n\n"])
        self.assertEqual(self.log, ["closed"])

    def test_a_body_of_pieces_is_made_while_it_is_read(self):
        @self.app.post("/up", stream=True)
        async def up():
            got = []
            async for piece in request.stream:
                got.append(len(piece))
                self.log.append("read")
            return {"got": got, "length": request.content_length}

        def pieces():
            for size in (3, 0, 100000):
                self.log.append(size)
                yield b"x" * size
        answer = self.client.post("/up", body=pieces()).json
        self.assertEqual((sum(answer["got"]), answer["length"]), (100003, -1))
        self.assertEqual(self.log[:4], [3, "read", 0, 100000])

    def test_a_body_of_pieces_is_a_file_and_a_form_as_any_other(self):
        @self.app.post("/form")
        def form():
            return dict(request.forms)
        self.app.post("/", callback=lambda: [request.body.read(), request.body.read()])
        self.assertEqual(self.client.post("/", body=iter([b"a", b"b"])).body, b"abab")
        answer = self.client.post("/form", {"Content-Type": "application/x-www-form-urlencoded"},
                                  body=[b"a=1", b"&b=2"])
        self.assertEqual(answer.json, {"a": "1", "b": "2"})
        answer = TestClient(validator(self.app)).post("/", body=[b"c"])
        self.assertEqual(answer.body, b"cc")

    def test_a_coroutine_asks_and_the_coroutines_of_the_application_answer(self):
        @self.app.get("/")
        async def index():
            await asyncio.sleep(0)
            return "index"
        self.app.get("/count", callback=self.count_async)

        async def test():
            self.assertEqual(self.client.get("/").text, "index")
            with self.client.stream("GET", "/count") as answer:
                self.assertEqual(next(answer.pieces), b"0\n")
        asyncio.run(test())
        self.assertEqual(self.log[-1], "closed")

    def test_the_two_ends_of_an_applications_life_are_called(self):
        self.app.on_start(lambda: self.log.append("start"))
        self.app.get("/", callback=lambda: self.log)

        @self.app.on_start
        async def begin():
            await asyncio.sleep(0)
            self.log.append("begin")

        @self.app.on_stop
        async def stop():
            self.log.append("stop")
        with self.client as client:
            self.assertEqual(client.get("/").body, b"startbegin")
        self.assertEqual(self.log, ["start", "begin", "stop"])
        with TestClient(lambda environ, start_response: []):
            pass

    def test_an_error_of_the_application_is_raised_if_that_is_asked_for(self):
        inner = App()
        inner.get("/", callback=lambda: {}["inner"])
        self.app.mount("/inner/", inner)
        self.app.get("/refuse", callback=lambda: abort(403, "No."))
        self.app.get("/sync", callback=lambda: {}["sync"])
        self.app.get("/result", callback=lambda: object())

        @self.app.get("/async")
        async def fail():
            await asyncio.sleep(0)
            return {}["async"]
        client = TestClient(self.app, raise_errors=True)
        self.assertEqual([client.get(path).status_code for path in ("/refuse", "/none")],
                         [403, 404])
        for path, kind, message in (("/sync", KeyError, "sync"), ("/async", KeyError, "async"),
                                    ("/inner/", KeyError, "inner"),
                                    ("/result", TypeError, "cannot return object")):
            with self.subTest(path=path):
                self.assertRaisesRegex(kind, message, client.get, path)
        with self.assertLogs("minibottle", "ERROR"):
            self.assertEqual(self.client.get("/sync").status_code, 500)


class ClientCookiesAndRedirectsTest(UnitTest):

    def setUp(self):
        self.app = App()

        @self.app.get("/shop/set")
        def set():
            response.add_header("Set-Cookie", request.query.line)

        self.app.get(["/", "/<name:path>"], callback=lambda name="": dict(request.cookies))

    def sent(self, line, *paths, url="http://localhost"):
        """Where a cookie is sent that /shop/set has set."""
        client = TestClient(self.app, url)
        client.get("/shop/set", query={"line": line})
        return [path for path in paths if client.get(path).json == {"a": "1"}]

    def test_a_cookie_is_sent_where_and_while_it_counts(self):
        """RFC 6265 5.1.4, 5.2, 5.4."""
        paths = ("/", "/shop", "/shop/b", "/shopping", "/shop/b/c")
        soon, past = http_date(time.time() + 99), http_date(time.time() - 99)
        for line, expected in (
                ("a=1", ["/shop", "/shop/b", "/shop/b/c"]), ("a=1; path=/", list(paths)),
                ("a=1; Path=/shop/", ["/shop/b", "/shop/b/c"]),
                ("a=1; Path=/shop/b/c", ["/shop/b/c"]),
                ("a=1; Path=shop; HttpOnly", ["/shop", "/shop/b", "/shop/b/c"]),
                ("a=1; Path=/; Max-Age=9", list(paths)), ("a=1; Path=/; Max-Age=0", []),
                ("a=1; Path=/; Max-Age=-5", []), ("a=1; Path=/; Expires=" + soon, list(paths)),
                ("a=1; Path=/; Expires=" + past, []), ("a=1; Path=/; Max-Age=x", list(paths)),
                ("a=1; Path=/; Expires=" + past + "; Max-Age=9", list(paths)),
                ("a=1; Path=/; Expires=never", list(paths)), ("a=1; Path=/; Secure", [])):
            with self.subTest(line=line):
                self.assertEqual(self.sent(line, *paths), expected)
        self.assertEqual(self.sent("a=1; Path=/; Secure", "/", url="https://localhost"), ["/"])

    def test_a_cookie_ends_with_its_age_and_is_dropped_under_its_own_path(self):
        client = TestClient(self.app)
        client.get("/shop/set", query={"line": "a=1; Max-Age=5; Path=/"})
        for line, left in (("a=; Max-Age=0", {"a": "1"}), ("a=; Max-Age=0; Path=/", {})):
            client.get("/shop/set", query={"line": line})
            self.assertEqual((client.get("/").json, client.cookies), (left, left))
        client.get("/shop/set", query={"line": "a=1; Max-Age=5; Path=/"})
        with mock.patch("minibottle.testing.time.time", return_value=time.time() + 6):
            self.assertEqual(client.get("/").json, {})
        client.cookies["b"] = "2"
        self.assertEqual(client.get("/").json, {"a": "1", "b": "2"})

    def test_it_is_asked_as_the_url_that_is_given(self):
        app = app_of(lambda: request.url, "/x")
        self.assertEqual(TestClient(app).get("/x").text, "http://localhost/x")
        self.assertEqual(TestClient(app, "https://a.example:8443").get("/x").text,
                         "https://a.example:8443/x")

    def test_a_redirect_is_followed_if_that_is_asked_for(self):
        app = App()

        @app.route("/go/<code:int>", ["GET", "HEAD", "POST", "PUT"])
        def go(code):
            response.set_cookie("seen", "1", path="/")
            raise HTTPResponse("", code, Location="../end?b=2")

        @app.route("/end", ["GET", "HEAD", "POST", "PUT"])
        def end():
            response.set_header("X-Said", "%s %s %s" % (
                request.method, request.query_string, request.body.read().decode()))
            return dict(request.cookies)
        for method, code, said in (
                ("GET", 302, "GET b=2 "), ("POST", 301, "GET b=2 "), ("POST", 302, "GET b=2 "),
                ("POST", 303, "GET b=2 "), ("PUT", 303, "GET b=2 "), ("HEAD", 303, "HEAD b=2 "),
                ("PUT", 302, "PUT b=2 body"), ("POST", 307, "POST b=2 body"),
                ("POST", 308, "POST b=2 body")):
            body = "" if method in ("GET", "HEAD") else "body"
            answer = TestClient(app).request(
                method, "/go/%d" % code, query={"a": 1}, body=body, follow_redirects=True)
            with self.subTest(method=method, code=code):
                self.assertEqual((answer.status_code, answer.headers["X-Said"]), (200, said))
        self.assertEqual(TestClient(app).get("/go/302", follow_redirects=True).json,
                         {"seen": "1"})
        self.assertEqual(TestClient(app).get("/go/302").status_code, 302)

    def test_a_redirect_elsewhere_or_in_a_circle_is_an_answer(self):
        self.app.get("/away", callback=lambda: redirect("http://localhost.example/x"))
        self.app.get("/circle", callback=lambda: redirect("/circle"))
        client = TestClient(self.app)
        self.assertEqual(client.get("/away", follow_redirects=True).headers["Location"],
                         "http://localhost.example/x")
        self.assertEqual(client.get("/circle", follow_redirects=True).status_code, 303)


class InProcessWebSocketTest(UnitTest):
    """WebSocket without a server: both ends in this process."""

    def setUp(self):
        self.app = App()
        self.log = []

        @self.app.websocket("/async/<name>", subprotocols=["b", "a"], max_message=99999)
        async def echo(ws, name, request):
            try:
                await ws.send("Hello %s, %s!" % (name, request.query.get("q")))
                async for message in ws:
                    await ws.send(message)
            finally:
                await asyncio.sleep(0)
                self.log.append("gone")

        @self.app.websocket("/sync")
        def tell(ws):
            try:
                for message in ws:
                    ws.send(message)
            finally:
                time.sleep(0.01)
                self.log.append(ws.code)

        @self.app.websocket("/closed")
        async def close(ws):
            await ws.close(4001, "Enough.")

        @self.app.websocket("/broken")
        async def fail(ws):
            await ws.send("first")
            raise OSError("broken")

        @self.app.websocket("/idle")
        async def idle(ws):
            try:
                await asyncio.Event().wait()
            finally:
                self.log.append("cancelled")

        @self.app.hook("before_request")
        def check():
            if request.path == "/refused":
                abort(401, "Who are you?")
        self.client = TestClient(self.app)

    def test_texts_bytes_and_json_go_both_ways(self):
        with self.client.websocket("/async/Ada?q=1") as ws:
            self.assertEqual(ws.receive(timeout=TIMEOUT), "Hello Ada, 1!")
            for message in ("x", b"\x00", UNICODE, "long" * 20000):
                ws.send(message)
                self.assertEqual(ws.receive(timeout=TIMEOUT), message)
            ws.send_json({"a": [1]})
            self.assertEqual(ws.receive_json(), {"a": [1]})
            self.assertGreater(ws.ping(), 0)
            self.assertEqual(self.log, [])
        self.assertEqual(self.log, ["gone"])

    def test_a_plain_handler_has_ended_at_the_end_too(self):
        with self.client.websocket("/sync") as ws:
            ws.send("x")
            self.assertEqual(ws.receive(timeout=TIMEOUT), "x")
            ws.close(4000, "Bye.")
        self.assertEqual(self.log, [4000])

    def test_nothing_that_comes_is_a_timeout(self):
        with self.client.websocket("/sync") as ws:
            self.assertRaises(asyncio.TimeoutError, ws.receive, timeout=0.01)

    def test_subprotocol_and_compression_are_agreed(self):
        with self.client.websocket("/async/x", subprotocols=["a", "c"]) as ws:
            self.assertEqual((ws.subprotocol, bool(ws.deflate)), ("a", True))
        with self.client.websocket("/async/x", deflate=False) as ws:
            self.assertEqual((ws.subprotocol, ws.deflate), ("", None))

    def test_headers_and_cookies_are_sent_and_kept(self):
        @self.app.hook("before_request")
        def check():
            self.log.append((request.get_cookie("a"), request.headers.get("X-B")))
            response.set_cookie("c", "3", path="/")
        self.client.cookies["a"] = "1"
        with self.client.websocket("/sync", {"X-B": "2"}):
            pass
        self.assertEqual(self.log[0], ("1", "2"))
        self.assertEqual(self.client.cookies, {"a": "1", "c": "3"})

    def test_the_servers_close_and_its_failure_are_seen(self):
        with self.client.websocket("/closed") as ws:
            with self.assertRaisesRegex(ConnectionError, "closed with 4001: Enough"):
                ws.receive(timeout=TIMEOUT)
            self.assertEqual((ws.code, ws.reason), (4001, "Enough."))
        with self.assertLogs("minibottle", "ERROR") as logs:
            with self.client.websocket("/broken") as ws:
                self.assertEqual(list(ws.receive(timeout=TIMEOUT) for _ in "1"), ["first"])
                self.assertRaisesRegex(ConnectionError, "1011", ws.receive, timeout=TIMEOUT)
        self.assertIn("OSError: broken", logs.output[0])

    def test_a_handler_that_does_not_notice_is_cancelled(self):
        with mock.patch("minibottle.testing.GRACE_SECONDS", 0.01):
            with self.client.websocket("/idle"):
                pass
        self.assertEqual(self.log, ["cancelled"])

    def test_a_refused_handshake_says_what_was_answered(self):
        for path, headers, status, text in (
                ("/refused", {}, 401, "Who are you?"), ("/none", {}, 404, "Not Found"),
                ("/sync", {"Origin": "http://evil.example"}, 403, "origins=[&#039;http://evil"),
                ("/sync", {"Sec-WebSocket-Version": "8"}, 426, "Version: 13")):
            with self.subTest(path=path, headers=headers):
                with self.assertRaises(ConnectionError) as caught:
                    with self.client.websocket(path, headers):
                        self.fail("it is open")
                answer = caught.exception.answer
                self.assertEqual(answer.status_code, status)
                self.assertIn(text, answer.text)
                self.assertIn("answered with %d" % status, str(caught.exception))
        with self.client.websocket("/sync", {"Origin": "http://localhost"}):
            pass

    def test_of_a_mounted_application_and_in_a_coroutine(self):
        outer = App()
        outer.mount("/in/", self.app)

        async def test():
            with TestClient(outer).websocket("/in/async/b") as ws:
                self.assertEqual(ws.receive(timeout=TIMEOUT), "Hello b, None!")
        asyncio.run(test())

    def test_two_talk_to_each_other_in_the_chat_and_nothing_is_left(self):
        client = TestClient(importlib.import_module("examples.chat").app)
        self.assertEqual(client.get("/rooms").json, {"tea": 0})
        before = len(os.listdir("/proc/self/fd")) if HAS_PROC else 0
        with client.websocket("/rooms/tea/chat") as ada, \
                client.websocket("/rooms/tea/chat") as bob:
            self.assertEqual(client.get("/rooms").json, {"tea": 2})
            ada.send("Hello!")
            self.assertEqual([ws.receive(timeout=TIMEOUT) for ws in (ada, bob)], ["Hello!"] * 2)
        self.assertEqual(client.get("/rooms").json, {"tea": 0})
        self.assertEqual(len(os.listdir("/proc/self/fd")) if HAS_PROC else 0, before)


class CrossOriginTest(UnitTest):
    """Which unsafe requests are let in, by Fetch Metadata, else by Origin (RFC 6454)."""

    HERE, EVIL, TRUSTED = "http://localhost", "https://evil.example", "https://ok.example"

    def setUp(self):
        self.app = App()
        minibottle.cross_origin_protection(self.app, [self.TRUSTED])
        self.app.route("/", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"], lambda: "in")

    def test_the_table_of_cases(self):
        for site, origin, status in (
                ("same-origin", None, 200), ("same-origin", self.HERE, 200),
                ("same-origin", self.EVIL, 200),  # a proxy has changed Host: the browser knows
                ("none", None, 200), ("none", self.EVIL, 200), ("none", "null", 200),
                ("same-site", None, 403), ("same-site", self.HERE, 403),
                ("same-site", self.TRUSTED, 200), ("cross-site", None, 403),
                ("cross-site", self.HERE, 403), ("cross-site", self.EVIL, 403),
                ("cross-site", self.TRUSTED, 200), ("cross-site", "null", 403),
                ("SAME-ORIGIN", None, 403), ("", None, 403), ("new-word", None, 403),
                (None, None, 200), (None, self.HERE, 200), (None, "https://localhost", 200),
                (None, "http://localhost:81", 403), (None, self.EVIL, 403), (None, "null", 403),
                (None, "", 403), (None, self.TRUSTED, 200), (None, self.TRUSTED + ":444", 403),
                (None, "http://ok.example", 403), (None, "https://a.ok.example", 403),
                (None, "https://ok.example.evil.example", 403), (None, "http://[", 403)):
            headers = {name: value for name, value in (("Sec-Fetch-Site", site), ("Origin", origin))
                       if value is not None}
            for method, expected in (("POST", status), ("PUT", status), ("PATCH", status),
                                     ("DELETE", status), ("GET", 200), ("HEAD", 200),
                                     ("OPTIONS", 200)):
                with self.subTest(method=method, site=site, origin=origin):
                    answer = TestClient(self.app).request(method, "/", headers)
                    self.assertEqual(answer.status_code, expected)

    def test_the_host_is_compared_with_its_port_and_without_regard_to_case(self):
        for host, origin, status in (
                ("Shop.example:8080", "http://shop.example:8080", 200),
                ("shop.example:8080", "http://shop.example", 403),
                ("shop.example", "http://shop.example.evil", 403), ("", "null", 403),
                ("", "http://", 403), ("[::1]:8080", "http://[::1]:8080", 200)):
            with self.subTest(host=host, origin=origin):
                answer = TestClient(self.app).post("/", {"Host": host, "Origin": origin})
                self.assertEqual(answer.status_code, status)

    def test_the_answer_says_who_may_not_do_what(self):
        post = TestClient(self.app).post
        self.assertIn("A page of another origin (https://evil.example) may not POST to localhost: "
                      "trusted_origins=[…] names those that may.",
                      post("/", {"Origin": self.EVIL}).text)
        self.assertIn("(Sec-Fetch-Site: cross-site)",
                      post("/", {"Sec-Fetch-Site": "cross-site"}).text)
        self.assertIn("&lt;script&gt;", post("/", {"Origin": "<script>"}).text)

    def test_what_is_mounted_is_protected_and_what_is_not_there_stays_unknown(self):
        def wsgi(environ, start_response):
            start_response("200 OK", [TEXT])
            return [b"foreign"]
        inner = App()
        inner.post("/", callback=lambda: "inner")
        self.app.mount("/inner/", inner)
        self.app.mount("/wsgi/", wsgi)
        called = []
        self.app.add_hook("before_request", lambda: called.append(request.path))
        for path, status in (("/inner/", 200), ("/wsgi/", 200), ("/none", 404),
                             ("/inner/no", 404)):
            with self.subTest(path=path):
                post, called[:] = TestClient(self.app).post, []
                self.assertEqual(post(path, {"Origin": self.EVIL}).status_code, 403)
                self.assertEqual(called, [])
                self.assertEqual(post(path).status_code, status)
                self.assertEqual(called, [path])

    def test_a_handler_is_not_called_and_an_error_page_may_be_ones_own(self):
        @self.app.post("/pay")
        def pay():
            self.fail("called")
        self.app.error(403, lambda error: "Not from there.")
        answer = TestClient(self.app).post("/pay", {"Origin": self.EVIL})
        self.assertEqual((answer.status_code, answer.text), (403, "Not from there."))

    def test_a_trusted_origin_is_one(self):
        for origin in ("ok.example", "https://ok.example/", "https://OK.example", "*", "null", "",
                       "https://ok.example/path", "https://a@ok.example"):
            with self.subTest(origin=origin):
                self.assertRaisesRegex(ValueError, "is no origin; one is 'https://example.org'",
                                       minibottle.cross_origin_protection, App(), [origin])
        app = App()
        minibottle.cross_origin_protection(app, "http://ok.example:8080")
        app.post("/", callback=lambda: "in")
        self.assertEqual(TestClient(app).post("/", {"Origin": "http://ok.example:8080"}).text, "in")

    @unittest.skipUnless(BROWSER and LONG, "needs Chromium and MINIBOTTLE_LONG=1")
    def test_a_browser_posts_from_its_own_page_and_not_from_that_of_another_port(self):
        seen = []
        form = ('<form method=post action="%s/pay"></form>'
                '<script>document.forms[0].submit()</script>')
        self.app.get("/form", callback=lambda: form % "")
        self.app.post("/pay", callback=lambda: "paid")

        @self.app.hook("after_request")
        def note():
            if request.method == "POST":
                seen.append((request.headers.get("Sec-Fetch-Site"), response.status_code))
        with Server(self.app, port=0) as here:
            frames = ("<iframe src='/attack'></iframe><iframe src='%s/form'></iframe>" % here.url)
            away = app_of(lambda: frames)
            away.get("/attack", callback=lambda: form % here.url)
            with Server(away, port=0) as elsewhere:
                browse(elsewhere.url)
        self.assertEqual(sorted(seen), [("same-origin", 200), ("same-site", 403)])


def browse(url, *flags):
    """What headless Chromium makes of a page, as text, when all that it loads has come."""
    with tempfile.TemporaryDirectory() as profile:
        return subprocess.run(
            [BROWSER, *BrowserTest.FLAGS, "--virtual-time-budget=20000", *flags,
             "--user-data-dir=" + profile, "--dump-dom", url],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            timeout=2 * TIMEOUT, check=True).stdout.decode()


class SessionsExampleTest(UnitTest):

    def setUp(self):
        with mock.patch.dict(os.environ, SECRETS="new old"):
            sys.modules.pop("examples.sessions", None)
            self.module = importlib.import_module("examples.sessions")
        self.client = TestClient(self.module.app)

    def app_with(self, secrets, **options):
        """An application that counts its visitors' visits."""
        app = App()
        sessions = self.module.Sessions(app, secrets, **options)

        @app.get("/")
        def count():
            session = sessions.get()
            session["list"] = session.get("list", []) + [len(session.get("list", []))]
            return session
        app.get("/look", callback=lambda: sessions.get())
        app.get("/nested", callback=lambda: sessions.get()["list"].append("deep"))
        app.get("/plain", callback=lambda: "plain")
        app.get("/big", callback=lambda: sessions.get().update(big="x" * 5000))
        return app

    def test_a_login_is_remembered_and_a_logout_forgets(self):
        with TestClient(self.module.app) as client:
            self.assertIn("<form", client.get("/me", follow_redirects=True).text)
            answer = client.post("/login", form={"name": UNICODE}, follow_redirects=True)
            self.assertEqual(answer.json, {"name": UNICODE, "visits": 1})
            self.assertEqual(client.get("/me").json, {"name": UNICODE, "visits": 2})
            client.post("/login", form={"name": "Bob"})
            self.assertEqual(client.get("/me").json, {"name": "Bob", "visits": 1})
            client.post("/logout")
            self.assertEqual((client.cookies, client.get("/me").status_code), ({}, 303))

    def test_a_login_leaves_nothing_of_an_earlier_session(self):
        earlier = cookie_encode(["session", {"cart": ["tea"]}, int(time.time())], "old")
        self.client.cookies["session"] = earlier
        answer = self.client.post("/login", form={"name": "Ada"}, follow_redirects=True)
        self.assertEqual(answer.json, {"name": "Ada", "visits": 1})

    def test_a_page_of_another_origin_logs_nobody_in(self):
        for headers in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
            answer = self.client.post("/login", headers, form={"name": "Eve"})
            self.assertEqual((answer.status_code, self.client.cookies), (403, {}))

    def test_the_cookie_is_written_when_the_session_has_changed_only(self):
        client = TestClient(self.app_with("s"))
        for path, written in (("/plain", False), ("/look", False), ("/", True), ("/look", False),
                              ("/plain", False), ("/nested", True), ("/", True)):
            with self.subTest(path=path):
                self.assertEqual("Set-Cookie" in client.get(path).headers, written)
        self.assertEqual(client.get("/look").json, {"list": [0, "deep", 2]})
        self.assertNotIn("Vary", client.get("/plain").headers)
        self.assertEqual(client.get("/look").headers["Vary"], "Cookie")

    def test_the_cookie_is_safe_unless_told_otherwise(self):
        line = TestClient(self.app_with("s")).get("/").headers["Set-Cookie"]
        self.assertRegex(line, r"^session=!\S+; (?=.*Path=/)(?=.*HttpOnly)(?=.*SameSite=Lax)"
                               r"(?=.*Max-Age=1209600)(?!.*Secure)")
        line = TestClient(self.app_with("s", secure=True, path="/a", samesite="strict")).get(
            "/").headers["Set-Cookie"]
        self.assertRegex(line, "(?=.*Path=/a)(?=.*SameSite=Strict)(?=.*Secure)")

    def test_secrets_rotate(self):
        cookies = {}
        for secrets, expected in ((["a"], [0]), (["b", "a"], [0, 1]), (["b"], [0, 1, 2]),
                                  (["a"], [0]), (["c", "b"], [0])):
            client = TestClient(self.app_with(secrets))
            client.cookies = cookies
            with self.subTest(secrets=secrets):
                self.assertEqual(client.get("/").json, {"list": expected})

    def test_what_was_forged_or_is_too_old_is_no_session(self):
        client = TestClient(self.app_with("s", max_age=60))
        client.get("/")
        good = client.cookies["session"]
        for cookie in ("", "x", good[:-4], good.replace("?", "?W"), "!?" + good[2:]):
            with self.subTest(cookie=cookie):
                self.assertEqual(client.get("/look", {"Cookie": "session=" + cookie}).json, {})
        later = time.time() + 61
        with mock.patch("minibottle.time.time", return_value=later):
            answer = client.get("/look", {"Cookie": "session=" + good})
        self.assertEqual(answer.json, {})
        self.assertIn("Max-Age=-1", answer.headers["Set-Cookie"])

    def test_one_that_is_too_large_is_an_error_that_says_so(self):
        client = TestClient(self.app_with("s"))
        with self.assertLogs("minibottle", "ERROR") as logs:
            self.assertEqual(client.get("/big").status_code, 500)
        self.assertIn("cookie session is over", logs.output[0])

    def test_secrets_come_from_a_file_or_the_environment(self):
        read = self.module.read_secrets
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "secrets")
            with open(path, "w") as file:
                file.write("new\nold\n")
            for env, expected in (({"SECRETS": "a b"}, ["a", "b"]),
                                  ({"SECRETS_FILE": path, "SECRETS": "a"}, ["new", "old"])):
                with self.subTest(env=env), mock.patch.dict(os.environ, env):
                    self.assertEqual(read(), expected)
        with self.assertLogs("minibottle", "WARNING") as logs:
            made, other = read(), read()
        self.assertNotEqual(made, other)
        self.assertIn("sessions end with this process", logs.output[0])


class UploadExampleTest(UnitTest):

    def setUp(self):
        self.module = importlib.import_module("examples.upload")

    def test_the_body_arrives_in_pieces_and_is_told_by_size_and_digest(self):
        client = TestClient(self.module.app)
        self.assertIn("upload.onprogress", client.get("/").text)
        for body in (b"", b"x", [b"x" * 70000] * 3):
            whole = body if isinstance(body, bytes) else b"".join(body)
            with self.subTest(size=len(whole)):
                self.assertEqual(client.post("/upload", body=body).json, {
                    "size": len(whole), "sha256": hashlib.sha256(whole).hexdigest()})

    def test_the_file_is_begun_before_all_has_come(self):
        begun = threading.Event()
        made = types.SimpleNamespace(
            TemporaryFile=lambda: begun.set() or tempfile.TemporaryFile())
        with mock.patch.object(self.module, "tempfile", made), \
                Server(self.module.app, port=0) as server, connect(server.url) as sock:
            sock.sendall(b"POST /upload HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
                         b"Content-Length: 6\r\n\r\nabc")
            self.assertTrue(begun.wait(TIMEOUT))
            sock.sendall(b"def")
            self.assertIn(hashlib.sha256(b"abcdef").hexdigest().encode(), read_all(sock))

    def test_a_body_over_the_limit_is_refused_before_it_is_sent(self):
        with Server(self.module.app, port=0) as server:
            status, _, body = fetch(server.url, "/upload", "POST", headers={
                "Content-Length": str(self.module.MAX_BYTES + 1)})
        self.assertEqual(status, 413)
        self.assertIn(b"body over 1073741824 bytes (max_body)", body)

    @unittest.skipUnless(HAS_PROC, "needs /proc")
    @only_cpython
    def test_20_megabytes_are_never_in_memory(self):
        piece = os.urandom(1 << 20)
        with serve("examples.upload:app", "--workers", "0", start=("minibottle.py",),
                   cwd=ROOT) as server:
            fetch(server.url, "/upload", "POST", piece)
            before = memory(server.pid, "VmHWM")
            status, _, body = fetch(server.url, "/upload", "POST", piece * 20)
            grown = memory(server.pid, "VmHWM") - before
        self.assertEqual((status, json.loads(body)), (200, {
            "size": 20 << 20, "sha256": hashlib.sha256(piece * 20).hexdigest()}))
        self.assertLess(grown, 4 << 20)

    @unittest.skipUnless(BROWSER and LONG, "needs Chromium and MINIBOTTLE_LONG=1")
    def test_a_browser_shows_its_progress_and_the_result(self):
        script = """<script>
            const chosen = new DataTransfer()
            chosen.items.add(new File([new Uint8Array(3000000)], "zeros.bin"))
            input.files = chosen.files
            input.onchange()
            </script>"""
        app = App()
        page = self.module.PAGE.replace('"upload"', '"real/upload"') + script
        app.get("/", callback=lambda: page)
        app.mount("/real/", self.module.app)
        with Server(app, port=0) as server:
            shown = browse(server.url)
        digest = hashlib.sha256(bytes(3000000)).hexdigest()
        self.assertIn("<output>3000000 bytes, SHA-256 %s</output>" % digest, shown)
        self.assertIn('<progress value="3000000" max="3000000">', shown)


# === 21. Layout ===============================================================

PROGRAM = SOURCE.decode("utf-8")
BANNERS = [(PROGRAM.count("\n", 0, match.start()) + 1, int(match[1]), match[2])
           for match in re.finditer(r"^# === ([0-9]+)\. (.+?) =+$", PROGRAM, re.MULTILINE)]
MAP_LINE = re.compile(r"^ {4}([0-9]+)\. (\S+(?: \S+)*)", re.MULTILINE)
WORLD = {"socket", "select", "selectors", "ssl", "signal", "asyncio", "threading", "_thread",
         "subprocess", "multiprocessing"}
DOORS = {("App.run", "run")}  # upward on purpose
DEPRECATED = set((  # PEP 594, PEP 632, and others that are gone or going
    "aifc asynchat asyncore audioop cgi cgitb chunk crypt distutils imghdr imp lib2to3 mailcap "
    "msilib nis nntplib optparse ossaudiodev pipes pkg_resources smtpd sndhdr spwd sunau telnetlib "
    "uu xdrlib").split())
HEAVY = ("asyncio ssl http.client email tempfile inspect dataclasses multiprocessing subprocess "
         "json zlib argparse concurrent.futures").split()


class ReadmeTest(unittest.TestCase):
    """What the README shows is what happens."""

    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        text = file.read()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)

    def run_block(self, holds):
        """The names that the block defines which holds this text."""
        names = {"__name__": "app"}
        exec(next(block for block in self.blocks if holds in block), names)
        return names

    def test_the_hello_world_says_hello(self):
        client = TestClient(self.run_block("def hello(request, name)")["app"])
        self.assertEqual(client.get("/").text, "Hello World!")
        self.assertEqual(client.get("/hello/Ada", {"User-Agent": "curl/7.88.1"}).text,
                         '{"hello": "Ada", "agent": "curl/7.88.1"}')
        self.assertEqual(client.get("/notes/1").json, {"note": "buy milk"})
        self.assertEqual(client.delete("/notes/1").status_code, 200)
        self.assertEqual(client.get("/notes/1").status_code, 404)

    def test_its_test_passes(self):
        app = self.run_block("def hello(request, name)")["app"]
        with mock.patch.dict(sys.modules, app=types.SimpleNamespace(app=app)):
            self.run_block("def test_hello()")["test_hello"]()

    def test_its_hook_answers_a_preflight_and_is_in_every_answer(self):
        app = self.run_block("def cors()")["app"]
        app.get("/a", callback=lambda: "a")
        app.get("/broken", callback=lambda: 1 // 0)
        client = TestClient(app)
        with self.assertLogs("minibottle", "ERROR"):
            answers = [client.get("/a"), client.get("/no"), client.post("/a"),
                       client.get("/broken"), client.options("/a")]
        self.assertEqual([answer.status_code for answer in answers], [200, 404, 405, 500, 204])
        for answer in answers:
            self.assertEqual(answer.headers["Access-Control-Allow-Origin"], "https://example.org")
        self.assertEqual(answers[-1].headers["Access-Control-Allow-Methods"], "GET, HEAD, OPTIONS")

    def test_its_coroutines_answer(self):
        app = self.run_block("async def slow()")["app"]
        with Server(app, port=0) as server:
            self.assertEqual(fetch(server.url, "/slow")[2], b'{"slept": 0.1}')
            self.assertEqual(fetch(server.url, "/count")[2].split(), b"0 1 2 3 4 5 6 7 8 9".split())
            self.assertEqual(fetch(server.url, "/size", "POST", b"x" * 9)[2], b"9")
        self.assertTrue(app.ticker.cancelled())

    def test_its_echo_and_its_client_of_it_talk(self):
        block = self.run_block("async def echo(ws, room)")
        with Server(block["app"], port=0) as server:
            url = server.url.replace("http", "ws") + "/echo/tea"
            self.assertEqual(asyncio.run(block["greet"](url)), {"hello": "Ada"})

    def test_its_ticks_go_on_where_the_reader_was(self):
        app = self.run_block("def ticks()")["app"]
        with Server(app, port=0) as server, contextlib.closing(Client(server.url)) as client:
            client.request("GET", "/ticks", headers={"Last-Event-ID": "7"})
            answer = client.getresponse()
            self.assertEqual([answer.readline() for _ in range(5)],
                             [b":\n", b"\n", b"id: 8\n", b'data: {"n": 8}\n', b"\n"])

    def test_its_table_of_files_is_that_of_minibottle(self):
        rows = dict(re.findall(r"^\| `minibottle_(\w+)\.py` \| (.+?) \|", self.text, re.MULTILINE))
        self.assertEqual(set(rows), set(minibottle.COMPANIONS))
        for file, shown in rows.items():
            shown = set(re.findall(r"`(\w+)`", shown))
            self.assertLessEqual(shown, set(minibottle.COMPANIONS[file].split()))

    def test_without_coroutines_asyncio_is_not_imported(self):
        program = ("import sys; from minibottle import App, Server; app = App(); "
                   "app.route('/', callback=lambda: iter(['a'])); "
                   "from urllib.request import urlopen\n"
                   "with Server(app, port=0) as server: urlopen(server.url).read()\n"
                   "print('asyncio' in sys.modules)")
        done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT,
                              check=True)
        self.assertEqual(done.stdout.strip(), b"False")

    def test_its_table_names_every_setting_with_its_default(self):
        rows = re.findall(r"^\| `([a-z_]+)` \| ([^|]*) \| ([^|]*) \|$", self.text, re.MULTILINE)
        expected = []
        for name, default, meaning in minibottle.SETTINGS:
            if isinstance(default, tuple):
                shown = default[0] if default else "none"
            elif isinstance(default, bool):
                shown = "on" if default else "off"
            else:
                shown = (default or "none") if isinstance(default, str) else f"{default:,g}" \
                    if isinstance(default, float) else f"{default:,}"
            expected.append((name, shown, meaning))
        self.assertEqual(rows, expected)

    def test_its_bad_request_is_refused_as_it_says(self):
        with Server(lambda environ, start_response: [], port=0) as server:
            status, _, body = fetch(server.url, "/", "POST", b"hello", {"Content-Length": "+5"})
        self.assertEqual(status, 400)
        self.assertIn(body.decode().strip(), self.text)


class LayoutTest(unittest.TestCase):
    """What the docstring of minibottle.py says of its inside is so."""

    code = compile(PROGRAM, FILE, "exec", dont_inherit=True)

    def section(self, line):
        return max((number for start, number, _ in BANNERS if start <= line), default=0)

    def reads(self, code, where=""):
        """(where, line, module-level name) of whatever a code object and those in it look up."""
        own = {item.argval for item in dis.get_instructions(code)
               if item.opname == "STORE_NAME"} if where else set()  # the names of a class body
        line = code.co_firstlineno
        for item in dis.get_instructions(code):
            line = getattr(item, "line_number", item.starts_line) or line
            if item.opname in ("LOAD_NAME", "LOAD_GLOBAL", "IMPORT_NAME"):
                if item.argval not in own:
                    yield where, line, item.argval
        for inner in code.co_consts:
            if isinstance(inner, type(code)):
                yield from self.reads(inner, (where + "." + inner.co_name).lstrip("."))

    def test_the_map_and_the_banners_are_the_same(self):
        chart = minibottle.__doc__.partition("\nMAP")[2].partition("\nONE REQUEST")[0]
        drawn = [(int(number), title) for number, title in MAP_LINE.findall(chart)]
        self.assertEqual(drawn, [(number, title) for _, number, title in BANNERS])
        self.assertEqual([number for number, _ in drawn], list(range(1, len(drawn) + 1)))

    def test_no_section_uses_a_later_one(self):
        home, line = {}, 1
        for item in dis.get_instructions(self.code):
            line = getattr(item, "line_number", item.starts_line) or line
            if item.opname == "STORE_NAME":
                home.setdefault(item.argval, self.section(line))
        upward = {(where, name, self.section(line), home[name])
                  for where, line, name in self.reads(self.code)
                  if home.get(name, 0) > self.section(line)}
        self.assertEqual([row for row in sorted(upward) if row[:2] not in DOORS], [])

    def test_the_values_know_no_socket_clock_or_process(self):
        self.assertEqual([(line, name) for _, line, name in self.reads(self.code)
                          if name in WORLD and 1 <= self.section(line) <= 5], [])

    def test_functions_are_short_and_lines_fit(self):
        tokens = tokenize.generate_tokens(io.StringIO(PROGRAM).readline)
        silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
        lines = {line for token in tokens if token.type not in silent
                 for line in range(token.start[0], token.end[0] + 1)}
        for node in ast.walk(ast.parse(PROGRAM)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                first = body[0].lineno if body else node.end_lineno
                size = len([line for line in lines if first <= line <= node.end_lineno])
                self.assertLessEqual(size, 50, node.name)
        wide = [i for i, line in enumerate(PROGRAM.split("\n"), 1) if len(line) > 100]
        self.assertEqual(wide, [])

    def test_nothing_is_left_undone_or_vanishes_under_python_O(self):
        nodes = list(ast.walk(ast.parse(PROGRAM)))
        self.assertEqual([node.lineno for node in nodes if isinstance(node, ast.Assert)], [])
        self.assertEqual(re.findall(r"\b(?:TODO|FIXME|XXX)\b.*", PROGRAM), [])

    def test_no_module_is_used_that_is_deprecated(self):
        names = {name.partition(".")[0] for _, _, name in self.reads(self.code)}
        called = set(re.findall(r"import_module\(\"(\w+)", PROGRAM))
        self.assertEqual((names | called) & DEPRECATED, set())

    def test_importing_it_is_silent_and_pulls_in_little(self):
        program = ("import sys; sys.stdout, out = None, sys.stdout; sys.stderr, err = None, "
                   "sys.stderr; before = set(sys.modules); sys.path.insert(0, %r); "
                   "import minibottle; print(*sorted(set(sys.modules) - before), file=out)")
        for flags in (["-S"], ["-OO", "-S"]):
            done = subprocess.run(
                [sys.executable, "-W", "error", "-B", "-E", *flags, "-c",
                 program % os.path.dirname(FILE)],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            self.assertEqual((done.returncode, done.stderr), (0, b""))
            self.assertEqual(set(done.stdout.decode().split()) & set(HEAVY), set())

    def test_the_hello_world_of_the_docstring_runs(self):
        lines = minibottle.__doc__.split("\n")
        start = next(i for i, line in enumerate(lines) if line.startswith("    from minibottle"))
        end = next(i for i in range(start, len(lines)) if lines[i][:1] not in ("", " "))
        space = {}
        exec(textwrap.dedent("\n".join(lines[start:end])), space)
        answer = ask(space["app"], "/hello/Ada", headers={"User-Agent": "me"})
        self.assertEqual(answer.json, {"hello": "Ada", "agent": "me"})
        with mock.patch.object(minibottle, "run") as run:
            space["main"]()
        run.assert_called_once_with(space["app"], port=8080)

    def test_every_public_name_is_there_once(self):
        names = minibottle.__all__
        self.assertEqual([name for name in names if not hasattr(minibottle, name)], [])
        self.assertEqual(len(names), len(set(names)))


# === 22. Bottle's own tests, and plugins of others ============================

BOTTLE_TESTS = os.environ.get("BOTTLE_TESTS")    # the folder `test` of Bottle 0.13's source

# Runs them with minibottle.py as bottle.py; prints as JSON how many passed and which did not. What
# it adds are the leftovers of Python 2 and private names that the tests use: each only hands on to
# what does the work here. So the tests of Bottle's parser are answered by `request.POST`.
RUN_BOTTLE_TESTS = r"""
import contextvars, datetime, io, json, os, sys, types, unittest
import bottle
from bottle import FILTERS, FileUpload, Request, Router, Settings

def touni(text, encoding="utf8", errors="strict"):
    return text.decode(encoding, errors) if isinstance(text, bytes) else str(text or "")

class Part:
    charset = "utf8"

    def __init__(self, name, found):            # a field's text, or a file
        is_file = isinstance(found, FileUpload)
        self.name = name
        self.filename = found.filename if is_file else None
        self.content_type = found.content_type if is_file else None
        self.file = found.file if is_file else io.BytesIO(found.encode())
        self.raw = self.file.read()
        self.file.seek(0)
        self.close = self.file.close

    value = property(lambda self: self.raw.decode())

    def is_buffered(self):
        return type(self.file) is io.BytesIO

class MultipartParser:
    def __init__(self, source, boundary, content_length=-1, charset="utf8", buffer_size=None,
                 disk_limit=1 << 30, mem_limit=1 << 20, memfile_limit=1 << 18):
        self.request = Request({
            "wsgi.input": source, "CONTENT_LENGTH": str(len(source.getvalue())),
            "CONTENT_TYPE": f"multipart/form-data; boundary={boundary or ''}",
            "minibottle.settings": Settings(max_body=disk_limit, max_form_memory=mem_limit,
                                            spool_threshold=memfile_limit)})

    def parse(self):
        return [Part(*pair) for pair in self.request.POST.allitems()]

def parse_http_header(text):
    if not text.startswith("form-data"):
        return [bottle.parse_options(text)]
    return [("form-data", dict(zip(("name", "filename"), bottle.parse_disposition(text))))]

for name, value in {
        "tob": lambda text, encoding="utf8":
            text.encode(encoding) if isinstance(text, str) else bytes(text or b""),
        "touni": touni, "tonat": touni, "BytesIO": io.BytesIO, "json_dumps": json.dumps,
        "py3k": True, "unicode": str, "py": sys.version_info, "UTC": datetime.timezone.utc,
        "new_module": types.ModuleType, "_MultipartParser": MultipartParser,
        "_parse_http_header": parse_http_header,
        "_re_flatten": lambda pattern: FILTERS["re"](pattern)[0],
        **dict.fromkeys(("MakoTemplate", "mako_template", "mako_view"))}.items():
    if not hasattr(bottle, name):
        setattr(bottle, name, value)
Router._MAX_GROUPS_PER_PATTERN = 99             # Bottle's: the tests ask for some more routes

def run(test):
    bottle.request.bind()                       # some take for granted that there is one
    unittest.TestSuite([test]).run(result)

result = unittest.TestResult()
for name in sorted(os.listdir("test")):
    if name.startswith("test_") and name != "test_mako.py":     # there is no Mako here
        for tests in unittest.defaultTestLoader.loadTestsFromName("test." + name[:-3]):
            for test in tests:
                contextvars.copy_context().run(run, test)
bad = sorted({str(test.id()).split(" (")[0] for test, _ in result.failures + result.errors})
print(json.dumps([result.testsRun, len(result.skipped), bad]), file=sys.__stdout__)
"""

# What is not as there, and why; names as class.test.
LEFT_OUT = {
    "a private name, for which there is nothing here": """
        TestConfDict.test_gc_overlays TestHttpUtils.test_accept_header""",
    "the multipart parser looks for boundaries, and has no lines": """
        TestMultipartParser.test_fuzzy_lineiter TestMultipartParser.test_iterlines
        TestMultipartParser.test_iterlines_limit""",
    "a form's files may be larger than memory, all together too: they go to disk":
        "TestBrokenMultipart.test_mem_limit",
    "a file of a large form stays where it is, in the file of the whole body":
        "TestMultipartParser.test_big_file",
    "a Content-Length of a part means nothing (RFC 7578 4.8)":
        "TestBrokenMultipart.test_content_length_to_small",
    "a Location stays relative (RFC 9110 10.2.2)": """
        TestRedirect.test_absolute_path TestRedirect.test_host_http_1_0
        TestRedirect.test_host_http_1_1 TestRedirect.test_host_http_proxy
        TestRedirect.test_relative_path TestRedirect.test_sheme
        TestRedirect.test_specialchars TestWsgi.test_303""",
    "cookies join a redirect as it is applied, not as it is raised":
        "TestRedirect.test_redirect_preserve_cookies",
    "text is UTF-8 everywhere, as in Bottle 0.14": """
        TestRequest.test_get TestRequest.test_post TestFormsDict.test_attr_access
        TestFormsDict.test_attr_unicode_error TestFormsDict.test_decode_method""",
    "X-Forwarded-For is what a client says": """
        TestRequest.test_remote_addr TestRequest.test_remote_route""",
    "of two cookies of one name the first counts (RFC 6265 5.4)": "TestRequest.test_cookie_dict",
    "a signed cookie is JSON, no pickle, and so holds no bytes": """
        TestSignedCookiesWithPickle.testValid TestSignedCookiesWithPickle.testWrongKey""",
    "a reason phrase is ASCII: clients are to ignore it (RFC 9112 4)":
        "TestResponse.test_set_status",
    "environ holds text only (PEP 3333)": "TestWSGIHeaderDict.test_bytes",
    "no key makes environ read-only; Bottle itself never sets the one it has for that":
        "TestRequest.test_readonly_environ",
    "out of memory is an error of one request: 500, and the worker serves on":
        "TestAppException.test_memory_error",
    "a list is JSON, an empty one too": "TestOutputFilter.test_emptylist",
    "the 500 page has other words": """
        TestOutputFilter.test_illegal TestOutputFilter.test_invalid_generator_callback""",
    "a prefix without a slash is as good, and brings no DeprecationWarning":
        "TestAppMounting.test_no_slash_prefix",
}


@unittest.skipUnless(BOTTLE_TESTS, "needs BOTTLE_TESTS, the tests of Bottle's source distribution")
class BottlesOwnTest(unittest.TestCase):

    maxDiff = None

    def test_they_pass_but_for_a_list_with_reasons(self):
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(BOTTLE_TESTS, os.path.join(folder, "test"))
            shutil.copy(minibottle.__file__, os.path.join(folder, "bottle.py"))
            for name in minibottle.COMPANIONS:
                shutil.copy(companion_path(name), folder)
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", RUN_BOTTLE_TESTS], cwd=folder,
                env=make_environment(PYTHONPATH=ROOT), stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=6 * TIMEOUT, check=False)
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        count, skipped, bad = json.loads(done.stdout.splitlines()[-1])
        known = " ".join(LEFT_OUT.values()).split()
        self.assertEqual(sorted(name.split(".", 2)[2] for name in bad), sorted(known))
        self.assertGreaterEqual(count - skipped - len(bad), 324)  # 334 where jinja2 is


ALIAS = "import sys, minibottle\nminibottle.install_as_bottle()\n"

# Packages from PyPI that know Bottle only, and what an application does with them.
PLUGINS = {
    "bottle_sqlite": """
import bottle, bottle_sqlite, inspect
if not hasattr(inspect, 'getargspec'):      # which it asks for, and Python 3.11 has not
    inspect.getargspec = inspect.getfullargspec
app = bottle.Bottle()
app.install(bottle_sqlite.Plugin(dbfile=sys.argv[1] + '/notes.db'))
@app.get('/make')
def make(db):
    db.execute('create table note (id integer, text text)')
@app.get('/add/<id:int>/<text>')
def add(id, text, db):
    db.execute('insert into note values (?, ?)', (id, text))
    if text == 'bad':
        raise bottle.HTTPError(500, 'rolled back')
    return 'added'
@app.get('/note/<id:int>')
def note(id, db):
    row = db.execute('select text from note where id = ?', (id,)).fetchone()
    return row['text'] if row else bottle.HTTPError(404, 'none')
@app.get('/plain')
def plain():
    return 'no db'
ask('/make', '/add/1/one', '/add/2/bad', '/note/1', '/note/2', '/plain')
""",
    "bottle_sqlalchemy": """
import bottle, bottle_sqlalchemy, sqlalchemy
from sqlalchemy.orm import declarative_base
Base = declarative_base()
class Note(Base):
    __tablename__ = 'note'
    id = sqlalchemy.Column(sqlalchemy.Integer, primary_key=True)
    text = sqlalchemy.Column(sqlalchemy.String(50))
engine = sqlalchemy.create_engine('sqlite:///' + sys.argv[1] + '/alchemy.db')
app = bottle.Bottle()
app.install(bottle_sqlalchemy.Plugin(engine, Base.metadata, keyword='db', create=True))
@app.get('/add/<text>')
def add(text, db):
    db.add(Note(text=text))
    if text == 'bad':
        raise bottle.HTTPError(500, 'rolled back')
    return 'added'
@app.get('/count')
def count(db):
    return str(db.query(Note).count())
@app.get('/own', sqlalchemy={'keyword': 'session'})
def own(session):
    return str(session.query(Note).count())
ask('/add/one', '/add/bad', '/count', '/own')
""",
    "bottle_cors_plugin": """
import bottle
from bottle_cors_plugin import cors_plugin
app = bottle.app()
app.install(cors_plugin(['https://a.example', 'https://b.example']))
@bottle.get('/data')
def data():
    return {'a': 1}
ask('/data', Origin='https://b.example')
print(ask('/data', Origin='https://b.example').headers['Access-Control-Allow-Origin'])
print(client.request('OPTIONS', '/data', headers={'Origin': 'https://x.example'})
      .headers['Access-Control-Allow-Origin'])
""",
    "bottle_beaker": """
import bottle
from beaker.middleware import SessionMiddleware
from bottle import request
app = bottle.Bottle()
@app.get('/count')
def count():
    session = request.environ['beaker.session']
    session['n'] = session.get('n', 0) + 1
    session.save()
    return str(session['n'])
app.wsgi = SessionMiddleware(app.wsgi, {'session.type': 'memory', 'session.auto': True})
ask('/count', '/count', '/count')
""",
    "boddle": """
import bottle
from boddle import boddle
@bottle.post('/woot')
def woot():
    return bottle.request.params['name'] + bottle.request.get_header('X-A')
with boddle(params={'name': 'derek'}, headers={'X-A': '!'}):
    print(woot())
with boddle(json={'a': [1]}, query={'q': 'x y'}, path='/p', method='PUT', auth=('u', 'p')):
    print(bottle.request.json, bottle.request.query.q, bottle.request.path,
          bottle.request.method, bottle.request.auth)
""",
    "webtest": """
import bottle, webtest
app = bottle.Bottle()
@app.route('/form', method=['GET', 'POST'])
def form():
    if bottle.request.method == 'GET':
        return '<form method=post enctype=multipart/form-data><input name=who value="J\\xf6rg">' \\
               '<input type=file name=up></form>'
    up = bottle.request.files.up
    bottle.response.set_cookie('seen', 'yes')
    return bottle.request.forms.who, ' ', up.filename, ' ', str(len(up.file.read()))
test = webtest.TestApp(app)
page = test.get('/form')
page.form['up'] = webtest.Upload('a b.txt', bytes(1000))
print(page.form.submit().text, test.cookies)
print(test.get('/none', status=404).status)
""",
    "sentry_sdk": """
import bottle, http.client, sentry_sdk, sentry_sdk.transport
from sentry_sdk.integrations.bottle import BottleIntegration
class Printer(sentry_sdk.transport.Transport):
    def capture_envelope(self, envelope):
        for item in envelope.items:
            print(item.type, item.payload.json['transaction'], flush=True)
sentry_sdk.init(dsn='http://a@localhost/1', transport=Printer, traces_sample_rate=1,
                integrations=[BottleIntegration(transaction_style='url')])
app = bottle.Bottle()
app.route('/hello/<name>', callback=lambda name: name)
app.route('/fail/<name>', callback=lambda name: 1 // 0)
with minibottle.Server(app, port=0) as server:
    for path in ('/hello/1', '/fail/1'):
        connection = http.client.HTTPConnection('127.0.0.1', server.port)
        connection.request('GET', path)
        print(connection.getresponse().status, flush=True)
        connection.close()
""",
}
ASK = """
def ask(*paths, **headers):
    for path in paths:
        answer = client.get(path, headers=headers)
        print(answer.status_code, answer.text if answer.status_code == 200 else '')
    return answer
class Client:
    def __getattr__(self, name):
        made = globals()['client'] = minibottle.TestClient(globals()['app'])
        return getattr(made, name)
client = Client()
"""
SAID = {
    "bottle_sqlite": "200 \n200 added\n500 \n200 one\n404 \n200 no db\n",
    "bottle_sqlalchemy": "200 added\n500 \n200 1\n200 1\n",
    "bottle_cors_plugin": '200 {"a": 1}\n200 {"a": 1}\nhttps://b.example\nhttps://a.example\n',
    "bottle_beaker": "200 1\n200 2\n200 3\n",
    "boddle": "derek!\n{'a': [1]} x y /p PUT ('u', 'p')\n",
    "sentry_sdk": "transaction /hello/<name>\n200\nevent /fail/<name>\n"
                  "transaction /fail/<name>\n500\n",
    "webtest": "J\xf6rg a-b.txt 1000 {'seen': 'yes'}\n404 Not Found\n",
}


class PluginsTest(PooledTest):

    def check_plugin(self, name):
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", ALIAS + ASK + PLUGINS[name], folder],
                env=make_environment(PYTHONPATH=ROOT, PYTHONIOENCODING="utf-8"),
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                timeout=TIMEOUT, check=False)
        self.assertEqual(done.stdout.decode("utf-8"), SAID[name], done.stderr.decode())

    @needs("bottle_sqlite")
    def test_sqlite(self):
        self.check_plugin("bottle_sqlite")

    @needs("bottle_sqlalchemy")
    def test_sqlalchemy(self):
        self.check_plugin("bottle_sqlalchemy")

    @needs("bottle_cors_plugin")
    def test_cors(self):
        self.check_plugin("bottle_cors_plugin")

    @needs("beaker")
    def test_sessions_of_beaker(self):
        self.check_plugin("bottle_beaker")

    @needs("boddle")
    def test_boddle(self):
        self.check_plugin("boddle")

    @needs("sentry_sdk")
    def test_sentry(self):
        self.check_plugin("sentry_sdk")

    @needs("webtest")
    def test_webtest(self):
        self.check_plugin("webtest")


if __name__ == "__main__":
    serve_application() if sys.argv[1:2] == ["serve"] else unittest.main()
