"""A folder of image files: flat, with one sub-folder for each class, or with a sheet of labels."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from PIL import Image
from pydantic import Field

from hdit.data.images import Images, ImagesSpec, file_stamp, open_image, refuse_path
from hdit.data.source import DataError
from hdit.data.sources.listing import arrange
from hdit.data.sources.tree import walk


class FolderSpec(ImagesSpec):
    """Images of any format that Pillow decodes.

    `metadata.jsonl`, `metadata.csv` or `dataset.json` in the folder has the labels, if it is there.
    """

    kind: Literal["folder"] = "folder"
    path: str = Field(description="the folder, relative to where the command runs")

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
            tree = walk(self.root)
        except OSError as error:
            raise DataError(f"data.path: {path!r} cannot be listed: {error}") from None
        for link, listed in tree.repeats:
            raise DataError(
                f"data.path: {path!r} leads to one folder twice, by {listed!r} and by {link!r}; "
                "remove one of the links, or an image would be there twice"
            )
        listing = arrange(
            tree.files, lambda name: (self.root / name).read_bytes(), f"data.path: {path!r}"
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
