"""One number for each image, over its values."""

from __future__ import annotations

from torch import Tensor


def per_image(scale: Tensor, like: Tensor) -> Tensor:
    """(b,) -> (b 1 1 1) in the dtype of `like`."""
    return scale.to(like.dtype)[:, None, None, None]
