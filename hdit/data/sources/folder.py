"""A folder of image files: flat, with one sub-folder for each class, or with a sheet of labels."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from PIL import Image
from pydantic import Field

from hdit.data.images import (
    SIGNATURE_BYTES,
    Images,
    ImagesSpec,
    file_stamp,
    open_image,
    refuse_path,
)
from hdit.data.source import DataError
from hdit.data.sources.listing import Content, arrange
from hdit.data.sources.sheets import MAX_SHEET
from hdit.names import path_of, printable
from hdit.reading import read_bytes


class FolderSpec(ImagesSpec):
    """Images of any format that Pillow decodes.

    `metadata.jsonl`, `metadata.csv` or `dataset.json` in the folder has the labels, if it is there.
    """

    kind: Literal["folder"] = "folder"
    path: str = Field(min_length=1, description="the folder, relative to where the command runs")

    def open(self) -> Images:
        """Lists the folder. Raises DataError where it is missing, empty or of mixed layout."""
        return Images(self, Folder(self.path))


LINKS = "links to folders"


class Folder:
    """The images in a folder and its sub-folders. See hdit.data.images.Entries."""

    setting = "data.path"

    def __init__(self, path: str):
        self.place = path
        self.root = path_of(path)
        self.prefix = os.path.join(self.root, "")
        if not os.path.isdir(self.root):  # False also for a name that is too long
            raise refuse_path(path, "folder", "is not a folder")
        links: list[str] = []
        try:
            names = list(_names_below(self.root, links))
        except OSError as error:
            raise DataError(f"data.path: {path!r} cannot be listed: {error}") from None
        content = Content(
            text=lambda name: read_bytes(self.root / name, MAX_SHEET), start=self._start
        )
        listing = arrange(names, content, f"data.path: {path!r}")
        self.names, self.labels, self.classes, self.left_out, self.warnings = listing
        if links:
            self.left_out[LINKS] = len(links)
            self.warnings.append(
                f"data.path: {path!r}: {len(links):,} links to folders within its sub-folders are "
                f"not followed, as {printable(links[0])}"
            )

    def _start(self, name: str) -> bytes:
        """The first bytes of a file; none of what is not a regular one, which is not opened."""
        path = f"{self.prefix}{name}"
        if not stat.S_ISREG(os.stat(path).st_mode):
            return b""
        with open(path, "rb", buffering=0) as file:
            return file.read(SIGNATURE_BYTES)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """The path of the image."""
        return f"{self.prefix}{self.names[index]}"

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Opens the image -> (image, class index)."""
        return open_image(self.name(index)), self.labels[index]

    def stamp(self, index: int) -> str:
        """The name and label of the image, and the state of its file."""
        return f"{self.names[index]} {self.labels[index]} {file_stamp(self.name(index))}"


def _names_below(root: Path, links: list[str]) -> Iterator[str]:
    """Files of the folder and all folders in it, by their name relative to it.

    Sub-folders at the top come too, with a "/" at their end. Hidden folders are left out. Links to
    a folder are followed at the top alone; others are added to `links`.
    """
    with os.scandir(root) as found:
        entries = list(found)
    for entry in entries:
        # of a link that leads nowhere, or to itself, entry.is_dir() may raise
        if not (os.path.isdir(entry) if entry.is_symlink() else entry.is_dir()):
            yield entry.name
        elif not entry.name.startswith("."):
            yield f"{entry.name}/"
            for parent, folders, files in os.walk(entry.path, onerror=_raise):
                folders[:] = [name for name in folders if not name.startswith(".")]
                links += [p for n in folders if os.path.islink(p := os.path.join(parent, n))]
                inside = Path(parent).relative_to(root).as_posix()
                yield from (f"{inside}/{name}" for name in files)


def _raise(error: OSError) -> None:
    raise error
