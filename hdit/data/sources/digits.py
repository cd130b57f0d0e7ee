"""The embedded real data set: 1,797 handwritten digits of 8x8 pixels (licence in digits.md)."""

from __future__ import annotations

from copy import copy
from importlib.resources import as_file, files
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from hdit.arrays import read_npz
from hdit.data.augmentation import Augmentation, AugmentationSetting
from hdit.data.source import HELD_OUT, HeldOutSetting, Sample
from hdit.protocols import Spec


class DigitsSpec(Spec):
    """UCI handwritten digits, grey, 10 classes. Each sixth image is held out as "test"."""

    kind: Literal["digits"] = "digits"
    split: Literal["train", "test", "all"] = Field("train", description="which images")
    augment: AugmentationSetting = Field(
        Augmentation(), description="probability of each non-leaking change to an image; 0 for none"
    )
    held_out: HeldOutSetting | None = Field(None, description=HELD_OUT)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        return 1, 8, 8

    @property
    def flip(self) -> bool:
        """Whether half of the images are mirrored: never, which would change some classes."""
        return False

    def open(self) -> Digits:
        """Makes the source."""
        return Digits(self.split)


class Digits:
    """The digits of a split, (1 8 8) uint8, by index."""

    def __init__(self, split: str):
        with as_file(files("hdit.data.sources") / "digits.npz") as path:
            arrays = read_npz(path, ("images", "labels")).arrays
        images, labels = arrays["images"], arrays["labels"]
        test = np.arange(len(images)) % 6 == 5
        keep = {"train": ~test, "test": test, "all": np.ones_like(test)}[split]
        self.images = torch.from_numpy(images[keep])[:, None]  # (n 1 8 8) uint8
        self.labels = torch.from_numpy(labels[keep].astype(np.int64))
        self.classes = [str(digit) for digit in range(10)]

    def __len__(self) -> int:
        return len(self.images)

    def content(self, index: int) -> bytes:
        """The pixels of an image. See hdit.data.held_out."""
        return self.images[index].numpy().tobytes()

    def part(self, indices: np.ndarray) -> Digits:
        """The digits at these indices alone."""
        chosen = copy(self)
        chosen.images, chosen.labels = self.images[indices], self.labels[indices]
        return chosen

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.images[index], int(self.labels[index]))
