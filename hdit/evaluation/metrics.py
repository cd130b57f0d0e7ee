"""The metrics by name: which network each takes, what it needs, and how it is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hdit.errors import UserError
from hdit.evaluation.discrepancy import SCALE, SIGMA, cmmd, discrepancy
from hdit.evaluation.distances import (
    Gaussian,
    frechet_distance,
    kernel_distance,
    polynomial_kernel,
)
from hdit.evaluation.extractor import Extractor
from hdit.evaluation.inception_score import SPLITS, InceptionScore
from hdit.evaluation.intervals import GROUPS, frechet_error, interval, share_interval, sliced_error
from hdit.evaluation.manifolds import NEIGHBOURS, precision_recall
from hdit.evaluation.measuring import KID_SEED
from hdit.evaluation.sliced import PROJECTIONS, sliced_wasserstein

SLOTS = {
    "fid": "features",
    "kid": "features",
    "is": "features",
    "precision": "features",
    "recall": "features",
    "swd": "features",
    "fdd": "dinov2",
    "kdd": "dinov2",
    "cmmd": "clip",
}
"""The network of each metric, by the option that names it."""

TITLES = {
    "fid": "FID",
    "kid": "KID",
    "is": "Inception Score",
    "precision": "precision",
    "recall": "recall",
    "swd": "sliced Wasserstein",
    "fdd": "FDD (DINOv2)",
    "kdd": "KDD (DINOv2)",
    "cmmd": "CMMD",
}
DEFAULT = ("fid", "kid", "is", "precision", "recall")
"""Of one network; each where it is possible."""
BETTER = {name: "higher" if name in ("is", "precision", "recall") else "lower" for name in SLOTS}

SETTINGS: dict[str, dict[str, Any]] = {
    "is": {"splits": SPLITS, "parts": "drawn"},
    "precision": {"k": NEIGHBOURS},
    "recall": {"k": NEIGHBOURS},
    "swd": {"projections": PROJECTIONS, "seed": 0},
    "cmmd": {"sigma": SIGMA, "scale": SCALE, "estimate": "biased"},
}
"""What else must be the same for two figures to be comparable. KID's are beside its mean."""


class Side(NamedTuple):
    """What one network tells of one set. Without rows it is a file of statistics."""

    gaussian: Gaussian
    rows: Tensor | None


def chosen(text: str | None) -> tuple[list[str], list[str]]:
    """(the metrics of a list with commas in the order of SLOTS, those that were named).

    None is those of one network, and "all" those of all; KID always goes with FID. Raises UserError
    for a name that is none.
    """
    if text is None:
        return list(DEFAULT), []
    names = [name.strip() for name in text.split(",")]
    if names == ["all"]:
        return list(SLOTS), []
    if unknown := [name for name in names if name not in SLOTS]:
        raise UserError(f"--metrics: {unknown[0]!r} is none; known: {', '.join(SLOTS)}, or all")
    wanted = {*names, *(["kid"] if "fid" in names else []), *(["kdd"] if "fdd" in names else [])}
    return [name for name in SLOTS if name in wanted], names


def impossible(
    name: str, extractor: Extractor, n_a: int, n_b: int | None, has_rows: bool
) -> str | None:
    """Why a metric cannot be had of sets of n images; None where it can.

    `n_b` is None and `has_rows` false where B is a file of statistics without images.
    """
    if name == "is":
        if extractor.predict is None:
            return f"{extractor.name} predicts no classes"
        return f"its {SPLITS} parts need an image each, got {n_a}" if n_a < SPLITS else None
    if name in ("fid", "fdd"):
        return None
    if not has_rows:
        return "the reference has statistics alone, and this takes images"
    least = {"precision": NEIGHBOURS + 1, "recall": NEIGHBOURS + 1, "cmmd": 3}.get(name, 2)
    if min(n_a, n_b or n_a) < least:
        return f"it takes at least {least} images, got {n_a} and {n_b}"
    return None


class Found(NamedTuple):
    """Values by metric, as a card has them, and their intervals."""

    values: dict[str, Any]
    intervals: dict[str, dict[str, Any]]


def compute(
    names: Sequence[str],
    a: Mapping[str, Side],
    b: Mapping[str, Side],
    device: torch.device,
    score: InceptionScore | None = None,
    tell: Callable[[str], None] = lambda name: None,
    jackknives: bool = True,
) -> Found:
    """The metrics of both sides, by slot. `tell` hears of each step of each metric.

    Without `jackknives` there are no intervals of FID, FDD and the sliced distance, whose 20 groups
    take 20 times as long as their figure.
    """
    found = Found({}, {})
    place = device if device.type == "cuda" else torch.device("cpu")  # others lack float64
    for name in names:
        slot = SLOTS[name]

        def step(name: str = name) -> None:
            tell(name)

        if name == "is":
            assert score is not None, "measured beside the features"
            _add_score(found, score)
        elif name in ("fid", "fdd"):
            _add_frechet(found, name, a[slot], b[slot], step, jackknives)
        elif name in ("precision", "recall"):
            if name not in found.values:
                _add_shares(found, *_rows(a[slot], b[slot], place), names)
        else:
            x, y = _rows(a[slot], b[slot], place)
            if name == "swd":
                _add_sliced(found, name, x, y, jackknives)
            elif name == "cmmd":
                _add_cmmd(found, name, x, y)
            else:
                _add_kernel(found, name, x, y, step)
        step()
    return found


def _rows(a: Side, b: Side, place: torch.device) -> tuple[Tensor, Tensor]:
    assert a.rows is not None, "images"
    assert b.rows is not None, "images, or it was impossible"
    return a.rows.to(place), b.rows.to(place)


def _add_score(found: Found, score: InceptionScore) -> None:
    found.values["is"] = score.mean
    method = f"Student's t over the {score.splits} parts of A"
    found.intervals["is"] = interval(score.mean, score.error, method, score.splits - 1)


def _add_frechet(
    found: Found, name: str, a: Side, b: Side, step: Callable[[], None], jackknife: bool
) -> None:
    value = found.values[name] = frechet_distance(a.gaussian, b.gaussian)
    if not jackknife or a.rows is None or len(a.rows) < 2 * GROUPS:
        return
    error = frechet_error(a.rows, a.gaussian, b.gaussian, step)
    method = f"jackknife of {GROUPS} groups of A, B fixed; its bias, of few images, is not in it"
    made = found.intervals[name] = interval(value, error, method, GROUPS - 1)
    made["low"] = max(0.0, made["low"])


def _add_kernel(found: Found, name: str, x: Tensor, y: Tensor, step: Callable[[], None]) -> None:
    kid = kernel_distance(x, y, seed=KID_SEED, on_subset=step)
    error, method = kid.error, f"{kid.subsets} subsets of A and B, the delete-d jackknife"
    if error is None and min(len(x), len(y)) > 2:
        error = discrepancy(x, y, polynomial_kernel).error
        method = "delete-one jackknife of A and B"
    found.values[name] = {
        "mean": kid.mean,
        "standard_error": error,
        "subsets": kid.subsets,
        "sizes": list(kid.sizes),
        "seed": kid.seed,
    }
    if error is not None:
        found.intervals[name] = interval(kid.mean, error, method)


def _add_shares(found: Found, x: Tensor, y: Tensor, names: Sequence[str]) -> None:
    """Precision and recall, which share their distances; those of them that are asked for."""
    shares = precision_recall(x, y)
    for name, value, n, of in (
        ("precision", shares.precision, len(x), "A, the manifold of B"),
        ("recall", shares.recall, len(y), "B, the manifold of A"),
    ):
        if name in names:
            found.values[name] = value
            found.intervals[name] = share_interval(value, n, f"Wilson's, of {of} fixed")


def _add_sliced(found: Found, name: str, x: Tensor, y: Tensor, jackknife: bool) -> None:
    value = found.values[name] = sliced_wasserstein(x, y)
    if jackknife and len(x) >= 2 * GROUPS:
        method = f"jackknife of {GROUPS} groups of A, B fixed"
        found.intervals[name] = interval(value, sliced_error(x, y), method, GROUPS - 1)


def _add_cmmd(found: Found, name: str, x: Tensor, y: Tensor) -> None:
    made = cmmd(x, y)
    found.values[name] = made.squared
    found.intervals[name] = interval(made.squared, made.error, "delete-one jackknife of A and B")
