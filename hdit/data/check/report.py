"""The report of a data set: sizes, classes, bad files, duplicates, mean and deviation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np

from hdit.data.check.contact_sheet import spread_over_classes
from hdit.data.check.reading import RECORD, BadFile, Findings, findings_of, read_all
from hdit.data.images import Images, ImagesSpec, too_many
from hdit.names import escape

ASPECTS = (
    "narrower than 1:2",
    "1:2 to 3:4",
    "3:4 to 1:1",
    "1:1",
    "1:1 to 4:3",
    "4:3 to 2:1",
    "wider than 2:1",
)
"""Bins of width to height; a border other than 1:1 belongs to the bin nearer 1:1."""


@dataclass(frozen=True)
class FileSize:
    """The size of an image, upright, and the file that has it."""

    width: int
    height: int
    file: str


@dataclass(frozen=True)
class Duplicates:
    """Files whose decoded pixels are identical, and their classes."""

    files: list[str]
    classes: list[str]  # one for each file; empty without classes

    @property
    def conflict(self) -> bool:
        """Whether their classes differ."""
        return len(set(self.classes)) > 1


@dataclass(frozen=True)
class DataReport:
    """Contents of a data set; `unusable` says why training would end there, or is None.

    Names of files and classes are escaped (see hdit.names).
    """

    place: str
    kind: str
    size: tuple[int, int]  # (height, width) of the crop
    channels: int
    crop: str
    images: int  # listed
    readable: int
    stored_bytes: int
    formats: dict[str, int]
    modes: dict[str, int]
    smallest: FileSize | None  # by the number of pixels, upright
    median: FileSize | None
    largest: FileSize | None
    enlarged: int  # smaller than the crop on a side
    aspects: dict[str, int]
    classes: dict[str, int]
    left_out: dict[str, int]  # files that are not used, by extension
    warnings: list[str]
    unreadable: list[BadFile]
    max_bad_share: float
    duplicates: list[Duplicates]
    mean: float | None  # of x0 = x/127.5 - 1 over all elements after the crop
    sigma_data: float | None
    unusable: str | None
    held_out: int = 0  # images that are not among these, as data.held_out has it

    def to_json(self) -> dict[str, Any]:
        """The report as what json.dumps takes."""
        table = dict(vars(self))
        for name in ("smallest", "median", "largest"):
            table[name] = None if table[name] is None else vars(table[name])
        table["unreadable"] = [bad._asdict() for bad in self.unreadable]
        table["duplicates"] = [vars(d) | {"conflict": d.conflict} for d in self.duplicates]
        return table


def check(
    source: Images,
    workers: int = 0,
    on_read: Callable[[int], None] = lambda count: None,
    held_out: int = 0,
) -> tuple[DataReport, list[int]]:
    """Reads all of a source -> (report, the images for a contact sheet by their index).

    `on_read` is called with the number of images that have been read since. `held_out` is how many
    are held out from these, for the report. Raises DataError.
    """
    found = _sum(read_all(source, workers), on_read)
    records, elements = found.records, found.elements
    spec, classes = source.spec, source.classes

    def name(index: int) -> str:
        return escape(source.entries.name(index))

    height, width = spec.size
    mean, sigma_data = moments(elements, found.total, found.squares) if elements else (None, None)
    smallest, median, largest = _sizes(records, name)
    numbers = np.bincount(records["label"], minlength=len(classes)).tolist()
    report = DataReport(
        place=source.entries.place,
        kind=spec.kind,
        size=spec.size,
        channels=spec.channels,
        crop=spec.crop,
        images=len(records) + len(found.unreadable),
        readable=len(records),
        stored_bytes=found.stored,
        formats=dict(found.formats.most_common()),
        modes=dict(found.modes.most_common()),
        smallest=smallest,
        median=median,
        largest=largest,
        enlarged=int(((records["width"] < width) | (records["height"] < height)).sum()),
        aspects=_aspects(records),
        classes={kind: numbers[label] for label, kind in enumerate(classes)},
        left_out=source.left_out,
        warnings=source.warnings,
        unreadable=found.unreadable,
        max_bad_share=spec.bad_share,
        duplicates=_duplicates(records, name, classes),
        mean=mean,
        sigma_data=sigma_data,
        unusable=_unusable(spec, source.entries.place, len(records), found.unreadable),
        held_out=held_out,
    )
    return report, records["index"][spread_over_classes(records["label"])].tolist()


def _sum(parts: Iterable[Findings], on_read: Callable[[int], None]) -> Findings:
    records = [np.empty(0, RECORD)]
    found = findings_of([])
    for part in parts:
        records.append(part.records)
        found.unreadable += part.unreadable
        found.formats += part.formats
        found.modes += part.modes
        found.stored += part.stored
        found.elements += part.elements
        found.total += part.total
        found.squares += part.squares
        on_read(len(part.records) + len(part.unreadable))
    found.records = np.concatenate(records)
    return found


def moments(elements: int, total: int, squares: int) -> tuple[float, float]:
    """Mean and standard deviation of x0 = x/127.5 - 1 from the sums of x and of x^2, exactly."""
    mean = total / (127.5 * elements) - 1
    variance = (elements * squares - total**2) / elements**2
    return mean, sqrt(variance) / 127.5


def duplicates(records: np.ndarray) -> list[np.ndarray]:
    """Groups of records of equal pixels, in the order of the first of each."""
    digests = records["digest"]  # (n 2)
    order = np.lexsort((records["index"], digests[:, 1], digests[:, 0]))
    same = (digests[order[1:]] == digests[order[:-1]]).all(1)  # as the one before
    borders = np.flatnonzero(np.diff(np.concatenate([[False], same, [False]]).astype(np.int8)))
    pairs = borders.reshape(-1, 2).tolist()
    groups = [records[order[start : end + 1]] for start, end in pairs]
    return sorted(groups, key=lambda group: int(group["index"][0]))


def _duplicates(
    records: np.ndarray, name: Callable[[int], str], classes: list[str]
) -> list[Duplicates]:
    return [
        Duplicates(
            [name(i) for i in group["index"].tolist()],
            [classes[label] for label in group["label"].tolist()] if classes else [],
        )
        for group in duplicates(records)
    ]


def _sizes(
    records: np.ndarray, name: Callable[[int], str]
) -> tuple[FileSize | None, FileSize | None, FileSize | None]:
    if not len(records):
        return None, None, None
    order = np.argsort(records["width"].astype(np.int64) * records["height"], kind="stable")
    smallest, median, largest = (
        FileSize(int(r["width"]), int(r["height"]), name(int(r["index"])))
        for r in records[order[[0, (len(order) - 1) // 2, -1]]]
    )
    return smallest, median, largest


def _aspects(records: np.ndarray) -> dict[str, int]:
    w, h = records["width"].astype(np.int64), records["height"].astype(np.int64)
    conditions = [2 * w < h, 4 * w < 3 * h, w < h, w == h, 3 * w <= 4 * h, w <= 2 * h]
    bins = np.select(conditions, range(6), 6)
    numbers = np.bincount(bins, minlength=len(ASPECTS)).tolist()
    return dict(zip(ASPECTS, numbers, strict=True))


def _unusable(spec: ImagesSpec, place: str, readable: int, bad: list[BadFile]) -> str | None:
    """Why training would end with these, if it would."""
    number = readable + len(bad)
    share = spec.bad_share
    if not readable:
        return f"none of the {number} images in {place!r} can be read"
    if bad and spec.bad_files == "fail":
        return f"{len(bad)} of the {number} images cannot be read, and data.bad_files = 'fail'"
    if too_many(len(bad), number, number, share):
        return (
            f"{len(bad)} of the {number} images cannot be read, beyond data.max_bad_share = "
            f"{share:g}; mend or remove them, or raise it"
        )
    return None
