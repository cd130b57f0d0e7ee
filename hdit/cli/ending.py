"""How the command line ends where a signal ends it."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from contextlib import suppress

from hdit import signals
from hdit.messages import echo


def run() -> None:
    """Runs the command line, and says in a line that a signal ended it."""
    try:
        with signals.raised():
            from hdit.cli.app import main

            main()
    except signals.Signalled as error:
        with suppress(OSError):  # of a terminal that is gone
            echo("; ".join([signals.SAYING, *getattr(error, "__notes__", [])]))
        sys.exit(signals.status_of(error.number))
    finally:
        atexit.register(_end, _status(sys.exception()))


def _status(error: BaseException | None) -> int:
    """The status that Python ends with after this."""
    code = error.code if isinstance(error, SystemExit) else error
    return code if isinstance(code, int) else int(code is not None)


def _end(status: int) -> None:
    """Lets nothing hold up or abort the exit, and no signal be a traceback there."""
    signals.end_at_once()
    if multiprocessing := sys.modules.get("multiprocessing"):
        # Workers that a signal left without their loader: Python would tell them to end by a
        # SIGTERM, which they leave to this process, and wait for them.
        for worker in multiprocessing.active_children():
            worker.kill()
    if any(thread.name == signals.DEAF for thread in threading.enumerate()):
        # Python would abort the process where such a thread comes back from torch.
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(status)
