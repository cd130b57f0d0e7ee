"""Plots as SVG text that needs nothing else, by matplotlib (extra `plots`)."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hdit.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")
NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # else the date, and links
FEW = 16  # points, up to which each has a mark
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "hdit",  # ids in the file are random without it
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a name may hold dollar signs
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#eeeeee",
    "axes.edgecolor": "#999999",
}

Series = Mapping[str, Sequence[tuple[float, float]]]


def require_matplotlib() -> None:
    """Raises UserError where matplotlib is missing, before work is done that ends in a plot."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"plots need the package matplotlib ({error}): pip install 'hdit[plots]'"
        ) from None


def plot_lines(
    series: Series,
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    size: tuple[int, int] = (720, 340),
) -> str:
    """Named lines through points (x, y) as an SVG of `size` CSS pixels.

    The same data give the same text. Points that an axis cannot show, such as nan, or 0 on a
    logarithmic one, are left out. Raises UserError if matplotlib is missing.
    """
    require_matplotlib()
    import matplotlib as mpl

    title = f"{y_label} by {x_label}"
    made = io.StringIO()
    with mpl.rc_context(STYLE):
        figure = _figure(series, x_label, y_label, log_x, log_y, size)
        figure.savefig(made, format="svg", metadata=NO_METADATA | {"Title": title})
    text = made.getvalue()
    return text[text.index("<svg") :].rstrip()  # a page may hold no XML declaration


def _figure(
    series: Series, x_label: str, y_label: str, log_x: bool, log_y: bool, size: tuple[int, int]
) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(size[0] / 96, size[1] / 96), layout="constrained")
    axes = figure.subplots()
    lines = []
    for i, (name, points) in enumerate(series.items()):
        shown = [(x, y) for x, y in points if _fits(x, log_x) and _fits(y, log_y)]
        xs, ys = zip(*shown, strict=True) if shown else ((), ())
        marker = "o" if len(shown) <= FEW else None
        colour = COLOURS[i % len(COLOURS)]
        lines += axes.plot(
            xs, ys, label=name, color=colour, linewidth=1.8, marker=marker, markersize=4
        )
    axes.set(xlabel=x_label, ylabel=y_label)
    if log_x:
        axes.set_xscale("log")
    if log_y:
        axes.set_yscale("log")
    for axis, (low, high), log in (
        (axes.xaxis, axes.get_xlim(), log_x),
        (axes.yaxis, axes.get_ylim(), log_y),
    ):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))
        if log:
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
            axis.set_minor_formatter(NullFormatter())
    axes.legend(lines, list(series), frameon=False)  # or it would leave out names in "_"
    return figure


def _fits(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)
