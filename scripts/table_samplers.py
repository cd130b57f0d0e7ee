"""Writes docs/samplers.md: order and error of every sampler on data with a closed-form solution.

    python scripts/table_samplers.py

The data are N(0, 0.25) in each pixel, whose denoiser is linear in x. A sample is then a sum of its
start and of the noise that was drawn, each with a factor, so its standard deviation is known
exactly: the error is that of this deviation. For a sampler without noise it is the error of x
itself.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from hdit.diffusion.beta_schedules import LinearSchedule
from hdit.diffusion.samplers import SamplerSpec, spec_of
from hdit.diffusion.sigmas import Exponential, Karras

SD = 0.5
TABLE = LinearSchedule()
STEPS = (160, 320)  # between which the order is observed
TOLERANCES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 0.3, 1.0)  # rtol of dpm_adaptive; atol is a sixth of it
ADAPTIVE = "dpm_adaptive"  # chooses its steps by its tolerances
BUDGETS = (10, 20, 50)  # network evaluations

HEAD = """# Samplers

`python scripts/table_samplers.py` writes this page. The data are N(0, {sd}^2) in each pixel, for
which D(x; sigma) and the solution are known in closed form. [Sampling](sampling.md) says how to
choose a sampler. The columns are:

- **Noise**: whether the sampler adds noise, and which option controls it.
- **Evaluations** of the network in a step. The last step, to sigma 0, takes one. `dpm_fast` takes
  one a step on average; `dpm_adaptive` chooses its steps.
- **Order**: how the error falls with the length of the steps, as the paper of the method derives
  it.
- **Observed**: the same, measured without noise between {low} and {high} steps from sigma 2 to
  0.05, even in ln(sigma).
- **With noise**: the observed order of the standard deviation of samples, with eta 1.
- **Error**: relative error of the samples' standard deviation within that many evaluations; without
  noise, of each sample.

Errors are those of the default settings of each sampler, on the Karras sigma schedule (rho 7) from
160 to 0.01 and then 0, with as many steps as {budgets} evaluations allow.
`dpm_adaptive` has the smallest rtol whose evaluations suffice, of {tolerances},
and a blank if none does.

`lms` begins and `dpm_fast` ends with steps of lower order, which limits the whole. `dpmpp_3m_sde`
is k-diffusion's, whose second difference has half the weight that order 3 takes.

| sampler | noise | evaluations | order | observed | with noise | {errors} |
|---|---|--:|--:|--:|--:|{rules}|
"""


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    return x * (SD**2 / (SD**2 + sigma**2))[:, None, None, None]


class Impulses:
    """Noise whose factor in the result can be read off: each pixel gets one independent part of it.

    Overlapping stretches share a part, as on a Brownian path whose time is sigma.
    """

    def __init__(self, levels: list[float]):
        self.levels = sorted(set(levels))

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        low, high = sorted((sigma, sigma_next))
        parts = [
            math.sqrt((b - a) / (high - low)) if low <= a and b <= high else 0.0
            for a, b in pairwise(self.levels)
        ]
        return torch.tensor([0.0, *parts], dtype=torch.float64).view(1, 1, 1, -1)


def std_of_samples(sampler: SamplerSpec, sigmas: Tensor) -> tuple[float, int]:
    """-> (standard deviation at sigmas[-1], evaluations), started from the exact one."""
    asked: list[float] = []
    evaluations = 0

    def counted(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return gaussian(x, sigma)

    def record(sigma: float, sigma_next: float) -> Tensor:
        asked.extend((sigma, sigma_next))
        return torch.zeros(1, 1, 1, 1, dtype=torch.float64)

    sampler(counted, torch.ones(1, 1, 1, 1, dtype=torch.float64), sigmas, noise=record)
    impulses = Impulses(asked)
    x = torch.zeros(1, 1, 1, max(len(impulses.levels), 1), dtype=torch.float64)
    x[..., 0] = math.hypot(SD, sigmas[0].item())
    return sampler(gaussian, x, sigmas, noise=impulses).norm().item(), evaluations


def error(sampler: SamplerSpec, sigmas: Tensor) -> float:
    return abs(std_of_samples(sampler, sigmas)[0] / math.hypot(SD, sigmas[-1].item()) - 1)


def observed_order(sampler: SamplerSpec) -> float:
    coarse, fine = (error(sampler, Exponential()(n, 0.05, 2, TABLE)[:-1]) for n in STEPS)
    return math.log(coarse / fine) / math.log(STEPS[1] / STEPS[0])


def error_within(sampler: SamplerSpec, budget: int) -> float | None:
    """With as many steps, or as small a tolerance, as the budget of evaluations allows."""
    tries = [(sampler, n) for n in range(budget, 0, -1)]
    if sampler.kind == ADAPTIVE:
        tries = [(spec_of(ADAPTIVE, rtol=rtol, atol=rtol / 6), budget) for rtol in TOLERANCES]
    for candidate, n in tries:
        sigmas = Karras()(n, 0.01, 160, TABLE)
        if std_of_samples(candidate, sigmas)[1] <= budget:
            return error(candidate, sigmas)
    return None


def noise_of(sampler: SamplerSpec) -> str:
    fields = type(sampler).model_fields
    if "eta" in fields:
        return f"eta, {fields['eta'].default:g} by default"
    return "always" if sampler.kind == "ddpm" else "s_churn" if "s_churn" in fields else "none"


def row(kind: str) -> str:
    sampler = spec_of(kind)
    has_eta, always = "eta" in type(sampler).model_fields, kind == "ddpm"
    noisy, still = (spec_of(kind, eta=eta) if has_eta else sampler for eta in (1.0, 0.0))
    nine = Exponential()(9, 0.05, 2, TABLE)
    cells = [
        f"`{kind}`",
        noise_of(sampler),
        "" if kind == ADAPTIVE else str(std_of_samples(sampler, nine[:-1])[1] // 8),
        str(sampler.nominal_order),
        "" if always or kind == ADAPTIVE else f"{observed_order(still):.2f}",
        f"{observed_order(noisy):.2f}" if has_eta or always else "",
        *("" if e is None else f"{e:.1e}" for e in (error_within(sampler, n) for n in BUDGETS)),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    head = HEAD.format(
        sd=SD,
        low=STEPS[0],
        high=STEPS[1],
        budgets=", ".join(map(str, BUDGETS[:-1])) + f" and {BUDGETS[-1]}",
        tolerances=", ".join(f"{rtol:g}" for rtol in TOLERANCES),
        errors=" | ".join(f"error at {budget}" for budget in BUDGETS),
        rules="|".join("--:" for _ in BUDGETS),
    )
    text = head + "\n".join(row(kind) for kind in SamplerSpec.members) + "\n"
    path = Path(__file__).parents[1] / "docs" / "samplers.md"
    path.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
