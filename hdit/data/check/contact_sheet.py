"""The contact sheet: a few images of a data set, as training sees them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hdit.data.images import Images, pixels_of
from hdit.data.transforms import to_image, to_tensor

SHEET_IMAGES = 100
SHEET_SIDE = 256  # a larger image is made smaller on the sheet


def contact_sheet(source: Images, indices: list[int]) -> Tensor:
    """Reads images as they come out of the crop -> (n c h w) uint8, at most SHEET_SIDE in size."""
    factor = -(-max(source.spec.size) // SHEET_SIDE)
    tiles = []
    for i in indices:
        with source.entries.load(i)[0] as image:
            pixels = pixels_of(image, source.spec)
        small = to_image(pixels.permute(1, 2, 0).numpy()).reduce(factor)
        tiles.append(to_tensor(small))
    return torch.stack(tiles)


def spread_over_classes(labels: np.ndarray, number: int = SHEET_IMAGES) -> np.ndarray:
    """Picks up to `number` places in `labels` (n,), evenly over classes and within each of them."""
    order = np.argsort(labels, kind="stable")
    classes = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    classes = [classes[i] for i in _spaced(len(classes), number)]
    quotas = [0] * len(classes)
    left = min(number, sum(map(len, classes)))
    while left:
        for i, members in enumerate(classes):
            take = left > 0 and quotas[i] < len(members)
            quotas[i] += take
            left -= take
    chosen = [c[_spaced(len(c), quota)] for c, quota in zip(classes, quotas, strict=True)]
    return np.concatenate(chosen)


def _spaced(length: int, number: int) -> np.ndarray:
    """`number` places out of `length`, or all, each in the middle of its stretch."""
    number = min(length, number)
    return (2 * np.arange(number) + 1) * length // (2 * max(1, number))
