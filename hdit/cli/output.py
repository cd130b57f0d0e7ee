"""Output of the verbs: results go to standard output, everything else to standard error."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


def warn(text: str) -> None:
    """Prints a warning."""
    typer.echo(f"warning: {text}", err=True)


def error_console() -> Console:
    """A rich console on standard error."""
    from rich.console import Console

    return Console(stderr=True)


def plain_console() -> Console:
    """A rich console on standard output that takes text as it stands."""
    from rich.console import Console

    return Console(markup=False, highlight=False)


def progress(console: Console | None = None) -> Progress:
    """Bars with counts on standard error, which go away when they are done."""
    from rich.progress import MofNCompleteColumn, Progress

    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    return Progress(*columns, console=console or error_console(), transient=True)
