"""Templates of the package jinja2, as Bottle has them: jinja2_template() and jinja2_view().

A file to lay beside minibottle.py, where it is minibottle.jinja:

    from minibottle import jinja2_template as template, jinja2_view as view
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

from . import BaseTemplate, template, view


class Jinja2Template(BaseTemplate):
    """A template of the package jinja2; settings are those of its Environment."""

    def prepare(self, filters: Mapping = {}, tests: Mapping = {}, globals: Mapping = {},
                **settings: Any) -> None:
        import jinja2
        self.env = jinja2.Environment(loader=jinja2.FunctionLoader(self.load), **settings)
        self.env.filters.update(filters)
        self.env.tests.update(tests)
        self.env.globals.update(globals)
        self.tpl = (self.env.get_template(self.name) if self.source is None
                    else self.env.from_string(self.source))

    def load(self, name: str) -> Optional[Tuple[str, str, Callable]]:
        path = self.search(name, self.lookup)
        core: Any = sys.modules[__package__]  # its DEBUG changes
        return (self.read(path), path, lambda: not core.DEBUG) if path else None

    def execute(self, out: List[str], env: Dict[str, Any]) -> None:
        out.append(self.tpl.render(env))


jinja2_template = partial(template, template_adapter=Jinja2Template)
jinja2_view = partial(view, template_adapter=Jinja2Template)
