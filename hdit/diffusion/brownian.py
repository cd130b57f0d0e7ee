"""One Brownian path for all sigma schedules: stochastic samplers converge as their steps grow."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hdit.errors import SolverError

DEPTH = 16  # 2^DEPTH ticks between 0 and sigma_max: some to each of 4,000 steps
ROOT = 7  # ticks are even in sigma^(1/ROOT)


class BrownianPath:
    """Noise for the stretches of a sampler: the increments of one Brownian path W, scaled to 1.

    noise(a, b) = (W(b) - W(a)) / sqrt(|b - a|) is standard normal, independent of that of any
    stretch that does not overlap, and changes its sign with the direction. The path's time is sigma
    itself, as in k-diffusion: two stretches that overlap, as `dpmpp_sde` draws them, have the
    correlation |overlap| / sqrt(|a - b| |c - d|).

    W is kept at 2^16 ticks from 0 to sigma_max, and a noise level goes to the nearest. They are
    even in sigma^(1/7), in which common sigma schedules are about even. W is a function of `normal`
    alone, and not of what was asked before: a midpoint displacement (Levy's construction),
    descended to the tick that is asked for.

    A step of an even sigma schedule draws about 17 - log2(steps) tensors, and 18 are kept.

    `normal(i)` gives the i-th standard normal tensor, the same each time; i is in 0..2^16 - 1.
    """

    def __init__(self, normal: Callable[[int], Tensor], sigma_max: float):
        self.normal, self.sigma_max = normal, sigma_max
        # The intervals that hold the tick asked for last: (node, left, right, W(left), W(right)).
        self.path: list[tuple[int, int, int, Tensor, Tensor]] = []

    def tick(self, sigma: float) -> int:
        """The tick nearest to sigma."""
        if not 0 <= sigma <= self.sigma_max * (1 + 1e-9):
            raise ValueError(
                f"the path reaches from 0 to sigma_max {self.sigma_max:.6g}, got sigma {sigma:.6g}"
            )
        return min(round((sigma / self.sigma_max) ** (1 / ROOT) * 2**DEPTH), 2**DEPTH)

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        start, end = self.tick(sigma), self.tick(sigma_next)
        if start == end:
            raise SolverError(
                f"noise levels {sigma:.9g} and {sigma_next:.9g} are too close for the path of the "
                f"noise, which has 2^{DEPTH} ticks; take fewer steps"
            )
        before = self._at(start)  # first, as it is the end of the step before
        return (self._at(end) - before).div_(math.sqrt(abs(time_of(end) - time_of(start))))

    def _at(self, tick: int) -> Tensor:
        """W at a tick; its variance is time_of(tick)."""
        while len(self.path) > 1 and not self.path[-1][1] <= tick <= self.path[-1][2]:
            self.path.pop()
        if not self.path:
            last = self.normal(0)
            self.path.append((1, 0, 2**DEPTH, torch.zeros_like(last), last))
        node, left, right, at_left, at_right = self.path[-1]
        while left < tick < right:
            middle = (left + right) // 2
            share, spread = bridge(time_of(left), time_of(middle), time_of(right))
            at_middle = torch.lerp(at_left, at_right, share).add_(self.normal(node), alpha=spread)
            if tick >= middle:
                node, left, at_left = 2 * node + 1, middle, at_middle
            else:
                node, right, at_right = 2 * node, middle, at_middle
            self.path.append((node, left, right, at_left, at_right))
        return at_left if tick == left else at_right


def too_close(sigmas: Tensor) -> tuple[float, float] | None:
    """The first noise levels beside each other in a sigma schedule that go to one tick, if any."""
    ticks = ((sigmas / sigmas[0]) ** (1 / ROOT) * 2**DEPTH).round()
    same = (ticks[1:] == ticks[:-1]).nonzero()
    if not len(same):
        return None
    first = int(same[0])
    return sigmas[first].item(), sigmas[first + 1].item()


def time_of(tick: int) -> float:
    """The noise level of a tick, as a share of sigma_max."""
    return (tick / 2**DEPTH) ** ROOT


def bridge(left: float, middle: float, right: float) -> tuple[float, float]:
    """(share, spread): W(middle), given W at both ends, is normal about the mean
    lerp(W(left), W(right), share), with the standard deviation spread."""
    share = (middle - left) / (right - left)
    return share, math.sqrt((middle - left) * (1 - share))
