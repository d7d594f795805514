"""A chat: a page and a WebSocket. Whoever has the page open sees what the others write.

From the project's root:
    $ python minibottle.py examples.chat:app
    $ curl http://127.0.0.1:8080/rooms
    {"tea": 0}
"""

import asyncio

from minibottle import App, abort

PAGE = """<!DOCTYPE html>
<meta charset="utf-8"><title>{{room}}</title>
<h1>{{room}}</h1>
<ul id="said"></ul>
<form><input name="text" autocomplete="off" autofocus></form>
<script>
const scheme = location.protocol === "https:" ? "wss://" : "ws://";
const chat = new WebSocket(scheme + location.host + "/rooms/{{room}}/chat");
const form = document.forms[0];
chat.onmessage = (event) => {
    const line = document.createElement("li");
    line.textContent = event.data;  // what others write is text, not HTML
    said.append(line);
};
chat.onclose = () => { form.text.disabled = true; };
form.onsubmit = (event) => {
    event.preventDefault();
    chat.send(form.text.value);
    form.text.value = "";
};
</script>
"""

app = App()
ROOMS = {"tea": set()}  # of this process: with more workers than one, share them by a database


@app.get("/")
def index():
    return page("tea")


@app.get("/rooms")
def rooms():
    return {room: len(guests) for room, guests in ROOMS.items()}


@app.get("/rooms/<room>")
def page(room):
    if room not in ROOMS:
        abort(404, "There is no such room.")
    return PAGE.replace("{{room}}", room)


async def tell(guest, text):
    try:
        await asyncio.wait_for(guest.send(text), timeout=1)
    except asyncio.TimeoutError:  # the others do not wait for who does not read
        await guest.close(1008, "You do not listen.")
    except ConnectionError:
        pass  # it is leaving


@app.websocket("/rooms/<room>/chat", max_message=2000)
async def chat(ws, room):
    guests = ROOMS.get(room)
    if guests is None:
        return await ws.close(4004, "There is no such room.")
    guests.add(ws)
    try:
        async for text in ws:
            tasks = [asyncio.ensure_future(tell(guest, text)) for guest in guests]
            await asyncio.wait(tasks, timeout=1)
    finally:
        guests.discard(ws)
