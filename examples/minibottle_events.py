"""Server-sent events, for a browser's EventSource: one file to lay beside minibottle.py.

    import asyncio
    from minibottle import App, event_stream, request

    app = App()

    @app.get("/ticks")
    def ticks():
        try:
            last = int(request.get_header("Last-Event-ID", 0))
        except ValueError:
            last = 0
        return event_stream(count(last))

    async def count(n):                      # or a plain generator, which runs on threads
        while True:
            n += 1
            yield {"id": n, "data": {"n": n}}
            await asyncio.sleep(1)

The file is minibottle.events too. A comment goes out where there is no event for a while, so that
nothing in between takes the connection for dead; each event is sent at once, compressed too; when
its reader has gone, the generator is closed.
"""

import asyncio
import re

from . import END, json_dumps, next_async, pull_aside, pull_in_task, response


def event_stream(events, keepalive=15.0):
    """Return event_stream(events) from a handler, with an iterator, async or not, of str, of
    {"data": ..., "event": "name", "id": "7", "retry": milliseconds}, or of what has a JSON form.

    A comment goes out every `keepalive` seconds without an event. A browser that comes back sends
    the id that it has seen last as the header Last-Event-ID.
    """
    for name, value in (("Content-Type", "text/event-stream"), ("Cache-Control", "no-cache"),
                        ("X-Accel-Buffering", "no")):  # the last is for nginx
        response.headers[name] = value
    return iter_events(events if hasattr(events, "__aiter__") else pull_aside(events), keepalive)


async def iter_events(events, keepalive):
    yield ":\n\n"  # so that the head goes out before the first event
    events, step = pull_in_task(events), None  # each event is asked for in a task
    try:
        while True:
            step = asyncio.ensure_future(next_async(events))
            while not (await asyncio.wait([step], timeout=keepalive))[0]:
                yield ":\n\n"
            if step.result() is END:
                return
            yield format_event(step.result())
    finally:
        if step is not None and not step.done():
            step.cancel()
            await asyncio.wait([step])
        await events.aclose()


def format_event(event):
    """{"data": "a\\nb", "id": 7} -> "id: 7\\ndata: a\\ndata: b\\n\\n"."""
    fields = event if isinstance(event, dict) and "data" in event else {"data": event}
    lines = []
    for name in ("event", "id", "retry", "data"):
        if name in fields:
            value = fields[name]
            text = value if isinstance(value, str) else json_dumps(value)
            if name != "data" and re.search("[\r\n\0]", text):
                raise ValueError(f"the {name} of an event is one line, not {text!r:.60}")
            lines += [f"{name}: {line}\n" for line in re.split("\r\n|\r|\n", text)]
    return "".join(lines) + "\n"
