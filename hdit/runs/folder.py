"""The folder of a run: config.toml, classes.json, metrics.jsonl, samples/ and checkpoints/."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from hdit.config import RunConfig, parse
from hdit.errors import UserError
from hdit.files import check_writable, to_json, whole, write_json, write_text
from hdit.locks import LOCK, locked
from hdit.reading import ReadingError, parse_json, parse_toml, read_bytes, read_text
from hdit.runs import checkpoint
from hdit.runs.checkpoint import Checkpoint, CheckpointError, DamagedCheckpoint

Say = Callable[[str], None]


class RunFolder:
    """Where one session of training writes; only the main process does."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.events = path / "events.jsonl"
        self.saved = path / ".saved"  # what is known of checkpoints/ if that is lost

    def locked(self) -> AbstractContextManager[None]:
        """Makes the folder; while the block runs, another trainer is refused."""
        fix = "wait for its end, or name another --run"
        return locked(self.path / LOCK, "is training this run", fix)

    def newest(self, warn: Say) -> Checkpoint | None:
        """The checkpoint to resume from, or None of a run that has saved none yet.

        Each damaged or lost one that is newer is named to `warn`. Raises CheckpointError where none
        can be used, or where the run has saved some and all are gone.
        """
        self._check_place()
        counts = [line.images for line in _read(self.metrics).good if line.images]
        found, saved = checkpoint.newest(self.checkpoints, warn), self._last_saved()
        if found is None:
            self._check_begun(counts, saved)
            self._check_own()
        elif saved is not None and saved > found.state.images:
            gone = self.checkpoints / checkpoint.folder_name(saved)
            if not gone.exists():  # nor damaged, which was told
                warn(f"{gone}: is gone; going back to {found.folder}")
        return found

    def _check_place(self) -> None:
        """Raises UserError where a run cannot lie, or part of another run does."""
        for folder in (self.checkpoints, self.path / "samples"):
            if folder.exists() and not folder.is_dir():
                raise UserError(f"{folder}: is a file, where a run has a folder; move it away")
        for name in ("config.toml", "classes.json", "checkpoints/latest"):
            check_writable(self.path / name)
        check_writable(self.metrics)
        check_writable(self.events)
        check_writable(self.saved)
        held = [self.path, *checkpoint.checkpoint_folders(self.path)]
        if any(map(_is_checkpoint, held)):
            raise UserError(
                f"--run: {self.path} is of the checkpoints of a run, which training would write "
                "over; name the folder of that run, or a new one"
            )

    def _check_own(self) -> None:
        """Raises UserError where a new run would write over files that are of no run."""
        path = self.path / "config.toml"
        if self.metrics.exists():
            return
        if path.exists() and not _is_dump(path):
            raise UserError(f"{path}: is not of a run, and would be written over; {_ELSEWHERE}")
        other = self.path / "classes.json"
        if other.exists() and not path.exists():
            raise UserError(f"{other}: is not of a run, and would be written over; {_ELSEWHERE}")

    def _check_begun(self, counts: list[int], saved: int | None) -> None:
        """Raises CheckpointError where there must have been checkpoints, or metrics would be lost.

        A run that was killed before its first one has lines of metrics too.
        """
        if saved is None:
            saved = int(self._has_passed_a_checkpoint(counts))
        if counts and saved:
            there = "has none any more" if self.checkpoints.exists() else "is gone"
            raise CheckpointError(
                f"{self.path}: {self.metrics.name} tells of {counts[-1]:,} images, and checkpoints "
                f"were saved, but checkpoints/ {there}; put it back, or name another --run. "
                f"To start anew here, move {self.metrics.name} away"
            )

    def _last_saved(self) -> int | None:
        """Images of the last checkpoint that was saved, if that was noted."""
        try:
            text = read_text(self.saved, 100).strip()
        except (FileNotFoundError, ReadingError):
            return None
        return int(text) if text.isascii() and text.isdecimal() else None

    def _has_passed_a_checkpoint(self, counts: list[int]) -> bool:
        """Whether lines at so many images prove a checkpoint, in a run that noted none.

        A line is written before the checkpoint at it, so that the next line is the proof.
        """
        path = self.path / "config.toml"
        try:
            every = parse_toml(read_text(path), str(path))["training"]["checkpoint_every"]
            return sum(count >= every for count in counts) > 1
        except (FileNotFoundError, ReadingError, KeyError, TypeError):
            return False

    def note_saved(self, images: int) -> None:
        """Keeps in mind that there is a checkpoint after so many images; after 0, none yet."""
        write_text(self.saved, f"{images}\n")

    def prepare(self, config: RunConfig, images: int, classes: list[str], warn: Say) -> None:
        """Writes config and classes, and sets aside what came after the checkpoint at `images`.

        Raises UserError where another process has trained the run since it was opened.
        """
        later = [p for p in checkpoint.checkpoint_folders(self.checkpoints) if int(p.name) > images]
        for folder in later:
            self._check_damaged(folder)
        write_text(self.path / "config.toml", config.dump())
        if classes:
            write_json(self.path / "classes.json", {name: i for i, name in enumerate(classes)})
        if self.checkpoints.is_dir():
            for part in self.checkpoints.glob(".*.part"):  # of a killed run
                shutil.rmtree(part) if part.is_dir() else part.unlink()
        self.go_back(images, warn)

    def go_back(self, images: int, warn: Say) -> None:
        """Sets aside what came after the checkpoint at `images`: lines, and damaged checkpoints."""
        self.keep_metrics(images, warn)
        self.note_saved(images)  # 0 if there is none yet, however many lines come before one
        later = [p for p in checkpoint.checkpoint_folders(self.checkpoints) if int(p.name) > images]
        for folder in later:
            folder.rename(_unused(folder.with_name(f"{folder.name}.damaged")))
            self.grid(int(folder.name)).unlink(missing_ok=True)  # of weights that are not any more
        if later and images:
            newest = checkpoint.folder_name(images)
            write_text(self.checkpoints / "latest", newest + "\n")

    def _check_damaged(self, folder: Path) -> None:
        """Raises UserError for a newer checkpoint that is sound: the run was opened before it."""
        try:
            found = checkpoint.open_checkpoint(folder)
        except DamagedCheckpoint:
            return
        raise UserError(
            f"{self.path}: another process has trained it to {found.state.images:,} images since "
            "it was opened; the same command goes on from there"
        )

    def keep_metrics(self, images: int, warn: Say) -> None:
        """Keeps the lines up to the checkpoint at `images`, and sets damaged ones aside."""
        if not self.metrics.exists():
            return
        lines = _read(self.metrics)
        if lines.damaged:
            aside = _unused(self.metrics.with_name(f"{self.metrics.name}.damaged"))
            _write_lines(aside, lines.damaged)
            numbers = ", ".join(str(line.number) for line in lines.damaged[:10])
            more = f" and {len(lines.damaged) - 10:,} more" if len(lines.damaged) > 10 else ""
            warn(f"{self.metrics}: damaged at line {numbers}{more}; kept in {aside.name}")
        _write_lines(self.metrics, [line for line in lines.good if line.images <= images])

    def log(self, line: dict[str, Any]) -> None:
        """Appends a line of metrics."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(to_json(line, str(self.metrics), indent=None) + "\n")

    def note(self, kind: str, images: int, **facts: Any) -> None:
        """Appends to events.jsonl what happened at so many images, and when."""
        line = {"kind": kind, "images": images, "time": time.time()} | facts
        with self.events.open("a", encoding="utf-8") as file:
            file.write(to_json(line, str(self.events), indent=None) + "\n")

    def grid(self, images: int) -> Path:
        """The file of the grid of samples after so many images."""
        return self.path / "samples" / f"{checkpoint.folder_name(images)}.png"


_ELSEWHERE = "name another --run, or move it away"


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint: stored latents have a manifest too, but no state."""
    return (folder / checkpoint.MANIFEST).exists() and (folder / "state.json").exists()


def _is_dump(path: Path) -> bool:
    """Whether a config is as training writes it: no line of another form, and most settings.

    An earlier version did not know all of those that there are now.
    """
    try:
        text = read_text(path)
        dump = parse(parse_toml(text, str(path)), str(path)).dump().splitlines()
    except UserError:
        return False
    lines = text.splitlines()
    return set(lines) <= set(dump) and 2 * len(lines) > len(dump)


# ---- metrics -------------------------------------------------------------------------------------


class _Line(NamedTuple):
    """A line of metrics; without `values` if it is damaged."""

    number: int
    text: bytes
    values: dict[str, Any]

    @property
    def images(self) -> int:
        images: int = self.values["images"]
        return images


class _Lines(NamedTuple):
    good: list[_Line]
    damaged: list[_Line]


def read_metrics(path: Path, images: int) -> list[dict[str, Any]]:
    """The sound lines up to the checkpoint at `images`; a killed run leaves later ones.

    Each has `images`, and numbers in those of NUMBERS that it has.
    """
    return [line.values for line in _read(path).good if line.images <= images]


def _read(path: Path) -> _Lines:
    """The lines of metrics. The last may be cut, by a kill or a full disk, and is no damage."""
    try:
        content = read_bytes(path, MAX_METRICS)
    except FileNotFoundError:
        content = b""
    lines = _Lines([], [])
    texts = content.split(b"\n")
    for number, text in enumerate(texts, 1):
        values = _values(text)
        if values is not None:
            lines.good.append(_Line(number, text, values))
        elif number < len(texts):
            lines.damaged.append(_Line(number, text, {}))
    return lines


def _write_lines(path: Path, lines: list[_Line]) -> None:
    with whole(path) as part:
        part.write_bytes(b"".join(line.text + b"\n" for line in lines))


def _values(text: bytes) -> dict[str, Any] | None:
    """The values of a line, or None if it is not what training writes."""
    try:
        values = parse_json(text.decode("utf-8"), "line")
    except (UnicodeDecodeError, ReadingError):
        return None
    if not isinstance(values, dict) or type(values.get("images")) is not int:
        return None
    numbers = (values.get(name, 0) for name in NUMBERS)
    sound = values["images"] >= 0 and all(type(n) in (int, float) for n in numbers)
    return values if sound else None


NUMBERS = ("step", "loss", "images_per_second", "peak_memory")
"""What is read of a line again, besides its images."""

MAX_METRICS = 2**30
"""Bytes: millions of lines."""


def _unused(path: Path) -> Path:
    """The path, or the first of path.2, path.3, ... that is not taken."""
    candidate, n = path, 2
    while candidate.exists():
        candidate, n = path.with_name(f"{path.name}.{n}"), n + 1
    return candidate
