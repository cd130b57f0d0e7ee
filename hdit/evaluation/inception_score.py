"""Inception Score (Salimans et al., 2016, section 4): sharp predictions of varied classes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hdit.evaluation.intervals import groups_of

SPLITS = 10


class InceptionScore(NamedTuple):
    """Mean and standard deviation over the splits, as papers print them."""

    mean: float
    deviation: float
    splits: int

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return self.deviation / math.sqrt(self.splits)


class ScoreParts:
    """Sums of class probabilities of n images, in `splits` parts of about the same size.

    A part's score is exp of the mean of KL(p(y|x) || p(y)), p(y) the mean of the part itself. Parts
    are drawn at random, but always alike: of a folder that is sorted by class, parts in its order
    would have a class each, and a score near 1.
    """

    def __init__(self, n: int, splits: int = SPLITS):
        """n is at least `splits`."""
        assert n >= splits, "a part needs an image"
        self.n, self.splits, self.seen = n, splits, 0
        self.places = groups_of(n, splits)
        self.counts = torch.zeros(splits, dtype=torch.float64)
        self.negentropies = torch.zeros(splits, dtype=torch.float64)  # sums of p ln p
        self.probabilities: Tensor | None = None  # (splits c), sums

    def add(self, p: Tensor) -> None:
        """The next images' probabilities p (b c), in the order of the set."""
        p = p.double()
        place = self.places[self.seen : self.seen + len(p)]
        if self.probabilities is None:
            self.probabilities = p.new_zeros(self.splits, p.shape[1])
        self.probabilities.index_add_(0, place, p)
        self.negentropies.index_add_(0, place, torch.special.xlogy(p, p).sum(1))
        self.counts.index_add_(0, place, torch.ones(len(p), dtype=torch.float64))
        self.seen += len(p)

    def score(self) -> InceptionScore:
        """Of all n images, once they were added."""
        assert self.probabilities is not None, "of images"
        assert self.seen == self.n, "of all images"
        mean = self.probabilities / self.counts[:, None]
        divergence = self.negentropies / self.counts - torch.special.xlogy(mean, mean).sum(1)
        scores = divergence.exp()
        return InceptionScore(scores.mean().item(), scores.std(correction=0).item(), self.splits)
