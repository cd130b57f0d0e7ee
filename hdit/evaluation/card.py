"""FID and KID between two sets of images, with all that a second figure must share with them."""

from __future__ import annotations

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from typing import Any, NamedTuple

import PIL
import torch
from rich.table import Table
from torch import Tensor

import hdit
from hdit.errors import UserError
from hdit.evaluation.distances import (
    Gaussian,
    KernelDistance,
    Moments,
    frechet_distance,
    kept_for_kid,
    kernel_distance,
)
from hdit.evaluation.features import Extractor
from hdit.evaluation.image_sets import ImageSet
from hdit.names import printable

ENOUGH = 10_000  # images, below which the bias of FID is worth a word
KID_SEED = 0


@dataclass(frozen=True)
class Comparison:
    """Distances, and the card: what they are of, and by which protocol, for JSON."""

    fid: float
    kid: KernelDistance
    card: dict[str, Any]
    warnings: list[str]


class Measured(NamedTuple):
    """Features of one set."""

    gaussian: Gaussian
    features: Tensor  # (n d) of those images that KID draws from
    sizes: str  # in words
    pixels: str  # SHA-256, whatever the order


def compare(
    a: ImageSet,
    b: ImageSet,
    extractor: Extractor,
    *,
    batch_size: int = 64,
    workers: int = 0,
    on_images: Callable[[str, int], None] = lambda which, n: None,
    on_subset: Callable[[], None] = lambda: None,
) -> Comparison:
    """FID and KID between the images of `a` and of `b`.

    Raises UserError where a set has fewer than two images, or an image or a distance cannot be had.

    `on_images` is told after each batch of which set, "A" or "B", it was, and how many.
    """
    for which, images in (("A", a), ("B", b)):
        if len(images) < 2:
            raise UserError(f"{which}: a covariance needs two images, got {len(images)}")
    measured = []
    for i, (which, images) in enumerate((("A", a), ("B", b))):

        def tell(n: int, which: str = which) -> None:
            on_images(which, n)

        measured.append(measure(images, extractor, batch_size, workers, i, tell))
    one, other = measured
    d = len(one.gaussian.mean)
    if (theirs := len(other.gaussian.mean)) != d:
        raise UserError(f"--features: {extractor.name} gives A {d} numbers an image, B {theirs}")
    fid = frechet_distance(one.gaussian, other.gaussian)
    kid = kernel_distance(one.features, other.features, seed=KID_SEED, on_subset=on_subset)
    card = {
        "fid": fid,
        "kid": {
            "mean": kid.mean,
            "standard_error": kid.error,
            "subsets": kid.subsets,
            "sizes": list(kid.sizes),
            "seed": kid.seed,
        },
        "a": _record(a, one),
        "b": _record(b, other),
        "features": {
            "name": extractor.name,
            "sha256": extractor.sha256,
            "dimensions": d,
            "input": extractor.input,
        },
        "device": _device(extractor.device),
        "versions": versions(),
    }
    return Comparison(fid, kid, {"protocol": protocol(card), **card}, _warnings(card))


def measure(
    images: ImageSet,
    extractor: Extractor,
    batch_size: int,
    workers: int,
    which: int,
    on_images: Callable[[int], None],
) -> Measured:
    """Computes features of all images of a set: their Gaussian, and those that KID draws from.

    `which` tells the set's draw for KID from the other's; `on_images` hears of each batch's number.
    Raises UserError where images are of several sizes, or features of several widths.
    """
    kept = torch.zeros(len(images), dtype=torch.bool)
    kept[torch.from_numpy(kept_for_kid(len(images), KID_SEED, which))] = True
    moments: Moments | None = None
    features: list[Tensor] = []
    sizes: list[tuple[int, int]] = []
    digests: list[bytes] = []
    for part in images.parts(extractor.prepare, batch_size, workers):
        first = len(sizes)
        sizes += part.sizes
        digests += part.digests
        if extractor.prepare is None:
            _check_sizes(images, sizes, first, extractor.name)
        assert part.stacked is not None, "images of one size, or resized to one"
        rows = extractor(part.stacked)
        moments = moments or Moments(rows.shape[1])
        if rows.shape[1] != len(moments.mean):
            raise UserError(
                f"--features: {extractor.name} gives {rows.shape[1]} numbers an image, after "
                f"{len(moments.mean)} for those before"
            )
        moments.add(rows)
        features.append(rows[kept[first : len(sizes)]])
        on_images(len(rows))
    assert moments is not None, "two images or more"
    assert moments.n == len(images), "each image once"
    pixels = hashlib.sha256(b"".join(sorted(digests))).hexdigest()
    return Measured(moments.gaussian(), torch.cat(features), _in_words(sizes), pixels)


def _check_sizes(images: ImageSet, sizes: list[tuple[int, int]], first: int, features: str) -> None:
    for i in range(first, len(sizes)):
        if sizes[i] != sizes[0]:
            raise UserError(
                f"--features: {features} gets images as they are, so those of a set must be of "
                f"one size; {images.name(0)} is {_size(sizes[0])}, {images.name(i)} is "
                f"{_size(sizes[i])}"
            )


# ---- the card ------------------------------------------------------------------------------------


def protocol(card: dict[str, Any]) -> str:
    """Short hash of what must be the same for two figures to be comparable.

    That is the reference B by its pixels, the number and size of the images in A, the features and
    how images come to them, and KID's subsets: neither the model nor how it is sampled.
    """
    kid, a, b = card["kid"], card["a"], card["b"]
    same = [
        card["features"],
        [a["images"], a["sizes"], b["images"], b["pixels_sha256"]],
        [kid[key] for key in ("subsets", "sizes", "seed")],
    ]
    # A copy of the features elsewhere is the same features, where a hash tells.
    if same[0]["sha256"]:
        same[0] = {key: value for key, value in same[0].items() if key != "name"}
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:12]


def versions() -> dict[str, str]:
    """Versions of hdit, Python, torch, Pillow and, where it is installed, clean-fid."""
    found = {"hdit": hdit.__version__, "python": platform.python_version()}
    found |= {"torch": torch.__version__, "pillow": PIL.__version__}
    with suppress(metadata.PackageNotFoundError):
        found["clean-fid"] = metadata.version("clean-fid")
    return found


def _record(images: ImageSet, measured: Measured) -> dict[str, Any]:
    return {
        **images.record,
        "images": len(images),
        "sizes": measured.sizes,
        "pixels_sha256": measured.pixels,
    }


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _in_words(sizes: list[tuple[int, int]]) -> str:
    """(height, width) of all."""
    counts = Counter(sizes)
    if len(counts) == 1:
        return _size(sizes[0])
    ordered = sorted(counts, key=lambda size: (size[0] * size[1], size))
    return f"{len(counts)} sizes from {_size(ordered[0])} to {_size(ordered[-1])}"


def _warnings(card: dict[str, Any]) -> list[str]:
    found = []
    counts = [card[which]["images"] for which in ("a", "b")]
    d = card["features"]["dimensions"]
    if min(counts) < ENOUGH:
        rank = ", and the covariance of so few is not of full rank" if min(counts) <= d else ""
        found.append(
            f"FID grows as the number of images falls: {counts[0]:,} against {counts[1]:,} here"
            f"{rank}; below {ENOUGH:,} compare it only with figures of the same numbers"
        )
    if card["a"]["pixels_sha256"] == card["b"]["pixels_sha256"]:
        found.append("A and B are the same images")
    if card["a"]["sizes"] != card["b"]["sizes"]:
        found.append(
            f"A is {card['a']['sizes']} and B {card['b']['sizes']} (height x width): part of the "
            "distance may be of the sizes"
        )
    return found


def table(found: Comparison) -> Table:
    """The distances, and the most of the card."""
    card, kid = found.card, found.kid
    made = Table(show_header=False)
    made.add_column()
    made.add_column(overflow="fold")
    error = "" if kid.error is None else f" ± {kid.error:.2g} (standard error)"
    rows = {
        "FID": f"{found.fid:.4g}",
        "KID": f"{kid.mean:.4g}{error}",
        "... mean of": "all images"
        if kid.subsets == 1
        else f"{kid.subsets} subsets of {kid.sizes[0]:,} and {kid.sizes[1]:,}",
    }
    for name, values in rows.items():
        made.add_row(name, values)
    made.add_section()
    for which in ("a", "b"):
        record = card[which]
        place = f"{record['place']} ({record['kind']})"
        line = f"{record['images']:,} of {record['sizes']}: {place}"
        made.add_row(which.upper(), printable(line))
        if sampling := record.get("sampling"):
            steps, scale = sampling["steps"], sampling["guidance"]["scale"]
            made.add_row(
                "... sampled",
                f"{sampling['sampler']['kind']}, {steps} steps on {sampling['sigmas']['kind']}, "
                f"{record['evaluations']} evaluations, guidance {scale:g}; labels: "
                f"{record['labels']}; seeds {' to '.join(map(str, record['seeds']))}; "
                f"weights: {record['weights']}",
            )
    features = card["features"]
    digest = f" (SHA-256 {features['sha256']:.12}...)" if features["sha256"] else ""
    name = printable(features["name"])
    made.add_row("features", f"{features['dimensions']:,} of {name}{digest}")
    made.add_row("... of", features["input"])
    made.add_row("versions", ", ".join(f"{k} {v}" for k, v in card["versions"].items()))
    made.add_row("protocol", card["protocol"])
    return made
