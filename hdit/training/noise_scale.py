"""The gradient noise scale (McCandlish et al., 2018, arXiv 1812.06162, appendix A.1)."""

from __future__ import annotations

from dataclasses import dataclass

BETA = 0.9998  # of the running averages
TINY = 1e-8


@dataclass
class GradientNoiseScale:
    """Running averages of |G|^2 and of the trace of a gradient's covariance, from two batch sizes.

    The averages begin at 0; `unbiased` takes that out.
    """

    square: float = 0.0
    variance: float = 0.0
    updates: int = 0
    beta: float = BETA

    def update(self, small_square: float, square: float, small: int, batch: int) -> None:
        """The squared norms of the gradient of `small` images and of all `batch`."""
        self.square += (1 - self.beta) * (
            (batch * square - small * small_square) / (batch - small) - self.square
        )
        self.variance += (1 - self.beta) * (
            (small_square - square) / (1 / small - 1 / batch) - self.variance
        )
        self.updates += 1

    @property
    def scale(self) -> float:
        """In images: a batch much smaller wastes steps, one much larger wastes images."""
        square, variance = self.unbiased()
        return max(variance, TINY) / max(square, TINY)

    def unbiased(self) -> tuple[float, float]:
        """(|G|^2, variance), with the averages' start at 0 taken out."""
        seen = 1 - self.beta**self.updates
        return self.square / seen, self.variance / seen
