"""What programs say: printable, by a named process, and never into another's progress bar."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from hdit.names import printable

if TYPE_CHECKING:
    from rich.console import Console

CLEAR = "\r\x1b[2K"
"""Clears the line of a terminal that the cursor is in: there stands the first process's bar, which
draws itself anew below."""


def message(text: str) -> str:
    """The text as a terminal can show it; each process of a run but the first names its rank.

    A name with a newline in it must be `printable` already, as lines stay lines.
    """
    shown = "\n".join(map(printable, text.split("\n")))
    return f"rank {rank}: {shown}" if (rank := _rank()) else shown


def echo(text: str) -> None:
    """Prints a message on standard error, above a bar that is up there."""
    # Looked up at each line: a bar puts a stream in the place of sys.stderr that prints above it.
    has_bar = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    start = CLEAR if _rank() and has_bar else ""
    print(start + message(text), file=sys.stderr, flush=True)


def say(console: Console, text: str) -> None:
    """Prints a message on a console as it stands, above a bar that is up there."""
    if _rank() and console.is_interactive:
        console.file.write(CLEAR)
    console.print(message(text), highlight=False, markup=False, soft_wrap=True)


def _rank() -> str:
    """The rank that is not the first, or nothing; what is no rank is told by `read_world`."""
    rank = os.environ.get("RANK", "0")
    return rank if rank.isascii() and rank.isdigit() and rank != "0" else ""
