"""Neighborhood attention from its definition alone, to hold each backend to, and what feeds it."""

import torch


def may_see(length, kernel_size):
    """Which keys each query of one axis sees, from the definition: (length, length) bool."""
    starts = [min(max(i - kernel_size // 2, 0), length - kernel_size) for i in range(length)]
    return torch.tensor([[s <= j < s + kernel_size for j in range(length)] for s in starts])


def dense(q, k, v, kernel_size, scale):
    """Attention of all tokens to all tokens, with the logits outside the windows at -inf."""
    b, h, w, n, e = q.shape
    rows, cols = may_see(h, kernel_size), may_see(w, kernel_size)
    visible = torch.einsum("yi,xj->yxij", rows.int(), cols.int()).bool().reshape(h * w, h * w)
    q, k, v = (t.reshape(b, h * w, n, e) for t in (q, k, v))
    logits = scale * torch.einsum("bqne,bkne->bnqk", q, k)
    weights = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("bnqk,bkne->bqne", weights, v).reshape(b, h, w, n, e)


def draw(shape, seed, dtype=torch.float64, layout="own"):
    """Normal q, k and v (b h w n e): each its own tensor, or views of one that holds all three."""
    b, h, w, n, e = shape
    rng = torch.Generator().manual_seed(seed)
    if layout == "qkv":  # as the projection of the model leaves them
        return torch.randn(b, h, w, 3, n, e, generator=rng).to(dtype).unbind(3)
    if layout == "heads_first":
        return torch.randn(3, b, n, h, w, e, generator=rng).to(dtype).movedim(2, -2).unbind(0)
    return torch.randn(3, *shape, generator=rng).to(dtype).unbind(0)


def value_and_gradients(f, qkv, out_grad):
    """f(q, k, v) and the gradients of sum(out_grad * f) with respect to q, k and v."""
    qkv = [t.detach().requires_grad_() for t in qkv]
    out = f(*qkv)
    return out.detach(), *torch.autograd.grad(out, qkv, out_grad)
