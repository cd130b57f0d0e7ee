"""hdit convert"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hdit.cli.options import Raw, Weights, is_raw
from hdit.limits import MAX_CLASSES, MAX_WIDTH
from hdit.messages import echo, message


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="A run or checkpoint; a converted folder; k-diffusion's .safetensors, or .json "
            "alone; DiT's .pt; a folder of diffusers.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(help="A new folder; a file for k-diffusion, facebook-dit or a config."),
    ],
    to: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="hdit, k-diffusion, facebook-dit or diffusers.  [default: hdit, a folder that "
            "`hdit sample` reads; a config for a config]",
        ),
    ] = None,
    raw: Raw = False,
    weights: Weights = None,
    num_heads: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MAX_WIDTH,
            help="Heads of a DiT that is not S, B, L or XL, if its .pt does not tell.",
        ),
    ] = None,
    num_classes: Annotated[
        int | None,
        typer.Option(
            "--classes",
            min=1,
            max=MAX_CLASSES,
            help="Classes of a DiT, if its .pt does not tell; all rows of its table where it was "
            "trained without a null class.",
        ),
    ] = None,
    prediction: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT",
            help="noise, as a DiT; velocity, as a SiT of path Linear, if its .pt does not tell.",
        ),
    ] = None,
) -> None:
    """Read a checkpoint of this or another project, and write it as another's.

    No pickle is executed. OUT is written whole or not at all.
    """
    from hdit.runs.conversion import convert as convert_model

    raw = is_raw(raw, weights)
    done = convert_model(
        source,
        out,
        to,
        raw=raw,
        weights=weights,
        num_heads=num_heads,
        num_classes=num_classes,
        prediction=prediction,
    )
    for note in done.notes:
        echo(f"note: {note}")
    typer.echo(message(f"{done.origin} -> {done.kind}: {done.path}"))
