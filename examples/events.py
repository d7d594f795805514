"""A live plot by server-sent events, and event_stream(), which sends them: take this file along.

From the project's root:
    $ python minibottle.py examples.events:app
    $ curl -H "Last-Event-ID: 20" http://127.0.0.1:8080/wave?until=22
    :

    id: 21
    data: {"x": 21, "y": 0.863}

    id: 22
    data: {"x": 22, "y": 0.808}
"""

import asyncio
import math
import re

from minibottle import (
    END, App, close_async, json_dumps, next_async, pull_aside, request, response)


def event_stream(events, keepalive=15.0):
    """Return event_stream(events) from a handler, with an iterator, async or not, of str, of
    {"data": ..., "event": "name", "id": "7", "retry": milliseconds}, or of what has a JSON form.

    A comment goes out every `keepalive` seconds without an event. A browser that comes back sends
    the id that it has seen last as the header Last-Event-ID.
    """
    for name, value in (("Content-Type", "text/event-stream"), ("Cache-Control", "no-cache"),
                        ("X-Accel-Buffering", "no")):  # the last is for nginx
        response.headers[name] = value
    return iter_events(events if hasattr(events, "__aiter__") else pull_aside(iter(events)),
                       keepalive)


async def iter_events(events, keepalive):
    yield ":\n\n"  # so that the head goes out before the first event
    step = None
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
        await close_async(events)


def format_event(event):
    """{"data": "a\\nb", "id": 7} -> "id: 7\\ndata: a\\ndata: b\\n\\n"."""
    fields = event if isinstance(event, dict) and "data" in event else {"data": event}
    lines = []
    for name in ("event", "id", "retry", "data"):
        if name in fields:
            value = fields[name]
            text = str(value) if isinstance(value, (str, int)) else json_dumps(value)
            if name != "data" and re.search("[\r\n\0]", text):
                raise ValueError(f"the {name} of an event is one line, not {text!r:.60}")
            lines += [f"{name}: {line}\n" for line in re.split("\r\n|\r|\n", text)]
    return "".join(lines) + "\n"


app = App()
PAGE = """<!doctype html>
<html lang=en><meta charset=utf-8><title>Wave</title>
<style>
body { margin: 2em; font: 16px sans-serif }
svg { width: 100%; height: 16em; background: #f4f6f8 }
polyline { fill: none; stroke: #0a6; stroke-width: 2; vector-effect: non-scaling-stroke }
</style>
<h1>Wave</h1>
<svg viewBox="0 -1.1 100 2.2" preserveAspectRatio="none"><polyline /></svg>
<p><output>waiting</output></p>
<script>
const svg = document.querySelector("svg"), points = document.querySelector("polyline").points
const output = document.querySelector("output"), source = new EventSource("wave")
source.onmessage = event => {
    const {x, y} = JSON.parse(event.data), point = svg.createSVGPoint()
    point.x = x
    point.y = -y
    points.appendItem(point)
    if (points.numberOfItems > 100)
        points.removeItem(0)
    svg.viewBox.baseVal.x = points.getItem(0).x
    output.value = `y(${x}) = ${y}`
}
source.onerror = () => { output.value = "coming back" }
</script>
"""


@app.get("/")
def index():
    return PAGE


@app.get("/wave")
async def wave():
    begin = int(request.headers.get("Last-Event-ID", -1)) + 1
    return event_stream(measure(begin, request.query.get("until", type=int)))


async def measure(x, until=None):
    while until is None or x <= until:
        yield {"id": x, "data": {"x": x, "y": round(math.sin(x / 10), 3)}}
        await asyncio.sleep(0.05)
        x += 1


def main():
    app.run()


if __name__ == "__main__":
    main()
