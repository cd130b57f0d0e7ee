"""hdit watch"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hdit.messages import echo

PORT = 8765


def watch(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Folders of runs, which may be going on."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The page.  [default: watch.html in the first RUN]"),
    ] = None,
    serve: Annotated[
        bool,
        typer.Option("--serve", help="Serve the page to this machine's browsers, kept up to date."),
    ] = False,
    port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help=f"Where --serve listens; 0 for any port that is free.  [default: {PORT}]",
        ),
    ] = None,
) -> None:
    """Draw runs in one page: curves, samples, events, settings.

    The page is one HTML file that needs nothing else. With --serve it is not written, but served at
    an address of this machine until Ctrl-C, and follows runs that go on.
    """
    from hdit.errors import UserError
    from hdit.files import check_writable, write_text
    from hdit.names import printable
    from hdit.report.watch.page import write_page
    from hdit.runs.history import check_run

    if serve and out is not None:
        raise UserError("--out: has no effect with --serve, which writes no file")
    if port is not None and not serve:
        raise UserError("--port: has no effect without --serve")
    for run in runs:
        check_run(run)
    for i, run in enumerate(runs):
        if any(run.samefile(other) for other in runs[:i]):
            raise UserError(f"RUN: {printable(str(run))} is named twice")
    if serve:
        _serve(runs, PORT if port is None else port)
        return
    page = runs[0] / "watch.html" if out is None else out
    if page.is_dir():
        raise UserError(
            f"--out: {printable(str(page))} is a folder; name a file in it, such as watch.html"
        )
    check_writable(page)
    write_text(page, write_page(runs))
    typer.echo(printable(str(page)))


def _serve(runs: list[Path], port: int) -> None:
    """Serves the page until a signal ends it."""
    from hdit.report.watch.server import Server

    with Server(runs, port) as server:
        typer.echo(server.address)
        echo("Ctrl-C ends it")
        server.serve_forever()
