"""The gradient noise scale (McCandlish et al., 2018, arXiv 1812.06162, appendix A.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

BETA = 0.9998  # of the running averages
TINY = 1e-8


@dataclass
class GradientNoiseScale:
    """Running averages of |G|^2 and of the trace of a gradient's covariance, from two batch sizes.

    The averages begin at 0; `unbiased` takes that out. Updated with tensors, they are tensors () on
    their device, float64 where it has that, until `unbiased`, `scale` or `state` is asked for.
    """

    square: float | Tensor = 0.0
    variance: float | Tensor = 0.0
    updates: int = 0
    beta: float = BETA

    def update(
        self, small_square: float | Tensor, square: float | Tensor, small: int, batch: int
    ) -> None:
        """The squared norms of the gradient of `small` images and of all `batch`.

        What is not finite moves nothing: the averages would never be finite again.
        """
        small_square, square = _widened(small_square), _widened(square)
        step = (batch * square - small * small_square) / (batch - small) - self.square
        self.square += (1 - self.beta) * _finite(step)
        step = (small_square - square) / (1 / small - 1 / batch) - self.variance
        self.variance += (1 - self.beta) * _finite(step)
        self.updates += 1

    @property
    def scale(self) -> float:
        """In images: a batch much smaller wastes steps, one much larger wastes images."""
        square, variance = self.unbiased()
        return max(variance, TINY) / max(square, TINY)

    def unbiased(self) -> tuple[float, float]:
        """(|G|^2, variance), with the averages' start at 0 taken out."""
        seen = 1 - self.beta**self.updates
        return float(self.square) / seen, float(self.variance) / seen

    def state(self) -> tuple[float, float, int]:
        """What a checkpoint keeps, and the constructor takes."""
        return float(self.square), float(self.variance), self.updates


def squared(norm: Tensor) -> Tensor:
    """norm^2 in float64: a norm above 1.8e19 has no square in float32."""
    widened = _widened(norm)
    assert isinstance(widened, Tensor)
    return widened.square()


def _finite(step: float | Tensor) -> float | Tensor:
    """The step, or 0 where it is nan or infinite."""
    if isinstance(step, Tensor):
        return step.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return step if math.isfinite(step) else 0.0


def _widened(number: float | Tensor) -> float | Tensor:
    """In float64, which the averages need: they move by 1/5000 of what is new."""
    if not isinstance(number, Tensor):
        return number
    return number.double() if number.device.type != "mps" else number.cpu().double()
