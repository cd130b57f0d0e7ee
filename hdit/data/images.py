"""Parts that all sources of image files share: settings, pixels, and what a bad file leads to."""

from __future__ import annotations

import errno
import io
import os
import stat
import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Annotated, Generic, Literal, Protocol, TypeVar

import numpy as np
import PIL
from PIL import Image, ImageColor, UnidentifiedImageError
from pydantic import AfterValidator, Field, ValidationInfo, field_validator
from torch import Tensor

from hdit.bounds import Name
from hdit.data.augmentation import Augmentation, AugmentationSetting
from hdit.data.cache import Cache
from hdit.data.kinds import kind_of
from hdit.data.source import (
    CENTER,
    HELD_OUT,
    Chance,
    DataError,
    HeldOutSetting,
    Sample,
    Size,
    Skipped,
    check_classes,
    class_names,
)
from hdit.data.transforms import center_crop, random_crop, shorter_side_crop, to_mode, to_tensor
from hdit.limits import MAX_CLASSES
from hdit.names import path_of, printable
from hdit.protocols import Spec

MAX_PIXELS = 178_956_970  # Pillow opens no image that has more
MAX_BAD_SHARE = 0.05
MIN_CROP = 0.8
MIN_DRAWN = 100  # before the share of bad images says anything; of fewer, all are judged

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


class ImagesSpec(Spec):
    """Images of any size and mode, made one size."""

    kind: str
    size: Size = Field(description="side in pixels, or [height, width]")
    channels: Literal[1, 3] = Field(3, description="3 for RGB, 1 for grey")
    flip: bool = Field(True, description="mirror half of the images, at random")
    augment: AugmentationSetting = Field(
        Augmentation(), description="probability of each non-leaking change to an image; 0 for none"
    )
    crop: Literal["center", "shorter_side", "random"] = Field(
        "center",
        description="the centre as in ADM, by halving, or as in k-diffusion, by one bicubic "
        "resize; or ADM's random window, another at each draw",
    )
    min_crop: float | None = Field(
        None,
        ge=0.1,
        le=1,
        description=f"smallest side of a random window, of the largest; {MIN_CROP} if absent",
    )
    background: Annotated[str, AfterValidator(_colour)] = Field(
        "white", description="colour that what is transparent lies on"
    )
    max_pixels: int = Field(
        MAX_PIXELS, gt=0, le=MAX_PIXELS, description="an image of more is bad, and not decoded"
    )
    bad_files: Literal["skip", "fail"] = Field(
        "skip", description="name one that cannot be read and take the next, or end there"
    )
    max_bad_share: float | None = Field(
        None,
        ge=0,
        le=1,
        description=f"of the images, or training ends; {MAX_BAD_SHARE} if absent",
    )
    classes: int | None = Field(
        None, ge=0, le=MAX_CLASSES, description="how many the data must have; any number if absent"
    )
    cache: Name | None = Field(
        None, description="folder that keeps the cropped pixels, and gives them from then on"
    )
    held_out: HeldOutSetting | None = Field(None, description=HELD_OUT)

    @field_validator("min_crop")
    @classmethod
    def _only_of_a_random_window(cls, share: float | None, info: ValidationInfo) -> float | None:
        if share is not None and info.data.get("crop") != "random":
            raise ValueError("has no effect without crop = 'random'")
        return share

    @field_validator("cache")
    @classmethod
    def _only_where_pixels_stay(cls, folder: str | None, info: ValidationInfo) -> str | None:
        if folder is not None and info.data.get("crop") == "random":
            raise ValueError(
                "cannot keep the pixels of crop = 'random', which are new at each draw"
            )
        return folder

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
        """(channels, height, width) of an image that training sees."""
        return self.channels, *self.size

    @property
    def bad_share(self) -> float:
        """The share of images that may be bad, by `max_bad_share`."""
        return MAX_BAD_SHARE if self.max_bad_share is None else self.max_bad_share


# ---- the source ----------------------------------------------------------------------------------


class Entries(Protocol):
    """Images and their labels by index, listed but not read.

    `setting` and `place` say in errors where they come from; `classes` is empty without labels.
    There may be `left_out`, the number of files that are not used by extension, and `warnings`,
    whole sentences.
    """

    setting: str
    place: str
    classes: list[str]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The name of the image in messages."""

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Opens the image, of which no more than the header need be read, and its class index.

        May raise anything where the image is bad, and DataError where more is wrong than that.
        """

    def stamp(self, index: int) -> str:
        """Text that changes when the image or its label does; it is what a cache goes by."""

    def content(self, index: int) -> bytes:
        """The bytes of the image's file; its pixels where there is none. May raise as `load`."""


class Chosen:
    """Some of the images of other entries, in an order of their own. See Entries."""

    def __init__(self, entries: Entries, indices: np.ndarray):
        self.entries, self.indices = entries, indices
        self.setting, self.place, self.classes = entries.setting, entries.place, entries.classes
        self.left_out: dict[str, int] = getattr(entries, "left_out", {})
        self.warnings: list[str] = getattr(entries, "warnings", [])

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        """See Entries, as of the others."""
        return self.entries.name(int(self.indices[index]))

    def load(self, index: int) -> tuple[Image.Image, int]:
        """See Entries."""
        return self.entries.load(int(self.indices[index]))

    def stamp(self, index: int) -> str:
        """See Entries."""
        return self.entries.stamp(int(self.indices[index]))

    def content(self, index: int) -> bytes:
        """See Entries."""
        return self.entries.content(int(self.indices[index]))


def pixel_content(image: Image.Image) -> bytes:
    """What stands for the content of an image that no file has: mode, size and pixels."""
    return f"{image.mode} {image.size} ".encode() + image.tobytes()


class Images:
    """A source of labelled images, in which the next good image stands in for a bad one."""

    def __init__(self, spec: ImagesSpec, entries: Entries):
        self.spec, self.entries = spec, entries
        where = f"{entries.setting}: {entries.place!r}"
        self.classes = class_names(entries.classes, where)
        check_classes(spec.classes, self.classes, entries.place)
        self.left_out: dict[str, int] = getattr(entries, "left_out", {})
        self.warnings: list[str] = getattr(entries, "warnings", [])
        self.bad: BadFiles[int] = BadFiles(
            spec,
            entries.setting,
            entries.place,
            len(entries),
            few=range(len(entries)) if len(entries) < MIN_DRAWN else None,
        )
        self.unreadable = self.bad.known  # by index
        self._drawn = np.zeros(len(entries), bool)  # not counted: each once
        self.cache = None if spec.cache is None else Cache(spec.cache, self._key(), spec.shape)

    def _key(self) -> str:
        """Key of a cache: all settings that change pixels, and the number of images."""
        s = self.spec
        origin = s.kind, self.entries.place, PIL.__version__
        return repr(
            (*origin, len(self), s.shape, s.crop, ImageColor.getrgb(s.background), s.max_pixels)
        )

    def __len__(self) -> int:
        return len(self.entries)

    def content(self, index: int) -> bytes:
        """The bytes of an image's file, as they are stored. See hdit.data.held_out."""
        return self.entries.content(index)

    def part(self, indices: np.ndarray) -> Images:
        """The source of these images alone: no other stands in for one that is bad."""
        return Images(self.spec, Chosen(self.entries, indices))

    def __getitem__(self, index: int) -> Sample:
        """The image at `index`; where that image cannot be read, the next one that can.

        Raises DataError where too many are bad: all of them, more than their share, or one where
        none may be.
        """
        return self.draw(index, CENTER)

    def draw(self, reference: int, chance: Chance) -> Sample:
        """The image at an index as above, with the window that a random crop takes by `chance`."""
        if not 0 <= reference < len(self):
            raise IndexError(f"image {reference} of {len(self)}")
        is_new = not self._drawn[reference]
        self._drawn[reference] = True
        indices = chain(range(reference, len(self)), range(reference))
        return self.bad.draw(indices, lambda i: self._get(i, chance), self.entries.name, is_new)

    def _get(self, index: int, chance: Chance) -> tuple[Tensor, int]:
        if self.cache is None:
            return self._load(index, chance)
        stamp = self.entries.stamp(index)
        if (kept := self.cache.get(index, stamp)) is None:
            kept = self._load(index, chance)
            self.cache.put(index, stamp, *kept)
        return kept

    def _load(self, index: int, chance: Chance) -> tuple[Tensor, int]:
        image, label = self.entries.load(index)
        with image:
            return pixels_of(image, self.spec, chance), label


Key = TypeVar("Key", bound=Hashable)


class BadFiles(Generic[Key]):
    """The images of a source that cannot be read, and whether they are too many.

    A known bad image is not tried again. How many there are is judged by those that were drawn,
    which are a fair choice; those that were tried as a stand-in are often neighbours. Of fewer than
    MIN_DRAWN images all are read at the first bad one, so that every process judges alike.
    """

    def __init__(
        self,
        spec: ImagesSpec,
        setting: str,
        place: str,
        length: int | None = None,
        few: Sequence[Key] | None = None,
    ):
        """`setting` and `place` as in Entries; `length` is how many images there are, if known.

        `few` are all images, where they are fewer than MIN_DRAWN.
        """
        self.spec, self.setting, self.place = spec, setting, place
        self.length, self.few = length, few
        self.known: dict[Key, Skipped] = {}
        self.count_anew()

    def count_anew(self) -> None:
        """Forgets how many were drawn."""
        self.num_drawn = self.num_bad = 0

    def draw(
        self,
        images: Iterable[Key],
        load: Callable[[Key], tuple[Tensor, int]],
        name: Callable[[Key], str],
        is_new: bool = True,
    ) -> Sample:
        """The first of these images, or where that is bad, the next that is not.

        The first is what was drawn; it is counted where it `is_new`. Raises DataError where too
        many are bad.
        """
        skipped: list[Skipped] = []
        for image in images:
            found = self._read(image, load, name)
            if not skipped:
                bad = found if isinstance(found, Skipped) else None
                self._allow(bad)
                if bad and self.few is not None:
                    self._judge_all(self.few, load, name)
                    self.few = None
                self._judge(bad, is_new)
            if not isinstance(found, Skipped):
                return Sample(*found, tuple(skipped))
            skipped.append(found)
        raise self._none_can_be_read(skipped)

    def _none_can_be_read(self, bad: list[Skipped]) -> DataError:
        return DataError(
            f"{self.setting}: none of the {len(bad)} files in {self.place!r} "
            f"could be read; the first: {bad[0].path}: {bad[0].reason}"
        )

    def _read(
        self,
        image: Key,
        load: Callable[[Key], tuple[Tensor, int]],
        name: Callable[[Key], str],
    ) -> tuple[Tensor, int] | Skipped:
        if (known := self.known.get(image)) is not None:
            return known
        try:
            return load(image)
        except (MemoryError, DataError):
            raise
        except Exception as error:  # Pillow's plug-ins raise many kinds on a damaged file
            if isinstance(error, OSError) and error.errno in EXHAUSTED:
                raise
            reason = printable(f"{type(error).__name__}: {error}")
            self.known[image] = Skipped(printable(name(image)), reason)
            return self.known[image]

    def _allow(self, bad: Skipped | None) -> None:
        """Raises DataError for a bad image where none may be."""
        if bad and self.spec.bad_files == "fail":
            raise DataError(
                f"{bad.path}: {bad.reason}; mend or remove it, or set data.bad_files = 'skip'"
            )

    def _judge(self, bad: Skipped | None, is_new: bool) -> None:
        """Counts an image that was drawn. Raises DataError where too many of them are bad."""
        self.num_drawn += is_new
        self.num_bad += is_new and bad is not None
        share = self.spec.bad_share
        if too_many(self.num_bad, self.num_drawn, self.length, share):
            file = next(reversed(self.known.values()))
            raise DataError(
                f"{self.setting}: {self.num_bad} of {self.num_drawn} files drawn from "
                f"{self.place!r} so far are bad, beyond data.max_bad_share = {share:g}; "
                f"the last: {file.path}: {file.reason}"
            )

    def _judge_all(
        self,
        images: Sequence[Key],
        load: Callable[[Key], tuple[Tensor, int]],
        name: Callable[[Key], str],
    ) -> None:
        """Reads all of a few images. Raises DataError where too many of them are bad."""
        found = (self._read(image, load, name) for image in images)
        bad = [file for file in found if isinstance(file, Skipped)]
        share = self.spec.bad_share
        if len(bad) == len(images):
            raise self._none_can_be_read(bad)
        if len(bad) > share * len(images):
            raise DataError(
                f"{self.setting}: {len(bad)} of the {len(images)} files in {self.place!r} are bad, "
                f"beyond data.max_bad_share = {share:g}; the first: {bad[0].path}: "
                f"{bad[0].reason}; mend or remove it, or raise the share"
            )


EXHAUSTED = {errno.ENOMEM, errno.EMFILE, errno.ENFILE}
"""What a file cannot be blamed for: no memory, too many open files."""


def too_many(bad: int, drawn: int, length: int | None, share: float) -> bool:
    """Whether `bad` of `drawn` are more than a share, by more than chance (3 standard deviations).

    Where all were drawn there is no chance in it. Before that, fewer than MIN_DRAWN say nothing.
    """
    if drawn == length:
        return bad > share * drawn
    return drawn >= MIN_DRAWN and bad > share * drawn + 3 * float(np.sqrt(share * drawn))


# ---- pixels --------------------------------------------------------------------------------------


def pixels_of(image: Image.Image, spec: ImagesSpec, chance: Chance = CENTER) -> Tensor:
    """Crops an image by the settings -> (c h w) uint8.

    Raises ValueError, before decoding, for a huge image.
    """
    _, height, width = spec.shape
    size = f"{image.width} x {image.height} pixels"
    if image.width * image.height > spec.max_pixels:
        raise ValueError(f"{size} are more than data.max_pixels = {spec.max_pixels}")
    scale = max(height / image.height, width / image.width)
    if image.width * image.height * scale**2 > max(MAX_PIXELS, 4 * height * width):
        raise ValueError(f"{size} are too narrow to be made {width} x {height}")
    with warnings.catch_warnings(action="ignore"):  # Pillow's, of metadata; they name no file
        image = to_mode(image, spec.channels, spec.background)
        if spec.crop == "random":
            image = random_crop(image, height, width, spec.min_crop or MIN_CROP, chance)
        else:
            crop = center_crop if spec.crop == "center" else shorter_side_crop
            image = crop(image, height, width)
    return to_tensor(image)


@cache
def formats() -> tuple[str, ...]:
    """Names of the formats that Pillow decodes by itself, in the order that it is to try."""
    Image.init()
    known = sorted(set(Image.OPEN) - set(UNREADABLE))
    return tuple(sorted(known, key=lambda name: name not in COMMON))


COMMON = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""Formats to try first: some of the others look at more than the first bytes."""


@cache
def extensions() -> frozenset[str]:
    """Extensions of files in such a format, as in ".png"."""
    known = Image.registered_extensions().items()
    opened = {*formats(), "MPO"}  # which Pillow opens as the JPEG that it begins with
    return frozenset(ext for ext, name in known if name in opened)


SIGNATURE_BYTES = 16
SIGNED = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "JPEG2000", "AVIF")
"""Formats whose first bytes tell them from any other file."""


def has_signature(start: bytes) -> bool:
    """Whether a file that starts so is an image in a format that Pillow decodes by itself."""
    Image.init()
    accepts = [Image.OPEN[name][1] for name in SIGNED if name in formats()]
    is_bitmap = start.startswith(b"BM") and start[6:10] == bytes(4)  # no text has zeros
    return is_bitmap or any(accept is not None and accept(start) is True for accept in accepts)


def open_image(file: str | bytes) -> Image.Image:
    """Opens an image by path or content, of which no more than the header is read.

    Raises what Pillow does, or ValueError for a path that is not a regular file.
    """
    if isinstance(file, str) and not stat.S_ISREG(os.stat(file).st_mode):
        raise ValueError("is not a regular file")  # a pipe would be waited for
    with warnings.catch_warnings(action="ignore"):  # of many pixels: they are counted in pixels_of
        try:
            return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, "r", formats())
        except UnidentifiedImageError:
            empty = not (os.path.getsize(file) if isinstance(file, str) else file)
            raise UnidentifiedImageError(
                "the file is empty" if empty else "in no format that Pillow reads"
            ) from None


def file_stamp(path: str | Path) -> str:
    """Text that tells a file from another, and from what it was before its content changed."""
    found = os.stat(path)
    return f"{found.st_ino} {found.st_size} {found.st_mtime_ns}"


# ---- words for those who list images -------------------------------------------------------------


def refuse_path(path: str, kind: str, trouble: str) -> DataError:
    """Makes the error for a path that a source of this kind cannot be opened at."""
    exists = os.path.exists(path_of(path))  # which no name is too long for, as for Path.exists
    if not exists:
        trouble = f"does not exist (seen from {Path.cwd()})"
    hint = "set it in the config, or with --set data.path=PATH"
    if exists and (other := kind_of(path)) not in (None, kind):
        hint = f'set data.kind = "{other}", or leave it out'
    return DataError(f"data.path: {path!r} {trouble}; {hint}")


def numbered(labels: np.ndarray | Sequence[int], where: str) -> list[str]:
    """Names the classes of labels that count from 0. Raises DataError for one that cannot be."""
    low, high = int(np.min(labels)), int(np.max(labels))
    if low < 0 or high >= MAX_CLASSES:
        bad = low if low < 0 else high
        raise DataError(
            f"{where}: labels must be class indices from 0, got {bad}"
            + (f", and at most {MAX_CLASSES:,} classes are taken" if low >= 0 else "")
        )
    return [str(label) for label in range(high + 1)]
