"""hdit configs"""

from __future__ import annotations

from typing import Annotated

import typer


def configs(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A preset to print.  [default: list all]")
    ] = None,
) -> None:
    """List the presets, or print one to start from.

    Wherever CONFIG stands in a command, so may the name of a preset. What is printed needs no other
    file: hdit configs digits-hdit > my.toml, change it, hdit train my.toml.
    """
    from hdit.config.presets import presets, standalone

    if name is not None:
        typer.echo(standalone(name), nl=False)
        return
    found = presets()
    width = max(map(len, found), default=0)
    for preset, title in found.items():
        typer.echo(f"{preset:{width}}  {title}")
