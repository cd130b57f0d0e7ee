"""hdit info"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hdit.cli.options import ConfigFile, Overrides
from hdit.cli.output import plain_console
from hdit.limits import MAX_BATCH, MAX_CLASSES
from hdit.messages import say
from hdit.names import printable

if TYPE_CHECKING:
    from rich.table import Table

    from hdit.config.schema import RunConfig
    from hdit.protocols import DataShape

MOST_PREDICTED = 2**43  # bytes of parameters, beyond which a prediction takes minutes


def info(
    config: ConfigFile,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MAX_BATCH,
            help="Images at once, for the memory.  [default: a part of the batch]",
        ),
    ] = None,
    classes: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=MAX_CLASSES,
            help="Number of classes.  [default: data.classes, or as many as the data has]",
        ),
    ] = None,
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
    """Print a model's parameters, MACs and FLOPs by level, and the memory that training takes."""
    from hdit.config import load
    from hdit.config.presets import find_config
    from hdit.errors import UserError
    from hdit.models.cost import cost
    from hdit.models.fitting import TRAINED
    from hdit.models.tables import cost_table

    if device not in (None, "cpu", "cuda"):
        raise UserError(f"--device: must be cpu or cuda, got {device!r}")
    settings = load(find_config(config), overrides or [])
    number, note = (classes, None) if classes is not None else _classes(settings)
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


def _classes(settings: RunConfig) -> tuple[int, str | None]:
    """How many classes the config names, or its data has; or 0, and why they are not known."""
    from hdit.data.source import DataError
    from hdit.latents.store import read_manifest
    from hdit.names import path_of

    named = getattr(settings.data, "classes", None)
    if named is not None:
        return (named if isinstance(named, int) else len(named)), None
    stored = getattr(settings.space, "stored", None)
    try:
        held = read_manifest(path_of(stored)) if stored else settings.data.open()
    except DataError as error:
        return 0, (
            "counted without classes (or give --classes, or set data.classes), as the data cannot "
            f"be read: {error}"
        )
    return len(held.classes), None


def _memory(settings: RunConfig, shape: DataShape, images: int, device: str | None) -> Table:
    """The memory of an eager step on `device`; None is the device that a run here would take."""
    import torch

    from hdit.device import autocast_dtype, precision_on
    from hdit.models.memory import training_memory
    from hdit.models.tables import memory_table
    from hdit_kernels import native

    cuda_here = torch.cuda.is_available()
    device = device or ("cuda" if cuda_here else "cpu")
    asked, key = settings.training.precision, "training.precision"
    if device == "cpu" or cuda_here:
        precision = precision_on(torch.device(device), asked, key)
    else:  # devices from compute capability 8.0 on, which are assumed, have all of them
        precision = "bf16" if asked == "auto" else asked
    plain, checkpointed = (
        training_memory(
            settings.model,
            shape,
            images,
            out_channels=settings.output_channels(shape),
            checkpointing=checkpointing,
            autocast=autocast_dtype(precision),
            device=device,
        )
        for checkpointing in (False, True)
    )
    operators = "the C++ library's and torch's operators"
    if device == "cuda" or native.unavailable():
        operators = "torch's operators"
    return memory_table(
        f"memory of a step with {images} images on {device} in {precision}",
        plain,
        checkpointed,
        operators=operators,
        cuda=device == "cuda",
        parts=settings.training.accumulate,
    )
