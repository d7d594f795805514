"""What a service wants besides a port: a log file that may be moved away (`--log-file`, USR1),
unix sockets (`--bind unix:/path`), sockets that it is given (`--bind fd:3`), and a word to systemd
when it is ready (NOTIFY_SOCKET).

A file to lay beside minibottle.py, where it is minibottle.service.
"""

from __future__ import annotations

import atexit
import errno
import os
import re
import socket
import stat
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


def bind(address: str) -> socket.socket:
    """"unix:/path", or "fd:3", the number of a listening socket that this process was started with:
    of systemd's the first (sd_listen_fds(3)). That outlives the server; what comes meanwhile waits.
    """
    if address.startswith("unix:"):
        return bind_unix(address)
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


def bind_unix(address: str) -> socket.socket:
    """For its owner only (0600). A socket that nobody listens on any more is replaced; ours is
    removed when this process ends, if it is still there."""
    path = address[5:]
    if not path or not hasattr(socket, "AF_UNIX"):
        raise UsageError(f"bad address {address!r}" if not path else
                         f"no unix sockets on this system: {address}")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        if os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode):
            remove_stale(path)
        sock.bind(path)
        sock.listen(1024)
    except OSError as error:
        sock.close()
        raise StartError(f"cannot bind to {address}: {error.strerror or error}") from None
    finally:
        os.umask(mask)
    atexit.register(unlink, path, identity(path), os.getpid())
    return sock


def remove_stale(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        try:
            client.connect(path)
        except ConnectionRefusedError:
            return os.unlink(path)
    raise OSError(errno.EADDRINUSE, "somebody listens there")


def unlink(path: str, made: tuple, pid: int) -> None:
    """Remove a socket that is still ours: another server may have taken the path."""
    try:
        if pid == os.getpid() and made == identity(path):
            os.unlink(path)
    except OSError:
        pass


def identity(path: str) -> tuple:
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_mtime_ns


def notify(state: str) -> None:
    """Tell systemd (sd_notify(3)); "@x" is an abstract socket."""
    path = os.environ["NOTIFY_SOCKET"]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(state.encode(), "\0" + path[1:] if path[0] == "@" else path)
    except OSError as error:
        log.error("cannot tell %s that it is %s: %s", path, state, error)
