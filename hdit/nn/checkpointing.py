"""How a model calls its blocks: keeping their activations for backward, or computing them again."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Run = Callable[..., Tensor]
"""(block, its arguments) -> its result."""


def call(block: nn.Module, *arguments: Tensor) -> Tensor:
    return block(*arguments)


def recompute(block: nn.Module, *arguments: Tensor) -> Tensor:
    """Dropout repeats its choices: the generator's state is put back."""
    return checkpoint(block, *arguments, use_reentrant=False)
