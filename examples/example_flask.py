"""A Flask application as it is: it does not know which server runs it.

It needs Flask (`pip install flask`). From the project's root:
    $ python minibottle.py examples.example_flask:app
    $ curl -X POST -H "Accept-Language: en-GB" http://127.0.0.1:8080/api
    {"language":"en-GB"}
"""

from flask import Flask, jsonify, request

app = Flask(__name__)


@app.get("/")
def index():
    return "Hello World!"


@app.post("/api")
def api():
    return jsonify(language=request.headers.get("Accept-Language"))
