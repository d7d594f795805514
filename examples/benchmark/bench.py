"""Measure minibottle beside its peers: same machine, same run, one worker on one core.

    apt install wrk gcc libev-dev      # Debian and its like; the last two build bjoern
    pip install bottle gunicorn waitress bjoern granian tornado starlette uvicorn[standard]
    python examples/benchmark/bench.py [SCENARIO ...] [--seconds 3] [--rounds 1] [--servers a,b]

Peers that are not installed are skipped. Without a SCENARIO all of them run, in some five minutes:

    hello      requests/s of hello world
    headers    the same with a browser's nine headers, one of them unique per request
    sleep      fast requests while 16 connections hammer a handler that sleeps 100 ms
    cpu        fast requests while 2 connections burn 20 ms of processor time per request
    await      requests/s of 1,000 connections to a coroutine that sleeps 100 ms: 10,000 at most
    idle       memory for each of 5,000 idle keep-alive connections; wake-ups of the idle worker
    inprocess  one call of the application, without a server
    forms      the same for what people send and are sent; then an upload of 100 MB
    routes     what many dynamic routes cost
    import     memory and time of the import, from its .pyc

COMPARE RATIOS OF ONE RUN ONLY: the figures mean nothing beside those of another machine, day or
load. On a machine that does other work too, `--rounds 3` takes each server's best of three, in
turns; see how far the ratios move from run to run. The ratio is minibottle's figure in the first
column divided by the row's: for rates more is better, for time and memory less. Servers run on
the first core, wrk with 64 connections on the last; access logs are off; each server's answer is
checked before it is measured; peers have the number of threads that suits them best. `bare` is
no server: it sends canned bytes and is the ceiling. Linux only.
"""
import argparse
import contextlib
import http.client
import importlib
import importlib.util
import io
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import timeit

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
BODY = b"Hello World!"
IDLE_CONNECTIONS = 5000
IDLE_SECONDS = 10  # how long wake-ups are counted

MINIBOTTLE = "{root}/minibottle.py --bind {bind} --workers 1 --no-access-log "
SERVERS = {  # name: (modules that it needs, what follows `python`)
    "minibottle": ("minibottle", MINIBOTTLE + "apps:minibottle_app"),
    "minibottle-wsgi": ("minibottle", MINIBOTTLE + "apps:raw_app"),
    "minibottle-async": ("minibottle", MINIBOTTLE + "apps:minibottle_async_app"),
    "gunicorn": ("bottle gunicorn", (
        "-m gunicorn --bind {bind} --workers 1 --worker-class gthread --threads 32"
        " --worker-connections 10000 --keep-alive 75 apps:bottle_app()")),
    "waitress": ("bottle waitress", (
        "-m waitress --listen {bind} --threads {threads} --connection-limit 10000"
        " --asyncore-use-poll --call apps:bottle_app")),
    "bjoern": ("bottle bjoern", "apps.py bjoern {port}"),
    "granian": ("bottle granian", (
        "-m granian --interface wsgi --port {port} --workers 1 --blocking-threads {threads}"
        " --backlog 10000 --no-access-log --factory apps:bottle_app")),
    "tornado": ("tornado", "apps.py tornado {port}"),
    "uvicorn": ("starlette uvicorn", (
        "-m uvicorn --port {port} --no-access-log --timeout-keep-alive 75"
        " --factory apps:starlette_app")),
    "bare": ("", "bare.py {port}"),
}
ASYNC = ["minibottle-async", "tornado", "uvicorn"]
THREADED = ["minibottle", "minibottle-wsgi", "gunicorn", "waitress", "granian"]


# -- servers --

class ServerFailed(Exception):
    """A server cannot be measured; the message says why."""


def connect(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.connect()
    connection.auto_open = False  # if the server closes it, that is an error
    return connection


def check_answer(connection):
    connection.request("GET", "/")
    answer = connection.getresponse()
    body = answer.read()
    if (answer.status, body) != (200, BODY):
        raise ServerFailed(f"answers {answer.status} {body[:40]!r}")


def wait_until_right(process, port, log):
    """Return once the server has given the right answer; raise ServerFailed if it does not."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(ConnectionRefusedError), contextlib.closing(connect(port)) as conn:
            return check_answer(conn)
        time.sleep(0.05)
    log.seek(0)
    raise ServerFailed("did not start: " + log.read().decode().strip().split("\n")[-1])


@contextlib.contextmanager
def running(name, cpu, threads):
    """Run a server on that core, give its (pid, port) once it answers, and end it in any case."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    arguments = [part.format(root=ROOT, bind=f"127.0.0.1:{port}", port=port, threads=threads)
                 for part in SERVERS[name][1].split()]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(["taskset", "-c", str(cpu), sys.executable, *arguments],
                                   cwd=HERE, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_until_right(process, port, log)
            yield process.pid, port
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it left in the session made for it
            process.wait()


def measure_servers(options, measure, names=SERVERS, threads=4, rounds=1):
    """{name: its best measure(pid, port)} of those that run; a line for each of the others."""
    results, failures = {}, {}
    for name in [*(options.servers or names)] * rounds:
        missing = [module for module in SERVERS[name][0].split()
                   if importlib.util.find_spec(module) is None]
        try:
            if missing:
                raise ServerFailed("not installed: " + ", ".join(missing))
            with running(name, options.cpu, threads) as (pid, port):
                result = measure(pid, port)
            results[name] = max(results.get(name, result), result, key=lambda r: r.get("rate", 0))
        except (ServerFailed, OSError, http.client.HTTPException) as error:
            failures[name] = str(error) or type(error).__name__
    for name, error in failures.items():
        print(f"  ({name} skipped: {error})")
    return results


# -- under load --

def start_wrk(port, seconds, path="/", connections=64, script=()):
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "--latency",
               *script, f"http://127.0.0.1:{port}{path}"]
    return subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, universal_newlines=True)


def read_wrk(process):
    """Wait for wrk; {"rate": requests/s, "p99": milliseconds, "errors": failed requests}."""
    try:
        text = process.communicate()[0]
    finally:
        process.kill()
    if process.wait() != 0:
        raise ServerFailed("wrk cannot reach it")
    value, unit = re.search(r"99%\s+([\d.]+)(us|ms|s)", text).groups()
    errors = " ".join(re.findall(r"(?:Socket errors|Non-2xx[^:]*):(.*)", text))
    return {"rate": float(re.search(r"Requests/sec:\s+([\d.]+)", text)[1]),
            "p99": float(value) * {"us": 0.001, "ms": 1, "s": 1000}[unit],
            "errors": sum(map(int, re.findall(r"\d+", errors)))}


RATE = [("rate", "requests/s", ",.0f"), ("p99", "p99 ms", ".2f"), ("errors", "errors", "d")]


def run_hello(options, *script):
    def measure(pid, port):
        read_wrk(start_wrk(port, 1, script=script))  # warm up
        return read_wrk(start_wrk(port, options.seconds, script=script))

    return RATE, measure_servers(options, measure, rounds=options.rounds)


def run_beside(options, path, connections):
    """Fast requests while so many connections ask for a slow path all the time."""
    def measure(pid, port):
        slow = start_wrk(port, options.seconds + 2, path, connections)
        try:
            read_wrk(start_wrk(port, 1))  # warm up
            fast = read_wrk(start_wrk(port, options.seconds))
        finally:
            others = read_wrk(slow)
        return dict(fast, slow=others["rate"], errors=fast["errors"] + others["errors"])

    return ([*RATE, ("slow", "slow requests/s", ".1f")],
            measure_servers(options, measure, THREADED, 32, options.rounds))


def run_await(options):
    def measure(pid, port):
        return read_wrk(start_wrk(port, options.seconds + 2, "/await", 1000))

    return RATE, measure_servers(options, measure, ASYNC, rounds=options.rounds)


# -- idle connections --

def read_words(path):
    with open(path) as file:
        return file.read().split()


def list_tasks(pid):
    return [f"/proc/{pid}/task/{task}" for task in os.listdir(f"/proc/{pid}/task")]


def list_family(pid):
    """[(pid, its children), ...] of the process and of all its descendants."""
    children = [child for task in list_tasks(pid) for child in read_words(task + "/children")]
    return [(pid, children), *(member for child in children for member in list_family(child))]


def count_memory(pid):
    pages = sum(int(read_words(f"/proc/{member}/statm")[1]) for member, _ in list_family(pid))
    return pages * os.sysconf("SC_PAGE_SIZE")


def count_wakeups(pid):
    """{thread: how often it has gone to sleep so far} of the workers, who have no children."""
    statuses = {task: read_words(task + "/status") for member, children in list_family(pid)
                if not children for task in list_tasks(member)}
    return {task: int(words[words.index("voluntary_ctxt_switches:") + 1])
            for task, words in statuses.items()}


def measure_idle(pid, port):
    with contextlib.ExitStack() as stack:
        def open_connections(count):
            for _ in range(count):
                connections.append(stack.enter_context(contextlib.closing(connect(port))))
                check_answer(connections[-1])

        connections = []
        open_connections(200)  # what the first ones cost is the server's own
        memory = count_memory(pid)
        open_connections(IDLE_CONNECTIONS)
        memory = count_memory(pid) - memory
        before = count_wakeups(pid)
        time.sleep(IDLE_SECONDS)
        wakeups = sum(n - before.get(task, 0) for task, n in count_wakeups(pid).items())
        for connection in connections:
            check_answer(connection)  # it has lived all the time
    return {"bytes": memory / IDLE_CONNECTIONS, "wakeups": wakeups / IDLE_SECONDS}


def run_idle(options):
    """Without waitress, which polls all connections anew for each request: minutes for 5,000."""
    import resource
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))  # the servers inherit it
    names = [name for name in SERVERS if name != "waitress"]
    return ([("bytes", "bytes each", ",.0f"), ("wakeups", "wake-ups/s", ".1f")],
            measure_servers(options, measure_idle, names))


# -- in process --

def import_libraries():
    """{name: module} of minibottle and Bottle, both of which call their application Bottle."""
    modules = {}
    for name in ("minibottle", "bottle"):
        try:
            modules[name] = importlib.import_module(name)
        except Exception as error:  # whatever is wrong with one, the other is measured
            print(f"  ({name} skipped: {error})")
    return modules


def time_call(app, path="/", expected=BODY, status="200 OK", body=b"", number=5000, **more):
    """Microseconds of one call with a fresh environ, as servers make; the best of nine rounds."""
    environ = {"REQUEST_METHOD": "GET", "SCRIPT_NAME": "", "PATH_INFO": path, "QUERY_STRING": "",
               "SERVER_NAME": "localhost", "SERVER_PORT": "80", "wsgi.url_scheme": "http",
               "CONTENT_LENGTH": str(len(body)), **more}
    statuses = set()

    def start_response(status, headers, exc_info=None):
        statuses.add(status)

    def call():
        return b"".join(app({**environ, "wsgi.input": io.BytesIO(body)}, start_response))

    if expected not in call() or statuses != {status}:
        raise ValueError(f"{path} answers {statuses}")
    return min(timeit.repeat(call, number=number, repeat=9, timer=time.process_time)) / number * 1e6


def run_inprocess(options):
    results = {}
    for name, module in import_libraries().items():
        app = module.Bottle()
        app.route("/", callback=lambda: "Hello World!")
        results[name] = {"us": time_call(app)}
    return [("us", "us a call", ".2f")], results


FORM_TYPE = "multipart/form-data; boundary=----WebKitFormBoundaryAbCdEfGh01234567"
BEFORE_PART = b"------WebKitFormBoundaryAbCdEfGh01234567\r\nContent-Disposition: form-data; "
UPLOAD = (BEFORE_PART + b'name="a"\r\n\r\nx\r\n' + BEFORE_PART + b'name="f"; filename="f"\r\n\r\n',
          b"\r\n------WebKitFormBoundaryAbCdEfGh01234567--\r\n")
POSTS = {  # name: what time_call gets; each handler below has its name
    "query": {"QUERY_STRING": "a=x&b=2"},
    "form": {"body": b"a=x&b=2", "CONTENT_TYPE": "application/x-www-form-urlencoded"},
    "multipart": {"body": (b"x" * 1000).join(UPLOAD), "CONTENT_TYPE": FORM_TYPE},
    "json_in": {"body": b'{"a": "x", "b": [1, 2, 3]}', "CONTENT_TYPE": "application/json"},
    "json_out": {"expected": b'"a"'},
    "template": {"expected": b"<li>&lt;9&gt;"},
    "missing": {"expected": b"missing", "status": "404 Not Found"},
}


def make_desk(module):
    """An application of that library, with a handler for each of POSTS."""
    app, request = module.Bottle(), module.request
    page = module.SimpleTemplate("% for i in items:\n<li>{{i}}</li>\n% end\n")
    items = [f"<{i}>" for i in range(10)]
    app.post("/query", callback=lambda: BODY if request.query.a == "x" else b"")
    app.post("/form", callback=lambda: BODY if request.forms.a == "x" else b"")
    app.post("/multipart", callback=lambda: (
        BODY if request.forms.a == "x" and request.files.f else b""))
    app.post("/json_in", callback=lambda: BODY if request.json["a"] == "x" else b"")
    app.post("/json_out", callback=lambda: {"a": 1, "b": ["x", "y"]})
    app.post("/template", callback=lambda: page.render(items=items))
    return app


def time_upload(module, size=100 << 20):
    """Milliseconds until `request.files` has it, from a file as from a socket; the best of five."""
    times = []
    with tempfile.TemporaryFile() as source:
        source.write(UPLOAD[0])
        for _ in range(size >> 20):
            source.write(os.urandom(1 << 20))
        source.write(UPLOAD[1])
        for _ in range(5):
            environ = {"REQUEST_METHOD": "POST", "CONTENT_TYPE": FORM_TYPE, "wsgi.input": source,
                       "CONTENT_LENGTH": str(source.tell())}
            source.seek(0)
            start = time.perf_counter()
            file = module.BaseRequest(environ).files["f"].file
            times.append(time.perf_counter() - start)
            if file.seek(0, os.SEEK_END) != size:
                raise ValueError("the upload is not whole")
    return min(times) * 1e3


def run_forms(options):
    modules = import_libraries()
    results = {name: {} for name in [*POSTS, "100 MB upload"]}
    for library, module in modules.items():
        app = make_desk(module)
        for name, more in POSTS.items():
            results[name][library] = time_call(app, "/" + name, number=1000,
                                               REQUEST_METHOD="POST", **more)
        results["100 MB upload"][library] = time_upload(module) * 1e3
    return [(library, "us " + library, ",.1f") for library in reversed([*modules])], results


def add_routes(app, numbers):
    for i in numbers:
        app.route(f"/path{i}/<name>", callback=lambda name: BODY)


def run_routes(options):
    """Bottle gets 2,000: it compiles many anew for each one added, and 10,000 take two minutes."""
    results = {}
    for name, module in import_libraries().items():
        count = 2000 if name == "bottle" else 10000
        few, many = module.Bottle(), module.Bottle()
        add_routes(few, range(10))
        start = time.perf_counter()
        add_routes(many, range(2000))
        seconds = time.perf_counter() - start
        add_routes(many, range(2000, count))
        first, last = time_call(few, "/path9/x"), time_call(many, f"/path{count - 1}/x")
        results[name] = {"few": first, "many": last, "count": count, "factor": last / first,
                         "add": seconds * 1e3}
    return [("many", "us, the last", ".2f"), ("count", "of", ",d"),
            ("few", "us, last of 10", ".2f"), ("factor", "factor", ".2f"),
            ("add", "ms to add 2,000", ",.1f")], results


MEASURE_IMPORT = """
import os, time
def count_memory():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
memory, start = count_memory(), time.perf_counter()
import NAME
print(count_memory() - memory, time.perf_counter() - start)
"""


def run_import(options):
    results = {}
    with tempfile.TemporaryDirectory() as cache:
        env = dict(os.environ, PYTHONPATH=ROOT, PYTHONPYCACHEPREFIX=cache,
                   PYTHONDONTWRITEBYTECODE="")
        for name in import_libraries():
            command = [sys.executable, "-c", MEASURE_IMPORT.replace("NAME", name)]
            outputs = [subprocess.check_output(command, env=env).split() for _ in range(12)]
            memory, seconds = zip(*(map(float, output) for output in outputs[1:]))
            results[name] = {"kb": statistics.median(memory) / 1024, "ms": min(seconds) * 1e3}
    return [("kb", "KB", ",.0f"), ("ms", "ms, the best", ".1f")], results


# -- the driver --

SCENARIOS = {  # name: function(options) -> (columns, {server: {key: figure}})
    "hello": run_hello,
    "headers": lambda options: run_hello(options, "-s", "headers.lua"),
    "sleep": lambda options: run_beside(options, "/sleep", 16),
    "cpu": lambda options: run_beside(options, "/cpu", 2),
    "await": run_await,
    "idle": run_idle,
    "inprocess": run_inprocess,
    "forms": run_forms,
    "routes": run_routes,
    "import": run_import,
}


def print_table(columns, results):
    """Print {name: {key: figure}} by columns of (key, heading, format); the first has the ratio."""
    key = columns[0][0]
    ours = (results.get("minibottle") or results.get("minibottle-async") or {}).get(key)
    rows = [["", *(heading for _, heading, _ in columns), "ratio"]]
    for name, result in results.items():
        mine = ours or result.get("minibottle")
        ratio = f"{mine / result[key]:.2f}" if mine and result[key] else "-"
        rows.append([name, *(format(result[key], form) for key, _, form in columns), ratio])
    for row in rows:
        print(f"  {row[0]:15}", *(f"{cell:>{max(len(heading), 7) + 1}}"
                                  for cell, heading in zip(row[1:], rows[0][1:])))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=", ".join(SCENARIOS))
    parser.add_argument("--seconds", type=int, default=3, help="of each run of wrk (default: 3)")
    parser.add_argument("--rounds", type=int, default=1, help="best of so many (default: 1)")
    parser.add_argument("--servers", type=lambda text: text.split(","), help=", ".join(SERVERS))
    options = parser.parse_intermixed_args()
    unknown = {*options.scenarios} - {*SCENARIOS} | {*(options.servers or ())} - {*SERVERS}
    if unknown:
        parser.error("unknown: " + ", ".join(sorted(unknown)))
    if not (shutil.which("wrk") and shutil.which("taskset")):
        parser.error("wrk and taskset (in util-linux) must be installed")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # so that servers end, too
    sys.path.insert(0, ROOT)
    cpus = sorted(os.sched_getaffinity(0))
    options.cpu = cpus[0]
    os.sched_setaffinity(0, cpus[-1:])  # wrk inherits it
    print(f"Python {platform.python_version()}, {len(cpus)} core(s), load {os.getloadavg()[0]:.1f};"
          " compare ratios of this run only")
    for name in options.scenarios or SCENARIOS:
        print("\n" + re.search(f"^    ({name} .*)$", __doc__, re.MULTILINE)[1], flush=True)
        print_table(*SCENARIOS[name](options))


if __name__ == "__main__":
    main()
