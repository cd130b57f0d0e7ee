"""The memory that an eager training step takes on a CPU or a CUDA device, from the spec alone.

The step is run on tensors without data, and every storage is counted while it lives. The device
need not be there: torch cannot differentiate tensors of CUDA where it is built for the CPU alone,
so that a CUDA device's step is run with the CPU's tensors and CUDA's operators. Those are torch's
own in place of the C++ library's, and fused AdamW.

Neighborhood attention keeps q, k and v, as each fused kernel does; a CUDA kernel's logsumexp is one
number for a head of a token, a percent of those. Left out on either device are the buffers within a
kernel, fragmentation and the allocator's own reserve, and of CUDA what its context takes.
torch.compile, which fuses the operators, keeps less.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hdit.models import BackboneModule, BackboneSpec, build
from hdit.protocols import Cond, DataShape
from hdit_kernels.fused import Formulas


@dataclass(frozen=True)
class Memory:
    """Bytes of a step of AdamW on one device."""

    weights: int  # and buffers
    ema: int  # a second set of those
    optimizer: int  # two moments of each parameter
    gradients: int
    activations: dict[str, int]  # kept from the forward pass for the backward, by part
    update: int  # what AdamW makes while it changes the weights
    peak: int  # of all that, and of what the passes themselves need at their worst


class _Live(TorchDispatchMode):
    """Counts the bytes of storages made within, while they live, and the most there ever were.

    Views of tensors that were there `before` do not count.
    """

    def __init__(self, before: list[Tensor]):
        super().__init__()
        self.bytes = self.peak = 0
        self.known: dict[int, Any] = {id(s): s for s in (t.untyped_storage() for t in before)}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self.known:
            return

        def forget(_: Any) -> None:
            del self.known[key]
            self.bytes -= size

        self.known[key] = weakref.ref(storage, forget)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


class _Kept:
    """Bytes that autograd keeps for the backward pass, by the part of the model that ran.

    Weights, which are there anyhow, do not count.
    """

    def __init__(self, model: BackboneModule):
        self.model, self.part = model, "conditioning and patch in"
        self.bytes: dict[str, int] = {}
        self.seen = {
            id(tensor.untyped_storage()) for tensor in (*model.parameters(), *model.buffers())
        }

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = [
            module.register_forward_pre_hook(self._enter(name))
            for name, module in self.model.stages()
        ]
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
            yield
        for handle in handles:
            handle.remove()

    def _enter(self, name: str) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            self.part = name

        return enter

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in self.seen:
            self.seen.add(id(storage))
            self.bytes[self.part] = self.bytes.get(self.part, 0) + storage.nbytes()
        return tensor


def training_memory(
    spec: BackboneSpec,
    shape: DataShape,
    batch: int,
    *,
    out_channels: int | None = None,
    checkpointing: bool = False,
    autocast: torch.dtype | None = None,
    device: str = "cpu",
) -> Memory:
    """Of an eager step with `batch` images on a device; with `autocast` in that dtype, if given.

    device: "cpu" or "cuda", which need not be there.  Raises ValueError for another.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    with Formulas() if device == "cuda" else FakeTensorMode(), torch.device("cpu"):
        model = build(spec, shape, out_channels).train()
        if checkpointing:
            model.checkpoint_blocks()
        weights = sum(t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers()))
        parameters = sum(p.untyped_storage().nbytes() for p in model.parameters())
        x, c_noise = torch.zeros(batch, *shape.chw), torch.zeros(batch)
        labels = torch.zeros(batch, dtype=torch.long) if shape.num_classes else None
        kept, live = _Kept(model), _Live([*model.parameters(), *model.buffers()])
        with live:
            # The operators that autocast gives fewer bits are the same on both devices.
            with kept.watching(), torch.autocast("cpu", autocast, enabled=autocast is not None):
                out = model(x, c_noise, Cond(labels))
            (out[:, : x.shape[1]].float() - x).square().mean().backward()
        update = _update(model, fused=True if device == "cuda" else None)
    fixed = weights + weights + 2 * parameters  # and the EMA's, and the moments
    peak = fixed + max(live.peak, parameters + update)
    return Memory(weights, weights, 2 * parameters, parameters, kept.bytes, update, peak)


def _update(model: nn.Module, fused: bool | None) -> int:
    """Bytes that AdamW makes and drops in a step, beside its moments; by torch's choice if None."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    optimizer.step()  # makes the moments
    there = [p.grad for p in model.parameters() if p.grad is not None]
    there += [t for state in optimizer.state.values() for t in state.values()]
    with _Live([*model.parameters(), *there]) as live:
        optimizer.step()
    return live.peak
