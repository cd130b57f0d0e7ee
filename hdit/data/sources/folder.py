"""A folder of image files: flat, with one sub-folder for each class, or with a sheet of labels."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Literal

from PIL import Image
from pydantic import Field

from hdit.bounds import Name
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
from hdit.data.sources.tree import walk
from hdit.names import path_of
from hdit.reading import read_bytes


class FolderSpec(ImagesSpec):
    """Images of any format that Pillow decodes.

    `metadata.jsonl`, `metadata.csv` or `dataset.json` in the folder has the labels, if it is there.
    """

    kind: Literal["folder"] = "folder"
    path: Name = Field(description="the folder, relative to where the command runs")

    def open(self) -> Images:
        """Lists the folder. Raises DataError where it is missing, empty or of mixed layout."""
        return Images(self, Folder(self.path))


class Folder:
    """The images in a folder and its sub-folders. See hdit.data.images.Entries."""

    setting = "data.path"

    def __init__(self, path: str):
        self.place = path
        self.root = path_of(path)
        self.prefix = os.path.join(self.root, "")
        if not os.path.isdir(self.root):  # False also for a name that is too long
            raise refuse_path(path, "folder", "is not a folder")
        try:
            tree = walk(self.root)
        except OSError as error:
            raise DataError(f"data.path: {path!r} cannot be listed: {error}") from None
        for link, listed in tree.repeats:
            raise DataError(
                f"data.path: {path!r} leads to one folder twice, by {listed!r} and by {link!r}; "
                "remove one of the links, or an image would be there twice"
            )
        tops = [f"{name}/" for name in tree.folders if "/" not in name]
        content = Content(
            text=lambda name: read_bytes(self.root / name, MAX_SHEET),
            start=lambda name: start_of(self.root / name),
        )
        listing = arrange([*tree.files, *tops], content, f"data.path: {path!r}")
        self.names, self.labels, self.classes, self.left_out, self.warnings = listing

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

    def content(self, index: int) -> bytes:
        """The bytes of the file. Raises OSError, or ValueError for what is no regular file."""
        path = self.name(index)
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("is not a regular file")  # a pipe would be waited for
        with open(path, "rb", buffering=0) as file:
            return file.readall()


def start_of(path: Path) -> bytes:
    """The first bytes of a file; none of what is not a regular one, which is not opened."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        return b""
    with open(path, "rb", buffering=0) as file:
        return file.read(SIGNATURE_BYTES)
