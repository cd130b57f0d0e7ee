"""One HTML page that needs nothing else: template, style, scripts and data in a file."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path

from hdit.names import printable
from hdit.report.watch.data import describe
from hdit.report.watch.grids import PAGE_BYTES, embed, links
from hdit.runs.history import History, Values

SCRIPTS = ("maths.js", "chart.js", "page.js")


def write_page(folders: Sequence[Path]) -> str:
    """The page of these runs as they stand now, with their grids in it."""
    histories = [History(folder) for folder in folders]
    for history in histories:
        history.update()
    told = describe(histories, time.time())
    for run, history in zip(told["runs"], histories, strict=True):
        found, notes = embed(history.grids(), PAGE_BYTES / len(histories))
        run["grids"], run["grid_notes"] = found, [printable(note) for note in notes]
    return render(told)


def live(histories: Sequence[History], now: float, every: float) -> Values:
    """What a served page draws: grids are links, and it asks again after `every` seconds."""
    told = describe(histories, now) | {"live": every}
    for number, (run, history) in enumerate(zip(told["runs"], histories, strict=True)):
        run["grids"] = links(number, list(history.grids()))
    return told


def render(told: Values) -> str:
    """The page that draws these data."""
    parts = {
        "title": escape("hdit watch: " + ", ".join(run["name"] for run in told["runs"])),
        "style": _text("style.css"),
        "script": "\n".join(map(_text, SCRIPTS)),
        "data": in_script(told),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _text("page.html"))


def in_script(value: Values) -> str:
    """JSON that no browser takes for markup: it is ASCII, without <, > or &."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _text(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
