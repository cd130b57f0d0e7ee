"""The optimizer, with the parameter groups that a backbone asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from hdit.config.learning_rate import Moment
from hdit.config.schema import OptimizerSpec
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


def set_learning_rate(optimizer: torch.optim.Optimizer, spec: OptimizerSpec, at: Moment) -> None:
    """Gives every group the rate of the step at this moment."""
    for group in optimizer.param_groups:
        group["lr"] = spec.schedule(at, spec.lr * group["lr_scale"])


def optimizer_tensors(backbone: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as "exp_avg/NAME" and the like, by canonical parameter names."""
    return {
        f"{key}/{name}": value
        for name, parameter in backbone.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(
    backbone: nn.Module,
    optimizer: torch.optim.Optimizer,
    names: Iterable[str],
    fill: Callable[[dict[str, Tensor]], None],
) -> None:
    """Puts back what `optimizer_tensors` gave under these names; `fill` fills tensors by name.

    lr and the like stay as they were constructed.
    """
    parameters = dict(backbone.named_parameters())
    fused = {p: bool(g["fused"]) for g in optimizer.param_groups for p in g["params"]}
    optimizer.state.clear()
    tensors: dict[str, Tensor] = {}
    for key in names:
        kind, _, name = key.partition("/")
        parameter = parameters[name]
        if kind == "step":
            # It lies with the parameter for a fused optimizer; any other counts on the CPU.
            device = parameter.device if fused[parameter] else torch.device("cpu")
            tensors[key] = torch.zeros((), device=device)
        else:
            tensors[key] = torch.zeros_like(parameter, requires_grad=False)
        optimizer.state[parameter][kind] = tensors[key]
    fill(tensors)
