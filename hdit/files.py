"""Files and folders that are written whole or not at all, and their checksums."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hdit.errors import UserError


@contextmanager
def whole(out: Path, *, shared: bool = False, durable: bool = True) -> Iterator[Path]:
    """A path to write a file or a folder to, which becomes `out` when the block ends well.

    If it does not, nothing is left, and an older file `out` stays. A folder may take the place of
    an empty one, but of no other. `shared` says that other processes may write `out` at the same
    time. Without `durable`, a power failure soon after may leave less than was written.
    """
    made = [folder for folder in out.parents if not folder.exists()]  # innermost first
    out.parent.mkdir(parents=True, exist_ok=True)
    own = f".{socket.gethostname()}.{os.getpid()}" if shared else ""
    part = out.with_name(f".{out.name}{own}.part")
    _remove(part)  # of a killed process
    try:
        yield part
        if durable:
            for path in [*part.rglob("*"), part]:
                _sync(path)
        os.replace(part, out)
    except BaseException:
        _remove(part)
        with suppress(OSError):  # another process may have come to use it
            for folder in made:
                folder.rmdir()
        raise
    if durable:
        _sync(out.parent)


def write_text(path: Path, text: str) -> None:
    """Writes a text file (UTF-8) whole, or leaves the old one."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file (UTF-8) whole, or leaves the old one."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


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
