"""Files and folders that are written whole or not at all, and their checksums."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hdit.errors import UserError, WritingError

MAX_NAME = 255  # bytes that a file system takes


@contextmanager
def whole(out: Path, *, shared: bool = False, durable: bool = True) -> Iterator[Path]:
    """A path to write a file or a folder to, which becomes `out` when the block ends well.

    If it does not, nothing is left, and an older file `out` stays. A folder may take the place of
    an empty one, but of no other. `shared` says that other processes may write `out` at the same
    time. Without `durable`, a power failure soon after may leave less than was written.

    Raises WritingError, also for a link or a device in place of `out`, and for an OSError of the
    block that names no other file.
    """
    check_writable(out)
    made = [folder for folder in out.parents if not os.path.exists(folder)]  # innermost first
    part = _part(out, f".{socket.gethostname()}.{os.getpid()}" if shared else "")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove(part)  # of a killed process
        yield part
        if durable:
            for path in [*part.rglob("*"), part]:
                _sync(path)
        os.replace(part, out)
        if durable:
            _sync(out.parent)
    except BaseException as error:
        with suppress(OSError):  # what made it fail may also keep it from being removed
            _remove(part)
        with suppress(OSError):  # another process may have come to use it
            for folder in made:
                folder.rmdir()
        if isinstance(error, OSError) and (told := _writing_error(error, part, out)):
            raise told from error
        raise


def check_writable(out: Path) -> None:
    """Raises WritingError where `out` cannot be written, as far as can be told without writing.

    Regular files and folders may be replaced, and nothing else: to replace a link would cut what it
    leads to off, and to replace a device would break the machine.
    """
    path = str(out)
    if "\0" in path:
        raise WritingError(errno.EINVAL, "its name has a zero byte", path)
    if out.name in ("", ".."):
        raise WritingError(errno.EINVAL, "it has no name of its own; name a new one", path)
    try:
        mode = _mode(out)
        folder = next(parent for parent in out.absolute().parents if os.path.lexists(parent))
        is_folder, is_open = folder.is_dir(), os.access(folder, os.W_OK | os.X_OK)
    except OSError as error:
        raise WritingError(error.errno, error.strerror, path) from None
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        kind = "a link" if stat.S_ISLNK(mode) else "a device or pipe"
        reason = f"it is {kind}, and only regular files are written over; name another path"
        raise WritingError(errno.EEXIST, reason, path)
    if not is_folder:
        raise WritingError(errno.ENOTDIR, f"{folder} is no folder", path)
    if not is_open:
        raise WritingError(errno.EACCES, f"{folder} may not be written to", path)


def _mode(path: Path) -> int:
    """The kind of file that is at a path, as os.stat tells it; a regular one if nothing is."""
    try:
        return path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return stat.S_IFREG


def make_folder(path: Path) -> None:
    """Makes a folder, and those that it lies in, where it is not there. Raises WritingError."""
    if os.path.isdir(path):  # also a link to one
        return
    check_writable(path)
    made = [folder for folder in path.parents if not os.path.exists(folder)]  # innermost first
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        with suppress(OSError):  # those that were made, as far as they were
            for folder in filter(os.path.exists, made):
                folder.rmdir()
        is_file = isinstance(error, FileExistsError)
        reason = "it is a file, where a folder is needed" if is_file else error.strerror
        raise WritingError(error.errno, reason, str(path)) from None


def _part(out: Path, own: str) -> Path:
    """Where `out` is written first: hidden beside it, by a short name if its own is long."""
    name = f".{out.name}{own}.part"
    if len(os.fsencode(name)) > MAX_NAME:
        name = f".{hashlib.sha256(os.fsencode(out.name)).hexdigest()[:32]}{own}.part"
    return out.with_name(name)


def _writing_error(error: OSError, part: Path, out: Path) -> WritingError | None:
    """The error as one of writing `out`; None where it is of another file, as one to be read."""
    place = out
    if isinstance(error.filename, str | bytes):  # it may be a number, of an open file
        path = Path(os.fsdecode(error.filename))
        if path.is_relative_to(part):
            place = out / path.relative_to(part)
        elif path not in (out, *out.parents):
            return None
    reason = error.strerror or str(error)  # Pillow's have text alone
    return WritingError(error.errno or errno.EIO, reason, str(place))


def write_text(path: Path, text: str) -> None:
    """Writes a text file (UTF-8) whole, or leaves the old one."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file (UTF-8) whole, or leaves the old one. Raises UserError as `to_json`."""
    write_text(path, to_json(value, str(path), ensure_ascii=False) + "\n")


def to_json(value: Any, name: str, *, indent: int | None = 1, ensure_ascii: bool = True) -> str:
    """The JSON of a value. Raises UserError, with `name` and the key, for one that is not finite.

    Python would write NaN or Infinity, which are no JSON, and which other readers refuse.
    """
    try:
        return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)
    except ValueError:
        key, found = next(_not_finite(value, ""))
        told = f"{key or 'the value'} is {found}, which JSON cannot hold"
        raise UserError(f"{name}: {told}") from None


def _not_finite(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """(its key, the number) of each number that is nan or infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        yield key, value
    parts: Any = value.items() if isinstance(value, dict) else ()
    for name, part in enumerate(value) if isinstance(value, list | tuple) else parts:
        yield from _not_finite(part, f"{key}.{name}" if key else str(name))


BLOCK = 4096  # bytes that a file takes at least, on most disks
SMALLEST_SHARE = 16  # a PNG of a real image has no less of its pixels


def check_free_space(folder: Path, images: int, pixels: int) -> None:
    """Raises UserError where so many PNG files, each of `pixels` bytes, cannot fit on the disk."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    need = images * max(BLOCK, pixels // SMALLEST_SHARE)
    if need > (free := shutil.disk_usage(there).free):
        raise UserError(
            f"--out: {images:,} images take at least {need / 2**30:.4g} GiB, and the disk of "
            f"{folder} has {free / 2**30:.4g} GiB left; take fewer, or name a folder elsewhere"
        )


def fingerprint(path: Path) -> dict[str, Any]:
    """The size of a file in `bytes`, and its `sha256` in hex."""
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _sync(path: Path) -> None:
    """Waits until a file's contents, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
