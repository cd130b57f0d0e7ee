"""Options of `hdit data check`: the source, and the path of the contact sheet."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError

from hdit.data import DataSpec
from hdit.data.held_out import class_indices, content_hashes, divide, open_path
from hdit.data.images import Images, ImagesSpec
from hdit.data.kinds import kind_of
from hdit.data.source import DataError
from hdit.data.sources.tars import Tars
from hdit.files import check_writable
from hdit.names import escape, expanded, path_of

LONGEST_STEM = 50  # of the contact sheet's name: in UTF-8, up to four times as many bytes


def open_source(place: str, kind: str | None = None, size: str = "256", **settings: Any) -> Images:
    """Lists a source as training would: a path, or what `kind` takes in place of one.

    `size` is a side or HEIGHTxWIDTH. Raises DataError, which names the options of the command.
    """
    specs = get_args(get_args(DataSpec)[0])
    kinds = [s.model_fields["kind"].default for s in specs if issubclass(s, ImagesSpec)]
    place = escape(place)  # a setting is text, and need not be UTF-8 on the command line
    kind = kind or kind_of(place)
    if kind is None:
        raise DataError(
            f"PATH: {place!r} is a file that tells no kind of source; take a folder, a .zip, an "
            f".npz or .tar, or name its --kind: {', '.join(kinds)}"
        )
    if kind not in kinds:
        raise DataError(f"--kind: must be {', '.join(kinds[:-1])} or {kinds[-1]}, got {kind!r}")
    if not (sides := re.fullmatch(r"([0-9]{1,9})(?:x([0-9]{1,9}))?", size)):
        raise DataError(f"--size: must be a side in pixels or HEIGHTxWIDTH, got {size!r}")
    key = "hook" if kind == "python" else "path"
    if kind == "hub" and not os.path.exists(path_of(place)):
        key = "name"
    height, width = int(sides[1]), int(sides[2] or sides[1])
    table = {"kind": kind, key: place, "size": [height, width], **settings}
    try:
        source = TypeAdapter(DataSpec).validate_python(table).open()
    except ValidationError as error:
        raise DataError("\n".join(map(_option, error.errors()))) from None
    return by_index(source)


def by_index(source: Any) -> Images:
    """Turns a source that `[data]` opens into one with an index. Raises DataError."""
    if isinstance(source, Tars):
        return Images(source.spec, source.listed())
    if not isinstance(source, Images):
        raise DataError(f"data.kind: {type(source).__name__.lower()!r} has no images to check")
    return source


def hold_out(spec: ImagesSpec, source: Images) -> tuple[Images, int]:
    """-> (the images that are trained on, the number of those that are held out) of settings.

    Raises DataError where they cannot be held out so.
    """
    setting = spec.held_out
    if isinstance(setting, float):
        training, held = divide(source, setting, content_hashes(source, range(len(source))))
        return training, len(held.hashes)
    if setting is None:
        return source, 0
    images = open_path(spec, setting, source.classes)
    class_indices(images.classes, source.classes, setting)
    return source, len(images)


def _option(error: Any) -> str:
    """One line for one of pydantic's errors: the option, the rule and what arrived."""
    names = {"hook": "PATH", "path": "PATH", "name": "PATH"}
    key = next((str(part) for part in reversed(error["loc"]) if isinstance(part, str)), "kind")
    rule = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be", 1)
    return f"{names.get(key, f'--{key}')}: {rule}, got {error['input']!r}"


def sheet_path(place: str, sheet: Path | None) -> Path:
    """Path of the contact sheet, checked before anything is read. Raises DataError."""
    name = os.path.basename(os.path.abspath(expanded(place)))
    stem = re.sub(r"(?i)\.(zip|npz|tar|toml)$", "", name)
    stem = re.sub(r"[^\w.-]+", "-", stem).strip("-.")[:LONGEST_STEM]
    path = sheet or Path(f"{stem or 'data'}-contact-sheet.png")
    home = expanded(place)
    if path.suffix.lower() != ".png":
        raise DataError(f"--sheet: must end in .png, got {str(path)!r}")
    check_writable(path)
    if path.is_dir() or not path.parent.is_dir():
        trouble = "is a folder" if path.is_dir() else "lies in a folder that does not exist"
        raise DataError(f"--sheet: {str(path)!r} {trouble}; name a file")
    if home.is_dir() and path.resolve().is_relative_to(home.resolve()):
        raise DataError(
            f"--sheet: {str(path)!r} would lie in the data folder and become a part of it; name a "
            "file elsewhere, as in --sheet ../sheet.png"
        )
    return path
