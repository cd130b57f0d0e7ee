"""Facts by which stored files prove whole and of a format that this version reads.

Checkpoints, converted models and stored latents give the number of their format; the first two also
size and SHA-256 of each file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from hdit.errors import UserError
from hdit.files import fingerprint
from hdit.protocols import Spec


class DamagedError(UserError):
    """Files that are not what was written: a name, and what is wrong with it."""


class FormatError(UserError):
    """Files that are whole, but that another version of hdit has to read."""


class FileFacts(Spec):
    """What is known of a file."""

    bytes: Annotated[int, Field(ge=0, lt=2**63)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


Name = Annotated[str, Field(pattern=r"^[^/\x00]*[^/\x00.][^/\x00]*$")]  # of a file in the folder
_Files = TypeAdapter(dict[Name, FileFacts])


def check_format(found: Any, reads: int, where: str) -> None:
    """Raises FormatError for a newer format than this version `reads`, DamagedError for none."""
    if type(found) is int and found > reads:
        raise FormatError(
            f"{where}: made by a newer hdit (format {found}; this reads {reads}); update hdit"
        )
    if type(found) is not int or found != reads:
        raise DamagedError(f"{where}: damaged: has format {found!r:.40}, which never was one")


def describe(folder: Path) -> dict[str, dict[str, Any]]:
    """What a manifest says of the files in a folder, by name."""
    return {path.name: fingerprint(path) for path in sorted(folder.iterdir())}


def read_files(found: Any, needed: Iterable[str], where: str) -> dict[str, FileFacts]:
    """What a manifest says of files, as `describe` gave it. Raises DamagedError.

    It must know the files `needed`.
    """
    try:
        files = _Files.validate_python(found)
    except ValidationError as error:
        raise DamagedError(f"{where}: damaged: files{explain(error)}") from None
    if absent := [name for name in needed if name not in files]:
        raise DamagedError(f"{where}: damaged: it does not name {', '.join(absent)}")
    return files


def check_files(folder: Path, files: dict[str, FileFacts]) -> None:
    """Raises DamagedError for the first file in the folder that is not as it was written."""
    for name, wanted in files.items():
        path = folder / name
        if not path.is_file():
            raise DamagedError(f"{path}: {'is no file' if os.path.lexists(path) else 'missing'}")
        found = FileFacts(**fingerprint(path))
        if found.bytes != wanted.bytes:
            raise DamagedError(f"{path}: damaged: has {found.bytes} bytes of {wanted.bytes}")
        if found != wanted:
            raise DamagedError(f"{path}: damaged: its checksum is not that of what was written")


def explain(error: ValidationError) -> str:
    """The first thing that is wrong, as in ".a.sha256: Field required, got ..."."""
    first = error.errors()[0]
    key = "".join(f".{part}" for part in first["loc"])
    return f"{key}: {first['msg']}, got {first['input']!r:.60}"
