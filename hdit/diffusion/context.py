"""What a setting may follow from: the facts that others of the run's settings decide."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

from hdit.diffusion.beta_schedules import BetaSchedule
from hdit.protocols import DataShape, Spec

SMALLEST = 1e-12  # noise level whose square, and that of its inverse, float32 can hold

Problem = tuple[str, str]
"""(key, what is wrong with it)"""


@dataclass(frozen=True)
class Context:
    """The run as one of its settings sees it.

    `valid_range` is the lowest and highest noise level that the denoiser is defined at, and what
    bounds them; `c_noise` is what the backbone expects to be told of sigma.
    """

    shape: DataShape
    c_noise: str
    learned_variance: bool
    beta_schedule: BetaSchedule
    valid_range: tuple[float, float, str]

    def misfits(self, start: float, end: float, fix: str) -> Iterator[str]:
        """What is wrong with noise levels from `start` to `end`; `fix` ends the message."""
        low, high, by = self.valid_range
        if not start < end:
            yield f"sigma_min must be below sigma_max, got {start:.5g} and {end:.5g}"
        if start < SMALLEST or end > 1 / SMALLEST:
            yield (
                f"noise levels {start:.5g} to {end:.5g} are beyond float32's reach; set "
                "sigma_min and sigma_max"
            )
        elif start < low * (1 - 1e-6) or end > high * (1 + 1e-6):
            yield (
                f"noise levels {start:.5g} to {end:.5g} leave the range of {by}, "
                f"{low:.5g} to {high:.5g}; {fix}"
            )


def under(path: str, problems: Iterable[Problem]) -> Iterator[Problem]:
    """The problems of a part, their keys from its holder's."""
    return ((f"{path}.{key}" if key else path, text) for key, text in problems)


class DependentSpec(Spec):
    """Base of settings that follow from others, or must fit them."""

    def resolved(self, context: Context) -> Self:
        """With what follows from other settings written out."""
        update = {name: part.resolved(context) for name, part in self._parts()}
        return self.model_copy(update=update) if update else self

    def check(self, context: Context) -> Iterator[Problem]:
        """What is well-typed but does not fit; of its parts, if it says nothing of itself."""
        for name, part in self._parts():
            yield from under(name, part.check(context))

    def _parts(self) -> Iterator[tuple[str, DependentSpec]]:
        for name in type(self).model_fields:
            if isinstance(part := getattr(self, name), DependentSpec):
                yield name, part
