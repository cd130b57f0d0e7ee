"""How a model calls its blocks: keeping their activations for backward, or computing them again."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Run = Callable[..., Tensor]
"""(block, its arguments) -> its result."""


def call(block: nn.Module, *arguments: Tensor) -> Tensor:
    """Calls the block; autograd keeps its activations for backward."""
    return block(*arguments)


def recompute(block: nn.Module, *arguments: Tensor) -> Tensor:
    """Dropout repeats its choices: the generator's state is put back."""
    return checkpoint(block, *arguments, use_reentrant=False)


class Runs(nn.Module):
    """Base of modules that call each of their blocks as `self.run(block, ...)`."""

    run: Run = staticmethod(call)


def checkpoint_in_place(model: nn.Module) -> None:
    """From now on the model keeps no activations within a block, but computes them again.

    Raises ValueError if none of its modules is one that `Runs` blocks.
    """
    found = [module for module in model.modules() if isinstance(module, Runs)]
    if not found:
        raise ValueError(
            f"gradient_checkpointing has no effect: no module of a {type(model).__name__} calls "
            "its blocks through hdit.nn.checkpointing.Runs"
        )
    for module in found:
        module.run = recompute
