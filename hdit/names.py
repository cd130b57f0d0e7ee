"""Names of files, classes and settings: as text that can be stored, and that a terminal can show.

A path on Linux is bytes, and need not be UTF-8; Python holds those bytes as lone surrogates, which
neither TOML nor JSON nor a terminal takes. Wherever a name enters as text that is stored, it is
escaped, and a path is unescaped where it is opened.
"""

from __future__ import annotations

import re
from pathlib import Path


def escape(name: str) -> str:
    r"""The name with each byte that is not UTF-8 as \xNN: text that any file can hold.

    A backslash that would read as the beginning of such an escape becomes \x5c, so that `unescape`
    gives back every name.
    """
    name = re.sub(r"\\(?=x(?:5c|[89a-f][0-9a-f]))", r"\\x5c", name)
    return _bytes_in_hex(name)


def _bytes_in_hex(text: str) -> str:
    return re.sub("[\udc80-\udcff]", lambda match: f"\\x{ord(match[0]) - 0xDC00:02x}", text)


def unescape(text: str) -> str:
    """The name that `escape` made the text of."""

    def byte(match: re.Match[str]) -> str:
        value = int(match[1], 16)
        return chr(value if value < 0x80 else 0xDC00 + value)

    return re.sub(r"\\x(5c|[89a-f][0-9a-f])", byte, text)


def path_of(text: str) -> Path:
    """The path that a setting names: unescaped, with ~ as the home folder."""
    return expanded(unescape(text))


def expanded(name: str) -> Path:
    """The path of this name, with ~ as the home folder; as it stands if ~USER is no user."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def printable(text: str) -> str:
    """Escapes what a terminal cannot show, or obeys: a file may have any name.

    Names that are escaped already stay as they are.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in _bytes_in_hex(text))
