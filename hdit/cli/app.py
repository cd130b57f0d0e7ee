"""The app and its entry point. A verb parses, calls and prints; what is heavy it imports itself."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import hdit
from hdit.cli import configs, convert, data_check, doctor, encode, evaluate, info, sample, train
from hdit.cli.output import listen_to_loggers


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
    sample.sample,
    evaluate.evaluate,
    encode.encode,
    convert.convert,
    info.info,
    configs.configs,
    doctor.doctor,
):
    app.command()(verb)

data = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Look at a data set before a run."
)
data.command("check")(data_check.data_check)
app.add_typer(data, name="data")


def main() -> None:
    """Runs the command line. What the user can mend is one message, without a traceback."""
    listen_to_loggers()
    try:
        app()
    except OSError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except Exception as error:
        # The class is known only if its module was loaded, which a verb that raises it has done.
        errors = sys.modules.get("hdit.errors")
        if errors is None or not isinstance(error, errors.UserError):
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
