"""Dropout, as one pass on a CPU."""

from __future__ import annotations

from torch import Tensor, nn

from hdit_kernels import fused


class Dropout(nn.Module):
    """Of any shape; the identity in eval mode, or where p is 0."""

    def __init__(self, p: float):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"the probability of dropout must be in [0, 1), got {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Drops each element with probability p: (...) -> (...)."""
        return fused.dropout(x, self.p) if self.training and self.p else x
