"""The optimizer, with the parameter groups that a backbone asks for."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from hdit.config import EMASpec, OptimizerSpec
from hdit.models import DiT, HDiT
from hdit.protocols import Group


def parameter_groups(backbone: HDiT | DiT) -> dict[Group, list[str]]:
    """The names of the trainable parameters, by how the optimizer treats them."""
    groups: dict[Group, list[str]] = {}
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(backbone.parameter_group(name), []).append(name)
    return groups


def adamw(backbone: HDiT | DiT, spec: OptimizerSpec) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, 2019) over the backbone's groups."""
    parameters = dict(backbone.named_parameters())
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
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        parameter = parameters[name]
        # AdamW keeps its step counters on the CPU, and its moments with the parameter. A copy, for
        # the tensors of a file are a view of it.
        device = value.device if kind == "step" else parameter.device
        optimizer.state[parameter][kind] = value.to(device, copy=True)


def ema_decay(step: int, spec: EMASpec) -> float:
    """Decay of the step-th update, counted from 0: the first copies the weights."""
    return min(spec.max_decay, 1 - (1 + step / spec.inv_gamma) ** -spec.power)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """Moves each parameter of `ema` to `model` by 1 - decay, and copies the buffers."""
    average = get_ema_multi_avg_fn(decay)
    average(list(ema.parameters()), list(model.parameters()), None)
    for old, new in zip(ema.buffers(), model.buffers(), strict=True):
        old.copy_(new)
