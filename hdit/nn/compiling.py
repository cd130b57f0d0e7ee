"""Blocks compiled in place: names of parameters, checkpoints and hooks stay as they are."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

RECOMPILE_LIMIT = 64
"""Graphs of all blocks together: a level at a resolution takes one to sample, one to train and one
to evaluate in training. torch's own limit, 8, would end training at the third resolution."""

ENOUGH_CALLS = 1000
"""Calls of a network that repay its compilation on CUDA. It takes a minute or two, and is repaid if
a call gains a tenth of a second. Nothing of this has been measured on a GPU yet."""


def compiles(setting: Literal["auto"] | bool, device: torch.device, calls: int) -> bool:
    """What a setting comes to for so many calls of the network in all.

    "auto" is a function of device and calls alone, never a timing, so that a rerun does the same.
    On a CPU it is off: there the elementwise parts of a block are fused already.
    """
    if setting == "auto":
        return device.type == "cuda" and calls >= ENOUGH_CALLS
    return setting


def compile_in_place(blocks: Iterable[nn.Module]) -> None:
    """torch.compile of each block as one graph without breaks, specialised to its shapes.

    Blocks of one class and one shape share a graph. A new resolution compiles anew; beyond
    RECOMPILE_LIMIT graphs torch raises an error rather than run slowly in silence. The limit is
    torch's own, of the whole process, and never lowered.
    """
    import torch._dynamo.config as settings  # a second's worth of compiler, so not sooner

    # inductor would advise TF32 to whoever trains in fp32 or bf16, which decide it otherwise
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)
    settings.recompile_limit = max(settings.recompile_limit, RECOMPILE_LIMIT)
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False)
