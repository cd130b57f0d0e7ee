"""The memory that an eager training step takes on a CPU or a CUDA device, from the spec alone.

The step is run on tensors without data, and every storage is counted while it lives. The device
need not be there: torch cannot differentiate tensors of CUDA where it is built for the CPU alone,
so that a CUDA device's step is run with the CPU's tensors and CUDA's operators. Those are torch's
own in place of the C++ library's, and fused AdamW.

Neighborhood attention keeps q, k and v, as each fused kernel does; a CUDA kernel's logsumexp is one
number for a head of a token, a percent of those. Left out on either device are the buffers within a
kernel, fragmentation and the allocator's own reserve, and of CUDA what its context takes.
torch.compile, which fuses the operators, keeps less.

Several processes either have the whole model each (DDP), with buckets as large as its gradient; or
each has a shard of every weight, gradient, moment and average (FSDP2). A sharded model gathers its
blocks in turn, and of those the gathered weights and gradients of the largest are counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
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
    """Bytes of a step of AdamW in one process, on its device."""

    weights: int  # and buffers
    ema: int  # as much for each average
    optimizer: int  # two moments of each parameter
    gradients: int
    activations: dict[str, int]  # kept from the forward pass for the backward, by part
    update: int  # what AdamW makes while it changes the weights
    peak: int  # of all that, and of what the passes themselves need at their worst
    buckets: int = 0  # in which DDP reduces the gradient
    gathered: int = 0  # whole weights and gradients of blocks of a sharded model, at most
    unreduced: int = 0  # the whole gradient that a sharded model keeps between parts of a batch


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
    parts: int = 1,
    averages: int = 1,
    processes: int = 1,
    shards: int = 1,
) -> Memory:
    """Of an eager step with `batch` images at once; with `autocast` in that dtype, if given.

    device: "cpu" or "cuda", which need not be there.  Raises ValueError for another.  `parts` is
    the accumulation steps of a batch, `averages` the averages of the weights that are kept. The
    model is whole in each of `processes`, or one of `shards` if there are several.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    cast = autocast if shards > 1 else None
    with Formulas() if device == "cuda" else FakeTensorMode(), torch.device("cpu"):
        model = build(spec, shape, out_channels).train()
        if checkpointing:
            model.checkpoint_blocks()
        state = _State.of(model)
        if cast:  # as FSDP gathers them, so that autocast has nothing to cast
            for block in model.blocks:
                _cast(block, cast)
        kept, step = _Kept(model), _Step(model, shape, batch, autocast)
        with kept.watching():
            passes = step.peak()
        # With the gradients there, as in a later part of a batch, and apart from them.
        later = step.peak() if parts > 1 or shards > 1 else 0
        update = 0 if shards > 1 else _update(model, fused=True if device == "cuda" else None)
    weights, gradients = state.weights(shards), state.parameters // shards
    fixed = weights * (1 + averages) + 2 * gradients
    buckets = state.parameters if processes > 1 and shards == 1 else 0
    gathered = state.gathered(2 if cast else 4) if shards > 1 else 0
    unreduced = state.parameters if shards > 1 and parts > 1 else 0
    if shards > 1:
        most = gradients + unreduced + later + gathered
    elif parts > 1:
        most = gradients + max(later, update)
    else:
        most = max(passes, gradients + update)
    return Memory(
        weights,
        weights * averages,
        2 * gradients,
        gradients,
        kept.bytes,
        update,
        fixed + buckets + most,
        buckets,
        gathered,
        unreduced,
    )


@dataclass(frozen=True)
class _State:
    """Bytes of a model's tensors in float32: of all parameters, of those without a block, ..."""

    parameters: int
    buffers: int
    root: int  # of parameters in no block
    block: int  # of the largest block's parameters

    @classmethod
    def of(cls, model: BackboneModule) -> _State:
        blocks = [_bytes(block.parameters()) for block in model.blocks]
        whole = _bytes(model.parameters())
        return cls(whole, _bytes(model.buffers()), whole - sum(blocks), max(blocks, default=0))

    def weights(self, shards: int) -> int:
        """Of a process: buffers are never sharded."""
        return self.parameters // shards + self.buffers

    def gathered(self, size: int) -> int:
        """What FSDP2 holds at most of whole weights, `size` bytes each in a block.

        What is in no block stays gathered, with its gradient, for a whole pass. Of the blocks, one
        runs while the next is gathered, which takes a buffer beside its weights; and the gradient
        of one is copied to float32 to be reduced.
        """
        block = self.block // 4
        return 2 * self.root + 3 * size * block + (size + 4) * block


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors)


def _cast(block: nn.Module, dtype: torch.dtype) -> None:
    """Gives it parameters of this dtype; `block.to` cannot change those of FakeTensorMode."""
    for module in block.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().to(dtype)))


class _Step:
    """Forward and backward passes with some images."""

    def __init__(
        self, model: BackboneModule, shape: DataShape, batch: int, autocast: torch.dtype | None
    ):
        self.model, self.autocast = model, autocast
        self.x, self.c_noise = torch.zeros(batch, *shape.chw), torch.zeros(batch)
        labels = torch.zeros(batch, dtype=torch.long) if shape.num_classes else None
        self.cond = Cond(labels)

    def peak(self) -> int:
        """Most bytes of what the passes make, beside the model and what they were given."""
        there = [*self.model.parameters(), *self.model.buffers(), self.x, self.c_noise]
        there += [p.grad for p in self.model.parameters() if p.grad is not None]
        with _Live(there) as live:
            # The operators that autocast gives fewer bits are the same on both devices.
            with torch.autocast("cpu", self.autocast, enabled=self.autocast is not None):
                out = self.model(self.x, self.c_noise, self.cond)
            (out[:, : self.x.shape[1]].float() - self.x).square().mean().backward()
        return live.peak


def _update(model: nn.Module, fused: bool | None) -> int:
    """Bytes that AdamW makes and drops in a step, beside its moments; by torch's choice if None."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    optimizer.step()  # makes the moments
    there = [p.grad for p in model.parameters() if p.grad is not None]
    there += [t for state in optimizer.state.values() for t in state.values()]
    with _Live([*model.parameters(), *there]) as live:
        optimizer.step()
    return live.peak
