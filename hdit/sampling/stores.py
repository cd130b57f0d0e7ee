"""Where images lie while a set is made: each is there whole, or not at all.

Several threads and processes may put images into a store at the same time.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from hdit.errors import UserError
from hdit.files import check_writable, whole
from hdit.report.grids import to_picture
from hdit.sampling.record import Plan

TEXT_KEY = "hdit"
"""The keyword of the text in a PNG file that tells how it was made."""

PNG_END = b"\0\0\0\0IEND\xaeB`\x82"  # the last chunk; a file that was cut off lacks it

NPY_HEADER = 128  # bytes that numpy.save writes before the values


class Store(Protocol):
    """Images (c h w) uint8 by index."""

    def there(self) -> np.ndarray:
        """Which images are there: (n,) bool."""

    def put(self, indices: np.ndarray, images: Tensor) -> None:
        """Stores images (b c h w) uint8. Raises WritingError."""

    def get(self, index: int) -> Tensor:
        """Reads one image. Raises OSError or ValueError where it is damaged."""


def to_png(image: Tensor, text: str) -> bytes:
    """The PNG file of an image (c h w) uint8, with a text in ASCII under TEXT_KEY."""
    content, info = io.BytesIO(), PngInfo()
    info.add_text(TEXT_KEY, text)
    to_picture(image).save(content, format="PNG", pnginfo=info)
    return content.getvalue()


def from_png(content: bytes) -> Tensor:
    """The pixels of a PNG file, (c h w) uint8."""
    with Image.open(io.BytesIO(content)) as picture:
        pixels = np.asarray(picture)
    return torch.from_numpy(np.atleast_3d(pixels).transpose(2, 0, 1).copy())


class Pictures:
    """A folder of PNG files, named by seed; `text` gives what is told in each."""

    def __init__(self, folder: Path, plan: Plan, text: Callable[[int], str]):
        self.folder, self.plan, self.text = folder, plan, text

    def path(self, index: int) -> Path:
        """The file of an image."""
        return self.folder / f"{self.plan.name(index)}.png"

    def there(self) -> np.ndarray:
        """Which images are there. Raises UserError where anything but a file has their names."""
        found = np.zeros(self.plan.number, bool)
        for entry in os.scandir(self.folder) if self.folder.is_dir() else ():
            index = self.plan.index(entry.name)
            if index is not None:
                check_writable(Path(entry.path))
                if entry.is_dir():
                    raise UserError(
                        f"{entry.path}: is a folder, in the place of an image; name another --out"
                    )
                found[index] = _ends_well(entry.path)
        return found

    def put(self, indices: np.ndarray, images: Tensor) -> None:
        """See Store."""
        for index, image in zip(indices.tolist(), images, strict=True):
            # Shared: a process of a session that was killed may be at its last batch still.
            with whole(self.path(index), shared=True, durable=False) as part:
                part.write_bytes(to_png(image, self.text(index)))

    def sweep(self) -> None:
        """Removes what killed processes left of images that they had begun to write."""
        for entry in os.scandir(self.folder):
            begun = re.fullmatch(r"\.([0-9]+\.png)\..*\.part", entry.name)
            if begun and self.plan.index(begun[1]) is not None:
                Path(entry.path).unlink(missing_ok=True)

    def get(self, index: int) -> Tensor:
        """See Store."""
        return from_png(self.path(index).read_bytes())


def _ends_well(path: str) -> bool:
    """Whether a PNG file has its end: after a power failure it may be shorter than was written."""
    with open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - len(PNG_END)))
        return file.read() == PNG_END


class Pixels:
    """A folder of .npy files, each of images one after the other, (k h w c) uint8."""

    def __init__(self, folder: Path, plan: Plan):
        self.folder, self.number = folder, plan.number
        c, h, w = plan.shape
        self.shape = (h, w, c)

    def _blocks(self) -> list[tuple[int, int, Path]]:
        """(first image, number of images, file) of what is whole, in order."""
        found = []
        for entry in os.scandir(self.folder) if self.folder.is_dir() else ():
            if match := re.fullmatch(r"([0-9]{1,9})-([0-9]{1,9})\.npy", entry.name):
                first, count = int(match[1]), int(match[2])
                size = NPY_HEADER + count * math.prod(self.shape)
                if first + count <= self.number and entry.stat().st_size == size:
                    found.append((first, count, Path(entry.path)))
        return sorted(found)

    @cached_property
    def _listed(self) -> list[tuple[int, int, Path]]:
        """The blocks of a set whose images are all there."""
        return self._blocks()

    def there(self) -> np.ndarray:
        """See Store."""
        found = np.zeros(self.number, bool)
        for first, count, _ in self._blocks():
            found[first : first + count] = True
        return found

    def put(self, indices: np.ndarray, images: Tensor) -> None:
        """See Store: a file for each row of images that follow one another."""
        pixels = images.permute(0, 2, 3, 1).numpy()  # (b h w c)
        ends = np.flatnonzero(np.diff(indices) != 1) + 1
        for row, block in zip(np.split(indices, ends), np.split(pixels, ends), strict=True):
            path = self.folder / f"{row[0]}-{len(row)}.npy"
            with whole(path, shared=True, durable=False) as part, part.open("wb") as file:
                np.save(file, np.ascontiguousarray(block))

    def get(self, index: int) -> Tensor:
        """See Store."""
        for first, count, path in self._listed:
            if first <= index < first + count:
                block = np.load(path, mmap_mode="r", allow_pickle=False)
                return torch.from_numpy(block[index - first].transpose(2, 0, 1).copy())
        raise KeyError(index)

    def all(self) -> Iterator[np.ndarray]:
        """All images in order, each once, in blocks (k h w c); all must be there."""
        done = 0
        for first, count, path in self._listed:
            block = np.load(path, mmap_mode="r", allow_pickle=False)[max(0, done - first) :]
            assert first <= done, "all images must be there"
            yield block
            done = max(done, first + count)
        assert done == self.number, "all images must be there"
