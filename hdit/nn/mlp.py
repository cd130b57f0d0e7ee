"""Feed-forward cores, without norm and residual."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hdit.nn.dropout import Dropout
from hdit_kernels.fused import geglu


class GEGLU(nn.Module):
    """down(a * gelu(g)) with [a | g] = up(x), exact GELU (Shazeer, 2020). (... d) -> (... d)."""

    def __init__(self, width: int, d_ff: int, dropout: float = 0.0):
        super().__init__()
        self.up_proj = nn.Linear(width, 2 * d_ff, bias=False)
        self.dropout = Dropout(dropout)
        self.down_proj = nn.Linear(d_ff, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(... d) -> (... d), with dropout of the hidden features."""
        return self.down_proj(self.dropout(geglu(self.up_proj(x))))


class GELU(nn.Module):
    """down(gelu(up(x))), exact GELU, without biases: GEGLU without its gate. (... d) -> (... d)."""

    def __init__(self, width: int, d_ff: int, dropout: float = 0.0):
        super().__init__()
        self.up_proj = nn.Linear(width, d_ff, bias=False)
        self.dropout = Dropout(dropout)
        self.down_proj = nn.Linear(d_ff, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(... d) -> (... d), with dropout of the hidden features."""
        return self.down_proj(self.dropout(F.gelu(self.up_proj(x))))


class MLP(nn.Module):
    """fc2(gelu(fc1(x))) with the tanh GELU and biases, as in ViT and DiT. (... d) -> (... d)."""

    def __init__(self, width: int, d_ff: int):
        super().__init__()
        self.fc1 = nn.Linear(width, d_ff)
        self.fc2 = nn.Linear(d_ff, width)

    def forward(self, x: Tensor) -> Tensor:
        """(... d) -> (... d)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
