"""hdit info"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hdit.cli.options import Batch, Classes, ConfigFile, Overrides
from hdit.cli.output import plain_console
from hdit.messages import say
from hdit.names import printable

if TYPE_CHECKING:
    from rich.table import Table

    from hdit.config.schema import RunConfig
    from hdit.protocols import DataShape

MOST_PREDICTED = 2**43  # bytes of parameters, beyond which a prediction takes minutes


def info(
    config: ConfigFile,
    batch: Batch = None,
    classes: Classes = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="cpu|cuda",
            help="Device whose memory is predicted; this machine need not have it.  "
            "[default: what a run here takes]",
        ),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Print a model's parameters, MACs and FLOPs by level, and the memory that training takes.

    `hdit plan` tells hours, money and disk as well.
    """
    from hdit.config import load
    from hdit.config.presets import find_config
    from hdit.errors import UserError
    from hdit.models.cost import cost
    from hdit.models.fitting import TRAINED
    from hdit.models.tables import cost_table
    from hdit.planning.model import classes_of

    if device not in (None, "cpu", "cuda"):
        raise UserError(f"--device: must be cpu or cuda, got {device!r}")
    settings = load(find_config(config), overrides or [])
    number, note = (classes, None) if classes is not None else classes_of(settings)
    shape = settings.data_shape(number)
    rows = cost(settings.model, shape, settings.output_channels(shape))
    title = (
        f"{printable(config.stem)}: {settings.model.kind} at {shape.channels} x {shape.height} x "
        f"{shape.width}, {number} classes"
    )
    console = plain_console()
    console.print(cost_table(title, rows))
    for remark in settings.model.remarks(shape, sum(row.params for row in rows)):
        say(console, remark)
    images = batch or settings.training.batch_size // settings.training.accumulate
    if (fixed := TRAINED * sum(row.params for row in rows)) < MOST_PREDICTED:
        console.print(_memory(settings, shape, images, device))
    else:
        console.print(
            f"Its weights, EMA, gradients and moments take {fixed / 2**40:.4g} TiB: no machine "
            "trains it."
        )
    if (held_out := settings.data.held_out) is not None:
        t = settings.training
        if isinstance(held_out, float):
            what = f"a share of {held_out:g} of the images, which is not trained on"
        else:
            what = f"those of {printable(held_out)!r}"
        say(
            console,
            f"Validated every {t.validate_every:,} images on up to {t.validate_images:,}, {what}.",
        )
    if note:
        say(console, note)


def _memory(settings: RunConfig, shape: DataShape, images: int, device: str | None) -> Table:
    """The memory of an eager step on `device`; None is the device that a run here would take."""
    from hdit.models.tables import memory_table
    from hdit.planning.model import Mode, device_here, operators_on, precision_for, step_memory

    device = device or device_here()
    parts = settings.training.accumulate
    plain, checkpointed = (
        step_memory(settings, shape, images, device, Mode("", checkpointing), parts=parts)
        for checkpointing in (False, True)
    )
    return memory_table(
        f"memory of a step with {images} images on {device} in {precision_for(settings, device)}",
        plain,
        checkpointed,
        operators=operators_on(device),
        cuda=device == "cuda",
    )
