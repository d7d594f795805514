"""What a manager of services wants: a log file that may be moved away (`--log-file`, USR1),
sockets that it is given (`--bind fd:3`), and a word when it is ready (NOTIFY_SOCKET).

A file to lay beside minibottle.py, where it is minibottle.service.
"""

from __future__ import annotations

import os
import re
import socket
import sys

from . import StartError, UsageError, flush_output, log


def open_log(path: str, again: bool) -> None:
    """Let all that is printed go to the end of this file, whoever prints it. `again`: the one that
    is open stays in use where that fails."""
    try:
        file = open(path, "ab")
    except OSError as error:
        if again:
            return log.error("cannot write the log file %s: %s", path, error.strerror)
        raise StartError(f"cannot write the log file {path}: {error.strerror}") from None
    flush_output()
    with file:
        for stream in filter(None, (sys.__stdout__, sys.__stderr__)):
            os.dup2(file.fileno(), stream.fileno())


def adopt(address: str) -> socket.socket:
    """"fd:3" -> the listening socket that this process was started with: of systemd's the first
    (sd_listen_fds(3)). It outlives the server, and what comes meanwhile waits in it."""
    if not re.fullmatch("fd:[0-9]{1,4}", address):
        raise UsageError(f"bad address {address!r}; it is fd: and a number")
    try:
        sock = socket.socket(fileno=int(address[3:]))
        listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise StartError(f"cannot use {address}: {error.strerror}") from None
    if not listens:
        raise StartError(f"cannot use {address}: it does not listen")
    sock.set_inheritable(False)  # by what the application starts
    return sock


def notify(state: str) -> None:
    """Tell systemd (sd_notify(3)); "@x" is an abstract socket."""
    path = os.environ["NOTIFY_SOCKET"]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(state.encode(), "\0" + path[1:] if path[0] == "@" else path)
    except OSError as error:
        log.error("cannot tell %s that it is %s: %s", path, state, error)
