"""The applications under test: `Hello World!` to GET /, with nothing in the way.

Most servers have a command line of their own (see bench.py); the others: apps.py NAME PORT
"""
import asyncio
import sys
import time


def hello():
    return "Hello World!"


def sleep():
    time.sleep(0.1)
    return "Hello World!"


def cpu():
    """Use 20 ms of processor time of this thread, in Python code that can be interrupted."""
    end = time.thread_time() + 0.02
    while time.thread_time() < end:
        for _ in range(200):
            pass
    return "Hello World!"


async def hello_async():
    return "Hello World!"


async def sleep_async():
    await asyncio.sleep(0.1)
    return "Hello World!"


HANDLERS = {"/": hello, "/sleep": sleep, "/cpu": cpu}


def make_app(application):
    app = application()
    for path, handler in HANDLERS.items():
        app.route(path, callback=handler)
    return app


def minibottle_app():
    from minibottle import App
    return make_app(App)


def minibottle_async_app():
    from minibottle import App
    app = App()
    app.route("/", callback=hello_async)
    app.route("/await", callback=sleep_async)
    return app


def bottle_app():
    from bottle import Bottle
    return make_app(Bottle)


def raw_app(environ, start_response):
    """Plain WSGI, so that the server's own cost shows."""
    body = HANDLERS[environ["PATH_INFO"]]().encode()
    start_response("200 OK", [("Content-Type", "text/html; charset=UTF-8"),
                              ("Content-Length", str(len(body)))])
    return [body]


def starlette_app():
    from starlette.applications import Starlette
    from starlette.responses import HTMLResponse
    from starlette.routing import Route

    async def respond(request):
        return HTMLResponse(hello())

    async def wait(request):
        return HTMLResponse(await sleep_async())

    return Starlette(routes=[Route("/", respond), Route("/await", wait)])


def run_tornado(port):
    from tornado.web import Application, RequestHandler

    class Hello(RequestHandler):
        def get(self):
            self.write(hello())

    class Wait(RequestHandler):
        async def get(self):
            self.write(await sleep_async())

    async def serve():
        app = Application([("/", Hello), ("/await", Wait)], log_function=lambda handler: None)
        app.listen(port, "127.0.0.1")
        await asyncio.Event().wait()

    asyncio.run(serve())


def run_bjoern(port):
    import bjoern
    bjoern.run(bottle_app(), "127.0.0.1", port)


if __name__ == "__main__":
    {"tornado": run_tornado, "bjoern": run_bjoern}[sys.argv[1]](int(sys.argv[2]))
