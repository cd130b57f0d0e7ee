"""hdit plan"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hdit.cli.options import AsJson, Batch, Classes, ConfigFile, Overrides, finite
from hdit.cli.output import plain_console
from hdit.limits import MAX_SAMPLES
from hdit.messages import echo, say
from hdit.names import printable

if TYPE_CHECKING:
    from hdit.planning.plan import Plan

MAX_GPUS = 65_536


def plan(
    config: ConfigFile,
    gpus: Annotated[
        int, typer.Option(min=1, max=MAX_GPUS, help="How many train it; on a CPU, processes.")
    ] = 1,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="cpu|cuda",
            help="Device that is planned for; this machine need not have it.  "
            "[default: cuda with --gpu, else what a run here takes]",
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="GPU whose peak is known: A100, H100, H200, RTX 4090."),
    ] = None,
    peak_tflops: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=1e-6,
            max=1e9,
            callback=finite,
            help="Peak of each GPU in the config's precision, in TFLOP/s.",
        ),
    ] = None,
    mfu: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            min=0,
            max=1,
            callback=finite,
            help="Share of the peak that training reaches.  [default: 0.4]",
        ),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time a few steps here; nothing is left behind.")
    ] = False,
    price: Annotated[
        float | None,
        typer.Option(
            metavar="X", min=0, max=1e9, callback=finite, help="Price of an hour of one GPU."
        ),
    ] = None,
    evaluate: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            max=MAX_SAMPLES,
            help="Images to sample for an evaluation in the end.",
        ),
    ] = 0,
    memory: Annotated[
        float | None,
        typer.Option(
            metavar="GIB",
            min=1e-3,
            max=1e6,
            callback=finite,
            help="Memory of a GPU, to tell which batch fits with which settings.",
        ),
    ] = None,
    batch: Batch = None,
    classes: Classes = None,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Print what training will cost: memory, hours, money and disk.

    Hours come from a GPU's peak and the share of it that is reached, or from steps that are timed
    here. Memory is told for the config as it is, with gradient checkpointing and, on several GPUs,
    with the model whole on each (ddp) or sharded (fsdp).
    """
    from hdit.config import load
    from hdit.config.presets import find_config
    from hdit.device import keep_freed_memory
    from hdit.errors import UserError
    from hdit.files import to_json
    from hdit.planning.measure import measure as measured_here
    from hdit.planning.model import classes_of, device_here, precision_for, process_memory
    from hdit.planning.plan import Asked, cut, known_peak, make_plan, to_dict

    if device not in (None, "cpu", "cuda"):
        raise UserError(f"--device: must be cpu or cuda, got {device!r}")
    settings = load(find_config(config), overrides or [])
    device = device or ("cuda" if gpu else device_here())
    _check(device, gpu, peak_tflops, mfu, measure, device_here())
    number, note = (classes, None) if classes is not None else classes_of(settings)
    asked = Asked(
        device=device,
        gpus=gpus,
        at_once=batch,
        mfu=0.4 if mfu is None else mfu,
        peak=known_peak(gpu, peak_tflops, precision_for(settings, device)),
        price=price,
        evaluated=evaluate,
        card=None if memory is None else memory * 2**30,
    )
    _, accumulate = cut(settings, asked)
    # A CPU's memory is that of the process, before the predictions themselves add to it.
    process = process_memory() if device == "cpu" else None
    found = None
    if measure:
        keep_freed_memory()
        t = settings.training.model_copy(update={"accumulate": accumulate})
        cut_so = settings.model_copy(update={"training": t})
        found = measured_here(cut_so, gpus, number, echo)
    planned = make_plan(settings, number, asked, found, process)
    if as_json:
        if note:
            echo(note)
        typer.echo(to_json(to_dict(planned), "the plan"))
    else:
        _print(planned, printable(config.stem), note)


def _print(plan: Plan, name: str, note: str | None) -> None:
    """Prints the tables of a plan, and what else to know."""
    from hdit.planning import tables

    console, s = plain_console(), plan.shape
    say(
        console,
        f"{name}: {plan.config.model.kind} at {s.channels} x {s.height} x {s.width}, "
        f"{s.num_classes} classes: {plan.parameters:,} parameters, "
        f"{plan.macs / 1e9:,.4g} GMAC a forward pass of one image",
    )
    console.print(tables.memory_of_modes(plan))
    if plan.asked.card:
        console.print(tables.fits_table(plan))
    if plan.hours:
        console.print(tables.time_table(plan))
    for remark in tables.remarks(plan):
        say(console, remark)
    if note:
        say(console, note)


def _check(
    device: str,
    gpu: str | None,
    peak: float | None,
    mfu: float | None,
    measure: bool,
    here: str,
) -> None:
    """Raises UserError for options that contradict each other, or have no effect."""
    from hdit.errors import UserError

    if mfu == 0:
        raise UserError("--mfu: must be above 0, and at most 1, got 0")
    if gpu is not None and peak is not None:
        raise UserError("--gpu: --peak-tflops says the peak too; leave out one")
    if gpu is not None and device == "cpu":
        raise UserError("--gpu: has no effect with --device cpu")
    for option, value in (("--gpu", gpu), ("--peak-tflops", peak), ("--mfu", mfu)):
        if measure and value is not None:
            raise UserError(f"{option}: has no effect with --measure, which times steps")
    if mfu is not None and gpu is None and peak is None:
        raise UserError("--mfu: needs the peak that it is a share of: give --gpu or --peak-tflops")
    if measure and device != here:
        raise UserError(f"--measure: steps are timed on this machine's {here}, not on {device!r}")
