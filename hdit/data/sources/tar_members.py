"""The members of a tar file, by their headers alone: ustar, GNU and pax."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

MAX_TEXT = 1 << 20  # bytes of a label, or of a header that gives another a long name
BLOCK = 512
FOLDER, SPARSE, LONG_NAME = b"5", b"S", b"L"
EXTENDED = (b"x", b"X")  # pax: of the next member
UNUSED = (b"g", b"K")  # pax of all members, and a long target of a link
REFUSED = {
    b"1": "is a link; make the tar with --dereference --hard-dereference",
    b"2": "is a link; make the tar with --dereference",
    b"3": "is a device",
    b"4": "is a device",
    b"6": "is a pipe",
    SPARSE: "is stored with holes; make the tar without --sparse",
}


class TarFile:
    """A file that is read at any place; closed when nobody holds it any more.

    A fork can use it too, for it has no position.
    """

    def __init__(self, handle: int):
        self.handle, self.size = handle, os.fstat(handle).st_size

    def __del__(self) -> None:
        os.close(self.handle)

    def read(self, start: int, size: int) -> bytes:
        """Reads up to `size` bytes from `start` on."""
        return os.pread(self.handle, size, start)


class Member(NamedTuple):
    """A member of a tar, by what its headers tell; places are bytes from the file's start."""

    name: str
    kind: bytes
    start: int  # of its first header
    data: int
    size: int

    @property
    def end(self) -> int:
        """Byte at which the next header may start."""
        return _next_block(self.data + self.size)


def members(file: TarFile, start: int) -> Iterator[Member]:
    """Yields the members of a tar (ustar, GNU or pax) from the header at `start` on.

    Raises ValueError where it is damaged. A tar may end without the zeros that say so.
    """
    at, long_name, long_size, sparse = start, None, None, False
    while True:
        block = file.read(at, BLOCK)
        if not block.strip(b"\0"):
            if not file.size:
                raise ValueError("the file is empty")
            if at != start:
                raise ValueError(f"the tar ends at byte {at}, after the name of a member")
            return
        try:
            name, size, kind = _header(block)
        except ValueError as error:
            raise ValueError(f"no header of a tar at byte {at}: {error}") from None
        data = at + BLOCK
        if kind in (LONG_NAME, *EXTENDED, *UNUSED):
            if size > MAX_TEXT or data + size > file.size:
                raise ValueError(f"no header of a tar at byte {at}: of {size} bytes")
            if kind == LONG_NAME:
                long_name = _text(file.read(data, size))
            elif kind in EXTENDED:
                records = dict(_records(file.read(data, size)))
                sparse = any(key.startswith(b"GNU.sparse.") for key in records)
                long_name = _text(records[b"path"]) if b"path" in records else long_name
                long_size = _size(records[b"size"], at) if b"size" in records else long_size
            at = _next_block(data + size)
            continue
        name = name if long_name is None else long_name
        size = size if long_size is None else long_size
        if kind == FOLDER or (kind == b"\0" and name.endswith("/")):
            kind, size = FOLDER, 0
        if size < 0:
            raise ValueError(f"no header of a tar at byte {at}: of {size} bytes")
        if data + size > file.size:
            raise ValueError(f"the file ends within {name!r}, at byte {file.size}")
        member = Member(name, SPARSE if sparse else kind, start, data, size)
        yield member
        start = at = member.end
        long_name, long_size, sparse = None, None, False


def _size(text: bytes, at: int) -> int:
    """A size that pax gives, of less than 10^18. Raises ValueError for any other text."""
    if not re.fullmatch(rb"[0-9]{1,18}", text):
        raise ValueError(f"no header of a tar at byte {at}: {text!r:.60} is no size")
    return int(text)


def _header(block: bytes) -> tuple[str, int, bytes]:
    """(name, size, kind). Raises ValueError where the checksum is not right."""
    if len(block) < BLOCK:
        raise ValueError("the file ends")
    if sum(block) - sum(block[148:156]) + 8 * ord(" ") != _number(block[148:156]):
        raise ValueError("its checksum is wrong")
    name = _text(block[:100])
    if block[345] and block[257:263] == b"ustar\0":
        name = f"{_text(block[345:500])}/{name}"
    return name, _number(block[124:136]), block[156:157]


def _number(field: bytes) -> int:
    """Reads a number in octal, or a larger one in binary."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.partition(b"\0")[0].strip()
    if text and not text.isdigit():
        raise ValueError(f"{text!r} is no octal number")
    return int(text or b"0", 8)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _records(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields the records of pax: "%d key=value\\n", where the number is the length of it all."""
    at = 0
    while found := re.compile(rb"(\d+) ([^=]+)=").match(content, at):
        end = at + int(found[1])
        yield found[2], content[found.end() : end - 1]
        at = max(end, found.end())


def _next_block(byte: int) -> int:
    return -(-byte // BLOCK) * BLOCK
