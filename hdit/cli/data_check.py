"""hdit data check"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hdit.cli.options import AsJson, Overrides, Workers
from hdit.cli.output import plain_console, progress
from hdit.messages import echo, message, say

if TYPE_CHECKING:
    from hdit.data.images import Images


def data_check(
    place: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="A folder, .zip, .npz or .tar, as data.path; for --kind hub or python its name or "
            "hook; or a config or preset, for its [data].",
        ),
    ],
    size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Of the crop: a side, or HEIGHTxWIDTH.  [default: 256]"),
    ] = None,
    channels: Annotated[
        int | None, typer.Option(min=1, max=3, help="3 for RGB, 1 for grey.  [default: 3]")
    ] = None,
    crop: Annotated[
        str | None, typer.Option(metavar="NAME", help="As data.crop.  [default: center]")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Kind of the source, if PATH does not tell: hub, ..."),
    ] = None,
    sheet: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A PNG.  [default: <name>-contact-sheet.png, here]"),
    ] = None,
    workers: Workers = None,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Read every image of a data set as training would, and report what is there.

    Sizes, classes, unreadable files, exact duplicates, sigma_data, and a contact sheet of up to 100
    images after the crop. Ends with status 1 if training would fail, and says why.
    """
    import json

    from hdit.data import check
    from hdit.names import escape
    from hdit.report.grids import save_grid

    path = check.sheet_path(place, sheet)
    options = {"size": size, "channels": channels, "crop": crop}
    source, held_out = _open(place, kind, options, overrides or [])
    workers = check.processes() if workers is None else workers
    with progress() as bar:
        task = bar.add_task("reading", total=len(source))
        report, shown = check.check(
            source, workers, lambda count: bar.advance(task, count), held_out
        )
    if as_json:
        written = escape(str(path)) if shown else None
        typer.echo(json.dumps(report.to_json() | {"contact_sheet": written}, indent=1))
    else:
        console = plain_console()
        for line in check.lines(report):
            say(console, line)
        for table in check.tables(report):
            console.print(table)
    if shown:
        tiles = check.contact_sheet(source, shown)
        save_grid(tiles, path)
        said = f"{len(tiles)} images as training sees them: {path}"
        typer.echo(message(said), err=as_json)
    if report.unusable:
        echo(f"unusable: {report.unusable}")
        raise typer.Exit(1)


def _open(
    place: str, kind: str | None, options: dict[str, Any], overrides: list[str]
) -> tuple[Images, int]:
    """The data of a config, or of a path with `options`, and how many images are held out from it.

    Raises UserError for an idle option.
    """
    from hdit.config import load
    from hdit.config.presets import or_preset
    from hdit.data import check
    from hdit.data.kinds import what_is
    from hdit.errors import UserError

    given = {key: value for key, value in options.items() if value is not None}
    found = or_preset(place)
    if what_is(found) == "config":
        if idle := [*given, *(["kind"] if kind else [])]:
            raise UserError(f"--{idle[0]}: has no effect with a config; use --set data.KEY=VALUE")
        config = load(found, overrides)
        source = check.by_index(config.data.open())
        if getattr(config.space, "stored", None) is not None:
            return source, 0  # of what is stored, not of these images, some are held out
        return check.hold_out(source.spec, source)
    if overrides:
        raise UserError("--set: has no effect without a config; name a config in place of PATH")
    defaults: dict[str, Any] = {"size": "256", "channels": 3, "crop": "center"}
    return check.open_source(place, kind, **(defaults | given)), 0
