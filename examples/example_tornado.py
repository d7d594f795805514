"""A service as Tornado people write it: a Handler class for each path, and make_app().

From the project's root:
    $ python minibottle.py examples.example_tornado:main
    $ curl -X POST -H "Accept-Language: en-GB" http://127.0.0.1:8888/api
    {"language": "en-GB"}
"""

from minibottle import App, Handler


class Index(Handler):

    def get(self):
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.write("Hello World!")


class Api(Handler):

    def post(self):
        return {"language": self.request.headers.get("Accept-Language")}


def make_app():
    app = App()
    app.route("/", Index)
    app.route("/api", Api)
    return app


def main():
    make_app().run(port=8888)


if __name__ == "__main__":
    main()
