"""Whether images are those of their seeds: a few are sampled again, in batches of another size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from hdit.errors import UserError
from hdit.sampling.outputs import Output
from hdit.sampling.record import Plan
from hdit.sampling.sample import Samples

TOLERANCE = {"fp32": 2, "tf32": 8, "bf16": 32}
"""Levels of 0..255 that an image may change by with the size of its batch, by precision: sums in
another order round another way, and a sampler carries that on."""


class Make(Protocol):
    """Makes images of a plan in batches."""

    def __call__(
        self,
        plan: Plan,
        indices: np.ndarray,
        batch_size: int,
        on_step: Callable[[], None] | None = None,
    ) -> Iterator[Samples]: ...


def check_again(output: Output, make: Make, number: int) -> str:
    """Samples `number` images of a complete set once more -> a line that tells how they differ.

    They are evenly chosen, and sampled one by one, or all at once where the set was made one by
    one. Raises UserError where one differs by more than TOLERANCE.
    """
    plan, sampling = output.plan, output.asked["sampling"]
    indices = np.unique(np.linspace(0, plan.number - 1, min(number, plan.number)).astype(int))
    batch_size = len(indices) if sampling["batch_size"] == 1 else 1
    largest, where, total, at = 0, plan.first, 0.0, 0
    for part in make(plan, indices, batch_size):
        for image in part.images:
            stored = output.get(int(indices[at]))
            difference = (image.int() - stored.int()).abs()
            if difference.max() > largest:
                largest, where = int(difference.max()), plan.first + int(indices[at])
            total, at = total + difference.double().mean().item(), at + 1
    most = TOLERANCE[sampling["precision"]]
    how = "one by one" if batch_size == 1 else f"{batch_size} at once"
    told = (
        f"sampled {len(indices)} images again, {how}: they differ by {largest} of 255 levels at "
        f"most{f' (seed {where})' if largest else ''}, and by {total / len(indices):.2g} on average"
    )
    if largest > most:
        raise UserError(
            f"--check: {told}; {most} are what {sampling['precision']} may do: the files, the "
            "machine or the software are not those that made the set; add --overwrite for a new one"
        )
    return f"{told}; {most} are allowed in {sampling['precision']}"
