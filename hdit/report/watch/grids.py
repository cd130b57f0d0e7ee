"""Grids of samples within a page: as they are, or fewer and smaller where there are many."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hdit.reading import ReadingError, read_bytes
from hdit.report.watch.series import some

PAGE_BYTES = 24 * 10**6
"""Of all grids in a page, in base64."""

HEAD = 32  # bytes of a data URI before and after the image, at most
ENOUGH = 60  # grids of a run, which are thinned to no fewer before they are made smaller
SIDE = 1024  # pixels of a grid that was made smaller
PNG = b"\x89PNG\r\n\x1a\n"
MAX_GRID = 2**28  # bytes
MAX_PIXELS = 2**27  # of a file that is opened to be made smaller


def embed(grids: dict[int, Path], budget: float) -> tuple[list[dict[str, Any]], list[str]]:
    """The grids, by images, as data URIs of `budget` bytes at most, and notes of what is missing.

    Grids are left out evenly, between the first and the last. Only where fewer than ENOUGH would
    stay are they made smaller as well, as WebP files of SIDE pixels at most.
    """
    counts, total = list(grids), len(grids)
    if not total:
        return [], []
    largest = max(_size(path) for path in grids.values())
    fit = int(budget / (largest * 4 / 3 + HEAD))
    smaller = fit < min(total, ENOUGH)
    if smaller:
        sizes = [len(_shrunk(grids[n])) for n in (counts[0], counts[-1])]
        fit = int(0.8 * budget / max(*sizes, 1))
    picked = [counts[i] for i in some(total, max(2, fit))]
    found, spent, damaged = [], 0, 0
    for images in reversed(picked):  # the newest are there, whatever else has no room
        uri = _shrunk(grids[images]) if smaller else _as_is(grids[images])
        damaged += not uri
        if uri and spent + len(uri) <= budget:
            spent += len(uri)
            found.append({"images": images, "src": uri})
    return found[::-1], _notes(total, len(found), damaged, smaller, grids[counts[0]].parent)


def _notes(total: int, shown: int, damaged: int, smaller: bool, folder: Path) -> list[str]:
    notes = []
    if shown + damaged < total:
        notes.append(
            f"{shown:,} of {total:,} grids are in this page, to keep it small; all are in {folder}."
        )
    if smaller:
        notes.append(f"Grids are at most {SIDE} pixels wide or high here, and lossy.")
    if damaged:
        notes.append(f"{damaged:,} grids could not be read.")
    return notes


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _as_is(path: Path) -> str:
    """The file as a data URI, or "" for what is no PNG."""
    content = png(path)
    return f"data:image/png;base64,{base64.b64encode(content).decode()}" if content else ""


def png(path: Path) -> bytes:
    """The content of a PNG file; nothing where it is none, as of a run that is going on."""
    try:
        content = read_bytes(path, MAX_GRID)
    except (FileNotFoundError, ReadingError):
        return b""
    return content if content.startswith(PNG) else b""


def _shrunk(path: Path) -> str:
    """The grid with at most SIDE pixels a side as a data URI; "" for what cannot be opened."""
    from PIL import Image

    try:
        with (
            warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning),
            Image.open(io.BytesIO(png(path)), formats=["PNG"]) as image,
        ):
            if image.width * image.height > MAX_PIXELS:
                return ""
            small = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
    small.thumbnail((SIDE, SIDE))
    made = io.BytesIO()
    small.save(made, format="WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(made.getvalue()).decode()}"


def links(run: int, grids: Sequence[int]) -> list[dict[str, Any]]:
    """The grids as addresses of the server, by the run's number and images."""
    return [{"images": images, "src": f"grid/{run}/{images}.png"} for images in grids]
