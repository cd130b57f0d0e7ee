"""A run's settings: typed, read from TOML with `extends` and overrides, with errors that help."""

from hdit.config.schema import (
    ConfigError,
    RunConfig,
    apply,
    differences,
    load,
    merge,
    parse,
    read_toml,
    set_key,
)

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
