"""Locks between processes: one alone writes to a folder, until it ends in whatever way.

They are those of `flock`, which the kernel drops when the last descriptor of the file is closed. A
forked child has each descriptor too, and may outlive a killed parent, so that it closes those of
locks at once. (Locks of `fcntl` are not inherited, but any other descriptor of the file that the
process closes drops them, and they do not tell apart two owners in one process.)
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hdit.errors import UserError
from hdit.files import make_folder
from hdit.names import printable

LOCK = ".lock"
"""The name of the file that stands for its folder."""

_open_here: set[int] = set()  # descriptors of locks, held or waited for


def _leave_to_the_parent() -> None:
    while _open_here:
        os.close(_open_here.pop())


os.register_at_fork(after_in_child=_leave_to_the_parent)


@contextmanager
def locked(
    path: Path, does: str, fix: str = "", *, wait: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Holds the lock of the file `path`, whose folder is made, while the block runs.

    `does` says what its owner does ("is training this run"), and `fix` what to do about it. With
    `wait`, which is told who has the lock, this waits for it; else another owner is a UserError.
    Afterwards the file is gone, and so are folders that were made for it and stayed empty.
    """
    made = [folder for folder in path.parents if not folder.exists()]  # innermost first
    handle = None
    try:
        handle = _take(path, does, fix, wait)
        with suppress(OSError):  # a full disk: who has it is good to know, and no more
            os.truncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        if handle is not None:
            with suppress(OSError):  # else the next owner finds it
                path.unlink()  # before another can have it, who looks whether it is there
            _close(handle)
        with suppress(OSError, ValueError):  # there is something in them, or they cannot be
            for folder in made:
                folder.rmdir()


def _take(path: Path, does: str, fix: str, wait: Callable[[str], None] | None) -> int:
    """The descriptor of the file, once this process has its lock."""
    while True:
        make_folder(path.parent)
        try:
            handle = _open(path)
        except FileNotFoundError:  # whoever had made the folder has just removed it
            continue
        try:
            try:
                _flock(handle, path, wait=False)
            except BlockingIOError:
                owner = printable(os.pread(handle, 200, 0).decode(errors="replace"))
                text = f"{path.parent}: another process {does}{f' ({owner})' if owner else ''}"
                if wait is None:
                    raise UserError(f"{text}; {fix}") from None
                wait(text)
                _flock(handle, path, wait=True)
            if _is_at(handle, path):
                return handle
        except BaseException:
            _close(handle)
            raise
        _close(handle)  # of a file that its owner has removed


def _open(path: Path) -> int:
    """A descriptor of a lock's file. Raises UserError where something else lies there."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        handle = None
    if handle is not None:
        if stat.S_ISREG(os.fstat(handle).st_mode):
            _open_here.add(handle)
            return handle
        os.close(handle)
    raise UserError(f"{path}: is no regular file, as a lock needs; remove it")


def _close(handle: int) -> None:
    _open_here.discard(handle)
    os.close(handle)


def _flock(handle: int, path: Path, *, wait: bool) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as error:
        raise UserError(
            f"{path}: cannot be locked: {error.strerror}; its file system must have locks (flock)"
        ) from None


def _is_at(handle: int, path: Path) -> bool:
    """Whether the file of a descriptor is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False
