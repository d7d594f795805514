"""What the server does, as figures: one JSON object for all workers.

A file to lay beside minibottle.py (with minibottle_proxies.py), where it is minibottle.status. The
server answers at the path it is told:

    $ python minibottle.py app:main --workers 2 --status /status
    $ curl http://127.0.0.1:8080/status
    {"requests": 7, "responses": {"2xx": 6, "5xx": 1, …}, "workers": [{"pid": 71, …}, …], …}

/status?ready answers 200, or 503 while the worker that is asked ends. Who may ask sits at this
machine; a proxy that stands here counts as its clients do, if it is one of --trusted-proxies, and
else as a stranger. For others have a route of your own, with your own lock on it:

    from minibottle.status import read_status

    @app.get("/figures", apply=auth_basic(is_admin))
    def figures():
        return read_status()

The figures lie in memory that the workers share, a row for each. A worker that takes another's
place takes its row and counts on. dashboard.py draws them.
"""

from __future__ import annotations

import _thread
import os
import time
from bisect import bisect_left
from typing import Any, Callable, Dict, Iterable, Iterator, List

from . import FIGURES, json_dumps, monotonic
from .proxies import is_local

COLUMNS = (
    "pid starts began draining connections threads busy_threads waiting memory "  # of a worker
    "hand_overs requests aborted bytes seconds 1xx 2xx 3xx 4xx 5xx").split()      # counted on
COUNTS = COLUMNS[COLUMNS.index("hand_overs"):COLUMNS.index("1xx")]
CLASSES = COLUMNS[COLUMNS.index("1xx"):]
AT = {name: i for i, name in enumerate(COLUMNS)}
BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # seconds; the last has all others
REQUESTS, BYTES, SECONDS = AT["requests"], AT["bytes"], AT["seconds"]
FIRST_CLASS, FIRST_BUCKET = AT["1xx"], len(COLUMNS)
ROW = 32              # numbers of a worker: those above and one for each bucket fit
SHOW_SECONDS = 0.5    # a busy worker shows what it is like no more often


def install(worker: Any) -> None:
    """The server calls it where the setting is given."""
    worker.__class__ = type("RecordedWorker", (Recorded, type(worker)), {})
    worker.figures_lock = _thread.allocate_lock()  # requests end in any thread
    worker.figures_at = 0.0
    worker.recorded_app, worker.app = worker.app, worker.answer_status
    # It calls log_access() for each request; where there was no access log, loggers alone have it.
    worker.prints_lines, worker.logs = worker.logs, True
    if not worker.prints_lines:
        worker.log_lines = type(worker.log_lines)(maxlen=0)


class Recorded:
    """A worker that writes its row. It has one with its first heartbeat, before it serves."""

    figures_row = 0  # where it begins in FIGURES
    access_log: Any
    figures_lock: Any
    prints_lines: bool
    figures_at: float

    def on_heartbeat(self, now: float) -> None:
        super().on_heartbeat(now)  # type: ignore[misc]
        self.figures_row = ROW * getattr(self, "slot", 0)
        if FIGURES[self.figures_row + AT["pid"]] != os.getpid():
            FIGURES[self.figures_row + AT["pid"]] = os.getpid()
            FIGURES[self.figures_row + AT["starts"]] += 1
            FIGURES[self.figures_row + AT["began"]] = time.time()
        self.show_figures()

    def show_figures(self) -> None:
        """What changes without being counted."""
        worker: Any = self
        for name, number in (
                ("draining", bool(worker.draining)), ("connections", len(worker.connections)),
                ("threads", len(worker.hands)), ("waiting", len(worker.waiting)),
                ("busy_threads", sum(1 for hand in worker.hands if hand.since)),
                ("memory", resident_bytes())):
            FIGURES[self.figures_row + AT[name]] = number

    def count_figure(self, name: str, number: float = 1.0) -> None:
        with self.figures_lock:
            FIGURES[self.figures_row + AT[name]] += number

    def log_access(self, x: Any) -> None:
        if self.prints_lines or self.access_log.handlers:
            super().log_access(x)  # type: ignore[misc]
        now = monotonic()
        seconds = now - getattr(x, "began", now)
        answer, first = FIRST_CLASS + min(int(x.status[0]), 5) - 1, self.figures_row
        bucket = FIRST_BUCKET + bisect_left(BUCKETS, seconds)
        with self.figures_lock:
            FIGURES[first + REQUESTS] += 1.0
            FIGURES[first + BYTES] += x.sent
            FIGURES[first + SECONDS] += seconds
            FIGURES[first + answer] += 1.0
            FIGURES[first + bucket] += 1.0
        if now > self.figures_at:
            self.figures_at = now + SHOW_SECONDS
            self.show_figures()

    def abort(self, x: Any, me: Any) -> None:
        self.count_figure("aborted")
        super().abort(x, me)  # type: ignore[misc]

    def hand_over(self) -> bool:
        done = super().hand_over()  # type: ignore[misc]
        self.count_figure("hand_overs", done)
        return done

    def shut_down(self) -> None:
        super().shut_down()  # type: ignore[misc]
        FIGURES[self.figures_row + AT["pid"]] = 0

    def answer_status(self, environ: Dict[str, Any], start_response: Callable) -> Iterable[bytes]:
        """The application, and before it the answer at the path of the setting."""
        worker: Any = self
        if environ["PATH_INFO"] != worker.settings.status:
            return worker.recorded_app(environ, start_response)
        self.show_figures()
        status, data = "200 OK", read_status()
        if not is_local(environ):
            status, data = "403 Forbidden", {"error": "these figures are for this machine alone"}
        elif environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            status, data = "405 Method Not Allowed", {"error": "GET has them"}
        elif environ["QUERY_STRING"] == "ready":
            status = "503 Service Unavailable" if worker.draining else "200 OK"
            data = {"ready": not worker.draining}
        start_response(status, [("Content-Type", "application/json"), ("Allow", "GET, HEAD"),
                                ("Cache-Control", "no-store")])
        return [json_dumps(data).encode("ascii") + b"\n"]


def read_status() -> Dict[str, Any]:
    """The figures of all workers; of the latency {seconds: how many requests took no longer}."""
    rows = list(iter_rows())
    totals = [sum(column) for column in zip(*rows)] or [0.0] * ROW
    below, buckets = 0, {}
    for i, seconds in enumerate([*map(str, BUCKETS), "inf"]):
        below += int(totals[FIRST_BUCKET + i])
        buckets[seconds] = below
    workers = [describe_worker(row) for row in rows if is_running(int(row[AT["pid"]]))]
    return {**{name: number_of(totals[AT[name]]) for name in COUNTS},
            "responses": {name: int(totals[AT[name]]) for name in CLASSES},
            "latency": buckets, "starts": int(totals[AT["starts"]]), "workers": workers}


def iter_rows() -> Iterator[List[float]]:
    """Those that are or were used: they are taken from the first on."""
    for start in range(0, len(FIGURES), ROW):
        row = FIGURES[start:start + ROW].tolist()
        if not row[AT["starts"]]:
            return
        yield row


def describe_worker(row: List[float]) -> Dict[str, Any]:
    shown = {name: int(row[AT[name]]) for name in (
        "pid", "connections", "threads", "busy_threads", "waiting", "memory")}
    return {**shown, "draining": bool(row[AT["draining"]]), "restarts": int(row[AT["starts"]]) - 1,
            "uptime": round(time.time() - row[AT["began"]], 1)}


def number_of(number: float) -> float:
    """3.0 -> 3."""
    return int(number) if number.is_integer() else round(number, 6)


def is_running(pid: int) -> bool:
    """A worker that was killed could not say so."""
    try:
        return pid == os.getpid() or pid != 0 and os.kill(pid, 0) is None
    except OSError:
        return False


def resident_bytes() -> int:
    """The memory of this process; where the system has no /proc, the most that it has had."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        try:
            import resource
        except ImportError:  # Windows
            return 0
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
