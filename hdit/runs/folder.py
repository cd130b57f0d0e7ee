"""The folder of a run: config.toml, classes.json, metrics.jsonl, samples/ and checkpoints/."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hdit.config import RunConfig
from hdit.errors import UserError
from hdit.files import write_text
from hdit.runs import checkpoint


class RunFolder:
    """Where one session of training writes; only the main process does."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the folder; while the block runs, another trainer is refused."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{self.path}: another process is training this run; wait for its end, or name "
                    "another --run"
                ) from None
            yield

    def prepare(self, config: RunConfig, images: int, classes: list[str]) -> None:
        """Writes config and classes, and sets aside what came after the checkpoint at `images`."""
        write_text(self.path / "config.toml", config.dump())
        if classes:
            mapping = {name: label for label, name in enumerate(classes)}
            text = json.dumps(mapping, indent=1, ensure_ascii=False) + "\n"
            write_text(self.path / "classes.json", text)
        if self.metrics.exists():
            lines = [json.dumps(line) for line in read_metrics(self.metrics, images)]
            write_text(self.metrics, "".join(f"{line}\n" for line in lines))
        if not self.checkpoints.is_dir():
            return
        for part in self.checkpoints.glob(".*.part"):  # of a killed run
            shutil.rmtree(part) if part.is_dir() else part.unlink()
        later = [p for p in checkpoint.checkpoint_folders(self.checkpoints) if int(p.name) > images]
        for folder in later:  # damaged, or the run would have resumed from it
            folder.rename(_unused(folder.with_name(f"{folder.name}.damaged")))
        if later and images:
            newest = checkpoint.folder_name(images)
            write_text(self.checkpoints / "latest", newest + "\n")

    def log(self, line: dict[str, Any]) -> None:
        """Appends a line of metrics."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def grid(self, images: int) -> Path:
        """The file of the grid of samples after so many images."""
        return self.path / "samples" / f"{checkpoint.folder_name(images)}.png"


def read_metrics(path: Path, images: int) -> list[dict[str, Any]]:
    """The lines up to the checkpoint at `images`; a killed run leaves later ones, the last cut."""
    found = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
            if line["images"] <= images:
                found.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _unused(path: Path) -> Path:
    """The path, or the first of path.2, path.3, ... that is not taken."""
    candidate, n = path, 2
    while candidate.exists():
        candidate, n = path.with_name(f"{path.name}.{n}"), n + 1
    return candidate
