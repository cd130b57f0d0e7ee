"""Tables of settings: read from TOML with `extends`, overridden with "a.b=value", compared."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hdit.config.errors import ConfigError
from hdit.names import escape, path_of
from hdit.reading import MAX_DEPTH, ReadingError, parse_toml, read_text

MAX_BYTES = 2**20  # of a config; the names of all classes of ImageNet have a fiftieth
MAX_CHAIN = 32  # files that extend one another


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file, merged over those that its `extends` names, relative to itself, in order.

    Raises ConfigError for a file that is missing, no TOML, or extends itself.
    """
    return _merged(path, (), {})


def _merged(path: Path, above: tuple[Path, ...], known: dict[Path, Any]) -> dict[str, Any]:
    """`read_toml`, below the files in `above`. Each file is read once, and then `known`."""
    try:
        place = path.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a zero byte, or links in a circle
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if place in above:
        chain = " -> ".join(str(p) for p in (*above, place))
        raise ConfigError(f"{path}: extends itself: {chain}")
    if len(above) == MAX_CHAIN:
        raise ConfigError(f"{path}: more than {MAX_CHAIN} files extend one another")
    if place not in known:
        own, bases = _read_one(path)
        merged: dict[str, Any] = {}
        for base in bases:
            merged = merge(merged, _merged(path.parent / path_of(base), (*above, place), known))
        known[place] = merge(merged, own)
    return known[place]


def _read_one(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The settings written in a file, and the files that it extends. Raises ConfigError."""
    try:
        own = parse_toml(read_text(path, MAX_BYTES), str(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file{_similar_file(path)}") from None
    except ReadingError as error:
        raise ConfigError(str(error)) from None
    bases = own.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    named = isinstance(bases, list) and all(isinstance(base, str) and base for base in bases)
    if not named:
        raise ConfigError(f"{path}: extends: must be a list of file names, got {bases!r:.60}")
    return own, bases


def _similar_file(path: Path) -> str:
    beside = path.parent.glob("*.toml") if path.parent.is_dir() else ()
    names = [p.name for p in beside if p.name != path.name]  # a link to nothing is there, too
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Tables merge, all else replaces; so does a table of another `kind`."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            other = "kind" in value and value["kind"] != old.get("kind", value["kind"])
            result[key] = value if other else merge(old, value)
        else:
            result[key] = value
    return result


def apply(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Applies each "a.b=value" in order, but kinds first: they take the place of their tables."""
    for override in sorted(overrides, key=lambda text: not _KIND.match(text)):
        set_key(raw, override)


_KIND = re.compile(r"[^=]*\.kind\s*=")


def set_key(raw: dict[str, Any], override: str) -> None:
    """Applies "a.b.0.c=value"; the value is read as TOML, or as a string where it is none.

    Another `kind` leaves nothing of the table that it is set in.
    """
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override!r}: must read KEY=VALUE, as in training.batch_size=64")
    value = _value(override, text)
    *parents, last = [part.strip() for part in key.split(".")]
    if not all([*parents, last]):
        raise ConfigError(f"--set {override!r:.200}: has a part of its key between dots empty")
    if len(parents) >= MAX_DEPTH:
        raise ConfigError(f"--set {override!r:.200}: no key is {len(parents) + 1} tables deep")
    node: Any = raw
    for i, part in enumerate([*parents, last]):
        where = ".".join(parents[:i]) or "the config"
        if isinstance(node, list):
            if not part.isdecimal() or len(part) > 9 or int(part) >= len(node):
                raise ConfigError(
                    f"--set {override!r}: {where} has {len(node)} entries, counted from 0; "
                    f"{part!r} is none of them"
                )
        elif not isinstance(node, dict):
            raise ConfigError(f"--set {override!r}: {where} is a value, not a table")
        index: Any = int(part) if isinstance(node, list) else part
        if i == len(parents):
            if part == "kind" and isinstance(node, dict) and node.get("kind", value) != value:
                node.clear()
            old = node.get(index) if isinstance(node, dict) else node[index]
            node[index] = merge({"": old}, {"": value})[""]
        else:
            node = node.setdefault(index, {}) if isinstance(node, dict) else node[index]


def _value(override: str, text: str) -> Any:
    """The TOML value, or the string, of an override. Raises ConfigError for more than one."""
    try:
        table = parse_toml(f"value = {text}", "--set")
    except ReadingError:
        several = "\n" in text or "\r" in text
        table = {} if several else {"value": text.strip()}
    if len(table) != 1:
        raise ConfigError(
            f"--set {override!r:.200}: must be one key and its value on a line; give --set for each"
        )
    return _stored(table["value"])


def _stored(value: Any) -> Any:
    """A value of the command line as a file can hold it: with bytes that are not UTF-8 escaped."""
    if isinstance(value, dict):
        return {key: _stored(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_stored(part) for part in value]
    if isinstance(value, str) and any("\udc80" <= c <= "\udcff" for c in value):
        return escape(value)
    return value


def differences(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) where two dumped configs differ; None where a key is absent."""
    keys: Sequence[Any]
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        pairs = [(key, old.get(key), new.get(key)) for key in keys]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(i, a, b) for i, (a, b) in enumerate(zip(old, new, strict=True))]
    else:
        return [] if old == new else [(path, old, new)]
    return [d for key, a, b in pairs for d in differences(a, b, f"{path}.{key}".lstrip("."))]
