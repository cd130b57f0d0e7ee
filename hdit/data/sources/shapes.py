"""Procedural shapes at any resolution: a labelled data set for smoke tests up to megapixels."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import Field

from hdit.bounds import Seed
from hdit.data.augmentation import Augmentation, AugmentationSetting
from hdit.data.source import HELD_OUT, HeldOutSetting, Sample, Size
from hdit.protocols import Spec

CLASSES = ["disc", "ring", "square", "triangle", "cross"]


class ShapesSpec(Spec):
    """One coloured, turned shape on a coloured ground; five classes."""

    kind: Literal["shapes"] = "shapes"
    size: Size = Field((64, 64), description="side in pixels, or [height, width]")
    num_images: int = Field(10_000, gt=0, le=10**8, description="size of the data set")
    seed: Seed = 0
    augment: AugmentationSetting = Field(
        Augmentation(), description="probability of each non-leaking change to an image; 0 for none"
    )
    held_out: HeldOutSetting | None = Field(None, description=HELD_OUT)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        return 3, *self.size

    @property
    def flip(self) -> bool:
        """Whether half of the images are mirrored: never, for they are drawn at random."""
        return False

    def open(self) -> Shapes:
        """Makes the source."""
        return Shapes(self)


class Shapes:
    """Drawn shapes, (3 h w) uint8, by index: each is a function of the seed and its index."""

    def __init__(self, spec: ShapesSpec, indices: np.ndarray | None = None):
        """Of those with `indices` alone, if they are given."""
        self.spec, self.classes = spec, CLASSES
        self.indices = indices

    def __len__(self) -> int:
        return self.spec.num_images if self.indices is None else len(self.indices)

    def content(self, index: int) -> bytes:
        """The pixels of an image. See hdit.data.held_out."""
        return self[index].image.numpy().tobytes()

    def part(self, indices: np.ndarray) -> Shapes:
        """The shapes at these indices alone."""
        return Shapes(self.spec, indices if self.indices is None else self.indices[indices])

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        among_all = index if self.indices is None else int(self.indices[index])
        rng = np.random.default_rng([self.spec.seed, among_all])
        label = int(rng.integers(len(CLASSES)))
        _, h, w = self.spec.shape
        radius = rng.uniform(0.2, 0.4) * min(h, w)
        centre = [rng.uniform(radius, side - radius) for side in (h, w)]
        angle = rng.uniform(0, 2 * np.pi)
        ground, ink = rng.uniform(0, 255, (2, 3))
        y, x = np.ogrid[:h, :w]
        y, x = (y + 0.5 - centre[0]) / radius, (x + 0.5 - centre[1]) / radius
        u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        # the signed distance to the outline, in pixels, makes an edge one pixel wide
        cover = np.clip(0.5 - _distance(CLASSES[label], u, v) * radius, 0, 1)[None]  # (1 h w)
        image = ground[:, None, None] * (1 - cover) + ink[:, None, None] * cover
        return Sample(torch.from_numpy(np.rint(image).astype(np.uint8)), label)


def _distance(name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance, or a close bound, to a shape within the unit circle; negative inside."""

    def box(half_u: float, half_v: float) -> np.ndarray:
        return np.maximum(np.abs(u) - half_u, np.abs(v) - half_v)

    r = np.hypot(u, v)
    if name == "disc":
        return r - 1
    if name == "ring":
        return np.abs(r - 0.75) - 0.25
    if name == "square":
        return box(0.7, 0.7)
    if name == "cross":
        return np.minimum(box(0.95, 0.3), box(0.3, 0.95))
    assert name == "triangle", f"no outline for {name!r}"
    return np.maximum(-v, np.abs(u) * np.sqrt(3) / 2 + v / 2) - 0.5
