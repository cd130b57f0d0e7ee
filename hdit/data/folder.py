"""A folder of image files, flat or with one sub-folder for each class."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from PIL import Image
from pydantic import Field

from hdit.data.source import DataError, Sample, Size, Skipped
from hdit.data.transforms import center_crop, to_mode, to_tensor
from hdit.protocols import Spec


class FolderSpec(Spec):
    """Images of any format that Pillow reads, centre-cropped to `size`."""

    kind: Literal["folder"] = "folder"
    path: str = Field(description="the folder, relative to where the command runs")
    size: Size = Field(description="side in pixels, or [height, width]")
    channels: Literal[1, 3] = Field(3, description="3 for RGB, 1 for grey")
    flip: bool = Field(True, description="mirror half of the images, at random")

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, *self.size

    def open(self) -> Folder:
        """Lists the folder. Raises DataError where it is missing, empty or of mixed layout."""
        return Folder(self)


class Folder:
    def __init__(self, spec: FolderSpec):
        self.spec = spec
        root = Path(spec.path).expanduser()
        if not root.is_dir():
            where = "is not a folder" if root.exists() else "does not exist"
            raise DataError(
                f"data.path: {spec.path!r} {where} (seen from {Path.cwd()}); set it in the config, "
                "or with --set data.path=FOLDER"
            )
        folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        flat = _images([p for p in sorted(root.iterdir()) if p.is_file()])
        classes = {p.name: found for p in folders if (found := _images(_walk(p)))}
        if flat and classes:
            raise DataError(
                f"data.path: {spec.path!r} has images beside sub-folders with images "
                f"({next(iter(classes))}/...); give it either images or a sub-folder for each class"
            )
        if not flat and not classes:
            raise DataError(f"data.path: {spec.path!r} has no image files that Pillow can read")
        self.classes = list(classes)
        self.files = [(path, 0) for path in flat] + [
            (path, label) for label, found in enumerate(classes.values()) for path in found
        ]
        self.unreadable: dict[int, Skipped] = {}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        """The image at `index`; where that file cannot be read, the next one that can."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        skipped = []
        for i in range(index, index + len(self)):
            path, label = self.files[i % len(self)]
            if (known := self.unreadable.get(i % len(self))) is not None:
                skipped.append(known)
                continue
            try:
                with Image.open(path) as image:
                    pixels = center_crop(to_mode(image, self.spec.channels), *self.spec.shape[1:])
            except Exception as error:  # Pillow's plug-ins raise many kinds on a damaged file
                reason = f"{type(error).__name__}: {error}"
                self.unreadable[i % len(self)] = Skipped(str(path), reason)
                skipped.append(self.unreadable[i % len(self)])
                continue
            return Sample(to_tensor(pixels), label, tuple(skipped))
        raise DataError(
            f"data.path: none of the {len(self)} files in {self.spec.path!r} could be read; "
            f"the first: {skipped[0].path}: {skipped[0].reason}"
        )


def _walk(folder: Path) -> list[Path]:
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent, name) for name in sorted(names)]
    return found


def _images(paths: list[Path]) -> list[Path]:
    """Those whose extension is of a format that Pillow reads; hidden files are none."""
    known = {ext for ext, fmt in Image.registered_extensions().items() if fmt in Image.OPEN}
    return [p for p in paths if p.suffix.lower() in known and not p.name.startswith(".")]
