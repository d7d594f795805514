"""`--reload` and run(reloader=True): the server starts anew when a file changes.

A file to lay beside minibottle.py, where it is minibottle.reloading.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import Dict, Iterator

from . import TEMPLATE_PATH, SimpleTemplate

MAX_FOLDERS = 1000        # looked into, from the top down
PATIENCE_SECONDS = 0.5    # what streams without an end keeps no new code waiting for longer


def keep_reloading(interval: float) -> None:
    """Run this command line in a child, and anew when a file changes; in the child: do nothing.

    A child that fails, maybe over half an edit, has its successor after the next change.
    """
    if "BOTTLE_CHILD" in os.environ or threading.current_thread() is not threading.main_thread():
        return
    command = [sys.executable, *getattr(sys, "orig_argv", ["", *sys.argv])[1:]]
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        if hasattr(signal, name):  # not all on Windows
            signal.signal(getattr(signal, name), lambda number, frame: sys.exit())
    while True:
        seen = watched_files()
        child = subprocess.Popen(command, env={**os.environ, "BOTTLE_CHILD": "true"})
        try:
            while watched_files() == seen:
                time.sleep(interval)
                if child.poll() == 0:
                    sys.exit()
        finally:
            end(child)


def end(child: subprocess.Popen) -> None:
    """By a second signal, too, which ends what is being answered. Then its port is free."""
    child.terminate()
    try:
        child.wait(PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        child.terminate()
        child.wait()


def watched_files() -> Dict[str, float]:
    """{path: when it was changed} of what is imported, and of the Python files and templates below
    the program's folder and those of TEMPLATE_PATH."""
    times = {}
    for path in iter_files():
        try:
            times[path] = os.path.getmtime(path)
        except OSError:  # it has gone
            pass
    return times


def iter_files() -> Iterator[str]:
    """Paths, some of them twice."""
    for module in list(sys.modules.values()):
        path = getattr(module, "__file__", None)
        if path:
            yield path
    endings = (".py", *("." + extension for extension in SimpleTemplate.extensions))
    count = 0
    tops = dict.fromkeys(map(os.path.abspath, (sys.path[0], *TEMPLATE_PATH)))
    for top in tops:
        for folder, folders, names in os.walk(top):
            folders[:] = [name for name in folders
                          if name[0] not in "._" and name not in ("site-packages", "node_modules")]
            yield from (os.path.join(folder, name) for name in names if name.endswith(endings))
            count += 1
            if count == MAX_FOLDERS:
                return
