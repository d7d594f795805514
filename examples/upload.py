"""An upload with a progress bar: the body goes to a file as it arrives, and never into memory.

From the project's root:
    $ python minibottle.py examples.upload:app
    $ curl --data-binary "Hello World!" http://127.0.0.1:8080/upload
    {"size": 12, "sha256": "7f83b1657ff1fc53b92dc18148a1d65dfc2d4b1fa3d677284addd200126d9069"}
"""

import hashlib
import tempfile

from minibottle import App, request

MAX_BYTES = 1 << 30  # the server answers 413 to more
PAGE = """<!doctype html>
<html lang=en><meta charset=utf-8><title>Upload</title>
<style>
body { margin: 2em; font: 16px sans-serif }
progress { display: block; width: 30em; height: 1.5em; margin: 1em 0 }
output { font-family: monospace; white-space: pre-wrap }
</style>
<h1>Upload</h1>
<input type=file>
<progress value=0></progress>
<output>Choose a file.</output>
<script>
const input = document.querySelector("input"), bar = document.querySelector("progress")
const output = document.querySelector("output"), MAX_BYTES = %d
input.onchange = () => {
    const file = input.files[0], sending = new XMLHttpRequest()
    if (file.size > MAX_BYTES) {
        output.value = `${file.name} is larger than ${MAX_BYTES} bytes.`
        return
    }
    sending.upload.onprogress = event => {
        bar.max = event.total
        bar.value = event.loaded
        output.value = `${event.loaded} of ${event.total} bytes`
    }
    sending.onload = () => {
        const {size, sha256} = sending.status == 200 ? JSON.parse(sending.response) : {}
        output.value = size === undefined ? `Refused: ${sending.status} ${sending.statusText}`
                                          : `${size} bytes, SHA-256 ${sha256}`
    }
    sending.onerror = () => { output.value = "The connection broke off." }
    sending.open("POST", "upload")
    sending.send(file)
}
</script>
""" % MAX_BYTES

app = App()


@app.get("/")
def index():
    return PAGE


@app.post("/upload", stream=True, max_body=MAX_BYTES)
def upload():
    digest = hashlib.sha256()
    with tempfile.TemporaryFile() as file:  # yours would be kept
        for piece in request.stream:
            file.write(piece)
            digest.update(piece)
        return {"size": file.tell(), "sha256": digest.hexdigest()}


def main():
    app.run()


if __name__ == "__main__":
    main()
