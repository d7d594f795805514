"""For old applications and plugins of Bottle's: `import bottle` is minibottle, `from bottle.ext
import x` is bottle_x; and what Bottle has that is seldom used.

    import minibottle
    minibottle.install_as_bottle()        # before plugins are imported

A file to lay beside minibottle.py, where it is minibottle.ext.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import spec_from_loader
from typing import Any, Callable, Iterator, Optional, Tuple

from . import BottleException, default_app, html_escape, load, parameters_of, signature_of

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


def yieldroutes(func: Callable) -> Iterator[str]:
    """The rules of a function by its signature: a__b(x, y=5) -> "/a/b/<x>", "/a/b/<x>/<y>"."""
    path = "/" + func.__name__.replace("__", "/").lstrip("/")
    optional = {p.name for p in signature_of(func) or () if p.default is not p.empty}
    for i, name in enumerate(parameters_of(func)):
        if i or name != "request":
            if name in optional:
                yield path
            path += f"/<{name}>"
    yield path


def html_quote(text: str) -> str:
    """The value of an HTML attribute, with its quotes: 'a"' -> '"a&quot;"'."""
    text = html_escape(text).replace("\n", "&#10;").replace("\r", "&#13;").replace("\t", "&#9;")
    return f'"{text}"'


def path_shift(script_name: str, path_info: str, shift: int = 1) -> Tuple[str, str]:
    """Move segments over: ("/a", "/b/c") -> ("/a/b", "/c"); back, if `shift` is negative."""
    script, path = ([part for part in text.strip("/").split("/") if part]
                    for text in (script_name, path_info))
    parts, at = script + path, len(script) + shift
    if not 0 <= at <= len(parts):
        raise AssertionError(f"cannot shift {script_name!r} and {path_info!r} by {shift}")
    end = "/" * (path_info.endswith("/") and at < len(parts))
    return "/" + "/".join(parts[:at]), "/" + "/".join(parts[at:]) + end


def load_app(target: str) -> Callable:
    """"module:name" -> that application; "module" -> the default one that it fills. As it is
    imported, its run() does nothing."""
    core: Any = sys.modules[__package__]
    before, core.NORUN = core.NORUN, True
    made = default_app.push()
    try:
        found = load(target)
        return found if callable(found) else made
    finally:
        default_app.remove(made)
        core.NORUN = before
