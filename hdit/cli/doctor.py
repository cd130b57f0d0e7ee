"""hdit doctor"""

from __future__ import annotations

from typing import Annotated

import typer

from hdit.cli.options import AsJson
from hdit.cli.output import error_console
from hdit.messages import echo


def doctor(
    fast: Annotated[
        bool, typer.Option("--fast", help="Neither try torch.compile nor time anything.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check whether this machine can run hdit well: devices, compilers, attention, packages.

    Ends with status 1 where training cannot work, and says why.
    """
    import json
    from dataclasses import asdict

    from rich.console import Console

    try:
        from hdit.doctor import examine, tables
    except ImportError as error:
        echo(f"broken: hdit cannot be imported: {error}")
        raise typer.Exit(1) from None
    console = Console()
    with error_console().status("") as line:
        diagnosis = examine(fast, lambda step: line.update(step))
    if as_json:
        typer.echo(json.dumps(asdict(diagnosis), indent=1))
    else:
        for table in tables(diagnosis):
            console.print(table)
        if not diagnosis.broken:
            typer.echo("hdit can train here.")
    for problem in diagnosis.broken:
        echo(f"broken: {problem}")
    if diagnosis.broken:
        raise typer.Exit(1)
