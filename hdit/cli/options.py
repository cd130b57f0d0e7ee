"""Arguments and options that several verbs take, declared once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from hdit.errors import UserError
from hdit.limits import MAX_BATCH, MAX_CLASSES, MAX_GUIDANCE, MAX_STEPS, MAX_WORKERS

Number = TypeVar("Number", float, list[float], None)


def finite(value: Number) -> Number:
    """Refuses NaN, which no comparison with a bound does, also in a list."""
    for one in value if isinstance(value, list) else [value]:
        if one is not None and not math.isfinite(one):
            raise typer.BadParameter(f"must be a number, got {one}")
    return value


def is_raw(raw: bool, weights: str | None) -> bool:
    """Whether the weights as trained are asked for. Raises UserError for both options at once."""
    if raw and weights is not None:
        raise UserError(f"--raw: is --weights model, and {weights!r} was asked for; leave one out")
    return raw or weights == "model"


ConfigFile = Annotated[
    Path,
    typer.Argument(metavar="CONFIG", help="A TOML file, or the name of a preset: `hdit configs`."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key, as in training.batch_size=64."
    ),
]
SamplingOverrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key, as in sampling.sampler.eta=0."
    ),
]
Raw = Annotated[bool, typer.Option("--raw", help="The weights as trained, not their EMA.")]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Which weights: ema, model, or a further average of training.ema, as ema-0.999.",
    ),
]
Steps = Annotated[int | None, typer.Option(min=1, max=MAX_STEPS, help="Steps of the sampler.")]
Guidance = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=MAX_GUIDANCE,
        callback=finite,
        help="Scale of classifier-free guidance; 1 is none.",
    ),
]
BATCH_SIZE = typer.Option(min=1, max=MAX_BATCH, help="Images at once.")
SEED = typer.Option(min=0, max=2**62, help="Seed of the first image; then one more each.")
Workers = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=MAX_WORKERS,
        help="Processes that read; 0 for this one.  [default: one for a CPU]",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

Batch = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MAX_BATCH,
        help="Images that a device takes at once.  [default: a part of the batch]",
    ),
]
Classes = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=MAX_CLASSES,
        help="Number of classes.  [default: data.classes, or as many as the data has]",
    ),
]
