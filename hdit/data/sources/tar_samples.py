"""Samples as WebDataset lays them out: members of one name up to the first dot, in a row."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from hdit.data.images import EXHAUSTED, extensions
from hdit.data.source import DataError
from hdit.data.sources.archive import leads_out
from hdit.data.sources.listing import count_left_out, is_hidden
from hdit.data.sources.shard_paths import find_shards
from hdit.data.sources.tar_members import FOLDER, REFUSED, Member, TarFile, members

OPEN_SHARDS = 64  # files that a process holds open


class Entry(NamedTuple):
    """A sample as its headers tell it, or the damage in its place."""

    shard: int
    start: int  # of its first header
    end: int | None  # where the next one may start; None at the end of a shard
    name: str  # of its image
    image: tuple[int, int] | None = None  # start and size
    label: tuple[int, int] | None = None
    trouble: str | None = None  # why it is bad


class Shards:
    """The samples of some tar files, shard by shard, of which nothing but headers is read.

    A sample that has no image or no label is bad, and so is the place where a shard is damaged:
    what comes before it is used, and what comes after it is lost.
    """

    def __init__(self, place: str, label_extension: str, labelled: bool):
        """Finds the files that `place` names. Raises DataError.

        If `labelled`, a sample needs a member of `label_extension`.
        """
        self.place, self.label_extension, self.labelled = place, label_extension, labelled
        self.paths = find_shards(place)
        sizes = [os.path.getsize(path) for path in self.paths]
        listing = "\n".join(f"{p.name} {n}" for p, n in zip(self.paths, sizes, strict=True))
        digest = hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        self.identity = {"number": len(sizes), "bytes": sum(sizes), "digest": digest}
        self._open = lru_cache(OPEN_SHARDS)(self._open_shard)

    def __getstate__(self) -> dict[str, Any]:
        """State for a process that is not a fork, which opens the files again."""
        return {key: value for key, value in vars(self).items() if key != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open = lru_cache(OPEN_SHARDS)(self._open_shard)

    def _open_shard(self, shard: int) -> TarFile:
        return TarFile(os.open(self.paths[shard], os.O_RDONLY))

    def read(self, shard: int, start: int, size: int) -> bytes:
        """Reads `size` bytes of a shard from `start` on."""
        return self._open(shard).read(start, size)

    def entries(
        self, shard: int, start: int = 0, left_out: Counter[str] | None = None
    ) -> Iterator[Entry]:
        """Yields the entries of a shard from the header at `start` on, and one for damage, if any.

        Members that belong to no sample are counted in `left_out`, by extension. Raises DataError
        for a member that would leave the folder that it is unpacked in.
        """
        group: list[tuple[str, Member]] = []  # by extension
        key, at = "", start
        trouble: str | None = None
        try:
            for member in members(self._open(shard), start):
                at = member.end
                self._refuse(shard, member)
                parts = _split(member)
                if parts is None:
                    if left_out is not None and member.kind != FOLDER:
                        left_out.update(count_left_out([_relative(member.name)]))
                    continue
                if group and parts[0] != key:
                    yield self._entry(shard, group, member.start)
                    group = []
                key = parts[0]
                group.append((parts[1], member))
        except DataError:
            raise
        except OSError as error:
            if error.errno in EXHAUSTED:
                raise
            raise DataError(
                f"{self.paths[shard]}: cannot be read: {error}; the same command goes on"
            ) from None
        except ValueError as error:
            trouble = str(error)
        if group:
            entry = self._entry(shard, group, None if trouble is None else at)
            if trouble is None or entry.trouble is None:
                yield entry
        if trouble is not None:
            yield Entry(shard, at, None, "", trouble=trouble)

    def members_of(self, entry: Entry) -> Iterator[tuple[str, Member]]:
        """Yields (extension, member) of the sample of an entry."""
        for member in members(self._open(entry.shard), entry.start):
            if (parts := _split(member)) is not None:
                yield parts[1], member
            if entry.end is not None and member.end >= entry.end:
                return  # what comes next may be damaged

    def all_entries(self, left_out: Counter[str] | None = None) -> Iterator[Entry]:
        """Yields the entries of all shards, in the order that they lie in; `left_out` as above."""
        for shard in range(len(self.paths)):
            yield from self.entries(shard, left_out=left_out)

    def _entry(self, shard: int, group: list[tuple[str, Member]], end: int | None) -> Entry:
        image = next((m for extension, m in group if f".{extension}" in extensions()), None)
        label = next((m for extension, m in group if extension == self.label_extension), None)
        trouble = None
        if image is None:
            trouble = "has no image"
        elif len(dict(group)) < len(group):
            trouble = "is there twice"
        elif self.labelled and label is None:
            trouble = f"has no .{self.label_extension}"
        if trouble is not None:
            trouble += f" (it has {', '.join(f'.{extension}' for extension, _ in group)})"
        if image is None and any(f".{e.rpartition('.')[2]}" in extensions() for e, _ in group):
            trouble = f"{trouble}; the name of a sample ends at its first dot"
        first = group[0][1]
        return Entry(
            shard,
            first.start,
            end,
            (image or first).name,
            None if image is None else (image.data, image.size),
            None if label is None else (label.data, label.size),
            trouble,
        )

    def _refuse(self, shard: int, member: Member) -> None:
        if trouble := leads_out(member.name) or REFUSED.get(member.kind):
            raise DataError(
                f"data.path: {str(self.paths[shard])!r} is refused: its member {member.name!r} "
                f"{trouble}"
            )

    def name(self, entry: Entry) -> str:
        """Names the image of an entry with its shard."""
        path = str(self.paths[entry.shard])
        return f"{path}/{entry.name}" if entry.name else path


def _split(member: Member) -> tuple[str, str] | None:
    """(name of the sample, extension); None for a member that belongs to no sample."""
    name = _relative(member.name)
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if member.kind == FOLDER or not dot or is_hidden(name):
        return None
    return f"{folder}{slash}{stem}", extension.lower()


def _relative(name: str) -> str:
    while name.startswith("./"):
        name = name[2:]
    return name
