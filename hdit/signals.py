"""Signals that end a program: Ctrl-C, SIGTERM, SIGHUP where its terminal closes, and SIGUSR1.

SLURM sends SIGUSR1 some minutes before a job's time is up, if it is asked to.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

SAYING = "interrupted"

Handler = Callable[[int, FrameType | None], Any]


class Signalled(BaseException):
    """Raised by a signal that ends the program, so that whatever it passes can clean up.

    No Exception, so that nothing takes it for an error. Its notes say how to go on.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def status_of(number: int) -> int:
    """The exit status that shells expect of a program that a signal ended."""
    return 128 + number


@contextmanager
def handled(handler: Handler) -> Iterator[dict[int, Any]]:
    """Calls `handler` at each of these signals while the block runs; yields the handlers before.

    A SIGHUP that is ignored, as after nohup, stays ignored. For the main thread alone.
    """

    def told(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _leave_closed_terminal()
        handler(number, frame)

    numbers = [n for n in ENDING if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    before: dict[int, Any] = {n: signal.getsignal(n) or signal.SIG_DFL for n in numbers}
    try:
        for number in before:
            signal.signal(number, told)
        yield before
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


@contextmanager
def raised() -> Iterator[None]:
    """Raises Signalled at each of these signals while the block runs."""
    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a forked child that has no handler of its own yet
            os._exit(status_of(number))
        if _torch_is_imported_now():
            os.write(2, f"{SAYING}\n".encode())
            os._exit(status_of(number))
        raise Signalled(number)

    with handled(end):
        yield


@contextmanager
def noting(text: str) -> Iterator[None]:
    """Adds to a signal that ends the block how to go on."""
    try:
        yield
    except Signalled as signalled:
        signalled.add_note(text)
        raise


def ignore() -> None:
    """Leaves these signals to the parent process, which they reach as well."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


def end_at_once() -> None:
    """Lets these signals end the process from here on, as they do without Python."""
    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def _torch_is_imported_now() -> bool:
    """Whether an exception could meet C++ that aborts on it; nothing is begun then."""
    spec = getattr(sys.modules.get("torch"), "__spec__", None)
    return getattr(spec, "_initializing", False)


def _leave_closed_terminal() -> None:
    """Sends to nowhere what goes to a closed terminal, or every message would be an OSError."""
    for stream in (1, 2):
        try:
            termios.tcgetattr(stream)
        except termios.error as error:
            if error.args[0] == errno.EIO:  # other errors mean that it never was a terminal
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream)
                os.close(nowhere)
