"""Figures of the benchmark scripts as they come: rows in a JSON file, and Markdown tables of them.

Nothing here imports torch, so that a script that only starts others begins at once.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""A heading and what stands below it: a text, a number, a bool, or None for an empty cell."""


def write(path: Path, text: str) -> None:
    """Writes all of it or nothing: a reader, or a kill, never meets half a file."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def output_of(command: list[str]) -> str | None:
    """What a program prints, or None where there is none, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def commit() -> str | None:
    """The commit of this checkout: HDIT_COMMIT of the environment, or else what git says.

    A copy without its .git folder has only the first.
    """
    # "*": git refuses a checkout that belongs to another user, as in a container
    git = ["git", "-c", "safe.directory=*", "-C", str(Path(__file__).parent)]
    return os.environ.get("HDIT_COMMIT") or output_of([*git, "rev-parse", "--short", "HEAD"])


class Record:
    """Rows and errors of a script. With a path they are in that file from the moment they exist."""

    def __init__(self, path: Path | None, machine: Row | None = None, go_on: bool = False):
        self.path, self.machine = path, machine or {}
        self.rows: list[Row] = []
        self.errors: list[str] = []
        if go_on and path is not None:
            found = json.loads(path.read_text())
            self.rows, self.errors = found["rows"], found["errors"]
        self._save()

    def add(self, *rows: Row) -> None:
        self.rows += rows
        self._save()

    def fail(self, what: str, error: BaseException | str) -> None:
        """Notes and prints that something could not be measured, in one line."""
        line = f"{what}: {one_line(error)}"
        self.errors.append(line)
        print(f"passed over: {line}", flush=True)
        self._save()

    def _save(self) -> None:
        if self.path is not None:
            data = {"machine": self.machine, "rows": self.rows, "errors": self.errors}
            write(self.path, json.dumps(data, indent=1) + "\n")


def about(machine: Row) -> str:
    """What the figures were measured on, in a line."""
    first = machine.get("device", "nothing")
    rest = [f"{name} {value}" for name, value in machine.items() if name != "device"]
    return ", ".join([first, *rest])


def one_line(error: BaseException | str) -> str:
    """An error's class and the first line of its message that says something."""
    if isinstance(error, str):
        return error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def shown(value: Any) -> str:
    """A cell: numbers with three digits that count, below 0.01 in powers of ten."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown(rows: list[Row]) -> str:
    """A Markdown table of rows, without lists. A heading is there if any row has a value for it."""
    head = list(
        dict.fromkeys(
            name
            for row in rows
            for name, value in row.items()
            if value is not None and not isinstance(value, list)
        )
    )
    return table(head, [[shown(row.get(name)) for name in head] for row in rows])
