"""What a model costs, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from hdit.models.cost import PartCost
from hdit.models.memory import Memory


def cost_table(title: str, rows: Sequence[PartCost]) -> Table:
    """Parameters, MACs and FLOPs of each part, and of all."""
    table = Table(
        title=title,
        caption="MACs (multiply-accumulates, what the papers print as FLOPs) and FLOPs = 2 MACs:\n"
        "one forward pass of one image",
    )
    table.add_column("part")
    for name in ("grid", "tokens", "parameters", "MACs", "FLOPs"):
        table.add_column(name, justify="right")
    for row in rows:
        h, w = row.grid or (0, 0)
        grid = [f"{h} x {w}", f"{h * w:,}"] if row.grid else ["", ""]
        table.add_row(row.name, *grid, f"{row.params:,}", _si(row.macs), _si(2 * row.macs))
    params, macs = sum(row.params for row in rows), sum(row.macs for row in rows)
    table.add_section()
    table.add_row("total", "", "", f"{params:,}", _si(macs), _si(2 * macs))
    return table


def memory_table(
    title: str, plain: Memory, checkpointed: Memory, *, operators: str, cuda: bool
) -> Table:
    """GiB of a step, without and with gradient checkpointing.

    `operators` says whose operators were counted.
    """
    table = Table(
        title=title,
        caption=f"GiB of tensors in an eager step, by {operators};\ntorch.compile keeps less. "
        "The kernels' own buffers, the allocator's\nreserve"
        f"{', CUDA itself' if cuda else ''} and images in the loader come on top",
    )
    table.add_column("")
    table.add_column("plain", justify="right")
    table.add_column("gradient_checkpointing", justify="right")

    def row(name: str, *sizes: int) -> None:
        table.add_row(name, *(f"{size / 2**30:.3g}" for size in sizes))

    row("weights and EMA", *(m.weights + m.ema for m in (plain, checkpointed)))
    row("optimizer", plain.optimizer, checkpointed.optimizer)
    row("gradients", plain.gradients, checkpointed.gradients)
    for part in plain.activations:
        sizes = (m.activations.get(part, 0) for m in (plain, checkpointed))
        row(f"activations of {part}", *sizes)
    row("temporaries of AdamW", plain.update, checkpointed.update)
    table.add_section()
    row("at the peak", plain.peak, checkpointed.peak)
    return table


def _si(number: int) -> str:
    """Four digits and a prefix: 206.1 G."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g} {prefix}"
    return str(number)
