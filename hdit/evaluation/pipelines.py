"""How pixels come to the networks: the resizes of clean-fid, TensorFlow 1, DINOv2 and CMMD.

Which one it is moves FID by more than most papers' gains (Parmar et al., 2022).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SIDE = 299  # of what the Inception gets


class Protocol(NamedTuple):
    """Whose way from pixels to the Inception it is; `input` in words, `resize` in one."""

    resize: str
    input: str


PROTOCOLS = {
    "clean": Protocol("clean", "float32 RGB, 299 x 299 by clean-fid's resize from its own size"),
    "adm": Protocol(
        "tensorflow1",
        "float32 RGB, 299 x 299 by TensorFlow 1's bilinear resize from uint8 at its own size",
    ),
    "edm": Protocol(
        "network", "uint8 RGB at its own size, which the network's own code resizes to 299 x 299"
    ),
}
"""clean: Pillow's bicubic filter with antialiasing on floats, not rounded (Parmar et al., 2022).
adm: the graph of ADM's evaluator, bilinear without antialiasing, not rounded, as in Heusel et al.
edm: the code within the TorchScript file, as EDM and StyleGAN call it, meant as the same."""


class CleanResize:
    """(3 h w) uint8 -> (3 299 299) float32 of 0..255: clean-fid's, bicubic with antialiasing."""

    def __call__(self, image: Tensor) -> Tensor:
        channels = [
            np.asarray(Image.fromarray(channel).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
            for channel in image.numpy().astype(np.float32)
        ]
        return torch.from_numpy(np.stack(channels).clip(0, 255))  # bicubic overshoots


class SquareResize:
    """(3 h w) uint8 -> (3 side side) uint8 by Pillow's bicubic filter, rounded.

    `crop` takes the square in the centre first, as CMMD does; else the aspect ratio goes, as in
    the reference implementation of FDD.
    """

    def __init__(self, side: int, crop: bool):
        self.side, self.crop = side, crop

    def __call__(self, image: Tensor) -> Tensor:
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        if self.crop:
            least = min(picture.size)
            left, top = (picture.width - least) // 2, (picture.height - least) // 2
            picture = picture.crop((left, top, left + least, top + least))
        picture = picture.resize((self.side, self.side), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def tensorflow_resize(images: Tensor, side: int = SIDE) -> Tensor:
    """(b c h w) -> (b c side side) float32, as ResizeBilinear of TensorFlow 1 by default.

    Output pixel i lies at i * h / side of the input: corners are not aligned, and pixels' centres
    neither. Neighbours beyond the edge are the edge's; nothing is filtered first, nor rounded.
    """
    x = images.float()
    low, high, weight = _places(x.shape[2], side, x.device)
    rows = torch.lerp(x[:, :, low], x[:, :, high], weight[:, None])  # (b c side w)
    low, high, weight = _places(x.shape[3], side, x.device)
    return torch.lerp(rows[..., low], rows[..., high], weight)


def _places(size: int, side: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each output pixel: both input pixels that it lies between, and how far to the second."""
    at = torch.arange(side, dtype=torch.float32, device=device) * (size / side)
    low = at.long()
    return low, (low + 1).clamp(max=size - 1), at - low
