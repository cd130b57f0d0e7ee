"""The folder of a run: config.toml, classes.json, metrics.jsonl, samples/ and checkpoints/."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from hdit.config import RunConfig, parse
from hdit.data.kinds import BEST
from hdit.errors import UserError
from hdit.files import check_writable, to_json, whole, write_json, write_text
from hdit.locks import LOCK, locked
from hdit.reading import ReadingError, parse_toml, read_text
from hdit.runs import checkpoint, snapshots
from hdit.runs.checkpoint import Checkpoint, CheckpointError, DamagedCheckpoint
from hdit.runs.history import Line, is_validation, read_lines

Say = Callable[[str], None]


class RunFolder:
    """Where one session of training writes; only the main process does."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.snapshots = path / "snapshots"  # of power-function averages
        self.metrics = path / "metrics.jsonl"
        self.validation = path / "validation.jsonl"
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
        counts = [line.images for line in read_lines(self.metrics).good if line.images]
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
        for folder in (self.checkpoints, self.snapshots, self.path / "samples"):
            if folder.exists() and not folder.is_dir():
                raise UserError(f"{folder}: is a file, where a run has a folder; move it away")
        for name in ("config.toml", "classes.json", "checkpoints/latest", "checkpoints/best"):
            check_writable(self.path / name)
        check_writable(self.metrics)
        check_writable(self.validation)
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
        """Sets aside what came after the checkpoint at `images`.

        That is lines, snapshots and damaged checkpoints.
        """
        self.keep_lines(images, warn)
        self.keep_snapshots(images, warn)
        self.note_saved(images)  # 0 if there is none yet, however many lines come before one
        later = [p for p in checkpoint.checkpoint_folders(self.checkpoints) if int(p.name) > images]
        for folder in later:
            folder.rename(_unused(folder.with_name(f"{folder.name}.damaged")))
            self.grid(int(folder.name)).unlink(missing_ok=True)  # of weights that are not any more
        if later and images:
            newest = checkpoint.folder_name(images)
            write_text(self.checkpoints / "latest", newest + "\n")
        self.name_best()

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

    def keep_lines(self, images: int, warn: Say) -> None:
        """Keeps the lines up to the checkpoint at `images`, and sets damaged ones aside.

        Those of metrics, and those of validation.
        """
        for path in (self.metrics, self.validation):
            if path.exists():
                _keep_lines(path, images, warn)

    def keep_snapshots(self, images: int, warn: Say) -> None:
        """Keeps those up to the checkpoint at `images`."""
        snapshots.trim(self.snapshots, images, warn)

    def log(self, line: dict[str, Any]) -> None:
        """Appends a line of metrics."""
        _append(self.metrics, line)

    def log_validation(self, line: dict[str, Any]) -> None:
        """Appends a line of validation."""
        _append(self.validation, line)

    def note(self, kind: str, images: int, **facts: Any) -> None:
        """Appends to events.jsonl what happened at so many images, and when."""
        _append(self.events, {"kind": kind, "images": images, "time": time.time()} | facts)

    def last_line(self, path: Path) -> dict[str, Any]:
        """The values of the last sound line of metrics or validation; without lines, none."""
        lines = read_lines(path).good
        return lines[-1].values if lines else {}

    def validated(self) -> set[int]:
        """The images after which there is a line of validation."""
        return {line.images for line in read_lines(self.validation).good}

    def validation_losses(self, weights: str = "ema") -> dict[int, float]:
        """The validation loss of these weights after so many images, where it was finite."""
        lines = read_lines(self.validation, is_validation).good
        told = (
            (line.images, line.values["weights"].get(weights, {}).get("loss")) for line in lines
        )
        return {images: float(loss) for images, loss in told if isinstance(loss, int | float)}

    def name_best(self) -> None:
        """Lets the file `best` name the checkpoint of the lowest validation loss; if there is one.

        Of equal ones it is the first.
        """
        losses = self.validation_losses()
        there = (int(p.name) for p in checkpoint.checkpoint_folders(self.checkpoints))
        known = [(losses[images], images) for images in there if images in losses]
        path = self.checkpoints / BEST
        if known:
            write_text(path, f"{checkpoint.folder_name(min(known)[1])}\n")
        else:
            path.unlink(missing_ok=True)

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


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(to_json(line, str(path), indent=None) + "\n")


def _keep_lines(path: Path, images: int, warn: Say) -> None:
    lines = read_lines(path)
    if lines.damaged:
        aside = _unused(path.with_name(f"{path.name}.damaged"))
        _write_lines(aside, lines.damaged)
        numbers = ", ".join(str(line.number) for line in lines.damaged[:10])
        more = f" and {len(lines.damaged) - 10:,} more" if len(lines.damaged) > 10 else ""
        warn(f"{path}: damaged at line {numbers}{more}; kept in {aside.name}")
    _write_lines(path, [line for line in lines.good if line.images <= images])


def _write_lines(path: Path, lines: list[Line]) -> None:
    with whole(path) as part:
        part.write_bytes(b"".join(line.text + b"\n" for line in lines))


def _unused(path: Path) -> Path:
    """The path, or the first of path.2, path.3, ... that is not taken."""
    candidate, n = path, 2
    while candidate.exists():
        candidate, n = path.with_name(f"{path.name}.{n}"), n + 1
    return candidate
