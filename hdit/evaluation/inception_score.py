"""Inception Score (Salimans et al., 2016, section 4): sharp predictions of varied classes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

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
    """Sums of class probabilities of n images that come in order, in `splits` equal parts.

    A part's score is exp of the mean of KL(p(y|x) || p(y)), p(y) the mean of the part itself.
    """

    def __init__(self, n: int, splits: int = SPLITS):
        """n is at least `splits`."""
        assert n >= splits, "a part needs an image"
        self.n, self.splits, self.seen = n, splits, 0
        self.counts = torch.zeros(splits, dtype=torch.float64)
        self.negentropies = torch.zeros(splits, dtype=torch.float64)  # sums of p ln p
        self.probabilities: Tensor | None = None  # (splits c), sums

    def add(self, p: Tensor) -> None:
        """The next images' probabilities p (b c)."""
        p = p.double()
        place = torch.arange(self.seen, self.seen + len(p)) * self.splits // self.n
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
