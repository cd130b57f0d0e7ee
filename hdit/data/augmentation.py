"""Augmentation that does not leak into what is sampled (Karras et al., 2022, appendix F.2).

An image is mirrored, scaled, turned, stretched and shifted at random, and the network is told how:
it learns from all of that, and samples what nothing was done to. The choices are k-diffusion's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BeforeValidator, Field, PlainSerializer
from torch import Tensor

from hdit import randomness
from hdit.device import to_device
from hdit.protocols import Spec


class Augmentation(Spec):
    """Warps images at random: 0.12 is what Karras et al. took for FFHQ, and none is done at 0.

    Above 0 half of the images are mirrored, whatever the probability of all else.
    """

    probability: float = Field(
        0.0, ge=0, le=1, description="of each change to an image; 0 is no augmentation"
    )

    def __call__(
        self, images: Tensor, seed: int, counters: np.ndarray, compiled: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Augments images (b c h w) of 0 to 255 -> (b c h w) float32 of 0 to 255, Cond.aug (b 9).

        What is done to an image follows from `seed` and its counter, in `counters` (b,), alone.
        With `compiled` torch makes one kernel of the warp, for each shape.
        """
        a = draw(seed, counters, self.probability)
        matrices, conditions = transform(a, *images.shape[-2:])
        both = torch.cat([_inverse(matrices).flatten(1), conditions.float()], dim=1)
        inverse, conditions = to_device(both, images.device).split([9, 9], dim=1)
        move = _compiled_resample() if compiled else resample
        return move(images, inverse.unflatten(1, (3, 3))), conditions


def _of_number(setting: Any) -> Any:
    whole = isinstance(setting, dict | Augmentation)
    return setting if whole else {"probability": setting}


def _to_number(augmentation: Augmentation) -> float:
    return augmentation.probability


AugmentationSetting = Annotated[
    Augmentation, BeforeValidator(_of_number), PlainSerializer(_to_number, return_type=float)
]
"""A setting that reads and writes a probability, and holds an Augmentation."""


# ---- what happens to an image --------------------------------------------------------------------


def draw(seed: int, counters: np.ndarray, probability: float) -> Tensor:
    """(b 8) float64: a0 to a7 of Karras et al. for each counter; 0 is nothing done.

    The mirror image is drawn as without augmentation.
    """
    if probability == 0:
        return torch.zeros(len(counters), 8, dtype=torch.float64)

    def uniform(purpose: str) -> Tensor:
        return randomness.uniform(seed, purpose, counters)

    def do(what: str) -> Tensor:
        return (uniform(f"augmentation, whether to {what}") < probability).double()

    keys = randomness.keys(seed, "augmentation", counters, torch.device("cpu"))
    size, ratio, x, y = randomness.normal(keys, (4,)).double().unbind(1)
    mirror = (uniform("flip") < 0.5).double()
    upend = (uniform("augmentation, upside down") < 0.5).double()
    angle, axis = (
        math.pi * (2 * uniform(f"augmentation, {what}") - 1) for what in ("angle", "axis")
    )
    stretch, shift = do("stretch"), do("shift")
    return torch.stack(
        [
            mirror,
            do("flip") * upend,
            do("scale") * size,
            do("rotate") * angle,
            stretch * axis,
            stretch * ratio,
            shift * x,
            shift * y,
        ],
        dim=1,
    )


def transform(a: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """a0 to a7 (b 8) -> matrices (b 3 3) and conditions (b 9), in the dtype of `a`.

    A matrix takes (x, y, 1), in pixels from the centre of the upper left one, to where it goes; x
    runs to the right and y down. In an image that is not square the shift along x is in eighths of
    the height, and that along y in eighths of the width: so k-diffusion has it.
    """
    a0, a1, a2, a3, a4, a5, a6, a7 = a.unbind(1)
    one = torch.ones_like(a0)
    x, y = (width / 2 - 0.5) * one, (height / 2 - 0.5) * one  # of the image's centre
    size, ratio = 2 ** (0.2 * a2), 2 ** (0.2 * a5)
    matrices = (
        _translation(x, y)
        @ _scaling(1 - 2 * a0, 1 - 2 * a1)
        @ _scaling(size, size)
        @ _rotation(-a3)
        @ _rotation(a4)
        @ _scaling(ratio, 1 / ratio)
        @ _rotation(-a4)
        @ _translation(a6 * height / 8, a7 * width / 8)
        @ _translation(-x, -y)
    )
    turn = a3.cos() - 1, a3.sin()
    stretch = a5 * a4.cos(), a5 * a4.sin()
    return matrices, torch.stack([a0, a1, a2, *turn, *stretch, a6, a7], dim=1)


def _translation(x: Tensor, y: Tensor) -> Tensor:
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    return _matrix([one, zero, x], [zero, one, y], [zero, zero, one])


def _scaling(x: Tensor, y: Tensor) -> Tensor:
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    return _matrix([x, zero, zero], [zero, y, zero], [zero, zero, one])


def _rotation(angle: Tensor) -> Tensor:
    one, zero = torch.ones_like(angle), torch.zeros_like(angle)
    cos, sin = angle.cos(), angle.sin()
    return _matrix([cos, -sin, zero], [sin, cos, zero], [zero, zero, one])


def _matrix(*rows: list[Tensor]) -> Tensor:
    """Nine numbers (b,) -> (b 3 3)."""
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


# ---- the warp ------------------------------------------------------------------------------------


def warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Moves the pixels of each image (b c h w) by its matrix (b 3 3) -> (b c h w) float32.

    Values keep their scale, but for the overshoot of the interpolation. That is cubic convolution
    (Keys, 1981), on the image mirrored about its outermost pixels; nothing is smoothed where the
    image shrinks. All as scikit-image's warp of order 3 with mode "reflect". The identity leaves
    an image as it was, bit for bit.
    """
    return resample(images, to_device(_inverse(matrices), images.device))


def _inverse(matrices: Tensor) -> Tensor:
    """(b 3 3) -> (b 3 3) float32: where each place of the result comes from."""
    return torch.linalg.inv(matrices).float()


def resample(images: Tensor, inverse: Tensor) -> Tensor:
    """`warp` by the inverses (b 3 3) float32 of its matrices, on the images' device."""
    h, w = images.shape[-2:]
    pixels = images.float().flatten(2)  # (b c hw)
    m = inverse[..., None, None]  # (b 3 3 1 1)
    x = torch.arange(w, dtype=torch.float32, device=images.device)  # (w)
    y = torch.arange(h, dtype=torch.float32, device=images.device)[:, None]  # (h 1)
    source_x, source_y = (
        (m[:, i, 0] * x + m[:, i, 1] * y + m[:, i, 2]).flatten(1) for i in (0, 1)
    )  # (b hw)
    columns, rows = _taps(source_x, w), _taps(source_y, h)
    warped = torch.zeros_like(pixels)
    for row, row_weight in zip(*rows, strict=True):
        for column, column_weight in zip(*columns, strict=True):
            index, weight = row * w + column, row_weight * column_weight  # (b hw)
            tap = pixels.gather(2, index[:, None].expand_as(pixels))  # (b c hw)
            warped.addcmul_(tap, weight[:, None])
    return warped.unflatten(2, (h, w))


@lru_cache(maxsize=1)
def _compiled_resample() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(resample, fullgraph=True, dynamic=False)


def _taps(position: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Indices and weights (4 b hw) of the four pixels around a position (b hw) along one axis."""
    first = position.floor()
    offset = torch.arange(-1, 3, device=position.device)[:, None, None]
    return _mirrored(first.long() + offset, size), _cubic(position - first)  # (4 b hw)


def _cubic(t: Tensor) -> Tensor:
    """Weights of the samples at -1, 0, 1 and 2 for a position t in 0..1 (Keys, 1981, a = -1/2)."""
    return torch.stack(
        [
            ((-0.5 * t + 1) * t - 0.5) * t,
            (1.5 * t - 2.5) * t * t + 1,
            ((-1.5 * t + 2) * t + 0.5) * t,
            (0.5 * t - 0.5) * t * t,
        ]
    )


def _mirrored(index: Tensor, size: int) -> Tensor:
    """... 2 1 | 0 1 2 ... n-1 | n-2 n-3 ...: numpy's "reflect", over and over."""
    last = size - 1
    return last - (index % max(2 * last, 1) - last).abs()
