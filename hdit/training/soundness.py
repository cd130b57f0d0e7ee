"""Whether weights can be used, before they are saved, and what to go back to if they cannot."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from hdit import randomness
from hdit.config import RunConfig
from hdit.device import precision_on
from hdit.protocols import Cond, DataShape, Network
from hdit.runs.building import make_denoiser
from hdit.runs.checkpoint import checkpoint_folders
from hdit.runs.folder import RunFolder
from hdit.runs.history import read_metrics
from hdit.runs.sharded import local
from hdit.tensors import NotFiniteError, check_finite, is_finite

RUINED = 10.0
"""A loss of so many times the lowest of a run tells that its checkpoint is of no use."""


def check_tensors(sets: Mapping[str, dict[str, Tensor]]) -> None:
    """Raises NotFiniteError where one of the tensors is not finite.

    Of sharded ones each process looks at its parts.
    """
    for name, tensors in sets.items():
        check_finite({key: local(t) for key, t in tensors.items()}, name)


def check_outputs(
    networks: Mapping[str, Network], config: RunConfig, shape: DataShape, device: torch.device
) -> None:
    """Raises NotFiniteError where what a network gives is not finite, as of weights too large.

    It is called at both ends of the noise levels.
    """
    sigma = torch.tensor(config.sigma_range(), device=device)
    keys = randomness.keys(0, "soundness", np.arange(len(sigma)), device)
    x = sigma[:, None, None, None] * randomness.normal(keys, shape.chw)
    labels = torch.zeros(len(sigma), dtype=torch.int64, device=device)
    cond = Cond(labels if shape.num_classes else None)
    precision = precision_on(device, config.training.precision)
    for name, network in networks.items():
        with torch.no_grad():
            denoised = make_denoiser(network, config, shape, precision)(x, sigma, cond)
        if not is_finite(denoised):
            raise NotFiniteError(f"{name}: its weights are finite, but what they give is not")


def what_to_do(run: RunFolder, config: RunConfig) -> str:
    """Which checkpoint a run that diverged is to go back to, and how."""
    t = config.training
    lower = f"Lower training.optimizer.lr (it is {t.optimizer.lr:g})"
    if t.precision != "fp32":
        lower += " or train in fp32"
    folders = checkpoint_folders(run.checkpoints)  # newest first
    last = int(folders[0].name) if folders else 0
    lines = read_metrics(run.metrics, last)
    losses = {line["images"]: line["loss"] for line in lines if "loss" in line}
    limit = RUINED * min(losses.values(), default=0.0)
    sound = [folder for folder in folders if losses.get(int(folder.name), 0.0) <= limit]
    if not sound:
        kept = "no checkpoint is of use" if folders else "there is no checkpoint yet"
        return f"{lower}, and begin in another --run: {kept}"
    after = folders[: folders.index(sound[0])]
    if not after:
        return f"{lower}, and the same command goes on from {sound[0]}"
    listing = ", ".join(f"{folder} (loss {losses[int(folder.name)]:.3g})" for folder in after)
    return f"{lower}, remove {listing}, and the same command goes on from {sound[0]}"
