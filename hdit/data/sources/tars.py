"""Tar files of images as WebDataset lays them out, read as a stream.

The members of a sample follow one another and have one name up to the first dot: `0001.jpg` and
`0001.cls` are a picture and its class. Nothing is unpacked, and no index is made before training
starts: headers are read as the stream goes on, from a file in memory about 70,000 a second.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from PIL import Image
from pydantic import BeforeValidator, Field, ValidationInfo, field_validator
from torch import Tensor

from hdit import randomness
from hdit.data.batches import permutation
from hdit.data.pictures import (
    COMPRESSED_TARS,
    EXHAUSTED,
    MAX_CLASSES,
    MIN_DRAWN,
    BadFiles,
    PicturesSpec,
    extensions,
    open_picture,
    refuse_path,
    to_pixels,
)
from hdit.data.source import CENTER, Chance, DataError, Sample
from hdit.data.sources.archive import BYTES_OF_A_PIXEL, leads_out
from hdit.data.sources.listing import is_hidden, order

MAX_SHARDS = 1_000_000
MAX_TEXT = 1 << 20  # bytes of a label, or of a header that gives another a long name
OPEN_SHARDS = 64  # files that a process holds open
SHOWN_SHARDS = 20  # of those that are missing


# ---- settings ------------------------------------------------------------------------------------


def _number_or_names(classes: Any) -> Any:
    if type(classes) is int and 0 <= classes <= MAX_CLASSES:
        return classes
    if isinstance(classes, list | tuple) and classes and all(type(c) is str for c in classes):
        if len(set(classes)) < len(classes):
            raise ValueError("must name each class once")
        if any(name.isdigit() for name in classes):
            raise ValueError("must not name a class by a number, which is an index")
        return list(classes)
    raise ValueError("must be the number of classes, or a list of their names")


Classes = Annotated[int | list[str], BeforeValidator(_number_or_names)]


class TarSpec(PicturesSpec):
    """WebDataset's tar files, on a local disk or a mounted one.

    Which image is drawn when depends on the seed, the shards and the buffer alone: each pass takes
    the shards in a new order, and draws from a buffer that their images pass through. Where it
    holds all of them, they are drawn as the same pictures in a folder are.
    """

    kind: Literal["tar"] = "tar"
    path: str = Field(
        description="a file or several, as in train-{000000..000146}.tar, {a,b}.tar or *.tar"
    )
    shuffle_buffer: int = Field(
        10_000, ge=0, description="images that one is drawn from; 0 or 1 leaves a shard's order"
    )
    classes: Classes | None = Field(  # type: ignore[assignment]
        None, description="how many, or their names; 0 to leave labels unused"
    )
    label_key: str | None = Field(
        None,
        pattern=r"^[^./]+(\..+)?$",
        description="extension of a sample's label, or json.KEY for a part of it; cls if absent",
    )

    @field_validator("label_key")
    @classmethod
    def _only_with_classes(cls, key: str | None, info: ValidationInfo) -> str | None:
        if key is not None and not info.data.get("classes"):
            raise ValueError("has no effect without data.classes")
        return key

    @field_validator("cache")
    @classmethod
    def _never(cls, folder: str | None) -> str | None:
        if folder is not None:
            raise ValueError("cannot be used with kind = 'tar': its images have no index")
        return folder

    def open(self) -> Tars:
        """Finds the files, and reads up to the first image. Raises DataError."""
        return Tars(self)


# ---- which files ---------------------------------------------------------------------------------


def find(path: str) -> list[Path]:
    """The files that a path with braces and wildcards names. Raises DataError."""
    where = f"data.path: {path!r}"
    if re.match(r"pipe:|\w+://", path):
        raise DataError(f"{where} must be files; mount them here, or copy them")
    names = [path]
    if not os.path.exists(Path(path).expanduser()):
        try:
            names = list(islice(expand(path), MAX_SHARDS + 1))
        except ValueError as error:
            raise DataError(f"{where} {error}") from None
    if len(names) > MAX_SHARDS:
        raise DataError(f"{where} names more than {MAX_SHARDS:,} files")
    found: list[Path] = []
    absent: list[str] = []
    for name in names:
        place = Path(name).expanduser()
        if place.is_file():
            found.append(place)
        elif matches := sorted(glob.glob(str(place))) if re.search(r"[*?[]", name) else []:
            found += map(Path, matches)
        else:
            absent.append(name)
    if absent == [path]:
        if any(Path(path).expanduser().glob("*.tar")):
            raise DataError(f"{where} is a folder; name the files in it, as in '{path}/*.tar'")
        raise refuse_path(path, "tar", "is not a file")
    if absent:
        listing = ", ".join(absent[:SHOWN_SHARDS])
        more = f" and {len(absent) - SHOWN_SHARDS} more" if absent[SHOWN_SHARDS:] else ""
        raise DataError(f"{where}: {len(absent)} of {len(names)} are missing: {listing}{more}")
    real: dict[str, Path] = {}
    for place in found:
        if not place.is_file():
            raise DataError(f"{where}: {place} is not a file")
        if place.name.lower().endswith(COMPRESSED_TARS):
            raise DataError(
                f"{where}: {place} is compressed, and can be read from its start alone; unpack it "
                "to a .tar, which is hardly larger: images are compressed already"
            )
        if (other := real.setdefault(os.path.realpath(place), place)) is not place:
            raise DataError(f"{where} names {place} twice, also as {other}")
    return found


def expand(text: str) -> Iterator[str]:
    """What a shell makes of "{000..146}" and "{a,b}", also of several, or one in another."""
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


# ---- the format ----------------------------------------------------------------------------------

BLOCK = 512
FOLDER, SPARSE, LONG_NAME = b"5", b"S", b"L"
EXTENDED = (b"x", b"X")  # pax: of the next member
UNUSED = (b"g", b"K")  # pax of all members, and a long target of a link
REFUSED = {
    b"1": "is a link",
    b"2": "is a link",
    b"3": "is a device",
    b"4": "is a device",
    b"6": "is a pipe",
    SPARSE: "is stored with holes; make the tar without --sparse",
}


class File:
    """Read at any place. A fork can use it too, for it has no position; closed when let go."""

    def __init__(self, handle: int):
        self.handle, self.size = handle, os.fstat(handle).st_size

    def __del__(self) -> None:
        os.close(self.handle)

    def read(self, start: int, size: int) -> bytes:
        return os.pread(self.handle, size, start)


class Member(NamedTuple):
    name: str
    kind: bytes
    start: int  # of its first header
    data: int
    size: int

    @property
    def end(self) -> int:
        return _next_block(self.data + self.size)


def members(file: File, start: int) -> Iterator[Member]:
    """Those of a tar (ustar, GNU or pax) from the header at `start` on.

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
                if b"path" in records:
                    long_name = _text(records[b"path"])
                if b"size" in records:
                    long_size = int(records[b"size"])
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
    """In octal, or for what octal has no room for in binary."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.partition(b"\0")[0].strip()
    if text and not text.isdigit():
        raise ValueError(f"{text!r} is no octal number")
    return int(text or b"0", 8)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _records(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Of pax: "%d key=value\\n", where the number is the length of it all."""
    at = 0
    while found := re.compile(rb"(\d+) ([^=]+)=").match(content, at):
        end = at + int(found[1])
        yield found[2], content[found.end() : end - 1]
        at = max(end, found.end())


def _next_block(byte: int) -> int:
    return -(-byte // BLOCK) * BLOCK


# ---- samples -------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A sample as its headers tell it, or what stands in the place of one."""

    shard: int
    start: int  # of its first header
    end: int | None  # where the next one may start; None at the end of a shard
    name: str  # of its image
    image: tuple[int, int] | None = None  # start and size
    label: tuple[int, int] | None = None
    trouble: str | None = None  # why it is bad


class Reference(NamedTuple):
    """What an order calls an image."""

    epoch: int
    shard: int
    start: int  # of its first header


class Tars:
    """A stream of labelled images, in which the next good one of a shard stands in for a bad one.

    A sample that has no image or no label is bad, and so is the place where a shard is damaged:
    what comes before it is used, and what comes after it is lost.
    """

    setting = "data.path"

    def __init__(self, spec: TarSpec):
        self.spec, self.place = spec, spec.path
        self.paths = find(spec.path)
        sizes = [os.path.getsize(path) for path in self.paths]
        listing = "\n".join(f"{p.name} {n}" for p, n in zip(self.paths, sizes, strict=True))
        digest = hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        self.identity = {"number": len(sizes), "bytes": sum(sizes), "digest": digest}
        names = spec.classes or []
        self.classes = [str(i) for i in range(names)] if isinstance(names, int) else names
        self.indices = {name: i for i, name in enumerate(self.classes)}
        extension, _, self.key_in_label = (spec.label_key or "cls").partition(".")
        self.label_extension = extension.lower()
        self.bad: BadFiles[Entry] = BadFiles(spec, self.setting, self.place)
        self.epoch = 0  # of the image that was drawn last
        self._open = lru_cache(OPEN_SHARDS)(self._open_shard)
        self._check_first()

    def __getstate__(self) -> dict[str, Any]:
        """For a process that is not a fork, which opens the files again."""
        return {key: value for key, value in vars(self).items() if key != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open = lru_cache(OPEN_SHARDS)(self._open_shard)

    def _open_shard(self, shard: int) -> File:
        return File(os.open(self.paths[shard], os.O_RDONLY))

    def _check_first(self) -> None:
        """Raises DataError where there is no image, or its labels are not what the settings say."""
        entries = (entry for entry in self._entries_of_all() if entry.image is not None)
        first = list(islice(entries, MIN_DRAWN))
        labelled = next((entry for entry in first if entry.label is not None), None)
        if not first:
            bad = next(self._entries_of_all(), None)
            why = f"; the first: {self._name(bad)}: {bad.trouble}" if bad else ""
            raise DataError(f"data.path: {self.place!r} has no image that can be read{why}")
        if labelled and self.spec.classes is None:
            raise DataError(
                f"data.classes: must be set, for {self._name(labelled)} has a "
                f".{self.label_extension}: how many classes, or their names; 0 leaves them unused"
            )
        if self.classes and not labelled:
            raise DataError(
                f"data.label_key: {self._name(first[0])} {first[0].trouble}; name what has the "
                "label, as in 'json.label', or set data.classes = 0"
            )

    def entries(self, shard: int, start: int = 0) -> Iterator[Entry]:
        """Those of a shard from the header at `start` on, and where it is damaged, one for that.

        Raises DataError for a member that would leave the folder that it is unpacked in.
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

    def _entries_of_all(self) -> Iterator[Entry]:
        for shard in range(len(self.paths)):
            yield from self.entries(shard)

    def _entry(self, shard: int, group: list[tuple[str, Member]], end: int | None) -> Entry:
        image = next((m for extension, m in group if f".{extension}" in extensions()), None)
        label = next((m for extension, m in group if extension == self.label_extension), None)
        trouble = None
        if image is None:
            trouble = "has no image"
        elif len(dict(group)) < len(group):
            trouble = "is there twice"
        elif self.classes and label is None:
            trouble = f"has no .{self.label_extension}"
        if trouble is not None:
            trouble += f" (it has {', '.join(f'.{extension}' for extension, _ in group)})"
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

    def _name(self, entry: Entry) -> str:
        path = str(self.paths[entry.shard])
        return f"{path}/{entry.name}" if entry.name else path

    # ---- images ----------------------------------------------------------------------------------

    def __getitem__(self, reference: Reference) -> Sample:
        """The image that is called so; where it cannot be read, the next one of its shard.

        Raises DataError where too many are bad, or one where none may be.
        """
        return self.draw(reference, CENTER)

    def draw(self, reference: Reference, chance: Chance) -> Sample:
        """The same, with the window that a random crop takes by `chance`."""
        if reference.epoch != self.epoch:
            self.epoch = reference.epoch
            if self.bad.num_drawn >= MIN_DRAWN:  # or few would never be judged
                self.bad.count_anew()
        return self.bad.draw(
            self._candidates(reference), lambda entry: self._load(entry, chance), self._name
        )

    def _candidates(self, reference: Reference) -> Iterator[Entry]:
        """An entry and what may stand in for it: the others of its shard, then other shards."""
        _, shard, start = reference
        after = self.entries(shard, start)
        entry = next(after, None)
        if entry is None or entry.start != start:
            raise DataError(f"{self.paths[shard]}: has changed while it was read; start again")
        yield entry
        yield from after
        for entry in self.entries(shard):
            if entry.start >= start:
                break
            yield entry
        for further in range(1, len(self.paths)):
            yield from self.entries((shard + further) % len(self.paths))

    def _load(self, entry: Entry, chance: Chance) -> tuple[Tensor, int]:
        image, label = self._open_picture(entry)
        with image:
            return to_pixels(image, self.spec, chance), label

    def _open_picture(self, entry: Entry) -> tuple[Image.Image, int]:
        if entry.trouble is not None:
            raise ValueError(entry.trouble)
        assert entry.image is not None, "or it would have been said"
        label = self._label(entry) if self.classes else 0
        if entry.image[1] > BYTES_OF_A_PIXEL * self.spec.max_pixels:
            raise ValueError(
                f"has {entry.image[1]} bytes, more than data.max_pixels = "
                f"{self.spec.max_pixels} can take"
            )
        return open_picture(self._open(entry.shard).read(*entry.image)), label

    def _label(self, entry: Entry) -> int:
        """The class index. Raises DataError for one that is none of the classes."""
        assert entry.label is not None, "or it would have been said"
        start, size = entry.label
        if size > MAX_TEXT:
            raise ValueError(f"has a .{self.label_extension} of {size} bytes")
        text = self._open(entry.shard).read(start, size).decode("utf-8-sig")
        if self.key_in_label:
            content = json.loads(text)
            label = content.get(self.key_in_label) if isinstance(content, dict) else None
            if type(label) not in (int, str):
                raise ValueError(f"has no {self.key_in_label} in its .{self.label_extension}")
            text = str(label)
        text = text.strip()
        if not text:
            raise ValueError(f"has a .{self.label_extension} that is empty")
        index = int(text) if re.fullmatch(r"[0-9]{1,18}", text) else self.indices.get(text, -1)
        if not 0 <= index < len(self.classes):
            raise DataError(
                f"data.classes: {self._name(entry)} has the label {text!r:.60}, but a label must "
                f"be an index below {len(self.classes)}, or a name in data.classes"
            )
        return index

    # ---- the stream ------------------------------------------------------------------------------

    def order(self, seed: int, state: dict[str, Any] | None = None) -> TarOrder:
        """From the front, or from where another order was in `state`.

        Raises DataError where that was one of other shards.
        """
        return TarOrder(self, seed, state)

    def references(self) -> list[Reference]:
        """What an order calls the images. Reads all headers, once."""
        return [Reference(0, entry.shard, entry.start) for entry in self._entries_of_all()]

    def first(self) -> Sample:
        """The first image that can be read."""
        entry = next(self._entries_of_all())
        return self[Reference(0, entry.shard, entry.start)]

    def listed(self) -> TarEntries:
        """The same pictures by index, for a look at all of them. Reads all headers, once."""
        places = ((entry.shard, entry.start) for entry in self._entries_of_all())
        return TarEntries(self, np.array(list(places), np.int64).reshape(-1, 2))


class TarEntries:
    """Entries (see `Pictures`) of shards whose headers were all read."""

    setting = "data.path"

    def __init__(self, tars: Tars, places: np.ndarray):
        self.tars, self.places = tars, places  # (n 2): shard, and where in it
        self.place, self.classes = tars.spec.path, tars.classes

    def __len__(self) -> int:
        return len(self.places)

    def _entry(self, index: int) -> Entry:
        return next(self.tars.entries(*self.places[index].tolist()))

    def name(self, index: int) -> str:
        return self.tars._name(self._entry(index))

    def load(self, index: int) -> tuple[Image.Image, int]:
        return self.tars._open_picture(self._entry(index))

    def stamp(self, index: int) -> str:
        raise AssertionError("there is none: data.cache is refused")


def _split(member: Member) -> tuple[str, str] | None:
    """(name of the sample, extension); None for a member that belongs to no sample."""
    name = member.name
    while name.startswith("./"):
        name = name[2:]
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if member.kind == FOLDER or not dot or is_hidden(name):
        return None
    return f"{folder}{slash}{stem}", extension.lower()


class TarOrder:
    """The images of some shards without end, each once in a pass.

    A pass takes the shards in a new order, and image c of all that were given out from a random
    place in a buffer, whose size is that of `shuffle_buffer`; its place is taken by the next image
    of the shards. At the end of a pass the buffer runs empty. Where it holds all images, they are
    given out by the permutation that other sources have, of the same pictures.

    An image in the buffer takes about 140 bytes, and 15 in a state.
    """

    def __init__(self, tars: Tars, seed: int, state: dict[str, Any] | None):
        self.tars, self.seed = tars, seed
        self.seed_of_pass = seed  # which a resumed pass keeps
        self.limit = max(1, tars.spec.shuffle_buffer)
        self.passes = self.count = self.place = self.offset = 0
        self.is_permuted = False
        self.buffer: list[Reference] = []  # one more than `limit`, while there are more
        self.shards: list[int] = []
        self.ahead: Iterator[Entry] | None = None
        if state is None:
            return
        if (then := state.get("shards")) != (now := tars.identity):
            before, after = (
                f"{s['number']} files of {s['bytes']:,} bytes (digest {s['digest']})" if s else "?"
                for s in (then, now)
            )
            raise DataError(
                f"data.path: {tars.place!r} holds other shards than when the run was saved: "
                f"{before} then, {after} now; bring them back, or start anew with another --run"
            )
        self.passes, self.count = state["passes"], state["count"]
        self.seed_of_pass = state["seed"]
        self.place, self.offset = state["place"], state["offset"]
        self.is_permuted = state["is_permuted"]
        pairs = (text.split(":") for text in state["buffer"].split())
        self.buffer = [Reference(self.passes - 1, int(s), int(start)) for s, start in pairs]
        if self.passes:
            self._order_shards()

    def state(self) -> dict[str, Any]:
        return {
            "shards": self.tars.identity,
            "seed": self.seed_of_pass,
            "passes": self.passes,  # that were begun
            "count": self.count,  # images that were given out
            "place": self.place,  # of the shard that is read, in the order of this pass
            "offset": self.offset,  # where reading goes on in it
            "is_permuted": self.is_permuted,
            "buffer": " ".join(f"{r.shard}:{r.start}" for r in self.buffer),
        }

    def __iter__(self) -> TarOrder:
        return self

    def __next__(self) -> Reference:
        if not self.buffer:
            self._begin()
        if not self.is_permuted:
            at = _random(self.seed_of_pass, self.count) % min(len(self.buffer), self.limit)
            self.buffer[at], self.buffer[-1] = self.buffer[-1], self.buffer[at]
        reference = self.buffer.pop()
        if not self.is_permuted:
            self.buffer += (self._reference(entry) for entry in self._fill())
        self.count += 1
        return reference

    def _begin(self) -> None:
        """The next pass."""
        self.passes += 1
        self.seed_of_pass = self.seed
        self._order_shards()
        self.place, self.offset = 0, 0
        entries = list(self._fill())
        if not entries:
            raise DataError(f"data.path: {self.tars.place!r} has no samples any more")
        self.is_permuted = len(entries) <= self.limit
        if self.is_permuted:
            entries.sort(key=lambda entry: (order(entry.name), entry.shard, entry.start))
            chosen = permutation(self.seed, self.passes - 1, len(entries))
            entries = [entries[i] for i in reversed(chosen)]  # taken from the end
        self.buffer = [self._reference(entry) for entry in entries]

    def _order_shards(self) -> None:
        number = len(self.tars.paths)
        self.shards = permutation(self.seed_of_pass, self.passes - 1, number).tolist()

    def _reference(self, entry: Entry) -> Reference:
        return Reference(self.passes - 1, entry.shard, entry.start)

    def _fill(self) -> Iterator[Entry]:
        """As many of the next entries of this pass as the buffer has room for."""
        for _ in range(len(self.buffer), self.limit + 1):
            entry = self._read()
            if entry is None:
                return
            yield entry

    def _read(self) -> Entry | None:
        """The next entry of this pass; None at its end."""
        while self.place < len(self.shards):
            if self.ahead is None:
                self.ahead = self.tars.entries(self.shards[self.place], self.offset)
            entry = next(self.ahead, None)
            if entry is not None and entry.end is not None:
                self.offset = entry.end
                return entry
            self.place, self.offset, self.ahead = self.place + 1, 0, None
            if entry is not None:
                return entry
        return None


DRAWN_AT_ONCE = 1024


@lru_cache(maxsize=4)
def _random_block(seed: int, block: int) -> list[int]:
    counters = np.arange(block * DRAWN_AT_ONCE, (block + 1) * DRAWN_AT_ONCE)
    return randomness.bits(seed, "shuffle buffer", counters).tolist()


def _random(seed: int, counter: int) -> int:
    """64 bits for the counter-th image; many at once cost little more than one."""
    return _random_block(seed, counter // DRAWN_AT_ONCE)[counter % DRAWN_AT_ONCE]
