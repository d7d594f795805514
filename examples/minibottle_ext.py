"""For Bottle's plugins: `import bottle` is minibottle, and `from bottle.ext import x` is bottle_x.

    import minibottle
    minibottle.install_as_bottle()        # before plugins are imported

A file to lay beside minibottle.py, where it is minibottle.ext.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import spec_from_loader
from typing import Any, Callable, Optional

from . import BottleException

__path__: list = []  # for the import system it is a package


class PluginFinder:
    """Finds bottle_x for `from minibottle.ext import x`."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        if name.rpartition(".")[0] == __name__:
            return spec_from_loader(name, self)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: Any) -> None:
        """Python makes it."""

    def exec_module(self, module: Any) -> None:
        """A module may replace itself while it is loaded."""
        child = module.__name__.rpartition(".")[2]
        sys.modules[module.__name__] = import_module("bottle_" + child)


sys.meta_path.append(PluginFinder())


class PluginError(BottleException):
    """A plugin cannot do its work here."""


def install_as_bottle() -> None:
    """From now on `import bottle` is minibottle, also in plugins."""
    ours = sys.modules[__package__]
    if sys.modules.setdefault("bottle", ours) is not ours:
        raise RuntimeError("another bottle is imported already: call install_as_bottle() earlier")


def undecorated(callback: Callable) -> Callable:
    """A function without its decorators; of one without functools.wraps it is a guess."""
    for _ in range(100):  # not for ever: closures may hold each other
        inner = (getattr(callback, "__wrapped__", None) or getattr(callback, "__func__", None)
                 or closed_over(callback))
        if inner is None:
            break
        callback = inner
    return callback


def closed_over(callback: Callable) -> Optional[Callable]:
    """What a function without named parameters, as most decorators make it, calls inside."""
    code = getattr(callback, "__code__", None)
    if code is None or code.co_argcount or code.co_kwonlyargcount:
        return None
    held = (cell.cell_contents for cell in callback.__closure__ or ())
    return next(filter(callable, held), None)
