"""The work that the definition asks for, k*k keys a query, however a backend does it."""

import math


def forward_flops(shape: tuple[int, ...], kernel_size: int) -> int:
    """FLOPs for q (b h w n e): the logits and the weighted sum."""
    return 2 * 2 * math.prod(shape) * kernel_size**2


def backward_flops(shape: tuple[int, ...], kernel_size: int) -> int:
    """FLOPs for q (b h w n e): the logits again, the gradients of weights, q, k and v."""
    return 2 * 5 * math.prod(shape) * kernel_size**2
