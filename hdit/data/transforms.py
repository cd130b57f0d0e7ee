"""Crops and modes: an image of any size and mode becomes the pixels of a training image."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from hdit.data.source import Chance

MODES = {1: "L", 3: "RGB"}

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by EXIF's orientation."""


def to_mode(image: Image.Image, channels: int, background: str = "white") -> Image.Image:
    """Upright, without alpha (what is transparent lies on `background`), grey or RGB, 8 bits each.

    Raises ValueError for an image of 32-bit numbers, whose white has no fixed value.
    """
    image.load()  # or a damaged image would be taken for damaged metadata
    if (turn := UPRIGHT.get(_orientation(image))) is not None:
        image = image.transpose(turn)
    is_pgm = image.mode == "I" and image.format == "PPM"  # of which white is 65535, too
    if image.mode.startswith("I;16") or is_pgm:  # convert() would clip at 255
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode!r} have no fixed range; save 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")  # there is no way from every mode to grey, LAB for one
    return image if image.mode == MODES[channels] else image.convert(MODES[channels])


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation; 1, which is upright, where the metadata cannot be read."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except MemoryError:
        raise
    except Exception:  # Pillow's parsers raise many kinds on damaged metadata; the pixels are good
        return 1
    return found if isinstance(found, int) else 1


def center_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """The centre crop of ADM (Dhariwal & Nichol, 2021), here for any aspect ratio.

    Halves with a box filter while the image stays larger than twice the target, resizes with a
    bicubic one until the target just fits, then crops its centre.
    """
    image = _fit(image, height, width)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def random_crop(
    image: Image.Image, height: int, width: int, min_crop: float, chance: Chance
) -> Image.Image:
    """The random crop of ADM (Dhariwal & Nichol, 2021), here for any aspect ratio.

    Its window takes at least `min_crop` of what the centre crop takes, along each side, and lies
    anywhere. `chance` holds three numbers in [0, 1): the size, the top and the left.
    """
    fit = height + int(chance[0] * (math.ceil(height / min_crop) - height + 1))
    image = _fit(image, fit, max(width, round(fit * width / height)))
    top = int(chance[1] * (image.height - height + 1))
    left = int(chance[2] * (image.width - width + 1))
    return image.crop((left, top, left + width, top + height))


def _fit(image: Image.Image, height: int, width: int) -> Image.Image:
    """Halved with a box filter, then resized with a bicubic one, until the target just fits."""
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    return image.resize(size, Image.Resampling.BICUBIC)


def shorter_side_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """The centre crop of k-diffusion (torchvision's Resize and CenterCrop), for any aspect ratio.

    Resizes once with a bicubic filter until the target just fits, then crops its centre; the longer
    side is rounded down and an odd margin to even, as torchvision does.
    """
    if height * image.width >= width * image.height:
        size = max(width, int(height * image.width / image.height)), height
    else:
        size = width, max(height, int(width * image.height / image.width))
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def to_tensor(image: Image.Image) -> Tensor:
    """(c h w) uint8."""
    pixels = np.array(image)
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())


def to_image(pixels: np.ndarray) -> Image.Image:
    """(h w c) uint8 -> an image that is grey, grey with alpha, RGB or RGBA, by c from 1 to 4."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or not 1 <= pixels.shape[2] <= 4:
        shape = " x ".join(map(str, pixels.shape))
        raise ValueError(f"must be uint8 with 1 to 4 channels, got {pixels.dtype} of {shape}")
    if not pixels.size:
        raise ValueError(f"has {pixels.shape[0]} x {pixels.shape[1]} pixels")
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))
