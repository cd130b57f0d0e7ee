"""Small text files, read with care: no device or pipe, and none that is huge or nested deep."""

from __future__ import annotations

import json
import os
import re
import stat
import tomllib
from pathlib import Path
from typing import Any

from hdit.errors import UserError

MAX_BYTES = 64 * 2**20
MAX_DEPTH = 64
KEY_PART = r"""(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+"""
DEEP_KEY = re.compile(rf"(?<![\w-])(?:{KEY_PART}){{{MAX_DEPTH + 1}}}")


class ReadingError(UserError):
    """A file that cannot be read as what it is meant to be: names the file, and why."""


def open_regular(path: Path) -> int:
    """A descriptor to read a regular file by.

    Raises FileNotFoundError where there is none, and ReadingError for all else.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would wait
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise ReadingError(f"{path}: cannot be read: {reason}") from None
    if not stat.S_ISREG(mode := os.fstat(handle).st_mode):
        os.close(handle)
        kind = "a folder" if stat.S_ISDIR(mode) else "a device or pipe"
        raise ReadingError(f"{path}: is {kind}, where a regular file is needed")
    return handle


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises FileNotFoundError where there is none, and ReadingError for all else.
    """
    with open(open_regular(path), "rb") as file:
        try:
            content = file.read(limit + 1)
        except OSError as error:
            raise ReadingError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > limit:
        raise ReadingError(f"{path}: has more than {limit:,} bytes, which no such file has")
    return content


def read_text(path: Path, limit: int = MAX_BYTES) -> str:
    """The text (UTF-8) of a file, as `read_bytes` reads it. Line ends become newlines.

    A byte order mark at its beginning, as editors of Windows put there, is no part of it.
    """
    try:
        text = read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ReadingError(f"{path}: is not UTF-8 text: {error}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_json(text: str | bytes, name: str) -> Any:
    """The value of a JSON text that `name` tells of in errors. Raises ReadingError."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise ReadingError(f"{name}: not valid JSON: {error}") from None
    if max(map(text.count, _OPENING[type(text)])) > MAX_DEPTH // 2:  # or it cannot be deep
        _check_depth(value, name)
    return value


_OPENING: dict[type, Any] = {str: ("[", "{"), bytes: (b"[", b"{")}


def read_json(path: Path, limit: int = MAX_BYTES) -> Any:
    """The value in a JSON file. Raises FileNotFoundError or ReadingError."""
    return parse_json(read_text(path, limit), str(path))


def read_object(path: Path, limit: int = MAX_BYTES) -> dict[str, Any]:
    """The object in a JSON file. Raises FileNotFoundError or ReadingError."""
    value = read_json(path, limit)
    if not isinstance(value, dict):
        raise ReadingError(f"{path}: must hold an object in braces, got {value!r:.60}")
    return value


def parse_toml(text: str, name: str) -> dict[str, Any]:
    """The table of a TOML text that `name` tells of in errors. Raises ReadingError."""
    if DEEP_KEY.search(text):  # a.a.a..., whose parsing takes minutes
        raise ReadingError(f"{name}: has a key nested more than {MAX_DEPTH} deep")
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ReadingError(f"{name}: not valid TOML: {error}") from None
    _check_depth(table, name)
    return table


def _check_depth(value: Any, name: str) -> None:
    """Raises ReadingError for more than MAX_DEPTH tables and arrays within each other."""
    level, depth = [value], 0
    while level := [node for node in level if isinstance(node, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ReadingError(f"{name}: has values nested more than {MAX_DEPTH} deep")
        level = [v for node in level for v in (node.values() if isinstance(node, dict) else node)]
