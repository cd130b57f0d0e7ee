"""How the command line ends where a signal ends it."""

from __future__ import annotations

import atexit
import sys
from contextlib import suppress

from hdit import signals


def run() -> None:
    """Runs the command line, and says in a line that a signal ended it."""
    try:
        with signals.raised():
            from hdit.cli.app import main

            main()
    except BaseException as error:
        if (signalled := signals.signalled_in(error)) is None:
            raise
        notes = getattr(signalled, "__notes__", [])
        with suppress(OSError):  # of a terminal that is gone
            print("; ".join([signals.SAYING, *notes]), file=sys.stderr)
        sys.exit(signals.status_of(signalled.number))
    finally:
        atexit.register(signals.end_at_once)  # or Ctrl-C would be a traceback from there
