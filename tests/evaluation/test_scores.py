"""Inception Score, sliced Wasserstein distance, and errors by the jackknife."""

import math

import numpy as np
import pytest
import torch

from hdit.evaluation.distances import Moments, frechet_distance
from hdit.evaluation.inception_score import ScoreParts
from hdit.evaluation.intervals import (
    GROUPS,
    frechet_error,
    groups_of,
    interval,
    jackknife_error,
    share_interval,
    sliced_error,
)
from hdit.evaluation.sliced import sliced_wasserstein


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(x):
    moments = Moments(x.shape[1])
    moments.add(x)
    return moments.gaussian()


# ---- Inception Score -----------------------------------------------------------------------------


def score(p, splits=10, batch=7):
    parts = ScoreParts(len(p), splits)
    for part in p.split(batch):
        parts.add(part)
    return parts.score()


def test_score_is_that_of_the_formula_in_each_split():
    p = (2 * normal(53, 6)).softmax(1)
    scores = []
    groups = groups_of(53, 10)
    for i in range(10):
        rows = p[groups == i].tolist()
        mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        divergences = [
            sum(a * math.log(a / b) for a, b in zip(row, mean, strict=True)) for row in rows
        ]
        scores.append(math.exp(sum(divergences) / len(rows)))
    found = score(p)
    assert found.mean == pytest.approx(np.mean(scores), rel=1e-12)
    assert found.deviation == pytest.approx(np.std(scores), rel=1e-9)


def test_score_of_sure_and_even_predictions_is_the_number_of_classes():
    sure = torch.eye(5).repeat(20, 1)
    assert score(sure, splits=1).mean == pytest.approx(5, rel=1e-12)
    assert score(torch.full((100, 5), 0.2)).mean == pytest.approx(1, rel=1e-12)
    in_order = torch.eye(5).repeat_interleave(2000, 0)  # a folder that is sorted by class
    assert score(in_order).mean == pytest.approx(5, rel=0.01)
    assert score(torch.eye(5)[:1].repeat(100, 1)).mean == pytest.approx(1, rel=1e-12)


# ---- sliced Wasserstein --------------------------------------------------------------------------


def test_sliced_distance_of_a_shift_is_its_square():
    x = normal(20, 6)
    shift = torch.tensor([3.0, -1, 0, 2, 0.5, 1], dtype=torch.float64)
    found = sliced_wasserstein(x, x + shift, projections=5000)
    assert found == pytest.approx(shift.square().sum().item(), rel=0.05)
    assert sliced_wasserstein(x, x) == 0


def test_sliced_distance_in_one_dimension_is_that_of_the_quantiles():
    x, y = normal(4, 1, seed=1), normal(6, 1, seed=2)
    quantiles = (np.arange(12) + 0.5) / 12  # both step functions are constant in each twelfth
    a = np.sort(x.numpy()[:, 0])[(quantiles * 4).astype(int)]
    b = np.sort(y.numpy()[:, 0])[(quantiles * 6).astype(int)]
    found = sliced_wasserstein(x, y, projections=3)
    assert found == pytest.approx(np.square(a - b).mean(), rel=1e-12)


def test_sliced_distance_of_repeated_rows_is_the_same():
    x, y = normal(30, 4, seed=1), normal(30, 4, seed=2)
    once = sliced_wasserstein(x, y)
    assert sliced_wasserstein(x.repeat(3, 1), y.repeat(2, 1)) == pytest.approx(once, rel=1e-12)


def test_sliced_distance_of_gaussians_goes_to_that_of_their_deviations():
    x, y = normal(4000, 3, seed=1), 2 * normal(4000, 3, seed=2)
    found = sliced_wasserstein(x, y, projections=200)
    assert found == pytest.approx(3 * (2 - 1) ** 2, rel=0.05)


# ---- errors --------------------------------------------------------------------------------------


def test_moments_without_a_part_are_those_of_the_rest():
    x = normal(50, 4) + 100
    whole, part = Moments(4), Moments(4)
    whole.add(x)
    part.add(x[10:25])
    found = whole.without(part).gaussian()
    wanted = gaussian(torch.cat([x[:10], x[25:]]))
    assert found.n == 35
    torch.testing.assert_close(found.mean, wanted.mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(found.cov, wanted.cov, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("n", [40, 107])
def test_groups_are_even_and_not_in_step_with_the_classes(n):
    counts = groups_of(n).bincount()
    assert len(counts) == GROUPS
    assert counts.max() - counts.min() <= 1
    assert not torch.equal(groups_of(n), torch.arange(n) % GROUPS)


def test_jackknife_of_a_mean_is_its_standard_error():
    x = normal(GROUPS)
    left_out = (x.sum() - x) / (GROUPS - 1)
    assert jackknife_error(left_out) == pytest.approx(x.std().item() / GROUPS**0.5, rel=1e-12)


def test_frechet_error_is_the_deviation_of_draws():
    reference = gaussian(normal(2000, 3, seed=1000) * 1.2 + 0.5)
    values, errors = [], []
    for i in range(1, 61):
        rows = normal(400, 3, seed=i)
        whole = gaussian(rows)
        values.append(frechet_distance(whole, reference))
        errors.append(frechet_error(rows, whole, reference, lambda: None))
    # The deviation of 60 draws is good to 9 percent, and so is the mean of the errors.
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.3)


def test_frechet_error_of_some_of_the_rows_is_that_of_all():
    reference = gaussian(normal(2000, 3, seed=1000) * 1.2 + 0.5)
    rows = normal(8000, 3)
    all_of_them = frechet_error(rows, gaussian(rows), reference, lambda: None)
    some = frechet_error(rows[:2000], gaussian(rows), reference, lambda: None)
    assert some == pytest.approx(all_of_them, rel=0.6)  # each error is good to 16 percent


def test_sliced_error_is_the_deviation_of_draws():
    y = normal(500, 3, seed=1000) * 1.2 + 0.5
    found = [
        (sliced_wasserstein(x, y, projections=32), sliced_error(x, y, projections=32))
        for x in (normal(300, 3, seed=i) for i in range(1, 31))
    ]
    values, errors = zip(*found, strict=True)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.35)


@pytest.mark.parametrize("n", [50, 200])
def test_frechet_error_is_the_jackknifes_however_it_is_computed(n):
    """Of fewer rows than features by the rows themselves, of more by moments."""
    rows, reference = normal(n, 60, seed=1), gaussian(normal(90, 60, seed=2) * 1.2)
    groups = groups_of(n)
    values = [frechet_distance(gaussian(rows[groups != i]), reference) for i in range(GROUPS)]
    wanted = math.sqrt((GROUPS - 1) / GROUPS * sum((v - np.mean(values)) ** 2 for v in values))
    found = frechet_error(rows, gaussian(rows), reference, lambda: None)
    assert found == pytest.approx(wanted, rel=1e-6)


def test_interval_of_a_share_is_wilsons_and_its_error_the_jackknifes():
    """The ends x of 30 of 100, and of 100 of 100, solve (p - x)^2 = z^2 x (1 - x) / n."""
    for share in (0.3, 1.0):
        made = share_interval(share, 100, "x")
        for end in (made["low"], made["high"]):
            wanted = 1.959964**2 * end * (1 - end) / 100
            assert (share - end) ** 2 == pytest.approx(wanted, abs=1e-9)
        assert made["low"] < share <= made["high"]
    inside = torch.arange(100.0) < 30
    left_out = (inside.sum() - inside.double()) / 99
    jackknife = math.sqrt(99 * left_out.var(correction=0))
    assert share_interval(0.3, 100, "x")["error"] == pytest.approx(jackknife, rel=1e-9)


def test_interval_of_few_groups_is_wider_than_the_normals():
    assert interval(1.0, 0.1, "x")["high"] == pytest.approx(1.196, abs=1e-4)
    assert interval(1.0, 0.1, "x", 9)["low"] == pytest.approx(0.7738, abs=1e-4)
