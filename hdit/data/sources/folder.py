"""A folder of image files: flat, with one sub-folder for each class, or with a sheet of labels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from PIL import Image
from pydantic import Field

from hdit.bounds import Name
from hdit.data.images import Images, ImagesSpec, file_stamp, open_image, refuse_path
from hdit.data.source import DataError
from hdit.data.sources.listing import arrange


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
        self.root = Path(path).expanduser()
        self.prefix = os.path.join(self.root, "")
        if not self.root.is_dir():
            raise refuse_path(path, "folder", "is not a folder")
        try:
            names = list(_files_below(self.root))
        except OSError as error:
            raise DataError(f"data.path: {path!r} cannot be listed: {error}") from None
        listing = arrange(
            names, lambda name: (self.root / name).read_bytes(), f"data.path: {path!r}"
        )
        self.names, self.labels, self.classes = listing

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


def _files_below(root: Path) -> Iterator[str]:
    """Files of the folder and all folders in it, by their name relative to it.

    Hidden folders are left out, and links to a folder are followed at the top alone.
    """
    with os.scandir(root) as found:
        entries = list(found)
    for entry in entries:
        # of a link that leads nowhere, or to itself, entry.is_dir() may raise
        if not (os.path.isdir(entry) if entry.is_symlink() else entry.is_dir()):
            yield entry.name
        elif not entry.name.startswith("."):
            for parent, folders, files in os.walk(entry.path, onerror=_raise):
                folders[:] = [name for name in folders if not name.startswith(".")]
                inside = Path(parent).relative_to(root).as_posix()
                yield from (f"{inside}/{name}" for name in files)


def _raise(error: OSError) -> None:
    raise error
