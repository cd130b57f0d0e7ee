"""Arrays of numbers in npz files, which may come from anywhere.

Nothing is allocated by what a header says before it is compared with what the file has, and no
pickle is read. Members that are not compressed are mapped, so that they may be larger than memory.
"""

from __future__ import annotations

import io
import lzma
import math
import struct
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from hdit.errors import UserError

MAX_HEADER = 10_000  # bytes; of plain arrays it is about 100
MAX_SIDES = 32  # of an array
CHUNK = 2**20
FREE = 256 * 2**20  # bytes that any member may unpack to, however small it is
MAX_RATIO = 200  # of unpacked to compressed, beyond that; pixels reach 100 at most
UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    RuntimeError,  # also of a compression or encryption that is not known
    OverflowError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)
"""Exceptions that a damaged zip, or a damaged member of one, leads to."""


class ArraysError(UserError):
    """An npz file that cannot be read: names the file; the `reason` names the array, and why."""

    def __init__(self, path: Path, reason: str):
        self.reason = reason
        super().__init__(f"{path}: {reason}")


class _Trouble(Exception):
    """The reason why an array cannot be read."""


class Npz(NamedTuple):
    """The names of all that a file holds, and the arrays that were asked for and are there."""

    names: list[str]
    arrays: dict[str, np.ndarray]


def read_npz(path: Path, wanted: Sequence[str]) -> Npz:
    """Reads arrays of real numbers: mapped, or unpacked where they are compressed.

    Raises ArraysError where the file or a wanted array is damaged, holds anything else (Python
    objects, text, records), is not as long as it says, or would not fit in memory.
    """
    if not path.is_file():
        raise ArraysError(path, "is not a regular file")
    try:
        with zipfile.ZipFile(path) as file:
            members = _members(file)
            arrays: dict[str, np.ndarray] = {}
            left = available_memory()
            for name in wanted:
                if name in members:
                    arrays[name], used = _read(file, path, members[name], left)
                    left -= used
    except _Trouble as error:
        raise ArraysError(path, str(error)) from None
    except UNREADABLE as error:
        reason = str(error) or type(error).__name__
        raise ArraysError(path, f"no npz file, or damaged: {reason}") from None
    return Npz(list(members), arrays)


def available_memory() -> float:
    """Bytes of memory that can be had without swapping; infinite where the system does not tell."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        return int(text.partition("MemAvailable:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return math.inf


def _members(file: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The members by the names of their arrays. Raises _Trouble for two of one name."""
    members: dict[str, zipfile.ZipInfo] = {}
    for member in file.infolist():
        name = member.filename.removesuffix(".npy")
        if name in members:
            raise _Trouble(f"holds {name!r} twice")
        members[name] = member
    return members


def _read(
    file: zipfile.ZipFile, path: Path, member: zipfile.ZipInfo, memory: float
) -> tuple[np.ndarray, int]:
    """Reads an array of at most `memory` bytes -> (array, bytes of memory that it takes)."""
    where = member.filename.removesuffix(".npy")
    try:
        with file.open(member) as stream:
            shape, fortran, dtype = _header(stream, where)
            start, size = stream.tell(), math.prod(shape) * dtype.itemsize
            _check_size(member, start, size, where)
            stored = member.compress_type == zipfile.ZIP_STORED and size > 0
            if not stored:
                _check_memory(member, size, memory, where)
                flat = _fill(stream, size, where).view(dtype)
        if stored:
            offset = _content_start(path, member) + start
            if offset + size > path.stat().st_size:
                raise _Trouble(f"{where}: ends beyond the end of the file, which is cut off")
            flat = np.memmap(path, dtype, "r", offset, (size // dtype.itemsize,))
    except UNREADABLE as error:
        raise _Trouble(f"{where}: damaged: {str(error) or type(error).__name__}") from None
    return flat.reshape(shape, order="F" if fortran else "C"), 0 if stored else size


def _header(stream: IO[bytes], where: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, in Fortran's order, dtype); the stream is left where the values begin."""
    version, text = _header_text(stream, where)
    parse = (np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0)[version - 1]
    try:
        with warnings.catch_warnings(action="ignore"):  # of an array that Python 2 wrote
            shape, fortran, dtype = parse(io.BytesIO(text), max_header_size=MAX_HEADER)
    except Exception as error:  # it is parsed as Python, whose parser raises many kinds
        reason = str(error).partition("\n")[0]
        raise _Trouble(f"{where}: has no header of an array: {reason:.200}") from None
    if any(type(n) is not int or n < 0 for n in shape) or len(shape) > MAX_SIDES:
        raise _Trouble(f"{where}: must have sides from 0 up, got the shape {shape!r:.200}")
    if dtype.hasobject:
        raise _Trouble(f"{where} holds Python objects, and no pickle is read")
    if dtype.kind not in "iuf" or not dtype.itemsize:
        raise _Trouble(f"{where}: must hold real numbers, got dtype {dtype!s:.200}")
    return shape, fortran, dtype


def _header_text(stream: IO[bytes], where: str) -> tuple[int, bytes]:
    """The version of npy, 1 or 2, and the header with its length, which must not be long."""
    start = stream.read(8)
    if start[:6] != b"\x93NUMPY":
        raise _Trouble(f"{where}: is no array of numpy: it begins with {start!r}")
    if start[6:] not in (b"\1\0", b"\2\0"):  # 3.0 is of records whose names are not ASCII
        version = ".".join(map(str, start[6:]))
        raise _Trouble(f"{where}: has version {version} of npy, where 1.0 and 2.0 are read")
    length = stream.read(2 * start[6])
    size = int.from_bytes(length, "little")
    if size > MAX_HEADER:
        raise _Trouble(f"{where}: has a header of {size:,} bytes, which no array has")
    return start[6], length + stream.read(size)


def _check_size(member: zipfile.ZipInfo, start: int, size: int, where: str) -> None:
    """Raises _Trouble where the header promises other than the archive says that there is."""
    sizes = {member.file_size}
    if member.compress_type == zipfile.ZIP_STORED:
        sizes.add(member.compress_size)
    for held in sizes - {start + size}:
        raise _Trouble(
            f"{where}: its header tells of {size:,} bytes, but it has {held - start:,}; it is "
            "damaged or cut off"
        )


def _check_memory(member: zipfile.ZipInfo, size: int, memory: float, where: str) -> None:
    """Raises _Trouble for a compressed array that is not worth unpacking, or too large."""
    if size > max(FREE, MAX_RATIO * member.compress_size):
        raise _Trouble(
            f"{where}: {member.compress_size:,} bytes unpack to {size:,}, which no real data do; "
            "save it with numpy.savez, uncompressed"
        )
    if size > memory:
        raise _Trouble(
            f"{where}: unpacks to {size:,} bytes, more than the {memory:,.0f} of memory that are "
            "free; save it with numpy.savez, uncompressed, which is read in place"
        )


def _fill(stream: Any, size: int, where: str) -> np.ndarray:
    """The next `size` bytes, (size,) uint8, which must be the last."""
    try:
        values = np.empty(size, np.uint8)
    except MemoryError as error:
        raise _Trouble(f"{where}: {error}") from None
    view, at = values.data, 0
    while at < size:
        count = stream.readinto(view[at : at + CHUNK])
        if not count:
            raise _Trouble(f"{where}: ends after {at:,} of {size:,} bytes")
        at += count
    stream.read(1)  # at the end, where the checksum is compared
    return values


def _content_start(path: Path, member: zipfile.ZipInfo) -> int:
    """Byte at which the content of a member that is not compressed begins."""
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)
        name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
    return member.header_offset + 30 + name + extra
