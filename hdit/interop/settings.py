"""Another project's settings, each read as the type that it must have."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from hdit.interop.contents import InteropError
from hdit.names import printable
from hdit.reading import parse_json

NEEDED: Any = object()
"""The default of a setting that must be there."""

LARGEST = 2**31
"""Of a number, unless the reader allows less."""

LENGTH = 1000
"""Of a list."""


def read_table(text: str, origin: str) -> dict[str, Any]:
    """The JSON object in a text. Raises UserError where it is none."""
    raw = parse_json(text, origin)
    if not isinstance(raw, dict):
        raise InteropError(f"{origin}: must be a JSON object, got {shown(raw)}")
    return raw


def shown(value: Any) -> str:
    """A value, or its beginning, in one line."""
    return printable(f"{value!r:.80}")


class Settings:
    """A table of someone else's settings, which remembers what was read of it; null is absent.

    Each method reads one key, and raises InteropError with the key and what arrived where that is
    of another type, or absent without a default.
    """

    def __init__(self, raw: dict[str, Any], origin: str, path: str = ""):
        self.raw, self.origin, self.path = raw, origin, path
        self.read: set[str] = set()
        self.tables: dict[str, Settings] = {}

    def has(self, key: str) -> bool:
        """Whether a setting is there."""
        return self.raw.get(key) is not None

    def number(
        self, key: str, default: Any = NEEDED, *, low: float = -LARGEST, high: float = LARGEST
    ) -> Any:
        """A number from `low` to `high`, as a float, or the default."""
        value = self._value(key, default, _is_number, "a number")
        if value is default:
            return value
        self._check_bounds(key, value, low, high)
        return float(value)

    def integer(self, key: str, default: Any = NEEDED, *, low: int = 0, high: int = LARGEST) -> Any:
        """A whole number from `low` to `high`, or the default."""
        value = self._value(key, default, lambda v: type(v) is int, "a whole number")
        if value is not default:
            self._check_bounds(key, value, low, high)
        return value

    def flag(self, key: str, default: Any = NEEDED) -> Any:
        """True or false, or the default."""
        return self._value(key, default, lambda v: isinstance(v, bool), "true or false")

    def text(self, key: str, default: Any = NEEDED) -> Any:
        """A text, or the default."""
        return self._value(key, default, _is_text, "a text")

    def one_of(self, key: str, options: tuple[str, ...], default: Any = NEEDED) -> Any:
        """One of some texts, or the default."""
        value = self.text(key, default)
        if value is not default and value not in options:
            raise self.error(key, f"must be one of {', '.join(options)}, got {shown(value)}")
        return value

    def entries(self, key: str, length: int | None = None) -> Settings:
        """A list, as a table whose keys are "0", "1" and so on; of one length where it is known."""
        value = self._value(key, NEEDED, lambda v: isinstance(v, list), "a list")
        if length is not None and len(value) != length:
            raise self.error(key, f"must be a list of {length}, got {shown(value)}")
        if len(value) > LENGTH:
            raise self.error(key, f"must have {LENGTH} entries at most, got {len(value)}")
        return self.of({str(i): entry for i, entry in enumerate(value)}, key)

    def table(self, key: str) -> Settings:
        """The table under a key, empty if absent."""
        return self.of(self._value(key, {}, lambda v: isinstance(v, dict), "a table"), key)

    def of(self, value: dict[str, Any], key: str) -> Settings:
        """A table that lies under a key, whatever is between."""
        if key not in self.tables:
            self.tables[key] = Settings(value, self.origin, f"{self.path}{key}.")
        return self.tables[key]

    def fixed(self, key: str, *allowed: Any) -> None:
        """Raises InteropError unless the setting is one of those, or absent."""
        value = self._value(key, allowed[0], lambda _: True, "")
        if not any(type(value) is type(one) and value == one for one in allowed):
            wanted = " or ".join(map(repr, allowed))
            raise self.error(key, f"{shown(value)} has no counterpart here, {wanted} has")

    def error(self, key: str, text: str) -> InteropError:
        """An error, to raise, that names the file and the key."""
        return InteropError(f"{self.origin}: {printable(self.path + key)}: {text}")

    def unread(self) -> dict[str, Any]:
        """What was not read, by its path."""
        own = {f"{self.path}{k}": v for k, v in self.raw.items() if k not in self.read}
        for table in self.tables.values():
            own |= table.unread()
        return own

    def left_out(self, inert: dict[str, Any], limit: int = 40) -> list[str]:
        """A note for each setting that was not read, but for those with the values of `inert`."""
        rest = {k: v for k, v in self.unread().items() if k not in inert or inert[k] != v}
        notes = [
            f"{printable(path)} = {json.dumps(value):.200} has no counterpart, and was left out"
            for path, value in list(rest.items())[:limit]
        ]
        more = [f"and {len(rest) - limit} more settings"] if len(rest) > limit else []
        return notes + more

    def _value(self, key: str, default: Any, fits: Callable[[Any], bool], wanted: str) -> Any:
        self.read.add(key)
        value = self.raw.get(key)
        if value is None:
            if default is NEEDED:
                raise self.error(key, "missing")
            return default
        if not fits(value):
            raise self.error(key, f"must be {wanted}, got {shown(value)}")
        return value

    def _check_bounds(self, key: str, value: float, low: float, high: float) -> None:
        if not low <= value <= high:
            raise self.error(key, f"must be from {low:g} to {high:g}, got {shown(value)}")


def _is_number(value: Any) -> bool:
    """Whether it is a number: not true or false, nor a NaN; an int may be too large for a float."""
    return type(value) is int or (type(value) is float and math.isfinite(value))


def _is_text(value: Any) -> bool:
    """Whether UTF-8 can hold it: JSON may have halves of a character."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)
