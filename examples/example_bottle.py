"""A service as a subclass of Bottle: only the import line differs from Bottle's own.

From the project's root:
    $ python minibottle.py examples.example_bottle:main
    $ curl -X POST -H "Accept-Language: en-GB" http://127.0.0.1:8080/api
    {"language": "en-GB"}
"""

import minibottle as bottle


class Service(bottle.Bottle):
    """Routes its own methods; `Service()` is the application, for tests and for any server."""

    def __init__(self):
        super().__init__()
        self.get("/", callback=self.index)
        self.route("/api", "POST", self.api)

    def index(self):
        bottle.response.set_header("Content-Type", "text/plain; charset=utf-8")
        return "Hello World!"

    def api(self):
        return {"language": bottle.request.headers.environ.get("HTTP_ACCEPT_LANGUAGE")}


def main():
    Service().run(host="127.0.0.1", port=8080)


if __name__ == "__main__":
    main()
