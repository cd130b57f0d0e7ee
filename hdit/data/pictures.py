"""What all sources of picture files share: settings, pixels, and what happens to a bad one."""

from __future__ import annotations

import errno
import io
import os
import stat
import warnings
from collections.abc import Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal, Protocol

import numpy as np
from PIL import Image, ImageColor, UnidentifiedImageError
from pydantic import AfterValidator, Field, ValidationInfo, field_validator
from torch import Tensor

from hdit.data.augmentation import Augmentation, AugmentationSetting
from hdit.data.source import DataError, Sample, Size, Skipped
from hdit.data.transforms import center_crop, shorter_side_crop, to_mode, to_tensor
from hdit.protocols import Spec

MAX_PIXELS = 178_956_970  # Pillow opens no picture that has more
MAX_BAD_SHARE = 0.05
MIN_DRAWN = 100  # before the share of bad pictures says anything
CROPS = {"center": center_crop, "shorter_side": shorter_side_crop}

UNREADABLE = {
    "EPS": "is a program that another program has to run",
    "WMF": "is drawn by Windows",
    "MPEG": "is a film",
    "BUFR": "is known by name alone",
    "GRIB": "is known by name alone",
    "HDF5": "is known by name alone",
}
"""Formats that Pillow opens but does not decode by itself, and why."""


# ---- settings ------------------------------------------------------------------------------------


def _colour(name: str) -> str:
    try:
        if len(ImageColor.getrgb(name)) == 3:
            return name
    except ValueError:
        pass
    raise ValueError("must be an opaque colour, as in 'white' or '#808080'")


class PicturesSpec(Spec):
    """Pictures of any size and mode, made one size."""

    kind: str
    size: Size = Field(description="side in pixels, or [height, width]")
    channels: Literal[1, 3] = Field(3, description="3 for RGB, 1 for grey")
    flip: bool = Field(True, description="mirror half of the images, at random")
    augment: AugmentationSetting = Field(
        Augmentation(), description="probability of each non-leaking change to an image; 0 for none"
    )
    crop: Literal["center", "shorter_side"] = Field(
        "center", description="ADM's, by halving, or k-diffusion's, by one bicubic resize"
    )
    background: Annotated[str, AfterValidator(_colour)] = Field(
        "white", description="colour that what is transparent lies on"
    )
    max_pixels: int = Field(
        MAX_PIXELS, gt=0, le=MAX_PIXELS, description="a picture of more is bad, and not decoded"
    )
    bad_files: Literal["skip", "fail"] = Field(
        "skip", description="name one that cannot be read and take the next, or end there"
    )
    max_bad_share: float | None = Field(
        None,
        ge=0,
        le=1,
        description=f"of the pictures, or training ends; {MAX_BAD_SHARE} if absent",
    )

    @field_validator("max_bad_share")
    @classmethod
    def _only_where_bad_files_are_skipped(
        cls, share: float | None, info: ValidationInfo
    ) -> float | None:
        if share is not None and info.data.get("bad_files") == "fail":
            raise ValueError("has no effect with bad_files = 'fail', which ends at the first")
        return share

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, *self.size


# ---- the source ----------------------------------------------------------------------------------


class Entries(Protocol):
    """Pictures and their labels by index, listed but not read.

    `setting` and `place` say in errors where they come from; `classes` is empty without labels.
    `load` may raise anything where a picture is bad, and DataError where more is wrong than that.
    """

    setting: str
    place: str
    classes: list[str]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def load(self, index: int) -> tuple[Image.Image, int]: ...


class Pictures:
    """A source of labelled images, in which the next good picture stands in for a bad one.

    A known bad picture is not tried again. How many there are is judged by those that were drawn,
    which are a fair choice; those that were tried as a stand-in are often neighbours.
    """

    def __init__(self, spec: PicturesSpec, entries: Entries):
        self.spec, self.entries = spec, entries
        self.classes = entries.classes
        self.unreadable: dict[int, Skipped] = {}
        self._drawn = np.zeros(len(entries), bool)  # not counted: each once
        self._num_drawn = self._num_bad = 0

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        """The image at `index`; where that picture cannot be read, the next one that can.

        Raises DataError where too many are bad: all of them, more than their share, or one where
        none may be.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        skipped: list[Skipped] = []
        for i in chain(range(index, len(self)), range(index)):
            found = self._read(i)
            if i == index:
                self._judge(index, found)
            if not isinstance(found, Skipped):
                return Sample(*found, tuple(skipped))
            skipped.append(found)
        raise DataError(
            f"{self.entries.setting}: none of the {len(self)} files in {self.entries.place!r} "
            f"could be read; the first: {skipped[0].path}: {skipped[0].reason}"
        )

    def _read(self, index: int) -> tuple[Tensor, int] | Skipped:
        if (known := self.unreadable.get(index)) is not None:
            return known
        try:
            image, label = self.entries.load(index)
            with image:
                return to_pixels(image, self.spec), label
        except (MemoryError, DataError):
            raise
        except Exception as error:  # Pillow's plug-ins raise many kinds on a damaged file
            if isinstance(error, OSError) and error.errno in EXHAUSTED:
                raise
            reason = f"{type(error).__name__}: {error}"
            self.unreadable[index] = Skipped(self.entries.name(index), reason)
            return self.unreadable[index]

    def _judge(self, index: int, found: tuple[Tensor, int] | Skipped) -> None:
        """Counts a picture that was drawn. Raises DataError where too many of them are bad."""
        bad = isinstance(found, Skipped)
        if bad and self.spec.bad_files == "fail":
            file = self.unreadable[index]
            raise DataError(
                f"{file.path}: {file.reason}; mend or remove it, or set data.bad_files = 'skip'"
            )
        if not self._drawn[index]:
            self._drawn[index] = True
            self._num_drawn += 1
            self._num_bad += bad
        share = MAX_BAD_SHARE if self.spec.max_bad_share is None else self.spec.max_bad_share
        if too_many(self._num_bad, self._num_drawn, len(self), share):
            file = next(reversed(self.unreadable.values()))
            raise DataError(
                f"{self.entries.setting}: {self._num_bad} of {self._num_drawn} files drawn from "
                f"{self.entries.place!r} so far are bad, beyond data.max_bad_share = {share:g}; "
                f"the last: {file.path}: {file.reason}"
            )


EXHAUSTED = {errno.ENOMEM, errno.EMFILE, errno.ENFILE}
"""What a file cannot be blamed for: no memory, too many open files."""


def too_many(bad: int, drawn: int, length: int, share: float) -> bool:
    """Whether `bad` of `drawn` are more than a share, by more than chance (3 standard deviations).

    Where all were drawn there is no chance in it.
    """
    margin = 0.0 if drawn == length else 3 * float(np.sqrt(share * drawn))
    return drawn >= MIN_DRAWN and bad > share * drawn + margin


# ---- pixels --------------------------------------------------------------------------------------


def to_pixels(image: Image.Image, spec: PicturesSpec) -> Tensor:
    """(c h w) uint8, by the settings. Raises ValueError, before decoding, for a huge picture."""
    _, height, width = spec.shape
    size = f"{image.width} x {image.height} pixels"
    if image.width * image.height > spec.max_pixels:
        raise ValueError(f"{size} are more than data.max_pixels = {spec.max_pixels}")
    scale = max(height / image.height, width / image.width)
    if image.width * image.height * scale**2 > max(MAX_PIXELS, 4 * height * width):
        raise ValueError(f"{size} are too narrow to be made {width} x {height}")
    with warnings.catch_warnings(action="ignore"):  # Pillow's, of metadata; they name no file
        image = CROPS[spec.crop](to_mode(image, spec.channels, spec.background), height, width)
    return to_tensor(image)


@cache
def formats() -> tuple[str, ...]:
    """Those that Pillow decodes by itself."""
    Image.init()
    return tuple(sorted(set(Image.OPEN) - set(UNREADABLE)))


@cache
def extensions() -> frozenset[str]:
    """Of files in such a format, as in ".png"."""
    known = Image.registered_extensions().items()
    return frozenset(ext for ext, name in known if name in formats())


def open_picture(file: str | bytes) -> Image.Image:
    """A picture, by path or content, of which no more than the header is read."""
    if isinstance(file, str) and not stat.S_ISREG(os.stat(file).st_mode):
        raise ValueError("is not a regular file")  # a pipe would be waited for
    with warnings.catch_warnings(action="ignore"):  # of many pixels: they are counted in to_pixels
        try:
            return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, "r", formats())
        except UnidentifiedImageError:
            empty = not (os.path.getsize(file) if isinstance(file, str) else file)
            raise UnidentifiedImageError(
                "the file is empty" if empty else "in no format that Pillow reads"
            ) from None


# ---- words for those who list pictures -----------------------------------------------------------


def kind_of(path: str) -> str | None:
    """The kind of source that a path tells; None where it is a file of another kind."""
    place = Path(path).expanduser()
    suffix = place.suffix.lower()
    if place.is_dir():
        saved = any((place / name).is_file() for name in ("dataset_dict.json", "state.json"))
        return "hub" if saved else "folder"
    if suffix in (".zip", ".npz"):
        return suffix[1:]
    return None if place.exists() else "folder"


def refuse_path(path: str, kind: str, trouble: str) -> DataError:
    """The error for a path that a source of this kind cannot be opened at."""
    place = Path(path).expanduser()
    if not place.exists():
        trouble = f"does not exist (seen from {Path.cwd()})"
    hint = "set it in the config, or with --set data.path=PATH"
    if place.exists() and (other := kind_of(path)) not in (None, kind):
        hint = f'set data.kind = "{other}", or leave it out'
    return DataError(f"data.path: {path!r} {trouble}; {hint}")


def numbered(labels: np.ndarray | Sequence[int], where: str) -> list[str]:
    """Names of classes that are numbered from 0. Raises DataError for a number that cannot be."""
    low, high = int(np.min(labels)), int(np.max(labels))
    if low < 0 or high >= MAX_CLASSES:
        bad = low if low < 0 else high
        raise DataError(f"{where}: labels must be class indices from 0, got {bad}")
    return [str(label) for label in range(high + 1)]


MAX_CLASSES = 1_000_000
"""Beyond it a label is rather an identifier, and its table of embeddings would not fit."""
