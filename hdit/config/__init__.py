"""A run's settings: typed, read from TOML with `extends` and overrides, with errors that help."""

from hdit.config.errors import ConfigError
from hdit.config.overrides import apply, differences, merge, read_toml, set_key
from hdit.config.schema import RunConfig, load, parse

__all__ = [
    "ConfigError",
    "RunConfig",
    "apply",
    "differences",
    "load",
    "merge",
    "parse",
    "read_toml",
    "set_key",
]
