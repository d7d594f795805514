"""A live plot by server-sent events; who comes back goes on where it was.

From the project's root:
    $ python minibottle.py examples.plot:app
    $ curl -H "Last-Event-ID: 20" http://127.0.0.1:8080/wave?until=22
    :

    id: 21
    data: {"x": 21, "y": 0.863}

    id: 22
    data: {"x": 22, "y": 0.808}
"""

import asyncio
import math

from minibottle import App, event_stream, request

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
    try:
        begin = int(request.headers.get("Last-Event-ID", -1)) + 1
    except ValueError:
        begin = 0
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
