"""Nearest rows, and precision and recall, against the definitions by brute force."""

import numpy as np
import pytest
import torch

from hdit.evaluation.manifolds import precision_recall
from hdit.evaluation.tiles import nearest


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(x, y, k):
    """Share of x that lies in a ball around a row of y, the radius to its k-th nearest other."""
    x, y = x.numpy(), y.numpy()
    radii = [
        sorted(np.linalg.norm(y[i] - y[j]) for j in range(len(y)) if j != i)[k - 1]
        for i in range(len(y))
    ]
    inside = [any(np.linalg.norm(a - b) <= r for b, r in zip(y, radii, strict=True)) for a in x]
    return np.mean(inside)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("tile", [2**24, 5000])
def test_precision_and_recall_are_those_of_the_definition(k, tile):
    x, y = normal(60, 5, seed=1), normal(47, 5, seed=2) * 0.7 + 0.4
    found = precision_recall(x, y, k, tile)
    assert found.precision == by_definition(x, y, k)
    assert found.recall == by_definition(y, x, k)
    assert 0 < found.precision < 1
    assert found.precision != found.recall


def test_precision_and_recall_do_not_depend_on_an_offset():
    """Squares of features summed as they are would have no digits left at an offset of 1e6."""
    x, y = normal(60, 5, seed=1), normal(47, 5, seed=2) * 0.7 + 0.4
    assert precision_recall(x + 1e6, y + 1e6) == precision_recall(x, y)


def test_a_set_lies_in_itself_and_one_far_away_does_not():
    x = normal(40, 3)
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 100) == (0, 0)


def test_a_collapsed_set_is_precise_and_recalls_little():
    y = normal(200, 4, seed=1)
    x = y[:1] + 1e-3 * normal(50, 4, seed=2)
    found = precision_recall(x, y)
    assert found.precision == 1
    assert found.recall <= 1 / len(y)


@pytest.mark.parametrize("tile", [2**24, 3000])
def test_nearest_rows_are_those_of_all_distances_sorted(tile):
    x, y = normal(30, 4, seed=1), normal(25, 4, seed=2)
    all_of_them = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    wanted = all_of_them.sort(dim=1)
    found = nearest(x, y, 3, tile)
    assert torch.equal(found.indices, wanted.indices[:, :3])
    torch.testing.assert_close(found.squared.sqrt(), wanted.values[:, :3])


def test_a_row_is_no_neighbour_of_itself():
    x = torch.cat([normal(20, 4)] * 2)
    found = nearest(x, None)
    assert torch.equal(found.indices[:, 0], (torch.arange(40) + 20) % 40)
    assert found.squared.max() < 1e-12
