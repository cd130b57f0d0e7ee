"""Averages of the weights: how they move at each step, and how others are put together afterwards.

A power-function average (Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion
Models", 2024, EDM2; section 3 and appendix C) weights step tau of t by tau^gamma. Its width is
sigma_rel, the standard deviation of that profile as a share of t. Steps that were not taken do not
count: t is the number of steps that changed the weights, and the weights are those after each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hdit.config.schema import EMASpec
from hdit.models import BackboneModule
from hdit.runs.checkpoint import Checkpoint
from hdit.runs.sharded import local
from hdit.training.distributed import copy_weights, outline

MAIN = "ema"
"""The name of the average that samples are made of."""

# ---- how far an average moves --------------------------------------------------------------------


def ema_decay(step: int, spec: EMASpec) -> float:
    """Decay of the step-th update, counted from 0: with a warm-up the first copies the weights."""
    if not spec.warmup:
        return spec.max_decay
    return min(spec.max_decay, 1 - (1 + step / spec.inv_gamma) ** -spec.power)


def power_decay(t: Tensor, gamma: float) -> Tensor:
    """beta_gamma(t) = (1 - 1/t)^(gamma + 1) (EDM2, section 3.1) of the t-th update, counted from 1.

    t: () float64 -> () float64
    """
    return (1 - 1 / t) ** (gamma + 1)


def gamma_of(width: float) -> float:
    """The exponent gamma > 0 of a relative width below 12^-0.5, which is that of gamma 0.

    width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) as a polynomial in gamma (EDM2, eq. 123 and
    algorithm 2) has one root above 0.
    """
    inverse = width**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(roots.real.max())


@torch.no_grad()
def update_ema(
    ema: nn.Module, model: nn.Module, decay: float | Tensor, bad: Tensor | None = None
) -> None:
    """Moves each parameter of `ema` to `model` by 1 - decay, and copies the buffers.

    Where `bad` () is 1 it leaves `ema` as it is. Each is one call over all tensors, or over some,
    which on CUDA is a few kernels for the whole model; of sharded ones each process moves its part.
    """
    own, others = ([local(p) for p in module.parameters()] for module in (ema, model))
    if bad is None or bad.device.type == "cpu":
        if bad is None or not bad:
            torch._foreach_lerp_(own, others, float(1 - decay))
    else:
        lerp_unless(own, others, 1 - decay, bad)
    if buffers := list(ema.buffers()):
        torch._foreach_copy_(buffers, list(model.buffers()))


def lerp_unless(
    own: list[Tensor], others: list[Tensor], weight: float | Tensor, bad: Tensor
) -> None:
    """Moves `own` to `others` by `weight`, or by 0 where `bad` () is 1: no host waits for it."""
    moved = weight * (1 - bad)
    for first in range(0, len(own), TOGETHER):
        some = slice(first, first + TOGETHER)
        change = torch._foreach_sub(others[some], own[some])
        torch._foreach_mul_(change, moved)
        torch._foreach_add_(own[some], change)


TOGETHER = 64
"""Tensors whose difference is held at once."""

# ---- all of a run --------------------------------------------------------------------------------


class Averages:
    """All averages of a model's weights, each a module: "ema", then those that the settings add."""

    def __init__(self, model: BackboneModule, spec: EMASpec):
        """They are outlines: the caller puts each in place, where it begins as the model stands."""
        self.decays = {MAIN: spec} | {
            name: spec.model_copy(update={"max_decay": decay})
            for name, decay in spec.plain_sets.items()
        }
        self.gammas = {name: gamma_of(width) for name, width in spec.power_sets.items()}
        self.modules = {name: outline(model) for name in (*self.decays, *self.gammas)}
        # On the device, as the host of a GPU learns later which steps were taken.
        self.taken = torch.zeros((), dtype=torch.float64)
        self.begun = dict.fromkeys(self.gammas, 0)  # steps taken before each

    @property
    def main(self) -> BackboneModule:
        """The average that samples are made of."""
        return self.modules[MAIN]

    def update(self, model: nn.Module, step: int, bad: Tensor) -> None:
        """Moves all after update `step` of the model, counted from 0, unless `bad` () is 1."""
        for name, spec in self.decays.items():
            update_ema(self.modules[name], model, ema_decay(step, spec), bad)
        if not self.gammas:
            return
        self.taken = self.taken.to(bad.device) + (1 - bad)
        for name, gamma in self.gammas.items():
            # 0 if even the first step was bad: the average stays then, but must not become nan.
            t = (self.taken - self.begun[name]).clamp(min=1)
            update_ema(self.modules[name], model, power_decay(t, gamma), bad)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Their tensors, by the names of the sets in a checkpoint."""
        return {name: module.state_dict() for name, module in self.modules.items()}

    def snapshot(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of the power-function averages alone."""
        return {name: self.modules[name].state_dict() for name in self.gammas}

    def steps(self) -> int | None:
        """How many steps were taken, if anything goes by that; the host waits for it."""
        return int(self.taken) if self.gammas else None

    def load(self, found: Checkpoint, say: Callable[[str], None]) -> None:
        """Takes them from a checkpoint. Tells `say` of each that begins there, or is dropped.

        A plain one begins as the main average stands, and a power-function one with the next step.
        """
        state, kept = found.state, found.sets()
        # A run without widths has not counted what it did not take.
        taken = state.step if state.taken is None else state.taken
        self.taken = torch.tensor(float(taken), dtype=torch.float64)
        for name, module in self.modules.items():
            if name in kept or name == MAIN:
                found.fill(name, module.state_dict())
                self.begun |= {name: state.begun.get(name, 0)} if name in self.gammas else {}
                continue
            copy_weights(self.main, module)
            if name in self.gammas:
                self.begun[name] = taken
                say(f"{name}: a new average, of the steps from here on")
            else:
                say(f"{name}: a new average, which begins as the main one stands")
        for name in kept:
            if name.startswith(f"{MAIN}-") and name not in self.modules:
                say(f"{name}: an average of the run that is not in training.ema now; it ends here")


# ---- afterwards ----------------------------------------------------------------------------------

Vector = NDArray[np.float64]


class Profile(Protocol):
    """The weights that an average gives to the steps of a run; beyond `end` it gives none."""

    @property
    def end(self) -> int:
        """The step that it is an average at."""

    def weights(self, first: int, last: int) -> Vector:
        """Those of steps first + 1 to last."""


@dataclass(frozen=True)
class PowerProfile:
    """Of a power-function average of steps begun + 1 to end.

    Step k of t has weight (k^(gamma+1) - (k-1)^(gamma+1)) / t^(gamma+1). That is what the recursion
    with `power_decay` comes to, and the integral of EDM2's profile (section 3.1) over the step.
    """

    gamma: float
    end: int
    begun: int = 0

    def weights(self, first: int, last: int) -> Vector:
        """See Profile."""
        k = np.clip(np.arange(first, last + 1, dtype=np.float64), self.begun, self.end)
        return np.diff(((k - self.begun) / (self.end - self.begun)) ** (self.gamma + 1))


@dataclass(frozen=True)
class DecayProfile:
    """Of a plain average after `end` steps, all of them taken.

    Without a warm-up the initial weights have a share too, which is left out here.
    """

    spec: EMASpec
    end: int

    @cached_property
    def _all(self) -> Vector:
        decays = np.array([ema_decay(step, self.spec) for step in range(self.end)])
        since = np.append(np.cumprod(decays[:0:-1])[::-1], 1.0)  # what a step has decayed by
        return (1 - decays) * since

    def weights(self, first: int, last: int) -> Vector:
        """See Profile."""
        return self._all[first:last]


def reconstruct(tracked: Sequence[PowerProfile], wanted: Profile) -> tuple[Vector, float]:
    """The weights of `tracked` averages whose sum is nearest to the `wanted` one -> (n,), error.

    The profiles' least squares (EDM2, appendix C and algorithm 3), with the smallest weights
    where several are best; they add up to 1. The error is the L2 distance between the profile that
    they give and the wanted one, relative to the latter's norm. Inner products are sums over steps
    where EDM2 has integrals, so that a snapshot at each step leaves no error.
    """
    if wanted in tracked:
        found = np.zeros(len(tracked))
        found[list(tracked).index(wanted)] = 1.0  # type: ignore[arg-type]
        return found, 0.0
    matrix, target = _condensed(tracked, wanted)
    found = np.asarray(np.linalg.lstsq(matrix, target, rcond=None)[0])
    found /= found.sum()
    error = np.linalg.norm(matrix @ found - target) / np.linalg.norm(target)
    return found, float(error)


LONGEST = 2**16
"""Steps that are taken together."""


def _condensed(tracked: Sequence[PowerProfile], wanted: Profile) -> tuple[Vector, Vector]:
    """Profiles as columns (m, n) and the wanted one (m,), with few rows in place of all steps.

    Between two snapshots the profiles of one gamma are multiples of each other. An orthogonal
    change of basis there leaves as many rows as there are gammas, and all inner products.
    """
    cuts = {0, wanted.end, *range(0, wanted.end, LONGEST)}
    cuts |= {n for p in tracked for n in (p.begun, p.end) if n < wanted.end}
    ordered = sorted(cuts)
    kinds = list(dict.fromkeys((p.gamma, p.begun) for p in tracked))
    kind_of = np.array([kinds.index((p.gamma, p.begun)) for p in tracked])
    ends = np.array([p.end for p in tracked])
    columns, targets = [], []
    for first, last in pairwise(ordered):
        # Of each kind that has a profile here, the one that ends here.
        there = [i for i in sorted({*kind_of[ends >= last]}) if kinds[i][1] <= first]
        basis = [PowerProfile(gamma, last, begun) for gamma, begun in (kinds[i] for i in there)]
        steps = np.stack([p.weights(first, last) for p in (*basis, wanted)], axis=1)
        triangle: Any = np.linalg.qr(steps, mode="r")
        rows = np.zeros((len(triangle), len(tracked)))
        for column, (i, p) in enumerate(zip(there, basis, strict=True)):
            longer = (kind_of == i) & (ends >= last)
            scales = ((last - p.begun) / (ends[longer] - p.begun)) ** (p.gamma + 1)
            rows[:, longer] = np.outer(triangle[:, column], scales)
        columns.append(rows)
        targets.append(triangle[:, -1])
    return np.concatenate(columns), np.concatenate(targets)
