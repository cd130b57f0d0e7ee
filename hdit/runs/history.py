"""What a run tells of itself: metrics, validation, events, grids and config, read without torch.

Training appends to these files, and writes them anew where it goes back to a checkpoint, while
others read them.
"""

from __future__ import annotations

import math
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hdit.errors import UserError
from hdit.locks import LOCK
from hdit.names import printable
from hdit.reading import ReadingError, open_regular, parse_json, parse_toml, read_text

Values = dict[str, Any]
Numbers = NDArray[np.float64]

NUMBERS = ("step", "count", "loss", "images_per_second", "peak_memory", "seconds")
"""What is read of a line of metrics or validation again, besides its images."""

MAX_METRICS = 2**30
"""Bytes: millions of lines."""


class Line(NamedTuple):
    """A line of a file; without `values` if it is damaged."""

    number: int
    text: bytes
    values: Values

    @property
    def images(self) -> int:
        images: int = self.values["images"]
        return images


class Lines(NamedTuple):
    """The sound and the damaged lines of a file."""

    good: list[Line]
    damaged: list[Line]


def is_sound(values: Values) -> bool:
    """Whether a line is of metrics or validation: NUMBERS that it has are numbers."""
    return all(type(values.get(name, 0)) in (int, float) for name in NUMBERS)


def read_lines(path: Path, sound: Callable[[Values], bool] = is_sound) -> Lines:
    """The lines of a file. The last may be cut, by a kill or a full disk, and is no damage."""
    lines = Lines([], [])
    for line in Tail(path, sound).read():
        (lines.good if line.values else lines.damaged).append(line)
    return lines


def read_metrics(
    path: Path, images: int, sound: Callable[[Values], bool] = is_sound
) -> list[Values]:
    """The sound lines up to the checkpoint at `images`; a killed run leaves later ones.

    Each has `images`, and of metrics or validation numbers in those of NUMBERS that it has.
    """
    return [line.values for line in read_lines(path, sound).good if line.images <= images]


class Tail:
    """Reads the lines of a file, and later those that were appended since.

    A line is `sound` if it is an object with `images`, a whole number from 0, and `sound` says so.
    """

    def __init__(self, path: Path, sound: Callable[[Values], bool] = is_sound):
        self.path, self.sound = path, sound
        self.rewind()

    def is_other(self) -> bool:
        """Whether another file has taken the place of the one that was read, or it was cut."""
        try:
            found = os.stat(self.path)
        except OSError:
            return self.identity is not None
        same = self.identity in (None, (found.st_dev, found.st_ino))
        return not same or found.st_size < self.offset

    def rewind(self) -> None:
        """Reads from the beginning next."""
        self.offset, self.number = 0, 0  # up to which all was read, in bytes and lines
        self.damaged = 0  # lines up to there
        self.identity: tuple[int, int] | None = None

    def read(self) -> Iterator[Line]:
        """The lines since the last call. Raises ReadingError for what is no file of lines.

        A last line without its end is read again next time, unless it is whole already.
        """
        try:
            handle = open_regular(self.path)
        except FileNotFoundError:
            return
        with open(handle, "rb") as file:
            found = os.fstat(handle)
            if found.st_size > MAX_METRICS:
                raise ReadingError(
                    f"{self.path}: has more than {MAX_METRICS:,} bytes, which no such file has"
                )
            identity = found.st_dev, found.st_ino
            if self.identity not in (None, identity) or found.st_size < self.offset:
                return  # written anew since `is_other` was asked, which will tell of it
            self.identity = identity
            file.seek(max(self.offset - 1, 0))
            if self.offset and file.read(1) != b"\n" and file.read(1) == b"\n":
                self.offset += 1  # the end of a line that was whole without it
            file.seek(self.offset)
            for text in file:
                values = _values(text, self.sound)
                if values is None and not text.endswith(b"\n"):
                    return
                self.offset += len(text)
                self.number += 1
                self.damaged += values is None
                yield Line(self.number, text.removesuffix(b"\n"), values or {})


def _values(text: bytes, sound: Callable[[Values], bool]) -> Values | None:
    """The values of a line, or None if it is not what training writes."""
    try:
        values = parse_json(text.decode("utf-8"), "line")
    except (UnicodeDecodeError, ReadingError):
        return None
    if not isinstance(values, dict) or type(values.get("images")) is not int:
        return None
    return values if 0 <= values["images"] < 2**63 and sound(values) else None


# ---- a run ---------------------------------------------------------------------------------------


KEYS = (
    "images", "seconds", "macs", "loss", "grad_norm", "lr", "images_per_second", "data_wait_share",
    "mfu", "peak_memory", "skipped_steps", "skipped_files", "rollbacks", "gradient_noise_scale",
)  # fmt: skip
"""The numbers of a line of metrics that are kept, besides the loss in BINS bins of sigma."""

BINS = 8
"""Octiles of the training density, by which losses are told."""

CHUNK = 2**14  # lines


class Columns:
    """Numbers of lines of metrics, by their keys: nan where a line has none that is finite."""

    def __init__(self) -> None:
        self._rows: list[list[Any]] = []
        self._parts: list[Numbers] = []
        self.count = 0  # of lines

    def append(self, line: Values) -> None:
        """Takes the numbers of a line."""
        row = list(map(line.get, KEYS))
        losses = line.get("loss_by_sigma")
        row += losses if type(losses) is list and len(losses) == BINS else _NO_LOSSES
        self._rows.append(row)
        self.count += 1
        if len(self._rows) == CHUNK:
            self._pack()

    def _pack(self) -> None:
        self._parts.append(_numbers(self._rows))
        self._rows = []

    def table(self) -> dict[str, Numbers]:
        """The columns (n,) that have a number, by key; loss_by_sigma.0, .1, ... are of the bins."""
        self._pack()
        self._parts = [np.concatenate(self._parts)]
        names = [*KEYS, *(f"loss_by_sigma.{i}" for i in range(BINS))]
        columns = dict(zip(names, self._parts[0].T, strict=True))
        return {k: v for k, v in columns.items() if k == "images" or not np.isnan(v).all()}


_NO_LOSSES = [None] * BINS


def _numbers(rows: list[list[Any]]) -> Numbers:
    """Rows of what may be anything as numbers; nan for what is none."""
    if not rows:
        return np.zeros((0, len(KEYS) + BINS))
    try:
        made = np.array(rows, dtype=np.float64)  # None becomes nan
    except (TypeError, ValueError, OverflowError):
        made = np.array([[_number(value) for value in row] for row in rows])
    made[~np.isfinite(made)] = np.nan
    return made


def _number(value: Any) -> float:
    try:
        return float(value) if type(value) in (int, float) else math.nan
    except OverflowError:  # a whole number beyond all floats
        return math.nan


class History:
    """A run as its files tell it. `update` reads what came since the last call."""

    def __init__(self, path: Path):
        self.path = path
        self.metrics, self.last = Columns(), Values()
        self.validation: list[Values] = []
        self.events: list[Values] = []
        self.config, self.settings = "", Values()  # the text of config.toml, and its table
        self.problems: dict[str, str] = {}  # by file, what of it could not be read
        self._metrics = Tail(path / "metrics.jsonl")
        self._validation = Tail(path / "validation.jsonl", is_validation)
        self._events = Tail(path / "events.jsonl", is_event)

    def update(self) -> bool:
        """Reads what is new, and returns whether there is any."""
        problems: dict[str, str] = {}
        news = [
            self._read(self._metrics, self._take_metrics, self._forget_metrics, problems),
            self._read(self._validation, self.validation.append, self.validation.clear, problems),
            self._read(self._events, self.events.append, self.events.clear, problems),
        ]
        news.append(self._read_config(problems) or problems != self.problems)
        self.problems = problems
        return any(news)

    def _read_config(self, problems: dict[str, str]) -> bool:
        """Reads config.toml, and returns whether it has changed."""
        path, before = self.path / "config.toml", self.config
        self.config, self.settings = "", Values()
        try:
            self.config = read_text(path)
            self.settings = parse_toml(self.config, str(path))
        except FileNotFoundError:
            pass
        except ReadingError as error:
            problems[path.name] = str(error)
        return self.config != before

    def _read(
        self,
        tail: Tail,
        take: Callable[[Values], None],
        forget: Callable[[], None],
        problems: dict[str, str],
    ) -> bool:
        """Gives each new sound line to `take`; of a file that was written anew, each line."""
        news, name = tail.is_other(), tail.path.name
        if news:
            tail.rewind()
            forget()
        try:
            for line in tail.read():
                news = True
                if line.values:
                    take(line.values)
        except ReadingError as error:
            problems[name] = str(error)
        if tail.damaged:
            problems.setdefault(name, f"{tail.path}: {tail.damaged:,} damaged lines left out")
        return news

    def _take_metrics(self, line: Values) -> None:
        self.metrics.append(line)
        self.last = line

    def _forget_metrics(self) -> None:
        self.metrics, self.last = Columns(), Values()

    def written(self) -> float | None:
        """When metrics were written last, in seconds since 1970; None if never."""
        return _written(self.path / "metrics.jsonl")

    def grids(self) -> dict[int, Path]:
        """The grids of samples by their images, in ascending order."""
        found = {}
        with suppress(OSError):
            for path in (self.path / "samples").iterdir():
                if (match := re.fullmatch(r"([0-9]{1,18})\.png", path.name)) and path.is_file():
                    found[int(match[1])] = path
        return dict(sorted(found.items()))

    def checkpoints(self) -> list[int]:
        """The images of its checkpoints, in ascending order."""
        with suppress(OSError):
            names = (p.name for p in (self.path / "checkpoints").iterdir())
            return sorted(int(name) for name in names if re.fullmatch("[0-9]{1,18}", name))
        return []

    def owner(self) -> str | None:
        """What is known of the process that trains the run: "" if no name; None if none does."""
        try:
            text = read_text(self.path / LOCK, MAX_OWNER).strip()
        except FileNotFoundError:
            return None
        except ReadingError:
            return ""
        match = re.fullmatch(r"process ([0-9]{1,9}) on (.+)", text)
        if match and match[2] == socket.gethostname() and not _is_alive(int(match[1])):
            return None  # it was killed, and left its lock's file
        return text

    def weights(self) -> int | None:
        """The numbers in the newest model.safetensors, by its head alone; None if not known."""
        for images in reversed(self.checkpoints()):
            path = self.path / "checkpoints" / f"{images:012d}" / "model.safetensors"
            if (count := _weights(path)) is not None:
                return count
        return None


MAX_OWNER = 4096
MAX_HEAD = 2**26  # bytes of the head of a safetensors file


def is_validation(values: Values) -> bool:
    """Whether a line tells of a validation: it has losses by names of weights."""
    weights = values.get("weights")
    return isinstance(weights, dict) and all(isinstance(w, dict) for w in weights.values())


def is_event(values: Values) -> bool:
    """Whether a line tells of an event: it has a kind."""
    return isinstance(values.get("kind"), str)


def check_run(path: Path) -> None:
    """Raises UserError where a folder is not of a run, not even of one that has just begun."""
    name = printable(str(path))
    if not path.is_dir():
        what = "is a file" if path.exists() else "there is no such folder"
        raise UserError(f"{name}: {what}; name the folder of a run, which `hdit train` makes")
    if (path / "manifest.json").exists():
        raise UserError(
            f"{name}: is a checkpoint or a converted model; name the folder of the run that "
            "trained it"
        )
    if not any((path / file).exists() for file in ("config.toml", "metrics.jsonl", LOCK)):
        raise UserError(f"{name}: is no run: it has neither config.toml nor metrics.jsonl")


def _written(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # of another user
    return True


def _weights(path: Path) -> int | None:
    """The numbers that a safetensors file holds; None if it is none."""
    try:
        with open(open_regular(path), "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            head = parse_json(file.read(size), str(path)) if size <= MAX_HEAD else {}
        tensors = [t["shape"] for name, t in head.items() if name != "__metadata__"]
        return sum(math.prod(shape) for shape in tensors) or None
    except (OSError, ReadingError, AttributeError, KeyError, TypeError):
        return None
