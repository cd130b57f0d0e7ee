"""A plan, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from hdit.planning.model import operators_on
from hdit.planning.plan import USABLE, Plan
from hdit.runs.saver import gib_text, size_text


def memory_of_modes(plan: Plan) -> Table:
    """GiB of a step in each mode; the config's own first."""
    asked, cuda = plan.asked, plan.asked.device == "cuda"
    each = f" on each of {asked.gpus}" if asked.gpus > 1 else ""
    parts = f", {plan.accumulate} parts of a batch" if plan.accumulate > 1 else ""
    table = Table(
        title=f"GiB{each}: {plan.at_once} images at once on {asked.device} in "
        f"{plan.precision}{parts}",
        caption=f"Tensors of an eager step, by {operators_on(asked.device)}; the config's first. "
        "Checkpointed is with training.gradient_checkpointing; torch.compile keeps less than told. "
        f"The kernels' own buffers, the allocator's reserve{', CUDA itself' if cuda else ''} and "
        "images in the loader come on top.",
    )
    table.add_column("", no_wrap=True)
    for step in plan.steps:
        table.add_column(step.mode.title, justify="right")

    def row(name: str, sizes: list[int]) -> None:
        if any(sizes):
            table.add_row(name, *(gib_text(size) for size in sizes))

    held = [step.memory for step in plan.steps]
    row("weights", [m.weights for m in held])
    row("averages of weights", [m.ema for m in held])
    row("optimizer", [m.optimizer for m in held])
    row("gradients", [m.gradients for m in held])
    row("DDP's buckets", [m.buckets for m in held])
    row("gathered blocks", [m.gathered for m in held])
    row("whole gradients", [m.unreduced for m in held])
    row("activations", [sum(m.activations.values()) for m in held])
    row("temporaries of AdamW", [m.update for m in held])
    table.add_section()
    row("at the peak", [m.peak for m in held])
    if plan.process is not None:
        row("and with the process", [m.peak + plan.process for m in held])
    return table


def fits_table(plan: Plan) -> Table:
    """The batch in as few parts as a card holds, in each mode."""
    assert plan.asked.card is not None, "no card was named"
    batch = plan.config.training.batch_size
    table = Table(
        title=f"what {plan.asked.card / 2**30:.4g} GiB hold of a batch of {batch:,}",
        caption=f"{1 - USABLE:.0%} are left for CUDA, kernels' buffers and fragmentation",
    )
    table.add_column("", no_wrap=True)
    for name in ("images at once", "accumulate", "GiB at the peak"):
        table.add_column(name, justify="right")
    for fit in plan.fits:
        cells = [f"{fit.images:,}", f"{fit.accumulate:,}"] if fit.images else ["none fits", ""]
        table.add_row(fit.mode.title, *cells, gib_text(fit.peak))
    return table


def time_table(plan: Plan) -> Table:
    """Hours of each part, and money."""
    assert plan.hours is not None, "there is no speed"
    assert plan.speed is not None, "there are no hours without it"
    t, gpus = plan.config.training, plan.asked.gpus
    speed = plan.speed.images_per_second * gpus
    table = Table(
        title=f"hours to {t.images:,} images on {gpus} x {plan.asked.device}",
        caption=f"{speed:,.4g} images/s, by {plan.speed.source}",
    )
    table.add_column("", no_wrap=True)
    table.add_column("hours", justify="right")
    table.add_column("share", justify="right")
    total = plan.hours.total
    for name, hours in _lines(plan):
        table.add_row(name, f"{hours:,.4g}", f"{hours / total:.1%}")
    table.add_section()
    table.add_row("total", f"{total:,.4g}", "")
    if plan.money is not None:
        table.add_row(f"at {plan.asked.price:g} an hour of each", f"{plan.money:,.2f}", "")
    return table


def _lines(plan: Plan) -> Iterator[tuple[str, float]]:
    h, t = plan.hours, plan.config.training
    assert h is not None, "there are no hours"
    checkpoints = -(-t.images // t.checkpoint_every)
    grid = f"{checkpoints:,} grids of {plan.config.sampling.grid}"
    yield "training", h.training
    if h.grids:
        yield f"{grid}, {plan.evaluations} evaluations an image", h.grids
    if h.validation:
        yield "validation", h.validation
    yield f"{checkpoints:,} checkpoints", h.checkpoints
    if h.evaluation:
        yield f"{plan.asked.evaluated:,} samples for an evaluation", h.evaluation


def remarks(plan: Plan) -> Iterator[str]:
    """What else to know, a line each."""
    each, kept = plan.disk
    yield f"checkpoints of {size_text(each)}, {size_text(kept)} in all on the disk"
    found = plan.measured
    if found:
        low, high = (1000 * f(found.steps) for f in (min, max))
        yield f"{len(found.steps)} steps took {low:,.4g} to {high:,.4g} ms each"
        what = "this process" if plan.process is not None else "tensors"
        yield f"measured peak of {what}: {size_text(found.peak)}"
    if plan.hours is None:
        yield "no hours: give --gpu or --peak-tflops for a GPU's, or --measure to time steps here"
    yield from plan.notes
