"""hdit ema"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from hdit.cli.options import finite
from hdit.cli.output import plain_console, progress, warn
from hdit.limits import MAX_DECAY, MAX_IMAGES, MAX_RELATIVE_WIDTH, MIN_RELATIVE_WIDTH
from hdit.names import printable

if TYPE_CHECKING:
    from rich.table import Table

    from hdit.training.posthoc import Made


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class ManyNumbers(TyperCommand):
    """A command whose --width and --decay take several numbers, as in --width 0.05 0.1."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Names the option again before each further number, as click has it."""
        spread: list[str] = []
        option = None
        for i, argument in enumerate(args):
            if argument == "--":
                spread += args[i:]
                break
            if option and _is_number(argument) and spread[-1] != option:
                spread.append(option)
            elif not _is_number(argument):
                name = argument.partition("=")[0]
                option = name if name in ("--width", "--decay") else None
            spread.append(argument)
        return super().parse_args(ctx, spread)


def ema(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run with training.ema.widths.")],
    width: Annotated[
        list[float] | None,
        typer.Option(
            metavar="X [X ...]",
            min=MIN_RELATIVE_WIDTH,
            max=MAX_RELATIVE_WIDTH,
            callback=finite,
            help="Relative width (sigma_rel) of a power-function average.",
        ),
    ] = None,
    decay: Annotated[
        list[float] | None,
        typer.Option(
            metavar="X [X ...]",
            min=0,
            max=MAX_DECAY,
            callback=finite,
            help="Largest decay of a plain average, with the run's warm-up.",
        ),
    ] = None,
    at: Annotated[
        int | None,
        typer.Option(
            metavar="IMAGES",
            min=1,
            max=MAX_IMAGES,
            help="After so many images, where there is a snapshot.  [default: the last]",
        ),
    ] = None,
    validate: Annotated[
        bool,
        typer.Option("--validate", help="Measure each on the held-out images of the run."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace models that were made before.")
    ] = False,
) -> None:
    """Make other averages of a run's weights from its snapshots.

    Each becomes a model in RUN/ema/<images>, which `hdit sample` and `hdit evaluate` take. See
    docs/ema.md.
    """
    from hdit.errors import UserError
    from hdit.training.posthoc import Wanted, make

    wanted = [Wanted("width", n) for n in width or ()] + [Wanted("decay", n) for n in decay or ()]
    if not wanted:
        raise UserError("--width: name one or more, as in --width 0.05 0.1 0.15")
    with progress() as bar:
        task = bar.add_task("reading averages", total=None)
        made = make(run, wanted, at, overwrite, warn, lambda: bar.advance(task), validate=validate)
    plain_console().print(_table(made, validate))
    for one in made:  # each whole, in a line that can be copied
        typer.echo(printable(str(one.path)))


def _table(made: list[Made], validated: bool) -> Table:
    """A row for each average."""
    from rich.table import Table

    losses = ("validation loss", "x0 error") if validated else ()
    table = Table("average", "gamma", "snapshots", "profile error", *losses)
    for one in made:
        gamma = "" if one.wanted.gamma is None else f"{one.wanted.gamma:.4f}"
        name = f"{one.wanted.kind} {one.wanted.value:g}"
        told = [_number(one.losses[key]) for key in ("loss", "x0")] if one.losses else []
        table.add_row(name, gamma, str(one.snapshots), f"{one.error:.2%}", *told)
    return table


def _number(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.6g}"
