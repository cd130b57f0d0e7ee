"""Images in an npz file, as ADM and DiT write their samples."""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from hdit.bounds import Name
from hdit.data.images import Images, ImagesSpec, file_stamp, numbered, refuse_path
from hdit.data.source import DataError
from hdit.data.transforms import to_image


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

    def __init__(self, path: str):
        self.place, self.path = path, Path(path).expanduser()
        if not self.path.is_file():
            raise refuse_path(path, "npz", "is not a file")
        where = f"data.path: {path!r}"
        self.stamp_of_file = file_stamp(self.path)
        try:
            keys, arrays = _read_arrays(self.path)
        except UNREADABLE as error:
            raise DataError(f"{where} cannot be read as npz: {error}") from None
        if "arr_0" not in arrays:
            held = ", ".join(keys) or "nothing"
            raise DataError(f"{where} has no arr_0, (n h w c) uint8 images; it holds {held}")
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
        return Arrays, (self.place,)

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


LABELS = ("arr_1", "labels")
UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


def _read_arrays(path: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """Reads (names in the file, arrays that are wanted): mapped, or unpacked where compressed.

    Raises ValueError for Python objects, which a pickle would have to make.
    """
    with zipfile.ZipFile(path) as file:
        members = {member.filename.removesuffix(".npy"): member for member in file.infolist()}
        arrays: dict[str, np.ndarray] = {}
        for key in ("arr_0", *LABELS):
            if key not in members:
                continue
            with file.open(members[key]) as stream:
                shape, fortran, dtype = _array_header(stream)
                if dtype.hasobject:
                    raise ValueError(f"{key} holds Python objects, and no pickle is read")
                start = stream.tell()
            if members[key].compress_type == zipfile.ZIP_STORED and 0 not in shape:
                arrays[key] = np.memmap(
                    path,
                    dtype=dtype,
                    mode="r",
                    offset=_content_start(path, members[key]) + start,
                    shape=shape,
                    order="F" if fortran else "C",
                )
            else:
                with file.open(members[key]) as stream:
                    arrays[key] = np.lib.format.read_array(stream, allow_pickle=False)
    return list(members), arrays


def _array_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, in Fortran's order, dtype); the stream is left where the values begin."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(stream)
    raise ValueError(f"an array of npy version {version}; save it again with plain keys")


def _content_start(path: Path, member: zipfile.ZipInfo) -> int:
    """Byte at which the content of a member that is not compressed begins."""
    with open(path, "rb") as file:
        file.seek(member.header_offset + 26, os.SEEK_SET)
        name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
    return member.header_offset + 30 + name + extra
