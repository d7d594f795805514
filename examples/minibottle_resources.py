"""Bottle's ResourceManager: files by name, in a list of directories; an App has one as `resources`.

A file to lay beside minibottle.py, where it is minibottle.resources:

    app.resources.add_path("./data/")
    with app.resources.open("names.txt") as file: ...
"""

from __future__ import annotations

import os
from typing import Any, Callable, List, Optional


class ResourceManager:
    """Finds files by name in a list of directories, `path`."""

    def __init__(self, base: str = "./", opener: Callable = open) -> None:
        self.base = base
        self.opener = opener
        self.path: List[str] = []

    def add_path(self, path: str, base: Optional[str] = None, index: Optional[int] = None,
                 create: bool = False) -> bool:
        """Search the directory of `path` too ("./files/", or a file in it), which is relative to
        that of `base`; is it there?"""
        root = os.path.abspath(os.path.dirname(base or self.base))
        path = os.path.abspath(os.path.join(root, os.path.dirname(path))) + os.sep
        self.path = [known for known in self.path if known != path]
        self.path.insert(len(self.path) if index is None else index, path)
        if create:
            os.makedirs(path, exist_ok=True)
        return os.path.exists(path)

    def lookup(self, name: str) -> Optional[str]:
        """The path of the first file of this name, or None."""
        paths = (os.path.join(path, name) for path in self.path)
        return next(filter(os.path.isfile, paths), None)

    def open(self, name: str, mode: str = "r", *args: Any, **options: Any) -> Any:
        path = self.lookup(name)
        if path is None:
            raise FileNotFoundError(f"no resource {name!r} in {self.path}")
        return self.opener(path, mode, *args, **options)
