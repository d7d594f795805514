"""Tests of the examples, and of App and Server with other people's servers, clients and programs.

To be merged into test_minibottle.py. By itself: MINIBOTTLE_ROOT=PROJECT python test_examples.py
"""

import contextlib
import http.client
import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socketserver
import subprocess
import sys
import tempfile
import threading
import unittest
import wsgiref.simple_server
import wsgiref.validate
from urllib.parse import urljoin, urlsplit

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.environ.get("MINIBOTTLE_ROOT", HERE)      # merged: HERE is the root
sys.path.insert(0, ROOT)

from minibottle import App, Server, TestClient, abort, redirect, request, response  # noqa: E402

TIMEOUT = 30 * float(os.environ.get("MINIBOTTLE_SLOW", "1"))   # seconds; only a hang comes near it


# === 0. Helpers ===============================================================

def needs(*modules):
    """Skip a test or a class, by name, where one of these optional modules is missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return unittest.skipIf(missing, "needs " + " and ".join(missing))


def find_browser():
    """Path of a Chromium or Chrome, or None."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next(filter(None, map(shutil.which, names)), None)


CURL = shutil.which("curl")
BROWSER = find_browser()


def fetch(url, path="/", method="GET", body=None, headers=None):
    """Status, headers and body of one request on a connection of its own."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


class Command:
    """A server run as `python ARGS` from the root: its `url`, `lines` of stderr, exit `status`."""

    def __init__(self, *args, **env):
        self.args = args
        self.env = dict(os.environ, PYTHONUNBUFFERED="1", **env)
        self.lines = []
        self.url = None
        self.status = None
        self.settled = threading.Event()        # an address was seen, or stderr has ended

    def __enter__(self):
        self.process = subprocess.Popen(
            [sys.executable, *self.args], cwd=ROOT, env=self.env, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            universal_newlines=True)
        self.reader = threading.Thread(target=self.read_lines)
        self.reader.start()
        if self.settled.wait(TIMEOUT) and self.url:
            return self
        self.stop(signal.SIGKILL)
        raise AssertionError("no address from {}:\n{}".format(self.args, "".join(self.lines)))

    def read_lines(self):
        for line in self.process.stderr:
            self.lines.append(line)
            match = re.search(r"http://127\.0\.0\.1:\d+", line)
            if match and self.url is None:
                self.url = match.group()
                self.settled.set()
        self.settled.set()

    def stop(self, signum=signal.SIGTERM):
        """Send the signal, wait for the end, and leave nothing of its process group behind."""
        if self.status is not None:
            return
        self.process.send_signal(signum)
        try:
            self.status = self.process.wait(TIMEOUT)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.reader.join()
            self.process.stderr.close()

    def __exit__(self, *exc_info):
        self.stop()


class QuietHandler(wsgiref.simple_server.WSGIRequestHandler):

    def log_message(self, *args):
        pass


class ThreadingServer(socketserver.ThreadingMixIn, wsgiref.simple_server.WSGIServer):
    daemon_threads = False


@contextlib.contextmanager
def serve_wsgiref(app):
    """Run `app`, watched by the validator, on the standard library's server; gives its URL."""
    server = wsgiref.simple_server.make_server(
        "127.0.0.1", 0, wsgiref.validate.validator(app), ThreadingServer, QuietHandler)
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
def serve_command(*args, **env):
    """Run a server as a command; gives its URL."""
    with Command(*args, **env) as command:
        yield command.url


@contextlib.contextmanager
def serve_gunicorn(target):
    """Run `module:call()` under gunicorn, whose control socket stays out of the home directory."""
    with tempfile.TemporaryDirectory() as directory:
        with serve_command("-m", "gunicorn", "--bind=127.0.0.1:0", "--threads=2", target,
                           PYTHONPATH=HERE, XDG_RUNTIME_DIR=directory) as url:
            yield url


def serve_waitress(target):
    """Run `module:call` under waitress."""
    return serve_command("-m", "waitress", "--listen=127.0.0.1:0", "--call", target,
                         PYTHONPATH=HERE)


class OverSocket:
    """A class whose tests share one server: `serve()`, a context manager, gives its `url`."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        server = cls.serve()
        cls.url = server.__enter__()
        cls.addClassCleanup(server.__exit__, None, None, None)


# === 12. App under other people's servers =====================================

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


class SiteOnBuiltinServerTest(SiteChecks, unittest.TestCase):

    @staticmethod
    def serve():
        return serve_builtin(make_site())


class SiteInValidatorOnBuiltinServerTest(SiteChecks, unittest.TestCase):
    """PEP 3333: to the server a wrapped App is a foreign callable, without a plan."""

    @staticmethod
    def serve():
        return serve_builtin(wsgiref.validate.validator(make_site()))


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


# === 19. Examples =============================================================

EXAMPLES = {        # module: expression that gives the WSGI application
    "hello": lambda module: module.app,
    "example_bottle": lambda module: module.Service(),
    "example_flask": lambda module: module.app,
    "example_tornado": lambda module: module.make_app(),
}
SERVICES = ("example_bottle", "example_flask", "example_tornado")


def load_example(name):
    """The WSGI application of examples/NAME.py; skips the test where Flask is not installed."""
    if name == "example_flask" and importlib.util.find_spec("flask") is None:
        raise unittest.SkipTest("needs flask")
    return EXAMPLES[name](importlib.import_module("examples." + name))


def read_transcript(name):
    """What an example's docstring shows: (run command, curl command, answer)."""
    with open(os.path.join(ROOT, "examples", name + ".py"), encoding="utf-8") as file:
        return re.search(r"    \$ (python .+)\n    \$ (curl .+)\n    (.+)\n", file.read()).groups()


class ExampleFilesTest(unittest.TestCase):

    def test_every_example_is_listed_and_at_most_forty_lines(self):
        directory = os.path.join(ROOT, "examples")
        names = {name[:-3] for name in os.listdir(directory) if name.endswith(".py")}
        self.assertEqual(names, set(EXAMPLES))
        for name in names:
            with self.subTest(example=name), open(os.path.join(directory, name + ".py")) as file:
                self.assertLessEqual(len(file.readlines()), 40)

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

    def test_the_three_services_by_any_test_client(self):
        for name in SERVICES:
            with self.subTest(example=name):
                client = TestClient(wsgiref.validate.validator(load_example(name)))
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
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=TIMEOUT)
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


@unittest.skipUnless(BROWSER, "needs Chromium")
class BrowserTest(unittest.TestCase):

    FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--no-proxy-server", "--disable-dev-shm-usage")

    def dump_dom(self, app):
        """What headless Chromium makes of GET /, as text."""
        with tempfile.TemporaryDirectory() as profile, Server(app, port=0) as server:
            return subprocess.run(
                [BROWSER, *self.FLAGS, "--user-data-dir=" + profile, "--dump-dom", server.url],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                timeout=2 * TIMEOUT, check=True).stdout.decode()

    def test_chromium_shows_hello(self):
        self.assertEqual(self.dump_dom(load_example("hello")).strip(),
                         "<html><head></head><body>Hello World!</body></html>")

    def test_chromium_shows_the_three_services(self):
        for name in SERVICES:
            with self.subTest(example=name):
                self.assertIn("Hello World!", self.dump_dom(load_example(name)))

    def test_chromium_shows_the_standard_librarys_application(self):
        dom = self.dump_dom(wsgiref.simple_server.demo_app)
        self.assertIn("Hello world!", dom)
        self.assertIn("wsgi.url_scheme = 'http'", dom)


@unittest.skipUnless(hasattr(os, "fork"), "needs fork and signals")
class ExamplesAsCommandsTest(unittest.TestCase):
    """`python minibottle.py TARGET` for every kind of target that an example offers."""

    def check_target(self, target):
        with Command("minibottle.py", target, "--bind", "127.0.0.1:0") as command:
            self.assertIn(command.url, command.lines[0])
            self.assertEqual(fetch(command.url)[::2], (200, b"Hello World!"))
            command.stop(signal.SIGTERM)
            started = [line for line in command.lines if command.url in line]
            self.assertEqual((command.status, len(started)), (0, 1), command.lines)

    def test_an_application_object(self):
        self.check_target("examples.hello:app")

    def test_a_subclass_of_bottle(self):
        self.check_target("examples.example_bottle:Service")

    @needs("flask")
    def test_a_flask_application(self):
        self.check_target("examples.example_flask:app")

    def test_a_factory(self):
        self.check_target("examples.example_tornado:make_app")

    def test_a_main_that_runs_the_application_and_flags_that_win_over_it(self):
        for name in ("hello", "example_bottle", "example_tornado"):
            with self.subTest(example=name):
                self.check_target("examples." + name + ":main")

    @unittest.skipUnless(CURL, "needs curl")
    def test_every_docstring_tells_the_truth(self):
        for name in EXAMPLES:
            with self.subTest(example=name):
                load_example(name)
                run, curl, answer = read_transcript(name)
                with Command(*shlex.split(run)[1:], "--bind", "127.0.0.1:0") as command:
                    args = shlex.split(re.sub(r"http://127\.0\.0\.1:\d+", command.url, curl))
                    output = subprocess.check_output([CURL, "-sS", "--noproxy", "*", *args[1:]])
                self.assertEqual(output.decode().strip(), answer)

    def test_a_main_needs_no_flag_and_a_script_runs_itself(self):
        source = ("from examples.example_bottle import Service\n"
                  "def main():\n"
                  "    Service().run(host='127.0.0.1', port=0)\n"
                  "if __name__ == '__main__':\n"
                  "    main()\n")
        with tempfile.TemporaryDirectory() as directory:
            script = os.path.join(directory, "own_service.py")
            with open(script, "w") as file:
                file.write(source)
            path = os.pathsep.join((ROOT, directory))
            for args in (("minibottle.py", "own_service:main"), (script,)):
                with self.subTest(args=args), Command(*args, PYTHONPATH=path) as command:
                    self.assertEqual(fetch(command.url)[::2], (200, b"Hello World!"))
                    command.stop(signal.SIGTERM)
                    self.assertEqual(command.status, 0, command.lines)


if __name__ == "__main__":
    unittest.main()
