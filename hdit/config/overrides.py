"""Tables of settings: read from TOML with `extends`, overridden with "a.b=value", compared."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hdit.config.errors import ConfigError


def read_toml(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A TOML file, merged over those that its `extends` names, relative to itself, in order."""
    if path.resolve() in above:
        chain = " -> ".join(str(p) for p in (*above, path.resolve()))
        raise ConfigError(f"{path}: extends itself: {chain}")
    try:
        own = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file{_similar_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    bases = own.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: extends: must be a list of file names, got {bases!r}")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = merge(merged, read_toml(path.parent / base, (*above, path.resolve())))
    return merge(merged, own)


def _similar_file(path: Path) -> str:
    names = [p.name for p in path.parent.glob("*.toml")] if path.parent.is_dir() else []
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
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    *parents, last = key.strip().split(".")
    node: Any = raw
    for i, part in enumerate([*parents, last]):
        where = ".".join(parents[:i]) or "the config"
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
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
