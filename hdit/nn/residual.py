"""How a branch joins the tokens that it was made of."""

from __future__ import annotations

from torch import Tensor, nn

from hdit_kernels.fused import gated_residual

__all__ = ["GatedResidual", "Residual", "gated_residual"]


class Residual(nn.Module):
    """x + branch."""

    def forward(self, x: Tensor, branch: Tensor, cond: Tensor) -> Tensor:
        """x and branch (b h w d) -> (b h w d); cond has no effect."""
        return x + branch


class GatedResidual(nn.Module):
    """x + gate * branch, with the gate Linear(cond) of DiT (Peebles & Xie, 2023). cond (b m)."""

    def __init__(self, width: int, cond_width: int):
        super().__init__()
        self.gate = nn.Linear(cond_width, width, bias=False)

    def forward(self, x: Tensor, branch: Tensor, cond: Tensor) -> Tensor:
        """x and branch (b h w d), cond (b m) -> (b h w d)."""
        return gated_residual(x, branch, self.gate(cond))
