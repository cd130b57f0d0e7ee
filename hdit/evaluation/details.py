"""Beyond a number: the nearest training images of samples, and which classes are worst."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hdit.evaluation.discrepancy import discrepancy
from hdit.evaluation.distances import polynomial_kernel
from hdit.evaluation.tiles import nearest

CLOSEST = 16  # pairs that a card lists
LEAST = 3  # images of a class, of each set
MOST = 1000  # of a class, as of KID's subsets


class Neighbours(NamedTuple):
    """How close samples are to reference images, for a card; `pairs` are the closest ones.

    A pair is (row of A, row of B, distance, ratio): the ratio is that of its distance to the one
    from the reference image to its own nearest other. `authentic` is the share of samples with a
    ratio above 1, which Alaa et al. (2022) call authentic; of two sets of one distribution it is
    about a half, and of copies 0.
    """

    authentic: float
    copies: int
    pairs: list[tuple[int, int, float, float]]


def neighbours(x: Tensor, y: Tensor) -> Neighbours:
    """The nearest rows of y (m d), m of 2 or more, to samples x (n d)."""
    found = nearest(x, y)
    own = nearest(y, None).squared[:, 0]
    squared, indices = found.squared[:, 0], found.indices[:, 0]
    ratio = (squared / own[indices]).sqrt().nan_to_num(nan=0.0, posinf=torch.inf)
    order = ratio.argsort(stable=True)[:CLOSEST].tolist()
    pairs = [
        (i, int(indices[i]), squared[i].sqrt().item(), min(ratio[i].item(), 1e9)) for i in order
    ]
    scale = y.double().var(0).sum()  # rounding leaves copies a distance of about 1e-15 of it
    copies = int((squared <= 1e-12 * scale).sum())
    return Neighbours((ratio > 1).double().mean().item(), copies, pairs)


class ClassDistance(NamedTuple):
    """KID of the images of one class of both sets, unbiased however few they are."""

    name: str
    a: int
    b: int
    kid: float
    error: float


def by_class(
    x: Tensor, y: Tensor, names_x: list[str | None], names_y: list[str | None]
) -> list[ClassDistance]:
    """KID of each class that both sets have at least 3 images of, the worst first.

    x (n d), y (m d), each with the name of its class or None. Of a class the first 1000 rows count.
    """
    found = []
    for name in sorted({*names_x} & {*names_y} - {None}, key=str):
        assert name is not None, "left out above"
        one, other = (
            rows[[i for i, one in enumerate(names) if one == name][:MOST]]
            for rows, names in ((x, names_x), (y, names_y))
        )
        if min(len(one), len(other)) >= LEAST:
            kid = discrepancy(one, other, polynomial_kernel)
            found.append(ClassDistance(name, len(one), len(other), kid.squared, kid.error))
    return sorted(found, key=lambda one: -one.kid)


def balance(names: list[str | None]) -> dict[str, Any] | None:
    """How many images the classes have, for a card; None where some are of no class."""
    if not names or None in names:
        return None
    counts = sorted(Counter(names).values())
    return {"classes": len(counts), "fewest": counts[0], "most": counts[-1]}
