"""The app and its entry point. A verb parses, calls and prints; what is heavy it imports itself."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

import hdit
from hdit.cli import (
    compare,
    configs,
    convert,
    data_check,
    doctor,
    ema,
    encode,
    evaluate,
    info,
    plan,
    sample,
    train,
    watch,
)
from hdit.cli.output import listen_to_loggers
from hdit.errors import UserError
from hdit.messages import echo
from hdit.names import printable
from hdit.signals import behind


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hdit {hdit.__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and end."
        ),
    ] = False,
) -> None:
    """Train and sample image diffusion transformers: pixel-space HDiT, and DiT."""


app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog="Start with:  hdit train digits-hdit",
)
app.callback()(_root)
for verb in (
    train.train,
    watch.watch,
    sample.sample,
    evaluate.evaluate,
    compare.compare,
):
    app.command()(verb)
app.command(cls=ema.ManyNumbers)(ema.ema)
for tool in (
    encode.encode,
    convert.convert,
    info.info,
    plan.plan,
    configs.configs,
    doctor.doctor,
):
    app.command()(tool)

data = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Look at a data set before a run."
)
data.command("check")(data_check.data_check)
app.add_typer(data, name="data")


def main() -> None:
    """Runs the command line. What the user can mend is one message, without a traceback."""
    listen_to_loggers()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # or a name that is not UTF-8 could not be printed
            stream.reconfigure(errors="backslashreplace")
    try:
        _refuse_empty(sys.argv[1:])
        app()
    except Exception as error:
        known = isinstance(error, UserError | OSError | MemoryError) or _out_of_memory(error)
        if behind(error) or not known:
            raise
        echo(f"error: {_told(error)}")
        sys.exit(1)


def _told(error: Exception) -> str:
    """The message of an error: where the system raised it for a file, its name and the reason."""
    if _out_of_memory(error):
        return f"out of memory: {error}"
    if isinstance(error, OSError) and not isinstance(error, UserError) and error.filename:
        return f"{printable(str(error.filename))}: {error.strerror}"
    return str(error)


def _refuse_empty(arguments: list[str]) -> None:
    """Raises UserError for an empty argument: no path, name or number is, and none is a default."""
    for i, argument in enumerate(arguments):
        option, _, value = argument.partition("=")
        if "\0" in argument:
            raise UserError(f"{argument!r}: has a zero byte, which no argument can have")
        if argument.startswith("--") and len(argument) > 2 and option != argument and not value:
            raise UserError(f"{option}: must not be empty; leave it out for its default")
        if argument:
            continue
        before = arguments[i - 1] if i else ""
        if before.startswith("-"):
            raise UserError(f"{before}: must not be empty; leave it out for its default")
        raise UserError(f"argument {i + 1} of hdit, after {before!r}, must not be empty")


def _out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: torch tells it of a CPU in the message of a RuntimeError alone."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error))
    )
