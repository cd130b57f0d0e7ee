"""A card as one HTML page that needs nothing else: figures, protocol, neighbours, classes."""

from __future__ import annotations

from html import escape
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hdit.evaluation.card import Comparison, in_words, record_rows
from hdit.evaluation.image_sets import ImageSet
from hdit.evaluation.metrics import BETTER, TITLES
from hdit.names import printable
from hdit.report.grids import to_png
from hdit.report.pages import document, html_table

SHEET = 64  # images of each set in the contact sheet
PAIRS = 12
WORST = 10  # classes
OF_CLASS = 10  # images of each


def page(found: Comparison, a: ImageSet, b: ImageSet | None) -> str:
    """The page of a comparison of `a` with `b`, which is None for statistics without images.

    Images are read, or sampled, again. Raises UserError where one cannot be read.
    """
    card = found.card
    parts = ["<h1>Evaluation</h1>", html_table(figures(card))]
    parts += [f"<p><b>warning</b>: {escape(printable(text))}</p>" for text in found.warnings]
    parts += ["<h2>Protocol</h2>", html_table([["", ""], *map(list, record_rows(card))])]
    parts.append("<h2>Images</h2>")
    parts.append(_sheet("A", a, _spread(len(a), SHEET)))
    if b is not None:
        parts.append(_sheet("B, the reference", b, _spread(len(b), SHEET)))
    if found.detail is not None and b is not None:
        parts += _neighbours(card["nearest"], found.detail.pairs, a, b)
        if "by_class" in card:
            parts += _classes(card["by_class"], found.detail.classes, a)
    return document("hdit evaluation", parts)


def figures(card: dict[str, Any]) -> list[list[str]]:
    """The head and a line for each metric."""
    lines = [["metric", "value and interval of 95 percent", "better", "interval by"]]
    for name, title in TITLES.items():
        if name in card:
            made = card.get("intervals", {}).get(name, {})
            lines.append([title, in_words(card, name), BETTER[name], made.get("method", "")])
    return lines


def _spread(n: int, most: int) -> list[int]:
    """Up to `most` indices of n, evenly apart."""
    most = min(n, most)
    return [i * n // most for i in range(most)]


def _sheet(title: str, images: ImageSet, indices: list[int]) -> str:
    return _figure(f"{title}: {len(indices)} of {len(images):,}", images.pictures(indices))


def _figure(caption: str, pictures: list[Tensor], columns: int | None = None) -> str:
    grid = to_png(_alike(pictures), columns)
    return (
        f"<figure><figcaption>{escape(printable(caption))}</figcaption>"
        f'<img alt="{escape(printable(caption))}" src="data:image/png;base64,{grid}"></figure>'
    )


def _alike(pictures: list[Tensor]) -> Tensor:
    """(n 3 h w) uint8 of images of any size, centred on white, none above 256 pixels."""
    shrunk = [_shrunk(image) for image in pictures]
    height, width = (max(image.shape[i] for image in shrunk) for i in (1, 2))
    made = torch.full((len(shrunk), 3, height, width), 255, dtype=torch.uint8)
    for target, image in zip(made, shrunk, strict=True):
        top, left = (height - image.shape[1]) // 2, (width - image.shape[2]) // 2
        target[:, top : top + image.shape[1], left : left + image.shape[2]] = image
    return made


def _shrunk(image: Tensor, side: int = 256) -> Tensor:
    longest = max(image.shape[1:])
    if longest <= side:
        return image
    size = [max(1, round(n * side / longest)) for n in image.shape[1:]]
    resized = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]
    return resized.round().clamp(0, 255).byte()


def _neighbours(
    nearest: dict[str, Any], pairs: list[tuple[int, int]], a: ImageSet, b: ImageSet
) -> list[str]:
    shown = pairs[:PAIRS]
    above, below = a.pictures([i for i, _ in shown]), b.pictures([j for _, j in shown])
    rows = [[p["a"], p["b"], f"{p['distance']:.4g}", f"{p['ratio']:.3g}"] for p in nearest["pairs"]]
    return [
        "<h2>Nearest reference images</h2>",
        f"<p>{nearest['authentic']:.1%} of A lie farther from their nearest reference image than "
        "that lies from its own nearest other: about half of them for new images of the same "
        f"distribution, and fewer for copies. {nearest['copies']:,} have the features of a "
        "reference image. Closest first, above, with the reference image below:</p>",
        _figure("A above, B below", above + below, len(shown)),
        html_table([["A", "nearest of B", "distance", "ratio"], *rows]),
        '<p class="note">The ratio is of that distance to the one from the reference image to its '
        "own nearest other.</p>",
    ]


def _classes(by_class: dict[str, Any], names: list[str | None], a: ImageSet) -> list[str]:
    rows = by_class["rows"]
    lines = [["class", "KID", "standard error", "images of A", "images of B"]]
    lines += [
        [row["name"], f"{row['kid']:.4g}", f"{row['error']:.2g}", str(row["a"]), str(row["b"])]
        for row in rows
    ]
    parts = ["<h2>Classes, the worst first</h2>", html_table(lines[: 1 + 10 * WORST])]
    if len(rows) > 10 * WORST:
        parts.append(f'<p class="note">{len(rows) - 10 * WORST} more are in the JSON.</p>')
    for row in rows[:WORST]:
        indices = [i for i, name in enumerate(names) if name == row["name"]][:OF_CLASS]
        parts.append(_figure(row["name"], a.pictures(indices), OF_CLASS))
    return parts
