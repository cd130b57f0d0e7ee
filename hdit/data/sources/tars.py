"""Tar files of images as WebDataset lays them out, read as a stream.

The members of a sample follow one another and have one name up to the first dot: `0001.jpg` and
`0001.cls` are an image and its class. Nothing is unpacked, and no index is made before training
starts: headers are read as the stream goes on, from a file in memory about 70,000 a second.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image
from pydantic import BeforeValidator, Field, ValidationInfo, field_validator
from torch import Tensor

from hdit.bounds import Name
from hdit.data.images import (
    MIN_DRAWN,
    BadFiles,
    ImagesSpec,
    open_image,
    pixels_of,
)
from hdit.data.source import CENTER, Chance, DataError, Sample, check_class_names
from hdit.data.sources.archive import BYTES_OF_A_PIXEL
from hdit.data.sources.sheets import LIKE_LABELS
from hdit.data.sources.tar_members import MAX_TEXT
from hdit.data.sources.tar_order import Reference, TarOrder
from hdit.data.sources.tar_samples import Entry, Shards
from hdit.limits import MAX_CLASSES
from hdit.names import printable
from hdit.reading import ReadingError, parse_json


def _is_index(text: str) -> bool:
    return re.fullmatch(r"[0-9]{1,18}", text) is not None


def _number_or_names(classes: Any) -> Any:
    if type(classes) is int and 0 <= classes <= MAX_CLASSES:
        return classes
    if isinstance(classes, list | tuple) and classes and all(type(c) is str for c in classes):
        check_class_names(list(classes))
        return list(classes)
    raise ValueError("must be the number of classes, or a list of their names")


Number = Annotated[int, Field(ge=0, le=MAX_CLASSES)]
Classes = Annotated[Number | list[str], BeforeValidator(_number_or_names)]


class TarSpec(ImagesSpec):
    """WebDataset's tar files, on a local disk or a mounted one.

    Which image is drawn when depends on the seed, the shards and the buffer alone: each pass takes
    the shards in a new order, and draws from a buffer that their images pass through. Where it
    holds all of them, they are drawn as the same images in a folder are.
    """

    kind: Literal["tar"] = "tar"
    path: Name = Field(
        description="a file or several, as in train-{000000..000146}.tar, {a,b}.tar or *.tar"
    )
    shuffle_buffer: int = Field(
        10_000,
        ge=0,
        le=10**7,
        description="images that one is drawn from; 0 or 1 leaves a shard's order",
    )
    classes: Classes | None = Field(  # type: ignore[assignment]
        None, description="how many, or their names; 0 to leave labels unused"
    )
    label_key: Name | None = Field(
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


class Tars:
    """A stream of labelled images; the next good one of a shard stands in for a bad one."""

    setting = "data.path"

    def __init__(self, spec: TarSpec):
        """Finds the files, and reads up to the first image. Raises DataError."""
        self.spec, self.place = spec, spec.path
        names = spec.classes or []
        self.classes = [str(i) for i in range(names)] if isinstance(names, int) else names
        self.indices = {name: i for i, name in enumerate(self.classes)}
        # where a name is a number, a number that is no name could be meant as either
        self.takes_indices = isinstance(names, int) or not any(map(_is_index, names))
        extension, _, self.key_in_label = (spec.label_key or "cls").partition(".")
        self.label_extension = extension.lower()
        self.shards = Shards(spec.path, self.label_extension, bool(self.classes))
        few = list(islice(self.shards.all_entries(), MIN_DRAWN))
        self.bad: BadFiles[Entry] = BadFiles(
            spec, self.setting, self.place, few=few if len(few) < MIN_DRAWN else None
        )
        self.epoch = 0  # of the image that was drawn last
        self.warnings = self._check_first()

    def _check_first(self) -> list[str]:
        """Warnings of what may be meant as labels, where no settings say that there are none.

        Raises DataError where there is no image, or its labels are not what the settings say.
        """
        entries = (entry for entry in self.shards.all_entries() if entry.image is not None)
        first = list(islice(entries, MIN_DRAWN))
        labelled = next((entry for entry in first if entry.label is not None), None)
        if not first:
            bad = next(self.shards.all_entries(), None)
            why = f"; the first: {self.shards.name(bad)}: {bad.trouble}" if bad else ""
            raise DataError(f"data.path: {self.place!r} has no image that can be read{why}")
        if labelled and self.spec.classes is None:
            raise DataError(
                f"data.classes: must be set, for {self.shards.name(labelled)} has a "
                f".{self.label_extension}: how many classes, or their names; 0 leaves them unused"
            )
        if self.classes and not labelled:
            raise DataError(
                f"data.label_key: {self.shards.name(first[0])} {first[0].trouble}; name what has "
                "the label, as in 'json.label', or set data.classes = 0; if its label comes later, "
                "make the tar with --sort=name, for the members of a sample follow one another"
            )
        if self.spec.classes is not None:
            return []
        return [*self._about_folders(first[0]), *self._about_json(first[0])]

    def _about_folders(self, entry: Entry) -> list[str]:
        if "/" not in entry.name.removeprefix("./"):
            return []
        return [
            f"data.path: folders in a tar, as that of {printable(self.shards.name(entry))}, are no "
            "classes; unpack it for a class of each, or set data.classes = 0 if there are none"
        ]

    def _about_json(self, entry: Entry) -> list[str]:
        """A warning of a key for labels in the .json of a sample, if it has one."""
        member = dict(self.shards.members_of(entry)).get("json")
        if member is None or member.size > MAX_TEXT:
            return []
        try:
            text = self.shards.read(entry.shard, member.data, member.size)
            content = parse_json(text, "its .json")
        except ReadingError:
            return []
        keys = content if isinstance(content, dict) else {}
        likely = [printable(key) for key in keys if LIKE_LABELS.search(key.lower())]
        return [
            f"data.path: the .json of {printable(self.shards.name(entry))} has {key!r}, which is "
            f"not used; set data.label_key='json.{key}' and data.classes to train with it, or "
            "data.classes = 0"
            for key in likely[:1]
        ]

    def __getitem__(self, reference: Reference) -> Sample:
        """The image of a reference; if it cannot be read, the next one of its shard.

        Raises DataError where too many are bad, or one where none may be.
        """
        return self.draw(reference, CENTER)

    def draw(self, reference: Reference, chance: Chance) -> Sample:
        """The image of a reference, with the window that a random crop takes by `chance`."""
        if reference.epoch != self.epoch:
            self.epoch = reference.epoch
            if self.bad.num_drawn >= MIN_DRAWN:  # or few would never be judged
                self.bad.count_anew()
        return self.bad.draw(
            self._candidates(reference), lambda entry: self._load(entry, chance), self.shards.name
        )

    def _candidates(self, reference: Reference) -> Iterator[Entry]:
        """An entry and what may stand in for it: the others of its shard, then other shards."""
        _, shard, start = reference
        after = self.shards.entries(shard, start)
        entry = next(after, None)
        if entry is None or entry.start != start:
            raise DataError(
                f"{self.shards.paths[shard]}: has changed while it was read; start again"
            )
        yield entry
        yield from after
        for entry in self.shards.entries(shard):
            if entry.start >= start:
                break
            yield entry
        for further in range(1, len(self.shards.paths)):
            yield from self.shards.entries((shard + further) % len(self.shards.paths))

    def _load(self, entry: Entry, chance: Chance) -> tuple[Tensor, int]:
        image, label = self.open_entry(entry)
        with image:
            return pixels_of(image, self.spec, chance), label

    def open_entry(self, entry: Entry) -> tuple[Image.Image, int]:
        """Opens the image of an entry, and reads its label. Raises ValueError for a bad one."""
        self._check(entry)
        label = self._label(entry) if self.classes else 0
        return open_image(self.content(entry)), label

    def _check(self, entry: Entry) -> None:
        if entry.trouble is not None:
            raise ValueError(entry.trouble)

    def content(self, entry: Entry) -> bytes:
        """The bytes of the image of an entry. Raises ValueError for a bad or a huge one."""
        self._check(entry)
        assert entry.image is not None, "or it would have been said"
        if entry.image[1] > BYTES_OF_A_PIXEL * self.spec.max_pixels:
            raise ValueError(
                f"has {entry.image[1]} bytes, more than data.max_pixels = "
                f"{self.spec.max_pixels} can take"
            )
        return self.shards.read(entry.shard, *entry.image)

    def _label(self, entry: Entry) -> int:
        """The class index. Raises DataError for one that is none of the classes."""
        assert entry.label is not None, "or it would have been said"
        start, size = entry.label
        if size > MAX_TEXT:
            raise ValueError(f"has a .{self.label_extension} of {size} bytes")
        text = self.shards.read(entry.shard, start, size).decode("utf-8-sig")
        if self.key_in_label:
            content = parse_json(text, f"its .{self.label_extension}")
            label = content.get(self.key_in_label) if isinstance(content, dict) else None
            if type(label) not in (int, str):
                raise ValueError(f"has no {self.key_in_label} in its .{self.label_extension}")
            text = str(label)
        text = text.strip()
        if not text:
            raise ValueError(f"has a .{self.label_extension} that is empty")
        index = self.indices.get(text, -1)
        if index < 0 and self.takes_indices and _is_index(text):
            index = int(text)
        if not 0 <= index < len(self.classes):
            way = "a name in data.classes"
            if self.takes_indices:
                way = f"an index below {len(self.classes)}, or {way}"
            raise DataError(
                f"data.classes: {printable(self.shards.name(entry))} has the label {text!r:.60}, "
                f"but a label must be {way}"
            )
        return index

    def order(self, seed: int, state: dict[str, Any] | None = None) -> TarOrder:
        """Begins a first pass, or goes on from another order's `state`.

        Raises DataError for a state of other shards.
        """
        return TarOrder(self.shards, self.spec.shuffle_buffer, seed, state)

    def references(self) -> list[Reference]:
        """References of all images, in the order that they lie in. Reads all headers, once."""
        return [Reference(0, entry.shard, entry.start) for entry in self.shards.all_entries()]

    def first(self) -> Sample:
        """The first image that can be read."""
        entry = next(self.shards.all_entries())
        return self[Reference(0, entry.shard, entry.start)]

    def listed(self) -> TarEntries:
        """The same images by index, for `hdit data check`. Reads all headers, once."""
        left_out: Counter[str] = Counter()
        places = [(entry.shard, entry.start) for entry in self.shards.all_entries(left_out)]
        return TarEntries(self, np.array(places, np.int64).reshape(-1, 2), dict(left_out))


class TarEntries:
    """Entries (see `Images`) of shards whose headers were all read."""

    setting = "data.path"

    def __init__(self, tars: Tars, places: np.ndarray, left_out: dict[str, int]):
        """`places` (n 2): shard, and where in it; `left_out` counts members of no sample."""
        self.tars, self.places, self.left_out = tars, places, left_out
        self.place, self.classes, self.warnings = tars.spec.path, tars.classes, tars.warnings

    def __len__(self) -> int:
        return len(self.places)

    def _entry(self, index: int) -> Entry:
        return next(self.tars.shards.entries(*self.places[index].tolist()))

    def name(self, index: int) -> str:
        """The shard and the member."""
        return self.tars.shards.name(self._entry(index))

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Opens the image -> (image, class index)."""
        return self.tars.open_entry(self._entry(index))

    def stamp(self, index: int) -> str:
        """Never asked for: data.cache is refused."""
        raise AssertionError("there is none: data.cache is refused")

    def content(self, index: int) -> bytes:
        """The bytes of the image's member. Raises ValueError for a bad entry."""
        return self.tars.content(self._entry(index))
