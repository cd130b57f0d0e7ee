"""Blocks compiled in place: names of parameters, checkpoints and hooks stay as they are."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

RECOMPILE_LIMIT = 64
"""Graphs of all blocks together: a level at a resolution takes one to sample, one to train and one
to evaluate in training. torch's own limit, 8, would end training at the third resolution."""


def compile_in_place(blocks: Iterable[nn.Module]) -> None:
    """torch.compile of each block as one graph without breaks, specialised to its shapes.

    Blocks of one class and one shape share a graph. A new resolution compiles anew; beyond
    RECOMPILE_LIMIT graphs torch raises an error rather than run slowly in silence. The limit is
    torch's own, of the whole process, and never lowered.
    """
    import torch._dynamo.config as settings  # a second's worth of compiler, so not sooner

    settings.recompile_limit = max(settings.recompile_limit, RECOMPILE_LIMIT)
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False)
