"""Images as PNG files, alone or in grids."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from hdit.files import whole

SMALL = 64  # images with a shorter side are enlarged in a grid, by a whole factor


def to_picture(image: Tensor) -> Image.Image:
    """A Pillow image of pixels (c h w) uint8, grey or RGB."""
    pixels = image.cpu().numpy()
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0).copy())


def save_png(image: Tensor, path: Path) -> None:
    """Writes (c h w) uint8 so that no half-written file is ever seen under this name."""
    with whole(path, durable=False) as part:
        to_picture(image).save(part, format="PNG")


def save_grid(images: Tensor, path: Path, columns: int | None = None) -> None:
    """Writes images (n c h w) uint8 row by row, about square if `columns` is not given."""
    save_png(_tiled(images, columns), path)


def to_png(images: Tensor, columns: int | None = None) -> str:
    """The grid of `save_grid` as a PNG file in base64, for a page."""
    content = io.BytesIO()
    to_picture(_tiled(images, columns)).save(content, format="PNG")
    return base64.b64encode(content.getvalue()).decode()


def _tiled(images: Tensor, columns: int | None) -> Tensor:
    n, _, h, w = images.shape
    columns = columns or max(1, round((n * h / w) ** 0.5))
    zoom = max(1, SMALL // min(h, w))
    images = images.repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3)
    images = F.pad(images, (1, 1, 1, 1), value=255)  # a white line of two pixels between images
    rows = -(-n // columns)
    blank = images.new_full((rows * columns - n, *images.shape[1:]), 255)
    tiles = torch.cat([images, blank]).unflatten(0, (rows, columns))  # (rows columns c h w)
    return tiles.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
