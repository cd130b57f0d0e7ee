"""How the doctor tries a thing: what it says is caught, and a reason is one line."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LONGEST_LINE = 300  # characters of a reason; a compiler may say anything


def first_line(said: str) -> str:
    """The first line of what a program said, or two where the first only leads in."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    line = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]} ..."


def error_line(error: BaseException) -> str:
    """An exception in one line: its class and the first line of its message."""
    return first_line(f"{type(error).__name__}: {error}")


@contextmanager
def without_warnings() -> Iterator[list[warnings.WarningMessage]]:
    """What is tried may warn of itself; the report says how it went. Yields what was said."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield said
