"""Averages of the weights: their formulas, while a run goes on, and made of its snapshots."""

import math
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from known_answers import load
from torch import nn

from hdit.config.schema import EMASpec
from hdit.training.ema import (
    DecayProfile,
    PowerProfile,
    ema_decay,
    gamma_of,
    lerp_unless,
    power_decay,
    reconstruct,
    update_ema,
)

DOCS = Path(__file__).parents[2] / "docs"


def width_of(gamma: float) -> float:
    """The standard deviation of the profile tau^gamma on [0, 1] (EDM2, eq. 123)."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


# ---- plain averages ------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.6667, 0.75, 1.0])
def test_ema_decay_matches_the_reference(power):
    expected = load("schedules_ema_lr.json")[f"ema_warmup(power={power},max=.9999,inv_gamma=1)"]
    for step, decay in expected.items():
        assert ema_decay(int(step), EMASpec(power=power)) == pytest.approx(decay, rel=1e-12, abs=0)


def test_ema_without_warmup_has_the_same_decay_at_every_step():
    spec = EMASpec(warmup=False, max_decay=0.999)
    assert [ema_decay(step, spec) for step in (0, 1, 10**6)] == [0.999] * 3


def test_ema_is_the_running_average_in_closed_form():
    model, ema = nn.Linear(3, 2), nn.Linear(3, 2)
    model.register_buffer("table", torch.zeros(2))
    ema.register_buffer("table", torch.zeros(2))
    expected = torch.zeros(2, 3)
    for decay in (0.0, 0.5, 0.9):
        with torch.no_grad():
            model.weight.normal_()
            model.table += 1
        update_ema(ema, model, decay)
        expected = decay * expected + (1 - decay) * model.weight
    torch.testing.assert_close(ema.weight, expected)
    assert ema.table.tolist() == [3, 3]


@pytest.mark.parametrize("bad", [0.0, 1.0])
def test_average_moves_on_the_device_unless_the_step_was_bad(bad):
    own = [torch.randn(3, 4, dtype=torch.float64) for _ in range(100)]
    others = [torch.randn_like(t) for t in own]
    expected = [t + 0.3 * (1 - bad) * (o - t) for t, o in zip(own, others, strict=True)]
    moved = [t.clone() for t in own]
    lerp_unless(moved, others, 0.3, torch.tensor(bad, dtype=torch.float64))
    for a, b, before in zip(moved, expected, own, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15)
        assert not bad or torch.equal(a, before)


# ---- power-function averages ---------------------------------------------------------------------

NODES, NODE_WEIGHTS = np.polynomial.legendre.leggauss(300)


def integral(function, low, high):
    """By Gauss and Legendre's quadrature, which is exact up to degree 599."""
    half = (high - low) / 2
    return half * float(NODE_WEIGHTS @ function(low + half * (1 + NODES)))


def bisected(function, low, high):
    """The zero of an increasing function, to the last digits."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return low


WIDTHS = [1e-4, 0.001, 0.03, 0.05, 0.1, 0.15, 0.25, 0.288]


@pytest.mark.parametrize("width", WIDTHS)
def test_gamma_is_the_root_that_another_root_finder_has(width):
    """And the standard deviation of its profile, as an integral, is the width."""

    def variance(gamma):
        mean = integral(lambda t: (gamma + 1) * t ** (1 + gamma), 0, 1)
        return integral(lambda t: (gamma + 1) * t**gamma * (t - mean) ** 2, 0, 1)

    gamma = gamma_of(width)
    assert width_of(gamma) == pytest.approx(width, rel=1e-12)
    if width > 0.01:  # a narrower one lies between the nodes
        assert math.sqrt(variance(gamma)) == pytest.approx(width, rel=1e-4)
    root = bisected(lambda gamma: width - width_of(gamma), 0, 1e5)
    assert gamma == pytest.approx(root, rel=1e-10)


def test_gammas_are_those_that_the_paper_has():
    """EDM2, section 3: gamma 6.94 for 10 percent, 16.97 for 5 percent."""
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)


@pytest.mark.parametrize("gamma", [0.0139, 0.72, 6.937, 16.97, 997.0])
def test_recursion_is_the_explicit_sum_over_steps(gamma):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(60, 5, generator=generator, dtype=torch.float64)
    average = torch.full((5,), math.nan, dtype=torch.float64)  # which the first step writes over
    average = torch.where(power_decay(torch.tensor(1.0), gamma) == 0, 0.0, average)
    for t, w in enumerate(weights, 1):
        decay = power_decay(torch.tensor(float(t), dtype=torch.float64), gamma)
        average = decay * average + (1 - decay) * w
    profile = PowerProfile(gamma, 60).weights(0, 60)
    assert profile.sum() == pytest.approx(1, rel=1e-12)
    torch.testing.assert_close(average, torch.from_numpy(profile) @ weights, rtol=1e-11, atol=1e-12)


def test_weights_of_steps_are_integrals_of_the_papers_profile():
    """(gamma + 1) tau^gamma / t^(gamma + 1), which begins after step `begun` of all."""
    gamma, begun, end = gamma_of(0.1), 4, 20
    length = end - begun
    expected = [
        integral(lambda u: (gamma + 1) * u**gamma / length ** (gamma + 1), k, k + 1)
        for k in range(length)
    ]
    found = PowerProfile(gamma, end, begun).weights(0, 30)
    np.testing.assert_allclose(found, [0.0] * begun + expected + [0.0] * 10, rtol=1e-9, atol=0)


def test_decay_profile_is_what_the_recursion_gives():
    spec, average = EMASpec(max_decay=0.9), np.zeros(30)
    for step in range(30):
        decay = ema_decay(step, spec)
        average *= decay
        average[step] += 1 - decay
    profile = DecayProfile(spec, 30)
    np.testing.assert_allclose(profile.weights(0, 30), average, rtol=1e-12)
    np.testing.assert_allclose(profile.weights(7, 12), average[7:12], rtol=1e-12)


# ---- their reconstruction ------------------------------------------------------------------------


def snapshots(end, number, widths=(0.05, 0.1)):
    ends = sorted({round(end * (i + 1) / number) for i in range(number)})
    return [PowerProfile(gamma_of(width), t) for t in ends for width in widths]


def in_one_piece(tracked, wanted):
    """Least squares over all steps as they are."""
    matrix = np.stack([p.weights(0, wanted.end) for p in tracked], axis=1)
    found = np.linalg.lstsq(matrix, wanted.weights(0, wanted.end), rcond=None)[0]
    found /= found.sum()
    target = wanted.weights(0, wanted.end)
    return found, np.linalg.norm(matrix @ found - target) / np.linalg.norm(target)


@pytest.mark.parametrize("begun", [0, 35])
def test_reconstruction_is_the_least_squares_over_all_steps(begun):
    """Also where an average began later than the run."""
    tracked = [*snapshots(400, 8, [0.05])]
    tracked += [PowerProfile(gamma_of(0.1), p.end, begun) for p in tracked]
    for wanted in (PowerProfile(gamma_of(0.15), 400), DecayProfile(EMASpec(max_decay=0.97), 400)):
        found, error = reconstruct(tracked, wanted)
        expected, distance = in_one_piece(tracked, wanted)
        np.testing.assert_allclose(found, expected, atol=1e-9)
        assert error == pytest.approx(distance, rel=1e-6)


def papers(tracked, wanted):
    """EDM2's closed form: inner products of profiles as integrals, algorithm 3."""

    def product(a, b):
        n, m = max(a.end, b.end), min(a.end, b.end)
        first, second = (a, b) if a.end <= b.end else (b, a)
        power = (m / n) ** second.gamma / n
        return (a.gamma + 1) * (b.gamma + 1) * power / (first.gamma + second.gamma + 1)

    a, b = tracked[3], wanted
    numerical = integral(
        lambda u: (a.gamma + 1) * u**a.gamma / a.end ** (a.gamma + 1)
        * (b.gamma + 1) * u**b.gamma / b.end ** (b.gamma + 1), 0, a.end,
    )  # fmt: skip
    assert product(a, b) == pytest.approx(numerical, rel=1e-8)
    gram = np.array([[product(p, q) for q in tracked] for p in tracked])
    return np.linalg.solve(gram, [product(p, wanted) for p in tracked])


def test_sums_over_many_steps_are_the_papers_integrals():
    """The inner products differ by the square of a step's share: 2e-6 of 16 snapshots' weights."""
    tracked, wanted = snapshots(100_000, 8), PowerProfile(gamma_of(0.15), 100_000)
    found, _ = reconstruct(tracked, wanted)
    expected = papers(tracked, wanted)
    np.testing.assert_allclose(found, expected / expected.sum(), atol=1e-5)


@pytest.mark.parametrize("width", [0.03, 0.15, 0.25])
def test_error_goes_to_nothing_as_snapshots_get_dense(width):
    wanted = PowerProfile(gamma_of(width), 512)
    errors = [reconstruct(snapshots(512, n), wanted)[1] for n in (8, 32, 128, 512)]
    assert all(b < a / 4 for a, b in pairwise(errors))
    assert errors[-1] < 1e-12


def test_tracked_average_is_its_own_last_snapshot():
    tracked = snapshots(100, 100)
    found, error = reconstruct(tracked, tracked[-2])
    assert (found[-2], np.abs(found).sum(), error) == (1, 1, 0)


def test_profile_errors_of_the_docs_are_those_of_that_many_snapshots():
    """Of 0.05 and 0.1, evenly spread over a run whose length hardly matters."""
    text = (DOCS / "ema.md").read_text()
    _, *widths = re.search(r"\| snapshots of 0.05 and 0.1 \| (.+) \|\n", text)[0].split("|")[1:-1]
    rows = re.findall(r"^\| (\d+) \|(( [\d.]+% \|)+)$", text, re.MULTILINE)
    assert len(rows) == 5
    for count, cells, _ in rows:
        number, steps = int(count), 64
        tracked = [
            PowerProfile(gamma_of(width), steps * (i + 1))
            for width in (0.05, 0.1)
            for i in range(number)
        ]
        for width, cell in zip(widths, cells.split("|")[:-1], strict=True):
            wanted = PowerProfile(gamma_of(float(width)), steps * number)
            error = 100 * reconstruct(tracked, wanted)[1]
            assert float(f"{error:.2g}") == float(cell.strip().removesuffix("%"))
