"""Settings out of INI files, for app.config.load_config(): one file to lay beside minibottle.py.

    app.config.load_config("app.ini")       # [db] host = a -> app.config["db.host"] == "a"
"""

from __future__ import annotations

from configparser import ConfigParser, ExtendedInterpolation
from typing import Any


def load_config(config: Any, filename: Any, **options: Any) -> Any:
    """"key" of [section] sets "section.key", in small letters, as text.

    [bottle] and [ROOT] have no prefix; [DEFAULT] counts for every section.
    """
    parser = ConfigParser(**{"allow_no_value": True, "interpolation": ExtendedInterpolation(),
                             **options})
    parser.read(filename, encoding="utf-8")
    for section in parser.sections():
        prefix = "" if section in ("bottle", "ROOT") else section + "."
        for key in parser.options(section):
            config[(prefix + key).lower()] = parser.get(section, key)
    return config
