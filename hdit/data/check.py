"""What is in a data set: each picture is read once, as training reads it, and counted.

Beside its name in the listing, which training holds as well, a picture takes 32 bytes (a digest of
its pixels, its size, label and place): 1.28 million take 41 MB, and 95 MB while they are sorted.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.utils.data import DataLoader

from hdit.data import DataSpec
from hdit.data.pictures import (
    EXHAUSTED,
    MAX_BAD_SHARE,
    Pictures,
    PicturesSpec,
    kind_of,
    to_pixels,
    too_many,
)
from hdit.data.source import DataError, printable
from hdit.data.sources.tars import Tars
from hdit.data.transforms import to_image, to_mode, to_tensor

DEFAULT_SIGMA_DATA = 0.5  # of hdit.spaces, which this room does not know
PART = 32  # pictures that a worker reads at once
SHEET_PICTURES = 100
SHEET_SIDE = 256  # a larger picture is made smaller on the sheet
MANY_CLASSES = 30  # beyond it only the smallest and largest are printed
FEW = 10  # of many, how many are printed at each end
SHOWN_GROUPS = 20  # of duplicates, in print; a report has them all
SHOWN_FILES = 6  # of one group, in print

ASPECTS = (
    "narrower than 1:2",
    "1:2 to 3:4",
    "3:4 to 1:1",
    "1:1",
    "1:1 to 4:3",
    "4:3 to 2:1",
    "wider than 2:1",
)
"""Of width to height; what lies on a border, but for 1:1, is counted on its side nearer 1:1."""


# ---- what is checked -----------------------------------------------------------------------------


def open_source(
    place: str, kind: str | None = None, size: str = "256", **settings: Any
) -> Pictures:
    """Lists a source as training would: a path, or what `kind` takes in place of one.

    `size` is a side or HEIGHTxWIDTH. Raises DataError, which names the options of the command.
    """
    specs = get_args(get_args(DataSpec)[0])
    kinds = [s.model_fields["kind"].default for s in specs if issubclass(s, PicturesSpec)]
    kind = kind or kind_of(place)
    if kind is None:
        raise DataError(
            f"PATH: {place!r} is a file that tells no kind of source; take a folder, a .zip, an "
            f".npz or .tar, or name its --kind: {', '.join(kinds)}"
        )
    if kind not in kinds:
        raise DataError(f"--kind: must be {', '.join(kinds[:-1])} or {kinds[-1]}, got {kind!r}")
    if not (sides := re.fullmatch(r"(\d+)(?:x(\d+))?", size)):
        raise DataError(f"--size: must be a side in pixels or HEIGHTxWIDTH, got {size!r}")
    key = "hook" if kind == "python" else "path"
    if kind == "hub" and not Path(place).expanduser().exists():
        key = "name"
    height, width = int(sides[1]), int(sides[2] or sides[1])
    table = {"kind": kind, key: place, "size": [height, width], **settings}
    try:
        source = TypeAdapter(DataSpec).validate_python(table).open()
    except ValidationError as error:
        raise DataError("\n".join(map(_option, error.errors()))) from None
    return by_index(source)


def by_index(source: Any) -> Pictures:
    """A source that `[data]` opens, as this module takes it. Raises DataError."""
    if isinstance(source, Tars):
        return Pictures(source.spec, source.listed())
    if not isinstance(source, Pictures):
        raise DataError(f"data.kind: {type(source).__name__.lower()!r} has no pictures to check")
    return source


def _option(error: Any) -> str:
    """One line for one of pydantic's errors: the option, the rule and what arrived."""
    names = {"hook": "PATH", "path": "PATH", "name": "PATH"}
    key = next((str(part) for part in reversed(error["loc"]) if isinstance(part, str)), "kind")
    rule = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be", 1)
    return f"{names.get(key, f'--{key}')}: {rule}, got {error['input']!r}"


def sheet_path(place: str, sheet: Path | None) -> Path:
    """Where the contact sheet goes; told before anything is read. Raises DataError."""
    name = os.path.basename(os.path.abspath(os.path.expanduser(place)))
    stem = re.sub(r"\.(zip|npz|tar|toml)$", "", name)
    stem = re.sub(r"[^\w.-]+", "-", stem).strip("-.")
    path = sheet or Path(f"{stem or 'data'}-contact-sheet.png")
    home = Path(place).expanduser()
    if path.suffix.lower() != ".png":
        raise DataError(f"--sheet: must end in .png, got {str(path)!r}")
    if path.is_dir() or not path.parent.is_dir():
        trouble = "is a folder" if path.is_dir() else "lies in a folder that does not exist"
        raise DataError(f"--sheet: {str(path)!r} {trouble}; name a file")
    if home.is_dir() and path.resolve().is_relative_to(home.resolve()):
        raise DataError(
            f"--sheet: {str(path)!r} would lie in the data folder and become a part of it; name a "
            "file elsewhere, as in --sheet ../sheet.png"
        )
    return path


def processes() -> int:
    """One for each CPU that this one may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


# ---- reading -------------------------------------------------------------------------------------

RECORD = np.dtype(
    [
        ("digest", "<u8", 2),  # of the pixels before the crop: upright, in the mode of training
        ("index", "<u4"),
        ("label", "<i4"),
        ("width", "<i4"),
        ("height", "<i4"),
    ]
)


class Listed(NamedTuple):
    """A picture that may be loaded."""

    place: int  # in the listing
    name: Callable[[], str]
    load: Callable[[], tuple[Image.Image, int]]


class Bad(NamedTuple):
    file: str
    reason: str


class Part(NamedTuple):
    """What was found in some pictures of a source. Sums are whole numbers, so all are exact."""

    records: np.ndarray  # (n,) RECORD, of those that can be read
    unreadable: list[Bad]
    formats: Counter[str]  # as the files have them
    modes: Counter[str]
    stored: int  # bytes of those files
    elements: int  # of the pixels after the crop: how many, their sum and that of their squares
    total: int
    squares: int


def examine(pictures: Iterable[Listed], spec: PicturesSpec) -> Part:
    """Reads each picture as training does, and judges bad ones alike."""
    records: list[tuple[Any, ...]] = []
    unreadable: list[Bad] = []
    formats, modes = Counter[str](), Counter[str]()
    stored = elements = total = squares = 0
    for picture in pictures:
        try:
            image, label = picture.load()
            with image, warnings.catch_warnings(action="ignore"):  # Pillow's, of metadata
                about = image.format or "pixels", image.mode, _stored_bytes(image)
                pixels = to_pixels(image, spec).numpy()
                upright = to_mode(image, spec.channels, spec.background)
        except (MemoryError, DataError):
            raise
        except Exception as error:  # as in Pictures
            if isinstance(error, OSError) and error.errno in EXHAUSTED:
                raise
            unreadable.append(Bad(picture.name(), f"{type(error).__name__}: {error}"))
            continue
        records.append((digest(upright), picture.place, label, *upright.size))
        formats[about[0]] += 1
        modes[about[1]] += 1
        stored += about[2]
        elements += pixels.size
        total += int(pixels.sum(dtype=np.int64))
        squares += int(np.square(pixels, dtype=np.uint16).sum(dtype=np.int64))
    table = np.array(records, RECORD)
    return Part(table, unreadable, formats, modes, stored, elements, total, squares)


def digest(image: Image.Image) -> tuple[int, int]:
    """128 bits of the size and all pixels of a picture, as two numbers."""
    hashed = hashlib.blake2b(repr((image.mode, image.size)).encode(), digest_size=16)
    hashed.update(image.tobytes())
    high, low = np.frombuffer(hashed.digest(), "<u8").tolist()
    return high, low


def _stored_bytes(image: Image.Image) -> int:
    """Of the file that a picture was opened from; its pixels where there is none any more."""
    file = getattr(image, "fp", None)
    if file is None or getattr(file, "closed", False):
        return image.width * image.height * len(image.getbands())
    place = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(place)
    return int(size)


class _Parts:
    """A source by parts, each of which any process can examine. What is wrong is a value too."""

    def __init__(self, source: Pictures):
        self.spec, self.entries = source.spec, source.entries

    def __len__(self) -> int:
        return -(-len(self.entries) // PART)

    def __getitem__(self, part: int) -> Part | DataError:
        if part >= len(self):
            raise IndexError(part)
        indices = range(part * PART, min((part + 1) * PART, len(self.entries)))
        listed = (
            Listed(i, partial(self.entries.name, i), partial(self.entries.load, i)) for i in indices
        )
        try:
            return examine(listed, self.spec)
        except DataError as error:
            return error.with_traceback(None)


def _same(part: Any) -> Any:
    return part


def _leave_signals_to_the_command(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def walk(source: Pictures, workers: int) -> Iterator[Part]:
    """All parts of a source, in its order whatever the number of worker processes.

    Raises DataError.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        loader: DataLoader[Part] = DataLoader(
            _Parts(source),  # type: ignore[arg-type]
            batch_size=None,
            num_workers=workers,
            collate_fn=_same,
            worker_init_fn=_leave_signals_to_the_command if workers else None,
            generator=torch.Generator(),  # or it would draw from the global one
        )
        parts = iter(loader)
    failed: DataError | None = None
    try:
        for part in parts:
            if isinstance(part, DataError):
                failed = part
                break
            yield part
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise DataError(f"--workers: one of {workers} ended ({error}); take fewer") from None
    if failed:
        raise failed


# ---- the report ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
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
        return len(set(self.classes)) > 1


@dataclass(frozen=True)
class Report:
    """What a data set holds; `unusable` says why training would end there, where it would."""

    place: str
    kind: str
    size: tuple[int, int]  # (height, width) of the crop
    channels: int
    crop: str
    pictures: int  # listed
    readable: int
    stored_bytes: int
    formats: dict[str, int]
    modes: dict[str, int]
    smallest: Size | None  # by the number of pixels, upright
    median: Size | None
    largest: Size | None
    enlarged: int  # smaller than the crop on a side
    aspects: dict[str, int]
    classes: dict[str, int]
    unreadable: list[Bad]
    max_bad_share: float
    duplicates: list[Duplicates]
    mean: float | None  # of x0 = x/127.5 - 1 over all elements after the crop
    sigma_data: float | None
    unusable: str | None

    def to_json(self) -> dict[str, Any]:
        table = dict(vars(self))
        for name in ("smallest", "median", "largest"):
            table[name] = None if table[name] is None else vars(table[name])
        table["unreadable"] = [bad._asdict() for bad in self.unreadable]
        table["duplicates"] = [vars(d) | {"conflict": d.conflict} for d in self.duplicates]
        return table


def check(
    source: Pictures, workers: int = 0, on_read: Callable[[int], None] = lambda count: None
) -> tuple[Report, list[int]]:
    """Reads all of a source -> (report, the pictures for a contact sheet by their index).

    `on_read` is called with the number of pictures that have been read since. Raises DataError.
    """
    parts: list[np.ndarray] = []
    unreadable: list[Bad] = []
    formats, modes = Counter[str](), Counter[str]()
    stored = elements = total = squares = 0
    for part in walk(source, workers):
        parts.append(part.records)
        unreadable += part.unreadable
        formats += part.formats
        modes += part.modes
        stored += part.stored
        elements += part.elements
        total += part.total
        squares += part.squares
        on_read(len(part.records) + len(part.unreadable))
    records = np.concatenate(parts) if parts else np.empty(0, RECORD)
    del parts
    spec, name, classes = source.spec, source.entries.name, source.classes
    height, width = spec.size
    mean, sigma_data = moments(elements, total, squares) if elements else (None, None)
    smallest, median, largest = _sizes(records, name)
    numbers = np.bincount(records["label"], minlength=len(classes)).tolist()
    report = Report(
        place=source.entries.place,
        kind=spec.kind,
        size=spec.size,
        channels=spec.channels,
        crop=spec.crop,
        pictures=len(records) + len(unreadable),
        readable=len(records),
        stored_bytes=stored,
        formats=dict(formats.most_common()),
        modes=dict(modes.most_common()),
        smallest=smallest,
        median=median,
        largest=largest,
        enlarged=int(((records["width"] < width) | (records["height"] < height)).sum()),
        aspects=_aspects(records),
        classes={kind: numbers[label] for label, kind in enumerate(classes)},
        unreadable=unreadable,
        max_bad_share=MAX_BAD_SHARE if spec.max_bad_share is None else spec.max_bad_share,
        duplicates=[
            Duplicates(
                [name(i) for i in group["index"].tolist()],
                [classes[label] for label in group["label"].tolist()] if classes else [],
            )
            for group in duplicates(records)
        ],
        mean=mean,
        sigma_data=sigma_data,
        unusable=_unusable(spec, source.entries.place, len(records), unreadable),
    )
    return report, records["index"][choose(records["label"])].tolist()


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


def _sizes(
    records: np.ndarray, name: Callable[[int], str]
) -> tuple[Size | None, Size | None, Size | None]:
    if not len(records):
        return None, None, None
    order = np.argsort(records["width"].astype(np.int64) * records["height"], kind="stable")
    smallest, median, largest = (
        Size(int(r["width"]), int(r["height"]), name(int(r["index"])))
        for r in records[order[[0, (len(order) - 1) // 2, -1]]]
    )
    return smallest, median, largest


def _aspects(records: np.ndarray) -> dict[str, int]:
    w, h = records["width"].astype(np.int64), records["height"].astype(np.int64)
    conditions = [2 * w < h, 4 * w < 3 * h, w < h, w == h, 3 * w <= 4 * h, w <= 2 * h]
    bins = np.select(conditions, range(6), 6)
    numbers = np.bincount(bins, minlength=len(ASPECTS)).tolist()
    return dict(zip(ASPECTS, numbers, strict=True))


def _unusable(spec: PicturesSpec, place: str, readable: int, bad: list[Bad]) -> str | None:
    """Why training would end with these, if it would."""
    number = readable + len(bad)
    share = MAX_BAD_SHARE if spec.max_bad_share is None else spec.max_bad_share
    if not readable:
        return f"none of the {number} pictures in {place!r} can be read"
    if bad and spec.bad_files == "fail":
        return f"{len(bad)} of the {number} pictures cannot be read, and data.bad_files = 'fail'"
    if too_many(len(bad), number, number, share):
        return (
            f"{len(bad)} of the {number} pictures cannot be read, beyond data.max_bad_share = "
            f"{share:g}; mend or remove them, or raise it"
        )
    return None


# ---- the contact sheet ---------------------------------------------------------------------------


def contact_sheet(source: Pictures, indices: list[int]) -> Tensor:
    """Pictures as they come out of the crop: (n c h w) uint8; those above SHEET_SIDE smaller."""
    factor = -(-max(source.spec.size) // SHEET_SIDE)
    tiles = []
    for i in indices:
        with source.entries.load(i)[0] as image:
            pixels = to_pixels(image, source.spec)
        small = to_image(pixels.permute(1, 2, 0).numpy()).reduce(factor)
        tiles.append(to_tensor(small))
    return torch.stack(tiles)


def choose(labels: np.ndarray, number: int = SHEET_PICTURES) -> np.ndarray:
    """Where `number` of some labels are, or all: evenly over classes, and within each of them."""
    order = np.argsort(labels, kind="stable")
    classes = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    classes = [classes[i] for i in _spaced(len(classes), number)]
    quotas = [0] * len(classes)
    left = min(number, sum(map(len, classes)))
    while left:
        for i, members in enumerate(classes):
            take = left > 0 and quotas[i] < len(members)
            quotas[i] += take
            left -= take
    chosen = [c[_spaced(len(c), quota)] for c, quota in zip(classes, quotas, strict=True)]
    return np.concatenate(chosen)


def _spaced(length: int, number: int) -> np.ndarray:
    """`number` places out of `length`, or all, each in the middle of its stretch."""
    number = min(length, number)
    return (2 * np.arange(number) + 1) * length // (2 * max(1, number))


# ---- in print ------------------------------------------------------------------------------------


def lines(report: Report) -> Iterator[str]:
    """What the tables have no room for: files that cannot be read, and duplicates."""
    for bad in report.unreadable:
        yield printable(f"unreadable: {bad.file}: {bad.reason}")
    conflicts_first = sorted(report.duplicates, key=lambda group: not group.conflict)
    for group in conflicts_first[:SHOWN_GROUPS]:
        labels = group.classes if group.conflict else [""] * len(group.files)
        named = [f"{f} ({c})" if c else f for f, c in zip(group.files, labels, strict=True)]
        rest = len(named) - SHOWN_FILES
        named = [*named[:SHOWN_FILES], f"and {rest} more"] if rest > 0 else named
        head = "label conflict" if group.conflict else "duplicates"
        yield printable(f"{head}: {' = '.join(named)}")
    if (rest := len(report.duplicates) - SHOWN_GROUPS) > 0:
        yield f"duplicates: {rest} groups more; --json names them all"


def tables(report: Report) -> Iterator[Table]:
    """The report for a terminal of 80 columns or more."""
    yield _table(report)
    if report.readable:
        there = {name: number for name, number in report.aspects.items() if number}
        yield _histogram("width to height", there, report.readable)
    if report.classes:
        yield _class_table(report.classes, report.readable)


def _table(report: Report) -> Table:
    table = Table(title=printable(report.place), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")

    def row(name: str, text: str) -> None:
        table.add_row(Text(name), Text(printable(text)))

    n = report.readable
    row("pictures", f"{report.pictures:,} ({report.kind})")
    bad = len(report.unreadable)
    row("unreadable", f"{_of(bad, report.pictures)}; training takes up to {_share(report)}")
    if not n:
        return table
    row("file sizes", f"{report.stored_bytes:,} bytes in all, {report.stored_bytes // n:,} each")
    row("formats", ", ".join(f"{name} {number:,}" for name, number in report.formats.items()))
    row("modes", ", ".join(f"{name} {number:,}" for name, number in report.modes.items()))
    table.add_section()
    for name, size in (
        ("smallest", report.smallest),
        ("median", report.median),
        ("largest", report.largest),
    ):
        assert size is not None, "there are pictures"
        row(name, f"{size.width} x {size.height}  {size.file}")
    height, width = report.size
    row("enlarged", f"{_of(report.enlarged, n)}, smaller than {width} x {height} on a side")
    table.add_section()
    row("classes", _class_line(report.classes))
    files = sum(len(group.files) for group in report.duplicates)
    conflicts = sum(group.conflict for group in report.duplicates)
    copies = f"{len(report.duplicates):,} groups, {files:,} files" if files else "none"
    row("duplicates", copies + (f"; {conflicts:,} with labels that differ" if conflicts else ""))
    table.add_section()
    assert report.mean is not None, "there are pictures"
    assert report.sigma_data is not None, "there are pictures"
    row("sigma_data", f"{report.sigma_data:.4g} at {width} x {height}; mean {report.mean:.4f}")
    if report.sigma_data:
        line = f"space.sigma_data = {report.sigma_data:.4g}"
        row("to set it", f"{line}  ({DEFAULT_SIGMA_DATA:g} without it; not for latents)")
    return table


def _class_line(classes: dict[str, int]) -> str:
    if not classes:
        return "none: training without labels"
    low, high = min(classes, key=lambda c: classes[c]), max(classes, key=lambda c: classes[c])
    line = f"{len(classes):,}; smallest {low}: {classes[low]:,}; largest {high}: {classes[high]:,}"
    empty = sum(not number for number in classes.values())
    return line + (f"; {empty:,} without pictures" if empty else "")


def _class_table(classes: dict[str, int], total: int) -> Table:
    if len(classes) <= MANY_CLASSES:
        return _histogram("classes", classes, total)
    ranked = sorted(classes.items(), key=lambda item: item[1])  # stable
    ends = dict([*ranked[:FEW], *ranked[-FEW:]])
    title = f"the {FEW} smallest and the {FEW} largest of {len(classes):,} classes"
    return _histogram(title, ends, total)


def _histogram(title: str, numbers: dict[str, int], total: int) -> Table:
    table = Table(title=title, show_header=False, min_width=len(title))
    table.add_column(overflow="fold")
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column()
    most = max(numbers.values()) or 1
    for name, number in numbers.items():
        bar = "#" * -(-24 * number // most)
        table.add_row(Text(printable(name)), f"{number:,}", f"{number / total:.1%}", bar)
    return table


def _share(report: Report) -> str:
    return f"{100 * report.max_bad_share:.3g}%"


def _of(number: int, total: int) -> str:
    return f"{number:,} ({number / total:.1%})" if number else "none"
