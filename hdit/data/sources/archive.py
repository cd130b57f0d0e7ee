"""A zip archive of image files, read in place."""

from __future__ import annotations

import io
import os
import posixpath
import re
import stat
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, Literal

from PIL import Image
from pydantic import Field

from hdit.arrays import UNREADABLE
from hdit.bounds import Name
from hdit.data.images import SIGNATURE_BYTES, Images, ImagesSpec, open_image, refuse_path
from hdit.data.source import DataError
from hdit.data.sources.listing import Content, arrange, is_hidden, list_images
from hdit.data.sources.sheets import MAX_SHEET
from hdit.names import path_of
from hdit.reading import ReadingError


class ZipSpec(ImagesSpec):
    """Images in an archive: flat, in a sub-folder for each class, or with a sheet of labels.

    `dataset.json` as StyleGAN and EDM write it, `metadata.jsonl` or `metadata.csv` has the labels,
    if it is there. A folder that all of the archive lies in is no class.
    """

    kind: Literal["zip"] = "zip"
    path: Name = Field(description="the archive, relative to where the command runs")

    def open(self) -> Images:
        """Lists the archive. Raises DataError where it is empty, unsafe, or of mixed layout."""
        return Images(self, Archive(self.path, self.max_pixels))


class OwnHandle(io.RawIOBase):
    """A file for reading that each process opens for itself: a fork shares no position."""

    def __init__(self, path: Path):
        self.path, self.position = path, 0
        self.process, self.file = os.getpid(), self._open()

    def _open(self) -> BinaryIO:
        return open(self.path, "rb", buffering=0)

    def readinto(self, buffer: Any) -> int:
        if self.process != os.getpid():
            self.file.close()  # this process's copy
            self.process, self.file = os.getpid(), self._open()
        self.file.seek(self.position)
        count = self.file.readinto(buffer)  # type: ignore[attr-defined]
        self.position += count
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self._size()}[whence]
        self.position = base + offset
        return self.position

    def _size(self) -> int:
        return os.fstat(self.file.fileno()).st_size

    def tell(self) -> int:
        return self.position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self.file.close()
        super().close()


class Archive:
    """The images in a zip archive, which is read in place. See hdit.data.images.Entries."""

    setting = "data.path"

    def __init__(self, path: str, max_pixels: int, labelled: bool = True):
        """Lists the archive; without labels images may lie in any layout. Raises DataError."""
        self.place, self.max_pixels, self.labelled = path, max_pixels, labelled
        self.path = path_of(path)
        if not os.path.isfile(self.path):
            raise refuse_path(path, "zip", "is not a file")
        try:
            self.zip = zipfile.ZipFile(io.BufferedReader(OwnHandle(self.path)))
        except OSError as error:
            raise DataError(f"data.path: {path!r} cannot be read: {error}") from None
        except (ValueError, NotImplementedError, zipfile.BadZipFile) as error:
            raise DataError(
                f"data.path: {path!r} is no zip archive: {error}; if it should be one, it is cut "
                "off or damaged: copy or download it again"
            ) from None
        members = self._members(f"data.path: {path!r}")
        files = {name: member for name, member in members.items() if not name.endswith("/")}
        top = _common_folder([name for name in files if not is_hidden(name)])
        names = [name[len(top) :] for name in members if name.startswith(top) and name != top]
        content = Content(
            text=lambda name: self._text(files[top + name]),
            start=lambda name: self._start(files[top + name]),
        )
        where = f"data.path: {path!r}"
        listing = (
            arrange(names, content, where) if labelled else list_images(names, content.start, where)
        )
        names, self.labels, self.classes, self.left_out, self.warnings = listing
        self.members = [files[top + name] for name in names]

    def _members(self, where: str) -> dict[str, zipfile.ZipInfo]:
        """All members by name, with "/" between the parts and at the end of a folder's.

        Raises DataError for a member that is unsafe, or there twice.
        """
        members: dict[str, zipfile.ZipInfo] = {}
        for member in self.zip.infolist():
            if trouble := escape(member):
                raise DataError(
                    f"{where} is refused: its member {member.orig_filename!r} {trouble}"
                )
            given = member.filename.replace("\\", "/")  # as some programs on Windows write it
            name = posixpath.normpath(given) + ("/" if given.endswith("/") else "")
            if name in members and not name.endswith("/"):
                raise DataError(f"{where} holds {member.filename!r} twice")
            members[name] = member
        return members

    def __reduce__(self) -> tuple[Any, ...]:
        """A process that is not a fork lists the archive again."""
        return Archive, (self.place, self.max_pixels, self.labelled)

    def __len__(self) -> int:
        return len(self.members)

    def name(self, index: int) -> str:
        """The archive and the member."""
        return f"{self.path}/{self.members[index].filename}"

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Opens the image -> (image, class index).

        Raises ValueError for a huge member, and for one that Python cannot unpack.
        """
        return open_image(self.content(index)), self.labels[index]

    def content(self, index: int) -> bytes:
        """The member, unpacked. Raises ValueError as `load`."""
        member = self.members[index]
        if trouble := packed_so(member):
            raise ValueError(trouble)
        if member.file_size > BYTES_OF_A_PIXEL * self.max_pixels:
            raise ValueError(
                f"unpacks to {member.file_size} bytes, more than data.max_pixels = "
                f"{self.max_pixels} can take"
            )
        return self._read(member)

    def stamp(self, index: int) -> str:
        """The name, label, checksum and size of the member."""
        member = self.members[index]
        return f"{member.filename} {self.labels[index]} {member.CRC} {member.file_size}"

    def _read(self, member: zipfile.ZipInfo) -> bytes:
        """All of a member, for the archive's own checksum is compared at its end."""
        return self.zip.read(member)

    def _text(self, member: zipfile.ZipInfo) -> bytes:
        """All of a sheet. Raises ReadingError for a huge or damaged one."""
        if trouble := packed_so(member):
            raise ReadingError(trouble)
        if member.file_size > MAX_SHEET:
            raise ReadingError(
                f"it unpacks to {member.file_size:,} bytes, and no sheet has more than "
                f"{MAX_SHEET:,}"
            )
        try:
            return self._read(member)
        except UNREADABLE as error:
            raise ReadingError(f"{type(error).__name__}: {error}") from None

    def _start(self, member: zipfile.ZipInfo) -> bytes:
        with self.zip.open(member) as file:
            return file.read(SIGNATURE_BYTES)


BYTES_OF_A_PIXEL = 8
"""RGBA of 16 bits, uncompressed: bounds what a member unpacks to before its size is known."""


METHODS = {9: "Deflate64, as Windows packs large files", 93: "Zstandard", 99: "AES"}
"""Ways to pack a member that the zipfile module of Python does not know."""


def packed_so(member: zipfile.ZipInfo) -> str | None:
    """Why a member cannot be unpacked by its header, and the fix."""
    if member.flag_bits & 1:
        return "is encrypted; unpack the archive with its password, and name the folder"
    if member.compress_type in METHODS:
        return f"is packed by {METHODS[member.compress_type]}; unpack it, and name the folder"
    return None


def escape(member: zipfile.ZipInfo) -> str | None:
    """How a member would leave the folder that it is unpacked in, if it would."""
    if trouble := leads_out(member.orig_filename):
        return trouble
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind and not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
        return "is a link" if stat.S_ISLNK(kind) else "is a device"
    return None


def leads_out(name: str) -> str | None:
    """How a name leads out of the folder that it is unpacked in, if it does."""
    name = name.replace("\\", "/")
    if "\0" in name:
        return "has a zero byte in its name"
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        return "has an absolute path"
    return "leads out of its folder" if ".." in name.split("/") else None


def _common_folder(names: list[str]) -> str:
    """The folder that all lie in, with its slash; empty if there is none."""
    tops = {name.partition("/")[0] if "/" in name else "" for name in names}
    return f"{tops.pop()}/" if len(tops) == 1 and "" not in tops else ""
