"""Output of the verbs: results go to standard output, everything else to standard error."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hdit.messages import echo

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


def warn(text: str) -> None:
    """Prints a warning."""
    echo(f"warning: {text}")


def listen_to_loggers() -> None:
    """Prints what loggers warn of, above a bar that is up."""
    import logging

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            echo(self.format(record))  # logging's own handler would write into a bar

    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[Lines()])


def error_console() -> Console:
    """A rich console on standard error."""
    from rich.console import Console

    return Console(stderr=True)


def plain_console() -> Console:
    """A rich console on standard output that takes text as it stands."""
    from rich.console import Console

    return Console(markup=False, highlight=False)


def progress(console: Console | None = None) -> Progress:
    """Bars with counts on standard error, which go away when they are done; none in a file."""
    from rich.progress import MofNCompleteColumn, Progress

    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    console = console or error_console()
    return Progress(*columns, console=console, transient=True, disable=not console.is_interactive)
