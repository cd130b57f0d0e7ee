"""Signals that end a program: Ctrl-C, SIGTERM, SIGHUP where its terminal closes, and SIGUSR1.

SLURM sends SIGUSR1 some minutes before a job's time is up, if it is asked to.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import termios
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

SAYING = "interrupted"
AGAIN = 1.0  # seconds; torchrun, too, sends its processes the signal that Ctrl-C sent them
SOON = 0.01  # seconds

DEAF = "deaf"
"""The name of threads that wait in torch for what may never come."""

Handler = Callable[[int, FrameType | None], Any]


class Signalled(BaseException):
    """Raised by a signal that ends the program, so that whatever it passes can clean up.

    No Exception, so that nothing takes it for an error. Its notes say how to go on.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def behind(error: BaseException) -> Signalled | None:
    """The signal behind an error: what it passes may take it for one and raise another instead.

    Python does so where it makes a class, as modules do that are imported.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, Signalled):
        cause = cause.__cause__ or cause.__context__
    return cause


def status_of(number: int) -> int:
    """The exit status that shells expect of a program that a signal ended."""
    return 128 + number


@contextmanager
def handled(handler: Handler) -> Iterator[dict[int, Any]]:
    """Calls `handler` at each of these signals while the block runs; yields the handlers before.

    A SIGHUP that is ignored, as after nohup, stays ignored. In another thread than the main one, as
    in a worker of Ray, nothing is handled: Python leaves signals to the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield {}
        return

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
    """Raises Signalled at each of these signals while the block runs.

    One that follows within AGAIN is the same, seen twice: what cleans up is left to end.
    """
    process, came = os.getpid(), -AGAIN

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if os.getpid() != process:  # a forked child that has no handler of its own yet
            os._exit(status_of(number))
        if _torch_is_imported_now():
            os.write(2, f"{SAYING}\n".encode())
            os._exit(status_of(number))
        if time.monotonic() - came >= AGAIN:
            came = time.monotonic()
            raise Signalled(number)

    with _not_lost(), handled(end):
        try:
            yield
        except BaseException as error:
            if (signalled := behind(error)) in (None, error):
                raise
            raise signalled from None


@contextmanager
def _not_lost() -> Iterator[None]:
    """Raises a Signalled again that Python could not pass on, as from a __del__ or at a fork.

    What else cannot be raised after a signal is of objects that it left half-made, and not told.
    """
    lost: list[int] = []

    def again(number: int, frame: FrameType | None) -> None:
        if lost:
            raise Signalled(lost.pop())

    def note(problem: sys.UnraisableHookArgs) -> None:
        if isinstance(problem.exc_value, Signalled):
            lost.append(problem.exc_value.number)
            signal.setitimer(signal.ITIMER_REAL, SOON)  # not here, where it would be lost again
        elif not isinstance(sys.exception(), Signalled):
            told_before(problem)

    told_before, alarm_before = sys.unraisablehook, signal.signal(signal.SIGALRM, again)
    sys.unraisablehook = note
    try:
        yield
    except Signalled as signalled:
        traceback.clear_frames(signalled.__traceback__)  # whose objects would be deleted later
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, alarm_before or signal.SIG_DFL)
        sys.unraisablehook = told_before


@contextmanager
def noting(text: str) -> Iterator[None]:
    """Adds to a signal that ends the block how to go on."""
    try:
        yield
    except BaseException as error:
        if signalled := behind(error):
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
