import math

import known_answers
import mpmath
import numpy as np
import pytest
import torch

from hdit.errors import UserError
from hdit.evaluation import distances
from hdit.evaluation.distances import (
    Gaussian,
    Moments,
    frechet_distance,
    kept_for_kid,
    kernel_distance,
    squared_mmd,
)

VECTORS = known_answers.load("fid_kid.json")["float64"]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(x, batch_size=7):
    moments = Moments(x.shape[1])
    for part in x.split(batch_size):
        moments.add(part)
    return moments.gaussian()


@pytest.fixture(scope="module")
def vectors():
    x = known_answers.hfill((64, 8), 7000, 1.0)
    return x, known_answers.hfill((48, 8), 7001, 1.2, 0.1)


# ---- moments -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 50])
def test_moments_are_numpys_whatever_the_batches_and_the_offset(batch_size):
    x = normal(50, 6) + 1e6  # of squares summed as they are, six digits would be left
    found = gaussian(x.clone(), batch_size)
    assert found.n == 50
    # The mean is good to the rounding of 1e6, and the covariance with it.
    np.testing.assert_allclose(found.mean, x.numpy().mean(0), rtol=1e-15)
    np.testing.assert_allclose(found.cov, np.cov(x.numpy().T), atol=1e-8)


# ---- FID -----------------------------------------------------------------------------------------


def test_fid_is_the_references(vectors):
    # k-diffusion adds 1e-8 to the diagonals, which moves the distance by less than 1e-8 here.
    found = frechet_distance(*map(gaussian, vectors))
    assert found == pytest.approx(VECTORS["fid"], abs=1e-7)


def test_fid_to_white_noise_takes_the_trace_of_the_root(vectors):
    g = gaussian(vectors[0])
    white = Gaussian(g.n, g.mean, torch.eye(8, dtype=torch.float64))
    trace = (g.cov.trace() + 8).item() - frechet_distance(g, white)
    assert trace / 2 == pytest.approx(VECTORS["sqrtm_trace_covx"], abs=1e-7)


def test_fid_of_equal_covariances_is_the_squared_distance_of_means():
    x = normal(40, 5)
    shift = torch.tensor([3.0, -1, 0, 2, 0.5], dtype=torch.float64)
    found = frechet_distance(gaussian(x), gaussian(x + shift))
    assert found == pytest.approx(shift.square().sum().item(), rel=1e-12)


def test_fid_of_commuting_covariances_is_that_of_their_deviations():
    turn = torch.linalg.qr(normal(6, 6)).Q
    a, b = normal(2, 6).square()
    zero = torch.zeros(6, dtype=torch.float64)
    found = frechet_distance(
        Gaussian(9, zero, turn @ a.diag() @ turn.T), Gaussian(9, zero, turn @ b.diag() @ turn.T)
    )
    assert found == pytest.approx((a.sqrt() - b.sqrt()).square().sum().item(), rel=1e-12)


def test_fid_is_that_of_a_matrix_root_in_forty_digits():
    a, b = gaussian(normal(30, 6, seed=1) @ normal(6, 6)), gaussian(normal(20, 6, seed=2))
    with mpmath.workdps(40):
        root = mpmath.sqrtm(mpmath.matrix(a.cov.tolist()) * mpmath.matrix(b.cov.tolist()))
        trace = float(sum(root[i, i] for i in range(6)))
    wanted = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * trace
    assert frechet_distance(a, b) == pytest.approx(wanted.item(), rel=1e-12)


def test_fid_does_not_depend_on_rotation_or_order():
    x, y = normal(60, 5, seed=1) @ normal(5, 5), normal(50, 5, seed=2)
    turn = torch.linalg.qr(normal(5, 5, seed=3)).Q
    found = frechet_distance(gaussian(x), gaussian(y))
    assert frechet_distance(gaussian(y), gaussian(x)) == pytest.approx(found, rel=1e-12)
    turned = frechet_distance(gaussian(x @ turn), gaussian(y @ turn))
    assert turned == pytest.approx(found, rel=1e-12)


@pytest.mark.parametrize("n", [2, 20, 400])
def test_fid_of_a_set_and_itself_is_zero_of_any_rank(n):
    g = gaussian(normal(n, 64))
    assert frechet_distance(g, g) < 1e-12 * g.cov.trace()  # a few roundings of the traces


def test_fid_of_fewer_images_than_features_has_no_noise_of_the_other_directions():
    """Features of 6 dimensions that lie in 300 are as far from each other as in their 6."""
    x, y = normal(40, 6, seed=1), normal(30, 6, seed=2) * 2 + 1
    frame = torch.linalg.qr(normal(300, 6, seed=3)).Q.T  # (6 300), orthonormal rows
    wanted = frechet_distance(gaussian(x), gaussian(y))
    found = frechet_distance(gaussian(x @ frame), gaussian(y @ frame))
    assert found == pytest.approx(wanted, rel=1e-10)


def test_fid_of_what_overflows_is_refused():
    """nan would be 0 to `max`, the best distance that there is."""
    x = gaussian(normal(20, 4))
    large = gaussian(normal(20, 4) * 1e120)
    bad = x._replace(mean=x.mean * math.nan), x._replace(cov=x.cov * math.inf)
    for pair in ((x, bad[0]), (bad[0], x), (bad[1], x), (large, large)):
        with pytest.raises(UserError, match="FID: the features are too large"):
            frechet_distance(*pair)


# ---- KID -----------------------------------------------------------------------------------------


def test_kid_is_the_references(vectors):
    x, y = (v.double() for v in vectors)
    assert squared_mmd(x, y).item() == pytest.approx(VECTORS["kid"], rel=1e-12)
    # In parts of at most 20, k-diffusion cuts both sets alike.
    parts = math.ceil(max(len(x), len(y)) / 20)
    cuts = [[round(i * len(v) / parts) for i in range(parts + 1)] for v in (x, y)]
    found = [
        squared_mmd(x[cuts[0][i] : cuts[0][i + 1]], y[cuts[1][i] : cuts[1][i + 1]]).item()
        for i in range(parts)
    ]
    assert np.mean(found) == pytest.approx(VECTORS["kid_max_size_20"], rel=1e-12)


def test_kid_of_small_sets_is_that_of_all_their_images(vectors):
    found = kernel_distance(*vectors)
    assert found.mean == pytest.approx(VECTORS["kid"], rel=1e-12)
    assert (found.subsets, found.sizes, found.error) == (1, (64, 48), None)


def test_kid_depends_on_its_seed_alone():
    x, y = normal(60, 4), normal(50, 4, seed=1)
    runs = [kernel_distance(x, y, seed=seed, subsets=5, size=20) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_kid_draws_its_subsets_by_numpys_philox(vectors):
    """Computed by numpy alone: a published figure must not move with a version."""
    found = kernel_distance(*vectors, seed=0, subsets=3, size=10)
    assert found.mean == pytest.approx(0.046595245981169896, rel=1e-12)
    assert found.seed == 0
    assert kernel_distance(*vectors, seed=1, subsets=3, size=10).seed == 1


def test_kid_keeps_images_by_numpys_philox(monkeypatch):
    monkeypatch.setattr("hdit.evaluation.distances.SUBSETS", 2)
    monkeypatch.setattr("hdit.evaluation.distances.SUBSET_SIZE", 3)
    assert kept_for_kid(20, 0, 1).tolist() == [4, 8, 12, 14, 15, 17]


def test_kid_of_what_overflows_is_refused():
    large = normal(20, 4) * 1e60
    with pytest.raises(UserError, match="KID: the features are too large for their cubes"):
        kernel_distance(large, large)


def test_kid_of_one_distribution_is_zero_on_average():
    values = [kernel_distance(normal(20, 3, seed=i), normal(20, 3, seed=-i)) for i in range(1, 400)]
    means = np.array([value.mean for value in values])
    assert abs(means.mean()) < 3 * means.std() / len(means) ** 0.5
    assert (means < 0).any()


@pytest.mark.parametrize("n", [60, 400, 6000])
def test_kid_error_is_the_deviation_of_its_mean(n):
    """For subsets that overlap much, some, and not at all."""
    found = []
    for i in range(1, 41):
        x, y = normal(n, 3, seed=i), normal(n, 3, seed=-i) * 1.2 + 0.5
        found.append(kernel_distance(x, y, subsets=60, size=40))
    deviation = np.std([one.mean for one in found])
    # The deviation of 40 draws is good to 11 percent.
    assert np.mean([one.error for one in found]) == pytest.approx(deviation, rel=0.35)


def test_kid_draws_from_all_images_up_to_a_bound():
    assert kept_for_kid(500, 0, 0).tolist() == list(range(500))
    kept = kept_for_kid(150_000, 0, 1)
    assert len(set(kept.tolist())) == 100_000
    assert kept.max() > 149_000


@pytest.mark.parametrize(("n", "subsets"), [(1000, 5), (15, 100)])
def test_kid_has_the_error_of_its_subsets(n, subsets, monkeypatch):
    """Of few small subsets that of a mean of independent ones; else the delete-d jackknife's."""
    values, size = [], 10

    def record(x, y):
        values.append(squared_mmd(x, y))
        return values[-1]

    monkeypatch.setattr(distances, "squared_mmd", record)
    x, y = (torch.randn(n, 4, generator=torch.Generator().manual_seed(i)) for i in range(2))
    found = kernel_distance(x, y, subsets=subsets, size=size)
    assert len(values) == subsets
    assert found.mean == pytest.approx(np.mean(values))
    independent = np.std(values, ddof=1) / subsets**0.5
    jackknife = (size / (n - size) * np.var(values)) ** 0.5
    assert found.error == pytest.approx(independent if n == 1000 else jackknife, rel=1e-9)
