"""The optimizer, with the parameter groups that a backbone asks for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hdit.config.schema import EMASpec, OptimizerSpec
from hdit.protocols import Backbone, Group


def parameter_groups(backbone: Backbone) -> dict[Group, list[str]]:
    """The names of the trainable parameters, by how the optimizer treats them."""
    groups: dict[Group, list[str]] = {}
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(backbone.parameter_group(name), []).append(name)
    return groups


def adamw(backbone: Backbone, spec: OptimizerSpec, fused: bool | None = None) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, 2019) over the backbone's groups.

    `fused` takes torch's one kernel for all that a step does; on CUDA it is the default.
    """
    parameters = dict(backbone.named_parameters())
    if fused is None:
        fused = all(p.device.type == "cuda" for p in parameters.values())
    return torch.optim.AdamW(
        [
            {
                "params": [parameters[name] for name in names],
                "lr_scale": group.lr_scale,
                "weight_decay": spec.weight_decay if group.decay else 0.0,
            }
            for group, names in parameter_groups(backbone).items()
        ],
        lr=spec.lr,
        betas=spec.betas,
        eps=spec.eps,
        fused=fused or None,  # False would choose the loop over parameters, None may do better
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, spec: OptimizerSpec, step: int) -> None:
    """The rate of the step-th update, counted from 0, in every group."""
    for group in optimizer.param_groups:
        group["lr"] = spec.schedule(step, spec.lr * group["lr_scale"])


def optimizer_tensors(backbone: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as "exp_avg/NAME" and the like, by canonical parameter names."""
    return {
        f"{key}/{name}": value
        for name, parameter in backbone.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    backbone: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Puts back what `optimizer_tensors` gave; lr and the like stay as they were constructed."""
    parameters = dict(backbone.named_parameters())
    fused = {p: bool(g["fused"]) for g in optimizer.param_groups for p in g["params"]}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        parameter = parameters[name]
        # The moments lie with the parameter, and so does the step counter of a fused optimizer;
        # any other counts on the CPU. A copy, for the tensors of a file are a view of it.
        on_cpu = kind == "step" and not fused[parameter]
        device = torch.device("cpu") if on_cpu else parameter.device
        optimizer.state[parameter][kind] = value.to(device, copy=True)


def ema_decay(step: int, spec: EMASpec) -> float:
    """Decay of the step-th update, counted from 0: with a warm-up the first copies the weights."""
    if not spec.warmup:
        return spec.max_decay
    return min(spec.max_decay, 1 - (1 + step / spec.inv_gamma) ** -spec.power)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """Moves each parameter of `ema` to `model` by 1 - decay, and copies the buffers.

    Each in one call over all tensors, which on CUDA is a few kernels for the whole model.
    """
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    if buffers := list(ema.buffers()):
        torch._foreach_copy_(buffers, list(model.buffers()))
