"""TLS for minibottle's server: HTTPS and wss:// without another server in front.

One file to lay beside minibottle.py, where it is minibottle.tls, which the server imports when it
is given a certificate:

    $ python minibottle.py app:app --cert fullchain.pem --key privkey.pem
    minibottle: 1.0 on https://127.0.0.1:8080, 1 worker, Python 3.12.1

or app.run(cert="fullchain.pem", key="privkey.pem"). The key may be in the file of the certificate.
TLS 1.2 and 1.3, HTTP/1.1 by ALPN. For anything else the settings name an ssl.SSLContext, or a
function that makes one (cert="app:context"): client certificates, several host names.

A handshake is a few turns of the event loop, and has the time that the head of a request has
(header_timeout): clients that never speak hold no thread, and delay nobody. Each worker reads the
files when it starts.
"""

from __future__ import annotations

import os
import re
import selectors
import socket
import ssl
import time
from functools import partial
from threading import Lock

from . import StartError, load, note_refusal, printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Optional

    from . import Worker

TURN_BYTES = 1 << 16  # of what is sent, in records of 16 KB, then others have their turn
ALERT = 21            # a record's first byte (RFC 8446 5.1), and
HIDDEN_ALERT = 23, 3, 3, 0, 19  # its head in TLS 1.3: like data, with 2 bytes, a kind and 16 more


def install(worker: Worker) -> None:
    """Let what this worker accepts speak TLS. Raises StartError."""
    context = make_context(worker.settings.cert, worker.settings.key)
    for fd, (sock, template) in worker.listeners.items():
        template["wsgi.url_scheme"] = "https"
        worker.listeners[fd] = Listener(sock, context), template  # type: ignore[assignment]
    worker.sendfile = partial(send_of_file, worker)


def make_context(cert: str, key: str) -> ssl.SSLContext:
    """An SSLContext of two PEM files, or the one that "module:name" is or makes."""
    if re.fullmatch(r"[\w.]+:[\w.]+", cert):
        context = load(cert)
        context = context if isinstance(context, ssl.SSLContext) else context()
        if context.check_hostname:
            raise StartError(f"{cert} is the SSLContext of a client, not of a server")
    else:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)  # HTTP has lengths
        context.set_alpn_protocols(["http/1.1"])
        try:
            for path in filter(None, (cert, key)):  # ssl's own errors name none
                open(path, "rb").close()
            context.load_cert_chain(cert, key or None, password="")  # or it would be asked for
        except OSError as error:
            at = error.filename or f"{cert} {key}".rstrip()
            raise StartError(f"cannot use {at} for TLS: {error.strerror or error}") from None
    context.sslsocket_class = TLSSocket
    return context


class Listener:
    """A listening socket whose connections speak TLS."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        self.sock = sock
        self.context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sock, name)

    def accept(self) -> tuple:
        plain, peer = self.sock.accept()
        sock: Any = self.context.wrap_socket(plain, server_side=True,
                                             do_handshake_on_connect=False)
        sock.addr = peer[0] if isinstance(peer, tuple) else "unix"
        sock.lock = Lock()
        return sock, peer


class TLSSocket(ssl.SSLSocket):
    """What a server's loop wants of a socket: the first recv() does the handshake, nothing blocks
    but as settimeout() says, errors are those of a plain socket, and one thread may send while
    another receives. wrap_socket() makes it, without __init__()."""

    lock: Any = None     # OpenSSL is not for two threads at once; None until it is made
    addr = ""
    is_shaken = False    # the handshake is done
    patience: Optional[float] = 0.0  # what settimeout() was told; beneath, nothing blocks

    def settimeout(self, seconds: Optional[float]) -> None:
        super().settimeout(0.0)
        self.patience = seconds

    def setblocking(self, flag: bool) -> None:
        self.settimeout(None if flag else 0.0)

    def gettimeout(self) -> Optional[float]:
        return self.patience

    def perform(self, step: Callable, *args: object) -> Any:
        """Call OpenSSL until it is done: as long as settimeout() says, as it may need to read in
        order to write."""
        deadline = time.monotonic() + self.patience if self.patience else 0.0
        while True:
            try:
                with self.lock:
                    return step(*args)
            except ssl.SSLWantReadError:
                event = selectors.EVENT_READ
            except ssl.SSLWantWriteError:
                event = selectors.EVENT_WRITE
            except ssl.SSLError as error:
                if "EOF" not in str(error):  # who only looks whether the port is open
                    note_refusal("%s: TLS failed: %s", self.addr, printable(error))
                raise ConnectionResetError("TLS failed") from None
            self.wait(event, deadline)

    def wait(self, event: int, deadline: float) -> None:
        if self.patience == 0.0:
            raise BlockingIOError
        timeout = deadline - time.monotonic() if deadline else None
        with getattr(selectors, "PollSelector", selectors.SelectSelector)() as selector:
            selector.register(self, event)
            if timeout is not None and timeout <= 0 or not selector.select(timeout):
                raise socket.timeout("timed out")

    def recv(self, size: int = 1024, flags: int = 0) -> bytes:
        """What one record holds, which is 16 KB at most: with less room in `size`, the rest of it
        would wait here where no poller sees it."""
        if self.lock is None:  # wrap_socket() asks what a client has sent that has left already
            return b""
        if flags == socket.MSG_PEEK:
            return self.peek(size)
        if not self.is_shaken:
            self.perform(self.do_handshake)
            self.is_shaken = True
        return self.perform(super().recv, size)

    def peek(self, size: int) -> bytes:
        """Something of what has come, as it is on the wire; b"" at the end. An alert is the end.
        In TLS 1.3 two bytes of data look like one: so little comes of nobody who is answered."""
        head = socket.socket.recv(self, 5, socket.MSG_PEEK)
        return b"" if head[:1] == bytes([ALERT]) or head == bytes(HIDDEN_ALERT) else head[:size]

    def send(self, data: Any, flags: int = 0) -> int:
        sent = self.perform(super().send, data) if data else 0  # one record
        if sent == len(data):
            return sent
        view = memoryview(data)
        try:
            while sent < len(view) and sent < TURN_BYTES:
                sent += self.perform(super().send, view[sent:])
        except (BlockingIOError, socket.timeout):  # the next send() begins with the same bytes
            pass
        return sent

    def shutdown(self, how: int) -> None:
        """Say that this was all (RFC 8446 6.1), and do not wait for the peer to say so."""
        if how == socket.SHUT_WR:
            try:
                with self.lock:
                    self.unwrap()
            except (OSError, ValueError):
                pass
        super().shutdown(how)


def send_of_file(worker: Worker, fd: int, file: int, offset: int, count: int) -> int:
    """os.sendfile(), to a connection of this worker."""
    data = os.pread(file, min(count, TURN_BYTES), offset)
    return worker.connections[fd].sock.send(data) if data else 0
