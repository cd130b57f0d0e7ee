"""One model on several processes: whole on each of them (DDP), or sharded over them (FSDP2).

Either way each process sees its part of a batch, and the gradient is the mean over all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from typing import Any, Protocol

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from hdit.device import Precision
from hdit.errors import UserError
from hdit.models import BackboneModule
from hdit.protocols import Backbone
from hdit.runs.sharded import local


class Parallel(Protocol):
    """How the processes of a run share a model."""

    sharded: bool  # whether each process holds a part of each parameter

    def place(self, backbone: Backbone, average_of: Backbone | None = None) -> None:
        """Puts a backbone that is the same in every process into place, before its first step.

        One that `outline` made takes the values of the one in place that it is to be an average of.
        """

    def trained(self, backbone: Backbone) -> nn.Module:
        """The network to call for a loss: its backward averages the gradient."""

    def keeping_gradients(self, network: nn.Module) -> AbstractContextManager[None]:
        """While it lasts, gradients are summed up in each process and not yet averaged."""

    def reset(self, network: nn.Module) -> None:
        """Puts a network in order again after a forward pass that failed in all processes."""


class Replicated:
    """Each process has the whole model."""

    sharded = False

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator

    def place(self, backbone: Backbone, average_of: Backbone | None = None) -> None:
        """Moves it to this process's device. See Parallel."""
        assert isinstance(backbone, nn.Module), "a backbone is a module"
        if average_of is None:
            backbone.to(self.accelerator.device)
        else:
            _fill(backbone, average_of, self.accelerator.device)

    def trained(self, backbone: Backbone) -> nn.Module:
        """The backbone itself, or with several processes torch's DistributedDataParallel of it."""
        assert isinstance(backbone, nn.Module), "a backbone is a module"
        network: nn.Module = self.accelerator.prepare_model(backbone)
        return network

    @contextmanager
    def keeping_gradients(self, network: nn.Module) -> Iterator[None]:
        """See Parallel."""
        with self.accelerator.no_sync(network):
            yield

    def reset(self, network: nn.Module) -> None:
        """See Parallel."""


class Sharded:
    """Each process has a part of every parameter, gradient and optimizer state.

    The blocks are gathered one after the other, and freed after use. Parameters are float32, and
    what is reduced too; with bf16, blocks are gathered in bf16. `replicate` > 1 shards within
    groups of processes, and averages the gradient over groups (HSDP).
    """

    sharded = True

    def __init__(self, device: torch.device, precision: Precision, replicate: int = 1):
        """Raises UserError if `replicate` does not divide the number of processes."""
        processes = dist.get_world_size() if dist.is_initialized() else 1
        if processes % replicate:
            raise UserError(
                f"training.replicate: must divide the number of processes ({processes}), "
                f"got {replicate}"
            )
        self.mesh = _mesh(device, processes, replicate)
        self.in_blocks = MixedPrecisionPolicy()
        if precision == "bf16":
            self.in_blocks = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )

    def place(self, backbone: Backbone, average_of: Backbone | None = None) -> None:
        """Shards it in place; names and shapes of its parameters stay. See Parallel.

        An average is gathered in float32, as it may be sampled in any precision.
        """
        assert isinstance(backbone, nn.Module), "a backbone is a module"
        policy = self.in_blocks if average_of is None else MixedPrecisionPolicy()
        # FSDP warns of an output that is a view, as an in-place change of it would go wrong.
        backbone.register_forward_hook(lambda module, inputs, output: output.clone())
        for block in backbone.blocks:
            fully_shard(block, mesh=self.mesh, mp_policy=policy)
        # By default what no block has stays gathered after a forward pass, for the backward pass,
        # which there is none of where an EMA is sampled.
        fully_shard(backbone, mesh=self.mesh, reshard_after_forward=True)
        if average_of is not None:
            _fill(backbone, average_of, torch.device(self.mesh.device_type))

    def trained(self, backbone: Backbone) -> nn.Module:
        """The backbone itself: its hooks gather and reduce."""
        assert isinstance(backbone, nn.Module), "a backbone is a module"
        return backbone

    @contextmanager
    def keeping_gradients(self, network: nn.Module) -> Iterator[None]:
        """See Parallel. They are whole then in each process: memory for one model more."""
        assert isinstance(network, FSDPModule), "it must be in place"
        network.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            network.set_requires_gradient_sync(True)

    def reset(self, network: nn.Module) -> None:
        """See Parallel. What is gathered of a block would stay so, in place of its shards."""
        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def outline(backbone: BackboneModule) -> BackboneModule:
    """A copy to be an average of the backbone's weights: it takes no memory until it is placed."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.to("meta"), False) for p in backbone.parameters()}
    return deepcopy(backbone, memo).eval()


def _fill(average: nn.Module, model: Backbone, device: torch.device) -> None:
    """Gives an outline memory, and in it the model's values, of which each process has its part."""
    assert isinstance(model, nn.Module), "a backbone is a module"
    copy_weights(model, average.to_empty(device=device))


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copies parameters and buffers to a module that is sharded alike: each process its part."""
    pairs = (target.parameters(), source.parameters()), (target.buffers(), source.buffers())
    for own, others in pairs:
        for mine, other in zip(own, others, strict=True):
            local(mine).copy_(local(other))


def _mesh(device: torch.device, processes: int, replicate: int) -> DeviceMesh:
    if replicate == 1:
        return init_device_mesh(device.type, (processes,), mesh_dim_names=("shard",))
    return init_device_mesh(
        device.type, (replicate, processes // replicate), mesh_dim_names=("replicate", "shard")
    )


def clip_gradient(parameters: list[nn.Parameter], largest: float) -> Tensor:
    """Scales the gradient down to norm `largest` -> its norm () before.

    The norm is that of the whole gradient, also where parameters are sharded.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm
