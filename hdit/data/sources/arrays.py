"""Images in an npz file, as ADM and DiT write their samples."""

from __future__ import annotations

import os
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from hdit.arrays import ArraysError, read_npz
from hdit.bounds import Name
from hdit.data.images import (
    Images,
    ImagesSpec,
    file_stamp,
    numbered,
    pixel_content,
    refuse_path,
)
from hdit.data.source import DataError
from hdit.data.transforms import to_image
from hdit.names import path_of, printable


class NpzSpec(ImagesSpec):
    """`arr_0`, (n h w c) uint8, and `arr_1` or `labels`, (n,) class indices, if it is there."""

    kind: Literal["npz"] = "npz"
    path: Name = Field(description="the file, relative to where the command runs")

    def open(self) -> Images:
        """Opens the file. Raises DataError where its arrays are missing, or not of these shapes."""
        return Images(self, Arrays(self.path))


class Arrays:
    """The images of an npz file, mapped if it is not compressed. See hdit.data.images.Entries."""

    setting = "data.path"

    def __init__(self, path: str, labelled: bool = True):
        """Opens the file; without labels nothing but arr_0 is read of it. Raises DataError."""
        self.place, self.path, self.labelled = path, path_of(path), labelled
        if not os.path.isfile(self.path):
            raise refuse_path(path, "npz", "is not a file")
        where = f"data.path: {path!r}"
        self.stamp_of_file = file_stamp(self.path)
        try:
            names, arrays = read_npz(self.path, ("arr_0", *(LABELS if labelled else ())))
        except ArraysError as error:
            raise DataError(f"{where} cannot be read as npz: {error.reason}") from None
        if "arr_0" not in arrays:
            raise DataError(f"{where} has no arr_0, (n h w c) uint8 images; {_held(names)}")
        self.images = arrays["arr_0"]  # (n h w c)
        shape = " x ".join(map(str, self.images.shape))
        if (
            self.images.dtype != np.uint8
            or self.images.ndim != 4
            or not 1 <= self.images.shape[3] <= 4
        ):
            raise DataError(
                f"{where}: arr_0 must be (n h w c) uint8 with 1 to 4 channels, got "
                f"{self.images.dtype} of {shape}"
            )
        if not self.images.size:
            raise DataError(f"{where}: arr_0 is empty ({shape})")
        given = [key for key in LABELS if key in arrays]
        if len(given) > 1:
            raise DataError(f"{where} has labels twice, as {' and '.join(given)}")
        others = set(names) - {"arr_0", *LABELS, *STATISTICS} if labelled else set()
        self.warnings = [
            f"{where}: {', '.join(map(printable, sorted(others)))} in it is not read; images are "
            f"taken from arr_0, and labels from {' or '.join(LABELS)}"
        ][: len(others)]
        self.labels, self.classes = np.zeros(len(self.images), np.int64), list[str]()
        for key in given:
            labels = arrays[key]
            if labels.shape != (len(self.images),) or labels.dtype.kind not in "iu":
                raise DataError(
                    f"{where}: {key} must be {len(self.images)} class indices, one for each image, "
                    f"got {labels.dtype} of {' x '.join(map(str, labels.shape)) or 'no shape'}"
                )
            self.labels, self.classes = labels, numbered(labels, f"{where}: {key}")

    def __reduce__(self) -> tuple[Any, ...]:
        """A process that is not a fork maps the file again."""
        return Arrays, (self.place, self.labelled)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """The file and the place in it."""
        return f"{self.path}[{index}]"

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Takes the image -> (image, class index)."""
        return to_image(self.images[index]), int(self.labels[index])

    def stamp(self, index: int) -> str:
        """The place of the image, and the state of the file."""
        return f"{index} {self.stamp_of_file}"

    def content(self, index: int) -> bytes:
        """The pixels of the image, which the file has nothing but."""
        return pixel_content(to_image(self.images[index]))


LABELS = ("arr_1", "labels")
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")  # of features, which ADM's files hold as well


def _held(names: list[str]) -> str:
    """What a file holds that has no images, in words."""
    held = f"it holds {', '.join(names) or 'nothing'}"
    if {"mu", "sigma"} <= set(names):
        return f"{held}: statistics of features, and no images; name the images"
    return held
