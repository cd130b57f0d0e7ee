"""The memory that a training step takes, from the spec alone.

The step is run on tensors without data, by the rules that a device's kernels go by, and every
storage is counted while it lives. Fragmentation and the allocator's own reserve come on top.
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

from hdit.models import DiT, HDiT, build
from hdit.models.dit import DiTSpec
from hdit.models.hdit import HDiTSpec
from hdit.protocols import Cond, Signal


@dataclass(frozen=True)
class Memory:
    """Bytes of a step of AdamW on one device."""

    weights: int  # and buffers
    ema: int  # a second set of those
    optimizer: int  # two moments of each parameter
    gradients: int
    activations: dict[str, int]  # kept from the forward pass for the backward, by part
    peak: int  # of all that, and of what the pass itself needs at its worst


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

    def __init__(self, model: HDiT | DiT):
        self.model, self.part = model, "conditioning and patch in"
        self.bytes: dict[str, int] = {}
        self.seen = {
            id(tensor.untyped_storage()) for tensor in (*model.parameters(), *model.buffers())
        }

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = [
            module.register_forward_pre_hook(self._enter(name))
            for name, module in _parts(self.model)
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


def _parts(model: HDiT | DiT) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of what runs in turn; both sides of an HDiT's level have one name."""
    if isinstance(model, HDiT):
        for levels in (model.down_levels, model.up_levels):
            for i, level in enumerate(levels):
                yield f"level {i}", level
        yield f"level {len(model.down_levels)}", model.mid_level
        yield "patch out", model.patch_out
    else:
        for block in model.blocks:
            yield "blocks", block
        yield "patch out", model.final_layer


def training_memory(
    spec: HDiTSpec | DiTSpec,
    signal: Signal,
    batch: int,
    *,
    out_channels: int | None = None,
    checkpointing: bool = False,
    autocast: torch.dtype | None = None,
    device: str = "cpu",
) -> Memory:
    """Of a step with `batch` images on a device; with `autocast` in that dtype, if given."""
    with FakeTensorMode(), torch.device(device):
        model = build(spec, signal, out_channels).train()
        if checkpointing:
            model.checkpoint_blocks()
        weights = sum(t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers()))
        parameters = sum(p.untyped_storage().nbytes() for p in model.parameters())
        x, c_noise = torch.zeros(batch, *signal.shape), torch.zeros(batch)
        labels = torch.zeros(batch, dtype=torch.long) if signal.num_classes else None
        kept, live = _Kept(model), _Live([*model.parameters(), *model.buffers()])
        with live:
            with kept.watching(), torch.autocast(device, autocast, enabled=autocast is not None):
                out = model(x, c_noise, Cond(labels))
            (out[:, : x.shape[1]].float() - x).square().mean().backward()
    fixed = weights + weights + 2 * parameters  # and the EMA's, and the moments
    return Memory(weights, weights, 2 * parameters, parameters, kept.bytes, fixed + live.peak)
