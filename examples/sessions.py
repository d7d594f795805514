"""Sessions over signed cookies: a login, a logout, and class Sessions, to be copied.

The browser keeps the session, and the server keeps nothing. So it is no secret of its user's, has
to be small (a cookie has 4 KB), and cannot be taken back: a logout makes this browser forget, but
who has a copy of the cookie may use it until max_age has passed. Where that matters, keep in it
the id of a row in a database, and delete the row.

From the project's root:
    $ python minibottle.py examples.sessions:app
    $ curl -L -b "" -d name=Ada http://127.0.0.1:8080/login
    {"name": "Ada", "visits": 1}
"""

import logging
import os

from minibottle import App, cross_origin_protection, redirect, request, response

log = logging.getLogger("minibottle")


def read_secrets():
    """Words of the file $SECRETS_FILE, or of $SECRETS: the first signs, the others count, too.

    To rotate, put a new one before the old one, and drop that after max_age.
    """
    text = os.environ.get("SECRETS", "")
    if "SECRETS_FILE" in os.environ:
        with open(os.environ["SECRETS_FILE"], encoding="utf-8") as file:
            text = file.read()
    if not text.split():
        log.warning("neither SECRETS_FILE nor SECRETS is set: sessions end with this process")
    return text.split() or [os.urandom(32).hex()]


class Sessions:
    """sessions = Sessions(app, read_secrets()); in a handler, sessions.get()["name"] = "Ada".

    A session is a dict of what has a JSON form; its cookie is written when that has changed.
    `cookie`: more options of set_cookie(), as secure=True where all of the site has TLS.
    """

    def __init__(self, app, secrets, max_age=14 * 24 * 3600, **cookie):
        self.secrets = secrets
        self.max_age = max_age  # seconds since it was written
        self.cookie = cookie
        app.add_hook("after_request", self.save)

    def read(self):
        return request.get_cookie("session", {}, self.secrets, max_age=self.max_age)

    def get(self):
        """The session of this request."""
        if "app.session" not in request.environ:
            request.environ["app.session"] = self.read()
        return request.environ["app.session"]

    def save(self):
        session = request.environ.get("app.session")
        if session:
            if session != self.read():
                response.set_cookie("session", session, self.secrets, max_age=self.max_age,
                                    **self.cookie)
        elif session is not None and "session" in request.cookies:
            response.delete_cookie("session", **{"path": "/", **self.cookie})


app = App()
cross_origin_protection(app)  # or a page elsewhere could log its visitors in and out here
sessions = Sessions(app, read_secrets())
PAGE = """<!doctype html>
<html lang=en><meta charset=utf-8><title>Sessions</title>
<form method=post action="/login"><input name=name required> <button>Log in</button></form>
<form method=post action="/logout"><button>Log out</button></form>
<p><a href="/me">Who am I?</a>
"""


@app.get("/")
def index():
    return PAGE


@app.get("/me")
def me():
    session = sessions.get()
    if "name" not in session:
        redirect("/")
    session["visits"] += 1
    return session


@app.post("/login")
def login():
    session = sessions.get()
    session.clear()  # nothing of whoever was here before
    session.update(name=request.forms.name, visits=0)  # your application checks a password here
    redirect("/me")


@app.post("/logout")
def logout():
    sessions.get().clear()
    redirect("/")


def main():
    app.run()


if __name__ == "__main__":
    main()
