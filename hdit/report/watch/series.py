"""Curves of millions of points, as few as a screen can show, with their minima and maxima."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hdit.runs.history import Numbers

POINTS = 800
"""Of a curve: more than most charts have pixels."""


def thin(x: Numbers, y: Numbers, points: int = POINTS) -> dict[str, list[Any]]:
    """The curve through (x, y), both (n,), without points where y is nan.

    Up to 2 * `points` points stay as they are: `x` and `y`. Of more, each of `points` groups of
    neighbours becomes one: `x` and `y` are its means, `lo` and `hi` its extremes, and `each` tells
    how many points a group has. The first and the last point stay, too.
    """
    there = ~np.isnan(y)
    x, y = x[there], y[there]
    n = len(x)
    if n <= 2 * points:
        return {"x": whole(x), "y": short(y)}
    starts = np.linspace(0, n, points, endpoint=False).astype(int)
    counts = np.diff(np.append(starts, n))

    def with_ends(middle: Numbers, of: Numbers) -> Numbers:
        return np.concatenate([of[:1], middle, of[-1:]])

    return {
        "x": whole(with_ends(np.add.reduceat(x, starts) / counts, x)),
        "y": short(with_ends(np.add.reduceat(y, starts) / counts, y)),
        "lo": short(with_ends(np.minimum.reduceat(y, starts), y)),
        "hi": short(with_ends(np.maximum.reduceat(y, starts), y)),
        "each": [int(counts.max())],
    }


def some(n: int, limit: int, always: Sequence[int] = ()) -> list[int]:
    """At most `limit` of the indices below n, evenly spread, with both ends and those of `always`.

    `always` counts on top of the limit.
    """
    if n <= limit:
        return list(range(n))
    spread = np.linspace(0, n - 1, limit).round().astype(int).tolist()
    return sorted({*spread, *always})


def hours(images: Numbers, seconds: Numbers, speeds: Numbers) -> tuple[Numbers, bool]:
    """Hours of training at each line (n,), and whether they are a guess.

    They are one where not every line has `seconds`: then images over images/s, line by line.
    """
    if len(seconds) == len(images) and not np.isnan(seconds).any():
        return seconds / 3600, False
    steps = np.diff(images, prepend=0.0)
    if not len(speeds):
        return np.zeros_like(images), True
    sound = speeds > 0  # false of nan, too
    each = np.divide(steps, speeds, out=np.zeros_like(steps), where=sound)
    return np.cumsum(each) / 3600, True


def whole(x: Numbers) -> list[int]:
    """Numbers as whole ones."""
    return [int(n) for n in np.rint(x)]


def short(y: Numbers) -> list[float]:
    """Numbers to six digits, which no screen shows the difference of."""
    return [float(f"{n:.6g}") for n in y]
