"""A handler that asks three services at once, and answers what they say together.

Here the services are this application itself, each of which takes its time. From the project's
root:
    $ python minibottle.py examples.aggregate:app
    $ curl http://127.0.0.1:8080/
    {"stock": 7, "price": "1.10", "reviews": "unknown (head)"}
"""

import asyncio

from minibottle import App, ClientError, abort, fetch

app = App()
SERVICES = {"stock": (0.1, 7), "price": (0.2, "1.10"), "reviews": (60, "good")}


@app.get("/")
async def index(request):
    base = "http://127.0.0.1:{SERVER_PORT}/".format(**request.environ)
    found = await asyncio.gather(*(ask(base + name) for name in SERVICES))
    return dict(zip(SERVICES, found))


async def ask(url):
    try:
        return (await fetch(url, timeout=3)).json["value"]
    except ClientError as error:
        return f"unknown ({error.phase})"


@app.get("/<name>", cancel=True)
async def service(name):
    seconds, value = SERVICES.get(name) or abort(404)
    await asyncio.sleep(seconds)
    return {"value": value}
