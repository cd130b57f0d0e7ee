"""MMD of whole sets and its jackknife against sums written out, and CMMD in closed form."""

import math

import numpy as np
import pytest
import torch

from hdit.evaluation.discrepancy import cmmd, discrepancy, gaussian_kernel
from hdit.evaluation.distances import polynomial_kernel, squared_mmd


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rbf(a, b):
    return math.exp(-sum((s - t) ** 2 for s, t in zip(a, b, strict=True)) / (2 * 10.0**2))


def written_out(x, y, kernel, unbiased):
    x, y = x.tolist(), y.tolist()

    def within(rows):
        n = len(rows)
        pairs = [(i, j) for i in range(n) for j in range(n) if i != j or not unbiased]
        return sum(kernel(rows[i], rows[j]) for i, j in pairs) / len(pairs)

    across = sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))
    return within(x) + within(y) - 2 * across


@pytest.mark.parametrize("unbiased", [True, False])
def test_discrepancy_and_its_jackknife_are_those_written_out(unbiased):
    x, y = 5 * normal(9, 3, seed=1), 5 * normal(7, 3, seed=2) + 4
    found = discrepancy(x, y, gaussian_kernel, unbiased=unbiased)
    assert found.squared == pytest.approx(written_out(x, y, rbf, unbiased), rel=1e-12)
    variance = 0
    for one, other in ((x, y), (y, x)):
        left_out = [
            written_out(torch.cat([one[:i], one[i + 1 :]]), other, rbf, unbiased)
            for i in range(len(one))
        ]
        variance += (len(one) - 1) * np.var(left_out)
    assert found.error == pytest.approx(math.sqrt(variance), rel=1e-9)


def test_discrepancy_of_the_cubic_kernel_is_that_of_kid():
    x, y = normal(40, 6, seed=1), normal(30, 6, seed=2) * 1.3
    found = discrepancy(x, y, polynomial_kernel)
    assert found.squared == pytest.approx(squared_mmd(x, y).item(), rel=1e-12)


def test_discrepancy_does_not_depend_on_its_tiles(monkeypatch):
    x, y = normal(50, 6, seed=1), normal(33, 6, seed=2) * 1.3
    whole = discrepancy(x, y, gaussian_kernel)
    monkeypatch.setattr("hdit.evaluation.discrepancy.ROWS", 16)
    parts = discrepancy(x, y, gaussian_kernel, tile=16 * 10)
    assert parts.squared == pytest.approx(whole.squared, rel=1e-10)
    assert parts.error == pytest.approx(whole.error, rel=1e-10)


def test_discrepancy_error_is_the_deviation_of_draws():
    found = [
        discrepancy(normal(80, 3, seed=i), normal(60, 3, seed=-i) * 1.2 + 0.5, polynomial_kernel)
        for i in range(1, 81)
    ]
    deviation = np.std([one.squared for one in found])
    # The deviation of 80 draws is good to 8 percent.
    assert np.mean([one.error for one in found]) == pytest.approx(deviation, rel=0.25)


def test_cmmd_of_gaussians_is_their_closed_form():
    """E k of N(0, v I) and N(m, w I) is (s^2 / (s^2 + v + w))^(d/2) exp(-|m|^2 / (2 (..)))."""
    n, d, s2 = 1500, 2, 100.0
    x, y = 4 * normal(n, d, seed=1), 6 * normal(n, d, seed=2) + 5

    def expected(variances, distance2):
        total = s2 + variances
        return (s2 / total) ** (d / 2) * math.exp(-distance2 / (2 * total))

    wanted = expected(32, 0) + expected(72, 0) - 2 * expected(52, 2 * 25)
    found = cmmd(x, y)
    assert found.squared == pytest.approx(1000 * wanted, abs=4 * found.error)
    assert found.error < 100 * wanted


def test_cmmd_of_a_set_and_itself_is_zero_and_of_two_points_is_known():
    x = torch.nn.functional.normalize(normal(30, 8), dim=1)
    assert cmmd(x, x).squared == pytest.approx(0, abs=1e-10)
    a, b = torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[0.0, 1.0]] * 3)
    assert cmmd(a, b).squared == pytest.approx(1000 * (2 - 2 * math.exp(-2 / 200)), rel=1e-12)
