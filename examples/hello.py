"""The smallest application: one route and one answer.

From the project's root:
    $ python minibottle.py examples.hello:app
    $ curl http://127.0.0.1:8080/
    Hello World!
"""

from minibottle import App

app = App()


@app.get("/")
def hello():
    return "Hello World!"


def main():
    app.run()


if __name__ == "__main__":
    main()
