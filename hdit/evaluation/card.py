"""Figures between two sets of images, with all that a second figure must share with them."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import PIL
import torch
from rich.table import Table

import hdit
from hdit.errors import UserError
from hdit.evaluation.cache import FeatureCache
from hdit.evaluation.details import balance, by_class, neighbours
from hdit.evaluation.extractor import Extractor
from hdit.evaluation.image_sets import NO_CLASS, ImageSet
from hdit.evaluation.measuring import Measured, measure
from hdit.evaluation.metrics import DEFAULT, SETTINGS, SLOTS, TITLES, Side, compute, impossible
from hdit.evaluation.references import Statistics, why_not
from hdit.names import printable

ENOUGH = 10_000  # images, below which the bias of FID is worth a word
PROTOCOL_KEYS = ("name", "sha256", "dimensions", "input")  # of features; others came later
OF_INCEPTION = ("fid", "fdd")


class Detail(NamedTuple):
    """What a page shows beside the card: indices of images, and the name of each one's class."""

    pairs: list[tuple[int, int]]  # the closest, (of A, of B)
    classes: list[str | None]  # of A


@dataclass(frozen=True)
class Comparison:
    """The card: figures, what they are of, and by which protocol, for JSON."""

    card: dict[str, Any]
    warnings: list[str]
    detail: Detail | None = None

    @property
    def fid(self) -> float:
        """The Fréchet distance of the features."""
        return float(self.card["fid"])


def compare(
    a: ImageSet,
    b: ImageSet | None,
    extractors: Extractor | Mapping[str, Extractor],
    *,
    statistics: Statistics | None = None,
    metrics: Sequence[str] = DEFAULT,
    named: Collection[str] = (),
    details: bool = False,
    jackknives: bool = True,
    cache: FeatureCache | None = None,
    batch_size: int = 64,
    workers: int = 0,
    on_images: Callable[[str, int], None] = lambda which, n: None,
    on_step: Callable[[str], None] = lambda metric: None,
) -> Comparison:
    """The metrics between the images of `a` and the reference: images `b`, statistics, or both.

    `extractors` are by slot (SLOTS); one alone is that of "features". Of `metrics` that are
    impossible, those that are `named` raise, and others are left out with the reason. `details` add
    the nearest reference images and figures by class; `jackknives` are as of `compute`. Features of
    `b` may come from a `cache`. `on_images` hears after each batch of which set, "A" or "B", it
    was, and how many. Raises UserError where a set has fewer than two images, or an image or a
    figure cannot be had.
    """
    if isinstance(extractors, Extractor):
        extractors = {"features": extractors}
    for which, images in (("A", a), ("B", b)):
        if images is not None and len(images) < 2:
            raise UserError(f"{which}: a covariance needs two images, got {len(images)}")
    extractors = {slot: extractors[slot] for slot in dict.fromkeys(SLOTS[m] for m in metrics)}
    wanted, left_out = _possible(metrics, named, extractors, len(a), b)
    one = measure(
        a,
        extractors,
        batch_size=batch_size,
        workers=workers,
        which=0,
        score="features" if "is" in wanted else None,
        on_images=lambda n: on_images("A", n),
    )
    other = None
    if b is not None:
        take = cache.measure if cache else measure
        other = take(
            b,
            extractors,
            batch_size=batch_size,
            workers=workers,
            which=1,
            on_images=lambda n: on_images("B", n),
        )
    sides = _sides(one, other, statistics, extractors)
    device = next(iter(extractors.values())).device
    found = compute(wanted, *sides, device, one.score, on_step, jackknives)
    card: dict[str, Any] = {
        **found.values,
        "intervals": found.intervals,
        "settings": {name: SETTINGS[name] for name in wanted if name in SETTINGS},
        "left_out": left_out,
        "a": _record(a, one),
        "b": _reference_record(b, other, statistics),
        **{slot: _features(extractors[slot], sides[0][slot]) for slot in extractors},
        "pipeline": {slot: pipeline(one) for slot, one in extractors.items()},
        "device": _device(device),
        "versions": versions(),
        "commit": commit(),
    }
    detail = None
    if details and b is not None and other is not None:
        detail = _add_details(card, (a, one), (b, other), next(iter(extractors)))
    return Comparison({"protocol": protocol(card), **card}, _warnings(card), detail)


def _possible(
    metrics: Sequence[str],
    named: Collection[str],
    extractors: Mapping[str, Extractor],
    n_a: int,
    b: ImageSet | None,
) -> tuple[list[str], dict[str, str]]:
    """(the metrics that can be had, why each other cannot). Raises UserError for a named one."""
    wanted: list[str] = []
    left_out: dict[str, str] = {}
    for name in metrics:
        n_b = None if b is None else len(b)
        reason = impossible(name, extractors[SLOTS[name]], n_a, n_b, b is not None)
        if reason is None:
            wanted.append(name)
        else:
            left_out[name] = reason
    if of := [name for name in left_out if name in named]:
        raise UserError(f"--metrics: {of[0]} cannot be had: {left_out[of[0]]}")
    return wanted, left_out


def _sides(
    one: Measured,
    other: Measured | None,
    statistics: Statistics | None,
    extractors: Mapping[str, Extractor],
) -> tuple[dict[str, Side], dict[str, Side]]:
    """What each network tells of A, and of B. Raises UserError where the widths differ."""
    a, b = {}, {}
    for slot, extractor in extractors.items():
        a[slot] = Side(*one.features[slot])
        if other is not None:
            b[slot] = Side(*other.features[slot])
        if statistics is not None:
            if reason := why_not(statistics, extractor):
                raise UserError(f"B: {reason}")
            b[slot] = Side(statistics.gaussian, b[slot].rows if slot in b else None)
        d, theirs = len(a[slot].gaussian.mean), len(b[slot].gaussian.mean)
        if theirs != d:
            raise UserError(
                f"{extractor.option}: {extractor.name} gives A {d} numbers an image, B {theirs}"
            )
    return a, b


# ---- the card ------------------------------------------------------------------------------------


def protocol(card: dict[str, Any]) -> str:
    """Short hash of what must be the same for two figures to be comparable.

    That is the reference B by its pixels, the number and size of the images in A, the features and
    how images come to them, and KID's subsets: neither the model nor how it is sampled. `facts`
    tells it for each metric, in words.
    """
    a, b = card["a"], card["b"]
    slot = next(slot for slot in dict.fromkeys(SLOTS.values()) if slot in card)
    kid = card.get("kid" if slot == "features" else "kdd") or {}
    features = {key: card[slot][key] for key in PROTOCOL_KEYS}
    # A copy of the features elsewhere is the same features, where a hash tells.
    if features["sha256"]:
        del features["name"]
    same = [
        features,
        [a["images"], a["sizes"], b["images"], b["pixels_sha256"]],
        [kid.get(key) for key in ("subsets", "sizes", "seed")],
    ]
    if "statistics_sha256" in b:
        same.append(b["statistics_sha256"])
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:12]


def facts(card: dict[str, Any], metric: str) -> dict[str, Any]:
    """What must be the same in two cards for their figures of a metric to be comparable."""
    features, a, b = card[SLOTS[metric]], card["a"], card["b"]
    value = card[metric]
    found = {
        "features": features["sha256"] or features["name"],
        "input": features["input"],
        "dimensions": features["dimensions"],
        "reference": b["pixels_sha256"],
        "reference images": b["images"],
        "images": a["images"],
        "sizes": a["sizes"],
        **card.get("settings", {}).get(metric, {}),
    }
    if metric in ("fid", "fdd") and "statistics_sha256" in b:
        found["reference"] = b["statistics_sha256"]
    if isinstance(value, dict):
        found |= {"subsets": value["subsets"], "seed": value["seed"]}
        found["sizes of subsets"] = value["sizes"]
    if metric == "is":  # of A alone
        found = {key: kept for key, kept in found.items() if not key.startswith("reference")}
    return found


def pipeline(extractor: Extractor) -> dict[str, str]:
    """Whose way from pixels to the network was followed, for a card."""
    rounding = "to uint8 after the resize" if "uint8" in extractor.resize else "none after the read"
    return {"protocol": extractor.protocol, "resize": extractor.resize, "rounding": rounding}


def versions() -> dict[str, str]:
    """Versions of hdit, Python, torch, Pillow and, where they are installed, timm's and such."""
    found = {"hdit": hdit.__version__, "python": platform.python_version()}
    found |= {"torch": torch.__version__, "pillow": PIL.__version__}
    for name in ("timm", "transformers"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def commit() -> str | None:
    """The commit of the code that runs, where it lies in a git checkout; "+" if it was changed."""
    root = Path(hdit.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    with suppress(OSError, subprocess.SubprocessError):
        said = [
            subprocess.run(
                ["git", "-C", str(root), *arguments],
                capture_output=True, text=True, timeout=10, check=True,
            ).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        ]  # fmt: skip
        return said[0] + ("+" if said[1] else "")
    return None


def _features(extractor: Extractor, side: Side) -> dict[str, Any]:
    return {
        "name": extractor.name,
        "sha256": extractor.sha256,
        "dimensions": len(side.gaussian.mean),
        "input": extractor.input,
    }


def _record(images: ImageSet, measured: Measured) -> dict[str, Any]:
    found = {
        **images.record,
        "images": len(images),
        "sizes": measured.pixels.in_words,
        "pixels_sha256": measured.pixels.sha256,
    }
    if counts := balance(_class_names(images, measured)):
        found["balance"] = counts
    return found


def _reference_record(
    images: ImageSet | None, measured: Measured | None, statistics: Statistics | None
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if images is not None and measured is not None:
        found = _record(images, measured)
        if measured.cached:
            found["from_cache"] = measured.cached
    elif statistics is not None:
        found = {
            "place": str(statistics.path),
            "kind": "statistics",
            "images": statistics.record.get("images"),
            "sizes": None,
            "pixels_sha256": statistics.record.get("pixels_sha256"),
        }
    if statistics is not None:
        found["statistics_sha256"] = statistics.sha256
        found["statistics_of"] = statistics.record or "ADM's file, by its own pipeline"
    return found


def _class_names(images: ImageSet, measured: Measured) -> list[str | None]:
    labels = measured.pixels.labels
    return [images.classes[i] if i != NO_CLASS else None for i in labels]


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _add_details(
    card: dict[str, Any], a: tuple[ImageSet, Measured], b: tuple[ImageSet, Measured], slot: str
) -> Detail:
    """Adds the nearest reference images, and figures by class, to a card."""
    (images_a, one), (images_b, other) = a, b
    x, y = one.features[slot].rows, other.features[slot].rows
    near = neighbours(x, y)
    pairs = [(int(one.kept[i]), int(other.kept[j])) for i, j, _, _ in near.pairs]
    card["nearest"] = {
        "features": slot,
        "authentic": near.authentic,
        "copies": near.copies,
        "pairs": [
            {"a": images_a.name(i), "b": images_b.name(j), "distance": d, "ratio": ratio}
            for (i, j), (_, _, d, ratio) in zip(pairs, near.pairs, strict=True)
        ],
    }
    names = [_class_names(images_a, one), _class_names(images_b, other)]
    kept = [
        [of[i] for i in which.kept.tolist()] for of, which in zip(names, (one, other), strict=True)
    ]
    if rows := by_class(x, y, *kept):
        card["by_class"] = {"metric": "kid", "features": slot, "rows": [r._asdict() for r in rows]}
    return Detail(pairs, names[0])


def _warnings(card: dict[str, Any]) -> list[str]:
    found = [f"{TITLES[name]} is left out: {why}" for name, why in card["left_out"].items()]
    a, b = card["a"], card["b"]
    counts = [record["images"] for record in (a, b) if record["images"] is not None]
    for name in OF_INCEPTION:
        if name not in card or min(counts) >= ENOUGH:
            continue
        d = card[SLOTS[name]]["dimensions"]
        rank = ", and the covariance of so few is not of full rank" if min(counts) <= d else ""
        against = " against ".join(f"{n:,}" for n in counts)
        found.append(
            f"{name.upper()} grows as the number of images falls: {against} here"
            f"{rank}; below {ENOUGH:,} compare it only with figures of the same numbers"
        )
    if a["pixels_sha256"] == b["pixels_sha256"]:
        found.append("A and B are the same images")
    if b["sizes"] is not None and a["sizes"] != b["sizes"]:
        found.append(
            f"A is {a['sizes']} and B {b['sizes']} (height x width): part of the "
            "distance may be of the sizes"
        )
    counted = a.get("balance")
    if counted and counted["most"] > counted["fewest"] + 1 and "sampling" in a:
        found.append(
            f"A has {counted['fewest']:,} to {counted['most']:,} samples of a class: papers sample "
            "classes alike, or as the data have them"
        )
    return found


# ---- in print ------------------------------------------------------------------------------------


def table(found: Comparison) -> Table:
    """The figures, and the most of the card."""
    card = found.card
    made = Table(show_header=False)
    made.add_column()
    made.add_column(overflow="fold")
    for name in TITLES:
        if name in card:
            made.add_row(TITLES[name], in_words(card, name))
    if kid := card.get("kid"):
        whole = "all images"
        subsets = f"{kid['subsets']} subsets of {kid['sizes'][0]:,} and {kid['sizes'][1]:,}"
        made.add_row("... KID is the mean of", whole if kid["subsets"] == 1 else subsets)
    made.add_section()
    for row in record_rows(card):
        made.add_row(*row)
    return made


def in_words(card: dict[str, Any], name: str) -> str:
    """A figure with its interval of 95 percent."""
    value = card[name]["mean"] if isinstance(card[name], dict) else card[name]
    text = f"{value:.4g}"
    if made := card.get("intervals", {}).get(name):
        text += f" (95%: {made['low']:.4g} to {made['high']:.4g})"
    return text


def record_rows(card: dict[str, Any]) -> list[tuple[str, str]]:
    """What the figures are of, a fact a row."""
    rows = []
    for which in ("a", "b"):
        record = card[which]
        rows.append((which.upper(), printable(_set_in_words(record))))
        if line := _sampling_in_words(record):
            rows.append(("... sampled", printable(line)))
        if "statistics_sha256" in record:
            rows.append(("... FID's reference", "the mean and covariance that the file holds"))
        for slot, path in record.get("from_cache", {}).items():
            rows.append((f"... {slot}", printable(f"from the cache: {Path(path).name}")))
    for slot in dict.fromkeys(SLOTS.values()):
        if features := card.get(slot):
            digest = f" (SHA-256 {features['sha256']:.12}...)" if features["sha256"] else ""
            name = f"{features['dimensions']:,} of {features['name']}{digest}"
            rows.append((slot, printable(name)))
            rows.append(("... of", features["input"]))
    if followed := card.get("pipeline", {}).get("features"):
        rows.append(("pipeline", ", ".join(f"{k} {v}" for k, v in followed.items())))
    rows.append(("versions", ", ".join(f"{k} {v}" for k, v in card["versions"].items())))
    rows.append(("protocol", card["protocol"]))
    return rows


def _set_in_words(record: dict[str, Any]) -> str:
    place = f"{record['place']} ({record['kind']})"
    if record["images"] is None:
        return place
    number = f"{record['images']:,}"
    if record["sizes"] is not None:
        number += f" of {record['sizes']}"
    if counts := record.get("balance"):
        low, high = counts["fewest"], counts["most"]
        each = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        place += f"; {counts['classes']:,} classes of {each}"
    return f"{number}: {place}"


def _sampling_in_words(record: dict[str, Any]) -> str:
    sampling = record.get("sampling")
    if not isinstance(sampling, dict):
        return ""
    guidance = sampling.get("guidance", {})
    parts = [
        f"{sampling.get('sampler', {}).get('kind')}, {sampling.get('steps')} steps on "
        f"{sampling.get('sigmas', {}).get('kind')}",
        f"{record.get('evaluations')} evaluations",
        f"guidance {guidance.get('scale', 1):g}",
    ]
    text = ", ".join(parts)
    if "labels" in record:
        text += f"; labels: {record['labels']}"
    if "seeds" in record:
        text += f"; seeds {' to '.join(map(str, record['seeds']))}"
    return f"{text}; weights: {record.get('weights')}"
