"""Paths with braces and wildcards, as in train-{000..146}.tar or *.tar, and their files."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from hdit.data.images import refuse_path
from hdit.data.kinds import COMPRESSED_TARS
from hdit.data.source import DataError
from hdit.names import path_of

MAX_SHARDS = 1_000_000
SHOWN_SHARDS = 20  # of those that are missing


def find_shards(path: str) -> list[Path]:
    """Finds the files that a path with braces and wildcards names. Raises DataError."""
    where = f"data.path: {path!r}"
    if re.match(r"pipe:|\w+://", path):
        raise DataError(f"{where} must be files; mount them here, or copy them")
    names = [path]
    if not os.path.exists(path_of(path)):
        try:
            names = list(islice(expand(path), MAX_SHARDS + 1))
        except ValueError as error:
            raise DataError(f"{where} {error}") from None
        except RecursionError:
            raise DataError(f"{where} has too many braces, one in another") from None
    if len(names) > MAX_SHARDS:
        raise DataError(f"{where} names more than {MAX_SHARDS:,} files")
    found, absent = _matching(names)
    if absent == [path]:
        if any(path_of(path).glob("*.tar")):
            raise DataError(f"{where} is a folder; name the files in it, as in '{path}/*.tar'")
        raise refuse_path(path, "tar", "is not a file")
    if absent:
        listing = ", ".join(absent[:SHOWN_SHARDS])
        more = f" and {len(absent) - SHOWN_SHARDS} more" if absent[SHOWN_SHARDS:] else ""
        raise DataError(f"{where}: {len(absent)} of {len(names)} are missing: {listing}{more}")
    _refuse_unusable(found, where)
    return found


def _matching(names: list[str]) -> tuple[list[Path], list[str]]:
    """The files that names with wildcards match, and the names that match none."""
    found: list[Path] = []
    absent: list[str] = []
    for name in names:
        place = path_of(name)
        if os.path.isfile(place):  # False also for a name that is too long
            found.append(place)
        elif matches := sorted(glob.glob(str(place))) if re.search(r"[*?[]", name) else []:
            found += map(Path, matches)
        else:
            absent.append(name)
    return found, absent


def _refuse_unusable(found: list[Path], where: str) -> None:
    """Raises DataError for what is no file, is compressed, or is named twice."""
    real: dict[str, Path] = {}
    for place in found:
        if not os.path.isfile(place):
            raise DataError(f"{where}: {place} is not a file")
        named_so = place.name.lower().endswith(COMPRESSED_TARS)
        if named_so or (place is found[0] and _is_compressed(place)):  # the others are like it
            raise DataError(
                f"{where}: {place} is compressed, and can be read from its start alone; unpack it "
                "to a .tar, which is hardly larger: images are compressed already"
            )
        if (other := real.setdefault(os.path.realpath(place), place)) is not place:
            raise DataError(f"{where} names {place} twice, also as {other}")


COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")
"""First bytes of files of gzip, bzip2, xz, Zstandard and lz4."""


def _is_compressed(place: Path) -> bool:
    """Whether a file begins as a compressed one, whatever its name."""
    try:
        with place.open("rb", buffering=0) as file:
            start = file.read(512)
    except OSError:
        return False  # whoever opens it says why it cannot be read
    return start.startswith(COMPRESSED) and start[257:262] != b"ustar"  # or it is a name


def expand(text: str) -> Iterator[str]:
    """Expands "{000..146}" and "{a,b}" as a shell does, also several, or one in another.

    Raises ValueError for braces that are not such.
    """
    head, brace, rest = text.partition("{")
    if not brace:
        yield text
        return
    parts: list[str] = []
    depth, start = 1, 0
    for at, sign in enumerate(rest):
        depth += (sign == "{") - (sign == "}")
        if depth == 0 or (depth == 1 and sign == ","):
            parts.append(rest[start:at])
            start = at + 1
        if depth == 0:
            break
    else:
        raise ValueError("has a { without its }")
    tails = list(islice(expand(rest[start:]), MAX_SHARDS + 1))
    if len(tails) > MAX_SHARDS:
        raise ValueError(f"names more than {MAX_SHARDS:,} files")
    for part in _numbers(parts[0]) if len(parts) == 1 else parts:
        for middle in expand(part):
            yield from (head + middle + tail for tail in tails)


def _numbers(text: str) -> Iterator[str]:
    """000..146, with as many digits."""
    if not (ends := re.fullmatch(r"(\d+)\.\.(\d+)", text)):
        raise ValueError(f"has {{{text}}}, which is neither {{0..9}} nor {{a,b}}")
    low, high = int(ends[1]), int(ends[2])
    if not 0 <= high - low < MAX_SHARDS:
        raise ValueError(f"has {{{text}}}, which must go up, by less than {MAX_SHARDS:,}")
    is_padded = any(len(end) > 1 and end[0] == "0" for end in ends.groups())
    width = max(map(len, ends.groups())) if is_padded else 1
    return (f"{number:0{width}}" for number in range(low, high + 1))
